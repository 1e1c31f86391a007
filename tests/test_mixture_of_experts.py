"""The mixture of experts: the mixing, the balance loss, gradients of the routers, a small run."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixture_of_experts as example
from command_lines import run

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(9)
LOGITS = jnp.array([0.5, -1.0, 0.2, 1.5])


def test_the_mixture_is_the_weighted_sum_of_its_experts():
    model = example.Mixture(3, 5, 7, 0)
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    weights = np.random.default_rng(1).random((4, 3)).astype(np.float32)
    total = 0
    for e in range(3):
        hidden = np.maximum(x @ model.first.kernel[...][e] + model.first.bias[...][e], 0)
        total += weights[:, e, None] * (hidden @ model.second.kernel[...][e] + model.second.bias[...][e])
    np.testing.assert_allclose(model(jnp.asarray(x), jnp.asarray(weights)), total, rtol=1e-4, atol=1e-5)


def test_balance_is_one_for_even_shares_and_larger_for_others():
    np.testing.assert_allclose(example.imbalance(jnp.full((5, 8), 2 / 8)), 1, rtol=1e-6)
    two_of_eight = jnp.zeros((5, 8)).at[:, :2].set(1.0)
    np.testing.assert_allclose(example.imbalance(two_of_eight), 4, rtol=1e-6)
    each_its_own = jnp.eye(8)  # no image is even, all together are
    np.testing.assert_allclose(example.imbalance(each_its_own), 1, rtol=1e-6)


@pytest.mark.parametrize("name", example.ROUTERS)
def test_weights_sum_to_one_and_the_marginals_are_those_of_the_choice(name):
    """Which experts have the largest weights, over many draws, against the sum over all pairs."""
    n = 100_000
    route = jax.jit(lambda key: example.ROUTERS[name](key, jnp.tile(LOGITS, (n, 1)), 2, 0.1))
    weights, marginals = map(np.asarray, route(KEY))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    p = np.exp(np.asarray(LOGITS, float))
    expected = np.zeros(4)
    pairs = list(itertools.combinations(range(4), 2))
    if name == "simple_top_k":
        chances = np.array([p[i] * p[j] for i, j in pairs])
    else:  # one after another
        total = p.sum()
        chances = np.array([p[i] * p[j] * (1 / (total - p[i]) + 1 / (total - p[j])) for i, j in pairs])
    for (i, j), chance in zip(pairs, chances / chances.sum(), strict=True):
        expected[[i, j]] += chance
    np.testing.assert_allclose(marginals[0], expected, atol=1e-5)
    if name != "relaxed_top_k":
        chosen = (weights > 0).mean(0)
        assert (np.abs(chosen - expected) < 4.8 * np.sqrt(expected * (1 - expected) / n)).all()


@pytest.mark.parametrize("name", example.ROUTERS)
def test_the_router_learns_from_the_outputs(name):
    """Without the balance loss, every expert that can be chosen has a nonzero gradient in its logit."""
    value = jnp.array([1.0, -2.0, 0.5, 3.0])

    def loss(logits, keys):
        weights = jax.vmap(lambda key: example.ROUTERS[name](key, logits, 2, 0.5)[0])(keys)
        return jnp.mean((weights @ value) ** 2)

    slope = jax.jit(jax.grad(loss))(LOGITS, jax.random.split(KEY, 500))
    assert np.isfinite(slope).all() and (np.abs(slope) > 1e-3).all()


def test_command_line(tmp_path, capsys):
    flags = "--experts 4 --hidden 4 --steps 100 --batch-size 32 --balance 1"
    assert run(*flags.split(), "--out", tmp_path / "run", example=example) == 0
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    for name, kinds in results.items():
        for row in kinds.values():
            assert row["accuracy"] > 0.3, name  # .1 by chance
            np.testing.assert_allclose(sum(row["test_share"]), 1, rtol=1e-5)
        spread = {kind: np.ptp(row["shares"][-1]) for kind, row in kinds.items()}
        assert spread["with balance"] < spread["without balance"], name
    assert (tmp_path / "run" / "mixture_of_experts.png").stat().st_size > 10_000
    assert run("--chosen", 9, "--out", tmp_path / "none", example=example) == 2
    assert "--chosen 9 is above the 8 experts; lower it" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
