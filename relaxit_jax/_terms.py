"""Terms of an ELBO: log-probabilities of the sites of a trace, and their sums over plates."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from jax import Array


def plates_of(site: dict[str, Any]) -> frozenset[Any]:
    return frozenset(site["cond_indep_stack"])


def log_prob_of(site: dict[str, Any]) -> Array:
    extra = (site["intermediates"],) if site["intermediates"] else ()
    return site["fn"].log_prob(site["value"], *extra)


def scaled_log_prob(site: dict[str, Any]) -> Array:
    log_prob = log_prob_of(site)
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def sum_to(plates: Collection[Any], x: Array) -> Array:
    """The sum over all axes except those of these plates; axes that no plate has declared are summed."""
    dims = {frame.dim for frame in plates}
    return jnp.sum(x, [axis for axis in range(-jnp.ndim(x), 0) if axis not in dims], keepdims=True)
