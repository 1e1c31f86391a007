"""Learned control variates, on the smallest problem that needs them.

There is one bit b ~ Bernoulli(sigmoid(theta)) and the loss E (b - t)^2 with t just below one half. The bit
should be 0, but the two outcomes differ only by 1 - 2 t, and the score function sees their sum. Adam
descends theta with four gradients, all unbiased: REINFORCE, REBAR twice, which learns its eta and tau, and
RELAX, whose control variate is a small network of the noisy logit. The control variates are trained in the
same step on the variance of the gradient, with `value_and_grads` and a second Adam (W. Grathwohl et al.
2018, arXiv:1711.00123, section 5.1).

REBAR's control variate is eta times the loss of a relaxed bit, so the loss between its outcomes matters. The
parabola (b - t)^2 is t^2 and (1 - t)^2 at 0 and 1, and near 0 at 1/2. For two outcomes that are almost
equal, c(z) lowers the variance, to first order in eta, in proportion to its value where the bit turns, c(0):
at theta = 0, with z = s r the noisy logit, s the sign and c even, the gradient is s / 2 (f - c(r) + (1 +
exp(-r)) c'(r)) if z is its own second draw, and by parts E[(1 + exp(-r)) c'(r)] = E[c(r)] - c(0). The
parabola has c(0) = 0, so no eta and no tau helps, and REBAR learns eta = 0, which is REINFORCE. The straight
line t^2 + (1 - 2 t) b is the same loss for the same bit, and with it REBAR has hardly any variance.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from common import (
    RATE,
    SEED,
    SIZE,
    FloatRange,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)
from relaxit_jax import estimators

RECORDS = 100  # points along a curve
DRAWS = 1000  # draws to measure a variance with
HIDDEN = 10  # units in the control variate of RELAX


def network(variate, z):
    hidden = jnp.tanh(z[..., None] * variate["first"] + variate["bias"])
    return jnp.sum(hidden @ variate["second"], -1)


def first_layers(key):
    one, two = jax.random.split(key)
    first, bias = jax.random.normal(one, (HIDDEN,)), jax.random.normal(two, (HIDDEN,))
    return {"first": first, "bias": bias, "second": jnp.zeros(HIDDEN)}


def scale_and_temperature(key):
    return {"eta": jnp.array(1.0), "log_tau": jnp.log(0.5)}


def rebar(key, f, q, variate):
    return estimators.rebar(key, f, q, eta=variate["eta"], tau=jnp.exp(variate["log_tau"]))


def relax(key, f, q, variate):
    return estimators.relax(key, f, q, control_variate=functools.partial(network, variate))


def parabola(b, target):
    return jnp.sum((b - target) ** 2, -1)


def line(b, target):
    """The same for bits, but different between them."""
    return jnp.sum(target**2 + (1 - 2 * target) * b, -1)


class Method(NamedTuple):
    estimate: Callable  # (key, f, q, variate)
    variate: Callable  # its initial parameters, from a key
    loss: Callable
    colour: str


METHODS = {
    "reinforce": Method(
        lambda key, f, q, _: estimators.reinforce(key, f, q), lambda key: {}, parabola, "#999999"
    ),
    "rebar, parabola": Method(rebar, scale_and_temperature, parabola, "#E69F00"),
    "rebar, line": Method(rebar, scale_and_temperature, line, "#D55E00"),
    "relax": Method(relax, first_layers, parabola, "#0072B2"),
}


@functools.partial(jax.jit, static_argnames=("method", "steps", "learning_rate", "variate_rate"))
def descend(key, *, method, target, steps, learning_rate, variate_rate):
    """P(b = 1) and the variance of the gradient along a run, and the last parameters of the variate."""
    estimate, first, f, _ = METHODS[method]
    adam, variate_adam = optax.adam(learning_rate), optax.adam(variate_rate)
    first_key, key = jax.random.split(key)
    params, variate = jnp.zeros(1), first(first_key)
    state = params, variate, adam.init(params), variate_adam.init(variate)

    def loss(params, variate, key):
        return estimate(key, lambda b: f(b, target), estimators.Bernoulli(params), variate)

    def step(state, key):
        params, variate, moments, variate_moments = state
        _, gradient, variate_gradient = estimators.value_and_grads(loss, params, variate, key)
        updates, moments = adam.update(gradient, moments)
        variate_updates, variate_moments = variate_adam.update(variate_gradient, variate_moments)
        params = optax.apply_updates(params, updates)
        return (params, optax.apply_updates(variate, variate_updates), moments, variate_moments), None

    def record(state, key):
        key, variance_key = jax.random.split(key)
        slope = jax.vmap(jax.grad(loss), (None, None, 0))
        draws = slope(*state[:2], jax.random.split(variance_key, DRAWS))
        seen = jax.nn.sigmoid(state[0][0]), jnp.var(draws)
        return jax.lax.scan(step, state, jax.random.split(key, steps // RECORDS))[0], seen

    state, (p, variance) = jax.lax.scan(record, state, jax.random.split(key, RECORDS))
    return p, variance, state[1]


def draw(results, target, steps, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    at = np.arange(RECORDS) * (steps // RECORDS)
    for name, (p, variance) in results.items():
        colour = METHODS[name].colour
        low, middle, high = np.quantile(p, [0.1, 0.5, 0.9], axis=0)
        left.plot(at, middle, color=colour, label=name)
        left.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        # if all draws agree, there is no variance to show
        right.plot(at, np.maximum(np.mean(variance, 0), 1e-12), color=colour)
    left.set(
        xlabel="step of Adam", ylabel="P(b = 1)", ylim=(0, 1), title=f"min E (b - {target:g})²: P falls to 0"
    )
    left.legend(fontsize=9, loc="upper left")
    right.set(xlabel="step of Adam", yscale="log", title="variance of one gradient")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option(
    "--target",
    type=FloatRange(0, 0.5, max_open=True),
    default=0.499,
    help="Target t of the loss; the closer to 0.5, the harder.",
)
@click.option(
    "--steps",
    type=click.IntRange(RECORDS, 10_000_000),
    default=10_000,
    help="Number of steps of both optimizers.",
)
@click.option("--seeds", type=SIZE, default=20, help="Number of runs of each method; bands hold 80 %.")
@click.option("--seed", type=SEED, default=0, help="Seed of all draws.")
@click.option("--learning-rate", type=RATE, default=0.01, help="Learning rate of theta.")
@click.option("--variate-rate", type=RATE, default=0.01, help="Learning rate of the control variate.")
@out_option
def main(target, steps, seeds, seed, learning_rate, variate_rate, out):
    """Train one bit with four unbiased gradients, and plot its path and the variance of the gradients.

    Writes metrics.json and control_variates.png.
    """
    out = output_folder(out, "control_variates")
    keys = jax.random.split(jax.random.key(seed), seeds)
    results, table = {}, {}
    for name in tqdm(METHODS, unit="method"):
        train = functools.partial(
            descend,
            method=name,
            target=target,
            steps=steps,
            learning_rate=learning_rate,
            variate_rate=variate_rate,
        )
        p, variance, variate = jax.tree.map(np.asarray, jax.vmap(train)(keys))
        results[name] = p, variance
        table[name] = {
            "probability": p[:, -1].tolist(),
            "variance": [float(variance[:, place].mean()) for place in (0, RECORDS // 2, -1)],
        }
        if "eta" in variate:
            table[name] |= {"eta": variate["eta"].tolist(), "tau": np.exp(variate["log_tau"]).tolist()}
        tqdm.write(
            f"{name:15} P(b = 1) {np.median(p[:, -1]):.4f} (worst {p[:, -1].max():.4f}), variance of the "
            "gradient at the start, half-way and the end "
            + ", ".join(f"{x:.1e}" for x in table[name]["variance"])
        )
    draw(results, target, steps, out / "control_variates.png")
    settings = {"target": target, "steps": steps, "seeds": seeds, "seed": seed}
    settings |= {"learning_rate": learning_rate, "variate_rate": variate_rate}
    write_json(out / "metrics.json", {"results": table, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: control_variates.png, metrics.json")


if __name__ == "__main__":
    run(main)
