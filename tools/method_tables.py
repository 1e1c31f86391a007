"""Tables from docs/methods.toml for the site: tables of methods, and lists of names for the reference.

A page writes `{{ methods VIEW }}` for `methods`: a table for each family, with the columns of one of the
VIEWS. `samplers` and `classes` are the names of a family that mkdocstrings documents.
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
NONE = "\N{EN DASH}"
PAPERS = {
    "arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/", "openreview": "https://openreview.net/forum?id=",
}  # fmt: skip


def records(family=None):
    """{name: record} of docs/methods.toml, of one family or of all."""
    found = tomllib.loads((ROOT / "docs" / "methods.toml").read_text())
    return {name: record for name, record in found.items() if family in (None, record["family"])}


def code(*names, module=""):
    """Names of the package as links to the reference."""
    return ", ".join(f"[`{name}`][relaxit_jax.{module}{name}]" for name in names) or NONE


def papers(sources):
    links = []
    for text, identifier in sources.items():
        kind, _, number = identifier.partition(":")
        links.append(f"[{text}]({PAPERS[kind]}{number})")
    return ", ".join(links) or NONE


def log_density(record):
    density = record.get("density")
    return f"[{density['of']}][relaxit_jax.{density['name']}]" if density else NONE


def drawn(name, record):
    tau, sources = record.get("tau", "none"), record.get("sources", {})
    yield code(name), record["draws"], record["value"], tau, papers(sources)


def gradients(name, record):
    costs = record["calls"], record["work"]
    yield code(name), record["bias"], record["variance"], *costs
    if hard := record.get("hard"):
        yield "the same, `hard=True`", hard["bias"], hard["variance"], *costs


def densities(name, record):
    classes, related = record.get("classes", ()), record.get("related", ())
    if "density" in record or classes or related:
        yield code(name), log_density(record), code(*classes, module="distributions."), code(*related)


VIEWS = {
    "draws": (("method", "draws", "forward value", "role of tau", "source"), drawn),
    "gradients": (("method", "bias", "variance", "calls of f", "work"), gradients),
    "densities": (("method", "log-density", "NumPyro class", "related functions"), densities),
}


def methods(view):
    """For every family a link to its page, and a table of its methods with the columns of the view."""
    head, rows_of = VIEWS[view]
    families = dict.fromkeys(record["family"] for record in records().values())
    blocks = []
    for family in families:
        rows = [row for name, record in records(family).items() for row in rows_of(name, record)]
        if not rows:
            continue
        page = (ROOT / "docs" / "families" / f"{family}.md").read_text()
        title = re.match(r"# (.+)\n", page)[1]
        lines = [f"**[{title}](families/{family}.md)**", ""]
        lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def reference(names):
    return "\n\n".join(f"::: relaxit_jax.{name}\n    options: {{heading_level: 3}}" for name in names)


def samplers(family):
    """The samplers of a family with their densities and related functions."""
    names = []
    for name, record in records(family).items():
        own = [f"{name}_log_prob"] if record.get("density", {}).get("name") == f"{name}_log_prob" else []
        names += [name, *own, *record.get("related", ())]
    return reference(names)


def classes(family):
    """The NumPyro classes of a family."""
    names = [name for record in records(family).values() for name in record.get("classes", ())]
    return reference(f"distributions.{name}" for name in names)
