"""Compare other libraries with this one: python tools/evidence.py {relaxit,torch,tfp}

Prints the table of docs/moving.md, which includes it from docs/outputs/evidence_PEER.md. Each line is one
claim, measured for both libraries with fixed seeds; standard errors follow +-. Needs the extra `peers`.
"""

import functools
import importlib
import importlib.metadata
import warnings

import click
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import torch

import relaxit_jax as rj
from relaxit_jax import distributions as rd
from versions import sentence, versions

warnings.filterwarnings("ignore", category=UserWarning)  # pyro's, on validation
pyro, rx, approx = map(
    importlib.import_module, ("pyro.distributions", "relaxit.distributions", "relaxit.distributions.approx")
)

KEY, N = jax.random.key(0), 200_000
tensor = torch.tensor


def line(claim, theirs, ours):
    """A line of the table: a claim, with the expected value in brackets, and the measured value."""
    what, should = claim.removesuffix("]").rsplit(" [", 1) if claim.endswith("]") else (claim, "")
    what = "... " * what.startswith(" ") + what.strip()
    click.echo(f"| {what} | {should} | {theirs} | {ours} |")


def mean(draws):
    draws = np.asarray(draws, np.float64)
    return f"{draws.mean():.4f} +- {draws.std() / len(draws) ** 0.5:.4f}"


def grid(cut):
    """y from logit(cut) to -logit(cut), z with these log-odds, and dz / dy."""
    y = np.linspace(np.log(cut), -np.log(cut), 400_001)
    z = 1 / (1 + np.exp(-y))
    return y, z, z / (1 + np.exp(y))


def integral(density, y, slope):
    return np.trapezoid(np.asarray(density, np.float64) * slope, y)


def correlated_density():
    """A normal density about the probability, cut at 0 and 1: no correlation, no temperature."""
    y, z, slope = grid(1e-12)
    theirs = rx.CorrelatedRelaxedBernoulli(tensor([0.7]), torch.eye(1), tensor(0.5))
    density = theirs.log_prob(tensor(z)[:, None]).exp()[:, 0].numpy()
    logits, y32 = jnp.log(jnp.array([0.7 / 0.3])), jnp.asarray(y, jnp.float32)[:, None]
    own = rj.correlated_bernoulli_log_prob(y32, logits, 0.5, jnp.eye(1), log_space=True)
    line(
        "CorrelatedRelaxedBernoulli of .7, tau .5: integral of the density [1]",
        f"{integral(density, y, slope):.3f}", f"{integral(jnp.exp(own), y, slope):.3f}",
    )  # fmt: skip

    v, scale_tril = tensor([[0.9, 0.9]]), np.array([[1, 0], [0.95, (1 - 0.95**2) ** 0.5]])
    values = []
    for factor in (np.eye(2), scale_tril):
        d = rx.CorrelatedRelaxedBernoulli(tensor([0.5, 0.5]), tensor(factor @ factor.T).float(), tensor(0.5))
        values.append(float(d.log_prob(v).sum()))
    own = [
        float(
            rj.correlated_bernoulli_log_prob(jnp.full(2, 0.9), jnp.zeros(2), 0.5, jnp.asarray(x, jnp.float32))
        )
        for x in (np.eye(2), scale_tril)
    ]
    line(
        "  log-density at (.9, .9), correlations 0 and .95 [two numbers]",
        *("{:.3f}, {:.3f}".format(*pair) for pair in (values, own)),
    )


def invertible_density():
    """The last class is used twice: for K = 2 the Gaussian is scored at 0 whatever was drawn."""
    for cut in (1e-3, 1e-6, 1e-12):
        y, z, slope = grid(cut)
        both = np.stack([z, 1 - z], -1)
        theirs = rx.InvertibleGaussian(tensor([0.0]), tensor([1.0]), tensor(0.5))
        density = theirs.log_prob(tensor(both)).exp()[:, 0].numpy()
        log_z = jax.nn.log_softmax(jnp.stack([jnp.asarray(y, jnp.float32), jnp.zeros(y.shape)], -1))
        own = rj.invertible_gaussian_log_prob(log_z, jnp.zeros(1), jnp.ones(1), 0.5, log_space=True)
        line(
            f"InvertibleGaussian, 2 classes: integral over [{cut:.0e}, 1 - {cut:.0e}] [1]",
            f"{integral(density, y, slope):.3f}", f"{integral(jnp.exp(own), y, slope):.3f}",
        )  # fmt: skip
    d = rx.InvertibleGaussian(torch.zeros(5, 2), torch.ones(5, 2), tensor(0.5))
    ours = rd.InvertibleGaussian(loc=jnp.zeros((5, 2)), scale=jnp.ones((5, 2)), tau=0.5)
    line(
        "  shape of log_prob of 5 draws of 3 classes [(5,)]",
        str(tuple(d.log_prob(d.rsample()).shape)), str(ours.log_prob(ours.sample(KEY)).shape),
    )  # fmt: skip


