"""What an equation is to the user: the line that wrote it, the layer it is part of, its types."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp


def _directory(file: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(str(file))), "")


_JAX = _directory(jax.__file__)
_OWN = _directory(os.path.dirname(os.path.abspath(__file__)))
# Functions of the package that users pass as `fn`, or that pass one: lines in them say something.
_SHOWN = (os.path.join(_OWN, "networks.py"), os.path.join(_OWN, "experiments", ""))


# Where jax keeps relu, gelu, softmax and their like.
_ACTIVATIONS = tuple(
    os.path.join(_JAX, "_src", *path) for path in (("nn", "functions.py"), ("ops", "special.py"))
)
_LAYER = re.compile(r"(\w+)\.(?:__call__|call)")  # a layer of flax, equinox, haiku or keras


def _is_shown(file: str) -> bool:
    """Whether a line in this file can be the user's: it is not of jax, nor of jaxinv itself."""
    file = os.path.abspath(file)
    return file.startswith(_SHOWN) or not file.startswith((_JAX, _OWN))


def is_users(file: str) -> bool:
    """Whether a file is the user's own, rather than a library's."""
    return _is_shown(file) and "site-packages" not in file and not file.startswith("<")


def source_line(eqns: Sequence[jex.JaxprEqn]) -> str:
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


def written_as(eqns: Sequence[jex.JaxprEqn]) -> str | None:
    """The activation or layer of a library that an equation is part of: gelu, softmax, LayerNorm.

    None where the user wrote the operation itself. Of functions that call each other the outermost
    counts (selu calls elu), up to the first line that is not of jax.
    """
    found = None
    for eqn in eqns:
        found = _jitted(eqn) or found
        traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
        for frame in () if traceback is None else traceback.frames:
            file = os.path.abspath(frame.file_name)
            if file in _ACTIVATIONS:
                name = frame.function_name.split(".")[0].lstrip("_").removesuffix("_deprecated")
                found = name if hasattr(jax.nn, name) else found
            elif found is None and not file.startswith((_JAX, _OWN)):
                layer = _LAYER.fullmatch(frame.function_name)
                if layer and "site-packages" in file:
                    return layer[1]
            if _is_shown(file) and (found or "site-packages" not in file):
                return found
    return found


def _jitted(eqn: jex.JaxprEqn) -> str | None:
    """The function of jax.numpy or jax.nn that a call is of, such as clip."""
    name = getattr(eqn, "params", {}).get("name")
    known = isinstance(name, str) and (hasattr(jnp, name) or hasattr(jax.nn, name))
    return name if known else None


# Operations that people know by another name.
_SPOKEN = {
    "convert_element_type": "astype",
    "ge": ">=",
    "gt": ">",
    "integer_pow": "power",
    "le": "<=",
    "logistic": "sigmoid",
    "lt": "<",
    "max": "maximum",
    "min": "minimum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_prod": "prod",
    "reduce_sum": "sum",
}


def spoken(name: str) -> str:
    """An operation as people write it: `sigmoid` for `logistic`."""
    return _SPOKEN.get(name, name)


def short_type(aval: object) -> str:
    """float32[3,4]"""
    shape = ",".join(str(n) for n in getattr(aval, "shape", ()))
    return f"{getattr(aval, 'dtype', aval)}[{shape}]"


def part_of(what: str, name: str, whole: str) -> str:
    """`square` of two values → `square`, part of `LayerNorm`, of two values."""
    return what if whole == name else what.replace(f"`{name}`", f"`{name}`, part of `{whole}`,", 1)


def remedy_for(whole: str, theory: str, remedy: str) -> str:
    """What to do about an operation of a layer: batch normalisation is covered once frozen.

    κ also refuses a frozen one that adds two of its parameters up before they meet data.
    """
    if not whole.startswith("BatchNorm") or theory == "κ":
        return remedy
    return (
        "call the model in evaluation mode, where its statistics are constants "
        "(use_running_average=True in flax, training=False elsewhere)."
    )
