"""A mixture of experts: which two of eight small networks look at an image?

A router gives each expert a logit, k of them are chosen for each image, and their outputs are mixed. The
choice is discrete. Left alone, the router tends to use a few experts that get most images and most of the
training. Here are three ways to draw the choice, each with and without a loss that encourages balance:

    gumbel_top_k    k different experts, mixed by the softmax of their logits; the choice has no gradient
    simple_top_k    an exact subset; its gradient is the gradient of its marginals
    relaxed_top_k   a relaxed subset: every expert has a share, k of them most of it

The balance loss comes from N. Shazeer et al. (2017), arXiv:1701.06538, and W. Fedus, B. Zoph, N. Shazeer
(2022), arXiv:2101.03961, for k experts: n times the sum of the squared shares, where a share is the mean
probability of being chosen. It is 1 when all experts have the same share, and n / k when k of them have all.

    python examples/mixture_of_experts.py
"""

import functools

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import relaxit_jax as rj
from common import (
    SEED,
    SIZE,
    STEPS,
    TAU,
    FloatRange,
    UserError,
    check_losses,
    cosine_rate_option,
    load_labelled,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)

CLASSES = 10
CHUNK = 50  # training steps in one compiled call


class Mixture(nnx.Module):
    """A linear router, and experts with one hidden layer each, all computed at once."""

    def __init__(self, experts, hidden, pixels, seed):
        rngs = nnx.Rngs(seed)
        many = lambda inputs, outputs: nnx.Einsum(
            "...ei,eio->...eo", (experts, inputs, outputs), (experts, outputs), rngs=rngs
        )
        self.router = nnx.Linear(pixels, experts, rngs=rngs)
        self.first = nnx.Einsum("...i,eio->...eo", (experts, pixels, hidden), (experts, hidden), rngs=rngs)
        self.second = many(hidden, CLASSES)

    def __call__(self, x, weights):
        """The outputs of the experts, mixed by weights of shape (..., experts)."""
        outputs = self.second(jax.nn.relu(self.first(x)))
        return jnp.einsum("...e,...eo->...o", weights, outputs)


def gumbel_top_k(key, logits, k, tau):
    index, _ = rj.gumbel_top_k(key, jax.lax.stop_gradient(logits), k)
    chosen = jnp.sum(jax.nn.one_hot(index, logits.shape[-1]), -2)
    weights = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf))
    return weights, rj.gumbel_top_k_marginals(logits, k)


def simple_top_k(key, logits, k, tau):
    return rj.simple_top_k(key, logits, k) / k, rj.simple_top_k_marginals(logits, k)


def relaxed_top_k(key, logits, k, tau):
    return rj.relaxed_top_k(key, logits, k, tau) / k, rj.gumbel_top_k_marginals(logits, k)


ROUTERS = {"gumbel_top_k": gumbel_top_k, "simple_top_k": simple_top_k, "relaxed_top_k": relaxed_top_k}


def imbalance(marginals):
    """1 if every expert has the same share of a batch, from the probabilities that each is chosen."""
    share = jnp.mean(marginals, 0) / jnp.sum(jnp.mean(marginals, 0))
    return share.shape[0] * jnp.sum(share**2)


def best(logits, k):
    """The k experts with the largest logits, mixed as in training without noise."""
    _, index = jax.lax.top_k(logits, k)
    return jnp.sum(jax.nn.one_hot(index, logits.shape[-1]), -2)


def train(name, balance, data, config):
    """Train one mixture; return its loss and the share of each expert during training."""
    x, labels = data
    graph, weights = nnx.split(Mixture(config["experts"], config["hidden"], x.shape[1], config["seed"]))
    route = functools.partial(ROUTERS[name], k=config["chosen"], tau=config["tau"])
    chunks = -(-config["steps"] // CHUNK)
    adam = optax.adam(optax.cosine_decay_schedule(config["learning_rate"], chunks * CHUNK))

    def loss(weights, key, x, labels):
        model = nnx.merge(graph, weights)
        share, marginals = route(key, model.router(x))
        error = optax.softmax_cross_entropy_with_integer_labels(model(x, share), labels).mean()
        return error + balance * imbalance(marginals), (error, marginals.mean(0))

    def step(carry, key):
        weights, moments = carry
        batch_key, key = jax.random.split(key)
        batch = jax.random.randint(batch_key, (config["batch_size"],), 0, len(x))
        gradient, seen = jax.grad(loss, has_aux=True)(weights, key, x[batch], labels[batch])
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), seen

    advance = jax.jit(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, CHUNK)))
    carry, errors, shares = (weights, adam.init(weights)), [], []
    title = f"{name}, balance {balance:g}"
    for key in tqdm(jax.random.split(jax.random.key(config["seed"]), chunks), title, leave=False):
        carry, (error, share) = advance(carry, key)
        errors.append(np.asarray(error))
        shares.append(np.asarray(share[-1]) / config["chosen"])
    check_losses(np.concatenate(errors))
    return nnx.merge(graph, carry[0]), np.array(shares)


