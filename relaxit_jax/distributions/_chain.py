"""Linear chains as a NumPyro distribution."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from relaxit_jax import _arguments as arg
from relaxit_jax import _math as lm
from relaxit_jax import structured
from relaxit_jax._placement import where
from relaxit_jax.distributions import _constraints as ct
from relaxit_jax.distributions import _kl
from relaxit_jax.distributions import _sampler_distribution as sd
from relaxit_jax.structured import _chain as chain

MOST_OUTCOMES = 2**20


class LinearChain(sd.SamplerDistribution):
    """Sequences of a linear chain as one-hot vectors, see `relaxit_jax.structured.chain_sample`.

    ``P(z)`` is proportional to ``exp(sum_t unary[t, z_t] + sum_t transition[t, z_t, z_(t+1)])``. Draws are
    exact, with the gradient of their mean, the marginals. The KL between two chains has a closed form.

    Args:
      unary: log-weights of the classes at each step, shape (..., T, K); -inf is a forbidden class.
      transition: log-weights of class j after class i, shape (K, K), (..., T - 1, K, K) or (..., 1, K, K).
      validate_args: as in NumPyro.

    Raises:
      ValueError: for arguments that are not floating point, or shapes that do not fit together; in
        `enumerate_support`, for more than 2^20 sequences.

    References:
      J. Lafferty, A. McCallum, F. Pereira (2001), Conditional Random Fields, ICML; M. B. Paulus, D. Choi,
      D. Tarlow, A. Krause, C. J. Maddison (2020), arXiv:2006.08063.

    >>> d = LinearChain(unary=jnp.zeros((4, 3)), transition=jnp.zeros((3, 3)))
    >>> print(f"{jnp.exp(d.entropy()):.2f}")  # 3^4 sequences alike
    81.00
    """

    unary: Array
    transition: Array
    arg_constraints: dict[str, Any] = {
        "unary": constraints.independent(ct.log_potential, 2),
        "transition": constraints.independent(ct.log_potential, 3),
    }
    support: ct.Constraint = constraints.independent(ct.draws_in_simplex, 1)
    has_enumerate_support = True
    _pathwise = False
    _sampler = staticmethod(structured.chain_sample)
    _density = staticmethod(structured.chain_log_prob)
    _event = staticmethod(lambda shapes: shapes["unary"][-2:])

    def __init__(
        self,
        *,
        unary: ArrayLike | None = None,
        transition: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        for name, x in {"unary": unary, "transition": transition}.items():
            arg.require(x is not None, name, "given", None)
        chain.as_potentials(unary, transition)
        if len(arg.shape_of("transition", transition)) == 2:
            numpy = np if isinstance(transition, np.ndarray) else jnp
            transition = numpy.asarray(transition)[None]
        super().__init__(validate_args, unary=unary, transition=transition)

    def _conditionals(self):
        return chain.log_conditionals(*chain.as_potentials(self.unary, self.transition)[1:])

    @property
    def mean(self) -> Array:
        return self._full(structured.chain_marginals(self.unary, self.transition))

    @property
    def variance(self) -> Array:
        mean = self.mean
        return mean * (1 - mean)

    def entropy(self) -> Array:
        return self._batched(-_expected_log_prob(self, self))

    def enumerate_support(self, expand: bool = True) -> Array:
        """All K^T sequences, on a first axis; the batch axes have size one without `expand`."""
        steps, k = self.event_shape
        number = k**steps
        arg.require(number <= MOST_OUTCOMES, "K^T", f"at most {MOST_OUTCOMES} to enumerate", number)
        paths = np.eye(k)[list(itertools.product(range(k), repeat=steps))]
        paths = jnp.asarray(paths.reshape(number, *[1] * len(self.batch_shape), steps, k), self.unary.dtype)
        return jnp.broadcast_to(paths, (number, *self.batch_shape, steps, k)) if expand else paths


def _expected_log_prob(p, q):
    """E_p log q(z), summed over each class given the next one, so nothing large cancels."""
    (last_p, before_p), (last_q, before_q) = p._conditionals(), q._conditionals()
    mean = jnp.moveaxis(p.mean.astype(last_p.dtype), -2, 0)
    weighted = lm.expected_log_pmf(jnp.moveaxis(before_p, -2, -1), jnp.moveaxis(before_q, -2, -1))
    later = jnp.sum(where(mean[1:] > 0, mean[1:] * where(mean[1:] > 0, weighted, 0), 0), (0, -1))
    return lm.expected_log_pmf(last_p, last_q) + later


@_kl.kl_rule((LinearChain, LinearChain))
def _kl_linear_chain(p, q):
    """E_p log p(z) - E_p log q(z); inf if p draws a sequence that q excludes."""
    arg.require(p.event_shape == q.event_shape, "q", f"of event shape {p.event_shape}", q.event_shape)
    return _expected_log_prob(p, p) - _expected_log_prob(p, q)
