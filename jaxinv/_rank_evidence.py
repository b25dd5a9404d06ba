"""What is known of the null space of a Jacobian, and how well the Jacobian itself is.

Two things bound a rank without any decision on small numbers: parameters on which nothing depends,
whose columns are exactly zero, and rescalings that the program of `fn` is known to have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxinv.errors import UnsupportedOperation
from jaxinv.jacobians import fold_rows, jacobian_operator
from jaxinv.rescaling import rescaling_group, tangent_vectors
from jaxinv.typing import Array, Inputs, Network, Params

_PROBES = 4
# The rank of the generators is worked out up to this many; more are not used as a bound.
_MOST_GENERATORS = 4096
_EXACT = lax.Precision.HIGHEST


class Known(NamedTuple):
    """Ambiguities that need no decision."""

    dead: Array  # (d,) bool: columns of J that are exactly zero
    num_dead: Array  # int32
    tangents: Array  # (d, k): rescalings, zero on dead parameters, columns of norm one or zero
    span: Array  # int32: its dimension


def _generators(fn: Network, params: Params, x: Inputs) -> Any:
    """The group, or None for a network that it does not cover."""
    try:
        group = rescaling_group(fn, params, x)
    except UnsupportedOperation:
        return None
    return group if 0 < group.dim <= _MOST_GENERATORS else None


def known_ambiguities(fn: Network, params: Params, x: Inputs, size: Array) -> Known:
    """`size` is Σ|J| over rows, per column."""
    dead, dtype = size == 0, size.dtype
    num_dead = dead.sum(dtype=jnp.int32)
    group = _generators(fn, params, x)
    none = jnp.zeros((dead.size, 0), dtype)
    if group is None:
        return Known(dead, num_dead, none, jnp.zeros((), jnp.int32))
    T = tangent_vectors(group, params, dense=True).astype(dtype)
    T = jnp.where(dead[:, None], 0, T)
    norm = jnp.linalg.norm(T, axis=0)
    T = T / jnp.where(norm > 0, norm, 1)
    # Sparse columns of norm one: their Gram matrix is well conditioned unless weights vanish.
    values = jnp.linalg.eigvalsh(jnp.matmul(T.T, T, precision=_EXACT))
    count = jnp.sum(values > jnp.sqrt(jnp.finfo(dtype).eps)).astype(jnp.int32)
    return Known(dead, num_dead, T, count)


def column_sizes(fn: Network, params: Params, x: Inputs, d: int, dtype: Any, chunk: int) -> Array:
    start = jnp.zeros(d, dtype)
    return fold_rows(fn, params, x, start, lambda s, rows: s + abs(rows).sum(0), chunk=chunk)


def error_of_jacobian(fn: Network, params: Params, x: Inputs, J: Array | None, dtype: Any) -> Array:
    """About ‖computed J − J‖: reverse mode against forward mode on random directions.

    For random signs v, E‖ΔJ v‖² = ‖ΔJ‖²_F, which bounds ‖ΔJ‖². Without J at hand the products with
    J and Jᵀ are compared: ⟨c, J v⟩ both ways.
    """
    operator = jacobian_operator(fn, params, x)
    rows, d = operator.shape

    def probe(seed: Array) -> Array:
        v = _signs(d, 2 * seed, dtype)
        Jv = operator.matvec(v)
        if J is not None:
            return jnp.linalg.norm(jnp.matmul(J, v, precision=_EXACT) - Jv)
        c = _signs(rows, 2 * seed + 1, dtype)
        return abs(jnp.vdot(c, Jv) - jnp.vdot(operator.rmatvec(c), v))

    found = lax.map(probe, jnp.arange(_PROBES, dtype=jnp.uint32))
    return 2 * jnp.sqrt(jnp.mean(found**2))


def _signs(size: int, seed: Array, dtype: Any) -> Array:
    """±1 by the finaliser of MurmurHash3: jax.random cannot run in a 64-bit scope in a jit."""
    x = lax.iota(jnp.uint32, size) * jnp.uint32(2654435761) + seed.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return 1 - 2 * (x & jnp.uint32(1)).astype(dtype)
