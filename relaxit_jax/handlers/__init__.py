"""Effect handlers that make NumPyro models with discrete latents trainable."""

from relaxit_jax.handlers._auto_mean_field import AutoMeanField
from relaxit_jax.handlers._base import unrounded
from relaxit_jax.handlers._relax import equal, greater, less, relax, select, take

__all__ = ["AutoMeanField", "equal", "greater", "less", "relax", "select", "take", "unrounded"]
