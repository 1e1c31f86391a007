"""`RLOO_ELBO`, `VIMCO_ELBO`: their mean is the enumerated gradient, and a baseline lowers the variance."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import posteriors
from elbo_cases import BITS, CASES, KNOWN, LOC, all_points, all_values, exact_loss, exact_loss_of_two
from relaxit_jax.elbo import RLOO_ELBO, VIMCO_ELBO
from relaxit_jax.handlers import relax, take

KEY = jax.random.key(20261122)
pytestmark = pytest.mark.usefixtures("fast_compilation")


@functools.cache
def estimates(name, elbo=RLOO_ELBO, particles=3, draws=4000):
    """Losses and gradients, flat, for many keys."""
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


@pytest.mark.few(2, "scan, a")
@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_the_exact_loss_and_gradient(name):
    case = CASES[name]
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: exact_loss(case, p)))(case.params)
    losses, gradients = estimates(name)
    assert z_scores(losses, loss) < 4.5
    assert z_scores(gradients, flat(gradient)[0]).max() < 4.5
    # so that a wrong factor would show
    assert z_scores(gradients, 0.8 * flat(gradient)[0]).max() > 6


# --- the bound of several particles -----------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [name for name in CASES if name != "subsampled"])
def test_the_bound_of_two_is_exact(name):
    """Its mean is the sum over all pairs, and its value equals NumPyro's at the same key."""
    case = CASES[name]
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: exact_loss_of_two(case, p)))(case.params)
    losses, gradients = estimates(name, VIMCO_ELBO, particles=2, draws=6000)
    assert z_scores(losses, loss) < 4.5
    assert z_scores(gradients, flat(gradient)[0]).max() < 4.5
    assert z_scores(gradients, 0.8 * flat(gradient)[0]).max() > 6
    if "scan" not in name:  # which does not know plates inside a scan
        model, guide = (lambda p, f=f: f(p) for f in (case.model, case.guide))
        theirs = jax.jit(lambda p: RenyiELBO(0, 2).loss(KEY, {}, model, guide, p))(case.params)
        ours = jax.jit(lambda p: VIMCO_ELBO(2).loss(KEY, {}, model, guide, p))(case.params)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def rows_of_digits(size):
    """A plate around the whole model, subsampled, with a mask and a scale."""
    y = jnp.array([0.3, 1.9, -0.6, 1.1])

    def model(p):
        with numpyro.plate("rows", 4, subsample_size=size) as i, handlers.scale(scale=0.7):
            z = numpyro.sample("z", dist.Bernoulli(0.3).mask(jnp.array([True, True, True, False])[i]))
            numpyro.sample("y", dist.Normal(2 * z, 1), obs=y[i])

    def guide(p):
        with numpyro.plate("rows", 4, subsample_size=size) as i, handlers.scale(scale=0.7):
            mask = jnp.array([True, True, True, False])[i]
            numpyro.sample("z", dist.Bernoulli(logits=p["z"][i]).mask(mask))

    return model, guide


