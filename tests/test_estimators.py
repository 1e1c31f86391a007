"""Unbiased estimators: compared with enumeration, in their order of variance, and where they are used."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st

import relaxit_jax as rj
from estimator_cases import (
    BITS,
    CLASSES,
    COUPLING,
    ESTIMATORS,
    FAMILIES,
    ONE_CLASS,
    PAIRS,
    OneVariable,
    interacting,
)
from relaxit_jax import estimators as es

KEY = jax.random.key(11)
quick = pytest.mark.usefixtures("fast_compilation")
as_users = pytest.mark.usefixtures("as_users_compile")


def value_of(estimator, family):
    """(key, logits, weight) to the summed estimate, and the per-batch values."""

    def total(logits, weight, key):
        q = FAMILIES[family][0](logits)
        values = estimator(key, interacting(weight, q.event_ndims), q)
        return jnp.sum(values), values

    return jax.grad(total, (0, 1), has_aux=True)


@functools.cache
def exact_gradient(family):
    return jax.jit(value_of(lambda key, f, q: es.exact(f, q), family))(FAMILIES[family][1], 0.7, None)


@pytest.fixture
def n(pytestconfig):
    return 100_000 if pytestconfig.option.quick else 300_000


@functools.cache
def draws(name, family, n):
    """n gradients in the logits and in f's own parameter, and values."""
    estimate = functools.partial(value_of(ESTIMATORS[name], family), FAMILIES[family][1], 0.7)
    keys = jax.random.split(KEY, n)
    (slopes, weights), values = jax.jit(lambda keys: jax.lax.map(estimate, keys, batch_size=10_000))(keys)
    return np.asarray(slopes), np.asarray(weights), np.asarray(values)


@quick
def test_exact_is_the_sum_over_all_outcomes():
    """The value in float64 with NumPy and, by differences, its gradient."""

    def expectation(logits):
        total = np.zeros(2)
        p = 1 / (1 + np.exp(-logits))
        for bits in np.ndindex(2, 2, 2, 2):
            b = np.array(bits, float)
            chance = np.prod(np.where(b == 1, p, 1 - p), -1)
            total += chance * (1 + np.tanh(b @ COUPLING[4] @ b + 0.7 * b[0]))
        return total

    (slopes, _), values = exact_gradient("bits")
    logits = BITS.astype(float)
    np.testing.assert_allclose(values, expectation(logits), rtol=1e-5)
    for i in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[i] = 1e-6
        difference = (expectation(logits + step) - expectation(logits - step)).sum() / 2e-6
        np.testing.assert_allclose(slopes[i], difference, rtol=1e-4, atol=1e-6)


@pytest.mark.few(3, "rebar_tuned-classes")
@as_users
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_mean_is_the_exact_gradient_and_value(name, family, n):
    (slopes, weight), values = exact_gradient(family)
    for found, expected in zip(draws(name, family, n), (slopes, weight, values), strict=True):
        error = found.std(0, dtype=float) / len(found) ** 0.5
        assert (np.abs(found.mean(0, dtype=float) - expected) < 4.8 * error).all()
        assert (error > 0).all()


def total_variance(name, family, n):
    """The variance of the gradient in the logits, summed, and its standard error."""
    slopes = draws(name, family, n)[0]
    squares = ((slopes - slopes.mean(0)) ** 2).reshape(len(slopes), -1).sum(1)
    return squares.mean(), squares.std() / len(squares) ** 0.5


@pytest.mark.few(1)
@as_users
@pytest.mark.parametrize(
    ("less", "more", "family"),
    [
        ("disarm", "arm", "bits"), ("rloo", "reinforce", "bits"), ("rloo", "reinforce", "classes"),
        ("baseline", "reinforce", "bits"), ("baseline", "reinforce", "classes"),
        ("rloo_5", "rloo", "bits"), ("rloo_5", "rloo", "classes"), ("rebar", "reinforce", "bits"),
        ("arms", "disarm", "bits"), ("arms_5", "arms", "bits"), ("arms_5", "arms", "classes"),
        ("unordered_set_4", "unordered_set", "one class"),
    ],
)  # fmt: skip
def test_known_orders_of_variance(less, more, family, n):
    (a, a_error), (b, b_error) = total_variance(less, family, n), total_variance(more, family, n)
    assert b - a > 4.5 * np.hypot(a_error, b_error)


@pytest.mark.whole
@quick
def test_disarm_never_has_more_variance_than_arm():
    """It is ARM's mean given the two draws: in every coordinate, for any f, at any logits."""
    for scale in (0.0, 0.5, 4.0):
        logits = scale * jnp.asarray(BITS)
        estimates = {}
        for estimator in (es.arm, es.disarm):
            slope = jax.grad(lambda l, k, e=estimator: jnp.sum(e(k, interacting(0.2, 1), es.Bernoulli(l))))
            estimates[estimator] = jax.jit(jax.vmap(slope, (None, 0)))(logits, jax.random.split(KEY, 50_000))
        arm, disarm = (np.asarray(estimates[e], float) for e in (es.arm, es.disarm))
        # the same uniforms: their difference is noise of mean zero given the draws
        excess = (arm - arm.mean(0)) ** 2 - (disarm - disarm.mean(0)) ** 2
        assert (excess.mean(0) > -4.5 * excess.std(0) / len(arm) ** 0.5).all()
        assert excess.sum((1, 2)).mean() > 0


@pytest.mark.whole
@quick
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 16])
def test_arms_has_less_variance_than_rloo_at_equal_calls(n, family):
    cls, logits = FAMILIES[family]

    def total(estimator, logits, weight, key):
        f = interacting(weight, cls(logits).event_ndims)
        return jnp.sum(estimator(key, f, cls(logits), num_samples=n))

    slopes_of = {
        e: jax.jit(jax.vmap(jax.grad(functools.partial(total, e)), (None, None, 0)))
        for e in (es.arms, es.rloo)
    }
    for scale, weight in ((0.3, 0.2), (1.0, 0.7), (3.0, 0.7)):
        spreads = {}
        for estimator in slopes_of:
            slopes = slopes_of[estimator](scale * logits, weight, jax.random.split(KEY, 20_000))
            squares = np.sum(
                (np.asarray(slopes, float) - np.mean(slopes, 0)) ** 2, tuple(range(1, slopes.ndim))
            )
            spreads[estimator] = squares.mean(), squares.std() / len(squares) ** 0.5
        (less, a), (more, b) = spreads[es.arms], spreads[es.rloo]
        assert more - less > 4.5 * np.hypot(a, b)


