"""How the numbers of a report are measured."""

import functools
import math
import time
from collections.abc import Callable, Mapping
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
LONG_RUN = 16  # draws of one estimate of the long run


def from_sampler(sampler: Callable[[Array, Array], Array]) -> Estimator[Law]:
    """A relaxed or straight-through sampler, as an estimator that `gradient_report` takes.

    ``estimator(key, f, q) = f(sampler(key, q.logits))``, with the gradient that the draw has.

    Args:
      sampler: ``sampler(key, logits)`` to a sample of the shape of the logits, such as
        `relaxit_jax.reinmax`, or ``lambda key, logits: relaxed_bernoulli(key, logits, 0.5)``.

    Returns:
      A function ``(key, f, q)`` to values of shape ``q.batch_shape``.

    Raises:
      ValueError: when called, for a ``sampler`` whose draws have another shape than the logits.

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
    f: Callable[[Array], ArrayLike],
    q: Q,
    estimators: Mapping[str, Estimator[Q]],
    num_samples: int = 10_000,
    *,
    batch_size: int = 100,
    reference: Literal["auto", "exact", "long_run"] = "auto",
    reference_samples: int | None = None,
) -> GradientReport:
    """Measure how well, and at what cost, estimators know the gradient of E f(b) in the logits of q.

    With ``g_1 .. g_n`` gradients of one estimator and G the true one: bias ``mean g - G``, variance
    ``sum |g_i - mean g|^2 / (n - 1)``, mean squared error ``|bias|^2 + variance``. Of single estimates:
    averaging m of them divides the variance by m, and leaves the bias. G is the sum over all outcomes or,
    where they are many, a long run of `rloo` with 16 draws, whose own error is in that of the bias.

    No more than ``batch_size`` estimates are in memory at a time, whatever ``num_samples``. Each
    estimator is compiled once, and once more, without its gradient, to count the calls of f. Batches of
    all estimators take turns, so that what slows the machine slows all.

    Args:
      key: a JAX random key.
      f: from a sample of shape ``q.shape`` to values of shape ``q.batch_shape``; differentiable, and
        defined between the outcomes, for estimators that ask for it. Gradients of its own parameters
        are not compared.
      q: `relaxit_jax.estimators.Bernoulli`, `OneHotCategorical`, `Subset` or `PlackettLuce`.
      estimators: a dictionary, or another mapping, from names to ``estimator(key, f, q)``, which returns
        an array of shape ``q.batch_shape`` whose gradient in the logits is the estimate; samplers through
        `from_sampler`.
      num_samples: estimates of each, a Python integer, 2 or more; rounded up to whole batches.
      batch_size: estimates at once, a Python integer.
      reference: "exact", "long_run", or "auto" for the first where there are at most 2^14 outcomes.
      reference_samples: estimates of the long run, by default as many as of the others, each of 16 calls.

    Returns:
      A `GradientReport`.

    Raises:
      ValueError: for an f as in `relaxit_jax.estimators.reinforce`, a q that is not a family of
        `relaxit_jax.estimators`, an estimator whose values have another shape, a ``num_samples``,
        ``batch_size`` or ``reference_samples`` that is not an integer in range, an unknown
        ``reference``, or "exact" with too many outcomes for `relaxit_jax.estimators.exact`.

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
    """
    arg.check_key(key)
    check(q, kind=Law, f=f)
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
    truth, truth_error, words = _reference(reference_key, f, q, reference, samples, size)

    compiled, calls, totals, seconds = {}, {}, {}, {name: [] for name in estimators}
    for name, estimator in estimators.items():
        calls[name] = _count_calls(name, estimator, key, f, q)
        compiled[name] = _compile(name, estimator, key, f, q, truth, size)
    for index in range(batches):
        for name, moments in compiled.items():
            start = time.perf_counter()
            part = jax.block_until_ready(moments(q.logits, jax.random.fold_in(key, index)))
            seconds[name].append(time.perf_counter() - start)
            totals[name] = _merge(totals.get(name), part, size)

    column = {field: [] for field in ("bias", "bias_error", *NUMBERS)}
    for name in estimators:
        count, means, squares = totals[name]
        bias, variance = means["error"], squares["error"] / (count - 1)
        noise = variance / count + truth_error**2
        norm, noise_norm = np.linalg.norm(bias), math.sqrt(noise.sum())
        row = {
            "bias": bias,
            "bias_error": np.sqrt(noise),
            "bias_norm": norm,
            "bias_norm_error": noise_norm,
            "variance": variance.sum(),
            "mse": variance.sum() + max(norm**2 - noise_norm**2, 0),  # the noise is in the norm as well
            "mse_error": math.sqrt(squares["length"] / (count - 1) / count),
            "cosine": _cosine(truth + bias, truth),
            "mean_cosine": means["cosine"],
            "calls": calls[name],
            "seconds": np.median(seconds[name]) / size,
        }
        for field, value in row.items():
            column[field].append(value)
    column = {field: np.stack(values) for field, values in column.items()}
    return GradientReport(tuple(estimators), words, n, truth, truth_error, **column)


def _sampler_in(function):
    """The name of a sampler of this library, also inside of a `functools.partial`; None of anything else."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", "")
    is_sampler = getattr(function, "__module__", "").startswith("relaxit_jax.samplers.")
    return name if is_sampler else None


