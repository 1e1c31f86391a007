"""Distributions whose draws the estimators differentiate through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import _random as rng
from relaxit_jax._placement import where
from relaxit_jax.estimators import _estimate as es


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Variables:
    """Variables as a pytree of their parameters. A sample has the shape of the logits."""

    logits: Array
    event_ndims: int
    _arrays: ClassVar[tuple[str, ...]] = ("logits",)

    def __init_subclass__(cls) -> None:
        names = cls._arrays

        def flatten(q):
            others = tuple((name, x) for name, x in vars(q).items() if name not in names)
            return tuple(getattr(q, name) for name in names), others

        def unflatten(others, leaves):  # unchecked: JAX puts placeholders into pytrees
            q = object.__new__(cls)
            for name, x in (*zip(names, leaves, strict=True), *others):
                object.__setattr__(q, name, x)
            return q

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return self.logits.shape

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the values that f returns."""
        return self.logits.shape[: self.logits.ndim - self.event_ndims]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one event, which f takes together."""
        return self.shape[len(self.batch_shape) :]

    def with_logits(self, logits: ArrayLike) -> Variables:
        """The same with other logits."""
        return type(self)(logits, self.event_ndims)  # type: ignore[call-arg]

    def _set(self, logits, event_ndims, least):
        """Set both fields after checking everything about them that can be known."""
        logits = arg.as_float("logits", logits)
        ndims = arg.as_static_int("event_ndims", event_ndims, least, logits.ndim)
        event = logits.shape[logits.ndim - ndims :]
        arg.require(math.prod(event) > 0, "logits", "of one variable at least", f"events of shape {event}")
        arg.require_values("logits", logits, "numbers, not NaN", lambda x: x == x)
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "event_ndims", ndims)

    def _checked(self, sample):
        """A draw, or several draws stacked on leading axes, as an array."""
        sample = arg.as_number("sample", sample)
        fits = arg.broadcasts_to(self.shape, sample.shape)
        arg.require(fits, "sample", f"of shape {self.shape}, or several of them", f"shape {sample.shape}")
        return sample

    def _over_event(self, log_masses):
        return jnp.sum(log_masses, tuple(range(-self.event_ndims, 0)))

    def _wide(self):
        return self.logits.astype(arg.wide(self.logits.dtype))

    def _as_sample(self, booleans):
        return jax.lax.stop_gradient(booleans.astype(self.logits.dtype))


class Bernoulli(Variables):
    """Independent bits, for the estimators.

    ``P(b = 1) = sigmoid(logits)``.

    Args:
      logits: log-odds, with the shape of a sample.
      event_ndims: how many of the last axes belong to one call of f; the axes before them are the batch.

    Raises:
      ValueError: for logits that are not floating point, contain NaN or have no elements, or for more
        ``event_ndims`` than axes.

    References:
      R. J. Williams (1992), Simple statistical gradient-following algorithms for connectionist
      reinforcement learning, Machine Learning 8.

    >>> Bernoulli(jnp.zeros((5, 3))).batch_shape
    (5,)
    >>> q = Bernoulli(jnp.log(jnp.array([1.0, 3.0])))
    >>> mean = jax.jit(lambda key: q.sample(key, (100_000,)).mean(0))
    >>> mean(jax.random.key(0)).round(2)
    Array([0.5 , 0.75], dtype=float32)
    >>> jnp.exp(q.log_prob(jnp.ones(2)))
    Array(0.375, dtype=float32)
    """

    def __init__(self, logits: ArrayLike, event_ndims: int = 1) -> None:
        self._set(logits, event_ndims, 0)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        arg.check_key(key)
        shape = arg.as_shape("shape", shape)
        p, q = self._probabilities()
        return self._as_sample(rng.bernoulli(key, p, q, (*shape, *self.shape)))

    def score(self, sample: ArrayLike) -> Array:
        """The gradient of log P(sample) in the logits, b - p, computed without cancellation."""
        p, q = self._probabilities()
        return where(self._checked(sample) != 0, q, -p)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        return self._over_event(self.log_masses(sample))

    def log_masses(self, sample: ArrayLike) -> Array:
        """log P for each bit's own value."""
        logits = self._wide()
        return jax.nn.log_sigmoid(where(self._checked(sample) != 0, logits, -logits))

    def with_own_derivatives(self, gradient: Array) -> Array:
        """A gradient of E f, with its derivatives in each bit's own logit.

        E f is linear in the probability p of a bit, so its gradient is p'(l) times a factor that does not
        depend on l.
        """
        return gradient * es.likelihood_ratio(lm.log_logistic_pdf(self._wide()))

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """The number of events, and a function that maps their indices to the events."""
        n = math.prod(self.event_shape)
        digits = lambda index: (index[:, None] >> jnp.arange(n)) & 1
        return 2**n, lambda index: digits(index).reshape(-1, *self.event_shape).astype(self.logits.dtype)

    def coupled(self, key: Array) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
        """Noisy logits z with b = 1[z > 0], and z drawn again given b, both as functions of the logits.

        With V logistic, ``z~ = softplus(V + softplus(l))`` given a one and ``-softplus(V + softplus(-l))``
        given a zero. This equals l + logit u' of Tucker et al. (2017) without a probability to round.
        """
        arg.check_key(key)
        noise_key, again_key = jax.random.split(key)
        logits, softplus = self._wide(), jax.nn.softplus
        noise = rng.logistic(noise_key, self.shape, logits)
        v = rng.logistic(again_key, self.shape, logits)
        one = logits + noise > 0
        sign = where(one, 1, -1)
        return (
            self._as_sample(one),
            lambda l: l + noise,
            lambda l: sign * softplus(v + softplus(sign * l)),
        )

    def relaxed(self, z: ArrayLike, tau: ArrayLike) -> Array:
        """The relaxed sample for noisy logits."""
        return jax.nn.sigmoid(jnp.asarray(z) / tau).astype(self.logits.dtype)

    def antithetic(self, key: Array) -> tuple[Array, Array, Array]:
        """The draws 1[1 - u < p] and 1[u < p] from one uniform u, and u - 1/2."""
        arg.check_key(key)
        p, q = self._probabilities()
        r = rng.tail_uniform(key, self.shape, p)  # for u; for 1 - u it is -r
        below = lambda r: where(r < 0, -r > q, r < p)
        return self._as_sample(below(-r)), self._as_sample(below(r)), where(r < 0, r + 0.5, r - 0.5)

    def antithetic_group(self, key: Array, n: int) -> tuple[Array, Array]:
        """n draws that repel each other, and the factor of each in the estimate of `arms`."""
        logits = jax.lax.stop_gradient(self._wide())
        e = rng.exponential(key, (n, *self.shape), logits)
        drawn, spread = _repelling(e, lm.sum_of_others(e), n - 1, logits)
        bits = drawn.astype(logits.dtype)
        return self._as_sample(drawn), (bits - jnp.mean(bits, 0)) / ((n - 1) * spread)

    def _probabilities(self):
        logits = jax.lax.stop_gradient(self._wide())
        return jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)


