"""Relaxed and straight-through distributions for `numpyro.sample`.

Pass parameters by keyword, with the names that the sampler gives them. ``probs`` can replace ``logits``:
``GumbelSoftmax(logits=..., tau=...)`` or ``GumbelSoftmax(probs=..., tau=...)``. At a low temperature a draw
rounds to a one-hot vector or a bit, where its density is not finite. To score the draw before it is rounded,
wrap model and guide in `relaxit_jax.handlers.unrounded`.
"""

from relaxit_jax.distributions._binary import (
    CorrelatedRelaxedBernoulli,
    RelaxedBernoulli,
    StochasticTimesSmooth,
    StraightThroughBernoulli,
    StraightThroughRelaxedBernoulli,
)
from relaxit_jax.distributions._categorical import (
    GumbelSoftmax,
    InvertibleGaussian,
    LogisticNormalSoftmax,
    RelaxedOneHotCategorical,
)
from relaxit_jax.distributions._chain import LinearChain
from relaxit_jax.distributions._count import GeneralizedGumbelSoftmax
from relaxit_jax.distributions._gate import GaussianRelaxedBernoulli, HardConcrete
from relaxit_jax.distributions._laplace_bridge import to_dirichlet, to_logistic_normal
from relaxit_jax.distributions._permutation import GumbelSinkhorn, RelaxedPermutation
from relaxit_jax.distributions._simple import SimpleTopK
from relaxit_jax.distributions._straight_through import (
    DecoupledStraightThroughGumbelSoftmax,
    GappedStraightThrough,
    GumbelRao,
    OneHotCategorical,
    ReinMax,
    ReinMaxRao,
    RelaxedOneHotCategoricalStraightThrough,
    StraightThroughCategorical,
    StraightThroughGumbelSoftmax,
)
from relaxit_jax.distributions._subset import GumbelSoftmaxTopK
from relaxit_jax.distributions._tree import SpanningTree

__all__ = [
    "CorrelatedRelaxedBernoulli",
    "DecoupledStraightThroughGumbelSoftmax",
    "GappedStraightThrough",
    "GaussianRelaxedBernoulli",
    "GeneralizedGumbelSoftmax",
    "GumbelRao",
    "GumbelSinkhorn",
    "GumbelSoftmax",
    "GumbelSoftmaxTopK",
    "HardConcrete",
    "InvertibleGaussian",
    "LinearChain",
    "LogisticNormalSoftmax",
    "OneHotCategorical",
    "ReinMax",
    "ReinMaxRao",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "RelaxedOneHotCategoricalStraightThrough",
    "RelaxedPermutation",
    "SimpleTopK",
    "SpanningTree",
    "StochasticTimesSmooth",
    "StraightThroughBernoulli",
    "StraightThroughCategorical",
    "StraightThroughGumbelSoftmax",
    "StraightThroughRelaxedBernoulli",
    "to_dirichlet",
    "to_logistic_normal",
]
