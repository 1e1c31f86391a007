"""Forward and backward pass of each sampler against the line a user writes by hand, with the same noise.

Prints the median ratio of the times; at most 1.15 is the goal. The exact one-hot draws with other gradients
are compared with this library's own straight-through Gumbel-softmax, the Rao-Blackwellised ones by the
sample; there at most 1.2 is the goal. python benchmarks/samplers.py --help
"""

import functools

import click
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from tqdm import tqdm

import relaxit_jax as rj
from timing import interleaved, ratio, write

TAU = 0.5


def factor(k):
    """Of the correlation matrix with 0.5 off its diagonal."""
    return jnp.linalg.cholesky(jnp.full((k, k), 0.5) + 0.5 * jnp.eye(k))


def straight_through(hard, soft):
    return soft + jax.lax.stop_gradient(hard - soft)


# --- the lines written by hand -------------------------------------------------------------------


def hand_relaxed_bernoulli(key, l):
    return jax.nn.sigmoid((l + jax.random.logistic(key, l.shape)) / TAU)


def hand_relaxed_bernoulli_hard(key, l):
    z = hand_relaxed_bernoulli(key, l)
    return straight_through(jnp.round(z), z)


def hand_gaussian_bernoulli(key, loc):
    return jnp.clip(loc + 0.5 * jax.random.normal(key, loc.shape), 0, 1)


def hand_hard_concrete(key, l):
    return jnp.clip(hand_relaxed_bernoulli(key, l) * 1.2 - 0.1, 0, 1)


def hand_straight_through(key, l):
    p = jax.nn.sigmoid(l)
    return straight_through(jax.random.bernoulli(key, p).astype(p.dtype), p)


def hand_stochastic_times_smooth(key, l):
    root = jnp.sqrt(jax.nn.sigmoid(l))
    return jax.random.bernoulli(key, root) * root


def hand_correlated(key, l):
    u = ndtr(jax.random.normal(key, l.shape) @ factor(l.shape[-1]).T)
    return jax.nn.sigmoid((l + jnp.log(u) - jnp.log1p(-u)) / TAU)


def hand_gumbel_softmax(key, l):
    return jax.nn.softmax((l + jax.random.gumbel(key, l.shape)) / TAU)


def hand_gumbel_softmax_hard(key, l):
    z = hand_gumbel_softmax(key, l)
    return straight_through(jax.nn.one_hot(z.argmax(-1), z.shape[-1]), z)


def hand_invertible_gaussian(key, loc):
    y = (loc + 0.5 * jax.random.normal(key, loc.shape)) / TAU
    return jax.nn.softmax(jnp.concatenate([y, jnp.zeros((*y.shape[:-1], 1))], -1))


def hand_logistic_normal(key, loc):
    return jax.nn.softmax(loc + 0.5 * jax.random.normal(key, loc.shape))


def hand_logistic_normal_full(key, loc):
    return jax.nn.softmax(loc + jax.random.normal(key, loc.shape) @ factor(loc.shape[-1]).T)


def hand_gumbel_top_k(key, l):
    return jax.lax.top_k(l + jax.random.gumbel(key, l.shape), 5)[0]


def hand_relaxed_top_k(key, l):
    a, z = l + jax.random.gumbel(key, l.shape), 0
    for _ in range(5):
        o = jax.nn.softmax(a / TAU)
        a, z = a + jnp.log1p(-o), z + o
    return z


BITS, CLASSES = (4096, 20), (256, 10, 128)
PAIRS = {
    "relaxed_bernoulli": (BITS, lambda k, l: rj.relaxed_bernoulli(k, l, TAU), hand_relaxed_bernoulli),
    "relaxed_bernoulli_hard": (
        BITS, lambda k, l: rj.relaxed_bernoulli(k, l, TAU, hard=True), hand_relaxed_bernoulli_hard,
    ),
    "gaussian_bernoulli": (BITS, lambda k, l: rj.gaussian_bernoulli(k, l, 0.5), hand_gaussian_bernoulli),
    "hard_concrete": (BITS, lambda k, l: rj.hard_concrete(k, l, TAU), hand_hard_concrete),
    "straight_through_bernoulli": (BITS, rj.straight_through_bernoulli, hand_straight_through),
    "stochastic_times_smooth": (BITS, rj.stochastic_times_smooth, hand_stochastic_times_smooth),
    "correlated_bernoulli": (
        BITS, lambda k, l: rj.correlated_bernoulli(k, l, TAU, factor(l.shape[-1])), hand_correlated,
    ),
    "gumbel_softmax": (CLASSES, lambda k, l: rj.gumbel_softmax(k, l, TAU), hand_gumbel_softmax),
    "gumbel_softmax_hard": (
        CLASSES, lambda k, l: rj.gumbel_softmax(k, l, TAU, hard=True), hand_gumbel_softmax_hard,
    ),
    "invertible_gaussian": (
        CLASSES, lambda k, l: rj.invertible_gaussian(k, l, 0.5, TAU), hand_invertible_gaussian,
    ),
    "logistic_normal": (CLASSES, lambda k, l: rj.logistic_normal(k, l, 0.5), hand_logistic_normal),
    "logistic_normal_full": (
        CLASSES, lambda k, l: rj.logistic_normal(k, l, scale_tril=factor(l.shape[-1])),
        hand_logistic_normal_full,
    ),
    "gumbel_top_k": (CLASSES, lambda k, l: rj.gumbel_top_k(k, l, 5)[1], hand_gumbel_top_k),
    "relaxed_top_k": (CLASSES, lambda k, l: rj.relaxed_top_k(k, l, 5, TAU), hand_relaxed_top_k),
}  # fmt: skip


