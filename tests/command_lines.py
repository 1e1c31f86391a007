"""Run the examples as their command lines are, with tiny settings and data."""

import json
import pathlib
import sys

import numpy as np
import pytest

import common
import vae

TAU = 0.7
EXAMPLES = pathlib.Path(vae.__file__).parent


TINY = ["--hidden", 8, "--latents", 3, "--variables", 2, "--classes", 3, "--batch-size", 16, "--no-augment"]


def run(*arguments, example=vae):
    """The exit code of an example's command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{example.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            common.run(example.main)
    return exit.value.code or 0


def read(out):
    metrics = json.loads((out / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key != "timing"}


def bars():
    """Fifty images of 4 x 4 pixels: bars at random places."""
    rng = np.random.default_rng(0)
    data = np.zeros((50, 4, 4), np.float32)
    data[np.arange(50), rng.integers(0, 4, 50)] = 1
    data = np.where(rng.random((50, 1, 1)) < 0.5, data, data.swapaxes(1, 2))
    return np.abs(data - (rng.random(data.shape) < 0.05))


def tiny(method, **changes):
    settings = {
        "data": "", "epochs": 12, "seed": 3, "latents": 3, "variables": 2, "classes": 3, "subset_size": 2,
        "largest_mean": 3.0, "correlation": "identity", "samples": None, "tau_start": TAU,
        "tau_end": TAU, "hidden": (8,), "activation": "tanh", "prior": "learned", "augment": False,
        "centre": True, "batch_size": 16, "learning_rate": 0.02, "schedule": "constant",
    }  # fmt: skip
    return vae.Config(method=method, **settings | changes)
