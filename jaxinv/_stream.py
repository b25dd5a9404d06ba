"""Matrix-vector products with |W|^p that read W once and never store |W|^p.

On a batch of one, a dense layer's path sums are bound by memory traffic. Storing |W|^p would triple
it; here each block of rows is raised to the power p while it is in cache. This is what makes a step
of Path-SGD cost a few per cent more than a step of SGD, instead of a few tens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Rows are taken in blocks of about this many elements: 256 KiB of float32 stay in a core's cache.
_BLOCK = 1 << 16
# Below this size the plain product is as fast, and compiles to fewer kernels.
SMALLEST = 1 << 16


def _power(block: Any, p: int, scale: Any, dtype: Any) -> Any:
    x = block.astype(dtype) * scale
    return abs(x) if p == 1 else lax.integer_pow(x, p) if p % 2 == 0 else abs(x) ** p


def _blocks(matrix: Any) -> tuple[int, int]:
    """(number of whole blocks, rows in each)."""
    step = max(1, _BLOCK // matrix.shape[1])
    return matrix.shape[0] // step, step


def _rows_times(matrix: Any, vector: Any, p: int, scale: Any) -> Any:
    """|W|^p v: one number per row."""

    def whole(matrix: Any, vector: Any) -> Any:
        return _power(matrix, p, scale, vector.dtype) @ vector

    def in_blocks(matrix: Any, vector: Any) -> Any:
        blocks, step = _blocks(matrix)
        if blocks == 0:
            return whole(matrix, vector)

        def one(_: None, i: Any) -> tuple[None, Any]:
            return None, whole(lax.dynamic_slice_in_dim(matrix, i * step, step), vector)

        rows = lax.scan(one, None, jnp.arange(blocks))[1].reshape(-1)
        return jnp.concatenate([rows, whole(matrix[blocks * step :], vector)])

    return lax.platform_dependent(matrix, vector, cpu=in_blocks, default=whole)


def _times_rows(matrix: Any, vector: Any, p: int, scale: Any) -> Any:
    """v |W|^p: one number per column."""

    def whole(matrix: Any, vector: Any) -> Any:
        return vector @ _power(matrix, p, scale, vector.dtype)

    def in_blocks(matrix: Any, vector: Any) -> Any:
        blocks, step = _blocks(matrix)
        total = whole(matrix[blocks * step :], vector[blocks * step :])
        if blocks == 0:
            return total

        def add(total: Any, i: Any) -> tuple[Any, None]:
            block = lax.dynamic_slice_in_dim(matrix, i * step, step)
            return total + whole(block, lax.dynamic_slice_in_dim(vector, i * step, step)), None

        return lax.scan(add, total, jnp.arange(blocks))[0]

    return lax.platform_dependent(matrix, vector, cpu=in_blocks, default=whole)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def contract(vector: Any, length: Any, matrix: Any, scales: Any, p: int, axis: int) -> Any:
    """Σ_k vector_k · |matrix·scale|^p, contracted over `axis` of the matrix.

    `length` must equal |matrix·scale|^p / unit, with (scale, unit) = `scales` powers of two. It is
    never read: it receives the gradient. The gradient with respect to `matrix` is all in it.
    """
    del length
    scale, _ = scales
    product = _times_rows if axis == 0 else _rows_times
    return product(matrix, vector, p, scale)


def _forward(vector: Any, length: Any, matrix: Any, scales: Any, p: int, axis: int) -> Any:
    return contract(vector, length, matrix, scales, p, axis), (vector, matrix, scales)


def _backward(p: int, axis: int, kept: Any, cotangent: Any) -> Any:
    vector, matrix, scales = kept
    scale, unit = scales
    product = _rows_times if axis == 0 else _times_rows
    rows, columns = (vector, cotangent) if axis == 0 else (cotangent, vector)
    of_length = (rows * unit)[:, None] * columns
    zeros = jnp.zeros_like(matrix), jax.tree.map(jnp.zeros_like, scales)
    return product(matrix, cotangent, p, scale), of_length, *zeros


contract.defvjp(_forward, _backward)
