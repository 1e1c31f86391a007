"""Draws without replacement: their probabilities against enumeration, and the facts of a relaxed draw."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats

import relaxit_jax as rj
from cases import ITEMS
from helpers import KEY, P_VALUE, chi_square, quick
from laws import orders, subsets

SETS = np.array(list(itertools.combinations(range(4), 2)))


@pytest.mark.few(1)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_log_prob_against_enumeration(k):
    order = np.array(list(itertools.permutations(range(4), k)))
    sets = np.array(list(itertools.combinations(range(4), k)))

    @jax.jit
    def laws(logits):
        law = functools.partial(rj.gumbel_top_k_log_prob, logits=logits)
        return law(order), law(sets, ordered=False)

    for logits in (*ITEMS, *20 * ITEMS):
        with np.errstate(divide="ignore"):
            ordered = np.log(orders(logits, k))
            unordered = np.log(subsets(logits, k))
        np.testing.assert_allclose(laws(logits)[0], ordered, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(laws(logits)[1], unordered, rtol=2e-5, atol=2e-6)


def test_sets_are_drawn_with_their_probability():
    indices, _ = jax.jit(lambda logits: rj.gumbel_top_k(KEY, logits, 2, shape=(100_000, 2)))(ITEMS)
    log_prob = jax.jit(lambda logits: rj.gumbel_top_k_log_prob(SETS, logits, ordered=False))
    codes = np.sort(indices, -1) @ np.array([4, 1])
    for i in range(2):
        law = np.exp(log_prob(ITEMS[i]))
        assert chi_square(np.searchsorted(SETS @ [4, 1], codes[:, i]), law) > P_VALUE


@pytest.mark.whole
def test_one_of_n_is_a_category():
    """The value is the largest of Gumbels at the logits: a Gumbel at their log-sum-exp."""

    @jax.jit
    def draws(logits):
        indices, values = rj.gumbel_top_k(KEY, logits, 1, shape=(100_000, 2))
        return (
            indices[..., 0],
            values[..., 0],
            rj.relaxed_top_k(KEY, logits, 1, 0.5, shape=(100_000, 2), hard=True),
        )

    indices, values, k_hot = draws(ITEMS)
    np.testing.assert_array_equal(np.argmax(k_hot, -1), indices)
    for i in range(2):
        assert chi_square(indices[:, i], sp.softmax(ITEMS[i])) > P_VALUE
        gumbel = scipy.stats.gumbel_r(loc=sp.logsumexp(ITEMS[i]))
        assert scipy.stats.kstest(np.asarray(values[:2000, i]), gumbel.cdf).pvalue > P_VALUE
    slopes = jax.jacobian(lambda logits: rj.gumbel_top_k(KEY, logits, 1)[1][:, 0])(jnp.asarray(ITEMS))
    hot = jax.nn.one_hot(rj.gumbel_top_k(KEY, ITEMS, 1)[0][:, 0], 4)
    np.testing.assert_array_equal(slopes[jnp.arange(2), jnp.arange(2)], hot)


@pytest.mark.whole
@pytest.mark.parametrize(("n", "k", "ahead"), [(50, 20, 3.0), (1000, 500, 0.0), (300, 299, 8.0)])
def test_large_sets(n, k, ahead):
    """k elements have one logit, n - k another: P(S) is a ratio of gamma functions."""
    logits = np.where(np.arange(n) < k, ahead, 0.0)
    inverse = (n - k) / np.exp(ahead)
    exact = sp.gammaln(1 + inverse) + sp.gammaln(k + 1) - sp.gammaln(k + 1 + inverse)
    law = jax.jit(lambda logits: rj.gumbel_top_k_log_prob(np.arange(k), logits, ordered=False))
    np.testing.assert_allclose(law(np.float32(logits)), exact, rtol=1e-4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(law(logits), exact, rtol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("ordered", [True, False])
def test_gradient_of_log_prob(ordered):
    """Differences check it, and the score has mean zero: sum_S P(S) grad log P(S) = 0."""
    with jax.enable_x64(True):
        logits = jnp.asarray(ITEMS[0], jnp.float64)
        outcomes = np.array(list(itertools.permutations(range(4), 2))) if ordered else SETS
        law = jax.jit(lambda logits: rj.gumbel_top_k_log_prob(outcomes, logits, ordered=ordered))
        score = np.asarray(jax.jit(jax.jacobian(law))(logits))
        np.testing.assert_allclose(jnp.exp(law(logits)) @ score, 0, atol=1e-8)
        for i in range(4):
            ends = [law(np.float64(ITEMS[0]) + step * np.eye(4)[i]) for step in (1e-6, -1e-6)]
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, score[:, i], atol=1e-7)


@pytest.mark.whole
@pytest.mark.parametrize("ordered", [True, False])
def test_what_cannot_be_drawn(ordered):
    logits = jnp.array([0.0, 1.0, -jnp.inf, 2.0])
    law = jax.jit(functools.partial(rj.gumbel_top_k_log_prob, ordered=ordered))
    repeated, impossible, possible = law(jnp.array([[1, 1], [0, 2], [0, 3]]), logits)
    assert repeated == impossible == -jnp.inf
    without = law(jnp.array([0, 2]), logits[jnp.array([0, 1, 3])])
    np.testing.assert_allclose(possible, without, rtol=1e-5)
    everything = np.array(list(itertools.permutations([0, 1, 3])))
    total = np.exp(law(everything, logits))
    np.testing.assert_allclose(total.sum() if ordered else total[0], 1, rtol=1e-5)
    slope = jax.grad(lambda l: jnp.sum(law(jnp.array([[0, 3], [0, 2]]), l)[0]))(logits)
    assert jnp.isfinite(slope).all() and slope[2] == 0
    for bad in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"value must be indices in 0\.\.3"):
            rj.gumbel_top_k_log_prob(jnp.array(bad), logits)
        assert jnp.isnan(law(jnp.array(bad), logits))
    with pytest.raises(ValueError, match="value must be integer indices, got dtype float32"):
        rj.gumbel_top_k_log_prob(jnp.array([0.0, 1.0]), logits)


@pytest.mark.whole
def test_second_derivatives_agree_with_float64():
    law = lambda l: rj.gumbel_top_k_log_prob(jnp.array([0, 2]), l, ordered=False)
    hessian = jax.jit(jax.hessian(law))(jnp.float32(ITEMS[0]))
    with jax.enable_x64(True):
        exact = jax.jit(jax.hessian(law))(jnp.asarray(ITEMS[0], jnp.float64))
    np.testing.assert_allclose(hessian, exact, atol=1e-5)


def test_perturbed_values_are_sorted_and_carry_the_gradient():
    indices, values = rj.gumbel_top_k(KEY, jnp.asarray(ITEMS), 3, shape=(50, 2))
    assert (jnp.diff(values, axis=-1) <= 0).all()
    slope = jax.grad(lambda l: jnp.sum(rj.gumbel_top_k(KEY, l, 3, shape=(50, 2))[1]))(jnp.asarray(ITEMS))
    counts = np.stack([np.bincount(np.ravel(indices[:, i]), minlength=4) for i in range(2)])
    np.testing.assert_allclose(slope, counts)


@pytest.mark.whole
def test_soft_removal_is_exact_where_a_draw_is_certain():
    """log(1 - o) for an o that rounds to 1 is finite and right, so the next draws leave it alone."""
    z = rj.relaxed_top_k(KEY, jnp.array([30.0, 0.0, 0.0, -30.0]), 3, 1e-3, shape=(200,))
    assert (jnp.abs(z - jnp.array([1.0, 1.0, 1.0, 0.0])).max(-1) < 1e-3).mean() > 0.95
    everything = rj.relaxed_top_k(KEY, jnp.zeros(5), 5, 0.02, shape=(100,))
    np.testing.assert_allclose(np.median(everything, 0), 1, atol=1e-4)


def test_relaxed_top_k_of_one_is_gumbel_softmax():
    logits = jnp.asarray(ITEMS)
    np.testing.assert_allclose(
        rj.relaxed_top_k(KEY, logits, 1, 0.5), rj.gumbel_softmax(KEY, logits, 0.5), rtol=1e-5
    )


def test_a_few_elements_are_found_without_sorting_on_a_gpu():
    """XLA's compiler for GPUs sorts whole rows for a top-k, and stores the noise for it."""
    draw = jax.jit(rj.gumbel_top_k, static_argnums=2)
    sorts = {}
    for k in (2, 8, 9):
        lowered = draw.trace(KEY, jnp.zeros((5, 12)), k).lower(lowering_platforms=("cuda",))
        sorts[k] = "chlo.top_k" in lowered.as_text()
    assert sorts == {2: False, 8: False, 9: True}


