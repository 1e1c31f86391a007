"""How benchmarks/published.py trains: one loop for all VAEs, learning to sort numbers, and CartPole.

Each of the three yields ``{"epoch": ..., measure: value, ...}`` as it goes, and can go on from the state that
an earlier, stopped run left in a file.
"""

import functools
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import policy_gradient
import relaxit_jax as rj
import sort_digits
import vae
from common import IDX_FILES, UserError, read_idx_folder
from latents import Categories
from methods import METHODS, Estimator, Sampler
from relaxit_jax import estimators
from relaxit_jax.distributions import SimpleTopK
from relaxit_jax.estimators import value_and_grads

# --- data -----------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Pixels as bytes, shape (images, pixels), and the byte that means 1."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    full: int


def gray(folder, held_out):
    """IDX files, in the folder or in its subfolder mnist; the first images are held out for validation."""
    inner = folder / "mnist"
    (train, _), (test, _) = read_idx_folder(inner if inner.is_dir() else folder)
    if len(train) <= held_out:
        raise UserError(f"{folder} holds {len(train)} training images; this protocol needs over {held_out}")
    train, test = (np.round(255 * x).astype(np.uint8).reshape(len(x), -1) for x in (train, test))
    return Images(train[held_out:], train[:held_out], test, 255)


AMAT = [f"binarized_mnist_{part}.amat" for part in ("train", "valid", "test")]


def binarized(folder):
    """The fixed binarization: its three text files, or one .npz of packed bits."""
    inner = folder / "binarized"
    folder = inner if inner.is_dir() else folder
    packed = folder / "binarized_mnist.npz"
    if packed.is_file():
        try:
            with np.load(packed) as file:
                parts = [np.unpackbits(file[name], axis=-1) for name in ("train", "valid", "test")]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {packed} ({error}); download it again") from error
    else:
        parts = [read_amat(folder / name) for name in AMAT]
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"{folder} holds images of several sizes; its files must be of one data set")
    return Images(*parts, 1)


def read_amat(path):
    """Lines of zeros and ones with spaces between them."""
    if not path.is_file():
        raise UserError(
            f"there is no file {path}, nor binarized_mnist.npz; download it, or name other --data"
        )
    content = np.frombuffer(path.read_bytes(), np.uint8)
    lines, digits = np.sum(content == ord("\n")), content[(content == ord("0")) | (content == ord("1"))]
    if not lines or len(digits) % lines:
        raise UserError(f"{path} has no lines of equally many zeros and ones; download it again")
    return (digits - ord("0")).reshape(lines, -1)


def idx_folder(folder, name):
    """The folder itself, of which only the names of files are looked at here."""
    inner = folder / name
    folder = inner if inner.is_dir() else folder
    for file in sum(IDX_FILES, ()):
        if not any((folder / f"{file}{end}").is_file() for end in ("", ".gz")):
            raise UserError(f"there is no file {folder / file}; download it, or name other --data")
    return folder


DATA = {
    "MNIST": lambda folder: idx_folder(folder, "mnist"),
    "Fashion-MNIST": lambda folder: idx_folder(folder, "fashion"),
    "gray": lambda folder: gray(folder, 0),
    "gray, 5,000 held out": lambda folder: gray(folder, 5000),
    "fixed binarization": binarized,
}


# --- latents and methods that the examples do not have -----------------------------------------------


class Subsets:
    """n subsets of k elements each, uniform a priori."""

    def __init__(self, config):
        self.n, self.size, self.k = config.variables, config.classes, config.subset_size
        self.outputs = self.code_size = self.n * self.size

    def shared(self):
        return {}

    def split(self, q):
        return q.reshape(*q.shape[:-1], self.n, self.size)

    def kl(self, key, q, g):
        return self.kl_by(SimpleTopK(logits=self.split(q), k=self.k).entropy())

    def kl_by(self, entropy):
        return jnp.sum(math.log(math.comb(self.size, self.k)) - entropy, -1)

    def draw(self, key, q, g):
        z = rj.simple_top_k(key, self.split(q), self.k)
        log_q = rj.simple_top_k_log_prob(z, self.split(q), self.k)
        return z, self.kl_by(-log_q) * -1

    def code(self, z):
        return z.reshape(*z.shape[:-2], -1)


