"""All names of NumPyro that are private, or that the library uses beyond their documentation.

Each has a comment that says what is relied upon, and a test in tests/test_numpyro_names.py that fails with
NumPyro's version in its message when a release changes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.handlers import replay
from numpyro.primitives import _PYRO_STACK, _masked_observe
from numpyro.util import _validate_model

# Warns if a model's plates and sites do not fit together, as NumPyro's own ELBOs do.
validate_model = _validate_model


def active_handlers() -> Iterator[Any]:
    """The handlers around the running code, innermost first: NumPyro keeps them in one list."""
    return reversed(_PYRO_STACK)


def replayed_site(value: Any) -> dict[str, Any] | None:
    """The guide's site with this value: `replay` has the guide's trace, and hands on the same objects."""
    for handler in active_handlers():
        if isinstance(handler, replay):
            for site in handler.trace.values():
                if site["type"] == "sample" and site["value"] is value:
                    return site
    return None


# A control flow is a message of type "control_flow" whose function is one of these two wrappers.


def runs_scan(fn: Any) -> bool:
    return fn is scan_wrapper


def runs_cond(fn: Any) -> bool:
    return fn is cond_wrapper


def wrap_scan_body(msg: dict[str, Any], around: Callable[[Any], Any]) -> None:
    """Put a handler around the body of a scan, its first argument: handlers outside do not reach inside."""
    body, *rest = msg["args"]
    msg["args"] = (around(body), *rest)


def is_reverse(scan: dict[str, Any]) -> bool:
    """Whether a scan begins at the end of its arrays: the fifth argument of its wrapper."""
    return bool(scan["args"][4])


def comes_from_flow(msg: dict[str, Any]) -> bool:
    """Whether a site comes out of a finished control flow, whose sites pass through the handlers again."""
    return bool(msg.get("_control_flow_done"))


def is_subsampled(msg: dict[str, Any]) -> bool:
    """Whether a plate shows only some elements: its arguments begin with its size and the subsample's."""
    size, subsample = msg["args"][:2]
    return subsample not in (None, size)


def require_same_rows(msg: dict[str, Any], subsampled: set[str]) -> None:
    """Refuse a site in a plate that is subsampled inside a scan: `replay` does not hand on its indices."""
    if any(frame.name in subsampled for frame in msg["cond_indep_stack"]):
        raise ValueError(
            f"The site '{msg['name']}' is in a subsampled plate inside a scan, where NumPyro draws "
            "different indices for the model and the guide. Subsample before the scan."
        )


def require_right_order(msg: dict[str, Any], scan: dict[str, Any] | None) -> None:
    """Refuse a latent site in a scan of the model that runs backward.

    `replay` hands the guide's first value to the step that runs first, which belongs to the last element.
    """
    latent = msg["type"] == "sample" and not msg["is_observed"] and comes_from_flow(msg)
    if latent and scan is not None and runs_scan(scan["fn"]) and is_reverse(scan):
        raise ValueError(
            f"The site '{msg['name']}' is in a scan of the model with reverse=True, where NumPyro hands the "
            "guide's values to the steps in the wrong order. Reverse the arrays and scan forward."
        )


def is_replaying() -> bool:
    """Whether the running code is a model under `replay`; a guide may scan backward."""
    return any(isinstance(handler, replay) for handler in active_handlers())


def scan_index(infer: dict[str, Any]) -> Any:
    """The step of a scan that replays one element of a value, but gets all of the intermediates."""
    return infer.get("_scan_current_index")


def is_within_obs_mask() -> bool:
    """Whether the current site is one half of a site with `obs_mask`, which this function splits."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _masked_observe.__code__:
            return True
        frame = frame.f_back
    return False


class OnReplay(dict):
    """The `infer` of a guide's site. `replay` copies it when it hands the site's value to the model."""

    def __init__(self, infer: dict[str, Any], check: Callable[[], None]) -> None:
        super().__init__(infer)
        self.check = check

    def copy(self) -> dict[str, Any]:
        replays = [handler for handler in active_handlers() if hasattr(handler, "trace")]
        if any(site.get("infer") is self for handler in replays for site in handler.trace.values()):
            self.check()
        return dict(self)


# What JAX, NumPy and Python say when a vector of floats is used as an index.
_AS_INDEX = (
    r"Indexer must have|indices must|used as indices|nly integer|list indices|__(index|array)__.* float"
)


def is_used_as_index(error: BaseException | None) -> bool:
    return isinstance(error, (TypeError, IndexError, ValueError)) and bool(re.search(_AS_INDEX, str(error)))
