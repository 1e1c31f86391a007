"""Correlated gates: bits with given marginals that depend on each other through a Gaussian copula.

Two sets of three gates share the correlation R of their Gaussians. The relaxed gates, thresholded at 1/2,
are compared with the exact law of the bits: P(b_i = 1) = pi_i, and P(b_i = b_j = 1) from the bivariate
normal distribution, whatever the temperature is.
"""

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import multivariate_normal, norm

import relaxit_jax as rj
from common import SEED, TAU, out_option, output_folder, run, save_figure, versions, write_json

PI = np.array([[0.2, 0.4, 0.4], [0.3, 0.5, 0.2]])
R = np.array([[1, 0.5, 0.3], [0.5, 1, 0.7], [0.3, 0.7, 1]])
PAIRS = [(0, 1), (0, 2), (1, 2)]


def exact_correlations(pi):
    """The correlation of each pair of bits: (P(both) - pi_i pi_j) / (sd_i sd_j)."""
    probit, sd = norm.ppf(pi), np.sqrt(pi * (1 - pi))
    result = []
    for i, j in PAIRS:
        law = multivariate_normal(cov=[[1, R[i, j]], [R[i, j], 1]])
        both = law.cdf([probit[i], probit[j]])
        result.append((both - pi[i] * pi[j]) / (sd[i] * sd[j]))
    return np.array(result)


def compare(axis, title, names, exact, seen, error):
    """Plot exact values as bars and observed values as points with four standard errors."""
    place = np.arange(len(names))
    axis.bar(place, exact, width=0.6, color="tab:blue", alpha=0.4, label="exact")
    axis.errorbar(place, seen, 4 * error, fmt="o", ms=4, color="black", capsize=3, label="seen")
    axis.set_xticks(place, names)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)


@click.command(context_settings={"show_default": True})
@click.option(
    "--draws", type=click.IntRange(100, 10_000_000), default=200_000, help="Number of draws of all gates."
)
@click.option("--tau", type=TAU, default=0.1, help="Temperature of the gates.")
@click.option("--seed", type=SEED, default=0, help="Seed of the draws.")
@out_option
def main(draws, tau, seed, out):
    """Draw correlated relaxed gates, and compare their thresholded bits with the exact law."""
    out = output_folder(out, "correlated_gates")
    factor = jnp.asarray(np.linalg.cholesky(R), jnp.float32)
    logits = jnp.asarray(np.log(PI / (1 - PI)), jnp.float32)
    z = rj.correlated_bernoulli(jax.random.key(seed), logits, tau, factor, shape=(draws, 2))
    bits = np.asarray(z > 0.5, np.float64)

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    table, worst = [], 0.0
    for k, pi in enumerate(PI):
        marginals, marginal_error = bits[:, k].mean(0), np.sqrt(pi * (1 - pi) / draws)
        exact = exact_correlations(pi)
        centred = (bits[:, k] - pi) / np.sqrt(pi * (1 - pi))
        products = np.stack([centred[:, i] * centred[:, j] for i, j in PAIRS], -1)
        correlations, error = products.mean(0), products.std(0) / np.sqrt(draws)
        click.echo(f"pi = {pi}")
        rows = [
            (f"P(b{i + 1} = 1)", *row)
            for i, row in enumerate(zip(pi, marginals, marginal_error, strict=True))
        ]
        names = [f"corr(b{i + 1}, b{j + 1})" for i, j in PAIRS]
        rows += [
            (name, *row)
            for name, row in zip(names, zip(exact, correlations, error, strict=True), strict=True)
        ]
        for name, should, got, sd in rows:
            score = (got - should) / sd
            worst = max(worst, abs(score))
            click.echo(f"  {name:14} exact {should:.4f}  seen {got:.4f}  z {score:+.2f}")
            table.append(
                {"pi": pi.tolist(), "what": name, "exact": should, "seen": got, "standard_error": sd}
            )
        compare(axes[k, 0], f"marginals, pi = {pi}", ["b1", "b2", "b3"], pi, marginals, marginal_error)
        compare(axes[k, 1], "correlations of the bits", [n[5:-1] for n in names], exact, correlations, error)
        axes[k, 2].hist(np.asarray(z[:, k]), bins=40, label=["z1", "z2", "z3"], density=True)
        axes[k, 2].set_title(f"relaxed gates, tau = {tau:g}", fontsize=10)
        axes[k, 2].legend(fontsize=8)
    save_figure(figure, out / "gates.png")
    write_json(out / "metrics.json", {"tau": tau, "draws": draws, "table": table, "versions": versions()})
    click.echo(f"largest |z| {worst:.2f}\nin {out}: gates.png, metrics.json")


if __name__ == "__main__":
    run(main)
