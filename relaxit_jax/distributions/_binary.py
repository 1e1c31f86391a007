"""Bits and gates as NumPyro distributions."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid
from jax.typing import ArrayLike
from numpyro.distributions import BernoulliLogits, BernoulliProbs, constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import samplers
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd


class RelaxedBernoulli(sd.Bit):
    """Relaxed bits (binary Concrete), see `relaxit_jax.relaxed_bernoulli`.

    ``z = sigmoid((logits + L) / tau)``, L standard logistic.

    Args:
      logits: log-odds of a one; infinite ones are certain bits.
      tau: temperature, positive, broadcasting against ``logits``.
      probs: probabilities of a one, instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``logits`` and ``probs``, no ``tau``, shapes that do not
        broadcast, or, if validated, values outside their ranges.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.

    >>> print(f"{RelaxedBernoulli(probs=0.3, tau=0.5).cdf(0.5):.4f}")  # P(z <= 1/2) = 1 - 0.3
    0.7000
    """

    logits: Array
    tau: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_odds, "tau": constraints.positive}
    support: ct.Constraint = constraints.unit_interval
    _sampler = staticmethod(samplers.relaxed_bernoulli)
    _density = staticmethod(samplers.relaxed_bernoulli_log_prob)
    _log_space = "logit"

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs, tau=tau)

    def cdf(self, value: ArrayLike) -> Array:
        value = arg.as_number("value", value)
        y, _ = lm.as_logit(value, False)
        inside = sigmoid(self.tau * where(jnp.isinf(y), 0, y) - self.logits)
        ends = (value >= 1) | ((value == 0) & (self.logits == -jnp.inf))
        return where((value <= 0) | (value >= 1), ends, inside)

    def icdf(self, q: ArrayLike) -> Array:
        return sigmoid(sd.logit_quantile(self.logits, arg.as_float("q", q)) / self.tau)


class StraightThroughBernoulli(sd.Bit):
    """Exact bits with the gradient of their probability, see `relaxit_jax.straight_through_bernoulli`.

    Forward ``Bernoulli(sigmoid(logits))``; backward as if the value were ``sigmoid(logits)``. The support is
    the unit interval, so NumPyro treats the draws as differentiable.

    Args:
      logits: log-odds of a one.
      probs: probabilities of a one, instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``logits`` and ``probs``, or, if validated, values outside
        their ranges.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), arXiv:1308.3432.

    >>> print(f"{StraightThroughBernoulli(probs=0.25).variance:.4f}")
    0.1875
    """

    logits: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_odds}
    support: ct.Constraint = ct.draws_in_unit_interval
    has_enumerate_support = True
    _pathwise = False
    _sampler = staticmethod(samplers.straight_through_bernoulli)

    @staticmethod
    def _density(value, logits, **_):
        return samplers.straight_through_bernoulli_log_prob(value, logits)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs)

    @property
    def mean(self) -> Array:
        return self._full(sigmoid(self.logits))

    @property
    def variance(self) -> Array:
        return self._full(sigmoid(self.logits) * sigmoid(-self.logits))

    def entropy(self) -> Array:
        return self._full(samplers.bernoulli_entropy(self.logits))

    def cdf(self, value: ArrayLike) -> Array:
        value = arg.as_number("value", value)
        return self._batched(where(value < 0, 0, where(value < 1, sigmoid(-self.logits), 1)))

    def icdf(self, q: ArrayLike) -> Array:
        return self._batched((arg.as_float("q", q) > sigmoid(-self.logits)).astype(self.logits.dtype))

    def enumerate_support(self, expand: bool = True) -> Array:
        values = jnp.arange(2, dtype=self.logits.dtype).reshape(-1, *(1,) * len(self.batch_shape))
        return jnp.broadcast_to(values, (2, *self.batch_shape)) if expand else values


class StraightThroughRelaxedBernoulli(StraightThroughBernoulli):
    """Exact bits with the gradient of a relaxed bit, see `relaxit_jax.relaxed_bernoulli` with ``hard``.

    Forward ``1[logits + L > 0]``, a Bernoulli; backward is the gradient of ``sigmoid((logits + L) / tau)``.

    Args:
      logits: log-odds of a one.
      tau: temperature of the gradient, positive, broadcasting against ``logits``.
      probs: probabilities of a one, instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `RelaxedBernoulli`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> print(f"{StraightThroughRelaxedBernoulli(tau=0.5, probs=0.25).mean:.4f}")
    0.2500
    """

    tau: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_odds, "tau": constraints.positive}

    _sampler = staticmethod(functools.partial(samplers.relaxed_bernoulli, hard=True))

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        sd.Bit.__init__(self, validate_args, logits=logits, probs=probs, tau=tau)


class StochasticTimesSmooth(sd.SamplerDistribution):
    """A bit times the square root of its probability, see `relaxit_jax.stochastic_times_smooth`.

    ``z = b sqrt(p)``, ``b ~ Bernoulli(sqrt(p))``, ``p = sigmoid(logits)``: mean p, variance
    ``p sqrt(p) (1 - sqrt(p))``. The second atom depends on the parameter, so the support is not
    enumerated and `log_prob` has no value elsewhere.

    Args:
      logits: log-odds of p.
      probs: p, instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``logits`` and ``probs``, or, if validated, values outside
        their ranges.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), arXiv:1308.3432.

    >>> print(f"{StochasticTimesSmooth(probs=0.25).variance:.4f}")
    0.0625
    """

    logits: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_odds}
    support: ct.Constraint = ct.draws_in_unit_interval
    _pathwise = False
    _no_slope = (
        "its upper value is the root of its own probability, so a law with other logits gives it no "
        "probability. Use it in a loss; as a latent site, use another bit, such as StraightThroughBernoulli"
    )
    _sampler = staticmethod(samplers.stochastic_times_smooth)
    _density = staticmethod(samplers.stochastic_times_smooth_log_prob)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs)

    @property
    def mean(self) -> Array:
        return self._full(sigmoid(self.logits))

    @property
    def variance(self) -> Array:
        p = sigmoid(self.logits)
        root = jnp.sqrt(p)
        return self._full(
            p * root * sigmoid(-self.logits) / (1 + root)
        )  # 1 - sqrt(p) = (1 - p)/(1 + sqrt(p))

    def cdf(self, value: ArrayLike) -> Array:
        value = arg.as_number("value", value)
        root = jnp.sqrt(sigmoid(self.logits))
        # a draw equals the root only to the rounding of its dtype, as for the density
        at_root = value >= root * (1 - 4 * float(jnp.finfo(jnp.result_type(value, root, 0.0)).eps))
        inside = where(at_root & (value > 0), 1, sigmoid(-self.logits) / (1 + root))
        return where(value < 0, 0, inside)

    def icdf(self, q: ArrayLike) -> Array:
        root = jnp.sqrt(sigmoid(self.logits))
        return where(arg.as_float("q", q) > sigmoid(-self.logits) / (1 + root), root, 0)


class CorrelatedRelaxedBernoulli(sd.SamplerDistribution):
    """Correlated relaxed bits, see `relaxit_jax.correlated_bernoulli`.

    ``z = sigmoid((logits + logit Phi(v)) / tau)``, ``v ~ N(0, R)``,
    ``R = scale_tril scale_tril^T``.

    Args:
      logits: log-odds of a one, shape (..., K).
      tau: temperature, positive, of the batch shape.
      scale_tril: Cholesky factor of the correlation matrix, shape (..., K, K), rows of norm 1.
      probs: probabilities of a one, instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `RelaxedBernoulli`, or for a missing ``scale_tril``.

    References:
      C. Lee, F. Imrie, M. van der Schaar (2022), Self-Supervision Enhanced Feature Selection with
      Correlated Gates, ICLR.

    >>> CorrelatedRelaxedBernoulli(logits=jnp.zeros(2), tau=0.5, scale_tril=jnp.eye(2)).event_shape
    (2,)
    """

    logits: Array
    tau: Array
    scale_tril: Array
    arg_constraints: dict[str, Any] = {
        "logits": constraints.independent(ct.log_odds, 1),
        "tau": constraints.positive,
        "scale_tril": constraints.corr_cholesky,
    }
    support: ct.Constraint = constraints.independent(constraints.unit_interval, 1)
    _sampler = staticmethod(samplers.correlated_bernoulli)
    _density = staticmethod(samplers.correlated_bernoulli_log_prob)
    _log_space = "logit"
    _event = staticmethod(lambda shapes: shapes["logits"][-1:])

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        scale_tril: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs, tau=tau, scale_tril=scale_tril)


def _log_odds(d):
    if isinstance(d, sd.Bit):
        return d.log_odds
    return jnp.asarray(d.logits) if isinstance(d, BernoulliLogits) else jnp.log(d.probs) - jnp.log1p(-d.probs)


@_kl.kl_rule(
    (sd.Bit, BernoulliProbs),
    (sd.Bit, BernoulliLogits),
    (sd.Bit, StraightThroughBernoulli),
    (BernoulliProbs, StraightThroughBernoulli),
    (BernoulliLogits, StraightThroughBernoulli),
)
def _kl_of_bits(p, q):
    """The KL between the bits that the two stand for."""
    return samplers.bernoulli_kl(_log_odds(p), _log_odds(q))


@_kl.kl_rule((RelaxedBernoulli, RelaxedBernoulli))
def _kl_of_concretes(p, q):
    """At equal temperatures, the KL of two logistic laws, ``d coth(d / 2) - 2``, with d the shift."""
    if not _kl.known_equal("tau", p, q):
        return _kl.concrete_kl((p.logits, p.tau), (q.logits, q.tau))
    _, a, b = arg.widen(p=p.logits, q=q.logits)
    d = where(jnp.isinf(a) & (a == b), 0, a - b)
    return _kl.coth_excess(d)
