"""Directions of a kernel that no value reads: supports of low rank, found from random cotangents.

A kernel W is read through Σ_i h_i W_ij. Where all values h lie in a subspace, as those of a stream
wider than what it was made from or without a mean, W may move by v·cᵀ for every v orthogonal to
it and any c. These v are the null space of the Jacobian with respect to W, as a matrix (outputs
and j) × i. Random combinations of the outputs have the same null space, as soon as there are more
of them than the axis is long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.typing import Array, Inputs, Network, Params

_MOST = 1 << 26  # numbers in all cotangents
_MORE = 8  # cotangents beyond what an axis needs


def batch_rows(network: Network, params: Params, x: Inputs) -> np.ndarray:
    """The number of the example of each output, flat."""
    outputs = jax.tree.leaves(jax.eval_shape(lambda w: network(w, x), params))
    each = [
        np.repeat(np.arange(y.shape[0]), int(np.prod(y.shape[1:]))) if y.ndim else np.zeros(1, int)
        for y in outputs
    ]
    return np.concatenate(each)


def unread(
    outputs: Callable[[Array], Array],
    theta: Array,
    shapes: Sequence[tuple[int, ...]],
    examples: np.ndarray,
    clear: float,
) -> np.ndarray:
    """Directions v·cᵀ in kernels that no value reads, (k, parameters), not yet tried.

    Those that only the first half of the examples leave unread are too few inputs, and left out.
    """
    needed = [
        -(-2 * n // max(int(np.prod(shape)) // n, 1)) + _MORE
        for shape in shapes
        if len(shape) > 1
        for n in shape
        if n > 1
    ]
    count = max(needed, default=0)
    if not count or count * theta.size > _MOST or not len(examples):
        return np.zeros((0, theta.size))
    rng = np.random.default_rng(0)
    cotangents = rng.normal(size=(count, len(examples)))
    if not jnp.issubdtype(jax.eval_shape(outputs, theta).dtype, jnp.floating):
        return np.zeros((0, theta.size))
    _, pull = jax.vjp(lambda t: outputs(t).astype(theta.dtype), theta)

    @jax.jit
    def slopes(u: Array) -> Array:
        return jax.lax.map(lambda row: pull(row)[0], u)

    half = cotangents * (examples < (examples.max() + 1) // 2)
    whole, part = (np.asarray(slopes(jnp.asarray(u))) for u in (cotangents, half))
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    found = [np.zeros((0, theta.size))]
    for shape, start, end in zip(shapes, ends[:-1], ends[1:], strict=True):
        if len(shape) < 2:
            continue
        two = [a[:, start:end].reshape(count, *shape) for a in (whole, part)]
        for axis in range(len(shape)):
            v = _stable_kernel(two[0], two[1], axis, clear)
            if not len(v):
                continue
            directions = np.zeros((len(v) * (end - start) // max(shape[axis], 1), theta.size))
            block = _outer(v, shape, axis) * (abs(two[0]).max(axis=0) > 0)
            directions[:, start:end] = block.reshape(len(directions), -1)
            found.append(directions[directions.any(axis=1)])
    return orthonormal(np.concatenate(found))


def _stable_kernel(whole: np.ndarray, part: np.ndarray, axis: int, clear: float) -> np.ndarray:
    """Vectors along an axis that all slopes are orthogonal to, (k, n): as many in half of them."""
    n = whole.shape[1 + axis]
    rows = [np.moveaxis(a, 1 + axis, -1).reshape(-1, n) for a in (whole, part)]
    read = abs(rows[0]).max(axis=0) > 0  # what nothing reads at all is dead, not a direction
    if not read.any():
        return np.zeros((0, n))
    kernels = []
    for a in rows:
        _, s, Vt = np.linalg.svd(a[:, read], full_matrices=False)
        kernels.append(Vt[s <= clear * s[0]])
    if len(kernels[0]) != len(kernels[1]):
        return np.zeros((0, n))
    v = np.zeros((len(kernels[0]), n))
    v[:, read] = kernels[0]
    return v


def _outer(v: np.ndarray, shape: Sequence[int], axis: int) -> np.ndarray:
    """v along the axis at one place of the others at a time, (k · places, *shape)."""
    rest = [n for a, n in enumerate(shape) if a != axis]
    places = int(np.prod(rest))
    at = np.eye(places).reshape(places, *rest)
    both = np.multiply.outer(v, at)  # (k, n, places, *rest)
    moved = np.moveaxis(both, 1, 2 + axis)
    return moved.reshape(len(v) * places, *shape)


def orthonormal(rows: np.ndarray, rtol: float = 1e-8) -> np.ndarray:
    """An orthonormal basis of the span of rows of size near 1; directions within rtol are one."""
    if not len(rows):
        return rows
    _, s, Vt = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(Vt[s > rtol * max(s[0], 1e-300)])
