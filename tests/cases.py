"""One entry per method: its arguments, its place, and the known facts about its law.

test_samplers.py and test_densities.py have the laws that every method has to meet; an entry tells them how to
call the method and what else to compare it with. Nothing here is a special case of a test.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special as sp

import relaxit_jax as rj
from laws import (
    above_half,
    bernoulli,
    binary_concrete,
    bit_pairs,
    bits_given_their_sum,
    categorical,
    concrete,
    gaussian_argmax,
    gaussian_bits,
    gaussian_copula,
    gaussian_gate,
    hard_concrete,
    hard_concrete_atoms,
    largest,
    logistic_normal,
    orders,
    pair_index,
    root,
    softmax_plus_plus,
    subsets,
    which_order,
    which_permutation,
    which_set,
    which_value,
)
from relaxit_jax import _random as rng
from relaxit_jax import distributions as rd


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    sampler: Callable
    params: dict  # argument name -> value, batch shape (2,) where an array
    event: tuple = ()  # event shape of a draw
    support: str = (
        "unit"  # unit, simplex, decoupled, gate, bits, atoms, k_hot, order, number, doubly, permutation
    )
    log_prob: Callable | None = None
    formula: Callable | None = None  # (z, **element) -> log_prob as in the paper, in float64 with SciPy
    sample_options: dict = dataclasses.field(default_factory=dict)  # static options, for the sampler alone
    log_space: bool = False
    pick: Callable | None = None  # the array in the result that the laws look at
    # for one element of the batch: the outcomes of the discrete law and their probabilities
    discrete: Callable | None = None
    # which outcome each draw of a discrete law is
    outcome: Callable | None = None
    # and, for a relaxation, the outcome nearest to it: its law at a low temperature
    nearest: Callable | None = None
    # for a draw with another draw's gradient: the other draw, from the same arguments
    soft: Callable | None = None
    atoms: Callable | None = None  # for one element: (P(0), P(1))
    no_gradient: tuple = ()  # differentiable arguments that should have none
    distribution: type | None = None  # the NumPyro class, with the same argument names
    moments: bool = False  # mean and variance have a closed form, as OneHot and exact bits always do

    def draw(self, key, shape=None, **params):
        """The result of the sampler, with this entry's parameters by default."""
        drawn = self.sampler(key, shape=shape, **self.arguments(params))
        return self.pick(drawn) if self.pick else drawn

    def arguments(self, params=()):
        return {**self.params, **self.sample_options, **dict(params)}

    def density(self, value, log_space=False, **params):
        extra = {"log_space": True} if log_space else {}
        return self.log_prob(value, **{**self.params, **params}, **extra)

    def build(self, **params):
        """The distribution, with this entry's parameters by default."""
        return self.distribution(**{**self.params, **self.options, **params})

    @property
    def options(self):
        """The static options of the sampler that the class accepts."""
        taken = inspect.signature(self.distribution).parameters
        return {name: x for name, x in self.sample_options.items() if name in taken}

    def soft_draw(self, key, shape, **params):
        """The draw whose gradient a draw of this entry has."""
        return (self.soft or self.sampler)(key, shape=shape, **{**self.params, **params})

    @property
    def floats(self):
        """The arguments that are arrays."""
        return {name: x for name, x in self.params.items() if name not in self.integers}

    @property
    def batched(self):
        """The same, each with at least the batch shape: one number for every element."""
        return {name: np.full(2, x) if np.ndim(x) == 0 else x for name, x in self.floats.items()}

    @property
    def positive(self):
        """The arguments that have to be positive."""
        return [name for name in self.floats if name in ("scale", "delta", "gap") or name.startswith("tau")]

    @property
    def per_event(self):
        """The arguments with the batch shape in a law whose others have an event axis."""
        axes = {name: np.ndim(x) for name, x in self.batched.items()}
        return [name for name in axes if axes[name] == 1 < max(axes.values())]

    @property
    def integers(self):
        """The arguments that set shapes or loops."""
        return {name: x for name, x in self.params.items() if isinstance(x, int)}

    @property
    def temperatures(self):
        return [name for name in self.params if name.startswith("tau")]

    def element(self, i):
        """The parameters of element i of the batch alone."""
        return {name: x if np.ndim(x) == 0 else x[i] for name, x in self.params.items()}

    def __str__(self):
        return self.name


def f32(*rows):
    return np.array(rows, np.float32)


