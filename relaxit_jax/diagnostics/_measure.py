"""Measurements behind a report."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics._report import NUMBERS, GradientReport
from relaxit_jax.estimators._estimate import Estimator, Law, Q, as_result, check

MOST_ENUMERATED = 2**14  # outcomes that "auto" sums over
LONG_RUN = 16  # draws for one estimate of the long run


def from_sampler(sampler: Callable[[Array, Array], Array]) -> Estimator[Law]:
    """Turn a relaxed or straight-through sampler into an estimator for `gradient_report`.

    ``estimator(key, f, q) = f(sampler(key, q.logits))``, with the gradient of the draw.

    Args:
      sampler: ``sampler(key, logits)`` to a sample of the shape of the logits, such as
        `relaxit_jax.reinmax`, or ``lambda key, logits: relaxed_bernoulli(key, logits, 0.5)``.

    Returns:
      A function ``(key, f, q)`` to values of shape ``q.batch_shape``.

    Raises:
      ValueError: when called, if the draws of ``sampler`` do not have the shape of the logits.

    References:
      Y. Bengio, N. Leonard, A. Courville (2013), Estimating or Propagating Gradients Through Stochastic
      Neurons for Conditional Computation, arXiv:1308.3432, for the first of these estimators.

    >>> import relaxit_jax as rj
    >>> q = rj.estimators.OneHotCategorical(jnp.zeros((2, 3)))
    >>> from_sampler(rj.reinmax)(jax.random.key(0), lambda z: jnp.sum(z**2), q)
    Array(2., dtype=float32)
    """

    arg.require(callable(sampler), "sampler", "a function (key, logits)", arg.shown(sampler))

    def estimator(key, f, q):
        check(q, kind=Law, f=f)
        sample = sampler(key, q.logits)
        shape = getattr(sample, "shape", None)
        got = f"a {type(sample).__name__}" if shape is None else f"shape {shape}"
        arg.require(shape == q.shape, "sampler", f"one of draws of shape {q.shape}", got)
        return f(sample)

    return estimator


def gradient_report(
    key: Array,
    f: Callable[..., ArrayLike],
    q: Q | Callable[[Any], Q],
    estimators: Mapping[str, Estimator[Q]],
    num_samples: int = 10_000,
    *,
    params: Any = None,
    batch_size: int = 100,
    reference: Literal["auto", "exact", "long_run"] = "auto",
    reference_samples: int | None = None,
) -> GradientReport:
    """Measure the bias, variance and cost of gradient estimators, in the logits or in params.

    With ``g_1 .. g_n`` gradients from one estimator and G the true one: bias ``mean g - G``, variance
    ``sum |g_i - mean g|^2 / (n - 1)``, mean squared error ``|bias|^2 + variance``. These are for single
    estimates: averaging m of them divides the variance by m and leaves the bias. G is the sum over all
    outcomes or, if there are many, a long run of `rloo` with 16 draws, whose own error is included in the
    error of the bias.

    No more than ``batch_size`` estimates are in memory at a time, whatever ``num_samples`` is. Each
    estimator is compiled once, and once more without its gradient, to count the calls of f. Batches of all
    estimators alternate, so anything that slows the machine slows them all.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``; differentiable, and defined
        between the outcomes, for estimators that need it. With ``params``, it is called as
        ``f(params, sample)``.
      q: `relaxit_jax.estimators.Bernoulli`, `OneHotCategorical`, `Subset` or `PlackettLuce`; with
        ``params``, a function from them to one of these.
      estimators: a dictionary, or another mapping, from names to ``estimator(key, f, q)``, which returns
        an array of shape ``q.batch_shape`` whose gradient in the logits, or in ``params``, is the
        estimate; samplers through `from_sampler`.
      num_samples: estimates from each estimator, a Python integer, 2 or more; rounded up to whole batches.
      params: a pytree of floating-point arrays that f and q depend on, such as the weights of networks. The
        report then covers the gradient in all of them, through the logits and through f, and has a report
        for each leaf in `GradientReport.leaves`.
      batch_size: estimates at once, a Python integer. This many gradients are in memory: choose a small one
        for large ``params``.
      reference: "exact", "long_run", or "auto", which is exact up to 2^14 outcomes.
      reference_samples: estimates in the long run, each of 16 calls; by default ``num_samples``.

    Returns:
      A `GradientReport`.

    Raises:
      ValueError: for an f as in `relaxit_jax.estimators.reinforce`, a q that is not a family of
        `relaxit_jax.estimators` (or, with ``params``, not a function to one), ``params`` that are not as
        above, an estimator whose values have another shape, a ``num_samples``, ``batch_size`` or
        ``reference_samples`` that is not an integer in range, an unknown ``reference``, or "exact" with too
        many outcomes for `relaxit_jax.estimators.exact`.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), arXiv:1611.00712, and G. Tucker et al. (2017),
      arXiv:1703.07370, who compare estimators so.

    >>> import relaxit_jax as rj
    >>> q = rj.estimators.OneHotCategorical(jnp.array([[0.0, 1.0, -1.0]]))
    >>> f = lambda z: jnp.sum(jnp.array([0.0, 1.0, 3.0]) * z) ** 2
    >>> methods = {"rloo": rj.estimators.rloo, "reinmax": from_sampler(rj.reinmax)}
    >>> report = gradient_report(jax.random.key(0), f, q, methods)
    >>> report.biased, report.calls, bool(report["reinmax"]["variance"] < report["rloo"]["variance"])
    (array([False, False]), array([2, 1]), True)

    With parameters of f and q, and the bias in each of them:

    >>> params = {"logits": jnp.zeros(3), "target": jnp.array(1.0)}
    >>> f = lambda params, b: jnp.sum((b - params["target"]) ** 2)
    >>> q = lambda params: rj.estimators.Bernoulli(params["logits"])
    >>> report = gradient_report(jax.random.key(0), f, q, {"rloo": rj.estimators.rloo}, params=params)
    >>> {name: (leaf.gradient.tolist(), leaf.biased.item()) for name, leaf in report.leaves.items()}
    {'logits': ([-0.25, -0.25, -0.25], False), 'target': (3.0, False)}
    """
    arg.check_key(key)
    point = _Point.of(f, q, params)
    good = isinstance(estimators, Mapping) and estimators and all(map(callable, estimators.values()))
    good = good and all(isinstance(name, str) for name in estimators)
    need = "a dictionary from names to functions (key, f, q)"
    arg.require(good, "estimators", need, arg.shown(estimators))
    for name, estimator in estimators.items():
        sampler = _sampler_in(estimator)
        need = (
            f"a function (key, f, q): write from_sampler({sampler}), with its options in a functools.partial"
        )
        arg.require(sampler is None, f"estimators[{name!r}]", need, f"the sampler {sampler}")
    n = arg.as_static_int("num_samples", num_samples, 2, 10**9)
    size = min(arg.as_static_int("batch_size", batch_size, 2, 10**6), n)
    batches = -(-n // size)
    n = batches * size
    key, reference_key = jax.random.split(key)
    samples = n if reference_samples is None else reference_samples
    truth, truth_error, words = _reference(reference_key, point, reference, samples, size)

    compiled, calls, totals, seconds = {}, {}, {}, {name: [] for name in estimators}
    for name, estimator in estimators.items():
        calls[name] = _count_calls(name, estimator, key, point)
        compiled[name] = _compile(name, estimator, key, point, truth, size)
    for index in range(batches):
        for name, moments in compiled.items():
            start = time.perf_counter()
            part = jax.block_until_ready(moments(point.leaves, jax.random.fold_in(key, index)))
            seconds[name].append(time.perf_counter() - start)
            totals[name] = _merge(totals.get(name), part, size)

    def report(place, leaves):
        """The report on the leaves of the group at this place."""
        group = point.groups[place]
        pick = lambda arrays: point.joined([arrays[leaf] for leaf in group])
        gradient, gradient_error = pick(truth), pick(truth_error)
        column = {field: [] for field in ("bias", "bias_error", *NUMBERS)}
        for name in estimators:
            count, means, squares = totals[name]
            bias, variance = pick(means["error"]), pick(squares["error"]) / (count - 1)
            noise = variance / count + gradient_error**2
            norm, noise_norm = np.linalg.norm(bias), math.sqrt(noise.sum())
            row = {
                "bias": bias,
                "bias_error": np.sqrt(noise),
                "bias_norm": norm,
                "bias_norm_error": noise_norm,
                "variance": variance.sum(),
                "mse": variance.sum()
                + max(norm**2 - noise_norm**2, 0),  # the norm contains the noise as well
                "mse_error": math.sqrt(squares["length"][place] / (count - 1) / count),
                "cosine": _cosine([gradient + bias], [gradient]),
                "mean_cosine": means["cosine"][place],
                "calls": calls[name],
                "seconds": np.median(seconds[name]) / size,
            }
            for field, value in row.items():
                column[field].append(value)
        column = {field: np.stack(values) for field, values in column.items()}
        return GradientReport(tuple(estimators), words, n, gradient, gradient_error, **column, leaves=leaves)

    return report(0, {name: report(1 + leaf, {}) for leaf, name in enumerate(point.names)})


@dataclasses.dataclass(frozen=True)
class _Point:
    """The place where a gradient is measured: its arrays, and f and q as functions of them.

    Statistics are for groups of leaves: the first group has all of them, then each named leaf has one.
    """

    leaves: tuple[Array, ...]
    bind: Callable[[Sequence[Array]], tuple[Any, Any]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, f, q, params):
        """A point in the logits of q, or in params."""
        if params is None:
            check(q, kind=Law, f=f)
            return cls((q.logits,), lambda leaves: (f, q.with_logits(leaves[0])), ())
        paths, tree = jax.tree_util.tree_flatten_with_path(params)
        arg.require(bool(paths), "params", "a pytree with an array at least", arg.shown(params))
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        if len({*names}) < len(names):  # some key contains a slash
            names = [jax.tree_util.keystr(path) for path, _ in paths]
        leaves = [arg.as_array("params", x) for _, x in paths]
        for name, leaf in zip(names, leaves, strict=True):
            got = f"dtype {leaf.dtype}" + f" in {name}" * bool(name)
            arg.require(arg.is_float(leaf.dtype), "params", "floating point in all of its arrays", got)
        given = "a function of params that returns a family, as params is given"
        arg.require(callable(q), "q", given, arg.shown(q))
        arg.require(_takes(f, 2), "f", "a function of params and a sample, as params is given", arg.shown(f))
        bind = lambda leaves: (
            functools.partial(f, jax.tree.unflatten(tree, leaves)),
            q(jax.tree.unflatten(tree, leaves)),
        )
        family = bind(leaves)[1]
        arg.require(isinstance(family, Law), "q", given, f"one that returns {arg.shown(family)}")
        return cls(tuple(leaves), bind, tuple(names) if paths[0][0] else ())  # a single array has no name

    @property
    def groups(self):
        every = range(len(self.leaves))
        return [tuple(every), *((leaf,) for leaf in every[: len(self.names)])]

    def joined(self, arrays):
        """Leaves as one array: flat and one after the other, unless there is only one."""
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.ravel(x) for x in arrays])


def _takes(f, count):
    """Whether a function can be called with this many arguments, as far as Python knows."""
    try:
        inspect.signature(f).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it has no signature, like some functions written in C
        return callable(f)
    return True


def _sampler_in(function):
    """The name of a sampler of this library, also inside a `functools.partial`; None for anything else."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", "")
    is_sampler = getattr(function, "__module__", "").startswith("relaxit_jax.samplers.")
    return name if is_sampler else None


