"""Sharded draws: the same numbers on any mesh, and no device asks another for anything.

Eight virtual CPU devices need their own process, since a backend has its devices from the start.
"""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import relaxit_jax as rj
from cases import BY_NAME, CASES, DISTRIBUTIONS, is_discrete
from relaxit_jax import _math as lm
from relaxit_jax import structured as st

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]
COLLECTIVES = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
KEY = jax.random.key(20261123)
HALVES = 2  # of the rows, for two workers
# Neither elementwise nor of the last axis: it solves linear systems, whose operands LAPACK has gathered, as
# the partitioner cannot look into it, and all its matrices iterate until the last has converged.
GATHERED = {"gumbel_sinkhorn"}


def in_eight(code):
    """The output of a process with eight devices, printed as JSON."""
    prelude = 'import jax; jax.config.update("jax_num_cpu_devices", 8)\nimport json, test_sharding as t\n'
    folders = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def program(case, shape, sharding):
    """A compiled draw of this batch shape with its gradients, and its arguments, sharded so."""
    tile = lambda x: np.broadcast_to(x, (8, *x.shape)).reshape(*shape, *x.shape[1:])
    params = {n: tile(np.asarray(x)) if np.ndim(x) else x for n, x in case.floats.items()}
    arrays = {n: jax.device_put(jnp.asarray(x), sharding) for n, x in params.items() if np.ndim(x)}
    scalars = {n: x for n, x in params.items() if not np.ndim(x)}

    def draw(arrays):
        return case.draw(KEY, shape, **arrays, **scalars)

    def both(arrays, weights):
        z, pull = jax.vjp(draw, arrays)
        return z, pull(weights)[0]

    out = jax.eval_shape(draw, arrays)
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return jax.jit(draw).lower(arrays).compile(), (arrays,)
    weights = np.asarray(jax.random.normal(jax.random.key(1), out.shape, out.dtype))
    arguments = arrays, jax.device_put(weights, sharding)
    return jax.jit(both).lower(*arguments).compile(), arguments


def mesh(shape, names):
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names, axis_types=auto)


def of_rows(half):
    """For every entry: the collectives of its program on a 4 x 2 mesh, and its distance from one device."""
    sharded = NamedSharding(mesh((4, 2), ("a", "b")), PartitionSpec("a", "b"))
    found = {}
    for case in CASES[half::HALVES]:
        compiled, arguments = program(case, (8, 2), sharded)
        one, its = program(case, (8, 2), jax.devices()[0])
        pairs = list(zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(one(*its)), strict=True))
        pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs]
        errors = [float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in pairs]
        spread = float(np.std(pairs[0][0]))
        found[case.name] = {
            "collectives": sorted(set(re.findall(COLLECTIVES, compiled.as_text()))),
            "draw": errors[0], "gradient": max(errors[1:], default=0.0), "spread": spread,
        }  # fmt: skip
    return found


@pytest.mark.parametrize("half", range(HALVES))
def test_a_sharded_draw_is_that_of_one_device_and_asks_nobody(half):
    """Forward and backward, with the batch over a mesh of 4 x 2; discrete draws agree to the last bit."""
    found = in_eight(f"print(json.dumps(t.of_rows({half})))")
    assert len(found) == len(CASES[half::HALVES])
    for case in CASES[half::HALVES]:
        row = found[case.name]
        assert bool(row["collectives"]) == (case.name in GATHERED), (case.name, row)
        assert row["draw"] <= (0 if is_discrete(case) else 2e-6), (case.name, row)
        assert row["gradient"] < 2e-5, (case.name, row)
        assert row["spread"] > 0, (case.name, row)


