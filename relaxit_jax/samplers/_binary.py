"""Relaxed Bernoulli variables, one gate for each element of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where


def relaxed_bernoulli(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
    hard: bool = False,
    log_space: bool = False,
) -> Array:
    """Sample a relaxed bit (binary Concrete, relaxed Bernoulli).

    ``z = sigmoid((logits + L) / tau)``, with L standard logistic noise.

    Args:
      key: a JAX random key.
      logits: log-odds of a one, any shape; -inf gives exactly 0.
      tau: temperature, positive, broadcasting against ``logits``.
      shape: shape of the result; default: the parameters' broadcast shape.
      hard: return the bit ``z > 1/2``, exactly Bernoulli(sigmoid(logits)), with the gradient of z.
      log_space: return ``logit(z)`` in float32 or wider: z itself rounds to 0 or 1 at low tau.

    Returns:
      Values in [0, 1], in the dtype of ``logits``.

    Raises:
      ValueError: for a ``tau`` that is not positive, a dtype that is not floating point, a ``shape``
        the parameters do not broadcast to, or ``hard`` together with ``log_space``.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.
      E. Jang, S. Gu, B. Poole (2017), Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144.

    >>> z = relaxed_bernoulli(jax.random.key(0), jnp.array([-1e4, 0.0, 1e4]), 0.5)
    >>> z[0] == 0, 0 < z[1] < 1, z[2] == 1
    (Array(True, dtype=bool), Array(True, dtype=bool), Array(True, dtype=bool))
    """
    arg.check_key(key)
    arg.require_form(hard, log_space)
    dtype, logits = arg.widen(logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    shape = arg.batch_shape(shape, logits=logits.shape, tau=tau.shape)
    x = logits + rng.logistic(key, shape, logits)
    return _relax(x, tau, dtype, hard, log_space)


def _relax(x, tau, dtype, hard, log_space):
    """Return the gate for perturbed log-odds x in the requested form."""
    y = lm.over_tau(x, tau)
    if log_space:
        return y
    if hard:
        return gr.straight_through(x > 0, sigmoid(y)).astype(dtype)
    return sigmoid(y).astype(dtype)


def relaxed_bernoulli_log_prob(
    value: ArrayLike, logits: ArrayLike, tau: ArrayLike, *, log_space: bool = False
) -> Array:
    """Log-density of `relaxed_bernoulli`.

    ``log p(z) = log tau + log f(tau logit(z) - logits) - log f(logit(z))``, where
    ``f(x) = sigmoid(x) sigmoid(-x)`` is the density of the logistic distribution. At z = 0 and 1 the result
    is the limit: infinite for tau < 1, -inf for tau > 1. With an infinite logit there is no density, only the
    mass 1 at 0 or 1.

    Args:
      value: z in [0, 1]; or, if ``log_space``, the ``logit(z)`` that the sampler returned with
        ``log_space=True``. Either way the result is the density of z.
      logits: log-odds of a one.
      tau: temperature, positive.
      log_space: whether ``value`` is ``logit(z)``.

    Returns:
      Log-densities of the broadcast shape, float32 or wider; -inf outside [0, 1].

    Raises:
      ValueError: for a ``tau`` that is not positive, dtypes that are not floating point, or shapes
        that do not broadcast.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.

    >>> relaxed_bernoulli_log_prob(0.25, 0.0, 1.0)  # uniform at tau = 1 and even odds
    Array(0., dtype=float32)
    """
    arg.require_flags(log_space=log_space)
    _, value, logits = arg.widen(value=value, logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    arg.batch_shape(None, value=value.shape, logits=logits.shape, tau=tau.shape)
    y, outside = lm.as_logit(value, log_space)
    law = where(outside, -jnp.inf, lm.binary_concrete_log_prob(y, logits, tau))
    return lm.show_nan(law, value, logits, tau)


def straight_through_bernoulli(key: Array, logits: ArrayLike, *, shape: Sequence[int] | None = None) -> Array:
    """Sample an exact bit with the straight-through gradient.

    Forward ``c ~ Bernoulli(sigmoid(logits))``; backward as if the value were ``sigmoid(logits)``. The
    gradient is exact for functions that are linear in c, and biased for others.

    Args:
      key: a JAX random key.
      logits: log-odds of a one, any shape.
      shape: shape of the result; default: the shape of ``logits``.

    Returns:
      Zeros and ones, in the dtype of ``logits``.

    Raises:
      ValueError: for a dtype that is not floating point or a ``shape`` that ``logits`` does not
        broadcast to.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation, arXiv:1308.3432.

    >>> jax.grad(lambda x: straight_through_bernoulli(jax.random.key(0), x))(0.0)
    Array(0.25, dtype=float32, weak_type=True)
    """
    arg.check_key(key)
    dtype, logits = arg.widen(logits=logits)
    shape = arg.batch_shape(shape, logits=logits.shape)
    p = sigmoid(logits)
    bit = rng.bernoulli(key, p, sigmoid(-logits), shape)
    return gr.straight_through(bit, p).astype(dtype)


def straight_through_bernoulli_log_prob(value: ArrayLike, logits: ArrayLike) -> Array:
    """Log-mass of `straight_through_bernoulli`, the Bernoulli distribution.

    ``value log sigmoid(logits) + (1 - value) log sigmoid(-logits)``; its gradient in ``value`` is
    ``logits``, which the straight-through gradient passes on.

    Args:
      value: zeros and ones, of any dtype.
      logits: log-odds of a one.

    Returns:
      Values of the broadcast shape, float32 or wider; -inf for any other value.

    Raises:
      ValueError: for logits that are not floating point or shapes that do not broadcast.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), arXiv:1308.3432.

    >>> jnp.exp(straight_through_bernoulli_log_prob(jnp.array([0, 1]), jnp.log(3.0)))
    Array([0.25, 0.75], dtype=float32)
    """
    _, logits = arg.widen(logits=logits)
    value = arg.as_number("value", value).astype(logits.dtype)
    arg.batch_shape(None, value=value.shape, logits=logits.shape)
    certain = jnp.isinf(logits)
    finite = where(certain, 0, logits)
    inside = value * log_sigmoid(finite) + (1 - value) * log_sigmoid(-finite)
    mass = where((value == 1) == (logits > 0), 0, -jnp.inf)
    bit = (value == 0) | (value == 1) | jnp.isnan(value)
    return lm.show_nan(where(bit, where(certain, mass, inside), -jnp.inf), value, logits)


def stochastic_times_smooth(key: Array, logits: ArrayLike, *, shape: Sequence[int] | None = None) -> Array:
    """Sample a bit times a smooth factor, with the gradient of the smooth factor.

    ``z = b sqrt(p)``, ``b ~ Bernoulli(sqrt(p))``, ``p = sigmoid(logits)``. The mean is p, but b passes no
    gradient: for linear functions the expected gradient is half of the true one.

    Args:
      key: a JAX random key.
      logits: log-odds of p, any shape; -inf gives exactly 0.
      shape: shape of the result; default: the shape of ``logits``.

    Returns:
      0 or sqrt(p), in the dtype of ``logits``.

    Raises:
      ValueError: for a dtype that is not floating point or a ``shape`` that ``logits`` does not
        broadcast to.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), arXiv:1308.3432.

    >>> stochastic_times_smooth(jax.random.key(0), jnp.array([-200.0, 200.0]))
    Array([0., 1.], dtype=float32)
    """
    arg.check_key(key)
    dtype, logits = arg.widen(logits=logits)
    shape = arg.batch_shape(shape, logits=logits.shape)
    root = jnp.sqrt(sigmoid(logits))
    bit = rng.bernoulli(key, root, sigmoid(-logits) / (1 + root), shape)
    return _times_root(bit, logits).astype(dtype)


@jax.custom_jvp
def _times_root(bit, logits):
    """The bit times sqrt(p). Its derivative is a multiple of the value, and 0 where p underflows."""
    root = jnp.sqrt(sigmoid(logits))
    return where(bit | jnp.isnan(root), root, 0)  # not a product, which would hide a NaN


@_times_root.defjvp
def _times_root_jvp(primals, tangents):
    z = _times_root(*primals)
    return z, z * sigmoid(-primals[1]) / 2 * tangents[1]


_times_root = jax.jit(_times_root)


def stochastic_times_smooth_log_prob(value: ArrayLike, logits: ArrayLike) -> Array:
    """Log-mass of `stochastic_times_smooth`, two atoms.

    ``log sqrt(p)`` at ``sqrt(p)`` and ``log(1 - sqrt(p))`` at 0, with ``p = sigmoid(logits)``.

    Args:
      value: draws of the sampler, compared with sqrt(p) to within the rounding of their dtype.
      logits: log-odds of p.

    Returns:
      Values of the broadcast shape, float32 or wider; -inf for any other value.

    Raises:
      ValueError: for dtypes that are not floating point or shapes that do not broadcast.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), arXiv:1308.3432.

    >>> jnp.exp(stochastic_times_smooth_log_prob(jnp.array([0.0, 0.5, 0.6]), -jnp.log(3.0)))
    Array([0.5, 0.5, 0. ], dtype=float32)
    """
    kinds = [jnp.finfo(arg.as_float(n, x).dtype) for n, x in (("value", value), ("logits", logits))]
    rounding = 4 * max(float(kind.eps) for kind in kinds)
    smallest = max(float(kind.smallest_subnormal) for kind in kinds)
    _, value, logits = arg.widen(value=value, logits=logits)
    arg.batch_shape(None, value=value.shape, logits=logits.shape)
    log_root = log_sigmoid(logits) / 2
    root = jnp.exp(log_root)
    at_root = jnp.abs(value - root) <= rounding * root + smallest
    law = where(at_root, log_root, -jnp.inf)
    # 1 - sqrt(p) = (1 - p) / (1 + sqrt(p))
    law = where(value == 0, log_sigmoid(-logits) - jnp.log1p(root), law)
    return lm.show_nan(law, value, logits)


def correlated_bernoulli(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike,
    scale_tril: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
    hard: bool = False,
    log_space: bool = False,
) -> Array:
    """Sample correlated relaxed bits (binary Concrete gates with a Gaussian copula).

    ``v ~ N(0, R)``, ``R = scale_tril scale_tril^T``, ``u = Phi(v)``,
    ``z = sigmoid((logits + logit u) / tau)``. Each gate on its own is a `relaxed_bernoulli`; R sets how
    strongly the gates depend on each other. If R is the identity, they are independent.

    Args:
      key: a JAX random key.
      logits: log-odds of a one, shape (..., K); -inf gives exactly 0.
      tau: temperature, positive, of the batch shape (no axis for K).
      scale_tril: Cholesky factor of a correlation matrix, shape (..., K, K): lower triangular with
        rows of norm 1.
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return the bits ``z > 1/2`` with the gradient of z; each is exactly
        Bernoulli(sigmoid(logits)).
      log_space: return ``logit(z)`` in float32 or wider.

    Returns:
      Values in [0, 1] of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: as for `relaxed_bernoulli`, and for a ``tau`` with an axis for K, or a ``scale_tril`` that
        has the wrong shape, is not lower triangular, or has rows of norm other than 1.

    References:
      C. Lee, F. Imrie, M. van der Schaar (2022), Self-Supervision Enhanced Feature Selection with
      Correlated Gates, ICLR, openreview:oDFvtxzPOx.

    >>> half = jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])
    >>> z = correlated_bernoulli(jax.random.key(0), jnp.zeros(2), 0.1, half, shape=(5,))
    >>> z.shape
    (5, 2)
    """
    arg.check_key(key)
    arg.require_form(hard, log_space)
    dtype, logits, tau, scale_tril, batch = _correlated_args(logits, tau, scale_tril)
    shape = arg.batch_shape(shape, **batch)
    noise = rng.normal(key, (*shape, logits.shape[-1]), logits)
    x = logits + lm.probit_to_logit(lm.apply_factor(scale_tril, noise))
    return _relax(x, tau[..., None], dtype, hard, log_space)


def correlated_bernoulli_log_prob(
    value: ArrayLike, logits: ArrayLike, tau: ArrayLike, scale_tril: ArrayLike, *, log_space: bool = False
) -> Array:
    """Log-density of `correlated_bernoulli`.

    With ``x = tau logit(z) - logits`` and ``v = Phi^-1(sigmoid(x))``, this is the sum over k of the binary
    Concrete log-densities, plus ``log N(v; 0, R) - sum_k log phi(v_k)``. A gate with an infinite logit has no
    density, only the mass 1 at 0 or 1; the others keep their marginal density.

    Args:
      value: z in [0, 1], shape (..., K); or, if ``log_space``, the ``logit(z)`` that the sampler
        returned with ``log_space=True``. Either way the result is the density of z.
      logits: log-odds of a one, shape (..., K).
      tau: temperature, positive, of the batch shape.
      scale_tril: Cholesky factor of the correlation matrix, shape (..., K, K).
      log_space: whether ``value`` is ``logit(z)``.

    Returns:
      Log-densities of the broadcast batch shape, float32 or wider; -inf outside [0, 1].

    Raises:
      ValueError: as for `correlated_bernoulli`.

    References:
      C. Lee, F. Imrie, M. van der Schaar (2022), Self-Supervision Enhanced Feature Selection with
      Correlated Gates, ICLR.

    >>> correlated_bernoulli_log_prob(jnp.full(2, 0.3), jnp.zeros(2), 1.0, jnp.eye(2)).round(4)
    Array(0., dtype=float32)
    """
    arg.require_flags(log_space=log_space)
    arg.require_event("value", value)
    _, value, logits = arg.widen(value=value, logits=logits)
    _, logits, tau, scale_tril, batch = _correlated_args(logits, tau, scale_tril)
    arg.require_same_event(value, logits)
    arg.batch_shape(None, value=value.shape[:-1], **batch)
    y, outside = lm.as_logit(value, log_space)
    tau = tau[..., None]
    independent = lm.binary_concrete_log_prob(y, logits, tau)
    certain = jnp.isinf(logits)
    free = jnp.isfinite(y) & ~certain
    x = tau * where(free, y, 0) - where(certain, 0, logits)
    v = where(certain, 0, lm.logit_to_probit(x))
    copula = _copula_log_density(v, scale_tril, certain)
    inside = jnp.sum(independent, -1) + where(jnp.all(free | certain, -1), copula, 0)
    outside = outside | (certain & (y != logits))
    law = where(jnp.any(outside, -1), -jnp.inf, inside)
    return lm.show_nan(law, tau[..., 0], event=(value, logits, jnp.sum(scale_tril, -1)))


def _correlated_args(logits, tau, scale_tril):
    arg.require_scale_tril(scale_tril, arg.require_event("logits", logits))
    dtype, logits = arg.widen(logits=logits)
    factor = arg.as_float("scale_tril", scale_tril)
    slack = max(1e-4, 4 * float(jnp.finfo(factor.dtype).eps))
    arg.require_values(
        "scale_tril", scale_tril, "a factor of a correlation matrix, with rows of norm 1",
        lambda a: abs((a.astype(float) ** 2).sum(-1) - 1) < slack,
    )  # fmt: skip
    tau = arg.as_tau(tau, logits.dtype)
    batch = {"logits": logits.shape[:-1], "scale_tril": factor.shape[:-2], "per_event": {"tau": tau.shape}}
    return dtype, logits, tau, factor.astype(logits.dtype), batch


@jax.jit
def _copula_log_density(v, scale_tril, dropped):
    """log N(v; 0, R) - sum log phi(v), without the dropped variables, which have v = 0."""

    def density(factor):
        w = lm.solve_lower(factor, v)
        log_det = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))), -1)
        return -0.5 * jnp.sum((w - v) * (w + v), -1) - log_det

    def density_of_the_rest():
        apart = dropped[..., :, None] | dropped[..., None, :]
        r = jnp.matmul(scale_tril, jnp.matrix_transpose(scale_tril), precision="highest")
        return density(pl.whole(jnp.linalg.cholesky, where(apart, jnp.eye(r.shape[-1], dtype=r.dtype), r)))

    return jax.lax.cond(jnp.any(dropped), density_of_the_rest, lambda: density(scale_tril))


def bernoulli_entropy(logits: ArrayLike) -> Array:
    """Compute the entropy of bits, in nats.

    ``H = -p log p - (1 - p) log(1 - p)`` with ``p = sigmoid(logits)`` and ``0 log 0 = 0``.

    Args:
      logits: log-odds, any shape; -inf and inf are bits that are certain.

    Returns:
      Values of the shape of ``logits``, float32 or wider, from 0 to log 2, with finite gradients.

    Raises:
      ValueError: for a dtype that is not floating point.

    References:
      C. E. Shannon (1948), A Mathematical Theory of Communication, doi:10.1002/j.1538-7305.1948.tb01338.x.

    >>> print(f"{bernoulli_entropy(0.0):.4f}")  # log 2
    0.6931
    """
    _, logits = arg.widen(logits=logits)
    log_p = lm.log_pmf_of_bits(logits)
    return -lm.expected_log_pmf(log_p, log_p)


def bernoulli_kl(p_logits: ArrayLike, q_logits: ArrayLike) -> Array:
    """Compute the KL divergence between bits, in nats.

    ``KL(p || q) = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))`` with ``p = sigmoid(p_logits)``,
    ``q = sigmoid(q_logits)`` and ``0 log 0 = 0``; inf where q excludes an outcome that p allows.

    Args:
      p_logits: log-odds of the first law, any shape; -inf and inf are bits that are certain.
      q_logits: log-odds of the second law.

    Returns:
      Values of the broadcast shape, float32 or wider. Gradients are finite, and 0 where the value is inf.

    Raises:
      ValueError: for dtypes that are not floating point, or shapes that do not broadcast.

    References:
      S. Kullback, R. A. Leibler (1951), On Information and Sufficiency, doi:10.1214/aoms/1177729694.

    >>> print(f"{bernoulli_kl(jnp.inf, 0.0):.4f}")  # log 2
    0.6931
    """
    _, p_logits, q_logits = arg.widen(p_logits=p_logits, q_logits=q_logits)
    arg.batch_shape(None, p_logits=p_logits.shape, q_logits=q_logits.shape)
    return lm.discrete_kl(lm.log_pmf_of_bits(p_logits), lm.log_pmf_of_bits(q_logits))
