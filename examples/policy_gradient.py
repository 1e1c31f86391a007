"""Policy gradients with three estimators, REINFORCE, RLOO and RELAX, on CartPole and Acrobot.

This is what is estimated. An episode runs for at most T steps; a_t ~ pi(. | s_t) is the action, r_t is its
reward, and m_t is 1 until the episode has ended and 0 afterwards. The objective is the undiscounted return
J = E sum_t m_t r_t, and its gradient is taken in the parameters of the policy. With the reward to go
G_t = sum_{u >= t} m_u r_u,

    grad J = E sum_t m_t G_t grad log pi(a_t | s_t),

so each step is one call of an estimator of the library with q = pi(. | s_t) and f(a_t) = G_t, which was
measured. The estimators draw their sample from a key: the episode is played with draws from the same keys,
and so each of them finds the action for which G_t was measured.

- reinforce: (G_t - V(s_t, t)) grad log pi(a_t | s_t). V is the time left times a network, fitted by least
  squares to the rewards to go of earlier updates only, so it does not depend on this update's actions.
- rloo: the baseline is the mean G_t of the other --copies episodes that began in the same state, 0 where they
  have ended. They have their own actions, independent of this episode's given that state. The states at time
  t differ between copies, so each has its own q: the library's `rloo`, which draws all of its samples from
  one q, does not apply, and `reinforce` takes this baseline.
- relax: (G_t - c(z~_t)) grad log pi(a_t | s_t) + grad c(z_t) - grad c(z~_t), with z_t the noisy logits whose
  largest is the action, z~_t drawn again given the action, and c = V(s_t, t) + h(z_t, s_t, t). V is the same
  as in reinforce; h is 0 at first, where the two agree, and is trained on |g|^2 of the whole update's
  gradient g, whose mean is the variance plus a constant (`value_and_grads`, exact).

All three are unbiased, whatever V and h earlier updates made: advantages are not normalized, rewards are not
discounted, and no entropy is added. (When drawn again, an action may differ if the logits round to other
float32 numbers than in the episode; in 900,000 steps of Acrobot none did.) Returns are divided by T, which
Adam does not notice, so that V and h are of order 1 in every environment.
"""

import importlib.metadata
import itertools
import math
import time
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from common import (
    RATE,
    SEED,
    SIZE,
    STEPS,
    UserError,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)
from relaxit_jax.estimators import OneHotCategorical, reinforce, relax, value_and_grads

# The mean return at which each counts as solved, and the size of its observations, which are divided by it.
ENVIRONMENTS = {"CartPole-v1": (475, (1, 1, 0.1, 1)), "Acrobot-v1": (-100, (1, 1, 1, 1, 3, 6))}
ESTIMATORS = {"reinforce": "#0072B2", "rloo": "#D55E00", "relax": "#009E73"}  # with their colors


class World(NamedTuple):
    """An environment with the interface of gymnax, and the divisor of its observations."""

    env: object
    params: object
    scale: tuple[float, ...]


class Config(NamedTuple):
    """How a policy is trained."""

    estimator: str
    updates: int
    every: int
    environments: int
    copies: int
    evaluations: int
    hidden: int
    learning_rate: float
    baseline_rate: float
    variate_rate: float


class Networks(NamedTuple):
    """The parameters of pi, V and h, or one thing for each of them."""

    policy: list
    baseline: list
    variate: list


class Episodes(NamedTuple):
    """The record of many episodes: time, then episode; one key for the actions at each time."""

    key: jax.Array
    observation: jax.Array
    reward: jax.Array
    alive: jax.Array


def make_world(name, horizon):
    try:
        import gymnax
    except ImportError as error:
        raise UserError(
            f"gymnax cannot be imported ({error}); install what the examples need: "
            "python -m pip install -e '.[examples]'"
        ) from error
    env, params = gymnax.make(name)
    return World(env, params.replace(max_steps_in_episode=horizon), ENVIRONMENTS[name][1])


# --- networks ----------------------------------------------------------------------------------


def init_mlp(key, *sizes, last):
    """Layers of random weights; the last layer has scale `last`, for a small output."""
    pairs = list(itertools.pairwise(sizes))
    scales = [math.sqrt(2)] * (len(pairs) - 1) + [last]
    keys = jax.random.split(key, len(pairs))
    return [
        (jax.nn.initializers.orthogonal(scale)(key, shape), jnp.zeros(shape[1]))
        for key, shape, scale in zip(keys, pairs, scales, strict=True)
    ]