SAMPLERS = {
    "bits": (lambda l: rj.relaxed_bernoulli(KEY, l, 0.7), (16, 8)),
    "hard bits": (lambda l: rj.straight_through_bernoulli(KEY, l), (16, 8)),
    "one axis": (lambda l: rj.hard_concrete(KEY, l, 0.7), (24,)),
    "a bit a device": (lambda l: rj.relaxed_bernoulli(KEY, l, 0.7), (8,)),
    "two bits per row": (lambda l: rj.relaxed_bernoulli(KEY, l, 0.7), (8, 2)),
    "classes": (lambda l: rj.gumbel_softmax(KEY, l, 0.7), (8, 2, 5)),
    "one-hot": (lambda l: rj.gumbel_softmax(KEY, l, 0.7, hard=True), (16, 2, 5)),
    "orders": (lambda l: rj.relaxed_permutation(KEY, l, 0.7), (8, 2, 5)),
    "chains": (lambda l: st.chain_sample(KEY, l, jnp.eye(4)), (8, 2, 3, 4)),
    "relaxed chains": (lambda l: st.relaxed_chain(KEY, l, jnp.eye(4), 0.7), (8, 2, 3, 4)),
    "trees": (lambda w: st.tree_sample(KEY, w), (8, 2, 4, 4)),
    "relaxed trees": (lambda w: st.relaxed_tree(KEY, w, 0.7), (8, 2, 4, 4)),
}


def over_meshes():
    """Numbers on every mesh and axis, for elementwise and last-axis samplers, and `shape` with one row."""
    eight, both = mesh((8,), ("a",)), mesh((4, 2), ("a", "b"))
    found = {}
    for name, (draw, shape) in SAMPLERS.items():
        logits = np.asarray(jax.random.normal(jax.random.key(2), shape))
        places = [(eight, PartitionSpec("a")), (both, PartitionSpec("a")), (both, PartitionSpec(("a", "b")))]
        if len(shape) > 1:
            places += [(both, PartitionSpec("a", "b")), (both, PartitionSpec(None, "b"))]
        expected = np.asarray(jax.jit(draw)(logits))
        for where, spec in places:
            if any(n % s for n, s in zip(shape, shards(where, spec), strict=False)):
                continue
            compiled = jax.jit(draw).lower(jax.device_put(logits, NamedSharding(where, spec))).compile()
            z = np.asarray(compiled(jax.device_put(logits, NamedSharding(where, spec))))
            found[f"{name} {dict(where.shape)} {spec}"] = [
                float(np.abs(z - expected).max()), re.findall(COLLECTIVES, compiled.as_text())
            ]  # fmt: skip
    logits = jnp.array([0.3, -1.0, 0.5])
    draw = lambda l: rj.gumbel_softmax(KEY, l, 0.7, shape=(16,))
    split = jax.jit(draw, out_shardings=NamedSharding(eight, PartitionSpec("a")))
    text = split.lower(logits).compile().as_text()
    error = float(np.abs(np.asarray(split(logits)) - np.asarray(jax.jit(draw)(logits))).max())
    found["shape="] = [error, re.findall(COLLECTIVES, text)]
    return found


def shards(where, spec):
    for axes in spec:
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        yield int(np.prod([where.shape[name] for name in names]))


def control():
    """A softmax over an axis that is sharded has to ask."""
    place = NamedSharding(mesh((8,), ("a",)), PartitionSpec(None, "a"))
    compiled = jax.jit(jax.nn.softmax).lower(jax.device_put(np.ones((4, 16)), place)).compile()
    return re.findall(COLLECTIVES, compiled.as_text())


def test_whatever_the_mesh_and_the_axis():
    """Elementwise samplers may be split along any axis, samplers over the last axis along all others."""
    found = in_eight("print(json.dumps([t.over_meshes(), t.control()]))")
    for name, (error, collectives) in found[0].items():
        assert error < 1e-6 and collectives == [], name
    assert len(found[0]) > 20
    assert found[1]  # the search for collectives finds what there is


ESTIMATORS = {
    "reinforce": {},
    "rloo": {},
    "arm": {},
    "disarm": {},
    "arms": {},
    "vimco": {},
    "rebar": {"tau": 0.5, "eta": 1.0},
    "relax": {"control_variate": lambda z: jnp.tanh(z).sum(-1)},
}


def of_bits(name, key, f, logits):
    return getattr(rj.estimators, name)(key, f, rj.estimators.Bernoulli(logits), **ESTIMATORS[name])


def data_of_devices():
    """For each estimator: one key, the same logits, an f with each device's data; the gradient's distance."""
    where = jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Auto,))
    rows, same = PartitionSpec("d"), PartitionSpec()
    x = np.asarray(jax.random.normal(jax.random.key(3), (8, 4)))
    found = {}
    for name in ESTIMATORS:
        loss = lambda l, x, name=name: of_bits(name, KEY, lambda b: jnp.sum(jnp.sin(b * x), -1) ** 2, l)
        gradient = jax.grad(loss)
        of_row = lambda l, x, gradient=gradient: gradient(l, x[0])
        mapped = jax.shard_map(of_row, mesh=where, in_specs=(same, rows), out_specs=same)
        expected = sum(jax.jit(gradient)(LOGITS, row) for row in x)
        found[name] = distance(jax.jit(mapped)(LOGITS, x), expected)
    return found


