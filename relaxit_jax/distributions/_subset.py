"""Subsets of fixed size as NumPyro distributions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
from relaxit_jax import _numerics as nm
from relaxit_jax import samplers
from relaxit_jax.distributions import _base as base


class GumbelSoftmaxTopK(base.SamplerDistribution):
    """Relaxed k-hot vectors, `relaxit_jax.relaxed_top_k`.

    The sum of k Gumbel-softmax draws without replacement. With ``hard`` it is an exact k-hot vector
    whose mass, that of the set of `relaxit_jax.gumbel_top_k`, is `log_prob`; the relaxed vector has
    no density in closed form. The support is that of its entries, which sum to k.

    Args:
      logits: unnormalised log-probabilities of the first draw, shape (..., n).
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
    arg_constraints: dict[str, Any] = {"logits": base.log_weights, "tau": constraints.positive}
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
        ck.require_flags(hard=hard)
        super().__init__(validate_args, {"hard": hard}, logits=logits, probs=probs, tau=tau)
        self.k = ck.as_static_int("k", k, 1, self.logits.shape[-1])

    @property
    def support(self) -> base.Constraint:  # type: ignore[override]  # of an instance
        entries = base.draws_in_unit_interval if self.hard else constraints.nonnegative
        return constraints.independent(entries, 1)

    @property
    def has_rsample(self) -> bool:
        return not self.hard

    def _density(self, value, logits, **_):
        if not self.hard:
            raise NotImplementedError("a relaxed k-hot vector has no density in closed form; give hard=True")
        value = ck.as_number("value", value).astype(ck.wide(logits.dtype))
        ck.require_event("value", value)
        ck.require_same_event(value, logits)
        _, chosen = nm.top_k(value, self.k)
        law = samplers.gumbel_top_k_log_prob(chosen, logits, ordered=False)
        is_k_hot = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == self.k)
        return nm.where(is_k_hot, law, -jnp.inf)


class SimpleTopK(base.SamplerDistribution):
    """Independent bits given that k of them are ones, `relaxit_jax.simple_top_k`.

    ``P(z)`` proportional to ``exp(logits . z)`` over the k-hot z. Draws are exact, with the gradient of
    their mean, the marginals. The KL of two of them is in closed form.

    Args:
      logits: log-odds of the elements up to a shared constant, shape (..., n); -inf is never drawn.
      k: number of elements, from 1 to n, known before tracing.
      probs: weights of the elements that sum to 1, shape (..., n), instead of ``logits``: ``P(z)`` is
        proportional to the product of those chosen.
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
    arg_constraints: dict[str, Any] = {"logits": base.log_weights}
    pytree_aux_fields: tuple[str, ...] = ("k",)
    support: base.Constraint = constraints.independent(base.draws_in_unit_interval, 1)
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
        self.k = ck.as_static_int("k", k, 1, self.logits.shape[-1])

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
    _, of_p, of_q = ck.widen(p=p.logits, q=q.logits)
    likely = jax.lax.stop_gradient(nm.k_hot(nm.top_k(of_p, p.k)[1], of_p))
    away = samplers.simple_top_k_marginals(of_p, p.k) - likely
    moved = jnp.sum(away * nm.where(of_q == -jnp.inf, 0, of_q), -1)
    return moved + samplers.simple_top_k_log_prob(likely, of_q, q.k)


@base.kl_rule((SimpleTopK, SimpleTopK))
def _kl_simple_top_k(p, q):
    """E_p log p(z) - E_p log q(z); inf where p draws what q cannot."""
    beyond = jnp.any((p.logits > -jnp.inf) & (q.logits == -jnp.inf), -1) | (p.k != q.k)
    shared = SimpleTopK(logits=q.logits, k=min(p.k, q.logits.shape[-1]))
    kl = _expected_log_prob(p, p) - _expected_log_prob(p, shared)
    return nm.where(beyond, jnp.inf, kl)
