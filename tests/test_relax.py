"""Sites that `relax` replaces, guides that `AutoMeanField` makes, and the documented objective."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import posteriors
from relaxit_jax import distributions as rd
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, equal, greater, less, relax, select, take
from relaxit_jax.handlers._site import FiniteDiscrete

KEY = jax.random.key(20261122)
ELBOS = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO)
pytestmark = pytest.mark.usefixtures("fast_compilation")


# --- the objective ----------------------------------------------------------------------------

LOC = np.array([-1.0, 0.5, 2.0], np.float32)
PRIOR = np.log(np.array([0.2, 0.3, 0.5], np.float32))
Y = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)
KEPT = np.arange(24).reshape(4, 6) % 3 > 0


def model(y=Y):
    """Every kind of site, in plates, subsampled, masked, expanded and under to_event."""
    on = numpyro.sample("on", dist.Bernoulli(0.3).expand([3]).to_event(1))
    n = numpyro.sample("n", dist.Binomial(4, 0.4))
    with (
        numpyro.plate("rows", 8, subsample_size=4, dim=-2),
        numpyro.plate("columns", 6, dim=-1),
        handlers.mask(mask=KEPT),
    ):
        z = numpyro.sample("z", dist.Categorical(logits=PRIOR))
        numpyro.sample("y", dist.Normal(take(LOC, z) + on @ LOC + n, 1), obs=y)


def guide(params, y=Y):
    numpyro.sample("on", dist.Bernoulli(logits=params["on"]).to_event(1))
    numpyro.sample("n", dist.Binomial(4, logits=params["n"]))
    with (
        numpyro.plate("rows", 8, subsample_size=4, dim=-2),
        numpyro.plate("columns", 6, dim=-1),
        handlers.mask(mask=KEPT),
    ):
        numpyro.sample("z", dist.Categorical(logits=params["z"]))


PARAMS = {"on": jnp.array([0.5, -1.0, 0.2]), "n": jnp.array(0.3), "z": jnp.array([0.1, -0.4, 0.7])}


def bernoulli_kl(logits, p):
    q = jax.nn.sigmoid(logits)
    return q * (jnp.log(q) - np.log(p)) + (1 - q) * (jnp.log1p(-q) - np.log(1 - p))


def by_hand(params, soft_model, soft_guide, key):
    """- log p(y | z) at the guide's draws, and the KL in closed form, scaled by the plates."""
    model_key, guide_key = jax.random.split(key)
    drawn = handlers.trace(handlers.seed(soft_guide, guide_key)).get_trace(params)
    replayed = handlers.replay(handlers.seed(soft_model, model_key), drawn)
    y = handlers.trace(replayed).get_trace()["y"]
    fit = 2 * jnp.sum(jnp.where(KEPT, dist.Normal(y["fn"].mean, 1).log_prob(Y), 0))
    kl = jnp.sum(bernoulli_kl(params["on"], 0.3)) + 4 * bernoulli_kl(params["n"], 0.4)
    log_q, log_p = jax.nn.log_softmax(params["z"]), jax.nn.log_softmax(PRIOR)
    return kl + 2 * KEPT.sum() * jnp.sum(jnp.exp(log_q) * (log_q - log_p)) - fit


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["relaxed", "straight_through"])
def test_the_objective_under_every_elbo(method):
    """It is -E log p(y | z) + KL(q || p), the same number and gradient under each, with scale and mask."""
    soft_model, soft_guide = relax(model, tau=0.5, method=method), relax(guide, tau=0.5, method=method)

    @jax.jit
    def losses(params, key):
        hand = lambda p: by_hand(p, soft_model, soft_guide, key)
        of = lambda elbo: lambda p: elbo.loss(key, {}, lambda: soft_model(), lambda: soft_guide(p))
        return [jax.value_and_grad(f)(params) for f in [*(of(elbo()) for elbo in ELBOS), hand]]

    *found, expected = losses(PARAMS, KEY)
    for value, gradient in found:
        np.testing.assert_allclose(value, expected[0], rtol=2e-5)
        chex.assert_trees_all_close(gradient, expected[1], rtol=1e-4, atol=1e-4)
    assert all((abs(g) > 1e-4).all() for g in jax.tree.leaves(expected[1]))


