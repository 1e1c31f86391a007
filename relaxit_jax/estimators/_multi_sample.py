"""Bounds that use several draws together, and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax.estimators import _estimate as es


def vimco(
    key: Array,
    log_joint: Callable[[Array], Any],
    q: es.Family,
    *,
    num_samples: int = 2,
    has_aux: bool = False,
) -> Any:
    """Estimate the multi-sample bound on log p(x), with a leave-one-out baseline for each draw (VIMCO).

    With ``w_k = p(x, b_k) / q(b_k)`` and draws ``b_k ~ q``, the value is ``L = log mean_k w_k``. Its mean is
    at most log p(x) and rises with K. Its gradient is the gradient of L with the draws held fixed, through
    log_joint and through log q in the weights, plus ``sum_k (L - L_k) grad log q(b_k)``. L_k is L with w_k
    replaced by the geometric mean of the others. log_joint is called K times, batched under `jax.vmap`.

    Args:
      key: a JAX random key.
      log_joint: from a sample of shape ``q.shape`` to log p(x, b) of shape ``q.batch_shape``. It may be
        -inf where the model has no mass.
      q: `Bernoulli` or `OneHotCategorical`.
      num_samples: K, a Python integer, 2 or more.
      has_aux: whether log_joint returns ``(value, aux)``, as f does in `reinforce`.

    Returns:
      L, of shape ``q.batch_shape``, with that gradient; with ``has_aux`` a pair of it and the aux of the
      first draw.

    Raises:
      ValueError: for a log_joint as f in `reinforce`, or a ``num_samples`` that is not an integer above 1.

    References:
      A. Mnih, D. J. Rezende (2016), Variational Inference for Monte Carlo Objectives, arXiv:1602.06725.
      Y. Burda, R. Grosse, R. Salakhutdinov (2016), Importance Weighted Autoencoders, arXiv:1509.00519, for
      the bound.

    For two bits, at least one of which is on: the bounds with 4 and with 50 draws, below log p(x) = log(3 /
      4):

    >>> from relaxit_jax.estimators import Bernoulli
    >>> log_joint = lambda b: jnp.where(b.sum(-1) > 0, jnp.log(0.25), -jnp.inf)
    >>> q = Bernoulli(jnp.ones((10_000, 2)))  # a batch, for its mean
    >>> bound = lambda k: vimco(jax.random.key(0), log_joint, q, num_samples=k).mean()
    >>> print(f"{bound(4):.2f} {bound(50):.2f} {jnp.log(0.75):.2f}")
    -0.33 -0.29 -0.29
    """
    arg.check_key(key)
    es.check(q, has_aux=has_aux, log_joint=log_joint)
    k = arg.as_num_samples(num_samples, 2)
    samples = q.sample(key, (k,))
    log_p, aux = es.call(log_joint, q, samples, "log_joint", has_aux=has_aux, finite=False)
    log_q = q.log_prob(samples)
    log_w = log_p.astype(log_q.dtype) - log_q
    bound, others = lm.leave_one_out_bounds(log_w)
    # At nearby parameters, the draws are weighted by the ratio of their probabilities there and here. A
    # baseline is weighted by the ratio of the other draws alone, so its mean is 0 there too.
    all_draws = es.likelihood_ratio(jnp.sum(log_q, 0))
    all_but_one = es.likelihood_ratio(lm.sum_of_others(log_q))
    value = all_draws * bound - jnp.sum((all_draws - all_but_one) * others, 0)
    return es.with_aux(value.astype(log_p.dtype), aux, has_aux)
