"""`relax` finds the known posteriors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats as st
from numpyro.infer import SVI, Trace_ELBO

import posteriors
from relaxit_jax import distributions as rd
from relaxit_jax.handlers import relax, unrounded

pytestmark = pytest.mark.whole

quick = pytest.mark.usefixtures("fast_compilation")
KEY = jax.random.key(20261122)


# The bias of the relaxation is proportional to tau and to the curvature of the log-likelihood between two
# values. The far mixture has four times the curvature of the mixture, so it misses 0.04 and is only in the
# benchmark. Of the others, only the mixture runs longer than it takes to compile with all optimizations.
@pytest.mark.parametrize("name", sorted(set(posteriors.PROBLEMS) - {"far mixture"}))
def test_known_posteriors(name, request):
    if name != "mixture":
        request.getfixturevalue("fast_compilation")
    problem = posteriors.PROBLEMS[name]
    found = posteriors.train(problem, tau=0.1, steps=3000)
    assert posteriors.error(found, problem.answer()) < 0.04
    if name == "spike and slab":
        assert set(np.flatnonzero(found["on"] > 0.5)) == {0, 3, 7}  # the support the data were made with


@quick
def test_a_poisson_guide_finds_the_best_rate():
    """A hand-written guide from a family that does not contain the posterior."""

    def guide():
        rate = numpyro.param("rate", 4.0, constraint=dist.constraints.positive)
        numpyro.sample("z", dist.Poisson(rate))

    k = np.arange(40)
    log_joint = st.poisson(4).logpmf(k) + st.norm(k, 2).logpdf(6.5)
    bound = lambda rate: np.sum(st.poisson(rate).pmf(k) * (log_joint - st.poisson(rate).logpmf(k)))
    rates = np.linspace(2, 10, 2001)
    best = rates[np.argmax([bound(rate) for rate in rates])]
    soft = functools.partial(relax, tau=0.1, num_values=40)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
    svi = SVI(soft(posteriors.poisson), soft(guide), optimizer, Trace_ELBO(num_particles=20))
    found = svi.run(KEY, 1500, progress_bar=False).params["rate"]
    np.testing.assert_allclose(found, best, rtol=0.02)


def test_draws_whose_largest_weight_rounds_to_one():
    """Compiled with its gradient, a draw is computed in more than one way: its log z may end above 0."""

    def loss(loc, key):
        def site(loc):
            with numpyro.plate("b", 5, dim=-1), numpyro.plate("a", 4, dim=-2):
                numpyro.sample("z", rd.LogisticNormalSoftmax(loc=loc * 100, scale=50.0).expand([4, 5]))

        fixed = jnp.array([0.3, -0.7, 1.1])
        return Trace_ELBO(num_particles=3).loss(
            key, {}, unrounded(lambda: site(fixed)), unrounded(lambda: site(loc))
        )

    compiled = jax.jit(jax.value_and_grad(loss))
    for key in jax.random.split(KEY, 5):
        value, gradient = compiled(jnp.array([0.3, -0.7, 1.1]), key)
        assert abs(value) < 1e-3 and jnp.isfinite(gradient).all()
