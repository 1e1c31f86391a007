"""Every class of relaxit_jax.distributions inside NumPyro: expand, vmap, arguments, models."""

import copy
import functools
import inspect
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.special as sp
import scipy.stats as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over

from cases import DISTRIBUTIONS
from helpers import DISCRETE, KEY, P_VALUE, arrays, has_law, has_moments
from helpers import class_rows as rows
from relaxit_jax import _arguments as arg
from relaxit_jax import distributions as rd
from relaxit_jax.distributions import _constraints as ct

pytestmark = pytest.mark.usefixtures("fast_compilation")


def spread(params, shape):
    """Parameters whose batch axis stands at `shape`, as (2, 1); scalars do not change."""
    return {
        name: x if jnp.ndim(x) == 0 else jnp.reshape(x, shape + x.shape[1:]) for name, x in params.items()
    }


@pytest.mark.few(1)
@rows()
def test_expanded_reinterpreted_and_masked(case):
    """It agrees with the distribution whose parameters are broadcast first; (2, 1) becomes (3, 2, 4)."""
    shape, mask = (3, 2, 4), np.array([True, False, True, False])

    @jax.jit
    def compiled(params):
        d = case.build(**spread(params, (2, 1)))
        wide = d.expand(shape)
        again = d.expand((2, 4)).expand(shape)
        dims = {n: case.distribution.arg_constraints[n].event_dim for n in params}
        by_hand = {
            n: jnp.broadcast_to(x, shape + x.shape[x.ndim - dims[n] :])
            for n, x in spread(params, (2, 1)).items()
        }
        full = case.build(**by_hand)
        z = wide.sample(KEY, (1500,))
        few = z[:5]
        for other in (again, wide.mask(mask), wide.to_event(2)):
            assert jax.eval_shape(other.sample, KEY).shape == (*shape, *case.event)
        pairs = {}
        if has_law(case):
            law = full.log_prob(few)
            pairs["law"] = wide.log_prob(few), law
            pairs["law again"] = again.log_prob(few), law
            pairs["event"] = wide.to_event(2).log_prob(few), law.sum((-1, -2))
            pairs["mask"] = wide.mask(mask).log_prob(few), jnp.where(mask, law, 0)
            pairs["no mask"] = wide.mask(False).log_prob(few), 0 * law
        if has_moments(case):
            pairs["mean"], pairs["variance"] = (wide.mean, full.mean), (wide.variance, full.variance)
        if case.distribution in DISCRETE:
            pairs["entropy"] = wide.entropy(), full.entropy()
            pairs["entropy of the event"] = wide.to_event(1).entropy(), full.entropy().sum(-1)
        if case.build().has_enumerate_support:
            pairs["support"] = wide.enumerate_support(), full.enumerate_support()
            pairs["unexpanded"] = (wide.enumerate_support(False), full.enumerate_support(False))
        return z, case.build(**params).sample(KEY, (20_000,)), pairs

    draws, alone, pairs = compiled(arrays(case))
    for name, (ours, by_hand) in pairs.items():
        assert ours.shape == by_hand.shape, name
        np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-6, err_msg=name)
    assert draws.shape == (1500, *shape, *case.event)
    flat = np.asarray(draws, float).reshape(1500, 24, -1)[..., 0]
    correlations = np.corrcoef(flat.T)[np.triu_indices(24, 1)]
    assert np.abs(correlations).max() * np.sqrt(1500) < 4.5  # no two elements share their noise
    means, error = flat.mean(0).reshape(shape), flat.std(0).reshape(shape) / np.sqrt(1500)
    alone = np.asarray(alone, float).reshape(20_000, 2, -1)[..., 0].mean(0)
    # and each has the parameters of its place, to 4.5 errors of either mean
    assert (np.abs(means - alone[:, None]) < 4.5 * np.sqrt(1 + 1500 / 20_000) * error).all()
    d = case.build()
    for reinterpreted in (d.to_event(1), case.build().expand((3, 2)).to_event(1)):
        assert reinterpreted.event_shape == (2, *case.event)
        with pytest.raises(NotImplementedError):  # as of NumPyro's own
            reinterpreted.enumerate_support()
    if not issubclass(case.distribution, rd.StraightThroughBernoulli):  # whose values are 0 and 1
        assert not d.has_enumerate_support and not d.expand((3, 2)).has_enumerate_support
        for one in (d, d.expand((3, 2))):
            with pytest.raises(NotImplementedError):
                one.enumerate_support()


