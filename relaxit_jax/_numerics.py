"""What every sampler and density shares: noise with right tails, gradients, log-space helpers.

Six rules hold for the whole library; the first five are kept here, the last in _checks.py:

1. noise is drawn and transformed in float32 or wider, the result is cast back;
2. an event of probability p is drawn with frequency p, down to 1e-8, in both tails;
3. every element of a batch has its own noise, and the temperature is traced;
4. values and gradients are finite for logits within +-1e4 and tau in [1e-3, 1e3], and a logit of
   -inf is an impossible class with value 0 and gradient 0;
5. densities of a library's own draws are right at low temperature, through log-space values;
6. what can be known before tracing is checked before tracing, by a ValueError that names the argument.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

# --- noise ------------------------------------------------------------------------------------


def placed(x, *others):
    """Place x as the others are placed.

    An array made from a shape, such as noise or zeros, is replicated on every device. Loops, `where` and
    custom derivative rules need equal types. A type includes the shard_map axes along
    which an array varies and, on an explicit mesh, its sharding.
    """
    x = vary_as(x, *others)
    spec = _spec(jnp.shape(x), *others)
    return x if spec is None or spec == jax.typeof(x).sharding.spec else jax.sharding.reshard(x, spec)


def vary_as(x, *others):
    """Mark x as varying along the shard_map axes of the others."""
    own, *rest = (jax.typeof(y).manual_axis_type.varying for y in (x, *others))
    axes = frozenset().union(*rest) - own
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def where(condition, x, y):
    """`jnp.where` that first gives its three arguments the same sharding, as an explicit mesh requires."""
    three = condition, x, y
    shape = jnp.broadcast_shapes(*map(jnp.shape, three))
    spec = _spec(shape, *three)
    if spec is not None:
        three = [jax.sharding.reshard(jnp.broadcast_to(a, shape), spec) if jnp.ndim(a) else a for a in three]
    return jnp.where(*three)


def rows_of(x, index):
    """`x[index]` along the first axis, which is not sharded.

    An explicit mesh asks for the sharding of the result where vmap has put a sharded batch before `index`.
    """
    spec = jax.typeof(x).sharding.spec
    explicit = jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return x.at[index].get(out_sharding=jax.sharding.PartitionSpec(None, *spec[1:])) if explicit else x[index]


def _spec(shape, *others):
    """The sharding of an array of this shape combined with the others; None without an explicit mesh."""
    spec = [None] * len(shape)
    for y in map(jax.typeof, others):
        for axis in range(-min(len(shape), y.ndim), 0):
            names = y.sharding.spec[axis]
            if names and spec[axis] is None and names not in spec and y.shape[axis] == shape[axis]:
                spec[axis] = names
    return jax.sharding.PartitionSpec(*spec) if any(spec) else None


def random_bits(key, shape, width, like=()):
    """The numbers of jax.random.bits; those of 32 bits in a sixth to a half of the time on CPUs.

    There JAX hashes in a loop that goes through memory eleven times. Unrolled, the hash is an expression of
    a number's place, which the compiler joins with what uses it: no memory, no collective however the array
    is sharded, and less to compile too.
    """
    spec = _spec(shape, *like)
    # the value of a symbolic size (jax.export) is unknown here, and may exceed 2^32
    known = all(isinstance(size, int) for size in shape) and math.prod(shape) <= 2**32
    if width == 32 and known and jax.random.key_impl(key) == "threefry2x32":
        return _threefry(key, tuple(shape), spec)
    return jax.random.bits(key, shape, f"uint{width}", out_sharding=spec)


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _threefry(key, shape, spec):
    """The exclusive or of both words of Threefry-2x32, with 20 rounds, of the count of each number.

    J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw (2011), Parallel Random Numbers: As Easy as 1, 2, 3.
    """
    u32, (k0, k1) = jnp.uint32, jax.random.key_data(key)
    keys = k0, k1, k0 ^ k1 ^ u32(0x1BD11BDA)
    place = jnp.zeros(shape, u32, out_sharding=spec)
    for axis in range(len(shape)):
        index = jax.lax.broadcasted_iota(u32, shape, axis, out_sharding=spec)
        place += index * u32(math.prod(shape[axis + 1 :]) % 2**32)
    x, y = jnp.zeros_like(place) + k0, place + k1  # the high word of the count is 0
    for four in range(5):
        for r in ROTATIONS[four % 2]:
            x += y
            y = x ^ (y << u32(r) | y >> u32(32 - r))
        x, y = x + keys[(four + 1) % 3], y + keys[(four + 2) % 3] + u32(four + 1)
    return x ^ y


def tail_uniform(key, shape, like):
    """Uniform noise U in (0, 1) as r in (-1/2, 1/2]: U = r if r > 0, else U = 1 - |r|.

    Floats are dense near 0 only, so a plain uniform resolves 2^-24 near 1 and never draws a rare
    event of that tail. Held this way both tails end at 0 and are resolved to 2^-32 (2^-64 in
    float64), from the same number of random bits and symmetric to the last of them.

    The noise has the dtype of the array `like`. On an explicit mesh it has the sharding of `like` too.
    """
    width = 8 * like.dtype.itemsize
    signed = jax.lax.bitcast_convert_type(random_bits(key, shape, width, (like,)), jnp.dtype(f"int{width}"))
    return (signed.astype(like.dtype) + 0.5) * 2.0**-width


def logistic(key, shape, like):
    """Logistic(0, 1) noise, log U - log(1 - U)."""
    r = tail_uniform(key, shape, like)
    v = jnp.abs(r)
    # The logarithm comes last, as CPUs make it once; what is cheap after it would ask for r, so hash again.
    return jnp.log(where(r < 0, 1 - v, v) / where(r < 0, v, 1 - v))


def exponential(key, shape, like):
    """Exponential(1) noise, -log U."""
    r = tail_uniform(key, shape, like)
    v = jnp.abs(r)
    u = where(r < 0, 1 - v, v)
    # In the upper half -log U is -log1p(-v). Kahan's form of it costs no second logarithm: the
    # rounding of u = 1 - v is undone by the factor v / (1 - u), in which 1 - u is exact.
    gap = 1 - u
    lower = -jnp.log(u)
    upper = where(gap == 0, v, lower * v / where(gap == 0, 1, gap))
    return where(r < 0, upper, lower)


def gumbel(key, shape, like):
    """Gumbel(0, 1) noise, -log(-log U)."""
    return -jnp.log(exponential(key, shape, like))


def largest(x):
    """Which along the last axis is the largest, the first of equals, as booleans; of NaN none is.

    Two plain reductions. XLA's argmax is one of pairs, which CPUs run one number at a time: with it
    straight-through Gumbel-softmax takes half as long again.
    """
    index = jnp.arange(x.shape[-1])
    at_top = x == jnp.max(x, -1, keepdims=True)
    return index == jnp.min(where(at_top, index, x.shape[-1]), -1, keepdims=True)


@functools.partial(jax.jit, static_argnums=1)
def top_k(x, k):
    """The k largest of the last axis, decreasing, and their indices, wherever the other axes are sharded.

    jax.lax.top_k has every device gather all rows, as the partitioner cannot look into it. On a CPU the
    search that may be approximate is exact, becomes the same code, and is partitioned first.
    """
    if k == 1:
        return _top_one(x)
    exact = functools.partial(jax.lax.approx_max_k, k=k, recall_target=1.0)
    return tuple(jax.lax.platform_dependent(x, cpu=exact, default=functools.partial(jax.lax.top_k, k=k)))


@functools.partial(jnp.vectorize, signature="(n)->(k),(k)")
def _top_one(row):
    """For k = 1 that search is a reduction of pairs with a select, in which LLVM (of JAX 0.10) looks for a
    checksum, through all of the hash that is joined with it: for hours. argmax is compiled another way."""
    index = jax.lax.argmax(row, 0, jnp.int32)[None]
    return row[index], index


@functools.partial(jnp.vectorize, signature="(k),(n)->(n)")
def k_hot(indices, like):
    """Ones at these indices of the last axis, and zeros; in every row alone, so that rows may be sharded."""
    return jnp.zeros_like(like).at[indices].set(1)


def one_hot_draw(key, probs, shape):
    """Which class was drawn, as booleans of shape (*shape, K).

    The first to arrive in a race of exponentials, argmin E / p. It is the law of argmax(l + G) at
    half of the logarithms, and no class is too rare for it, as one is for a cumulative sum.
    """
    return largest(probs / exponential(key, (*shape, probs.shape[-1]), probs))


def conditional_gumbel(key, log_p, winner):
    """The largest of log_p + G, given which it is, and how far each lies below it; 0 or less.

    With normalised log_p the largest is -log E_i and any other -log(E_j / p_j + E_i), E standard
    exponential (C. J. Maddison, D. Tarlow, T. Minka, 2014, A* Sampling, arXiv:1411.0030).
    """
    key, top_key = jax.random.split(key)
    e = exponential(key, winner.shape, log_p)
    top = exponential(top_key, (*winner.shape[:-1], 1), log_p)
    rare = log_p < -60  # exp(-log_p) would overflow, and E_i no longer counts
    ratio = e / top * jnp.exp(-where(rare, 0, log_p))
    gap = where(rare, log_p, 0) - jnp.log(where(rare, ratio, 1 + ratio))
    return -jnp.log(top), where(winner, 0, gap)


# Phi^-1(v) = -(1 - 2 v) f(w) with w = -log(4 v (1 - v)), the form of M. Giles (2010), Approximating the
# erfinv function. f is fitted by polynomials in w - 2.5 below w = 5.6 and in sqrt(w) - 3 above, up to
# sqrt(w) = 4.72, to a relative error of 2e-7: all that v of 32 bits can be, where JAX's own fit for
# erf_inv ends at 24 bits, and a tenth faster than jax.random.normal, where ndtri is a fifth slower.
_CENTRE = (2.1233133, 0.34880332, -5.9066069e-3, -1.7738284e-3, 3.0783393e-4, -5.9714189e-6, -4.6485725e-6,
           4.6515614e-7, 1.3105775e-8)  # fmt: skip
_TAIL = (4.0064340, 1.4165873, 1.3365363e-2, -1.0875810e-2, 8.0406026e-3, -4.7814083e-3, 1.8720125e-3,
         -4.0046445e-4, 3.3190197e-5)  # fmt: skip


def normal(key, shape, like, *, used_twice=False):
    """Normal(0, 1) noise, by the inverse of the distribution function.

    On CPUs a division as the last operation keeps the noise where two results ask for it, as in `logistic`;
    where one does, a division parts the noise, and each part hashes again. Values are the same.
    """
    r = tail_uniform(key, shape, like)
    v = jnp.abs(r)
    if like.dtype == jnp.float64:
        tail = ndtri(v)
    else:
        w = -jnp.log(4 * v * (1 - v))
        f = where(w < 5.6, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, jnp.sqrt(w) - 3))
        tail = (2 * v - 1) * f
    return tail / where(r < 0, -1, 1).astype(like.dtype) if used_twice else where(r < 0, -tail, tail)


def _polynomial(coefficients, x):
    """The first coefficient is that of x^0."""
    *lower, y = coefficients
    for c in reversed(lower):
        y = y * x + c
    return y


def bernoulli(key, p, q, shape):
    """1[U < p], given both p and q = 1 - p so that neither tail is rounded away."""
    r = tail_uniform(key, shape, p)
    return where(r < 0, -r > q, r < p)


def show_nan(x, *arguments, event=()):
    """x, and NaN where an argument is: what is decided by cases must not hide it.

    Those of ``event`` have one axis more than x, or are scalars.
    """
    hidden = [jnp.isnan(y) for y in arguments] + [jnp.any(jnp.isnan(jnp.atleast_1d(y)), -1) for y in event]
    # added, so that the gradient is not cut off there
    return x + where(functools.reduce(jnp.logical_or, hidden), jnp.nan, 0)


# --- gradients --------------------------------------------------------------------------------


@jax.custom_jvp
def straight_through(hard, soft):
    """Exactly `hard` forward, `soft` backward; a NaN in `soft` is shown, not hidden behind `hard`.

    The usual `hard + soft - stop_gradient(soft)` returns 0.99999994 for one 1 of five.
    """
    return where(jnp.isnan(soft), soft, hard.astype(soft.dtype))


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    value = straight_through(*primals)
    return value, placed(tangents[1], value)


def over_tau(x, tau):
    """x / tau, with gradient 0 in x and tau where x is infinite (it would be inf * 0); NaN stays NaN."""
    infinite = jnp.isinf(x)
    vertex = jax.lax.stop_gradient(where(jnp.isnan(tau), tau, x))
    return where(infinite, vertex, where(infinite, 0, x) / tau)


@jax.custom_jvp
def softmax_at(p, logits):
    """p itself, with the gradient in the logits of a softmax whose value is p."""
    return p


@softmax_at.defjvp
def _softmax_at_jvp(primals, tangents):
    p = primals[0]
    return p, softmax_tangent(p, tangents[1])


def softmax_tangent(p, tangent):
    """(diag(p) - p p^T) times a tangent of the logits."""
    return p * (tangent - jnp.sum(p * tangent, -1, keepdims=True))


def centre(logits):
    """Logits less their largest: the same classes, and noise added to them is not rounded off.

    At a logit of 1e4 float32 resolves 1e-3, which would quantise the Gumbel noise.
    """
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


# --- log-space helpers ------------------------------------------------------------------------


def log_logistic_pdf(x):
    """log s(x) + log s(-x), the log-density of Logistic(0, 1)."""
    return -(jax.nn.softplus(x) + jax.nn.softplus(-x))


def log_normal_pdf(x):
    """The log-density of Normal(0, 1)."""
    return -0.5 * (x**2 + math.log(2 * math.pi))


def log_sum_exp(x):
    """log sum exp(x) over the last axis; of nothing but -inf it is -inf, with gradient 0."""
    nothing = jnp.all(x == -jnp.inf, -1)
    return where(nothing, -jnp.inf, jax.nn.logsumexp(where(nothing[..., None], 0, x), -1))


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
def log_ndtr(x):
    """log Phi(x), to the last digits of value and slope far into the lower tail."""
    far, a, series = _lower_tail(x)
    return where(far, log_normal_pdf(a) - jnp.log(-a / series), jax.scipy.special.log_ndtr(x))


def log_ndtr_slope(x):
    """phi(x) / Phi(x)."""
    far, a, series = _lower_tail(x)
    near = jnp.exp(log_normal_pdf(where(far, 0, x)) - jax.scipy.special.log_ndtr(where(far, 0, x)))
    return where(far, -a / series, near)


def _lower_tail(x):
    """Where x is so low that Phi(x) = phi(x) / -x * series, the asymptotic one; x there, and the series.

    A ratio of phi and Phi would be a difference of squares in the exponent, and Phi ends at the least float.
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
def probit_to_logit(v):
    """logit Phi(v), without rounding Phi(v) to 0 or 1."""
    far, a, series = _lower_tail(-jnp.abs(v))
    q = _lower_mass(v, far)
    tail = a**2 / 2 + jnp.log(-a / series * math.sqrt(2 * math.pi))
    return jnp.sign(v) * where(far, tail, jnp.log((1 - q) / q))


