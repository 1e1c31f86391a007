"""Derivatives of the estimators' gradients: of every order, in the logits and in f's parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp

from estimator_cases import ESTIMATORS, FAMILIES, PAIRS, interacting
from helpers import quick
from relaxit_jax import estimators as es

KEY = jax.random.key(11)

pytestmark = quick
WEIGHT = 0.7
# a batch of one; one of these bits has a logit of 0, where the law of an antithetic pair has a kink
LOGITS = {family: logits[1:] for family, (_, logits) in FAMILIES.items()}
METHODS = ESTIMATORS | {"baseline": functools.partial(es.reinforce, baseline=0.8)}


def total(estimator, family, x, f=interacting, cls=None):
    """The estimate, as a function of one vector: the logits, and f's own parameter behind them."""
    q = (cls or FAMILIES[family][0])(x[:-1].reshape(LOGITS[family].shape))
    return jnp.sum(estimator(f(x[-1], q.event_ndims), q))


def point(family, dtype=np.float32):
    return np.append(LOGITS[family].ravel(), WEIGHT).astype(dtype)


# --- over all draws, in float64 ---------------------------------------------------------------


def every_draw(name, family):
    """Every possible draw of the estimator, and its probability.

    For arm and disarm these are the midpoints of intervals of u, where the estimate and its derivatives are
    linear in u.
    """
    logits = LOGITS[family].astype(float)
    if name in ("arm", "disarm"):
        p = sp.expit(logits[0])
        edges = np.sort([0 * p, p, 1 - p, 1 + 0 * p], 0)
        pick = np.stack(np.meshgrid(*len(p) * [np.arange(3)]), -1).reshape(-1, 1, len(p))
        u = np.take_along_axis((edges[1:] + edges[:-1]) / 2, pick[:, 0], 0)[:, None]
        chance = np.take_along_axis(np.diff(edges, axis=0), pick[:, 0], 0).prod(-1)
        return chance, (1.0 * (1 - u < p), 1.0 * (u < p), u - 0.5)
    count, events = FAMILIES[family][0](logits).outcomes()
    outcomes = np.asarray(events(jnp.arange(count)))[:, None]
    chance = np.exp([float(FAMILIES[family][0](logits).log_prob(b)[0]) for b in outcomes])
    if name == "rloo":
        first, second = (i.ravel() for i in np.indices((count, count)))
        return chance[first] * chance[second], np.stack([outcomes[first], outcomes[second]], 1)
    return chance, outcomes


@pytest.mark.few(3, "disarm-bits")
@pytest.mark.parametrize(
    ("name", "family"),
    [pair for pair in PAIRS if pair[0] in ("reinforce", "baseline", "rloo", "arm", "disarm")],
)
def test_the_sum_over_all_draws_is_exact_to_the_third_order(name, family):
    with jax.enable_x64(True):
        chance, draws = every_draw(name, family)
        np.testing.assert_allclose(chance.sum(), 1, rtol=1e-12)

        def estimate(x, draws):
            class Given(FAMILIES[family][0]):
                sample = antithetic = lambda self, *_: draws

            return total(functools.partial(METHODS[name], KEY), family, x, cls=Given)

        exact = functools.partial(total, es.exact, family)
        for order in range(4):
            found = jax.jit(jax.vmap(estimate, (None, 0)))(point(family, float), draws)
            expected = jax.jit(exact)(point(family, float))
            mean = np.tensordot(chance, found, 1)
            np.testing.assert_allclose(mean, expected, rtol=1e-9, atol=1e-12, err_msg=f"order {order}")
            assert order < 2 or np.abs(expected).max() > 0.01
            estimate, exact = (jax.grad if order == 0 else jax.jacfwd)(estimate), jax.jacfwd(exact)


# --- by draws ---------------------------------------------------------------------------------


def hessians(estimator, family, n, f=interacting):
    """n Hessians, in the logits and f's parameter, and the exact one."""
    hessian = jax.hessian(lambda x, key: total(functools.partial(estimator, key), family, x, f))
    found = jax.jit(lambda keys: jax.lax.map(lambda k: hessian(point(family), k), keys, batch_size=5000))
    exact = jax.jit(jax.hessian(lambda x: total(es.exact, family, x, f)))
    return np.asarray(found(jax.random.split(KEY, n)), float), np.asarray(exact(point(family)), float)


def agrees(found, exact):
    """Each element within 4.5 standard errors of its mean, some being 0 in every draw."""
    error = found.std(0) / len(found) ** 0.5
    return (np.abs(found.mean(0) - exact) < 4.5 * error + 1e-6).all()