class LateSubsets(Subsets):
    """The same, with the entropy that the notebook of SIMPLE's authors counts.

    By the chain rule, the entropy of a subset is a sum over its bits, from the last to the first, each given
    those after it. Their recursion starts at bit 10 and leaves out bits 1 to 9, so their KL is too large by
    the entropy of these nine.
    """

    FIRST = 10

    def kl(self, key, q, g):
        return self.kl_by(late_entropy(self.split(q), self.k, self.FIRST))


def late_entropy(logits, k, first):
    """Entropy of the bits from number `first` on, of bits that sum to k; with first = 1 of all of them."""
    never = jnp.full((*logits.shape[:-1], 1), -1e9)
    none = jnp.zeros((*logits.shape[:-1], 1))

    def step(state, bit):
        log_weight, entropy = state  # of the bits so far, by how many are ones
        number, logit = bit
        taken = jnp.concatenate([never, log_weight[..., :-1]], -1) + logit[..., None]
        log_odds = taken - log_weight
        p = jax.nn.sigmoid(log_odds)
        before = p * jnp.concatenate([none, entropy[..., :-1]], -1) + (1 - p) * entropy
        entropy = jnp.where(number >= first, before + rj.bernoulli_entropy(log_odds), 0)
        return (jnp.logaddexp(taken, log_weight), entropy), None

    n = logits.shape[-1]
    start = jnp.concatenate([none, *[never] * k], -1), jnp.zeros((*logits.shape[:-1], k + 1))
    bits = jnp.arange(1, n + 1), jnp.moveaxis(logits, -1, 0)
    return jax.lax.scan(step, start, bits)[0][1][..., k]


simple_top_k = Sampler(
    "exact subsets", Subsets, lambda family, key, q, g, tau: rj.simple_top_k(key, family.split(q), family.k)
)
score = Estimator("no baseline", Categories, lambda key, f, q, _: estimators.reinforce(key, f, q))
TRAINED_BY = METHODS | {
    "simple_top_k": simple_top_k,
    "simple_top_k, notebook's entropy": simple_top_k._replace(family=LateSubsets),
    "score function": score,
    "rloo_categorical, 10 draws": METHODS["rloo_categorical"]._replace(draws=10),
    "exact": score._replace(estimate=lambda key, f, q, _: estimators.exact(f, q)),
}


# --- the loop of all VAEs ---------------------------------------------------------------------------


class Network(NamedTuple):
    """What vae.Experiment asks of a model."""

    params: dict
    constants: dict
    activation: callable
    family: object

    def encode(self, x):
        return mlp(self.params["encoder"], x - self.constants["mean"], self.activation), self.params["shared"]

    def shared_parameters(self):
        return self.params["shared"]

    def log_likelihood(self, x, code):
        logits = mlp(self.params["decoder"], code, self.activation) + self.constants["bias"]
        return jnp.sum(x * logits - jax.nn.softplus(logits), -1)


def glorot(key, inputs, outputs):
    """TensorFlow's and Keras' first weights."""
    return jax.nn.initializers.glorot_uniform()(key, (inputs, outputs)), jnp.zeros(outputs)


def by_inputs(key, inputs, outputs):
    """PyTorch's first weights and biases."""
    limit = inputs**-0.5
    weights = jax.random.uniform(key, (inputs + 1, outputs), minval=-limit, maxval=limit)
    return weights[1:], weights[0]


