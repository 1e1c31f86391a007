"""Subsets of fixed size as NumPyro distributions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import samplers
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _sampler_distribution as sd


class GumbelSoftmaxTopK(sd.SamplerDistribution):
    """Relaxed k-hot vectors, see `relaxit_jax.relaxed_top_k`.

    The sum of k Gumbel-softmax draws without replacement. With ``hard`` the draw is an exact k-hot vector,
    and `log_prob` is its mass, the mass of the set in `relaxit_jax.gumbel_top_k`. The relaxed vector has no
    density in closed form. The support is a constraint on its entries, which sum to k.

    Args:
      logits: unnormalized log-probabilities of the first draw, shape (..., n).
      k: number of elements, from 1 to n, known before tracing.
      tau: temperature, positive, of the batch shape.
      probs: probabilities of the first draw, shape (..., n), instead of ``logits``.
      hard: exact draws with the gradient of the relaxed ones.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `OneHotCategorical`, and for a ``k`` outside 1..n.
      NotImplementedError: for `log_prob` without ``hard``.

    References:
      S. M. Xie, S. Ermon (2019), Reparameterizable Subset Sampling via Continuous Relaxations,
      arXiv:1901.10517.

    >>> GumbelSoftmaxTopK(logits=jnp.zeros(5), k=2, tau=0.5, hard=True).sample(jax.random.key(0)).sum()
    Array(2., dtype=float32)
    """

    logits: Array
    k: int
    tau: Array
    hard: bool
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    pytree_aux_fields: tuple[str, ...] = ("k", "hard")
    _no_slope = (
        "the log-probability of a set has no slope in its elements. Train it with RLOO_ELBO, or use "
        "SimpleTopK, whose log-probability is linear in them"
    )
    _sampler = staticmethod(samplers.relaxed_top_k)
    _event = staticmethod(lambda shapes: shapes["logits"][-1:])

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        k: int | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        hard: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        arg.require_flags(hard=hard)
        super().__init__(validate_args, {"hard": hard}, logits=logits, probs=probs, tau=tau)
        self.k = arg.as_static_int("k", k, 1, self.logits.shape[-1])

    @property
    def support(self) -> ct.Constraint:  # type: ignore[override]  # of an instance
        entries = ct.draws_in_unit_interval if self.hard else constraints.nonnegative
        return constraints.independent(entries, 1)

    @property
    def has_rsample(self) -> bool:
        return not self.hard

    def _density(self, value, logits, **_):
        if not self.hard:
            raise NotImplementedError("a relaxed k-hot vector has no density in closed form; pass hard=True")
        value = arg.as_number("value", value).astype(arg.wide(logits.dtype))
        arg.require_event("value", value)
        arg.require_same_event(value, logits)
        _, chosen = lm.top_k(value, self.k)
        law = samplers.gumbel_top_k_log_prob(chosen, logits, ordered=False)
        is_k_hot = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == self.k)
        return where(is_k_hot, law, -jnp.inf)
