"""The README is true: its snippets run, its commands are those of CI, its table lists every sampler."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpyro
import pytest

import relaxit_jax
from relaxit_jax import diagnostics, distributions, elbo, estimators, handlers

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RAW = "https://raw.githubusercontent.com/relaxit-jax/relaxit_jax/main/"


@pytest.mark.usefixtures("fast_compilation")
def test_snippets_run_and_do_what_they_say():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, names)
    assert jnp.argmax(names["logits"]) == 2
    assert jax.nn.softmax(names["logits"])[2] > 0.9
    left = names["guide"].probs(names["result"].params)["z"][:, 0]  # of the first cluster
    assert (left > 0.9).sum() in (2, 3) and (left < 0.1).sum() in (2, 3)


def test_commands_are_those_that_ci_runs():
    commands = re.findall(r"```bash\n(.*?)\n```", README)
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2
    for command, pattern in zip(commands, ("examples/vae.py$", "python -m pytest$"), strict=True):
        assert re.search(pattern, command) and f"{pattern}' README.md" in ci


def test_the_table_lists_every_sampler_and_only_what_exists():
    listed = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    samplers = {
        name
        for name in relaxit_jax.__all__
        if inspect.isfunction(f := getattr(relaxit_jax, name))
        and next(iter(inspect.signature(f).parameters)) == "key"
    }
    assert listed == samplers | {"laplace_bridge"}
    rooms = (relaxit_jax, diagnostics, distributions, elbo, estimators, handlers)
    rooms += (numpyro.distributions, numpyro.infer)
    for name in re.findall(r"`(\w+)`", README):
        assert any(hasattr(room, name) for room in rooms) or name in ("shape", "tau", "eps", "runs"), name
    for name in distributions.__all__:  # a class with its sampler; the aliases have Pyro's names
        assert f"`{name}`" in README or name.startswith("RelaxedOneHot"), name


def test_pictures_have_addresses_that_a_package_index_can_show():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
    assert pictures
    for picture in pictures:
        assert picture.startswith(RAW) and (ROOT / picture.removeprefix(RAW)).exists(), picture


def test_what_the_readme_points_to_is_there():
    for path in re.findall(r"\]\(([\w./]+)\)|`((?:examples|benchmarks)/[\w./]*)`", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
