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
# # A discrete VAE
#
# This notebook compresses an image of a digit to 32 bits and reconstructs the image from them. The encoder
# outputs the log-odds of each bit. As a function of its log-odds, a drawn bit is flat except for a jump, so
# there is no slope to follow. There are two ways out: a *relaxed* bit, which has a slope and a bias, and an
# *unbiased estimator* of the gradient.
#
# With bits $z$, an encoder $q(z | x)$, a decoder $p(x | z)$ and a prior $p(z)$, all of them trained,
#
# $$\log p(x) \ge \mathrm{E}_{q(z | x)} \log p(x | z) - \mathrm{KL}(q(z | x), p(z)).$$
#
# The KL between bits has a closed form, whatever is drawn. Only the first term needs draws.

# %%
import functools
import itertools
import os
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import relaxit_jax as rj
from relaxit_jax import estimators

STEPS = int(os.environ.get("STEPS", 5000))  # fewer for a quick look

# %% [markdown]
# ## The data
#
# 1,797 handwritten digits of 8 by 8 pixels come with scikit-learn. Pixels above one half become ones.

# %%
images = (load_digits().data > 8).astype(np.float32)[np.random.default_rng(0).permutation(1797)]
train, test = images[:1437], images[1437:]


def show(rows, titles):
    """Lines of images, each under its title."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.85 * len(rows)), squeeze=False)
    for axis, line, title in zip(axes[:, 0], rows, titles, strict=True):
        tiles = np.pad(np.reshape(line, (-1, 8, 8)), ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
        axis.imshow(np.concatenate(list(tiles), 1), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, loc="left", fontsize=8)
        axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    plt.show()


show([train[:16]], ["sixteen of them"])

# %% [markdown]
# ## The networks
#
# There is one hidden layer on each side. The last bias of the decoder starts at the log-odds of the mean
# image.

# %%
BITS, HIDDEN = 32, 128


def layers(key, *sizes):
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    init = jax.nn.initializers.lecun_normal()
    return [(init(k, shape), jnp.zeros(shape[1])) for k, shape in zip(keys, shapes, strict=True)]


def network(params, x):
    *hidden, (weights, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weights + bias


def log_bernoulli(x, logits):
    return jnp.sum(x * logits - jax.nn.softplus(logits), -1)


mean_image = np.clip(train.mean(0), 0.01, 0.99)
mean_logits = np.log(mean_image / (1 - mean_image)).astype(np.float32)


def start(key):
    encoder, decoder = jax.random.split(key)
    params = {
        "encoder": layers(encoder, 64, HIDDEN, BITS),
        "decoder": layers(decoder, BITS, HIDDEN, 64),
        "prior": jnp.zeros(BITS),
    }
    params["decoder"][-1] = params["decoder"][-1][0], jnp.asarray(mean_logits)
    return params


# %% [markdown]
# ## The loss, and the one line that matters
#
# `relaxed` draws bits with a slope. With `hard=True` the value is an exact bit, and the slope is the slope of
# $\sigma((l + L) / \tau)$ with logistic noise $L$. `unbiased` passes the function itself to an estimator:
# `disarm` calls it at two coupled draws of exact bits, and has no temperature.


# %%
def kl(logits, prior):
    """Of Bernoulli laws, in closed form."""
    gap = jax.nn.softplus(prior) - jax.nn.softplus(logits)
    return jnp.sum(jax.nn.sigmoid(logits) * (logits - prior) + gap, -1)


def relaxed(key, f, logits, tau):
    return f(rj.relaxed_bernoulli(key, logits, tau, hard=True))


def unbiased(key, f, logits, tau):
    return estimators.disarm(key, f, estimators.Bernoulli(logits))


def loss(params, key, x, tau, expectation):
    logits = network(params["encoder"], x)
    f = lambda z: log_bernoulli(x, network(params["decoder"], 2 * z - 1))
    return jnp.mean(kl(logits, params["prior"]) - expectation(key, f, logits, tau))


# %% [markdown]
# ## Training
#
# The temperature falls from 1 to 0.3 along an Optax schedule. It is traced, so annealing does not recompile
# anything. The test ELBO uses exact bits, so no relaxation can make it look better than it is.

# %%
tau_at = optax.exponential_decay(1.0, STEPS, 0.3)
adam = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
ROUNDS = 25


@functools.partial(jax.jit, static_argnums=2)
def some_steps(state, numbers, expectation):
    """A step for each of the numbers, on 128 images."""

    def step(state, number):
        params, adam_state = state
        rows_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
        x = jnp.asarray(train)[jax.random.randint(rows_key, (128,), 0, len(train))]
        value, slope = jax.value_and_grad(loss)(params, key, x, tau_at(number), expectation)
        updates, adam_state = adam.update(slope, adam_state)
        return (optax.apply_updates(params, updates), adam_state), value

    return jax.lax.scan(step, state, numbers)


@jax.jit
def negative_elbo(params, x):
    """By 50 exact draws of the bits."""
    logits = network(params["encoder"], x)
    z = jax.random.bernoulli(jax.random.key(2), jax.nn.sigmoid(logits), (50, *logits.shape))
    return jnp.mean(kl(logits, params["prior"]) - log_bernoulli(x, network(params["decoder"], 2.0 * z - 1)))


def fit(expectation):
    params = start(jax.random.key(0))
    state, curve = (params, adam.init(params)), []
    rounds = np.array_split(np.arange(STEPS), ROUNDS)
    with tqdm(rounds, expectation.__name__, file=sys.stdout, ncols=80, ascii=" #") as bar:
        for numbers in bar:
            state, values = some_steps(state, jnp.asarray(numbers), expectation)
            curve.append((numbers[-1], values.mean(), negative_elbo(state[0], test)))
            bar.set_postfix_str(f"test {curve[-1][-1]:.2f}")
    return state[0], np.array(curve)


params, curve = fit(relaxed)

# %% [markdown]
# The same with unbiased gradients:

# %%
params_unbiased, curve_unbiased = fit(unbiased)

# %%
baseline = -np.mean(log_bernoulli(test, mean_logits))
results = {
    "pixels alone": baseline,
    "relaxed bits": negative_elbo(params, test),
    "disarm": negative_elbo(params_unbiased, test),
}
for name, value in results.items():
    print(f"{name:14} test negative ELBO {value:6.2f} nats")

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, values, colour in (("relaxed bits", curve, "C0"), ("disarm", curve_unbiased, "C1")):
    axis.plot(values[:, 0], values[:, 1], color=colour, ls=":", label=f"{name}, training")
    axis.plot(values[:, 0], values[:, 2], color=colour, label=f"{name}, test")
axis.set(xlabel="step", ylabel="negative ELBO, nats")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The dotted curves are training objectives, the solid ones are bounds on test images. On such a small problem
# both ways end at the same level. [Which method?](../docs/which-method.md) measures where they do not, and
# why.
#
# ## What the bits keep
#
# These are test digits, and their reconstructions from one exact draw of their bits.


# %%
def draw(params, key, x):
    return jax.random.bernoulli(key, jax.nn.sigmoid(network(params["encoder"], x))).astype(jnp.float32)


def decode(params, z):
    return jax.nn.sigmoid(network(params["decoder"], 2 * z - 1))


some = test[:16]
z = draw(params, jax.random.key(3), some)
z_unbiased = draw(params_unbiased, jax.random.key(3), some)
rows = [some, decode(params, z), decode(params_unbiased, z_unbiased)]
show(rows, ["test digits", "rebuilt, relaxed bits", "rebuilt, disarm"])

# %% [markdown]
# Next, one bit at a time: the first digit, and its code with one bit flipped, starting with the bits that
# change the image most.

# %%
flipped = jnp.abs(z[0] - jnp.eye(BITS))
changed = decode(params, flipped)
largest = np.argsort(-jnp.abs(changed - decode(params, z[:1])).sum(-1))[:15]
show([np.concatenate([decode(params, z[:1]), changed[largest]])], ["rebuilt, then one bit turned over"])
print("bits", *largest)

# %% [markdown]
# These images are decoded from codes drawn from the trained prior. Its bits are independent, but the bits of
# real codes are not, so there are smudges.

# %%
codes = jax.random.bernoulli(jax.random.key(4), jax.nn.sigmoid(params["prior"]), (16, BITS))
show([decode(params, codes.astype(jnp.float32))], ["samples"])

# %% [markdown]
# Finally, a check of the above: both bounds are far below the bound for independent pixels, and the test
# digit nearest to a reconstruction is its own far more often than by chance.

# %%
assert max(results["relaxed bits"], results["disarm"]) < 0.9 * baseline
rebuilt = np.asarray(decode(params, draw(params, jax.random.key(5), test)))
distances = ((test[:, None] - rebuilt) ** 2).sum(-1)
nearest = (distances.argmin(0) == np.arange(len(test))).mean()
print(f"{nearest:.0%} of {len(test)} rebuilt images are nearest to their own digit")
assert nearest > 0.1

# %% [markdown]
# For more, see the [tutorial](../docs/tutorials/vae.md) on the larger example, `examples/vae.py` with every
# method as a flag, and [which method](../docs/which-method.md) to use.
