"""The network that is pruned by gates: its penalty, its counts, and the smaller network that is left."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import relaxit_jax as rj
import sparse_network as example

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(6)
SIZES = (7, 6, 5, example.CLASSES)
RNG = np.random.default_rng(6)
X, LABELS = RNG.normal(size=(20, 7)).astype(np.float32), RNG.integers(0, example.CLASSES, 20)


def random_network():
    """Biases leave no neuron dead, and some gates are closed at test time."""
    network = example.init(KEY, SIZES)
    biases = [jnp.linspace(0.5, 1, b.size) for b in network.biases]
    gates = [jnp.asarray(RNG.permutation(np.linspace(-3.5, 3.5, g.size)), jnp.float32) for g in network.gates]
    return example.Network(network.weights, biases, gates)


NETWORK = random_network()


def gated_matrices(network, gates):
    """Matrices that hold 0 where the gate of the input or of the output is 0."""
    outputs = [*gates[1:], np.ones(example.CLASSES)]
    return [
        np.asarray(gate)[:, None] * np.asarray(w) * (np.asarray(out) != 0)
        for w, gate, out in zip(network.weights, gates, outputs, strict=True)
    ]


def test_the_penalty_is_the_expected_share_of_weights_that_are_not_0():
    n = 20_000
    gates = jax.jit(example.draw_gates, static_argnums=2)(KEY, NETWORK, n)
    kept = [np.count_nonzero(gate, axis=1) for gate in gates]
    counts = sum(a * b for a, b in zip(kept, [*kept[1:], example.CLASSES], strict=True))
    matrices = gated_matrices(NETWORK, [gate[0] for gate in gates])
    assert counts[0] == sum(np.count_nonzero(w) for w in matrices)
    shares = counts / sum(w.size for w in NETWORK.weights)
    assert abs(example.expected_share(NETWORK) - shares.mean()) < 4.5 * shares.std() / n**0.5
    assert 0.2 < shares.mean() < 0.8 and len(np.unique(counts)) > 20  # each image has gates of its own


def test_the_smaller_network_is_the_gated_one():
    gates = example.test_gates(NETWORK)
    kept, weights, biases = example.prune(NETWORK, gates)
    count = int(example.weights_kept([np.asarray(gate) != 0 for gate in gates]))
    assert count == sum(w.size for w in weights)
    assert count == sum(np.count_nonzero(w) for w in gated_matrices(NETWORK, gates))
    assert count < sum(w.size for w in NETWORK.weights)  # there was something to prune
    x = X[:, kept]
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = (np.maximum(x, 0) if layer else x) @ w + b
    np.testing.assert_allclose(x, example.forward(NETWORK, X, gates), rtol=1e-4, atol=1e-4)


def test_both_parts_of_the_loss_reach_every_gate():
    """The gradient of the data term, averaged over draws, and of the penalty, known in closed form."""
    gradient = jax.jit(jax.grad(example.loss), static_argnames="gated")
    key = jax.random.key(0)
    x, labels = np.tile(X, (100, 1)), np.tile(LABELS, 100)
    free, priced = (gradient(NETWORK, key, x, labels, price, gated=True).gates for price in (0.0, 5.0))
    probabilities = [np.asarray(rj.hard_concrete_l0(g, example.TAU)) for g in NETWORK.gates]
    sums = [*(p.sum() for p in probabilities), example.CLASSES]
    total = sum(w.size for w in NETWORK.weights)
    for layer, (a, b, p) in enumerate(zip(free, priced, probabilities, strict=True)):
        assert np.all(np.abs(a) > 1e-6)
        others = sums[layer + 1] + (sums[layer - 1] if layer else 0)
        np.testing.assert_allclose(b - a, 5 * p * (1 - p) * others / total, rtol=1e-3, atol=1e-5)


def test_magnitude_keeps_what_is_largest():
    count = 60
    masks = example.largest_weights(NETWORK, count)
    kept = np.concatenate([np.abs(w)[m == 1] for w, m in zip(NETWORK.weights, masks, strict=True)])
    lost = np.concatenate([np.abs(w)[m == 0] for w, m in zip(NETWORK.weights, masks, strict=True)])
    assert len(kept) == count and kept.min() > lost.max()

    # a dead pixel goes first, however large its weights are; and neurons go whole
    x = X.copy()
    x[:, 3] = 0
    total, counts = sum(w.size for w in NETWORK.weights), []
    for limit in range(total, 0, -10):
        masks = example.largest_neurons(NETWORK, x, limit)
        counts.append(int(sum(m.sum() for m in masks)))
        assert counts[-1] <= limit and not masks[0][3].any()
        rows = [m.any(1) for m in masks]
        for mask, inputs, outputs in zip(masks, rows, [*rows[1:], np.ones(10, bool)], strict=True):
            assert np.array_equal(mask, np.outer(inputs, outputs))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 8


def test_training_keeps_pruned_weights_at_0():
    masks = example.largest_weights(NETWORK, 60)
    trained = example.train(NETWORK, masks, KEY, X, LABELS, 0.0, epochs=2, batch=5)
    for w, before, mask in zip(trained.weights, NETWORK.weights, masks, strict=True):
        assert np.array_equal(np.asarray(w) != 0, mask == 1)
        assert not np.allclose(w, before * mask)
    assert all(np.array_equal(a, b) for a, b in zip(trained.gates, NETWORK.gates, strict=True))


def test_the_example_trades_weights_for_accuracy(tmp_path, monkeypatch):
    digits = load_digits()  # of 8 by 8 pixels, and quick to read
    images = (digits.images / 16).astype(np.float32)
    sets = [(images[:1400], digits.target[:1400]), (images[1400:], digits.target[1400:])]
    monkeypatch.setattr(example, "load_labelled", lambda: sets)
    flags = "--penalties 0.1,3 --seeds 1 --epochs 40 --hidden 40 20 --out"
    example.main([*flags.split(), str(tmp_path)], standalone_mode=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["weights"] == 64 * 40 + 40 * 20 + 20 * 10
    assert min(metrics["dense"]) > 0.8  # chance is 0.1
    for light, heavy in metrics["runs"]:
        for row in (light, heavy):
            a, b, c = row["neurons"]
            count, score = row["hard concrete gates"]
            assert count == a * b + b * c + 10 * c and score > 0.5
            assert row["magnitude of weights"][0] == count >= row["magnitude of neurons"][0]
        assert heavy["hard concrete gates"][0] < 0.5 * light["hard concrete gates"][0]
        assert light["hard concrete gates"][0] > 0.5 * metrics["weights"]
    assert (tmp_path / "sparse_network.png").stat().st_size > 10_000


def test_a_list_of_penalties_is_read_or_explained():
    penalties = next(option.type for option in example.main.params if option.name == "penalties")
    assert penalties.convert("0.3,1e1", None, None) == (0.3, 10.0)
    for wrong in ("1,x", "", "-1", "inf", "1,nan", "1," * 20 + "1"):
        with pytest.raises(example.click.BadParameter, match=r"is not a list such as 0.3,1,3|at most 16"):
            penalties.convert(wrong, None, None)
