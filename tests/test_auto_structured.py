"""`AutoStructured`: laws that sum to one and match the draws, exact posteriors, and refusals of relax."""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.special as sp
import scipy.stats as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.util import log_density

import guides
from elbo_cases import all_values
from helpers import P_VALUE
from relaxit_jax import distributions as rd
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoStructured, marginals, relax, take

KEY = jax.random.key(20261130)
pytestmark = pytest.mark.usefixtures("fast_compilation")
MOVES = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]], np.float32))


def chain():
    """Three states and a bit in each of two copies, after a first state."""

    def step(before, y):
        with numpyro.plate("copies", 2):
            z = numpyro.sample("z", dist.Categorical(logits=take(MOVES, before)))
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(take(np.arange(3.0), z) + 2 * b, 1), obs=y)
        return z, None

    with numpyro.plate("copies", 2):
        first = numpyro.sample("first", dist.Categorical(np.full(3, 1 / 3, np.float32)))
    scan(step, first, np.array([0.3, 2.1], np.float32))


def causes():
    """Bits whose plate says that they are independent, but that meet in a sum; and a class."""
    with numpyro.plate("causes", 3):
        z = numpyro.sample("z", dist.Bernoulli(np.array([0.3, 0.6, 0.5], np.float32)))
        slope = numpyro.sample("slope", dist.Normal(0, 1))
    kind = numpyro.sample("kind", dist.Categorical(np.array([0.2, 0.5, 0.3], np.float32)))
    numpyro.sample("y", dist.Normal(jnp.sum(z * (1 + slope)) + take(np.arange(3.0), kind), 1), obs=2.3)


def rows():
    """In two rows, three classes that meet there and nowhere else, and one that a mask leaves out."""
    with numpyro.plate("rows", 2):
        law = dist.Categorical(np.array([0.2, 0.5, 0.3], np.float32)).expand([2, 3]).to_event(1)
        z = numpyro.sample("z", law)
        numpyro.sample(
            "y", dist.Normal(jnp.sum(jnp.atleast_2d(z), -1), 1), obs=np.array([1.0, 3.0], np.float32)
        )


def pairs():
    """Two bits and a class of each point: each is given the ones before it."""
    with numpyro.plate("points", 2):
        a = numpyro.sample("a", dist.Bernoulli(0.4))
        c = numpyro.sample("c", rd.OneHotCategorical(logits=jnp.zeros(3)))
        n = numpyro.sample("n", dist.Binomial(2, 0.5))
        x = numpyro.sample("x", dist.HalfNormal(1.0))
        mean = a + c @ jnp.arange(3.0) + n * x
        numpyro.sample("y", dist.Normal(mean, 1), obs=np.array([0.4, 2.6], np.float32))


VALUES = {
    "chain": {
        "first": all_values(range(3), 2), "z": all_values(range(3), 2, 2), "b": all_values(range(2), 2, 2)
    },
    "causes": {"z": all_values(range(2), 3), "kind": np.arange(3)},
    "rows": {"z": all_values(range(3), 2, 3)},
    "pairs": {
        "a": all_values(range(2), 2),
        "c": np.eye(3, dtype=int)[all_values(range(3), 2)],
        "n": all_values(range(3), 2),
    },
}  # fmt: skip
MODELS = {f.__name__: f for f in (chain, causes, rows, pairs)}
TABLES = {  # shapes of the parameters: which site depends on which
    "chain": {"first": (2, 3), "z": (2, 2, 6, 3), "b": (2, 2, 18, 2)},
    "causes": {"z": (3, 2), "kind": (3,)},
    "rows": {"z": (2, 3, 3)},
    "pairs": {"a": (2,), "c": (2, 2, 3), "n": (2, 6, 3)},
}


