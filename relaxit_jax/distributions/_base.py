"""What the distributions share: one thin class over a sampler and its density, constraints, discrete KL."""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, constraints, kl_divergence
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.distribution import DistributionMeta, ExpandedDistribution
from numpyro.distributions.transforms import StickBreakingTransform, biject_to
from numpyro.distributions.util import validate_sample

from relaxit_jax import _checks as ck

Constraint = constraints.Constraint[Any]

# --- constraints ------------------------------------------------------------------------------


class _LogOdds(constraints.ParameterFreeConstraint):
    """Real numbers and both infinities: certain bits are bits."""

    def __call__(self, x):
        return x == x  # not NaN

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _LogWeights(constraints.ParameterFreeConstraint):
    """Categorical logits: -inf is an impossible class, but one class has to be possible."""

    event_dim = 1

    def __call__(self, x):
        return (x < np.inf).all(-1) & (x > -np.inf).any(-1)

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _Simplex(constraints.ParameterFreeConstraint):
    """The simplex, to the rounding of the dtype: NumPyro's own allows 1e-6, which bfloat16 misses."""

    event_dim = 1

    def __call__(self, x):
        slack = 8 * float(jnp.finfo(x.dtype).eps)
        total = x.astype(jnp.promote_types(x.dtype, jnp.float32)).sum(-1)
        return (x >= 0).all(-1) & (abs(total - 1) <= slack)

    def feasible_like(self, prototype):
        return jnp.full_like(prototype, 1 / prototype.shape[-1])


class _OneHot(constraints.ParameterFreeConstraint):
    """Vectors of zeros with a single one."""

    event_dim = 1
    is_discrete = True

    def __call__(self, x):
        return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype).at[..., 0].set(1)


log_odds, log_weights, simplex, one_hot = _LogOdds(), _LogWeights(), _Simplex(), _OneHot()
biject_to.register(log_odds)(lambda _: biject_to(constraints.real))
biject_to.register(log_weights)(lambda _: biject_to(constraints.real_vector))
biject_to.register(simplex)(lambda _: StickBreakingTransform())


# --- probabilities to logits, in log space ----------------------------------------------------


def bit_logits(logits, probs) -> ArrayLike:
    """The log-odds, from exactly one of the two; a probability of 0 or 1 is an infinite one."""
    if not _given_by_probs(logits, probs):
        return logits
    inside = lambda p: (p >= 0) & (p <= 1)
    ck.require_values("probs", probs, "in [0, 1]", inside)
    dtype, p = ck.widen(probs=probs)
    return (jnp.log(p) - jnp.log1p(-p)).astype(dtype)


def class_logits(logits, probs) -> ArrayLike:
    """The log-probabilities, from exactly one of the two; a probability of 0 is an impossible class."""
    if not _given_by_probs(logits, probs):
        return logits
    ck.require_event("probs", probs)
    ck.require_values("probs", probs, "not negative", lambda p: p >= 0)
    dtype, p = ck.widen(probs=probs)
    slack = 1e-4 + p.shape[-1] * float(jnp.finfo(dtype).eps)
    ck.require_values("probs", probs, "of sum 1", lambda p: abs(p.astype(float).sum(-1) - 1) <= slack)
    possible = p > 0
    return jnp.where(possible, jnp.log(jnp.where(possible, p, 1)), -jnp.inf).astype(dtype)


def _given_by_probs(logits, probs):
    ck.require((logits is None) != (probs is None), "logits", "given, or else probs", "both or neither")
    return probs is not None


def per_coordinate(scale, loc):
    """A scale with the event axis of its loc."""
    if scale is None or loc is None:
        return scale
    ck.require_event("loc", loc)
    scale = ck.as_float("scale", scale)
    size = jnp.shape(loc)[-1]
    ck.require(
        scale.shape[-1:] in ((), (1,), (size,)), "scale", f"of shape (..., {size})", f"shape {scale.shape}"
    )
    return jnp.broadcast_to(scale, (*scale.shape[:-1], size))


def logit_quantile(logits, q):
    """The q-quantile of logits + L, L standard logistic; certain bits are certain at q = 0 and 1 too."""
    return jnp.where(jnp.isinf(logits), logits, logits + jnp.log(q) - jnp.log1p(-q))


def without_batch_of_one(x, event_dim):
    """A matrix without its batch axes, if they are all of size one: the samplers do not copy it then."""
    shared = event_dim == 2 and x.size == x.shape[-1] * x.shape[-2]
    return x.reshape(x.shape[-2:]) if shared else x


