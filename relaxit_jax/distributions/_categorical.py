"""Points of the simplex as NumPyro distributions."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma, gammaln, polygamma
from jax.typing import ArrayLike
from numpyro.distributions import Dirichlet, constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import samplers
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd


class GumbelSoftmax(sd.OneHot):
    """Relaxed one-hot vectors (Gumbel-softmax, Concrete), see `relaxit_jax.gumbel_softmax`.

    ``z = softmax((logits + G) / tau)``, G standard Gumbel.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `OneHotCategorical`, for no ``tau``, or for shapes that do not broadcast.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> GumbelSoftmax(logits=jnp.zeros(3), tau=0.5).sample(jax.random.key(0)).sum().round(5)
    Array(1., dtype=float32)
    """

    tau: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    support: ct.Constraint = ct.simplex
    _sampler = staticmethod(samplers.gumbel_softmax)
    _density = staticmethod(samplers.gumbel_softmax_log_prob)
    _log_space = "log"

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs, tau=tau)


def RelaxedOneHotCategorical(
    temperature: ArrayLike,
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    *,
    validate_args: bool | None = None,
) -> GumbelSoftmax:
    """`GumbelSoftmax` with Pyro's signature.

    >>> RelaxedOneHotCategorical(0.5, logits=jnp.zeros(3)).event_shape
    (3,)
    """
    sd.check_temperature(temperature, validate_args)
    return GumbelSoftmax(logits=logits, tau=temperature, probs=probs, validate_args=validate_args)


class InvertibleGaussian(sd.SamplerDistribution):
    """Softmax++ of a Gaussian, see `relaxit_jax.invertible_gaussian`.

    ``z_k = exp(y_k / tau) / (sum_j exp(y_j / tau) + delta)`` for k < K, ``y ~ N(loc, scale^2)``.

    Args:
      loc: means, shape (..., K - 1).
      scale: standard deviations, positive, broadcasting against ``loc``.
      tau: temperature, positive, of the batch shape.
      delta: weight of the last class, positive, of the batch shape.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for shapes that do not broadcast or, if validated, values outside their ranges.

    References:
      A. Potapczynski, G. Loaiza-Ganem, J. P. Cunningham (2020), arXiv:1912.09588.

    >>> InvertibleGaussian(loc=jnp.zeros(2), scale=jnp.ones(2), tau=0.5).event_shape
    (3,)
    """

    loc: Array
    scale: Array
    tau: Array
    delta: Array
    arg_constraints: dict[str, Any] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "tau": constraints.positive,
        "delta": constraints.positive,
    }
    support: ct.Constraint = ct.simplex
    _sampler = staticmethod(samplers.invertible_gaussian)
    _density = staticmethod(samplers.invertible_gaussian_log_prob)
    _log_space = "log"
    _per_coordinate = ("scale",)
    _event = staticmethod(lambda shapes: (shapes["loc"][-1] + 1,))

    def __init__(
        self,
        *,
        loc: ArrayLike,
        scale: ArrayLike,
        tau: ArrayLike,
        delta: ArrayLike = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, loc=loc, scale=scale, tau=tau, delta=delta)


class LogisticNormalSoftmax(sd.SamplerDistribution):
    """Softmax of a Gaussian, see `relaxit_jax.logistic_normal`.

    ``z = softmax(y)``, ``y ~ N(loc, Sigma)`` in R^K, Sigma ``diag(scale^2)`` or
    ``scale_tril scale_tril^T``.

    Args:
      loc: means, shape (..., K).
      scale: standard deviations, positive, shape (..., K). Pass this or ``scale_tril``.
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
    # both can be read, whichever was passed
    scale: Array = sd.derived(lambda d: jnp.sqrt(jnp.sum(d.scale_tril**2, -1)))
    scale_tril: Array = sd.derived(lambda d: _diagonal(d.scale))
    arg_constraints: dict[str, Any] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "scale_tril": constraints.lower_cholesky,
    }
    pytree_data_fields: tuple[str, ...] = tuple(arg_constraints)
    support: ct.Constraint = ct.simplex
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
        """Sigma, the covariance of the logits, shape (..., K, K)."""
        a = self.scale_tril
        covariance = jnp.matmul(a, jnp.matrix_transpose(a), precision="highest")
        return jnp.broadcast_to(covariance, self.batch_shape + 2 * self.event_shape)


# --- KL ---------------------------------------------------------------------------------------


@_kl.kl_rule((InvertibleGaussian, InvertibleGaussian))
def _kl_of_invertible_gaussians(p, q):
    """The KL between the Gaussian log-ratios, ``log z_k - log z_K``."""
    _, loc, other_loc, scale, other = arg.widen(a=p.loc, b=q.loc, c=p.scale, d=q.scale)
    if not (_kl.known_equal("tau", p, q) and _kl.known_equal("delta", p, q)):
        (loc, scale), (other_loc, other) = (
            (loc / d.tau[..., None] - jnp.log(d.delta)[..., None], scale / d.tau[..., None])
            for d, loc, scale in ((p, loc, scale), (q, other_loc, other))
        )
    ratio = scale / other
    # ratio^2 - 1 - log ratio^2 without cancellation near 1
    excess = (ratio - 1) * (ratio + 1) - 2 * jnp.log(ratio)
    return jnp.sum(((loc - other_loc) / other) ** 2 + excess, -1) / 2


@_kl.kl_rule((LogisticNormalSoftmax, LogisticNormalSoftmax))
def _kl_of_logistic_normals(p, q):
    """The KL between the Gaussians of the K - 1 log-ratios."""
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


@_kl.kl_rule((Dirichlet, LogisticNormalSoftmax))
def _kl_of_dirichlet_and_logistic_normal(p, q):
    """-H(Dirichlet) - E log q, where log z has mean psi(a_k) - psi(a_0) and variance psi1(a_k)."""
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
    """Half the log-determinant of the covariance of the log-ratios, for a diagonal Sigma."""
    smallest = jnp.min(scale, -1, keepdims=True)
    log_total = jnp.log(jnp.sum((smallest / scale) ** 2, -1)) - 2 * jnp.log(smallest[..., 0])
    return jnp.sum(jnp.log(scale), -1) + log_total / 2


def _mean_square(shift, variance, scale):
    """E sum_k w_k (r_k - m)^2 for r with this mean and variance, w = 1/scale^2, m the weighted mean of r."""
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
        _, a = arg.widen(scale_tril=sd.without_batch_of_one(d.scale_tril, 2))
    rows = a[..., :-1, :] - a[..., -1:, :]
    return lm.lower_factor(rows)


def _solve(factor, matrix):
    """factor^-1 matrix, with broadcast batches."""
    batch = jnp.broadcast_shapes(factor.shape[:-2], matrix.shape[:-2])
    factor, matrix = (jnp.broadcast_to(x, batch + x.shape[-2:]) for x in (factor, matrix))
    return lm.solve_lower_matrix(factor, matrix)


def _log_det(factor):
    return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))), -1)
