"""The methods of the autoencoder: their bounds are bounds, and unbiased gradients match the bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
import vae
from command_lines import bars, tiny
from methods import METHODS, Estimator, Sampler, family_of
from relaxit_jax import estimators

KEY = jax.random.key(17)
TAU = 0.7
ESTIMATORS = [name for name, row in METHODS.items() if isinstance(row, Estimator)]
SAMPLERS = [name for name, row in METHODS.items() if isinstance(row, Sampler)]
LEARNED = ("correlated_bernoulli", "learned")
EVERY_ROW = [*((name, "identity") for name in METHODS), LEARNED]
# one method of each family; a prior and a KL are the family's
EVERY_FAMILY = [*{METHODS[name].family: (name, "identity") for name in SAMPLERS}.values(), LEARNED]
pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


@functools.cache
def judge(family, correlation):
    """Compute -log p(x) and the bounds of parameters, compiled once for all methods of a family."""
    method = next(name for name, row in METHODS.items() if row.family is family)
    made = vae.Experiment(tiny(LEARNED[0] if correlation == "learned" else method, correlation=correlation),
                          *common.split_images(bars()))  # fmt: skip

    @jax.jit
    def likelihoods(params):
        model = made.model(params)
        _, g = model.encode(made.test)
        code = made.family.code(made.family.draw_prior(KEY, g, 20_000))
        return jax.vmap(model.log_likelihood, (0, None))(made.test, code)

    return likelihoods, lambda params: made.test_bounds(params, made.test, 100)


@pytest.mark.parametrize(("method", "correlation"), EVERY_ROW)
def test_bounds_are_those_of_the_model_that_was_trained(method, correlation):
    """They are above the model's own -log p(x), from a plain average over the prior; training lowers them."""
    experiment = vae.Experiment(tiny(method, correlation=correlation), *common.split_images(bars()))
    likelihoods, bounds = judge(METHODS[method].family, correlation)
    before = bounds(experiment.state[0])[1]
    state = experiment.state
    for epoch in range(12):
        state, _ = experiment.epoch(state, experiment.grey, epoch)
    found = bounds(state[0])
    elbo, weighted = found[1], found[100]
    assert elbo < before and list(found.values()) == sorted(found.values(), reverse=True)
    exact = -np.mean(jax.nn.logsumexp(likelihoods(state[0]), -1) - np.log(20_000))
    assert exact - 0.1 < weighted <= elbo
    assert weighted - exact < 0.5  # a hundred samples all but close the gap of so small a model


@pytest.mark.parametrize(("method", "correlation"), EVERY_FAMILY)
def test_densities_of_draws_and_kl(method, correlation):
    """E_q p(z) / q(z) = 1, and the KL that is trained on is at least E_q log q(z) / p(z)."""
    family = family_of(tiny(method, correlation=correlation, tau_end=0.8))
    key, *keys = jax.random.split(KEY, 4)
    q = 0.3 * jax.random.normal(keys[0], (family.outputs,))
    g = {name: x + 0.2 * jax.random.normal(keys[1], x.shape) for name, x in family.shared().items()}
    n = 40_000
    _, ratio = jax.jit(jax.vmap(lambda key: family.draw(key, q, g)))(jax.random.split(key, n))
    weights = np.exp(np.asarray(ratio, np.float64))
    assert abs(weights.mean() - 1) < 4.5 * weights.std() / np.sqrt(n)
    kls = np.asarray(jax.jit(jax.vmap(lambda key: family.kl(key, q, g)))(jax.random.split(keys[2], n)), float)
    error = np.hypot(kls.std(), np.std(ratio)) / np.sqrt(n)
    assert kls.mean() + np.mean(ratio) > -4.5 * error
    if method not in ("gaussian_bernoulli", "relaxed_top_k"):  # there it is a bound, here the mean itself
        assert abs(kls.mean() + np.mean(ratio)) < 4.5 * error


@pytest.mark.parametrize("method", sorted(set(SAMPLERS) - {"stochastic_times_smooth", "invertible_gaussian"}))
def test_training_draws_become_exact_as_the_temperature_falls(method):
    """Every sampler trains on the law it is tested on, except two whose law differs at any tau."""
    family, n = family_of(tiny(method, tau_end=1e-3)), 20_000
    q, g = jnp.linspace(-1, 1, family.outputs), family.shared()

    @jax.jit
    @jax.vmap
    def both(key):
        relaxed = METHODS[method].train(family, key, q, g, 1e-3)
        exact, _ = family.draw(jax.random.fold_in(key, 0), q, g)
        return family.code(relaxed), family.code(exact)

    relaxed, exact = both(jax.random.split(KEY, n))
    error = np.hypot(np.std(relaxed, 0), np.std(exact, 0)) / np.sqrt(n)
    assert (np.abs(np.mean(relaxed, 0) - np.mean(exact, 0)) < 4.5 * error + 1e-6).all()


