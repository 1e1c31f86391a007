"""One-hot vectors and points of the simplex as NumPyro distributions."""

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from relaxit_jax import _checks as ck
from relaxit_jax import samplers
from relaxit_jax.distributions import _base as base


class OneHotCategorical(base.OneHot):
    """The categorical distribution over one-hot vectors: exact draws, no gradient through them.

    ``P(z = e_k) = softmax(logits)_k``.

    Args:
      logits: unnormalised log-probabilities, shape (..., K); -inf is an impossible class.
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

    arg_constraints = {"logits": base.log_weights}
    support = base.one_hot
    has_enumerate_support = True

    def __init__(self, logits=None, *, probs=None, validate_args=None):
        super().__init__(validate_args, logits=base.class_logits(logits, probs))

    @staticmethod
    def _sampler(key, logits, *, shape):
        return jax.lax.stop_gradient(samplers.gumbel_softmax(key, logits, 1.0, shape=shape, hard=True))

    @staticmethod
    def _density(value, logits, **_):
        log_pmf = base.log_pmf_of_classes(logits)
        value = jnp.asarray(value).astype(log_pmf.dtype)
        ck.require_event("value", value)
        ck.require_same_event(value, logits)
        chosen = value != 0  # 0 log 0 is 0
        law = jnp.sum(jnp.where(chosen, value * jnp.where(chosen, log_pmf, 0), 0), -1)
        return jnp.where(base.one_hot(value), law, -jnp.inf)

    @property
    def mean(self):
        return self._full(self.probs)

    @property
    def variance(self):
        return self._full(self.probs * (1 - self.probs))

    @property
    def mode(self):
        best = jnp.argmax(self.logits, -1)
        return self._full(jax.nn.one_hot(best, self.event_shape[0], dtype=self.logits.dtype))

    def entropy(self):
        log_pmf = base.log_pmf_of_classes(self.logits)
        return self._batched(-base.expected_log_pmf(log_pmf, log_pmf))

    def enumerate_support(self, expand=True):
        (k,) = self.event_shape
        values = jnp.eye(k, dtype=self.logits.dtype).reshape(k, *(1,) * len(self.batch_shape), k)
        return jnp.broadcast_to(values, (k, *self.batch_shape, k)) if expand else values


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

    >>> GumbelSoftmax(jnp.zeros(3), 0.5).sample(jax.random.key(0)).sum().round(5)
    Array(1., dtype=float32)
    """

    arg_constraints = {"logits": base.log_weights, "tau": constraints.positive}
    support = base.simplex
    _sampler = staticmethod(samplers.gumbel_softmax)
    _density = staticmethod(samplers.gumbel_softmax_log_prob)
    _log_space = "log"

    def __init__(self, logits=None, tau=None, *, probs=None, validate_args=None):
        super().__init__(validate_args, logits=base.class_logits(logits, probs), tau=tau)


class StraightThroughGumbelSoftmax(OneHotCategorical):
    """Exact one-hot draws with the gradient of `GumbelSoftmax`.

    Forward ``one_hot(argmax(logits + G))``, backward that of ``softmax((logits + G) / tau)``. The
    support is the simplex, so that NumPyro takes the draws as differentiable.

    Args:
      logits: unnormalised log-probabilities, shape (..., K); -inf is an impossible class.
      tau: temperature of the gradient, positive, of the batch shape.
      probs: probabilities, shape (..., K), instead of ``logits``.
      validate_args: as in NumPyro.

    Raises:
      ValueError: as for `GumbelSoftmax`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> StraightThroughGumbelSoftmax(jnp.zeros(3), 0.5).sample(jax.random.key(0))
    Array([0., 1., 0.], dtype=float32)
    """

    arg_constraints = {"logits": base.log_weights, "tau": constraints.positive}
    support = base.simplex

    @staticmethod
    def _sampler(key, logits, tau, *, shape):
        return samplers.gumbel_softmax(key, logits, tau, shape=shape, hard=True)

    def __init__(self, logits=None, tau=None, *, probs=None, validate_args=None):
        logits = base.class_logits(logits, probs)
        base.OneHot.__init__(self, validate_args, logits=logits, tau=tau)


def RelaxedOneHotCategorical(temperature, probs=None, logits=None, *, validate_args=None):
    """`GumbelSoftmax` with Pyro's signature.

    >>> RelaxedOneHotCategorical(0.5, logits=jnp.zeros(3)).event_shape
    (3,)
    """
    return GumbelSoftmax(logits, temperature, probs=probs, validate_args=validate_args)


def RelaxedOneHotCategoricalStraightThrough(temperature, probs=None, logits=None, *, validate_args=None):
    """`StraightThroughGumbelSoftmax` with Pyro's signature.

    >>> RelaxedOneHotCategoricalStraightThrough(0.5, logits=jnp.zeros(3)).event_shape
    (3,)
    """
    return StraightThroughGumbelSoftmax(logits, temperature, probs=probs, validate_args=validate_args)


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

    >>> InvertibleGaussian(jnp.zeros(2), jnp.ones(2), 0.5).event_shape
    (3,)
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "tau": constraints.positive,
        "delta": constraints.positive,
    }
    support = base.simplex
    _sampler = staticmethod(samplers.invertible_gaussian)
    _density = staticmethod(samplers.invertible_gaussian_log_prob)
    _log_space = "log"
    _per_coordinate = ("scale",)
    _event = staticmethod(lambda shapes: (shapes["loc"][-1] + 1,))

    def __init__(self, loc, scale, tau, *, delta=1.0, validate_args=None):
        scale = base.per_coordinate(scale, loc)
        super().__init__(validate_args, loc=loc, scale=scale, tau=tau, delta=delta)


# --- KL ---------------------------------------------------------------------------------------


@base.kl_rule((OneHotCategorical, OneHotCategorical), (GumbelSoftmax, OneHotCategorical))
def _kl_of_classes(p, q):
    """The KL of the categoricals that the two stand for."""
    return base.discrete_kl(base.log_pmf_of_classes(p.logits), base.log_pmf_of_classes(q.logits))


@base.kl_rule((InvertibleGaussian, InvertibleGaussian))
def _kl_of_invertible_gaussians(p, q):
    """That of the Gaussians, if both are mapped to the simplex alike."""
    _, loc, other_loc, scale, other = ck.widen(a=p.loc, b=q.loc, c=p.scale, d=q.scale)
    ratio = scale / other
    # ratio^2 - 1 - log ratio^2 without its cancellation near 1
    excess = (ratio - 1) * (ratio + 1) - 2 * jnp.log(ratio)
    kl = jnp.sum(((loc - other_loc) / other) ** 2 + excess, -1) / 2
    return base.only_at_equal("delta", p, q, base.only_at_equal("tau", p, q, kl))