@pytest.mark.whole
@quick
@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.2, 0.5, 0.9, 1 - 1e-6])
def test_antithetic_groups_have_their_marginal_law_and_correlation(n, p):
    """How often the bit is on, and E sum_i b_i (b_i - mean b) / ((n - 1)(1 - rho)) = p (1 - p)."""
    logit = np.log(p) - np.log1p(-p)
    q = es.Bernoulli(jnp.full(3_000_000 // n, logit, jnp.float32))
    bits, gains = map(np.asarray, jax.jit(lambda key: q.antithetic_group(key, n))(KEY))
    rare = (1 - bits if p > 0.5 else bits).sum()
    r = min(p, 1 - p)
    # of one group the number of rarer values has a variance below that of independent draws
    assert abs(rare - r * bits.size) < 4.8 * np.sqrt(r * bits.size) + 1
    each = np.sum(np.asarray(bits, float) * gains, 0)
    assert abs(each.mean() - p * (1 - p)) < 4.8 * each.std() / len(each) ** 0.5 + 1e-6 * r


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("n", [2, 3, 8])
def test_antithetic_groups_of_classes_have_their_marginal_law_and_slopes(n):
    """How often each class comes, and E sum_i b_i factor_i = diag(p) - p p^T, the Jacobian of E b."""
    p = np.array([0.3, 1e-4, 0.25, 0.0, 0.2, 0.15, 0.1 - 1e-4])
    with np.errstate(divide="ignore"):
        logits = np.log(p).astype(np.float32)
    groups = 200_000
    q = es.OneHotCategorical(jnp.broadcast_to(logits, (groups, 7)))
    draws, factors = map(np.asarray, jax.jit(lambda q: q.antithetic_group(KEY, n))(q))
    assert (draws.sum(-1) == 1).all() and np.isfinite(factors).all()
    for one in draws:  # the groups are independent
        counts = one.sum(0, dtype=float)
        assert counts[3] == 0 and st.chisquare(counts[p > 0], groups * p[p > 0]).pvalue > 1e-4
    each = np.float64(draws).transpose(1, 2, 0) @ np.float64(factors).transpose(1, 0, 2)
    jacobian = np.diag(p) - np.outer(p, p)
    assert (np.abs(each.mean(0) - jacobian) <= 4.8 * each.std(0) / groups**0.5 + 1e-7).all()


@pytest.mark.whole
@quick
def test_noisy_logits_drawn_again_have_the_law_of_the_first_given_the_draw():
    for family, n in (("bits", 20_000), ("classes", 20_000)):
        cls, logits = FAMILIES[family]

        def both(key, cls=cls, logits=logits):
            draw, noisy, again = cls(logits).coupled(key)
            return draw, noisy(logits), again(logits)

        draw, z, again = map(np.asarray, jax.jit(jax.vmap(both))(jax.random.split(KEY, n)))
        chosen = (lambda z: z > 0) if family == "bits" else (lambda z: z == z.max(-1, keepdims=True))
        np.testing.assert_array_equal(chosen(z), draw == 1)
        np.testing.assert_array_equal(chosen(again), draw == 1)
        for index in np.ndindex(logits.shape):
            for won in (0, 1):
                mine = draw[(slice(None), *index)] == won
                pair = z[(mine, *index)], again[(mine, *index)]
                assert st.ks_2samp(*pair).pvalue > 1e-4
                assert abs(np.corrcoef(*pair)[0, 1]) < 4.5 / mine.sum() ** 0.5  # drawn anew


# --- the formulas of the docstrings, draw by draw ---------------------------------------------

# the second row has probabilities near 0 and 1
STEEP = {
    "bits": BITS * [[1], [6]],
    "classes": CLASSES * np.array([1, 6])[:, None, None],
    "one class": ONE_CLASS * np.array([[1], [4]]),
}


def f_by_hand(x, weight):
    """The values of `interacting`, and their slopes in x and in the weight."""
    flat = x.reshape(len(x), -1)
    coupling = COUPLING[flat.shape[1]].astype(np.float32).astype(float)
    t = np.tanh(np.einsum("bi,ij,bj->b", flat, coupling, flat) + weight * flat[:, 0])
    slope = flat @ (coupling + coupling.T)
    slope[:, 0] += weight
    return 1 + t, ((1 - t**2)[:, None] * slope).reshape(x.shape), (1 - t**2) * flat[:, 0]


def probabilities(logits, family):
    return sp.expit(logits) if family == "bits" else sp.softmax(logits, -1)


def each(x, like):
    return x.reshape(-1, *(like.ndim - 1) * [1])


def by_scores(draws, logits, family, weight, gains):
    """The estimate of `reinforce` and `rloo`: the gain of each draw, given the values of all."""
    values, _, weights = zip(*(f_by_hand(b, weight) for b in draws), strict=True)
    score = lambda b: b - probabilities(logits, family)
    slope = sum(each(g, b) * score(b) for g, b in zip(gains(np.stack(values)), draws, strict=True))
    return np.mean(values, 0), slope, np.mean(weights, 0)


def reinforce_by_hand(draws, logits, family, weight, baseline=0.0):
    return by_scores(draws["sample"][None], logits, family, weight, lambda values: values - baseline)


def rloo_by_hand(draws, logits, family, weight, num_samples=2):
    gains = lambda values: (values - values.mean(0)) / (num_samples - 1)
    return by_scores(draws[f"samples_{num_samples}"], logits, family, weight, gains)


def antithetic_by_hand(factor):
    def by_hand(draws, logits, family, weight):
        u = draws["centred"] + 0.5
        pair = 1.0 * (u > sp.expit(-logits)), 1.0 * (u < sp.expit(logits))
        np.testing.assert_array_equal(pair, [draws["one"], draws["other"]])
        (first, _, w1), (second, _, w2) = (f_by_hand(b, weight) for b in pair)
        return (first + second) / 2, (first - second)[:, None] * factor(*pair, u, logits), (w1 + w2) / 2

    return by_hand


def coupled_by_hand(draws, logits, family, weight, variate):
    """For `rebar` and `relax`: the slope of z~ at a fixed P(z < z~ | b), found without its construction."""
    b, z, again = (draws[name] for name in ("drawn", "noisy", "again"))
    p = probabilities(logits, family)
    value, _, weights = f_by_hand(b, weight)
    slope, (c, slope_again) = variate(z)[1], variate(again)
    if family == "bits":
        sign = np.where(b == 1, 1, -1)
        slope_again = slope_again * (1 - sp.expit(-sign * logits) / sp.expit(sign * (again - logits)))
    else:  # exp(-z~) less that of the largest is E / p, whose slope in log p is -E / p
        slope_again = slope_again * -np.expm1(again - again.max(-1, keepdims=True))
        slope, slope_again = (s - p * s.sum(-1, keepdims=True) for s in (slope, slope_again))
    return value, each(value - c, b) * (b - p) + slope - slope_again, weights


def rebar_by_hand(draws, logits, family, weight, tau=0.5, eta=1.0):
    def variate(z):
        x = probabilities(z / tau, family)
        c, slope, _ = f_by_hand(x, weight)
        slope = x * (1 - x) * slope if family == "bits" else x * (slope - (x * slope).sum(-1, keepdims=True))
        return eta * c, eta / tau * slope

    return coupled_by_hand(draws, logits, family, weight, variate)


def relax_by_hand(draws, logits, family, weight, control_variate):
    def variate(z):
        t = np.tanh(z - 0.3)
        return t.sum(tuple(range(1, t.ndim))) / 4, (1 - t**2) / 4

    return coupled_by_hand(draws, logits, family, weight, variate)


def correlation(p, n):
    """The correlation of two of n antithetic bits."""
    r = np.minimum(p, 1 - p)
    both = np.maximum(2 * r ** (1 / (n - 1)) - 1, 0) ** (n - 1)  # two of the draws have the rarer value
    return (both - r**2) / (r * (1 - r))


def arms_by_hand(draws, logits, family, weight, num_samples=4):
    b, n = draws[f"group_{num_samples}"], num_samples
    values, _, weights = zip(*(f_by_hand(x, weight) for x in b), strict=True)
    values = np.stack(values)
    if family == "bits":
        gains = (values - values.mean(0))[..., None] * (b - b.mean(0)) / (n - 1)
        slopes = gains.sum(0) / (1 - correlation(sp.expit(logits), n))
    else:
        slopes = np.zeros_like(logits)
        for variable in np.ndindex(logits.shape[:-1]):
            drawn = b[(slice(None), *variable)].argmax(-1)
            slopes[variable] = arms_of_a_class(drawn, logits[variable], values[:, variable[0]])
    return values.mean(0), slopes, np.mean(weights, 0)


def arms_of_a_class(drawn, logits, values):
    """The mean over all pairs of draws, from a tree over the binary digits of the classes."""
    n, p = len(drawn), sp.softmax(logits)
    classes = np.arange(len(p))
    slope = np.zeros_like(p)
    for i, j in itertools.permutations(range(n), 2):
        for level in range((len(p) - 1).bit_length()):
            prefix = lambda x, level=level: x % 2**level
            digit = lambda x, level=level: x >> level & 1
            below = prefix(classes) == prefix(drawn[i])
            chance = (p * below * digit(classes)).sum() / (p * below).sum()
            if not 0 < chance < 1:
                continue
            of_log_odds = (
                p * below * np.where(digit(classes), 1 / chance, -1 / (1 - chance)) / (p * below).sum()
            )
            if prefix(drawn[i]) == prefix(drawn[j]):  # both orders of the pair come by
                m = (prefix(drawn) == prefix(drawn[i])).sum()
                gain = (digit(drawn[i]) - digit(drawn[j])) / (1 - correlation(chance, m)) / 2
            else:  # the digit that draw j would have had is left to chance
                gain = digit(drawn[i]) - chance
            slope += (values[i] - values[j]) * gain * of_log_odds / (n * (n - 1))
    return slope


def chance_of_set(p, items):
    """The probability that these come first, in any order: the sum over all orders."""
    total = 0.0
    for order in itertools.permutations(items):
        chance, left = 1.0, p.sum()
        for item in order:
            chance *= p[item] / left
            left -= p[item]
        total += chance
    return total


def set_by_hand(draws, logits, family, weight, num_samples=2):
    """The estimate from the sum over all orders, for each batch element."""
    value, slope, weights = np.zeros(len(logits)), np.zeros_like(logits), np.zeros(len(logits))
    for row, l in enumerate(logits):
        p, n = sp.softmax(l), len(l)
        each_class = f_by_hand(np.eye(n), weight)
        items = [int(i) for i in draws[f"set_{num_samples}"][row]]

        def chance(left_out, p=p, items=items):
            without = np.where(np.isin(np.arange(len(p)), left_out), 0, p)
            return chance_of_set(without, [i for i in items if i not in left_out])

        for s in items:
            ratio = p[s] * chance([s]) / chance([])
            baseline = sum(
                p[t] * (1 if s == t else chance([s, t]) / chance([s])) * each_class[0][t] for t in items
            )
            value[row] += ratio * each_class[0][s]
            weights[row] += ratio * each_class[2][s]
            slope[row] += ratio * (each_class[0][s] - baseline) * (np.eye(n)[s] - p)
    return value, slope, weights


BY_HAND = {
    es.reinforce: reinforce_by_hand,
    es.rloo: rloo_by_hand,
    es.arm: antithetic_by_hand(lambda b, other, u, l: u - 0.5),
    es.disarm: antithetic_by_hand(
        lambda b, other, u, l: (-1) ** other * (b != other) * sp.expit(np.abs(l)) / 2
    ),
    es.arms: arms_by_hand,
    es.rebar: rebar_by_hand,
    es.relax: relax_by_hand,
    es.unordered_set: set_by_hand,
}


@pytest.mark.few(2, "rebar-bits-float32", "arms-bits-float32", "unordered_set-one class-float64")
@quick
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-11)])
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_value_and_gradient_are_the_formula_at_every_draw(name, family, dtype, tolerance):
    cls, logits = FAMILIES[family][0], STEEP[family].astype(dtype)
    estimator, keys = ESTIMATORS[name], jax.random.split(KEY, 30)

    def with_draws(key):
        q = cls(jnp.asarray(logits))
        drawn, noisy, again = q.coupled(key)
        draws = {"drawn": drawn, "noisy": noisy(q.logits), "again": again(q.logits), "sample": q.sample(key)}
        draws |= {f"samples_{k}": q.sample(key, (k,)) for k in (2, 5)}
        if family == "bits":
            draws |= zip(("one", "other", "centred"), q.antithetic(key), strict=True)
        draws |= {f"group_{n}": q.antithetic_group(key, n)[0] for n in (4, 5)}
        if family == "one class":
            draws |= {f"set_{k}": rj.gumbel_top_k(key, q.logits, k)[0].astype(dtype) for k in (2, 4)}
        (slope, weight), values = value_of(estimator, family)(q.logits, dtype(0.7), key)
        return draws, (values, slope, weight)

    with jax.enable_x64(dtype == np.float64):
        draws, found = jax.jit(jax.vmap(with_draws))(keys)
        assert {x.dtype for x in jax.tree.leaves((draws, found))} == {np.dtype(dtype)}
    options = getattr(estimator, "keywords", {})
    by_hand = BY_HAND[getattr(estimator, "func", estimator)]
    for i in range(len(keys)):
        mine = {name: np.asarray(x[i], float) for name, x in draws.items()}
        value, slope, weight = by_hand(mine, logits.astype(float), family, float(dtype(0.7)), **options)
        for x, expected in zip(found, (value, slope, weight.sum()), strict=True):
            np.testing.assert_allclose(x[i], expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.few(1, "relax-bits")
@quick
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_equal_variables_and_equal_rows_are_uncorrelated(name, family):
    """Each has its own call of f, so only shared noise could correlate them."""
    if family == "bits":
        q, f, variate = es.Bernoulli(jnp.full((2, 2), 0.4), 0), lambda b: jnp.exp(0.7 * b), jnp.tanh
    else:  # of one class, or of several
        q = es.OneHotCategorical(jnp.broadcast_to(jnp.array([0.5, -0.3, 0.1, 0.2, 0.0]), (2, 2, 5)), 1)
        slopes = jnp.array([0.7, -0.2, 0.4, 0.1, 0.3])
        f, variate = lambda b: jnp.exp(b @ slopes), lambda z: jnp.tanh(z).sum(-1)
    options = {"control_variate": variate} if name == "relax" else {}

    def estimate(key):
        at = lambda logits: ESTIMATORS[name](key, f, type(q)(logits, q.event_ndims), **options)
        value, pull = jax.vjp(at, q.logits)
        return jnp.concatenate([value.reshape(4, 1), pull(jnp.ones_like(value))[0].reshape(4, -1)], 1)

    n = 20_000
    found = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(KEY, n)), float)
    for x in (found, (found - found.mean(0)) ** 2):
        correlation = np.corrcoef(x.reshape(n, -1).T).reshape(*found.shape[1:], *found.shape[1:])
        between = correlation.transpose(0, 2, 1, 3)[~np.eye(4, dtype=bool)]
        assert np.abs(between).max() * n**0.5 < 4.5


