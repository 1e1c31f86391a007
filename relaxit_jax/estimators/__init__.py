"""Unbiased gradients of an expectation over discrete draws, E f(b).

Call ``estimator(key, f, q, **options)``, where ``f`` maps an array of ``q.shape`` to one of
``q.batch_shape``. The result is an unbiased value of E f(b), of shape ``q.batch_shape``. `jax.grad` of its
sum is an unbiased gradient in everything that f and the logits of q depend on. You can differentiate it
again: derivatives of every order are unbiased too, mixed ones included.
"""

from relaxit_jax.estimators._antithetic import arm, arms, disarm
from relaxit_jax.estimators._control_variate import rebar, relax, value_and_grads
from relaxit_jax.estimators._families import Bernoulli, OneHotCategorical
from relaxit_jax.estimators._joint import LinearChain, PlackettLuce, SpanningTree, Subset
from relaxit_jax.estimators._multi_sample import vimco
from relaxit_jax.estimators._score import exact, reinforce, rloo
from relaxit_jax.estimators._without_replacement import from_set, unordered_set

__all__ = [
    "Bernoulli",
    "LinearChain",
    "OneHotCategorical",
    "PlackettLuce",
    "SpanningTree",
    "Subset",
    "arm",
    "arms",
    "disarm",
    "exact",
    "from_set",
    "rebar",
    "reinforce",
    "relax",
    "rloo",
    "unordered_set",
    "value_and_grads",
    "vimco",
]
