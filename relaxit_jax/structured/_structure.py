"""Relaxed draws of any structure with a known log-partition function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import _random as rng


def relaxed_structure(
    key: Array,
    log_partition: Callable[[Any], ArrayLike],
    potentials: Any,
    tau: ArrayLike,
    *,
    shape: Sequence[int] | None = None,
) -> Any:
    """Sample a relaxed structure from its log-partition function alone (stochastic softmax trick).

    ``z = grad A((theta + G) / tau)``, where A is the log-partition function, theta the potentials and G
    standard Gumbel noise on each of them. With ``A(theta) = log sum_k exp(theta_k)`` this is Gumbel-softmax;
    with the function of chains, trees, subsets or matchings it is their relaxation. As tau falls, z tends to
    the structure with the largest ``<theta + G, x>``.

    Args:
      key: a JAX random key.
      log_partition: A, a function from the potentials to an array of the batch shape, twice differentiable in
        JAX: ``log sum_x exp(<theta, x>)`` over the structures x.
      potentials: theta, an array or a pytree of arrays, each with the batch shape first; -inf forbids, if A
        has a finite gradient there.
      tau: temperature, positive, of the batch shape.
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      A pytree with the structure and dtypes of ``potentials``: points of the convex hull of the structures,
      each leaf with ``shape`` and its own event axes.

    Raises:
      ValueError: for potentials that are not floating point or do not have the batch shape of A first, for a
        ``log_partition`` that is not a function or whose values are not floating point, a ``tau`` that is not
        positive, or a ``shape`` that the parameters do not broadcast to.

    References:
      M. B. Paulus, D. Choi, D. Tarlow, A. Krause, C. J. Maddison (2020), Gradient Estimation with Stochastic
      Softmax Tricks, arXiv:2006.08063.

    >>> z = relaxed_structure(jax.random.key(0), jax.nn.logsumexp, jnp.array([0.0, 1.0, 2.0]), 0.5)
    >>> print(f"{z.sum():.4f}")
    1.0000
    """
    arg.check_key(key)
    arg.require(callable(log_partition), "log_partition", "a function", arg.shown(log_partition))
    leaves, tree = jax.tree.flatten(potentials)
    arg.require(leaves, "potentials", "an array, or a pytree of arrays", arg.shown(potentials))
    leaves = [arg.as_float("potentials", x) for x in leaves]
    wide = [x.astype(arg.wide(x.dtype)) for x in leaves]
    total = jax.eval_shape(log_partition, tree.unflatten(wide))
    need = "a function whose value is one array of floating point, of the batch shape"
    good = hasattr(total, "shape") and jnp.issubdtype(total.dtype, jnp.floating)
    arg.require(good, "log_partition", need, f"a function to {arg.shown(total)}")
    batch = total.shape
    for x in wide:
        need = f"of the batch shape {batch} of log_partition first"
        arg.require(x.shape[: len(batch)] == batch, "potentials", need, f"shape {x.shape}")
    tau = arg.as_tau(tau, arg.wide(total.dtype))
    shape = arg.batch_shape(shape, potentials=batch, per_event={"tau": tau.shape})

    perturbed = []
    for x, own in zip(wide, jax.random.split(key, len(wide)), strict=True):
        noise = rng.gumbel(own, (*shape, *x.shape[len(batch) :]), x)
        ratio = tau.reshape(*tau.shape, *[1] * (x.ndim - len(batch))).astype(x.dtype)
        perturbed.append(lm.over_tau(x + noise, ratio))
    gradient = jax.grad(lambda theta: jnp.sum(log_partition(theta)))(tree.unflatten(perturbed))
    return jax.tree.map(lambda z, x: z.astype(x.dtype), gradient, tree.unflatten(leaves))
