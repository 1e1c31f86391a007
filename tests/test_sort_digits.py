"""Sorting digits: the loss and the scores computed separately, convolutions, a run better than chance."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

import relaxit_jax as rj
import sort_digits
from command_lines import run

KEY = jax.random.key(5)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


def test_network_is_two_convolutions_and_two_layers():
    images = np.random.default_rng(0).uniform(size=(3, 28, 28)).astype(np.float32)
    network = sort_digits.Network(4, 0)
    convolve = lambda x, layer, size: (
        jax.lax.conv_general_dilated(
            x,
            layer.kernel[...].reshape(size, size, x.shape[-1], -1),
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        + layer.bias[...]
    )
    x = jax.nn.relu(convolve(jnp.asarray(images)[..., None], network.first, 5))
    x = jax.nn.relu(convolve(x, network.second, 2))
    x = network.last(jax.nn.relu(network.third(x.reshape(3, -1))))
    weights = network(sort_digits.windows(images)[None])
    np.testing.assert_allclose(weights, x[None], atol=1e-5)


def test_loss_is_the_share_of_places_that_are_allowed():
    digits = np.array([[7, 2, 7, 0], [1, 1, 1, 3]])
    weights = jnp.float32(np.random.default_rng(1).normal(size=(2, 4, 4)))
    cost = lambda weights: sort_digits.misplacement(sort_digits.by_weights(KEY, weights, 0.7), digits)
    loss, slope = jax.jit(jax.value_and_grad(cost))(weights)
    z = np.asarray(jax.jit(rj.gumbel_sinkhorn)(KEY, weights, 0.7))
    allowed = [{7: [2, 3], 2: [1], 0: [0]}, {1: [0, 1, 2], 3: [3]}]
    shares = [z[b, i, allowed[b][digit]].sum() for b in range(2) for i, digit in enumerate(digits[b])]
    np.testing.assert_allclose(loss, -np.mean(np.log(shares)), rtol=1e-4)
    assert jnp.isfinite(slope).all() and (jnp.abs(slope).max((1, 2)) > 0).all()


def test_one_number_for_each_image_sorts_from_the_smallest():
    """Cold and far apart, images with larger numbers are at later places; as are orders at test time."""
    numbers = jnp.array([[30.0, -20.0, 80.0], [0.0, 200.0, 100.0]])[..., None]
    order = np.array([[1, 0, 2], [0, 2, 1]])
    np.testing.assert_array_equal(sort_digits.best_order(numbers), order)
    permutation = np.asarray(sort_digits.by_numbers(KEY, numbers, 0.01))
    expected = np.swapaxes(np.eye(3)[order], -1, -2)
    np.testing.assert_allclose(permutation, expected, atol=1e-5)
    digits = np.array([[4, 2, 9], [1, 7, 3]])
    assert sort_digits.misplacement(permutation, digits) < 1e-4
    assert sort_digits.misplacement(permutation, digits[::-1]) > 1


def test_scores_of_orders():
    weights = np.random.default_rng(2).normal(size=(20, 4, 4))
    for matrix, order in zip(weights, sort_digits.best_assignment(weights), strict=True):
        best = max(itertools.permutations(range(4)), key=lambda images: matrix[images, range(4)].sum())
        assert tuple(order) == best
    digits = np.array([[3, 1, 3], [0, 5, 2]])
    assert sort_digits.scores(digits, np.array([[1, 2, 0], [0, 2, 1]])) == (1.0, 1.0)
    assert sort_digits.scores(digits, np.array([[1, 0, 2], [0, 1, 2]])) == (4 / 6, 0.5)
    read = np.eye(10)[[[3, 1, 3], [0, 5, 2]]]
    np.testing.assert_array_equal(sort_digits.by_class(read), [[1, 0, 2], [0, 2, 1]])


def test_sorts_better_than_chance_after_a_hundred_steps(tmp_path):
    flags = [
        "--lengths",
        3,
        "--steps",
        100,
        "--seeds",
        1,
        "--copies",
        1,
        "--batch-size",
        16,
        "--test-sequences",
        200,
    ]
    assert run(*flags, "--out", tmp_path, example=sort_digits) == 0
    rows = {row["from"]: row for row in json.loads((tmp_path / "metrics.json").read_text())["results"]}
    # any order is right for a sixth of sequences of different digits: 72 %; of two alike for a third: 27 %
    chance = 0.72 / 6 + 0.27 / 3 + 0.01
    for row in rows.values():
        assert binom.sf(200 * row["sequences"][0], 200, chance) < 1e-6
        assert row["positions"][0] > row["sequences"][0]
    assert (tmp_path / "sort_digits.png").stat().st_size > 10_000
