"""Published protocols: the records are complete, the loop trains what it says, and stopped runs go on."""

import gzip
import itertools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import common
import published
import reproduce
from command_lines import run
from relaxit_jax.distributions import SimpleTopK

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(26)
PROTOCOLS = published.PROTOCOLS
VAES = {name: p for name, p in PROTOCOLS.items() if p.train is reproduce.train_vae}
ONLY_OURS = {"mnist", "fashion"}


# --- the records ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_record_has_its_source_its_figures_and_what_differs(name):
    protocol = PROTOCOLS[name]
    assert protocol.source and protocol.differs.endswith(".") and protocol.rows and protocol.rates
    figures = [
        f for row in protocol.rows.values() for points in row.published.values() for f in points.values()
    ]
    numbers = np.ravel([f for f in figures if f is not None and not isinstance(f, tuple)]).astype(float)
    spans = [f for f in figures if isinstance(f, tuple)]
    assert all(low < high for low, high in spans) and np.isfinite(numbers).all()
    assert bool(len(numbers) + len(spans)) == (name not in ONLY_OURS)
    if name not in ONLY_OURS:
        assert "arXiv:" in protocol.source or "github.com/" in protocol.source
    for point in (p for row in protocol.rows.values() for points in row.published.values() for p in points):
        last = point[1] if isinstance(point, tuple) else point
        assert last in ("best", "end") or 1 <= last <= protocol.epochs


@pytest.mark.parametrize("name", VAES)
def test_every_figure_is_one_that_the_loop_measures(name):
    protocol = VAES[name]
    assert all(row.method in reproduce.TRAINED_BY for row in protocol.rows.values())
    measured = {"train", "test, notebook's reading"}
    measured |= {part if n == 1 else f"{part}, {n:,} samples" for part, n in protocol.evaluation}
    assert {measure for measure, _ in published.points_of(protocol)} <= measured


# --- the objective ------------------------------------------------------------------------------------

PIXELS = 5
IMAGES = reproduce.Images(*(np.random.default_rng(i).integers(0, 256, (n, PIXELS), np.uint8)
                            for i, n in enumerate((40, 12, 20))), 255)  # fmt: skip


def tiny(latents, **options):
    settings = {"hidden": (4,), "batch_size": 8, "optimizer": optax.sgd, "rates": (0.1,)} | options
    return PROTOCOLS["storchastic"]._replace(latents=latents, **settings)


def training(method, latents, **options):
    return reproduce.Training(tiny(latents, **options), method, IMAGES, 3, 0.1)


def values_of_objective(made, x, key):
    params, variate, _ = made.state
    q = made.model(params).encode(x)[0]
    return made.loss((params, q), variate, x, key, 1.0)


