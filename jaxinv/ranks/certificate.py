"""Ranks proven from below by Cholesky factors, without an SVD.

If JᵀJ plus a matrix of rank k is positive definite, then rank J ≥ d − k. The matrix of rank k
covers what is known of the null space: rescalings and matrices T, dead parameters E. That is the
certificate. Where it fails the null space is larger: on these inputs a unit is linear, say. Inverse
iteration with the same factor finds what is missing, a second factorisation proves that nothing
else is, and products with J itself, which is not squared, measure how close to zero it is. That is
deflation.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.lapack import cholesky, orthonormal, thin_svd
from jaxinv.jacobians.jacobians import jacobian_operator, scaled_gram
from jaxinv.jacobians.problem import problem_of
from jaxinv.ranks.evidence import Evidence, noise
from jaxinv.ranks.record import Rank
from jaxinv.typing import Array, DType, Inputs, Network, Params

_EXACT = lax.Precision.HIGHEST
# Rows per column that the first try takes, if that is at most half of them.
_ENOUGH_ROWS = 1.25
# Directions that deflation looks for: a share of all, within limits; and at a time.
_LEAST_BLOCK, _MOST_BLOCK, _SHARE, _AT_A_TIME = 32, 256, 16, 32
_INVERSE_ITERATIONS = 2
_REFINEMENTS = 2


class Factored(NamedTuple):
    """JᵀJ of columns of one size, on some rows or all, and what its factor proves."""

    gram: Array  # (d, d)
    margin: Array  # μ: the factorisation would survive errors up to this
    proven: Array  # bool: JᵀJ + TTᵀ + E > 0


def _margin(gram: Array, covered: Array, rows: int, error: Array) -> Array:
    """What forming gram + covered and factoring it can be wrong by.

    Sums of `rows` and of d products, relative to the diagonal, whose sum is the trace; and what the
    error of J adds.
    """
    d, eps = len(gram), float(jnp.finfo(gram.dtype).eps)
    size = jnp.sqrt(jnp.trace(gram))
    trace = jnp.trace(gram) + jnp.trace(covered)
    return trace * (eps * (d + 2 + 8 * float(np.sqrt(rows)))) + error * (2 * size + error)


def _is_positive(gram: Array, covered: Array, margin: Array) -> Array:
    """Whether gram + covered > 0: the factorisation goes through with `margin` less."""
    lowered = gram + covered - margin * jnp.eye(len(gram), dtype=gram.dtype)
    return jnp.isfinite(cholesky(lowered)).all()


def _known_directions(evidence: Evidence) -> Array:
    """TTᵀ + E: of the rank of what is known of the null space."""
    T = evidence.known.tangents
    return jnp.matmul(T, T.T, precision=_EXACT) + jnp.diag(evidence.known.dead.astype(T.dtype))


def _first_examples(about: policy.About) -> np.ndarray | None:
    """Evenly spaced ones that should do for a proof, if that is at most half of them."""
    wanted = int(np.ceil(_ENOUGH_ROWS * about.parameters / about.outputs))
    if 2 * wanted > about.examples:
        return None
    return np.arange(wanted) * about.examples // wanted


def factored(
    params: Params, x: Inputs, fn: Network, dtype: DType, chunk: int | None, evidence: Evidence
) -> Factored:
    """Gram matrix and proof. Rows that prove the largest rank there can be prove it for all."""
    problem = problem_of(fn, params, x)
    d = problem.parameters
    covered = _known_directions(evidence)
    # Rows for a quarter of the memory of JᵀJ: it is read and written once for each chunk.
    at_once = chunk or max(1, d // (4 * problem.outputs))
    reached = evidence.upper == d - evidence.known.num_dead - evidence.known.span

    def proof(gram: Array, rows: int) -> Factored:
        margin = _margin(gram, covered, rows, evidence.error)
        return Factored(gram, margin, _is_positive(gram, covered, margin) & reached)

    def gram(some: np.ndarray | slice) -> Array:
        part = jax.tree.map(lambda a: a[some], x)
        return scaled_gram(fn, params, part, evidence.scale, chunk=at_once)

    first = _first_examples(evidence.about) if problem.apart else None
    if first is None:
        return proof(gram(slice(None)), problem.rows)
    tried = proof(gram(first), len(first) * problem.outputs)
    others = np.setdiff1d(np.arange(problem.examples), first)
    found: Factored = lax.cond(
        tried.proven,
        lambda: tried,
        lambda: proof(tried.gram + gram(others), problem.rows),
    )
    return found


def rank_by_certificate(found: Factored, evidence: Evidence) -> Rank:
    """d − (rescalings) − (matrices) − (dead) if that is proven, else -1.

    The rank is at most that by theory, for T has no more columns than its exact span. The scale of
    the columns does not change the rank, and conditions the matrix.
    """
    proven = found.proven & (not evidence.about.casts)
    reason = evidence.reason + policy.flag(~proven, policy.NOT_FACTORED)
    silent = policy.LIMITED_BY_ROWS | policy.MEASURED
    nothing = jnp.full((), jnp.nan, found.margin.dtype)
    return Rank(
        jnp.where(proven, evidence.upper, -1),
        jnp.where(proven, evidence.upper, 0),
        evidence.upper,
        proven,
        proven,
        jnp.where(proven, reason & silent, reason),
        jnp.zeros_like(nothing),
        jnp.sqrt(found.margin),
        nothing,
        jnp.sqrt(found.margin),
        nothing,
        evidence.about,
    )


# --- deflation ------------------------------------------------------------------------


def can_deflate(evidence: Evidence, dtype: DType) -> bool:
    """Whether few enough directions may be missing, and errors are known in float64."""
    about = evidence.about
    lacking = about.parameters - about.examples * about.outputs
    return dtype == jnp.float64 and not about.casts and lacking < _block(about.parameters)


def _block(d: int) -> int:
    return min(d, _MOST_BLOCK, max(_LEAST_BLOCK, d // _SHARE))


def _solve(L: Array, B: Array) -> Array:
    """(LLᵀ)⁻¹ B."""
    half = lax.linalg.triangular_solve(L, B, left_side=True, lower=True)
    return lax.linalg.triangular_solve(L, half, left_side=True, lower=True, transpose_a=True)


@partial(jax.jit, static_argnames=("fn",))
def rank_by_deflation(
    params: Params, x: Inputs, fn: Network, gram: Array, evidence: Evidence
) -> Rank:
    """The rank where the null space is larger than what is known of it, else -1.

    Args:
        gram: JᵀJ of all rows, columns scaled to one size.

    Returns:
        `lower` is proven. The rank is -1 where no wide gap tells zeros from the rest: more
        directions than were looked for, or singular values below √(machine epsilon) of the largest.
    """
    problem = problem_of(fn, params, x)
    operator = jacobian_operator(fn, params, x)
    d, dtype = problem.parameters, gram.dtype
    scale, known = evidence.scale, evidence.known
    covered = _known_directions(evidence)

    def forth(V: Array) -> Array:
        return lax.map(lambda v: operator.matvec(scale * v), V.T, batch_size=_AT_A_TIME).T

    def back(Y: Array) -> Array:
        return lax.map(lambda y: scale * operator.rmatvec(y), Y.T, batch_size=_AT_A_TIME).T

    margin = _margin(gram, covered, problem.rows, evidence.error)
    L = cholesky(gram + covered + margin * jnp.eye(d, dtype=dtype))
    V = noise(d * _block(d), jnp.uint32(1024), dtype).reshape(d, -1)
    for _ in range(_INVERSE_ITERATIONS):
        V = orthonormal(_solve(L, V))
    # JᵀJ is good to rounding of its largest values; products with J to that of their own size.
    for _ in range(_REFINEMENTS):
        image = back(forth(V)) + jnp.matmul(covered, V, precision=_EXACT)
        V = orthonormal(V - _solve(L, image))
    _, values, Rt = thin_svd(forth(V))
    size = jnp.sqrt(jnp.trace(gram))
    error = policy.roundings(problem.rows, d, dtype) * size + evidence.error
    zero = values <= error
    null = jnp.where(zero, jnp.matmul(V, Rt.T, precision=_EXACT), 0)
    missing = zero.sum(dtype=jnp.int32)
    covered = covered + jnp.matmul(null, null.T, precision=_EXACT)
    margin = _margin(gram, covered, problem.rows, evidence.error)
    smallest = jnp.sqrt(margin)
    following = jnp.max(jnp.where(zero, values, 0))
    found = _is_positive(gram, covered, margin)
    found = found & policy.is_gap(smallest, jnp.maximum(error, following))
    rank = jnp.asarray(d, jnp.int32) - known.num_dead - known.span - missing
    # A column of zeros that rounding could have made is no zero, so nothing is clear.
    hides = evidence.sizes.zero & ~evidence.sizes.dead & (evidence.sizes.error is not None)
    certain = found & (rank == evidence.upper)
    clear = certain | (found & (rank < evidence.upper) & ~hides.any())
    reason = (
        evidence.reason
        + policy.flag(~clear, policy.ROUNDING)
        + policy.flag(rank != evidence.upper, policy.NO_UPPER_BOUND)
    )
    silent = policy.LIMITED_BY_ROWS | policy.MEASURED
    return Rank(
        jnp.where(found, rank, -1),
        jnp.where(found, rank, 0),
        evidence.upper,
        certain,
        clear,
        jnp.where(certain, reason & silent, reason),
        error,
        error,
        jnp.full((), jnp.nan, dtype),
        smallest,
        smallest / jnp.where(following > 0, following, error),
        evidence.about,
    )
