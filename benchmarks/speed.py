"""Every sampler compared with hand-written JAX, with its random bits alone, and with other libraries.

It times the forward pass, and the forward pass with the gradient in the logits, at three sizes and in two
dtypes. Everything that is compared runs in one process in turns; a ratio is the time of this library over the
other time, the median over the turns with its quartiles. Goals: at most 1.15 of hand-written JAX, 1.5 of
jax.random.bits, 0.2 of PyTorch and its relaxit, 1 of TensorFlow Probability. Libraries that are not installed
are left out with a line.

Writes results/speed.json and results/speed.png, a table to the terminal, and takes half an hour.
"""

import functools

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import peers
from records import out_option, write
from rows import ROWS, logits_of, size_name
from timing import interleaved, milliseconds, ratio

GOALS = {
    "to hand-written JAX": 1.15,
    "to random bits": 1.5,
    "to TensorFlow Probability": 1.0,
    "to PyTorch": 0.2,
    "to relaxit": 0.2,
}
PASSES = ("forward", "forward + backward")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def jax_pass(draw, logits, weights, backward):
    """The draw and, if requested, its gradient in the logits, for a fixed cotangent."""
    key = jax.random.key(0)

    def both(key, logits, weights):
        z, pull = jax.vjp(functools.partial(draw, key), logits)
        return z, pull(weights)[0]

    if backward:
        return functools.partial(jax.jit(both), key, logits, weights)
    return functools.partial(jax.jit(draw), key, logits)


def random_bits(row, shape):
    draw = lambda key: jax.random.bits(key, (row.numbers, *shape) if row.numbers > 1 else shape)
    return functools.partial(jax.jit(draw), jax.random.key(0))


def competitors(name, shape, dtype, backward, others):
    """{whom: a function that draws}, with this library's as "ours"."""
    row = ROWS[name]
    logits = logits_of(shape, dtype)
    out = jax.eval_shape(row.ours, jax.random.key(0), logits)
    weights = logits_of(out.shape, out.dtype, seed=1)
    found = {
        "ours": jax_pass(row.ours, logits, weights, backward),
        "hand-written JAX": jax_pass(
            row.by_hand, logits, weights.astype(by_hand_dtype(row, logits)), backward
        ),
        "random bits": random_bits(row, shape),
    }
    draw, has_gradient = others["TensorFlow Probability"].get(name, (None, False))
    if draw and (has_gradient or not backward):
        found["TensorFlow Probability"] = jax_pass(draw, logits, weights, backward)
    for library in ("PyTorch", "relaxit"):
        if name in others[library]:
            found[library] = peers.torch_pass(others[library][name], logits, weights, backward)
    return found


def by_hand_dtype(row, logits):
    return jax.eval_shape(row.by_hand, jax.random.key(0), logits).dtype


def measure(name, shape, dtype, backward, others, rounds, budget):
    functions, refused = {}, {}
    for whom, f in competitors(name, shape, dtype, backward, others).items():
        try:
            jax.block_until_ready(f())
            functions[whom] = f
        except (RuntimeError, ValueError) as reason:  # some others have nothing in half precision
            if whom in ("ours", "hand-written JAX") or dtype == jnp.float32:
                raise
            refused[whom] = str(reason).splitlines()[0]
    seconds = interleaved(functions, rounds, budget=budget)
    result = {"milliseconds": {whom: milliseconds(x) for whom, x in seconds.items()}}
    result |= {f"to {whom}": ratio(seconds, "ours", whom) for whom in seconds if whom != "ours"}
    return result | ({"refused": refused} if refused else {})


def summary(table):
    """For each goal, how many of its comparisons meet it, and the others, the worst first."""
    found = {}
    for versus, goal in GOALS.items():
        ratios = [
            (result[versus]["ratio"], " / ".join((name, size, dtype, which)))
            for name, sizes in table.items()
            for size, dtypes in sizes.items()
            for dtype, passes in dtypes.items()
            for which, result in passes.items()
            if versus in result
        ]
        missed = sorted((r for r in ratios if r[0] > goal), reverse=True)
        found[versus] = {
            "goal": goal, "median": float(np.median([r for r, _ in ratios])) if ratios else None,
            "met": len(ratios) - len(missed), "of": len(ratios),
            "missed": {what: r for r, what in missed},
        }  # fmt: skip
    return found


