"""Pytrees of arrays as vectors, and sums along axes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.typing import Array, DTypeLike, Inputs, Network, Params, PyTree


def flatten(tree: PyTree, dtype: DTypeLike) -> Array:
    """The leaves as one vector."""
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)])


def unflatten(vector: Array, like: PyTree) -> PyTree:
    """A vector as a pytree with the shapes and dtypes of another."""
    leaves, tree = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(vector, ends)
    return jax.tree.unflatten(
        tree, [p.reshape(a.shape).astype(a.dtype) for p, a in zip(parts, leaves, strict=True)]
    )


def outputs_of(fn: Network, params: Params, x: Inputs, dtype: DTypeLike) -> Array:
    """fn(params, x) as (n, out)."""
    leaves = jax.tree.leaves(fn(params, x))
    return jnp.concatenate([y.reshape(y.shape[0], -1).astype(dtype) for y in leaves], 1)


def reduced_to(reduce: Callable[..., Array], array: Array, shape: tuple[int, ...]) -> Array:
    """`reduce`, such as `jnp.sum`, over the axes along which `shape` has length one."""
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and array.shape[a] > 1)
    return reduce(array, axes, keepdims=True) if axes else array


def summed_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes along which `shape` has length one."""
    return reduced_to(jnp.sum, array, shape)