def test_a_scalar_scale_counts_for_every_class():
    for cls, rest, event in ((rd.LogisticNormalSoftmax, {}, 3), (rd.InvertibleGaussian, {"tau": 0.5}, 4)):
        d = cls(loc=jnp.zeros((2, 3)), scale=0.5, **rest)
        shapes = ((2,), (event,))
        assert (d.batch_shape, d.event_shape) == shapes
        assert cls.infer_shapes((2, 3), (), *((),) * len(rest)) == shapes
        assert cls.infer_shapes((2, 3), (1,), *((),) * len(rest)) == shapes


@rows()
def test_what_has_probabilities_of_single_values_is_not_reparametrized(case):
    """The derivative of its draws is not the whole gradient: engines that ask take the score instead."""
    d = case.build()
    assert d.has_rsample == (
        case.support in ("unit", "simplex", "number", "k_hot_soft", "doubly", "permutation_soft")
    )
    assert d.is_discrete == d.support.is_discrete == (case.distribution is rd.OneHotCategorical)
    assert d.expand((3, 2)).has_rsample == d.to_event(1).has_rsample == d.has_rsample


def test_one_hot_categorical_draws():
    case = DISTRIBUTIONS[-2]
    assert case.distribution is rd.OneHotCategorical
    weights = jnp.arange(3.0)

    def loss(logits):
        z = rd.OneHotCategorical(logits=logits).sample(KEY, (100_000,))
        return jnp.sum(weights * z), z

    gradient, draws = jax.jit(jax.grad(loss, has_aux=True))(case.params["logits"])
    assert (gradient == 0).all()
    counts = np.asarray(draws, int).sum(0)
    for i in range(2):
        expected = sp.softmax(case.params["logits"][i].astype(float)) * 100_000
        assert st.chisquare(counts[i], expected / expected.sum() * counts[i].sum()).pvalue > P_VALUE
    mode = rd.OneHotCategorical(logits=case.params["logits"]).mode
    np.testing.assert_array_equal(mode, np.eye(3)[[2, 1]])


# --- pytrees, vmap ----------------------------------------------------------------------------


@pytest.mark.few(2)
@rows()
def test_it_is_a_pytree(case):
    d = case.build(validate_args=False)
    leaves, tree = jax.tree.flatten(d)
    back = jax.tree.unflatten(tree, leaves)
    assert jax.tree.structure(back) == tree == jax.tree.structure(case.build(validate_args=False))

    @jax.jit
    def through(d):
        carried, laws = jax.lax.scan(lambda d, key: (d, d.sample(key)), d, jax.random.split(KEY, 2))
        return d, carried, laws

    draw = jax.jit(lambda d: d.sample(jax.random.split(KEY, 2)[0]))
    returned, carried, draws = through(d)
    for other in (back, returned, carried):
        assert type(other) is case.distribution
        assert (other.batch_shape, other.event_shape) == (d.batch_shape, d.event_shape)
        assert other._validate_args is False
        for name in (*case.options, *case.integers):
            assert getattr(other, name) == getattr(d, name)
        for name in case.floats:
            np.testing.assert_array_equal(getattr(other, name), getattr(d, name))
    np.testing.assert_allclose(draws[0], draw(back), rtol=3e-6, atol=1e-6)


