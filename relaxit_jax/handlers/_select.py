"""`take`, `select` and comparisons, which work on discrete values and on relaxed ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg


def take(table: ArrayLike, z: ArrayLike) -> Array:
    """Return ``table[z]`` for an index z, or for the one-hot or relaxed vector that stands for it.

    ``sum_k z_k table_k``: a model written with it works both with `relax` and without it.

    Args:
      table: array of shape (K, ...), finite.
      z: integers of shape (...), or vectors of shape (..., K).

    Returns:
      An array of shape ``z.shape + table.shape[1:]`` without the axis of K.

    Raises:
      ValueError: for a ``z`` that has neither integers nor as many weights as the table has rows.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> take(table, 1), take(table, jnp.array([0.0, 1.0]))
    (Array([3., 4.], dtype=float32), Array([3., 4.], dtype=float32))
    """
    table, z = arg.as_number("table", table, maybe_complex=True), arg.as_number("z", z)
    arg.require(table.ndim > 0, "table", "of shape (K, ...)", "shape ()")
    rows = table.shape[0]
    if jnp.issubdtype(z.dtype, jnp.integer):
        return table[z]
    need = (
        f"integers, or vectors of {rows} weights for the {rows} rows of the table (a relaxed count is a "
        "number: relax the site with config={its name: 'one_hot'})"
    )
    arg.require(z.shape[-1:] == (rows,), "z", need, f"dtype {z.dtype} and shape {z.shape}")
    return jnp.tensordot(z, table, 1, precision=jax.lax.Precision.HIGHEST)


def select(bit: ArrayLike, if_one: ArrayLike, if_zero: ArrayLike) -> Array:
    """Return ``where(bit, if_one, if_zero)``, keeping the gradient of a relaxed bit.

    ``bit if_one + (1 - bit) if_zero``: the same for 0 and 1, and the mixture in between, where `jnp.where`
    and `jax.lax.cond` would round and lose the gradient.

    Args:
      bit: zeros and ones, or numbers between them.
      if_one: value at 1, finite.
      if_zero: value at 0, finite.

    Returns:
      An array of the broadcast shape.

    Raises:
      ValueError: for shapes that do not broadcast.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), arXiv:1611.00712.

    >>> float(select(0.25, 4.0, 0.0))
    1.0
    """
    bit = arg.as_number("bit", bit)
    if_one, if_zero = (
        arg.as_number(name, x, maybe_complex=True) for name, x in (("if_one", if_one), ("if_zero", if_zero))
    )
    arg.batch_shape(None, bit=bit.shape, if_one=if_one.shape, if_zero=if_zero.shape)
    return bit * if_one + (1 - bit) * if_zero


def less(t: ArrayLike, s: ArrayLike) -> Array:
    """Return ``t < s`` for the value s of a discrete site, with the gradient of a relaxed one.

    ``sum_k s_k 1[t < k]`` for a vector of weights over the values 0, 1, ...; 0 or 1 for an integer. With it,
    ``select(less(t, s), before, after)`` is a change point at s that works both with `relax` and without it.

    Args:
      t: numbers of shape (...).
      s: integers of shape (...); or vectors of weights of shape (..., K), the draws of a site that is
        relaxed with ``config={name: "one_hot"}``.

    Returns:
      The probability that t is less, of the broadcast shape.

    Raises:
      ValueError: for an ``s`` that is a single number but not an integer: a relaxed number has no such
        weights.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> less(jnp.arange(3), 2), less(jnp.arange(3), jnp.array([0.0, 0.25, 0.75]))
    (Array([1., 1., 0.], dtype=float32), Array([1.  , 0.75, 0.  ], dtype=float32))
    """
    return _compare(jnp.less, t, s)


def greater(t: ArrayLike, s: ArrayLike) -> Array:
    """Return ``t > s`` for the value s of a discrete site, with the gradient of a relaxed one.

    ``sum_k s_k 1[t > k]`` for a vector of weights over the values 0, 1, ...; 0 or 1 for an integer.

    Args:
      t: numbers of shape (...).
      s: as for `less`.

    Returns:
      The probability that t is greater, of the broadcast shape.

    Raises:
      ValueError: as for `less`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> greater(jnp.arange(3), jnp.array([0.0, 0.25, 0.75]))
    Array([0.  , 0.  , 0.25], dtype=float32)
    """
    return _compare(jnp.greater, t, s)


def equal(t: ArrayLike, s: ArrayLike) -> Array:
    """Return ``t == s`` for the value s of a discrete site, with the gradient of a relaxed one.

    ``sum_k s_k 1[t = k]`` for a vector of weights over the values 0, 1, ...; 0 or 1 for an integer.

    Args:
      t: numbers of shape (...).
      s: as for `less`.

    Returns:
      The probability that t is equal, of the broadcast shape.

    Raises:
      ValueError: as for `less`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> equal(2, jnp.array([0.0, 0.25, 0.75]))
    Array(0.75, dtype=float32)
    """
    return _compare(jnp.equal, t, s)


def _compare(holds, t, s):
    t, s = arg.as_number("t", t), arg.as_number("s", s)
    if not jnp.issubdtype(s.dtype, jnp.inexact):
        arg.batch_shape(None, t=t.shape, s=s.shape)
        return holds(t, s).astype(jnp.result_type(float))
    need = "integers, or vectors of weights: relax the site with config={its name: 'one_hot'}"
    arg.require(s.ndim > 0, "s", need, f"one number of dtype {s.dtype}")
    arg.batch_shape(None, t=t.shape, s=s.shape[:-1])
    return jnp.sum(jnp.where(holds(t[..., None], jnp.arange(s.shape[-1])), s, 0), -1)