def test_temperature_may_be_traced():
    """Annealing gives other draws and does not trace the model again."""
    traces = []

    def counted():
        traces.append(None)
        return model()

    @jax.jit
    def loss(params, tau):
        soft = [relax(f, tau=tau) for f in (counted, lambda: guide(params))]
        return Trace_ELBO().loss(KEY, {}, *soft)

    losses = [float(loss(PARAMS, jnp.float32(tau))) for tau in (0.1, 0.3, 1.0)]
    assert len(traces) == 1 and len(set(losses)) == 3


@pytest.mark.whole
def test_subsampled_plates_get_unbiased_gradients():
    """The guide has parameters for the whole plate; the mean over subsamples is the full gradient."""
    table = jnp.array([-1.0, 1.0, 3.0])
    data = np.linspace(-1, 3, 6, dtype=np.float32)

    def plated(subsample_size):
        with numpyro.plate("n", 6, subsample_size=subsample_size):
            y = numpyro.subsample(jnp.asarray(data), event_dim=0)
            z = numpyro.sample("z", dist.Categorical(logits=PRIOR))
            numpyro.sample("y", dist.Normal(take(table, z), 1), obs=y)

    def gradient(subsample_size):
        m = lambda: plated(subsample_size)
        g = AutoMeanField(m)
        soft = [relax(f, tau=0.5) for f in (m, g)]
        with handlers.seed(rng_seed=0):
            start = handlers.trace(g).get_trace()["z_auto_logits"]["value"]
        assert start.shape == (6, 3)
        np.testing.assert_allclose(jax.nn.softmax(start), jnp.broadcast_to(jnp.exp(PRIOR), (6, 3)), rtol=1e-5)
        start = start + jnp.linspace(0, 1, 18).reshape(6, 3)
        loss = lambda x, key: Trace_ELBO(num_particles=1).loss(key, {"z_auto_logits": x}, *soft)
        keys = jax.random.split(KEY, 4000)
        grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(start, keys)
        return grads.mean(0), grads.std(0) / np.sqrt(len(keys))

    (whole, error), (part, part_error) = gradient(6), gradient(2)
    assert np.abs((whole - part) / np.hypot(error, part_error)).max() < 4.5
    assert np.abs(whole / error).max() > 10  # so that a wrong scale would show


# --- what is relaxed, and to what -------------------------------------------------------------

SITES = {
    "probs": (dist.Bernoulli(0.3), (), "unit"),
    "logits": (dist.Bernoulli(logits=jnp.zeros(2)).to_event(1), (2,), "unit"),
    "categorical": (dist.Categorical(jnp.array([0.2, 0.8])), (2,), "simplex"),
    "categorical_logits": (dist.Categorical(logits=jnp.zeros((2, 3))).to_event(1), (2, 3), "simplex"),
    "one_hot": (rd.OneHotCategorical(logits=jnp.zeros(3)), (3,), "simplex"),
    "one_hot_wide": (rd.OneHotCategorical(logits=jnp.zeros(3)).expand([4]).to_event(1), (4, 3), "simplex"),
    "multinomial": (dist.Multinomial(1, jnp.array([0.2, 0.8])), (2,), "simplex"),
    "multinomial_logits": (dist.Multinomial(1, logits=jnp.zeros(3)), (3,), "simplex"),
    "uniform": (dist.DiscreteUniform(2, 5), (), (2, 5)),
    "binomial": (dist.Binomial(jnp.array([3, 7]), 0.4).to_event(1), (2,), (0, 7)),
    "poisson": (dist.Poisson(3.0), (), (0, 40)),
    "geometric": (dist.Geometric(0.4), (), (0, 60)),
    "negative_binomial": (dist.NegativeBinomialProbs(3.0, 0.4), (), (0, 60)),
    "negative_binomial_2": (dist.NegativeBinomial2(3.0, 2.0), (), (0, 80)),
    "masked": (
        dist.Bernoulli(jnp.full(3, 0.3)).mask(jnp.array([True, False, True])).to_event(1),
        (3,),
        "unit",
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("method", ["relaxed", "straight_through"])
def test_every_discrete_site_is_relaxed(method):
    def everything():
        return {name: numpyro.sample(name, d) for name, (d, _, _) in SITES.items()}

    draw = lambda key: handlers.seed(relax(everything, tau=0.5, method=method), key)()
    draws = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 200))
    for name, (d, shape, support) in SITES.items():
        z = np.asarray(draws[name])
        assert z.shape == (200, *shape), name
        low, high = (0, 1) if isinstance(support, str) else support
        assert z.min() >= low and z.max() <= high, name
        if support == "simplex":
            np.testing.assert_allclose(z.sum(-1), 1, rtol=1e-5)
        whole = z == np.round(z)
        assert whole.all() if method == "straight_through" else (~whole).mean() > 0.3, name
        if method == "straight_through" and support != "simplex":  # and of the site's own law
            error = np.sqrt(np.asarray(d.variance) / 200)
            assert (abs(z.mean(0) - d.mean) < 4.5 * error).all(), name


