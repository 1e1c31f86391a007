"""Every class of relaxit_jax.distributions against every law of a NumPyro distribution."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st

from cases import DISTRIBUTIONS
from helpers import DISCRETE, KEY, P_VALUE, arrays, cast, has_law, has_moments, outcomes
from helpers import class_rows as rows
from relaxit_jax import distributions as rd

pytestmark = pytest.mark.usefixtures("fast_compilation")


def lacks(condition):
    return lambda case: not condition(case)


def has_cdf(case):
    return not case.event and "values" not in case.params


def has_entropy(case):
    return case.distribution in DISCRETE | {rd.SimpleTopK}


def has_atoms_only(case):
    return case.outcome is not None


def test_every_class_has_a_row():
    classes = {x for name in rd.__all__ if isinstance(x := getattr(rd, name), type)}
    classes -= {rd.LinearChain, rd.SpanningTree}  # which have test_structured.py
    assert {case.distribution for case in DISTRIBUTIONS} == classes
    for case in DISTRIBUTIONS:  # and takes the arguments of its sampler
        taken = set(inspect.signature(case.distribution).parameters)
        assert case.params.keys() | {"validate_args"} <= taken


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.few(2)
@rows()
def test_draws_are_those_of_the_sampler(case):
    shapes = (), (3,), (3, 2)

    @jax.jit
    def compiled(key, raw, params):
        d = case.build(**params)
        ours = [d.sample(key, shape) for shape in shapes]
        other = [case.draw(key, (*shape, 2), **params) for shape in shapes]
        return ours, other, d.sample(raw, (3, 2)), d.rsample(key) if d.has_rsample else ours[0]

    ours, other, raw, rsample = compiled(KEY, jax.random.key_data(KEY), arrays(case))
    for shape, draw, expected in zip(shapes, ours, other, strict=True):
        chex.assert_shape(draw, (*shape, 2, *case.event))
        np.testing.assert_allclose(draw, expected, rtol=1e-6)
        assert draw.dtype == jnp.float32
    np.testing.assert_array_equal(raw, ours[2])
    np.testing.assert_array_equal(rsample, ours[0])
    with pytest.raises(ValueError, match="key must be one JAX random key"):
        case.build().sample(None)


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@rows()
def test_draws_in_half_precision_are_in_the_support(case, dtype):
    case = cast(case, dtype)

    @jax.jit
    def inside(params):
        d = case.build(**params)
        draw = d.sample(KEY, (500,))
        assert draw.dtype == dtype
        if has_law(case):
            assert jax.eval_shape(d.log_prob, draw).dtype == jnp.float32
        moments = jax.eval_shape(lambda: (d.mean, d.variance)) if has_moments(case) else ()
        assert all(x.dtype == dtype and x.shape == (2, *case.event) for x in moments)
        return d.support(draw), draw, d.cdf(draw) if has_cdf(case) else draw

    supported, draw, cdf = inside(arrays(case))
    assert supported.all() and supported.shape == (500, 2)
    if case.support in ("bits", "atoms"):  # the upper atom is where rounding puts it
        np.testing.assert_array_equal(cdf == 1, draw > 0)


@pytest.mark.few(1)
@rows(lambda case: case.log_space)
def test_intermediates_hold_what_the_draw_rounds_away(case):
    """At tau = 0.01 the law of a draw equals the law of its log-space form, to the digits of float64."""
    params = arrays(case) | ({"tau": jnp.float32(0.01)} if "tau" in case.params else {})

    @jax.jit
    def draw(params):
        d = case.build(**params)
        value, carried = d.sample_with_intermediates(KEY, (200,))
        wide = d.expand((3, 2)).sample_with_intermediates(KEY, (5,))
        laws = d.log_prob(value, carried), d.expand((3, 2)).log_prob(*wide)
        return value, d.sample(KEY, (200,)), carried[0].unrounded, laws, wide[1][0].unrounded

    value, alone, unrounded, laws, wide = draw(params)
    np.testing.assert_array_equal(value, alone)
    if case.support == "simplex":
        np.testing.assert_allclose(np.exp(unrounded), value, rtol=1e-5, atol=1e-37)  # but for subnormals
    else:
        low, high = {"unit": (0, 1), "gate": case.options.get("stretch", (-0.1, 1.1))}[case.support]
        gate = low + (high - low) * sp.expit(np.asarray(unrounded, float))
        np.testing.assert_allclose(np.clip(gate, 0, 1), value, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        exact_law = jax.jit(lambda y, params: case.density(y, log_space=True, **params))
        for law, y in zip(laws, (unrounded, wide), strict=True):
            exact = exact_law(*jax.tree.map(lambda x: jnp.asarray(np.asarray(x, float)), (y, params)))
            np.testing.assert_allclose(law, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.few(1)
@rows(lambda case: not case.log_space and has_law(case) and case.support != "gate")
def test_without_a_log_space_there_are_no_intermediates(case):
    value, intermediates = case.build().sample_with_intermediates(KEY)
    assert intermediates == []
    law = jax.jit(lambda z: (case.build().log_prob(z, intermediates), case.build().log_prob(z)))
    np.testing.assert_array_equal(*law(value))


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.few(2)
@rows()
def test_shapes_are_inferred(case):
    """Parameters come by position, by keyword, and as probs; batches broadcast, also of one parameter."""
    names = list(inspect.signature(case.distribution).parameters)
    one = {name: np.asarray(x) for name, x in case.element(0).items()}
    grown = [
        {n: np.broadcast_to(x, (4, *x.shape)) if n == name else x for n, x in one.items()} for name in one
    ]
    both = {n: np.broadcast_to(x, ((3, 1) if i else (2,)) + x.shape) for i, (n, x) in enumerate(one.items())}
    for params in (one, *grown, both):
        params = {n: case.integers.get(n, jnp.asarray(x)) for n, x in params.items()}
        shapes = {n: np.shape(x) for n, x in params.items()}
        abstract = {n: jax.ShapeDtypeStruct(np.shape(params[n]), np.float32) for n in case.floats}
        d = jax.eval_shape(lambda p: case.build(**p), abstract)
        batch = jnp.broadcast_shapes(
            *(
                s[: len(s) - case.distribution.arg_constraints[n].event_dim]
                for n, s in shapes.items()
                if n in case.floats
            )
        )
        assert (d.batch_shape, d.event_shape) == (batch, case.event)
        assert case.distribution.infer_shapes(**shapes) == (batch, case.event)
        if not {"scale_tril", "delta"} & shapes.keys() or case.distribution is rd.CorrelatedRelaxedBernoulli:
            assert case.distribution.infer_shapes(*(shapes[n] for n in names if n in shapes)) == (
                batch,
                case.event,
            )
        if "logits" in shapes:
            probs = {"probs" if n == "logits" else n: s for n, s in shapes.items()}
            assert case.distribution.infer_shapes(**probs) == (batch, case.event)

        def results(d, z, case=case):  # of an event alone: the batch shape is the distribution's
            out = {"sample": d.sample(KEY, (5,))}
            if has_law(case):
                out["law"] = d.log_prob(z)
            if case.distribution in DISCRETE:
                out["entropy"] = d.entropy()
            if d.has_enumerate_support:
                out |= {"support": d.enumerate_support(), "unexpanded": d.enumerate_support(expand=False)}
            if has_moments(case):
                out |= {"mean": d.mean, "variance": d.variance}
            if has_cdf(case):
                out |= {"cdf": d.cdf(z), "icdf": d.icdf(jnp.float32(0.3))}
            return out

        event = jax.ShapeDtypeStruct(case.event, np.float32)
        got = {n: x.shape for n, x in jax.eval_shape(results, d, event).items()}
        count = case.event or (2,)
        expected = dict.fromkeys(("law", "entropy", "cdf", "icdf"), batch) | {
            "sample": (5, *batch, *case.event), "support": (*count, *batch, *case.event),
            "unexpanded": (*count, *(1,) * len(batch), *case.event),
            "mean": batch + case.event, "variance": batch + case.event,
        }  # fmt: skip
        assert got == {n: expected[n] for n in got}


# --- laws -------------------------------------------------------------------------------------


@pytest.mark.few(3)
@rows(lambda case: case.log_prob is not None)
def test_law_is_that_of_the_library(case):
    @jax.jit
    def laws(params):
        d = case.build(**params)
        z = d.sample(KEY, (50,))
        return d.log_prob(z), case.density(z, **params)

    np.testing.assert_allclose(*laws(arrays(case)), rtol=1e-6, atol=1e-6)


@pytest.mark.few(4)
@rows(has_atoms_only)
def test_law_of_every_outcome(case):
    values, law = outcomes(case)

    @jax.jit
    def log_prob(params, values):
        d = case.build(**params)
        enumerated = d.enumerate_support() if d.has_enumerate_support else values
        off = [values + 0.4]
        if case.support == "k_hot":  # of the wrong size
            off += [jnp.zeros_like(values), jnp.ones_like(values)]
        return d.log_prob(values), enumerated, jnp.stack([d.log_prob(z) for z in off])

    ours, enumerated, off = log_prob(arrays(case), values)
    np.testing.assert_allclose(np.exp(ours), law, rtol=2e-5)
    np.testing.assert_allclose(np.exp(ours).sum(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(enumerated, values)
    assert (off == -np.inf).all()


# densities that have a sampler's row of their own are differentiated in test_densities.py
@pytest.mark.few(1)
@rows(has_law, lambda case: case.log_prob is None)
def test_gradient_of_the_law_is_its_derivative(case):
    """Every parameter is checked by central differences in float64, through the class."""
    with jax.enable_x64(True):
        # numbers that are only compared with have no slope
        params = {n: jnp.asarray(x, jnp.float64) for n, x in case.floats.items() if n != "values"}

        @jax.jit
        def slopes(params):
            fixed = case.build(**params).sample(KEY, (20,))

            def total(params):
                law = case.build(**params).log_prob(jax.lax.stop_gradient(fixed))
                return jnp.sum(jnp.cos(jnp.arange(law.size)).reshape(law.shape) * law)

            gradient = jax.grad(total)(params)
            found, steps = {}, jnp.array([1e-6, -1e-6])
            for name, x in params.items():
                way = jnp.cos(1.0 + jnp.arange(x.size)).reshape(x.shape)
                way = jnp.tril(way) if name == "scale_tril" else way
                ends = jax.vmap(lambda h, n=name, x=x, way=way: total(params | {n: x + h * way}))(steps)
                found[name] = (ends[0] - ends[1]) / 2e-6, jnp.sum(gradient[name] * way)
            return found

        for name, (difference, slope) in slopes(params).items():
            np.testing.assert_allclose(difference, slope, rtol=1e-5, atol=1e-5, err_msg=name)
            assert slope != 0 or (name != "logits" and has_atoms_only(case))


OUTSIDE = {
    "unit": [-0.1, 1.1], "gate": [-0.1, 1.1], "bits": [-1.0, 1.1], "atoms": [-0.1, 1.1],
    "simplex": [[0.5, 0.2, 0.1], [1.2, -0.1, -0.1]], "k_hot": [[0.5, 0.2, 0.1], [1.2, -0.1, -0.1]],
    "permutation": [],
}  # fmt: skip


# any number is one of "exact_number"; what is not of its list is tested above
@rows(has_law, lambda case: case.support != "exact_number")
def test_outside_of_the_support_is_impossible(case, monkeypatch):
    """If validated, the support alone decides, whatever the density says there."""
    z = np.float32(OUTSIDE[case.support])
    if len(case.event) and case.event != (3,):
        z = -np.ones((2, *case.event), np.float32)
    inside = lambda *_, **__: jnp.zeros(2)
    monkeypatch.setattr(case.distribution, "_density", staticmethod(inside))
    with pytest.warns(UserWarning, match="Out-of-support"):
        law = case.build(validate_args=True).log_prob(z)
    assert (law == -np.inf).all()
    assert (case.build(validate_args=False).log_prob(z) == 0).all()


@rows(lacks(has_moments))
def test_moments_that_have_no_closed_form_are_an_error(case):
    for name in ("mean", "variance"):
        with pytest.raises(NotImplementedError):
            getattr(case.build(), name)


@pytest.mark.few(5)
@rows(has_moments)
def test_mean_and_variance(case):
    n = 40_000

    @jax.jit
    def moments(params):
        d = case.build(**params)
        return d.sample(KEY, (n,)), d.mean, d.variance

    draws, mean, variance = (np.asarray(x, float) for x in moments(arrays(case)))
    centred = draws - draws.mean(0)
    assert mean.shape == variance.shape == (2, *case.event)
    assert (np.abs(draws.mean(0) - mean) < 4.5 * np.sqrt(variance / n)).all()
    spread_of_squares = np.sqrt(((centred**2 - centred.var(0)) ** 2).mean(0) / n)
    assert (np.abs(centred.var(0) - variance) < 4.5 * spread_of_squares + 1e-6).all()


@rows(lacks(has_entropy))
def test_an_entropy_without_a_closed_form_is_an_error(case):
    with pytest.raises(NotImplementedError):
        case.build().entropy()


@pytest.mark.few(4)
@rows(has_entropy)
def test_entropy(case):
    _, law = outcomes(case)
    np.testing.assert_allclose(
        jax.jit(lambda: case.build().entropy())(), -(law * np.log(law)).sum(0), rtol=1e-5
    )
    certain = np.full_like(case.params["logits"], -np.inf)
    certain[..., : case.params.get("k", 1)] = 0 if case.event else -np.inf

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def of_certain(logits):
        entropy = case.build(logits=logits).entropy()
        return entropy.sum(), entropy

    slope, entropy = of_certain(jnp.asarray(certain))
    assert (entropy == 0).all()
    assert jnp.isfinite(slope).all()


@rows(lacks(has_cdf))
def test_a_cdf_without_a_closed_form_is_an_error(case):
    for call in (case.build().cdf, case.build().icdf):
        with pytest.raises(NotImplementedError):
            call(0.5)


@pytest.mark.few(1)
@rows(has_cdf)
def test_cdf(case):
    """cdf and icdf are inverse, have the jumps and the slope of the law, and match the draws."""
    n, v = 5000, np.random.default_rng(3).uniform(size=(5000, 2))
    levels = np.repeat(np.linspace(0, 1, 41, dtype=np.float32)[:, None], 2, 1)

    @jax.jit
    def compiled(params):
        d = case.build(**params)
        z = d.sample(KEY, (n,))
        inside = jnp.repeat(jnp.linspace(0.02, 0.98, 25)[:, None], 2, 1)
        slope = jax.jvp(d.cdf, (inside,), (jnp.ones_like(inside),))[1]
        points = d.icdf(levels)
        ends = d.cdf(jnp.float32([-0.1, -1e-6, 1, 1.1])[:, None])
        return (
            z,
            d.cdf(z),
            jnp.exp(d.log_prob(z)),
            slope,
            jnp.exp(d.log_prob(inside)),
            points,
            d.cdf(points),
            ends,
        )

    z, f, law, slope, density, points, back, ends = (np.asarray(x, float) for x in compiled(arrays(case)))
    np.testing.assert_array_equal(ends, np.repeat([[0], [0], [1], [1]], 2, 1))
    np.testing.assert_allclose(slope, np.where(has_atoms_only(case), 0, density), rtol=1e-4)
    atom = (z == 0) | (z == 1) if case.support == "gate" else np.full(z.shape, has_atoms_only(case))
    uniform = f - np.where(atom, v * law, 0)  # spread over the jump of the atom
    for i in range(2):
        assert st.kstest(uniform[:, i], "uniform").pvalue > P_VALUE
    assert (back >= levels - 1e-6).all() and (points >= 0).all() and (points <= 1).all()
    smooth = (points > 0) & (points < 1) & ~np.full(points.shape, has_atoms_only(case))
    np.testing.assert_allclose(back[smooth], levels[smooth], atol=3e-6)
    assert smooth[1:-1].mean() > 0.3 or has_atoms_only(case)
    assert (np.diff(points, axis=0) >= 0).all()


@pytest.mark.few(1)
@rows(has_cdf, lambda case: "logits" in case.params)
def test_cdf_of_certain_bits(case):
    d = case.build(logits=np.float32([-np.inf, np.inf]))
    z = np.float32([-0.5, 0, 0.5, 1, 2])[:, None]
    np.testing.assert_array_equal(d.cdf(z), [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(d.icdf(np.float32([0.2, 0.7, 1])[:, None]), [[0, 1]] * 3)
    assert not jnp.isnan(d.icdf(np.float32([0, 1])[:, None])).any()
