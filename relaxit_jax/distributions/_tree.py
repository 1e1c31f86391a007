"""Spanning trees as a NumPyro distribution."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import structured
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd
from relaxit_jax.structured import _tree as tree


class SpanningTree(sd.SamplerDistribution):
    """Spanning trees as adjacency matrices, see `relaxit_jax.structured.tree_sample`.

    ``P(T)`` is proportional to ``exp(sum_(ij in T) w_ij)``. Draws are exact, with the gradient of their
    mean, the probability of each edge. The KL between two of them has a closed form.

    Args:
      weights: log-weights of the edges, shape (..., n, n), n at least 2; the upper triangle counts, and -inf
        is an edge that does not exist.
      validate_args: as in NumPyro.

    Raises:
      ValueError: for weights that are not floating point or not square matrices of at least two nodes.

    References:
      G. Kirchhoff (1847), Annalen der Physik 148, doi:10.1002/andp.18471481202; M. B. Paulus, D. Choi, D.
      Tarlow, A. Krause, C. J. Maddison (2020), arXiv:2006.08063.

    >>> print(f"{jnp.exp(SpanningTree(weights=jnp.zeros((4, 4))).entropy()):.2f}")  # 4^2 trees alike
    16.00
    """

    weights: Array
    arg_constraints: dict[str, Any] = {"weights": constraints.independent(ct.log_potential, 2)}
    support: ct.Constraint = constraints.independent(ct.draws_in_unit_interval, 2)
    _pathwise = False
    _sampler = staticmethod(structured.tree_sample)
    _density = staticmethod(structured.tree_log_prob)
    _event = staticmethod(lambda shapes: shapes["weights"][-2:])

    def __init__(self, *, weights: ArrayLike | None = None, validate_args: bool | None = None) -> None:
        arg.require(weights is not None, "weights", "given", None)
        tree.as_edges(weights)
        super().__init__(validate_args, weights=weights)

    @property
    def mean(self) -> Array:
        return self._full(structured.tree_marginals(self.weights))

    @property
    def variance(self) -> Array:
        mean = self.mean
        return mean * (1 - mean)

    def entropy(self) -> Array:
        return self._batched(-_expected_log_prob(self, self))


def _expected_log_prob(p, q):
    """E_p log q(T), the sum of mu_ij w_ij minus A, with the largest weight subtracted from both."""
    (_, of_p), (_, of_q) = (tree.as_edges(x.weights) for x in (p, q))
    mean = structured.tree_marginals(of_p)
    edges = of_q - jnp.max(of_q, (-1, -2), keepdims=True)
    expected = jnp.sum(where(mean > 0, mean * where(mean > 0, edges, 0), 0), (-1, -2)) / 2
    return expected - structured.tree_log_partition(edges)


@_kl.kl_rule((SpanningTree, SpanningTree))
def _kl_spanning_tree(p, q):
    """E_p log p(T) - E_p log q(T); inf if p draws a tree that q excludes."""
    arg.require(p.event_shape == q.event_shape, "q", f"of event shape {p.event_shape}", q.event_shape)
    return _expected_log_prob(p, p) - _expected_log_prob(p, q)
