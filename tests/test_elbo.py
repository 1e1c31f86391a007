"""`RLOO_ELBO`: its mean is the enumerated gradient, its variance below that without a baseline."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.util import compute_log_probs

import posteriors
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import relax, take

KEY = jax.random.key(20261122)
pytestmark = pytest.mark.usefixtures("fast_compilation")


# --- models, small enough to enumerate --------------------------------------------------------
# model(p) and guide(p), with all parameters in p. `whole` leaves subsampling out, `plain` (of the guide)
# also scale and mask: what is drawn does not know of them.


@dataclasses.dataclass(frozen=True)
class Case:
    model: Callable
    guide: Callable
    params: dict
    discrete: dict  # all values of every discrete site, on the first axis
    continuous: tuple = ()  # the names of the normal sites of the guide, all scalar
    step: float = 1.0  # the size of a cell, if the values of `discrete` are a grid


def all_values(values, *shape):
    """Every array of this shape of these values."""
    size = int(np.prod(shape))
    return np.array(list(itertools.product(values, repeat=size))).reshape(-1, *shape)


def bound(case, p, values, noise):
    """The density of these values under the guide, and log p - log q there."""

    def given(msg):
        if msg["name"] in values:
            return values[msg["name"]]
        if msg["name"] in noise:
            return msg["fn"].loc + msg["fn"].scale * noise[msg["name"]]
        return None

    fixed = lambda f: handlers.seed(handlers.substitute(f, substitute_fn=given), 0)
    total = lambda f, *args, **kwargs: compute_log_probs(f, args, kwargs, {})
    log_q, trace = total(fixed(case.guide), p, whole=True)
    log_p, _ = total(handlers.seed(handlers.replay(case.model, trace), 0), p, whole=True)
    weight, _ = total(fixed(case.guide), p, whole=True, plain=True)
    weight = sum(weight[name] for name in values)
    return jnp.exp(weight) * (sum(log_p.values()) - sum(log_q.values()))


def exact_loss(case, p):
    """- E_q[log p - log q]: a sum over the discrete values, a quadrature over the continuous ones."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(14)
    axes = [*case.discrete.values(), *(nodes for _ in case.continuous)]
    grid = np.meshgrid(*(np.arange(len(axis)) for axis in axes), indexing="ij")
    points = [jnp.asarray(axis)[i.ravel()] for axis, i in zip(axes, grid, strict=True)]
    values, noise = dict(zip(case.discrete, points, strict=False)), points[len(case.discrete) :]
    weight = np.prod(
        [(weights / weights.sum())[i.ravel()] for i in grid[len(case.discrete) :]], 0, initial=1.0
    )
    each = jax.vmap(lambda v, n: bound(case, p, v, n))(values, dict(zip(case.continuous, noise, strict=True)))
    return -case.step * jnp.sum(weight * each)


def bits_model(p, whole=False):
    z = numpyro.sample("z", dist.Bernoulli(np.array([0.3, 0.6, 0.5], np.float32)).to_event(1))
    numpyro.sample("y", dist.Normal(p["w"] @ z + 2 * z[0] * z[2], 1).to_event(1), obs=np.array([0.7, 1.2]))


def bits_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Bernoulli(logits=p["z"]).to_event(1))


BITS = Case(
    bits_model,
    bits_guide,
    {"z": jnp.array([0.5, -1.0, 0.2]), "w": jnp.array([[1.0, -1.5, 2.0], [0.5, 2.0, -1.0]])},
    {"z": all_values([0, 1], 3)},
)


def loose_model(p, whole=False):
    """Bits in a batch axis that no plate declares: a cost of one of them is one of all."""
    z = numpyro.sample("z", dist.Bernoulli(np.array([0.3, 0.6, 0.5], np.float32)))
    numpyro.sample("y", dist.Normal(z + p["w"] * z[::-1], 1), obs=np.array([0.7, 1.2, -2.0], np.float32))


def loose_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Bernoulli(logits=p["z"]))


LOOSE = Case(
    loose_model,
    loose_guide,
    {"z": jnp.array([0.5, -1.0, 0.2]), "w": jnp.array(1.5)},
    {"z": all_values([0, 1], 3)},
)

LOC = np.array([-1.0, 0.5, 2.0], np.float32)
POINTS = np.array([-0.6, 1.9], np.float32)


