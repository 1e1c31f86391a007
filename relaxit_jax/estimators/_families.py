"""The distributions whose draws the estimators differentiate through."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _checks as ck
from relaxit_jax import _numerics as nm
from relaxit_jax.estimators import _base as base


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Variables:
    """Independent variables, a pytree of their logits; a sample has the shape of these."""

    logits: Array
    event_ndims: int

    def __init_subclass__(cls) -> None:
        def unflatten(event_ndims, leaves):  # unchecked: JAX puts placeholders into pytrees
            q = object.__new__(cls)
            object.__setattr__(q, "logits", leaves[0])
            object.__setattr__(q, "event_ndims", event_ndims)
            return q

        jax.tree_util.register_pytree_node(cls, lambda q: ((q.logits,), q.event_ndims), unflatten)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return self.logits.shape

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of what f returns."""
        return self.shape[: len(self.shape) - self.event_ndims]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one event: all that f takes together."""
        return self.shape[len(self.shape) - self.event_ndims :]

    def _set(self, logits, event_ndims, least):
        """Both fields, once everything about them that can be known is checked."""
        logits = ck.as_float("logits", logits)
        ndims = ck.as_static_int("event_ndims", event_ndims, least, logits.ndim)
        event = logits.shape[logits.ndim - ndims :]
        ck.require(math.prod(event) > 0, "logits", "of one variable at least", f"events of shape {event}")
        ck.require_values("logits", logits, "numbers, not NaN", lambda x: x == x)
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "event_ndims", ndims)

    def _checked(self, sample):
        """A draw, or several of them stacked on leading axes, as an array."""
        sample = ck.as_number("sample", sample)
        fits = ck.broadcasts_to(self.shape, sample.shape)
        ck.require(fits, "sample", f"of shape {self.shape}, or several of them", f"shape {sample.shape}")
        return sample

    def _over_event(self, log_masses):
        return jnp.sum(log_masses, tuple(range(-self.event_ndims, 0)))

    def _wide(self):
        return self.logits.astype(ck.wide(self.logits.dtype))

    def _as_sample(self, booleans):
        return jax.lax.stop_gradient(booleans.astype(self.logits.dtype))


class Bernoulli(Variables):
    """Independent bits, for the estimators.

    ``P(b = 1) = sigmoid(logits)``.

    Args:
      logits: log-odds, of the shape of a sample.
      event_ndims: how many of the last axes belong to one call of f; those before are the batch.

    Raises:
      ValueError: for logits that are not floating point, NaN or of no variable, or more
        ``event_ndims`` than axes.

    References:
      R. J. Williams (1992), Simple statistical gradient-following algorithms for connectionist
      reinforcement learning, Machine Learning 8.

    >>> Bernoulli(jnp.zeros((5, 3))).batch_shape
    (5,)
    """

    def __init__(self, logits: ArrayLike, event_ndims: int = 1) -> None:
        self._set(logits, event_ndims, 0)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        ck.check_key(key)
        shape = ck.as_shape("shape", shape)
        p, q = self._probabilities()
        return self._as_sample(nm.bernoulli(key, p, q, (*shape, *self.shape)))

    def score(self, sample: ArrayLike) -> Array:
        """The gradient of log P(sample) in the logits, b - p, without its cancellation."""
        p, q = self._probabilities()
        return nm.where(self._checked(sample) != 0, q, -p)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        return self._over_event(self.log_masses(sample))

    def log_masses(self, sample: ArrayLike) -> Array:
        """log P of each bit's own value."""
        logits = self._wide()
        return jax.nn.log_sigmoid(nm.where(self._checked(sample) != 0, logits, -logits))

    def with_own_derivatives(self, gradient: Array) -> Array:
        """A gradient of E f, with its derivatives in each bit's own logit.

        E f is linear in the probability p of a bit. So its gradient is p'(l) times a factor without l.
        """
        return gradient * base.likelihood_ratio(nm.log_logistic_pdf(self._wide()))

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """How many events there are, and a function from some of their numbers to the events."""
        n = math.prod(self.event_shape)
        digits = lambda index: (index[:, None] >> jnp.arange(n)) & 1
        return 2**n, lambda index: digits(index).reshape(-1, *self.event_shape).astype(self.logits.dtype)

    def coupled(self, key: Array) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
        """Noisy logits z with b = 1[z > 0], and z drawn again given b; as functions of the logits.

        With V logistic, ``z~ = softplus(V + softplus(l))`` given a one and ``-softplus(V + softplus(-l))``
        given a zero, which are l + logit u' of Tucker et al. (2017) without a probability to round.
        """
        ck.check_key(key)
        noise_key, again_key = jax.random.split(key)
        logits, softplus = self._wide(), jax.nn.softplus
        noise = nm.logistic(noise_key, self.shape, logits)
        v = nm.logistic(again_key, self.shape, logits)
        one = logits + noise > 0
        sign = nm.where(one, 1, -1)
        return (
            self._as_sample(one),
            lambda l: l + noise,
            lambda l: sign * softplus(v + softplus(sign * l)),
        )

    def relaxed(self, z: ArrayLike, tau: ArrayLike) -> Array:
        """The relaxed sample of noisy logits."""
        return jax.nn.sigmoid(jnp.asarray(z) / tau).astype(self.logits.dtype)

    def antithetic(self, key: Array) -> tuple[Array, Array, Array]:
        """The draws 1[1 - u < p] and 1[u < p] of one uniform u, and u - 1/2."""
        ck.check_key(key)
        p, q = self._probabilities()
        r = nm.tail_uniform(key, self.shape, p)  # of u; that of 1 - u is -r
        below = lambda r: nm.where(r < 0, -r > q, r < p)
        return self._as_sample(below(-r)), self._as_sample(below(r)), nm.where(r < 0, r + 0.5, r - 0.5)

    def _probabilities(self):
        logits = jax.lax.stop_gradient(self._wide())
        return jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)


