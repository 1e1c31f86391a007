"""Counts as NumPyro distributions."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
from relaxit_jax import samplers
from relaxit_jax.distributions import _base as base


class GeneralizedGumbelSoftmax(base.SamplerDistribution):
    """A relaxed number from a finite list, `relaxit_jax.generalized_gumbel_softmax`.

    ``z = sum_k w_k values_k``, ``w = softmax((logits + G) / tau)``. With ``hard`` it is a value of
    the list, whose mass is `log_prob`; the relaxed number has no density in closed form.

    Args:
      logits: unnormalised log-probabilities of the values, shape (..., K).
      values: the numbers, shape (..., K), different from each other.
      tau: temperature, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      hard: exact draws with the gradient of the relaxed ones.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `OneHotCategorical`, for missing ``values`` or ``tau``, or for shapes that
        do not fit.
      NotImplementedError: for `log_prob`, `mean` and `variance` without ``hard``.

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), arXiv:2003.01847.

    >>> d = GeneralizedGumbelSoftmax(logits=jnp.zeros(3), values=jnp.arange(3.0), tau=0.5, hard=True)
    >>> print(f"{d.mean:.4f}")
    1.0000
    """

    logits: Array
    values: Array
    tau: Array
    hard: bool
    arg_constraints: dict[str, Any] = {
        "logits": base.log_weights,
        "values": constraints.real_vector,
        "tau": constraints.positive,
    }
    pytree_aux_fields: tuple[str, ...] = ("hard",)
    support: base.Constraint = constraints.real
    _sampler = staticmethod(samplers.generalized_gumbel_softmax)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        values: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        hard: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, {"hard": hard}, logits=logits, probs=probs, values=values, tau=tau)
        size = self.logits.shape[-1]
        need = f"of shape (..., {size}), as logits is"
        ck.require(self.values.shape[-1] == size, "values", need, f"shape {self.values.shape}")

    def _log_pmf(self):
        if not self.hard:
            raise NotImplementedError("a relaxed number has no closed form; give hard=True")
        return base.log_pmf_of_classes(self.logits)

    def _density(self, value, **_):
        at = jnp.asarray(value)[..., None] == self.values
        chosen = jnp.where(at, self._log_pmf(), -jnp.inf)
        return jnp.max(chosen, -1)

    @property
    def mean(self) -> Array:
        return self._moment(jnp.sum(jnp.exp(self._log_pmf()) * self.values, -1))

    @property
    def variance(self) -> Array:
        p = jnp.exp(self._log_pmf())
        centred = self.values - jnp.sum(p * self.values, -1, keepdims=True)
        return self._moment(jnp.sum(p * centred**2, -1))

    def _moment(self, x):
        return self._full(x.astype(jnp.result_type(self.logits, self.values)))
