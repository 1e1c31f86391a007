"""The noise, bit by bit, and the helpers in log space."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st

import relaxit_jax as rj
from relaxit_jax import _math as lm
from relaxit_jax import _random as rng

KEY = jax.random.key(7)
NOISE = {
    rng.logistic: sp.logit,
    rng.gumbel: lambda u: -np.log(-np.log(u)),
    rng.normal: sp.ndtri,
}
UPPER = {  # the same quantiles from 1 - u, where u itself would round
    rng.logistic: lambda q: -sp.logit(q),
    rng.gumbel: lambda q: -np.log(-np.log1p(-q)),
    rng.normal: lambda q: -sp.ndtri(q),
}


@pytest.fixture
def with_bits(monkeypatch):
    """A call in which these are the random bits. Compiled programs are cleared before and after it."""

    def call(bits, function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(rng, "random_bits", lambda key, shape, *_: jnp.asarray(bits).reshape(shape))
            jax.clear_caches()
            result = function(*arguments)
            jax.clear_caches()
        return np.asarray(result)

    return call


@pytest.mark.few(3)
@pytest.mark.parametrize("noise", NOISE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_noise_is_the_quantile_of_its_bits(noise, dtype, with_bits):
    """Given the random bits, the noise is the quantile of the uniform they stand for, in both tails.

    The bits are uniform, so this proves the law to the last of them: probabilities down to 2^-32 in
    float32, to rounding, on both sides.
    """
    with jax.enable_x64(dtype == jnp.float64):
        width = 32 if dtype == jnp.float32 else 64
        small = [0, 1, 2, 3, 10, 1000, 123_456_789, 2**30, 2 ** (width - 2), 2 ** (width - 1) - 1]
        small += [int(x) for x in np.geomspace(4, 2 ** (width - 1.001), 300)]
        small += [int(x * 2**width) for x in np.linspace(9e-4, 9.5e-4, 50)]  # where one fit meets the other
        bits = np.array(small + [2**width - 1 - i for i in small], f"uint{width}")
        drawn = with_bits(bits, noise, KEY, bits.shape, jnp.zeros((), dtype)).astype(np.float64)
    tail = (np.array(small, np.float64) + 0.5) * 2.0**-width
    rtol = 6e-7 if dtype == jnp.float32 else 3e-15
    np.testing.assert_allclose(drawn[: len(small)], NOISE[noise](tail), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(drawn[len(small) :], UPPER[noise](tail), rtol=rtol, atol=rtol)


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (3, 1, 5), (2**16 + 3,), (2, 3, 4, 5)])
def test_bits_are_those_of_jax(shape):
    """They agree to the last bit, for typed and raw keys, in a batch of keys, eager and compiled."""
    for key in (jax.random.key(0), jax.random.PRNGKey(2**31 + 5), jax.random.key(7, impl="rbg")):
        expected = np.asarray(jax.random.bits(key, shape))
        np.testing.assert_array_equal(rng.random_bits(key, shape, 32), expected)
        np.testing.assert_array_equal(jax.jit(lambda key: rng.random_bits(key, shape, 32))(key), expected)
    keys = jax.random.split(KEY, (2, 3))
    both = (lambda key: rng.random_bits(key, shape, 32), lambda key: jax.random.bits(key, shape))
    np.testing.assert_array_equal(*(jax.vmap(jax.vmap(draw))(keys) for draw in both))


def test_more_bits_than_places_of_32_bits():
    """They are left to JAX, and so are wider ones."""
    program = lambda shape: str(jax.make_jaxpr(lambda key: rng.random_bits(key, shape, 32))(KEY))
    assert "random_bits[" in program((2**17, 2**16)) and "random_bits[" not in program((2**16, 2**16))
    with jax.enable_x64(True):
        assert rng.random_bits(KEY, (2,), 64).dtype == jnp.uint64


@pytest.mark.parametrize("noise", NOISE, ids=lambda f: f.__name__)
def test_noise_has_its_distribution(noise):
    laws = {rng.logistic: st.logistic, rng.gumbel: st.gumbel_r, rng.normal: st.norm}
    drawn = np.asarray(noise(KEY, (200_000,), jnp.float32(0)), np.float64)
    assert st.kstest(drawn, laws[noise].cdf).pvalue > 1e-4


ONE_GATE = np.ones((1, 1), np.float32)
END = math.log(11)  # of the logits of v where a hard concrete gate is 0 or 1, at tau = 1
# An event of probability p, and whether it lies in the lower tail of the uniform noise or in the upper one.
TAILS = {
    "relaxed_bernoulli is 1": ("upper", lambda *a: rj.relaxed_bernoulli(KEY, logit(*a), 0.5, hard=True) > 0),
    "relaxed_bernoulli is 0": ("lower", lambda *a: rj.relaxed_bernoulli(KEY, -logit(*a), 0.5, hard=True) < 1),
    "straight_through_bernoulli is 1": (
        "lower", lambda *a: rj.straight_through_bernoulli(KEY, logit(*a)) > 0),
    "straight_through_bernoulli is 0": (
        "upper", lambda *a: rj.straight_through_bernoulli(KEY, -logit(*a)) < 1),
    # of a probability p^2 the root is p, and of (1 - p)^2 it is 1 - p
    "stochastic_times_smooth is not 0": (
        "lower", lambda p, cast: rj.stochastic_times_smooth(KEY, logit(p**2, cast)) > 0),
    "stochastic_times_smooth is 0": (
        "upper", lambda p, cast: rj.stochastic_times_smooth(KEY, -logit(p * (2 - p), cast)) == 0),
    "gaussian_bernoulli is exactly 0": (
        "lower", lambda p, cast: rj.gaussian_bernoulli(KEY, cast(-sp.ndtri(p)), 1.0) == 0),
    "gaussian_bernoulli is exactly 1": (
        "upper", lambda p, cast: rj.gaussian_bernoulli(KEY, cast(1 + sp.ndtri(p)), 1.0) == 1),
    "gaussian_bernoulli is 1": (
        "upper", lambda p, cast: rj.gaussian_bernoulli(KEY, cast(0.5 + sp.ndtri(p)), 1.0, hard=True) > 0),
    "hard_concrete is exactly 0": (
        "lower", lambda p, cast: rj.hard_concrete(KEY, cast(-END - sp.logit(p)), 1.0) == 0),
    "hard_concrete is exactly 1": (
        "upper", lambda p, cast: rj.hard_concrete(KEY, cast(END + sp.logit(p)), 1.0) == 1),
    "hard_concrete is 1": ("upper", lambda *a: rj.hard_concrete(KEY, logit(*a), 0.5, hard=True) > 0),
    "correlated_bernoulli is 1": ("upper", lambda *a: gates(logit(*a)) > 0),
    "correlated_bernoulli is 0": ("lower", lambda *a: gates(-logit(*a)) < 1),
    "simple_top_k takes the first": ("upper", lambda *a: one_of_two(logit(*a))[..., 0] > 0),
    "simple_top_k takes the second": ("lower", lambda *a: one_of_two(-logit(*a))[..., 1] > 0),
}  # fmt: skip


def logit(p, cast):
    return cast(sp.logit(p))


def gates(logits):
    return rj.correlated_bernoulli(KEY, logits[..., None], 0.5, ONE_GATE, hard=True)[..., 0]


def one_of_two(log_odds):
    return rj.simple_top_k(KEY, jnp.stack([log_odds, jnp.zeros_like(log_odds)], -1), 1)


@pytest.mark.whole
@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_tails_are_right_to_the_last_bit(dtype, with_bits):
    """The test counts which random bits cause a rare event, from the end: as many as its probability says.

    Bits are uniform, so this is the frequency of the event, in either tail and for both parts of a law.
    """
    width = 32 if dtype == jnp.float32 else 64
    rare = np.array([1e-2, 1e-4, 1e-6, 1e-8] if width == 32 else [1e-3, 1e-8, 1e-12, 1e-16])
    slack = 5e-5 if width == 32 else 1e-9
    number = [int(p * 2**width) for p in rare]  # of bits that make the event
    inside = [[0, n // 2, int(n * (1 - slack)) - 1] for n in number]
    outside = [[int(n * (1 + slack)) + 1, 2 * n, 2 ** (width - 1) - 1] for n in number]
    lower = np.array([a + b for a, b in zip(inside, outside, strict=True)], f"uint{width}")
    for name, (tail, event) in TAILS.items():
        for bits in (lower, ~lower):
            with jax.enable_x64(width == 64):
                cast = lambda x: jnp.broadcast_to(jnp.asarray(x, dtype), lower.shape)
                happens = with_bits(bits, event, rare[:, None], cast)
            own = (bits is lower) == (tail == "lower")
            expected = [True] * 3 + [False] * 3 if own else [False] * 6
            np.testing.assert_array_equal(happens, [expected] * len(rare), err_msg=name)


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


@pytest.mark.few(1)
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
    """In bfloat16 a class of probability 9e-4 is drawn at 9e-4, not at 5.5e-4 as with bfloat16 noise."""
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
    assert set(np.unique(rj.straight_through(hard, soft))) == {0.0, 1.0}
    slope = jax.grad(lambda soft: jnp.sum(rj.straight_through(hard, soft**2)))(soft)
    np.testing.assert_allclose(slope, 2 * soft)
    assert jnp.isnan(rj.straight_through(jnp.array(True), jnp.array(jnp.nan)))


def test_straight_through_broadcasts_and_keeps_the_dtype_of_what_has_the_gradient():
    hard, soft = jnp.arange(6).reshape(2, 3), jnp.array([0.1, 0.2, 0.3], jnp.bfloat16)
    value, pull = jax.vjp(lambda soft: rj.straight_through(hard, soft), soft)
    assert value.dtype == jnp.bfloat16 and (value == hard).all()
    np.testing.assert_array_equal(pull(value)[0], [3, 5, 7])
    assert jax.grad(lambda hard: rj.straight_through(hard, 0.5))(2.0) == 0


@pytest.mark.whole
def test_probit_and_logit_are_inverse_far_into_the_tails():
    x = np.concatenate([np.linspace(-80, 80, 2001), [1e3, -1e4, 1e7, -1e7]]).astype(np.float32)
    exact = -np.sign(x) * sp.ndtri_exp(-np.logaddexp(0, np.abs(x.astype(float))))
    probit = np.asarray(lm.logit_to_probit(jnp.asarray(x)))
    np.testing.assert_allclose(probit, exact, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(lm.probit_to_logit(probit), x, rtol=2e-4, atol=1e-6)
    assert jax.grad(lm.logit_to_probit)(jnp.inf) == 0


def mills(x):
    """phi(x) / Phi(x)."""
    return math.sqrt(2 / math.pi) / sp.erfcx(-x / math.sqrt(2))


def log_odds_of_ndtr(v):
    near = 2 * np.arctanh(sp.erf(np.clip(v, -1, 1) / np.sqrt(2)))  # where the difference has lost digits
    return np.where(np.abs(v) < 1, near, sp.log_ndtr(v) - sp.log_ndtr(-v))


def probit_of_logit(x):
    v = -sp.ndtri_exp(-np.logaddexp(0, x))
    return v - (log_odds_of_ndtr(v) - x) / (mills(v) + mills(-v))  # SciPy's has 14 digits at large x


def log_min_gumbel_cdf(x):
    w = np.exp(x.astype(np.longdouble))
    with np.errstate(divide="ignore"):
        return np.where(w > 1, np.log1p(-np.exp(-w)), np.log(-np.expm1(-w))).astype(float)


def log_min_gumbel_cdf_slope(x):
    w = np.exp(x)
    return w * np.exp(-w) / -np.expm1(-w)


SLOPES = {
    lm.log_ndtr: mills,
    lm.probit_to_logit: lambda v: mills(v) + mills(-v),
    lm.logit_to_probit: lambda x: 1 / (mills(probit_of_logit(x)) + mills(-probit_of_logit(x))),
    lm.log_min_gumbel_cdf: log_min_gumbel_cdf_slope,
}
# a function, its values by SciPy, its range, and where one form of it gives way to another
FORMS = [
    (lm.log_ndtr, sp.log_ndtr, (-60, 8), {32: (-10.0, -5.0, 5.0), 64: (-20.0, -10.0, 8.0)}),
    (lm.log_ndtr, sp.log_ndtr, (-1e4, -60), {32: (), 64: ()}),
    (lm.probit_to_logit, log_odds_of_ndtr, (-38, 38), {32: (10.0, -10.0, 12.9), 64: (20.0, -20.0, 12.9)}),
    (lm.probit_to_logit, log_odds_of_ndtr, (38, 1e4), {32: (), 64: ()}),
    (lm.logit_to_probit, probit_of_logit, (-36, 36), {32: (5.1,), 64: (5.1,)}),
    (lm.logit_to_probit, probit_of_logit, (36, 1e4), {32: (53.2,), 64: (203.9,)}),
    (lm.log_min_gumbel_cdf, log_min_gumbel_cdf, (-80, 6), {32: (-15.0, 5.0), 64: (-15.0, 5.0)}),
]


@pytest.mark.few(4, "logit_to_probit(-36, 36)-float64", "log_min_gumbel_cdf(-80, 6)-float64")
@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("f", "reference", "ends", "switches"), FORMS, ids=[f"{f.__name__}{ends}" for f, _, ends, _ in FORMS]
)
def test_log_space_functions_have_all_their_digits(f, reference, ends, switches, dtype):
    """Value and slope on a fine grid, and next to every switch between two forms, on both sides."""
    width = np.dtype(dtype).itemsize * 8
    steps = np.array([-1e-2, -1e-5, 0, 1e-5, 1e-2])
    near = [x + steps for x in switches[width]] + [np.nextafter(dtype(x), dtype(y)) + 0 * steps
                                                   for x in switches[width] for y in (-1e9, 1e9)]  # fmt: skip
    grid = np.linspace(*ends, 4001) if ends[1] < 1e3 else np.geomspace(*ends, 300)
    x = np.concatenate([grid, *near]).astype(dtype)
    with jax.enable_x64(width == 64):
        value, slope = jax.jit(jax.vmap(jax.value_and_grad(f)))(x)
        assert value.dtype == slope.dtype == dtype
    x = x.astype(float)
    value_rtol, slope_rtol, far_rtol = (1e-6, 1.5e-5, 4e-7) if width == 32 else (2e-15, 1e-13, 1e-14)
    np.testing.assert_allclose(value, reference(x), rtol=value_rtol, atol=value_rtol / 5)
    far = np.abs(x) > (10 if width == 32 else 20) if f in (lm.log_ndtr, lm.probit_to_logit) else False
    error = np.abs(np.asarray(slope) - SLOPES[f](x)) / np.maximum(SLOPES[f](x), 1e-20)
    assert (error < np.where(far, far_rtol, slope_rtol)).all()


def test_static_checks_hold_inside_a_jitted_function():
    with pytest.raises(ValueError, match="tau must be positive, got -1"):
        jax.jit(lambda x: rj.relaxed_bernoulli(KEY, x, -1.0))(0.0)
    with pytest.raises(ValueError, match="known before tracing"):
        jax.jit(lambda x, k: rj.relaxed_top_k(KEY, x, k, 1.0))(jnp.zeros(3), 2)


@pytest.mark.parametrize("k", range(2, lm.FEW + 1))
def test_the_few_largest_by_one_reduction(k):
    """As jax.lax.top_k finds them: NaN counts as the largest, and of equals the first comes first."""
    rng = np.random.default_rng(k)
    x = rng.integers(0, 6, (400, 13)).astype(np.float32)
    for value, share in ((-np.inf, 0.1), (np.inf, 0.02), (np.nan, 0.05)):
        x[rng.random(x.shape) < share] = value
    x[0], x[1] = np.nan, -np.inf
    chex.assert_trees_all_equal(jax.jit(lm.top_few, static_argnums=1)(x, k), jax.lax.top_k(x, k))

    weights = rng.normal(size=(400, k)).astype(np.float32)
    x = rng.normal(size=(4, 9)).astype(np.float32)
    cubes = lambda f: lambda x: jnp.sum(weights[:4] * f(x, k)[0] ** 3)
    for of in (jax.grad, jax.jacfwd, jax.hessian):
        chex.assert_trees_all_close(*(of(cubes(f))(x) for f in (lm.top_few, jax.lax.top_k)), rtol=1e-6)


@pytest.mark.parametrize("form", [lm.index_of_largest, lm.largest_of_numbers, lm.largest_of_pairs])
def test_largest_is_the_first_of_equals(form):
    """The form for CPUs and the form for accelerators; for NaN it is K, which is not a class."""
    x = np.float32([[1, 3, 3], [2, 2, 2], [-np.inf, 0, -np.inf], [-np.inf, -np.inf, -np.inf]])
    np.testing.assert_array_equal(form(jnp.asarray(x))[:, 0], [1, 0, 1, 0])
    np.testing.assert_array_equal(form(jnp.array([[1, jnp.nan, 0], [jnp.nan, 2, 3]]))[:, 0], [3, 3])
    x = np.random.default_rng(0).integers(0, 40, (500, 33)).astype(np.float32)
    np.testing.assert_array_equal(form(jnp.asarray(x))[:, 0], x.argmax(-1))
    assert (np.asarray(lm.largest(jnp.asarray(x))) == (np.arange(33) == x.argmax(-1)[:, None])).all()
