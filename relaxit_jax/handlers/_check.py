"""`check`: what a trained guide has found, what it has missed, and what to do."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers, optim
from numpyro.infer import SVI, Trace_ELBO, psis_diagnostic
from numpyro.infer.inspect import get_dependencies

from relaxit_jax import _arguments as arg
from relaxit_jax._terms import log_prob_of, scaled_log_prob, sum_to
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import _relaxation as rl
from relaxit_jax.handlers import _start as start
from relaxit_jax.handlers import _wrappers as wr
from relaxit_jax.handlers._auto_structured import AutoStructured
from relaxit_jax.handlers._marginals import discrete_latents, law_and_value, marginals
from relaxit_jax.handlers._relax import relax

PARTICLES, GRADIENTS = 10, 100  # for one estimate of a gradient; number of estimates
INNER = 200  # draws of the discrete sites for one draw of the others
RIVAL_STEPS, RIVAL_RATE = 1500, 0.05
GAP, BETTER, TREND = 1.5, 1.0, 1.0  # in nats: the size that is worth reporting
OFF, CLOSER = 0.05, 0.15  # for a probability; and for an ELBO in nats, if such a probability differs
TRUSTED = 0.7  # the Pareto k above which importance weights say nothing


@dataclasses.dataclass(frozen=True, eq=False)
class SiteCheck:
    """The findings of `check` for one discrete site.

    Args:
      probs: the guide's marginal probabilities: of a one for bits, otherwise of all values on a last axis.
      weighted: the same with draws weighted by ``p / q``; None if these weights cannot be trusted.
      weighted_error: the standard errors of ``weighted``; None if ``weighted`` is.
      gradient: the norm of the mean gradient of the loss in the parameters of this site, with `RLOO_ELBO`.
      noise: the standard deviation of one such estimate with ten particles, as the root of the sum of
        squares.
      relaxed_bias: the norm of the difference of the mean gradient under `relax`, beyond the noise; None if
        `relax` refuses the model.
      relaxed_noise: the standard deviation under `relax`.
      swallowed: whether no draw has a slope under `relax`, for example because of a comparison.
      moved: the largest change of a probability since the start.
      rival: the marginal probabilities of the `AutoStructured` guide trained for comparison; None without it.
    """

    probs: np.ndarray
    weighted: np.ndarray | None
    weighted_error: np.ndarray | None
    gradient: float
    noise: float
    relaxed_bias: float | None
    relaxed_noise: float | None
    swallowed: bool | None
    moved: float
    rival: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
    """Result of `check`. Its ``str`` is the printed table and advice.

    Args:
      bound: the ELBO of the discrete model, in nats.
      bound_error: its standard error.
      relaxed_bound: the mean of the relaxed objective, which is not a bound; None if `relax` refuses the
        model.
      gap: a lower limit on how far the guide's discrete sites are from their posterior, in nats: the rise of
        the ELBO if 200 weighted draws replace one. If the elements of the sites are independent, each is
        redrawn given the others; otherwise all sites are redrawn together.
      gap_error: its standard error.
      rival: the ELBO of an `AutoStructured` guide that was trained for comparison, its standard error and its
        Pareto k; None if it was not tried or could not be created.
      pareto_k: the shape of the tail of the importance weights, by NumPyro's `psis_diagnostic`.
      trend: the change of the loss over its last tenth and its standard error; None without losses.
      impossible: for each site of the model, the share of draws that have probability 0 there.
      sites: a `SiteCheck` for each discrete site, by name.
      refused: why `relax` or `AutoStructured` could not handle this model and guide, by their names.
      advice: sentences that say what to do; empty if nothing was found.
    """

    bound: float
    bound_error: float
    relaxed_bound: float | None
    gap: float
    gap_error: float
    rival: tuple[float, float, float] | None
    pareto_k: float
    trend: tuple[float, float] | None
    impossible: dict[str, float]
    sites: dict[str, SiteCheck]
    refused: dict[str, str]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        number = lambda x, form=".2f": "refused" if x is None else format(x, form)
        lines = [
            f"bound of the discrete model {self.bound:12.2f} nats (error {self.bound_error:.2f})",
            f"mean relaxed objective      {number(self.relaxed_bound, '12.2f')}",
            f"gap of the discrete sites   {self.gap:12.2f} nats at least (error {self.gap_error:.2f})",
            f"Pareto k of the weights     {self.pareto_k:12.2f}",
        ]
        if self.rival is not None:
            lines.append(
                f"bound of AutoStructured     {self.rival[0]:12.2f} nats (error {self.rival[1]:.2f})"
            )
        if self.trend is not None:
            lines.append(
                f"change of the loss          {self.trend[0]:12.2f} nats (error {self.trend[1]:.2f})"
            )
        head = f"{'gradient':>9} {'noise':>9} {'relax: bias':>12} {'noise':>9} {'moved':>7} {'off by':>7}"
        width = max([4, *map(len, self.sites)])
        lines.append(f"{'site':{width}} {head}")
        for name, s in self.sites.items():
            off = math.nan if s.weighted is None else np.abs(s.weighted - s.probs).max()
            lines.append(
                f"{name:{width}} {s.gradient:9.3g} {s.noise:9.3g} {number(s.relaxed_bias, '12.3g'):>12} "
                f"{number(s.relaxed_noise, '9.3g'):>9} {s.moved:7.3f} {off:7.3f}"
            )
        lines += [f"refused by {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, *(self.advice or ["Nothing was found that is wrong."])])


def check(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Array],
    *args: Any,
    tau: ArrayLike = 0.1,
    losses: ArrayLike | None = None,
    rival: bool = True,
    num_samples: int = 1000,
    num_values: int | dict[str, int] | None = None,
    rng_key: Array | None = None,
    **kwargs: Any,
) -> Check:
    """Tell whether a trained guide has found the posterior, and what to do if it has not.

    It prints a table and advice, and returns the same numbers:

    - the ELBO of the discrete model, next to the mean relaxed objective;
    - for each discrete site the size of the gradient, its noise under `RLOO_ELBO`, its bias and noise under
      `relax`, whether a comparison swallows it there, how far the probabilities moved from their start, and
      how far they are from importance-weighted draws, if these can be trusted;
    - draws of probability 0, by the site of the model that causes them;
    - whether the guide's family contains the posterior: the gap, and the Pareto k of the importance weights;
    - whether another guide, trained here from the data, reaches a better ELBO;
    - whether the loss is still falling.

    Args:
      model: the model, not relaxed.
      guide: its guide, not relaxed. It may be hand-written.
      params: its trained parameters.
      args, kwargs: the arguments of model and guide.
      tau: the temperature under `relax`, positive.
      losses: the losses of the training, one for each step, to tell whether it has converged.
      rival: whether to train an `AutoStructured` guide for comparison, which takes most of the time.
      num_samples: number of draws for the ELBO and the weights, at least 100.
      num_values: how many values a count takes, as in `relax`.
      rng_key: key for the draws. Default: ``jax.random.key(0)``.

    Returns:
      The printed findings, as an object with these attributes. Bounds are in nats, gradients in nats for a
      unit of the parameters. ``bound`` and ``bound_error``; ``relaxed_bound``; ``gap`` and ``gap_error``;
      ``rival``, a bound, its error and Pareto k; ``pareto_k``; ``trend``, the change of the loss over its
      last tenth and its error; ``impossible``, shares of draws by site of the model; ``refused``, reasons by
      ``"relax"`` and ``"AutoStructured"``; ``advice``, a tuple of sentences, empty if nothing is wrong; and
      ``sites``, by name: ``probs``, ``weighted`` probabilities and their ``weighted_error``, ``gradient``,
      ``noise``, ``relaxed_bias``, ``relaxed_noise``, ``swallowed``, ``moved`` and the probabilities of the
      ``rival``.

    Raises:
      ValueError: for arguments that are not as above, and a guide without discrete sites.

    References:
      Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018), Yes, but Did It Work?: Evaluating Variational
      Inference, arXiv:1802.02538.
      Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance Weighted Autoencoders, arXiv:1509.00519,
      for the gap.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model():
    ...     z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...     numpyro.sample("y", dist.Normal(z, 0.5), obs=1.0)
    >>> guide = lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", 0.0)))
    >>> found = check(model, guide, {"logits": jnp.array(2.0)}, rival=False)  # doctest: +ELLIPSIS
    bound of the discrete model        -0.79 nats (error 0.00)
    ...
    Nothing was found that is wrong.
    """
    for name, f in {"model": model, "guide": guide}.items():
        arg.require(callable(f), name, "a function", arg.shown(f))
    arg.require(isinstance(params, Mapping), "params", "a dictionary from names to arrays", arg.shown(params))
    arg.require_flags(rival=rival)
    num_samples = arg.as_static_int("num_samples", num_samples, 100, 10_000_000)
    key = jax.random.key(0) if rng_key is None else rng_key
    arg.check_key(key, "rng_key")
    soft = functools.partial(relax, tau=tau, num_values=num_values)
    soft()  # anything wrong with these two is reported before anything is drawn
    run = _Run(model, guide, dict(params), args, kwargs, num_values)
    keys = jax.random.split(key, 8)
    trend = None if losses is None else _trend(losses)

    names = list(discrete_latents(run.guide_trace(key)))
    arg.require(bool(names), "guide", "one with discrete latent sites", "none")
    rl.check_names("num_values", num_values, names)
    drawn, weights, impossible = run.draws(keys[0], num_samples)
    with np.errstate(invalid="ignore"):
        bound, error = float(np.mean(weights)), float(np.std(weights) / math.sqrt(num_samples))
    k = run.pareto_k(keys[1], weights)
    gap, gap_error, coupled = run.gap(keys[2], names)
    _, means, spreads = run.gradients(keys[3], RLOO_ELBO(PARTICLES), model, guide)
    refused = {}
    try:
        loss, *relaxed = run.gradients(keys[4], Trace_ELBO(PARTICLES), soft(model), soft(guide))
        slopes = run.slopes(keys[5], soft(model), soft(guide), names)
    except (ValueError, TypeError) as reason:  # a relaxation that the model or the guide does not have
        loss, relaxed, slopes = None, None, {}
        refused["relax"] = str(reason).splitlines()[0]
    own = run.parameters_of(keys[6], names)
    first = marginals(guide, {}, *args, num_values=num_values, rng_key=keys[6], **kwargs)
    trusted = k < TRUSTED
    share = np.exp(weights - weights.max())
    share /= share.sum()

    other, probs_of_other = None, {}
    if rival:
        try:
            *other, probs_of_other = run.rival(keys[7], names)
        except (ValueError, TypeError) as reason:  # a model for which AutoStructured has no guide
            refused["AutoStructured"] = str(reason).splitlines()[0]
    sites = {}
    for name in names:
        laws, values = drawn[name]
        probs = np.mean(laws, 0)
        weighted = np.tensordot(share, values, 1) if trusted else None
        of_share = np.tensordot(share**2, (values - weighted) ** 2, 1) ** 0.5 if trusted else None
        norm = lambda tree, name=name: math.sqrt(sum(float(np.sum(tree[p] ** 2)) for p in own[name]))
        bias = None
        if relaxed is not None:
            both = {p: relaxed[0][p] - means[p] for p in means}
            expected = (norm(spreads) ** 2 + norm(relaxed[1]) ** 2) / GRADIENTS  # from noise alone
            bias = math.sqrt(max(norm(both) ** 2 - expected, 0))
        sites[name] = SiteCheck(
            probs=probs, weighted=weighted, weighted_error=of_share, gradient=norm(means),
            noise=norm(spreads), relaxed_bias=bias,
            relaxed_noise=None if relaxed is None else norm(relaxed[1]),
            swallowed=None if relaxed is None else not slopes[name],
            moved=float(np.abs(probs - np.asarray(first[name])).max()), rival=probs_of_other.get(name),
        )  # fmt: skip
    found = Check(
        bound=bound, bound_error=error, relaxed_bound=None if loss is None else -loss, gap=gap,
        gap_error=gap_error, rival=other and tuple(other), pareto_k=k, trend=trend, impossible=impossible,
        sites=sites, refused=refused, advice=(),
    )  # fmt: skip
    found = dataclasses.replace(found, advice=tuple(_advice(found, coupled)))
    print(found)
    return found


def _trend(losses):
    """The change of the loss over its last tenth by least squares, and its standard error from blocks."""
    arg.require(not isinstance(losses, jax.core.Tracer), "losses", "known before tracing", "a traced array")
    losses = np.asarray(losses)
    good = losses.dtype.kind in "if" and losses.ndim == 1 and losses.size >= 100
    arg.require(good, "losses", "numbers, one for each of 100 steps or more", arg.shown(losses))
    last = losses[
        -(losses.size // 10) :
    ]  # a learning rate that falls to 0 lowers earlier losses too, as noise fades
    blocks = np.array([block.mean() for block in np.array_split(last, 10)])
    x = np.linspace(-0.45, 0.45, 10)  # the middles of the blocks, in tenths
    slope = x @ blocks / (x @ x)
    rest = blocks - blocks.mean() - slope * x
    return float(slope), float(math.sqrt(rest @ rest / 8 / (x @ x)))


def _advice(found, coupled):
    """The problems found and what to do, a sentence or two each."""
    for name, share in found.impossible.items():
        if share:
            yield (
                f"The site '{name}' has probability 0 under {share:.1%} of the draws. Give the guide no mass "
                "where the model has none: leave these values out, or start with init='data'."
            )
    if found.rival is not None:
        gain, noise = found.rival[0] - found.bound, found.rival[1]
        noise = 3 * math.hypot(noise, found.bound_error if gain < math.inf else 0)
        differs = found.rival[2] < TRUSTED and any(
            s.rival is not None and np.abs(s.rival - s.probs).max() > OFF for s in found.sites.values()
        )
        if gain > (CLOSER if differs else BETTER) + noise:
            yield (
                f"AutoStructured(model), trained with RLOO_ELBO for {RIVAL_STEPS:,} steps, has an ELBO that "
                f"is {gain:.1f} nats better. Train it instead of this guide, or start with init='data'."
            )
    if found.trend is not None and found.trend[0] < -max(TREND, 3 * found.trend[1]):
        yield f"The loss is still falling, by {-found.trend[0]:.1f} nats over its last tenth: train longer."
    if coupled and found.gap > GAP + 3 * found.gap_error:
        yield (
            f"The draws of this guide are at least {found.gap:.1f} nats from the posterior: its sites depend "
            "on each other in a way that the guide cannot represent, or training has not ended. "
            "Try AutoStructured."
        )
    for name, s in found.sites.items():
        if s.swallowed:
            yield (
                f"Under relax the site '{name}' has no gradient: a comparison, a cond or a cast swallows it. "
                "Write it with select, take or less, or train with RLOO_ELBO."
            )
        if s.weighted is not None and (off := _off(s)) > OFF:
            yield (
                f"A probability of the site '{name}' is off by at least {off:.2f}, judging by weighted "
                "draws. The guide cannot represent it, or training has not ended: train longer, start with "
                "init='data', or use the weighted probabilities."
            )
        if s.moved < 1e-3 and s.gradient > 0.5 * s.noise:
            yield f"The site '{name}' has not moved from its start but has a gradient: train longer."


def _off(s):
    """How far a probability is from weighted draws, beyond the noise."""
    return float(np.max(np.abs(s.weighted - s.probs) - 4.5 * s.weighted_error))


class _Run:
    """A model and its trained guide, with their arguments."""

    def __init__(self, model, guide, params, args, kwargs, num_values):
        self.model, self.guide, self.params = model, guide, params
        self.args, self.kwargs, self.num_values = args, kwargs, num_values

    def guide_trace(self, key, params=None):
        params = self.params if params is None else params
        with handlers.block():
            fixed = handlers.substitute(handlers.seed(self.guide, key), params)
            return handlers.trace(fixed).get_trace(*self.args, **self.kwargs)

    def model_trace(self, key, guide_trace):
        with handlers.block():
            seeded = handlers.substitute(handlers.seed(self.model, key), self.params)
            return handlers.trace(handlers.replay(seeded, guide_trace)).get_trace(*self.args, **self.kwargs)

    def draws(self, key, number):
        """Laws and values of the discrete sites, log-weights, and shares of impossible draws."""

        def draw(key):
            first, second = jax.random.split(key)
            guide = self.guide_trace(first)
            model = self.model_trace(second, guide)
            sites = {n: law_and_value(n, s, self.num_values) for n, s in discrete_latents(guide).items()}
            impossible = {
                name: jnp.any(log_prob_of(s) == -jnp.inf)
                for name, s in model.items()
                if s["type"] == "sample"
            }
            return sites, _total(model) - _total(guide), impossible

        sites, weights, impossible = jax.lax.map(draw, jax.random.split(key, number), batch_size=20)
        shares = {name: float(jnp.mean(x)) for name, x in impossible.items()}
        return jax.tree.map(np.asarray, sites), np.asarray(weights, np.float64), shares

    def gap(self, key, names):
        """The rise of the ELBO if weighted draws replace one, element by element if they are independent."""
        trace = self.guide_trace(key)
        model = self.model_trace(key, trace)
        with handlers.block():
            depends = get_dependencies(self.model, self.args, self.kwargs)["prior_dependencies"]
            in_guide = get_dependencies(self.guide, self.args, self.kwargs)["prior_dependencies"]
        alone = {}
        meets = {name: start.terms_and_plates(name, model, depends) for name in names if name in model}
        for name, (terms, plates) in meets.items():
            fn, value = trace[name]["fn"], trace[name]["value"]
            elements = jnp.size(value) // math.prod(wr.innermost(fn).event_shape)
            independent = elements == math.prod(fn.batch_shape[frame.dim] for frame in plates)
            others = [meets[other][0] for other in meets if other != name]
            below = any(name in above for other, above in in_guide.items() if other != name)
            if independent and not below and not any(terms & other for other in others):
                alone[name] = (terms, plates)
        together = set(names) - set(alone)

        def weights(trace, key):
            model = self.model_trace(key, trace)
            each = {}
            for name, (terms, plates) in alone.items():
                log_p = sum(sum_to(plates, scaled_log_prob(model[term])) for term in terms)
                each[name] = log_p - sum_to(plates, scaled_log_prob(trace[name]))
            return each, _total(model) - _total(trace)

        def outer(key):
            first, rest = jax.random.split(key)
            base = self.guide_trace(first)
            fixed = {n: s["value"] for n, s in base.items() if s["type"] == "sample" and n not in alone}

            def inner(key):
                if together:  # redraw all sites: they may depend on each other in any way
                    return weights(self.guide_trace(key), key)
                again = self.guide_trace(key, self.params | fixed)
                return weights(again, key)

            each, total = jax.lax.map(inner, jax.random.split(rest, INNER), batch_size=20)
            rise = lambda x: jnp.sum(jax.nn.logsumexp(x, 0) - math.log(INNER) - jnp.mean(x, 0))
            return rise(total) if together else sum(rise(x) for x in each.values())

        found = np.asarray(jax.lax.map(outer, jax.random.split(key, 20)))
        with np.errstate(invalid="ignore"):  # infinite where draws have probability 0
            error = found.std(ddof=1) / math.sqrt(len(found))
        return float(found.mean()), float(error), bool(together)

    @functools.cached_property
    def floats(self):
        """The parameters that have gradients."""
        return {n: x for n, x in self.params.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}

    def gradients(self, key, elbo, model, guide):
        """The mean loss; means and standard deviations of the gradients in the parameters, by name."""

        def loss(floats, key):
            return elbo.loss(key, self.params | floats, model, guide, *self.args, **self.kwargs)

        keys = jax.random.split(key, GRADIENTS)
        both = jax.jit(lambda p: jax.lax.map(lambda k: jax.value_and_grad(loss)(p, k), keys))
        losses, found = both(self.floats)
        found = {n: np.asarray(g, np.float64) for n, g in found.items()}
        spreads = {n: g.std(0, ddof=1) for n, g in found.items()}
        return float(jnp.mean(losses)), {n: g.mean(0) for n, g in found.items()}, spreads

    def slopes(self, key, model, guide, names):
        """For each site, whether the log-probability of the model has a slope in any of its relaxed draws."""
        run = _Run(model, guide, self.params, self.args, self.kwargs, self.num_values)

        def slope(key):
            trace = run.guide_trace(key)

            def total(values):
                moved = {n: s | {"value": values[n]} if n in values else s for n, s in trace.items()}
                return _total(run.model_trace(key, moved))

            floats = {
                n: trace[n]["value"] for n in names if jnp.issubdtype(trace[n]["value"].dtype, jnp.inexact)
            }
            return {n: jnp.any(g != 0) for n, g in jax.grad(total)(floats).items()}

        found = jax.lax.map(slope, jax.random.split(key, 10))
        return {n: bool(jnp.any(found[n])) if n in found else True for n in names}

    def parameters_of(self, key, names):
        """The parameters that the law of each site depends on, given its draws and the draws before it."""
        trace = self.guide_trace(key)
        values = {n: s["value"] for n, s in trace.items() if s["type"] == "sample"}

        def log_q(params):
            with handlers.block():
                seeded = handlers.substitute(handlers.seed(self.guide, key), params | values)
                again = handlers.trace(seeded).get_trace(*self.args, **self.kwargs)
            return {n: jnp.sum(log_prob_of(again[n])) for n in names}

        if not self.floats:
            return {name: [] for name in names}
        slopes = jax.jacrev(lambda floats: log_q(self.params | floats))(self.floats)
        return {n: [p for p, x in slopes[n].items() if bool(jnp.any(x != 0))] for n in names}

    def pareto_k(self, key, weights):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = psis_diagnostic(
                key, self.params, self.model, self.guide, *self.args, num_particles=len(weights),
                chunk_size=100, **self.kwargs,
            )  # fmt: skip
        largest = np.sort(weights)[-len(weights) // 5 :]
        # the largest weights are all equal, so there is no tail
        return -math.inf if found == math.inf and largest[-1] - largest[0] < 600 else found

    def rival(self, key, names):
        """The ELBO, its standard error, Pareto k and marginals of a new guide that is trained here."""
        guide = AutoStructured(self.model, num_values=self.num_values)
        optimizer = optim.Adam(lambda i: RIVAL_RATE * (1 + jnp.cos(math.pi * i / RIVAL_STEPS)) / 2)
        svi = SVI(self.model, guide, optimizer, RLOO_ELBO(PARTICLES))
        result = svi.run(key, RIVAL_STEPS, *self.args, progress_bar=False, **self.kwargs)
        run = _Run(self.model, guide, result.params, self.args, self.kwargs, self.num_values)
        drawn, weights, _ = run.draws(key, 500)
        # a hand-written guide may have discrete sites that the model does not have
        probs = {name: np.mean(drawn[name][0], 0) for name in names if name in drawn}
        with np.errstate(invalid="ignore"):
            bound, error = float(weights.mean()), float(weights.std() / len(weights) ** 0.5)
        return bound, error, run.pareto_k(key, weights), probs


def _total(trace):
    return sum(jnp.sum(scaled_log_prob(s)) for s in trace.values() if s["type"] == "sample")
