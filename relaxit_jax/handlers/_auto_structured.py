"""`AutoStructured`: a guide with the dependences that the model suggests."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from jax.typing import ArrayLike
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.inspect import get_dependencies
from numpyro.primitives import Messenger

from relaxit_jax import _arguments as arg
from relaxit_jax import _numpyro as npr
from relaxit_jax.handlers import _relaxation as rl
from relaxit_jax.handlers import _start as start
from relaxit_jax.handlers._auto_mean_field import AutoMeanField, DiscreteSite, as_levels
from relaxit_jax.handlers._autoregressive import Autoregressive
from relaxit_jax.handlers._marginals import marginals

MOST_ROWS = 64  # entries of a table for all combinations of parents' values; else one for each value
# The most interacting elements in one autoregressive site: 15 bits. Thirty, with 3,600 weights, ended at a
# worse ELBO than independent ones.
MOST_WEIGHTS = 1000
DRAWS = 1000  # for medians and quantiles
SCALE = 0.1  # standard deviation of continuous sites at the start


class AutoStructured(AutoMeanField):
    """A guide with the dependences that the model suggests.

    `AutoMeanField` with these additions:

    - **Markov chains**: a discrete site in a `scan` is drawn step by step. Each element depends on its
      previous value and on the other discrete sites of the scan. For a hidden Markov model this family
      contains the exact posterior.
    - **Autoregressive sites**: elements of a discrete site that meet in the likelihood (several causes of one
      finding) are drawn one after another, with logits that are linear in the elements before them. This
      works up to 1,000 weights, such as 15 bits; more elements stay independent.
    - **Same plate element**: a discrete or continuous site in a plate is conditioned on the discrete sites
      before it in the same plate, if the model connects them, such as a slope given the bit that switches it
      on.

    Train it with `RLOO_ELBO`. You can also wrap chains and conditioned sites in `relax`, but not
    autoregressive ones, and `relax` says so.

    Args:
      model: the model, not relaxed.
      independent: names of sites to keep with independent elements, as in `AutoMeanField`.
      init: as for `AutoMeanField`. The default is "data", or "prior" if the first call sees only part of a
        plate or is inside a jitted function. With "data", chains and autoregressive sites start with log-odds
        of at most 2, because the ascent has seen only one of their modes.
      prefix, init_loc_fn, create_plates, continuous, init_logits, num_values: as for `AutoMeanField`.
        ``continuous`` creates the guide for the continuous sites that are not conditioned on a discrete one.

    Returns:
      A guide, as for `AutoMeanField`. Its ``probs``, ``median``, ``quantiles`` and ``sample_posterior`` draw
      from the guide, so they take the model's arguments after ``params``.

    Raises:
      ValueError: as for `AutoMeanField`, and for a name in ``independent`` that no latent site has.

    References:
      Z. Ghahramani, M. I. Jordan (1997), Factorial Hidden Markov Models, Machine Learning 29.
      A. Mnih, K. Gregor (2014), Neural Variational Inference and Learning in Belief Networks,
      arXiv:1402.0030, for autoregressive bits.

    >>> def model():  # one of two bits is on
    ...     z = numpyro.sample("z", dist.Bernoulli(0.5).expand([2]).to_event(1))
    ...     numpyro.sample("y", dist.Normal(z.sum(), 0.2), obs=1.0)
    >>> from relaxit_jax.elbo import RLOO_ELBO
    >>> guide = AutoStructured(model)
    >>> svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.05), RLOO_ELBO(10))
    >>> losses = svi.run(jax.random.key(0), 1000, progress_bar=False).losses
    >>> print(f"{losses[-100:].mean():.1f}")  # -log p(y); a mean-field guide ends at 0.7
    0.0
    """

    # one path of a chain hides the others, as does one mode of interacting elements
    _sure: float = 2.0

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        independent: Collection[str] = (),
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        continuous: Callable[..., Any] = AutoNormal,
        init: Literal["prior", "data"] | None = None,
        init_logits: Mapping[str, ArrayLike | Callable[..., Any]] | None = None,
        num_values: int | dict[str, int] | None = None,
    ) -> None:
        good = not isinstance(independent, str) and all(isinstance(name, str) for name in independent)
        arg.require(good, "independent", "a list of names of sites", arg.shown(independent))
        super().__init__(
            model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates, continuous=continuous,
            init="data" if init is None else init, init_logits=init_logits, num_values=num_values,
        )  # fmt: skip
        self._may_start_at_prior = init is None
        self.independent: tuple[str, ...] = tuple(independent)

    def sample_posterior(
        self,
        rng_key: Array,
        params: Mapping[str, Array],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draw all latent sites from the trained guide, by name; for a subsampled plate, its elements."""
        self._require_called()

        def draw(key):
            with handlers.block():
                return handlers.substitute(handlers.seed(self, key), dict(params))(*args, **kwargs)

        keys = jax.random.split(rng_key, math.prod(sample_shape))
        drawn = jax.lax.map(draw, keys, batch_size=100)
        return {name: jnp.reshape(x, (*sample_shape, *x.shape[1:])) for name, x in drawn.items()}

    def probs(self, params: Mapping[str, Array], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Return marginal probabilities of the discrete sites, as means over draws: see `marginals`."""
        self._require_called()
        return marginals(self, params, *args, **kwargs)

    def median(self, params: Mapping[str, Array], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Return the medians of 1,000 draws of continuous sites, bits and counts, by name."""
        return {name: x[0] for name, x in self.quantiles(params, 0.5, *args, **kwargs).items()}

    def quantiles(
        self, params: Mapping[str, Array], quantiles: ArrayLike, *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """Return quantiles of 1,000 draws of continuous sites, bits and counts, with their axis in front."""
        self._require_called()
        levels = as_levels(quantiles)
        drawn = self.sample_posterior(jax.random.key(0), params, *args, sample_shape=(DRAWS,), **kwargs)
        ordered = {
            name: x
            for name, x in drawn.items()
            if name not in self._sites or self._sites[name].kind != "class"
        }
        return {
            name: jnp.quantile(x, levels, 0, method="inverted_cdf" if name in self._sites else "linear")
            for name, x in ordered.items()
        }

    def _make_parts(self, trace, latent, args, kwargs):
        depends = get_dependencies(self.model, args, kwargs)["prior_dependencies"]
        scans = _scans(self.model, args, kwargs)
        names = [s["name"] for s in latent]
        rl.check_names("independent", dict.fromkeys(self.independent), names)
        meets = {
            name: start.terms_and_plates(name, trace, depends)
            for name in names
            if name not in self.independent
        }
        parts: list[Any] = []
        chains: dict[int, _Chain] = {}
        for name, s in self._sites.items():
            if name not in meets:
                parts.append(s)
            elif name in scans:
                chain = chains.get(scans[name])
                if chain is None:
                    chain = chains[scans[name]] = _Chain()
                    parts.append(chain)
                chain.add(s, self._first_of(s, chain, depends), trace[name]["cond_indep_stack"])
            else:
                parts.append(self._of_one_site(s, meets, [p for p in parts if not isinstance(p, _Chain)]))
        given = {s["name"]: self._given(s, meets, args, kwargs) for s in latent if s["name"] not in scans}
        parts += [part for part in given.values() if part]
        others = {name for name in names if name not in self._sites and not given.get(name)}
        return [*parts, self._continuous(others)] if others else parts

    def _start_from_data(self, latent, args, kwargs):
        if not (self._may_start_at_prior and self._why_not_from_data(latent, args, kwargs)):
            super()._start_from_data(latent, args, kwargs)

    def _first_of(self, s, chain, depends):
        """The site before the scan that a chain begins with: upstream, with as many values and elements."""
        taken = chain.first.values()
        for name, other in self._sites.items():
            alike = other.size == s.size and other.elements == s.elements[1:]
            if alike and name in depends.get(s.name, ()) and other not in taken and other not in chain.sites:
                return other
        return None

    def _of_one_site(self, s, meets, parts):
        terms, plates = meets[s.name]
        alone = {s.batch_ndim + frame.dim for frame in plates}
        coupled = tuple(axis for axis in range(len(s.elements)) if axis not in alone)
        number = math.prod(s.elements[axis] for axis in coupled)
        weights = (number * s.size) ** 2
        whole = all(self._prototype_frames[f].size == self._prototype_frame_full_sizes[f] for f in s.frames)
        if number > 1 and weights <= MOST_WEIGHTS and whole:
            return _AutoregressiveSite(s, coupled)
        if not s.frames or number > 1:
            return s
        parents = [
            self._sites[p.name] for p in parts
            if p.name in meets and not isinstance(p, _AutoregressiveSite) and meets[p.name][0] & terms
            and self._sites[p.name].elements == s.elements and self._sites[p.name].frames == s.frames
        ]  # fmt: skip
        return _TableSite(s, parents) if parents else s

    def _given(self, message, meets, args, kwargs):
        """The guide of a continuous site in a plate, if it meets discrete sites of the same plates there."""
        name, fn = message["name"], message["fn"]
        frames = [frame.name for frame in message["cond_indep_stack"]]
        masked = any(isinstance(x, dist.MaskedDistribution) for x in _wrappers(fn))
        if name in self._sites or name not in meets or not frames or masked:
            return None
        batch = list(fn.batch_shape)
        for frame in message["cond_indep_stack"]:
            batch[frame.dim] = self._prototype_frame_full_sizes[frame.name]
        parents = [
            s for other, s in self._sites.items()
            if other in meets and meets[other][0] & meets[name][0]
            and s.frames == frames and s.elements == tuple(batch)
        ]  # fmt: skip
        if not parents:
            return None
        transform = biject_to(fn.support)
        free = transform.inv(self._points(args, kwargs)(jax.random.key(1))[name])
        if isinstance(free, jax.core.Tracer):  # a first call inside jit, as for logits
            free = np.zeros(free.shape)
        free = np.asarray(free, np.float32)
        for frame in message[
            "cond_indep_stack"
        ]:  # a subsampled plate starts with the elements that were seen
            axis, size = len(batch) + frame.dim, batch[frame.dim]
            free = np.take(free, np.arange(size) % free.shape[axis], axis)
        return _Given(name, free, len(batch), transform, parents, frames)


# --- parents ----------------------------------------------------------------------------------


def _rows(sizes):
    """The number of entries in a table for parents with these many values."""
    return math.prod(sizes) if math.prod(sizes) <= MOST_ROWS else sum(sizes)


def _weights_of_rows(weights, sizes):
    """Weights of the entries of a table, from the weights of each parent's values."""
    if math.prod(sizes) > MOST_ROWS:
        shape = jnp.broadcast_shapes(*(w.shape[:-1] for w in weights))
        return jnp.concatenate([jnp.broadcast_to(w, (*shape, w.shape[-1])) for w in weights], -1)
    found = jnp.ones(1)
    for w in weights:
        found = found[..., :, None] * w[..., None, :]
        found = found.reshape(*found.shape[:-2], -1)
    return found


def _table(first, sizes, axis=-2):
    """The start of a table: the same in every entry, or in the first one if entries of parents are added."""
    table = np.repeat(np.expand_dims(first, axis), _rows(sizes), axis)
    if math.prod(sizes) > MOST_ROWS:
        np.moveaxis(table, axis, 0)[sizes[0] :] = 0
    return table


def _looked_up(weights, table):
    """The weighted sum of the entries: a single entry if the weights are one-hot."""
    return jnp.sum(weights[..., None] * table, -2)


def _first(s):
    """The first logits of a site, with an axis for the values even for bits."""
    return np.maximum(s.first_logits, -30)


@dataclasses.dataclass(frozen=True)
class _TableSite:
    """A discrete site in a plate, given other discrete sites of the same element."""

    site: DiscreteSite
    parents: list[DiscreteSite]

    @property
    def name(self):
        return self.site.name

    def draw(self, prefix, plates, masks, values):
        s, sizes = self.site, [p.size for p in self.parents]
        with contextlib.ExitStack() as opened:
            for frame in s.frames:
                opened.enter_context(plates[frame])
            inner = len(s.elements) - s.batch_ndim
            table = numpyro.param(s.param(prefix), _table(_first(s), sizes), event_dim=inner + 2)
            table = s.without_impossible(table)
            rows = _weights_of_rows([p.weights(values[p.name]) for p in self.parents], sizes)
            law = s.as_event(s.law_of(_looked_up(rows, table)), masks.get(s.name))
            return {s.name: numpyro.sample(s.name, law)}


@dataclasses.dataclass(frozen=True)
class _Given:
    """A continuous site in a plate: a normal in the unconstrained space for each value of its parents."""

    name: str
    free: np.ndarray  # where it starts
    batch_ndim: int
    transform: Any
    parents: list[DiscreteSite]
    frames: list[str]

    def draw(self, prefix, plates, masks, values):
        sizes = [p.size for p in self.parents]
        axis = (
            self.batch_ndim - self.free.ndim - 1
        )  # the axis of the elements: after the plates, before the event
        event = -1 - axis
        parameter = lambda kind, first: numpyro.param(
            f"{self.name}_{prefix}_{kind}", _table(first, sizes, axis), event_dim=event + 1
        )
        with contextlib.ExitStack() as opened:
            for frame in self.frames:
                opened.enter_context(plates[frame])
            loc = parameter("loc", self.free)
            log_scale = parameter("log_scale", np.full_like(self.free, np.log(SCALE)))
            rows = _weights_of_rows([p.weights(values[p.name]) for p in self.parents], sizes)
            rows = rows.reshape(*rows.shape, *(1,) * event)
            law = dist.Normal(jnp.sum(rows * loc, axis), jnp.exp(jnp.sum(rows * log_scale, axis)))
            law = dist.TransformedDistribution(law.to_event(event), self.transform)
            return {self.name: numpyro.sample(self.name, law)}


# --- chains -----------------------------------------------------------------------------------


class _Chain:
    """The discrete sites of one scan, each given its previous value and the sites of the scan before it."""

    def __init__(self):
        self.sites = []
        self.first = {}  # for each, the site before the scan that it begins with, or None
        self.plates = {}  # plates inside the scan

    def add(self, s, first, plates):
        self.sites.append(s)
        self.first[s.name], self.plates[s.name] = first, plates

    def parents(self, s):
        """The sites of the last step, and the earlier sites of this step, whose elements match its own."""
        fit = [p for p in self.sites if _fits(p.elements[1:], s.elements[1:])]
        return fit, [p for p in fit if self.sites.index(p) < self.sites.index(s)]

    def draw(self, prefix, plates, masks, values):
        tables, sizes, begin = {}, {}, {}
        for s in self.sites:
            before, here = self.parents(s)
            sizes[s.name] = [p.size for p in (*before, *here)]
            table = numpyro.param(s.param(prefix), _table(_first(s), sizes[s.name]))
            tables[s.name] = (s.without_impossible(table), masks.get(s.name))
            first, shape = self.first[s.name], (*s.elements[1:], s.size)
            weights = jnp.eye(s.size)[0] if first is None else first.weights(values[first.name])
            begin[s.name] = jnp.broadcast_to(weights, shape)

        def step(last, tables):
            now, drawn = {}, {}
            for s in self.sites:
                table, mask = tables[s.name]
                before, here = self.parents(s)
                weights = [*(last[p.name] for p in before), *(now[p.name] for p in here)]
                law = s.law_of(_looked_up(_weights_of_rows(weights, sizes[s.name]), table))
                with contextlib.ExitStack() as opened:
                    for frame in self.plates[s.name]:
                        opened.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
                    drawn[s.name] = numpyro.sample(s.name, s.as_event(law, mask))
                now[s.name] = jnp.broadcast_to(s.weights(drawn[s.name]), last[s.name].shape)
            return now, drawn

        return scan(step, begin, tables)[1]


def _fits(inner, outer):
    try:
        return np.broadcast_shapes(inner, outer) == outer
    except ValueError:
        return False


class _Scans(Messenger):
    """Record for every site the scan that it comes from."""

    def __init__(self, fn):
        super().__init__(fn)
        self.number, self.found = 0, {}

    def process_message(self, msg):
        if msg["type"] == "control_flow":
            self.number += 1
        elif msg["type"] == "sample" and npr.comes_from_flow(msg):
            self.found[msg["name"]] = self.number


def _scans(model, args, kwargs):
    noted = _Scans(handlers.seed(model, jax.random.key(0)))
    noted(*args, **kwargs)
    return noted.found


def _wrappers(fn):
    while hasattr(fn, "base_dist"):
        yield fn
        fn = fn.base_dist


# --- autoregressive sites ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _AutoregressiveSite:
    """The guide of a site with interacting elements, drawn one after another outside their shared plates."""

    site: DiscreteSite
    coupled: tuple[int, ...]

    @property
    def name(self):
        return self.site.name

    def draw(self, prefix, plates, masks, values):
        s = self.site
        alone = [axis for axis in range(len(s.elements)) if axis not in self.coupled]
        n = math.prod(s.elements[axis] for axis in self.coupled)
        shape = (*(s.elements[axis] for axis in alone), n, n, s.size, s.size)
        bias = numpyro.param(s.param(prefix), _first(s))
        weights = numpyro.param(f"{s.name}_{prefix}_weights", np.zeros(shape, np.float32))
        with contextlib.ExitStack() as opened:
            for frame in s.frames:
                if s.batch_ndim + plates[frame].dim in alone:
                    opened.enter_context(plates[frame])
            law = Autoregressive(s.without_impossible(bias), weights, s, self.coupled)
            return {s.name: numpyro.sample(s.name, s.as_event(law, masks.get(s.name)))}