def classes_model(p, whole=False):
    """A continuous site above the classes, another one below."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.plate("points", 2):
        z = numpyro.sample("z", dist.Categorical(logits=jnp.array([0.3, 0.0, -0.5]) * x))
        numpyro.sample("y", dist.Normal(p["loc"][z] + x, 1), obs=POINTS)
    w = numpyro.sample("w", dist.Normal(z.sum(), 2))
    numpyro.sample("v", dist.Normal(w * x, 1), obs=0.5)


def classes_guide(p, whole=False, plain=False):
    x = numpyro.sample("x", dist.Normal(p["x"][0], jnp.exp(p["x"][1])))
    with numpyro.plate("points", 2):
        z = numpyro.sample("z", dist.Categorical(logits=p["z"] + x * LOC))
    numpyro.sample("w", dist.Normal(p["slope"] * jnp.sum(z) + x, 0.7))


CLASSES = Case(
    classes_model,
    classes_guide,
    {
        "x": jnp.array([0.4, -0.7]),
        "z": jnp.array([[0.1, -0.4, 0.7], [0.6, 0.2, -0.3]]),
        "slope": jnp.array(0.6),
        "loc": jnp.array(LOC),
    },
    {"z": all_values(range(3), 2)},
    ("x", "w"),
)

ROWS = np.array([[0.3, 1.2], [-0.5, 2.0], [1.5, 0.1], [0.8, -1.0]], np.float32)
KEPT = np.array([[True, True], [True, False], [False, True], [True, True]])


def subsampled_model(p, whole=False):
    """A masked bit still reaches y, which is not masked."""
    b = numpyro.sample("b", dist.Bernoulli(0.4))
    rows = numpyro.plate("rows", 4, subsample_size=None if whole else 3, dim=-2)
    with rows as i, handlers.scale(scale=0.4):
        r = numpyro.sample("r", dist.Bernoulli(0.3 + 0.3 * b))
        with numpyro.plate("columns", 2, dim=-1):
            with handlers.mask(mask=jnp.asarray(KEPT)[i]):
                z = numpyro.sample("z", dist.Bernoulli(jnp.where(r == 1, 0.8, 0.3)))
            numpyro.sample("y", dist.Normal(p["w"] * z - r + b, 1), obs=jnp.asarray(ROWS)[i])


def subsampled_guide(p, whole=False, plain=False):
    numpyro.sample("b", dist.Bernoulli(logits=p["b"]))
    rows = numpyro.plate("rows", 4, subsample_size=None if whole else 3, dim=-2)
    with rows as i, handlers.scale(scale=1.0 if plain else 0.4):
        r = numpyro.sample("r", dist.Bernoulli(logits=p["r"][i]))
        with numpyro.plate("columns", 2, dim=-1), handlers.mask(mask=plain | jnp.asarray(KEPT)[i]):
            numpyro.sample("z", dist.Bernoulli(logits=p["z"][i] + 0.8 * r))


SUBSAMPLED = Case(
    subsampled_model,
    subsampled_guide,
    {
        "b": jnp.array(0.3),
        "r": jnp.linspace(-1, 1, 4)[:, None],
        "z": jnp.linspace(-0.9, 0.6, 8).reshape(4, 2),
        "w": jnp.array(1.3),
    },
    {"b": np.arange(2), "r": all_values([0, 1], 4, 1), "z": all_values([0, 1], 4, 2)},
)


def leaving_model(p, whole=False):
    """In the guide every z reaches g, and with it the cost of every other point of the plate."""
    g = numpyro.sample("g", dist.Bernoulli(0.4))
    with numpyro.plate("points", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(p["w"] * g + z, 0.7), obs=np.array([0.9, 1.6, 2.2], np.float32))


def leaving_guide(p, whole=False, plain=False):
    with numpyro.plate("points", 3):
        z = numpyro.sample("z", dist.Bernoulli(logits=p["z"]))
    hint = numpyro.sample("hint", dist.Poisson(2.0), infer={"is_auxiliary": True}, obs=jnp.array(2))
    numpyro.factor("more", p["w"] * 0.3 * hint)
    numpyro.sample("g", dist.Bernoulli(logits=p["g"] + 1.5 * z.sum()))


LEAVING = Case(
    leaving_model,
    leaving_guide,
    {"z": jnp.array([0.3, -0.5, 0.8]), "g": jnp.array(-2.0), "w": jnp.array(1.3)},
    {"z": all_values([0, 1], 3), "g": np.arange(2)},
)

CHAIN = np.array([0.4, 1.7, -0.3], np.float32)


def chain_model(p, whole=False):
    def step(before, y):
        with numpyro.plate("copies", 2):
            z = numpyro.sample("z", dist.Bernoulli(jnp.where(before == 1, 0.8, 0.3)))
            numpyro.sample("y", dist.Normal(p["w"] * z + before, 1), obs=y * jnp.array([1, -0.5]))
        return z, None

    scan(step, jnp.array([0, 1]), CHAIN)


def chain_guide(p, whole=False, plain=False):
    def step(before, logits):
        with numpyro.plate("copies", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=logits + p["slope"] * before))
        return z, None

    scan(step, jnp.array([0, 1]), p["z"])


SCAN = Case(
    chain_model,
    chain_guide,
    {"z": jnp.linspace(-1, 0.8, 6).reshape(3, 2), "slope": jnp.array(0.9), "w": jnp.array(1.4)},
    {"z": all_values([0, 1], 3, 2)},
)


def poisson_model(p, whole=False):
    z = numpyro.sample("z", dist.Poisson(p["prior"]))
    numpyro.sample("y", dist.Normal(z, 2), obs=6.5)


def poisson_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Poisson(p["rate"]))


POISSON = Case(
    poisson_model,
    poisson_guide,
    {"rate": jnp.array(5.0), "prior": jnp.array(4.0)},
    {"z": np.arange(40)},
)


def walk_model(p, whole=False):
    def step(before, y):
        x = numpyro.sample("x", dist.VonMises(0.8 * before, 1.5))
        numpyro.sample("y", dist.Normal(p["w"] * jnp.sin(x), 0.7), obs=y)
        return x, None

    scan(step, 0.5, CHAIN[:2])


def walk_guide(p, whole=False, plain=False):
    """Angles: they have no pathwise gradient in NumPyro, though their draws have a derivative."""

    def step(before, loc):
        x = numpyro.sample("x", dist.VonMises(loc + 0.5 * before, 2.0))
        return x, None

    scan(step, 0.5, p["loc"])


WALK = Case(
    walk_model,
    walk_guide,
    {"loc": jnp.array([-0.5, 0.8]), "w": jnp.array(1.2)},
    {"x": all_values(np.linspace(-np.pi, np.pi, 80, endpoint=False, dtype=np.float32), 2)},
    step=(2 * np.pi / 80) ** 2,
)

CASES = {
    "bits": BITS,
    "loose": LOOSE,
    "classes": CLASSES,
    "subsampled": SUBSAMPLED,
    "leaving": LEAVING,
    "scan": SCAN,
    "poisson": POISSON,
    "walk": WALK,
}


@functools.cache
def estimates(name, elbo=RLOO_ELBO, particles=3, draws=4000):
    """Losses and gradients, flat, of many keys."""
    case = CASES[name]
    model, guide = (lambda p, f=f: f(p) for f in (case.model, case.guide))
    loss = lambda p, key: elbo(particles).loss(key, {}, model, guide, p)
    both = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))
    losses, gradients = both(case.params, jax.random.split(KEY, draws))
    return np.asarray(losses, np.float64), flat(gradients, draws)


def flat(tree, rows=1):
    return np.concatenate([np.asarray(x, np.float64).reshape(rows, -1) for x in jax.tree.leaves(tree)], -1)


def z_scores(draws, mean):
    return np.abs(draws.mean(0) - mean) / (draws.std(0) / np.sqrt(len(draws)) + 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_the_exact_loss_and_gradient(name):
    case = CASES[name]
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: exact_loss(case, p)))(case.params)
    losses, gradients = estimates(name)
    assert z_scores(losses, loss) < 4.5
    assert z_scores(gradients, flat(gradient)[0]).max() < 4.5
    # so that a wrong factor would show
    assert z_scores(gradients, 0.8 * flat(gradient)[0]).max() > 6


# --- variance ---------------------------------------------------------------------------------


def spread(gradients):
    """The variance, summed over the parameters, and the standard error of it."""
    each = ((gradients - gradients.mean(0)) ** 2).sum(-1)
    return each.mean(), each.std() / np.sqrt(len(each))


def gradients_of(elbo, model, guide, params, draws=400):
    loss = lambda p, key: elbo.loss(key, p, model, guide)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, jax.random.split(KEY, draws))
    return flat(gradients, draws)


# TraceGraph_ELBO's variance over RLOO_ELBO's with 10 particles, at the prior and after 300 steps of Adam:
# bit 35, 5e14 (exact posterior); coupled bits 7.5, 12; classes 2.7, 62; poisson 5.8, 500;
# binomial 4.3, 380; mixture 2.7, 2.3; spike and slab 6.7, 9.1; chain 27, 11
@pytest.mark.parametrize("name", ["coupled bits", "classes", "poisson", "spike and slab", "chain"])
@pytest.mark.filterwarnings("ignore:Missing a plate statement")
def test_less_variance_than_without_a_baseline(name):
    problem = posteriors.PROBLEMS[name]
    guide = problem.guide()
    optimizer = numpyro.optim.Adam(0.05)
    svi = SVI(problem.model, guide, optimizer, RLOO_ELBO())
    params = svi.get_params(svi.init(KEY))
    (ours, our_error), (theirs, their_error) = (
        spread(gradients_of(elbo(num_particles=10), problem.model, guide, params))
        for elbo in (RLOO_ELBO, TraceGraph_ELBO)
    )
    assert (theirs - 1.5 * ours) / np.hypot(1.5 * our_error, their_error) > 4.5


def test_an_element_of_a_plate_pays_for_itself():
    """More elements, and noise that is not downstream, leave the variance of its gradient as it is."""

    def model(n, noise):
        u = numpyro.sample("u", dist.Normal(0, 1))
        numpyro.sample("v", dist.Normal(u, noise), obs=0.0)
        with numpyro.plate("points", n):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2 * z, 0.5), obs=1.3)

    def guide(n):
        numpyro.sample("u", dist.Normal(0, 1))
        with numpyro.plate("points", n):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(n))))

    def first(n, noise):
        params = {"logits": jnp.full(n, 0.4)}
        return gradients_of(RLOO_ELBO(4), lambda: model(n, noise), lambda: guide(n), params, 4000)[:, :1]

    (alone, alone_error), (among, among_error) = map(spread, (first(1, 1.0), first(20, 0.05)))
    assert abs(alone - among) / np.hypot(alone_error, among_error) < 4.5


def test_no_variance_at_the_posterior_of_a_minibatch():
    """All particles see the same data: where the guide is exact, all have the same cost."""
    y = jnp.linspace(-2, 3, 12)

    def model():
        with numpyro.plate("points", 12, subsample_size=4) as i:
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
            numpyro.sample("y", dist.Normal(take(LOC, z), 1), obs=y[i])

    def guide():
        with numpyro.plate("points", 12, subsample_size=4) as i:
            numpyro.sample("z", dist.Categorical(logits=numpyro.param("logits", jnp.zeros((12, 3)))[i]))

    posterior = jnp.log(jnp.array([0.2, 0.3, 0.5])) - (y[:, None] - LOC) ** 2 / 2
    for offset, size in ((0, 1e-4), (jnp.array([0.5, 0, 0]), 1.0)):
        gradients = gradients_of(RLOO_ELBO(3), model, guide, {"logits": posterior + offset})
        assert (np.abs(gradients).max() < 1e-4) == (size == 1e-4)


# --- beside NumPyro's -------------------------------------------------------------------------


def continuous(f):
    def model_or_guide(p, scale=1.0):
        x = numpyro.sample("x", dist.Normal(*p["x"]))
        with numpyro.plate("points", 3), handlers.scale(scale=0.5):
            numpyro.sample("u", dist.Normal(x, scale).mask(jnp.array([True, False, True])))
            return f(p, x)

    return model_or_guide


@continuous
def pathwise_model(p, x):
    z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    numpyro.sample("y", dist.Normal(take(LOC, z) + x, 1), obs=0.4)


@continuous
def pathwise_guide(p, x):
    numpyro.sample("z", dist.Categorical(logits=p["z"]))


@pytest.mark.parametrize("vectorize", [True, False])
def test_pathwise_sites_are_those_of_trace_elbo(vectorize):
    """Also the discrete ones that are relaxed: the same draws, the same loss, the same gradient."""
    p = {"x": jnp.array([0.3, 0.7]), "z": jnp.array([[0.1, -0.4, 0.7]] * 3)}
    soft_model, soft_guide = (relax(f, tau=0.5) for f in (pathwise_model, pathwise_guide))
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda p, elbo=elbo: elbo.loss(KEY, {}, soft_model, soft_guide, p)))(p)
        for elbo in (RLOO_ELBO(3, vectorize), Trace_ELBO(3))
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(flat(ours[1]), flat(theirs[1]), rtol=1e-4, atol=1e-5)
    assert np.abs(flat(theirs[1])).min() > 1e-3


def test_how_particles_are_vectorized_does_not_matter():
    loss = lambda how: jax.jit(lambda p: RLOO_ELBO(3, how).loss(KEY, {}, BITS.model, BITS.guide, p))(
        BITS.params
    )
    stacked = lambda f, keys: jax.tree.map(lambda *x: jnp.stack(x), *map(f, keys))
    np.testing.assert_allclose([loss(False), loss(stacked)], loss(True), rtol=1e-5)


def test_a_logit_of_zero():
    """NumPyro's score of a Bernoulli is off by 1/2 there; a baseline does not see a constant."""
    gradient = jax.jit(
        lambda z: jax.grad(
            lambda p: RLOO_ELBO(5).loss(KEY, {}, BITS.model, BITS.guide, BITS.params | {"z": p})
        )(z)
    )
    np.testing.assert_allclose(gradient(jnp.zeros(3)), gradient(jnp.full(3, 1e-6)), rtol=1e-4)


