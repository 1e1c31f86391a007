"""The site is true: its snippets run, its reference is complete, its includes and links exist."""

import ast
import doctest
import importlib.util
import inspect
import json
import pathlib
import re

import jax
import matplotlib.pyplot as plt
import pytest

import diagram
import doctests
import relaxit_jax
import widths
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
# Words that pages may write in capitals outside code: any other may be a placeholder for a number or a table.
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
    """Their claims about results hold: each page asserts something."""
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
    """The build copies the pictures of the benchmarks into the site."""
    pictures = DOCS / "benchmarks"
    path = path.resolve()
    return ROOT / "benchmarks" / "results" / path.name if path.parent == pictures.resolve() else path


def without_code(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def left_behind(text):
    """Words in capitals that are not names, which a writer leaves for figures still to be measured."""
    text = re.sub(r"\]\([^)]*\)|\]\[[^]]*\]|{{[^}]*}}|\$[^$]*\$", "", without_code(text))
    return set(re.findall(r"@@\w*|\b(?:[A-Z][A-Z0-9_]{3,}|TBD|XXX)\b", text)) - CAPITALS


CODE = re.compile(r"^```\w*[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_code_and_tables_fit_a_page(hooks, page):
    """Code has at most 80 characters a line but for single long words, tables at most five columns.

    What a table cannot break, its longest words side by side, is below what 1,280 pixels show.
    """
    text = hooks.expand(PAGES[page])
    wide = [line for code in CODE.findall(text) for line in code.splitlines() if len(line) > 80]
    assert [line for line in wide if len(line.strip().split(" x ")) > 2 or " " in line.strip()[:60]] == []
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", row.strip()[1:-1]) for row in table.splitlines()]
        assert len(rows[0]) <= 5, rows[0]
        cells = [[shown(cell) for cell in row] for row in rows if not set("".join(row)) <= set("-: ")]
        words = [[max(map(len, cell.split()), default=0) for cell in row] for row in cells]
        assert sum(map(max, zip(*words, strict=True))) <= 85, rows[0]


def test_included_code_keeps_its_meaning():
    """Only comments and docstrings are wrapped; a comment that does not fit goes above its line."""
    assert widths.code("x = 1  # " + "one " * 25).splitlines()[-1] == "x = 1"
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text()
        bare = [ast.dump(without_docstrings(code)) for code in (text, widths.code(text))]
        assert bare[0] == bare[1], path


def test_doctests_keep_their_meaning():
    """The reference shows them narrower, with the same statements and the same results."""
    parse, seen = doctest.DocTestParser().get_examples, 0
    modules = (relaxit_jax, estimators, quantizers, diagnostics, distributions, handlers, elbo, structured)
    for module in modules:
        for name in module.__all__:
            thing = getattr(module, name)
            text = inspect.getdoc(thing) or ""
            if ">>>" not in text or inspect.ismodule(thing):
                continue
            before, after = (parse(x) for x in (text, doctests.fitted(text[text.index(">>>") :])))
            assert [x.want for x in before] == [x.want for x in after]
            trees = [[ast.dump(ast.parse(x.source)) for x in found] for found in (before, after)]
            assert trees[0] == trees[1]
            seen += 1
    assert seen > 80


def without_docstrings(code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_recorded_output_is_cut_between_its_parts():
    line = "name     error 0.1320 of the variance, 86 bits per image, 29 codes used, perplexity 11"
    first, second = widths.output(line).splitlines()
    assert line.startswith(first) and first.endswith(",") and second == "    perplexity 11"
    table = [f"{name:30}{number:40}{number:20}" for name, number in (("a", 1), ("b", 2), ("c", 3))]
    assert widths.output("\n".join(table)).splitlines() == ["a 1 1", "b 2 2", "c 3 3"]


def shown(cell):
    """The text of a cell: links without their targets, code that may break after an underscore or a dot."""
    cell = re.sub(r"\[([^]]*)\](?:\([^)]*\)|\[[^]]*\])", r"\1", cell)
    return re.sub(r"([_.(,])", r"\1 ", cell.replace("`", ""))


# What people search for, and the pages that answer it.
SEARCHED = {
    "concrete distribution": ("families/categorical.md", "families/binary.md"),
    "straight through": ("families/categorical.md", "families/binary.md"),
    "differentiable argmax": ("families/categorical.md",),
    "differentiable sampling": ("index.md",),
    "VQ-VAE": ("families/codebooks.md", "tutorials/vq-vae.md"),
    "score function": ("families/estimators.md",),
    "REINFORCE": ("families/estimators.md",),
    "zero or NaN": ("tasks/zero-or-nan.md",),
}


@pytest.mark.parametrize("words", SEARCHED)
def test_search_finds_what_people_ask_for(words):
    """The words are in the title or in the first paragraph, which the site's search shows first."""
    for page in SEARCHED[words]:
        title, paragraph, *_ = PAGES[page].split("\n\n")
        assert words.lower() in " ".join(f"{title} {paragraph}".lower().split()), page


def test_the_diagram_leads_somewhere():
    """Its links lead to pages or sections, its names exist in the library, and both forms have all."""
    for link in diagram.links():
        page, _, anchor = link.partition("#")
        target = f"{page.removeprefix('../').rstrip('/')}.md" if page else "which-method.md"
        headings = re.findall(r"^#+ (.+)$", PAGES[target], re.MULTILINE)
        slugs = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
        assert not anchor or anchor in slugs, link
    takes = [take for _, _, take, *_ in diagram.QUESTIONS] + [diagram.LAST[0]]
    names = {
        name for take in takes for name in re.findall(r"\w+_\w+|\b(?:arms|disarm|rloo|rebar|reinmax)\b", take)
    }
    modules = (relaxit_jax, estimators, handlers, elbo, quantizers)
    assert len(names) > 12 and [x for x in names if not any(hasattr(m, x) for m in modules)] == []
    for drawn in (diagram.wide(), diagram.narrow()):
        assert drawn.count("<a ") == len(diagram.links()) == len(diagram.QUESTIONS) + 1


def test_tables_become_lists_on_a_phone_where_they_are_wide():
    head, row = "<tr><th>name</th><th>what</th></tr>", "<tr><td><code>a_b</code></td><td>{}</td></tr>"
    html = f"<table><thead>{head}</thead><tbody>{row}</tbody></table>"
    narrow = widths.table(html.format("short"))
    assert "data-list" not in narrow and "a_<wbr>b" in narrow
    wide = widths.table(html.format("a long cell " * 10))
    assert '<td data-label="name"><code>' in wide and wide.startswith("<table data-list>")


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
    """The text that tools/mutations.py replaces appears once in its file, and its tests exist."""
    for defect, file, old, new, files, _ in load("tools/mutations.py").MUTATIONS:
        assert (ROOT / file).read_text().count(old) == 1 and new != old, defect
        assert all((ROOT / "tests" / name).exists() for name in files.split()), defect


def test_the_site_and_its_tools_are_apart():
    """Everything in docs/ is published or recorded; the scripts that make it are in tools/."""
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
    """The versions are in its last line, or in the last line before the end for tables of evidence."""
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
