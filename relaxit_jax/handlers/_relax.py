"""`relax`: make a model with discrete latents trainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.distributions import Delta, Distribution

from relaxit_jax import _numpyro as npr
from relaxit_jax.handlers import _relaxation as rl
from relaxit_jax.handlers import _site as site
from relaxit_jax.handlers import _wrappers as wr
from relaxit_jax.handlers._unrounded import unrounded

OBSERVED = "_observed"  # NumPyro's name for the first half of a site with obs_mask


class relax(unrounded):
    """Replace the discrete latent sites of a model, and of its guide, by relaxed ones.

    ``SVI(relax(model, tau=0.1), relax(guide, tau=0.1), optimizer, Trace_ELBO())`` trains a guide with
    discrete sites with pathwise gradients. A relaxed draw z enters the rest of the model, and the site itself
    costs the KL between the two discrete laws, in closed form: the objective is
    ``E log p(x | z) - sum_sites KL(q || p)``, under `Trace_ELBO`, `TraceMeanField_ELBO` and `TraceGraph_ELBO`
    alike. Use the trained parameters in the unrelaxed model and guide, whose draws are discrete. The relaxed
    loss may be lower than the loss of any discrete guide, so compute the ELBO from the unrelaxed model and
    guide as well: ``Trace_ELBO().loss(key, params, model, guide)``.

    These sites are relaxed: Bernoulli (to a number in [0, 1]); Categorical, `OneHotCategorical` and
    Multinomial with one trial (to a point of the simplex: a Categorical site becomes a vector, see `take`);
    DiscreteUniform, Binomial, BetaBinomial, Poisson, Geometric, NegativeBinomial and other integers (to a
    number, a weighted mean of finitely many values). This works in plates, under `to_event`, `expand` and
    masks, and inside `scan`. Observed, conditioned, substituted and enumerated sites stay as they are; for a
    site with `obs_mask`, the unobserved elements are relaxed.

    Some code runs but loses the gradient of a relaxed site: `jnp.where` and `jax.lax.cond` on it (see
    `select`), comparing it (see `less`), and rounding it. Some uses are not supported: MCMC on the relaxed
    model, whose posterior is a different one; RenyiELBO, whose importance weights need draws of the discrete
    law; and `flax.nnx.Rngs` inside the model with several particles (take keys from `numpyro.prng_key()`).

    To anneal without recompiling, let the model take the temperature:
    ``lambda data, tau: relax(model, tau=tau)(data)``.

    Args:
      fn: a model or a guide; or nothing, to use it as a context or a decorator.
      tau: temperature, positive, scalar; may be traced.
      method: "relaxed" (Gumbel-softmax, relaxed Bernoulli), "straight_through" (exact values forward, the
        gradient of the relaxed ones), or a class of `relaxit_jax.distributions` that takes ``logits`` and
        ``tau``.
      kl: "discrete", or "relaxed" for the densities of the relaxed draws themselves. The latter shrinks
        toward the prior, the more so with more classes, and has no form for counts.
      config: how to treat single sites, by name: a method as above, "one_hot" for a vector of weights over
        the values 0, 1, ... instead of a number (for `take`, `less`, `greater` and `equal`), a function of
        the site's discrete distribution that returns one of this library's, or None to leave the site alone.
      num_values: how many values a count takes, an integer for all counts or a dictionary by site. By
        default enough to leave out less than 1e-8, if the parameters are known before tracing; the tail mass
        left out is added to the last value. It must be the same for model and guide.

    Returns:
      The handled callable.

    Raises:
      ValueError: for arguments that are not as above, or that name a site that does not exist; for a site
        that cannot be relaxed; for a model that is relaxed and a guide that is not, or the reverse; for a
        site that is conditioned after it was relaxed: write ``relax(condition(model, data))``.
      TypeError: if a relaxed Categorical is used as an index: use `take`.

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
        self.options: rl.Options = rl.Options(tau, method, kl, {} if config is None else config, num_values)
        self._reset()

    def _again(self, fn):
        o = self.options
        return relax(fn, tau=o.tau, method=o.method, kl=o.kl, config=o.config, num_values=o.num_values)

    def _reset(self):
        self._relaxed = set()  # messages whose site was relaxed here
        self._vectors = {}  # names of relaxed Categorical sites, in order
        self._met = set()  # names of sites
        self._partly = {}  # names of partly observed sites whose values are vectors, and their length

    def __enter__(self) -> None:
        self._reset()
        return super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: Any
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        inside = any(
            isinstance(handler, relax) for handler in npr.active_handlers()
        )  # inside another one, as the body of a scan is
        if exc is None and not inside:
            self.options.check_names(self._met)
        if npr.is_used_as_index(exc) and self._vectors and not isinstance(exc, _NotAnIndex):
            names = ", ".join(map(repr, self._vectors))
            raise _NotAnIndex(
                f"A relaxed Categorical is a vector of weights, not an index (relaxed here: {names}). "
                "Write relaxit_jax.handlers.take(table, z) for table[z]: it takes both."
            ) from exc

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            self._met.add(msg["name"])
        if msg["type"] == "deterministic" and msg["name"] in self._partly:
            self._met.add(msg["name"])
            msg["value"] = jnp.moveaxis(msg["value"], 0, -1)
        elif msg["type"] == "sample" and msg["is_observed"]:
            self._observe_a_part(msg)
        elif msg["type"] == "sample" and wr.is_latent(msg):
            if wr.is_discrete(msg["fn"]):
                self._relax(msg)
            elif msg["value"] is None and not isinstance(msg["infer"], npr.OnReplay):
                # neither substituted nor relaxed by a handler further in
                rl.check_left_alone(msg["name"], wr.innermost(msg["fn"]), self.options)
        super().process_message(msg)

    def _relax(self, msg):
        """Replace the distribution of a site by its relaxation."""
        name = msg["name"]
        if self.options.method_of(name) is None:
            return
        if msg["value"] is None:
            d = wr.innermost(msg["fn"])
            law, method = rl.law_and_method(name, d, self.options)
            if law.kind == "class" and not d.event_dim:
                self._vectors[name] = None
            relaxed = rl.relaxed_site(name, d, law, method, self.options)
            msg["fn"] = wr.rewrap(msg["fn"], lambda _: relaxed)
            msg["infer"] = npr.OnReplay(msg["infer"], _require_relaxed_model)
            self._relaxed.add(id(msg))
        elif npr.comes_from_flow(msg) and npr.runs_cond(self._flow["fn"]):
            raise ValueError(
                f"the site '{name}' is inside a cond, where NumPyro does not replay it. Draw it before the "
                f"cond, or leave it discrete with config={{'{name}': None}}"
            )

    def _observe_a_part(self, msg):
        """The first half of a site with `obs_mask`: NumPyro joins it with the second by ``where(mask, ...)``.

        A mask has no axis for classes. If the second half is a vector of weights, both halves are handed to
        NumPyro with the classes first, and the deterministic site of the two puts them last.
        """
        whole = msg["name"].removesuffix(OBSERVED)
        if not (wr.is_discrete(msg["fn"]) and whole != msg["name"] and npr.is_within_obs_mask()):
            return
        name, d = whole + site.UNOBSERVED, wr.innermost(msg["fn"])
        method = self.options.method_of(name)
        if method is None or rl.is_function(method):
            return
        law, _ = rl.law_and_method(name, d, self.options)
        if law.kind == "class" and not d.event_dim:
            self._partly[whole] = law.log_pmf.shape[-1]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if id(msg) in self._relaxed:
            self._relaxed.remove(id(msg))
            _check_use(msg, self.options.kl)
        super().postprocess_message(msg)
        if msg["type"] != "sample":
            return
        # a `trace` further out already has the value; NumPyro continues with this one
        if msg["is_observed"] and (size := self._partly.get(msg["name"].removesuffix(OBSERVED))):
            msg["value"] = jnp.moveaxis(jax.nn.one_hot(msg["value"], size), -1, 0)
        elif not msg["is_observed"] and msg["name"].removesuffix(site.UNOBSERVED) in self._partly:
            msg["value"] = jnp.moveaxis(msg["value"], -1, 0)