@pytest.mark.whole
def test_minibatches_have_the_mean_of_the_whole():
    p = {"z": jnp.array([0.4, -0.3, 0.1, 0.8])}
    found = {}
    for size in (4, 2):
        pair = rows_of_digits(size)
        loss = lambda p, key, pair=pair: VIMCO_ELBO(3).loss(key, {}, *pair, p)
        losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(
            p, jax.random.split(KEY, 20_000)
        )
        found[size] = np.concatenate([np.asarray(losses, float)[:, None], flat(gradients, 20_000)], 1)
        ours, theirs = (e.loss(KEY, {}, *pair, p) for e in (VIMCO_ELBO(3), RenyiELBO(0, 3)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    difference = found[2].mean(0) - found[4].mean(0)
    noise = np.hypot(*(x.std(0) for x in found.values())) / 20_000**0.5
    assert (np.abs(difference) < 4.5 * noise).all()
    assert (np.abs(found[4].mean(0)) > 10 * noise).any()

    def masked(logit):
        """The last element is masked, over all triples: it is drawn from its law, which has no weight."""
        z = jnp.asarray(all_values([0, 1], 3))
        chance = jnp.exp(jnp.sum(jax.nn.log_sigmoid(jnp.where(z == 1, logit, -logit)), 1))
        log_w = 0.7 * dist.Normal(2.0 * z, 1).log_prob(1.1)
        return -jnp.sum(chance * (jax.nn.logsumexp(log_w, 1) - jnp.log(3)))

    slope = found[4][:, 4]
    assert abs(slope.mean() - jax.grad(masked)(0.8)) < 4.5 * slope.std() / 20_000**0.5
    assert abs(slope.mean()) > 10 * slope.std() / 20_000**0.5


@pytest.mark.whole
def test_vimco_has_less_variance_than_the_score_of_the_bound():
    """It is compared with NumPyro's bound with the score of all sites, which has no baseline."""
    case = CASES["bits"]
    model, guide = (lambda p, f=f: f(p) for f in (case.model, case.guide))

    def score(p, key):
        value = RenyiELBO(0, 5).loss(key, {}, model, guide, p)
        keys = jax.random.split(jax.random.split(key)[1], 5)

        def log_q(key):
            seeded = handlers.seed(guide, jax.random.split(key)[1])
            s = handlers.trace(seeded).get_trace(p)["z"]
            return jnp.sum(s["fn"].log_prob(jax.lax.stop_gradient(s["value"])))

        return value + jax.lax.stop_gradient(value) * jnp.sum(jax.vmap(log_q)(keys))

    keys = jax.random.split(KEY, 4000)
    ours = lambda p, key: VIMCO_ELBO(5).loss(key, {}, model, guide, p)
    both = [flat(jax.jit(jax.vmap(jax.grad(f), (None, 0)))(case.params, keys), 4000) for f in (ours, score)]
    (mine, _), (theirs, _) = map(spread, both)
    assert 10 * mine < theirs
    noise = np.hypot(*(x.std(0) for x in both)) / 4000**0.5 + 1e-5
    assert (np.abs(both[0].mean(0) - both[1].mean(0)) < 4.5 * noise).all()


@pytest.mark.whole
def test_a_particle_of_probability_0_has_no_weight():
    """The bound and its gradients stay finite while one particle is possible."""

    def model(logits):
        n = numpyro.sample("n", dist.Poisson(4.0))
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=jnp.array(3))

    guide = lambda rate: numpyro.sample("n", dist.Poisson(rate))
    loss = lambda rate, key: VIMCO_ELBO(10).loss(key, {}, model, guide, rate)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(4.0, jax.random.split(KEY, 2000))
    assert jnp.isfinite(value).all() and jnp.isfinite(slope).all()
    # -log p(y), which no guide can be below; y is Poisson(2), as the counted ones are
    truth = -float(dist.Poisson(2.0).log_prob(3))
    assert value.mean() > truth - 4.5 * value.std() / 2000**0.5
    with pytest.warns(UserWarning, match=r"the site 'y' has probability 0 under .* particles \[0, 1, 2\]"):
        lost = jax.value_and_grad(lambda rate: VIMCO_ELBO(3).loss(KEY, {}, model, guide, rate))(1e-3)[0]
    assert lost == jnp.inf
    with warnings.catch_warnings(action="error"):  # one particle that is possible is enough
        assert jnp.isfinite(VIMCO_ELBO(10).loss(KEY, {}, model, guide, 4.0))


@pytest.mark.whole
def test_more_particles_come_nearer_to_the_evidence():
    """The mean rises, and stays below NumPyro's exact sum over the bits."""
    case = CASES["bits"]
    model, guide = (lambda p, f=f: f(p) for f in (case.model, case.guide))
    bounds = []
    for particles in (2, 10, 100):
        loss = lambda key, k=particles: VIMCO_ELBO(k).loss(key, {}, model, guide, case.params)
        bounds.append(np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(KEY, 2000)), float))
    means = [x.mean() for x in bounds]
    mass, log_w = all_points(case, case.params)
    evidence = -float(jnp.log(jnp.sum(mass * jnp.exp(log_w))))
    assert means[0] > means[1] > means[2] > evidence - 4.5 * bounds[2].std() / 2000**0.5
    assert means[2] - evidence < 0.1 * (means[0] - evidence)


