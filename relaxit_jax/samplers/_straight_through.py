"""One-hot vectors drawn exactly, each with a different estimate of the gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_softmax, softmax
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _fused as fused
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where
from relaxit_jax.samplers._categorical import one_hot_of_noisy


def straight_through_categorical(
    key: Array, logits: ArrayLike, tau: ArrayLike = 1.0, *, shape: Sequence[int] | None = None
) -> Array:
    """Sample an exact one-hot vector with the gradient of the tempered probabilities (straight-through).

    Forward ``D ~ OneHotCategorical(logits)``; backward is the gradient of ``softmax(logits / tau)``. The mean
    of the gradient is exact only for linear f at tau = 1.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape (no axis for K).
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      One-hot vectors of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: for a ``tau`` that is not positive or has an axis for K, a dtype that is not
        floating point, logits without a class axis or all -inf, or a ``shape`` the parameters do
        not broadcast to.

    References:
      Y. Bengio, N. Leonard, A. Courville (2013), Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation, arXiv:1308.3432.

    >>> straight_through_categorical(jax.random.key(0), jnp.array([0.0, 2.0, -jnp.inf]))
    Array([0., 1., 0.], dtype=float32)
    """
    dtype, logits, tau = _arguments(key, logits, shape, tau=tau)
    index = fused.categorical(key, logits, logits.shape[:-1], dtype)
    return gr.one_hot(gr.slope_of_softmax, index, logits, tau).astype(dtype)


def straight_through_categorical_log_prob(value: ArrayLike, logits: ArrayLike) -> Array:
    """Log-mass of `straight_through_categorical`, and of every exact one-hot draw from these logits.

    ``log P(z) = sum_k z_k log_softmax(logits)_k``, which is linear in z. Its gradient in the value is the
    log-probability of every class (0 for impossible ones), and the straight-through gradient passes it on.

    Args:
      value: one-hot vectors, shape (..., K).
      logits: unnormalized log-probabilities, shape (..., K).

    Returns:
      Log-masses of the broadcast batch shape, float32 or wider; -inf for values that are not one-hot.

    Raises:
      ValueError: for dtypes that are not floating point, logits all -inf, or shapes that do not fit.

    References:
      Y. Bengio, N. Leonard, A. Courville (2013), arXiv:1308.3432.

    >>> straight_through_categorical_log_prob(jnp.array([0.0, 1.0]), jnp.zeros(2)).round(4)
    Array(-0.6931, dtype=float32)
    """
    arg.require_classes(logits)
    arg.require_event("value", value)
    _, logits = arg.widen(logits=logits)
    value = arg.as_number("value", value).astype(logits.dtype)
    arg.require_same_event(value, logits)
    arg.batch_shape(None, value=value.shape[:-1], logits=logits.shape[:-1])
    impossible = logits == -jnp.inf
    log_p = where(impossible, 0, log_softmax(logits))
    law = jnp.sum(value * log_p, -1)
    law = where(jnp.any(impossible & (value != 0), -1), -jnp.inf, law)
    one_hot = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == 1)
    return lm.show_nan(where(one_hot, law, -jnp.inf), event=(value, logits))


def decoupled_gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    tau_forward: ArrayLike,
    tau_backward: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
    hard: bool = True,
) -> Array:
    """Sample a Gumbel-softmax vector with separate temperatures for its value and its gradient.

    Forward is the one-hot vector of ``argmax(logits + G)`` or, without ``hard``,
    ``softmax((logits + G) / tau_forward)``. Backward is the gradient of
    ``softmax((logits + G) / tau_backward)``. Both use the same Gumbel noise G. ``tau_forward`` has no
    gradient.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau_forward: temperature of the value, positive, of the batch shape (no axis for K).
      tau_backward: temperature of the gradient, positive, of the batch shape.
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return exact draws; ``tau_forward`` then does not matter.

    Returns:
      Points of the simplex of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: for a temperature that is not positive or has an axis for K, a dtype that is not
        floating point, logits without a class axis or all -inf, or a ``shape`` the parameters do
        not broadcast to.

    References:
      R. Shah, M. Yan, M. C. Mozer, D. Liu (2024), Improving Discrete Optimisation Via Decoupled
      Straight-Through Gumbel-Softmax, arXiv:2410.13331.

    >>> decoupled_gumbel_softmax(jax.random.key(0), jnp.zeros(3), 0.5, 2.0)
    Array([0., 1., 0.], dtype=float32)
    """
    arg.require_flags(hard=hard)
    taus = {"tau_forward": tau_forward, "tau_backward": tau_backward}
    dtype, logits, tau_forward, tau_backward = _arguments(key, logits, shape, **taus)
    if not hard:
        perturbed = rng.perturbed(key, logits, logits.shape[:-1])
        value, soft = (gr.softmax(perturbed, tau) for tau in (tau_forward, tau_backward))
        return gr.straight_through(value, soft).astype(dtype)
    # exact draws do not depend on tau_forward, but a NaN in it is shown as everywhere
    tau = lm.show_nan(tau_backward, tau_forward)
    return one_hot_of_noisy(key, logits, tau, logits.shape[:-1], dtype)


def gapped_straight_through(
    key: Array, logits: ArrayLike, tau: ArrayLike, gap: ArrayLike = 1.0, *, shape: Sequence[int] | None = None
) -> Array:
    """Sample an exact one-hot vector with the gradient of a softmax in which it leads by a gap.

    Forward ``D ~ OneHotCategorical(logits)``. Backward is the gradient of
    ``softmax((logits + sg(m1 - m2)) / tau)``, where ``m1 = (max logits - logits_D) D`` raises the drawn class
    to the largest logit and ``m2 = relu(logits + gap - max logits) (1 - D)`` lowers the others to ``gap``
    below it.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape (no axis for K).
      gap: by how much the drawn class leads, positive, of the batch shape. It has no gradient.
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      One-hot vectors of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: for a ``tau`` or ``gap`` that is not positive or has an axis for K, a dtype that
        is not floating point, logits without a class axis or all -inf, or a ``shape`` the
        parameters do not broadcast to.

    References:
      T.-H. Fan, T.-C. Chi, A. I. Rudnicky, P. J. Ramadge (2022), Training Discrete Deep Generative
      Models via Gapped Straight-Through Estimator, arXiv:2206.07235.

    >>> gapped_straight_through(jax.random.key(0), jnp.array([0.0, 2.0, -jnp.inf]), 0.7)
    Array([0., 1., 0.], dtype=float32)
    """
    dtype, logits, tau, gap = _arguments(key, logits, shape, tau=tau, gap=gap)
    index = fused.categorical(key, logits, logits.shape[:-1], dtype)

    def soft(logits, tau, index, gap):
        below = jax.lax.stop_gradient(lm.centre(logits))  # logits - max logits, 0 or less
        # the logits after m1 and m2: the largest for the winner, at most the largest minus the gap for others
        moved = where(lm.is_class(index, logits), 0, jnp.minimum(below, -gap))
        return gr.slope_of_softmax(gr.straight_through(moved, logits), tau)

    gap = jax.lax.stop_gradient(gap)
    return gr.one_hot(soft, index, logits, lm.show_nan(tau, gap), index, gap).astype(dtype)


def reinmax(
    key: Array, logits: ArrayLike, tau: ArrayLike = 1.0, *, shape: Sequence[int] | None = None
) -> Array:
    """Sample an exact one-hot vector with a second-order gradient (ReinMax).

    Forward ``D ~ OneHotCategorical(logits)``. Backward is the gradient of ``2 p1 - p0 / 2``, with
    ``p0 = softmax(logits)`` and p1 the softmax whose value is ``(D + softmax(logits / tau)) / 2``. At tau = 1
    the mean of the gradient is exact for every f that is quadratic in the draws.

    Second order is not always better. If f is far from quadratic, the last term of the error can be larger
    than with first order, and the variance is larger. On a random cubic f of two variables with three
    classes, `straight_through_categorical` had a bias of 0.72 and a variance of 8.7, and ReinMax 1.51 and
    36.3; on a quadratic one the biases were 0.67 and 0. `examples/choose_temperature.py` draws such a
    comparison.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape (no axis for K). It has no
        gradient.
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      One-hot vectors of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: as for `straight_through_categorical`.

    References:
      L. Liu, C. Dong, X. Liu, B. Yu, J. Gao (2023), Bridging Discrete and Backpropagation:
      Straight-Through and Beyond, arXiv:2304.08612.

    >>> reinmax(jax.random.key(0), jnp.array([0.0, 2.0, -jnp.inf]))
    Array([0., 1., 0.], dtype=float32)
    """
    dtype, logits, tau = _arguments(key, logits, shape, tau=tau)
    index = fused.categorical(key, logits, logits.shape[:-1], dtype)

    def soft(logits, tau, index):
        winner = lm.is_class(index, logits).astype(logits.dtype)
        p1 = jax.lax.stop_gradient((winner + gr.slope_of_softmax(logits, tau)) / 2)
        return 2 * gr.softmax_at(p1, logits) - softmax(logits) / 2

    return gr.one_hot(soft, index, logits, tau, index).astype(dtype)


def gumbel_rao(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike,
    num_samples: int = 10,
    *,
    shape: Sequence[int] | None = None,
) -> Array:
    """Sample an exact one-hot vector with a Rao-Blackwellized Gumbel-softmax gradient.

    Forward ``D ~ OneHotCategorical(logits)``. Backward is the mean over ``num_samples`` gradients of
    ``softmax((logits + sg(G_k)) / tau)``, with Gumbel noise G_k given that ``logits + G_k`` is largest at D.
    Its mean equals the mean gradient of straight-through Gumbel-softmax (`gumbel_softmax` with
    ``hard=True``), and its variance is smaller, the more so with more samples. Time grows with
    ``num_samples`` in the backward pass alone; memory does not.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape (no axis for K).
      num_samples: Gumbel vectors per draw, a Python integer, 1 or more.
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      One-hot vectors of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: as for `straight_through_categorical`, or for a ``num_samples`` that is not a
        positive integer.

    References:
      M. B. Paulus, C. J. Maddison, A. Krause (2021), Rao-Blackwellizing the Straight-Through
      Gumbel-Softmax Gradient Estimator, arXiv:2010.04838.

    >>> gumbel_rao(jax.random.key(0), jnp.array([0.0, 2.0, -jnp.inf]), 0.5, 20)
    Array([1., 0., 0.], dtype=float32)
    """
    dtype, logits, tau = _arguments(key, logits, shape, tau=tau)
    num_samples = arg.as_num_samples(num_samples)
    draw_key, noise_key = jax.random.split(key)
    index = fused.categorical(draw_key, logits, logits.shape[:-1], dtype)

    def soft(logits, tau, index, key):
        return _mean_of_softmaxes(num_samples, 0.0, dtype, key, index, logits, tau)

    return gr.one_hot(soft, index, logits, tau, index, noise_key).astype(dtype)


def reinmax_rao(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike = 1.0,
    num_samples: int = 10,
    *,
    shape: Sequence[int] | None = None,
) -> Array:
    """Sample an exact one-hot vector with a Rao-Blackwellized second-order gradient.

    Forward ``D ~ OneHotCategorical(logits)``. Backward ``2 J - J0 / 2``: with
    ``theta = log((D + softmax(logits)) / 2)``, J is the mean over ``num_samples`` of the Jacobian of
    ``softmax((theta + G_k) / tau)``, with Gumbel noise G_k given that ``theta + G_k`` is largest at D, and J0
    is the Jacobian of ``softmax(logits)``. Compared with `reinmax` it trades variance for bias, even for
    quadratic f. Time grows with ``num_samples`` in the backward pass alone; memory does not.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape (no axis for K). It has no
        gradient.
      num_samples: Gumbel vectors per draw, a Python integer, 1 or more.
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      One-hot vectors of shape ``shape + (K,)``, in the dtype of ``logits``.

    Raises:
      ValueError: as for `gumbel_rao`.

    References:
      Wang, Bui (2026), arXiv:2603.08257.

    >>> reinmax_rao(jax.random.key(0), jnp.array([0.0, 2.0, -jnp.inf]), 1.0, 20)
    Array([1., 0., 0.], dtype=float32)
    """
    dtype, logits, tau = _arguments(key, logits, shape, tau=tau)
    num_samples = arg.as_num_samples(num_samples)
    draw_key, noise_key = jax.random.split(key)
    index = fused.categorical(draw_key, logits, logits.shape[:-1], dtype)

    def soft(logits, tau, index, key):
        # right for the classes that lose; the theta of the winner does not matter, since it wins
        mean = _mean_of_softmaxes(num_samples, -math.log(2), dtype, key, index, logits, tau)
        return 2 * mean - softmax(logits) / 2

    return gr.one_hot(soft, index, logits, jax.lax.stop_gradient(tau), index, noise_key).astype(dtype)


def _arguments(key, logits, shape, **temperatures):
    """Dtype of the result, logits in its shape, and temperatures with an axis for the classes."""
    arg.check_key(key)
    arg.require_classes(logits)
    dtype, logits = arg.widen(logits=logits)
    taus = {name: arg.as_tau(tau, logits.dtype, name) for name, tau in temperatures.items()}
    shapes = {name: tau.shape for name, tau in taus.items()}
    shape = arg.batch_shape(shape, logits=logits.shape[:-1], per_event=shapes)
    logits = jnp.broadcast_to(logits, (*shape, logits.shape[-1]))
    return dtype, logits, *(tau[..., None] for tau in taus.values())


def _mean_of_softmaxes(num_samples, shift, given, key, index, logits, tau):
    """The mean derivative of softmax((logits + sg(G)) / tau), given that theta + G is largest at the index.

    theta is ``log_softmax(logits) + shift``, and ``given`` is the dtype of the logits before they were
    widened.
    """
    if fused.fits(key, logits, logits.shape[:-1]) and logits.shape[-1] <= fused.PIECE:
        return fused.mean_softmax(_mean_slope, num_samples, shift, given, key, index, logits, tau)
    log_p = jax.lax.stop_gradient(log_softmax(logits)) + shift
    return _mean_softmax(num_samples, key, index, log_p, logits, tau)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mean_softmax(num_samples, key, index, log_p, logits, tau):
    """The mean derivative of softmax((logits + sg(G)) / tau), attached to an unused value.

    G is Gumbel noise given that ``log_p + G`` is largest at the index. The derivative is a scan whose
    backward pass keeps only the keys: each turn draws its noise again.
    """
    return pl.placed(jnp.exp(log_p), index, logits, tau)


@_mean_softmax.defjvp
def _mean_softmax_jvp(num_samples, primals, tangents):
    value = _mean_softmax(num_samples, *primals)
    return value, _mean_slope(num_samples, value, *primals, *tangents[-2:])


@functools.partial(jax.jit, static_argnums=0)
def _mean_slope(num_samples, like, key, index, log_p, logits, tau, logits_dot, tau_dot):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total, key):
        _, gap = rng.conditional_gumbel(key, log_p, lm.is_class(index, log_p))
        y = lm.with_slope(gap, logits) / tau  # the noise is fixed, also for second derivatives
        weights = jnp.exp(y)  # at most 1, the weight of the winner
        # d(x / tau) = dx / tau - (x / tau) dtau / tau, and entries at -inf stay there
        y_dot = (logits_dot - where(y == -jnp.inf, 0, y) * tau_dot) / tau
        return total + gr.softmax_tangent(weights / jnp.sum(weights, -1, keepdims=True), y_dot), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(like), jax.random.split(key, num_samples))
    return total / num_samples
