"""The families of latent variables in examples/vae.py.

A family defines the encoder's outputs for each image (q) and the parameters that all images share (g), its
KL, its exact draws with log p(z) - log q(z | x), and the form in which the decoder sees a draw. The methods
that train them are in methods.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from numpyro.distributions import kl_divergence

import relaxit_jax as rj
from relaxit_jax.distributions import SimpleTopK
from relaxit_jax.estimators import Bernoulli, OneHotCategorical


class Bits:
    """n independent bits; q and the prior are log-odds."""

    def __init__(self, config):
        self.size = config.latents
        self.outputs = self.code_size = self.size

    def shared(self):
        return {"prior": jnp.zeros(self.size)}

    def variables(self, q):
        """In the form that relaxit_jax.estimators needs."""
        return Bernoulli(q)

    def kl(self, key, q, g):
        p = g["prior"]
        terms = jax.nn.sigmoid(q) * (q - p) - jax.nn.softplus(q) + jax.nn.softplus(p)
        return jnp.sum(terms, -1)

    def draw(self, key, q, g):
        """An exact draw z, and log p(z) - log q(z | x)."""
        z = rj.straight_through_bernoulli(key, q)
        return z, self.log_ratio(z, q, g)

    def log_ratio(self, z, q, g):
        return self.log_prior(z, g) - jnp.sum(rj.straight_through_bernoulli_log_prob(z, q), -1)

    def log_prior(self, z, g):
        return jnp.sum(rj.straight_through_bernoulli_log_prob(z, g["prior"]), -1)

    def draw_prior(self, key, g, n):
        return rj.straight_through_bernoulli(key, g["prior"], shape=(n, self.size))

    def code(self, z):
        """The form that the decoder sees."""
        return 2 * z - 1


class TimesSmoothBits(Bits):
    """Bits that the decoder sees as 0 and 1, since training draws are 0 or sqrt(p), which is closer to 1."""

    def code(self, z):
        return z


def gaussian_kl(loc, scale, prior_loc, prior_scale):
    ratio = scale / prior_scale
    return 0.5 * (ratio**2 + ((loc - prior_loc) / prior_scale) ** 2 - 1) - jnp.log(ratio)


class CorrelatedBits(Bits):
    """Bits with log-odds q, made dependent by a Gaussian copula with a learned correlation R.

    Bit i is 1[y_i > 0] with y ~ N(Phi^-1(pi), R). The KL to an independent prior is the sum of the KLs of
    single bits plus their total correlation. The latter has no closed form; the total correlation of y,
    -log(det R) / 2, is an upper bound. (The KL of y to N(0, I) is a bound as well, but a wider one.)
    """

    def shared(self):
        return super().shared() | {"factor": jnp.eye(self.size)}

    def scale_tril(self, g):
        rows = jnp.tril(g["factor"], -1) + jnp.diag(jnp.exp(jnp.diag(g["factor"]) - 1))
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    def kl(self, key, q, g):
        return super().kl(key, q, g) - jnp.sum(jnp.log(jnp.diag(self.scale_tril(g))))

    def draw(self, key, q, g):
        """Bits, and a ratio that includes the noise v of the bits, as in the ELBO."""
        factor = self.scale_tril(g)
        noise = jax.random.normal(key, q.shape)
        v = noise @ factor.T
        z = (q + norm.logcdf(v) - norm.logcdf(-v) > 0).astype(q.dtype)
        dependent = jnp.sum(norm.logpdf(noise), -1) - jnp.sum(jnp.log(jnp.diag(factor)))
        return z, self.log_ratio(z, q, g) + jnp.sum(norm.logpdf(v), -1) - dependent


class GaussianGates(Bits):
    """Gates clip(y, 0, 1), y ~ N(loc, scale^2), which keep their own law at test time."""

    def __init__(self, config):
        super().__init__(config)
        self.outputs = 2 * self.size

    def shared(self):
        return {"prior": jnp.concatenate([jnp.full(self.size, 0.5), jnp.zeros(self.size)])}

    def split(self, q):
        loc, raw = jnp.split(q, 2, -1)
        return loc, 0.01 + jax.nn.softplus(raw)

    def kl(self, key, q, g):
        return jnp.sum(gaussian_kl(*self.split(q), *self.split(g["prior"])), -1)

    def draw(self, key, q, g):
        z = rj.gaussian_bernoulli(key, *self.split(q))
        ratio = rj.gaussian_bernoulli_log_prob(z, *self.split(g["prior"])) - rj.gaussian_bernoulli_log_prob(
            z, *self.split(q)
        )
        return z, jnp.sum(ratio, -1)

    def draw_prior(self, key, g, n):
        return rj.gaussian_bernoulli(key, *self.split(g["prior"]), shape=(n, self.size))


class Categories:
    """n categorical variables of K classes, as one-hot vectors; q and the prior are logits."""

    def __init__(self, config):
        self.n, self.k = config.variables, config.classes
        self.outputs = self.code_size = self.n * self.k

    def shared(self):
        return {"prior": jnp.zeros(self.outputs)}

    def split(self, q):
        return q.reshape(*q.shape[:-1], self.n, self.k)

    def variables(self, q):
        return OneHotCategorical(self.split(q))

    def kl(self, key, q, g):
        log_q, log_p = (jax.nn.log_softmax(self.split(x)) for x in (q, g["prior"]))
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p), (-2, -1))

    def draw(self, key, q, g):
        z = rj.gumbel_softmax(key, self.split(q), 1.0, hard=True)
        log_q, log_p = (jax.nn.log_softmax(self.split(x)) for x in (q, g["prior"]))
        return z, jnp.sum(z * (log_p - log_q), (-2, -1))

    def draw_prior(self, key, g, n):
        return rj.gumbel_softmax(key, self.split(g["prior"]), 1.0, shape=(n, self.n), hard=True)

    def code(self, z):
        return z.reshape(*z.shape[:-2], -1)


class InvertibleGaussians(Categories):
    """n points of the simplex of K classes (invertible Gaussian), with the same law at test time.

    The map from y to the simplex is invertible, so the KL between the points equals the KL between the
    Gaussians.
    """

    def __init__(self, config):
        super().__init__(config)
        self.tau = config.tau_end
        self.outputs = self.n * (self.k - 1) * 2

    def split(self, q):
        loc, raw = jnp.split(q.reshape(*q.shape[:-1], self.n, 2 * (self.k - 1)), 2, -1)
        return loc, 0.01 + jax.nn.softplus(raw)

    def kl(self, key, q, g):
        return jnp.sum(gaussian_kl(*self.split(q), *self.split(g["prior"])), (-2, -1))

    def draw(self, key, q, g):
        log_z = rj.invertible_gaussian(key, *self.split(q), self.tau, log_space=True)
        law = functools.partial(rj.invertible_gaussian_log_prob, log_z, log_space=True)
        ratio = law(*self.split(g["prior"]), self.tau) - law(*self.split(q), self.tau)
        return jnp.exp(log_z), jnp.sum(ratio, -1)

    def draw_prior(self, key, g, n):
        return rj.invertible_gaussian(key, *self.split(g["prior"]), self.tau, shape=(n, self.n))


class Subset(Bits):
    """A subset of k of n elements, as a k-hot vector; q and the prior are Plackett-Luce logits.

    The KL is for the order of the draws, step by step: the next draw, given the elements left.
    """

    def __init__(self, config):
        super().__init__(config)
        self.k = config.subset_size

    def kl(self, key, q, g):
        """An unbiased estimate of the KL of the orders, for the order that the key draws."""
        order, _ = rj.gumbel_top_k(key, q, self.k)
        taken = jax.nn.one_hot(order, self.size)
        left = jnp.cumsum(taken, -2) - taken == 0
        log_q, log_p = (jax.nn.log_softmax(jnp.where(left, x[..., None, :], -1e9)) for x in (q, g["prior"]))
        return jnp.sum(jnp.where(left, jnp.exp(log_q) * (log_q - log_p), 0), (-2, -1))

    def draw(self, key, q, g):
        order, _ = rj.gumbel_top_k(key, q, self.k)
        law = functools.partial(rj.gumbel_top_k_log_prob, order, ordered=False)
        return jnp.sum(jax.nn.one_hot(order, self.size), -2), law(g["prior"]) - law(q)

    def draw_prior(self, key, g, n):
        order, _ = rj.gumbel_top_k(key, g["prior"], self.k, shape=(n,))
        return jnp.sum(jax.nn.one_hot(order, self.size), -2)


class ConditionalBits(Subset):
    """n bits of which k are ones; q and the prior are log-odds of the bits before this condition."""

    def kl(self, key, q, g):
        return kl_divergence(SimpleTopK(logits=q, k=self.k), SimpleTopK(logits=g["prior"], k=self.k))

    def draw(self, key, q, g):
        z = rj.simple_top_k(key, q, self.k)
        law = functools.partial(rj.simple_top_k_log_prob, z, k=self.k)
        return z, law(g["prior"]) - law(q)

    def draw_prior(self, key, g, n):
        return rj.simple_top_k(key, g["prior"], self.k, shape=(n,))


class Counts(Bits):
    """n counts; q and the prior are the log-odds of their means as fractions of the largest mean.

    The law is truncated to finitely many values, with the tail mass added to the last. How many values
    leave out less than EPS at the largest mean is computed once, here, because it has to be known inside
    jit.
    """

    EPS = 1e-4

    def __init__(self, config):
        super().__init__(config)
        self.largest = config.largest_mean
        self.values = self.support(jnp.array(jnp.inf))[1]

    def log_mean(self, q):
        return math.log(self.largest) + jax.nn.log_sigmoid(q)

    def support(self, q, size=None):
        """Log-probabilities of the values, along a new last axis, and the values."""
        return rj.poisson_support(jnp.exp(self.log_mean(q)), size, eps=self.EPS)

    def law(self, q):
        return self.support(q, self.values.size)[0]

    def kl(self, key, q, g):
        log_q, log_p = self.law(q), self.law(g["prior"])
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p), (-2, -1))

    def relaxed(self, key, q, tau=1.0, **options):
        return rj.generalized_gumbel_softmax(key, self.law(q), self.values, tau, **options)

    def draw(self, key, q, g):
        z = self.relaxed(key, q, hard=True)
        return z, self.log_ratio(z, q, g)

    def log_ratio(self, z, q, g):
        chosen = z[..., None] == self.values
        return jnp.sum(jnp.where(chosen, self.law(g["prior"]) - self.law(q), 0), (-2, -1))

    def draw_prior(self, key, g, n):
        return self.relaxed(key, g["prior"], shape=(n, self.size), hard=True)

    def code(self, z):
        return (z - self.largest / 2) / 2


class GeometricCounts(Counts):
    def support(self, q, size=None):
        return rj.geometric_support(-self.log_mean(q), size, eps=self.EPS)

    def code(self, z):
        return jnp.log1p(z) - 1  # most counts are small, some large


class NegativeBinomialCounts(GeometricCounts):
    """The number of heads before the fourth tail."""

    def support(self, q, size=None):
        return rj.negative_binomial_support(4.0, self.log_mean(q) - math.log(4), size, eps=self.EPS)


class BinomialCounts(Counts):
    """With as many trials as the largest mean, rounded up."""

    def support(self, q, size=None):
        return rj.binomial_support(math.ceil(self.largest), q, size, eps=self.EPS)
