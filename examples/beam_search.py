"""Expectations under a character model, from words drawn without replacement by stochastic beam search.

A small recurrent network learns the words of a text, letter by letter. What is the mean length of the words
it makes, and what is their entropy? The error of k independent draws falls as 1 / sqrt(k), and the draws
repeat: the likeliest words come up again and again. `relaxit_jax.stochastic_beam_search` draws k different
words in one pass of the network. Each word is weighted by its probability divided by the probability that it
was drawn, as in W. Kool, H. van Hoof, M. Welling (2019), Stochastic Beams and Where to Find Them,
arXiv:1903.06059. The more of the probability the k words hold, the faster the error falls.

    python examples/beam_search.py

The text is Python's own documentation of its topics, which comes with every Python (use --text for another).
The network needs 1.16 nats per letter for words that it has not seen, while letter frequencies alone need
2.84. 200 words drawn without replacement hold half of the probability; of 200 drawn with replacement, 63 are
repeats. The root mean squared error over 500 runs, for each k:

                      letters in a word (4.81)              entropy, nats (7.05)
        k       with   without   normalised           with   without   normalised
        8        .95      2.34         1.05           1.38      3.38         1.40
       32        .49       .93          .45            .68      1.34          .60
      200       .185      .266         .118           .249      .402         .180

Drawing with replacement has the classical error sd / sqrt(k). The normalized estimate is better from a few
words on, by a third at 200, where k = 200 does as well as 500 draws with replacement. The weighted sum alone,
which is unbiased, does not pay off at this entropy.
"""

import functools
import pathlib
import re

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import relaxit_jax as rj
from common import (
    COUNT,
    SEED,
    SIZE,
    STEPS,
    Path,
    UserError,
    cosine_rate_option,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = 0  # before the first letter and after the last; the letters are 1 to 26
MOST_FOR_GRADIENTS = 32  # words; the work grows with the cube
CHUNK = 50  # training steps or searches in one compiled call


# --- the text ----------------------------------------------------------------------------------


def read_text(path):
    """All words of a text in lower case, in their order."""
    if path is None:
        from pydoc_data import topics

        text = " ".join(topics.topics[name] for name in sorted(topics.topics))
    else:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} ({error}); give a text file in UTF-8 with --text") from error
    return re.findall(r"[a-z]+", text.lower())


def encode(words, length):
    """Words of at most this many letters as rows of tokens, padded with END."""
    kept = [word for word in words if len(word) <= length]
    if len(kept) < 100:
        raise UserError(f"the text has {len(kept)} words of up to {length} letters; give one of 100 or more")
    rows = np.full((len(kept), length), END, np.int32)
    for row, word in zip(rows, kept, strict=True):
        row[: len(word)] = [1 + LETTERS.index(letter) for letter in word]
    return rows


def decode(tokens):
    return "".join(LETTERS[token - 1] for token in tokens if token != END)


# --- the model ---------------------------------------------------------------------------------


class Model(nnx.Module):
    """A GRU that predicts the next letter from the last one and its state."""

    def __init__(self, units, key):
        rngs = nnx.Rngs(key)
        self.letters = nnx.Embed(len(LETTERS) + 1, units, rngs=rngs)
        self.cell = nnx.GRUCell(units, units, rngs=rngs)
        self.read = nnx.Linear(units, len(LETTERS) + 1, rngs=rngs)

    def __call__(self, state, token):
        state, _ = self.cell(state, self.letters(token))
        return self.read(state), state


def before(tokens):
    """The token before each one, and whether the word still continues there."""
    last = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return last, (last != END) | (jnp.arange(tokens.shape[1]) == 0)


def log_probs(model, units, tokens):
    """Log-probabilities of words, shape (n, length), summed over letters and, if it fits, the end."""
    last, goes_on = before(tokens)

    def step(state, pair):
        last, token = pair
        logits, state = model(state, last)
        return state, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]

    _, law = jax.lax.scan(step, jnp.zeros((len(tokens), units)), (last.T, tokens.T))
    return jnp.sum(jnp.where(goes_on.T, law, 0), 0)


def train(words, units, steps, batch_size, learning_rate, seed):
    """The model's graph and parameters after training with Adam on random words of the text."""
    graph, state = nnx.split(Model(units, seed))
    chunks = -(-steps // CHUNK)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, chunks * CHUNK))

    def loss(state, batch):
        return -jnp.mean(log_probs(nnx.merge(graph, state), units, batch))

    def step(carry, key):
        state, moments = carry
        batch = words[jax.random.randint(key, (batch_size,), 0, len(words))]
        updates, moments = optimizer.update(jax.grad(loss)(state, batch), moments)
        return (optax.apply_updates(state, updates), moments), None

    advance = jax.jit(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, CHUNK))[0])
    carry = state, optimizer.init(state)
    for key in tqdm(jax.random.split(jax.random.key(seed), chunks), "training", leave=False):
        carry = advance(carry, key)
    return graph, carry[0]


