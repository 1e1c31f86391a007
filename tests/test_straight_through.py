"""Gradients of exact one-hot draws against their definitions, closed forms and enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special as sp
import scipy.stats as st

import relaxit_jax as rj
from relaxit_jax import _random as rng

KEY = jax.random.key(4)
quick = pytest.mark.usefixtures("fast_compilation")
as_users = pytest.mark.usefixtures("as_users_compile")
LOGITS = np.array([[0.5, -1.0, 1.2], [0.0, 1.5, -0.5]])
FORMS = np.random.default_rng(5)
LINEAR, QUADRATIC, CUBIC = (FORMS.normal(size=(6,) * order) for order in (1, 2, 3))


def linear(z):
    return jnp.vdot(LINEAR, z.ravel())


def quadratic(z):
    return jnp.einsum("ij,i,j", QUADRATIC, z.ravel(), z.ravel())


def cubic(z):
    return jnp.einsum("ijk,i,j,k", CUBIC, z.ravel(), z.ravel(), z.ravel())


def enumerated(f, logits=LOGITS):
    """The gradient of E f in float64, over all pairs of classes."""
    p = sp.softmax(logits, -1)
    gradient = np.zeros_like(logits)
    for classes in itertools.product(range(3), repeat=2):
        z = np.eye(3)[list(classes)]
        chance = (p * z).sum(-1)
        gradient += float(f(z)) * chance.prod() * (z - p)  # f times the slope of the log-probability
    return gradient


def estimates(sampler, f, n, key=KEY):
    """n draws and gradients of f at them."""

    def one(key):
        value, pull = jax.vjp(lambda logits: sampler(key, logits), jnp.asarray(LOGITS, jnp.float32))
        return value, pull(jax.grad(f)(value))[0]

    keys = jax.random.split(key, n)
    return map(np.asarray, jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=10_000))(keys))


@functools.cache
def exact_mean(sampler, f):
    """The mean gradient of an estimator that is a function of the draw, without an error."""
    draws, gradients = estimates(sampler, f, 3000)
    classes = draws.argmax(-1)
    p, mean = sp.softmax(LOGITS, -1), 0
    for pair in itertools.product(range(3), repeat=2):
        mine = gradients[(classes == pair).all(-1)]
        assert len(mine) and np.ptp(mine, 0).max() < 1e-5
        mean = mean + p[0, pair[0]] * p[1, pair[1]] * mine[0].astype(float)
    return mean


def jacobian(p):
    return np.diag(p) - np.outer(p, p)


def of_tempered(d, l, tau):
    return jacobian(sp.softmax(l / tau)) / tau


def of_reinmax(d, l, tau):
    return 2 * jacobian((d + sp.softmax(l / tau)) / 2) - jacobian(sp.softmax(l)) / 2


def of_gapped(d, l, tau, gap=0.8):
    m1 = (l.max() - (l * d).sum()) * d
    m2 = np.maximum(l + gap - l.max(), 0) * (1 - d)
    return jacobian(sp.softmax((l + m1 - m2) / tau)) / tau


@pytest.mark.few(3)
@quick
@pytest.mark.parametrize("tau", [0.4, 1.0, 2.5])
@pytest.mark.parametrize(
    ("sampler", "definition"),
    [
        (rj.straight_through_categorical, of_tempered),
        (rj.reinmax, of_reinmax),
        (functools.partial(rj.gapped_straight_through, gap=0.8), of_gapped),
    ],
    ids=["straight_through_categorical", "reinmax", "gapped_straight_through"],
)
def test_backward_is_what_its_definition_says_of_every_draw(sampler, definition, tau):
    logits, weights = np.array([0.3, -0.9, 1.1, 0.8]), np.array([1.0, -0.4, 0.2, 2.0])

    @jax.jit
    @jax.vmap
    def both(key):
        draw, pull = jax.vjp(lambda l: sampler(key, l, tau), jnp.asarray(logits, jnp.float32))
        return draw, pull(jnp.asarray(weights, jnp.float32))[0]

    draws, gradients = both(jax.random.split(KEY, 100))
    assert set(np.argmax(draws, -1).tolist()) == {0, 1, 2, 3}
    for draw, gradient in zip(np.asarray(draws), gradients, strict=True):
        np.testing.assert_allclose(gradient, definition(draw, logits, tau) @ weights, rtol=2e-5, atol=1e-6)


def surrogate_of_reinmax(key, draw, l, tau):
    p1 = (draw + jax.nn.softmax(l / tau)) / 2
    raised = l + jax.lax.stop_gradient(jnp.log(p1) - l)
    return 2 * jax.nn.softmax(raised) - jax.nn.softmax(l) / 2


def surrogate_of_rao(key, draw, l, tau, shift=0.0):
    log_p, (_, noise_key) = jax.nn.log_softmax(l) + shift, jax.random.split(key)
    keys = jax.random.split(noise_key, 4)
    gaps = jnp.stack([rng.conditional_gumbel(k, log_p, draw == 1)[1] for k in keys])
    fixed = jax.lax.stop_gradient(gaps - l)
    return jnp.mean(jax.nn.softmax((l + fixed) / tau), 0)


def surrogate_of_reinmax_rao(key, draw, l, tau):
    return 2 * surrogate_of_rao(key, draw, l, tau, -jnp.log(2.0)) - jax.nn.softmax(l) / 2


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("sampler", "surrogate"),
    [
        (rj.reinmax, surrogate_of_reinmax),
        (functools.partial(rj.gumbel_rao, num_samples=4), surrogate_of_rao),
        (functools.partial(rj.reinmax_rao, num_samples=4), surrogate_of_reinmax_rao),
    ],
    ids=["reinmax", "gumbel_rao", "reinmax_rao"],
)
def test_second_derivatives_are_those_of_the_surrogate(sampler, surrogate):
    """In which the noise, and what raises the class that was drawn, are constants."""
    logits, weights = jnp.array([0.3, -0.9, 1.1, 0.8]), jnp.array([1.0, -0.4, 0.2, 2.0])

    @jax.vmap
    def both(key):
        draw = sampler(key, logits, 0.7)
        of_draw = jax.hessian(lambda l: weights @ sampler(key, l, 0.7))
        return of_draw(logits), jax.hessian(lambda l: weights @ surrogate(key, draw, l, 0.7))(logits)

    np.testing.assert_allclose(*both(jax.random.split(KEY, 20)), rtol=2e-5, atol=3e-6)


@pytest.mark.whole
@quick
def test_first_order_is_exact_for_linear_and_second_order_for_quadratic_functions():
    first, second = rj.straight_through_categorical, rj.reinmax
    np.testing.assert_allclose(exact_mean(first, linear), enumerated(linear), atol=2e-6)
    np.testing.assert_allclose(exact_mean(second, linear), enumerated(linear), atol=2e-6)
    np.testing.assert_allclose(exact_mean(second, quadratic), enumerated(quadratic), atol=1e-5)
    # and not beyond: their biases are far from rounding
    assert np.linalg.norm(exact_mean(first, quadratic) - enumerated(quadratic)) > 0.1
    assert np.linalg.norm(exact_mean(second, cubic) - enumerated(cubic)) > 0.1
    halved = functools.partial(second, tau=0.5)
    assert np.linalg.norm(exact_mean(halved, quadratic) - enumerated(quadratic)) > 0.1


@quick
def test_second_order_is_not_always_better():
    """The documentation says that there are functions on which ReinMax has the larger bias."""
    z = jax.nn.one_hot(jnp.array([0, 2]), 3)

    def steep(draw, order=9):
        return jnp.vdot(z, draw) ** order / 2**order  # 1 at one pair of classes, flat elsewhere

    exact = enumerated(steep)
    bias = [
        np.linalg.norm(exact_mean(sampler, steep) - exact)
        for sampler in (rj.straight_through_categorical, rj.reinmax)
    ]
    assert bias[1] > 1.1 * bias[0]


def total_variance(gradients):
    """The variance over all coordinates, and its standard error."""
    squares = ((gradients - gradients.mean(0)) ** 2).sum((1, 2))
    return squares.mean(), squares.std() / len(squares) ** 0.5


def of_rao_by_rejection(d, l, tau, noise):
    """Mean and standard error of the Jacobian, from the Gumbel noise under which d wins."""
    perturbed = l + noise
    z = sp.softmax(perturbed[perturbed.argmax(-1) == d] / tau, -1)
    each = (np.einsum("ni,ij->nij", z, np.eye(len(l))) - np.einsum("ni,nj->nij", z, z)) / tau
    return each.mean(0), each.std(0) / len(z) ** 0.5


def gumbel_rao_given(d, l, tau, noise):
    return of_rao_by_rejection(d, l, tau, noise)


def reinmax_rao_given(d, l, tau, noise):
    theta = np.log((np.eye(len(l))[d] + sp.softmax(l)) / 2)
    mean, error = of_rao_by_rejection(d, theta, tau, noise)
    return 2 * mean - jacobian(sp.softmax(l)) / 2, 2 * error


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("tau", [0.5, 1.5])
@pytest.mark.parametrize(
    ("sampler", "given"),
    [(rj.gumbel_rao, gumbel_rao_given), (rj.reinmax_rao, reinmax_rao_given)],
    ids=["gumbel_rao", "reinmax_rao"],
)
def test_rao_blackwellised_backward_is_the_conditional_mean(sampler, given, tau):
    logits = np.array([0.3, -0.9, 1.1, 0.2])
    noise = np.random.default_rng(6).gumbel(size=(400_000, 4))

    @jax.jit
    @jax.vmap
    def both(key):
        draw, pull = jax.vjp(lambda l: sampler(key, l, tau, 500), jnp.asarray(logits, jnp.float32))
        return draw, jax.vmap(lambda w: pull(w)[0])(jnp.eye(4))

    draws, jacobians = map(np.asarray, both(jax.random.split(KEY, 400)))
    for d in range(4):
        mine = jacobians[draws.argmax(-1) == d]
        mean, error = given(d, logits, tau, noise)
        spread = np.hypot(error, mine.std(0) / len(mine) ** 0.5)
        assert len(mine) > 10 and (np.abs(mine.mean(0) - mean) < 4.8 * spread).all()


@pytest.mark.whole
@quick
@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_gumbel_rao_of_two_classes_by_quadrature(tau):
    logit = 0.7  # of class 0 against class 1

    def slope(x):  # of sigmoid(x / tau), weighted with the density of x = logit + logistic noise
        z = sp.expit(x / tau)
        return z * (1 - z) / tau * st.logistic.pdf(x, logit)

    expected = [scipy.integrate.quad(slope, *ends)[0] for ends in ((0, np.inf), (-np.inf, 0))]
    expected /= np.array([sp.expit(logit), sp.expit(-logit)])
    draw = lambda key, l: rj.gumbel_rao(key, l, tau, 200)
    pull = lambda key: jax.vjp(functools.partial(draw, key), jnp.array([logit, 0.0]))
    both = lambda key: (pull(key)[0], pull(key)[1](jnp.array([1.0, 0.0]))[0])
    draws, gradients = map(np.asarray, jax.jit(jax.vmap(both))(jax.random.split(KEY, 2000)))
    np.testing.assert_allclose(gradients.sum(-1), 0, atol=1e-5)
    for d in (0, 1):
        mine = gradients[draws[:, d] == 1, 0]
        assert abs(mine.mean() - expected[d]) < 4.5 * mine.std() / len(mine) ** 0.5


@pytest.mark.whole
@quick
@pytest.mark.parametrize("f", [quadratic, cubic])
def test_gumbel_rao_has_the_mean_of_straight_through_gumbel_softmax_and_less_variance(f):
    n, tau = 100_000, 0.5
    _, plain = estimates(functools.partial(rj.gumbel_softmax, tau=tau, hard=True), f, n)
    variance = {}
    for samples in (1, 2, 10):
        sampler = functools.partial(rj.gumbel_rao, tau=tau, num_samples=samples)
        _, rao = estimates(sampler, f, n, jax.random.key(samples))
        error = np.sqrt((plain.var(0) + rao.var(0)) / n)
        assert (np.abs(rao.mean(0) - plain.mean(0)) < 4.5 * error).all()
        squares = ((rao - rao.mean(0)) ** 2).sum((1, 2))
        variance[samples] = squares.mean(), squares.std() / n**0.5
    one, two, ten = (variance[samples] for samples in (1, 2, 10))
    # One sample is straight-through Gumbel-softmax; n of them leave V + (V1 - V) / n, with V the variance
    # of the draw.
    squares = ((plain - plain.mean(0)) ** 2).sum((1, 2))
    assert abs(squares.mean() - one[0]) < 4.5 * np.hypot(squares.std() / n**0.5, one[1])
    assert one[0] - two[0] > 4.5 * np.hypot(one[1], two[1])
    assert two[0] - ten[0] > 4.5 * np.hypot(two[1], ten[1])
    error = np.sqrt((ten[1]) ** 2 + (1.8 * two[1]) ** 2 + (0.8 * one[1]) ** 2)
    assert abs(one[0] - ten[0] - 1.8 * (one[0] - two[0])) < 4.5 * error


@pytest.mark.whole
@pytest.mark.parametrize("f", [quadratic, cubic])
def test_reinmax_rao_trades_variance_for_bias(f, record_property):
    n, sampler = 100_000, functools.partial(rj.reinmax_rao, num_samples=20)
    _, gradients = estimates(sampler, f, n)
    error = np.sqrt((gradients.var(0) / n).sum())
    bias = {"reinmax_rao": float(np.linalg.norm(gradients.mean(0) - enumerated(f)))}
    bias["reinmax"] = float(np.linalg.norm(exact_mean(rj.reinmax, f) - enumerated(f)))
    record_property("bias", bias)
    if f is quadratic:
        assert bias["reinmax"] < 1e-5 and bias["reinmax_rao"] > 10 * error
    mine, theirs = total_variance(gradients), total_variance([*estimates(rj.reinmax, f, n)][1])
    record_property("variance", {"reinmax_rao": float(mine[0]), "reinmax": float(theirs[0])})
    assert theirs[0] - mine[0] > 4.5 * np.hypot(mine[1], theirs[1])


@pytest.mark.whole
@quick
@pytest.mark.parametrize("sampler", [rj.gumbel_rao, rj.reinmax_rao])
def test_forward_mode_is_the_transpose_of_reverse_mode(sampler):
    v, w = jax.random.normal(jax.random.key(1), (2, 5, 3))
    draw = lambda l, tau: sampler(KEY, l, tau, 7)
    point = jnp.full((5, 3), 0.2), jnp.full(5, 0.7)
    pushed = jax.jit(lambda v, t: jax.jvp(draw, point, (v, t))[1])(v, jnp.arange(5.0))
    pulled = jax.jit(lambda w: jax.vjp(draw, *point)[1](w))(w)
    np.testing.assert_allclose(
        jnp.vdot(w, pushed), jnp.vdot(v, pulled[0]) + jnp.vdot(jnp.arange(5.0), pulled[1]), rtol=1e-5
    )


@pytest.mark.whole
@as_users
@pytest.mark.parametrize("sampler", [rj.gumbel_rao, rj.reinmax_rao])
def test_memory_does_not_grow_with_the_number_of_samples(sampler):
    logits = jax.ShapeDtypeStruct((256, 10, 128), jnp.float32)

    def used(samples):
        loss = lambda l, w, key: jnp.sum(w * sampler(key, l, 0.5, samples))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(logits, logits, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    many, few = used(100), used(10)
    assert many < 1.3 * few
    assert many < 16 * 4 * 256 * 10 * 128  # a few arrays of the size of the draw, not 100


@quick
@pytest.mark.parametrize("sampler", [rj.gumbel_rao, rj.reinmax_rao])
def test_classes_that_are_hardly_ever_drawn_count_at_a_high_temperature(sampler):
    """Where exp(-log p) overflows, log-space values go on: at tau = 1e3 noise hardly matters."""
    logits = jnp.array([0.0, -30.0, -59.0, -200.0, -1000.0, -9000.0])
    weights = jnp.array([0.0, 0.0, 1.0, -3.0, 1.0, -2.0])
    pull = jax.jit(lambda key: jax.vjp(lambda l: sampler(key, l, 1e3, 50), logits)[1](weights)[0])
    gradient = np.mean([pull(key) for key in jax.random.split(KEY, 20)], 0)
    shift = [np.log(2), 0, 0, 0, 0, 0] if sampler is rj.reinmax_rao else np.zeros(6)
    expected = of_tempered(None, np.array(logits) + shift, 1e3) @ np.array(weights)
    expected = 2 * expected if sampler is rj.reinmax_rao else expected  # J0 is nothing here
    np.testing.assert_allclose(gradient, expected, rtol=0.01)


@pytest.mark.parametrize("hard", [True, False])
def test_an_exact_draw_makes_no_softmax_where_no_gradient_is_asked_for(hard):
    """It reads the logits twice, for their largest and for the largest with noise, and stores neither."""
    draws = [
        functools.partial(rj.gumbel_softmax, hard=True),
        lambda key, logits, tau: rj.straight_through_categorical(key, logits),
        rj.reinmax,
        functools.partial(rj.gumbel_rao, num_samples=2),
    ]
    for draw in draws if hard else [rj.gumbel_softmax]:
        lowered = jax.jit(draw).trace(jax.random.key(0), jnp.zeros((5, 3)), 0.5)
        program = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert ("applies stablehlo.add across" in program) != hard, draw
