"""Sparse linear regression, trained with pathwise gradients and compared with the exact posterior.

A bit for every column switches its slope on. `relax` makes the bits trainable and `AutoMeanField` writes the
guide. Two answers are known: the exact posterior, from all 2^p supports with the slopes integrated out, and
the best mean-field guide, the best that the trained guide can reach. Its ELBO is known in closed form, and
coordinate ascent from many starts finds it. That guide is more certain than the posterior: bit and slope are
independent in it, so a column that is rarely on pays for a slope as wide as the prior. If columns are
correlated above about 0.7 the ELBO has several optima, and training may end in a worse one: the printed
-ELBO is then above the best.
"""

import functools
import time

import click
import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_mean
from scipy.special import expit, log_expit, logit, softmax

from common import (
    FloatRange,
    UserError,
    check_losses,
    out_option,
    output_folder,
    run,
    save_figure,
    training_options,
    versions,
    write_json,
)
from relaxit_jax.handlers import AutoMeanField, relax

SLAB, NOISE, INCLUDED = (
    2.0,
    1.0,
    0.2,
)  # standard deviations of the slopes and the noise; the prior probability of a column


def model(x, y):
    on = numpyro.sample("on", dist.Bernoulli(np.full(x.shape[1], INCLUDED, np.float32)).to_event(1))
    slope = numpyro.sample("slope", dist.Normal(0, SLAB).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ (on * slope), NOISE).to_event(1), obs=y)


