"""Time and memory of every sampler, value and gradient, over the batch, the classes and k.

Batches have 2^6 to 2^20 events of 16 classes (or bits); then 16 events have 2 to 2^18 classes; then 1 to
1,000 of 4,096 elements are drawn, in powers of two. Methods that cannot be that large end sooner (a factor
or a matrix of places is quadratic, SIMPLE runs one element after another). Exponents are fitted to the upper
half of each curve, where the cost of a call no longer counts: 1 is linear.

Writes results/scaling.json and results/scaling.png, and takes a quarter of an hour.
"""

import functools

import click
import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import relaxit_jax as rj
from memory import peak_of
from records import out_option, write
from rows import ROWS, TAU, K, logits_of
from timing import interleaved

EVENTS, CLASSES, ELEMENTS = 16, 16, 4096
BATCHES = [2**i for i in range(6, 21, 2)]
COUNTS = [2**i for i in (1, 4, 7, 10, 13, 15, 16, 18)]
SIZES = [1, 4, 16, 64, 250, 1000]
LARGEST = {  # the last size for methods that are more than linear, or slow
    "batch": {"gumbel_sinkhorn": 2**14, "simple_top_k": 2**18, "gumbel_rao": 2**18, "reinmax_rao": 2**18},
    "classes": {"relaxed_permutation": 2**10, "correlated_bernoulli": 2**11, "logistic_normal_full": 2**11,
                "simple_top_k": 2**13},
}  # fmt: skip
OF_K = {  # (draw, the largest k)
    "gumbel_top_k": lambda key, l, k: rj.gumbel_top_k(key, l, k)[1],
    "relaxed_top_k": lambda key, l, k: rj.relaxed_top_k(key, l, k, TAU),
    "simple_top_k": rj.simple_top_k,
}


def points(name, axis):
    """[(the varied quantity, shape of the logits)] for a sampler on an axis."""
    last = LARGEST[axis].get(name, np.inf)
    if axis == "batch":
        event = (8, 8) if name == "gumbel_sinkhorn" else (CLASSES,)
        return [(n, (n, *event)) for n in BATCHES if n <= last]
    if name == "gumbel_sinkhorn":
        return [(n, (2, n, n)) for n in (4, 16, 32, 64, 128, 256) if n <= last]
    return [(n, (EVENTS, n)) for n in COUNTS if (K if name in OF_K else 1) < n <= last]


def measure(draw, shape, rounds, budget):
    """Seconds and peak bytes of the value and gradient."""
    key, logits = jax.random.key(0), logits_of(shape, "float32")
    out = jax.eval_shape(draw, key, logits)
    weights = logits_of(out.shape, out.dtype, seed=1)

    def both(key, logits, weights):
        z, pull = jax.vjp(functools.partial(draw, key), logits)
        return z, pull(weights)[0]

    program = jax.jit(both).lower(key, logits, weights).compile()
    f = functools.partial(program, key, logits, weights)
    return float(np.median(interleaved({"f": f}, rounds, budget=budget)["f"])), peak_of(program)


def exponent(x, y):
    """The exponent e in y ~ x^e, by least squares on the upper half of the points, at least three."""
    half = min(len(x) - 3, len(x) // 2) if len(x) > 3 else 0
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def curve(draws, rounds, budget, bar):
    """One sampler over [(value, draw, shape)], with its exponents."""
    row = {"values": [], "milliseconds": [], "megabytes": []}
    for value, draw, shape in draws:
        seconds, size = measure(draw, shape, rounds, budget)
        row["values"].append(value)
        row["milliseconds"].append(round(1e3 * seconds, 4))
        row["megabytes"].append(round(size / 1e6, 4))
        jax.clear_caches()
        bar.update()
    row["exponent of time"] = round(exponent(row["values"], row["milliseconds"]), 3)
    row["exponent of memory"] = round(exponent(row["values"], row["megabytes"]), 3)
    return row


def picture(table):
    figure, axes = plt.subplots(2, 3, figsize=(16, 10), layout="constrained")
    colours = plt.colormaps["tab20"].colors
    marks = {name: (colours[i % 20], "-" if i < 20 else "--") for i, name in enumerate(ROWS)}
    titles = {"batch": f"batch, of {CLASSES} classes", "classes": f"classes, in {EVENTS} events",
              "k": f"k of {ELEMENTS} elements, in 4 events"}  # fmt: skip
    for column, (axis_name, rows) in enumerate(table.items()):
        for line, quantity in enumerate(("milliseconds", "megabytes")):
            axis = axes[line, column]
            for name, row in rows.items():
                axis.plot(row["values"], row[quantity], marker=".", label=name, color=marks[name][0],
                          ls=marks[name][1], lw=1.2)  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel=titles[axis_name], ylabel=quantity)
            axis.set_title(
                exponents(rows, "exponent of time" if line == 0 else "exponent of memory"), fontsize=9
            )
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle("Value and gradient of each sampler; exponents are fitted to the upper half of a curve")
    return figure


def exponents(rows, which):
    """All exponents, and which is furthest from linear."""
    found = sorted((row[which], name) for name, row in rows.items())
    if len(found) <= 3:
        return "\n".join(f"{name} {exponent:.2f}" for exponent, name in found)
    middle, above = found[len(found) // 2][0], [f"{name} {e:.2f}" for e, name in found if e > 1.3]
    return f"exponents {found[0][0]:.2f} to {found[-1][0]:.2f}, median {middle:.2f}\n{', '.join(above)}"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=3), default=10, help="Number of turns of each point.")
@click.option(
    "--budget", type=click.FloatRange(min=0.1), default=1.0, help="Approximate seconds for a point."
)
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), metavar="NAME",
              help="Run only this sampler; may be repeated. Nothing is written without --out.")  # fmt: skip
@click.option("--largest", type=click.IntRange(min=64), help="Largest batch and number of classes.")
@out_option
def main(rounds, budget, only, largest, out):
    largest = largest or 2**20
    work = {"batch": {}, "classes": {}, "k": {}}
    for name in only or ROWS:
        for axis in ("batch", "classes"):
            work[axis][name] = [
                (n, ROWS[name].ours, shape) for n, shape in points(name, axis) if n <= largest
            ]
        if name in OF_K:
            work["k"][name] = [
                (k, functools.partial(OF_K[name], k=k), (4, ELEMENTS)) for k in SIZES if k <= largest
            ]
    table = {axis: {} for axis in work}
    with tqdm(total=sum(len(c) for rows in work.values() for c in rows.values()), unit="point") as bar:
        for axis, rows in work.items():
            for name, draws in rows.items():
                table[axis][name] = row = curve(draws, rounds, budget, bar)
                tqdm.write(f"{axis:8} {name:30} time ^{row['exponent of time']:.2f}, "
                           f"memory ^{row['exponent of memory']:.2f}, last {row['milliseconds'][-1]:.1f} ms "
                           f"and {row['megabytes'][-1]:.1f} MB at {row['values'][-1]}")  # fmt: skip
    if out or not (only or largest < 2**20):
        write("scaling", table, out, picture(table))


if __name__ == "__main__":
    main()
