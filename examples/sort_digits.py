"""Learning to sort sequences of digit images from their order alone, with two relaxed permutations.

A network looks at each image on its own. For `gumbel_sinkhorn` it weighs the n places of the sorted sequence,
and at test time the best assignment of the n x n weights sorts new images. For `relaxed_permutation` it gives
one number to each image, and new images are sorted by their numbers. The loss is -log of the share of each
image that the relaxed permutation puts where it belongs. It is never told a digit, only which places each
image may take, several if digits are equal.

    python examples/sort_digits.py
    python examples/sort_digits.py --method relaxed_permutation --lengths 15

For comparison there is the same network with more information: trained as a classifier on the digits
themselves, on as many images, its sequences are sorted by the digits that it reads. A network that learns to
sort has to learn to read, so this is the best one can hope for.

From the order alone, with 2,000 steps of 32 sequences and two seeds, on 1,000 sequences of new images each:
at n = 5, `gumbel_sinkhorn` has .92 of the places and .83 of the whole sequences right, `relaxed_permutation`
.93 and .84; at n = 10, `gumbel_sinkhorn` has .89 and .62. With digits read and sorted it is .95 and .90, and
.94 and .82. Without moved copies of the 4,000 images all of it is lower (.75 and .44 of the whole sequences
from the order): mostly the network lacks knowledge of digits.

The first method comes from G. Mena, D. Belanger, S. Linderman, J. Snoek (2018), Learning Latent Permutations
with Gumbel-Sinkhorn Networks, arXiv:1802.08665, who sort numbers and the pieces of images. The second comes
from S. Prillo, J. Eisenschlos (2020), SoftSort, arXiv:2006.16038.
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

import relaxit_jax as rj
from common import (
    COUNT,
    SIZE,
    STEPS,
    TAU,
    Numbers,
    augment,
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

CHUNK = 50  # steps in one compiled call, after which the test sequences are sorted


def windows(images):
    """The 12 x 12 windows of 5 x 5 pixels, two apart, for each image, so that convolutions are products.

    XLA's own convolutions are slow in a loop on CPUs.
    """
    views = np.lib.stride_tricks.sliding_window_view(images, (5, 5), axis=(-2, -1))[..., ::2, ::2, :, :]
    return jnp.asarray(views.reshape(len(images), 12, 12, 25))


def moved_copies(images, digits, copies):
    """The images and slightly moved copies, `copies` of each in total; 4,000 alone are too few."""
    keys = jax.random.split(jax.random.key(0), copies)[1:]
    moved = [np.asarray(augment(key, jnp.asarray(images))) for key in keys]
    return np.concatenate([images, *moved]), np.tile(digits, copies)


class Network(nnx.Module):
    """A small convolutional network, from windows of an image to a weight for each place or class."""

    def __init__(self, outputs, key):
        rngs = nnx.Rngs(key)
        self.first = nnx.Linear(25, 16, rngs=rngs)
        self.second = nnx.Linear(4 * 16, 32, rngs=rngs)
        self.third = nnx.Linear(36 * 32, 64, rngs=rngs)
        self.last = nnx.Linear(64, outputs, rngs=rngs)

    def __call__(self, x):
        batch = x.shape[:-3]
        x = jax.nn.relu(self.first(x)).reshape(-1, 6, 2, 6, 2, 16).swapaxes(2, 3)
        x = jax.nn.relu(self.second(x.reshape(-1, 36, 64)))
        x = jax.nn.relu(self.third(x.reshape(-1, 36 * 32)))
        return self.last(x).reshape(*batch, -1)


def places(digits):
    """Which places of the sorted sequence each digit may take, as (..., n, n) booleans."""
    return digits[..., :, None] == jnp.sort(digits, -1)[..., None, :]


def by_weights(key, weights, tau):
    """Images in rows, places in columns, from weights of images for places."""
    return rj.gumbel_sinkhorn(key, weights, tau)


def by_numbers(key, numbers, tau):
    """The same from one number for each image: the largest is at the last place."""
    return jnp.matrix_transpose(rj.relaxed_permutation(key, numbers[..., 0], tau)[..., ::-1, :])


METHODS = {"gumbel_sinkhorn": by_weights, "relaxed_permutation": by_numbers}


def misplacement(permutation, digits):
    """-log of the share of each image that a relaxed permutation puts where it belongs, averaged."""
    share = jnp.sum(permutation * places(digits), -1)
    return -jnp.mean(jnp.log(share + 1e-6))  # an image that is certainly misplaced costs 14, not infinity


def training(loss, optimizer, images, digits, batch_shape):
    """A compiled call of CHUNK steps on random draws of the images: (state, key) -> state."""

    def step(state, key):
        network, moments = state
        draw_key, loss_key = jax.random.split(key)
        index = jax.random.randint(draw_key, batch_shape, 0, len(images))
        gradient = jax.grad(loss)(network, loss_key, images[index], digits[index])
        updates, moments = optimizer.update(gradient, moments, network)
        return (optax.apply_updates(network, updates), moments), None

    return jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, CHUNK))[0])


def best_assignment(weights):
    """Which image goes to each place, so that the total weight is largest."""
    return np.array([linear_sum_assignment(matrix.T, maximize=True)[1] for matrix in np.asarray(weights)])


def best_order(numbers):
    """The same by one number for each image."""
    return np.argsort(np.asarray(numbers)[..., 0], -1, kind="stable")


def by_class(weights):
    """The same from the classes that were read."""
    return np.argsort(np.asarray(weights).argmax(-1), -1, kind="stable")


def scores(digits, order):
    """The share of places with the right digit, and of sequences with only right digits."""
    right = np.take_along_axis(digits, order, -1) == np.sort(digits, -1)
    return float(right.mean()), float(right.all(-1).mean())


def learn(name, n, seed, data, sequences, *, tau, steps, batch_size, learning_rate):
    """Train one network; its scores on the test sequences after every chunk, and its last orders."""
    (images, digits), (test_images, test_digits) = data
    outputs, sort = {
        "gumbel_sinkhorn": (n, best_assignment), "relaxed_permutation": (1, best_order),
        "digits": (10, by_class),
    }[name]  # fmt: skip
    graph, network = nnx.split(Network(outputs, seed))

    def loss(network, key, images, digits):
        weights = nnx.merge(graph, network)(images)
        if name in METHODS:
            return misplacement(METHODS[name](key, weights, tau), digits)
        return optax.softmax_cross_entropy_with_integer_labels(weights, digits).mean()

    chunks = -(-steps // CHUNK)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, chunks * CHUNK))
    advance = training(loss, optimizer, images, jnp.asarray(digits), (batch_size, n))
    read = jax.jit(lambda network: nnx.merge(graph, network)(test_images))
    state, history = (network, optimizer.init(network)), []
    for key in tqdm(jax.random.split(jax.random.key(seed), chunks), f"{name}, n = {n}", leave=False):
        state = advance(state, key)
        order = sort(read(state[0])[sequences])
        history.append(scores(test_digits[sequences], order))
    return np.array(history), order


def before_and_after(images, sequences, orders):
    """Each sequence, and below it the same in its order, as one image."""
    rows = []
    for sequence, order in zip(sequences, orders, strict=True):
        rows += [np.hstack(images[sequence]), np.hstack(images[sequence[order]])]
        rows.append(np.zeros((10, rows[0].shape[1])))
    return np.vstack(rows[:-1])


def draw(histories, pictures, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(1.2, 1, 1), layout="constrained")
    axes[0].imshow(pictures, cmap="gray_r")
    axes[0].set(title="test sequences, and below each how it was sorted", xticks=[], yticks=[])
    for colour, n in zip(("C0", "C1"), sorted({n for _, n in histories}), strict=False):
        for name, style in zip(METHODS, ("-", "-."), strict=True):
            if (name, n) not in histories:
                continue
            learned = histories[name, n]
            x = CHUNK * np.arange(1, learned.shape[1] + 1)
            for score, axis in enumerate(axes[1:]):
                axis.plot(x, learned[..., score].mean(0), style, color=colour, label=f"n = {n}, {name}")
                low, high = learned[..., score].min(0), learned[..., score].max(0)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        for score, axis in enumerate(axes[1:]):
            last = histories["digits", n][:, -1, score].mean()
            axis.axhline(last, color=colour, ls=":", lw=1, label=f"n = {n}, read and sorted")
    for axis, title in zip(axes[1:], ("places that are right", "sequences that are right"), strict=True):
        axis.set(title=f"share of {title}", xlabel="step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@methods_option(METHODS, help="Relaxed permutation; may be given more than once.")
@click.option(
    "--lengths",
    type=Numbers(click.IntRange(2, 1000), "5,10"),
    default="5,10",
    help="Number of images in a sequence, with one training each.",
)
@click.option("--tau", type=TAU, default=1.0, help="Temperature of the permutation.")
@click.option("--steps", type=STEPS, default=2000, help="Number of Adam steps, in rounds of 50.")
@click.option("--copies", type=click.IntRange(1, 50), default=6, help="Number of moved copies of each image.")
@click.option("--batch-size", type=SIZE, default=32, help="Number of sequences in a step.")
@cosine_rate_option(0.005)
@click.option("--seeds", type=SIZE, default=2, help="Number of trainings of each kind.")
@click.option(
    "--test-sequences", type=COUNT, default=1000, help="Number of sequences from the 1,000 test images."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Seed of the first training.")
@out_option
def main(methods, lengths, tau, steps, copies, batch_size, learning_rate, seeds, test_sequences, seed, out):
    """Sort sequences of digit images with relaxed permutations, learned from their order alone."""
    out = output_folder(out, "sort_digits")
    (images, digits), (test_images, test_digits) = load_labelled()
    images, digits = moved_copies(images, digits, copies)
    data = (windows(images), digits), (windows(test_images), test_digits)
    settings = {"tau": tau, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    histories, table, orders = {}, [], {}
    for n in lengths:
        sequences = np.random.default_rng(n).integers(len(test_images), size=(test_sequences, n))
        for name in (*dict.fromkeys(methods), "digits"):
            runs = [learn(name, n, seed + i, data, sequences, **settings) for i in range(seeds)]
            histories[name, n] = np.array([history for history, _ in runs])
            orders[name, n] = sequences[:4], runs[0][1][:4]
            positions, whole = histories[name, n][:, -1].T
            table.append({"n": n, "from": name, "positions": positions.tolist(), "sequences": whole.tolist()})
            kind = "read and sorted" if name == "digits" else name
            tqdm.write(
                f"n = {n}, {kind}: {positions.mean():.3f} of the places right, {whole.mean():.3f} "
                f"of the sequences ({whole.min():.3f} to {whole.max():.3f})"
            )
    pictures = before_and_after(test_images, *orders[methods[0], lengths[-1]])
    draw(histories, pictures, out / "sort_digits.png")
    settings |= {
        "methods": methods,
        "lengths": lengths,
        "copies": copies,
        "seeds": seeds,
        "seed": seed,
        "test_sequences": test_sequences,
    }
    write_json(out / "metrics.json", {"results": table, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: sort_digits.png, metrics.json")


if __name__ == "__main__":
    run(main)
