"""An epoch of the VAE, in turns: with sampling, without it, and the same loop in PyTorch.

Goals: a sampler at most 1.05 times the network that samples nothing, and at least 2 times faster than
PyTorch on the same data in memory; disarm at most 2.2 times and rebar at most 3.5 times the
straight-through bits. PyTorch is left out where it is not installed.
"""

import functools
import os
import pathlib
import sys

import click
import jax
import numpy as np

from timing import interleaved, ratio, write

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import vae
from common import load_images, split_images
from methods import METHODS, Sampler

try:
    import torch
except ImportError:
    torch = None

LATENTS, HIDDEN, BATCH, RATE = 20, 400, 128, 1e-3


def config(method, tau):
    return vae.Config(
        method=method, data="mnist5k", epochs=50, seed=0, latents=LATENTS, variables=LATENTS, classes=10,
        subset_size=LATENTS // 2, largest_mean=8.0, correlation="identity", tau_start=tau, tau_end=tau,
        hidden=(HIDDEN,), activation="relu", prior="fixed", augment=False, centre=True,
        batch_size=BATCH, learning_rate=RATE, schedule="constant",
    )  # fmt: skip


def jax_epoch(images, method, tau, sample=True):
    """One epoch, carrying the state along; without sampling the decoder sees the probabilities."""
    experiment = vae.Experiment(config(method, tau), *images)
    if not sample:
        experiment.method = METHODS[method]._replace(train=lambda family, key, q, g, tau: jax.nn.sigmoid(q))
    state = [experiment.state]

    def epoch():
        state[0], objective = experiment.epoch(state[0], experiment.grey, 0)
        return objective

    return epoch


def torch_epoch(images, tau):
    """The same network, objective, optimiser and batches, as a PyTorch user writes them."""
    torch.manual_seed(0)
    x = torch.from_numpy(np.asarray(vae.binarise(images[0])))
    layer = torch.nn.Linear
    encoder = torch.nn.Sequential(layer(784, HIDDEN), torch.nn.ReLU(), layer(HIDDEN, LATENTS))
    decoder = torch.nn.Sequential(layer(LATENTS, HIDDEN), torch.nn.ReLU(), layer(HIDDEN, 784))
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE)
    cross_entropy = functools.partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="none")

    def epoch():
        order = torch.randperm(len(x))
        for rows in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            batch = x[rows]
            q = encoder(batch)
            u = torch.rand_like(q).clamp(1e-7, 1 - 1e-7)
            z = torch.sigmoid((q + torch.log(u) - torch.log1p(-u)) / tau)
            p = torch.sigmoid(q)
            kl = p * q - torch.nn.functional.softplus(q) + np.log(2)
            loss = (cross_entropy(decoder(2 * z - 1), batch).sum(-1) + kl.sum(-1)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

    return epoch


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=3), default=20, help="Turns of one epoch each.")
def main(rounds):
    """Time epochs of the VAE with and without sampling, and in PyTorch."""
    images = split_images(load_images("mnist5k"))
    epochs = {"without sampling": jax_epoch(images, "relaxed_bernoulli", 0.5, sample=False)}
    rows = {name: 0.5 for name in METHODS if METHODS[name].family(config(name, 0.5)).code_size == LATENTS}
    for name in rows:
        epochs[name] = jax_epoch(images, name, 0.5)
    epochs["relaxed_bernoulli, tau 0.1"] = jax_epoch(images, "relaxed_bernoulli", 0.1)
    if torch:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        epochs["PyTorch"] = torch_epoch(images, 0.5)
        epochs["PyTorch, tau 0.1"] = torch_epoch(images, 0.1)
    else:
        click.echo("PyTorch is not installed: left out")
    seconds = interleaved(epochs, rounds)
    table = {}
    for name in epochs:
        table[name] = {"milliseconds": round(float(np.median(seconds[name])) * 1e3, 1)}
        table[name]["to without sampling"] = ratio(seconds, name, "without sampling")
        if name in METHODS and not isinstance(METHODS[name], Sampler):
            table[name]["to straight-through"] = ratio(seconds, name, "straight_through_bernoulli")
        if torch and "PyTorch" not in name:
            peer = "PyTorch, tau 0.1" if "0.1" in name else "PyTorch"
            table[name]["PyTorch takes"] = ratio(seconds, peer, name)
        click.echo(f"{name:28} {table[name]}")
    goals = {"to without sampling": 1.05, "PyTorch takes": 2}
    goals |= {"to straight-through": {"disarm": 2.2, "rebar": 3.5}}
    content = {"goals": goals, "epochs": table}
    write("training", content | {"torch": torch.__version__ if torch else None})


if __name__ == "__main__":
    main()
