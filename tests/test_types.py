"""Every public signature has the kinds of its arguments and results; shapes are in docstrings."""

import inspect
import re
import typing

import pytest

import relaxit_jax
import typed_user
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

MODULES = (relaxit_jax, estimators, quantizers, diagnostics, distributions, handlers, elbo, structured)


def public():
    """The functions and, for classes, the methods that this library defines, by name."""
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                for kind in thing.__mro__:
                    if kind.__module__.startswith("relaxit_jax."):
                        yield from methods(kind)
            elif callable(thing):
                yield f"{thing.__module__}.{name}", thing
    for name, f in inspect.getmembers(laplace_bridge, inspect.isfunction):
        if f.__module__ == laplace_bridge.__name__ and not name.startswith("_"):
            yield f"{f.__module__}.{name}", f


def methods(kind):
    for name, method in vars(kind).items():
        function = getattr(method, "fget", None) or getattr(method, "__func__", method)
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            yield f"{kind.__module__}.{kind.__name__}.{name}", inspect.unwrap(function)


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_are_annotated(name):
    hints = typing.get_type_hints(PUBLIC[name])  # evaluated, so that they are true when the code runs
    wanted = [x for x in inspect.signature(PUBLIC[name]).parameters if x not in ("self", "cls")]
    assert [x for x in (*wanted, "return") if x not in hints] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_help_shows_names_of_types(name):
    """`ArrayLike`, not the nine types that it stands for."""
    shown = str(inspect.signature(PUBLIC[name]))
    assert not re.search(r"Union\[|jaxlib|numpy\.", shown), shown


def test_all_modules_are_looked_at():
    assert {name.split(".")[1] for name in PUBLIC} == {
        "samplers", "estimators", "quantizers", "structured", "diagnostics", "distributions", "handlers",
        "elbo", "laplace_bridge", "_gradients", "_fused",
    }  # fmt: skip
    assert "relaxit_jax.distributions._sampler_distribution.SamplerDistribution.log_prob" in PUBLIC


@pytest.mark.whole
@pytest.mark.usefixtures("fast_compilation")
def test_what_the_checker_reads_also_runs(capsys):
    typed_user.main()
    assert "rloo" in capsys.readouterr().out