@functools.cache
def untrained(name):
    """The guide with random parameters, so that every dependence shows."""
    guide = AutoStructured(MODELS[name])
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    shapes = {name: s["value"] for name, s in trace.items() if s["type"] == "param"}
    keys = jax.random.split(KEY, len(shapes))
    return guide, {
        n: jax.random.normal(k, jnp.shape(x)) for k, (n, x) in zip(keys, shapes.items(), strict=True)
    }


def enumerated(name):
    """Every value of the discrete sites, and the guide's probability of it."""
    guide, params = untrained(name)
    sites = VALUES[name]
    index = np.array(list(itertools.product(*(range(len(v)) for v in sites.values()))))
    points = {site: jnp.asarray(v)[i] for (site, v), i in zip(sites.items(), index.T, strict=True)}
    discrete = handlers.block(
        handlers.seed(guide, 0), hide_fn=lambda s: s["type"] == "sample" and s["name"] not in sites
    )
    log_q = jax.jit(jax.vmap(lambda v: log_density(discrete, (), {}, params | v)[0]))(points)
    return points, np.exp(np.asarray(log_q, np.float64))


@pytest.mark.few(0, "rows")
@pytest.mark.parametrize("name", MODELS)
def test_the_law_sums_to_one_and_is_that_of_the_draws(name):
    guide, params = untrained(name)
    points, q = enumerated(name)
    np.testing.assert_allclose(q.sum(), 1, rtol=2e-5)
    number = 20_000
    drawn = jax.jit(lambda key: guide.sample_posterior(key, params, sample_shape=(number,)))(KEY)
    flat = lambda x: {k: np.asarray(v).reshape(len(v), -1) for k, v in x.items() if k in points}
    rows_of = lambda x: (
        np.concatenate([x[k] for k in points], -1)
        @ (4.0 ** np.arange(sum(v.shape[-1] for v in flat(points).values())))
    )
    codes, seen = rows_of(flat(points)), rows_of(flat(drawn))
    order = np.argsort(codes)
    counts = np.bincount(np.searchsorted(codes[order], seen), minlength=len(q))
    assert counts.sum() == number
    expected = number * q[order] / q.sum()
    rare = expected < 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert st.chisquare(counts, expected).pvalue > P_VALUE


@pytest.mark.few(0, "rows")
@pytest.mark.parametrize("name", MODELS)
def test_marginals_are_those_of_the_enumerated_law(name):
    guide, params = untrained(name)
    points, q = enumerated(name)
    found = marginals(guide, params, num_samples=4000)
    for site, p in found.items():
        values = np.asarray(points[site])
        of_values = values.ndim - 1 < np.ndim(p)  # bits and one-hot vectors have the axes of their values
        exact = np.tensordot(q, np.eye(p.shape[-1])[values] if of_values else values, 1)
        np.testing.assert_allclose(p, exact, atol=4.5 * 0.5 / 4000**0.5)
        assert np.abs(np.asarray(p) - np.mean(exact)).max() > 0.03


@pytest.mark.few(0, "rows")
@pytest.mark.parametrize("name", MODELS)
def test_what_is_given_what(name):
    _, params = untrained(name)
    assert {site: params[f"{site}_auto_logits"].shape for site in TABLES[name]} == TABLES[name]
    more = {n: x.shape for n, x in params.items() if not n.endswith("_logits")}
    expected = {
        "chain": {},
        "causes": {"z_auto_weights": (3, 3, 2, 2), "slope_auto_loc": (3, 2), "slope_auto_log_scale": (3, 2)},
        "rows": {"z_auto_weights": (2, 3, 3, 3, 3)},
        "pairs": {"x_auto_loc": (2, 18), "x_auto_log_scale": (2, 18)},
    }
    assert more == expected[name]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["chain", "pairs"])
