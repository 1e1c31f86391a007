"""Where a guide starts: coordinate ascent on the discrete sites and a point of the continuous ones."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers, optim
from numpyro.distributions import biject_to
from numpyro.infer.inspect import get_dependencies

from relaxit_jax import samplers
from relaxit_jax._terms import plates_of, scaled_log_prob, sum_to

STARTS, STARTS_IF_COUPLED = 8, 4  # each with other draws, and another point of the continuous sites
PASSES = 6  # if there are only discrete sites
PASSES_WITH_STEPS, STEPS, RATE = 50, 12, 0.1  # steps of Adam on the continuous sites in each pass
GIVEN = 20  # times as many steps before the first pass, if the user gave the first logits
COLD, WARM = 1.5, 0.05  # factors of the logits in the last pass (at most 1) and in the first
DRAWS = 1  # draws of all discrete sites for a gradient: the passes average
DRAWS_OF_BOUND = 64
OTHERS, OTHERS_LAST = 2, 8  # draws of the other elements for the law of one, and in the last pass
MOST_ELEMENTS = 2000  # elements of a site that are visited one after another
FLOOR = -6.0  # the logarithm of the probability that values far below the best one share in the end
NEVER = -30.0  # for a value that the data rule out


def from_data(
    key: Array,
    model: Any,
    args: Any,
    kwargs: Any,
    sites: Any,
    given: bool,
    fixed: bool,
    sure: float,
    points: Any,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Find logits of the discrete sites and values of the continuous ones with high posterior probability.

    Each pass sets the logits of every element to the expected log-joint of its values, which is the best law
    of that element given the others (coordinate ascent), and then follows the gradient of the expected
    log-joint in the continuous sites. Elements that no term of the model couples are set at once. The first
    passes make the laws flatter, so that elements find their clusters together (deterministic annealing). The
    start with the highest ELBO wins.

    Args:
      sites: the discrete sites, as in `AutoMeanField`.
      given: whether the user gave the first logits, so that the continuous sites come first.
      sure: the largest log-odds at which sites start if their elements depend on each other.
      fixed: whether the continuous sites stay where they are.
      points: a function of a key that returns the first values of the continuous sites, by name.

    N. Ueda, R. Nakano (1998), Deterministic annealing EM algorithm, Neural Networks 11.
    """
    ascent = _Ascent(model, args, kwargs, sites, points(key))
    coupled = any(site.visits > 1 for site in ascent.sites)
    starts = STARTS_IF_COUPLED if coupled else STARTS if ascent.transforms else 1
    logits, free = ascent.best(key, starts, points, given, fixed)
    bounds = {s.site.name: -sure if s.visits > 1 else -np.inf for s in ascent.sites}
    return {name: _at_least(x, bounds[name]) for name, x in logits.items()}, ascent.constrain(free)


def _at_least(logits, bound):
    """Leave some probability for every value that the data allow, so that it can be drawn and learned."""
    floor = max(FLOOR - np.log(logits.shape[-1]), bound)
    logits = logits - jnp.max(logits, -1, keepdims=True)
    return jnp.where(logits > 0.9 * NEVER, jnp.maximum(logits, floor), NEVER)


def terms_and_plates(name: str, trace: Any, depends: Any) -> tuple[frozenset[str], frozenset[Any]]:
    """The sites whose log-probability depends on a site, including itself; and the plates of all of these.

    Within such a plate the elements of the site are independent, whatever the others are.
    """
    terms = frozenset({name, *(other for other, above in depends.items() if name in above)})
    return terms, frozenset.intersection(*(plates_of(trace[term]) for term in terms))