LOGITS = np.array([0.3, -1, 0.5, 2], np.float32)


def test_an_estimator_adds_up_what_devices_with_different_data_find():
    found = in_eight("print(json.dumps(t.data_of_devices()))")
    assert set(found) == set(ESTIMATORS)
    for name, error in found.items():
        assert error < 2e-5, (name, error)


def codebooks():
    """How far a codebook on eight devices is from one on one device, and what a sharded search needs."""
    qz = rj.quantizers
    rng = np.random.default_rng(0)
    x, codes = np.float32(rng.normal(size=(64, 4))), np.float32(rng.normal(size=(12, 4)))
    where = jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Auto,))
    rows, same = PartitionSpec("d"), PartitionSpec()

    def step(x, codes, axis_name=None):
        index = qz.vector_quantize(x, codes).index
        state = qz.update_codebook(qz.codebook_state(codes), x, index, 0.5, axis_name=axis_name)
        state = state._replace(count=state.count * (jnp.arange(12) % 3 > 0))
        return qz.restart_unused(KEY, state, x, 0.1, axis_name=axis_name), qz.perplexity(
            index, 12, axis_name=axis_name
        )

    of_devices = functools.partial(step, axis_name="d")
    mapped = jax.shard_map(of_devices, mesh=where, in_specs=(rows, same), out_specs=same)
    sharded = jax.device_put(x, NamedSharding(where, rows))
    search = jax.jit(lambda x: qz.vector_quantize(x, codes)).lower(sharded).compile()
    return distance(jax.jit(mapped)(x, codes), jax.jit(step)(x, codes)), re.findall(
        COLLECTIVES, search.as_text()
    )


def test_devices_keep_one_codebook():
    """Averages, restarts and perplexity are as on one device; each device finds the nearest code alone."""
    error, collectives = in_eight("print(json.dumps(t.codebooks()))")
    assert error < 1e-5 and collectives == []


def methods(part=0, parts=1):
    """Functions of a key and arrays of eight rows: every sampler and density, or a class with neither.

    The values of densities are drawn, and drawing is compiled, in the part that they are in.
    """
    for name, f, arrays in list(functions())[part::parts]:
        yield name, f, arrays() if callable(arrays) else arrays


def with_value(case, rows):
    """Arrays of a density: the parameters, and a draw."""
    return {"value": np.asarray(jax.jit(lambda rows: case.draw(KEY, None, **rows))(rows))} | rows


