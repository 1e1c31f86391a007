"""Linear chains: sequences of classes in which each step depends on the previous one (linear-chain CRFs).

There are two forms of the same mathematics. In the sequential form, a filter visits the steps one after
another and costs O(T K^2); CPUs use this form. With a balanced tree, accelerators take log2(T) steps: a node
has the log-weights of all paths between its first and its last class, K x K numbers, at a cost of O(T K^3).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where

# The largest numbers of classes with which accelerators use the tree: for values and first derivatives, and
# for second derivatives, for which a compiler stores O(T K^3) numbers.
MOST_CLASSES, MOST_FOR_SLOPES = 64, 16
NEVER = -1e30  # stands for -inf, with which second derivatives through a scan are NaN


def chain_log_partition(unary: ArrayLike, transition: ArrayLike) -> Array:
    """Compute the log-partition function of a linear chain, the log-sum over all K^T sequences.

    ``A = log sum_z exp(sum_t unary[t, z_t] + sum_t transition[t, z_t, z_(t+1)])``. Its gradient in ``unary``
    is `chain_marginals`. Its gradient in ``transition`` is the expected number of times that each transition
    is made.

    Args:
      unary: log-weights of the classes at each step, shape (..., T, K); -inf is a forbidden class.
      transition: log-weights of class j after class i, shape (K, K) for all steps, or (..., T - 1, K, K), or
        (..., 1, K, K) for all steps of a batch element; -inf is forbidden.

    Returns:
      An array of the broadcast batch shape, float32 or wider. It is -inf, with gradient 0, if no sequence is
      possible. Time is O(T K^2) in T steps on CPUs, and for more than 64 classes. On accelerators it is O(T
      K^3) in log2(T) steps, and memory holds 2 T matrices of K x K.

    Raises:
      ValueError: for arguments that are not floating point, or shapes that do not fit together.

    References:
      J. Lafferty, A. McCallum, F. Pereira (2001), Conditional Random Fields, ICML; S. Sarkka,
      A. F. Garcia-Fernandez (2021), Temporal Parallelization of Bayesian Smoothers, arXiv:1905.13002, for
      the logarithmic depth.

    >>> print(f"{chain_log_partition(jnp.zeros((5, 3)), jnp.zeros((3, 3))):.4f}")  # 5 log 3
    5.4931
    """
    _, unary, transition = as_potentials(unary, transition)
    return _log_partition(unary, transition)


def chain_marginals(unary: ArrayLike, transition: ArrayLike) -> Array:
    """Compute the probability of each class at each step of a linear chain.

    ``mu[t, k] = P(z_t = k) = dA / d unary[t, k]``, where A is the log-partition function. The probabilities
    of pairs are the gradient of `chain_log_partition` in ``transition``.

    Args:
      unary: log-weights of the classes at each step, shape (..., T, K); -inf is a forbidden class.
      transition: log-weights of class j after class i, shape (K, K), (..., T - 1, K, K) or (..., 1, K, K).

    Returns:
      Probabilities of the broadcast batch shape and (T, K), in the dtype of the potentials; each step sums to
      1. NaN under a trace if no sequence is possible.

    Raises:
      ValueError: as for `chain_log_partition`, and for potentials that leave no sequence possible.

    References:
      L. R. Rabiner (1989), A Tutorial on Hidden Markov Models, doi:10.1109/5.18626.

    >>> stay = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> print(f"{chain_marginals(jnp.array([[2.0, 0.0], [0.0, 0.0]]), stay)[1, 0]:.4f}")
    0.7900
    """
    dtype, unary, transition = as_potentials(unary, transition, possible=True)
    lawful = _log_partition(unary, transition) > -jnp.inf
    return where(lawful[..., None, None], _marginals(unary, transition), jnp.nan).astype(dtype)


def chain_sample(
    key: Array, unary: ArrayLike, transition: ArrayLike, *, shape: Sequence[int] | None = None
) -> Array:
    """Sample a sequence of a linear chain exactly, as one-hot vectors with the gradient of the marginals.

    ``P(z) = exp(sum_t unary[t, z_t] + sum_t transition[t, z_t, z_(t+1)] - A)``, drawn by forward filtering
    and backward sampling. The gradient is the gradient of `chain_marginals`, just as in SIMPLE for subsets.

    Args:
      key: a JAX random key.
      unary: log-weights of the classes at each step, shape (..., T, K); -inf is a forbidden class.
      transition: log-weights of class j after class i, shape (K, K), (..., T - 1, K, K) or (..., 1, K, K).
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      One-hot vectors of shape ``shape + (T, K)``, in the dtype of the potentials; NaN under a trace if no
      sequence is possible. It costs as much as `chain_log_partition`, plus T K numbers of noise for each
      draw.

    Raises:
      ValueError: as for `chain_marginals`, and for a ``shape`` that the parameters do not broadcast to.

    References:
      C. K. Carter, R. Kohn (1994), On Gibbs sampling for state space models, doi:10.1093/biomet/81.3.541;
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), arXiv:2210.01941, for the gradient.

    >>> alternate = jnp.array([[-jnp.inf, 0.0], [0.0, -jnp.inf]])
    >>> chain_sample(jax.random.key(0), jnp.array([[0.0, 50.0], [0.0, 0.0]]), alternate)
    Array([[0., 1.],
           [1., 0.]], dtype=float32)
    """
    arg.check_key(key)
    dtype, unary, transition = as_potentials(unary, transition, possible=True)
    shape = arg.batch_shape(shape, unary=unary.shape[:-2], transition=transition.shape[:-3])
    unary, transition = _with_axes(unary, len(shape) + 2), _with_axes(transition, len(shape) + 3)
    drawn = _drawn(shape, key, *jax.lax.stop_gradient((unary, transition)))
    soft = jnp.broadcast_to(_slope_of_marginals(unary, transition), (*shape, *unary.shape[-2:]))
    return gr.straight_through(drawn, soft).astype(dtype)


def chain_log_prob(value: ArrayLike, unary: ArrayLike, transition: ArrayLike) -> Array:
    """Log-probability of a sequence of a linear chain.

    ``log P(z) = sum_t unary[t, z_t] + sum_t transition[t, z_t, z_(t+1)] - A``, computed as a sum of
    log-probabilities of each class given the next one, so that nothing large is subtracted.

    Args:
      value: one-hot vectors, shape (..., T, K).
      unary: log-weights of the classes at each step, shape (..., T, K).
      transition: log-weights of class j after class i, shape (K, K), (..., T - 1, K, K) or (..., 1, K, K).

    Returns:
      Log-probabilities of the broadcast batch shape, float32 or wider; -inf for a forbidden sequence and for
      a value that is not one-hot, NaN under a trace if no sequence is possible. The gradient in the
      potentials is the sequence minus its mean; the gradient in the value is the potentials of its neighbors.

    Raises:
      ValueError: as for `chain_marginals`, and for a ``value`` with a different number of steps or classes.

    References:
      J. Lafferty, A. McCallum, F. Pereira (2001), Conditional Random Fields, ICML.

    >>> log_p = chain_log_prob(jnp.eye(2), jnp.zeros((2, 2)), jnp.array([[0.0, 1.0], [0.0, 0.0]]))
    >>> print(f"{jnp.exp(log_p):.4f}")  # e / (e + 3)
    0.4754
    """
    _, unary, transition = as_potentials(unary, transition, possible=True)
    given = value = arg.as_number("value", value)
    event = unary.shape[-2:]
    need = f"of shape (..., {event[0]}, {event[1]})"
    arg.require(value.shape[-2:] == event, "value", need, f"shape {value.shape}")
    batch = arg.batch_shape(
        None, value=value.shape[:-2], unary=unary.shape[:-2], transition=transition.shape[:-3]
    )
    unary, transition = _with_axes(unary, len(batch) + 2), _with_axes(transition, len(batch) + 3)
    value = _with_axes(value.astype(unary.dtype), len(batch) + 2)
    one_hot = jnp.all((value == 0) | (value == 1), (-1, -2)) & jnp.all(jnp.sum(value, -1) == 1, -1)
    # a value outside is scored as the first sequence, and then replaced
    first = lm.is_class(jnp.zeros((1,), jnp.int32), unary).astype(unary.dtype)
    value = where(one_hot[..., None, None], value, first)
    law = where(one_hot, _log_prob(value, unary, transition), -jnp.inf)
    lawful = _log_partition(unary, transition) > -jnp.inf
    law = where(lawful, law, jnp.nan)
    return law + where(jnp.any(jnp.isnan(given), (-1, -2)), jnp.nan, 0).astype(law.dtype)


def relaxed_chain(
    key: Array,
    unary: ArrayLike,
    transition: ArrayLike,
    tau: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
) -> Array:
    """Sample a relaxed sequence of a linear chain (stochastic softmax trick).

    ``z = mu((unary + G) / tau, transition / tau)``, where mu is the marginals and G is standard Gumbel noise.
    As tau falls, z tends to the sequence with the largest weight under the same noise. This law differs from
    the law of `chain_sample`: the noise is on the classes of each step, not on each sequence.

    Args:
      key: a JAX random key.
      unary: log-weights of the classes at each step, shape (..., T, K); -inf is a forbidden class.
      transition: log-weights of class j after class i, shape (K, K), (..., T - 1, K, K) or (..., 1, K, K).
      tau: temperature, positive, of the batch shape (no axes for T and K).
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      Points of the convex hull of the sequences, shape ``shape + (T, K)``, in the dtype of the potentials;
      each step sums to 1. NaN under a trace if no sequence is possible.

    Raises:
      ValueError: as for `chain_sample`, and for a ``tau`` that is not positive or has axes for T or K.

    References:
      M. B. Paulus, D. Choi, D. Tarlow, A. Krause, C. J. Maddison (2020), Gradient Estimation with Stochastic
      Softmax Tricks, arXiv:2006.08063.

    >>> z = relaxed_chain(jax.random.key(0), jnp.zeros((4, 3)), jnp.zeros((3, 3)), 0.5)
    >>> z.sum(-1).round(4)
    Array([1., 1., 1., 1.], dtype=float32)
    """
    arg.check_key(key)
    dtype, unary, transition = as_potentials(unary, transition, possible=True)
    tau = arg.as_tau(tau, unary.dtype)
    shape = arg.batch_shape(
        shape, unary=unary.shape[:-2], transition=transition.shape[:-3], per_event={"tau": tau.shape}
    )
    noise = rng.gumbel(key, (*shape, *unary.shape[-2:]), unary)
    perturbed = lm.over_tau(_centred(unary) + noise, tau[..., None, None])
    transition = lm.over_tau(_centred(transition, (-1, -2)), tau[..., None, None, None])
    transition = _with_axes(transition, perturbed.ndim + 1)
    lawful = _log_partition(perturbed, transition) > -jnp.inf
    return where(lawful[..., None, None], _marginals(perturbed, transition), jnp.nan).astype(dtype)


# --- arguments ------------------------------------------------------------------------------------


def as_potentials(unary, transition, *, possible=False):
    """The dtype of a result, and both potentials in float32 or wider, the second with an axis for steps."""
    shape, of_pairs = arg.shape_of("unary", unary), arg.shape_of("transition", transition)
    good = len(shape) > 1 and shape[-1] > 0 and shape[-2] > 0
    arg.require(good, "unary", "of shape (..., T, K), T and K at least 1", f"shape {shape}")
    steps, k = shape[-2:]
    need = (
        f"of shape ({k}, {k}), (..., {steps - 1}, {k}, {k}) or (..., 1, {k}, {k}) with unary of shape {shape}"
    )
    good = of_pairs[-2:] == (k, k) and (len(of_pairs) == 2 or of_pairs[-3] in (1, steps - 1))
    arg.require(good, "transition", need, f"shape {of_pairs}")
    for name, x in {"unary": unary, "transition": transition}.items():
        arg.require_values(name, x, "below inf", lambda x: ~(x == np.inf))
    if possible:
        _require_possible(unary, transition, steps)
    dtype, unary, transition = arg.widen(unary=unary, transition=transition)
    transition = transition[None] if transition.ndim == 2 else transition
    if not transition.shape[-3]:  # a single step
        transition = jnp.zeros((*transition.shape[:-3], 1, k, k), transition.dtype)
    ndim = max(unary.ndim, transition.ndim - 1)
    return dtype, _with_axes(unary, ndim), _with_axes(transition, ndim + 1)


def _require_possible(unary, transition, steps):
    """Require that a sequence is possible, if the potentials are concrete and forbid anything."""
    arg.require_values("unary", unary, "above -inf for a class of each step", _has_class)
    if not (arg.can_be_seen(unary) and arg.can_be_seen(transition)):
        return
    of_steps = np.asarray(unary, float)

    def holds(transition):
        allowed = np.asarray(transition, float) != -np.inf
        if allowed.all():
            return True
        allowed = allowed[None] if allowed.ndim == 2 else allowed
        reached = of_steps[..., 0, :] != -np.inf
        for t in range(1, steps):
            step = allowed[..., min(t, allowed.shape[-3]) - 1, :, :]
            reached = (reached[..., None] & step).any(-2) & (of_steps[..., t, :] != -np.inf)
        return reached.any(-1)

    arg.require_values("transition", transition, "such that a sequence is possible", holds)


def _has_class(unary):
    return (unary != -np.inf).any(-1)


def _with_axes(x, ndim):
    """As many axes as the result has, of size one, so that draws share their tables."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _centred(x, axes=(-1,)):
    """Subtract the largest along these axes, which leaves the same law."""
    return x - _finite(jax.lax.stop_gradient(jnp.max(x, axes, keepdims=True)))


