"""Discrete random variables that train: relaxations, their densities and unbiased gradients.

Call a sampler inside a jitted step: ``relaxit_jax.<name>(key, parameters..., *, shape=None, ...)``. If it has
a log-density, that is ``relaxit_jax.<name>_log_prob(value, parameters...)``. The submodules hold NumPyro
distributions, handlers and an unbiased bound for NumPyro models, gradient estimators, and a report on which
estimator your problem wants. Each is imported at its first use.
"""

from __future__ import annotations

import importlib
import typing
from types import ModuleType

from relaxit_jax._fused import fused_kernels
from relaxit_jax._gradients import embed, straight_through
from relaxit_jax.samplers import *  # noqa: F403
from relaxit_jax.samplers import __all__ as _samplers

if typing.TYPE_CHECKING:
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

__version__ = "0.1.0"
__all__ = [
    *_samplers,
    "diagnostics",
    "distributions",
    "elbo",
    "embed",
    "estimators",
    "fused_kernels",
    "handlers",
    "laplace_bridge",
    "quantizers",
    "straight_through",
    "structured",
]


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first used: the samplers need none, and importing NumPyro takes long."""
    if name in __all__:
        return importlib.import_module(f"relaxit_jax.{name}")
    raise AttributeError(f"module 'relaxit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
