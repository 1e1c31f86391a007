"""Counts of every support, as numbers, as one-hot vectors and left discrete, against exact posteriors."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats as st
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO

from helpers import KEY
from relaxit_jax.elbo import RLOO_ELBO, VIMCO_ELBO
from relaxit_jax.handlers import AutoMeanField, AutoStructured, marginals, relax, take

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
N = np.arange(25)
COUNTED = st.poisson(4).pmf(N)
POISSONS = dist.Categorical(np.full(2, 0.5, np.float32)), dist.Poisson(np.array([1.0, 6.0], np.float32))
COUNTS = {
    "Binomial": (lambda: dist.Binomial(9, 0.4), st.binom(9, 0.4).pmf(N)),
    "BetaBinomial": (lambda: dist.BetaBinomial(2.0, 3.0, 9), st.betabinom(9, 2, 3).pmf(N)),
    "DiscreteUniform": (lambda: dist.DiscreteUniform(2, 7), ((N >= 2) & (N <= 7)) / 6),
    "Poisson": (lambda: dist.Poisson(4.0), COUNTED),
    "zero inflated": (
        lambda: dist.ZeroInflatedPoisson(0.3, 4.0),
        0.3 * (N == 0) + 0.7 * st.poisson(4).pmf(N),
    ),
    "mixture": (lambda: dist.MixtureSameFamily(*POISSONS), st.poisson([[1], [6]]).pmf(N).mean(0)),
}
counts = pytest.mark.parametrize("name", COUNTS)


def model_of(name):
    def model():
        n = numpyro.sample("n", COUNTS[name][0]())
        as_number = take(N[: n.shape[-1]], n) if jnp.ndim(n) else n
        numpyro.sample("y", dist.Normal(as_number, 1), obs=3.3)

    return model


def posterior(name):
    joint = COUNTS[name][1] * st.norm(N, 1).pdf(3.3)
    return joint / joint.sum()


def error(name, guide, params, num_values):
    values = guide.values("n").astype(int)
    found = np.zeros(len(N))
    found[values] = marginals(guide, params, num_values=num_values)["n"]
    return np.abs(found - posterior(name)).max()


def number(name):
    """The number of values; None if the support sets it."""
    return None if name in ("Binomial", "BetaBinomial", "DiscreteUniform") else len(N)


def train(model, guide, loss, steps=1500):
    adam = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    return SVI(model, guide, adam, loss).run(KEY, steps, progress_bar=False).params


@counts
@pytest.mark.parametrize("guide", [AutoMeanField, AutoStructured])
def test_left_discrete(name, guide):
    made = guide(model_of(name), num_values=number(name))
    params = train(model_of(name), made, RLOO_ELBO(10))
    assert error(name, made, params, number(name)) < 0.005


@counts
@pytest.mark.parametrize("one_hot", [False, True])
def test_relaxed(name, one_hot):
    """As a number and as weights of 0, 1, ..., with a bias from the temperature."""
    made = AutoMeanField(model_of(name), num_values=number(name))
    config = {"n": "one_hot"} if one_hot else None
    soft = [relax(f, tau=0.1, config=config, num_values=number(name)) for f in (model_of(name), made)]
    params = train(*soft, Trace_ELBO(num_particles=30))
    assert error(name, made, params, number(name)) < 0.04


LEAST = 5
ANIMALS = st.poisson(8).pmf(N) * st.binom(N, 0.4).pmf(LEAST)


def animals():
    """There are at least as many as were counted."""
    n = numpyro.sample("n", dist.Poisson(8.0))
    numpyro.sample("y", dist.Binomial(n, 0.4), obs=jnp.array(LEAST))


LEFT_OUT = {"n": np.where(N < LEAST, -np.inf, 0)}


@pytest.mark.parametrize("options", [{"init": "data"}, {"init_logits": LEFT_OUT}])
def test_a_guide_that_is_cut_at_the_data(options):
    """Both leave out values that the data rule out; else the loss is infinite and parameters are NaN."""
    guide = AutoMeanField(animals, num_values=len(N), **options)
    params = train(animals, guide, RLOO_ELBO(10))
    found = guide.probs(params)["n"]
    np.testing.assert_allclose(found, ANIMALS / ANIMALS.sum(), atol=0.005)
    assert found[:LEAST].sum() < 1e-6
    assert np.isfinite(params["n_auto_logits"]).all()


def test_a_value_that_is_left_out_has_no_probability():
    guide = AutoMeanField(animals, num_values=len(N), init_logits=LEFT_OUT)
    params = train(animals, guide, RLOO_ELBO(10), steps=50)
    assert (guide.probs(params)["n"][:LEAST] == 0).all()


LEVELS = np.arange(3, dtype=np.float32)


def chain():
    def step(before, y):
        z = numpyro.sample("z", dist.Categorical(logits=take(np.eye(3, dtype=np.float32), before)))
        numpyro.sample("y", dist.Normal(take(LEVELS, z), 1), obs=y)
        return z, None

    first = numpyro.sample("first", dist.Categorical(np.full(3, 1 / 3, np.float32)))
    scan(step, first, jnp.array([0.0, 1.0, 2.0, 1.0]))


@pytest.mark.parametrize("guide", [AutoMeanField, AutoStructured])
@pytest.mark.parametrize("loss", [RLOO_ELBO(10), VIMCO_ELBO(10), Trace_ELBO(10)])
def test_a_class_that_is_left_out_of_a_chain(guide, loss):
    """This also holds if each state depends on the last one, under each ELBO, and under `relax`."""
    made = guide(chain, init_logits={"z": np.array([[0, 0, -np.inf]] * 4)})
    pair = [chain, made]
    if isinstance(loss, Trace_ELBO):
        pair = [relax(f, tau=0.2) for f in pair]
    params = train(*pair, loss, steps=200)
    found = marginals(made, params)["z"]
    assert (found[:, 2] == 0).all() and (found[:, :2] > 0.03).all()
    assert all(np.isfinite(x).all() for x in params.values())
