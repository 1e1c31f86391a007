"""Dirichlets on the simplex of three classes, and the logistic-normals that the bridge makes of them."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj
from relaxit_jax.laplace_bridge import dirichlet_to_gaussian

ALPHAS = ((0.6, 0.6, 0.6), (2.0, 3.0, 1.5), (12.0, 18.0, 9.0))
CORNERS = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
SIDE = 300  # points along an edge


def log_densities(alpha):
    """Log-densities of log z in two of the coordinates: the Dirichlet's and its logistic-normal's."""
    alpha = jnp.asarray(alpha)
    loc, covariance = dirichlet_to_gaussian(alpha)
    factor = jnp.linalg.cholesky(covariance + 1)  # softmax does not see the constant
    gammaln = jax.scipy.special.gammaln
    constant = gammaln(alpha.sum()) - gammaln(alpha).sum()
    return (
        lambda log_z: constant + jnp.sum((alpha - 1) * log_z, -1),
        lambda log_z: rj.logistic_normal_log_prob(log_z, loc, scale_tril=factor, log_space=True),
    )


def total_variation(alpha, p, q, draws):
    """E_p max(0, 1 - q / p), from draws of the Dirichlet that are not rounded at its corners."""
    log_gamma = jax.random.loggamma(jax.random.key(0), jnp.asarray(alpha), (draws, 3))
    log_z = jax.nn.log_softmax(log_gamma)
    return float(jnp.mean(jnp.maximum(0, -jnp.expm1(q(log_z) - p(log_z)))))


def picture(draws):
    figure, axes = plt.subplots(2, 3, figsize=(6.6, 4.7), layout="constrained")
    a, b = np.meshgrid((np.arange(SIDE) + 0.5) / SIDE, (np.arange(SIDE) + 0.5) / SIDE)
    z = np.stack([a, b, 1 - a - b], -1)[a + b < 1 - 1e-3]
    x, y = (z @ CORNERS).T
    for column, alpha in zip(axes.T, ALPHAS, strict=True):
        laws = log_densities(alpha)
        heights = [np.exp(np.asarray(law(jnp.log(jnp.asarray(z, jnp.float32))))) for law in laws]
        levels = np.linspace(0, max(np.quantile(height, 0.97) for height in heights), 13)
        for axis, height in zip(column, heights, strict=True):
            axis.tricontourf(x, y, height, levels=levels, cmap="Blues", extend="max")
            axis.fill(*CORNERS.T, facecolor="none", edgecolor="#555555", lw=1)
            axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.05, 1.05), ylim=(-0.05, 0.92))
            axis.spines[:].set_visible(False)
        column[0].set_title("Dirichlet(" + ", ".join(f"{x:g}" for x in alpha) + ")", fontsize=10)
        column[1].set_title(f"total variation {total_variation(alpha, *laws, draws):.2f}", fontsize=10)
    axes[0, 0].set_ylabel("Dirichlet", fontsize=10.5)
    axes[1, 0].set_ylabel("logistic-normal", fontsize=10.5)
    return figure
