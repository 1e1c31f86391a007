"""SIMPLE: its draws, marginals and gradient against the list of all subsets, and at large sizes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import kl_divergence

import relaxit_jax as rj
from cases import ITEMS
from helpers import KEY, P_VALUE, chi_square
from laws import bits_given_their_sum
from relaxit_jax import distributions as rd
from relaxit_jax.samplers import _simple

quick = pytest.mark.usefixtures("fast_compilation")
sizes = pytest.mark.parametrize(("n", "k"), [(1000, 100), (5000, 500)])

LOGITS = np.array([0.5, -1.0, 1.2, 0.1, -2.5, 3.0])


def written_out(logits, k):
    """All k-hot vectors and their probabilities."""
    hot = np.array(
        [np.isin(np.arange(len(logits)), s) for s in itertools.combinations(range(len(logits)), k)]
    )
    return hot.astype(float), bits_given_their_sum(logits, k)


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_marginals_and_their_derivative(k):
    """The derivative of E z, and of the marginals of a draw, is the covariance of z."""
    hot, law = written_out(LOGITS, k)
    mean = law @ hot
    covariance = (hot * law[:, None]).T @ hot - np.outer(mean, mean)

    @jax.jit
    def compiled(logits):
        marginals = rj.simple_top_k_marginals(logits, k)
        draw = lambda logits: rj.simple_top_k(KEY, logits, k)
        forward = jax.jacfwd(rj.simple_top_k_marginals)(logits, k)
        law = rj.simple_top_k_log_prob(jnp.asarray(hot), logits, k)
        return marginals, jax.jacrev(draw)(logits), forward, law

    def by_tree(logits):  # as accelerators do
        marginals = functools.partial(_simple._marginals_by_tree, k)
        return marginals(logits), jax.jacrev(marginals)(logits), jax.jacfwd(marginals)(logits)

    marginals, backward, forward, log_law = compiled(jnp.float32(LOGITS))
    np.testing.assert_allclose(np.exp(log_law), law, rtol=2e-6)
    for found in ((marginals, backward, forward), jax.jit(by_tree)(jnp.float32(LOGITS))):
        np.testing.assert_allclose(found[0], mean, rtol=2e-6)
        for slope in found[1:]:
            np.testing.assert_allclose(slope, covariance, atol=2e-7)


@quick
def test_backward_is_the_difference_of_marginals_in_float64():
    with jax.enable_x64(True):
        weights, way = jnp.cos(jnp.arange(30.0)), jnp.sin(1 + jnp.arange(30.0))
        logits = jnp.asarray(3 * np.random.default_rng(0).normal(size=30))
        total = jax.jit(lambda logits: jnp.sum(weights * rj.simple_top_k_marginals(logits, 7)))
        slope = jax.jit(jax.grad(lambda l: jnp.sum(weights * rj.simple_top_k(KEY, l, 7))))(logits)
        ends = [total(logits + step * way) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, jnp.sum(slope * way), rtol=1e-8)


@quick
def test_draws_have_the_law_of_every_subset():
    """This includes trees with uneven halves, and with nothing to split."""
    for n, k in ((6, 2), (6, 4), (5, 2), (3, 2), (2, 1), (1, 1), (5, 5)):
        hot, law = written_out(LOGITS[:n], k)
        draws = np.asarray(
            jax.jit(lambda key, n=n, k=k: rj.simple_top_k(key, jnp.float32(LOGITS[:n]), k, shape=(200_000,)))(
                KEY
            )
        )
        if len(law) == 1:
            np.testing.assert_array_equal(draws, np.broadcast_to(hot, draws.shape))
            continue
        powers = 2.0 ** np.arange(n)
        order = np.argsort(hot @ powers)
        assert chi_square(np.searchsorted((hot @ powers)[order], draws @ powers), law[order]) > P_VALUE


@quick
def test_hessian_of_the_log_probability_is_minus_the_covariance():
    hot, law = written_out(LOGITS, 3)
    mean = law @ hot
    covariance = (hot * law[:, None]).T @ hot - np.outer(mean, mean)
    value = jnp.float32(hot[4])
    log_prob = lambda logits: rj.simple_top_k_log_prob(value, logits, 3)
    slope, hessian = jax.jit(lambda l: (jax.grad(log_prob)(l), jax.hessian(log_prob)(l)))(jnp.float32(LOGITS))
    np.testing.assert_allclose(slope, hot[4] - mean, atol=5e-7)
    np.testing.assert_allclose(hessian, -covariance, atol=5e-7)


def spread(n):
    """Logits within +-1e4: even; on two levels; fewer on the upper level than k; more."""
    rng = np.random.default_rng(n)
    near = rng.normal(size=n)
    return np.float32(
        [
            rng.uniform(-1e4, 1e4, n),
            1e4 * np.sign(rng.normal(size=n)) + near,
            np.where(np.arange(n) < n // 20, 1e4, -1e4) + near,
            np.where(np.arange(n) < n // 5, 1e4, -1e4) + near,
        ]
    )


@pytest.mark.few(1)
@pytest.mark.usefixtures("as_users_compile")
@sizes
def test_large_problems_are_right_in_float32_and_small_in_memory(n, k):
    """With logits of +-1e4, draws, marginals and gradient agree with float64."""
    weights = np.cos(np.arange(n))

    def total(logits):
        return jnp.sum(weights * rj.simple_top_k_marginals(logits, k).astype(logits.dtype))

    draw = jax.jit(jax.grad(lambda logits: jnp.sum(jnp.float32(weights) * rj.simple_top_k(KEY, logits, k))))
    logits = jnp.asarray(spread(n))
    memory = draw.lower(logits[0]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 4 * n * (k + 1)  # 60 MB for 500 of 5,000
    draws = jax.jit(lambda logits: rj.simple_top_k(KEY, logits, k))(logits)
    assert (draws.sum(-1) == k).all() and ((draws == 0) | (draws == 1)).all()
    # all at the level above what the k-th has are chosen, none below
    assert (draws[2, : n // 20] == 1).all() and (draws[3, n // 5 :] == 0).all()
    slopes = [np.asarray(draw(row)) for row in logits]
    assert np.isfinite(slopes).all()
    with jax.enable_x64(True):
        exact = jax.jit(jax.grad(total))
        for slope, row in zip(slopes, spread(n), strict=True):
            np.testing.assert_allclose(slope, exact(jnp.asarray(row, jnp.float64)), atol=2e-6)


@pytest.mark.few(1)
@quick
@sizes
@pytest.mark.parametrize("row", range(4))
def test_large_problems_are_right_by_the_tree_of_accelerators(row, n, k, for_accelerators):
    logits = spread(n)[row]
    weights = np.cos(np.arange(n))

    def both(logits):
        back = jax.vjp(functools.partial(_simple._slope_of_marginals, k), logits)[1]
        return _simple._marginals(k, logits), back(jnp.asarray(weights, logits.dtype))[0]

    by_tree = for_accelerators(both)(jnp.asarray(logits))
    with jax.enable_x64(True):
        exact = jax.jit(both)(jnp.asarray(logits, jnp.float64))
    for found, expected in zip(by_tree, exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


@quick
def test_a_shape_does_not_multiply_the_table():
    """Draws share the tables of their logits, as their size says."""
    n, k, draws = 200, 50, 500
    sample = jax.jit(lambda logits: rj.simple_top_k(KEY, logits, k, shape=(draws,)))
    memory = sample.lower(jnp.zeros(n)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * n * (k + draws)


@pytest.mark.whole
@quick
def test_what_cannot_be_drawn():
    logits = jnp.array([0.0, 1.0, -jnp.inf, 2.0])
    marginals = rj.simple_top_k_marginals(logits, 2)
    without = rj.simple_top_k_marginals(logits[jnp.array([0, 1, 3])], 2)
    np.testing.assert_allclose(marginals, np.insert(without, 2, 0), rtol=1e-6)
    values = jnp.array([[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 1], [0.5, 0.5, 0, 1], [1, 1, 0, 0]])
    law = jax.jit(lambda logits: rj.simple_top_k_log_prob(values, logits, 2))
    assert (law(logits)[:4] == -jnp.inf).all()
    np.testing.assert_allclose(jnp.exp(law(logits)[4]), 1 / (1 + np.exp(1) + np.exp(2)), rtol=1e-6)
    slope = jax.jacobian(law)(logits)
    assert jnp.isfinite(slope).all() and (slope[:4] == 0).all() and (slope[:, 2] == 0).all()
    np.testing.assert_array_equal(rj.simple_top_k(KEY, logits, 3), [1, 1, 0, 1])
    with pytest.raises(ValueError, match="logits must be above -inf for at least 4"):
        rj.simple_top_k(KEY, logits, 4)
    too_few = jax.jit(
        lambda l: (
            rj.simple_top_k(KEY, l, 4),
            rj.simple_top_k_marginals(l, 4),
            rj.simple_top_k_log_prob(jnp.ones(4), l, 4),
        )
    )
    assert all(jnp.isnan(x).all() for x in too_few(logits))


@pytest.mark.whole
@quick
def test_kl_is_the_sum_over_all_subsets():
    """The value and both gradients are checked; inf if p draws a subset that q excludes."""
    p, q = ITEMS

    def by_enumeration(p, q):
        hot, _ = written_out(ITEMS[0], 2)
        log_p, log_q = (jax.nn.log_softmax(hot @ l) for l in (p, q))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    kl = lambda p, q: kl_divergence(rd.SimpleTopK(logits=p, k=2), rd.SimpleTopK(logits=q, k=2))
    with jax.enable_x64(True):
        wide = jnp.asarray(p, jnp.float64), jnp.asarray(q, jnp.float64)
        both = [jax.jit(jax.value_and_grad(f, (0, 1)))(*wide) for f in (kl, by_enumeration)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *both)
    np.testing.assert_allclose(kl(jnp.asarray(p), jnp.asarray(q)), both[1][0], rtol=1e-5)
    assert kl(jnp.asarray(p), jnp.array([0.0, -jnp.inf, 0.0, 0.0])) == jnp.inf
    assert jnp.isfinite(kl(jnp.array([0.0, -jnp.inf, 0.0, 0.0]), jnp.asarray(p)))
    other = kl_divergence(rd.SimpleTopK(logits=p, k=2), rd.SimpleTopK(logits=q, k=3))
    assert other == jnp.inf


@quick
def test_rows_with_a_count_of_their_own_have_its_law():
    """Draws, marginals, probabilities and gradients of each row are the sums over the subsets of its size."""
    logits = jnp.asarray(np.float32([[0.3, -1.0, 0.5, 2.0]] * 4))
    count = jnp.arange(4)
    marginals = jax.jit(lambda l: rj.simple_top_k_marginals(l, 3, count=count))(logits)
    draws = jax.jit(lambda l: rj.simple_top_k(KEY, l, 3, count=count, shape=(20_000, 4)))(logits)
    assert (draws.sum(-1) == count).all()
    slopes = jax.jit(jax.jacobian(lambda l: rj.simple_top_k_marginals(l, 3, count=count)))(logits)
    laws = jax.jit(lambda z, count: rj.simple_top_k_log_prob(z, logits, 3, count=count))
    law = laws(draws[0], count)
    for i in range(4):
        hot, p = written_out(np.asarray(logits[i], float), i)
        mean = p @ hot
        np.testing.assert_allclose(marginals[i], mean, rtol=1e-5)
        error = 4.5 * np.sqrt(mean * (1 - mean) / 20_000)
        assert (np.abs(draws[:, i].mean(0) - mean) <= error + 1e-7).all()
        covariance = (hot * p[:, None]).T @ hot - np.outer(mean, mean)
        np.testing.assert_allclose(slopes[i, :, i], covariance, atol=1e-6)
        own = np.log(p[(hot == draws[0, i]).all(-1)])
        np.testing.assert_allclose(law[i], own[0], rtol=1e-5, atol=1e-6)
    back = lambda l: jnp.sum(jnp.cos(jnp.arange(4.0)) * rj.simple_top_k(KEY, l, 3, count=count), -1)
    expected = jnp.einsum("j,ijik->ik", jnp.cos(jnp.arange(4.0)), slopes)
    np.testing.assert_allclose(
        jnp.einsum("iik->ik", jax.jit(jax.jacobian(back))(logits)), expected, atol=1e-6
    )
    assert (laws(draws[0], count[::-1]) == -jnp.inf).all()


@pytest.mark.whole
@quick
def test_counts_by_the_tree_of_accelerators(for_accelerators):
    logits, count = jnp.float32([0.3, -1.0, 0.5, 2.0, -jnp.inf]), jnp.array([0, 3, 1, 2])
    marginals = functools.partial(rj.simple_top_k_marginals, k=3, count=count)
    np.testing.assert_allclose(for_accelerators(marginals)(logits), marginals(logits), atol=1e-6)


@quick
def test_counts_that_cannot_be():
    logits = jnp.array([0.0, 1.0, -jnp.inf])
    with pytest.raises(ValueError, match=r"count must be integers in 0\.\.2"):
        rj.simple_top_k(KEY, logits, 2, count=3)
    with pytest.raises(ValueError, match="logits must be above -inf for at least count"):
        rj.simple_top_k(KEY, logits, 3, count=3)
    traced = jax.jit(lambda l, c: rj.simple_top_k(KEY, l, 3, count=c))
    assert np.isnan(traced(logits, 3)).all() and np.isnan(traced(logits, 4)).all()
    assert np.isnan(traced(logits, -1)).all() and (traced(logits, 2) == jnp.array([1, 1, 0])).all()


@quick
def test_indices_of_the_ones():
    z = rj.simple_top_k(KEY, jnp.zeros((50, 9)), 4, count=jnp.arange(50) % 5)
    indices = np.asarray(rj.k_hot_indices(z, 4))
    for row, found in zip(np.asarray(z), indices, strict=True):
        ones = np.flatnonzero(row)
        np.testing.assert_array_equal(found, np.append(ones, [9] * (4 - len(ones))))
    table = jax.random.normal(KEY, (9, 3))
    looked_up = table.at[indices].get(mode="fill", fill_value=0).sum(-2)
    np.testing.assert_allclose(looked_up, z @ table, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="value must be zeros and at most 2 ones"):
        rj.k_hot_indices(jnp.ones(3), 2)
