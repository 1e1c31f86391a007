"""Quantize a vector to the nearest code of a codebook, once or in residual stages."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax._placement import where

MOST_DISTANCES = 2**24  # held at a time: 64 MiB in float32
IN_CACHE = 2**18  # for a CPU: taking 64 codes at a time needs a fifth of the time of taking all at once


class Quantized(NamedTuple):
    """Result of `vector_quantize` and `residual_quantize`: values, indices and two losses.

    Each loss has the batch shape: add ``codebook_loss + beta * commitment_loss``, averaged, to your own loss.

    Args:
      value: the quantized vectors, shape (..., d), with the requested gradient.
      index: the index of each code, int32, shape (...), or (..., stages) for residual stages.
      codebook_loss: mean squared distance, shape (...), float32 or wider; it moves the codebook alone.
      commitment_loss: the same number; it moves the input alone.

    Raises:
      TypeError: for a field that is missing or unknown.

    References:
      A. van den Oord, O. Vinyals, K. Kavukcuoglu (2017), arXiv:1711.00937.

    >>> from relaxit_jax.quantizers import vector_quantize
    >>> value, index, *losses = vector_quantize(jnp.array([0.5]), jnp.array([[0.0], [1.5]]))
    >>> print(f"{index} {losses[0] + 0.25 * losses[1]:.4f}")
    0 0.3125
    """

    value: Array
    index: Array
    codebook_loss: Array
    commitment_loss: Array


def vector_quantize(
    x: ArrayLike,
    codebook: ArrayLike,
    *,
    gradient: Literal["straight_through", "rotation"] = "straight_through",
) -> Quantized:
    """Replace each vector by the nearest code of a codebook (VQ, VQ-VAE).

    ``value = codebook[index]`` with ``index = argmin_j |x - c_j|^2``, the first if several are equal. With
    "straight_through", the gradient reaches ``x`` as if the value were ``x``. With "rotation", it reaches
    ``x`` as if the value were the rotation and scaling that takes ``x`` to its code, held fixed: ``s R^T``
    times the incoming gradient, where ``R x / |x| = c / |c|`` and ``s = |c| / |x|``. The value has no
    gradient in the codebook: train it with ``codebook_loss`` or `update_codebook`.

    Args:
      x: vectors, shape (..., d).
      codebook: codes, shape (n, d).
      gradient: "straight_through" or "rotation". If the vector or its code is 0, "rotation" is
        straight-through.

    Returns:
      A `Quantized` with ``value`` in the promoted dtype, shape (..., d); ``index``, int32, shape (...); and
      ``codebook_loss`` and ``commitment_loss``, means over d of ``(c - x)^2``, shape (...), in float32 or
      wider. If a vector contains NaN, all of these are NaN and the index is n; a code that contains NaN does
      this to all vectors. Distances are computed in float32 or wider as ``|c|^2 - 2 x.c``, for some codes at
      a time.

    Raises:
      ValueError: for dtypes that are not floating point, a ``codebook`` that is not of shape (n, d) with n at
        least 1, or an unknown ``gradient``.

    References:
      A. van den Oord, O. Vinyals, K. Kavukcuoglu (2017), Neural Discrete Representation Learning,
      arXiv:1711.00937; for the rotation C. Fifty, R. G. Junkins, D. Duan, A. Iger, J. W. Liu, E. Amid,
      S. Thrun, C. Re (2024), Restructuring Vector Quantization with the Rotation Trick, arXiv:2410.06424.

    >>> q = vector_quantize(jnp.array([0.9, 0.2]), jnp.array([[0.0, 0.0], [1.0, 0.0]]))
    >>> print(f"{q.index} {q.value} {q.commitment_loss:.3f}")
    1 [1. 0.] 0.025
    """
    arg.require_choice("gradient", gradient, ("straight_through", "rotation"))
    dtype, x, codebook = _vectors_and_codes(x, codebook, 2, "(n, d)")
    return _vector_quantize(gradient, dtype, x, codebook)


def residual_quantize(
    x: ArrayLike,
    codebooks: ArrayLike,
    *,
    gradient: Literal["straight_through", "rotation"] = "straight_through",
) -> Quantized:
    """Quantize each vector in stages, each quantizing the error of the stages before it (RVQ).

    ``r_1 = x``, ``r_(s+1) = r_s - c_s``, where ``c_s`` is the code of ``codebooks[s]`` nearest to ``r_s``,
    without its gradient; ``value = c_1 + ... + c_S``.

    Args:
      x: vectors, shape (..., d).
      codebooks: the codes of each stage, shape (stages, n, d).
      gradient: the gradient of the value in ``x``, as in `vector_quantize`; "rotation" takes ``x`` to the sum
        of codes.

    Returns:
      A `Quantized` with ``value`` in the promoted dtype, shape (..., d); ``index``, int32, shape (...,
      stages); and the losses of `vector_quantize`, summed over stages. The ``value`` of only the first stages
      is the sum of their codes.

    Raises:
      ValueError: for dtypes that are not floating point, ``codebooks`` that are not of shape (stages, n, d),
        or an unknown ``gradient``.

    References:
      N. Zeghidour, A. Luebs, A. Omran, J. Skoglund, M. Tagliasacchi (2021), SoundStream: An End-to-End Neural
      Audio Codec, arXiv:2107.03312.

    >>> q = residual_quantize(jnp.array([0.7]), jnp.array([[[0.0], [1.0]], [[-0.25], [0.25]]]))
    >>> print(f"{q.index} {q.value}")
    [1 0] [0.75]
    """
    arg.require_choice("gradient", gradient, ("straight_through", "rotation"))
    dtype, x, codebooks = _vectors_and_codes(x, codebooks, 3, "(stages, n, d)", "codebooks")
    return _residual_quantize(gradient, dtype, x, codebooks)


def _vectors_and_codes(x, codes, ndim, need, name="codebook"):
    """The promoted dtype, then both in float32 or wider."""
    size = arg.require_event("x", x)
    dtype, x, codes = arg.widen(**{"x": x, name: codes})
    good = codes.ndim == ndim and codes.shape[-1] == size and 0 not in codes.shape
    arg.require(good, name, f"of shape {need} with d = {size}, as x has", f"shape {codes.shape}")
    return dtype, x, codes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vector_quantize(gradient, dtype, x, codebook):
    index, code, *losses = _one_stage(x, codebook)
    return Quantized(_with_gradient(gradient, x, code).astype(dtype), index, *losses)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _residual_quantize(gradient, dtype, x, codebooks):
    def stage(carry, codebook):
        rest, total, *losses = carry
        index, code, *more = _one_stage(rest, codebook)
        code = jax.lax.stop_gradient(code)
        losses = [loss + added for loss, added in zip(losses, more, strict=True)]
        return (rest - code, total + code, *losses), index

    zero = jnp.zeros_like(jax.lax.stop_gradient(x))
    start = x, zero, *([jnp.zeros_like(zero[..., 0])] * 2)
    start = tuple(pl.vary_as(part, codebooks) for part in start)
    (_, total, *losses), index = jax.lax.scan(stage, start, codebooks)
    return Quantized(_with_gradient(gradient, x, total).astype(dtype), jnp.moveaxis(index, 0, -1), *losses)


def _one_stage(x, codebook):
    """The index, the code with its gradient in the codebook, and both losses."""
    index = nearest(jax.lax.stop_gradient(x), jax.lax.stop_gradient(codebook))
    code = pl.rows_at(codebook, index)
    fixed_x, fixed_code = jax.lax.stop_gradient((x, code))
    losses = jnp.mean((code - fixed_x) ** 2, -1), jnp.mean((fixed_code - x) ** 2, -1)
    return index, code, *losses


def nearest(x, codebook):
    """The index of the code nearest to each vector, the first if several are equal; n if a distance is NaN.

    |x|^2 is the same for all codes and left out. Codes come in blocks, so that whichever axis of x is
    sharded, no device asks another for its vectors.
    """
    blocks = functools.partial(_nearest, IN_CACHE, 64), functools.partial(_nearest, MOST_DISTANCES, 128)
    return jax.lax.platform_dependent(x, codebook, cpu=blocks[0], default=blocks[1])


def _nearest(most, least, x, codebook):
    """Search with at most `most` distances at a time, but with at least `least` codes."""
    n, shape = len(codebook), x.shape[:-1]
    # x c - c^2 / 2 of a single number is not always rounded alike if it is computed twice
    largest = lm.largest_of_pairs if x.shape[-1] == 1 else lm.index_of_largest
    norms = jnp.sum(codebook * codebook, -1) / 2
    size = _block_size(shape, n, most, least)
    if size >= n:
        return largest(_closeness(x, codebook, norms))[..., 0].astype(jnp.int32)
    blocks = -(-n // size)
    padding = blocks * size - n
    # the padding is infinitely far: x . 0 - inf, even if x is NaN, which the codes before it show
    codebook = jnp.concatenate([codebook, jnp.zeros_like(codebook[:padding])]).reshape(blocks, size, -1)
    norms = jnp.concatenate([norms, jnp.full_like(norms[:padding], jnp.inf)]).reshape(blocks, size)

    def look(best, block):
        close, index = best
        start, *block = block
        found = _closeness(x, *block)
        at = largest(found)[..., 0]
        top = jnp.max(found, -1)
        better = (top > close) | jnp.isnan(top)
        return (where(better, top, close), where(better, at.astype(jnp.int32) + start, index)), None

    close = pl.placed(jnp.full(shape, -jnp.inf, x.dtype), x[..., 0], norms[0, 0])
    starts = size * jnp.arange(blocks, dtype=jnp.int32)
    best = close, pl.placed(jnp.zeros(shape, jnp.int32), close)
    (close, index), _ = jax.lax.scan(look, best, (starts, codebook, norms))
    return where(jnp.isnan(close), n, index)


def _closeness(x, codebook, norms):
    """x . c - |c|^2 / 2, which is largest where the distance is smallest."""
    return jnp.einsum("...d,nd->...n", x, codebook, precision="highest") - norms


def _block_size(shape, n, most, least):
    """How many codes to compare at a time."""
    vectors = 1
    for size in shape:
        if not isinstance(size, int):  # a symbolic size from jax.export
            return min(n, 1024)
        vectors *= size
    return min(n, max(least, most // max(vectors, 1)))


def _with_gradient(gradient, x, code):
    return gr.straight_through(
        jax.lax.stop_gradient(code), _rotated(x, code) if gradient == "rotation" else x
    )


def _rotated(x, code):
    """x, rotated and scaled to its code by factors without a gradient; x itself if either of them is 0."""
    fixed, code = jax.lax.stop_gradient((x, code))
    length, target = (_length(y) for y in (fixed, code))
    lies = (length > 0) & (target > 0)
    e, v = fixed / where(lies, length, 1), code / where(lies, target, 1)
    middle = e + v
    r = middle / jnp.maximum(_length(middle), jnp.finfo(x.dtype).tiny)  # 0 where v = -e: then a reflection
    dot = lambda a: jnp.sum(a * x, -1, keepdims=True)
    turned = (target / where(lies, length, 1)) * (x - 2 * r * dot(r) + 2 * v * dot(e))
    return where(lies, turned, x)


def _length(x):
    """|x|, whose squares neither overflow nor vanish."""
    top = jnp.max(jnp.abs(x), -1, keepdims=True)
    safe = where(top > 0, top, 1)
    return safe * jnp.sqrt(jnp.sum((x / safe) ** 2, -1, keepdims=True))
