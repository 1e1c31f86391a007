"""Bias, standard deviation and rms error of gradients through relaxed bits, over the temperature."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from which_method import part, parts_of_error

import relaxit_jax as rj
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import from_sampler, gradient_report

TAUS = np.geomspace(0.03, 10, 16)
BUDGET = 10  # calls of f in a step
rng = np.random.default_rng(1)
LOGITS, WEIGHTS = (
    jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 8))
)  # the same as in which_method.py
FUNCTIONS = ("quadratic", "steep")
LOOKS = {
    "relaxed_bernoulli": ("#CC79A7", "-"), "the same, hard=True": ("#56B4E9", "-"),
    "straight_through_bernoulli": ("#000000", "-"), "rebar": ("#8C564B", "--"),
}  # fmt: skip


def f(z):
    """Both functions, on the axis before the axis of the bits, with any axes in front."""
    x = jnp.sum(WEIGHTS * z, -1) - 1
    return jnp.stack([x[..., 0] ** 2, jax.nn.sigmoid(20 * x[..., 1])], -1)


def at_every_tau(sampler):
    return from_sampler(lambda key, logits: sampler(key, logits, jnp.float32(TAUS)[:, None, None]))


def rebar(key, f, q):
    """Its temperature is a scalar, so each has its own call."""
    one = lambda logits, tau: es.rebar(key, f, es.Bernoulli(logits), tau=tau)
    return jax.vmap(one)(q.logits, jnp.float32(TAUS))


METHODS = {
    "relaxed_bernoulli": at_every_tau(rj.relaxed_bernoulli),
    "the same, hard=True": at_every_tau(lambda *args: rj.relaxed_bernoulli(*args, hard=True)),
    "straight_through_bernoulli": from_sampler(rj.straight_through_bernoulli),
    "rebar": rebar,
}
CALLS = {name: 3 if name == "rebar" else 1 for name in METHODS}


def curves(draws):
    """(quantity, function, method, tau): bias, standard deviation of one estimate, rms error of a step."""
    q = es.Bernoulli(jnp.broadcast_to(LOGITS, (len(TAUS), len(FUNCTIONS), LOGITS.size)))
    whole = gradient_report(jax.random.key(0), f, q, METHODS, draws, batch_size=200)
    errors = [[parts_of_error(part(whole, t, i)) for t in range(len(TAUS))] for i in range(len(FUNCTIONS))]
    bias, sd = np.moveaxis(np.array(errors), (2, 0, 3, 1), (0, 1, 2, 3))
    calls = np.array([CALLS[name] for name in METHODS])[:, None]
    return bias, sd, np.sqrt(bias**2 + sd**2 * calls / BUDGET)


def picture(draws):
    figure, axes = plt.subplots(3, 2, figsize=(6.6, 8.4), sharex=True, sharey="row", layout="constrained")
    labels = ("bias", "standard deviation\nof one estimate", f"rms error of a step\nof {BUDGET} calls of f")
    for line, label, quantity in zip(axes, labels, curves(draws), strict=True):
        line[0].set_ylabel(label, fontsize=10.5)
        for axis, methods in zip(line, quantity, strict=True):
            for (name, (colour, dashes)), values in zip(LOOKS.items(), methods, strict=True):
                seen = np.where(values > 0, values, np.nan)  # without a bias there is no line
                axis.plot(TAUS, seen, color=colour, ls=dashes, lw=2, label=name)
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
    for axis, function in zip(axes[0], FUNCTIONS, strict=True):
        axis.set_title(f"{function} f", fontsize=11)
    axes[1, 0].set_ylim(0.03)
    axes[0, 0].set_xticks([0.03, 0.1, 0.3, 1, 3, 10], ["0.03", "0.1", "0.3", "1", "3", "10"])
    for axis in axes[-1]:
        axis.set_xlabel("tau", fontsize=10.5)
    handles = axes[0, 0].get_lines()
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=9.5, frameon=False)
    return figure
