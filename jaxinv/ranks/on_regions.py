"""Ranks on a region of inputs, by the boundaries of gates (see `jaxinv.gates`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch import leading, with_leading_inputs
from jaxinv._numerics import tolerances as policy
from jaxinv.errors import InvalidInput
from jaxinv.gates import FunctionalDimension, Region, functional_dimension, segments
from jaxinv.ranks.record import Rank
from jaxinv.typing import Array, DTypeLike, Inputs, Network, Params


def asked(x: Inputs | Region, method: str) -> bool:
    """Whether the boundaries of gates decide: a region is given, or they are asked for."""
    if isinstance(x, Region) and method not in ("auto", "boundary"):
        raise InvalidInput(
            f"method={method!r} takes given inputs. On a region of them the rank is found from "
            "the boundaries of gates: method='boundary', or leave it out."
        )
    return isinstance(x, Region) or method == "boundary"


def rank_on_region(
    fn: Network,
    params: Params,
    x: Inputs | Region,
    rtol: float | None,
    dtype: DTypeLike,
    batch_axis: int | None,
) -> tuple[Rank, FunctionalDimension]:
    """The rank on a region, or on the segments between given inputs, and the account of it."""
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((params, x))):
        raise InvalidInput(
            "method='boundary' searches for points: it cannot run under jit or vmap."
        )
    if rtol is not None or jnp.dtype(dtype) != np.float64:
        raise InvalidInput(
            "method='boundary' decides in float64 by proven bounds: leave out rtol, dtype."
        )
    if not isinstance(x, Region):
        fn = with_leading_inputs(fn, batch_axis)
        x = segments(leading(x, batch_axis))
    found = functional_dimension(fn, params, x)
    return _record(found), found


def _record(found: FunctionalDimension) -> Rank:
    def count(number: int) -> Array:
        return jnp.asarray(number, jnp.int32)

    nothing, certain = jnp.asarray(jnp.nan), jnp.asarray(found.certain)
    reason = 0 if found.certain else policy.BOUNDARIES_MISSING | (policy.CAST if found.casts else 0)
    about = policy.About(0, 0, found.parameters, found.casts, found.region)
    return Rank(
        count(found.lower), count(found.lower), count(found.upper), certain, certain,
        count(reason), nothing, nothing, nothing, nothing, nothing, about,
    )  # fmt: skip
