"""A guide equal to the prior, and posteriors with `relax` next to exact ones, over the temperature."""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from mlxtend.data import autompg_data
from numpyro.infer import Trace_ELBO
from scipy.special import logit, softmax

import relaxit_jax.distributions as rd
from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import relax, select, take, unrounded

TAUS = np.geomspace(0.01, 1, 13)
LOOKS = {  # for each way to train: options of relax, none for RLOO_ELBO
    "relax": ({}, "#0072B2", "-"),
    "relax, straight_through": ({"method": "straight_through"}, "#000000", "--"),
    'relax, kl="relaxed"': ({"kl": "relaxed"}, "#E69F00", "-"),
    "RLOO_ELBO": (None, "#009E73", "-"),
}
NUMPYRO = ("NumPyro's RelaxedBernoulli", "#CC79A7", "-.")

# --- one bit -----------------------------------------------------------------------------------

PRIOR, POSTERIOR = 0.3, 0.39
Y = 0.5 + logit(POSTERIOR) - logit(PRIOR)


def bit():
    z = numpyro.sample("z", dist.Bernoulli(PRIOR))
    numpyro.sample("y", dist.Normal(z, 1), obs=Y)


def bit_guide(params):
    numpyro.sample("z", dist.Bernoulli(logits=params["logits"]))


def concrete(tau):
    z = numpyro.sample("z", dist.RelaxedBernoulliLogits(tau, jnp.float32(logit(PRIOR))))
    numpyro.sample("y", dist.Normal(z, 1), obs=Y)


def concrete_guide(params, tau):
    numpyro.sample("z", dist.RelaxedBernoulliLogits(tau, params["logits"]))


BIT_START = {"logits": jnp.float32(logit(PRIOR))}

# --- the year from which cars need less: miles per gallon of cars with four cylinders --------------

LEVEL, SPREAD, NOISE = 25.0, 10.0, 5.0
table, mpg = autompg_data()
FOUR = table[:, 0] == 4
YEARS, MPG = np.int32(1900 + table[FOUR, 5]), np.float32(mpg[FOUR])
FIRST = np.arange(1971, 1983)  # the years that may be the first with the new level
AFTER = np.float32(FIRST[:, None] <= YEARS)  # for each car, by the first year


def cars():
    z = numpyro.sample("z", dist.Categorical(np.full(len(FIRST), 1 / len(FIRST), np.float32)))
    levels = numpyro.sample("levels", dist.Normal(LEVEL, SPREAD).expand([2]).to_event(1))
    mean = select(take(AFTER, z), levels[1], levels[0])
    numpyro.sample("mpg", dist.Normal(mean, NOISE).to_event(1), obs=MPG)


def cars_guide(params):
    """The levels depend on the year, as in the posterior, which this family contains."""
    z = numpyro.sample("z", dist.Categorical(logits=params["logits"]))
    loc, scale = take(params["loc"], z), jnp.exp(take(params["log_scale"], z))
    numpyro.sample("levels", dist.Normal(loc, scale).to_event(1))


CARS_START = {
    "logits": jnp.zeros(len(FIRST)),
    "loc": jnp.full((len(FIRST), 2), MPG.mean()),
    "log_scale": jnp.zeros((len(FIRST), 2)),
}


def cars_answer():
    """Normal levels are integrated out."""
    evidence = np.zeros(len(FIRST))
    for side in (AFTER == 0, AFTER == 1):
        n, total = side.sum(1), side @ (MPG - LEVEL) / NOISE**2
        precision = n / NOISE**2 + 1 / SPREAD**2
        evidence += total**2 / (2 * precision) - np.log(precision) / 2
    return softmax(evidence)


# --- training ----------------------------------------------------------------------------------


