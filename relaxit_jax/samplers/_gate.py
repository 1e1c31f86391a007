"""Stochastic gates: relaxed Bernoulli variables that are exactly 0 or 1 with positive probability."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _random as rng
from relaxit_jax._placement import where


def gaussian_bernoulli(
    key: Array, loc: ArrayLike, scale: ArrayLike, *, shape: Sequence[int] | None = None, hard: bool = False
) -> Array:
    """Sample a Gaussian-based stochastic gate (a clipped Gaussian).

    ``z = clip(loc + scale eps, 0, 1)``, with eps standard normal: exactly 0 with probability
    ``Phi(-loc / scale)``, exactly 1 with probability ``Phi((loc - 1) / scale)``.

    Args:
      key: a JAX random key.
      loc: mean before clipping, any shape.
      scale: standard deviation before clipping, positive, broadcasting against ``loc``.
      shape: shape of the result; default: the parameters' broadcast shape.
      hard: return the bit ``z > 1/2``, exactly Bernoulli(Phi((loc - 1/2) / scale)), with the
        gradient of z, which is 0 where z was clipped.

    Returns:
      Values in [0, 1], in the promoted dtype of ``loc`` and ``scale``. In half precision a value between 0
      and 1 stays there: rounding does not create atoms.

    Raises:
      ValueError: for a ``scale`` that is not positive, a dtype that is not floating point, or a
        ``shape`` the parameters do not broadcast to.

    References:
      Y. Yamada, O. Lindenbaum, S. Negahban, Y. Kluger (2020), Feature Selection using Stochastic
      Gates, arXiv:1810.04247.

    >>> gaussian_bernoulli(jax.random.key(0), jnp.array([-9.0, 9.0]), 0.5)
    Array([0., 1.], dtype=float32)
    """
    arg.check_key(key)
    arg.require_flags(hard=hard)
    dtype, loc, scale = arg.widen_with_scale(loc, scale)
    shape = arg.batch_shape(shape, loc=loc.shape, scale=scale.shape)
    y = loc + scale * rng.normal(key, shape, loc, used_twice=True)
    z = jnp.clip(y, 0, 1)
    return gr.straight_through(y > 0.5, z).astype(dtype) if hard else _cast_gate(z, dtype)


def _cast_gate(z, dtype):
    """Cast a gate with atoms at 0 and 1, keeping values strictly between them there."""
    if jnp.finfo(dtype).bits >= jnp.finfo(z.dtype).bits:
        return z.astype(dtype)
    info = jnp.finfo(dtype)
    kept = jnp.clip(z, float(info.smallest_subnormal), 1 - float(info.epsneg))
    return gr.straight_through(where((z > 0) & (z < 1), kept, z), z).astype(dtype)


def gaussian_bernoulli_log_prob(value: ArrayLike, loc: ArrayLike, scale: ArrayLike) -> Array:
    """Log-density of `gaussian_bernoulli`: log-mass at 0 and 1, log-density in between.

    ``log Phi(-loc / scale)`` at 0, ``log Phi((loc - 1) / scale)`` at 1, the log-density of N(loc, scale^2) in
    between, and -inf elsewhere.

    Args:
      value: z in [0, 1].
      loc: mean before clipping.
      scale: standard deviation before clipping, positive.

    Returns:
      Values of the broadcast shape, float32 or wider.

    Raises:
      ValueError: for a ``scale`` that is not positive, dtypes that are not floating point, or
        shapes that do not broadcast.

    References:
      Y. Yamada, O. Lindenbaum, S. Negahban, Y. Kluger (2020), arXiv:1810.04247.

    >>> print(f"{jnp.exp(gaussian_bernoulli_log_prob(0.0, 0.5, 1.0)):.4f}")  # Phi(-1/2)
    0.3085
    """
    _, loc, scale = arg.widen_with_scale(loc, scale)
    _, value, loc, scale = arg.widen(value=value, loc=loc, scale=scale)
    arg.batch_shape(None, value=value.shape, loc=loc.shape, scale=scale.shape)
    inside = lm.log_normal_pdf((value - loc) / scale) - jnp.log(scale)
    law = _with_atoms(value, lm.log_ndtr(-loc / scale), inside, lm.log_ndtr((loc - 1) / scale))
    return lm.show_nan(law, value, loc, scale)


def gaussian_bernoulli_l0(loc: ArrayLike, scale: ArrayLike) -> Array:
    """Compute the L0 penalty of a Gaussian-based gate, the probability that it is not 0.

    ``P(z != 0) = Phi(loc / scale)``. The sum over the gates of a model is the expected number of open gates.

    Args:
      loc: mean before clipping, any shape.
      scale: standard deviation before clipping, positive, broadcasting against ``loc``.

    Returns:
      Probabilities of the broadcast shape, in the promoted dtype of ``loc`` and ``scale``.

    Raises:
      ValueError: for a ``scale`` that is not positive, dtypes that are not floating point, or shapes that do
        not broadcast.

    References:
      Y. Yamada, O. Lindenbaum, S. Negahban, Y. Kluger (2020), arXiv:1810.04247.

    >>> print(f"{gaussian_bernoulli_l0(0.5, 0.5):.4f}")  # Phi(1)
    0.8413
    """
    dtype, loc, scale = arg.widen_with_scale(loc, scale)
    arg.batch_shape(None, loc=loc.shape, scale=scale.shape)
    return jnp.exp(lm.log_ndtr(loc / scale)).astype(dtype)


def gaussian_bernoulli_gate(loc: ArrayLike) -> Array:
    """Compute the deterministic Gaussian-based gate for test time.

    ``clip(loc, 0, 1)``: the gate without its noise.

    Args:
      loc: mean before clipping, any shape.

    Returns:
      Gates in [0, 1], in the dtype of ``loc``.

    Raises:
      ValueError: for a dtype that is not floating point.

    References:
      Y. Yamada, O. Lindenbaum, S. Negahban, Y. Kluger (2020), arXiv:1810.04247.

    >>> gaussian_bernoulli_gate(jnp.array([-9.0, 0.25, 9.0]))
    Array([0.  , 0.25, 1.  ], dtype=float32)
    """
    return jnp.clip(arg.as_float("loc", loc), 0, 1)


def _with_atoms(value, at_zero, inside, at_one):
    """A log-law with atoms at 0 and 1 and a density in between."""
    law = where(value == 0, at_zero, where(value == 1, at_one, inside))
    return where((value < 0) | (value > 1), -jnp.inf, law)


def _check_stretch(stretch):
    need = "two numbers (a, b) with a < 0 and b > 1"
    try:
        a, b = (float(end) for end in stretch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"stretch must be {need}, got {arg.shown(stretch)}.") from error
    arg.require(a < 0 and b > 1 and math.isfinite(b - a), "stretch", need, stretch)
    return a, b


def _logits_of_the_ends(a, b):
    """logit(v) where z reaches 0, and where it reaches 1."""
    return math.log(-a / b), math.log((1 - a) / (b - 1))


def hard_concrete(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike,
    *,
    stretch: tuple[float, float] = (-0.1, 1.1),
    shape: Sequence[int] | None = None,
    hard: bool = False,
    log_space: bool = False,
) -> Array:
    """Sample a hard concrete gate (a binary Concrete variable, stretched and clipped).

    ``v = sigmoid((logits + L) / tau)``, ``z = clip(a + (b - a) v, 0, 1)`` with ``stretch = (a, b)`` and L
    standard logistic noise. Zeros and ones have positive probability; see `hard_concrete_log_prob`.

    Args:
      key: a JAX random key.
      logits: log-odds, any shape; -inf gives exactly 0.
      tau: temperature, positive, broadcasting against ``logits``.
      stretch: two numbers around [0, 1], known before tracing.
      shape: shape of the result; default: the parameters' broadcast shape.
      hard: return the bit ``z > 1/2`` with the gradient of z. It is exactly Bernoulli(sigmoid(logits)) if the
        stretch is symmetric about 1/2, as the default is.
      log_space: return ``logit(v)``, before stretching, in float32 or wider.

    Returns:
      Values in [0, 1], in the dtype of ``logits``. In half precision a value between 0 and 1 stays there:
      rounding does not create atoms.

    Raises:
      ValueError: as for `relaxed_bernoulli`, and for a ``stretch`` that does not enclose [0, 1].

    References:
      C. Louizos, M. Welling, D. P. Kingma (2018), Learning Sparse Neural Networks through L0
      Regularization, arXiv:1712.01312.

    >>> hard_concrete(jax.random.key(0), jnp.array([-9.0, 9.0]), 0.5)
    Array([0., 1.], dtype=float32)
    """
    a, b = _check_stretch(stretch)
    arg.require_form(hard, log_space)
    arg.check_key(key)
    dtype, logits = arg.widen(logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    shape = arg.batch_shape(shape, logits=logits.shape, tau=tau.shape)
    y = lm.over_tau(logits + rng.logistic(key, shape, logits), tau)
    if log_space:
        return y
    z = _stretched(a, b, y)
    return gr.straight_through(z > 0.5, z).astype(dtype) if hard else _cast_gate(z, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _stretched(a, b, y):
    """clip(a + (b - a) sigmoid(y), 0, 1).

    y decides on the atoms, as in the law. The two ends are weighted, since a + (b - a) sigmoid(y) would
    cancel.
    """
    low, high = _logits_of_the_ends(a, b)
    inside = a * sigmoid(-y) + b * sigmoid(y)
    return where(y <= low, 0, where(y >= high, 1, jnp.clip(inside, 0, 1)))


@_stretched.defjvp
def _stretched_jvp(a, b, primals, tangents):
    z = _stretched(a, b, *primals)
    slope = where((z == 0) | (z == 1), 0, (z - a) * (b - z) / (b - a))
    return z, slope * tangents[0]


_stretched = jax.jit(_stretched, static_argnums=(0, 1))


def hard_concrete_log_prob(
    value: ArrayLike,
    logits: ArrayLike,
    tau: ArrayLike,
    *,
    stretch: tuple[float, float] = (-0.1, 1.1),
    log_space: bool = False,
) -> Array:
    """Log-density of `hard_concrete`: log-mass at 0 and 1, log-density in between.

    With ``F(x) = sigmoid(tau logit(x) - logits)`` the distribution function of v: ``log F(-a / (b - a))`` at
    0, ``log(1 - F((1 - a) / (b - a)))`` at 1, and in between the binary Concrete log-density of
    ``v = (z - a) / (b - a)`` minus ``log(b - a)``.

    Args:
      value: z in [0, 1]; or, if ``log_space``, the ``logit(v)`` that the sampler returned with
        ``log_space=True``. Either way the result is the law of z.
      logits: log-odds.
      tau: temperature, positive.
      stretch: the (a, b) of the sampler.
      log_space: whether ``value`` is ``logit(v)``.

    Returns:
      Values of the broadcast shape, float32 or wider; -inf outside [0, 1].

    Raises:
      ValueError: as for `relaxed_bernoulli_log_prob`, and for a ``stretch`` that does not enclose
        [0, 1].

    References:
      C. Louizos, M. Welling, D. P. Kingma (2018), arXiv:1712.01312.

    >>> print(f"{jnp.exp(hard_concrete_log_prob(0.0, 0.0, 0.5)):.4f}")
    0.2317
    """
    a, b = _check_stretch(stretch)
    arg.require_flags(log_space=log_space)
    _, value, logits = arg.widen(value=value, logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    arg.batch_shape(None, value=value.shape, logits=logits.shape, tau=tau.shape)
    low, high = _logits_of_the_ends(a, b)
    if log_space:
        y, z = value, where(value <= low, 0, where(value >= high, 1, 0.5))
    else:
        inside = where((value > 0) & (value < 1) | jnp.isnan(value), value, 0.5)
        y, z = jnp.log(inside - a) - jnp.log(b - inside), value
    at_zero = log_sigmoid(tau * low - logits)
    at_one = log_sigmoid(logits - tau * high)
    inside = lm.binary_concrete_log_prob(y, logits, tau) - math.log(b - a)
    return lm.show_nan(_with_atoms(z, at_zero, inside, at_one), value, logits, tau)


def hard_concrete_l0(
    logits: ArrayLike, tau: ArrayLike, *, stretch: tuple[float, float] = (-0.1, 1.1)
) -> Array:
    """Compute the L0 penalty of a hard concrete gate, the probability that it is not 0.

    ``P(z != 0) = sigmoid(logits - tau log(-a / b))``. The sum over the gates of a model is the expected
    number of open gates.

    Args:
      logits: log-odds, any shape.
      tau: temperature, positive, broadcasting against ``logits``.
      stretch: the (a, b) of the sampler.

    Returns:
      Probabilities of the broadcast shape, in the dtype of ``logits``.

    Raises:
      ValueError: for a ``tau`` that is not positive, a ``stretch`` that does not enclose [0, 1], a
        dtype that is not floating point, or shapes that do not broadcast.

    References:
      C. Louizos, M. Welling, D. P. Kingma (2018), arXiv:1712.01312.

    >>> print(f"{hard_concrete_l0(0.0, 2 / 3):.4f}")
    0.8318
    """
    a, b = _check_stretch(stretch)
    dtype, logits = arg.widen(logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    arg.batch_shape(None, logits=logits.shape, tau=tau.shape)
    return sigmoid(logits - tau * math.log(-a / b)).astype(dtype)


def hard_concrete_gate(logits: ArrayLike, *, stretch: tuple[float, float] = (-0.1, 1.1)) -> Array:
    """Compute the deterministic hard concrete gate for test time.

    ``clip(a + (b - a) sigmoid(logits), 0, 1)``.

    Args:
      logits: log-odds, any shape.
      stretch: the (a, b) of the sampler.

    Returns:
      Gates in [0, 1], in the dtype of ``logits``.

    Raises:
      ValueError: for a ``stretch`` that does not enclose [0, 1].

    References:
      C. Louizos, M. Welling, D. P. Kingma (2018), arXiv:1712.01312.

    >>> hard_concrete_gate(jnp.array([-9.0, 0.0, 9.0]))
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    a, b = _check_stretch(stretch)
    dtype, logits = arg.widen(logits=logits)
    return jnp.clip(a + (b - a) * sigmoid(logits), 0, 1).astype(dtype)
