"""The notebooks match their scripts, run, and have outputs that can be shown.

The scripts in notebooks/ are the source. After a change of one, write its notebook again:
python notebooks/make.py NAME. Here the cells run as one script with few steps, and end in assertions.
"""

import os
import pathlib
import re

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

from versions import versions

pytestmark = pytest.mark.whole

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
# of training, enough for what the last cells assert
STEPS = {"latent_classes": 800, "numpyro_relax": 800, "vae": 1000}
MACHINE = re.compile(r"/(?:home|Users|root|tmp|work|opt|usr|var|mnt|srv)/|[A-Z]:\\\\|site-packages")


def script(name):
    return jupytext.read(FOLDER / f"{name}.py")


def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*STEPS, "make"}
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_notebook_and_script_have_the_same_cells(name):
    cells = [[(cell.cell_type, cell.source) for cell in f(name).cells] for f in (script, notebook)]
    assert cells[0] == cells[1]
    pairing = notebook(name).metadata["jupytext"]["formats"]
    assert pairing == script(name).metadata["jupytext"]["formats"] == "ipynb,py:percent"


@pytest.mark.parametrize("name", STEPS)
def test_notebook_can_be_shown(name):
    """Every cell has run, in order and without an error; nothing names the machine that it ran on."""
    found = notebook(name)
    nbformat.validate(found)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}  # no error
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) >= 2
    texts = [output.text for output in outputs if output.output_type == "stream"]
    texts += [text for data in shown for kind, text in data.items() if not kind.startswith("image/")]
    assert re.search("test negative ELBO|largest error|agreement", "".join(texts))
    for text in [*texts, *(cell.source for cell in found.cells), str(found.metadata)]:
        assert not MACHINE.search(text), text
    assert all(output.get("name") != "stderr" for output in outputs)
    assert found.metadata["kernelspec"]["name"] == "python3"
    assert set(found.metadata["versions"]) == set(versions())
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", STEPS)
def test_links_lead_somewhere(name):
    text = "\n".join(cell.source for cell in script(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert (FOLDER / link).exists(), link
    for path in re.findall(r"`((?:examples|docs)/[\w./]+)`", text):
        assert (FOLDER.parent / path).exists(), path


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("name", STEPS)
def test_notebook_runs(name, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "STEPS", str(STEPS[name]))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names, last = {}, None
    for number, cell in enumerate(script(name).cells):
        if cell.cell_type == "code":
            last = cell.source
            exec(compile(last, f"{name}, cell {number}", "exec"), names)
    assert last.count("assert ") >= 2
