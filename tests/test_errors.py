"""Every public function gets a wrong kind of value for each of its arguments, one at a time.

The error is a ValueError that begins with the argument's name: outside a jitted function, inside one, and if
the wrong array is traced.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro import handlers

import relaxit_jax as rj
from cases import DISTRIBUTIONS
from public_calls import (
    ARGUMENTS,
    BITS,
    CALLS,
    KEY,
    SUM,
    Call,
    count_model,
    no_reals,
    no_shapes,
    relaxed,
)
from relaxit_jax import diagnostics as dg
from relaxit_jax import distributions as rd
from relaxit_jax import elbo
from relaxit_jax import estimators as es
from relaxit_jax import handlers as hd
from relaxit_jax import quantizers as qz
from relaxit_jax import structured as st

pytestmark = pytest.mark.usefixtures("fast_compilation")

# results and states; guides are in test_auto_mean_field.py and test_auto_structured.py
NOT_HERE = {"GradientReport", "Quantized", "CodebookState", "AutoMeanField", "AutoStructured"}


@pytest.fixture
def step(pytestconfig):
    """The quick tier tries every sixth of the wrong values."""
    return 6 if pytestconfig.option.quick else 1


def test_every_public_function_is_here():
    public = {name for module in (es, dg, hd, elbo, rd, qz, st) for name in module.__all__} - NOT_HERE
    public |= {name for name in rj.__all__ if callable(getattr(rj, name))}
    public |= {"dirichlet_to_gaussian", "gaussian_to_dirichlet"}
    twice = {f"{name} of estimators" for name in es.__all__ if name in {*hd.__all__, *rd.__all__}}
    assert {*CALLS} == public | twice


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_here_and_right(name):
    call = CALLS[name]
    function = hd.relax if name == "relax" else call.function
    left_out = {"probs", "validate_args", "args", "kwargs", "scale", "scale_tril"}
    assert set(inspect.signature(function).parameters) - left_out <= set(call.arguments)
    if name in ("gradient_report", "check"):  # they measure, and cannot be traced
        call.function(**call.arguments)
    else:
        jax.eval_shape(call.in_trace)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_wrong_kind_of_argument_is_named(name, argument, step):
    call = CALLS[name]
    for bad in call.bad(argument)[::step]:
        for way in call.ways(argument, bad):
            with pytest.raises(ValueError, match=rf"^{argument}\b.* must .*, got (?s:.*)\.$"):
                way()


@pytest.mark.parametrize("name", [name for name in dir(jnp) if name.startswith(("float8_", "float4_"))])
def test_narrow_floats_are_to_be_cast(name):
    """Noise and log-densities need more bits than these have: the error says what to write."""
    x = jnp.ones(3, jnp.float32).astype(getattr(jnp, name))
    message = rf"^logits must be of 16 bits or more, got dtype {name}. Write logits.astype\(jnp.float32\).$"
    for call in (lambda: rj.gumbel_softmax(KEY, x, 1.0), lambda: es.Bernoulli(x)):
        with pytest.raises(ValueError, match=message):
            call()


# --- values passed in another way ---------------------------------------------------------------

VALUE = np.float32(0.5)
QUANTILES = [case for case in DISTRIBUTIONS if "icdf" in vars(case.distribution)]


@pytest.mark.parametrize("case", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("validated", [pytest.param(True, marks=pytest.mark.whole), False])
def test_methods_of_distributions_name_their_arguments(case, validated, step):
    d = case.build(validate_args=validated)
    value = np.zeros((2, *case.event), np.float32)
    for method, arguments, kinds in (
        (d.log_prob, {"value": value}, {"value": no_reals}),
        (d.sample, {"key": KEY, "sample_shape": ()}, {"sample_shape": no_shapes}),
    ):
        call = Call(method, kinds=kinds, **arguments)
        for name in arguments:
            for bad in call.bad(name)[::step]:
                for way in call.ways(name, bad):
                    with pytest.raises(ValueError, match=rf"^{name} must .*, got (?s:.*)\.$"):
                        way()


@pytest.mark.parametrize("case", QUANTILES, ids=str)
def test_distribution_functions_name_their_arguments(case):
    d = case.build()
    for name, method in (("value", d.cdf), ("q", d.icdf)):
        call = Call(method, kinds={"value": no_reals, "q": no_reals}, **{name: VALUE})
        for bad in call.bad(name):
            for way in call.ways(name, bad):
                with pytest.raises(ValueError, match=rf"^{name} must .*, got (?s:.*)\.$"):
                    way()


@pytest.mark.whole
@pytest.mark.parametrize("name", ["StraightThroughBernoulli", "StraightThroughCategorical", "SimpleTopK"])
def test_exact_draws_may_be_integers_or_booleans(name):
    """They are zeros and ones, also when NumPyro checks whether they are in the support."""
    (case,) = (case for case in DISTRIBUTIONS if case.distribution.__name__ == name)
    d = case.build(validate_args=True)
    z = d.sample(KEY)
    for dtype in (int, bool, jnp.bfloat16):
        np.testing.assert_array_equal(d.log_prob(z.astype(dtype)), d.log_prob(z))


F_RETURNS = {
    "nothing": lambda b: None,
    "a tuple": lambda b: (SUM(b), SUM(b)),
    "a list of numbers": lambda b: [SUM(b)],
    "a dictionary": lambda b: {"loss": SUM(b)},
    "integers": lambda b: SUM(b).astype(int),
    "complex numbers": lambda b: SUM(b) + 0j,
    "narrow floats": lambda b: SUM(b).astype(jnp.float8_e4m3fn),
    "booleans": lambda b: SUM(b) > 0,
    "text": lambda b: "one",
    "one number": jnp.sum,
    "a number for every bit": lambda b: b,
}
ESTIMATORS = {
    "reinforce": es.reinforce,
    "rloo": es.rloo,
    "arm": es.arm,
    "disarm": es.disarm,
    "arms": es.arms,
    "rebar": es.rebar,
    "relax": lambda key, f, q: es.relax(key, f, q, control_variate=SUM),
    "exact": lambda key, f, q: es.exact(f, q),
    "gradient_report": lambda key, f, q: dg.gradient_report(key, f, q, {"rloo": es.rloo}, 2, batch_size=2),
}


@pytest.mark.few(22)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("returned", F_RETURNS)
def test_what_f_returns_is_looked_at(estimator, returned):
    with pytest.raises(ValueError, match=r"^f must be a function .*, got .*\.(\n|$)"):
        ESTIMATORS[estimator](KEY, F_RETURNS[returned], BITS)


@pytest.mark.parametrize("returned", F_RETURNS)
def test_what_other_functions_of_samples_return_is_looked_at(returned):
    f = F_RETURNS[returned]
    with pytest.raises(ValueError, match=r"^control_variate must be a function .*, got .*\.(\n|$)"):
        es.relax(KEY, SUM, BITS, control_variate=f)
    with pytest.raises(ValueError, match=r"^estimators\['one'\] must be a function .*, got .*\.(\n|$)"):
        dg.gradient_report(KEY, SUM, BITS, {"one": lambda key, _, q: f(q.logits)}, 2, batch_size=2)
    loss = (lambda p, v: f(p)[..., 0]) if returned == "a number for every bit" else lambda p, v: f(p)
    if returned != "one number":
        with pytest.raises(ValueError, match=r"^loss must be a function .*, got .*\.(\n|$)"):
            es.value_and_grads(loss, jnp.zeros((2, 3)), 0.0)


def test_a_pair_of_numbers_is_no_batch_of_two():
    """JAX would stack the two, which then have the batch shape."""
    pair = lambda b: (jnp.sum(b[0]), jnp.sum(b[1]))
    for f in (pair, lambda b: list(pair(b))):
        for estimator in ESTIMATORS.values():
            with pytest.raises(ValueError, match=r"^f must be a function with floating-point values, got a "):
                estimator(KEY, f, BITS)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 1), (5, 2)])
def test_a_baseline_has_the_batch_shape(shape):
    with pytest.raises(ValueError, match=r"^baseline must .* batch shape \(2,\) of q, got shape "):
        es.reinforce(KEY, SUM, BITS, baseline=jnp.zeros(shape))
    for good in ((), (1,), (2,)):
        assert es.reinforce(KEY, SUM, BITS, baseline=jnp.zeros(good)).shape == (2,)


FAMILIES = {"bits": BITS, "classes": es.OneHotCategorical(jnp.zeros((2, 3)), event_ndims=1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_name_what_their_methods_take(family):
    q = FAMILIES[family]
    draw = np.asarray(q.sample(KEY))
    drawing = [(q.sample, {"key": KEY, "shape": ()}), (q.coupled, {"key": KEY})]
    if family == "bits":
        drawing.append((q.antithetic, {"key": KEY}))
    scored = [(method, {"sample": draw}) for method in (q.score, q.log_prob, q.log_masses)]
    for method, arguments in drawing + scored:
        call = Call(method, **arguments)
        for name in arguments:
            bad = [*call.bad(name), *([np.zeros(2), np.zeros((5, 7, 3))] if name == "sample" else ())]
            for way in (way for x in bad for way in call.ways(name, x)):
                with pytest.raises(ValueError, match=rf"^{name} must .*, got (?s:.*)\.$"):
                    way()


LOGITS = jnp.zeros(2)
BEAMS = [
    (lambda s, t: LOGITS, (), r"\(state, token\) -> \(logits, state\), got one that returns shape \(2,\)"),
    (lambda s, t: (LOGITS,), (), r"\(state, token\) -> \(logits, state\), got one that returns 1 values"),
    (lambda s, t: (LOGITS, s, s), (), r"got one that returns 3 values"),
    (lambda s, t: None, (), "got one that returns a NoneType"),
    (lambda s, t: {"logits": LOGITS}, (), "got one that returns a dict"),
    (lambda s, t: (None, s), (), r"logits are floating point, of shape \(V,\), got a NoneType"),
    (lambda s, t: ([0.0, 1.0], s), (), r"of shape \(V,\), got a list"),
    (lambda s, t: (jnp.zeros(2, int), s), (), r"got shape \(2,\), dtype int32"),
    (lambda s, t: (LOGITS + 0j, s), (), r"got shape \(2,\), dtype complex64"),
    (lambda s, t: (LOGITS.astype(jnp.float8_e4m3fn), s), (), r"got shape \(2,\), dtype float8_e4m3fn"),
    (lambda s, t: (jnp.zeros(()), s), (), r"got shape \(\), dtype float32"),
    (lambda s, t: (jnp.zeros(0), s), (), r"got shape \(0,\)"),
    (lambda s, t: (LOGITS, s[:1]), jnp.zeros(3), r"got shape \(1,\), .* for state of shape \(3,\)"),
    (lambda s, t: (LOGITS, s + 0.5), jnp.int32(0), "dtype float32 for state of shape .*, dtype int32"),
    (lambda s, t: (LOGITS, {"h": s["h"][None]}), {"h": jnp.zeros(3)}, r"for state\['h'\] of shape \(3,\)"),
    (lambda s, t: (LOGITS, (s,)), jnp.zeros(3), "returns a state like the one it is given, got PyTreeDef"),
    (lambda s, t: (LOGITS, None), jnp.zeros(3), "returns a state like the one it is given, got PyTreeDef"),
]


@pytest.mark.parametrize(("model", "state", "message"), BEAMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_model_of_sequences_returns_is_looked_at(model, state, message, compiled):
    search = lambda: rj.stochastic_beam_search(KEY, model, state, 2, 3)
    with pytest.raises(ValueError, match=rf"^log_prob_fn must be a function .*{message}"):
        (jax.jit(search) if compiled else search)()


def test_a_state_may_be_any_pytree_and_a_python_number_takes_the_dtype_of_the_next():
    good = [((), lambda s: s), (None, lambda s: s), (KEY, lambda s: s), (0, lambda s: s + jnp.float32(0.5))]
    good += [({"n": np.int32(0), "h": [jnp.zeros(3)]}, lambda s: {"n": s["n"] + 1, "h": s["h"]})]
    for state, after in good:
        for start in (0, np.int64(1), jnp.int32(0), -1):
            model = lambda s, t, after=after: [LOGITS, after(s)]
            search = lambda model=model, state=state, start=start: rj.stochastic_beam_search(
                KEY, model, state, 2, 3, start=start
            )
            assert jax.eval_shape(search)[0].shape == (2, 3)


def test_the_bound_names_what_its_loss_takes():
    model = lambda: numpyro.sample("z", dist.Bernoulli(0.5))
    loss = lambda rng_key, model, guide: elbo.RLOO_ELBO().loss(rng_key, {}, model, guide)
    call = Call(loss, rng_key=KEY, model=model, guide=model)
    for name in call.arguments:
        for way in (way for bad in call.bad(name) for way in call.ways(name, bad)):
            with pytest.raises(ValueError, match=rf"^{name} must .*, got (?s:.*)\.$"):
                way()


def test_a_report_names_what_it_is_asked_for():
    report = dg.gradient_report(KEY, SUM, BITS, {"rloo": es.rloo}, 2, batch_size=2)
    for bad in ("arm", 0, None):
        with pytest.raises(ValueError, match=r"^name must be 'rloo', got "):
            report[bad]
    for bad in (None, 3, np.zeros(2)):
        with pytest.raises(ValueError, match=r"^where must be a path, a file or axes of matplotlib, got "):
            report.plot(bad)
    for sampled in (None, (jnp.zeros((2, 3)),), jnp.zeros(3)):
        estimator = dg.from_sampler(lambda key, logits, sampled=sampled: sampled)
        with pytest.raises(ValueError, match=r"^sampler must be one of draws of shape \(2, 3\), got "):
            estimator(KEY, SUM, BITS)


def test_shapes_that_do_not_fit_are_named():
    for call in (hd.less, hd.greater, hd.equal):
        with pytest.raises(ValueError, match=r"^t, s must have batch shapes that broadcast, got "):
            call(jnp.zeros(3), jnp.zeros((2, 4)))
        with pytest.raises(ValueError, match=r"^t, s must have batch shapes that broadcast, got "):
            call(jnp.zeros(3), jnp.arange(2))
    with pytest.raises(ValueError, match=r"^bit, if_one, if_zero must have batch shapes that broadcast"):
        hd.select(jnp.zeros(3), jnp.zeros(2), 0.0)
    with pytest.raises(ValueError, match=r"^table must be of shape \(K, ...\), got shape \(\)"):
        hd.take(1.0, 0)
    with pytest.raises(ValueError, match=r"^value must be an array whose last axis is not empty"):
        rd.GumbelSoftmaxTopK(logits=jnp.zeros(4), k=2, tau=1.0, hard=True).log_prob(1.0)
    with pytest.raises(ValueError, match=r"^value must be of shape \(\.\.\., 4\), got shape \(3,\)"):
        rd.GumbelSoftmaxTopK(logits=jnp.zeros(4), k=2, tau=1.0, hard=True).log_prob(jnp.array([1.0, 1, 0]))


@pytest.mark.parametrize("number", [-1, 0, 2.5, "a", True])
def test_a_number_of_values_is_looked_at_before_the_model_runs(number):
    """This also holds if no site is a count, so that nobody would use it."""
    for bad, name in ((number, "num_values"), ({"z": number}, r"num_values\['z'\]")):
        with pytest.raises(ValueError, match=rf"^{name} must be an integer in .*, got "):
            hd.relax(lambda: None, tau=0.5, num_values=bad)


def test_none_is_no_bad_number_of_values():
    """In a dictionary as well as outside one, it stands for as many as are needed."""
    shapes = [
        jax.eval_shape(lambda n=n: relaxed_law(n)).shape for n in (None, {"z": None}, {}, 20, {"z": 20})
    ]
    assert shapes[0] == shapes[1] == shapes[2] != shapes[3] == shapes[4] == (20,)


def relaxed_law(num_values):
    model = handlers.seed(hd.relax(count_model, tau=0.5, num_values=num_values), 0)
    return handlers.trace(model).get_trace()["z"]["intermediates"][0]


def test_a_guide_takes_the_options_of_its_model_for_a_partly_observed_site():
    """It has only the unobserved part, which the options may call by the name of the whole."""
    classes, mask = dist.Categorical(np.float32([0.2, 0.8])).expand([3]), np.array([True, False, True])
    count = dist.Poisson(0.5).expand([3])
    model = lambda d=classes: numpyro.sample("z", d, obs=np.array([0, 1, 0]), obs_mask=mask)
    guide = lambda d=classes: numpyro.sample("z_unobserved", d)
    for fn in (model, guide):
        relaxed(fn, tau=0.5, config={"z": "straight_through"})
        relaxed(lambda fn=fn: fn(count), tau=0.5, num_values={"z": 9})
        with pytest.raises(ValueError, match=r"num_values\['z_unobserved'\] must be left out"):
            relaxed(fn, tau=0.5, num_values={"z": 2})
        for name in ("config", "num_values"):
            with pytest.raises(ValueError, match=rf"^{name} must be names of the sites .*, got 'other'"):
                relaxed(fn, tau=0.5, **{name: {"z": None, "other": None}})
