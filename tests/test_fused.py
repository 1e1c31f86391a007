"""Fused kernels draw the same as the plain form: on a CPU the interpreter of Pallas runs them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import relaxit_jax as rj
from helpers import KEY, P_VALUE, chi_square
from relaxit_jax import _fused

pytestmark = pytest.mark.usefixtures("fast_compilation")

SAMPLERS = {
    "gumbel_softmax": rj.gumbel_softmax,
    "gumbel_softmax, log_space": functools.partial(rj.gumbel_softmax, log_space=True),
    "gumbel_softmax, hard": functools.partial(rj.gumbel_softmax, hard=True),
    "decoupled_gumbel_softmax": lambda key, logits, tau: rj.decoupled_gumbel_softmax(key, logits, tau, tau),
    "straight_through_categorical": rj.straight_through_categorical,
    "gapped_straight_through": rj.gapped_straight_through,
    "reinmax": rj.reinmax,
    "gumbel_rao": rj.gumbel_rao,
    "reinmax_rao": rj.reinmax_rao,
    "gumbel_top_k": lambda key, logits, tau: rj.gumbel_top_k(key, logits, min(3, logits.shape[-1]))[1],
    "relaxed_top_k": lambda key, logits, tau: rj.relaxed_top_k(key, logits, min(3, logits.shape[-1]), tau),
    "relaxed_top_k, hard": lambda key, logits, tau: rj.relaxed_top_k(
        key, logits, min(3, logits.shape[-1]), tau, hard=True
    ),
}
SOFT = ["gumbel_softmax", "gumbel_softmax, log_space", "relaxed_top_k"]
EXACT = [name for name in SAMPLERS if name not in SOFT]
ONE_HOT = [name for name in EXACT if "top_k" not in name]
WHOLE_ROWS = [name for name in SAMPLERS if "top_k" in name or "rao" in name]  # no kernel for longer ones
samplers = pytest.mark.parametrize("name", SAMPLERS)


@pytest.fixture(params=["cuda", "tpu"])
def fused(request, monkeypatch):
    """A call in which the kernels of one kind of device are interpreted."""

    def call(function, *args):
        with monkeypatch.context() as patch, rj.fused_kernels(True):
            patch.setattr(_fused, "_interpreted", request.param)
            jax.clear_caches()  # of functions that were traced without kernels
            assert "pallas_call" in str(jax.make_jaxpr(function)(*args))
            result = jax.jit(function)(*args)
            jax.clear_caches()
        return result

    return call


def loss_and_draw(name, key):
    def both(logits, tau):
        draw = SAMPLERS[name](key, logits, tau)
        weights = jnp.cos(1.0 + jnp.arange(draw.size)).reshape(draw.shape)
        return jnp.sum(jnp.where(jnp.isfinite(draw), weights * draw.astype(jnp.float32), 0)), draw

    return jax.grad(both, (0, 1), has_aux=True)


LAYOUTS = {  # batches and rows that do not fill a block, a temperature for each row, rows of several pieces
    "small": ((7, 5), 0.5),
    "no batch": ((5,), 0.5),
    "a tau for each row": ((3, 11, 40), np.linspace(0.3, 2, 33, dtype="f").reshape(3, 11)),
    "several pieces": ((3, 5000), 0.7),
    "one class": ((4, 1), 0.5),
}


@pytest.mark.few(6, "tpu-small-float32-gumbel_rao", "cuda-small-float32-relaxed_top_k]")
@samplers
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((layout, jnp.float32) for layout in LAYOUTS), ("small", jnp.bfloat16), ("small", jnp.float16)],
)
def test_draws_and_gradients_are_those_of_the_plain_form(name, dtype, layout, fused):
    """They agree up to rounding in the logits and in tau, with one impossible class."""
    shape, tau = LAYOUTS[layout]
    logits = 3 * np.random.default_rng(1).normal(size=shape)
    logits[..., 0] = -np.inf if shape[-1] > 1 else 0
    args = jnp.asarray(logits, dtype), jnp.float32(tau)
    gradient = loss_and_draw(name, KEY)
    fits = shape[-1] <= 4096 or name not in WHOLE_ROWS
    slopes, draw = (fused if fits else lambda f, *args: jax.jit(f)(*args))(gradient, *args)
    plain, expected = jax.jit(gradient)(*args)
    one_rounding = float(jnp.finfo(dtype).eps)
    as_float = functools.partial(np.asarray, dtype=np.float32)
    np.testing.assert_allclose(as_float(draw), as_float(expected), rtol=max(one_rounding, 1e-5), atol=1e-6)
    assert draw.dtype == expected.dtype
    if name in EXACT:
        np.testing.assert_array_equal(as_float(draw), as_float(expected))
    for slope, reference in zip(slopes, plain, strict=True):
        scale = np.abs(as_float(reference)).max() + 1e-3
        np.testing.assert_allclose(
            as_float(slope), as_float(reference), atol=2 * max(one_rounding, 1e-5) * scale
        )
        assert slope.dtype == reference.dtype
    if shape[-1] > 1:
        assert (as_float(slopes[0])[..., 0] == 0).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ONE_HOT)
def test_exact_draws_have_the_discrete_law(name, fused):
    logits = np.array([0.5, -1.0, 2.0, 0.1, -3.0], "f")
    many = jnp.broadcast_to(logits, (200_000, 5))
    draws = fused(lambda l: jnp.argmax(SAMPLERS[name](KEY, l, 0.5), -1), many)
    assert chi_square(np.asarray(draws), np.asarray(jax.nn.softmax(logits))) > P_VALUE


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name",
    ["gumbel_softmax, hard", "gumbel_rao", "reinmax", "gumbel_top_k", "relaxed_top_k", "relaxed_top_k, hard"],
)
def test_a_nan_is_shown_in_its_row_alone(name, fused):
    logits = jnp.zeros((9, 3)).at[4, 1].set(jnp.nan).at[6].set(-jnp.inf)
    draw = fused(lambda l: SAMPLERS[name](KEY, l, 0.5), logits)
    bad = jnp.isnan(draw).all(-1)
    np.testing.assert_array_equal(np.flatnonzero(bad), [4, 6])
    assert jnp.isfinite(draw[~bad]).all()


def transformed(name):
    """Values and gradients under the transformations that users apply."""
    keys, logits = jax.random.split(KEY, 3), jax.random.normal(KEY, (3, 8, 6))
    half = jnp.float32(0.5)
    draw = lambda key, l, tau=half: loss_and_draw(name, key)(l, tau)
    mesh = Mesh(np.array(jax.devices()), "x", axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "x")
    return {
        "keys and logits": lambda: jax.vmap(draw)(keys, logits),
        "logits": lambda: jax.vmap(lambda l: draw(KEY, l))(logits),
        "keys": lambda: jax.vmap(lambda key: draw(key, logits[0]))(keys),
        "tau": lambda: jax.vmap(lambda tau: draw(KEY, logits[0], tau))(jnp.array([0.3, 0.5, 2.0])),
        "scan": lambda: jax.lax.scan(lambda c, x: (c, draw(*x)), 0, (keys, logits))[1],
        "checkpoint": lambda: jax.checkpoint(lambda l: draw(KEY, l))(logits),
        # Pallas' interpreter has no types for values that vary over devices
        "shard_map": lambda: jax.shard_map(
            lambda l: draw(KEY, l), mesh=mesh, in_specs=rows, out_specs=((rows, PartitionSpec()), rows),
            check_vma=False,
        )(logits),
    }  # fmt: skip


@pytest.mark.whole
@samplers
def test_transformations_change_nothing(name, fused):
    together = lambda: {way: call() for way, call in transformed(name).items()}
    chex.assert_trees_all_close(fused(together), jax.jit(together)(), rtol=2e-5, atol=3e-5)


def test_where_kernels_do_not_fit_the_plain_form_is_used():
    logits = jnp.zeros((4, 3))
    mesh = Mesh(np.array(jax.devices()), "x", axis_types=(AxisType.Explicit,))

    def has_kernel(key, logits, **options):
        draw = lambda logits: rj.gumbel_softmax(key, logits, 0.5, **options)
        return "pallas_call" in str(jax.make_jaxpr(draw)(logits))

    assert not has_kernel(KEY, logits)
    with rj.fused_kernels(True):
        assert has_kernel(KEY, logits) and has_kernel(jax.random.PRNGKey(0), logits)
        with rj.fused_kernels(False):
            assert not has_kernel(KEY, logits)
        assert not has_kernel(KEY, logits[0], shape=(4,))
        assert not has_kernel(jax.random.key(0, impl="rbg"), logits)
        assert not has_kernel(KEY, jnp.zeros((0, 3)))
        with jax.enable_x64(True):
            assert not has_kernel(KEY, jnp.zeros((4, 3), jnp.float64))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(logits, jax.sharding.NamedSharding(mesh, PartitionSpec("x")))
            assert not has_kernel(KEY, sharded)
    assert not has_kernel(KEY, logits)


@pytest.mark.few(3)
@samplers
@pytest.mark.parametrize(("shape", "tau"), [((7,), 0.5), ((5, 7), 0.5), ((2, 3, 4), [[0.3, 0.4, 0.5]])])
def test_a_cpu_draws_by_the_plain_form(name, shape, tau):
    """Draws are the same to the bit; gradients are written in another way."""
    logits, tau = jax.random.normal(KEY, shape), jnp.float32(tau)
    plain = jax.jit(loss_and_draw(name, KEY))(logits, tau)
    with rj.fused_kernels(True):
        inside = jax.jit(loss_and_draw(name, KEY))(logits, tau)
    np.testing.assert_array_equal(inside[1], plain[1])
    chex.assert_trees_all_close(inside[0], plain[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["gumbel_rao", "gumbel_softmax, hard", "relaxed_top_k"])
def test_a_forward_mode_derivative_of_a_backward_kernel_is_an_error(name):
    with rj.fused_kernels(True), pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda l: SAMPLERS[name](KEY, l, 0.5), (jnp.zeros(3),), (jnp.ones(3),))


def test_too_few_possible_elements_are_shown(fused):
    """As in the plain form: the k-hot draws are NaN, and the values of the missing elements are -inf."""
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf], [0.0, 1.0, 2.0, -jnp.inf]])
    indices, values = fused(lambda l: rj.gumbel_top_k(KEY, l, 3), logits)
    assert (values[0] == -jnp.inf).tolist() == [False, False, True] and jnp.isfinite(values[1]).all()
    assert len(set(indices[0].tolist())) == 3
    for hard in (False, True):
        draw = fused(lambda l, hard=hard: rj.relaxed_top_k(KEY, l, 3, 0.5, hard=hard), logits)
        assert jnp.isnan(draw[0]).all() and jnp.isfinite(draw[1]).all()