def functions():
    """All of `methods`; if arrays contain a draw, a function that makes these."""
    stretch = lambda x: np.broadcast_to(x, (4, *np.shape(x))).reshape(8, *np.shape(x)[1:]).astype(np.float32)
    for case in CASES:
        rows = {n: stretch(x) if np.ndim(x) else np.full(8, x, np.float32) for n, x in case.floats.items()}
        yield case.name, lambda key, a, case=case: case.draw(key, None, **a), rows
        if case.log_prob:
            value = jax.eval_shape(lambda rows, case=case: case.draw(KEY, None, **rows), rows)
            if jnp.issubdtype(value.dtype, jnp.floating):  # on a mesh the value may be sharded alone
                scored = lambda key, a, case=case: case.density(a["value"], **without(a, "value"))
                yield f"{case.name}_log_prob", scored, functools.partial(with_value, case, rows)
            else:
                scored = lambda key, a, case=case: case.density(case.draw(key, None, **a), **a)
                yield f"{case.name}_log_prob", scored, rows
        if case in DISTRIBUTIONS:
            yield f"{case.name} class", functools.partial(of_class, case), rows
    of_four, of_three = (
        {"logits": stretch(BY_NAME[n].params["logits"])} for n in ("simple_top_k", "reinmax")
    )
    cost = lambda b: jnp.sum(jnp.sin(b * jnp.arange(1, b.shape[-1] + 1, dtype=b.dtype)), -1)
    for name in ESTIMATORS:
        bits = lambda key, a, name=name: of_bits(name, key, cost, a["logits"])
        yield f"{name} of bits", bits, of_four
        if name not in ("arm", "disarm"):
            classes = lambda key, a, name=name: getattr(rj.estimators, name)(
                key, cost, rj.estimators.OneHotCategorical(a["logits"], 1), **ESTIMATORS[name]
            )
            yield f"{name} of classes", classes, of_three
    yield (
        "unordered_set",
        lambda key, a: rj.estimators.unordered_set(
            key, cost, rj.estimators.OneHotCategorical(a["logits"], 1)
        ),
        of_three,
    )
    yield "exact", lambda key, a: rj.estimators.exact(cost, rj.estimators.Bernoulli(a["logits"])), of_four
    unordered = lambda key, a: rj.gumbel_top_k_log_prob(
        rj.gumbel_top_k(key, a["logits"], 2)[0], a["logits"], ordered=False
    )
    yield "gumbel_top_k_log_prob of sets", unordered, of_four
    yield "simple_top_k_marginals", lambda key, a: rj.simple_top_k_marginals(a["logits"], 2), of_four
    entropy = lambda key, a: rj.distributions.SimpleTopK(logits=a["logits"], k=2).entropy()
    yield "entropy of SimpleTopK", entropy, of_four
    yield from structured(stretch)
    yield "straight_through", lambda key, a: rj.straight_through(a["logits"] > 0, a["logits"]), of_four
    yield "hard_concrete_l0", lambda key, a: rj.hard_concrete_l0(a["logits"], 0.5), of_four
    yield "hard_concrete_gate", lambda key, a: rj.hard_concrete_gate(a["logits"]), of_four
    yield from logits_and_quantizers(of_four)
    bridge = rj.laplace_bridge
    yield (
        "dirichlet_to_gaussian",
        lambda key, a: bridge.dirichlet_to_gaussian(jnp.exp(a["logits"]))[1],
        of_four,
    )
    yield (
        "gaussian_to_dirichlet",
        lambda key, a: bridge.gaussian_to_dirichlet(a["logits"], jnp.eye(4)),
        of_four,
    )
    yield "stochastic_beam_search", beams, of_four
    yield "stochastic_beam_search of rows", beams_of_rows, of_four


def logits_and_quantizers(of_four):
    """Functions of logits that draw nothing, and quantizers of rows; each with the name of its argument."""
    qz = rj.quantizers
    table = lambda x: jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), x.dtype)
    like = lambda x: jnp.asarray([0.3, -1.0, 0.5, 2.0], x.dtype)

    def with_losses(x, **options):
        q = qz.vector_quantize(x, table(x), **options)
        return q.value + (q.codebook_loss + q.commitment_loss)[..., None].astype(x.dtype)

    def residual(x):
        q = qz.residual_quantize(x, jnp.stack([table(x), table(x) / 2]))
        return q.value + (q.codebook_loss + q.commitment_loss)[..., None].astype(x.dtype)

    functions = {
        "bernoulli_entropy": rj.bernoulli_entropy,
        "bernoulli_kl": lambda l: rj.bernoulli_kl(l, like(l)),
        "categorical_entropy": rj.categorical_entropy,
        "categorical_kl": lambda l: rj.categorical_kl(l, like(l)),
        "mix_uniform": lambda l: rj.mix_uniform(l, 0.1),
        "gaussian_bernoulli_l0": lambda l: rj.gaussian_bernoulli_l0(l, 0.5),
        "gumbel_top_k_marginals": lambda l: rj.gumbel_top_k_marginals(l, 2),
        "simple_top_k_marginals of counts": lambda l: rj.simple_top_k_marginals(
            l, 2, count=(l[..., 0] > 0).astype(jnp.int32)
        ),
        "vector_quantize": with_losses,
        "vector_quantize by rotation": lambda x: with_losses(x, gradient="rotation"),
        "residual_quantize": residual,
        "finite_scalar_quantize": lambda x: qz.finite_scalar_quantize(x, (2, 3, 4, 5))[0],
        "finite_scalar_codes": lambda x: qz.finite_scalar_codes(
            qz.finite_scalar_quantize(x, (2, 3, 4, 5))[1], (2, 3, 4, 5)
        ).astype(x.dtype),
        "lookup_free_quantize": lambda x: qz.lookup_free_quantize(x)[0],
    }
    for name, f in functions.items():
        yield name, lambda key, a, f=f: f(a["logits"]), of_four
    one_hot = lambda key, a: rj.embed(rj.straight_through_categorical(key, a["logits"]), table(a["logits"]))
    yield "embed", one_hot, of_four
    of_counts = lambda key, a: rj.simple_top_k(key, a["logits"], 2, count=jnp.arange(2)[1])
    yield "simple_top_k of counts", of_counts, of_four


