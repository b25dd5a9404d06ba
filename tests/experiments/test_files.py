"""Result files: what is read is what was written, or a named error; the old file or the new one."""

import errno
import json
import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinv.errors import InvalidInput
from jaxinv.experiments import files
from jaxinv.experiments.files import DamagedFile, InUse, WriteFailed

CONTENT = {
    "experiment": "made-up",
    "config": {"hidden": (4, 2), "data": None, "lr": 0.1, "tune": False},
    "studies": {
        "Größen, é": {
            "rate 1e-05": {"loss": [1e-05, -0.0, 0.1 + 0.2, 1e300, 5e-324, math.nan, math.inf]},
            "rate 10": {"rank": [3402, 0, -1], "name": "ReLU ≥ 0", "low": -math.inf},
        }
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "results.json"
    files.write_json(path, CONTENT)
    return path.read_bytes()


def _read(directory, content):
    """What a file of these bytes is read as, or None where it is refused."""
    path = directory / "damaged.json"
    path.write_bytes(content)
    try:
        read = files.read_json(path)
    except DamagedFile as error:
        assert str(path) in str(error) and "remove the file" in str(error)
        return None
    return read


def _same(a, b):
    return repr(a) == repr(b)  # tells -0.0 from 0.0 and 1 from 1.0, and NaN equals itself


# --- what is read is what was written -------------------------------------------------


@given(st.lists(st.floats(width=64)))
def test_float64_comes_back_bit_for_bit(values):
    text = json.dumps(files._map_leaves(files._spelled, files.plain(np.array(values, np.float64))))
    back = files._map_leaves(lambda v: files._NOT_FINITE.get(v, v), json.loads(text))
    written, read = np.array(values, np.float64), np.array(back, np.float64)
    nan = np.isnan(written)
    assert (nan == np.isnan(read)).all()
    assert written[~nan].tobytes() == read[~nan].tobytes()


def test_float32_comes_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)  # subnormals, infinities and NaN among them
    files.write_json(tmp_path / "results.json", {"values": values})
    back = np.array(files.read_json(tmp_path / "results.json")["values"], np.float32)
    nan = np.isnan(values)
    assert (nan == np.isnan(back)).all() and nan.any()
    assert values[~nan].tobytes() == back[~nan].tobytes()


def test_content_comes_back(tmp_path, written):
    read = _read(tmp_path, written)
    assert _same(read, {"format": 1, **files.plain(CONTENT)})


def test_the_file_is_json_that_any_reader_accepts(written):
    def refuse(name):
        raise AssertionError(name)

    loss = json.loads(written, parse_constant=refuse)["studies"]["Größen, é"]["rate 1e-05"]["loss"]
    assert loss[-2:] == ["NaN", "Infinity"]
    assert np.isnan(np.array(loss, float)[-2]) and np.isinf(np.array(loss, float)[-1])


def test_a_text_that_would_be_read_as_a_number_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="'NaN' in a result would be read as a number"):
        files.write_json(tmp_path / "results.json", {"dataset": "NaN"})
    assert not list(tmp_path.iterdir())


# --- damage ---------------------------------------------------------------------------


def test_a_flipped_bit_in_any_byte_is_noticed_or_changes_nothing(tmp_path, written):
    original, harmless = _read(tmp_path, written), 0
    random = np.random.default_rng(0)
    for position in range(len(written)):
        for bit in {int(random.integers(8)), 5}:  # bit 5: upper and lower case
            damaged = bytearray(written)
            damaged[position] ^= 1 << bit
            read = _read(tmp_path, bytes(damaged))
            assert read is None or _same(read, original), (position, bit)
            harmless += read is not None
    # Spaces between the values, and the case of the e in 1e-05, mean nothing.
    assert 0 < harmless < len(written)


def test_every_truncation_is_noticed(tmp_path, written):
    original = _read(tmp_path, written)
    for length in range(0, len(written) - 1, 3):
        assert _read(tmp_path, written[:length]) is None, length
    assert _same(_read(tmp_path, written[:-1]), original)  # the last line break


@given(st.data())
def test_overwritten_blocks_are_noticed_or_change_nothing(tmp_path_factory, written, data):
    begin = data.draw(st.integers(0, len(written) - 1))
    end = data.draw(st.integers(begin, min(len(written), begin + 64)))
    block = data.draw(st.binary(max_size=64) | st.just(bytes(end - begin)) | st.just(written[:40]))
    directory = tmp_path_factory.getbasetemp()
    read = _read(directory, written[:begin] + block + written[end:])
    assert read is None or _same(read, _read(directory, written))


