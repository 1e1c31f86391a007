"""Save the states of a run after each epoch: a kill leaves them whole or absent, and damage is detected."""

import hashlib
import json
import shutil

import click
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from common import UserError

KEPT = 3  # number of checkpoints in the folder


class Checkpoints:
    """A folder with one checkpoint per epoch, named by its number.

    Orbax writes the state. Next to it, run.json has the epoch, the settings and the history, and sha256 the
    digest of all these files. A checkpoint gets its name when it is complete.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.aside = folder.parent / "damaged"
        for path in (folder, self.aside):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, which would lead files out of {folder.parent}; remove it, or choose "
                    "another folder with --out"
                )
        folder.mkdir(parents=True, exist_ok=True)
        together = jax.process_count() > 1  # then one process writes, and waits for nobody
        self.orbax = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(),
                active_processes={jax.process_index()} if together else None,
                barrier_sync_key_prefix="checkpoints" if together else None,
            ),
        )

    def epochs(self):
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def save(self, epoch, state, history):
        content = {"epoch": epoch, "settings": self.settings, "history": history}
        new = self.folder / "new"
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            arrays = [np.asarray(x) for x in jax.tree.leaves(state)]
            reserve(new / "reserved", 2 * sum(x.nbytes for x in arrays) + 2**14 * (8 + len(arrays)))
            self.orbax.save(new / "state", args=ocp.args.StandardSave(arrays))
            (new / "run.json").write_text(json.dumps(content))
            (new / "sha256").write_text(digest(new))
            new.rename(self.folder / str(epoch))
        except Exception as error:  # from the file system, or from Orbax, which reports one
            shutil.rmtree(new, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint of epoch {epoch + 1} ({reason(error)}); make room, then "
                "continue after the last one with --resume and this --out"
            ) from error
        for old in self.epochs()[:-KEPT]:
            shutil.rmtree(self.folder / str(old))

    def restore(self, like):
        """The last good (epoch, state, history); damaged ones are moved aside, with a warning.

        A run that was stopped before its first checkpoint starts again: (-1, like, []).
        """
        for epoch in reversed(self.epochs()):
            try:
                content = self.verified(epoch)
            except Exception as error:
                self.move_aside(epoch, error)
                continue
            self.compare(content["settings"])
            return epoch, self.state(epoch, like), content["history"]
        if self.aside.exists():
            raise UserError(f"every checkpoint in {self.folder} is damaged; start again in another --out")
        return -1, like, []

    def verified(self, epoch):
        """The contents of run.json, if all files are as they were written."""
        folder = self.folder / str(epoch)
        if (folder / "sha256").read_bytes() != digest(folder).encode():
            raise ValueError("its digest does not match")
        content = json.loads((folder / "run.json").read_text())
        if content["epoch"] != epoch:
            raise ValueError(f"it belongs to epoch {content['epoch']}")
        return content

    def state(self, epoch, like):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(np.asarray, jax.tree.leaves(like))]
        try:
            arrays = self.orbax.restore(
                self.folder / str(epoch) / "state", args=ocp.args.StandardRestore(shapes)
            )
        except Exception as error:
            raise UserError(
                f"checkpoint {epoch} in {self.folder} is whole and cannot be read ({reason(error)}); resume "
                "with the versions that wrote it"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(x) for x in arrays])

    def move_aside(self, epoch, error):
        aside = self.aside / f"epoch-{epoch}"
        click.echo(f"warning: checkpoint {epoch} is damaged ({reason(error)}); moved to {aside}", err=True)
        self.aside.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(epoch)).rename(aside)

    def compare(self, settings):
        differing = [key for key, value in self.settings.items() if settings.get(key) != value]
        if differing:
            raise UserError(
                f"the run in {self.folder.parent} has other settings: "
                + ", ".join(f"{key} {settings.get(key)!r}" for key in differing)
                + "; give the same ones to resume it"
            )


def reserve(path, size):
    """Check that this much can be written; if not, Orbax's threads would print pages of tracebacks."""
    with open(path, "xb") as stream:
        stream.write(bytes(size))
    path.unlink()


def digest(folder):
    """The digest of the names and contents of all files except the file that holds it."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "sha256":
            content = path.read_bytes()
            total.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return total.hexdigest()


def reason(error):
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:80] or type(error).__name__
