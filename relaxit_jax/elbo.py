"""`RLOO_ELBO` and `VIMCO_ELBO`: SVI with discrete sites, trained by scores with a baseline."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient
from numpyro.distributions import MaskedDistribution
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.elbo import ELBO, LossWithMutableState, get_nonreparam_deps
from numpyro.primitives import Messenger
from numpyro.util import check_model_guide_match

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import _numpyro as npr
from relaxit_jax._terms import log_prob_of, plates_of, scaled_log_prob, sum_to

__all__ = ["RLOO_ELBO", "VIMCO_ELBO"]


class _Scored(ELBO):
    """A bound with several particles, in which the discrete sites of the guide get a score."""

    can_infer_discrete: bool = True

    def __init__(self, num_particles: int = 2, vectorize_particles: bool | Callable[..., Any] = True) -> None:
        num_particles = arg.as_static_int("num_particles", num_particles, 2, 1_000_000)
        known = isinstance(vectorize_particles, bool) or callable(vectorize_particles)
        need = "True, False or a function to use in place of jax.vmap"
        arg.require(known, "vectorize_particles", need, arg.shown(vectorize_particles))
        super().__init__(num_particles, vectorize_particles)

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Array],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> LossWithMutableState:
        """Return the loss of `loss` and the new values of the mutable sites, None if there are none."""
        arg.check_key(rng_key, "rng_key")
        for name, f in {"model": model, "guide": guide}.items():
            arg.require(callable(f), name, "a function", arg.shown(f))
        loss, mutable = self._loss(rng_key, param_map, model, guide, args, kwargs)
        return {"loss": loss, "mutable_state": jax.tree.map(lambda x: x[0], mutable) or None}


class RLOO_ELBO(_Scored):
    """Train discrete guide sites with an unbiased, low-variance gradient of the ELBO.

    ``SVI(model, guide, optimizer, RLOO_ELBO(num_particles=10))`` trains any guide. Sites with a pathwise
    gradient get it, as under `Trace_ELBO`. Some sites have none (``has_rsample`` is false: Bernoulli,
    Categorical, Poisson, ..., and this library's straight-through classes and gates with atoms, whose
    pathwise gradient is not the whole gradient). Such a site z gets the score of its law, times the cost of
    its draw minus the cost of the other particles' draws. With K particles, and C_k the sum of the terms
    ``log p - log q`` of particle k that are downstream of z_k, the gradient is the gradient of

    ``mean_k elbo_k + mean_k sum_z stop_gradient(C_k - sum_{j != k} C_j / (K - 1)) log q(z_k)``.

    No other particle depends on z_k, so the baseline leaves the mean unchanged. Downstream terms are found as
    in `TraceGraph_ELBO`: terms that z does not reach are left out, and in a plate every element has its own
    cost and baseline. A plate declares that its elements are independent. If they reach each other through a
    deterministic sum in the model, draw z outside the plate (or use ``to_event``). If they do so through a
    site of the guide outside the plate, this is detected, and the whole plate shares the credit. It is also
    shared along batch axes without a plate.

    In a `scan` of the model, the draw of a step pays for that step and the steps after it, with its own
    baseline, because earlier steps cannot depend on it. The guide may draw such a site in a `scan` or all at
    once, as `AutoMeanField` does. If the guide scans backward, or draws another site from the finished scan,
    all steps share the costs: this is unbiased, with more variance.

    A subsampled plate has one minibatch for all particles, so the baseline of an element uses the same data
    point. Scales and masks belong to the cost, not to the score: a scaled or masked site is still drawn from
    its law. (NumPyro 0.22's `TraceGraph_ELBO` applies them to both, and pairs costs and scores by steps of a
    `scan`: its gradient is biased there.) Sites under `relaxit_jax.handlers.relax` have pathwise gradients
    and keep them. The new value of a `mutable` site comes from the first particle.

    Args:
      num_particles: K, an integer of at least 2. With 2, one evaluation of the ELBO serves as the baseline of
        the other.
      vectorize_particles: True to `jax.vmap` over the particles, False for `jax.lax.map`, or a function to
        use instead, called with the function of one particle and the keys.

    If the model gives a draw probability 0, the loss is infinite, and the gradient is NaN for the elements
    whose cost includes it, and only for these. ``loss`` names the site and the draws if it is called outside
    `jax.jit`.

    Returns:
      From ``loss(key, params, model, guide, *args)``: the negative ELBO, averaged over the particles.

    Raises:
      ValueError: for a ``num_particles`` below 2 or not an integer, or a ``vectorize_particles`` that is none
        of these; from ``loss``, for an enumerated site (use `TraceEnum_ELBO`), and where NumPyro would not
        give model and guide the same draws: a latent site inside a `cond`, or in a subsampled plate inside a
        `scan`.

    References:
      W. Kool, H. van Hoof, M. Welling (2019), Buy 4 REINFORCE Samples, Get a Baseline for Free!, ICLR
      workshop on deep reinforcement learning meets structured prediction, openreview:r1lgTGL5DE.
      J. Schulman, N. Heess, T. Weber, P. Abbeel (2015), Gradient Estimation Using Stochastic
      Computation Graphs, arXiv:1506.05254.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model():
    ...     z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...     numpyro.sample("y", dist.Normal(z, 0.5), obs=1.0)
    >>> guide = lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.0)))
    >>> svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.05), RLOO_ELBO(num_particles=10))
    >>> logits = svi.run(jax.random.key(0), 500, progress_bar=False).params["logits"]
    >>> print(jax.nn.sigmoid(logits).round(2))  # the posterior, 1 / (1 + exp(-2))
    0.88
    """

    def _loss(self, rng_key, param_map, model, guide, args, kwargs):
        # the particles have the keys of Trace_ELBO, and its draws if no plate is subsampled
        keys = jax.random.split(rng_key, self.num_particles)
        minibatch = jax.random.split(jax.random.fold_in(rng_key, self.num_particles))
        model, guide = (
            seed(f, key, hide_types=["sample", "prng_key", "control_flow"])
            for f, key in zip((model, guide), minibatch, strict=True)
        )
        particle = functools.partial(_particle, model, guide, args, kwargs, param_map)
        elbos, scored, impossible, mutable = self.vectorize_particles_fn(particle, keys)
        _tell(impossible)
        elbo = jnp.mean(elbos) + sum(_leave_one_out(*pair) for pair in scored.values())
        return -elbo, mutable


class VIMCO_ELBO(_Scored):
    """Train discrete guide sites with an unbiased, low-variance gradient of the importance-weighted bound.

    ``SVI(model, guide, optimizer, VIMCO_ELBO(num_particles=10))`` trains ``L = log mean_k w_k`` with the
    weights ``w_k = p(x, z_k) / q(z_k)``. This bound is closer to log p(x) than the mean of ``log w_k``, and
    lets a guide cover more of the posterior. It equals NumPyro's ``RenyiELBO(alpha=0)`` at the same key.
    Sites with a pathwise gradient keep it. Every other site gets the score of its law times ``L - L_k``,
    where L_k is L with w_k replaced by the geometric mean of the other weights. SVI differentiates

    ``L + sum_k sum_z stop_gradient(L - L_k) log q(z_k)``.

    In plates that enclose all sites, every element has its own bound, as in `RenyiELBO`. Elements of other
    plates share the weights, so the bound loosens with their number. Masks and scales apply to the weights,
    not to the score.

    Args:
      num_particles: K, an integer of at least 2.
      vectorize_particles: True to `jax.vmap` over the particles, False for `jax.lax.map`, or a function to
        use instead, called with the function of one particle and the keys.

    Returns:
      From ``loss(key, params, model, guide, *args)``: the negative bound. A particle whose draws have
      probability 0 under the model has weight 0. If all have, the loss is infinite, and outside `jax.jit` a
      warning names the sites. The new value of a `mutable` site comes from the first particle.

    Raises:
      ValueError: for arguments that are not as above; from ``loss``, for an enumerated or relaxed site, for a
        latent site inside a `cond` or in a subsampled plate inside a `scan`, and for a subsampled plate that
        does not enclose all sites.

    References:
      A. Mnih, D. J. Rezende (2016), Variational Inference for Monte Carlo Objectives, arXiv:1602.06725.
      Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance Weighted Autoencoders, arXiv:1509.00519.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model():
    ...     z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...     numpyro.sample("y", dist.Normal(z, 0.5), obs=1.0)
    >>> guide = lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.0)))
    >>> loss = lambda bound: bound(50).loss(jax.random.key(0), {"logits": 0.0}, model, guide)
    >>> print(f"{loss(VIMCO_ELBO):.2f} {loss(RLOO_ELBO):.2f}")  # -log p(y) is 0.79
    0.79 1.31
    """

    def _loss(self, rng_key, param_map, model, guide, args, kwargs):
        # the keys are the same as in RenyiELBO
        minibatch, rest = jax.random.split(rng_key)
        hidden = ["sample", "prng_key", "control_flow"]
        model, guide = (seed(f, minibatch, hide_types=hidden) for f in (model, guide))
        particle = functools.partial(_weighted_particle, model, guide, args, kwargs, param_map)
        keys = jax.random.split(rest, self.num_particles)
        log_weights, log_q, scale, impossible, mutable = self.vectorize_particles_fn(particle, keys)
        bound, others = lm.leave_one_out_bounds(log_weights)
        hopeless = jnp.any(bound == -jnp.inf)  # no particle has a weight
        _tell({name: draws & hopeless for name, draws in impossible.items()})
        total = jnp.sum(bound) + _slope(stop_gradient(bound - others), log_q)
        return -total * scale[0], mutable


def _leave_one_out(log_q, cost):
    """0, with the gradient of ``mean_k (C_k - mean_{j != k} C_j) log q(z_k)`` for each element.

    The axis of the particles is first.
    """
    # One cost is subtracted first: equal ones become exactly 0, and large ones do not round the mean.
    cost = cost - cost[:1]
    return _slope(stop_gradient(cost - jnp.mean(cost, 0)) / (len(cost) - 1), log_q)


@jax.custom_jvp
def _slope(gain, log_q):
    """0, with the gradient of ``sum gain log_q`` in log_q: an infinite gain stays out of the value."""
    return jnp.zeros((), log_q.dtype)


@_slope.defjvp
def _slope_jvp(primals, tangents):
    return _slope(*primals), jnp.sum(primals[0] * tangents[1])


def _tell(impossible):
    """Name the sites at which draws have probability 0, if this is known: outside `jax.jit`."""
    for name, draws in impossible.items():
        if not isinstance(draws, jax.core.Tracer) and (which := np.flatnonzero(draws)).size:
            warnings.warn(
                f"the site '{name}' has probability 0 under the draws of the particles {which.tolist()}: the "
                "loss is infinite, and the gradient of the latent elements that it depends on is NaN. Give "
                "the guide no mass where the model has none, or give the model some mass everywhere.",
                stacklevel=5,
            )


def _traces(model, guide, args, kwargs, params, key):
    """The traces of guide and model, the scans of their sites, and the mutable values."""
    model_key, guide_key = jax.random.split(key)
    guide_flows, model_flows = _Draws(guide=True), _Draws()
    with guide_flows:  # outside the trace, which then sees its results
        guide_trace = trace(substitute(seed(guide, guide_key), params)).get_trace(*args, **kwargs)
    mutable = _values(guide_trace, "mutable")
    replayed = replay(seed(model, model_key), guide_trace)
    with model_flows:
        model_trace = trace(substitute(replayed, params | mutable)).get_trace(*args, **kwargs)
    mutable |= _values(model_trace, "mutable")
    check_model_guide_match(model_trace, guide_trace)
    npr.validate_model(model_trace, plate_warning="loose")
    return guide_trace, model_trace, guide_flows.scanned, model_flows.scanned, mutable


def _drawn(guide_trace):
    return {name: s for name, s in guide_trace.items() if s["type"] == "sample" and not s["is_observed"]}


def _impossible(model_trace):
    """For each site of the model, whether this particle's draws have probability 0 there."""
    sites = {name: s for name, s in model_trace.items() if s["type"] == "sample"}
    return {name: jnp.any(log_prob_of(s) == -jnp.inf) for name, s in sites.items()}