def _grounded(x):
    return where(x == -jnp.inf, NEVER, x)


def _finite(x):
    return where(x == -jnp.inf, 0, x)


# --- the filter -----------------------------------------------------------------------------------


@jax.custom_jvp
def _log_product(left, right):
    """log(exp(left) exp(right)) for two matrices; -inf without a slope where nothing is possible."""
    x = left[..., :, :, None] + right[..., None, :, :]
    top = _finite(jnp.max(x, -2, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(x - top), -2)) + top.squeeze(-2)
    return checkpoint_name(total, "log-products")


@_log_product.defjvp
def _log_product_jvp(primals, tangents):
    (left, right), (left_dot, right_dot) = primals, tangents
    total = _log_product(left, right)
    share = _share(left[..., :, :, None] + right[..., None, :, :], total[..., None, :])
    slope = jnp.sum(share * (left_dot[..., :, :, None] + right_dot[..., None, :, :]), -2)
    return total, slope


def _share(x, total):
    """exp(x - total), 0 where x is -inf."""
    never = x == -jnp.inf
    return where(never, 0, jnp.exp(where(never, 0, x - _finite(total))))


# Nothing of size K^3, or K^2 for each step, is kept for the backward pass: it is recomputed from the sums.
_keeping_sums = functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names("log-products"),
)


