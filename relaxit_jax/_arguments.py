"""What can be known before tracing is checked before tracing, by a ValueError that names the argument."""

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
    """Raise ValueError naming the argument, what it needs and what it got."""
    if not condition:
        raise ValueError(f"{name} must be {need}, got {got}.")


def can_be_seen(x):
    """Whether the values of x are known here: neither traced nor held by other processes."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    traced = any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(parts))
    return not traced and getattr(x, "is_fully_addressable", True)


_values_are_checked = contextvars.ContextVar("_values_are_checked", default=True)


@contextlib.contextmanager
def check_values(flag):
    """Whether `require_values` looks, for the distributions whose `validate_args` is False."""
    token = _values_are_checked.set(flag)
    try:
        yield
    finally:
        _values_are_checked.reset(token)


def require_values(name, x, need, holds):
    """`require` that `holds` of the values of x, where they can be seen.

    NumPy looks at them, since inside a jitted function even the operations of jax on constants are
    traced.
    """
    if _values_are_checked.get() and can_be_seen(x):
        try:
            values = np.asarray(x)
        except (TypeError, ValueError):  # keys, a ragged list
            values = np.asarray(None)
        require(_is_real(values.dtype), name, "an array of numbers", shown(x))
        _refuse_narrow(name, values.dtype)
        require(np.all(holds(values)), name, need, x)


def shown(x):
    """How an error shows an argument of the wrong kind: on one line, whatever it is."""
    dtype = getattr(x, "dtype", None)
    if dtype is not None and not isinstance(x, type) and not _is_real(dtype):
        return f"dtype {dtype}"
    text = " ".join(repr(x).split())
    return text if len(text) <= 100 else f"{text[:96]} ..."


def _is_real(dtype):
    """Whether values of this dtype are real numbers. NumPy takes bfloat16 for void; keys have no kind."""
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
    """`x` as an array of booleans, integers or floats: a draw of an exact law may have any of these."""
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
    """The shape of an array, or of what stands for one."""
    return x.shape if isinstance(x, (jax.Array, np.ndarray, np.generic)) else as_array(name, x).shape


def wide(dtype):
    """float32 or wider, for what is computed with numbers of this dtype."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widen(**parameters):
    """The dtype of a result in these parameters, then each of them in float32 or wider."""
    arrays = [as_float(name, x) for name, x in parameters.items()]
    with jax.numpy_dtype_promotion("standard"):  # parameters of 16 bits have log-space values of 32
        dtype = jnp.result_type(*arrays)
    return dtype, *(x.astype(wide(dtype)) for x in arrays)


def as_tau(tau, dtype, name="tau"):
    """A temperature in the dtype of the computation (a schedule's float32 never widens a result)."""
    return as_positive(name, tau, dtype)


def as_positive(name, x, dtype):
    """`x` in the dtype of the computation; NaN where it is not positive and a trace hid it."""
    with np.errstate(over="ignore"):
        require_values(name, x, "positive", lambda x: x.astype(dtype) > 0)
    array = as_float(name, x).astype(dtype)
    # added, so that the gradient in x is not cut off: it is NaN where x is
    return array if can_be_seen(x) else array + jnp.where(array > 0, 0, jnp.nan)


def widen_with_scale(loc, scale):
    """`widen` of a mean and a positive scale."""
    dtype, loc, _ = widen(loc=loc, scale=scale)
    return dtype, loc, as_positive("scale", scale, loc.dtype)


def require_positive(name, x):
    require_values(name, x, "positive", lambda x: x > 0)


def require_event(name, x):
    """The event axis is last, and not empty; its size."""
    shape = shape_of(name, x)
    require(shape[-1:] not in ((), (0,)), name, "an array whose last axis is not empty", f"shape {shape}")
    return shape[-1]


def require_same_event(value, parameter):
    """A value has as many classes as the parameters."""
    size = parameter.shape[-1]
    require(value.shape[-1] == size, "value", f"of shape (..., {size})", f"shape {value.shape}")


def require_classes(logits, at_least=1, name="logits"):
    """Categorical logits: an event axis, on which enough classes are possible; its size."""
    size = require_event(name, logits)
    need = f"above -inf for at least {at_least} of the classes"
    require_values(name, logits, need, lambda x: (x == -np.inf).sum(-1) <= x.shape[-1] - at_least)
    return size


def subset_args(logits, k):
    """k, logits of which at least k are possible, widened, and the dtype of a result."""
    k = as_static_int("k", k, 1, require_event("logits", logits))
    require_classes(logits, at_least=k)
    dtype, logits = widen(logits=logits)
    return k, logits, dtype


def require_square(name, x, size):
    """Matrices of shape (..., size, size)."""
    shape = shape_of(name, x)
    require(shape[-2:] == (size, size), name, f"of shape (..., {size}, {size})", f"shape {shape}")


def require_scale_tril(scale_tril, size):
    """A lower-triangular factor of shape (..., size, size)."""
    require_square("scale_tril", scale_tril, size)
    require_values("scale_tril", scale_tril, "lower triangular", lambda x: x == np.tril(x))


def as_static_int(name, x, low, high):
    """A Python integer in [low, high]: it sets shapes, so it cannot be traced."""
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
    """Options that are on or off. Python would take "no", or "False", for True."""
    for name, x in flags.items():
        require(isinstance(x, (bool, np.bool_)), name, "True or False, known before tracing", shown(x))


def require_form(hard, log_space):
    """A hard sample has no form in log space."""
    require_flags(hard=hard, log_space=log_space)
    require(not (hard and log_space), "log_space", "False for a hard sample", log_space)


def require_choice(name, x, choices):
    """One of these strings."""
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

    ``per_event`` has the shapes of parameters that have no event axis, where others have one.
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
    """No (B, 1) beside a batch of (B,): it would stand for B x B pairs where (B,) was meant.

    It is one if the parameter has more axes than the batch, and fewer draws without its last ones of size 1.
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
                    f"{name} must have the batch shape and no axis for the event, got shape {shape} beside a "
                    f"batch of shape {batch}. Write {name}[...{index}]; if you want every pair of the two, "
                    f"write {next(iter(batches))}[{axes}], or give a sampler the shape of all pairs."
                )
