"""The report of estimators, compared with separate sums: biases, variances, cosines, calls."""

import dataclasses
import functools
import itertools
import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import relaxit_jax as rj
from relaxit_jax import diagnostics as dg
from relaxit_jax import estimators as es

pytestmark = pytest.mark.usefixtures("fast_compilation")
KEY = jax.random.key(5)
FORMS = np.random.default_rng(3)
BITS = np.array([0.4, -1.0, 0.8], np.float32)
CLASSES = FORMS.normal(size=(2, 3)).astype(np.float32)
WEIGHTS = {n: FORMS.normal(size=(n, n)).astype(np.float32) for n in (3, 6)}


def quadratic(b):
    """A quadratic function of bits or of one-hot vectors, over all variables together."""
    x = b.reshape(-1)
    return 1 + x @ WEIGHTS[x.size] @ x / 2 + x[0]


def network(z):
    return jnp.sum(jnp.tanh(z - 0.3)) / 4


UNBIASED = {
    "reinforce": es.reinforce,
    "rloo": es.rloo,
    "rloo_5": functools.partial(es.rloo, num_samples=5),
    "arm": es.arm,
    "disarm": es.disarm,
    "arms": es.arms,
    "rebar": es.rebar,
    "relax": functools.partial(es.relax, control_variate=network),
}
CALLS = {"reinforce": 1, "rloo": 2, "rloo_5": 5, "arm": 2, "disarm": 2, "arms": 4, "rebar": 3, "relax": 1}


@functools.cache
def bits_report():
    methods = UNBIASED | {"straight_through": dg.from_sampler(rj.straight_through_bernoulli)}
    return dg.gradient_report(KEY, quadratic, es.Bernoulli(BITS), methods, 30_000, batch_size=1000)


@functools.cache
def classes_report(reference):
    methods = {name: e for name, e in UNBIASED.items() if name not in ("arm", "disarm", "relax")}
    methods["straight_through"] = dg.from_sampler(rj.straight_through_categorical)
    methods["reinmax"] = dg.from_sampler(rj.reinmax)
    q = es.OneHotCategorical(CLASSES)
    return dg.gradient_report(
        KEY, quadratic, q, methods, 30_000, batch_size=1000, reference=reference, reference_samples=20_000
    )


def outcomes(logits, kind):
    """All events with their probabilities and scores, in float64."""
    if kind == "bits":
        events = np.array(list(np.ndindex(2, 2, 2)), float)
        p = 1 / (1 + np.exp(-logits.astype(float)))
        return events, np.prod(np.where(events == 1, p, 1 - p), 1), events - p
    p = np.exp(logits.astype(float))
    p /= p.sum(-1, keepdims=True)
    index = np.array(list(np.ndindex(3, 3)))
    events = np.eye(3)[index]
    return events, np.prod(np.sum(events * p, -1), -1), events - p


@functools.cache
def by_hand(kind):
    """The gradient of E f, and each outcome's probability and REINFORCE gradient."""
    events, chance, score = outcomes(BITS if kind == "bits" else CLASSES, kind)
    x = events.reshape(len(events), -1)
    values = 1 + np.einsum("ni,ij,nj->n", x, WEIGHTS[x.shape[1]].astype(float), x) / 2 + x[:, 0]
    slopes = values.reshape(-1, *[1] * (score.ndim - 1)) * score
    return np.tensordot(chance, slopes, 1), chance, slopes


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["bits", "classes"])
def test_the_reference_is_the_sum_over_all_outcomes(kind):
    report = bits_report() if kind == "bits" else classes_report("exact")
    np.testing.assert_allclose(report.gradient, by_hand(kind)[0], rtol=1e-4, atol=1e-6)
    assert (report.gradient_error == 0).all()
    assert report.reference == f"exact, the sum over {8 if kind == 'bits' else 9} outcomes"


@pytest.mark.whole
def test_unbiased_estimators_have_no_bias_and_their_calls_are_counted():
    report = bits_report()
    scores = np.abs(report.bias) / report.bias_error
    assert (scores[:-1] < 4.5).all()
    assert list(report.biased) == [False] * 8 + [True]
    assert dict(zip(report.names, report.calls, strict=True)) == CALLS | {"straight_through": 1}
    scores = np.abs(classes_report("exact").bias) / classes_report("exact").bias_error
    assert (scores[:4] < 4.5).all() and (scores[-1] < 4.5).all()  # of ReinMax on a quadratic too
    assert list(classes_report("exact").biased) == [False] * 5 + [True, False]


