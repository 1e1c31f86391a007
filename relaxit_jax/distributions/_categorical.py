"""Points of the simplex as NumPyro distributions."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
from relaxit_jax import samplers
from relaxit_jax.distributions import _base as base


class GumbelSoftmax(base.OneHot):
    """The Concrete distribution on the simplex, `relaxit_jax.gumbel_softmax`.

    ``z = softmax((logits + G) / tau)``, G standard Gumbel.

    Args:
      logits: unnormalised log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `OneHotCategorical`, for no ``tau``, or for shapes that do not broadcast.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> GumbelSoftmax(logits=jnp.zeros(3), tau=0.5).sample(jax.random.key(0)).sum().round(5)
    Array(1., dtype=float32)
    """

    tau: Array
    arg_constraints: dict[str, Any] = {"logits": base.log_weights, "tau": constraints.positive}
    support: base.Constraint = base.simplex
    _sampler = staticmethod(samplers.gumbel_softmax)
    _density = staticmethod(samplers.gumbel_softmax_log_prob)
    _log_space = "log"

    def __init__(
        self,
        *,
        logits: ArrayLike | None = None,
        tau: ArrayLike | None = None,
        probs: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, probs=probs, tau=tau)


def RelaxedOneHotCategorical(
    temperature: ArrayLike,
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    *,
    validate_args: bool | None = None,
) -> GumbelSoftmax:
    """`GumbelSoftmax` with Pyro's signature.

    >>> RelaxedOneHotCategorical(0.5, logits=jnp.zeros(3)).event_shape
    (3,)
    """
    base.check_temperature(temperature, validate_args)
    return GumbelSoftmax(logits=logits, tau=temperature, probs=probs, validate_args=validate_args)


class InvertibleGaussian(base.SamplerDistribution):
    """Softmax++ of a Gaussian, `relaxit_jax.invertible_gaussian`.

    ``z_k = exp(y_k / tau) / (sum_j exp(y_j / tau) + delta)`` for k < K, ``y ~ N(loc, scale^2)``.

    Args:
      loc: means, shape (..., K - 1).
      scale: standard deviations, positive, broadcasting against ``loc``.
      tau: temperature, positive, of the batch shape.
      delta: weight of the last class, positive, of the batch shape.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for shapes that do not broadcast or, if validated, values outside their ranges.

    References:
      A. Potapczynski, G. Loaiza-Ganem, J. P. Cunningham (2020), arXiv:1912.09588.

    >>> InvertibleGaussian(loc=jnp.zeros(2), scale=jnp.ones(2), tau=0.5).event_shape
    (3,)
    """

    loc: Array
    scale: Array
    tau: Array
    delta: Array
    arg_constraints: dict[str, Any] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "tau": constraints.positive,
        "delta": constraints.positive,
    }
    support: base.Constraint = base.simplex
    _sampler = staticmethod(samplers.invertible_gaussian)
    _density = staticmethod(samplers.invertible_gaussian_log_prob)
    _log_space = "log"
    _per_coordinate = ("scale",)
    _event = staticmethod(lambda shapes: (shapes["loc"][-1] + 1,))

    def __init__(
        self,
        *,
        loc: ArrayLike,
        scale: ArrayLike,
        tau: ArrayLike,
        delta: ArrayLike = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, loc=loc, scale=scale, tau=tau, delta=delta)


# --- KL ---------------------------------------------------------------------------------------


@base.kl_rule((InvertibleGaussian, InvertibleGaussian))
def _kl_of_invertible_gaussians(p, q):
    """The KL of the Gaussian log-ratios, ``log z_k - log z_K``."""
    _, loc, other_loc, scale, other = ck.widen(a=p.loc, b=q.loc, c=p.scale, d=q.scale)
    if not (base.known_equal("tau", p, q) and base.known_equal("delta", p, q)):
        (loc, scale), (other_loc, other) = (
            (loc / d.tau[..., None] - jnp.log(d.delta)[..., None], scale / d.tau[..., None])
            for d, loc, scale in ((p, loc, scale), (q, other_loc, other))
        )
    ratio = scale / other
    # ratio^2 - 1 - log ratio^2 without its cancellation near 1
    excess = (ratio - 1) * (ratio + 1) - 2 * jnp.log(ratio)
    return jnp.sum(((loc - other_loc) / other) ** 2 + excess, -1) / 2
