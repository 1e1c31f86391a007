"""The Laplace Bridge: it is the Laplace approximation in logit space, and its inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp

from relaxit_jax.laplace_bridge import dirichlet_to_gaussian, gaussian_to_dirichlet

pytestmark = pytest.mark.usefixtures("fast_compilation")
ALPHAS = np.array([[0.3, 2.0, 9.0, 1.0], [5.0, 5.0, 0.7, 40.0]])


@pytest.mark.whole
def test_it_is_the_laplace_approximation_of_the_dirichlet_on_the_logits():
    """loc is the mode of the density of y, z = softmax(y), and the covariance its inverse Hessian."""
    with jax.enable_x64(True):
        locs, covariances = dirichlet_to_gaussian(jnp.asarray(ALPHAS))
        for alpha, loc, covariance in zip(ALPHAS, locs, covariances, strict=True):
            energy = lambda y, alpha=alpha: -jnp.sum(alpha * jax.nn.log_softmax(y))
            np.testing.assert_allclose(jax.grad(energy)(loc), 0, atol=1e-9)
            hessian = jax.hessian(energy)(loc)
            np.testing.assert_allclose(jnp.linalg.pinv(hessian, rtol=1e-10), covariance, atol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("k", [2, 3, 50])
def test_round_trip(k, dtype):
    alpha = np.exp(np.random.default_rng(k).uniform(-3, 3, (5, 4, k)))
    alpha = jnp.asarray(alpha, dtype)
    loc, covariance = dirichlet_to_gaussian(alpha)
    assert loc.dtype == covariance.dtype == dtype
    assert covariance.shape == (5, 4, k, k)
    back = gaussian_to_dirichlet(loc, covariance)
    assert back.dtype == dtype
    rtol = 1e-4 if dtype == jnp.float32 else 40 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(back, float), np.asarray(alpha, float), rtol=rtol)


@pytest.mark.parametrize("spread", [1e-6, 1e6])
def test_round_trip_of_very_different_concentrations(spread):
    alpha = jnp.array([spread, 1.0, 1 / spread, 3.0])
    np.testing.assert_allclose(gaussian_to_dirichlet(*dirichlet_to_gaussian(alpha)), alpha, rtol=1e-3)


def test_the_gauge_does_not_matter():
    """softmax sees neither a constant added to all logits nor noise common to all of them."""
    loc, covariance = dirichlet_to_gaussian(jnp.asarray(ALPHAS, jnp.float32))
    common = jnp.array([0.3, -1.0, 2.0, 0.5])
    moved = covariance + 2.0 + common[:, None] + common  # Cov of y + c 1 for any correlated c
    np.testing.assert_allclose(gaussian_to_dirichlet(loc + 7, moved), ALPHAS, rtol=1e-3)


def test_covariance_not_standard_deviation():
    loc, covariance = dirichlet_to_gaussian(jnp.asarray(ALPHAS, jnp.float32))
    np.testing.assert_allclose(covariance.sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(loc.sum(-1), 0, atol=1e-5)
    four = gaussian_to_dirichlet(loc, 4 * covariance)  # twice the standard deviation
    np.testing.assert_allclose(4 * four, ALPHAS, rtol=1e-4)


@pytest.mark.whole
def test_gradients():
    alpha = jnp.asarray(ALPHAS, jnp.float32)
    loss = lambda alpha: sum(jnp.sum(jnp.cos(x)) for x in dirichlet_to_gaussian(alpha))
    slope = jax.grad(loss)(alpha)
    assert jnp.isfinite(slope).all() and (slope != 0).all()
    weights = jnp.arange(1.0, 5)
    there_and_back = lambda alpha: jnp.sum(weights * gaussian_to_dirichlet(*dirichlet_to_gaussian(alpha)))
    np.testing.assert_allclose(jax.grad(there_and_back)(alpha), jnp.tile(weights, (2, 1)), rtol=1e-3)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_logits_far_apart(k, dtype):
    """Spans reach 200, where alpha exceeds float32: its logarithm, and each alpha that fits."""
    rng = np.random.default_rng(k)
    span = np.array([0, 1, 10, 80, 90, 100, 150, 200])
    loc = (span[:, None] * np.linspace(0, 1, k)).astype(dtype)
    a = rng.normal(size=(k, k))
    covariance = (a @ a.T + np.eye(k)).astype(dtype)
    weights = np.cos(np.arange(k))

    centred = loc - loc.astype(float).mean(-1, keepdims=True)
    project = np.eye(k) - 1 / k
    variance = (project @ covariance.astype(float) @ project).diagonal()
    log_spread = centred + sp.logsumexp(-centred, -1, keepdims=True) - 2 * np.log(k)
    with np.errstate(divide="ignore"):
        exact = np.logaddexp(log_spread, np.log(1 - 2 / k)) - np.log(variance)
    largest = np.log(float(np.finfo(dtype).max))
    fits, small = exact < largest, exact < 80
    eps = 30 * float(np.finfo(dtype).eps)

    @jax.jit
    def of(loc):
        log_alpha = gaussian_to_dirichlet(loc, covariance, log_space=True)
        mean, pull = jax.vjp(
            lambda l: jax.nn.softmax(gaussian_to_dirichlet(l, covariance, log_space=True)), loc
        )
        alpha, pull_alpha = jax.vjp(lambda l: gaussian_to_dirichlet(l, covariance), loc)
        return log_alpha, mean, pull(mean * weights)[0], alpha, pull_alpha(jnp.where(small, 1 / alpha, 0))[0]

    with jax.enable_x64(dtype == np.float64):
        log_alpha, mean, slope, alpha, slope_of_log = map(np.asarray, of(jnp.asarray(loc)))
    assert log_alpha.dtype == alpha.dtype == dtype
    np.testing.assert_allclose(log_alpha, exact, rtol=eps, atol=eps)
    np.testing.assert_allclose(mean, sp.softmax(exact, -1), rtol=100 * eps, atol=1e-37)
    assert (np.isinf(alpha) == ~fits).all() and fits.all() == (dtype == np.float64)
    np.testing.assert_allclose(np.log(alpha[fits]), exact[fits], rtol=eps, atol=eps)

    # d log alpha_i / d loc_j, by the share of the spread in alpha_i; both are centered
    share = np.exp(log_spread - np.log(variance) - exact)
    jacobian = share[..., None] * (np.eye(k) - sp.softmax(-centred, -1)[:, None, :]) @ project
    np.testing.assert_allclose(slope_of_log, np.einsum("ni,nij->nj", small, jacobian), rtol=1e-4, atol=1e-4)
    p = sp.softmax(exact, -1)
    through_mean = p * (p * weights - (p * p * weights).sum(-1, keepdims=True))
    np.testing.assert_allclose(slope, np.einsum("ni,nij->nj", through_mean, jacobian), atol=1e-5)


def test_low_precision_overflows_alone():
    """float16 ends at 65,504; log alpha is in float32 then, and the mean is right."""
    loc, covariance = jnp.array([0.0, 8.0, 16.0], jnp.float16), jnp.eye(3, dtype=jnp.float16)
    alpha = gaussian_to_dirichlet(loc, covariance)
    log_alpha = gaussian_to_dirichlet(loc, covariance, log_space=True)
    assert alpha.dtype == jnp.float16 and log_alpha.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.isinf(alpha), [False, False, True])
    np.testing.assert_allclose(jnp.exp(log_alpha[:2]), alpha[:2], rtol=1e-3)
    assert jnp.isfinite(jax.nn.softmax(log_alpha)).all()


def test_bad_numbers_are_seen_under_a_trace():
    forth, back = jax.jit(dirichlet_to_gaussian), jax.jit(gaussian_to_dirichlet)
    for bad in (0.0, -1.0, np.nan):
        assert all(jnp.isnan(x).any() for x in forth(jnp.array([1.0, bad])))
        assert jnp.isnan(back(jnp.zeros(2), jnp.diag(jnp.array([1.0, bad])))).any()
    assert jnp.isnan(back(jnp.array([0.0, jnp.nan]), jnp.eye(2))).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="concentration must be positive"):
        dirichlet_to_gaussian(jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="concentration must be of at least two classes"):
        dirichlet_to_gaussian(jnp.ones(1))
    with pytest.raises(ValueError, match=r"covariance must be of shape \(\.\.\., 3, 3\)"):
        gaussian_to_dirichlet(jnp.zeros(3), jnp.eye(2))
    with pytest.raises(ValueError, match="covariance must be positive on its diagonal"):
        gaussian_to_dirichlet(jnp.zeros(3), -jnp.eye(3))
    with pytest.raises(ValueError, match="concentration must be floating point"):
        dirichlet_to_gaussian(jnp.array([1, 2]))
