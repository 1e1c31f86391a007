"""Sharded draws: the same numbers on any mesh, and no device asks another for anything.

Eight virtual CPU devices need a process of their own, as a backend has its devices from its start.
"""

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
from cases import CASES, is_discrete

pytestmark = pytest.mark.usefixtures("fast_compilation")
COLLECTIVES = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
KEY = jax.random.key(20261123)
HALVES = 2  # of the rows, for two workers
# Neither elementwise nor of the last axis: it solves linear systems, whose operands LAPACK has gathered, as
# the partitioner cannot look into it, and all its matrices iterate until the last has converged.
GATHERED = {"gumbel_sinkhorn"}


def in_eight(code):
    """What a process of eight devices prints as JSON."""
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
    """Of every row: the collectives of its program on a mesh of 4 x 2, and its distance to one device's."""
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
    """Forward and backward, the batch over a mesh of 4 x 2; discrete draws to the last bit."""
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
    "two bits a row": (lambda l: rj.relaxed_bernoulli(KEY, l, 0.7), (8, 2)),
    "classes": (lambda l: rj.gumbel_softmax(KEY, l, 0.7), (8, 2, 5)),
    "one-hot": (lambda l: rj.gumbel_softmax(KEY, l, 0.7, hard=True), (16, 2, 5)),
}


def over_meshes():
    """Numbers on every mesh and axis, of elementwise and last-axis samplers, and of `shape` with one row."""
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
    """Elementwise samplers may be split along any axis, those of the last axis along all others."""
    found = in_eight("print(json.dumps([t.over_meshes(), t.control()]))")
    for name, (error, collectives) in found[0].items():
        assert error < 1e-6 and collectives == [], name
    assert len(found[0]) > 20
    assert found[1]  # the search for collectives finds what there is
