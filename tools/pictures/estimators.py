"""The error left over calls of f, as gradient_report draws it, for bits and for categories."""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj
from relaxit_jax import estimators as es
from relaxit_jax.diagnostics import from_sampler, gradient_report

rng = np.random.default_rng(2)
OF_BITS, OF_CLASSES = (rng.normal(size=(2, *shape)) for shape in ((8,), (3, 4)))  # logits and weights
UNBIASED = {
    "reinforce": es.reinforce,
    "rloo of 2": es.rloo,
    "rloo of 8": functools.partial(es.rloo, num_samples=8),
    "rebar": es.rebar,
}


def f(weights, z):
    return jnp.tanh(jnp.sum(weights * z) - 0.5) ** 2


def relaxed(sampler):
    return from_sampler(lambda key, logits: sampler(key, logits, 0.5))


BIT_METHODS = UNBIASED | {
    "arm": es.arm,
    "disarm": es.disarm,
    "straight-through": from_sampler(rj.straight_through_bernoulli),
    "relaxed": relaxed(rj.relaxed_bernoulli),
}
CLASS_METHODS = UNBIASED | {
    "straight-through": from_sampler(rj.straight_through_categorical),
    "reinmax": from_sampler(rj.reinmax),
    "relaxed": relaxed(rj.gumbel_softmax),
}
PANELS = {
    "8 bits": (es.Bernoulli, OF_BITS, BIT_METHODS),
    "3 variables of 4 categories": (es.OneHotCategorical, OF_CLASSES, CLASS_METHODS),
}


def picture(draws):
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 7.0), layout="constrained")
    for axis, (title, (family, numbers, methods)) in zip(axes, PANELS.items(), strict=True):
        logits, weights = jnp.asarray(numbers, jnp.float32)
        g = functools.partial(f, weights)
        report = gradient_report(jax.random.key(0), g, family(logits), methods, draws, batch_size=500)
        report.plot(axis)
        axis.set_title(title, fontsize=11)
    return figure
