"""docs/methods.toml agrees with the package, its docstrings, the pages of the families and the benchmarks."""

import functools
import inspect
import pathlib
import re
import tomllib

import pytest

import relaxit_jax
from method_tables import methods
from relaxit_jax import distributions, estimators, samplers, structured
from rows import ROWS

ROOT = pathlib.Path(__file__).parents[1]
TABLE = tomllib.loads((ROOT / "docs" / "methods.toml").read_text())
SAMPLERS = {
    name for name in relaxit_jax.__all__
    if callable(f := getattr(relaxit_jax, name)) and next(iter(inspect.signature(f).parameters)) == "key"
}  # fmt: skip
REQUIRED = {"family", "draws", "value", "bias", "variance", "calls", "work"}
OPTIONAL = {"tau", "hard", "density", "classes", "related", "sources", "benchmarks"}
# Names that are not methods: a family of an estimator, and the training of a control variate.
HELPERS = {"Bernoulli", "LinearChain", "OneHotCategorical", "PlackettLuce", "SpanningTree", "Subset"}
HELPERS |= {"value_and_grads"}


def named(path):
    """The object in the package with a dotted name."""
    return functools.reduce(getattr, path.split("."), relaxit_jax)


def draws(function):
    return next(iter(inspect.signature(function).parameters)) == "key"


def all_of(field):
    return [name for record in TABLE.values() for name in record.get(field, ())]


def test_every_sampler_and_estimator_has_a_record():
    assert len(SAMPLERS) > 15 and {name for name in TABLE if "." not in name} == SAMPLERS
    prefix = "estimators."
    recorded = {name.removeprefix(prefix) for name in TABLE if name.startswith(prefix)}
    assert recorded == set(estimators.__all__) - HELPERS
    rest = {name for name in TABLE if "." in name and not name.startswith(prefix)}
    bounds = {"elbo.RLOO_ELBO", "elbo.VIMCO_ELBO"}
    drawn = {f"structured.{name}" for name in structured.__all__ if draws(getattr(structured, name))}
    assert rest == {"laplace_bridge.dirichlet_to_gaussian", "handlers.relax", *bounds, *drawn}


@pytest.mark.parametrize("name", TABLE)
def test_a_record_is_complete_and_names_what_exists(name):
    record = TABLE[name]
    assert callable(named(name))
    assert set(record) >= REQUIRED and set(record) <= REQUIRED | OPTIONAL
    assert all(callable(named(other)) for other in record.get("related", ()))
    assert all(hasattr(distributions, other) for other in record.get("classes", ()))
    if name in SAMPLERS:
        assert record["sources"] and "benchmarks" in record
    parameters = inspect.signature(named(name)).parameters
    if any(parameter.startswith("tau") for parameter in parameters):
        assert "tau" in record
    assert ("hard" in record) <= ("hard" in parameters)
    if name in SAMPLERS and "hard" in parameters:
        assert "`hard=" in record["value"], "the forward value does not say what hard= makes of it"
    assert max(len(record[field]) for field in REQUIRED) <= 90, "a cell is short"


@pytest.mark.parametrize("name", [name for name, record in TABLE.items() if record.get("sources")])
def test_sources_are_those_of_the_docstring(name):
    docstring = " ".join(named(name).__doc__.split())
    for text, identifier in TABLE[name]["sources"].items():
        kind, _, number = identifier.partition(":")
        assert re.fullmatch(
            {"arXiv": r"\d{4}\.\d{5}|1\d{3}\.\d{4}", "doi": r"10\.\d+/\S+", "openreview": r"\w{10,11}"}[kind],
            number,
        )
        assert identifier in docstring, identifier
        surname, year = re.split(r" (?:et al\. |and \w+ )?(?=\d)", text)
        assert surname in docstring and f"({year})" in docstring, text


def test_every_density_has_its_sampler():
    densities = {name: record["density"] for name, record in TABLE.items() if "density" in record}
    public = {name for name in relaxit_jax.__all__ if name.endswith("_log_prob")}
    public |= {f"structured.{name}" for name in structured.__all__ if name.endswith("_log_prob")}
    assert {density["name"] for density in densities.values()} == public
    for name in SAMPLERS:  # its own, where it has one
        own = f"{name}_log_prob"
        assert own not in public or densities[name]["name"] == own, name
    assert all(re.match(r"(density|mass)\b", density["of"]) for density in densities.values())


def test_every_name_is_in_one_record():
    assert sorted(all_of("classes")) == sorted(distributions.__all__)
    functions = set(samplers.__all__)
    here = lambda name: "." not in name or name.startswith("structured.")
    related = [name for name in all_of("related") if here(name)]
    others = {name for name in functions - SAMPLERS if not name.endswith("_log_prob")}
    sums = {name for name in structured.__all__ if name.endswith(("_partition", "_marginals"))}
    assert sorted(related) == sorted(others | {f"structured.{name}" for name in sums})


def test_every_row_of_the_benchmarks_is_in_one_record():
    assert sorted(all_of("benchmarks")) == sorted(ROWS)
    for name in SAMPLERS - {"stochastic_beam_search"}:  # which takes a model
        assert name in TABLE[name]["benchmarks"], name
        assert all(row.startswith(name) for row in TABLE[name]["benchmarks"])


@pytest.mark.parametrize("name", TABLE)
def test_the_page_of_its_family_has_a_section_on_it(name):
    page = (ROOT / "docs" / "families" / f"{TABLE[name]['family']}.md").read_text()
    short = name.rpartition(".")[2]
    headings = re.findall(r"^#{1,3} (.*)$", page, re.MULTILINE)
    assert any(re.search(rf"\b{short}\b", heading) for heading in headings)


@pytest.mark.parametrize("view", ["draws", "gradients", "densities"])
def test_a_view_has_every_method_once_and_at_most_five_columns(view):
    lines = [line for line in methods(view).splitlines() if line.startswith("|")]
    columns = {line.count(" | ") + 1 for line in lines}
    assert len(columns) == 1 and columns.pop() <= 5
    shown = re.findall(r"^\| \[`[\w.]+`\]\[relaxit_jax\.([\w.]+)\]", "\n".join(lines), re.MULTILINE)
    if view == "densities":
        assert set(shown) == {name for name in TABLE if {"density", "classes", "related"} & set(TABLE[name])}
    assert len(set(shown)) == len(shown) and (view == "densities" or shown == list(TABLE))


def test_views_say_what_the_records_say():
    draws, gradients, densities = map(methods, ("draws", "gradients", "densities"))
    head, row = (
        "| method | draws | forward value | role of tau | source |",
        "[`hard_concrete`][relaxit_jax.hard_concrete]",
    )
    assert head in draws and f"| {row} | {TABLE['hard_concrete']['draws']} |" in draws
    assert "[Louizos et al. 2018](https://arxiv.org/abs/1712.01312) |" in draws
    assert "(https://doi.org/10.1093/biomet/67.2.261)" in draws and "forum?id=oDFvtxzPOx)" in draws
    assert (
        gradients.count("| the same, `hard=True` |")
        == sum("hard" in record for record in TABLE.values())
        == 2
    )
    assert "[density with atoms][relaxit_jax.hard_concrete_log_prob]" in densities
    assert "[`HardConcrete`][relaxit_jax.distributions.HardConcrete]" in densities
    assert "**[Bits and gates](families/binary.md)**\n\n| method |" in draws
    with pytest.raises(KeyError, match="sauces"):
        methods("sauces")
