"""A mixture of Gaussians whose integer labels are trained with pathwise gradients, next to the known answer.

The model has a Categorical label for every point. `relax` makes it trainable and `AutoMeanField` writes its
guide. The best guide of that family is known, by coordinate ascent in closed form, so the bias of the
relaxation can be seen. Between two neighbors at a distance of d standard deviations it is at most about tau
d^2 / 20 in a probability p: for a relaxed label z a Gaussian log-likelihood at the mixed mean is d^2/2 z (1 -
z) above the mixture of the two log-likelihoods, E z (1 - z) is tau p (1 - p) at low temperature, and the
slope of that bonus moves p by tau d^2/2 p (1 - p) (1 - 2p), always toward 1/2. Straight-through draws use the
slope at the corners instead, which moves p by 2 log 2 times as much. Where more than two clusters meet, the
largest difference is somewhat larger.
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
from numpyro.infer.initialization import init_to_value
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from sklearn.cluster import KMeans

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
from relaxit_jax.handlers import AutoMeanField, relax, take

PRIOR_SCALE = 5.0  # for the centers, in standard deviations of a cluster
COLOURS = np.array(
    [[0.00, 0.45, 0.70], [0.90, 0.45, 0.00], [0.00, 0.62, 0.35], [0.80, 0.20, 0.55],
     [0.95, 0.80, 0.10], [0.40, 0.25, 0.10], [0.35, 0.75, 0.95], [0.35, 0.35, 0.35]]
)  # fmt: skip


def model(x, clusters):
    loc = numpyro.sample("loc", dist.Normal(0, PRIOR_SCALE).expand([clusters, 2]).to_event(2))
    with numpyro.plate("points", len(x)):
        z = numpyro.sample("z", dist.Categorical(np.full(clusters, 1 / clusters, np.float32)))
        numpyro.sample("x", dist.Normal(take(loc, z), 1).to_event(1), obs=x)


def make_data(clusters, points, separation, seed):
    """Centers at the corners of a regular polygon, labels, and points around the centers."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(clusters) / clusters
    centres = separation / (2 * np.sin(np.pi / clusters)) * np.stack([np.cos(angle), np.sin(angle)], -1)
    labels = rng.integers(clusters, size=points)
    return centres, labels, (centres[labels] + rng.normal(size=(points, 2))).astype(np.float32)


def coordinate_ascent(x, centres, rounds=5000, tolerance=1e-10):
    """The best q(loc) q(z) near the given centers: responsibilities, centers and -ELBO."""
    x, m, variance = x.astype(float), centres.astype(float), np.full(len(centres), 0.01)
    q = np.zeros((len(x), len(m)))
    for _ in range(rounds):
        misfit = ((x[:, None] - m) ** 2).sum(-1) / 2 + variance  # 2 coordinates, half a variance each
        before, q = q, softmax(-misfit, -1)
        precision = 1 / PRIOR_SCALE**2 + q.sum(0)
        m, variance = (q.T @ x) / precision[:, None], 1 / precision
        if np.abs(q - before).max() < tolerance:
            break
    misfit = ((x[:, None] - m) ** 2).sum(-1) / 2 + variance + np.log(2 * np.pi)
    kl_z = (q * np.log(np.maximum(q, 1e-300) * len(m))).sum()
    spread = (m**2 + variance[:, None]) / PRIOR_SCALE**2
    kl_loc = (spread - 1 - np.log(variance[:, None] / PRIOR_SCALE**2)).sum() / 2
    return q, m, (q * misfit).sum() + kl_z + kl_loc


def order_like(centres, others):
    """The order of `others` that brings each one closest to its center."""
    return linear_sum_assignment(((centres[:, None] - others) ** 2).sum(-1))[1]


