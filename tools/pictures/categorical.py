"""Draws on the simplex of three classes over their densities, and exact draws on its corners."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj

PROBS = np.array([0.5, 0.3, 0.2])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
CORNERS = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
SHOWN = 600  # number of draws
SIDE = 140  # points of the density along an edge


LOC = LOGITS[:2] - LOGITS[2]
SHADES = ["#F2F7FC", "#D3E4F3", "#ABD0E6", "#7DB8DA", "#4292C6"]
OUTSIDE = [0.05, 0.25, 0.5, 0.75]  # share of the draws at a lower density than where a shade begins


def concrete(tau):
    draw = lambda key, n: rj.gumbel_softmax(key, LOGITS, tau, shape=(n,), log_space=True)
    log_prob = lambda log_z: rj.gumbel_softmax_log_prob(log_z, LOGITS, tau, log_space=True)
    return f"gumbel_softmax\ntau {tau}", draw, log_prob


PANELS = [
    concrete(2.0), concrete(0.7), concrete(0.2),
    (
        "gumbel_softmax\nhard=True",
        lambda key, n: rj.gumbel_softmax(key, LOGITS, 0.5, shape=(n,), hard=True),
        None,
    ),
    (
        "invertible_gaussian\ntau 0.7",
        lambda key, n: rj.invertible_gaussian(key, LOC, 1.0, 0.7, shape=(n,), log_space=True),
        lambda log_z: rj.invertible_gaussian_log_prob(log_z, LOC, 1.0, 0.7, log_space=True),
    ),
    (
        "logistic_normal\nscale 1",
        lambda key, n: rj.logistic_normal(key, LOGITS, 1.0, shape=(n,), log_space=True),
        lambda log_z: rj.logistic_normal_log_prob(log_z, LOGITS, 1.0, log_space=True),
    ),
]  # fmt: skip


def relaxed(axis, log_z, log_prob):
    """Draws over their density, with shades that hold known shares of them."""
    a, b = np.meshgrid((np.arange(SIDE) + 0.5) / SIDE, (np.arange(SIDE) + 0.5) / SIDE)
    z = np.stack([a, b, 1 - a - b], -1)[a + b < 1 - 1e-4]
    log_p = log_prob(jnp.asarray(np.log(z), jnp.float32))
    levels = np.quantile(log_prob(log_z), OUTSIDE)
    axis.tricontourf(*(z @ CORNERS).T, log_p, levels=levels, colors=SHADES, extend="both")
    axis.plot(
        *(np.exp(log_z[:SHOWN]) @ CORNERS).T, ".", color="black", ms=2.4, mew=0, zorder=4, clip_on=False
    )
    return [f"{p}" for p in PROBS]


def exact(axis, one_hot):
    """The share of the draws on each corner, as a disc."""
    shares = one_hot.mean(0)
    for corner, share in zip(CORNERS, shares, strict=True):
        axis.plot(*corner, "o", color="#D55E00", ms=36 * np.sqrt(share), zorder=4, clip_on=False)
    return [f"{share:.3f}" for share in shares]


def picture(draws):
    figure, axes = plt.subplots(2, 3, figsize=(6.6, 5.2), layout="constrained")
    for axis, (title, sampler, log_prob) in zip(axes.flat, PANELS, strict=True):
        drawn = np.asarray(sampler(jax.random.key(0), draws))
        axis.fill(*CORNERS.T, facecolor="none", edgecolor="#555555", lw=1, zorder=3)
        texts = relaxed(axis, drawn, log_prob) if log_prob else exact(axis, drawn)
        places = [(-0.05, -0.17, "left"), (1.05, -0.17, "right"), (0.66, 0.87, "left")]
        for number, ((x, y, side), text) in enumerate(zip(places, texts, strict=True), 1):
            axis.text(x, y, f"{number}: {text}", ha=side, va="center", fontsize=9.5)
        axis.set_title(title, fontsize=10)
        axis.set(aspect="equal", xlim=(-0.14, 1.14), ylim=(-0.22, 1.0))
        axis.axis("off")
    return figure
