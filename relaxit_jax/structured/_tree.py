"""Spanning trees of weighted graphs, by eliminating one node after another.

Eliminating node v from a graph with log-weights w leaves a graph of the others in which i and j are joined by
``log(exp(w_ij) + exp(a_i + a_j - s))``, where a are the log-weights at v and ``s = log sum_i exp(a_i)``.
Summed over all spanning trees, the weights of the first graph are exp(s) times those of the second. This is
Gaussian elimination of the Laplacian without a subtraction: every number is a sum of positive terms, so each
is right to rounding in log space, however far apart the weights are.
"""

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


def tree_log_partition(weights: ArrayLike) -> Array:
    """Compute the log-partition function of spanning trees, the log-sum over all trees of a graph.

    ``A = log sum_T exp(sum_(ij in T) w_ij)``, the log-determinant of the reduced Laplacian of exp(w) (the
    matrix-tree theorem). Its gradient in the upper triangle of w is the probability of each edge.

    Args:
      weights: log-weights of the edges, shape (..., n, n), n at least 2; the upper triangle counts, and -inf
        is an edge that does not exist.

    Returns:
      An array of the batch shape, float32 or wider. It is -inf, with gradient 0, if no tree is possible
      because the graph is not connected. Time is O(n^3) in n - 1 steps; its gradient keeps n matrices.

    Raises:
      ValueError: for weights that are not floating point or not square matrices of at least two nodes.

    References:
      G. Kirchhoff (1847), Annalen der Physik 148, doi:10.1002/andp.18471481202; W. K. Grassmann, M. I.
      Taksar, D. P. Heyman (1985), Regenerative Analysis and Steady State Distributions for Markov Chains,
      doi:10.1287/opre.33.5.1107, for elimination without subtractions.

    >>> print(f"{jnp.exp(tree_log_partition(jnp.zeros((5, 5)))):.1f}")  # Cayley: 5^3
    125.0
    """
    _, edges = as_edges(weights)
    return _log_partition(edges)


def tree_marginals(weights: ArrayLike) -> Array:
    """Compute the probability that each edge is in a spanning tree.

    ``mu_ij = P(ij in T) = dA / dw_ij``, where A is the log-partition function.

    Args:
      weights: log-weights of the edges, shape (..., n, n); the upper triangle counts, and -inf is an edge
        that is not there.

    Returns:
      Symmetric matrices with the shape and dtype of ``weights``; the upper triangle sums to n - 1. NaN under
      a trace if no tree is possible.

    Raises:
      ValueError: as for `tree_log_partition`, and for a graph that is not connected.

    References:
      G. Kirchhoff (1847), doi:10.1002/andp.18471481202.

    >>> print(f"{tree_marginals(jnp.zeros((4, 4)))[0, 1]:.4f}")  # three of six edges
    0.5000
    """
    dtype, edges = as_edges(weights, possible=True)
    lawful = _log_partition(edges) > -jnp.inf
    return where(lawful[..., None, None], _marginals(edges), jnp.nan).astype(dtype)


