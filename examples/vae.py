"""A variational autoencoder with discrete latents on real handwritten digits.

One program for every method of relaxit_jax. An entry of METHODS in methods.py says how to draw latents in
training, and their family in latents.py says how to draw them at test time and which KL belongs to them.

The evaluated model is p(z) p(x | z) with z drawn exactly from its law, bits or categories or counts or
subsets, never relaxed. By Jensen's inequality

    log p(x) >= E_q(z|x) log p(x | z) - KL(q(z | x) || p(z)),

and this stays true if the KL is replaced by anything above it. The families train on the exact KL of the
discrete law (bits, categories, counts) or on an upper bound of it, the KL between variables of which z is a
function (data-processing inequality): the Gaussians that gates clip, the dependent Gaussians that correlated
bits threshold, the order in which a subset is drawn. If a method has no discrete counterpart (clipped
Gaussian gates, the invertible Gaussian), z keeps its own law at test time too. When training with a sampler,
a relaxed draw stands in for z in the first term, so that it has a gradient; the sum is then not a bound of
anything, and the curve calls it the training objective. The unbiased estimators draw exactly in training
too. The test bounds average log p(x | z) + log p(z) - log q(z | x) over exact draws; for correlated bits
with the density of the Gaussian noise, which is again a bound.
"""

import functools
import json
import math
import time
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from checkpoints import Checkpoints
from common import (
    COUNT,
    RATE,
    SEED,
    SIZE,
    TAU,
    FloatRange,
    Numbers,
    Path,
    UserError,
    augment,
    binarise,
    digest,
    image_rows,
    load_split,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)
from devices import alone, device_options, guarded, join, take_options
from methods import METHODS, family_of
from networks import VAE
from relaxit_jax.estimators import value_and_grads

SAMPLES = (1, 5, 50, 100)  # for the bounds of a trained model
MANY = 20_000  # with so many training images, few epochs suffice and shifted copies are not needed


class Config(NamedTuple):
    """Everything that the result depends on, except versions and the machine."""

    method: str
    data: str
    epochs: int | None
    seed: int
    latents: int
    variables: int
    classes: int
    subset_size: int
    largest_mean: float
    correlation: str
    tau_start: float
    tau_end: float
    hidden: tuple[int, ...]
    activation: str
    prior: str
    augment: bool | None
    centre: bool
    batch_size: int
    learning_rate: float
    schedule: str
    samples: int | None = None


