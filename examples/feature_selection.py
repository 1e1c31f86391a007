"""Feature selection with gates on the columns, compared with lasso.

The table is scikit-learn's breast cancer, 569 rows of 30 columns, most of them strongly correlated, with 30
permuted copies as noise; 60 % of the rows are for training, 20 % choose the penalty, and 20 % are for
testing. Two targets are made from four real columns, with noise of a fifth of the variance: a linear one, and
a sum of two products. The third is the table's diagnosis. A network sees the columns through gates, and the
loss is

    fit + penalty * sum over columns of P(gate is open)

- stochastic gates: clipped Gaussians (Y. Yamada et al. 2020, arXiv:1810.04247), clip(loc, 0, 1) at test time;
- correlated gates: straight-through bits of a Gaussian copula with the columns' correlation (C. Lee et al.
  2022, ICLR); the paper's first phase, self-supervised on rows without labels, is left out;
- independent bits: the same with correlation 0, to show the effect of the correlation;
- lasso (logistic, for the diagnosis), and lasso on all columns and their products.

For all methods, the penalty is the one with the fewest columns whose validation loss is within one standard
error of the best. The width of the network and the learning rates of Adam were set by looking at the first
three splits; lasso needs no such tuning. Mean ± standard error over five splits and targets (the papers have
other data):

                      linear: F1    products: F1   test R²      diagnosis: columns, of noise   accuracy
    lasso             .86 ± .06     .00            -.03         15.0   5.2                     .961 ± .004
    lasso, products   .66 ± .11     .98 ± .02      .79          33.2  17.4                     .961 ± .007
    stochastic gates  1.00          .57 ± .08      .46           4.8    .2                     .926 ± .016
    independent bits  1.00          .82 ± .07      .52           4.8    .2                     .932 ± .016
    correlated gates  1.00          .62 ± .15      .51           5.6    .2                     .935 ± .019

- Linear: gates find the four columns every time. Lasso finds them and adds others that make up for the
  shrinkage of large coefficients. It needs a hundredth of the time.
- Products: lasso sees nothing. Gates find most columns without being told what to look for; lasso that is
  given the products wins by far: 341 rows are few for a network to learn a product among 60 columns.
- Diagnosis: lasso predicts best, with three times the columns; with five or fewer the gates are more accurate
  (right panel). The rule is too thrifty for them: at the best validation loss stochastic gates reach .960 ±
  .005 with 8 columns, .8 of them noise; lasso .954 ± .005 with 26, 13 of them noise.
- Correlated gates gain nothing over independent bits here, and on the products they find less (F1 lower by
  .19 ± .09, paired). A likely reason: similar columns open and close together, so the network seldom sees one
  without the other, which would tell them apart.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, QuantileTransformer, StandardScaler
from tqdm import tqdm

import relaxit_jax as rj
from common import SIZE, STEPS, out_option, output_folder, run, save_figure, versions, write_json

TITLES = {"linear": "four columns, linear", "products": "two products of two columns"}
TARGETS = (*TITLES, "diagnosis")  # the last comes with the table
REAL_COLUMNS = 30
RELEVANT = 4  # number of columns that make a synthetic target
TWIN = 0.9  # correlation at which a column counts as a copy of another, so they need not be told apart
SIGNAL = 0.8  # share of a synthetic target's variance
SCALE = 0.5  # standard deviation of the Gaussian gates
RULES = {
    "one standard error": 1.0,
    "best validation": 0.0,
}  # how many standard errors a choice may be off the best
TAU = 0.5  # temperature of the gradient of the bits
BATCH = 64
PENALTIES = np.geomspace(0.01, 1, 7)  # for a gate, with a loss that is 1 without columns
ALPHAS = np.geomspace(0.002, 0.5, 22)  # for lasso, with the same loss


class Task(NamedTuple):
    """Rows for training, for choosing the penalty, and for testing: pairs of columns and target."""

    train: tuple
    validation: tuple
    test: tuple
    relevant: np.ndarray | None  # for each column, if the truth is known
    classify: bool


class Path(NamedTuple):
    """The selection and the predictions of a method, for each of its penalties."""

    penalties: np.ndarray
    selected: np.ndarray  # (penalty, column)
    validation: np.ndarray  # predictions (penalty, row); log-odds if the target is a class
    test: np.ndarray


class Gates(NamedTuple):
    """A kind of gate with one parameter for each column."""

    draw: Callable  # (key, parameters, factor, rows)
    probability: Callable  # of an open gate
    at_test: Callable
    start: float
    learning_rate: float  # in proportion to how far a parameter has to move


def draw_gaussian(key, loc, factor, rows):
    return rj.gaussian_bernoulli(key, loc, SCALE, shape=(rows, *loc.shape))


def draw_bits(key, logits, factor, rows):
    return rj.correlated_bernoulli(key, logits, TAU, factor, shape=(rows,), hard=True)


GAUSSIAN = Gates(
    draw_gaussian, lambda loc: jax.scipy.stats.norm.cdf(loc / SCALE), lambda loc: jnp.clip(loc, 0, 1),
    start=0.5, learning_rate=0.005,
)  # fmt: skip
BITS = Gates(draw_bits, jax.nn.sigmoid, lambda logits: jnp.float32(logits > 0), start=0.0, learning_rate=0.02)
COLOURS = {
    "lasso": "#999999", "lasso on products": "#000000", "stochastic gates": "#D55E00",
    "independent bits": "#56B4E9", "correlated gates": "#0072B2",
}  # fmt: skip


def make_task(target, seed, noise_columns):
    """The table's columns and permuted copies of them, as normal scores, with one of three targets."""
    rng = np.random.default_rng(seed)
    table = load_breast_cancer()
    rows = rng.permutation(len(table.data))
    real, diagnosis = table.data[rows], table.target[rows]
    noise = [rng.permutation(real[:, j % real.shape[1]]) for j in range(noise_columns)]
    train, validation = len(rows) * 6 // 10, len(rows) * 8 // 10
    scores = QuantileTransformer(n_quantiles=train, output_distribution="normal")
    x = np.column_stack([real, *noise])
    # normal scores of values outside the training range are at 5
    x = np.clip(scores.fit(x[:train]).transform(x), -3, 3)
    relevant, y = None, diagnosis
    if target != "diagnosis":
        correlation = np.abs(np.corrcoef(x[:train, : real.shape[1]].T)) - np.eye(real.shape[1])
        chosen = rng.choice(np.flatnonzero(correlation.max(0) < TWIN), RELEVANT, replace=False)
        relevant, z = np.isin(np.arange(x.shape[1]), chosen), x[:, chosen]
        linear, products = z @ rng.choice([-1, 1], RELEVANT), z[:, 0] * z[:, 1] + z[:, 2] * z[:, 3]
        signal = linear if target == "linear" else products
        y = np.sqrt(SIGNAL) * signal / signal.std() + np.sqrt(1 - SIGNAL) * rng.standard_normal(len(x))
        y = (y - y[:train].mean()) / y[:train].std()
    columns, y = (np.split(part.astype(np.float32), [train, validation]) for part in (x, y))
    return Task(*zip(columns, y, strict=True), relevant, target == "diagnosis")


