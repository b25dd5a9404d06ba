"""The upper bound: known rescalings of the parameters that are not 0, counted without forming them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv.errors import UnsupportedOperation
from jaxinv.rescaling.action import leaf_log_scales, transpose
from jaxinv.rescaling.group import rescaling_group
from jaxinv.typing import Inputs, Params


def known_span(network: TracedNetwork, params: Params, x: Inputs) -> tuple[int, int]:
    """(independent rescalings, parameters that the program does not use)."""
    try:
        group = rescaling_group(network, params, x)
    except UnsupportedOperation:
        return 0, 0
    if not group.dim:
        return 0, 0
    leaves = jax.tree.leaves(params)
    live = [jnp.asarray(a) != 0 for a in leaves]

    def column(u: jax.Array) -> jax.Array:
        scales = leaf_log_scales(group, u)
        shown = [
            jnp.where(on, jnp.broadcast_to(s, on.shape), 0)
            for on, s in zip(live, scales, strict=True)
        ]
        return transpose(group, shown)

    gram = np.asarray(jax.lax.map(column, jnp.eye(group.dim), batch_size=8))
    # Whole numbers, so the Gram matrix of the exponents is exact; a positive definite one has full rank.
    values = np.linalg.eigvalsh(gram)
    limit = group.dim * np.finfo(float).eps * max(values.max(), 1) * 8
    return int((values > limit).sum()), 0
