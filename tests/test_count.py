"""Counts on finitely many values: their laws agree with SciPy, and their draws can be trained through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special as sp
import scipy.stats as st

import relaxit_jax as rj
from relaxit_jax.samplers import _count as count

quick = pytest.mark.usefixtures("fast_compilation")
KEY = jax.random.key(9)


def f32(x):
    return float(np.float32(x))


LAWS = [
    *((rj.poisson_support, (rate,), st.poisson(f32(rate))) for rate in (1e-3, 0.1, 1.0, 10.0, 300.0, 5000.0)),
    *((rj.geometric_support, (l,), st.geom(sp.expit(f32(l)), loc=-1)) for l in (-5.0, -2.0, 0.5, 6.0)),
    *(
        (rj.binomial_support, (n, l), st.binom(n, sp.expit(l)))
        for n, l in ((1, 0.5), (12, -2.0), (2000, 0.5))
    ),
    *(
        (rj.negative_binomial_support, (r, l), st.nbinom(f32(r), sp.expit(-l)))
        for r, l in ((0.05, 3.0), (2.0, 0.0), (7.5, -1.0), (1e4, -3.0))
    ),
]
names = [f"{support.__name__}{parameters}" for support, parameters, _ in LAWS]
laws = pytest.mark.parametrize(("support", "parameters", "law"), LAWS, ids=names)


@pytest.mark.few(5)
@quick
@laws
def test_law_against_scipy(support, parameters, law):
    eps = 1e-8
    logits, values = support(*parameters)
    logits, values = np.asarray(logits, np.float64), np.asarray(values, np.float64)
    n = len(values)
    np.testing.assert_array_equal(values, np.arange(n))
    assert law.sf(n - 1) < eps
    assert support is rj.binomial_support or law.sf(n - 2) > 0.99 * eps  # no more values than it takes
    expected = law.logpmf(values)
    expected[-1] = law.logsf(n - 2)  # what lies beyond is in the last value, not lost
    likely = expected > np.log(1e-12)
    np.testing.assert_allclose(logits[likely], expected[likely], rtol=0, atol=3e-5)
    p = np.exp(logits)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    mean = p @ values
    np.testing.assert_allclose(mean, law.mean(), rtol=1e-3)
    np.testing.assert_allclose(p @ (values - mean) ** 2, law.var(), rtol=1e-3)


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize(
    ("support", "parameters", "law"),
    [
        (rj.poisson_support, (2.0,), st.poisson(2)),
        (rj.poisson_support, (40.0,), st.poisson(40)),
        (rj.geometric_support, (-4.0,), st.geom(sp.expit(-4), loc=-1)),
        (rj.binomial_support, (50, 1.0), st.binom(50, sp.expit(1))),
        (rj.negative_binomial_support, (3.0, 2.0), st.nbinom(3, sp.expit(-2))),
    ],
)
def test_tails_of_every_weight_are_folded_into_the_last_value(support, parameters, law):
    *shape, last = parameters
    traced = jax.jit(lambda x: support(*shape, x, 12)[0])
    logits = np.asarray(traced(last), np.float64)
    expected = np.append(law.logpmf(np.arange(11)), law.logsf(10))
    np.testing.assert_allclose(logits, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.few(2)
@quick
@laws
def test_gradient_of_the_logits(support, parameters, law):
    """It covers all parameters except the number of trials, with central differences in float64."""
    fixed = parameters[:1] if support is rj.binomial_support else ()
    free = np.array(parameters[len(fixed) :])
    n = support(*parameters)[1].size
    with jax.enable_x64(True):
        total = lambda x: jnp.sum(jnp.cos(jnp.arange(n)) * jnp.exp(support(*fixed, *x, n)[0]))
        both = jax.jit(jax.value_and_grad(total))
        gradient = both(free)[1]
        for i in range(len(free)):
            step = np.eye(len(free))[i] * 1e-5 * max(1e-2, abs(free[i]))
            slope = (both(free + step)[0] - both(free - step)[0]) / (2 * step[i])
            np.testing.assert_allclose(gradient[i], slope, rtol=1e-4, atol=1e-8)
    assert (np.abs(gradient) > 0).all()


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize(
    "support",
    [
        lambda x: rj.geometric_support(x, 20),
        lambda x: rj.binomial_support(5, x),
        lambda x: rj.negative_binomial_support(2.5, x, 20),
        lambda x: rj.poisson_support(jnp.exp(jnp.minimum(x, 80)), 20),
    ],
    ids=["geometric", "binomial", "negative_binomial", "poisson"],
)
def test_extreme_parameters_have_finite_gradients(support):
    x = jnp.array([-jnp.inf, -1e4, -100.0, 100.0, 1e4, jnp.inf])

    def total(x):
        logits, values = support(x)
        z = rj.generalized_gumbel_softmax(KEY, logits, values, 0.5, shape=(10, 6))
        return jnp.sum(z * jnp.cos(jnp.arange(6.0))), (jnp.exp(logits) @ values, z, values)

    gradient, (mean, z, values) = jax.jit(jax.grad(total, has_aux=True))(x)
    assert jnp.isfinite(gradient).all() and jnp.isfinite(z).all()
    assert set(np.round(mean, 4).tolist()) == {0, values[-1].item()}  # all mass at one end or the other


@pytest.mark.whole
@quick
def test_totals_beyond_what_is_kept():
    """A few of a billion trials, and a mean of 1 from a total without an end, are Poisson laws."""
    for support in (
        lambda: rj.binomial_support(10**9, sp.logit(1e-9)),
        lambda: rj.negative_binomial_support(1e9, np.log(1e-9)),
        lambda: rj.negative_binomial_support(1e30, np.log(1e-30)),
    ):
        logits, values = support()
        assert 10 < values.size < 20
        np.testing.assert_allclose(logits[:8], st.poisson(1).logpmf(np.arange(8)), atol=2e-5)
    certain, _ = rj.negative_binomial_support(2.0, -np.inf)
    np.testing.assert_array_equal(certain, [0.0])


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("support", "slope"),
    [
        (lambda rate: rj.poisson_support(rate, 20), 1.0),
        (lambda r: rj.negative_binomial_support(r, -1.0, 20), np.exp(-1)),
    ],
    ids=["poisson", "negative_binomial"],
)
def test_a_traced_rate_may_round_to_nothing(support, slope, dtype):
    """The slope of the mean at 0 and next to it, forward and backward, and of the mass of a single event."""
    with jax.enable_x64(dtype == np.float64):
        tiny = np.finfo(dtype).tiny
        rates = np.array([0, 1e-45, tiny, 2 * tiny, 20 * tiny, 1e-36, 1e-30, 1e-20, 1e-6], dtype)

        def mean(rate):
            logits, values = support(rate)
            return jnp.exp(logits) @ values, logits

        def of(rate):
            (_, logits), (pushed, _) = jax.jvp(mean, (rate,), (jnp.ones_like(rate),))
            z = lambda rate: rj.generalized_gumbel_softmax(KEY, *support(rate), 0.5, shape=(100,)).sum()
            return logits, pushed, jax.grad(lambda rate: mean(rate)[0])(rate), jax.grad(z)(rate)

        logits, pushed, pulled, of_draws = jax.jit(jax.vmap(of))(rates)
        np.testing.assert_allclose([pushed, pulled], slope, rtol=1e-5)
        assert np.isfinite(logits).all() and np.isfinite(of_draws).all()
        exact = rates > (1e-29 if slope < 1 else 1e-37)
        one = np.log(rates[exact].astype(float) * (sp.expit(-1.0) if slope < 1 else 1))
        np.testing.assert_allclose(logits[exact, 1], one, rtol=2e-6)
        for bad in (-1e-30, -1.0, np.nan):
            assert all(np.isnan(x).any() for x in jax.jit(of)(dtype(bad)))
        largest = jax.jit(of)(dtype(np.inf))  # all beyond the last value
        assert largest[0][-1] == 0 and largest[0][0] < -1e30 and np.isfinite(largest[1:]).all()


@quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_poisson_terms_have_all_their_digits(dtype):
    """From x = 1 to 20,000, and on both sides of the switch between the two forms, by exact factorials."""
    x = np.array([*range(1, 31), 100, 5000, 20_000], dtype)[:, None]
    ratio = np.array(
        [1e-3, 0.1, 0.4999, 0.5, 0.5001, 0.8999, 0.9, 0.9001, 0.999, 1, 1.001, 1.0999, 1.1, 1.1001, 2, 9]
    )
    mean = (x * ratio).astype(dtype)
    log_factorial = np.cumsum(np.log(np.arange(1, 20_001, dtype=np.longdouble)))[x.astype(int) - 1]
    wide = mean.astype(np.longdouble)
    exact = (x * np.log(wide) - wide - log_factorial).astype(float)
    slope = (x / wide - 1).astype(float)
    with jax.enable_x64(dtype == np.float64):
        law = lambda mean: count._log_poisson(x, mean, jnp.log(mean))
        value, pull = jax.vjp(jax.jit(law), mean)
        slopes = pull(jnp.ones_like(value))[0]
        between = np.linspace(10, 30, 101)
        stirling = (
            sp.gammaln(between + 1) - (between + 0.5) * np.log(between) + between - np.log(2 * np.pi) / 2
        )
        found = count._stirling_error(jnp.asarray(between, dtype))
    eps = float(np.finfo(dtype).eps)
    assert (np.abs(np.asarray(value) - exact) < 16 * eps * np.maximum(np.abs(exact), x + 10)).all()
    np.testing.assert_allclose(slopes, slope, rtol=8 * eps, atol=8 * eps)
    rtol, atol = (3e-7, 0) if dtype == np.float32 else (0, 6e-14)  # the reference cancels
    np.testing.assert_allclose(found, stirling, rtol=rtol, atol=atol)


@pytest.mark.whole
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("mean", "support", "largest"),
    [
        (jnp.exp, rj.poisson_support, 12.0),
        (lambda x: jnp.exp(-x), rj.geometric_support, -np.log(12)),
        (lambda x: 12 * jax.nn.sigmoid(x), functools.partial(rj.binomial_support, 12), 5.0),
        (lambda x: 3 * jnp.exp(x), functools.partial(rj.negative_binomial_support, 3.0), np.log(4)),
    ],
    ids=["poisson", "geometric", "binomial", "negative_binomial"],
)
def test_a_rate_is_learned_through_the_relaxed_draw(mean, support, largest, hard):
    """Adam finds the rate from the mean of counts with a true mean of 7.5, to within 2%."""
    true, tau, adam = 7.5, 0.1, optax.adam(optax.cosine_decay_schedule(0.05, 300))
    parameter = jnp.exp if support is rj.poisson_support else lambda x: x
    num_values = support(largest)[1].size  # static, and once

    def loss(x, key):
        logits, values = support(parameter(x), num_values)
        z = rj.generalized_gumbel_softmax(key, logits, values, tau, shape=(400,), hard=hard)
        return (jnp.mean(z) - true) ** 2

    @jax.jit
    def learn(x):
        def step(carry, key):
            x, state = carry
            updates, state = adam.update(jax.grad(loss)(x, key), state)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, adam.init(x)), jax.random.split(KEY, 300))[0][0]

    np.testing.assert_allclose(mean(learn(0.0)), true, rtol=0.02)


@pytest.mark.whole
@quick
def test_batches_and_low_precision():
    rates = jnp.array([[0.5, 3.0], [8.0, 20.0]], jnp.bfloat16)
    logits, values = rj.poisson_support(rates)
    assert logits.dtype == values.dtype == jnp.float32 and logits.shape == (2, 2, values.size)
    law = [st.poisson(float(rate)).pmf(3) for rate in rates.ravel()]
    np.testing.assert_allclose(jnp.exp(logits[..., 3]).ravel(), law, rtol=1e-5)
    both, _ = rj.negative_binomial_support(jnp.array([[1.0], [4.0]]), jnp.array([-1.0, 0.5]), 80)
    assert both.shape == (2, 2, 80)
    np.testing.assert_allclose(jnp.exp(both[1, 0, 5]), st.nbinom(4, sp.expit(1)).pmf(5), rtol=1e-5)
    some, _ = rj.binomial_support(np.array([2, 5]), jnp.array([0.3, 0.3]))
    expected = np.append(st.binom(2, sp.expit(0.3)).logpmf([0, 1, 2]), [-np.inf] * 3)
    np.testing.assert_allclose(some[0], expected, rtol=1e-5)


@pytest.mark.few(33)
@quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rj.poisson_support(-1.0), "rate must be positive, got -1.0"),
        (lambda: rj.poisson_support(jnp.array([1, 2])), "rate must be floating point"),
        *(
            (lambda rate=rate: rj.poisson_support(rate), "num_values must be at most 10000")
            for rate in (1e5, 1e7, 1e9, 1e38, np.array([1.0, 1e9]))
        ),
        (lambda: rj.poisson_support(1e9, 100), "num_values must be at most 10000"),
        (lambda: rj.geometric_support(-1e4), "num_values must be at most 10000"),
        (lambda: rj.negative_binomial_support(2.0, 1e4), "num_values must be at most 10000"),
        (lambda: rj.negative_binomial_support(1e9, 0.0), "num_values must be at most 10000"),
        (lambda: rj.binomial_support(10**9, 0.0), "num_values must be at most 10000"),
        (lambda: rj.poisson_support(np.inf), "rate must be finite, got inf"),
        (lambda: rj.poisson_support(np.nan), "rate must be positive, got nan"),
        (lambda: rj.geometric_support(-np.inf), "logits must be above -inf, got -inf"),
        (lambda: rj.geometric_support(np.nan), "logits must be above -inf, got nan"),
        (lambda: rj.negative_binomial_support(2.0, np.inf), "logits must be below inf, got inf"),
        (lambda: rj.negative_binomial_support(2.0, np.nan), "logits must be below inf, got nan"),
        (lambda: rj.negative_binomial_support(np.inf, 0.0), "total_count must be finite, got inf"),
        (lambda: rj.binomial_support(5, np.nan), "logits must be log-odds, not NaN, got nan"),
        (lambda: rj.binomial_support(np.inf, 0.0), "total_count must be integers"),
        (lambda: rj.poisson_support(10.0, 12), "num_values must be at least 33 .* got 12"),
        (lambda: rj.poisson_support(10.0, 0), r"num_values must be an integer in \[1, 10000\]"),
        (lambda: rj.poisson_support(10.0, 12.5), "num_values must be an integer"),
        (lambda: jax.jit(rj.poisson_support)(10.0), "num_values must be given, as the parameters are traced"),
        (lambda: jax.jit(rj.negative_binomial_support)(1.0, 0.0), "num_values must be given"),
        (lambda: rj.poisson_support(1.0, eps=0.0), r"eps must be in \(0, 1\)"),
        (lambda: rj.geometric_support("one"), "logits must be"),
        (lambda: rj.binomial_support(2.5, 0.0), "total_count must be integers"),
        (lambda: rj.binomial_support(0, 0.0), "total_count must be integers"),
        (lambda: jax.jit(rj.binomial_support)(3, 0.0), "total_count must be .*known before tracing"),
        (lambda: rj.negative_binomial_support(0.0, 0.0), "total_count must be positive"),
        (lambda: rj.negative_binomial_support(jnp.ones(2), jnp.zeros(3)), "must have batch shapes that"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.whole
@quick
@pytest.mark.parametrize(
    "support",
    [
        lambda x: rj.poisson_support(jnp.exp(x), 20),
        lambda x: rj.geometric_support(x, 20),
        lambda x: rj.binomial_support(5, x),
        lambda x: rj.negative_binomial_support(4.0, x, 20),
    ],
    ids=["poisson", "geometric", "binomial", "negative_binomial"],
)
def test_gradients_inside_of_a_scan_are_those_outside(support):
    """With constants among the parameters, which compilers fold."""

    def kl(x, y):
        p, q = support(x)[0], support(y)[0]
        return jnp.sum(jnp.exp(p) * (p - q))

    slope = jax.grad(kl, (0, 1))
    xs = jax.random.normal(KEY, (5, 3))
    inside = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, slope(x, jnp.zeros(3))), None, xs)[1])(xs)
    for i, x in enumerate(xs):
        for found, expected in zip(inside, jax.jit(slope)(x, jnp.zeros(3)), strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)
