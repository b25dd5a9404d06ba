"""What is known of the null space of a Jacobian, and how well the Jacobian itself is.

Two things bound a rank from above without any decision on small numbers: parameters on which
nothing depends, and rescalings and matrix symmetries that the program of `fn` is known to have.
From below it is bounded by what stands out of the error of the computed Jacobian. See
`_numerics.tolerances` for the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.rounding import with_rounding
from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.chunks import fold_chunks
from jaxinv._numerics.varying import vary_alike, varying_like
from jaxinv._numerics.vectors import flatten as flattened
from jaxinv._numerics.vectors import outputs_of
from jaxinv.errors import UnsupportedOperation
from jaxinv.frames.follow import frames_of
from jaxinv.frames.matrices import exact_classes, off_diagonal_tangents
from jaxinv.jacobians.jacobians import fold_rows, jacobian_operator
from jaxinv.jacobians.problem import problem_of
from jaxinv.ranks.casts import casts_of
from jaxinv.ranks.spans import exponents_of, independent_columns, independent_exact_columns
from jaxinv.rescaling.group import rescaling_group, tangent_vectors
from jaxinv.typing import Array, DType, DTypeLike, Inputs, Network, Params

_PROBES = 4
# The span of the generators is worked out up to this many; more are not used as a bound.
_MOST_GENERATORS = 4096
_MOST_EXPONENTS = 1 << 28
# Tangents of matrices are eliminated one by one, each against all parameters.
_MOST_MATRICES = 1024
_MOST_ENTRIES = 1 << 24
_EXACT = lax.Precision.HIGHEST

T = TypeVar("T")


class Sizes(NamedTuple):
    """Of every column of J: its entries, and how far they may be off."""

    largest: Array  # (d,): max |J|
    total: Array  # (d,): Σ |J|
    error: Array | None  # (d,): bound on max |ΔJ|; None where operations are not known

    @property
    def zero(self) -> Array:
        """Columns that were computed as 0."""
        return self.largest == 0

    @property
    def dead(self) -> Array:
        """Columns that are 0: no product can have underflowed or been rounded away."""
        if self.error is None:
            return jnp.zeros_like(self.zero)
        return self.zero & (self.error == 0)

    @property
    def scale(self) -> Array:
        """Powers of two that bring the columns to about norm one; 1 for columns of zeros.

        The same mantissas give the same powers, so a rescaled network the same scaled matrix.
        """
        some = jnp.where(self.zero, 1, self.largest)
        e = jnp.frexp(some)[1]
        # Σ J² lies between (Σ|J|)²/rows and max|J|·Σ|J|.
        square = jnp.ldexp(some, -e) * jnp.ldexp(jnp.where(self.zero, 1, self.total), -e)
        e = e + jnp.frexp(jnp.sqrt(square))[1]
        info = jnp.finfo(self.largest.dtype)
        e = jnp.clip(e, int(info.minexp) + 1, int(info.maxexp) - 1)
        return jnp.where(self.zero, 1, jnp.ldexp(jnp.ones_like(some), -e))


def sizes_of(fn: Network, params: Params, x: Inputs, dtype: DTypeLike, chunk: int) -> Sizes:
    """Sizes and errors of the columns, one pass over the rows of J."""
    shapes = problem_of(fn, params, x)
    start = Sizes(*jnp.zeros((3, shapes.parameters), dtype))

    def add(sizes: Sizes, rows: Array, errors: Array) -> Sizes:
        return Sizes(
            jnp.maximum(sizes.largest, abs(rows).max(0)),
            sizes.total + abs(rows).sum(0),
            jnp.maximum(jnp.asarray(sizes.error), errors.max(0)),
        )

    try:
        params, x = vary_alike(params, x)
        start = varying_like(start, params)
        return _fold_rounded_rows(fn, params, x, shapes.apart, dtype, start, add, chunk)
    except UnsupportedOperation:
        plain = fold_rows(
            fn, params, x, start, lambda s, rows: add(s, rows, jnp.zeros_like(rows)), chunk=chunk
        )
        return plain._replace(error=None)


def _fold_rounded_rows(
    fn: Network,
    params: Params,
    x: Inputs,
    apart: bool,
    dtype: DTypeLike,
    start: T,
    add: Callable[[T, Array, Array], T],
    chunk: int,
) -> T:
    """As `fold_rows`, with a bound on the error of every entry."""

    def rows(params: Params, x: Inputs) -> Array:
        y, pull = jax.vjp(lambda w: outputs_of(fn, w, x, dtype).ravel(), params)
        (found,) = jax.vmap(pull)(jnp.eye(y.size, dtype=dtype))
        return jax.vmap(lambda row: flattened(row, dtype))(found)

    if not apart:
        return add(start, *with_rounding(rows, params, x))

    def both(examples: Inputs) -> tuple[Array, Array]:
        one = lambda e: with_rounding(rows, params, jax.tree.map(lambda a: a[None], e))  # noqa: E731
        values, errors = jax.vmap(one)(examples)
        return values.reshape(-1, values.shape[-1]), errors.reshape(-1, errors.shape[-1])

    return fold_chunks(x, start, lambda state, part: add(state, *both(part)), chunk)


# --- ambiguities ----------------------------------------------------------------------


class Known(NamedTuple):
    """Ambiguities that need no decision."""

    dead: Array  # (d,) bool: parameters on which nothing depends
    num_dead: Array  # int32
    # (d, k): rescalings, then matrices; 0 on dead parameters; of norm one if independent, else 0
    tangents: Array
    rescaling: Array  # int32: how many rescalings are independent
    matrix: Array  # int32: how many matrices beside them

    @property
    def span(self) -> Array:
        """How many are independent."""
        return self.rescaling + self.matrix


def known_ambiguities(
    fn: Network,
    params: Params,
    x: Inputs,
    dead: Array,
    dtype: DTypeLike,
    scale: Array | None = None,
) -> Known:
    """The symmetries that move other parameters than the dead, which may be taken for such.

    With `scale` the tangents are those of J·diag(scale).
    """
    num_dead, none = dead.sum(dtype=jnp.int32), jnp.zeros((), jnp.int32)
    live = ~dead & (flattened(params, dtype) != 0)
    T, independent, exact = _rescalings(fn, params, x, live, dtype)
    V, others = jnp.zeros((dead.size, 0), dtype), jnp.zeros(0, bool)
    if exact:
        V, others = _matrices(fn, params, x, dead, T, independent, dtype)
    T = jnp.concatenate([jnp.where(live[:, None] & independent, T, 0), V], axis=1)
    T = T if scale is None else T / scale[:, None]
    largest = abs(T).max(0, initial=0)
    T = T / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(T, axis=0)
    T = T / jnp.where(norm > 0, norm, 1)
    count = independent.sum(dtype=jnp.int32) if independent.size else none
    return Known(dead, num_dead, T, count, others.sum(dtype=jnp.int32))


def _rescalings(
    fn: Network, params: Params, x: Inputs, live: Array, dtype: DTypeLike
) -> tuple[Array, Array, bool]:
    """Tangents of the rescalings, which are independent of those before, and are they exact?"""
    nothing = jnp.zeros((live.size, 0), dtype), jnp.zeros(0, bool)
    try:
        group = rescaling_group(fn, params, x)
    except UnsupportedOperation:
        return *nothing, False
    if group.dim == 0:
        return *nothing, True
    if not 0 < group.dim <= _MOST_GENERATORS or group.dim * live.size > _MOST_EXPONENTS:
        return *nothing, False
    exponents = exponents_of(group)
    T = tangent_vectors(group, params, dense=True).astype(dtype)
    # Twice a float is one, three times it may not be.
    return T, independent_columns(exponents, live), int(np.abs(exponents).max()) <= 2


def _matrices(
    fn: Network,
    params: Params,
    x: Inputs,
    dead: Array,
    T: Array,
    independent: Array,
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    """Tangents of matrices that are independent of the rescalings and of each other, else 0.

    Their entries are entries of the parameters, so that independence is decided without rounding.
    Proposed by rules, and dropped unless one random combination leaves the outputs alone.
    """
    leaves = [jnp.asarray(a, dtype) for a in jax.tree.leaves(params)]
    trace = problem_of(fn, params, x).fn.program.trace
    structure = exact_classes(frames_of(trace, [a.shape for a in leaves]), ())
    count = sum(c.beyond_rescaling for c in structure.classes)
    if not 0 < count <= _MOST_MATRICES or (count + T.shape[1]) * dead.size > _MOST_ENTRIES:
        return jnp.zeros((dead.size, 0), dtype), jnp.zeros(0, bool)
    V = jnp.where(dead[:, None], 0, off_diagonal_tangents(structure, leaves))
    first = jnp.where(dead[:, None] | ~independent, 0, T)
    both = independent_exact_columns(jnp.concatenate([first, V], axis=1))
    chosen = both[T.shape[1] :] & _unmoved(fn, params, x, V, dtype)
    return jnp.where(chosen, V, 0), chosen


def _unmoved(fn: Network, params: Params, x: Inputs, V: Array, dtype: DTypeLike) -> Array:
    """Whether a random combination of the columns leaves the outputs alone, to rounding."""
    direction = V @ _signs(V.shape[1], jnp.uint32(512), dtype)
    signs = _signs(direction.size, jnp.uint32(513), dtype)
    matvec = jacobian_operator(fn, params, x).matvec
    change, scale = (jnp.linalg.norm(matvec(v)) for v in (direction, signs * direction))
    return change <= 1e4 * float(jnp.finfo(dtype).eps) * scale


# --- errors ---------------------------------------------------------------------------


def error_of_jacobian(
    fn: Network, params: Params, x: Inputs, sizes: Sizes, scale: Array, dtype: DTypeLike
) -> Array:
    """A bound on ‖ΔJ·diag(scale)‖, or where none is known a measurement of it."""
    if sizes.error is not None:
        rows = problem_of(fn, params, x).rows
        # Frobenius, from the largest error in each column.
        return float(rows) ** 0.5 * jnp.linalg.norm(sizes.error * scale)
    return _measured(fn, params, x, scale, dtype)


def _measured(fn: Network, params: Params, x: Inputs, scale: Array, dtype: DTypeLike) -> Array:
    """Reverse against forward mode, and against parameters and inputs two roundings away.

    For random signs c and v, E⟨c, ΔJ v⟩² = ‖ΔJ‖²_F, which bounds ‖ΔJ‖².
    """
    operator = jacobian_operator(fn, params, x)
    rows, d = operator.shape
    eps = 2 * float(jnp.finfo(dtype).eps)
    leaves, tree = jax.tree.flatten((params, x))
    perturbed = [
        a * (1 + eps * _signs(a.size, jnp.uint32(64 + i), a.dtype).reshape(a.shape))
        if jnp.issubdtype(a.dtype, jnp.floating)
        else a
        for i, a in enumerate(map(jnp.asarray, leaves))
    ]
    nearby = jacobian_operator(fn, *jax.tree.unflatten(tree, perturbed))

    def probe(seed: Array) -> Array:
        v, c = scale * _signs(d, 2 * seed, dtype), _signs(rows, 2 * seed + 1, dtype)
        Jv = operator.matvec(v)
        both = jnp.vdot(c, Jv) - jnp.vdot(operator.rmatvec(c), v)
        return both**2 + jnp.sum((nearby.matvec(v) - Jv) ** 2)

    return 2 * jnp.sqrt(jnp.mean(lax.map(probe, jnp.arange(_PROBES, dtype=jnp.uint32))))


def _signs(size: int, seed: Array, dtype: DTypeLike) -> Array:
    """±1"""
    return 1 - 2 * (_hashed(size, seed) & jnp.uint32(1)).astype(dtype)


def noise(size: int, seed: Array, dtype: DTypeLike) -> Array:
    """Numbers spread evenly over (-1, 1)."""
    return (_hashed(size, seed) >> jnp.uint32(8)).astype(dtype) / 2.0**23 - 1


def _hashed(size: int, seed: Array) -> Array:
    """The finaliser of MurmurHash3: jax.random cannot run in a 64-bit scope in a jit."""
    x = lax.iota(jnp.uint32, size) * jnp.uint32(2654435761) + seed.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x


# --- all of it -------------------------------------------------------------------------


class Evidence(NamedTuple):
    """What is known before any singular value is."""

    sizes: Sizes
    scale: Array  # (d,): of the columns
    known: Known
    upper: Array
    error: Array  # of J·diag(scale)
    reason: Array  # the flags that are known already
    about: policy.About


@partial(jax.jit, static_argnames=("fn", "dtype", "chunk", "scaled"))
def evidence_of(
    params: Params, x: Inputs, fn: Network, dtype: DType, chunk: int | None, scaled: bool
) -> Evidence:
    """What bounds the rank, for columns of one size or (not `scaled`) as they are."""
    shapes = problem_of(fn, params, x)
    sizes = sizes_of(fn, params, x, dtype, chunk or 64)
    scale = sizes.scale if scaled else jnp.ones(shapes.parameters, dtype)
    known = known_ambiguities(fn, params, x, sizes.dead, dtype, scale)
    left = shapes.parameters - known.num_dead - known.span
    casts = casts_of(problem_of(fn, params, x).fn.program.trace.jaxpr, dtype)
    reason = (
        policy.flag(left > shapes.rows, policy.LIMITED_BY_ROWS)
        + policy.flag((sizes.zero & ~sizes.dead).any(), policy.UNPROVEN_ZEROS)
        + (policy.CAST if casts else 0)
        + (policy.MEASURED if sizes.error is None else 0)
    )
    upper = jnp.minimum(left, shapes.rows).astype(jnp.int32)
    error = error_of_jacobian(fn, params, x, sizes, scale, dtype)
    about = policy.About(shapes.examples, shapes.outputs, shapes.parameters, casts)
    return Evidence(sizes, scale, known, upper, error, reason, about)