def _log_q(s):
    """The log-probability of the law that was drawn from, without its mask."""
    return log_prob_of(s | {"fn": _unmasked(s["fn"])})


def _weighted_particle(model, guide, args, kwargs, params, key):
    """log p - log q and log q of the scored sites, by element of the plates that enclose all sites.

    Also the factor by which these plates are subsampled, the sites of probability 0, and the mutable values.
    """
    guide_trace, model_trace, _, _, mutable = _traces(model, guide, args, kwargs, params, key)
    sites = [s for s in model_trace.values() if s["type"] == "sample"]
    own = frozenset.intersection(*map(plates_of, sites)) if sites else frozenset()
    scale = 1.0
    for frame in frozenset().union(*map(plates_of, sites)):
        plate = model_trace.get(frame.name)  # a plate inside a scan is not here
        whole = frame.size if plate is None else plate["args"][0]
        if frame in own:
            scale *= whole / frame.size
        elif whole > frame.size:
            raise ValueError(
                f"the plate '{frame.name}' shows {frame.size} of {whole} rows and does not enclose all "
                "sites, so the bound is not a sum over its rows. Use the whole plate, or RLOO_ELBO."
            )
    log_weight, log_q = jnp.zeros(()), jnp.zeros(())
    for sign, sites in ((1, model_trace), (-1, guide_trace)):
        for s in sites.values():
            if s["type"] == "sample":
                log_weight += sign * sum_to(own, scaled_log_prob(s)) / scale
    for name, s in _drawn(guide_trace).items():
        if _scores_another_law(s["fn"]):
            raise ValueError(
                f"the site '{name}' is relaxed, and importance weights need draws of the discrete law. "
                "Remove relax, or train with Trace_ELBO."
            )
        if not s["fn"].has_rsample:
            log_q += sum_to(own, _log_q(s))
    log_weight, log_q = jnp.broadcast_arrays(log_weight, log_q)
    return log_weight, log_q, jnp.asarray(scale), _impossible(model_trace), mutable


