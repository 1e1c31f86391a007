"""`relax`: a model with discrete latents made trainable."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.distributions import Delta, Distribution
from numpyro.primitives import _PYRO_STACK

from relaxit_jax import _checks as ck
from relaxit_jax import distributions as rd
from relaxit_jax.distributions import _base as distributions
from relaxit_jax.distributions import _site as site
from relaxit_jax.handlers import _base as base

METHODS = {
    "relaxed": {
        "bit": rd.RelaxedBernoulli,
        "class": rd.GumbelSoftmax,
        "count": rd.GeneralizedGumbelSoftmax,
    },
    "straight_through": {
        "bit": rd.StraightThroughRelaxedBernoulli,
        "class": rd.StraightThroughGumbelSoftmax,
        "count": rd.GeneralizedGumbelSoftmax,
    },
}


# what JAX, NumPy and Python say of a vector of floats that is used as an index
AS_INDEX = (
    r"Indexer must have|indices must|used as indices|nly integer|list indices|__(index|array)__.* float"
)


class relax(base.unrounded):
    """Replace the discrete latent sites of a model, and of its guide, by relaxed ones.

    ``SVI(relax(model, tau=0.1), relax(guide, tau=0.1), optimizer, Trace_ELBO())`` trains a guide with
    discrete sites by pathwise gradients. A relaxed draw z goes into the rest of the model; the site
    itself costs the KL of the two discrete laws, in closed form: the objective is
    ``E log p(x | z) - sum_sites KL(q || p)``, under `Trace_ELBO`, `TraceMeanField_ELBO` and
    `TraceGraph_ELBO` alike. The trained parameters belong in the unrelaxed model and guide, whose
    draws are discrete; the loss of the relaxed ones may lie below that of any discrete guide, so
    take the bound from the unrelaxed ones as well: ``Trace_ELBO().loss(key, params, model, guide)``.

    Relaxed are: Bernoulli (to a number in [0, 1]), Categorical, `OneHotCategorical` and Multinomial
    of one trial (to a point of the simplex: a Categorical site becomes a vector, see `take`),
    DiscreteUniform, Binomial, BetaBinomial, Poisson, Geometric, NegativeBinomial and other integers
    (to a number, a weighted mean of finitely many values); in plates, under `to_event`, `expand` and
    masks, and inside of `scan`. Observed, conditioned, substituted and enumerated sites stay as they are.

    What runs, but loses the gradient of a relaxed site: `jnp.where` and `jax.lax.cond` of it (see
    `select`), comparing it, rounding it. What is not meant: MCMC on the relaxed model, whose
    posterior is another one; RenyiELBO, whose importance weights need draws of the discrete law;
    `flax.nnx.Rngs` inside the model with several particles (take keys from `numpyro.prng_key()`).

    To anneal without recompiling, let the model take the temperature:
    ``lambda data, tau: relax(model, tau=tau)(data)``.

    Args:
      fn: a model or a guide; or nothing, to use it as a context or a decorator.
      tau: temperature, positive, scalar; may be traced.
      method: "relaxed" (Gumbel-softmax, relaxed Bernoulli), "straight_through" (exact values forward,
        the gradient of the relaxed ones), or a class of `relaxit_jax.distributions` that takes
        ``logits`` and ``tau``.
      kl: "discrete", or "relaxed" for the densities of the relaxed draws themselves. The latter
        shrinks towards the prior, the more the more classes there are, and has no form for counts.
      config: what to do with single sites, by name: a method as above, a function of the site's
        discrete distribution that returns one of this library's, or None to leave the site alone.
      num_values: how many values a count takes, an integer or a dictionary by site. Default: so many
        that less than 1e-8 is beyond them, if the parameters are known before tracing; what is
        beyond is folded into the last value. It has to be the same for model and guide.

    Returns:
      The handled callable.

    Raises:
      ValueError: for arguments that are not as above; for a site that cannot be relaxed; for a model
        that is relaxed and a guide that is not, or the other way; for a site that is conditioned
        after it was relaxed: write ``relax(condition(model, data))``.
      TypeError: where a relaxed Categorical is used as an index: use `take`.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), The Concrete Distribution, arXiv:1611.00712.
      E. Jang, S. Gu, B. Poole (2017), Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144, which takes the KL of the discrete laws.

    >>> import functools, numpyro
    >>> import numpyro.distributions as dist
    >>> def model():
    ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
    ...     numpyro.sample("y", dist.Normal(z, 1.0), obs=0.9)
    >>> soft = functools.partial(relax, tau=0.5)  # the same for model and guide
    >>> 0 < numpyro.handlers.trace(numpyro.handlers.seed(soft(model), 0)).get_trace()["z"]["value"] < 1
    Array(True, dtype=bool)
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        tau: ArrayLike,
        method: Literal["relaxed", "straight_through"] | type[Distribution] = "relaxed",
        kl: Literal["discrete", "relaxed"] = "discrete",
        config: Mapping[str, Any] | None = None,
        num_values: int | dict[str, int] | None = None,
    ) -> None:
        super().__init__(fn)
        ck.as_tau(tau, jnp.float32)
        ck.require(jnp.ndim(tau) == 0, "tau", "a scalar", f"shape {jnp.shape(tau)}")
        ck.require(kl in ("discrete", "relaxed"), "kl", "'discrete' or 'relaxed'", repr(kl))
        _check_method("method", method)
        for name, own in (config or {}).items():
            if own is not None and (isinstance(own, (str, type)) or not callable(own)):
                _check_method(f"config['{name}']", own)
        self.options: dict[str, Any] = {
            "tau": tau, "method": method, "kl": kl, "config": config or {}, "num_values": num_values
        }  # fmt: skip
        self._reset()

    def _reset(self):
        self._relaxed = set()  # messages whose site was relaxed here
        self._vectors = {}  # names of relaxed Categorical sites, in order
        self._flow = None  # the last control flow that was met
        self._met = set()  # names of sites

    def __enter__(self) -> None:
        self._reset()
        return super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: Any
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        unknown = set(self.options["config"]) - self._met
        inside = any(isinstance(handler, relax) for handler in _PYRO_STACK)  # as the body of a scan is
        if exc is None and not inside:
            need = f"names of the sites {sorted(self._met)}"
            ck.require(not unknown, "config", need, ", ".join(map(repr, sorted(unknown))))
        used_as_index = isinstance(exc, (TypeError, IndexError, ValueError)) and re.search(AS_INDEX, str(exc))
        if used_as_index and self._vectors and not isinstance(exc, _NotAnIndex):
            names = ", ".join(map(repr, self._vectors))
            raise _NotAnIndex(
                f"A relaxed Categorical is a vector of weights, not an index (relaxed here: {names}). "
                "Write relaxit_jax.handlers.take(table, z) for table[z]: it takes both."
            ) from exc

    def _again(self, fn):
        return relax(fn, **self.options)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            self._met.add(msg["name"])
        if msg["type"] == "control_flow":
            self._flow = msg["fn"]
        elif msg["type"] == "sample" and base.is_latent(msg) and base.is_discrete(msg["fn"]):
            own = self.options["config"].get(msg["name"], self.options["method"])
            if own is not None and msg["value"] is None:
                msg["fn"] = base.rewrap(msg["fn"], lambda d: self._replace(msg["name"], d, own))
                msg["infer"] = _NeedsRelaxedModel(msg["infer"])
                self._relaxed.add(id(msg))
            elif own is not None and msg.get("_control_flow_done") and self._flow is cond_wrapper:
                raise ValueError(
                    f"the site '{msg['name']}' is inside of a cond, where NumPyro replays nothing: draw it "
                    "before the cond, or leave it as it is by config"
                )
        super().process_message(msg)

    def _replace(self, name, d, method):
        law = site.law_of(name, d, self.options["num_values"])
        if law.kind == "class" and not d.event_dim:
            self._vectors[name] = None
        if callable(method) and not isinstance(method, type):
            relaxation = method(d)
        else:
            relaxation = _relaxation(name, law, method, self.options["tau"])
        event = law.log_pmf.shape[-1:] if law.kind == "class" else ()
        need = f"a relaxation of batch shape {d.batch_shape} and event shape {event} for the site '{name}'"
        fits = isinstance(relaxation, Distribution)
        got = (relaxation.batch_shape, relaxation.event_shape) if fits else type(relaxation).__name__
        ck.require(got == (d.batch_shape, event), "config", need, got)
        if self.options["kl"] == "discrete":
            return site.Relaxed(relaxation, law.log_pmf, law.values)
        need = f"'discrete' for the site '{name}', as {type(relaxation).__name__} has no density"
        discrete = law.kind == "count" or relaxation.has_enumerate_support
        has_density = getattr(relaxation, "_density", True) is not None
        ck.require(has_density and not discrete, "kl", need, "'relaxed'")
        return relaxation

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if id(msg) in self._relaxed:
            self._relaxed.remove(id(msg))
            _check_use(msg, self.options["kl"])
        super().postprocess_message(msg)