# --- draws without replacement ----------------------------------------------------------------

STEPS, TOKENS = 3, 3
TABLE = np.random.default_rng(3).normal(size=(2, TOKENS + 1, TOKENS)).astype(np.float32)


def log_prob_of_sequence(logits, tokens):
    """The log-probability of each token given the last one, and whether it is the first."""
    before = jnp.concatenate([jnp.full_like(tokens[..., :1], TOKENS), tokens[..., :-1]], -1)
    rows = jax.nn.log_softmax(logits)[jnp.minimum(jnp.arange(STEPS), 1), before]
    return jnp.take_along_axis(rows, tokens[..., None], -1)[..., 0].sum(-1)


def score_of_sequence(tokens, weight):
    return jnp.sin(weight * tokens[..., 0] + tokens[..., 1] * tokens[..., 2]) + tokens.sum(-1) / 4


@pytest.mark.whole
@quick
@pytest.mark.parametrize("k", [2, 5])
def test_a_gradient_over_sequences_from_a_beam_of_draws(k):
    """The gradient of E f over 27 sequences, from k of `stochastic_beam_search`; with all 27 it is exact."""
    every = jnp.stack(jnp.meshgrid(*STEPS * [jnp.arange(TOKENS)], indexing="ij"), -1).reshape(-1, STEPS)

    def exact(logits, weight):
        chances = jnp.exp(log_prob_of_sequence(logits, every))
        return jnp.sum(chances * score_of_sequence(every, weight))

    def estimate(logits, weight, key):
        step = lambda at, token: (jax.lax.stop_gradient(logits)[jnp.minimum(at, 1), token], at + 1)
        tokens, _, _ = rj.stochastic_beam_search(key, step, 0, k, STEPS, start=TOKENS)
        return es.from_set(score_of_sequence(tokens, weight), log_prob_of_sequence(logits, tokens))

    expected = jax.tree.leaves(jax.value_and_grad(exact, (0, 1))(TABLE, 0.7))
    each = jax.jit(jax.vmap(jax.value_and_grad(estimate, (0, 1)), (None, None, 0)))
    for found, true in zip(
        jax.tree.leaves(each(TABLE, 0.7, jax.random.split(KEY, 30_000))), expected, strict=True
    ):
        found = np.asarray(found, float)
        error = found.std(0) / len(found) ** 0.5
        assert (np.abs(found.mean(0) - true) < 4.8 * error + 1e-5).all()
    whole = lambda l, w: es.from_set(score_of_sequence(every, w), log_prob_of_sequence(l, every))
    for found, true in zip(
        jax.tree.leaves(jax.value_and_grad(whole, (0, 1))(TABLE, 0.7)), expected, strict=True
    ):
        np.testing.assert_allclose(found, true, atol=2e-6)