def shared_noise():
    """One uniform variable for a whole batch."""
    for name, theirs in {
        "HardConcrete": rx.HardConcrete(torch.ones(1000), tensor(0.5), tensor(1.1), tensor(-0.1)),
        "RebarRelaxation": rx.RebarRelaxation(torch.full((1000,), 0.5), tensor(0.5)),
        "GaussianRelaxedBernoulli, scalar scale": rx.GaussianRelaxedBernoulli(
            torch.full((1000,), 0.5), tensor(0.2)
        ),
    }.items():
        own = {
            "HardConcrete": rj.hard_concrete(KEY, jnp.zeros(1000), 0.5),
            "RebarRelaxation": rj.relaxed_bernoulli(KEY, jnp.zeros(1000), 0.5),
        }.get(name, rj.gaussian_bernoulli(KEY, jnp.full(1000, 0.5), 0.2))
        try:
            different = len(set(theirs.rsample().tolist()))
        except RuntimeError as error:
            different = type(error).__name__
        line(f"{name}: different values in a batch of 1,000", str(different), str(len(set(own.tolist()))))


def rebar_density():
    """The draw scales the logit of theta, the density does not."""
    theta, lam = 0.9, 0.5
    d = rx.RebarRelaxation(tensor(theta), tensor(lam))
    draws = d.rsample((N,)).flatten().double()
    logits = jnp.log(theta / (1 - theta))
    own = rj.relaxed_bernoulli(KEY, logits, lam, shape=(N,))
    line("RebarRelaxation, theta .9: P(z > 1/2) [.9]", mean(draws > 0.5), mean(own > 0.5))
    y, z, slope = grid(1e-12)
    density = d.log_prob(tensor(z)).exp().numpy()
    own = jnp.exp(rj.relaxed_bernoulli_log_prob(jnp.asarray(y, jnp.float32), logits, lam, log_space=True))
    line(
        "  the same by its density [.9]",
        *(f"{integral(np.where(z > 0.5, x, 0), y, slope):.4f}" for x in (density, own)),
    )


