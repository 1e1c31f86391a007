"""Permutations as NumPyro distributions."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
from relaxit_jax import samplers
from relaxit_jax.distributions import _base as base


class GumbelSinkhorn(base.SamplerDistribution):
    """Relaxed permutation matrices, `relaxit_jax.gumbel_sinkhorn`.

    ``S((logits + G) / tau)``, S the scaling to rows and columns that sum to 1. With ``hard`` it is
    the permutation matrix of the best assignment for the same noise. Neither has a density in closed
    form. The support is that of the entries.

    Args:
      logits: weights of row i to go to column j, shape (..., n, n); -inf is impossible.
      tau: temperature, positive, of the batch shape.
      num_iters: steps of Newton's method, at most.
      probs: the same as probabilities of each row, shape (..., n, n), instead of ``logits``.
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
        "logits": constraints.independent(base.log_weights, 1),
        "tau": constraints.positive,
    }
    pytree_aux_fields: tuple[str, ...] = ("num_iters", "hard")
    support: base.Constraint = constraints.independent(constraints.unit_interval, 2)
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
        num_iters = ck.as_static_int("num_iters", num_iters, 1, 1_000_000)
        ck.require_flags(hard=hard)
        static = {"num_iters": num_iters, "hard": hard}
        super().__init__(validate_args, static, logits=logits, probs=probs, tau=tau)
        ck.require_square("logits", self.logits, self.logits.shape[-1])