@pytest.mark.whole
@quick
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_many_classes_and_a_large_set(scale):
    """With 32 of 1,000 classes, the mean is checked along five directions, as single classes are rare."""
    rng = np.random.default_rng(5)
    logits, values = scale * rng.normal(size=1000), rng.normal(size=1000)
    logits, values = jnp.asarray(logits, jnp.float32), jnp.asarray(values, jnp.float32)
    f = lambda b: jnp.tanh(b @ values)
    one = lambda l, key: es.unordered_set(key, f, es.OneHotCategorical(l, 1), num_samples=32)
    keys = jax.random.split(KEY, 4000)
    found = jax.jit(lambda keys: jax.lax.map(lambda k: jax.grad(one)(logits, k), keys, batch_size=50))(keys)
    directions = rng.normal(size=(1000, 5))
    found = np.asarray(found, float) @ directions
    exact = jax.grad(lambda l: jnp.sum(jax.nn.softmax(l) * jnp.tanh(values)))(logits) @ directions
    assert (np.abs(found.mean(0) - exact) < 4.8 * found.std(0) / len(found) ** 0.5).all()


@quick
def test_a_set_of_all_classes_is_exact():
    slope = lambda e: jax.jit(jax.grad(lambda l: jnp.sum(e(interacting(0.7, 1), OneVariable(l)))))(ONE_CLASS)
    by_set = slope(lambda f, q: es.unordered_set(KEY, f, q, num_samples=5))
    np.testing.assert_allclose(by_set, slope(es.exact), atol=1e-6)


