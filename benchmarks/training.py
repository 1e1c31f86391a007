"""An epoch of the VAE with every method, compared with no sampling and with the same loop in PyTorch.

Without sampling the decoder sees the mean of the latents or, for gates and simplices of Gaussians, of their
centers. Everything else is the same, including the KL. Goals: a sampler takes at most 1.05 times as long, at
most half of PyTorch's time, and as long at tau = 0.1 as at 0.5, where denormal numbers slow PyTorch down;
disarm takes at most 2.2 and rebar at most 3.5 times as long as the straight-through bits. PyTorch is left out
if it is not installed.

Writes results/training.json and results/training.png, and takes some minutes.
"""

import functools
import pathlib
import sys

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import peers
from records import out_option, write
from timing import interleaved, milliseconds, ratio

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import latents
import vae
from common import load_images, split_images
from methods import METHODS, Sampler

LATENTS, CLASSES, HIDDEN, BATCH, RATE = 20, 10, 400, 128, 1e-3
LOW = ("relaxed_bernoulli", "gumbel_softmax")  # methods that are timed at tau = 0.1 as well
TORCH = ("relaxed_bernoulli", "straight_through_bernoulli", "gumbel_softmax")
GOALS = {
    "to without sampling": 1.05, "to PyTorch": 0.5, "to tau 0.5": 1.05,
    "to straight-through": {"disarm": 2.2, "rebar": 3.5},
}  # fmt: skip


def config(method, tau):
    return vae.Config(
        method=method, data="mnist5k", epochs=50, seed=0, latents=LATENTS, variables=LATENTS, classes=CLASSES,
        subset_size=LATENTS // 2, largest_mean=8.0, correlation="identity", tau_start=tau, tau_end=tau,
        hidden=(HIDDEN,), activation="relu", prior="fixed", augment=False, centre=True,
        batch_size=BATCH, learning_rate=RATE, schedule="constant",
    )  # fmt: skip


def mean(family, key, q, g, tau):
    """The decoder's input without sampling."""
    if isinstance(family, latents.Counts):
        return jnp.exp(family.log_mean(q))
    if isinstance(family, latents.GaussianGates):
        return jnp.clip(family.split(q)[0], 0, 1)
    if isinstance(family, latents.InvertibleGaussians):
        loc = family.split(q)[0]
        return jax.nn.softmax(jnp.concatenate([loc, jnp.zeros_like(loc[..., :1])], -1))
    return jax.nn.softmax(family.split(q)) if isinstance(family, latents.Categories) else jax.nn.sigmoid(q)


def jax_epoch(images, method, tau, sample=True):
    """One epoch, carrying the state along."""
    experiment = vae.Experiment(config(method, tau), *images)
    state = experiment.state
    if not sample:  # and so without a control variate
        experiment.method = Sampler("the mean", METHODS[method].family, mean)
        state = (state[0], {}, experiment.optimizer.init((state[0], {})))
    state = [state]

    def epoch():
        state[0], objective = experiment.epoch(state[0], experiment.grey, 0)
        return objective

    return epoch


def torch_draw(torch, method, q, tau):
    """Latents for the decoder and their KL from the uniform prior, as a PyTorch user would write them."""
    if method == "gumbel_softmax":
        logits = q.view(-1, LATENTS, CLASSES)
        log_p = torch.log_softmax(logits, -1)
        kl = (log_p.exp() * (log_p + np.log(CLASSES))).sum((1, 2))
        return torch.nn.functional.gumbel_softmax(logits, tau).flatten(1), kl
    p = torch.sigmoid(q)
    kl = (p * q - torch.nn.functional.softplus(q) + np.log(2)).sum(-1)
    if method == "straight_through_bernoulli":
        return 2 * (torch.bernoulli(p) + p - p.detach()) - 1, kl
    u = torch.rand_like(q).clamp(1e-7, 1 - 1e-7)
    return 2 * torch.sigmoid((q + torch.log(u) - torch.log1p(-u)) / tau) - 1, kl