def make_data(rows, columns, support, correlation, seed):
    """Columns of variance 1 whose neighbors are correlated; slopes from 1.5 down to 0.6, spread out."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(columns), np.arange(columns)))
    x = rng.normal(size=(rows, columns)) @ np.linalg.cholesky(correlation**distance).T
    slopes = np.zeros(columns)
    places = np.arange(support) * columns // support
    slopes[places] = np.linspace(1.5, 0.6, support) * (-1) ** np.arange(support)
    y = x @ slopes + NOISE * rng.normal(size=rows)
    return x.astype(np.float32), y.astype(np.float32), slopes


def enumerate_supports(x, y):
    """The exact posterior: probability of each column, mean of ``on * slope``, log p(y)."""
    x, y = x.astype(float), y.astype(float)
    (n, p), ratio = x.shape, (SLAB / NOISE) ** 2
    gram, xy = x.T @ x, x.T @ y
    on = (np.arange(2**p)[:, None] >> np.arange(p) & 1).astype(float)
    evidence, mean = np.empty(2**p), np.empty((2**p, p))
    for part in np.array_split(np.arange(2**p), max(2**p // 4096, 1)):  # some MB at a time
        s = on[part]
        # y ~ N(0, NOISE^2 I + SLAB^2 X_S X_S^T), through the p x p matrix with the same determinant
        a = np.eye(p) + ratio * s[:, :, None] * gram * s[:, None, :]
        mean[part] = ratio * np.linalg.solve(a, (s * xy)[..., None])[..., 0]
        evidence[part] = (mean[part] @ xy) / (2 * NOISE**2) - np.linalg.slogdet(a)[1] / 2
    evidence -= (y @ y / NOISE**2 + n * np.log(2 * np.pi * NOISE**2)) / 2
    joint = evidence + on @ np.full(p, logit(INCLUDED)) + p * np.log(1 - INCLUDED)
    weights = softmax(joint)
    return weights @ on, weights @ mean, joint.max() - np.log(weights.max())


def best_mean_field(x, y, starts=200, rounds=2000, tolerance=1e-9):
    """The best q(on) q(slope) over all starts: probability of each column, mean of ``on * slope``, -ELBO."""
    x, y = x.astype(float), y.astype(float)
    n, p = x.shape
    gram, xy, size = x.T @ x, x.T @ y, (x**2).sum(0)
    rng = np.random.default_rng(0)
    q, m, v = rng.uniform(size=(starts, p)), SLAB * rng.normal(size=(starts, p)), np.full((starts, p), 0.1)
    for _ in range(rounds):
        before = q.copy()
        for j in range(p):
            fit = (
                xy[j] - (q * m) @ gram[j] + q[:, j] * m[:, j] * size[j]
            )  # the residual that the others leave to j
            v[:, j] = 1 / (1 / SLAB**2 + q[:, j] * size[j] / NOISE**2)
            m[:, j] = v[:, j] * q[:, j] * fit / NOISE**2
            gain = (m[:, j] * fit - (m[:, j] ** 2 + v[:, j]) * size[j] / 2) / NOISE**2
            q[:, j] = expit(logit(INCLUDED) + gain)
        if np.abs(q - before).max() < tolerance:
            break
    w, odds = q * m, logit(np.clip(q, 1e-300, 1 - 1e-16))
    spread = (q * (m**2 + v) - w**2) @ size
    misfit = (((y - w @ x.T) ** 2).sum(-1) + spread) / (2 * NOISE**2) + n * np.log(2 * np.pi * NOISE**2) / 2
    kl_on = q * (log_expit(odds) - np.log(INCLUDED)) + (1 - q) * (log_expit(-odds) - np.log(1 - INCLUDED))
    kl_slope = ((m**2 + v) / SLAB**2 - 1 - np.log(v / SLAB**2)) / 2
    loss = misfit + (kl_on + kl_slope).sum(-1)
    best = loss.argmin()
    return q[best], w[best], loss[best]


def draw(path, answers, slopes):
    """Bars with the answers for each column; ticks of the columns that are truly on are bold."""
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.4), layout="constrained", sharex=True)
    place = np.arange(len(slopes))
    for k, (name, (q, w), colour) in enumerate(
        zip(answers, answers.values(), ["tab:orange", "tab:blue", "tab:gray"], strict=True)
    ):
        for axis, height in zip(axes, (q, w), strict=True):
            axis.bar(place + 0.27 * (k - 1), height, width=0.25, color=colour, label=name)
    axes[0].axhline(0.5, color="black", lw=0.8, ls=":")
    axes[0].set(ylim=(0, 1.02), ylabel="probability of the column")
    axes[1].hlines(slopes, place - 0.45, place + 0.45, color="black", lw=1.5, label="true slope")
    axes[1].axhline(0, color="black", lw=0.5)
    axes[1].set(ylabel="mean of on * slope", xlabel="column (bold: truly on)", xticks=place)
    for tick, true in zip(axes[1].get_xticklabels(), slopes, strict=True):
        tick.set_fontweight("bold" if true else "normal")
    for axis in axes:
        axis.legend(fontsize=8)
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option("--rows", type=click.IntRange(2, 100_000), default=80, help="Observations.")
@click.option(
    "--columns",
    type=click.IntRange(1, 16),
    default=12,
    help="Number of columns in the regression; the exact answer takes 2^N supports.",
)
@click.option("--support", type=click.IntRange(0, 16), default=3, help="Number of columns that truly matter.")
@click.option(
    "--correlation",
    type=FloatRange(-0.999, 0.999),
    default=0.5,
    help="Correlation between neighboring columns; it falls off with their distance.",
)
@training_options
@out_option
def main(rows, columns, support, correlation, tau, method, steps, particles, learning_rate, seed, out):
    """Learn which columns of a regression matter, and compare with two known answers."""
    if support > columns:
        raise UserError(f"--support {support} is above the {columns} columns; lower it")
    out = output_folder(out, "spike_and_slab")
    x, y, slopes = make_data(rows, columns, support, correlation, seed)

    start = time.perf_counter()
    # the mean of the prior is zero: slopes that start at random, with a wrong sign, switch their bits off
    guide = AutoMeanField(model, continuous=functools.partial(AutoNormal, init_loc_fn=init_to_mean))
    soft = functools.partial(relax, tau=tau, method=method)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    svi = SVI(soft(model), soft(guide), optimizer, Trace_ELBO(num_particles=particles))
    result = svi.run(jax.random.key(seed), steps, x, y)
    seconds = time.perf_counter() - start
    losses = check_losses(result.losses)

    q = np.asarray(guide.probs(result.params)["on"], float)
    w = q * np.asarray(result.params["slope_auto_loc"])
    mean_field_q, mean_field_w, mean_field_loss = best_mean_field(x, y)
    exact_q, exact_w, evidence = enumerate_supports(x, y)
    answers = {
        f"{method}, tau = {tau:g}": (q, w),
        "best mean-field": (mean_field_q, mean_field_w),
        "exact": (exact_q, exact_w),
    }
    draw(out / "spike_and_slab.png", answers, slopes)

    # the trained guide without `relax`, on the model that it answers
    discrete = Trace_ELBO(num_particles=2000).loss(jax.random.key(seed), result.params, model, guide, x, y)
    metrics = {
        "settings": click.get_current_context().params | {"out": str(out)},
        "support_true": np.flatnonzero(slopes).tolist(),
        "support_found": np.flatnonzero(q > 0.5).tolist(),
        "support_exact": np.flatnonzero(exact_q > 0.5).tolist(),
        "largest_difference_from_mean_field": float(np.abs(q - mean_field_q).max()),
        "largest_difference_from_exact": float(np.abs(q - exact_q).max()),
        "largest_difference_of_mean_field_from_exact": float(np.abs(mean_field_q - exact_q).max()),
        "probabilities": q.tolist(),
        "probabilities_mean_field": mean_field_q.tolist(),
        "probabilities_exact": exact_q.tolist(),
        "largest_difference_of_slopes_from_true": float(np.abs(w - slopes).max()),
        "final_loss": float(losses[-max(steps // 20, 1) :].mean()),
        "final_loss_unrelaxed": float(discrete),
        "loss_mean_field": float(mean_field_loss),
        "minus_log_evidence": float(-evidence),
        "seconds": seconds,
        "versions": versions(),
    }
    write_json(out / "metrics.json", metrics)
    click.echo(
        f"columns found {metrics['support_found']}, true {metrics['support_true']}\n"
        f"largest difference from the best mean-field guide "
        f"{metrics['largest_difference_from_mean_field']:.4f}, from the exact posterior "
        f"{metrics['largest_difference_from_exact']:.4f}\n"
        f"-ELBO of the trained guide {discrete:.2f}, of the best {mean_field_loss:.2f}; "
        f"-log p(y) {-evidence:.2f}\n"
        f"trained in {seconds:.1f} s\nin {out}: spike_and_slab.png, metrics.json"
    )


if __name__ == "__main__":
    run(main)
