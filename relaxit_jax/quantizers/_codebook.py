"""Update a codebook: moving averages, restarts of unused codes, and the number of codes in use."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _placement as pl
from relaxit_jax._placement import where
from relaxit_jax.quantizers._scalar import as_index

AxisName = Hashable | Sequence[Hashable] | None


class CodebookState(NamedTuple):
    """A codebook and its moving averages, a pytree of arrays in float32 or wider.

    Args:
      codebook: the codes, shape (n, d).
      count: moving average of the number of vectors per step that each code has, shape (n,).
      total: moving average of the sum of these vectors, shape (n, d).

    Raises:
      TypeError: for a field that is missing or unknown.

    References:
      A. van den Oord, O. Vinyals, K. Kavukcuoglu (2017), arXiv:1711.00937, appendix A.1.

    >>> codes = jnp.array([[1.0], [3.0]])
    >>> state = CodebookState(codes, count=jnp.array([2.0, 0.5]), total=codes * jnp.array([[2.0], [0.5]]))
    >>> print((state.total / state.count[:, None]).ravel())  # ``codebook``, but for its smoothing
    [1. 3.]
    """

    codebook: Array
    count: Array
    total: Array


def codebook_state(codebook: ArrayLike) -> CodebookState:
    """Create the state of a codebook for `update_codebook`, before the first step.

    ``count = 1`` and ``total = codebook``, as if each code had been assigned one vector, equal to itself.

    Args:
      codebook: codes, shape (n, d), for example n vectors of the first batch.

    Returns:
      A `CodebookState` in float32 or wider.

    Raises:
      ValueError: for a ``codebook`` that is not of shape (n, d), or a dtype that is not floating point.

    References:
      A. van den Oord, O. Vinyals, K. Kavukcuoglu (2017), arXiv:1711.00937, appendix A.1.

    >>> print(codebook_state(jnp.zeros((3, 2))).count)
    [1. 1. 1.]
    """
    _, codebook = arg.widen(codebook=codebook)
    good = codebook.ndim == 2 and 0 not in codebook.shape
    arg.require(good, "codebook", "of shape (n, d)", f"shape {codebook.shape}")
    return CodebookState(codebook, jnp.ones_like(codebook[:, 0]), codebook)


def update_codebook(
    state: CodebookState,
    x: ArrayLike,
    index: ArrayLike,
    decay: ArrayLike = 0.99,
    *,
    smoothing: ArrayLike = 1e-5,
    axis_name: AxisName = None,
) -> CodebookState:
    """Move each code toward the mean of its vectors, by exponential moving averages.

    ``count = decay count + (1 - decay) n_j`` and ``total = decay total + (1 - decay) sum of x``, over the
    ``n_j`` vectors of code j; then ``codebook = total / smoothed count``, Laplace-smoothed with
    ``e = smoothing``: ``(count + e) / (N + n e) N``, where N is the sum of all counts. No part of it has a
    gradient.

    Args:
      state: from `codebook_state` or the previous step.
      x: vectors, shape (..., d).
      index: their codes, integers of shape (...), from `vector_quantize`. A vector that contains NaN has the
        index n, which is not a code, and is left out.
      decay: decay of the averages, from 0 to 1, one number.
      smoothing: added to each count, 0 or more, one number.
      axis_name: the mapped axes (of `jax.shard_map` or `jax.vmap`) over which vectors are added up, so that
        every device has the same state.

    Returns:
      The next `CodebookState`.

    Raises:
      ValueError: for a ``state`` that is not a `CodebookState`, ``x`` and ``index`` that do not fit, or a
        concrete ``index`` outside 0..n, ``decay`` or ``smoothing`` outside its range.

    References:
      A. van den Oord, O. Vinyals, K. Kavukcuoglu (2017), arXiv:1711.00937, appendix A.1.

    >>> state = codebook_state(jnp.array([[0.0], [4.0]]))
    >>> state = update_codebook(state, jnp.array([[1.0], [3.0]]), jnp.array([0, 0]), decay=0.5, smoothing=0.0)
    >>> print(f"{state.codebook[0, 0]:.4f}")  # (0 + 1 + 3) / (1 + 2)
    1.3333
    """
    state = _as_state(state)
    n = len(state.codebook)
    x = _vectors(x, state)
    arg.require_values("index", index, f"indices in 0..{n}", lambda i: (i >= 0) & (i <= n))
    index = as_index("index", index)
    arg.require(index.shape == x.shape[:-1], "index", f"of shape {x.shape[:-1]}", f"shape {index.shape}")
    decay = _number("decay", decay, "in [0, 1]", lambda x: (x >= 0) & (x <= 1), x.dtype)
    smoothing = _number("smoothing", smoothing, "0 or more", lambda x: x >= 0, x.dtype)
    return _update_codebook(_mapped(axis_name), *jax.lax.stop_gradient((state, x, index, decay, smoothing)))


def restart_unused(
    key: Array, state: CodebookState, x: ArrayLike, threshold: ArrayLike = 1.0, *, axis_name: AxisName = None
) -> CodebookState:
    """Replace codes that have few vectors by random vectors of the batch, and leave the others alone.

    A code whose ``count`` is below ``threshold`` becomes a vector of ``x``, with ``count = threshold`` and
    ``total = threshold code``. The vectors are drawn without replacement; if there are more such codes than
    vectors, some vectors are drawn again.

    Args:
      key: a JAX random key, the same on every device.
      state: from `update_codebook`.
      x: vectors, shape (..., d), at least one.
      threshold: smallest ``count`` of a code that stays, 0 or more, one number: vectors per step.
      axis_name: the mapped axes over which ``x`` is divided; vectors are drawn from all devices.

    Returns:
      The next `CodebookState`.

    Raises:
      ValueError: for a ``state`` that is not a `CodebookState`, an ``x`` without vectors or with another d,
        or a negative ``threshold``.

    References:
      P. Dhariwal, H. Jun, C. Payne, J. W. Kim, A. Radford, I. Sutskever (2020), Jukebox: A Generative Model
      for Music, arXiv:2005.00341.

    >>> state = codebook_state(jnp.array([[0.0], [9.0]]))._replace(count=jnp.array([5.0, 0.1]))
    >>> restart_unused(jax.random.key(0), state, jnp.array([[2.0]])).codebook.ravel()
    Array([0., 2.], dtype=float32)
    """
    arg.check_key(key)
    state = _as_state(state)
    x = _vectors(x, state)
    arg.require(0 not in x.shape, "x", "at least one vector", f"shape {x.shape}")
    threshold = _number("threshold", threshold, "0 or more", lambda x: x >= 0, x.dtype)
    return _restart_unused(_mapped(axis_name), key, *jax.lax.stop_gradient((state, x, threshold)))


def perplexity(index: ArrayLike, n: int, *, axis_name: AxisName = None) -> Array:
    """Compute how many codes are in use: n if all are used equally, 1 if only one is.

    ``exp(H(p))``, where ``p_j`` is the fraction of indices that are j.

    Args:
      index: integers of any shape; those outside 0..n-1 are left out.
      n: number of codes, known before tracing.
      axis_name: the mapped axes over which indices are counted together.

    Returns:
      One number, float32, from 1 to n; NaN if there is no index.

    Raises:
      ValueError: for an ``index`` that is not an integer array, or an ``n`` below 1.

    References:
      A. van den Oord, O. Vinyals, K. Kavukcuoglu (2017), arXiv:1711.00937.

    >>> print(f"{perplexity(jnp.array([0, 0, 3, 3]), 8):.4f}")
    2.0000
    """
    n = arg.as_static_int("n", n, 1, 2**31 - 1)
    return _perplexity(n, _mapped(axis_name), as_index("index", index))


def _mapped(axis_name):
    """Names of axes that are mapped here, in a form that can be static in a jitted function."""
    names = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    try:
        if names is not None:
            jax.lax.axis_size(names)
    except Exception as error:  # JAX's own errors are of several types
        need = "None, or names of axes that jax.shard_map or jax.vmap maps here"
        raise ValueError(f"axis_name must be {need}, got {arg.shown(axis_name)}.") from error
    return names


def _as_state(state):
    """Require a state of arrays that fit together."""
    need = "a CodebookState, from codebook_state(codebook)"
    arg.require(isinstance(state, CodebookState), "state", need, arg.shown(state))
    arrays = [arg.as_float("state", part) for part in state]
    n, d = arrays[0].shape if arrays[0].ndim == 2 else (0, 0)
    shapes = [x.shape for x in arrays]
    arg.require(shapes == [(n, d), (n,), (n, d)], "state", need, f"arrays of shapes {shapes}")
    return CodebookState(*(x.astype(arg.wide(x.dtype)) for x in arrays))


def _vectors(x, state):
    """Require vectors with as many numbers as the codes, and cast them to the dtype of the state."""
    x, size = arg.as_float("x", x), state.codebook.shape[1]
    arg.require(x.shape[-1:] == (size,), "x", f"of shape (..., {size})", f"shape {x.shape}")
    return x.astype(state.codebook.dtype)


def _number(name, x, need, holds, dtype):
    """One number; NaN if it is traced and out of its range."""
    arg.require_values(name, x, need, holds)
    x = arg.as_float(name, x).astype(dtype)
    arg.require(x.shape == (), name, "one number", f"shape {x.shape}")
    return where(holds(x), x, jnp.nan)


def _added_up(x, axis_name):
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _sums(n, index, x, axis_name):
    """For each code, the sum of x over its vectors. An index outside 0..n-1 is not a code."""
    zeros = pl.vary_as(jnp.zeros((n, *x.shape[index.ndim :]), x.dtype), x, index)
    index = where(index < 0, n, index)  # a negative one would count from the end
    return _added_up(zeros.at[index].add(x, mode="drop"), axis_name)


@functools.partial(jax.jit, static_argnums=0)
def _update_codebook(axis_name, state, x, index, decay, smoothing):
    n = len(state.codebook)
    count = _sums(n, index, jnp.ones_like(x[..., 0]), axis_name)
    total = _sums(n, index, x, axis_name)
    count = decay * state.count + (1 - decay) * count
    total = decay * state.total + (1 - decay) * total
    everything = jnp.sum(count)
    smoothed = (count + smoothing) / (everything + n * smoothing) * everything
    # a code that never had a vector stays where it is: it has no mean
    none = (count == 0)[:, None]
    codebook = where(none, state.codebook, total / where(none, 1, smoothed[:, None]))
    return CodebookState(codebook, count, total)


@functools.partial(jax.jit, static_argnums=0)
def _restart_unused(axis_name, key, state, x, threshold):
    x = x.reshape(-1, x.shape[-1])
    here, devices = len(x), 1 if axis_name is None else jax.lax.axis_size(axis_name)
    unused = state.count < threshold
    order = jax.random.permutation(key, here * devices)
    chosen = order[(jnp.cumsum(unused) - 1) % len(order)]
    code = x[chosen % here]
    if axis_name is not None:  # the device that has the vector sends it to all
        own = chosen // here == jax.lax.axis_index(axis_name)
        code = jax.lax.psum(where(own[:, None], code, 0), axis_name)
    return CodebookState(
        where(unused[:, None], code, state.codebook),
        where(unused, threshold, state.count),
        where(unused[:, None], threshold * code, state.total),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _perplexity(n, axis_name, index):
    count = _sums(n, index, pl.vary_as(jnp.ones(index.shape, jnp.float32), index), axis_name)
    p = count / jnp.sum(count)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))