@_keeping_sums
def _filter_step(alpha, unary, transition):
    """The log-weights of the classes of the next step minus their largest; this largest; the sums over the
    previous classes."""
    sums = _log_product(alpha[..., None, :], transition)[..., 0, :]
    total = unary + sums
    top = jax.lax.stop_gradient(jnp.max(total, -1, keepdims=True))
    top = _finite(top)
    return total - top, top[..., 0], sums


def _in_time(unary, transition):
    """Steps first: the first unary log-weights, those after them, and the transitions to them."""
    unary = _grounded(jnp.moveaxis(unary, -2, 0))
    transition = _grounded(jnp.moveaxis(transition, -3, 0))
    batch = jnp.broadcast_shapes(unary.shape[1:-1], transition.shape[1:-2])
    first = pl.placed(jnp.broadcast_to(unary[0], (*batch, unary.shape[-1])), unary[0], transition[0, ..., 0])
    return first, unary[1:], transition


def _filtered(unary, transition):
    """At (t, ..., k): log-weights of sequences up to step t that end in k, minus an offset; the offset; and,
    for all steps but the first, the log-weights without the step's own."""
    first, rest, transition = _in_time(unary, transition)
    top = _finite(jax.lax.stop_gradient(jnp.max(first, -1, keepdims=True)))
    first, top = first - top, top[..., 0]
    shared = transition.shape[0] == 1 and len(rest) != 1

    def visit(alpha, step):
        alpha, top, sums = _filter_step(alpha, step[0], transition[0] if shared else step[1])
        return alpha, (alpha, top, sums)

    if not len(rest):
        return first[None], top[None], first[:0]
    _, (alphas, tops, sums) = jax.lax.scan(visit, first, (rest,) if shared else (rest, transition))
    return jnp.concatenate([first[None], alphas]), jnp.concatenate([top[None], tops]), sums


