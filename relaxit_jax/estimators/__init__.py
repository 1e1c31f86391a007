"""Unbiased gradients of an expectation over discrete draws, E f(b).

``estimator(key, f, q, **options)`` returns an array of ``q.batch_shape``, an unbiased value of E f(b),
and `jax.grad` of its sum is an unbiased gradient for all that the logits of q and f depend on. The gradient
can be differentiated again: derivatives of every order, mixed ones included, are unbiased too. ``f`` maps an
array of ``q.shape`` to one of ``q.batch_shape``.
"""

from relaxit_jax.estimators._antithetic import arm, disarm
from relaxit_jax.estimators._control_variate import rebar, relax, value_and_grads
from relaxit_jax.estimators._families import Bernoulli, OneHotCategorical
from relaxit_jax.estimators._score import exact, reinforce, rloo

__all__ = [
    "Bernoulli",
    "OneHotCategorical",
    "arm",
    "disarm",
    "exact",
    "rebar",
    "reinforce",
    "relax",
    "rloo",
    "value_and_grads",
]