def structured(stretch):
    """Chains and trees, each row with its own potentials, and chains with the same transitions."""
    numbers = np.random.default_rng(5)
    shapes = (3, 2), (2, 2, 2), (4, 4)
    unary, transition, weights = (stretch(numbers.normal(size=(2, *shape))) for shape in shapes)
    chain, tree = {"unary": unary, "transition": transition}, {"weights": weights}
    alike = lambda a: a | {"transition": jnp.full((2, 2), 0.3, a["unary"].dtype)}
    path = np.float32([[1, 0], [0, 1], [0, 1]])
    branches = np.float32([[0, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]])
    yield "chain_sample", lambda key, a: st.chain_sample(key, **a), chain
    yield "chain_sample, alike", lambda key, a: st.chain_sample(key, **alike(a)), {"unary": unary}
    yield "relaxed_chain", lambda key, a: st.relaxed_chain(key, **a, tau=0.5), chain
    yield "chain_log_partition", lambda key, a: st.chain_log_partition(**a), chain
    yield "chain_log_prob of a path", lambda key, a: st.chain_log_prob(path, **a), chain
    yield "tree_sample", lambda key, a: st.tree_sample(key, **a), tree
    yield "relaxed_tree", lambda key, a: st.relaxed_tree(key, **a, tau=0.5), tree
    yield "tree_log_partition", lambda key, a: st.tree_log_partition(**a), tree
    yield "tree_log_prob of branches", lambda key, a: st.tree_log_prob(branches, **a), tree
    relaxed = lambda key, a: st.relaxed_structure(key, st.tree_log_partition, a["weights"], 0.5)
    yield "relaxed_structure", relaxed, tree


def without(a, name):
    return {n: x for n, x in a.items() if n != name}


def of_class(case, key, a):
    """The log-density of a draw as a function of the parameters, or the draw of a class that has none."""
    d = case.build(**a)
    z = d.sample(key)
    return d.log_prob(jax.lax.stop_gradient(z)) if case.log_prob else z


def beams(key, a):
    step = lambda state, token: (jnp.mean(a["logits"], 0) * state, state)
    return rj.stochastic_beam_search(key, step, a["logits"].dtype.type(0.7), 2, 3)[1]


def beams_of_rows(key, a):
    """A search for each row, all at one key."""
    return jax.vmap(lambda logits: beams(key, {"logits": logits[None]}))(a["logits"])


def value_and_gradient(f):
    """For a function of a key and arrays, its value, without rules of derivatives, and its gradient."""

    def both(key, a):
        value = f(key, a)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value, a
        return value, jax.grad(lambda a: jnp.sum(jnp.sin(1 + f(key, a))))(a)

    return both


def of_reductions():
    """How the reductions for accelerators shard their results, of a sharded batch of rows and under vmap."""
    explicit = jax.make_mesh((8,), ("d",))
    forms = {"pairs": lm.largest_of_pairs, "few": lambda x: lm.top_few(x, 3)[0]}
    with jax.set_mesh(explicit):
        x = jax.device_put(jnp.ones((8, 6)), NamedSharding(explicit, PartitionSpec("d")))
        return {
            f"{name} {way}": str(jax.typeof(jax.jit(f)(x)).sharding.spec)
            for name, form in forms.items()
            for way, f in {"of rows": form, "under vmap": jax.vmap(form)}.items()
        }


def test_reductions_for_accelerators_keep_the_sharding_of_a_batch():
    found = in_eight("print(json.dumps(t.of_reductions()))")
    assert len(found) == 4
    assert all(spec.startswith("P('d',") for spec in found.values()), found


TRACED = ("log_prob", "class")  # of these rows JAX's checks of the types are enough


