"""Quantizers compared with PyTorch's vector-quantize-pytorch: results, then the time of a training step.

Both get the same vectors, codes and cotangents, in float32. First every result is compared: how many vectors
have different indices, and the largest difference of values, losses, gradients and codes after a step,
relative to the largest number. Then both run in one process in turns; a ratio is the time of this library
over the time of PyTorch's, the median over the turns with its quartiles. PyTorch is eager, on one thread or
on all cores, whichever is faster: its threads wait for each other, for a long time if other work has their
cores. Goal: at most 0.5.

Four definitions differ, so these are compared:

- `VectorQuantize` has one loss, a mean over the batch. If codes are trained by gradient, it has the value of
  one of our losses and the gradient of their sum. With moving averages it is `commitment_loss`.
- `ResidualVQ` has such a loss for each stage; their sum is ours. Its value is a sum of straight-through
  values, each with a gradient in the input: with 4 stages the gradient is 4 times ours, which is the
  gradient at the sum of codes. It rotates once for each stage, ours once to the sum: not compared.
- `LFQ` uses the first number of a vector as the highest bit of the index, ours as the lowest: we pass the
  vector reversed.
- The entropy loss of `LFQ` has the entropy of the mean over all 2^d codes, ours the sum over bits. They are
  equal if bits are independent over the batch: there they are compared.

Writes results/quantizers.json and a table to the terminal, and takes some minutes.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import os
from collections.abc import Callable

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import peers
from records import out_option, write
from relaxit_jax import quantizers as qz
from rows import size_name
from timing import interleaved, milliseconds, ratio

GOAL = 0.5
SIZES = (4096, 64, 1024), (16_384, 32, 256)  # number of vectors, their dimension, number of codes
STAGES = 4
LEVELS = (8, 5, 5, 5)
BITS = 10
DECAY = 0.8
TAU = 2.0  # for the entropy loss: on the grid, probabilities stay above 1e-5, where LFQ clamps them
PASSES = "forward", "forward + backward"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same method twice. A step gets the weights of value and loss in the function it differentiates."""

    forward: Callable
    step: Callable
    forward_torch: Callable
    step_torch: Callable
    reset: Callable  # PyTorch's module to the codes of the start


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def on_both(torch, *arrays):
    """JAX's arrays, and PyTorch's: a batch with one sequence of vectors, and the rest unchanged."""
    return [jnp.asarray(a) for a in arrays], [torch.from_numpy(a.copy()) for a in arrays]


def vector_quantize(torch, vq, size, gradient, averages):
    """One codebook, whose codes are trained by gradient or follow moving averages."""
    n, d, codes = size
    (x, codebook, w), (tx, tcodebook, tw) = on_both(
        torch, normal(0, n, d), normal(1, codes, d), normal(2, n, d)
    )
    state = qz.codebook_state(codebook)

    def objective(x, codebook, of_value, of_loss):
        q = qz.vector_quantize(x, codebook, gradient=gradient)
        loss = jnp.mean(q.commitment_loss if averages else q.codebook_loss + q.commitment_loss)
        return of_value * jnp.sum(w * q.value) + of_loss * loss, q

    @jax.jit
    def both(x, state, of_value, of_loss):
        (g, h), q = jax.grad(objective, (0, 1), has_aux=True)(x, state.codebook, of_value, of_loss)
        found = {"value": q.value, "index": q.index, "loss": jnp.mean(q.commitment_loss), "gradient in x": g}
        if averages:
            found["codes after the step"] = qz.update_codebook(state, x, q.index, DECAY).codebook
        else:
            found["gradient in the codes"] = h
        return found

    @jax.jit
    def forward(x, codebook):
        q = qz.vector_quantize(x, codebook)
        return q.value, q.index

    module = vq.VectorQuantize(
        d, codes, decay=DECAY, rotation_trick=gradient == "rotation", ema_update=averages,
        learnable_codebook=not averages,
    )  # fmt: skip
    start = {"_codebook.embed": tcodebook[None], "_codebook.embed_avg": tcodebook[None],
             "_codebook.cluster_size": torch.ones(1, codes)}  # fmt: skip
    tx, tw = tx[None].requires_grad_(), tw[None]

    def both_torch(of_value, of_loss):
        module.train()
        tx.grad = None
        module.zero_grad()
        value, index, loss = module(tx)
        (of_value * (tw * value).sum() + of_loss * loss).backward()
        found = {"value": value, "index": index, "loss": loss, "gradient in x": tx.grad}
        if averages:
            return found | {"codes after the step": module.codebook}
        return found | {"gradient in the codes": module._codebook.embed.grad}

    return Pair(
        functools.partial(forward, x, codebook), functools.partial(both, x, state),
        eager(torch, module, tx), both_torch, lambda: module.load_state_dict(start, strict=False),
    )  # fmt: skip


