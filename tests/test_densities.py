"""Every density of tests/cases.py integrates to one and matches the draws, to the last digits."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st

import relaxit_jax as rj
from cases import cases, coordinates, has_density, has_log_prob, has_log_space, log_density_coordinates
from helpers import KEY, P_VALUE, as_users, chi_square, dtypes, is_nan, quick, rows, seen, spoiled

REACH = 40.0
EDGES = np.arange(-4.0, 4.5, 1.0)  # of the bins that draws are counted in; they lie on the grid


def grid(case):
    """Midpoints of a grid over the unconstrained coordinates, shape (..., d), and its step.

    The midpoint rule converges exponentially for a smooth density: a tenth suffices in two dimensions too.
    """
    step = 0.1 if case.event else 0.05
    line = np.arange(-REACH, REACH, step) + step / 2
    if not case.event:
        return line[:, None], step
    reach = line[np.abs(line) < 25]
    return np.stack(np.meshgrid(reach, reach, indexing="ij"), -1), step


def bins(y):
    """The number of the bin of each point."""
    codes = np.digitize(y, EDGES)
    return codes[..., 0] if y.shape[-1] == 1 else codes[..., 0] * (len(EDGES) + 1) + codes[..., 1]


def cell_law(case, i):
    """Probabilities of the cells of the grid, from the density of element i, and the cells' bins."""
    y, step = grid(case)
    value, log_jacobian = log_density_coordinates(case, y)
    law = jax.jit(functools.partial(case.density, log_space=True, **case.element(i)))
    log_p = law(value)
    return np.exp(np.asarray(log_p, np.float64) + log_jacobian) * step ** y.shape[-1], bins(y)