def _log_partition_in_sequence(unary, transition):
    alphas, tops, _ = _filtered(unary, transition)
    return lm.log_sum_exp(alphas[-1]) + jnp.sum(tops, 0)


def _shares(alpha, transition, sums):
    """P(class | the next class), classes last but one."""
    return jnp.exp(alpha[..., :, None] + transition - sums[..., None, :])


# The K^2 shares of a step are recomputed instead of kept.
_lean = functools.partial(jax.checkpoint, prevent_cse=False)


@_lean
def _along_forward(slope, alpha, sums, transition, transition_slope, unary_slope):
    """The slopes of the next step's log-weights, and the slopes of the sums over the previous classes."""
    share = _shares(alpha, transition, sums)
    of_sums = jnp.sum(share * (slope[..., :, None] + transition_slope), -2)
    return of_sums + unary_slope, of_sums


@_lean
def _back(mean, alpha, sums, transition):
    """The marginals of a step, given the marginals of the next step."""
    return jnp.sum(_shares(alpha, transition, sums) * mean[..., None, :], -1)


@_lean
def _along_backward(mean_slope, mean, slope, of_sums, alpha, sums, transition, transition_slope):
    """Their slopes: of `_back`, whose shares have the slopes of their logarithms as factors."""
    of_shares = slope[..., :, None] + transition_slope - of_sums[..., None, :]
    inner = mean_slope[..., None, :] + of_shares * mean[..., None, :]
    return jnp.sum(_shares(alpha, transition, sums) * inner, -1)