# --- bounds of several draws ------------------------------------------------------------------


def log_joint(weight):
    """A log-joint of three bits, or of one class of five; one outcome is impossible."""

    def f(b):
        value = 2 * interacting(weight, 1)(jnp.pad(b, (0, 5 - b.shape[-1])))
        return jnp.where(jnp.sum(b * jnp.arange(b.shape[-1]), -1) == 2, -jnp.inf, value)

    return f


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("family", ["bits", "one class"])
def test_vimco_is_exact_over_all_draws_to_the_second_order(family, k):
    """The bound with k draws, as the sum over all k-tuples, in float64."""
    cls = es.Bernoulli if family == "bits" else OneVariable
    with jax.enable_x64(True):
        start = jnp.append(jnp.array([0.4, -1.0, 0.3] if family == "bits" else ONE_CLASS[0], float), 0.7)
        q = cls(start[:-1])
        count, events = q.outcomes()
        outcomes = events(jnp.arange(count))
        tuples = jnp.stack(jnp.meshgrid(*k * [jnp.arange(len(outcomes))], indexing="ij"), -1).reshape(-1, k)
        samples = outcomes[tuples]

        def exact(x):
            q, f = cls(x[:-1]), log_joint(x[-1])
            log_q = jax.vmap(jax.vmap(q.log_prob))(samples)
            log_w = jax.vmap(jax.vmap(f))(samples) - log_q
            bound = jax.nn.logsumexp(log_w, -1) - jnp.log(k)
            return jnp.sum(jnp.exp(log_q.sum(-1)) * bound)

        def estimate(x, draws):
            class Given(cls):
                sample = lambda self, *_: draws

            return es.vimco(KEY, log_joint(x[-1]), Given(x[:-1]), num_samples=k)

        # where no weight is above 0 the bound is infinite
        samples = samples[jnp.isfinite(jax.vmap(jax.vmap(log_joint(0.7)))(samples)).any(-1)]
        chance = jnp.exp(jax.vmap(jax.vmap(q.log_prob))(samples).sum(-1))
        for order in range(3):
            found = jax.jit(jax.vmap(estimate, (None, 0)))(start, samples)
            np.testing.assert_allclose(np.tensordot(chance, found, 1), jax.jit(exact)(start), atol=1e-10)
            step = jax.grad if order == 0 else jax.jacfwd
            estimate, exact = step(estimate), step(exact)


@pytest.mark.whole
@quick
def test_vimco_has_far_less_variance_than_the_score_of_the_bound():
    q = lambda l: es.Bernoulli(l)
    f = lambda b: 3 * interacting(0.7, 1)(b)

    def score(l, key):
        b = q(l).sample(key, (5,))
        log_w = jax.vmap(f)(b) - q(l).log_prob(b)
        bound = jax.nn.logsumexp(log_w, 0) - jnp.log(5)
        return jnp.sum(bound + jax.lax.stop_gradient(bound) * jnp.sum(q(l).log_prob(b), 0))

    ours = lambda l, key: jnp.sum(es.vimco(key, f, q(l), num_samples=5))
    keys = jax.random.split(KEY, 20_000)
    both = [np.asarray(jax.jit(jax.vmap(jax.grad(e), (None, 0)))(BITS, keys), float) for e in (ours, score)]
    mine, theirs = (x.var(0).sum() for x in both)
    assert 20 * mine < theirs
    error = np.hypot(*(x.std(0) for x in both)) / len(keys) ** 0.5
    assert (np.abs(both[0].mean(0) - both[1].mean(0)) < 4.8 * error).all()


# --- aux values that f returns ----------------------------------------------------------------


