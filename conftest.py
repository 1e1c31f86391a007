"""What the doctests find in their namespace."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp)
