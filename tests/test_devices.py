"""Data-parallel training: on any number of devices and processes, the losses equal those on one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import devices
from command_lines import EXAMPLES, TINY, bars, read, run
from common import UserError, digest, split_images

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
COLLECTIVES = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
ON_FOUR = """
import json, re, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
import common, devices, vae
from command_lines import bars, tiny

result = {}
for method in ("relaxed_bernoulli", "rloo"):
    for n in (1, 2, 4):
        cluster = devices.Cluster(devices.mesh_of(jax.devices()[:n]))
        made = vae.Experiment(tiny(method, augment=True), *common.split_images(bars()), cluster)
        epoch = made.epoch.lower(made, made.state, made.grey, 0).compile()
        state, losses = made.state, []
        for _ in range(3):
            state, loss = epoch(state, made.grey, 0)
            losses.append(float(loss))
        found = re.findall(sys.argv[1], epoch.as_text())
        result[f"{method} {n}"] = {"losses": losses, "collectives": sorted(set(found))}
        assert jax.tree.leaves(state)[0].sharding.is_fully_replicated
print(json.dumps(result))
"""


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "bars.npz", images=bars())
    return tmp_path / "bars.npz"


def environment():
    """The environment of a process that finds the same modules as the tests."""
    paths = [str(EXAMPLES), os.path.dirname(__file__)]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}


def test_losses_do_not_depend_on_how_many_devices_share_a_batch():
    """It covers a sampler and an estimator; devices exchange sums, not the batch."""
    command = [sys.executable, "-c", ON_FOUR, COLLECTIVES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for method in ("relaxed_bernoulli", "rloo"):
        one = found[f"{method} 1"]
        assert one["collectives"] == [] and one["losses"][0] != one["losses"][2]
        for n in (2, 4):
            several = found[f"{method} {n}"]
            np.testing.assert_allclose(several["losses"], one["losses"], rtol=2e-6)
            assert several["collectives"] == ["all-reduce"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A test that fails halfway ends the processes it started, so the next one has the machine to itself."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()
        process.stderr.close()


def start_two(images, out, *flags, second=()):
    """Two processes that train together; the second one has some flags of its own."""
    command = [sys.executable, EXAMPLES / "vae.py", *TINY, "--data", images, "--epochs", EPOCHS, "--out", out]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, *flags]
    processes = [
        subprocess.Popen(
            [*map(str, command), "--process-id", str(i), *(map(str, second) if i else ())], text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    STARTED.extend(processes)
    return processes


EPOCHS = 25
MESSAGE = "error: process {} of 2 ended before its time"


def history(out):
    return [[row[name] for name in ("train", "test")] for row in read(out)["history"]]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_and_the_run_resumes(lost, images, tmp_path):
    """After SIGKILL to either process, one or two continue from the checkpoints with the same losses."""
    out = tmp_path / "run"
    processes = start_two(images, out)
    deadline = time.monotonic() + 200
    while not (out / "checkpoints" / "1").exists():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.01)
    killed, other = processes[lost], processes[1 - lost]
    killed.send_signal(signal.SIGKILL)
    _, errors = other.communicate(timeout=60)
    assert other.returncode not in (0, None)
    (line,) = re.findall(r"error: process .*", errors)
    assert line.startswith(MESSAGE.format(1 - lost)) and "--resume" in line
    assert (str(out) in line) == (lost == 1)  # process 0 knows where they are
    killed.communicate(timeout=60)
    assert not (out / "metrics.json").exists()

    flags = [*TINY, "--data", images, "--epochs", EPOCHS]
    if lost == 0:
        for process in start_two(images, out, "--resume"):
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
            assert "error" not in errors
        assert read(out)["cluster"]["processes"] == 2
    else:
        assert run(*flags, "--out", out, "--resume") == 0
    assert run(*flags, "--out", tmp_path / "alone") == 0
    np.testing.assert_allclose(history(out), history(tmp_path / "alone"), rtol=2e-6)


def ends_of(processes):
    """The single error line of each, which ends with exit code 2."""
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 2 and "Traceback" not in errors, errors
        (line,) = re.findall(r"error: .*", errors)
        yield line


def test_processes_with_other_settings_or_data_end_with_one_line(images, tmp_path):
    """They end before anything is written. The data have the same shape and one different pixel."""
    other = bars()
    other[3, 2, 1] = 1 - other[3, 2, 1]
    np.savez(tmp_path / "other.npz", images=other)
    second = ["--learning-rate", ".1", "--data", tmp_path / "other.npz"]
    for line in ends_of(start_two(images, tmp_path / "run", second=second)):
        own, its = (digest(np.concatenate(split_images(images))) for images in (bars(), other))
        assert f"data is '{own}' in process 0, '{its}' in process 1; " in line
        assert "learning_rate is 0.003 in process 0, 0.1 in process 1; give the same ones to all" in line
    assert not (tmp_path / "run").exists()


JOIN = """
import sys, common, devices
count, port, process = map(int, sys.argv[1:])
join = lambda **_: devices.join(devices=count, coordinator=f"127.0.0.1:{port}", num_processes=2,
                                process_id=process, join_timeout=100)
