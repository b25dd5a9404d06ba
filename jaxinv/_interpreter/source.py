"""Which line of the user's wrote an equation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax


def _directory(file: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(str(file))), "")


_JAX = _directory(jax.__file__)
_OWN = _directory(os.path.dirname(os.path.abspath(__file__)))
# Functions of the package that users pass as `fn`, or that pass one: lines in them say something.
_SHOWN = (os.path.join(_OWN, "networks.py"), os.path.join(_OWN, "experiments", ""))


def _is_shown(file: str) -> bool:
    """Whether a line in this file can be the user's: it is not of jax, nor of jaxinv itself."""
    file = os.path.abspath(file)
    return file.startswith(_SHOWN) or not file.startswith((_JAX, _OWN))


def source_line(eqns: Sequence[Any]) -> str:
    """`file:line (function)` of the code that wrote an equation, and of the user code above it.

    `eqns` is the equation and those that called the jaxpr it is in, innermost first: jax keeps no
    user frame inside its own jitted functions. Where a library (flax, optax, ...) wrote the
    operation, the nearest line outside `site-packages` follows: the one that the user can change.
    """
    frames = []
    for eqn in eqns:
        traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
        if traceback is not None:
            frames += [f for f in traceback.frames if _is_shown(f.file_name)]
        if any("site-packages" not in f.file_name for f in frames):
            break
    if not frames:
        return "unknown source line"
    show = [frames[0]]
    outside = [f for f in frames if "site-packages" not in f.file_name]
    if outside and outside[0] is not frames[0]:
        show.append(outside[0])
    return ", called from ".join(f"{f.file_name}:{f.line_num} ({f.function_name})" for f in show)