def _check_method(name, method):
    need = (
        f"one of {', '.join(map(repr, METHODS))} or a class of relaxit_jax.distributions with logits and tau"
    )
    known = method in METHODS if isinstance(method, str) else _takes_logits(method)
    ck.require(known, name, need, repr(method))


def _takes_logits(kind):
    return (
        isinstance(kind, type)
        and issubclass(kind, distributions.SamplerDistribution)
        and set(kind.arg_constraints) <= {"logits", "values", "tau"}
        and "k" not in kind.pytree_aux_fields
        and kind is not rd.OneHotCategorical
    )


def _relaxation(name, law, method, tau):
    kind = METHODS[method][law.kind] if isinstance(method, str) else method
    takes = inspect.signature(kind).parameters
    arguments = {"logits": law.logits, "values": law.values, "tau": jnp.asarray(tau)}
    arguments = {key: x for key, x in arguments.items() if key in kind.arg_constraints}
    missing = [key for key, x in arguments.items() if x is None]
    ck.require(not missing, f"method of the site '{name}'", f"one for a {law.kind}", kind.__name__)
    if "hard" in takes and method == "straight_through":
        arguments["hard"] = True
    return kind(**arguments, validate_args=False)


def _check_use(msg, kl):
    """What a relaxed site must not be: conditioned, or replayed from a guide that was not relaxed."""
    name = f"the site '{msg['name']}'"
    if msg["is_observed"]:
        raise ValueError(
            f"{name} is conditioned after it was relaxed: write relax(condition(model, data)), not "
            "condition(relax(model), data)"
        )
    source = base.replayed(msg["value"])
    if source is None:
        return
    guide = base.innermost(source["fn"])
    if base.is_discrete(guide):
        raise ValueError(f"{name} is relaxed in the model, not in the guide: wrap the guide in relax as well")
    if isinstance(guide, Delta):
        raise ValueError(f"{name} has a point estimate in the guide; a relaxed density has no largest value")
    if isinstance(guide, site.Relaxed) != (kl == "discrete"):
        raise ValueError(
            f"{name} must be relaxed alike in model and guide, got kl={kl!r} in the model and a "
            f"{type(guide).__name__} in the guide: give the guide a discrete distribution there, and relax "
            "with the same kl around it"
        )