def residual_quantize(torch, vq, size):
    """Four stages, whose codes are trained by gradient; the gradient passes straight through."""
    n, d, codes = size
    scales = 2.0 ** -np.arange(STAGES, dtype=np.float32)[:, None, None]
    (x, codebooks, w), (tx, tcodebooks, tw) = on_both(
        torch, normal(0, n, d), scales * normal(1, STAGES, codes, d), normal(2, n, d)
    )

    def objective(x, codebooks, of_value, of_loss):
        q = qz.residual_quantize(x, codebooks)
        loss = jnp.mean(q.codebook_loss + q.commitment_loss)
        return of_value * jnp.sum(w * q.value) + of_loss * loss, q

    @jax.jit
    def both(x, codebooks, of_value, of_loss):
        (g, h), q = jax.grad(objective, (0, 1), has_aux=True)(x, codebooks, of_value, of_loss)
        return {"value": q.value, "index": q.index, "loss": jnp.mean(q.commitment_loss),
                "gradient in x": g, "gradient in the codes": h}  # fmt: skip

    @jax.jit
    def forward(x, codebooks):
        q = qz.residual_quantize(x, codebooks)
        return q.value, q.index

    module = vq.ResidualVQ(
        dim=d, num_quantizers=STAGES, codebook_size=codes, rotation_trick=False, ema_update=False,
        learnable_codebook=True,
    )  # fmt: skip
    start = {f"layers.{i}._codebook.embed": tcodebooks[i][None] for i in range(STAGES)}
    tx, tw = tx[None].requires_grad_(), tw[None]

    def both_torch(of_value, of_loss):
        module.train()
        tx.grad = None
        module.zero_grad()
        value, index, losses = module(tx)
        (of_value / STAGES * (tw * value).sum() + of_loss * losses.sum()).backward()
        return {"value": value, "index": index, "loss": losses.sum(), "gradient in x": tx.grad,
                "gradient in the codes": torch.stack([p.grad for p in module.parameters()])}  # fmt: skip

    return Pair(
        functools.partial(forward, x, codebooks), functools.partial(both, x, codebooks),
        eager(torch, module, tx), both_torch, lambda: module.load_state_dict(start, strict=False),
    )  # fmt: skip


def finite_scalar_quantize(torch, vq, size):
    n, d = size
    (x, w), (tx, tw) = on_both(torch, 2 * normal(0, n, d), normal(1, n, d))
    return without_codebook(
        torch, vq.FSQ(list(LEVELS)), x, w, tx, tw, lambda x: (*qz.finite_scalar_quantize(x, LEVELS), 0.0)
    )


def lookup_free_quantize(torch, vq, size, x=None):
    n, d = size
    x = normal(0, n, d) if x is None else x
    (x, w), (tx, tw) = on_both(torch, x, normal(1, *x.shape))

    def ours(x):
        value, index = qz.lookup_free_quantize(x[:, ::-1])
        return value[:, ::-1], index, 0.1 * qz.lookup_free_entropy(x, TAU)

    module = vq.LFQ(dim=d, entropy_loss_weight=0.1)
    return without_codebook(torch, module, x, w, tx, tw, ours, inv_temperature=1 / TAU)


def without_codebook(torch, module, x, w, tx, tw, quantize, **options):
    def objective(x, of_value, of_loss):
        value, index, loss = quantize(x)
        return of_value * jnp.sum(w * value) + of_loss * loss, (value, index, loss)

    @jax.jit
    def both(x, of_value, of_loss):
        g, (value, index, loss) = jax.grad(objective, has_aux=True)(x, of_value, of_loss)
        return {"value": value, "index": index, "loss": loss, "gradient in x": g}

    forward = jax.jit(lambda x: quantize(x)[:2])
    tx, tw = tx[None].requires_grad_(), tw[None]

    def both_torch(of_value, of_loss):
        module.train()
        tx.grad = None
        value, index, *loss = module(tx, **options)
        total = of_value * (tw * value).sum()
        (total + of_loss * loss[0] if loss else total).backward()
        return {"value": value, "index": index, "loss": loss[0] if loss else 0.0, "gradient in x": tx.grad}

    return Pair(
        functools.partial(forward, x), functools.partial(both, x),
        eager(torch, module, tx), both_torch, lambda: None,
    )  # fmt: skip


def eager(torch, module, x):
    """Vectors become tokens as after training: the module in eval mode, without gradients."""

    def forward():
        module.eval()
        with torch.no_grad():
            return module(x)[:2]

    return forward


def grid(d=5, levels=(-0.7, -0.2, 0.3, 0.9)):
    """Vectors whose bits are independent: every combination of a few numbers."""
    return np.array(list(itertools.product(levels, repeat=d)), np.float32)