@quick
@rows(cases(has_density, has_log_space, lambda case: case.atoms is None))
def test_density_integrates_to_one_and_is_that_of_the_draws(case):
    n = 20_000
    logs = dataclasses.replace(case, sample_options={"log_space": True})
    draws = np.asarray(jax.jit(lambda key: logs.draw(key, (n, 2)))(KEY), np.float64)
    for i in range(2):
        cells, number = cell_law(case, i)
        np.testing.assert_allclose(cells.sum(), 1, atol=1e-4)
        law = np.bincount(number.ravel(), cells.ravel(), (len(EDGES) + 1) ** cells.ndim)
        counts = np.bincount(bins(coordinates(case, draws[:, i])), minlength=len(law))
        rare = law * n < 10  # together in one bin
        law = np.append(law[~rare], law[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
        kept = law * n > 5
        assert counts[~kept].sum() < 30
        expected = law[kept] / law[kept].sum() * counts[kept].sum()
        assert st.chisquare(counts[kept], expected).pvalue > P_VALUE


@pytest.mark.few(2, "[hard_concrete]")
@quick
@rows(cases(lambda case: case.atoms is not None))
def test_atoms_and_density_sum_to_one_and_are_those_of_the_draws(case):
    n = 50_000
    inside = (np.arange(4000) + 0.5) / 4000
    draws = np.asarray(case.draw(KEY, (n, 2)), np.float64)
    for i in range(2):
        law = jax.jit(functools.partial(case.density, **case.element(i)))
        zero, one = np.exp(np.asarray(law(np.float32([0, 1])), np.float64))
        np.testing.assert_allclose((zero, one), case.atoms(**seen(case).element(i)), rtol=2e-6)
        density = np.exp(np.asarray(law(inside.astype(np.float32)), np.float64))
        np.testing.assert_allclose(zero + one + density.mean(), 1, atol=1e-5)
        tenths = density.reshape(10, -1).mean(-1) / 10
        codes = np.where(draws[:, i] == 0, 0, np.where(draws[:, i] == 1, 11, 1 + draws[:, i] * 10))
        assert chi_square(codes.astype(int), np.array([zero, *tenths, one])) > P_VALUE
        assert (np.asarray(law(np.float32([-0.1, 1.1]))) == -np.inf).all()


@pytest.mark.few(2)
@quick
@rows(cases(has_log_space))
def test_both_forms_of_a_value_have_one_density(case):
    warm = {"tau": np.float32(1.0)} if "tau" in case.params else {}
    logs = dataclasses.replace(case, sample_options={"log_space": True})

    @jax.jit
    def both(warm):
        direct = case.density(case.draw(KEY, (300, 2), **warm), **warm)
        return direct, case.density(logs.draw(KEY, (300, 2), **warm), True, **warm)

    np.testing.assert_allclose(*both(warm), rtol=2e-4, atol=2e-3)


@pytest.mark.few(2)
@as_users
@dtypes
@rows(cases(has_log_space))
def test_density_of_own_draws_agrees_with_float64(case, dtype):
    """The error is below 1e-4, down to tau = 0.01, where most of the draws round to corners.

    Other positive parameters are also much smaller and larger than in the entry.
    """
    logs = dataclasses.replace(case, sample_options={"log_space": True})

    @jax.jit
    def draw(params):
        value = logs.draw(KEY, (400, 2), **params)
        return value, case.density(value, True, **params)

    exact_law = jax.jit(lambda value, params: case.density(value, True, **params))
    params = {n: jnp.asarray(x, dtype) for n, x in case.floats.items()}
    if "scale_tril" in params:  # a correlation matrix has to stay one
        params["scale_tril"] = jnp.asarray(case.params["scale_tril"])
    others = [{"tau": jnp.float32(tau)} for tau in (0.01, 0.1, 3.0) if "tau" in params]
    others += [
        {name: params[name] * jnp.asarray(factor, params[name].dtype)}
        for name in {*case.positive} - {"tau"} for factor in (0.1, 30)
    ]  # fmt: skip
    original = params
    for other in others or [{}]:
        params = original | other
        value, law = draw(params)
        assert value.dtype == law.dtype == jnp.float32
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (value, params))
            exact = exact_law(*wide)
            assert exact.dtype == jnp.float64
        np.testing.assert_allclose(law, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.few(4)
@quick
@rows(cases(has_log_prob))
def test_the_law_in_float64_is_its_formula(case):
    """The law is evaluated as written, with SciPy, at own draws in float64, to digits that float32 lacks."""
    with jax.enable_x64(True):
        params = {n: jnp.asarray(x, jnp.float64) for n, x in case.floats.items()}
        value, law = jax.jit(lambda p: (z := case.draw(KEY, (40, 2), **p), case.density(z, **p)))(params)
        assert law.dtype == jnp.float64
        for i in range(2):
            formula = case.formula(np.asarray(value[:, i]), **seen(case).element(i))
            np.testing.assert_allclose(law[:, i], formula, rtol=1e-11, atol=1e-11)


@pytest.mark.few(1)
@quick
@rows(cases(has_log_prob))
def test_a_bad_number_is_seen_in_its_element_and_nowhere_else(case):
    """NaN in value or parameters, or a parameter that is not positive, also at a corner and outside."""
    taken = inspect.signature(case.log_prob).parameters
    integers = case.support == "order"

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, has_aux=True)
    def both(params, value, log_space):
        return jnp.sum(law := case.density(value, log_space, **params)), law

    for log_space in {False, case.log_space}:
        options = {"log_space": True} if log_space else case.sample_options
        draws = np.asarray(dataclasses.replace(case, sample_options=options).draw(KEY, (3, 2)))
        params = {n: np.array(x, np.float32) for n, x in case.batched.items()}
        good = both(params, draws, log_space)[1]
        for end in (None, 0, 1) if integers else (None, -np.inf, np.inf) if log_space else (None, 0, 1, 2):
            value = draws.copy()
            if end is not None:
                value[:, 0] = end
            for name in case.floats.keys() & taken.keys():
                for bad in (np.nan, 0.0, -0.7, -np.inf) if name in case.positive else (np.nan,):
                    gradients, law = both(spoiled(case, name, bad), value, log_space)
                    assert (is_nan(law) == [True, False]).all(), (name, bad, end)
                    np.testing.assert_allclose(law[:, 1], good[:, 1], rtol=1e-5, atol=1e-5)
                    assert np.isfinite(gradients[name][1]).all(), (name, bad, end)
                    if end is None:
                        assert np.isnan(gradients[name][0]).any(), (name, bad)
        if not integers:
            value = draws.copy()
            value[(slice(None), 0, *(0,) * len(case.event))] = np.nan
            assert (is_nan(both(params, value, log_space)[1]) == [True, False]).all()


@pytest.mark.few(1)
@quick
@rows(cases(has_log_prob, lambda case: case.support != "atoms"))  # an atom moves with its logit
def test_gradient_of_the_density_is_its_derivative(case):
    """Every argument and the value of a density are checked by central differences in float64."""
    log_space = case.log_space
    with jax.enable_x64(True):
        logs = dataclasses.replace(
            case, sample_options={"log_space": True} if log_space else case.sample_options
        )
        params = {n: np.asarray(x, np.float64) for n, x in case.batched.items()}
        value = np.asarray(jax.jit(lambda params: logs.draw(KEY, (20, 2), **params))(params))

        @jax.jit
        @jax.value_and_grad
        def total(arguments):
            law = case.density(**{"value": value, "log_space": log_space} | arguments)
            return jnp.sum(jnp.where(jnp.isfinite(law), law, 0))

        arguments = params | ({"value": value} if has_density(case) else {})
        gradients = total(arguments)[1]
        for name in arguments.keys() & {"value", *inspect.signature(case.log_prob).parameters}:
            x = arguments[name]
            direction = np.cos(1.0 + np.arange(x.size)).reshape(x.shape)
            if name == "value" and case.atoms is not None and not log_space:
                direction = direction * ((x > 0.001) & (x < 0.999))
            if name == "scale_tril":
                direction = np.tril(direction)
            ends = [total(arguments | {name: x + step * direction})[0] for step in (1e-6, -1e-6)]
            slope = np.sum(direction * gradients[name])
            assert slope != 0, name
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.whole
@quick
def test_bernoulli_mass():
    log_prob = rj.straight_through_bernoulli_log_prob
    logits = np.float32([-30, -2, 0, 3, 30, -np.inf, np.inf])
    log_p, log_q = (-np.logaddexp(0, sign * logits.astype(float)) for sign in (-1, 1))
    np.testing.assert_allclose(log_prob(np.ones(7), logits), log_p, rtol=1e-5)
    np.testing.assert_allclose(log_prob(np.zeros(7, int), logits), log_q, rtol=1e-5)
    assert (log_prob(np.full(7, 0.5), logits) == -np.inf).all()
    slope = jax.vmap(jax.grad(log_prob))(jnp.float32([0, 1]), jnp.float32([-2.0, 3.0]))
    np.testing.assert_allclose(slope, [-2, 3])  # the weight the straight-through gradient carries
    assert jnp.isfinite(jax.vmap(jax.grad(log_prob, 1))(jnp.zeros(7), jnp.asarray(logits))).all()


@pytest.mark.whole
@quick
def test_stochastic_times_smooth_mass():
    logits = np.float32([-9, -1, 0.5, 6])
    root = np.exp(-np.logaddexp(0, -logits.astype(float)) / 2)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        draws = rj.stochastic_times_smooth(KEY, jnp.asarray(logits, dtype), shape=(500, 4))
        law = np.asarray(rj.stochastic_times_smooth_log_prob(draws, jnp.asarray(logits, dtype)))
        hit = np.asarray(draws) > 0
        seen_root = np.exp(-np.logaddexp(0, -np.asarray(jnp.asarray(logits, dtype), float)) / 2)
        np.testing.assert_allclose(np.exp(law), np.where(hit, seen_root, 1 - seen_root), rtol=1e-5)
    np.testing.assert_allclose(
        rj.stochastic_times_smooth_log_prob(jnp.zeros(4), logits), np.log1p(-root), rtol=1e-5
    )
    assert (rj.stochastic_times_smooth_log_prob(jnp.float32(root * 0.9), logits) == -jnp.inf).all()
    subnormal = jnp.exp(-15.0).astype(jnp.float16)  # sqrt(p) to the three bits that float16 has there
    np.testing.assert_allclose(
        rj.stochastic_times_smooth_log_prob(subnormal, jnp.float16(-30)), -15, rtol=1e-5
    )
    far = jnp.float32([-1e4, -100, 100, 1e4])
    np.testing.assert_allclose(
        rj.stochastic_times_smooth_log_prob(0.0, far),
        [0, 0, -100 - np.log(2), -1e4 - np.log(2)],
        rtol=1e-5,
        atol=1e-20,
    )
    slope = jax.vmap(jax.grad(rj.stochastic_times_smooth_log_prob, 1))
    p = root.astype(float) ** 2
    np.testing.assert_allclose(slope(jnp.float32(root), logits), (1 - p) / 2, rtol=1e-4)
    np.testing.assert_allclose(slope(jnp.zeros(4), logits), -(1 - p) * root / (1 - root) / 2, rtol=1e-4)
    np.testing.assert_allclose(slope(jnp.zeros(4), far), [0, 0, -1, -1], atol=1e-6)
    np.testing.assert_allclose(slope(jnp.ones(4), far)[2:], 0, atol=1e-6)


@pytest.mark.few(2)
@quick
@rows(cases(has_density))
def test_second_derivatives_are_finite_and_symmetric(case):
    params = {n: jnp.asarray(x) for n, x in case.element(0).items()}
    value = jax.jit(lambda params: case.draw(KEY, (), **params))(params)
    inside = jnp.clip(value, 0.1, 0.9) if not case.event or case.support == "unit" else value
    hessian = jax.jit(jax.hessian(lambda params: case.density(inside, **params)))(params)
    hessian = jax.tree.map(np.asarray, hessian)
    for one in params:
        for other in params:
            block = hessian[one][other].reshape(params[one].size, -1)
            assert np.isfinite(block).all(), (one, other)
            across = hessian[other][one].reshape(params[other].size, -1)
            np.testing.assert_allclose(block, across.T, rtol=1e-3, atol=1e-3)


@pytest.mark.whole
@quick
def test_slopes_of_the_atoms_far_into_the_tail():
    """phi(x) / Phi(x) at x = -loc / scale, from its continued fraction in float64."""
    slope = jax.grad(rj.gaussian_bernoulli_log_prob, 1)
    for loc, scale in ((0.5, 0.2), (3.0, 0.3), (3.0, 0.01), (1.0, 1e-3), (1e4, 1.0), (1e4, 1e-3)):
        x, fraction = loc / scale, 0.0
        for n in range(400, 0, -1):
            fraction = n / (x + fraction)
        exact = -(x + fraction) / scale
        np.testing.assert_allclose(slope(0.0, loc, scale), exact, rtol=3e-5)
        np.testing.assert_allclose(slope(1.0, 1 - loc, scale), -exact, rtol=2e-3 if loc > 1e3 else 3e-5)


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("stretch", [(-10.0, 1.1), (-0.2, 3.0), (-1000.0, 1.001)])
def test_hard_concrete_of_an_uneven_stretch(stretch):
    a, tau = stretch[0], 0.5
    logits = jnp.array([0.5 - np.log(-a) + np.log(-a) * (1 + tau)])
    z = jax.jit(lambda key: rj.hard_concrete(key, logits, tau, stretch=stretch, shape=(50_000,)))(KEY)
    law = jax.jit(functools.partial(rj.hard_concrete_log_prob, logits=logits, tau=tau, stretch=stretch))
    edges = np.linspace(0, 1, 11)
    middles = ((np.arange(5000) + 0.5) / 5000).astype(np.float32)
    tenths = np.exp(np.asarray(law(middles), float)).reshape(10, -1).mean(-1) / 10
    zero, one = np.exp(np.asarray(law(np.float32([0, 1])), float))
    np.testing.assert_allclose(zero + tenths.sum() + one, 1, atol=1e-4)
    np.testing.assert_allclose(1 - zero, rj.hard_concrete_l0(logits, tau, stretch=stretch)[0], rtol=1e-4)
    z = np.asarray(z, float)
    codes = np.where(z == 0, 0, np.where(z == 1, 11, np.digitize(z, edges))).astype(int)
    probabilities = np.array([zero, *tenths, one])
    kept = probabilities * len(z) > 10
    observed = np.bincount(codes, minlength=12)[kept]
    expected = probabilities[kept] / probabilities[kept].sum() * observed.sum()
    assert st.chisquare(observed, expected).pvalue > P_VALUE
    with jax.enable_x64(True):
        wide = functools.partial(rj.hard_concrete_log_prob, tau=tau, stretch=stretch)
        exact = jax.jit(wide)(jnp.asarray(z), logits.astype(float))
    np.testing.assert_allclose(law(z.astype(np.float32)), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.whole
@quick
def test_the_l0_penalty_is_the_mass_beside_the_atom_and_has_its_slopes():
    logits, tau = jnp.array([-4.0, 0.3, 6.0]), jnp.array([0.1, 0.7, 2.0])
    with jax.enable_x64(True):
        logits, tau = jnp.asarray(logits, jnp.float64), jnp.asarray(tau, jnp.float64)
        beside = lambda logits, tau: jnp.sum(jnp.exp(rj.hard_concrete_log_prob(jnp.zeros(3), logits, tau)))
        penalty = lambda logits, tau: jnp.sum(1 - rj.hard_concrete_l0(logits, tau))
        (value, slopes), (exact, of_mass) = (
            jax.value_and_grad(f, (0, 1))(logits, tau) for f in (penalty, beside)
        )
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    np.testing.assert_allclose(slopes, of_mass, rtol=1e-11)


@pytest.mark.whole
@pytest.mark.usefixtures("as_users_compile")
def test_a_shared_factor_is_not_copied_for_each_row():
    rows_, size = 2000, 50
    factor = jnp.eye(size)
    value, logits = jnp.full((rows_, size), 0.3), jnp.zeros((rows_, size))
    for law in (
        lambda value: rj.correlated_bernoulli_log_prob(value, logits, 1.0, factor),
        lambda value: rj.logistic_normal_log_prob(value / 15, logits, scale_tril=factor),
    ):
        memory = jax.jit(law).lower(value).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 30 * value.nbytes  # copies of the factor would be 50


@pytest.mark.whole
@quick
def test_a_factor_may_have_any_signs_on_its_diagonal():
    z, logits = jnp.array([0.3, 0.4]), jnp.array([0.2, -0.5])
    laws = [
        rj.correlated_bernoulli_log_prob(z, logits, 0.7, jnp.array([[1, 0], [0.6, sign * 0.8]]))
        for sign in (1.0, -1.0)
    ]
    np.testing.assert_allclose(*laws, rtol=1e-6)


@pytest.mark.whole
@quick
def test_limits_at_the_vertices():
    """Where z is rounded to a corner the density is its limit there, never NaN."""
    ends = np.float32([0, 1])
    for tau, limit in ((0.5, np.inf), (2.0, -np.inf)):
        assert (rj.relaxed_bernoulli_log_prob(ends, 0.3, tau) == limit).all()
        corner = rj.gumbel_softmax_log_prob(np.float32([0.0, 1.0]), jnp.zeros(2), tau)
        assert corner == limit
    even = rj.gumbel_softmax_log_prob(np.float32([0, 1]), jnp.array([0.3, 1.0]), 1.0)
    close = rj.gumbel_softmax_log_prob(np.float32([1e-30, 1]), jnp.array([0.3, 1.0]), 1.0)
    np.testing.assert_allclose(even, close, rtol=1e-5)
    contrary = jnp.array([jnp.inf, 0.0])  # the certain gate contradicts, whatever the other's limit
    assert rj.correlated_bernoulli_log_prob(np.float32([0, 0]), contrary, 0.5, jnp.eye(2)) == -jnp.inf
    near = rj.relaxed_bernoulli_log_prob(np.float32([1e-30, 1 - 6e-8]), 0.3, 1.0)
    np.testing.assert_allclose(rj.relaxed_bernoulli_log_prob(ends, 0.3, 1.0), near, atol=1e-5)
    inner = rj.invertible_gaussian_log_prob(np.float32([0, 0.4, 0.6]), jnp.zeros(2), 1.0, 0.5)
    assert inner == -jnp.inf
    for law in (
        functools.partial(rj.relaxed_bernoulli_log_prob, ends, 0.3),
        lambda tau: rj.gumbel_softmax_log_prob(np.float32([[0, 1], [1, 0]]), jnp.zeros(2), tau),
    ):
        assert jnp.isfinite(jax.grad(lambda tau, law=law: jnp.sum(law(tau)))(0.5))


@pytest.mark.whole
@quick
def test_outside_of_the_support():
    assert (rj.relaxed_bernoulli_log_prob(np.float32([-0.1, 1.1]), 0.0, 0.5) == -jnp.inf).all()
    off = np.float32([1.2, -0.1, -0.1])
    assert rj.gumbel_softmax_log_prob(off, jnp.zeros(3), 0.5) == -jnp.inf
    assert rj.logistic_normal_log_prob(off, jnp.zeros(3), 0.5) == -jnp.inf
    impossible = jnp.array([0.0, 0.0, -jnp.inf])
    assert rj.gumbel_softmax_log_prob(np.float32([0.5, 0.3, 0.2]), impossible, 0.5) == -jnp.inf
    face = rj.gumbel_softmax_log_prob(np.float32([0.6, 0.4, 0.0]), impossible, 0.5)
    alone = rj.gumbel_softmax_log_prob(np.float32([0.6, 0.4]), jnp.zeros(2), 0.5)
    np.testing.assert_allclose(face, alone, rtol=1e-6)


@pytest.mark.whole
@quick
def test_a_certain_gate_leaves_the_others_their_marginal_density():
    factor = np.linalg.cholesky([[1, 0.5, 0.3], [0.5, 1, 0.7], [0.3, 0.7, 1]]).astype(np.float32)
    pair = np.linalg.cholesky([[1, 0.3], [0.3, 1]]).astype(np.float32)  # without the middle one
    z = np.float32([0.2, 0.0, 0.7])
    law = rj.correlated_bernoulli_log_prob(z, jnp.array([0.4, -jnp.inf, -1.0]), 0.5, factor)
    rest = rj.correlated_bernoulli_log_prob(z[::2], jnp.array([0.4, -1.0]), 0.5, pair)
    np.testing.assert_allclose(law, rest, rtol=1e-5)


@pytest.mark.whole
@quick
def test_singular_covariance_is_seen_modulo_constants():
    """The density of a logistic-normal does not depend on the part of Sigma along all-ones."""
    loc, covariance = rj.laplace_bridge.dirichlet_to_gaussian(jnp.array([0.8, 2.0, 5.0]))
    z = np.float32([0.1, 0.3, 0.6])
    laws = [
        rj.logistic_normal_log_prob(z, loc + shift, scale_tril=jnp.linalg.cholesky(covariance + shift))
        for shift in (0.1, 1.0)
    ]
    singular = np.linalg.cholesky(np.asarray(covariance)[:2, :2])
    factor = np.zeros((3, 3), np.float32)
    factor[:2, :2], factor[2, :2] = singular, -singular.sum(0)
    laws.append(rj.logistic_normal_log_prob(z, loc, scale_tril=factor))
    np.testing.assert_allclose(laws, laws[0], rtol=1e-4)


@rows(cases(has_density))
def test_bad_values_are_named(case):
    with pytest.raises(ValueError, match="value must be floating point"):
        case.density(np.ones((2, *case.event), int))
    if case.event:
        with pytest.raises(ValueError, match="value must be of shape"):
            case.density(np.full((2, 5), 0.2, np.float32))
    with pytest.raises(ValueError, match="must have batch shapes that broadcast"):
        case.density(np.full((3, *case.event), 0.2, np.float32))
