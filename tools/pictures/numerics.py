"""The frequency of a rare bit and a rare class over their probability, to the last random bit.

No draws are counted: the noise comes from a key whose bits count instead of being random, so each possible
number comes with its exact probability.
"""

import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.extend.random import define_prng_impl

import relaxit_jax as rj

LOG_ODDS = -np.arange(2.0, 18.6, 0.5)  # probabilities from 0.1 to 1e-8
LOOKS = {
    "relaxit_jax": ("#0072B2", 3), "jax.random, float32": ("#E69F00", 2),
    "jax.random, float16": ("#009E73", 2), "jax.random, bfloat16": ("#CC79A7", 2),
}  # fmt: skip


def count(key, width, shape):
    number = key[0] + key[1] * jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return (number >> (32 - width)).astype(f"uint{width}")


COUNTING = define_prng_impl(
    key_shape=(2,), seed=lambda seed: jnp.zeros(2, jnp.uint32), fold_in=lambda key, data: key,
    split=lambda key, shape: jnp.tile(key, (*shape, 1)), random_bits=count, name="counting_in_a_picture",
)  # fmt: skip


def counted(start, stride):
    return jax.random.wrap_key_data(jnp.array([start, stride], jnp.uint32), impl=COUNTING)


def logistic(key, n):
    return rj.relaxed_bernoulli(key, 0.0, 1.0, shape=(n,), log_space=True)


def gumbel(key, n):
    return rj.gumbel_top_k(key, jnp.zeros(1), 1, shape=(n,))[1][:, 0]


def law(draw, n):
    """Increasing values of 32 random bits, and their probabilities: all in the tails, some between."""
    stride = 2**32 // n - 2
    parts = (0, 1), (n + stride // 2, stride), (2**32 - n, 1)
    values = np.concatenate([draw(counted(*part), n) for part in parts])
    order = np.argsort(values)
    return values[order], np.repeat([2.0**-32, stride * 2.0**-32, 2.0**-32], n)[order]


def law_by_hand(draw, dtype, n):
    """The same for JAX's noise, which has as many equally likely values as the dtype's mantissa."""
    n = min(n, 2 ** jnp.finfo(dtype).nmant)
    values = draw(counted(0, 2**32 // n), (n,), dtype)
    return np.sort(np.asarray(values, np.float32)), np.full(n, 1 / n)


def bits(values, weights, dtype):
    """P(b = 1) over p and P(b = 0) over p, at the log-odds where it should be p."""
    l = np.asarray(jnp.asarray(LOG_ODDS, dtype), np.float32)
    p = 1 / (1 + np.exp(-l.astype(float)))
    return [
        np.array([weights @ (x + values > 0) for x in l]) / p,
        np.array([weights @ (values - x <= 0) for x in l]) / p,
    ]


def classes(values, weights, dtype):
    """P(the second of two classes is drawn) over p: its noise is ahead of the noise of the first."""
    l = jnp.asarray(LOG_ODDS, dtype)
    below = np.concatenate([[0], np.cumsum(weights)])
    wins = []
    for x in l:
        mine = np.asarray(x + jnp.asarray(values, dtype), np.float32)
        wins.append(weights @ below[np.searchsorted(values, mine)])
    return np.array(wins) * (1 + np.exp(-np.asarray(l, float)))


def lines(draws):
    """For each way of drawing: the dtype, the law of its logistic and of its Gumbel noise."""
    n = 1 << (420 * draws).bit_length() - 1  # for 20,000 it covers every float32 uniform
    yield "relaxit_jax", jnp.float32, law(logistic, n // 2), law(gumbel, n // 2)
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        noise = (law_by_hand(draw, dtype, n) for draw in (jax.random.logistic, jax.random.gumbel))
        yield f"jax.random, {jnp.dtype(dtype).name}", dtype, *noise


def picture(draws):
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.6, 6.6), sharex=True, layout="constrained")
    p, low, high = 1 / (1 + np.exp(-LOG_ODDS)), 0.03, 30.0
    for name, dtype, of_bits, of_classes in lines(draws):
        colour, width = LOOKS[name]
        for axis, ratio, dashes in (
            *zip((above, above), bits(*of_bits, dtype), ("-", "--"), strict=True),
            (below, classes(*of_classes, dtype), "-"),
        ):
            axis.plot(p, np.clip(ratio, low, high), color=colour, lw=width, ls=dashes, label=name)
    for axis in (above, below):
        axis.set(xscale="log", yscale="log", ylim=(low * 0.9, high * 1.1))
        axis.set_yticks([low, 0.1, 1, 10, high], ["0.03 or less", "0.1", "1", "10", "30 or more"])
        axis.set_ylabel("frequency / p", fontsize=10.5)
        axis.grid(alpha=0.3)
    above.invert_xaxis()
    above.set_title("a bit: 1 has probability p (solid), 0 has probability p (dashed)", fontsize=10.5)
    below.set_title("two classes: the second has probability p", fontsize=10.5)
    below.set_xlabel("p", fontsize=10.5)
    figure.legend(handles=below.get_lines(), loc="outside upper center", ncols=2, fontsize=9.5, frameon=False)
    return figure
