"""The example's estimates match the law, and its model's probabilities match its searches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import beam_search
import relaxit_jax as rj
from command_lines import run

KEY = jax.random.key(6)
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


def test_estimates_without_replacement():
    """Over all draws the weighted sum has the exact mean; with all words it is exact, and so is the ratio."""
    log_p = np.log([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    f = np.array([1.0, -2.0, 4.0, 0.5, 10.0, -30.0])
    exact = np.exp(log_p) @ f
    indices, values = rj.gumbel_top_k(KEY, jnp.float32(log_p), 4, shape=(200_000,))
    drawn = np.asarray(indices)
    total, ratio = beam_search.estimate_without(f[drawn], log_p[drawn], np.asarray(values))
    assert abs(total.mean() - exact) < 4.5 * total.std() / np.sqrt(total.size)
    ones, _ = beam_search.estimate_without(np.ones(drawn.shape), log_p[drawn], np.asarray(values))
    np.testing.assert_allclose(ratio, total / ones)
    # with a threshold that everything passes, nothing is left to chance
    values = np.append(log_p + 50, -60.0)
    for estimate in beam_search.estimate_without(np.append(f, 7.0), np.append(log_p, -5.0), values):
        np.testing.assert_allclose(estimate, exact, rtol=1e-6)


def test_errors_are_those_of_their_estimates():
    """For two runs with four words, from the definition of each column."""
    rng = np.random.default_rng(0)
    tokens, with_tokens = rng.integers(3, size=(2, 2, 4, 3))
    log_p, with_log_p = -rng.uniform(1, 3, (2, 2, 4))
    perturbed = -np.sort(rng.uniform(1, 3, (2, 4)))
    table = beam_search.compare((tokens, log_p, perturbed), (with_tokens, with_log_p), [3, 4])
    rows, f, with_f = table["letters in a word"], (tokens > 0).sum(-1), (with_tokens > 0).sum(-1)
    rmse = lambda x: np.sqrt(np.mean((x - with_f.mean()) ** 2))
    for place, k in enumerate((3, 4)):
        total, ratio = beam_search.estimate_without(f[:, :k], log_p[:, :k], perturbed[:, :k])
        np.testing.assert_allclose(rows["without"][place], rmse(total))
        np.testing.assert_allclose(rows["without, normalised"][place], rmse(ratio))
        np.testing.assert_allclose(rows["with replacement"][place], rmse(with_f[:, :k].mean(1)))
    np.testing.assert_allclose(table["entropy of a word, nats"]["answer"], -with_log_p.mean())


def test_words_are_rows_of_letters_and_back(tmp_path):
    words = ["a", "list", "of", "names"] * 40
    rows = beam_search.encode(words, 4)
    assert [beam_search.decode(row) for row in rows[:3]] == ["a", "list", "of"] and len(rows) == 120
    (tmp_path / "text").write_text("Names, A list: of\nnames-")
    assert beam_search.read_text(tmp_path / "text") == ["names", "a", "list", "of", "names"]
    assert len(set(beam_search.read_text(None))) > 1000


def test_probabilities_of_searches_are_those_of_the_words():
    model = beam_search.Model(6, 3)
    keys = jax.random.split(KEY, 5)
    tokens, log_p, _ = beam_search.searches(model, 6, keys, 30, 3)
    law = beam_search.log_probs(model, 6, tokens.reshape(-1, 3))
    np.testing.assert_allclose(law, log_p.ravel(), atol=1e-5)
    assert all(len(np.unique(row, axis=0)) == 30 for row in tokens)
    # the law is one: over all sequences of two tokens, in which what follows an end is an end
    pairs = np.array([(a, b) for a in range(27) for b in (range(27) if a else [0])])
    np.testing.assert_allclose(
        np.exp(beam_search.log_probs(model, 6, jnp.asarray(pairs))).sum(), 1, rtol=1e-5
    )


def test_command_line(tmp_path, capsys):
    flags = "--length 4 --units 8 --steps 250 --batch-size 64 --words 16 --runs 300"
    assert run(*flags.split(), "--out", tmp_path / "run", example=beam_search) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["nats_a_letter"] < metrics["nats_a_letter_by_frequency"]
    assert 0 < metrics["probability_held"] < 1
    for rows in metrics["results"].values():
        # the error with replacement is sd / sqrt(k), to what 300 squares of it allow
        seen = rows["with replacement"][-1] ** 2 / rows["with replacement, by theory"][-1] ** 2 * 300
        assert 1e-4 < chi2.sf(seen, 300) < 1 - 1e-4
    gradients = metrics["gradients"]
    assert gradients["k"] == [4, 8, 16]
    assert max(gradients["distance of the means, errors"]) < 4.5  # of 27 biases
    assert np.all(np.array(gradients["without"]) < gradients["with replacement"])
    assert (tmp_path / "run" / "beam_search.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--text short", "give one of 100 or more"),
        ("--text absent", "give a text file in UTF-8"),
        ("--words 704 --length 2", "--words 704 is above the 703 words of up to 2 letters; lower it"),
    ],
)
def test_what_cannot_be_is_one_line_before_a_folder_is_made(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("too short")
    assert run(*flags.split(), example=beam_search) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["short"]
