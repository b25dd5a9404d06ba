"""The arrays that a traced program closes over."""

from __future__ import annotations

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np


def with_own_constants(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The program with copies of the NumPy arrays that it closes over, in its own precision.

    While a program in float32 holds an array, jax gives the rounded one to programs in float64 too
    (0.10: a cache by the array alone), where it meets float64 in additions that cannot be run.
    """
    consts = [c.copy() if isinstance(c, np.ndarray) else c for c in closed.consts]
    mixed = {
        v
        for eqn in closed.jaxpr.eqns
        if {jnp.dtype("float32"), jnp.dtype("float64")} <= {_dtype(u) for u in eqn.invars}
        for v in eqn.invars
        if _dtype(v) == jnp.float32 and not isinstance(v, jex.Literal)
    }
    wide = [
        c.astype(np.float64) if v in mixed and isinstance(c, np.ndarray) else c
        for v, c in zip(closed.jaxpr.constvars, consts, strict=True)
    ]
    if all(a is b for a, b in zip(wide, consts, strict=True)):
        return jex.ClosedJaxpr(closed.jaxpr, consts)
    same = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, wide))
    return jax.make_jaxpr(same)(*closed.in_avals)


def _dtype(atom: jax.core.Atom) -> np.dtype | None:
    return getattr(atom.aval, "dtype", None)
