"""The span of known rescalings, counted exactly.

A generator moves parameter e by w_e·B_ej, with integer exponents B. Of the parameters that are not
0 and not dead the rows of B remain, so the dimension of the span depends on *which* these are, not
on how large the weights are. It is counted by elimination modulo a prime: never too large.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv.rescaling import RescalingGroup
from jaxinv.typing import Array

# Products of two residues fit 32 bits, which exist in any configuration of jax.
_PRIME = 65521


def exponents_of(group: RescalingGroup) -> np.ndarray:
    """B as (d, dim) integers, parameters in the order of `jax.flatten_util.ravel_pytree`."""
    structure = group.structure
    classes = np.zeros((structure.num_classes, structure.dim), np.int32)
    rows, columns = np.asarray(group.rows), np.asarray(group.columns)
    np.add.at(classes, (rows, columns), np.asarray(group.coefficients))
    leaves = [np.zeros((0, structure.dim), np.int32)]
    for shape, terms in zip(structure.leaf_shapes, group.indices, strict=True):
        ids = [np.broadcast_to(np.asarray(t), shape).ravel() for t in terms]
        size = int(np.prod(shape))
        leaves.append(sum((classes[i] for i in ids), np.zeros((size, structure.dim), np.int32)))
    return np.concatenate(leaves)


def independent_columns(exponents: np.ndarray, live: Array) -> Array:
    """Which columns are independent of those before them, on the rows that are live: (dim,) bool.

    Their number is at most the rank over the rationals, and equal unless the prime divides a minor.
    """
    distinct, which = np.unique(exponents, axis=0, return_inverse=True)
    shown = jnp.zeros(len(distinct), bool).at[np.ravel(which)].max(live)
    residues = jnp.asarray(distinct % _PRIME, jnp.uint32)
    M = jnp.where(shown[:, None], residues, 0)

    def eliminate(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        M, used, pivots = state
        column = jnp.where(used, 0, M[:, j])
        r = jnp.argmax(column != 0)
        found = column[r] != 0
        row = M[r] * _inverse(column[r]) % _PRIME
        others = jnp.where(jnp.arange(len(column)) == r, 0, column)
        M = (M + (_PRIME - others)[:, None] % _PRIME * row) % _PRIME
        return M, used.at[r].set(used[r] | found), pivots.at[j].set(found)

    dim = exponents.shape[1]
    state = (M, jnp.zeros(len(distinct), bool), jnp.zeros(dim, bool))
    return lax.fori_loop(0, dim, eliminate, state)[2]


def _inverse(a: Array) -> Array:
    """a^(p − 2) mod p, by Fermat; 0 for 0."""
    result = jnp.ones_like(a)
    for bit in bin(_PRIME - 2)[2:]:
        result = result * result % _PRIME
        if bit == "1":
            result = result * a % _PRIME
    return result
