"""A discrete distribution whose elements are drawn one after another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro import distributions as dist
from numpyro.distributions import constraints


class Autoregressive(dist.Distribution):
    """Elements drawn one after another, with logits that are linear in the elements before them.

    ``logits_i = bias_i + sum_{j < i} weights_ji[z_j]``. The log_prob has the batch shape of independent
    elements, and holds the log-probability of every element given the elements before it.
    """

    arg_constraints: dict[str, Any] = {"bias": constraints.real_vector}
    pytree_data_fields: tuple[str, ...] = ("bias", "weights")
    pytree_aux_fields: tuple[str, ...] = ("site", "coupled")

    def __init__(self, bias: Array, weights: Array, site: Any, coupled: tuple[int, ...]) -> None:
        self.bias, self.weights, self.site, self.coupled = bias, weights, site, coupled
        like = site.law_of(bias)
        super().__init__(like.batch_shape, like.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.site.law_of(self.bias).support

    def _flat(self, x, extra):
        """Merge the coupled axes into one, before the axis of the values."""
        axes = [extra + axis for axis in self.coupled]
        kept = [axis for axis in range(x.ndim - 1) if axis not in axes]
        x = jnp.transpose(x, (*kept, *axes, x.ndim - 1))
        return x.reshape(*x.shape[: len(kept)], -1, x.shape[-1])

    def _unflat(self, x, extra):
        """Split them again, without the axis of the values."""
        shape = self.bias.shape[:-1]
        axes = [extra + axis for axis in self.coupled]
        kept = [axis for axis in range(extra + len(shape)) if axis not in axes]
        x = x.reshape(*x.shape[:-1], *(shape[axis] for axis in self.coupled))
        return jnp.transpose(x, np.argsort([*kept, *axes]))

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> ArrayLike:
        extra = len(sample_shape)
        bias = self._flat(jnp.broadcast_to(self.bias, (*sample_shape, *self.bias.shape)), extra)
        n, size = bias.shape[-2:]

        def draw(logits, number_and_key):
            number, key = number_and_key
            z = jax.random.categorical(key, logits[..., number, :])
            row = jnp.take(self.weights, number, -4)  # (..., n, K, K): the effect of z on the others
            after = jnp.arange(n)[:, None] > number
            said = jnp.sum(row * jax.nn.one_hot(z, size)[..., None, :, None], -2)
            return jnp.where(after, logits + said, logits), z

        numbers = jnp.arange(n)
        _, z = jax.lax.scan(draw, bias, (numbers, jax.random.split(key, n)))
        index = self._unflat(jnp.moveaxis(z, 0, -1), extra)
        return self.site.value(index)

    def log_pmf(self, value: Array) -> Array:
        """The log-probabilities of all values of every element, given the elements before it."""
        weights = self.site.weights(jnp.asarray(value))
        extra = weights.ndim - self.bias.ndim
        z = self._flat(weights, extra)
        n = z.shape[-2]
        before = (np.arange(n)[:, None] < np.arange(n))[..., None, None]  # j before i
        said = jnp.einsum("...ja,...jiab->...ib", z, jnp.where(before, self.weights, 0))
        bias = self._flat(jnp.broadcast_to(self.bias, weights.shape), extra)
        log_pmf = jax.nn.log_softmax(bias + said, -1)
        return jnp.stack([self._unflat(log_pmf[..., k], extra) for k in range(log_pmf.shape[-1])], -1)

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        value = jnp.asarray(value)
        return jnp.sum(jnp.where(self.site.weights(value) > 0.5, self.log_pmf(value), 0), -1)
