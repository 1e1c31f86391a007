"""The training gradient of the autoencoder: right in the mean by every unbiased method, on a real network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vae
from methods import METHODS, Estimator
from relaxit_jax import estimators

KEY = jax.random.key(17)
TAU = 0.7
ESTIMATORS = [name for name, row in METHODS.items() if isinstance(row, Estimator)]
pytestmark = pytest.mark.usefixtures("fast_compilation")
SETTINGS = {
    "data": "", "epochs": 1, "seed": 3, "latents": 3, "variables": 2, "classes": 3, "subset_size": 2,
    "largest_mean": 2.0, "correlation": "identity", "tau_start": TAU, "tau_end": TAU, "hidden": (5,),
    "activation": "tanh", "prior": "learned", "augment": False, "centre": True, "batch_size": 2,
    "learning_rate": 0.1, "schedule": "constant",
}  # fmt: skip


@functools.cache
def experiment(method):
    """Two images of six pixels, and parameters at which everything has a gradient."""
    images = np.random.default_rng(0).uniform(size=(2, 2, 3)).astype(np.float32)
    made = vae.Experiment(vae.Config(method=method, **SETTINGS), images, images)
    leaves, tree = jax.tree.flatten(made.state[:2])
    keys = jax.random.split(KEY, len(leaves))
    moved = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return made, *jax.tree.unflatten(tree, moved)


def enumerated(made, params):
    """The objective, with the sum over all outcomes of the latents in the place of the draw."""
    model = made.model(params)
    q, g = model.encode(made.test)
    f = lambda z: model.log_likelihood(made.test, made.family.code(z))
    return jnp.mean(made.family.kl(KEY, q, g) - estimators.exact(f, made.family.variables(q)))


@pytest.mark.parametrize("method", ESTIMATORS)
def test_the_training_gradient_is_that_of_the_bound(method):
    """For every weight of both networks and the prior, and the value as well: |z| of the mean is small."""
    made, params, variate = experiment(method)
    n = 8_000
    one = lambda key: made.gradients(params, variate, made.test, key, TAU)
    values, (gradients, _) = jax.jit(jax.vmap(one))(jax.random.split(KEY, n))
    exact = jax.value_and_grad(functools.partial(enumerated, made))(params)
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

    value, gradient = jax.value_and_grad(objective)(params)
    other, (seen, _) = made.gradients(params, variate, made.test, KEY, TAU)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), seen, gradient)


@pytest.mark.parametrize("method", ["rebar", "relax", "rebar_categorical", "relax_categorical"])
def test_control_variates_learn_the_variance_of_the_encoders_signal(method):
    """The gradient of each of their parameters is that of |gradient in q|^2, by differences."""
    made, params, variate = experiment(method)
    q, _ = made.model(params).encode(made.test)

    @jax.jit
    def size(variate):
        slope = jax.grad(lambda q: made.loss((params, q), variate, made.test, KEY, TAU))(q)
        return jnp.sum(slope**2)

    _, (_, seen) = made.gradients(params, variate, made.test, KEY, TAU)
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
