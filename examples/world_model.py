"""A world model with discrete latents: moving digits, seen frame by frame and then imagined.

A digit moves over a canvas and bounces off its edges. One frame shows where it is, but not where it goes, so
the next frame can only be predicted from the frames before it. A recurrent state-space model learns this, as
in D. Hafner et al. (2021), Mastering Atari with Discrete World Models, arXiv:2010.02193. It has a state h
and, in each step, a code z of categorical variables:

    state      h_t = GRU(h_(t-1), z_(t-1))
    prior      p(z_t | h_t)
    posterior  q(z_t | h_t, x_t)
    frame      p(x_t | h_t, z_t)

In training the codes come from the posterior, and the gradient goes through them: straight-through, with
ReinMax, or through relaxed draws. After some frames the model is on its own. The codes then come from the
prior, and the model imagines how the digit continues.

    python examples/world_model.py
    python examples/world_model.py --method reinmax --variables 32 --classes 32
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
    check_losses,
    load_labelled,
    methods_option,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)

CANVAS, DIGIT = 24, 14  # pixels along a side
CHUNK = 100  # steps of training in one compiled call
SHOWN = 3  # sequences in the picture
METHODS = {
    "straight_through": lambda key, logits, tau: rj.straight_through_categorical(key, logits),
    "reinmax": lambda key, logits, tau: rj.reinmax(key, logits),
    "gumbel_softmax": rj.gumbel_softmax,
}
COLORS = dict(zip(METHODS, ("C0", "C1", "C2"), strict=True))


# --- the world ---------------------------------------------------------------------------------


def small_digits(images):
    """Shrink each image to half its size."""
    return jnp.asarray(images.reshape(-1, DIGIT, 2, DIGIT, 2).mean((2, 4)))


def moving_digits(key, digits, batch, steps):
    """Frames of digits that bounce, shape (steps, batch, pixels)."""
    which_key, place_key, speed_key = jax.random.split(key, 3)
    digits = digits[jax.random.randint(which_key, (batch,), 0, len(digits))]
    room = CANVAS - DIGIT
    place = jax.random.uniform(place_key, (batch, 2), maxval=2 * room)
    speed = jax.random.uniform(speed_key, (batch, 2), minval=-2.5, maxval=2.5)
    unfolded = (place + speed * jnp.arange(steps)[:, None, None]) % (2 * room)
    corners = jnp.round(jnp.minimum(unfolded, 2 * room - unfolded)).astype(int)  # back from each edge

    def frame(digit, corner):
        return jax.lax.dynamic_update_slice(jnp.zeros((CANVAS, CANVAS)), digit, tuple(corner))

    frames = jax.vmap(jax.vmap(frame), (None, 0))(digits, corners)
    return frames.reshape(steps, batch, -1)


# --- the model ---------------------------------------------------------------------------------


class WorldModel(nnx.Module):
    def __init__(self, variables, classes, units, seed):
        rngs = nnx.Rngs(seed)
        code = variables * classes
        mlp = lambda inputs, outputs: nnx.Sequential(
            nnx.Linear(inputs, units, rngs=rngs), nnx.silu, nnx.Linear(units, outputs, rngs=rngs)
        )
        self.shape, self.units = (variables, classes), units
        self.encoder = mlp(CANVAS**2, units)
        self.mix = nnx.Linear(code, units, rngs=rngs)
        self.cell = nnx.GRUCell(units, units, rngs=rngs)
        self.prior_net, self.posterior_net = mlp(units, code), mlp(2 * units, code)
        self.decoder = mlp(units + code, CANVAS**2)

    def start(self, batch):
        return jnp.zeros((batch, self.units)), jnp.zeros((batch, *self.shape))

    def advance(self, state):
        """The next deterministic state, and the logits of its code."""
        h, z = state
        h, _ = self.cell(h, nnx.silu(self.mix(z.reshape(len(z), -1))))
        return h, self.logits(self.prior_net(h))

    def posterior(self, h, x):
        return self.logits(self.posterior_net(jnp.concatenate([h, self.encoder(x)], -1)))

    def logits(self, outputs):
        """Mix one hundredth of a uniform law into the logits, so that no class becomes impossible."""
        return rj.mix_uniform(outputs.reshape(-1, *self.shape), 0.01)

    def decode(self, h, z):
        return self.decoder(jnp.concatenate([h, z.reshape(len(z), -1)], -1))


def watch(model, key, frames, draw):
    """Run along the frames, with codes from the posterior: logits of prior, posterior, frames; states."""

    def step(state, now):
        key, x = now
        h, prior = model.advance(state)
        posterior = model.posterior(h, x)
        z = draw(key, posterior)
        return (h, z), (prior, posterior, model.decode(h, z), (h, z))

    keys = jax.random.split(key, len(frames))
    return jax.lax.scan(step, model.start(frames.shape[1]), (keys, frames))[1]


def imagine(model, key, state, steps):
    """Frames that follow a state, with exact codes from the prior."""

    def step(state, key):
        h, prior = model.advance(state)
        z = rj.straight_through_categorical(key, prior)
        return (h, z), jax.nn.sigmoid(model.decode(h, z))

    return jax.lax.scan(step, state, jax.random.split(key, steps))[1]


def two_sided_kl(posterior, prior, free):
    """KL of the codes with a separate gradient for each side, none below `free` nats; and the KL itself.

    The prior is pulled toward the posterior five times as strongly as the posterior toward the prior.
    """
    still = jax.lax.stop_gradient
    kl = lambda q, p: jnp.sum(rj.categorical_kl(q, p), -1)
    forward, backward = kl(still(posterior), prior), kl(posterior, still(prior))
    return 0.5 * jnp.maximum(forward, free) + 0.1 * jnp.maximum(backward, free), forward


def negative_log_likelihood(logits, x):
    """Negative log-likelihood of a frame in nats, with gray values as probabilities of being on."""
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), -1)


def loss(model, key, frames, draw, free):
    """The loss in nats per frame, and its parts."""
    prior, posterior, logits, _ = watch(model, key, frames, draw)
    error = jnp.mean(negative_log_likelihood(logits, frames))
    penalty, kl = two_sided_kl(posterior, prior, free)
    return error + jnp.mean(penalty), {"reconstruction": error, "kl": jnp.mean(kl)}


# --- training and looking ahead ----------------------------------------------------------------


def train(name, digits, config):
    """Train with Adam on new sequences in each step; return the model and the parts of its loss."""
    model = WorldModel(config["variables"], config["classes"], config["units"], config["seed"])
    graph, parameters = nnx.split(model)
    draw = functools.partial(METHODS[name], tau=config["tau"])
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(config["learning_rate"]))

    def step(state, key):
        parameters, moments = state
        data_key, key = jax.random.split(key)
        frames = moving_digits(data_key, digits, config["batch_size"], config["length"])
        of = lambda parameters: loss(nnx.merge(graph, parameters), key, frames, draw, config["free_nats"])
        gradient, parts = jax.grad(of, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(parameters, updates), moments), parts

    chunk = jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, CHUNK)))
    state, history = (parameters, optimizer.init(parameters)), []
    chunks = -(-config["steps"] // CHUNK)
    for key in tqdm(jax.random.split(jax.random.key(config["seed"]), chunks), name):
        state, parts = chunk(state, key)
        history.append({part: np.asarray(x) for part, x in parts.items()})
    history = {part: np.concatenate([row[part] for row in history]) for part in history[0]}
    check_losses(history["reconstruction"] + history["kl"])
    return nnx.merge(graph, state[0]), history


def look_ahead(model, key, frames, context):
    """Frames of the context from the posterior, then imagined ones: probabilities of the pixels."""
    watch_key, key = jax.random.split(key)
    exact = lambda key, logits: rj.straight_through_categorical(key, logits)
    _, _, logits, states = watch(model, watch_key, frames[:context], exact)
    last = jax.tree.map(lambda x: x[-1], states)
    imagined = imagine(model, key, last, len(frames) - context)
    return jnp.concatenate([jax.nn.sigmoid(logits), imagined])


def error_by_frame(predicted, frames):
    """Mean squared error of a pixel, for each frame."""
    return np.asarray(jnp.mean((predicted - frames) ** 2, (1, 2)), float)


def draw_picture(histories, errors, frames, predicted, context, path):
    figure = plt.figure(figsize=(13, 3.6 + 2.1 * (1 + len(predicted))), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.6, 2.1 * (1 + len(predicted))))
    axes = top.subplots(1, 3)
    for name, history in histories.items():
        for axis, part in zip(axes, ("reconstruction", "kl"), strict=False):
            mean = history[part].reshape(-1, CHUNK // 2).mean(1)
            axis.plot(CHUNK // 2 * np.arange(1, len(mean) + 1), mean, color=COLORS[name], label=name)
    for axis, title in zip(axes, ("reconstruction error", "KL of posterior and prior"), strict=False):
        axis.set(title=title, xlabel="training step", ylabel="nats per frame", yscale="log")
    for name, error in errors.items():
        style = {"color": COLORS.get(name, "0.5"), "ls": "-" if name in COLORS else "--"}
        axes[2].plot(np.arange(1, len(error) + 1), error, label=name.replace("_", " "), **style)
    axes[2].axvline(context + 0.5, color="black", lw=0.8, ls=":")
    axes[2].set(
        title="seen up to the dotted line, then imagined", xlabel="frame", ylabel="squared error of a pixel"
    )
    axes[2].legend(fontsize=8)
    rows = {"truth": frames} | predicted
    lines = []
    for sequence in range(SHOWN):
        for images in rows.values():
            pixels = np.asarray(images[:, sequence]).reshape(-1, CANVAS, CANVAS)
            lines.append(np.hstack([np.pad(image, 1, constant_values=0.4) for image in pixels]))
        lines.append(np.full((4, lines[-1].shape[1]), 0.0))
    axis = bottom.subplots()
    axis.imshow(np.vstack(lines[:-1]), cmap="gray_r", vmin=0, vmax=1)
    axis.axvline(context * (CANVAS + 2) - 0.5, color="C3", lw=1.5)
    axis.set_title(
        f"{SHOWN} sequences: {', '.join(rows).replace('_', ' ')}; imagined right of the line", fontsize=10
    )
    axis.set_axis_off()
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@methods_option(METHODS, help="Method that draws codes in training; may be given more than once.")
@click.option("--variables", type=SIZE, default=16, help="Number of categorical variables in a code.")
@click.option(
    "--classes", type=click.IntRange(2, 4096), default=16, help="Number of classes of each variable."
)
@click.option(
    "--units", type=SIZE, default=128, help="Number of units in each layer and in the recurrent state."
)
@click.option("--steps", type=STEPS, default=4000, help="Number of Adam steps, in rounds of 100.")
@click.option("--batch-size", type=SIZE, default=32, help="Number of sequences in a step.")
@click.option(
    "--length", type=click.IntRange(2, 1000), default=16, help="Number of frames in a training sequence."
)
@click.option(
    "--context",
    type=click.IntRange(1, 1000),
    default=6,
    help="Number of frames that are seen before imagining.",
)
@click.option(
    "--horizon", type=click.IntRange(1, 1000), default=14, help="Number of frames that are imagined."
)
@click.option("--tau", type=TAU, default=0.7, help="Temperature of gumbel_softmax; the others have none.")
@click.option(
    "--free-nats",
    type=FloatRange(0, 1000),
    default=1.0,
    help="Largest KL of a frame that costs nothing, in nats.",
)
@click.option(
    "--learning-rate", type=FloatRange(0, 1, min_open=True), default=3e-3, help="Learning rate of Adam."
)
@click.option("--seed", type=SEED, default=0, help="Seed of the weights, the sequences and all draws.")
@out_option
def main(methods, out, context, horizon, **config):
    """Train a world model on moving digits with each method, and let it imagine how they continue.

    Writes metrics.json and world_model.png.
    """
    out = output_folder(out, "world_model")
    (images, _), (test_images, _) = load_labelled()
    digits, test_digits = small_digits(images), small_digits(test_images)
    data_key, key = jax.random.split(jax.random.key(config["seed"] + 1))
    frames = moving_digits(data_key, test_digits, 256, context + horizon)
    still = jnp.concatenate(
        [frames[:context], jnp.broadcast_to(frames[context - 1], (horizon, *frames.shape[1:]))]
    )
    errors = {"last frame repeated": error_by_frame(still, frames)}
    histories, predicted, rows = {}, {}, {}
    for name in methods:
        model, histories[name] = train(name, digits, config)
        predicted[name] = look_ahead(model, key, frames, context)
        errors[name] = error_by_frame(predicted[name], frames)
        last = {part: float(x[-CHUNK:].mean()) for part, x in histories[name].items()}
        rows[name] = last | {"seen": errors[name][:context].mean(), "imagined": errors[name][context:].mean()}
        click.echo(
            f"{name}: reconstruction {last['reconstruction']:.2f} nats, KL {last['kl']:.2f} nats per frame; "
            f"squared error of a pixel {rows[name]['seen']:.4f} seen, {rows[name]['imagined']:.4f} imagined"
        )
    repeated = errors["last frame repeated"][context:].mean()
    click.echo(f"last frame repeated: squared error of a pixel {repeated:.4f}")
    draw_picture(histories, errors, frames, predicted, context, out / "world_model.png")
    content = {
        "results": rows,
        "last_frame_repeated": repeated,
        "error_by_frame": {name: error.tolist() for name, error in errors.items()},
        "settings": config | {"methods": methods, "context": context, "horizon": horizon},
        "versions": versions(),
    }
    write_json(out / "metrics.json", content)
    click.echo(f"in {out}: world_model.png, metrics.json")


if __name__ == "__main__":
    run(main)
