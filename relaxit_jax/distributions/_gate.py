"""Stochastic gates that are exactly 0 or 1 with positive probability, as NumPyro distributions."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import samplers
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd


class Gate(sd.Bit):
    """A law with atoms at 0 and 1.

    Under an ELBO the pathwise gradient misses the mass that crosses into the atoms, so these classes count
    as not reparametrized, and score-function gradients are right. `relaxit_jax.handlers.unrounded` and
    `relax` add the missing term, and the KL between two gates of one class has a closed form.
    """

    support: ct.Constraint = ct.draws_in_unit_interval
    _pathwise = False
    _no_slope = (
        "the gradient of the log-probability in a draw misses the mass that crosses into the atoms at 0 "
        "and 1. Put relaxit_jax.handlers.unrounded around both the model and the guide, or train with "
        "RLOO_ELBO or, if model and guide have the same class, with TraceMeanField_ELBO"
    )

    def _ends(self):
        """The log-masses at 0 and 1, and the log-densities next to them, on a last axis."""
        info = jnp.finfo(jnp.float32)
        at, beside = (
            jnp.stack([self._law(jnp.float32(z)) for z in pair], -1)
            for pair in ((0, 1), (info.tiny, 1 - info.epsneg))
        )
        return at, beside

    def _atoms(self) -> Array:
        return jnp.exp(self._ends()[0])

    def _jumps(self) -> Array:
        at, beside = self._ends()
        return beside - at


class GaussianRelaxedBernoulli(Gate):
    """Gaussians clipped to [0, 1], see `relaxit_jax.gaussian_bernoulli`.

    ``z = clip(loc + scale eps, 0, 1)``, eps standard normal. `log_prob` is the log-mass at 0 and 1 and the
    log-density in between. It stands for the bit ``z > 1/2``. As a latent site it needs
    `relaxit_jax.handlers.unrounded`, `TraceMeanField_ELBO` or `RLOO_ELBO`. Elsewhere the gradient of its
    log-probability in a draw is an error, because it misses the mass that crosses into the atoms.

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
    _sampler = staticmethod(samplers.gaussian_bernoulli)
    _density = staticmethod(samplers.gaussian_bernoulli_log_prob)

    def __init__(self, *, loc: ArrayLike, scale: ArrayLike, validate_args: bool | None = None) -> None:
        super().__init__(validate_args, loc=loc, scale=scale)

    @property
    def log_odds(self) -> Array:
        """The log-odds of ``z > 1/2``, in float32 or wider."""
        _, loc, scale = self._wide()
        return lm.probit_to_logit((loc - 0.5) / scale)

    def _wide(self):
        return arg.widen(loc=self.loc, scale=self.scale)  # ndtr does not support half precision

    def _moments(self):
        """Mean and variance, from the part between 0 and 1 and the atoms."""
        dtype, loc, scale = self._wide()
        low, high = -loc / scale, (1 - loc) / scale
        inside = ndtr(high) - ndtr(low)
        at_low, at_high = jnp.exp(lm.log_normal_pdf(low)), jnp.exp(lm.log_normal_pdf(high))
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
        value = arg.as_number("value", value)
        inside = where(value < 1, ndtr((value - loc) / scale), 1)
        return where(value < 0, 0, inside)

    def icdf(self, q: ArrayLike) -> Array:
        _, loc, scale = self._wide()
        return jnp.clip(loc + scale * ndtri(arg.as_float("q", q)), 0, 1)