def tree_sample(key: Array, weights: ArrayLike, *, shape: Sequence[int] | None = None) -> Array:
    """Sample a spanning tree exactly, as an adjacency matrix with the gradient of the marginals.

    ``P(T) = exp(sum_(ij in T) w_ij - A)``. A tree of two nodes is drawn, and the others are put back in the
    reverse order of their elimination, each in O(n log n). There is no random walk, so the cost is the same
    for all weights. The gradient is the gradient of `tree_marginals`.

    Args:
      key: a JAX random key.
      weights: log-weights of the edges, shape (..., n, n); the upper triangle counts, and -inf is an edge
        that is not there.
      shape: batch shape of the result; default: the shape of ``weights``.

    Returns:
      Symmetric adjacency matrices of shape ``shape + (n, n)``, in the dtype of ``weights``; NaN under a trace
      if no tree is possible. Memory holds n matrices for each element of the batch of ``weights``, and two
      for each draw.

    Raises:
      ValueError: as for `tree_marginals`, and for a ``shape`` that the weights do not broadcast to.

    References:
      D. Durfee, R. Kyng, J. Peebles, A. B. Rao, S. Sachdeva (2017), Sampling Random Spanning Trees Faster
      than Matrix Multiplication, arXiv:1611.07451, for draws by elimination; M. B. Paulus, D. Choi, D.
      Tarlow, A. Krause, C. J. Maddison (2020), arXiv:2006.08063.

    >>> path = jnp.array([[0.0, 50.0, 0.0], [0.0, 0.0, 50.0], [0.0, 0.0, 0.0]])
    >>> tree_sample(jax.random.key(0), path)
    Array([[0., 1., 0.],
           [1., 0., 1.],
           [0., 1., 0.]], dtype=float32)
    """
    arg.check_key(key)
    dtype, edges = as_edges(weights, possible=True)
    shape = arg.batch_shape(shape, weights=edges.shape[:-2])
    edges = edges.reshape((1,) * (len(shape) + 2 - edges.ndim) + edges.shape)
    drawn = _drawn(shape, key, jax.lax.stop_gradient(edges))
    soft = jnp.broadcast_to(_slope_of_marginals(edges), drawn.shape)
    return gr.straight_through(drawn, soft).astype(dtype)


def tree_log_prob(value: ArrayLike, weights: ArrayLike) -> Array:
    """Log-probability of a spanning tree.

    ``log P(T) = sum_(ij in T) w_ij - A``. It is the log-determinant of a Laplacian in which the row of each
    node is divided by the weight of its edge to its parent. Leaves are eliminated first, so all terms have
    the same sign.

    Args:
      value: adjacency matrices of zeros and ones, shape (..., n, n); the upper triangle counts.
      weights: log-weights of the edges, shape (..., n, n); the upper triangle counts.

    Returns:
      Log-probabilities of the broadcast batch shape, float32 or wider; -inf for anything but a spanning tree
      of existing edges, NaN under a trace if no tree is possible. The gradient in the weights is the tree
      minus the marginals; the gradient in the value is the weights.

    Raises:
      ValueError: as for `tree_marginals`, and for a ``value`` with a different number of nodes.

    References:
      G. Kirchhoff (1847), doi:10.1002/andp.18471481202.

    >>> path = jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> print(f"{jnp.exp(tree_log_prob(path, jnp.zeros((3, 3)))):.4f}")
    0.3333
    """
    _, edges = as_edges(weights, possible=True)
    given, n = arg.as_number("value", value), edges.shape[-1]
    arg.require_square("value", given, n)
    batch = arg.batch_shape(None, value=given.shape[:-2], weights=edges.shape[:-2])
    value = _mirrored(given.astype(edges.dtype), 0)
    value = pl.placed(jnp.broadcast_to(value, (*batch, n, n)), edges)
    edges = pl.placed(jnp.broadcast_to(edges, (*batch, n, n)), value)
    law = _log_prob(value, edges)
    law = where(_log_partition(edges) > -jnp.inf, law, jnp.nan)
    return law + where(jnp.any(jnp.isnan(value), (-1, -2)), jnp.nan, 0).astype(law.dtype)


