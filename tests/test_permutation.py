"""Gumbel-Sinkhorn compared with its definition, its derivative, and SciPy's assignment."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import relaxit_jax as rj
from helpers import KEY, P_VALUE, chi_square
from relaxit_jax import _math as lm
from relaxit_jax import _random as rng

pytestmark = pytest.mark.usefixtures("fast_compilation")


def perturbed(logits, shape=()):
    """logits + G for the same key, in float64."""
    logits = jnp.asarray(logits, jnp.float32)
    noise = rng.gumbel(KEY, (*shape, *logits.shape[-2:]), logits)
    return np.asarray(lm.centre(logits) + noise, np.float64)


def rounds(a, count):
    """Rows and columns in turn."""

    def one(a, _):
        a = a - jax.nn.logsumexp(a, -1, keepdims=True)
        return a - jax.nn.logsumexp(a, -2, keepdims=True), None

    return jnp.exp(jax.lax.scan(one, a, length=count)[0])


@pytest.mark.whole
@pytest.mark.parametrize(("n", "tau"), [(3, 0.2), (12, 1.0)])
def test_it_is_the_limit_of_normalising_rows_and_columns_in_turn(n, tau):
    """Value and gradient in float32, compared with a long unrolled loop in float64."""
    logits, way = np.random.default_rng(n).normal(size=(2, n, n))
    weights = jnp.float32(way)
    total = lambda x: (jnp.sum(weights * (z := rj.gumbel_sinkhorn(KEY, x, tau))), z)
    slope, z = jax.jit(jax.grad(total, has_aux=True))(jnp.float32(logits))
    with jax.enable_x64(True):
        exact = lambda x: (jnp.sum(jnp.asarray(way) * (z := rounds(x / tau, 5000))), z)
        exact_slope, exact_z = jax.jit(jax.grad(exact, has_aux=True))(jnp.asarray(perturbed(logits)))
        assert abs(exact_z.sum(-1) - 1).max() < 1e-8
    np.testing.assert_allclose(z, exact_z, atol=2e-5)
    np.testing.assert_allclose(slope, exact_slope, atol=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("n", [2, 10, 100])
def test_rows_and_columns_sum_to_one(n):
    """The error is below 2e-5, which normalizing in turn reaches after some 10,000 rounds at tau = 0.05."""
    scale = np.repeat([0.0, 1.0, 20.0], 3)[:, None, None]
    logits = jnp.float32(scale * np.random.default_rng(n).normal(size=(9, n, n)))
    z = jax.jit(rj.gumbel_sinkhorn)(KEY, logits, 0.05)
    np.testing.assert_allclose([z.sum(-1), z.sum(-2)], 1, atol=2e-5)
    assert (z >= 0).all()


@pytest.mark.parametrize("tau", [0.01, 1e-3])
def test_columns_sum_to_one_where_one_number_would_not_resolve_them(tau):
    """Most matrices are nearly permutations there; some of the 100 have shared places."""
    logits = jnp.float32(np.random.default_rng(0).normal(size=(100, 50, 50)))
    z = jax.jit(rj.gumbel_sinkhorn)(KEY, logits, tau)
    assert ((z > 0.1) & (z < 0.9)).any()
    np.testing.assert_allclose(z.sum(-2), 1, atol=2e-5)


@pytest.mark.whole
def test_a_hard_draw_is_the_best_assignment():
    for n, count in ((7, 50), (60, 20)):
        logits = np.float32(np.random.default_rng(n).normal(size=(count, n, n)))
        hard = jax.jit(lambda l: rj.gumbel_sinkhorn(KEY, l, 0.5, hard=True))(logits)
        for chosen, weights in zip(np.asarray(hard), perturbed(logits, (count,)), strict=True):
            np.testing.assert_array_equal(chosen[linear_sum_assignment(weights, maximize=True)], 1)
            assert chosen.sum() == n


@pytest.mark.whole
def test_a_hard_draw_has_the_gradient_of_the_soft_one_and_is_finite_at_extremes():
    logits = np.random.default_rng(4).normal(size=(30, 4, 4))
    way = jnp.float32(np.random.default_rng(5).normal(size=(4, 4)))

    @jax.jit
    def both(logits, tau):
        total = lambda l, t, hard: (jnp.sum(way * (z := rj.gumbel_sinkhorn(KEY, l, t, hard=hard))), z)
        return [jax.grad(total, (0, 1), has_aux=True)(logits, tau, hard) for hard in (False, True)]

    (soft, _), (hard, z) = both(jnp.float32(logits), 0.5)
    for one, other in zip(soft, hard, strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(np.unique(z)) == {0, 1} and (z.sum(-1) == 1).all() and (z.sum(-2) == 1).all()
    low = jnp.asarray(logits[:2], jnp.bfloat16)
    taus = jnp.array([[0.5], [2.0], [0.1]])
    draw = jax.jit(lambda l, t: rj.gumbel_sinkhorn(KEY, l, t, shape=(3, 2), hard=True))
    assert draw(low, taus).dtype == jnp.bfloat16  # of the same noise, at any temperature of a batch
    np.testing.assert_array_equal(draw(low, taus), draw(low.astype(jnp.float32), 1.0))
    for scale, tau in ((1e4, 1e-3), (1e4, 1e3)):
        chex.assert_tree_all_finite(both(jnp.float32(scale * np.sign(logits)), tau))
    assert jnp.isnan(both(jnp.full((30, 4, 4), jnp.nan), 1.0)[1][1]).all()


@pytest.mark.whole
@pytest.mark.parametrize(("hard", "tau"), [(True, 0.5), (False, 1e-3)])
def test_two_places_have_the_law_of_the_sum_of_two_logistics(hard, tau):
    """They stay if d + L + L' > 0: F(d) = e^d (e^d - 1 - d) / (e^d - 1)^2."""
    d, n = 1.3, 100_000
    keep = np.exp(d) * (np.exp(d) - 1 - d) / (np.exp(d) - 1) ** 2
    draw = jax.jit(
        lambda key: rj.gumbel_sinkhorn(key, jnp.array([[d, 0], [0, 0.0]]), tau, shape=(n,), hard=hard)
    )
    stays = np.asarray(draw(KEY)[:, 0, 0] > 0.5).astype(int)
    assert chi_square(stays, np.array([1 - keep, keep])) > P_VALUE


