"""The table of the README, from benchmarks/results. python benchmarks/table.py writes it there.

It stands between two comments; a test holds that it is the one of the results.
"""

import json
import pathlib
import re

import click

from records import RESULTS

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by benchmarks/table.py -->", "<!-- end of the table -->"
PASS, NONE = "forward + backward", "-"


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def cell(by_size, dtype, versus, show):
    """The ratios at the sizes of a row, of one dtype."""
    found = [size[dtype][PASS].get(versus, {}).get("ratio") for size in by_size.values()]
    return ", ".join(show(x) for x in found if x is not None) or NONE


def written(name):
    """Rows have the names of their samplers, with what a row asks of it: `gumbel_softmax`, hard."""
    return f"`{name[1]}`" + (f", {name[2]}" if name[2] else "")


def made():
    """The lines of the table."""
    speed, memory, training = read("speed"), read("memory"), read("training")["epochs"]
    epoch = lambda name: training.get(name, {}).get("to without sampling", {}).get("ratio")
    lines = [
        "| sampler | time, float32 | time, bfloat16 | memory | faster than PyTorch | epoch of the VAE |",
        "|---|---|---|---|---|---|",
    ]
    plain, faster = "{:.2f}".format, lambda x: f"{1 / x:.1f}"
    for name, by_size in speed["rows"].items():
        torch = (
            "to PyTorch"
            if any("to PyTorch" in s["float32"][PASS] for s in by_size.values())
            else "to relaxit"
        )
        cells = [
            re.sub("^(.+?)(?:_(hard|full))?$", written, name),
            cell(by_size, "float32", "to the line by hand", plain),
            cell(by_size, "bfloat16", "to the line by hand", plain), plain(memory["samplers"][name]["ratio"]),
            cell(by_size, "float32", torch, faster), plain(epoch(name)) if epoch(name) else NONE,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(text):
    """The README with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made()}\n{END}{rest.split(END)[1]}"


@click.command(help=__doc__)
def main():
    README.write_text(filled(README.read_text()))
    click.echo(f"written to {README}")


if __name__ == "__main__":
    main()