def losses(prediction, y, classify):
    return optax.sigmoid_binary_cross_entropy(prediction, y) if classify else (prediction - y) ** 2


def copula_factor(x):
    """Cholesky factor of the columns' correlations, shrunk to be well conditioned."""
    covariance = ledoit_wolf(x)[0]
    scale = np.sqrt(np.diag(covariance))
    return jnp.asarray(np.linalg.cholesky(covariance / np.outer(scale, scale)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("gates", "classify", "steps", "hidden"))
def train_gates(key, penalties, task_rows, factor, *, gates, classify, steps, hidden):
    """A network behind gates for each penalty, all seeing the same draws; and its predictions."""
    (x, y), *others = task_rows
    network_key, key = jax.random.split(key)
    rngs, columns = nnx.Rngs(network_key), x.shape[1]
    graph, network = nnx.split(
        nnx.Sequential(nnx.Linear(columns, hidden, rngs=rngs), jnp.tanh, nnx.Linear(hidden, 1, rngs=rngs))
    )
    rate = lambda start: optax.cosine_decay_schedule(start, steps)
    rules = {"network": optax.adamw(rate(0.002), weight_decay=0.1)}
    rules |= {"gates": optax.adam(rate(gates.learning_rate))}
    adam = optax.partition(rules, {name: name for name in rules})

    predict = lambda network, x: nnx.merge(graph, network)(x)[:, 0]

    def loss(params, penalty, key):
        row_key, gate_key = jax.random.split(key)
        rows = jax.random.choice(row_key, len(x), (BATCH,))
        opened = gates.draw(gate_key, params["gates"], factor, BATCH)
        fit = losses(predict(params["network"], x[rows] * opened), y[rows], classify).mean()
        return fit + penalty * gates.probability(params["gates"]).sum()

    def fit(penalty):
        def step(state, at):
            params, moments = state
            key, ramp = at
            gradient = jax.grad(loss)(params, penalty * ramp, key)
            updates, moments = adam.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), None

        params = {"network": network, "gates": jnp.full(columns, gates.start)}
        # two columns of one product pay for their gates only once the network knows what they are good for
        ramp = jnp.minimum(1, 2 * jnp.arange(steps) / steps)
        (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), (jax.random.split(key, steps), ramp))
        opened = gates.at_test(params["gates"])
        return opened, [predict(params["network"], x * opened) for x, _ in others]

    return jax.vmap(fit)(penalties)