def relaxed_tree(
    key: Array, weights: ArrayLike, tau: ArrayLike, *, shape: Sequence[int] | None = None
) -> Array:
    """Sample a relaxed spanning tree (stochastic softmax trick).

    ``z = mu((w + G) / tau)``, where mu is the marginals and G is standard Gumbel noise on each edge. As tau
    falls, z tends to the spanning tree with the largest weight under the same noise. This law differs from
    the law of `tree_sample`: the noise is on the edges, not on each tree.

    Args:
      key: a JAX random key.
      weights: log-weights of the edges, shape (..., n, n); the upper triangle counts, and -inf is an edge
        that is not there.
      tau: temperature, positive, of the batch shape (no axes for n).
      shape: batch shape of the result; default: the parameters' broadcast shape.

    Returns:
      Symmetric matrices in the convex hull of the spanning trees, shape ``shape + (n, n)``, in the dtype of
      ``weights``; the upper triangle sums to n - 1. NaN under a trace if no tree is possible.

    Raises:
      ValueError: as for `tree_sample`, and for a ``tau`` that is not positive or has axes for n.

    References:
      M. B. Paulus, D. Choi, D. Tarlow, A. Krause, C. J. Maddison (2020), Gradient Estimation with Stochastic
      Softmax Tricks, arXiv:2006.08063.

    >>> z = relaxed_tree(jax.random.key(0), jnp.zeros((5, 5)), 0.5)
    >>> print(f"{z.sum() / 2:.4f}")
    4.0000
    """
    arg.check_key(key)
    dtype, edges = as_edges(weights, possible=True)
    tau = arg.as_tau(tau, edges.dtype)
    shape = arg.batch_shape(shape, weights=edges.shape[:-2], per_event={"tau": tau.shape})
    noise = rng.gumbel(key, (*shape, *edges.shape[-2:]), edges)
    top = _finite(jax.lax.stop_gradient(jnp.max(edges, (-1, -2), keepdims=True)))
    perturbed = lm.over_tau(_mirrored(edges - top + noise, -jnp.inf), tau[..., None, None])
    lawful = _log_partition(perturbed) > -jnp.inf
    return where(lawful[..., None, None], _marginals(perturbed), jnp.nan).astype(dtype)


# --- arguments ------------------------------------------------------------------------------------


def as_edges(weights, *, possible=False):
    """The dtype of a result, and the symmetric log-weights in float32 or wider, with -inf on the diagonal."""
    shape = arg.shape_of("weights", weights)
    good = len(shape) > 1 and shape[-1] == shape[-2] > 1
    arg.require(good, "weights", "of shape (..., n, n), n at least 2", f"shape {shape}")
    arg.require_values("weights", weights, "below inf", lambda x: ~(x == np.inf))
    if possible:
        arg.require_values("weights", weights, "such that the graph is connected", _is_connected)
    dtype, weights = arg.widen(weights=weights)
    return dtype, _mirrored(weights, -jnp.inf)


def _mirrored(x, diagonal):
    """The symmetric matrix with the upper triangle of x."""
    n = x.shape[-1]
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    return where(i < j, x, where(i > j, jnp.matrix_transpose(x), diagonal))


def _is_connected(weights):
    there = np.triu(np.asarray(weights, float) != -np.inf, 1)
    if there[..., *np.triu_indices(there.shape[-1], 1)].all():
        return True
    there = there | np.swapaxes(there, -1, -2)
    reached = np.zeros(there.shape[:-1], bool)
    reached[..., 0] = True
    for _ in range(there.shape[-1] - 1):
        reached |= (reached[..., None] & there).any(-2)
    return reached.all(-1)


def _finite(x):
    return where(x == -jnp.inf, 0, x)


# --- elimination ----------------------------------------------------------------------------------


@jax.custom_jvp
def _eliminate(edges, out, into):
    """The graph without a node, and s: `out` has the log-weights from it, `into` the log-weights to it.

    Both are the same in a symmetric graph. In both, nodes that were eliminated before are -inf.
    """
    s = lm.log_sum_exp(out)
    through = _through(out, into, s)
    top = jnp.maximum(edges, through)
    low = jnp.minimum(edges, through)
    larger = _finite(top)
    return where(top == -jnp.inf, -jnp.inf, larger + jnp.log1p(jnp.exp(low - larger))), s


@_eliminate.defjvp
def _eliminate_jvp(primals, tangents):
    (edges, out, into), (edges_dot, out_dot, into_dot) = primals, tangents
    left, s = _eliminate(*primals)
    s_dot = jnp.sum(_share(out, s[..., None]) * out_dot, -1)
    kept, new = _share(edges, left), _share(_through(out, into, s), left)
    slope = into_dot[..., :, None] + out_dot[..., None, :] - s_dot[..., None, None]
    return (left, s), (kept * edges_dot + new * slope, s_dot)


