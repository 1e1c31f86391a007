"""Quantizers: indices against float64, gradients in closed form, moving averages against direct sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp

from helpers import KEY, P_VALUE, chi_square, quick
from relaxit_jax import quantizers as qz
from relaxit_jax.quantizers import _vector

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(40, 3)))
CODES = np.float32(RNG.normal(size=(7, 3)))
CT = np.float32(RNG.normal(size=X.shape))


def distances(x, codes):
    """Distances of every pair, in float64."""
    x, codes = np.asarray(x, np.float64), np.asarray(codes, np.float64)
    return ((x[..., None, :] - codes) ** 2).sum(-1)


@pytest.fixture
def blocks(monkeypatch):
    """Codes are compared in blocks of this size from now on."""

    def of(size, vectors):
        monkeypatch.setattr(_vector, "_block_size", lambda shape, n, *_: size)
        jax.clear_caches()

    yield of
    jax.clear_caches()


# --- the nearest code -------------------------------------------------------------------------


@quick
@pytest.mark.parametrize(("vectors", "n", "d"), [(200, 500, 8), (64, 1000, 64), (300, 1, 5), (50, 33, 1)])
def test_indices_are_those_of_float64(vectors, n, d):
    """Where two distances are within the rounding of float32, either code is accepted."""
    rng = np.random.default_rng(n)
    x, codes = (np.float32(rng.normal(size=(m, d))) for m in (vectors, n))
    exact = distances(x, codes)
    index = np.asarray(qz.vector_quantize(x, codes).index)
    found = np.take_along_axis(exact, index[:, None], 1)[:, 0]
    rounding = 4 * d * np.finfo(np.float32).eps * ((x**2).sum(-1) + (codes**2).sum(-1).max())
    assert (found <= exact.min(1) + rounding).all()
    ordered = np.sort(exact, 1)
    clear = np.ptp(ordered[:, :2], 1) > rounding if n > 1 else np.ones(vectors, bool)
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(index[clear], exact.argmin(1)[clear])


@quick
@pytest.mark.parametrize("size", [1, 3, 4, 7, 8])
def test_blocks_of_codes_change_nothing(blocks, size):
    x = np.concatenate([X, X[:1] * np.nan, CODES])
    whole = qz.vector_quantize(x, CODES)
    blocks(size, len(x))
    jax.tree.map(np.testing.assert_array_equal, whole, qz.vector_quantize(x, CODES))
    twice = np.concatenate([CODES, CODES[::-1]])  # across blocks too, the first of equals
    np.testing.assert_array_equal(qz.vector_quantize(x, twice).index[:40], whole.index[:40])


@quick
def test_the_first_of_equals_is_taken():
    codes = np.float32([[1, 1], [-1, 1], [1, 1], [0, 2], [-1, -1]])
    x = np.float32([[0, 0], [0, 1], [1, 1], [0, -1], [-2, 1]])
    exact = distances(x, codes)
    assert (exact == exact.min(1, keepdims=True)).sum(1).tolist() == [4, 4, 2, 1, 1]
    np.testing.assert_array_equal(qz.vector_quantize(x, codes).index, exact.argmin(1))
    twice = np.concatenate([CODES, CODES])
    np.testing.assert_array_equal(qz.vector_quantize(X, twice).index, qz.vector_quantize(X, CODES).index)


@quick
def test_values_and_losses():
    q = qz.vector_quantize(X, CODES)
    np.testing.assert_array_equal(q.value, CODES[q.index])
    for loss in (q.codebook_loss, q.commitment_loss):
        np.testing.assert_allclose(loss, distances(X, CODES).min(1) / 3, rtol=1e-5)


@quick
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """The indices and losses equal those from the rounded numbers in float32, with exactly the codes."""
    x, codes = jnp.asarray(X, dtype), jnp.asarray(CODES, dtype)
    half, full = (
        qz.vector_quantize(x, codes),
        qz.vector_quantize(*(a.astype(jnp.float32) for a in (x, codes))),
    )
    assert half.value.dtype == dtype and half.codebook_loss.dtype == half.commitment_loss.dtype == jnp.float32
    np.testing.assert_array_equal(half.value, codes[half.index])
    for name in ("index", "codebook_loss", "commitment_loss"):
        np.testing.assert_array_equal(getattr(half, name), getattr(full, name))
    state = qz.update_codebook(qz.codebook_state(codes), x, half.index)
    assert all(part.dtype == jnp.float32 for part in state)
    assert qz.finite_scalar_quantize(x, (8, 5, 5))[0].dtype == qz.lookup_free_quantize(x)[0].dtype == dtype


# --- gradients --------------------------------------------------------------------------------


def gradients(f):
    return jax.tree.map(np.asarray, jax.jit(jax.grad(f, (0, 1)))(X, CODES))


@quick
def test_each_loss_moves_one_of_the_two():
    index = distances(X, CODES).argmin(1)
    apart = CODES[index] - X
    of_code = np.stack([2 / 3 * apart[index == j].sum(0) for j in range(len(CODES))])
    of_x, moved = gradients(lambda x, codes: qz.vector_quantize(x, codes).codebook_loss.sum())
    assert (of_x == 0).all()
    np.testing.assert_allclose(moved, of_code, rtol=1e-5, atol=1e-6)
    of_x, moved = gradients(lambda x, codes: qz.vector_quantize(x, codes).commitment_loss.sum())
    assert (moved == 0).all()
    np.testing.assert_allclose(of_x, -2 / 3 * apart, rtol=1e-5, atol=1e-6)


@quick
def test_straight_through_passes_the_gradient_on():
    of_x, of_codes = gradients(lambda x, codes: jnp.sum(qz.vector_quantize(x, codes).value * CT))
    np.testing.assert_array_equal(of_x, CT)
    assert (of_codes == 0).all()


def rotation(x, code):
    """The rotation in the plane of the two that takes one direction to the other, and the scale."""
    e, v = (y / np.linalg.norm(y) for y in (np.float64(x), np.float64(code)))
    across = v - (v @ e) * e
    across /= np.linalg.norm(across)
    c, s = v @ e, v @ across
    plane = np.outer(e, e) + np.outer(across, across)
    turned = c * plane + s * (np.outer(across, e) - np.outer(e, across))
    return np.eye(len(x)) - plane + turned, np.linalg.norm(code) / np.linalg.norm(x)


@quick
def test_rotation_turns_the_gradient_back():
    """s R^T, with R x / |x| = c / |c|; the value is the code, to its last bit."""
    rotated = lambda x, codes: qz.vector_quantize(x, codes, gradient="rotation")
    of_x, of_codes = gradients(lambda x, codes: jnp.sum(rotated(x, codes).value * CT))
    q = rotated(X, CODES)
    np.testing.assert_array_equal(q.value, CODES[q.index])
    assert (of_codes == 0).all()
    for x, code, ct, found in zip(X, CODES[q.index], CT, of_x, strict=True):
        turn, scale = rotation(x, code)
        np.testing.assert_allclose(scale * turn @ x, code, atol=1e-6)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
        np.testing.assert_allclose(found, scale * turn.T @ ct, rtol=2e-4, atol=2e-5)


@quick
def test_rotation_of_what_has_no_direction_is_straight_through():
    back = lambda x, codes: jax.vjp(lambda x: qz.vector_quantize(x, codes, gradient="rotation").value, x)[1]
    ct = jnp.array([0.3, -0.4])
    zero = jnp.zeros(2)
    np.testing.assert_array_equal(back(zero, jnp.array([[1.0, 0.5]]))(ct)[0], ct)
    np.testing.assert_array_equal(back(jnp.array([1.0, 0.5]), zero[None])(ct)[0], ct)
    np.testing.assert_array_equal(back(zero, zero[None])(ct)[0], ct)
    (opposite,) = back(jnp.array([1.0, 0.0]), jnp.array([[-2.0, 0.0]]))(ct)
    np.testing.assert_allclose(np.linalg.norm(opposite), 2 * 0.5, rtol=1e-6)
    for size in (1e-30, 1e30):  # whose squares are beyond float32
        x = size * jnp.array([3.0, 4.0])
        (found,) = back(x, jnp.array([[5.0, 0.0]]))(size * ct)
        turn, _ = rotation([3, 4], [5, 0])
        np.testing.assert_allclose(found, turn.T @ ct, rtol=1e-5, atol=1e-6)


@quick
def test_all_ways_to_call_agree():
    def both(x, codes):
        q, pull = jax.vjp(lambda x, codes: qz.vector_quantize(x, codes, gradient="rotation"), x, codes)
        ct = qz.Quantized(jnp.ones_like(q.value), np.zeros(q.index.shape, jax.dtypes.float0), *q[2:])
        return q, pull(ct)

    q, (of_x, of_codes) = both(X, CODES)
    for way in (jax.jit(both), jax.jit(lambda x, codes: jax.checkpoint(both)(x, codes))):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            way(X, CODES),
            (q, (of_x, of_codes)),
        )
    mapped = jax.vmap(both, (0, None))(X, CODES)
    scanned = jax.lax.scan(lambda c, x: (c, both(x, CODES)), 0, X)[1]
    for found in (mapped, scanned):
        np.testing.assert_array_equal(found[0].index, q.index)
        np.testing.assert_allclose(found[1][0], of_x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1][1].sum(0), of_codes, rtol=1e-5, atol=1e-5)
    deep = qz.vector_quantize(X.reshape(2, 4, 5, 3), CODES)
    np.testing.assert_array_equal(deep.index.ravel(), q.index)


# --- what is not there, and what is bad -------------------------------------------------------


@quick
def test_nan_is_shown():
    x = X.copy()
    x[3, 1] = np.nan
    good = np.arange(len(X)) != 3
    for gradient in ("straight_through", "rotation"):
        q, clean = (qz.vector_quantize(y, CODES, gradient=gradient) for y in (x, X))
        assert q.index[3] == len(CODES)
        assert np.isnan(q.value[3]).all() and np.isnan([q.codebook_loss[3], q.commitment_loss[3]]).all()
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[good], b[good]), q, clean)
    codes = CODES.copy()
    codes[2, 0] = np.nan
    q = qz.vector_quantize(X, codes)
    assert np.isnan(q.value).all() and np.isnan(q.codebook_loss).all() and (q.index == len(codes)).all()
    q = qz.residual_quantize(x, np.stack([CODES, CODES]))
    assert np.isnan(q.value[3]).all() and np.isfinite(q.value[good]).all() and (q.index[3] == 7).all()
    value, index = qz.finite_scalar_quantize(x, (2, 3, 4))
    assert np.isnan(value[3, 1]) and index[3] == 24 and np.isfinite(value[good]).all()
    assert np.isnan(qz.finite_scalar_codes(index, (2, 3, 4))[3]).all()
    value, index = qz.lookup_free_quantize(x)
    assert np.isnan(value[3, 1]) and index[3] == 8 and (index[good] < 8).all()
    assert np.isnan(qz.lookup_free_entropy(x, 1.0))
    state = qz.codebook_state(CODES)
    spoiled = qz.update_codebook(state, x, np.zeros(len(x), int))
    assert np.isnan(spoiled.codebook[0, 1]) and np.isfinite(spoiled.codebook[1:]).all()
    traced = jax.jit(lambda decay: qz.update_codebook(state, X, qz.vector_quantize(X, CODES).index, decay))
    assert np.isnan(traced(1.5).codebook).all() and np.isfinite(traced(0.5).codebook).all()


@quick
def test_one_code_and_no_vectors():
    q = qz.vector_quantize(X, CODES[:1])
    assert (q.index == 0).all() and (q.value == CODES[0]).all()
    assert qz.perplexity(q.index, 1) == 1
    none = qz.vector_quantize(X[:0], CODES, gradient="rotation")
    assert none.value.shape == (0, 3) and none.index.shape == none.codebook_loss.shape == (0,)
    assert qz.residual_quantize(X[:0], CODES[None]).index.shape == (0, 1)
    value, index = qz.finite_scalar_quantize(X[:0], (3, 3, 3))
    assert value.shape == (0, 3) and index.shape == (0,)
    assert qz.lookup_free_quantize(X[:0])[1].shape == (0,)
    assert np.isnan(qz.lookup_free_entropy(X[:0], 1.0)) and np.isnan(qz.perplexity(np.zeros(0, int), 3))
    state = qz.update_codebook(qz.codebook_state(CODES), X[:0], np.zeros(0, int), 0.5, smoothing=0.0)
    np.testing.assert_allclose(state.codebook, CODES, rtol=1e-6)
    np.testing.assert_array_equal(state.count, 0.5)
    with pytest.raises(ValueError, match="x must be at least one vector"):
        qz.restart_unused(KEY, state, X[:0])


def test_what_does_not_fit_is_named():
    for codes in (np.zeros((0, 3)), np.zeros((2, 2)), np.zeros(3), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"codebook must be of shape \(n, d\) with d = 3"):
            qz.vector_quantize(X, np.float32(codes))
    with pytest.raises(ValueError, match=r"codebooks must be of shape \(stages, n, d\)"):
        qz.residual_quantize(X, CODES)
    for levels in ((2, 3), (2, 3, 1), (2.5, 3, 4), "abc"):
        with pytest.raises(ValueError, match="levels must be 3 integers of at least 2"):
            qz.finite_scalar_quantize(X, levels)
    with pytest.raises(ValueError, match="levels must be at most 2147483647 codes in all, got 8589934592"):
        qz.finite_scalar_codes(0, (2048, 2048, 2048))
    with pytest.raises(ValueError, match="x must be of at most 30 numbers"):
        qz.lookup_free_quantize(np.zeros((1, 31), np.float32))
    state = qz.codebook_state(CODES)
    with pytest.raises(ValueError, match=r"index must be indices in 0\.\.7"):
        qz.update_codebook(state, X[:1], np.array([8]))
    with pytest.raises(ValueError, match=r"index must be of shape \(40,\)"):
        qz.update_codebook(state, X, np.array([0]))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        qz.update_codebook(state, X[:1], np.array([0]), 1.5)


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_a_large_codebook_needs_no_array_of_all_pairs(gradient):
    """65,536 codes for 16,384 vectors of 64 numbers, forward and backward: compiled, not run."""

    def loss(x, codes):
        q = qz.vector_quantize(x, codes, gradient=gradient)
        return jnp.sum(q.value**2) + jnp.mean(q.codebook_loss + 0.25 * q.commitment_loss)

    arguments = (jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (16_384, 65_536))
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**29  # all pairs would be 4 GiB, with their differences 256


# --- residual stages --------------------------------------------------------------------------


def trained(x, n, steps=30):
    """A codebook with the means of the vectors of each code."""
    state = qz.codebook_state(x[:n])
    step = jax.jit(lambda s: qz.update_codebook(s, x, qz.vector_quantize(x, s.codebook).index, 0.0))
    for _ in range(steps):
        state = step(state)
    return np.asarray(state.codebook)


@quick
def test_residual_stages():
    """They match separate stages; and trained stages each leave a smaller error, on average."""
    x = np.float32(RNG.normal(size=(500, 4)))
    rest, stages, indices, losses, errors = x, [], [], 0, [np.mean(x**2)]
    for _ in range(4):
        codes = trained(rest, 8)
        index = np.asarray(qz.vector_quantize(rest, codes).index)
        losses = losses + np.mean((rest - codes[index]) ** 2, -1)
        rest = rest - codes[index]
        stages, indices, errors = [*stages, codes], [*indices, index], [*errors, np.mean(rest**2)]
    assert (np.diff(errors) < -0.05 * np.array(errors[:-1])).all(), errors
    stages = np.stack(stages)
    q = qz.residual_quantize(x, stages)
    np.testing.assert_array_equal(q.index, np.stack(indices, -1))
    np.testing.assert_allclose(q.value, x - rest, atol=1e-5)
    for loss in (q.codebook_loss, q.commitment_loss):
        np.testing.assert_allclose(loss, losses, rtol=1e-5)

    of_x = jax.grad(lambda x: jnp.sum(qz.residual_quantize(x, stages).commitment_loss))(x)
    left = x[None] - np.cumsum([stages[s][indices[s]] for s in range(4)], 0)
    np.testing.assert_allclose(of_x, 2 / 4 * left.sum(0), atol=1e-5)
    of_codes = jax.grad(lambda c: jnp.sum(qz.residual_quantize(x, c).commitment_loss))(stages)
    assert (of_codes == 0).all()
    of_x, of_codes = jax.grad(lambda x, c: jnp.sum(qz.residual_quantize(x, c).codebook_loss), (0, 1))(
        x, stages
    )
    assert (of_x == 0).all()
    moved = [[-2 / 4 * left[s][indices[s] == j].sum(0) for j in range(8)] for s in range(4)]
    np.testing.assert_allclose(of_codes, moved, rtol=1e-4, atol=1e-5)
    of_x = jax.grad(lambda x: jnp.sum(jnp.cos(x) + qz.residual_quantize(x, stages).value))(x)
    np.testing.assert_allclose(of_x, 1 - np.sin(x), atol=1e-6)


# --- finite scalars and signs -----------------------------------------------------------------


@quick
def test_each_axis_has_exactly_its_levels():
    """L = 2..16 at once: evenly spaced, with both ends, in order, and reached; and the way back."""
    levels = tuple(range(2, 17))
    grid = np.linspace(-12, 12, 4801, dtype=np.float32)
    quantize = jax.jit(jax.vmap(lambda x: qz.finite_scalar_quantize(jnp.full(7, x), levels[:7])))
    rest = jax.jit(jax.vmap(lambda x: qz.finite_scalar_quantize(jnp.full(8, x), levels[7:])))
    values = np.concatenate([np.asarray(f(grid)[0]) for f in (quantize, rest)], -1)
    for size, column in zip(levels, values.T, strict=True):
        expected = (np.arange(size) - size // 2) / (size // 2)
        np.testing.assert_allclose(np.unique(column), expected, rtol=2e-7)
        assert column.min() == -1 and not np.signbit(column[column == 0]).any()
        assert (np.diff(column) >= 0).all()
        value, index = qz.finite_scalar_quantize(grid[:, None], (size,))
        np.testing.assert_array_equal(np.unique(index), np.arange(size))
        np.testing.assert_array_equal(qz.finite_scalar_codes(index, (size,)), value)


@quick
def test_an_index_stands_for_one_code():
    levels = (4, 3, 2, 5)
    codes = np.asarray(qz.finite_scalar_codes(np.arange(120), levels))
    assert len(np.unique(codes, axis=0)) == 120
    digits = np.stack(np.unravel_index(np.arange(120), levels, order="F"), -1)  # the first counts fastest
    np.testing.assert_allclose(codes, (digits - np.array(levels) // 2) / (np.array(levels) // 2), rtol=1e-6)
    # an x that is bounded to each code
    size = np.array(levels)
    half, offset = (size - 1) * 1.001 / 2, np.where(size % 2, 0, 0.5)
    x = np.arctanh((digits - size // 2 + offset) / half) - np.arctanh(offset / half)
    value, index = qz.finite_scalar_quantize(np.float32(x), levels)
    np.testing.assert_array_equal(index, np.arange(120))
    np.testing.assert_array_equal(value, codes)
    assert np.isnan(qz.finite_scalar_codes(np.array([-1, 120]), levels)).all()


@quick
def test_finite_scalars_have_the_gradient_of_what_is_rounded():
    levels = np.array([2, 3, 8])
    half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
    at = np.tanh(X + np.arctanh(offset / half))
    found = jax.grad(lambda x: jnp.sum(qz.finite_scalar_quantize(x, (2, 3, 8))[0] * CT))(X)
    np.testing.assert_allclose(found, CT * half * (1 - at**2) / (levels // 2), rtol=2e-3, atol=1e-5)


@quick
def test_signs():
    x = np.concatenate([X, np.zeros((1, 3), np.float32)])
    value, index = qz.lookup_free_quantize(x)
    np.testing.assert_array_equal(value, np.where(x > 0, 1, -1))
    np.testing.assert_array_equal(index, (x > 0) @ [1, 2, 4])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(qz.lookup_free_quantize(x)[0] * CT))(X), CT)


@quick
@pytest.mark.parametrize("tau", [0.3, 5.0])
def test_the_entropy_loss_is_the_sum_over_all_codes(tau):
    """The entropy of a vector's codes from their distances; the entropy of the mean, bit by bit."""
    codes = np.array(list(itertools.product([-1, 1], repeat=3)))
    p = sp.softmax(-distances(X, codes) / tau, -1)
    bits = p @ (codes > 0)
    mean = bits.mean(0)
    expected = sp.entr(p).sum(-1).mean() - (sp.entr(mean) + sp.entr(1 - mean)).sum()
    np.testing.assert_allclose(qz.lookup_free_entropy(X, tau), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        qz.lookup_free_entropy(X.reshape(2, 20, 3), tau), expected, rtol=1e-4, atol=1e-5
    )
    far = jax.jit(jax.value_and_grad(qz.lookup_free_entropy))(jnp.float32([[1e4, -1e4], [1e4, 1e4]]), 1e-3)
    np.testing.assert_allclose(far[0], -np.log(2), rtol=1e-5)
    assert np.isfinite(far[1]).all()


