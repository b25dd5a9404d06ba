"""Arrays in files that are written whole or not at all, and read only if they are sound.

A file is an .npz without pickles. One entry more holds a JSON text: what the arrays belong to, and
the SHA-256 of their names, types, shapes and bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxinv._files import replacing
from jaxinv.errors import InvalidInput

_HEADER = "__header__"


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def save(path: Path, arrays: Mapping[str, np.ndarray], identity: Mapping[str, object]) -> None:
    """Write the arrays in one step: a reader sees the old file, or all of the new one."""
    header = json.dumps({"identity": identity, "digest": digest(arrays)}, sort_keys=True)
    text = np.frombuffer(header.encode(), np.uint8)
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, allow_pickle=False, **{_HEADER: text}, **arrays)


def _check_unpacked(content: bytes) -> None:
    """`save` packs nothing, so nothing unpacks to more than the file."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = file.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its arrays are packed")
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its arrays are larger than the file")


def load(path: Path, identity: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Read what `save` has written for the same identity.

    Raises:
        InvalidInput: if the file is damaged, or of another identity; the message names it.
    """
    remedy = "choose another checkpoint directory, or remove this one to begin anew"
    try:
        content = path.read_bytes()
        _check_unpacked(content)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        sound = header["digest"] == digest(arrays)
        theirs = dict(header["identity"])
    except Exception as error:  # a file may hold anything, and its readers raise all sorts
        raise InvalidInput(f"{path}: damaged ({error}); {remedy}") from error
    if not sound:
        raise InvalidInput(f"{path}: damaged, its checksum is another; {remedy}")
    ours = json.loads(json.dumps(identity))
    if other := [name for name in ours if ours[name] != theirs.get(name)]:
        was = ", ".join(f"{name} = {theirs.get(name)!r}, not {ours[name]!r}" for name in other)
        raise InvalidInput(f"{path}: of another configuration ({was}); {remedy}")
    return arrays
