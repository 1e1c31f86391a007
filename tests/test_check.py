"""`check`: its numbers agree with exact ones, and a model deserves every sentence of its advice."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special as sp
import scipy.stats as st
from numpyro import handlers

from relaxit_jax.handlers import AutoMeanField, AutoStructured, check, select, take
from relaxit_jax.handlers._site import FiniteDiscrete

KEY = jax.random.key(20261130)
pytestmark = pytest.mark.usefixtures("fast_compilation")
P, Y = 0.3, 0.9


def bit(mean=lambda z: z, y=Y):
    z = numpyro.sample("z", dist.Bernoulli(P))
    numpyro.sample("y", dist.Normal(mean(z), 1.0), obs=y)


def bit_guide():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.0)))


@pytest.mark.whole
def test_the_numbers_of_a_bit():
    """At a logit of 1, the ELBO, its gradient and the weighted probability are sums over 0 and 1."""
    q = sp.expit(1.0)
    log_joint = np.log([1 - P, P]) + st.norm([0, 1], 1).logpdf(Y)
    bound = (1 - q) * (log_joint[0] - np.log(1 - q)) + q * (log_joint[1] - np.log(q))
    slope = q * (1 - q) * (log_joint[1] - log_joint[0] - 1.0)
    found = check(bit, bit_guide, {"logits": jnp.array(1.0)}, rival=False, num_samples=4000)
    assert abs(found.bound - bound) < 4.5 * found.bound_error and found.bound_error < 0.03
    site = found.sites["z"]
    np.testing.assert_allclose(site.probs, q, rtol=1e-5)
    np.testing.assert_allclose(site.weighted, sp.softmax(log_joint)[1], atol=0.03)
    assert abs(site.gradient - abs(slope)) < 4.5 * site.noise / 100**0.5
    evidence = sp.logsumexp(log_joint)
    assert abs(found.gap - (evidence - bound)) < 4.5 * found.gap_error + 0.02
    assert site.moved == pytest.approx(q - 0.5, abs=1e-5) and site.swallowed is False


@pytest.mark.whole
def test_the_bias_under_relax():
    """The difference of the mean gradients, for a likelihood that is far from linear between 0 and 1."""
    model = lambda: bit(lambda z: 4.0 * z, y=2.0)
    logit, tau = 1.0, 0.7
    u = (np.arange(200_000) + 0.5) / 200_000
    z = sp.expit((logit + sp.logit(u)) / tau)
    slope_in_z = -(4 * z - 2.0) * 4
    q = sp.expit(logit)
    kl = q * (1 - q) * (logit - sp.logit(P))
    relaxed = np.mean(slope_in_z * z * (1 - z) / tau) - kl
    exact = q * (1 - q) * (st.norm(4, 1).logpdf(2) - st.norm(0, 1).logpdf(2)) - kl
    site = check(model, bit_guide, {"logits": jnp.array(logit)}, tau=tau, rival=False).sites["z"]
    error = np.hypot(site.noise, site.relaxed_noise) / 10
    assert abs(relaxed - exact) > 6 * error
    assert abs(site.relaxed_bias - abs(relaxed - exact)) < 4.5 * error


@pytest.mark.whole
def test_counts_that_do_not_begin_at_zero_and_sites_below():
    """Weighted draws from 3 to 7; and a site that depends on another one in the guide is not held fixed."""
    y = 5.6

    def model():
        n = numpyro.sample("n", dist.DiscreteUniform(3, 7))
        x = numpyro.sample("x", dist.Normal(n, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    log_pmf = st.norm(np.arange(3, 8), 2**0.5).logpdf(y)
    exact = sp.softmax(log_pmf)

    def guide():  # the posterior of n, then that of x given n
        n = numpyro.sample("n", FiniteDiscrete(numpyro.param("logits", jnp.zeros(5)), 3))
        numpyro.sample("x", dist.Normal((n + y) / 2, 0.5**0.5))

    found = check(model, guide, {"logits": jnp.log(exact)}, rival=False)
    np.testing.assert_allclose(found.sites["n"].weighted, exact, atol=4.5 * 0.5 / 1000**0.5)
    assert abs(found.gap) < 1e-3 and found.advice == ()
    assert set(found.refused) == set()


@pytest.mark.whole
def test_refusals_are_said(capsys):
    guide = AutoStructured(exactly_one)
    handlers.seed(guide, 0)()
    params = {"z_auto_logits": jnp.zeros((4, 2)), "z_auto_weights": jnp.zeros((4, 4, 2, 2))}
    found = check(exactly_one, guide, params, num_samples=100, rival=False)
    assert "autoregressive in the guide" in found.refused["relax"]
    assert "refused by relax: The site 'z'" in capsys.readouterr().out


def logit_of(p):
    return {"logits": jnp.array(np.log(p) - np.log1p(-p))}


@pytest.mark.whole
def test_a_probability_that_is_off_is_said_by_weighted_draws():
    """It is off by little: the ELBO alone, .07 nats from the evidence, would not show it."""
    exact = sp.expit(np.log(P / (1 - P)) + st.norm(1, 1).logpdf(Y) - st.norm(0, 1).logpdf(Y))
    found = check(bit, bit_guide, logit_of(exact + 0.18), rival=False)  # by 1,000 draws
    assert (
        len(found.advice) == 1 and "A probability of the site 'z' is off by at least 0.1" in found.advice[0]
    )
    site = found.sites["z"]
    assert abs(site.weighted - exact) < 4.5 * site.weighted_error
    error = (exact * (1 - exact) / 1000) ** 0.5  # of draws with equal weights, near these
    assert 0.3 * error < site.weighted_error < 3 * error
    near = check(bit, bit_guide, logit_of(exact + 0.02), rival=False)
    assert near.advice == ()


def test_a_bound_that_is_hardly_better_counts_where_the_answer_differs():
    """The rival is .15 to 1 nats better, its weights can be trusted, and its answer differs."""
    exact = sp.expit(np.log(P / (1 - P)) + st.norm(1, 1).logpdf(Y) - st.norm(0, 1).logpdf(Y))
    params = logit_of(exact + 0.4)
    found = said("nats better. Train it instead of this guide", bit, bit_guide, params, rival=True)
    assert 0.15 < found.rival[0] - found.bound < 1 and found.rival[2] < 0.7
    assert abs(found.sites["z"].rival - exact) < 0.05


@pytest.mark.whole
def test_nothing_is_wrong_with_an_exact_guide(capsys):
    """All weights are equal, the gap is 0, and the printed text is returned."""
    posterior = np.log(P / (1 - P)) + st.norm(1, 1).logpdf(Y) - st.norm(0, 1).logpdf(Y)
    found = check(bit, bit_guide, {"logits": jnp.array(posterior)}, losses=np.ones(100))
    assert found.advice == () and abs(found.gap) < 1e-4 and found.trend == pytest.approx((0, 0), abs=1e-9)
    assert abs(found.rival[0] - found.bound) < 4.5 * found.rival[1] + 0.01
    assert capsys.readouterr().out == f"{found}\n" and str(found).endswith("Nothing was found that is wrong.")


def said(words, *args, **options):
    found = check(*args, num_samples=200, **({"rival": False} | options))
    assert any(words in sentence for sentence in found.advice), found.advice
    return found


@pytest.mark.whole
def test_a_swallowed_gradient():
    swallowing = lambda: bit(lambda z: jnp.where(z, 1.0, 0.0))
    said("Under relax the site 'z' has no gradient", swallowing, bit_guide, {"logits": jnp.array(1.0)})
    kept = check(
        lambda: bit(lambda z: select(z, 1.0, 0.0)), bit_guide, {"logits": jnp.array(1.0)}, rival=False
    )
    assert not any("no gradient" in sentence for sentence in kept.advice)


@pytest.mark.whole
def test_draws_of_probability_0():
    def model():
        n = numpyro.sample("n", dist.Poisson(4.0))
        numpyro.sample("y", dist.Binomial(n, 0.5), obs=jnp.array(3))

    guide = lambda: numpyro.sample("n", dist.Poisson(numpyro.param("rate", 4.0)))
    found = said("'y' has probability 0 under", model, guide, {"rate": jnp.array(4.0)}, num_values=20)
    share = st.poisson(4).cdf(2)
    assert abs(found.impossible["y"] - share) < 4.5 * (share * (1 - share) / 200) ** 0.5
    assert found.bound == -np.inf


def exactly_one():
    z = numpyro.sample("z", dist.Bernoulli(0.5).expand([4]).to_event(1))
    numpyro.sample("y", dist.Normal(z.sum(), 0.1), obs=1.0)


@pytest.mark.whole
def test_a_family_that_does_not_hold_the_posterior():
    """Independent bits at 1/4 are more than a nat away. The exact law, bit after bit, is not."""
    guide = AutoMeanField(exactly_one)
    handlers.seed(guide, 0)()
    params = {"z_auto_logits": jnp.full(4, float(sp.logit(0.25)))}
    found = said("Try AutoStructured.", exactly_one, guide, params)
    assert found.gap > 2
    guide = AutoStructured(exactly_one)
    handlers.seed(guide, 0)()
    off = np.zeros((4, 4, 2, 2), np.float32)
    off[:, :, 1, 1], off[:, :, 0, 1] = -20, 0  # after a one, no other
    first = np.stack([np.zeros(4), [sp.logit(1 / (4 - i)) if i < 3 else 20.0 for i in range(4)]], -1)
    exact = {"z_auto_logits": jnp.asarray(first, jnp.float32), "z_auto_weights": jnp.asarray(off)}
    exact["z_auto_weights"] = exact["z_auto_weights"].at[:, 3, 1, 1].set(-40)
    found = check(exactly_one, guide, exact, rival=False)
    np.testing.assert_allclose(found.sites["z"].probs, 0.25, atol=0.01)
    assert found.advice == () and found.gap < 0.05 and found.relaxed_bound is None


POINTS = np.concatenate([np.linspace(-4, -3, 10), np.linspace(3, 4, 10)]).astype(np.float32)


def mixture():
    with numpyro.plate("parts", 2):
        loc = numpyro.sample("loc", dist.Normal(0, 3))
    with numpyro.plate("points", 20):
        z = numpyro.sample("z", dist.Categorical(np.full(2, 0.5, np.float32)))
        numpyro.sample("x", dist.Normal(take(loc, z), 1), obs=POINTS)


@pytest.mark.whole
def test_a_start_that_is_not_the_best():
    """All points are in one part and the other one is empty: a separate mode, far below."""
    guide = AutoMeanField(mixture)
    handlers.seed(guide, 0)()
    one = np.tile(np.array([8.0, -8.0], np.float32), (20, 1))
    params = {
        "z_auto_logits": one,
        "loc_auto_loc": jnp.array([0.0, 20.0]),
        "loc_auto_scale": jnp.full(2, 0.1),
    }
    found = said("nats better. Train it instead of this guide", mixture, guide, params, rival=True)
    assert found.rival[0] > found.bound + 30
    two = one * np.where(POINTS < 0, 1, -1)[:, None]
    params = {
        "z_auto_logits": two,
        "loc_auto_loc": jnp.array([-3.5, 3.5]),
        "loc_auto_scale": jnp.full(2, 0.3),
    }
    assert check(mixture, guide, params).advice == ()


@pytest.mark.whole
def test_a_loss_that_still_falls():
    rng = np.random.default_rng(0)
    falling = 100 - 0.1 * np.arange(400) + rng.normal(size=400)
    found = said("The loss is still falling, by", bit, bit_guide, {"logits": jnp.array(0.0)}, losses=falling)
    assert abs(found.trend[0] + 4) < 4.5 * found.trend[1]
    cooled = 5 * (1 + np.cos(np.pi * np.arange(1000) / 1000))  # as the noise of a rate that falls to 0
    for losses in (rng.normal(size=400), cooled + rng.normal(size=1000)):
        at_rest = check(bit, bit_guide, {"logits": jnp.array(0.0)}, losses=losses, rival=False)
        assert not any("still falling" in sentence for sentence in at_rest.advice)


@pytest.mark.whole
def test_a_site_that_has_not_moved():
    far = lambda: bit(lambda z: 3.0 * z, y=3.0)
    found = said("The site 'z' has not moved from its start", far, bit_guide, {"logits": jnp.array(0.0)})
    assert found.sites["z"].moved < 1e-6 < found.sites["z"].gradient


@pytest.mark.whole
def test_a_guide_without_discrete_sites_is_refused():
    with pytest.raises(ValueError, match="guide must be one with discrete latent sites"):
        check(
            lambda: numpyro.sample("x", dist.Normal(0, 1)), lambda: numpyro.sample("x", dist.Normal(0, 1)), {}
        )
