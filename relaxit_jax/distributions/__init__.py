"""The methods as NumPyro distributions: thin classes over the samplers, for `numpyro.sample`.

Parameters go by keyword and have the names that the sampler gives them; `probs` can stand for
`logits`: ``GumbelSoftmax(logits=..., tau=...)`` or ``GumbelSoftmax(probs=..., tau=...)``. Draws at a
low temperature round to vertices, where no density is right: put `relaxit_jax.handlers.unrounded`
around model and guide.
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
from relaxit_jax.distributions._count import GeneralizedGumbelSoftmax
from relaxit_jax.distributions._gate import GaussianRelaxedBernoulli, HardConcrete
from relaxit_jax.distributions._laplace_bridge import to_dirichlet, to_logistic_normal
from relaxit_jax.distributions._permutation import GumbelSinkhorn
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
    "LogisticNormalSoftmax",
    "OneHotCategorical",
    "ReinMax",
    "ReinMaxRao",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "RelaxedOneHotCategoricalStraightThrough",
    "SimpleTopK",
    "StochasticTimesSmooth",
    "StraightThroughBernoulli",
    "StraightThroughCategorical",
    "StraightThroughGumbelSoftmax",
    "StraightThroughRelaxedBernoulli",
    "to_dirichlet",
    "to_logistic_normal",
]