class OneHotCategorical(Variables):
    """Independent categorical variables as one-hot vectors, for the estimators.

    ``P(b = e_k) = softmax(logits)_k`` on the last axis.

    Args:
      logits: unnormalized log-probabilities, with the shape of a sample and the classes last; -inf is an
        impossible class.
      event_ndims: how many of the last axes belong to one call of f, including the axis of the classes; the
        axes before them are the batch.

    Raises:
      ValueError: for logits that are not floating point, contain NaN, are all -inf or have no elements, or
        for more ``event_ndims`` than axes.

    References:
      R. J. Williams (1992), Machine Learning 8.

    >>> OneHotCategorical(jnp.zeros((5, 3, 10))).batch_shape
    (5,)
    >>> q = OneHotCategorical(jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]])))
    >>> mean = jax.jit(lambda key: q.sample(key, (100_000,)).mean(0))
    >>> mean(jax.random.key(0)).round(2)
    Array([[0.25, 0.75],
           [0.5 , 0.5 ]], dtype=float32)
    >>> jnp.exp(q.log_prob(jnp.array([[0.0, 1.0], [1.0, 0.0]])))
    Array(0.375, dtype=float32)
    """

    def __init__(self, logits: ArrayLike, event_ndims: int = 2) -> None:
        self._set(logits, event_ndims, 1)
        arg.require_classes(self.logits)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        arg.check_key(key)
        shape = arg.as_shape("shape", shape)
        index = rng.categorical(key, self._wide(), (*shape, *self.shape[:-1]))
        return self._as_sample(lm.is_class(index, self.logits))

    def score(self, sample: ArrayLike) -> Array:
        """The gradient of log P(sample) in the logits, b - p, computed without cancellation."""
        p, drawn = self._probabilities(), self._checked(sample) != 0
        return where(drawn, jnp.sum(where(drawn, 0, p), -1, keepdims=True), -p)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        return self._over_event(self.log_masses(sample))

    def log_masses(self, sample: ArrayLike) -> Array:
        """log P for each variable's own class; the last axis has one element."""
        return jnp.sum(where(self._checked(sample) != 0, self._log_probabilities(), 0), -1, keepdims=True)

    def with_own_derivatives(self, gradient: Array) -> Array:
        """A gradient of E f, with its derivatives in each variable's own logits.

        E f is linear in the probabilities p of a variable, so its gradient is p_k (a_k - sum_j p_j a_j) with
        factors a that do not depend on the logits. A constant in a drops out, so p_k a_k may be the gradient
        itself at the parameters of the draw.
        """
        log_p = self._log_probabilities()
        scaled = gradient * es.likelihood_ratio(log_p)
        return scaled - jnp.exp(log_p) * jnp.sum(scaled, -1, keepdims=True)

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """The number of events, and a function that maps their indices to the events."""
        *variables, k = self.event_shape
        n = math.prod(variables)
        powers = np.array([k**i for i in range(n)], dtype=object)
        total = k**n

        def events(index):
            digits = jnp.stack([index // int(power) % k for power in powers], -1)
            return jax.nn.one_hot(digits, k, dtype=self.logits.dtype).reshape(-1, *self.event_shape)

        return total, events

    def coupled(self, key: Array) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
        """Noisy logits z with b as their argmax, and z drawn again given b, both as functions of the logits.

        The logits are normalized first, so the largest entry of z~ is a Gumbel variable whatever b is.
        """
        arg.check_key(key)
        noise_key, again_key = jax.random.split(key)
        log_p = jax.nn.log_softmax(self._wide())
        noise = rng.gumbel(noise_key, self.shape, log_p)
        winner = lm.largest(log_p + noise)

        def again(l):
            top, gap = rng.conditional_gumbel(again_key, jax.nn.log_softmax(l), winner)
            return top + gap

        return self._as_sample(winner), lambda l: jax.nn.log_softmax(l) + noise, again

    def relaxed(self, z: ArrayLike, tau: ArrayLike) -> Array:
        """The relaxed sample for noisy logits."""
        return jax.nn.softmax(lm.over_tau(z, tau)).astype(self.logits.dtype)

    def antithetic_group(self, key: Array, n: int) -> tuple[Array, Array]:
        """n draws that repel each other, and the factor of each in the estimate of `arms`.

        A class is drawn through its binary digits, the lowest first. The m draws that agree so far repel
        each other in the next digit, just as m draws of a bit do.
        """
        log_p = jax.lax.stop_gradient(self._log_probabilities())
        *variables, k = self.shape
        classes, depth = np.arange(k, dtype=np.int32), (k - 1).bit_length()
        padding = [(0, 0)] * len(variables) + [(0, 2**depth - k)]
        leaves = jnp.pad(log_p, padding, constant_values=-jnp.inf)
        noise = rng.exponential(key, (depth, n, *variables), log_p)
        itself = np.eye(n, dtype=bool).reshape(n, n, *(1 for _ in variables))
        prefix = jnp.zeros((n, *variables, 1), jnp.int32)  # the digits so far, as a number
        correction = jnp.zeros((n, *self.shape), log_p.dtype)
        for level, e in enumerate(noise):
            sides = jax.nn.logsumexp(leaves.reshape(*variables, -1, 2, 2**level), -3)
            here = lm.is_class(prefix, sides[..., 0, :])
            zero, one = (jnp.sum(where(here, sides[..., digit, :], 0), -1) for digit in (0, 1))
            others = jnp.squeeze(prefix[:, None] == prefix, -1) & ~itself
            e_others = jnp.sum(where(others, e, 0), 1)
            m = jnp.sum(others, 1, dtype=log_p.dtype)
            drawn, spread = _repelling(e, e_others, m, one - zero)
            bit = drawn.astype(log_p.dtype)
            gain = jnp.sum(where(others, bit[:, None] - bit, 0), 1) * (1 - spread) / spread
            # the derivative of log_odds in the logits: each class's share of its side
            side = jnp.tile(sides.reshape(*variables, -1), 2 ** (depth - level - 1))[..., :k]
            share = where(side > -jnp.inf, jnp.exp(log_p - side), 0)
            share = where(classes >> level & 1 > 0, share, -share)
            correction += where(prefix == classes % 2**level, gain[..., None] * share, 0)
            prefix += where(drawn, 2**level, 0)[..., None]
        draws = self._as_sample(prefix == classes)
        score = self.score(draws)
        return draws, (score - jnp.mean(score, 0)) / (n - 1) + correction / (n * (n - 1))

    def _probabilities(self):
        return jax.nn.softmax(jax.lax.stop_gradient(self._wide()))

    def _log_probabilities(self):
        """log softmax; jax.nn.log_softmax would round it to 0 for a class that is nearly certain."""
        logits = self._wide()
        first = lm.largest(logits)
        below = where(first, 0, logits - jnp.sum(where(first, logits, 0), -1, keepdims=True))
        return below - jnp.log1p(jnp.sum(where(first, 0, jnp.exp(below)), -1, keepdims=True))


def _repelling(e, others, m, logits):
    """Bits from draws that repel each other, and 1 - rho for two of them.

    Each draw has an exponential variable e, and `others` sums the m other ones. The rarer value comes where
    ``1 - d_i = sum_(j != i) e_j / sum_j e_j`` is below ``s = r^(1/m) = exp(-t)``: that is, where the sum of
    the others is below e_i / (e^t - 1), in which nothing is subtracted. And ``2 - 1/s`` is 1 minus e^t - 1.
    A draw without others is independent.
    """
    surprise = jax.nn.softplus(jnp.abs(logits))  # -log r
    at_least_one = jnp.maximum(m, 1)
    excess = jnp.expm1(surprise / at_least_one)  # e^t - 1
    rare = where(m > 0, others * excess < e, surprise < e)
    both = where(excess < 1, jnp.log1p(-where(excess < 1, excess, 0)), -jnp.inf)
    spread = -jnp.expm1(at_least_one * both) / jax.nn.sigmoid(jnp.abs(logits))
    return where(logits > 0, ~rare, rare), spread