@pytest.mark.whole
def test_the_bias_of_straight_through_on_a_quadratic_is_found():
    """Its mean is the gradient of f at the mean: it does not see the covariance of the draws."""
    report = classes_report("exact")

    def of_covariance(logits):
        p = jax.nn.softmax(logits)
        blocks = [jnp.diag(row) - jnp.outer(row, row) for row in p]
        return jnp.sum(WEIGHTS[6] * jax.scipy.linalg.block_diag(*blocks)) / 2

    row = report.names.index("straight_through")
    known = -np.asarray(jax.grad(of_covariance)(jnp.asarray(CLASSES)))
    assert (np.abs(report.bias[row] - known) < 4.5 * report.bias_error[row]).all()
    norm, error = report["straight_through"]["bias_norm"], report["straight_through"]["bias_norm_error"]
    assert abs(norm - np.linalg.norm(known)) < 3 * error < 0.2 * norm


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["bits", "classes"])
def test_variance_error_and_cosines_are_those_of_reinforce_summed_by_hand(kind):
    row = (bits_report() if kind == "bits" else classes_report("exact"))["reinforce"]
    gradient, chance, slopes = by_hand(kind)
    flat = slopes.reshape(len(slopes), -1)
    variance = chance @ np.sum((flat - gradient.ravel()) ** 2, 1)
    assert abs(row["variance"] - variance) < 4.5 * row["mse_error"] < 0.1 * variance
    assert abs(row["mse"] - variance) < 4.5 * row["mse_error"]
    fourth = chance @ np.sum((flat - gradient.ravel()) ** 2, 1) ** 2
    assert row["mse_error"] == pytest.approx(np.sqrt((fourth - variance**2) / 30_000), rel=0.1)
    cosines = flat @ gradient.ravel() / np.linalg.norm(flat, axis=1) / np.linalg.norm(gradient)
    spread = np.sqrt(chance @ cosines**2 - (chance @ cosines) ** 2) / 30_000**0.5
    assert abs(row["mean_cosine"] - chance @ cosines) < 4.5 * spread
    assert row["cosine"] > 0.99