def mlp(layers, x):
    for weights, bias in layers[:-1]:
        x = jnp.tanh(x @ weights + bias)
    weights, bias = layers[-1]
    return x @ weights + bias


def scalar(layers, *inputs):
    return mlp(layers, jnp.concatenate(inputs, -1))[..., 0]


def init_networks(key, world, config):
    """A policy that is nearly uniform, a baseline that is nearly 0, a control variate that is 0."""
    inputs, actions, hidden = len(world.scale), world.env.num_actions, [config.hidden] * 2
    keys = jax.random.split(key, 3)
    return Networks(
        policy=init_mlp(keys[0], inputs, *hidden, actions, last=0.01),
        baseline=init_mlp(keys[1], inputs + 1, *hidden, 1, last=0.01),
        variate=init_mlp(keys[2], actions + inputs + 1, *hidden, 1, last=0.0),
    )


# --- episodes and their gradient -----------------------------------------------------------------


def roll_out(world, estimator, policy, key, episodes, copies=1):
    """Play episodes at once, `copies` of them from each first state; those that end stand still."""
    env, params, _ = world
    scale = jnp.asarray(world.scale, jnp.float32)
    start_key, key = jax.random.split(key)
    starts = jnp.repeat(jax.random.split(start_key, episodes // copies), copies, 0)
    observation, state = jax.vmap(lambda key: env.reset_env(key, params))(starts)

    def step(carry, key):
        observation, state, alive = carry
        action_key, world_key = jax.random.split(key)
        q = OneHotCategorical(mlp(policy, observation), event_ndims=1)
        action = q.coupled(action_key)[0] if estimator == "relax" else q.sample(action_key)
        after, state_after, reward, done, _ = jax.vmap(env.step_env, (0, 0, 0, None))(
            jax.random.split(world_key, episodes), state, jnp.argmax(action, -1), params
        )
        keep = lambda new, old: jnp.where(alive.reshape(-1, *[1] * (jnp.ndim(new) - 1)), new, old)
        carry = jax.tree.map(keep, (after / scale, state_after), (observation, state))
        seen = Episodes(action_key, observation, jnp.where(alive, reward, 0.0), alive)
        return (*carry, alive & ~done), seen

    carry = (observation / scale, jax.tree.map(jnp.asarray, state), jnp.ones(episodes, bool))
    return jax.lax.scan(step, carry, jax.random.split(key, params.max_steps_in_episode))[1]


def surrogate(policy, variate, estimator, episodes, to_go, baseline, features):
    """Minus a sum whose gradient estimates the gradient of the mean return; its value is meaningless."""

    def at_one_time(key, logits, to_go, baseline, features):
        q = OneHotCategorical(logits, event_ndims=1)
        f = lambda action: to_go  # for the action that the same key gave in the episode
        if estimator != "relax":
            return reinforce(key, f, q, baseline=baseline)
        return relax(key, f, q, control_variate=lambda z: baseline + scalar(variate, z, features))

    logits = mlp(policy, episodes.observation)
    estimates = jax.vmap(at_one_time)(episodes.key, logits, to_go, baseline, features)
    return -jnp.mean(jnp.sum(jnp.where(episodes.alive, estimates, 0), 0))


def leave_one_out(to_go, copies):
    """The mean of the other copies, at the same time."""
    groups = to_go.reshape(len(to_go), -1, copies)
    return ((groups.sum(-1, keepdims=True) - groups) / (copies - 1)).reshape(to_go.shape)


def gradients(world, config, networks, key):
    """Play episodes; return the loss of each network, and the episodes."""
    copies = config.copies if config.estimator == "rloo" else 1
    episodes = roll_out(world, config.estimator, networks.policy, key, config.environments, copies)
    horizon = len(episodes.reward)
    to_go = jnp.cumsum(episodes.reward[::-1], 0)[::-1] / horizon
    left = 1 - jnp.arange(horizon) / horizon
    left = jnp.broadcast_to(left[:, None, None], (*to_go.shape, 1))
    features = jnp.concatenate([episodes.observation, left], -1)

    def squared_error(layers):
        values = left[..., 0] * scalar(layers, features)
        error = jnp.where(episodes.alive, values - to_go, 0)
        return jnp.sum(error**2) / jnp.sum(episodes.alive), values

    baseline_gradient, baseline = jax.grad(squared_error, has_aux=True)(networks.baseline)
    if config.estimator == "rloo":
        baseline = leave_one_out(to_go, copies)
    data = (config.estimator, episodes, to_go, baseline, features)
    _, policy_gradient, variate_gradient = value_and_grads(
        surrogate, networks.policy, networks.variate, *data
    )
    return Networks(policy_gradient, baseline_gradient, variate_gradient), episodes


# --- training ------------------------------------------------------------------------------------


def make_training(world, config):
    """The state of each seed before training, and a compiled function: some updates, an evaluation."""
    # until V has reached the right size the gradient is nearly all noise, and Adam would take whole steps
    # along it
    wait = config.updates // 10
    falling = optax.cosine_decay_schedule(config.learning_rate, config.updates - wait, alpha=0.1)
    schedule = optax.join_schedules([optax.constant_schedule(0.0), falling], [wait])
    rates = {"policy": schedule, "baseline": config.baseline_rate, "variate": config.variate_rate}
    optimizers = {name: optax.adam(rate) for name, rate in rates.items()}
    optimizer = optax.partition(optimizers, Networks(*Networks._fields))

    def start(key):
        networks = init_networks(key, world, config)
        return networks, optimizer.init(networks)

    def update(state, key):
        networks, optimizer_state = state
        gradient, episodes = gradients(world, config, networks, key)
        changes, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(networks, changes), optimizer_state), jnp.sum(episodes.alive)

    def advance(state, key):
        evaluation_key, key = jax.random.split(key)
        state, steps = jax.lax.scan(update, state, jax.random.split(key, config.every))
        episodes = roll_out(world, config.estimator, state[0].policy, evaluation_key, config.evaluations)
        return state, jnp.mean(jnp.sum(episodes.reward, 0)), jnp.sum(steps)

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(advance), donate_argnums=0)


