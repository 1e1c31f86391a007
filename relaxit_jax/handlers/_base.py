"""What the handlers share: wrappers that keep intermediates, and the draws scored before rounding."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.handlers import replay
from numpyro.primitives import _PYRO_STACK, Messenger

from relaxit_jax import _checks as ck
from relaxit_jax.distributions import _site as site
from relaxit_jax.distributions._base import Carried
from relaxit_jax.distributions._gate import Gate

# --- wrappers ---------------------------------------------------------------------------------


def innermost(fn):
    """The distribution inside all of NumPyro's wrappers."""
    while isinstance(fn, (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)):
        fn = fn.base_dist
    return fn


def is_latent(msg):
    """Of a sample site: neither observed nor enumerated."""
    return not msg["is_observed"] and msg["infer"].get("enumerate") != "parallel"


def is_discrete(fn):
    return bool(getattr(innermost(fn).support, "is_discrete", False))


def rewrap(fn, replace):
    """`replace` of the innermost distribution, in the wrappers of `fn`."""
    if isinstance(fn, dist.MaskedDistribution):
        return Masked(rewrap(fn.base_dist, replace), fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return rewrap(fn.base_dist, replace).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return rewrap(fn.base_dist, replace).to_event(fn.reinterpreted_batch_ndims)
    return replace(fn)


class Masked(dist.MaskedDistribution):
    """A masked distribution that passes on what NumPyro's drops: the intermediates of a draw."""

    @property
    def has_rsample(self):
        """Where intermediates are passed on, a law with atoms has the whole of its gradient."""
        return self.base_dist.has_rsample or isinstance(innermost(self), Gate)

    def mask(self, mask):
        return Masked(self.base_dist, mask if self._mask is True else self._mask & mask)

    def expand(self, batch_shape):
        mask = self._mask if isinstance(self._mask, bool) else jnp.broadcast_to(self._mask, batch_shape)
        return Masked(self.base_dist.expand(batch_shape), mask)

    def sample_with_intermediates(self, key, sample_shape=()):
        return self.base_dist.sample_with_intermediates(key, sample_shape)

    def log_prob(self, value, intermediates=None):
        if not intermediates or self._mask is False:
            return super().log_prob(value)
        law = self.base_dist.log_prob(value, intermediates)
        return law if self._mask is True else jnp.where(self._mask, law, 0)


# --- unrounded draws --------------------------------------------------------------------------


class unrounded(Messenger):
    """Score this library's draws by their unrounded log-space values, in the model as in the guide.

    A relaxed draw at a low temperature rounds to a vertex, where no density is right. In the guide
    the unrounded draw is at hand, but NumPyro hands only the rounded value on to the model: the two
    log-densities then differ even where guide and prior are the same (by 100 at tau = 0.01). Under
    this handler, around both, they are taken at the same point; masks are respected, and `scan`
    passes it on to its body. `relax` does this by itself.

    The gradient of a bound also needs it where a law has atoms (`HardConcrete`,
    `GaussianRelaxedBernoulli`): mass that crosses into an atom changes ``E log p(z) - log q(z)`` by how far
    the log-law jumps there, which no derivative of a draw can tell. Under this handler the masses of the
    guide's atoms are handed on as well, and that term is added in closed form.

    Args:
      fn: a model or a guide; or nothing, to use it as a context or a decorator.

    Returns:
      The handled callable. Sites of other distributions are left alone, and so are those of which
      model and guide have different kinds (a hard concrete gate is another function of its
      unrounded draw than a relaxed Bernoulli).

    Raises:
      ValueError: for an ``fn`` that cannot be called.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712, on
      working with the logarithm of the draw.

    >>> import numpyro, relaxit_jax.distributions as rd
    >>> model = lambda: numpyro.sample("z", rd.RelaxedBernoulli(logits=0.0, tau=0.01))
    >>> loss = numpyro.infer.Trace_ELBO(num_particles=100).loss
    >>> print(abs(loss(jax.random.key(0), {}, unrounded(model), unrounded(model))))
    0.0
    """

    def __init__(self, fn: Callable[..., Any] | None = None) -> None:
        ck.require(fn is None or callable(fn), "fn", "a model or a guide", ck.shown(fn))
        super().__init__(fn)
        self._infer = {}  # by message: what its `infer` was when it came in

    def __enter__(self) -> None:
        self._infer = {}
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            if msg["fn"] is scan_wrapper:  # handlers do not reach inside its body: go there
                body, *rest = msg["args"]
                msg["args"] = (self._again(body), *rest)
        elif msg["type"] == "sample" and not msg["is_observed"]:
            self._infer[id(msg)] = msg["infer"]
            if _is_carried(msg["fn"]) and not isinstance(msg["fn"], Masked):
                msg["fn"] = Masked(rewrap(msg["fn"], lambda d: d), True)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        # in place: a `trace` further out has already taken its copy of the message
        infer = self._infer.pop(id(msg), None)
        if infer is None or not isinstance(msg["intermediates"], list) or msg["intermediates"]:
            return
        source = replayed(msg["value"])
        carried = _handed_on(source, msg["fn"]) if source and source["intermediates"] else None
        if carried is not None:
            index = infer.get("_scan_current_index")
            # a step of a scan replays one element of the value, but gets all intermediates
            of_step = lambda x, ndim: x if x is None or jnp.ndim(x) == ndim else x[index]
            ndim = jnp.ndim(msg["value"])
            if isinstance(carried, Carried):
                carried = Carried(of_step(carried.unrounded, ndim), of_step(carried.atoms, ndim + 1))
            else:
                carried = of_step(carried, ndim + 1 - innermost(msg["fn"]).event_dim)
            msg["intermediates"].append(carried)

    def _again(self, fn):
        """The same handler around another function."""
        return unrounded(fn)


def _is_carried(fn):
    """Whether the draws of this distribution have intermediates."""
    d = innermost(fn)
    return isinstance(d, (site.Relaxed, Gate)) or bool(getattr(d, "_log_space", None))


def _handed_on(source, fn):
    """What the guide's site tells a site of the model, in whose terms it is; None if it tells nothing.

    The law of a relaxed site goes to a relaxed site, an unrounded draw to a distribution with the same form
    of it, and the masses of atoms to any law with these atoms.
    """
    (carried,) = source["intermediates"]
    guide, model = innermost(source["fn"]), innermost(fn)
    if isinstance(guide, site.Relaxed) or isinstance(model, site.Relaxed):
        return carried if type(guide) is type(model) else None
    unrounded, atoms = carried
    if getattr(guide, "_log_space", None) != getattr(model, "_log_space", None):
        unrounded = None
    if not isinstance(model, Gate):
        atoms = None
    return None if unrounded is None and atoms is None else Carried(unrounded, atoms)


def replayed(value):
    """The guide's site whose value this is."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, replay):
            for site in handler.trace.values():
                if site["type"] == "sample" and site["value"] is value:
                    return site
    return None