@pytest.mark.whole
def test_numbers_are_those_of_the_same_draws_kept_in_one_array():
    """Batches are merged exactly: NumPy finds the same from all gradients at once."""
    n, size = 600, 100
    q, sampler = es.OneHotCategorical(CLASSES), rj.reinmax
    cubic = lambda z: jnp.sum(z @ jnp.array([1.0, -2.0, 0.5])) ** 3
    report = dg.gradient_report(KEY, cubic, q, {"one": dg.from_sampler(sampler)}, n, batch_size=size)
    keys = [jax.random.split(jax.random.fold_in(jax.random.split(KEY)[0], i), size) for i in range(n // size)]
    slope = jax.jit(jax.vmap(jax.grad(lambda l, key: cubic(sampler(key, l))), (None, 0)))
    draws = np.concatenate([slope(jnp.asarray(CLASSES), key) for key in keys]).astype(float)
    error = draws - report.gradient
    np.testing.assert_allclose(report.bias[0], error.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(report.variance[0], draws.var(0, ddof=1).sum(), rtol=1e-5)
    np.testing.assert_allclose(report.bias_error[0], draws.std(0, ddof=1) / n**0.5, rtol=1e-5)
    np.testing.assert_allclose(report.bias_norm[0], np.linalg.norm(error.mean(0)), rtol=1e-4)
    # the plain mean of |g - G|^2 is bias^2, without what noise adds, and variance
    lengths = np.sum(error**2, (1, 2))
    np.testing.assert_allclose(report.mse[0], lengths.mean(), rtol=1e-5)
    np.testing.assert_allclose(report.mse_error[0], lengths.std(ddof=1) / n**0.5, rtol=1e-4)
    g, mean = report.gradient, draws.mean(0)
    np.testing.assert_allclose(
        report.cosine[0], np.sum(mean * g) / np.linalg.norm(mean) / np.linalg.norm(g), rtol=1e-5
    )
    lengths = np.sqrt(np.sum(draws**2, (1, 2)))
    np.testing.assert_allclose(
        report.mean_cosine[0],
        np.mean(np.sum(draws * g, (1, 2)) / lengths) / np.linalg.norm(g),
        rtol=1e-4,
    )


@pytest.mark.whole
def test_a_long_run_agrees_with_the_exact_gradient_and_its_error_counts():
    long, exact = classes_report("long_run"), classes_report("exact")
    assert long.reference == "a long run, 20000 estimates by rloo of 16 draws"
    assert (np.abs(long.gradient - exact.gradient) < 4.5 * long.gradient_error).all()
    assert (long.gradient_error > 0).all()
    # the same draws: what differs is the reference, and the error of the bias holds both
    np.testing.assert_allclose(long.bias + long.gradient, exact.bias + exact.gradient, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        long.bias_error**2, exact.bias_error**2 + long.gradient_error**2, rtol=1e-3, atol=1e-9
    )
    np.testing.assert_allclose(long.variance, exact.variance, rtol=1e-4)
    # both are mse less the same draws' variance, known to the errors of the two biases
    slack = 9 * long.bias_norm * long.bias_norm_error + 5 * long.bias_norm_error**2
    assert (np.abs(long.mse - exact.mse) < slack).all()


@pytest.mark.whole
@pytest.mark.parametrize("errors", [[1.0], [1, 1, 1], [10, 1, 1, 1, 0.1], [1] * 50])
def test_noise_alone_is_called_a_bias_once_in_a_thousand(errors):
    """The reports have no bias, and NumPy draws their noise: one coordinate, or many different ones."""
    n = 40_000
    noise = np.random.default_rng(1).normal(size=(n, len(errors))) * errors
    report = dataclasses.replace(
        bits_report(),
        names=tuple(range(n)),
        gradient=np.zeros(len(errors)),
        bias=noise,
        bias_error=np.broadcast_to(errors, noise.shape),
        bias_norm=np.linalg.norm(noise, axis=1),
    )
    assert 0.0005 < report.biased.mean() < 0.002  # by 40 reports, give or take 6


@pytest.mark.whole
def test_bits_that_are_never_seen_on_do_not_make_an_estimator_biased():
    """REINFORCE with two bits that have a gradient and a hundred at 1e-4, whose spread 1,000 draws miss."""
    q = es.Bernoulli(jnp.concatenate([jnp.zeros(2), jnp.full(100, -9.2)]))
    f = lambda b: 5 + b[0] - 2 * b[1] + 3 * jnp.sum(b[2:])
    report = dg.gradient_report(KEY, f, q, {"reinforce": es.reinforce}, 1000)
    assert np.max(np.abs(report.bias) / report.bias_error) > 6 and not report.biased.any()


@pytest.mark.whole
def test_many_outcomes_ask_for_a_long_run():
    q = es.Bernoulli(jnp.zeros(15))
    f = lambda b: jnp.sum(b * jnp.arange(15.0))
    methods = {"of 16": functools.partial(es.rloo, num_samples=16)}
    report = dg.gradient_report(KEY, f, q, methods, 2000, batch_size=500, reference_samples=8000)
    assert report.reference.startswith("a long run, 8000 estimates by rloo of 16 draws")
    # its own error is the error of a mean of the same estimator
    error = np.sum(report.gradient_error**2)
    assert error == pytest.approx(report.variance[0] / 8000, rel=0.1)
    assert (np.abs(report.gradient - np.arange(15) / 4) < 4.8 * report.gradient_error).all()


@pytest.mark.whole
def test_calls_under_vmap_scan_and_a_batch():
    def many(key, f, q):
        """Under both, there are 3 x 4 estimates of 2 calls each."""
        inner = jax.vmap(lambda key: es.disarm(key, f, q))
        step = lambda total, key: (total + jnp.mean(inner(jax.random.split(key, 4)), 0) / 3, None)
        return jax.lax.scan(step, jnp.zeros(q.batch_shape), jax.random.split(key, 3))[0]

    q = es.Bernoulli(np.stack([BITS, -BITS]))
    f = lambda b: b @ jnp.array([1.0, -2.0, 0.5]) ** 2
    report = dg.gradient_report(KEY, f, q, {"many": many, "one": es.disarm}, 2000)
    assert list(report.calls) == [24, 2]
    assert report.bias.shape == (2, 2, 3) and report.gradient.shape == (2, 3)
    assert not report.biased.any()
    ratio = report.variance[1] / report.variance[0]
    assert ratio == pytest.approx(12, rel=0.25)


@pytest.mark.whole
def test_any_mapping_of_estimators_is_taken():
    q, methods = es.Bernoulli(BITS), {"rloo": es.rloo, "arm": es.arm}
    reports = [
        dg.gradient_report(KEY, quadratic, q, kind(methods), 100) for kind in (dict, types.MappingProxyType)
    ]
    assert reports[0].names == reports[1].names == ("rloo", "arm")
    np.testing.assert_array_equal(reports[0].bias, reports[1].bias)


def test_time_is_that_of_one_estimate(monkeypatch):
    """It uses a clock that advances a second with every look: each batch of 20 takes one."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    report = dg.gradient_report(KEY, quadratic, es.Bernoulli(BITS), {"one": es.rloo}, 100, batch_size=20)
    assert report["one"]["seconds"] == 1 / 20


@pytest.mark.whole
def test_impossible_classes_and_low_precision_have_finite_numbers():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf], [2.0, 0.0, 1.0]], jnp.bfloat16)
    f = lambda b: quadratic(b.astype(jnp.float32))
    methods = {"rloo": es.rloo, "reinmax": dg.from_sampler(rj.reinmax)}
    report = dg.gradient_report(jax.random.PRNGKey(0), f, es.OneHotCategorical(logits), methods, 1000)
    for field in ("bias", "bias_error", "variance", "mse", "cosine", "mean_cosine"):
        assert np.isfinite(getattr(report, field)).all()
    assert (report.bias[:, 0, 2] == 0).all() and report.variance.dtype == np.float64


def test_a_gradient_of_zero_has_no_cosine_and_is_json():
    constant = lambda b: 0 * jnp.sum(b) + 2.0
    methods = {"rloo": es.rloo, "reinforce": es.reinforce}
    report = dg.gradient_report(KEY, constant, es.Bernoulli(BITS), methods, 1050)
    assert report.num_samples == 1100  # whole batches
    assert np.isnan(report.cosine).all() and (report.mean_cosine == 0).all()
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["estimators"]["rloo"]["cosine"] is None
    assert found["estimators"]["rloo"]["variance"] < 1e-9 < found["estimators"]["reinforce"]["variance"]
    assert "nan" in str(report)


@pytest.mark.whole
def test_table_and_pictures_show_the_numbers(tmp_path):
    report = classes_report("exact")
    lines = str(report).splitlines()
    assert len(lines) == 3 + len(report.names)
    longest = max(map(len, report.names))
    assert max(map(len, lines[2:])) <= longest + 64  # 80 columns for names of 16 letters
    for name, line in zip(report.names, lines[3:], strict=True):
        assert line.split()[0] == name
        assert ("biased" in line) == (name == "straight_through")
        assert f"{report[name]['variance']:.3g}" in line
    for cost in ("calls", "seconds"):
        figure, axis = plt.subplots()
        report.plot(axis, cost=cost)
        curves = [line for line in axis.get_lines() if len(line.get_xdata()) > 1]
        norm = np.linalg.norm(report.gradient)
        for curve, name in zip(curves, report.names, strict=True):
            row = report[name]
            bias2 = max(row["bias_norm"] ** 2 - row["bias_norm_error"] ** 2, 0) if row["biased"] else 0
            x, y = curve.get_data()
            np.testing.assert_allclose(x[0], row[cost])
            np.testing.assert_allclose(y, np.sqrt(bias2 + row["variance"] * row[cost] / x) / norm, rtol=1e-6)
        assert {text.get_text() for text in axis.texts} == {
            name + " (biased)" * (name == "straight_through") for name in report.names
        }
        plt.close(figure)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.whole
def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'relaxit_jax\[examples\]'"):
        bits_report().plot(tmp_path / "report.png")


def test_bad_arguments_are_named():
    q, good = es.Bernoulli(jnp.zeros((2, 3))), {"rloo": es.rloo}
    f = lambda b: jnp.sum(b, -1)
    for bad in ({}, [es.rloo], {"rloo": 1}):
        with pytest.raises(ValueError, match="estimators must be a dictionary from names"):
            dg.gradient_report(KEY, f, q, bad)
    with pytest.raises(ValueError, match="q must be a family of estimators"):
        dg.gradient_report(KEY, f, jnp.zeros(3), good)
    with pytest.raises(ValueError, match="key must be one JAX random key"):
        dg.gradient_report(0, f, q, good)
    with pytest.raises(ValueError, match=r"f must be a function .* batch shape \(2,\)"):
        dg.gradient_report(KEY, jnp.sum, q, good)
    with pytest.raises(
        ValueError, match=r"estimators\['total'\] must be a function to the batch shape \(2,\)"
    ):
        dg.gradient_report(KEY, f, q, {"total": lambda *a: jnp.sum(es.rloo(*a))})
    for name, bad in (
        ("num_samples", 1), ("num_samples", 10.0), ("batch_size", 1), ("reference_samples", 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be an integer in"):
            dg.gradient_report(KEY, f, q, good, **{name: bad})
    with pytest.raises(ValueError, match="reference must be one of"):
        dg.gradient_report(KEY, f, q, good, reference="true")
    with pytest.raises(ValueError, match="at most 1048576 outcomes"):
        dg.gradient_report(KEY, jnp.sum, es.Bernoulli(jnp.zeros(21)), good, reference="exact")
    with pytest.raises(ValueError, match=r"sampler must be one of draws of shape \(2, 3\)"):
        dg.gradient_report(
            KEY, f, q, {"s": dg.from_sampler(lambda key, logits: logits[0])}, reference="exact"
        )
    with pytest.raises(ValueError, match="cost must be 'calls' or 'seconds'"):
        bits_report().plot(None, cost="money")


# --- the gradient in a tree of parameters --------------------------------------------------------

INPUT = np.array([0.7, -1.2], np.float32)
PARAMS = {
    "decoder": np.array([1.0, -1.5, 0.8], np.float32),
    "encoder": {"bias": BITS, "kernel": FORMS.normal(size=(2, 3)).astype(np.float32)},
}


def decoded(params, b):
    return jnp.sum(params["decoder"] * b, -1) ** 2 + b[..., 0]


def encoded(params):
    return es.Bernoulli(INPUT @ params["encoder"]["kernel"] + params["encoder"]["bias"])


@functools.cache
def tree_report(reference="exact"):
    methods = {"reinforce": es.reinforce, "straight_through": dg.from_sampler(rj.straight_through_bernoulli)}
    return dg.gradient_report(
        KEY, decoded, encoded, methods, 30_000, batch_size=1000, params=PARAMS, reference=reference
    )


def tree_by_hand(estimator):
    """The probability of each outcome, and its estimate in every leaf, by the chain rule in float64."""
    decoder, x = PARAMS["decoder"].astype(float), INPUT.astype(float)
    logits = x @ PARAMS["encoder"]["kernel"].astype(float) + BITS.astype(float)
    events, chance, score = outcomes(logits, "bits")
    values = (events @ decoder) ** 2 + events[:, 0]
    along = 2 * (events @ decoder)[:, None] * decoder + np.array([1.0, 0, 0])
    p = 1 / (1 + np.exp(-logits))
    slope = values[:, None] * score if estimator == "reinforce" else along * p * (1 - p)
    leaves = {
        "decoder": 2 * (events @ decoder)[:, None] * events,
        "encoder/bias": slope,
        "encoder/kernel": x[:, None] * slope[:, None],
    }
    return chance, leaves


@pytest.mark.few(1)
@pytest.mark.parametrize("leaf", ["decoder", "encoder/bias", "encoder/kernel"])
def test_a_leaf_has_the_gradient_bias_and_variance_that_are_summed_by_hand(leaf):
    report = tree_report().leaves[leaf]
    chance, exact = tree_by_hand("reinforce")
    gradient = np.tensordot(chance, exact[leaf], 1)
    np.testing.assert_allclose(report.gradient, gradient, rtol=1e-4, atol=1e-5)
    for row, name in enumerate(report.names):
        _, rows = tree_by_hand(name)
        mean = np.tensordot(chance, rows[leaf], 1)
        assert (np.abs(report.bias[row] - (mean - gradient)) < 4.5 * report.bias_error[row] + 1e-5).all()
        squares = np.sum((rows[leaf] - mean).reshape(len(chance), -1) ** 2, 1)
        variance, fourth = chance @ squares, chance @ squares**2
        error = np.sqrt((fourth - variance**2) / report.num_samples)
        assert abs(report.variance[row] - variance) < 4.5 * error < 0.1 * variance, name
        flat = rows[leaf].reshape(len(chance), -1)
        lengths = np.linalg.norm(flat, axis=1) * np.linalg.norm(gradient)
        cosines = flat @ gradient.ravel() / np.where(lengths > 0, lengths, 1)
        spread = np.sqrt(chance @ cosines**2 - (chance @ cosines) ** 2) / report.num_samples**0.5
        assert abs(report.mean_cosine[row] - chance @ cosines) < 4.5 * spread + 1e-5, name
        if name == "reinforce":
            assert report.mse_error[row] == pytest.approx(error, rel=0.1)
    # f is called with the exact draw by both: only what goes through the draw is biased
    assert report.biased.tolist() == [False, leaf != "decoder"]


@pytest.mark.whole
def test_the_report_of_a_tree_is_that_of_its_leaves_together():
    report, leaves = tree_report(), tree_report().leaves
    assert list(leaves) == ["decoder", "encoder/bias", "encoder/kernel"]
    assert leaves["encoder/kernel"].gradient.shape == (2, 3) and leaves["decoder"].bias.shape == (2, 3)
    np.testing.assert_array_equal(
        report.gradient, np.concatenate([leaf.gradient.ravel() for leaf in leaves.values()])
    )
    np.testing.assert_allclose(report.variance, sum(leaf.variance for leaf in leaves.values()))
    np.testing.assert_allclose(report.bias_norm**2, sum(leaf.bias_norm**2 for leaf in leaves.values()))
    assert report.biased.tolist() == [False, True]
    assert report.calls.tolist() == leaves["decoder"].calls.tolist() == [1, 1]
    assert report.seconds.tolist() == leaves["decoder"].seconds.tolist()
    lines = str(report).splitlines()
    assert len(lines) == 5 + 3 * 3 and lines[5].startswith("in decoder: 3 coordinates, of norm ")
    assert lines[-1].startswith("straight_through") and " biased " in lines[-1]
    said = json.loads(json.dumps(report.as_dict()))
    assert said["leaves"]["decoder"]["estimators"]["reinforce"] == leaves["decoder"]["reinforce"]
    assert "leaves" not in bits_report().as_dict() and bits_report().leaves == {}
    assert dg.recommend(leaves["decoder"], calls=10).startswith("Take ")


@pytest.mark.whole
def test_a_long_run_is_in_every_leaf():
    long, exact = tree_report("long_run").leaves, tree_report().leaves
    for name, leaf in long.items():
        assert (np.abs(leaf.gradient - exact[name].gradient) < 4.5 * leaf.gradient_error).all()
        assert (leaf.gradient_error > 0).all()


@pytest.mark.whole
def test_logits_as_parameters_give_the_report_in_the_logits():
    """They agree to the last bit, except for the time: an array is the smallest tree, without leaves."""
    methods = {"rloo": es.rloo, "rebar": es.rebar}
    plain = dg.gradient_report(KEY, quadratic, es.Bernoulli(BITS), methods, 200)
    of_tree = dg.gradient_report(KEY, lambda _, b: quadratic(b), es.Bernoulli, methods, 200, params=BITS)
    for field in dataclasses.fields(plain):
        if field.name != "seconds":
            np.testing.assert_array_equal(getattr(plain, field.name), getattr(of_tree, field.name))
    slashed = {"a/b": BITS, "a": {"b": BITS}}
    law = lambda params: es.Bernoulli(params["a/b"] + params["a"]["b"])
    report = dg.gradient_report(KEY, lambda _, b: quadratic(b), law, {"rloo": es.rloo}, 2, params=slashed)
    assert list(report.leaves) == ["['a']['b']", "['a/b']"]


def test_parameters_that_do_not_fit_are_named():
    good = {"rloo": es.rloo}
    for params, words in (
        (
            {"w": np.ones(2, int)},
            r"^params must be floating point in all of its arrays, got dtype int\d+ in w",
        ),
        ({}, "^params must be a pytree with an array at least"),
        ([None], "^params must be a pytree with an array at least"),
    ):
        with pytest.raises(ValueError, match=words):
            dg.gradient_report(KEY, decoded, encoded, good, params=params)
    with pytest.raises(ValueError, match=r"^q must be a function of params that returns a family.*Bernoulli"):
        dg.gradient_report(KEY, decoded, encoded(PARAMS), good, params=PARAMS)
    with pytest.raises(ValueError, match=r"^q must be a function of params .* got one that returns "):
        dg.gradient_report(KEY, decoded, lambda params: params["decoder"], good, params=PARAMS)
    with pytest.raises(ValueError, match=r"^f must be a function of params and a sample, as params is given"):
        dg.gradient_report(KEY, quadratic, encoded, good, params=PARAMS)
    with pytest.raises(ValueError, match=r"^q must be a family of estimators"):
        dg.gradient_report(KEY, decoded, encoded, good)
    with pytest.raises(ValueError, match=r"^f must be a function .* batch shape \(\)"):
        dg.gradient_report(KEY, lambda params, b: b, encoded, good, params=PARAMS)


def report_of(**columns):
    """A report on estimators with these numbers, for a gradient of norm 2."""
    rows = len(columns["variance"])
    numbers = {name: np.zeros(rows) for name in ("bias_norm", "bias_norm_error", "cosine", "mean_cosine",
                                                 "mse", "mse_error", "seconds")}  # fmt: skip
    return dg.GradientReport(
        tuple("abc"[:rows]), "exact", 100, np.array([2.0, 0.0]), np.zeros(2),
        bias=np.zeros((rows, 2)), bias_error=np.zeros((rows, 2)), **numbers | columns,
    )  # fmt: skip


def test_a_recommendation_is_the_least_error_for_the_calls():
    """Bias stays, variance falls with the number of estimates; estimators that cost too much drop out."""
    report = report_of(
        variance=np.array([1.0, 8.0, 0.5]), mse=np.array([1.25, 8.0, 0.5]), calls=np.array([1, 2, 8]),
        bias_norm=np.array([0.5, 0.0, 0.0]),
    )  # fmt: skip
    assert dg.recommend(report, calls=1) == "Take a, one estimate: its error is 0.56 of the gradient."
    first, second = dg.recommend(report, calls=8).split(". Next")
    assert first == "Take a, 8 estimates: the error of their mean is 0.31 of the gradient, most of it bias"
    assert second == " is c, 0.35."
    assert dg.recommend(report, calls=80).startswith("Take c, 10 estimates: the error of their mean is 0.11")
    with pytest.raises(ValueError, match="calls must be 2 or more, as the estimators take, got 1"):
        dg.recommend(report_of(variance=np.ones(1), calls=np.full(1, 2)), calls=1)
    some = report_of(variance=np.array([np.nan, 1.0]), calls=np.array([1, 4]))  # the cheap one has no numbers
    with pytest.raises(ValueError, match="calls must be 4 or more"):
        dg.recommend(some, calls=2)
    with pytest.raises(ValueError, match="report must be one with a finite estimator"):
        dg.recommend(report_of(variance=np.full(1, np.nan), calls=np.ones(1, int)), calls=2)


def test_a_value_that_is_not_finite_is_named(tmp_path):
    """It shows only in the compiled estimates: that estimator has no numbers, and the others keep theirs."""
    rough = dg.from_sampler(lambda key, logits: jnp.sqrt(rj.relaxed_bernoulli(key, logits, 0.5) - 0.5))
    methods = {"rough": rough, "rloo": es.rloo}
    f = lambda b: jnp.sum(b, -1)
    report = dg.gradient_report(KEY, f, es.Bernoulli(jnp.zeros(3)), methods, 200)
    assert list(report.finite) == [False, True] and np.isfinite(report["rloo"]["variance"])
    assert "no numbers, because some estimates are not finite: rough" in str(report)
    assert dg.recommend(report, calls=2).startswith("Take rloo, one estimate")
    report.plot(tmp_path / "report.png")


def test_a_sampler_is_told_from_an_estimator():
    q = es.OneHotCategorical(jnp.zeros(3), 1)
    for sampler in (rj.reinmax, functools.partial(rj.gumbel_softmax, tau=0.5)):
        with pytest.raises(
            ValueError, match=r"estimators\['x'\] must be a function .*: write from_sampler\("
        ):
            dg.gradient_report(KEY, lambda b: b @ jnp.arange(3.0), q, {"x": sampler}, 10)
