"""`AutoMeanField`: its sites are the model's, its masks too, and it is an `AutoGuide`."""

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
import scipy.stats as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value

from relaxit_jax import distributions as rd
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, relax, take

KEY = jax.random.key(20261122)
pytestmark = pytest.mark.usefixtures("fast_compilation")
ELBOS = [Trace_ELBO(num_particles=3), TraceMeanField_ELBO(num_particles=3), TraceGraph_ELBO(num_particles=3)]


SEEN = np.array([True, True, False, True])


def everything(y=None):
    n = numpyro.sample("n", dist.Poisson(3.0))
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    one = numpyro.sample("one", rd.OneHotCategorical(logits=jnp.zeros(3)))
    trial = numpyro.sample("trial", dist.Multinomial(1, np.array([0.2, 0.8], np.float32)))
    with numpyro.plate("points", 4), handlers.mask(mask=SEEN):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        mean = n + loc * z + one @ jnp.arange(3.0) + trial[0]
        numpyro.sample("y", dist.Normal(mean, 1), obs=jnp.ones(4))


@pytest.mark.whole
def test_auto_mean_field_covers_the_model_in_its_order():
    """NumPyro's mean-field ELBO has nothing to warn of; all its parameters get gradients."""
    guide = AutoMeanField(everything)
    soft = [relax(f, tau=0.5) for f in (everything, guide)]
    trace = handlers.trace(handlers.seed(soft[1], 0)).get_trace()
    sites = [name for name, site in trace.items() if site["type"] == "sample"]
    assert sites == ["n", "loc", "one", "trial", "z"]
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    assert set(params) == {
        "n_auto_logits", "loc_auto_loc", "loc_auto_scale",
        "one_auto_logits", "trial_auto_logits", "z_auto_logits",
    }  # fmt: skip
    np.testing.assert_allclose(guide.probs(params)["n"][:9], st.poisson(3).pmf(range(9)), rtol=1e-3)
    np.testing.assert_array_equal(guide.values("n"), np.arange(params["n_auto_logits"].size))
    gradients = jax.jit(jax.grad(lambda p: ELBOS[1].loss(KEY, p, *soft)))(params)
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all() and (gradient != 0).any(), name
    np.testing.assert_array_equal(
        gradients["z_auto_logits"] != 0, SEEN
    )  # the mask of the model is the guide's
    alone = jax.jit(jax.grad(lambda p: ELBOS[0].loss(KEY, p, *soft)))(params)["z_auto_logits"]
    np.testing.assert_allclose(alone, gradients["z_auto_logits"], rtol=1e-4)
    np.testing.assert_array_equal(guide.median(params)["loc"], params["loc_auto_loc"])
    hard = handlers.trace(handlers.seed(guide, 0)).get_trace()
    assert all(jnp.issubdtype(hard[name]["value"].dtype, jnp.integer) for name in ("n", "z", "trial"))
    assert np.isfinite(Trace_ELBO().loss(KEY, params, everything, guide))


@pytest.mark.whole
@pytest.mark.parametrize("outside", [True, False])
def test_auto_mean_field_masks_inside_of_an_event_and_outside(outside):
    """The model does not see one of three bits in each of two rows: it stays unchanged, the others move."""
    seen = np.array([True, False]) if outside else np.array([True, False, True])

    def masked(law):
        return law.to_event(1).mask(seen) if outside else law.mask(seen).to_event(1)

    def model():
        with numpyro.plate("rows", 2):
            z = numpyro.sample("z", masked(dist.Bernoulli(jnp.full((2, 3), 0.3))))
            numpyro.sample("y", masked(dist.Normal(z, 1)), obs=jnp.ones((2, 3)))

    guide = AutoMeanField(model)
    handlers.trace(handlers.seed(guide, 0)).get_trace()
    params = {"z_auto_logits": jnp.zeros((2, 3))}
    moves = np.broadcast_to(seen[:, None] if outside else seen, (2, 3))
    soft = [relax(f, tau=0.5) for f in (model, guide)]
    gradient = jax.grad(lambda p: ELBOS[0].loss(KEY, p, *soft))(params)
    np.testing.assert_array_equal(gradient["z_auto_logits"] != 0, moves)