@pytest.mark.few(0, "reinforce-bits", "rloo_5-bits", "relax-bits")
@quick
@pytest.mark.parametrize(("name", "family"), [*PAIRS, ("exact", "classes"), ("vimco", "bits")])
def test_aux_is_that_of_the_first_call(name, family):
    """Value and gradients stay the same; aux may be any pytree, and has its own gradients."""
    cls, logits = FAMILIES[family]
    alone = {"exact": lambda key, f, q, **o: es.exact(f, q, **o), "vimco": es.vimco} | ESTIMATORS
    estimator = alone[name]

    def with_aux(weight):
        def f(b):
            value = interacting(weight, q.event_ndims)(b)
            return value, {"draw": b, "norm": weight * jnp.sum(value), "step": 3}

        return f

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def both(logits, weight, aux_too):
        q = cls(logits)
        value, aux = estimator(KEY, with_aux(weight), q, has_aux=True)
        return jnp.sum(value) + aux_too * aux["norm"]

    @jax.jit
    def plain(logits, weight):
        q = cls(logits)
        return jnp.sum(estimator(KEY, interacting(weight, q.event_ndims), q))

    q = cls(jnp.asarray(logits))
    value, aux = jax.jit(lambda q: estimator(KEY, with_aux(0.7), q, has_aux=True))(q)
    # f is 1 + tanh, of which a unit in the last place of 1 is not known
    np.testing.assert_allclose(jnp.sum(value), plain(q.logits, 0.7), rtol=2e-6, atol=5e-7)
    assert set(aux) == {"draw", "norm", "step"} and int(aux["step"]) == 3
    first = interacting(0.7, q.event_ndims)(aux["draw"])
    np.testing.assert_allclose(aux["norm"], 0.7 * jnp.sum(first), rtol=1e-5, atol=5e-7)

    if name in ("rloo", "rloo_5", "vimco"):
        np.testing.assert_array_equal(aux["draw"], q.sample(KEY, (5 if name == "rloo_5" else 2,))[0])

    slopes = both(q.logits, 0.7, 0.0)
    for mine, expected in zip(slopes, jax.grad(plain, (0, 1))(q.logits, 0.7), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)
    assert both(q.logits, 0.7, 1.0)[1] != slopes[1]
    with pytest.raises(ValueError, match=r"must be a function that returns \(value, aux\), .*, got a"):
        estimator(KEY, interacting(0.7, q.event_ndims), q, has_aux=True)


# --- far from 0 -------------------------------------------------------------------------------


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("family", ["bits", "classes"])
def test_score_and_log_prob_keep_their_digits_in_the_tails(family, dtype, tolerance):
    """At log-odds x, P is sigmoid(x): for a bit to have its value, or a class against all others."""
    far = np.array([-1e4, -60, -20, -3, 3, 20, 60, 1e4], dtype)
    if family == "bits":
        cls, logits, draws = functools.partial(es.Bernoulli, event_ndims=0), far, np.array([[0], [1]])
        odds = np.where(draws == 1, 1, -1) * logits.astype(float)
        score = np.where(draws == 1, 1, -1) * sp.expit(-odds)
    else:
        cls, draws = functools.partial(es.OneHotCategorical, event_ndims=1), np.eye(3)[:, None]
        logits = np.stack([far, 0 * far, far / 2 + 1], -1)
        others = np.stack([sp.logsumexp(np.delete(logits.astype(float), k, -1), -1) for k in range(3)], -1)
        each_class = logits - others
        odds = (draws * each_class).sum(-1)
        score = np.where(draws == 1, sp.expit(-each_class), -sp.expit(each_class))
    with jax.enable_x64(dtype == np.float64):
        q, draws = cls(jnp.asarray(logits)), jnp.asarray(draws * np.ones_like(logits))
        slopes = jax.vmap(jax.grad(lambda l, b: jnp.sum(cls(l).log_prob(b))), (None, 0))(q.logits, draws)
        pairs = [(q.score(draws), score), (q.log_prob(draws), -np.logaddexp(0, -odds)), (slopes, score)]
        for found, expected in pairs:
            assert found.dtype == dtype
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-37)


# --- the control variate ----------------------------------------------------------------------


def toy(theta, variate, key, target=0.499):
    """The classic problem, min over theta of E (b - target)^2, with REBAR."""
    f = lambda b: jnp.sum((b - target) ** 2, -1)
    return es.rebar(key, f, es.Bernoulli(theta), tau=jnp.exp(variate["log_tau"]), eta=variate["eta"])


VARIATE = {"log_tau": jnp.float32(0.2), "eta": jnp.float32(0.3)}


@pytest.mark.whole
@quick
def test_value_and_grads_are_those_of_the_loss_and_of_the_variance():
    theta, keys = jnp.array([0.4, -0.3]), jax.random.split(KEY, 100_000)
    gradient = jax.vmap(jax.grad(toy), (None, None, 0))
    variance = jax.jit(lambda variate: jnp.mean(jnp.sum(gradient(theta, variate, keys) ** 2, -1)))
    value, slope, variate = jax.jit(
        jax.vmap(lambda key: es.value_and_grads(toy, theta, VARIATE, key))
    )(keys)  # fmt: skip
    np.testing.assert_allclose(value, jax.vmap(toy, (None, None, 0))(theta, VARIATE, keys), rtol=1e-5)
    np.testing.assert_allclose(slope, jax.jit(gradient)(theta, VARIATE, keys), rtol=1e-4, atol=1e-6)
    for name, step in (("eta", 1e-2), ("log_tau", 1e-2)):
        ends = [variance(VARIATE | {name: VARIATE[name] + h}) for h in (step, -step)]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), variate[name].mean(), rtol=0.01)


@pytest.mark.whole
@quick
def test_learned_control_variates_have_less_variance():
    """REBAR's eta and tau, and RELAX's network, are trained by gradient descent from their start."""

    def with_network(theta, variate, key):
        control = lambda z: jnp.sum(variate["out"] * jnp.tanh(variate["in"] * z + variate["bias"]), -1)
        f = lambda b: jnp.sum((b - 0.499) ** 2, -1)
        return es.relax(key, f, es.Bernoulli(theta), control_variate=control)

    theta, descend = jnp.array([0.4, -0.3]), lambda x, slope: x - 0.5 * jnp.mean(slope, 0)
    start = {"out": jnp.zeros(2), "in": jnp.ones(2), "bias": jnp.zeros(2)}
    for loss, variate in ((toy, VARIATE), (with_network, start)):
        grads = jax.vmap(
            lambda variate, key, loss=loss: es.value_and_grads(loss, theta, variate, key), (None, 0)
        )

        def step(variate, key, grads=grads):
            slopes = grads(variate, jax.random.split(key, 100))[2]
            return jax.tree.map(descend, variate, slopes), None

        learned, _ = jax.jit(lambda v, step=step: jax.lax.scan(step, v, jax.random.split(KEY, 300)))(variate)
        keys = jax.random.split(jax.random.key(1), 50_000)
        norms = [jnp.sum(jax.jit(grads)(v, keys)[1] ** 2, -1) for v in (variate, learned)]
        error = np.hypot(*(float(x.std()) / len(keys) ** 0.5 for x in norms))
        assert norms[0].mean() - norms[1].mean() > 4.5 * error


