"""Values with a gradient of their own: the straight-through combinator, and softmax of a known value."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
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


@jax.custom_jvp
def _exactly(hard, soft):
    """A NaN in `soft` is shown, not hidden behind `hard`."""
    return where(jnp.isnan(soft), soft, hard.astype(soft.dtype))


@_exactly.defjvp
def _exactly_jvp(primals, tangents):
    value = _exactly(*primals)
    return value, pl.placed(tangents[1], value)


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
