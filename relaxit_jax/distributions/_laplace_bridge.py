"""The Laplace Bridge between NumPyro's Dirichlet and the logistic-normal."""

from __future__ import annotations

from typing import Any, overload

import jax.numpy as jnp
from numpyro.distributions import Dirichlet, Distribution
from numpyro.distributions.distribution import ExpandedDistribution

from relaxit_jax import _arguments as arg
from relaxit_jax import _placement as pl
from relaxit_jax import laplace_bridge
from relaxit_jax.distributions._categorical import LogisticNormalSoftmax


@overload
def to_logistic_normal(dirichlet: Dirichlet) -> LogisticNormalSoftmax: ...
@overload
def to_logistic_normal(dirichlet: Distribution) -> Any: ...
def to_logistic_normal(dirichlet: Distribution) -> Distribution:
    """Convert a Dirichlet to the logistic-normal close to it (Laplace approximation in logit space).

    Uses ``relaxit_jax.laplace_bridge.dirichlet_to_gaussian``, whose covariance is singular along the
    all-ones vector. A constant is added there to factor it, which softmax does not see.

    Args:
      dirichlet: a `numpyro.distributions.Dirichlet` of any batch shape, expanded or not.

    Returns:
      A `LogisticNormalSoftmax` with a full ``scale_tril``, expanded as ``dirichlet`` is.

    Raises:
      ValueError: for anything but a Dirichlet.

    References:
      M. Hobbhahn, A. Kristiadi, P. Hennig (2022), arXiv:2003.01227.

    >>> to_logistic_normal(Dirichlet(jnp.array([2.0, 2.0]))).loc
    Array([0., 0.], dtype=float32)
    """
    if isinstance(dirichlet, ExpandedDistribution):
        return to_logistic_normal(dirichlet.base_dist).expand(dirichlet.batch_shape)
    d: Any = dirichlet
    arg.require(isinstance(d, Dirichlet), "dirichlet", "a Dirichlet", type(d).__name__)
    dtype, alpha = arg.widen(dirichlet=d.concentration)
    loc, covariance = laplace_bridge.dirichlet_to_gaussian(alpha)
    # as large as the others, so that the factor is as well conditioned as possible
    extra = jnp.mean(jnp.diagonal(covariance, axis1=-2, axis2=-1), -1)[..., None, None]
    factor = pl.whole(jnp.linalg.cholesky, covariance + extra)
    return LogisticNormalSoftmax(loc=loc.astype(dtype), scale_tril=factor.astype(dtype))


@overload
def to_dirichlet(logistic_normal: LogisticNormalSoftmax) -> Dirichlet: ...
@overload
def to_dirichlet(logistic_normal: Distribution) -> Any: ...
def to_dirichlet(logistic_normal: Distribution) -> Distribution:
    """Convert a logistic-normal to the Dirichlet close to it, the exact inverse of `to_logistic_normal`.

    Uses ``relaxit_jax.laplace_bridge.gaussian_to_dirichlet``.

    Args:
      logistic_normal: a `LogisticNormalSoftmax`, diagonal or full, of any batch shape, expanded or
        not.

    Returns:
      A `numpyro.distributions.Dirichlet`, expanded as ``logistic_normal`` is.

    Raises:
      ValueError: for anything but a `LogisticNormalSoftmax`.

    References:
      M. Hobbhahn, A. Kristiadi, P. Hennig (2022), arXiv:2003.01227.

    >>> to_dirichlet(to_logistic_normal(Dirichlet(jnp.array([0.5, 2.0])))).concentration.round(3)
    Array([0.5, 2. ], dtype=float32)
    """
    d: Any = logistic_normal
    if isinstance(d, ExpandedDistribution):
        return to_dirichlet(d.base_dist).expand(d.batch_shape)
    kind = type(d).__name__
    arg.require(isinstance(d, LogisticNormalSoftmax), "logistic_normal", "a LogisticNormalSoftmax", kind)
    loc = jnp.broadcast_to(d.loc, d.batch_shape + d.event_shape)
    return Dirichlet(laplace_bridge.gaussian_to_dirichlet(loc, d.covariance_matrix))
