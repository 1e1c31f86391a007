"""Where guides start: at the conditional law of each element, at the user's values, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special as sp
import scipy.stats as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.initialization import init_to_value

import guides
from relaxit_jax import distributions as rd
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, AutoStructured, relax, take
from relaxit_jax.handlers import _start as start

KEY = jax.random.key(20261130)
pytestmark = pytest.mark.usefixtures("fast_compilation")
POINTS = np.concatenate([st.norm(c, 0.7).rvs(12, random_state=i) for i, c in enumerate([-4, 0, 3.5])])
POINTS = POINTS.astype(np.float32)


def mixture(vector=False):
    shares = numpyro.sample("shares", dist.Dirichlet(np.ones(3, np.float32)))
    with numpyro.plate("parts", 3):
        loc = numpyro.sample("loc", dist.Normal(0, 3))
    with numpyro.plate("points", len(POINTS)):
        law = rd.OneHotCategorical(probs=shares) if vector else dist.Categorical(shares)
        z = numpyro.sample("z", law)
        numpyro.sample("x", dist.Normal(z @ loc if vector else take(loc, z), 0.7), obs=POINTS)


def started(model, *args, cls=AutoMeanField, **options):
    """A guide and its parameters at the start."""
    guide = cls(model, **options)
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), RLOO_ELBO())
    return guide, svi.get_params(svi.init(KEY, *args))


@pytest.mark.whole
@pytest.mark.parametrize("vector", [False, True])
def test_a_mixture_starts_at_its_exact_posterior(vector):
    """The responsibilities at the values of the continuous sites, which have found the three clusters."""
    guide, params = started(lambda: mixture(vector), init="data")
    loc = np.asarray(guide.median(params)["loc"], np.float64)
    np.testing.assert_allclose(np.sort(loc), POINTS.reshape(3, 12).mean(-1), atol=0.2)
    shares = guide.median(params)["shares"]
    exact = sp.softmax(np.log(shares) + st.norm(loc, 0.7).logpdf(POINTS[:, None]), -1)
    np.testing.assert_allclose(guide.probs(params)["z"], exact, atol=0.003)


def test_starts_are_ranked_by_their_bound():
    """The expected log-joint and the entropy, in the unconstrained space of a positive site."""

    def model():
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = numpyro.sample("z", dist.Categorical(np.array([0.2, 0.5, 0.3], np.float32)))
        numpyro.sample("y", dist.Normal(z, scale), obs=1.2)

    guide = AutoMeanField(model, init_logits={"z": np.array([0.0, 0.4, -0.3])})
    handlers.seed(guide, 0)()
    point = {"scale": jnp.array(0.8)}
    ascent = start._Ascent(model, (), {}, guide._sites.values(), point)
    logits = {"z": jnp.array([0.0, 0.4, -0.3])}
    bounds = jax.lax.map(
        lambda key: ascent.bound(key, logits, ascent.unconstrain(point)), jax.random.split(KEY, 400)
    )
    q = sp.softmax([0.0, 0.4, -0.3])
    log_joint = np.log([0.2, 0.5, 0.3]) + st.norm(np.arange(3), 0.8).logpdf(1.2) + st.norm.logpdf(np.log(0.8))
    exact = q @ (log_joint - np.log(q))
    assert abs(bounds.mean() - exact) < 4.5 * bounds.std() / 20 < 0.05


def coupled():
    """Two bits of a plate whose sum is seen, an impossible class, and a count in an event axis."""
    with numpyro.plate("bits", 2):
        b = numpyro.sample("b", dist.Bernoulli(np.array([0.5, 0.01], np.float32)))
    kind = numpyro.sample("kind", dist.Categorical(np.array([0.5, 0.0, 0.5], np.float32)))
    n = numpyro.sample("n", dist.Binomial(3, 0.5).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.sum(b) + take(np.array([0.0, 5, 4]), kind), 0.4), obs=5.0)
    numpyro.sample("x", dist.Normal(n, 0.3).to_event(1), obs=np.array([0.0, 3.0]))


def test_coupled_elements_are_visited_one_after_another():
    guide, params = started(coupled, init="data")
    found = guide.probs(params)
    np.testing.assert_allclose(found["b"], [1, 0], atol=0.1)
    np.testing.assert_allclose(found["kind"], [0, 0, 1], atol=0.01)
    assert found["kind"][1] == 0
    log_pmf = st.binom(3, 0.5).logpmf(range(4)) + st.norm(np.arange(4), 0.3).logpdf(np.array([[0.0], [3.0]]))
    np.testing.assert_allclose(found["n"], sp.softmax(log_pmf, -1), atol=0.004)


@pytest.mark.whole
def test_what_the_data_rule_out_is_not_drawn():
    def model():
        with numpyro.plate("sites", 2):
            n = numpyro.sample("n", dist.Poisson(4.0))
            numpyro.sample("y", dist.Binomial(n, 0.5), obs=jnp.array([2, 6]))

    guide, params = started(model, init="data")
    found = np.asarray(guide.probs(params)["n"])
    assert found[0, :2].max() < 1e-9 and found[1, :6].max() < 1e-9
    k = np.arange(found.shape[-1])
    with np.errstate(divide="ignore"):
        exact = st.poisson(4).logpmf(k) + st.binom(k, 0.5).logpmf(np.array([[2], [6]]))
    np.testing.assert_allclose(found, sp.softmax(exact, -1), atol=0.004)


def test_given_logits_are_where_it_starts():
    """An array, or a function of the model's arguments, has one number per bit, else one per value."""

    def model(y):
        b = numpyro.sample("b", dist.Bernoulli(0.5).expand([2]).to_event(1))
        z = numpyro.sample("z", dist.Categorical(np.full(3, 1 / 3, np.float32)))
        numpyro.sample("y", dist.Normal(jnp.sum(b) + z, 1), obs=y)

    given = {"b": np.array([1.0, -2.0]), "z": lambda y: y * np.arange(3.0)}
    _, params = started(model, 0.5, init_logits=given)
    np.testing.assert_array_equal(params["b_auto_logits"], [1, -2])
    np.testing.assert_array_equal(params["z_auto_logits"], [0, 0.5, 1])


