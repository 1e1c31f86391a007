"""Noise with right tails, and exact draws, each compiled as one function when called eagerly.

Noise is drawn and transformed in float32 or wider. An event of probability p is drawn with frequency p, down
to 1e-8, in both tails. Every element of a batch has its own noise.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax._placement import where


def random_bits(key, shape, width, like=()):
    """The numbers of jax.random.bits; on CPUs the 32-bit ones take a sixth to a half of the time.

    There JAX hashes in a loop that passes through memory eleven times. Unrolled, the hash is an expression
    of a number's position, which the compiler fuses with the code that uses it: no memory, no collective
    however the array is sharded, and less to compile too.
    """
    spec = pl.spec_of(shape, *like)
    # the value of a symbolic size (jax.export) is unknown here, and may exceed 2^32
    known = all(isinstance(size, int) for size in shape) and math.prod(shape) <= 2**32
    if width == 32 and known and jax.random.key_impl(key) == "threefry2x32":
        return _threefry(key, tuple(shape), spec)
    return jax.random.bits(key, shape, f"uint{width}", out_sharding=spec)


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _threefry(key, shape, spec):
    """Threefry of the count of each number, with a high word of 0."""
    place = jnp.zeros(shape, jnp.uint32, out_sharding=spec)
    for axis in range(len(shape)):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=spec)
        place += index * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return threefry(*jax.random.key_data(key), place)


def threefry(k0, k1, place):
    """The exclusive or of both words of Threefry-2x32, with 20 rounds.

    J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw (2011), Parallel Random Numbers: As Easy as 1, 2, 3.
    """
    u32 = jnp.uint32
    keys = k0, k1, k0 ^ k1 ^ u32(0x1BD11BDA)
    x, y = jnp.zeros_like(place) + k0, place + k1
    for four in range(5):
        for r in ROTATIONS[four % 2]:
            x += y
            y = x ^ (y << u32(r) | y >> u32(32 - r))
        x, y = x + keys[(four + 1) % 3], y + keys[(four + 2) % 3] + u32(four + 1)
    return x ^ y


def tail_uniform(key, shape, like):
    """Uniform noise U in (0, 1) as r in (-1/2, 1/2]: U = r if r > 0, else U = 1 - |r|.

    Floats are dense only near 0, so a plain uniform resolves 2^-24 near 1 and never draws a rare event in
    that tail. Held this way, both tails end at 0 and are resolved to 2^-32 (2^-64 in float64), from the same
    number of random bits and symmetric to the last of them.

    The noise has the dtype of the array `like`. On an explicit mesh it has the sharding of `like` too.
    """
    bits = random_bits(key, shape, 8 * like.dtype.itemsize, (like,))
    return _signed_uniform(bits, like.dtype)


def _signed_uniform(bits, dtype):
    width = 8 * bits.dtype.itemsize
    signed = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"int{width}"))
    return (signed.astype(dtype) + 0.5) * 2.0**-width


@functools.partial(jax.jit, static_argnums=1)
def logistic(key, shape, like):
    """Logistic(0, 1) noise, log U - log(1 - U)."""
    r = tail_uniform(key, shape, like)
    v = jnp.abs(r)
    # The logarithm comes last because CPUs compute it once; a cheap operation after it would need r, and so
    # hash again.
    return jnp.log(where(r < 0, 1 - v, v) / where(r < 0, v, 1 - v))


@functools.partial(jax.jit, static_argnums=1)
def exponential(key, shape, like):
    """Exponential(1) noise, -log U."""
    return _exponential(tail_uniform(key, shape, like))


def exponential_of(bits):
    """The same in float32 from given bits."""
    return _exponential(_signed_uniform(bits, jnp.float32))


def _exponential(r):
    v = jnp.abs(r)
    u = where(r < 0, 1 - v, v)
    # In the upper half -log U is -log1p(-v). Kahan's form of it needs no second logarithm:
    # the factor v / (1 - u), in which 1 - u is exact, undoes the rounding of u = 1 - v.
    gap = 1 - u
    lower = -jnp.log(u)
    upper = where(gap == 0, v, lower * v / where(gap == 0, 1, gap))
    return where(r < 0, upper, lower)


@functools.partial(jax.jit, static_argnums=1)
def gumbel(key, shape, like):
    """Gumbel(0, 1) noise, -log(-log U)."""
    return -jnp.log(exponential(key, shape, like))


def perturbed(key, logits, shape):
    """Centered logits plus Gumbel noise, with this batch shape."""
    return lm.centre(logits) + gumbel(key, (*shape, logits.shape[-1]), logits)


@functools.partial(jax.jit, static_argnums=2)
def categorical(key, logits, shape):
    """The index of the drawn class, of shape (*shape, 1); K where the logits of an element are not a law.

    It is the first to arrive in a race of exponentials, argmin E exp(-l). This has the law of argmax(l + G)
    with half the logarithms, and no class is too rare for it, unlike for a cumulative sum.
    """
    weights = jnp.exp(lm.centre(logits, for_index=True))
    return lm.index_of_largest(weights / exponential(key, (*shape, logits.shape[-1]), logits))


@jax.jit
def conditional_gumbel(key, log_p, winner):
    """The largest of log_p + G, given its class, and how far each other entry is below it; 0 or less.

    With normalized log_p the largest is -log E_i and any other is -log(E_j / p_j + E_i), where E is standard
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
# sqrt(w) = 4.72, to a relative error of 2e-7. This covers every v of 32 bits, while JAX's own fit for
# erf_inv ends at 24 bits. It is a tenth faster than jax.random.normal; ndtri is a fifth slower.
_CENTRE = (2.1233133, 0.34880332, -5.9066069e-3, -1.7738284e-3, 3.0783393e-4, -5.9714189e-6, -4.6485725e-6,
           4.6515614e-7, 1.3105775e-8)  # fmt: skip


_TAIL = (4.0064340, 1.4165873, 1.3365363e-2, -1.0875810e-2, 8.0406026e-3, -4.7814083e-3, 1.8720125e-3,
         -4.0046445e-4, 3.3190197e-5)  # fmt: skip


@functools.partial(jax.jit, static_argnums=1, static_argnames="used_twice")
def normal(key, shape, like, *, used_twice=False):
    """Normal(0, 1) noise, from the inverse of the distribution function.

    On CPUs, a division as the last operation keeps the noise if two results use it, as in `logistic`. If one
    result uses it, a division would split the noise, and each part would hash again. The values are the
    same.
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
    """The first coefficient belongs to x^0."""
    *lower, y = coefficients
    for c in reversed(lower):
        y = y * x + c
    return y


@functools.partial(jax.jit, static_argnums=3)
def bernoulli(key, p, q, shape):
    """1[U < p], given both p and q = 1 - p so that neither tail is rounded away."""
    r = tail_uniform(key, shape, p)
    return where(r < 0, -r > q, r < p)
