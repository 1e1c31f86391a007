"""Draw and relax structured variables: sequences, spanning trees, and any law with a log-partition function.

A structure x has the probability ``exp(<theta, x> - A(theta))``. The log-partition function A sums over all
structures, and its gradient is the marginals E x. An exact draw has the gradient of the marginals. A relaxed
draw is the gradient of A at ``(theta + Gumbel) / tau`` (a stochastic softmax trick).
"""

from relaxit_jax.structured._chain import (
    chain_log_partition,
    chain_log_prob,
    chain_marginals,
    chain_sample,
    relaxed_chain,
)
from relaxit_jax.structured._structure import relaxed_structure
from relaxit_jax.structured._tree import (
    relaxed_tree,
    tree_log_partition,
    tree_log_prob,
    tree_marginals,
    tree_sample,
)

__all__ = [
    "chain_log_partition",
    "chain_log_prob",
    "chain_marginals",
    "chain_sample",
    "relaxed_chain",
    "relaxed_structure",
    "relaxed_tree",
    "tree_log_partition",
    "tree_log_prob",
    "tree_marginals",
    "tree_sample",
]