@pytest.mark.whole
def test_auto_mean_field_asks_how_many_values_a_count_has_whose_rate_is_a_draw():
    """The values of the one draw it sees may end far below the posterior; its first logits are equal."""

    def model():
        n = numpyro.sample("n", dist.Poisson(numpyro.sample("rate", dist.Gamma(2, 0.2))))
        bit = numpyro.sample("bit", dist.Bernoulli(logits=numpyro.sample("logit", dist.Normal(3, 1))))
        numpyro.sample("y", dist.Normal(n + bit, 2), obs=15.0)

    with pytest.raises(ValueError, match="num_values must be given for the site 'n', a Poisson"):
        handlers.seed(AutoMeanField(model), 0)()
    guide = AutoMeanField(model, num_values={"n": 60})
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    first = guide.probs({name: s["value"] for name, s in trace.items() if s["type"] == "param"})
    np.testing.assert_allclose(first["n"], np.full(60, 1 / 60), rtol=1e-5)
    assert first["bit"] == 0.5


def kl_of_bits(q, p):
    return q * jnp.log(q / p) + (1 - q) * jnp.log((1 - q) / (1 - p))


def rows_of_a_minibatch(mask=SEEN):
    """Bits without data: the loss is the KL of the rows in the mask, scaled up from the minibatch."""
    with numpyro.plate("rows", 4, subsample_size=2) as rows, handlers.mask(mask=jnp.asarray(mask)[rows]):
        numpyro.sample("z", dist.Bernoulli(0.3))


@pytest.mark.few(1)
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("seen", [SEEN, ~SEEN], ids=["first mask", "another"])
def test_auto_mean_field_has_the_mask_of_each_call_and_of_its_rows(seen, compiled):
    """Loss and gradient use the rows that were drawn, whatever mask the first call had."""
    guide = AutoMeanField(rows_of_a_minibatch)
    handlers.seed(guide, 0)(SEEN)
    logits = jnp.array([-2.0, 1.0, 0.5, 3.0])
    soft = [relax(f, tau=0.5) for f in (rows_of_a_minibatch, guide)]

    def loss(logits, key):
        return Trace_ELBO().loss(key, {"z_auto_logits": logits}, *soft, seen)

    both = jax.value_and_grad(loss)
    both = jax.jit(both) if compiled else both
    kls = np.where(seen, kl_of_bits(jax.nn.sigmoid(logits), 0.3), 0)
    pairs = [sum(pair) for pair in itertools.combinations(2 * kls, 2)]
    found = set()
    for key in jax.random.split(KEY, 20 if compiled else 8):
        value, gradient = both(logits, key)
        found.add(int(np.argmin(np.abs(np.asarray(pairs) - value))))
        np.testing.assert_allclose(min(np.abs(np.asarray(pairs) - value)), 0, atol=1e-5)
        assert not np.any(np.asarray(gradient)[~seen])
    assert len(found) > 1


@pytest.mark.parametrize(
    "read",
    [
        lambda g: g.probs({}),
        lambda g: g.median({}),
        lambda g: g.quantiles({}, 0.5),
        lambda g: g.values("n"),
        lambda g: g.sample_posterior(KEY, {}),
    ],
    ids=["probs", "median", "quantiles", "values", "sample_posterior"],
)
def test_auto_mean_field_is_read_after_it_was_called(read):
    with pytest.raises(ValueError, match="Call the AutoMeanField guide once"):
        read(AutoMeanField(everything))


