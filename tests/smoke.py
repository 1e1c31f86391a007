"""Check that the wheel alone works: python -W error smoke.py, away from the source.

Laws, not shapes: frequencies within 4.5 standard errors, densities that integrate to 1, means of estimators
at the enumerated gradient, a posterior that is known.
"""

import importlib.metadata
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO

import relaxit_jax as rj
from relaxit_jax import distributions as rd
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import gradient_report
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, relax

EXTRAS = ("flax", "matplotlib", "sklearn", "click", "pytest", "mkdocs")  # one of each extra, or more
N = 100_000
key, logits = jax.random.key(0), jnp.array([1.0, 0.0, -2.0])


def close(mean, expected, deviation, n=N):
    error = np.abs(np.asarray(mean, float) - np.asarray(expected, float))
    assert (error < 4.5 * np.asarray(deviation, float) / np.sqrt(n) + 1e-6).all(), (mean, expected)


def installed():
    installed_at = pathlib.Path(rj.__file__).parent
    assert "site-packages" in str(installed_at), f"the source, not the wheel: {installed_at}"
    assert (installed_at / "py.typed").exists()
    assert importlib.metadata.version("relaxit_jax") == rj.__version__
    there = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not there, f"extras are installed: {there}"


def samplers():
    p = jax.nn.softmax(logits)
    hard = rj.gumbel_softmax(key, logits, 0.5, shape=(N,), hard=True)
    close(hard.mean(0), p, jnp.sqrt(p * (1 - p)))
    weights = jnp.array([1.0, -2.0, 3.0])
    slope = jax.grad(lambda l: (rj.reinmax(key, l, shape=(N,)) @ weights).mean())(logits)
    each = jax.vmap(jax.grad(lambda l, key: rj.reinmax(key, l) @ weights), (None, 0))
    spread = each(logits, jax.random.split(key, 1000)).std(0)
    close(slope, p * (weights - p @ weights), spread)
    z = jnp.linspace(0, 1, 200_001)[1:-1]
    density = jnp.exp(rj.relaxed_bernoulli_log_prob(z, 0.3, 0.7))
    assert abs(np.trapezoid(density, z) - 1) < 1e-3
    subsets = rj.simple_top_k(key, logits, 2, shape=(N,))
    mu = rj.simple_top_k_marginals(logits, 2)
    close(subsets.mean(0), mu, jnp.sqrt(mu * (1 - mu)))
    rows = rj.gumbel_sinkhorn(key, jnp.zeros((4, 4)), 0.1, hard=True)  # by Optax's assignment
    assert (rows.sum(0) == 1).all() and (rows.sum(1) == 1).all()


def estimators():
    def f(bits):
        return (bits.sum(-1) - 0.7) ** 2

    q = es.Bernoulli(logits)
    exact = jax.grad(lambda l: es.exact(f, es.Bernoulli(l)))(logits)
    one = jax.grad(lambda l, key: es.disarm(key, f, es.Bernoulli(l)))
    many = jax.jit(jax.vmap(one, (None, 0)))(logits, jax.random.split(key, 10_000))
    close(many.mean(0), exact, many.std(0), 10_000)
    assert not gradient_report(key, f, q, {"disarm": es.disarm}, num_samples=1000).biased[0]
    loc, covariance = rj.laplace_bridge.dirichlet_to_gaussian(jnp.array([0.5, 2.0, 7.0]))
    back = rj.laplace_bridge.gaussian_to_dirichlet(loc, covariance)
    np.testing.assert_allclose(back, [0.5, 2, 7], rtol=1e-4)


def distributions():
    def model():
        z = numpyro.sample("z", rd.StraightThroughBernoulli(probs=0.3))
        return numpyro.sample("x", rd.GumbelSoftmax(logits=logits, tau=0.5)).sum() + 0 * z

    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    assert trace["z"]["value"] in (0, 1)
    draws = rd.HardConcrete(logits=0.4, tau=0.5).sample(key, (N,))
    p = rd.HardConcrete(logits=0.4, tau=0.5).l0
    close((draws > 0).mean(), p, jnp.sqrt(p * (1 - p)))
    kl = dist.kl_divergence(
        rd.RelaxedBernoulli(logits=0.3, tau=0.5), rd.RelaxedBernoulli(logits=0.3, tau=0.5)
    )
    assert abs(kl) < 1e-6


def handlers():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=1.0)

    guide, adam = AutoMeanField(model), numpyro.optim.Adam(0.05)
    posterior = 1 / (1 + np.exp(-2.0))
    soft = SVI(relax(model, tau=0.1), relax(guide, tau=0.1), adam, Trace_ELBO(20))
    for svi, error in ((soft, 0.05), (SVI(model, guide, adam, RLOO_ELBO(20)), 0.02)):
        found = svi.run(key, 600, progress_bar=False)
        assert abs(guide.probs(found.params)["z"] - posterior) < error


if __name__ == "__main__":
    for part in (installed, samplers, estimators, distributions, handlers):
        part()
        print(f"{part.__name__}: ok")