def gates_path(gates, correlated, task, seed, steps, hidden):
    factor = copula_factor(task.train[0]) if correlated else jnp.eye(task.train[0].shape[1])
    opened, (validation, test) = train_gates(
        jax.random.key(seed), jnp.asarray(PENALTIES, jnp.float32), task[:3], factor,
        gates=gates, classify=task.classify, steps=steps, hidden=hidden,
    )  # fmt: skip
    return Path(PENALTIES, np.asarray(opened) > 0, np.asarray(validation), np.asarray(test))


def lasso_path(task, products=False):
    """Lasso or, for a class, its logistic form, on the columns or on these and all their products."""
    expand = PolynomialFeatures(2 if products else 1, include_bias=False)
    expand = make_pipeline(expand, StandardScaler()).fit(task.train[0].astype(float))
    (x, y), validation, test = ((expand.transform(x), y) for x, y in task[:3])
    used = expand[0].powers_ > 0
    paths = []
    for alpha in ALPHAS:
        if task.classify:  # the same penalty on a sum over rows; twice, because lasso halves its loss
            model = LogisticRegression(C=1 / (2 * alpha * len(y)), l1_ratio=1, solver="liblinear")
            model.fit(x, y)
            paths.append([model.coef_[0], *(model.decision_function(x) for x, _ in (validation, test))])
        else:
            model = Lasso(alpha=alpha, max_iter=50_000).fit(x, y)
            paths.append([model.coef_, *(model.predict(x) for x, _ in (validation, test))])
    coefficients, *predictions = map(np.array, zip(*paths, strict=True))
    return Path(ALPHAS, (coefficients != 0) @ used, *(x.astype(np.float32) for x in predictions))


METHODS = {
    "lasso": lambda task, *_: lasso_path(task),
    "lasso on products": lambda task, *_: lasso_path(task, products=True),
    "stochastic gates": functools.partial(gates_path, GAUSSIAN, False),
    "independent bits": functools.partial(gates_path, BITS, False),
    "correlated gates": functools.partial(gates_path, BITS, True),
}


def choose(path, task, errors):
    """The fewest columns whose validation loss is within this many standard errors of the best."""
    loss = np.asarray(losses(path.validation, task.validation[1], task.classify))
    mean, best = loss.mean(1), loss.mean(1).argmin()
    good = mean <= mean[best] + errors * loss[best].std(ddof=1) / np.sqrt(loss.shape[1])
    counts = path.selected.sum(1)
    return min(np.flatnonzero(good), key=lambda i: (counts[i], mean[i]))


def score(prediction, y, classify):
    """Accuracy for a class, otherwise the share of the variance that is explained."""
    return accuracy_score(y, prediction > 0) if classify else r2_score(y, prediction)


def evaluate(path, index, task):
    """The selection at the chosen penalty, how much of it is true, and how well it predicts."""
    selected = path.selected[index]
    row = {
        "penalty": float(path.penalties[index]),
        "columns": np.flatnonzero(selected).tolist(),
        "count": int(selected.sum()),
        "noise": int(selected[REAL_COLUMNS:].sum()),
        "test": float(score(path.test[index], task.test[1], task.classify)),
    }
    if task.relevant is not None:
        measures = precision_recall_fscore_support(task.relevant, selected, average="binary", zero_division=0)
        row |= dict(zip(("precision", "recall", "f1"), map(float, measures[:3]), strict=True))
    return row