def test_auto_mean_field_may_first_be_called_inside_of_jit():
    """Nothing of the trace is left; the logits then start at zero."""
    guide = AutoMeanField(lambda: numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.8]))))
    traced = jax.jit(
        lambda key: handlers.trace(handlers.seed(guide, key)).get_trace()["z_auto_logits"]["value"]
    )
    np.testing.assert_array_equal(traced(KEY), [0, 0])
    again = handlers.trace(handlers.seed(guide, 0)).get_trace()
    np.testing.assert_array_equal(again["z_auto_logits"]["value"], [0, 0])


@pytest.mark.whole
def test_auto_mean_field_takes_other_guides_for_the_continuous_sites():
    guide = AutoMeanField(everything, continuous=AutoDelta, num_values={"n": 12})
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    assert trace["loc"]["fn"].__class__.__name__ == "Delta" and trace["n_auto_logits"]["value"].shape == (12,)


@pytest.mark.whole
def test_an_impossible_value_stays_impossible():
    """A Binomial with fewer trials than its neighbor: probability 0, gradient 0, no NaN."""

    def model():
        n = numpyro.sample("n", dist.Binomial(np.array([2, 5]), 0.4).to_event(1))
        numpyro.sample("y", dist.Normal(n, 1).to_event(1), obs=jnp.array([1.0, 4.0]))

    guide = AutoMeanField(model)
    soft = [relax(f, tau=0.5) for f in (model, guide)]
    start = handlers.trace(handlers.seed(guide, 0)).get_trace()["n_auto_logits"]["value"]
    for elbo in ELBOS:
        f = lambda x, elbo=elbo: elbo.loss(KEY, {"n_auto_logits": x}, *soft)
        value, gradient = jax.jit(jax.value_and_grad(f))(start)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
        assert (gradient[0, 3:] == 0).all() and (gradient[1] != 0).all()