@pytest.mark.few(1)
@rows()
def test_vmap_over_each_parameter(case):
    """It is built under vmap over one parameter, with its other batches unchanged, and over all at once."""
    params = arrays(case)
    changed = {
        n: jnp.stack([x, x[::-1] if n == "scale_tril" else 1.2 * x, x if n == "scale_tril" else 0.9 * x])
        for n, x in params.items()
    }

    @jax.jit
    def compiled(params, changed):
        d = case.build(**params)
        result = lambda d: (d.sample(KEY), d.log_prob(z)) if has_law(case) else (d.sample(KEY),)
        z = d.sample(KEY)
        found = {}
        for n in [*params, "all"]:
            names = list(params) if n == "all" else [n]
            make = lambda moved: case.build(**params | moved)
            moved = {name: changed[name] for name in names}
            loop = jax.lax.map(lambda one, make=make: result(make(one)), moved)
            axes = vmap_over(d, **dict.fromkeys(names, 0))
            batched = jax.vmap(make, out_axes=axes)(moved)
            mapped = jax.vmap(result, in_axes=(axes,))(batched)
            expanded = jax.vmap(lambda one, make=make: make(one).expand((5, 2)))(moved)
            wide, promoted = promote_batch_shape(expanded), promote_batch_shape(batched)
            everything = promote_batch_shape(jax.vmap(make)(moved))
            assert promoted.batch_shape == everything.batch_shape == (3, 2), n
            assert wide.batch_shape == (3, 5, 2), n
            # (NumPyro's promotion of an expanded one leaves the sizes to expand as they were: no draws)
            for other in (promoted, everything):
                draw = jax.eval_shape(lambda d: d.sample(KEY, (4,)), other)
                assert draw.shape == (4, *other.batch_shape, *case.event), n
            laws = []
            if has_law(case) and n == "all":
                laws = [promoted.log_prob(z), everything.log_prob(z), wide.log_prob(z)[:, 4]]
            elif has_law(case):
                assert jax.eval_shape(promoted.log_prob, z).shape == (3, 2), n
            found[n] = mapped, loop, laws
        return found

    for name, (mapped, loop, laws) in compiled(params, changed).items():
        for one, other in zip(mapped, loop, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=str(name))
        for other in laws:
            np.testing.assert_allclose(other, loop[1], rtol=1e-5, atol=1e-5, err_msg=str(name))


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.few(1)
@rows(lambda case: "logits" in case.params)
def test_probs_are_logits(case):
    """This includes certain and impossible ones: nothing is clamped to an epsilon."""
    logits = np.array(case.params["logits"])
    bits = (case.event == () and "values" not in case.params) or "scale_tril" in case.params
    if bits:
        logits.flat[:2] = [-np.inf, np.inf]
        probs = sp.expit(logits)
    else:
        logits[(0,) * logits.ndim] = -np.inf
        logits = sp.log_softmax(logits, -1)
        probs = sp.softmax(logits, -1)
    rest = {n: x for n, x in case.params.items() if n != "logits"}

    @jax.jit
    def both(probs, logits):
        ds = [
            case.distribution(probs=probs, **rest, **case.options),
            case.distribution(logits=logits, **rest, **case.options),
        ]
        z = ds[0].sample(KEY, (20,))
        out = [(d.logits, d.sample(KEY, (20,)), d.log_prob(z) if has_law(case) else z) for d in ds]
        return out

    by_probs, by_logits = both(jnp.asarray(probs), jnp.asarray(logits))
    np.testing.assert_array_equal(np.isinf(by_probs[0]), np.isinf(logits))
    for one, other in zip(by_probs, by_logits, strict=True):
        assert not jnp.isnan(one).any()
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    arguments = rest | case.options
    for wrong in ({}, {"logits": logits, "probs": probs}):
        with pytest.raises(ValueError, match="logits must be given, or else probs"):
            case.distribution(**wrong, **arguments)
    below, above, nan = -probs, 2 * probs, np.full_like(probs, np.nan)
    for bad, need in ((below, ""), (nan, ""), (above, "" if bits else "of sum 1")):
        make = functools.partial(case.distribution, probs=bad, **arguments)
        named = (
            f"^{case.distribution.__name__} distribution got invalid probs parameter: probs must be {need}"
        )
        for made in (make, functools.partial(jax.eval_shape, make)):  # inside a jitted function too
            with pytest.raises(ValueError, match=named):
                made()
        hidden = jnp.isnan(make(validate_args=False).logits)
        assert hidden.any() == (bits or bad is not above)  # NaN is what can be seen of a traced one as well


# by name, at the edge of what is allowed where it has one; of all others NaN is bad
BAD = {
    "tau": 0.0, "tau_forward": 0.0, "tau_backward": 0.0, "gap": 0.0, "scale": -1.0, "delta": -1.0,
    "scale_tril": 3.0,
}  # fmt: skip


@pytest.mark.few(9)
@rows()
def test_bad_values_are_named_if_validated(case):
    for name, x in case.floats.items():
        bad = jnp.full_like(x, BAD.get(name, np.nan))
        for known in (bad, np.asarray(bad), bad.tolist()):
            build = functools.partial(case.build, **{name: known})
            for made in (build, functools.partial(jax.eval_shape, build)):  # inside a jitted function too
                with pytest.raises(ValueError, match=f"invalid {name} parameter"):
                    made()
            build(validate_args=False)
            with numpyro.validation_enabled(False):
                build()
                with pytest.raises(ValueError, match=f"invalid {name} parameter"):
                    build(validate_args=True)
        with pytest.raises(ValueError, match=name):
            case.build(**{name: None})
        with pytest.raises(ValueError, match=f"{name} must be"):
            case.build(**{name: np.ones_like(x, int)}, validate_args=True)
    if "tau" in case.params and case.floats.keys() != {"tau"}:
        with pytest.raises(ValueError, match="batch shapes that broadcast"):
            case.build(tau=jnp.ones(3))


