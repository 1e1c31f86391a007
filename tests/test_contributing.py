"""The texts for contributors and citations are true: the map of the code, the steps, versions, CI."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

import relaxit_jax

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def the_map():
    """Paths that the map names, by its indentation; a line may name several files of a folder."""
    (block,) = re.findall(r"## The map of the code\n\n((?:    .*\n)+)", TEXT)
    folders, paths = [], set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        entry = line.strip()
        names = re.findall(r"[\w.]+\.py\b|\w+/(?=\s|$)|py\.typed", entry) if depth else [entry.split()[0]]
        for name in names:
            folders[depth:] = [name] if name.endswith("/") else []
            paths.add("".join([*folders[:depth], name]))
    return paths


def test_the_map_has_every_file_of_the_package():
    package = ROOT / "relaxit_jax"
    files = {
        str(path.relative_to(ROOT)) + "/" * path.is_dir()
        for path in package.rglob("*")
        if "__pycache__" not in path.parts
    }
    files = {path for path in files if path.count("/") < 2 or not path.endswith("/__init__.py")}
    files |= {"relaxit_jax/"}
    named = the_map()
    assert {path for path in named if path.startswith("relaxit_jax/")} == files
    for path in named:
        assert (ROOT / path).exists(), path


FILES = r"(?:relaxit_jax|tests|docs|benchmarks|examples|notebooks|tools)/[\w./-]*|[A-Z]+\.md|\.ci/run"


def test_what_the_text_points_to_is_there():
    for path in [*re.findall(f"`({FILES})`", TEXT), *re.findall(f"python ({FILES})", TEXT)]:
        assert (ROOT / path).exists(), path
    sessions = re.findall(
        r"`(\w+)`", TEXT[TEXT.index("lists the sessions") : TEXT.index("`pre-commit install`")]
    )
    defined = re.findall(r"^@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert sorted(sessions) == sorted(defined)
    assert "--session" not in (ROOT / ".ci/run").read_text()  # which sessions run is said in noxfile.py


def test_what_releasing_points_to_is_there():
    text = (ROOT / "RELEASING.md").read_text()
    for path in re.findall(f"`({FILES})`", text):
        assert (ROOT / path).exists(), path
    titles = {workflow["name"] for workflow in WORKFLOWS.values()}
    assert set(re.findall(r"workflow \*(\w+)\*", text)) == titles - {"CI"}
    for name in re.findall(r"`(\w+\.yml)`", text):
        assert (ROOT / ".github/workflows" / name).exists(), name


def test_a_method_touches_at_most_nine_files():
    """Each numbered line names one file, or the folder of its family's file; everything it names exists."""
    section = TEXT.partition("\n## Add a method\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. (.*?)\n(?=\n|\d+\. )", section, re.MULTILINE | re.DOTALL)
    assert "nine files" in section and [number for number, _ in steps] == list("123456789")
    files = [re.search(f"`({FILES})`", step)[1] for _, step in steps]
    assert len(set(files)) == 9 and all((ROOT / path).exists() for path in files)
    assert set(re.findall(f"`({FILES})`", section)) == {*files, ".ci/run"}
    for names, path in (
        ({"CASES", "Case"}, "tests/cases.py"),
        ({"ROWS", "Row"}, "benchmarks/rows.py"),
        ({"Bit", "OneHot", "SamplerDistribution"}, "relaxit_jax/distributions"),
        ({"straight_through"}, "relaxit_jax"),
    ):
        text = "\n".join(file.read_text() for file in python_files(ROOT / path))
        assert names <= set(re.findall(r"^(?:class |def )?(\w+)", text, re.MULTILINE)), path
        assert all(f"`{name}`" in section for name in names), names
    fields = (ROOT / "tests" / "cases.py").read_text()
    for field in re.findall(r"`(log_prob|formula|discrete|atoms|soft|distribution|moments)\b", section):
        assert f"\n    {field}: " in fields, field


def python_files(path):
    return [path] if path.is_file() else sorted(path.glob("*.py"))


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == relaxit_jax.__version__
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert {"message", "title", "authors", "abstract", "keywords", "repository-code"} <= set(citation)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == relaxit_jax.__version__


WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*.yml")}