def summary(rows):
    """Mean and standard error over seeds of all numbers."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "columns"}
    error = lambda x: float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else 0.0
    return {name: (float(x.mean()), error(x)) for name, x in values.items()}


def draw(results, paths, everything, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=[1, 1, 1.3], layout="constrained")
    for axis, target in zip(axes, ("linear", "products"), strict=False):
        for place, (name, rows) in enumerate(results[target].items()):
            f1 = [row["f1"] for row in rows]
            axis.barh(place, np.mean(f1), color=COLOURS[name], alpha=0.6)
            axis.plot(f1, place + np.linspace(-0.25, 0.25, len(f1)), "o", ms=3.5, color="black")
        axis.set_yticks(range(len(METHODS)), METHODS if target == "linear" else [])
        axis.invert_yaxis()
        axis.set(xlim=(-0.03, 1.03), xlabel="F1 of the selected columns", title=TITLES[target])
        axis.grid(alpha=0.3, axis="x")
    for name, runs in paths.items():
        counts, accuracy = np.mean(runs, 0)
        axes[2].plot(counts, accuracy, ".-", color=COLOURS[name], alpha=0.5, lw=1)
        chosen = summary(results["diagnosis"][name])
        (x, dx), (y, dy) = chosen["count"], chosen["test"]
        axes[2].errorbar(x, y, dy, dx, "o", ms=8, color=COLOURS[name], mec="white", capsize=3, label=name)
    axes[2].axhline(np.mean(everything), color="black", lw=1, ls=":", label="logistic, all columns")
    axes[2].set(xlabel="selected columns", ylabel="test accuracy", title="diagnosis", ylim=(0.85, 1))
    axes[2].set_xscale("log")
    axes[2].set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes[2].minorticks_off()
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option("--seeds", type=SIZE, default=5, help="Number of splits of the rows and targets.")
@click.option(
    "--noise-columns", type=click.IntRange(1, 100), default=30, help="Number of permuted copies of columns."
)
@click.option("--steps", type=STEPS, default=3000, help="Number of Adam steps for the gates.")
@click.option("--hidden", type=SIZE, default=128, help="Number of units in the gates' network.")
@out_option
def main(seeds, noise_columns, steps, hidden, out):
    """Select columns of a table with lasso and with gates, with known and with unknown relevant columns.

    Writes metrics.json and feature_selection.png.
    """
    out = output_folder(out, "feature_selection")
    results = {rule: {target: {name: [] for name in METHODS} for target in TARGETS} for rule in RULES}
    truths, paths, everything = {"linear": [], "products": []}, {name: [] for name in METHODS}, []
    for target, at in tqdm([(t, s) for t in TARGETS for s in range(seeds)], unit="task"):
        task = make_task(target, at, noise_columns)
        for name, select in METHODS.items():
            path = select(task, at, steps, hidden)
            for rule, errors in RULES.items():
                results[rule][target][name].append(evaluate(path, choose(path, task, errors), task))
            if task.classify:
                accuracy = [score(prediction, task.test[1], True) for prediction in path.test]
                paths[name].append([path.selected.sum(1), accuracy])
        if task.classify:
            everything.append(LogisticRegression(max_iter=1000).fit(*task.train).score(*task.test))
        else:
            truths[target].append(np.flatnonzero(task.relevant).tolist())
    for rule, target in [(rule, target) for rule in RULES for target in TARGETS]:
        click.echo(f"{target}, {rule} (mean ± standard error of {seeds})")
        for name, rows in results[rule][target].items():
            values = summary(rows).items()
            click.echo(f"  {name:18}" + ", ".join(f"{k} {m:.3g} ± {e:.2g}" for k, (m, e) in values))
    click.echo(f"logistic regression on all columns: accuracy {np.mean(everything):.3f}")
    draw(results["one standard error"], paths, everything, out / "feature_selection.png")
    settings = {"seeds": seeds, "noise_columns": noise_columns, "steps": steps, "hidden": hidden}
    metrics = {"results": results, "relevant": truths, "all_columns": everything}
    write_json(out / "metrics.json", metrics | {"settings": settings, "versions": versions()})
    click.echo(f"in {out}: feature_selection.png, metrics.json")


if __name__ == "__main__":
    run(main)
