"""Constraints that NumPyro lacks: parameters that may be infinite, and values up to rounding."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.transforms import StickBreakingTransform, biject_to

from relaxit_jax import _arguments as arg

Constraint = constraints.Constraint[Any]


class _LogOdds(constraints.ParameterFreeConstraint):
    """Real numbers and both infinities, because a certain bit is still a bit."""

    def __call__(self, x):
        return x == x  # not NaN

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _LogPotential(constraints.ParameterFreeConstraint):
    """Real numbers and -inf, which forbids a part of a structure."""

    def __call__(self, x):
        return x < np.inf  # and not NaN

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _LogWeights(constraints.ParameterFreeConstraint):
    """Categorical logits: -inf is an impossible class, but at least one class must be possible."""

    event_dim = 1

    def __call__(self, x):
        return (x < np.inf).all(-1) & (x > -np.inf).any(-1)

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _Simplex(constraints.ParameterFreeConstraint):
    """The simplex, to the rounding of the dtype. NumPyro's own allows 1e-6, which bfloat16 exceeds."""

    event_dim = 1

    def __call__(self, x):
        exact = not jnp.issubdtype(x.dtype, jnp.floating)  # the zeros and ones of a corner
        slack = 0 if exact else 8 * float(jnp.finfo(x.dtype).eps)
        total = x.astype(arg.wide(x.dtype)).sum(-1)
        return (x >= 0).all(-1) & (abs(total - 1) <= slack)

    def feasible_like(self, prototype):
        return jnp.full_like(prototype, 1 / prototype.shape[-1])


class _OneHot(constraints.ParameterFreeConstraint):
    """Vectors of zeros with a single one."""

    event_dim = 1
    is_discrete = True

    def __call__(self, x):
        return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype).at[..., 0].set(1)


class Draws(constraints.ParameterFreeConstraint):
    """A support that has no bijection from the real numbers, and that NumPyro must not treat as discrete.

    NUTS and the continuous automatic guides ask for that bijection. They would silently lose the
    probabilities of single values.
    """

    def __init__(self, hull):
        self.hull = hull

    @property
    def event_dim(self):  # type: ignore[override]  # of the set that the values lie in
        return self.hull.event_dim

    def __call__(self, x):
        return self.hull(x)

    def __repr__(self):
        return f"draws in {self.hull}"

    def feasible_like(self, prototype):
        return self.hull.feasible_like(prototype)

    def tree_flatten(self):
        return (), ((), {"hull": self.hull})

    def eq(self, other, static=False):
        return isinstance(other, Draws) and self.hull.eq(other.hull, static=static)


def _no_bijection(constraint):
    raise ValueError(
        "NUTS and the continuous automatic guides, such as AutoNormal, need a density on the real numbers. "
        "This site has none: single values of it have a probability (straight-through draws, gates with "
        "atoms at 0 and 1), or it is scored by the law of a discrete site (relax). Train it by SVI "
        "with a guide that has a distribution of the same kind there."
    )


log_odds, log_weights, simplex, one_hot = _LogOdds(), _LogWeights(), _Simplex(), _OneHot()
log_potential = _LogPotential()
draws_in_unit_interval, draws_in_simplex = Draws(constraints.unit_interval), Draws(simplex)
real_draws = Draws(constraints.real)
biject_to.register(Draws)(_no_bijection)
biject_to.register(log_potential)(lambda _: biject_to(constraints.real))
biject_to.register(log_odds)(lambda _: biject_to(constraints.real))
biject_to.register(log_weights)(lambda _: biject_to(constraints.real_vector))
biject_to.register(simplex)(lambda _: StickBreakingTransform())
