"""The examples, run with tiny flags: their bounds are bounds, a kill loses nothing, errors are one line."""

import os
import signal
import subprocess
import sys
import time
from urllib.error import URLError

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Trace_ELBO
from scipy.special import softmax
from scipy.stats import multivariate_normal

import common
import correlated_gates
import laplace_bridge
import mixture
import posteriors
import spike_and_slab
import vae
from checkpoints import Checkpoints
from command_lines import EXAMPLES, TINY, bars, read, run, tiny
from methods import METHODS
from relaxit_jax.handlers import AutoMeanField

KEY = jax.random.key(3)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, images=bars())
    return path


def config_of(settings):
    return vae.Config(**{k: tuple(v) if k == "hidden" else v for k, v in settings.items()})


@pytest.mark.parametrize("method", ["relaxed_bernoulli", "poisson", "vimco", "relax_categorical"])
def test_vae_writes_what_it_trained(method, images, tmp_path):
    """Its metrics are the bounds of the parameters in its last checkpoint; and its pictures exist."""
    out = tmp_path / "run"
    assert run(*TINY, "--data", images, "--method", method, "--out", out, "--epochs", 3) == 0
    metrics = read(out)
    for picture in ("reconstructions.png", "samples.png", "curve.png"):
        assert (out / picture).stat().st_size > 1000
    split = common.split_images(common.load_images(str(images)))
    experiment = vae.Experiment(config_of(metrics["settings"]), *split)
    settings = metrics["settings"] | {"data": common.digest(np.concatenate(split))}
    checkpoints = Checkpoints(out / "checkpoints", settings)
    epoch, state, history = checkpoints.restore(experiment.state)
    assert epoch == 2 and len(history) == len(metrics["history"]) == 3
    bounds = experiment.test_bounds(state[0], experiment.test, 100)
    assert list(bounds) == list(vae.SAMPLES)
    np.testing.assert_allclose(metrics["test_negative_elbo"], bounds[1], rtol=1e-5)
    np.testing.assert_allclose(metrics["test_negative_bound_100_samples"], bounds[100], rtol=1e-5)
    np.testing.assert_allclose(
        list(metrics["test_negative_bounds"].values()), list(bounds.values()), rtol=1e-5
    )
    (bound,) = experiment.test_bounds(state[0], experiment.test, 1).values()
    np.testing.assert_allclose(metrics["history"][-1]["test"], bound, rtol=1e-5)


def start(out, images, *extra):
    """A run in a separate process; compiled programs are shared, so the test is short."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(images.parent),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, EXAMPLES / "vae.py", *TINY, "--data", images, "--out", out, "--epochs", "40"]
    return subprocess.Popen(
        [*map(str, command), *extra], stderr=subprocess.PIPE, text=True, env=os.environ | cache
    )


def test_a_killed_run_resumes_to_the_same_metrics(images, tmp_path):
    """SIGKILL, three times; the metrics agree to the last bit with a run left alone."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    first, second = start(alone, images), start(killed, images)
    for moment in ("checkpoints", "checkpoints/3*", "checkpoints/12*"):  # the first: before any is whole
        deadline = time.monotonic() + 120
        while not list(killed.glob(moment)):
            assert time.monotonic() < deadline and second.poll() is None
            time.sleep(0.001)
        second.send_signal(signal.SIGKILL)
        assert second.wait() == -signal.SIGKILL
        assert not (killed / "metrics.json").exists()
        second.stderr.close()
        second = start(killed, images, "--resume")
    for process in (first, second):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert read(alone) == read(killed)


