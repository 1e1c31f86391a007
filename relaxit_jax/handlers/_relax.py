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
from numpyro.primitives import _PYRO_STACK, _masked_observe

from relaxit_jax import _checks as ck
from relaxit_jax import distributions as rd
from relaxit_jax.distributions import _base as distributions
from relaxit_jax.distributions import _site as site
from relaxit_jax.distributions._gate import Gate
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


OBSERVED, UNOBSERVED = "_observed", "_unobserved"  # how NumPyro calls the halves of a site with obs_mask

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
    masks, and inside of `scan`. Observed, conditioned, substituted and enumerated sites stay as they are;
    of a site with `obs_mask` the unobserved elements are relaxed.

    What runs, but loses the gradient of a relaxed site: `jnp.where` and `jax.lax.cond` of it (see
    `select`), comparing it (see `less`), rounding it. What is not meant: MCMC on the relaxed model, whose
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
      config: what to do with single sites, by name: a method as above, "one_hot" for a vector of weights over
        the values 0, 1, ... in place of a number (for `take`, `less`, `greater` and `equal`), a function of
        the site's discrete distribution that returns one of this library's, or None to leave the site alone.
      num_values: how many values a count takes, an integer or a dictionary by site. Default: so many
        that less than 1e-8 is beyond them, if the parameters are known before tracing; what is
        beyond is folded into the last value. It has to be the same for model and guide.

    Returns:
      The handled callable.

    Raises:
      ValueError: for arguments that are not as above, or that name a site that is not there; for a
        site that cannot be relaxed; for a model that is relaxed and a guide that is not, or the other
        way; for a site that is conditioned after it was relaxed: write
        ``relax(condition(model, data))``.
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
        shape = ck.as_tau(tau, jnp.float32).shape
        ck.require(shape == (), "tau", "a scalar", f"shape {shape}")
        ck.require_choice("kl", kl, ("discrete", "relaxed"))
        _check_method("method", method)
        config = {} if config is None else config
        need = "a dictionary from names of sites to methods"
        ck.require(isinstance(config, Mapping), "config", need, ck.shown(config))
        for name, own in config.items():
            is_function = callable(own) and not isinstance(own, type)
            if not (own is None or is_function or (isinstance(own, str) and own == "one_hot")):
                _check_method(f"config['{name}']", own)
        site.check_num_values(num_values)
        self.options: dict[str, Any] = {
            "tau": tau, "method": method, "kl": kl, "config": config, "num_values": num_values
        }  # fmt: skip
        self._reset()

    def _reset(self):
        self._relaxed = set()  # messages whose site was relaxed here
        self._vectors = {}  # names of relaxed Categorical sites, in order
        self._flow = None  # the last control flow that was met
        self._met = set()  # names of sites
        self._partly = {}  # names of partly observed sites whose values are vectors, and their length

    def __enter__(self) -> None:
        self._reset()
        return super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: Any
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        inside = any(isinstance(handler, relax) for handler in _PYRO_STACK)  # as the body of a scan is
        if exc is None and not inside:
            # the guide of a site with obs_mask has its unobserved part alone
            known = self._met | {name.removesuffix(UNOBSERVED) for name in self._met}
            for option in ("config", "num_values"):
                named = self.options[option]
                unknown = set(named) - known if isinstance(named, Mapping) else ()
                need = f"names of the sites {sorted(self._met)}"
                ck.require(not unknown, option, need, ", ".join(sorted(map(repr, unknown))))
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
        elif msg["type"] == "deterministic" and msg["name"] in self._partly:
            self._met.add(msg["name"])
            msg["value"] = jnp.moveaxis(msg["value"], 0, -1)
        elif msg["type"] == "sample" and msg["is_observed"]:
            self._observe_a_part(msg)
        elif msg["type"] == "sample" and base.is_latent(msg) and base.is_discrete(msg["fn"]):
            own = self._option("config", msg["name"], self.options["method"])
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

    def _option(self, table, name, default=None):
        """What an option says of a site; the unobserved part of a site also goes by the name of the site."""
        table = self.options[table]
        if not isinstance(table, Mapping):
            return table
        return table.get(name, table.get(name.removesuffix(UNOBSERVED), default))

    def _law(self, name, d, method):
        """The finite law of a site, as classes where the method makes vectors of it; and the method."""
        law = site.law_of(name, d, self._option("num_values", name))
        if method == "one_hot":
            method = self.options["method"]
            method = METHODS.get(method, {}).get("class", method) if isinstance(method, str) else method
            ck.require(
                _is_one_hot(method), f"config['{name}']", "another than 'one_hot' beside a method of numbers",
                f"method={method.__name__}",
            )  # fmt: skip
        # a method for all sites makes no vectors of bits and counts
        as_vector = self._option("config", name) is not None and _is_one_hot(method)
        return (site.as_classes(name, law) if as_vector else law), method

    def _observe_a_part(self, msg):
        """The first half of a site with `obs_mask`: NumPyro joins it with the second by ``where(mask, ...)``.

        A mask has no axis for classes. Where the second half is a vector of weights both halves are handed to
        NumPyro with the classes first, and the deterministic site of the two puts them last.
        """
        whole = msg["name"].removesuffix(OBSERVED)
        if not (base.is_discrete(msg["fn"]) and whole != msg["name"] and _called_with_obs_mask()):
            return
        name, d = whole + UNOBSERVED, base.innermost(msg["fn"])
        method = self._option("config", name, self.options["method"])
        if method is None or (callable(method) and not isinstance(method, type)):
            return
        law, _ = self._law(name, d, method)
        if law.kind == "class" and not d.event_dim:
            self._partly[whole] = law.log_pmf.shape[-1]

    def _replace(self, name, d, method):
        law, method = self._law(name, d, method)
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
        discrete = law.kind == "count" or not (relaxation.has_rsample or isinstance(relaxation, Gate))
        has_density = getattr(relaxation, "_density", True) is not None
        ck.require(has_density and not discrete, "kl", need, "'relaxed'")
        return relaxation

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if id(msg) in self._relaxed:
            self._relaxed.remove(id(msg))
            _check_use(msg, self.options["kl"])
        super().postprocess_message(msg)
        if msg["type"] != "sample":
            return
        # a `trace` further out has the value already; this is what NumPyro goes on with
        if msg["is_observed"] and (size := self._partly.get(msg["name"].removesuffix(OBSERVED))):
            msg["value"] = jnp.moveaxis(jax.nn.one_hot(msg["value"], size), -1, 0)
        elif not msg["is_observed"] and msg["name"].removesuffix(UNOBSERVED) in self._partly:
            msg["value"] = jnp.moveaxis(msg["value"], -1, 0)


