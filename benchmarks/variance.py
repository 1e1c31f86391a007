"""Gradient variance times time of every estimator, on the encoder of the VAE: the best one for a budget.

Averaging m estimates divides their variance by m and multiplies their time by m. Of two unbiased ones, the
one with the smaller product is therefore better at any budget. Bias remains, so a biased one is best only
for small budgets, if at all. Measured on the latents of a minibatch of test images, 20 bits each and 20
categories of 10, early and late in training; all estimators of a problem run in turns, in one process.

Writes results/variance.json and results/variance.png, and takes some minutes.
"""

import json
import pathlib
import sys

import click
import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from records import out_option, write
from relaxit_jax.diagnostics import gradient_report
from training import config

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import vae
from common import load_images, split_images
from which_estimator import Problem, mean_squared_error, methods_of

TRAINED_BY = {"20 bits": "disarm", "20 categories of 10": "rloo_categorical"}
BUDGETS = (0.003, 0.03, 0.3, 3.0)  # seconds


def encoders(name, images, epochs, digits):
    """The latents of some test images after each of these epochs of training."""
    experiment = vae.Experiment(config(TRAINED_BY[name], 0.5), *images)
    state, done = experiment.state, 0
    for last in epochs:
        for number in range(done, last):
            state, _ = experiment.epoch(state, experiment.grey, number)
        done, x, model = last, experiment.test[:digits], experiment.model(state[0])
        q = experiment.family.variables(model.encode(x)[0])
        f = lambda z, x=x, model=model: model.log_likelihood(x, experiment.family.code(z))
        yield last, Problem(f"{name}, after {last} epochs", f, q)


def rows_of(report):
    """The numbers of each estimator, and its product of variance and time over the product of rloo."""
    product = {name: report[name]["variance"] * report[name]["seconds"] for name in report.names}
    size = float(np.linalg.norm(report.gradient))
    return {
        name: {
            "relative standard deviation": report[name]["variance"] ** 0.5 / size,
            "relative bias": report[name]["bias_norm"] / size if report[name]["biased"] else 0.0,
            "milliseconds": 1e3 * report[name]["seconds"], "calls": report[name]["calls"],
            "variance x seconds, to rloo": {"ratio": product[name] / product["rloo"]},
        }
        for name in report.names
    }  # fmt: skip


def best(report):
    """{budget in seconds: the estimator with the smallest mean squared error}."""
    error = lambda name, budget: mean_squared_error(report, name, "seconds", budget)
    return {str(b): min(report.names, key=lambda name: error(name, b)) for b in BUDGETS}


def picture(reports):
    figure, axes = plt.subplots(
        len(reports), 2, figsize=(15, 4.6 * len(reports)), squeeze=False, layout="constrained"
    )
    for (left, right), (title, report) in zip(axes, reports.items(), strict=True):
        report.plot(left, cost="seconds")
        left.set_title(title)
        rows = rows_of(report)
        names = sorted(rows, key=lambda name: -rows[name]["variance x seconds, to rloo"]["ratio"])
        colours = ["tab:orange" if rows[name]["relative bias"] else "tab:blue" for name in names]
        ratios = [rows[name]["variance x seconds, to rloo"]["ratio"] for name in names]
        right.barh(names, ratios, color=colours)
        right.axvline(1, color="black", lw=0.8)
        right.set(
            xscale="log", xlabel="variance x time, over that of rloo (orange: a bias was found as well)"
        )
        right.grid(axis="x", alpha=0.3)
    return figure


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--num-samples",
    type=click.IntRange(min=100),
    default=2000,
    help="Number of estimates from each estimator.",
)
@click.option("--epochs", multiple=True, type=click.IntRange(min=0), default=(2, 30),
              help="Number of training epochs before measuring; may be repeated.")  # fmt: skip
@click.option(
    "--digits", type=click.IntRange(1, 1000), default=100, help="Number of test images in the minibatch."
)
@out_option
def main(num_samples, epochs, digits, out):
    images = split_images(load_images("mnist5k"))
    reports, table = {}, {}
    for name in TRAINED_BY:
        for _, problem in tqdm(encoders(name, images, sorted(epochs), digits), desc=name, unit="encoder"):
            key, report_key = jax.random.split(jax.random.key(len(reports)))
            report = gradient_report(
                report_key, problem.f, problem.q, methods_of(key, problem), num_samples, batch_size=20
            )
            reports[problem.title], rows = report, rows_of(report)
            table[problem.title] = {"estimators": rows, "best for seconds": best(report)}
            for which, row in rows.items():
                tqdm.write(
                    f"{problem.title:38} {which:22} sd {row['relative standard deviation']:8.2f} and "
                    f"bias {row['relative bias']:5.2f} of the gradient, {row['milliseconds']:7.2f} ms, "
                    f"variance x time {row['variance x seconds, to rloo']['ratio']:8.3f} of rloo's"
                )
            tqdm.write(f"{problem.title}: best for a budget of seconds: {json.dumps(best(report))}")
    write(
        "variance", {"digits": digits, "num_samples": num_samples, "problems": table}, out, picture(reports)
    )


if __name__ == "__main__":
    main()