def test_gradient_is_that_of_the_limit():
    """Differences in float64 check it, in the logits and in tau, also where rounds would take too long."""
    rng = np.random.default_rng(3)
    x, across, way = rng.normal(size=(3, 5, 5))

    def total(scale, tau, way):
        return jnp.sum(way * rj.gumbel_sinkhorn(KEY, scale, tau))

    compiled = jax.jit(jax.value_and_grad(total, (0, 1)))
    for tau, scale in ((1.0, 1.0), (0.3, 2.0), (0.05, 3.0)):
        with jax.enable_x64(True):
            logits, weights = jnp.asarray(scale * x), jnp.asarray(way)
            slope, slope_of_tau = compiled(logits, tau, weights)[1]
            ends = [compiled(logits + h * across, tau, weights)[0] for h in (1e-5, -1e-5)]
            difference = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(difference, np.sum(slope * across), rtol=1e-5, atol=1e-8)
            ends = [compiled(logits, tau + h, weights)[0] for h in (1e-6, -1e-6)]
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope_of_tau, rtol=1e-5, atol=1e-7)


@pytest.mark.whole
def test_memory_does_not_grow_with_the_steps():
    logits = jnp.zeros((8, 30, 30))
    sizes = []
    for num_iters in (20, 2000):
        loss = jax.jit(jax.grad(lambda l, m=num_iters: jnp.sum(rj.gumbel_sinkhorn(KEY, l, 0.1, m) ** 2)))
        sizes.append(loss.lower(logits).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] == sizes[1] < 12 * logits.nbytes


@pytest.mark.whole
def test_impossible_places():
    """A triangle leaves one permutation; if none is left, it is an error, or NaN under a trace."""
    logits = jnp.where(jnp.tril(jnp.ones((4, 4))) > 0, 0.3, -jnp.inf)
    for hard in (False, True):
        draw = jax.jit(lambda l, hard=hard: rj.gumbel_sinkhorn(KEY, l, 0.5, hard=hard))
        np.testing.assert_allclose(draw(logits), np.eye(4), atol=1e-4)
        slope = jax.grad(lambda l, draw=draw: jnp.sum(jnp.cos(draw(l))))(logits.at[0, 1].set(1.0))
        assert jnp.isfinite(slope).all() and (slope[jnp.isinf(logits)][1:] == 0).all()
        none = logits.at[1, 1].set(-jnp.inf)
        with pytest.raises(ValueError, match="logits must be such that a permutation is possible"):
            rj.gumbel_sinkhorn(KEY, none, 0.5, hard=hard)
        assert jnp.isnan(draw(none)).all()
    with pytest.raises(ValueError, match=r"logits must be of shape \(..., 3, 3\)"):
        rj.gumbel_sinkhorn(KEY, jnp.zeros((2, 3)), 0.5)


@pytest.mark.whole
def test_an_item_that_is_sure_to_be_last():
    """With a logit of -inf, the others keep their law, and it has no gradient; two are an error, or NaN."""
    logits = jnp.array([0.3, -jnp.inf, 1.0])
    draw = lambda l, hard, tau=0.5: rj.relaxed_permutation(KEY, l, tau, shape=(5000,), hard=hard)
    hard, soft, cold = jax.jit(lambda l: (draw(l, True), draw(l, False), draw(l, False, 1e-3)))(logits)
    for z in (hard, soft):
        assert (z[:, 2] == jnp.array([0, 1, 0])).all() and (z[:, :, 1].sum(-1) == 1).all()
    p = np.exp([1.0, 0.3]) / np.exp([1.0, 0.3]).sum()
    assert chi_square(np.asarray(hard[:, 0, 0], int), p) > P_VALUE
    assert np.mean(np.abs(cold - hard).max((-1, -2)) < 1e-3) > 0.95
    orders = np.eye(3)[[[2, 0, 1], [0, 2, 1], [1, 0, 2]]]
    law = rj.relaxed_permutation_log_prob(orders, logits)
    np.testing.assert_allclose(np.exp(law), [*p, 0], rtol=1e-6)
    way = jnp.cos(jnp.arange(9.0)).reshape(3, 3)
    total = lambda l: jnp.sum(way * draw(l, False)) + jnp.sum(rj.relaxed_permutation_log_prob(orders[:2], l))
    slope = jax.jit(jax.grad(total))(logits)
    assert jnp.isfinite(slope).all() and slope[1] == 0 and (slope[::2] != 0).all()
    none = jnp.array([0.3, -jnp.inf, -jnp.inf])
    with pytest.raises(ValueError, match="logits must be above -inf for at least 2"):
        rj.relaxed_permutation(KEY, none, 0.5)
    assert jnp.isnan(jax.jit(lambda l: draw(l, True))(none)).all()
    assert jnp.isnan(jax.jit(rj.relaxed_permutation_log_prob)(jnp.eye(3), none))
