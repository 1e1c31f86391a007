"""KL divergences: the rule that registers them, and closed forms and quadratures that families share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpyro.distributions import kl_divergence

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax._placement import where


def kl_rule(*pairs):
    """Register a KL for these pairs of classes. Its result gets the broadcast batch shape of both."""

    def register(rule):
        def kl(p, q):
            return jnp.broadcast_to(rule(p, q), jnp.broadcast_shapes(p.batch_shape, q.batch_shape))

        for pair in pairs:
            kl_divergence.register(*pair)(kl)  # type: ignore[attr-defined]  # of multipledispatch
        return rule

    return register


def log_pmf_of_bits(logits):
    """log P(0) and log P(1) on a last axis."""
    return lm.log_pmf_of_bits(arg.widen(logits=logits)[1])


def log_pmf_of_classes(logits):
    """Normalized log-probabilities, float32 or wider."""
    _, logits = arg.widen(logits=logits)
    return jax.nn.log_softmax(logits, -1)


def known_equal(name, p, q):
    """Whether a parameter is certainly the same in both. Traced values may or may not be."""
    a, b = (getattr(d, "_given", {}).get(name, getattr(d, name)) for d in (p, q))
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return a is b
    return bool(np.all(np.asarray(a) == np.asarray(b)))


def coth_excess(d):
    """``d coth(d / 2) - 2``, the KL between two logistic distributions at distance d."""
    near = jnp.abs(d) < 0.5  # there the difference would cancel
    s = where(near, d, 0) ** 2
    series = s / 6 * (1 - s / 60 * (1 - s / 42 * (1 - s / 40 * (1 - s * 25 / 990))))
    far = where(near, 1, d)
    return where(near, series, far / jnp.tanh(far / 2) - 2)


def concrete_kl(p, q, low=-math.inf, high=math.inf):
    """The integral of ``p log(p / q)`` for two binary Concrete laws on the logit scale, from low to high.

    It uses tanh-sinh quadrature in the distribution function of p, on both sides of the point where log q
    bends, and is exact to the rounding of float32 whatever the two temperatures are.

    Args:
      p: ``(logits, tau)`` of the law under which the expectation is taken.
      q: ``(logits, tau)`` of the other law.
      low: lower end, a logit.
      high: upper end, a logit.
    """
    _, logits, tau, other, other_tau = arg.widen(p=p[0], p_tau=p[1], q=q[0], q_tau=q[1])
    certain = jnp.isinf(logits) | jnp.isinf(other)
    logits, other = where(certain, 0, logits), where(certain, 0, other)
    bend = jnp.clip(other / other_tau, low, high)
    place = lambda x: jnp.full_like(bend, x) if math.isinf(x) else tau * x - logits
    ends = [place(low), tau * bend - logits, place(high)]
    below, above = ([jax.nn.sigmoid(sign * x)[..., None] for x in ends] for sign in (1, -1))
    logits, tau, other, other_tau = (x[..., None] for x in (logits, tau, other, other_tau))

    nodes = jnp.linspace(-3.2, 3.2, 33, dtype=logits.dtype)
    right, left = (jax.nn.sigmoid(sign * math.pi * jnp.sinh(nodes)) for sign in (1, -1))
    weights = 0.2 * math.pi * jnp.cosh(nodes) * right * left
    total = 0
    for i in range(2):
        u = left * below[i] + right * below[i + 1]
        v = left * above[i] + right * above[i + 1]  # 1 - u
        log_u, log_v = (jnp.log(where(x > 0, x, 1)) for x in (u, v))
        y = (logits + log_u - log_v) / tau
        ratio = jnp.log(tau / other_tau) + log_u + log_v - lm.log_logistic_pdf(other_tau * y - other)
        width = where(u < 0.5, below[i + 1] - below[i], above[i] - above[i + 1])
        total += jnp.sum(weights * width * ratio, -1)
    same = (p[0] == q[0]) & certain
    return where(certain, where(same, 0, jnp.inf), total)
