"""Draw relaxed and straight-through discrete variables, and score them. One file per family."""

from relaxit_jax.samplers._binary import (
    correlated_bernoulli,
    correlated_bernoulli_log_prob,
    relaxed_bernoulli,
    relaxed_bernoulli_log_prob,
    stochastic_times_smooth,
    stochastic_times_smooth_log_prob,
    straight_through_bernoulli,
    straight_through_bernoulli_log_prob,
)
from relaxit_jax.samplers._categorical import (
    gumbel_softmax,
    gumbel_softmax_log_prob,
    invertible_gaussian,
    invertible_gaussian_log_prob,
    logistic_normal,
    logistic_normal_log_prob,
)
from relaxit_jax.samplers._count import (
    binomial_support,
    generalized_gumbel_softmax,
    geometric_support,
    negative_binomial_support,
    poisson_support,
)
from relaxit_jax.samplers._gate import (
    gaussian_bernoulli,
    gaussian_bernoulli_log_prob,
    hard_concrete,
    hard_concrete_gate,
    hard_concrete_l0,
    hard_concrete_log_prob,
)
from relaxit_jax.samplers._permutation import (
    gumbel_sinkhorn,
    relaxed_permutation,
    relaxed_permutation_log_prob,
)
from relaxit_jax.samplers._simple import simple_top_k, simple_top_k_log_prob, simple_top_k_marginals
from relaxit_jax.samplers._straight_through import (
    decoupled_gumbel_softmax,
    gapped_straight_through,
    gumbel_rao,
    reinmax,
    reinmax_rao,
    straight_through_categorical,
    straight_through_categorical_log_prob,
)
from relaxit_jax.samplers._subset import (
    gumbel_top_k,
    gumbel_top_k_log_prob,
    relaxed_top_k,
    stochastic_beam_search,
)

__all__ = [
    "binomial_support",
    "correlated_bernoulli",
    "correlated_bernoulli_log_prob",
    "decoupled_gumbel_softmax",
    "gapped_straight_through",
    "gaussian_bernoulli",
    "gaussian_bernoulli_log_prob",
    "generalized_gumbel_softmax",
    "geometric_support",
    "gumbel_rao",
    "gumbel_sinkhorn",
    "gumbel_softmax",
    "gumbel_softmax_log_prob",
    "gumbel_top_k",
    "gumbel_top_k_log_prob",
    "hard_concrete",
    "hard_concrete_gate",
    "hard_concrete_l0",
    "hard_concrete_log_prob",
    "invertible_gaussian",
    "invertible_gaussian_log_prob",
    "logistic_normal",
    "logistic_normal_log_prob",
    "negative_binomial_support",
    "poisson_support",
    "reinmax",
    "reinmax_rao",
    "relaxed_bernoulli",
    "relaxed_bernoulli_log_prob",
    "relaxed_permutation",
    "relaxed_permutation_log_prob",
    "relaxed_top_k",
    "simple_top_k",
    "simple_top_k_log_prob",
    "simple_top_k_marginals",
    "stochastic_beam_search",
    "stochastic_times_smooth",
    "stochastic_times_smooth_log_prob",
    "straight_through_bernoulli",
    "straight_through_bernoulli_log_prob",
    "straight_through_categorical",
    "straight_through_categorical_log_prob",
]
