"""Permutations: doubly stochastic matrices and sorted noise, with the nearest permutation matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _gradients as gr
from relaxit_jax import _math as lm
from relaxit_jax import _placement as pl
from relaxit_jax import _random as rng
from relaxit_jax._placement import where


def gumbel_sinkhorn(
    key: Array,
    logits: ArrayLike,
    tau: ArrayLike,
    num_iters: int = 100,
    *,
    shape: Sequence[int] | None = None,
    hard: bool = False,
) -> Array:
    """Sample a relaxed permutation matrix (Gumbel-Sinkhorn).

    ``Z = S((X + G) / tau)``, where X is the logits and ``S(A)`` is the matrix ``exp(A_ij + u_i + v_j)`` whose
    rows and columns sum to 1, the limit of normalizing rows and columns in turn (Sinkhorn). As tau falls, Z
    tends to the permutation P with the largest ``sum_ij P_ij (X + G)_ij``.

    At a low temperature, normalizing in turn needs tens of thousands of rounds. Here about twenty steps of
    Newton's method find the same v, on the convex dual ``sum_i LSE_j(A_ij + v_j) - sum_j v_j``, damped, and
    first at higher temperatures. The gradient is the gradient of the limit, by the implicit function theorem,
    however many steps were taken.

    Args:
      key: a JAX random key.
      logits: X, the weight of row i for column j, shape (..., n, n); -inf is impossible.
      tau: temperature, positive, of the batch shape (no axes for n).
      num_iters: maximum number of Newton steps. They end when the columns sum to 1 within 2e-5 (float64:
        1e-10). If the steps run out first, the columns sum to whatever was reached.
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return the best permutation matrix for the same noise, found by Optax's Hungarian algorithm, with
        the gradient of Z.

    Returns:
      Matrices of shape ``shape + (n, n)``, in the dtype of ``logits``; the rows sum to 1. Under a trace, NaN
      if no permutation is possible, or if entries of -inf leave this undecided after ``num_iters`` steps.
      Memory holds a few such matrices, also in the backward pass, whatever ``num_iters`` is; time is O(n^3)
      per step.

    Raises:
      ValueError: for a ``tau`` that is not positive or has axes for n, a ``num_iters`` that is not a positive
        integer, logits that are not square matrices of floating point or make every permutation impossible,
        or a ``shape`` the parameters do not broadcast to.

    References:
      G. Mena, D. Belanger, S. Linderman, J. Snoek (2018), Learning Latent Permutations with
      Gumbel-Sinkhorn Networks, arXiv:1802.08665; C. Brauer, C. Clason, D. Lorenz, B. Wirth (2017),
      A Sinkhorn-Newton method for entropic optimal transport, arXiv:1710.06635.

    >>> z = gumbel_sinkhorn(jax.random.key(0), jnp.zeros((3, 3)), 0.1)
    >>> z.sum(-1).round(4), z.sum(-2).round(4)
    (Array([1., 1., 1.], dtype=float32), Array([1., 1., 1.], dtype=float32))
    """
    arg.check_key(key)
    arg.require_flags(hard=hard)
    num_iters = arg.as_static_int("num_iters", num_iters, 1, 1_000_000)
    n = arg.require_classes(logits)
    arg.require_square("logits", logits, n)
    arg.require_values("logits", logits, "such that a permutation is possible", _has_permutation)
    dtype, logits = arg.widen(logits=logits)
    tau = arg.as_tau(tau, logits.dtype)
    shape = arg.batch_shape(shape, logits=logits.shape[:-2], per_event={"tau": tau.shape})
    # adding a constant to a row changes neither S nor the best permutation; lm.centre says why it is centered
    perturbed = rng.perturbed(key, logits, (*shape, n))
    z = _sinkhorn(num_iters, lm.over_tau(perturbed, tau[..., None, None]))
    if not hard:
        return z.astype(dtype)
    return gr.straight_through(_best_permutation(jax.lax.stop_gradient(perturbed)), z).astype(dtype)


def relaxed_permutation(
    key: Array, logits: ArrayLike, tau: ArrayLike, *, shape: Sequence[int] | None = None, hard: bool = False
) -> Array:
    """Sample a relaxed permutation of items with one logit each (SoftSort of perturbed logits).

    ``Z_ij = softmax_j(-|sort(s)_i - s_j| / tau)``, ``s = logits + G`` with G standard Gumbel noise and
    sort(s) decreasing. Row i is the item at place i. With ``hard`` the result is the permutation matrix of
    the decreasing order of s, which follows the Plackett-Luce law: the first item is drawn with probabilities
    softmax(logits), the next from the remaining items, and so on.

    Args:
      key: a JAX random key.
      logits: one per item, shape (..., n). At most one item may have -inf; it comes last.
      tau: temperature, positive, of the batch shape (no axis for n).
      shape: batch shape of the result; default: the parameters' broadcast shape.
      hard: return the permutation matrix for the same noise, with the gradient of Z.

    Returns:
      Matrices of shape ``shape + (n, n)``, in the dtype of ``logits``; the rows sum to 1, the columns only as
      tau falls. NaN if two traced logits are -inf. Time and memory are O(n^2).

    Raises:
      ValueError: for a ``tau`` that is not positive or has an axis for n, for logits that are not finite
        numbers of floating point, or a ``shape`` the parameters do not broadcast to.

    References:
      S. Prillo, J. Eisenschlos (2020), SoftSort: A Continuous Relaxation for the argsort Operator,
      arXiv:2006.16038; A. Grover, E. Wang, A. Zweig, S. Ermon (2019), Stochastic Optimization of Sorting
      Networks via Continuous Relaxations, arXiv:1903.08850, for the Gumbel noise.

    >>> relaxed_permutation(jax.random.key(0), jnp.array([0.0, 90.0, 45.0]), 0.5).round(4)
    Array([[0., 1., 0.],
           [0., 0., 1.],
           [1., 0., 0.]], dtype=float32)
    """
    arg.check_key(key)
    arg.require_flags(hard=hard)
    dtype, logits = _of_items(logits)
    tau = arg.as_tau(tau, logits.dtype)
    shape = arg.batch_shape(shape, logits=logits.shape[:-1], per_event={"tau": tau.shape})
    n = logits.shape[-1]
    perturbed = rng.perturbed(key, logits, shape)
    places, order = lm.top_k(perturbed, n)
    last_place, last = places == -jnp.inf, perturbed == -jnp.inf
    distances = -jnp.abs(where(last_place, 0, places)[..., :, None] - where(last, 0, perturbed)[..., None, :])
    distances = where(last_place[..., :, None] == last[..., None, :], distances, -jnp.inf)
    tau = jnp.broadcast_to(tau[..., None, None], (*shape, 1, 1))
    if not hard:
        return gr.softmax(distances, tau).astype(dtype)
    chosen = lm.is_class(order[..., None], logits)
    return gr.straight_through(chosen, gr.slope_of_softmax(distances, tau)).astype(dtype)


def relaxed_permutation_log_prob(value: ArrayLike, logits: ArrayLike) -> Array:
    """Log-probability of a permutation matrix that `relaxed_permutation` draws with ``hard``.

    ``log P = sum_i [l_(s_i) - LSE(l over the items from place i on)]``, where s_i is the item at place i (the
    Plackett-Luce law). The relaxed matrix has no density in closed form.

    Args:
      value: permutation matrices, shape (..., n, n); row i is the item at place i.
      logits: one per item, shape (..., n). At most one item may have -inf; it comes last.

    Returns:
      Log-probabilities of the broadcast batch shape, float32 or wider; -inf for a value that is not a
      permutation matrix. The slope in the value is the slope of the formula with ``value @ logits`` as the
      ordered logits.

    Raises:
      ValueError: for a ``value`` that is not of shape (..., n, n), or logits that are not floating point or
        -inf for more than one item.

    References:
      R. L. Plackett (1975), The Analysis of Permutations, Applied Statistics 24, doi:10.2307/2346567.

    >>> law = relaxed_permutation_log_prob(jnp.eye(3), jnp.log(jnp.array([1.0, 2.0, 3.0])))
    >>> print(f"{jnp.exp(law):.4f}")  # 1 / 6 * 2 / 5
    0.0667
    """
    _, logits = _of_items(logits)
    given, n = arg.as_number("value", value), logits.shape[-1]
    arg.require_square("value", given, n)
    batch = arg.batch_shape(None, value=given.shape[:-2], logits=logits.shape[:-1])
    value = pl.placed(jnp.broadcast_to(given.astype(logits.dtype), (*batch, n, n)), logits)
    logits = pl.placed(jnp.broadcast_to(lm.centre(logits), (*batch, n)), value[..., 0])
    whole = jnp.all((value == 0) | (value == 1), (-1, -2))
    whole &= jnp.all(jnp.sum(value, -1) == 1, -1) & jnp.all(jnp.sum(value, -2) == 1, -1)
    value = where(whole[..., None, None], value, jnp.eye(n, dtype=value.dtype))
    last = logits == -jnp.inf
    never = -1e30  # stands for -inf, where a cumulative log-sum-exp has NaN gradients
    ordered = jnp.sum(value * where(last, 0, logits)[..., None, :], -1)
    ordered += where(jnp.any((value > 0) & last[..., None, :], -1), never, 0)
    later = jax.lax.cumlogsumexp(ordered, axis=ordered.ndim - 1, reverse=True)
    law = jnp.sum(ordered - later, -1)
    law = lm.show_nan(where(whole & (law > never / 2), law, -jnp.inf), event=(logits,))
    return law + where(jnp.any(jnp.isnan(given), (-1, -2)), jnp.nan, 0).astype(law.dtype)


def _of_items(logits):
    """The dtype of a result, and logits in float32 or wider; NaN if two items would certainly be last."""
    arg.require_classes(logits, at_least=arg.require_event("logits", logits) - 1)
    dtype, logits = arg.widen(logits=logits)
    several = jnp.sum(logits == -jnp.inf, -1, keepdims=True) > 1
    return dtype, logits + where(several, jnp.nan, 0)


def _has_permutation(logits):
    """Whether every matrix has a permutation that avoids -inf. SciPy raises an error if it does not."""
    from scipy.optimize import (
        linear_sum_assignment,
    )  # SciPy is a dependency of jax; not imported at the top

    blocked = np.asarray(logits, np.float64) == -np.inf
    if not blocked.any():
        return True
    for matrix in blocked.reshape(-1, *blocked.shape[-2:]):
        try:
            linear_sum_assignment(np.where(matrix, np.inf, 0.0))
        except ValueError:
            return False
    return True


def _best_permutation(weights):
    """The permutation matrix with the largest total weight, NaN if none is possible."""
    from optax.assignment import hungarian_algorithm  # imported here because nothing else needs it

    n = weights.shape[-1]

    def best(weights):
        possible = weights > -jnp.inf
        # one forbidden place costs more than all others together can gain, and is still finite
        worst = jnp.min(where(possible, weights, 0)) - n * (jnp.ptp(where(possible, weights, 0)) + 1)
        rows, columns = hungarian_algorithm(-where(possible, weights, worst))
        chosen = jnp.zeros_like(weights).at[rows, columns].set(1)
        return where(jnp.any((chosen == 1) & ~possible), jnp.nan, chosen)

    return pl.whole(jnp.vectorize(best, signature="(n,n)->(n,n)"), weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _sinkhorn(num_iters, a):
    """S(A) of a batch of matrices."""
    return pl.whole(jnp.vectorize(functools.partial(_scale, num_iters), signature="(n,n)->(n,n)"), a)


@_sinkhorn.defjvp
def _sinkhorn_jvp(num_iters, primals, tangents):
    p = _sinkhorn(num_iters, *primals)
    # dP = P (dA + du + dv), where du keeps the rows at 1 and dv the columns
    slope = gr.softmax_tangent(p, tangents[0])
    dv = _solve_dual(p, -jnp.sum(slope, -2))
    return p, slope + gr.softmax_tangent(p, dv[..., None, :])


def _solve_dual(p, x):
    """H^-1 x, where H = diag(c) - P^T P is the Hessian of the dual, for columns c that sum to 1.

    Its rows then sum to 0: it is the Laplacian of a graph, whose diagonal comes from its other entries,
    however small. A tiny multiple of the identity makes it definite where all of P except a permutation has
    vanished and nothing is left to move.
    """
    weights = jnp.einsum("...ij,...ik->...jk", p, p, precision="highest")
    n, eps = p.shape[-1], jnp.finfo(p.dtype).eps
    weights = where(jnp.eye(n, dtype=bool), 0, weights)
    diagonal = jnp.sum(weights, -1) + 10 * eps
    laplacian = where(jnp.eye(n, dtype=bool), diagonal[..., None], -weights)
    return jnp.linalg.solve(laplacian, x[..., None])[..., 0]


def _scale(num_iters, a):
    """S(A) of one matrix.

    Newton's step is damped by log(1 + d) / d, where d is the range of the step; with this damping a function
    as smooth as this one always decreases (T. Sun, Q. Tran-Dinh, 2019, Generalized Self-Concordant Functions,
    arXiv:1703.04599). It starts where all of A is within 10 of the largest entry in its row, and doubles A
    when the columns are roughly right: each v is nearly right for the next, and more so if it continues in
    the direction of the last change. v is the sum of two numbers, because one float32 of its size resolves
    the columns only to 1e-4.
    """
    possible = a > -jnp.inf
    spread = jnp.max(where(possible, jnp.max(a, -1, keepdims=True) - a, 0))
    close = 2e-5 if a.dtype == jnp.float32 else 1e-10

    def matrix(scale, v, low):
        x, lost = lm.two_sum(a, v)
        x = (x - jnp.max(x, -1, keepdims=True)) + (lost + low)
        weights = where(possible, jnp.exp(scale * x), 0)
        return weights / jnp.sum(weights, -1, keepdims=True)

    def unfinished(state):
        *_, done, steps = state
        return ~done & (steps < num_iters)

    def newton(state):
        v, low, before, scale, _, steps = state
        p = matrix(scale, v, low)
        columns = jnp.sum(p, -2)
        error = jnp.max(jnp.abs(columns - 1))
        step = _solve_dual(p, 1 - columns)
        d = jnp.ptp(step)
        step *= where(d > 0, jnp.log1p(d) / where(d > 0, d, 1), 1) / scale
        done = (scale == 1) & (error < close)
        larger = where(error < 0.5, jnp.minimum(2 * scale, 1), scale)
        ahead = where(larger > scale, 0.7 * scale / larger * (v + step - before), 0)
        before = where(larger > scale, v + step, before)
        v, lost = lm.two_sum(v, step + ahead)
        return v, low + lost, before, larger, done, steps + 1

    scale = jnp.minimum(10 / jnp.maximum(spread, 1), 1)
    zeros = jnp.zeros_like(a[0])
    start = zeros, zeros, zeros, scale, pl.vary_as(jnp.array(False), a), 0
    v, low, *_ = jax.lax.while_loop(unfinished, newton, start)
    p = matrix(1, v, low)
    lacking = jnp.max(1 - jnp.sum(p, -2)) * p.shape[-1] > 0.5  # by Hall's theorem, no permutation is possible
    return where(jnp.all(possible) | ~lacking, p, jnp.nan)
