"""The relaxation of one site in `relax`: its options, the finite law of the site, and the relaxed law."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.distributions import Distribution

from relaxit_jax import _arguments as arg
from relaxit_jax import distributions as rd
from relaxit_jax.distributions import _sampler_distribution as sd
from relaxit_jax.distributions._gate import Gate
from relaxit_jax.handlers import _site as site

METHODS = {
    "relaxed": {
        "bit": rd.RelaxedBernoulli,
        "class": rd.GumbelSoftmax,
        "count": rd.GeneralizedGumbelSoftmax,
    },
    "straight_through": {
        "bit": rd.StraightThroughRelaxedBernoulli,
        "class": rd.StraightThroughGumbelSoftmax,
        "count": functools.partial(rd.GeneralizedGumbelSoftmax, hard=True),
    },
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `relax`, checked."""

    tau: ArrayLike
    method: Any  # a key of METHODS, or a class
    kl: Any
    config: Mapping[str, Any]
    num_values: int | Mapping[str, int] | None

    def __post_init__(self) -> None:
        shape = arg.as_tau(self.tau, jnp.float32).shape
        arg.require(shape == (), "tau", "a scalar", f"shape {shape}")
        arg.require_choice("kl", self.kl, ("discrete", "relaxed"))
        _check_method("method", self.method)
        need = "a dictionary from names of sites to methods"
        arg.require(isinstance(self.config, Mapping), "config", need, arg.shown(self.config))
        for name, own in self.config.items():
            if not (own is None or is_function(own) or (isinstance(own, str) and own == "one_hot")):
                _check_method(f"config['{name}']", own)
        site.check_num_values(self.num_values)

    def method_of(self, name: str) -> Any:
        """The method of a site, or None to leave it as it is."""
        return site.entry(self.config, name, self.method)

    def has_own_method(self, name: str) -> bool:
        return site.entry(self.config, name) is not None

    def check_names(self, met: Collection[str]) -> None:
        """Check that the sites in the options exist."""
        check_names("config", self.config, met)
        check_names("num_values", self.num_values, met)


def check_names(option: str, table: Any, met: Collection[str]) -> None:
    """Check that the sites in a table exist."""
    # the guide of a site with obs_mask has only its unobserved part
    known = set(met) | {name.removesuffix(site.UNOBSERVED) for name in met}
    unknown = set(table) - known if isinstance(table, Mapping) else ()
    need = f"names of the sites {sorted(met)}"
    arg.require(not unknown, option, need, ", ".join(sorted(map(repr, unknown))))


def is_function(method: Any) -> bool:
    """Whether a method of a site is a function of its distribution, neither a name nor a class."""
    return callable(method) and not isinstance(method, type)


def _check_method(name, method):
    need = (
        f"one of {', '.join(map(repr, METHODS))} or a class of relaxit_jax.distributions with logits and tau"
    )
    known = method in METHODS if isinstance(method, str) else _takes_logits(method)
    arg.require(known, name, need, arg.shown(method))


def _takes_logits(kind):
    return (
        isinstance(kind, type)
        and issubclass(kind, sd.SamplerDistribution)
        and set(kind.arg_constraints) <= {"logits", "values", "tau"}
        and "k" not in kind.pytree_aux_fields
        and kind is not rd.OneHotCategorical
    )


def law_and_method(name: str, d: Distribution, options: Options) -> tuple[site.Law, Any]:
    """The finite law of a site, as classes if the method makes vectors of it; and the method."""
    law, method = site.law_of(name, d, options.num_values), options.method_of(name)
    if isinstance(method, str) and method == "one_hot":
        method = METHODS[options.method]["class"] if isinstance(options.method, str) else options.method
        need = "something other than 'one_hot' if the method draws numbers"
        arg.require(_is_one_hot(method), f"config['{name}']", need, f"method={method.__name__}")
    # a method for all sites does not make vectors of bits and counts
    as_vector = options.has_own_method(name) and _is_one_hot(method)
    return (site.as_classes(name, law) if as_vector else law), method


def check_left_alone(name: str, d: Distribution, options: Options) -> None:
    """Check that no option was given for a site that is not discrete, which relax leaves as it is."""
    if options.has_own_method(name):
        raise ValueError(
            f"config['{name}'] must be None or left out: relax leaves {type(d).__name__} as it is. To use "
            "another distribution, write it into the model and the guide"
        )
    if isinstance(options.num_values, Mapping):
        given = site.num_values_of(options.num_values, name)
        need = f"left out, as relax leaves {type(d).__name__} as it is"
        arg.require(given is None, f"num_values['{name}']", need, given)


def _is_one_hot(kind):
    return isinstance(kind, type) and issubclass(kind, sd.OneHot)


def relaxed_site(name: str, d: Distribution, law: site.Law, method: Any, options: Options) -> Distribution:
    """The distribution that replaces a discrete one with this law in a model."""
    relaxation = method(d) if is_function(method) else _relaxation(name, law, method, options.tau)
    event = law.log_pmf.shape[-1:] if law.kind == "class" else ()
    need = (
        f"a relaxation of batch shape {d.batch_shape} and event shape {event} for the site '{name}' "
        "(write one of another shape into model and guide)"
    )
    fits = isinstance(relaxation, Distribution)
    got = (relaxation.batch_shape, relaxation.event_shape) if fits else type(relaxation).__name__
    arg.require(got == (d.batch_shape, event), "config", need, got)
    if options.kl == "discrete":
        return site.Relaxed(relaxation, law.log_pmf, law.values)
    need = f"'discrete' for the site '{name}', as {type(relaxation).__name__} has no density"
    discrete = law.kind == "count" or not (relaxation.has_rsample or isinstance(relaxation, Gate))
    has_density = getattr(relaxation, "_density", True) is not None
    arg.require(has_density and not discrete, "kl", need, "'relaxed'")
    return relaxation


def _relaxation(name, law, method, tau):
    """The relaxation of a law with a method of the library."""
    kind = METHODS[method][law.kind] if isinstance(method, str) else method
    given = {"logits": law.logits, "values": law.values, "tau": jnp.asarray(tau)}
    cls = getattr(kind, "func", kind)
    taken = {key: given[key] for key in cls.arg_constraints}
    complete = all(x is not None for x in taken.values())
    arg.require(complete, f"method of the site '{name}'", f"one for a {law.kind}", cls.__name__)
    return kind(**taken, validate_args=False)
