"""Counts as NumPyro distributions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import samplers
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd


class GeneralizedGumbelSoftmax(sd.SamplerDistribution):
    """Relaxed counts, or other numbers from a finite list, see `relaxit_jax.generalized_gumbel_softmax`.

    ``z = sum_k w_k values_k``, ``w = softmax((logits + G) / tau)``. With ``hard`` the draw is a value of the
    list, and `log_prob` is its mass; the relaxed number has no density in closed form.

    The log-mass is known only at the values. Its slope in the value, which a straight-through draw passes on,
    is the slope of the line through the log-masses of both neighbors, or of the one neighbor that is
    possible. It is exact where the log-mass is linear in the value.

    Args:
      logits: unnormalized log-probabilities of the values, shape (..., K).
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
        "logits": ct.log_weights,
        "values": constraints.real_vector,
        "tau": constraints.positive,
    }
    pytree_aux_fields: tuple[str, ...] = ("hard",)
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
        arg.require_flags(hard=hard)
        super().__init__(validate_args, {"hard": hard}, logits=logits, probs=probs, values=values, tau=tau)
        size = self.logits.shape[-1]
        need = f"of shape (..., {size}), as logits is"
        arg.require(self.values.shape[-1] == size, "values", need, f"shape {self.values.shape}")

    def _log_pmf(self):
        if not self.hard:
            raise NotImplementedError("a relaxed number has no closed form; pass hard=True")
        return _kl.log_pmf_of_classes(self.logits)

    @property
    def support(self) -> ct.Constraint:  # type: ignore[override]  # of an instance
        return ct.real_draws if self.hard else constraints.real

    @property
    def has_rsample(self) -> bool:
        return not self.hard

    def _density(self, value, **_):
        _, value = arg.widen(value=value)
        log_pmf = self._log_pmf()
        at = jax.lax.stop_gradient(value)[..., None] == self.values
        law = jnp.max(where(at, log_pmf, -jnp.inf), -1)
        slope = jnp.sum(where(at, jax.lax.stop_gradient(_slopes(log_pmf, self.values)), 0), -1)
        step = value - jax.lax.stop_gradient(value)  # 0, with the gradient of the value
        return where(jnp.any(at, -1), law + slope * step, where(jnp.isnan(value), jnp.nan, -jnp.inf))

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


def _slopes(log_pmf, values):
    """The slope of the log-mass at each value, from the line through its possible neighbors."""
    values, log_pmf = jnp.broadcast_arrays(values, log_pmf)
    values = pl.placed(values, log_pmf)
    order = lm.argsort(where(log_pmf > -jnp.inf, values, jnp.inf))  # the impossible ones last
    x, y = (jnp.take_along_axis(a, order, -1) for a in (values, log_pmf))
    x, y = (jnp.concatenate([a[..., :1], a, a[..., -1:]], -1) for a in (x, y))
    last = jnp.isinf(y[..., 2:])  # no possible value above
    rise, run = (where(last, a[..., 1:-1], a[..., 2:]) - a[..., :-2] for a in (y, x))
    slopes = where((run > 0) & jnp.isfinite(rise), rise / where(run > 0, run, 1), 0)
    return jnp.take_along_axis(slopes, lm.argsort(order), -1)


# --- KL ---------------------------------------------------------------------------------------


@_kl.kl_rule((GeneralizedGumbelSoftmax, GeneralizedGumbelSoftmax))
def _kl_of_counts(p, q):
    """The KL between the discrete laws, if both are drawn exactly; inf if q lacks a value of p."""
    if not (p.hard and q.hard):
        raise NotImplementedError("a relaxed number has no density in closed form, and no KL; pass hard=True")
    log_p = p._log_pmf()
    if _kl.known_equal("values", p, q):
        return lm.discrete_kl(log_p, q._log_pmf())
    same = p.values[..., :, None] == q.values[..., None, :]
    return lm.discrete_kl(log_p, jnp.max(where(same, q._log_pmf()[..., None, :], -jnp.inf), -1))
