# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # `relax` in NumPyro
#
# This notebook trains NumPyro models with discrete latents by SVI, as they are written: `AutoMeanField` makes
# a guide, `relax` makes both differentiable, and `RLOO_ELBO` is the unbiased alternative. There are two real
# data sets, each with an exact answer to compare: a mixture for flowers, and a change point for cars.

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from mlxtend.data import autompg_data
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris

from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, relax, select, take

STEPS = int(os.environ.get("STEPS", 3000))  # fewer for a quick look


def train(model, guide, *args, tau=None, particles=20):
    """By relaxed draws at a temperature; without one, by scores of discrete draws."""
    if tau is None:
        soft, loss = (lambda f: f), RLOO_ELBO(num_particles=particles)
    else:
        soft, loss = functools.partial(relax, tau=tau), Trace_ELBO(num_particles=particles)
    adam = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
    svi = SVI(soft(model), soft(guide), adam, loss)
    return svi.run(jax.random.key(0), STEPS, *args, progress_bar=False)


# %% [markdown]
# ## A mixture: three kinds of iris, without their names
#
# The data are the petals of 150 flowers, standardized. Each flower has a label $z_n$, an integer. In the
# model `take(loc, z)` is `loc[z]`, and it also works if `z` is a relaxed vector of weights.

# %%
iris = load_iris()
x = iris.data[:, 2:].astype(np.float32)
x = (x - x.mean(0)) / x.std(0)


def mixture(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([3, 2]).to_event(2))
    scale = numpyro.sample("scale", dist.LogNormal(-1, 0.5).expand([3, 2]).to_event(2))
    with numpyro.plate("flowers", len(x)):
        z = numpyro.sample("z", dist.Categorical(np.full(3, 1 / 3, np.float32)))
        numpyro.sample("x", dist.Normal(take(loc, z), take(scale, z)).to_event(1), obs=x)


# %% [markdown]
# `AutoMeanField` gives every label its own probabilities and leaves `loc` and `scale` to NumPyro's
# `AutoNormal`, started at the k-means centers. Wrap the model *and* the guide in `relax`. The trained guide
# is used without it.

# %%
centres = KMeans(3, n_init=10, random_state=0).fit(x).cluster_centers_.astype(np.float32)
centres = centres[centres[:, 0].argsort()]  # short petals first, as iris.target has them
begin = {"loc": centres, "scale": np.full((3, 2), 0.3, np.float32)}
normal = functools.partial(AutoNormal, init_loc_fn=init_to_value(values=begin), init_scale=0.05)

found = {}
for name, tau in (("relax", 0.1), ("RLOO_ELBO", None)):
    guide = AutoMeanField(mixture, continuous=normal)
    params = train(mixture, guide, x, tau=tau).params
    order = guide.median(params)["loc"][:, 0].argsort()  # clusters have no order of their own
    found[name] = np.asarray(guide.probs(params)["z"][:, order])

# %% [markdown]
# The answer to compare with comes from NUTS on the model with the labels summed out, which is the model you
# would write without this library. A label's probability is its mean over the draws.


# %%
def by_hand(x):
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([3, 2]).to_event(2))
    scale = numpyro.sample("scale", dist.LogNormal(-1, 0.5).expand([3, 2]).to_event(2))
    log_p = dist.Normal(loc, scale).to_event(1).log_prob(x[:, None])
    numpyro.deterministic("p", jax.nn.softmax(log_p, -1))
    numpyro.factor("x", jax.nn.logsumexp(log_p, -1).sum())


nuts = MCMC(NUTS(by_hand, init_strategy=init_to_value(values=begin)), num_warmup=200,
            num_samples=500, progress_bar=False)  # fmt: skip
nuts.run(jax.random.key(1), x)
exact = np.asarray(nuts.get_samples()["p"].mean(0))

for name, p in found.items():
    error, right = np.abs(p - exact).max(), (p.argmax(-1) == iris.target).mean()
    print(f"{name:10} largest error of a probability {error:.3f}, species told right {right:.1%}")
