"""Peak memory of the value and gradient of every sampler and estimator, from XLA's own analysis.

The peak is the most that the compiled program holds: arguments, results and temporaries. It is given in
units of one sample, next to the peak of hand-written JAX (for estimators, of straight-through bits through
the same decoder). Then it shows how the peak grows with Monte Carlo samples, classes and k, as the exponent
of a power, next to the exponent that the docstring admits. Nothing runs, so nothing here is noisy.

Writes results/memory.json and results/memory.png.
"""

import functools
import math

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import relaxit_jax as rj
from records import out_option, write
from relaxit_jax import estimators as es
from rows import ROWS, TAU, size_name, straight_through_bernoulli

KEY = jax.random.key(0)
BATCH, BITS, HIDDEN, PIXELS = 128, 20, 400, 784


def peak(f, *arguments):
    """Bytes that the compiled program of f holds at most."""
    return peak_of(jax.jit(f).lower(*arguments).compile())


def peak_of(program):
    found = program.memory_analysis()
    whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return whole - found.alias_size_in_bytes


def array(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def of_draw(draw, shape):
    """Peak bytes of the value and gradient of a weighted sum of a draw's values, and of the draw."""
    out = jax.eval_shape(draw, KEY, array(shape))
    loss = lambda l, key, weights: jnp.sum(weights * draw(key, l))
    return peak(jax.value_and_grad(loss), array(shape), KEY, out), math.prod(out.shape) * out.dtype.itemsize


# --- estimators, through the decoder of a VAE -----------------------------------------------------


def decoder(weights, b):
    """Log-likelihood of images given their bits, one value for each."""
    logits = jax.nn.relu(b @ weights["first"]) @ weights["second"]
    return jnp.sum(weights["x"] * logits - jax.nn.softplus(logits), -1)


def control(f, q):
    return lambda z: 0.5 * f(q.relaxed(z, TAU))


ESTIMATORS = {
    "reinforce": es.reinforce,
    "rloo": es.rloo,
    "rloo, 8 draws": functools.partial(es.rloo, num_samples=8),
    "arm": es.arm,
    "disarm": es.disarm,
    "rebar": functools.partial(es.rebar, tau=TAU, eta=1.0),
    "relax": lambda key, f, q: es.relax(key, f, q, control_variate=control(f, q)),
    "exact": lambda key, f, q: es.exact(f, q),
}


def of_estimator(estimate, bits=BITS):
    """The same for an estimate, with the gradient of the decoder's weights as well."""
    q = array((BATCH, bits))
    weights = {
        "first": array((bits, HIDDEN)), "second": array((HIDDEN, PIXELS)), "x": array((BATCH, PIXELS)),
    }  # fmt: skip

    def loss(logits, weights, key):
        return jnp.mean(estimate(key, functools.partial(decoder, weights), es.Bernoulli(logits)))

    return peak(jax.value_and_grad(loss, (0, 1)), q, weights, KEY), 4 * BATCH * bits


def by_hand(key, f, q):
    return f(straight_through_bernoulli(key, q.logits))


# --- what it grows with ---------------------------------------------------------------------------


def classes_of(name):
    """A function from K to the peak bytes, for 8 events with K classes each."""
    return lambda n: of_draw(ROWS[name].ours, (8, n))[0]


def k_of(draw, n=4096):
    return lambda k: of_draw(lambda key, l: draw(key, l, k), (8, n))[0]


def log_prob_of(law, n=4096):
    """A function from k to the peak bytes of the log-probability of 8 subsets and its gradient."""

    def bytes_of(k):
        value = array((8, k), jnp.int32) if law is not rj.simple_top_k_log_prob else array((8, n))
        call = (lambda l, v: law(v, l, k)) if law is rj.simple_top_k_log_prob else (lambda l, v: law(v, l))
        return peak(jax.value_and_grad(lambda l, v: jnp.sum(call(l, v))), array((8, n)), value)

    return bytes_of


set_log_prob = functools.partial(rj.gumbel_top_k_log_prob, ordered=False)
CLASS_COUNTS, SUBSET_SIZES, DRAWS = (4096, 8192, 16384), (32, 64, 128), (64, 128, 256)
QUADRATIC = ("correlated_bernoulli", "logistic_normal_full")  # in the factor that is passed to them
GROWTH = {  # (knob, its values, from a value to bytes, the exponent that the docstring admits)
    **{name: ("classes", CLASS_COUNTS, classes_of(name), 1)
       for name in ROWS if name not in (*QUADRATIC, "gumbel_sinkhorn", "relaxed_permutation")},
    **{f"{name}, scale_tril": ("classes", (256, 512, 1024), classes_of(name), 2) for name in QUADRATIC},
    "gumbel_sinkhorn": (
        "places", (64, 128, 256), lambda n: of_draw(ROWS["gumbel_sinkhorn"].ours, (8, n, n))[0], 2
    ),
    "relaxed_permutation": ("items", (64, 128, 256), classes_of("relaxed_permutation"), 2),
    "gumbel_rao, num_samples": (
        "samples", DRAWS, lambda s: of_draw(lambda k, l: rj.gumbel_rao(k, l, TAU, s), (64, 128))[0], 0
    ),
    "reinmax_rao, num_samples": (
        "samples", DRAWS, lambda s: of_draw(lambda k, l: rj.reinmax_rao(k, l, TAU, s), (64, 128))[0], 0
    ),
    "gumbel_top_k, k": ("k", SUBSET_SIZES, k_of(lambda key, l, k: rj.gumbel_top_k(key, l, k)[1]), 0),
    "relaxed_top_k, k": ("k", SUBSET_SIZES, k_of(lambda key, l, k: rj.relaxed_top_k(key, l, k, TAU)), 1),
    "simple_top_k, k": ("k", SUBSET_SIZES, k_of(rj.simple_top_k), 1),
    "gumbel_top_k_log_prob, ordered": ("k", SUBSET_SIZES, log_prob_of(rj.gumbel_top_k_log_prob), 0),
    "gumbel_top_k_log_prob, as a set": ("k", SUBSET_SIZES, log_prob_of(set_log_prob), 1),
    "simple_top_k_log_prob": ("k", SUBSET_SIZES, log_prob_of(rj.simple_top_k_log_prob), 1),
    "rloo, num_samples": (
        "draws", (16, 32, 64), lambda s: of_estimator(functools.partial(es.rloo, num_samples=s))[0], 1
    ),
    "exact, outcomes": ("bits", (12, 14, 16), lambda n: of_estimator(ESTIMATORS["exact"], n)[0], 0),
}  # fmt: skip


def exponent(values, numbers):
    """The power with which the last step grows; 0 if it does not grow."""
    return math.log(numbers[-1] / numbers[-2]) / math.log(values[-1] / values[-2])


def growth(name):
    knob, values, bytes_of, admitted = GROWTH[name]
    found = [bytes_of(v) for v in values]
    # outcomes double with each bit
    scale = [2**v for v in values] if knob == "bits" else values
    return {
        "knob": knob, "values": values, "megabytes": [round(b / 1e6, 3) for b in found],
        "exponent": round(exponent(scale, found), 3), "admitted": admitted,
    }  # fmt: skip


def picture(samplers, estimators, grown):
    figure, axes = plt.subplots(1, 3, figsize=(15, 7.5), layout="constrained")
    for axis, table, title in zip(axes[:2], (samplers, estimators), ("samplers", "estimators"), strict=True):
        names = list(table)[::-1]
        for offset, column, colour in ((0.2, "ours", "tab:blue"), (-0.2, "by hand", "tab:gray")):
            y = np.arange(len(names)) + offset
            axis.barh(y, [table[n][column] for n in names], 0.4, label=column, color=colour)
        axis.set_yticks(range(len(names)), names)
        axis.set(xscale="log", xlabel="peak memory of value and gradient, in samples", title=title)
        axis.grid(axis="x", alpha=0.3)
    axis, names = axes[2], list(grown)[::-1]
    axis.scatter([grown[n]["exponent"] for n in names], range(len(names)), zorder=3, label="measured")
    axis.scatter([grown[n]["admitted"] for n in names], range(len(names)), marker="|", s=160,
                 color="tab:red", label="admitted by the docstring")  # fmt: skip
    axis.set_yticks(range(len(names)), [f"{n} ({grown[n]['knob']})" for n in names], fontsize=8)
    axis.set(xlabel="exponent of its growth", title="what it grows with")
    axis.grid(axis="x", alpha=0.3)
    for axis in axes[[0, 2]]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.3, -0.08), ncols=2, frameon=False)
    return figure