def two_sides():
    """A coefficient on each side of a bit; the data determine only their sum."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("z", dist.Bernoulli(0.3))
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a + b, 0.5), obs=1.0)


@pytest.mark.whole
def test_auto_mean_field_with_one_joint_guide_finds_the_posterior_of_all_continuous_sites():
    """Two normals seen by their sum: covariance (I + 11' / s^2)^-1, mean its rows' sums times y / s^2."""
    guide = AutoMeanField(two_sides, continuous=AutoMultivariateNormal)
    schedule = optax.exponential_decay(0.05, 1000, 0.05)
    loss = Trace_ELBO(num_particles=32)
    svi = SVI(relax(two_sides, tau=0.5), relax(guide, tau=0.5), optax.adam(schedule), loss)
    params = svi.run(jax.random.key(0), 1500, progress_bar=False).params
    factor = np.asarray(params["auto_scale_tril"])
    covariance = np.linalg.inv(np.eye(2) + np.ones((2, 2)) / 0.25)
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=0.02)
    np.testing.assert_allclose(params["auto_loc"], covariance.sum(1) / 0.25, atol=0.02)
    np.testing.assert_allclose(guide.probs(params)["z"], 0.3, atol=0.03)  # the data know nothing of it

    again = pickle.loads(pickle.dumps(guide))
    draws = [
        handlers.trace(handlers.substitute(handlers.seed(g, 0), params)).get_trace() for g in (guide, again)
    ]
    assert {"a", "b", "z"} <= set(draws[0])
    for name in ("a", "b", "z"):
        assert draws[0][name]["value"] == draws[1][name]["value"]


@pytest.mark.whole
@pytest.mark.parametrize("elbo", [Trace_ELBO(20), RLOO_ELBO(20)], ids=["relax", "rloo"])
def test_auto_mean_field_takes_partly_observed_sites_of_a_minibatch(elbo):
    """Some labels known, one row masked out, two rows at a time: the posterior is the exact one."""
    y, labels = np.array([2.2, 0.9, 1.4, 2.8], np.float32), np.array([2, 0, 0, 1])
    known, kept = np.array([False, True, False, False]), np.array([True, True, True, False])
    p, means = np.array([0.2, 0.3, 0.5], np.float32), np.array([1.0, 2.0, 3.0], np.float32)

    def model():
        with numpyro.plate("rows", 4, subsample_size=2) as i, handlers.mask(mask=jnp.asarray(kept)[i]):
            seen = jnp.asarray(known)[i]
            z = numpyro.sample("z", dist.Categorical(p), obs=jnp.asarray(labels)[i], obs_mask=seen)
            numpyro.sample("y", dist.Normal(take(means, z), 1), obs=jnp.asarray(y)[i])

    guide = AutoMeanField(model)
    pair = (model, guide)
    if not isinstance(elbo, RLOO_ELBO):
        pair = [relax(f, tau=0.1) for f in pair]
    optimizer = optax.adam(optax.exponential_decay(0.05, 500, 0.1))
    params = SVI(*pair, optimizer, elbo).run(KEY, 1500, progress_bar=False).params
    exact = p * st.norm(means, 1).pdf(y[:, None])
    exact = np.where(kept[:, None], exact, p)  # nothing moves a row that the model does not see
    exact /= exact.sum(-1, keepdims=True)
    free = ~known
    np.testing.assert_allclose(guide.probs(params)["z_unobserved"][free], exact[free], atol=0.04)


@pytest.fixture(scope="module")
def read_guide():
    """A guide with every kind of site, and parameters away from their start."""
    guide = AutoMeanField(everything)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    params = {name: s["value"] for name, s in trace.items() if s["type"] == "param"}
    shift = lambda name, x: x + jax.random.normal(jax.random.fold_in(KEY, len(name)), jnp.shape(x))
    return guide, {n: x if n.endswith("scale") else shift(n, x) for n, x in params.items()}


@pytest.mark.whole
def test_auto_mean_field_draws_from_its_probabilities(read_guide):
    """`sample_posterior` has the law of `probs`, and of NumPyro's normal; its shapes are the model's."""
    guide, params = read_guide
    n = 40_000
    draws = jax.jit(lambda key: guide.sample_posterior(key, params, sample_shape=(n,)))(KEY)
    shapes = {name: x.shape for name, x in draws.items()}
    assert shapes == {"n": (n,), "loc": (n,), "one": (n, 3), "trial": (n, 2), "z": (n, 4)}
    probs = {name: np.asarray(p, np.float64) for name, p in guide.probs(params).items()}
    values = guide.values("n")
    seen = {
        "n": (np.asarray(draws["n"])[:, None] == values).mean(0),
        **{name: np.asarray(draws[name]).mean(0) for name in ("one", "trial", "z")},
    }
    for name, frequency in seen.items():
        z = (frequency - probs[name]) / np.sqrt(probs[name] * (1 - probs[name]) / n + 1 / n**2)
        assert np.abs(z).max() < 4.5, name
    loc, scale = params["loc_auto_loc"], params["loc_auto_scale"]
    assert st.kstest(draws["loc"], st.norm(loc, scale).cdf).pvalue > 1e-4
    one = guide.sample_posterior(KEY, params)
    assert {name: x.shape for name, x in one.items()} == {name: x[1:] for name, x in shapes.items()}


@pytest.mark.whole
def test_auto_mean_field_has_the_quantiles_of_its_law(read_guide):
    """Counts and bits agree with SciPy, as does the normal; classes have no order and are left out."""
    guide, params = read_guide
    levels = np.array([0.05, 0.31, 0.5, 0.77, 0.99])
    found = guide.quantiles(params, levels)
    probs = guide.probs(params)
    assert set(found) == {"n", "loc", "z"} == set(guide.median(params))
    law = st.rv_discrete(values=(guide.values("n"), np.asarray(probs["n"], np.float64) / probs["n"].sum()))
    np.testing.assert_array_equal(found["n"], law.ppf(levels))
    np.testing.assert_array_equal(found["z"], st.bernoulli.ppf(levels[:, None], np.asarray(probs["z"])))
    loc, scale = params["loc_auto_loc"], params["loc_auto_scale"]
    np.testing.assert_allclose(found["loc"], st.norm(loc, scale).ppf(levels), rtol=1e-4)
    for name, median in guide.median(params).items():
        np.testing.assert_allclose(median, found[name][2], rtol=1e-6)
        np.testing.assert_array_equal(guide.quantiles(params, 0.5)[name][0], found[name][2])
    with pytest.raises(ValueError, match=r"quantiles must be in \[0, 1\], got 1.2"):
        guide.quantiles(params, 1.2)
    with pytest.raises(ValueError, match=r"name must be one of the counts \['n'\], got 'z'"):
        guide.values("z")


@pytest.mark.whole
def test_auto_mean_field_reads_its_own_sites_alone():
    """A deterministic site of the model is not in the guide: NumPyro would compute it from other draws."""

    def model():
        z, x = numpyro.sample("z", dist.Bernoulli(0.5)), numpyro.sample("x", dist.Normal(0, 1))
        numpyro.deterministic("sum", z + x)

    guide = AutoMeanField(model)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    params = {name: s["value"] for name, s in trace.items() if s["type"] == "param"}
    assert set(guide.median(params)) == set(guide.sample_posterior(KEY, params)) == {"z", "x"}
    assert set(guide.quantiles(params, [0.5])) == {"z", "x"}


@pytest.mark.whole
def test_auto_mean_field_starts_where_it_is_told():
    start = init_to_value(values={"loc": 2.5})
    for guide in (
        AutoMeanField(everything, init_loc_fn=start),
        AutoMeanField(everything, continuous=functools.partial(AutoNormal, init_loc_fn=start)),
    ):
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
        assert trace["loc_auto_loc"]["value"] == 2.5
    with pytest.raises(ValueError, match="init_loc_fn must be given once"):
        AutoMeanField(
            everything, init_loc_fn=start, continuous=functools.partial(AutoNormal, init_loc_fn=start)
        )


@pytest.mark.whole
def test_auto_mean_field_serves_in_a_list_and_in_predictive():
    """NumPyro's list of guides and its predictive draws accept it like an `AutoNormal`."""
    guide = AutoGuideList(handlers.block(two_sides, hide=["z"]))
    guide.append(AutoNormal(handlers.block(two_sides, hide=["z"])))
    guide.append(AutoMeanField(handlers.block(two_sides, expose=["z"])))
    svi = SVI(two_sides, guide, optax.adam(0.05), RLOO_ELBO(16))
    params = svi.run(KEY, 400, progress_bar=False).params
    np.testing.assert_allclose(guide[1].probs(params)["z"], 0.3, atol=0.05)
    np.testing.assert_allclose(guide.median(params)["a"] + guide.median(params)["b"], 8 / 9, atol=0.15)
    assert set(guide.sample_posterior(KEY, params)) == {"a", "b", "z"}
    n = 10_000
    draws = Predictive(guide, params=params, num_samples=n)(KEY)
    p = float(guide[1].probs(params)["z"])
    assert abs(draws["z"].mean() - p) < 4.5 * np.sqrt(p * (1 - p) / n)


def hidden_bit():
    """Two bits behind one number: NumPyro sums over the first, and the guide has the second."""
    a = numpyro.sample("a", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(a + 2.0 * z, 0.5), obs=1.7)


@pytest.mark.whole
def test_auto_mean_field_leaves_enumerated_sites_to_who_sums_over_them():
    """It refuses the whole model; with that site hidden, TraceEnum_ELBO finds the exact posterior."""
    with pytest.raises(ValueError, match=r"'a' has infer=.*hide=\['a'\]"):
        handlers.seed(AutoMeanField(hidden_bit), 0)()
    guide = AutoMeanField(handlers.block(hidden_bit, hide=["a"]))
    soft = [relax(f, tau=0.05) for f in (hidden_bit, guide)]
    svi = SVI(*soft, optax.adam(0.02), TraceEnum_ELBO(num_particles=20, max_plate_nesting=0))
    params = svi.run(KEY, 800, progress_bar=False).params
    likelihood = np.array([[st.norm(a + 2 * z, 0.5).pdf(1.7) for a in (0, 1)] for z in (0, 1)])
    joint = likelihood * [0.6, 0.4] * np.array([[0.7], [0.3]])
    np.testing.assert_allclose(guide.probs(params)["z"], joint[1].sum() / joint.sum(), atol=0.03)


def steps_of_rows(subsample_size=None):
    def step(carry, y):
        with numpyro.plate("rows", 3, subsample_size=subsample_size):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(z, 1), obs=y[: subsample_size or 3])
        return carry, None

    scan(step, 0.0, jnp.array([[1.0, 0.2, -1.0], [2.0, 0.5, 0.0]]))


