"""Estimators from draws that repel each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from relaxit_jax import _arguments as arg
from relaxit_jax.estimators import _estimate as es


def arm(key: Array, f: Callable[[Array], Any], q: es.Bits, *, has_aux: bool = False) -> Any:
    """Estimate a gradient through bits with ARM (augment-REINFORCE-merge).

    The gradient is ``(f(b1) - f(b2)) (u - 1/2)`` with ``b1 = 1[u > sigmoid(-l)]``, ``b2 = 1[u < sigmoid(l)]``
    and one uniform u per bit, plus the mean gradient of f at both. The value is the mean of f at both. f is
    called twice, batched under `jax.vmap`.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``.
      q: `Bernoulli`.
      has_aux: whether f returns ``(value, aux)``, as in `reinforce`.

    Returns:
      The mean of f at both draws, of shape ``q.batch_shape``, with that gradient; with ``has_aux`` a pair of
      it and the aux of the first draw.

    Raises:
      ValueError: for an f as in `reinforce`, or a q that is not `Bernoulli`.

    References:
      M. Yin, M. Zhou (2019), ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks,
      arXiv:1807.11143.

    The mean of 100,000 estimates, one for each batch element, agrees with the exact gradient:

    >>> from relaxit_jax.estimators import Bernoulli, exact
    >>> f = lambda b: (b.sum(-1) - 2) ** 2
    >>> logits = jnp.array([2.0, -2.0])
    >>> rows = lambda l: Bernoulli(jnp.tile(l, (100_000, 1)))
    >>> mean = lambda l: arm(jax.random.key(0), f, rows(l)).mean()
    >>> jax.jit(jax.grad(mean))(logits).round(2)
    Array([-0.29, -0.13], dtype=float32)
    >>> jax.jit(jax.grad(lambda l: exact(f, Bernoulli(l))))(logits).round(2)
    Array([-0.29, -0.13], dtype=float32)
    """
    _check(key, f, q, "antithetic", "Bernoulli; for classes use arms", has_aux)
    *pair, centred = q.antithetic(key)
    return _antithetic(f, q, jnp.stack(pair), jnp.stack([centred, -centred]), has_aux)


def disarm(key: Array, f: Callable[[Array], Any], q: es.Bits, *, has_aux: bool = False) -> Any:
    """Estimate a gradient through bits with DisARM, the mean of ARM given its two draws.

    The gradient is ``(f(b) - f(b')) / 2 (-1)^b' 1[b != b'] sigmoid(|l|)`` with ``b = 1[1 - u < sigmoid(l)]``,
    ``b' = 1[u < sigmoid(l)]`` and one uniform u per bit, plus the mean gradient of f at both. The value is
    the mean of f at both. The variance is never above the variance of `arm`. f is called twice, batched under
    `jax.vmap`.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``.
      q: `Bernoulli`.
      has_aux: whether f returns ``(value, aux)``, as in `reinforce`.

    Returns:
      The mean of f at both draws, of shape ``q.batch_shape``, with that gradient; with ``has_aux`` a pair of
      it and the aux of the first draw.

    Raises:
      ValueError: for an f as in `reinforce`, or a q that is not `Bernoulli`.

    References:
      Z. Dong, A. Mnih, G. Tucker (2020), DisARM: An Antithetic Gradient Estimator for Binary Latent
      Variables, arXiv:2006.10680.

    The mean of 100,000 estimates, one for each batch element, agrees with the exact gradient:

    >>> from relaxit_jax.estimators import Bernoulli, exact
    >>> f = lambda b: (b.sum(-1) - 2) ** 2
    >>> logits = jnp.array([2.0, -2.0])
    >>> rows = lambda l: Bernoulli(jnp.tile(l, (100_000, 1)))
    >>> mean = lambda l: disarm(jax.random.key(0), f, rows(l)).mean()
    >>> jax.jit(jax.grad(mean))(logits).round(2)
    Array([-0.29, -0.13], dtype=float32)
    >>> jax.jit(jax.grad(lambda l: exact(f, Bernoulli(l))))(logits).round(2)
    Array([-0.29, -0.13], dtype=float32)
    """
    _check(key, f, q, "antithetic", "Bernoulli; for classes use arms", has_aux)
    one, other, centred = q.antithetic(key)
    larger = jax.nn.sigmoid(jnp.abs(jax.lax.stop_gradient(q.logits)).astype(centred.dtype))
    factor = (one - other).astype(centred.dtype) / 2 * larger  # one - other is (-1)^other where they differ
    return _antithetic(f, q, jnp.stack([one, other]), jnp.stack([factor, -factor]), has_aux)


def arms(
    key: Array, f: Callable[[Array], Any], q: es.Antithetic, *, num_samples: int = 4, has_aux: bool = False
) -> Any:
    """Estimate a gradient through bits or classes with any number of antithetic draws (ARMS).

    The gradient is ``sum_i (f(b_i) - mean f) (b_i - mean b) / ((n - 1) (1 - rho))`` over n draws that repel
    each other, plus the mean gradient of f at all of them. The value is the mean of f. For each bit
    ``u_i = 1 - (1 - d_i)^(n - 1)`` with ``d ~ Dirichlet(1, ..., 1)``: each u_i is uniform, and two of them
    are seldom large together. The rarer value of the bit, with probability ``r = min(p, 1 - p)``, is drawn
    where ``u_i > 1 - r``. Two draws then have a correlation rho below 0, with
    ``1 - rho = (1 - max(2 - r^(-1/(n - 1)), 0)^(n - 1)) / (1 - r)``. A pair has the same law as in `disarm`.
    f is called n times, batched under `jax.vmap`, so memory grows with n.

    A class is drawn through the binary digits of its number, the lowest first, as a tree of bits. The m draws
    that agree so far repel each other in the next digit, just as m draws of a bit do. The estimate is the
    estimate of `rloo` from these draws, plus for every digit, with l its log-odds given the digits before it,
    ``sum_i f(b_i) sum_j (digit_i - digit_j) rho / (1 - rho) grad l / (n (n - 1))`` over the draws j that
    agree with draw i so far. Two classes give the same as a bit.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``.
      q: `Bernoulli` or `OneHotCategorical`.
      num_samples: n, a Python integer, 2 or more.
      has_aux: whether f returns ``(value, aux)``, as in `reinforce`.

    Returns:
      The mean of f at all draws, of shape ``q.batch_shape``, with that gradient; with ``has_aux`` a pair of
      it and the aux of the first draw.

    Raises:
      ValueError: for an f as in `reinforce`, another q, or a ``num_samples`` that is not an integer above 1.

    References:
      A. Dimitriev, M. Zhou (2021), ARMS: Antithetic-REINFORCE-Multi-Sample Gradient for Binary Variables,
      arXiv:2105.14141. Z. Dong, A. Mnih, G. Tucker (2021), Coupled Gradient Estimators for Discrete Latent
      Variables, arXiv:2106.08056, draw two classes by trees of antithetic bits.

    The mean of 100,000 estimates, one for each batch element, agrees with the exact gradient:

    >>> from relaxit_jax.estimators import Bernoulli, exact
    >>> f = lambda b: (b.sum(-1) - 2) ** 2
    >>> logits = jnp.array([2.0, -2.0])
    >>> rows = lambda l: Bernoulli(jnp.tile(l, (100_000, 1)))
    >>> mean = lambda l: arms(jax.random.key(0), f, rows(l)).mean()
    >>> jax.jit(jax.grad(mean))(logits).round(2)
    Array([-0.29, -0.13], dtype=float32)
    >>> jax.jit(jax.grad(lambda l: exact(f, Bernoulli(l))))(logits).round(2)
    Array([-0.29, -0.13], dtype=float32)
    """
    _check(key, f, q, "antithetic_group", "Bernoulli or OneHotCategorical", has_aux)
    return _antithetic(f, q, *q.antithetic_group(key, arg.as_num_samples(num_samples, 2)), has_aux)


def _check(key, f, q, draws, families, has_aux):
    arg.check_key(key)
    es.check(q, has_aux=has_aux, f=f)
    arg.require(hasattr(q, draws), "q", families, type(q).__name__)


def _antithetic(f, q, samples, factors, has_aux):
    """The estimate ``sum_i f(b_i) factor_i``. The factors of a bit depend on its own noise and sum to 0."""
    values, aux = es.call(f, q, samples, has_aux=has_aux)
    gradient = jnp.sum(es.per_event(values - jnp.mean(values, 0), q) * factors, 0)
    # separately, because each value follows the law of its own draw; the law of a pair has a kink at a logit
    # of 0
    parts = es.per_event(values, q) * factors
    return es.with_aux(es.estimate(q, samples, values, gradient, parts), aux, has_aux)
