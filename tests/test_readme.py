"""The README is short and true: its snippets run, CI runs its commands, and its links lead somewhere."""

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
GITHUB = "https://github.com/relaxit-jax/relaxit_jax/blob/main/"
SITE = "https://relaxit-jax.github.io/relaxit_jax/"
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_a_screen_and_a_half():
    assert len(README.splitlines()) <= 130 and len(README) <= 8000
    code = "".join(re.findall(r"```\w+\n(.*?)```", README, re.DOTALL))
    assert code and max(map(len, code.splitlines())) <= 80
    assert max(line.count("|") - 1 for line in README.splitlines()) == 5  # columns
    assert (
        "PyTorch" in README.partition("\n\n")[2].partition("\n\n")[0]
    )  # what relaxit is, in the first lines
    assert "You do not need this library if" in README


@pytest.mark.whole
@pytest.mark.usefixtures("fast_compilation")
def test_snippets_run_when_pasted_and_do_what_they_say():
    """Each alone."""
    training, model, unbiased = ({} for _ in SNIPPETS)
    for snippet, names in zip(SNIPPETS, (training, model, unbiased), strict=True):
        exec(snippet, names)
    assert jnp.argmax(training["logits"]) == 2 and jax.nn.softmax(training["logits"])[2] > 0.9
    left = model["guide"].probs(model["result"].params)["z"][:, 0]  # of the first cluster
    assert (left > 0.9).sum() in (2, 3) and (left < 0.1).sum() in (2, 3)
    assert unbiased["gradient"].shape == (5, 8) and (unbiased["gradient"] != 0).any()


def test_commands_are_those_that_ci_runs():
    (commands,) = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    ci = (ROOT / ".ci" / "run").read_text()
    for command, pattern in zip(
        commands.splitlines(), ("examples/vae.py$", "python -m pytest$"), strict=True
    ):
        assert re.search(pattern, command) and f"{pattern}' README.md" in ci


def test_names_are_those_of_the_library():
    modules = (relaxit_jax, diagnostics, distributions, elbo, estimators, handlers, numpyro.infer)
    names = re.findall(r"`(?:estimators\.)?(\w+)`", README)
    assert len(names) > 12
    for name in names:
        assert any(hasattr(module, name) for module in modules), name


def test_which_method_has_six_rows():
    table = README.partition("## Which method?")[2].partition("## ")[0]
    assert len(re.findall(r"^\| (?!your problem)[^|]+ \| .*`.* \|$", table, re.MULTILINE)) == 6


def test_pictures_have_addresses_that_a_package_index_can_show():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
    assert pictures
    for picture in pictures:
        assert picture.startswith(RAW) and (ROOT / picture.removeprefix(RAW)).exists(), picture


def test_what_the_readme_points_to_is_there():
    links = [link for link in re.findall(r"\]\(([^)]*)\)", README) if not link.startswith(RAW)]
    assert len(links) > 5 and f"site_url: {SITE}" in (ROOT / "mkdocs.yml").read_text()
    for link in links:
        if link.startswith(SITE):
            page, _, anchor = link.removeprefix(SITE).partition("#")
            text = (ROOT / "docs" / f"{page.rstrip('/') or 'index'}.md").read_text()
            headings = [heading.lower() for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
            slugs = {re.sub(r"[^\w]+", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in headings}
            assert not anchor or anchor in slugs, link
        else:
            assert link.startswith(GITHUB) and (ROOT / link.removeprefix(GITHUB)).exists(), link
    for path in re.findall(r"`((?:examples|benchmarks)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
