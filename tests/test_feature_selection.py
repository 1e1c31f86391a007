"""Feature selection: what the penalty counts, what is recovered and missed, and what is reported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso
from sklearn.preprocessing import StandardScaler

import feature_selection as fs

STEPS, HIDDEN = 1500, 64
KEY = jax.random.key(7)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


def test_the_penalty_is_the_expected_number_of_open_gates():
    """It is so whatever the correlation, which shows in how much the number varies."""
    rows, spread = 20_000, []
    alike = jnp.array([[1.0, 0, 0], [0.9, 0.19**0.5, 0], [0.9, 0.19**0.5, 0]])
    for gates, factor in ((fs.GAUSSIAN, jnp.eye(3)), (fs.BITS, jnp.eye(3)), (fs.BITS, alike)):
        params = gates.start + jnp.array([-0.4, 0.1, 0.6])
        opened = np.asarray(gates.draw(KEY, params, factor, rows)) != 0
        count = opened.sum(1)
        error = count.std(ddof=1) / rows**0.5
        assert abs(count.mean() - float(gates.probability(params).sum())) < 4.5 * error < 0.05
        np.testing.assert_allclose(opened.mean(0), gates.probability(params), atol=4.5 * 0.5 / rows**0.5)
        spread.append(count.var(ddof=1))
    assert spread[2] > 1.5 * spread[1]


def xor():
    """The sign of a product of two of six columns, as a number."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((500, 6)).astype(np.float32)
    x[:, 4:] = 0.6 * x[:, :2] + 0.8 * x[:, 4:]  # to be told from what is like them
    y = np.sign(x[:, 0] * x[:, 1])
    parts = [(x[s], y[s]) for s in np.split(np.arange(500), [300, 400])]
    return fs.Task(*parts, np.arange(6) < 2, False)


@pytest.mark.parametrize("name", list(fs.METHODS)[2:])
def test_gates_find_an_exclusive_or(name, monkeypatch):
    """Other columns resemble the two; the predictions depend on the two columns alone."""
    monkeypatch.setattr(fs, "PENALTIES", np.array([0.08 if name == "stochastic gates" else 0.04, 5.0]))
    task = xor()
    path = fs.METHODS[name](task, 0, STEPS, HIDDEN)
    assert path.selected[0].tolist() == task.relevant.tolist()
    assert not path.selected[1].any()
    for prediction, (_, y) in ((path.validation, task.validation), (path.test, task.test)):
        assert np.mean(np.sign(prediction[0]) == y) > 0.85
        assert np.ptp(prediction[1]) < 1e-6  # all gates are shut


def test_lasso_misses_an_exclusive_or_unless_it_is_told_to_look_for_products():
    task = xor()
    path = fs.METHODS["lasso"](task)
    chosen = fs.evaluate(path, fs.choose(path, task, 1.0), task)
    assert chosen["columns"] == [] and chosen["test"] < 0.05 and chosen["f1"] == 0
    path = fs.METHODS["lasso on products"](task)
    chosen = fs.evaluate(path, fs.choose(path, task, 1.0), task)
    assert chosen["recall"] == 1 and chosen["test"] > 0.3


def test_the_fewest_columns_within_the_error_are_chosen():
    """The losses are set to 1.0, 0.5 (the best), 0.55 and 0.9, with standard error 0.1."""
    offset = np.tile([-1.0, 1.0], 50)
    offset *= 0.1 * 10 / offset.std(ddof=1)
    loss = np.array([[1.0], [0.5], [0.55], [0.9]]) + np.array([[0], [1], [1], [0]]) * offset
    predictions = np.sqrt(loss - loss.min() + 0.01)
    selected = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    zeros = np.zeros(100)
    task = fs.Task((None, zeros), (None, zeros), (None, zeros), None, False)
    path = fs.Path(np.arange(4.0), selected, predictions, predictions)
    assert fs.choose(path, task, 0.0) == 1
    assert fs.choose(path, task, 1.0) == 2
    assert fs.choose(path, task, 4.5) == 3


def test_a_task_has_the_truth_that_it_says():
    """The relevant columns explain the target and are real ones without a twin; noise is unrelated."""
    for target in ("linear", "products"):
        task = fs.make_task(target, 3, 30)
        x, y = (np.concatenate([part[i] for part in task[:3]]) for i in (0, 1))
        assert task.relevant[:30].sum() == 4 and not task.relevant[30:].any()
        z = x[:, task.relevant]
        pairs = [z[:, i] * z[:, j] for i in range(4) for j in range(i)]
        design = np.column_stack([np.ones(len(y)), *(z.T if target == "linear" else pairs)])
        rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        assert abs(1 - rest.var() / y.var() - fs.SIGNAL) < 0.06
        r = np.corrcoef(x.T)
        np.fill_diagonal(r, 0)
        assert abs(r[:, task.relevant]).max() < fs.TWIN + 0.03
        factor = np.asarray(fs.copula_factor(task.train[0]))
        np.testing.assert_allclose((factor**2).sum(1), 1, rtol=1e-5)
        assert abs(factor @ factor.T - np.corrcoef(task.train[0].T)).max() < 0.1
        assert abs(r[30:]).max() < 5 / len(y) ** 0.5 < abs(r[:30, :30]).max()


def test_the_example_reports_what_was_selected(tmp_path, monkeypatch):
    """F1 from sets, the count of noise, and lasso's score at its penalty, from the metrics alone."""
    methods = {name: fs.METHODS[name] for name in ("lasso", "independent bits", "correlated gates")}
    monkeypatch.setattr(fs, "METHODS", methods)
    arguments = ["--seeds", "1", "--steps", "20", "--hidden", "4", "--out", str(tmp_path)]
    fs.main(arguments, standalone_mode=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (tmp_path / "feature_selection.png").stat().st_size > 10_000
    for results in metrics["results"].values():
        for target, rows in results.items():
            assert list(rows) == list(fs.METHODS)
            for (row,) in rows.values():
                assert row["count"] == len(row["columns"])
                assert row["noise"] == sum(column >= 30 for column in row["columns"])
                if target != "diagnosis":
                    found, truth = set(row["columns"]), set(metrics["relevant"][target][0])
                    assert row["f1"] == pytest.approx(2 * len(found & truth) / (len(found) + len(truth)))
                    assert row["recall"] == len(found & truth) / 4
        one, other = (results["linear"][name][0]["test"] for name in list(methods)[1:])
        assert one != other  # of the same network, rows and noise: the correlation alone is another
        task, (row,) = fs.make_task("linear", 0, 30), results["linear"]["lasso"]
        scaler = StandardScaler().fit(task.train[0].astype(float))
        model = Lasso(row["penalty"]).fit(scaler.transform(task.train[0].astype(float)), task.train[1])
        assert np.flatnonzero(model.coef_).tolist() == row["columns"]
        rest = task.test[1] - model.predict(scaler.transform(task.test[0].astype(float)))
        spread = task.test[1] - task.test[1].mean()
        assert row["test"] == pytest.approx(1 - np.sum(rest**2) / np.sum(spread**2), rel=1e-4)
