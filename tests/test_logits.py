"""Functions of logits that draw nothing: entropies, divergences, a uniform mixture; and embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st
from numpyro import distributions as dist

import relaxit_jax as rj
from helpers import KEY, quick
from relaxit_jax import distributions as rd

RNG = np.random.default_rng(1)
P, Q = (np.float32(2 * RNG.normal(size=(5, 4))) for _ in range(2))
P[:, 3] = -np.inf  # impossible for p; 0 log 0 = 0
P[4, 2] = Q[4, 2] = Q[4, 3] = -np.inf


@quick
def test_categorical_entropy_and_kl():
    p, q = (sp.softmax(np.float64(x), -1) for x in (P, Q))
    np.testing.assert_allclose(rj.categorical_entropy(P), sp.entr(p).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(rj.categorical_kl(P, Q), sp.rel_entr(p, q).sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rj.categorical_kl(P, P), 0)
    np.testing.assert_array_equal(rj.categorical_kl(Q[:4], P[:4]), np.inf)
    assert rj.categorical_entropy(jnp.float32([3, -jnp.inf])) == 0
    assert rj.categorical_kl(P.astype(jnp.bfloat16), Q.astype(jnp.bfloat16)).dtype == jnp.float32


@quick
def test_bernoulli_entropy_and_kl():
    p, q = np.float32([-3, 0, 2, np.inf, -np.inf, 30]), np.float32([1, -2, 2, 0.5, -0.5, 20])
    (p1, p0), (q1, q0) = ([sp.expit(s * np.float64(x)) for s in (1, -1)] for x in (p, q))
    finite = np.float64(np.clip(p, -800, 800))
    entropy = p1 * np.logaddexp(0, -finite) + p0 * np.logaddexp(0, finite)  # whose terms are not rounded to 0
    np.testing.assert_allclose(rj.bernoulli_entropy(p), entropy, rtol=1e-5)
    np.testing.assert_allclose(
        rj.bernoulli_kl(p, q), sp.rel_entr(p1, q1) + sp.rel_entr(p0, q0), rtol=1e-4, atol=1e-9
    )
    certain = jnp.array([jnp.inf, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(rj.bernoulli_kl(certain, -certain), np.inf)
    np.testing.assert_array_equal(rj.bernoulli_kl(certain, certain), 0)
    np.testing.assert_array_equal(rj.bernoulli_entropy(certain), 0)


@pytest.mark.whole
@quick
def test_their_gradients():
    """They match the closed form; finite for impossible classes, and where the divergence is infinite."""
    p, q = (sp.softmax(np.float64(x), -1) for x in (P, Q))
    entropy = sp.entr(p).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, ratio = (np.where(p > 0, x, 0) for x in (np.log(p), np.log(p) - np.log(q)))
    of_p = jax.grad(lambda p: jnp.sum(rj.categorical_entropy(p)))(P)
    np.testing.assert_allclose(of_p, -p * (log_p + entropy), rtol=1e-4, atol=1e-6)
    of_p, of_q = jax.grad(lambda p, q: jnp.sum(rj.categorical_kl(p, q)), (0, 1))(P, Q)
    kl = (p * ratio).sum(-1, keepdims=True)
    np.testing.assert_allclose(of_p, p * (ratio - kl), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_q, q - p, rtol=1e-4, atol=1e-6)
    infinite = jax.grad(lambda q, p: jnp.sum(rj.categorical_kl(q, p)), (0, 1))(Q[:4], P[:4])
    assert all((slope == 0).all() for slope in infinite)
    at = np.float32([-1e4, -3, 0, 2, 1e4, np.inf, -np.inf])
    for f in (rj.bernoulli_entropy, lambda l: rj.bernoulli_kl(l, 0.3), lambda l: rj.bernoulli_kl(0.3, l)):
        assert np.isfinite(jax.vmap(jax.grad(f))(at)).all()
    one, two = np.float32([-3, 0.5]), np.float32([1, -2])
    of_one, of_two = jax.grad(lambda p, q: jnp.sum(rj.bernoulli_kl(p, q)), (0, 1))(one, two)
    np.testing.assert_allclose(of_one, sp.expit(one) * sp.expit(-one) * (one - two), rtol=1e-5)
    np.testing.assert_allclose(of_two, sp.expit(two) - sp.expit(one), rtol=1e-5)
    of_one = jax.grad(lambda l: jnp.sum(rj.bernoulli_entropy(l)))(one)
    np.testing.assert_allclose(of_one, -one * sp.expit(one) * sp.expit(-one), rtol=1e-4, atol=1e-7)


@quick
def test_classes_use_them(monkeypatch):
    """Their entropies and divergences are these, bit for bit."""
    one_hot = functools.partial(rd.StraightThroughCategorical)
    np.testing.assert_array_equal(one_hot(logits=P).entropy(), rj.categorical_entropy(P))
    kl = dist.kl_divergence(one_hot(logits=P), one_hot(logits=Q))
    np.testing.assert_array_equal(kl, rj.categorical_kl(P, Q))
    bits = [rd.StraightThroughBernoulli(logits=x) for x in (Q, -Q / 2)]
    np.testing.assert_array_equal(bits[0].entropy(), rj.bernoulli_entropy(Q))
    np.testing.assert_array_equal(dist.kl_divergence(*bits), rj.bernoulli_kl(Q, -Q / 2))


@quick
def test_nan_is_shown_in_its_row():
    spoiled = P.copy()
    spoiled[1, 0] = np.nan
    for f in (rj.categorical_entropy, lambda l: rj.categorical_kl(l, Q), lambda l: rj.categorical_kl(Q, l)):
        assert np.isnan(jax.jit(f)(spoiled)).tolist() == [False, True, False, False, False]
    assert np.isnan(
        [rj.bernoulli_entropy(np.nan), rj.bernoulli_kl(np.nan, 0.0), rj.bernoulli_kl(0.0, np.nan)]
    ).all()
    mixed = jax.jit(rj.mix_uniform)
    assert np.isnan(mixed(spoiled, 0.1)).any(-1).tolist() == [False, True, False, False, False]
    assert np.isnan(mixed(P, 1.5))[:, :2].all() and np.isnan(mixed(P, -0.5))[:, :2].all()
    assert np.isnan([rj.gaussian_bernoulli_gate(np.nan), jax.jit(rj.gaussian_bernoulli_l0)(0.3, -1.0)]).all()


@quick
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.7, 1.0])
def test_mixing_is_that_of_probabilities(fraction):
    p = sp.softmax(np.float64(P), -1)
    possible = p > 0
    expected = np.where(possible, (1 - fraction) * p + fraction / possible.sum(-1, keepdims=True), 0)
    mixed = np.float64(rj.mix_uniform(P, fraction))
    np.testing.assert_allclose(np.exp(mixed), expected, rtol=1e-5)
    np.testing.assert_array_equal(mixed == -np.inf, ~possible)
    np.testing.assert_array_equal(
        rj.mix_uniform(P, np.full(5, fraction, np.float32)), mixed.astype(np.float32)
    )
    weights = np.where(possible, np.float32(RNG.normal(size=P.shape)), 0)

    def mixture(logits, fraction):
        law = jnp.where(possible, jax.nn.softmax(logits), 1)
        uniform = fraction / possible.sum(-1, keepdims=True)
        return jnp.sum(weights * jnp.where(possible, jnp.log((1 - fraction) * law + uniform), 0))

    ours = lambda l, f: jnp.sum(jnp.where(possible, weights * rj.mix_uniform(l, f), 0))
    found, expected = (jax.grad(f, (0, 1))(P, fraction) for f in (ours, mixture))
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-4, atol=1e-4)


@quick
def test_mixing_keeps_far_logits_finite():
    logits = jnp.array([0.0, -1e4, 1e4])
    for fraction in (0.01, 1.0):
        value, slopes = jax.value_and_grad(lambda l, f: rj.mix_uniform(l, f)[1], (0, 1))(logits, fraction)
        np.testing.assert_allclose(value, np.log(fraction / 3), rtol=1e-5)
        assert all(np.isfinite(slope).all() for slope in slopes)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        rj.mix_uniform(logits, 2.0)
    with pytest.raises(ValueError, match="fraction must have the batch shape"):
        rj.mix_uniform(P, np.full((5, 1), 0.1, np.float32))


@quick
def test_a_gaussian_gate_is_open_with_the_probability_beside_its_atom():
    loc, scale = np.float32([-4, 0.0, 0.3, 1.4]), np.float32([0.5, 1, 2, 0.1])
    np.testing.assert_allclose(rj.gaussian_bernoulli_l0(loc, scale), st.norm.cdf(loc / scale), rtol=1e-5)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (loc, scale)]
        beside = lambda loc, scale: jnp.sum(
            1 - jnp.exp(rj.gaussian_bernoulli_log_prob(jnp.zeros(4), loc, scale))
        )
        penalty = lambda loc, scale: jnp.sum(rj.gaussian_bernoulli_l0(loc, scale))
        found, expected = (jax.grad(f, (0, 1))(*wide) for f in (penalty, beside))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    draws = np.asarray(rj.gaussian_bernoulli(KEY, loc, scale, shape=(20_000, 4)))
    p = st.norm.cdf(loc / scale)
    assert (np.abs((draws > 0).mean(0) - p) <= 4.5 * np.sqrt(p * (1 - p) / 20_000) + 1e-9).all()
    np.testing.assert_array_equal(rj.gaussian_bernoulli_gate(loc), np.clip(loc, 0, 1))


# --- embed ------------------------------------------------------------------------------------

TABLE = np.float32(RNG.normal(size=(4, 3)))
LOGITS = np.float32(RNG.normal(size=(6, 4)))


@quick
@pytest.mark.parametrize("sampler", [rj.straight_through_categorical, rj.reinmax])
def test_embeddings_have_value_and_gradients_of_the_product(sampler):
    weights = np.float32(RNG.normal(size=(6, 3)))

    def loss(embed, logits, table):
        return jnp.sum(weights * jnp.sin(embed(sampler(KEY, logits, tau=1.5), table)))

    ours, product = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1)))(LOGITS, TABLE)
        for f in (rj.embed, lambda z, table: jnp.matmul(z, table, precision="highest"))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, product)
    assert np.abs(ours[1][0]).max() > 0.01
    both = lambda f: jax.jvp(functools.partial(loss, f), (LOGITS, TABLE), (LOGITS**2, TABLE**2))
    np.testing.assert_allclose(both(rj.embed), both(jnp.matmul), rtol=1e-5)


@quick
def test_embeddings_are_the_rows_themselves():
    index = np.array([[3, 0], [1, 1]])
    one_hot = np.eye(4, dtype=np.float32)[index]
    for draw in (index, one_hot, jnp.asarray(one_hot, jnp.bfloat16)):
        np.testing.assert_array_equal(rj.embed(draw, TABLE), TABLE[index])
    soft = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(rj.embed(soft, TABLE, soft=True), soft @ TABLE, rtol=1e-5)
    with pytest.raises(ValueError, match="draw must be one-hot vectors"):
        rj.embed(soft, TABLE)
    with pytest.raises(ValueError, match=r"draw must be indices in 0\.\.3"):
        rj.embed(4, TABLE)
    traced = jax.jit(rj.embed)
    assert np.isnan(traced(soft, TABLE)).all() and np.isnan(traced(np.array([4, -1]), TABLE)).all()
    assert np.isnan(
        traced(np.float32([[0, 0, 0, 0], [1, 0, 0, 1], [np.nan, 1, 0, 0], [0, 2, 0, 0]]), TABLE)
    ).all()
    np.testing.assert_array_equal(traced(one_hot, TABLE), TABLE[index])


def test_an_embedding_takes_the_memory_of_a_lookup():
    """For 512 one-hot draws of 50,000 words: besides the draw itself, nothing of its size forward."""
    words, rows = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((50_000, 256), (512, 50_000)))
    forward = jax.jit(rj.embed).lower(rows, words).compile().memory_analysis()
    assert forward.temp_size_in_bytes < 2**24
    gradient = jax.jit(jax.grad(lambda z, t: jnp.sum(jnp.sin(rj.embed(z, t))), (0, 1)))
    backward = gradient.lower(rows, words).compile().memory_analysis()
    assert backward.temp_size_in_bytes < 2**24  # both gradients are outputs, and are no copies
