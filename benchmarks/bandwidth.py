"""Forward and backward pass of a sampler as a share of the memory bandwidth.

Logits and cotangent must be read, and draw and gradient must be written: four arrays must move, whatever else
the program does. The share is their bytes over the seconds of a pass, divided by the bytes per second of a
copy of a large array, which runs in turns with it. On an accelerator the aim is above 60 %; on a CPU
arithmetic decides.

Writes results/bandwidth.json and results/bandwidth.png, and takes a minute.
"""

import functools

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from records import out_option, write
from rows import ROWS, logits_of, size_name
from speed import jax_pass
from timing import interleaved, milliseconds

AIM = 0.6
NAMES = (
    "gumbel_softmax",
    "gumbel_softmax_hard",
    "relaxed_bernoulli",
    "straight_through_categorical",
    "reinmax",
)


def measure(name, shape, dtype, copied, rounds, budget):
    """Milliseconds of a pass of this library and of hand-written JAX, and the share of each."""
    row, logits = ROWS[name], logits_of(shape, dtype)
    weights = logits_of(shape, dtype, seed=1)
    seconds = interleaved(
        {
            "ours": jax_pass(row.ours, logits, weights, backward=True),
            "hand-written JAX": jax_pass(row.by_hand, logits, weights, backward=True),
            "a copy": functools.partial(jax.jit(lambda x: x + 1), copied),
        },
        rounds,
        budget=budget,
    )
    limit = 2 * copied.nbytes / np.median(seconds["a copy"])  # bytes per second
    result = {"copy, gigabytes a second": round(limit / 1e9, 1)}
    for whom in ("ours", "hand-written JAX"):
        share = 4 * logits.nbytes / np.median(seconds[whom]) / limit
        result[whom] = {"milliseconds": milliseconds(seconds[whom]), "share": round(float(share), 3)}
    return result


def picture(table):
    labels = [f"{name}, {size}, {dtype}" for name, sizes in table.items()
              for size, dtypes in sizes.items() for dtype in dtypes]  # fmt: skip
    results = [result for sizes in table.values() for dtypes in sizes.values() for result in dtypes.values()]
    figure, axis = plt.subplots(figsize=(10, 0.34 * len(labels) + 1.6), layout="constrained")
    places = np.arange(len(labels))[::-1]
    for whom, shift, colour in (("ours", 0.2, "tab:blue"), ("hand-written JAX", -0.2, "tab:gray")):
        axis.barh(places + shift, [r[whom]["share"] for r in results], 0.4, label=whom, color=colour)
    axis.axvline(AIM, color="tab:red", ls=":", label="aim, on an accelerator")
    axis.set_yticks(places, labels)
    axis.set(xlabel="bytes that must move / time, as a share of the bandwidth of a copy")
    axis.set_title(f"Forward and backward pass on {jax.devices()[0].device_kind}")
    axis.legend()
    return figure


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--batch",
    multiple=True,
    type=click.IntRange(min=1),
    default=(64, 4096),
    help="Number of rows; may be repeated.",
)
@click.option("--classes", type=click.IntRange(min=2), default=32_768, help="Length of a row.")
@click.option("--copy-megabytes", type=click.FloatRange(min=0.1), default=512.0,
              help="Size of the array whose copy sets the limit, larger than the caches.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=5), default=30, help="Number of turns of each comparison.")
@click.option(
    "--budget", type=click.FloatRange(min=0.1), default=5.0, help="Approximate seconds for a comparison."
)
@out_option
def main(batch, classes, copy_megabytes, rounds, budget, out):
    copied, table = jnp.zeros(int(copy_megabytes * 2**18), jnp.float32), {}
    work = [(name, (n, classes), dtype) for name in NAMES for n in batch for dtype in ("float32", "bfloat16")]
    for name, shape, dtype in tqdm(work, unit="pass"):
        result = measure(name, shape, dtype, copied, rounds, budget)
        table.setdefault(name, {}).setdefault(size_name(shape), {})[dtype] = result
        jax.clear_caches()
        shares = ", ".join(f"{whom} {result[whom]['share']:.1%}" for whom in ("ours", "hand-written JAX"))
        tqdm.write(f"{name:30} {size_name(shape):14} {dtype:8} {shares}")
    write("bandwidth", {"aim": AIM, "rows": table}, out, picture(table))


if __name__ == "__main__":
    main()
