"""Distributions inside NumPyro's wrappers: masked, expanded, with event axes."""

import jax.numpy as jnp
from numpyro import distributions as dist

from relaxit_jax.distributions._gate import Gate


def innermost(fn):
    """The distribution inside all of NumPyro's wrappers."""
    while isinstance(fn, (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)):
        fn = fn.base_dist
    return fn


def is_latent(msg):
    """Whether a sample site is neither observed nor enumerated."""
    return not msg["is_observed"] and msg["infer"].get("enumerate") != "parallel"


def is_discrete(fn):
    return bool(getattr(innermost(fn).support, "is_discrete", False))


def rewrap(fn, replace):
    """`replace` applied to the innermost distribution, in the wrappers of `fn`."""
    if isinstance(fn, dist.MaskedDistribution):
        return Masked(rewrap(fn.base_dist, replace), fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return rewrap(fn.base_dist, replace).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return rewrap(fn.base_dist, replace).to_event(fn.reinterpreted_batch_ndims)
    return replace(fn)


class Masked(dist.MaskedDistribution):
    """A masked distribution that passes on the intermediates of a draw, which NumPyro's drops."""

    @property
    def has_rsample(self):
        """If intermediates are passed on, a law with atoms has its whole gradient."""
        return self.base_dist.has_rsample or isinstance(innermost(self), Gate)

    def mask(self, mask):
        return Masked(self.base_dist, mask if self._mask is True else self._mask & mask)

    def expand(self, batch_shape):
        mask = self._mask if isinstance(self._mask, bool) else jnp.broadcast_to(self._mask, batch_shape)
        return Masked(self.base_dist.expand(batch_shape), mask)

    def sample_with_intermediates(self, key, sample_shape=()):
        return self.base_dist.sample_with_intermediates(key, sample_shape)

    def log_prob(self, value, intermediates=None):
        if not intermediates or self._mask is False:
            return super().log_prob(value)
        law = self.base_dist.log_prob(value, intermediates)
        return law if self._mask is True else jnp.where(self._mask, law, 0)
