"""One-hot vectors drawn exactly, with and without a gradient, as NumPyro distributions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import samplers
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd


class OneHotCategorical(sd.OneHot):
    """One-hot vectors from a categorical distribution: exact draws without a gradient.

    ``P(z = e_k) = softmax(logits)_k``.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for both or neither of ``logits`` and ``probs``, no class axis, or, if validated,
        logits that are NaN, +inf or all -inf; for ``probs`` that are negative or do not sum to 1.

    References:
      E. Jang, S. Gu, B. Poole (2017), Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144, of which these are the draws at temperature 0.

    >>> d = OneHotCategorical(probs=jnp.array([0.25, 0.75]))
    >>> d.sample(jax.random.key(0)), d.mean.round(4)
    (Array([0., 1.], dtype=float32), Array([0.25, 0.75], dtype=float32))
    """

    arg_constraints: dict[str, Any] = {"logits": ct.log_weights}
    support: ct.Constraint = ct.one_hot
    _pathwise = False
    _sampler = staticmethod(lambda key, logits, *, shape: jax.lax.stop_gradient(
        samplers.gumbel_softmax(key, logits, 1.0, shape=shape, hard=True)))  # fmt: skip

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs)

    @staticmethod
    def _density(value, logits, **_):
        return samplers.straight_through_categorical_log_prob(value, logits)

    @property
    def mean(self) -> Array:
        return self._full(self.probs)

    @property
    def variance(self) -> Array:
        return self._full(self.probs * (1 - self.probs))

    @property
    def mode(self) -> Array:
        best = jnp.argmax(self.logits, -1)
        return self._full(jax.nn.one_hot(best, self.event_shape[0], dtype=self.logits.dtype))

    def entropy(self) -> Array:
        return self._batched(samplers.categorical_entropy(self.logits))


class _StraightThrough(OneHotCategorical):
    """Exact one-hot draws with a gradient, whose support NumPyro must treat as continuous."""

    support: ct.Constraint = ct.draws_in_simplex


class StraightThroughGumbelSoftmax(_StraightThrough):
    """Exact one-hot draws with the gradient of `GumbelSoftmax`.

    Forward ``one_hot(argmax(logits + G))``; backward is the gradient of ``softmax((logits + G) / tau)``.
    The support is the simplex, so NumPyro treats the draws as differentiable.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> StraightThroughGumbelSoftmax(logits=jnp.zeros(3), tau=0.5).sample(jax.random.key(0))
    Array([0., 1., 0.], dtype=float32)
    """

    tau: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    _sampler = staticmethod(functools.partial(samplers.gumbel_softmax, hard=True))

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        sd.OneHot.__init__(self, validate_args, logits=logits, probs=probs, tau=tau)


def RelaxedOneHotCategoricalStraightThrough(
    temperature: ArrayLike,
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    *,
    validate_args: bool | None = None,
) -> StraightThroughGumbelSoftmax:
    """`StraightThroughGumbelSoftmax` with Pyro's signature.

    >>> RelaxedOneHotCategoricalStraightThrough(0.5, logits=jnp.zeros(3)).event_shape
    (3,)
    """
    sd.check_temperature(temperature, validate_args)
    return StraightThroughGumbelSoftmax(
        logits=logits, tau=temperature, probs=probs, validate_args=validate_args
    )


class StraightThroughCategorical(_StraightThrough):
    """Exact one-hot draws with a straight-through gradient, see `relaxit_jax.straight_through_categorical`.

    Forward ``D ~ OneHotCategorical(logits)``; backward is the gradient of ``softmax(logits / tau)``.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`.

    References:
      Y. Bengio, N. Léonard, A. Courville (2013), arXiv:1308.3432.

    >>> StraightThroughCategorical(logits=jnp.zeros(3)).sample(jax.random.key(0)).sum()
    Array(1., dtype=float32)
    """

    tau: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    _sampler = staticmethod(samplers.straight_through_categorical)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike = 1.0,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        sd.OneHot.__init__(self, validate_args, logits=logits, probs=probs, tau=tau)


class DecoupledStraightThroughGumbelSoftmax(_StraightThrough):
    """Exact one-hot draws with a Gumbel-softmax gradient, see `relaxit_jax.decoupled_gumbel_softmax`.

    Forward ``one_hot(argmax(logits + G))``; backward is the gradient of
    ``softmax((logits + G) / tau_backward)``. ``tau_forward`` does not affect exact draws; it is a
    parameter because the sampler's soft draws use it.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau_forward: temperature of the value, positive, of the batch shape.
      tau_backward: temperature of the gradient, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`.

    References:
      R. Shah, M. Yan, M. C. Mozer, D. Liu (2024), arXiv:2410.13331.

    >>> parameters = {"logits": jnp.zeros(3), "tau_forward": 0.3, "tau_backward": 0.7}
    >>> DecoupledStraightThroughGumbelSoftmax(**parameters).sample(jax.random.key(0))
    Array([0., 1., 0.], dtype=float32)
    """

    tau_forward: Array
    tau_backward: Array
    arg_constraints: dict[str, Any] = {
        "logits": ct.log_weights,
        "tau_forward": constraints.positive,
        "tau_backward": constraints.positive,
    }
    _sampler = staticmethod(samplers.decoupled_gumbel_softmax)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau_forward: ArrayLike | None = None,
        tau_backward: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        taus = {"tau_forward": tau_forward, "tau_backward": tau_backward}
        sd.OneHot.__init__(self, validate_args, logits=logits, probs=probs, **taus)


class GappedStraightThrough(_StraightThrough):
    """Exact one-hot draws with a gapped gradient, see `relaxit_jax.gapped_straight_through`.

    Backward is the gradient of ``softmax((logits + sg(m1 - m2)) / tau)``, in which the drawn class has
    the largest logit and leads by ``gap``.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      gap: by how much the drawn class leads, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`.

    References:
      T.-H. Fan, T.-C. Chi, A. I. Rudnicky, P. J. Ramadge (2022), arXiv:2206.07235.

    >>> GappedStraightThrough(logits=jnp.zeros(3), tau=0.5).sample(jax.random.key(0)).sum()
    Array(1., dtype=float32)
    """

    tau: Array
    gap: Array
    arg_constraints: dict[str, Any] = {
        "logits": ct.log_weights,
        "tau": constraints.positive,
        "gap": constraints.positive,
    }
    _sampler = staticmethod(samplers.gapped_straight_through)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        gap: ArrayLike = 1.0,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        sd.OneHot.__init__(self, validate_args, logits=logits, probs=probs, tau=tau, gap=gap)


class ReinMax(_StraightThrough):
    """Exact one-hot draws with a second-order gradient, see `relaxit_jax.reinmax`.

    Backward is the gradient of ``2 p1 - softmax(logits) / 2``, where p1 is the softmax with value
    ``(D + softmax(logits / tau)) / 2``.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`.

    References:
      L. Liu, C. Dong, X. Liu, B. Yu, J. Gao (2023), arXiv:2304.08612.

    >>> ReinMax(logits=jnp.zeros(3)).sample(jax.random.key(0)).sum()
    Array(1., dtype=float32)
    """

    tau: Array
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    _sampler = staticmethod(samplers.reinmax)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike = 1.0,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        sd.OneHot.__init__(self, validate_args, logits=logits, probs=probs, tau=tau)


class GumbelRao(_StraightThrough):
    """Exact one-hot draws with a Rao-Blackwellized Gumbel-softmax gradient, see `relaxit_jax.gumbel_rao`.

    Backward is the mean over ``num_samples`` gradients of ``softmax((logits + sg(G_k)) / tau)``, given
    that ``logits + G_k`` is largest at the drawn class.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      num_samples: Gumbel vectors per draw, a Python integer, 1 or more.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`, or for a ``num_samples`` that is not a positive integer.

    References:
      M. B. Paulus, C. J. Maddison, A. Krause (2021), arXiv:2010.04838.

    >>> GumbelRao(logits=jnp.zeros(3), tau=0.5, num_samples=20).sample(jax.random.key(0)).sum()
    Array(1., dtype=float32)
    """

    tau: Array
    num_samples: int
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    pytree_aux_fields: tuple[str, ...] = ("num_samples",)
    _sampler = staticmethod(samplers.gumbel_rao)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        num_samples: int = 10,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        static = {"num_samples": arg.as_num_samples(num_samples)}
        sd.OneHot.__init__(self, validate_args, static, logits=logits, probs=probs, tau=tau)


class ReinMaxRao(_StraightThrough):
    """Exact one-hot draws with a Rao-Blackwellized second-order gradient, see `relaxit_jax.reinmax_rao`.

    Backward ``2 J - J0 / 2``, where J is a mean over ``num_samples`` Gumbel vectors and J0 is the
    Jacobian of ``softmax(logits)``.

    Args:
      logits: unnormalized log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      num_samples: Gumbel vectors per draw, a Python integer, 1 or more.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelRao`.

    References:
      Wang, Bui (2026), arXiv:2603.08257.

    >>> ReinMaxRao(logits=jnp.zeros(3)).sample(jax.random.key(0)).sum()
    Array(1., dtype=float32)
    """

    tau: Array
    num_samples: int
    arg_constraints: dict[str, Any] = {"logits": ct.log_weights, "tau": constraints.positive}
    pytree_aux_fields: tuple[str, ...] = ("num_samples",)
    _sampler = staticmethod(samplers.reinmax_rao)

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike = 1.0,
        num_samples: int = 10,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        static = {"num_samples": arg.as_num_samples(num_samples)}
        sd.OneHot.__init__(self, validate_args, static, logits=logits, probs=probs, tau=tau)


# --- KL ---------------------------------------------------------------------------------------


@_kl.kl_rule((sd.OneHot, OneHotCategorical))
def _kl_of_classes(p, q):
    """The KL between the categoricals that the two stand for."""
    return samplers.categorical_kl(p.logits, q.logits)
