"""Quantize without a codebook: each number to one of a few levels, or to its sign."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax._placement import where

MOST_CODES = 2**31 - 1  # indices are int32


def finite_scalar_quantize(x: ArrayLike, levels: Sequence[int]) -> tuple[Array, Array]:
    """Quantize each number of a vector to one of a few levels (FSQ).

    ``value_i = round(b_i) / (L_i // 2)`` with the gradient of ``b_i / (L_i // 2)``, where ``b_i`` is ``x_i``
    bounded by a tanh to an interval with exactly ``L_i`` integers: ``b = h tanh(x + artanh(o / h)) - o``,
    ``h = 1.001 (L - 1) / 2``, and ``o`` is 1/2 for even L, else 0.

    Args:
      x: vectors, shape (..., d).
      levels: d Python integers of at least 2: the number of levels of each number. Their product is the
        number of codes, at most 2^31 - 1.

    Returns:
      The values in the dtype of ``x``, shape (..., d), within [-1, 1]; and the index of each code, int32,
      shape (...), whose digits are the levels, the first number counting fastest. If a vector contains NaN,
      its index is the number of codes and the NaN is in its values.

    Raises:
      ValueError: for ``levels`` that are not d integers of at least 2, more than 2^31 - 1 codes, or a dtype
        that is not floating point.

    References:
      F. Mentzer, D. Minnen, E. Agustsson, M. Tschannen (2023), Finite Scalar Quantization: VQ-VAE Made
      Simple, arXiv:2309.15505.

    >>> value, index = finite_scalar_quantize(jnp.array([0.2, -3.0, 9.0]), (8, 5, 5))
    >>> print(f"{index} {value}")
    165 [ 0.25 -1.    1.  ]
    """
    size = arg.require_event("x", x)
    dtype, x = arg.widen(x=x)
    levels = _levels(levels, size)
    value, index = _finite_scalar_quantize(levels, x)
    return value.astype(dtype), index


def finite_scalar_codes(index: ArrayLike, levels: Sequence[int]) -> Array:
    """Convert indices of `finite_scalar_quantize` back to values.

    ``value_i = (digit_i - L_i // 2) / (L_i // 2)``, ``digit_i = index // (L_1 ... L_(i-1)) % L_i``.

    Args:
      index: integers, shape (...), from 0 to the number of codes minus 1.
      levels: the ``levels`` of the quantizer.

    Returns:
      Values in float32, shape (..., d); NaN for an index beyond the codes, which a vector with a NaN has.

    Raises:
      ValueError: for an ``index`` that is not an integer array, or ``levels`` as for
        `finite_scalar_quantize`.

    References:
      F. Mentzer, D. Minnen, E. Agustsson, M. Tschannen (2023), arXiv:2309.15505.

    >>> finite_scalar_codes(165, (8, 5, 5))
    Array([ 0.25, -1.  ,  1.  ], dtype=float32)
    """
    levels = _levels(levels)
    index = as_index("index", index)
    return _finite_scalar_codes(levels, index)


def _levels(levels, size=None):
    """The number of levels of each axis as a tuple."""
    need = f"{'' if size is None else f'{size} '}integers of at least 2, known before tracing"
    try:
        levels = arg.as_shape("levels", levels, need)
    except (TypeError, ValueError) as error:
        raise ValueError(f"levels must be {need}, got {arg.shown(levels)}.") from error
    good = all(isinstance(n, int) and n >= 2 for n in levels) and len(levels) == (size or len(levels)) > 0
    arg.require(good, "levels", need, levels)
    many = math.prod(levels)
    arg.require(many <= MOST_CODES, "levels", f"at most {MOST_CODES} codes in all", f"{many}")
    return levels


def as_index(name, index):
    """Integers as int32."""
    index = arg.as_array(name, index)
    arg.require(jnp.issubdtype(index.dtype, jnp.integer), name, "integer indices", f"dtype {index.dtype}")
    return index.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _finite_scalar_quantize(levels, x):
    size = np.array(levels)
    half = (size - 1) * (1 + 1e-3) / 2
    offset = np.where(size % 2 == 0, 0.5, 0)
    shift, half, offset = (jnp.asarray(a, x.dtype) for a in (np.arctanh(offset / half), half, offset))
    bounded = jnp.tanh(x + shift) * half - offset
    level = jnp.round(jax.lax.stop_gradient(bounded))
    value = gr.straight_through(where(level == 0, 0, level), bounded)  # no level is -0.0
    digits = jax.lax.stop_gradient(value) + jnp.asarray(size // 2, x.dtype)
    return value * _steps(levels, x.dtype), _mixed_radix(levels, digits)


def _steps(levels, dtype):
    """1 / (L // 2) for each number.

    Multiplying by it gives the same result in every program, while a compiler may or may not replace a
    division by constants.
    """
    return jnp.asarray(1 / (np.array(levels) // 2), dtype)


def _mixed_radix(levels, digits):
    """The index with these digits, the first fastest; the number of codes if one is NaN."""
    place = jnp.asarray(np.cumprod([1, *levels[:-1]]), jnp.int32)
    missing = jnp.any(jnp.isnan(digits), -1)
    index = jnp.sum(where(jnp.isnan(digits), 0, digits).astype(jnp.int32) * place, -1, dtype=jnp.int32)
    return where(missing, math.prod(levels), index).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _finite_scalar_codes(levels, index):
    place, size = (jnp.asarray(a, jnp.int32) for a in (np.cumprod([1, *levels[:-1]]), levels))
    digits = index[..., None] // place % size
    value = (digits - size // 2).astype(jnp.float32) * _steps(levels, jnp.float32)
    good = (index >= 0) & (index < math.prod(levels))
    return where(good[..., None], value, jnp.nan)


def lookup_free_quantize(x: ArrayLike) -> tuple[Array, Array]:
    """Quantize each number of a vector to its sign (LFQ, lookup-free quantization).

    ``value_i = sign(x_i)``, 1 for ``x_i > 0`` and otherwise -1, with the gradient of ``x_i``.

    Args:
      x: vectors, shape (..., d), d at most 30.

    Returns:
      The values, 1 or -1, in the dtype of ``x``, shape (..., d); and the index of each code, int32, shape
      (...): ``sum_i 2^(i-1)`` over the ``x_i > 0``, the first number counting fastest. If a vector contains
      NaN, the index is ``2^d`` and the NaN is in its values.

    Raises:
      ValueError: for more than 30 numbers in a vector, or a dtype that is not floating point.

    References:
      L. Yu, J. Lezama, N. B. Gundavarapu et al. (2023), Language Model Beats Diffusion: Tokenizer is Key to
      Visual Generation, arXiv:2310.05737.

    >>> value, index = lookup_free_quantize(jnp.array([0.3, -2.0, 0.1]))
    >>> print(f"{index} {value}")
    5 [ 1. -1.  1.]
    """
    size = arg.require_event("x", x)
    x = arg.as_float("x", x)
    arg.require(size <= 30, "x", "of at most 30 numbers in a vector: indices are int32", f"shape {x.shape}")
    return _lookup_free_quantize(x)


@jax.jit
def _lookup_free_quantize(x):
    value = gr.straight_through(where(x > 0, 1, -1), x)
    missing = where(jnp.isnan(x), jnp.nan, 0)
    digits = (x > 0).astype(arg.wide(x.dtype)) + missing
    return value, _mixed_radix((2,) * x.shape[-1], jax.lax.stop_gradient(digits))


def lookup_free_entropy(x: ArrayLike, tau: ArrayLike) -> Array:
    """Compute the entropy loss of `lookup_free_quantize`: small if codes are certain and all are used.

    ``mean_b H(p_b) - H(mean_b p_b)``, in nats. ``p_b`` is the softmax of ``-|x_b - c|^2 / tau`` over all 2^d
    codes c, whose bits are independent, with probabilities ``sigmoid(4 x / tau)``. The first term is exact.
    The entropy of the mean is computed as the sum over bits, as in the paper: an upper bound that is exact if
    bits are independent over the batch.

    Args:
      x: vectors, shape (..., d); all axes but the last are averaged over.
      tau: temperature, positive, one number.

    Returns:
      One number in float32 or wider, from ``-d log 2`` to 0; NaN if there is no vector.

    Raises:
      ValueError: for a ``tau`` that is not positive or not one number, or a dtype that is not floating point.

    References:
      L. Yu, J. Lezama, N. B. Gundavarapu et al. (2023), arXiv:2310.05737.

    >>> both = jnp.array([[3.0], [-3.0]])  # two certain codes, used alike
    >>> print(f"{lookup_free_entropy(both, 1.0):.4f}")  # -log 2
    -0.6931
    """
    arg.require_event("x", x)
    _, x = arg.widen(x=x)
    tau = arg.as_tau(tau, x.dtype)
    arg.require(tau.shape == (), "tau", "one number", f"shape {tau.shape}")
    return _lookup_free_entropy(x, tau)


@jax.jit
def _lookup_free_entropy(x, tau):
    log_pmf = lm.log_pmf_of_bits(lm.over_tau(4 * x, tau))
    vectors = tuple(range(x.ndim - 1))
    log_mean = jax.nn.logsumexp(log_pmf, vectors) - jnp.log(jnp.asarray(x.size // x.shape[-1], x.dtype))
    of_each = jnp.mean(jnp.sum(-lm.expected_log_pmf(log_pmf, log_pmf), -1))
    return of_each + jnp.sum(lm.expected_log_pmf(log_mean, log_mean))
