"""Check arguments before tracing where possible, and raise a ValueError that names the argument."""

from __future__ import annotations

import contextlib
import contextvars
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


def require(condition, name, need, got):
    """Raise a ValueError that names the argument and says what it needs and what it got."""
    if not condition:
        raise ValueError(f"{name} must be {need}, got {got}.")


def can_be_seen(x):
    """Whether the values of x are known here, neither traced nor held by other processes."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    traced = any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(parts))
    return not traced and getattr(x, "is_fully_addressable", True)


_values_are_checked = contextvars.ContextVar("_values_are_checked", default=True)


@contextlib.contextmanager
def check_values(flag):
    """Whether `require_values` checks values, for distributions whose `validate_args` is False."""
    token = _values_are_checked.set(flag)
    try:
        yield
    finally:
        _values_are_checked.reset(token)


def require_values(name, x, need, holds):
    """`require` that `holds` is true for the values of x, if they are concrete.

    NumPy checks them, since inside a jitted function even jax operations on constants are traced.
    """
    if _values_are_checked.get() and can_be_seen(x):
        try:
            values = np.asarray(x)
        except (TypeError, ValueError):  # keys, or a ragged list
            values = np.asarray(None)
        require(_is_real(values.dtype), name, "an array of numbers", shown(x))
        _refuse_narrow(name, values.dtype)
        require(np.all(holds(values)), name, need, x)


class shown:
    """How an error shows an argument of the wrong kind, always on one line.

    It is a string only once an error is raised: writing out an array takes longer than drawing a sample.
    """

    def __init__(self, x):
        self.x = x

    def __str__(self):
        dtype = getattr(self.x, "dtype", None)
        if dtype is not None and not isinstance(self.x, type) and not _is_real(dtype):
            return f"dtype {dtype}"
        text = " ".join(repr(self.x).split())
        return text if len(text) <= 100 else f"{text[:96]} ..."


def _is_real(dtype):
    """Whether values of this dtype are real numbers. NumPy treats bfloat16 as void; keys have no kind."""
    kind = getattr(dtype, "kind", "")
    return kind in set("biuf") or (kind == "V" and jnp.issubdtype(dtype, jnp.number))


def is_float(dtype):
    """Whether results can have this dtype. Floats of 8 bits and less hold neither noise nor log-densities."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _refuse_narrow(name, dtype):
    good = is_float(dtype) or not jnp.issubdtype(dtype, jnp.floating)
    require(good, name, "of 16 bits or more", f"dtype {dtype}. Write {name}.astype(jnp.float32)")


