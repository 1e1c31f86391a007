"""Stochastic gates, which are exactly 0 or 1 with positive probability, as NumPyro distributions."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
from relaxit_jax import _numerics as nm
from relaxit_jax import samplers
from relaxit_jax.distributions import _base as base


class GaussianRelaxedBernoulli(base.Bit):
    """A Gaussian clipped to [0, 1], `relaxit_jax.gaussian_bernoulli`.

    ``z = clip(loc + scale eps, 0, 1)``, eps standard normal. `log_prob` is the log-mass at 0 and 1
    and the log-density between. It stands for the bit ``z > 1/2``.

    Args:
      loc: mean before clipping.
      scale: standard deviation before clipping, positive.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for shapes that do not broadcast or, if validated, values outside their ranges.

    References:
      Y. Yamada, O. Lindenbaum, S. Negahban, Y. Kluger (2020), arXiv:1810.04247.

    >>> print(f"{GaussianRelaxedBernoulli(loc=0.5, scale=0.5).cdf(0.0):.4f}")  # Phi(-1)
    0.1587
    """

    loc: Array
    scale: Array
    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": constraints.positive}
    support: base.Constraint = constraints.unit_interval
    _sampler = staticmethod(samplers.gaussian_bernoulli)
    _density = staticmethod(samplers.gaussian_bernoulli_log_prob)

    def __init__(self, *, loc: ArrayLike, scale: ArrayLike, validate_args: bool | None = None) -> None:
        super().__init__(validate_args, loc=loc, scale=scale)

    @property
    def log_odds(self) -> Array:
        """Log-odds of ``z > 1/2``, in float32 or wider."""
        _, loc, scale = self._wide()
        return nm.probit_to_logit((loc - 0.5) / scale)

    def _wide(self):
        return ck.widen(loc=self.loc, scale=self.scale)  # ndtr knows no half precision

    def _moments(self):
        """Mean and variance, of the parts between 0 and 1 and of the atoms there."""
        dtype, loc, scale = self._wide()
        low, high = -loc / scale, (1 - loc) / scale
        inside = ndtr(high) - ndtr(low)
        at_low, at_high = jnp.exp(nm.log_normal_pdf(low)), jnp.exp(nm.log_normal_pdf(high))
        mean = ndtr(-high) + loc * inside + scale * (at_low - at_high)
        # about the mean, not about 0: the difference of two second moments would cancel
        atoms = (1 - mean) ** 2 * ndtr(-high) + mean**2 * ndtr(low)
        d = loc - mean
        second = inside + low * at_low - high * at_high
        between = d**2 * inside + 2 * d * scale * (at_low - at_high) + scale**2 * second
        return self._full(mean.astype(dtype)), self._full((atoms + between).astype(dtype))

    @property
    def mean(self) -> Array:
        return self._moments()[0]

    @property
    def variance(self) -> Array:
        return self._moments()[1]

    def cdf(self, value: ArrayLike) -> Array:
        _, loc, scale = self._wide()
        value = jnp.asarray(value)
        inside = jnp.where(value < 1, ndtr((value - loc) / scale), 1)
        return jnp.where(value < 0, 0, inside)

    def icdf(self, q: ArrayLike) -> Array:
        _, loc, scale = self._wide()
        return jnp.clip(loc + scale * ndtri(q), 0, 1)


class HardConcrete(base.Bit):
    """A stretched and clipped binary Concrete gate, `relaxit_jax.hard_concrete`.

    ``z = clip(a + (b - a) v, 0, 1)``, ``v = sigmoid((logits + L) / tau)``, ``stretch = (a, b)``.
    `log_prob` is the log-mass at 0 and 1 and the log-density between. It stands for the bit
    ``z > 1/2``.

    Args:
      logits: log-odds; infinite ones are certain bits.
      tau: temperature, positive, broadcasting against ``logits``.
      probs: ``sigmoid(logits)``, instead of ``logits``.
      stretch: two numbers around [0, 1], known before tracing.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `RelaxedBernoulli`, and for a ``stretch`` that does not enclose [0, 1].

    References:
      C. Louizos, M. Welling, D. P. Kingma (2018), arXiv:1712.01312.

    >>> print(f"{HardConcrete(logits=0.0, tau=0.5).l0:.4f}")  # P(z != 0)
    0.7683
    """

    logits: Array
    tau: Array
    stretch: tuple[float, float]
    arg_constraints: dict[str, Any] = {"logits": base.log_odds, "tau": constraints.positive}
    pytree_aux_fields: tuple[str, ...] = ("stretch",)
    support: base.Constraint = constraints.unit_interval
    _sampler = staticmethod(samplers.hard_concrete)
    _density = staticmethod(samplers.hard_concrete_log_prob)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        stretch: tuple[float, float] = (-0.1, 1.1),
        validate_args: bool | None = None,
    ) -> None:
        samplers.hard_concrete_gate(0.0, stretch=stretch)  # checks the stretch
        static = {"stretch": tuple(map(float, stretch))}
        super().__init__(validate_args, static, logits=logits, probs=probs, tau=tau)

    @property
    def _log_space(self):  # type: ignore[override]  # of an instance
        return "logit before stretching", self.stretch

    @property
    def log_odds(self) -> Array:
        """Log-odds of ``z > 1/2``, which are ``logits`` if the stretch is symmetric."""
        a, b = self.stretch
        return self.logits - self.tau * math.log((0.5 - a) / (b - 0.5))

    @property
    def l0(self) -> Array:
        """The probability of not being 0, `relaxit_jax.hard_concrete_l0`."""
        return self._full(samplers.hard_concrete_l0(self.logits, self.tau, stretch=self.stretch))

    def cdf(self, value: ArrayLike) -> Array:
        a, b = self.stretch
        value = jnp.asarray(value)
        inside = jnp.clip(value, 0, 1)
        y = jnp.log(inside - a) - jnp.log(b - inside)
        below = jnp.where(value < 1, sigmoid(self.tau * y - self.logits), 1)
        return jnp.where(value < 0, 0, below)

    def icdf(self, q: ArrayLike) -> Array:
        a, b = self.stretch
        y = base.logit_quantile(self.logits, q) / self.tau
        return jnp.clip(a * sigmoid(-y) + b * sigmoid(y), 0, 1)
