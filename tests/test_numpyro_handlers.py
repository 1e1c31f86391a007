"""Models inside NumPyro's own handlers, and in plates of both orders: every guide gives the right answer."""

import functools

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
from numpyro.contrib.einstein import RBFKernel, SteinVI
from numpyro.contrib.funsor import config_enumerate, infer_discrete
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoGuideList, AutoNormal
from numpyro.infer.reparam import LocScaleReparam

from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, AutoStructured, marginals, relax

KEY = jax.random.key(20261130)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
GUIDES = pytest.mark.parametrize("guide", [AutoMeanField, AutoStructured])


def toy(y=1.5):
    """The bit and the level hardly depend on each other: the level is known to .05."""
    level = numpyro.sample("level", dist.Normal(0.2, 0.05))
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(level + z, 0.5), obs=y)


def posterior(y, level=0.2):
    odds = st.norm(level + np.arange(2), 0.5).logpdf(y) + np.log([0.7, 0.3])
    return sp.softmax(odds)[1]


def train(model, guide, tau=None, steps=800):
    handled = (lambda f: f) if tau is None else functools.partial(relax, tau=tau)
    loss = RLOO_ELBO(10) if tau is None else Trace_ELBO(10)
    adam = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    return SVI(handled(model), handled(guide), adam, loss).run(KEY, steps, progress_bar=False).params


def lifted():
    """`lift` turns a parameter of the model, the level, into a site."""
    level = numpyro.param("level", 0.0)
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(level + z, 0.5), obs=1.5)


SAME = {
    "reparam": handlers.reparam(toy, config={"level": LocScaleReparam(0)}),
    "lift": handlers.lift(lifted, prior={"level": dist.Normal(0.2, 0.05)}),
    "scale of 1": handlers.scale(toy, scale=1.0),
}


@GUIDES
@pytest.mark.parametrize("name", SAME)
def test_the_posterior_stays_the_same(name, guide):
    made = guide(SAME[name])
    for tau in (None, 0.1):
        found = marginals(made, train(SAME[name], made, tau))["z"]
        assert abs(found - posterior(1.5)) < (0.02 if tau is None else 0.05)


@GUIDES
def test_a_site_that_is_conditioned_is_not_in_the_guide(guide):
    model = handlers.condition(toy, data={"z": jnp.array(1)})
    made = guide(model)
    params = train(model, made)
    assert "z_auto_logits" not in params
    precision = 1 / 0.05**2 + 1 / 0.5**2
    np.testing.assert_allclose(
        params["level_auto_loc"], (0.2 / 0.05**2 + 0.5 / 0.5**2) / precision, atol=0.01
    )


@GUIDES
def test_a_site_that_is_substituted_is_refused(guide):
    """NumPyro treats it as latent: the guide would draw a value that the model does not use."""
    with pytest.raises(ValueError, match=r"Use handlers\.condition to fix it"):
        train(
            handlers.substitute(toy, data={"z": jnp.array(1)}), guide(handlers.substitute(toy, data={"z": 1}))
        )


@GUIDES
def test_an_intervention_leaves_the_prior(guide):
    """`do` cuts the bit off from what follows, so y says nothing about it."""
    model = handlers.do(toy, data={"z": jnp.array(1)})
    made = guide(model)
    assert abs(marginals(made, train(model, made))["z"] - 0.3) < 0.02


@GUIDES
@pytest.mark.parametrize("bit_first", [True, False])
def test_it_is_a_part_of_a_list_of_guides(bit_first, guide):
    made = AutoGuideList(handlers.block(toy, hide=["z"]))  # NumPyro refuses them in a list's model
    parts = [guide(handlers.block(toy, hide=["level"])), AutoNormal(handlers.block(toy, hide=["z"]))]
    for part in parts if bit_first else parts[::-1]:
        made.append(part)
    for tau in (None, 0.1):
        found = marginals(made, train(toy, made, tau))["z"]
        assert abs(found - posterior(1.5)) < (0.02 if tau is None else 0.05)