@pytest.mark.whole
@pytest.mark.parametrize("elbo", [*ELBOS, RLOO_ELBO(3)], ids=lambda elbo: type(elbo).__name__)
def test_auto_mean_field_takes_plates_inside_of_scans(elbo):
    """It gives no warning about plates that the model does not show, and the exact gradient."""
    guide = AutoMeanField(steps_of_rows)
    handlers.seed(guide, 0)()
    logits = jnp.array([[0.4, -1.0, 0.2], [1.0, -0.5, 0.1]])
    pair = (steps_of_rows, guide)
    if not isinstance(elbo, RLOO_ELBO):
        pair = [relax(f, tau=0.05) for f in pair]
    y = np.array([[1.0, 0.2, -1.0], [2.0, 0.5, 0.0]])

    def exact(logits):
        q = jax.nn.sigmoid(logits)
        cost = 0.5 * ((y - 1) ** 2 - y**2)
        return jnp.sum(q * cost + kl_of_bits(q, 0.3))

    def loss(logits, key):
        return elbo.loss(key, {"z_auto_logits": logits}, *pair)

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(logits, jax.random.split(KEY, 20_000))
    error = np.std(gradients, 0) / np.sqrt(20_000)
    bias = 0 if isinstance(elbo, RLOO_ELBO) else 0.01  # at this temperature
    assert (np.abs(np.mean(gradients, 0) - jax.grad(exact)(logits)) < 4.5 * error + bias).all()


