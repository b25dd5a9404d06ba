"""The method "exact" of ranks: in exact arithmetic, outside of jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.precision import as_dtype, in_precision
from jaxinv.errors import InvalidInput, UnsupportedOperation
from jaxinv.jacobians.problem import problem_of
from jaxinv.ranks import exact as _exact
from jaxinv.ranks.record import Rank
from jaxinv.typing import DTypeLike, Inputs, Params

# Up to so many steps of elimination "auto" asks for an exact rank: about a second.
_STEPS_OF_AUTO = 1 << 26


def exact_rank(
    network: TracedNetwork,
    params: Params,
    x: Inputs,
    dtype: DTypeLike,
    most_steps: int = _exact.MOST_STEPS,
) -> Rank:
    """The rank of a small network of known numbers, of params and x as `dtype`."""
    _exact.check_known(params, x)
    with in_precision(dtype):
        params, x = as_dtype((params, x), dtype)
        problem = problem_of(network, params, x)
        found = _exact.exact_rank(network, params, x, most_steps)
        most = min(problem.rows, problem.parameters)
        count = jnp.asarray(found.rank, jnp.int32)
        upper = jnp.asarray(found.rank if found.agreed else most, jnp.int32)
        certain = count == upper
        limited = (count == problem.rows) & (problem.rows < problem.parameters)
        reason = policy.flag(limited, policy.LIMITED_BY_ROWS)
        reason = reason + policy.flag(~certain, policy.NO_UPPER_BOUND)
        zero, unknown = jnp.zeros((), dtype), jnp.full((), jnp.nan, dtype)
        about = policy.About(problem.examples, problem.outputs, problem.parameters, ())
        return Rank(
            count, count, upper, certain, certain, reason, zero, zero, unknown, unknown, unknown,
            about,
        )  # fmt: skip


def settled(
    found: Rank, network: TracedNetwork, params: Params, x: Inputs, dtype: DTypeLike
) -> Rank:
    """In exact arithmetic where the bounds do not meet, of a small network of known numbers."""
    if isinstance(found.certain, jax.core.Tracer) or found.certain:
        return found
    if int(found.reason) & policy.NOT_FINITE:
        return found  # the network as it is computed has none
    try:
        exact = exact_rank(network, params, x, dtype, _STEPS_OF_AUTO)
    except (UnsupportedOperation, InvalidInput):
        return found
    return exact if exact.certain else found