@rows()
def test_a_sampler_looks_at_values_unless_told_not_to(case, monkeypatch):
    """With `validate_args=False` every distribution can be drawn and scored, whatever its values."""

    def sampler(*_, shape=(2,), **__):
        arg.require_values("tau", -1.0, "positive", lambda x: x > 0)
        return jnp.zeros(shape)

    for name in ("_sampler", "_density"):
        monkeypatch.setattr(case.distribution, name, staticmethod(sampler))
    for call in (lambda d: d.sample(KEY), lambda d: d.log_prob(jnp.zeros(case.event))):
        call(case.build(validate_args=False))
        with pytest.raises(ValueError, match="tau must be positive"):
            call(case.build())


def test_of_a_logistic_normal_both_scales_can_be_read():
    """The one that was not passed is computed, and neither kept nor handed to the sampler."""
    case = {case.name: case for case in DISTRIBUTIONS}
    diagonal, full = case["logistic_normal"].build(), case["logistic_normal_full"].build()
    for d, given in ((diagonal, "scale"), (full, "scale_tril")):
        covariance = d.scale_tril @ jnp.matrix_transpose(d.scale_tril)
        np.testing.assert_allclose(covariance, d.covariance_matrix, rtol=1e-6)
        np.testing.assert_allclose(d.scale**2, jnp.diagonal(covariance, axis1=-2, axis2=-1), rtol=1e-6)
        for again in (d, jax.jit(lambda d: d)(d), pickle.loads(pickle.dumps(d)), copy.copy(d)):
            assert again.get_args().keys() == {"loc", given} and len(jax.tree.leaves(again)) == 2
            np.testing.assert_array_equal(again.scale_tril, d.scale_tril)


def test_probabilities_that_rounding_left_above_one_are_one():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        above = jnp.asarray(1, dtype) + jnp.finfo(dtype).eps
        assert rd.StraightThroughBernoulli(probs=above).logits == jnp.inf


def test_a_list_may_hold_traced_numbers():
    logits = jax.jit(lambda p: rd.StraightThroughBernoulli(probs=[0.5, p]).logits)(0.25)
    np.testing.assert_allclose(logits, [0, -np.log(3)], rtol=1e-6)


def test_options_are_checked_and_kept():
    with pytest.raises(ValueError, match="stretch must be two numbers"):
        rd.HardConcrete(logits=0.0, tau=0.5, stretch=(0.1, 1.1))
    for cls in (rd.GumbelRao, rd.ReinMaxRao):
        assert cls(logits=jnp.zeros(3), tau=0.5, num_samples=7).num_samples == 7
        with pytest.raises(ValueError, match="num_samples must be an integer"):
            cls(logits=jnp.zeros(3), tau=0.5, num_samples=0)
    for k in (0, 5, 1.5, None):
        with pytest.raises(ValueError, match=r"k must be an integer in \[1, 4\]"):
            rd.GumbelSoftmaxTopK(logits=jnp.zeros(4), k=k, tau=0.5)
    with pytest.raises(ValueError, match="scale must be given, or else scale_tril"):
        rd.LogisticNormalSoftmax(loc=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"values must be of shape \(\.\.\., 3\)"):
        rd.GeneralizedGumbelSoftmax(logits=jnp.zeros(3), values=jnp.zeros(2), tau=0.5)
    for cls in (rd.OneHotCategorical, rd.GumbelSoftmaxTopK):
        with pytest.raises(ValueError, match="logits"):
            cls(logits=jnp.float32(0.0), **({} if cls is rd.OneHotCategorical else {"k": 1, "tau": 0.5}))

    class Marked(rd.HardConcrete):
        """A user's subclass keeps the options of its base."""

    marked, plain = (cls(logits=-1.0, tau=0.5, stretch=(-0.5, 1.1)) for cls in (Marked, rd.HardConcrete))
    assert marked.log_prob(0.0) == plain.log_prob(0.0) != rd.HardConcrete(logits=-1.0, tau=0.5).log_prob(0.0)


@rows()
def test_a_positional_argument_is_an_error_that_shows_the_call(case):
    """The calls that it shows are complete."""
    cls = case.distribution
    with pytest.raises(TypeError, match=f"^{cls.__name__} takes its parameters by keyword: ") as caught:
        cls(*case.params.values())
    shape = case.params["logits" if "logits" in case.params else "loc"].shape
    probs = np.full(shape, 1 / shape[-1], np.float32)
    other = {"probs": probs, "scale": np.float32(1), "scale_tril": np.eye(shape[-1], dtype=np.float32)}
    calls = str(caught.value).split(": ")[1].split(" or ")
    assert len(calls) == 1 + bool({"logits", "scale_tril"} & set(inspect.signature(cls).parameters))
    for call in calls:
        written = re.sub(r"(\w+)=\.\.\.", r"\1=given['\1']", call)
        d = eval(written, {cls.__name__: cls, "given": other | case.params})
        assert type(d) is cls and (d.batch_shape, d.event_shape) == ((2,), case.event)


