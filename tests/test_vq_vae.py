"""The autoencoder of codes: patches, each quantizer and its way back, training, and its prior."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vq_vae as example
from command_lines import bars, run

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(10)
X = jax.random.normal(KEY, (20, 2, 3, 16))


def test_patches_and_back():
    images = np.random.default_rng(0).random((5, 10, 7)).astype(np.float32)
    patches = example.to_patches(images)
    assert patches.shape == (5, 3, 2, 16)
    np.testing.assert_array_equal(patches[1, 0, 0], images[1, :4, :4].ravel())
    np.testing.assert_array_equal(patches[2, 1, 1].reshape(4, 4)[:, :3], images[2, 4:8, 4:])
    np.testing.assert_array_equal(example.to_images(patches, (10, 7)), images)


@pytest.mark.parametrize("name", example.METHODS)
def test_the_index_says_what_the_value_is(name):
    quantizer = example.METHODS[name](16, 8)
    x = quantizer.prepare(X[..., : quantizer.dim])
    learned, state = quantizer.init(KEY, x)
    value, index = quantizer.at_rest(KEY, x, learned, state)
    assert index.shape == x.shape[:-1] and index.min() >= 0 and index.max() < 16
    assert len(np.unique(index)) > 4
    np.testing.assert_allclose(quantizer.codes_of(index, learned, state), value, atol=1e-5)


@pytest.mark.parametrize("name", example.METHODS)
def test_the_loss_reaches_the_encoder_and_the_codes(name):
    quantizer = example.METHODS[name](16, 8)
    x = quantizer.prepare(X[..., : quantizer.dim])
    learned, state = quantizer.init(KEY, x)

    def loss(x, learned):
        value, _, extra = quantizer(KEY, x, learned, state, 0.5)
        return jnp.mean((value - 0.3) ** 2) + extra

    slope, of_learned = jax.jit(jax.grad(loss, (0, 1)))(x, learned)
    assert jnp.isfinite(slope).all() and (jnp.abs(slope).max((1, 2, 3)) > 0).all()
    for leaf in jax.tree.leaves(of_learned):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0
    assert bool(of_learned) == (name in ("vq", "gumbel", "reinmax"))


def test_codebooks_follow_their_vectors_and_unused_codes_come_back():
    """With four clouds, codes that all begin at one point spread out, and the error falls."""
    centers = 5 * jnp.eye(4, 8)
    clouds = centers[jnp.arange(400) % 4] + 0.1 * jax.random.normal(KEY, (400, 8))
    for name in ("vq_ema", "vq_rotation", "residual"):
        quantizer = example.METHODS[name](16, 8)
        x = quantizer.prepare(clouds[:, : quantizer.dim])
        learned, state = quantizer.init(KEY, jnp.tile(x[:1], (100, 1)))
        errors, used = [], []
        for key in jax.random.split(KEY, 300):
            value, index, _ = quantizer(KEY, x, learned, state, 0.5)
            errors.append(float(jnp.mean((value - x) ** 2)))
            used.append(len(np.unique(index)))
            learned, state = quantizer.follow(key, learned, state, x, index)
        assert errors[-1] < 0.1 * errors[0] and used[0] == 1, name
        assert used[-1] >= 14 or name == "residual", name


def test_prior_counts_bits_and_draws_what_it_has_learned():
    """Codes that alternate need almost no bits, and even ones need all of theirs."""
    config = {"codes": 4, "units": 16, "seed": 0, "prior_steps": 400, "batch_size": 32}
    rng = np.random.default_rng(0)
    alternating = (np.arange(6) + rng.integers(2, size=(200, 1))).reshape(-1, 2, 3) % 2
    even = rng.integers(4, size=(200, 2, 3))
    bits, drawn = example.learn_prior(alternating[:100], alternating[100:], config)
    assert 1 - 0.05 < bits < 1.2  # which of the two sequences
    flat = np.asarray(drawn).reshape(len(drawn), -1)
    assert ((flat[:, 1:] + flat[:, :-1]) == 1).mean() > 0.95
    bits, _ = example.learn_prior(even[:100], even[100:], config | {"prior_steps": 0})
    assert 0.8 * 6 * 2 < bits < 1.5 * 6 * 2


def test_command_line(tmp_path):
    np.savez(tmp_path / "bars.npz", images=bars())
    flags = "--codes 16 --dim 4 --units 8 --steps 100 --prior-steps 50 --batch-size 16"
    out = tmp_path / "run"
    assert run(*flags.split(), "--data", tmp_path / "bars.npz", "--out", out, example=example) == 0
    results = json.loads((out / "metrics.json").read_text())["results"]
    assert set(results) == set(example.METHODS)
    for name, row in results.items():
        first, last = row["history"][0][0], row["history"][-1][0]
        assert last == row["error"] and math.isfinite(row["bits"]) and row["bits"] > 0, name
        if name not in ("vq", "gumbel", "reinmax"):
            assert last < first, name
        assert 1 <= row["perplexity"] <= row["codes_used"] + 1e-3 <= 16 + 1e-3, name
    for picture in ("vq_vae", "reconstructions", "samples"):
        assert (out / f"{picture}.png").stat().st_size > 3000
