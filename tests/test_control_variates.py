"""The small problem of the control variates: the claims of its docstring, and where its runs end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import control_variates as toy
from relaxit_jax import estimators

KEY = jax.random.key(4)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


@pytest.mark.parametrize("loss", [toy.parabola, toy.line], ids=lambda f: f.__name__)
def test_how_much_rebar_helps_is_its_loss_where_the_bit_turns(loss):
    """The slope of E |g|^2 in eta at 0, for two equal outcomes, is -c(0) f / 2, whatever tau is."""

    def objective(theta, eta, key, tau):
        f = lambda b: loss(b, 0.5)
        return estimators.rebar(key, f, estimators.Bernoulli(theta), eta=eta, tau=tau)

    for tau in (0.3, 2.0):
        one = lambda key, tau=tau: estimators.value_and_grads(objective, jnp.zeros(1), 0.0, key, tau)[2]
        slopes = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 200_000)), float)
        expected = -float(loss(jnp.array([0.5]), 0.5)) * 0.25 / 2
        assert abs(slopes.mean() - expected) < 4.5 * slopes.std() / len(slopes) ** 0.5 + 1e-6
        assert 4.5 * slopes.std() / len(slopes) ** 0.5 < 0.01  # of line it is -0.031


def test_the_example_shows_who_converges(tmp_path, monkeypatch):
    """Variance decides: the two methods with a fitting variate reach the bit's 0, the others scatter."""
    monkeypatch.setattr(toy, "DRAWS", 100)
    toy.main(["--steps", "4000", "--seeds", "8", "--out", str(tmp_path)], standalone_mode=False)
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert set(results) == set(toy.METHODS)
    ends = {name: np.array(row["probability"]) for name, row in results.items()}
    assert ends["rebar, line"].max() < 0.1 and ends["relax"].max() < 0.45
    for name in ("reinforce", "rebar, parabola"):
        assert np.ptp(ends[name]) > 3 * np.ptp(ends["rebar, line"])
        assert results[name]["variance"][-1] > 100 * results["rebar, line"]["variance"][-1]
    assert results["relax"]["variance"][-1] < 0.1 * results["relax"]["variance"][0]
    assert (tmp_path / "control_variates.png").stat().st_size > 10_000
