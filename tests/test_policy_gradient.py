"""The example of policy gradients: on a small world each gradient matches a sum over all trajectories."""

import functools
import itertools
import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
import policy_gradient as example

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
KEY = jax.random.key(8)
HORIZON, STATES, END = 3, 2, 2
NEXT = np.array([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], [[0.2, 0.4, 0.4], [0.7, 0.2, 0.1]]])  # [s, a, s']
REWARD = np.array([[1.0, -0.5], [-2.0, 3.0]])


class Params(NamedTuple):
    end: float = 1.0  # what is seen after the end
    max_steps_in_episode = HORIZON


class Tabular:
    """Two states, two actions, and an end, after which it still hands out rewards."""

    num_actions = 2

    def see(self, state, params):
        return jnp.where(state == END, params.end, jax.nn.one_hot(state, STATES))

    def reset_env(self, key, params):
        state = jax.random.bernoulli(key, 0.4).astype(int)
        return self.see(state, params), state

    def step_env(self, key, state, action, params):
        before = jnp.minimum(state, STATES - 1)
        after = jax.random.choice(key, STATES + 1, p=jnp.asarray(NEXT)[before, action])
        return self.see(after, params), after, jnp.asarray(REWARD)[before, action], after == END, {}


WORLD = example.World(Tabular(), Params(), (2.0, 0.5))


RATES = ("learning_rate", "baseline_rate", "variate_rate")


def config(estimator, **options):
    values = {"environments": 4, "copies": 2, "hidden": 3, "updates": 1, "every": 1, "evaluations": 1}
    return example.Config(**values | options | {"estimator": estimator, **dict.fromkeys(RATES, 1.0)})


def random_networks():
    keys = jax.random.split(KEY, 3)
    policy, baseline, variate = (
        example.init_mlp(key, *sizes, last=1.5)
        for key, sizes in zip(keys, [(2, 3, 2), (3, 3, 1), (5, 3, 1)], strict=True)
    )
    return example.Networks(policy, baseline, variate)


NETWORKS = random_networks()


def mean_return(policy):
    """J, as the sum over all trajectories."""
    p = jax.nn.softmax(example.mlp(policy, jnp.eye(STATES) / jnp.asarray(WORLD.scale)))
    states = np.array(list(itertools.product(range(STATES + 1), repeat=HORIZON + 1)))[:, None]
    actions = np.array(list(itertools.product(range(2), repeat=HORIZON)))[None]
    probability, gain = jnp.array([0.6, 0.4, 0.0])[states[..., 0]], 0.0
    for t in range(HORIZON):
        s, a, after = states[..., t], actions[..., t], states[..., t + 1]
        going = s < END
        s = np.minimum(s, STATES - 1)
        stays = (a == 0) & (after == END)  # of what follows the end, one way to write it counts
        probability *= jnp.where(going, p[s, a] * NEXT[s, a, after], stays)
        gain += np.where(going, REWARD[s, a], 0)
    return jnp.sum(probability * gain), jnp.sum(probability)


@functools.cache
def exact_gradient():
    gradient, total = jax.jit(jax.grad(mean_return, has_aux=True))(NETWORKS.policy)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


@functools.cache
def compiled(estimator):
    """The gradients of all networks from one key, and from many."""
    one = lambda networks, key, end: example.gradients(
        WORLD._replace(params=Params(end)), config(estimator), networks, key
    )
    many = lambda networks, keys: jax.vmap(lambda key: one(networks, key, 1.0)[0])(keys)
    return jax.jit(one), jax.jit(many)


def policy_gradients(estimator, networks, key=KEY, draws=20_000):  # one number, compiled once
    """Many estimates of the gradient of J."""
    policies = compiled(estimator)[1](networks, jax.random.split(key, draws)).policy
    return -HORIZON * np.concatenate([np.reshape(x, (draws, -1)) for x in jax.tree.leaves(policies)], 1)


@pytest.mark.parametrize("estimator", example.ESTIMATORS)
def test_gradient_is_that_of_the_sum_over_all_trajectories(estimator):
    exact = exact_gradient()
    seen = policy_gradients(estimator, NETWORKS)
    error = seen.std(0) / np.sqrt(len(seen))
    assert np.abs(exact).max() > 30 * error.max()  # an error of a fifth of it would be seen
    assert (np.abs(seen.mean(0) - exact) < 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("estimator", ["rloo", "relax"])  # reinforce shares its lines with both
def test_nothing_after_the_end_is_learned_from(estimator):
    """Another view of the end, which many of the episodes reach early, changes no gradient."""
    one, other = (compiled(estimator)[0](NETWORKS, KEY, end) for end in (1.0, 30.0))
    assert not one[1].alive.all() and not np.allclose(one[1].observation, other[1].observation)
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])


