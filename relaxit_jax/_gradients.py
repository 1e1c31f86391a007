"""Values with a gradient of their own: the straight-through combinator, and softmax of a known value."""

import jax
import jax.numpy as jnp

from relaxit_jax import _placement as pl
from relaxit_jax._placement import where


@jax.custom_jvp
def straight_through(hard, soft):
    """Exactly `hard` forward, `soft` backward; a NaN in `soft` is shown, not hidden behind `hard`.

    The usual `hard + soft - stop_gradient(soft)` returns 0.99999994 for one 1 of five.
    """
    return where(jnp.isnan(soft), soft, hard.astype(soft.dtype))


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    value = straight_through(*primals)
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
