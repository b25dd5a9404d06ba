"""Matrix-vector products with |W|^p, p = 1 or 2, that read W once and never store |W|^p.

On a batch of one, a dense layer's path sums are bound by memory traffic, and storing |W|^p would
triple it. XLA's CPU backend fuses a sum of squares into the read of W, but not a product W²·v. So
Σ_i W_ij² v_i is spelled Σ_i (W_ij √v_i)²; for p = 1 nothing need be drawn out of the root.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv.typing import Array

# Below this size the plain product is as fast, and compiles to fewer kernels.
SMALLEST = 1 << 16

_Scales = tuple[Array, Array]
_Kept = tuple[Array, Array, _Scales, tuple[()] | None]


class _Perturbed(Protocol):
    """An argument of a `custom_vjp`, and whether it is differentiated."""

    value: Array
    perturbed: bool


def _product(matrix: Array, vector: Array, p: int, scales: _Scales, axis: int) -> Array:
    """Σ_k vector_k · |matrix·rows·columns|^p over `axis` of the matrix, for a vector >= 0.

    The square root is correctly rounded: vectors that differ by powers of four give sums that do.
    """
    root = lax.expand_dims(jnp.sqrt(vector) if p == 2 else vector, (1 - axis,)) * scales[axis]
    # Without the barrier XLA would work the root out again for each element of the matrix.
    weighted = matrix.astype(vector.dtype) * lax.optimization_barrier(root) * scales[1 - axis]
    return jnp.sum(lax.square(weighted) if p == 2 else abs(weighted), axis)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def contract(
    vector: Array, length: Array, matrix: Array, scales: _Scales, p: int, axis: int
) -> Array:
    """Σ_k vector_k · |matrix·rows·columns|^p, contracted over `axis` of the matrix; vector >= 0.

    `scales` are powers of two, one for each row of the matrix, (m, 1), and each column, (1, n).
    `length` must equal |matrix·rows·columns|^p. It is never read: it receives the gradient. The
    gradient with respect to `matrix` is all in it.
    Cotangents must be >= 0 too, as those of path sums are; a negative one gives NaN.
    """
    del length
    return _product(matrix, vector, p, scales, axis)


class _Given(Protocol):
    """An argument, and whether a derivative with respect to it is asked for."""

    value: Array
    perturbed: bool


def _forward(
    vector: _Given,
    length: _Given,
    matrix: _Given,
    scales: tuple[_Given, _Given],
    p: int,
    axis: int,
) -> tuple[Array, _Kept]:
    perturbed = vector.perturbed  # not so where it comes from the network's input alone
    values = jax.tree.map(
        lambda v: v.value, (vector, length, matrix, scales), is_leaf=lambda v: hasattr(v, "value")
    )
    kept = (values[0], values[2], values[3], () if perturbed else None)
    return contract(*values, p, axis), kept


def _backward(
    p: int, axis: int, kept: _Kept, cotangent: Array
) -> tuple[Array, Array, Array, _Scales]:
    vector, matrix, scales, needed = kept
    of_vector = jnp.zeros_like(vector)
    if needed is not None:
        of_vector = _product(matrix, cotangent, p, scales, 1 - axis)
        # An update in place of the matrix needs rows and columns only. If it could come before this
        # last read, XLA would copy the matrix first: so make it depend on what was read.
        vector = vector * jnp.where(jnp.isnan(of_vector[0]), jnp.nan, 1)
    rows, columns = (vector, cotangent) if axis == 0 else (cotangent, vector)
    of_length = rows[:, None] * columns
    return of_vector, of_length, jnp.zeros_like(matrix), jax.tree.map(jnp.zeros_like, scales)


contract.defvjp(_forward, _backward, symbolic_zeros=True)