def _through(out, into, s):
    """The log-weights of the edges i -> j through the eliminated node; none from a node to itself."""
    itself = jnp.eye(out.shape[-1], dtype=bool)
    x = into[..., :, None] + (out - _finite(s)[..., None])[..., None, :]
    return where(itself, -jnp.inf, x)


def _share(x, total):
    """exp(x - total), 0 where x is -inf."""
    never = x == -jnp.inf
    return where(never, 0, jnp.exp(where(never, 0, x - _finite(total))))


# Nothing of a step is kept for the backward pass but the graph before it.
_lean = functools.partial(jax.checkpoint, prevent_cse=False)


@_lean
def _without(edges, v):
    """The graph without node v, and s."""
    gone = jnp.arange(edges.shape[-1]) == v
    left, s = _eliminate(edges, _node(edges, v, -2), _node(edges, v, -1))
    return where(gone[:, None] | gone, -jnp.inf, left), s


@_lean
def _back(slope, edges, v, slope_of_s):
    """The slope in a graph of what has these slopes in the graph without node v, and in s."""
    return jax.vjp(lambda edges: _without(edges, v), edges)[1]((slope, slope_of_s))[0]


def _eliminated(edges):
    """Eliminate all nodes but the last, one after another: s for each, and the graph before each."""

    def visit(edges, v):
        left, s = _without(edges, v)
        return left, (s, edges)

    last, (s, graphs) = jax.lax.scan(visit, edges, jnp.arange(edges.shape[-1] - 1))
    return s, graphs, last


def _node(x, v, axis):
    return jax.lax.dynamic_index_in_dim(x, v, x.ndim + axis, keepdims=False)


@jax.jit
def _log_partition(edges):
    s = _eliminated(edges)[0]
    apart = jnp.any(s == -jnp.inf, 0)
    value = where(apart, -jnp.inf, jnp.sum(_finite(s), 0))
    hidden = jnp.any(jnp.isnan(edges), (-1, -2))
    return where(hidden, jnp.nan, value)


@jax.jit
def _marginals(edges):
    """The gradient of the log-partition in steps that keep two graphs each where they are differentiated."""
    s, graphs, last = _eliminated(edges)
    lawful = where(jnp.any(s == -jnp.inf, 0), 0, 1).astype(edges.dtype)
    visit = lambda slope, step: (_back(slope, *step, lawful), None)
    slope, _ = jax.lax.scan(visit, 0 * _finite(last), (graphs, jnp.arange(len(graphs))), reverse=True)
    return slope + jnp.matrix_transpose(slope)


@jax.custom_jvp
def _slope_of_marginals(edges):
    """An unused value, NaN where there is no law, with the derivative of the marginals."""
    value = where(_log_partition(edges) > -jnp.inf, 0, jnp.nan)[..., None, None]
    return jnp.broadcast_to(value, edges.shape).astype(edges.dtype)


@_slope_of_marginals.defjvp
def _slope_of_marginals_jvp(primals, tangents):
    value = _slope_of_marginals(*primals)
    return value, pl.placed(jax.jvp(_marginals, primals, tangents)[1], value)


