"""Where a program computes in less than the precision it is run in.

The Jacobian of a program that rounds inside is exact for the rounded program: its error does not
show in any comparison of two Jacobians. So the casts are found on the traced program.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxinv._interpreter.program import dependent_equations
from jaxinv._interpreter.walk import AnyJaxpr, Aval, Equation
from jaxinv.typing import DTypeLike

# What moves numbers, and rounds none.
_MOVES = {"reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "rev"} | {
    "concatenate", "gather", "dynamic_slice", "select_n", "pad", "stop_gradient", "copy", "eq", "gt"
}  # fmt: skip


def casts_of(closed: AnyJaxpr, dtype: DTypeLike) -> tuple[str, ...]:
    """The source lines of a program where values of its arguments are rounded below `dtype`."""
    lines = (eqn.source for eqn in dependent_equations(closed) if _rounds(eqn, dtype))
    return tuple(dict.fromkeys(lines))


def _rounds(eqn: Equation, dtype: DTypeLike) -> bool:
    name, digits = eqn.name, jnp.finfo(dtype).nmant
    if name == "reduce_precision":
        return bool(eqn.params["mantissa_bits"] < digits)
    if "F16" in str(eqn.params.get("precision")) or "TF32" in str(eqn.params.get("precision")):
        return True
    if name in _MOVES:
        return False
    if name == "convert_element_type" and not _is_float(eqn.inputs[0]):
        return False
    outputs = [aval for aval in eqn.outputs if _is_float(aval)]
    return any(jnp.finfo(a.dtype).nmant < digits for a in outputs)


def _is_float(aval: Aval) -> bool:
    return bool(jnp.issubdtype(getattr(aval, "dtype", bool), jnp.floating))
