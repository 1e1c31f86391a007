"""How often a rare class of two wins with Gumbel noise of each dtype: python tools/frequencies.py

It counts argmax(logits + jax.random.gumbel(key, shape, dtype, mode=mode)), and gumbel_softmax with hard=True.
Its output for JAX 0.10 and 0.12 is in docs/outputs.
"""

import functools

import click
import jax
import jax.numpy as jnp

import relaxit_jax as rj
from versions import sentence, versions

BLOCK = 2**21  # draws at once
LOGITS = (-7.0, -10.0, -13.0)  # numbers that every dtype represents
WAYS = {"JAX, mode low": "low", "JAX, mode high": "high", "relaxit_jax": None}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def wins(mode, dtype, blocks, logit, key):
    logits = jnp.array([0, logit], dtype)

    def count(key):
        if mode is None:
            return jnp.sum(rj.gumbel_softmax(key, logits, 1.0, shape=(BLOCK,), hard=True)[:, 1] > 0)
        noise = jax.random.gumbel(key, (BLOCK, 2), dtype, mode=mode)
        return jnp.sum(jnp.argmax(logits + noise, -1) == 1)

    return jnp.sum(jax.lax.map(count, jax.random.split(key, blocks)))


@click.command(help=__doc__)
@click.option(
    "--blocks", default=64, show_default=True, help="Number of blocks of two million draws for every figure."
)
def main(blocks):
    n, p = blocks * BLOCK, [float(jax.nn.sigmoid(logit)) for logit in LOGITS]
    click.echo(f"{n:,} draws each")
    click.echo(f"{'probability':32}" + "".join(f"{x:>11.2e}" for x in p))
    click.echo(f"{'standard error':32}" + "".join(f"{(x / n) ** 0.5:>11.1e}" for x in p))
    for dtype in ("bfloat16", "float16", "float32"):
        for name, mode in WAYS.items():
            hits = [int(wins(mode, dtype, blocks, logit, jax.random.key(0))) for logit in LOGITS]
            click.echo(f"{dtype:10}{name:22}" + "".join(f"{x / n:>11.2e}" for x in hits))
    click.echo(sentence(versions()))


if __name__ == "__main__":
    main()
