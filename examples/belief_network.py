"""Sigmoid belief networks with one to three layers of bits on handwritten digits, with nested estimators.

The model draws bits from the top down: b_L from a prior, each layer given the layer above it, the pixels x
given b_1. The inference network goes the other way, q(b_1 | x) q(b_2 | b_1) and so on. Written from the
bottom, the ELBO is an expectation inside an expectation,

    ELBO = H(q(b_1 | x)) + E_q(b_1 | x) f_1(b_1),
    f_l(b_l) = log p(b_(l-1) | b_l) + H(q(b_(l+1) | b_l)) + E_q(b_(l+1) | b_l) f_(l+1)(b_(l+1)),
    f_L(b_L) = log p(b_(L-1) | b_L),

with x for b_0, and with -KL(q(b_L | b_(L-1)) || p(b_L)) for the last entropy. So f_l calls an estimator of
f_(l+1), with its own key. Each of these estimators is linear in the values of its f, so the noise of the
inner one averages out, and the gradient is unbiased if each of them is. Entropies and the KL are sums over
single bits and need no draws.

An estimator that calls its f c times calls f_l c^l times for one image. The calls counted here are c + ... +
c^L, for all layers.

Straight-through is biased. The bias and noise of every method are measured on a small network, where `exact`
inside `exact` gives the true gradient.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import relaxit_jax as rj
from checkpoints import Checkpoints
from common import (
    COUNT,
    RATE,
    SEED,
    SIZE,
    Path,
    UserError,
    augment,
    binarise,
    digest,
    load_images,
    methods_option,
    out_option,
    output_folder,
    run,
    save_figure,
    split_images,
    versions,
    write_json,
)
from networks import Constant
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import from_sampler

SAMPLES = (1, 50)  # for the bounds of a trained network
SMALL_PIXELS, SMALL_UNITS = 6, 2  # for the network whose exact gradient is known


class Method(NamedTuple):
    about: str
    estimator: Callable  # (key, f, q), with num_samples where that is a choice
    calls: int | None  # calls of f for one estimate; None if num_samples sets it
    colour: str


METHODS = {
    "disarm": Method("two antithetic draws", es.disarm, 2, "#0072B2"),
    "arms": Method("--samples draws that repel each other", es.arms, None, "#009E73"),
    "rebar": Method("a draw, with a relaxed control variate", es.rebar, 3, "#CC79A7"),
    "rloo": Method("--samples independent draws", es.rloo, None, "#E69F00"),
    "straight_through": Method(
        "a draw with the gradient of its probability, biased",
        from_sampler(rj.straight_through_bernoulli), 1, "#000000",
    ),
}  # fmt: skip


class Config(NamedTuple):
    """Everything that a result depends on, except versions and the machine."""

    method: str
    layers: int
    data: str
    epochs: int
    seed: int
    units: int
    samples: int
    batch_size: int
    learning_rate: float


def estimator_of(method, samples):
    """The estimator, and how often it calls f."""
    row = METHODS[method]
    if row.calls is None:
        return functools.partial(row.estimator, num_samples=samples), samples
    return row.estimator, row.calls


def calls_of_layers(method, layers, samples):
    """How often the f of each layer is called for one image, from the first layer to the last."""
    calls = estimator_of(method, samples)[1]
    return [calls**layer for layer in range(1, layers + 1)]


# --- the network and its bounds ------------------------------------------------------------------


class BeliefNetwork(nnx.Module):
    """Layers of bits: `up` infers each from the layer below it, `down` draws each from the layer above."""

    def __init__(self, mean, layers, units, rngs):
        pairs = list(itertools.pairwise([mean.size] + layers * [units]))
        self.mean = Constant(mean)
        self.up = nnx.List(nnx.Linear(below, above, rngs=rngs) for below, above in pairs)
        self.down = nnx.List(nnx.Linear(above, below, rngs=rngs) for below, above in pairs)
        self.down[0].bias[...] = jax.scipy.special.logit(jnp.clip(mean, 0.01, 0.99))
        self.prior = nnx.Param(jnp.zeros(units))

    def infer(self, layer, below):
        """The bits of a layer given the layer below it; for the first layer that is the pixels."""
        up = self.up[layer]
        return es.Bernoulli(up(2 * below - 1 if layer else below - self.mean[...]))

    def log_likelihood(self, layer, below, bits):
        """log p(the layer below | this one)."""
        return log_bernoulli(self.down[layer](2 * bits - 1), below)


def log_bernoulli(logits, bits):
    return jnp.sum(bits * logits - jax.nn.softplus(logits), -1)


def entropy(q):
    return -log_bernoulli(q.logits, jax.nn.sigmoid(q.logits))


def elbo(model, x, key, estimator):
    """Estimate the ELBO of each image, with the gradient of nested estimators."""
    last = len(model.up) - 1

    def from_layer(layer, below, key):
        """All terms from this layer up, given the layer below it."""
        own_key, inner_key = jax.random.split(key)
        q = model.infer(layer, below)

        def f(bits):
            value = model.log_likelihood(layer, below, bits)
            return value if layer == last else value + from_layer(layer + 1, bits, inner_key)

        value = entropy(q) + estimator(own_key, f, q)
        if layer == last:  # minus the KL: the entropy, and the mean of log p(b_L)
            value += log_bernoulli(model.prior[...], jax.nn.sigmoid(q.logits))
        return value

    return from_layer(0, x, key)


def log_weights(model, x, key):
    """log p(x, b) - log q(b | x) for one exact draw of all layers."""
    total, below = 0.0, x
    for layer, own_key in enumerate(jax.random.split(key, len(model.up))):
        q = model.infer(layer, below)
        bits = q.sample(own_key)
        total += model.log_likelihood(layer, below, bits) - q.log_prob(bits)
        below = bits
    return total + log_bernoulli(model.prior[...], below)


# --- training ------------------------------------------------------------------------------------


class Experiment:
    """The compiled functions of a run, and its state before the first epoch."""

    def __init__(self, config, train, test):
        self.config = config
        self.estimator = estimator_of(config.method, config.samples)[0]
        self.grey, self.test = jnp.asarray(train), binarise(test)
        self.steps = len(train) // config.batch_size
        total = max(1, self.steps * config.epochs)
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, total // 10, total)
        self.optimizer = optax.adam(rate)
        self.train_key, self.test_key = jax.random.split(jax.random.key(config.seed))
        mean = jnp.mean(binarise(train), 0)
        model = BeliefNetwork(mean, config.layers, config.units, nnx.Rngs(config.seed))
        self.graph, params, self.constants = nnx.split(model, nnx.Param, ...)
        self.state = params, self.optimizer.init(params)

    def model(self, params):
        return nnx.merge(self.graph, params, self.constants)

    def loss(self, params, x, key):
        return -jnp.mean(elbo(self.model(params), x, key, self.estimator))

    @functools.partial(jax.jit, static_argnums=0)
    def epoch(self, state, grey, number):
        """One pass over the training images in a random order; the mean of the negative ELBO."""
        order_key, step_key = jax.random.split(jax.random.fold_in(self.train_key, number))
        order = jax.random.permutation(order_key, len(grey))
        rows = order[: self.steps * self.config.batch_size].reshape(self.steps, -1)

        def step(state, batch):
            params, optimizer_state = state
            rows, index = batch
            image_key, key = jax.random.split(jax.random.fold_in(step_key, index))
            x = binarise(augment(image_key, grey[rows]))
            value, gradient = jax.value_and_grad(self.loss)(params, x, key)
            updates, optimizer_state = self.optimizer.update(gradient, optimizer_state)
            return (optax.apply_updates(params, updates), optimizer_state), value

        state, values = jax.lax.scan(step, state, (rows, jnp.arange(self.steps)))
        return state, jnp.mean(values)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def test_bounds(self, params, images, samples):
        """Mean negative bounds of the test images, in nats: from single draws, and from weighted ones."""
        model = self.model(params)
        keys = jax.random.split(self.test_key, len(images))

        def one(image_and_key):
            x, key = image_and_key
            draws = jax.vmap(lambda key: log_weights(model, x, key))(jax.random.split(key, samples))
            return -jnp.mean(draws), math.log(samples) - jax.nn.logsumexp(draws)

        return jax.tree.map(jnp.mean, jax.lax.map(one, (images, keys), batch_size=20))


def train(experiment, checkpoints, resume):
    """Run all remaining epochs; return the last state and the history of all epochs."""
    config = experiment.config
    first, state, history = checkpoints.restore(experiment.state) if resume else (-1, experiment.state, [])
    name = f"{config.method}, layers {config.layers}"
    with tqdm(total=config.epochs, initial=first + 1, unit="epoch", desc=name) as bar:
        for number in range(first + 1, config.epochs):
            start = time.perf_counter()
            state, objective = experiment.epoch(state, experiment.grey, number)
            objective = float(objective)
            seconds = time.perf_counter() - start
            bound = float(experiment.test_bounds(state[0], experiment.test, 1)[0])
            if not math.isfinite(objective + bound):
                raise UserError(
                    f"the bound of {name} became {objective} in epoch {number + 1}; lower --learning-rate"
                )
            history.append({"train": objective, "test": bound, "seconds": seconds})
            checkpoints.save(number, state, history)
            bar.update()
            bar.set_postfix_str(f"train {objective:.1f}, test -ELBO {bound:.1f} nats")
    return state, history


# --- the exact comparison ------------------------------------------------------------------------


def small_network(layers):
    """A function from random parameters to a network with few bits, these parameters, and an image."""
    model = BeliefNetwork(jnp.full(SMALL_PIXELS, 0.5), layers, SMALL_UNITS, nnx.Rngs(0))
    graph, params, constants = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(layers)
    params = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])
    x = jnp.asarray(rng.integers(0, 2, (1, SMALL_PIXELS)), jnp.float32)
    return lambda params: nnx.merge(graph, params, constants), params, x


def small_gradients(key, layers, estimator, estimates):
    """Estimates of the gradient of a small network's ELBO, one in each row, and the exact gradient."""
    merge, params, x = small_network(layers)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    loss = lambda flat, key, estimator: elbo(merge(unflatten(flat)), x, key, estimator)[0]
    exact = jax.jit(jax.grad(lambda flat: loss(flat, key, lambda key, f, q: es.exact(f, q))))(flat)
    slope = jax.grad(lambda flat, key: loss(flat, key, estimator))
    rows = jax.jit(jax.vmap(slope, (None, 0)))(flat, jax.random.split(key, estimates))
    return np.asarray(rows, float), np.asarray(exact, float)