class OneHotCategorical(Variables):
    """Independent categorical variables as one-hot vectors, for the estimators.

    ``P(b = e_k) = softmax(logits)_k`` on the last axis.

    Args:
      logits: unnormalised log-probabilities, of the shape of a sample, the classes last; -inf is an
        impossible class.
      event_ndims: how many of the last axes belong to one call of f, that of the classes among them;
        those before are the batch.

    Raises:
      ValueError: for logits that are not floating point, NaN, all -inf or of no variable, or more
        ``event_ndims`` than axes.

    References:
      R. J. Williams (1992), Machine Learning 8.

    >>> OneHotCategorical(jnp.zeros((5, 3, 10))).batch_shape
    (5,)
    """

    def __init__(self, logits: ArrayLike, event_ndims: int = 2) -> None:
        self._set(logits, event_ndims, 1)
        ck.require_classes(self.logits)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        ck.check_key(key)
        shape = ck.as_shape("shape", shape)
        return self._as_sample(nm.one_hot_draw(key, self._probabilities(), (*shape, *self.shape[:-1])))

    def score(self, sample: ArrayLike) -> Array:
        """The gradient of log P(sample) in the logits, b - p, without its cancellation."""
        p, drawn = self._probabilities(), self._checked(sample) != 0
        return nm.where(drawn, jnp.sum(nm.where(drawn, 0, p), -1, keepdims=True), -p)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        return self._over_event(self.log_masses(sample))

    def log_masses(self, sample: ArrayLike) -> Array:
        """log P of each variable's own class; the last axis has one element."""
        return jnp.sum(nm.where(self._checked(sample) != 0, self._log_probabilities(), 0), -1, keepdims=True)

    def with_own_derivatives(self, gradient: Array) -> Array:
        """A gradient of E f, with its derivatives in each variable's own logits.

        E f is linear in the probabilities p of a variable. So its gradient is p_k (a_k - sum_j p_j a_j) with
        factors a without the logits. A constant in a drops out, so p_k a_k may be the gradient itself where
        the draw was made.
        """
        log_p = self._log_probabilities()
        scaled = gradient * base.likelihood_ratio(log_p)
        return scaled - jnp.exp(log_p) * jnp.sum(scaled, -1, keepdims=True)

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """How many events there are, and a function from some of their numbers to the events."""
        *variables, k = self.event_shape
        n = math.prod(variables)
        powers = np.array([k**i for i in range(n)], dtype=object)
        total = k**n

        def events(index):
            digits = jnp.stack([index // int(power) % k for power in powers], -1)
            return jax.nn.one_hot(digits, k, dtype=self.logits.dtype).reshape(-1, *self.event_shape)

        return total, events

    def coupled(self, key: Array) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
        """Noisy logits z with b their argmax, and z drawn again given b; as functions of the logits.

        The logits are normalised first: the largest of z~ is then a Gumbel number whatever b is.
        """
        ck.check_key(key)
        noise_key, again_key = jax.random.split(key)
        log_p = jax.nn.log_softmax(self._wide())
        noise = nm.gumbel(noise_key, self.shape, log_p)
        winner = nm.largest(log_p + noise)

        def again(l):
            top, gap = nm.conditional_gumbel(again_key, jax.nn.log_softmax(l), winner)
            return top + gap

        return self._as_sample(winner), lambda l: jax.nn.log_softmax(l) + noise, again

    def relaxed(self, z: ArrayLike, tau: ArrayLike) -> Array:
        """The relaxed sample of noisy logits."""
        return jax.nn.softmax(nm.over_tau(z, tau)).astype(self.logits.dtype)

    def _probabilities(self):
        return jax.nn.softmax(jax.lax.stop_gradient(self._wide()))

    def _log_probabilities(self):
        """log softmax; jax.nn.log_softmax rounds that of a class that is nearly sure to 0."""
        logits = self._wide()
        first = nm.largest(logits)
        below = nm.where(first, 0, logits - jnp.sum(nm.where(first, logits, 0), -1, keepdims=True))
        return below - jnp.log1p(jnp.sum(nm.where(first, 0, jnp.exp(below)), -1, keepdims=True))
