"""relaxit_jax: discrete random variables that train.

Samplers take a JAX key first, unconstrained parameters, and a temperature `tau`; each stands beside
its log-density `<sampler>_log_prob`. They are pure functions for use inside a jitted step.
"""

import importlib
import typing
from types import ModuleType

from relaxit_jax._gradients import straight_through
from relaxit_jax.samplers import *  # noqa: F403
from relaxit_jax.samplers import __all__ as _samplers

if typing.TYPE_CHECKING:
    from relaxit_jax import diagnostics, distributions, elbo, estimators, handlers, laplace_bridge

__version__ = "0.1.0"
__all__ = [
    *_samplers,
    "diagnostics",
    "distributions",
    "elbo",
    "estimators",
    "handlers",
    "laplace_bridge",
    "straight_through",
]


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first used: the samplers need none, and importing NumPyro takes long."""
    if name in __all__:
        return importlib.import_module(f"relaxit_jax.{name}")
    raise AttributeError(f"module 'relaxit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
