"""Which variables belong together? A spanning tree over them, learned by reconstruction.

Each variable is predicted from its neighbors in a tree. Each training step draws the tree from a distribution
with a log-weight for each pair. A pair has a small function for each direction, so relations need not be
linear:

    x_i = sum_j T_ij g_ij(x_j),    loss = mean (x_i - prediction)^2

The error is a function of the whole tree. Its gradient in the log-weights comes from one of

    tree_sample    exact draws with the gradient of the marginals
    relaxed_tree   relaxed draws: every edge has a share
    rloo           exact draws and their score function

The first data set comes from a known tree. Half of its relations are even functions, which leave no
correlation. The second one has images: each variable is the ink in a patch of 4 x 4 pixels. For comparison
there is the algorithm of C. K. Chow and C. N. Liu (1968), which finds the tree with the largest mutual
information, estimated from correlations or from bins.

    python examples/latent_tree.py
    python examples/latent_tree.py --method tree_sample --variables 40 --data DIR
"""

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy.sparse.csgraph import minimum_spanning_tree
from tqdm import tqdm

from common import (
    COUNT,
    SEED,
    STEPS,
    TAU,
    FloatRange,
    UserError,
    check_losses,
    cosine_rate_option,
    images_option,
    load_split,
    methods_option,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)
from relaxit_jax import estimators, structured

CHUNK = 50  # steps of training in one compiled call
PATCH = 4  # pixels of a side that become one variable
CENTERS = np.linspace(-2, 2, 5, dtype=np.float32)  # of the bumps that make a function of a variable
BINS, RIDGE = 8, 1.0
METHODS = {"tree_sample": "C2", "relaxed_tree": "C1", "rloo": "C3"}
BASELINES = {"Chow-Liu, correlations": ":", "Chow-Liu, bins": "--"}


# --- data ------------------------------------------------------------------------------------------


def known_tree(rng, variables, rows):
    """Rows whose variables each depend on the one before it in a random tree; and the tree."""
    x, tree = np.empty((rows, variables)), np.zeros((variables, variables), bool)
    order = rng.permutation(variables)
    x[:, order[0]] = standardise(rng.normal(size=rows))
    for place in range(1, variables):
        parent, child = order[rng.integers(place)], order[place]
        tree[parent, child] = tree[child, parent] = True
        cause = x[:, parent]
        effect = np.sign(rng.normal()) * (cause if place % 2 else np.abs(cause))
        x[:, child] = standardise(effect) + 0.6 * rng.normal(size=rows)
        x[:, child] = standardise(x[:, child])
    return x.astype(np.float32), tree


def standardise(x):
    return (x - x.mean(0)) / x.std(0)


