"""Every public function with right arguments, and wrong ones for each kind of argument."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers

import relaxit_jax as rj
from cases import CASES, DISTRIBUTIONS
from relaxit_jax import diagnostics as dg
from relaxit_jax import distributions as rd
from relaxit_jax import elbo, laplace_bridge
from relaxit_jax import estimators as es
from relaxit_jax import handlers as hd
from relaxit_jax import quantizers as qz
from relaxit_jax import structured as st

KEY = jax.random.key(0)
BITS = es.Bernoulli(jnp.zeros((2, 3)))
SUM = lambda b: jnp.sum(b, -1)
CHAIN = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
STEP = lambda state, token: (CHAIN[token], state)

# --- wrong arguments of each kind: a function of a good one --------------------------------------


def no_numbers(good):
    """Neither an array nor anything that becomes one."""
    ragged, objects = [[1.0, 2.0], [3.0]], np.full(np.shape(good), None)
    return [None, ragged, "one", ["one", "two"], {"a": 1.0}, {1.0}, objects, float, SUM]


def no_reals(good):
    x = jnp.asarray(good, jnp.float32)
    return [*no_numbers(good), KEY, [KEY, KEY], x + 0j, np.asarray(x) + 0j, x.astype(jnp.float8_e4m3fn)]


def no_floats(good):
    """Integer arrays and booleans are not parameters; a Python number of either kind may be meant as one."""
    return [
        *no_reals(good),
        np.ones_like(good, int),
        jnp.ones_like(good, int),
        np.ones_like(good, bool),
        True,
    ]


def no_indices(good):
    return [*no_reals(good), jnp.asarray(good, jnp.float32), np.asarray(good) > 0]


def no_complex_numbers(good):
    x = jnp.asarray(good, jnp.float32)
    return [*no_numbers(good), KEY, x.astype(jnp.float8_e4m3fn)]


def no_keys(good):
    arrays = np.zeros(2), jnp.zeros(2), jnp.zeros(3, jnp.uint32), jax.random.split(KEY, 3)
    return [None, 0, "key", [0, 0], {}, np.float64(0), float, np.array([None]), *arrays]


def no_integers(good):
    return [
        -1,
        1.5,
        "one",
        True,
        [1, 2],
        np.array([1, 2]),
        jnp.float32(2),
        {},
        1j,
        np.inf,
        np.nan,
        KEY,
        float,
    ]


def no_flags(good):
    return ["no", "False", None, 0, 1, 0.5, {}, [], np.array([True, False]), jnp.array([True, False]), KEY]


def no_functions(good):
    return [None, "f", 3, jnp.zeros(2), {}]


def no_shapes(good):
    return ["ab", 7, 1.5, (1.5,), (None,), [[1], [2, 3]], (1j,), (-1,), np.zeros(2), jnp.zeros(2), KEY]


def no_families(good):
    of_numpyro = dist.Bernoulli(logits=jnp.zeros(3)), dist.CategoricalLogits(jnp.zeros(3))
    classes = es.Bernoulli, rd.RelaxedBernoulli, rd.RelaxedBernoulli(logits=0.0, tau=1.0)
    return [None, "q", jnp.zeros((2, 3)), np.zeros((2, 3)), [0.0], {}, SUM, *of_numpyro, *classes]


def no_choices(good):
    return [None, "soft", 3, ["exact"], {}, np.ones(3), KEY]


def no_fractions(good):
    return [None, "1", [[1.0], [2.0, 3.0]], np.full(2, 0.5), {}, 1j, -1.0, 0.0, np.nan, KEY, True]


def no_stretches(good):
    return [None, "ab", [[1.0], [2.0, 3.0]], np.ones(3), {}, (1j, 2), -1.0, (np.nan, 2.0), (False, True), KEY]


def no_configs(good):
    one = {"z": "soft"}, {"z": 3}, {"z": np.ones(2)}, {"z": dist.Normal}, {"z": lambda d: 3}
    return ["a", "", ["z"], [], [("z", None)], 3, np.ones(2), SUM, {"other": None}, {1: None}, *one]


def no_counts(good):
    one = {"z": -1}, {"z": "a"}, {"z": 2.5}, {"other": 3}
    return [-1, 0, 2.5, "a", [3], np.array([2, 3]), True, 10**9, *one]


def no_estimators(good):
    return [None, [es.rloo], es.rloo, {}, {"rloo": None}, {1: es.rloo}, "rloo"]


def no_params(good):
    return ["one", np.ones(2, int), True, 1, {"a": jnp.ones(2), "b": jnp.ones(2, int)}, KEY]


def no_potentials(good):
    """Any pytree of floats may be right: the user's function decides."""
    return ["one", np.ones(2, int), True, {"a": jnp.ones(2), "b": jnp.ones(2, int)}, KEY, (), None]


