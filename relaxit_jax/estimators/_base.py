"""What the estimators share: calling f, and a value with a gradient of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from relaxit_jax import _checks as ck


def call(f, q, sample, name="f"):
    """f of a sample, or of several that are stacked on a leading axis; its shape and values checked."""
    several = sample.ndim > len(q.shape)
    value = jnp.asarray((jax.vmap(f) if several else f)(sample))
    shape = value.shape[1:] if several else value.shape
    need = f"a function from samples of shape {q.shape} to values of the batch shape {q.batch_shape}"
    ck.require(shape == q.batch_shape, name, need, f"values of shape {shape}")
    ck.require(
        jnp.issubdtype(value.dtype, jnp.floating), name, "a function with floating-point values", value.dtype
    )
    ck.require_values(name, value, "finite for every draw", np.isfinite)
    return value


def per_event(x, q):
    """An array of the batch shape, against arrays of a sample's shape."""
    return x.reshape(x.shape + (1,) * q.event_ndims)


@jax.custom_jvp
def with_gradient(value, logits, gradient):
    """The value, with its own gradient and, for the logits, one that is given; 0 at infinite ones."""
    return value


@with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    value, logits, gradient = primals
    event = tuple(range(value.ndim, gradient.ndim))
    gradient = jnp.where(jnp.isinf(logits), 0, gradient)
    slope = jnp.sum(gradient * tangents[1].astype(gradient.dtype), event)
    return with_gradient(*primals), tangents[0] + slope.astype(value.dtype)