class Experiment:
    """The compiled functions of a run, and its state before the first epoch."""

    def __init__(self, config, train, test, cluster=None):
        self.config, self.family, self.method = config, family_of(config), METHODS[config.method]
        if config.samples is not None:
            self.method = self.method._replace(draws=config.samples)
        self.cluster = cluster = cluster or alone()
        self.shape = train.shape[1:]
        self.grey, self.test = cluster.everywhere((np.asarray(train), np.asarray(binarise(test))))
        self.steps = len(train) // config.batch_size
        total = max(1, self.steps * config.epochs)
        rate = config.learning_rate
        if config.schedule == "cosine":
            rate = optax.warmup_cosine_decay_schedule(0.0, rate, total // 10, total)
        self.optimizer = optax.adam(rate)
        decay = config.tau_end / config.tau_start
        self.tau = optax.exponential_decay(config.tau_start, total, decay, end_value=config.tau_end)
        self.train_key, self.test_key, self.picture_key = jax.random.split(jax.random.key(config.seed), 3)
        model = VAE(self.family, jnp.mean(binarise(train), 0), config, nnx.Rngs(config.seed))
        self.graph, params, constants = nnx.split(model, nnx.Param, ...)
        self.constants = cluster.everywhere(constants)
        q = model.encode(self.test[:1])[0]
        variate = self.method.variate(jax.random.key(config.seed), q, config.tau_start)
        self.state = cluster.everywhere((params, variate, self.optimizer.init((params, variate))))

    def model(self, params):
        return nnx.merge(self.graph, params, self.constants)

    def loss(self, params_and_q, variate, x, key, tau):
        params, q = params_and_q
        model = self.model(params)
        g = model.shared_parameters()
        f = lambda z: model.log_likelihood(x, self.family.code(z))
        log_likelihood = self.method.expectation(self.family, key, f, q, g, tau, variate)
        return jnp.mean(self.family.kl(key, q, g) - log_likelihood)

    def gradients(self, params, variate, x, key, tau):
        """The training objective, its gradient, and the gradient of that gradient's variance in q."""
        q, pull = jax.vjp(lambda params: self.model(params).encode(x)[0], params)
        value, (direct, slope), variate_gradient = value_and_grads(
            self.loss, (params, q), variate, x, key, tau
        )
        return value, (jax.tree.map(jnp.add, direct, pull(slope)[0]), variate_gradient)

    @functools.partial(jax.jit, static_argnums=0)
    def epoch(self, state, grey, number):
        """One pass over the training images in a random order; the mean of the objective."""
        order_key, step_key = jax.random.split(jax.random.fold_in(self.train_key, number))
        order = jax.random.permutation(order_key, len(grey))
        rows = order[: self.steps * self.config.batch_size].reshape(self.steps, -1)

        def step(state, batch):
            params, variate, optimizer_state = state
            rows, index = batch
            image_key, key = jax.random.split(jax.random.fold_in(step_key, index))
            images = grey[rows]
            x = self.cluster.split(binarise(augment(image_key, images) if self.config.augment else images))
            tau = self.tau(number * self.steps + index)
            value, gradients = self.gradients(params, variate, x, key, tau)
            updates, optimizer_state = self.optimizer.update(gradients, optimizer_state)
            return (*optax.apply_updates((params, variate), updates), optimizer_state), value

        state, values = jax.lax.scan(step, state, (rows, jnp.arange(self.steps)))
        return state, jnp.mean(values)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def test_bounds(self, params, images, samples):
        """Mean negative bounds of the test images, in nats, for each of these numbers of samples.

        With one sample it is the negative ELBO, with more it is importance-weighted.
        """
        sizes = [k for k in SAMPLES if samples % k == 0]
        model = self.model(params)
        keys = jax.random.split(self.test_key, len(images))

        def one(image_and_key):
            x, key = image_and_key
            q, g = model.encode(x)
            z, ratio = jax.vmap(lambda key: self.family.draw(key, q, g))(jax.random.split(key, samples))
            log_weights = model.log_likelihood(x, self.family.code(z)) + ratio
            each = lambda k: jax.nn.logsumexp(log_weights.reshape(-1, k), 1) - math.log(k)
            return {k: -jnp.mean(each(k)) for k in sizes}

        return jax.tree.map(jnp.mean, jax.lax.map(one, (images, keys), batch_size=20))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def pictures(self, params, n=32):
        """Test images, their reconstructions from one exact draw, and images from the prior."""
        model = self.model(params)
        x = self.test[:n]
        q, g = model.encode(x)
        key, prior_key = jax.random.split(self.picture_key)
        z, _ = self.family.draw(key, q, g)
        prior = self.family.draw_prior(prior_key, g, 2 * n)
        decode = lambda z: jax.nn.sigmoid(model.decoder(self.family.code(z)))
        return [y.reshape(-1, *self.shape) for y in (x, decode(z), decode(prior))]


def train(experiment, checkpoints, resume):
    """Run all remaining epochs; return the last state and the history of all epochs."""
    cluster, state, first, history = experiment.cluster, experiment.state, 0, []
    nothing = lambda *_: None  # only the leading process has checkpoints
    save, restore = (checkpoints.save, checkpoints.restore) if cluster.leads else (nothing, nothing)
    if resume:
        first, state, history = cluster.together(restore, state) or (first, state, history)
        state, text = cluster.share(state, json.dumps([first, history]))
        first, history = json.loads(text)
        first += 1
    epochs, name = experiment.config.epochs, experiment.config.method
    with tqdm(total=epochs, initial=first, unit="epoch", desc=name, disable=not cluster.leads) as bar:
        for number in range(first, epochs):
            start = time.perf_counter()
            state, objective = experiment.epoch(state, experiment.grey, number)
            objective = float(objective)
            seconds = time.perf_counter() - start
            bound = float(experiment.test_bounds(state[0], experiment.test, 1)[1])
            if not math.isfinite(objective + bound):
                raise UserError(
                    f"the bound became {objective} in epoch {number + 1}; "
                    "lower --learning-rate, or raise --tau"
                )
            history.append({"train": objective, "test": bound, "seconds": seconds})
            cluster.together(save, number, state, history)
            bar.update()
            bar.set_postfix_str(f"train {objective:.1f}, test -ELBO {bound:.1f} nats")
    return state, history


def results(experiment, state):
    """The final bounds and the pictures, from all processes, since they compute together."""
    bounds = experiment.test_bounds(state[0], experiment.test, max(SAMPLES))
    bounds = {k: float(x) for k, x in bounds.items()}
    return bounds, [np.asarray(x) for x in experiment.pictures(state[0])]


def report(experiment, history, bounds, pictures, out):
    """Write pictures, metrics and a line."""
    elbo, weighted = bounds[1], bounds[max(SAMPLES)]
    originals, reconstructions, samples = pictures
    titles = ["test images", "reconstructed from one exact draw of their latents"] * 2
    lines = [originals[:16], reconstructions[:16], originals[16:], reconstructions[16:]]
    image_rows(out / "reconstructions.png", lines, titles)
    image_rows(out / "samples.png", [samples], ["decoded from exact draws of the prior"])
    figure, (axis, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(2, 1))
    numbers = np.arange(1, len(history) + 1)
    axis.plot(numbers, [row["train"] for row in history], label="training objective")
    axis.plot(numbers, [row["test"] for row in history], label="test negative ELBO, exact draws")
    right.plot(list(bounds), list(bounds.values()), "o-", color="C1")
    right.set(xscale="log", xlabel="samples of the bound", title="test negative bound at the end")
    right.set_xticks(list(bounds), list(map(str, bounds)), minor=False)
    right.minorticks_off()
    axis.set(xlabel="epoch", ylabel="nats per image", title=f"{experiment.config.method}: {elbo:.1f} nats")
    axis.legend(loc="upper right")  # searching for the best place takes long and then warns
    save_figure(figure, out / "curve.png")
    seconds = [row["seconds"] for row in history]
    metrics = {
        "test_negative_elbo": elbo,
        "test_negative_bound_100_samples": weighted,
        "test_negative_bounds": bounds,
        "history": [{name: row[name] for name in ("train", "test")} for row in history],
        "timing": {
            "seconds_per_epoch": float(np.median(seconds)) if seconds else None,
            "first_epoch_with_compilation": seconds[0] if seconds else None,
        },
        "settings": experiment.config._asdict(),
        "images": {"train": len(experiment.grey), "test": len(experiment.test), "shape": experiment.shape},
        "versions": versions(),
        "cluster": experiment.cluster.describe(),
    }
    write_json(out / "metrics.json", metrics)
    click.echo(
        f"test negative ELBO {elbo:.2f} nats, with 100 importance-weighted samples {weighted:.2f}\n"
        f"in {out}: metrics.json, reconstructions.png, samples.png, curve.png, checkpoints/"
    )


@click.command(
    context_settings={"show_default": True, "max_content_width": 110},
    epilog="\b\nMethods:\n" + "\n".join(f"  {name:30}{row.about}" for name, row in METHODS.items()),
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="relaxed_bernoulli",
    metavar="NAME",
    help="Method that draws latents in training; see the list below.",
)
@click.option(
    "--data",
    type=Path(),
    default="mnist5k",
    metavar="NAME|FILE.npz|FOLDER",
    help="Images: mnist5k, 5,000 of MNIST, no network needed; digits, 1,797 of 8x8; mnist, all 70,000, "
    "downloaded once; an .npz file of images in [0, 1], (n, height, width); or a folder with the four IDX "
    "files of MNIST or Fashion-MNIST, gzipped or not.",
)
@click.option(
    "--epochs",
    type=click.IntRange(0, 100_000),
    show_default=False,
    help=f"Number of passes over the training images.  [default: 50; 10 from {MANY:,} images on]",
)
@click.option("--seed", type=SEED, default=0, help="Seed of the initial weights and of all draws.")
@click.option("--latents", type=SIZE, default=48, help="Number of bits, gates, elements or counts.")
@click.option("--variables", type=SIZE, default=20, help="Number of categorical latents.")
@click.option(
    "--classes",
    type=click.IntRange(2, 4096),
    default=10,
    help="Number of classes of each categorical latent.",
)
@click.option(
    "--subset-size",
    type=SIZE,
    show_default=False,
    help="Number of elements in each subset.  [default: half of --latents]",
)
@click.option("--largest-mean", type=FloatRange(0.1, 100), default=8.0, help="Largest mean of each count.")
@click.option(
    "--correlation",
    type=click.Choice(["identity", "learned"]),
    default="identity",
    help="Correlation of correlated_bernoulli: none, or a Cholesky factor that is learned.",
)
@click.option(
    "--samples",
    type=click.IntRange(2, 10_000),
    show_default=False,
    help="Number of draws in one estimate of vimco, arms or rloo.  [default: 5, 4 and 2]",
)
@click.option(
    "--tau",
    type=TAU,
    show_default=False,
    help="Temperature at the start.  [default: the method's own, 1]",
)
@click.option(
    "--tau-end",
    type=TAU,
    show_default=False,
    help="Temperature at the end. Step t of T has the temperature tau (tau-end / tau)^(t / T).  "
    "[default: --tau if given, else the method's own]",
)
@click.option(
    "--hidden",
    type=Numbers(SIZE, "512,512"),
    default="512,512",
    metavar="SIZES",
    help="Sizes of the hidden layers of the encoder; the decoder mirrors them.",
)
@click.option(
    "--activation",
    type=click.Choice(["gelu", "relu", "silu", "tanh"]),
    default="gelu",
    help="Activation between layers.",
)
@click.option(
    "--prior",
    type=click.Choice(["learned", "fixed"]),
    default="learned",
    help="Whether the parameters of the prior are trained.",
)
@click.option(
    "--augment/--no-augment",
    default=None,
    show_default=False,
    help="Apply small random affine maps to the training images, against overfitting.  [default: augment, "
    f"but not from {MANY:,} images on]",
)
@click.option(
    "--centre/--no-centre", default=True, help="Subtract the mean training image before the encoder."
)
@click.option("--batch-size", type=COUNT, default=100, help="Number of images in a step.")
@click.option(
    "--learning-rate", type=RATE, default=3e-3, help="Learning rate of Adam, at the peak of its schedule."
)
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant"]),
    default="cosine",
    help="Schedule of the learning rate; cosine warms up for a tenth of the steps.",
)
@device_options
@out_option
@click.option("--resume", is_flag=True, help="Continue the run in --out after its last good checkpoint.")
def main(out, resume, tau, tau_end, subset_size, **options):
    """Train a variational autoencoder with discrete latents on handwritten digits.

    Writes metrics.json, pictures (reconstructions, samples from the prior, the training curve) and a
    checkpoint after each epoch.
    """  # fmt: skip
    name, cluster_options = options["method"], take_options(options)
    start, end = METHODS[name].tau
    config = Config(
        **options,
        subset_size=subset_size or (options["latents"] + 1) // 2,
        tau_start=tau or start,
        tau_end=tau_end or tau or end,
    )
    if config.samples is not None and getattr(METHODS[name], "draws", None) is None:
        several = ", ".join(other for other, row in METHODS.items() if getattr(row, "draws", None))
        raise UserError(f"--samples {config.samples} is for {several}, not for {name}; leave it out")
    if config.subset_size > config.latents:
        raise UserError(f"--subset-size {config.subset_size} is above --latents {config.latents}; lower it")
    if resume and out is None:
        raise UserError("--resume needs the run's folder; give it with --out")
    cluster = join(**cluster_options)
    with guarded(cluster):
        training, test, images = cluster.together(prepare, config, cluster)
        config = fitted(config, len(training))
        settings = config._asdict() | {"data": images}
        cluster.agree(settings | {"resume": resume})
        out, checkpoints = cluster.together(open_run, out, name, settings, resume, cluster)
    with guarded(cluster, out):
        experiment = Experiment(config, training, test, cluster)
        state, history = train(experiment, checkpoints, resume)
        found = results(experiment, state)
    if cluster.leads:
        report(experiment, history, *found, out)


