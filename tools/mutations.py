"""Breaks the library on purpose, one line at a time, and tells which tests notice: python tools/mutations.py

Each defect is written into a copy of the package, and the tests that stand with it are run on that. What it
printed is in docs/outputs/mutations.txt, for docs/correctness.md.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import click

from versions import sentence, versions

ROOT = pathlib.Path(__file__).parents[1]
NOISE, MATHS, GRADIENTS = (f"relaxit_jax/_{name}.py" for name in ("random", "math", "gradients"))
CHECKS = "relaxit_jax/_arguments.py"
SAMPLERS, ESTIMATORS, CLASSES = (
    f"relaxit_jax/{module}" for module in ("samplers", "estimators", "distributions")
)
LOGISTIC = "return jnp.log(where(r < 0, 1 - v, v) / where(r < 0, v, 1 - v))"

# what is wrong, its file, what stands there, what comes in its place, test files and an expression for -k
MUTATIONS = [
    (
        "logistic noise of float32 uniforms",
        NOISE,
        LOGISTIC,
        "u = jax.random.uniform(key, shape, like.dtype, jnp.finfo(like.dtype).tiny); "
        "return jnp.log(u) - jnp.log1p(-u)",
        "test_numerics.py",
        "",
    ),
    (
        "logistic noise 2 % too wide",
        NOISE,
        LOGISTIC,
        LOGISTIC.replace("return", "return 1.02 *"),
        "test_numerics.py test_samplers.py test_densities.py",
        "noise_ or relaxed_bernoulli and (law or integrates)",
    ),
    (
        "Gumbel noise in bfloat16",
        NOISE,
        "return -jnp.log(exponential(key, shape, like))",
        "return jax.random.gumbel(key, shape, jnp.bfloat16).astype(like.dtype)",
        "test_numerics.py",
        "noise or rare",
    ),
    (
        "parameters are not widened",
        CHECKS,
        "(x.astype(wide(dtype)) for x in arrays)",
        "(x.astype(dtype) for x in arrays)",
        "test_numerics.py test_samplers.py test_densities.py",
        "low_precision or discrete_law or half_precision or own_draws",
    ),
    (
        "another rotation of the hash",
        NOISE,
        "(13, 15, 26, 6)",
        "(13, 15, 26, 7)",
        "test_numerics.py",
        "bits_are",
    ),
    (
        "noise shared along the last axis",
        f"{SAMPLERS}/_binary.py",
        "x = logits + rng.logistic(key, shape, logits)\n    return _relax",
        "x = logits + rng.logistic(key, (*shape[:-1], 1), logits)\n    return _relax",
        "test_samplers.py",
        "independent and relaxed_bernoulli",
    ),
    (
        "no guard for infinite logits",
        MATHS,
        "moved = moved - where(counts, x, 0) / tau * tau_dot",
        "moved = moved - x / tau * tau_dot",
        "test_samplers.py",
        "impossible or extreme",
    ),
    (
        "logits are not centred",
        MATHS,
        "return logits - top",
        "return logits",
        "test_numerics.py",
        "rounded_off",
    ),
    (
        "accelerators take the last of the largest",
        MATHS,
        "((y == x) & (j < i))",
        "((y == x) & (j > i))",
        "test_numerics.py",
        "largest",
    ),
    (
        "accelerators halve the probabilities in the derivative of softmax",
        GRADIENTS,
        "return p / jnp.sum(p, -1, keepdims=True)",
        "return p / (1 + jnp.sum(p, -1, keepdims=True))",
        "test_samplers.py",
        "accelerators",
    ),
    (
        "an eager loop is compiled at every call",
        f"{SAMPLERS}/_subset.py",
        "@functools.partial(jax.jit, static_argnums=0)\ndef _sum_of_draws",
        "def _sum_of_draws",
        "test_eager.py",
        "relaxed_top_k",
    ),
    (
        "an exact draw's softmax is made without a gradient too",
        GRADIENTS,
        "return where(good, lm.is_class(index, logits).astype(logits.dtype), jnp.nan)",
        "return straight_through(where(good, lm.is_class(index, logits), jnp.nan), jax.nn.softmax(logits))",
        "test_straight_through.py",
        "exact_draw",
    ),
    (
        "straight through as hard + soft - soft",
        GRADIENTS,
        "return where(jnp.isnan(soft), soft, hard.astype(soft.dtype))",
        "return (hard.astype(soft.dtype) + soft) - soft",
        "test_numerics.py test_samplers.py",
        "straight or support",
    ),
    (
        "density of gumbel_softmax with K log tau",
        f"{SAMPLERS}/_categorical.py",
        "inside = gammaln(k) + (k - 1) * jnp.log(tau)",
        "inside = gammaln(k) + k * jnp.log(tau)",
        "test_densities.py",
        "gumbel_softmax and integrates",
    ),
    (
        "density of a clipped draw",
        MATHS,
        '"""The binary Concrete log-density of z = sigmoid(y)."""',
        "y = jax.scipy.special.logit(jnp.clip(jax.nn.sigmoid(y), 1e-7, 1 - 1e-7))",
        "test_densities.py",
        "relaxed_bernoulli and own_draws",
    ),
    (
        "atom of hard_concrete 1 % of its edge off",
        f"{SAMPLERS}/_gate.py",
        "at_zero = log_sigmoid(tau * low - logits)",
        "at_zero = log_sigmoid(tau * low * 1.01 - logits)",
        "test_densities.py",
        "atoms",
    ),
    (
        "Plackett-Luce without taking out what is drawn",
        f"{SAMPLERS}/_subset.py",
        "jnp.sum(chosen - jnp.logaddexp(later, rest[..., None]), -1)",
        "jnp.sum(chosen - rest[..., None], -1)",
        "test_subset.py",
        "enumeration",
    ),
    (
        "simple_top_k with noise 3 % too narrow",
        f"{SAMPLERS}/_simple.py",
        "u, noise = noise[:size, None], noise[size:]",
        "u, noise = 0.97 * noise[:size, None], noise[size:]",
        "test_simple.py test_samplers.py",
        "every_subset or simple and law",
    ),
    (
        "simple_top_k without the second numbers, on CPUs",
        f"{SAMPLERS}/_simple.py",
        "where(jnp.isinf(total), 0, rest + lost)",
        "jnp.zeros_like(total)",
        "test_simple.py",
        "large or marginals",
    ),
    (
        "simple_top_k without the second numbers of the tree",
        f"{SAMPLERS}/_simple.py",
        "where(jnp.isinf(high), 0, low)",
        "jnp.zeros_like(low)",
        "test_simple.py",
        "large",
    ),
    (
        "simple_top_k never takes a rare element of the left half",
        f"{SAMPLERS}/_simple.py",
        "more = jax.lax.cumsum(share[:, 1:], 1, reverse=True)",
        "more = 1 - at_most[:, :-1]",
        "test_numerics.py",
        "last_bit",
    ),
    (
        "a fused kernel hashes the place in the row",
        "relaxit_jax/_kernels.py",
        "self.row(self.width) * self.classes + self.place_in_row(c)",
        "self.place_in_row(c)",
        "test_fused.py",
        "plain_form or discrete_law",
    ),
    (
        "a fused mean of softmaxes is not conditioned on the winner",
        "relaxit_jax/_kernels.py",
        "jnp.where(winner, 0, far - jnp.log(jnp.where(rare, ratio, 1 + ratio)))",
        "far - jnp.log(jnp.where(rare, ratio, 1 + ratio))",
        "test_fused.py",
        "plain_form",
    ),
    (
        "potentials of gumbel_sinkhorn without the second numbers",
        f"{SAMPLERS}/_permutation.py",
        "(lost + low)",
        "0.0",
        "test_permutation.py",
        "columns_sum",
    ),
    (
        "mass beyond a count's values is dropped",
        f"{SAMPLERS}/_count.py",
        "below = lm.log_sum_exp(head)\n",
        "tail, below = log_pmf[..., num_values - 1], lm.log_sum_exp(head)\n",
        "test_count.py",
        "scipy or folded",
    ),
    (
        "gumbel_rao's noise is not conditioned",
        NOISE,
        "return -jnp.log(top), where(winner, 0, gap)",
        "gap = log_p + gumbel(key, log_p.shape, log_p.dtype)\n"
        "    return -jnp.log(top), gap - jnp.max(gap, -1, keepdims=True)",
        "test_straight_through.py",
        "rao",
    ),
    (
        "disarm 1 % too large",
        f"{ESTIMATORS}/_antithetic.py",
        "/ 2 * larger",
        "/ 2 * larger * 1.01",
        "test_estimators.py",
        "mean_is and disarm",
    ),
    (
        "rebar and relax without their correction",
        f"{ESTIMATORS}/_control_variate.py",
        "* score + slopes[0] - slopes[1]",
        "* score",
        "test_estimators.py",
        "mean_is and re",
    ),
    (
        "rebar and relax with c(z) for c(z~) in the gain",
        f"{ESTIMATORS}/_control_variate.py",
        "variates[1].astype",
        "variates[0].astype",
        "test_estimators.py",
        "formula and (rebar or relax)",
    ),
    (
        "the value of one draw for the mean of all",
        f"{ESTIMATORS}/_estimate.py",
        "return jnp.mean(values, 0)",
        "return values[0]",
        "test_estimators.py",
        "formula",
    ),
    (
        "coupled noise shared by a batch",
        f"{ESTIMATORS}/_families.py",
        "noise = rng.logistic(noise_key, self.shape, logits)",
        "noise = rng.logistic(noise_key, self.shape[-1:], logits)",
        "test_estimators.py",
        "uncorrelated and bits",
    ),
    (
        "score of bits as b - p",
        f"{ESTIMATORS}/_families.py",
        "return where(self._checked(sample) != 0, q, -p)",
        "return self._checked(sample) - p",
        "test_estimators.py",
        "digits",
    ),
    (
        "second derivatives without the law of the other variables",
        f"{ESTIMATORS}/_estimate.py",
        "jnp.sum(others * parts, 0)",
        "jnp.sum(parts, 0)",
        "test_second_derivatives.py",
        "third_order or mean_hessian",
    ),
    (
        "second derivatives without a variable's own logits",
        f"{ESTIMATORS}/_estimate.py",
        "return q.with_own_derivatives(total if rest is None else total + rest)",
        "return total if rest is None else total + rest",
        "test_second_derivatives.py",
        "third_order or mean_hessian",
    ),
    (
        "second derivatives of the antithetic pair by the first draw alone",
        f"{ESTIMATORS}/_antithetic.py",
        "es.estimate(q, samples, values, gradient, parts), aux",
        "es.estimate(q, samples[:1], values, gradient, parts), aux",
        "test_second_derivatives.py",
        "arm",
    ),
    (
        "arms without the correlation of its draws",
        f"{ESTIMATORS}/_families.py",
        "/ ((n - 1) * spread)",
        "/ (n - 1)",
        "test_estimators.py",
        "mean_is and arms or formula and arms",
    ),
    (
        "arms drawn where 1 - u is below p for every bit",
        f"{ESTIMATORS}/_families.py",
        "drawn = where(logits > 0, ~rare, rare)",
        "drawn = rare",
        "test_estimators.py",
        "mean_is and arms or formula and arms",
    ),
    (
        "arms of classes by the plain estimate of rloo",
        f"{ESTIMATORS}/_families.py",
        " + correction / (n * (n - 1))",
        "",
        "test_estimators.py",
        "mean_is and arms or formula and arms",
    ),
    (
        "arms of classes in which a draw without others has the wrong law",
        f"{ESTIMATORS}/_families.py",
        "where(m > 0, others * excess < e, surprise < e)",
        "where(m > 0, others * excess < e, surprise < 2 * e)",
        "test_estimators.py",
        "groups_of_classes",
    ),
    (
        "unordered_set without its baseline's own class",
        f"{ESTIMATORS}/_without_replacement.py",
        "where(same, 1, jnp.exp(two - one[:, None]))",
        "where(same, 0, jnp.exp(two - one[:, None]))",
        "test_estimators.py",
        "formula and unordered",
    ),
    (
        "a set at nearby parameters counts as much as here",
        f"{ESTIMATORS}/_without_replacement.py",
        "es.likelihood_ratio(log_set) * jnp.sum(each, 0)",
        "jnp.sum(each, 0)",
        "test_second_derivatives.py",
        "hessian and unordered",
    ),
    (
        "vimco with the mean of all weights for a baseline",
        f"{ESTIMATORS}/_multi_sample.py",
        "jnp.sum((all_draws - all_but_one) * others, 0)",
        "jnp.sum((all_draws - all_but_one) * bound, 0)",
        "test_estimators.py",
        "vimco_is_exact",
    ),
    (
        "aux of the last call",
        f"{ESTIMATORS}/_estimate.py",
        "aux = jax.tree.map(lambda x: x[0], aux) if several else aux",
        "aux = jax.tree.map(lambda x: x[-1], aux) if several else aux",
        "test_estimators.py",
        "aux_is",
    ),
    (
        "subsets and orders without the score of their draws",
        f"{ESTIMATORS}/_estimate.py",
        "change = (likelihood_ratio(log_p) - 1) *",
        "change = 0 *",
        "test_joint.py",
        "mean_is",
    ),
    (
        "check compares bounds alone",
        "relaxit_jax/handlers/_check.py",
        "gain > (CLOSER if differs else BETTER) + noise",
        "gain > BETTER + noise",
        "test_check.py",
        "hardly_better",
    ),
    (
        "VIMCO_ELBO without the score of its draws",
        "relaxit_jax/elbo.py",
        "total = jnp.sum(bound) + _slope(stop_gradient(bound - others), log_q)",
        "total = jnp.sum(bound)",
        "test_elbo.py",
        "bound_of_two",
    ),
    (
        "VIMCO_ELBO scores masked laws",
        "relaxit_jax/elbo.py",
        "log_q += sum_to(own, _log_q(s))",
        "log_q += sum_to(own, log_prob_of(s))",
        "test_elbo.py",
        "minibatches or bound_of_two",
    ),
    (
        "RLOO_ELBO with K for K - 1",
        "relaxit_jax/elbo.py",
        "/ (len(cost) - 1)",
        "/ len(cost)",
        "test_elbo.py",
        "the_mean_is",
    ),
    (
        "a step of a scan pays for the steps before it",
        "relaxit_jax/elbo.py",
        "jax.lax.cumsum(steps, 0, reverse=True)",
        "jax.lax.cumsum(steps, 0)",
        "test_elbo.py",
        "the_mean_is",
    ),
    (
        "a guide's scan that runs backwards is taken for one that runs forward",
        "relaxit_jax/elbo.py",
        "if own and npr.is_reverse(own) else",
        "if own and False else",
        "test_elbo.py",
        "the_mean_is",
    ),
    (
        "a site drawn from a finished scan is forgotten",
        "relaxit_jax/elbo.py",
        "any(own is None or in_guide.get(other) is not own for other in below)",
        "False",
        "test_elbo.py",
        "the_mean_is",
    ),
    (
        "an autoregressive element tells the ones before it",
        "relaxit_jax/handlers/_autoregressive.py",
        "row = jnp.take(self.weights, number, -4)",
        "row = jnp.take(self.weights, number, -3)",
        "test_auto_structured.py",
        "law_sums",
    ),
    (
        "coordinate ascent takes all elements for independent",
        "relaxit_jax/handlers/_start.py",
        "return tuple(1 if axis in self.axes else size for axis, size in enumerate(shape))",
        "return tuple(1 for axis, size in enumerate(shape))",
        "test_start.py",
        "coupled",
    ),
    (
        "a chain forgets the site before it",
        "relaxit_jax/handlers/_auto_structured.py",
        "weights = jnp.eye(s.size)[0] if first is None else first.weights(values[first.name])",
        "weights = jnp.eye(s.size)[0]",
        "test_auto_structured.py",
        "hidden_chain or every_parameter",
    ),
    (
        "the least value of a count is forgotten in weighted draws",
        "relaxit_jax/handlers/_marginals.py",
        "low = 0 if law.values is None else int(law.values[0])",
        "low = 0",
        "test_check.py",
        "counts_that",
    ),
    (
        "a site that the guide draws below another is taken for fixed",
        "relaxit_jax/handlers/_check.py",
        "if independent and not below and not any",
        "if independent and not any",
        "test_check.py",
        "counts_that",
    ),
    (
        "starts are ranked without their entropy",
        "relaxit_jax/handlers/_start.py",
        "return -_kl.expected_log_pmf(log_q, log_q)",
        "return 0 * _kl.expected_log_pmf(log_q, log_q)",
        "test_start.py",
        "ranked",
    ),
    (
        "KL of bits the wrong way round",
        f"{CLASSES}/_binary.py",
        "return _kl.discrete_kl(_log_pmf(p), _log_pmf(q))",
        "return _kl.discrete_kl(_log_pmf(q), _log_pmf(p))",
        "test_kl.py",
        "rules_of_bits",
    ),
    (
        "KL of logistic-normals without log W",
        f"{CLASSES}/_categorical.py",
        "return jnp.sum(jnp.log(scale), -1) + log_total / 2",
        "return jnp.sum(jnp.log(scale), -1)",
        "test_kl.py",
        "continuous",
    ),
    (
        "KL of relax the wrong way round",
        "relaxit_jax/handlers/_site.py",
        "return _kl.discrete_kl(p.log_pmf, q.log_pmf)",
        "return _kl.discrete_kl(q.log_pmf, p.log_pmf)",
        "test_relax.py test_handlers.py",
        "objective or scores_by",
    ),
    (
        "Laplace Bridge with K for K squared",
        "relaxit_jax/laplace_bridge.py",
        "- 2 * math.log(k)",
        "- math.log(k)",
        "test_laplace_bridge.py",
        "",
    ),
    (
        "a concentration that overflows spoils the gradients of the others",
        "relaxit_jax/laplace_bridge.py",
        "jnp.exp(where(too_large, 0, log_alpha))",
        "jnp.exp(log_alpha)",
        "test_laplace_bridge.py",
        "far_apart",
    ),
    (
        "gumbel_rao's gradient in tau has the wrong sign",
        f"{SAMPLERS}/_straight_through.py",
        "(logits_dot - where(y == -jnp.inf, 0, y) * tau_dot) / tau",
        "(logits_dot + where(y == -jnp.inf, 0, y) * tau_dot) / tau",
        "test_samplers.py",
        "soft_draw",
    ),
    (
        "gapped_straight_through's gradient in tau has the wrong sign",
        f"{SAMPLERS}/_straight_through.py",
        "gr.straight_through(moved, logits), tau)",
        "gr.straight_through(moved, logits), 2 * jax.lax.stop_gradient(tau) - tau)",
        "test_samplers.py",
        "soft_draw",
    ),
    (
        "stochastic_times_smooth is never 0 at a logit of 17",
        f"{SAMPLERS}/_binary.py",
        "rng.bernoulli(key, root, sigmoid(-logits) / (1 + root), shape)",
        "rng.bernoulli(key, root, 1 - root, shape)",
        "test_numerics.py",
        "tails_are",
    ),
    (
        "slope of log Phi with two terms beyond its switch",
        MATHS,
        "for n in range(13, 0, -2):",
        "for n in range(3, 0, -2):",
        "test_numerics.py",
        "digits",
    ),
    (
        "logit_to_probit after three steps",
        MATHS,
        "jax.lax.fori_loop(0, 5, newton, v)",
        "jax.lax.fori_loop(0, 3, newton, v)",
        "test_numerics.py",
        "digits or inverse",
    ),
    (
        "slope of log_min_gumbel_cdf stays as it is below -15",
        MATHS,
        "jnp.exp(jnp.clip(x, -60, 5))",
        "jnp.exp(jnp.clip(x, -15, 5))",
        "test_numerics.py",
        "digits",
    ),
    (
        "a vertex or a value outside hides a NaN",
        MATHS,
        "return x + where(functools.reduce(jnp.logical_or, hidden), jnp.nan, 0)",
        "return x",
        "test_samplers.py test_densities.py",
        "bad_number",
    ),
    (
        "a traced temperature is not looked at",
        CHECKS,
        "return array if can_be_seen(x) else array + jnp.where(array > 0, 0, jnp.nan)",
        "return array",
        "test_samplers.py test_densities.py",
        "bad_number",
    ),
    (
        "a temperature of shape (B, 1) draws all pairs",
        CHECKS,
        "extra = len(shape) - len(batch)",
        "extra = 0",
        "test_samplers.py",
        "event_axis",
    ),
    (
        "mass that is not seen yet is taken for none",
        f"{SAMPLERS}/_count.py",
        "np.abs(tail[..., :1] - 1) < 0.01",
        "tail[..., :1] < np.inf",
        "test_count.py",
        "named",
    ),
    (
        "a traced rate of 0 has no slope",
        f"{SAMPLERS}/_count.py",
        "jnp.clip(x, low * float(info.tiny), float(info.max) / 1024)",
        "x + 0 * low",
        "test_count.py",
        "nothing",
    ),
    (
        "Poisson masses without the last term of their series",
        f"{SAMPLERS}/_count.py",
        "y * (1 / 140 - y / 99)",
        "y / 140",
        "test_count.py",
        "digits",
    ),
    (
        "a one-hot mass has the slope of the class drawn alone",
        f"{SAMPLERS}/_straight_through.py",
        "law = jnp.sum(value * log_p, -1)",
        "law = jnp.sum(where(value != 0, value * log_p, 0), -1)",
        "test_compositions.py",
        "bounds and straight_through_categorical",
    ),
    (
        "mass that crosses into an atom is forgotten",
        f"{CLASSES}/_sampler_distribution.py",
        "return law if atoms is None else law - _crossing(atoms, self._jumps())",
        "return law",
        "test_compositions.py",
        "bounds and gaussian_bernoulli",
    ),
    (
        "SIMPLE is called reparametrized",
        f"{CLASSES}/_simple.py",
        "_pathwise = False",
        "_pathwise = True",
        "test_compositions.py",
        "bounds and simple_top_k",
    ),
    (
        "traced temperatures are taken for equal",
        f"{CLASSES}/_kl.py",
        "return a is b",
        "return True",
        "test_kl.py",
        "two_temperatures or continuous_rules",
    ),
    (
        "certain bits are trained",
        "relaxit_jax/handlers/_site.py",
        "np.stack([seen < 1, seen > 0], -1) if at_probs",
        "np.ones((*seen.shape, 2), bool) if at_probs",
        "test_relax.py",
        "certain",
    ),
    (
        "equal costs leave a rounding",
        "relaxit_jax/elbo.py",
        "cost = cost - cost[:1]",
        "cost = cost + 0",
        "test_elbo.py",
        "stays_where_it_is",
    ),
    (
        "the largest k by jax.lax.top_k",
        MATHS,
        "tuple(jax.lax.platform_dependent(x, cpu=exact, default=functools.partial(jax.lax.top_k, k=k)))",
        "tuple(jax.lax.top_k(x, k))",
        "test_sharding.py",
        "asks_nobody",
    ),
    (
        "AutoMeanField masks nothing",
        "relaxit_jax/handlers/_auto_mean_field.py",
        'return {name: _mask(trace[name]["fn"])[0] for name in self._sites}',
        "return {}",
        "test_auto_mean_field.py",
        "its_rows",
    ),
    (
        "quantiles of bits are those of their opposite",
        "relaxit_jax/handlers/_auto_mean_field.py",
        'below = 1 - probs[..., None] if self.kind == "bit"',
        'below = probs[..., None] if self.kind == "bit"',
        "test_auto_mean_field.py",
        "quantiles",
    ),
    (
        "num_values is not checked before the model runs",
        "relaxit_jax/handlers/_site.py",
        "arg.as_static_int(which, number, 1, counts.MOST_VALUES)",
        "pass",
        "test_errors.py test_auto_mean_field.py",
        "num_values",
    ),
    (
        "what f returns is not looked at",
        f"{ESTIMATORS}/_estimate.py",
        "arg.require(jax.tree.structure(value) == jax.tree.structure(0), name,",
        "arg.require(True, name,",
        "test_errors.py",
        "what_f_returns or a_pair_of",
    ),
    (
        "no plate inside of a scan is seen to be subsampled",
        "relaxit_jax/_numpyro.py",
        "return subsample not in (None, size)",
        "return False",
        "test_handlers.py test_elbo.py",
        "step_to_step or refus",
    ),
    (
        "a leaf of a report has the cosines of the whole gradient",
        "relaxit_jax/diagnostics/_measure.py",
        '"mean_cosine": means["cosine"][place]',
        '"mean_cosine": means["cosine"][0]',
        "test_diagnostics.py",
        "leaf",
    ),
    (
        "the error of a leaf's mean squared error is that of the whole gradient",
        "relaxit_jax/diagnostics/_measure.py",
        'squares["length"][place]',
        'squares["length"][0]',
        "test_diagnostics.py",
        "leaf",
    ),
    (
        "a report does not see the gradient of f's own parameters",
        "relaxit_jax/diagnostics/_measure.py",
        "functools.partial(f, jax.tree.unflatten(tree, leaves))",
        "functools.partial(f, jax.tree.unflatten(tree, jax.lax.stop_gradient(leaves)))",
        "test_diagnostics.py",
        "leaf",
    ),
]


def tests_that_fail(file, old, new, files, expression):
    """Of the tests chosen, run on a copy with the defect: how many there were, and which failed how often."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("relaxit_jax", "tests", "benchmarks", "examples", "tools"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("pyproject.toml", "conftest.py"):
            shutil.copy(ROOT / name, copy)
        (copy / file).write_text((copy / file).read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-n", "1", "-q", "-rf", "--tb=no", "-k", expression]
        done = subprocess.run(
            [*command, *(f"tests/{name}" for name in files.split())],
            cwd=copy, env=os.environ | {"PYTHONPATH": folder}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    if done.returncode not in (0, 1):
        raise click.ClickException(done.stdout)
    failed = re.findall(r"^FAILED tests/\w+\.py::(\w+)", done.stdout, re.MULTILINE)
    passed = re.search(r"(\d+) passed", done.stdout)
    return len(failed) + int(passed[1] if passed else 0), {name: failed.count(name) for name in failed}


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
def main(words):
    for defect, *mutation in MUTATIONS:
        if words and not any(word in defect for word in words):
            continue
        chosen, failed = tests_that_fail(*mutation)
        click.echo(f"{defect}: {sum(failed.values())} of {chosen}")
        for name, count in failed.items():
            click.echo(f"  {name}" + f" x {count}" * (count > 1))
    click.echo(sentence(versions()))


if __name__ == "__main__":
    main()