def draw(path, x, learned, known, title):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    reach = 1.05 * np.abs(x).max()
    for axis, (q, centres), name in zip(axes, (learned, known), (title, "closed form"), strict=False):
        axis.scatter(*x.T, c=np.clip(q @ COLOURS[: q.shape[1]], 0, 1), s=14, lw=0)
        axis.scatter(*centres.T, marker="X", s=130, c="black", edgecolors="white", lw=1.2, label="centres")
        axis.set_title(f"{name}: points by their probabilities", fontsize=10)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axis.legend(fontsize=8, loc="upper right")
    a, b = known[0], learned[0]
    axes[2].plot([0, 1], [0, 1], color="black", lw=0.8)
    for k, colour in enumerate(COLOURS[: a.shape[1]]):
        axes[2].scatter(a[:, k], b[:, k], s=10, lw=0, alpha=0.7, color=colour)
    axes[2].set(xlabel="closed form", ylabel=title, aspect="equal")
    axes[2].set_title(f"probabilities: largest difference {np.abs(a - b).max():.3f}", fontsize=10)
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option(
    "--clusters", type=click.IntRange(2, len(COLOURS)), default=4, help="Number of clusters in the mixture."
)
@click.option(
    "--points",
    type=click.IntRange(20, 100_000),
    default=500,
    help="Number of points in all clusters together.",
)
@click.option(
    "--separation",
    type=FloatRange(0, 20, min_open=True),
    default=2.5,
    help="Distance between neighboring centers, in standard deviations.",
)
@training_options
@out_option
def main(clusters, points, separation, tau, method, steps, particles, learning_rate, seed, out):
    """Train the labels of a mixture of Gaussians, and compare them with the best mean-field guide."""
    true_centres, labels, x = make_data(clusters, points, separation, seed)
    if len(np.unique(labels)) < clusters:
        raise UserError(f"{points} points leave a cluster empty; raise --points")
    out = output_folder(out, "mixture")
    start_at = KMeans(clusters, n_init=10, random_state=seed).fit(x).cluster_centers_

    start = time.perf_counter()
    init = {"init_loc_fn": init_to_value(values={"loc": start_at}), "init_scale": 0.1}
    guide = AutoMeanField(model, continuous=functools.partial(AutoNormal, **init))
    soft = functools.partial(relax, tau=tau, method=method)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    svi = SVI(soft(model), soft(guide), optimizer, Trace_ELBO(num_particles=particles))
    result = svi.run(jax.random.key(seed), steps, x, clusters)
    seconds = time.perf_counter() - start
    losses = check_losses(result.losses)

    q, centres = np.asarray(guide.probs(result.params)["z"], float), np.asarray(result.params["loc_auto_loc"])
    known_q, known_centres, known_loss = coordinate_ascent(x, start_at)
    order, known_order = order_like(true_centres, centres), order_like(true_centres, known_centres)
    learned, known = (q[:, order], centres[order]), (known_q[:, known_order], known_centres[known_order])
    draw(out / "mixture.png", x, learned, known, f"{method}, tau = {tau:g}")

    # the trained guide without `relax`, on the model that it answers
    discrete = Trace_ELBO(num_particles=200).loss(
        jax.random.key(seed), result.params, model, guide, x, clusters
    )
    difference = np.abs(learned[0] - known[0])
    bias = tau * separation**2 / 20.8 * (1 if method == "relaxed" else 2 * np.log(2))
    accuracy = lambda q: float((q.argmax(-1) == labels).mean())
    metrics = {
        "settings": click.get_current_context().params | {"out": str(out)},
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "largest_bias_of_two_neighbours": bias,
        "largest_difference_of_centres": float(np.abs(learned[1] - known[1]).max()),
        "accuracy": accuracy(learned[0]),
        "accuracy_closed_form": accuracy(known[0]),
        "final_loss": float(losses[-max(steps // 20, 1) :].mean()),
        "final_loss_unrelaxed": float(discrete),
        "loss_closed_form": float(known_loss),
        "seconds": seconds,
        "versions": versions(),
    }
    write_json(out / "metrics.json", metrics)
    click.echo(
        f"probabilities: largest difference {difference.max():.4f}, "
        f"mean {difference.mean():.4f} (bias of two neighbours: {bias:.4f})\n"
        f"accuracy {metrics['accuracy']:.3f}, "
        f"closed form {metrics['accuracy_closed_form']:.3f}\n"
        f"-ELBO of the trained guide {discrete:.2f}, "
        f"of the best {known_loss:.2f}\n"
        f"trained in {seconds:.1f} s\nin {out}: mixture.png, metrics.json"
    )


if __name__ == "__main__":
    run(main)