def two_layers(outer, inner, upper, key):
    """f of the upper bits is the inner estimate of a function of the lower ones, whose logits they set."""
    outer_key, inner_key = jax.random.split(key)
    weights = jnp.array([[1.0, -2.0, 0.5], [-1.0, 1.5, 2.0]])
    lower = lambda c: jnp.tanh(c @ jnp.array([1.5, -1.0, 2.0])) + c[..., 0] * c[..., 2]
    f = lambda b: inner(inner_key, lower, es.Bernoulli(b @ weights))
    return outer(outer_key, f, es.Bernoulli(upper))


LAYERS = {
    "reinforce": es.reinforce, "rloo": es.rloo, "arm": es.arm, "disarm": es.disarm, "arms": es.arms,
    "rebar": es.rebar, "relax": functools.partial(es.relax, control_variate=lambda z: jnp.tanh(z).sum(-1)),
    "exact": lambda key, f, q: es.exact(f, q),
}  # fmt: skip


@pytest.mark.whole
@quick
@pytest.mark.parametrize("outer", LAYERS)
def test_an_estimator_inside_of_another_is_unbiased(outer):
    """Every pair is checked, in the outer logits."""
    upper, keys = jnp.array([0.3, -0.5]), jax.random.split(KEY, 20_000)
    every = functools.partial(two_layers, LAYERS["exact"], LAYERS["exact"])
    exact = np.asarray(jax.jit(jax.grad(every))(upper, KEY))
    assert np.abs(exact).max() > 0.05

    @jax.jit
    def all_inner(keys):
        slope = lambda inner: jax.vmap(
            jax.grad(functools.partial(two_layers, LAYERS[outer], inner)), (None, 0)
        )
        return {name: slope(inner)(upper, keys) for name, inner in LAYERS.items()}

    for inner, found in all_inner(keys).items():
        found = np.asarray(found, float)
        error = found.std(0) / len(found) ** 0.5
        assert (np.abs(found.mean(0) - exact) < 4.8 * error + 1e-6).all(), inner


@pytest.mark.whole
@quick
def test_the_slope_in_eta_is_right_in_layers_too():
    """The slope in tau is not, as the docstring says."""
    upper, keys = jnp.array([0.3, -0.5]), jax.random.split(KEY, 100_000)

    def loss(logits, variate, key):
        outer = functools.partial(es.rebar, tau=jnp.exp(variate["log_tau"]), eta=variate["eta"])
        return two_layers(outer, es.disarm, logits, key)

    start = {"eta": 0.5, "log_tau": 0.0}
    each = jax.vmap(lambda v, key: es.value_and_grads(loss, upper, v, key), (None, 0))
    slopes = jax.jit(each)(start, keys)[2]
    norm = jax.jit(lambda v: jnp.sum(each(v, keys)[1] ** 2, -1))
    ends = [np.asarray(norm(start | {"eta": x}), float) for x in (0.55, 0.45)]
    difference = (ends[0] - ends[1]) / 0.1 - np.asarray(slopes["eta"], float)  # quadratic in eta
    assert abs(difference.mean()) < 4.5 * difference.std() / len(keys) ** 0.5 + 1e-3


@pytest.mark.whole
@quick
def test_the_control_variate_does_not_reach_the_loss():
    """Neither do the noisy logits: f's parameters get their gradient from the draw alone."""
    slopes = jax.grad(toy, 1)(jnp.array([0.4, -0.3]), VARIATE, KEY)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, VARIATE))
    f = lambda weight: lambda b: jnp.sum(weight * b**2, -1)
    q = es.Bernoulli(jnp.asarray(BITS))
    weight = jnp.arange(1.0, 5.0)
    slope = jax.grad(lambda w: jnp.sum(es.rebar(KEY, f(w), q)))(weight)
    assert set(np.unique(slope)) <= {0.0, 1.0, 2.0}  # how often the bit is one in the batch of two


# --- calls, transformations, extremes ---------------------------------------------------------


@quick
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("reinforce", 1),
        ("rloo", 2),
        ("rloo_5", 5),
        ("arm", 2),
        ("disarm", 2),
        ("arms", 4),
        ("rebar", 3),
        ("relax", 1),
        ("unordered_set_4", 4),
    ],
)
def test_f_is_called_as_often_as_the_docstring_says(name, calls):
    cls, logits = FAMILIES["one class" if name == "unordered_set_4" else "bits"]
    seen = []

    @jax.custom_jvp
    def counted(b):
        out = jax.ShapeDtypeStruct((2,), jnp.float32)
        count = lambda b: (seen.append(None), np.float32(b).sum(-1))[1]
        return jax.pure_callback(count, out, b, vmap_method="sequential")

    counted.defjvp(lambda p, t: (counted(*p), jnp.sum(t[0], -1)))
    f = lambda b: counted(b) ** 2
    total = lambda logits: jnp.sum(ESTIMATORS[name](KEY, f, cls(logits)))
    jax.block_until_ready(jax.jit(jax.value_and_grad(total))(logits))
    assert len(seen) == calls


@pytest.mark.few(1)
@quick
@pytest.mark.parametrize("name", ["reinforce", "rloo", "disarm", "arms", "rebar", "relax", "unordered_set"])
def test_under_jit_vmap_scan_and_checkpoint(name):
    keys = jax.random.split(KEY, 3)
    cls, logits = FAMILIES["one class" if name == "unordered_set" else "bits"]
    total = lambda l, key: jnp.sum(ESTIMATORS[name](key, interacting(0.7, 1), cls(l)))
    slope, with_checkpoint = jax.grad(total), jax.grad(jax.checkpoint(total))
    eager = jnp.stack([slope(jnp.asarray(logits), key) for key in keys])
    for other in (
        jax.jit(jax.vmap(slope, (None, 0)))(logits, keys),
        jax.jit(lambda keys: jax.lax.scan(lambda _, key: (None, slope(logits, key)), None, keys)[1])(keys),
        jax.jit(jax.vmap(with_checkpoint, (None, 0)))(logits, keys),
    ):
        np.testing.assert_allclose(other, eager, rtol=1e-4, atol=1e-5)
    # the families are pytrees
    q = cls(jnp.asarray(logits))
    passed = jax.jit(lambda q, key: ESTIMATORS[name](key, interacting(0.7, 1), q))(q, KEY)
    # f is 1 + tanh: one unit in the last place of 1 is all that its smallest values are sure of
    np.testing.assert_allclose(passed, ESTIMATORS[name](KEY, interacting(0.7, 1), q), rtol=1e-5, atol=5e-7)