def test_training_a_mixture():
    x = posteriors.mixture_data(posteriors.CENTRES, 60)
    problem = posteriors.Problem(
        lambda: posteriors.mixture(x),
        lambda: posteriors.mixture_answer(x, posteriors.CENTRES),
        {"loc": posteriors.CENTRES},
        particles=10,
    )
    found = posteriors.train(problem, tau=None, steps=1000, loss=RLOO_ELBO)
    assert posteriors.error(found, problem.answer()) < 0.06


def test_mutable_state_survives_updates():
    """A count of the evaluations, and a running mean that the model uses, in the compiled update."""

    def model():
        mean = numpyro.primitives.mutable("mean", {"value": jnp.array(0.0), "count": jnp.array(0)})
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(z + mean["value"], 1), obs=0.7)
        mean["value"] = 0.5 * mean["value"] + 1
        mean["count"] = mean["count"] + 1

    guide = lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.1)))
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), RLOO_ELBO(4))
    state, update = svi.init(KEY), jax.jit(svi.update)
    before = state.mutable_state["mean"]
    for _ in range(3):
        state, loss = update(state)
    after = state.mutable_state["mean"]
    assert after["count"] == before["count"] + 3 and jnp.isfinite(loss)
    np.testing.assert_allclose(after["value"], 2 + (before["value"] - 2) / 8, rtol=1e-6)
    assert svi.get_params(state)["logits"] != 0.1


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 0, 2.0, True, "2", None])
def test_a_baseline_needs_another_particle(number):
    with pytest.raises(ValueError, match="num_particles must be an integer in"):
        RLOO_ELBO(number)


def test_vectorize_particles_is_checked():
    with pytest.raises(ValueError, match="vectorize_particles"):
        RLOO_ELBO(2, "vmap")


def bit(**infer):
    return numpyro.sample("z", dist.Bernoulli(0.3), infer=infer)


def in_subsampled_scan():
    def step(carry, _):
        with numpyro.plate("points", 6, subsample_size=2):
            bit()
        return carry, None

    scan(step, 0.0, None, length=3)


REFUSED = {
    "enumerated in the guide": (bit, lambda: bit(enumerate="parallel"), "'z' is enumerated"),
    "marginalised": (lambda: bit(enumerate="parallel"), lambda: None, "'z' is enumerated"),
    "cond": (bit, lambda: cond(True, lambda _: bit(), lambda _: bit(), None), "'z' is inside of a cond"),
    "cond in the model": (lambda: cond(True, lambda _: bit(), lambda _: bit(), None), bit, "of a cond"),
    "scan": (in_subsampled_scan, in_subsampled_scan, "'z' is in a subsampled plate inside of a scan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    model, guide, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        RLOO_ELBO().loss(KEY, {}, model, guide)
