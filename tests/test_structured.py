"""Chains, trees and other structures: their laws against enumeration, also at the ends of the ranges."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special as sp
from numpyro import handlers
from numpyro.distributions import kl_divergence

import relaxit_jax as rj
from helpers import KEY, P_VALUE, chi_square, dtypes
from relaxit_jax import _random as rng
from relaxit_jax import diagnostics as dg
from relaxit_jax import distributions as rd
from relaxit_jax import estimators as es
from relaxit_jax import structured as st

pytestmark = pytest.mark.usefixtures("fast_compilation")
T, K, N = 5, 3, 5
NUMBERS = np.random.default_rng(20261130)
UNARY = np.float32(0.3 * NUMBERS.normal(size=(T, K)))
TRANSITIONS = np.float32(0.3 * NUMBERS.normal(size=(T - 1, K, K)))
WEIGHTS = np.float32(0.5 * NUMBERS.normal(size=(N, N)))
PATHS = np.eye(K)[list(itertools.product(range(K), repeat=T))]
UPPER = np.triu_indices(N, 1)


def all_trees(n):
    """All subsets of n - 1 edges that connect all nodes."""
    found = []
    for edges in itertools.combinations(itertools.combinations(range(n), 2), n - 1):
        tree = np.zeros((n, n))
        for i, j in edges:
            tree[i, j] = tree[j, i] = 1
        if (np.linalg.matrix_power(tree + np.eye(n), n) > 0).all():
            found.append(tree)
    return np.array(found)


TREES = all_trees(N)


class Chains:
    """Chains with 5 steps and 3 classes, with a matrix of transitions for each step."""

    structures = PATHS
    potentials = (UNARY, TRANSITIONS)
    sample, relaxed, marginals = st.chain_sample, st.relaxed_chain, st.chain_marginals
    log_prob, log_partition = st.chain_log_prob, st.chain_log_partition

    @staticmethod
    def scores(unary, transition):
        """The log-weight of each path, in float64."""
        unary, transition = (
            np.asarray(unary, float),
            np.broadcast_to(np.asarray(transition, float), (T - 1, K, K)),
        )
        z = PATHS.argmax(-1)
        return unary[np.arange(T), z].sum(-1) + transition[np.arange(T - 1), z[:, :-1], z[:, 1:]].sum(-1)

    @staticmethod
    def which(draws):
        return np.asarray(draws, float).argmax(-1) @ K ** np.arange(T)[::-1]


class Trees:
    """All 125 trees of five nodes."""

    structures = TREES
    potentials = (WEIGHTS,)
    sample, relaxed, marginals = st.tree_sample, st.relaxed_tree, st.tree_marginals
    log_prob, log_partition = st.tree_log_prob, st.tree_log_partition

    @staticmethod
    def scores(weights):
        weights = np.asarray(weights, float)[UPPER]
        return np.where(TREES[:, *UPPER] > 0, weights, 0).sum(-1)

    @staticmethod
    def which(draws):
        codes = TREES[:, *UPPER] @ 2 ** np.arange(len(UPPER[0]))
        order = np.argsort(codes)
        drawn = np.asarray(draws, float)
        np.testing.assert_array_equal(drawn, np.swapaxes(drawn, -1, -2))
        return order[np.searchsorted(codes[order], drawn[..., *UPPER] @ 2 ** np.arange(len(UPPER[0])))]


def law(kind, potentials):
    scores = kind.scores(*potentials)
    return sp.logsumexp(scores), sp.softmax(scores)


def mean(p, structures):
    return np.einsum("n,nij->ij", p, structures)


kinds = pytest.mark.parametrize("kind", [Chains, Trees])
BOTH = {
    "chains": (Chains, Chains.potentials),
    "trees": (Trees, Trees.potentials),
    "chains alike": (Chains, (UNARY, TRANSITIONS[0])),
}
both = pytest.mark.parametrize(("kind", "potentials"), BOTH.values(), ids=list(BOTH))


@pytest.mark.few(2)
@both
def test_log_partition_marginals_and_masses_are_the_sums_over_all(kind, potentials):
    total, p = law(kind, potentials)
    value, slopes = jax.value_and_grad(lambda x: kind.log_partition(*x))(potentials)
    np.testing.assert_allclose(value, total, rtol=1e-6)
    np.testing.assert_allclose(kind.marginals(*potentials), mean(p, kind.structures), atol=1e-6)
    own = np.triu(mean(p, TREES)) if kind is Trees else mean(p, PATHS)
    np.testing.assert_allclose(slopes[0], own, atol=1e-6)
    np.testing.assert_allclose(kind.log_prob(kind.structures, *potentials), np.log(p), rtol=2e-6)
    if kind is Chains:
        pairs = np.einsum("n,nti,ntj->tij", p, PATHS[:, :-1], PATHS[:, 1:])
        pairs = pairs if potentials[1].ndim == 3 else pairs.sum(0)
        np.testing.assert_allclose(slopes[1], pairs, atol=2e-6)


@pytest.mark.few(1, "chains-float32", "trees-float32")
@dtypes
@both
def test_draws_have_the_enumerated_law(kind, potentials, dtype, pytestconfig):
    n = 200_000 if pytestconfig.option.quick else 500_000
    potentials = tuple(jnp.asarray(x, dtype) for x in potentials)
    draws = jax.jit(lambda key: kind.sample(key, *potentials, shape=(n,)))(KEY)
    assert draws.dtype == dtype and set(np.unique(np.asarray(draws, float))) == {0, 1}
    assert chi_square(kind.which(draws), law(kind, [np.asarray(x, float) for x in potentials])[1]) > P_VALUE


@pytest.mark.whole
@both
def test_the_form_for_accelerators_is_the_same(kind, potentials, for_accelerators):
    """The law of its draws, which may differ from draws on CPUs; values and derivatives to rounding."""
    way = np.cos(np.arange(kind.structures[0].size)).reshape(kind.structures[0].shape)

    def compiled(potentials):
        weighted = lambda x: jnp.sum(way * kind.marginals(*x))
        value, slope = jax.value_and_grad(lambda x: kind.log_partition(*x))(potentials)
        return value, slope, kind.marginals(*potentials), jax.grad(weighted)(potentials)

    given = tuple(map(jnp.asarray, potentials))
    chex.assert_trees_all_close(
        for_accelerators(compiled)(given), jax.jit(compiled)(given), atol=2e-6, rtol=1e-6
    )
    draws = for_accelerators(lambda x: kind.sample(KEY, *x, shape=(200_000,)))(given)
    assert chi_square(kind.which(draws), law(kind, potentials)[1]) > P_VALUE


@pytest.mark.few(0, "7")
@pytest.mark.parametrize("steps", [2, 4, 7, 12])
def test_a_tree_of_any_number_of_steps(steps, for_accelerators):
    """Some levels have padding: probabilities of pairs of classes at neighboring steps, also by draws."""
    unary, transition = NUMBERS.normal(size=(2, steps, K)), NUMBERS.normal(size=(2, steps - 1, K, K))
    given = tuple(jnp.float32(x) for x in (unary, transition))
    pairs = lambda x: jax.grad(lambda w: jnp.sum(st.chain_log_partition(x[0], w)))(x[1])
    expected = np.asarray(jax.jit(pairs)(given))
    np.testing.assert_allclose(for_accelerators(pairs)(given), expected, atol=2e-6)
    draws = for_accelerators(lambda x: st.chain_sample(KEY, *x, shape=(20_000, 2)))(given)
    found = np.einsum("nbti,nbtj->btij", draws[:, :, :-1], draws[:, :, 1:]) / 20_000
    assert (np.abs(found - expected) < 4.8 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-4).all()


@pytest.mark.few(2)
@both
def test_the_gradient_of_a_draw_is_the_derivative_of_the_marginals(kind, potentials):
    """Differences in float64 check it, in all potentials; forward mode too."""
    way = NUMBERS.normal(size=kind.structures[0].shape)
    across = [NUMBERS.normal(size=x.shape) for x in potentials]
    with jax.enable_x64(True):
        given = [jnp.asarray(x, float) for x in potentials]
        along = [jnp.asarray(x) for x in across]
        total = jax.jit(lambda *x: jnp.sum(way * kind.marginals(*x)))
        ends = [total(*(x + h * a for x, a in zip(given, along, strict=True))) for h in (1e-5, -1e-5)]
        drawn = lambda *x: jnp.sum(way * kind.sample(KEY, *x))
        slopes = jax.jit(jax.grad(drawn, tuple(range(len(given)))))(*given)
        forward = float(jax.jit(lambda x, a: jax.jvp(drawn, x, a)[1])(given, along))
        slopes, ends = [np.asarray(x) for x in slopes], [float(x) for x in ends]
    difference = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(
        sum(np.sum(s * a) for s, a in zip(slopes, across, strict=True)), difference, rtol=1e-7
    )
    np.testing.assert_allclose(forward, difference, rtol=1e-7)


@pytest.mark.few(1)
@both
def test_relaxed_draws_are_in_the_hull_and_become_the_best_structure(kind, potentials):
    """No linear function exceeds the best structure; when cold, the best one for the noise is drawn."""
    draw = jax.jit(lambda tau, shape=(500,): kind.relaxed(KEY, *potentials, tau, shape=shape))
    flat = kind.structures.reshape(len(kind.structures), -1)
    for tau in (0.1, 1.0, 1e3):
        z = np.asarray(draw(tau), float).reshape(500, -1)
        assert z.min() >= 0
        for way in NUMBERS.normal(size=(50, flat.shape[1])):
            assert (z @ way).max() < (flat @ way).max() + 1e-5 and (z @ way).min() > (flat @ way).min() - 1e-5
        total = T if kind is Chains else 2 * (N - 1)
        np.testing.assert_allclose(z.sum(-1), total, rtol=1e-5)
    first = jnp.asarray(potentials[0])
    noise = np.asarray(rng.gumbel(KEY, (500, *first.shape), first), float)
    noisy = [[np.asarray(first, float) + g, *potentials[1:]] for g in noise]
    scores = np.sort(np.array([kind.scores(*x) for x in noisy]))
    best = np.array([kind.structures[kind.scores(*x).argmax()] for x in noisy])
    # the others weigh exp(-gap / tau) each, of at most 243: less than 1e-3 together
    clear = scores[:, -1] - scores[:, -2] > 0.02
    assert clear.mean() > 0.9
    np.testing.assert_allclose(np.asarray(draw(1e-3))[clear], best[clear], atol=1e-3)
    slope = jax.grad(lambda x: jnp.sum(jnp.cos(kind.relaxed(KEY, *x, 0.5))))(potentials)
    assert all(np.abs(x).max() > 1e-2 for x in slope)


FORBIDDEN = {
    "chains": (Chains, [np.where(NUMBERS.random(x.shape) < 0.1, -np.inf, x) for x in (UNARY, TRANSITIONS)]),
    "trees": (Trees, [np.where(NUMBERS.random(WEIGHTS.shape) < 0.3, -np.inf, WEIGHTS)]),
}


@pytest.mark.few(0, "trees")
@pytest.mark.parametrize(("kind", "potentials"), FORBIDDEN.values(), ids=list(FORBIDDEN))
def test_what_is_forbidden_is_never_drawn_and_has_no_gradient(kind, potentials):
    total, p = law(kind, potentials)
    assert 0 < (p == 0).sum() < len(p)
    given = tuple(jnp.float32(x) for x in potentials)
    np.testing.assert_allclose(kind.log_partition(*given), total, rtol=1e-6)
    np.testing.assert_allclose(kind.marginals(*given), mean(p, kind.structures), atol=1e-6)
    law_of_all = kind.log_prob(kind.structures, *given)
    np.testing.assert_array_equal(np.isneginf(law_of_all), p == 0)
    np.testing.assert_allclose(np.exp(law_of_all), p, rtol=3e-6)
    draws = jax.jit(lambda x: kind.sample(KEY, *x, shape=(20_000,)))(given)
    assert (p[kind.which(draws)] > 0).all()
    f = lambda kind, x: (
        jnp.sum(jnp.cos(kind.relaxed(KEY, *x, 0.01)))
        + jnp.sum(jnp.sin(1 + jnp.arange(x[0].size)).reshape(x[0].shape) * kind.sample(KEY, *x))
        + kind.log_prob(kind.structures[p.argmax()], *x)
    )
    slopes = jax.jit(jax.grad(functools.partial(f, kind)))(given)
    for x, slope in zip(potentials, slopes, strict=True):
        assert np.isfinite(slope).all() and (np.asarray(slope)[np.isneginf(x)] == 0).all()


@pytest.mark.few(0, "Trees-0")
@pytest.mark.parametrize("seed", range(4))
@kinds
def test_potentials_far_apart_are_right_and_finite(kind, seed):
    """Potentials are -1e4, 0 and 1e4, so many structures tie up to small numbers: against float64."""
    numbers = np.random.default_rng(seed)
    potentials = [
        np.float32(1e4 * numbers.integers(-1, 2, x.shape) + numbers.normal(size=x.shape))
        for x in kind.potentials
    ]
    total, p = law(kind, potentials)
    np.testing.assert_allclose(kind.log_partition(*potentials), total, rtol=1e-6, atol=1e-2)
    marginals = np.asarray(kind.marginals(*potentials))
    assert marginals.min() >= 0
    # sums of numbers of 1e4 are resolved to 2e-3 in float32
    np.testing.assert_allclose(marginals, mean(p, kind.structures), atol=5e-3)
    likely = p > 1e-6
    np.testing.assert_allclose(
        kind.log_prob(kind.structures, *potentials)[likely], np.log(p[likely]), atol=2e-2
    )
    drawn = kind.which(jax.jit(lambda x: kind.sample(KEY, *x, shape=(20_000,)))(potentials))
    found = np.bincount(drawn, minlength=len(p)) / 20_000
    assert (np.abs(found - p) < 4.8 * np.sqrt(p * (1 - p) / 20_000) + 5e-3).all()

    @jax.jit
    def gradients(x, tau):
        way = jnp.cos(jnp.arange(x[0].size)).reshape(x[0].shape)
        soft = lambda x, tau: jnp.sum(way * kind.relaxed(KEY, *x, tau))
        exact = lambda x: jnp.sum(way * kind.sample(KEY, *x)) + kind.log_prob(kind.structures[0], *x)
        return soft(x, tau), jax.grad(soft, (0, 1))(x, tau), jax.value_and_grad(exact)(x)

    for tau in (1e-3, 1.0, 1e3):
        chex.assert_tree_all_finite(gradients(tuple(potentials), tau))


@pytest.mark.whole
def test_long_chains_and_large_trees():
    """1,000 steps against float64; with 64 nodes, the number of trees, n^(n - 2), and of edges."""
    unary, transition = NUMBERS.normal(size=(1000, 4)), NUMBERS.normal(size=(4, 4))
    with jax.enable_x64(True):
        exact = jax.jit(st.chain_marginals)(unary, transition)
        total = jax.jit(st.chain_log_partition)(unary, transition)
        path = jax.jit(st.chain_sample)(KEY, unary, transition)
        mass = jax.jit(st.chain_log_prob)(path, unary, transition)
    narrow = jnp.float32(unary), jnp.float32(transition)
    np.testing.assert_allclose(jax.jit(st.chain_marginals)(*narrow), exact, atol=2e-5)
    np.testing.assert_allclose(jax.jit(st.chain_log_partition)(*narrow), total, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(st.chain_log_prob)(np.asarray(path), *narrow), mass, rtol=1e-5)
    zeros = jnp.zeros((64, 64))
    np.testing.assert_allclose(jax.jit(st.tree_log_partition)(zeros), 62 * np.log(64), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(st.tree_marginals)(zeros)[np.triu_indices(64, 1)], 2 / 64, rtol=1e-4)
    trees = np.asarray(jax.jit(lambda w: st.tree_sample(KEY, w, shape=(100,)))(zeros))
    assert (trees.sum((-1, -2)) == 126).all()
    np.testing.assert_allclose(jax.jit(st.tree_log_prob)(trees, zeros), -62 * np.log(64), rtol=1e-6)
    # leaves of uniform trees: each node with probability (1 - 1/n)^(n - 2)
    leaves = (trees.sum(-1) == 1).mean()
    assert abs(leaves - (1 - 1 / 64) ** 62) < 4.8 * np.sqrt(0.25 / 6400)


def test_one_step_and_two_nodes():
    unary, alike = jnp.array([[0.5, -1.0, 0.2]]), jnp.zeros((3, 3))
    np.testing.assert_allclose(st.chain_marginals(unary, alike)[0], jax.nn.softmax(unary[0]), rtol=1e-6)
    np.testing.assert_allclose(
        st.chain_log_partition(unary, jnp.zeros((0, 3, 3))), sp.logsumexp(unary), rtol=1e-6
    )
    draws = jax.jit(lambda key: st.chain_sample(key, unary, alike, shape=(20_000,)))(KEY)
    assert chi_square(np.asarray(draws)[:, 0].argmax(-1), sp.softmax(np.asarray(unary[0], float))) > P_VALUE
    edge = jnp.array([[0.0, 0.7], [0.0, 0.0]])
    assert st.tree_log_partition(edge) == edge[0, 1]
    np.testing.assert_array_equal(st.tree_sample(KEY, edge), [[0, 1], [1, 0]])
    assert st.tree_log_prob(jnp.array([[0, 1], [1, 0]]), edge) == 0


def test_a_value_that_is_no_structure_has_no_mass():
    cycle = np.zeros((N, N))
    for i, j in ((0, 1), (1, 2), (0, 2), (3, 4)):
        cycle[i, j] = cycle[j, i] = 1
    half, more = TREES[0] / 2, TREES[0] + cycle
    assert (np.asarray(st.tree_log_prob(np.stack([cycle, half, more, 0 * half]), WEIGHTS)) == -np.inf).all()
    uneven = np.stack([PATHS[0] * 0.5, 0 * PATHS[0], PATHS[0] + PATHS[-1], np.full((T, K), 1 / K)])
    assert (np.asarray(st.chain_log_prob(uneven, UNARY, TRANSITIONS)) == -np.inf).all()
    for kind, value in ((Trees, cycle), (Chains, uneven[0])):
        slopes = jax.grad(lambda x, kind=kind, value=value: kind.log_prob(value, *x))(kind.potentials)
        chex.assert_tree_all_finite(slopes)
    assert np.isnan(st.tree_log_prob(np.full((N, N), np.nan), WEIGHTS))
    assert np.isnan(st.chain_log_prob(np.full((T, K), np.nan), UNARY, TRANSITIONS))


@pytest.mark.whole
def test_where_no_structure_is_possible():
    """The log-partition is -inf with gradient 0; everything else is an error, or NaN under a trace."""
    apart = WEIGHTS.copy()
    apart[:2, 2:] = -np.inf
    closed = np.where(np.arange(T)[:, None] == 2, -np.inf, UNARY)
    no_way = np.full((K, K), -np.inf)
    for kind, bad, message in (
        (Trees, (apart,), "weights must be such that the graph is connected"),
        (Chains, (closed, TRANSITIONS), "unary must be above -inf for a class of each step"),
        (Chains, (UNARY, no_way), "transition must be such that a sequence is possible"),
    ):
        value, slopes = jax.jit(jax.value_and_grad(kind.log_partition, tuple(range(len(bad)))))(*bad)
        assert value == -np.inf and all((np.asarray(x) == 0).all() for x in slopes)
        functions = {
            "marginals": kind.marginals,
            "sample": functools.partial(kind.sample, KEY),
            "log_prob": functools.partial(kind.log_prob, kind.structures[0]),
            "relaxed": lambda *x, kind=kind: kind.relaxed(KEY, *x, 0.5),
        }
        good = kind.potentials if bad[-1] is not no_way else (UNARY, TRANSITIONS[0])
        pair = tuple(np.stack([a, b]) for a, b in zip(bad, good, strict=True))
        if pair[-1].shape == (2, K, K):
            pair = pair[0], pair[1][:, None]
        for name, function in functions.items():
            with pytest.raises(ValueError, match=message):
                function(*bad)
            found = np.asarray(jax.jit(function)(*pair))
            assert np.isnan(found[0]).all() and np.isfinite(found[1]).all(), name
    with_nan = np.stack([UNARY, UNARY])
    with_nan[0, 1, 1] = np.nan
    for function in (st.chain_log_partition, st.chain_marginals, functools.partial(st.chain_sample, KEY)):
        found = np.asarray(jax.jit(function)(with_nan, TRANSITIONS))
        assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


@pytest.mark.whole
@both
def test_jit_eager_vmap_and_batches_agree(kind, potentials):
    n = len(potentials)
    keys = jax.random.split(KEY, 3)
    batch = [jnp.stack([x, 2 * x, -x]) for x in map(jnp.asarray, potentials)]
    if kind is Chains and potentials[1].ndim == 2:
        batch[1] = batch[1][:, None]
    for name in ("sample", "relaxed"):
        draw = getattr(kind, name)
        more = (0.5,) if name == "relaxed" else ()
        eager = jnp.stack([draw(key, *(x[i] for x in batch), *more) for i, key in enumerate(keys)])
        mapped = jax.jit(jax.vmap(lambda key, *x, draw=draw, more=more: draw(key, *x, *more)))(keys, *batch)
        np.testing.assert_allclose(mapped, eager, atol=2e-6)
    for function in (kind.marginals, kind.log_partition):
        together = jax.jit(function)(*batch)
        alone = jnp.stack([function(*(x[i] for x in batch)) for i in range(3)])
        np.testing.assert_allclose(together, alone, rtol=2e-6, atol=2e-6)
    value = kind.structures[:4, None]
    together = kind.log_prob(value, *batch)
    assert together.shape == (4, 3)
    alone = kind.log_prob(kind.structures[1], *(x[2] for x in batch))
    np.testing.assert_allclose(together[1, 2], alone, rtol=1e-5)
    draws = jax.jit(lambda *x: kind.sample(KEY, *x, shape=(2000, 3)))(*batch)
    flat = np.asarray(draws)[..., 0, 1]
    assert flat.shape == (2000, 3) and n
    expected = np.asarray(kind.marginals(*batch))[..., 0, 1]
    assert (np.abs(flat.mean(0) - expected) < 4.8 * np.sqrt(0.25 / 2000)).all()
    assert np.abs(np.corrcoef(flat.T)[np.triu_indices(3, 1)]).max() < 4.8 / np.sqrt(2000)


@pytest.mark.whole
def test_any_log_partition_has_its_relaxation():
    """One class gives Gumbel-softmax; trees give points of the hull; a pytree has noise on each leaf."""
    logits = jnp.array([[0.3, -1.0, 0.5], [2.0, 0.0, -np.inf]])
    draw = jax.jit(
        lambda tau: st.relaxed_structure(
            KEY, lambda x: jax.nn.logsumexp(x, -1), logits, tau, shape=(20_000, 2)
        )
    )
    np.testing.assert_allclose(draw(0.5).sum(-1), 1, rtol=1e-5)
    for i in range(2):
        p = sp.softmax(np.asarray(logits[i], float))[: 3 - i]
        assert chi_square(np.asarray(draw(1e-3))[:, i].argmax(-1), p) > P_VALUE
    tau = jnp.array([0.2, 3.0])
    ours = st.relaxed_structure(KEY, lambda x: jax.nn.logsumexp(x, -1), logits, tau)
    (own,) = jax.random.split(KEY, 1)
    by_hand = jax.nn.softmax((logits + rng.gumbel(own, (2, 3), logits)) / tau[:, None])
    np.testing.assert_allclose(ours, by_hand, rtol=1e-6)
    edges = np.triu(np.asarray(st.relaxed_structure(KEY, st.tree_log_partition, WEIGHTS, 0.5)))
    np.testing.assert_allclose(edges.sum(), N - 1, rtol=1e-5)
    both = {"unary": jnp.asarray(UNARY), "transition": jnp.asarray(TRANSITIONS, jnp.bfloat16)}
    whole = lambda x: st.chain_log_partition(x["unary"], x["transition"].astype(jnp.float32))
    pairs = st.relaxed_structure(KEY, whole, both, 0.5)
    assert pairs["transition"].dtype == jnp.bfloat16
    np.testing.assert_allclose(pairs["unary"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(pairs["transition"], float).sum(-1), pairs["unary"][:-1], atol=0.02)
    slope = jax.grad(lambda x: jnp.sum(jnp.cos(st.relaxed_structure(KEY, whole, x, 0.5)["unary"])))(both)
    assert all(np.abs(np.asarray(x, float)).max() > 1e-3 for x in slope.values())
    for bad, message in (
        ((None, logits, 0.5), "log_partition must be a function"),
        ((jnp.argmax, logits, 0.5), "log_partition must be a function whose value"),
        ((lambda x: x.sum(0), logits, 0.5), "potentials must be of the batch shape"),
        ((jax.nn.logsumexp, (), 0.5), "potentials must be an array"),
        ((jax.nn.logsumexp, logits, 0.0), "tau must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            st.relaxed_structure(KEY, *bad)


def test_bad_arguments_are_named():
    for unary, transition, message in (
        (jnp.zeros(3), jnp.zeros((3, 3)), r"unary must be of shape \(..., T, K\)"),
        (UNARY, jnp.zeros((2, 2)), r"transition must be of shape \(3, 3\), \(..., 4, 3, 3\)"),
        (UNARY, jnp.zeros((3, K, K)), "transition must be of shape"),
        (UNARY, np.full((K, K), np.inf), "transition must be below inf"),
        (np.zeros((2, T, K)), np.zeros((3, 1, K, K)), "must have batch shapes that broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            st.chain_sample(KEY, unary, np.asarray(transition, np.float32))
    for weights in (jnp.zeros(3), jnp.zeros((2, 3)), jnp.zeros((1, 1))):
        with pytest.raises(ValueError, match=r"weights must be of shape \(..., n, n\), n at least 2"):
            st.tree_sample(KEY, weights)
    with pytest.raises(ValueError, match=r"value must be of shape \(..., 5, 3\)"):
        st.chain_log_prob(jnp.zeros((4, 3)), UNARY, TRANSITIONS)
    with pytest.raises(ValueError, match="tau must have the batch shape"):
        st.relaxed_tree(KEY, np.stack([WEIGHTS, WEIGHTS]), jnp.ones((2, 1)))


# --- in NumPyro, and for the estimators -----------------------------------------------------------


CLASSES = {
    "chains": (Chains, lambda x: rd.LinearChain(unary=x[0], transition=x[1])),
    "trees": (Trees, lambda x: rd.SpanningTree(weights=x[0])),
}


@pytest.mark.few(0, "trees")
@pytest.mark.parametrize(("kind", "make"), CLASSES.values(), ids=list(CLASSES))
def test_classes_have_the_moments_entropy_and_kl_of_the_enumerated_law(kind, make):
    one = kind.potentials
    other = [np.float32(x[::-1, ::-1]) for x in one]
    forbidding = [
        np.where(np.arange(x.shape[-1]) == 0, -np.inf, x) if i == 0 else x for i, x in enumerate(other)
    ]
    (_, p), (_, q) = law(kind, one), law(kind, other)
    d, e = make(one), make(other)
    np.testing.assert_allclose(d.mean, mean(p, kind.structures), atol=1e-6)
    np.testing.assert_allclose(
        d.variance, mean(p, kind.structures) * (1 - mean(p, kind.structures)), atol=2e-6
    )
    np.testing.assert_allclose(d.entropy(), -p @ np.log(p), rtol=2e-6)
    np.testing.assert_allclose(kl_divergence(d, e), p @ np.log(p / q), rtol=3e-5)
    assert abs(kl_divergence(d, d)) < 1e-6
    if kind is Chains:
        assert kl_divergence(d, make(forbidding)) == np.inf
        assert np.isfinite(kl_divergence(make(forbidding), d))
        assert d.enumerate_support().shape == (K**T, T, K) and d.has_enumerate_support
        np.testing.assert_allclose(jnp.exp(d.log_prob(d.enumerate_support())).sum(), 1, rtol=1e-5)
        assert make((np.zeros((2, T, K)), np.zeros((K, K)))).enumerate_support(False).shape == (K**T, 1, T, K)
        with pytest.raises(ValueError, match="K\\^T must be at most 1048576"):
            rd.LinearChain(unary=jnp.zeros((30, 3)), transition=jnp.zeros((3, 3))).enumerate_support()
    wide = d.expand((4, 2))
    z = wide.sample(KEY, (3,))
    assert z.shape == (3, 4, 2, *kind.structures[0].shape) and d.support(z).all()
    np.testing.assert_allclose(wide.log_prob(z), np.log(p)[kind.which(z)], rtol=3e-6)
    assert not d.has_rsample and not d.is_discrete
    with pytest.raises(TypeError, match="takes its parameters by keyword"):
        type(d)(*one)


FAMILIES = {
    "chains": (Chains, lambda x: es.LinearChain(x, TRANSITIONS[:2])),
    "trees": (Trees, es.SpanningTree),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FAMILIES)
def test_score_functions_are_unbiased_and_reports_compare_all_three(name):
    """Exact draws, relaxed draws and scores, against the sum over all structures."""
    kind, family = FAMILIES[name]
    logits = jnp.asarray(UNARY[:3] if kind is Chains else WEIGHTS[:4, :4])
    q = family(logits)
    count, events = q.outcomes()
    assert count == (K**3 if kind is Chains else 16)
    outcomes = events(jnp.arange(count))
    assert len({np.asarray(x).tobytes() for x in outcomes}) == count
    np.testing.assert_allclose(np.exp(jax.vmap(q.log_prob)(outcomes)).sum(), 1, rtol=1e-5)
    way = jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)
    f = lambda z: jnp.tanh(jnp.sum(way * z, (-1, -2))) ** 2 + jnp.sum(way * z, (-1, -2))
    more = (TRANSITIONS[:2],) if kind is Chains else ()
    methods = {
        "reinforce": es.reinforce, "rloo": es.rloo,
        "exact draw": dg.from_sampler(lambda key, l: kind.sample(key, l, *more)),
        "relaxed": dg.from_sampler(lambda key, l: kind.relaxed(key, l, *more, 0.5)),
    }  # fmt: skip
    report = dg.gradient_report(KEY, f, q, methods, 20_000, batch_size=2000)
    assert "exact" in report.reference
    assert not report["rloo"]["biased"] and not report["reinforce"]["biased"]
    assert report["exact draw"]["biased"] and report["relaxed"]["biased"]
    assert report["exact draw"]["variance"] < report["rloo"]["variance"] < report["reinforce"]["variance"]
    both = family(jnp.stack([logits, 2 * logits]))
    assert both.batch_shape == (2,) and both.sample(KEY, (7,)).shape == (7, 2, *logits.shape)
    passed = jax.jit(lambda q: es.rloo(KEY, f, q))(both)  # it is a pytree
    np.testing.assert_allclose(passed, es.rloo(KEY, f, both), rtol=1e-5)


@pytest.mark.whole
def test_the_score_reaches_the_transitions():
    f = lambda z: jnp.sum(z[..., 0, :] * z[..., 2, :], -1)
    total = lambda estimator, w: estimator(q=es.LinearChain(UNARY[:3], w), f=f)
    exact = jax.grad(lambda w: total(es.exact, w))(jnp.asarray(TRANSITIONS[:2]))
    each = jax.vmap(
        lambda key: jax.grad(lambda w: total(functools.partial(es.rloo, key), w))(TRANSITIONS[:2])
    )
    found = np.asarray(jax.jit(each)(jax.random.split(KEY, 20_000)), float)
    error = found.std(0) / np.sqrt(20_000)
    assert (np.abs(found.mean(0) - exact) < 4.8 * error + 1e-6).all() and np.abs(
        exact
    ).max() > 10 * error.max()


def test_a_larger_number_of_nodes_has_all_of_its_trees():
    _, events = es.SpanningTree(jnp.zeros((5, 5))).outcomes()
    found = {np.asarray(x, np.int8).tobytes() for x in events(jnp.arange(125))}
    assert found == {x.astype(np.int8).tobytes() for x in TREES}


STRUCTURES = {
    "chains": lambda: rd.LinearChain(unary=UNARY, transition=TRANSITIONS),
    "trees": lambda: rd.SpanningTree(weights=WEIGHTS),
    "orders": lambda: rd.RelaxedPermutation(logits=WEIGHTS[0], tau=0.5, hard=True),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("make", STRUCTURES.values(), ids=list(STRUCTURES))
def test_in_a_relaxed_model(make):
    """relax leaves them unchanged next to a site that it relaxes, and says so if config asks for more."""

    def model():
        numpyro.sample("bit", dist.Bernoulli(0.3))
        return numpyro.sample("z", make())

    for config in (None, {"z": None}):
        relaxed = rj.handlers.relax(model, tau=0.5, config=config)
        trace = handlers.trace(handlers.seed(relaxed, KEY)).get_trace()
        assert set(np.unique(trace["z"]["value"])) == {0, 1} and 0 < trace["bit"]["value"] < 1
        assert trace["z"]["fn"].log_prob(trace["z"]["value"]) > -np.inf
    for own in (lambda d: d, "straight_through"):
        with pytest.raises(
            ValueError, match=r"config\['z'\] must be None or left out: .* another distribution, write"
        ):
            handlers.seed(rj.handlers.relax(model, tau=0.5, config={"z": own}), KEY)()
    with pytest.raises(ValueError, match=r"config must be a relaxation of .*write one of another shape into"):
        handlers.seed(rj.handlers.relax(model, tau=0.5, config={"bit": lambda d: make()}), KEY)()
    if make is not STRUCTURES["orders"]:  # a class with logits and tau, whose shape says that it does not fit
        with pytest.raises(
            ValueError, match=r"config\['bit'\] must be .* a class .* with logits and tau, got"
        ):
            rj.handlers.relax(model, tau=0.5, config={"bit": type(make())})
