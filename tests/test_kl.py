"""The KL rules compared with Monte Carlo and enumeration, and the Laplace Bridge on distributions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special as sp
from numpyro.distributions import kl_divergence

from helpers import KEY
from relaxit_jax import distributions as rd
from relaxit_jax.laplace_bridge import dirichlet_to_gaussian

pytestmark = pytest.mark.usefixtures("fast_compilation")

LOC = np.float32([[0.5, -1.0, 1.2], [0.0, 2.0, -0.5]])
SCALE = np.float32([[0.6, 1.1, 0.8], [0.9, 0.5, 1.3]])
OTHER = np.float32([0.3, 0.1, -0.4])
FACTOR = np.float32([[0.9, 0, 0], [0.4, 0.7, 0], [-0.3, 0.2, 0.5]])
FACTORS = np.stack([FACTOR, FACTOR[::-1, ::-1].T])
ALPHA = np.float32([[0.6, 2.0, 9.0], [5.0, 1.5, 0.9]])
LOGITS = np.float32([[-1.2], [0.7]])
OTHER_LOGITS = np.float32([0.3, -0.5, 2.0])
SAME_TAU = np.full((4, 1, 1), np.float32(0.3))  # of the other one, with a batch of its own

diagonal = rd.LogisticNormalSoftmax(loc=LOC, scale=SCALE)
full = rd.LogisticNormalSoftmax(loc=LOC, scale_tril=FACTORS)
other_diagonal = rd.LogisticNormalSoftmax(loc=OTHER, scale=0.9)
other_full = rd.LogisticNormalSoftmax(loc=OTHER[None, None], scale_tril=FACTOR)
gaussian = rd.InvertibleGaussian(loc=LOC, scale=SCALE, tau=0.7, delta=0.6)
other_gaussian = rd.InvertibleGaussian(loc=OTHER, scale=0.8, tau=jnp.full((3, 1), 0.7), delta=0.6)
CONTINUOUS = {
    "invertible gaussians": (gaussian, other_gaussian),
    "diagonal, diagonal": (diagonal, other_diagonal),
    "full, full": (full, other_full),
    "diagonal, full": (diagonal, other_full),
    "full, diagonal": (full, other_diagonal),
    "full, one of many": (other_full, full),
    "dirichlet, diagonal": (
        dist.Dirichlet(ALPHA), rd.LogisticNormalSoftmax(loc=OTHER, scale=np.ones((3, 1, 3)) * 0.8)
    ),
    "dirichlet, full": (dist.Dirichlet(ALPHA[:, None]), full),
    "concretes": (
        rd.RelaxedBernoulli(logits=LOGITS, tau=0.3), rd.RelaxedBernoulli(logits=OTHER_LOGITS, tau=SAME_TAU)
    ),
    "concretes of two temperatures": (
        rd.RelaxedBernoulli(logits=LOGITS, tau=0.3),
        rd.RelaxedBernoulli(logits=OTHER_LOGITS, tau=np.float32([[[0.1]], [[2.0]]])),
    ),
    "invertible gaussians of two temperatures": (
        gaussian, rd.InvertibleGaussian(loc=OTHER, scale=0.8, tau=jnp.float32([[0.4], [0.7]]), delta=1.5)
    ),
    "hard concretes": (
        rd.HardConcrete(logits=LOGITS, tau=0.6),
        rd.HardConcrete(logits=OTHER_LOGITS, tau=np.float32([[[0.6]], [[1.3]]])),
    ),
    "gaussian gates": (
        rd.GaussianRelaxedBernoulli(loc=LOGITS, scale=0.6),
        rd.GaussianRelaxedBernoulli(loc=OTHER_LOGITS, scale=np.float32([[[0.6]], [[1.3]]])),
    ),
}  # fmt: skip


compiled_kl = jax.jit(lambda p, q: kl_divergence(p, q))


def batch_of(p, q):
    return jnp.broadcast_shapes(p.batch_shape, q.batch_shape)


@pytest.mark.few(1, "diagonal, diagonal", "concretes of two")
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_rules(name):
    """E [log p - log q] over draws of p, to four standard errors of the mean; zero of p and itself."""
    p, q = CONTINUOUS[name]
    n = 6000

    @jax.jit
    def compiled(p, q):
        wide = p.expand(batch_of(p, q))
        z, unrounded = wide.sample_with_intermediates(KEY, (n,))
        log_q = q.log_prob(z, unrounded) if unrounded else q.log_prob(z)
        itself = kl_divergence(p, p) if type(p) is type(q) else 0
        return kl_divergence(p, q), wide.log_prob(z, unrounded or None) - log_q, itself

    kl, terms, itself = compiled(p, q)
    terms = np.asarray(terms, float)
    assert kl.shape == batch_of(p, q)
    assert (np.abs(terms.mean(0) - kl) < 4 * terms.std(0) / np.sqrt(n)).all()
    np.testing.assert_allclose(itself, 0, atol=2e-6)


def bits(logits, kind):
    """Every class that (nearly) stands for a bit with these log-odds; tau has another batch."""
    tau = jnp.full((4, 1, 1), 0.5)
    return {
        "RelaxedBernoulli": lambda: rd.RelaxedBernoulli(logits=logits, tau=tau),
        "HardConcrete": lambda: rd.HardConcrete(logits=logits, tau=tau),
        "GaussianRelaxedBernoulli": lambda: rd.GaussianRelaxedBernoulli(loc=0.5 + 0.4 * logits, scale=0.8),
        "StraightThroughBernoulli": lambda: rd.StraightThroughBernoulli(logits=logits),
        "StraightThroughRelaxedBernoulli": lambda: rd.StraightThroughRelaxedBernoulli(logits=logits, tau=tau),
        "BernoulliProbs": lambda: dist.BernoulliProbs(sp.expit(logits)),
        "BernoulliLogits": lambda: dist.BernoulliLogits(logits),
    }[kind]()


def probability_of_one(logits, kind):
    logits = logits.astype(float)
    return sp.ndtr(0.5 * logits) if kind == "GaussianRelaxedBernoulli" else sp.expit(logits)


EXACT = ["BernoulliProbs", "BernoulliLogits", "StraightThroughBernoulli", "StraightThroughRelaxedBernoulli"]
RELAXED = ["RelaxedBernoulli", "HardConcrete", "GaussianRelaxedBernoulli"]
PAIRS = [(p, q) for p, q in itertools.product(EXACT + RELAXED, EXACT) if "S" in (p + q) or p in RELAXED]


@pytest.mark.few(4)
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_rules_of_bits(p, q):
    """By enumeration, with broadcast batches, also in the temperature; also for an uneven gate."""
    one, other = bits(LOGITS, p), bits(OTHER_LOGITS, q)
    a, b = probability_of_one(LOGITS, p), probability_of_one(OTHER_LOGITS, q)
    exact = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
    kl = compiled_kl(one, other)
    assert kl.shape == batch_of(one, other)
    np.testing.assert_allclose(kl, np.broadcast_to(exact, kl.shape), rtol=2e-5, atol=1e-6)


def test_a_gate_stands_for_the_bit_that_it_is_at_least_a_half():
    for d in (
        rd.HardConcrete(logits=LOGITS[:, 0], tau=0.4, stretch=(-0.5, 1.1)),
        rd.GaussianRelaxedBernoulli(loc=LOGITS[:, 0], scale=SCALE[:, 0]),
    ):
        np.testing.assert_allclose(d.probs, 1 - d.cdf(0.5), rtol=1e-5, atol=1e-7)


CLASSES = {
    "OneHotCategorical": lambda logits: rd.OneHotCategorical(logits=logits),
    "StraightThroughGumbelSoftmax": lambda x: rd.StraightThroughGumbelSoftmax(
        logits=x, tau=jnp.full((4, 1), 0.5)
    ),
    "GumbelSoftmax": lambda logits: rd.GumbelSoftmax(logits=logits, tau=jnp.full((4, 1), 0.5)),
}


@pytest.mark.parametrize(("p", "q"), list(itertools.product(CLASSES, list(CLASSES)[:2])))
def test_rules_of_classes(p, q):
    logits, others = np.stack([LOC, LOC[::-1]])[:, 0], OTHER
    one, other = CLASSES[p](logits), CLASSES[q](others)
    log_a, log_b = sp.log_softmax(logits.astype(float), -1), sp.log_softmax(others.astype(float), -1)
    kl = compiled_kl(one, other)
    assert kl.shape == batch_of(one, other)
    exact = (np.exp(log_a) * (log_a - log_b)).sum(-1)
    np.testing.assert_allclose(kl, np.broadcast_to(exact, kl.shape), rtol=2e-5, atol=1e-6)


@pytest.mark.whole
def test_impossible_and_certain_outcomes():
    """0 log 0 is 0, a possible outcome that q excludes is infinite, and no gradient is NaN."""
    inf = np.inf
    p = jnp.float32([[0.3, -inf, 0.0], [0.3, 0.1, 0.0]])
    q = jnp.float32([0.1, -inf, 0.7])
    kl = lambda p, q: kl_divergence(rd.GumbelSoftmax(logits=p, tau=0.5), rd.OneHotCategorical(logits=q))
    kept = kl_divergence(rd.OneHotCategorical(logits=p[0, ::2]), rd.OneHotCategorical(logits=q[::2]))
    np.testing.assert_allclose(kl(p, q), [kept, inf], rtol=1e-5)
    bit = lambda p, q: kl_divergence(
        rd.StraightThroughBernoulli(logits=p), rd.StraightThroughBernoulli(logits=q)
    )
    np.testing.assert_array_equal(
        bit(jnp.float32([inf, -inf, inf]), jnp.float32([inf, -inf, -inf])), [0, 0, inf]
    )
    np.testing.assert_allclose(
        bit(jnp.float32([-inf, inf]), jnp.float32([1, 1])), np.log1p(np.exp([1, -1])), rtol=1e-5
    )
    gates = lambda p, q: kl_divergence(
        rd.RelaxedBernoulli(logits=p, tau=0.5), rd.RelaxedBernoulli(logits=q, tau=0.5)
    )

    @jax.jit
    def gradients():
        ends = jnp.float32([inf, -inf, -inf]), jnp.float32([inf, -inf, 1])
        far = jnp.float32([inf, 3, 1e4]), jnp.float32([inf, 3, -1e4])
        of_classes = jax.grad(kl, (0, 1))(p[0], q), jax.grad(kl)(p[0], p[1])
        return of_classes, jax.vmap(jax.grad(bit, (0, 1)))(*ends), jax.vmap(jax.grad(gates))(*far)

    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients()))
    probs = dist.BernoulliProbs(jnp.float32([0, 1, 0.5]))
    np.testing.assert_array_equal(kl_divergence(rd.StraightThroughBernoulli(probs=probs.probs), probs), 0)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_gradients_are_the_derivatives(name):
    """Every parameter of both is checked by central differences in float64."""
    with jax.enable_x64(True):
        pair = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, float)), CONTINUOUS[name])
        leaves, tree = jax.tree.flatten(pair)
        ways = [np.cos(1.0 + np.arange(x.size)).reshape(x.shape) for x in leaves]
        for d in pair:
            for i, x in enumerate(leaves):
                if x is getattr(d, "scale_tril", None):
                    ways[i] = np.tril(ways[i])

        @jax.jit
        def slopes(leaves):
            kl = lambda leaves: jnp.sum(kl_divergence(*jax.tree.unflatten(tree, leaves)))
            at = lambda h: kl([x + h * way for x, way in zip(leaves, ways, strict=True)])
            up, down = jax.vmap(at)(jnp.array([1e-6, -1e-6]))
            gradients = jax.grad(kl)(leaves)
            return (up - down) / 2e-6, sum(map(jnp.vdot, gradients, ways)), gradients

        difference, slope, gradients = slopes(leaves)
        np.testing.assert_allclose(difference, slope, rtol=1e-6)
        assert slope != 0 and all(jnp.isfinite(g).all() for g in gradients)


@pytest.mark.whole
def test_near_concretes_in_float32():
    """d coth(d / 2) - 2 is a difference that cancels for near logits, and overflows for far ones."""
    shifts = np.float64([0, 1e-6, 1e-3, 0.03, 0.1, 0.49, 0.51, 1, 5, 50, 2e4])
    a, b = np.float32(shifts / 2), np.float32(-shifts / 2)
    kl = lambda a, b: kl_divergence(
        rd.RelaxedBernoulli(logits=a, tau=0.5), rd.RelaxedBernoulli(logits=b, tau=0.5)
    )
    d = a.astype(float) - b
    series = d**2 / 6 - d**4 / 360 + d**6 / 15120
    safe = np.where(d == 0, 1, d)
    exact = np.where(d < 0.1, series, safe / np.tanh(safe / 2) - 2)
    np.testing.assert_allclose(jax.jit(kl)(a, b), exact, rtol=2e-5)
    np.testing.assert_array_equal(kl(jnp.float32([np.inf, -np.inf]), jnp.float32([np.inf, -np.inf])), 0)
    np.testing.assert_allclose(jax.grad(jax.grad(kl))(0.3, 0.3), 1 / 3, rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [rd.RelaxedBernoulli, rd.HardConcrete])
def test_the_closed_form_of_constant_temperatures_is_the_quadrature_of_traced_ones(kind):
    """They agree to the digits of float64 and of float32, from equal logits to far ones."""
    logits = [-8.0, -1.0, -1.0, 0.3, 2.0, 5.0], [7.0, -1.0, -1.001, 2.0, -0.5, 5.5]

    def kl(tau, other_tau=0.6):
        a, b = map(jnp.asarray, logits)
        return kl_divergence(kind(logits=a, tau=tau), kind(logits=b, tau=other_tau))

    for wide, tolerance in ((True, 1e-9), (False, 2e-6)):
        with jax.enable_x64(wide):
            closed, traced = jax.jit(lambda: kl(0.6))(), jax.jit(kl)(0.6)
            np.testing.assert_allclose(traced, closed, rtol=tolerance, atol=tolerance)


def test_counts_and_what_has_no_closed_form():
    """The KL of two lists of values, matched by value; an error where there is no formula."""
    p, q = np.float32([0.2, 0.5, 0.3]), np.float32([0.1, 0.6, 0.3])
    count = lambda probs, values, hard=True: rd.GeneralizedGumbelSoftmax(
        probs=probs, values=jnp.float32(values), tau=0.5, hard=hard
    )
    expected = np.sum(p * np.log(p / q))
    for same in (count(q, [0, 1, 3]), count(q[::-1], [3, 1, 0])):
        for kl in (kl_divergence, compiled_kl):
            np.testing.assert_allclose(kl(count(p, [0, 1, 3]), same), expected, rtol=1e-5)
    assert kl_divergence(count(p, [0, 1, 3]), count(q, [0, 1, 2])) == np.inf
    stretched = lambda low: rd.HardConcrete(logits=0.0, tau=0.5, stretch=(low, 1.1))
    logits = {"logits": jnp.zeros(3)}
    for pair in (
        (count(p, [0, 1, 3], hard=False), count(q, [0, 1, 3])),
        (stretched(-0.1), stretched(-0.2)),
        (rd.OneHotCategorical(**logits), rd.GumbelSoftmax(**logits, tau=0.5)),
    ):
        with pytest.raises(NotImplementedError):
            kl_divergence(*pair)


@pytest.mark.whole
def test_softmax_does_not_see_the_all_ones_direction():
    """A shift of all means, and noise common to all logits, change no KL; a singular Sigma is allowed."""
    moved = rd.LogisticNormalSoftmax(
        loc=LOC + 3, scale_tril=jnp.linalg.cholesky(full.covariance_matrix + 2.0)
    )
    close = lambda p, q, r: np.testing.assert_allclose(compiled_kl(p, q), compiled_kl(p, r), rtol=2e-4)
    for p in (diagonal, other_full, dist.Dirichlet(ALPHA)):
        close(p, full, moved)
    np.testing.assert_allclose(
        kl_divergence(moved, other_diagonal), kl_divergence(full, other_diagonal), rtol=2e-4
    )
    as_full = rd.LogisticNormalSoftmax(loc=LOC, scale_tril=SCALE[..., None] * np.eye(3, dtype=np.float32))
    for p in (full, other_diagonal, dist.Dirichlet(ALPHA)):
        close(p, diagonal, as_full)
    singular = rd.LogisticNormalSoftmax(
        loc=LOC, scale_tril=(np.eye(3) - 1 / 3).astype(np.float32), validate_args=False
    )
    regular = rd.LogisticNormalSoftmax(loc=LOC, scale=1.0)  # the same on the simplex
    close(full, singular, regular)


WRAPPED = {
    "expanded": lambda d: d.expand((5, 2)),
    "independent": lambda d: d.to_event(1),
    "masked": lambda d: d.mask(np.array([True, False])),
    "all": lambda d: d.expand((5, 2)).mask(np.array([True, False])),
}


@pytest.mark.whole
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_through_the_wrappers(wrapper):
    logits, tau, wrap = jnp.float32([-1, 2]), jnp.float32([0.5, 0.7]), WRAPPED[wrapper]
    bit = rd.StraightThroughRelaxedBernoulli
    for p, q in (
        (full, other_diagonal.expand((2,))),
        (dist.Dirichlet(ALPHA), diagonal),
        # of two elements by tau alone, which exact bits and classes do not count
        (bit(logits=0.3, tau=tau), dist.BernoulliLogits(logits)),
        (bit(logits=0.3, tau=tau), bit(logits=0.1, tau=tau)),
        (rd.GumbelSoftmax(logits=LOC[0], tau=tau), rd.StraightThroughGumbelSoftmax(logits=OTHER, tau=tau)),
        (rd.RelaxedBernoulli(logits=logits, tau=0.5), rd.RelaxedBernoulli(logits=0.2, tau=0.5).expand((2,))),
    ):  # fmt: skip
        kl = np.asarray(kl_divergence(p, q))
        assert kl.shape == (2,)
        expected = {
            "expanded": np.tile(kl, (5, 1)), "independent": kl.sum(), "masked": kl * [1, 0],
            "all": np.tile(kl * [1, 0], (5, 1)),
        }[wrapper]  # fmt: skip
        np.testing.assert_allclose(kl_divergence(wrap(p), wrap(q)), expected, rtol=1e-5)


@pytest.mark.whole
def test_half_precision():
    """Parameters may have any dtype; the KL is computed in float32."""
    for name in ("invertible gaussians", "diagonal, full", "dirichlet, full", "concretes"):
        pair = CONTINUOUS[name]
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), pair)
        seen = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        assert compiled_kl(*half).dtype == jnp.float32
        np.testing.assert_allclose(compiled_kl(*half), compiled_kl(*seen), rtol=1e-5, atol=1e-6)


# --- the Laplace Bridge -----------------------------------------------------------------------


to_logistic_normal, to_dirichlet = jax.jit(rd.to_logistic_normal), jax.jit(rd.to_dirichlet)


@pytest.mark.few(1)
@pytest.mark.parametrize("batch", [(), (4, 2)])
def test_bridge_of_distributions(batch):
    """Its Gaussian after projection agrees with the arrays, and the way back is exact."""
    alpha = np.broadcast_to(ALPHA if batch else ALPHA[0], (*batch, 3))
    dirichlet = dist.Dirichlet(alpha)
    there = to_logistic_normal(dirichlet)
    assert isinstance(there, rd.LogisticNormalSoftmax) and there.get_args().keys() == {"loc", "scale_tril"}
    assert (there.batch_shape, there.event_shape) == (batch, (3,))
    loc, covariance = dirichlet_to_gaussian(jnp.asarray(alpha))
    projection = np.eye(3) - 1 / 3
    assert there.covariance_matrix.shape == (*batch, 3, 3)
    np.testing.assert_allclose(projection @ there.covariance_matrix @ projection, covariance, atol=1e-5)
    np.testing.assert_allclose(there.loc @ projection, loc, atol=1e-5)
    back = to_dirichlet(there)
    assert isinstance(back, dist.Dirichlet) and back.batch_shape == batch
    np.testing.assert_allclose(back.concentration, alpha, rtol=1e-4)
    wide = to_logistic_normal(dirichlet.expand((5, *batch)))
    assert wide.batch_shape == (5, *batch)
    again = to_dirichlet(wide)
    assert again.batch_shape == (5, *batch)
    np.testing.assert_allclose(again.mean, np.broadcast_to(dirichlet.mean, (5, *batch, 3)), rtol=1e-4)


def test_bridge_of_a_diagonal():
    """A diagonal Sigma is projected like any other; batches of its two parameters broadcast."""
    d = rd.LogisticNormalSoftmax(loc=LOC[:, None], scale=SCALE)
    concentration = to_dirichlet(d).concentration
    assert concentration.shape == (2, 2, 3)
    projection = np.eye(3) - 1 / 3
    for i, j in itertools.product(range(2), repeat=2):
        sigma = projection @ np.diag(SCALE[j].astype(float) ** 2) @ projection
        mu = projection @ LOC[i]
        expected = (1 - 2 / 3 + np.exp(mu) * np.exp(-mu).sum() / 9) / sigma.diagonal()
        np.testing.assert_allclose(concentration[i, j], expected, rtol=1e-5)
    assert d.covariance_matrix.shape == (2, 2, 3, 3)
    shared = rd.LogisticNormalSoftmax(loc=LOC, scale_tril=FACTOR)
    assert shared.covariance_matrix.shape == (2, 3, 3)
    np.testing.assert_allclose(shared.covariance_matrix[1], FACTOR @ FACTOR.T, rtol=1e-5)


def test_bridge_in_half_precision_and_its_errors():
    there = to_logistic_normal(dist.Dirichlet(jnp.asarray(ALPHA, jnp.bfloat16)))
    assert there.loc.dtype == there.scale_tril.dtype == jnp.bfloat16
    np.testing.assert_allclose(to_dirichlet(there).concentration.astype(float), ALPHA, rtol=0.1)
    for bad in (dist.Normal(0, 1), full, ALPHA, dist.Dirichlet(ALPHA).to_event(1)):
        with pytest.raises(ValueError, match="dirichlet must be a Dirichlet"):
            rd.to_logistic_normal(bad)
    for bad in (dist.Normal(0, 1), dist.Dirichlet(ALPHA), LOC, full.to_event(1)):
        with pytest.raises(ValueError, match="logistic_normal must be a LogisticNormalSoftmax"):
            rd.to_dirichlet(bad)