def torch_epoch(images, method, tau):
    """The same network, objective, optimizer and batches."""
    import torch

    torch.manual_seed(0)
    x = torch.from_numpy(np.array(vae.binarise(images[0])))
    centre = x.mean(0)
    size = LATENTS * (CLASSES if method == "gumbel_softmax" else 1)
    layer, relu = torch.nn.Linear, torch.nn.ReLU
    encoder = torch.nn.Sequential(layer(784, HIDDEN), relu(), layer(HIDDEN, size))
    decoder = torch.nn.Sequential(layer(size, HIDDEN), relu(), layer(HIDDEN, 784))
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE)
    cross_entropy = functools.partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="none")

    def epoch():
        order = torch.randperm(len(x))
        for rows in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            batch = x[rows]
            z, kl = torch_draw(torch, method, encoder(batch - centre), tau)
            loss = (cross_entropy(decoder(z), batch).sum(-1) + kl).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

    return epoch


def without(method):
    return f"without sampling: {METHODS[method].family.__name__}"


def all_epochs(images, chosen, with_torch):
    """{name: one epoch}: each method, its network without sampling, low temperatures and PyTorch."""
    epochs = {}
    for method in tqdm(chosen, desc="compiling", unit="method"):
        if without(method) not in epochs:
            epochs[without(method)] = jax_epoch(images, method, 0.5, sample=False)
        epochs[method] = jax_epoch(images, method, 0.5)
        if method in LOW:
            epochs[f"{method}, tau 0.1"] = jax_epoch(images, method, 0.1)
        if with_torch and method in TORCH:
            epochs[f"PyTorch {method}"] = torch_epoch(images, method, 0.5)
            if method in LOW:
                epochs[f"PyTorch {method}, tau 0.1"] = torch_epoch(images, method, 0.1)
        for name in list(epochs)[-5:]:
            epochs[name]()  # compiles
    return epochs


def row_of(name, seconds):
    """The time of an epoch, and its ratios to the times it is compared with."""
    method, low = name.removeprefix("PyTorch ").split(",")[0], name.endswith("tau 0.1")
    row = {"milliseconds": milliseconds(seconds[name])}
    if low:
        row["to tau 0.5"] = ratio(seconds, name, name.removesuffix(", tau 0.1"))
    if name in METHODS or (low and method in METHODS and not name.startswith("PyTorch")):
        row["to without sampling"] = ratio(seconds, name, without(method))
        if f"PyTorch {name}" in seconds:
            row["to PyTorch"] = ratio(seconds, name, f"PyTorch {name}")
        if not isinstance(METHODS[method], Sampler) and "straight_through_bernoulli" in seconds:
            row["to straight-through"] = ratio(seconds, name, "straight_through_bernoulli")
    return row


def picture(table):
    names = [name for name in table if "to without sampling" in table[name]][::-1]
    peers_of = [name for name in table if "to PyTorch" in table[name]][::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 8), width_ratios=(3, 2), layout="constrained")
    ratios = [table[name]["to without sampling"] for name in names]
    low, high = np.array([r["quartiles"] for r in ratios]).T
    middle = np.array([r["ratio"] for r in ratios])
    left.errorbar(middle, names, xerr=np.maximum([middle - low, high - middle], 0), fmt="o", ms=4)
    left.axvline(1, color="black", lw=0.8)
    left.axvline(GOALS["to without sampling"], color="tab:red", lw=0.8, ls=":")
    left.set(xscale="log", xlabel="time of an epoch, over the same network without sampling",
             title="what sampling costs (dotted: the goal of a sampler)")  # fmt: skip
    y = np.arange(len(peers_of))
    right.barh(y + 0.2, [table[name]["milliseconds"] for name in peers_of], 0.4, label="this library")
    right.barh(y - 0.2, [table[f"PyTorch {name}"]["milliseconds"] for name in peers_of], 0.4, label="PyTorch")
    right.set_yticks(y, peers_of)
    right.set(xlabel="milliseconds an epoch of 4,000 images", title="the same loop in PyTorch")
    if peers_of:
        right.legend()
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    return figure


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=3), default=15, help="Number of turns of one epoch each.")
@click.option("--only", multiple=True, type=click.Choice(list(METHODS)), metavar="NAME",
              help="Run only this method; may be repeated. Nothing is written without --out.")  # fmt: skip
@out_option
def main(rounds, only, out):
    torch = peers.of_torch()[1]
    images = split_images(load_images("mnist5k"))
    epochs = all_epochs(images, only or list(METHODS), torch is not None)
    seconds = interleaved(epochs, rounds, calls=1)
    table = {name: row_of(name, seconds) for name in epochs}
    for name, row in table.items():
        click.echo(f"{name:36} {row}")
    if out or not only:
        write("training", {"goals": GOALS, "torch": torch, "epochs": table}, out, picture(table))


if __name__ == "__main__":
    main()
