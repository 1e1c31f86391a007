"""Published protocols run with this library: the published figure, its source, and ours side by side.

Each protocol is a record below: data, networks, optimizer, latents, estimator, steps, evaluation, and the
figures that were published with their source. `--data` names the folder with the images: the IDX files of
MNIST and the fixed binarization of Larochelle and Murray, as its three .amat files or as one file
binarized_mnist.npz of packed bits. They lie in the folder itself or in its subfolders mnist and binarized.
Only the files that the chosen protocols need are read. Nothing is downloaded.

A result is written after each evaluation. Results of other protocols, rows and seeds stay, so a stopped
command can be given again: what is finished is left out, and what was begun goes on from the state kept in
--state. `--quick` runs a hundredth of the steps with one seed: it takes minutes and shows that everything
works, no more.

Writes results/published.json and results/published.png.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from records import RESULTS, out_option, write

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import reproduce
from common import Path, UserError, run
from versions import today


class Row(NamedTuple):
    """A method, and what was published for it: {measure: {point: figure or (lowest, highest)}}.

    A point is a number of epochs, "best" or "end", or a pair of epochs between which the mean is taken. None
    in place of a figure: ours alone.
    """

    method: str
    published: dict[str, dict[Any, Any]]
    options: dict[str, Any] = {}


class Protocol(NamedTuple):
    """All that a result depends on, but for seeds and versions. Measures are lower for better."""

    title: str
    source: str
    data: str | None
    rows: dict[str, Row]
    differs: str  # ours from theirs
    train: Callable = reproduce.train_vae
    latents: dict[str, int] = {}
    hidden: tuple[int, ...] = ()
    activation: Callable = jax.nn.relu
    init: Callable = reproduce.glorot
    thresholded: bool = False  # gray images at 1/2
    centred: bool = False
    prior_learned: bool = False
    batch_size: int = 100
    optimizer: Callable = optax.adam  # from a learning rate
    rates: tuple[float, ...] = (1e-3,)
    tau: Callable = lambda step: 1.0
    epochs: int = 1
    evaluation: tuple[tuple[str, int], ...] = (("test", 1),)  # of which part the bound of how many draws
    steps: int = 0  # where there are no epochs
    draws: int = 1
    horizon: int = 0
    seeds: int = 1  # that are run by default
    unit: str = "negative ELBO, nats"


def falling(step):
    """The temperature of Jang's notebook, set anew each 1,000 steps."""
    return jnp.maximum(jnp.exp(-3e-5 * (step // 1000 * 1000)), 0.5)


def momentum(rate):
    """Gradient descent with momentum 0.9; Adam for control variates, whose gradients are far larger."""
    return optax.multi_transform(
        {"model": optax.sgd(rate, momentum=0.9), "variate": optax.adam(rate)}, ("model", "variate")
    )


SIMPLE = {1: 219.30, 5: 191.30, 10: 184.21, 20: 179.35, 50: 174.46, 100: 171.65}
NOTEBOOK = "test, notebook's reading"
BOUND = "test, 1,000 samples"
OURS = {"test": {"end": None}, "test, 100 samples": {"end": None}}


def jang(kind, latents, rows):
    """Half of the rows of table 1."""
    return Protocol(
        title=f"Table 1 of Jang, Gu, Poole: {kind}",
        source="E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144, table 1, VAE",
        data="fixed binarization",
        rows={
            # at tau = 1 ReinMax is exact for quadratic f; with the falling tau it ended 21 nats higher
            name: Row(name, {BOUND: {"end": figure}}, {"tau": 1.0} if name == "reinmax" else {})
            for name, figure in rows.items()
        },
        differs="Steps, batch and first weights are not published: ours are 100 epochs of batches of 20 with "
        "one rate of their grid, exact KL, a learned prior, tau = max(exp(-1e-4 t), .5), 1 for reinmax. The "
        "control variate of rebar is trained by Adam.",
        latents=latents,
        prior_learned=True,
        batch_size=20,
        optimizer=momentum,
        rates=(3e-3,),
        tau=lambda step: jnp.maximum(jnp.exp(-1e-4 * step), 0.5),
        epochs=100,
        evaluation=(("validation", 1), ("test", 1000)),
    )


def example(data):
    """The README's VAE on all images, for which nothing was published."""
    methods = (
        "arms_categorical",
        "gumbel_softmax_hard",
        "gumbel_softmax",
        "relax_categorical",
        "rebar_categorical",
    )
    return Protocol(
        title=f"examples/vae.py on {data}",
        source="none: no figures were published for it",
        data=data,
        rows={method: Row(method, OURS) for method in methods},
        differs="All settings are the defaults of examples/vae.py: 20 variables of 10 classes, 784-512-512.",
        train=reproduce.train_example,
        rates=(3e-3,),
        epochs=10,
    )


SORTED = {"sequences with an error": {"end": 0.0}, "sequences with an error, float64": {"end": None}}

PROTOCOLS = {
    "sorting": Protocol(
        title="Gumbel-Sinkhorn's sorting of numbers",
        source="G. Mena, D. Belanger, S. Linderman, J. Snoek (2018), arXiv:1802.08665; settings: "
        "github.com/google/gumbel_sinkhorn, sorting/sorting_train.py",
        data=None,
        rows={f"N = {n}": Row("gumbel_sinkhorn", SORTED, {"numbers": n})
              for n in (5, 10, 15, 80, 100)},
        differs="Sinkhorn's iteration is run to its limit, not for 10 rounds.",
        train=reproduce.sort_numbers, batch_size=10, draws=5, rates=(0.1,), steps=500, seeds=5,
        unit="share of sequences",
    ),
    "cartpole": Protocol(
        title="RELAX on CartPole",
        source="W. Grathwohl, D. Choi, Y. Wu, G. Roeder, D. Duvenaud (2018), arXiv:1711.00123, table of "
        "episodes to solve a task, and appendix",
        data=None,
        rows={"reinforce": Row("reinforce", {"episodes to solve": {"end": 1152}}),
              "rloo": Row("rloo", {}),
              "relax": Row("relax", {"episodes to solve": {"end": 472}})},
        differs="tanh in place of ReLU. The control variate is a value function fitted by least squares plus "
        "a network trained on the variance; theirs is one network. rloo plays two episodes an update and "
        "counts both. Theirs is the best of nine pairs of rates, ours of two rates. Episodes end after 200 "
        "steps.",
        train=reproduce.play, rates=(0.01, 0.003), steps=3000, horizon=200, seeds=5, unit="episodes",
    ),
    "storchastic": Protocol(
        title="Storchastic's tutorial",
        source="github.com/HEmile/storchastic, docs/source/intro.discrete_vae.rst, printed training ELBO of "
        "single batches in the fifth epoch",
        data="gray",
        rows={"score function": Row("score function", {"train": {5: (188.9, 209.6)}, "test": {5: None}}),
              "rloo, 10 draws": Row("rloo_categorical, 10 draws", {"train": {5: (151.0, 164.1)}}),
              "gumbel_softmax": Row("gumbel_softmax", {"train": {5: (202.0, 212.3)}}),
              "rebar": Row("rebar_categorical", {}),
              "reinmax": Row("reinmax", {}),
              "exact": Row("exact", {"train": {5: (151.8, 156.0)}})},
        differs="Theirs are four batches of 64, ours the mean of all batches of the epoch.",
        latents={"variables": 2, "classes": 10}, hidden=(512, 256), init=reproduce.by_inputs, batch_size=64,
        epochs=5,
    ),
    "simple": Protocol(
        title="Discrete VAE of SIMPLE's authors",
        source="github.com/UCLA-StarAI/SIMPLE, DVAE/DVAE-SIMPLE.ipynb, printed test loss by epoch",
        data="gray",
        rows={"notebook's entropy": Row("simple_top_k, notebook's entropy", {NOTEBOOK: SIMPLE}),
              "exact entropy": Row("simple_top_k", {"test": dict.fromkeys(SIMPLE)})},
        differs="The notebook's entropy of a subset leaves out its first nine bits, so its KL is too large. "
        "One row trains on its KL, the other on the exact one.",
        latents={"variables": 20, "classes": 20, "subset_size": 10}, hidden=(512, 256), rates=(5e-4,),
        epochs=100,
    ),
    "jang_notebook": Protocol(
        title="Categorical VAE of E. Jang's notebook",
        source="github.com/ericjang/gumbel-softmax, Categorical VAE.ipynb, mean of the five printed ELBOs of "
        "single batches from step 25,001 to 45,001",
        data="gray, 5,000 held out",
        rows={"gumbel_softmax": Row("gumbel_softmax", {"train": {(46, 82): 101.97}, "test": {"end": None}})},
        differs="Theirs are five batches with soft draws; ours is the mean over all batches of the epochs 46 "
        "to 82, soft draws too. The test figure has exact draws.",
        latents={"variables": 30, "classes": 10}, hidden=(512, 256), tau=falling, epochs=91,
        optimizer=lambda rate: optax.adam(optax.exponential_decay(rate, 1000, 0.9, staircase=True)),
    ),
    "arsm": Protocol(
        title="ARSM's log",
        source="github.com/ARM-gradient/ARSM, vae/ARSM.out, valid_cost (whose epoch 9 is the tenth)",
        data="gray, 5,000 held out",
        rows={name: Row(method, {"validation": {10: 122.14, 25: 109.88, 51: 103.77, 101: 99.44}})
              for name, method in {
                  "rloo": "rloo_categorical", "arms": "arms_categorical", "rebar": "rebar_categorical",
                  "reinmax": "reinmax", "gumbel_rao": "gumbel_rao",
              }.items()},
        differs="Exact KL, where theirs is drawn; ten logits a variable, theirs nine and a zero. Their "
        "script has the rate 0.0003 for the encoder, none for the decoder; ours is 0.001 for both.",
        latents={"variables": 20, "classes": 10}, hidden=(512, 256), batch_size=200,
        activation=partial(jax.nn.leaky_relu, negative_slope=0.2), thresholded=True, rates=(1e-3,),
        epochs=101, evaluation=(("validation", 1),),
    ),
    "jang_bits": jang("200 bits", {"latents": 200}, {
        "reinforce": 112.2, "straight_through_bernoulli": 116.0, "relaxed_bernoulli": 105.0,
        "relaxed_bernoulli_hard": 111.5, "rloo": None, "disarm": None, "arms": None, "rebar": None,
    }),
    "jang_classes": jang("20 variables of 10 classes", {"variables": 20, "classes": 10}, {
        "reinforce_categorical": 110.6, "straight_through_categorical": 110.9, "gumbel_softmax": 101.5,
        "gumbel_softmax_hard": 107.8, "rloo_categorical": None, "reinmax": None, "gumbel_rao": None,
        "rebar_categorical": None,
    }),
    "relax": Protocol(
        title="RELAX: one linear layer of 200 bits",
        source="W. Grathwohl, D. Choi, Y. Wu, G. Roeder, D. Duvenaud (2018), arXiv:1711.00123, tables of "
        "training and validation ELBO",
        data="fixed binarization",
        rows={"rebar": Row("rebar", {"train": {"best": 111.6}, "validation": {"best": 114.32}}),
              "relax": Row("relax", {"train": {"best": 111.20}, "validation": {"best": 113.62}}),
              "relaxed_bernoulli": Row("relaxed_bernoulli", {"train": {"best": 111.3}}),
              "disarm": Row("disarm", {}), "arms": Row("arms", {}), "rloo": Row("rloo", {})},
        differs="Exact KL in the objective, where theirs is drawn. The network of relax has one layer of 100 "
        "units and sees the relaxed bits and their logits; theirs has two or four layers of 200 and sees the "
        "image too. Theirs is the best of five rates, after 2,000,000 steps (960 epochs); ours has one rate.",
        latents={"latents": 200}, centred=True, prior_learned=True, batch_size=24,
        optimizer=partial(optax.adam, b2=0.99999), rates=(1e-3,), tau=lambda step: 0.5, epochs=960,
        evaluation=(("validation", 1),),
    ),
    "mnist": example("MNIST"),
    "fashion": example("Fashion-MNIST"),
}  # fmt: skip


# --- what was measured ------------------------------------------------------------------------------


def at(history, measure, point):
    """What a run reached there, or None."""
    found = {step["epoch"]: step[measure] for step in history if step.get(measure) is not None}
    if isinstance(point, tuple):
        inside = [value for epoch, value in found.items() if point[0] <= epoch <= point[1]]
        return float(np.mean(inside)) if len(inside) == point[1] - point[0] + 1 else None
    if not found or point not in ("best", "end"):
        return found.get(point)
    return min(found.values()) if point == "best" else found[max(found)]


def points_of(protocol):
    """All that was published for one of its rows, as (measure, point)."""
    rows = protocol.rows.values()
    return list(dict.fromkeys((m, p) for row in rows for m, points in row.published.items() for p in points))


def best_rate(protocol, runs):
    """The runs of the rate that ends lowest, on validation images where there are any: {seed: run}."""
    by_rate, measure = {}, points_of(protocol)[0][0]
    if any(part == "validation" for part, _ in protocol.evaluation):
        measure = "validation"
    for name, each in runs.items():
        rate, seed = name.split(", ")
        by_rate.setdefault(rate, {})[seed] = each

    def score(rate):
        values = [at(each["history"], measure, "end") for each in by_rate[rate].values()]
        return sum(value is None for value in values), np.mean([value or 0 for value in values])

    return min(by_rate.items(), key=lambda item: score(item[0]))[1] if by_rate else {}


class Line(NamedTuple):
    """A published figure, or None, and what each seed of ours reached."""

    protocol: str
    row: str
    measure: str
    point: Any
    published: Any
    ours: list[float | None]
    epochs: int  # that the longest of ours took so far

    @property
    def measured(self):
        return [value for value in self.ours if value is not None]

    @property
    def worse(self):
        """By how much the mean of ours is above theirs."""
        highest = self.published[1] if isinstance(self.published, tuple) else self.published
        return None if highest is None or not self.measured else float(np.mean(self.measured)) - highest


def lines(results):
    """All figures of these protocols side by side, in the order of the records."""
    for name, protocol in PROTOCOLS.items():
        for row_name, row in protocol.rows.items() if name in results else ():
            runs = best_rate(protocol, results[name].get(row_name, {}))
            epochs = max((run["history"][-1]["epoch"] for run in runs.values()), default=0)
            for measure, point in points_of(protocol):
                published = row.published.get(measure, {}).get(point)
                ours = [at(run["history"], measure, point) for run in runs.values()]
                line = Line(name, row_name, measure, point, published, ours, epochs)
                if published is not None or line.measured:
                    yield line


def number(value):
    if isinstance(value, tuple):
        return f"{number(value[0])} to {number(value[1])}"
    if value is None:
        return "-"
    return f"{value:.0f}" if value == round(value) else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def spread(line):
    """The mean over seeds, from the lowest to the highest, and how many seeds got there if not all."""
    if not line.measured:
        return "-"
    text = number(float(np.mean(line.measured)))
    if len(line.measured) > 1:
        text += f" ({number((min(line.measured), max(line.measured)))})"
    some = len(line.measured) < len(line.ours)
    return text + (f", {len(line.measured)} of {len(line.ours)} seeds" if some else "")


def place(point):
    if isinstance(point, tuple):
        return f"epochs {point[0]} to {point[1]}"
    return f"epoch {point}" if isinstance(point, int) else point


def table(results):
    """As it is printed."""
    rows = [("protocol", "method", "figure", "published", "ours")]
    for line in lines(results):
        figure = f"{line.measure}, {place(line.point)}"
        rows.append((line.protocol, line.row, figure, number(line.published), spread(line)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    cells = lambda row: (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "\n".join("  ".join(cells(row)).rstrip() for row in rows)


def picture(results):
    """A panel for each protocol that has results: ours, and what was published."""
    panels = {}
    for line in lines(results):
        if line.measured:
            panels.setdefault(line.protocol, []).insert(0, line)
    height = max(1, -(-len(panels) // 2))
    figure, axes = plt.subplots(height, 2, figsize=(15, 3.6 * height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, each) in zip(axes.flat, panels.items(), strict=False):
        for y, line in enumerate(each):
            axis.plot([min(line.measured), max(line.measured)], [y, y], color="C0", lw=3)
            axis.plot(np.mean(line.measured), y, "o", color="C0")
            if line.published is not None:
                span = line.published if isinstance(line.published, tuple) else [line.published] * 2
                axis.plot(span, [y, y], "-d", color="C1", lw=3)
        axis.set_yticks(
            range(len(each)), [f"{line.row}: {line.measure}, {place(line.point)}" for line in each]
        )
        axis.tick_params("y", labelsize=8)
        axis.set(title=PROTOCOLS[name].title, xlabel=PROTOCOLS[name].unit)
        axis.grid(axis="x", alpha=0.3)
    styles = {"this library: mean and range of seeds": "-oC0", "published": "-dC1"}
    handles = [axes[0, 0].plot([], [], style, lw=3, label=label)[0] for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


# --- the command line -------------------------------------------------------------------------------


def train(protocol, row, images, seed, rate, saved, fraction, record, keep):
    """One training, from where its record ends; `keep` is called with the record after every evaluation."""
    began, spent = time.perf_counter(), record["seconds"]
    total = protocol.epochs if fraction == 1 else 1
    with tqdm(total=total, initial=len(record["history"]), leave=False, unit="epoch") as bar:
        for step in protocol.train(protocol, row, images, seed, rate, saved, fraction):
            history = [old for old in record["history"] if old["epoch"] < step["epoch"]]
            seconds = round(spent + time.perf_counter() - began, 1)
            record |= {"history": [*history, step], "seconds": seconds, "date": today()}
            bar.update(step["epoch"] - bar.n)
            bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in step.items()))
            keep(record)


def is_done(record, epochs):
    end = record["history"][-1] if record["history"] else {"epoch": 0}
    return end["epoch"] >= epochs or end.get("diverged", False)


def runs_of(protocol, quick, seeds):
    """(rate, seed) of each row."""
    if quick:
        return [(protocol.rates[0], 0)]
    return [(rate, seed) for rate in protocol.rates for seed in range(seeds or protocol.seeds)]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--data", type=Path(path_type=pathlib.Path), metavar="DIR", help="Folder with the images.")
@click.option(
    "--protocol",
    "names",
    multiple=True,
    type=click.Choice(list(PROTOCOLS)),
    metavar="NAME",
    show_default=False,
    help=f"Protocol to run; may be repeated: {', '.join(PROTOCOLS)}.  [default: all]",
)
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Run only rows with this in their name; may be repeated."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Stop each row after so many epochs; it can go on later."
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 100),
    show_default=False,
    help="Seeds of each row.  [default: 5 where a run takes minutes, else 1]",
)
@click.option("--quick", is_flag=True, help="Run a hundredth of the steps with one seed; needs --out.")
@click.option(
    "--state",
    type=Path(path_type=pathlib.Path),
    default="runs/published",
    metavar="DIR",
    help="Folder of the states that stopped runs go on from.",
)
@out_option
def main(data, names, only, epochs, seeds, quick, state, out):
    if quick and out is None:
        raise UserError("--quick measures nothing worth keeping; name another folder with --out")
    chosen = {name: PROTOCOLS[name] for name in names or PROTOCOLS}
    need = [name for name, protocol in chosen.items() if protocol.data]
    if need and data is None:
        raise UserError(f"{', '.join(need)} needs images; name their folder with --data")
    kinds = sorted({chosen[name].data for name in need})
    images = {None: None} | {kind: reproduce.DATA[kind](data) for kind in kinds}
    path = (out or RESULTS) / "published.json"
    results = json.loads(path.read_text())["protocols"] if path.exists() else {}

    def save(figure=None):
        content = {
            name: {row: results[name][row] for row in protocol.rows if row in results.get(name, {})}
            for name, protocol in PROTOCOLS.items()
            if name in results
        }
        write("published", {"protocols": content}, out, figure, quiet=figure is None)

    try:
        for name, protocol in chosen.items():
            protocol = protocol._replace(epochs=min(epochs or protocol.epochs, protocol.epochs))
            for row_name, row in protocol.rows.items():
                if only and not any(text in row_name for text in only):
                    continue
                for rate, seed in runs_of(protocol, quick, seeds):
                    runs = results.setdefault(name, {}).setdefault(row_name, {})
                    key = f"rate {rate:g}, seed {seed}"
                    record = runs.get(key, {"history": [], "seconds": 0.0})
                    if is_done(record, 1 if quick else protocol.epochs):
                        continue
                    tqdm.write(f"{name}: {row_name}, {key}")
                    file = None if quick else state / f"{name}, {row_name}, {key}.npz".replace(", ", "-")

                    def keep(record, runs=runs, key=key):
                        runs[key] = record
                        save()

                    arguments = protocol, row, images[protocol.data], seed, rate, reproduce.Saved(file)
                    train(*arguments, 0.01 if quick else 1.0, record, keep)
    finally:
        if any(results.values()):
            save(picture(results))
            click.echo(table({name: results.get(name, {}) for name in chosen}))


if __name__ == "__main__":
    run(main)
