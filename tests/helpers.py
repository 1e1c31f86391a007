"""Shared parts of several test modules: keys and thresholds, statistics, selections of cases."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st

from cases import DISTRIBUTIONS
from relaxit_jax import distributions as rd

KEY = jax.random.key(20261122)
P_VALUE = 1e-4
rows = functools.partial(pytest.mark.parametrize, "case", ids=str)
whole, few = pytest.mark.whole, pytest.mark.few
halves = [pytest.param(dtype, marks=whole) for dtype in (jnp.bfloat16, jnp.float16)]
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, *halves])
# for laws that do not depend on the last digits, with small arrays: compiling takes all of their time
quick = pytest.mark.usefixtures("fast_compilation")
as_users = pytest.mark.usefixtures("as_users_compile")


def cast(case, dtype):
    """The entry with its parameters, but not its temperatures, in another dtype."""
    kept = {*case.temperatures, "k", "num_samples", "num_iters", "delta", "gap"}
    params = {n: x if n in kept else jnp.asarray(x, dtype) for n, x in case.params.items()}
    return dataclasses.replace(case, params=params)


def seen(case):
    """The parameters as the sampler sees them after rounding, in float64."""
    params = {n: x if isinstance(x, int) else np.asarray(x, np.float64) for n, x in case.params.items()}
    return dataclasses.replace(case, params=params)


def chi_square(outcomes, probabilities):
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    probabilities = np.asarray(probabilities, np.float64)
    expected = probabilities / probabilities.sum() * len(outcomes)
    assert expected.min() > 5
    return st.chisquare(np.bincount(outcomes, minlength=len(expected)), expected).pvalue


def is_nan(x):
    """For every element of a batch, whether one of its numbers is NaN."""
    x = np.asarray(x)
    return np.isnan(x.reshape(*x.shape[:2], -1)).any(-1)


def spoiled(case, name, bad):
    """The arguments, with a bad number in one of them, in the first element of the batch."""
    params = {n: np.array(x, np.float32) for n, x in case.batched.items()}
    params[name][(0,) * params[name].ndim] = bad
    return params


class_rows = lambda *conditions: pytest.mark.parametrize(
    "case", [case for case in DISTRIBUTIONS if all(holds(case) for holds in conditions)], ids=str
)
# laws with a fixed list of values, and with everything that can be summed over it
DISCRETE = {
    case.distribution for case in DISTRIBUTIONS
    if issubclass(case.distribution, (rd.OneHotCategorical, rd.StraightThroughBernoulli))
}  # fmt: skip


def has_law(case):
    """Soft numbers, soft subsets and permutations have no density in closed form."""
    return case.support not in ("number", "k_hot_soft", "doubly", "permutation_soft")


def has_moments(case):
    return (case.moments or case.distribution in DISCRETE) and has_law(case)


def arrays(case):
    return {name: jnp.asarray(x) for name, x in case.floats.items()}


def outcomes(case):
    """The values of a discrete law, shape (outcomes, 2, *event), and their probabilities."""
    law = np.stack([case.discrete(**case.element(i)) for i in range(2)], 1)
    if case.support == "atoms":
        root = np.sqrt(sp.expit(case.params["logits"]))
        return np.stack([0 * root, root]), law
    if "values" in case.params:
        return case.params["values"].T, law
    if not case.event:
        return np.float32([[0, 0], [1, 1]]), law
    if case.support == "permutation":
        matrices = np.eye(case.event[0])[list(itertools.permutations(range(case.event[0])))]
        return np.repeat(np.float32(matrices)[:, None], 2, 1), law
    n, k = case.event[0], case.params.get("k", 1)
    hot = [np.isin(np.arange(n), subset) for subset in itertools.combinations(range(n), k)]
    return np.repeat(np.float32(hot)[:, None], 2, 1), law
