"""Times as ratios: everything compared runs in one process, in turns, and the median of each is taken."""

import time

import jax
import numpy as np


def interleaved(functions, rounds, calls=None, budget=None):
    """The seconds per call of each function, in each of `rounds` turns.

    A turn of a function is `calls` calls, or as many as take 3 milliseconds. Functions that would take
    longer than `budget` seconds in total get fewer turns, at least five. The order changes from turn to
    turn: the threads of PyTorch look for work for a while after a call, on a core that the next function
    needs.
    """
    first = {}
    for name, f in functions.items():
        jax.block_until_ready(f())  # compiles
        start = time.perf_counter()
        jax.block_until_ready(f())
        first[name] = time.perf_counter() - start
    repeats = {name: calls or max(1, round(3e-3 / first[name])) for name in functions}
    if budget:
        rounds = min(rounds, max(5, int(budget / sum(first[n] * repeats[n] for n in functions))))
    seconds = {name: [] for name in functions}
    rng, names = np.random.default_rng(0), list(functions)
    for _ in range(rounds):
        for name in rng.permutation(names):
            f, start = functions[name], time.perf_counter()
            for _ in range(repeats[name]):
                result = f()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds, one, other):
    """Median ratio of two columns, turn by turn, with its quartiles."""
    low, middle, high = np.quantile(seconds[one] / seconds[other], [0.25, 0.5, 0.75]).round(3).tolist()
    return {"ratio": middle, "quartiles": [low, high]}


def milliseconds(seconds):
    return round(float(np.median(seconds)) * 1e3, 4)
