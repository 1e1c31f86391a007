"""Times as ratios: what is compared runs in one process, in turns, and the median of each is taken."""

import json
import pathlib
import platform
import time

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def interleaved(functions, rounds, calls=1):
    """Median and quartiles of the seconds of a call of each function, from `rounds` turns of all."""
    for f in functions.values():
        jax.block_until_ready(f())
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = f()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds, one, other):
    """Median ratio of two columns, turn by turn, with its quartiles."""
    low, middle, high = np.quantile(seconds[one] / seconds[other], [0.25, 0.5, 0.75]).round(3).tolist()
    return {"ratio": middle, "quartiles": [low, high]}


def write(name, content):
    RESULTS.mkdir(exist_ok=True)
    machine = {"device": str(jax.devices()[0]), "cores": jax.local_device_count("cpu")}
    machine |= {"machine": platform.machine(), "jax": jax.__version__, "python": platform.python_version()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content | {"machine": machine}, indent=2) + "\n")
    print(f"written to {path}")
