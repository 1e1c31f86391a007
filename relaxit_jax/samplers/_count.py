"""Relaxed counts and other numbers from a finite list of values.

A count without a largest value is truncated: `poisson_support` and the other supports return the logits and
the values of a finite list, which you pass to `generalized_gumbel_softmax`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import log_sigmoid
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _random as rng
from relaxit_jax._placement import where

MOST_VALUES = 10_000


def generalized_gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    values: ArrayLike,
    tau: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
    hard: bool = False,
) -> Array:
    """Sample a relaxed count, or another number from a finite list (generalized Gumbel-softmax).

    ``w = softmax((logits + G) / tau)``, with G standard Gumbel noise; ``z = sum_k w_k values_k``. Counts
    without a largest value (Poisson, geometric) are truncated first, at a point where the mass left out no
    longer matters.

    Args:
      key: a JAX random key.
      logits: unnormalized log-probabilities of the values, shape (..., K); -inf is an impossible
        value.
      values: the K finite numbers, shape (..., K), in the units of the quantity they count.
      tau: temperature, positive, of the batch shape (no axis for K).
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return the value at ``argmax(logits + G)``, an exact draw, with the gradient of z. Without it,
        the mean of z equals the mean of the values only as tau goes to 0: at tau = 0.5 it is 5 % too low for
        a geometric count of mean 4, and 0.3 % for a Poisson count of mean 7.5.

    Returns:
      Numbers of shape ``shape``, between the smallest and the largest value, in the promoted dtype of
      ``logits`` and ``values``.

    Raises:
      ValueError: for a ``tau`` that is not positive or has an axis for K, a dtype that is not
        floating point, logits without a class axis or all -inf, ``values`` that are not finite or
        not as many as the logits, or a ``shape`` the parameters do not broadcast to.

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), Generalized Gumbel-Softmax Gradient Estimator for
      Generic Discrete Random Variables, arXiv:2003.01847.

    >>> logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    >>> generalized_gumbel_softmax(jax.random.key(0), logits, jnp.arange(3.0), 0.1, hard=True)
    Array(1., dtype=float32)
    """
    arg.check_key(key)
    arg.require_flags(hard=hard)
    arg.require_classes(logits)
    arg.require_event("values", values)
    arg.require_values("values", values, "finite", np.isfinite)
    dtype, logits, values = arg.widen(logits=logits, values=values)
    classes = logits.shape[-1]
    need = f"of shape (..., {classes}), as logits is"
    arg.require(values.shape[-1] == classes, "values", need, f"shape {values.shape}")
    tau = arg.as_tau(tau, logits.dtype)
    batch = {"logits": logits.shape[:-1], "values": values.shape[:-1]}
    shape = arg.batch_shape(shape, **batch, per_event={"tau": tau.shape})
    perturbed = rng.perturbed(key, logits, shape)
    weights = gr.softmax(perturbed, tau[..., None])
    soft = jnp.sum(weights * values, -1)
    if not hard:
        return soft.astype(dtype)
    exact = jnp.sum(where(lm.largest(perturbed), values, 0), -1)
    return gr.straight_through(exact, soft).astype(dtype)


def poisson_support(
    rate: ArrayLike, num_values: int | None = None, *, eps: float = 1e-8
) -> tuple[Array, Array]:
    """Truncate a Poisson distribution to finitely many values, for `generalized_gumbel_softmax`.

    ``P(k) = rate^k exp(-rate) / k!``, k = 0, 1, .... The mass of all larger counts is added to the last
    value.

    Args:
      rate: mean counts, positive, of the batch shape. A traced rate that has rounded to 0 gets the law and
        the slope of the smallest float; a negative one gives NaN.
      num_values: how many values to keep, a Python integer. By default the smallest number for which the
        tail mass left out is below ``eps`` for all given parameters, which must not be traced. In a jitted
        step, pass the number found outside for the largest mean: ``values.size``.
      eps: largest tail mass that may be left out. It is added to the last value.

    Returns:
      ``(logits, values)``: normalized log-probabilities, with the batch shape and a last axis for the
        values, and the values 0, 1, ..., of shape ``(num_values,)``; float32 or wider.

    Raises:
      ValueError: for a ``rate`` that is not positive, finite and floating point, for traced parameters
        without ``num_values``, for a concrete ``num_values`` that leaves out more than ``eps`` or is above
        10,000, or for an ``eps`` not in (0, 1).

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), arXiv:2003.01847.
      C. Loader (2000), Fast and Accurate Computation of Binomial Probabilities, whose form of the
      mass keeps its digits at large counts.

    >>> logits, values = poisson_support(3.0)
    >>> print(values.size, f"{jnp.exp(logits) @ values:.4f}")
    18 3.0000
    """
    _require_positive_and_finite("rate", rate)
    _, rate = arg.widen(rate=rate)
    return _support(_poisson, (rate,), num_values, eps)


def geometric_support(
    logits: ArrayLike, num_values: int | None = None, *, eps: float = 1e-8
) -> tuple[Array, Array]:
    """Truncate a geometric distribution to finitely many values, for `generalized_gumbel_softmax`.

    Counts the failures before the first success: ``P(k) = p (1 - p)^k``, ``p = sigmoid(logits)``, with mean
    ``exp(-logits)``. The mass of all larger counts is added to the last value.

    Args:
      logits: log-odds of a success, of the batch shape.
      num_values: how many values to keep, a Python integer. By default the smallest number for which the
        tail mass left out is below ``eps`` for all given parameters, which must not be traced. In a jitted
        step, pass the number found outside for the largest mean: ``values.size``.
      eps: largest tail mass that may be left out. It is added to the last value.

    Returns:
      ``(logits, values)``: normalized log-probabilities, with the batch shape and a last axis for the
        values, and the values 0, 1, ..., of shape ``(num_values,)``; float32 or wider.

    Raises:
      ValueError: for ``logits`` that are not floating point, -inf or NaN, for traced parameters without
        ``num_values``, for a concrete ``num_values`` that leaves out more than ``eps`` or is above 10,000,
        or for an ``eps`` not in (0, 1).

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), arXiv:2003.01847.

    >>> logits, values = geometric_support(0.0)
    >>> print(values.size, f"{jnp.exp(logits) @ values:.4f}")
    27 1.0000
    """
    arg.require_values("logits", logits, "above -inf", lambda x: x > -np.inf)
    _, logits = arg.widen(logits=logits)
    return _support(_geometric, (logits,), num_values, eps)


def binomial_support(
    total_count: ArrayLike, logits: ArrayLike, num_values: int | None = None, *, eps: float = 1e-8
) -> tuple[Array, Array]:
    """List a binomial distribution, or the first of its values, for `generalized_gumbel_softmax`.

    ``P(k) = C(n, k) p^k (1 - p)^(n - k)``, ``p = sigmoid(logits)``. The mass of all larger counts is added
    to the last value.

    Args:
      total_count: n, integers of the batch shape, known before tracing.
      logits: log-odds of a success, of the batch shape.
      num_values: how many values to keep, a Python integer; by default all, up to the largest n. If n is
        10,000 or more, the smallest number for which the tail mass left out is below ``eps``.
      eps: largest tail mass that may be left out. It is added to the last value.

    Returns:
      ``(logits, values)``: normalized log-probabilities, with the batch shape and a last axis for the
        values, and the values 0, 1, ..., of shape ``(num_values,)``; float32 or wider.

    Raises:
      ValueError: for a ``total_count`` that is traced or not integers of 1 or more, ``logits`` that are NaN
        or not floating point, for a concrete ``num_values`` that leaves out more than ``eps`` or is above
        10,000, or for an ``eps`` not in (0, 1).

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), arXiv:2003.01847.
      C. Loader (2000), Fast and Accurate Computation of Binomial Probabilities.

    >>> logits, values = binomial_support(4, 0.0)
    >>> print(*(f"{16 * p:.3f}" for p in jnp.exp(logits)))
    1.000 4.000 6.000 4.000 1.000
    """
    need = "integers, 1 or more, known before tracing"
    arg.require(arg.can_be_seen(total_count), "total_count", need, total_count)
    integers = lambda x: (x >= 1) & (x < np.inf) & (x == np.round(x))
    arg.require_values("total_count", total_count, need, integers)
    arg.require_values("logits", logits, "log-odds, not NaN", lambda x: x == x)
    _, logits = arg.widen(logits=logits)
    n = np.asarray(total_count)
    arg.batch_shape(None, total_count=n.shape, logits=logits.shape)
    if num_values is None and n.max() < MOST_VALUES:
        num_values = int(n.max()) + 1
    return _support(_binomial, (n.astype(logits.dtype), logits), num_values, eps)


def negative_binomial_support(
    total_count: ArrayLike, logits: ArrayLike, num_values: int | None = None, *, eps: float = 1e-8
) -> tuple[Array, Array]:
    """Truncate a negative binomial distribution to finitely many values, for `generalized_gumbel_softmax`.

    Counts the successes before the r-th failure: ``P(k) = Gamma(k + r) / (k! Gamma(r)) p^k (1 - p)^r``,
    ``p = sigmoid(logits)``, with mean ``r exp(logits)``, as in NumPyro. The mass of all larger counts is
    added to the last value.

    Args:
      total_count: r, positive, not only integers, of the batch shape; a traced value is treated as in
        `poisson_support`.
      logits: log-odds of a success, of the batch shape.
      num_values: how many values to keep, a Python integer. By default the smallest number for which the
        tail mass left out is below ``eps`` for all given parameters, which must not be traced. In a jitted
        step, pass the number found outside for the largest mean: ``values.size``.
      eps: largest tail mass that may be left out. It is added to the last value.

    Returns:
      ``(logits, values)``: normalized log-probabilities, with the batch shape and a last axis for the
        values, and the values 0, 1, ..., of shape ``(num_values,)``; float32 or wider.

    Raises:
      ValueError: for a ``total_count`` that is not positive and finite, ``logits`` that are inf or NaN,
        dtypes that are not floating point, for traced parameters without ``num_values``, for a concrete
        ``num_values`` that leaves out more than ``eps`` or is above 10,000, or for an ``eps`` not in (0, 1).

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), arXiv:2003.01847.
      C. Loader (2000), Fast and Accurate Computation of Binomial Probabilities.

    >>> logits, values = negative_binomial_support(2.0, 0.0)
    >>> print(values.size, f"{jnp.exp(logits) @ values:.4f}")
    31 2.0000
    """
    _require_positive_and_finite("total_count", total_count)
    arg.require_values("logits", logits, "below inf", lambda x: x < np.inf)
    _, r, logits = arg.widen(total_count=total_count, logits=logits)
    arg.batch_shape(None, total_count=r.shape, logits=logits.shape)
    # With a constant r, jaxlib 0.10.2 compiles wrong gradients inside a scan on CPUs, so r is hidden.
    r = jax.lax.optimization_barrier(r)
    return _support(_negative_binomial, (r, logits), num_values, eps)


def _require_positive_and_finite(name, x):
    arg.require_positive(name, x)
    arg.require_values(name, x, "finite", np.isfinite)


def _support(log_pmf, parameters, num_values, eps):
    """The logits of a finite list, and its values."""
    need = "in (0, 1), one number that is known before tracing"
    arg.require(arg.can_be_seen(eps), "eps", need, arg.shown(eps))
    arg.require_values("eps", eps, need, lambda x: (x.ndim == 0) & (x > 0) & (x < 1))
    seen = not any(isinstance(x, jax.core.Tracer) for x in parameters)
    if num_values is not None:
        num_values = arg.as_static_int("num_values", num_values, 1, MOST_VALUES)
    need = "given, as the parameters are traced: it is fixed before tracing"
    arg.require(seen or num_values is not None, "num_values", need, None)
    if seen:
        least = enough_values(lambda values: _masses(log_pmf, values, *parameters), eps)
        need = f"at most {MOST_VALUES}, and for these parameters and eps = {eps} it is not enough"
        arg.require(least is not None, "num_values", need, num_values)
        num_values = num_values or least
        need = f"at least {least} for the mass beyond to be below eps = {eps}"
        arg.require(num_values >= least, "num_values", need, num_values)
    logits = _folded(log_pmf, num_values, *parameters)
    return logits, jnp.arange(num_values, dtype=logits.dtype)


# Compiled, since a call outside a jitted step would dispatch dozens of small operations one by one.
@functools.partial(jax.jit, static_argnums=0)
def _masses(log_pmf, values, *parameters):
    return log_pmf(values.astype(parameters[0].dtype), *(x[..., None] for x in parameters))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _folded(log_pmf, num_values, *parameters):
    values = jnp.arange(2 * num_values + 64)  # the tail, as many values again
    log_p = _masses(log_pmf, values, *parameters)
    return jax.nn.log_softmax(fold_tail(log_p, num_values), -1)


# --- masses that keep their digits at large counts --------------------------------------------


def _poisson(k, mean):
    some = jnp.maximum(k, 1)
    # k / mean is the first to exceed the range of floats, where P(k) has long been 0
    mean_k = _within(mean, 16 * some)
    return where(k == 0, -_within(mean, 16), _log_poisson(some, mean_k, jnp.log(mean_k)))


def _geometric(k, logits):
    # zero failures are possible even where the log-probability of a failure is -inf
    failures = k * where(k == 0, 0, log_sigmoid(-logits))
    return log_sigmoid(logits) + failures


def _binomial(k, n, logits):
    return _successes(k, n - k, logits)


def _negative_binomial(k, r, logits):
    r = _within(r, 1e8)  # all P(k), about r p^k / k, are representable too
    some = jnp.maximum(k, 1)
    return where(k == 0, 0, jnp.log(r / (r + some))) + _successes(k, r, logits)


def _within(x, low):
    """A traced x > 0 that has rounded to 0 or inf, as a nearby number; ``low`` counts smallest floats.

    Its slope is the slope of the law there, which is right in the limit. A negative x is NaN.
    """
    info = jnp.finfo(x.dtype)
    inside = jnp.clip(x, low * float(info.tiny), float(info.max) / 1024)
    return gr.straight_through(where(x < 0, jnp.nan, inside), x)


def _successes(k, rest, logits):
    """log P(k) for k + rest trials, where rest may be any number."""
    log_p, log_q = log_sigmoid(logits), log_sigmoid(-logits)
    inside = (k > 0) & (rest > 0)
    a, b = where(inside, k, 1), where(inside, rest, 1)
    n, log_n = a + b, jnp.log(a + b)
    law = _log_poisson(a, n * jnp.exp(log_p), log_n + log_p)
    law += _log_poisson(b, n * jnp.exp(log_q), log_n + log_q) - _log_poisson(n, n, log_n)
    # zero successes, or nothing but successes; there is no mass beyond the trials
    edge = where(k == 0, rest * log_q, where(rest == 0, k * log_p, -jnp.inf))
    return where(inside, law, edge)


def _log_poisson(x, mean, log_mean):
    """x log(mean) - mean - log Gamma(x + 1), for x > 0.

    From 10 on it uses the saddle-point form of C. Loader (2000), whose terms do not cancel.
    """
    large = x >= 10
    y = where(large, x, 10)
    saddle = -_stirling_error(y) - _deviance(y, mean, log_mean) - 0.5 * jnp.log(2 * math.pi * y)
    y = where(large, 1, x)
    return where(large, saddle, y * log_mean - mean - gammaln(y + 1))


def _stirling_error(x):
    """log Gamma(x + 1) - (x + 1/2) log x + x - log(2 pi) / 2, for x of 10 or more."""
    y = 1 / (x * x)
    return (1 - y * (1 / 30 - y * (1 / 105 - y * (1 / 140 - y / 99)))) / (12 * x)


def _deviance(k, mean, log_mean):
    """k log(k / mean) + mean - k for k > 0, which is about k d^2 / 2 for a small d = (mean - k) / k."""
    d = (mean - k) / k
    below = d < -0.5  # 1 + d = mean / k has few digits then; log_mean has all of them
    d = where(below, 0, d)
    return where(below, k * (jnp.log(k) - log_mean) + (mean - k), k * _log1p_error(d))


def _log1p_error(d):
    """d - log(1 + d), for small d from the series log(1 + d) = 2 atanh(d / (2 + d))."""
    small = jnp.abs(d) < 0.1
    e = where(small, d, 0)
    v = e / (2 + e)
    w = v * v
    series = e * v - 2 * v * w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w / 11))))
    return where(small, series, d - jnp.log1p(d))


def enough_values(log_pmf, eps):
    """The smallest n for which the mass of n, n + 1, ... is below eps, or None if it is above MOST_VALUES.

    ``log_pmf(values)`` has the values on its last axis. The sum takes as many more values as are kept; the
    rest is approximated by the geometric series that the last two begin. Together they are 1, unless the
    mass lies farther on, where none of it is visible yet.
    """
    block, size, parts = np.arange(128, dtype=np.int32), 128, []
    with jax.ensure_compile_time_eval():
        while size <= 4 * MOST_VALUES:
            while len(parts) * len(block) < size:  # all with one shape, so the operations compile once
                parts.append(np.asarray(log_pmf(len(parts) * len(block) + block), np.float64))
            log_p = np.concatenate(parts, -1)
            p, last = np.exp(log_p), log_p[..., -1:]
            before = np.where(last > -np.inf, log_p[..., -2:-1], 0)
            ratio = np.exp(np.minimum(last - before, 1))
            beyond = np.where(ratio < 1, p[..., -1:] * ratio / np.maximum(1 - ratio, 1e-9), np.inf)
            tail = np.cumsum(np.concatenate([beyond, p[..., ::-1]], -1), -1)[..., ::-1]
            found = np.abs(tail[..., :1] - 1) < 0.01
            small = np.all(found & (tail[..., : size // 2] < eps), tuple(range(tail.ndim - 1)))
            if small.any():
                n = max(int(np.argmax(small)), 1)
                return n if n <= MOST_VALUES else None
            size *= 2
    return None


def fold_tail(log_pmf, num_values):
    """The log-masses of the first num_values - 1 values, and of all others together.

    ``log_pmf`` continues for some values after those. A light tail is their sum, since one minus the others
    would cancel and have no gradient where it rounds to 0. A heavy tail, which may continue for longer, is
    one minus the others.
    """
    head, tail = log_pmf[..., : num_values - 1], lm.log_sum_exp(log_pmf[..., num_values - 1 :])
    below = lm.log_sum_exp(head)
    heavy = below < math.log(0.999)
    rest = jnp.log(-jnp.expm1(where(heavy, below, -1)))
    return jnp.concatenate([head, where(heavy, rest, tail)[..., None]], -1)