def _require_relaxed_model():
    """Require that the model is relaxed if a relaxed site of the guide is handed to it."""
    if not any(isinstance(handler, relax) for handler in npr.active_handlers()):
        raise ValueError("a site is relaxed in the guide, not in the model: wrap the model in relax as well")


def _check_use(msg, kl):
    """Refuse a relaxed site that is conditioned, or replayed from a guide that was not relaxed."""
    name = f"the site '{msg['name']}'"
    if msg["is_observed"]:
        raise ValueError(
            f"{name} is conditioned after it was relaxed: write relax(condition(model, data)), not "
            "condition(relax(model), data)"
        )
    source = npr.replayed_site(msg["value"])
    if source is None:
        return
    guide = wr.innermost(source["fn"])
    if wr.is_discrete(guide):
        raise ValueError(f"{name} is relaxed in the model, not in the guide: wrap the guide in relax as well")
    if isinstance(guide, Delta):
        raise ValueError(
            f"{name} has a point estimate in the guide, but a relaxed density has no maximum. Give the "
            "guide a discrete distribution there, as AutoMeanField does"
        )
    if isinstance(guide, site.Relaxed) != (kl == "discrete"):
        raise ValueError(
            f"{name} must be relaxed in the same way in model and guide, got kl={kl!r} in the model and a "
            f"{type(guide).__name__} in the guide. Give the guide a discrete distribution there, and relax "
            "it with the same kl"
        )


class _NotAnIndex(TypeError):
    """A relaxed value where NumPyro or the model needs an integer."""
