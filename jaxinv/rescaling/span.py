"""How many rescalings are independent where some parameters are 0, counted without forming them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._numerics import tolerances as policy
from jaxinv.rescaling.action import RescalingGroup, leaf_log_scales, transpose
from jaxinv.typing import Params


def span_dimension(group: RescalingGroup, params: Params) -> int:
    """Dimension of the span of the tangent vectors at params; not for traced params.

    The tangent of a generator with exponents B is w∘B, so the span is that of the rows of B where w
    is not 0. BᵀB of these is a matrix of whole numbers, formed without B.
    """
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

    gram = lax.map(column, jnp.eye(group.dim), batch_size=8)
    values = np.linalg.eigvalsh(np.asarray(gram))
    limit = policy.counts_from(group.dim, group.dim, np.float64) * max(values.max(), 1)
    return int((values > limit).sum())