def test_relaxed_sites_have_no_weights():
    """This includes sites in a plate and in event axes."""
    p = {"x": jnp.array([0.3, 0.7]), "z": jnp.array([[0.1, -0.4, 0.7]] * 3)}
    plate = [relax(f, tau=0.5) for f in (pathwise_model, pathwise_guide)]
    event = [relax(lambda p, f=f: f(p), tau=0.5) for f in (BITS.model, BITS.guide)]
    for pair, params in ((plate, p), (event, BITS.params)):
        with pytest.raises(ValueError, match="the site 'z' is relaxed, and importance weights need draws"):
            VIMCO_ELBO(2).loss(KEY, {}, *pair, params)


def test_a_subsampled_plate_beside_other_sites_is_refused():
    case = CASES["subsampled"]
    with pytest.raises(ValueError, match="the plate 'rows' shows 3 of 4 rows and does not enclose all sites"):
        VIMCO_ELBO(2).loss(KEY, {}, lambda p: case.model(p), lambda p: case.guide(p), case.params)


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
@pytest.mark.whole
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


@pytest.mark.whole
def test_an_element_of_a_plate_pays_for_itself():
    """More elements, and noise that is not downstream, do not change the variance of its gradient."""

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


@pytest.mark.parametrize("markov", [False, True], ids=["all at once", "scan"])
def test_a_step_of_a_scan_pays_for_itself_and_what_follows(markov):
    """Steps do not reach each other: the last one's gradient has the variance of a scan with one step."""

    def model(n):
        def step(before, _):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2 * z, 0.5), obs=1.3)
            return z, None

        scan(step, 0, None, length=n)

    def guide(n):
        logits = numpyro.param("logits", jnp.zeros(n))
        if markov:
            step = lambda before, logit: (numpyro.sample("z", dist.Bernoulli(logits=logit)), None)
            scan(step, 0, logits)
        else:
            numpyro.sample("z", dist.Bernoulli(logits=logits))

    def last(n):
        params = {"logits": jnp.full(n, 0.4)}
        return gradients_of(RLOO_ELBO(4), lambda: model(n), lambda: guide(n), params, 4000)[:, -1:]

    (alone, alone_error), (among, among_error) = map(spread, (last(1), last(20)))
    assert abs(alone - among) / np.hypot(alone_error, among_error) < 4.5


@pytest.mark.whole
def test_no_variance_at_the_posterior_of_a_minibatch():
    """All particles see the same data: if the guide is exact, all have the same cost."""
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


# --- compared with NumPyro's ELBOs ------------------------------------------------------------


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


@pytest.mark.whole
@pytest.mark.parametrize("vectorize", [True, False])
def test_pathwise_sites_are_those_of_trace_elbo(vectorize):
    """Relaxed discrete sites count too: the same draws, the same loss, the same gradient."""
    p = {"x": jnp.array([0.3, 0.7]), "z": jnp.array([[0.1, -0.4, 0.7]] * 3)}
    soft_model, soft_guide = (relax(f, tau=0.5) for f in (pathwise_model, pathwise_guide))
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda p, elbo=elbo: elbo.loss(KEY, {}, soft_model, soft_guide, p)))(p)
        for elbo in (RLOO_ELBO(3, vectorize), Trace_ELBO(3))
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(flat(ours[1]), flat(theirs[1]), rtol=1e-4, atol=1e-5)
    assert np.abs(flat(theirs[1])).min() > 1e-3


@pytest.mark.whole
def test_how_particles_are_vectorized_does_not_matter():
    loss = lambda how: jax.jit(lambda p: RLOO_ELBO(3, how).loss(KEY, {}, BITS.model, BITS.guide, p))(
        BITS.params
    )
    stacked = lambda f, keys: jax.tree.map(lambda *x: jnp.stack(x), *map(f, keys))
    np.testing.assert_allclose([loss(False), loss(stacked)], loss(True), rtol=1e-5)


@pytest.mark.whole
def test_a_logit_of_zero():
    """NumPyro's score of a Bernoulli is off by 1/2 there; a baseline does not see a constant."""
    gradient = jax.jit(
        lambda z: jax.grad(
            lambda p: RLOO_ELBO(5).loss(KEY, {}, BITS.model, BITS.guide, BITS.params | {"z": p})
        )(z)
    )
    np.testing.assert_allclose(gradient(jnp.zeros(3)), gradient(jnp.full(3, 1e-6)), rtol=1e-4)


