"""What the estimators share: what they ask of q, calling f, and a value with a gradient of its own."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _checks as ck


class Family(Protocol):
    """Independent variables, as the estimators see them: `Bernoulli` and `OneHotCategorical`."""

    @property
    def logits(self) -> Array: ...
    @property
    def event_ndims(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def batch_shape(self) -> tuple[int, ...]: ...
    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array: ...
    def score(self, sample: ArrayLike) -> Array: ...
    def log_prob(self, sample: ArrayLike) -> Array: ...
    def outcomes(self) -> tuple[int, Callable[[Array], Array]]: ...
    def coupled(self, key: Array) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]: ...
    def relaxed(self, z: ArrayLike, tau: ArrayLike) -> Array: ...


class Bits(Family, Protocol):
    """A family with the draws of `arm` and `disarm`: `Bernoulli`."""

    def antithetic(self, key: Array) -> tuple[Array, Array, Array]: ...


Q = TypeVar("Q", bound=Family)
Estimator = Callable[[Array, Callable[[Array], ArrayLike], Q], ArrayLike]


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
def with_gradient(value: Array, logits: Array, gradient: Array) -> Array:
    """The value, with its own gradient and, for the logits, one that is given; 0 at infinite ones."""
    return value


@with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    value, logits, gradient = primals
    event = tuple(range(value.ndim, gradient.ndim))
    gradient = jnp.where(jnp.isinf(logits), 0, gradient)
    slope = jnp.sum(gradient * tangents[1].astype(gradient.dtype), event)
    return with_gradient(*primals), tangents[0] + slope.astype(value.dtype)
