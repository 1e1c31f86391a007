"""Subsets of fixed size as independent bits given their sum: exact draws with the gradient of the marginals.

There are two forms of the same mathematics. A balanced tree takes log2(n) steps: a node has the elementary
symmetric polynomials ``e_j`` of exp(logits) for the elements below it, and a draw walks down from the root,
where every node splits its count between its two halves. All devices draw with the tree. On CPUs, the
marginals come from visiting one element after another, which is n steps but less work; accelerators compute
them with the tree too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where


def simple_top_k(
    key: Array,
    logits: ArrayLike,
    k: int,
    *,
    shape: Sequence[int] | None = None,
    count: ArrayLike | None = None,
) -> Array:
    """Sample an exact k-hot vector with the gradient of its mean (SIMPLE).

    Forward ``P(z)`` is proportional to ``exp(logits . z)`` over the k-hot z: independent bits with these
    log-odds, given that k of them are ones. Backward is the gradient of the marginals, ``mu = E z``, which
    are the derivative of ``log e_k(exp(logits))`` in the logits (`simple_top_k_marginals`). This law differs
    from the law of `gumbel_top_k`, whose draws come one after another.

    Args:
      key: a JAX random key.
      logits: log-odds of the elements up to a shared constant, shape (..., n); -inf is never drawn.
      k: number of elements, from 1 to n, known before tracing.
      shape: batch shape of the result; default: the parameters' broadcast shape.
      count: the number of elements for each batch element, integers from 0 to ``k``, of the batch shape;
        default: k. It may be traced, so elements of one batch can choose different numbers.

    Returns:
      Zeros and k ones (or ``count``), shape ``shape + (n,)``, in the dtype of ``logits``; NaN under a trace
      if fewer elements are possible. `k_hot_indices` returns the indices of the ones. Time is O(n k). A draw
      takes log2(n) sequential steps; the backward pass takes as many on accelerators and n on CPUs. Besides
      the draws, memory holds a few arrays of n (k + 1) numbers for each element of the batch of ``logits``
      (not of ``shape``).

    Raises:
      ValueError: for a ``k`` outside 1..n, a concrete ``count`` outside 0..k, fewer elements above -inf than
        are to be drawn, a dtype that is not floating point, or a ``shape`` that the parameters do not
        broadcast to.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), SIMPLE: A Gradient Estimator for
      k-Subset Sampling, arXiv:2210.01941.

    >>> simple_top_k(jax.random.key(0), jnp.array([0.0, -jnp.inf, 50.0]), 2)
    Array([1., 0., 1.], dtype=float32)
    """
    arg.check_key(key)
    k, logits, dtype, count = _arguments(logits, k, count)
    shape = arg.batch_shape(shape, logits=logits.shape[:-1], per_event=_shape_of(count))
    n = logits.shape[-1]
    logits, count = _with_axes(logits, len(shape)), _with_axes(count, len(shape) - 1)
    chosen = _chosen(k, shape, key, jax.lax.stop_gradient(logits), count)
    soft = jnp.broadcast_to(_slope_of_marginals(k, logits, count), (*shape, n))
    return gr.straight_through(chosen, soft).astype(dtype)


def simple_top_k_marginals(logits: ArrayLike, k: int, *, count: ArrayLike | None = None) -> Array:
    """Compute the probability of each element to be among the k that `simple_top_k` draws.

    ``mu_i = P(z_i = 1) = d log e_k(exp(logits)) / d logits_i``, where e_k is the k-th elementary symmetric
    polynomial.

    Args:
      logits: log-odds of the elements up to a shared constant, shape (..., n); -inf is impossible.
      k: number of elements, from 1 to n, known before tracing.
      count: the number of elements for each batch element, as for `simple_top_k`.

    Returns:
      Probabilities that sum to k (or ``count``), shape (..., n), in the dtype of ``logits``, differentiable.
      They take the same time and memory as `simple_top_k`.

    Raises:
      ValueError: as for `simple_top_k`.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), arXiv:2210.01941.

    >>> simple_top_k_marginals(jnp.zeros(4), 2)
    Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """
    k, logits, dtype, count = _arguments(logits, k, count)
    batch = arg.batch_shape(None, logits=logits.shape[:-1], per_event=_shape_of(count))
    logits, count = _with_axes(logits, len(batch)), _with_axes(count, len(batch) - 1)
    return where(_has_enough(k, logits, count), _marginals(k, logits, count), jnp.nan).astype(dtype)


def simple_top_k_log_prob(
    value: ArrayLike, logits: ArrayLike, k: int, *, count: ArrayLike | None = None
) -> Array:
    """Log-probability of a k-hot draw of `simple_top_k`.

    ``log P(z) = logits . z - log e_k(exp(logits))``, where e_k is the k-th elementary symmetric polynomial,
    computed as a sum of log-probabilities of one element after another.

    Args:
      value: zeros and k ones (or ``count``), shape (..., n).
      logits: log-odds of the elements up to a shared constant, shape (..., n).
      k: number of elements, from 1 to n, known before tracing.
      count: the number of elements for each batch element, as for `simple_top_k`.

    Returns:
      Log-probabilities of the broadcast batch shape, float32 or wider; -inf for a value that is not k-hot.
      The gradient in the logits is ``z - mu``; the gradient in the value is the logits.

    Raises:
      ValueError: as for `simple_top_k`, and for a ``value`` with a different number of elements.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), arXiv:2210.01941.

    >>> log_p = simple_top_k_log_prob(jnp.array([1, 1, 0, 0]), jnp.zeros(4), 2)
    >>> print(f"{jnp.exp(log_p):.4f}")  # one of six pairs
    0.1667
    """
    k, logits, _, count = _arguments(logits, k, count)
    given = value = arg.as_number("value", value)
    arg.require_event("value", value)
    arg.require_same_event(value, logits)
    shapes = {"value": value.shape[:-1], "logits": logits.shape[:-1]}
    batch = arg.batch_shape(None, **shapes, per_event=_shape_of(count))
    logits, count = _with_axes(logits, len(batch)), _with_axes(count, len(batch) - 1)
    ones = k if count is None else count
    is_k_hot = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value.astype(logits.dtype), -1) == ones)
    possible = jnp.all((value == 0) | (logits > -jnp.inf), -1)
    inside = (is_k_hot & possible)[..., None]
    # a value outside is scored as one inside and then replaced, so nothing infinite has a gradient
    best = lm.k_hot(lm.top_k(logits, k)[1], logits) if count is None else jnp.zeros_like(logits)
    value = where(inside, value.astype(logits.dtype), jax.lax.stop_gradient(best))
    law = where(inside[..., 0], _log_prob(k, value, logits), -jnp.inf)
    law = where(_has_enough(k, logits, count)[..., 0], law, jnp.nan)
    return lm.show_nan(law, event=(given, logits))


def k_hot_indices(value: ArrayLike, k: int) -> Array:
    """Return the indices of the ones in k-hot vectors, for a lookup instead of a product.

    ``i_1 < i_2 < ...`` with ``value_i = 1``. If a vector has fewer than k ones, the rest is n, an index that
    ``table.at[indices].get(mode="fill", fill_value=0)`` reads as zeros.

    Args:
      value: zeros and at most k ones, shape (..., n), such as a draw of `simple_top_k`.
      k: number of indices, from 1 to n, known before tracing.

    Returns:
      Increasing indices, int32, shape (..., k). They have no gradient.

    Raises:
      ValueError: for a ``k`` outside 1..n or a concrete ``value`` that does not consist of zeros and at most
        k ones (under a trace, the first k entries that are not 0 are used).

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), arXiv:2210.01941.

    >>> k_hot_indices(jnp.array([0.0, 1.0, 0.0, 1.0]), 2)
    Array([1, 3], dtype=int32)
    """
    k = arg.as_static_int("k", k, 1, arg.require_event("value", value))
    given, value = value, arg.as_number("value", value)
    need = f"zeros and at most {k} ones"
    arg.require_values("value", given, need, lambda z: ((z == 0) | (z == 1)).all(-1) & (z.sum(-1) <= k))
    return _k_hot_indices(k, value)


@functools.partial(jax.jit, static_argnums=0)
def _k_hot_indices(k, value):
    n = value.shape[-1]
    places = where(value != 0, -jnp.arange(n, dtype=jnp.int32), -n).astype(jnp.float32)
    return -lm.top_k(places, k)[0].astype(jnp.int32)


def _arguments(logits, k, count):
    """k, widened logits with enough possible elements, the dtype of a result, and int32 counts or None."""
    if count is None:
        return *arg.subset_args(logits, k), None
    k = arg.as_static_int("k", k, 1, arg.require_event("logits", logits))
    need = f"integers in 0..{k}, how many elements each row has"
    arg.require_values("count", count, need, lambda x: (x >= 0) & (x <= k))
    seen, count = count, arg.as_array("count", count, need)
    arg.require(jnp.issubdtype(count.dtype, jnp.integer), "count", need, f"dtype {count.dtype}")
    dtype, logits = arg.widen(logits=logits)
    if arg.can_be_seen(seen):
        need = "above -inf for at least count of the elements"
        arg.require_values("logits", logits, need, lambda x: (x != -np.inf).sum(-1) >= np.asarray(seen))
    return k, logits, dtype, count.astype(jnp.int32)


def _shape_of(count):
    return {} if count is None else {"count": count.shape}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chosen(k, shape, key, logits, count=None):
    """Whether each element is chosen: from the root down, every node draws the count of its left half."""
    tree = _tree(k, logits)
    nodes = [len(both.high) for *_, both in tree]
    noise = jnp.moveaxis(rng.tail_uniform(key, (*shape, sum(nodes)), logits), -1, 0)
    number = jnp.full((1, *shape), k, jnp.int32) if count is None else jnp.broadcast_to(count, (1, *shape))
    count = pl.placed(number, noise[:1], logits[None, ..., 0])
    for (left, right, both), size in zip(reversed(tree), reversed(nodes), strict=True):
        u, noise = noise[:size, None], noise[size:]
        count = count[:size, None]
        share = _shares_of(count, left, right, both)
        # Counts are unimodal, so rare ones lie at the ends: U is compared with sums from the left, 1 - U with
        # sums from the right.
        at_most = jnp.cumsum(share, 1)
        more = jax.lax.cumsum(share[:, 1:], 1, reverse=True)
        more = jnp.concatenate([more, jnp.zeros_like(share[:, :1])], 1)
        taken = jnp.sum(where(u > 0, at_most < u, more > -u), 1, dtype=jnp.int32)
        count = jnp.concatenate([taken, count[:, 0] - taken])
    return jnp.moveaxis(count[: logits.shape[-1]] == 1, 0, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _log_prob(k, value, logits):
    """From the elements up, how likely each node is to split its count as this value does."""
    count, law = jnp.moveaxis(value, -1, 0).astype(jnp.int32), 0
    for left, right, both in _tree(k, logits):
        one, other = _halves(count, jnp.zeros_like(count[:1]))
        count = one + other
        splits = left.at(one[:, None]), right.at(other[:, None]), both.at(count[:, None])
        law += jnp.sum(_log_share(*splits), (0, 1))
    return law


@_log_prob.defjvp
def _log_prob_jvp(k, primals, tangents):
    (value, logits), (value_dot, logits_dot) = primals, tangents
    finite = where(logits == -jnp.inf, 0, logits)
    slope = jnp.sum(value_dot * finite + (value - _marginals(k, logits)) * logits_dot, -1)
    return _log_prob(k, value, logits), slope


def _has_enough(k, logits, count=None):
    """Whether as many elements are possible as will be drawn, with an axis for the elements."""
    possible = jnp.sum(logits != -jnp.inf, -1, keepdims=True, dtype=jnp.int32)
    if count is None:
        return possible >= k
    count = count[..., None]
    return (possible >= count) & (count >= 0) & (count <= k)


def _start(k, count, like):
    """How likely it is that j elements are left to choose: certain for k, or for each element's count."""
    if count is None:
        return pl.placed(jnp.zeros((k + 1, *like.shape), like.dtype).at[k].set(1), like)
    number = jnp.arange(k + 1, dtype=count.dtype).reshape(-1, *[1] * count.ndim)
    return (pl.placed(number, count, like) == count).astype(like.dtype) + jnp.zeros_like(like)


