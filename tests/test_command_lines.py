"""Every option of every example: a wrong value gives a one-line error before anything is written."""

import functools
import importlib
import os

import click
import jax.numpy as jnp
import pytest

import common
from command_lines import EXAMPLES, run

pytestmark = pytest.mark.whole

COMMANDS = [
    module
    for path in sorted(EXAMPLES.glob("*.py"))
    if hasattr(module := importlib.import_module(path.stem), "main")
]
by_name = functools.partial(pytest.mark.parametrize, "example", ids=lambda module: module.__name__)
WRONG = [
    "nan",
    "NaN",
    "-nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e12",
    "1e30",
    str(10**12),
    str(2**70),
    "²",
    "",
    "x",
]
ZERO_IS_FINE = {
    ("control_variates", "target"), ("policy_gradient", "seed"), ("sparse_network", "penalties"),
    ("spike_and_slab", "support"), ("spike_and_slab", "correlation"), ("vae", "epochs"),
    ("vae", "process_id"), ("vq_vae", "prior_steps"), ("which_estimator", "epochs"),
    ("mixture_of_experts", "balance"), ("segment", "anneal"), ("world_model", "free_nats"),
}  # fmt: skip


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A separate working directory for the test, where nothing may appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.fixture
def reached(monkeypatch):
    """The settings that the commands would have run with, if they came that far."""
    seen = []
    for example in COMMANDS:
        monkeypatch.setattr(example.main, "callback", lambda **options: seen.append(options))
    return seen


def numeric(command):
    for option in command.params:
        if isinstance(option.type, (click.IntRange, common.FloatRange, common.Numbers)):
            yield option


def test_there_are_commands():
    assert len(COMMANDS) == 21


@by_name(COMMANDS)
def test_numbers_have_bounds(example):
    """Their types refuse NaN."""
    for option in example.main.params:
        each = getattr(option.type, "each", option.type)
        assert type(each) not in (click.FloatRange, type(click.FLOAT), type(click.INT)), option.name
        if isinstance(each, (click.IntRange, click.FloatRange)):
            assert each.min is not None and each.max is not None and each.max <= 2**32


@by_name(COMMANDS)
def test_a_wrong_number_is_one_line(example, empty, reached, capsys):
    for option in numeric(example.main):
        for value in WRONG:
            code = run(option.opts[0], *[value] * option.nargs, example=example)
            said = capsys.readouterr().err
            if code == 0:
                assert value == "0"
                assert option.name == "seed" or (example.__name__, option.name) in ZERO_IS_FINE, option.name
            else:
                assert code == 2 and said.count("\n") == 1, said
                assert said.startswith(f"error: Invalid value for '{option.opts[0]}'"), said


def has_seed(example):
    return any(option.name == "seed" for option in example.main.params)


def test_which_commands_have_no_seed():
    without = {module.__name__ for module in COMMANDS if not has_seed(module)}
    assert without == {"explain", "feature_selection"}


@by_name([module for module in COMMANDS if has_seed(module)])
def test_a_seed_is_of_32_bits(example, empty, reached, capsys):
    assert run("--seed", 2**31, example=example) == 0 and reached[-1]["seed"] == 2**31
    assert run("--seed", 2**33, example=example) == 2
    assert "is not in the range 0<=x<=" in capsys.readouterr().err


@by_name(COMMANDS)
def test_a_path_can_be_written_and_printed(example, empty, reached, capsys):
    paths = [option for option in example.main.params if isinstance(option.type, click.Path)]
    assert "out" in [option.name for option in paths]
    for option in paths:
        for value in ("", os.fsdecode(b"caf\xe9.npz")):
            assert run(option.opts[0], value, example=example) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"error: Invalid value for '{option.opts[0]}'") and said.count("\n") == 1
            assert "empty; name one" in said or "is not UTF-8; rename it" in said
    assert run("--out", "dé/ja", example=example) == 0


@by_name(COMMANDS)
def test_help_is_a_sentence_each(example):
    for option in example.main.params:
        text = option.help.split("  [default")[0]
        assert text[0].isupper() and text.endswith(".") and not text.startswith("Of "), text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: jnp.zeros(2**45), "out of memory"),
        (lambda: os.listdir("/dev/null"), "/dev/null: Not a directory; check the path"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, words, empty, capsys):
    @click.command()
    def main():
        error()

    example = type("example", (), {"__name__": "example", "main": main})
    assert run(example=example) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1


def test_defects_keep_their_traceback():
    """Only errors that the user can fix become one line."""

    @click.command()
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        common.run(lambda **options: main(args=[], **options))
