"""Segments: grammar, bounds and their gradients against all sequences, scores of known tags, a small run."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp

import segment as example
from command_lines import run

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(11)
CLASSES, LENGTH, PIXELS = 3, 4, 5
PATHS = np.array(list(itertools.product(range(CLASSES), repeat=LENGTH)))


@functools.cache
def small():
    """A model with random weights, and a sequence of images."""
    model = example.Model(CLASSES, jnp.full(PIXELS, 0.4), 6, 0)
    graph, weights = nnx.split(model)
    leaves, tree = jax.tree.flatten(weights)
    rng = np.random.default_rng(0)
    weights = tree.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])
    return graph, weights, jnp.asarray(rng.integers(0, 2, (1, LENGTH, PIXELS)), jnp.float32)


def enumerated(weight):
    """-log sum_z p(z) p(x | z)^weight over all sequences, in nats per image."""
    graph, weights, x = small()
    model = nnx.merge(graph, weights)
    logits = np.asarray(model.decoder(jnp.eye(CLASSES)), float)
    pixels = np.asarray(x[0], float)
    of_class = pixels @ logits.T - np.log1p(np.exp(logits)).sum(-1)
    start, move = (np.asarray(jax.nn.log_softmax(w[...]), float) for w in (model.start, model.move))
    prior = start[PATHS[:, 0]] + move[PATHS[:, :-1], PATHS[:, 1:]].sum(-1)
    return -logsumexp(prior + weight * of_class[np.arange(LENGTH), PATHS].sum(-1)) / LENGTH


def test_sequences_follow_the_grammar_and_show_their_digits():
    labels = np.random.default_rng(1).integers(5, size=400)
    law = example.grammar(5)
    np.testing.assert_allclose(law.sum(-1), 1)
    assert (np.diag(law) == example.STAY).all() and ((law > 0).sum(-1) == 3).all()
    z, index = example.write_sequences(np.random.default_rng(2), labels, 5000, 6)
    np.testing.assert_array_equal(labels[index], z)
    seen = np.zeros((5, 5))
    np.add.at(seen, (z[:, :-1], z[:, 1:]), 1)
    total = seen.sum(-1, keepdims=True)
    assert (np.abs(seen / total - law) < 4.8 * np.sqrt(law * (1 - law) / total) + 1e-12).all()


def test_squares_are_on_where_they_have_ink():
    images = np.zeros((1, 6, 8), np.float32)
    images[0, :4, 4:] = 1
    images[0, 4:, :4] = 1  # half of its square is beyond the image
    np.testing.assert_array_equal(example.coarse_bits(images), [[0, 1, 1, 0]])


def test_kl_is_the_sum_over_all_sequences():
    rng = np.random.default_rng(3)
    q, p = ([rng.normal(size=(LENGTH, CLASSES)), rng.normal(size=(CLASSES, CLASSES))] for _ in range(2))
    logs = []
    for unary, move in (q, p):
        log = unary[np.arange(LENGTH), PATHS].sum(-1) + move[PATHS[:, :-1], PATHS[:, 1:]].sum(-1)
        logs.append(log - logsumexp(log))
    expected = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]))
    found = example.kl(*(tuple(map(jnp.float32, x)) for x in (q, p)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_marginal_is_the_sum_over_all_sequences(weight):
    graph, weights, x = small()
    found = example.negative_bound("marginal", nnx.merge(graph, weights), KEY, x, weight, 0.5, 4)
    np.testing.assert_allclose(found, enumerated(weight), rtol=1e-5)
    if weight == 1:
        _, nats = example.posterior("marginal", nnx.merge(graph, weights), x)
        np.testing.assert_allclose(nats, found, rtol=1e-6)


@pytest.mark.parametrize("method", ["chain_sample", "rloo"])
def test_draws_have_the_exact_bound_and_gradient_in_the_mean(method):
    """q is the posterior, so the bound is tight; f is linear in z, so neither gradient is biased."""
    graph, weights, x = small()
    flat, unflatten = jax.flatten_util.ravel_pytree(weights)

    def bound(flat, key, method):
        return example.negative_bound(method, nnx.merge(graph, unflatten(flat)), key, x, 0.3, 0.5, 4)

    value, exact = jax.jit(jax.value_and_grad(lambda flat: bound(flat, KEY, "marginal")))(flat)
    each = jax.jit(jax.vmap(jax.value_and_grad(lambda flat, key: bound(flat, key, method)), (None, 0)))
    values, rows = (np.asarray(y, float) for y in each(flat, jax.random.split(KEY, 5000)))
    assert abs(values.mean() - value) < 4.5 * values.std() / np.sqrt(len(values)) + 1e-5
    error = rows.std(0) / np.sqrt(len(rows))
    assert (np.abs(rows.mean(0) - exact) < 4.8 * error + 1e-5).all()
    assert np.abs(exact).max() > 10 * error.max()


def test_scores_by_hand():
    true = np.array([[0, 0, 1, 1, 2], [2, 2, 2, 0, 0]])
    found = np.array([[1, 1, 0, 0, 0], [2, 2, 1, 1, 1]])
    tags, name = example.matched(found, true, 3)
    np.testing.assert_array_equal(name, [1, 0, 2])
    np.testing.assert_array_equal(tags, [[0, 0, 1, 1, 1], [2, 2, 0, 0, 0]])
    accuracy, f1 = example.scores(tags, true)
    assert accuracy == 0.8 and f1 == 2 * 1 / (2 + 3)


def test_command_line(tmp_path, capsys):
    """The grammar is found where classes are easily told apart."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 300), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = np.zeros((count, 8, 8), np.uint8)
        for c, (y, x) in enumerate(itertools.product((0, 4), repeat=2)):
            images[labels == c, y : y + 4, x : x + 4] = 255
        images = np.where(rng.random(images.shape) < 0.1, 255 - images, images)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{name}-ubyte").write_bytes(head + array.tobytes())
    flags = "--sequences 100 --test-sequences 40 --length 8 --hidden 8 --steps 150 --seeds 2 --batch-size 16"
    out = tmp_path / "run"
    assert run(*flags.split(), "--data", folder, "--out", out, example=example) == 0
    results = json.loads((out / "metrics.json").read_text())["results"]
    assert list(results) == list(example.COLORS)
    for row in results.values():
        assert len(row["accuracy"]) == 2 and min(row["accuracy"]) > 0.4
        np.testing.assert_allclose(np.sum(row["transitions"], -1), 1, rtol=1e-4)
    assert max(results["marginal"]["accuracy"]) > 0.7  # .25 by chance; two digits may share a class
    assert np.mean(results["marginal"]["nats"]) < np.mean(results["independent"]["nats"])
    assert (out / "segment.png").stat().st_size > 10_000
    assert run("--data", "digits", "--out", tmp_path / "none", example=example) == 2
    assert "no labelled data 'digits'; use mnist5k, or a folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