def train(name, world, config, seeds, seed):
    """Train all seeds at once: the mean return of each after every few updates, and the time it took."""
    began, cpu = time.perf_counter(), time.process_time()
    start, advance = make_training(world, config)
    first, *keys = jax.random.split(jax.random.key(seed), 1 + config.updates // config.every)
    state = start(jax.random.split(first, seeds))
    curve, steps, seconds = [], np.zeros(seeds, int), []
    with tqdm(total=config.updates, unit="update", desc=f"{name} {config.estimator}") as bar:
        for key in keys:
            state, returns, played = advance(state, jax.random.split(key, seeds))
            if not all(np.isfinite(x).all() for x in jax.tree.leaves((state[0], returns))):
                raise UserError(
                    f"{config.estimator} on {name} is not finite by update {bar.n + config.every}; "
                    "lower its learning rates"
                )
            curve.append([float(x) for x in returns])
            steps += np.asarray(played)
            seconds.append(time.perf_counter() - began)
            bar.update(config.every)
            bar.set_postfix_str(f"mean return {np.mean(curve[-1]):.1f}")
    means = np.mean(curve, 1)
    solved = int(np.argmax(means >= ENVIRONMENTS[name][0])) if max(means) >= ENVIRONMENTS[name][0] else None
    return {
        "updates": list(range(config.every, config.updates + 1, config.every)),
        "returns": curve,
        "mean": [float(x) for x in means],
        "lowest": [min(row) for row in curve],
        "highest": [max(row) for row in curve],
        "environment_steps": steps.tolist(),
        "solved_after_updates": None if solved is None else (solved + 1) * config.every,
        "timing": {
            "seconds": seconds[-1],
            "cpu_seconds": time.process_time() - cpu,
            "seconds_until_solved": None if solved is None else seconds[solved],
        },
    }


def draw(results, settings, path):
    """Plot the learning curves, one panel for each environment."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.8 * len(results), 3.9), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        solved = ENVIRONMENTS[name][0]
        axis.axhline(solved, color="0.4", ls=":", lw=1.2, label=f"solved: {solved}")
        for place, (estimator, row) in enumerate(rows.items()):
            colour = ESTIMATORS[estimator]
            axis.fill_between(row["updates"], row["lowest"], row["highest"], color=colour, alpha=0.18, lw=0)
            width = 1.4 + 1.4 * (len(rows) - 1 - place)  # so that a curve on top of another hides none
            axis.plot(row["updates"], row["mean"], color=colour, lw=width, label=estimator)
        axis.set(title=name, xlabel=f"updates, of {settings['environments']} episodes each")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    axes[0, 0].set_ylabel("return")
    seeds = settings["seeds"]
    many = f"mean over {seeds} seeds, band from the lowest to the highest" if seeds > 1 else "one seed"
    figure.suptitle(f"Mean return of {settings['evaluations']} new episodes: {many}", fontsize=11)
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option(
    "--environment",
    "names",
    type=click.Choice(list(ENVIRONMENTS)),
    multiple=True,
    default=list(ENVIRONMENTS),
    help="Gymnax environment; may be given more than once.",
)
@click.option(
    "--estimator",
    "estimators",
    type=click.Choice(list(ESTIMATORS)),
    multiple=True,
    default=list(ESTIMATORS),
    help="Estimator of the gradient; may be given more than once.",
)
@click.option(
    "--seeds", type=SIZE, default=5, help="Number of policies trained at once, each from its own seed."
)
@click.option("--seed", type=SEED, default=0, help="Seed that all the others follow from.")
@click.option("--updates", type=STEPS, default=200, help="Number of Adam updates, each from new episodes.")
@click.option(
    "--environments", type=SIZE, default=32, help="Number of episodes played at once for an update."
)
@click.option(
    "--copies",
    type=click.IntRange(2, 4096),
    default=8,
    help="Number of rloo episodes from the same first state, each a baseline of the others.",
)
@click.option("--horizon", type=SIZE, default=500, help="Length of the longest episode, in steps.")
@click.option("--every", type=STEPS, default=5, help="Number of updates between two evaluations.")
@click.option(
    "--evaluations",
    type=SIZE,
    default=32,
    help="Number of new episodes in an evaluation, with drawn actions.",
)
@click.option(
    "--hidden",
    type=click.IntRange(1, 1024),
    default=32,
    help="Number of units in each of a network's two hidden layers.",
)
@click.option(
    "--learning-rate",
    type=RATE,
    default=0.005,
    help="Learning rate of the policy; 0 for the first tenth of the updates, then falling along a cosine.",
)
@click.option("--baseline-rate", type=RATE, default=0.01, help="Learning rate of V.")
@click.option("--variate-rate", type=RATE, default=0.001, help="Learning rate of h, for relax.")
@out_option
def main(names, estimators, seeds, seed, horizon, out, **options):
    """Train policies with REINFORCE and a baseline, RLOO and RELAX.

    Writes learning_curves.png and metrics.json.
    """
    if options["updates"] % options["every"]:
        raise UserError(f"--updates {options['updates']} must be a multiple of --every {options['every']}")
    if "rloo" in estimators and options["environments"] % options["copies"]:
        raise UserError(
            f"--environments {options['environments']} must be a multiple of --copies {options['copies']}"
        )
    worlds = {name: make_world(name, horizon) for name in names}
    out = output_folder(out, "policy_gradient")
    results = {
        name: {e: train(name, world, Config(e, **options), seeds, seed) for e in dict.fromkeys(estimators)}
        for name, world in worlds.items()
    }
    settings = {"seeds": seeds, "seed": seed, "horizon": horizon, **options}
    draw(results, settings, out / "learning_curves.png")
    packages = versions() | {"gymnax": importlib.metadata.version("gymnax")}
    write_json(out / "metrics.json", {"settings": settings, "results": results, "versions": packages})
    for name, rows in results.items():
        for estimator, row in rows.items():
            at, timing = row["solved_after_updates"], row["timing"]
            when = f"after {at} updates, {timing['seconds_until_solved']:.0f} s" if at else "never"
            click.echo(
                f"{name} {estimator}: return {row['mean'][-1]:.1f}, seeds from {row['lowest'][-1]:.1f} to "
                f"{row['highest'][-1]:.1f}; {ENVIRONMENTS[name][0]} reached {when}; {timing['seconds']:.0f} s"
            )
    click.echo(f"in {out}: learning_curves.png, metrics.json")


if __name__ == "__main__":
    run(main)
