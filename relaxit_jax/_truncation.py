"""Counts without an end, cut off: how many values are enough, and where the mass of the others goes."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from relaxit_jax import _math as lm
from relaxit_jax._placement import where

MOST_VALUES = 10_000


def enough_values(log_pmf, eps):
    """The least n for which the mass of n, n + 1, ... is below eps, or None if it is above MOST_VALUES.

    ``log_pmf(values)`` has the values on its last axis. As many again as are kept are added up; the
    rest counts as the geometric series that the last two begin. Together they are 1, or the mass lies
    farther on, where nothing of it is seen yet.
    """
    size = 64
    with jax.ensure_compile_time_eval():
        while size <= 4 * MOST_VALUES:
            log_p = np.asarray(log_pmf(np.arange(size)), np.float64)
            p, last = np.exp(log_p), log_p[..., -1:]
            before = np.where(last > -np.inf, log_p[..., -2:-1], 0)
            ratio = np.exp(np.minimum(last - before, 1))
            beyond = np.where(ratio < 1, p[..., -1:] * ratio / np.maximum(1 - ratio, 1e-9), np.inf)
            tail = np.cumsum(np.concatenate([beyond, p[..., ::-1]], -1), -1)[..., ::-1]
            found = np.abs(tail[..., :1] - 1) < 0.01
            small = np.all(found & (tail[..., : size // 2] < eps), tuple(range(tail.ndim - 1)))
            if small.any():
                n = max(int(np.argmax(small)), 1)
                return n if n <= MOST_VALUES else None
            size *= 2
    return None


def fold_tail(log_pmf, num_values):
    """The log-masses of the first num_values - 1 values, and of all others together.

    ``log_pmf`` goes on for some values behind those: a light tail is their sum, since one minus the
    others would cancel, and have no gradient where it is rounded to 0. A heavy one, which may go on
    for longer, is one minus the others.
    """
    head, tail = log_pmf[..., : num_values - 1], lm.log_sum_exp(log_pmf[..., num_values - 1 :])
    below = lm.log_sum_exp(head)
    heavy = below < math.log(0.999)
    rest = jnp.log(-jnp.expm1(where(heavy, below, -1)))
    return jnp.concatenate([head, where(heavy, rest, tail)[..., None]], -1)
