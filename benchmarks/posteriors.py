"""Posterior probabilities with `relax`, RLOO_ELBO and TraceGraph_ELBO, compared with known answers.

Every model is small enough to enumerate, or has a mean-field optimum in closed form. The answer is the
exact posterior if a mean-field guide can represent it, otherwise the best mean-field guide. All methods
train the same guide, with the same optimizer, steps and particles, and so with as many evaluations of the
likelihood. Writes a table to the terminal and results/posteriors.json.
"""

import dataclasses
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
import scipy.optimize
import scipy.special as sp
import scipy.stats as st
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value

from records import out_option, write
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, relax, take


@dataclasses.dataclass(frozen=True)
class Problem:
    model: Callable
    answer: Callable  # -> probabilities of the discrete sites, by name, under the best guide
    init: dict = dataclasses.field(default_factory=dict)  # for the continuous sites
    particles: int = 30

    def guide(self):
        continuous = lambda model, **kwargs: AutoNormal(
            model, init_loc_fn=init_to_value(values=self.init), init_scale=0.1, **kwargs
        )
        return AutoMeanField(self.model, continuous=continuous)


def log_normal(x, loc, scale):
    return st.norm(loc, scale).logpdf(x)


# --- one bit, three coupled bits, four classes in a plate, counts -----------------------------

BIT_Y = 0.5 + np.log(0.390 / 0.610 * 0.7 / 0.3)  # so that the posterior is 0.390


def bit():
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(z, 1), obs=BIT_Y)


def bit_answer():
    odds = 0.3 / 0.7 * np.exp(log_normal(BIT_Y, 1, 1) - log_normal(BIT_Y, 0, 1))
    return {"z": odds / (1 + odds)}


BITS_P = np.array([0.3, 0.6, 0.5], np.float32)
BITS_W = np.array([[1.0, -1.5, 2.0], [0.5, 2.0, -1.0]], np.float32)
BITS_Y = np.array([0.7, 1.2], np.float32)


def coupled_bits():
    z = numpyro.sample("z", dist.Bernoulli(BITS_P).to_event(1))
    numpyro.sample("y", dist.Normal(BITS_W @ z, 1).to_event(1), obs=BITS_Y)


def coupled_bits_answer():
    z = np.array(list(itertools.product([0, 1], repeat=3)))
    joint = np.log(np.where(z, BITS_P, 1 - BITS_P)).sum(-1) + log_normal(BITS_Y, z @ BITS_W.T, 1).sum(-1)

    def loss(logits):
        log_q = np.where(z, sp.log_expit(logits), sp.log_expit(-logits)).sum(-1)
        return np.sum(np.exp(log_q) * (log_q - joint))

    return {"z": sp.expit(best_of_starts(loss, 3))}


def best_of_starts(loss, size, starts=30):
    rng = np.random.default_rng(0)
    found = [scipy.optimize.minimize(loss, rng.normal(0, 2, size)) for _ in range(starts)]
    return min(found, key=lambda result: result.fun).x


CLASS_P = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
CLASS_LOC = np.array([-2.0, -0.5, 1.0, 2.5], np.float32)
CLASS_Y = np.array([-1.5, -0.2, 0.3, 1.4, 3.0], np.float32)


def classes():
    with numpyro.plate("points", len(CLASS_Y)):
        z = numpyro.sample("z", dist.Categorical(CLASS_P))
        numpyro.sample("y", dist.Normal(take(CLASS_LOC, z), 1), obs=CLASS_Y)


def classes_answer():
    return {"z": sp.softmax(np.log(CLASS_P) + log_normal(CLASS_Y[:, None], CLASS_LOC, 1), -1)}


def poisson():
    z = numpyro.sample("z", dist.Poisson(4.0))
    numpyro.sample("y", dist.Normal(z, 2), obs=6.5)


def poisson_answer():
    k = np.arange(24)
    return {"z": sp.softmax(st.poisson(4).logpmf(k) + log_normal(6.5, k, 2))}


def binomial():
    z = numpyro.sample("z", dist.Binomial(10, 0.3))
    numpyro.sample("y", dist.Normal(z, 1.5), obs=5.2)


def binomial_answer():
    k = np.arange(11)
    return {"z": sp.softmax(st.binom(10, 0.3).logpmf(k) + log_normal(5.2, k, 1.5))}


