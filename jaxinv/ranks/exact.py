"""Ranks of Jacobians in exact arithmetic, of networks that are piecewise polynomial.

The function meant is the one that `fn` writes in real numbers, at the floats that params, x and the
constants of the program are. Its Jacobian is a matrix of rational numbers. It is found modulo two
primes, and so is its rank. A rank modulo a prime is never above the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Operand, interpret, trace
from jaxinv.errors import InvalidInput
from jaxinv.ranks.exact_domain import ExactDomain
from jaxinv.ranks.exact_values import PRIMES, Exact, lift
from jaxinv.typing import Inputs, Network, Params, PyTree

# Elements of the Jacobian, and steps of its elimination: a minute or so.
MOST_ELEMENTS = 1 << 22
MOST_STEPS = 1 << 31
_COLUMNS = 256


class ExactRank(NamedTuple):
    """A rank in exact arithmetic."""

    rank: int  # a proven lower bound
    agreed: bool  # the same modulo both primes


def exact_rank(fn: Network, params: Params, x: Inputs, most_steps: int = MOST_STEPS) -> ExactRank:
    """The rank of ∂fn(params, x)/∂params in exact arithmetic, at concrete params and x."""
    check_known(params, x)
    _check_size(fn, params, x, most_steps)
    found = [rank_modulo(J, p) for J, p in zip(jacobian_modulo(fn, params, x), PRIMES, strict=True)]
    return ExactRank(max(found), len(set(found)) == 1)


def check_known(params: Params, x: Inputs) -> None:
    """Raise `InvalidInput` where values are not known."""
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(x)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise InvalidInput(
            "method='exact' computes with the numbers in params and x, which are not known inside "
            "jit, vmap or grad. Call it outside, one network at a time, or use method='auto'."
        )


def _check_size(fn: Network, params: Params, x: Inputs, most_steps: int) -> None:
    """Raise `InvalidInput` where the answer would take minutes."""
    d = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    rows = sum(
        int(np.prod(y.shape))
        for y in jax.tree.leaves(jax.eval_shape(lambda w, x: fn(w, x), params, x))
    )
    if rows * d > MOST_ELEMENTS or rows * d * min(rows, d) > most_steps:
        raise InvalidInput(
            f"method='exact' eliminates the {rows} x {d} Jacobian step by step. It takes Jacobians "
            f"of at most {MOST_ELEMENTS} elements and {most_steps} steps, rows·d·min(rows, d). "
            "Use fewer inputs, or method='auto', 'certificate' or 'tsqr'."
        )


def jacobian_modulo(fn: Network, params: Params, x: Inputs) -> np.ndarray:
    """(2, n·out, d): the Jacobian modulo each of the two primes, rows and columns as `jacobian`."""
    weights = jax.tree.leaves(params)
    inputs, x_tree = jax.tree.flatten(x)
    smooth = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in inputs]
    # Indices and masks are constants of the program.
    floats = [leaf for leaf, s in zip(inputs, smooth, strict=True) if s]

    def on_floats(params: Params, floats: list) -> PyTree:
        rest = iter(floats)
        merged = [next(rest) if s else leaf for leaf, s in zip(inputs, smooth, strict=True)]
        return fn(params, jax.tree.unflatten(x_tree, merged))

    traced = trace(on_floats, params, floats)
    domain = ExactDomain()
    numbers = [lift(None, np.asarray(w)) for w in weights]
    data = [lift(None, np.asarray(a)) for a in floats]
    d = sum(w.num.size for w in numbers)
    blocks = []
    for start in range(0, d, _COLUMNS):
        columns = range(start, min(start + _COLUMNS, d))
        moving = _with_columns(numbers, columns)
        fixed = [Exact(a.num, a.den) for a in data]
        outputs = interpret(traced, moving, fixed, domain)
        blocks.append(_rows(outputs, len(columns)))
    return np.concatenate(blocks, 2)


def _with_columns(weights: list[Exact], columns: range) -> list[Exact]:
    """The parameters, each of which moves itself and nothing else."""
    out, start = [], 0
    for w in weights:
        mine = [c for c in columns if start <= c < start + w.num.size]
        tangents = None
        if mine:
            tangents = np.zeros((len(PRIMES), w.num.size, len(columns)), np.int64)
            tangents[:, np.array(mine) - start, np.array(mine) - columns.start] = 1
        out.append(Exact(w.num, w.den, tangents))
        start += w.num.size
    return out


def _rows(outputs: Sequence[Operand], columns: int) -> np.ndarray:
    """(primes, n·out, columns): the outputs of one example after those of another."""
    parts = []
    for y in outputs:
        y = lift(None, y)
        tangents = y.tangents
        if tangents is None:
            tangents = np.zeros((len(PRIMES), y.num.size, columns), np.int64)
        parts.append(tangents.reshape(len(PRIMES), y.shape[0], -1, columns))
    return np.concatenate(parts, 2).reshape(len(PRIMES), -1, columns)


def rank_modulo(matrix: np.ndarray, p: int) -> int:
    """The rank of a matrix of residues modulo the prime p, by elimination."""
    m = np.unique(matrix, axis=0)
    m = m if m.shape[0] <= m.shape[1] else np.ascontiguousarray(np.unique(m, axis=1))
    rank = 0
    for column in range(m.shape[1]):
        below = np.flatnonzero(m[rank:, column]) + rank
        if not below.size:
            continue
        if below[0] != rank:
            m[[rank, below[0]]] = m[[below[0], rank]]
        pivot = m[rank, column:] * pow(int(m[rank, column]), -1, p) % p
        below = below[1:]
        m[below, column:] = (m[below, column:] - m[below, column, None] * pivot) % p
        rank += 1
        if rank == len(m):
            break
    return rank
