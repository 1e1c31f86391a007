"""Every class inside the engines that users run: the right number, or a refusal that says what to do.

One element of a plate is ``z ~ class(prior)``, ``y ~ N(f(z), 1)`` with ``f(z) = a . z + (b . z)^2``, and the
guide has the same class. The exact loss is a sum over the outcomes of z, or a quadrature. `OWED` says what
each kind of class has to do under each engine; docs/families/numpyro.md has the same table.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special as sp
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import (
    HMC,
    MCMC,
    NUTS,
    DiscreteHMCGibbs,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoNormal

from cases import DISTRIBUTIONS
from helpers import outcomes
from relaxit_jax import distributions as rd
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import unrounded

KEY = jax.random.key(20261129)
PARTICLES, DRAWS = 2, 3000
Y, FAR = 0.8, 3.0  # what is observed; for NUTS far enough from the prior to count
pytestmark = [
    pytest.mark.few(0),
    pytest.mark.usefixtures("fast_compilation"),
    pytest.mark.filterwarnings("ignore:.*does not support models with discrete:UserWarning"),
]

ENGINES = {
    "Trace_ELBO": (Trace_ELBO, None), "TraceMeanField_ELBO": (TraceMeanField_ELBO, None),
    "TraceGraph_ELBO": (TraceGraph_ELBO, None), "RLOO_ELBO": (RLOO_ELBO, None),
    "Trace_ELBO, unrounded": (Trace_ELBO, unrounded),
}  # fmt: skip
ATOMS, NO_SLOPE, OWN_ATOM, NO_DENSITY = "atoms at 0 and 1", "no slope", "root of its own", "no|hard=True"
# Duties of each kind of class under each engine: "exact", the gradient of the exact loss; "own", the mean
# of its straight-through gradient of the linear log-masses and the likelihood; or words of its refusal.
OWED = {
    "continuous": dict.fromkeys(ENGINES, "exact"),
    "gate": dict.fromkeys(ENGINES, "exact") | {"Trace_ELBO": ATOMS},
    "straight-through": dict.fromkeys(ENGINES, "exact")
    | dict.fromkeys(["Trace_ELBO", "TraceMeanField_ELBO", "Trace_ELBO, unrounded"], "own"),
    "discrete": {"TraceGraph_ELBO": "exact", "RLOO_ELBO": "exact"},
    "set": dict.fromkeys(ENGINES, "exact")
    | dict.fromkeys(["Trace_ELBO", "TraceMeanField_ELBO", "Trace_ELBO, unrounded"], NO_SLOPE),
    "own atom": dict.fromkeys(["Trace_ELBO", "TraceMeanField_ELBO", "Trace_ELBO, unrounded"], OWN_ATOM),
    "no density": dict.fromkeys(ENGINES, NO_DENSITY),
}


def kind(case):
    if case.support in ("number", "k_hot_soft", "doubly", "permutation_soft"):
        return "no density"
    if case.support in ("gate", "unit", "simplex"):
        return "gate" if case.support == "gate" else "continuous"
    named = {
        rd.OneHotCategorical: "discrete",
        rd.StochasticTimesSmooth: "own atom",
        rd.GumbelSoftmaxTopK: "set",
        rd.RelaxedPermutation: "set",
    }
    return named.get(case.distribution, "straight-through")


# One class of each kind runs through every engine and arrangement. The programs of the others differ only in
# the draw and the density, and compiling them is slow: they run through the engines that use both.
WHOLE = [
    "relaxed_bernoulli", "gumbel_softmax", "hard_concrete", "straight_through_bernoulli",
    "straight_through_categorical", "one_hot_categorical", "relaxed_top_k_hard",
]  # fmt: skip
rows = lambda *kinds: pytest.mark.parametrize(
    "case", [case for case in DISTRIBUTIONS if not kinds or kind(case) in kinds], ids=str
)


# --- the model, and its exact loss ------------------------------------------------------------


def readout(case, z):
    z = z.reshape(*z.shape[: z.ndim - len(case.event)], -1)
    a, b = (jnp.cos(jnp.arange(z.shape[-1]) + shift) for shift in (0.3, 1.5))
    return z @ (1.5 * a) + (z @ b) ** 2


def of_data(case, z, y=Y):
    return dist.Normal(readout(case, z), 1).log_prob(y)


def moved(params):
    """The prior: the parameters of the neighbor."""
    return {name: x[::-1] if np.ndim(x) else x for name, x in params.items()}


def site(case, params, arrangement="plate", obs=None):
    """The site of the guide, and of the model if there are data."""

    def element(params):
        z = numpyro.sample("z", case.build(**params))
        if obs is not None:
            numpyro.sample("y", dist.Normal(readout(case, z), 1), obs=jnp.float32(obs))

    if arrangement == "scan":
        arrays = {name: x for name, x in params.items() if np.ndim(x)}
        step = lambda carry, x: (carry, element(params | x))
        return scan(step, 0.0, arrays)
    part = arrangement == "minibatch"
    with numpyro.plate("n", 2, subsample_size=1 if part else None) as rows:
        own = {name: jnp.asarray(x)[rows] if part and jnp.ndim(x) else x for name, x in params.items()}
        scale, mask = (0.4, jnp.array([True, False])[rows]) if part else (1.0, True)
        with handlers.scale(scale=scale), handlers.mask(mask=mask):
            element(own)


def trained(case):
    """The parameters whose gradients are checked."""
    names = ["logits", "loc", "scale", "tau"] if kind(case) in ("continuous", "gate") else ["logits"]
    return {name: jnp.asarray(x) for name, x in case.floats.items() if name in names}


def exact_losses(case, params):
    """E_q [log q - log p - log N(y; f(z), 1)] for both elements."""
    guide, prior = ({**case.integers, **wide(case), **p} for p in (params, moved(wide(case))))
    if kind(case) in ("straight-through", "discrete", "set"):
        values, _ = outcomes(case)
        laws = [case.build(**{n: x for n, x in p.items() if n not in case.integers}).log_prob(values)
                for p in (guide, prior)]  # fmt: skip
        weights = jnp.exp(laws[0])
    elif case.support == "gate":
        z = (np.arange(20_000) + 0.5) / 20_000
        values = np.concatenate([[0, 1], z])[:, None] * np.ones(2)
        laws = [case.density(values, **p) for p in (guide, prior)]
        weights = jnp.exp(laws[0]) * np.where(np.arange(len(values)) < 2, 1, 1 / 20_000)[:, None]
    else:
        dims = case.event[0] - (case.support == "simplex") if case.event else 1
        grid = np.linspace(-40, 40, 109 if dims > 1 else 4001)
        y = np.stack(np.meshgrid(*[grid] * dims, indexing="ij"), -1).reshape(-1, 1, dims)
        if case.support == "simplex":
            unrounded = jax.nn.log_softmax(jnp.concatenate([y, 0 * y[..., :1]], -1))
            jacobian, values = unrounded.sum(-1), jnp.exp(unrounded)
        else:
            jacobian, values = (sp.log_expit(y) + sp.log_expit(-y)).sum(-1), sp.expit(y)
            unrounded, values = (x if case.event else x[..., 0] for x in (y, values))
        laws = [case.density(unrounded, log_space=True, **p) for p in (guide, prior)]
        weights = jnp.exp(laws[0] + jacobian) * (grid[1] - grid[0]) ** dims
    costs = laws[0] - laws[1] - of_data(case, jnp.asarray(values))
    return jnp.sum(jnp.where(weights > 0, weights * costs, 0), 0)


def wide(case):
    return {name: np.asarray(x, jnp.result_type(float)) for name, x in case.floats.items()}


def in_float64(f, params):
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(x, float)) for name, x in params.items()}
        return jax.tree.map(np.asarray, jax.jit(f)(params))


@functools.cache
def exact(name):
    """For each parameter, the gradient of the exact loss of each element."""
    case = next(case for case in DISTRIBUTIONS if case.name == name)
    return in_float64(jax.jacobian(lambda p: exact_losses(case, p)), trained(case))


def log_ratio(case, z, params, prior):
    """log q(z) - log p(z) as a linear function of z, written out here again."""
    if "values" in case.params:  # straight lines between the values
        value = jax.lax.stop_gradient(z)
        pmf = [jax.nn.log_softmax(p["logits"]) for p in (params, prior)]
        at = value[..., None] == case.params["values"]
        slopes = [_central(x, case.params["values"]) for x in pmf]
        law, slope = (jnp.sum(jnp.where(at, x[0] - x[1], 0), -1) for x in (pmf, slopes))
        return law + jax.lax.stop_gradient(slope) * (z - value)
    difference = params["logits"] - prior["logits"]
    if not case.event:
        return z * difference - jax.nn.softplus(params["logits"]) + jax.nn.softplus(prior["logits"])
    sets = np.array(list(itertools.combinations(range(case.event[0]), case.params.get("k", 1))))
    total = lambda logits: jax.nn.logsumexp(logits[..., sets].sum(-1), -1)
    return jnp.sum(z * difference, -1) - total(params["logits"]) + total(prior["logits"])


def _central(y, x):
    """Slopes by both neighbors, by one at the ends."""
    inner = (y[..., 2:] - y[..., :-2]) / (x[..., 2:] - x[..., :-2])
    ends = [(y[..., i + 1] - y[..., i]) / (x[..., i + 1] - x[..., i]) for i in (0, x.shape[-1] - 2)]
    return jnp.concatenate([ends[0][..., None], inner, ends[1][..., None]], -1)


def own_loss(case, key, params, in_closed_form):
    """The loss of straight-through draws: with the log-masses at the draw, or with their exact KL."""
    prior = moved(case.floats)
    params = {**case.floats, **params}
    z = case.draw(key, (2,), **params)
    if in_closed_form:
        kl = exact_losses(case, params) + jnp.sum(jnp.exp(case.build(**params).log_prob(values_of(case)))
                                                  * of_data(case, values_of(case)), 0)  # fmt: skip
    else:
        kl = log_ratio(case, z, params, prior)
    return jnp.sum(kl - of_data(case, z))


def values_of(case):
    return jnp.asarray(outcomes(case)[0])


# --- under the four bounds --------------------------------------------------------------------


def loss(case, params, key, engine, arrangement="plate"):
    elbo, handle = ENGINES[engine]
    handle = handle or (lambda f: f)
    prior, params = moved(case.floats), {**case.floats, **params}
    model = handle(lambda: site(case, prior, arrangement, Y))
    return elbo(PARTICLES).loss(key, {}, model, handle(lambda: site(case, params, arrangement)))


def z_scores(gradients, expected, error=0.0):
    flat = lambda tree, rows: np.concatenate(
        [np.asarray(x, float).reshape(rows, -1) for x in jax.tree.leaves(tree)], -1
    )
    draws = flat(gradients, DRAWS)
    mean, spread = draws.mean(0), draws.std(0) / np.sqrt(len(draws))
    return np.abs(mean - flat(expected, 1)[0]) / (np.hypot(spread, error) + 1e-5)


@pytest.mark.few(0, "[simple_top_k]", "[straight_through_categorical]", "[gaussian_bernoulli]")
@rows(*(set(OWED) - {"no density", "own atom"}))
def test_gradients_of_the_bounds(case):
    """The site is in a plate, in a scan, and in a minibatch with a scale and a mask."""
    owed, params = OWED[kind(case)], trained(case)
    exact_gradients = exact(case.name)
    total = {name: g.sum(0) for name, g in exact_gradients.items()}
    part = {name: 0.4 * g[0] for name, g in exact_gradients.items()}  # the second element is masked
    right = [name for name, what in owed.items() if what == "exact"]
    own = [name for name, what in owed.items() if what == "own"]
    if case.name not in WHOLE:
        right, own = right[-1:], own[:1]
    # scans of TraceGraph_ELBO pair costs and scores by steps, and its masks and scales go to the scores
    arranged = [n for n in right if n != "TraceGraph_ELBO"][-1:] if case.name in WHOLE else []
    shape_of = lambda name: name if name == "scan" else "minibatch"

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def gradients(params, key):
        grad = lambda f: jax.grad(f)(params)
        found = {name: grad(lambda p, name=name: loss(case, p, key, name)) for name in right + own}
        for name, a in itertools.product(arranged, ("scan", "minibatch")):
            found[a] = grad(lambda p, name=name, a=a: loss(case, p, key, name, shape_of(a)))
        for name in own:
            hand = functools.partial(own_loss, case, jax.random.fold_in(key, 1))
            closed = name == "TraceMeanField_ELBO"
            found[name, "by definition"] = grad(lambda p, hand=hand, closed=closed: hand(p, closed))
        return {str(name): x for name, x in found.items()}

    found = gradients(params, jax.random.split(KEY, DRAWS))
    for name in right:
        assert z_scores(found[name], total).max() < 4.5, name
        assert z_scores(found[name], jax.tree.map(lambda x: 0.7 * x, total)).max() > 6, name  # with power
    for name in arranged and ("scan", "minibatch"):
        assert z_scores(found[name], part if name == "minibatch" else total).max() < 4.5, name
    for name in own:
        hand = found[str((name, "by definition"))]
        means = jax.tree.map(lambda x: np.asarray(x, float).mean(0), hand)
        errors = np.concatenate([np.asarray(x).std(0).ravel() for x in jax.tree.leaves(hand)]) / np.sqrt(
            DRAWS
        )
        assert z_scores(found[name], means, errors).max() < 4.5, name
        assert z_scores(found[name], jax.tree.map(lambda x: 0.7 * x, means), errors).max() > 6, name


@pytest.mark.parametrize("case", [case for case in DISTRIBUTIONS if case.name in WHOLE], ids=str)
def test_bounds_are_the_same_without_jit(case):
    """They agree at one key: a constant in a jitted program is a number here."""
    owed, params = OWED[kind(case)], trained(case)
    engines = [name for name, what in owed.items() if what in ("exact", "own")]
    for name in engines:
        both = jax.value_and_grad(lambda p, name=name: loss(case, p, KEY, name))
        eager, compiled = both(params), jax.jit(both)(params)
        chex.assert_trees_all_close(eager, compiled, rtol=2e-4, atol=2e-5)
        assert any(np.any(x) for x in jax.tree.leaves(eager[1])), name


REFUSED = [
    pytest.param(case, engine, words, id=f"{case}-{engine}")
    for case in DISTRIBUTIONS
    for engine, words in OWED[kind(case)].items()
    if words not in ("exact", "own")
]


@pytest.mark.parametrize(("case", "engine", "words"), REFUSED)
def test_refusals_of_the_bounds(case, engine, words):
    """The error comes while the program is traced and outside jit, and names the class or its density."""
    params = {name: jnp.asarray(x) for name, x in case.floats.items()}
    gradient = jax.grad(lambda p: loss(case, p, KEY, engine))
    for run in (functools.partial(jax.eval_shape, gradient), gradient):
        with pytest.raises((ValueError, NotImplementedError), match=words):
            run(params)


# --- MCMC and enumeration ---------------------------------------------------------------------


@rows("continuous")
def test_posterior_by_nuts(case):
    """The mean of f(z) over the posterior agrees with quadrature."""
    prior = {name: jnp.asarray(x)[:1] if np.ndim(x) else x for name, x in case.floats.items()}

    def model():
        z = numpyro.sample("z", case.build(**prior))
        numpyro.sample("y", dist.Normal(readout(case, z), 1), obs=jnp.full(1, jnp.float32(FAR)))

    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(KEY)
    drawn = np.asarray(readout(case, mcmc.get_samples()["z"]))[:, 0]

    mean, sd = in_float64(lambda params: posterior_moments(case, params), case.floats)
    error = sd / np.sqrt(effective_sample_size(drawn[None]))
    assert abs(drawn.mean() - mean) < 4.5 * error
    assert abs(readout_of_prior(case) - mean) > 4.5 * error  # the data count


def posterior_moments(case, params):
    """Mean and standard deviation of f(z) given y, for the first element."""
    params = {**case.integers, **params}
    grid = np.linspace(-40, 40, 109)
    dims = case.event[0] - (case.support == "simplex") if case.event else 1
    y = np.stack(np.meshgrid(*[grid] * dims, indexing="ij"), -1).reshape(-1, 1, dims)
    if case.support == "simplex":
        unrounded = jax.nn.log_softmax(jnp.concatenate([y, 0 * y[..., :1]], -1))
        jacobian, values = unrounded.sum(-1), jnp.exp(unrounded)
    else:
        jacobian, values = (sp.log_expit(y) + sp.log_expit(-y)).sum(-1), sp.expit(y)
        unrounded, values = (x if case.event else x[..., 0] for x in (y, values))
    law = case.density(unrounded, log_space=True, **params) + jacobian
    f = readout(case, jnp.asarray(values))
    weight = jax.nn.softmax((law + of_data(case, jnp.asarray(values), FAR))[:, 0], 0)
    f = jnp.broadcast_to(f, law.shape)[:, 0]
    mean = weight @ f
    return mean, jnp.sqrt(weight @ (f - mean) ** 2)


def readout_of_prior(case):
    return np.asarray(readout(case, case.draw(KEY, (2000, 2))), float)[:, 0].mean()


@rows("gate", "straight-through", "set", "own atom")
def test_continuous_inference_refuses_what_has_atoms(case):
    """NUTS and a continuous automatic guide would silently lose the probabilities of single values."""
    model = lambda: site(case, case.floats, "plate", Y)
    message = "single values of it have a probability"
    with pytest.raises(ValueError, match=message):
        MCMC(NUTS(model), num_warmup=1, num_samples=1, progress_bar=False).run(KEY)
    with pytest.raises(ValueError, match=message):
        handlers.seed(AutoNormal(model), KEY)()


def test_nuts_refuses_one_hot_sites():
    """NumPyro would replace their values by 0..K-1."""
    case = next(case for case in DISTRIBUTIONS if kind(case) == "discrete")

    def model():
        numpyro.sample("mu", dist.Normal(0, 1))
        site(case, case.floats, "plate", Y)

    for kernel in (NUTS(model), DiscreteHMCGibbs(HMC(model))):
        with pytest.raises(
            (RuntimeError, ValueError, AssertionError), match=r"enumerate support|owns no sites"
        ):
            MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False).run(KEY)


@rows(*(set(OWED) - {"no density", "own atom"}))
def test_enumeration_sums_bits_and_draws_the_rest(case):
    """A site marked by `config_enumerate` has values 0, 1, ..., and the sum over them is the evidence."""
    prior = moved(case.floats)
    model = lambda: site(case, prior, "plate", Y)
    marked = handlers.trace(handlers.seed(config_enumerate(model), KEY)).get_trace()["z"]
    bits = issubclass(case.distribution, rd.StraightThroughBernoulli)
    assert (marked["infer"].get("enumerate") == "parallel") == bits
    assert case.build().expand((3, 2)).has_enumerate_support == bits
    if bits:
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(KEY, {}, config_enumerate(model), lambda: None)
        masses = np.asarray(case.build(**prior).log_prob(jnp.array([[0.0], [1.0]])), float)
        evidence = sp.logsumexp(masses + np.asarray(of_data(case, jnp.array([[0.0], [1.0]]))), 0)
        np.testing.assert_allclose(loss, -evidence.sum(), rtol=1e-5)


@rows(*(set(OWED) - {"no density"}))
def test_predictive_draws_the_law(case):
    """Draws come from the model, and from the guide with the trained parameters."""
    params = {name: jnp.asarray(x) for name, x in case.floats.items()}
    model = lambda: site(case, moved(params), "plate", Y)
    guide = lambda: site(case, params)
    draws = [
        Predictive(model, num_samples=4000)(KEY)["z"],
        Predictive(guide, params={}, num_samples=4000)(KEY)["z"],
    ]
    for z, own in zip(draws, (moved(params), params), strict=True):
        f = np.asarray(readout(case, z.reshape(4000, 2, *case.event)), float)
        expected = np.asarray(readout(case, case.draw(jax.random.fold_in(KEY, 1), (20_000, 2), **own)), float)
        error = np.hypot(f.std(0) / np.sqrt(4000), expected.std(0) / np.sqrt(20_000))
        assert (np.abs(f.mean(0) - expected.mean(0)) < 4.5 * error + 1e-6).all()
