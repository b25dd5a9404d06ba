"""JSON files that are whole or not there: written in one step, checked when read, locked meanwhile.

JSON has no NaN and no infinities: they are written as the texts ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``, which ``float`` and NumPy read, and :func:`read_json` gives the numbers back. Every
other float is written with as many digits as tell it from its neighbours, so that what is read is
bit for bit what was written.
"""

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinv._files import WriteFailed, remove_leftovers, replacing
from jaxinv._text import printable_json
from jaxinv.errors import InvalidInput, JaxinvError

__all__ = [
    "FORMAT",
    "DamagedFile",
    "InUse",
    "WriteFailed",
    "locked",
    "plain",
    "read_json",
    "remove_leftovers",
    "replacing",
    "write_json",
]

FORMAT = 1  # of the JSON files; another number for another meaning of what is in them
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class DamagedFile(JaxinvError, ValueError):
    """A file is not what was written, or not of a kind that can be checked."""


class InUse(JaxinvError, RuntimeError):
    """Another process is writing to the same directory."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which the kernel frees when the process ends, however it ends.

    On file systems without locks, and on Windows, it warns and goes on.

    Args:
        path: of the lock file; its directory must exist.

    Raises:
        InUse: if another process holds it, or this one does elsewhere.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "lock"
    >>> with locked(path):
    ...     try:
    ...         with locked(path):
    ...             pass
    ...     except InUse as error:
    ...         print("another run" in str(error))
    True
    """
    descriptor = _lock(path)
    try:
        yield
    finally:
        # Removed while still held, so that nobody else's lock is removed.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 100).decode(errors="replace").strip()
            os.close(descriptor)
            raise InUse(
                f"{path.parent}: another run is writing here (process {holder or 'unknown'}); "
                "wait for it, or choose another --out"
            ) from error
        except (ImportError, OSError):
            warnings.warn(
                f"{path}: locks do not work here; let no other run write to this directory",
                stacklevel=4,
            )
            return descriptor
        # Between opening and locking, the holder may have removed this very file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)


def plain(value: Any) -> Any:
    """Return what reading ``value`` back from JSON gives, with NaN and infinities kept.

    Arrays and tuples become lists, paths become texts, keys become texts.

    Raises:
        InvalidInput: if a text is the name of a number that is not finite.

    >>> plain({"loss": np.array([1.0, np.nan], np.float32), 2: (3, True)})
    {'loss': [1.0, nan], '2': [3, True]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str) and value in _NOT_FINITE:
        raise InvalidInput(f"the text {value!r} in a result would be read as a number; rename it")
    return str(value) if isinstance(value, Path) else value


def _map_leaves(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_leaves(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_leaves(function, item) for item in value]
    return function(value)


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _checksum(spelled: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in spelled.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path`` in one step, with the format's number and a checksum.

    Args:
        path: the file to make or to replace.
        content: numbers, texts, arrays, in lists and dicts.

    Raises:
        WriteFailed: if the operating system refuses.
        InvalidInput: if a text is the name of a number that is not finite.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.json"
    >>> write_json(path, {"loss": np.array([1.0, np.nan])})
    >>> read_json(path)["loss"], json.loads(path.read_text())["loss"]
    ([1.0, nan], [1.0, 'NaN'])
    """
    spelled = {"format": FORMAT, **_map_leaves(_spelled, plain(content))}
    spelled = {"sha256": _checksum(spelled), **spelled}
    text = printable_json(json.dumps(spelled, indent=1, allow_nan=False, ensure_ascii=False))
    with replacing(path) as new:
        new.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str = "remove the file") -> dict[str, Any]:
    """Read what :func:`write_json` wrote, or say why it is not that.

    Args:
        path: the file.
        remedy: what the error tells the reader to do.

    Returns:
        the content, with ``"format"`` and without ``"sha256"``.

    Raises:
        DamagedFile: if the file is truncated or changed, without checksum, or of another format.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.json"
    >>> write_json(path, {"rank": 3402})
    >>> _ = path.write_text(path.read_text().replace("3402", "3401"))
    >>> try:
    ...     read_json(path)
    ... except DamagedFile as error:
    ...     print(str(error).removeprefix(str(path)))
    : damaged, its content does not match its checksum; remove the file
    """

    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON")

    try:
        content = json.loads(path.read_bytes().decode("utf-8"), parse_constant=constant)
        # As deep as what is done below: what is nested deeper fails here.
        _map_leaves(lambda leaf: leaf, content)
        found = _checksum(content) if isinstance(content, dict) else None
    except (ValueError, RecursionError, MemoryError) as error:
        raise DamagedFile(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: damaged, not a table of results; {remedy}")
    if "format" not in content and "sha256" not in content:
        raise DamagedFile(
            f"{path}: has no checksum, so nothing tells whether it is intact (it was written "
            f"before results had one, or by something else); {remedy}"
        )
    if content.get("format") != FORMAT:
        raise DamagedFile(
            f"{path}: of format {content.get('format')!r}, and this jaxinv reads format {FORMAT} "
            f"(or the file is damaged); {remedy}"
        )
    if content.pop("sha256", None) != found:
        raise DamagedFile(f"{path}: damaged, its content does not match its checksum; {remedy}")
    read: dict[str, Any] = _map_leaves(
        lambda leaf: _NOT_FINITE.get(leaf, leaf) if isinstance(leaf, str) else leaf, content
    )
    return read
