"""Computing in float64 whatever the user's configuration, inside any of jax's transformations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxinv._numerics.varying import vary_alike
from jaxinv.typing import Array, ArrayLike, DTypeLike, PyTree

T = TypeVar("T")


def in_precision(dtype: DTypeLike) -> AbstractContextManager[None]:
    """A scope in which `dtype` exists; no global option changes."""
    return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()


def as_dtype(tree: T, dtype: DTypeLike) -> T:
    """The floating-point leaves of a pytree as `dtype`."""

    def one(leaf: ArrayLike) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def call_in(dtype: DTypeLike, function: Callable[..., T], *arguments: PyTree) -> T:
    """function(*arguments) with the floats in `arguments` as `dtype`, in its scope.

    What has been traced in 64 bits cannot be vmapped outside of the scope: jax works out dtypes
    anew. So `vmap`, also of an already jitted caller, comes back here and enters the scope again.
    """

    def inside(*arguments: PyTree) -> T:
        with in_precision(dtype):
            return function(*as_dtype(arguments, dtype))

    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        return inside(*arguments)
    arguments = vary_alike(*arguments)
    return _vmapped_inside(inside, dtype)(*arguments)


def _vmapped_inside(inside: Callable[..., T], dtype: DTypeLike) -> Callable[..., T]:
    scoped = jax.custom_batching.custom_vmap(inside)

    @scoped.def_vmap
    def _rule(axis_size: int, batched: Sequence[PyTree], *arguments: PyTree) -> tuple[T, PyTree]:
        axes = tuple(jax.tree.map(lambda b: 0 if b else None, tree) for tree in batched)

        def ensemble(*arguments: PyTree) -> T:
            with in_precision(dtype):
                return jax.vmap(inside, axes, axis_size=axis_size)(*arguments)

        out = _vmapped_inside(ensemble, dtype)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    return scoped