@pytest.mark.whole
def test_the_ascent_goes_on_from_given_logits():
    """The labels are therefore the user's."""
    truth = np.repeat([2, 0, 1], 12)
    guide, params = started(mixture, init="data", init_logits={"z": 3.0 * np.eye(3)[truth]})
    np.testing.assert_array_equal(np.argmax(guide.probs(params)["z"], -1), truth)
    np.testing.assert_allclose(
        guide.median(params)["loc"], POINTS.reshape(3, 12).mean(-1)[[1, 2, 0]], atol=0.2
    )


@pytest.mark.whole
def test_a_given_place_of_continuous_sites_is_kept():
    where = init_to_value(values={"loc": jnp.array([3.0, -3.0, 0.0])})
    guide, params = started(mixture, init="data", init_loc_fn=where)
    np.testing.assert_allclose(params["loc_auto_loc"], [3, -3, 0], atol=1e-6)
    shares = guide.median(params)["shares"]
    exact = sp.softmax(np.log(shares) + st.norm([3.0, -3.0, 0.0], 0.7).logpdf(POINTS[:, None]), -1)
    np.testing.assert_allclose(guide.probs(params)["z"], exact, atol=0.003)


def subsampled():
    with numpyro.plate("points", 6, subsample_size=3) as i:
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(4 * z, 1), obs=jnp.array([0.0, 4, 0, 4, 0, 4])[i])