def layers(key, sizes, init):
    keys = jax.random.split(key, len(sizes) - 1)
    return [init(*each) for each in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def mlp(layers, x, activation):
    for number, (weights, bias) in enumerate(layers):
        x = x @ weights + bias
        if number < len(layers) - 1:
            x = activation(x)
    return x


class Training(vae.Experiment):
    """Objective and gradient come from examples/vae.py; networks, data and optimizer come from the record."""

    def __init__(self, protocol, method, images, seed, rate):
        self.protocol, self.method = protocol, TRAINED_BY[method]
        self.family = self.method.family(SimpleNamespace(**protocol.latents))
        self.images = Images(*map(jnp.asarray, images[:3]), images.full)
        self.seed, self.batch = seed, min(protocol.batch_size, len(images.train))
        self.steps = len(images.train) // self.batch
        self.optimizer = protocol.optimizer(rate)
        self.train_key, self.test_key, init_key = jax.random.split(jax.random.key(seed), 3)
        pixels = images.train.shape[1]
        mean = np.mean(self.pixels(self.images.train), 0) if protocol.centred else np.full(pixels, 0.5)
        clipped = np.clip(mean, 0.001, 0.999)
        bias = np.log(clipped) - np.log1p(-clipped)
        self.constants = {"mean": mean if protocol.centred else np.zeros(pixels), "bias": bias}
        first, second, variate_key = jax.random.split(init_key, 3)
        outwards = (self.family.code_size, *protocol.hidden[::-1], pixels)
        params = {
            "encoder": layers(first, (pixels, *protocol.hidden, self.family.outputs), protocol.init),
            "decoder": layers(second, outwards, protocol.init),
            "shared": self.family.shared(),
        }
        q = self.model(params).encode(self.pixels(self.images.train[:1]))[0]
        variate = self.method.variate(variate_key, q, 0.5)
        self.state = params, variate, self.optimizer.init((params, variate))

    def pixels(self, images):
        """In [0, 1]."""
        x = images.astype(jnp.float32) / self.images.full
        return (x > 0.5).astype(jnp.float32) if self.protocol.thresholded else x

    def model(self, params):
        shared = params["shared"]
        if not self.protocol.prior_learned:
            shared = jax.lax.stop_gradient(shared)
        return Network(params | {"shared": shared}, self.constants, self.protocol.activation, self.family)

    def rows(self, epoch):
        """Of the images, step by step: each once in an epoch, in an order of its own."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images.train))
        return order[: self.steps * self.batch].reshape(self.steps, self.batch).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def advance(self, state, images, rows, first):
        """A step for each of the rows, and the mean of their objectives."""

        def step(state, each):
            params, variate, optimizer_state = state
            rows, number = each
            key, tau = jax.random.fold_in(self.train_key, number), self.protocol.tau(number)
            value, gradients = self.gradients(params, variate, self.pixels(images[rows]), key, tau)
            changes, optimizer_state = self.optimizer.update(gradients, optimizer_state, (params, variate))
            return (*optax.apply_updates((params, variate), changes), optimizer_state), value

        state, values = jax.lax.scan(step, state, (rows, first + jnp.arange(len(rows))))
        return state, jnp.mean(values)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def bound(self, params, images, samples):
        """Mean negative bounds by exact draws: one draw and the KL, or several weighted ones.

        Subsets have two readings of the KL.
        """
        model, size = self.model(params), max(1, 1000 // samples)
        keys = jax.random.split(self.test_key, -(-len(images) // size))
        readings = {"": self.family}
        if isinstance(self.family, Subsets):
            config = SimpleNamespace(**self.protocol.latents)
            readings = {"": Subsets(config), ", notebook's reading": LateSubsets(config)}

        def chunk(each):
            key, rows = each
            x = self.pixels(images[rows])
            q, g = model.encode(x)
            if samples == 1:
                log_likelihood = model.log_likelihood(x, self.family.code(self.family.draw(key, q, g)[0]))
                return {name: family.kl(key, q, g) - log_likelihood for name, family in readings.items()}

            def one(key):
                z, ratio = self.family.draw(key, q, g)
                return model.log_likelihood(x, self.family.code(z)) + ratio

            log_weights = jax.vmap(one)(jax.random.split(key, samples))
            return {"": math.log(samples) - jax.nn.logsumexp(log_weights, 0)}

        rows = jnp.arange(len(keys) * size) % len(images)
        found = jax.lax.map(chunk, (keys, rows.reshape(len(keys), size)))
        return {name: jnp.mean(values.reshape(-1)[: len(images)]) for name, values in found.items()}


def train_vae(protocol, row, images, seed, rate, saved, fraction=1.0):
    """Epoch by epoch, from the saved state on; a fraction of all steps is one short epoch."""
    if "tau" in row.options:
        protocol = protocol._replace(tau=lambda step: row.options["tau"])
    training = Training(protocol, row.method, images, seed, rate)
    epochs, steps = protocol.epochs, training.steps
    if fraction < 1:
        epochs, steps = 1, min(steps, math.ceil(steps * epochs * fraction))
    state, done = saved.restore(training.state)
    parts = {"test": training.images.test, "validation": training.images.validation}
    for epoch in range(done, epochs):
        rows, last = training.rows(epoch)[:steps], epoch + 1 == epochs
        state, objective = training.advance(state, training.images.train, rows, epoch * training.steps)
        if not jnp.isfinite(objective):
            yield {"epoch": epoch + 1, "diverged": True}
            return
        measures = {"train": objective}
        for part, samples in protocol.evaluation:
            if samples > 1 and not last:
                continue
            name = part if samples == 1 else f"{part}, {samples:,} samples"
            found = training.bound(state[0], parts[part], samples if fraction == 1 else min(samples, 10))
            measures |= {f"{name}{reading}": value for reading, value in found.items()}
        saved.keep(state, epoch + 1, last)
        yield {"epoch": epoch + 1} | {name: round(float(value), 3) for name, value in measures.items()}


def train_example(protocol, row, folder, seed, rate, saved, fraction=1.0):
    """examples/vae.py with its defaults, in a process of its own; it keeps its state itself."""
    out = saved.path.with_suffix("") if saved.path else pathlib.Path(tempfile.mkdtemp())
    command = [
        sys.executable,
        vae.__file__,
        "--method",
        row.method,
        "--data",
        folder,
        "--seed",
        seed,
        "--out",
        out,
    ]
    command += ["--resume"] * (out / "checkpoints").exists() + ["--epochs", 1] * (fraction < 1)
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((out / "metrics.json").read_text())
    for epoch, found in enumerate(metrics["history"], 1):
        last = epoch == len(metrics["history"])
        weighted = {"test, 100 samples": metrics["test_negative_bound_100_samples"]} if last else {}
        yield {"epoch": epoch} | {name: round(value, 3) for name, value in (found | weighted).items()}
    if fraction < 1:
        shutil.rmtree(out)


# --- sorting numbers --------------------------------------------------------------------------------


def sinkhorn(log_matrices, rounds):
    """Rows and columns normalized in turn, as the authors do it."""
    for _ in range(rounds):
        log_matrices = jax.nn.log_softmax(jax.nn.log_softmax(log_matrices, -1), -2)
    return jnp.exp(log_matrices)


def misplaced(x, weights):
    """Which numbers the best assignment by these weights puts in a wrong place."""
    order = sort_digits.best_assignment(weights)
    return np.take_along_axis(np.asarray(x), order, -1) != np.sort(x, -1)


def in_float64(networks, x):
    """The same weights, in which numbers that are close to each other are not rounded together."""
    (first, bias), (second, other) = (map(np.float64, layer) for layer in networks)
    return np.maximum(np.float64(x)[..., None] @ first + bias, 0) @ second + other


def margin(matrices):
    """The largest distance of a row's or a column's sum from 1."""
    return max(float(jnp.abs(matrices.sum(axis) - 1).max()) for axis in (-1, -2))


def sort_numbers(protocol, row, images, seed, rate, saved, fraction=1.0):
    """Numbers in [0, 1]: a weight for each number and each place, from two layers."""
    n, steps = row.options["numbers"], max(1, round(protocol.steps * fraction))
    optimizer = optax.adam(rate)
    init_key, key, test_key, noise_key = jax.random.split(jax.random.key(seed), 4)
    networks = layers(init_key, (1, 32, n), glorot)
    weigh = lambda networks, x: mlp(networks, x[..., None], jax.nn.relu)

    def loss(networks, key):
        number_key, noise_key = jax.random.split(key)
        x = jax.random.uniform(number_key, (protocol.batch_size, n))
        weights = weigh(networks, x)
        z = rj.gumbel_sinkhorn(noise_key, weights, 1.0, shape=(protocol.draws, protocol.batch_size))
        return jnp.mean((jnp.sort(x) - jnp.einsum("sbij,bi->sbj", z, x)) ** 2)

    @jax.jit
    def train(networks, keys):
        def step(state, key):
            networks, moments = state
            value, gradient = jax.value_and_grad(loss)(networks, key)
            changes, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(networks, changes), moments), value

        return jax.lax.scan(step, (networks, optimizer.init(networks)), keys)

    (networks, _), values = train(networks, jax.random.split(key, steps))
    x = jax.random.uniform(test_key, (1000 if fraction == 1 else 20, n))
    weights = weigh(networks, x)
    wrong, wrong_in_float64 = (misplaced(x, w) for w in (weights, in_float64(networks, x)))
    shape = (protocol.draws, protocol.batch_size)
    noisy = weights[: protocol.batch_size] + jax.random.gumbel(noise_key, (*shape, n, n))
    ours = rj.gumbel_sinkhorn(noise_key, weights[: protocol.batch_size], 1.0, shape=shape)
    yield {
        "epoch": 1,
        "train": float(values[-1]),
        "numbers misplaced": float(wrong.mean()),
        "sequences with an error": float(wrong.any(-1).mean()),
        "sequences with an error, float64": float(wrong_in_float64.any(-1).mean()),
        "margin, 10 rounds": margin(sinkhorn(noisy, 10)),
        "margin, ours": margin(ours),
    }


# --- CartPole ---------------------------------------------------------------------------------------


def discounted(rewards, gamma):
    """Rewards to go, along the first axis."""
    step = lambda later, reward: (reward + gamma * later,) * 2
    return jax.lax.scan(step, jnp.zeros_like(rewards[0]), rewards, reverse=True)[1]


def play(protocol, row, images, seed, rate, saved, fraction=1.0):
    """Episodes until 100 of them, one after another, have a mean return of 195 or more."""
    world = policy_gradient.make_world("CartPole-v1", protocol.horizon)._replace(scale=(1, 1, 1, 1))
    copies = 2 if row.method == "rloo" else 1
    optimizer = optax.rmsprop(rate, initial_scale=1.0)  # as TensorFlow's begins
    left = 1 - jnp.arange(protocol.horizon) / protocol.horizon
    left = jnp.broadcast_to(left[:, None, None], (protocol.horizon, copies, 1))

    def update(state, key):
        networks, moments = state
        episodes = policy_gradient.roll_out(world, row.method, networks.policy, key, copies, copies)
        to_go = discounted(episodes.reward, 0.99)
        features = jnp.concatenate([episodes.observation, left], -1)

        def squared_error(baseline):
            values = policy_gradient.scalar(baseline, features)
            return jnp.sum(jnp.where(episodes.alive, values - to_go, 0) ** 2), values

        baseline_gradient, baseline = jax.grad(squared_error, has_aux=True)(networks.baseline)
        if row.method == "rloo":
            baseline = policy_gradient.leave_one_out(to_go, copies)

        def objective(policy, variate):
            entropy = rj.categorical_entropy(policy_gradient.mlp(policy, episodes.observation))
            bonus = 0.01 * jnp.sum(jnp.where(episodes.alive, entropy, 0)) / copies
            data = row.method, episodes, to_go, baseline, features
            return policy_gradient.surrogate(policy, variate, *data) - bonus

        _, of_policy, of_variate = value_and_grads(objective, networks.policy, networks.variate)
        gradient = policy_gradient.Networks(of_policy, baseline_gradient, of_variate)
        changes, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(networks, changes), moments), jnp.sum(episodes.reward, 0)

    advance = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys))
    key, init_key = jax.random.split(jax.random.key(seed))
    networks = policy_gradient.init_networks(init_key, world, SimpleNamespace(hidden=10))
    networks = networks._replace(policy=policy_gradient.init_mlp(init_key, 4, 10, 10, 2, last=1.0))
    state, returns, solved = (networks, optimizer.init(networks)), [], None
    most = math.ceil(protocol.steps * fraction)
    while solved is None and len(returns) < most:
        key, update_key = jax.random.split(key)
        state, found = advance(state, jax.random.split(update_key, min(50, most)))
        returns += np.asarray(found).reshape(-1).tolist()
        solved = first_solved(returns)
    yield {"epoch": 1, "episodes to solve": solved, "episodes played": len(returns)}


def first_solved(returns):
    """After how many episodes the mean of the last 100 is 195 or more; None if never."""
    means = np.convolve(returns, np.full(100, 0.01), "valid") if len(returns) >= 100 else np.zeros(0)
    solved = np.flatnonzero(means >= 195 - 1e-6)
    return int(solved[0]) + 100 if len(solved) else None


# --- what a stopped run goes on from ----------------------------------------------------------------


class Saved:
    """The state of a run in a file; without a path nothing is kept."""

    EVERY = 60  # seconds

    def __init__(self, path=None):
        self.path, self.time = path, time.monotonic()

    def restore(self, state):
        """The state, and after how many epochs it was kept."""
        if self.path is None or not self.path.exists():
            return state, 0
        leaves, tree = jax.tree.flatten(state)
        with np.load(self.path) as file:
            kept = [jnp.asarray(file[str(number)]) for number in range(len(leaves))]
            return jax.tree.unflatten(tree, kept), int(file["epoch"])

    def keep(self, state, epoch, last):
        if self.path is None or not (last or time.monotonic() > self.time + self.EVERY):
            return
        self.time = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
        part = self.path.with_suffix(".part.npz")
        np.savez(part, epoch=epoch, **leaves)
        part.replace(self.path)