def methods():
    """{name: [(size, function that makes the pair)]}."""
    found = {}
    for name, gradient, averages in (
        ("vector_quantize, straight-through", "straight_through", False),
        ("vector_quantize, rotation", "rotation", False),
        ("vector_quantize, rotation, moving averages", "rotation", True),
    ):
        make = functools.partial(vector_quantize, gradient=gradient, averages=averages)
        found[name] = [(size, make) for size in SIZES]
    found["residual_quantize, 4 stages"] = [(size, residual_quantize) for size in SIZES]
    found["finite_scalar_quantize"] = [((16_384, len(LEVELS)), finite_scalar_quantize)]
    found["lookup_free_quantize, entropy"] = [((4096, BITS), lookup_free_quantize)]
    return found


def array(x):
    return np.asarray(x.detach() if hasattr(x, "detach") else x).astype(np.float64)


def agreement(pair):
    """How many vectors have different indices, and the largest relative difference of the others.

    The gradients of value and loss are compared separately, because the gradient of a mean is small.
    """
    found = {}
    for what, weights in (("value", (1.0, 0.0)), ("loss", (0.0, 1.0))):
        pair.reset()
        ours, theirs = pair.step(*weights), pair.step_torch(*weights)
        ours = {name: array(x) for name, x in ours.items()}
        theirs = {name: array(x).reshape(ours[name].shape) for name, x in theirs.items()}
        same = (ours["index"] == theirs["index"]).reshape(len(ours["value"]), -1).all(-1)
        found["vectors with another index"] = int((~same).sum())
        for name in ours.keys() - {"index"}:
            a, b = ours[name], theirs[name]
            if name in ("value", "gradient in x"):
                a, b = a[same], b[same]
            of = f"{name}, of the {what}" if name.startswith("gradient") else name
            found[of] = float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))
    return dict(sorted(found.items()))


def on_threads(torch, threads, f):
    def run():
        torch.set_num_threads(threads)
        return f()

    return run


def measure(make, torch, vq, size, rounds, budget):
    pair = make(torch, vq, size)
    # the entropies are equal only on a grid
    compared = make(torch, vq, grid().shape, grid()) if make is lookup_free_quantize else pair
    result = {"agreement": agreement(compared)}
    step = functools.partial(pair.step, jnp.float32(1), jnp.float32(1))
    step_torch = functools.partial(pair.step_torch, 1.0, 1.0)
    cores = len(os.sched_getaffinity(0))
    for which, ours, theirs in zip(
        PASSES, (pair.forward, step), (pair.forward_torch, step_torch), strict=True
    ):
        functions = {"ours": ours}
        for threads in sorted({1, cores}):
            functions[f"PyTorch, threads: {threads}"] = on_threads(torch, threads, theirs)
        seconds = interleaved(functions, rounds, budget=budget)
        faster = min(list(seconds)[1:], key=lambda name: np.median(seconds[name]))
        result[which] = {
            "milliseconds": {whom: milliseconds(x) for whom, x in seconds.items()},
            "to PyTorch": ratio(seconds, "ours", faster),
        }
    return result


def summary(table):
    """How many of the ratios meet the goal, and the others, the worst first."""
    ratios = [
        (result[which]["to PyTorch"]["ratio"], " / ".join((name, size, which)))
        for name, sizes in table.items()
        for size, result in sizes.items()
        for which in PASSES
    ]
    missed = sorted((r for r in ratios if r[0] > GOAL), reverse=True)
    return {"goal": GOAL, "met": len(ratios) - len(missed), "of": len(ratios),
            "missed": {what: r for r, what in missed}}  # fmt: skip


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=5), default=30, help="Number of turns of each comparison.")
@click.option(
    "--budget", type=click.FloatRange(min=0.1), default=20.0, help="Approximate seconds for a comparison."
)
@click.option("--only", multiple=True, type=click.Choice(list(methods())), metavar="NAME",
              help="Run only this method; may be repeated. Nothing is written without --out.")  # fmt: skip
@out_option
def main(rounds, budget, only, out):
    vq = peers.load("vector_quantize_pytorch")
    if vq is None:
        return
    _, version = peers.of_torch()  # it uses all cores
    import torch

    table = {}
    work = [(name, *row) for name in only or methods() for row in methods()[name]]
    for name, size, make in tqdm(work, unit="size"):
        result = measure(make, torch, vq, size, rounds, budget)
        table.setdefault(name, {})[size_name(size)] = result
        jax.clear_caches()
        ratios = {which: result[which]["to PyTorch"]["ratio"] for which in PASSES}
        tqdm.write(f"{name:44} {size_name(size):18} {ratios}")
        tqdm.write(", ".join(f"{what} {found:.2g}" for what, found in result["agreement"].items() if found))
    goal = summary(table)
    click.echo(f"{goal['met']} of {goal['of']} at most {GOAL}; missed: {goal['missed']}")
    if out or not only:
        versions = {
            "PyTorch": version,
            "vector-quantize-pytorch": importlib.metadata.version("vector-quantize-pytorch"),
        }
        write("quantizers", {"goal": goal, "peers": versions, "rows": table}, out)


if __name__ == "__main__":
    main()
