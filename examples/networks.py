"""The encoder and decoder of examples/vae.py."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx


class Constant(nnx.Variable):
    """Kept with the model, not trained."""


class VAE(nnx.Module):
    def __init__(self, family, mean, config, rngs):
        hidden = config.hidden
        self.mean = Constant(mean if config.centre else jnp.zeros_like(mean))
        self.encoder = mlp(mean.size, *hidden, family.outputs, activation=config.activation, rngs=rngs)
        self.decoder = mlp(
            family.code_size, *hidden[::-1], mean.size, activation=config.activation, rngs=rngs
        )
        self.decoder.layers[-1].bias[...] = jax.scipy.special.logit(jnp.clip(mean, 0.01, 0.99))
        fixed = {"prior": Constant} if config.prior == "fixed" else {}
        self.shared = nnx.Dict({n: fixed.get(n, nnx.Param)(x) for n, x in family.shared().items()})

    def encode(self, x):
        """The parameters q of each image, and the shared parameters."""
        return self.encoder(x - self.mean[...]), self.shared_parameters()

    def shared_parameters(self):
        return {name: x[...] for name, x in self.shared.items()}

    def log_likelihood(self, x, code):
        logits = self.decoder(code)
        return jnp.sum(x * logits - jax.nn.softplus(logits), -1)


def mlp(*sizes, activation, rngs):
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nnx.Linear(inputs, outputs, rngs=rngs), getattr(jax.nn, activation)]
    return nnx.Sequential(*layers[:-1])
