"""Data-parallel training on all devices of this process and of others, with JAX's own distribution.

The batch is split over a mesh of all devices; everything else is replicated on each of them. Random numbers
are drawn as for the whole batch, wherever its parts are drawn, so a run has the same losses on any number of
devices. If a process is lost, the others cannot continue: they end with a message, and the last checkpoint
stays. If one has different settings or data, or cannot start, all end with a line that says so.
"""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
from typing import NamedTuple

import click
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common import UserError

LETTERS = 1 << 14  # letters of a message from one process to the others
LOST = 3  # exit code of a process that has lost another
STATUS = r"[A-Z_]+: "  # the start of the ValueError of a collective whose other end is gone
SILENCE = 30  # seconds without a sign of life, after which a process counts as lost


class Cluster(NamedTuple):
    """The devices that train together, and which of the processes this is."""

    mesh: Mesh
    process: int = 0
    processes: int = 1

    @property
    def leads(self):
        """Whether this process writes the files."""
        return self.process == 0

    def everywhere(self, tree):
        """Put the same values on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split(self, batch):
        """Inside a compiled function: split the first axis over the devices."""
        return jax.lax.with_sharding_constraint(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def share(self, state, text):
        """State and text of the leading process, on the devices of all processes."""
        if self.processes > 1:
            share = multihost_utils.broadcast_one_to_all
            letters = np.frombuffer(text.encode(), np.uint8)
            size = int(share(np.int64(letters.size)))  # all have to know it first
            letters = share(letters if self.leads else np.zeros(size, np.uint8))
            text = np.asarray(letters, np.uint8).tobytes().decode()
            state = share(jax.tree.map(np.asarray, state))
        return self.everywhere(state), text

    def together(self, action, *args):
        """Return the result of the action. A UserError in one process ends all of them with its line."""
        result = problem = None
        try:
            result = action(*args)
        except UserError as error:
            if self.processes == 1:
                raise
            problem = error.message[:1000]
        for process, other in enumerate(self.ask(problem)):
            if other is not None:
                where = "" if process == self.process else f"process {process}: "
                raise UserError(where + other)
        return result

    def agree(self, settings):
        """Check that all processes have these settings, or end all with the line that names the others."""
        everyone = self.ask(settings)
        differing = [name for name in everyone[0] if any(x[name] != everyone[0][name] for x in everyone)]
        if differing:
            said = "; ".join(
                f"{name} is " + ", ".join(f"{x[name]!r} in process {i}" for i, x in enumerate(everyone))
                for name in differing
            )
            raise UserError(f"the processes have different settings: {said}; give the same ones to all")

    def ask(self, said):
        """The answers of all processes, in order."""
        if self.processes == 1:
            return [said]
        letters = np.frombuffer(json.dumps(said).encode().ljust(LETTERS), np.uint8)
        rows, stack = stacked(self.processes)
        letters = stack(jax.make_array_from_process_local_data(rows, letters[None]))
        return [json.loads(bytes(row)) for row in np.asarray(letters.addressable_data(0))]

    def describe(self):
        kind = self.mesh.devices.flat[0].device_kind
        return {"devices": self.mesh.size, "processes": self.processes, "kind": kind}


@functools.cache
def stacked(processes):
    """The layout for one row from each process, and a function that gives all of them to each.

    One device of each process takes part, since they may differ in how many they have.
    """
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[i] for i in range(processes)]), ("process",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("process")), jax.jit(lambda x: x, out_shardings=everywhere)


def take_options(options):
    """The values of `device_options`, taken out of all options of a command."""
    names = ("devices", "coordinator", "num_processes", "process_id", "join_timeout")
    return {name: options.pop(name) for name in names}


def alone():
    """One device, the first."""
    return Cluster(mesh_of(jax.local_devices()[:1]))


def mesh_of(devices):
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def device_options(command):
    """--devices, --coordinator, --num-processes and --process-id."""
    options = [
        click.option(
            "--devices", type=click.IntRange(1, 1024), metavar="N", show_default=False,
            help="Number of devices of this process that share each batch; on a CPU they are virtual.  "
            "[default: all that JAX sees]",
        ),
        click.option(
            "--coordinator", metavar="HOST:PORT", callback=address,
            help="Train together with other processes: the address where process 0 listens. Start the same "
            "command in each, with its own --process-id; process 0 alone reads and writes files.",
        ),
        click.option(
            "--num-processes", type=click.IntRange(1, 4096), metavar="P", help="Number of processes."
        ),
        click.option(
            "--process-id", type=click.IntRange(0, 4095), metavar="I",
            help="Number of this process, from 0 to P - 1.",
        ),
        click.option(
            "--join-timeout", type=click.IntRange(1, 86400), default=120, metavar="SECONDS",
            help="Time to wait for the other processes at the start.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def address(context, parameter, value):
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if host and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536:
        return value
    raise click.BadParameter(f"{value!r} is not HOST:PORT, such as 127.0.0.1:29500")


def join(*, devices, coordinator, num_processes, process_id, join_timeout):
    """The cluster for these options. Call this before anything is computed."""
    together = (coordinator, num_processes, process_id)
    if any(x is None for x in together) and any(x is not None for x in together):
        raise UserError("--coordinator, --num-processes and --process-id belong together; give all or none")
    if coordinator is not None and process_id >= num_processes:
        raise UserError(
            f"--process-id {process_id} is not below --num-processes {num_processes}; count from 0"
        )
    if devices:
        with contextlib.suppress(RuntimeError):  # too late if JAX has started, as in a notebook
            jax.config.update("jax_num_cpu_devices", devices)
    if coordinator is not None:
        meet(coordinator, num_processes, process_id, join_timeout)
    here = jax.local_devices()
    cluster = Cluster(None, process_id or 0, num_processes or 1)
    with guarded(cluster):
        cluster.together(check_devices, devices, len(here))
        cluster.agree({"devices": devices or len(here)})
    if coordinator is None:
        return Cluster(mesh_of(here[:devices]))
    # equally many from each process, in the order of the processes
    chosen = [
        device
        for process in range(num_processes)
        for device in [d for d in jax.devices() if d.process_index == process][:devices]
    ]
    return cluster._replace(mesh=mesh_of(chosen))


def check_devices(wanted, seen):
    if wanted and wanted > seen:
        raise UserError(f"--devices {wanted} is above the {seen} that JAX sees here; lower it")


def check_port(coordinator):
    """Check that only process 0 listens: JAX would share the port, and other runs could join."""
    port = coordinator.rpartition(":")[2]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"cannot listen at port {port} of --coordinator {coordinator} ({error.strerror}); give "
                "another port to all processes"
            ) from error


def meet(coordinator, num_processes, process_id, seconds):
    """Join the other processes; JAX ends this one if they do not come."""
    if process_id == 0:
        check_port(coordinator)
    with last_words(
        f"error: the {num_processes} processes did not meet at {coordinator} within {seconds} s; start all "
        "of them with that address, each with a --process-id of its own, or raise --join-timeout"
    ):
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=seconds,
            heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=2 * SILENCE,
        )  # fmt: skip


SPEAKER = """
import sys
if sys.stdin.buffer.read() != b"done":
    print(sys.argv[1], file=sys.stderr, flush=True)
"""


@contextlib.contextmanager
def last_words(message):
    """Print the message if this process ends inside, even abruptly.

    JAX aborts a process that has lost another one, without a message that users understand. So a small
    process next to it prints the message when the pipe to it breaks. Yields a function that prints it right
    away.
    """
    command = [sys.executable, "-c", SPEAKER, message]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as speaker:

        def speak():
            speaker.stdin.close()
            speaker.wait()

        try:
            yield speak
        finally:  # its own error has its own message
            if not speaker.stdin.closed:
                speaker.stdin.write(b"done")


@contextlib.contextmanager
def guarded(cluster, out=None):
    """If a process of the cluster is lost inside, end the others with a message that says what to do."""
    if cluster.processes == 1:
        yield
        return
    message = (
        f"error: process {cluster.process} of {cluster.processes} ended before its time: it or another one "
        "was lost; start all processes again"
    )
    if out is not None:
        message += f" with --resume and that --out, to continue after the last checkpoint in {out}"
    with last_words(message) as speak:
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as reason:
            if isinstance(reason, ValueError) and not re.match(STATUS, str(reason)):
                raise
            click.echo(f"\n{str(reason).splitlines()[0][:200]}", err=True)
            speak()
            os._exit(LOST)  # the usual exit would wait for the others