def probabilities_as_logits():
    p = [0.8, 0.1, 0.1]
    d = rx.GumbelSoftmaxTopK(probs=tensor(p).expand(N, 3), K=tensor(1), tau=tensor(0.5), hard=True)
    own = rd.GumbelSoftmaxTopK(k=1, tau=0.5, probs=jnp.array(p), hard=True).sample(KEY, (N,))
    line(
        "GumbelSoftmaxTopK, probs .8 .1 .1, K = 1: first one drawn [.8]",
        mean(d.sample()[:, 0]),
        mean(own[:, 0]),
    )
    sets = np.float32([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    d = rx.GumbelSoftmaxTopK(probs=tensor(p), K=tensor(2), tau=tensor(0.5), hard=True)
    total = sum(float(d.log_prob(tensor(x)).sum().exp()) for x in sets)
    own = rd.GumbelSoftmaxTopK(k=2, tau=0.5, probs=jnp.array(p), hard=True).log_prob(sets)
    line("  K = 2: sum of exp log_prob over all pairs [1]", f"{total:.3g}", f"{jnp.exp(own).sum():.4f}")


def variance_as_deviation():
    a = [2.0, 3.0, 5.0]
    d = approx.lognorm_approximation_fn(pyro.Dirichlet(tensor(a)))
    own = rd.to_logistic_normal(dist.Dirichlet(jnp.array(a)))
    exact = 1 / np.array(a) * (1 - 2 / 3) + (1 / np.array(a)).sum() / 9  # Sigma_kk
    line(
        "Laplace Bridge of Dirichlet(2, 3, 5): variance of logit 1 "
        f"[{exact[0]:.4f}]",
        f"{float(d.scale[0]) ** 2:.4f}", f"{gauged(own)[0]:.4f}",
    )  # fmt: skip
    true = np.array(a) * (10 - np.array(a)) / 100 / 11
    with torch.no_grad():
        theirs = torch.softmax(d.loc + d.scale * torch.randn(N, 3), -1).var(0).numpy()
    ours = np.asarray(own.sample(KEY, (N,))).var(0)
    line(
        "  standard deviation of class 1, of the Dirichlet "
        f"[{true[0] ** 0.5:.3f}]", f"{theirs[0] ** 0.5:.3f}", f"{ours[0] ** 0.5:.3f}",
    )  # fmt: skip


def gauged(d):
    """Variances of the logits minus their mean, for a logistic-normal."""
    covariance = np.asarray(d.covariance_matrix)
    centre = np.eye(len(covariance)) - 1 / len(covariance)
    return np.diag(centre @ covariance @ centre)


def gradients():
    """The scale of the Gaussian gates, and the temperature of the stochastic-times-smooth bits."""
    scale = tensor([0.3], requires_grad=True)
    z = rx.GaussianRelaxedBernoulli(tensor([0.5]), scale).rsample((1000,))
    theirs = "none" if not z.requires_grad else f"{torch.autograd.grad((z**2).mean(), scale)[0].item():.3f}"
    own = jax.grad(lambda s: (rj.gaussian_bernoulli(KEY, 0.5, s, shape=(1000,)) ** 2).mean())(0.3)
    line("GaussianRelaxedBernoulli: d E z^2 / d scale at .5, .3", theirs, f"{own:.3f}")


def masses():
    """A stochastic-times-smooth bit is the root of p or 0; relaxit scores it as a bit with probability p."""
    d = rx.StochasticTimesSmooth(probs=tensor(0.25))
    own = rd.StochasticTimesSmooth(probs=0.25)
    values = [0.0, 0.5]
    total = f"{sum(float(jnp.exp(own.log_prob(x))) for x in values):.3f}"
    try:
        theirs = str(d.log_prob(tensor(0.5)))
    except ValueError as error:
        theirs = type(error).__name__
    line("StochasticTimesSmooth, p = .25: mass of 0 and of its root [1]", theirs, total)
    d = rx.StochasticTimesSmooth(probs=tensor(0.25), validate_args=False)
    theirs = sum(float(d.log_prob(tensor(x)).exp()) for x in values)
    line("  without validation [1]", f"{theirs:.3f}", total)


def truncation():
    """eta is the mass kept there, by default all; eps is the mass added to the last value here."""
    values = torch.arange(0.0, 40.0)
    for kept in (0.9, 0.999):
        d = rx.GeneralizedGumbelSoftmaxNP(pyro.Poisson(tensor(2.0)), values, eta=kept, hard=True)
        log_p, support = rj.poisson_support(jnp.array(2.0), eps=1 - kept)
        means = float((d.probs * d.values).sum()), float(jnp.exp(log_p) @ support)
        what = f"GeneralizedGumbelSoftmaxNP, Poisson(2), eta {kept}, here eps {1 - kept:.3g}: mean [2]"
        line(what, *(f"{mean:.4f}" for mean in means))


def properties():
    d = rx.DecoupledStraightThroughGumbelSoftmax(tensor(0.5), tensor(0.5), logits=torch.zeros(3))
    try:
        theirs = str(d.mean)
    except AttributeError as error:
        theirs = type(error).__name__
    own = rd.DecoupledStraightThroughGumbelSoftmax(
        logits=jnp.zeros(3), tau_forward=0.5, tau_backward=0.5
    ).mean
    line("DecoupledStraightThroughGumbelSoftmax: mean of class 1 of 3", theirs, f"{own[0]:.3f}")
    d = rx.LogisticNormalSoftmax(torch.zeros(3), torch.ones(3))
    try:
        theirs = f"{float(d.log_prob(torch.full((3,), 1 / 3)).sum()):.3f}"
    except Exception as error:  # any error
        theirs = type(error).__name__
    own = rd.LogisticNormalSoftmax(loc=jnp.zeros(3), scale=jnp.ones(3)).log_prob(jnp.full(3, 1 / 3))
    line("LogisticNormalSoftmax: log_prob at the centre [.909]", theirs, f"{own:.3f}")
    names = {}
    try:
        exec("from relaxit.distributions import *", names)
        theirs = "ok"
    except AttributeError as error:
        theirs = type(error).__name__
    exec("from relaxit_jax.distributions import *", names)
    line("from ...distributions import *", theirs, "ok")


def rare_classes():
    """A class with probability 9.1e-4, with noise in the logits' dtype and in float32."""
    logits = torch.tensor([0.0, -7.0])
    p, n = float(torch.softmax(logits, 0)[1]), 5_000_000
    for name in ("float32", "bfloat16", "float16"):
        wide = logits.to(getattr(torch, name)).expand(n, 2)
        theirs = torch.nn.functional.gumbel_softmax(wide, tau=0.5, hard=True)[:, 1].double()
        z = rj.gumbel_softmax(KEY, jnp.asarray(logits.numpy(), name), 0.5, shape=(n,), hard=True)
        own = np.asarray(z[:, 1], np.float64)
        what = f"gumbel_softmax, {name}: frequency of a class [{p:.2e} +- {(p / n) ** 0.5:.1e}]"
        line(what, f"{float(theirs.nanmean()):.2e}", f"{own.mean():.2e}")
        line(f"  NaN among {n:,} draws [0]", str(int(theirs.isnan().sum())), str(int(np.isnan(own).sum())))


def cold_densities(kinds):
    """Own draws of ten equal classes whose log_prob is not finite: rounded draws, and draws in log space."""
    logits, shape = jnp.zeros(10), (10_000,)

    def ours(tau, log_space):
        z = rj.gumbel_softmax(KEY, logits, tau, shape=shape, log_space=log_space)
        return rj.gumbel_softmax_log_prob(z, logits, tau, log_space=log_space)

    for tau in (0.5, 0.1, 0.01):
        for name, theirs, log_space in kinds:
            both = [np.sum(~np.isfinite(np.asarray(x))) for x in (theirs(tau), ours(tau, log_space))]
            line(f"{name}, tau {tau}: log-densities that are not finite, of 10,000 [0]", *map(str, both))


def torch_densities():
    def theirs(kind, tau):
        d = kind(tensor(tau), logits=torch.zeros(10), validate_args=False)
        return d.log_prob(d.rsample((10_000,)))

    rounded = torch.distributions.RelaxedOneHotCategorical
    log = torch.distributions.relaxed_categorical.ExpRelaxedCategorical
    cold_densities(
        (
            ("RelaxedOneHotCategorical", functools.partial(theirs, rounded), False),
            ("ExpRelaxedCategorical, here log_space", functools.partial(theirs, log), True),
        )
    )


def tfp_densities():
    tfd = importlib.import_module("tensorflow_probability.substrates.jax").distributions

    def theirs(kind, copy, tau):
        d = kind(tau, logits=jnp.zeros(10))
        z = d.sample(10_000, seed=KEY)
        return d.log_prob(jnp.array(z) if copy else z)

    rounded, log = tfd.RelaxedOneHotCategorical, tfd.ExpRelaxedOneHotCategorical
    cold_densities(
        (
            ("RelaxedOneHotCategorical, the same array", functools.partial(theirs, rounded, False), False),
            ("RelaxedOneHotCategorical, a copy", functools.partial(theirs, rounded, True), False),
            ("ExpRelaxedOneHotCategorical, here log_space", functools.partial(theirs, log, True), True),
        )
    )


PEERS = {
    "relaxit": (
        correlated_density, invertible_density, rebar_density, shared_noise, probabilities_as_logits,
        variance_as_deviation, gradients, masses, truncation, properties,
    ),
    "torch": (rare_classes, torch_densities),
    "tfp": (tfp_densities,),
}  # fmt: skip
VERSIONS = {"relaxit": "relaxit", "torch": "torch", "tfp": "tfp-nightly"}


@click.command(help=__doc__)
@click.argument("peer", type=click.Choice(list(PEERS)))
def main(peer):
    torch.manual_seed(0)
    version = importlib.metadata.version(VERSIONS[peer])
    click.echo("<!-- evidence -->")
    click.echo(
        f"| measured | should be | {peer} {version} | relaxit_jax {rj.__version__} |\n|---|---|---|---|"
    )
    for part in PEERS[peer]:
        part()
    click.echo(f"\n*{sentence(versions())}*\n<!-- end -->")


if __name__ == "__main__":
    main()
