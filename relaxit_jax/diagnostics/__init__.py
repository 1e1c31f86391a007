"""Which estimator does a problem want? Bias, variance and cost of each, measured on the problem itself."""

from relaxit_jax.diagnostics._measure import from_sampler, gradient_report
from relaxit_jax.diagnostics._report import GradientReport

__all__ = ["GradientReport", "from_sampler", "gradient_report"]
