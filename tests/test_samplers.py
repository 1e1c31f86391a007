"""Every sampler of tests/cases.py against every law of a sampler."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relaxit_jax as rj
from cases import (
    CASES,
    Case,
    cases,
    has_an_impossible_class,
    has_classes,
    has_discrete_limit,
    has_log_space,
    has_logits,
    has_soft_draw,
    is_differentiable,
    is_discrete,
)
from helpers import KEY, P_VALUE, as_users, cast, chi_square, dtypes, is_nan, quick, rows, seen, spoiled


@dtypes
@rows(CASES)
def test_shape_and_dtype(case, dtype):
    case = cast(case, dtype)
    integers = case.name == "gumbel_top_k_ordered"
    wide = case.name == "gumbel_top_k"  # keys for sorting, kept unrounded
    expected = jnp.int32 if integers else jnp.float32 if wide else dtype
    for shape in (None, (2,), (3, 2), (3, 1, 2)):
        draw = jax.eval_shape(lambda key, shape=shape: case.draw(key, shape), KEY)
        chex.assert_shape(draw, (shape or (2,)) + case.event)
        assert draw.dtype == expected


@rows(CASES)
def test_raw_keys_are_keys(case):
    raw, typed = (
        jax.make_jaxpr(lambda key: case.draw(key, (3, 2)))(k) for k in (jax.random.key_data(KEY), KEY)
    )
    assert [x.aval for x in raw.jaxpr.outvars] == [x.aval for x in typed.jaxpr.outvars]


def test_raw_keys_draw_the_same():
    for draw in (rj.relaxed_bernoulli, rj.gumbel_softmax):
        draws = [draw(key, jnp.zeros(4), 1.0) for key in (KEY, jax.random.key_data(KEY))]
        np.testing.assert_array_equal(*draws)


@pytest.mark.few(16)
@quick
@rows(CASES)
def test_support(case):
    z = np.asarray(jax.jit(lambda key: case.draw(key, (5000, 2)))(KEY), np.float64)
    assert (z.std(0) > 1e-3).all()  # every element of an event has noise
    if case.support == "order":  # keys that fall, or places that differ
        assert (np.diff(z) != 0).all()
    else:
        assert z.min() >= 0
    if case.support in ("simplex", "k_hot", "k_hot_soft", "permutation", "permutation_soft"):
        np.testing.assert_allclose(z.sum(-1), case.params.get("k", 1), rtol=2e-6)
    if case.support == "doubly":
        np.testing.assert_allclose([z.sum(-1), z.sum(-2)], 1, atol=1e-4)
    if case.support in ("unit", "gate"):
        assert z.max() <= 1 and ((z > 0) & (z < 1)).mean() > 0.2
    if case.support in ("bits", "k_hot", "permutation"):
        assert set(np.unique(z)) == {0, 1}  # exactly, not 0.99999994


@pytest.mark.few(3)
@quick
@rows(CASES)
def test_the_form_for_accelerators_is_the_same(case, for_accelerators):
    """Draws, and their gradients in every parameter, are the same as on CPUs up to rounding."""
    params = {n: jnp.asarray(x) for n, x in case.batched.items()}

    def loss(params):
        draw = case.draw(KEY, (40, 2), **params)
        return jnp.sum(jnp.cos(1.0 + jnp.arange(draw.size)).reshape(draw.shape) * draw), draw

    gradient = jax.grad(loss, has_aux=True)
    one, other = for_accelerators(gradient)(params), jax.jit(gradient)(params)
    chex.assert_trees_all_close(one, other, rtol=3e-5, atol=3e-6)


# their gradients have terms that are constants by definition: test_straight_through.py has the surrogates
OF_SURROGATES = {"reinmax", "gumbel_rao", "reinmax_rao"}


@pytest.mark.few(3, "[relaxed_top_k]")
@quick
@rows(cases(lambda case: is_differentiable(case) and case.name not in OF_SURROGATES))
def test_second_derivatives_are_the_differences_of_first_ones(case, for_accelerators):
    """In a random direction of all parameters, also in the form for accelerators and under a checkpoint."""
    with jax.enable_x64(True):
        params = {n: jnp.asarray(x, float) for n, x in case.floats.items()}
        way = {n: np.random.default_rng(0).normal(size=np.shape(x)) for n, x in params.items()}

        def loss(params):
            draw = case.draw(KEY, **params)
            return jnp.sum(jnp.cos(1.0 + jnp.arange(draw.size)).reshape(draw.shape) * draw)

        gradient = jax.grad(jax.checkpoint(loss))
        along = lambda params: jax.jvp(gradient, (params,), (way,))[1]
        at = lambda h: jax.jit(gradient)({n: x + h * way[n] for n, x in params.items()})
        expected = jax.tree.map(lambda x, y: (x - y) / 2e-6, at(1e-6), at(-1e-6))
        for result in (jax.jit(along)(params), for_accelerators(along)(params)):
            chex.assert_trees_all_close(result, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.few(2)
@as_users
@rows(CASES)
def test_jit_eager_and_vmap_agree(case):
    keys = jax.random.split(KEY, 3)
    params = {n: jnp.asarray(x) for n, x in case.floats.items()}
    static = {n: x for n, x in case.params.items() if n not in params}

    traces = []

    @jax.jit
    def jitted(key, params):
        traces.append(None)
        return case.draw(key, **params, **static)

    compiled = np.stack([jitted(key, params) for key in keys])
    eager = case.draw(keys[0], **params, **static)
    np.testing.assert_allclose(compiled[0], eager, rtol=3e-6, atol=1e-6)
    batched = jax.jit(jax.vmap(lambda key: case.draw(key, **params, **static)))(keys)
    np.testing.assert_allclose(batched, compiled, rtol=3e-6, atol=1e-6)
    if case.temperatures:  # annealing never recompiles
        for tau in (0.1, 0.5, 2.0):
            jitted(keys[0], params | dict.fromkeys(case.temperatures, jnp.float32(tau)))
        assert len(traces) == 1


@pytest.mark.few(6)
@quick
@rows(CASES)
def test_noise_is_independent_across_the_batch(case):
    """With equal parameters, any two elements of the batch are uncorrelated, in value and square."""
    n, copies = 20_000, 3
    same = {
        name: x if np.ndim(x) == 0 else np.repeat(np.asarray(x)[:1], copies, 0)
        for name, x in case.params.items()
    }
    draws = np.asarray(jax.jit(lambda key: case.draw(key, (n, copies), **same))(KEY), np.float64)
    draws = draws.reshape(n, copies, -1)[..., 0]  # one coordinate of each element
    assert draws.std(0).min() > 0.01
    for x in (draws, (draws - draws.mean(0)) ** 2):
        if x.std() > 1e-3:
            correlation = np.corrcoef(x.T)[np.triu_indices(copies, 1)]
            assert np.abs(correlation).max() * np.sqrt(n) < 4.5
    # and a draw is not the shifted draw of the element before it
    lagged = np.corrcoef(draws[1:, 0], draws[:-1, 1])[0, 1]
    assert abs(lagged) * np.sqrt(n) < 4.5


@quick
@rows(cases(is_differentiable))
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(case):
    weights = np.cos(np.arange(np.prod(case.event, dtype=int)).reshape(case.event) + 1.0)

    def loss(params):
        return jnp.sum(weights * case.draw(KEY, (200, 2), **params) ** 2)

    gradients = jax.jit(jax.grad(loss))({n: jnp.asarray(x) for n, x in case.floats.items()})
    for name, gradient in gradients.items():
        if name == "scale_tril":
            gradient = gradient[..., *np.tril_indices(gradient.shape[-1])]
        assert jnp.isfinite(gradient).all(), name
        assert ((jnp.abs(gradient) > 0) == (name not in case.no_gradient)).all(), name


@pytest.mark.few(3)
@quick
@rows(
    cases(
        is_differentiable,
        lambda case: case.soft is None and not case.sample_options.get("hard"),
    )
)
def test_gradient_is_the_derivative_of_the_draw(case):
    """A soft draw at fixed noise is checked in every parameter, by central differences in float64."""
    with jax.enable_x64(True):
        params = {n: jnp.asarray(x, jnp.float64) for n, x in case.batched.items()}
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.cos(3 * case.draw(KEY, (20, 2), **p)))))
        _, gradients = loss(params)
        for name, x in params.items():
            direction = np.cos(1.0 + np.arange(x.size)).reshape(x.shape)
            direction = np.tril(direction) if name == "scale_tril" else direction
            up, down = (loss(params | {name: np.asarray(x) + h * direction})[0] for h in (1e-6, -1e-6))
            slope = np.sum(direction * gradients[name])
            np.testing.assert_allclose((up - down) / 2e-6, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.few(4, "[gumbel_rao]", "gapped")
@quick
@rows(cases(has_soft_draw))
def test_straight_through_has_the_gradient_of_the_soft_draw(case):
    """In every parameter: against the draw without ``hard``, or the definition differentiated by JAX."""
    params = {n: jnp.asarray(x) for n, x in case.batched.items()}
    weights = jnp.cos(jnp.arange(50 * 2 * np.prod(case.event, dtype=int))).reshape(50, 2, *case.event)
    one = jax.jit(jax.grad(lambda p: jnp.sum(weights * case.draw(KEY, (50, 2), **p))))(params)
    other = jax.jit(jax.grad(lambda p: jnp.sum(weights * case.soft_draw(KEY, (50, 2), **p))))(params)
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)


@as_users
@dtypes
@rows(cases(is_discrete))
def test_forward_value_has_exactly_the_discrete_law(case, dtype, pytestconfig):
    case = cast(case, dtype)
    # the noise of half precision is float32's, rounded at the end; and the quick tier draws less
    n = 200_000 if dtype != jnp.float32 or pytestconfig.option.quick else 1_000_000

    @jax.jit
    def draw(key):
        draws = case.draw(key, (n, 2))
        # exact, and a lot quicker here than in NumPy
        return draws.astype(jnp.float32) if jnp.issubdtype(draws.dtype, jnp.floating) else draws

    draws = np.asarray(draw(KEY))
    for i in range(2):
        law = case.discrete(**seen(case).element(i))
        assert chi_square(case.outcome(draws[:, i]), law) > P_VALUE


@pytest.mark.few(5)
@as_users
@rows(cases(has_discrete_limit))
def test_low_temperature_has_the_discrete_law(case):
    draws = np.asarray(jax.jit(lambda tau: case.draw(KEY, (100_000, 2), tau=tau))(np.float32(1e-3)))
    cold = dataclasses.replace(case, params=case.params | {"tau": np.float32(1e-3)})
    for i in range(2):
        law = case.discrete(**seen(cold).element(i))
        assert chi_square(case.nearest(draws[:, i]), law) > P_VALUE
    z = draws.astype(np.float64)
    assert np.mean((z > 0.01) & (z < 0.99)) < 0.01  # and the draws lie near the corners


def at_extremes(case, dtype):
    """Logits of +-1e4 and 0 instead of the entry's own."""
    pattern = np.array([1e4, -1e4, 0.0, 3.0])
    shape = case.params["logits"].shape[1:]
    logits = np.stack([np.resize(pattern, shape), np.resize(-pattern, shape)])
    params = {n: jnp.asarray(x, dtype) if n == "scale_tril" else x for n, x in case.params.items()}
    return dataclasses.replace(case, params=params | {"logits": jnp.asarray(logits, dtype)})