def _lower_mass(v, far):
    """Phi(-|v|) to its last digits, where that is not far."""
    return jax.scipy.special.erfc(where(far, 0, jnp.abs(v)) * math.sqrt(0.5)) / 2


@probit_to_logit.defjvp
def _probit_to_logit_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    far, a, series = _lower_tail(-jnp.abs(v))
    q = _lower_mass(v, far)
    slope = where(far, -a / series, jnp.exp(log_normal_pdf(v)) / (q * (1 - q)))
    return probit_to_logit(v), dv * slope


@jax.custom_jvp
def logit_to_probit(x):
    """Phi^-1(s(x)), the inverse of `probit_to_logit`, without rounding s(x) to 0 or 1.

    Newton's method on |x| = logit Phi(v), which is convex for v > 0. Both x sqrt(pi/8) and
    sqrt(2 x) lie above the root, so the iterates fall to it monotonically.
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


def as_log(value, log_space):
    """log z of a simplex value given in either form, and whether z is outside [0, 1]."""
    if log_space:
        # Where the compiler computes a draw twice, once with fused operations, its largest log z can
        # come out above 0 by a rounding of what it was computed from.
        span = jnp.maximum(jnp.max(where(jnp.isfinite(value), jnp.abs(value), 0), -1, keepdims=True), 1)
        return value, jnp.any(value > 1e-5 * span, -1)
    outside = jnp.any((value < 0) | (value > 1), -1)
    inside = (value > 0) & ~outside[..., None] | jnp.isnan(value)
    log_value = jnp.log(where(inside, value, 1))  # log 0 has no slope that 0 could cancel
    return where(value == 0, -jnp.inf, log_value), outside


def as_logit(value, log_space):
    """logit(z) of a value given in either form, and whether z is outside [0, 1]."""
    if log_space:
        return value, jnp.zeros(value.shape, bool)
    outside = (value < 0) | (value > 1)
    inside = (value > 0) & (value < 1) | jnp.isnan(value)
    y = where(inside, value, 0.5)  # logit 0 has no slope that 0 could cancel
    vertex = where(value == 0, -jnp.inf, where(value == 1, jnp.inf, 0))
    return where(inside, jnp.log(y) - jnp.log1p(-y), vertex), outside


def binary_concrete_log_prob(y, logits, tau):
    """The binary Concrete log-density of z = sigmoid(y)."""
    vertex, certain = jnp.isinf(y), jnp.isinf(logits)
    y_in, logits_in = where(vertex, 0, y), where(certain, 0, logits)
    inside = jnp.log(tau) + log_logistic_pdf(tau * y_in - logits_in) - log_logistic_pdf(y_in)
    limit = where(tau < 1, jnp.inf, where(tau > 1, -jnp.inf, jnp.sign(y) * logits_in))
    mass = where(y == logits, 0, -jnp.inf)
    return where(certain, mass, where(vertex, limit, inside))


def apply_factor(scale_tril, noise):
    """scale_tril noise over the last axis, batches broadcast, in full precision on every device."""
    return jnp.einsum("...j,...ij->...i", noise, scale_tril, precision="highest")


def solve_lower(scale_tril, x):
    """scale_tril^-1 x over the last axis, batches broadcast; a factor without a batch is not copied."""
    solve = jax.lax.linalg.triangular_solve
    if scale_tril.ndim == 2 and _spec(x.shape, x) is None:
        rows = x.reshape(-1, x.shape[-1])
        return solve(scale_tril, rows, lower=True, transpose_a=True).reshape(x.shape)
    batch = jnp.broadcast_shapes(scale_tril.shape[:-2], x.shape[:-1])
    factor = jnp.broadcast_to(scale_tril, batch + scale_tril.shape[-2:])
    columns = jnp.broadcast_to(x, batch + x.shape[-1:])[..., None]
    return solve_lower_matrix(factor, columns)[..., 0]


def solve_lower_matrix(factor, x):
    """factor^-1 x, of the same batch."""
    solve = jax.lax.linalg.triangular_solve
    x = placed(x, factor[..., :1])
    return whole(lambda x, factor: solve(factor, x, left_side=True, lower=True), x, factor)


def lower_factor(a):
    """The lower-triangular factor of a a^T, by the QR of a^T: its condition number is not squared."""
    upper = whole(functools.partial(jnp.linalg.qr, mode="r"), jnp.matrix_transpose(a))
    return jnp.matrix_transpose(upper)


def whole(function, x, *others):
    """Call a function that has no sharding rule on explicit meshes; the result is sharded as x."""
    spec = _spec(x.shape, x)
    return (function if spec is None else jax.sharding.auto_axes(function, out_sharding=spec))(x, *others)


def argsort(x):
    """The indices that sort the last axis in increasing order."""
    places = placed(jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape), x)
    return jax.lax.sort_key_val(jax.lax.stop_gradient(x), places)[1]