def evaluate(name, model, data, config):
    """Accuracy with the k likeliest experts, and how much of the test images each of them gets."""
    x, labels = data
    logits = model.router(x)
    chosen = best(logits, config["chosen"])
    if name == "gumbel_top_k":
        weights = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf))
    else:
        weights = chosen / config["chosen"]
    right = jnp.argmax(model(x, weights), -1) == labels
    return float(right.mean()), np.asarray(chosen.mean(0)) / config["chosen"]


def draw(results, config, path):
    figure, axes = plt.subplots(
        2, len(results), figsize=(4.2 * len(results), 6), squeeze=False, sharey="row", layout="constrained"
    )
    steps = CHUNK * np.arange(1, len(next(iter(results.values()))["with balance"]["shares"]) + 1)
    for (top, bottom), (name, kinds) in zip(axes.T, results.items(), strict=True):
        for kind, color in (("without balance", "C7"), ("with balance", "C0")):
            row = kinds[kind]
            top.plot(steps, row["shares"], color=color, lw=1, alpha=0.8)
            top.plot([], [], color=color, label=f"{kind}, accuracy {row['accuracy']:.3f}")
            place = np.arange(config["experts"]) + (0.2 if kind == "with balance" else -0.2)
            bottom.bar(place, np.sort(row["test_share"])[::-1], 0.4, color=color)
        for axis in (top, bottom):
            axis.axhline(1 / config["experts"], color="black", lw=0.8, ls=":")
        top.set(title=name, xlabel="training step")
        top.legend(fontsize=8)
        bottom.set(xlabel="expert, by its share")
    axes[0, 0].set_ylabel("share of each expert, in training")
    axes[1, 0].set_ylabel("share of the test images")
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option("--experts", type=click.IntRange(2, 4096), default=8, help="Number of experts.")
@click.option("--chosen", type=SIZE, default=2, help="Number of experts that look at one image, k.")
@click.option("--hidden", type=SIZE, default=16, help="Number of units in an expert's hidden layer.")
@click.option("--balance", type=FloatRange(0, 1e6), default=0.1, help="Weight of the balance loss, in nats.")
@click.option("--tau", type=TAU, default=0.5, help="Temperature of relaxed_top_k; the others have none.")
@click.option("--steps", type=STEPS, default=1500, help="Number of Adam steps, in rounds of 50.")
@click.option("--batch-size", type=SIZE, default=128, help="Number of images in a step.")
@cosine_rate_option(3e-3, FloatRange(0, 1, min_open=True))
@click.option("--seed", type=SEED, default=0, help="Seed of the weights and of all draws.")
@out_option
def main(balance, out, **config):
    """Train a mixture of experts with three routers, with and without a balance loss.

    Writes metrics.json and mixture_of_experts.png.
    """
    if config["chosen"] > config["experts"]:
        raise UserError(f"--chosen {config['chosen']} is above the {config['experts']} experts; lower it")
    out = output_folder(out, "mixture_of_experts")
    data, test = (
        (jnp.asarray(images.reshape(len(images), -1)), jnp.asarray(labels))
        for images, labels in load_labelled()
    )
    results = {}
    for name in ROUTERS:
        results[name] = {}
        for kind, weight in (("without balance", 0.0), ("with balance", balance)):
            model, shares = train(name, weight, data, config)
            accuracy, test_share = evaluate(name, model, test, config)
            results[name][kind] = {"accuracy": accuracy, "shares": shares, "test_share": test_share}
            click.echo(
                f"{name:14} {kind:16} accuracy {accuracy:.3f}; largest share {test_share.max():.3f}, "
                f"smallest {test_share.min():.3f} of {1 / config['experts']:.3f}"
            )
    draw(results, config, out / "mixture_of_experts.png")
    rows = {
        name: {kind: row | {"shares": row["shares"].tolist(), "test_share": row["test_share"].tolist()}
               for kind, row in kinds.items()}
        for name, kinds in results.items()
    }  # fmt: skip
    settings = config | {"balance": balance}
    write_json(out / "metrics.json", {"results": rows, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: mixture_of_experts.png, metrics.json")


if __name__ == "__main__":
    run(main)
