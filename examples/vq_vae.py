"""Images as codes: an autoencoder whose latents are quantized, by eight methods.

A convolutional encoder turns each image into a grid of vectors, a quantizer replaces each vector by one of a
few codes, and a decoder draws the image from the codes. An image of 28 x 28 pixels becomes 7 x 7 codes, which
take 392 bits with 256 codes. A small autoregressive model then learns which codes follow each other. It tells
how many bits an image really takes, and generates new images.

    vq            nearest code of a trained codebook, straight-through gradient, no restarts
    vq_ema        the codebook follows moving averages, unused codes are restarted
    vq_rotation   the same on a sphere, with the rotation gradient
    fsq           four levels for each of a few numbers
    lfq           the sign of each of a few numbers
    residual      two small codebooks, the second for what the first leaves
    gumbel        a logit for each code, and a Gumbel-softmax draw of the codes
    reinmax       the same with exact draws and the gradient of ReinMax

    python examples/vq_vae.py
    python examples/vq_vae.py --method vq_ema --method fsq --codes 1024 --data DIR
"""

import itertools
import math

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
    FloatRange,
    check_losses,
    cosine_rate_option,
    image_rows,
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
from relaxit_jax import quantizers as qz

PATCH = 4  # pixels along a side that become one code
CHUNK = 50  # steps between evaluations on the test images
SHOWN = 16  # images per line in the pictures
COMMITMENT, ENTROPY, BALANCE = 0.1, 0.002, 0.2  # weights next to the error, a share of the variance
DECAY = 0.97  # decay of the moving averages
LEAST_COUNT = 0.5  # vectors per step; codes with fewer are restarted
SHARPNESS = 8  # factor of the logits: draws vary less from the start


# --- the network -------------------------------------------------------------------------------


