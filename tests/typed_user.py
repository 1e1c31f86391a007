"""Code of a user who checks types strictly: `.ci/run` checks it, and test_types.py runs it.

It is strict except where JAX and NumPyro leave types unknown, as `jnp.zeros` and `SVI.run` do; known types
are asserted.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from functools import partial
from typing import assert_type

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import SVI, Trace_ELBO

import relaxit_jax as rj
from relaxit_jax import distributions as rd
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import GradientReport, from_sampler, gradient_report
from relaxit_jax.elbo import RLOO_ELBO, VIMCO_ELBO
from relaxit_jax.handlers import AutoMeanField, relax, take


def samplers(key: Array, logits: Array) -> Array:
    z = assert_type(rj.gumbel_softmax(key, logits, 0.5, shape=(3,), hard=True), Array)
    log_z = rj.gumbel_softmax(key, logits, 0.5, log_space=True)
    assert_type(rj.gumbel_softmax_log_prob(log_z, logits, 0.5, log_space=True), Array)
    indices, perturbed = rj.gumbel_top_k(key, logits, 2)
    assert_type(indices, Array)
    log_p, values = rj.poisson_support(2.5, 12)
    count = rj.generalized_gumbel_softmax(key, log_p, values, 0.5)
    loc, covariance = rj.laplace_bridge.dirichlet_to_gaussian(jnp.ones(3))
    assert_type(covariance, Array)
    return z.sum() + perturbed.sum() + count + loc.sum()


def energy(bits: Array) -> Array:
    return (bits.sum(-1) - 1.0) ** 2


def shifted(tree: dict[str, Array], bits: Array) -> Array:
    return energy(bits + tree["shift"])


def law_of(tree: dict[str, Array]) -> es.Bernoulli:
    return es.Bernoulli(tree["logits"])


def estimators(key: Array, logits: Array) -> GradientReport:
    q = assert_type(es.Bernoulli(logits), es.Bernoulli)
    assert_type(q.batch_shape, tuple[int, ...])
    value, aux = es.arms(key, lambda b: (energy(b), b), q, num_samples=4, has_aux=True)
    assert_type(es.from_set(jnp.stack([value, value]), jnp.log(jnp.full((2, *value.shape), 0.5))), Array)
    assert aux.shape == logits.shape
    assert es.exact(energy, es.OneHotCategorical(jnp.zeros(3), event_ndims=1)).shape == ()
    relaxed = partial(rj.relaxed_bernoulli, tau=0.5)
    methods = {"rloo": partial(es.rloo, num_samples=4), "relaxed": from_sampler(relaxed)}
    report = assert_type(gradient_report(key, energy, q, methods, num_samples=10), GradientReport)
    assert_type(report.names, tuple[str, ...])
    tree = {"logits": logits, "shift": jnp.ones(())}
    of_tree = gradient_report(key, shifted, law_of, methods, num_samples=10, params=tree)
    assert_type(of_tree.leaves["shift"], GradientReport)
    return report


def distributions(key: Array, logits: Array) -> Array:
    d = assert_type(rd.GumbelSoftmax(logits=logits, tau=0.5), rd.GumbelSoftmax)
    assert_type(d.logits, Array)
    bits = assert_type(rd.HardConcrete(probs=jnp.array([0.1, 0.9]), tau=0.5), rd.HardConcrete)
    assert_type(rd.SimpleTopK(logits=logits, k=2).mean, Array)
    return assert_type(d.log_prob(d.sample(key, (2,))), Array).sum() + bits.l0.sum()


def model(x: Array) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 5).expand([2]).to_event(1))
    with numpyro.plate("points", len(x)):
        z = numpyro.sample("z", dist.CategoricalProbs(jnp.array([0.5, 0.5])))
        numpyro.sample("x", dist.Normal(take(loc, z), 1), obs=x)


def train(key: Array, x: Array) -> Array:
    guide = AutoMeanField(model)
    adam = numpyro.optim.Adam(0.1)
    soft = SVI(relax(model, tau=0.5), relax(guide, tau=0.5, method="straight_through"), adam, Trace_ELBO(2))
    found = soft.run(key, 2, x, progress_bar=False)
    for bound in (RLOO_ELBO(num_particles=2), VIMCO_ELBO(num_particles=2)):
        SVI(model, guide, adam, bound).run(key, 2, x, progress_bar=False)
    return assert_type(guide.probs(found.params), dict[str, Array])["z"]


def main() -> None:
    key, logits = jax.random.key(0), jnp.zeros(3)
    # compiled as one each, which is quicker than operation by operation
    print(jax.jit(samplers)(key, logits), jax.jit(distributions)(key, logits))
    print(estimators(key, logits))
    print(jax.jit(train)(key, jnp.array([-1.0, 1.0])))


if __name__ == "__main__":
    main()
