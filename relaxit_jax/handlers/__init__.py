"""Train NumPyro models with discrete latents: relax their sites, and make a guide for them."""

from relaxit_jax.handlers._auto_mean_field import AutoMeanField
from relaxit_jax.handlers._relax import relax
from relaxit_jax.handlers._select import equal, greater, less, select, take
from relaxit_jax.handlers._unrounded import unrounded

__all__ = ["AutoMeanField", "equal", "greater", "less", "relax", "select", "take", "unrounded"]