def picture(table):
    """One panel per size, one line per sampler, one mark per comparison of the forward and backward pass."""
    marks = {
        "to hand-written JAX": ("o", "tab:blue"), "to random bits": ("|", "tab:gray"),
        "to TensorFlow Probability": ("s", "tab:green"), "to PyTorch": ("^", "tab:red"),
        "to relaxit": ("v", "tab:orange"),
    }  # fmt: skip
    names = list(table)[::-1]
    figure, axes = plt.subplots(
        1, 3, figsize=(15, 0.32 * len(names) + 1.6), sharey=True, layout="constrained"
    )
    for index, axis in enumerate(axes):
        for versus, (mark, colour) in marks.items():
            for dtype, filled in (("float32", True), ("bfloat16", False)):
                points = [
                    (list(table[name].values())[index][dtype][PASSES[1]][versus]["ratio"], y)
                    for y, name in enumerate(names)
                    if index < len(table[name])
                    and versus in list(table[name].values())[index].get(dtype, {}).get(PASSES[1], {})
                ]
                if points:
                    label = versus + ("" if filled else ", bfloat16")
                    fill = colour if filled or mark == "|" else "none"
                    axis.scatter(*zip(*points, strict=True), marker=mark, s=38, label=label,
                                 facecolors=fill, edgecolors=None if mark == "|" else colour,
                                 alpha=1 if filled else 0.6)  # fmt: skip
        axis.axvline(1, color="black", lw=0.8)
        axis.axvline(GOALS["to hand-written JAX"], color="tab:blue", lw=0.8, ls=":")
        axis.set(xscale="log", title=panel_title(table, index), xlabel="time of this library / of the other")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle("Forward and backward pass: left of the line, this library is faster")
    return figure


def panel_title(table, index):
    sizes = [list(sizes)[index] for sizes in table.values() if index < len(sizes)]
    return max(sizes, key=sizes.count, default="")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=5), default=30, help="Number of turns of each comparison.")
@click.option(
    "--budget", type=click.FloatRange(min=0.1), default=3.0, help="Approximate seconds for a comparison."
)
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), metavar="NAME",
              help="Run only this sampler; may be repeated. Nothing is written without --out.")  # fmt: skip
@click.option("--size", type=click.IntRange(0, 2), help="Run only the first (0), second or third size.")
@out_option
def main(rounds, budget, only, size, out):
    found = {
        "TensorFlow Probability": peers.of_tfp(), "PyTorch": peers.of_torch(), "relaxit": peers.of_relaxit(),
    }  # fmt: skip
    others = {library: draws for library, (draws, _) in found.items()}
    table = {}
    work = [
        (name, shape)
        for name in only or ROWS
        for index, shape in enumerate(ROWS[name].sizes)
        if size in (None, index)
    ]
    for name, shape in tqdm(work, unit="size"):
        at_size = table.setdefault(name, {}).setdefault(size_name(shape), {})
        for dtype in DTYPES:
            at_size[dtype] = {
                which: measure(name, shape, DTYPES[dtype], which != "forward", others, rounds, budget)
                for which in PASSES
            }
            jax.clear_caches()  # hundreds of programs are compiled, each for one comparison
            for which, result in at_size[dtype].items():
                ratios = {versus[3:]: result[versus]["ratio"] for versus in GOALS if versus in result}
                ours = result["milliseconds"]["ours"]
                tqdm.write(f"{name:28} {size_name(shape):14} {dtype:8} {which:18} {ours:8.3f} ms  {ratios}")
    goals = summary(table)
    for versus, row in goals.items():
        if row["of"]:
            worst = next(iter(row["missed"].items()), "")
            click.echo(f"{versus}: {row['met']} of {row['of']} at most {row['goal']}, median "
                       f"{row['median']:.2f} {worst and 'worst ' + str(worst)}")  # fmt: skip
    if out or not (only or size is not None):
        versions = {library: version for library, (_, version) in found.items()}
        write("speed", {"goals": goals, "peers": versions, "rows": table}, out, picture(table))


if __name__ == "__main__":
    main()