@pytest.mark.few(3)
@quick
@dtypes
@rows(cases(has_logits, is_differentiable))
def test_extreme_logits_and_temperatures(case, dtype):
    case = at_extremes(case, dtype)
    taus = (1e-3, 1.0, 1e3) if case.temperatures else (None,)

    def total(params, log_space):
        if not log_space:
            draw = case.draw(KEY, (30, 2), **params)
            return jnp.sum(draw.astype(jnp.float32)), draw
        draw = dataclasses.replace(case, sample_options={"log_space": True}).draw(KEY, (30, 2), **params)
        law = case.density(draw, log_space=True, **params)
        return jnp.sum(law), (draw, law)

    @jax.jit
    def values(params):
        gradient = jax.grad(total, has_aux=True)
        return [gradient(params, log_space) for log_space in {False, case.log_space}]

    for tau in taus:
        params = {n: jnp.asarray(x) for n, x in case.floats.items()}
        params |= dict.fromkeys(case.temperatures, tau and jnp.float32(tau))
        chex.assert_tree_all_finite(values(params))


@pytest.mark.few(1)
@quick
@rows(cases(is_differentiable, lambda case: {"loc", "gap", "values"} & case.params.keys()))
def test_extremes_of_other_parameters(case):
    """Means of +-1e4, scales from 1e-3 to 1e3, weights, gaps and values from 1e-4 to 1e4."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of(params):
        draw = case.draw(KEY, (30, 2), **params)
        law = case.density(jax.lax.stop_gradient(draw), **params) if case.support == "gate" else draw
        logs = dataclasses.replace(case, sample_options={"log_space": True})
        law = case.density(logs.draw(KEY, (30, 2), **params), True, **params) if case.log_space else law
        return jnp.sum(draw) + jnp.sum(law), (draw, law)

    given = {n: jnp.asarray(x) for n, x in case.floats.items()}
    for loc in (1e4, 1e-3):
        pattern = np.resize(np.float32([loc, -loc, 0, loc / 3]), np.shape(given.get("loc", 0)))
        for small, large in ((1e-3, 1e-4), (1e-3, 1e4), (1e3, 1e-4), (1e3, 1e4)):
            for tau in (1e-3, 1e3):
                other = {"loc": pattern, "scale": small, "delta": large, "gap": large, "tau": tau}
                other["values"] = large * given.get("values", 0)
                params = {n: jnp.full_like(x, other[n]) if n in other else x for n, x in given.items()}
                chex.assert_tree_all_finite(of(params))


@pytest.mark.few(3)
@quick
@rows(cases(has_logits, is_differentiable, has_an_impossible_class))
def test_an_impossible_class_is_exactly_zero(case):
    """A logit of -inf: value 0, gradient 0, no NaN, also in the temperature; also in the density."""
    logits = np.array(case.params["logits"])
    logits[0, ...] = np.where(np.arange(logits[0].size).reshape(logits[0].shape) == 0, -np.inf, logits[0])
    where = np.isneginf(logits)
    params = {n: jnp.asarray(x) for n, x in case.floats.items()} | {"logits": jnp.asarray(logits)}
    if "values" in params:
        params["values"] = jnp.where(where, 1e6, params["values"])

    def total(params):
        draw = case.draw(KEY, (50, 2), **params)
        return jnp.sum(jnp.cos(jnp.where(jnp.isfinite(draw), draw, 0))), draw

    def law(params, log_space):
        row = dataclasses.replace(case, sample_options={"log_space": log_space})
        return jnp.sum(case.density(row.draw(KEY, (50, 2), **params), log_space, **params))

    @jax.jit
    def compiled(params):
        laws = [jax.value_and_grad(law)(params, x) for x in ((False, True) if case.log_space else ())]
        return jax.grad(total, has_aux=True)(params), laws

    (gradients, draws), laws = compiled(params)
    if case.support == "order":
        assert (np.asarray(case.sampler(KEY, shape=(50, 2), **case.arguments(params))[0])[:, 0] != 0).all()
        assert np.isfinite(draws).all()
    elif "values" in params:
        assert (draws <= 3).all()
    else:
        assert (np.asarray(draws)[:, where] == 0).all()
    chex.assert_tree_all_finite(gradients)
    assert (np.asarray(gradients["logits"])[where] == 0).all()
    chex.assert_tree_all_finite(laws)
    for _, gradients in laws:
        assert (np.asarray(gradients["logits"])[where] == 0).all()


@pytest.mark.few(2)
@quick
@rows(cases(has_log_space))
def test_log_space_is_the_same_draw_unrounded(case):
    logs = dataclasses.replace(case, sample_options={"log_space": True})
    log_value = jax.jit(lambda key: logs.draw(key, (500, 2)))(KEY)
    z = np.asarray(jax.jit(lambda key: case.draw(key, (500, 2)))(KEY))
    if case.support == "simplex":
        np.testing.assert_allclose(np.exp(log_value), z, rtol=1e-5)
    else:
        soft = 1 / (1 + np.exp(-np.asarray(log_value, np.float64)))
        soft = np.clip(-0.1 + 1.2 * soft, 0, 1) if case.support == "gate" else soft
        np.testing.assert_allclose(soft, z, rtol=1e-5, atol=1e-6)
    low = dataclasses.replace(cast(case, jnp.float16), sample_options={"log_space": True})
    assert jax.eval_shape(low.draw, KEY).dtype == jnp.float32
    if "tau" in case.params:  # what z rounds away at a low temperature is all there
        cold = jax.jit(lambda tau: low.draw(KEY, (500, 2), tau=tau))(1e-3)
        assert jnp.isfinite(cold).all() and jnp.abs(cold).max() > 1000


@pytest.mark.few(4)
@quick
@rows(cases(is_differentiable))
def test_a_bad_number_is_seen_in_its_element_and_nowhere_else(case):
    """NaN, also behind an exact value, or a traced parameter that is not positive."""

    @jax.jit
    def both(params):
        loss = lambda params: jnp.sum(jnp.cos(case.draw(KEY, (3, 2), **params)))
        return case.draw(KEY, (3, 2), **params), jax.grad(loss)(params)

    good, _ = both({n: np.array(x, np.float32) for n, x in case.batched.items()})
    for name in case.floats:
        for bad in (np.nan, 0.0, -0.7, -np.inf) if name in case.positive else (np.nan,):
            draws, gradients = both(spoiled(case, name, bad))
            assert (is_nan(draws) == [True, False]).all(), (name, bad)
            np.testing.assert_allclose(draws[:, 1], good[:, 1], rtol=1e-5, atol=1e-6)
            if name not in case.no_gradient:
                assert np.isnan(gradients[name][0]).any(), (name, bad)
            assert all(np.isfinite(gradient[1]).all() for gradient in gradients.values()), (name, bad)


@pytest.mark.whole
@quick
def test_bad_numbers_are_seen_in_all_else_that_is_public():
    l0 = jax.jit(rj.hard_concrete_l0)
    assert np.isnan([l0(np.nan, 1.0), l0(0.0, np.nan), l0(0.0, 0.0), l0(0.0, -1.0)]).all()
    assert jnp.isnan(rj.hard_concrete_gate(jnp.nan))
    assert jnp.isnan(jax.jit(lambda l: rj.simple_top_k_marginals(l, 1))(jnp.array([0.0, jnp.nan]))).all()
    assert jnp.isnan(jax.jit(lambda l: rj.gumbel_top_k(KEY, l, 1)[1])(jnp.array([0.0, jnp.nan]))).all()
    certain = jax.jit(lambda tau: rj.relaxed_bernoulli(KEY, jnp.array([-jnp.inf, jnp.inf]), tau))
    assert jnp.isnan(certain(-1.0)).all() and (certain(1.0) == jnp.arange(2)).all()
    states = jnp.array([[0.0, jnp.nan], [0.0, 0.0]])
    search = lambda key: rj.stochastic_beam_search(key, lambda s, token: (states[token], s), (), 2, 3)
    assert jnp.isnan(jax.jit(search)(KEY)[1]).all()
    matching = jax.jit(lambda tau: rj.gumbel_sinkhorn(KEY, jnp.zeros((3, 3)), tau, 5, hard=True))
    assert jnp.isnan(matching(-1.0)).all()


@pytest.mark.few(6)
@rows(cases(lambda case: case.per_event))
def test_a_temperature_with_an_event_axis_is_an_error(case):
    """(B, 1) with logits (B, K) would draw all pairs; parameters that ask for those say so."""
    draws = lambda shape, **params: jax.eval_shape(lambda: case.draw(KEY, shape, **params)).shape
    for name in case.per_event:
        x = case.batched[name]
        for shape in (None, (2,)):
            with pytest.raises(ValueError, match=rf"{name} must .* got shape \(2, 1\).* {name}\[\.\.\., 0\]"):
                draws(shape, **{name: x[:, None]})
        with pytest.raises(ValueError, match=rf"Write {name}\[\.\.\., 0, 0\]"):
            draws(None, **{name: x[:, None, None]})
        assert draws((2, 2), **{name: x[:, None]}) == (2, 2, *case.event)
        assert draws(None, **{name: np.float32([[0.5], [0.6], [0.7]])}) == (3, 2, *case.event)
        assert draws(None, **{name: x[:1, None]}) == (1, 2, *case.event)
        with_axis = {n: y[None] for n, y in case.batched.items() if n not in case.per_event}
        assert draws(None, **{name: x[:, None]}, **with_axis) == (2, 2, *case.event)


BAD = [
    ("tau", 0.0, "tau must be positive"),
    ("tau", -1.0, "tau must be positive"),
    ("tau", np.nan, "tau must be positive"),
    ("logits", 0, "logits must be floating point"),
    ("logits", "one", "logits must be"),
    ("scale", -1.0, "scale must be positive"),
    ("delta", 0.0, "delta must be positive"),
    ("k", 5, r"k must be an integer in \[1, 4\]"),
    ("k", 0, r"k must be an integer in \[1, 4\]"),
    ("k", 1.5, r"k must be an integer in \[1, 4\]"),
    ("num_samples", 0, r"num_samples must be an integer in \[1, "),
    ("num_samples", 1.5, r"num_samples must be an integer in \[1, "),
    ("num_iters", 0, r"num_iters must be an integer in \[1, "),
    ("tau_forward", 0.0, "tau_forward must be positive"),
    ("tau_backward", -1.0, "tau_backward must be positive"),
    ("gap", 0.0, "gap must be positive"),
    ("shape", (3,), "shape must be a tuple of sizes that the parameters' batch shape"),
    ("shape", (-1, 2), "shape must be a tuple"),
    ("shape", 7, "shape must be a tuple"),
    ("key", 0, "key must be one JAX random key"),
    ("key", jax.random.split(KEY, 2), "key must be one JAX random key"),
]


BAD_ARGUMENTS = [(case, *bad) for bad in BAD for case in CASES if bad[0] in {"key", "shape", *case.params}]


def test_every_bad_argument_is_one_of_a_sampler():
    assert {name for _, name, *_ in BAD_ARGUMENTS} == {name for name, *_ in BAD}


@pytest.mark.parametrize(
    ("case", "name", "bad", "message"), BAD_ARGUMENTS, ids=lambda x: str(x) if isinstance(x, Case) else None
)
def test_bad_arguments_are_named(case, name, bad, message):
    arguments = {"key": KEY, "shape": None, **case.arguments()}
    if name == "logits" and not isinstance(bad, str):
        bad = np.arange(arguments["logits"].size).reshape(arguments["logits"].shape)
    with pytest.raises(ValueError, match=message):
        case.sampler(**(arguments | {name: bad}))


@rows(cases(has_classes))
def test_classes_without_a_chance_are_an_error(case):
    logits = np.full_like(case.params["logits"], -np.inf)
    with pytest.raises(ValueError, match="logits must be above -inf for at least"):
        case.draw(KEY, logits=logits)


def test_other_bad_arguments():
    draw = functools.partial(rj.relaxed_bernoulli, KEY)
    for tau in (None, "0.5", [1.0, [2.0]]):
        with pytest.raises(ValueError, match="tau must be an array of numbers"):
            draw(0.0, tau)
    for logits in (None, [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match="logits must be an array of floats"):
            draw(logits, 1.0)
    with pytest.raises(ValueError, match="key must be one JAX random key"):
        rj.relaxed_bernoulli(np.zeros(3, np.uint32), 0.0, 1.0)
    for stretch in ((0.1, 1.1), (-0.1, 1.0), (-0.1, 0.5, 1.1), "ab", 3, (-np.inf, 2)):
        with pytest.raises(ValueError, match="stretch must be two numbers"):
            rj.hard_concrete(KEY, 0.0, 1.0, stretch=stretch)
    with pytest.raises(ValueError, match="logits, tau must have batch shapes that broadcast"):
        rj.hard_concrete_l0(jnp.zeros(3), jnp.ones(2))
    for logits in (0.0, jnp.zeros((2, 0))):
        with pytest.raises(ValueError, match="logits must be an array whose last axis is not empty"):
            rj.gumbel_softmax(KEY, logits, 1.0)
    with pytest.raises(ValueError, match="scale must be given, or else scale_tril"):
        rj.logistic_normal(KEY, jnp.zeros(2))
    factors = {"of shape": np.eye(3), "lower triangular": np.ones((2, 2)), "norm 1": 2 * np.eye(2)}
    for words, factor in factors.items():
        with pytest.raises(ValueError, match=f"scale_tril must be .*{words}"):
            rj.correlated_bernoulli(KEY, jnp.zeros(2), 1.0, factor)


@rows(cases(has_log_space, has_logits))
def test_options_that_contradict_each_other(case):
    with pytest.raises(ValueError, match="log_space must be False for a hard sample"):
        case.sampler(KEY, **case.arguments({"hard": True, "log_space": True}))


def test_half_precision_makes_no_atoms():
    """A gate's atoms have their probabilities in bfloat16 too, where 0.9999 would round to 1."""
    for case in cases(lambda case: case.atoms is not None):
        low = cast(case, jnp.bfloat16)
        z = np.asarray(jax.jit(lambda key, low=low: low.draw(key, (1_000_000, 2)))(KEY), np.float32)
        for i in range(2):
            zero, one = case.atoms(**seen(low).element(i))
            kind = np.where(z[:, i] == 0, 0, np.where(z[:, i] == 1, 1, 2))
            assert chi_square(kind, np.array([zero, one, 1 - zero - one])) > P_VALUE