def no_functions_but_none(good):
    return no_functions(good)[1:]


def no_levels(good):
    return [
        None,
        "ab",
        7,
        1.5,
        (1.5, 2),
        (1, 2),
        ((2,), 2),
        (0, 3),
        (-2, 3),
        np.ones((2, 2)),
        (True, 2),
        {},
        KEY,
    ]


def no_numbers_of_rows(good):
    """Wrong values of `count`, whose default is None."""
    return no_indices(np.array([1, 2]))


def no_axis_names(good):
    return ["nothing", 3, 1.5, ("a", "b"), ["a"], {}, SUM, np.ones(2), KEY]


def no_codebook_states(good):
    return [None, "one", np.zeros(3), [], {}, SUM, tuple(good), good._replace(count=np.ones(9, np.float32)),
            good._replace(codebook="one"), good._replace(total=np.ones((2, 2), int))]  # fmt: skip


def no_states(good):
    """A state is any pytree of arrays."""
    return ["one", {"a": "one"}, np.array([None]), float, [SUM]]


INTEGERS = ("calls", "k", "num_samples", "num_values", "num_iters", "max_length", "event_ndims", "batch_size")
INTEGERS += ("reference_samples", "num_particles", "end", "n")
FUNCTIONS = ("log_joint", "f", "control_variate", "loss", "log_prob_fn", "sampler", "model", "guide")
KINDS = {
    "key": no_keys,
    "rng_key": no_keys,
    "shape": no_shapes,
    "q": no_families,
    "eps": no_fractions,
    "stretch": no_stretches,
    "config": no_configs,
    "estimators": no_estimators,
    "levels": no_levels,
    "count": no_numbers_of_rows,
    "axis_name": no_axis_names,
    "index": no_indices,
    "start": lambda good: no_integers(good)[1:],  # all of these but -1, which a model may mean
    **dict.fromkeys(INTEGERS, no_integers),
    **dict.fromkeys(("has_aux", "hard", "log_space", "ordered", "rival"), no_flags),
    **dict.fromkeys(FUNCTIONS, no_functions),
    **dict.fromkeys(("reference", "kl", "law", "method", "gradient"), no_choices),
    **dict.fromkeys(("bit", "z", "t", "s", "sample"), no_reals),
    **dict.fromkeys(("table", "if_one", "if_zero"), no_complex_numbers),
}
OPTIONAL = ("shape", "num_values", "end", "reference_samples", "count", "axis_name")  # None is their default

KINDS_OF_MARGINALS = {
    "params": lambda good: ["a", [], 3, np.ones(2), SUM],
    "num_values": no_counts,
    "rng_key": lambda good: [key for key in no_keys(good) if key is not None],
}

# --- every public function, and good arguments ------------------------------------------------


def count_model():
    return numpyro.sample("z", dist.Poisson(2.0))


def relaxed(fn, **options):
    """The model is run, since `relax` checks names of sites only then."""
    model = handlers.seed(hd.relax(fn, **options), 0)
    jax.eval_shape(lambda: model())


class Call:
    """A public function with right arguments."""

    def __init__(self, function, /, *, kinds=(), **arguments):
        self.function, self.arguments, self.kinds = function, arguments, KINDS | dict(kinds)

    def bad(self, name):
        """Wrong values for this argument; by default it is an array of floats."""
        good = self.arguments[name]
        bad = self.kinds.get(name, no_floats)(good)
        return [x for x in bad if not (x is None and name in OPTIONAL)]

    def in_trace(self, **changed):
        """Whatever the function returns, nothing leaves the trace."""
        self.function(**self.arguments | changed)

    def ways(self, name, bad):
        """Outside a jitted function, inside one, and as an argument of one."""
        yield lambda: self.function(**self.arguments | {name: bad})
        yield lambda: jax.eval_shape(lambda: self.in_trace(**{name: bad}))
        if isinstance(bad, jax.Array) or (isinstance(bad, np.ndarray) and bad.dtype.kind in "bifc"):
            yield lambda: jax.eval_shape(lambda x: self.in_trace(**{name: x}), bad)


