"""Draws with fused kernels if `fused_kernels` selects them, and their derivatives."""

from __future__ import annotations

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
from jax.nn import log_softmax

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng

_chosen = jax.make_user_context(False)
_interpreted = None  # tests set "cuda" or "tpu"; Pallas then interprets those kernels
PIECE = 4096  # classes that a GPU program holds at a time
LONGEST = 16_384  # most classes for which a TPU holds everything a kernel needs in its fast memory


def fused_kernels(enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Choose kernels that hash, perturb and normalize logits in one pass, on GPUs and TPUs.

    Inside ``with fused_kernels(True):`` these samplers have such kernels: `gumbel_softmax`,
    `straight_through_categorical`, `decoupled_gumbel_softmax`, `gapped_straight_through`, `reinmax`,
    `gumbel_rao` and `reinmax_rao`, and `gumbel_top_k` and `relaxed_top_k` with up to 8 of at most 4,096
    elements. The kernels use the same random numbers as the plain form, and draws and gradients agree with it
    up to rounding. The plain form is still used on CPUs, in float64, on explicit meshes, for keys of other
    types than Threefry, if ``shape`` repeats the logits, for more than 16,384 classes on a TPU, and for the
    gradients of `gumbel_rao` and `reinmax_rao` with more than 4,096 classes.

    The kernels are off by default: they have been compiled for an H100 and a TPU v5e and run in an
    interpreter, but not timed on a device. A compiler cannot partition a kernel. If arrays are sharded, call
    the sampler inside `jax.shard_map`: otherwise a GPU program gathers the whole array, and a TPU program
    does not compile. Inside, forward-mode derivatives are an error for `gumbel_rao`, `reinmax_rao`,
    `relaxed_top_k` and, with up to 4,096 classes, for hard draws of `gumbel_softmax` and
    `decoupled_gumbel_softmax`.

    Args:
      enabled: True or False.

    Returns:
      A context manager. `jax.jit` compiles a function once for the inside and once for the outside.

    Raises:
      ValueError: for anything but a Boolean.

    References:
      P. Tillet, H. T. Kung, D. Cox (2019), Triton: An Intermediate Language and Compiler for Tiled Neural
      Network Computations; the kernels are written in JAX's Pallas.

    >>> import relaxit_jax as rj
    >>> with rj.fused_kernels(True):
    ...     draw = jax.jit(rj.gumbel_softmax)(jax.random.key(0), jnp.zeros(2), 0.5)
    >>> print(f"{draw.sum():.4f}")
    1.0000
    """
    arg.require_flags(enabled=enabled)
    return _chosen(bool(enabled))


def fits(key, logits, shape, k=0):
    """Whether the kernels are selected and can make a draw of this batch shape (of k elements)."""
    if k > lm.FEW or (k and logits.shape[-1] > PIECE):
        return False
    if not _chosen.value or (*shape, logits.shape[-1]) != logits.shape or logits.dtype == jnp.float64:
        return False
    return (
        all(isinstance(size, int) for size in logits.shape)
        and 0 < math.prod(logits.shape) < 2**31
        and jax.random.key_impl(key) == "threefry2x32"
        and pl.spec_of(logits.shape, logits) is None
    )


def categorical(key, logits, shape, given):
    """The index of an exact draw, like `_random.categorical`. ``given`` is the dtype before widening."""
    if fits(key, logits, shape):
        return index(True, given, key, logits)
    return rng.categorical(key, logits, shape)


def index_of_noisy(logits, noise):
    """The index of argmax(logits + noise), in the plain form."""
    return lm.index_of_largest(lm.centre(logits, for_index=True) + noise)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def plain_softmax(log_space, dtype, shape, key, logits, tau):
    """softmax((logits + G) / tau) with this batch shape, or its logarithm, in the plain form."""
    softmax = gr.log_softmax if log_space else gr.softmax
    return softmax(rng.perturbed(key, logits, shape), tau).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def index(is_race, given, key, logits):
    """The index of an exact draw, as a race of exponentials or as argmax(logits + G)."""

    def plain(key, logits, _):
        if is_race:
            return rng.categorical(key, logits, logits.shape[:-1])
        return index_of_noisy(logits, rng.gumbel(key, logits.shape, logits))

    logits = jax.lax.stop_gradient(logits)
    score, out = "race" if is_race else "gumbel", [_out((*logits.shape[:-1], 1), jnp.int32, logits)]
    kernel = "draw", score, out, given
    return _by_platform(plain, kernel, logits.shape[-1], key, logits, jnp.ones((1, 1)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def noisy_softmax(log_space, given, dtype, key, logits, tau):
    """softmax((logits + G) / tau) in a dtype, or its logarithm. tau has an axis for the classes."""
    plain = functools.partial(plain_softmax, log_space, dtype, logits.shape[:-1])
    out = [_out(logits.shape, dtype, logits, tau)]
    # one temperature for the whole batch, or one for each element
    taus = (
        tau.reshape((1,) * logits.ndim) if tau.size == 1 else jnp.broadcast_to(tau, (*logits.shape[:-1], 1))
    )
    kernel = "draw", "log" if log_space else "softmax", out, given
    return _by_platform(plain, kernel, logits.shape[-1], key, logits, taus)


def _noisy_softmax_jvp(log_space, given, dtype, primals, tangents):
    """log z is (logits + G) / tau minus a constant for each event, which changes no derivative."""
    (key, logits, tau), (_, logits_dot, tau_dot) = primals, tangents
    value = noisy_softmax(log_space, given, dtype, key, logits, tau)
    if log_space:
        slope = gr.log_softmax_tangent(value, value * tau, tau, logits_dot, tau_dot)
    else:  # in a narrow dtype the sum of z is 1 only after read_once
        wide = value.astype(logits.dtype)
        slope = lm.tempered_tangent(wide > 0, jnp.log(wide) * tau, tau, logits_dot, tau_dot)
        slope = gr.softmax_tangent(gr.read_once(value, logits.dtype), slope)
    return value, pl.placed(slope.astype(value.dtype), value)


noisy_softmax.defjvp(_noisy_softmax_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def mean_softmax(plain_slope, num_samples, shift, given, key, index, logits, tau):
    """An unused value with the mean derivative of softmax((logits + sg(G)) / tau).

    G is Gumbel noise given that ``log_softmax(logits) + shift + G`` is largest at the index. ``plain_slope``
    is the derivative in the plain form, `_straight_through._mean_slope`.
    """
    return pl.placed(jnp.zeros_like(logits), index, tau)


def _mean_softmax_fwd(plain_slope, num_samples, shift, given, *arguments):
    return mean_softmax(plain_slope, num_samples, shift, given, *arguments), arguments


def _mean_softmax_bwd(plain_slope, num_samples, shift, given, arguments, cotangent):
    def plain(key, logits, tau, index, cotangent):
        log_p = log_softmax(logits) + shift
        slope = functools.partial(plain_slope, num_samples, logits, key, index, log_p, logits, tau)
        of_logits, of_tau = jax.linear_transpose(slope, logits, tau)(cotangent)
        return [of_logits.astype(given), of_tau]

    key, index, logits, tau = arguments
    kernel = "mean_slope", num_samples, shift
    return None, None, *_pulled(plain, kernel, given, key, logits, tau, (index,), cotangent)


mean_softmax.defvjp(_mean_softmax_fwd, _mean_softmax_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def slope_of(soft, plain, k, given, key, logits, tau):
    """An unused value with the derivative of soft(k, logits + G, tau), G the noise of a draw.

    ``soft`` is a function that kernels can contain; ``plain`` is the same elsewhere.
    """
    return pl.placed(jnp.zeros_like(logits), tau)


def _slope_of_fwd(*arguments):
    return slope_of(*arguments), arguments[-3:]


def _slope_of_bwd(soft, plain, k, given, arguments, cotangent):
    def from_plain(key, logits, tau, cotangent):
        soft_of = lambda logits, tau: plain(k, rng.perturbed(key, logits, logits.shape[:-1]), tau)
        of_logits, of_tau = jax.vjp(soft_of, logits, tau)[1](cotangent)
        return [of_logits.astype(given), of_tau]

    key, logits, tau = arguments
    return None, *_pulled(from_plain, ("slope", soft, k), given, key, logits, tau, (), cotangent)


slope_of.defvjp(_slope_of_fwd, _slope_of_bwd)


def noisy_top_k(key, logits, k, given):
    """The k largest of logits + G and their indices, without a derivative."""

    def plain(key, logits):
        values, indices = lm.top_k(rng.perturbed(key, logits, logits.shape[:-1]), k)
        return [values + jnp.max(logits, -1, keepdims=True), indices]

    logits = jax.lax.stop_gradient(logits)
    out = [_out((*logits.shape[:-1], k), dtype, logits) for dtype in (logits.dtype, jnp.int32)]
    return _by_platform(plain, ("few", k, out, given), logits.shape[-1], key, logits)


def relaxed(soft, plain, k, given, key, logits, tau):
    """soft(k, logits + G, tau) with its derivative; see `slope_of`."""

    def from_plain(key, logits, tau):
        return plain(k, rng.perturbed(key, logits, logits.shape[:-1]), tau).astype(given)

    fixed, tau_of_rows = jax.lax.stop_gradient((logits, jnp.broadcast_to(tau, (*logits.shape[:-1], 1))))
    kernel = "relaxed", soft, k, [_out(logits.shape, given, logits, tau)], given
    value = _by_platform(from_plain, kernel, logits.shape[-1], key, fixed, tau_of_rows)
    return gr.straight_through(value, slope_of(soft, plain, k, given, key, logits, tau).astype(given))


def _pulled(plain, kernel, given, key, logits, tau, others, cotangent):
    """The gradients in logits and in tau, each in the shape and the dtype of the argument."""
    like = logits, tau, *others, cotangent
    out = [_out(logits.shape, given, *like), _out((*logits.shape[:-1], 1), tau.dtype, *like)]
    vary = lambda x, shape: pl.vary_as(jnp.broadcast_to(x, shape), *like)
    arrays = vary(logits, logits.shape), vary(tau, out[1].shape), *(vary(x, x.shape) for x in others)
    of_logits, of_tau = _by_platform(plain, (*kernel, out, given), logits.shape[-1], key, *arrays, cotangent)
    back = lambda x, shape, ct: jax.linear_transpose(lambda x: vary(x, shape), x)(ct)[0]
    of_logits = back(logits, logits.shape, of_logits.astype(logits.dtype))
    return of_logits, back(tau, out[1].shape, of_tau)


def _out(shape, dtype, *like):
    varying = jax.typeof(pl.vary_as(*like)).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def _by_platform(plain, kernel, classes, *arguments):
    """A kernel, given by its name and static arguments, where it can run. Pallas is imported only here."""
    from relaxit_jax import _kernels

    name, *static = kernel
    run = functools.partial(getattr(_kernels, name), *static, bool(_interpreted))
    if _interpreted:
        return run(_interpreted, *arguments)
    devices = ("cuda", "tpu") if classes <= LONGEST else ("cuda",)
    forms = {device: functools.partial(run, device) for device in devices}
    return jax.lax.platform_dependent(*arguments, **forms, default=plain)
