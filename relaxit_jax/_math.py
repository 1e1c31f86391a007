"""Log-space functions and their derivatives, and selections along the last axis.

Values and gradients are finite for logits within +-1e4 and temperatures in [1e-3, 1e3]. A logit of -inf is an
impossible class with value 0 and gradient 0. Densities of the library's own draws are right at a low
temperature, because they are computed from log-space values.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from relaxit_jax import _placement as pl
from relaxit_jax._placement import where


def largest(x):
    """Mark the largest along the last axis, the first of equals; nothing if there is a NaN."""
    return is_class(index_of_largest(x), x)


def is_class(index, like):
    """Mark the class of the last axis of `like` that has this index, an array with an axis for it."""
    return jnp.arange(like.shape[-1], dtype=index.dtype) == index


@jax.jit
def index_of_largest(x):
    """The index of the largest along the last axis, which is kept: the first of equals, K if one is NaN."""
    x = jax.lax.stop_gradient(x)
    return jax.lax.platform_dependent(x, cpu=largest_of_numbers, default=largest_of_pairs)


def largest_of_numbers(x):
    """Find it with two plain reductions.

    CPUs run a reduction of pairs one number at a time, which would make straight-through Gumbel-softmax half
    as slow again.
    """
    at_top = x == jnp.max(x, -1, keepdims=True)
    return jnp.min(where(at_top, jnp.arange(x.shape[-1]), x.shape[-1]), -1, keepdims=True)


def largest_of_pairs(x):
    """Find it with one reduction of pairs, for which accelerators need not store x or noise added to it."""
    k = x.shape[-1]

    def larger(one, other):
        (x, i), (y, j) = one, other
        second = (y > x) | (y != y) | ((y == x) & (j < i))
        top = where(second, y, x)
        return top, where(top != top, k, where(second, j, i))

    index = jnp.arange(k)  # of the same dtype as in the form for CPUs
    index = index + _zero_like(x).astype(index.dtype)
    start = jnp.array(-jnp.inf, x.dtype), jnp.array(k, index.dtype)
    _, index = jax.lax.reduce((x, index), start, larger, (x.ndim - 1,))
    return index[..., None]


def _zero_like(x):
    """Integer zeros that depend on x, so that they are sharded like x under vmap too. Compilers fold them."""
    return (x != x).astype(jnp.int32) * 0


@functools.partial(jax.jit, static_argnums=1)
def top_k(x, k):
    """The k largest along the last axis, decreasing, and their indices, however the other axes are sharded.

    jax.lax.top_k makes every device gather the whole array, because the partitioner cannot look into it. On a
    CPU the search that may be approximate is exact, becomes the same code, and is partitioned first.
    """
    if k == 1:
        return _top_one(x)
    exact = functools.partial(jax.lax.approx_max_k, k=k, recall_target=1.0)
    plain = top_few if k <= FEW else jax.lax.top_k
    return tuple(jax.lax.platform_dependent(x, cpu=exact, default=functools.partial(plain, k=k)))


FEW = 8  # up to so many numbers, or draws, become one expression


def top_few(x, k):
    """The k largest and their indices with one reduction, like `largest_of_pairs`: x need not be stored.

    jax.lax.top_k sorts every row on a GPU. Each operand here is a sorted list of k pairs; two are merged by a
    bitonic network (K. E. Batcher, 1968, Sorting Networks and Their Applications). As in jax.lax.top_k, NaN
    counts as the largest, and of equals the first comes first.
    """
    n, length = x.shape[-1], 1 << (k - 1).bit_length()

    def ordered(one, other):
        (x, i), (y, j) = one, other
        before = (x > y) | ((x != x) & (y == y))
        after = (y > x) | ((y != y) & (x == x))
        swap = after | (~before & (j < i))
        return (where(swap, y, x), where(swap, j, i)), (where(swap, x, y), where(swap, i, j))

    def merged(run):
        if len(run) == 1:
            return run
        half = len(run) // 2
        first, second = zip(*map(ordered, run[:half], run[half:]), strict=True)
        return merged(first) + merged(second)

    def union(one, other):
        one, other = (list(zip(each[:k], each[k:], strict=True)) for each in (one, other))
        apart = length - k  # places of a full run that only one of the lists takes
        both = [ordered(a, b)[0] for a, b in zip(one[apart:], other[apart:][::-1], strict=True)]
        values, indices = zip(*merged([*one[:apart], *both, *other[:apart][::-1]])[:k], strict=True)
        return values + indices

    never, nowhere, zero = jnp.array(-jnp.inf, x.dtype), jnp.array(n, jnp.int32), _zero_like(x)
    values = jax.lax.stop_gradient(x), *[never + zero.astype(x.dtype)] * (k - 1)
    places = zero + jnp.arange(n, dtype=jnp.int32), *[nowhere + zero] * (k - 1)
    found = jax.lax.reduce(values + places, (never,) * k + (nowhere,) * k, union, (x.ndim - 1,))
    indices = jnp.stack(found[k:], -1)
    return [with_slope(jnp.stack(found[:k], -1), jnp.take_along_axis(x, indices, -1)), indices]


@jax.custom_jvp
def with_slope(value, x):
    """Return a value with the derivatives of x, which may have another dtype. Compilers drop x itself."""
    return value


@with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    value = with_slope(*primals)
    return value, pl.placed(tangents[1].astype(value.dtype), value)


@functools.partial(jnp.vectorize, signature="(n)->(k),(k)")
def _top_one(row):
    """The largest of the last axis and its index, without that search.

    For k = 1 it is a reduction of pairs with a select. LLVM (of JAX 0.10) looks for a checksum in it, through
    the whole hash that is fused with it, for hours. argmax is compiled in another way.
    """
    index = jax.lax.argmax(row, 0, jnp.int32)[None]
    return row[index], index


@jax.jit
@functools.partial(jnp.vectorize, signature="(k),(n)->(n)")
def k_hot(indices, like):
    """Zeros, and ones at these indices of the last axis. The batch may be sharded."""
    return jnp.zeros_like(like).at[indices].set(1)


@jax.jit
def show_nan(x, *arguments, event=()):
    """x, or NaN where an argument is NaN, which a choice between cases must not hide.

    The arrays in ``event`` have one axis more than x, or are scalars.
    """
    hidden = [jnp.isnan(y) for y in arguments] + [jnp.any(jnp.isnan(jnp.atleast_1d(y)), -1) for y in event]
    # added, so that the gradient is not cut off there
    return x + where(functools.reduce(jnp.logical_or, hidden), jnp.nan, 0)


@jax.custom_jvp
def over_tau(x, tau):
    """x / tau, with gradient 0 in x and tau where x is infinite (it would be inf * 0); NaN stays NaN."""
    return x / tau


def _over_tau_jvp(primals, tangents):
    y, (x, tau) = over_tau(*primals), primals
    infinite = jnp.isinf(x)
    slope = tempered_tangent(~infinite, x, tau, *tangents)
    # a NaN in tau is shown in both
    return y, pl.placed(where(infinite & ~jnp.isnan(y), 0, slope), y)


over_tau.defjvp(_over_tau_jvp, symbolic_zeros=True)
over_tau = jax.jit(over_tau)


def tempered_tangent(counts, x, tau, x_dot, tau_dot):
    """The tangent of x / tau, where entries that do not count may be infinite."""
    moved = 0 if isinstance(x_dot, SymbolicZero) else x_dot
    if not isinstance(tau_dot, SymbolicZero):
        moved = moved - where(counts, x, 0) / tau * tau_dot
    return moved / tau


@functools.partial(jax.jit, static_argnames="for_index")
def centre(logits, *, for_index=False):
    """Logits minus their largest: the classes stay the same, and noise added to them is not rounded off.

    At a logit of 1e4 float32 resolves 1e-3, which would quantize the Gumbel noise. If only the index of the
    largest is needed (``for_index``), a GPU that finds the largest logits separately need not store the
    result.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if for_index:
        top = jax.lax.platform_dependent(top, cpu=lambda top: top, default=jax.lax.optimization_barrier)
    return logits - top