LOGITS = f32(-1.2, 0.7)
GATES = f32([-1.2, 0.7], [0.3, 2.0])
GAUSSIANS = {
    "loc": f32([0.5, -1.0], [-0.3, 0.4]), "scale": f32([0.6, 1.1], [0.9, 0.5]), "tau": np.float32(0.7),
    "delta": np.float32(0.6),
}  # fmt: skip
CLASSES = f32([0.5, -1.0, 1.2], [0.0, 2.0, -0.5])
ITEMS = f32([0.5, -1.0, 1.2, 0.1], [0.0, 2.0, -0.5, 0.7])
PLACES = f32([[0.5, -1.0, 1.2], [0.1, 0.8, -0.3], [0, 0.4, 0.6]], [[0, 2.0, -0.5], [0.7, 0, 1], [-1, 0.3, 0]])
TAU = np.float32(0.7)
HALVES = f32([[1, 0], [0.6, 0.8]], [[1, 0], [-0.8, 0.6]])  # correlations 0.6 and -0.8
FACTORS = f32([[0.9, 0, 0], [0.4, 0.7, 0], [-0.3, 0.2, 0.5]], [[1, 0, 0], [-1, 1.2, 0], [0, 0.3, 0.6]])


def tempered(key, logits, tau, shape):
    """The probabilities at a temperature, for every element of a batch."""
    return jnp.broadcast_to(jax.nn.softmax(logits / jnp.asarray(tau)[..., None]), (*shape, logits.shape[-1]))


def gapped(key, logits, tau, gap, shape):
    """The softmax behind the gradient of a draw that leads by a gap, as in the paper."""
    draw = rj.gapped_straight_through(key, logits, tau, gap, shape=shape)
    top = jnp.max(logits, -1, keepdims=True)
    m1 = (top - jnp.sum(logits * draw, -1, keepdims=True)) * draw
    m2 = jax.nn.relu(logits + jnp.asarray(gap)[..., None] - top) * (1 - draw)
    return jax.nn.softmax((logits + jax.lax.stop_gradient(m1 - m2)) / jnp.asarray(tau)[..., None])


def second_order(key, logits, tau, shape):
    draw = rj.reinmax(key, logits, tau, shape=shape)
    half = (draw + tempered(key, logits, tau, shape)) / 2
    p1 = jax.nn.softmax(logits + jax.lax.stop_gradient(jnp.log(half) - logits))
    return 2 * p1 - jax.nn.softmax(logits) / 2


def mean_softmax(key, draw, log_p, logits, tau, num_samples):
    """The mean softmax for noise under which log_p + G is largest where the draw is one."""

    def one(key):
        _, perturbed = rng.conditional_gumbel(key, log_p, draw > 0)
        noise = jax.lax.stop_gradient(perturbed - logits)
        return jax.nn.softmax((logits + noise) / jnp.asarray(tau)[..., None])

    return jnp.mean(jax.vmap(one)(jax.random.split(jax.random.split(key)[1], num_samples)), 0)


def rao_blackwellised(key, logits, tau, num_samples, shape):
    draw = rj.gumbel_rao(key, logits, tau, num_samples, shape=shape)
    log_p = jnp.broadcast_to(jax.nn.log_softmax(logits), draw.shape)
    return mean_softmax(key, draw, log_p, logits, tau, num_samples)


def rao_blackwellised_second_order(key, logits, tau, num_samples, shape):
    draw = rj.reinmax_rao(key, logits, tau, num_samples, shape=shape)
    p0 = jax.nn.softmax(logits)
    theta, tau = jax.lax.stop_gradient((jnp.log((draw + p0) / 2), tau))
    return 2 * mean_softmax(key, draw, theta, logits, tau, num_samples) - p0 / 2


ORDER = Case(
    "gumbel_top_k", rj.gumbel_top_k, {"logits": ITEMS, "k": 2}, (2,), "order",
    pick=lambda draw: draw[1],
)  # fmt: skip

ONE_HOT = Case(
    "one_hot", None, {"logits": CLASSES, "tau": TAU}, (3,), "k_hot", discrete=categorical, outcome=largest,
)  # fmt: skip

DECOUPLED = dataclasses.replace(
    ONE_HOT, name="decoupled_gumbel_softmax", sampler=rj.decoupled_gumbel_softmax,
    params={"logits": CLASSES, "tau_forward": np.float32(0.4), "tau_backward": TAU},
    no_gradient=("tau_forward",),
    soft=lambda key, logits, tau_forward, tau_backward, shape:
        rj.gumbel_softmax(key, logits, tau_backward, shape=shape),
    distribution=rd.DecoupledStraightThroughGumbelSoftmax,
)  # fmt: skip

