"""Estimators for bits from two draws of one uniform number."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _checks as ck
from relaxit_jax.estimators import _base as base


def arm(key: Array, f: Callable[[Array], ArrayLike], q: base.Bits) -> Array:
    """The augment-REINFORCE-merge estimator, for bits.

    Gradient ``(f(b1) - f(b2)) (u - 1/2)`` with ``b1 = 1[u > sigmoid(-l)]``, ``b2 = 1[u < sigmoid(l)]``
    of one uniform u a bit, plus the mean gradient of f at both; value their mean. Two calls of f, as
    one under `jax.vmap`.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``.
      q: `Bernoulli`.

    Returns:
      The mean of f at both draws, of shape ``q.batch_shape``, with that gradient.

    Raises:
      ValueError: for an f as in `reinforce`, or a q that is not `Bernoulli`.

    References:
      M. Yin, M. Zhou (2019), ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks,
      arXiv:1807.11143.

    >>> from relaxit_jax.estimators import Bernoulli
    >>> f = lambda b: (b.sum(-1) - 2) ** 2
    >>> jax.grad(lambda l: arm(jax.random.key(0), f, Bernoulli(l)))(jnp.zeros(2))
    Array([-1.790..., -1.914...], dtype=float32)
    """
    return _antithetic(key, f, q, lambda one, other, centred: centred)


def disarm(key: Array, f: Callable[[Array], ArrayLike], q: base.Bits) -> Array:
    """DisARM, which is ARM given the two draws, for bits.

    Gradient ``(f(b) - f(b')) / 2 (-1)^b' 1[b != b'] sigmoid(|l|)`` with ``b = 1[1 - u < sigmoid(l)]``,
    ``b' = 1[u < sigmoid(l)]`` of one uniform u a bit, plus the mean gradient of f at both; value
    their mean. Its variance is at most that of `arm`, always. Two calls of f, as one under `jax.vmap`.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``.
      q: `Bernoulli`.

    Returns:
      The mean of f at both draws, of shape ``q.batch_shape``, with that gradient.

    Raises:
      ValueError: for an f as in `reinforce`, or a q that is not `Bernoulli`.

    References:
      Z. Dong, A. Mnih, G. Tucker (2020), DisARM: An Antithetic Gradient Estimator for Binary Latent
      Variables, arXiv:2006.10680.

    >>> from relaxit_jax.estimators import Bernoulli
    >>> f = lambda b: (b.sum(-1) - 2) ** 2
    >>> jax.grad(lambda l: disarm(jax.random.key(0), f, Bernoulli(l)))(jnp.zeros(2))
    Array([-1., -1.], dtype=float32)
    """

    def weight(one, other, centred):
        larger = jax.nn.sigmoid(jnp.abs(jax.lax.stop_gradient(q.logits)).astype(centred.dtype))
        return (one - other).astype(centred.dtype) / 2 * larger  # one - other is (-1)^other where they differ

    return _antithetic(key, f, q, weight)


def _antithetic(key, f, q, weight):
    ck.check_key(key)
    base.check(q, f=f)
    ck.require(hasattr(q, "antithetic"), "q", "Bernoulli", type(q).__name__)
    one, other, centred = q.antithetic(key)
    samples = jnp.stack([one, other])
    values = base.call(f, q, samples)
    factor = weight(one, other, centred)
    gradient = base.per_event(values[0] - values[1], q) * factor
    # apart, as each value follows the law of its own draw; the law of the pair has a kink at a logit of 0
    parts = jnp.stack([base.per_event(values[0], q) * factor, base.per_event(values[1], q) * -factor])
    return base.estimate(q, samples, values, gradient, parts)
