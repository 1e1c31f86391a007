"""Quantize vectors: the nearest code, finite scalars, signs, residual stages; and codebook updates.

All functions are pure and hold no parameters. A codebook is an array that you train by gradient descent or
by moving averages (`update_codebook`), whose state is a pytree of arrays.
"""

from relaxit_jax.quantizers._codebook import (
    CodebookState,
    codebook_state,
    perplexity,
    restart_unused,
    update_codebook,
)
from relaxit_jax.quantizers._scalar import (
    finite_scalar_codes,
    finite_scalar_quantize,
    lookup_free_entropy,
    lookup_free_quantize,
)
from relaxit_jax.quantizers._vector import Quantized, residual_quantize, vector_quantize

__all__ = [
    "CodebookState",
    "Quantized",
    "codebook_state",
    "finite_scalar_codes",
    "finite_scalar_quantize",
    "lookup_free_entropy",
    "lookup_free_quantize",
    "perplexity",
    "residual_quantize",
    "restart_unused",
    "update_codebook",
    "vector_quantize",
]