def _particle(model, guide, args, kwargs, params, key):
    """The ELBO with its pathwise gradient, and what else one particle gives.

    These are the pair (log q, cost) of each scored site, the sites of probability 0 in the model, and the
    mutable values.
    """
    guide_trace, model_trace, guide_scans, model_scans, mutable = _traces(
        model, guide, args, kwargs, params, key
    )
    drawn = _drawn(guide_trace)
    scored = {name: s for name, s in drawn.items() if not s["fn"].has_rsample}
    latents = {name: s["value"] for name, s in drawn.items()}
    model_deps, guide_deps = (
        get_nonreparam_deps(model, guide, args, kwargs, params, latents) if scored else ({}, {})
    )

    terms = []
    for sign, sites, deps, scans in (
        (1, model_trace, model_deps, model_scans),
        (-1, guide_trace, guide_deps, guide_scans),
    ):
        for name, s in sites.items():
            if s["type"] == "sample":
                log_prob = scaled_log_prob(s)
                if sign < 0 and name in scored:  # a score has mean 0: only the costs get its gradient
                    log_prob = stop_gradient(log_prob)
                scan = scans.get(name)
                terms.append(_Term(name, sign < 0, plates_of(s), sign * log_prob, deps.get(name, ()), scan))
    elbo = sum((jnp.sum(term.value) for term in terms), start=jnp.array(0.0))
    pairs = {}
    for name, s in scored.items():
        below = {other for other in drawn if other != name and name in guide_deps[other]}
        own = plates_of(s)
        for other in below:  # anything that leaves a plate may come back anywhere
            own &= plates_of(drawn[other])
        log_q = _log_q(s)
        downstream = [term for term in terms if name in term.upstream]
        scans = _scans_of(name, below, guide_scans, model_scans)
        if scans is None or not jnp.ndim(log_q) or len(log_q) != len(model_trace[name]["value"]):
            cost = sum(sum_to(own & term.plates, term.value) for term in downstream)
            pairs[name] = jnp.broadcast_arrays(sum_to(own, log_q), cost)
        else:
            pairs[name] = _from_each_step_on(name, log_q, own, downstream, *scans)
    return elbo, pairs, _impossible(model_trace), mutable