def compare(key, config, estimates):
    """Bias, its size from noise alone, and the deviation of one estimate, divided by the gradient."""
    estimator = estimator_of(config.method, config.samples)[0]
    rows, exact = small_gradients(key, config.layers, estimator, estimates)
    norm, deviation = np.linalg.norm(exact), math.sqrt(rows.var(0, ddof=1).sum())
    return {
        "bias": np.linalg.norm(rows.mean(0) - exact) / norm,
        "noise": deviation / math.sqrt(estimates) / norm,
        "deviation_of_one": deviation / norm,
    }


# --- the report ----------------------------------------------------------------------------------


def draw(results, path):
    """Test bounds over epochs and over calls of f, with one line of panels for each number of layers."""
    figure, axes = plt.subplots(
        len(results), 2, figsize=(10, 3.6 * len(results)), squeeze=False, layout="constrained", sharey="row"
    )
    for (left, right), (layers, rows) in zip(axes, results.items(), strict=True):
        for name, row in rows.items():
            bounds = [epoch["test"] for epoch in row["history"]]
            epochs = np.arange(1, len(bounds) + 1)
            look = {"color": METHODS[name].colour, "ls": "--" if name == "straight_through" else "-"}
            calls = sum(row["calls_of_f"])
            left.plot(epochs, bounds, label=f"{name}, {calls} calls of f", **look)
            right.plot(epochs * calls, bounds, **look)
        many = f"{layers} layer" + "s" * (int(layers) > 1)
        left.set(xlabel="epoch", ylabel="test negative ELBO, nats per image", title=many)
        right.set(xscale="log", xlabel="calls of f per training image, all layers", title=many)
        for axis in (left, right):
            axis.grid(alpha=0.3)
        left.legend(loc="upper right")
        early = [row["history"][len(row["history"]) // 10]["test"] for row in rows.values()]
        left.set_ylim(top=max(early))  # the first epochs are a cliff
    save_figure(figure, path)


def table(results):
    """The numbers of every network: bounds in nats, bias and noise as a fraction of the gradient's norm."""
    total = str(max(SAMPLES))
    lines = [
        f"{'test negative bound, nats':>40}{'gradient of a small network':>39}",
        f"layers {'method':16} {'1 draw':>7} {total + ' draws':>8} {'calls of f':>11}"
        f" {'bias':>5} {'(noise)':>7} {'one estimate':>12}",
    ]
    for layers, rows in results.items():
        for name, row in rows.items():
            bounds, small = row["test_negative_bounds"], row["small_network"]
            lines.append(
                f"{layers:>6} {name:16} {bounds['1']:7.1f} {bounds[total]:8.1f} "
                f"{' + '.join(map(str, row['calls_of_f'])):>11} {small['bias']:5.3f} {small['noise']:7.3f} "
                f"{small['deviation_of_one']:12.2f}"
            )
    return "\n".join(lines)


@click.command(
    context_settings={"show_default": True, "max_content_width": 110},
    epilog="\b\nMethods:\n" + "\n".join(f"  {name:18}{row.about}" for name, row in METHODS.items()),
)
@click.option(
    "--layers",
    "depths",
    type=click.IntRange(1, 3),
    multiple=True,
    default=(2, 3),
    help="Number of layers of bits; may be given more than once.",
)
@methods_option(METHODS, help="Estimator in every layer, see the list below; may be given more than once.")
@click.option(
    "--data",
    type=Path(),
    default="mnist5k",
    metavar="NAME|FILE.npz",
    help="Images: mnist5k, 5,000 of MNIST, no network needed; digits, 1,797 of 8x8; mnist, all 70,000, "
    "downloaded once; or an .npz file of images in [0, 1], (n, height, width).",
)
@click.option(
    "--epochs", type=click.IntRange(1, 100_000), default=60, help="Number of passes over the training images."
)
@click.option("--seed", type=SEED, default=0, help="Seed of the initial weights and of all draws.")
@click.option("--units", type=SIZE, default=100, help="Number of bits in each layer.")
@click.option(
    "--samples",
    type=click.IntRange(2, 100),
    default=4,
    help="Number of draws of arms and rloo in each layer; the calls of layer l grow as its power l.",
)
@click.option("--batch-size", type=COUNT, default=100, help="Number of images in a step.")
@click.option(
    "--learning-rate",
    type=RATE,
    default=3e-3,
    help="Peak learning rate of Adam; it warms up for a tenth of the steps and falls along a cosine.",
)
@click.option(
    "--estimates",
    type=click.IntRange(100, 1_000_000),
    default=20_000,
    help="Number of gradients of the small network that the exact comparison averages.",
)
@out_option
@click.option("--resume", is_flag=True, help="Continue the run in --out after its last good checkpoint.")
def main(depths, methods, estimates, out, resume, **options):
    """Train sigmoid belief networks of stochastic layers, with an estimator inside another's f.

    Writes metrics.json, belief_network.png (test bounds over epochs and over calls of f) and a checkpoint
    after each epoch.
    """
    images = load_images(options["data"])
    training, test = split_images(images)
    if options["batch_size"] > len(training):
        raise UserError(
            f"--batch-size {options['batch_size']} is above the {len(training)} training images; lower it"
        )
    if resume and out is None:
        raise UserError("--resume needs the run's folder; give it with --out")
    if resume and not any(out.glob("*/checkpoints")):
        raise UserError(f"there is no run to resume in {out}; check --out, or leave out --resume")
    out = output_folder(out, "belief_network")
    if not resume and any(out.glob("*/checkpoints")):
        raise UserError(f"{out} holds a run already; continue it with --resume, or choose another --out")
    results, timing, total = {}, {}, max(SAMPLES)
    for layers in sorted(set(depths)):
        for method in dict.fromkeys(methods):
            config = Config(method, layers, **options)
            name = f"{method}-{layers}"
            checkpoints = Checkpoints(out / name / "checkpoints", config._asdict() | {"data": digest(images)})
            experiment = Experiment(config, training, test)
            state, history = train(experiment, checkpoints, resume)
            single, weighted = map(float, experiment.test_bounds(state[0], experiment.test, total))
            results.setdefault(str(layers), {})[method] = {
                "test_negative_bounds": {"1": single, str(total): weighted},
                "calls_of_f": calls_of_layers(method, layers, config.samples),
                "small_network": compare(jax.random.key(config.seed), config, estimates),
                "history": [{k: epoch[k] for k in ("train", "test")} for epoch in history],
            }
            timing[name] = {"seconds_per_epoch": float(np.median([x["seconds"] for x in history]))}
    draw(results, out / "belief_network.png")
    metrics = {
        "results": results,
        "timing": timing,
        "settings": options | {"layers": depths, "methods": methods, "estimates": estimates},
        "images": {"train": len(training), "test": len(test), "shape": training.shape[1:]},
        "versions": versions(),
    }
    write_json(out / "metrics.json", metrics)
    click.echo(table(results))
    click.echo(f"in {out}: metrics.json, belief_network.png, a folder of checkpoints for each")


if __name__ == "__main__":
    run(main)