def _check_method(name, method):
    need = (
        f"one of {', '.join(map(repr, METHODS))} or a class of relaxit_jax.distributions with logits and tau"
    )
    known = method in METHODS if isinstance(method, str) else _takes_logits(method)
    ck.require(known, name, need, ck.shown(method))


def _is_one_hot(kind):
    return isinstance(kind, type) and issubclass(kind, distributions.OneHot)


def _called_with_obs_mask():
    """Whether the site that is being processed is one half of a site with `obs_mask`."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _masked_observe.__code__:
            return True
        frame = frame.f_back
    return False


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
    table, z = ck.as_number("table", table, maybe_complex=True), ck.as_number("z", z)
    ck.require(table.ndim > 0, "table", "of shape (K, ...)", "shape ()")
    rows = table.shape[0]
    if jnp.issubdtype(z.dtype, jnp.integer):
        return table[z]
    need = (
        f"integers, or vectors of {rows} weights for the {rows} rows of the table (a relaxed count is a "
        "number: relax the site with config={its name: 'one_hot'})"
    )
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
    bit = ck.as_number("bit", bit)
    if_one, if_zero = (
        ck.as_number(name, x, maybe_complex=True) for name, x in (("if_one", if_one), ("if_zero", if_zero))
    )
    ck.batch_shape(None, bit=bit.shape, if_one=if_one.shape, if_zero=if_zero.shape)
    return bit * if_one + (1 - bit) * if_zero


def less(t: ArrayLike, s: ArrayLike) -> Array:
    """``t < s`` for the value s of a discrete site, with the gradient of a relaxed one.

    ``sum_k s_k 1[t < k]`` for a vector of weights over the values 0, 1, ...; 0 or 1 for an integer. With it,
    ``select(less(t, s), before, after)`` is a change point at s that works with `relax` and without.

    Args:
      t: numbers of shape (...).
      s: integers of shape (...); or vectors of weights of shape (..., K), the draws of a site that is
        relaxed with ``config={name: "one_hot"}``.

    Returns:
      The probability that t is less, of the broadcast shape.

    Raises:
      ValueError: for an ``s`` that is a single number but no integer: a relaxed number has no such weights.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> less(jnp.arange(3), 2), less(jnp.arange(3), jnp.array([0.0, 0.25, 0.75]))
    (Array([1., 1., 0.], dtype=float32), Array([1.  , 0.75, 0.  ], dtype=float32))
    """
    return _compare(jnp.less, t, s)


def greater(t: ArrayLike, s: ArrayLike) -> Array:
    """``t > s`` for the value s of a discrete site, with the gradient of a relaxed one.

    ``sum_k s_k 1[t > k]`` for a vector of weights over the values 0, 1, ...; 0 or 1 for an integer.

    Args:
      t: numbers of shape (...).
      s: as for `less`.

    Returns:
      The probability that t is greater, of the broadcast shape.

    Raises:
      ValueError: as for `less`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> greater(jnp.arange(3), jnp.array([0.0, 0.25, 0.75]))
    Array([0.  , 0.  , 0.25], dtype=float32)
    """
    return _compare(jnp.greater, t, s)


def equal(t: ArrayLike, s: ArrayLike) -> Array:
    """``t == s`` for the value s of a discrete site, with the gradient of a relaxed one.

    ``sum_k s_k 1[t = k]`` for a vector of weights over the values 0, 1, ...; 0 or 1 for an integer.

    Args:
      t: numbers of shape (...).
      s: as for `less`.

    Returns:
      The probability that t is equal, of the broadcast shape.

    Raises:
      ValueError: as for `less`.

    References:
      E. Jang, S. Gu, B. Poole (2017), arXiv:1611.01144.

    >>> equal(2, jnp.array([0.0, 0.25, 0.75]))
    Array(0.75, dtype=float32)
    """
    return _compare(jnp.equal, t, s)


def _compare(holds, t, s):
    t, s = ck.as_number("t", t), ck.as_number("s", s)
    if not jnp.issubdtype(s.dtype, jnp.inexact):
        ck.batch_shape(None, t=t.shape, s=s.shape)
        return holds(t, s).astype(jnp.result_type(float))
    need = "integers, or vectors of weights: relax the site with config={its name: 'one_hot'}"
    ck.require(s.ndim > 0, "s", need, f"one number of dtype {s.dtype}")
    ck.batch_shape(None, t=t.shape, s=s.shape[:-1])
    return jnp.sum(jnp.where(holds(t[..., None], jnp.arange(s.shape[-1])), s, 0), -1)
