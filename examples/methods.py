"""The training methods of examples/vae.py: each entry of METHODS says how to train a family of latents.py.

There are three kinds. Samplers draw relaxed or straight-through latents, with their own gradient, which is
biased for all but the simplest decoders. Unbiased estimators draw exact latents, give the right gradient on
average, and may have a control variate whose parameters are trained on the variance of the gradient. Bounds
replace the expectation by a weighted bound over many exact draws.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import relaxit_jax as rj
from latents import (
    BinomialCounts,
    Bits,
    Categories,
    ConditionalBits,
    CorrelatedBits,
    Counts,
    GaussianGates,
    GeometricCounts,
    InvertibleGaussians,
    NegativeBinomialCounts,
    Subset,
    TimesSmoothBits,
)
from relaxit_jax import estimators

HIDDEN = 100  # units in the control variate of relax


class Sampler(NamedTuple):
    """How to draw in training, from which family, and at which initial and final temperature."""

    about: str
    family: type
    train: Callable  # (family, key, q, g, tau) -> z with a gradient
    tau: tuple[float, float] = (1.0, 1.0)

    def variate(self, key, q, tau):
        return {}

    def expectation(self, family, key, f, q, g, tau, variate):
        """f at one draw."""
        return f(self.train(family, key, q, g, tau))


class Estimator(NamedTuple):
    """An unbiased gradient. A temperature is the initial one of its control variate."""

    about: str
    family: type
    estimate: Callable  # (key, f, q, variate) -> E f(z), with a gradient; with num_samples, if it has that
    variate: Callable = lambda key, q, tau: {}  # the initial parameters of the control variate
    tau: tuple[float, float] = (0.5, 0.5)
    draws: int | None = None  # for one estimate, if that is a choice

    def expectation(self, family, key, f, q, g, tau, variate):
        more = {} if self.draws is None else {"num_samples": self.draws}
        return self.estimate(key, f, family.variables(q), variate, **more)


class Bound(NamedTuple):
    """The bound with many samples, from log p(x, z) and the law that was drawn from."""

    about: str
    family: type
    draws: int
    tau: tuple[float, float] = (0.5, 0.5)

    def variate(self, key, q, tau):
        return {}

    def expectation(self, family, key, f, q, g, tau, variate):
        """It includes the KL, which the objective of all methods subtracts again."""
        log_joint = lambda z: f(z) + family.log_prior(z, g)
        bound = estimators.vimco(key, log_joint, family.variables(q), num_samples=self.draws)
        return bound + family.kl(key, q, g)


def reinforce(key, f, q, variate):
    """The baseline is f at the mean of the latents, which does not depend on the draw."""
    return estimators.reinforce(key, f, q, baseline=f(q.relaxed(q.logits, 1.0)))


def rloo(key, f, q, variate, **options):
    return estimators.rloo(key, f, q, **options)


def arms(key, f, q, variate, **options):
    return estimators.arms(key, f, q, **options)


def rebar_variate(key, q, tau):
    return {"log_tau": jnp.log(tau), "eta": jnp.array(1.0)}


def rebar(key, f, q, variate):
    return estimators.rebar(key, f, q, tau=jnp.exp(variate["log_tau"]), eta=variate["eta"])


def relax_variate(key, q, tau):
    """The parameters of rebar, and a network of the relaxed latents and their logits that starts at zero."""
    inputs = 2 * q.shape[-1]
    first = jax.random.normal(key, (inputs, HIDDEN)) / jnp.sqrt(inputs)
    layers = {"first": first, "bias": jnp.zeros(HIDDEN), "second": jnp.zeros(HIDDEN)}
    return rebar_variate(key, q, tau) | layers


def relax(key, f, q, variate):
    def control_variate(z):
        relaxed = q.relaxed(z, jnp.exp(variate["log_tau"]))
        inputs = jnp.stack([relaxed, q.logits], -1).reshape(*q.batch_shape, -1)
        hidden = jnp.tanh(inputs @ variate["first"] + variate["bias"])
        return variate["eta"] * f(relaxed) + hidden @ variate["second"]

    return estimators.relax(key, f, q, control_variate=control_variate)


def correlated(family, key, q, g, tau):
    factor = family.scale_tril(g) if isinstance(family, CorrelatedBits) else jnp.eye(family.size)
    return rj.correlated_bernoulli(key, q, tau, factor)


def counts(family, key, q, g, tau):
    return family.relaxed(key, q, tau)


METHODS = {
    "relaxed_bernoulli": Sampler(
        "relaxed (Concrete) bits", Bits,
        lambda family, key, q, g, tau: rj.relaxed_bernoulli(key, q, tau), (1.0, 0.3),
    ),
    "relaxed_bernoulli_hard": Sampler(
        "exact bits, gradient of the relaxed ones", Bits,
        lambda family, key, q, g, tau: rj.relaxed_bernoulli(key, q, tau, hard=True), (1.0, 0.5),
    ),
    "straight_through_bernoulli": Sampler(
        "exact bits, gradient of their probabilities", Bits,
        lambda family, key, q, g, tau: rj.straight_through_bernoulli(key, q),
    ),
    "stochastic_times_smooth": Sampler(
        "a bit times the root of its probability", TimesSmoothBits,
        lambda family, key, q, g, tau: rj.stochastic_times_smooth(key, q),
    ),
    "hard_concrete": Sampler(
        "stretched and clipped relaxed bits", Bits,
        lambda family, key, q, g, tau: rj.hard_concrete(key, q, tau), (1.0, 0.5),
    ),
    "gaussian_bernoulli": Sampler(
        "clipped Gaussian gates", GaussianGates,
        lambda family, key, q, g, tau: rj.gaussian_bernoulli(key, *family.split(q)),
    ),
    "correlated_bernoulli": Sampler("relaxed bits of a Gaussian copula", Bits, correlated, (1.0, 0.3)),
    "gumbel_softmax": Sampler(
        "relaxed (Concrete) categories", Categories,
        lambda family, key, q, g, tau: rj.gumbel_softmax(key, family.split(q), tau), (1.0, 0.5),
    ),
    "gumbel_softmax_hard": Sampler(
        "exact categories, gradient of the relaxed ones", Categories,
        lambda family, key, q, g, tau: rj.gumbel_softmax(key, family.split(q), tau, hard=True), (1.0, 0.5),
    ),
    "decoupled_gumbel_softmax": Sampler(
        "relaxed categories, gradient of temperature 0.5", Categories,
        lambda family, key, q, g, tau: rj.decoupled_gumbel_softmax(
            key, family.split(q), tau, 0.5, hard=False
        ), (0.5, 0.2),
    ),
    "straight_through_categorical": Sampler(
        "exact categories, gradient of their probabilities", Categories,
        lambda family, key, q, g, tau: rj.straight_through_categorical(key, family.split(q), tau),
    ),
    "gumbel_rao": Sampler(
        "exact categories, gradient of 10 relaxed draws", Categories,
        lambda family, key, q, g, tau: rj.gumbel_rao(key, family.split(q), tau, 10), (0.5, 0.5),
    ),
    "reinmax": Sampler(
        "exact categories, gradient of second order", Categories,
        lambda family, key, q, g, tau: rj.reinmax(key, family.split(q), tau), (2.0, 1.0),
    ),
    "reinmax_rao": Sampler(
        "the same, of 10 relaxed draws", Categories,
        lambda family, key, q, g, tau: rj.reinmax_rao(key, family.split(q), tau, 10),
    ),
    "gapped_straight_through": Sampler(
        "exact categories, gradient of softmax led by a gap", Categories,
        lambda family, key, q, g, tau: rj.gapped_straight_through(key, family.split(q), tau),
    ),
    "invertible_gaussian": Sampler(
        "Gaussians mapped to the simplex", InvertibleGaussians,
        lambda family, key, q, g, tau: rj.invertible_gaussian(key, *family.split(q), tau),
    ),
    "relaxed_top_k": Sampler(
        "relaxed subsets of k elements", Subset,
        lambda family, key, q, g, tau: rj.relaxed_top_k(key, q, family.k, tau), (1.0, 0.5),
    ),
    "simple_top_k": Sampler(
        "exact subsets of k elements, gradient of their mean", ConditionalBits,
        lambda family, key, q, g, tau: rj.simple_top_k(key, q, family.k),
    ),
    "poisson": Sampler("relaxed Poisson counts", Counts, counts, (0.5, 0.3)),
    "geometric": Sampler("relaxed geometric counts", GeometricCounts, counts, (0.5, 0.2)),
    "binomial": Sampler("relaxed binomial counts", BinomialCounts, counts, (1.0, 0.3)),
    "negative_binomial": Sampler(
        "relaxed negative binomial counts", NegativeBinomialCounts, counts, (0.5, 0.3)
    ),
    "reinforce": Estimator("exact bits, score function with a baseline", Bits, reinforce),
    "rloo": Estimator("the same, of --samples draws", Bits, rloo, draws=2),
    "arm": Estimator("the same, of two opposite draws", Bits, lambda key, f, q, _: estimators.arm(key, f, q)),
    "disarm": Estimator(
        "the same, given the two draws", Bits, lambda key, f, q, _: estimators.disarm(key, f, q)
    ),
    "arms": Estimator("exact bits, --samples draws that repel each other", Bits, arms, draws=4),
    "vimco": Bound("exact bits, the bound of --samples draws", Bits, 5),
    "rebar": Estimator("exact bits, with a relaxed control variate", Bits, rebar, rebar_variate),
    "relax": Estimator("the same, and a network in it", Bits, relax, relax_variate),
}  # fmt: skip
METHODS |= {
    f"{name}_categorical": METHODS[name]._replace(about=f"{name} with exact categories", family=Categories)
    for name in ("reinforce", "rloo", "arms", "rebar", "relax")
}


def family_of(config):
    family = METHODS[config.method].family
    if config.method == "correlated_bernoulli" and config.correlation == "learned":
        family = CorrelatedBits
    return family(config)
