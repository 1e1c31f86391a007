"""The example that compares gradients: its exact gradient is exact, and its biases agree with theory."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from scipy.special import softmax

import choose_temperature as example
from common import UserError

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
PROBLEM = example.make_problem(2, 3, 4)
EXACT = [example.exact_gradient(PROBLEM[0], slopes) for slopes in PROBLEM[1]]


def expectation(logits, slopes):
    """E f, as a sum of all terms."""
    total = 0
    for chosen in itertools.product(range(3), repeat=2):
        on = np.array([chosen[0], 3 + chosen[1]])  # where z is 1
        value = slopes[0][on].sum()
        value += slopes[1][np.ix_(on, on)].sum() / 2 if len(slopes) > 1 else 0
        value += slopes[2][np.ix_(on, on, on)].sum() / 6 if len(slopes) > 2 else 0
        total += softmax(logits[0])[chosen[0]] * softmax(logits[1])[chosen[1]] * value
    return total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_gradient_is_that_of_the_sum_over_all_values(order):
    logits, slopes = PROBLEM[0], PROBLEM[1][order - 1]
    numeric = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        numeric[place] = (expectation(logits + step, slopes) - expectation(logits - step, slopes)) / 2e-5
    np.testing.assert_allclose(EXACT[order - 1], numeric, atol=1e-8)


@functools.cache
def measured(name, tau):
    draw = example.METHODS[name][0]
    return example.measure(draw, tau, PROBLEM, EXACT, 40_000, 5, 10, jax.random.key(0))


def test_biases_at_temperature_one_are_those_of_first_and_second_order():
    """A gradient of order k has no bias for functions up to order k, and has one beyond."""
    first, second = measured("straight_through_categorical", 1.0), measured("reinmax", 1.0)
    for row in (first[0], second[0], second[1]):
        assert row["bias"] < 4.5 * row["standard_error"] + example.ROUNDING
    for row in (first[1], first[2], second[2]):
        assert row["bias"] > 4.5 * row["standard_error"] and row["biased"]
    assert first[0]["standard_deviation"] < example.ROUNDING  # of a linear function all draws agree


def test_methods_of_one_mean_have_one_bias():
    """Averaging over noise given the draw, or a forward temperature, leaves the mean unchanged."""
    plain, *others = (
        measured(n, 0.5) for n in ("gumbel_softmax_hard", "gumbel_rao", "decoupled_gumbel_softmax")
    )
    for other in others:
        for a, b in zip(plain, other, strict=True):
            assert abs(a["bias"] - b["bias"]) < 4.5 * np.hypot(a["standard_error"], b["standard_error"])
    assert all(
        a["standard_deviation"] > b["standard_deviation"] for a, b in zip(plain, others[0], strict=True)
    )


def test_nothing_is_compiled_again_for_another_temperature():
    traced = []

    def draw(*arguments):
        traced.append(1)
        return example.METHODS["reinmax"][0](*arguments)

    for tau in (0.3, 3.0, 7.0):
        example.measure(draw, tau, PROBLEM, EXACT, 100, 1, 1, jax.random.key(0))
    assert len(traced) == 1


def test_example_from_flags_to_files(tmp_path, capsys):
    flags = "--samples 200 --variables 1 --classes 2 --num-samples 1 --draws 1 --out"
    example.main([*flags.split(), str(tmp_path)], standalone_mode=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["draws"] == 1 and set(metrics["results"]) == set(example.METHODS)
    printed = capsys.readouterr().out
    for name, curves in metrics["results"].items():
        for rows in curves.values():
            np.testing.assert_allclose([row["tau"] for row in rows], example.TAUS)
            for row in rows:
                parts = np.hypot(row["bias"], row["standard_deviation"])
                np.testing.assert_allclose(row["rms_error"], parts)
        lowest = min(curves["cubic"], key=lambda row: row["rms_error"])
        line = next(line for line in printed.splitlines() if line.startswith(name + " "))
        assert line.split()[-3:] == [f"{lowest['rms_error']:.2f}", "@", f"{lowest['tau']:.2g}"]
    assert (tmp_path / "errors.png").stat().st_size > 10_000


def test_too_many_values_to_enumerate_is_an_error_that_says_so(tmp_path):
    with pytest.raises(UserError, match="lower --variables or --classes to 20000 or fewer"):
        example.main(["--variables", "10", "--out", str(tmp_path / "new")], standalone_mode=False)
    assert not (tmp_path / "new").exists()
