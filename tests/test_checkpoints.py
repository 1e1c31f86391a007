"""A checkpoint is restored as written or rejected: every bit of it counts, also on a full disk."""

import contextlib
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
import vae
from checkpoints import Checkpoints
from command_lines import bars, tiny
from common import UserError

pytestmark = pytest.mark.whole

SETTINGS = {"seed": 0, "hidden": [8], "data": "5f1e"}
HISTORY = [{"train": 9.25, "test": 8.5, "seconds": 0.5}]
STATE = {"weights": jnp.arange(6.0).reshape(2, 3), "step": jnp.array(7)}


def same(found, expected):
    return jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.fixture
def run(tmp_path):
    """A run of two epochs."""
    made = Checkpoints(tmp_path / "checkpoints", SETTINGS)
    made.save(0, jax.tree.map(lambda x: x + 1, STATE), HISTORY)
    made.save(1, STATE, HISTORY * 2)
    return made


def test_what_is_restored_is_what_was_saved(run):
    epoch, state, history = run.restore(STATE)
    assert epoch == 1 and same(state, STATE) and history == HISTORY * 2
    for epoch in (2, 3, 4):
        run.save(epoch, STATE, HISTORY)
    assert run.epochs() == [2, 3, 4]


def flips(size, places):
    """Flip one bit in each of some bytes."""
    for place in np.unique(np.linspace(0, size - 1, min(size, places)).astype(int)):
        yield int(place), 1 << int(place) % 8


def test_every_bit_counts(run, capsys):
    """Each flip counts as damage, and never as other settings; then the previous epoch is the last."""
    folder = run.folder / "1"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"sha256", "run.json", "_METADATA"} <= {path.name for path in files}
    count = 0
    for path in files:
        content = path.read_bytes()
        for place, bit in flips(len(content), 40):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match="digest does not match"):
                run.verified(1)
            count += 1
        path.write_bytes(content)
        run.verified(1)
        path.write_bytes(content[:-1])
        epoch, state, history = run.restore(STATE)
        assert epoch == 0 and state["step"] == 8 and history == HISTORY
        assert "warning: checkpoint 1 is damaged (its digest does not match)" in capsys.readouterr().err
        (run.aside / "epoch-1").rename(folder)
        path.write_bytes(content)
    assert count > 200


@pytest.mark.parametrize("name", ["state/d", "run.json", "sha256"])
def test_a_file_that_is_gone_or_was_added_counts(name, run):
    path = run.folder / "1" / name
    path.rename(run.folder / "kept")
    assert run.restore(STATE)[0] == 0
    (run.aside / "epoch-1").rename(run.folder / "1")
    (run.folder / "kept").rename(path)
    (run.folder / "1" / "state" / "another").touch()
    assert run.restore(STATE)[0] == 0


def test_a_checkpoint_of_another_epoch_is_not_taken(run):
    (run.folder / "1").rename(run.folder / "5")
    assert run.restore(STATE)[0] == 0


def test_all_damaged_is_said_at_each_call(run):
    for epoch in (0, 1):
        (run.folder / str(epoch) / "run.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; start again in"):
            run.restore(STATE)


@pytest.mark.parametrize(("name", "value"), [("seed", 5), ("hidden", [8, 8]), ("data", "77aa")])
def test_another_run_is_not_continued(name, value, run):
    """Its checkpoint is not called damaged either, whatever shapes the other settings would need."""
    other = Checkpoints(run.folder, SETTINGS | {name: value})
    with pytest.raises(UserError, match=f"has other settings: {name} {SETTINGS[name]!r}".replace("[", r"\[")):
        other.restore({"weights": jnp.zeros(4), "step": jnp.array(0)})
    assert run.epochs() == [0, 1]


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_no_more_can_be_written_the_last_checkpoint_stays(run, tmp_path):
    large = STATE | {"weights": jax.random.normal(jax.random.key(0), (300, 300))}
    with files_of_at_most(50_000):
        with pytest.raises(UserError, match=r"cannot write the checkpoint of epoch 3 \(.+\); make room"):
            run.save(2, large, HISTORY)
        common.write_file(tmp_path / "metrics.json", b"old")
        with pytest.raises(UserError, match=r"cannot write .*metrics.json \(File too large\); make room"):
            common.write_file(tmp_path / "metrics.json", bytes(60_000))
    assert (tmp_path / "metrics.json").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.json"]
    assert sorted(path.name for path in run.folder.iterdir()) == ["0", "1"]
    epoch, state, _ = run.restore(STATE)
    assert epoch == 1 and same(state, STATE)


@pytest.mark.parametrize("name", ["checkpoints", "damaged", "checkpoints/new", "metrics.json"])
def test_a_link_leads_nothing_out_of_the_folder(name, tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "file").write_text("kept")
    link = out / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "file" if name == "metrics.json" else outside)
    if name == "metrics.json":
        common.write_json(link, {"a": 1})
        assert json.loads(link.read_text()) == {"a": 1} and not link.is_symlink()
    else:
        with pytest.raises(UserError, match=r"is a link, which|cannot write the checkpoint"):
            Checkpoints(out / "checkpoints", SETTINGS).save(0, STATE, HISTORY)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "kept"


class Stopped(Exception):
    pass


def test_the_temperature_falls_over_all_epochs_and_over_a_resume(fast_compilation, monkeypatch, tmp_path):
    """At step t of T it is tau (tau_end / tau)^(t / T), in every epoch, even after a stop."""
    images, seen = common.split_images(bars()), []
    epochs, start, end = 4, 2.0, 0.25

    def gradients(self, params, variate, x, key, tau):
        jax.debug.callback(lambda tau: seen.append(float(tau)), tau, ordered=True)
        return tau, jax.tree.map(jnp.zeros_like, (params, variate))

    def train(epochs_before_the_end, resume):
        made = vae.Experiment(config, *images)
        checkpoints = Checkpoints(tmp_path / "checkpoints", SETTINGS)
        save = checkpoints.save

        def stop(epoch, *args):
            save(epoch, *args)
            if epoch + 1 == epochs_before_the_end:
                raise Stopped

        checkpoints.save = stop
        with pytest.raises(Stopped):
            vae.train(made, checkpoints, resume)
        return made.steps

    monkeypatch.setattr(vae.Experiment, "gradients", gradients)
    monkeypatch.setattr(vae.Experiment, "test_bounds", lambda *_: dict.fromkeys(vae.SAMPLES, 0.0))
    config = tiny("relaxed_bernoulli", tau_start=start, tau_end=end, epochs=epochs, batch_size=8)
    steps = train(2, False)
    train(epochs, True)
    jax.effects_barrier()
    assert steps > 1
    np.testing.assert_allclose(
        seen, start * (end / start) ** (np.arange(epochs * steps) / (epochs * steps)), rtol=1e-5
    )
