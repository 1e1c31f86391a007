"""Segments of a sequence of digits, found without labels, with a chain and a neural emission.

A sequence has 20 images. The same digit stays for a few of them, each time as a different image, and then one
of its two successors follows. The model is not told this grammar. It is a hidden Markov model, which draws a
class for each image, one after another, and a network draws the pixels from the class:

    p(z, x) = p(z_1) prod_t p(z_(t+1) | z_t) prod_t p(x_t | z_t)

The sum over all 10^20 sequences of classes is `chain_log_partition`, so the likelihood is exact here. This is
the classical answer. The other methods look only at drawn sequences, as you have to if the likelihood of an
image depends on more than its class. They draw from the chain q(z | x) whose emission is the network, and
maximize E_q log p(x | z) - KL(q, p):

    marginal       the exact likelihood
    chain_sample   an exact draw of q, with the gradient of its marginals
    relaxed_chain  a relaxed draw of q
    rloo           exact draws of q, and their score function
    independent    the exact likelihood of a model in which no class depends on the previous one

The likelihood counts little at first: its weight grows from --anneal to 1. Otherwise the classes stand for
shapes before the grammar is known.

    python examples/segment.py
    python examples/segment.py --method marginal --method relaxed_chain --tau 0.2 --data DIR
"""

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from common import (
    COUNT,
    SEED,
    SIZE,
    STEPS,
    TAU,
    FloatRange,
    Path,
    UserError,
    check_losses,
    cosine_rate_option,
    load_labelled,
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
POOL = 4  # pixels of a side that become one
STAY, FIRST = 0.75, 0.7  # of the grammar: the same digit again; the first successor if it changes
COLORS = {"marginal": "C0", "chain_sample": "C2", "relaxed_chain": "C1", "rloo": "C3", "independent": "C7"}


# --- data ------------------------------------------------------------------------------------------


def grammar(classes):
    """P(next class | class): mostly the same, else one of two others."""
    rng, law = np.random.default_rng(0), STAY * np.eye(classes)
    ring = rng.permutation(classes)  # after each its neighbor, or the one behind that
    law[ring, np.roll(ring, -1)] += FIRST * (1 - STAY)
    law[ring, np.roll(ring, -2)] += (1 - FIRST) * (1 - STAY)
    return law


def write_sequences(rng, labels, count, length):
    """Classes by the grammar, and for each a random image of it: both of shape (count, length)."""
    classes = labels.max() + 1
    law, own = grammar(classes), [np.flatnonzero(labels == c) for c in range(classes)]
    z = np.empty((count, length), int)
    z[:, 0] = rng.integers(classes, size=count)
    for t in range(1, length):
        z[:, t] = (law[z[:, t - 1]].cumsum(-1) < rng.random((count, 1))).sum(-1).clip(max=classes - 1)
    index = np.empty_like(z)
    for c in range(classes):
        index[z == c] = rng.choice(own[c], (z == c).sum())
    return z, index


def coarse_bits(images):
    """Squares of 4 x 4 pixels, on or off."""
    high, wide = (-(-side // POOL) for side in images.shape[1:])
    pad = [(0, size * POOL - side) for size, side in zip((high, wide), images.shape[1:], strict=True)]
    squares = np.pad(images, [(0, 0), *pad]).reshape(-1, high, POOL, wide, POOL).mean((2, 4))
    return (squares > 0.4).astype(np.float32).reshape(len(images), -1)


# --- the model -------------------------------------------------------------------------------------


class Model(nnx.Module):
    """A hidden Markov model, with a network from the class to the pixels."""

    def __init__(self, classes, mean, hidden, key):
        rngs = nnx.Rngs(key)
        self.start, self.move = nnx.Param(jnp.zeros(classes)), nnx.Param(jnp.eye(classes))
        self.decoder = nnx.Sequential(
            nnx.Linear(classes, hidden, rngs=rngs), jnp.tanh, nnx.Linear(hidden, mean.size, rngs=rngs)
        )
        self.decoder.layers[-1].bias[...] = jax.scipy.special.logit(jnp.clip(mean, 0.01, 0.99))

    def prior(self, length):
        """The potentials of p(z), normalized."""
        start, move = jax.nn.log_softmax(self.start[...]), jax.nn.log_softmax(self.move[...])
        return jnp.zeros((length, len(start))).at[0].set(start), move

    def emission(self, x):
        """log p(x_t | z_t) of every class."""
        logits = self.decoder(jnp.eye(len(self.start[...])))
        return x @ logits.T - jnp.sum(jax.nn.softplus(logits), -1)


def kl(q, p):
    """KL of two chains: A(p) - A(q) - <E_q z, p - q>, as the gradient of A is the mean."""
    p = jax.tree.map(lambda p, q: jnp.broadcast_to(p, q.shape), p, q)
    way = jax.tree.map(jnp.subtract, p, q)
    of_q, mean = jax.jvp(structured.chain_log_partition, q, way)
    return structured.chain_log_partition(*p) - of_q - mean


def negative_bound(method, model, key, x, weight, tau, samples):
    """-log p(x) or a bound of it, in nats per image; the likelihood is weighted."""
    unary, move = model.prior(x.shape[-2])
    emission = weight * model.emission(x)
    if method == "independent":
        return -jnp.mean(jax.nn.logsumexp(unary[0] + emission, -1))
    q = unary + emission, move
    if method == "marginal":
        return -jnp.mean(structured.chain_log_partition(*q)) / x.shape[-2]
    f = lambda z: jnp.sum(z * emission, (-1, -2))
    if method == "chain_sample":
        seen = f(structured.chain_sample(key, *q))
    elif method == "relaxed_chain":
        seen = f(structured.relaxed_chain(key, *q, tau))
    else:
        seen = estimators.rloo(key, f, estimators.LinearChain(*q), num_samples=samples)
    return -jnp.mean(seen - kl(q, (unary, move))) / x.shape[-2]


def posterior(method, model, x):
    """P(z_t | x) of each image, and -log p(x) in nats per image; exact for every method."""
    unary, move = model.prior(x.shape[-2])
    if method == "independent":
        joint = unary[0] + model.emission(x)
        return jax.nn.softmax(joint), -jnp.mean(jax.nn.logsumexp(joint, -1))
    unary += model.emission(x)
    nats = -jnp.mean(structured.chain_log_partition(unary, move)) / x.shape[-2]
    return structured.chain_marginals(unary, move), nats


# --- training --------------------------------------------------------------------------------------


def train(method, data, test, classes, config):
    """One model for each seed, all at once: states found in the test sequences, nats, and transitions."""
    mean, steps = data.mean((0, 1)), -(-config["steps"] // CHUNK) * CHUNK
    make = lambda key: Model(classes, mean, config["hidden"], key)
    keys = jax.random.split(jax.random.key(config["seed"]), config["seeds"])
    graph = nnx.split(make(keys[0]))[0]
    adam = optax.adam(optax.cosine_decay_schedule(config["learning_rate"], steps))

    def step(carry, inputs):
        weights, moments = carry
        key, number = inputs
        batch_key, key = jax.random.split(key)
        batch = data[jax.random.randint(batch_key, (config["batch_size"],), 0, len(data))]
        weight = jnp.minimum(1, config["anneal"] + (1 - config["anneal"]) * 1.5 * number / steps)
        loss = lambda weights: negative_bound(
            method, nnx.merge(graph, weights), key, batch, weight, config["tau"], config["samples"]
        )
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), value

    def advance(carry, key, start):
        return jax.lax.scan(step, carry, (jax.random.split(key, CHUNK), start + jnp.arange(CHUNK)))

    def look(weights):
        model = nnx.merge(graph, weights)
        marginals, nats = posterior(method, model, test)
        return jnp.argmax(marginals, -1), nats, jax.nn.softmax(model.move[...])

    advance, look = jax.jit(jax.vmap(advance, (0, 0, None))), jax.jit(jax.vmap(look))
    weights = jax.vmap(lambda key: nnx.split(make(key))[1])(keys)
    carry, history = (weights, jax.vmap(adam.init)(weights)), []
    for start in tqdm(range(0, steps, CHUNK), method, leave=False):
        keys, now = jnp.swapaxes(jax.vmap(jax.random.split)(keys), 0, 1)
        carry, losses = advance(carry, now, start)
        check_losses(np.ravel(losses))
        history.append(jax.device_get(look(carry[0])))
    return history


def matched(found, true, classes):
    """The tags under the one-to-one naming of classes that fits best, and that naming."""
    table = np.zeros((classes, classes))
    np.add.at(table, (found.ravel(), true.ravel()), 1)
    name = linear_sum_assignment(table, maximize=True)[1]
    return name[found], name


def changes(tags):
    return tags[:, 1:] != tags[:, :-1]


def scores(found, true):
    """The share of images whose tag is right, and F1 of where segments begin."""
    both = (changes(found) & changes(true)).sum()
    return (found == true).mean(), 2 * both / max(1, changes(found).sum() + changes(true).sum())


def summarise(history, true, classes):
    """Curves of accuracy and nats, the last scores of each seed, and the model of the best seed by nats."""
    curve = [[scores(matched(z, true, classes)[0], true)[0] for z in states] for states, _, _ in history]
    states, nats, moves = history[-1]
    last = [scores(matched(z, true, classes)[0], true) for z in states]
    best = int(np.argmin(nats))
    tags, name = matched(states[best], true, classes)
    move = np.empty_like(moves[best])
    move[np.ix_(name, name)] = moves[best]
    return {
        "nats": nats.tolist(), "accuracy": [float(a) for a, _ in last], "f1": [float(f) for _, f in last],
        "curve": np.array(curve).T.tolist(), "transitions": move.tolist(),
    }, tags  # fmt: skip


# --- pictures and the command ----------------------------------------------------------------------


def draw(results, tags, pictures, true, classes, path):
    figure = plt.figure(figsize=(13, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    axis = top.subplots()
    axis.imshow(np.hstack(pictures), cmap="gray_r", aspect="equal")
    side = pictures[0].shape[1]
    for row, (name, found) in enumerate([("true", true[0]), *((n, t[0]) for n, t in tags.items())]):
        y = side * (1.3 + 0.42 * row)
        axis.text(-0.3 * side, y, name, ha="right", va="center", fontsize=9)
        for t, tag in enumerate(found):
            colour = "black" if tag == true[0][t] else "red"
            axis.text((t + 0.5) * side, y, str(tag), color=colour, ha="center", va="center", fontsize=9)
        for t in np.flatnonzero(found[1:] != found[:-1]):
            axis.plot([(t + 1) * side] * 2, [y - 0.2 * side, y + 0.2 * side], color="black", lw=0.8)
    axis.set(ylim=(side * (1.5 + 0.42 * len(tags)), 0), xlim=(0, side * len(pictures)))
    axis.set_title("a test sequence and its tags; bars where a segment begins, red where a tag is wrong")
    axis.axis("off")
    axes = bottom.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for name, row in results.items():
        curve = np.array(row["curve"])
        steps = CHUNK * np.arange(1, curve.shape[1] + 1)
        label = f"{name}, {np.mean(row['nats']):.2f} nats per image"
        axes[0].plot(steps, curve.mean(0), color=COLORS[name], label=label)
        axes[0].fill_between(steps, curve.min(0), curve.max(0), color=COLORS[name], alpha=0.15, lw=0)
    axes[0].set(title="test images with the right tag", xlabel="training step", ylabel="share", ylim=(0, 1))
    axes[0].legend(fontsize=8, loc="lower right")
    axes[0].grid(alpha=0.3)
    shown = next((name for name in results if name != "independent"), None)
    for axis, law, title in (
        (axes[1], grammar(classes), "grammar"),
        (axes[2], shown and np.array(results[shown]["transitions"]), f"learned by {shown}"),
    ):
        if law is None:
            axis.axis("off")
            continue
        axis.imshow(law, vmin=0, vmax=1, cmap="Blues")
        axis.set(title=title, xlabel="next class", ylabel="class")
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@methods_option(COLORS, help="Method of training; may be given more than once.")
@click.option(
    "--data",
    type=Path(),
    default="mnist5k",
    metavar="NAME|FOLDER",
    help="Labeled images: mnist5k, 5,000 of MNIST; or a folder with the four IDX files of MNIST or "
    "Fashion-MNIST.",
)
@click.option("--sequences", type=COUNT, default=2000, help="Number of sequences to train on.")
@click.option("--test-sequences", type=COUNT, default=300, help="Number of sequences of test images.")
@click.option("--length", type=click.IntRange(2, 4096), default=20, help="Number of images in a sequence.")
@click.option("--hidden", type=SIZE, default=64, help="Number of units in the hidden layer of each network.")
@click.option("--tau", type=TAU, default=0.5, help="Temperature of relaxed_chain; the others have none.")
@click.option(
    "--samples", type=click.IntRange(2, 100), default=4, help="Number of draws of rloo for each sequence."
)
@click.option(
    "--anneal",
    type=FloatRange(0, 1),
    default=0.1,
    help="Weight of the likelihood at the start; it is 1 from two thirds of the steps on.",
)
@click.option("--steps", type=STEPS, default=800, help="Number of steps of Adam, in rounds of 50.")
@click.option("--batch-size", type=SIZE, default=32, help="Number of sequences in a step.")
@cosine_rate_option(0.02, FloatRange(0, 1, min_open=True))
@click.option("--seeds", type=SIZE, default=3, help="Number of models of each method, trained side by side.")
@click.option("--seed", type=SEED, default=0, help="Seed of the weights and of all draws.")
@out_option
def main(methods, data, sequences, test_sequences, out, **config):
    """Tag and segment sequences of digits without labels, with a hidden Markov model.

    Writes metrics.json and segment.png.
    """
    (images, labels), (test_images, test_labels) = load_labelled(data)
    classes = int(labels.max()) + 1
    missing = [c for c in range(classes) if not ((labels == c).any() and (test_labels == c).any())]
    if missing or classes < 3:
        raise UserError(
            f"{data} has {classes} classes, of which {missing} have no images to train on or to test; "
            "give 3 or more classes, each with images in both parts"
        )
    out = output_folder(out, "segment")
    rng = np.random.default_rng(0)
    _, index = write_sequences(rng, labels, sequences, config["length"])
    true, test_index = write_sequences(rng, test_labels, test_sequences, config["length"])
    x, test = jnp.asarray(coarse_bits(images)[index]), jnp.asarray(coarse_bits(test_images)[test_index])
    results, tags = {}, {}
    for method in dict.fromkeys(methods):
        history = train(method, x, test, classes, config)
        row, tags[method] = summarise(history, true, classes)
        results[method] = row
        nats, accuracy, f1 = (np.array(row[kind]) for kind in ("nats", "accuracy", "f1"))
        click.echo(
            f"{method:14} {nats.mean():6.2f} nats per image; tags right {accuracy.mean():.3f} "
            f"({accuracy.min():.3f} to {accuracy.max():.3f}), F1 of segments {f1.mean():.3f}"
        )
    draw(results, tags, test_images[test_index[0]], true, classes, out / "segment.png")
    settings = config | {
        "methods": methods, "data": data, "sequences": sequences, "test_sequences": test_sequences,
    }  # fmt: skip
    write_json(out / "metrics.json", {"results": results, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: segment.png, metrics.json")


if __name__ == "__main__":
    run(main)
