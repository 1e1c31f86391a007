"""Subsets and orders as families of the estimators: their laws, and gradients compared with full sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp

import relaxit_jax as rj
from helpers import KEY, P_VALUE, chi_square
from relaxit_jax import diagnostics as dg
from relaxit_jax import estimators as es

pytestmark = pytest.mark.usefixtures("fast_compilation")
LOGITS = np.array([[0.3, -0.7, 1.1, 0.2], [-0.2, 0.9, 0.0, -1.0]], np.float32)
FAMILIES = {
    "simple": lambda logits, **more: es.Subset(logits, 2, **more),
    "top_k": lambda logits, **more: es.Subset(logits, 2, "top_k", **more),
    "order": es.PlackettLuce,
}
families = pytest.mark.parametrize("name", FAMILIES)


def f(weight, b):
    """A function far from linear, for a subset or a permutation matrix."""
    x = b.reshape(*b.shape[:1], -1)
    place = jnp.arange(x.shape[-1], dtype=b.dtype)
    return 1 + jnp.tanh(x @ jnp.cos(place) + weight * (x @ jnp.sin(2 * place)) ** 2)


def mass_by_hand(name, logits, outcome):
    """The mass from the definition of the law, in float64."""
    w = np.exp(logits.astype(float))
    if name == "simple":
        total = sum(w[list(c)].prod() for c in itertools.combinations(range(4), 2))
        return w[outcome == 1].prod() / total

    def ordered(order):
        left, chance = w.sum(), 1.0
        for item in order:
            chance *= w[item] / left
            left -= w[item]
        return chance

    if name == "order":
        return ordered(outcome.argmax(-1))
    return sum(map(ordered, itertools.permutations(np.flatnonzero(outcome))))


@families
def test_draws_have_the_law_of_log_prob(name):
    q = FAMILIES[name](jnp.asarray(LOGITS[0]))
    count, events = q.outcomes()
    assert count == sp.comb(4, 2) if name != "order" else count == 24
    outcomes = np.asarray(events(jnp.arange(count)))
    assert len({x.tobytes() for x in outcomes}) == count
    masses = np.array([mass_by_hand(name, LOGITS[0], x) for x in outcomes])
    np.testing.assert_allclose(np.exp(jax.jit(jax.vmap(q.log_prob))(outcomes)), masses, rtol=2e-5)
    np.testing.assert_allclose(masses.sum(), 1, rtol=1e-12)
    draws = np.asarray(jax.jit(lambda key: q.sample(key, (20_000,)))(KEY))
    keys = {x.tobytes(): i for i, x in enumerate(outcomes)}
    assert chi_square(np.array([keys[x.tobytes()] for x in draws]), masses) > P_VALUE


@pytest.mark.few(0, "rloo-order")
@families
@pytest.mark.parametrize("estimator", [es.reinforce, es.rloo])
def test_mean_is_exact_to_the_second_order(name, estimator, pytestconfig):
    """It is checked in the logits and in a parameter of f, including second derivatives."""
    start = jnp.append(LOGITS.ravel(), 0.4)

    def total(estimator, x, **options):
        q = FAMILIES[name](x[:-1].reshape(2, 4))
        return jnp.sum(estimator(f=functools.partial(f, x[-1]), q=q, **options))

    n = 20_000
    keys = jax.random.split(KEY, n)
    for order in range(2 if pytestconfig.option.quick else 3):
        of = [lambda g: g, jax.grad, jax.hessian][order]
        each = lambda key, of=of: of(lambda x: total(estimator, x, key=key))(start)
        found = np.asarray(jax.jit(lambda keys, e=each: jax.lax.map(e, keys, batch_size=2000))(keys), float)
        exact = np.asarray(jax.jit(of(lambda x: total(es.exact, x)))(start))
        error = found.std(0) / n**0.5
        assert (np.abs(found.mean(0) - exact) < 4.8 * error + 2e-5).all(), order
        assert np.abs(exact).max() > 10 * np.median(error)


@pytest.mark.whole
@families
def test_rloo_has_less_variance_than_reinforce_and_is_in_reports(name):
    relaxed = {
        "simple": lambda key, logits: rj.simple_top_k(key, logits, 2),
        "top_k": lambda key, logits: rj.relaxed_top_k(key, logits, 2, 0.5),
    }
    methods = {"reinforce": es.reinforce, "rloo": es.rloo}
    if name in relaxed:
        methods["relaxed"] = dg.from_sampler(relaxed[name])
    q = FAMILIES[name](jnp.asarray(LOGITS))
    report = dg.gradient_report(KEY, functools.partial(f, 0.4), q, methods, 20_000, batch_size=2000)
    assert "exact" in report.reference and not report["rloo"]["biased"] and not report["reinforce"]["biased"]
    assert report["rloo"]["variance"] < report["reinforce"]["variance"]
    assert list(report.calls) == [1, 2, 1][: len(methods)]
    if name in relaxed:
        assert report["relaxed"]["biased"] and report["relaxed"]["variance"] < report["rloo"]["variance"]


@pytest.mark.whole
@families
def test_several_in_one_event_and_aux(name):
    """Both rows belong to one call of f, so the log-probabilities add up."""
    one, both = FAMILIES[name](jnp.asarray(LOGITS)), FAMILIES[name](jnp.asarray(LOGITS), event_ndims=2)
    assert one.batch_shape == (2,) and both.batch_shape == ()
    sample = both.sample(KEY)
    assert sample.shape == both.shape == one.shape
    np.testing.assert_allclose(both.log_prob(sample), one.log_prob(sample).sum(), rtol=1e-6)
    value, aux = es.rloo(KEY, lambda b: (jnp.sum(b**2), b), both, has_aux=True)
    assert value == sample.sum() and aux.shape == sample.shape
    assert both.outcomes()[0] == one.outcomes()[0] ** 2
    passed = jax.jit(lambda q: es.rloo(KEY, functools.partial(f, 0.4), q))(one)  # it is a pytree
    np.testing.assert_allclose(passed, es.rloo(KEY, functools.partial(f, 0.4), one), rtol=1e-5)


def test_bad_arguments_are_named():
    q = es.Subset(jnp.zeros(4), 2)
    for estimator in (es.rebar, es.vimco, functools.partial(es.relax, control_variate=jnp.sum)):
        with pytest.raises(
            ValueError, match=r"q must be a family .*; subsets, orders, chains and trees work"
        ):
            estimator(KEY, jnp.sum, q)
    for k in (0, 5, 2.0):
        with pytest.raises(ValueError, match=r"k must be an integer in \[1, 4\]"):
            es.Subset(jnp.zeros(4), k)
    with pytest.raises(ValueError, match="law must be 'simple' or 'top_k', got 'simpel'"):
        es.Subset(jnp.zeros(4), 2, "simpel")
    with pytest.raises(ValueError, match="logits must be finite"):
        es.PlackettLuce(jnp.array([0.0, -jnp.inf]))
    with pytest.raises(ValueError, match="event_ndims must be an integer in"):
        es.PlackettLuce(jnp.zeros(3), event_ndims=2)
    with pytest.raises(ValueError, match="at most 1048576 outcomes"):
        es.exact(lambda b: jnp.sum(b), es.Subset(jnp.zeros(40), 20))
    with pytest.raises(ValueError, match="at most 1048576 outcomes"):
        es.exact(lambda b: jnp.sum(b), es.PlackettLuce(jnp.zeros(12)))