# --- a mixture of Gaussians -------------------------------------------------------------------

CENTRES = 1.5 * np.array([[-1, 0], [0, 1], [1, 0], [0, -1]], np.float32)
FAR_CENTRES = 2 * CENTRES


def mixture_data(centres, n=500):
    rng = np.random.default_rng(0)
    return (centres[rng.integers(4, size=n)] + rng.normal(size=(n, 2))).astype(np.float32)


def mixture(x):
    loc = numpyro.sample("loc", dist.Normal(0, 5).expand([4, 2]).to_event(2))
    with numpyro.plate("points", len(x)):
        z = numpyro.sample("z", dist.Categorical(np.full(4, 0.25, np.float32)))
        numpyro.sample("x", dist.Normal(take(loc, z), 1).to_event(1), obs=x)


def mixture_answer(x, centres):
    """Coordinate ascent on q(loc) q(z), all in closed form, with labels ordered like the centers."""
    x, m, variance = x.astype(float), centres.astype(float), np.full(4, 0.01)
    for _ in range(2000):
        q = sp.softmax(-((x[:, None] - m) ** 2).sum(-1) / 2 - variance, -1)  # 2 dimensions, each / 2
        precision = 1 / 25 + q.sum(0)
        m, variance = (q.T @ x) / precision[:, None], 1 / precision
    return {"z": q}


def mixture_problem(centres):
    x = mixture_data(centres)
    answer = lambda: mixture_answer(x, centres)
    # The largest error of 2,000 probabilities: with 30 particles, more than a quarter of it is noise.
    return Problem(lambda: mixture(x), answer, {"loc": centres}, particles=100)


# --- a sparse linear regression ---------------------------------------------------------------

SLAB, NOISE, INCLUDED = 2.0, 1.0, 0.2


def regression_data(n=80, p=12):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, p))
    x[:, 1] = 0.7 * x[:, 0] + 0.7 * x[:, 1]  # a noise column that is similar to a true one
    weights = np.zeros(p)
    weights[[0, 3, 7]] = 1.5, -1.0, 0.6
    return x.astype(np.float32), (x @ weights + NOISE * rng.normal(size=n)).astype(np.float32)


def spike_and_slab():
    x, y = regression_data()
    on = numpyro.sample("on", dist.Bernoulli(np.full(x.shape[1], INCLUDED, np.float32)).to_event(1))
    slope = numpyro.sample("slope", dist.Normal(0, SLAB).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ (on * slope), NOISE).to_event(1), obs=y)


def spike_and_slab_answer():
    """The best q(on) q(slope): the ELBO of a mean-field guide has a closed form here."""
    x, y = (a.astype(float) for a in regression_data())
    p = x.shape[1]

    def loss(theta):
        logits, m, log_s = theta.reshape(3, p)
        q, s2 = jax.nn.sigmoid(logits), jnp.exp(2 * log_s)
        spread = (x**2).sum(0) @ (q * (m**2 + s2) - (q * m) ** 2)
        misfit = (jnp.sum((y - x @ (q * m)) ** 2) + spread) / (2 * NOISE**2)
        kl_on = q * (jax.nn.log_sigmoid(logits) - np.log(INCLUDED)) + (1 - q) * (
            jax.nn.log_sigmoid(-logits) - np.log(1 - INCLUDED)
        )
        kl_slope = ((m**2 + s2) / SLAB**2 - 1) / 2 - log_s + np.log(SLAB)
        return misfit + jnp.sum(kl_on + kl_slope)

    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(loss))
        rng = np.random.default_rng(0)
        ends = [
            scipy.optimize.minimize(
                lambda t: tuple(map(np.asarray, both(t))), rng.normal(size=3 * p), jac=True
            )
            for _ in range(40)
        ]
    return {"on": sp.expit(min(ends, key=lambda end: end.fun).x[:p])}


# --- a hidden Markov chain --------------------------------------------------------------------

START = np.array([0.5, 0.3, 0.2], np.float32)
MOVES = np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]], np.float32)
LEVELS = np.array([-1.5, 0.0, 2.0], np.float32)
CHAIN_Y = np.array([-1.0, -2.1, -0.6, 0.3, -0.2, 0.8, 1.9, 2.4, 1.1, 0.4, -0.3, -1.7], np.float32)


