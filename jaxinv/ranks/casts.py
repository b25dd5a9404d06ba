"""Where a program computes in less than the precision it is run in.

The Jacobian of a program that rounds inside is exact for the rounded program: its error does not
show in any comparison of two Jacobians. So the casts are found on the traced program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from jaxinv._interpreter.walk import equation, live_equations, sub_jaxprs

# What moves numbers, and rounds none.
_MOVES = {"reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "rev"} | {
    "concatenate", "gather", "dynamic_slice", "select_n", "pad", "stop_gradient", "copy", "eq", "gt"
}  # fmt: skip


def casts_of(closed: Any, dtype: Any) -> tuple[str, ...]:
    """The source lines of a program where values of its arguments are rounded below `dtype`."""
    found: dict[str, None] = {}
    depends = [True] * len(closed.jaxpr.invars)
    _find(closed, depends, [True] * len(closed.jaxpr.outvars), dtype, (), found)
    return tuple(found)


def _find(
    closed: Any,
    depends: Sequence[bool],
    needed: Sequence[bool],
    dtype: Any,
    callers: tuple[Any, ...],
    found: dict[str, None],
) -> None:
    jaxpr = getattr(closed, "jaxpr", closed)
    tainted = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
    for raw, wanted in live_equations(jaxpr, needed):
        flags = [not isinstance(v, jex.Literal) and v in tainted for v in raw.invars]
        if not any(flags):
            continue
        tainted.update(raw.outvars)
        inner = sub_jaxprs(raw, wanted)
        if inner is None:
            if _rounds(raw, dtype):
                found[equation(raw, callers).source] = None
            continue
        for body, skipped, needed_inside in inner:
            _find(
                body, [True] * (len(flags) - skipped), needed_inside, dtype, (raw, *callers), found
            )


def _rounds(raw: Any, dtype: Any) -> bool:
    name, digits = raw.primitive.name, jnp.finfo(dtype).nmant
    if name == "reduce_precision":
        return bool(raw.params["mantissa_bits"] < digits)
    if "F16" in str(raw.params.get("precision")) or "TF32" in str(raw.params.get("precision")):
        return True
    if name in _MOVES:
        return False
    if name == "convert_element_type" and not _is_float(raw.invars[0].aval):
        return False
    outputs = [v.aval for v in raw.outvars if _is_float(v.aval)]
    return any(jnp.finfo(a.dtype).nmant < digits for a in outputs)


def _is_float(aval: Any) -> bool:
    return bool(jnp.issubdtype(getattr(aval, "dtype", bool), jnp.floating))
