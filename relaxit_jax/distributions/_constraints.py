"""The constraints that NumPyro lacks: parameters that may be infinite, and values up to rounding."""

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.transforms import StickBreakingTransform, biject_to


class _LogOdds(constraints.ParameterFreeConstraint):
    """Real numbers and both infinities: certain bits are bits."""

    def __call__(self, x):
        return x == x  # not NaN

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _LogWeights(constraints.ParameterFreeConstraint):
    """Categorical logits: -inf is an impossible class, but one class has to be possible."""

    event_dim = 1

    def __call__(self, x):
        return (x < np.inf).all(-1) & (x > -np.inf).any(-1)

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _Simplex(constraints.ParameterFreeConstraint):
    """The simplex, to the rounding of the dtype: NumPyro's own allows 1e-6, which bfloat16 misses."""

    event_dim = 1

    def __call__(self, x):
        slack = 8 * float(jnp.finfo(x.dtype).eps)
        total = x.astype(jnp.promote_types(x.dtype, jnp.float32)).sum(-1)
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


log_odds, log_weights, simplex, one_hot = _LogOdds(), _LogWeights(), _Simplex(), _OneHot()
biject_to.register(log_odds)(lambda _: biject_to(constraints.real))
biject_to.register(log_weights)(lambda _: biject_to(constraints.real_vector))
biject_to.register(simplex)(lambda _: StickBreakingTransform())
