"""Latent trees: data of a tree, the largest tree, information and errors compared with NumPy, a small run."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

import latent_tree as example
from command_lines import run

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


def is_tree(tree):
    n = len(tree)
    reached = np.linalg.matrix_power(tree + np.eye(n), n) > 0
    return (tree == tree.T).all() and tree.sum() == 2 * (n - 1) and reached.all()


def test_rows_of_a_known_tree():
    """Each edge is a relation: its ends share information, of which correlations miss the even half."""
    x, tree = example.known_tree(np.random.default_rng(0), 9, 5000)
    assert is_tree(tree) and x.shape == (5000, 9)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, rtol=1e-5)
    edges = np.argwhere(np.triu(tree))
    shared = example.information_of_bins(x)[tuple(edges.T)]
    seen = example.information_of_correlations(x)[tuple(edges.T)]
    assert (shared > 0.15).all() and 0 < (seen < 0.02).sum() < len(edges)


def test_the_largest_tree_is_the_best_of_all():
    rng = np.random.default_rng(1)
    pairs = list(itertools.combinations(range(5), 2))
    for _ in range(5):
        weights = rng.normal(size=(5, 5))
        weights += weights.T
        found = example.largest_tree(weights)
        assert is_tree(found)
        totals = []
        for edges in itertools.combinations(pairs, 4):
            tree = np.zeros((5, 5), bool)
            for i, j in edges:
                tree[i, j] = tree[j, i] = True
            if is_tree(tree):
                totals.append((weights * tree).sum())
        assert len(totals) == 125 and np.isclose((weights * found).sum(), max(totals))


def test_information_of_pairs():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2000, 3))
    x[:, 2] = 0.8 * x[:, 0] + 0.6 * x[:, 2]
    r = np.corrcoef(x[:, 0], x[:, 2])[0, 1]
    np.testing.assert_allclose(
        example.information_of_correlations(x)[0, 2], -0.5 * np.log(1 - r**2), rtol=1e-6
    )
    bins = [np.searchsorted(np.quantile(c, np.linspace(0, 1, example.BINS + 1)[1:-1]), c) for c in x.T]
    found = example.information_of_bins(x)
    for i, j in ((0, 1), (0, 2)):
        np.testing.assert_allclose(found[i, j], mutual_info_score(bins[i], bins[j]), rtol=1e-4)


def test_errors_of_predictions():
    """A loop over rows and variables; and an error on new rows that is the noise of what was added."""
    rng = np.random.default_rng(3)
    x, parts, bias = rng.normal(size=(4, 3)), rng.normal(size=(4, 3, 3)), rng.normal(size=3)
    trees = np.array([[[0, 1, 0], [1, 0, 1], [0, 1, 0]], [[0, 1, 1], [1, 0, 0], [1, 0, 0]]])
    found = example.error_of(*(jnp.asarray(y, jnp.float32) for y in (trees, x, parts, bias)))
    for tree, error in zip(trees, found, strict=True):
        each = [
            (x[r, i] - bias[i] - sum(tree[i, j] * parts[r, i, j] for j in range(3))) ** 2
            for r in range(4)
            for i in range(3)
        ]
        np.testing.assert_allclose(error, np.mean(each), rtol=1e-5)
    x = rng.normal(size=(8000, 2))
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]  # each given the other has a variance of 0.36
    pair = np.array([[False, True], [True, False]])
    x = x.astype(np.float32)
    assert abs(example.test_error(pair, x[:4000], x[4000:]) - 0.36) < 4.5 * 0.36 * np.sqrt(2 / 4000)


def test_every_method_has_the_error_of_the_only_tree():
    """Of two variables there is one tree: nothing is drawn, and relaxed trees are that tree."""
    model = example.Trees(2)
    rng = np.random.default_rng(4)
    model.functions[...] = jnp.asarray(rng.normal(size=model.functions[...].shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(50, 2)), jnp.float32)
    pair = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    expected = example.error_of(pair, x, model.parts(x), model.bias[...])
    for method in example.METHODS:
        found = example.mean_error(method, model, jax.random.key(0), x, 0.5, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_command_line(tmp_path, capsys):
    rng = np.random.default_rng(5)
    images = rng.random((60, 3, 3, 1, 1)).repeat(4, 3).repeat(4, 4).swapaxes(2, 3).reshape(60, 12, 12)
    np.savez(tmp_path / "images.npz", images=images)
    flags = "--variables 5 --rows 500 --steps 300 --batch-size 64 --samples 4"
    out = tmp_path / "run"
    assert run(*flags.split(), "--data", tmp_path / "images.npz", "--out", out, example=example) == 0
    results = json.loads((out / "metrics.json").read_text())["results"]
    names = [*example.METHODS, *example.BASELINES]
    assert list(results["known"]) == list(results["patches"]) == names
    for kind, n in (("known", 5), ("patches", 9)):
        for row in results[kind].values():
            assert len(row["tree"]) == n - 1 and row["error"] > 0
    for name in ("tree_sample", "relaxed_tree", "Chow-Liu, bins"):
        assert results["known"][name]["right"][-1] >= 0.75, name  # .4 by chance
    assert (out / "latent_tree.png").stat().st_size > 10_000
    np.savez(tmp_path / "small.npz", images=images[:, :4, :4])
    assert run("--data", tmp_path / "small.npz", "--out", tmp_path / "none", example=example) == 2
    assert "give larger images" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
