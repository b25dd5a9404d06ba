"""The upper bound: rescalings of the parameters that are not 0, counted without forming them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._numerics import tolerances as policy
from jaxinv.errors import UnsupportedOperation
from jaxinv.rescaling.action import leaf_log_scales, transpose
from jaxinv.rescaling.group import rescaling_group
from jaxinv.typing import Inputs, Params


def known_span(network: TracedNetwork, params: Params, x: Inputs) -> int:
    """How many of the known rescalings are independent, as far as parameters are not 0.

    Of a generator with exponents B the tangent is w∘B, so its span is that of the rows of B where
    w is not 0. BᵀB of these is a matrix of whole numbers, formed without B.
    """
    try:
        group = rescaling_group(network, params, x)
    except UnsupportedOperation:
        return 0
    if not group.dim:
        return 0
    live = [jnp.asarray(a) != 0 for a in jax.tree.leaves(params)]

    def column(u: jax.Array) -> jax.Array:
        scales = leaf_log_scales(group, u)
        shown = [
            jnp.where(on, jnp.broadcast_to(s, on.shape), 0)
            for on, s in zip(live, scales, strict=True)
        ]
        return transpose(group, shown)

    gram = jax.lax.map(column, jnp.eye(group.dim), batch_size=8)
    values = np.linalg.eigvalsh(np.asarray(gram))
    limit = policy.counts_from(group.dim, group.dim, np.float64) * max(values.max(), 1)
    return int((values > limit).sum())