# --- codebooks --------------------------------------------------------------------------------


def in_one_go(batches, indices, decay, smoothing):
    """The state after all batches, as one weighted sum."""
    steps, n = len(batches), len(CODES)
    weights = (1 - decay) * decay ** np.arange(steps - 1, -1, -1.0)
    hot = [np.eye(n)[index] for index in indices]
    count = decay**steps + sum(w * h.sum(0) for w, h in zip(weights, hot, strict=True))
    total = decay**steps * CODES + sum(w * h.T @ x for w, h, x in zip(weights, hot, batches, strict=True))
    smoothed = (count + smoothing) / (count.sum() + n * smoothing) * count.sum()
    return total / smoothed[:, None], count, total


@quick
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_moving_averages_are_the_sums_in_one_go(smoothing):
    batches = np.float32(RNG.normal(size=(6, 20, 3)))
    indices = RNG.integers(0, 6, (6, 20))  # the last code has none
    update = functools.partial(qz.update_codebook, decay=0.8, smoothing=smoothing)
    step = lambda state, both: (update(state, *both), None)
    state, _ = jax.lax.scan(step, qz.codebook_state(CODES), (batches, indices))
    expected = in_one_go(batches, indices, 0.8, smoothing)
    for found, wanted in zip(state, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    if not smoothing:
        np.testing.assert_allclose(state.codebook[6], CODES[6], rtol=1e-5)


@quick
def test_devices_add_up_what_they_have():
    """Over a mapped axis the state covers all vectors, and perplexity counts all indices."""
    x = np.float32(RNG.normal(size=(4, 10, 3)))
    index = RNG.integers(0, 7, (4, 10))
    state = qz.codebook_state(CODES)
    mapped = jax.vmap(lambda x, i: qz.update_codebook(state, x, i, 0.9, axis_name="d"), axis_name="d")(
        x, index
    )
    whole = qz.update_codebook(state, x, index, 0.9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.stack([b] * 4), rtol=1e-5, atol=1e-6), mapped, whole
    )
    used = jax.vmap(lambda i: qz.perplexity(i, 7, axis_name="d"), axis_name="d")(index)
    np.testing.assert_allclose(used, qz.perplexity(index, 7), rtol=1e-6)
    unused = state._replace(count=jnp.float32([5, 0, 5, 0, 0, 5, 5]))
    restart = lambda x: qz.restart_unused(KEY, unused, x, axis_name="d")
    restarted = jax.vmap(restart, axis_name="d")(x)
    assert all((part == part[:1]).all() for part in restarted)
    found = restarted.codebook[0, np.array([1, 3, 4])]
    where = [np.flatnonzero((x.reshape(-1, 3) == code).all(-1)) for code in found]
    assert [len(w) for w in where] == [1, 1, 1] and len(np.unique(where)) == 3
    for call in (lambda: qz.perplexity(index, 7, axis_name="e"), lambda: restart(x[0])):
        with pytest.raises(ValueError, match="axis_name must be None, or names of axes"):
            call()


