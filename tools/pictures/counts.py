"""Relaxed counts at three temperatures against the discrete laws that they relax."""

import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj

TAUS = (1.0, 0.5, 0.1)
LAST = 12  # last of the values shown
PER_UNIT = 5  # bins
LAWS = {
    "Poisson, mean 4": (rj.poisson_support, 4.0),
    "geometric, mean 4": (rj.geometric_support, -math.log(4.0)),
}


def picture(draws):
    figure, axes = plt.subplots(3, 2, figsize=(6.6, 7.2), sharex=True, sharey="col", layout="constrained")
    edges = (np.arange((LAST + 1) * PER_UNIT + 1) - PER_UNIT / 2) / PER_UNIT
    for column, (name, (support, parameter)) in zip(axes.T, LAWS.items(), strict=True):
        logits, values = support(parameter)
        masses = np.exp(logits)
        for axis, tau in zip(column, TAUS, strict=True):
            z = np.asarray(
                rj.generalized_gumbel_softmax(jax.random.key(0), logits, values, tau, shape=(draws,))
            )
            shares = np.histogram(z, edges)[0] / draws
            axis.bar(edges[:-1] + 0.5 / PER_UNIT, shares, 1 / PER_UNIT, color="#7FB2DC")
            axis.plot(values[: LAST + 1], masses[: LAST + 1], "o", color="black", ms=4)
            axis.axvline(float(jnp.exp(logits) @ values), color="black", ls="--", lw=1.2)
            axis.axvline(z.mean(), color="#0072B2", lw=1.5)
            axis.text(0.97, 0.93, f"tau {tau}\nmean {z.mean():.2f}", transform=axis.transAxes, ha="right",
                      va="top", fontsize=10)  # fmt: skip
            axis.grid(axis="y", alpha=0.3)
        column[0].set_title(name, fontsize=10.5)
        column[-1].set_xlabel("count", fontsize=10.5)
    axes[0, 0].set(xlim=(-0.7, LAST + 0.7), xticks=range(0, LAST + 1, 2))
    figure.supylabel("share of the draws", fontsize=10.5)
    return figure
