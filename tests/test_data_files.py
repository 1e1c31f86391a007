"""However an .npz file is broken, the error is one line, and nothing in it is executed."""

import gzip
import io
import os
import pickle
import struct
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pytest

import common

pytestmark = pytest.mark.whole

IMAGES = np.random.default_rng(0).random((10, 2, 3), np.float32)


def refused(path):
    """The error line, which names the file."""
    with pytest.raises(common.UserError) as error:
        common.load_images(str(path))
    assert str(path) in error.value.message and "\n" not in error.value.message
    return error.value.message


@pytest.fixture
def path(tmp_path):
    """A good file, to be broken."""
    path = tmp_path / "images.npz"
    np.savez(path, images=IMAGES)
    np.testing.assert_array_equal(common.load_images(str(path)), IMAGES)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(text, version=(2, 0)):
    return b"\x93NUMPY" + bytes(version) + struct.pack("<I", len(text)) + text.encode()


def zipped(path, content, method=zipfile.ZIP_STORED, name="images.npy"):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, content)


def test_another_kind_of_file_under_that_name(path):
    picture = io.BytesIO()
    plt.imsave(picture, IMAGES[0])
    kinds = (npy(IMAGES), picture.getvalue(), b"text", b"\0" * 100, b"", b"PK\x05\x06" + b"\0" * 18)
    for content in (*kinds, pickle.dumps(IMAGES)):
        path.write_bytes(content)
        assert "is not a readable .npz file" in refused(path) or "holds arrays named []" in refused(path)


def test_cut_anywhere(path):
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        assert "is not a readable .npz file" in refused(path)


def test_a_changed_bit_is_noticed_or_changes_nothing(path):
    """The archive has dates and names that nobody reads; the pixels have a checksum."""
    content, noticed = path.read_bytes(), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            np.testing.assert_array_equal(common.load_images(str(path)), IMAGES)
        except common.UserError:
            noticed += 1
    assert noticed > IMAGES.nbytes


@pytest.mark.parametrize(
    ("local", "central", "value", "words"),
    [
        (6, 8, 1, "encrypted"),
        (8, 10, 9, "compression"),  # Deflate64
        (8, 10, 99, "compression"),
        (8, 10, zipfile.ZIP_DEFLATED, ""),  # of data that are not
        (8, 10, zipfile.ZIP_BZIP2, ""),
        (8, 10, zipfile.ZIP_LZMA, ""),
    ],
)
def test_encrypted_or_of_another_compression(local, central, value, words, path):
    """The test changes fields of the archive's two headers of a file: flags and method."""
    content = bytearray(path.read_bytes())
    for start, place in ((0, local), (content.index(b"PK\x01\x02"), central)):
        content[start + place : start + place + 2] = struct.pack("<H", value)
    path.write_bytes(content)
    message = refused(path)
    assert "is not a readable .npz file" in message and words in message


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_whatever_python_decompresses_is_read(method, path):
    zipped(path, npy(IMAGES), method)
    np.testing.assert_array_equal(common.load_images(str(path)), IMAGES)


def test_headers_that_lie(path):
    for shape in ((10, 10**9, 10**9), (10, 2, 4), (-1, 2, 3), (10, 2, 10**9), (10**18, 28, 28), "(1,"):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        for long in ("", " " * 200_000):
            zipped(path, header(text + long + "\n") + IMAGES.tobytes())
            assert "is not a readable .npz file" in refused(path)


class Trap:
    """Unpickling it creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_is_unpickled(path, tmp_path):
    trap = Trap(tmp_path / "sprung")
    objects = np.array([trap] * 10, object).reshape(10, 1, 1)
    for content in (npy(objects), pickle.dumps(trap)):
        zipped(path, content)
        refused(path)
        path.write_bytes(content)
        refused(path)
    assert not trap.folder.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.folder.exists()  # it was a trap


def test_what_is_no_regular_file(tmp_path):
    """Reading a pipe would wait forever."""
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        assert "no regular file" in refused(tmp_path / f"{name}.npz")
    (tmp_path / "folder.npz").mkdir()  # taken as one of IDX files
    assert "there is no file" in refused(tmp_path / "folder.npz")
    (tmp_path / "nowhere.npz").symlink_to(tmp_path / "absent")
    assert "there is no file" in refused(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("was_there", [True, False])
def test_a_download_that_fails_leaves_nothing_behind(was_there, monkeypatch, tmp_path):
    home = tmp_path / "scikit_learn_data"
    if was_there:
        (home / "other").mkdir(parents=True)

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(home))
    monkeypatch.setattr("sklearn.datasets._openml.urlopen", offline)
    with pytest.raises(common.UserError, match="cannot download MNIST"):
        common.load_images("mnist")
    assert home.exists() == was_there == (home / "other").exists()


@pytest.fixture
def folder(tmp_path):
    """IDX files of bytes; the test files are gzipped."""
    rng = np.random.default_rng(1)
    for count, (images, labels) in zip((20, 10), common.IDX_FILES, strict=True):
        for name, shape in ((images, (count, 3, 2)), (labels, (count,))):
            content = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
            content += rng.integers(256, size=shape, dtype=np.uint8).tobytes()
            if count == 20:
                (tmp_path / name).write_bytes(content)
            else:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def test_a_folder_of_idx_files(folder):
    (training, labels), (test, test_labels) = common.read_idx_folder(folder)
    raw = (folder / "train-images-idx3-ubyte").read_bytes()[16:]
    np.testing.assert_array_equal(training.ravel() * 255, np.frombuffer(raw, np.uint8))
    assert training.shape == (20, 3, 2) and test.shape == (10, 3, 2)
    assert labels.shape == (20,) and test_labels.shape == (10,)
    split = common.load_split(str(folder))
    np.testing.assert_array_equal(split[0], training)
    np.testing.assert_array_equal(split[1], test)
    np.testing.assert_array_equal(common.load_images(str(folder)), np.concatenate([training, test]))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte", None, "there is no file"),
        ("train-images-idx3-ubyte", lambda x: x[:-1], "holds 119 values, but its header says 120"),
        ("train-images-idx3-ubyte", lambda x: x[:7], "is no IDX file of bytes with 3 axes"),
        ("train-labels-idx1-ubyte", lambda x: b"\0\0\x0d\x01" + x[4:], "is no IDX file of bytes with 1 axes"),
        ("train-labels-idx1-ubyte", lambda x: x[:4] + b"\0\0\0\x13" + x[9:], "20 images and"),
        ("t10k-images-idx3-ubyte.gz", lambda x: x[:30], "download it again"),
        ("t10k-images-idx3-ubyte.gz", lambda x: b"text", "download it again"),
    ],
)
def test_what_is_wrong_with_an_idx_file(name, change, words, folder):
    path = folder / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(common.UserError) as error:
        common.load_split(str(folder))
    assert words in error.value.message and "\n" not in error.value.message
    assert path.name.removesuffix(".gz").removesuffix("-ubyte")[:5] in error.value.message