def test_every_parameter_gets_a_gradient_under_relax(name):
    guide, params = untrained(name)
    soft = [relax(f, tau=0.5) for f in (MODELS[name], guide)]
    gradient = jax.jit(jax.grad(lambda p: Trace_ELBO(20).loss(KEY, p, *soft)))(params)
    for site, g in gradient.items():
        assert jnp.isfinite(g).all(), site
        # no step comes before the first one of a chain, whose rows for a bit of one are not used
        assert (np.abs(g) > 0).mean() >= (0.7 if site in ("z_auto_logits", "b_auto_logits") else 1), site


@pytest.mark.whole
def test_relax_refuses_an_autoregressive_site():
    guide, params = untrained("causes")
    with pytest.raises(
        ValueError, match=r"Train it with RLOO_ELBO, or pass independent=\['z'\] to AutoStructured"
    ):
        Trace_ELBO().loss(KEY, params, relax(causes, tau=0.5), relax(guide, tau=0.5))
    guide = AutoStructured(causes, independent=["z", "slope"])
    soft = [relax(f, tau=0.5) for f in (causes, guide)]
    svi = SVI(*soft, numpyro.optim.Adam(0.01), Trace_ELBO())
    assert jnp.isfinite(svi.run(KEY, 2, progress_bar=False).losses).all()


@pytest.mark.whole
def test_marginals_refuse_a_relaxed_guide():
    guide, params = untrained("pairs")
    with pytest.raises(ValueError, match="guide must be one that is not relaxed"):
        marginals(relax(guide, tau=0.5), params)


def trained(model, guide, steps, particles=10, rate=0.05, seed=0):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    svi = SVI(model, guide, optimizer, RLOO_ELBO(particles))
    return svi.run(jax.random.key(seed), steps, progress_bar=False).params


@pytest.mark.whole
def test_a_hidden_chain_gets_its_exact_posterior():
    """The ELBO is the evidence, and the marginals agree with forward-backward."""
    guide = AutoStructured(guides.hidden_markov)
    params = trained(guides.hidden_markov, guide, 2500)
    answer = guides.hidden_markov_answer()
    found = guide.probs(params)
    for site, p in answer.items():
        assert np.abs(found[site] - p).max() < 0.05, site
    seen = st.norm(guides.LEVELS, 1).logpdf(guides.CHAIN[:, None])
    _, evidence = guides.forward_backward(seen, guides.MOVES.astype(float), np.full(3, 1 / 3))
    loss = jax.jit(lambda p: Trace_ELBO(1000).loss(KEY, p, guides.hidden_markov, guide))(params)
    assert -0.2 < loss + evidence < 0.5


@pytest.mark.whole
def test_a_chain_of_two_hundred_steps_trains():
    """It gets within a nat of the evidence: each step pays for itself and for the steps after it."""
    rng = np.random.default_rng(1)
    y = guides.LEVELS[guides.walk(rng, guides.MOVES, 200)] + rng.normal(size=200)

    def model():
        def step(before, y):
            z = numpyro.sample("z", dist.Categorical(logits=take(np.log(guides.MOVES), before)))
            numpyro.sample("y", dist.Normal(take(guides.LEVELS, z), 1), obs=y)
            return z, None

        scan(step, numpyro.sample("first", dist.Categorical(np.full(3, 1 / 3, np.float32))), jnp.asarray(y))

    guide = AutoStructured(model, init="prior")
    params = trained(model, guide, 3000)
    seen = np.concatenate([np.zeros((1, 3)), st.norm(guides.LEVELS, 1).logpdf(y[:, None])])
    _, evidence = guides.forward_backward(seen, guides.MOVES.astype(float), np.full(3, 1 / 3))
    loss = jax.jit(lambda p: Trace_ELBO(1000).loss(KEY, p, model, guide))(params)
    assert -0.3 < loss + evidence < 1


@pytest.mark.whole
def test_twelve_causes():
    guide = AutoStructured(guides.causes, init="data")
    found = guide.probs(trained(guides.causes, guide, 3000))
    assert np.abs(found["z"] - guides.causes_answer()["z"]).max() < 0.05


