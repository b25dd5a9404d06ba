"""Ranks without rounding: of known rescalings, and of matrices of floats that are exact.

A generator moves parameter e by w_e·B_ej, with integer exponents B. Of the parameters that are not
0 and not dead the rows of B remain, so the dimension of the span depends on *which* these are, not
on how large the weights are. It is counted by elimination modulo a prime, which can only lose rank.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._numerics.varying import varying_like
from jaxinv.rescaling.group import RescalingGroup
from jaxinv.typing import Array

# Products of two residues fit 32 bits, which exist in any configuration of jax.
_PRIMES = (65521, 65519, 65497)
# Floats are whole numbers times powers of two with exponents in this range.
_EXPONENTS = range(-1200, 1200)


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
    residues = jnp.asarray(distinct % _PRIMES[0], jnp.uint32)
    return _pivots(jnp.where(shown[:, None], residues, 0), _PRIMES[0])


def independent_exact_columns(M: Array) -> Array:
    """Which columns of exact floats are independent of those before them, modulo a prime."""
    whole, exponent = _whole(M)
    return _pivots(_residues(M < 0, whole, exponent, _PRIMES[0]), _PRIMES[0])


class Modular(NamedTuple):
    """The rank of a matrix of exact numbers."""

    rank: Array  # int32: never more than the true one
    agreed: Array  # bool: found modulo two primes at least


def rank_of_exact(M: Array) -> Modular:
    """The rank of a matrix whose floats are exact: modulo three primes, of which two must agree.

    A prime loses rank only if it divides every largest non-zero minor, for numbers that know
    nothing of it in one case out of 65,000; two do in none of billions.
    """
    whole, exponent = _whole(M)
    residues = [_residues(M < 0, whole, exponent, p) for p in _PRIMES]
    pivots = [_pivots(R, p) for R, p in zip(residues, _PRIMES, strict=True)]
    ranks = jnp.stack([found.sum(dtype=jnp.int32) for found in pivots])
    rank = jnp.max(ranks)
    return Modular(rank, jnp.sum(ranks == rank) >= 2)


def _whole(M: Array) -> tuple[Array, Array]:
    """|M| as whole numbers times powers of two, given by their exponents."""
    digits = int(jnp.finfo(M.dtype).nmant) + 1
    word = jnp.uint64 if digits > 24 else jnp.uint32
    mantissa, exponent = jnp.frexp(abs(M))
    return jnp.ldexp(mantissa, digits).astype(word), exponent.astype(jnp.int32) - digits


def _residues(negative: Array, whole: Array, exponent: Array, p: int) -> Array:
    """Floats modulo p, which 2 does not divide: powers of two have an inverse."""
    powers = np.array([pow(2, e % (p - 1), p) for e in _EXPONENTS], np.uint32)
    power = jnp.asarray(powers)[exponent - _EXPONENTS[0]]
    found = _modulo(_modulo(whole, p).astype(jnp.uint32) * power, p)
    return jnp.where(negative, _modulo(p - found, p), found)


def _modulo(a: Array, p: int) -> Array:
    """a % p of unsigned integers, which needs none of the ten operations that see to signs."""
    return lax.rem(a, lax.full_like(a, p))


def _pivots(M: Array, p: int) -> Array:
    """Columns of residues modulo p that are independent of those before them, by elimination."""

    def eliminate(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        M, used, pivots = state
        column = jnp.where(used, 0, M[:, j])
        r = lax.argmax(column != 0, 0, jnp.int32)
        found = column[r] != 0
        row = _modulo(M[r] * _inverse(column[r], p), p)
        others = jnp.where(lax.iota(jnp.int32, len(column)) == r, 0, column)
        M = _modulo(M + _modulo(p - others, p)[:, None] * row, p)
        return M, used.at[r].set(used[r] | found), pivots.at[j].set(found)

    rows, columns = M.shape
    state = varying_like((M, jnp.zeros(rows, bool), jnp.zeros(columns, bool)), M)
    return lax.fori_loop(0, columns, eliminate, state)[2]


def _inverse(a: Array, p: int) -> Array:
    """a^(p − 2) mod p, by Fermat; 0 for 0."""
    result = jnp.ones_like(a)
    for bit in bin(p - 2)[2:]:
        result = _modulo(result * result, p)
        if bit == "1":
            result = _modulo(result * a, p)
    return result
