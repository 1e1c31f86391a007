"""`unrounded`: score draws before they are rounded, in the model as well as in the guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from numpyro.primitives import Messenger

from relaxit_jax import _arguments as arg
from relaxit_jax import _numpyro as npr
from relaxit_jax.distributions._gate import Gate
from relaxit_jax.distributions._sampler_distribution import Carried
from relaxit_jax.handlers import _wrappers as wr
from relaxit_jax.handlers._site import Relaxed


class unrounded(Messenger):
    """Score this library's draws by their unrounded log-space values, in the model as well as in the guide.

    A relaxed draw at a low temperature rounds to a corner, where no density is right. The guide has the
    unrounded draw, but NumPyro hands only the rounded value to the model: the two log-densities then differ
    even if guide and prior are the same (by 100 at tau = 0.01). Under this handler, wrapped around both,
    they are evaluated at the same point. It respects masks and reaches the body of a `scan`. `relax` does
    this by itself.

    The gradient of an ELBO also needs this handler if a law has atoms (`HardConcrete`,
    `GaussianRelaxedBernoulli`): mass that crosses into an atom changes ``E log p(z) - log q(z)`` by the
    jump of the log-law there, which no derivative of a draw includes. Under this handler the masses of the
    guide's atoms are handed on as well, and that term is added in closed form.

    Args:
      fn: a model or a guide; or nothing, to use it as a context or a decorator.

    Returns:
      The handled callable. Sites of other distributions are left alone, and so are sites whose model and
      guide have different types (a hard concrete gate is a different function of its unrounded draw than a
      relaxed Bernoulli).

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
        arg.require(fn is None or callable(fn), "fn", "a model or a guide", arg.shown(fn))
        super().__init__(fn)
        self._infer = {}  # for each message, its `infer` when it came in
        self._in_scan = False  # whether it wraps the body of a scan
        self._subsampled = set()  # names of the plates that are subsampled there
        self._flow = None  # the message of the last control flow

    def __enter__(self) -> None:
        self._infer = {}
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            self._flow = msg
            if npr.runs_scan(msg["fn"]):
                npr.wrap_scan_body(msg, self._inside)
        elif msg["type"] == "plate" and self._in_scan and npr.is_subsampled(msg):
            self._subsampled.add(msg["name"])
        elif msg["type"] == "sample" and not msg["is_observed"]:
            self._infer[id(msg)] = msg["infer"]
            if _is_carried(msg["fn"]):
                npr.require_same_rows(msg, self._subsampled)
                if not isinstance(msg["fn"], wr.Masked):
                    msg["fn"] = wr.Masked(wr.rewrap(msg["fn"], lambda d: d), True)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if npr.is_replaying():
            npr.require_right_order(msg, self._flow)
        # in place: a `trace` further out has already taken its copy of the message
        infer = self._infer.pop(id(msg), None)
        if infer is None or not isinstance(msg["intermediates"], list) or msg["intermediates"]:
            return
        source = npr.replayed_site(msg["value"])
        carried = _handed_on(source, msg["fn"]) if source and source["intermediates"] else None
        if carried is not None:
            index = npr.scan_index(infer)
            of_step = lambda x, ndim: x if x is None or jnp.ndim(x) == ndim else x[index]
            ndim = jnp.ndim(msg["value"])
            if isinstance(carried, Carried):
                carried = Carried(of_step(carried.unrounded, ndim), of_step(carried.atoms, ndim + 1))
            else:
                carried = of_step(carried, ndim + 1 - wr.innermost(msg["fn"]).event_dim)
            msg["intermediates"].append(carried)

    def _inside(self, body):
        """The same handler, wrapped around the body of a scan."""
        handler = self._again(body)
        handler._in_scan = True
        return handler

    def _again(self, fn):
        """The same handler, wrapped around another function."""
        return unrounded(fn)


def _is_carried(fn):
    """Whether the draws of this distribution have intermediates."""
    d = wr.innermost(fn)
    return isinstance(d, (Relaxed, Gate)) or bool(getattr(d, "_log_space", None))


def _handed_on(source, fn):
    """What the guide's site hands to a site of the model, in the model's terms; None if nothing.

    The law of a relaxed site goes to a relaxed site, an unrounded draw to a distribution with the same form
    of it, and the masses of atoms to any law with these atoms.
    """
    (carried,) = source["intermediates"]
    guide, model = wr.innermost(source["fn"]), wr.innermost(fn)
    if isinstance(guide, Relaxed) or isinstance(model, Relaxed):
        return carried if type(guide) is type(model) else None
    if not isinstance(carried, Carried):  # from a transformed distribution of NumPyro
        return None
    unrounded, atoms = carried
    if getattr(guide, "_log_space", None) != getattr(model, "_log_space", None):
        unrounded = None
    if not isinstance(model, Gate):
        atoms = None
    return None if unrounded is None and atoms is None else Carried(unrounded, atoms)