@dataclasses.dataclass(frozen=True)
class _Term:
    """A term of the ELBO: log p or -log q of a site."""

    site: str
    of_guide: bool
    plates: frozenset[Any]
    value: Array
    upstream: Collection[str]  # the scored sites that it depends on
    scan: dict[str, Any] | None  # the message of the scan that it comes from


def _scans_of(name, below, in_guide, in_model):
    """The scans of the model and the guide in which this site is drawn step by step.

    No step may reach an earlier one. The guide's is None if it draws all steps at once, independently.
    """
    own, model = in_guide.get(name), in_model.get(name)
    if model is None or any(own is None or in_guide.get(other) is not own for other in below):
        return None
    return None if own and npr.is_reverse(own) else (model, own)


def _from_each_step_on(name, log_q, own, downstream, model_scan, guide_scan):
    """log q of the draw of each step, and the costs of this step and of all steps after it."""
    own = frozenset(frame for frame in own if frame.dim != -log_q.ndim)  # a plate over the steps
    ndim = max(log_q.ndim, *(term.value.ndim for term in downstream))
    cost = jnp.zeros(())
    for term in downstream:
        itself = term.of_guide and term.site == name and guide_scan is None
        scan = guide_scan if term.of_guide else model_scan
        stepwise = itself or (scan is not None and term.scan is scan)
        if not stepwise or term.value.shape[:1] != log_q.shape[:1]:
            cost += sum_to(own & term.plates, term.value)
            continue
        steps = _sum_steps(own & term.plates, term.value, ndim)
        cost += steps if itself else jax.lax.cumsum(steps, 0, reverse=True)
    return jnp.broadcast_arrays(_sum_steps(own, log_q, ndim), cost)