class HardConcrete(Gate):
    """Stretched and clipped binary Concrete gates, see `relaxit_jax.hard_concrete`.

    ``z = clip(a + (b - a) v, 0, 1)``, ``v = sigmoid((logits + L) / tau)``, ``stretch = (a, b)``. `log_prob`
    is the log-mass at 0 and 1 and the log-density in between. It stands for the bit ``z > 1/2``. As a latent
    site it needs `relaxit_jax.handlers.unrounded`, `TraceMeanField_ELBO` or `RLOO_ELBO`. Elsewhere the
    gradient of its log-probability in a draw is an error, because it misses the mass that crosses into the
    atoms.

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
    arg_constraints: dict[str, Any] = {"logits": ct.log_odds, "tau": constraints.positive}
    pytree_aux_fields: tuple[str, ...] = ("stretch",)
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
        """The log-odds of ``z > 1/2``, which equal ``logits`` if the stretch is symmetric."""
        a, b = self.stretch
        return self.logits - self.tau * math.log((0.5 - a) / (b - 0.5))

    @property
    def l0(self) -> Array:
        """The probability that the gate is not 0, see `relaxit_jax.hard_concrete_l0`."""
        return self._full(samplers.hard_concrete_l0(self.logits, self.tau, stretch=self.stretch))

    def cdf(self, value: ArrayLike) -> Array:
        a, b = self.stretch
        value = arg.as_number("value", value)
        inside = jnp.clip(value, 0, 1)
        y = jnp.log(inside - a) - jnp.log(b - inside)
        below = where(value < 1, sigmoid(self.tau * y - self.logits), 1)
        return where(value < 0, 0, below)

    def icdf(self, q: ArrayLike) -> Array:
        a, b = self.stretch
        y = sd.logit_quantile(self.logits, arg.as_float("q", q)) / self.tau
        return jnp.clip(a * sigmoid(-y) + b * sigmoid(y), 0, 1)


# --- KL ---------------------------------------------------------------------------------------


def _kl_of_atoms(p, q):
    """The part of a KL that belongs to the atoms."""
    return lm.discrete_kl(p._ends()[0], q._ends()[0])


@_kl.kl_rule((GaussianRelaxedBernoulli, GaussianRelaxedBernoulli))
def _kl_of_gaussian_gates(p, q):
    """The atoms, and between them a quadratic function of eps under the truncated normal density."""
    _, loc, other_loc, scale, other = arg.widen(a=p.loc, b=q.loc, c=p.scale, d=q.scale)
    low, high = -loc / scale, (1 - loc) / scale
    at_low, at_high = jnp.exp(lm.log_normal_pdf(low)), jnp.exp(lm.log_normal_pdf(high))
    # on the side where both are small, so that their difference keeps its digits
    mass = where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    first = at_low - at_high
    second = mass + low * at_low - high * at_high
    ratio, shift = scale / other, (loc - other_loc) / other
    inside = (ratio - 1) * (ratio + 1) / 2 * second + ratio * shift * first
    inside += (shift**2 / 2 - jnp.log(ratio)) * mass
    return _kl_of_atoms(p, q) + inside


@_kl.kl_rule((HardConcrete, HardConcrete))
def _kl_of_hard_concretes(p, q):
    """The atoms, and between them the KL between the two underlying binary Concrete variables.

    At equal temperatures it is ``m (log A + log B - d + r coth(r / 2) - 2)``, with m the mass of p there, d
    how far the logits of q lie above the logits of p, A and B the values of ``u + exp(d) (1 - u)`` at both
    ends, u the distribution function of p, and ``r = log B - log A``.
    """
    if p.stretch != q.stretch:
        raise NotImplementedError(
            f"stretch must be the same in two HardConcrete for their KL, got {p.stretch} and {q.stretch}"
        )
    a, b = p.stretch
    ends = math.log(-a / b), math.log((1 - a) / (b - 1))
    if not _kl.known_equal("tau", p, q):
        return _kl_of_atoms(p, q) + _kl.concrete_kl((p.logits, p.tau), (q.logits, q.tau), *ends)
    _, logits, other, tau = arg.widen(p=p.logits, q=q.logits, tau=p.tau)
    certain = jnp.isinf(logits) | jnp.isinf(other)
    logits, d = where(certain, 0, logits), where(certain, 0, other - logits)
    low, high = (tau * end - logits for end in ends)
    mass = where(low > 0, sigmoid(-low) - sigmoid(-high), sigmoid(high) - sigmoid(low))
    log_a, log_b = (
        where(
            jnp.abs(d) < 1,
            jnp.log1p(jnp.expm1(jnp.clip(d, -1, 1)) * sigmoid(-x)),
            jnp.logaddexp(log_sigmoid(x), d + log_sigmoid(-x)),
        )
        for x in (low, high)
    )
    inside = mass * (log_a + log_b - d + _kl.coth_excess(log_b - log_a))
    return _kl_of_atoms(p, q) + where(certain, 0, inside)