# orbax leaves coroutines unawaited when a read of it fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_set_aside(images, tmp_path, capsys):
    flags = [*TINY, "--data", images, "--epochs", 5]
    assert run(*flags, "--out", tmp_path / "whole") == 0
    out = tmp_path / "damaged"
    assert run(*flags, "--out", out) == 0
    (out / "metrics.json").unlink()
    for path in (out / "checkpoints" / "4" / "state").rglob("d/*"):  # where the arrays are
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + os.urandom(len(content) - len(content) // 2))
    capsys.readouterr()
    assert run(*flags, "--out", out, "--resume") == 0
    assert "warning: checkpoint 4 is damaged" in capsys.readouterr().err
    assert read(out) == read(tmp_path / "whole")
    assert (out / "damaged" / "epoch-4").is_dir()  # nothing is thrown away
    for checkpoint in (out / "checkpoints").iterdir():
        for path in checkpoint.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    assert run(*flags, "--out", out, "--resume") == 2
    assert "is damaged; start again in another --out" in capsys.readouterr().err.splitlines()[-1]


def bad_files(folder):
    one = np.full((20, 4, 4), 0.5, np.float32)
    nan, large = one.copy(), one.copy()
    nan[3, 2, 1], large[0, 0, 0] = np.nan, 255
    ragged = np.empty(3, object)
    ragged[:] = [one[0], one[0, :2], one[1]]
    arrays = {
        "nan": nan,
        "large": large,
        "ragged": ragged,
        "flat": one[0],
        "none": one[:0],
        "text": np.array(["a"]),
    }
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", images=array)
    np.savez(folder / "two.npz", a=one, b=one)
    (folder / "empty.npz").write_bytes(b"")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    (folder / "file").write_text("not a folder")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method nonsense", "is not one of 'relaxed_bernoulli'"),
        ("--data nonsense", "use mnist5k, digits, mnist, the path of an .npz file, or a folder"),
        ("--data {}/absent.npz", "there is no file"),
        ("--data {}/empty.npz", "is not a readable .npz file"),
        ("--data {}/broken.npz", "is not a readable .npz file"),
        ("--data {}/ragged.npz", "maybe images of different sizes; resize them"),
        ("--data {}/flat.npz", "it must be (images, height, width)"),
        ("--data {}/none.npz", "holds 0 images"),
        ("--data {}/text.npz", "they must be numbers"),
        ("--data {}/two.npz", "name the one to use 'images'"),
        ("--data {}/nan.npz", "holds 1 NaN values; remove or replace them"),
        ("--data {}/large.npz", "scale them to [0, 1]"),
        ("--data digits --out {}/file/run", "choose another folder with --out"),
        ("--data digits --batch-size 100000", "is above the 1437 training images; lower it"),
        ("--data digits --latents 4 --subset-size 5", "lower it"),
        ("--data digits --method disarm --samples 3", "--samples 3 is for rloo, arms, vimco"),
        ("--data digits --tau 0", "0.0 is not in the range 0.001<=x<=1000"),
        ("--data digits --seed -1", "-1 is not in the range 0<=x<=4294967295"),
        ("--data digits --hidden 5,x", "'5,x' is not a list such as 512,512: 'x' is not a valid"),
        ("--data digits --resume", "--resume needs the run's folder"),
        ("--data digits --resume --out {}/new", "there is no run to resume in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, tmp_path, capsys):
    bad_files(tmp_path)
    assert run(*flags.format(tmp_path).split()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert words in line


def test_a_run_is_never_overwritten_nor_mixed(images, tmp_path, capsys):
    flags = [*TINY, "--data", images, "--epochs", 1, "--out", tmp_path / "run"]
    assert run(*flags) == 0
    assert run(*flags) == 2
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err
    assert run(*flags, "--resume", "--seed", 5) == 2
    assert "has other settings: seed 0; give the same ones" in capsys.readouterr().err


def test_defaults_fit_the_number_of_images():
    left_open = tiny("disarm", epochs=None, augment=None)
    for images, expected in ((4_000, (50, True)), (60_000, (10, False))):
        found = vae.fitted(left_open, images)
        assert (found.epochs, found.augment) == expected
        given = tiny("disarm", epochs=0, augment=not expected[1])
        assert vae.fitted(given, images) == given


def test_mnist_without_a_network_is_one_line(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", offline)
    assert run("--data", "mnist") == 2
    assert "use the 5,000 images that need none: --data mnist5k" in capsys.readouterr().err


@pytest.mark.parametrize("example", [vae, mixture, spike_and_slab], ids=lambda e: e.__name__)
def test_help_explains_every_option(example, capsys):
    assert run("--help", example=example) == 0
    text = capsys.readouterr().out
    for parameter in example.main.params:
        assert parameter.opts[0] in text and (getattr(parameter, "help", "") or "").strip()
    for method in METHODS if example is vae else ("relaxed", "straight_through"):
        assert method in text


def test_real_digits_are_what_they_should_be():
    images = common.load_images("mnist5k")
    assert images.shape == (5000, 28, 28) and images.min() == 0 and images.max() == 1
    training, test = common.split_images(images)
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(test, images[order[4000:]])
    np.testing.assert_array_equal(vae.binarise(test), (images[order[4000:]] * 255 > 127).reshape(1000, -1))
    assert common.load_images("digits").shape == (1797, 8, 8)
    moved = vae.augment(KEY, jnp.asarray(training[:200]))
    assert moved.shape == (200, 28, 28)
    change = (
        jnp.abs(vae.binarise(moved) - vae.binarise(training[:200])).sum() / vae.binarise(training[:200]).sum()
    )
    assert 0.1 < change < 0.8  # it moves digits, and keeps most of them


def test_laplace_bridge_example(tmp_path):
    laplace_bridge.main(["--grid", "120", "--out", str(tmp_path)], standalone_mode=False)
    metrics = read(tmp_path)
    np.testing.assert_allclose(metrics["concentration_back"], metrics["concentration"], rtol=1e-4)
    np.testing.assert_allclose(metrics["mass_on_the_grid"], 1, atol=0.02)
    assert 0.01 < metrics["total_variation_dirichlet_to_logistic_normal"] < 0.2
    assert (tmp_path / "densities.png").stat().st_size > 10_000


def test_correlated_gates_example(tmp_path):
    correlated_gates.main(["--draws", "50000", "--out", str(tmp_path)], standalone_mode=False)
    for row in read(tmp_path)["table"]:
        assert abs(row["seen"] - row["exact"]) < 4.5 * row["standard_error"], row
    assert (tmp_path / "gates.png").stat().st_size > 10_000


def unrelaxed_losses(model, params, *args, draws=2000):
    """-ELBO of the discrete guide with these parameters, one draw each."""
    guide = AutoMeanField(model)
    loss = lambda key: Trace_ELBO().loss(key, params, model, guide, *args)
    loss(KEY)  # the guide reads the model on its first call, outside the trace
    return np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(KEY, draws)), float)


def test_mixture_answer_is_the_optimum_of_the_bound_of_its_model():
    """Its -ELBO agrees with NumPyro for the same guide, and every other guide of the family is worse."""
    centres, _, x = mixture.make_data(3, 40, 2.0, 0)
    q, loc, loss = mixture.coordinate_ascent(x, centres)
    variance = 1 / (1 / mixture.PRIOR_SCALE**2 + q.sum(0))[:, None]
    scale = np.sqrt(np.broadcast_to(variance, loc.shape))
    rng = np.random.default_rng(0)
    move = lambda size: {
        "z_auto_logits": jnp.asarray(np.log(q) + size * rng.normal(size=q.shape), jnp.float32),
        "loc_auto_loc": jnp.asarray(loc + size * scale * rng.normal(size=loc.shape), jnp.float32),
        "loc_auto_scale": jnp.asarray(scale * np.exp(size * rng.normal(size=loc.shape)), jnp.float32),
    }
    seen = unrelaxed_losses(mixture.model, move(0), x, 3)
    assert abs(seen.mean() - loss) < 4.5 * seen.std() / np.sqrt(len(seen))
    for size in (0.3, 0.6):
        other = unrelaxed_losses(mixture.model, move(size), x, 3)
        assert other.mean() - loss > 4.5 * other.std() / np.sqrt(len(other))


def test_mixture_example(tmp_path):
    flags = "--clusters 3 --points 60 --separation 2 --steps 600 --particles 10 --tau 0.05 --seed 1"
    assert run(*flags.split(), "--method", "relaxed", "--out", tmp_path, example=mixture) == 0
    metrics = read(tmp_path)
    assert metrics["mean_difference"] < 0.03 and metrics["largest_difference"] < 0.15
    assert metrics["final_loss_unrelaxed"] > metrics["loss_closed_form"] - 0.5
    assert abs(metrics["accuracy"] - metrics["accuracy_closed_form"]) < 0.1
    assert (tmp_path / "mixture.png").stat().st_size > 10_000


def test_exact_inclusion_is_that_of_every_support_written_out():
    x, y, _ = spike_and_slab.make_data(9, 2, 1, 0.5, 0)
    x, y = x.astype(float), y.astype(float)
    joint, slopes = {}, {}
    for support in ([], [0], [1], [0, 1]):
        own = x[:, support]
        law = multivariate_normal(cov=np.eye(9) + 4 * own @ own.T)
        joint[tuple(support)] = law.logpdf(y) + len(support) * np.log(0.2) + (2 - len(support)) * np.log(0.8)
        slopes[tuple(support)] = 4 * own.T @ np.linalg.solve(np.eye(9) + 4 * own @ own.T, y)
    weights = dict(zip(joint, softmax(list(joint.values())), strict=True))
    q, w, evidence = spike_and_slab.enumerate_supports(x, y)
    np.testing.assert_allclose(q, [weights[(k,)] + weights[(0, 1)] for k in (0, 1)])
    means = [weights[(k,)] * slopes[(k,)][0] + weights[(0, 1)] * slopes[(0, 1)][k] for k in (0, 1)]
    np.testing.assert_allclose(w, means)
    np.testing.assert_allclose(evidence, np.log(np.exp(list(joint.values())).sum()))


def test_best_mean_field_inclusion_is_that_of_a_general_optimizer():
    q, _, loss = spike_and_slab.best_mean_field(*posteriors.regression_data())
    np.testing.assert_allclose(q, posteriors.spike_and_slab_answer()["on"], atol=1e-4)
    assert loss > -spike_and_slab.enumerate_supports(*posteriors.regression_data())[2]


def test_spike_and_slab_example(tmp_path):
    """It uses a different method than the mixture: test_relax.py covers what a method does to a site."""
    flags = "--rows 100 --columns 5 --support 2 --correlation 0.3 --steps 1000 --particles 10"
    method = "straight_through"
    assert run(*flags.split(), "--method", method, "--out", tmp_path, example=spike_and_slab) == 0
    metrics = read(tmp_path)
    assert metrics["support_found"] == metrics["support_true"] == metrics["support_exact"]
    assert metrics["largest_difference_from_mean_field"] < 0.05
    assert metrics["minus_log_evidence"] < metrics["loss_mean_field"]
    assert metrics["final_loss_unrelaxed"] > metrics["loss_mean_field"] - 0.1
    assert (tmp_path / "spike_and_slab.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("example", "flags", "words"),
    [
        (mixture, "--tau 0", "0.0 is not in the range 0.001<=x<=1000"),
        (mixture, "--method nonsense", "is not one of 'relaxed', 'straight_through'"),
        (mixture, "--clusters 8 --points 20 --seed 0", "leave a cluster empty; raise --points"),
        (mixture, "--points 20 --steps 30 --learning-rate 100 --out {}", "the loss is not finite from step"),
        (spike_and_slab, "--columns 17", "17 is not in the range 1<=x<=16"),
        (spike_and_slab, "--support 13", "is above the 12 columns; lower it"),
        (spike_and_slab, "--correlation 1", "1.0 is not in the range"),
        (spike_and_slab, "--out {}/file/run", "choose another folder with --out"),
    ],
)
def test_bad_input_of_the_numpyro_examples_is_one_line(example, flags, words, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert run(*flags.format(tmp_path).split(), example=example) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # below the progress bar, if it came so far
    assert line.startswith("error: ") and words in line
