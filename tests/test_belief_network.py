"""The belief networks: gradients match sums over all outcomes, bounds are bounds, calls are counted."""

import functools

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import belief_network as example
from checkpoints import Checkpoints
from command_lines import bars, read
from command_lines import run as run_example
from relaxit_jax import estimators as es

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(4)
SAMPLES = 3  # of arms and rloo: not the default, and odd


def log_bernoulli(logits, bits):
    return jnp.sum(jnp.where(bits == 1, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)), -1)


def every_outcome(layers, model, x):
    """log p(x, b) and log q(b | x) of all b of all layers, by the definition: no entropy in closed form."""
    units = example.SMALL_UNITS
    bits = jnp.asarray(list(np.ndindex(*[2] * (units * layers))), jnp.float32).reshape(-1, layers, units)
    log_p, log_q, below = log_bernoulli(model.prior[...], bits[:, -1]), 0.0, x
    for layer in range(layers):
        up, down, own = model.up[layer], model.down[layer], bits[:, layer]
        inputs = x - 0.5 if layer == 0 else 2 * below - 1
        log_q += log_bernoulli(inputs @ up.kernel[...] + up.bias[...], own)
        log_p += log_bernoulli((2 * own - 1) @ down.kernel[...] + down.bias[...], below)
        below = own
    return log_p, log_q


@functools.cache
def enumerated(layers):
    """The ELBO of the small network, its gradient, and log p(x)."""
    merge, params, x = example.small_network(layers)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    def bound(flat):
        log_p, log_q = every_outcome(layers, merge(unflatten(flat)), x)
        return jnp.sum(jnp.exp(log_q) * (log_p - log_q)), jax.nn.logsumexp(log_p)

    (value, evidence), gradient = jax.jit(jax.value_and_grad(bound, has_aux=True))(flat)
    return float(value), np.asarray(gradient), float(evidence)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_exact_inside_of_exact_is_the_gradient_over_all_outcomes(layers):
    """This is the example's reference."""
    _, exact = example.small_gradients(KEY, layers, es.reinforce, 2)
    np.testing.assert_allclose(exact, enumerated(layers)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", example.METHODS)
@pytest.mark.parametrize("layers", [2, 3])
def test_a_gradient_is_that_of_all_outcomes_or_known_to_be_biased(layers, method):
    """Every parameter of both networks is checked; only straight-through is wrong, when it infers."""
    exact = enumerated(layers)[1]
    estimator = example.estimator_of(method, SAMPLES)[0]
    rows, _ = example.small_gradients(KEY, layers, estimator, 20_000)
    error = rows.std(0) / np.sqrt(len(rows))
    assert np.abs(exact).max() > 20 * error.max()
    scores = np.abs(rows.mean(0) - exact) / (error + 1e-6)
    if method == "straight_through":
        assert scores.max() > 20
        # the network that generates is trained on exact draws, but for what they are drawn from
        _, params, _ = example.small_network(layers)
        sides = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(params)
                 for _ in range(x.size)]  # fmt: skip
        down = np.array(["up" not in side for side in sides])
        assert 0 < down.sum() < len(down) and (scores[down] < 4.8).all() and scores[~down].max() > 20
    else:
        assert (scores < 4.8).all(), scores.max()


@pytest.mark.parametrize("method", example.METHODS)
def test_its_value_is_the_bound_in_the_mean(method):
    """This includes straight-through, whose draws are exact."""
    merge, params, x = example.small_network(2)
    estimator = example.estimator_of(method, SAMPLES)[0]
    one = lambda key: example.elbo(merge(params), x, key, estimator)[0]
    values = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 20_000)), float)
    assert abs(values.mean() - enumerated(2)[0]) < 4.5 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_of_exact_draws_average_to_the_probability_of_the_image(layers):
    """The mean of their logarithm is the ELBO; more samples give a tighter bound."""
    merge, params, x = example.small_network(layers)
    elbo, _, evidence = enumerated(layers)
    draw = lambda key: example.log_weights(merge(params), x[0], key)
    logs = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 200_000)), float)
    assert abs(logs.mean() - elbo) < 4.5 * logs.std() / np.sqrt(len(logs))
    weights = np.exp(logs - evidence)
    assert abs(weights.mean() - 1) < 4.5 * weights.std() / np.sqrt(len(weights))
    assert elbo < evidence - 0.1


@pytest.mark.parametrize("method", example.METHODS)
def test_calls_are_counted_as_they_run(method, monkeypatch):
    """It counts the f of each layer: under vmap there is one call for every element."""
    layers, seen = 3, []
    plain = example.BeliefNetwork.log_likelihood

    def counted(self, layer, below, bits):
        jax.debug.callback(lambda _: seen.append(layer), bits.reshape(-1)[0] + below.reshape(-1)[0])
        return plain(self, layer, below, bits)

    monkeypatch.setattr(example.BeliefNetwork, "log_likelihood", counted)
    merge, params, x = example.small_network(layers)
    estimator = example.estimator_of(method, SAMPLES)[0]
    jax.block_until_ready(jax.jit(lambda key: example.elbo(merge(params), x, key, estimator))(KEY))
    jax.effects_barrier()
    expected = example.calls_of_layers(method, layers, SAMPLES)
    assert [seen.count(layer) for layer in range(layers)] == expected