def calls():
    """By their names, the samplers with their densities first."""
    found = {}
    for case in CASES:
        name, taken = case.sampler.__name__, inspect.signature(case.sampler).parameters
        more = {n: taken[n].default for n in ("hard", "log_space", "stretch", "shape", "count") if n in taken}
        found.setdefault(name, Call(case.sampler, key=KEY, **more | case.arguments()))
        density = getattr(rj, f"{name}_log_prob", None)
        if density is not None:
            taken = inspect.signature(density).parameters
            more = {n: taken[n].default for n in ("log_space", "stretch", "ordered", "count") if n in taken}
            own = {n: x for n, x in case.params.items() if n in taken}
            exact = ("straight_through_categorical", "straight_through_bernoulli", "simple_top_k")
            exact += ("relaxed_permutation",)
            kind = no_indices if name == "gumbel_top_k" else no_reals if name in exact else no_floats
            value = np.full((2, *case.event), 0 if name in exact else 0.5, np.float32)
            value = np.array([[0, 1], [1, 2]]) if name == "gumbel_top_k" else value
            found.setdefault(
                density.__name__, Call(density, kinds={"value": kind}, value=value, **own, **more)
            )
    for case in DISTRIBUTIONS:
        taken = inspect.signature(case.distribution).parameters
        more = {n: taken[n].default for n in ("hard", "stretch") if n in taken}
        arguments = more | case.params | case.options
        found.setdefault(case.distribution.__name__, Call(case.distribution, **arguments))
    logits, ones = np.zeros(3, np.float32), np.ones(2, np.float32)
    stretch = {"stretch": (-0.1, 1.1)}
    count = {"num_values": 60, "eps": 1e-8}
    given = {"key": KEY, "f": SUM, "q": BITS}
    beams = {"key": KEY, "log_prob_fn": STEP, "state": (), "k": 2, "max_length": 3, "start": 0, "end": 1}
    weights = np.full((4, 3), 1 / 3, np.float32)
    codes = qz.codebook_state(weights)
    pyro = {"temperature": np.float32(0.5), "logits": logits}
    made = dg.GradientReport(
        ("rloo",), "exact", 4, ones, 0 * ones, **dict.fromkeys(("bias", "bias_error"), ones[None]),
        **{name: np.ones(1) for name in ("bias_norm", "bias_norm_error", "variance", "mse", "mse_error",
                                         "cosine", "mean_cosine", "seconds")}, calls=np.ones(1, int),
    )  # fmt: skip
    report = {"num_samples": 4, "batch_size": 2, "reference": "auto", "reference_samples": None}
    chain = {"unary": np.zeros((3, 2), np.float32), "transition": np.zeros((2, 2), np.float32)}
    tree, tau = {"weights": np.zeros((3, 3), np.float32)}, {"tau": np.float32(0.5)}
    path, branches = np.eye(2, dtype=np.float32)[[0, 1, 1]], np.float32([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    drawn = {"key": KEY, "shape": None}
    return found | {
        "simple_top_k_marginals": Call(rj.simple_top_k_marginals, logits=logits, k=2, count=None),
        "gumbel_top_k_marginals": Call(rj.gumbel_top_k_marginals, logits=logits, k=2),
        "k_hot_indices": Call(
            rj.k_hot_indices, kinds={"value": no_reals}, value=np.array([0, 1, 1], np.float32), k=2
        ),
        "bernoulli_entropy": Call(rj.bernoulli_entropy, logits=logits),
        "bernoulli_kl": Call(rj.bernoulli_kl, p_logits=logits, q_logits=logits),
        "categorical_entropy": Call(rj.categorical_entropy, logits=logits),
        "categorical_kl": Call(rj.categorical_kl, p_logits=logits, q_logits=logits),
        "mix_uniform": Call(rj.mix_uniform, logits=logits, fraction=np.float32(0.1)),
        "gaussian_bernoulli_gate": Call(rj.gaussian_bernoulli_gate, loc=logits),
        "gaussian_bernoulli_l0": Call(rj.gaussian_bernoulli_l0, loc=logits, scale=np.float32(1)),
        "chain_log_partition": Call(st.chain_log_partition, **chain),
        "chain_marginals": Call(st.chain_marginals, **chain),
        "chain_sample": Call(st.chain_sample, **drawn, **chain),
        "chain_log_prob": Call(st.chain_log_prob, kinds={"value": no_reals}, value=path, **chain),
        "relaxed_chain": Call(st.relaxed_chain, **drawn, **chain, **tau),
        "tree_log_partition": Call(st.tree_log_partition, **tree),
        "tree_marginals": Call(st.tree_marginals, **tree),
        "tree_sample": Call(st.tree_sample, **drawn, **tree),
        "tree_log_prob": Call(st.tree_log_prob, kinds={"value": no_reals}, value=branches, **tree),
        "relaxed_tree": Call(st.relaxed_tree, **drawn, **tree, **tau),
        "relaxed_structure": Call(
            st.relaxed_structure, kinds={"log_partition": no_functions, "potentials": no_potentials}, **drawn,
            log_partition=st.tree_log_partition, potentials=tree["weights"], **tau,
        ),
        "LinearChain": Call(rd.LinearChain, **chain),
        "SpanningTree": Call(rd.SpanningTree, **tree),
        "LinearChain of estimators": Call(es.LinearChain, **chain, event_ndims=2),
        "SpanningTree of estimators": Call(es.SpanningTree, **tree, event_ndims=2),
        "hard_concrete_gate": Call(rj.hard_concrete_gate, logits=logits, **stretch),
        "hard_concrete_l0": Call(rj.hard_concrete_l0, logits=logits, tau=np.float32(1), **stretch),
        "poisson_support": Call(rj.poisson_support, rate=ones, **count),
        "geometric_support": Call(rj.geometric_support, logits=ones, **count),
        "binomial_support": Call(
            rj.binomial_support, kinds={"total_count": no_reals}, total_count=np.array([3, 4]), logits=ones,
            num_values=5, eps=1e-8,
        ),
        "negative_binomial_support": Call(
            rj.negative_binomial_support, total_count=ones, logits=-ones, **count
        ),
        "stochastic_beam_search": Call(rj.stochastic_beam_search, kinds={"state": no_states}, **beams),
        "dirichlet_to_gaussian": Call(laplace_bridge.dirichlet_to_gaussian, concentration=1 + logits),
        "gaussian_to_dirichlet": Call(
            laplace_bridge.gaussian_to_dirichlet, loc=logits, covariance=np.eye(3, dtype=np.float32),
            log_space=False,
        ),
        "RelaxedOneHotCategorical": Call(rd.RelaxedOneHotCategorical, **pyro),
        "RelaxedOneHotCategoricalStraightThrough": Call(rd.RelaxedOneHotCategoricalStraightThrough, **pyro),
        "to_logistic_normal": Call(
            rd.to_logistic_normal, kinds={"dirichlet": no_families}, dirichlet=dist.Dirichlet(1 + logits)
        ),
        "to_dirichlet": Call(
            rd.to_dirichlet, kinds={"logistic_normal": no_families},
            logistic_normal=rd.LogisticNormalSoftmax(loc=logits, scale=1 + logits),
        ),
        "fused_kernels": Call(rj.fused_kernels, kinds={"enabled": no_flags}, enabled=False),
        "straight_through": Call(
            rj.straight_through, kinds={"hard": no_reals, "soft": no_floats}, hard=ones, soft=ones
        ),
        "embed": Call(
            rj.embed, kinds={"draw": no_reals, "table": no_floats, "soft": no_flags},
            draw=np.eye(2, dtype=np.float32), table=weights[:2], soft=False,
        ),
        "vector_quantize": Call(qz.vector_quantize, x=weights, codebook=weights, gradient="rotation"),
        "residual_quantize": Call(
            qz.residual_quantize, x=weights, codebooks=weights[None], gradient="rotation"
        ),
        "finite_scalar_quantize": Call(qz.finite_scalar_quantize, x=weights, levels=(3, 4, 5)),
        "finite_scalar_codes": Call(qz.finite_scalar_codes, index=np.arange(3), levels=(3, 4)),
        "lookup_free_quantize": Call(qz.lookup_free_quantize, x=weights),
        "lookup_free_entropy": Call(qz.lookup_free_entropy, x=weights, tau=np.float32(1)),
        "codebook_state": Call(qz.codebook_state, codebook=weights),
        "update_codebook": Call(
            qz.update_codebook, kinds={"state": no_codebook_states}, state=codes, x=weights,
            index=np.arange(4), decay=np.float32(0.9), smoothing=np.float32(0), axis_name=None,
        ),
        "restart_unused": Call(
            qz.restart_unused, kinds={"state": no_codebook_states}, key=KEY, state=codes, x=weights,
            threshold=np.float32(1), axis_name=None,
        ),
        "perplexity": Call(qz.perplexity, index=np.arange(3), n=4, axis_name=None),
        "Bernoulli": Call(es.Bernoulli, logits=logits, event_ndims=1),
        "OneHotCategorical of estimators": Call(es.OneHotCategorical, logits=logits, event_ndims=1),
        "Subset": Call(es.Subset, logits=logits, k=2, law="simple", event_ndims=1),
        "PlackettLuce": Call(es.PlackettLuce, logits=logits, event_ndims=1),
        "reinforce": Call(es.reinforce, **given, baseline=np.float32(0), has_aux=False),
        "rloo": Call(es.rloo, **given, num_samples=2, has_aux=False),
        "arm": Call(es.arm, **given, has_aux=False),
        "disarm": Call(es.disarm, **given, has_aux=False),
        "arms": Call(es.arms, **given, num_samples=2, has_aux=False),
        "unordered_set": Call(
            es.unordered_set, key=KEY, f=SUM, q=es.OneHotCategorical(logits, 1), num_samples=2, has_aux=False
        ),
        "from_set": Call(es.from_set, values=ones, log_prob=-ones),
        "vimco": Call(es.vimco, key=KEY, log_joint=SUM, q=BITS, num_samples=2, has_aux=False),
        "rebar": Call(es.rebar, **given, tau=np.float32(0.5), eta=np.float32(1), has_aux=False),
        "relax of estimators": Call(es.relax, **given, control_variate=SUM, has_aux=False),
        "exact": Call(es.exact, f=SUM, q=BITS, has_aux=False),
        "value_and_grads": Call(
            es.value_and_grads, kinds={"params": no_params, "variate": no_params}, loss=lambda p, v: p * v,
            params=np.float32(1), variate=np.float32(1),
        ),
        "gradient_report": Call(
            dg.gradient_report, kinds={"params": no_params}, **given, estimators={"rloo": es.rloo},
            params=None, **report,
        ),
        "recommend": Call(dg.recommend, kinds={"report": no_families}, report=made, calls=4),
        "from_sampler": Call(dg.from_sampler, sampler=rj.reinmax),
        "check": Call(hd.check, kinds=KINDS_OF_MARGINALS | {"losses": lambda good: ["text", [1.0]]},
                      model=count_model, guide=count_model, params={}, tau=0.5, losses=np.ones(200),
                      rival=False, num_samples=100, num_values=20, rng_key=KEY),
        "marginals": Call(hd.marginals, kinds=KINDS_OF_MARGINALS, guide=count_model, params={}, num_samples=2,
                          rng_key=KEY, num_values=3),
        "relax": Call(relaxed, kinds={"fn": no_functions_but_none, "num_values": no_counts}, fn=count_model,
                      tau=np.float32(0.5), method="relaxed", kl="discrete", config={}, num_values=20),
        "unrounded": Call(hd.unrounded, kinds={"fn": no_functions_but_none}, fn=count_model),
        "take": Call(hd.take, table=np.ones((3, 2), np.float32), z=weights),
        "select": Call(hd.select, bit=ones, if_one=np.float32(1), if_zero=np.float32(0)),
        "less": Call(hd.less, t=np.float32(1), s=weights),
        "greater": Call(hd.greater, t=np.float32(1), s=weights),
        "equal": Call(hd.equal, t=np.float32(1), s=weights),
        **{
            bound.__name__: Call(
                bound, kinds={"vectorize_particles": lambda good: [None, "vmap", 3, np.ones(2)]},
                num_particles=2, vectorize_particles=True,
            )
            for bound in (elbo.RLOO_ELBO, elbo.VIMCO_ELBO)
        },
    }  # fmt: skip


CALLS = calls()
ARGUMENTS = [(name, argument) for name, call in CALLS.items() for argument in call.arguments]
