"""The thin NumPyro class around a sampler and its density, and its parameters as users pass them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from numpyro.distributions import Distribution
from numpyro.distributions.distribution import DistributionMeta
from numpyro.distributions.util import lazy_property, validate_sample

from relaxit_jax import _arguments as arg
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct

# --- parameters as users pass them ---------------------------------------------------------------


SLACK = 1e-4  # how far rounding may have moved a probability, or a sum of them, above 1


def bit_logits(probs) -> Array:
    """The log-odds; infinite for a probability of 0 or 1. Rounding above 1 is treated as 1."""
    dtype, p = arg.widen(probs=probs)
    most = 1 + SLACK + 2 * float(jnp.finfo(dtype).eps)
    arg.require_values("probs", probs, "in [0, 1]", lambda p: (p >= 0) & (p <= most))
    p = where((p > 1) & (p <= most), 1, p)
    return (jnp.log(p) - jnp.log1p(-p)).astype(dtype)


def class_logits(probs) -> Array:
    """The log-probabilities; a probability of 0 is an impossible class."""
    arg.require_event("probs", probs)
    arg.require_values("probs", probs, "not negative", lambda p: p >= 0)
    dtype, p = arg.widen(probs=probs)
    slack = SLACK + p.shape[-1] * float(jnp.finfo(dtype).eps)
    arg.require_values("probs", probs, "of sum 1", lambda p: abs(p.astype(float).sum(-1) - 1) <= slack)
    return where(p == 0, -jnp.inf, jnp.log(where(p == 0, 1, p))).astype(dtype)


def check_temperature(temperature, validate_args):
    """Check the parameter that Pyro's signature calls `temperature`, before the class calls it `tau`."""
    arg.as_float("temperature", temperature)
    with arg.check_values(Distribution._validate_args if validate_args is None else validate_args):
        arg.require_positive("temperature", temperature)


def per_coordinate(scale, size):
    """Require a scale whose event axis has this size."""
    fits = scale.shape[-1:] in ((), (1,), (size,))
    arg.require(fits, "scale", f"of shape (..., {size})", f"shape {scale.shape}")
    numpy = np if isinstance(scale, np.ndarray) else jnp
    return numpy.broadcast_to(scale, (*scale.shape[:-1], size))


class _Derived(lazy_property):
    """A property computed each time: NumPyro's cached one would look like a parameter that was passed."""

    def __get__(self, instance: Any, obj_type: Any = None) -> Any:
        return self if instance is None else self.wrapped(instance)


def derived(of: Callable[[Any], Array]) -> Any:
    """A parameter that is computed because another was passed instead."""
    return _Derived(of)


def _values(x, array):
    """The values of x in the dtype of its array, as NumPy values; the array itself if they are traced."""
    with np.errstate(all="ignore"):  # overflow is stored as an infinity, and checked as one
        return np.asarray(x, array.dtype) if arg.can_be_seen(x) else array


def logit_quantile(logits, q):
    """The q-quantile of logits + L, L standard logistic; certain bits stay certain at q = 0 and 1 too."""
    return where(jnp.isinf(logits), logits, logits + jnp.log(q) - jnp.log1p(-q))


def without_batch_of_one(x, event_dim):
    """A matrix without its batch axes if they all have size one, so the samplers do not copy it."""
    shared = event_dim == 2 and x.size == x.shape[-1] * x.shape[-2]
    return x.reshape(x.shape[-2:]) if shared else x


# --- the thin class ---------------------------------------------------------------------------

D = TypeVar("D")
F = TypeVar("F", bound=Callable[..., Any])


def validated(log_prob: F) -> F:
    """NumPyro's `validate_sample`, whose constraints accept only arrays of numbers."""
    check_support = validate_sample(log_prob)

    @functools.wraps(log_prob)
    def checked(self, value, *args, **kwargs):
        arg.as_number("value", value)
        return check_support(self, value, *args, **kwargs)

    return cast(F, checked)


class Made(DistributionMeta):
    """NumPyro's metaclass. It tells type checkers that calling a class creates one of its instances."""

    if TYPE_CHECKING:

        def __call__(cls: type[D], *args: Any, **kwargs: Any) -> D: ...

    else:

        def __call__(cls, *args, **kwargs):
            # Pyro and NumPyro have classes of the same names whose parameters come in another order
            taken = inspect.signature(cls).parameters.values()
            if args and all(p.kind is p.KEYWORD_ONLY for p in taken):
                raise TypeError(f"{cls.__name__} takes its parameters by keyword: {cls._calls()}")
            return super().__call__(*args, **kwargs)


class Carried(NamedTuple):
    """Extra information that a draw hands on for scoring, next to its value."""

    unrounded: Array | None  # the draw in the form of `_log_space`, with the axes of the value
    atoms: Array | None  # P(0) and P(1) of the law it was drawn from, on one more axis


