"""Effect handlers that make NumPyro models with discrete latents trainable."""

from relaxit_jax.handlers._auto_guide import auto_guide
from relaxit_jax.handlers._base import unrounded
from relaxit_jax.handlers._relax import equal, greater, less, relax, select, take

__all__ = ["auto_guide", "equal", "greater", "less", "relax", "select", "take", "unrounded"]