@pytest.mark.whole
def test_a_slope_knows_its_bit():
    """Where the bit is off its slope has the prior, where it is on it has the posterior."""
    x = np.array([0.5, -1.0, 2.0, 1.5], np.float32)

    def model():
        with numpyro.plate("columns", 1):
            on = numpyro.sample("on", dist.Bernoulli(0.5))
            slope = numpyro.sample("slope", dist.Normal(0, 1.5))
        numpyro.sample("y", dist.Normal(x * jnp.sum(on * slope), 1).to_event(1), obs=0.7 * x)

    guide = AutoStructured(model)
    params = trained(model, guide, 2500)
    precision = 1 / 1.5**2 + x @ x
    np.testing.assert_allclose(params["slope_auto_loc"][0], [0, 0.7 * x @ x / precision], atol=0.15)
    scale = np.exp(params["slope_auto_log_scale"][0])
    np.testing.assert_allclose(scale, [1.5, precision**-0.5], rtol=0.1)
    odds = (0.7 * x @ x) ** 2 / precision / 2 - np.log(precision * 1.5**2) / 2
    assert abs(guide.probs(params)["on"][0] - sp.expit(odds)) < 0.02


def shifted(y=None):
    loc = numpyro.sample("loc", dist.Normal(0, 3))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    with numpyro.plate("points", 3):
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        x = numpyro.sample("x", dist.Normal(0, 1))
        return numpyro.sample("y", dist.Normal(loc + 4 * b + x, spread), obs=y)


@pytest.mark.whole
def test_it_is_an_auto_guide():
    """Medians, quantiles, posterior draws, pickles and predictions; a joint guide for the other sites."""
    model = shifted
    y = jnp.array([-1.0, 3.2, 3.0])
    guide = AutoStructured(model, continuous=AutoMultivariateNormal)
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), RLOO_ELBO(10))
    params = svi.run(KEY, 1500, y, progress_bar=False).params
    np.testing.assert_array_equal(guide.median(params, y)["b"], [0, 1, 1])
    low, high = guide.quantiles(params, [0.1, 0.9], y)["loc"]
    assert low < -1 < high or abs(low + 1) < 1
    again = pickle.loads(pickle.dumps(guide))
    drawn, copied = (g.sample_posterior(KEY, params, y, sample_shape=(2, 5)) for g in (guide, again))
    jax.tree.map(np.testing.assert_array_equal, drawn, copied)
    assert set(drawn) == {"loc", "spread", "b", "x"} and drawn["x"].shape == (2, 5, 3)
    seen = Predictive(model, guide=guide, params=params, num_samples=500)(KEY)["y"]
    assert np.abs(np.asarray(seen).mean(0) - y).max() < 1


@pytest.mark.whole
def test_a_subsampled_plate_has_parameters_for_all_rows():
    y = np.where(np.arange(12) % 3 == 0, 4.0, 0.0).astype(np.float32)

    def model():
        with numpyro.plate("points", 12, subsample_size=4) as i:
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            x = numpyro.sample("x", dist.Normal(0, 0.5))
            numpyro.sample("y", dist.Normal(4 * z + x, 1), obs=jnp.asarray(y)[i])

    guide = AutoStructured(model)
    params = trained(model, guide, 1500)
    assert params["x_auto_loc"].shape == (12, 2)
    np.testing.assert_array_equal(params["z_auto_logits"] > 0, y > 2)


@pytest.mark.whole
def test_an_unknown_independent_site_is_named():
    with pytest.raises(ValueError, match="independent must be names of the sites"):
        handlers.seed(AutoStructured(causes, independent=["w"]), 0)()


def test_errors():
    for wrong in ("z", [1]):
        with pytest.raises(ValueError, match="independent must be a list of names of sites"):
            AutoStructured(causes, independent=wrong)
    with pytest.raises(ValueError, match="before reading it"):
        AutoStructured(causes).median({})
