"""Inside of `jax.shard_map`: arrays that differ from device to device, and say so in their types.

There an array that is the same on all devices has another type than one that varies over them, and
a gradient in the former is summed over the devices. A loop or a derivative that takes both must
have all of them vary. Outside nothing varies, and these functions do nothing.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax import lax

from jaxinv.typing import Array, PyTree

T = TypeVar("T")


def _axes(tree: PyTree) -> frozenset[str]:
    """The mesh axes over which the arrays of a pytree vary."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.core.Tracer)]
    types = map(jax.typeof, leaves)  # an array with numbers is the same for whoever looks
    return frozenset().union(*map(_axes_of_type, types))


def _axes_of_type(kind: Any) -> frozenset[str]:
    # The attribute was called `vma` before.
    found = getattr(kind, "vma", None)
    return found if found is not None else getattr(kind.manual_axis_type, "varying", frozenset())


def varies(*trees: PyTree) -> bool:
    """Whether any array in the pytrees differs from device to device."""
    return bool(_axes(trees))


def varying_like(tree: T, *others: PyTree) -> T:
    """The pytree, varying also over what any array of the others varies over."""
    axes = _axes(others)
    if not axes:
        return tree

    def one(leaf: Array) -> Array:
        missing = tuple(sorted(axes - _axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)


def vary_alike(*trees: PyTree) -> tuple[PyTree, ...]:
    """The pytrees, each varying over what any of them varies over."""
    return varying_like(trees, trees)