def test_a_subclass_may_take_positions():
    """A user's own constructor is left alone."""

    class Fair(rd.StraightThroughBernoulli):
        def __init__(self, num_bits):
            super().__init__(logits=jnp.zeros(num_bits))

    assert Fair(3).batch_shape == (3,)


@pytest.mark.parametrize("hard", [False, True])
def test_names_with_the_signature_of_pyro(hard):
    alias = rd.RelaxedOneHotCategoricalStraightThrough if hard else rd.RelaxedOneHotCategorical
    cls = rd.StraightThroughGumbelSoftmax if hard else rd.GumbelSoftmax
    probs = np.float32([0.2, 0.8])
    for d in (alias(0.5, probs), alias(0.5, logits=np.log(probs)), alias(temperature=0.5, probs=probs)):
        assert type(d) is cls and d.tau == 0.5
        np.testing.assert_allclose(d.probs, probs, rtol=1e-6)
    assert alias(0.5, probs, validate_args=True)._validate_args


CONSTRAINTS = [ct.log_odds, ct.log_weights, ct.simplex, ct.one_hot]


@pytest.mark.whole
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: type(c).__name__)
def test_constraints(constraint):
    leaves, tree = jax.tree.flatten(constraint)
    assert jax.tree.unflatten(tree, leaves) == constraint and not leaves
    assert not any(constraint == other for other in CONSTRAINTS if other is not constraint)
    prototype = jnp.full((4, 3), 7.0)
    feasible = constraint.feasible_like(prototype)
    assert feasible.shape == (4, 3)
    within = constraint(feasible)
    assert within.shape == (4,) + (3,) * (1 - constraint.event_dim) and within.all()
    assert not constraint(jnp.full((4, 3), np.nan)).any()
    if not constraint.is_discrete:
        bijection = biject_to(constraint)
        y = 3 * jax.random.normal(KEY, (50, *bijection.inverse_shape((3,))))
        z = bijection(y)
        assert constraint(z).all() and z.shape == (50, 3)
        np.testing.assert_allclose(bijection.inv(z), y, rtol=1e-3, atol=1e-3)


@pytest.mark.few(1)
@rows()
def test_feasible_values_of_every_support(case):
    event_dim = len(case.event)
    assert case.build().support.event_dim == event_dim

    @jax.jit
    def compiled(params):
        d = case.build(**params)
        feasible = d.support.feasible_like(jnp.full((2, *case.event), 0.3))
        nothing = jax.tree.map(jnp.zeros_like, params)
        if has_law(case):  # of a masked element nothing is seen, not even that it is impossible
            outside = jnp.full((2, *case.event), 9.0)
            masked = lambda p: case.build(**p).mask(np.array([True, False])).log_prob(outside)[1]
            nothing = jax.grad(masked)(params)
        return d.support(feasible), d.support(d.sample(KEY)), nothing

    feasible, drawn, nothing = compiled(arrays(case))
    assert feasible.all() and drawn.all() and feasible.shape == (2,)
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves(nothing))


# --- in a model -------------------------------------------------------------------------------


@pytest.mark.few(1)
@rows()
def test_in_a_model(case):
    """Plates expand it, seed draws from it, trace and the log-density see it; also in a scan."""

    def model(params):
        with numpyro.plate("outer", 3, dim=-2), numpyro.plate("inner", 2, dim=-1):
            numpyro.sample("z", case.build(**params))

        def step(carry, _):
            z = numpyro.sample("s", case.build(**params))
            return carry + z.mean(), z

        scan(step, jnp.float32(0), jnp.arange(4))

    def density(params):
        trace = handlers.trace(handlers.seed(model, KEY)).get_trace(params)
        z, s = trace["z"]["value"], trace["s"]["value"]
        assert z.shape == (3, 2, *case.event) and s.shape == (4, 2, *case.event)
        assert trace["s"]["fn"].batch_shape == (4, 2)
        if not has_law(case):
            return 0, 0
        d = case.build(**params)
        seen = trace["z"]["fn"].log_prob(z), trace["s"]["fn"].log_prob(s)
        return seen, (d.log_prob(z), d.log_prob(s))

    seen, expected = jax.jit(density)(arrays(case))
    chex.assert_trees_all_close(seen, expected, rtol=1e-5, atol=1e-5)
