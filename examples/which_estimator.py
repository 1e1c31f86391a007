"""Which gradient estimator does a problem need? Three real ones, measured with `gradient_report`.

- `vae`: the encoder of examples/vae.py, trained for some epochs. The variables are the bits of a few test
  digits, and f is the log-likelihood of their pixels. There are too many outcomes to sum over, so a long
  unbiased run serves as the truth.
- `regression`: which columns of scikit-learn's diabetes table belong in a linear model. There is a bit for
  each column, and f is the log-evidence with all slopes integrated out. The truth is the sum over all 1,024
  subsets.
- `lake`: a policy for the slippery frozen lake, with 4 x 4 fields. There is one of four moves for each field
  with a choice, and f is the discounted probability of reaching the goal, from the solution of Bellman's
  equations.

It matters where you measure: a few steps into training, neither at the start nor at the end, where the
gradient vanishes. The picture shows the error of an average of estimates over its cost, in calls of f and in
seconds. Use the method with the lowest line at the cost that you pay for a step.
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

import methods
import relaxit_jax as rj
import vae
from common import (
    SEED,
    load_images,
    out_option,
    output_folder,
    run,
    save_figure,
    split_images,
    versions,
    write_json,
)
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import from_sampler, gradient_report

BUDGETS = (10, 100, 10_000)  # calls of f, for the table of the best
LAKE = ("SFFF", "FHFH", "FFFH", "HFFG")  # start, frozen, hole, goal
DISCOUNT = 0.95


class Problem(NamedTuple):
    title: str
    f: Callable
    q: es.Bernoulli | es.OneHotCategorical


def encoder_of_digits(key, epochs, digits):
    """20 bits for each of some test digits, from an encoder trained with disarm."""
    config = vae.Config(
        method="disarm", data="mnist5k", epochs=epochs, seed=0, latents=20, variables=20, classes=10,
        subset_size=10, largest_mean=8.0, correlation="identity", tau_start=0.5, tau_end=0.5, hidden=(400,),
        activation="relu", prior="learned", augment=False, centre=True, batch_size=100, learning_rate=1e-3,
        schedule="constant",
    )  # fmt: skip
    experiment = vae.Experiment(config, *split_images(load_images("mnist5k")))
    state = experiment.state
    for number in tqdm(range(epochs), unit="epoch", desc="training the VAE"):
        state, _ = experiment.epoch(state, experiment.grey, number)
    x = experiment.test[:digits]
    model = experiment.model(state[0])
    f = lambda b: model.log_likelihood(x, experiment.family.code(b))
    return Problem(f"VAE, 20 bits of each of {digits} digits", f, es.Bernoulli(model.encode(x)[0]))


def log_evidence(x, y, slab=0.3, noise=0.7):
    """Log-evidence of the selected columns: slopes ~ N(0, slab^2), y of variance 1; smooth in between."""
    gram, xy, ratio = x.T @ x, x.T @ y, (slab / noise) ** 2

    def f(b):
        a = jnp.eye(len(xy)) + ratio * b[:, None] * gram * b
        mean = ratio * jnp.linalg.solve(a, b * xy)
        return mean @ (b * xy) / (2 * noise**2) - jnp.linalg.slogdet(a)[1] / 2

    return f


def columns_of_diabetes(key):
    from sklearn.datasets import load_diabetes

    x, y = (jnp.asarray((a - a.mean(0)) / a.std(0), jnp.float32) for a in load_diabetes(return_X_y=True))
    f = log_evidence(x, y)
    q = ascend(key, f, es.Bernoulli(jnp.zeros(x.shape[1])), 20)
    return Problem("sparse regression, 10 columns", f, q)


def lake():
    """P(next field | field, move), the reward of each next field, and the fields with a choice."""
    fields = "".join(LAKE)
    n = len(LAKE)
    moves = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])
    chance = np.zeros((n * n, 4, n * n), np.float32)
    for field, move, turn in np.ndindex(n * n, 4, 3):
        # it slips: as intended, or to one of the two sides, a third each
        row, column = np.clip(np.array(divmod(field, n)) + moves[(move + turn - 1) % 4], 0, n - 1)
        chance[field, move, row * n + column] += 1 / 3
    goal = np.array([field == "G" for field in fields], np.float32)
    return chance, goal, np.array([i for i, field in enumerate(fields) if field in "SF"])


def policy_of_the_lake(key):
    chance, goal, free = lake()
    step, arrive = jnp.asarray(chance[free][:, :, free]), jnp.asarray(chance[free] @ goal)

    def f(b):
        """The discounted probability of arriving from the start, times 100."""
        transition = jnp.einsum("sa,sat->st", b, step)
        values = jnp.linalg.solve(jnp.eye(len(free)) - DISCOUNT * transition, jnp.sum(b * arrive, -1))
        return 100 * values[0]

    q = ascend(key, f, es.OneHotCategorical(jnp.zeros((len(free), 4))), 20)
    return Problem(f"frozen lake, 4 moves in each of {len(free)} fields", f, q)


def ascend(key, f, q, steps):
    """Take some steps of Adam, with rloo and many draws."""
    adam = optax.adam(0.1)
    loss = lambda logits, key: -es.rloo(key, f, type(q)(logits, q.event_ndims), num_samples=64)

    def step(state, key):
        updates, moments = adam.update(jax.grad(loss)(state[0], key), state[1])
        return (optax.apply_updates(state[0], updates), moments), None

    (logits, _), _ = jax.lax.scan(step, (q.logits, adam.init(q.logits)), jax.random.split(key, steps))
    return type(q)(logits, q.event_ndims)


def learned_rebar(key, f, q, steps=200):
    """REBAR with the eta and tau that 200 steps of Adam find from the variance of its gradient."""
    adam = optax.adam(0.02)
    variate = methods.rebar_variate(key, q, 0.5)

    def loss(logits, variate, key):
        family = type(q)(logits, q.event_ndims)
        return jnp.sum(methods.rebar(key, f, family, variate))

    def step(state, key):
        gradient = es.value_and_grads(loss, q.logits, state[0], key)[2]
        updates, moments = adam.update(gradient, state[1])
        return (optax.apply_updates(state[0], updates), moments), None

    run = jax.jit(lambda key: jax.lax.scan(step, (variate, adam.init(variate)), jax.random.split(key, steps)))
    return functools.partial(methods.rebar, variate=run(key)[0][0])


def methods_of(key, problem):
    """Every estimator for these variables, and the samplers that can replace them, which are biased."""
    found = {
        "reinforce": es.reinforce, "reinforce, baseline": functools.partial(methods.reinforce, variate=None),
        "rloo": es.rloo, "rloo, 8 draws": functools.partial(es.rloo, num_samples=8),
        "arms": es.arms, "arms, 8 draws": functools.partial(es.arms, num_samples=8),
    }  # fmt: skip
    if isinstance(problem.q, es.Bernoulli):
        found |= {"arm": es.arm, "disarm": es.disarm}
        samplers = {
            "straight-through": rj.straight_through_bernoulli,
            "relaxed, tau 0.5": lambda key, logits: rj.relaxed_bernoulli(key, logits, 0.5),
            "relaxed, hard": lambda key, logits: rj.relaxed_bernoulli(key, logits, 0.5, hard=True),
        }
    else:
        samplers = {
            "straight-through": rj.straight_through_categorical,
            "Gumbel-softmax, 0.5": lambda key, logits: rj.gumbel_softmax(key, logits, 0.5),
            "ReinMax": rj.reinmax,
        }
    found |= {"rebar": es.rebar, "rebar, learned": learned_rebar(key, *problem[1:])}
    return found | {name: from_sampler(sampler) for name, sampler in samplers.items()}


PROBLEMS = {"vae": encoder_of_digits, "regression": columns_of_diabetes, "lake": policy_of_the_lake}


def mean_squared_error(report, name, cost, budget):
    """For the average of as many estimates as the budget pays for; infinite if it does not pay for one."""
    row = report[name]
    draws = budget // row[cost]
    return (row["mse"] - row["variance"]) * row["biased"] + row["variance"] / draws if draws else np.inf


def best(report, budget):
    return min(report.names, key=lambda name: mean_squared_error(report, name, "calls", budget))


@click.command(context_settings={"show_default": True})
@click.option(
    "--problem",
    "problems",
    type=click.Choice(list(PROBLEMS)),
    multiple=True,
    default=list(PROBLEMS),
    help="Problem to measure on; may be given more than once.",
)
@click.option(
    "--num-samples",
    type=click.IntRange(100, 100_000),
    default=2000,
    help="Number of estimates from each method.",
)
@click.option(
    "--epochs",
    type=click.IntRange(0, 10_000),
    default=10,
    help="Number of epochs that the VAE is trained before measuring.",
)
@click.option(
    "--digits", type=click.IntRange(1, 1000), default=10, help="Number of test digits that the VAE encodes."
)
@click.option("--seed", type=SEED, default=0, help="Seed of all draws.")
@out_option
def main(problems, num_samples, epochs, digits, seed, out):
    """Measure bias, variance and cost of every gradient estimator on three problems.

    Prints a table for each, and writes metrics.json and which_estimator.png.
    """
    out = output_folder(out, "which_estimator")
    results = {}
    figure, axes = plt.subplots(
        2, len(problems), figsize=(6.4 * len(problems), 9), squeeze=False, layout="constrained"
    )
    for column, name in zip(axes.T, problems, strict=True):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), list(PROBLEMS).index(name)), 3)
        extra = (epochs, digits) if name == "vae" else ()
        problem = PROBLEMS[name](keys[0], *extra)
        estimators = methods_of(keys[1], problem)
        click.echo(f"{problem.title}: {len(estimators)} methods, {num_samples} estimates of each", err=True)
        report = gradient_report(keys[2], problem.f, problem.q, estimators, num_samples)
        budgets = {str(budget): best(report, budget) for budget in BUDGETS}
        results[name] = report.as_dict() | {"title": problem.title, "best_at_calls": budgets}
        click.echo(f"\n{problem.title}\n{report}")
        click.echo(
            "best for " + ", ".join(f"{n} calls of f: {winner}" for n, winner in budgets.items()) + "\n"
        )
        for axis, cost in zip(column, ("calls", "seconds"), strict=True):
            report.plot(axis, cost=cost)
        column[0].set_title(problem.title)
    save_figure(figure, out / "which_estimator.png")
    settings = {"num_samples": num_samples, "epochs": epochs, "digits": digits, "seed": seed}
    write_json(out / "metrics.json", {"problems": results, "settings": settings, "versions": versions()})
    click.echo(f"in {out}: which_estimator.png, metrics.json")


if __name__ == "__main__":
    run(main)