print(f"{'NUTS':10} {'':37} species told right {(exact.argmax(-1) == iris.target).mean():.1%}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
COLOURS = np.array([[0.0, 0.45, 0.7], [0.9, 0.6, 0.0], [0.0, 0.62, 0.45]])
for axis, name, p in zip(axes[:2], ("relax", "exact"), (found["relax"], exact), strict=True):
    axis.scatter(*x.T, c=np.clip(p @ COLOURS, 0, 1), s=14)
    axis.set(title=f"{name}: label probabilities", xlabel="petal length", ylabel="petal width")
for name, marker in (("relax", "o"), ("RLOO_ELBO", "x")):
    axes[2].plot(exact.ravel(), found[name].ravel(), marker, ms=4, label=name)
axes[2].plot([0, 1], [0, 1], color="black", lw=0.8)
axes[2].set(title="each probability", xlabel="exact", ylabel="trained")
axes[2].legend(frameon=False)
plt.show()

# %% [markdown]
# ## A change point: miles per gallon
#
# The data are 199 cars with four cylinders, built from 1970 to 1982 (Auto MPG, as it comes with mlxtend). In
# some year they begin to use less fuel. The year is a Categorical; `take(after, z)` says for each car whether
# it was built in that year or later.

# %%
table, mpg = autompg_data()
four = table[:, 0] == 4
year, mpg = 1900 + table[four, 5].astype(int), mpg[four].astype(np.float32)
first = np.arange(1971, 1983)  # the years at which a new level may begin
after = (first[:, None] <= year).astype(np.float32)  # by the first year, of each car


def cars(mpg=None):
    z = numpyro.sample("z", dist.Categorical(np.full(len(first), 1 / len(first), np.float32)))
    levels = numpyro.sample("levels", dist.Normal(25, 10).expand([2]).to_event(1))
    mean = select(take(after, z), levels[1], levels[0])
    numpyro.sample("mpg", dist.Normal(mean, 5).to_event(1), obs=mpg)


# %% [markdown]
# The levels depend on the year: a later first year leaves more frugal cars to the old level. So this guide is
# hand-written, with a mean and a scale of the levels for each year; the means start at the mean of the cars
# before and after. It has discrete sites, so wrap it in `relax` too.


# %%
means = np.stack([side @ mpg / side.sum(1) for side in (1 - after, after)], -1)


def cars_guide(mpg=None):
    z = numpyro.sample("z", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(len(first)))))
    loc = numpyro.param("loc", jnp.asarray(means))
    scale = numpyro.param("scale", jnp.ones_like(means), constraint=dist.constraints.positive)
    numpyro.sample("levels", dist.Normal(take(loc, z), take(scale, z)).to_event(1))


def integrated():
    """The exact posterior of the year: normal levels, integrated out."""
    log_p = np.zeros(len(first))
    for side in (after == 0, after == 1):
        precision = side.sum(1) / 5**2 + 1 / 10**2
        log_p += (side @ (mpg - 25) / 5**2) ** 2 / (2 * precision) - np.log(precision) / 2
    return softmax(log_p)


answers, params = {"exact": integrated()}, {}
for name, tau in (("relax, tau 0.1", 0.1), ("relax, tau 0.03", 0.03), ("RLOO_ELBO", None)):
    params[name] = train(cars, cars_guide, mpg, tau=tau, particles=50).params
    answers[name] = np.asarray(jax.nn.softmax(params[name]["logits"]))
for name, p in answers.items():
    likely = "  ".join(f"{first[i]}: {p[i]:.3f}" for i in np.flatnonzero(p > 0.01))
    print(f"{name:16} {likely}  largest error {np.abs(p - answers['exact']).max():.3f}")

# %% [markdown]
# The error of `relax` is a bias. It is proportional to the temperature and to the curvature of the
# log-likelihood between two values, and here the values are years with a dozen cars each. At a low
# temperature noise takes over. The score function of `RLOO_ELBO` has no bias, and little noise on this model.
#
# ## The posterior predictive
#
# It comes from the unrelaxed model and guide: discrete years, and cars that could have been built.

# %%
predict = Predictive(cars, guide=cars_guide, params=params["RLOO_ELBO"], num_samples=2000,
                     return_sites=["z", "mpg"])  # fmt: skip
drawn = predict(jax.random.key(2))
assert jnp.issubdtype(drawn["z"].dtype, jnp.integer)
low, high = np.quantile(drawn["mpg"], (0.05, 0.95), axis=0)
inside = ((mpg >= low) & (mpg <= high)).mean()
print(f"{inside:.0%} of the cars are inside the 90 % band")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
left.bar(first, answers["exact"], color="#BBBBBB", label="exact")
for (name, p), marker in zip(list(answers.items())[1:], "os^", strict=True):
    left.plot(first, p, marker, ms=5, label=name)
left.set(xlabel="first year of the new level", ylabel="posterior probability", xlim=(1974.5, 1982.5))
left.legend(frameon=False, fontsize=8)
order = year.argsort()
right.fill_between(
    year[order], low[order], high[order], color="#BBBBBB", alpha=0.6, lw=0, label="90 % of draws"
)
right.plot(year[order], np.asarray(drawn["mpg"]).mean(0)[order], color="C2", label="mean of draws")
right.plot(year, mpg, "o", ms=3, color="black", alpha=0.5, label="cars")
right.set(xlabel="year of the car", ylabel="miles per gallon")
right.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Finally, a check of the above. The relaxed answers are close, and the unbiased one is closer.

# %%
errors = {name: np.abs(p - answers["exact"]).max() for name, p in answers.items()}
assert errors["RLOO_ELBO"] < 0.02 and max(errors["relax, tau 0.1"], errors["relax, tau 0.03"]) < 0.15
assert errors["RLOO_ELBO"] < errors["relax, tau 0.1"]
assert max(np.abs(p - exact).mean() for p in found.values()) < 0.05
assert 0.8 < inside < 0.97

# %% [markdown]
# For more about the objective, its bias and when it fails, see [the page of
# `relax`](../docs/families/numpyro.md). A [mixture](../docs/tutorials/mixture.md) and a [sparse
# regression](../docs/tutorials/spike-and-slab.md) are larger examples.
