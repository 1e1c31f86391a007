"""The logistic-normal distribution, and the Laplace Bridge between it and the Dirichlet."""

import math
from typing import Any, overload

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma, gammaln, polygamma
from jax.typing import ArrayLike
from numpyro.distributions import Dirichlet, Distribution, constraints
from numpyro.distributions.distribution import ExpandedDistribution

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import laplace_bridge, samplers
from relaxit_jax.distributions import _base as base


class LogisticNormalSoftmax(base.SamplerDistribution):
    """Softmax of a Gaussian, `relaxit_jax.logistic_normal`.

    ``z = softmax(y)``, ``y ~ N(loc, Sigma)`` in R^K, Sigma ``diag(scale^2)`` or
    ``scale_tril scale_tril^T``.

    Args:
      loc: means, shape (..., K).
      scale: standard deviations, positive, shape (..., K). Give this or the next.
      scale_tril: Cholesky factor of Sigma, shape (..., K, K).
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``scale`` and ``scale_tril``, shapes that do not fit, or,
        if validated, values outside their ranges.

    References:
      J. Aitchison, S. M. Shen (1980), Logistic-normal distributions: some properties and uses,
      Biometrika 67.

    >>> LogisticNormalSoftmax(loc=jnp.zeros(3), scale_tril=jnp.eye(3)).event_shape
    (3,)
    """

    loc: Array
    # both can be read, whichever was given
    scale: Array = base.derived(lambda d: jnp.sqrt(jnp.sum(d.scale_tril**2, -1)))
    scale_tril: Array = base.derived(lambda d: _diagonal(d.scale))
    arg_constraints: dict[str, Any] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "scale_tril": constraints.lower_cholesky,
    }
    pytree_data_fields: tuple[str, ...] = tuple(arg_constraints)
    support: base.Constraint = base.simplex
    _sampler = staticmethod(samplers.logistic_normal)
    _density = staticmethod(samplers.logistic_normal_log_prob)
    _log_space = "log"
    _either = ("scale", "scale_tril")
    _per_coordinate = ("scale",)
    _event = staticmethod(lambda shapes: shapes["loc"][-1:])

    def __init__(
        self,
        *,
        loc: ArrayLike,
        scale: ArrayLike | None = None,
        scale_tril: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        arg.require(
            (scale is None) != (scale_tril is None), "scale", "given, or else scale_tril", "both or neither"
        )
        super().__init__(validate_args, loc=loc, scale=scale, scale_tril=scale_tril)

    @property
    def covariance_matrix(self) -> Array:
        """Sigma, of the logits, shape (..., K, K)."""
        a = self.scale_tril
        covariance = jnp.matmul(a, jnp.matrix_transpose(a), precision="highest")
        return jnp.broadcast_to(covariance, self.batch_shape + 2 * self.event_shape)


# --- the Laplace Bridge -----------------------------------------------------------------------


@overload
def to_logistic_normal(dirichlet: Dirichlet) -> LogisticNormalSoftmax: ...
@overload
def to_logistic_normal(dirichlet: Distribution) -> Any: ...
def to_logistic_normal(dirichlet: Distribution) -> Distribution:
    """The logistic-normal close to a Dirichlet: its Laplace approximation in logit space.

    ``relaxit_jax.laplace_bridge.dirichlet_to_gaussian``, whose covariance is singular along the
    all-ones vector; softmax does not see what is added there to factor it.

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
    # of the size of the others, so that the factor is as well conditioned as it can be
    extra = jnp.mean(jnp.diagonal(covariance, axis1=-2, axis2=-1), -1)[..., None, None]
    factor = pl.whole(jnp.linalg.cholesky, covariance + extra)
    return LogisticNormalSoftmax(loc=loc.astype(dtype), scale_tril=factor.astype(dtype))


@overload
def to_dirichlet(logistic_normal: LogisticNormalSoftmax) -> Dirichlet: ...
@overload
def to_dirichlet(logistic_normal: Distribution) -> Any: ...
def to_dirichlet(logistic_normal: Distribution) -> Distribution:
    """The Dirichlet close to a logistic-normal, which inverts `to_logistic_normal` exactly.

    ``relaxit_jax.laplace_bridge.gaussian_to_dirichlet``.

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


# --- KL ---------------------------------------------------------------------------------------


@base.kl_rule((LogisticNormalSoftmax, LogisticNormalSoftmax))
def _kl_of_logistic_normals(p, q):
    """That of the Gaussians of the K - 1 log-ratios."""
    half = (p.event_shape[-1] - 1) / 2
    _, loc, other_loc = arg.widen(p=p.loc, q=q.loc)
    shift = loc - other_loc
    if _is_diagonal(p) and _is_diagonal(q):
        _, scale, other = arg.widen(p=p.scale, q=q.scale)
        return _log_volume(other) - _log_volume(scale) - half + _mean_square(shift, scale**2, other) / 2
    a, b = _ratio_factor(p), _ratio_factor(q)
    spread = _solve(b, a)
    white = lm.solve_lower(b, _ratios(shift))
    square = jnp.sum(spread**2, (-2, -1)) + jnp.sum(white**2, -1)
    return square / 2 - half + _log_det(b) - _log_det(a)


@base.kl_rule((Dirichlet, LogisticNormalSoftmax))
def _kl_of_dirichlet_and_logistic_normal(p, q):
    """-H(Dirichlet) - E log q, in which log z has mean psi(a_k) - psi(a_0) and variance psi1(a_k)."""
    _, a, loc = arg.widen(p=p.concentration, q=q.loc)
    k = a.shape[-1]
    total = jnp.sum(a, -1)
    m = digamma(a) - digamma(total)[..., None]
    negative_entropy = gammaln(total) - jnp.sum(gammaln(a), -1) + jnp.sum((a - 1) * m, -1)
    variance = polygamma(1, a)
    if _is_diagonal(q):
        _, scale = arg.widen(scale=q.scale)
        log_volume, square = _log_volume(scale), _mean_square(m - loc, variance, scale)
    else:
        b = _ratio_factor(q)
        shift = lm.solve_lower(b, _ratios(m - loc))
        # the log-ratios have covariance diag(psi1(a_k)) + psi1(a_K)
        inverse = _solve(b, jnp.eye(k - 1, dtype=b.dtype))
        own = jnp.sum(jnp.sum(inverse**2, -2) * variance[..., :-1], -1)
        shared = jnp.sum(jnp.sum(inverse, -1) ** 2, -1) * variance[..., -1]
        square = jnp.sum(shift**2, -1) + own + shared
        log_volume = _log_det(b)
    return negative_entropy + jnp.sum(m, -1) + (k - 1) / 2 * math.log(2 * math.pi) + log_volume + square / 2


def _is_diagonal(d):
    return "scale" in d.get_args()


def _diagonal(scale):
    return scale[..., None] * jnp.eye(scale.shape[-1], dtype=scale.dtype)


def _log_volume(scale):
    """Half the log-determinant of the log-ratios' covariance, for a diagonal Sigma."""
    smallest = jnp.min(scale, -1, keepdims=True)
    log_total = jnp.log(jnp.sum((smallest / scale) ** 2, -1)) - 2 * jnp.log(smallest[..., 0])
    return jnp.sum(jnp.log(scale), -1) + log_total / 2


def _mean_square(shift, variance, scale):
    """E sum_k w_k (r_k - m)^2 for r of this mean and variance, w = 1/scale^2, m the weighted mean of r."""
    weight = 1 / scale**2
    share = weight / jnp.sum(weight, -1, keepdims=True)
    centred = shift - jnp.sum(share * shift, -1, keepdims=True)
    return jnp.sum(weight * (centred**2 + (1 - share) * variance), -1)


def _ratios(x):
    return x[..., :-1] - x[..., -1:]


def _ratio_factor(d):
    """A lower-triangular factor of the covariance of the K - 1 log-ratios."""
    if _is_diagonal(d):
        _, scale = arg.widen(scale=d.scale)
        a = _diagonal(scale)
    else:
        _, a = arg.widen(scale_tril=base.without_batch_of_one(d.scale_tril, 2))
    rows = a[..., :-1, :] - a[..., -1:, :]
    return lm.lower_factor(rows)


def _solve(factor, matrix):
    """factor^-1 matrix, batches broadcast."""
    batch = jnp.broadcast_shapes(factor.shape[:-2], matrix.shape[:-2])
    factor, matrix = (jnp.broadcast_to(x, batch + x.shape[-2:]) for x in (factor, matrix))
    return lm.solve_lower_matrix(factor, matrix)


def _log_det(factor):
    return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))), -1)
