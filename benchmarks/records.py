"""Write the results of a benchmark: one JSON file and one picture, with versions and machine."""

import json
import pathlib
import sys

import click

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tools"))

from versions import versions

RESULTS = pathlib.Path(__file__).parent / "results"

out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder for the JSON and the picture.   [default: benchmarks/results]",
)


def write(name, content, out=None, figure=None, quiet=False):
    """Write the JSON, with its versions, and the picture next to it."""
    out = out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"versions": versions()} | content, indent=1) + "\n")
    if not quiet:
        click.echo(f"written to {path}")
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=80, bbox_inches="tight")
        shrink(path.with_suffix(".png"))


def shrink(path):
    """Reduce to a palette: a third of the bytes, and lines and letters look the same."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