def _reference(key, f, q, reference, samples, size):
    """The true gradient, its standard error, and what it is in words."""
    arg.require_choice("reference", reference, ("auto", "exact", "long_run"))
    samples = arg.as_static_int("reference_samples", samples, 2, 10**9)
    outcomes = q.outcomes()[0]
    if reference == "exact" or (reference == "auto" and outcomes <= MOST_ENUMERATED):
        slope = jax.jit(jax.grad(lambda logits: jnp.sum(es.exact(f, q.with_logits(logits)))))
        truth = np.asarray(slope(q.logits), float)
        return truth, np.zeros_like(truth), f"exact, the sum over {outcomes} outcomes"
    estimator = lambda key, f, q: es.rloo(key, f, q, num_samples=LONG_RUN)
    size = min(size, samples)
    moments = _compile("long_run", estimator, key, f, q, np.zeros(q.shape), size)
    total: Any = None
    for index in range(-(-samples // size)):
        total = _merge(total, moments(q.logits, jax.random.fold_in(key, index)), size)
    count, means, squares = total
    error = np.sqrt(squares["error"] / (count - 1) / count)
    return means["error"], error, f"a long run, {count} estimates by rloo of {LONG_RUN} draws"


def _estimate(name, estimator, key, f, q):
    """What an estimator of the user's returns, checked."""
    which, need = f"estimators[{name!r}]", f"a function to the batch shape {q.batch_shape} of q"
    value = as_result(which, estimator(key, f, q))
    arg.require(value.shape == q.batch_shape, which, need, f"shape {value.shape}")
    return value


def _compile(name, estimator, key, f, q, truth, size):
    """A compiled function of logits and key: means of a batch, and sums of squares about them."""
    truth = jnp.asarray(truth, arg.wide(q.logits.dtype))

    def total(logits, key):
        return jnp.sum(_estimate(name, estimator, key, f, q.with_logits(logits)))

    def moments(logits, key):
        keys = jax.random.split(key, size)
        # the values are not looked at, but who trains computes them: they belong to the time
        values, gradients = jax.vmap(jax.value_and_grad(total), (None, 0))(logits, keys)
        errors = gradients.astype(truth.dtype) - truth
        axes = tuple(range(1, errors.ndim))
        lengths = jnp.sum(errors**2, axes)
        cosines = jax.vmap(lambda error: _cosine(truth + error, truth, jnp))(errors)
        cosines = jnp.where(jnp.isnan(cosines), 0, cosines)
        each = {"value": values, "error": errors, "length": lengths, "cosine": cosines}
        means = {field: jnp.mean(x, 0) for field, x in each.items()}
        return means, {field: jnp.sum((x - means[field]) ** 2, 0) for field, x in each.items()}

    return jax.jit(moments).lower(q.logits, key).compile()


def _merge(total, part, size):
    """How many, their means and sums of squares about them, with those of another batch; in float64."""
    means, squares = jax.tree.map(lambda x: np.asarray(x, float), part)
    if total is None:
        return size, means, squares
    n, old_means, old_squares = total
    for field, mean in means.items():
        gap = mean - old_means[field]
        means[field] = old_means[field] + gap * size / (n + size)
        squares[field] = old_squares[field] + squares[field] + gap**2 * n * size / (n + size)
    return n + size, means, squares


def _cosine(x, y, np=np):
    lengths = np.sqrt(np.sum(x**2) * np.sum(y**2))
    return np.where(lengths > 0, np.sum(x * y) / np.where(lengths > 0, lengths, 1), np.nan)


def _count_calls(name, estimator, key, f, q):
    """How often f is evaluated for one estimate: counted as it runs, so under vmap and scan as well."""
    seen = []

    def counted(b):
        # an operand of b, so that a vmapped call counts once for each element of its axis
        jax.debug.callback(lambda _: seen.append(None), b.reshape(-1)[0])
        return f(b)

    jax.block_until_ready(jax.jit(lambda key: _estimate(name, estimator, key, counted, q))(key))
    jax.effects_barrier()
    return len(seen)
