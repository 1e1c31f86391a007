"""Outside jitted functions: the next call reuses everything that a call compiles."""

import jax
import jax.numpy as jnp
import pytest

from cases import cases, has_log_prob, is_differentiable
from helpers import KEY, few, quick, rows
from public_calls import CALLS

# They trace a user's function again, in loops: it is not known whether it is the same function.
OF_USERS = {"stochastic_beam_search", "gradient_report", "check", "marginals"}


@pytest.fixture
def compilations():
    """How many programs have been compiled since the test began."""
    count = [0]

    def listen(event, seconds, **_):
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def compiles_once(call, compilations):
    call()
    before = compilations[0]
    call()
    return compilations[0] == before


def test_compilations_are_counted(compilations):
    assert not compiles_once(lambda: jax.jit(lambda x: x + 1)(jnp.ones(3)), compilations)


@pytest.mark.few(16, "[relaxed_top_k]")
@quick
@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_USERS))
def test_a_second_call_compiles_nothing_and_writes_no_array_out(name, compilations, monkeypatch):
    """An array as text is for errors; making one takes longer than most draws."""
    call = CALLS[name]

    def again():
        result = call.function(**call.arguments)
        for way in ("__repr__", "__str__", "__format__"):
            monkeypatch.setattr(type(jnp.zeros(1)), way, lambda x, *_: pytest.fail("an array is written out"))
        return result

    assert compiles_once(again, compilations)


@few(4)
@quick
@rows(cases(is_differentiable))
def test_a_second_gradient_compiles_nothing(case, compilations):
    params = {name: jnp.asarray(x) for name, x in case.floats.items()}
    gradient = jax.grad(lambda params: jnp.sum(jnp.cos(case.draw(KEY, **params))))
    assert compiles_once(lambda: gradient(params), compilations)


@few(3)
@quick
@rows(cases(has_log_prob))
def test_a_second_gradient_of_a_density_compiles_nothing(case, compilations):
    params = {name: jnp.asarray(x) for name, x in case.floats.items()}
    value = case.draw(KEY)
    gradient = jax.grad(lambda params: jnp.sum(case.density(value, **params)))
    assert compiles_once(lambda: gradient(params), compilations)
