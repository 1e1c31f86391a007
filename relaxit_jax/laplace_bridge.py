"""The Laplace Bridge between Dirichlet distributions and Gaussians on the logits."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax._placement import where


def dirichlet_to_gaussian(concentration: ArrayLike) -> tuple[Array, Array]:
    """Convert a Dirichlet to a Gaussian in logit space, by a Laplace approximation there.

    ``mu_i = log alpha_i - mean log alpha``;
    ``Sigma_ij = delta_ij / alpha_i - (1/alpha_i + 1/alpha_j - (1/K) sum 1/alpha) / K``.

    Sigma is a covariance (its diagonal holds variances) and is singular along the all-ones vector,
    which softmax does not see. For a `scale_tril` of the same law on the simplex, add any positive
    constant c to all its entries: ``jnp.linalg.cholesky(covariance + c)``.

    Args:
      concentration: alpha, positive, shape (..., K) with K >= 2.

    Returns:
      ``(loc, covariance)`` of shapes (..., K) and (..., K, K), in the dtype of ``concentration``.

    Raises:
      ValueError: for a ``concentration`` that is not positive, is not floating point, or has fewer
        than two classes.

    References:
      M. Hobbhahn, A. Kristiadi, P. Hennig (2022), Fast Predictive Uncertainty for Classification
      with Bayesian Deep Networks, arXiv:2003.01227.

    >>> loc, covariance = dirichlet_to_gaussian(jnp.array([1.0, 1.0]))
    >>> covariance
    Array([[ 0.5, -0.5],
           [-0.5,  0.5]], dtype=float32)
    """
    arg.require_event("concentration", concentration)
    dtype, alpha = arg.widen(concentration=concentration)
    alpha = arg.as_positive("concentration", concentration, alpha.dtype)
    k = _at_least_two("concentration", alpha)
    log_alpha, inverse = jnp.log(alpha), 1 / alpha
    loc = log_alpha - jnp.mean(log_alpha, -1, keepdims=True)
    pairs = inverse[..., :, None] + inverse[..., None, :]
    shared = (pairs - jnp.mean(inverse, -1)[..., None, None]) / k
    # 1 - 2/K first: on the diagonal 1/alpha - 2/(K alpha) would cancel, completely so for K = 2
    diagonal = inverse * (1 - 2 / k) + jnp.mean(inverse, -1, keepdims=True) / k
    covariance = where(jnp.eye(k, dtype=bool), diagonal[..., None], -shared)
    return loc.astype(dtype), covariance.astype(dtype)


def gaussian_to_dirichlet(loc: ArrayLike, covariance: ArrayLike, *, log_space: bool = False) -> Array:
    """Convert a Gaussian in logit space to the Dirichlet with this Laplace approximation.

    ``alpha_k = (1 - 2/K + exp(mu_k)/K^2 sum_l exp(-mu_l)) / Sigma_kk``, with mu and Sigma first
    projected by ``I - 11^T/K``: the formula holds for logits that sum to 0, and softmax does not see
    the difference. It inverts `dirichlet_to_gaussian` exactly. If a covariance grows by a factor,
    alpha shrinks by that factor, so the mean of the Dirichlet, ``alpha / sum alpha``, does not depend
    on the size of the covariance; the total of alpha does.

    Args:
      loc: mu, shape (..., K) with K >= 2.
      covariance: Sigma, shape (..., K, K): variances on its diagonal, not standard deviations.
      log_space: return ``log alpha`` in float32 or wider. Its softmax is the mean of the Dirichlet,
        even where ``alpha`` itself overflows.

    Returns:
      The concentration, shape (..., K), in the promoted dtype of ``loc`` and ``covariance``. It grows
      with the exponential of the distance between two logits: logits that are 90 apart have
      concentrations near 1e39, which are inf in float32. Such an entry has gradient 0 and leaves the
      others and their gradients right.

    Raises:
      ValueError: for shapes that do not fit together, fewer than two classes, dtypes that are not
        floating point, or a diagonal that is not positive.

    References:
      M. Hobbhahn, A. Kristiadi, P. Hennig (2022), arXiv:2003.01227.

    >>> alpha = jnp.array([0.5, 2.0, 30.0])
    >>> gaussian_to_dirichlet(*dirichlet_to_gaussian(alpha)).round(4)
    Array([ 0.5,  2. , 30. ], dtype=float32)
    """
    arg.require_flags(log_space=log_space)
    arg.require_event("loc", loc)
    dtype, loc, covariance = arg.widen(loc=loc, covariance=covariance)
    k = _at_least_two("loc", loc)
    arg.require_square("covariance", covariance, k)
    arg.require_values(
        "covariance", covariance, "positive on its diagonal",
        lambda a: a.diagonal(axis1=-2, axis2=-1) > 0,
    )  # fmt: skip
    arg.batch_shape(None, loc=loc.shape[:-1], covariance=covariance.shape[:-2])
    loc = loc - jnp.mean(loc, -1, keepdims=True)
    rows = jnp.mean(covariance, -1) + jnp.mean(covariance, -2)
    everything = jnp.mean(covariance, (-2, -1))[..., None]
    diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    variance = where(diagonal > 0, diagonal - rows + everything, jnp.nan)
    log_spread = loc + logsumexp(-loc, -1, keepdims=True) - 2 * math.log(k)
    least = 1 - 2 / k
    log_variance = jnp.log(variance)
    if log_space:
        return (jnp.logaddexp(log_spread, math.log(least)) if least else log_spread) - log_variance
    log_alpha = log_spread - log_variance
    too_large = log_alpha >= math.log(float(jnp.finfo(loc.dtype).max))
    alpha = least / where(too_large, 1, variance) + jnp.exp(where(too_large, 0, log_alpha))
    return where(too_large, jnp.inf, alpha).astype(dtype)


def _at_least_two(name, x):
    arg.require(x.shape[-1] >= 2, name, "of at least two classes", f"shape {x.shape}")
    return x.shape[-1]