SAMPLES = 10  # of the Rao-Blackwellised ones
STRAIGHT_THROUGH = {
    "straight_through_categorical": lambda k, l: rj.straight_through_categorical(k, l, TAU),
    "decoupled_gumbel_softmax": lambda k, l: rj.decoupled_gumbel_softmax(k, l, TAU, 1.0),
    "gapped_straight_through": lambda k, l: rj.gapped_straight_through(k, l, TAU),
    "reinmax": lambda k, l: rj.reinmax(k, l, TAU),
    "gumbel_rao": lambda k, l: rj.gumbel_rao(k, l, TAU, SAMPLES),
    "gumbel_rao, 100 samples": lambda k, l: rj.gumbel_rao(k, l, TAU, 10 * SAMPLES),
    "reinmax_rao": lambda k, l: rj.reinmax_rao(k, l, TAU, SAMPLES),
    "generalized_gumbel_softmax_hard": lambda k, l: rj.generalized_gumbel_softmax(
        k, l, jnp.arange(128.0), TAU, hard=True
    ),
}


def forward_backward(draw, shape):
    """The draw and its gradient in the logits, for a fixed random cotangent."""
    key, logits_key, weights_key = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(logits_key, shape)
    out = jax.eval_shape(draw, key, logits)
    weights = jax.random.normal(weights_key, out.shape)

    @jax.jit
    def both(key, logits, weights):
        z, pull = jax.vjp(functools.partial(draw, key), logits)
        return z, pull(weights)[0]

    return functools.partial(both, key, logits, weights)


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=3), default=60, help="Turns that each pair is timed in.")
@click.option("--calls", type=click.IntRange(min=1), default=10, help="Calls in a turn.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*PAIRS, *STRAIGHT_THROUGH]),
    help="Only this one; may be repeated.",
)
def main(rounds, calls, only):
    """Time every sampler against the line written by hand, in one run."""
    table = {}
    chosen = only or [*PAIRS, *STRAIGHT_THROUGH]
    for name in tqdm(chosen, unit="sampler"):
        if name in PAIRS:
            shape, ours, other = PAIRS[name]
        else:
            shape, ours, other = CLASSES, STRAIGHT_THROUGH[name], PAIRS["gumbel_softmax_hard"][1]
        functions = {"ours": forward_backward(ours, shape), "other": forward_backward(other, shape)}
        seconds = interleaved(functions, rounds, calls)
        seconds["ours"] = seconds["ours"] / samples_of(name)
        table[name] = ratio(seconds, "ours", "other") | {
            f"{who}_ms": round(float(1e3 * sorted(x)[len(x) // 2]), 3) for who, x in seconds.items()
        }
        tqdm.write(f"{name:32} {table[name]}")
    if not only:
        to_hand = {name: table[name] for name in PAIRS}
        to_hard = {name: table[name] for name in STRAIGHT_THROUGH}
        write("samplers", {
            "sizes": {"bits": BITS, "classes": CLASSES},
            "to the line written by hand": {"goal": 1.15, "ratios": to_hand},
            "to gumbel_softmax with hard=True": {"goal": 1.2, "ratios": to_hard},
        })  # fmt: skip


def samples_of(name):
    """How many Gumbel vectors a Rao-Blackwellised gradient averages; times are by the sample."""
    return (SAMPLES if "rao" in name else 1) * (10 if "100" in name else 1)


if __name__ == "__main__":
    main()