def runs(workflow):
    return [step.get("run", "") for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_ci_on_every_python():
    workflow = WORKFLOWS["ci"]
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci/run", os.X_OK)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the key "on" as true
    assert workflow["permissions"] == {"contents": "read"}
    (pythons,) = [
        step["with"]["python-version"].split() for step in steps if "python" in step.get("uses", "")
    ]
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    after = re.search(r"PYTHONS = \[\*SUPPORTED, (.*)\]", (ROOT / "noxfile.py").read_text())[1]
    assert sorted(pythons) == [*classifiers, after.strip('"')]
    requires = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert pythons[-1] == requires  # the default is the last one: python3 of .ci/run


def test_workflows_may_do_what_they_need_and_no_more():
    """All can read; publishing and deploying have their own rights, by identity and not by a token."""
    rights = {}
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for job_name, job in workflow["jobs"].items():
            rights |= {job_name: job["permissions"]} if "permissions" in job else {}
            assert job["timeout-minutes"] <= 120
            for step in job["steps"]:
                assert re.fullmatch(r"[\w./-]+@(release/)?v\d+", step.get("uses", "a@v1")), step
    assert rights == {"publish": {"id-token": "write"}, "deploy": {"pages": "write", "id-token": "write"}}
    assert "secrets" not in "".join(path.read_text() for path in ROOT.glob(".github/workflows/*.yml"))


def test_workflows_call_sessions():
    noxfile = (ROOT / "noxfile.py").read_text()
    assert "nox --session wheel" in runs("release") and "nox --session site" in runs("site")
    assert "nox --session nightly-${{ matrix.python }}" in runs("nightly")
    for session in ("wheel", "site", "nightly"):
        assert re.search(rf"^def {session}\(session\)", noxfile, re.MULTILINE), session
    assert "python=PYTHONS[-2:]" in noxfile  # of nightly
    pythons = WORKFLOWS["ci"]["jobs"]["run"]["steps"][1]["with"]["python-version"].split()
    assert sorted(pythons)[-2:] == WORKFLOWS["nightly"]["jobs"]["suite"]["strategy"]["matrix"]["python"]
    assert WORKFLOWS["release"]["jobs"]["publish"]["if"] == "github.event_name == 'push'"
    assert set(WORKFLOWS["release"][True]["push"]) == {"tags"}


@pytest.mark.parametrize(
    ("tag", "heading", "said"),
    [
        ("1.2.3", "1.2.3 (2027-01-01)", None),
        ("1.2.4", "1.2.3 (2027-01-01)", "The tag is 1.2.4, but the version"),
        ("v1.2.3", "1.2.3 (2027-01-01)", "The tag is v1.2.3, but the version"),
        ("1.2.3", "1.2.3 (unreleased)", "still calls 1.2.3 unreleased"),
    ],
)
def test_only_a_tag_of_the_version_is_released(tag, heading, said, tmp_path):
    (script,) = [run for run in runs("release") if "GITHUB_REF_NAME" in run]
    init = (ROOT / "relaxit_jax/__init__.py").read_text()
    assert f'\n__version__ = "{relaxit_jax.__version__}"\n' in init
    (tmp_path / "relaxit_jax").mkdir()
    (tmp_path / "relaxit_jax/__init__.py").write_text(init.replace(relaxit_jax.__version__, "1.2.3"))
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n")
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=os.environ | {"GITHUB_REF_NAME": tag},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == bool(said)
    assert said in done.stdout if said else done.stdout == ""


def test_pre_commit_is_the_ruff_of_ci():
    """It covers everything in nox's lint session, at a version with which this tree passes."""
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: repo for repo in repos for hook in repo["hooks"]}
    assert {
        "ruff-check",
        "ruff-format",
        "actionlint",
        "end-of-file-fixer",
        "trailing-whitespace",
        "check-yaml",
    } <= set(hooks)
    assert re.fullmatch(r"v\d+\.\d+\.\d+", hooks["ruff-check"]["rev"])


def test_issue_templates_ask_for_what_runs(capsys):
    forms = {
        path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")
    }
    assert set(forms) == {"config", "method", "wrong_number"} and forms.pop("config")
    for name, form in forms.items():
        ids = [field["id"] for field in form["body"]]
        assert form["name"] and form["description"] and len(set(ids)) == len(ids) >= 4, name
    (versions,) = [field for field in forms["wrong_number"]["body"] if field["id"] == "versions"]
    exec(re.fullmatch(r'python -c "(.*)"', versions["attributes"]["description"])[1], {})
    assert relaxit_jax.__version__ in capsys.readouterr().out
    boxes = re.findall(r"^- \[ \] ", (ROOT / ".github/pull_request_template.md").read_text(), re.MULTILINE)
    assert len(boxes) >= 3
