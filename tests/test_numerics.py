"""The noise, bit by bit, and the helpers in log space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st

import relaxit_jax as rj
from relaxit_jax import _numerics as nm

KEY = jax.random.key(7)
NOISE = {
    nm.logistic: sp.logit,
    nm.gumbel: lambda u: -np.log(-np.log(u)),
    nm.normal: sp.ndtri,
}
UPPER = {  # the same quantiles from 1 - u, where u itself would round
    nm.logistic: lambda q: -sp.logit(q),
    nm.gumbel: lambda q: -np.log(-np.log1p(-q)),
    nm.normal: lambda q: -sp.ndtri(q),
}


@pytest.mark.parametrize("noise", NOISE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_noise_is_the_quantile_of_its_bits(noise, dtype, monkeypatch):
    """Given the random bits, the noise is the quantile of the uniform they stand for, in both tails.

    The bits are uniform, so this proves the law to the last of them: probabilities down to 2^-32 in
    float32, to rounding, on both sides.
    """
    with jax.enable_x64(dtype == jnp.float64):
        width = 32 if dtype == jnp.float32 else 64
        small = [0, 1, 2, 3, 10, 1000, 123_456_789, 2**30, 2 ** (width - 2), 2 ** (width - 1) - 1]
        bits = np.array(small + [2**width - 1 - i for i in small], f"uint{width}")
        monkeypatch.setattr(nm, "random_bits", lambda *args: jnp.asarray(bits))
        drawn = np.asarray(noise(KEY, bits.shape, dtype), np.float64)
    tail = (np.array(small, np.float64) + 0.5) * 2.0**-width
    rtol = 3e-6 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(drawn[: len(small)], NOISE[noise](tail), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(drawn[len(small) :], UPPER[noise](tail), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (3, 1, 5), (2**16 + 3,), (2, 3, 4, 5)])
def test_bits_are_those_of_jax(shape):
    """To the last one, of typed and of raw keys, in a batch of keys, eager and compiled."""
    for key in (jax.random.key(0), jax.random.PRNGKey(2**31 + 5), jax.random.key(7, impl="rbg")):
        expected = np.asarray(jax.random.bits(key, shape))
        np.testing.assert_array_equal(nm.random_bits(key, shape, 32), expected)
        np.testing.assert_array_equal(jax.jit(lambda key: nm.random_bits(key, shape, 32))(key), expected)
    keys = jax.random.split(KEY, (2, 3))
    both = (lambda key: nm.random_bits(key, shape, 32), lambda key: jax.random.bits(key, shape))
    np.testing.assert_array_equal(*(jax.vmap(jax.vmap(draw))(keys) for draw in both))


def test_more_bits_than_places_of_32_bits():
    """They are left to JAX, and so are wider ones."""
    program = lambda shape: str(jax.make_jaxpr(lambda key: nm.random_bits(key, shape, 32))(KEY))
    assert "random_bits[" in program((2**17, 2**16)) and "random_bits[" not in program((2**16, 2**16))
    with jax.enable_x64(True):
        assert nm.random_bits(KEY, (2,), 64).dtype == jnp.uint64


@pytest.mark.parametrize("noise", NOISE, ids=lambda f: f.__name__)
def test_noise_has_its_distribution(noise):
    laws = {nm.logistic: st.logistic, nm.gumbel: st.gumbel_r, nm.normal: st.norm}
    drawn = np.asarray(noise(KEY, (200_000,), jnp.float32), np.float64)
    assert st.kstest(drawn, laws[noise].cdf).pvalue > 1e-4


RARE = 1e-7
RARE_EVENTS = {
    "relaxed_bernoulli": lambda key, shape, sign: (
        rj.relaxed_bernoulli(key, sign * sp.logit(RARE), 0.5, shape=shape, hard=True) != (sign < 0)
    ),
    "straight_through_bernoulli": lambda key, shape, sign: (
        rj.straight_through_bernoulli(key, sign * sp.logit(RARE), shape=shape) != (sign < 0)
    ),
    "gaussian_bernoulli": lambda key, shape, sign: (
        rj.gaussian_bernoulli(key, (0.0 if sign > 0 else 1.0) - sign * sp.ndtri(RARE), 1.0, shape=shape)
        == (sign < 0)
    ),
    "gumbel_softmax": lambda key, shape, sign: jnp.argmax(
        rj.gumbel_softmax(key, jnp.array([0.0, sp.logit(RARE)]), 0.5, shape=shape, hard=True), -1
    ),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", RARE_EVENTS)
def test_rare_events_have_their_frequency(method, sign):
    """An event of probability 1e-7, which 23-bit uniforms draw at 1.2e-7 or never, in either tail."""
    blocks, size = 48, 2**21

    @jax.jit
    def count(key):
        draw = lambda key: jnp.sum(RARE_EVENTS[method](key, (size,), sign))
        return jnp.sum(jax.lax.map(draw, jax.random.split(key, blocks)))

    hits, n = int(count(KEY)), blocks * size  # about 10 expected
    assert st.binomtest(hits, n, RARE).pvalue > 1e-4


def test_low_precision_noise_keeps_rare_classes():
    """In bfloat16 a class of probability 9e-4 is drawn at 9e-4, not at 5.5e-4, as by noise of bfloat16."""
    logits = jnp.array([0.0, -7.0], jnp.bfloat16)
    draws = rj.gumbel_softmax(KEY, logits, 1.0, shape=(1_000_000,), hard=True)
    hits = int(jnp.sum(draws[:, 1].astype(jnp.float32)))
    assert st.binomtest(hits, 1_000_000, sp.expit(-7.0)).pvalue > 1e-4


def test_noise_is_not_rounded_off_by_large_logits():
    """Shifting all logits changes nothing, although float32 resolves only 1e-3 at 1e4."""
    logits = jnp.array([0.0, 1.0, -2.0])
    for draw in (
        lambda l: rj.gumbel_softmax(KEY, l, 0.01, shape=(500,), log_space=True),
        lambda l: rj.relaxed_top_k(KEY, l, 2, 0.1, shape=(500,)),
    ):
        np.testing.assert_allclose(draw(logits + 8192), draw(logits), rtol=1e-6)


def test_straight_through_is_exact():
    soft = jax.nn.sigmoid(jax.random.normal(KEY, (100_000,)))
    hard = soft > 0.5
    assert (hard + soft - soft != hard).any()  # where a sum would show
    assert set(np.unique(nm.straight_through(hard, soft))) == {0.0, 1.0}
    slope = jax.grad(lambda soft: jnp.sum(nm.straight_through(hard, soft**2)))(soft)
    np.testing.assert_allclose(slope, 2 * soft)
    assert jnp.isnan(nm.straight_through(jnp.array(True), jnp.array(jnp.nan)))


def test_probit_and_logit_are_inverse_far_into_the_tails():
    x = np.concatenate([np.linspace(-80, 80, 2001), [1e3, -1e4, 1e7, -1e7]]).astype(np.float32)
    exact = -np.sign(x) * sp.ndtri_exp(-np.logaddexp(0, np.abs(x.astype(float))))
    probit = np.asarray(nm.logit_to_probit(jnp.asarray(x)))
    np.testing.assert_allclose(probit, exact, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(nm.probit_to_logit(probit), x, rtol=2e-4, atol=1e-6)
    with jax.enable_x64(True):
        x = jnp.linspace(-50, 50, 101)
        there = jax.jit(jax.vmap(jax.grad(nm.logit_to_probit)))(x)
        back = jax.jit(lambda x: jax.vmap(jax.grad(nm.probit_to_logit))(nm.logit_to_probit(x)))(x)
        np.testing.assert_allclose(there * back, 1, rtol=1e-10)
    assert jax.grad(nm.logit_to_probit)(jnp.inf) == 0


def test_log_min_gumbel_cdf():
    x = np.linspace(-80, 80, 3001)
    w = np.exp(x)
    with np.errstate(divide="ignore"):
        exact = np.where(x < -30, x - w / 2, np.log(-np.expm1(-w)))
    value = nm.log_min_gumbel_cdf(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, exact, rtol=3e-5, atol=1e-7)
    with jax.enable_x64(True):
        x = jnp.linspace(-60, 20, 801)
        slope = jax.vmap(jax.grad(nm.log_min_gumbel_cdf))(x)
        step = 1e-6
        difference = (nm.log_min_gumbel_cdf(x + step) - nm.log_min_gumbel_cdf(x - step)) / (2 * step)
        np.testing.assert_allclose(slope, difference, atol=1e-7)


def test_static_checks_hold_inside_a_jitted_function():
    with pytest.raises(ValueError, match="tau must be positive, got -1"):
        jax.jit(lambda x: rj.relaxed_bernoulli(KEY, x, -1.0))(0.0)
    with pytest.raises(ValueError, match="known before tracing"):
        jax.jit(lambda x, k: rj.relaxed_top_k(KEY, x, k, 1.0))(jnp.zeros(3), 2)


def test_largest_is_the_first_of_equals():
    x = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-jnp.inf, 0.0, -jnp.inf]])
    np.testing.assert_array_equal(nm.largest(x), np.eye(3, dtype=bool)[[1, 0, 1]])
