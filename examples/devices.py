"""Data-parallel training on all devices of this process and of others, by JAX's own distribution.

The batch is split over a mesh of all devices, everything else is on each of them. Random numbers are those
of the whole batch, wherever its parts are drawn, so that a run has the same losses on any number of devices.
Where a process is lost, the others cannot go on: they end with a message, and the last checkpoint stays.
"""

import contextlib
import os
import subprocess
import sys
from typing import NamedTuple

import click
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common import UserError

LOST = 3  # exit code of a process that has lost another
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
        """The same values on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split(self, batch):
        """Inside of a compiled function: the first axis split over the devices."""
        return jax.lax.with_sharding_constraint(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def share(self, state, text):
        """State and text of the leading process, on the devices of all."""
        if self.processes > 1:
            share = multihost_utils.broadcast_one_to_all
            letters = np.frombuffer(text.encode(), np.uint8)
            size = int(share(np.int64(letters.size)))  # all have to know it first
            letters = share(letters if self.leads else np.zeros(size, np.uint8))
            text = np.asarray(letters, np.uint8).tobytes().decode()
            state = share(jax.tree.map(np.asarray, state))
        return self.everywhere(state), text

    def describe(self):
        kind = self.mesh.devices.flat[0].device_kind
        return {"devices": self.mesh.size, "processes": self.processes, "kind": kind}


def take_options(options):
    """Those of `device_options`, taken out of all options of a command."""
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
            "--devices", type=click.IntRange(min=1), metavar="N", show_default=False,
            help="Devices of this process that share each batch; of a CPU, that many virtual ones are made.  "
            "[default: all that JAX sees]",
        ),
        click.option(
            "--coordinator", metavar="HOST:PORT", callback=address,
            help="Train together with other processes: the address where process 0 listens. Start the same "
            "command in each, with its own --process-id; process 0 alone reads and writes files.",
        ),
        click.option("--num-processes", type=click.IntRange(min=1), metavar="P", help="How many there are."),
        click.option(
            "--process-id", type=click.IntRange(min=0), metavar="I", help="Which this is, from 0 to P - 1."
        ),
        click.option(
            "--join-timeout", type=click.IntRange(min=1), default=120, metavar="SECONDS",
            help="How long to wait for the other processes at the start.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def address(context, parameter, value):
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if host and port.isdigit() and 0 < int(port) < 65536:
        return value
    raise click.BadParameter(f"{value!r} is not HOST:PORT, such as 127.0.0.1:29500")


def join(*, devices, coordinator, num_processes, process_id, join_timeout):
    """The cluster of these options. To be called before anything is computed."""
    together = (coordinator, num_processes, process_id)
    if any(x is None for x in together) and any(x is not None for x in together):
        raise UserError("--coordinator, --num-processes and --process-id belong together; give all or none")
    if coordinator is not None and process_id >= num_processes:
        raise UserError(
            f"--process-id {process_id} is not below --num-processes {num_processes}; count from 0"
        )
    if devices:
        with contextlib.suppress(RuntimeError):  # too late where JAX has started, as in a notebook
            jax.config.update("jax_num_cpu_devices", devices)
    if coordinator is not None:
        meet(coordinator, num_processes, process_id, join_timeout)
    here = jax.local_devices()
    if devices and devices > len(here):
        raise UserError(f"--devices {devices} is above the {len(here)} that JAX sees here; lower it")
    if coordinator is None:
        return Cluster(mesh_of(here[:devices]))
    # as many of each process, in the order of the processes
    counts = multihost_utils.process_allgather(np.int64(devices or len(here)))
    if len(set(counts.tolist())) > 1:
        raise UserError(f"the processes have {counts.tolist()} devices; give the same --devices to all")
    chosen = [
        device
        for process in range(num_processes)
        for device in [d for d in jax.devices() if d.process_index == process][:devices]
    ]
    return Cluster(mesh_of(chosen), process_id, num_processes)


def meet(coordinator, num_processes, process_id, seconds):
    """Join the other processes; JAX ends this one if they do not come."""
    with last_words(
        f"error: the {num_processes} processes did not meet at {coordinator} within {seconds} s; start all "
        "of them with that address, or raise --join-timeout"
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
    """Print the message if this process ends inside, be it at once.

    JAX aborts a process whose fellows it has lost, without a word that users understand: so a small process
    beside it speaks when the pipe to it breaks. Yields a function that has it speak now.
    """
    command = [sys.executable, "-c", SPEAKER, message]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as speaker:

        def speak():
            speaker.stdin.close()
            speaker.wait()

        try:
            yield speak
        finally:  # an error of its own has its own words
            if not speaker.stdin.closed:
                speaker.stdin.write(b"done")


@contextlib.contextmanager
def guarded(cluster, out):
    """If a process of the cluster is lost inside, the others end, with a word that says what to do."""
    if cluster.processes == 1:
        yield
        return
    where = f"in {out}" if cluster.leads else "in the folder of process 0"
    message = (
        f"error: process {cluster.process} of {cluster.processes} ended before its time: it or another one "
        f"was lost; the checkpoints are {where}: start all processes again with --resume and that --out, to "
        "continue from the last one"
    )
    with last_words(message) as speak:
        try:
            yield
        except jax.errors.JaxRuntimeError as reason:  # of a collective whose other end is gone
            click.echo(f"\n{str(reason).splitlines()[0][:200]}", err=True)
            speak()
            os._exit(LOST)  # the usual end would wait for the others
