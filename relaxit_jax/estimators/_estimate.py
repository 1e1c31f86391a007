"""Shared parts of the estimators: the protocol of q, calling f, and a value with its own derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax._placement import where


@runtime_checkable
class Law(Protocol):
    """The part of a distribution that the score function needs. Its variables may depend on each other."""

    @property
    def logits(self) -> Array: ...
    @property
    def event_ndims(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def batch_shape(self) -> tuple[int, ...]: ...
    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array: ...
    def log_prob(self, sample: ArrayLike) -> Array: ...
    def outcomes(self) -> tuple[int, Callable[[Array], Array]]: ...


@runtime_checkable
class Family(Law, Protocol):
    """Independent variables, in the form the estimators use: `Bernoulli` and `OneHotCategorical`."""

    def score(self, sample: ArrayLike) -> Array: ...
    def log_masses(self, sample: ArrayLike) -> Array: ...
    def with_own_derivatives(self, gradient: Array) -> Array: ...
    def coupled(self, key: Array) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]: ...
    def relaxed(self, z: ArrayLike, tau: ArrayLike) -> Array: ...


class Antithetic(Family, Protocol):
    """A family with the draws that `arms` needs: `Bernoulli` and `OneHotCategorical`."""

    def antithetic_group(self, key: Array, n: int) -> tuple[Array, Array]: ...


class Bits(Antithetic, Protocol):
    """A family with the draws that `arm` and `disarm` need as well: `Bernoulli`."""

    def antithetic(self, key: Array) -> tuple[Array, Array, Array]: ...


Q = TypeVar("Q", bound=Law)
Estimator = Callable[[Array, Callable[[Array], ArrayLike], Q], ArrayLike]


def check(q, *, has_aux=False, kind=Family, **functions):
    """Check the arguments of every estimator: a family, and functions of its samples."""
    arg.require_flags(has_aux=has_aux)
    need = "a family of estimators, such as estimators.Bernoulli(logits) or "
    need += "estimators.OneHotCategorical(logits)"
    if kind is Family and isinstance(q, Law):
        need += "; subsets, orders, chains and trees work with reinforce, rloo and exact"
    arg.require(isinstance(q, kind), "q", need, arg.shown(q))
    for name, f in functions.items():
        arg.require(callable(f), name, f"a function of samples of shape {q.shape}", arg.shown(f))


def call(f, q, sample, name="f", *, has_aux=False, finite=True):
    """f of one sample, or of several that are stacked on a leading axis, and the aux of the first.

    Its shape and its values are checked; values that need not be finite may be -inf.
    """

    def checked(sample):
        result = f(sample)
        if not has_aux:
            return as_result(name, result), None
        pair = isinstance(result, tuple) and len(result) == 2
        need = "a function that returns (value, aux), because has_aux=True"
        arg.require(pair, name, need, f"a {type(result).__name__}")
        return as_result(name, result[0]), result[1]

    several = sample.ndim > len(q.shape)
    value, aux = (jax.vmap(checked) if several else checked)(sample)
    aux = jax.tree.map(lambda x: x[0], aux) if several else aux
    shape = value.shape[1:] if several else value.shape
    need = f"a function from samples of shape {q.shape} to values of the batch shape {q.batch_shape}"
    arg.require(shape == q.batch_shape, name, need, f"values of shape {shape}")
    if finite:
        arg.require_values(name, value, "finite for every draw", np.isfinite)
    else:
        arg.require_values(name, value, "finite, or -inf, for every draw", lambda x: x < np.inf)
    return value, aux


def with_aux(value, aux, has_aux):
    """The return value of an estimator."""
    return (value, aux) if has_aux else value


def as_result(name, value):
    """The value of a user's function, as an array of floats."""
    need = "a function with floating-point values"
    # a list or a tuple of arrays would become one array
    arg.require(jax.tree.structure(value) == jax.tree.structure(0), name, need, f"a {type(value).__name__}")
    value = arg.as_array(name, value, need)
    arg.require(arg.is_float(value.dtype), name, need, f"dtype {value.dtype}")
    return value


