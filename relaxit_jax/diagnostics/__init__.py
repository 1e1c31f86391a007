"""Measure bias, variance and cost of gradient estimators and samplers on your own problem."""

from relaxit_jax.diagnostics._measure import from_sampler, gradient_report
from relaxit_jax.diagnostics._report import GradientReport, recommend

__all__ = ["GradientReport", "from_sampler", "gradient_report", "recommend"]