common.run(join)
"""


def test_processes_with_other_numbers_of_devices_end_with_one_line():
    port = free_port()
    command = lambda i: [sys.executable, "-c", JOIN, str(1 + i), str(port), str(i)]
    processes = [
        subprocess.Popen(command(i), stderr=subprocess.PIPE, text=True, env=environment()) for i in (0, 1)
    ]
    for line in ends_of(processes):
        assert "devices is 1 in process 0, 2 in process 1; give the same ones to all" in line


def test_what_one_process_cannot_do_ends_all(monkeypatch):
    """The failing process prints its own error, the others print the same with its number."""
    said = [None, "no room"]
    monkeypatch.setattr(devices.Cluster, "ask", lambda self, problem: said)

    def fail():
        raise UserError("no room")

    for process, action, words in ((0, int, "process 1: no room"), (1, fail, "no room")):
        with pytest.raises(UserError) as error:
            devices.Cluster(None, process, 2).together(action)
        assert error.value.message == words
    said[1] = None
    assert devices.Cluster(None, 0, 2).together(int, "7") == 7


def test_a_port_in_use(images, tmp_path, capsys):
    """Another program, or the coordinator of another run, uses the port."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        flags = ["--coordinator", address, "--num-processes", 2, "--process-id", 0]
        assert run(*TINY, "--data", images, "--out", tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert f"of --coordinator {address} (Address already in use); give another port" in said
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_nobody_comes(images, tmp_path):
    """A process whose coordinator does not answer reports it and ends."""
    command = [sys.executable, EXAMPLES / "vae.py", *TINY, "--data", images, "--out", tmp_path / "run"]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id", 1]
    done = subprocess.run(
        [*map(str, command), "--join-timeout", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "error: the 2 processes did not meet" in done.stderr and "--join-timeout" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--devices", 3], "--devices 3 is above the 1 that JAX sees here; lower it"),
        (["--coordinator", "127.0.0.1:29500"], "belong together; give all or none"),
        (["--num-processes", 2, "--process-id", 0], "belong together; give all or none"),
        (["--coordinator", "here", "--num-processes", 1, "--process-id", 0], "'here' is not HOST:PORT"),
        (["--coordinator", "here:99999", "--num-processes", 1, "--process-id", 0], "is not HOST:PORT"),
        (["--coordinator", "here:²", "--num-processes", 1, "--process-id", 0], "is not HOST:PORT"),
        (["--devices", 100000], "100000 is not in the range 1<=x<=1024"),
        (
            ["--coordinator", "127.0.0.1:29500", "--num-processes", 2, "--process-id", 2],
            "--process-id 2 is not below --num-processes 2; count from 0",
        ),
    ],
)
def test_flags_that_do_not_fit(flags, words, images, tmp_path, capsys):
    assert run(*TINY, "--data", images, "--out", tmp_path / "run", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_share(monkeypatch, images, tmp_path, capsys):
    three = devices.Cluster(type("mesh", (), {"size": 3}))
    monkeypatch.setattr("vae.join", lambda **options: three)
    assert run(*TINY, "--data", images, "--out", tmp_path / "run") == 2
    assert "--batch-size 16 is no multiple of the 3 devices; change one" in capsys.readouterr().err


def test_a_word_is_said_only_where_the_process_ends(capfd):
    """It is not printed when the process finishes, or fails with its own error."""
    with devices.last_words("lost"):
        pass
    with pytest.raises(UserError), devices.last_words("lost"):
        raise UserError("another")
    assert capfd.readouterr().err == ""
    with devices.last_words("lost") as speak:
        speak()
    assert capfd.readouterr().err == "lost\n"