class _NotAnIndex(TypeError):
    """A relaxed value where NumPyro or the model asks for an integer."""


class _NeedsRelaxedModel(dict):
    """The `infer` of a guide's relaxed site. `replay` copies it when it hands the value to the model."""

    def copy(self):
        replays = [handler for handler in _PYRO_STACK if hasattr(handler, "trace")]
        mine = any(site.get("infer") is self for handler in replays for site in handler.trace.values())
        if mine and not any(isinstance(handler, relax) for handler in _PYRO_STACK):
            raise ValueError(
                "a site is relaxed in the guide, not in the model: wrap the model in relax as well"
            )
        return dict(self)


def take(table: ArrayLike, z: ArrayLike) -> Array:
    """``table[z]`` for an index z, or for the one-hot or relaxed vector that stands for it.

    ``sum_k z_k table_k``: a model written with it works with `relax` and without.

    Args:
      table: array of shape (K, ...), finite.
      z: integers of shape (...), or vectors of shape (..., K).

    Returns:
      An array of shape ``z.shape + table.shape[1:]`` without the axis of K.

    Raises:
      ValueError: for a ``z`` that has neither integers nor as many weights as the table has rows.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> take(table, 1), take(table, jnp.array([0.0, 1.0]))
    (Array([3., 4.], dtype=float32), Array([3., 4.], dtype=float32))
    """
    table, z = jnp.asarray(table), jnp.asarray(z)
    if jnp.issubdtype(z.dtype, jnp.integer):
        return table[z]
    rows = table.shape[0]
    need = f"integers, or vectors of {rows} weights for the {rows} rows of the table"
    ck.require(z.shape[-1:] == (rows,), "z", need, f"dtype {z.dtype} and shape {z.shape}")
    return jnp.tensordot(z, table, 1, precision=jax.lax.Precision.HIGHEST)


def select(bit: ArrayLike, if_one: ArrayLike, if_zero: ArrayLike) -> Array:
    """``where(bit, if_one, if_zero)`` that keeps the gradient of a relaxed bit.

    ``bit if_one + (1 - bit) if_zero``: the same for 0 and 1, and the mixture between them, where
    `jnp.where` and `jax.lax.cond` would round and lose the gradient.

    Args:
      bit: zeros and ones, or numbers between them.
      if_one: value at 1, finite.
      if_zero: value at 0, finite.

    Returns:
      An array of the broadcast shape.

    Raises:
      ValueError: for shapes that do not broadcast.

    References:
      C. J. Maddison, A. Mnih, Y. W. Teh (2017), arXiv:1611.00712.

    >>> float(select(0.25, 4.0, 0.0))
    1.0
    """
    bit = jnp.asarray(bit)
    return bit * if_one + (1 - bit) * if_zero
