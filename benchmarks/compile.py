"""Time before the first number: import, compilation, and compilations during training.

Each import is timed in its own process, in turns: `import relaxit_jax` over `import jax`, at most 1.05. Then,
in a separate process for each of the most used samplers, the seconds from its start to the first draw and to
the first gradient, compared with hand-written JAX. Then, for every sampler in this process, the time to
compile its value and gradient over the time for hand-written JAX. And how often JAX compiles while 200 steps
train and anneal the temperature: once.

Writes results/compile.json and results/compile.png, and takes some minutes.
"""

import functools
import os
import subprocess
import sys
import time

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import relaxit_jax as rj
from records import out_option, write
from rows import CLASSES, ROWS
from timing import ratio

IMPORTS = ("jax", "relaxit_jax", "relaxit_jax.estimators", "numpyro", "relaxit_jax.distributions")
BASE = {"relaxit_jax.distributions": "numpyro"}  # it imports NumPyro; the others import jax alone
FIRST = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, {folder!r})
import jax, jax.numpy as jnp
{imports}
draw = jax.jit(lambda key, l: {draw})
l = jnp.zeros({shape})
key = jax.random.key(0)
draw(key, l).block_until_ready()
first = time.perf_counter()
jax.jit(jax.grad(lambda l, key: jnp.sum(draw(key, l) ** 2)))(l, key).block_until_ready()
print(first - start, time.perf_counter() - first)
"""
DRAWS = {  # (imports, ours, hand-written)
    "gumbel_softmax": (
        "rj.gumbel_softmax(key, l, 0.5)", "jax.nn.softmax((l + jax.random.gumbel(key, l.shape)) / 0.5)",
    ),
    "relaxed_bernoulli": (
        "rj.relaxed_bernoulli(key, l, 0.5)", "jax.nn.sigmoid((l + jax.random.logistic(key, l.shape)) / 0.5)",
    ),
    "straight_through_bernoulli": (
        "rj.straight_through_bernoulli(key, l)",
        "(lambda p: p + jax.lax.stop_gradient(jax.random.bernoulli(key, p) - p))(jax.nn.sigmoid(l))",
    ),
}  # fmt: skip


def python(code):
    """Seconds of a fresh process that runs it, from byte code as when installed, and its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start, command = time.perf_counter(), [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, done.stdout


def imports(rounds, bar):
    """The time of each import, minus the time of an empty process, over the time of its base."""
    seconds = {name: [] for name in ("nothing", *IMPORTS)}
    for name in IMPORTS:
        python(f"import {name}")  # writes the byte code
    for _ in range(rounds):
        for name in seconds:
            seconds[name].append(python("pass" if name == "nothing" else f"import {name}")[0])
            bar.update()
    nothing = np.array(seconds.pop("nothing"))
    seconds = {name: np.array(x) - np.median(nothing) for name, x in seconds.items()}
    return {
        name: {"seconds": round(float(np.median(x)), 3)}
        | (
            {}
            if name in ("jax", "numpyro")
            else {"to what it imports": ratio(seconds, name, BASE.get(name, "jax"))}
        )
        for name, x in seconds.items()
    }


def first_numbers(rounds, bar):
    """Seconds from the start of a program to its first draw, and from there to its first gradient."""
    table = {}
    for name, (ours, by_hand) in DRAWS.items():
        seconds = {}
        for _ in range(rounds):
            for who, draw, line in (("ours", ours, "import relaxit_jax as rj"), ("by hand", by_hand, "")):
                code = FIRST.format(folder="", imports=line, draw=draw, shape=CLASSES)
                draw_seconds, gradient_seconds = map(float, python(code)[1].split())
                seconds.setdefault(f"{who}, first draw", []).append(draw_seconds)
                seconds.setdefault(f"{who}, first gradient", []).append(gradient_seconds)
                bar.update()
        seconds = {which: np.array(x) for which, x in seconds.items()}
        table[name] = {
            which: {"seconds": round(float(np.median(seconds[f"ours, {which}"])), 3)}
            | {"to hand-written JAX": ratio(seconds, f"ours, {which}", f"by hand, {which}")}
            for which in ("first draw", "first gradient")
        }
    return table


def compilation(rounds, bar):
    """Seconds to trace and compile each sampler with its gradient, relative to hand-written JAX."""
    table = {}
    for name, row in ROWS.items():
        logits, seconds = jnp.zeros(row.sizes[0]), {"ours": [], "by hand": []}
        for _ in range(rounds):
            for who, draw in (("ours", row.ours), ("by hand", row.by_hand)):
                jax.clear_caches()
                start = time.perf_counter()
                loss = lambda l, key, draw=draw: jnp.sum(draw(key, l))
                jax.jit(jax.value_and_grad(loss)).lower(logits, jax.random.key(0)).compile()
                seconds[who].append(time.perf_counter() - start)
        seconds = {who: np.array(x) for who, x in seconds.items()}
        table[name] = {"seconds": round(float(np.median(seconds["ours"])), 3)}
        table[name]["to hand-written JAX"] = ratio(seconds, "ours", "by hand")
        bar.update()
    return table


def compilations(run):
    """How often JAX compiles while this runs."""
    counted = [0]

    def listen(event, seconds, **_):
        counted[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    run()
    jax.monitoring.unregister_event_duration_listener(listen)
    return counted[0]


def compilations_of_training(draw, shape=(64, 8), steps=200):
    """How often JAX compiles the step while it trains, with a different temperature each time."""
    adam, target = optax.adam(0.1), jnp.arange(float(shape[-1]))
    anneal = optax.exponential_decay(1.0, steps, 0.1)

    @jax.jit
    def step(logits, state, key, number):
        tau = anneal(number)
        loss = lambda l: jnp.mean((draw(key, l, tau) - target) ** 2)
        updates, state = adam.update(jax.grad(loss)(logits), state)
        return optax.apply_updates(logits, updates), state

    logits = jnp.zeros(shape)
    state, keys = adam.init(logits), list(jax.random.split(jax.random.key(0), steps))
    jax.block_until_ready((logits, state, keys))

    def train():
        now = logits, state
        for number, key in enumerate(keys):
            now = step(*now, key, number)

    return compilations(train)


ANNEALED = {
    "relaxed_bernoulli": rj.relaxed_bernoulli,
    "hard_concrete": rj.hard_concrete,
    "gumbel_softmax": rj.gumbel_softmax,
    "gumbel_softmax, hard": functools.partial(rj.gumbel_softmax, hard=True),
    "gumbel_rao": rj.gumbel_rao,
    "relaxed_top_k": lambda key, l, tau: rj.relaxed_top_k(key, l, 3, tau),
}


def picture(table, compiled):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    bars = {f"import {name}": row["seconds"] for name, row in table["imports"].items()}
    for name, row in table["first numbers"].items():
        bars |= {f"{name}: {which}": x["seconds"] for which, x in row.items()}
    left.barh(list(bars)[::-1], list(bars.values())[::-1])
    left.set(xlabel="seconds", title="imports, and from the start to the first numbers")
    names = list(compiled)[::-1]
    right.barh(names, [compiled[name]["to hand-written JAX"]["ratio"] for name in names])
    right.axvline(1, color="black", lw=0.8)
    right.set(xlabel="time to compile value and gradient, over hand-written JAX", title="compilation")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    return figure


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=3), default=9, help="Number of turns of each measurement.")
@out_option
def main(rounds, out):
    work = rounds * (len(IMPORTS) + 1) + 2 * rounds * len(DRAWS) + len(ROWS)
    with tqdm(total=work, unit="step") as bar:
        table = {"imports": imports(rounds, bar), "first numbers": first_numbers(rounds, bar)}
        compiled = compilation(max(3, rounds // 3), bar)
    counts = {name: compilations_of_training(draw) for name, draw in ANNEALED.items()}
    for part in table.values():
        for name, row in part.items():
            click.echo(f"{name:28} {row}")
    for name, row in compiled.items():
        click.echo(f"compile {name:28} {row['seconds']:.2f} s, {row['to hand-written JAX']}")
    click.echo(f"compilations while 200 steps anneal the temperature: {counts}")
    content = {"goal": 1.05, **table, "compilation": compiled, "compilations of an annealed training": counts}
    write("compile", content, out, picture(table, compiled))


if __name__ == "__main__":
    main()
