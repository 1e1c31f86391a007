"""The three problems of the example match other calculations; its answer follows from its table."""

import json
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import which_estimator as example
from relaxit_jax import diagnostics
from relaxit_jax import estimators as es

KEY = jax.random.key(6)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


def test_the_log_evidence_is_that_of_the_gaussian_with_slopes_integrated_out():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=30).astype(np.float32)
    f = example.log_evidence(jnp.asarray(x), jnp.asarray(y), slab=0.4, noise=0.8)
    exact = []
    for on in product((0, 1), repeat=4):
        own = x[:, np.array(on) == 1].astype(float)
        law = multivariate_normal(cov=0.8**2 * np.eye(30) + 0.4**2 * own @ own.T)
        exact.append((on, law.logpdf(y)))
    for on, value in exact[1:]:
        assert f(jnp.array(on, float)) - f(jnp.zeros(4)) == pytest.approx(value - exact[0][1], abs=2e-4)


def test_the_value_of_a_policy_is_what_playing_it_gives():
    chance, goal, free = example.lake()
    np.testing.assert_allclose(chance.sum(-1), 1, rtol=1e-6)
    assert len(free) == 11 and goal.sum() == 1
    problem = example.policy_of_the_lake(KEY)
    moves = np.random.default_rng(1).integers(0, 4, 11)
    at, value = np.eye(16)[0], 0.0
    for time in range(500):  # the law of the field, step by step
        after = np.zeros(16)
        for place, field in enumerate(free):
            after += at[field] * chance[field, moves[place]]
        value += 100 * example.DISCOUNT**time * after @ goal
        at = after
    assert value > 0.1
    assert problem.f(jnp.eye(4)[moves]) == pytest.approx(value, rel=1e-4)
    # a wall: from the corner, left and up only lead away by slipping
    np.testing.assert_allclose(chance[0, 0, [0, 1, 4]], [2 / 3, 0, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("name", ["regression", "lake"])
def test_a_few_steps_of_training_made_it_better(name):
    problem = example.PROBLEMS[name](KEY)
    start = type(problem.q)(jnp.zeros(problem.q.shape), problem.q.event_ndims)
    mean = lambda q: np.asarray(jax.jit(jax.vmap(problem.f))(q.sample(KEY, (4000,))), float)
    before, after = mean(start), mean(problem.q)
    assert after.mean() - before.mean() > 4.5 * np.hypot(before.std(), after.std()) / 4000**0.5


def test_the_encoder_is_that_of_the_autoencoder():
    problem = example.encoder_of_digits(KEY, 0, 3)
    assert problem.q.shape == (3, 20)
    b = problem.q.sample(KEY)
    one = [problem.f(b.at[1].set(1 - b[1]))[i] - problem.f(b)[i] for i in range(3)]
    assert one[0] == one[2] == 0 and one[1] != 0  # each digit has its own bits
    assert (problem.f(b) < -50).all() and (problem.f(b) > -784).all()  # nats of 784 pixels, untrained


def test_the_example_and_its_answer(tmp_path):
    example.main(
        ["--problem", "regression", "--num-samples", "400", "--out", str(tmp_path)], standalone_mode=False
    )
    (found,) = json.loads((tmp_path / "metrics.json").read_text())["problems"].values()
    rows = found["estimators"]
    unbiased = {"reinforce", "reinforce, baseline", "arm", "disarm", "rebar"}
    unbiased |= {"rloo", "rloo, 8 draws", "arms", "arms, 8 draws"}
    for name in unbiased | {"rebar, learned"}:
        assert not rows[name]["biased"], name
    assert rows["straight-through"]["biased"]  # it sees single bits, not columns that stand for each other
    assert rows["disarm"]["variance"] < rows["reinforce"]["variance"]
    assert rows["rebar, learned"]["variance"] < 1.3 * rows["rebar"]["variance"]
    for budget, winner in found["best_at_calls"].items():

        def left(row, budget=int(budget)):
            bias = (row["mse"] - row["variance"]) * row["biased"]
            draws = budget // row["calls"]
            return bias + row["variance"] / draws if draws else np.inf

        assert winner == min(rows, key=lambda name: left(rows[name]))
    assert (tmp_path / "which_estimator.png").stat().st_size > 20_000


def test_learned_rebar_has_less_variance_than_untuned():
    problem = example.policy_of_the_lake(KEY)
    methods = {"untuned": es.rebar, "learned": example.learned_rebar(KEY, problem.f, problem.q)}
    report = diagnostics.gradient_report(KEY, problem.f, problem.q, methods, 4000, reference_samples=2)
    gap = report.variance[0] - report.variance[1]
    assert gap > 3 * np.hypot(*report.mse_error)
