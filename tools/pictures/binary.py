"""Histograms of relaxed bits and gates, with the shares that their log-densities predict for each bin."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj

BINS = 25
LOG_ODDS = np.linspace(-14, 14, 56_001)  # values at which densities are added up: some have infinite ends
ORDER = ("draws in a bin", "its density", "draws of exactly 0 or 1", "its mass")
LOGIT = 0.5
GREY, BLUE, BLACK = "#9A9A9A", "#7FB2DC", "#000000"


def bit(tau):
    draw = lambda key, n: rj.relaxed_bernoulli(key, LOGIT, tau, shape=(n,))
    return f"relaxed_bernoulli, tau {tau}", draw, lambda z: rj.relaxed_bernoulli_log_prob(z, LOGIT, tau)


def stretched(tau):
    draw = lambda key, n: rj.hard_concrete(key, LOGIT, tau, shape=(n,))
    return f"hard_concrete, tau {tau}", draw, lambda z: rj.hard_concrete_log_prob(z, LOGIT, tau)


def clipped(scale):
    draw = lambda key, n: rj.gaussian_bernoulli(key, 0.6, scale, shape=(n,))
    return f"gaussian_bernoulli, scale {scale}", draw, lambda z: rj.gaussian_bernoulli_log_prob(z, 0.6, scale)


PANELS = [bit(2.0), bit(0.5), stretched(2.0), stretched(0.5), clipped(0.8), clipped(0.3)]


def picture(draws):
    figure, axes = plt.subplots(3, 2, figsize=(6.6, 7.4), sharex=True, sharey="row", layout="constrained")
    edges = np.linspace(0, 1, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    values = 1 / (1 + np.exp(-LOG_ODDS))
    weights = values * (1 - values) * (LOG_ODDS[1] - LOG_ODDS[0])
    for axis, (title, sampler, log_prob) in zip(axes.flat, PANELS, strict=True):
        z = np.asarray(sampler(jax.random.key(0), draws))
        inside = z[(z > 0) & (z < 1)]
        axis.bar(
            middles, np.histogram(inside, edges)[0] / draws, 1 / BINS, color=BLUE, label="draws in a bin"
        )
        density = np.exp(log_prob(jnp.asarray(values, jnp.float32)))
        axis.stairs(
            np.histogram(values, edges, weights=weights * density)[0],
            edges,
            color=BLACK,
            lw=1.4,
            label="its density",
        )
        if not title.startswith("relaxed"):
            ends = np.array([0.0, 1.0], np.float32)
            places, shares = np.array([-0.07, 1.07]), [(z == end).mean() for end in ends]
            axis.bar(places, shares, 0.06, color=GREY, label="draws of exactly 0 or 1")
            axis.plot(places, np.exp(log_prob(ends)), "o", color=BLACK, ms=5, label="its mass")
        axis.set_title(title, fontsize=10.5)
        axis.set_xlim(-0.13, 1.13)
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("value of the draw", fontsize=10.5)
    figure.supylabel("share of the draws", fontsize=10.5)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    handles = [handles[labels.index(label)] for label in ORDER]
    figure.legend(handles, ORDER, loc="outside upper center", ncols=2, fontsize=9.5, frameon=False)
    return figure
