"""Files that are the old one or the new one, whenever the process that writes them is killed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxinv.errors import JaxinvError

_PART = ".jaxinv-part-"  # in the names of files that are being written


class WriteFailed(JaxinvError, OSError):
    """A file could not be written, for instance because the disk is full; the old one is intact."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file in one step: whenever the process is killed, ``path`` is the old or the new one.

    The body writes to the path it is given, which is next to ``path`` because a rename is atomic
    only within one file system, and ends as ``path`` does.

    Args:
        path: the file to make or to replace.

    Yields:
        the path to write to; after an error it is removed and ``path`` is as it was.

    Raises:
        WriteFailed: if the operating system refuses, naming ``path`` and why.

    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with replacing(path) as new:
    ...     _ = new.write_text("done")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('done', 1)
    """
    try:
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f"{path.stem}{_PART}", suffix=path.suffix
        )
        temporary = Path(name)
        try:
            os.close(descriptor)
            yield temporary
            # Data before name: else a power cut may leave the new name with nothing in it.
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # mkstemp's 0600 is meant for secrets
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteFailed(
            f"{path}: cannot be written ({error.strerror or error}); what was there before is "
            "intact. Make room, then run the same command again"
        ) from error
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    # Not every file system lets a directory be synced, and Windows does not let it be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes had begun to write; only for the holder of the lock.

    >>> directory = Path(tempfile.mkdtemp())
    >>> (directory / "results.jaxinv-part-x1y2.json").touch()
    >>> remove_leftovers(directory)
    >>> list(directory.iterdir())
    []
    """
    for path in directory.glob(f"*{_PART}*"):
        path.unlink(missing_ok=True)
