"""The versions that a result was recorded with: recorders store them, pages print them below the result."""

import importlib.metadata
import os
import platform
import time

import jax

NAMES = {"python": "Python", "jax": "JAX", "numpyro": "NumPyro"}


def versions():
    """Python, JAX and NumPyro, the kind of machine, and the date."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "numpyro")}
    return {"python": platform.python_version()} | packages | {"machine": machine(), "date": today()}


def machine():
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU core" + "s" * (cores != 1)


def today():
    return time.strftime("%Y-%m-%d", time.gmtime())


def sentence(found):
    """The line that a page prints. Old results lack the versions that nobody recorded."""
    packages = ", ".join(f"{name} {found[key]}" for key, name in NAMES.items() if key in found)
    return f"Recorded with {packages} on {found['machine']}, {found['date']}."
