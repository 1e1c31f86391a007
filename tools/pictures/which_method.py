"""Bias, standard deviation and rms error of gradients over a budget, on functions of four kinds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import from_sampler, gradient_report

FUNCTIONS = ("linear", "quadratic", "steep", "flat between")
BUDGETS = np.geomspace(1, 10_000, 200)  # calls of f
BOTTOM, TOP = 0.01, 40
rng = np.random.default_rng(1)


def draw(sampler, **options):
    return from_sampler(lambda key, logits: sampler(key, logits, **options))


UNBIASED = {"rloo, 4 draws": functools.partial(es.rloo, num_samples=4), "rebar": es.rebar}
BITS = {
    "straight-through": draw(rj.straight_through_bernoulli),
    "relaxed, tau 0.5": draw(rj.relaxed_bernoulli, tau=0.5),
    "relaxed, hard, tau 0.5": draw(rj.relaxed_bernoulli, tau=0.5, hard=True),
    "disarm": es.disarm,
} | UNBIASED
CATEGORIES = {
    "straight-through": draw(rj.straight_through_categorical),
    "relaxed, tau 0.5": draw(rj.gumbel_softmax, tau=0.5),
    "relaxed, hard, tau 0.5": draw(rj.gumbel_softmax, tau=0.5, hard=True),
    "reinmax": draw(rj.reinmax),
} | UNBIASED
LOOKS = {
    "straight-through": ("#000000", "-"), "relaxed, tau 0.5": ("#CC79A7", "-"),
    "relaxed, hard, tau 0.5": ("#56B4E9", "-"), "reinmax": ("#D55E00", "-"), "disarm": ("#E69F00", "--"),
    "rloo, 4 draws": ("#009E73", "--"), "rebar": ("#8C564B", "--"),
}  # fmt: skip


def of_all(weights, place):
    """One function for each of the four elements of a batch, all of one weighted sum of the draw."""

    def f(z):
        total = lambda z: jnp.sum(weights * z, tuple(range(1, z.ndim))) - place
        x, at_outcome = total(z), total(jnp.round(z))
        return jnp.stack([x[0], x[1] ** 2, jax.nn.sigmoid(20 * x[2]), at_outcome[3] ** 2])

    return f


def problem(family, shape):
    """The four functions and the draws that they take, with the same logits for each."""
    logits, weights = rng.normal(size=(2, *shape))
    q = family(jnp.asarray(np.broadcast_to(logits, (len(FUNCTIONS), *shape)), jnp.float32))
    return of_all(jnp.asarray(weights, jnp.float32), 1.0), q


PROBLEMS = {
    "8 bits": (*problem(es.Bernoulli, (8,)), BITS),
    "3 variables of 4 categories": (*problem(es.OneHotCategorical, (3, 4)), CATEGORIES),
}


def part(report, *index):
    """The report of one problem of a batch whose gradients are exact."""
    bias, error = (x[:, *index] for x in (report.bias, report.bias_error))
    axes = tuple(range(1, bias.ndim))
    return dataclasses.replace(
        report, gradient=report.gradient[index], bias=bias, bias_error=error,
        bias_norm=np.sqrt(np.sum(bias**2, axes)), bias_norm_error=np.sqrt(np.sum(error**2, axes)),
        variance=report.num_samples * np.sum(error**2, axes),
    )  # fmt: skip


def parts_of_error(report):
    """For each method over |gradient|: bias (0 if unseen), and standard deviation of one estimate."""
    norm = np.linalg.norm(report.gradient)
    bias = np.sqrt(np.maximum(report.bias_norm**2 - report.bias_norm_error**2, 0))
    return np.where(report.biased, bias, 0) / norm, np.sqrt(report.variance) / norm


def reports(draws):
    """For each family, a report for each of the functions."""
    for title, (f, q, methods) in PROBLEMS.items():
        whole = gradient_report(jax.random.key(0), f, q, methods, draws, batch_size=500)
        yield title, [part(whole, i) for i in range(len(FUNCTIONS))]


def picture(draws):
    figure, axes = plt.subplots(4, 2, figsize=(6.2, 8.8), sharex=True, sharey=True, layout="constrained")
    for column, (title, rows) in zip(axes.T, reports(draws), strict=True):
        column[0].set_title(title, fontsize=11)
        for axis, name, report in zip(column, FUNCTIONS, rows, strict=True):
            for method, calls, bias, sd in zip(
                report.names, report.calls, *parts_of_error(report), strict=True
            ):
                cost = BUDGETS[calls * 0.999 <= BUDGETS]
                error = np.hypot(bias, sd * np.sqrt(calls / cost))
                colour, dashes = LOOKS[method]
                axis.plot(cost, np.maximum(error, BOTTOM), color=colour, ls=dashes, lw=2)
                axis.plot(cost[0], max(error[0], BOTTOM), "o", ms=5, color=colour, clip_on=False)
            axis.grid(alpha=0.3)
            axis.text(
                0.97, 0.94, name, transform=axis.transAxes, ha="right", va="top", fontsize=11, weight="bold"
            )
    axes[0, 0].set(xscale="log", yscale="log", xlim=(0.8, BUDGETS[-1]), ylim=(BOTTOM, TOP))
    axes[0, 0].minorticks_off()
    figure.supylabel("rms error / |gradient|", fontsize=11)
    figure.supxlabel("calls of f, all estimates of one average together", fontsize=11)
    handles = [plt.Line2D([], [], color=c, ls=d, lw=2, label=name) for name, (c, d) in LOOKS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9.5, frameon=False)
    return figure
