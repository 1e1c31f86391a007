"""Counts without a bound, or of a given one, become a list of values and their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from relaxit_jax.handlers import _site

pytestmark = pytest.mark.usefixtures("fast_compilation")

COUNTS = {
    "poisson": (dist.Poisson(np.array([0.1, 4.0, 30.0])), st.poisson(np.array([0.1, 4.0, 30.0]))),
    "large poisson": (dist.Poisson(400.0), st.poisson(400.0)),
    "geometric": (dist.Geometric(0.3), st.geom(0.3, loc=-1)),
    "geometric logits": (dist.Geometric(logits=-2.0), st.geom(1 / (1 + np.exp(2.0)), loc=-1)),
    "negative binomial": (dist.NegativeBinomialProbs(3.0, 0.6), st.nbinom(3.0, 0.4)),
    "binomial": (dist.Binomial(np.array([3, 12]), 0.3), st.binom(np.array([3, 12]), 0.3)),
    "uniform": (
        dist.DiscreteUniform(np.array([2, 4]), np.array([9, 6])),
        st.randint(np.array([2, 4]), np.array([10, 7])),
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", COUNTS)
def test_truncated_counts(name):
    """Less than 1e-6 is beyond the last value and added to it; the moments agree with SciPy to 1e-3."""
    d, exact = COUNTS[name]
    law = _site.law_of("n", d)
    p, values = np.exp(np.asarray(law.log_pmf, np.float64)), law.values.astype(float)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    assert np.max(exact.sf(values[-1])) < 1e-6
    expected = exact.pmf(values[(slice(None), *(None,) * len(d.batch_shape))])
    np.testing.assert_allclose(p[..., :-1], np.moveaxis(expected, 0, -1)[..., :-1], rtol=1e-3, atol=1e-7)
    mean = (p * values).sum(-1)
    np.testing.assert_allclose(mean, exact.mean(), rtol=1e-3)
    np.testing.assert_allclose((p * (values - mean[..., None]) ** 2).sum(-1), exact.var(), rtol=1e-3)


@pytest.mark.whole
def test_a_tail_is_folded_into_the_last_value():
    law = _site.law_of("n", dist.Poisson(4.0), num_values=6)
    expected = [*st.poisson(4).pmf(range(5)), st.poisson(4).sf(4)]
    np.testing.assert_allclose(jnp.exp(law.log_pmf), expected, rtol=1e-5)
    short = _site.law_of("n", dist.Binomial(10, 0.3), num_values=4)  # of a count with a bound, too
    expected = [*st.binom(10, 0.3).pmf(range(3)), st.binom(10, 0.3).sf(2)]
    np.testing.assert_allclose(jnp.exp(short.log_pmf), expected, rtol=1e-5)
    slope = jax.grad(lambda rate: _site.law_of("n", dist.Poisson(rate), 6).log_pmf[-1])(4.0)
    h = 1e-4
    ends = [np.log(st.poisson(4 + step).sf(4)) for step in (h, -h)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-4)
    far = jax.grad(lambda rate: _site.law_of("n", dist.Poisson(rate), 60).log_pmf[-1])(0.5)
    assert np.isfinite(far)  # where one minus the rest is 0
