"""What a benchmark leaves behind: one JSON and one picture of its name, and where they were measured."""

import json
import os
import pathlib
import platform
import time

import click
import jax

RESULTS = pathlib.Path(__file__).parent / "results"

out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder of the JSON and the picture.  [default: benchmarks/results]",
)


def write(name, content, out=None, figure=None):
    """The JSON, with the machine, and the picture beside it."""
    out = out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | content, indent=1) + "\n")
    click.echo(f"written to {path}")
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=80, bbox_inches="tight")
        shrink(path.with_suffix(".png"))


def machine():
    device = jax.devices()[0]
    return {
        "device": device.device_kind, "platform": device.platform, "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(), "jax": jax.__version__, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def shrink(path):
    """To a palette: a third of the bytes, and lines and letters look the same."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