@dataclasses.dataclass(frozen=True)
class _Site:
    """A discrete site, and how its elements depend on each other."""

    site: Any
    logits: Array  # for each element, with a last axis for the values; -inf where a value is impossible
    terms: frozenset[str]  # names of the sites whose log-probability depends on it, including itself
    plates: frozenset[Any]  # plates that all of these terms share: their elements are independent
    axes: tuple[int, ...]  # axes of the elements, one for each of these plates

    @property
    def coupled(self) -> tuple[int, ...]:
        """The sizes of the axes of the elements, 1 where a plate makes them independent."""
        shape = self.logits.shape[:-1]
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(shape))

    @property
    def visits(self) -> int:
        return math.prod(self.coupled)


class _Ascent:
    def __init__(self, model, args, kwargs, sites, point):
        self.model, self.args, self.kwargs = model, args, kwargs
        first = {s.name: s.value(jnp.argmax(s.first_logits, -1)) for s in sites}
        trace = self.trace(first | point)
        with handlers.block():
            depends = get_dependencies(model, args, kwargs)["prior_dependencies"]
        self.sites = [self.site(s, trace, depends) for s in sites]
        self.transforms = {name: biject_to(trace[name]["fn"].support) for name in point}

    def best(self, key, starts, points, given, fixed):
        """The logits and free continuous sites from the best of several runs."""
        keys = jax.random.split(key, starts)
        first = [self.unconstrain(points(k)) for k in keys]
        first = jax.tree.map(lambda *x: jnp.stack(x), *first)
        runs = jax.jit(lambda *pair: jax.lax.map(lambda x: self.run(*x, given, fixed), pair))
        found, logits, free = runs(keys, first)
        best = int(np.argmax(np.where(np.isnan(found), -np.inf, found)))
        return jax.tree.map(lambda x: x[best], (logits, free))

    def site(self, s, trace, depends):
        terms, plates = terms_and_plates(s.name, trace, depends)
        return _Site(s, s.first_logits, terms, plates, tuple(s.batch_ndim + frame.dim for frame in plates))

    def unconstrain(self, point):
        return {name: self.transforms[name].inv(x) for name, x in point.items()}

    def constrain(self, free):
        return {name: self.transforms[name](x) for name, x in free.items()}

    def trace(self, values):
        with handlers.block():
            seeded = handlers.seed(self.model, jax.random.key(0))
            return handlers.trace(handlers.substitute(seeded, data=values)).get_trace(
                *self.args, **self.kwargs
            )

    def terms(self, values):
        """The log-probabilities of all sites, by name; NaN is of no use here."""
        found = {n: scaled_log_prob(s) for n, s in self.trace(values).items() if s["type"] == "sample"}
        return {name: jnp.where(jnp.isnan(x), -jnp.inf, x) for name, x in found.items()}

    def log_joint(self, indices, free):
        """The log-joint in the unconstrained space, where a density has a maximum more often."""
        values = {s.site.name: s.site.value(indices[s.site.name]) for s in self.sites}
        total = sum(jnp.sum(x) for x in self.terms(values | self.constrain(free)).values())
        for name, x in free.items():
            total += jnp.sum(self.transforms[name].log_abs_det_jacobian(x, self.transforms[name](x)))
        return total

    def draw(self, key, logits):
        keys = jax.random.split(key, len(logits) or 1)
        return {
            name: jax.random.categorical(k, x) for k, (name, x) in zip(keys, logits.items(), strict=False)
        }

    def run(self, key, free, given, fixed):
        """The ELBO at the end, the logits and the continuous sites."""
        logits = {s.site.name: s.logits for s in self.sites}
        optimizer, moves = optim.Adam(RATE), bool(free) and not fixed

        def climb(state, key):
            logits, free_state = state

            def loss(free, key):
                each = lambda k: self.log_joint(self.draw(k, logits), free)
                return -jnp.mean(jax.vmap(each)(jax.random.split(key, DRAWS)))

            def step(free_state, key):
                gradient = jax.grad(loss)(optimizer.get_params(free_state), key)
                # a draw that the model rules out gives no direction
                finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), gradient)
                return optimizer.update(finite, free_state), None

            return jax.lax.scan(step, free_state, jax.random.split(key, STEPS))[0] if moves else free_state

        def one_pass(state, key_and_cold):
            logits, free_state = state
            key, cold = key_and_cold
            first, second = jax.random.split(key)
            logits = self.sweep(first, logits, optimizer.get_params(free_state))
            logits = {name: cold * x for name, x in logits.items()}
            return (logits, climb((logits, free_state), second)), None

        state = (logits, optimizer.init(free))
        key, first, last = jax.random.split(key, 3)
        if given:  # until the continuous sites have moved to where these logits put them
            more = jax.random.split(first, GIVEN)
            state = (logits, jax.lax.scan(lambda x, k: (climb((logits, x), k), None), state[1], more)[0])
        passes = PASSES_WITH_STEPS if moves else PASSES
        cold = jnp.ones(passes) if given else jnp.minimum(jnp.linspace(WARM, COLD, passes), 1)
        (logits, free_state), _ = jax.lax.scan(one_pass, state, (jax.random.split(key, passes), cold))
        free = optimizer.get_params(free_state)
        logits = self.sweep(last, logits, free, OTHERS_LAST)
        return self.bound(last, logits, free), logits, free

    def bound(self, key, logits, free):
        each = lambda k: self.log_joint(self.draw(k, logits), free)
        expected = jnp.mean(jax.lax.map(each, jax.random.split(key, DRAWS_OF_BOUND), batch_size=4))
        return expected + sum(jnp.sum(samplers.categorical_entropy(x)) for x in logits.values())

    def sweep(self, key, logits, free, others=OTHERS):
        """Coordinate ascent: every site in turn, element by element if they are coupled."""
        for s, k in zip(self.sites, jax.random.split(key, len(self.sites)), strict=True):
            if s.visits > MOST_ELEMENTS:
                continue
            visit = functools.partial(self.visit, s, free, others)
            numbers = jnp.arange(s.visits)
            logits, _ = jax.lax.scan(visit, logits, (numbers, jax.random.split(k, s.visits)))
        return logits

    def visit(self, s, free, others, logits, number_and_key):
        number, key = number_and_key
        name, size = s.site.name, s.logits.shape[-1]
        here = jnp.reshape(jnp.arange(s.visits) == number, s.coupled)
        alone = s.visits == 1 and len(self.sites) == 1

        def of_value(pair):
            k, value = pair
            indices = self.draw(k, logits)
            indices[name] = jnp.where(here, value, indices[name])
            values = {t.site.name: t.site.value(indices[t.site.name]) for t in self.sites}
            found = self.terms(values | self.constrain(free))
            return sum(sum_to(s.plates, found[term]) for term in s.terms)

        draws = 1 if alone else others
        keys = jax.random.split(key, draws)  # the same draws of the others for each value
        pairs = [jnp.asarray(x) for x in zip(*itertools.product(range(draws), range(size)), strict=True)]
        scores = jax.lax.map(of_value, (keys[pairs[0]], pairs[1]), batch_size=16)
        scores = jnp.reshape(scores, (draws, size, *scores.shape[1:])).mean(0)
        batch = s.site.batch_ndim  # a term may have more axes, of length 1, like those of a scan
        axes = (*(1,) * batch, *scores.shape[1:])[scores.ndim - 1 :]
        scores = scores.reshape(size, *axes, *(1,) * (s.logits.ndim - 1 - batch))
        scores = jnp.moveaxis(scores, 0, -1)
        seen = jnp.max(scores, -1, keepdims=True)
        good = jnp.isfinite(seen)
        scores = jnp.where(good, scores - jnp.where(good, seen, 0), 0)
        scores = jnp.maximum(scores, NEVER)
        scores = jnp.where(s.logits == -jnp.inf, -jnp.inf, scores)
        return logits | {name: jnp.where(here[..., None] & good, scores, logits[name])}, None
