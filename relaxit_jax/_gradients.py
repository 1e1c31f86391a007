"""Values with a gradient of their own: the straight-through combinator, and softmax of a known value."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax._placement import where


def straight_through(hard: ArrayLike, soft: ArrayLike) -> Array:
    """Return one array with the gradient of another (the straight-through estimator).

    The value is exactly ``hard``; the gradient is the gradient of ``soft``. The usual
    ``soft + stop_gradient(hard - soft)`` rounds: it returns 0.99999994 for some ones, and NaN where both are
    infinite.

    Args:
      hard: booleans or numbers, shape (...): the value. Its own gradient is not used.
      soft: floating-point numbers of a shape that broadcasts with ``hard``: where the gradient goes.

    Returns:
      An array of the broadcast shape, in the dtype of ``soft``: ``hard``, or NaN where ``soft`` is NaN.

    Raises:
      ValueError: for arguments that are not numbers, a ``soft`` that is not floating point, or shapes that
        do not broadcast.

    References:
      Y. Bengio, N. Leonard, A. Courville (2013), Estimating or Propagating Gradients Through Stochastic
      Neurons for Conditional Computation, arXiv:1308.3432.

    >>> step = lambda x: straight_through(x > 0, jax.nn.sigmoid(x))
    >>> value, slope = jax.value_and_grad(step)(2.0)
    >>> print(f"{value:.4f} {slope:.4f}")
    1.0000 0.1050
    """
    hard, soft = arg.as_number("hard", hard), arg.as_float("soft", soft)
    shape = arg.batch_shape(None, hard=hard.shape, soft=soft.shape)
    return _exactly(*(x if x.shape == shape else jnp.broadcast_to(x, shape) for x in (hard, soft)))


def embed(draw: ArrayLike, table: ArrayLike, *, soft: bool = False) -> Array:
    """Look up the rows of a table at one-hot draws, with the gradient of the product ``draw @ table``.

    ``table[argmax_k draw_k]``. The gradient in the draw is ``ct @ table.T``, which the draw's own gradient
    passes on to its logits. The gradient in the table adds ``ct`` to the rows that were looked up. Both equal
    the gradients of the product, which would cost an additional matrix product.

    Args:
      draw: integer indices, shape (...), which have no gradient; or one-hot vectors in floating point, shape
        (..., K), as `gumbel_softmax` with ``hard=True`` and every straight-through sampler draws them.
      table: floating-point rows, shape (K, d).
      soft: whether the draw may be soft. Only this decides between the two, as values are unknown under a
        trace: with ``soft=True`` the result is the product itself.

    Returns:
      Rows of shape (..., d), in the dtype of ``table`` (of ``draw`` and ``table`` promoted if ``soft``). They
      are NaN for a traced index outside 0..K-1 or a traced vector that is not one-hot.

    Raises:
      ValueError: for a ``table`` that is not of shape (K, d); a ``draw`` that has neither integers nor
        vectors of K numbers; ``soft=True`` for indices; and for a concrete index outside 0..K-1 or, unless
        ``soft``, concrete vectors that are not one-hot.

    References:
      Y. Bengio, N. Leonard, A. Courville (2013), arXiv:1308.3432.

    >>> table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> embed(1, table), embed(jnp.array([0.0, 1.0]), table)
    (Array([3., 4.], dtype=float32), Array([3., 4.], dtype=float32))
    """
    arg.require_flags(soft=soft)
    table = arg.as_float("table", table)
    arg.require(table.ndim == 2 and table.shape[0] > 0, "table", "of shape (K, d)", f"shape {table.shape}")
    given, draw, size = draw, arg.as_number("draw", draw), table.shape[0]
    if jnp.issubdtype(draw.dtype, jnp.integer):
        need = "vectors of weights if soft is True"
        arg.require(not soft, "draw", need, f"dtype {draw.dtype}")
        arg.require_values("draw", given, f"indices in 0..{size - 1}", lambda i: (i >= 0) & (i < size))
        return pl.rows_at(table, draw)
    need = f"integers, or vectors of {size} numbers for the {size} rows of the table"
    good = jnp.issubdtype(draw.dtype, jnp.floating) and draw.shape[-1:] == (size,)
    arg.require(good, "draw", need, f"dtype {draw.dtype} and shape {draw.shape}")
    if soft:
        return jnp.einsum("...k,kd->...d", draw, table, precision="highest")
    need = "one-hot vectors (for a soft draw, write soft=True)"
    arg.require_values("draw", given, need, lambda z: ((z != 0).sum(-1) == 1) & (z.max(-1) == 1))
    return _embed(draw, table)


@jax.custom_jvp
def _embed(draw, table):
    return pl.rows_at(table, _index_of(draw))


@jax.jit
def _index_of(draw):
    """The class of each one-hot vector, or an index outside the classes for any other vector."""
    # CPUs do these reductions without an array of this size, which counting comparisons would need
    total = jnp.sum(draw, -1, dtype=arg.wide(draw.dtype))
    one_hot = (total == 1) & (jnp.max(draw, -1) == 1) & (jnp.min(draw, -1) >= 0)
    return where(one_hot, jnp.argmax(draw == 1, -1), draw.shape[-1])


def _embed_jvp(primals, tangents):
    draw, table = primals
    draw_dot, table_dot = tangents
    index = _index_of(draw)
    value = pl.rows_at(table, index)
    slope = jnp.zeros_like(value)
    if not isinstance(draw_dot, SymbolicZero):
        slope += jnp.einsum("...k,kd->...d", draw_dot, table, precision="highest").astype(value.dtype)
    if not isinstance(table_dot, SymbolicZero):
        slope += pl.rows_at(table_dot, index)
    return value, pl.placed(slope, value)


_embed.defjvp(_embed_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _exactly(hard, soft):
    """A NaN in `soft` is shown, not hidden behind `hard`."""
    return where(jnp.isnan(soft), soft, hard.astype(soft.dtype))


@_exactly.defjvp
def _exactly_jvp(primals, tangents):
    value = _exactly(*primals)
    return value, pl.placed(tangents[1], value)


_exactly = jax.jit(_exactly)  # outside of jit, finding the rule takes longer than the operations


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def one_hot(soft, index, logits, tau, *others):
    """The one-hot vectors of the classes of this index, with the gradient of soft(logits, tau, *others).

    NaN if the index is not a class or tau is NaN. The values of ``soft`` do not matter, and they are computed
    only for a gradient.
    """
    good = (index < logits.shape[-1]) & ~jnp.isnan(tau)
    return where(good, lm.is_class(index, logits).astype(logits.dtype), jnp.nan)


def _one_hot_jvp(soft, primals, tangents):
    value = one_hot(soft, *primals)
    arguments, tangents = primals[1:], tangents[1:]
    moving = [not isinstance(t, SymbolicZero) for t in tangents]
    if not any(moving):
        return value, jnp.zeros_like(value)

    def of_moving(*some):
        some = iter(some)
        return soft(*(next(some) if moves else x for moves, x in zip(moving, arguments, strict=True)))

    chosen = [tuple(itertools.compress(both, moving)) for both in (arguments, tangents)]
    return value, pl.placed(jax.jvp(of_moving, *chosen)[1], value)


one_hot.defjvp(_one_hot_jvp, symbolic_zeros=True)


def softmax(x, tau):
    """softmax(x / tau) over the last axis, with gradient 0 in x and tau where x is -inf."""
    return _softmax(True, x, tau)


def slope_of_softmax(x, tau):
    """The same, if only its gradient is used."""
    return _softmax(False, x, tau)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(is_value, x, tau):
    """The derivative is computed from the result, so nothing else is kept, not even where x is infinite."""
    weights = jnp.exp(_below_largest(x, tau))
    return weights / jnp.sum(weights, -1, keepdims=True)


def _below_largest(x, tau):
    """x / tau minus its largest entry, exactly 0 there: dividing first may round the two apart."""
    return (x - jnp.max(x, -1, keepdims=True)) / tau


def _softmax_jvp(is_value, primals, tangents):
    value = p = _softmax(is_value, *primals)
    if is_value:
        p = jax.lax.platform_dependent(p, cuda=read_once, rocm=read_once, default=lambda p: p)
    return value, pl.placed(softmax_tangent(p, lm.tempered_tangent(p > 0, *primals, *tangents)), value)


_softmax.defjvp(_softmax_jvp, symbolic_zeros=True)
_softmax = jax.jit(_softmax, static_argnums=0)


def read_once(p, dtype=None):
    """Return the same probabilities, in a form that lets a GPU compute `softmax_tangent` in one kernel.

    XLA fuses a reduction with the code after it if both start from the same array. Dividing by the sum, which
    is 1, gives `softmax_tangent` that form. The barrier keeps it out of the kernel that computes p. It comes
    before a cast to another dtype, so that the narrow numbers are the ones that are kept and read.
    """
    p = jax.lax.optimization_barrier(p).astype(dtype or p.dtype)
    return p / jnp.sum(p, -1, keepdims=True)


@jax.custom_jvp
def log_softmax(x, tau):
    """log softmax(x / tau) over the last axis, with gradient 0 in x and tau where x is -inf."""
    y = _below_largest(x, tau)
    return y - jnp.log(jnp.sum(jnp.exp(y), -1, keepdims=True))


def _log_softmax_jvp(primals, tangents):
    log_p = log_softmax(*primals)
    return log_p, pl.placed(log_softmax_tangent(log_p, *primals, *tangents), log_p)


def log_softmax_tangent(log_p, x, tau, x_dot, tau_dot):
    """The tangent of log_p = log softmax(x / tau), 0 where log_p is -inf."""
    possible = log_p != -jnp.inf
    slope = where(possible, lm.tempered_tangent(possible, x, tau, x_dot, tau_dot), 0)
    return where(possible, slope - jnp.sum(jnp.exp(log_p) * slope, -1, keepdims=True), 0)


log_softmax.defjvp(_log_softmax_jvp, symbolic_zeros=True)
log_softmax = jax.jit(log_softmax)


@jax.custom_jvp
def softmax_at(p, logits):
    """p itself, with the gradient in the logits of a softmax whose value is p."""
    return p


@softmax_at.defjvp
def _softmax_at_jvp(primals, tangents):
    p = softmax_at(*primals)
    return p, softmax_tangent(p, tangents[1])


def softmax_tangent(p, tangent):
    """(diag(p) - p p^T) times a tangent of the logits."""
    return p * (tangent - jnp.sum(p * tangent, -1, keepdims=True))