def to_patches(images):
    """Images as grids of patches, shape (n, rows, columns, PATCH^2), padded with zeros at the edges."""
    n, height, width = images.shape
    images = np.pad(images, ((0, 0), (0, -height % PATCH), (0, -width % PATCH)))
    grid = images.reshape(n, -1, PATCH, images.shape[2] // PATCH, PATCH).swapaxes(2, 3)
    return jnp.asarray(grid.reshape(*grid.shape[:3], PATCH**2))


def to_images(patches, shape):
    n, rows, columns, _ = patches.shape
    images = np.asarray(patches).reshape(n, rows, columns, PATCH, PATCH).swapaxes(2, 3)
    return images.reshape(n, rows * PATCH, columns * PATCH)[:, : shape[0], : shape[1]]


class Autoencoder(nnx.Module):
    def __init__(self, outputs, inputs, units, seed):
        rngs = nnx.Rngs(seed)
        conv = lambda: nnx.Conv(units, units, (3, 3), rngs=rngs)
        self.encoder = nnx.Sequential(
            nnx.Linear(PATCH**2, units, rngs=rngs),
            nnx.silu,
            conv(),
            nnx.silu,
            nnx.Linear(units, outputs, rngs=rngs),
        )
        self.decoder = nnx.Sequential(
            nnx.Linear(inputs, units, rngs=rngs), conv(), nnx.silu, conv(), nnx.silu,
            nnx.Linear(units, PATCH**2, rngs=rngs),
        )  # fmt: skip


# --- quantizers --------------------------------------------------------------------------------


class Quantizer:
    """The part that differs between methods: `learned` is trained by gradients, `state` by averages.

    `dim` numbers come from the encoder, `size` numbers go to the decoder.
    """

    def __init__(self, codes, dim, size=None):
        self.codes, self.dim, self.size = codes, dim, size or dim

    def prepare(self, x):
        """The vectors to quantize, from the numbers of the encoder."""
        return x

    def init(self, key, x):
        """(learned, state), from the vectors of some images."""
        return {}, ()

    def follow(self, key, learned, state, x, index):
        """(learned, state) after a step."""
        return learned, state

    def at_rest(self, key, x, learned, state):
        """Value and index as they are after training."""
        return self(key, x, learned, state, 1.0)[:2]


class Vector(Quantizer):
    """The nearest code of a codebook trained by gradient descent."""

    def init(self, key, x):
        book = jax.random.uniform(key, (self.codes, self.dim), minval=-1, maxval=1) / self.codes
        return {"codebook": book}, ()

    def __call__(self, key, x, learned, state, done):
        found = qz.vector_quantize(x, learned["codebook"])
        loss = jnp.mean(found.codebook_loss) + COMMITMENT * jnp.mean(found.commitment_loss)
        return found.value, found.index, loss

    def codes_of(self, index, learned, state):
        return rj.embed(index, learned["codebook"])


class Averages(Quantizer):
    """The nearest code of a codebook that follows moving averages."""

    def __init__(self, codes, dim, gradient="straight_through"):
        super().__init__(codes, dim)
        self.gradient = gradient

    def init(self, key, x):
        book = jax.random.choice(key, x.reshape(-1, self.dim), (self.codes,), replace=False)
        return {}, qz.codebook_state(book)

    def __call__(self, key, x, learned, state, done):
        found = qz.vector_quantize(x, state.codebook, gradient=self.gradient)
        return found.value, found.index, COMMITMENT * jnp.mean(found.commitment_loss)

    def follow(self, key, learned, state, x, index):
        return learned, qz.restart_unused(key, qz.update_codebook(state, x, index, DECAY), x, LEAST_COUNT)

    def codes_of(self, index, learned, state):
        return rj.embed(index, state.codebook)


class Rotation(Averages):
    """The same with the rotation gradient, for vectors of one length."""

    def __init__(self, codes, dim):
        super().__init__(codes, min(dim, 6), "rotation")

    def prepare(self, x):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


class Residual(Averages):
    """Two codebooks, each with the square root of the number of codes; the index counts pairs."""

    def init(self, key, x):
        self.each = math.isqrt(self.codes)
        x = x.reshape(-1, self.dim)
        first_key, second_key = jax.random.split(key)
        first = jax.random.choice(first_key, x, (self.each,), replace=False)
        rest = x - qz.vector_quantize(x, first).value
        second = jax.random.choice(second_key, rest, (self.each,), replace=False)
        return {}, tuple(map(qz.codebook_state, (first, second)))

    def __call__(self, key, x, learned, state, done):
        found = qz.residual_quantize(x, jnp.stack([stage.codebook for stage in state]))
        index = found.index[..., 0] + self.each * found.index[..., 1]
        return found.value, index, COMMITMENT * jnp.mean(found.commitment_loss)

    def follow(self, key, learned, state, x, index):
        stages = []
        for stage, digit in zip(state, (index % self.each, index // self.each), strict=True):
            stages.append(super().follow(key, learned, stage, x, digit)[1])
            x = x - rj.embed(digit, stage.codebook)
        return learned, tuple(stages)

    def codes_of(self, index, learned, state):
        first, second = (stage.codebook for stage in state)
        return rj.embed(index % self.each, first) + rj.embed(index // self.each, second)


class FiniteScalar(Quantizer):
    """Four levels for each number."""

    def __init__(self, codes, dim):
        self.levels = (4,) * round(math.log(codes, 4))
        super().__init__(codes, len(self.levels))

    def __call__(self, key, x, learned, state, done):
        return *qz.finite_scalar_quantize(x, self.levels), 0.0

    def codes_of(self, index, learned, state):
        return qz.finite_scalar_codes(index, self.levels)


class LookupFree(Quantizer):
    """The sign of each number, with an entropy loss for certain samples and varied ones."""

    def __init__(self, codes, dim):
        super().__init__(codes, round(math.log2(codes)))

    def prepare(self, x):
        return jnp.tanh(x)

    def __call__(self, key, x, learned, state, done):
        value, index = qz.lookup_free_quantize(x)
        commitment = jnp.mean((x - jax.lax.stop_gradient(value)) ** 2)
        entropy = qz.lookup_free_entropy(x.reshape(-1, self.dim), 0.5)
        return value, index, COMMITMENT * commitment + ENTROPY * entropy

    def codes_of(self, index, learned, state):
        return 2.0 * (index[..., None] >> jnp.arange(self.dim) & 1) - 1


class Drawn(Quantizer):
    """The encoder gives a logit to each code, and a draw stands for the codes: a discrete VAE."""

    def __init__(self, codes, dim, draw):
        super().__init__(codes, codes, dim)
        self.draw = draw

    def prepare(self, x):
        return SHARPNESS * x

    def init(self, key, x):
        return {"codebook": jax.random.normal(key, (self.codes, self.size))}, ()

    def __call__(self, key, x, learned, state, done):
        tau = 1 - 0.7 * done
        value = self.draw(key, x, tau) @ learned["codebook"]
        use = jnp.log(jnp.mean(jax.nn.softmax(x), (0, 1, 2)))
        unused = math.log(self.codes) - rj.categorical_entropy(use)  # 0 if all codes are used equally
        return value, jnp.argmax(x, -1), BALANCE * unused

    def at_rest(self, key, x, learned, state):
        index = jnp.argmax(x, -1)
        return self.codes_of(index, learned, state), index

    def codes_of(self, index, learned, state):
        return rj.embed(index, learned["codebook"])


METHODS = {
    "vq": Vector,
    "vq_ema": Averages,
    "vq_rotation": Rotation,
    "fsq": FiniteScalar,
    "lfq": LookupFree,
    "residual": Residual,
    "gumbel": lambda codes, dim: Drawn(codes, dim, rj.gumbel_softmax),
    "reinmax": lambda codes, dim: Drawn(codes, dim, lambda key, logits, tau: rj.reinmax(key, logits)),
}


# --- training ----------------------------------------------------------------------------------


def train(name, data, test, config):
    """Train the autoencoder; return it with its quantizer's parameters and the history."""
    quantizer = METHODS[name](config["codes"], config["dim"])
    graph, weights = nnx.split(Autoencoder(quantizer.dim, quantizer.size, config["units"], config["seed"]))
    init_key, key = jax.random.split(jax.random.key(config["seed"]))
    encoded = lambda model, patches: quantizer.prepare(model.encoder(patches))
    start = encoded(nnx.merge(graph, weights), data[: max(64, config["codes"])])
    learned, state = quantizer.init(init_key, start)
    chunks = -(-config["steps"] // CHUNK)
    adam = optax.adam(optax.cosine_decay_schedule(config["learning_rate"], chunks * CHUNK))
    spread = jnp.var(data)

    def loss(trained, state, key, batch, done):
        weights, learned = trained
        model = nnx.merge(graph, weights)
        x = encoded(model, batch)
        value, index, extra = quantizer(key, x, learned, state, done)
        error = jnp.mean((model.decoder(value) - batch) ** 2) / spread
        return error + extra, (error, x, index)

    @jax.jit  # one step at a time: on CPUs XLA's convolutions are 18 times slower inside a scan
    def step(carry, key, done):
        trained, state, moments = carry
        batch_key, draw_key, restart_key = jax.random.split(key, 3)
        batch = data[jax.random.randint(batch_key, (config["batch_size"],), 0, len(data))]
        gradient, (error, x, index) = jax.grad(loss, has_aux=True)(trained, state, draw_key, batch, done)
        updates, moments = adam.update(gradient, moments)
        weights, learned = optax.apply_updates(trained, updates)
        learned, state = quantizer.follow(restart_key, learned, state, x, index)
        return ((weights, learned), state, moments), error

    @jax.jit
    def look(trained, state):
        """For the test images: error, index of each code, and the decoder's output."""
        weights, learned = trained
        model = nnx.merge(graph, weights)
        value, index = quantizer.at_rest(key, encoded(model, test), learned, state)
        made = model.decoder(value)
        return jnp.mean((made - test) ** 2) / spread, index, made

    trained = weights, learned
    carry, history, losses = (trained, state, adam.init(trained)), [], []
    for number, step_key in enumerate(tqdm(jax.random.split(key, chunks * CHUNK), name), 1):
        carry, error = step(carry, step_key, number / (chunks * CHUNK))
        losses.append(error)
        if number % CHUNK == 0:
            error, index, made = look(*carry[:2])
            used = len(np.unique(index))
            history.append((float(error), used, float(qz.perplexity(index, config["codes"]))))
    check_losses(losses)
    (weights, learned), state, _ = carry
    model = nnx.merge(graph, weights)
    encode = lambda patches: quantizer.at_rest(key, encoded(model, patches), learned, state)[1]
    decode = lambda index: model.decoder(quantizer.codes_of(index, learned, state))
    return jax.jit(encode), jax.jit(decode), np.array(history), np.asarray(index), made


class Prior(nnx.Module):
    """Predict the next code from the codes before it, row by row, and from its place."""

    def __init__(self, codes, places, units, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(codes + 1, units, rngs=rngs)  # the last one stands before the first
        self.place = nnx.Embed(
            max(2, places), units, rngs=rngs
        )  # Flax 0.12 does not accept a table with one row
        self.cell = nnx.GRUCell(2 * units, 2 * units, rngs=rngs)
        self.read = nnx.Linear(2 * units, codes, rngs=rngs)
        self.codes, self.units = codes, units

    def start(self, batch):
        return jnp.zeros((batch, 2 * self.units)), jnp.full(batch, self.codes)

    def step(self, state, place, last, above):
        inputs = jnp.concatenate([self.embed(last) + self.place(place), self.embed(above)], -1)
        state, _ = self.cell(state, inputs)
        return state, self.read(state)


def learn_prior(index, test_index, config):
    """The bits per image that an autoregressive model of the codes needs, and new codes drawn from it."""
    rows, columns = index.shape[1:]
    places, codes = rows * columns, config["codes"]
    graph, weights = nnx.split(Prior(codes, places, config["units"], config["seed"]))
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, max(1, config["prior_steps"])))

    def neighbors(tokens):
        """The code before each, and the one above it."""
        pad = lambda n: jnp.pad(tokens, ((0, 0), (n, 0)), constant_values=codes)[:, :places]
        return pad(1), pad(columns)

    def nats(weights, tokens):
        model = nnx.merge(graph, weights)
        last, above = neighbors(tokens)
        step = lambda state, now: model.step(state, *now)
        _, logits = jax.lax.scan(step, model.start(len(tokens))[0], (jnp.arange(places), last.T, above.T))
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, tokens.T), 0)

    tokens = jnp.asarray(index.reshape(len(index), -1))

    def step(carry, key):
        weights, moments = carry
        batch = tokens[jax.random.randint(key, (config["batch_size"],), 0, len(tokens))]
        gradient = jax.grad(lambda weights: jnp.mean(nats(weights, batch)) / places)(weights)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), None

    def draw(weights, key):
        model = nnx.merge(graph, weights)

        def step(carry, now):
            state, tokens = carry
            place, key = now
            last, above = (
                jax.lax.dynamic_index_in_dim(x, place, 1, keepdims=False) for x in neighbors(tokens)
            )
            state, logits = model.step(state, place, last, above)
            return (state, tokens.at[:, place].set(jax.random.categorical(key, logits))), None

        start = model.start(SHOWN)[0], jnp.full((SHOWN, places), codes)
        keys = jax.random.split(key, places)
        return jax.lax.scan(step, start, (jnp.arange(places), keys))[0][1].reshape(SHOWN, rows, columns)

    carry, key = (weights, adam.init(weights)), jax.random.key(config["seed"])
    if config["prior_steps"]:
        carry = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])(
            carry, jax.random.split(key, config["prior_steps"])
        )
    test_tokens = jnp.asarray(test_index.reshape(len(test_index), -1))
    bits = float(jnp.mean(jax.jit(nats)(carry[0], test_tokens))) / math.log(2)
    return bits, jax.jit(draw)(carry[0], key)


