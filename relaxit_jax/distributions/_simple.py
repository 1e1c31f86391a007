"""Exact subsets of k elements (bits given their sum) as a NumPyro distribution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import samplers
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd


class SimpleTopK(sd.SamplerDistribution):
    """Independent bits given that k of them are ones, see `relaxit_jax.simple_top_k`.

    ``P(z)`` is proportional to ``exp(logits . z)`` over the k-hot z. Draws are exact, with the gradient
    of their mean, the marginals. The KL between two of them has a closed form.

    Args:
      logits: log-odds of the elements up to a shared constant, shape (..., n); -inf is never drawn.
      k: number of elements, from 1 to n, known before tracing.
      probs: weights of the elements that sum to 1, shape (..., n), instead of ``logits``: ``P(z)`` is
        proportional to the product of the weights of the chosen elements.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `OneHotCategorical`, and for a ``k`` outside 1..n.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), SIMPLE: A Gradient Estimator for
      k-Subset Sampling, arXiv:2210.01941.

    >>> d = SimpleTopK(logits=jnp.zeros(5), k=2)
    >>> d.mean.sum().round(4), jnp.exp(d.entropy()).round(4)  # ten pairs alike
    (Array(2., dtype=float32), Array(10., dtype=float32))
    """

    logits: Array
    k: int
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights}
    pytree_aux_fields: tuple[str, ...] = ("k",)
    support: ct.Constraint = constraints.independent(ct.draws_in_unit_interval, 1)
    _pathwise = False
    _sampler = staticmethod(samplers.simple_top_k)
    _density = staticmethod(samplers.simple_top_k_log_prob)
    _event = staticmethod(lambda shapes: shapes["logits"][-1:])

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        k: int | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs)
        self.k = arg.as_static_int("k", k, 1, self.logits.shape[-1])

    @property
    def mean(self) -> Array:
        return self._full(samplers.simple_top_k_marginals(self.logits, self.k))

    @property
    def variance(self) -> Array:
        mean = self.mean
        return mean * (1 - mean)

    def entropy(self) -> Array:
        return self._batched(-_expected_log_prob(self, self))


def _expected_log_prob(p, q):
    """E_p log q(z), from log q at one likely z: the logits of q times how far the mean is from there."""
    _, of_p, of_q = arg.widen(p=p.logits, q=q.logits)
    likely = jax.lax.stop_gradient(lm.k_hot(lm.top_k(of_p, p.k)[1], of_p))
    away = samplers.simple_top_k_marginals(of_p, p.k) - likely
    moved = jnp.sum(away * where(of_q == -jnp.inf, 0, of_q), -1)
    return moved + samplers.simple_top_k_log_prob(likely, of_q, q.k)


@_kl.kl_rule((SimpleTopK, SimpleTopK))
def _kl_simple_top_k(p, q):
    """E_p log p(z) - E_p log q(z); inf if p draws a subset that q excludes."""
    beyond = jnp.any((p.logits > -jnp.inf) & (q.logits == -jnp.inf), -1) | (p.k != q.k)
    shared = SimpleTopK(logits=q.logits, k=min(p.k, q.logits.shape[-1]))
    kl = _expected_log_prob(p, p) - _expected_log_prob(p, shared)
    return where(beyond, jnp.inf, kl)