def by_hand(made, x, outcomes, law):
    """The negative ELBO of a uniform prior over these outcomes, in float64, with the network written out."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), made.state[0])
    h = x.astype(np.float64)
    (w1, b1), (w2, b2) = params["encoder"]
    (v1, c1), (v2, c2) = params["decoder"]
    probs = law(np.maximum(h @ w1 + b1, 0) @ w2 + b2)  # (images, outcomes)
    logits = np.maximum(outcomes @ v1 + c1, 0) @ v2 + c2
    log_likelihood = h @ logits.T - np.logaddexp(0, logits).sum(-1)
    kl = (probs * np.log(probs * len(outcomes))).sum(-1)
    return np.mean(kl - (probs * log_likelihood).sum(-1))


def pairs_of_classes(q):
    p = np.exp(q.reshape(len(q), 2, 3))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("ni,nj->nij", p[:, 0], p[:, 1]).reshape(len(q), 9)


PAIRS = np.array([np.concatenate([np.eye(3)[i], np.eye(3)[j]]) for i in range(3) for j in range(3)])
TWO_OF_FOUR = np.array([z for z in itertools.product((0.0, 1.0), repeat=4) if sum(z) == 2])


def subsets_of_two(q):
    p = np.exp(q @ TWO_OF_FOUR.T)
    return p / p.sum(-1, keepdims=True)


def test_the_objective_is_the_negative_elbo_written_out():
    made = training("exact", {"variables": 2, "classes": 3})
    x = made.pixels(jnp.asarray(IMAGES.train[:7]))
    np.testing.assert_allclose(x, IMAGES.train[:7] / 255, rtol=1e-6)
    np.testing.assert_allclose(
        values_of_objective(made, x, KEY), by_hand(made, np.asarray(x), PAIRS, pairs_of_classes), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("method", "latents", "outcomes", "law"),
    [
        ("rebar_categorical", {"variables": 2, "classes": 3}, PAIRS, pairs_of_classes),
        ("simple_top_k", {"variables": 1, "classes": 4, "subset_size": 2}, TWO_OF_FOUR, subsets_of_two),
    ],
)
def test_the_objective_and_the_bound_have_the_elbo_as_their_mean(method, latents, outcomes, law):
    made = training(method, latents)
    x = made.pixels(jnp.asarray(IMAGES.test))
    expected = by_hand(made, np.asarray(x), outcomes, law)
    one = jax.jit(lambda key: values_of_objective(made, x, key))
    values = np.asarray(jax.lax.map(one, jax.random.split(KEY, 3000), batch_size=500), np.float64)
    assert abs(values.mean() - expected) < 4.5 * values.std() / 3000**0.5
    many = jnp.asarray(np.tile(IMAGES.test, (300, 1)))
    assert abs(made.bound(made.state[0], many, 1)[""] - expected) < 4.5 * values.std() / 300**0.5


def test_the_bound_of_many_draws_is_the_log_likelihood_in_the_end():
    made = training("gumbel_softmax", {"variables": 2, "classes": 3})
    x = made.pixels(jnp.asarray(IMAGES.test))
    network = made.model(made.state[0])
    log_p = jax.vmap(lambda z: network.log_likelihood(x, z))(jnp.asarray(PAIRS, jnp.float32))
    expected = -jnp.mean(jax.nn.logsumexp(log_p, 0) - math.log(9))
    np.testing.assert_allclose(made.bound(made.state[0], made.images.test, 1000)[""], expected, atol=0.02)


@pytest.mark.parametrize(
    "method", ["score function", "rloo_categorical", "rebar_categorical", "relax_categorical"]
)
def test_gradients_are_those_of_the_enumerated_objective(method):
    latents = {"variables": 2, "classes": 3}
    made, enumerated = training(method, latents), training("exact", latents)
    x = made.pixels(jnp.asarray(IMAGES.train[:6]))
    params = enumerated.state[0]
    right = enumerated.gradients(params, {}, x, KEY, 1.0)[1][0]
    one = jax.jit(lambda key: made.gradients(params, made.state[1], x, key, 1.0)[1][0])
    found = jax.lax.map(one, jax.random.split(KEY, 4000), batch_size=500)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a = np.asarray(a, np.float64)
        assert np.all(np.abs(a.mean(0) - b) < 4.8 * a.std(0) / 4000**0.5 + 1e-5)


def test_a_call_of_many_steps_is_the_steps_one_by_one():
    tau = lambda step: 1.0 / (1 + step)
    made = training("gumbel_softmax", {"variables": 2, "classes": 3}, tau=tau)
    rows = made.rows(0)
    assert rows.shape == (5, 8) and sorted(rows.ravel()) == list(range(40))
    assert not np.array_equal(rows, made.rows(1))
    params, variate, _ = made.state
    copied = jax.tree.map(jnp.copy, made.state)
    state, mean = made.advance(copied, made.images.train, rows[:2], 10)
    values = []
    for number, each in zip((10, 11), rows, strict=False):
        x = made.pixels(made.images.train[each])
        key = jax.random.fold_in(made.train_key, number)
        value, (slopes, _) = made.gradients(params, variate, x, key, tau(number))
        params = jax.tree.map(lambda p, slope: p - 0.1 * slope, params, slopes)
        values.append(value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state[0], params)
    np.testing.assert_allclose(mean, np.mean(values), rtol=1e-5)


# --- SIMPLE's two readings ----------------------------------------------------------------------------


def test_late_entropy_is_that_of_the_last_bits():
    logits = np.array([[0.3, -1.0, 2.0, 0.1, -0.4], [0.0] * 5])
    subsets = np.array([z for z in itertools.product((0, 1), repeat=5) if sum(z) == 2])
    for row, found in enumerate(
        np.asarray([reproduce.late_entropy(jnp.asarray(logits), 2, m) for m in range(1, 6)]).T
    ):
        p = np.exp(subsets @ logits[row])
        p /= p.sum()
        for first in range(1, 6):
            ends = {}
            for z, mass in zip(subsets, p, strict=True):
                ends[tuple(z[first - 1 :])] = ends.get(tuple(z[first - 1 :]), 0) + mass
            entropy = -sum(mass * math.log(mass) for mass in ends.values())
            np.testing.assert_allclose(found[first - 1], entropy, rtol=1e-5, err_msg=f"{row}, {first}")


def test_late_entropy_from_the_first_bit_is_the_library_s_and_has_its_gradient():
    logits = 2 * jax.random.normal(KEY, (3, 8))
    ours = lambda l: SimpleTopK(logits=l, k=4).entropy().sum()
    theirs = lambda l: reproduce.late_entropy(l, 4, 1).sum()
    for a, b in zip(jax.value_and_grad(ours)(logits), jax.value_and_grad(theirs)(logits), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_notebook_s_kl_of_the_uniform_law_is_what_its_entropy_leaves_out():
    """0 is right. Nine bits of a uniform subset of 10 of 20 have an entropy of their own."""
    config = SimpleNamespace(variables=1, classes=20, subset_size=10)
    q = jnp.zeros((1, 20))
    np.testing.assert_allclose(reproduce.Subsets(config).kl(KEY, q, {}), 0, atol=1e-4)
    ones = np.arange(1, 11)  # among the last eleven bits; the first nine hold the rest
    mass = np.array([math.comb(11, m) * math.comb(9, 10 - m) for m in ones]) / math.comb(20, 10)
    left_out = sum(p * math.log(math.comb(9, 10 - m)) for p, m in zip(mass, ones, strict=True))
    np.testing.assert_allclose(reproduce.LateSubsets(config).kl(KEY, q, {}), left_out, rtol=1e-4)


# --- numbers and poles --------------------------------------------------------------------------------


def test_rewards_to_go_and_when_a_task_is_solved():
    np.testing.assert_allclose(reproduce.discounted(jnp.array([[1.0], [0.0], [2.0]]), 0.5), [[1.5], [1], [2]])
    assert reproduce.first_solved([200.0] * 99) is None
    assert reproduce.first_solved([200.0] * 100) == 100
    assert reproduce.first_solved([0.0] * 3 + [200.0] * 100) == 101  # two of three zeros: 97.5 %
    assert reproduce.first_solved([194.0] * 300) is None


def test_which_numbers_are_misplaced():
    x = jnp.array([[0.2, 0.9, 0.5]])
    right = np.eye(3)[None, [0, 2, 1]]
    assert not reproduce.misplaced(x, right).any()
    np.testing.assert_array_equal(reproduce.misplaced(x, right[:, [1, 0, 2]]), [[True, False, True]])
    networks = reproduce.layers(KEY, (1, 4, 3), reproduce.glorot)
    weights = reproduce.in_float64(networks, x)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(
        weights, reproduce.mlp(networks, x[..., None], jax.nn.relu), rtol=1e-5, atol=1e-6
    )


def test_margins_of_ten_rounds():
    x = jnp.array([[[4.0, 0.0], [0.0, 0.0]]])
    once = np.exp(x[0]) / np.exp(x[0]).sum(1, keepdims=True)
    np.testing.assert_allclose(reproduce.sinkhorn(x, 1)[0], once / once.sum(0), rtol=1e-5)
    assert reproduce.margin(reproduce.sinkhorn(x, 1)) > 100 * reproduce.margin(reproduce.sinkhorn(x, 10)) > 0
    assert reproduce.margin(jnp.eye(3)) == 0


# --- what is printed ----------------------------------------------------------------------------------


def history(*values, measure="train"):
    return {"history": [{"epoch": i, measure: value} for i, value in enumerate(values, 1)], "seconds": 1.0}


def test_points_of_a_history():
    kept = history(5.0, 3.0, 4.0)["history"]
    points = {1: 5, 3: 4, 4: None, "best": 3, "end": 4, (2, 3): 3.5, (2, 4): None}
    assert {point: published.at(kept, "train", point) for point in points} == points
    assert published.at(kept, "test", "best") is None
    assert published.at([{"epoch": 1, "diverged": True}], "train", "end") is None


def test_published_and_ours_side_by_side():
    score = {"rate 0.001, seed 0": history(9, 9, 9, 9, 220), "rate 0.001, seed 1": history(9, 9)}
    rows = {"score function": score, "exact": {"rate 0.001, seed 0": history(9, 9, 9, 9, 150.0)}}
    results = {"storchastic": rows, "arsm": {"rloo": {
        "rate 0.1, seed 0": history(*[130] * 10, measure="validation"),
        "rate 0.2, seed 0": history(*[120] * 10, measure="validation"),
    }}}  # fmt: skip
    lines = {(line.row, line.point): line for line in published.lines(results)}
    assert lines["score function", 5].worse == pytest.approx(220 - 209.6)
    assert lines["exact", 5].worse < 0 and lines["rloo", 10].ours == [120]  # of the better rate
    assert lines["rloo", 25].worse is None
    text = published.table(results)
    assert "188.90 to 209.60" in text and "220, 1 of 2 seeds" in text and "122.14" in text
    assert len(published.picture(results).axes) == 2


# --- data, and the command line -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made-up images of 3 x 3 pixels as IDX files and as the fixed binarization."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for name in ("mnist", "fashion", "binarized"):
        (folder / name).mkdir()
    for count, (images, labels) in zip((5040, 30), common.IDX_FILES, strict=True):
        pixels, classes = rng.integers(0, 256, (count, 3, 3)), rng.integers(0, 10, count)
        for name, values in ((images, pixels), (labels, classes)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(head + values.astype(np.uint8).tobytes())
            for part in ("mnist", "fashion"):
                (folder / part / f"{name}.gz").write_bytes(content)
    for name, count in zip(reproduce.AMAT, (50, 20, 20), strict=True):
        np.savetxt(folder / "binarized" / name, rng.integers(0, 2, (count, 9)), fmt="%d")
    return folder


def test_images_are_those_of_the_files(folder, tmp_path):
    whole, held = (reproduce.DATA[name](folder) for name in ("gray", "gray, 5,000 held out"))
    (train, _), (test, _) = common.read_idx_folder(folder / "mnist")
    np.testing.assert_array_equal(whole.train, np.round(train.reshape(-1, 9) * 255))
    np.testing.assert_array_equal(held.train, whole.train[5000:])
    np.testing.assert_array_equal(held.validation, whole.train[:5000])
    np.testing.assert_array_equal(held.test, np.round(test.reshape(-1, 9) * 255))
    fixed = reproduce.DATA["fixed binarization"](folder)
    for part, name in zip(fixed, reproduce.AMAT, strict=False):
        np.testing.assert_array_equal(part, np.loadtxt(folder / "binarized" / name))
    wide = [np.pad(part, ((0, 0), (0, 7))) for part in fixed[:3]]
    packed = {
        name: np.packbits(part, axis=-1) for name, part in zip(("train", "valid", "test"), wide, strict=True)
    }
    np.savez(tmp_path / "binarized_mnist.npz", **packed)
    for a, b in zip(reproduce.DATA["fixed binarization"](tmp_path), wide, strict=False):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", reproduce.DATA)
def test_a_missing_file_is_one_line(kind, tmp_path):
    with pytest.raises(common.UserError, match=r"there is no file .*; download it") as error:
        reproduce.DATA[kind](tmp_path)
    assert str(tmp_path) in error.value.message and "\n" not in error.value.message


def test_what_cannot_be_run_is_one_line(folder, tmp_path, capsys):
    (tmp_path / reproduce.AMAT[0]).write_text("0 1 1\n0 1\n")
    for flags, words in (
        (["--quick"], "name another folder with --out"),
        (["--protocol", "arsm"], "arsm needs images"),
        (["--protocol", "relax", "--data", tmp_path], "has no lines of equally many zeros and ones"),
    ):
        assert run(*flags, example=published) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


QUICK = {
    "sorting": "N = 5", "cartpole": "relax", "storchastic": "score function", "simple": "notebook's entropy",
    "jang_notebook": "gumbel_softmax", "arsm": "reinmax", "jang_bits": "disarm", "jang_classes": "gumbel_rao",
    "relax": "rebar", "mnist": "gumbel_softmax_hard",
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_quick_run(name, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, name, PROTOCOLS[name]._replace(epochs=1))
    flags = "--protocol", name, "--only", QUICK[name], "--data", folder, "--quick", "--out", tmp_path
    assert run(*flags, example=published) == 0
    content = json.loads((tmp_path / "published.json").read_text())
    kept = content["protocols"][name]
    assert "versions" in content and QUICK[name] in kept
    for runs in kept.values():
        (record,) = runs.values()
        assert record["history"][-1]["epoch"] == 1 and record["seconds"] > 0
    assert (tmp_path / "published.png").exists() and QUICK[name] in capsys.readouterr().out


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder, tmp_path, monkeypatch):
    protocol = tiny({"variables": 2, "classes": 3}, epochs=4, data="gray, 5,000 held out")
    row = {"rebar": published.Row("rebar_categorical", {"train": {4: 1.0}})}
    monkeypatch.setitem(PROTOCOLS, "storchastic", protocol._replace(rows=row))
    trained, order = [], reproduce.Training.rows
    monkeypatch.setattr(
        reproduce.Training, "rows", lambda made, epoch: trained.append(epoch) or order(made, epoch)
    )
    flags = ["--protocol", "storchastic", "--data", folder]
    for place, epochs in (("whole", (4,)), ("parts", (1, 3, 4))):
        for number in epochs:
            more = "--epochs", number, "--out", tmp_path / place, "--state", tmp_path / place
            assert run(*flags, *more, example=published) == 0
    assert trained == [0, 1, 2, 3] * 2
    whole, parts = (
        json.loads((tmp_path / place / "published.json").read_text())["protocols"]["storchastic"]["rebar"]
        for place in ("whole", "parts")
    )
    assert [step["epoch"] for step in whole["rate 0.1, seed 0"]["history"]] == [1, 2, 3, 4]
    assert parts["rate 0.1, seed 0"]["history"] == whole["rate 0.1, seed 0"]["history"]


def test_results_of_others_stay(tmp_path):
    other = {"protocols": {"arsm": {"rloo": {"rate 1, seed 0": history(3.0, measure="validation")}}}}
    (tmp_path / "published.json").write_text(json.dumps(other))
    flags = "--protocol", "sorting", "--only", "N = 5", "--quick", "--out", tmp_path
    assert run(*flags, example=published) == 0
    kept = json.loads((tmp_path / "published.json").read_text())["protocols"]
    assert kept["arsm"] == other["protocols"]["arsm"] and kept["sorting"]
