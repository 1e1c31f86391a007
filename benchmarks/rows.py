"""The methods that the benchmarks compare: every sampler, hand-written JAX, and other libraries' versions.

A draw is a function of a key and of logits (or means), everything else fixed. PyTorch's libraries draw from
PyTorch's own generator, so their draws are functions of logits alone. Hand-written JAX for each method
comes first, in the form of papers, blogs and the authors' code. It is here to be timed, not to be right:
some of it loses rare events, some is NaN at extremes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

import relaxit_jax as rj

TAU, SCALE, K, SAMPLES, ROUNDS = 0.5, 0.5, 5, 10, 20
BITS, CLASSES, MANY = (4096, 20), (256, 10, 128), (64, 32768)
SIZES = (BITS, CLASSES, MANY)
ITEMS = ((4096, 20), (256, 10, 32), (64, 256))  # whose matrices are n x n
MATRICES = ((204, 20, 20), (20, 128, 128), (2, 1024, 1024))  # with about as many elements


def factor(k):
    """The factor of the correlation matrix with 0.5 off its diagonal."""
    return jnp.linalg.cholesky(jnp.full((k, k), 0.5) + 0.5 * jnp.eye(k))


def straight_through(hard, soft):
    return soft + jax.lax.stop_gradient(hard - soft)


def one_hot_of_largest(x):
    return jax.nn.one_hot(x.argmax(-1), x.shape[-1], dtype=x.dtype)


def perturbed(key, l):
    return l + jax.random.gumbel(key, l.shape, l.dtype)


# --- bits -----------------------------------------------------------------------------------------


def relaxed_bernoulli(key, l):
    return jax.nn.sigmoid((l + jax.random.logistic(key, l.shape, l.dtype)) / TAU)


def relaxed_bernoulli_hard(key, l):
    z = relaxed_bernoulli(key, l)
    return straight_through(jnp.round(z), z)


def gaussian_bernoulli(key, loc):
    return jnp.clip(loc + SCALE * jax.random.normal(key, loc.shape, loc.dtype), 0, 1)


def hard_concrete(key, l):
    return jnp.clip(relaxed_bernoulli(key, l) * 1.2 - 0.1, 0, 1)


def straight_through_bernoulli(key, l):
    p = jax.nn.sigmoid(l)
    return straight_through(jax.random.bernoulli(key, p).astype(p.dtype), p)


def stochastic_times_smooth(key, l):
    root = jnp.sqrt(jax.nn.sigmoid(l))
    return jax.random.bernoulli(key, root) * root


def correlated_bernoulli(key, l):
    u = ndtr(jax.random.normal(key, l.shape) @ factor(l.shape[-1]).T)  # half precision does not have it
    return jax.nn.sigmoid((l + jnp.log(u) - jnp.log1p(-u)) / TAU).astype(l.dtype)


# --- categories -----------------------------------------------------------------------------------


def gumbel_softmax(key, l):
    return jax.nn.softmax(perturbed(key, l) / TAU)


def gumbel_softmax_hard(key, l):
    z = gumbel_softmax(key, l)
    return straight_through(one_hot_of_largest(z), z)


def straight_through_categorical(key, l):
    hard = jax.nn.one_hot(jax.random.categorical(key, l), l.shape[-1], dtype=l.dtype)
    return straight_through(hard, jax.nn.softmax(l / TAU))


def decoupled_gumbel_softmax(key, l):
    a = perturbed(key, l)
    return straight_through(one_hot_of_largest(a), jax.nn.softmax(a))


def gapped_straight_through(key, l):
    hard = jax.nn.one_hot(jax.random.categorical(key, l), l.shape[-1], dtype=l.dtype)
    top = l.max(-1, keepdims=True) - (l * hard).sum(-1, keepdims=True)
    lift = top * hard - jax.nn.relu(l + 1 - (l + top * hard).max(-1, keepdims=True)) * (1 - hard)
    return straight_through(hard, jax.nn.softmax((l + jax.lax.stop_gradient(lift)) / TAU))


def reinmax(key, l):
    p = jax.nn.softmax(l)
    hard = jax.nn.one_hot(jax.random.categorical(key, l), l.shape[-1], dtype=l.dtype)
    middle = (hard + jax.nn.softmax(l / TAU)) / 2
    shifted = jax.nn.softmax(l + jax.lax.stop_gradient(jnp.log(middle) - l))
    return straight_through(hard, 2 * shifted - p / 2)


def perturbed_given(key, l, hard):
    """Perturbed logits of several draws, given that their largest is where `hard` is one."""
    e = jax.random.exponential(key, (SAMPLES, *l.shape), l.dtype)
    top = (hard * e).sum(-1, keepdims=True)
    z = jax.nn.logsumexp(l, -1, keepdims=True)
    return jnp.where(hard > 0, z - jnp.log(top), -jnp.log(e / jnp.exp(l) + top / jnp.exp(z)))


def gumbel_rao(key, l):
    key, hard_key = jax.random.split(key)
    hard = jax.nn.one_hot(jax.random.categorical(hard_key, l), l.shape[-1], dtype=l.dtype)
    shift = jax.lax.stop_gradient(perturbed_given(key, l, hard) - l)
    return straight_through(hard, jax.nn.softmax((l + shift) / TAU).mean(0))


def reinmax_rao(key, l):
    key, hard_key = jax.random.split(key)
    p = jax.nn.softmax(l)
    hard = jax.nn.one_hot(jax.random.categorical(hard_key, l), l.shape[-1], dtype=l.dtype)
    theta = jnp.log((hard + p) / 2)
    shift = jax.lax.stop_gradient(perturbed_given(key, theta, hard) - l)
    return straight_through(hard, 2 * jax.nn.softmax((l + shift) / TAU).mean(0) - p / 2)


def invertible_gaussian(key, loc):
    y = (loc + SCALE * jax.random.normal(key, loc.shape, loc.dtype)) / TAU
    return jax.nn.softmax(jnp.concatenate([y, jnp.zeros((*y.shape[:-1], 1), y.dtype)], -1))


def logistic_normal(key, loc):
    return jax.nn.softmax(loc + SCALE * jax.random.normal(key, loc.shape, loc.dtype))


def logistic_normal_full(key, loc):
    noise = jax.random.normal(key, loc.shape, loc.dtype)
    return jax.nn.softmax(loc + noise @ factor(loc.shape[-1]).T.astype(loc.dtype))


def generalized_gumbel_softmax(key, l):
    return gumbel_softmax(key, l) @ jnp.arange(l.shape[-1], dtype=l.dtype)


# --- subsets and permutations ---------------------------------------------------------------------


def gumbel_top_k(key, l):
    return jax.lax.top_k(perturbed(key, l), K)[0]


def relaxed_top_k(key, l):
    a, z = perturbed(key, l), 0
    for _ in range(K):
        o = jax.nn.softmax(a / TAU)
        a, z = a + jnp.log1p(-o), z + o
    return z


def simple_top_k(key, l):
    """The table of log-polynomials, one element per step; its gradient is the marginals."""
    columns = jnp.moveaxis(l.astype(jnp.float32), -1, 0)
    empty = jnp.full((*l.shape[:-1], K + 1), -1e30).at[..., 0].set(0)  # -inf has a NaN gradient
    with_it = lambda table, x: jnp.concatenate(
        [table[..., :1], jnp.logaddexp(table[..., 1:], table[..., :-1] + x[..., None])], -1
    )

    def log_partition(columns):
        return jax.lax.scan(lambda t, x: (with_it(t, x), t), empty, columns)

    marginals = jax.grad(lambda c: log_partition(c)[0][..., K].sum())(columns)
    _, before = log_partition(jax.lax.stop_gradient(columns))
    uniforms = jax.random.uniform(key, columns.shape)

    def choose(left, inputs):
        table, x, u = inputs
        at = lambda t, i: jnp.take_along_axis(t, jnp.maximum(i, 0)[..., None], -1)[..., 0]
        take = at(table, left - 1) + x - at(with_it(table, x), left)
        chosen = (jnp.log(u) < take) & (left > 0)
        return left - chosen, chosen

    _, chosen = jax.lax.scan(
        choose, jnp.full(l.shape[:-1], K), (before, jax.lax.stop_gradient(columns), uniforms), reverse=True
    )
    z = straight_through(chosen.astype(marginals.dtype), marginals)
    return jnp.moveaxis(z, 0, -1).astype(l.dtype)


def gumbel_sinkhorn(key, l):
    """Twenty rounds of normalizing, as in the paper; at low tau they are far from the limit."""
    a = perturbed(key, l) / TAU
    for _ in range(ROUNDS):
        a = a - jax.nn.logsumexp(a, -1, keepdims=True)
        a = a - jax.nn.logsumexp(a, -2, keepdims=True)
    return jnp.exp(a)


def relaxed_permutation(key, l):
    """SoftSort of noisy logits, with jnp.sort."""
    s = perturbed(key, l)
    places = -jnp.sort(-s)
    return jax.nn.softmax(-jnp.abs(places[..., :, None] - s[..., None, :]) / TAU)


# --- the rows -------------------------------------------------------------------------------------


class Row(NamedTuple):
    ours: Callable
    by_hand: Callable
    numbers: int = 1  # random ones, for each logit; and one for each event if an event is drawn as well
    sizes: tuple = SIZES
    integers: bool = False  # no gradient
    peer: str = ""  # its name in other libraries, if it differs
    small: tuple = (4,)  # logits that a test draws with


def spread(key, l, draw):
    """The factor belongs to the problem and not to the draw, so it is a constant, as in hand-written code."""
    return draw(key, l, factor(l.shape[-1]).astype(l.dtype))


ROWS = {
    "relaxed_bernoulli": Row(lambda k, l: rj.relaxed_bernoulli(k, l, TAU), relaxed_bernoulli),
    "relaxed_bernoulli_hard": Row(
        lambda k, l: rj.relaxed_bernoulli(k, l, TAU, hard=True), relaxed_bernoulli_hard
    ),
    "gaussian_bernoulli": Row(lambda k, l: rj.gaussian_bernoulli(k, l, SCALE), gaussian_bernoulli),
    "hard_concrete": Row(lambda k, l: rj.hard_concrete(k, l, TAU), hard_concrete),
    "straight_through_bernoulli": Row(rj.straight_through_bernoulli, straight_through_bernoulli),
    "stochastic_times_smooth": Row(rj.stochastic_times_smooth, stochastic_times_smooth),
    "correlated_bernoulli": Row(
        lambda k, l: spread(k, l, lambda k, l, L: rj.correlated_bernoulli(k, l, TAU, L)),
        correlated_bernoulli,
        sizes=(BITS, CLASSES),
    ),
    "gumbel_softmax": Row(lambda k, l: rj.gumbel_softmax(k, l, TAU), gumbel_softmax),
    "gumbel_softmax_hard": Row(lambda k, l: rj.gumbel_softmax(k, l, TAU, hard=True), gumbel_softmax_hard),
    "straight_through_categorical": Row(
        lambda k, l: rj.straight_through_categorical(k, l, TAU), straight_through_categorical
    ),
    "decoupled_gumbel_softmax": Row(
        lambda k, l: rj.decoupled_gumbel_softmax(k, l, TAU, 1.0), decoupled_gumbel_softmax
    ),
    "gapped_straight_through": Row(
        lambda k, l: rj.gapped_straight_through(k, l, TAU), gapped_straight_through
    ),
    "reinmax": Row(lambda k, l: rj.reinmax(k, l, TAU), reinmax),
    "gumbel_rao": Row(lambda k, l: rj.gumbel_rao(k, l, TAU, SAMPLES), gumbel_rao, numbers=SAMPLES + 1),
    "reinmax_rao": Row(lambda k, l: rj.reinmax_rao(k, l, TAU, SAMPLES), reinmax_rao, numbers=SAMPLES + 1),
    "invertible_gaussian": Row(lambda k, l: rj.invertible_gaussian(k, l, SCALE, TAU), invertible_gaussian),
    "logistic_normal": Row(lambda k, l: rj.logistic_normal(k, l, SCALE), logistic_normal),
    "logistic_normal_full": Row(
        lambda k, l: spread(k, l, lambda k, l, L: rj.logistic_normal(k, l, scale_tril=L)),
        logistic_normal_full,
        sizes=(BITS, CLASSES),
    ),
    "generalized_gumbel_softmax": Row(
        lambda k, l: rj.generalized_gumbel_softmax(k, l, jnp.arange(l.shape[-1], dtype=l.dtype), TAU),
        generalized_gumbel_softmax,
    ),
    "gumbel_top_k": Row(lambda k, l: rj.gumbel_top_k(k, l, K)[1], gumbel_top_k, small=(7,)),
    "relaxed_top_k": Row(lambda k, l: rj.relaxed_top_k(k, l, K, TAU), relaxed_top_k, small=(7,)),
    "simple_top_k": Row(lambda k, l: rj.simple_top_k(k, l, K), simple_top_k, small=(7,)),
    "gumbel_sinkhorn": Row(
        lambda k, l: rj.gumbel_sinkhorn(k, l, TAU), gumbel_sinkhorn, sizes=MATRICES, small=(3, 3)
    ),
    "relaxed_permutation": Row(
        lambda k, l: rj.relaxed_permutation(k, l, TAU), relaxed_permutation, sizes=ITEMS, small=(5,)
    ),
}


def size_name(shape):
    return " x ".join(map(str, shape))


def logits_of(shape, dtype, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)
