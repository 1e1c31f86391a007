"""Families whose elements depend on each other: subsets, orders, chains and trees."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax.estimators._families import Variables
from relaxit_jax.samplers import _simple as simple
from relaxit_jax.samplers import _subset as subset
from relaxit_jax.structured import _chain as chain
from relaxit_jax.structured import _tree as tree


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Subset(Variables):
    """Subsets of k of n elements as k-hot vectors, for `reinforce`, `rloo` and `exact`.

    ``law="simple"``: bits with these log-odds given that k are on, ``P(b) ~ exp(sum_i l_i b_i)``, as in
    `simple_top_k`. ``law="top_k"``: the k largest of ``logits + Gumbel`` without their order, which are k
    draws without replacement, as in `gumbel_top_k`.

    Args:
      logits: with the shape of a sample and the elements last; -inf is an element that is never included.
      k: size of each subset, a Python integer from 1 to n.
      law: "simple" or "top_k".
      event_ndims: how many of the last axes belong to one call of f, including the axis of the elements;
        the axes before them are the batch.

    Raises:
      ValueError: for logits that are not floating point, NaN or all -inf, a ``k`` or ``event_ndims`` out of
        range, or an unknown ``law``.

    References:
      K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck (2023), SIMPLE: A Gradient Estimator for k-Subset
      Sampling, arXiv:2210.01941, for the first law; W. Kool, H. van Hoof, M. Welling (2019),
      arXiv:1903.06059, for the second.

    >>> q = Subset(jnp.log(jnp.array([1.0, 2.0, 3.0])), k=2)
    >>> print(f"{jnp.exp(q.log_prob(jnp.array([0.0, 1.0, 1.0]))):.4f}")  # 6 / (2 + 3 + 6)
    0.5455
    """

    k: int
    law: str

    def __init__(
        self, logits: ArrayLike, k: int, law: Literal["simple", "top_k"] = "simple", event_ndims: int = 1
    ) -> None:
        self._set(logits, event_ndims, 1)
        arg.require_classes(self.logits)
        arg.require_choice("law", law, ("simple", "top_k"))
        object.__setattr__(self, "k", arg.as_static_int("k", k, 1, self.shape[-1]))
        object.__setattr__(self, "law", law)

    def with_logits(self, logits: ArrayLike) -> Subset:
        """The same family with other logits."""
        return Subset(logits, self.k, self.law, self.event_ndims)  # type: ignore[arg-type]

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        arg.check_key(key)
        shape = (*arg.as_shape("shape", shape), *self.shape[:-1])
        logits = jax.lax.stop_gradient(self.logits)
        if self.law == "simple":
            return jax.lax.stop_gradient(simple.simple_top_k(key, logits, self.k, shape=shape))
        indices = subset.gumbel_top_k(key, logits, self.k, shape=shape)[0]
        return lm.k_hot(indices, jnp.broadcast_to(logits, (*shape, logits.shape[-1]))).astype(logits.dtype)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        sample = self._checked(sample)
        if self.law == "simple":
            each = simple.simple_top_k_log_prob(sample, self.logits, self.k)
        else:
            indices = lm.top_k(sample, self.k)[1]
            each = subset.gumbel_top_k_log_prob(indices, self.logits, ordered=False)
        return self._over_event(each[..., None])

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """The number of events, and a function that maps their indices to the events."""
        *several, n = self.event_shape
        one = lambda: [np.isin(np.arange(n), c) for c in itertools.combinations(range(n), self.k)]
        return _events(math.comb(n, self.k), math.prod(several), one, self.event_shape, self.logits.dtype)


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class PlackettLuce(Variables):
    """Orders of n items as permutation matrices, for `reinforce`, `rloo` and `exact`.

    Row i of a sample is the item at place i: the first is drawn with probabilities softmax(logits), the
    next from the remaining items, and so on.

    Args:
      logits: one per item, on the last axis; finite.
      event_ndims: how many of the last axes of the logits belong to one call of f.

    Raises:
      ValueError: for logits that are not floating point or not finite, or ``event_ndims`` out of range.

    References:
      R. L. Plackett (1975), The Analysis of Permutations, Applied Statistics 24, doi:10.2307/2346567.

    >>> q = PlackettLuce(jnp.log(jnp.array([1.0, 2.0, 3.0])))
    >>> print(f"{jnp.exp(q.log_prob(jnp.eye(3))):.4f}")  # 1 / 6 * 2 / 5
    0.0667
    """

    def __init__(self, logits: ArrayLike, event_ndims: int = 1) -> None:
        self._set(logits, event_ndims, 1)
        arg.require_values("logits", self.logits, "finite", np.isfinite)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample, which has one axis more than the logits."""
        return (*self.logits.shape, self.logits.shape[-1])

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        arg.check_key(key)
        shape = (*arg.as_shape("shape", shape), *self.logits.shape[:-1])
        logits, n = jax.lax.stop_gradient(self.logits), self.logits.shape[-1]
        return jax.nn.one_hot(subset.gumbel_top_k(key, logits, n, shape=shape)[0], n, dtype=logits.dtype)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        order = jnp.argmax(self._checked(sample), -1)
        each = subset.gumbel_top_k_log_prob(order, self.logits)
        return self._over_event(each[..., None])

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """The number of events, and a function that maps their indices to the events."""
        *several, n, _ = self.event_shape
        one = lambda: np.eye(n)[list(itertools.permutations(range(n)))]
        return _events(math.factorial(n), math.prod(several), one, self.event_shape, self.logits.dtype)


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class LinearChain(Variables):
    """Sequences of linear chains as one-hot vectors, for `reinforce`, `rloo` and `exact`.

    ``P(z) ~ exp(sum_t unary[t, z_t] + sum_t transition[t, z_t, z_(t+1)])``, as in
    `relaxit_jax.structured.chain_sample`. Gradients reach both potentials; `gradient_report` measures the
    gradient in the first, which are the logits of the family.

    Args:
      unary: log-weights of the classes at each step, with the shape of a sample, (..., T, K); -inf is
        forbidden.
      transition: log-weights of class j after class i, shape (K, K), (..., T - 1, K, K) or (..., 1, K, K).
      event_ndims: how many of the last axes belong to one call of f, including the two axes of a chain.

    Raises:
      ValueError: for potentials that are not floating point, contain NaN, or leave no sequence possible,
        for shapes that do not fit together, or for ``event_ndims`` out of range.

    References:
      J. Lafferty, A. McCallum, F. Pereira (2001), Conditional Random Fields, ICML.

    >>> q = LinearChain(jnp.zeros((3, 2)), jnp.log(jnp.array([[3.0, 1.0], [1.0, 3.0]])))
    >>> print(f"{jnp.exp(q.log_prob(jnp.array([[1, 0], [1, 0], [0, 1]]))):.5f}")  # 3 / 32
    0.09375
    """

    transition: Array
    _arrays: ClassVar[tuple[str, ...]] = ("logits", "transition")

    def __init__(self, unary: ArrayLike, transition: ArrayLike, event_ndims: int = 2) -> None:
        chain.as_potentials(unary, transition, possible=True)
        self._set(unary, event_ndims, 2)
        object.__setattr__(self, "transition", arg.as_float("transition", transition))
        arg.require_values("transition", self.transition, "numbers, not NaN", lambda x: x == x)
        batch = self.transition.shape[:-3]
        need = f"of a batch shape that broadcasts to {self.shape[:-2]}"
        arg.require(arg.broadcasts_to(batch, self.shape[:-2]), "transition", need, f"{batch}")

    def with_logits(self, logits: ArrayLike) -> LinearChain:
        """The same family with other log-weights for the classes."""
        return LinearChain(logits, self.transition, self.event_ndims)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        arg.check_key(key)
        shape = (*arg.as_shape("shape", shape), *self.shape[:-2])
        potentials = jax.lax.stop_gradient((self.logits, self.transition))
        return chain.chain_sample(key, *potentials, shape=shape).astype(self.logits.dtype)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in both potentials."""
        each = chain.chain_log_prob(self._checked(sample), self.logits, self.transition)
        return self._over_event(each[..., None, None])

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """The number of events, and a function that maps their indices to the events."""
        *several, steps, k = self.event_shape
        one = lambda: np.eye(k)[list(itertools.product(range(k), repeat=steps))]
        return _events(k**steps, math.prod(several), one, self.event_shape, self.logits.dtype)


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class SpanningTree(Variables):
    """Spanning trees as adjacency matrices, for `reinforce`, `rloo` and `exact`.

    ``P(T) ~ exp(sum_(ij in T) w_ij)``, as in `relaxit_jax.structured.tree_sample`.

    Args:
      weights: log-weights of the edges, with the shape of a sample, (..., n, n), n at least 2. The upper
        triangle counts, and -inf is an edge that does not exist. They are the logits of the family.
      event_ndims: how many of the last axes belong to one call of f, including the two axes of a matrix.

    Raises:
      ValueError: for weights that are not floating point, contain NaN, are not square or leave the graph
        without a spanning tree, or for ``event_ndims`` out of range.

    References:
      G. Kirchhoff (1847), Annalen der Physik 148, doi:10.1002/andp.18471481202.

    >>> q = SpanningTree(jnp.zeros((3, 3)))
    >>> print(f"{jnp.exp(q.log_prob(jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))):.4f}")  # one of three
    0.3333
    """

    def __init__(self, weights: ArrayLike, event_ndims: int = 2) -> None:
        tree.as_edges(weights, possible=True)
        self._set(weights, event_ndims, 2)

    def sample(self, key: Array, shape: Sequence[int] = ()) -> Array:
        """Exact draws, of shape (*shape, *self.shape)."""
        arg.check_key(key)
        shape = (*arg.as_shape("shape", shape), *self.shape[:-2])
        return tree.tree_sample(key, jax.lax.stop_gradient(self.logits), shape=shape)

    def log_prob(self, sample: ArrayLike) -> Array:
        """log P(sample), of the batch shape; differentiable in the logits."""
        return self._over_event(tree.tree_log_prob(self._checked(sample), self.logits)[..., None, None])

    def outcomes(self) -> tuple[int, Callable[[Array], Array]]:
        """The number of events, and a function that maps their indices to the events."""
        *several, n, _ = self.event_shape
        return _events(
            n ** (n - 2), math.prod(several), lambda: _trees(n), self.event_shape, self.logits.dtype
        )


def _trees(n):
    """Adjacency matrices of all trees with n nodes, from their Pruefer codes."""
    codes = np.array(list(itertools.product(range(n), repeat=n - 2)), int).reshape(-1, n - 2)
    trees = np.zeros((len(codes), n, n))
    degree = 1 + (codes[:, :, None] == np.arange(n)).sum(1)
    rows = np.arange(len(codes))
    for step in range(n - 1):
        leaf = np.argmax(degree == 1, -1)
        degree[rows, leaf] = 0
        other = codes[:, step] if step < n - 2 else np.argmax(degree == 1, -1)
        trees[rows, leaf, other] = trees[rows, other, leaf] = 1
        degree[rows, other] -= 1
    return trees


def _events(count, several, one, shape, dtype):
    """The events of `several` independent variables, each with the `count` outcomes that ``one()`` lists."""

    def events(index):
        listed = jnp.asarray(np.array(one()), dtype)  # only now: often nobody sums over so many
        digits = jnp.stack([index // count**i % count for i in range(several)], -1)
        return listed[digits].reshape(-1, *shape)

    return count**several, events