def ink_of_patches(images):
    """The mean of each patch, shape (n, rows, columns)."""
    high, wide = (side // PATCH for side in images.shape[1:])
    cut = images[:, : high * PATCH, : wide * PATCH]
    return cut.reshape(len(images), high, PATCH, wide, PATCH).mean((2, 4))


# --- trees -----------------------------------------------------------------------------------------


def largest_tree(weights):
    """The spanning tree of the largest sum of weights, as a symmetric matrix of booleans."""
    upper = np.triu(np.ptp(weights) + 1 + weights.max() - weights, 1)
    tree = minimum_spanning_tree(upper).toarray() > 0
    return tree | tree.T


def information_of_correlations(x):
    """Mutual information of each pair, in nats, if they were Gaussian."""
    square = np.corrcoef(x.T) ** 2
    np.fill_diagonal(square, 0)
    return -0.5 * np.log1p(-np.minimum(square, 1 - 1e-9))


def information_of_bins(x):
    """Mutual information of each pair, in nats, after sorting each variable into bins of equal counts."""
    edges = np.quantile(x, np.linspace(0, 1, BINS + 1)[1:-1], axis=0)
    one_hot = ((x[:, None] > edges).sum(1)[..., None] == np.arange(BINS)).astype(np.float32)
    joint = np.einsum("rik,rjl->ijkl", one_hot, one_hot, optimize=True) / len(x)
    own = one_hot.mean(0)
    apart = own[:, None, :, None] * own[None, :, None, :]
    return np.sum(joint * np.log(np.where(joint > 0, joint / np.maximum(apart, 1e-12), 1)), (-1, -2))


INFORMATION = dict(zip(BASELINES, (information_of_correlations, information_of_bins), strict=True))


def bumps(x):
    """The basis of the functions of a variable: x itself, and bumps."""
    return jnp.concatenate([x[..., None], jnp.exp(-2 * (x[..., None] - CENTERS) ** 2)], -1)


def test_error(tree, x, test):
    """Mean squared error on new rows, each variable regressed on the functions of its neighbors."""
    features, of_test = np.asarray(bumps(x)), np.asarray(bumps(test))
    errors = []
    for i, row in enumerate(tree):
        inputs, new = (np.asarray(f[:, row].reshape(len(f), -1), float) for f in (features, of_test))
        mean = inputs.mean(0)
        gram = (inputs - mean).T @ (inputs - mean) + RIDGE * np.eye(inputs.shape[1])
        slope = np.linalg.solve(gram, (inputs - mean).T @ (x[:, i] - x[:, i].mean()))
        errors.append(np.mean((test[:, i] - x[:, i].mean() - (new - mean) @ slope) ** 2))
    return float(np.mean(errors))


# --- training --------------------------------------------------------------------------------------


class Trees(nnx.Module):
    """Log-weights of a tree, and a function of each variable for each other."""

    def __init__(self, n):
        self.log_weights = nnx.Param(jnp.zeros((n, n)))
        self.functions = nnx.Param(jnp.zeros((n, n, len(CENTERS) + 1)))
        self.bias = nnx.Param(jnp.zeros(n))

    def parts(self, x):
        """What variable j says of variable i, shape (rows, i, j)."""
        return jnp.einsum("rjf,ijf->rij", bumps(x), self.functions[...])


def error_of(tree, x, parts, bias):
    """The mean squared error of predictions from neighbors, for trees of shape (..., n, n)."""
    predicted = jnp.einsum("...ij,rij->...ri", tree, parts) + bias
    return jnp.mean((x - predicted) ** 2, (-1, -2))


def mean_error(method, model, key, x, tau, samples):
    """The mean error over drawn trees."""
    weights, parts = model.log_weights[...], model.parts(x)
    f = lambda tree: error_of(tree, x, parts, model.bias[...])
    if method == "tree_sample":
        return jnp.mean(f(structured.tree_sample(key, weights, shape=(samples,))))
    if method == "relaxed_tree":
        return jnp.mean(f(structured.relaxed_tree(key, weights, tau, shape=(samples,))))
    return estimators.rloo(key, f, estimators.SpanningTree(weights), num_samples=samples)


def train(method, x, config):
    """The log-weights after each round of steps."""
    graph, weights = nnx.split(Trees(x.shape[1]))
    chunks = -(-config["steps"] // CHUNK)
    adam = optax.adam(optax.cosine_decay_schedule(config["learning_rate"], chunks * CHUNK))

    def step(carry, key):
        weights, moments = carry
        batch_key, key = jax.random.split(key)
        batch = x[jax.random.randint(batch_key, (config["batch_size"],), 0, len(x))]
        loss = lambda weights: mean_error(
            method, nnx.merge(graph, weights), key, batch, config["tau"], config["samples"]
        )
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), value

    advance = jax.jit(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, CHUNK)))
    carry, history = (weights, adam.init(weights)), []
    for key in tqdm(jax.random.split(jax.random.key(config["seed"]), chunks), method, leave=False):
        carry, losses = advance(carry, key)
        check_losses(losses)
        history.append(np.asarray(nnx.merge(graph, carry[0]).log_weights[...]))
    return np.array(history)


def learn(x, test, truth, methods, config):
    """For each method and for Chow and Liu: the tree, its error on new rows, and how many edges are true."""
    results = {}
    for name in (*methods, *BASELINES):
        if name in BASELINES:
            trees = [largest_tree(INFORMATION[name](x))]
        else:
            trees = [largest_tree(weights) for weights in train(name, jnp.asarray(x), config)]
        right = [float((tree & truth).sum() / tree.sum()) for tree in trees]
        results[name] = {"tree": trees[-1], "error": test_error(trees[-1], x, test), "right": right}
    return results


# --- pictures and the command ----------------------------------------------------------------------


