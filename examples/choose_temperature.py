"""Measure the bias and variance of gradients through a one-hot draw over the temperature.

The gradient of E f(z) with respect to the logits of a few categorical variables is known exactly, by
enumeration. Each method estimates it many times at temperatures from 0.1 to 10, for a linear, a quadratic and
a cubic function f of all one-hot vectors laid end to end, whose derivatives of every order at 0 are random.
Each quantity is the length of a vector, in units of the exact gradient's length:

    bias                  what is left of the error when many draws are averaged;
    standard deviation    of one draw, which averaging lowers;
    rms error             sqrt(bias^2 + standard deviation^2 / draws), of a step that averages some.

A step that averages many draws (a large batch) needs a small bias; a step with few draws needs a small
standard deviation. The rms error weighs the two: choose a method whose curve gets low, at its lowest point.
"""

import functools
import itertools
import math

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import relaxit_jax as rj
from common import (
    COUNT,
    SEED,
    SIZE,
    UserError,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)

FUNCTIONS = ("linear", "quadratic", "cubic")
ROUNDING = 1e-5  # float32, in units of the exact gradient
TAUS = np.geomspace(0.1, 10, 13)  # 1 is one of them
BATCH = 1000  # draws in memory at a time
MOST_VERTICES = 20_000


def style(colour, dashes="-", width=1.8):
    return {"color": colour, "ls": dashes, "lw": width}


# How to draw, and the style of the curve; the colors are from Okabe and Ito, safe for color-blind readers.
# Hard draws have no forward temperature: decoupled_gumbel_softmax has the law of gumbel_softmax_hard.
METHODS = {
    "straight_through_categorical": (
        lambda key, logits, tau, n: rj.straight_through_categorical(key, logits, tau), style("#000000"),
    ),
    "gapped_straight_through": (
        lambda key, logits, tau, n: rj.gapped_straight_through(key, logits, tau), style("#009E73"),
    ),
    "gumbel_softmax_hard": (
        lambda key, logits, tau, n: rj.gumbel_softmax(key, logits, tau, hard=True), style("#56B4E9", width=4),
    ),
    "decoupled_gumbel_softmax": (
        lambda key, logits, tau, n: rj.decoupled_gumbel_softmax(key, logits, 1.0, tau), style("#56B4E9"),
    ),
    "gumbel_softmax": (
        lambda key, logits, tau, n: rj.gumbel_softmax(key, logits, tau), style("#CC79A7"),
    ),
    "gumbel_rao": (
        lambda key, logits, tau, n: rj.gumbel_rao(key, logits, tau, n), style("#0072B2", "--"),
    ),
    "reinmax": (lambda key, logits, tau, n: rj.reinmax(key, logits, tau), style("#D55E00")),
    "reinmax_rao": (
        lambda key, logits, tau, n: rj.reinmax_rao(key, logits, tau, n), style("#E69F00", "--"),
    ),
}  # fmt: skip


def make_problem(variables, classes, seed):
    """Logits, shape (variables, classes), and for each function the derivatives of all orders at 0."""
    rng = np.random.default_rng(seed)
    size = variables * classes
    logits = rng.normal(size=(variables, classes))
    slopes = [rng.normal(size=(size,) * order) for order in (1, 2, 3)]
    return logits, [slopes[:order] for order in (1, 2, 3)]


def polynomial(slopes, z):
    """The sum over the orders k of D_k[z, ..., z] / k!."""
    total = 0.0
    for term in slopes:
        scale = math.factorial(term.ndim)
        for _ in range(term.ndim):
            term = term @ z.ravel()
        total += term / scale
    return total