def test_too_few_possible_elements():
    logits = jnp.array([0.0, -jnp.inf, -jnp.inf])
    with pytest.raises(ValueError, match="logits must be above -inf for at least 2"):
        rj.relaxed_top_k(KEY, logits, 2, 1.0)
    assert jnp.isnan(jax.jit(lambda l: rj.relaxed_top_k(KEY, l, 2, 1.0))(logits)).all()
    indices, values = jax.jit(lambda l: rj.gumbel_top_k(KEY, l, 2))(logits)
    assert indices[0] == 0 and values[1] == -jnp.inf


@pytest.mark.whole
def test_memory_of_relaxed_top_k_is_what_its_docstring_says():
    """There are k arrays of the size of the result, and a few more: 256 MB for 100 of 10,000, batch 64."""
    for k in (5, 100):
        logits = jnp.zeros((64, 10_000))
        loss = jax.jit(jax.grad(lambda l, k=k: jnp.sum(rj.relaxed_top_k(KEY, l, k, 0.5) ** 2)))
        memory = loss.lower(logits).compile().memory_analysis()
        assert memory.temp_size_in_bytes < (k + 12) * logits.nbytes


@pytest.mark.few(0, "2")
@quick
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_inclusion_probabilities_are_the_sums_over_sets(k):
    """Value and gradient are checked, for logits close to each other and far apart."""
    sets = np.array(list(itertools.combinations(range(4), k)))
    hot = (sets[..., None] == np.arange(4)).any(1)
    marginals = jax.jit(lambda logits: rj.gumbel_top_k_marginals(logits, k))
    for logits in (*ITEMS, *20 * ITEMS, np.zeros(4, np.float32), np.float32([18, 0, 0, -30])):
        with np.errstate(divide="ignore"):
            expected = subsets(np.float64(logits), k) @ hot
        np.testing.assert_allclose(marginals(logits), expected, rtol=2e-6, atol=1e-30)
    with jax.enable_x64(True):
        by_sets = lambda l: jnp.exp(rj.gumbel_top_k_log_prob(sets, l, ordered=False)) @ hot.astype(float)
        logits = jnp.asarray(ITEMS[0], jnp.float64)
        of_sets, slopes = (jax.jacobian(f)(logits) for f in (by_sets, marginals))
        np.testing.assert_allclose(slopes, of_sets, atol=1e-8)
        np.testing.assert_allclose(marginals(logits), by_sets(logits), rtol=1e-9)


