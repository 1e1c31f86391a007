"""Write the tables of README.md and the site's pages from benchmarks/results: python benchmarks/table.py

Each stands between two comments, and a test compares it with the results.
"""

import json
import pathlib
import re

import click

import published
from records import RESULTS
from versions import sentence

ROOT = pathlib.Path(__file__).parents[1]
PASSES = "forward", "forward + backward"
PASS = PASSES[1]
HAND, NONE = "to hand-written JAX", "-"
SHOWN = {  # shown in README, at one size
    "gumbel_softmax", "gumbel_rao", "simple_top_k", "relaxed_top_k",
}  # fmt: skip
SIZE = "256 x 10 x 128"
ALL_IMAGES = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}  # protocols for which nothing was published


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def ratio(results, versus):
    found = results.get(versus, {}).get("ratio")
    return NONE if found is None else f"{found:.2f}" if found > 0.005 else f"{found:.1g}"


def cells(by_size):
    """Time over hand-written JAX in float32 and bfloat16, and over PyTorch or relaxit, at these sizes."""
    passes = {dtype: [size[dtype][PASS] for size in by_size] for dtype in ("float32", "bfloat16")}
    peer = "to PyTorch" if any("to PyTorch" in found for found in passes["float32"]) else "to relaxit"
    wanted = ("float32", HAND), ("bfloat16", HAND), ("float32", peer)
    for dtype, versus in wanted:
        found = [ratio(results, versus) for results in passes[dtype]]
        yield ",\N{NO-BREAK SPACE}".join(x for x in found if x != NONE) or NONE


def written(name):
    """Lines have the names of their samplers, with their option: `gumbel_softmax`, hard."""
    sampler, asked = re.fullmatch("(.+?)(?:_(hard|full))?", name).groups()
    return f"`{sampler}`" + (f", {asked}" if asked else "")


def samplers():
    """One line for each sampler, at all sizes."""
    memory, rows = read("memory")["samplers"], []
    for name, by_size in read("speed")["rows"].items():
        hand, half, peer = cells(list(by_size.values()))
        rows.append((written(name), hand, half, f"{memory[name]['ratio']:.2f}", peer))
    return table(("sampler", "float32", "bfloat16", "memory", "to PyTorch"), rows)


def short():
    """README's table, with its versions below it."""
    speed, compiled, memory = read("speed"), read("accelerators")["results"], read("memory")["samplers"]
    rows = []
    for name, by_size in speed["rows"].items():
        if name in SHOWN:
            hand, _, peer = cells([by_size[SIZE]])
            on_gpu = ratio(compiled["H100, float32"][name], PASS)
            rows.append((written(name), hand, f"{memory[name]['ratio']:.2f}", peer, on_gpu))
    peers = ", ".join(f"{name} {speed['peers'][name]}" for name in ("PyTorch", "relaxit"))
    text = table(("sampler", "time", "memory", "time vs. PyTorch", "bytes moved on an H100"), rows)
    return f"{text}\n\n{sentence(speed['versions'])} Peers: {peers}."


def accelerators():
    """Forward and with the gradient, one column for each device and dtype that was compiled for."""
    results = read("accelerators")["results"]
    names = [name for name in read("speed")["rows"] if any(name in rows for rows in results.values())]

    def cell(found):
        return NONE if found is None else ",\N{NO-BREAK SPACE}".join(ratio(found, one) for one in PASSES)

    rows = [(written(name), *(cell(rows.get(name)) for rows in results.values())) for name in names]
    return table(("sampler", *results), rows)


def fused():
    """Arrays moved by hand-written JAX, by the plain form and by fused kernels, on an H100."""
    results = read("accelerators")["results"]
    head = ["sampler"]
    rows = {}
    for dtype in ("float32", "bfloat16"):
        head += [f"{dtype}: hand-written, plain", "fused"]
        for name, found in results[f"H100, {dtype}"].items():
            if "fused" in found[PASS]:
                both = [
                    [f"{found[one][which]['arrays']:.1f}" for one in PASSES]
                    for which in ("hand-written", "ours", "fused")
                ]
                hand, plain, kernels = (",\N{NO-BREAK SPACE}".join(pair) for pair in both)
                rows.setdefault(written(name), []).extend((f"{hand}; {plain}", kernels))
    return table(head, [(name, *cells) for name, cells in rows.items()])


def epochs():
    head = ("`--method`", "milliseconds", "to no sampling", "to PyTorch")
    found = {name: row for name, row in read("training")["epochs"].items() if "to without sampling" in row}
    return table(head, (
        (f"`{name}`".replace(", tau 0.1`", "`, tau 0.1"), f"{row['milliseconds']:.0f}",
         ratio(row, "to without sampling"), ratio(row, "to PyTorch"))
        for name, row in found.items()
    ))  # fmt: skip


def side_by_side(is_shown):
    """Published figures and ours, without the records for which nothing was published."""
    results, shown = read("published")["protocols"], []
    for line in published.lines(results):
        whole = published.PROTOCOLS[line.protocol].epochs
        if line.measured and line.protocol not in ALL_IMAGES and is_shown(line):
            run = f"{line.epochs} of {whole} epochs" if line.epochs < whole else "whole"
            figure = f"{line.measure}, {published.place(line.point)}"
            cells = published.number(line.published), published.spread(line)
            shown.append((f"`{line.protocol}`: {line.row}", figure, *cells, run))
    head = ("protocol and method", "figure", "published", "ours", "run")
    return table(head, shown) if shown else "None of those that were measured."


def not_run():
    """The rows that have no results yet."""
    results, rows = read("published")["protocols"], []
    for name, protocol in published.PROTOCOLS.items():
        left = [row for row in protocol.rows if row not in results.get(name, {})]
        if left:
            rows.append((f"`{name}`", "all" if len(left) == len(protocol.rows) else ", ".join(left)))
    return table(("protocol", "rows without a result"), rows) if rows else "All rows have results."


def margins():
    """Of the matrices of each length of numbers, the worst of all seeds."""
    rows = []
    for name, runs in read("published")["protocols"]["sorting"].items():
        ends = [run["history"][-1] for run in runs.values()]
        worst = (max(end[f"margin, {which}"] for end in ends) for which in ("10 rounds", "ours"))
        rows.append((name, *(f"{value:.2g}" for value in worst)))
    return table(("numbers", "10 rounds", "the limit, ours"), rows)


def all_images():
    """The VAE of the README on all images: bounds of one and of 100 draws, and minutes."""
    results, rows = read("published")["protocols"], []
    for name, title in ALL_IMAGES.items():
        for method, runs in results.get(name, {}).items():
            (run,) = runs.values()
            end = run["history"][-1]
            bounds = (f"{end[measure]:.2f}" for measure in ("test", "test, 100 samples"))
            rows.append((title, f"`{method}`", *bounds, f"{run['seconds'] / 60:.0f}"))
    return table(("images", "`--method`", "one draw", "100 draws", "minutes"), rows)


TABLES = {
    "README.md": {"speed": short},
    "docs/performance.md": {
        "speed": samplers,
        "epochs": epochs,
        "accelerators": accelerators,
        "fused": fused,
    },
    "docs/published.md": {
        "worse": lambda: side_by_side(lambda line: line.worse is not None and line.worse > 0),
        "others": lambda: side_by_side(lambda line: line.worse is None or line.worse <= 0),
        "not_run": not_run,
        "margins": margins,
        "all_images": all_images,
    },
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
