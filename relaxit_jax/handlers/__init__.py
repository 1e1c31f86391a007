"""Train NumPyro models with discrete latents: relax their sites, and make a guide for them."""

from relaxit_jax.handlers._auto_mean_field import AutoMeanField
from relaxit_jax.handlers._auto_structured import AutoStructured
from relaxit_jax.handlers._check import check
from relaxit_jax.handlers._marginals import marginals
from relaxit_jax.handlers._relax import relax
from relaxit_jax.handlers._select import equal, greater, less, select, take
from relaxit_jax.handlers._unrounded import unrounded

__all__ = [
    "AutoMeanField", "AutoStructured", "check", "equal", "greater", "less", "marginals",
    "relax", "select", "take", "unrounded",
]  # fmt: skip
