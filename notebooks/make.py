"""Write the notebooks from their scripts, and run them: python notebooks/make.py [NAME ...].

The script is the source; the notebook next to it has the same cells with their outputs, and the versions in
its metadata. Times are left out. STEPS in the environment makes a shorter run.
"""

import os
import pathlib
import sys

import jupytext
import nbformat
from nbclient import NotebookClient

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tools"))

from versions import versions

HERE = pathlib.Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "make")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def tidy(notebook):
    notebook.metadata = {"kernelspec": KERNEL, "jupytext": {"formats": "ipynb,py:percent"}}
    notebook.metadata["versions"] = versions()
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}


def main(names):
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of NumPyro's import, where no widgets are
    for name in names or NAMES:
        notebook = jupytext.read(HERE / f"{name}.py")
        # coalesced, a progress bar is what one sees of it in the end
        NotebookClient(notebook, kernel_name=KERNEL["name"], timeout=600, coalesce_streams=True).execute()
        tidy(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