@given(st.data())
def test_another_digit_is_noticed_or_changes_no_number(tmp_path_factory, written, data):
    digits = [i for i, byte in enumerate(written) if chr(byte).isdigit()]
    position = data.draw(st.sampled_from(digits))
    digit = data.draw(st.sampled_from(sorted(set(b"0123456789") - {written[position]})))
    damaged = written[:position] + bytes([digit]) + written[position + 1 :]
    directory = tmp_path_factory.getbasetemp()
    read = _read(directory, damaged)
    assert read is None or _same(read, _read(directory, written))  # 3e-324 is 5e-324


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, not JSON"),
        (b"{", "damaged, not JSON"),
        (b"\xff\xfe", "damaged, not JSON"),
        (b"[" * 100_000, "damaged, not JSON"),
        (b'{"a": NaN}', "damaged, not JSON .NaN is no number of JSON"),
        (b"[1]", "damaged, not a table of results"),
        (b'{"experiment": "geometry"}', "has no checksum, .* written before results had one"),
        (b'{"format": 2, "sha256": "0"}', "of format 2, and this jaxinv reads format 1"),
        (b'{"format": 1}', "damaged, its content does not match its checksum"),
        (b'{"format": 1, "sha256": "0"}', "damaged, its content does not match its checksum"),
    ],
)
def test_what_is_no_result_file_is_named(content, message, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=message + ".*; the remedy"):
        files.read_json(tmp_path / "results.json", "the remedy")


# --- writing --------------------------------------------------------------------------


def _old_file_is_intact(directory):
    assert [path.name for path in directory.iterdir()] == ["results.json"]
    assert files.read_json(directory / "results.json")["rank"] == 1


def test_a_write_over_the_limit_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"rank": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(WriteFailed) as error:
            files.write_json(path, {"rank": 2, "loss": np.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(error.value) and "Make room, then run the same command" in str(
        error.value
    )
    _old_file_is_intact(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_the_old_file(call, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"rank": 1})

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteFailed, match=r"results.json: cannot be written \(No space left"):
        files.write_json(path, {"rank": 2})
    monkeypatch.undo()
    _old_file_is_intact(tmp_path)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounting needs root"
)
def test_a_file_system_that_is_full_leaves_the_old_file(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        files.write_json(tmp_path / "results.json", {"rank": 1})
        with pytest.raises(WriteFailed, match="No space left on device"):
            files.write_json(tmp_path / "results.json", {"rank": 2, "loss": np.zeros(10_000)})
        _old_file_is_intact(tmp_path)
        files.write_json(tmp_path / "results.json", {"rank": 3})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "results.json", {"rank": 1})
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "results.json") as new:
        new.write_text("half of")
        raise KeyboardInterrupt
    _old_file_is_intact(tmp_path)


def test_only_leftovers_of_this_package_are_removed(tmp_path):
    files.write_json(tmp_path / "results.json", {"rank": 1})
    (tmp_path / "movie.part-1.rar").touch()
    with files.replacing(tmp_path / "curves.png") as new:
        leftover = tmp_path / new.name.replace("part-", "part-of-a-killed-run-")
        leftover.touch()
        new.touch()
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curves.png",
        "movie.part-1.rar",
        "results.json",
    ]


# --- locks ----------------------------------------------------------------------------


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    lock = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from jaxinv.experiments import files\n"
    code += "with files.locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        message = rf"another run is writing here \(process {holder.pid}\)"
        with pytest.raises(InUse, match=message), files.locked(lock):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert lock.exists()  # but nobody holds it
    with files.locked(lock):
        pass
    assert not lock.exists()


def test_without_locks_a_run_warns_and_goes_on(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="locks do not work here"), files.locked(tmp_path / "lock"):
        pass


def test_texts_that_no_encoding_can_write_come_back(tmp_path):
    path, content = tmp_path / "results.json", {"name \ud800": "\x1b[31m λ \x9b \u202e"}
    files.write_json(path, content)
    assert files.read_json(path) == {"format": 1, **content}
    written = path.read_text(encoding="utf-8")
    assert "λ" in written and not any(c in written for c in "\x1b\x9b\u202e")


@pytest.mark.parametrize("depth", [300, 800, 950, 100_000])
def test_nesting_too_deep_for_the_checksum_is_damage(depth, tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"format": 1, "sha256": "0", "a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(DamagedFile, match="damaged"):
        files.read_json(path)
