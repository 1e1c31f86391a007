"""Models small enough to enumerate, and the exact loss of their guides, for test_elbo.py."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import compute_log_probs

from relaxit_jax._terms import plates_of, sum_to
from relaxit_jax.handlers import AutoStructured, take

# model(p) and guide(p), with all parameters in p. `whole` leaves subsampling out, `plain` (of the guide) also
# scale and mask: the draws do not depend on them.


@dataclasses.dataclass(frozen=True)
class Case:
    model: Callable
    guide: Callable
    params: dict
    discrete: dict  # all values of every discrete site, on the first axis
    continuous: tuple = ()  # the names of the normal sites of the guide, all scalar
    step: float = 1.0  # the size of a cell, if the values of `discrete` are a grid


def all_values(values, *shape):
    """Every array of this shape of these values."""
    size = int(np.prod(shape))
    return np.array(list(itertools.product(values, repeat=size))).reshape(-1, *shape)


def mass_and_weight(case, p, values, noise):
    """The density of these values under the guide, and log p - log q there.

    The latter is by element of the plates that enclose all sites, where the bound of several particles is a
    sum.
    """

    def given(msg):
        if msg["name"] in values:
            return values[msg["name"]]
        if msg["name"] in noise:
            return msg["fn"].loc + msg["fn"].scale * noise[msg["name"]]
        return None

    fixed = lambda f: handlers.seed(handlers.substitute(f, substitute_fn=given), 0)
    total = lambda f, *args, **kwargs: compute_log_probs(f, args, kwargs, {}, sum_log_prob=False)
    log_q, trace = total(fixed(case.guide), p, whole=True)
    log_p, of_model = total(handlers.seed(handlers.replay(case.model, trace), 0), p, whole=True)
    weight, _ = total(fixed(case.guide), p, whole=True, plain=True)
    weight = sum(jnp.sum(weight[name]) for name in values)
    own = frozenset.intersection(*(plates_of(of_model[name]) for name in log_p))
    each = [sum(sum_to(own, jnp.asarray(x)) for x in terms.values()) for terms in (log_p, log_q)]
    return jnp.exp(weight), each[0] - each[1]


def all_points(case, p):
    """Probabilities of all discrete values and of the nodes of a quadrature, and log p - log q at each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(14)
    axes = [*case.discrete.values(), *(nodes for _ in case.continuous)]
    grid = np.meshgrid(*(np.arange(len(axis)) for axis in axes), indexing="ij")
    points = [jnp.asarray(axis)[i.ravel()] for axis, i in zip(axes, grid, strict=True)]
    values, noise = dict(zip(case.discrete, points, strict=False)), points[len(case.discrete) :]
    weight = np.prod(
        [(weights / weights.sum())[i.ravel()] for i in grid[len(case.discrete) :]], 0, initial=1.0
    )
    each = jax.vmap(lambda v, n: mass_and_weight(case, p, v, n))
    mass, log_w = each(values, dict(zip(case.continuous, noise, strict=True)))
    return case.step * weight * mass, log_w


def exact_loss(case, p):
    """- E_q[log p - log q]: a sum over the discrete values, a quadrature over the continuous ones."""
    mass, log_w = all_points(case, p)
    return -jnp.sum(mass * jnp.sum(log_w.reshape(len(mass), -1), 1))


def exact_loss_of_two(case, p):
    """- E log (w_1 + w_2) / 2, over all pairs."""
    mass, log_w = all_points(case, p)
    pairs = lambda x: jnp.sum((jnp.logaddexp(x, log_w) - jnp.log(2)).reshape(len(mass), -1), 1)
    row = jax.checkpoint(lambda m, x: m * jnp.sum(mass * pairs(x)))
    return -jnp.sum(jax.lax.map(lambda pair: row(*pair), (mass, log_w), batch_size=64))


def bits_model(p, whole=False):
    z = numpyro.sample("z", dist.Bernoulli(np.array([0.3, 0.6, 0.5], np.float32)).to_event(1))
    numpyro.sample("y", dist.Normal(p["w"] @ z + 2 * z[0] * z[2], 1).to_event(1), obs=np.array([0.7, 1.2]))