def _marginals_and_slope(unary, transition, unary_dot, transition_dot):
    """The marginals, and their slope along a direction, linear in it: passes forward and backward.

    The derivative of the gradient of the log-partition would be the same, in more passes that keep more.
    """
    alphas, _, sums = _filtered(unary, transition)
    (_, rest, transition), slopes = jax.jvp(_in_time, (unary, transition), (unary_dot, transition_dot))
    first_dot, rest_dot, transition_dot = slopes
    shared = transition.shape[0] == 1 and len(rest) != 1
    of_step = lambda pair: (transition[0], transition_dot[0]) if shared else pair
    pairs = None if shared else (transition, transition_dot)

    def forward(slope, step):
        alpha, sums, rest_dot, pair = step
        after, of_sums = _along_forward(slope, alpha, sums, *of_step(pair), rest_dot)
        return after, (slope, of_sums)

    def backward(after, step):
        mean, mean_dot = after
        alpha, sums, slope, of_sums, pair = step
        transition, transition_dot = of_step(pair)
        before_dot = _along_backward(mean_dot, mean, slope, of_sums, alpha, sums, transition, transition_dot)
        before = _back(mean, alpha, sums, transition), before_dot
        return before, before

    slope, mean = first_dot, jax.nn.softmax(alphas[-1])
    if len(rest):
        slope, (slopes, of_sums) = jax.lax.scan(forward, slope, (alphas[:-1], sums, rest_dot, pairs))
    mean_dot = mean * (slope - jnp.sum(mean * slope, -1, keepdims=True))
    last = mean, mean_dot
    if len(rest):
        steps = alphas[:-1], sums, slopes, of_sums, pairs
        _, before = jax.lax.scan(backward, last, steps, reverse=True)
        last = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), before, last)
    else:
        last = jax.tree.map(lambda last: last[None], last)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2), last)


# --- the tree -------------------------------------------------------------------------------------


@jax.custom_jvp
def _log_product_in_one(left, right):
    """`_log_product` as one reduction of pairs, the largest together with the sum: one kernel on a GPU."""
    x = left[..., :, :, None] + right[..., None, :, :]

    def add(one, other):
        (x, at_x), (y, at_y) = one, other
        top = jnp.maximum(x, y)
        of = _finite(top)
        return top, at_x * jnp.exp(x - of) + at_y * jnp.exp(y - of)

    start = jnp.array(-jnp.inf, x.dtype), jnp.array(0, x.dtype)
    top, total = jax.lax.reduce((x, jnp.ones_like(x)), start, add, (x.ndim - 2,))
    return checkpoint_name(top + jnp.log(where(top == -jnp.inf, 1, total)), "log-products")


@_log_product_in_one.defjvp
def _log_product_in_one_jvp(primals, tangents):
    """Two reductions with their axes in different orders.

    A compiler that saw the same shares in both, K^3 numbers, would store them.
    """
    (left, right), (left_dot, right_dot) = primals, tangents
    total = _log_product_in_one(left, right)
    share = _share(left[..., :, :, None] + right[..., None, :, :], total[..., None, :])
    slope = jnp.sum(share * left_dot[..., :, :, None], -2)
    turned = jnp.matrix_transpose(left)[..., :, :, None] + right[..., :, None, :]
    share = _share(turned, total[..., None, :, :])
    return total, slope + jnp.sum(share * right_dot[..., :, None, :], -3)


