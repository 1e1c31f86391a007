"""Build steps of the site besides Markdown: formulas, the code of the examples, and their recorded output.

A page writes `{{ source FILE NAME }}` for a function or class of a file, `{{ output NAME }}` for the output
of a run that `tools/record.py` recorded, `{{ between FILE MARK }}` for the part of a file between comments,
and `{{ versions NAME }}` for the versions that a result of the benchmarks was recorded with.
`{{ methods VIEW }}`, `{{ samplers FAMILY }}` and `{{ classes FAMILY }}` come from docs/methods.toml
(tools/method_tables.py), and `{{ diagram decision }}` from tools/diagram.py.
So pages cannot drift from the code: a missing name stops the build. Formulas become MathML here, so a
reader's browser needs neither a script nor a network.
"""

import ast
import html
import json
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

import diagram
import widths
from method_tables import classes, methods, samplers
from versions import sentence

ROOT = pathlib.Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^{{ (\w+) ([^}]+) }}$", re.MULTILINE)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def source(file, name):
    """A top-level function or class of a Python file, formatted to the width of a page."""
    text = (ROOT / file).read_text()
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = text.splitlines()[first - 1 : node.end_lineno]
            return f'```python title="{file}"\n' + widths.code("\n".join(lines)) + "\n```"
    raise ValueError(f"{file} has no function or class {name!r} at its top level")


def output(name):
    """The command and the end of its output, as recorded."""
    recorded = (ROOT / "docs" / "outputs" / f"{name}.txt").read_text().rstrip()
    return f"```console\n{widths.output(recorded)}\n```"


def between(file, mark):
    """The lines of a file between `<!-- mark -->` and the next such comment."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n(.*?)<!--", (ROOT / file).read_text(), re.DOTALL)
    if not found:
        raise ValueError(f"{file} has no <!-- {mark} --> with another comment after it")
    return found[1]


def versions(name):
    """The versions that a result of the benchmarks was recorded with."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["versions"]
    return f"*`benchmarks/results/{name}.json`: {sentence(found)}*"


DIRECTIVES = {
    "source": source, "output": output, "between": between, "versions": versions,
    "diagram": lambda name: {"decision": diagram.decision}[name](),
    "methods": methods, "samplers": samplers, "classes": classes,
}  # fmt: skip


def expand(markdown):
    """A page with its directives replaced."""

    def replace(match):
        name, arguments = match.groups()
        if name not in DIRECTIVES:
            raise ValueError(f"{match[0]}: no such directive; there are {', '.join(DIRECTIVES)}")
        file, *rest = arguments.split(maxsplit=1)
        return DIRECTIVES[name](file, *rest)

    return DIRECTIVE.sub(replace, markdown)


def formulas(page):
    """HTML with its TeX turned into MathML."""

    def replace(match):
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(replace, page)


def on_files(files, config):
    """Add the pictures of the benchmarks to the pictures of the pages."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **kwargs):
    return expand(markdown)


def on_page_content(html, **kwargs):
    return TABLE.sub(lambda match: widths.table(match[0]), formulas(html))