def prepare(config, cluster):
    """The training and test images, and their digest, which each process reads and checks on its own."""
    if config.batch_size % cluster.mesh.size:
        raise UserError(
            f"--batch-size {config.batch_size} is no multiple of the {cluster.mesh.size} devices; change one"
        )
    training, test = load_split(config.data)
    if config.batch_size > len(training):
        raise UserError(
            f"--batch-size {config.batch_size} is above the {len(training)} training images; lower it"
        )
    return training, test, digest(np.concatenate([training, test]))


def fitted(config, images):
    """With defaults that fit so many training images."""
    epochs = config.epochs if config.epochs is not None else 10 if images >= MANY else 50
    augment = config.augment if config.augment is not None else images < MANY
    return config._replace(epochs=epochs, augment=augment)


def open_run(out, name, settings, resume, cluster):
    """The folder of the run and its checkpoints, for the leading process."""
    if not cluster.leads:
        return "its folder", None
    if resume and not (out / "checkpoints").exists():
        raise UserError(f"there is no run to resume in {out}; check --out, or leave out --resume")
    out = output_folder(out, f"vae-{name}")
    if not resume and (out / "checkpoints").exists():
        raise UserError(f"{out} holds a run already; continue it with --resume, or choose another --out")
    return out, Checkpoints(out / "checkpoints", settings)


if __name__ == "__main__":
    run(main)