@pytest.mark.whole
@quick
def test_f_may_be_a_module_of_flax():
    """The gradient reaches the parameters of the module and of the encoder that made the logits."""
    from flax import nnx  # which the quick tier does not install

    encoder, decoder = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))
    x = jnp.arange(6.0).reshape(2, 3) / 5

    def loss(modules, key):
        encoder, decoder = modules
        q = es.Bernoulli(encoder(x))
        return jnp.sum(es.disarm(key, lambda b: decoder(b)[..., 0] ** 2, q))

    def by_hand(modules):
        encoder, decoder = modules
        return jnp.sum(es.exact(lambda b: decoder(b)[..., 0] ** 2, es.Bernoulli(encoder(x))))

    gradient = nnx.jit(nnx.grad(loss))
    found = [jax.tree.leaves(gradient((encoder, decoder), key)) for key in jax.random.split(KEY, 1000)]
    exact = jax.tree.leaves(nnx.grad(by_hand)((encoder, decoder)))
    for leaves, expected in zip(zip(*found, strict=True), exact, strict=True):
        leaves = np.stack(leaves)
        error = leaves.std(0) / len(leaves) ** 0.5
        assert (np.abs(leaves.mean(0) - expected) < 4.8 * error + 1e-6).all()


@pytest.mark.few(2)
@quick
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_extreme_logits_have_finite_gradients(name, family, dtype):
    cls, logits = FAMILIES[family]
    pattern = np.resize([1e4, -1e4, 0.0, -np.inf, 3.0], logits.shape)

    def total(logits, key):
        q = cls(logits)
        assert q.sample(key).dtype == dtype
        f = lambda b: interacting(0.1, q.event_ndims)(b.astype(jnp.float32))
        estimator = es.rebar if name == "relax" else ESTIMATORS[name]  # tanh of -inf is the network's matter
        return jnp.sum(estimator(key, f, q))

    slopes = jax.jit(jax.vmap(jax.grad(total), (None, 0)))(
        jnp.asarray(pattern, dtype), jax.random.split(KEY, 50)
    )
    assert slopes.dtype == dtype
    assert jnp.isfinite(slopes).all()
    assert (np.asarray(slopes, float)[:, np.isneginf(pattern)] == 0).all()


@quick
def test_bad_arguments_are_named():
    q, f = es.Bernoulli(jnp.zeros((2, 3))), lambda b: jnp.sum(b, -1)
    for estimator in (es.reinforce, es.rloo, es.arm, es.disarm, es.arms, es.rebar):
        with pytest.raises(ValueError, match=r"f must be a function .* batch shape \(2,\), got .*shape \(\)"):
            estimator(KEY, jnp.sum, q)
        with pytest.raises(ValueError, match="f must be finite for every draw"):
            estimator(KEY, lambda b: jnp.log(jnp.sum(b, -1) - 5), q)
        with pytest.raises(ValueError, match="f must be a function with floating-point values"):
            estimator(KEY, lambda b: jnp.sum(b, -1).astype(int), q)
        with pytest.raises(ValueError, match="key must be one JAX random key"):
            estimator(0, f, q)
    for bad in (jnp.zeros((2, 0)), jnp.zeros((2, 3), int), jnp.full(3, jnp.nan)):
        with pytest.raises(ValueError, match="logits must be"):
            es.Bernoulli(bad)
    with pytest.raises(ValueError, match="event_ndims must be an integer in"):
        es.Bernoulli(jnp.zeros(3), event_ndims=2)
    with pytest.raises(ValueError, match="event_ndims must be an integer in"):
        es.OneHotCategorical(jnp.zeros((2, 3)), event_ndims=0)
    with pytest.raises(ValueError, match="logits must be above -inf"):
        es.OneHotCategorical(jnp.full((2, 3), -jnp.inf))
    with pytest.raises(ValueError, match="q must be Bernoulli; for classes use arms, got OneHotCategorical"):
        es.disarm(KEY, f, es.OneHotCategorical(jnp.zeros((2, 3))))
    with pytest.raises(ValueError, match="num_samples must be an integer in"):
        es.rloo(KEY, f, q, num_samples=1)
    with pytest.raises(ValueError, match="num_samples must be an integer in"):
        es.arms(KEY, f, q, num_samples=1)
    one = es.OneHotCategorical(jnp.zeros((2, 3)), 1)
    for wrong in (1, 4):
        with pytest.raises(ValueError, match=r"num_samples must be an integer in \[2, 3\]"):
            es.unordered_set(KEY, f, one, num_samples=wrong)
    for several in (q, es.OneHotCategorical(jnp.zeros((2, 3)))):
        with pytest.raises(ValueError, match="q must be OneHotCategorical of one variable for each f"):
            es.unordered_set(KEY, f, several)
    with pytest.raises(ValueError, match=r"values must be of the shape of log_prob, .*, got shapes \(2,\)"):
        es.from_set(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="log_prob must be logarithms of probabilities"):
        es.from_set(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(ValueError, match="tau must be positive"):
        es.rebar(KEY, f, q, tau=0.0)
    with pytest.raises(ValueError, match="eta must be a scalar"):
        es.rebar(KEY, f, q, eta=jnp.ones(2))
    with pytest.raises(ValueError, match="control_variate must be a function"):
        es.relax(KEY, f, q, control_variate=jnp.sum)
    with pytest.raises(ValueError, match="baseline must be of a shape that broadcasts"):
        es.reinforce(KEY, f, q, baseline=jnp.zeros(3))
    with pytest.raises(ValueError, match="at most 1048576 outcomes, got 2097152"):
        es.exact(lambda b: jnp.sum(b), es.Bernoulli(jnp.zeros(21)))
    with pytest.raises(ValueError, match="loss must be a function to a scalar"):
        es.value_and_grads(lambda p, v: p, jnp.zeros(2), 0.0)
