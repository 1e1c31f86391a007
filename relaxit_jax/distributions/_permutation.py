"""Permutations as NumPyro distributions."""

from __future__ import annotations

from typing import Any

from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import samplers
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _sampler_distribution as sd


class GumbelSinkhorn(sd.SamplerDistribution):
    """Relaxed permutation matrices, see `relaxit_jax.gumbel_sinkhorn`.

    ``S((logits + G) / tau)``, where S scales rows and columns to sum to 1. With ``hard`` the draw is the
    permutation matrix of the best assignment for the same noise. Neither has a density in closed form. The
    support is a constraint on the entries.

    Args:
      logits: the weight of row i for column j, shape (..., n, n); -inf is impossible.
      tau: temperature, positive, of the batch shape.
      num_iters: maximum number of Newton steps.
      probs: the same weights as probabilities in each row, shape (..., n, n), instead of ``logits``.
      hard: exact permutations with the gradient of the relaxed ones.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``logits`` and ``probs``, for ``logits`` that are not square
        matrices, a ``num_iters`` that is not a positive integer or, if validated, a ``tau`` that is
        not positive.
      NotImplementedError: for `log_prob`.

    References:
      G. Mena, D. Belanger, S. Linderman, J. Snoek (2018), Learning Latent Permutations with
      Gumbel-Sinkhorn Networks, arXiv:1802.08665.

    >>> GumbelSinkhorn(logits=jnp.zeros((3, 3)), tau=0.5, hard=True).sample(jax.random.key(0)).sum(-1)
    Array([1., 1., 1.], dtype=float32)
    """

    logits: Array
    tau: Array
    num_iters: int
    hard: bool
    arg_constraints: dict[str, Any] = {
        "logits": constraints.independent(ct.log_weights, 1),
        "tau": constraints.positive,
    }
    pytree_aux_fields: tuple[str, ...] = ("num_iters", "hard")
    support: ct.Constraint = constraints.independent(constraints.unit_interval, 2)
    _sampler = staticmethod(samplers.gumbel_sinkhorn)
    _event = staticmethod(lambda shapes: shapes["logits"][-2:])

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        num_iters: int = 100,
        probs: ArrayLike | None = None,
        hard: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        num_iters = arg.as_static_int("num_iters", num_iters, 1, 1_000_000)
        arg.require_flags(hard=hard)
        static = {"num_iters": num_iters, "hard": hard}
        super().__init__(validate_args, static, logits=logits, probs=probs, tau=tau)
        arg.require_square("logits", self.logits, self.logits.shape[-1])


class RelaxedPermutation(sd.SamplerDistribution):
    """Relaxed orders of items with one logit each, see `relaxit_jax.relaxed_permutation`.

    ``Z_ij = softmax_j(-|sort(s)_i - s_j| / tau)``, ``s = logits + G``; row i is the item at place i. With
    ``hard`` the draw is the permutation matrix of the decreasing order of s. It follows the Plackett-Luce
    law, and `log_prob` is its mass. The relaxed matrix has no density in closed form.

    Args:
      logits: one per item, shape (..., n). At most one item may have -inf; it comes last.
      tau: temperature, positive, of the batch shape.
      probs: probabilities of the first item, shape (..., n), instead of ``logits``.
      hard: exact permutations with the gradient of the relaxed ones.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``logits`` and ``probs``, for logits of -inf for more than one item
        or, if validated, a ``tau`` that is not positive.
      NotImplementedError: for `log_prob` without ``hard``.

    References:
      S. Prillo, J. Eisenschlos (2020), SoftSort: A Continuous Relaxation for the argsort Operator,
      arXiv:2006.16038.

    >>> d = RelaxedPermutation(logits=jnp.zeros(3), tau=0.5, hard=True)
    >>> print(f"{jnp.exp(d.log_prob(jnp.eye(3))):.4f}")  # one of six orders
    0.1667
    """

    logits: Array
    tau: Array
    hard: bool
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    pytree_aux_fields: tuple[str, ...] = ("hard",)
    _no_slope = (
        "the log-probability of an order has no slope in the entries of its matrix. Train it with RLOO_ELBO"
    )
    _sampler = staticmethod(samplers.relaxed_permutation)
    _event = staticmethod(lambda shapes: (*shapes["logits"][-1:], *shapes["logits"][-1:]))

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        hard: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        arg.require_flags(hard=hard)
        super().__init__(validate_args, {"hard": hard}, logits=logits, probs=probs, tau=tau)

    @property
    def support(self) -> ct.Constraint:  # type: ignore[override]  # of an instance
        return constraints.independent(ct.draws_in_simplex if self.hard else ct.simplex, 1)

    @property
    def has_rsample(self) -> bool:
        return not self.hard

    def _density(self, value, logits, **_):
        if not self.hard:
            raise NotImplementedError("a relaxed permutation has no density in closed form; pass hard=True")
        return samplers.relaxed_permutation_log_prob(value, logits)
