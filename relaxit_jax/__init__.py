"""relaxit_jax: discrete random variables that train.

Samplers take a JAX key first, unconstrained parameters, and a temperature `tau`; each stands beside
its log-density `<sampler>_log_prob`. They are pure functions for use inside a jitted step.
"""

from relaxit_jax import diagnostics, estimators, laplace_bridge
from relaxit_jax.samplers import *  # noqa: F403
from relaxit_jax.samplers import __all__ as _samplers

__version__ = "0.1.0"
__all__ = [*_samplers, "diagnostics", "estimators", "laplace_bridge"]