# --- the command ---------------------------------------------------------------------------------

SMALL = ["--units", 3, "--batch-size", 16, "--estimates", 100, "--learning-rate", 0.02]
run = functools.partial(run_example, example=example)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, images=bars())
    return path


def test_example_from_flags_to_files(images, tmp_path, capsys):
    """Its numbers come from the parameters in its last checkpoint, and the bounds are in their order."""
    flags = [*SMALL, "--data", images, "--epochs", 3, "--layers", 2, "--layers", 1, "--out", tmp_path / "run"]
    assert run(*flags, "--method", "disarm", "--method", "straight_through") == 0
    out, metrics = tmp_path / "run", read(tmp_path / "run")
    assert list(metrics["results"]) == ["1", "2"]
    calls = {"disarm": [2, 4], "straight_through": [1, 1]}
    for layers, rows in metrics["results"].items():
        assert list(rows) == list(calls)
        for method, row in rows.items():
            assert row["calls_of_f"] == calls[method][: int(layers)]
            assert [set(epoch) for epoch in row["history"]] == [{"train", "test"}] * 3
            bounds = row["test_negative_bounds"]
            assert list(bounds) == ["1", "50"] and 0 < bounds["50"] < bounds["1"]
    pixels = example.load_images(str(images))
    options = {k: metrics["settings"][k] for k in example.Config._fields if k not in ("method", "layers")}
    config = example.Config("disarm", 2, **options)
    experiment = example.Experiment(config, *example.split_images(pixels))
    settings = config._asdict() | {"data": example.digest(pixels)}
    folder = out / "disarm-2" / "checkpoints"
    epoch, state, _ = Checkpoints(folder, settings).restore(experiment.state)
    assert epoch == 2
    found = metrics["results"]["2"]["disarm"]["test_negative_bounds"]
    single, weighted = experiment.test_bounds(state[0], experiment.test, 50)
    np.testing.assert_allclose([found["1"], found["50"]], [single, weighted], rtol=1e-5)
    # the same draws, one after the other
    model = experiment.model(state[0])
    keys = jax.random.split(experiment.test_key, len(experiment.test))
    one = lambda x, key: jax.vmap(lambda key: example.log_weights(model, x, key))(jax.random.split(key, 50))
    logs = np.asarray(jax.jit(jax.vmap(one))(experiment.test, keys), float)
    np.testing.assert_allclose(found["1"], -logs.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["50"], -np.log(np.exp(logs).mean(1)).mean(), rtol=1e-5)
    assert (out / "belief_network.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "     2 disarm " in said and "       2 + 4 " in said


def test_a_run_that_was_stopped_resumes_to_the_same_metrics(images, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--data", images, "--epochs", 3, "--layers", 2, "--method", "disarm", "--method", "rloo"]
    assert run(*flags, "--out", tmp_path / "whole") == 0
    save = Checkpoints.save

    def save_and_stop(self, epoch, *rest):
        save(self, epoch, *rest)
        if self.folder.parent.name == "rloo-2" and epoch == 1:
            raise click.Abort

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        assert run(*flags, "--out", tmp_path / "stopped") == 130
    assert run(*flags, "--out", tmp_path / "stopped") == 2
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err
    assert run(*flags, "--out", tmp_path / "stopped", "--resume") == 0
    assert read(tmp_path / "stopped") == read(tmp_path / "whole")
    assert run(*flags, "--out", tmp_path / "stopped", "--resume", "--seed", 5) == 2
    assert "has other settings: seed 0; give the same ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method nonsense", "is not one of 'disarm', 'arms', 'rebar', 'rloo', 'straight_through'"),
        ("--layers 4", "4 is not in the range 1<=x<=3"),
        ("--data nonsense", "use mnist5k, digits, mnist, the path of an .npz file, or a folder"),
        ("--data digits --batch-size 100000", "is above the 1437 training images; lower it"),
        ("--data digits --resume", "--resume needs the run's folder"),
        ("--data digits --resume --out {}/new", "there is no run to resume in"),
    ],
)
def test_bad_input_is_one_line(flags, words, tmp_path, capsys):
    assert run(*flags.format(tmp_path).split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and words in line
    assert not list(tmp_path.iterdir())


def test_a_bound_that_is_not_finite_is_one_line(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example.Experiment, "epoch", lambda self, state, grey, number: (state, np.nan))
    flags = [*SMALL, "--data", images, "--layers", 1, "--method", "disarm", "--out", tmp_path]
    assert run(*flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: the bound of disarm, layers 1 became nan in epoch 1; lower --learning-rate"


def test_help_explains_every_option(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for parameter in example.main.params:
        assert parameter.opts[0] in text and (getattr(parameter, "help", "") or "").strip()
    for method in example.METHODS:
        assert method in text