def exact_gradient(logits, slopes):
    """The gradient of E f(z) = sum_z p(z) f(z) in the logits; d log p(z) / d logits = z - p."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    total = np.zeros_like(p)
    for chosen in itertools.product(np.eye(p.shape[-1]), repeat=len(p)):
        z = np.stack(chosen)
        total += np.prod(p[z == 1]) * polynomial(slopes, z) * (z - p)
    return total


@functools.partial(jax.jit, static_argnames=("draw", "num_samples", "batch", "batches"))
def gradient_errors(draw, num_samples, batch, batches, key, logits, tau, functions, exact):
    """For each function and batch: the mean error of the gradient, and its mean squared length."""

    def one_batch(key):
        many = jnp.broadcast_to(logits, (batch, *logits.shape))
        z, backward = jax.vjp(lambda logits: draw(key, logits, tau, num_samples), many)
        slopes = [jax.vmap(jax.grad(functools.partial(polynomial, f)))(z) for f in functions]
        (gradients,) = jax.vmap(backward)(jnp.stack(slopes))  # the same draws for all functions
        errors = gradients - jnp.stack(exact)[:, None]
        return jnp.mean(errors, 1), jnp.mean(jnp.sum(errors**2, (-2, -1)), 1)

    return jax.lax.map(one_batch, jax.random.split(key, batches))


def measure(draw, tau, problem, exact, samples, num_samples, draws, key):
    """For each function: bias with its standard error, standard deviation and error, divided by |exact|."""
    logits, functions = jax.tree.map(jnp.float32, problem)
    batch = min(samples, BATCH)
    batches = -(-samples // batch)
    seen = gradient_errors(
        draw, num_samples, batch, batches, key, logits, tau, functions, jax.tree.map(jnp.float32, exact)
    )
    means = [np.mean(np.asarray(x, float), 0) for x in seen]
    rows, n = [], batch * batches
    for error, squared, gradient in zip(*means, exact, strict=True):
        length, bias = np.linalg.norm(gradient), np.linalg.norm(error)
        sd = math.sqrt(max(squared - bias**2, 0) * n / (n - 1))
        row = {"bias": bias, "standard_error": sd / math.sqrt(n), "standard_deviation": sd}
        row["rms_error"] = math.sqrt(bias**2 + sd**2 / draws)
        row = {name: float(value / length) for name, value in row.items()}
        rows.append(
            {"tau": float(tau)} | row | {"biased": row["bias"] > 2 * row["standard_error"] + ROUNDING}
        )
    return rows


def best(rows):
    return min(rows, key=lambda row: row["rms_error"])


# --- the picture -------------------------------------------------------------------------------


def draw_picture(results, draws, path):
    """One column per function: the parts of the error as curves, the lowest rms errors as bars."""
    step = "one draw" if draws == 1 else f"a step that\naverages {draws} draws"
    curves = {
        "bias": "bias\n\nwhat is left when\nvery many draws\nare averaged",
        "standard_deviation": "standard\ndeviation\n\nof one draw",
        "rms_error": f"rms error\n\nbias and deviation\ntogether, in\n{step}",
    }
    figure, axes = plt.subplots(4, 3, figsize=(9.2, 11), sharey="row", height_ratios=[1, 1, 1, 0.8])
    figure.subplots_adjust(left=0.25, right=0.99, top=0.88, bottom=0.05, hspace=0.22, wspace=0.08)
    for (quantity, label), line in zip(curves.items(), axes, strict=False):
        line[0].set_ylabel(label, fontsize=11, rotation=0, ha="right", va="center")
        limits = find_limits(results, quantity)
        for function, axis in zip(FUNCTIONS, line, strict=True):
            axis.set(xscale="log", yscale="log", ylim=limits)
            axis.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
            axis.set_yticks(*ticks(*limits))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            for place, name in enumerate(METHODS):
                draw_curve(axis, name, results[name][function], quantity, limits[0], place)
    axes[0, 0].text(10, find_limits(results, "bias")[0] * 1.15, "no bias seen", ha="right", fontsize=10)
    for function, column in zip(FUNCTIONS, axes.T, strict=True):
        column[0].set_title(f"{function} f", fontsize=12)
        column[2].set_xlabel("temperature")
        rank(column[3], {name: best(results[name][function]) for name in METHODS})
    axes[3, 1].set_xlabel("lowest rms error, and the temperature that it needs")
    figure.suptitle("Error of the gradient, as a part of the exact gradient", fontsize=13, y=0.985)
    drawn = [name for name in METHODS if name != "decoupled_gumbel_softmax"]  # it shares another's curve
    handles = [plt.Line2D([], [], label=name, **METHODS[name][1]) for name in drawn]
    handles[drawn.index("gumbel_softmax_hard")].set_label("gumbel_softmax_hard, decoupled_…")
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.97), ncols=3, frameon=False)
    save_figure(figure, path)


def ticks(low, high):
    values = [x for x in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if low <= x <= high]
    return values, [f"{x:g}" for x in values]


def find_limits(results, quantity):
    rows = [row for curves in results.values() for curve in curves.values() for row in curve]
    seen = [row[quantity] for row in rows if row["biased"] and row[quantity] > 0.02]
    low, high = min(seen, default=0.1), min(max(seen, default=1), 30)
    return (low / 3 if quantity == "bias" else low / 1.3, high * 1.3)


def draw_curve(axis, name, rows, quantity, bottom, place):
    """Draw one method. An unseen bias is a dot in a band at the bottom, and so is the lowest rms error."""
    look = METHODS[name][1]
    taus = np.array([row["tau"] for row in rows])
    values = np.array([row[quantity] for row in rows])
    marked = np.array([row is best(rows) and quantity == "rms_error" for row in rows])
    if quantity == "bias":
        marked = np.array([not row["biased"] for row in rows])
        values[marked] = bottom * 2.2 ** ((place + 0.5) / len(METHODS))
        axis.axhspan(bottom, bottom * 2.3, color="0.93", zorder=0, lw=0)
    axis.plot(taus, values, **look)
    axis.plot(taus[marked], np.maximum(values[marked], bottom), "o", ms=6, color=look["color"], clip_on=False)


def rank(axis, rows):
    """The lowest rms error of each method, and the temperature where it occurs."""
    errors = np.array([row["rms_error"] for row in rows.values()])
    colours = [METHODS[name][1]["color"] for name in rows]
    axis.barh(list(rows), errors, color=colours, height=0.55)
    for place, (error, row) in enumerate(zip(errors, rows.values(), strict=True)):
        weight = "bold" if error == errors.min() else "normal"
        axis.text(error, place, f" {error:.2f} at {row['tau']:.2g}", va="center", weight=weight)
    axis.locator_params(axis="x", nbins=3)
    axis.set(xlim=(0, 2.1 * errors.max()), ylim=(len(rows) - 0.5, -0.5))


def table(results):
    """Lines of text: for each method and function the lowest rms error, and where it occurs."""
    yield f"{'lowest rms error, at temperature':34}" + "".join(f"{name:>15}" for name in FUNCTIONS)
    for name, rows in results.items():
        lowest = [best(rows[function]) for function in FUNCTIONS]
        yield f"{name:34}" + "".join(f"{row['rms_error']:8.2f} @ {row['tau']:<4.2g}" for row in lowest)


@click.command(context_settings={"show_default": True})
@click.option(
    "--samples",
    type=click.IntRange(100, 100_000_000),
    default=20_000,
    help="Number of gradients for each method and temperature, rounded up to whole thousands above 1,000.",
)
@click.option("--seed", type=SEED, default=0, help="Seed of the logits, the functions and the draws.")
@click.option("--variables", type=click.IntRange(1, 14), default=3, help="Number of categorical variables.")
@click.option("--classes", type=click.IntRange(2, 100), default=3, help="Number of classes of each variable.")
@click.option(
    "--num-samples",
    type=SIZE,
    default=10,
    help="Number of relaxed draws that gumbel_rao and reinmax_rao average for one gradient.",
)
@click.option(
    "--draws",
    type=COUNT,
    default=10,
    help="Number of gradients that a training step averages: this lowers the variance, not the bias.",
)
@out_option
def main(samples, seed, variables, classes, num_samples, draws, out):
    """Show bias and variance of every categorical method at temperatures from 0.1 to 10.

    Writes errors.png and metrics.json, and prints the best temperatures.
    """
    if classes**variables > MOST_VERTICES:
        raise UserError(
            f"{variables} variables of {classes} classes have too many values to enumerate for the exact "
            f"gradient; lower --variables or --classes to {MOST_VERTICES} or fewer"
        )
    settings = dict(click.get_current_context().params)
    del settings["out"]
    out = output_folder(out, "choose_temperature")
    problem = make_problem(variables, classes, seed)
    exact = [exact_gradient(problem[0], slopes) for slopes in problem[1]]
    results = {name: {function: [] for function in FUNCTIONS} for name in METHODS}
    with tqdm(total=len(METHODS) * len(TAUS), unit="tau") as bar:
        for name, (draw, _) in METHODS.items():
            bar.set_description(name)
            for tau in TAUS:
                rows = measure(draw, tau, problem, exact, samples, num_samples, draws, jax.random.key(seed))
                for function, row in zip(FUNCTIONS, rows, strict=True):
                    results[name][function].append(row)
                bar.update()
    draw_picture(results, draws, out / "errors.png")
    write_json(out / "metrics.json", {"settings": settings, "results": results, "versions": versions()})
    click.echo("\n".join(table(results)) + f"\nin {out}: errors.png, metrics.json")


if __name__ == "__main__":
    run(main)
