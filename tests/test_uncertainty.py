"""The last layer's Laplace approximation and its predictions, each against a separate calculation."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

import foreign
import uncertainty as example

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
RNG = np.random.default_rng(5)
PHI = np.column_stack([RNG.normal(size=(40, 2)), np.ones(40)])  # two features and the bias
LABELS = RNG.integers(0, 3, 40)
PRECISION = 0.7
WEIGHTS, COVARIANCE = example.laplace(PHI, LABELS, PRECISION, np.zeros((3, 3)))


def test_mode_and_covariance_are_those_of_the_actual_loss():
    def loss(flat):
        weights = flat.reshape(3, 3)
        nll = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(PHI) @ weights, LABELS).sum()
        return nll + PRECISION / 2 * jnp.sum(weights**2)

    flat = jnp.asarray(WEIGHTS.ravel(), jnp.float32)
    slope, hessian = jax.jit(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x)))(flat)
    np.testing.assert_allclose(slope, 0, atol=2e-3)
    np.testing.assert_allclose(
        COVARIANCE.reshape(9, 9), np.linalg.inv(np.asarray(hessian, float)), rtol=1e-3, atol=1e-5
    )


def weight_draws(n):
    return RNG.multivariate_normal(WEIGHTS.ravel(), COVARIANCE.reshape(9, 9), n).reshape(n, 3, 3)


def test_the_gaussian_of_the_logits_is_that_of_drawn_weights():
    loc, covariance = example.logits_gaussian(PHI[:4], WEIGHTS, COVARIANCE)
    logits = np.einsum("nd,sdk->nsk", PHI[:4], weight_draws(n := 100_000))
    errors = logits - np.asarray(loc)[:, None]
    variances = np.diagonal(covariance, axis1=1, axis2=2)
    assert np.all(np.abs(errors.mean(1)) < 4.5 * np.sqrt(variances / n))
    products = errors[..., :, None] * errors[..., None, :]
    assert np.all(np.abs(products.mean(1) - covariance) < 4.5 * products.std(1) / n**0.5)


def test_both_monte_carlos_have_the_mean_of_softmax():
    """For two classes it is an integral over one number; for three, a mean over weights drawn here."""
    loc, covariance = np.array([[0.5, -1.0], [2.0, 0.3]]), np.array([[[1.5, 0.4], [0.4, 0.8]]] * 2)
    nodes, mass = np.polynomial.hermite_e.hermegauss(60)
    gap = (loc[:, 0] - loc[:, 1])[:, None] + np.sqrt(1.5 + 0.8 - 0.8) * nodes
    expected = (mass * jax.nn.sigmoid(gap)).sum(1) / mass.sum()
    p = example.monte_carlo(jax.random.key(0), loc, covariance, draws=20_000)
    np.testing.assert_allclose(p[:, 0], expected, atol=4.5 * 0.5 / 20_000**0.5)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)

    drawn = jax.nn.softmax(np.einsum("nd,sdk->snk", PHI[:4], weight_draws(20_000)))
    bound = 4.5 * np.std(drawn, 0) * (2 / 20_000) ** 0.5
    scale_tril = np.linalg.cholesky(COVARIANCE.reshape(9, 9))
    p = example.monte_carlo_of_weights(jax.random.key(1), PHI[:4], WEIGHTS, scale_tril, draws=20_000)
    assert np.all(np.abs(p - drawn.mean(0)) < bound)
    law = example.logits_gaussian(PHI[:4], WEIGHTS, COVARIANCE)
    p = example.monte_carlo(jax.random.key(2), *law, draws=20_000)
    assert np.all(np.abs(p - drawn.mean(0)) < bound)


def random_law(n=5, k=example.CLASSES):
    root = RNG.normal(size=(n, k, k)) / 2
    return jnp.asarray(2 * RNG.normal(size=(n, k))), jnp.asarray(root @ root.swapaxes(1, 2))


def test_what_the_bridge_sees_of_a_covariance():
    """Its mean has no use for the scale, so its scores equal those from MAP; the others use it."""
    loc, covariance = random_law()
    for name, predict in example.ONE_PASS.items():
        p, wide = predict(loc, covariance), predict(loc, 9 * covariance)
        blind = np.allclose(p, wide, atol=1e-5)
        assert blind == (name in ("MAP", "bridge"))
        if not blind:
            assert np.all(example.entropy(wide) > example.entropy(p))
        # softmax does not see the sum of the logits, whatever its law is
        np.testing.assert_allclose(predict(loc + 3, covariance + 2), p, atol=1e-4)


def test_the_normalised_bridge_is_the_formula_of_the_paper():
    loc, covariance = map(np.asarray, random_law())
    k = example.CLASSES
    centre = np.eye(k) - 1 / k
    for one, matrix, found in zip(loc, covariance, example.normalised_bridge(loc, covariance), strict=True):
        mean, variance = centre @ one, np.diag(centre @ matrix @ centre)
        ratio = variance.mean() / np.sqrt(k / 2)
        mean, variance = mean / np.sqrt(ratio), variance / ratio
        alpha = (1 - 2 / k + np.exp(mean) / k**2 * np.exp(-mean).sum()) / variance
        np.testing.assert_allclose(found, alpha / alpha.sum(), rtol=1e-4)


def test_scores_are_those_of_other_calculations():
    p, labels = RNG.dirichlet(np.ones(4), 300), RNG.integers(0, 4, 300)
    confidence, right = p.max(1), p.argmax(1) == labels
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence >= low) & (confidence < low + 0.1)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert example.calibration_error(p, labels, bins=10) == pytest.approx(error, abs=1e-9)

    other = RNG.dirichlet(3 * np.ones(4), 200)  # flatter: of larger entropy
    score = lambda p: -(p * np.log(p)).sum(1)
    larger = np.mean(score(other)[:, None] > score(p)[None])
    assert example.auroc(p, other) == pytest.approx(larger, abs=1e-3)
    assert larger > 0.6


def test_letters_have_the_box_and_the_ink_of_digits():
    images = foreign.letters().reshape(-1, len(foreign.LETTERS), 28, 28)
    rows, columns = images.max((0, 1, 3)) > 0.1, images.max((0, 1, 2)) > 0.1
    assert np.flatnonzero(rows)[[0, -1]].tolist() == np.flatnonzero(columns)[[0, -1]].tolist() == [4, 23]
    stem = images[:, foreign.LETTERS.index("T")]  # its bar is above, its stem below
    assert np.all(stem[:, 4:9].max(1).sum(1) > stem[:, 17:20].max(1).sum(1))
    assert np.all((images.mean((2, 3)) > 0.02) & (images.mean((2, 3)) < 0.4))


def test_the_example_tells_digits_from_letters(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "PRECISIONS", (10.0,))
    monkeypatch.setattr(example, "ANGLES", (0, 90))
    monkeypatch.setattr(example, "DRAWS", (20,))
    digits = load_digits()  # of 8 by 8 pixels, and quick to read
    images = ndimage.zoom(digits.images / 16, (1, 3.5, 3.5), order=1).astype(np.float32)
    sets = [(images[:1200], digits.target[:1200]), (images[1200:1640], digits.target[1200:1640])]
    monkeypatch.setattr(example, "load_labelled", lambda: sets)
    monkeypatch.setattr(example, "photographs", lambda n, cut=example.photographs: cut(440))
    few = functools.partial(example.monte_carlo, draws=20)
    for methods, method in ((example.METHODS, few), (example.PREDICT, jax.jit(few))):
        monkeypatch.setitem(methods, example.REFERENCE, method)
        monkeypatch.delitem(methods, "Monte Carlo, 10")
        monkeypatch.delitem(methods, "Monte Carlo, 100")
    flags = "--networks 1 --keys 1 --epochs 8 --width 8 --repeats 1 --out"
    example.main([*flags.split(), str(tmp_path)], standalone_mode=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (network,) = metrics["networks"]
    assert network["precision"] in example.PRECISIONS
    assert set(network["rows"]) == set(example.METHODS)
    for row in network["rows"].values():
        assert row["accuracy"] > 0.7 and row["nll"] < np.log(10) / 2 and 0 <= row["ece"] < 0.25
        # of twice 440 scores, chance is 1/2 with a deviation of sqrt((n + m + 1) / (12 n m)) = 0.0195
        assert row["auroc"]["letters"][0] > 0.5 + 4.5 * 0.0195
        turned = row.get("rotation", [0, 1])
        assert turned[1] > turned[0]
    rows = network["rows"]
    assert rows["MAP"]["nll"] != rows["bridge"]["nll"] != rows["normalised bridge"]["nll"]
    assert all(value > 0 for value in metrics["milliseconds"].values())
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000