BLOCKS = [np.s_[..., :-1, :-1], np.s_[..., :-1, -1:], np.s_[..., -1:, :-1]]  # in the logits, and both mixed


@pytest.mark.whole
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_mean_hessian_is_exact(name, family):
    found, exact = hessians(METHODS[name], family, 60_000)
    assert agrees(found, exact)
    for block in BLOCKS:  # a factor of 1.1 would show
        along = (found[block] * exact[block]).sum((1, 2)) / (exact[block] ** 2).sum()
        assert 4.5 * along.std() / len(along) ** 0.5 < 0.1


def with_kinks(weight, event_ndims):
    def f(b):
        x = b.reshape(*b.shape[: b.ndim - event_ndims], -1)
        return jax.nn.relu(weight * x[..., 0] + x[..., 1] - 0.4)

    return f


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_neither_f_nor_the_control_variate_has_to_be_smooth(name, family):
    """Where c has a kink its second derivatives belong to no function, so none may be used."""
    control = lambda z: jnp.sum(jax.nn.relu(z - 0.3), tuple(range(1, z.ndim))) / 4
    estimator = es.rebar if name == "rebar" else functools.partial(es.relax, control_variate=control)
    found, exact = hessians(estimator, family, 60_000, with_kinks)
    assert agrees(found, exact)
    assert min(np.abs(exact[block]).max() for block in BLOCKS) > 0.02


@pytest.mark.whole
@pytest.mark.parametrize(("name", "family"), [p for p in PAIRS if p[0] not in ("rebar_tuned", "rloo_5")])
def test_a_gradient_goes_through_a_training_step(name, family):
    """The gradient of y^T M y / 2, with y after one step of SGD; each y has its own draws."""
    size = LOGITS[family].size
    m = np.random.default_rng(3).normal(size=(size, size))
    m = jnp.asarray(m + m.T, jnp.float32)

    def loss(x, one, two, keep=lambda gradient: gradient):
        slope = lambda e: jax.grad(lambda l: total(e, family, jnp.append(l, x[-1])))(x[:-1])
        y, z = (x[:-1] - 0.5 * keep(slope(e)) for e in (one, two))
        return y @ m @ z / 2

    def estimate(key):
        one, two = (functools.partial(METHODS[name], k) for k in jax.random.split(key))
        return jax.grad(loss)(point(family), one, two)

    mapped = jax.jit(lambda keys: jax.lax.map(estimate, keys, batch_size=5000))
    found = np.asarray(mapped(jax.random.split(KEY, 50_000)), float)
    exactly = lambda *keep: jax.jit(jax.grad(lambda x: loss(x, es.exact, es.exact, *keep)))(point(family))
    assert agrees(found, exactly())
    assert not agrees(found, exactly(jax.lax.stop_gradient))  # what a Hessian of 0 gives


@pytest.mark.whole
@pytest.mark.parametrize(("name", "family"), [("rloo", "classes"), ("disarm", "bits"), ("rebar", "classes")])
def test_transformations_agree(name, family):
    estimate = lambda x, key: total(functools.partial(METHODS[name], key), family, x)
    keys = jax.random.split(KEY, 3)
    expected = jax.jit(jax.vmap(jax.hessian(estimate), (None, 0)))(point(family), keys)
    remat = jax.hessian(jax.checkpoint(estimate))
    inner = jax.jacrev(jax.jit(jax.grad(jax.jit(estimate))))
    for other in (remat, inner):
        scanned = jax.jit(lambda keys, h=other: jax.lax.map(lambda k: h(point(family), k), keys))(keys)
        np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n, f in PAIRS if n in ("reinforce", "rloo", "disarm", "rebar")]
)
def test_second_derivatives_are_finite_at_extreme_logits(name, family):
    cls, logits = FAMILIES[family]
    pattern = np.resize([0.0, -1e4, 0.5, -np.inf, 3.0, 2.5, 1e4], logits.shape).astype(np.float32)

    def estimate(logits, weight, key):
        q = cls(logits)
        return jnp.sum(ESTIMATORS[name](key, interacting(weight, q.event_ndims), q))

    found = jax.jit(jax.vmap(jax.hessian(estimate, (0, 1)), (None, None, 0)))(
        pattern, np.float32(0.1), jax.random.split(KEY, 50)
    )
    assert all(jnp.isfinite(block).all() for block in jax.tree.leaves(found))
    assert np.abs(found[0][0]).max() > 0