@pytest.mark.whole
@quick
def test_inclusion_probabilities_of_many():
    """They sum to k; for equal logits all are k / n; nothing overflows, and impossible elements have none."""
    equal = rj.gumbel_top_k_marginals(jnp.zeros(300), 20)
    np.testing.assert_allclose(equal, 20 / 300, rtol=2e-5)
    logits = jax.random.normal(KEY, (3, 200)) * jnp.array([[1.0], [10.0], [3000.0]])
    logits = logits.at[:, 0].set(-jnp.inf)
    value, pull = jax.vjp(lambda l: rj.gumbel_top_k_marginals(l, 7), logits)
    np.testing.assert_allclose(value.sum(-1), 7, rtol=1e-5)
    (slope,) = pull(jnp.cos(jnp.arange(200.0)) + 0 * value)
    assert jnp.isfinite(slope).all() and (slope[:, 0] == 0).all() and (value[:, 0] == 0).all()
    assert jnp.isnan(
        jax.jit(lambda l: rj.gumbel_top_k_marginals(l, 2))(jnp.array([0.0, -jnp.inf, -jnp.inf]))
    ).all()
    assert jnp.isnan(jax.jit(lambda l: rj.gumbel_top_k_marginals(l, 2))(jnp.array([0.0, jnp.nan, 1.0]))).all()