def test_auto_mean_field_refuses_rows_that_change_from_step_to_step():
    with pytest.raises(ValueError, match="The plate 'rows' is subsampled inside a scan"):
        handlers.seed(AutoMeanField(functools.partial(steps_of_rows, 2)), 0)()


WRONG = {
    "model": [None, "m", 3, jnp.zeros(2)],
    "prefix": [None, 3, ["auto"]],
    "init_loc_fn": ["median", 3, {}],
    "create_plates": ["rows", 3, []],
    "continuous": [None, "AutoNormal", 3],
    "num_values": [-1, 0, 2.5, "a", [3], True, {"n": -1}],
}


@pytest.mark.whole
def test_auto_mean_field_knows_the_sites_of_num_values():
    """A name that no discrete site has is refused; a site with obs_mask goes by its own name."""
    with pytest.raises(ValueError, match=r"num_values must be names of the sites .*, got 'loc', 'm'"):
        handlers.seed(AutoMeanField(everything, num_values={"n": 9, "m": 3, "loc": 2}), 0)()

    def model():
        seen = np.array([True, False])
        with numpyro.plate("rows", 2):
            numpyro.sample("k", dist.Poisson(2.0), obs=jnp.array([1, 0]), obs_mask=seen)

    guide = AutoMeanField(model, num_values={"k": 7})
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    assert trace["k_unobserved_auto_logits"]["value"].shape == (2, 7)


@pytest.mark.parametrize(("name", "wrong"), [(name, x) for name, row in WRONG.items() for x in row], ids=repr)
def test_auto_mean_field_names_what_it_is_given(name, wrong):
    given = {"model": everything, name: wrong}
    with pytest.raises(ValueError, match=rf"^{name}\b.* must be .*, got "):
        AutoMeanField(given.pop("model"), **given)
