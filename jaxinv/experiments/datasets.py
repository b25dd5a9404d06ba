"""Images of digits: bundled with scikit-learn, or MNIST-like files in a directory.

The files of MNIST and Fashion-MNIST are in the IDX format (a header of
big-endian integers, then the bytes), which is read here directly; nothing is
ever unpickled and nothing is downloaded.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxinv._extras import require
from jaxinv.errors import JaxinvError

FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}
_MAGIC_IMAGES = 0x0803  # unsigned bytes (08) in three dimensions (03)
_MAGIC_LABELS = 0x0801
_MOST_BYTES = 1 << 30  # of one file, unpacked; the images of MNIST take 47 million
_MOST_PACKED = 1032  # bytes that a byte of deflate stands for at most (zlib's technical notes)
_TEST_DIGITS = 360  # a fifth of the 1797


Array = np.ndarray | jax.Array  # read as the former; an experiment may move it to the device


class DataError(JaxinvError, ValueError):
    """A data file is missing or damaged, or files do not fit each other."""


class Dataset(NamedTuple):
    """A classification task."""

    name: str
    x_train: Array  # float32 (n, features), between 0 and 1
    y_train: Array  # int32 (n,), from 0 to num_classes − 1
    x_test: Array
    y_test: Array
    num_classes: int


def load(directory: Path | None = None) -> Dataset:
    """Load the digits of scikit-learn, or the IDX files in ``directory``.

    Args:
        directory: where the four files of MNIST or Fashion-MNIST lie;
            ``None`` for the bundled digits.

    Returns:
        the :class:`Dataset`.

    Raises:
        DataError: if a file is missing or damaged.
        MissingExtra: if scikit-learn is needed and not installed.

    >>> load().x_train.shape
    (1437, 64)
    """
    return digits() if directory is None else idx_directory(directory)


def digits() -> Dataset:
    """Load the 1797 8×8 digits bundled with scikit-learn (Alpaydin & Kaynak 1998).

    The 360 test digits are drawn once and for all: ``RandomState`` is used
    because numpy guarantees its stream across versions.

    >>> digits().x_test.shape
    (360, 64)
    """
    x, y = require("sklearn.datasets", "cli").load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    n = len(x) - _TEST_DIGITS
    return Dataset("digits", x[:n], y[:n], x[n:], y[n:], num_classes=10)


def idx_directory(directory: Path) -> Dataset:
    """Load MNIST, Fashion-MNIST or anything else in four files of their names.

    Args:
        directory: holds the files named in :data:`FILES`.

    Returns:
        the :class:`Dataset`, named after the directory.

    Raises:
        DataError: naming the file at fault, what is wrong and what to do.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; it should hold {_file_names()}")
    paths = {part: directory / name for part, name in FILES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(
            f"{directory}: {', '.join(missing)} missing; download MNIST or Fashion-MNIST "
            f"there under its original names ({_file_names()})"
        )
    arrays = {}
    for split in ("train", "test"):
        x_path, y_path = paths[f"x_{split}"], paths[f"y_{split}"]
        x, y = read_idx(x_path, _MAGIC_IMAGES), read_idx(y_path, _MAGIC_LABELS)
        if len(x) != len(y) or len(x) == 0:
            raise DataError(
                f"{x_path} holds {len(x)} images but {y_path} {len(y)} labels; "
                "the two must come from the same data set, with at least one image"
            )
        arrays[split] = x.reshape(len(x), -1).astype(np.float32) / 255, y.astype(np.int32)
    (x_train, y_train), (x_test, y_test) = arrays["train"], arrays["test"]
    if x_train.shape[1] == 0:
        raise DataError(f"{paths['x_train']} holds images without pixels; download it again")
    if x_train.shape[1] != x_test.shape[1]:
        raise DataError(
            f"{paths['x_train']} holds images of {x_train.shape[1]} pixels but "
            f"{paths['x_test']} of {x_test.shape[1]}; both must come from the same data set"
        )
    num_classes = 1 + int(max(y_train.max(), y_test.max()))
    name = directory.resolve().name
    return Dataset(name, x_train, y_train, x_test, y_test, num_classes)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    The header is ``magic``, whose last byte is the number of dimensions, and
    the size of each dimension, as big-endian 32-bit integers (LeCun, Cortes &
    Burges, "The MNIST database").

    Args:
        path: the ``.gz`` file.
        magic: the number the file must begin with.

    Returns:
        an array of ``uint8`` in the shape the header gives.

    Raises:
        DataError: if the file is not an intact gzip file, begins with another
            number, holds fewer or more bytes than its header says, or more than 1 GiB. No more
            than what the header says is read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels.gz"
    >>> _ = path.write_bytes(gzip.compress(struct.pack(">II", 0x0801, 3) + bytes([7, 2, 1])))
    >>> read_idx(path, 0x0801)
    array([7, 2, 1], dtype=uint8)
    """
    num_dims = magic & 0xFF
    header_size = 4 * (1 + num_dims)
    try:
        with gzip.open(path) as file:
            header = file.read(header_size)
            found = int.from_bytes(header[:4])
            if found != magic or len(header) < header_size:
                raise DataError(
                    f"{path}: begins with the number {found} in {len(header)} bytes of header, but "
                    f"such a file begins with {magic} in {header_size}; is it another file under "
                    "this name (images and labels swapped)? Download it again"
                )
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = math.prod(shape)
            _check_size(path, shape)
            content = _read_at_most(file, size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) != size:
        raise _wrong_size(path, shape, fewer=len(content) < size)
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check_size(path: Path, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    if size > _MOST_PACKED * path.stat().st_size:
        raise _wrong_size(path, shape, fewer=True)
    if size > _MOST_BYTES:
        raise DataError(
            f"{path}: its header announces {size} bytes (shape {shape}), but at most {_MOST_BYTES} "
            "are read; take a part of the data set"
        )


def _wrong_size(path: Path, shape: tuple[int, ...], fewer: bool) -> DataError:
    return DataError(
        f"{path}: holds {'fewer' if fewer else 'more'} than the {math.prod(shape)} bytes its "
        f"header announces (shape {shape}); download it again"
    )


def _read_at_most(file: gzip.GzipFile, most: int) -> bytes:
    """Up to so many bytes, however many a damaged or hostile file would unpack to."""
    parts, left = [], most
    # Piece by piece: a read of n bytes sets n aside before it knows that there are so many.
    while left and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _file_names() -> str:
    return ", ".join(FILES.values())