# --- pictures and the command ------------------------------------------------------------------


def draw_picture(results, config, path):
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    steps = CHUNK * np.arange(1, len(next(iter(results.values()))["history"]) + 1)
    for color, (name, row) in zip(itertools.cycle(plt.cm.tab10.colors), results.items()):
        axes[0].plot(row["bits"], row["error"], "o", color=color, label=name)
        axes[0].annotate(f" {name}", (row["bits"], row["error"]), fontsize=8)
        axes[1].plot(steps, row["history"][:, 1], color=color, label=name)
        axes[2].plot(steps, row["history"][:, 2], color=color)
        axes[3].plot(np.arange(1, config["codes"] + 1), np.sort(row["share"])[::-1], color=color)
    axes[0].set(xlabel="bits per image under the learned prior", ylabel="error, share of the variance")
    axes[0].set_title("reconstruction of test images")
    axes[1].set(title="codes in use", xlabel="training step", ylabel="codes", ylim=0)
    axes[1].legend(fontsize=8)
    axes[2].set(title="perplexity of the codes", xlabel="training step", ylabel="codes", ylim=0)
    axes[3].set(title="how often each code is used", xlabel="code, by its rank", ylabel="share", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@methods_option(METHODS, help="Quantizer to train; may be given more than once.")
@images_option
@click.option(
    "--codes",
    type=click.Choice(["16", "64", "256", "1024", "4096"]),
    default="256",
    help="Number of codes, a power of 4.",
)
@click.option(
    "--dim",
    type=SIZE,
    default=16,
    help="Length of a vector; vq_rotation takes at most 6, and fsq and lfq choose their own.",
)
@click.option("--units", type=SIZE, default=64, help="Number of channels in each layer.")
@click.option("--steps", type=STEPS, default=1000, help="Number of Adam steps, in rounds of 50.")
@click.option(
    "--prior-steps",
    type=click.IntRange(0, 1_000_000),
    default=600,
    help="Number of Adam steps for the prior.",
)
@click.option("--batch-size", type=SIZE, default=64, help="Number of images in a step.")
@cosine_rate_option(3e-3, FloatRange(0, 1, min_open=True))
@click.option("--seed", type=SEED, default=0, help="Seed of the weights and of all draws.")
@out_option
def main(methods, data, out, **config):
    """Train an autoencoder with quantized latents by each method, and a prior over its codes.

    Writes metrics.json, vq_vae.png, reconstructions.png and samples.png.
    """
    config["codes"] = int(config["codes"])
    images, test_images = load_split(data)
    out = output_folder(out, "vq_vae")
    patches, test = to_patches(images), to_patches(test_images[:1000])
    places = test.shape[1] * test.shape[2]
    click.echo(f"{places} codes of {config['codes']}: {places * math.log2(config['codes']):.0f} bits at most")
    results, pictures, samples = {}, {}, {}
    for name in methods:
        encode, decode, history, index, made = train(name, patches, test, config)
        every = np.concatenate([encode(part) for part in np.array_split(patches, -(-len(patches) // 1000))])
        bits, drawn = learn_prior(every, index, config)
        share = np.bincount(index.ravel(), minlength=config["codes"]) / index.size
        error, used, perplexity = history[-1]
        results[name] = {"error": error, "bits": bits, "history": history, "share": share}
        pictures[name] = to_images(made[:SHOWN], images.shape[1:])
        samples[name] = to_images(decode(drawn), images.shape[1:])
        click.echo(
            f"{name:12} error {error:.4f} of the variance, {bits:.0f} bits per image, "
            f"{used:.0f} codes used, perplexity {perplexity:.0f}"
        )
    draw_picture(results, config, out / "vq_vae.png")
    originals = test_images[:SHOWN]
    image_rows(
        out / "reconstructions.png", [originals, *pictures.values()], ["test images", *pictures], SHOWN
    )
    image_rows(out / "samples.png", list(samples.values()), list(samples), SHOWN)
    rows = {
        name: {"error": row["error"], "bits": row["bits"], "codes_used": int(row["history"][-1, 1]),
               "perplexity": row["history"][-1, 2], "history": row["history"].tolist()}
        for name, row in results.items()
    }  # fmt: skip
    settings = config | {"methods": methods, "data": data}
    write_json(out / "metrics.json", {"results": rows, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: vq_vae.png, reconstructions.png, samples.png, metrics.json")


if __name__ == "__main__":
    run(main)
