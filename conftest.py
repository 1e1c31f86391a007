"""What the doctests find in their namespace, and quicker compilation for the tests that ask for it."""

import os
import tempfile

import jax
import jax.numpy as jnp
import pytest


def pytest_configure(config):
    """What one worker of pytest-xdist has compiled, the others and the examples' processes need not."""
    if config.getoption("numprocesses", None) and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="relaxit_jax-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        config.add_cleanup(cache.cleanup)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp)


@pytest.fixture
def fast_compilation():
    """Compiling is most of the time of these tests; no law depends on how well the code is optimised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the processes that a test starts
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
