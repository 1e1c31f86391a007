"""Which estimator does a problem want? Bias, variance and cost of each, measured on the problem itself."""

from relaxit_jax.diagnostics._base import GradientReport
from relaxit_jax.diagnostics._measure import from_sampler, gradient_report

__all__ = ["GradientReport", "from_sampler", "gradient_report"]
