"""Count bytes and kernels of every sampler as compiled for a GPU or a TPU, on a machine that has neither.

XLA compiles ahead of time for a device that is only described: one H100, or one chip of a TPU v5e. For the
compiled program, this counts the bytes that its kernels read and write, in arrays of the size of the logits,
and the number of kernels, and compares them with hand-written JAX and, if there are any, with fused kernels.
Nothing runs: these are bytes, not times. A loop counts as often as it turns if the compiler knows this,
otherwise once. A copy ahead of time into the fast memory of a TPU is left out.

Then it looks for collectives in the programs for eight GPUs or for the 2 x 2 chips of a TPU, with the batch
sharded: by the shardings of a jitted function's arguments, by jax.shard_map with its default checks, and on
an explicit mesh.

It needs the compilers, as packages: for `gpu` jax-cuda12-plugin and jax-cuda12-pjrt in JAX's own version,
nvidia-cuda-nvcc-cu12 and nvidia-nvjitlink-cu12; for `tpu` jax[tpu]. `nox --session accelerators` installs
them and runs both.

Writes results/accelerators.json, where the results of other devices and dtypes stay, and
results/accelerators.png.
"""

import contextlib
import json
import math
import os
import re

# a described chip has no server to ask about it, and no local chip should be searched for
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost"}

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import relaxit_jax as rj
from records import RESULTS, out_option, write
from rows import ROWS

H100 = {  # the fields that XLA's compiler needs
    "platform_name": "CUDA",
    "device_description_str": "NVIDIA H100 80GB HBM3",
    "dnn_version_info": {"major": 9, "minor": 7},
    "runtime_version": {"major": 12, "minor": 8, "patch": 0},
    "gpu_device_info": {
        "cuda_compute_capability": {"major": 9}, "core_count": 132, "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "threads_per_warp": 32, "threads_per_block_limit": 1024, "threads_per_core_limit": 2048,
        "registers_per_block_limit": 65536, "registers_per_core_limit": 65536,
        "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
        "shared_memory_per_core": 233472, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "l2_cache_size": 50 * 2**20, "memory_bandwidth": 3_352_320_000_000,
        "device_memory_size": 84_929_347_584,
    },
}  # fmt: skip
NAMES = {"gpu": "H100", "tpu": "TPU v5e"}
ROWS_OF_LOGITS = {"gpu": 131_072, "tpu": 65_536}  # more than the fast memory of a TPU holds
SMALLER = {
    "simple_top_k": 8,
    "gumbel_top_k": 8,
    "relaxed_top_k": 8,
    "relaxed_permutation": 8,
}  # these store many such arrays
SHAPES = {"correlated_bernoulli": (128,), "logistic_normal_full": (128,), "gumbel_sinkhorn": (64, 64),
          "relaxed_permutation": (64,)}  # fmt: skip
SHARDED = {"gpu": 8, "tpu": 4}  # devices of the programs that are searched for collectives
WAYS = ("jit", "shard_map", "explicit")
PASSES = ("forward", "forward + backward")
FUSED = {  # have kernels inside `fused_kernels(True)`
    "gumbel_softmax", "gumbel_softmax_hard", "straight_through_categorical", "decoupled_gumbel_softmax",
    "gapped_straight_through", "reinmax", "gumbel_rao", "reinmax_rao", "gumbel_top_k", "relaxed_top_k",
}  # fmt: skip
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
AHEAD = ("copy-start", "copy-done", "slice-start", "slice-done")
COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, **{f"{kind}{8 * n}": n for kind in "suf" for n in (1, 2, 4, 8)}}


def text_of(fields):
    """A record in the text format of protocol buffers."""
    shown = lambda value: f"{{ {text_of(value)} }}" if isinstance(value, dict) else json.dumps(value)
    return " ".join(f"{name}: {shown(value)}" for name, value in fields.items())


def devices(kind, number):
    if kind == "gpu":
        described = {"target_config": text_of(H100), "topology": f"1x1x{number}"}
        return topologies.get_topology_desc(platform="cuda", **described).devices
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:number]


# --- bytes and kernels of a compiled program ------------------------------------------------------


def size(shape):
    """The bytes of an array, or of all arrays of a tuple, from its shape in the text of a program."""
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays)


INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<what>[\w-]+)\((?P<rest>.*)"
)


def kernels(program):
    """For each instruction with a cost: its name, how often it runs, the bytes it reads and writes."""
    bodies, body, entry = {}, None, None
    for line in program.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if opened:
            body = bodies.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif body is not None and (found := INSTRUCTION.match(line)):
            body.append((found, line))

    def visit(name, times):
        sizes = {}
        for found, line in bodies[name]:
            sizes[found["name"]] = size(found["shape"])
            if found["what"] == "while":
                turns = re.search(r"known_trip_count\D*(\d+)", line)
                yield from visit(
                    re.search(r"body=%?([\w.-]+)", line)[1], times * int(turns[1] if turns else 1)
                )
            elif found["what"] in ("call", "conditional"):
                called = re.findall(r"(?:to_apply=|_computation=|branch_computations=\{)%?([\w.-]+)", line)
                for one in called:
                    yield from visit(one, times)
            elif found["what"] not in FREE and not found["what"].startswith(AHEAD):
                read = sum(sizes.get(x, 0) for x in re.findall(r"%([\w.-]+)", found["rest"].split("), ")[0]))
                yield found["name"], times, read, sizes[found["name"]]

    return list(visit(entry, 1))


