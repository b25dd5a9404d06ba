"""Parameters that `optax.masked` and `optax.partition` hide from a transformation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from jaxinv._numerics.precision import as_dtype
from jaxinv.errors import InvalidInput
from jaxinv.typing import Inputs, Network, Outputs, Params, PyTree

Mask = PyTree | Callable[[Params], PyTree] | None  # True where a leaf is chosen; None for all


def is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def of_visible(fn: Network, params: Params, full_params: Params | None) -> Network:
    """fn as a function of the unmasked parameters."""
    if not any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        return fn
    if full_params is None:
        raise InvalidInput(
            "Some parameters are masked (by optax.masked or optax.partition), but the network "
            "needs all of them. Wrap the whole optimizer in jaxinv.pass_full_params(...)."
        )

    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]

    def of_visible(visible: Params, x: Inputs) -> Outputs:
        others, found = full_params, [leaf.dtype for leaf in jax.tree.leaves(visible)]
        if found != dtypes:
            # A metric may be computed in another precision: all parameters follow.
            others = as_dtype(others, found[0])
        return fn(
            jax.tree.map(lambda v, w: w if is_masked(v) else v, visible, others, is_leaf=is_masked),
            x,
        )

    return of_visible