def _crossing(atoms, jumps):
    """A term with value 0 whose gradient comes from the mass that moves into the atoms.

    E g(z) changes by ``dP (g(atom) - g(next to it))`` where mass dP enters an atom, and the derivative of a
    draw does not include that. Here g is a log-law, which jumps there by ``-jumps``.
    """
    jumps = jax.lax.stop_gradient(where(jnp.isfinite(jumps), jumps, 0))
    return jnp.sum((atoms - jax.lax.stop_gradient(atoms)) * jumps, -1)


def without_slope(value, message):
    """The value. Taking a derivative in it is an error while the program is traced."""

    @jax.custom_jvp
    def held(value):
        return value

    def refuse(primals, tangents):
        if not isinstance(tangents[0], SymbolicZero):
            raise ValueError(message)
        return primals[0], tangents[0]

    held.defjvp(refuse, symbolic_zeros=True)
    return held(jnp.asarray(value))


class SamplerDistribution(Distribution, metaclass=Made):
    """A NumPyro distribution made from a sampler and its density.

    A subclass sets them (`_sampler`, `_density`), its parameters (`arg_constraints`, the arguments of the
    sampler), the static options of the sampler (`pytree_aux_fields`), and `_event`, the event shape as a
    function of the parameters' shapes.
    """

    support: ct.Constraint  # type: ignore[assignment]  # NumPyro's is a property
    pytree_aux_fields: tuple[str, ...] = ()
    reparametrized_params: list[str] = []
    _sampler: Callable[..., Array]
    _density: Callable[..., Array] | None = None
    _log_space: Hashable = None  # the unrounded form that the sampler returns for the density
    _pathwise: bool = True  # whether the derivative of a draw is the whole gradient of its law
    _either: tuple[str, str] = ("logits", "probs")  # exactly one of the two is passed
    _per_coordinate: tuple[str, ...] = ()  # a scalar for one of these counts for the whole event
    _event: Callable[..., tuple[int, ...]] = staticmethod(lambda shapes: ())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.reparametrized_params = list(cls.arg_constraints) if cls._pathwise else []

    def __init__(
        self,
        validate_args: bool | None,
        static: Mapping[str, Any] | None = None,
        **parameters: ArrayLike | None,
    ) -> None:
        checked = self._validate_args if validate_args is None else validate_args
        if "probs" in parameters:
            parameters["logits"] = self._logits(parameters["logits"], parameters.pop("probs"), checked)
        for name, x in parameters.items():
            arg.require(x is not None or name in self._either, name, "given", None)
        arrays = {name: arg.as_float(name, x) for name, x in parameters.items() if x is not None}
        # NumPyro's checks see the values as they came: an array made inside a jitted function is traced
        values = {name: _values(parameters[name], x) if checked else x for name, x in arrays.items()}
        for name in arrays:
            if name in self._per_coordinate:
                size = arrays["loc"].shape[-1]
                arrays[name], values[name] = (per_coordinate(x[name], size) for x in (arrays, values))
            if self.arg_constraints[name].event_dim:
                arg.require_event(name, arrays[name])
        batch_shape, event_shape = self._shapes({name: x.shape for name, x in arrays.items()})
        for name, x in (values | dict(static or {})).items():
            setattr(self, name, x)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        self._given = parameters  # constants, if they were passed as constants inside a jitted function
        # all of one rank, as in NumPyro: axes that vmap or scan put in front then line up
        for name, x in arrays.items():
            missing = len(batch_shape) + self.arg_constraints[name].event_dim - x.ndim
            setattr(self, name, x.reshape((1,) * missing + x.shape) if missing else x)

    def validate_args(self, strict: bool = True) -> None:
        """Check concrete values as NumPyro does; skip traced ones, on which its check fails in shard_map."""
        for name, x in self.get_args().items():
            if arg.can_be_seen(x):
                with jax.ensure_compile_time_eval():
                    valid = self.arg_constraints[name](x)
                if not np.all(valid):
                    raise ValueError(f"{type(self).__name__} distribution got invalid {name} parameter.")
            elif strict:
                raise RuntimeError("Cannot validate arguments inside jitted code.")

    def _logits(self, logits, probs, checked):
        """Get the logits of bits or classes from exactly one of the two."""
        arg.require((logits is None) != (probs is None), "logits", "given, or else probs", "both or neither")
        if probs is None:
            return logits
        constraint = self.arg_constraints["logits"]
        of_bits = getattr(constraint, "base_constraint", constraint) is ct.log_odds
        try:
            with arg.check_values(checked):
                return bit_logits(probs) if of_bits else class_logits(probs)
        except ValueError as error:
            kind = type(self).__name__
            raise ValueError(f"{kind} distribution got invalid probs parameter: {error}") from None

    def _arguments(self):
        """The arguments of the sampler and the density besides key and value."""
        shared = {name: without_batch_of_one(x, self.arg_constraints[name].event_dim)
                  for name, x in self.get_args().items()}  # fmt: skip
        return shared | {name: getattr(self, name) for name in self.pytree_aux_fields}

    @classmethod
    def _shapes(cls, shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = {name: cls.arg_constraints[name].event_dim for name in shapes}
        batches = {name: shape[: len(shape) - dims[name]] for name, shape in shapes.items()}
        for name, shape in shapes.items():
            need = f"of at least {dims[name]} axes"
            arg.require(len(shape) >= dims[name], name, need, f"shape {shape}")
        return arg.batch_shape(None, **batches), cls._event(shapes)

    @classmethod
    def _calls(cls) -> str:
        """The calls that an error shows, with the parameters that have no default."""
        taken = inspect.signature(cls).parameters.values()
        needed = [p.name for p in taken if p.default in (None, p.empty) and p.name != "validate_args"]
        first, second = cls._either
        names = [name for name in needed if name != second]
        calls = [names, [second if name == first else name for name in names]][: 1 + (first in names)]
        return " or ".join(f"{cls.__name__}({', '.join(f'{n}=...' for n in names)})" for names in calls)

    @classmethod
    def infer_shapes(cls, *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        names = list(inspect.signature(cls).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("probs") is not None:
            given["logits"] = given["probs"]
        shapes = {name: x for name, x in given.items() if name in cls.arg_constraints and x is not None}
        scalars = {name: (1,) for name in cls._per_coordinate if shapes.get(name) == ()}
        return cls._shapes(shapes | scalars)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        return self._draw(key, sample_shape)

    def _draw(self, key, sample_shape, **extra):
        sample_shape = arg.as_shape("sample_shape", sample_shape)
        with self._checks():
            return self._sampler(key, shape=(*sample_shape, *self.batch_shape), **self._arguments(), **extra)

    def _checks(self):
        """The checks of the sampler and the density, including values unless `validate_args` is False."""
        return arg.check_values(self._validate_args is not False)

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Carried]]:
        """The draw, and the form in which its law must be evaluated if rounding or atoms would falsify it."""
        value = self.sample(key, sample_shape)
        shape = (*sample_shape, *self.batch_shape)
        unrounded, atoms = None, self._atoms()
        if self._log_space:
            unrounded = self._draw(key, sample_shape, log_space=True)
        if atoms is not None:
            atoms = jnp.broadcast_to(atoms, (*shape, 2))
        nothing = unrounded is None and atoms is None
        return value, [] if nothing else [Carried(unrounded, atoms)]

    @validated
    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        if self._density is None:
            raise NotImplementedError(f"{type(self).__name__} has no density")
        if not intermediates:
            if self._no_slope:
                value = without_slope(value, f"{type(self).__name__}: {self._no_slope}")
            return self._law(value)
        unrounded, atoms = intermediates[0]
        law = self._law(value) if unrounded is None else self._law(unrounded, log_space=True)
        return law if atoms is None else law - _crossing(atoms, self._jumps())

    def _law(self, value, **form):
        """The density of the sampler at a value."""
        assert self._density is not None
        with self._checks():
            return self._batched(self._density(value, **self._arguments(), **form))

    @property
    def _no_slope(self) -> str | None:
        """Why the log-probability must not be differentiated in a draw alone, or None if it may be."""
        return None

    def _atoms(self) -> Array | None:
        """P(0) and P(1) for a law with these atoms, on a last axis."""
        return None

    def _jumps(self) -> Array:
        """How far the log-law rises from each atom to the density next to it."""
        raise NotImplementedError

    def _batched(self, x):
        """Broadcast to the batch shape, even if only an unused parameter (tau of exact bits) has it."""
        return jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, self.batch_shape))

    def _full(self, x):
        """A moment in its full shape."""
        return jnp.broadcast_to(x, self.batch_shape + self.event_shape)


class Bit(SamplerDistribution):
    """A distribution that stands for a Bernoulli with these log-odds."""

    @property
    def log_odds(self) -> Array:
        return self.get_args()["logits"]

    @property
    def probs(self) -> Array:
        """The probability of a one."""
        return jax.nn.sigmoid(self.log_odds)


class OneHot(SamplerDistribution):
    """A distribution that stands for a one-hot categorical with these logits."""

    logits: Array
    _event = staticmethod(lambda shapes: shapes["logits"][-1:])

    @property
    def probs(self) -> Array:
        """The probabilities of the classes."""
        return jax.nn.softmax(self.logits, -1)
