"""Relaxed counts and other numbers from a finite list of values."""

import jax
import jax.numpy as jnp
import numpy as np

from relaxit_jax import _checks as ck
from relaxit_jax import _numerics as nm


def generalized_gumbel_softmax(key, logits, values, tau, *, shape=None, hard=False):
    """A relaxed draw of a number from a finite list: generalized Gumbel-softmax.

    ``w = softmax((logits + G) / tau)``, with G standard Gumbel noise; ``z = sum_k w_k values_k``.
    Counts without a largest value (Poisson, geometric) are truncated first, where what is left out
    no longer matters.

    Args:
      key: a JAX random key.
      logits: unnormalised log-probabilities of the values, shape (..., K); -inf is an impossible
        value.
      values: the K finite numbers, shape (..., K), in the units of what they count.
      tau: temperature, positive, of the batch shape (no axis for K).
      shape: batch shape of the result; default: that of the broadcast parameters.
      hard: return the value at ``argmax(logits + G)``, an exact draw, with the gradient of z.

    Returns:
      Numbers of shape ``shape``, between the smallest and the largest value, in the promoted dtype
      of ``logits`` and ``values``.

    Raises:
      ValueError: for a ``tau`` that is not positive, a dtype that is not floating point, logits
        without a class axis or all -inf, ``values`` that are not finite or not as many as the
        logits, or a ``shape`` the parameters do not broadcast to.

    References:
      W. Joo, D. Kim, S. Shin, I.-C. Moon (2020), Generalized Gumbel-Softmax Gradient Estimator for
      Generic Discrete Random Variables, arXiv:2003.01847.

    >>> logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    >>> generalized_gumbel_softmax(jax.random.key(0), logits, jnp.arange(3.0), 0.1, hard=True)
    Array(1., dtype=float32)
    """
    ck.check_key(key)
    ck.require_classes(logits)
    ck.require_event("values", values)
    ck.require_values("values", values, "finite", np.isfinite)
    dtype, logits, values = ck.widen(logits=logits, values=values)
    classes = logits.shape[-1]
    need = f"of shape (..., {classes}), as logits is"
    ck.require(values.shape[-1] == classes, "values", need, f"shape {values.shape}")
    tau = ck.as_tau(tau, logits.dtype)
    batch = {"logits": logits.shape[:-1], "values": values.shape[:-1], "tau": tau.shape}
    shape = ck.batch_shape(shape, **batch)
    perturbed = nm.centre(logits) + nm.gumbel(key, (*shape, classes), logits.dtype)
    weights = jax.nn.softmax(nm.over_tau(perturbed, tau[..., None]))
    soft = jnp.sum(weights * values, -1)
    if not hard:
        return soft.astype(dtype)
    winner = jnp.argmax(perturbed, -1)[..., None]
    exact = jnp.take_along_axis(jnp.broadcast_to(values, perturbed.shape), winner, -1)[..., 0]
    return nm.straight_through(exact, soft).astype(dtype)