COUNT = Case(
    "generalized_gumbel_softmax", rj.generalized_gumbel_softmax,
    {"logits": CLASSES, "values": f32([0.0, 1.0, 3.0], [0.0, 1.0, 3.0]), "tau": TAU}, (), "number",
    discrete=categorical, nearest=which_value,
    distribution=rd.GeneralizedGumbelSoftmax, moments=True,
)  # fmt: skip

MATCHING = Case(
    "gumbel_sinkhorn", rj.gumbel_sinkhorn, {"logits": PLACES, "tau": TAU, "num_iters": 50}, (3, 3), "doubly",
    distribution=rd.GumbelSinkhorn,
)  # fmt: skip

ALL_PLACES = Case(
    "relaxed_permutation", rj.relaxed_permutation, {"logits": CLASSES, "tau": TAU}, (3, 3),
    "permutation_soft",
    discrete=lambda logits, **_: orders(logits, 3), nearest=which_permutation,
    distribution=rd.RelaxedPermutation,
)  # fmt: skip

CASES = [
    Case(
        "relaxed_bernoulli", rj.relaxed_bernoulli, {"logits": LOGITS, "tau": TAU},
        log_prob=rj.relaxed_bernoulli_log_prob, log_space=True, formula=binary_concrete,
        discrete=bernoulli, nearest=above_half,
        distribution=rd.RelaxedBernoulli,
    ),
    Case(
        "relaxed_bernoulli_hard", rj.relaxed_bernoulli, {"logits": LOGITS, "tau": TAU}, (), "bits",
        sample_options={"hard": True}, discrete=bernoulli, outcome=above_half,
        distribution=rd.StraightThroughRelaxedBernoulli,
    ),
    Case(
        "gaussian_bernoulli", rj.gaussian_bernoulli,
        {"loc": f32(0.3, 0.8), "scale": f32(0.4, 0.7)}, (), "gate",
        log_prob=rj.gaussian_bernoulli_log_prob, formula=gaussian_gate,
        atoms=lambda loc, scale: (sp.ndtr(-loc / scale), sp.ndtr((loc - 1) / scale)),
        distribution=rd.GaussianRelaxedBernoulli, moments=True,
    ),
    Case(
        "gaussian_bernoulli_hard", rj.gaussian_bernoulli,
        {"loc": f32(0.3, 0.8), "scale": f32(0.4, 0.7)}, (), "bits",
        sample_options={"hard": True}, discrete=gaussian_bits, outcome=above_half,
    ),
    Case(
        "hard_concrete", rj.hard_concrete, {"logits": LOGITS, "tau": TAU}, (), "gate",
        log_prob=rj.hard_concrete_log_prob, log_space=True, formula=hard_concrete, atoms=hard_concrete_atoms,
        discrete=bernoulli, nearest=above_half,
        distribution=rd.HardConcrete,
    ),
    Case(
        "hard_concrete_hard", rj.hard_concrete, {"logits": LOGITS, "tau": TAU}, (), "bits",
        sample_options={"hard": True}, discrete=bernoulli, outcome=above_half,
    ),
    Case(
        "straight_through_bernoulli", rj.straight_through_bernoulli, {"logits": LOGITS}, (), "bits",
        log_prob=rj.straight_through_bernoulli_log_prob, discrete=bernoulli, outcome=above_half,
        formula=lambda z, logits: np.log(bernoulli(logits))[z.astype(int)],
        soft=lambda key, logits, shape: jnp.broadcast_to(jax.nn.sigmoid(logits), shape),
        distribution=rd.StraightThroughBernoulli,
    ),
    Case(
        "stochastic_times_smooth", rj.stochastic_times_smooth, {"logits": LOGITS}, (), "atoms",
        log_prob=rj.stochastic_times_smooth_log_prob,
        formula=lambda z, logits: np.log(root(logits))[(z > 0).astype(int)],
        discrete=root, outcome=lambda draws: (np.asarray(draws, np.float64) > 0).astype(int),
        distribution=rd.StochasticTimesSmooth, moments=True,
    ),
    Case(
        "correlated_bernoulli", rj.correlated_bernoulli,
        {"logits": GATES, "tau": TAU, "scale_tril": HALVES}, (2,),
        log_prob=rj.correlated_bernoulli_log_prob, log_space=True, formula=gaussian_copula,
        discrete=bit_pairs, nearest=pair_index,
        distribution=rd.CorrelatedRelaxedBernoulli,
    ),
    Case(
        "correlated_bernoulli_hard", rj.correlated_bernoulli,
        {"logits": GATES, "tau": TAU, "scale_tril": HALVES}, (2,), "bits",
        sample_options={"hard": True}, discrete=bit_pairs, outcome=pair_index,
    ),
    Case(
        "gumbel_softmax", rj.gumbel_softmax, {"logits": CLASSES, "tau": TAU}, (3,), "simplex",
        log_prob=rj.gumbel_softmax_log_prob, log_space=True, formula=concrete,
        discrete=categorical, nearest=largest,
        distribution=rd.GumbelSoftmax,
    ),
    Case(
        "gumbel_softmax_hard", rj.gumbel_softmax, {"logits": CLASSES, "tau": TAU}, (3,), "k_hot",
        sample_options={"hard": True}, discrete=categorical, outcome=largest,
        distribution=rd.StraightThroughGumbelSoftmax,
    ),
    dataclasses.replace(
        ONE_HOT, name="straight_through_categorical", sampler=rj.straight_through_categorical,
        log_prob=lambda value, logits, **_: rj.straight_through_categorical_log_prob(value, logits),
        formula=lambda z, logits, tau: z @ sp.log_softmax(logits),
        soft=tempered,
        distribution=rd.StraightThroughCategorical,
    ),
    DECOUPLED,
    dataclasses.replace(
        DECOUPLED, name="decoupled_gumbel_softmax_soft", support="decoupled", sample_options={"hard": False},
        discrete=None, outcome=None, distribution=None,
    ),
    dataclasses.replace(
        ONE_HOT, name="gapped_straight_through", sampler=rj.gapped_straight_through,
        params=ONE_HOT.params | {"gap": np.float32(0.6)}, no_gradient=("gap",), soft=gapped,
        distribution=rd.GappedStraightThrough,
    ),
    dataclasses.replace(
        ONE_HOT, name="reinmax", sampler=rj.reinmax, no_gradient=("tau",), soft=second_order,
        distribution=rd.ReinMax,
    ),
    dataclasses.replace(
        ONE_HOT, name="gumbel_rao", sampler=rj.gumbel_rao,
        params=ONE_HOT.params | {"num_samples": 3}, soft=rao_blackwellised, distribution=rd.GumbelRao,
    ),
    dataclasses.replace(
        ONE_HOT, name="reinmax_rao", sampler=rj.reinmax_rao,
        params=ONE_HOT.params | {"num_samples": 3}, no_gradient=("tau",),
        soft=rao_blackwellised_second_order, distribution=rd.ReinMaxRao,
    ),
    Case(
        "invertible_gaussian", rj.invertible_gaussian, GAUSSIANS, (3,), "simplex",
        log_prob=rj.invertible_gaussian_log_prob, log_space=True, formula=softmax_plus_plus,
        discrete=gaussian_argmax, nearest=largest,
        distribution=rd.InvertibleGaussian,
    ),
    Case(
        "invertible_gaussian_hard", rj.invertible_gaussian, GAUSSIANS, (3,), "k_hot",
        sample_options={"hard": True}, discrete=gaussian_argmax, outcome=largest,
    ),
    Case(
        "logistic_normal", rj.logistic_normal,
        {"loc": CLASSES, "scale": f32([0.6, 1.1, 0.8], [0.9, 0.5, 1.3])}, (3,), "simplex",
        log_prob=rj.logistic_normal_log_prob, log_space=True, formula=logistic_normal,
        distribution=rd.LogisticNormalSoftmax,
    ),
    Case(
        "logistic_normal_full", rj.logistic_normal, {"loc": CLASSES, "scale_tril": FACTORS}, (3,),
        "simplex", log_prob=rj.logistic_normal_log_prob, log_space=True, formula=logistic_normal,
        distribution=rd.LogisticNormalSoftmax,
    ),
    COUNT,
    dataclasses.replace(
        COUNT, name="generalized_gumbel_softmax_hard", support="exact_number", sample_options={"hard": True},
        outcome=which_value, nearest=None,
    ),
    ORDER,
    dataclasses.replace(
        ORDER, name="gumbel_top_k_ordered", pick=lambda draw: draw[0], no_gradient=("logits",),
        log_prob=lambda value, logits, k: rj.gumbel_top_k_log_prob(value, logits),
        formula=lambda z, logits, k: np.log(orders(logits, k))[which_order(z)],
        discrete=orders, outcome=which_order,
    ),
    Case(
        "relaxed_top_k", rj.relaxed_top_k, {"logits": ITEMS, "k": 2, "tau": TAU}, (4,), "k_hot_soft",
        discrete=subsets, nearest=which_set,
        distribution=rd.GumbelSoftmaxTopK,
    ),
    Case(
        "relaxed_top_k_hard", rj.relaxed_top_k, {"logits": ITEMS, "k": 2, "tau": TAU}, (4,), "k_hot",
        sample_options={"hard": True}, discrete=subsets, outcome=which_set,
        distribution=rd.GumbelSoftmaxTopK,
    ),
    Case(
        "simple_top_k", rj.simple_top_k, {"logits": ITEMS, "k": 2}, (4,), "k_hot",
        log_prob=rj.simple_top_k_log_prob, discrete=bits_given_their_sum, outcome=which_set,
        formula=lambda z, logits, k: np.log(bits_given_their_sum(logits, k))[which_set(z)],
        soft=lambda key, logits, k, shape:
            jnp.broadcast_to(rj.simple_top_k_marginals(logits, k), (*shape, logits.shape[-1])),
        distribution=rd.SimpleTopK, moments=True,
    ),
    ALL_PLACES,
    dataclasses.replace(
        ALL_PLACES, name="relaxed_permutation_hard", support="permutation", sample_options={"hard": True},
        log_prob=lambda value, logits, **_: rj.relaxed_permutation_log_prob(value, logits),
        formula=lambda z, logits, tau: np.log(orders(logits, 3))[which_permutation(z)],
        nearest=None, outcome=which_permutation,
    ),
    MATCHING,  # hard draws are in test_permutation.py: an assignment takes long to compile
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

# Everything with a class: the entries above, a class without a sampler, and a static option with another
# value.
DISTRIBUTIONS = [
    *(case for case in CASES if case.distribution),
    dataclasses.replace(
        BY_NAME["gumbel_softmax_hard"], name="one_hot_categorical", params={"logits": CLASSES},
        sampler=lambda key, logits, shape, hard: rj.gumbel_softmax(key, logits, 1.0, shape=shape, hard=hard),
        distribution=rd.OneHotCategorical,
    ),
    dataclasses.replace(
        BY_NAME["hard_concrete"], name="hard_concrete_uneven", sample_options={"stretch": (-0.3, 1.1)},
        log_prob=functools.partial(rj.hard_concrete_log_prob, stretch=(-0.3, 1.1)),
        discrete=None, nearest=None, atoms=None,
    ),
]  # fmt: skip


def cases(*conditions):
    """The entries a law applies to, as the arguments of pytest's parametrize."""
    return [case for case in CASES if all(condition(case) for condition in conditions)]


def has_density(case):
    return case.log_prob is not None and case.support in ("unit", "simplex", "gate")


def has_log_prob(case):
    return case.log_prob is not None


def has_log_space(case):
    return case.log_space


def is_discrete(case):
    return case.outcome is not None


def has_discrete_limit(case):
    return case.nearest is not None


def has_logits(case):
    return "logits" in case.params


def has_classes(case):
    """Whether the logits belong to classes: logits of bits have no class axis, or come with a factor."""
    return has_logits(case) and case.params["logits"].ndim > 1 and "scale_tril" not in case.params


def has_an_impossible_class(case):
    """Every item of a permutation has a place."""
    return not case.support.startswith("permutation")


def is_differentiable(case):
    return not set(case.floats) <= set(case.no_gradient)


def has_soft_draw(case):
    return case.soft is not None or case.sample_options.get("hard")


def log_density_coordinates(case, y):
    """Unconstrained coordinates y to the log-space value there and log |dz / dy|."""
    if case.support == "simplex":
        padded = np.concatenate([y, np.zeros((*y.shape[:-1], 1))], -1)
        log_z = sp.log_softmax(padded, -1)
        return jnp.asarray(log_z, jnp.float32), log_z.sum(-1)
    value = y if case.event else y[..., 0]
    return jnp.asarray(value, jnp.float32), (sp.log_expit(y) + sp.log_expit(-y)).sum(-1)


def coordinates(case, log_value):
    """And back."""
    if case.support == "simplex":
        return log_value[..., :-1] - log_value[..., -1:]
    return log_value if case.event else log_value[..., None]
