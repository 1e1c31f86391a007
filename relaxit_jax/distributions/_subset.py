"""Subsets of fixed size as NumPyro distributions."""

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
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

    >>> GumbelSoftmaxTopK(jnp.zeros(5), 2, 0.5, hard=True).sample(jax.random.key(0)).sum()
    Array(2., dtype=float32)
    """

    arg_constraints = {"logits": base.log_weights, "tau": constraints.positive}
    pytree_aux_fields = ("k", "hard")
    support = constraints.independent(constraints.nonnegative, 1)
    _sampler = staticmethod(samplers.relaxed_top_k)
    _event = staticmethod(lambda shapes: shapes["logits"][-1:])

    def __init__(self, logits=None, k=None, tau=None, *, probs=None, hard=False, validate_args=None):
        logits = base.class_logits(logits, probs)
        ck.require_event("logits", logits)
        k = ck.as_static_int("k", k, 1, jnp.shape(logits)[-1])
        super().__init__(validate_args, {"k": k, "hard": hard}, logits=logits, tau=tau)

    def _density(self, value, logits, **_):
        if not self.hard:
            raise NotImplementedError("a relaxed k-hot vector has no density in closed form; give hard=True")
        _, chosen = jax.lax.top_k(value, self.k)
        law = samplers.gumbel_top_k_log_prob(chosen, logits, ordered=False)
        is_k_hot = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == self.k)
        return jnp.where(is_k_hot, law, -jnp.inf)