def compiled(draw, shape, dtype, backward, mesh, spec, way="jit"):
    """The program of a draw, or of a draw and the gradient of a weighted sum of its values."""
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    logits = jax.ShapeDtypeStruct(shape, dtype)
    weights = jax.eval_shape(draw, jax.random.key(0), logits)
    key = place(jax.ShapeDtypeStruct((2,), jnp.uint32), PartitionSpec())

    def both(key, logits, weights):
        value, pull = jax.vjp(lambda logits: draw(jax.random.wrap_key_data(key), logits), logits)
        return (value, *pull(weights)) if backward else value

    if way == "shard_map":
        both = jax.shard_map(both, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec)
    given = [place(logits, spec), place(weights, spec)] if backward else [place(logits, spec), weights]
    with jax.set_mesh(mesh) if way == "explicit" else contextlib.nullcontext():
        return jax.jit(both, keep_unused=False).lower(key, *given).compile()


def measured(kind, draw, shape, dtype, backward):
    mesh = Mesh(np.array(devices(kind, 1)), "x", axis_types=(AxisType.Auto,))
    program = compiled(draw, shape, dtype, backward, mesh, PartitionSpec())
    found, unit = kernels(program.as_text()), math.prod(shape) * jnp.dtype(dtype).itemsize
    return {
        "arrays": round(sum(times * (read + written) for _, times, read, written in found) / unit, 3),
        "kernels": sum(times for _, times, _, _ in found),
        "temporaries": round(program.memory_analysis().temp_size_in_bytes / unit, 2),
    }


def collectives(kind, draw, shape, dtype, way):
    """Which collectives the program of both passes has on several devices, with the batch sharded."""
    axis_type = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = Mesh(np.array(devices(kind, SHARDED[kind])), "x", axis_types=(axis_type,))
    program = compiled(draw, shape, dtype, True, mesh, PartitionSpec("x"), way)
    return sorted(set(COLLECTIVE.findall(program.as_text())))


def shape_of(name, kind):
    batch = ROWS_OF_LOGITS[kind] // SMALLER.get(name, 1)
    return (4096, 64, 64) if name == "gumbel_sinkhorn" else (batch, *SHAPES.get(name, (512,)))


def of_row(name, kind, dtype):
    shape, row = shape_of(name, kind), ROWS[name]
    found = {"shape": shape}
    found["collectives"] = {way: collectives(kind, row.ours, shape, dtype, way) for way in WAYS}
    for title in PASSES:
        ours, hand = (measured(kind, f, shape, dtype, title != PASSES[0]) for f in (row.ours, row.by_hand))
        found[title] = {
            "ours": ours,
            "hand-written": hand,
            "ratio": round(ours["arrays"] / hand["arrays"], 3),
        }
        if name in FUSED:
            with rj.fused_kernels(True):
                fused = measured(kind, row.ours, shape, dtype, title != PASSES[0])
            found[title] |= {"fused": fused, "fused ratio": round(fused["arrays"] / hand["arrays"], 3)}
    return found


# --- picture and command line ---------------------------------------------------------------------


def picture(results):
    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 7.5), layout="constrained",
                                squeeze=False)  # fmt: skip
    names = [name for name in ROWS if any(name in rows for rows in results.values())][::-1]
    for axis, (title, rows) in zip(axes[0], results.items(), strict=True):
        for offset, which, colour in ((0.2, PASSES[0], "tab:blue"), (-0.2, PASSES[1], "tab:orange")):
            ratios = [rows[name][which]["ratio"] if name in rows else np.nan for name in names]
            axis.barh(np.arange(len(names)) + offset, ratios, 0.4, label=which, color=colour)
        axis.axvline(1, color="k", linewidth=1)
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [])
        axis.set_ylim(-0.8, len(names) - 0.2)
        axis.set(xscale="log", title=title, xlabel="bytes, to hand-written JAX")
        axis.set_xticks([0.1, 0.5, 1, 2], ["0.1", "0.5", "1", "2"], minor=False)
        axis.minorticks_off()
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].legend(loc="upper center", bbox_to_anchor=(0.3, -0.08), ncols=2, frameon=False)
    return figure


@click.command(help=__doc__)
@click.argument("kind", type=click.Choice(tuple(NAMES)))
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), default="float32", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(tuple(ROWS)), metavar="NAME",
              help="Sampler to measure; may be given more than once.  [default: all]")  # fmt: skip
@out_option
def main(kind, dtype, only, out):
    try:
        devices(kind, SHARDED[kind])
    except Exception as error:  # any error of a missing compiler
        raise click.ClickException(f"no compiler for {NAMES[kind]}: see --help ({error})") from error
    path, title = (out or RESULTS) / "accelerators.json", f"{NAMES[kind]}, {dtype}"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    rows = results.setdefault(title, {})
    try:
        for name in tqdm(only or ROWS, unit="sampler"):
            rows[name] = found = of_row(name, kind, jnp.dtype(dtype))
            for which in PASSES:
                ours, hand = found[which]["ours"], found[which]["hand-written"]
                tqdm.write(
                    f"{name}, {which}: {ours['arrays']:.2f} arrays, hand-written {hand['arrays']:.2f} "
                    f"({found[which]['ratio']:.2f}), kernels {ours['kernels']} to {hand['kernels']}"
                )
                if name in FUSED:
                    fused = found[which]["fused"]
                    tqdm.write(
                        f"{name}, {which}, fused: {fused['arrays']:.2f} arrays, kernels {fused['kernels']}"
                    )
            for way, held in found["collectives"].items():
                if held:
                    tqdm.write(f"{name}, sharded by {way}: {', '.join(held)}")
    finally:  # keep the measured rows when a later one fails
        results[title] = {name: rows[name] for name in ROWS if name in rows}
        if rows:
            write("accelerators", {"results": results}, out, picture(results))


if __name__ == "__main__":
    main()