_joined = _keeping_sums(_log_product_in_one)


def _leaves(unary, transition):
    """At (t, ..., i, j): the log-weight of going from i to j, and of being in i at the first step."""
    first, rest, transition = _in_time(unary, transition)
    leaves = transition + rest[..., None, :]
    start = where(jnp.arange(len(leaves)).reshape(-1, *[1] * first.ndim) == 0, first, 0)
    return leaves + start[..., :, None]


def _tree(unary, transition):
    """(left halves, right halves, how many are not padding) for the levels, the root, the sum of offsets."""
    nodes, total, levels = _leaves(unary, transition), 0, []
    k = nodes.shape[-1]
    while len(nodes) > 1:
        if len(levels) % 3 == 0:  # the numbers stay within a few times the range of the potentials
            top = _finite(jax.lax.stop_gradient(jnp.max(nodes, (-1, -2), keepdims=True)))
            nodes, total = nodes - top, total + jnp.sum(top[..., 0, 0], 0)
        left, right = nodes[::2], nodes[1::2]
        if len(nodes) % 2:
            nothing = where(jnp.eye(k, dtype=bool), jnp.zeros_like(nodes[:1]), NEVER)
            right = jnp.concatenate([right, nothing])
        levels.append((left, right, len(nodes) // 2))
        nodes = _joined(left, right)
    return levels, nodes[0], total


def _log_partition_by_tree(unary, transition):
    _, root, total = _tree(unary, transition)
    return lm.log_sum_exp(root.reshape(*root.shape[:-2], -1)) + total


# --- both -----------------------------------------------------------------------------------------


def _either(most, unary, in_sequence, by_tree, *operands):
    """The form for the platform: the tree if it is possible and faster."""
    steps, k = unary.shape[-2:]
    if steps == 1 or k > most:
        return in_sequence(*operands)
    return jax.lax.platform_dependent(*operands, cpu=in_sequence, default=by_tree)


@jax.jit
def _log_partition(unary, transition):
    value = _either(
        MOST_CLASSES, unary, _log_partition_in_sequence, _log_partition_by_tree, unary, transition
    )
    hidden = jnp.any(jnp.isnan(unary), (-1, -2)) | jnp.any(jnp.isnan(transition), (-1, -2, -3))
    return where(hidden, jnp.nan, where(value < NEVER / 2, -jnp.inf, value))


@jax.jit
def _slope(unary, transition):
    batch = jnp.broadcast_shapes(unary.shape[:-2], transition.shape[:-3])
    unary = pl.placed(
        jnp.broadcast_to(unary, (*batch, *unary.shape[-2:])), unary, transition[..., 0, 0, :, None]
    )
    return jax.grad(lambda unary: jnp.sum(_log_partition(unary, transition)))(unary)


_marginals = jax.custom_jvp(_slope)


@_marginals.defjvp
@jax.jit
def _marginals_jvp(primals, tangents):
    unary = primals[0]

    def by_tree(*given):
        if unary.shape[-1] > MOST_FOR_SLOPES:
            return _slope(*given[:2]), _marginals_and_slope(*given)[1]
        return jax.jvp(_slope, given[:2], given[2:])

    return _either(MOST_CLASSES, unary, _marginals_and_slope, by_tree, *primals, *tangents)


@jax.custom_jvp
def _slope_of_marginals(unary, transition):
    """An unused value, NaN where there is no law, with the derivative of the marginals."""
    lawful = _log_partition(unary, transition) > -jnp.inf
    value = where(lawful, 0, jnp.nan)[..., None, None]
    return jnp.broadcast_to(value, (*value.shape[:-2], *unary.shape[-2:])).astype(unary.dtype)


@_slope_of_marginals.defjvp
def _slope_of_marginals_jvp(primals, tangents):
    value = _slope_of_marginals(*primals)
    return value, pl.placed(jax.jvp(_marginals, primals, tangents)[1], value)


def _race(logits, noise):
    """The index of the class that arrives first, of shape (..., 1); see `rng.categorical`."""
    return lm.index_of_largest(jnp.exp(lm.centre(logits)) / noise)


@functools.partial(jax.jit, static_argnums=0)
def _drawn(shape, key, unary, transition):
    """One-hot sequences."""
    steps, k = unary.shape[-2:]
    noise = rng.exponential(key, (*shape, steps, k), unary)

    def in_sequence(noise, unary, transition):
        alphas, *_ = _filtered(unary, transition)
        noise = jnp.moveaxis(noise, -2, 0)
        transition = jnp.moveaxis(transition, -3, 0)
        last = _race(alphas[-1], noise[-1])
        shared = transition.shape[0] == 1 and steps != 2

        def visit(after, step):
            alpha, noise, *of_step = step
            index = _race(alpha + _column(transition[0] if shared else of_step[0], after), noise)
            return index, index

        if steps == 1:
            return last[..., None, :]
        each = (alphas[:-1], noise[:-1]) if shared else (alphas[:-1], noise[:-1], transition)
        _, before = jax.lax.scan(visit, last, each, reverse=True)
        return jnp.moveaxis(jnp.concatenate([before, last[None]]), 0, -2)

    def by_tree(noise, unary, transition):
        levels, root, _ = _tree(unary, transition)
        noise = jnp.moveaxis(noise, -2, 0)
        first = _race(jax.nn.logsumexp(root, -1), noise[0])
        last = _race(_row(root, first), noise[1])
        ends, spare, noise = jnp.stack([first, last]), noise[:1], noise[2:]
        for left, right, real in reversed(levels):
            count = len(left)
            own, noise = noise[:real], noise[real:]
            if real < count:  # the right half is padding: its midpoint is its end, whatever the noise is
                own = jnp.concatenate([own, jnp.ones_like(spare)])
            middle = _race(_row(left, ends[:-1]) + _column(right, ends[1:]), own)
            both = jnp.stack([ends[:-1], middle], 1)
            ends = jnp.concatenate([both.reshape(2 * count, *both.shape[2:]), ends[-1:]])
            ends = ends[: count + real + 1]
        return jnp.moveaxis(ends, 0, -2)

    index = _either(MOST_CLASSES, unary, in_sequence, by_tree, noise, unary, transition)
    return lm.is_class(index, unary)


def _row(matrices, index):
    """x[index, :] of each matrix; the index has an axis of size 1."""
    return _column(jnp.matrix_transpose(matrices), index)


def _column(matrices, index):
    """x[:, index] of each matrix."""
    if (
        pl.spec_of(index.shape, index) is not None
    ):  # an explicit mesh has no rule for a gather from fewer rows
        chosen = jnp.arange(matrices.shape[-1]) == index
        return jnp.sum(where(chosen[..., None, :], matrices, 0), -1)
    return jnp.take_along_axis(matrices, index[..., None, :], -1, mode="fill")[..., 0]


def log_conditionals(unary, transition):
    """log P(last class), and at (t, ..., i, j) log P(z_t = i | z_(t+1) = j)."""
    alphas, *_ = _filtered(unary, transition)
    joint = alphas[:-1, ..., :, None] + _grounded(jnp.moveaxis(transition, -3, 0))
    before = _log_normalized(joint, -2)
    return _log_normalized(alphas[-1], -1), before


def _log_normalized(x, axis):
    top = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(x - top), axis, keepdims=True))
    return where(x < NEVER / 2, -jnp.inf, (x - top) - total)


@jax.custom_jvp
@jax.jit
def _log_prob(value, unary, transition):
    """The log-probability of each class given the next one, from the last class to the first."""
    last, before = log_conditionals(unary, transition)
    value = jnp.moveaxis(value, -2, 0) > 0
    pairs = value[:-1, ..., :, None] & value[1:, ..., None, :]
    law = jnp.sum(where(value[-1], last, 0), -1)
    return law + jnp.sum(where(pairs, before, 0), (0, -1, -2))


@_log_prob.defjvp
def _log_prob_jvp(primals, tangents):
    (value, unary, transition), (value_dot, unary_dot, transition_dot) = primals, tangents

    def score(value, unary, transition):
        pairs = value[..., :-1, :, None] * value[..., 1:, None, :]
        return jnp.sum(value * unary, (-1, -2)) + jnp.sum(pairs * transition, (-1, -2, -3))

    finite = _finite(unary), _finite(transition)
    along = value_dot, unary_dot, transition_dot
    slope = jax.jvp(score, (value, *finite), along)[1]
    slope -= jax.jvp(_log_partition, (unary, transition), (unary_dot, transition_dot))[1]
    law = _log_prob(*primals)
    return law, jnp.broadcast_to(slope, law.shape)