@quick
def test_averages_have_no_gradient_and_drop_what_has_no_code():
    state = qz.codebook_state(CODES)
    index = np.zeros(len(X), int)
    of_x = jax.grad(lambda x: jnp.sum(qz.update_codebook(state, x, index).codebook))(X)
    assert (of_x == 0).all()
    x = np.concatenate([X, X[:1] * np.nan])
    dropped = qz.update_codebook(state, x, np.append(index, 7))
    jax.tree.map(np.testing.assert_array_equal, dropped, qz.update_codebook(state, X, index))
    negative = jax.jit(lambda i: qz.update_codebook(state, x, i))(np.append(index, -1))
    jax.tree.map(np.testing.assert_array_equal, dropped, negative)


@quick
def test_a_code_without_any_vector_stays():
    state = qz.update_codebook(qz.codebook_state(CODES), X, np.zeros(len(X), int), 0.0)
    np.testing.assert_allclose(state.codebook[0], X.mean(0), rtol=1e-4)
    np.testing.assert_array_equal(state.codebook[1:], CODES[1:])
    assert (state.count[1:] == 0).all()


@quick
def test_a_restart_leaves_used_codes_alone():
    state = qz.codebook_state(CODES)._replace(count=jnp.float32([2, 0.5, 1, 0, 3, 0.99, 9]))
    new = qz.restart_unused(KEY, state, X)
    used = np.array([0, 2, 4, 6])
    for before, after in zip(state, new, strict=True):
        np.testing.assert_array_equal(after[used], before[used])
    fresh = np.array([1, 3, 5])
    rows = [np.flatnonzero((code == X).all(-1)) for code in new.codebook[fresh]]
    assert [len(row) for row in rows] == [1, 1, 1] and len(np.unique(rows)) == 3
    np.testing.assert_array_equal(new.count[fresh], 1)
    np.testing.assert_array_equal(new.total[fresh], new.codebook[fresh])
    doubled = qz.restart_unused(KEY, state, X, 0.0)
    jax.tree.map(np.testing.assert_array_equal, doubled, state)
    few = qz.restart_unused(KEY, state, X[:2], 100.0)  # more codes than vectors
    assert np.sum(few.codebook[:, 0] == X[0, 0]) in (3, 4) and np.isin(few.codebook, X[:2]).all()
    np.testing.assert_array_equal(few.total, 100 * few.codebook)


