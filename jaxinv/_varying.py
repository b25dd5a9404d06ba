"""Inside of `jax.shard_map`: arrays that differ from device to device, and say so in their types.

There an array that is the same on all devices has another type than one that varies over them, and
a gradient in the former is summed over the devices. A loop or a derivative that takes both must
have all of them vary. Outside nothing varies, and these functions do nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which the arrays of a pytree vary."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return frozenset().union(*map(_axes_of_type, types))


def _axes_of_type(kind: Any) -> frozenset[str]:
    # The attribute was called `vma` before.
    found = getattr(kind, "vma", None)
    return found if found is not None else getattr(kind.manual_axis_type, "varying", frozenset())


def struct_of(leaf: Any, *others: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, varying over what any array of the others varies over."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    axes = _axes(others)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    arrays = [a for a in jax.tree.leaves(others) if isinstance(a, jax.Array)]
    kind = next(jax.typeof(a) for a in arrays if _axes(a) == axes)
    name = "vma" if getattr(kind, "vma", None) is not None else "manual_axis_type"
    return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(kind, name)})


def varies(*trees: Any) -> bool:
    """Whether any array in the pytrees differs from device to device."""
    return bool(_axes(trees))


def varying_like(tree: Any, *others: Any) -> Any:
    """The pytree, varying also over what any array of the others varies over."""
    axes = _axes(others)
    if not axes:
        return tree

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)


def together(*trees: Any) -> Any:
    """The pytrees, each varying over what any of them varies over."""
    return varying_like(trees, trees)
