"""Draw the pictures of the site that no example makes: python tools/pictures/make.py [NAME ...].

Each picture is one module, with `picture(draws)` that returns a Matplotlib figure, for
docs/images/NAME.png.
"""

import importlib
import pathlib

import click
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "make")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--draws", type=click.IntRange(min=2), default=20_000, help="Draws for each estimate.")
@click.option("--out", type=click.Path(file_okay=False, path_type=pathlib.Path),
              default=IMAGES, help="Folder of the pictures.", show_default="docs/images")  # fmt: skip
def main(names, draws, out):
    out.mkdir(parents=True, exist_ok=True)
    with click.progressbar(names or NAMES, label="Pictures", item_show_func=str) as bar:
        for name in bar:
            figure = importlib.import_module(name).picture(draws)
            figure.savefig(out / f"{name}.png", dpi=110)
            plt.close(figure)


if __name__ == "__main__":
    main()