def _sum_steps(plates, x, ndim):
    """`sum_to` for each step: the first axis stays the first of ndim axes."""
    x = jax.vmap(functools.partial(sum_to, plates))(x)
    return jnp.reshape(x, (len(x), *(1,) * (ndim - x.ndim), *x.shape[1:]))


def _values(sites, kind):
    return {name: s["value"] for name, s in sites.items() if s["type"] == kind}


def _scores_another_law(fn):
    """Whether it is a site of `relax`, in any wrappers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return getattr(fn, "scores_another_law", False)


def _unmasked(fn):
    """The law that was drawn from, in the same wrappers."""
    if not hasattr(fn, "base_dist"):
        return fn
    fn = copy.copy(fn)
    fn.base_dist = _unmasked(fn.base_dist)
    if isinstance(fn, MaskedDistribution):
        fn._mask = True
    return fn


class _Draws(Messenger):
    """Refuse sites that cannot be right; in the guide, stop the gradients of scored draws.

    It enters the body of a `scan` itself, where the carried values are the draws.
    """

    def __init__(self, fn=None, guide=False, in_scan=False):
        super().__init__(fn)
        self.guide, self.in_scan = guide, in_scan
        self.flow, self.subsampled = None, set()  # the last control flow; plates
        self.scanned = {}  # the scans of the sites

    def process_message(self, msg):
        if msg["type"] == "control_flow":
            self.flow = msg
            if npr.runs_scan(msg["fn"]):
                npr.wrap_scan_body(msg, lambda body: _Draws(body, self.guide, in_scan=True))
        elif msg["type"] == "plate" and self.in_scan and npr.is_subsampled(msg):
            self.subsampled.add(msg["name"])

    def postprocess_message(self, msg):
        if npr.is_replaying():
            npr.require_right_order(msg, self.flow)
        if msg["type"] == "sample" and npr.comes_from_flow(msg) and npr.runs_scan(self.flow["fn"]):
            self.scanned[msg["name"]] = self.flow
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        name = f"the site '{msg['name']}'"
        if msg["infer"].get("enumerate"):
            raise ValueError(
                f"{name} is enumerated, but this ELBO draws it: use TraceEnum_ELBO, or do not enumerate it"
            )
        if npr.comes_from_flow(msg) and npr.runs_cond(self.flow["fn"]):
            raise ValueError(
                f"{name} is inside a cond, where NumPyro does not give the model the guide's draw: "
                "draw it before the cond"
            )
        npr.require_same_rows(msg, self.subsampled)
        if self.guide and not msg["fn"].has_rsample:
            msg["value"] = stop_gradient(msg["value"])
            msg["intermediates"] = None  # the density is for the value, however it was made
