"""The site is true: its snippets run, its reference is complete, what it includes and points to is there."""

import importlib.util
import inspect
import json
import pathlib
import re

import jax
import matplotlib.pyplot as plt
import pytest

import relaxit_jax
from relaxit_jax import (
    diagnostics,
    distributions,
    elbo,
    estimators,
    handlers,
    laplace_bridge,
    quantizers,
    structured,
)
from versions import sentence

pytestmark = pytest.mark.whole
ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
PYTHON = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What pages may write in capitals beside code: the rest may be a placeholder for a number or a table.
CAPITALS = {"AUROC", "CHANGELOG", "ELBO", "H100", "ICLR", "JSON", "MCMC", "MNIST", "NUTS", "README", "SIMPLE"}
CAPITALS |= {"ARSM"} | {name.upper() for name in (*estimators.__all__, *elbo.__all__)}
PICTURES = sorted(path.stem for path in (ROOT / "tools" / "pictures").glob("*.py") if path.stem != "make")


@pytest.fixture(scope="module")
def hooks():
    return load("tools/hooks.py")


def load(path):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if PYTHON.search(text)])
def test_snippets_run(page):
    """And what they say of their results holds: each page asserts something."""
    names, snippets = {}, PYTHON.findall(PAGES[page])
    assert re.search(r"^ *assert ", "".join(snippets), re.MULTILINE)
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    jax.block_until_ready([x for x in names.values() if isinstance(x, jax.Array)])


def test_the_reference_has_every_public_name_once(hooks):
    pages = "\n".join(map(hooks.expand, PAGES.values()))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    modules = (estimators, quantizers, diagnostics, distributions, handlers, elbo, structured)
    public = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    public |= {f"relaxit_jax.{name}" for name in relaxit_jax.__all__ if callable(getattr(relaxit_jax, name))}
    public |= {
        f"relaxit_jax.laplace_bridge.{name}"
        for name, f in inspect.getmembers(laplace_bridge, inspect.isfunction)
        if f.__module__ == laplace_bridge.__name__ and not name.startswith("_")
    }
    assert sorted(listed) == sorted(public)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_includes_and_points_to_is_there(hooks, page):
    text = hooks.expand(PAGES[page])
    assert "{{" not in text
    here = (DOCS / page).parent
    for link in re.findall(r"\]\(([^)#\s]+)[)#]", text):
        assert link.startswith("https://") or target(here / link).exists(), link
    for path in re.findall(r"`((?:examples|benchmarks|tests|docs|relaxit_jax|tools)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"python ((?:examples|benchmarks|tools)/[\w./]+)", text):
        assert (ROOT / command).exists(), command


def target(path):
    """Pictures of the benchmarks come into the site when it is built."""
    pictures = DOCS / "benchmarks"
    path = path.resolve()
    return ROOT / "benchmarks" / "results" / path.name if path.parent == pictures.resolve() else path


def without_code(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def left_behind(text):
    """Words in capitals that are no names, as a writer leaves them for what is yet to be measured."""
    text = re.sub(r"\]\([^)]*\)|\]\[[^]]*\]|{{[^}]*}}|\$[^$]*\$", "", without_code(text))
    return set(re.findall(r"@@\w*|\b(?:[A-Z][A-Z0-9_]{3,}|TBD|XXX)\b", text)) - CAPITALS


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left_behind(page):
    assert left_behind(PAGES[page]) == set()


def test_placeholders_are_found():
    text = "of MNIST\n\nTABLE\n\n| a | NUMBER1 | @@ |\n**CLIPPED** nats, TODO, took **@@RAO**, `BYTE`\n"
    text += "```python\nLIST = 1\n```\n{{ output NAME }} [x](A/PATH.md)"
    assert left_behind(text) == {"TABLE", "NUMBER1", "CLIPPED", "TODO", "@@", "@@RAO"}


@pytest.mark.parametrize("page", PAGES)
def test_formulas_become_mathml(hooks, page):
    text = without_code(PAGES[page])
    for dollars in (r"\$\$(.+?)\$\$", r"(?<![\$\\])\$([^$\n]+)\$"):
        for tex in re.findall(dollars, text, re.DOTALL):
            html = hooks.formulas(f'<span class="arithmatex">\\({tex}\\)</span>')
            assert html.startswith("<math") and "\\" not in re.sub(r"&#x[0-9A-F]+;", "", html), tex
        text = re.sub(dollars, "", text, flags=re.DOTALL)
    assert "$" not in text


def test_directives_that_do_not_fit_say_so(hooks):
    with pytest.raises(ValueError, match="no function or class 'nothing'"):
        hooks.expand("{{ source examples/vae.py nothing }}")
    with pytest.raises(ValueError, match="no such directive"):
        hooks.expand("{{ sauce examples/vae.py main }}")


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_made(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "pictures")
    figure = load(f"tools/pictures/{name}.py").picture(50)
    assert any(axis.has_data() for axis in figure.axes)
    plt.close(figure)
    used = "\n".join(PAGES.values())
    assert (DOCS / "images" / f"{name}.png").exists() and f"images/{name}.png" in used


def test_mutations_still_apply():
    """What tools/mutations.py replaces stands in its file once, and its tests are there."""
    for defect, file, old, new, files, _ in load("tools/mutations.py").MUTATIONS:
        assert (ROOT / file).read_text().count(old) == 1 and new != old, defect
        assert all((ROOT / "tests" / name).exists() for name in files.split()), defect


def test_the_site_and_its_tools_are_apart():
    """What is in docs/ is published or recorded; what makes it is in tools/."""
    assert {path.suffix for path in DOCS.rglob("*") if path.is_file()} == {
        ".css",
        ".md",
        ".png",
        ".toml",
        ".txt",
    }
    config = (ROOT / "mkdocs.yml").read_text()
    for path in re.findall(r"\b[a-z]+/\w+\.py", config):
        assert path.startswith("tools/") and (ROOT / path).exists(), path


RECORDED = (
    r"Recorded with (Python 3\.[\d.]+, )?JAX [\d.]+(, NumPyro [\d.]+)? on \d+ [\w ]+, 20\d\d-[\d to-]+\."
)


@pytest.mark.parametrize("path", sorted((DOCS / "outputs").iterdir()), ids=lambda path: path.name)
def test_a_recorded_output_says_with_which_versions(path):
    """In its last line; the tables of evidence in the last before their end."""
    last = path.read_text().removesuffix("<!-- end -->\n").splitlines()[-1]
    assert re.fullmatch(RECORDED, last.strip("*"))


def test_every_result_says_with_which_versions_and_is_shown(hooks):
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path in results:
        said = sentence(json.loads(path.read_text())["versions"])
        assert re.fullmatch(RECORDED, said) and said in hooks.expand(f"{{{{ versions {path.stem} }}}}")
    shown = re.findall(r"^{{ versions (\w+) }}$", "\n".join(PAGES.values()), re.MULTILINE)
    assert sorted(set(shown)) == [path.stem for path in results]


def test_every_picture_is_shown():
    used = "\n".join([*PAGES.values(), (ROOT / "README.md").read_text()])
    for path in (DOCS / "images").iterdir():
        assert path.name in used, path
