"""A mean-field guide made from a model with discrete latents."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous, AutoNormal
from numpyro.infer.inspect import get_dependencies

from relaxit_jax import _checks as ck
from relaxit_jax import distributions as rd
from relaxit_jax.distributions import _site as site
from relaxit_jax.handlers import _base as base


class auto_guide:
    """A mean-field guide for a model with discrete latents.

    Every element of every discrete latent site gets logits of its own, which start at those of the
    prior, or all alike if the prior depends on other draws; Poisson and other counts get one for each
    of finitely many values. Continuous sites get NumPyro's `AutoNormal`. The guide has discrete sites:
    wrap it in `relax` to train it, and leave it unwrapped to draw from what was trained.

    It reads the model when it is first called, which should be outside of `jax.jit` (`SVI.init` does
    so): inside, the prior's probabilities cannot be seen, and the logits start at zero.

    Masked sites are masked in the guide too where the mask can be seen when the guide is first
    called. Sites in subsampled plates get parameters for the whole plate.

    Args:
      model: the model, not relaxed.
      continuous: what makes the guide of the continuous sites from a model: an `AutoGuide` class, or
        one with its options, ``functools.partial(AutoNormal, init_loc_fn=init_to_mean)``. A joint one,
        such as `AutoMultivariateNormal`, is made once, for all continuous sites. NumPyro
        starts at random otherwise, where a coefficient of the wrong sign can switch a bit off.
      num_values: how many values a count takes, as in `relax`; to be given where its parameters are
        draws of other sites, as nothing else says how many are enough.
      prefix: part of the parameters' names, ``<site>_<prefix>_logits``.

    Returns:
      A guide: a callable with the arguments of the model. `probs` and `median` read what was
      trained, of the discrete and of the continuous sites.

    Raises:
      ValueError: when first called, for a site that cannot be relaxed; when it is read and was not
        called yet.

    References:
      D. M. Blei, A. Kucukelbir, J. D. McAuliffe (2017), Variational Inference: A Review for
      Statisticians, arXiv:1601.00670.

    >>> model = lambda: numpyro.sample("z", dist.Categorical(jnp.array([0.1, 0.9])))
    >>> guide = auto_guide(model)
    >>> trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    >>> probs = guide.probs({"z_auto_logits": trace["z_auto_logits"]["value"]})
    >>> print(f"{probs['z'][1]:.4f}")
    0.9000
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        continuous: Callable[..., Any] = AutoNormal,
        num_values: int | dict[str, int] | None = None,
        prefix: str = "auto",
    ) -> None:
        self.model: Callable[..., Any] = model
        self.continuous: Callable[..., Any] = continuous
        self.num_values: int | dict[str, int] | None = num_values
        self.prefix: str = prefix
        self._parts = None

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        if self._parts is None:
            self._setup(args, kwargs)
        self._plates = {
            name: numpyro.plate(name, size, dim=dim, subsample_size=subsample)
            for name, (size, subsample, dim) in self._frames.items()
        }
        values = {}
        for part in self._parts:
            values.update(part(*args, **kwargs))
        return values

    def probs(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The probabilities of the discrete sites, by name: of a one for bits, else of every value."""
        self._require_called()
        found = {}
        for name, s in self._sites.items():
            logits = s.logits(params[self._param(name)])
            found[name] = jax.nn.sigmoid(logits) if s.kind == "bit" else jax.nn.softmax(logits, -1)
        return found

    def median(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The median of the continuous sites, by name."""
        self._require_called()
        guides = (part for part in self._parts if hasattr(part, "median"))
        return {name: x for guide in guides for name, x in guide.median(params).items()}

    def values(self, name: str) -> Array:
        """The values of a count, in the order of its probabilities."""
        self._require_called()
        return self._sites[name].values

    def _require_called(self):
        need = "called once before it is read, as `SVI.init` does"
        ck.require(self._parts is not None, "auto_guide", need, "one that was not")

    def _param(self, name):
        return f"{name}_{self.prefix}_logits"

    def _setup(self, args, kwargs):
        with handlers.block():
            trace = handlers.trace(handlers.seed(self.model, numpyro.prng_key())).get_trace(*args, **kwargs)
            upstream = get_dependencies(self.model, args, kwargs)["prior_dependencies"]
        latent = [s for s in trace.values() if s["type"] == "sample" and base.is_latent(s)]
        sizes = {name: s["args"] for name, s in trace.items() if s["type"] == "plate"}
        self._frames = {
            frame.name: (sizes.get(frame.name, (frame.size,))[0], frame.size, frame.dim)
            for s in latent
            for frame in s["cond_indep_stack"]
        }
        self._sites, self._parts = {}, []
        joint = None
        # in the order of the model, so that NumPyro can see that the guide is mean-field
        for discrete, group in itertools.groupby(latent, lambda s: base.is_discrete(s["fn"])):
            if discrete:
                self._parts.extend(
                    self._discrete_part(s, len(upstream.get(s["name"], ())) > 1) for s in group
                )
            elif joint is None:
                everything = {s["name"] for s in latent if not base.is_discrete(s["fn"])}
                guide = self._continuous_part(everything)
                if isinstance(guide, AutoContinuous):  # one latent vector for all sites
                    joint = guide
                else:
                    guide = self._continuous_part({s["name"] for s in group})
                self._parts.append(guide)

    def _continuous_part(self, names):
        guide = self.continuous(
            handlers.block(self.model, hide_fn=functools.partial(_is_other_latent, names)), prefix=self.prefix
        )
        guide.create_plates = self._open_plates  # not all of NumPyro's guides have an argument for it
        return guide

    def _open_plates(self, *args, **kwargs):
        return list(self._plates.values())

    def _discrete_part(self, message, depends):
        """The guide of a site; what was seen of its prior tells little if that depends on other draws."""
        name, fn, stack = message["name"], message["fn"], message["cond_indep_stack"]
        d = base.innermost(fn)
        given = self.num_values.get(name) if isinstance(self.num_values, dict) else self.num_values
        law = site.law_of(name, d, given)
        possible = site.possible(law, d)
        if depends:
            endless = law.kind == "count" and getattr(d.support, "upper_bound", None) is None
            need = f"given for the site '{name}', a {type(d).__name__} whose parameters are draws"
            ck.require(given is not None or not endless, "num_values", need, None)
            if law.kind == "bit":  # what one draw makes certain, another does not
                possible = np.ones_like(possible)
            law = dataclasses.replace(law, log_pmf=np.where(possible, 0.0, -np.inf))
        shape = fn.shape()[: len(fn.shape()) - d.event_dim]
        self._sites[name] = parameters = self._parameters(law, possible, shape, len(fn.batch_shape), stack)
        event_dim = parameters.start.ndim - len(fn.batch_shape)
        mask, outside = _mask(fn)
        inside = len(shape) - len(fn.batch_shape) - outside
        for size, subsample, dim in (self._frames[frame.name] for frame in stack):
            of_rows = np.ndim(mask) >= outside - dim and np.shape(mask)[dim - outside] > 1
            need = "the same for all rows of a subsampled plate; for another write the guide by hand"
            ck.require(size == subsample or not of_rows, f"the mask of the site '{name}'", need, "a row each")
        mask = None if isinstance(mask, jax.core.Tracer) else mask  # it would leak out of its trace

        frames = [frame.name for frame in stack]
        like = functools.partial(_like, d, law)
        return functools.partial(
            self._discrete, name, frames, parameters, event_dim, like, inside, mask, outside
        )

    def _discrete(self, name, frames, parameters, event_dim, like, inside, mask, outside, *_, **__):
        with contextlib.ExitStack() as plates:
            for frame in frames:
                plates.enter_context(self._plates[frame])
            logits = numpyro.param(self._param(name), parameters.start, event_dim=event_dim)
            own = like(parameters.logits(logits)).to_event(inside)
            own = own if mask is None else own.mask(mask)
            return {name: numpyro.sample(name, own.to_event(outside))}

    def _parameters(self, law, possible, shape, batch_ndim, stack):
        """The prior's logits as a start, for the whole of a plate that the model has seen a part of."""
        log_pmf = law.log_pmf
        if isinstance(log_pmf, jax.core.Tracer):
            log_pmf = np.zeros(log_pmf.shape, np.float32)
        prior = np.broadcast_to(np.asarray(log_pmf, np.float64), (*shape, log_pmf.shape[-1]))
        possible = np.broadcast_to(possible, prior.shape)
        for frame in stack:
            size, subsample, dim = self._frames[frame.name]
            axis = batch_ndim + dim
            if size != subsample and prior.shape[axis] == subsample:
                mean = np.logaddexp.reduce(prior, axis, keepdims=True) - np.log(subsample)
                prior, possible = np.repeat(mean, size, axis), possible.any(axis, keepdims=True)
        prior = np.where(np.isfinite(prior), prior, -30).astype(np.float32)
        start = prior[..., 1] - prior[..., 0] if law.kind == "bit" else prior
        return _Parameters(law.kind, law.values, start, possible)


# Log-odds at which the other value has probability 0 in every floating-point type; NumPyro's BernoulliLogits
# has no log-probability at infinite ones.
CERTAIN = 1e4


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """The parameters of a discrete site: its kind and values, where they start, and what is possible."""

    kind: str
    values: np.ndarray | None
    start: np.ndarray
    possible: np.ndarray  # with an axis for the values

    def logits(self, parameters):
        """The logits of the site, in which impossible values are left out."""
        if self.kind != "bit":
            return jnp.where(self.possible, parameters, -jnp.inf)
        zero, one = self.possible[..., 0], self.possible[..., 1]
        return jnp.where(zero & one, parameters, np.where(one, CERTAIN, -CERTAIN))


def _is_other_latent(names, msg):
    return msg["type"] == "sample" and base.is_latent(msg) and msg["name"] not in names


def _like(d, law, logits):
    """The discrete distribution of the guide, of the kind of the model's."""
    if law.kind == "bit":
        return dist.BernoulliLogits(logits, validate_args=False)
    if law.kind == "count":
        return site.FiniteDiscrete(logits, int(law.values[0]), validate_args=False)
    if isinstance(d, site.TRIALS):
        return dist.MultinomialLogits(logits, total_count=1, validate_args=False)
    if d.event_dim:
        return rd.OneHotCategorical(logits=logits, validate_args=False)
    return dist.CategoricalLogits(logits, validate_args=False)


def _mask(fn):
    """The mask, or None; and how many axes are made event axes outside of it."""
    outside = 0
    while not isinstance(fn, dist.MaskedDistribution):
        if not hasattr(fn, "base_dist"):
            return None, 0
        outside += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    return fn._mask, outside
