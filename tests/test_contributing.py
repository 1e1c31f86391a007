"""What contributors and those who cite are told is true: the map of the house, the steps, versions, CI."""

import pathlib
import re

import yaml

import relaxit_jax

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def the_map():
    """Paths that the map names, by its indentation; a line may name several files of a folder."""
    (block,) = re.findall(r"## The map of the house\n\n((?:    .*\n)+)", TEXT)
    folders, paths = [], set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        entry = line.strip()
        names = re.findall(r"[\w.]+\.py\b|\w+/(?=\s|$)|py\.typed", entry) if depth else [entry.split()[0]]
        for name in names:
            folders[depth:] = [name] if name.endswith("/") else []
            paths.add("".join([*folders[:depth], name]))
    return paths


def test_the_map_is_the_house():
    package = ROOT / "relaxit_jax"
    house = {
        str(path.relative_to(ROOT)) + "/" * path.is_dir()
        for path in package.rglob("*")
        if "__pycache__" not in path.parts
    }
    house = {path for path in house if path.count("/") < 2 or not path.endswith("/__init__.py")}
    house |= {"relaxit_jax/"}
    named = the_map()
    assert {path for path in named if path.startswith("relaxit_jax/")} == house
    for path in named:
        assert (ROOT / path).exists(), path


def test_what_the_text_points_to_is_there():
    for path in re.findall(r"`((?:relaxit_jax|tests|docs|benchmarks|examples)/[\w./-]*)`", TEXT):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python ((?:docs|benchmarks)/[\w./]+)", TEXT):
        assert (ROOT / path).exists(), path
    sessions = re.findall(r"`(\w+)`", TEXT[TEXT.index("`noxfile.py`") : TEXT.index("`pre-commit install`")])
    defined = re.findall(r"^@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert set(sessions) == set(defined)


def test_steps_are_five():
    steps = re.findall(r"^(\d)\. \*\*", TEXT[TEXT.index("## Add a method in five steps") :], re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == relaxit_jax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == relaxit_jax.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


def test_the_workflow_runs_ci_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    (pythons,) = [
        step["with"]["python-version"].split() for step in steps if "python" in step.get("uses", "")
    ]
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert sorted(pythons) == classifiers
    for path in [*ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