def train(model, guide, start, steps, options, particles=50):
    """Trained logits for every temperature at once; without options, with RLOO_ELBO for them all."""

    def one(tau):
        if options == "numpyro":
            handled = lambda f: lambda *args: f(*args, tau)
        else:
            handled = (lambda f: f) if options is None else lambda f: relax(f, tau=tau, **options)
        elbo = (RLOO_ELBO if options is None else Trace_ELBO)(num_particles=particles)
        loss = lambda params, key: elbo.loss(
            key, {}, handled(model), handled(functools.partial(guide, params))
        )
        adam = optax.adam(optax.cosine_decay_schedule(0.05, steps))

        def step(carry, key):
            params, state = carry
            updates, state = adam.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (start, adam.init(start)), keys)[0][0]["logits"]

    if options is None:
        return jnp.broadcast_to(jax.jit(one)(1.0), (len(TAUS), *start["logits"].shape))
    return jax.jit(jax.vmap(one))(jnp.float32(TAUS))


def losses_at_the_prior(draws):
    """Losses of NumPyro's relaxed bit, and of this library's under `unrounded`; both should be 0."""

    def loss(site, handle):
        model = handle(lambda: numpyro.sample("z", site))
        return Trace_ELBO(num_particles=draws).loss(jax.random.key(0), {}, model, model)

    theirs = lambda tau: loss(dist.RelaxedBernoulliLogits(tau, jnp.float32(logit(PRIOR))), lambda f: f)
    ours = lambda tau: loss(rd.RelaxedBernoulli(logits=jnp.float32(logit(PRIOR)), tau=tau), unrounded)
    return [np.asarray(jax.jit(jax.vmap(f))(jnp.float32(TAUS))) for f in (theirs, ours)]


def picture(draws):
    steps = max(2, draws // 10)
    figure, axes = plt.subplots(2, 2, figsize=(6.6, 6.4), layout="constrained")
    (prior, toy), (years, errors) = axes
    theirs, ours = losses_at_the_prior(draws)
    name, colour, dashes = NUMPYRO
    prior.plot(TAUS, theirs, color=colour, ls=dashes, lw=2)
    prior.plot(TAUS, ours, color=LOOKS["relax"][1], lw=2)
    prior.text(0.98, 0.12, "this library's,\nunder unrounded", transform=prior.transAxes, ha="right",
               fontsize=9, color=LOOKS["relax"][1])  # fmt: skip
    prior.set_title("loss of a guide that is the prior", fontsize=10.5)

    exact = cars_answer()
    found = {}
    for label, (options, tint, style) in LOOKS.items():
        one = jax.nn.sigmoid(train(bit, bit_guide, BIT_START, steps, options))
        toy.plot(TAUS, one, color=tint, ls=style, lw=2, label=label)
        found[label] = jax.nn.softmax(train(cars, cars_guide, CARS_START, steps, options))
        errors.plot(TAUS, abs(found[label] - exact).max(-1), color=tint, ls=style, lw=2)
    one = jax.nn.sigmoid(train(concrete, concrete_guide, BIT_START, steps, "numpyro"))
    toy.plot(TAUS, one, color=colour, ls=dashes, lw=2, label=name)
    toy.axhline(POSTERIOR, color="black", lw=1, ls=":")
    toy.set_title("one bit: P(z = 1), exact 0.39 (dotted)", fontsize=10.5)
    errors.set(yscale="log")
    errors.set_title("cars: largest error of a probability", fontsize=10.5)
    for axis in (prior, toy, errors):
        axis.set(xscale="log", xlabel="temperature tau")
        axis.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])

    at = np.abs(TAUS - 0.1).argmin()
    years.bar(FIRST, exact, 0.8, color="#BBBBBB", label="exact")
    for label in ("relax", 'relax, kl="relaxed"', "RLOO_ELBO"):
        years.plot(FIRST, found[label][at], "o", color=LOOKS[label][1], ms=4.5 if label == "relax" else 3.5)
    years.set_title("cars: first year of a new level, tau 0.1", fontsize=10.5)
    years.set(xlim=(1974.5, 1982.5), xticks=FIRST[4::2])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, labels = toy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9.5, frameon=False)
    return figure
