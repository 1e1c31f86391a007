"""Stochastic beam search, compared with Gumbel-top-k draws over the list of all its sequences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st

import relaxit_jax as rj
from helpers import KEY, P_VALUE, chi_square

pytestmark = pytest.mark.usefixtures("fast_compilation")

# Logits of the next of three tokens, by the last one and by a state that counts what has been seen; token 0
# ends a sequence. One of the tokens cannot follow, and one can follow only rarely.
TABLE = np.float32(1.5 * np.random.default_rng(0).normal(size=(4, 3, 3)))
TABLE[1, 2] = [0.3, -np.inf, 1.0]
TABLE[0, 0] = [-4.0, 1.0, 0.5]


def step(state, token, table=TABLE):
    return jnp.asarray(table)[state % 4, token], 2 * state + token


def written_out(length, end, table=TABLE):
    """All sequences and their log-probabilities, one token after another in NumPy."""
    sequences, laws = [], []
    for tokens in itertools.product(range(3), repeat=length):
        state, last, law = 1, 0, 0.0
        for place, token in enumerate(tokens):
            logits = table[state % 4, last].astype(float)
            law += logits[token] - np.logaddexp.reduce(logits)
            state, last = 2 * state + last, token
            if token == end:
                tokens = (*tokens[:place], *[end] * (length - place))
                break
        if law > -np.inf and tokens not in sequences:
            sequences.append(tokens)
            laws.append(law)
    return np.array(sequences), np.array(laws)


def search(key, k, length, end, fn=step):
    return rj.stochastic_beam_search(key, fn, jnp.int32(1), k, length, end=end)


def which(sequences, tokens):
    """The number of each sequence in the list, by its digits; a sequence that is not there is an error."""
    powers = 3 ** np.arange(sequences.shape[1])
    order = np.argsort(sequences @ powers)
    found = order[np.searchsorted((sequences @ powers)[order], np.asarray(tokens) @ powers) % len(order)]
    np.testing.assert_array_equal(sequences[found], tokens)
    return found


@pytest.mark.whole
@pytest.mark.parametrize(("k", "length", "end"), [(2, 3, 0), (3, 2, None)])
def test_the_same_law_as_top_k_over_all_sequences(k, length, end):
    """The order of the k sequences, and the perturbed values that come with them."""
    n = 100_000
    sequences, laws = written_out(length, end)
    np.testing.assert_allclose(np.exp(laws).sum(), 1)
    keys = jax.random.split(KEY, n)
    tokens, log_probs, values = jax.jit(jax.vmap(lambda key: search(key, k, length, end)))(keys)
    drawn = which(sequences, tokens.reshape(-1, length)).reshape(n, k)
    np.testing.assert_allclose(log_probs, laws[drawn], atol=1e-5)
    orders = np.array(list(itertools.permutations(range(len(laws)), k)))
    law = np.exp(np.asarray(jax.jit(rj.gumbel_top_k_log_prob)(orders, jnp.float32(laws)), float))
    powers = len(laws) ** np.arange(k)[::-1]
    number = np.searchsorted(orders @ powers, drawn @ powers)
    rare = law * n < 10  # together in one
    groups = np.where(rare, 0, np.cumsum(~rare))
    if not rare.any():
        groups = groups - 1
    assert chi_square(groups[number], np.bincount(groups, law)) > P_VALUE
    assert (np.diff(values, axis=-1) <= 0).all()
    _, others = jax.jit(lambda laws: rj.gumbel_top_k(jax.random.key(7), laws, k, shape=(n,)))(
        jnp.float32(laws)
    )
    for j in range(k):
        assert st.ks_2samp(values[:, j], others[:, j]).pvalue > P_VALUE


def test_as_many_as_there_are():
    """The largest possible k gives every sequence once; the remaining places have probability 0."""
    sequences, laws = written_out(3, 0)
    count = 1 + 2 + 4 * 3
    tokens, log_probs, values = jax.jit(lambda key: search(key, count, 3, 0))(KEY)
    real = np.asarray(log_probs > -jnp.inf)
    assert real.sum() == len(laws) < count  # some cannot follow
    np.testing.assert_array_equal(np.sort(which(sequences, tokens[real])), np.arange(len(laws)))
    assert (values[~real] == -jnp.inf).all() and np.isfinite(values[real]).all()
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 15\]"):
        search(KEY, 16, 3, 0)
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 27\]"):
        search(KEY, 28, 3, None)


@pytest.mark.whole
def test_gradient_of_log_probabilities():
    """The gradient of the drawn sequences matches differences; impossible tokens have none."""

    def total(table):
        tokens, log_probs, _ = search(KEY, 4, 3, 0, functools.partial(step, table=table))
        return jnp.sum(jnp.array([1.0, -2.0, 0.5, 1.5]) * log_probs), tokens

    slope, tokens = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(TABLE))
    assert jnp.isfinite(slope).all() and slope[1, 2, 1] == 0

    def by_hand(table):
        sequences, laws = written_out(3, 0, table)
        return np.array([1.0, -2.0, 0.5, 1.5]) @ laws[which(sequences, tokens)]

    way = np.cos(np.arange(36.0)).reshape(TABLE.shape)
    ends = [by_hand(TABLE.astype(float) + h * way) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, np.sum(slope * way), rtol=1e-4)
    values = jax.jacobian(lambda table: search(KEY, 4, 3, 0, functools.partial(step, table=table))[2])
    assert (values(jnp.asarray(TABLE)) == 0).all()


@pytest.mark.whole
def test_state_follows_its_sequence():
    """A state of several arrays; each sequence's log-probability depends on its own history."""
    weights = jnp.float32(np.random.default_rng(1).normal(size=(5, 5)))

    def recurrent(state, token):
        memory, steps = state
        memory = jnp.tanh(weights @ memory + weights[token])
        return memory * (1 + steps), (memory, steps + 1)

    start = jnp.zeros(5), jnp.float32(0)
    tokens, log_probs, _ = jax.jit(
        lambda key: rj.stochastic_beam_search(key, recurrent, start, 50, 6, start=2)
    )(KEY)
    assert len(np.unique(tokens, axis=0)) == 50 and (np.asarray(tokens) < 5).all()
    for sequence, log_prob in zip(np.asarray(tokens), log_probs, strict=True):
        state, last, law = start, 2, 0.0
        for token in sequence:
            logits, state = recurrent(state, last)
            law, last = law + jax.nn.log_softmax(logits)[token], token
        np.testing.assert_allclose(law, log_prob, rtol=1e-5)


