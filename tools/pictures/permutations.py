"""One relaxed permutation over the temperature, with the scores, the assignment and the mean of many."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj

N = 7
SCORES = jnp.asarray(1.2 * np.random.default_rng(4).normal(size=(N, N)), jnp.float32)
TAUS = (2.0, 0.5, 0.1)


def picture(draws):
    key = jax.random.key(1)
    panels = {"scores X": SCORES}
    panels |= {f"tau {tau}": rj.gumbel_sinkhorn(key, SCORES, tau) for tau in TAUS}
    panels["hard=True"] = rj.gumbel_sinkhorn(key, SCORES, 0.5, hard=True)
    hard = jax.jit(lambda key: rj.gumbel_sinkhorn(key, SCORES, 0.5, shape=(draws,), hard=True).mean(0))
    panels["mean of hard draws"] = hard(jax.random.key(2))
    figure, axes = plt.subplots(2, 3, figsize=(6.6, 4.9), layout="constrained")
    for axis, (title, matrix) in zip(axes.flat, panels.items(), strict=True):
        shades = {} if title == "scores X" else {"vmin": 0, "vmax": 1}
        axis.imshow(np.asarray(matrix), cmap="Greys", **shades)
        axis.set_title(title, fontsize=10.5)
        axis.set(xticks=[], yticks=[])
    for axis in axes[:, 0]:
        axis.set_ylabel("thing", fontsize=10.5)
    for axis in axes[1]:
        axis.set_xlabel("place", fontsize=10.5)
    return figure