def test_other_sites_stay():
    def mixed():
        numpyro.sample("seen", dist.Bernoulli(0.3), obs=1)
        numpyro.sample("enumerated", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("kept", dist.Poisson(3.0))
        numpyro.sample("normal", dist.Normal(0, 1))
        numpyro.sample("conditioned", dist.Categorical(jnp.array([0.2, 0.8])))
        numpyro.sample("substituted", dist.Categorical(jnp.array([0.2, 0.8])))

    inner = handlers.substitute(handlers.condition(mixed, {"conditioned": 1}), {"substituted": 0})
    soft = relax(inner, tau=0.5, config={"kept": None})
    trace = handlers.trace(handlers.seed(soft, 0)).get_trace()
    plain = handlers.trace(handlers.seed(inner, 0)).get_trace()
    for name, site in plain.items():
        assert type(trace[name]["fn"]) is type(site["fn"]), name
        assert jnp.result_type(trace[name]["value"]) == jnp.result_type(site["value"]), name


@pytest.mark.whole
def test_config_gives_single_sites_their_own_method():
    def two():
        numpyro.sample("z", dist.Categorical(PRIOR_P))
        numpyro.sample("b", dist.Bernoulli(0.3))
        numpyro.sample("g", dist.Bernoulli(0.3))

    config = {
        "z": rd.StraightThroughGumbelSoftmax,
        "b": rd.HardConcrete,
        "g": lambda d: rd.GaussianRelaxedBernoulli(loc=d.probs, scale=0.2),
    }
    trace = handlers.trace(handlers.seed(relax(two, tau=0.3, config=config), 1)).get_trace()
    kinds = {name: type(site["fn"].base_dist.relaxation).__name__ for name, site in trace.items()}
    assert kinds == {
        "z": "StraightThroughGumbelSoftmax",
        "b": "HardConcrete",
        "g": "GaussianRelaxedBernoulli",
    }
    assert set(np.unique(trace["z"]["value"])) == {0, 1}


PRIOR_P = np.exp(PRIOR)


@pytest.mark.whole
def test_a_method_of_second_order_is_unbiased_where_the_likelihood_is_quadratic():
    """ReinMax under `relax`: the mean gradient of the bound is the enumerated one."""
    logits, loc = jnp.array([0.3, -0.4, 0.9]), jnp.array([-1.0, 0.5, 2.0])

    def model():
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
        numpyro.sample("x", dist.Normal(take(loc, z), 0.5), obs=0.2)

    def guide(logits):
        numpyro.sample("z", dist.Categorical(logits=logits))

    def bound(logits):
        q = jax.nn.softmax(logits)
        return -jnp.sum(q * (dist.Normal(loc, 0.5).log_prob(0.2) - jnp.log(q / jnp.array([0.2, 0.5, 0.3]))))

    def loss(logits, key, method):
        options = {"tau": 1.0, "method": method}
        relaxed = relax(lambda _: model(), **options), relax(guide, **options)
        return Trace_ELBO().loss(key, {}, *relaxed, logits)

    exact, keys = jax.grad(bound)(logits), jax.random.split(KEY, 20_000)
    slopes = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)), static_argnums=2)
    z_scores = {}
    for method in (rd.ReinMax, rd.ReinMaxRao, rd.GumbelRao, rd.StraightThroughCategorical):
        gradients = slopes(logits, keys, method)
        error = jnp.std(gradients, 0) / len(keys) ** 0.5
        z_scores[method] = jnp.abs(jnp.mean(gradients, 0) - exact) / error
    assert z_scores.pop(rd.ReinMax).max() < 4.5
    assert all(z.max() > 4.5 for z in z_scores.values())  # the others are biased, and it shows