def test_the_trained_control_variate_lowers_the_variance():
    """At first, when it is 0, RELAX is REINFORCE with the same baseline; its slope leads below."""
    optimizer = example.optax.adam(0.03)
    layers, last = NETWORKS.variate[:-1], NETWORKS.variate[-1]
    start = NETWORKS._replace(variate=[*layers, jax.tree.map(jnp.zeros_like, last)])

    def step(state, key):
        variate, optimizer_state = state
        networks = start._replace(variate=variate)
        slopes = compiled("relax")[1](networks, jax.random.split(key, 100)).variate
        slope = jax.tree.map(lambda x: x.mean(0), slopes)
        changes, optimizer_state = optimizer.update(slope, optimizer_state)
        return (example.optax.apply_updates(variate, changes), optimizer_state), None

    keys = jax.random.split(KEY, 150)
    (variate, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(
        (start.variate, optimizer.init(start.variate))
    )
    other = jax.random.key(7)
    plain, before, after = (
        policy_gradients(estimator, networks, other).var(0).sum()
        for estimator, networks in
        [("reinforce", start), ("relax", start), ("relax", start._replace(variate=variate))]
    )  # fmt: skip
    assert abs(before / plain - 1) < 0.05
    assert after < 0.5 * plain


def run(*arguments):
    """The exit code of the example's command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["policy_gradient.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            common.run(example.main)
    return exit.value.code or 0


SMALL = ["--horizon", 12, "--updates", 4, "--every", 2, "--environments", 4, "--copies", 2, "--hidden", 4]


def test_example_from_flags_to_files(tmp_path, capsys):
    assert run(*SMALL, "--estimator", "rloo", "--out", tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ranges = {"CartPole-v1": (1, 12), "Acrobot-v1": (-12, 0)}
    assert set(metrics["results"]) == set(ranges)
    for name, (low, high) in ranges.items():
        assert list(metrics["results"][name]) == ["rloo"]
        for row in metrics["results"][name].values():
            returns = np.array(row["returns"])
            assert returns.shape == (2, 5) and row["updates"] == [2, 4]
            assert (low <= returns).all() and (returns <= high).all()
            np.testing.assert_allclose(row["mean"], returns.mean(1))
            np.testing.assert_allclose(row["lowest"], returns.min(1))
            np.testing.assert_allclose(row["highest"], returns.max(1))
            assert all(0 < steps <= 4 * 4 * 12 for steps in row["environment_steps"])
            if name == "CartPole-v1":  # each seed falls at a time of its own
                assert (returns.std(1) > 0).all()
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("; 475 reached never; ") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--estimator arm", "'arm' is not one of 'reinforce', 'rloo', 'relax'"),
        ("--environment Pong-v5", "is not one of 'CartPole-v1', 'Acrobot-v1'"),
        ("--updates 7", "--updates 7 must be a multiple of --every 5"),
        ("--copies 5", "--environments 32 must be a multiple of --copies 5"),
        ("--copies 1", "1 is not in the range 2<=x<=4096"),
    ],
)
def test_bad_input_is_one_line(flags, words, tmp_path, capsys):
    assert run(*flags.split(), "--out", tmp_path / "new") == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and words in line
    assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_one_line(monkeypatch, tmp_path, capsys):
    advance = lambda state, keys: ((state[0] / 0, None), jnp.zeros(5), np.zeros(5, int))
    monkeypatch.setattr(example, "make_training", lambda *_: (lambda keys: (jnp.ones(5), None), advance))
    assert run(*SMALL, "--out", tmp_path) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: reinforce on CartPole-v1 is not finite by update 2; lower its learning rates"


def test_without_gymnax_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    assert run("--out", tmp_path / "new") == 2
    line = capsys.readouterr().err
    assert line.startswith("error: gymnax cannot be imported") and line.count("\n") == 1
    assert "python -m pip install -e '.[examples]'" in line
    assert not (tmp_path / "new").exists()


def test_help_explains_every_option(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for parameter in example.main.params:
        assert parameter.opts[0] in text and (getattr(parameter, "help", "") or "").strip()
