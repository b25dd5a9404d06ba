"""What every public function checks of its arguments before it computes anything."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinv.errors import InvalidInput


def leaf_names(tree: Any, root: str) -> list[str]:
    """Readable names of the leaves of a pytree: `root/Dense_0/kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = []
    for path, _ in paths:
        parts = []
        for entry in path:
            part = getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))
            parts.append(str(part))
        names.append("/".join([root, *parts]) if root else "/".join(parts))
    return names


def check_params(params: Any) -> None:
    """Raise `InvalidInput` unless `params` is a non-empty pytree of finite real float arrays.

    Values are looked at only where they are concrete, that is outside `jit`.
    """
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise InvalidInput(
            "params has no leaves, so there is nothing to compute with. Pass the pytree of weights "
            "(for flax: variables['params'])."
        )
    for name, leaf in zip(leaf_names(params, "params"), leaves, strict=True):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise InvalidInput(
                f"{name} is a {type(leaf).__name__}, not an array. Convert it with jnp.asarray, or "
                "close over it if it is not a parameter."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InvalidInput(
                f"{name} has dtype {leaf.dtype}, but parameters must be real floating-point "
                "arrays.\n"
                "Pass only the float leaves as params and close over the others "
                "(flax nnx: nnx.split(model, nnx.Param, ...); equinox: eqx.partition)."
            )
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        with jax.ensure_compile_time_eval():
            bad = int(leaf.size - jnp.isfinite(leaf).sum())
        if bad:
            raise InvalidInput(
                f"{name} has {bad} non-finite (NaN or infinite) of {leaf.size} values; a "
                "path through any of them has no length. Find the step that produced them, "
                "e.g. with jax.debug_nans."
            )


def abstract_batch_of_one(x: Any) -> Any:
    """Shapes of `x` with every leading batch axis set to 1; the values of `x` play no part."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise InvalidInput("x has no leaves; pass an array with a leading batch axis.")

    def one(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = jnp.shape(leaf), jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        if not shape:
            raise InvalidInput(
                f"{name} is a scalar, but every input needs a leading batch axis. "
                "Pass x[None] for one example, or close over settings that are not inputs."
            )
        if 0 in shape:
            raise InvalidInput(
                f"{name} has shape {shape}: an axis of length 0 leaves no input element. "
                "Pass at least one example (only shapes are used, jax.ShapeDtypeStruct will do)."
            )
        return jax.ShapeDtypeStruct((1, *shape[1:]), dtype)

    names = iter(leaf_names(x, "x"))
    return jax.tree.map(lambda leaf: one(next(names), leaf), x)