def everywhere(part):
    """Results of all `methods`, under shard_map on one and eight devices and on explicit meshes.

    The rows are split at one key, or whole with one key per device (the gradient is then the sum over the
    keys), or on a mesh that shards the first argument, the others or all. JAX refuses programs by their
    types, before it compiles them; if noise is drawn, the numbers are also compared with one device.
    """
    found = {}
    rows, same, devices = PartitionSpec("d"), PartitionSpec(), jax.devices()
    keys = jax.random.split(KEY, 8)
    for name, f, a in methods(part, PARTS):
        both = value_and_gradient(f)
        traced = {}
        for n in (1, 8):
            where = jax.make_mesh((n,), ("d",), (jax.sharding.AxisType.Auto,), devices=devices[:n])
            split = jax.shard_map(both, mesh=where, in_specs=(same, rows), out_specs=rows)
            at_keys = lambda k, a, both=both: both(k[0], a)
            many = jax.shard_map(at_keys, mesh=where, in_specs=(rows, same), out_specs=(rows, same))
            traced |= {f"shards {n}": jax.jit(split).lower(KEY, a), f"keys {n}": jax.jit(many).lower(keys, a)}
        explicit = jax.make_mesh((8,), ("d",))
        with jax.set_mesh(explicit):
            for which, names in {"all": list(a), "first": list(a)[:1], "others": list(a)[1:]}.items():
                specs = {n: rows if n in names else same for n in a}
                placed = {n: jax.device_put(x, NamedSharding(explicit, specs[n])) for n, x in a.items()}
                traced[which] = jax.jit(both).lower(KEY, placed)
                if which == "all":
                    on_mesh = placed
        found[name] = {}
        if name.endswith(TRACED):
            continue
        one = jax.jit(both)
        of_shards = [one(KEY, {n: x[i : i + 1] for n, x in a.items()}) for i in range(8)]
        of_shards = jax.tree.map(lambda *x: np.concatenate(x), *of_shards)
        values, gradients = jax.tree.map(lambda *x: np.stack(x), *(one(key, a) for key in keys))
        drawn = np.ptp(values, 0).any()  # or else all devices have the same, and there is nothing to sum
        count = 8 if drawn and jnp.issubdtype(values.dtype, jnp.floating) else 1
        gradients = jax.tree.map(lambda x, count=count: count * np.mean(x, 0), gradients)
        of_keys = np.concatenate(values), gradients
        found[name] = {
            "shards": distance(traced["shards 8"].compile()(KEY, a), of_shards),
            "keys": distance(traced["keys 8"].compile()(keys, a), of_keys),
            "explicit": distance(traced["all"].compile()(KEY, on_mesh), one(KEY, a)),
        }
    return found


def distance(x, y):
    """The largest relative distance of two trees."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs]
    return max(float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in pairs)


PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_everything_works_in_shard_map_and_on_explicit_meshes(part):
    """With the default checks of shard_map; values and gradients are the same as on one device."""
    found = in_eight(f"print(json.dumps(t.everywhere({part})))")
    assert len(found) >= 10
    for name, errors in found.items():
        assert len(errors) == (0 if name.endswith(TRACED) else 3)
        assert max(errors.values(), default=0) < 2e-5, (name, errors)


def exported(part):
    """For each of `methods`: how far a saved program for any batch size is from one for eight."""
    (size,) = jax.export.symbolic_shape("size")
    found = {}
    for name, f, a in methods(part, PARTS):
        both = jax.jit(value_and_gradient(f))
        any_size = {n: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for n, x in a.items()}
        saved = jax.export.export(both, platforms=("cpu", "cuda", "tpu"))(KEY, any_size).serialize()
        if name.endswith("class"):  # made of the sampler and the density, whose numbers are compared
            continue
        found[name] = distance(jax.export.deserialize(saved).call(KEY, a), both(KEY, a))
    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_everything_exports_with_a_symbolic_batch_size(part):
    for name, error in exported(part).items():
        assert error < 2e-5, (name, error)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_everything_keeps_its_dtypes_apart(dtype):
    """With `jax_numpy_dtype_promotion` strict, JAX refuses an operation on two dtypes when it is traced."""
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        for name, f, a in methods():
            arrays = {n: jnp.asarray(x, dtype) for n, x in a.items()}
            value, gradients = jax.eval_shape(value_and_gradient(f), KEY, arrays)
            wide = "float64" if dtype == "float64" else "float32"
            assert value.dtype in (dtype, wide) or not jnp.issubdtype(value.dtype, jnp.floating), name
            assert all(x.dtype == dtype for x in jax.tree.leaves(gradients)), name