# --- the thin class ---------------------------------------------------------------------------

D = TypeVar("D")
F = TypeVar("F", bound=Callable[..., Any])


def validated(log_prob: F) -> F:
    """NumPyro's `validate_sample`, for which all signatures are one."""
    return cast(F, validate_sample(log_prob))


class Made(DistributionMeta):
    """NumPyro's metaclass. A type checker learns here that calling a class makes one of its instances."""

    if TYPE_CHECKING:

        def __call__(cls: type[D], *args: Any, **kwargs: Any) -> D: ...

    else:

        def __call__(cls, *args, **kwargs):
            # Pyro and NumPyro have classes of the same names whose parameters come in another order
            taken = inspect.signature(cls).parameters.values()
            if args and all(p.kind is p.KEYWORD_ONLY for p in taken):
                raise TypeError(f"{cls.__name__} takes its parameters by keyword: {cls._calls()}")
            return super().__call__(*args, **kwargs)


class SamplerDistribution(Distribution, metaclass=Made):
    """A NumPyro distribution made of a sampler and its density.

    A subclass names them (`_sampler`, `_density`), its parameters (`arg_constraints`, the arguments
    of the sampler), what of the sampler's options is static (`pytree_aux_fields`), and `_event`, the
    event shape by the parameters' shapes.
    """

    support: Constraint  # type: ignore[assignment]  # NumPyro's is a property
    pytree_aux_fields: tuple[str, ...] = ()
    reparametrized_params: list[str] = []
    _sampler: Callable[..., Array]
    _density: Callable[..., Array] | None = None
    _log_space: Hashable = None  # what the sampler returns unrounded, for the density
    _either: tuple[str, str] = ("logits", "probs")  # one of the two is given
    _per_coordinate: tuple[str, ...] = ()  # of these a scalar counts for the whole event
    _event: Callable[..., tuple[int, ...]] = staticmethod(lambda shapes: ())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not getattr(cls.support, "is_discrete", False):  # what is not declared discrete has gradients
            cls.reparametrized_params = list(cls.arg_constraints)

    def __init__(
        self,
        validate_args: bool | None,
        static: Mapping[str, Any] | None = None,
        **parameters: ArrayLike | None,
    ) -> None:
        for name, x in parameters.items():
            ck.require(x is not None or name in self._either, name, "given", None)
            setattr(self, name, None if x is None else ck.as_float(name, x))
        for name, x in (static or {}).items():
            setattr(self, name, x)
        shapes = {name: x.shape for name, x in self.get_args().items()}
        batch_shape, event_shape = self._shapes(shapes)
        # all of one rank, as NumPyro's own: what vmap or scan put in front then lines up
        for name, x in self.get_args().items():
            missing = len(batch_shape) + self.arg_constraints[name].event_dim - x.ndim
            if missing:
                setattr(self, name, x.reshape((1,) * missing + x.shape))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def get_args(self) -> dict[str, Array]:
        return {name: x for name in self.arg_constraints if (x := getattr(self, name)) is not None}

    def _arguments(self):
        """What the sampler and the density take beside key and value."""
        shared = {name: without_batch_of_one(x, self.arg_constraints[name].event_dim)
                  for name, x in self.get_args().items()}  # fmt: skip
        return shared | {name: getattr(self, name) for name in self.pytree_aux_fields}

    @classmethod
    def _shapes(cls, shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = {name: cls.arg_constraints[name].event_dim for name in shapes}
        batches = {name: shape[: len(shape) - dims[name]] for name, shape in shapes.items()}
        for name, shape in shapes.items():
            need = f"of at least {dims[name]} axes"
            ck.require(len(shape) >= dims[name], name, need, f"shape {shape}")
        return ck.batch_shape(None, **batches), cls._event(shapes)

    @classmethod
    def _calls(cls) -> str:
        """The calls that an error shows: with the parameters that have no default."""
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
        return self._sampler(key, shape=(*sample_shape, *self.batch_shape), **self._arguments())

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Array]]:
        """The draw, and the same draw unrounded in log space where the density is to be taken there."""
        value = self.sample(key, sample_shape)
        if not self._log_space:
            return value, []
        shape = (*sample_shape, *self.batch_shape)
        return value, [self._sampler(key, shape=shape, log_space=True, **self._arguments())]

    @validated
    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        if self._density is None:
            raise NotImplementedError(f"{type(self).__name__} has no density")
        if intermediates and self._log_space:
            return self._batched(self._density(intermediates[0], log_space=True, **self._arguments()))
        return self._batched(self._density(value, **self._arguments()))

    def _batched(self, x):
        """Of the batch shape also where a parameter that has it does not count, as tau of exact bits."""
        return jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, self.batch_shape))

    def _full(self, x):
        """A moment in its full shape."""
        return jnp.broadcast_to(x, self.batch_shape + self.event_shape)