@functools.cache
def experiment(method):
    """Two images of six pixels, and parameters at which everything has a gradient."""
    images = np.random.default_rng(0).uniform(size=(2, 2, 3)).astype(np.float32)
    samples = 2 if method == "vimco" else None
    made = vae.Experiment(tiny(method, hidden=(5,), batch_size=2, samples=samples), images, images)
    leaves, tree = jax.tree.flatten(made.state[:2])
    keys = jax.random.split(KEY, len(leaves))
    moved = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return made, *jax.tree.unflatten(tree, moved)


def enumerated(made, params):
    """The objective, with the sum over all outcomes of the latents instead of the draw."""
    model = made.model(params)
    q, g = model.encode(made.test)
    f = lambda z: model.log_likelihood(made.test, made.family.code(z))
    return jnp.mean(made.family.kl(KEY, q, g) - estimators.exact(f, made.family.variables(q)))


def enumerated_bound_of_two(made, params):
    """The sum over all pairs of outcomes."""
    model = made.model(params)
    q, g = model.encode(made.test)
    law = made.family.variables(q)
    count, events = law.outcomes()
    z = jnp.broadcast_to(events(jnp.arange(count))[:, None], (count, *q.shape))
    log_q = jax.vmap(law.log_prob)(z)
    likelihood = jax.vmap(lambda z: model.log_likelihood(made.test, made.family.code(z)))(z)
    log_w = likelihood + jax.vmap(lambda z: made.family.log_ratio(z, q, g))(z)
    pairs = jnp.logaddexp(log_w[:, None], log_w) - jnp.log(2)
    return -jnp.mean(jnp.sum(jnp.exp(log_q[:, None] + log_q) * pairs, (0, 1)))


@pytest.mark.parametrize("method", [*ESTIMATORS, "vimco"])
def test_the_training_gradient_is_that_of_the_bound(method):
    """It covers every weight of both networks and the prior, and the value: |z| of the mean is small."""
    made, params, variate = experiment(method)
    n = 8_000
    one = lambda key: made.gradients(params, variate, made.test, key, TAU)
    values, (gradients, _) = jax.jit(jax.vmap(one))(jax.random.split(KEY, n))
    objective = enumerated_bound_of_two if method == "vimco" else enumerated
    exact = jax.jit(jax.value_and_grad(functools.partial(objective, made)))(params)
    draws, exact = (
        [np.asarray(x, float) for x in jax.tree.leaves(tree)] for tree in ((values, gradients), exact)
    )
    draws, exact = (
        np.concatenate([x.reshape(*lead, -1) for x in tree], -1)
        for tree, lead in ((draws, (n,)), (exact, ()))
    )
    error = np.abs(draws.mean(0) - exact)
    assert (error < 4.8 * draws.std(0) / np.sqrt(n) + 2e-6).all()
    assert (np.abs(exact) > 1e-5).mean() > 0.9  # there was something to be wrong about


@pytest.mark.parametrize("method", ["relaxed_bernoulli", "reinmax", "disarm", "rebar_categorical"])
def test_the_gradient_is_whole_although_the_encoder_is_taken_apart(method):
    made, params, variate = experiment(method)

    def objective(params):
        q, _ = made.model(params).encode(made.test)
        return made.loss((params, q), variate, made.test, KEY, TAU)

    value, gradient = jax.jit(jax.value_and_grad(objective))(params)
    other, (seen, _) = jax.jit(lambda params: made.gradients(params, variate, made.test, KEY, TAU))(params)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), seen, gradient)


@pytest.mark.parametrize("method", ["rebar", "relax", "rebar_categorical", "relax_categorical"])
def test_control_variates_learn_the_variance_of_the_encoders_signal(method):
    """The gradient in each of their parameters is the gradient of |gradient in q|^2, by differences."""
    made, params, variate = experiment(method)
    q, _ = made.model(params).encode(made.test)

    @jax.jit
    def size(variate):
        slope = jax.grad(lambda q: made.loss((params, q), variate, made.test, KEY, TAU))(q)
        return jnp.sum(slope**2)

    gradients = jax.jit(lambda variate: made.gradients(params, variate, made.test, KEY, TAU))
    _, (_, seen) = gradients(variate)
    leaves, tree = jax.tree.flatten(variate)
    for place, gradient in enumerate(jax.tree.leaves(seen)):
        direction = jax.random.normal(jax.random.fold_in(KEY, place), gradient.shape)
        ends = []
        for h in (-1e-2, 1e-2):
            moved = [*leaves[:place], leaves[place] + h * direction, *leaves[place + 1 :]]
            ends.append(size(jax.tree.unflatten(tree, moved)))
        np.testing.assert_allclose(
            jnp.sum(gradient * direction), (ends[1] - ends[0]) / 2e-2, rtol=0.02, atol=1e-4
        )
