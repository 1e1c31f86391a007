"""Run an example as its tutorial describes, and keep its output and picture: python tools/record.py NAME ...

Writes docs/outputs/NAME.txt (the command, the last lines of its output, and the versions) and
docs/images/NAME.png, which the tutorial of that name shows. Without a name all are run, which takes an hour.
Neither the folder nor the time in seconds is kept, since both change from run to run.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

import click
from PIL import Image

from versions import sentence, versions

ROOT = pathlib.Path(__file__).parents[1]
LINES = 40  # lines of the output
SECONDS = re.compile(r"trained in [\d.]+ s\n|[,;] \d+ s\b")

# The command of a tutorial, and which of its pictures is copied: None if docs/images has it for README.
RUNS = {
    "vae": ("examples/vae.py", "curve.png"),
    "mixture": ("examples/mixture.py", "mixture.png"),
    "spike_and_slab": ("examples/spike_and_slab.py", "spike_and_slab.png"),
    "feature_selection": ("examples/feature_selection.py", None),
    "explain": ("examples/explain.py", None),
    "sparse_network": ("examples/sparse_network.py", None),
    "sort_digits": ("examples/sort_digits.py", None),
    "segment": ("examples/segment.py", "segment.png"),
    "latent_tree": ("examples/latent_tree.py", "latent_tree.png"),
    "policy_gradient": ("examples/policy_gradient.py", None),
    "belief_network": ("examples/belief_network.py", "belief_network.png"),
    "uncertainty": ("examples/uncertainty.py", None),
    "beam_search": ("examples/beam_search.py", None),
    "vq_vae": ("examples/vq_vae.py", "vq_vae.png"),
    "world_model": ("examples/world_model.py", "world_model.png"),
    "mixture_of_experts": ("examples/mixture_of_experts.py", "mixture_of_experts.png"),
}


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(RUNS)))
def main(names):
    for name in names or RUNS:
        command, picture = RUNS[name]
        click.echo(f"$ python {command}")
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, *command.split(), "--out", folder],
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            if done.returncode:
                raise click.ClickException(f"{command} ended with code {done.returncode}")
            printed = SECONDS.sub("", done.stdout.replace(folder, "runs/...")).splitlines()[-LINES:]
            (ROOT / "docs/outputs" / f"{name}.txt").write_text(
                "\n".join([f"$ python {command}", *printed, sentence(versions())]) + "\n"
            )
            if picture:
                copy_picture(pathlib.Path(folder) / picture, ROOT / "docs/images" / f"{name}.png")


def copy_picture(made, kept):
    """Reduce to 256 colors, which are enough for lines and dots and take a quarter of the bytes."""
    colours = Image.open(made).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(kept, optimize=True)


if __name__ == "__main__":
    main()
