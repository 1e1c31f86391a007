"""Relaxed categorical variables: points of the simplex, with the classes along the last axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_softmax
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _fused as fused
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where


def gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
    hard: bool = False,
    log_space: bool = False,
) -> Array:
    """Sample a relaxed one-hot vector (Gumbel-softmax, Concrete).

    ``z = softmax((logits + G) / tau)``, with G standard Gumbel noise.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature, positive, of the batch shape (no axis for K).
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return the one-hot vector of ``argmax(logits + G)``, an exact categorical draw, with
        the gradient of z (straight-through Gumbel-softmax).
      log_space: return ``log z`` in float32 or wider: z itself rounds to a corner at low tau.

    Returns:
      Points of the simplex of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: for a ``tau`` that is not positive or has an axis for K, a dtype that is not
        floating point, logits without a class axis or all -inf, a ``shape`` the parameters do not
        broadcast to, or ``hard`` together with ``log_space``.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.
      E. Jang, S. Gu, B. Poole (2017), Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144.

    >>> z = gumbel_softmax(jax.random.key(0), jnp.array([0.0, 1.0, -jnp.inf]), 0.5)
    >>> z.sum().round(5), z[2]
    (Array(1., dtype=float32), Array(0., dtype=float32))
    """
    arg.check_key(key)
    arg.require_form(hard, log_space)
    arg.require_classes(logits)
    dtype, logits = arg.widen(logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    shape = arg.batch_shape(shape, logits=logits.shape[:-1], per_event={"tau": tau.shape})
    tau = tau[..., None]
    if hard:
        return one_hot_of_noisy(key, logits, tau, shape, dtype)
    returned = logits.dtype if log_space else dtype
    if fused.fits(key, logits, shape):
        return fused.noisy_softmax(log_space, dtype, returned, key, logits, tau)
    return fused.plain_softmax(log_space, returned, shape, key, logits, tau)


@functools.partial(jax.jit, static_argnums=(3, 4))
def one_hot_of_noisy(key, logits, tau, shape, dtype):
    """The one-hot vector of argmax(logits + G), with the gradient of softmax((logits + G) / tau)."""
    if fused.fits(key, logits, shape):
        index = fused.index(False, dtype, key, logits)

        def soft(logits, tau, key):
            if logits.shape[-1] <= fused.PIECE:
                return fused.slope_of(_softmax_in_kernel, _softmax, 1, dtype, key, logits, tau)
            return fused.noisy_softmax(False, dtype, dtype, key, logits, tau).astype(logits.dtype)

        return gr.one_hot(soft, index, logits, tau, key).astype(dtype)
    noise = rng.gumbel(key, (*shape, logits.shape[-1]), logits)
    index = fused.index_of_noisy(logits, noise)
    soft = lambda logits, tau, noise: gr.slope_of_softmax(lm.centre(logits) + noise, tau)
    return gr.one_hot(soft, index, logits, tau, noise).astype(dtype)


def _softmax(_, x, tau):
    return gr.slope_of_softmax(x, tau)


def _softmax_in_kernel(_, x, tau):
    """The same without a derivative of its own: an entry at -inf is made finite for the gradient in tau."""
    below = jnp.where(x == -jnp.inf, -1e30, x - jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True)))
    weights = jnp.exp(below / tau)
    return weights / jnp.sum(weights, -1, keepdims=True)


def gumbel_softmax_log_prob(
    value: ArrayLike, logits: ArrayLike, tau: ArrayLike, *, log_space: bool = False
) -> Array:
    """Log-density of `gumbel_softmax` on the simplex.

    With ``y = log z`` and ``w = logits - tau y``:
    ``log p(z) = log Gamma(K) + (K - 1) log tau + sum_k log_softmax(w)_k - sum_k y_k``, with respect to the
    Lebesgue measure of any K - 1 of the coordinates. Impossible classes do not count in K: the result is
    the density on the face of the simplex without them. Where another class has z = 0, the result is the
    limit along a straight path: infinite for m zeros if ``tau < m / (K - m)``, -inf if above.

    Args:
      value: z on the simplex, shape (..., K); or, if ``log_space``, the ``log z`` that the sampler
        returned with ``log_space=True``. Either way the result is the density of z.
      logits: unnormalized log-probabilities, shape (..., K).
      tau: temperature, positive, of the batch shape.
      log_space: whether ``value`` is ``log z``.

    Returns:
      Log-densities of the broadcast batch shape, float32 or wider; -inf where a coordinate is outside [0,
      1] or an impossible class is above 0.

    Raises:
      ValueError: for a ``tau`` that is not positive or has an axis for K, dtypes that are not
        floating point, logits all -inf, or shapes that do not fit together.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.

    >>> print(f"{gumbel_softmax_log_prob(jnp.full(3, 1 / 3), jnp.zeros(3), 1.0):.4f}")  # log 2
    0.6931
    """
    arg.require_classes(logits)
    arg.require_flags(log_space=log_space)
    arg.require_event("value", value)
    _, value, logits = arg.widen(value=value, logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    arg.require_same_event(value, logits)
    batch = {"value": value.shape[:-1], "logits": logits.shape[:-1]}
    arg.batch_shape(None, **batch, per_event={"tau": tau.shape})
    y, outside = lm.as_log(value, log_space)
    possible = logits != -jnp.inf
    zero = possible & (y == -jnp.inf)
    y_in = where(possible & ~zero, y, 0)
    l = where(possible, lm.centre(logits), 0)
    w = where(possible, l - tau[..., None] * y_in, -jnp.inf)
    terms = where(possible, log_softmax(w) - y_in, 0)
    k = jnp.sum(possible, -1).astype(y.dtype)
    inside = gammaln(k) + (k - 1) * jnp.log(tau) + jnp.sum(terms, -1)
    zeros = jnp.sum(zero, -1).astype(y.dtype)
    # limits: they have the sign of zeros - tau (k - zeros), and are finite where it is 0 (for one zero)
    balance = zeros - tau * (k - zeros)
    edge = where(zero, (1 - k[..., None]) * l, l - (tau[..., None] + 1) * y_in)
    finite = gammaln(k) + (k - 1) * jnp.log(tau) + jnp.sum(where(possible, edge, 0), -1)
    even = (balance == 0) & (zeros == 1)
    limit = where(even, finite, where(balance >= 0, jnp.inf, -jnp.inf))
    off = outside | jnp.any(~possible & (y > -jnp.inf), -1)
    law = where(off, -jnp.inf, where(zeros > 0, limit, inside))
    return lm.show_nan(law, tau, event=(value, logits))


def invertible_gaussian(
    key: Array,
    loc: ArrayLike,
    scale: ArrayLike,
    tau: ArrayLike,
    *,
    delta: ArrayLike = 1.0,
    shape: Sequence[int] | None = None,
    hard: bool = False,
    log_space: bool = False,
) -> Array:
    """Sample a point of the simplex as the softmax++ of a Gaussian (invertible Gaussian).

    ``y = loc + scale eps`` in R^(K-1), eps standard normal;
    ``z_k = exp(y_k / tau) / (sum_j exp(y_j / tau) + delta)`` for k < K, and z_K is the rest.

    Args:
      key: a JAX random key.
      loc: means, shape (..., K - 1).
      scale: standard deviations, positive, broadcasting against ``loc``.
      tau: temperature, positive, of the batch shape (no axis for K).
      delta: weight of the last class, positive, of the batch shape.
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return the one-hot vector of z's largest coordinate, with the gradient of z. It is class
        k < K if y_k is the largest and above ``tau log delta``, else class K.
      log_space: return ``log z`` in float32 or wider: z itself rounds to a corner at low tau.

    Returns:
      Points of the simplex of shape ``shape + (K,)``, in the promoted dtype of ``loc`` and ``scale``.

    Raises:
      ValueError: for a ``scale``, ``tau`` or ``delta`` that is not positive, a ``tau`` or
        ``delta`` with an axis for K, a dtype that is not floating point, no event axis, shapes
        that do not fit together, or ``hard`` together with ``log_space``.

    References:
      A. Potapczynski, G. Loaiza-Ganem, J. P. Cunningham (2020), Invertible Gaussian
      Reparameterization: Revisiting the Gumbel-Softmax, arXiv:1912.09588.

    >>> invertible_gaussian(jax.random.key(0), jnp.zeros(2), 1e-6, 1.0).round(3)
    Array([0.333, 0.333, 0.333], dtype=float32)
    """
    arg.check_key(key)
    arg.require_form(hard, log_space)
    dtype, loc, scale, tau, delta, batch = _invertible_args(loc, scale, tau, delta)
    shape = arg.batch_shape(shape, **batch)
    y = loc + scale * rng.normal(key, (*shape, loc.shape[-1]), loc)
    last = jnp.broadcast_to(jnp.log(delta)[..., None], (*shape, 1))
    y = y / tau[..., None]
    y = jnp.concatenate([y, pl.placed(last, y)], -1)
    if log_space:
        return gr.log_softmax(y, 1.0)
    return (
        gr.one_hot(gr.slope_of_softmax, lm.index_of_largest(y), y, 1.0) if hard else gr.softmax(y, 1.0)
    ).astype(dtype)


def invertible_gaussian_log_prob(
    value: ArrayLike,
    loc: ArrayLike,
    scale: ArrayLike,
    tau: ArrayLike,
    *,
    delta: ArrayLike = 1.0,
    log_space: bool = False,
) -> Array:
    """Log-density of `invertible_gaussian` on the simplex.

    With ``y_k = tau (log z_k - log z_K + log delta)``:
    ``log p(z) = sum_k log N(y_k; loc_k, scale_k^2) + (K - 1) log tau - sum_{k <= K} log z_k``.

    Args:
      value: z on the simplex, shape (..., K); or, if ``log_space``, the ``log z`` that the sampler
        returned with ``log_space=True``. Either way the result is the density of z.
      loc: means, shape (..., K - 1).
      scale: standard deviations, positive.
      tau: temperature, positive, of the batch shape.
      delta: weight of the last class, positive.
      log_space: whether ``value`` is ``log z``.

    Returns:
      Log-densities of the broadcast batch shape, float32 or wider; -inf where a coordinate is not inside
      (0, 1).

    Raises:
      ValueError: as for `invertible_gaussian`.

    References:
      A. Potapczynski, G. Loaiza-Ganem, J. P. Cunningham (2020), arXiv:1912.09588.

    >>> print(f"{invertible_gaussian_log_prob(jnp.full(2, 0.5), jnp.zeros(1), 1.0, 1.0):.4f}")
    0.4674
    """
    arg.require_flags(log_space=log_space)
    arg.require_event("value", value)
    _, loc, scale, tau, delta, batch = _invertible_args(loc, scale, tau, delta)
    _, value, loc = arg.widen(value=value, loc=loc)
    size = loc.shape[-1] + 1
    arg.require(value.shape[-1] == size, "value", f"of shape (..., {size})", f"shape {value.shape}")
    arg.batch_shape(None, value=value.shape[:-1], **batch)
    log_z, outside = lm.as_log(value, log_space)
    outside = outside | jnp.any(log_z == -jnp.inf, -1)
    log_z = where(outside[..., None], 0, log_z)
    tau = tau[..., None]
    y = tau * (log_z[..., :-1] - log_z[..., -1:] + jnp.log(delta)[..., None])
    gaussian = lm.log_normal_pdf((y - loc) / scale) - jnp.log(scale)
    law = jnp.sum(gaussian + jnp.log(tau), -1) - jnp.sum(log_z, -1)
    law = where(outside, -jnp.inf, law)
    return lm.show_nan(law, tau[..., 0], delta, event=(value, loc, scale))


def _invertible_args(loc, scale, tau, delta):
    arg.require_event("loc", loc)
    dtype, loc, scale = arg.widen_with_scale(loc, scale)
    tau, delta = arg.as_tau(tau, loc.dtype), arg.as_positive("delta", delta, loc.dtype)
    loc = jnp.broadcast_to(loc, arg.batch_shape(None, loc=loc.shape, scale=scale.shape))
    batch = {"loc": loc.shape[:-1], "per_event": {"tau": tau.shape, "delta": delta.shape}}
    return dtype, loc, scale, tau, delta, batch


def logistic_normal(
    key: Array,
    loc: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    scale_tril: ArrayLike | None = None,
    shape: Sequence[int] | None = None,
    log_space: bool = False,
) -> Array:
    """Sample a point of the simplex from the logistic-normal distribution (softmax of a Gaussian).

    ``z = softmax(y)``, ``y ~ N(loc, Sigma)`` in R^K, where Sigma is either ``diag(scale^2)`` or
    ``scale_tril scale_tril^T``. Adding a constant to every y_k changes nothing, so Sigma may be singular
    along the all-ones vector, as in the Laplace Bridge.

    Args:
      key: a JAX random key.
      loc: means, shape (..., K).
      scale: standard deviations, positive, broadcasting against ``loc``. Pass this or ``scale_tril``.
      scale_tril: lower-triangular factor of Sigma, shape (..., K, K).
      shape: batch shape of the result; default: the parameters' broadcast shape.
      log_space: return ``log z`` in float32 or wider.

    Returns:
      Points of the simplex of shape ``shape + (K,)``, in the promoted dtype of the parameters.

    Raises:
      ValueError: for both or neither of ``scale`` and ``scale_tril``, a ``scale`` that is not
        positive, a dtype that is not floating point, no event axis, or shapes that do not fit.

    References:
      J. Aitchison, S. M. Shen (1980), Logistic-normal distributions: some properties and uses,
      Biometrika 67, doi:10.1093/biomet/67.2.261.

    >>> logistic_normal(jax.random.key(0), jnp.log(jnp.array([0.2, 0.8])), 1e-6).round(3)
    Array([0.2, 0.8], dtype=float32)
    """
    arg.check_key(key)
    arg.require_flags(log_space=log_space)
    dtype, loc, scale, scale_tril, batch = _logistic_normal_args(loc, scale, scale_tril)
    shape = arg.batch_shape(shape, **batch)
    noise = rng.normal(key, (*shape, loc.shape[-1]), loc)
    y = lm.centre(loc) + (scale * noise if scale_tril is None else lm.apply_factor(scale_tril, noise))
    return gr.log_softmax(y, 1.0) if log_space else gr.softmax(y, 1.0).astype(dtype)


def logistic_normal_log_prob(
    value: ArrayLike,
    loc: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    scale_tril: ArrayLike | None = None,
    log_space: bool = False,
) -> Array:
    """Exact log-density of `logistic_normal` on the simplex.

    This is the Gaussian density of the K - 1 log-ratios times the Jacobian ``1 / prod_k z_k``. For a
    diagonal Sigma, with ``r = log z - loc``, ``w = 1 / scale^2``, ``W = sum w`` and ``m = sum w r / W``:
    log p(z) = -sum log z - sum log scale - (K - 1)/2 log 2 pi
    - (log W)/2 - sum w (r - m)^2 / 2``.

    Args:
      value: z on the simplex, shape (..., K); or, if ``log_space``, the ``log z`` that the sampler
        returned with ``log_space=True``. Either way the result is the density of z.
      loc: means, shape (..., K).
      scale: standard deviations, positive. Pass this or ``scale_tril``.
      scale_tril: lower-triangular factor of Sigma, shape (..., K, K).
      log_space: whether ``value`` is ``log z``.

    Returns:
      Log-densities of the broadcast batch shape, float32 or wider; -inf where a coordinate is not inside
      (0, 1).

    Raises:
      ValueError: as for `logistic_normal`.

    References:
      J. Aitchison, S. M. Shen (1980), Biometrika 67.

    >>> print(f"{logistic_normal_log_prob(jnp.full(2, 0.5), jnp.zeros(2), 0.5**0.5):.4f}")
    0.4674
    """
    arg.require_flags(log_space=log_space)
    arg.require_event("value", value)
    _, loc, scale, scale_tril, batch = _logistic_normal_args(loc, scale, scale_tril)
    _, value, loc = arg.widen(value=value, loc=loc)
    arg.require_same_event(value, loc)
    arg.batch_shape(None, value=value.shape[:-1], **batch)
    log_z, outside = lm.as_log(value, log_space)
    outside = outside | (jnp.any(log_z == -jnp.inf, -1) if loc.shape[-1] > 1 else False)
    log_z = where(outside[..., None], 0, log_z)
    r = log_z - loc
    if scale_tril is None:
        gaussian = _log_ratio_density(r, jnp.broadcast_to(scale, r.shape))
    else:
        gaussian = _log_ratio_density_full(r, scale_tril)
    law = gaussian - jnp.sum(log_z, -1) - (loc.shape[-1] - 1) / 2 * math.log(2 * math.pi)
    spread = scale if scale_tril is None else jnp.sum(scale_tril, -1)
    return lm.show_nan(where(outside, -jnp.inf, law), event=(value, loc, spread))


def _logistic_normal_args(loc, scale, scale_tril):
    arg.require(
        (scale is None) != (scale_tril is None), "scale", "given, or else scale_tril", "both or neither"
    )
    size = arg.require_event("loc", loc)
    if scale_tril is None:
        dtype, loc, scale = arg.widen_with_scale(loc, scale)
        loc = jnp.broadcast_to(loc, arg.batch_shape(None, loc=loc.shape, scale=scale.shape))
        return dtype, loc, scale, None, {"loc": loc.shape[:-1]}
    arg.require_scale_tril(scale_tril, size)
    dtype, loc, scale_tril = arg.widen(loc=loc, scale_tril=scale_tril)
    return dtype, loc, None, scale_tril, {"loc": loc.shape[:-1], "scale_tril": scale_tril.shape[:-2]}


def _log_ratio_density(r, scale):
    """The Gaussian density of the log-ratios without its 2 pi, for a diagonal Sigma."""
    # Weights are relative to the largest, and squares are about the weighted mean: sum w r^2 - (sum w
    # r)^2/W would cancel.
    smallest = jnp.min(scale, -1, keepdims=True)
    weight = (smallest / scale) ** 2
    total = jnp.sum(weight, -1)
    centred = (r - jnp.sum(weight * r, -1, keepdims=True) / total[..., None]) / scale
    log_total = jnp.log(total) - 2 * jnp.log(smallest[..., 0])
    return -jnp.sum(jnp.log(scale), -1) - log_total / 2 - jnp.sum(centred**2, -1) / 2


def _log_ratio_density_full(r, scale_tril):
    """The same for any Sigma = A A^T, from a factor of the covariance of the log-ratios."""
    ratios = r[..., :-1] - r[..., -1:]
    a = scale_tril[..., :-1, :] - scale_tril[..., -1:, :]
    factor = lm.lower_factor(a)
    white = lm.solve_lower(factor, ratios)
    diagonal = jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))
    return -jnp.sum(jnp.log(diagonal), -1) - jnp.sum(white**2, -1) / 2


def categorical_entropy(logits: ArrayLike) -> Array:
    """Compute the entropy of a categorical variable, in nats.

    ``H = -sum_k p_k log p_k`` with ``p = softmax(logits)`` and ``0 log 0 = 0``.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.

    Returns:
      Values of the batch shape, float32 or wider, from 0 to log K, with finite gradients.

    Raises:
      ValueError: for a dtype that is not floating point, or logits without a class axis or all -inf.

    References:
      C. E. Shannon (1948), A Mathematical Theory of Communication, doi:10.1002/j.1538-7305.1948.tb01338.x.

    >>> print(f"{categorical_entropy(jnp.array([0.0, 0.0, -jnp.inf])):.4f}")  # log 2
    0.6931
    """
    arg.require_classes(logits)
    _, logits = arg.widen(logits=logits)
    log_p = log_softmax(logits)
    return -lm.expected_log_pmf(log_p, log_p)


def categorical_kl(p_logits: ArrayLike, q_logits: ArrayLike) -> Array:
    """Compute the KL divergence between two categorical variables, in nats.

    ``KL(p || q) = sum_k p_k (log p_k - log q_k)`` with ``p = softmax(p_logits)``, ``q = softmax(q_logits)``
    and ``0 log 0 = 0``; inf where q excludes a class that p allows.

    Args:
      p_logits: unnormalized log-probabilities of the first law, shape (..., K); -inf is an impossible
        class.
      q_logits: unnormalized log-probabilities of the second law.

    Returns:
      Values of the broadcast batch shape, float32 or wider. Gradients are finite, and 0 where the value is
      inf.

    Raises:
      ValueError: for dtypes that are not floating point, logits without a class axis or all -inf, or shapes
        that do not fit.

    References:
      S. Kullback, R. A. Leibler (1951), On Information and Sufficiency, doi:10.1214/aoms/1177729694.

    >>> print(f"{categorical_kl(jnp.array([0.0, -jnp.inf]), jnp.zeros(2)):.4f}")  # log 2
    0.6931
    """
    for name, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
        arg.require_classes(logits, name=name)
    _, p_logits, q_logits = arg.widen(p_logits=p_logits, q_logits=q_logits)
    size, other = p_logits.shape[-1], q_logits.shape
    arg.require(other[-1] == size, "q_logits", f"of shape (..., {size}), as p_logits are", f"shape {other}")
    arg.batch_shape(None, p_logits=p_logits.shape[:-1], q_logits=other[:-1])
    return lm.discrete_kl(log_softmax(p_logits), log_softmax(q_logits))


def mix_uniform(logits: ArrayLike, fraction: ArrayLike) -> Array:
    """Mix a categorical law with the uniform law, so that every class stays possible ("unimix").

    Returns the logits of ``q = (1 - fraction) softmax(logits) + fraction / K``, computed in log space,
    where K is the number of possible classes.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class, and stays one.
      fraction: weight of the uniform law, from 0 to 1, of the batch shape (no axis for K); often 0.01.

    Returns:
      Normalized log-probabilities ``log q``, shape (..., K), in the dtype of ``logits``; NaN for a traced
      ``fraction`` outside its range. Gradients are finite for a ``fraction`` above 0.

    Raises:
      ValueError: for a ``fraction`` outside [0, 1] or with an axis for K, a dtype that is not floating
        point, or logits without a class axis or all -inf.

    References:
      D. Hafner, J. Pasukonis, J. Ba, T. Lillicrap (2023), Mastering Diverse Domains through World Models,
      arXiv:2301.04104.

    >>> p, q = jnp.exp(mix_uniform(jnp.array([0.0, -200.0]), 0.01))
    >>> print(f"{p:.4f} {q:.4f}")
    0.9950 0.0050
    """
    arg.require_classes(logits)
    dtype, logits = arg.widen(logits=logits)
    arg.require_values("fraction", fraction, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))
    fraction = arg.as_float("fraction", fraction).astype(logits.dtype)
    batch = arg.batch_shape(None, logits=logits.shape[:-1], per_event={"fraction": fraction.shape})
    logits = jnp.broadcast_to(logits, (*batch, logits.shape[-1]))
    return _mixed(log_softmax(logits), fraction[..., None]).astype(dtype)


@jax.custom_jvp
def _mixed(log_p, fraction):
    """The logarithm stays finite at 0 and 1, where nothing would cancel its infinite slope."""
    possible = ~(log_p == -jnp.inf)
    count = jnp.sum(possible, -1, keepdims=True, dtype=log_p.dtype)
    mixed = jnp.logaddexp(jnp.log1p(-fraction) + log_p, jnp.log(fraction) - jnp.log(count))
    return where(possible, mixed, -jnp.inf)


@_mixed.defjvp
def _mixed_jvp(primals, tangents):
    log_q, (log_p, fraction) = _mixed(*primals), primals
    possible = ~(log_p == -jnp.inf)
    count = jnp.sum(possible, -1, keepdims=True, dtype=log_p.dtype)
    safe_p, safe_q = (where(possible, x, 0) for x in (log_p, log_q))
    share = (1 - fraction) * jnp.exp(safe_p - safe_q)
    slope = share * tangents[0] + (jnp.exp(-safe_q) / count - jnp.exp(safe_p - safe_q)) * tangents[1]
    return log_q, pl.placed(where(possible, slope, 0), log_q)
