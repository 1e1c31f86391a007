"""Ten models as people write them, for each guide, compared with known answers.

Each has discrete latents that are coupled, many, or hidden behind continuous ones. The answer is a sum over
all values, a forward-backward pass, a Gibbs sampler or coordinate ascent. If only a bound is known, it is
the best one that was found for the model with its discrete sites summed out. Writes a table to the terminal
and results/guides.json.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import time
import warnings
from collections.abc import Callable

import click
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import scipy.special as sp
import scipy.stats as st
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from records import out_option, write
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, AutoStructured, check, marginals, relax, select, take

# --- a change point of yearly counts ----------------------------------------------------------

YEARS = 110
COUNTS = np.random.default_rng(0).poisson(np.where(np.arange(YEARS) < 41, 3.0, 0.9))


def change_point():
    early = numpyro.sample("early", dist.Gamma(2.0, 1.0))
    late = numpyro.sample("late", dist.Gamma(2.0, 1.0))
    when = numpyro.sample("when", dist.Categorical(np.full(YEARS, 1 / YEARS, np.float32)))
    before = take(np.tril(np.ones((YEARS, YEARS), np.float32), -1), when)
    numpyro.sample("y", dist.Poisson(select(before, early, late)).to_event(1), obs=COUNTS)


def change_point_answer():
    """The rates integrated out: Gamma-Poisson marginals before and after the change."""
    total = np.append(0, COUNTS.cumsum())

    def marginal(n, s):
        return sp.gammaln(2 + s) - (2 + s) * np.log(1 + n)

    n, s = np.arange(YEARS), total[:YEARS]
    return {"when": sp.softmax(marginal(n, s) + marginal(YEARS - n, total[-1] - s))}


# --- annotators who disagree (Dawid and Skene, 1979) ------------------------------------------

ITEMS, ANNOTATORS, CLASSES = 120, 6, 3


def annotations():
    rng = np.random.default_rng(1)
    truth = rng.choice(CLASSES, ITEMS, p=[0.5, 0.3, 0.2])
    skill = rng.uniform(0.45, 0.85, ANNOTATORS)
    confusion = skill[:, None, None] * np.eye(CLASSES) + (1 - skill)[:, None, None] * rng.dirichlet(
        np.ones(CLASSES), (ANNOTATORS, CLASSES)
    )
    draw = lambda p: rng.choice(CLASSES, p=p)
    return np.array([[draw(confusion[j, k]) for j in range(ANNOTATORS)] for k in truth])


LABELS = annotations()
DIAGONAL = (1 + 2 * np.eye(CLASSES)).astype(np.float32)  # a prior that annotators are mostly right


def annotators():
    shares = numpyro.sample("shares", dist.Dirichlet(np.ones(CLASSES, np.float32)))
    with numpyro.plate("annotators", ANNOTATORS, dim=-2), numpyro.plate("classes", CLASSES, dim=-1):
        confusion = numpyro.sample("confusion", dist.Dirichlet(DIAGONAL))
    with numpyro.plate("items", ITEMS, dim=-1):
        z = numpyro.sample("z", dist.Categorical(shares))
        for j in range(ANNOTATORS):
            numpyro.sample(f"label_{j}", dist.Categorical(take(confusion[j], z)), obs=LABELS[:, j])


def annotators_answer():
    votes = np.eye(CLASSES)[LABELS]  # items, annotators, labels
    q = votes.mean(1)
    for _ in range(500):
        share = sp.digamma(1 + q.sum(0)) - sp.digamma(CLASSES + ITEMS)
        counts = DIAGONAL + np.einsum("ik,ijl->jkl", q, votes)
        confusion = sp.digamma(counts) - sp.digamma(counts.sum(-1, keepdims=True))
        q = sp.softmax(share + np.einsum("jkl,ijl->ik", confusion, votes), -1)
    return {"z": q}


# --- twelve causes of twenty findings ---------------------------------------------------------

CAUSES, FINDINGS = 12, 20


def noisy_or_data():
    rng = np.random.default_rng(2)
    prior = rng.uniform(0.1, 0.3, CAUSES)
    strength = rng.uniform(0.3, 2.5, (CAUSES, FINDINGS)) * (rng.uniform(size=(CAUSES, FINDINGS)) < 0.3)
    z = rng.uniform(size=CAUSES) < prior
    found = rng.uniform(size=FINDINGS) < 1 - np.exp(-0.05 - z @ strength)
    return prior.astype(np.float32), strength.astype(np.float32), found.astype(int)


PRIOR, STRENGTH, FOUND = noisy_or_data()


def causes():
    with numpyro.plate("causes", CAUSES):
        z = numpyro.sample("z", dist.Bernoulli(PRIOR))
    none = jnp.exp(-0.05 - z @ STRENGTH)
    numpyro.sample("found", dist.Bernoulli(probs=1 - none).to_event(1), obs=FOUND)


def causes_answer():
    z = np.array(list(itertools.product([0, 1], repeat=CAUSES)))
    none = np.exp(-0.05 - z @ STRENGTH.astype(float))
    joint = st.bernoulli(PRIOR).logpmf(z).sum(-1) + np.log(np.where(FOUND, 1 - none, none)).sum(-1)
    return {"z": sp.softmax(joint) @ z}


# --- a sparse regression with thirty columns --------------------------------------------------

COLUMNS, SLAB, INCLUDED = 30, 1.5, 0.15


def regression_data():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, COLUMNS))
    x[:, 1::3] = 0.8 * x[:, 0::3] + 0.6 * x[:, 1::3]  # pairs of similar columns
    slopes = np.zeros(COLUMNS)
    slopes[[0, 7, 13, 22]] = 1.2, -0.9, 0.5, 0.35
    return x.astype(np.float32), (x @ slopes + rng.normal(size=len(x))).astype(np.float32)


X, Y = regression_data()


def spike_and_slab():
    with numpyro.plate("columns", COLUMNS):
        on = numpyro.sample("on", dist.Bernoulli(INCLUDED))
        slope = numpyro.sample("slope", dist.Normal(0, SLAB))
    numpyro.sample("y", dist.Normal(X @ (on * slope), 1).to_event(1), obs=Y)


def spike_and_slab_answer(sweeps=8000):
    """Gibbs over the bits, with the slopes integrated out; the mean of the conditional probabilities."""
    x, y = X.astype(float), Y.astype(float)
    gram, cross = x.T @ x, x.T @ y
    rng, on, total = np.random.default_rng(4), np.zeros(COLUMNS, bool), np.zeros(COLUMNS)

    def log_evidence(on):
        precision = gram[np.ix_(on, on)] + np.eye(on.sum()) / SLAB**2
        root = np.linalg.cholesky(precision)
        half = np.linalg.solve(root, cross[on])
        return half @ half / 2 - np.log(np.diag(root)).sum() - on.sum() * np.log(SLAB)

    for sweep in range(sweeps):
        for j in range(COLUMNS):
            odds = np.log(INCLUDED / (1 - INCLUDED))
            for bit, sign in ((True, 1), (False, -1)):
                on[j] = bit
                odds += sign * log_evidence(on)
            on[j] = rng.uniform() < sp.expit(odds)
            if sweep >= sweeps // 10:
                total[j] += sp.expit(odds)
    return {"on": total / (sweeps - sweeps // 10)}


# --- chains -----------------------------------------------------------------------------------

STEPS = 60
MOVES = np.array([[0.9, 0.08, 0.02], [0.07, 0.86, 0.07], [0.03, 0.12, 0.85]], np.float32)
LEVELS = np.array([-1.0, 0.0, 1.2], np.float32)


def walk(rng, moves, length):
    z = [0]
    for _ in range(length - 1):
        z.append(rng.choice(len(moves), p=moves[z[-1]] / moves[z[-1]].sum()))
    return np.array(z)


def chain_data():
    rng = np.random.default_rng(5)
    return (LEVELS[walk(rng, MOVES, STEPS)] + rng.normal(size=STEPS)).astype(np.float32)


CHAIN = chain_data()


def hidden_markov():
    def step(before, y):
        z = numpyro.sample("z", dist.Categorical(logits=take(np.log(MOVES), before)))
        numpyro.sample("y", dist.Normal(take(LEVELS, z), 1), obs=y)
        return z, None

    first = numpyro.sample("first", dist.Categorical(np.full(3, 1 / 3, np.float32)))
    numpyro.sample("y_first", dist.Normal(take(LEVELS, first), 1), obs=CHAIN[0])
    scan(step, first, CHAIN[1:])


def forward_backward(seen, moves, start):
    """Marginals of a chain, from log-likelihoods of shape (T, K); and the log-evidence."""
    ahead = [np.log(start) + seen[0]]
    for t in range(1, len(seen)):
        ahead.append(seen[t] + sp.logsumexp(ahead[-1][:, None] + np.log(moves), 0))
    back = [np.zeros(len(start))]
    for t in range(len(seen) - 1, 0, -1):
        back.append(sp.logsumexp(np.log(moves) + seen[t] + back[-1], -1))
    return sp.softmax(np.array(ahead) + np.array(back[::-1]), -1), sp.logsumexp(ahead[-1])


def hidden_markov_answer():
    seen = st.norm(LEVELS, 1).logpdf(CHAIN[:, None])
    q, _ = forward_backward(seen, MOVES.astype(float), np.full(3, 1 / 3))
    return {"first": q[0], "z": q[1:]}


STAY = np.array([[0.9, 0.1], [0.15, 0.85]], np.float32)
HEIGHTS = np.array([0.0, 1.5], np.float32), np.array([0.0, 2.3], np.float32)


def two_chains_data():
    rng = np.random.default_rng(6)
    a, b = walk(rng, STAY, STEPS), walk(rng, STAY, STEPS)
    return (HEIGHTS[0][a] + HEIGHTS[1][b] + 0.8 * rng.normal(size=STEPS)).astype(np.float32)


TWO = two_chains_data()


def two_chains():
    def step(before, y):
        a = numpyro.sample("a", dist.Categorical(logits=take(np.log(STAY), before[0])))
        b = numpyro.sample("b", dist.Categorical(logits=take(np.log(STAY), before[1])))
        numpyro.sample("y", dist.Normal(take(HEIGHTS[0], a) + take(HEIGHTS[1], b), 0.8), obs=y)
        return (a, b), None

    half = dist.Categorical(np.full(2, 0.5, np.float32))
    scan(step, (numpyro.sample("first_a", half), numpyro.sample("first_b", half)), TWO)


def two_chains_answer():
    joint = np.kron(STAY, STAY).astype(float)
    mean = (HEIGHTS[0][:, None] + HEIGHTS[1]).ravel()
    seen = np.concatenate([np.zeros((1, 4)), st.norm(mean, 0.8).logpdf(TWO[:, None])])
    q, _ = forward_backward(seen, joint, np.full(4, 1 / 4))
    q = q.reshape(-1, 2, 2)
    a, b = q.sum(2), q.sum(1)
    return {"first_a": a[0], "first_b": b[0], "a": a[1:], "b": b[1:]}


def switching_data(length=100):
    rng = np.random.default_rng(7)
    z, y = walk(rng, np.array([[0.95, 0.05], [0.08, 0.92]]), length), [0.0]
    for t in range(1, length):
        y.append(np.array([0.9, -0.6])[z[t]] * y[-1] + np.array([0.3, 0.0])[z[t]] + 0.5 * rng.normal())
    return np.array(y, np.float32)


SERIES = switching_data()
HOLD = np.array([[0.95, 0.05], [0.05, 0.95]], np.float32)


def switching_parts():
    with numpyro.plate("regimes", 2):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        level = numpyro.sample("level", dist.Normal(0, 1))
    return slope, level, numpyro.sample("noise", dist.HalfNormal(1.0))


def switching():
    slope, level, noise = switching_parts()

    def step(before, pair):
        last, y = pair
        z = numpyro.sample("z", dist.Categorical(logits=take(np.log(HOLD), before)))
        numpyro.sample("y", dist.Normal(take(slope, z) * last + take(level, z), noise), obs=y)
        return z, None

    first = numpyro.sample("first", dist.Categorical(np.full(2, 0.5, np.float32)))
    scan(step, first, (SERIES[:-1], SERIES[1:]))


def switching_summed():
    """The same with the states summed out."""
    slope, level, noise = switching_parts()

    def step(weights, pair):
        last, y = pair
        ahead = jax.nn.logsumexp(weights[:, None] + np.log(HOLD), 0)
        ahead += dist.Normal(slope * last + level, noise).log_prob(y)
        return ahead, None

    last, _ = jax.lax.scan(step, jnp.full(2, np.log(0.5)), (SERIES[:-1], SERIES[1:]))
    numpyro.factor("y", jax.nn.logsumexp(last))


# --- how many animals -------------------------------------------------------------------------

SITES, VISITS = 20, 4


def counts_data():
    rng = np.random.default_rng(8)
    return rng.binomial(rng.poisson(6.0, SITES)[:, None], 0.5, (SITES, VISITS))


SEEN = counts_data()
MOST = 31


def populations():
    """Counts that the sightings rule out are left out: a Categorical over seen, seen + 1, ..."""
    rate = numpyro.sample("rate", dist.Gamma(4.0, 0.7))
    found = numpyro.sample("found", dist.Beta(5.0, 5.0))
    sizes = np.arange(MOST)
    log_pmf = dist.Poisson(rate).log_prob(sizes)
    log_pmf = jnp.where(sizes >= SEEN.max(-1)[:, None], log_pmf, -1e4)
    ways = sp.gammaln(sizes + 1.0) - sp.gammaln(SEEN[..., None] + 1.0)
    ways = ways - sp.gammaln(np.maximum(sizes - SEEN[..., None], 0) + 1.0)
    missed = np.maximum(sizes - SEEN[..., None], 0)
    with numpyro.plate("sites", SITES):
        n = numpyro.sample("n", dist.Categorical(logits=log_pmf))
        # Categorical normalizes the truncated Poisson: this adds the normalizer again
        numpyro.factor("beyond", jax.nn.logsumexp(log_pmf, -1))
        seen = jnp.sum(ways + SEEN[..., None] * jnp.log(found) + missed * jnp.log1p(-found), 1)
        numpyro.factor(
            "y", jnp.sum(jax.nn.one_hot(n, MOST) * seen, -1) if n.ndim == 1 else jnp.sum(n * seen, -1)
        )


def populations_answer():
    """Computed on a grid over the two continuous sites."""
    rate, found = np.meshgrid(np.linspace(2, 14, 150), np.linspace(0.1, 0.9, 150), indexing="ij")
    n = np.arange(MOST)
    joint = st.poisson(rate[..., None]).logpmf(n)[:, :, None] + sum(
        st.binom(n, found[..., None, None]).logpmf(SEEN[:, v, None]) for v in range(VISITS)
    )
    weight = st.gamma(4, scale=1 / 0.7).logpdf(rate) + st.beta(5, 5).logpdf(found)
    weight = sp.softmax(weight + sp.logsumexp(joint, -1).sum(-1))
    return {"n": np.einsum("ab,abin->in", weight, sp.softmax(joint, -1))}


# --- mixtures ---------------------------------------------------------------------------------

POINTS = (
    np.random.default_rng(9)
    .normal(np.random.default_rng(10).choice([-3.0, 0.0, 2.5], 120, p=[0.3, 0.4, 0.3]), 0.6)
    .astype(np.float32)
)
MOST_CLUSTERS = 8


def clusters_parts():
    shares = numpyro.sample("shares", dist.Dirichlet(np.full(MOST_CLUSTERS, 0.5, np.float32)))
    with numpyro.plate("clusters", MOST_CLUSTERS):
        loc = numpyro.sample("loc", dist.Normal(0, 3))
        scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    return shares, loc, scale


def clusters():
    shares, loc, scale = clusters_parts()
    with numpyro.plate("points", len(POINTS)):
        z = numpyro.sample("z", dist.Categorical(shares))
        numpyro.sample("x", dist.Normal(take(loc, z), take(scale, z)), obs=POINTS)


def clusters_summed():
    """The same with the labels summed out."""
    shares, loc, scale = clusters_parts()
    each = dist.Normal(loc, scale).log_prob(POINTS[:, None]) + jnp.log(shares)
    numpyro.factor("x", jnp.sum(jax.nn.logsumexp(each, -1)))


@functools.cache
def pixels(n=400):
    """Digits of 64 black or white pixels, from scikit-learn, which no other model needs."""
    from sklearn.datasets import load_digits

    return (load_digits().data[:n] > 7).astype(int)


KINDS = 10


def latent_classes():
    x = pixels()
    shares = numpyro.sample("shares", dist.Dirichlet(np.ones(KINDS, np.float32)))
    with numpyro.plate("pixels", x.shape[1], dim=-1), numpyro.plate("kinds", KINDS, dim=-2):
        ink = numpyro.sample("ink", dist.Beta(1.0, 1.0))
    with numpyro.plate("images", len(x)):
        z = numpyro.sample("z", dist.Categorical(shares))
        numpyro.sample("x", dist.Bernoulli(probs=take(ink, z)).to_event(1), obs=x)


def bound_of_latent_classes(q):
    """Minus the bound of q(z) with the best q(shares) and q(ink), which have a closed form."""
    x = pixels()
    alpha, a, b = 1 + q.sum(0), 1 + q.T @ x, 1 + q.T @ (1 - x)
    evidence = sp.gammaln(KINDS) - sp.gammaln(alpha.sum()) + sp.gammaln(alpha).sum()
    return -(evidence + sp.betaln(a, b).sum() - np.sum(sp.xlogy(q, q)))


def latent_classes_answer(starts=20):
    """The smallest result of coordinate ascent from random starts."""
    x = pixels()
    best = np.inf
    for seed in range(starts):
        q = sp.softmax(4 * np.random.default_rng(seed).normal(size=(len(x), KINDS)), -1)
        for _ in range(200):
            a, b, alpha = 1 + q.T @ x, 1 + q.T @ (1 - x), 1 + q.sum(0)
            on, off = sp.digamma(a) - sp.digamma(a + b), sp.digamma(b) - sp.digamma(a + b)
            share = sp.digamma(alpha) - sp.digamma(alpha.sum())
            q = sp.softmax(share + x @ on.T + (1 - x) @ off.T, -1)
        best = min(best, bound_of_latent_classes(q))
    return best


# --- training ---------------------------------------------------------------------------------


def bound_without(model, seeds=4, steps=3000):
    """Minus the best bound of a model whose discrete sites are summed out."""

    def run(seed):
        guide = AutoNormal(model, init_scale=0.1)
        optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
        svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=10))
        params = svi.run(jax.random.key(seed), steps, progress_bar=False).params
        return float(Trace_ELBO(num_particles=2000).loss(jax.random.key(1), params, model, guide))

    return min(map(run, range(seeds)))


@dataclasses.dataclass(frozen=True)
class Problem:
    model: Callable
    answer: Callable  # -> probabilities of the discrete sites by name, or minus a bound


PROBLEMS = {
    "change point": Problem(change_point, change_point_answer),
    "annotators": Problem(annotators, annotators_answer),
    "causes": Problem(causes, causes_answer),
    "spike and slab": Problem(spike_and_slab, spike_and_slab_answer),
    "hidden Markov": Problem(hidden_markov, hidden_markov_answer),
    "two chains": Problem(two_chains, two_chains_answer),
    "switching": Problem(switching, lambda: bound_without(switching_summed)),
    "populations": Problem(populations, populations_answer),
    "clusters": Problem(clusters, lambda: bound_without(clusters_summed, seeds=8)),
    "latent classes": Problem(latent_classes, latent_classes_answer),
}
GUIDES = {
    "mean field, relax": (AutoMeanField, {}, 0.1),
    "mean field, RLOO": (AutoMeanField, {}, None),
    "mean field from data, RLOO": (AutoMeanField, {"init": "data"}, None),
    "structured, RLOO": (AutoStructured, {}, None),
    "structured, relax": (AutoStructured, {}, 0.1),
}


def train(model, guide, tau, steps, seed=0, particles=10, rate=0.05):
    """Trained parameters and losses; without a tau, for the discrete model itself."""
    handled = lambda f: f if tau is None else relax(f, tau=tau)
    loss = RLOO_ELBO(particles) if tau is None else Trace_ELBO(particles)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    svi = SVI(handled(model), handled(guide), optimizer, loss)
    result = svi.run(jax.random.key(seed), steps, progress_bar=False)
    return result.params, result.losses


def measure(problem, answer, column, steps, seed, ask):
    """The largest error of a probability, None if the answer is a bound; minus the bound; advice."""
    cls, options, tau = GUIDES[column]
    guide = cls(problem.model, **options)
    params, losses = train(problem.model, guide, tau, steps, seed)
    loss = jax.jit(lambda p: Trace_ELBO(num_particles=500).loss(jax.random.key(1), p, problem.model, guide))
    bound = float(loss(params))
    advice = None
    if ask:
        with contextlib.redirect_stdout(io.StringIO()):
            advice = check(problem.model, guide, params, losses=losses if tau is None else None).advice
    if not isinstance(answer, dict):
        return None, bound, advice
    found = marginals(guide, params)
    # a law may have fewer values than the other: the missing ones have negligible probability
    errors = [np.abs(p - np.asarray(found[name])[..., : p.shape[-1]]).max() for name, p in answer.items()]
    return float(max(errors)), bound, advice


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--steps", default=3000, help="Number of Adam steps.")
@click.option("--seeds", default=2, help="Number of runs of each; the table has the mean.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(PROBLEMS)), help="Model to train; may be repeated."
)
@click.option(
    "--check/--no-check", "ask", default=False, help="Call check after the first run of each model."
)
@out_option
def main(steps, seeds, only, ask, out):
    table = {}
    click.echo("largest error of a posterior probability, and minus the bound (seconds of one run)")
    for name in only or PROBLEMS:
        problem = PROBLEMS[name]
        answer = problem.answer()
        known = isinstance(answer, dict)
        table[name] = {} if known else {"best bound": answer}
        for column in GUIDES:
            jax.clear_caches()  # hundreds of programs, more than the memory of one process
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # from NumPyro, on discrete latents
                    runs = [
                        measure(problem, answer, column, steps, seed, ask and seed == 0)
                        for seed in range(seeds)
                    ]
            except ValueError as reason:
                table[name][column] = {"refused": str(reason).splitlines()[0]}
                click.echo(f"{name:16} {column:28} refused: {reason}")
                continue
            seconds = (time.perf_counter() - start) / seeds
            errors, bounds, advices = zip(*runs, strict=True)
            mean = {"bound": float(np.mean(bounds)), "bounds": bounds, "seconds": seconds}
            if known:
                mean |= {"error": float(np.mean(errors)), "errors": errors}
            if ask:
                mean["advice"] = advices[0]
            table[name][column] = mean
            shown = f"{mean['error']:.3f}" if known else "     "
            click.echo(f"{name:16} {column:28} {shown}  {mean['bound']:9.2f}  ({seconds:.0f} s)")
            for sentence in advices[0] or ():
                click.echo(f"{'':16} {sentence}")
        if not known:
            click.echo(f"{name:16} {'best bound':28}        {answer:9.2f}")
        write("guides", {"steps": steps, "seeds": seeds, "models": table}, out)


if __name__ == "__main__":
    main()