def two_sum(x, y):
    """The sum x + y and its rounding error (D. E. Knuth, The Art of Computer Programming, volume 2)."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


def log_logistic_pdf(x):
    """log s(x) + log s(-x), the log-density of Logistic(0, 1)."""
    return -(jax.nn.softplus(x) + jax.nn.softplus(-x))


def log_normal_pdf(x):
    """The log-density of Normal(0, 1)."""
    return -0.5 * (x**2 + math.log(2 * math.pi))


def log_pmf_of_bits(logits):
    """log P(0) and log P(1) on a last axis."""
    return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], -1)


def expected_log_pmf(log_q, log_p):
    """sum_k q_k log p_k over the last axis, where 0 log 0 is 0."""
    possible = ~(log_q == -jnp.inf)  # also NaN, so that it shows
    return jnp.sum(where(possible, jnp.exp(log_q) * where(possible, log_p, 0), 0), -1)


def discrete_kl(log_q, log_p):
    """sum_k q_k (log q_k - log p_k) over the last axis; inf, without a gradient, if p lacks a value of q."""
    possible = ~(log_q == -jnp.inf)
    excluded = possible & (log_p == -jnp.inf)
    both = possible & ~excluded
    ratio = where(both, log_q, 0) - where(both, log_p, 0)
    kl = jnp.sum(where(both, jnp.exp(log_q) * ratio, 0), -1)
    return where(jnp.any(excluded, -1), jnp.inf, kl)


@jax.jit
def log_sum_exp(x):
    """log sum exp(x) over the last axis; if all entries are -inf it is -inf, with gradient 0."""
    nothing = jnp.all(x == -jnp.inf, -1)
    return where(nothing, -jnp.inf, jax.nn.logsumexp(where(nothing[..., None], 0, x), -1))


def sum_of_others(x):
    """For each element along the first axis, the sum of the others. Nothing is subtracted."""
    return _others(x, jnp.cumsum, jnp.add, 0)


def log_sum_of_others(x):
    """For each element along the first axis, log sum exp of the others."""
    never = -1e30  # stands for -inf, where a cumulative log-sum-exp has NaN gradients
    total = _others(where(x > never, x, never), jax.lax.cumlogsumexp, jnp.logaddexp, never)
    return where(total > never / 2, total, -jnp.inf)


def _others(x, accumulate, add, nothing):
    nothing = jnp.full_like(x[:1], nothing)
    before = jnp.concatenate([nothing, accumulate(x, axis=0)[:-1]])
    after = jnp.concatenate([accumulate(x[::-1], axis=0)[-2::-1], nothing]) if len(x) > 1 else nothing
    return add(before, after)


def leave_one_out_bounds(log_w):
    """``L = log mean_k w_k`` along the first axis, and L_k, with w_k replaced by the others' geometric mean.

    If all other weights are 0, L_k is set to 0: a baseline may be any number that does not depend on draw k.
    """
    k, possible = len(log_w), log_w > -jnp.inf
    bound = jax.nn.logsumexp(log_w, 0) - jnp.log(k)
    geometric = sum_of_others(where(possible, log_w, 0)) / (k - 1)
    geometric = where(sum_of_others(where(possible, 0, 1).astype(log_w.dtype)) > 0, -jnp.inf, geometric)
    others = log_sum_of_others(log_w)
    known = others > -jnp.inf
    return bound, where(known, jnp.logaddexp(geometric, where(known, others, 0)) - jnp.log(k), 0)


@jax.custom_jvp
def log_min_gumbel_cdf(x):
    """log(1 - exp(-exp(x))), which is x for very negative x and 0 for large x."""
    low = x < -15
    w = jnp.exp(where(low, 0, jnp.minimum(x, 5)))  # at 5 the result is already below e^-148
    return where(low, x - 0.5 * jnp.exp(jnp.minimum(x, -15)), jnp.log(-jnp.expm1(-w)))


def log_min_gumbel_cdf_slope(x):
    """The derivative of `log_min_gumbel_cdf`, w / (exp(w) - 1) with w = exp(x): from 1 to 0."""
    w = jnp.exp(jnp.clip(x, -60, 5))  # at -60 it is 1 to the last digit
    return w * jnp.exp(-w) / -jnp.expm1(-w)


@log_min_gumbel_cdf.defjvp
def _log_min_gumbel_cdf_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_min_gumbel_cdf(x), dx * log_min_gumbel_cdf_slope(x)


@jax.custom_jvp
@jax.jit
def log_ndtr(x):
    """log Phi(x), with value and slope accurate to the last digits far into the lower tail."""
    far, a, series = _lower_tail(x)
    return where(far, log_normal_pdf(a) - jnp.log(-a / series), jax.scipy.special.log_ndtr(x))


@jax.jit
def log_ndtr_slope(x):
    """phi(x) / Phi(x)."""
    far, a, series = _lower_tail(x)
    near = jnp.exp(log_normal_pdf(where(far, 0, x)) - jax.scipy.special.log_ndtr(where(far, 0, x)))
    return where(far, -a / series, near)


def _lower_tail(x):
    """Where x is so low that Phi(x) = phi(x) / -x * series, the asymptotic one; x there, and the series.

    A ratio of phi and Phi would be a difference of squares in the exponent, and Phi ends at the smallest
    float.
    """
    edge = -20 if x.dtype == jnp.float64 else -10
    far = x <= edge
    a = where(far, x, edge)
    y, series = 1 / a**2, 1
    for n in range(13, 0, -2):
        series = 1 - n * y * series
    return far, a, series


@log_ndtr.defjvp
def _log_ndtr_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_ndtr(x), dx * log_ndtr_slope(x)


@jax.custom_jvp
@jax.jit
def probit_to_logit(v):
    """logit Phi(v), without rounding Phi(v) to 0 or 1."""
    far, a, series = _lower_tail(-jnp.abs(v))
    q = _lower_mass(v, far)
    tail = a**2 / 2 + jnp.log(-a / series * math.sqrt(2 * math.pi))
    return jnp.sign(v) * where(far, tail, jnp.log((1 - q) / q))


def _lower_mass(v, far):
    """Phi(-|v|) to its last digits, where it is not far out."""
    return jax.scipy.special.erfc(where(far, 0, jnp.abs(v)) * math.sqrt(0.5)) / 2


@probit_to_logit.defjvp
def _probit_to_logit_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    far, a, series = _lower_tail(-jnp.abs(v))
    q = _lower_mass(v, far)
    slope = where(far, -a / series, jnp.exp(log_normal_pdf(v)) / (q * (1 - q)))
    return probit_to_logit(v), dv * slope


@jax.custom_jvp
@jax.jit
def logit_to_probit(x):
    """Phi^-1(s(x)), the inverse of `probit_to_logit`, without rounding s(x) to 0 or 1.

    Newton's method on |x| = logit Phi(v), which is convex for v > 0. Both x sqrt(pi/8) and sqrt(2 x) lie
    above the root, so the iterates decrease to it monotonically.
    """
    a = where(jnp.isinf(x), 1, jnp.abs(x))
    v = jnp.minimum(a * math.sqrt(math.pi / 8), jnp.sqrt(2 * a))

    def newton(_, v):
        upper, lower = log_ndtr(v), log_ndtr(-v)
        return v - (upper - lower - a) * jnp.exp(upper + lower - log_normal_pdf(v))

    v = jax.lax.fori_loop(0, 5, newton, v)
    return where(jnp.isinf(x), x, jnp.sign(x) * v)


@logit_to_probit.defjvp
def _logit_to_probit_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    v = logit_to_probit(x)
    # 1 / (logit Phi)'(v), which is the sum of the slopes of log Phi on both sides
    finite = where(jnp.isinf(v), 0, v)
    slope = 1 / (log_ndtr_slope(finite) + log_ndtr_slope(-finite))
    return v, dx * where(jnp.isinf(x), 0, slope)


@functools.partial(jax.jit, static_argnums=1)
def as_log(value, log_space):
    """log z for a simplex value given in either form, and whether z is outside [0, 1]."""
    if log_space:
        # If the compiler computes a draw twice, once with fused operations, its largest log z can come out
        # above 0, by the rounding of the values it was computed from.
        span = jnp.maximum(jnp.max(where(jnp.isfinite(value), jnp.abs(value), 0), -1, keepdims=True), 1)
        return value, jnp.any(value > 1e-5 * span, -1)
    outside = jnp.any((value < 0) | (value > 1), -1)
    inside = (value > 0) & ~outside[..., None] | jnp.isnan(value)
    log_value = jnp.log(where(inside, value, 1))  # log 0 has no slope that 0 could cancel
    return where(value == 0, -jnp.inf, log_value), outside


@functools.partial(jax.jit, static_argnums=1)
def as_logit(value, log_space):
    """logit(z) for a value given in either form, and whether z is outside [0, 1]."""
    if log_space:
        return value, jnp.zeros(value.shape, bool)
    outside = (value < 0) | (value > 1)
    inside = (value > 0) & (value < 1) | jnp.isnan(value)
    y = where(inside, value, 0.5)  # logit 0 has no slope that 0 could cancel
    vertex = where(value == 0, -jnp.inf, where(value == 1, jnp.inf, 0))
    return where(inside, jnp.log(y) - jnp.log1p(-y), vertex), outside


@jax.jit
def binary_concrete_log_prob(y, logits, tau):
    """The binary Concrete log-density at z = sigmoid(y)."""
    vertex, certain = jnp.isinf(y), jnp.isinf(logits)
    y_in, logits_in = where(vertex, 0, y), where(certain, 0, logits)
    inside = jnp.log(tau) + log_logistic_pdf(tau * y_in - logits_in) - log_logistic_pdf(y_in)
    limit = where(tau < 1, jnp.inf, where(tau > 1, -jnp.inf, jnp.sign(y) * logits_in))
    mass = where(y == logits, 0, -jnp.inf)
    return where(certain, mass, where(vertex, limit, inside))


@jax.jit
def apply_factor(scale_tril, noise):
    """scale_tril noise over the last axis, with broadcast batches, in full precision on every device."""
    return jnp.einsum("...j,...ij->...i", noise, scale_tril, precision="highest")


def solve_lower(scale_tril, x):
    """scale_tril^-1 x over the last axis, with broadcast batches; a factor without a batch is not copied."""
    solve = jax.lax.linalg.triangular_solve
    if scale_tril.ndim == 2 and pl.spec_of(x.shape, x) is None:
        rows = x.reshape(-1, x.shape[-1])
        return solve(scale_tril, rows, lower=True, transpose_a=True).reshape(x.shape)
    batch = jnp.broadcast_shapes(scale_tril.shape[:-2], x.shape[:-1])
    factor = jnp.broadcast_to(scale_tril, batch + scale_tril.shape[-2:])
    columns = jnp.broadcast_to(x, batch + x.shape[-1:])[..., None]
    return solve_lower_matrix(factor, columns)[..., 0]


def solve_lower_matrix(factor, x):
    """factor^-1 x, with the same batch."""
    solve = jax.lax.linalg.triangular_solve
    x = pl.placed(x, factor[..., :1])
    return pl.whole(lambda x, factor: solve(factor, x, left_side=True, lower=True), x, factor)


def lower_factor(a):
    """The lower-triangular factor of a a^T, from the QR of a^T: its condition number is not squared."""
    upper = pl.whole(functools.partial(jnp.linalg.qr, mode="r"), jnp.matrix_transpose(a))
    return jnp.matrix_transpose(upper)


def argsort(x):
    """The indices that sort the last axis in increasing order."""
    places = pl.placed(jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape), x)
    return jax.lax.sort_key_val(jax.lax.stop_gradient(x), places)[1]