@pytest.mark.whole
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


@pytest.mark.whole
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


@pytest.mark.whole
@pytest.mark.parametrize("name", ["partly", "partly scan"])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.filterwarnings("ignore:Failed to verify mean field:UserWarning")
def test_partly_observed_sites_under_relax(name, elbo):
    """Straight-through draws are exact, so the mean of the relaxed loss is the enumerated one."""
    case = CASES[name]
    model, guide = (relax(lambda p, f=f: f(p), tau=0.5, method="straight_through")
                    for f in (case.model, case.guide))  # fmt: skip
    loss = lambda p, key: elbo().loss(key, {}, model, guide, p)
    losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(
        case.params, jax.random.split(KEY, 4000)
    )
    exact = jax.jit(lambda p: exact_loss(case, p))(case.params)
    assert z_scores(np.asarray(losses, np.float64), exact) < 4.5 < z_scores(losses, 1.05 * exact)
    known = KNOWN[: len(case.params["z"])]
    for site in set(case.params) - {"loc", "first"}:  # what is observed has no gradient at all
        moves = np.abs(gradients[site]).max(0) > 0
        np.testing.assert_array_equal(moves.reshape(len(known), -1).any(-1), ~known)


def test_what_is_observed_stays_where_it_is():
    """All particles have the same cost there: the gradient is 0, without rounding that Adam would follow."""
    case = CASES["partly"]
    guide = lambda p: case.guide(p)
    loss = lambda p: RLOO_ELBO(3).loss(KEY, {}, lambda p: case.model(p), guide, p)
    gradient = jax.jit(jax.grad(loss))(case.params)
    for site in ("b", "z", "n"):
        assert (gradient[site][0] == 0).all() and (gradient[site][1:] != 0).any()


@pytest.mark.whole
def test_a_draw_of_probability_0_is_named_and_stays_where_it_is():
    """More were counted than possible: the elements that the draw does not reach keep their gradients."""
    y = jnp.array([1, 6, 2])

    def model(p):
        with numpyro.plate("n", 3):
            n = numpyro.sample("size", dist.Poisson(4.0))
            numpyro.sample("y", dist.Binomial(n, 0.5), obs=y)

    def guide(rates):
        with numpyro.plate("n", 3):
            numpyro.sample("size", dist.Poisson(rates))

    loss = lambda rates: RLOO_ELBO(4).loss(KEY, {}, model, guide, rates)
    rates = jnp.array([30.0, 7.0, 30.0])
    with pytest.warns(
        UserWarning, match=r"the site 'y' has probability 0 under the draws of the particles \["
    ):
        value, gradient = jax.value_and_grad(loss)(rates)
    assert value == np.inf
    np.testing.assert_array_equal(np.isnan(gradient), [False, True, False])
    alone, slope = jax.jit(jax.value_and_grad(loss))(rates)
    np.testing.assert_allclose(slope[::2], gradient[::2], rtol=1e-5)
    assert alone == np.inf


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 0, 2.0, True, "2", None])
@pytest.mark.parametrize("elbo", [RLOO_ELBO, VIMCO_ELBO])
def test_a_baseline_needs_another_particle(elbo, number):
    with pytest.raises(ValueError, match="num_particles must be an integer in"):
        elbo(number)


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


def backwards():
    scan(lambda carry, _: (bit(), None), 0, None, length=3, reverse=True)


REFUSED = {
    "enumerated in the guide": (bit, lambda: bit(enumerate="parallel"), "'z' is enumerated"),
    "marginalised": (lambda: bit(enumerate="parallel"), lambda: None, "'z' is enumerated"),
    "cond": (bit, lambda: cond(True, lambda _: bit(), lambda _: bit(), None), "'z' is inside a cond"),
    "cond in the model": (
        lambda: cond(True, lambda _: bit(), lambda _: bit(), None),
        bit,
        "the guide's draw",
    ),
    "backwards": (
        backwards,
        lambda: numpyro.sample("z", dist.Bernoulli(jnp.full(3, 0.5))),
        "with reverse=True",
    ),
    "scan": (in_subsampled_scan, in_subsampled_scan, "'z' is in a subsampled plate inside a scan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    model, guide, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        RLOO_ELBO().loss(KEY, {}, model, guide)