def bits_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Bernoulli(logits=p["z"]).to_event(1))


BITS = Case(
    bits_model,
    bits_guide,
    {"z": jnp.array([0.5, -1.0, 0.2]), "w": jnp.array([[1.0, -1.5, 2.0], [0.5, 2.0, -1.0]])},
    {"z": all_values([0, 1], 3)},
)


def loose_model(p, whole=False):
    """Bits in a batch axis that no plate declares: the cost of one of them belongs to all."""
    z = numpyro.sample("z", dist.Bernoulli(np.array([0.3, 0.6, 0.5], np.float32)))
    numpyro.sample("y", dist.Normal(z + p["w"] * z[::-1], 1), obs=np.array([0.7, 1.2, -2.0], np.float32))


def loose_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Bernoulli(logits=p["z"]))


LOOSE = Case(
    loose_model,
    loose_guide,
    {"z": jnp.array([0.5, -1.0, 0.2]), "w": jnp.array(1.5)},
    {"z": all_values([0, 1], 3)},
)

LOC = np.array([-1.0, 0.5, 2.0], np.float32)
POINTS = np.array([-0.6, 1.9], np.float32)


def classes_model(p, whole=False):
    """A continuous site above the classes, another one below."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.plate("points", 2):
        z = numpyro.sample("z", dist.Categorical(logits=jnp.array([0.3, 0.0, -0.5]) * x))
        numpyro.sample("y", dist.Normal(p["loc"][z] + x, 1), obs=POINTS)
    w = numpyro.sample("w", dist.Normal(z.sum(), 2))
    numpyro.sample("v", dist.Normal(w * x, 1), obs=0.5)


def classes_guide(p, whole=False, plain=False):
    x = numpyro.sample("x", dist.Normal(p["x"][0], jnp.exp(p["x"][1])))
    with numpyro.plate("points", 2):
        z = numpyro.sample("z", dist.Categorical(logits=p["z"] + x * LOC))
    numpyro.sample("w", dist.Normal(p["slope"] * jnp.sum(z) + x, 0.7))


CLASSES = Case(
    classes_model,
    classes_guide,
    {
        "x": jnp.array([0.4, -0.7]),
        "z": jnp.array([[0.1, -0.4, 0.7], [0.6, 0.2, -0.3]]),
        "slope": jnp.array(0.6),
        "loc": jnp.array(LOC),
    },
    {"z": all_values(range(3), 2)},
    ("x", "w"),
)

ROWS = np.array([[0.3, 1.2], [-0.5, 2.0], [1.5, 0.1], [0.8, -1.0]], np.float32)
KEPT = np.array([[True, True], [True, False], [False, True], [True, True]])


def subsampled_model(p, whole=False):
    """A masked bit still reaches y, which is not masked."""
    b = numpyro.sample("b", dist.Bernoulli(0.4))
    rows = numpyro.plate("rows", 4, subsample_size=None if whole else 3, dim=-2)
    with rows as i, handlers.scale(scale=0.4):
        r = numpyro.sample("r", dist.Bernoulli(0.3 + 0.3 * b))
        with numpyro.plate("columns", 2, dim=-1):
            with handlers.mask(mask=jnp.asarray(KEPT)[i]):
                z = numpyro.sample("z", dist.Bernoulli(jnp.where(r == 1, 0.8, 0.3)))
            numpyro.sample("y", dist.Normal(p["w"] * z - r + b, 1), obs=jnp.asarray(ROWS)[i])


def subsampled_guide(p, whole=False, plain=False):
    numpyro.sample("b", dist.Bernoulli(logits=p["b"]))
    rows = numpyro.plate("rows", 4, subsample_size=None if whole else 3, dim=-2)
    with rows as i, handlers.scale(scale=1.0 if plain else 0.4):
        r = numpyro.sample("r", dist.Bernoulli(logits=p["r"][i]))
        with numpyro.plate("columns", 2, dim=-1), handlers.mask(mask=plain | jnp.asarray(KEPT)[i]):
            numpyro.sample("z", dist.Bernoulli(logits=p["z"][i] + 0.8 * r))


SUBSAMPLED = Case(
    subsampled_model,
    subsampled_guide,
    {
        "b": jnp.array(0.3),
        "r": jnp.linspace(-1, 1, 4)[:, None],
        "z": jnp.linspace(-0.9, 0.6, 8).reshape(4, 2),
        "w": jnp.array(1.3),
    },
    {"b": np.arange(2), "r": all_values([0, 1], 4, 1), "z": all_values([0, 1], 4, 2)},
)


def leaving_model(p, whole=False):
    """In the guide every z reaches g, and with it the cost of every other point of the plate."""
    g = numpyro.sample("g", dist.Bernoulli(0.4))
    with numpyro.plate("points", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(p["w"] * g + z, 0.7), obs=np.array([0.9, 1.6, 2.2], np.float32))


def leaving_guide(p, whole=False, plain=False):
    with numpyro.plate("points", 3):
        z = numpyro.sample("z", dist.Bernoulli(logits=p["z"]))
    hint = numpyro.sample("hint", dist.Poisson(2.0), infer={"is_auxiliary": True}, obs=jnp.array(2))
    numpyro.factor("more", p["w"] * 0.3 * hint)
    numpyro.sample("g", dist.Bernoulli(logits=p["g"] + 1.5 * z.sum()))


LEAVING = Case(
    leaving_model,
    leaving_guide,
    {"z": jnp.array([0.3, -0.5, 0.8]), "g": jnp.array(-2.0), "w": jnp.array(1.3)},
    {"z": all_values([0, 1], 3), "g": np.arange(2)},
)

CHAIN = np.array([0.4, 1.7, -0.3], np.float32)


def chain_model(p, whole=False):
    def step(before, y):
        with numpyro.plate("copies", 2):
            z = numpyro.sample("z", dist.Bernoulli(jnp.where(before == 1, 0.8, 0.3)))
            numpyro.sample("y", dist.Normal(p["w"] * z + before, 1), obs=y * jnp.array([1, -0.5]))
        return z, None

    scan(step, jnp.array([0, 1]), CHAIN)


def chain_guide(p, whole=False, plain=False):
    def step(before, logits):
        with numpyro.plate("copies", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=logits + p["slope"] * before))
        return z, None

    scan(step, jnp.array([0, 1]), p["z"])


SCAN = Case(
    chain_model,
    chain_guide,
    {"z": jnp.linspace(-1, 0.8, 6).reshape(3, 2), "slope": jnp.array(0.9), "w": jnp.array(1.4)},
    {"z": all_values([0, 1], 3, 2)},
)


def ordered_model(p, whole=False, shift=0.0):
    """A chain whose last state reaches a site after the scan."""

    def step(before, y):
        z = numpyro.sample("z", dist.Categorical(logits=take(p["moves"], before)))
        numpyro.sample("y", dist.Normal(take(p["loc"], z) + 0.3 * before + shift, 1), obs=y)
        return z, None

    last, _ = scan(step, 0, CHAIN)
    numpyro.sample("end", dist.Normal(take(p["loc"], last), 1), obs=0.9)


def at_once_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Categorical(logits=p["z"]))


def ordered_guide(p, whole=False, plain=False, reverse=False, more=False):
    def step(before, logits):
        z = numpyro.sample("z", dist.Categorical(logits=logits + p["slope"] * before * jnp.arange(3)))
        return z, z

    _, z = scan(step, 1, p["z"], reverse=reverse)
    if more:
        numpyro.sample("w", dist.Bernoulli(logits=p["w"] * (jnp.sum(z) - 3)))


def summed_model(p, whole=False):
    """In the guide every state reaches w, and with it the observations of all steps."""
    ordered_model(p, shift=2 * numpyro.sample("w", dist.Bernoulli(0.3)))


CHAIN_PARAMS = {
    "z": jnp.linspace(-1, 0.8, 9).reshape(3, 3),
    "moves": jnp.array([[0.5, -0.5, 0.2], [0.1, 0.9, -0.4], [-0.7, 0.0, 0.6]]),
    "loc": jnp.array(LOC),
}
SLOPE = CHAIN_PARAMS | {"slope": jnp.array(0.7)}
PATHS = {"z": all_values([0, 1, 2], 3)}


def poisson_model(p, whole=False):
    z = numpyro.sample("z", dist.Poisson(p["prior"]))
    numpyro.sample("y", dist.Normal(z, 2), obs=6.5)


def poisson_guide(p, whole=False, plain=False):
    numpyro.sample("z", dist.Poisson(p["rate"]))


POISSON = Case(
    poisson_model,
    poisson_guide,
    {"rate": jnp.array(5.0), "prior": jnp.array(4.0)},
    {"z": np.arange(40)},
)


def walk_model(p, whole=False):
    def step(before, y):
        x = numpyro.sample("x", dist.VonMises(0.8 * before, 1.5))
        numpyro.sample("y", dist.Normal(p["w"] * jnp.sin(x), 0.7), obs=y)
        return x, None

    scan(step, 0.5, CHAIN[:2])


def walk_guide(p, whole=False, plain=False):
    """Angles: they have no pathwise gradient in NumPyro, though their draws have a derivative."""

    def step(before, loc):
        x = numpyro.sample("x", dist.VonMises(loc + 0.5 * before, 2.0))
        return x, None

    scan(step, 0.5, p["loc"])


WALK = Case(
    walk_model,
    walk_guide,
    {"loc": jnp.array([-0.5, 0.8]), "w": jnp.array(1.2)},
    {"x": all_values(np.linspace(-np.pi, np.pi, 80, endpoint=False, dtype=np.float32), 2)},
    step=(2 * np.pi / 80) ** 2,
)

KNOWN = np.array([True, False, False, True])


def partly_model(p, whole=False):
    """Bits, classes and counts that are observed in part, in a plate of as many elements as classes.

    Draws of the guide where they are observed count nowhere, so the mask stays in a plain guide.
    """
    obs = {"obs_mask": jnp.asarray(KNOWN[:3])}
    with numpyro.plate("points", 3):
        b = numpyro.sample("b", dist.Bernoulli(0.4), obs=np.array([1, 0, 0]), **obs)
        z = numpyro.sample(
            "z", dist.Categorical(logits=jnp.array([0.3, 0.0, -0.5])), obs=jnp.array([2, 9, -1]), **obs
        )
        n = numpyro.sample("n", dist.Binomial(2, 0.6), obs=np.array([1, 0, 0]), **obs)
        numpyro.sample(
            "y", dist.Normal(take(p["loc"], z) + b * n, 1), obs=np.array([0.3, 1.2, 2.4], np.float32)
        )


def partly_guide(p, whole=False, plain=False):
    with numpyro.plate("points", 3), handlers.mask(mask=~KNOWN[:3]):
        numpyro.sample("b_unobserved", dist.Bernoulli(logits=p["b"]))
        numpyro.sample("z_unobserved", dist.Categorical(logits=p["z"]))
        numpyro.sample("n_unobserved", dist.Binomial(2, logits=p["n"]))


def of_unknown(values, known):
    """All values of the elements that are not known, and the first value of the others."""
    found = np.full((len(values) ** (~known).sum(), len(known)), values[0])
    found[:, ~known] = all_values(values, (~known).sum())
    return found


PARTLY = Case(
    partly_model,
    partly_guide,
    {
        "b": jnp.array([0.3, -0.5, 0.8]),
        "z": jnp.linspace(-1, 1, 9).reshape(3, 3),
        "n": jnp.array([0.1, 0.6, -0.4]),
        "loc": jnp.array(LOC),
    },
    {
        "b_unobserved": of_unknown([0, 1], KNOWN[:3]),
        "z_unobserved": of_unknown([0, 1, 2], KNOWN[:3]),
        "n_unobserved": of_unknown([0, 1, 2], KNOWN[:3]),
    },
)


def partly_chain_model(p, whole=False):
    def step(before, data):
        y, label, known = data
        law = dist.Categorical(logits=take(jnp.array([[0.5, -0.5, 0], [0, 1, -1], [-1, 0, 0.3]]), before))
        z = numpyro.sample("z", law, obs=label, obs_mask=known)
        numpyro.sample("y", dist.Normal(take(p["loc"], z), 1), obs=y)
        return z, None

    first = numpyro.sample("first", dist.Categorical(logits=jnp.zeros(3)))
    scan(step, first, (jnp.array([0.4, 1.7, -0.3, 1.0]), jnp.array([2, 0, 0, 1]), jnp.asarray(KNOWN)))


def partly_chain_guide(p, whole=False, plain=False):
    numpyro.sample("first", dist.Categorical(logits=p["first"]))

    def step(carry, data):
        logits, known = data
        with handlers.mask(mask=~known):
            numpyro.sample("z_unobserved", dist.Categorical(logits=logits))
        return carry, None

    scan(step, 0.0, (p["z"], jnp.asarray(KNOWN)))


PARTLY_SCAN = Case(
    partly_chain_model,
    partly_chain_guide,
    {"first": jnp.array([0.3, -0.5, 0.8]), "z": jnp.linspace(-1, 1, 12).reshape(4, 3), "loc": jnp.array(LOC)},
    {"first": np.arange(3), "z_unobserved": of_unknown([0, 1, 2], KNOWN)},
)


def structured(model, discrete, scale=1.0, **more):
    """A guide made from a model, at parameters at random, and its case."""
    made = AutoStructured(lambda: model(more), init="prior")
    trace = handlers.trace(handlers.seed(made, 0)).get_trace()
    first = {name: s["value"] for name, s in trace.items() if s["type"] == "param"}
    keys = jax.random.split(jax.random.key(8), len(first))
    params = {
        n: scale * jax.random.normal(k, jnp.shape(x)) for k, (n, x) in zip(keys, first.items(), strict=True)
    }

    def guide(p, whole=False, plain=False):
        handlers.substitute(made, {n: p[n] for n in params})()

    return Case(model, guide, params | more, discrete)


def two_kinds_model(p, whole=False):
    """Bits that meet in a sum outside their plate, and classes of the same elements of another."""
    with numpyro.plate("bits", 2):
        b = numpyro.sample("b", dist.Bernoulli(np.array([0.3, 0.6], np.float32)))
    with numpyro.plate("points", 2):
        a = numpyro.sample("a", dist.Bernoulli(0.4))
        z = numpyro.sample("z", dist.Categorical(logits=jnp.array([0.3, 0.0, -0.5])))
        numpyro.sample("y", dist.Normal(take(p["loc"], z) * (1 + a), 1), obs=POINTS)
    numpyro.sample("total", dist.Normal(p["w"] * jnp.sum(b) + jnp.sum(a), 1), obs=1.4)


CASES = {
    "bits": BITS,
    "loose": LOOSE,
    "classes": CLASSES,
    "subsampled": SUBSAMPLED,
    "leaving": LEAVING,
    "scan": SCAN,
    "scan, all at once": Case(ordered_model, at_once_guide, CHAIN_PARAMS, PATHS),
    "scan, with a site below": Case(ordered_model, ordered_guide, SLOPE, PATHS),
    "scan, guide backwards": Case(
        ordered_model, functools.partial(ordered_guide, reverse=True), SLOPE, PATHS
    ),
    "scan, a site of all steps": Case(
        summed_model,
        functools.partial(ordered_guide, more=True),
        SLOPE | {"w": jnp.array(1.3)},
        PATHS | {"w": np.arange(2)},
    ),
    "scan, structured": structured(chain_model, SCAN.discrete, w=jnp.array(1.4)),
    "autoregressive": structured(
        two_kinds_model,
        {"b": all_values([0, 1], 2), "a": all_values([0, 1], 2), "z": all_values(range(3), 2)},
        w=jnp.array(1.3),
        loc=jnp.array(LOC),
    ),
    "poisson": POISSON,
    "walk": WALK,
    "partly": PARTLY,
    "partly scan": PARTLY_SCAN,
}