def per_event(x, q):
    """An array of the batch shape, broadcast against samples, in float32 or wider like the scores."""
    return x.reshape(x.shape + (1,) * q.event_ndims).astype(arg.wide(x.dtype))


def estimate(q, samples, values, gradient, parts, *, baselines=None, rest=None):
    """The mean of the values, whose gradient is `gradient` in the logits and the mean of their own in f.

    The gradient is a number for the draws that were made, but its mean depends on the logits, because the
    draws and the formula do. So it has derivatives of its own: the derivatives of the estimate that the same
    draws give at nearby logits. There each draw is weighted by the ratio of its probabilities there and here,
    and each element uses `Family.with_own_derivatives`. The mean of that estimate is exactly the gradient of
    E f at the nearby logits, so derivatives of every order are unbiased.

    Args:
      q: the family the draws come from.
      samples: the draws, stacked on a first axis, as are values, parts and baselines.
      values: f of each draw.
      gradient: an array in the shape of the logits; it is replaced by 0 at infinite logits.
      parts: these and `rest` add up to the gradient. Each is f of its draw times a factor for each variable
        that depends on the noise of this variable only.
      baselines: a guess for each value that does not depend on its draw, such as the mean of the others. It
        lowers the variance of derivatives in the parameters of f, then in the logits.
      rest: the remaining part of the gradient, whose mean is 0 at all logits.
    """
    return _estimate(q, samples, values, gradient, parts, baselines, rest)


def by_score(q, samples, values, baselines):
    """The mean of the values of draws from any law. Its gradient is the score times the gain over a baseline.

    A baseline may depend on all draws but its own. Each draw is weighted by the ratio of its probabilities at
    nearby parameters and here, so derivatives of every order are unbiased.
    """
    log_p = q.log_prob(samples)
    change = (likelihood_ratio(log_p) - 1) * (values - baselines).astype(log_p.dtype)  # 0, with derivatives
    mean = jnp.mean(values, 0)
    return mean + jnp.mean(change, 0).astype(mean.dtype)


@jax.custom_jvp
def _estimate(q, samples, values, gradient, parts, baselines, rest):
    return jnp.mean(values, 0)


@_estimate.defjvp
def _estimate_jvp(primals, tangents):
    q, samples, values, gradient, parts, baselines, rest = primals
    along, slopes = tangents[0].logits, tangents[2]
    ratios = likelihood_ratio(jnp.sum(q.log_masses(samples), _event(q))).astype(values.dtype)
    slopes = ratios * slopes if baselines is None else slopes + (ratios - 1) * (slopes - tangents[5])
    gradient = where(jnp.isinf(q.logits), 0, _nearby(gradient, q, samples, parts, rest))
    slope = jnp.sum(gradient * along.astype(gradient.dtype), _event(q))
    return _estimate(*primals), jnp.mean(slopes, 0) + slope.astype(values.dtype)


@jax.custom_jvp
def _nearby(gradient, q, samples, parts, rest):
    """The gradient, with the derivatives that `estimate` describes."""
    return gradient


@_nearby.defjvp
def _nearby_jvp(primals, tangents):
    def formula(_, q, samples, parts, rest):
        own = q.log_masses(samples)
        others = likelihood_ratio(jnp.sum(own, _event(q), keepdims=True) - own)
        total = jnp.sum(others * parts, 0)
        return q.with_own_derivatives(total if rest is None else total + rest)

    slope = jax.jvp(formula, primals, tangents)[1]
    return _nearby(*primals), slope.astype(primals[0].dtype)


@jax.custom_jvp
def likelihood_ratio(log_p: Array) -> Array:
    """P(draw) over P(draw) at the parameters of the draw, which is 1, with its derivatives of every order.

    J. Foerster et al. (2018), DiCE: The Infinitely Differentiable Monte Carlo Estimator, arXiv:1802.05098.
    """
    return jnp.ones_like(log_p)


@likelihood_ratio.defjvp
def _likelihood_ratio_jvp(primals, tangents):
    ratio = likelihood_ratio(*primals)
    return ratio, ratio * tangents[0]


def _event(q):
    return tuple(range(-q.event_ndims, 0))