def _with_axes(logits, ndim):
    """As many batch axes as the result has, of size one, so that draws share their tables."""
    if logits is None:
        return None
    return logits.reshape((1,) * (ndim + 1 - logits.ndim) + logits.shape)


class _Nodes(NamedTuple):
    """log e_j for the nodes of one level, shape (nodes, j, ...), each the sum of two numbers.

    They reach k times the largest logit. At that size one float32 has lost the differences that matter.
    """

    high: Array
    low: Array

    def at(self, count):
        return _Nodes(*(jnp.take_along_axis(x, count, 1) for x in self))

    def over(self, axis):
        return _Nodes(*(jnp.expand_dims(x, axis) for x in self))

    def of_the_rest(self, k):
        return _Nodes(_of_the_rest(self.high, k, -jnp.inf), _of_the_rest(self.low, k, 0))


def _of_the_rest(x, k, outside):
    """x_(m-i) at (node, m, i, ...) for m = 0..k: a vector that is repeated, then cut one place later."""
    nodes, width, *batch = x.shape
    length = k + width
    padding = jnp.broadcast_to(jnp.full_like(x[:, :1], outside), (nodes, k + 1, *batch))
    rows = jnp.broadcast_to(jnp.concatenate([x, padding], 1)[:, None], (nodes, width, length + 1, *batch))
    places = rows.reshape(nodes, width * (length + 1), *batch)[:, : width * length]
    return jnp.swapaxes(places.reshape(nodes, width, length, *batch)[:, :, : k + 1], 1, 2)


