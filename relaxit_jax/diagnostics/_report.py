"""The report on a measurement: its numbers, its table and its picture."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from relaxit_jax import _arguments as arg

ROUNDING = 1e-5  # float32, in units of the gradient
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B")
NUMBERS = ("bias_norm", "bias_norm_error", "variance", "mse", "mse_error")
NUMBERS += ("cosine", "mean_cosine", "calls", "seconds")


@dataclasses.dataclass(frozen=True, eq=False)
class GradientReport:
    """Bias, variance and cost of several estimators of one gradient, as measured by `gradient_report`.

    With ``g`` an estimate of the true gradient ``G``: ``mse = E |g - G|^2 = |E g - G|^2 + variance``, where
    ``variance`` is the sum of the variances of all coordinates. All arrays are NumPy arrays; an array of E
    numbers has one for each of the E estimators. ``report["rloo"]`` returns the numbers of one estimator, and
    ``str(report)`` is a table.

    Args:
      names: the names of the E estimators.
      reference: a description of G in words.
      num_samples: estimates drawn from each.
      gradient: G, in the shape of the logits; with ``params``, all leaves in one flat array, or the only
        leaf.
      gradient_error: its standard error, 0 if it is exact, of the same shape.
      bias: ``mean g - G``, of shape (E, *gradient.shape).
      bias_error: its standard error, including the error of G, of the same shape.
      bias_norm: ``|mean g - G|``, E numbers.
      bias_norm_error: the root mean square of that norm if there is no bias at all; if there is one, the
        standard error of the norm is at most this.
      variance: of one estimate, summed over all coordinates, E numbers.
      mse: E numbers; its squared bias excludes the part due to noise, and is at least 0.
      mse_error: its standard error, not including the error of G.
      cosine: cosine of the angle between mean g and G, E numbers; NaN if one of them is 0.
      mean_cosine: mean cosine of single estimates, where an estimate of 0 counts as 0.
      calls: calls of f for one estimate, E integers. One call covers a whole batch of q; a gradient of f does
        not count.
      seconds: time for one estimate, forward and backward: the median over compiled batches, divided by their
        size.
      leaves: with ``params``, a dictionary from the name of each leaf, such as "encoder/kernel", to a report
        on the coordinates of that leaf alone, in its shape; ``calls`` and ``seconds`` are for the whole.

    Raises:
      ValueError: from `plot`, for an unknown ``cost``.

    References:
      T. van Krieken, J. Tomczak, A. ten Teije (2021), Storchastic: A Framework for General Stochastic
      Automatic Differentiation, arXiv:2104.00428, for the estimators and what distinguishes them.

    >>> from relaxit_jax.diagnostics import gradient_report
    >>> from relaxit_jax.estimators import Bernoulli, rloo
    >>> q = Bernoulli(jnp.zeros(2))
    >>> report = gradient_report(jax.random.key(0), lambda b: (b.sum(-1) - 2) ** 2, q, {"rloo": rloo}, 1000)
    >>> report["rloo"]["calls"], report.gradient.round(2)
    (2, array([-0.5, -0.5]))
    """

    names: tuple[str, ...]
    reference: str
    num_samples: int
    gradient: NDArray[np.floating]
    gradient_error: NDArray[np.floating]
    bias: NDArray[np.floating]
    bias_error: NDArray[np.floating]
    bias_norm: NDArray[np.floating]
    bias_norm_error: NDArray[np.floating]
    variance: NDArray[np.floating]
    mse: NDArray[np.floating]
    mse_error: NDArray[np.floating]
    cosine: NDArray[np.floating]
    mean_cosine: NDArray[np.floating]
    calls: NDArray[np.integer]
    seconds: NDArray[np.floating]
    leaves: Mapping[str, GradientReport] = dataclasses.field(default_factory=dict)

    @property
    def biased(self) -> NDArray[np.bool_]:
        """Whether the norm of the bias exceeds what noise alone reaches once in a thousand reports.

        No single coordinate is tested: a bit that is on once in a million shows no spread.
        """
        squares = self.bias_error.reshape(len(self.names), -1) ** 2
        total = np.maximum(squares.sum(1), np.finfo(float).tiny)
        # nearly chi-squared (Satterthwaite 1946), whose third root is nearly normal (Wilson, Hilferty 1931)
        spread = 2 / 9 * np.sum((squares / total[:, None]) ** 2, 1)
        limit = np.sqrt(total * (1 - spread + 3.09 * np.sqrt(spread)) ** 3)
        return self.bias_norm > limit + ROUNDING * np.linalg.norm(self.gradient)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Whether all estimates of an estimator were finite. If one is not, its averages are not either."""
        return np.isfinite(self.bias_norm) & np.isfinite(self.variance)

    def __getitem__(self, name: str) -> dict[str, float]:
        """Return the numbers of one estimator."""
        arg.require_choice("name", name, self.names)
        row = self.names.index(name)
        numbers: dict[str, float] = {field: getattr(self, field)[row].item() for field in NUMBERS}
        numbers["biased"] = bool(self.biased[row])
        return numbers

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for `json.dumps`, without arrays of coordinates; undefined cosines are None."""
        rows: dict[str, dict[str, Any]] = {name: {**self[name]} for name in self.names}
        for row in rows.values():
            row.update({k: None for k, x in row.items() if isinstance(x, float) and not math.isfinite(x)})
        norms = [float(np.linalg.norm(x)) for x in (self.gradient, self.gradient_error)]
        leaves = {name: leaf.as_dict() for name, leaf in self.leaves.items()}
        return {
            "reference": self.reference,
            "num_samples": self.num_samples,
            "gradient_norm": norms[0],
            "gradient_norm_error": norms[1],
            "estimators": rows,
        } | ({"leaves": leaves} if leaves else {})

    def __str__(self) -> str:
        width = max(map(len, (*self.names, "estimator")))
        head = f"{'estimator':{width}} {'bias':>8} {'(noise)':>8} {'':6} {'variance':>8}"
        size, norm = self.gradient.size, np.linalg.norm(self.gradient)
        lines = [
            f"true gradient: {self.reference}; {size} coordinates, of norm {norm:.4g}",
            f"{self.num_samples} estimates by each estimator",
            head + f" {'cosine':>6} {'of one':>6} {'calls':>5} {'time':>9}",
        ]
        for name, line in self._lines(width):
            row = self[name]
            lines.append(f"{line} {row['calls']:5d} {row['seconds'] * 1e6:6.1f} us")
        for leaf, report in self.leaves.items():
            size, norm = report.gradient.size, np.linalg.norm(report.gradient)
            lines.append(f"in {leaf}: {size} coordinate{'s' * (size > 1)}, of norm {norm:.4g}")
            lines += [line for _, line in report._lines(width)]
        bad = [name for name, good in zip(self.names, self.finite, strict=True) if not good]
        if bad:
            lines.append(f"no numbers, because some estimates are not finite: {', '.join(bad)}")
        return "\n".join(lines)

    def _lines(self, width):
        """Each name, and the part of its line in the table that does not depend on the cost."""
        for name, good in zip(self.names, self.finite, strict=True):
            row = self[name]
            seen = "biased" if good and row["biased"] else "" if good else "NaN"
            yield (
                name,
                f"{name:{width}} {row['bias_norm']:8.3g} {row['bias_norm_error']:8.3g} {seen:6} "
                f"{row['variance']:8.3g} {row['cosine']:6.3f} {row['mean_cosine']:6.3f}",
            )

    def plot(
        self,
        where: str | os.PathLike[str] | Any,  # Any: axes of Matplotlib, which is not a dependency
        *,
        cost: Literal["calls", "seconds"] = "calls",
    ) -> None:
        """Plot the error that is left when estimates are averaged, against their total cost.

        Each line starts at one estimate. It falls as the square root of the cost, and toward its bias if one
        is seen. Use the estimator with the lowest line at the cost that you pay for a step.

        Args:
          where: the path of a picture, or axes of matplotlib.
          cost: "calls" of f, or "seconds".
        """
        arg.require_choice("cost", cost, ("calls", "seconds"))
        if hasattr(where, "plot"):
            _draw(self, where, cost)
            return
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plot needs matplotlib, which is in an extra: pip install 'relaxit_jax[examples]'"
            ) from error
        file: Any = where
        is_file = isinstance(where, (str, os.PathLike)) or hasattr(where, "write")
        arg.require(is_file, "where", "a path, a file or axes of matplotlib", arg.shown(where))
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _draw(self, figure.subplots(), cost)
        figure.savefig(file, dpi=120)


def recommend(report: GradientReport, *, calls: int) -> str:
    """Say in a sentence which estimator of a report to use, given how often f may be called.

    It averages as many estimates as the calls allow, and picks the estimator whose mean has the smallest
    squared error, ``|bias|^2 + variance / (calls // calls of one estimate)``.

    Args:
      report: the result of `gradient_report`.
      calls: how many calls of f one gradient may take, a Python integer, 1 or more.

    Returns:
      A sentence with the name, its error in units of the gradient, and the next best.

    Raises:
      ValueError: for arguments that are not as above, a report without a finite estimator, or fewer ``calls``
        than any finite estimator needs.

    References:
      T. van Krieken, J. Tomczak, A. ten Teije (2021), Storchastic, arXiv:2104.00428.

    >>> import relaxit_jax as rj
    >>> from relaxit_jax.diagnostics import gradient_report
    >>> q = rj.estimators.Bernoulli(jnp.zeros(2))
    >>> methods = {"rloo": rj.estimators.rloo, "reinforce": rj.estimators.reinforce}
    >>> report = gradient_report(jax.random.key(0), lambda b: (b.sum(-1) - 2) ** 2, q, methods, 1000)
    >>> print(recommend(report, calls=100))
    Take reinforce, 100 estimates: the error of their mean is 0.18 of the gradient. Next is rloo, 0.21.
    """
    arg.require(isinstance(report, GradientReport), "report", "a GradientReport", arg.shown(report))
    calls = arg.as_static_int("calls", calls, 1, 10**12)
    arg.require(bool(report.finite.any()), "report", "one with a finite estimator", "none")
    least = int(np.min(report.calls[report.finite]))
    arg.require(calls >= least, "calls", f"{least} or more, as the estimators take", calls)
    averaged = calls // np.maximum(report.calls, 1)
    floors, possible = _squared_biases(report), (averaged > 0) & report.finite
    errors = np.sqrt(np.where(possible, floors + report.variance / np.maximum(averaged, 1), np.inf))
    norm = float(np.linalg.norm(report.gradient))
    best, *rest = np.argsort(errors, kind="stable")
    shown = lambda row: f"{errors[row] / (norm or 1):.2g}"
    unit = " of the gradient" if norm else ""
    biased = ", most of it bias" if floors[best] > errors[best] ** 2 / 2 else ""
    several = f"{averaged[best]} estimates: the error of their mean is"
    number = "one estimate: its error is" if averaged[best] == 1 else several
    text = f"Take {report.names[best]}, {number} {shown(best)}{unit}{biased}."
    following = [row for row in rest if np.isfinite(errors[row])]
    return text + (f" Next is {report.names[following[0]]}, {shown(following[0])}." if following else "")


def _squared_biases(report):
    """The error that remains however many estimates are averaged: 0 if no bias is seen."""
    return np.where(report.biased, np.maximum(report.mse - report.variance, 0), 0)


def _draw(report, axis, cost):
    norm = np.linalg.norm(report.gradient)
    unit = norm if norm > 0 else 1.0
    starts = np.asarray(getattr(report, cost), float)
    end = 1000 * starts.max()
    variances = report.variance / unit**2
    floors = _squared_biases(report) / unit**2
    ends = []
    for place, (start, variance, floor) in enumerate(zip(starts, variances, floors, strict=True)):
        if not report.finite[place]:
            continue
        draws = np.geomspace(1, end / start, 200)
        error = np.sqrt(np.maximum(floor + variance / draws, 1e-12))
        look = {"color": COLOURS[place % len(COLOURS)], "ls": "-" if place < len(COLOURS) else "--"}
        axis.plot(start * draws, error, lw=1.8, **look)
        axis.plot(start, error[0], "o", ms=6, color=look["color"])
        ends.append((error[-1], place, look["color"]))
    axis.set(xscale="log", yscale="log", xlim=(starts.min() / 1.3, end))
    axis.set_xlabel({"calls": "calls of f, all estimates together", "seconds": "seconds"}[cost])
    axis.set_ylabel("rms error of their mean" + (" / |gradient|" if norm > 0 else ""))
    axis.grid(alpha=0.3)
    # names at the right ends, moved apart so that none covers another
    low, high = np.log(axis.get_ylim())
    ends.sort()
    heights = (np.log([error for error, *_ in ends]) - low) / (high - low)
    ladder = np.arange(len(ends)) * min(0.06, 1 / len(ends))
    heights = np.maximum.accumulate(heights - ladder) + ladder
    heights = np.minimum(heights, 1 + ladder - ladder[-1])
    for (error, place, colour), height in zip(ends, heights, strict=True):
        axis.annotate(
            report.names[place] + (" (biased)" if report.biased[place] else ""), (end, error),
            (1.04, height), xycoords="data", textcoords="axes fraction", va="center", color=colour,
            fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "relpos": (0, 0.5)},
        )  # fmt: skip
