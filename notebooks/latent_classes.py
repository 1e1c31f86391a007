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
# # A guide that converged, and was wrong
#
# This notebook fits latent classes to handwritten digits: a model, a guide, a loss that settles. `check`
# finds that the answer is not the best one, and why. One argument fixes it.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from relaxit_jax.elbo import RLOO_ELBO
from relaxit_jax.handlers import AutoMeanField, check, take

STEPS = int(os.environ.get("STEPS", 3000))  # fewer for a quick look
KINDS = 10

# %% [markdown]
# ## The model
#
# The data are 400 images of 8 x 8 pixels, black or white. Each image belongs to one of ten kinds, an integer
# $z_n$ that nobody has seen, and each kind has its own probability of ink in every pixel. The labels of the
# data set are kept for the end.

# %%
digits = load_digits()
images, labels = (digits.data[:400] > 7).astype(np.int32), digits.target[:400]


def latent_classes(images):
    shares = numpyro.sample("shares", dist.Dirichlet(np.ones(KINDS, np.float32)))
    with numpyro.plate("pixels", 64, dim=-1), numpyro.plate("kinds", KINDS, dim=-2):
        ink = numpyro.sample("ink", dist.Beta(1.0, 1.0))
    with numpyro.plate("images", len(images)):
        z = numpyro.sample("z", dist.Categorical(shares))
        numpyro.sample("x", dist.Bernoulli(probs=take(ink, z)).to_event(1), obs=images)


# %% [markdown]
# ## The guide, and its training
#
# `AutoMeanField` gives each image its own probabilities of the ten kinds, and `RLOO_ELBO` trains them with
# unbiased gradients of the discrete model. We estimate the ELBO of the trained guide with 500 draws.


# %%
def train(guide):
    adam = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
    svi = SVI(latent_classes, guide, adam, RLOO_ELBO(num_particles=10))
    trained = svi.run(jax.random.key(0), STEPS, images, progress_bar=False)
    loss = Trace_ELBO(num_particles=500).loss
    return trained, -float(loss(jax.random.key(1), trained.params, latent_classes, guide, images))


guides = {"from the prior": AutoMeanField(latent_classes)}
trained, bounds = {}, {}
trained["from the prior"], bounds["from the prior"] = train(guides["from the prior"])
print(f"bound {bounds['from the prior']:.0f} nats")

# %%
losses = trained["from the prior"].losses
plt.figure(figsize=(6, 2.8), layout="constrained")
plt.plot(losses, lw=0.6)
plt.gca().set(xlabel="step", ylabel="loss (nats)", ylim=(losses[-1] - 300, losses[-1] + 3000))
plt.show()

# %% [markdown]
# The loss has settled. Nothing here says that anything is wrong.
#
# ## The check
#
# `check` finds problems that a loss cannot show. It takes about a minute, most of it for a rival: an
# `AutoStructured` guide that is trained from the data for comparison.

# %%
found = check(
    latent_classes, guides["from the prior"], trained["from the prior"].params, images, losses=losses
)

# %% [markdown]
# The rival's ELBO is better by hundreds of nats, for the same model: this guide sits in a poor optimum. The
# picture shows which one. When training starts from the prior, all kinds are alike. Half of them have lost
# their images to the others, which hold several digits each.


# %%
def picture(name):
    ink = np.asarray(guides[name].median(trained[name].params)["ink"])
    count = np.asarray(guides[name].probs(trained[name].params)["z"]).sum(0)
    figure, axes = plt.subplots(1, KINDS, figsize=(9.5, 1.4), layout="constrained")
    for ax, k in zip(axes, np.argsort(-count), strict=True):
        ax.imshow(ink[k].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{count[k]:.0f} images", fontsize=7)
    figure.suptitle(f"probability of ink by kind, guide started {name}", fontsize=9)
    plt.show()


picture("from the prior")

# %% [markdown]
# ## The fix
#
# With `init="data"`, annealed coordinate ascent looks for a start before the first step, from several random
# points.

# %%
guides["from the data"] = AutoMeanField(latent_classes, init="data")
trained["from the data"], bounds["from the data"] = train(guides["from the data"])
print(f"bound {bounds['from the data']:.0f} nats")
picture("from the data")

# %% [markdown]
# The ELBO is level with the rival's, so `check` has nothing left to report.

# %%
again = check(
    latent_classes, guides["from the data"], trained["from the data"].params, images,
    losses=trained["from the data"].losses, rival=False,
)  # fmt: skip

# %% [markdown]
# ## Was it worth it?
#
# The ELBO compares two guides of one model. The labels, which neither has seen, say how much the kinds have
# to do with digits: normalized mutual information is 1 if each kind is one digit, and 0 if they have nothing
# in common.

# %%
agreement = {}
for name in guides:
    kinds = np.asarray(jnp.argmax(guides[name].probs(trained[name].params)["z"], -1))
    agreement[name] = normalized_mutual_info_score(labels, kinds)
    print(f"{name:16} bound {bounds[name]:7.0f}  agreement with the labels {agreement[name]:.2f}")

# %% [markdown]
# Finally, a check of the above.

# %%
assert bounds["from the data"] > bounds["from the prior"] + 100
assert any("AutoStructured" in sentence for sentence in found.advice)
assert not again.advice and again.bound > found.rival[0] - 10
assert agreement["from the data"] > agreement["from the prior"]

# %% [markdown]
# For more about guides, their starts and `check`, see [the page of `relax`](../docs/families/numpyro.md).
