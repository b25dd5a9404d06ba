"""Data sets: what is read is what was written, and damage is named."""

import gzip
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from jaxinv.experiments import datasets
from jaxinv.experiments.datasets import FILES, DataError


def _idx(magic, array):
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_like(tmp_path):
    """A directory with 5 training and 3 test images of 2×3 pixels."""
    random = np.random.RandomState(0)
    for split, n in (("train", 5), ("test", 3)):
        images = random.randint(0, 256, (n, 2, 3))
        (tmp_path / FILES[f"x_{split}"]).write_bytes(gzip.compress(_idx(0x803, images)))
        labels = np.arange(n) % 4
        (tmp_path / FILES[f"y_{split}"]).write_bytes(gzip.compress(_idx(0x801, labels)))
    return tmp_path


def _overwrite(path, content):
    path.write_bytes(gzip.compress(content))


def test_digits_split_is_the_same_every_time():
    first, second = datasets.digits(), datasets.digits()
    np.testing.assert_array_equal(first.x_test, second.x_test)
    # Pinned, so that numbers of different versions of this package stay comparable.
    assert first.y_test[:12].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]


def test_digits_split_uses_every_image_once_and_every_class():
    data = datasets.digits()
    from sklearn.datasets import load_digits

    pixels = np.concatenate([data.x_train, data.x_test]) * 16
    expected = load_digits().data
    assert sorted(map(tuple, pixels)) == sorted(map(tuple, expected))
    assert set(data.y_test.tolist()) == set(data.y_train.tolist()) == set(range(10))


def test_idx_files_are_read_as_written(mnist_like):
    data = datasets.load(mnist_like)
    raw = gzip.decompress((mnist_like / FILES["x_train"]).read_bytes())[16:]
    np.testing.assert_allclose(data.x_train.ravel() * 255, list(raw), rtol=1e-6)
    assert data.x_train.shape == (5, 6) and data.x_train.dtype == np.float32
    assert data.y_train.tolist() == [0, 1, 2, 3, 0] and data.y_test.tolist() == [0, 1, 2]
    assert data.num_classes == 4
    assert data.name == mnist_like.name


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such directory; it should hold train-images"):
        datasets.load(tmp_path / "nowhere")


@pytest.mark.parametrize("part", FILES)
def test_a_missing_file_is_named(mnist_like, part):
    (mnist_like / FILES[part]).unlink()
    with pytest.raises(DataError, match=f"{FILES[part]} missing; download MNIST or Fashion-MNIST"):
        datasets.load(mnist_like)


@pytest.mark.parametrize("keep", [0, 5, 20, -9, -1])
def test_a_truncated_gzip_file_is_named(mnist_like, keep):
    path = mnist_like / FILES["x_test"]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{path.name}: .*ownload it again"):
        datasets.load(mnist_like)


def test_corrupted_compressed_bytes_are_named(mnist_like):
    path = mnist_like / FILES["x_train"]
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # in the checksum
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: damaged gzip file .*; download it again"):
        datasets.load(mnist_like)


def test_a_file_that_is_not_gzip_is_named(mnist_like):
    (mnist_like / FILES["y_train"]).write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz: damaged gzip file"):
        datasets.load(mnist_like)


def test_swapped_images_and_labels_are_noticed(mnist_like):
    labels = (mnist_like / FILES["y_train"]).read_bytes()
    (mnist_like / FILES["x_train"]).write_bytes(labels)
    message = "train-images.*begins with the number 2049 .* begins with 2051 .*swapped"
    with pytest.raises(DataError, match=message):
        datasets.load(mnist_like)


@pytest.mark.parametrize(("extra", "word"), [(b"\0", "more"), (None, "fewer")])
def test_a_file_shorter_or_longer_than_its_header_says(mnist_like, extra, word):
    content = _idx(0x801, np.zeros(3))
    _overwrite(mnist_like / FILES["y_test"], content[:-1] if extra is None else content + extra)
    with pytest.raises(DataError, match=f"t10k-labels.*holds {word} than the 3 bytes"):
        datasets.load(mnist_like)


def test_a_header_that_announces_absurd_sizes_allocates_nothing(mnist_like):
    _overwrite(mnist_like / FILES["x_test"], struct.pack(">4I", 0x803, *[2**32 - 1] * 3))
    with pytest.raises(DataError, match="holds fewer than"):
        datasets.load(mnist_like)


def test_counts_of_images_and_labels_must_match(mnist_like):
    _overwrite(mnist_like / FILES["y_train"], _idx(0x801, np.zeros(4)))
    with pytest.raises(DataError, match="train-images.* holds 5 images but .* 4 labels"):
        datasets.load(mnist_like)


def test_an_empty_data_set_is_refused(mnist_like):
    _overwrite(mnist_like / FILES["x_test"], _idx(0x803, np.zeros((0, 2, 3))))
    _overwrite(mnist_like / FILES["y_test"], _idx(0x801, np.zeros(0)))
    with pytest.raises(DataError, match="holds 0 images but .* 0 labels; .* at least one image"):
        datasets.load(mnist_like)


def test_training_and_test_images_must_have_one_size(mnist_like):
    _overwrite(mnist_like / FILES["x_test"], _idx(0x803, np.zeros((3, 2, 2))))
    with pytest.raises(DataError, match="images of 6 pixels but .* of 4"):
        datasets.load(mnist_like)


def test_a_file_that_cannot_be_opened_is_named(mnist_like):
    path = mnist_like / FILES["x_train"]
    path.unlink()
    path.mkdir()  # unlike permissions, this also stops a superuser
    with pytest.raises(DataError, match="cannot be read|missing"):
        datasets.load(mnist_like)
    with pytest.raises(DataError, match="train-images.*: cannot be read"):
        datasets.read_idx(path, 0x803)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a data file was unpickled",))


def test_nothing_is_ever_unpickled(mnist_like):
    _overwrite(mnist_like / FILES["x_train"], pickle.dumps(_Bomb()))
    with pytest.raises(DataError, match="begins with"):
        datasets.load(mnist_like)


def _peak_memory_of(call):
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, str(caught.value)


def test_no_more_is_unpacked_than_the_header_announces(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(_idx(0x801, np.zeros(784)) + bytes(200_000_000), 1))
    peak, message = _peak_memory_of(lambda: datasets.read_idx(path, 0x801))
    assert "holds more than the 784 bytes" in message
    assert peak < 2_000_000


@pytest.mark.parametrize("shape", [(2**31, 1, 1), (2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_sizes_that_the_file_cannot_hold_are_not_set_aside(shape, tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, *shape) + bytes(10_000_000)))
    peak, message = _peak_memory_of(lambda: datasets.read_idx(path, 0x803))
    assert "holds fewer than" in message and peak < 1_000_000


def test_a_size_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_MOST_BYTES", 1000)
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(_idx(0x801, np.zeros(1001))))
    with pytest.raises(DataError, match=r"announces 1001 bytes .*at most 1000 are read; take a"):
        datasets.read_idx(path, 0x801)
    path.write_bytes(gzip.compress(_idx(0x801, np.zeros(1000))))
    assert datasets.read_idx(path, 0x801).shape == (1000,)


def test_images_without_pixels_are_refused(mnist_like):
    for split, n in (("train", 5), ("test", 3)):
        _overwrite(mnist_like / FILES[f"x_{split}"], _idx(0x803, np.zeros((n, 0, 3))))
    with pytest.raises(DataError, match="without pixels"):
        datasets.load(mnist_like)