@GUIDES
def test_a_blocked_site_keeps_its_prior(guide):
    """Neither model nor guide shows the level: each particle draws it anew."""
    model = handlers.block(toy, hide=["level"])
    made = guide(model)
    params = train(model, made)
    assert set(params) == {"z_auto_logits"}
    level = 0.2 + 0.05 * np.random.default_rng(0).normal(size=100_000)  # the bound averages the log-odds
    odds = np.log(3 / 7) + np.mean(st.norm(level + 1, 0.5).logpdf(1.5) - st.norm(level, 0.5).logpdf(1.5))
    assert abs(marginals(made, params)["z"] - sp.expit(odds)) < 0.02


@pytest.mark.parametrize("tau", [None, 0.1])
def test_a_hand_written_guide_with_an_auxiliary_site(tau):
    """A fair coin that only the guide has decides which of two laws the bit has: their mean is right."""

    def guide():
        coin = numpyro.sample("coin", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        level = numpyro.param("loc", 0.2)
        numpyro.sample("level", dist.Normal(level, 0.05))
        logits = numpyro.param("logits", jnp.array([-1.0, 2.0]))
        numpyro.sample("z", dist.Bernoulli(logits=(1 - coin) * logits[0] + coin * logits[1]))

    found = marginals(guide, train(toy, guide, tau, steps=1500))
    assert abs(found["z"] - posterior(1.5)) < (0.03 if tau is None else 0.06)
    assert abs(found["coin"] - 0.5) < 0.02


def test_stein_mixtures_of_discrete_sites_are_refused():
    """NumPyro refuses them, in its own words."""
    made = AutoMeanField(toy)
    svi = SteinVI(toy, made, numpyro.optim.Adam(0.05), RBFKernel(), num_stein_particles=3)
    with pytest.raises(Exception, match="Cannot enumerate model with discrete variables"):
        svi.run(KEY, 2, progress_bar=False)


@GUIDES
@pytest.mark.parametrize("rows_outside", [True, False])
def test_plates_in_either_order(rows_outside, guide):
    y = np.array([[0.1, 1.2, 0.6], [1.4, -0.2, 0.9]], np.float32)

    def model():
        rows, columns = numpyro.plate("rows", 2, dim=-2), numpyro.plate("columns", 3, dim=-1)
        outer, inner = (rows, columns) if rows_outside else (columns, rows)
        with outer, inner:
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(0.2 + z, 0.5), obs=y)

    made = guide(model)
    params = train(model, made)
    np.testing.assert_allclose(marginals(made, params)["z"], np.vectorize(posterior)(y), atol=0.02)


def test_one_site_is_relaxed_and_another_is_summed_and_found_again():
    """`TraceEnum_ELBO` sums over b, and the guide has z; then `infer_discrete` draws b given z."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        b = numpyro.sample("b", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(z + 1.5 * b, 0.7), obs=1.3)

    made = AutoMeanField(handlers.block(model, hide=["b"]))
    soft = [relax(f, tau=0.05) for f in (model, made)]
    svi = SVI(*soft, optax.adam(0.02), TraceEnum_ELBO(num_particles=20, max_plate_nesting=0))
    params = svi.run(KEY, 1000, progress_bar=False).params
    joint = np.array([[0.7 * 0.6, 0.7 * 0.4], [0.3 * 0.6, 0.3 * 0.4]])
    joint *= st.norm(np.array([[0, 1.5], [1, 2.5]]), 0.7).pdf(1.3)
    assert abs(made.probs(params)["z"] - joint[1].sum() / joint.sum()) < 0.03

    def b_given(z, key):
        fixed = handlers.condition(handlers.seed(model, key), data={"z": z})
        drawn = infer_discrete(config_enumerate(fixed), first_available_dim=-1, rng_key=key)
        return handlers.trace(drawn).get_trace()["b"]["value"]

    for z in (0, 1):
        drawn = [int(b_given(jnp.array(z), key)) for key in jax.random.split(KEY, 100)]
        p = joint[z, 1] / joint[z].sum()
        assert abs(np.mean(drawn) - p) < 4.5 * (p * (1 - p) / 100) ** 0.5