def _tree(k, logits):
    """(left halves, right halves, both) for the nodes of each level, from the elements to the root."""
    logits = jnp.moveaxis(logits, -1, 0)[:, None]
    both = _Nodes(
        *(jnp.concatenate([jnp.zeros_like(logits), x], 1) for x in (logits, jnp.zeros_like(logits)))
    )
    tree = []
    while len(both.high) > 1:
        nothing = jnp.zeros_like(both.low[:1])  # e_0 = 1, and e_j = 0
        impossible = jnp.concatenate([nothing[:, :1], jnp.full_like(nothing[:, 1:], -jnp.inf)], 1)
        halves = _halves(both.high, impossible), _halves(both.low, nothing)
        left, right = map(_Nodes, *halves)
        both = _merged(k, left, right)
        tree.append((left, right, both))
    return tree


def _halves(nodes, nothing):
    """The first half of the nodes and the second, which ends with `nothing` if their number is odd."""
    half = -(-len(nodes) // 2)
    second = nodes[half:]
    return nodes[:half], jnp.concatenate([second, nothing]) if len(nodes) % 2 else second


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _merged(k, left, right):
    """The nodes above these: log e_m = log sum_i exp(log e_i + log e_(m-i)), for m up to k."""
    left, right = left.over(1), right.of_the_rest(_most(k, left))
    total, lost = lm.two_sum(left.high, right.high)
    largest = jnp.max(total, 2, keepdims=True)
    largest = where(largest == -jnp.inf, 0, largest)
    terms = jnp.exp((total - largest) + (lost + left.low + right.low))
    log_sum = jnp.log(jnp.sum(where(total == -jnp.inf, 0, terms), 2))
    high, low = lm.two_sum(largest.squeeze(2), log_sum)
    return _Nodes(high, where(jnp.isinf(high), 0, low))


@_merged.defjvp
def _merged_jvp(k, primals, tangents):
    (left, right), (left_dot, right_dot) = primals, tangents
    both = _merged(k, left, right)
    slope = left_dot.high[:, None] + _of_the_rest(right_dot.high, _most(k, left), 0)
    slope = jnp.sum(_all_shares(left, right, both) * slope, 2)
    return both, _Nodes(slope, jnp.zeros_like(slope))  # the rounding error has no slope


def _most(k, half):
    """The largest count in a node with two halves like this one."""
    return min(2 * half.high.shape[1] - 2, k)


def _log_share(left, right, both):
    """log(e_i e_j / e_m), the log-probability that m splits into i and j."""
    total, lost = lm.two_sum(left.high, right.high)
    impossible = total == -jnp.inf
    gap = where(impossible, 0, total) - where(impossible, 0, both.high)
    return where(impossible, -jnp.inf, gap + (lost + left.low + right.low - both.low))


@jax.custom_jvp
def _share(left, right, both):
    return jnp.exp(_log_share(left, right, both))


@_share.defjvp
def _share_jvp(primals, tangents):
    share = _share(*primals)
    left, right, both = tangents
    return share, share * (left.high + right.high - both.high)


def _all_shares(left, right, both):
    """At (node, m, i, ...), the probability that m splits into i on the left and m - i on the right."""
    return _share(left.over(1), right.of_the_rest(both.high.shape[1] - 1), both.over(2))


def _shares_of(count, left, right, both):
    """At (node, i, ...), the same for one count in each node."""
    width = left.high.shape[1]
    rest = count - jnp.arange(width, dtype=count.dtype).reshape(1, width, *[1] * (count.ndim - 2))
    possible = (rest >= 0) & (rest < width)
    return where(possible, _share(left, right.at(where(possible, rest, 0)), both.at(count)), 0)


@functools.partial(jax.jit, static_argnums=0)
def _marginals(k, logits, count=None):
    in_sequence, by_tree = (
        functools.partial(form, k) for form in (_marginals_in_sequence, _marginals_by_tree)
    )
    return jax.lax.platform_dependent(logits, count, cpu=in_sequence, default=by_tree)


def _marginals_by_tree(k, logits, count=None):
    """The probability of each count in each node, from the root down."""
    count = _start(k, count, logits[..., 0])[None]
    for left, right, both in reversed(_tree(k, logits)):
        count = count[: len(both.high), : both.high.shape[1], None]
        shares = _all_shares(left, right, both), _all_shares(right, left, both)
        count = jnp.concatenate([jnp.sum(count * share, 1) for share in shares])
    return jnp.moveaxis(count[: logits.shape[-1], 1], 0, -1)


def _marginals_in_sequence(k, logits, count=None):
    """The probability of how many are left to choose, from the last element to the first."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def visit(left, log_odds):
        chosen = left * jax.nn.sigmoid(log_odds)
        passed = left * jax.nn.sigmoid(-log_odds)
        return passed + jnp.concatenate([chosen[1:], jnp.zeros_like(chosen[:1])]), jnp.sum(chosen, 0)

    log_odds = _log_odds(logits, k)
    _, marginals = jax.lax.scan(visit, _start(k, count, logits[..., 0]), log_odds, reverse=True)
    return jnp.moveaxis(marginals, 0, -1)


def _log_odds(logits, k):
    """The log-odds of each element to be chosen, for each number left to choose among it and those before it.

    They come from the ratios ``D_j = log(e_j / e_(j-1))`` of the elements so far, a softened list of their
    sorted logits. The ratios stay within the range of the logits, and inserting an element never amplifies an
    error. The shape is (n, k + 1, ...), so vectors run along the batch and shifting a count moves whole
    vectors.
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


@jax.custom_jvp
def _insert(ratios, logit):
    """The log-odds l - D_j of one more element, and the ratios D_j after it, with j = 0..k on the first axis.

    D_j' = log(exp(D_j) + exp(l)) - log(1 + exp(l - D_(j-1))), written so that nothing large cancels. D_0 is
    inf, and D_j is -inf for more elements than there are. The ratios are pairs of numbers; the second is the
    rounding error of the first. Without it, the errors of thousands of logits near 1e4, where float32
    resolves 1e-3, would add up to a few percent.
    """
    high, low = ratios
    log_odds = where(logit == -jnp.inf, -jnp.inf, (logit - high) - low)
    soft = jnp.log1p(jnp.exp(-jnp.abs(log_odds)))
    softened = soft[1:] - soft[:-1]
    stays, moves_up = log_odds[1:] <= 0, log_odds[:-1] >= 0  # the first are never below the second
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
    (ratios_dot, _), logit_dot = tangents  # the rounding error has no slope
    log_odds, ratios = _insert(*primals)
    keep, push = jax.nn.sigmoid(-log_odds[1:]), jax.nn.sigmoid(log_odds[:-1])
    logit_dot = where(logit == -jnp.inf, 0, logit_dot)
    slope = keep * ratios_dot[1:] + push * ratios_dot[:-1] + (1 - keep - push) * logit_dot
    slope = jnp.concatenate([jnp.zeros_like(slope[:1]), slope])
    return (log_odds, ratios), (logit_dot - ratios_dot, (slope, jnp.zeros_like(slope)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _slope_of_marginals(k, logits, count=None):
    """An unused value, NaN where there is no law, with the derivative of the marginals."""
    lawful = _has_enough(k, logits, count) & ~jnp.any(jnp.isnan(logits), -1, keepdims=True)
    shape = (*lawful.shape[:-1], logits.shape[-1])
    return jnp.broadcast_to(where(lawful, 0, jnp.nan), shape).astype(logits.dtype)


@_slope_of_marginals.defjvp
def _slope_of_marginals_jvp(k, primals, tangents):
    (logits, count), (logits_dot, _) = primals, tangents
    mean, slope = jax.jvp(lambda logits: _marginals(k, logits, count), (logits,), (logits_dot,))
    # the exact slopes sum to zero; removing their rounding errors leaves less in the gradients too
    number = k if count is None else jnp.maximum(count, 1)[..., None].astype(slope.dtype)
    slope -= mean * (jnp.sum(slope, -1, keepdims=True) / number)
    return _slope_of_marginals(k, *primals), slope
