"""`marginals`: the probabilities of the discrete sites of any guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers

from relaxit_jax import _arguments as arg
from relaxit_jax.handlers import _relaxation as rl
from relaxit_jax.handlers import _site as site
from relaxit_jax.handlers import _wrappers as wr
from relaxit_jax.handlers._autoregressive import Autoregressive


def marginals(
    guide: Callable[..., Any],
    params: Mapping[str, Array],
    *args: Any,
    num_samples: int = 1000,
    rng_key: Array | None = None,
    num_values: int | dict[str, int] | None = None,
    **kwargs: Any,
) -> dict[str, Array]:
    """Compute the marginal probabilities of the discrete latent sites of a guide.

    This is the mean, over draws of the guide, of the law of each site given the draws before it:
    ``q(z) = E q(z | sites before)``. It is exact for a site that depends on no other draw, and has less noise
    than frequencies for any other, such as the states of a chain in a `scan`.

    Args:
      guide: a guide, not relaxed. It may be hand-written.
      params: its trained parameters.
      args, kwargs: the arguments of the guide.
      num_samples: number of draws, at least 1.
      rng_key: key for the draws. Default: ``jax.random.key(0)``.
      num_values: how many values a count takes, as in `relax`.

    Returns:
      By name of the site: for bits the probability of a one, in the shape of the site; for others the
      probabilities of all values, on a last axis. For a subsampled plate, the elements that the guide draws.

    Raises:
      ValueError: for a guide that is relaxed, and for arguments that are not as above.

    References:
      D. M. Blei, A. Kucukelbir, J. D. McAuliffe (2017), Variational Inference: A Review for
      Statisticians, arXiv:1601.00670.

    >>> import numpyro, numpyro.distributions as dist
    >>> def guide():
    ...     a = numpyro.sample("a", dist.Bernoulli(0.5))
    ...     numpyro.sample("b", dist.Bernoulli(jnp.where(a == 1, 0.9, 0.1)))
    >>> print({name: f"{p:.1f}" for name, p in marginals(guide, {}).items()})
    {'a': '0.5', 'b': '0.5'}
    """
    arg.require(callable(guide), "guide", "a function", arg.shown(guide))
    arg.require(isinstance(params, Mapping), "params", "a dictionary from names to arrays", arg.shown(params))
    num_samples = arg.as_static_int("num_samples", num_samples, 1, 10_000_000)
    site.check_num_values(num_values)
    key = jax.random.key(0) if rng_key is None else rng_key
    arg.check_key(key, "rng_key")

    def laws(key):
        with handlers.block():
            trace = handlers.trace(handlers.substitute(handlers.seed(guide, key), dict(params))).get_trace(
                *args, **kwargs
            )
        sites = discrete_latents(trace)
        relaxed = [name for name, s in trace.items() if isinstance(wr.innermost(s.get("fn")), site.Relaxed)]
        arg.require(not relaxed, "guide", "one that is not relaxed", f"the relaxed sites {relaxed}")
        rl.check_names("num_values", num_values, sites)
        return {name: law_and_value(name, s, num_values)[0] for name, s in sites.items()}

    drawn = jax.lax.map(laws, jax.random.split(key, num_samples), batch_size=min(num_samples, 100))
    return {name: jnp.mean(p, 0) for name, p in drawn.items()}


def discrete_latents(trace):
    return {
        name: s
        for name, s in trace.items()
        if s["type"] == "sample" and not s["is_observed"] and wr.is_discrete(s["fn"])
    }


def law_and_value(name, message, num_values=None):
    """The law of a site given the draws before it, and its draw in the same form.

    For bits, both are the probability of a one; otherwise probabilities of all values on a last axis.
    """
    d, value = wr.innermost(message["fn"]), jnp.asarray(message["value"])
    if isinstance(d, Autoregressive):
        p, kind, weights = jnp.exp(d.log_pmf(value)), d.site.kind, d.site.weights(value)
    else:
        law = site.law_of(name, d, num_values)
        p, kind, size = jnp.exp(law.log_pmf), law.kind, law.log_pmf.shape[-1]
        low = 0 if law.values is None else int(law.values[0])
        # mass beyond the last value of a count is added to it
        weights = value if d.event_dim else jax.nn.one_hot(jnp.minimum(value - low, size - 1), size)
        p = jnp.broadcast_to(p, weights.shape)
    return (p[..., 1], weights[..., 1]) if kind == "bit" else (p, weights)
