"""Estimators, families and functions whose exact gradients are a sum over all outcomes."""

import functools

import jax.numpy as jnp
import numpy as np

from relaxit_jax import estimators as es

FORMS = np.random.default_rng(7)


BITS = np.array([[0.3, -1.0, 0.5, 2.0], [-0.5, 0.2, 0.0, 1.0]], np.float32)


CLASSES = FORMS.normal(size=(2, 2, 3)).astype(np.float32)


COUPLING = {4: FORMS.normal(size=(4, 4)), 6: FORMS.normal(size=(6, 6))}


COUPLING[5] = FORMS.normal(size=(5, 5))
ONE_CLASS = FORMS.normal(size=(2, 5)).astype(np.float32)


class OneVariable(es.OneHotCategorical):
    """One variable for each call of f."""

    def __init__(self, logits, event_ndims=1):
        super().__init__(logits, event_ndims)


FAMILIES = {
    "bits": (es.Bernoulli, BITS),
    "classes": (es.OneHotCategorical, CLASSES),
    "one class": (OneVariable, ONE_CLASS),
}


def interacting(weight, event_ndims):
    """A smooth function, far from quadratic, with interactions between variables and a nonzero mean."""

    def f(b):
        x = b.reshape(*b.shape[: b.ndim - event_ndims], -1)
        pairs = jnp.einsum("...i,ij,...j->...", x, COUPLING[x.shape[-1]].astype(np.float32), x)
        return 1 + jnp.tanh(pairs + weight * x[..., 0])

    return f


def network(z):
    return jnp.sum(jnp.tanh(z - 0.3), tuple(range(1, z.ndim))) / 4


ESTIMATORS = {
    "reinforce": es.reinforce,
    "baseline": functools.partial(es.reinforce, baseline=np.float32([0.5, 0.4])),
    "rloo": es.rloo,
    "rloo_5": functools.partial(es.rloo, num_samples=5),
    "arm": es.arm,
    "disarm": es.disarm,
    "arms": es.arms,
    "arms_5": functools.partial(es.arms, num_samples=5),
    "rebar": es.rebar,
    "rebar_tuned": functools.partial(es.rebar, tau=1.3, eta=0.6),
    "relax": functools.partial(es.relax, control_variate=network),
    "unordered_set": es.unordered_set,
    "unordered_set_4": functools.partial(es.unordered_set, num_samples=4),
}


OF_BITS = ("arm", "disarm")
OF_ONE = ("unordered_set", "unordered_set_4")


def takes(name, family):
    if name in OF_ONE:
        return family == "one class"
    return family == "bits" or (family == "classes" and name not in OF_BITS)


PAIRS = [(e, f) for e in ESTIMATORS for f in FAMILIES if takes(e, f)]