def chain():
    def step(before, y):
        z = numpyro.sample("z", dist.Categorical(logits=take(np.log(MOVES), before)))
        numpyro.sample("y", dist.Normal(take(LEVELS, z), 1), obs=y)
        return z, None

    first = numpyro.sample("first", dist.Categorical(START))
    numpyro.sample("y_first", dist.Normal(take(LEVELS, first), 1), obs=CHAIN_Y[0])
    scan(step, first, CHAIN_Y[1:])


def chain_answer():
    """Coordinate ascent on a factor for each step."""
    seen = log_normal(CHAIN_Y[:, None], LEVELS, 1)
    moves = np.log(MOVES.astype(float))
    q = sp.softmax(seen, -1)
    for _ in range(200):
        for t in range(len(q)):
            score = seen[t] + (np.log(START) if t == 0 else q[t - 1] @ moves)
            q[t] = sp.softmax(score + (moves @ q[t + 1] if t + 1 < len(q) else 0))
    return {"first": q[0], "z": q[1:]}


PROBLEMS = {
    "bit": Problem(bit, bit_answer),
    "coupled bits": Problem(coupled_bits, coupled_bits_answer),
    "classes": Problem(classes, classes_answer),
    "poisson": Problem(poisson, poisson_answer),
    "binomial": Problem(binomial, binomial_answer),
    "mixture": mixture_problem(CENTRES),
    "far mixture": mixture_problem(FAR_CENTRES),
    "spike and slab": Problem(spike_and_slab, spike_and_slab_answer),
    "chain": Problem(chain, chain_answer),
}


def train(problem, tau, steps, seed=0, loss=Trace_ELBO, **options):
    """Trained probabilities of the discrete sites; without a tau, for the discrete model itself."""
    guide = problem.guide()
    handled = lambda f: f if tau is None else relax(f, tau=tau, **options)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps, exponent=2))
    svi = SVI(handled(problem.model), handled(guide), optimizer, loss(num_particles=problem.particles))
    result = svi.run(jax.random.key(seed), steps, progress_bar=False)
    return {name: np.asarray(p) for name, p in guide.probs(result.params).items()}


def error(found, answer):
    """The largest difference between two laws, where a value that one lacks counts as 0."""
    worst = 0.0
    for name, p in answer.items():
        pair = np.atleast_1d(p), np.atleast_1d(found[name])
        size = max(x.shape[-1] for x in pair)
        p, q = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in pair)
        worst = max(worst, np.abs(p - q).max())
    return float(worst)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--steps", default=4000, help="Number of Adam steps.")
@click.option("--seeds", default=3, help="Number of runs of each; the table has the mean of their errors.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(PROBLEMS)), help="Problem to train; may be repeated."
)
@out_option
def main(steps, seeds, only, out):
    columns = {
        "relaxed .1": {"tau": 0.1}, "relaxed .5": {"tau": 0.5},
        "straight-through .1": {"tau": 0.1, "method": "straight_through"},
        "relaxed .1, its own KL": {"tau": 0.1, "kl": "relaxed"},
        "discrete, RLOO_ELBO": {"tau": None, "loss": RLOO_ELBO},
        "discrete, TraceGraph_ELBO": {"tau": None, "loss": TraceGraph_ELBO},
    }  # fmt: skip
    table = {}
    click.echo("largest error of a posterior probability, mean over seeds (seconds of one run)")
    for name in only or PROBLEMS:
        problem = PROBLEMS[name]
        answer, table[name] = problem.answer(), {}
        for column, options in columns.items():
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # from NumPyro, on discrete latents
                    errors = [
                        error(train(problem, steps=steps, seed=s, **options), answer) for s in range(seeds)
                    ]
            except (ValueError, TypeError, RuntimeError) as reason:
                table[name][column] = {"refused": str(reason).splitlines()[0]}
                click.echo(f"{name:16} {column:28} refused: {reason}")
                continue
            seconds = (time.perf_counter() - start) / seeds
            table[name][column] = {"error": float(np.mean(errors)), "each": errors, "seconds": seconds}
            click.echo(f"{name:16} {column:28} {np.mean(errors):.4f}  ({seconds:.1f} s)")
    write("posteriors", {"steps": steps, "seeds": seeds, "largest error": table}, out)


if __name__ == "__main__":
    main()
