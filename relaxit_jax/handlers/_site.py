"""A discrete latent site: the finite law of its distribution, and the relaxed site that replaces it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from numpyro import distributions as dist
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd
from relaxit_jax.handlers._autoregressive import Autoregressive
from relaxit_jax.samplers import _count as counts

# --- a relaxed site ---------------------------------------------------------------------------


class Relaxed(dist.Distribution):
    """Draws of a relaxation, scored as the discrete law they stand for.

    If the guide's law q is known (as the intermediate of its draw), `log_prob` is the expected log-mass
    ``sum_k q_k log p_k``. This gives -H(q) for the guide and -KL(q || p) for the model minus the guide,
    under every ELBO. Otherwise it is the log-mass, interpolated linearly between the values.
    """

    arg_constraints: dict[str, Any] = {"log_pmf": ct.log_weights}
    pytree_data_fields: tuple[str, ...] = ("relaxation", "log_pmf", "values")

    def __init__(
        self, relaxation: dist.Distribution, log_pmf: Array, values: np.ndarray | None = None
    ) -> None:
        self.relaxation, self.log_pmf, self.values = relaxation, log_pmf, values
        super().__init__(relaxation.batch_shape, relaxation.event_shape, validate_args=False)

    has_rsample: bool = True  # of the objective, which uses the relaxed draw as it is
    scores_another_law: bool = True  # so that no ratio of densities is used as a weight of the draw

    @property
    def support(self) -> ct.Constraint | None:
        return ct.Draws(self.relaxation.support)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> ArrayLike:
        return self.relaxation.sample(key, sample_shape)

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[ArrayLike, list[Any]]:
        shape = (*sample_shape, *self.batch_shape, self.log_pmf.shape[-1])
        return self.sample(key, sample_shape), [jnp.broadcast_to(self.log_pmf, shape)]

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Array:
        if intermediates:
            check_same_values(intermediates[0], self.log_pmf)
            return lm.expected_log_pmf(intermediates[0], self.log_pmf)
        value = jnp.asarray(value)
        weights = value if self.event_dim else weights_of_number(value, self.values)
        possible = self.log_pmf > -jnp.inf
        law = jnp.sum(weights * where(possible, self.log_pmf, 0), -1)
        return where(jnp.any(~possible & (weights > 0), -1), -jnp.inf, law)


@dist.kl_divergence.register(Relaxed, Relaxed)  # type: ignore[attr-defined]  # of multipledispatch
def _kl_of_relaxed_sites(p, q):
    check_same_values(p.log_pmf, q.log_pmf)
    return lm.discrete_kl(p.log_pmf, q.log_pmf)


def weights_of_number(value, values=None):
    """Weights of the values of a count, or of 0 and 1, from a number that may lie between two of them."""
    if values is None:
        return jnp.stack([1 - value, value], -1)
    return jnp.maximum(1 - jnp.abs(value[..., None] - values), 0)


def entry(table, name, default=None):
    """The entry for a site in a table by site. Its unobserved part also goes by the name of the site."""
    return table.get(name, table.get(name.removesuffix(UNOBSERVED), default))


def num_values_of(num_values, name):
    return entry(num_values, name) if isinstance(num_values, Mapping) else num_values


def check_num_values(num_values):
    """Require an integer, or a dictionary of them by site; None stands for as many as are needed."""
    own = num_values if isinstance(num_values, Mapping) else {None: num_values}
    for name, number in own.items():
        if number is not None:
            which = "num_values" if name is None else f"num_values[{name!r}]"
            arg.as_static_int(which, number, 1, counts.MOST_VALUES)


def check_same_values(log_q, log_p):
    here, there = log_q.shape[-1], log_p.shape[-1]
    need = "the same for the model and the guide, as an argument of relax and of AutoMeanField alike"
    arg.require(here == there, "num_values", need, f"{there} values in the model, {here} in the guide")


# --- the law of a discrete site ---------------------------------------------------------------


class FiniteDiscrete(dist.Distribution):
    """Integers with these log-probabilities: the discrete counterpart of a relaxed count."""

    arg_constraints: dict[str, Any] = {"logits": ct.log_weights}
    pytree_aux_fields: tuple[str, ...] = ("low",)

    def __init__(self, logits: Array, low: int = 0, *, validate_args: bool | None = None) -> None:
        self.logits, self.low = logits, low
        super().__init__(logits.shape[:-1], (), validate_args=validate_args)

    @property
    def has_enumerate_support(self) -> bool:
        return self.low == 0  # NumPyro replaces the values by 0, 1, ...

    @constraints.dependent_property(is_discrete=True, event_dim=0)  # type: ignore[arg-type]
    def support(self) -> ct.Constraint:  # type: ignore[override]  # NumPyro's is a property
        return constraints.integer_interval(self.low, self.low + self.logits.shape[-1] - 1)

    @property
    def _from_zero(self) -> dist.Distribution:
        return dist.CategoricalLogits(self.logits, validate_args=False)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> ArrayLike:
        return self._from_zero.sample(key, sample_shape) + self.low

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> ArrayLike:
        return self._from_zero.log_prob(value - self.low)

    def enumerate_support(self, expand: bool = True) -> Array:
        return self._from_zero.enumerate_support(expand) + self.low


CLASSES = (dist.CategoricalProbs, dist.CategoricalLogits, sd.OneHot)
TRIALS = (dist.MultinomialProbs, dist.MultinomialLogits)
UNOBSERVED = "_unobserved"  # NumPyro's name for the second half of a site with obs_mask
TAIL = 1e-8  # mass that a truncated count may add to its last value


@dataclasses.dataclass(frozen=True)
class Law:
    """The finite law of a discrete site."""

    kind: str  # bit, class, count
    log_pmf: Array  # with the batch shape and a last axis for the values, normalized
    values: np.ndarray | None = None  # for a count

    @property
    def logits(self) -> Array:
        """The parameter that relaxations of this type take."""
        if self.kind != "bit":
            return self.log_pmf
        return self.log_pmf[..., 1] - self.log_pmf[..., 0]


def as_classes(name, law):
    """The law of a bit or a count as a law of classes, where class k stands for the value k."""
    if law.kind != "count":
        return Law("class", law.log_pmf)
    low = int(law.values[0])
    arg.require(low >= 0, f"site '{name}'", "of values from 0 on to be one-hot", f"a least value of {low}")
    before = jnp.full((*law.log_pmf.shape[:-1], low), -jnp.inf, law.log_pmf.dtype)
    return Law("class", jnp.concatenate([before, law.log_pmf], -1))


def possible(law, d):
    """Which values can be drawn, as far as this is known; for a traced law all of them."""
    at_probs = isinstance(d, dist.BernoulliProbs)  # NumPyro scores it with a finite law at 0 and 1
    seen = d.probs if at_probs else law.log_pmf
    if isinstance(seen, Tracer):
        return np.ones(law.log_pmf.shape, bool)
    seen = np.asarray(seen)
    return np.stack([seen < 1, seen > 0], -1) if at_probs else seen > -np.inf


def law_of(name, d, num_values=None):
    """The law of the innermost distribution of the site `name`; `num_values` as in `relax`."""
    given = num_values_of(num_values, name)
    law = _law_of(name, d, given)
    if law.kind != "count" and isinstance(num_values, Mapping):
        need = f"left out, as a {type(d).__name__} has {law.log_pmf.shape[-1]} values"
        arg.require(given is None, f"num_values['{name}']", need, given)
    return law


def _law_of(name, d, num_values):
    if isinstance(d, dist.BernoulliLogits):
        return Law("bit", _kl.log_pmf_of_bits(jnp.asarray(d.logits)))
    if isinstance(d, dist.BernoulliProbs):
        # as NumPyro scores them: finite where a probability has been rounded to 0 or 1
        return Law("bit", jnp.stack([d.log_prob(0), d.log_prob(1)], -1))
    if isinstance(d, CLASSES):
        return Law("class", _kl.log_pmf_of_classes(d.logits))
    if isinstance(d, TRIALS):
        concrete = not isinstance(d.total_count, Tracer)
        arg.require(
            concrete and np.all(np.asarray(d.total_count) == 1),
            f"site '{name}'", "a Multinomial with one trial to be relaxed", f"{d.total_count} trials",
        )  # fmt: skip
        return Law("class", _kl.log_pmf_of_classes(d.logits))
    if isinstance(d, Autoregressive):
        raise ValueError(
            f"The site '{name}' is autoregressive in the guide, which relax cannot score. "
            f"Train it with RLOO_ELBO, or pass independent=['{name}'] to AutoStructured."
        )
    if isinstance(d, FiniteDiscrete):
        low, k = d.low, d.logits.shape[-1]
        return Law("count", _kl.log_pmf_of_classes(d.logits), np.arange(low, low + k, dtype=np.float32))
    arg.require(
        getattr(d, "event_dim", 1) == 0 and _lower_bound(d.support) is not None,
        f"site '{name}'", "observed, enumerated, or one of the discrete distributions that relax knows, or "
        "left as it is with config={'" + name + "': None}", type(d).__name__,
    )  # fmt: skip
    return _law_of_count(name, d, num_values)


def _lower_bound(support) -> Any:
    """The smallest value of a support of integers, None for any other."""
    if isinstance(support, type(constraints.nonnegative_integer)):
        return 0
    return getattr(support, "lower_bound", None)


def _law_of_count(name, d, num_values):
    low, high = _lower_bound(d.support), getattr(d.support, "upper_bound", None)
    seen = lambda x: not isinstance(x, Tracer)
    arg.require(seen(low), f"site '{name}'", "a count whose smallest value is known before tracing", low)
    low = int(np.min(np.asarray(low)))
    bounded = high is not None and seen(high)
    whole = int(np.max(np.asarray(high))) - low + 1 if bounded else None
    if num_values is not None:
        k = arg.as_static_int("num_values", num_values, 1, counts.MOST_VALUES)
    elif whole is not None:
        k = whole
    else:
        need = f"given for the site '{name}', whose range is traced"
        arg.require(high is None, "num_values", need, None)
        k = _enough_values(name, d, low)
    beyond = k + 64 if whole is None else max(whole - k, 0)
    log_pmf = _log_pmf(d, np.arange(low, low + k + beyond))
    if beyond:
        log_pmf = counts.fold_tail(log_pmf, k)
    values = np.arange(low, low + k, dtype=np.float32)
    return Law("count", jax.nn.log_softmax(log_pmf, -1), values)


def _log_pmf(d, values):
    """log P(value) on a last axis; -inf outside the support."""
    quiet = copy.copy(d)
    quiet._validate_args = False  # values outside are intended
    at = jnp.asarray(values).reshape(-1, *(1,) * len(d.batch_shape))
    inside = jnp.broadcast_to(quiet.support(at), (len(values), *d.batch_shape))
    safe = where(inside, at, _lower_bound(d.support))
    return jnp.moveaxis(where(inside, quiet.log_prob(safe), -jnp.inf), 0, -1)


def _enough_values(name, d, low):
    """Enough values to leave out less mass than TAIL."""
    need = (
        f"given for the site '{name}', a {type(d).__name__} whose parameters are traced: the number of its "
        "values is fixed before tracing (for a mean m and a standard deviation s, m + 6 s is enough)"
    )
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(d))
    arg.require(not traced, "num_values", need, None)
    k: Any = counts.enough_values(lambda values: _log_pmf(d, low + values), TAIL)
    got = f"more than {counts.MOST_VALUES}"
    arg.require(k is not None, "num_values", f"given for the site '{name}'", got)
    return k