# --- draws ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _drawn(shape, key, edges):
    """Adjacency matrices; the tree is held as the parent of each node, and the last node is the root.

    Let T' be a tree of the graph without v. Each of its edges i -> parent is one of the two that were joined
    in the elimination: the edge itself, or the path through v, in proportion to their weights. In the second
    case the parent of i becomes v. The parent of v is drawn, in proportion to the weights at v, from the
    nodes whose path to the root does not go through v.

    This has the right law. Given the edges that stay and the children D of v, sum over the trees T' from
    which they come: exp(w) of the edges that stay, times prod_(i in D) a_i / S, times the sum over the
    targets of D that leave no cycle, A_0 S^(|D| - 1) with A_0 the weight at v of the nodes left to choose
    from, and S of all (Cayley). That is A_0 prod_(i in D) a_i / S: up to the factor S of the elimination, the
    trees of the graph with v.
    """
    n = edges.shape[-1]
    uniform_key, race_key = jax.random.split(key)
    shares = rng.tail_uniform(uniform_key, (*shape, n - 1, n), edges)
    noise = rng.exponential(race_key, (*shape, n - 1, n), edges)
    shares, noise = (jnp.moveaxis(x, -2, 0) for x in (shares, noise))
    _, graphs, _ = _eliminated(edges)
    after = jnp.concatenate([graphs[1:], jnp.full_like(graphs[:1], -jnp.inf)])
    nodes, root = jnp.arange(n), n - 1

    def visit(parent, step):
        v, graph, after, r, noise = step
        out = _node(graph, v, -2)
        joined, own = (_at(x, parent) for x in (after, graph))
        way = out + jnp.take_along_axis(out, parent, -1) - lm.log_sum_exp(out)[..., None]
        there = (nodes > v) & (nodes != root)
        by_v = where(r < 0, -r > _share(own, joined), r < _share(way, joined))
        parent = where(there & by_v, v, parent)
        ahead = parent
        for _ in range((n - 1).bit_length()):
            ahead = jnp.take_along_axis(ahead, ahead, -1)
        to_root = (nodes > v) & (ahead == root)
        index = lm.index_of_largest(jnp.exp(lm.centre(where(to_root, out, -jnp.inf))) / noise)
        return where(nodes == v, jnp.minimum(index, root), parent), None

    start = jnp.where(nodes == root, root, nodes)
    start = pl.placed(jnp.broadcast_to(start, (*shape, n)), noise[0], edges[..., 0])
    steps = jnp.arange(n - 1), graphs, after, shares, noise
    parent, _ = jax.lax.scan(visit, start, steps, reverse=True)
    arrows = (nodes == parent[..., None]) & (nodes[:, None] != root)
    return arrows | jnp.matrix_transpose(arrows)


def _at(matrices, index):
    """x[i, index_i] of each matrix."""
    return jnp.take_along_axis(matrices, index[..., None], -1)[..., 0]


# --- log-probabilities ----------------------------------------------------------------------------


@jax.custom_jvp
@jax.jit
def _log_prob(value, edges):
    """-log of the sum over all trees, each relative to this one: its edges to the parents have weight 1.

    A node is eliminated after its children. Its edge to the parent, of log-weight 0, is then still there, no
    s is negative, and nothing cancels in their sum.
    """
    n = edges.shape[-1]
    nodes = jnp.arange(n)
    whole = jnp.all((value == 0) | (value == 1), (-1, -2)) & (jnp.sum(value, (-1, -2)) == 2 * (n - 1))
    joined = value == 1

    def spread(state, _):
        reached, depth = state
        new = ~reached & jnp.any(joined & reached[..., None, :], -1)
        return (reached | new, where(new, jnp.max(depth, -1, keepdims=True) + 1, depth)), None

    start = pl.placed(jnp.broadcast_to(nodes == n - 1, value.shape[:-1]), value[..., 0])
    depth = jnp.zeros_like(start, jnp.int32)
    (reached, depth), _ = jax.lax.scan(spread, (start, depth), length=n - 1)
    parent = jnp.argmax(joined & (depth[..., None, :] < depth[..., :, None]), -1)
    own = _at(edges, parent)
    root = nodes == n - 1
    good = whole & jnp.all(reached, -1) & jnp.all(root | (own > -jnp.inf), -1)
    arrows = edges - where(root | (own == -jnp.inf), 0, own)[..., None]
    order = jnp.argsort(-depth, -1)
    arrows = jnp.take_along_axis(arrows, order[..., :, None], -2)
    arrows = jnp.take_along_axis(arrows, order[..., None, :], -1)
    return where(good, -jnp.sum(_eliminated(arrows)[0], 0), -jnp.inf)


@_log_prob.defjvp
def _log_prob_jvp(primals, tangents):
    (value, edges), (value_dot, edges_dot) = primals, tangents
    law = _log_prob(*primals)
    each = value_dot * _finite(edges) + (value - _marginals(edges)) * edges_dot
    return law, where(law == -jnp.inf, 0, jnp.sum(each, (-1, -2)) / 2)