@promote_batch_shape.register
def _(d: SamplerDistribution):
    """As NumPyro's, but a parameter that was not given has no shape."""
    new = jax.tree.unflatten(*reversed(jax.tree.flatten(d)))
    new._batch_shape = jnp.broadcast_shapes(
        d.batch_shape, d._shapes({name: jnp.shape(x) for name, x in d.get_args().items()})[0]
    )
    return new


class Bit(SamplerDistribution):
    """A distribution that stands for a Bernoulli, of these log-odds."""

    @property
    def log_odds(self) -> Array:
        return self.get_args()["logits"]

    @property
    def probs(self) -> Array:
        """The probability of a one."""
        return jax.nn.sigmoid(self.log_odds)


class OneHot(SamplerDistribution):
    """A distribution that stands for a one-hot categorical, of these logits."""

    logits: Array
    _event = staticmethod(lambda shapes: shapes["logits"][-1:])

    @property
    def probs(self) -> Array:
        """The probabilities of the classes."""
        return jax.nn.softmax(self.logits, -1)

    def expand(self, batch_shape: Sequence[int]) -> Distribution:
        batch_shape = tuple(batch_shape)
        return self if batch_shape == self.batch_shape else ExpandedOneHot(self, batch_shape)


class ExpandedOneHot(ExpandedDistribution):
    """An expanded one-hot distribution; NumPyro's own enumerates scalars only."""

    def expand(self, batch_shape: Sequence[int]) -> Distribution:
        return ExpandedOneHot(self, tuple(batch_shape))

    def enumerate_support(self, expand: bool = True) -> Array:
        values = self.base_dist.enumerate_support(expand=False)
        shape = values.shape[:1] + (1,) * len(self.batch_shape) + self.event_shape
        values = values.reshape(shape)
        return jnp.broadcast_to(values, shape[:1] + self.batch_shape + self.event_shape) if expand else values


# --- KL ---------------------------------------------------------------------------------------


def kl_rule(*pairs):
    """Register a KL for these pairs of classes; its result gets the batch shape of both together."""

    def register(rule):
        def kl(p, q):
            return jnp.broadcast_to(rule(p, q), jnp.broadcast_shapes(p.batch_shape, q.batch_shape))

        for pair in pairs:
            kl_divergence.register(*pair)(kl)  # type: ignore[attr-defined]  # of multipledispatch
        return rule

    return register


def log_pmf_of_bits(logits):
    """log P(0) and log P(1) on a last axis."""
    _, logits = ck.widen(logits=logits)
    return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], -1)


def log_pmf_of_classes(logits):
    """Normalised log-probabilities, float32 or wider."""
    _, logits = ck.widen(logits=logits)
    return jax.nn.log_softmax(logits, -1)


def expected_log_pmf(log_q, log_p):
    """sum_k q_k log p_k over the last axis, in which 0 log 0 is 0."""
    possible = log_q > -jnp.inf
    return jnp.sum(jnp.where(possible, jnp.exp(log_q) * jnp.where(possible, log_p, 0), 0), -1)


def discrete_kl(log_q, log_p):
    """sum_k q_k (log q_k - log p_k) over the last axis."""
    return expected_log_pmf(log_q, log_q) - expected_log_pmf(log_q, log_p)


class NoClosedForm(NotImplementedError, ValueError):
    """A KL without a closed form: NumPyro's ELBO estimates it, to anyone else it is a bad argument."""


def only_at_equal(name, p, q, kl):
    """`kl`, which holds if both have the same temperature or the like; NaN where traced ones differ."""
    a, b = getattr(p, name), getattr(q, name)
    if not any(isinstance(x, Tracer) for x in (a, b)) and np.any(np.asarray(a != b)):
        kind = type(p).__name__
        raise NoClosedForm(f"{name} must be the same in both {kind} for their KL, got {a} and {b}")
    return jnp.where(a == b, kl, jnp.nan)