def draw(known, patches, ink, used, path):
    shown = [next(name for name in patches if name not in BASELINES), "Chow-Liu, bins"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1.4, 1, 1))
    for name, row in known.items():
        if name in BASELINES:
            axes[0].axhline(row["right"][-1], color="black", ls=BASELINES[name], label=name)
        else:
            steps = CHUNK * np.arange(1, len(row["right"]) + 1)
            axes[0].plot(steps, row["right"], color=METHODS[name], label=name)
    axes[0].set(title="known tree", xlabel="training step", ylabel="share of the edges that are true")
    axes[0].set_ylim(0, 1.03)
    axes[0].legend(fontsize=8)
    axes[0].grid(alpha=0.3)
    places = np.argwhere(used)
    for axis, name in zip(axes[1:], shown, strict=True):
        axis.imshow(ink, cmap="gray_r", vmax=1.5 * ink.max())
        for i, j in np.argwhere(np.triu(patches[name]["tree"])):
            (y, x), (v, u) = places[i], places[j]
            axis.plot([x, u], [y, v], "o-", color="C0", ms=3, lw=1.5)
        axis.set(title=f"patches of images, {name}", xticks=[], yticks=[])
    save_figure(figure, path)


def say(name, row, what):
    click.echo(f"{name:24} {row['right'][-1]:.3f} {what}, error on new rows {row['error']:.4f}")


@click.command(context_settings={"show_default": True})
@methods_option(METHODS, help="Method that draws trees and differentiates them; may be given more than once.")
@images_option
@click.option(
    "--variables", type=click.IntRange(3, 500), default=20, help="Number of variables of the known tree."
)
@click.option(
    "--rows", type=click.IntRange(20, 100_000), default=1000, help="Number of rows drawn from the known tree."
)
@click.option("--tau", type=TAU, default=0.5, help="Temperature of relaxed_tree; the others have none.")
@click.option("--samples", type=click.IntRange(2, 1000), default=8, help="Number of trees drawn in a step.")
@click.option("--steps", type=STEPS, default=600, help="Number of steps of Adam, in rounds of 50.")
@click.option("--batch-size", type=COUNT, default=128, help="Number of rows in a step.")
@cosine_rate_option(0.05, FloatRange(0, 1, min_open=True))
@click.option("--seed", type=SEED, default=0, help="Seed of the data and of all draws.")
@out_option
def main(methods, data, variables, rows, out, **config):
    """Learn a spanning tree over variables by reconstruction, and compare it with Chow and Liu's.

    Writes metrics.json and latent_tree.png.
    """
    methods = list(dict.fromkeys(methods))
    images, test_images = load_split(data)
    ink, test_ink = ink_of_patches(images), ink_of_patches(test_images)
    used = ink.std(0) > 0.02  # the others are almost always empty
    if used.sum() < 3:
        raise UserError(
            f"{data} has {used.sum()} patches of {PATCH} x {PATCH} pixels that differ; give larger images"
        )
    out = output_folder(out, "latent_tree")
    x, truth = known_tree(np.random.default_rng(config["seed"]), variables, 2 * rows)
    click.echo(f"a known tree of {variables} variables, {rows} rows")
    known = learn(x[:rows], x[rows:], truth, methods, config)
    for name, row in known.items():
        say(name, row, "of the edges are true")
    mean, spread = ink[:, used].mean(0), ink[:, used].std(0)
    x, test = (((part[:, used] - mean) / spread).astype(np.float32) for part in (ink, test_ink))
    places = np.argwhere(used)
    adjacent = np.abs(places[:, None] - places).sum(-1) == 1
    click.echo(f"{len(places)} patches of {len(x)} images")
    patches = learn(x, test, adjacent, methods, config)
    for name, row in patches.items():
        say(name, row, "of the edges join adjacent patches")
    draw(known, patches, ink.mean(0), used, out / "latent_tree.png")
    plain = lambda rows: {
        name: row | {"tree": np.argwhere(np.triu(row["tree"])).tolist()} for name, row in rows.items()
    }
    settings = config | {"methods": methods, "data": data, "variables": variables, "rows": rows}
    results = {"known": plain(known), "patches": plain(patches)}
    write_json(out / "metrics.json", {"results": results, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: latent_tree.png, metrics.json")


if __name__ == "__main__":
    run(main)
