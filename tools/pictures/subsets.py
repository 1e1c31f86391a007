"""How often each element is among k of n under the two laws, and one relaxed draw over the temperature."""

import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj

WEIGHTS = np.array([8, 4, 2, 1, 1, 1 / 2, 1 / 4, 1 / 8])
LOGITS = jnp.log(jnp.asarray(WEIGHTS, jnp.float32))
N, K = len(WEIGHTS), 3
TAUS = jnp.geomspace(0.01, 10, 200)
NAMES = ("8", "4", "2", "1", "1", "1/2", "1/4", "1/8")
LAWS = {"one after another: gumbel_top_k": "#0072B2", "bits given their sum: simple_top_k": "#E69F00"}


def inclusion(draws):
    """For each law, the shares of draws with each element, and the exact probabilities."""
    key = jax.random.key(0)
    indices, _ = rj.gumbel_top_k(key, LOGITS, K, shape=(draws,))
    sets = np.array(list(itertools.combinations(range(N), K)))
    k_hot = np.array([np.isin(np.arange(N), chosen) for chosen in sets])
    p = np.exp(rj.gumbel_top_k_log_prob(sets, LOGITS, ordered=False))
    yield np.bincount(np.ravel(indices), minlength=N) / draws, p @ k_hot
    yield (
        np.asarray(rj.simple_top_k(key, LOGITS, K, shape=(draws,)).mean(0)),
        np.asarray(rj.simple_top_k_marginals(LOGITS, K)),
    )


def picture(draws):
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.6, 6.8), layout="constrained")
    places = np.arange(N)
    for side, (name, colour), (shares, exact) in zip(
        (-0.2, 0.2), LAWS.items(), inclusion(draws), strict=True
    ):
        above.bar(places + side, shares, 0.38, color=colour, label=name)
        above.plot(places + side, exact, "o", color="black", ms=4)
    above.set_xticks(places, NAMES)
    above.set_xlabel(f"weight of the element; {K} of {N} are drawn", fontsize=10.5)
    above.set_ylabel("share of draws with it", fontsize=10.5)
    above.legend(fontsize=9.5, frameon=False)

    # the same key, so the same noise, at every temperature
    z = np.asarray(jax.vmap(lambda tau: rj.relaxed_top_k(jax.random.key(38), LOGITS, K, tau))(TAUS))
    for place, name in enumerate(NAMES):
        below.plot(TAUS, z[:, place], lw=2, color=plt.cm.turbo(0.05 + 0.9 * place / (N - 1)), label=name)
    below.axhline(1, color="black", ls=":", lw=1.2)
    below.set(xscale="log", ylim=(0, None))
    below.set_xlabel("temperature tau", fontsize=10.5)
    below.set_ylabel("entry of relaxed_top_k", fontsize=10.5)
    figure.legend(title="weight", loc="outside lower center", fontsize=9.5, ncols=N, frameon=False,
                  handles=below.lines[:N], handlelength=1.2, columnspacing=1)  # fmt: skip
    for axis in (above, below):
        axis.grid(axis="y", alpha=0.3)
    return figure