def _reference(key, point, reference, samples, size):
    """The true gradient, its standard error, and a description of it in words."""
    arg.require_choice("reference", reference, ("auto", "exact", "long_run"))
    samples = arg.as_static_int("reference_samples", samples, 2, 10**9)
    outcomes = point.bind(point.leaves)[1].outcomes()[0]
    if reference == "exact" or (reference == "auto" and outcomes <= MOST_ENUMERATED):
        slope = jax.jit(jax.grad(lambda leaves: jnp.sum(es.exact(*point.bind(leaves)))))
        truth = [np.asarray(x, float) for x in slope(point.leaves)]
        return truth, [np.zeros_like(x) for x in truth], f"exact, the sum over {outcomes} outcomes"
    estimator = lambda key, f, q: es.rloo(key, f, q, num_samples=LONG_RUN)
    size = min(size, samples)
    zeros = [np.zeros(x.shape) for x in point.leaves]
    moments = _compile("long_run", estimator, key, point, zeros, size)
    total: Any = None
    for index in range(-(-samples // size)):
        total = _merge(total, moments(point.leaves, jax.random.fold_in(key, index)), size)
    count, means, squares = total
    error = [np.sqrt(x / (count - 1) / count) for x in squares["error"]]
    return means["error"], error, f"a long run, {count} estimates by rloo of {LONG_RUN} draws"


def _estimate(name, estimator, key, f, q):
    """The checked return value of a user's estimator."""
    which, need = f"estimators[{name!r}]", f"a function to the batch shape {q.batch_shape} of q"
    value = as_result(which, estimator(key, f, q))
    arg.require(value.shape == q.batch_shape, which, need, f"shape {value.shape}")
    return value


def _compile(name, estimator, key, point, truth, size):
    """A compiled function of leaves and key: means over a batch, and sums of squares about them."""
    truth = [jnp.asarray(x, arg.wide(leaf.dtype)) for x, leaf in zip(truth, point.leaves, strict=True)]

    def total(leaves, key):
        return jnp.sum(_estimate(name, estimator, key, *point.bind(leaves)))

    def lengths(errors):
        return sum(jnp.sum(error**2) for error in errors)

    def cosine(errors, truth):
        found = _cosine([x + error for x, error in zip(truth, errors, strict=True)], truth, jnp)
        return jnp.where(jnp.isnan(found), 0, found)

    def moments(leaves, key):
        keys = jax.random.split(key, size)
        # the values are not used, but training computes them, so they belong to the time
        values, gradients = jax.vmap(jax.value_and_grad(total), (None, 0))(leaves, keys)
        errors = [g.astype(x.dtype) - x for g, x in zip(gradients, truth, strict=True)]
        groups = [([errors[i] for i in group], [truth[i] for i in group]) for group in point.groups]
        each = {
            "value": values,
            "error": errors,
            "length": [jax.vmap(lengths)(some) for some, _ in groups],
            "cosine": [jax.vmap(cosine, (0, None))(*both) for both in groups],
        }
        means = jax.tree.map(lambda x: jnp.mean(x, 0), each)
        return means, jax.tree.map(lambda x, mean: jnp.sum((x - mean) ** 2, 0), each, means)

    return jax.jit(moments).lower(point.leaves, key).compile()


def _merge(total, part, size):
    """Merge the counts, means and sums of squares of two batches, in float64."""
    means, squares = jax.tree.map(lambda x: np.asarray(x, float), part)
    if total is None:
        return size, means, squares
    n, old_means, old_squares = total
    gaps = jax.tree.map(np.subtract, means, old_means)
    means = jax.tree.map(lambda old, gap: old + gap * size / (n + size), old_means, gaps)
    merged = lambda old, new, gap: old + new + gap**2 * n * size / (n + size)
    return n + size, means, jax.tree.map(merged, old_squares, squares, gaps)


def _cosine(xs, ys, np=np):
    """The cosine between two vectors, each given as a list of arrays."""
    dot = lambda xs, ys: sum(np.sum(x * y) for x, y in zip(xs, ys, strict=True))
    lengths = np.sqrt(dot(xs, xs) * dot(ys, ys))
    return np.where(lengths > 0, dot(xs, ys) / np.where(lengths > 0, lengths, 1), np.nan)


def _count_calls(name, estimator, key, point):
    """How often f is evaluated for one estimate: counted as it runs, so under vmap and scan as well."""
    seen = []
    f, q = point.bind(point.leaves)

    def counted(b):
        # an operand of b, so that a vmapped call counts once for each element of its axis
        jax.debug.callback(lambda _: seen.append(None), b.reshape(-1)[0])
        return f(b)

    jax.block_until_ready(jax.jit(lambda key: _estimate(name, estimator, key, counted, q))(key))
    jax.effects_barrier()
    return len(seen)
