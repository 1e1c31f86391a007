"""What the benchmarks compare: every sampler, the line written by hand, and the peers that have it too.

A draw is a function of a key and of logits (or means), everything else fixed. Peers of PyTorch draw from
PyTorch's own generator: functions of logits alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import hand
import relaxit_jax as rj
from hand import SAMPLES, SCALE, TAU, K, factor

BITS, CLASSES, MANY = (4096, 20), (256, 10, 128), (64, 32768)
SIZES = (BITS, CLASSES, MANY)
MATRICES = ((204, 20, 20), (20, 128, 128), (2, 1024, 1024))  # of about as many elements


class Row(NamedTuple):
    ours: Callable
    by_hand: Callable
    numbers: int = 1  # random ones, for each logit; and one for each event where an event is drawn as well
    sizes: tuple = SIZES
    integers: bool = False  # no gradient
    peer: str = ""  # its name among the peers, where it is not its own


def spread(key, l, draw):
    """The factor belongs to the problem and not to the draw; a constant here, as it is by hand."""
    return draw(key, l, factor(l.shape[-1]).astype(l.dtype))


ROWS = {
    "relaxed_bernoulli": Row(lambda k, l: rj.relaxed_bernoulli(k, l, TAU), hand.relaxed_bernoulli),
    "relaxed_bernoulli_hard": Row(
        lambda k, l: rj.relaxed_bernoulli(k, l, TAU, hard=True), hand.relaxed_bernoulli_hard
    ),
    "gaussian_bernoulli": Row(lambda k, l: rj.gaussian_bernoulli(k, l, SCALE), hand.gaussian_bernoulli),
    "hard_concrete": Row(lambda k, l: rj.hard_concrete(k, l, TAU), hand.hard_concrete),
    "straight_through_bernoulli": Row(rj.straight_through_bernoulli, hand.straight_through_bernoulli),
    "stochastic_times_smooth": Row(rj.stochastic_times_smooth, hand.stochastic_times_smooth),
    "correlated_bernoulli": Row(
        lambda k, l: spread(k, l, lambda k, l, L: rj.correlated_bernoulli(k, l, TAU, L)),
        hand.correlated_bernoulli,
        sizes=(BITS, CLASSES),
    ),
    "gumbel_softmax": Row(lambda k, l: rj.gumbel_softmax(k, l, TAU), hand.gumbel_softmax),
    "gumbel_softmax_hard": Row(
        lambda k, l: rj.gumbel_softmax(k, l, TAU, hard=True), hand.gumbel_softmax_hard
    ),
    "straight_through_categorical": Row(
        lambda k, l: rj.straight_through_categorical(k, l, TAU), hand.straight_through_categorical
    ),
    "decoupled_gumbel_softmax": Row(
        lambda k, l: rj.decoupled_gumbel_softmax(k, l, TAU, 1.0), hand.decoupled_gumbel_softmax
    ),
    "gapped_straight_through": Row(
        lambda k, l: rj.gapped_straight_through(k, l, TAU), hand.gapped_straight_through
    ),
    "reinmax": Row(lambda k, l: rj.reinmax(k, l, TAU), hand.reinmax),
    "gumbel_rao": Row(lambda k, l: rj.gumbel_rao(k, l, TAU, SAMPLES), hand.gumbel_rao, numbers=SAMPLES + 1),
    "reinmax_rao": Row(
        lambda k, l: rj.reinmax_rao(k, l, TAU, SAMPLES), hand.reinmax_rao, numbers=SAMPLES + 1
    ),
    "invertible_gaussian": Row(
        lambda k, l: rj.invertible_gaussian(k, l, SCALE, TAU), hand.invertible_gaussian
    ),
    "logistic_normal": Row(lambda k, l: rj.logistic_normal(k, l, SCALE), hand.logistic_normal),
    "logistic_normal_full": Row(
        lambda k, l: spread(k, l, lambda k, l, L: rj.logistic_normal(k, l, scale_tril=L)),
        hand.logistic_normal_full,
        sizes=(BITS, CLASSES),
    ),
    "generalized_gumbel_softmax": Row(
        lambda k, l: rj.generalized_gumbel_softmax(k, l, jnp.arange(l.shape[-1], dtype=l.dtype), TAU),
        hand.generalized_gumbel_softmax,
    ),
    "gumbel_top_k": Row(lambda k, l: rj.gumbel_top_k(k, l, K)[1], hand.gumbel_top_k),
    "relaxed_top_k": Row(lambda k, l: rj.relaxed_top_k(k, l, K, TAU), hand.relaxed_top_k),
    "simple_top_k": Row(lambda k, l: rj.simple_top_k(k, l, K), hand.simple_top_k),
    "gumbel_sinkhorn": Row(lambda k, l: rj.gumbel_sinkhorn(k, l, TAU), hand.gumbel_sinkhorn, sizes=MATRICES),
}


def size_name(shape):
    return " x ".join(map(str, shape))


def logits_of(shape, dtype, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)