@quick
def test_every_vector_is_drawn_alike():
    state = qz.codebook_state(np.zeros((3, 1), np.float32))._replace(count=jnp.zeros(3))
    x = np.arange(6.0, dtype=np.float32)[:, None]
    new = jax.jit(jax.vmap(lambda key: qz.restart_unused(key, state, x).codebook[..., 0]))
    drawn = np.asarray(new(jax.random.split(KEY, 6000)), int)
    for column in drawn.T:
        assert chi_square(column, np.full(6, 1 / 6)) > P_VALUE
    assert (np.diff(np.sort(drawn, -1), axis=-1) > 0).all()


@quick
def test_perplexity():
    for n in (1, 4, 9):
        np.testing.assert_allclose(qz.perplexity(np.arange(3 * n) % n, n), n, rtol=1e-6)
        np.testing.assert_allclose(qz.perplexity(np.zeros((2, 5), int), n), 1)
    index = RNG.integers(0, 5, (3, 40))
    p = np.bincount(index.ravel(), minlength=8) / 120
    np.testing.assert_allclose(qz.perplexity(index, 8), np.exp(sp.entr(p).sum()), rtol=1e-5)
    np.testing.assert_allclose(
        qz.perplexity(np.append(index, [8, -1, 99]), 8), np.exp(sp.entr(p).sum()), rtol=1e-5
    )
