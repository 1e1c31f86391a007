"""The world model: its sequences, its loss written out, and a run that learns to look ahead."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import relaxit_jax as rj
import world_model as example
from command_lines import run

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(8)
DIGITS = np.random.default_rng(8).random((5, example.DIGIT, example.DIGIT)).astype(np.float32)


def test_digits_move_evenly_and_stay_inside():
    dot = jnp.zeros((1, example.DIGIT, example.DIGIT)).at[0, 0, 0].set(1)
    frames = np.asarray(example.moving_digits(KEY, dot, 50, 40)).reshape(40, 50, example.CANVAS, -1)
    assert (frames.sum((2, 3)) == 1).all()
    place = np.stack(np.unravel_index(frames.reshape(40, 50, -1).argmax(-1), frames.shape[2:]), -1)
    room = example.CANVAS - example.DIGIT
    assert place.min() == 0 and place.max() == room  # to the edges, and no further
    speed = np.abs(np.diff(place, axis=0))
    inside = (place[:-1] > 2.5) & (place[:-1] < room - 2.5)
    for sequence, axis in np.ndindex(50, 2):
        seen = speed[inside[:, sequence, axis], sequence, axis]
        assert len(seen) < 2 or np.ptp(seen) <= 1  # even, up to the rounding to pixels
    steps = np.sign(np.diff(place, axis=0))
    assert (np.abs(np.diff(steps, axis=0)).max(0) == 2).any()  # some bounce


def hand_written(model, key, frames, free):
    """The same loss without this library, except for the noise of its exact draws."""
    keys = jax.random.split(key, len(frames))
    batch = frames.shape[1]
    h, z = jnp.zeros((batch, model.units)), jnp.zeros((batch, *model.shape))
    total = parts = 0.0
    for key, x in zip(keys, frames, strict=True):
        h, _ = model.cell(h, nnx.silu(model.mix(z.reshape(batch, -1))))
        p, q = (
            0.99 * jax.nn.softmax(outputs.reshape(batch, *model.shape)) + 0.01 / model.shape[1]
            for outputs in (
                model.prior_net(h), model.posterior_net(jnp.concatenate([h, model.encoder(x)], -1))
            )
        )  # fmt: skip
        hard = jax.lax.stop_gradient(rj.straight_through_categorical(key, jnp.log(q)))
        z = hard + q - jax.lax.stop_gradient(q)
        logits = model.decoder(jnp.concatenate([h, z.reshape(batch, -1)], -1))
        error = -jnp.sum(x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits), -1)
        kl = lambda q, p: jnp.sum(q * (jnp.log(q) - jnp.log(p)), (1, 2))
        still = jax.lax.stop_gradient
        penalty = 0.5 * jnp.maximum(kl(still(q), p), free) + 0.1 * jnp.maximum(kl(q, still(p)), free)
        total += jnp.mean(error + penalty) / len(frames)
        parts += jnp.mean(kl(q, p)) / len(frames)
    return total, parts


@pytest.mark.parametrize("free", [0.0, 0.02])
def test_loss_and_gradient_are_those_of_a_hand_written_model(free):
    model = example.WorldModel(3, 4, 8, 0)
    frames = example.moving_digits(KEY, jnp.asarray(DIGITS), 6, 5)
    graph, weights = nnx.split(model)
    draw = lambda key, logits: rj.straight_through_categorical(key, logits)

    def ours(weights):
        total, parts = example.loss(nnx.merge(graph, weights), KEY, frames, draw, free)
        return total, parts["kl"]

    theirs = lambda weights: hand_written(nnx.merge(graph, weights), KEY, frames, free)
    (a, a_kl), a_slope = jax.jit(jax.value_and_grad(ours, has_aux=True))(weights)
    (b, b_kl), b_slope = jax.jit(jax.value_and_grad(theirs, has_aux=True))(weights)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(a_kl, b_kl, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(a_slope), jax.tree.leaves(b_slope), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
        assert np.abs(x).max() > 0


def test_free_nats_stop_the_gradient_of_small_terms_alone():
    posterior = jnp.array([[[2.0, 0.0]], [[0.1, 0.0]]])  # KL .33 and .001 to an even prior
    prior = jnp.zeros((2, 1, 2))
    kl = np.asarray(rj.categorical_kl(posterior, prior)[:, 0])
    assert kl[1] < 0.05 < kl[0]
    penalty, found = example.two_sided_kl(posterior, prior, 0.05)
    np.testing.assert_allclose(found, kl)
    np.testing.assert_allclose(penalty, [0.6 * kl[0], 0.6 * 0.05], rtol=1e-6)
    slopes = jax.grad(lambda q, p: example.two_sided_kl(q, p, 0.05)[0].sum(), (0, 1))(posterior, prior)
    whole = jax.grad(lambda q, p: rj.categorical_kl(q, p).sum(), (0, 1))(posterior, prior)
    for slope, full, weight in zip(slopes, whole, (0.1, 0.5), strict=True):
        np.testing.assert_allclose(slope[0], weight * full[0], rtol=1e-5)
        np.testing.assert_array_equal(slope[1], 0)


def test_command_line(tmp_path):
    flags = "--method straight_through --variables 4 --classes 4 --units 32 --steps 200 --batch-size 16"
    flags += " --length 8 --context 4 --horizon 4 --learning-rate 0.003"
    assert run(*flags.split(), "--out", tmp_path / "run", example=example) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (row,) = metrics["results"].values()
    assert row["imagined"] < metrics["last_frame_repeated"]  # better than to expect that nothing moves
    assert len(metrics["error_by_frame"]["straight_through"]) == 8
    assert (tmp_path / "run" / "world_model.png").stat().st_size > 10_000