# --- draws and estimates -----------------------------------------------------------------------


def searches(model, units, keys, k, length):
    """For each key, k words without replacement: tokens, log-probabilities, perturbed log-probabilities."""
    start = jnp.zeros(units)
    search = lambda key: rj.stochastic_beam_search(key, model, start, k, length, end=END)
    return jax.vmap(search)(keys)


def in_chunks(draw, key, runs, title):
    """Call `draw` on many keys, some at a time."""
    keys = jax.random.split(key, -(-runs // CHUNK) * CHUNK).reshape(-1, CHUNK)
    parts = [jax.device_get(draw(some)) for some in tqdm(keys, title, leave=False)]
    return tuple(np.concatenate(part)[:runs] for part in zip(*parts, strict=True))


def gradient_of_length(graph, state, units, tokens, without):
    """One estimate of the gradient of a word's mean length in the bias of the last layer, from k words.

    Without replacement it uses `from_set`; with replacement, the score function and the mean of the other
    draws.
    """
    f = jnp.sum(tokens != END, -1).astype(jnp.float32)

    def estimate(state):
        log_p = log_probs(nnx.merge(graph, state), units, tokens)
        if without:
            return rj.estimators.from_set(f, log_p)
        gain = (f - jnp.mean(f)) * len(f) / (len(f) - 1)
        return jnp.mean(gain * log_p)

    return jax.grad(estimate)(state)["read"]["bias"][...]


def compare_gradients(graph, state, units, draws, with_draws, counts):
    """The spread of both gradients for each number of words, and the distance between their means."""
    rows = {"k": list(counts), "with replacement": [], "without": [], "distance of the means, errors": []}
    for k in counts:
        found = {}
        for name, tokens in (("with replacement", with_draws[0]), ("without", draws[0])):
            one = functools.partial(gradient_of_length, graph, state, units, without=name == "without")
            every = jax.jit(lambda tokens, one=one: jax.lax.map(one, tokens, batch_size=10))
            found[name] = np.asarray(every(tokens[:, :k]), float)
            rows[name].append(np.sqrt(found[name].var(0).sum()))
        difference = found["without"].mean(0) - found["with replacement"].mean(0)
        error = np.sqrt(sum(x.var(0) for x in found.values()) / len(tokens))
        rows["distance of the means, errors"].append(np.abs(difference / error).max())
    return rows


def estimate_without(f, log_p, perturbed):
    """E f from words without replacement, of which the last is the threshold: weighted, and normalized.

    Given the k-th largest perturbed value g, each of the k - 1 words above it was drawn with probability 1 -
    exp(-exp(log p - g)), and p divided by that is its weight. The weighted sum is unbiased. Dividing by the
    sum of the weights makes it biased, but usually brings it closer.
    """
    log_p, f = log_p[..., :-1].astype(float), f[..., :-1]
    weight = np.exp(log_p) / -np.expm1(-np.exp(log_p - perturbed[..., -1:]))
    total = np.sum(weight * f, -1)
    return total, total / np.sum(weight, -1)


def questions(tokens, log_p):
    """The functions of words to average: their length, and -log p, whose mean is the entropy."""
    return {"letters in a word": np.sum(tokens != END, -1), "entropy of a word, nats": -log_p.astype(float)}


def compare(draws, with_draws, counts):
    """Root mean squared errors of the three estimates for each number of words, and the answer."""
    tokens, log_p, perturbed = draws
    asked, asked_with = questions(tokens, log_p), questions(*with_draws[:2])
    table = {}
    for name, f in asked_with.items():
        answer, spread = f.mean(), f.std()
        rmse = lambda estimates, answer=answer: np.sqrt(np.mean((estimates - answer) ** 2, -1)).tolist()
        without = [estimate_without(asked[name][:, :k], log_p[:, :k], perturbed[:, :k]) for k in counts]
        table[name] = {
            "answer": answer,
            "standard_error_of_the_answer": spread / np.sqrt(f.size),
            "k": list(counts),
            "with replacement": rmse(np.array([f[:, :k].mean(-1) for k in counts])),
            "with replacement, by theory": (spread / np.sqrt(counts)).tolist(),
            "without": rmse(np.array([total for total, _ in without])),
            "without, normalised": rmse(np.array([ratio for _, ratio in without])),
        }
    return table


def draw(table, path):
    figure, axes = plt.subplots(1, len(table), figsize=(10, 4), layout="constrained")
    for axis, (name, rows) in zip(axes, table.items(), strict=True):
        axis.plot(rows["k"], rows["with replacement, by theory"], color="0.6", ls="--", label="sd / sqrt(k)")
        for kind, colour in (("with replacement", "C7"), ("without", "C1"), ("without, normalised", "C0")):
            axis.plot(rows["k"], rows[kind], "o-", ms=4, color=colour, label=kind)
        axis.set(xscale="log", yscale="log", xlabel="k, words drawn", title=f"{name}: {rows['answer']:.2f}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("root mean squared error of the mean")
    axes[0].legend(fontsize=9)
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option(
    "--text",
    type=Path(),
    metavar="FILE",
    help="Text file with the words to learn.  [default: Python's topics]",
)
@click.option(
    "--length", type=click.IntRange(2, 100), default=14, help="Number of letters in the longest words."
)
@click.option("--units", type=SIZE, default=96, help="Number of units in the recurrent network.")
@click.option("--steps", type=STEPS, default=1500, help="Number of Adam steps, in rounds of 50.")
@click.option("--batch-size", type=COUNT, default=256, help="Number of words in a training step.")
@cosine_rate_option(0.005)
@click.option(
    "--words", type=click.IntRange(4, 10_000), default=200, help="Largest number of words drawn at once, k."
)
@click.option(
    "--runs",
    type=click.IntRange(2, 100_000),
    default=500,
    help="Number of searches to average an error over.",
)
@click.option("--seed", type=SEED, default=0, help="Seed of the training and of the draws.")
@out_option
def main(text, length, units, steps, batch_size, learning_rate, words, runs, seed, out):
    """Estimate expectations under a character model from k samples without replacement."""
    exist = sum(len(LETTERS) ** n for n in range(length + 1))
    if words > exist:
        raise UserError(f"--words {words} is above the {exist} words of up to {length} letters; lower it")
    rows = np.random.default_rng(0).permutation(encode(read_text(text), length))
    out = output_folder(out, "beam_search")
    held_out, rows = rows[: len(rows) // 10], jnp.asarray(rows[len(rows) // 10 :])
    graph, state = train(rows, units, steps, batch_size, learning_rate, seed)
    model = nnx.merge(graph, state)
    held_out = jnp.asarray(held_out)
    per_letter = -float(jnp.sum(log_probs(model, units, held_out)) / jnp.sum(before(held_out)[1]))
    shares = np.bincount(rows[before(rows)[1]]) / np.sum(before(rows)[1])
    by_frequency = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
    click.echo(
        f"words it has not seen: {per_letter:.3f} nats a letter ({by_frequency:.3f} by frequency alone)"
    )

    counts = [k for k in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if k < words] + [words]
    key, with_key = jax.random.split(jax.random.key(seed))
    without = jax.jit(lambda keys: searches(model, units, keys, words, length))
    draws = in_chunks(without, key, runs, "without replacement")
    distinct = [len(np.unique(tokens, axis=0)) for tokens in draws[0]]
    if min(distinct) < words:
        raise click.ClickException(
            f"a search gave {min(distinct)} different words, not {words}: this is a defect"
        )
    one_each = lambda keys: searches(model, units, keys, 1, length)
    several = jax.jit(lambda keys: jax.vmap(lambda key: one_each(jax.random.split(key, words)))(keys))
    with_draws = in_chunks(several, with_key, runs, "with replacement")
    with_draws = tuple(x[:, :, 0] for x in with_draws)

    table = compare(draws, with_draws, counts)
    held = np.exp(draws[1].astype(float)).sum(-1)
    repeated = np.mean([words - len(np.unique(tokens, axis=0)) for tokens in with_draws[0]])
    click.echo("one search: " + " ".join(decode(tokens) for tokens in draws[0][0][:20]) + " ...")
    click.echo(
        f"{words} words without replacement hold {held.mean():.3f} of the probability; "
        f"of {words} with it {repeated:.1f} are repeats"
    )
    for name, results in table.items():
        click.echo(
            f"{name}: {results['answer']:.3f}; rms error by k of the mean with, without, and normalised"
        )
        kinds = ("with replacement", "without", "without, normalised")
        for k, *errors in zip(results["k"], *(results[kind] for kind in kinds), strict=True):
            click.echo(f"  {k:5d}" + "".join(f"{error:10.4f}" for error in errors))
    counts = [k for k in counts if 4 <= k <= MOST_FOR_GRADIENTS]
    gradients = compare_gradients(graph, state, units, draws, with_draws, counts)
    click.echo("gradient of the mean length in 27 biases; standard deviation by k with, and without")
    for k, *spreads in zip(counts, gradients["with replacement"], gradients["without"], strict=True):
        click.echo(f"  {k:5d}" + "".join(f"{spread:10.4f}" for spread in spreads))
    draw(table, out / "beam_search.png")
    settings = {"length": length, "units": units, "steps": steps, "batch_size": batch_size}
    settings |= {"learning_rate": learning_rate, "words": words, "runs": runs, "seed": seed, "text": text}
    metrics = {
        "nats_a_letter": per_letter, "nats_a_letter_by_frequency": by_frequency,
        "probability_held": held.mean(), "repeats_with_replacement": repeated,
        "results": table, "gradients": gradients, "settings": settings, "versions": versions(),
    }  # fmt: skip
    write_json(out / "metrics.json", metrics)
    click.echo(f"in {out}: beam_search.png, metrics.json")


if __name__ == "__main__":
    run(main)
