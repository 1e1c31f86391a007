"""Subsets of fixed size by independent bits given their sum: exact draws with the gradient of marginals.

Everything is made of one table of log-ratios. With ``e_j`` the elementary symmetric polynomials of
exp(logits) of the first i elements, ``D_ij = log(e_j / e_(j-1))``: a softened list of the i logits,
sorted, into which the next is inserted. The terms e_j themselves reach k times the largest logit,
where float32 has lost the differences that decide; D stays within the range of the logits, and an
insertion never amplifies an error.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where


def simple_top_k(key: Array, logits: ArrayLike, k: int, *, shape: Sequence[int] | None = None) -> Array:
    """An exact k-hot draw with the gradient of its mean: SIMPLE.

    Forward ``P(z)`` proportional to ``exp(logits . z)`` over the k-hot z: independent bits of these
    log-odds, given that k of them are ones. Backward that of the marginals, ``mu = E z``, which are
    the derivative of ``log e_k(exp(logits))`` in the logits (`simple_top_k_marginals`). It is not the
    law of `gumbel_top_k`, whose draws come one after another.

    Args:
      key: a JAX random key.
      logits: log-odds of the elements up to a shared constant, shape (..., n); -inf is never drawn.
      k: number of elements, from 1 to n, known before tracing.
      shape: batch shape of the result; default: that of ``logits``.

    Returns:
      Zeros and k ones, shape ``shape + (n,)``, in the dtype of ``logits``; NaN where fewer than k
      elements are possible and a trace hid it. Time is O(n k), in n steps one after another; memory
      beside the draws is one array of n (k + 1) numbers, and five with the backward pass, for each
      element of the batch of ``logits`` (not of ``shape``).

    Raises:
      ValueError: for a ``k`` outside 1..n, fewer than k elements above -inf, a dtype that is not
        floating point, or a ``shape`` that ``logits`` does not broadcast to.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), SIMPLE: A Gradient Estimator for
      k-Subset Sampling, arXiv:2210.01941.

    >>> simple_top_k(jax.random.key(0), jnp.array([0.0, -jnp.inf, 50.0]), 2)
    Array([1., 0., 1.], dtype=float32)
    """
    arg.check_key(key)
    k, logits, dtype = arg.subset_args(logits, k)
    shape = arg.batch_shape(shape, logits=logits.shape[:-1])
    n = logits.shape[-1]
    logits = _with_axes(logits, len(shape))
    chosen = _chosen(k, jax.lax.stop_gradient(logits), rng.logistic(key, (*shape, n), logits))
    soft = jnp.broadcast_to(_slope_of_marginals(k, logits), (*shape, n))
    return gr.straight_through(chosen, soft).astype(dtype)


def simple_top_k_marginals(logits: ArrayLike, k: int) -> Array:
    """The probability of each element to be among the k that `simple_top_k` draws.

    ``mu_i = P(z_i = 1) = d log e_k(exp(logits)) / d logits_i``, e_k the k-th elementary symmetric
    polynomial.

    Args:
      logits: log-odds of the elements up to a shared constant, shape (..., n); -inf is impossible.
      k: number of elements, from 1 to n, known before tracing.

    Returns:
      Probabilities that sum to k, shape (..., n), in the dtype of ``logits``, differentiable. Time
      and memory are those of `simple_top_k`.

    Raises:
      ValueError: as for `simple_top_k`.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), arXiv:2210.01941.

    >>> simple_top_k_marginals(jnp.zeros(4), 2)
    Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """
    k, logits, dtype = arg.subset_args(logits, k)
    return where(_has_enough(k, logits), _marginals(k, logits), jnp.nan).astype(dtype)


def simple_top_k_log_prob(value: ArrayLike, logits: ArrayLike, k: int) -> Array:
    """The log-probability of a k-hot draw of `simple_top_k`.

    ``log P(z) = logits . z - log e_k(exp(logits))``, e_k the k-th elementary symmetric polynomial,
    added up from the log-probabilities of one element after another.

    Args:
      value: zeros and k ones, shape (..., n).
      logits: log-odds of the elements up to a shared constant, shape (..., n).
      k: number of elements, from 1 to n, known before tracing.

    Returns:
      Log-probabilities of the broadcast batch shape, float32 or wider; -inf for a value that is not
      k-hot. Its gradient in the logits is ``z - mu``, in the value the logits.

    Raises:
      ValueError: as for `simple_top_k`, and for a ``value`` of another number of elements.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), arXiv:2210.01941.

    >>> log_p = simple_top_k_log_prob(jnp.array([1, 1, 0, 0]), jnp.zeros(4), 2)
    >>> print(f"{jnp.exp(log_p):.4f}")  # one of six pairs
    0.1667
    """
    k, logits, _ = arg.subset_args(logits, k)
    given = value = arg.as_number("value", value)
    arg.require_event("value", value)
    arg.require_same_event(value, logits)
    batch = arg.batch_shape(None, value=value.shape[:-1], logits=logits.shape[:-1])
    logits = _with_axes(logits, len(batch))
    is_k_hot = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value.astype(logits.dtype), -1) == k)
    possible = jnp.all((value == 0) | (logits > -jnp.inf), -1)
    inside = (is_k_hot & possible)[..., None]
    # a value outside is scored as one inside, and then forgotten: nothing infinite has a gradient
    best = lm.k_hot(lm.top_k(logits, k)[1], logits)
    value = where(inside, value.astype(logits.dtype), jax.lax.stop_gradient(best))
    law = where(inside[..., 0], _log_prob(k, value, logits), -jnp.inf)
    law = where(_has_enough(k, logits)[..., 0], law, jnp.nan)
    return lm.show_nan(law, event=(given, logits))


@functools.partial(jax.jit, static_argnums=0)
def _chosen(k, logits, noise):
    """From the last element to the first, whether it is chosen."""

    def draw(left, element):
        log_odds, noise = element
        chosen = _at(log_odds, left, 0) + noise > 0
        return left - chosen.astype(jnp.int32), chosen

    elements = _log_odds(logits, k), jnp.moveaxis(noise, -1, 0)
    left = pl.placed(jnp.full(noise.shape[:-1], k, jnp.int32), noise[..., 0], logits[..., 0])
    return jnp.moveaxis(jax.lax.scan(draw, left, elements, reverse=True)[1], 0, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _log_prob(k, value, logits):
    value = jnp.moveaxis(value, -1, 0)
    left = jnp.cumsum(value, 0).astype(jnp.int32)  # to be chosen among the first i
    log_odds = _at(_log_odds(logits, k), left, 1)
    return jnp.sum(jax.nn.log_sigmoid(where(value == 1, log_odds, -log_odds)), 0)


@_log_prob.defjvp
def _log_prob_jvp(k, primals, tangents):
    (value, logits), (value_dot, logits_dot) = primals, tangents
    finite = where(logits == -jnp.inf, 0, logits)
    slope = jnp.sum(value_dot * finite + (value - _marginals(k, logits)) * logits_dot, -1)
    return _log_prob(k, value, logits), slope


def _has_enough(k, logits):
    """Whether k elements are possible, with an axis for the elements."""
    return jnp.sum(logits != -jnp.inf, -1, keepdims=True) >= k


def _with_axes(logits, ndim):
    """As many batch axes as the result has, of size one, so that no table is made for each draw."""
    return logits.reshape((1,) * (ndim + 1 - logits.ndim) + logits.shape)


def _at(log_odds, left, axis):
    """The log-odds that belong to so many elements left to choose."""
    return jnp.take_along_axis(log_odds, jnp.expand_dims(left, axis), axis).squeeze(axis)


@jax.custom_jvp
def _insert(ratios, logit):
    """The log-odds l - D_j of one more element, and the ratios D_j after it, j = 0..k on the first axis.

    D_j' = log(exp(D_j) + exp(l)) - log(1 + exp(l - D_(j-1))), written so that nothing large cancels.
    D_0 is inf, and D_j is -inf for more elements than there are. The ratios are pairs of numbers, of
    which the second is what rounding took from the first: thousands of logits near 1e4, where
    float32 resolves 1e-3, would otherwise add up a few per cent.
    """
    high, low = ratios
    log_odds = where(logit == -jnp.inf, -jnp.inf, (logit - high) - low)
    soft = jnp.log1p(jnp.exp(-jnp.abs(log_odds)))
    softened = soft[1:] - soft[:-1]
    stays, moves_up = log_odds[1:] <= 0, log_odds[:-1] >= 0  # the first are not below the second
    base = where(stays, high[1:], where(moves_up, high[:-1], logit))
    rest = where(stays, low[1:], where(moves_up, low[:-1], 0))
    total = base + softened
    added = total - base
    lost = (base - (total - added)) + (softened - added)
    new_high = jnp.concatenate([high[:1], total])
    new_low = jnp.concatenate([low[:1], where(jnp.isinf(total), 0, rest + lost)])
    skip = logit == -jnp.inf
    return log_odds, (where(skip, high, new_high), where(skip, low, new_low))


@_insert.defjvp
def _insert_jvp(primals, tangents):
    _, logit = primals
    (ratios_dot, _), logit_dot = tangents  # what rounding took has no slope
    log_odds, ratios = _insert(*primals)
    keep, push = jax.nn.sigmoid(-log_odds[1:]), jax.nn.sigmoid(log_odds[:-1])
    logit_dot = where(logit == -jnp.inf, 0, logit_dot)
    slope = keep * ratios_dot[1:] + push * ratios_dot[:-1] + (1 - keep - push) * logit_dot
    slope = jnp.concatenate([jnp.zeros_like(slope[:1]), slope])
    return (log_odds, ratios), (logit_dot - ratios_dot, (slope, jnp.zeros_like(slope)))


def _log_odds(logits, k):
    """Of each element to be chosen, by how many are left to choose among it and those before it.

    Shape (n, k + 1, ...): vectors go along the batch, and what shifts a count moves whole ones.
    """
    start = jnp.full((k + 1, *logits.shape[:-1]), -jnp.inf, logits.dtype).at[0].set(jnp.inf)
    start = pl.placed(start, logits[..., 0])
    insert = jax.checkpoint(_insert, prevent_cse=False)
    scanned = jax.lax.scan(
        lambda ratios, logit: insert(ratios, logit)[::-1],
        (start, jnp.zeros_like(start)),
        jnp.moveaxis(logits, -1, 0),
    )
    return scanned[1]


@functools.partial(jax.jit, static_argnums=0)
def _marginals(k, logits):
    """From the last element to the first, how likely how many are left to choose."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def visit(left, log_odds):
        chosen = left * jax.nn.sigmoid(log_odds)
        passed = left * jax.nn.sigmoid(-log_odds)
        return passed + jnp.concatenate([chosen[1:], jnp.zeros_like(chosen[:1])]), jnp.sum(chosen, 0)

    log_odds = _log_odds(logits, k)
    start = pl.placed(jnp.zeros((k + 1, *logits.shape[:-1]), logits.dtype).at[-1].set(1), log_odds[0])
    _, marginals = jax.lax.scan(visit, start, log_odds, reverse=True)
    return jnp.moveaxis(marginals, 0, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _slope_of_marginals(k, logits):
    """A value that nobody looks at, NaN where there is no law, with the derivative of the marginals."""
    lawful = _has_enough(k, logits) & ~jnp.any(jnp.isnan(logits), -1, keepdims=True)
    return jnp.broadcast_to(where(lawful, 0, jnp.nan), logits.shape).astype(logits.dtype)


@_slope_of_marginals.defjvp
def _slope_of_marginals_jvp(k, primals, tangents):
    slope = jax.jvp(functools.partial(_marginals, k), primals, tangents)[1]
    return _slope_of_marginals(k, *primals), slope