@pytest.mark.whole
def test_the_trained_guide_draws_discrete_values():
    guide = AutoMeanField(posteriors.classes)
    with handlers.seed(rng_seed=0):
        params = {"z_auto_logits": handlers.trace(guide).get_trace()["z_auto_logits"]["value"]}
    draws = Predictive(guide, params=params, num_samples=2000)(KEY)["z"]
    assert draws.shape == (2000, 5) and jnp.issubdtype(draws.dtype, jnp.integer)
    share = np.bincount(np.asarray(draws).ravel(), minlength=4) / draws.size
    np.testing.assert_allclose(share, posteriors.CLASS_P, atol=4.5 * 0.5 / np.sqrt(draws.size))
    np.testing.assert_allclose(guide.probs(params)["z"], np.tile(posteriors.CLASS_P, (5, 1)), rtol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("low", [0, 2])
def test_a_change_point(low):
    """``where(t < s, a, b)`` for a uniform s: with straight-through draws the mean loss is exact."""
    t, y = np.arange(8), np.float32([0.3, -0.2, 0.1, 2.2, 1.7, 2.4, 1.9, 2.1])
    logits = jnp.linspace(-1, 1, 8 - low)

    def change():
        s = numpyro.sample("s", dist.DiscreteUniform(low, 7))
        numpyro.sample("y", dist.Normal(select(less(t, s), 0.0, 2.0), 1).to_event(1), obs=y)

    def own(logits):
        numpyro.sample("s", FiniteDiscrete(logits, low))

    def loss(logits, key):
        soft = [relax(f, tau=0.5, method="straight_through", config={"s": "one_hot"})
                for f in (lambda _: change(), own)]  # fmt: skip
        return Trace_ELBO().loss(key, {}, *soft, logits)

    def exact(logits):
        log_q = jax.nn.log_softmax(logits)
        means = jnp.where(t < np.arange(low, 8)[:, None], 0.0, 2.0)
        cost = log_q + jnp.log(8 - low) - dist.Normal(means, 1).log_prob(y).sum(-1)
        return jnp.exp(log_q) @ cost

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(
        logits, jax.random.split(KEY, 4000)
    )
    error = np.std(values) / np.sqrt(4000)
    assert abs(np.mean(values, dtype=float) - exact(logits)) < 4.5 * error < 0.1 * exact(logits)
    assert (np.abs(gradients).max(0) > 0).all() and np.isfinite(gradients).all()
    plain = handlers.trace(handlers.seed(change, 1)).get_trace()  # and the plain value is compared as it is
    np.testing.assert_array_equal(plain["y"]["fn"].base_dist.loc, np.where(t < plain["s"]["value"], 0, 2))


def test_comparisons_of_weights_are_those_of_their_values():
    weights, t = jnp.float32([[0.1, 0.2, 0.7], [0.5, 0.5, 0]]), jnp.array([[0], [1], [2]])
    for compare, holds in ((less, np.less), (greater, np.greater), (equal, np.equal)):
        expected = np.sum(np.where(holds(np.arange(3)[:, None, None], np.arange(3)), weights, 0), -1)
        np.testing.assert_allclose(compare(t, weights), expected, rtol=1e-6)
        np.testing.assert_array_equal(compare(t, jnp.array([0, 2])), holds(t, np.array([0, 2])))
        slope = jax.grad(lambda w, compare=compare: compare(1.0, w))(weights[0])
        np.testing.assert_array_equal(slope, holds(1, np.arange(3)))
        with pytest.raises(ValueError, match="s must be integers, or vectors of weights"):
            compare(1, 0.4)


@pytest.mark.whole
def test_one_hot_sites_start_at_0():
    for law, size in ((dist.Bernoulli(0.3), 2), (dist.Binomial(3, 0.4), 4), (dist.DiscreteUniform(2, 5), 6)):
        soft = relax(lambda law=law: numpyro.sample("z", law), tau=0.5, config={"z": "one_hot"})
        z = handlers.seed(soft, 0)()
        assert z.shape == (size,) and (z[:2] == 0).all() == (size == 6)
        np.testing.assert_allclose(z.sum(), 1, rtol=1e-5)
    below = relax(lambda: numpyro.sample("z", dist.DiscreteUniform(-1, 5)), tau=0.5, config={"z": "one_hot"})
    with pytest.raises(ValueError, match="site 'z' must be of values from 0 on to be one-hot"):
        handlers.seed(below, 0)()


@pytest.mark.few(1)
@pytest.mark.parametrize("certain", [0.0, 1.0])
def test_bits_that_are_certain(certain):
    """The automatic guide leaves the other value out; the law of one that rounds to 0 or 1 is finite."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([certain, 0.3])).to_event(1))
        numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=jnp.array([0.5, 0.2]))

    guide = AutoMeanField(model)
    start = handlers.trace(handlers.seed(guide, 0)).get_trace()["z_auto_logits"]["value"]
    assert guide.probs({"z_auto_logits": start + 3})["z"][0] == certain
    for elbo, handle in ((Trace_ELBO(4), lambda f: relax(f, tau=0.5)), (RLOO_ELBO(4), lambda f: f)):
        loss = lambda x, e=elbo, h=handle: e.loss(KEY, {"z_auto_logits": x}, h(model), h(guide))
        value, gradient = jax.jit(jax.value_and_grad(loss))(start)
        assert np.isfinite(value) and gradient[0] == 0 and np.isfinite(gradient).all() and gradient[1] != 0

    def regression(w):
        z = numpyro.sample("z", dist.Bernoulli(jax.nn.sigmoid(w * jnp.array([-30.0, 2, 30]))).to_event(1))
        numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=jnp.zeros(3))

    own = lambda w: numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(3) + w).to_event(1))
    soft = [relax(f, tau=0.5) for f in (regression, own)]
    value, slope = jax.jit(jax.value_and_grad(lambda w: Trace_ELBO().loss(KEY, {}, *soft, w)))(2.0)
    assert np.isfinite(value) and np.isfinite(slope)


@pytest.mark.whole
def test_possible_classes_of_a_subsampled_plate():
    """A class is left out of a column of the guide if it is impossible in that column of the minibatch."""
    prior = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])

    def model():
        with numpyro.plate("rows", 4, subsample_size=2, dim=-2), numpyro.plate("columns", 2, dim=-1):
            numpyro.sample("z", dist.Categorical(prior))

    guide = AutoMeanField(model)
    start = handlers.trace(handlers.seed(guide, 0)).get_trace()["z_auto_logits"]["value"]
    probs = guide.probs({"z_auto_logits": start})["z"]
    assert probs.shape == (4, 2, 3)
    np.testing.assert_allclose(probs, np.broadcast_to(prior, (4, 2, 3)), rtol=1e-5)


def test_take_and_select_are_indexing_and_where():
    table = jnp.arange(12.0).reshape(3, 2, 2)
    index = jnp.array([[0, 2], [1, 1]])
    np.testing.assert_array_equal(take(table, index), table[index])
    np.testing.assert_array_equal(take(table, jax.nn.one_hot(index, 3)), table[index])
    gradient = jax.grad(lambda z: take(jnp.array([1.0, 5.0, 7.0]), z))(jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(gradient, [1, 5, 7])  # also for what is not chosen
    bit = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(select(bit, 3.0, jnp.array([5.0, 6.0])), [5, 3])
    np.testing.assert_array_equal(select(jnp.array([False, True]), 3.0, 5.0), [5, 3])
    assert jax.grad(lambda b: select(b, 3.0, 5.0))(0.25) == -2
    with pytest.raises(ValueError, match="z must be integers, or vectors of 3 weights"):
        take(table, jnp.ones(2))