@click.command(help=__doc__)
@out_option
def main(out):
    samplers, estimators, grown = {}, {}, {}
    with tqdm(total=len(ROWS) + len(ESTIMATORS) + len(GROWTH), unit="program") as bar:
        for name, row in ROWS.items():
            shape = row.sizes[1]
            (ours, sample), (other, _) = of_draw(row.ours, shape), of_draw(row.by_hand, shape)
            samplers[name] = {
                "size": size_name(shape), "sample_bytes": sample, "ours": round(ours / sample, 2),
                "by hand": round(other / sample, 2), "ratio": round(ours / other, 3),
            }  # fmt: skip
            bar.update()
        other = of_estimator(by_hand)[0]
        for name, estimate in ESTIMATORS.items():
            ours, sample = of_estimator(estimate, bits := 10 if name == "exact" else BITS)
            hand_bytes = other if bits == BITS else of_estimator(by_hand, bits)[0]
            estimators[name] = {
                "size": size_name((BATCH, bits)), "sample_bytes": sample, "ours": round(ours / sample, 1),
                "by hand": round(hand_bytes / sample, 1), "ratio": round(ours / hand_bytes, 3),
            }  # fmt: skip
            bar.update()
        for name in GROWTH:
            grown[name] = growth(name)
            bar.update()
    for table in (samplers, estimators):
        for name, row in table.items():
            click.echo(f"{name:34} {row['ours']:8.2f} samples, by hand {row['by hand']:8.2f}")
    for name, row in grown.items():
        over = "  MORE THAN ADMITTED" if row["exponent"] > row["admitted"] + 0.1 else ""
        click.echo(f"{name:34} {row['knob']}^{row['exponent']:.2f}, admitted {row['admitted']}{over}")
    content = {"samplers": samplers, "estimators": estimators, "growth": grown}
    write("memory", content, out, picture(samplers, estimators, grown))


if __name__ == "__main__":
    main()