@pytest.mark.whole
def test_unlikely_sequences_are_told_apart():
    """Even if log-probabilities are below -1e4, the order follows their differences."""
    logits = jnp.array([0.0, -3.0, -3.0 + jnp.log(3.0)])
    far = lambda state, token: (jnp.where(state == 0, jnp.array([0.0, -1e4, -jnp.inf]), logits), state + 1)
    n = 20_000
    tokens, *_ = jax.jit(jax.vmap(lambda key: rj.stochastic_beam_search(key, far, 0, 6, 2)))(
        jax.random.split(KEY, n)
    )
    assert (tokens[:, :3, 0] == 0).all() and (tokens[:, 3:, 0] == 1).all()
    law = np.asarray(jax.nn.softmax(logits), float)
    assert chi_square(np.asarray(tokens[:, 3, 1]), law) > P_VALUE


def test_bad_arguments_are_named():
    for bad, words in (
        ({"key": 0}, "key must be one JAX random key"),
        ({"max_length": 0}, "max_length must be an integer in"),
        ({"end": 3}, r"end must be an integer in \[0, 2\]"),
        (
            {"log_prob_fn": lambda state, token: (jnp.zeros((2, 3)), state)},
            "log_prob_fn must be a function whose",
        ),
        (
            {"log_prob_fn": lambda state, token: (jnp.zeros(3, int), state)},
            "log_prob_fn must be a function whose",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            rj.stochastic_beam_search(
                **({"key": KEY, "log_prob_fn": step, "state": jnp.int32(1), "k": 2, "max_length": 2} | bad)
            )
