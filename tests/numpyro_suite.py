"""NumPyro's own tests of a distribution, run over the classes of relaxit_jax.distributions.

`python -m pytest` does not collect this file: it needs NumPyro's source of the installed version, in
the folder that NUMPYRO_SOURCE names. `nox --session numpyro_tests` downloads it and runs this file.
"""

import functools
import importlib.util
import inspect
import os
import pathlib
import re

import numpy as np
import pytest
from numpyro.distributions import constraints

from cases import DISTRIBUTIONS
from relaxit_jax.distributions import _constraints as ct

if "NUMPYRO_SOURCE" not in os.environ:
    pytest.skip("NUMPYRO_SOURCE names no source of NumPyro", allow_module_level=True)
SOURCE = pathlib.Path(os.environ["NUMPYRO_SOURCE"], "test", "test_distributions.py")


def load():
    """NumPyro's module of tests, extended to draw from and look at this library's constraints."""
    spec = importlib.util.spec_from_file_location("numpyros_test_distributions", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    alike = [
        (ct.log_odds, constraints.real),
        (ct.log_weights, constraints.real_vector),
        (ct.simplex, constraints.simplex),
    ]

    def knows(generate, hot):
        def knowing(constraint, size, key=None):
            constraint = getattr(constraint, "hull", constraint)  # of Draws
            if constraint is ct.one_hot:
                return np.broadcast_to(hot * (np.arange(size[-1]) == 0), size).astype(np.float32)
            same = [theirs for own, theirs in alike if own is constraint]
            return generate(*same or [constraint], size, key)

        return knowing

    module.gen_values_within_bounds = knows(module.gen_values_within_bounds, 1)
    module.gen_values_outside_bounds = knows(module.gen_values_outside_bounds, 2)
    return module


def positional(case):
    """The class of a case, as NumPyro's tests build one: parameters by position, with options set."""

    def __init__(self, *args, **kwargs):
        given = __init__.__signature__.bind(self, *args, **kwargs).arguments
        given.pop("self")
        case.distribution.__init__(self, **given, **case.integers, **case.options)

    kind = inspect.Parameter
    parameters = [
        kind("self", kind.POSITIONAL_OR_KEYWORD),
        *(kind(name, kind.POSITIONAL_OR_KEYWORD) for name in case.distribution.arg_constraints),
        kind("validate_args", kind.KEYWORD_ONLY, default=None),
    ]
    __init__.__signature__ = inspect.Signature(parameters)
    return type(case.distribution)(case.distribution.__name__, (case.distribution,), {"__init__": __init__})


def given(case):
    """The entries of NumPyro's table for a case: for one element, and for a batch."""
    cls = positional(case)
    for shape, params in (("one", case.element(0)), ("batch", case.params)):
        arguments = tuple(params.get(name) for name in cls.arg_constraints)  # None where not given
        yield pytest.param(cls, None, arguments, id=f"{case}-{shape}")


def as_numpyros(case):
    """A draw has the gradient of its own value, so that finite differences agree with it."""
    return case.outcome is None


def without_atoms(case):
    """cdf and icdf are inverse to each other."""
    return as_numpyros(case) and case.support != "gate"


def smooth_in_its_parameters(case):
    """An exact number of a list has no mass once all numbers of the list are shifted."""
    return case.support != "exact_number"


# What a test takes for granted. NumPyro runs the first two over its continuous distributions only.
HOLDS = {
    "test_sample_gradient": as_numpyros,
    "test_cdf_and_icdf": without_atoms,
    "test_log_prob_gradient": smooth_in_its_parameters,
}
module = load()


def ours(name, test):
    """The same test, over these classes; classes without a density are tested up to where it needs one."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        try:
            test(*args, **kwargs)
        except (NotImplementedError, pytest.fail.Exception) as error:
            # pytest.warns fails with "did not warn" while it handles the error itself
            lack = error if isinstance(error, NotImplementedError) else error.__context__
            if not re.search("no density|no closed form", str(lack)):
                raise
            pytest.skip(str(lack))

    applies = HOLDS.get(name, lambda case: True)
    rows = [row for case in DISTRIBUTIONS if applies(case) for row in given(case)]
    run.pytestmark = [
        pytest.mark.parametrize(mark.args[0], rows).mark if over_classes(mark) else mark
        for mark in test.pytestmark
    ]
    return run


def over_classes(mark):
    return mark.name == "parametrize" and mark.args and "sp_dist" in mark.args[0]


for name, test in vars(module).items():
    if name.startswith("test_") and any(map(over_classes, getattr(test, "pytestmark", []))):
        globals()[name] = ours(name, test)
