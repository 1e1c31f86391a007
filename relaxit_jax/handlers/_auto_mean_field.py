"""`AutoMeanField`: a mean-field guide made from a model with discrete latents."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from jax.typing import ArrayLike
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous, AutoGuide, AutoNormal
from numpyro.infer.initialization import init_to_uniform, init_to_value
from numpyro.infer.inspect import get_dependencies
from numpyro.primitives import Messenger

from relaxit_jax import _arguments as arg
from relaxit_jax import _numpyro as npr
from relaxit_jax import distributions as rd
from relaxit_jax.handlers import _relaxation as rl
from relaxit_jax.handlers import _site as site
from relaxit_jax.handlers import _start as start
from relaxit_jax.handlers import _wrappers as wr


class AutoMeanField(AutoGuide):
    """A mean-field guide for a model with discrete latents.

    Every element of every discrete latent site gets its own logits. They start at the logits of the prior, or
    at equal logits if the prior depends on other draws. Poisson and other counts get one logit for each of
    finitely many values. Continuous sites get NumPyro's `AutoNormal`. The guide has discrete sites: wrap it
    in `relax` to train it with pathwise gradients, or train it as it is with `RLOO_ELBO`; leave it unwrapped
    to draw from the trained guide.

    The guide reads the model when it is first called. Make that call outside `jax.jit`, as `SVI.init` does:
    inside, the prior's probabilities are not known, and the logits start at zero.

    Sites that the model masks are masked in the guide too, with the mask of each call, which must not depend
    on draws. Sites in subsampled plates get parameters for the whole plate.

    Args:
      model: the model, not relaxed.
      prefix: part of the parameters' names, ``<site>_<prefix>_logits``.
      init_loc_fn: where continuous sites start, one of NumPyro's initialization strategies. By default, the
        strategy of the guide for the continuous sites. `AutoNormal` starts at random, where a coefficient
        with the wrong sign can switch a bit off.
      create_plates: as in NumPyro's guides: a function of the model's arguments that returns the plates to
        use instead of the model's, for example with other subsample sizes.
      continuous: creates the guide for the continuous sites from a model: an `AutoGuide` class, or a class
        with options, ``functools.partial(AutoNormal, init_scale=0.01)``. A joint guide, such as
        `AutoMultivariateNormal`, is created once, for all continuous sites.
      init: where the discrete sites start. "prior": at the prior, as described above. "data": at the result
        of coordinate ascent on their log-joint and on a point of the continuous sites. It runs from eight
        random points and keeps the best; the continuous sites start there too. With an ``init_loc_fn`` these
        stay where it puts them, and the discrete sites start at their laws given that. The logits of every
        element become the log-joint of its values: the exact posterior, for mixtures and other models whose
        elements do not interact. This takes some seconds, in the first call.
      init_logits: logits to start from, by name of the site: an array, or a function of the model's arguments
        that returns one. For bits, log-odds in the shape of the site; for others, with a last axis for the
        values, where ``-inf`` excludes a value from the guide, such as a count below a bound that the data
        set. With ``init="data"`` the ascent starts from them.
      num_values: how many values a count takes, as in `relax`. It must be given for counts whose
        parameters are draws of other sites, because one draw does not tell how many are enough.

    Returns:
      A guide: a callable with the arguments of the model that returns the drawn values by site.

    Raises:
      ValueError: when first called, for a site that cannot be relaxed or that is marked to be enumerated;
        when the guide is read before it was called.

    References:
      D. M. Blei, A. Kucukelbir, J. D. McAuliffe (2017), Variational Inference: A Review for
      Statisticians, arXiv:1601.00670.

    >>> model = lambda: numpyro.sample("z", dist.Categorical(jnp.array([0.1, 0.9])))
    >>> guide = AutoMeanField(model)
    >>> trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    >>> probs = guide.probs({"z_auto_logits": trace["z_auto_logits"]["value"]})
    >>> print(f"{probs['z'][1]:.4f}")
    0.9000
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        continuous: Callable[..., Any] = AutoNormal,
        init: Literal["prior", "data"] = "prior",
        init_logits: Mapping[str, ArrayLike | Callable[..., Any]] | None = None,
        num_values: int | dict[str, int] | None = None,
    ) -> None:
        arg.require(callable(model), "model", "a function that calls numpyro.sample", arg.shown(model))
        arg.require(isinstance(prefix, str), "prefix", "a string", arg.shown(prefix))
        for name, function in (("init_loc_fn", init_loc_fn), ("create_plates", create_plates)):
            good = function is None or callable(function)
            arg.require(good, name, "a function", arg.shown(function))
        arg.require(callable(continuous), "continuous", "a class of NumPyro's guides", arg.shown(continuous))
        site.check_num_values(num_values)
        arg.require_choice("init", init, ("prior", "data"))
        need = "a dictionary from names of sites to arrays or functions"
        arg.require(
            init_logits is None or isinstance(init_logits, Mapping),
            "init_logits",
            need,
            arg.shown(init_logits),
        )
        twice = init_loc_fn is not None and "init_loc_fn" in getattr(continuous, "keywords", {})
        arg.require(not twice, "init_loc_fn", "given once", "one here and one in continuous")
        first = init_to_uniform if init_loc_fn is None else init_loc_fn
        super().__init__(model, prefix=prefix, init_loc_fn=first, create_plates=create_plates)
        self.continuous: Callable[..., Any] = continuous
        self.num_values: int | dict[str, int] | None = num_values
        self.init: str = init
        self.init_logits: Mapping[str, Any] = {} if init_logits is None else init_logits
        self._start = {} if init_loc_fn is None else {"init_loc_fn": init_loc_fn}
        self._sites: dict[str, DiscreteSite] = {}
        self._parts: list[DiscreteSite | AutoGuide] = []  # in the order of the model

    _sure: float = np.inf  # the largest log-odds at which interacting elements start

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with handlers.trace() as opened:
            self._plates = self._create_plates(*args, **kwargs)
        masks = {}
        if any(s.masked for s in self._sites.values()):
            rows = {name: plate["value"] for name, plate in opened.items() if plate["type"] == "plate"}
            masks = self._masks(rows, args, kwargs)
        values = {}
        for part in self._parts:
            if isinstance(part, AutoGuide):
                values.update(part(*args, **kwargs))
            else:
                values.update(part.draw(self.prefix, self._plates, masks, values))
        return values

    def sample_posterior(
        self,
        rng_key: Array,
        params: Mapping[str, Array],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draw all latent sites from the trained guide, by name, for the whole of a subsampled plate."""
        self._require_called()
        values = {}
        for part, key in zip(self._parts, jax.random.split(rng_key, len(self._parts)), strict=True):
            if isinstance(part, DiscreteSite):
                law = part.law(params[part.param(self.prefix)])
                values[part.name] = law.sample(key, sample_shape)
            else:
                drawn = part.sample_posterior(key, params, *args, sample_shape=sample_shape, **kwargs)
                values |= self._own(part, drawn)
        return values

    def probs(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Return the probabilities of the discrete sites, by name: of a one for bits, else of all values."""
        self._require_called()
        return {name: s.probs(params[s.param(self.prefix)]) for name, s in self._sites.items()}

    def median(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Return medians of continuous sites, bits and counts, by name. For classes, see `probs`."""
        self._require_called()
        values = {name: x[0] for name, x in self._quantiles_of_discrete(params, [0.5]).items()}
        for part in self._continuous_parts():
            values |= self._own(part, part.median(params))
        return values

    def quantiles(self, params: Mapping[str, Array], quantiles: ArrayLike) -> dict[str, Array]:
        """Return quantiles of continuous sites, bits and counts, by name, with their axis in front.

        A quantile of a bit or a count is the smallest value whose cumulative probability reaches it.
        """
        self._require_called()
        levels = as_levels(quantiles)
        values = self._quantiles_of_discrete(params, levels)
        for part in self._continuous_parts():
            values |= self._own(part, part.quantiles(params, levels))
        return values

    def values(self, name: str) -> Array:
        """Return the values of a count, in the order of its probabilities."""
        self._require_called()
        counts = [key for key, s in self._sites.items() if s.kind == "count"]
        arg.require(name in counts, "name", f"one of the counts {counts}", repr(name))
        return self._sites[name].values

    def _require_called(self):
        if self.prototype_trace is None:
            raise ValueError(
                "Call the AutoMeanField guide once, for example by `svi.init(...)`, before reading it: it "
                "learns the model's sites in its first call."
            )

    def _continuous_parts(self):
        return [part for part in self._parts if isinstance(part, AutoGuide)]

    def _own(self, part, values):
        """Drop the model's deterministic sites: NumPyro computes them from other draws than the guide's."""
        sites = part.prototype_trace
        latent = {name for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        return {name: x for name, x in values.items() if name in latent}

    def _quantiles_of_discrete(self, params, levels):
        ordered = ((name, s) for name, s in self._sites.items() if s.kind != "class")
        return {name: s.quantiles(params[s.param(self.prefix)], levels) for name, s in ordered}

    def _setup_prototype(self, *args, **kwargs):
        with handlers.block():
            sizes: dict[str, int] = {}
            given: set[str] = set()
            model = _Noted(handlers.seed(self.model, numpyro.prng_key()), sizes, given)
            trace = handlers.trace(model).get_trace(*args, **kwargs)
            upstream = get_dependencies(self.model, args, kwargs)["prior_dependencies"]
        latent = [s for s in trace.values() if s["type"] == "sample" and not s["is_observed"]]
        for s in latent:
            if s["name"] in given and wr.is_discrete(s["fn"]):
                raise ValueError(
                    f"The site '{s['name']}' has a value from handlers.substitute, and is latent to NumPyro "
                    "all the same. Use handlers.condition to fix it."
                )
            if not wr.is_latent(s):
                raise ValueError(
                    f"The site '{s['name']}' has infer={{'enumerate': 'parallel'}}: TraceEnum_ELBO sums over "
                    "it, and the guide must not draw it. Hide it from the guide, "
                    f"AutoMeanField(numpyro.handlers.block(model, hide=['{s['name']}'])), or remove the mark."
                )
        frames = {frame.name: frame for s in latent for frame in s["cond_indep_stack"]}
        for name, frame in frames.items():
            if name not in trace and sizes.get(name, frame.size) != frame.size:
                raise ValueError(
                    f"The plate '{name}' is subsampled inside a scan, where each step has different rows. "
                    "Open the plate outside the scan."
                )
        # The plates inside a scan do not belong to the guide: the trace has their sites in their whole shape.
        self._prototype_frames = {name: frame for name, frame in frames.items() if name in trace}
        self._prototype_frame_full_sizes = {name: sizes[name] for name in self._prototype_frames}
        self._sites = {
            s["name"]: self._discrete(s, len(upstream.get(s["name"], ())) > 1)
            for s in latent
            if wr.is_discrete(s["fn"])
        }
        rl.check_names("num_values", self.num_values, self._sites)
        rl.check_names("init_logits", self.init_logits, self._sites)
        for name, first in self.init_logits.items():
            logits = first(*args, **kwargs) if callable(first) else first
            self._sites[name] = self._sites[name].starting_at(logits)
        if self.init == "data":
            self._start_from_data(latent, args, kwargs)
        with handlers.block():
            self._parts = self._make_parts(trace, latent, args, kwargs)
        # NumPyro asks a guide for the deterministic sites of a trace; the values may be tracers.
        self.prototype_trace: Any = {name: {"type": s["type"]} for name, s in trace.items()}

    def _make_parts(self, trace, latent, args, kwargs):
        """The guide of every site, in the order of the model, so that NumPyro sees that it is mean-field."""
        parts, joint = [], None
        for discrete, group in itertools.groupby(latent, lambda s: wr.is_discrete(s["fn"])):
            if discrete:
                parts += [self._sites[s["name"]] for s in group]
            elif joint is None:
                everything = {s["name"] for s in latent if not wr.is_discrete(s["fn"])}
                guide = self._continuous(everything)
                if isinstance(guide, AutoContinuous):  # one latent vector for all sites
                    joint = guide
                else:
                    guide = self._continuous({s["name"] for s in group})
                parts.append(guide)
        return parts

    def _first_place(self):
        """The strategy with which continuous sites start; it may be bound to the class of their guide."""
        bound = getattr(self.continuous, "keywords", {}).get("init_loc_fn", self.init_loc_fn)
        return self._start.get("init_loc_fn", bound)

    def _points(self, args, kwargs):
        """A function of a key that returns where the continuous sites start, by name."""

        def points(key):
            started = handlers.substitute(handlers.seed(self.model, key), substitute_fn=self._first_place())
            with handlers.block():
                trace = handlers.trace(started).get_trace(*args, **kwargs)
            latent = {name: s for name, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
            return {name: s["value"] for name, s in latent.items() if name not in self._sites}

        return points

    def _why_not_from_data(self, latent, args, kwargs):
        for frame in self._prototype_frames.values():
            if frame.size != (whole := self._prototype_frame_full_sizes[frame.name]):
                return (
                    f"init='data' needs all rows, but the plate '{frame.name}' shows {frame.size} of "
                    f"{whole}. Call the guide once with the whole plate, or pass init_logits."
                )
        seen = jax.tree.leaves((args, kwargs, [s["value"] for s in latent]))
        if any(isinstance(x, jax.core.Tracer) for x in seen):
            return "init='data' needs values: call the guide once outside jax.jit, as svi.init does."
        return None

    def _start_from_data(self, latent, args, kwargs):
        """The starts of the discrete sites, and of the continuous ones if nothing else sets them."""
        if reason := self._why_not_from_data(latent, args, kwargs):
            raise ValueError(reason)
        points = self._points(args, kwargs)
        key = numpyro.prng_key()
        key = jax.random.key(0) if key is None else key
        fixed = bool(self._start) or "init_loc_fn" in getattr(self.continuous, "keywords", {})
        given = bool(self.init_logits)
        sites = list(self._sites.values())
        logits, point = start.from_data(
            key, self.model, args, kwargs, sites, given, fixed, self._sure, points
        )
        for name, x in logits.items():
            s = self._sites[name]
            self._sites[name] = s.starting_at(x[..., 1] - x[..., 0] if s.kind == "bit" else x)
        if point:
            self._start = {"init_loc_fn": init_to_value(values=point)}

    def _continuous(self, names):
        others = functools.partial(_is_other_latent, names)
        guide = self.continuous(handlers.block(self.model, hide_fn=others), prefix=self.prefix, **self._start)
        guide.create_plates = self._open_plates  # not all of NumPyro's guides have an argument for it
        return guide

    def _open_plates(self, *args, **kwargs):
        return list(self._plates.values())

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_plates": {}}

    def _masks(self, rows, args, kwargs):
        """The masks of the model in this call, with these elements of its plates."""
        with handlers.block():
            model = handlers.seed(handlers.substitute(self.model, data=rows), jax.random.key(0))
            trace = handlers.trace(model).get_trace(*args, **kwargs)
        return {name: _mask(trace[name]["fn"])[0] for name in self._sites}

    def _discrete(self, message, depends):
        """The guide of a site. One value of its prior says little if the prior depends on other draws."""
        name, fn = message["name"], message["fn"]
        stack = [frame for frame in message["cond_indep_stack"] if frame.name in self._prototype_frames]
        d = wr.innermost(fn)
        law = site.law_of(name, d, self.num_values)
        possible = site.possible(law, d)
        if depends:
            endless = law.kind == "count" and getattr(d.support, "upper_bound", None) is None
            need = f"given for the site '{name}', a {type(d).__name__} whose parameters are draws"
            given = site.num_values_of(self.num_values, name)
            arg.require(given is not None or not endless, "num_values", need, None)
            if law.kind == "bit":  # one draw may make a value certain that another does not
                possible = np.ones_like(possible)
            law = dataclasses.replace(law, log_pmf=np.where(possible, 0.0, -np.inf))
        shape = fn.shape()[: len(fn.shape()) - d.event_dim]
        first, possible = self._start_of(law, possible, shape, len(fn.batch_shape), stack)
        mask, outside = _mask(fn)
        return DiscreteSite(
            name=name,
            kind=law.kind,
            vector=law.kind == "class" and d.event_dim > 0,
            values=law.values,
            start=first,
            possible=possible,
            like=functools.partial(_like, d, law),
            frames=[frame.name for frame in stack],
            param_dim=first.ndim - len(fn.batch_shape),
            inside=len(shape) - len(fn.batch_shape) - outside,
            outside=outside,
            masked=mask is not None,
        )

    def _start_of(self, law, possible, shape, batch_ndim, stack):
        """The prior's logits as a start, for the whole of a plate of which the model has seen a part."""
        log_pmf = law.log_pmf
        if isinstance(log_pmf, jax.core.Tracer):
            log_pmf = np.zeros(log_pmf.shape, np.float32)
        prior = np.broadcast_to(np.asarray(log_pmf, np.float64), (*shape, log_pmf.shape[-1]))
        possible = np.broadcast_to(possible, prior.shape)
        for frame in stack:
            size, axis = self._prototype_frame_full_sizes[frame.name], batch_ndim + frame.dim
            if size != frame.size and prior.shape[axis] == frame.size:
                mean = np.logaddexp.reduce(prior, axis, keepdims=True) - np.log(frame.size)
                prior, possible = np.repeat(mean, size, axis), possible.any(axis, keepdims=True)
        prior = np.where(np.isfinite(prior), prior, -30).astype(np.float32)
        return prior[..., 1] - prior[..., 0] if law.kind == "bit" else prior, possible


# Log-odds at which the other value has probability 0 in every floating-point type. NumPyro's BernoulliLogits
# has no log-probability at infinite ones.
CERTAIN = 1e4


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteSite:
    """The guide of one discrete site: independent elements, each with its own logits."""

    name: str
    kind: str  # bit, class or count
    vector: bool  # whether a value is a one-hot vector
    values: np.ndarray | None  # for a count
    start: np.ndarray  # where the parameters start
    possible: np.ndarray  # in the shape of the parameters, with an axis for the values
    like: Callable[
        [Array], dist.Distribution
    ]  # a distribution of the same type as the model's, from its logits
    frames: list[str]  # names of the plates
    param_dim: int  # trailing axes of the parameters that are not plates
    inside: int  # axes that become event axes inside the mask
    outside: int  # and outside
    masked: bool

    def starting_at(self, logits):
        """The same site with these logits; for classes and counts, -inf excludes a value for good."""
        name, logits = f"init_logits['{self.name}']", np.asarray(logits, np.float32)
        shape = self.start.shape
        arg.require(logits.shape == shape, name, f"of shape {shape}", f"shape {logits.shape}")
        if self.kind == "bit":
            possible, wrong = self.possible, ~np.isfinite(logits) & self.possible.all(-1)
            need = "finite"
        else:
            possible = self.possible & (logits > -np.inf)
            wrong = self.possible & (np.isnan(logits) | (logits == np.inf)) | ~possible.any(-1, keepdims=True)
            need = "finite, or -inf for some values of an element"
        arg.require(not wrong.any(), name, need, str(logits[np.broadcast_to(wrong, shape)][:1]))
        start = np.where(np.isfinite(logits), logits, -30)
        return dataclasses.replace(self, start=start, possible=possible)

    @property
    def elements(self):
        """The shape of the elements, for the whole of a subsampled plate."""
        return self.first_logits.shape[:-1]

    @property
    def batch_ndim(self):
        return self.start.ndim - self.param_dim

    @property
    def first_logits(self):
        """The logits at the start, with an axis for the values; -inf where a value is impossible."""
        logits = np.stack([np.zeros_like(self.start), self.start], -1) if self.kind == "bit" else self.start
        return np.where(self.possible, logits, -np.inf)

    @property
    def size(self):
        return self.possible.shape[-1]

    def value(self, index):
        """The value of the site, from an index for each element."""
        if self.vector:
            return jax.nn.one_hot(index, self.size, dtype=jnp.int32)
        return index if self.values is None else index + int(self.values[0])

    def weights(self, value):
        """One number for each value of the site: a one-hot vector, or its counterpart in a relaxed draw."""
        if self.kind == "class" and not (self.vector or jnp.issubdtype(value.dtype, jnp.inexact)):
            return jax.nn.one_hot(value, self.size)
        value = jnp.asarray(value, jnp.result_type(float))
        return value if self.kind == "class" else site.weights_of_number(value, self.values)

    def param(self, prefix):
        return f"{self.name}_{prefix}_logits"

    def draw(self, prefix, plates, masks, values):
        with contextlib.ExitStack() as opened:
            for frame in self.frames:
                opened.enter_context(plates[frame])
            law = self.law(numpyro.param(self.param(prefix), self.start, event_dim=self.param_dim))
            return {self.name: numpyro.sample(self.name, self.as_event(law, masks.get(self.name)))}

    def as_event(self, law, mask):
        """The law of all elements with the event axes and the mask of the model's site."""
        law = law.to_event(self.inside)
        return (law if mask is None else law.mask(mask)).to_event(self.outside)

    def law(self, parameters):
        return self.like(self.logits(parameters))

    def law_of(self, logits):
        """The law with these logits from `without_impossible`, with an axis for the values even for bits."""
        if self.kind == "bit":
            return self.like(jnp.clip(logits[..., 1] - logits[..., 0], -CERTAIN, CERTAIN))
        return self.like(jnp.where(logits < -CERTAIN / 2, -jnp.inf, logits))

    def without_impossible(self, logits):
        """Logits with an axis for the values, and any axes before it, finite: they may be multiplied by 0."""
        between = logits.ndim - self.possible.ndim
        possible = np.expand_dims(self.possible, [self.possible.ndim - 1 + i for i in range(between)])
        return jnp.where(possible, logits, -CERTAIN)

    def logits(self, parameters):
        """The logits of the site, without impossible values."""
        if self.kind != "bit":
            return jnp.where(self.possible, parameters, -jnp.inf)
        zero, one = self.possible[..., 0], self.possible[..., 1]
        return jnp.where(zero & one, parameters, np.where(one, CERTAIN, -CERTAIN))

    def probs(self, parameters):
        logits = self.logits(parameters)
        return jax.nn.sigmoid(logits) if self.kind == "bit" else jax.nn.softmax(logits, -1)

    def quantiles(self, parameters, levels):
        """The smallest values whose cumulative probability reaches the levels; the levels' axis is first."""
        probs = self.probs(parameters)
        below = 1 - probs[..., None] if self.kind == "bit" else jnp.cumsum(probs, -1)[..., :-1]
        levels = jnp.asarray(levels, below.dtype).reshape(-1, *(1,) * below.ndim)
        index = jnp.sum(below < levels, -1)
        return index if self.kind == "bit" else index + int(self.values[0])


def as_levels(quantiles):
    levels = np.atleast_1d(quantiles)
    arg.require(np.all((levels >= 0) & (levels <= 1)), "quantiles", "in [0, 1]", quantiles)
    return levels


class _Noted(Messenger):
    """Record the full size of every plate, and the sites whose values are substituted, also in scans.

    It refuses a model into which no guide could be replayed.
    """

    def __init__(self, fn, sizes, given):
        self.sizes, self.given, self.flow = sizes, given, None
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "plate":
            self.sizes[msg["name"]] = msg["args"][0]
        elif msg["type"] == "control_flow":
            self.flow = msg
            if npr.runs_scan(msg["fn"]):
                npr.wrap_scan_body(msg, functools.partial(_Noted, sizes=self.sizes, given=self.given))
        elif msg["type"] == "sample" and npr.comes_from_flow(msg):
            npr.require_right_order(msg, self.flow)
        elif msg["type"] == "sample" and msg["value"] is not None:
            self.given.add(msg["name"])


def _is_other_latent(names, msg):
    return msg["type"] == "sample" and wr.is_latent(msg) and msg["name"] not in names


def _like(d, law, logits):
    """The discrete distribution of the guide, of the same type as the model's."""
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
    """The mask, or None; and how many axes become event axes outside it."""
    outside = 0
    while not isinstance(fn, dist.MaskedDistribution):
        if not hasattr(fn, "base_dist"):
            return None, 0
        outside += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    return fn._mask, outside
