"""Writes the tables of README.md and docs/performance.md from benchmarks/results: python benchmarks/table.py

Each stands between two comments, and a test compares it with the results.
"""

import json
import pathlib
import re

import click

from records import RESULTS
from versions import sentence

ROOT = pathlib.Path(__file__).parents[1]
PASS, HAND, NONE = "forward + backward", "to the line by hand", "-"
SHOWN = {  # in README, at one size
    "relaxed_bernoulli", "gumbel_softmax", "straight_through_categorical", "gumbel_rao", "simple_top_k",
    "relaxed_top_k",
}  # fmt: skip
SIZE = "256 x 10 x 128"


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def ratio(results, versus):
    found = results.get(versus, {}).get("ratio")
    return NONE if found is None else f"{found:.2f}"


def cells(by_size):
    """Time to hand-written JAX in float32 and bfloat16, and to PyTorch or else relaxit, at these sizes."""
    passes = {dtype: [size[dtype][PASS] for size in by_size] for dtype in ("float32", "bfloat16")}
    peer = "to PyTorch" if any("to PyTorch" in found for found in passes["float32"]) else "to relaxit"
    wanted = ("float32", HAND), ("bfloat16", HAND), ("float32", peer)
    for dtype, versus in wanted:
        found = [ratio(results, versus) for results in passes[dtype]]
        yield ",\N{NO-BREAK SPACE}".join(x for x in found if x != NONE) or NONE


def written(name):
    """Rows have the names of their samplers, with what a row asks of it: `gumbel_softmax`, hard."""
    sampler, asked = re.fullmatch("(.+?)(?:_(hard|full))?", name).groups()
    return f"`{sampler}`" + (f", {asked}" if asked else "")


def samplers(shown=lambda name: True, wanted=lambda size: True):
    """A row for each sampler that is shown, at the sizes that are wanted."""
    memory, rows = read("memory")["samplers"], []
    for name, by_size in read("speed")["rows"].items():
        if shown(name):
            hand, half, peer = cells([found for size, found in by_size.items() if wanted(size)])
            rows.append((written(name), hand, half, f"{memory[name]['ratio']:.2f}", peer))
    return table(("sampler", "float32", "bfloat16", "memory", "to PyTorch"), rows)


def short():
    """README's table, and under it what it was recorded with."""
    speed = read("speed")
    peers = ", ".join(f"{name} {speed['peers'][name]}" for name in ("PyTorch", "relaxit"))
    return f"{samplers(SHOWN.__contains__, SIZE.__eq__)}\n\n{sentence(speed['versions'])} Peers: {peers}."


def epochs():
    head = ("`--method`", "milliseconds", "to no sampling", "to PyTorch")
    found = {name: row for name, row in read("training")["epochs"].items() if "to without sampling" in row}
    return table(head, (
        (f"`{name}`".replace(", tau 0.1`", "`, tau 0.1"), f"{row['milliseconds']:.0f}",
         ratio(row, "to without sampling"), ratio(row, "to PyTorch"))
        for name, row in found.items()
    ))  # fmt: skip


TABLES = {
    "README.md": {"speed": short},
    "docs/performance.md": {"speed": samplers, "epochs": epochs},
}


def filled(text, tables):
    """A page with its tables in their places."""
    for name, made in tables.items():
        begin, end = f"<!-- {name}, by benchmarks/table.py -->\n", f"\n<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + made() + end + rest.split(end)[1]
    return text


@click.command(help=__doc__)
def main():
    for name, tables in TABLES.items():
        path = ROOT / name
        path.write_text(filled(path.read_text(), tables))
        click.echo(f"written to {path}")


if __name__ == "__main__":
    main()