def check_key(key, name="key"):
    """A single JAX key, typed or raw."""
    need = "one JAX random key, as jax.random.key(0) makes (for several, vmap over them)"
    is_array = isinstance(key, jax.Array) or (hasattr(key, "__array__") and not isinstance(key, type))
    require(is_array, name, need, shown(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        require(key.shape == (), name, need, f"keys of shape {key.shape}")
    else:
        require(
            key.dtype == jnp.uint32 and key.ndim == 1 and key.shape[0] in (2, 4),
            name, need, f"an array of shape {key.shape} and dtype {key.dtype}",
        )  # fmt: skip


def as_array(name, x, need="an array of numbers"):
    """`x` as an array of any dtype."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be {need}, got {shown(x)}.") from error


def as_number(name, x, *, maybe_complex=False):
    """`x` as an array of booleans, integers or floats: a draw from an exact law may have any of these."""
    x = as_array(name, x)
    _refuse_narrow(name, x.dtype)
    good = _is_real(x.dtype) or (maybe_complex and jnp.issubdtype(x.dtype, jnp.complexfloating))
    require(good, name, f"an array of {'' if maybe_complex else 'real '}numbers", f"dtype {x.dtype}")
    return x


def as_float(name, x):
    """`x` as a floating-point array. Python numbers count as floats; integer arrays do not."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        x = float(x)
    x = as_array(name, x, "an array of floats")
    _refuse_narrow(name, x.dtype)
    cast = f". Write {name}.astype(jnp.float32)" if _is_real(x.dtype) else ""
    require(jnp.issubdtype(x.dtype, jnp.floating), name, "floating point", f"dtype {x.dtype}{cast}")
    return x


def shape_of(name, x):
    """The shape of an array, or of an object that stands for one."""
    return x.shape if isinstance(x, (jax.Array, np.ndarray, np.generic)) else as_array(name, x).shape


def wide(dtype):
    """float32 or wider, for computations with numbers of this dtype."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widen(**parameters):
    """The dtype of a result from these parameters, then each of them in float32 or wider."""
    arrays = [as_float(name, x) for name, x in parameters.items()]
    with jax.numpy_dtype_promotion("standard"):  # 16-bit parameters have 32-bit values in log space
        dtype = jnp.result_type(*arrays)
    return dtype, *(x.astype(wide(dtype)) for x in arrays)


def as_tau(tau, dtype, name="tau"):
    """A temperature in the dtype of the computation (a schedule in float32 never widens a result)."""
    return as_positive(name, tau, dtype)


def as_positive(name, x, dtype):
    """`x` in the dtype of the computation; a traced value that is not positive becomes NaN."""
    with np.errstate(over="ignore"):
        require_values(name, x, "positive", lambda x: x.astype(dtype) > 0)
    array = as_float(name, x).astype(dtype)
    # added, so that the gradient in x is not cut off: it is NaN where x is
    return array if can_be_seen(x) else array + jnp.where(array > 0, 0, jnp.nan)


def widen_with_scale(loc, scale):
    """`widen` for a mean and a positive scale."""
    dtype, loc, _ = widen(loc=loc, scale=scale)
    return dtype, loc, as_positive("scale", scale, loc.dtype)


def require_positive(name, x):
    require_values(name, x, "positive", lambda x: x > 0)


def require_event(name, x):
    """Require that the last axis is an event axis that is not empty; return its size."""
    shape = shape_of(name, x)
    require(shape[-1:] not in ((), (0,)), name, "an array whose last axis is not empty", f"shape {shape}")
    return shape[-1]


def require_same_event(value, parameter):
    """Require that a value has as many classes as the parameters."""
    size = parameter.shape[-1]
    require(value.shape[-1] == size, "value", f"of shape (..., {size})", f"shape {value.shape}")


def require_classes(logits, at_least=1, name="logits"):
    """Require categorical logits with an event axis on which enough classes are possible; return its size."""
    size = require_event(name, logits)
    need = f"above -inf for at least {at_least} of the classes"
    require_values(name, logits, need, lambda x: (x == -np.inf).sum(-1) <= x.shape[-1] - at_least)
    return size


def subset_args(logits, k):
    """k, widened logits with at least k possible elements, and the dtype of a result."""
    k = as_static_int("k", k, 1, require_event("logits", logits))
    require_classes(logits, at_least=k)
    dtype, logits = widen(logits=logits)
    return k, logits, dtype


def require_square(name, x, size):
    """Require matrices of shape (..., size, size)."""
    shape = shape_of(name, x)
    require(shape[-2:] == (size, size), name, f"of shape (..., {size}, {size})", f"shape {shape}")


def require_scale_tril(scale_tril, size):
    """Require a lower-triangular factor of shape (..., size, size)."""
    require_square("scale_tril", scale_tril, size)
    require_values("scale_tril", scale_tril, "lower triangular", lambda x: x == np.tril(x))


def as_static_int(name, x, low, high):
    """A Python integer in [low, high]. It sets shapes, so it cannot be traced."""
    need = f"an integer in [{low}, {high}]"
    try:
        number = operator.index(x)
    except TypeError as error:  # jax's own error for a traced integer is one of these
        raise ValueError(f"{name} must be {need}, known before tracing, got {shown(x)}.") from error
    require(low <= number <= high and not isinstance(x, bool), name, need, x)
    return number


def as_num_samples(x, least=1):
    """How many draws an estimate averages."""
    return as_static_int("num_samples", x, least, 1_000_000)


def require_flags(**flags):
    """Require options that are True or False. Python would treat "no" and "False" as true."""
    for name, x in flags.items():
        require(isinstance(x, (bool, np.bool_)), name, "True or False, known before tracing", shown(x))


def require_form(hard, log_space):
    """Require that a hard sample is not asked for in log space."""
    require_flags(hard=hard, log_space=log_space)
    require(not (hard and log_space), "log_space", "False for a hard sample", log_space)


def require_choice(name, x, choices):
    """Require one of these strings."""
    words = [repr(choice) for choice in choices]
    need = " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
    require(isinstance(x, str) and x in choices, name, need, shown(x))


def broadcasts_to(shape, target):
    """Whether an array of this shape broadcasts to the target, without making it larger."""
    try:
        return jnp.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def as_shape(name, shape, need="a tuple of sizes"):
    """A tuple of sizes, each of them known or symbolic."""
    try:
        sizes = tuple(size if export.is_symbolic_dim(size) else operator.index(size) for size in shape)
    except TypeError as error:
        raise ValueError(f"{name} must be {need}, got {shown(shape)}.") from error
    require(all(size >= 0 for size in sizes), name, need, shape)
    return sizes


def batch_shape(shape, *, per_event=(), **batches: tuple[int, ...]) -> tuple[int, ...]:
    """The batch shape of a result: `shape`, which the parameters must broadcast to, or their own.

    ``per_event`` has the shapes of parameters without an event axis, next to others that have one.
    """
    everything = batches | dict(per_event)
    try:
        own = jnp.broadcast_shapes(*everything.values())
    except ValueError as error:
        _refuse_event_axes(per_event, batches)
        raise ValueError(
            f"{', '.join(everything)} must have batch shapes that broadcast, got {everything}."
        ) from error
    if shape is None:
        _refuse_event_axes(per_event, batches)
        return own
    need = f"a tuple of sizes that the parameters' batch shape {own} broadcasts to"
    shape = as_shape("shape", shape, need)
    fits = broadcasts_to(own, shape)
    if not fits:
        _refuse_event_axes(per_event, batches)
    require(fits, "shape", need, shape)
    return shape


def _refuse_event_axes(per_event, batches):
    """Refuse (B, 1) next to a batch of (B,): it would give B x B pairs where (B,) was meant.

    It applies if the parameter has more axes than the batch, but not without its last axes of size 1.
    """

    def draws(*shapes):
        try:
            return math.prod(jnp.broadcast_shapes(*shapes))
        except ValueError:
            return None

    if draws(*batches.values()) is None:
        return
    batch = jnp.broadcast_shapes(*batches.values())
    for name, shape in dict(per_event).items():
        extra = len(shape) - len(batch)
        for ones in range(1, extra + 1):
            without = shape[:-ones]
            if shape == without + (1,) * ones and draws(batch, without) not in (None, draws(batch, shape)):
                index, axes = ", 0" * ones, ", ".join(["None"] * extra)
                raise ValueError(
                    f"{name} must have the batch shape and no axis for the event, got shape {shape} with a "
                    f"batch of shape {batch}. Write {name}[...{index}]; if you want every pair of the two, "
                    f"write {next(iter(batches))}[{axes}], or give a sampler the shape of all pairs."
                )
