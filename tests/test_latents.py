"""The counts of the autoencoder: their laws, KL and importance ratios against SciPy's, in float64."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

import latents

KEY = jax.random.key(11)
N = 40_000
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
LARGEST = 2.5
LAWS = {
    latents.Counts: lambda p: stats.poisson(LARGEST * p),
    latents.GeometricCounts: lambda p: stats.geom(1 / (1 + LARGEST * p), loc=-1),
    latents.BinomialCounts: lambda p: stats.binom(3, p),  # the largest mean, rounded up
    latents.NegativeBinomialCounts: lambda p: stats.nbinom(4, 4 / (4 + LARGEST * p)),
}


@pytest.fixture(params=LAWS, ids=lambda family: family.__name__)
def case(request):
    """A family of three counts, q and the prior, and their float64 probabilities, with the tail added."""
    family = request.param(types.SimpleNamespace(latents=3, largest_mean=LARGEST))
    q, prior = jnp.array([-1.5, 0.3, 2.0]), jnp.array([0.0, -0.7, 1.0])
    exact = [folded(LAWS[request.param](expit(np.asarray(x, float))[:, None]), family) for x in (q, prior)]
    return family, q, {"prior": prior}, *exact


def folded(law, family):
    values = np.arange(family.values.size)
    return np.concatenate([law.pmf(values[:-1]), law.sf(values[-2])], -1)


def test_little_is_left_out_and_no_value_could_go(case):
    family = case[0]
    law = LAWS[type(family)](1.0)  # at the largest mean
    last = family.values.size - 1
    assert law.sf(last) < family.EPS <= law.sf(last - 1) or law.sf(last) == 0


def test_kl_is_the_sum_over_all_values(case):
    family, q, g, p, prior = case
    np.testing.assert_allclose(family.kl(KEY, q, g), np.sum(p * np.log(p / prior)), rtol=1e-5)


def test_draws_have_their_law_and_ratio(case):
    """Frequencies by a chi-squared test; the ratio agrees with float64 laws, so its mean of exp is 1."""
    family, q, g, p, prior = case
    z, ratio = jax.jit(jax.vmap(lambda key: family.draw(key, q, g)))(jax.random.split(KEY, N))
    from_prior = jax.jit(lambda key: family.draw_prior(key, g, N))(KEY)
    for draws, law in ((z, p), (from_prior, prior)):
        for k in range(3):
            assert chi_squared(np.asarray(draws[:, k], int), law[k]) > 1e-5
    place = (np.arange(3), np.asarray(z, int))
    np.testing.assert_allclose(ratio, np.log(prior / p)[place].sum(-1), atol=1e-4)
    weights = np.exp(np.asarray(ratio, float))
    assert abs(weights.mean() - 1) < 4.5 * weights.std() / np.sqrt(N)


def chi_squared(draws, law):
    """The p-value; values expected fewer than ten times are counted together."""
    seen, rare = np.bincount(draws, minlength=len(law)), law * N < 10
    seen, law = (np.append(x[~rare], x[rare].sum()) for x in (seen, law))
    return stats.chisquare(seen[law > 0], law[law > 0] * N).pvalue


def test_gradient_of_the_kl_is_that_of_differences_in_float64(case):
    family, q, g, _, prior = case
    step = 1e-5

    def kl(x):
        p = folded(LAWS[type(family)](expit(x)[:, None]), family)
        return np.sum(p * np.log(p / prior), -1)

    centre = np.asarray(q, float)
    slope = (kl(centre + step) - kl(centre - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(lambda q: family.kl(KEY, q, g))(q), slope, rtol=1e-3, atol=1e-5)