@pytest.mark.whole
def test_a_first_call_inside_of_jit():
    """No values are known there: all start at zero, also the site given its bit, and nothing leaks."""

    def model():
        with numpyro.plate("points", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            x = numpyro.sample("x", dist.HalfNormal(1.0))
            numpyro.sample("y", dist.Normal(z * x, 1), obs=jnp.ones(3))

    guide = AutoStructured(model)
    drawn = jax.jit(lambda key: handlers.seed(guide, key)())(KEY)
    assert (drawn["x"] > 0).all()
    params = handlers.trace(handlers.seed(guide, KEY)).get_trace()
    for name in ("z_auto_logits", "x_auto_loc"):
        np.testing.assert_array_equal(params[name]["value"], 0)


@pytest.mark.whole
def test_a_reversed_scan_has_no_guide():
    """Refused when the guide is made, before any ascent on values in the wrong order."""

    def model():
        step = lambda before, _: (numpyro.sample("z", dist.Bernoulli(0.3 + 0.4 * before)), None)
        scan(step, 0, None, length=3, reverse=True)

    for cls in (AutoMeanField, AutoStructured):
        with pytest.raises(ValueError, match="'z' is in a scan of the model with reverse=True"):
            handlers.seed(cls(model), 0)()


@pytest.mark.whole
def test_a_part_of_the_rows_is_refused():
    with pytest.raises(ValueError, match="the plate 'points' shows 3 of 6"):
        started(subsampled, init="data")


def test_refusals():
    with pytest.raises(ValueError, match="init must be 'prior' or 'data', got 'datum'"):
        AutoMeanField(mixture, init="datum")
    with pytest.raises(ValueError, match="init_logits must be a dictionary from names of sites"):
        AutoMeanField(mixture, init_logits=np.zeros(3))
    with pytest.raises(ValueError, match="init_logits must be names of the sites"):
        started(mixture, init_logits={"w": np.zeros(3)})
    with pytest.raises(ValueError, match=r"init_logits\['z'\] must be of shape \(36, 3\), got shape \(3,\)"):
        started(mixture, init_logits={"z": np.zeros(3)})
    for wrong in (np.nan, np.inf, -np.inf):  # minus infinity for every value of an element
        with pytest.raises(ValueError, match=r"init_logits\['z'\] must be finite, or -inf for some values"):
            started(mixture, init_logits={"z": np.full((36, 3), wrong)})
    with pytest.raises(ValueError, match=r"init_logits\['z'\] must be finite, got \[-inf\]"):
        started(lambda: numpyro.sample("z", dist.Bernoulli(0.3)), init_logits={"z": -np.inf})
    with pytest.raises(ValueError, match=r"outside jax\.jit"):
        jax.jit(lambda key: handlers.seed(AutoMeanField(mixture, init="data"), key)()["loc"])(KEY)


@pytest.mark.whole
def test_a_structured_guide_starts_at_the_prior_where_it_cannot_read_the_data():
    _, params = started(subsampled, cls=AutoStructured)
    np.testing.assert_array_equal(params["z_auto_logits"], np.zeros(6))
    _, params = started(coupled, cls=AutoStructured)
    assert params["b_auto_logits"][0, 1] - params["b_auto_logits"][0, 0] > 1


@pytest.mark.whole
def test_positive_sites_under_relax():
    """The guide of a positive site is a transformed distribution, which hands on nothing of this library."""

    def model():
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(z, scale), obs=0.9)

    for cls in (AutoMeanField, AutoStructured):
        guide = cls(model)
        svi = SVI(relax(model, tau=0.5), relax(guide, tau=0.5), numpyro.optim.Adam(0.05), Trace_ELBO())
        losses = svi.run(KEY, 20, progress_bar=False).losses
        assert jnp.isfinite(losses).all()


@pytest.mark.whole
def test_latent_classes_of_digits_start_near_the_best_coordinate_ascent():
    """From random points, the ELBO at the start is within 50 nats of the best of twenty long runs."""
    guide, params = started(guides.latent_classes, init="data")
    q = np.asarray(guide.probs(params)["z"], np.float64)
    q = np.where(q < 0.01, 0, q)  # without what every value keeps
    q /= q.sum(-1, keepdims=True)
    assert guides.bound_of_latent_classes(q) < guides.latent_classes_answer() + 50
