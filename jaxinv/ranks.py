"""Degrees of freedom: the rank of the Jacobian, and how far it can be trusted.

    number of parameters d = rank + rescalings + dead + hidden

A rank read off computed singular values is a decision. Every singular value is known up to an error
ε: rounding in computing J (measured, as the difference of reverse and forward mode on random
directions) plus that of the method. By Weyl's inequality a computed σ_r > ε proves rank ≥ r. No
computation with rounding proves that a singular value *is* zero; rank ≤ r is proven by theory: the
rescalings known from the program of `fn` and columns that are exactly zero. A rank is `certain` if
both bounds meet, or, in float64 alone, if nothing lies in three decades between what is and what
is not zero.

Everything is computed in float64 inside, by a scope: no global option changes, also inside your own
`jit` with 64-bit types off.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._checks import check_inputs, check_params, integer, one_of, real
from jaxinv._draws import own_draws
from jaxinv._exact import MOST_STEPS, check_known, exact_rank
from jaxinv._precision import as_dtype, call_in, in_precision
from jaxinv._rank_evidence import (
    column_sizes,
    error_of_jacobian,
    known_ambiguities,
)
from jaxinv.errors import InvalidInput, UnsupportedOperation
from jaxinv.jacobians import (
    fold_rows,
    jacobian,
    jacobian_gram,
    problem_of,
    tangent_kernel,
)
from jaxinv.typing import Array, Inputs, Network, Params

Method = Literal["auto", "svd", "tsqr", "gram", "certificate", "exact"]
METHODS = ("auto", "svd", "tsqr", "gram", "certificate", "exact")
# float64 takes a rank without proof of its upper bound if σ_r stands out by this factor.
_CERTAIN_GAP = 1e3
# Up to so many steps of elimination "auto" asks for an exact rank: about a second.
_STEPS_OF_AUTO = 1 << 26
_EXACT = lax.Precision.HIGHEST


class Rank(NamedTuple):
    """The rank of a Jacobian and what it rests on; all fields are arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian_rank
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> print(jacobian_rank(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((4, 1))))
        rank 1 (certain): 1 proven from below, at most 1; ...
    """

    rank: Array  # int32: singular values above the tolerance; -1: not certified, or J not finite
    lower: Array  # int32: proven lower bound, up to rounding
    upper: Array  # int32: proven upper bound: min(rows, d − known ambiguities)
    certain: Array  # bool
    tolerance: Array  # float: singular values up to this count as zero
    error: Array  # float: bound on the error of the computed singular values
    largest: Array  # float: σ_1
    smallest: Array  # float: σ_rank; of a certificate the largest value that it excludes
    gap: Array  # float: σ_rank / σ_{rank+1}; inf where there is no further one

    def __str__(self) -> str:
        """The rank, its bounds and its gap."""
        if not isinstance(self.rank, jax.Array) or isinstance(self.rank, jax.core.Tracer):
            return repr(self)
        if jnp.ndim(self.rank):
            return f"ranks {self.rank} ({int(self.certain.sum())} of {self.rank.size} certain)"
        if self.rank < 0:
            if not jnp.isfinite(self.error):
                return "no rank: the Jacobian is not finite"
            return f"rank not certified: at most {self.upper}"
        word = "certain" if self.certain else "NOT CERTAIN"
        if jnp.isnan(self.largest):
            return f"rank {self.rank} ({word}): in exact arithmetic, at most {self.upper}"
        return (
            f"rank {self.rank} ({word}): {self.lower} proven from below, at most {self.upper}; "
            f"σ₁ {self.largest:.2e}, σ_rank {self.smallest:.2e}, gap {self.gap:.1e}, "
            f"error {self.error:.1e}"
        )


# --- precision and options ---------------------------------------------------------


def _checked(method: str, dtype: Any) -> Any:
    one_of("method", method, METHODS)
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise InvalidInput(f"dtype must be float32 or float64, not {dtype!r}.") from error
    if dtype not in (jnp.float32, jnp.float64):
        raise InvalidInput(f"dtype must be float32 or float64, not {dtype}.")
    return dtype


def _check_values(params: Params, x: Inputs, dtype: Any, chunk: Any) -> None:
    """In the scope that will compute: a float64 array may hold more than float32 can."""
    if chunk is not None:
        integer("chunk", chunk, 1)
    with in_precision(dtype):
        check_params(params)
        check_inputs(x, values=True, finite=True)


# --- spectra --------------------------------------------------------------------------


def _dense(J: Array) -> Array:
    return jnp.linalg.svd(J, compute_uv=False)


def _streamed(fn: Network, params: Params, x: Inputs, size: int, dtype: Any, chunk: int) -> Array:
    """Singular values of the triangle that QR of chunk after chunk leaves."""

    def add(triangle: Array, rows: Array) -> Array:
        return jnp.linalg.qr(jnp.concatenate([triangle, rows]), mode="r")

    triangle = fold_rows(fn, params, x, jnp.zeros((size, size), dtype), add, chunk=chunk)
    return _dense(triangle)


def _from_gram(gram: Array) -> Array:
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1], 0))


def _tsqr_chunk(shapes: Any) -> int:
    """A chunk with as many rows as J has columns: QR then costs the least in all."""
    return max(1, -(-shapes.parameters // shapes.outputs))


@partial(jax.jit, static_argnames=("fn", "method", "dtype", "chunk"))
def _spectrum(
    params: Params, x: Inputs, fn: Network, method: str, dtype: Any, chunk: int | None
) -> Array:
    """min(rows, d) singular values, descending."""
    shapes = problem_of(fn, params, x)
    if method == "tsqr":
        values = _streamed(fn, params, x, shapes.parameters, dtype, chunk or _tsqr_chunk(shapes))[
            : min(shapes.rows, shapes.parameters)
        ]
    elif method == "gram":
        if shapes.rows < shapes.parameters:
            values = _from_gram(tangent_kernel(fn, params, x, chunk=chunk or 32))
        else:
            values = _from_gram(jacobian_gram(fn, params, x, chunk=chunk or 64))
    else:
        values = _dense(jacobian(fn, params, x, chunk=chunk or 64))
    return values


def jacobian_spectrum(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    method: Literal["svd", "tsqr", "gram"] = "svd",
    dtype: Any = np.float64,
    chunk: int | None = None,
    batch_axis: int | None = 0,
) -> Array:
    """The singular values of J = ∂fn(params, x)/∂params, descending.

    Args:
        fn, params, x: as for `jaxinv.jacobian`.
        method: "svd" holds J (LAPACK on a CPU); "tsqr" streams it through QR of chunks and holds
            d² numbers; "gram" takes the roots of the eigenvalues of JᵀJ or JJᵀ, whichever is
            smaller: fast, but values below √(machine epsilon) of the largest are lost.
        dtype: float64 (computed in a scope of its own) or float32.
        chunk: examples at a time.
        batch_axis: as for `jaxinv.jacobian`.

    Returns:
        (min(n·out, d),).

    Raises:
        InvalidInput: as for `jaxinv.jacobian`, or for an unknown method or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian_spectrum
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> s = jacobian_spectrum(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((4, 1)))
        >>> print(s.round(4))  # rows (3, 2), four times
        [7.2111 0.    ]
    """
    dtype = _checked(method, dtype)
    if method not in ("svd", "tsqr", "gram"):
        raise InvalidInput(f"{method!r} gives a rank, not a spectrum: use svd, tsqr or gram.")
    _check_values(params, x, dtype, chunk)
    fn = own_draws(fn, params, x, dtype)

    def spectrum(params: Params, x: Inputs) -> Array:
        problem = problem_of(fn, params, x, batch_axis)
        return _spectrum(params, problem.x, problem.fn, method, dtype, chunk)

    return call_in(dtype, spectrum, params, x)


# --- ranks ----------------------------------------------------------------------------


def _decide(
    values: Array, upper: Array, error: Array, rtol: float | None, double: bool, sizes: Array
) -> Rank:
    """`sizes` is Σ|J| over rows, per column."""
    largest = values[0]
    tolerance = error if rtol is None else rtol * largest
    rank = jnp.sum(values > tolerance).astype(jnp.int32)
    lower = jnp.sum(values > error).astype(jnp.int32)
    padded = jnp.concatenate([values, jnp.zeros(1, values.dtype)])
    smallest = jnp.where(rank > 0, values[jnp.maximum(rank - 1, 0)], largest)
    following = padded[rank]
    gap = jnp.where(following > 0, smallest / jnp.where(following > 0, following, 1), jnp.inf)
    # A value just above a bound that is itself an estimate proves nothing: ask for a decade more.
    firm = jnp.sum(values > 10 * error).astype(jnp.int32)
    certain = (firm == rank) & (rank == upper)
    if double:
        stands_out = smallest > _CERTAIN_GAP * jnp.maximum(error, following)
        # A column that is not 0, but below the error, could be one more direction: weights of very
        # different sizes. Nothing says then that it is not.
        seen = jnp.all((sizes == 0) | (sizes > error))
        certain = certain | ((firm == rank) & stands_out & (following <= error) & seen)
    finite = jnp.isfinite(values).all() & jnp.isfinite(error)
    rank, lower = jnp.where(finite, rank, -1), jnp.where(finite, lower, 0)
    certain = certain & finite & (rank <= upper)
    return Rank(rank, lower, upper, certain, tolerance, error, largest, smallest, gap)


@partial(jax.jit, static_argnames=("fn", "method", "dtype", "chunk", "rtol"))
def _rank_by_spectrum(
    params: Params,
    x: Inputs,
    fn: Network,
    method: str,
    dtype: Any,
    chunk: int | None,
    rtol: float | None,
) -> Rank:
    shapes = problem_of(fn, params, x)
    d, small = shapes.parameters, min(shapes.rows, shapes.parameters)
    J = None
    if method == "svd":
        J = jacobian(fn, params, x, chunk=chunk or 64)
        values, sizes = _dense(J), abs(J).sum(0)
    else:
        values = _spectrum(params, x, fn, method, dtype, chunk)
        sizes = column_sizes(fn, params, x, d, dtype, chunk or 64)
    known = known_ambiguities(fn, params, x, sizes)
    upper = jnp.minimum(d - known.num_dead - known.span, small).astype(jnp.int32)
    eps = float(jnp.finfo(dtype).eps)
    rounding = max(shapes.rows, d) * eps * values[0]
    if method == "gram":
        # λ is good to max(rows, d)·eps·λ_1, so σ to its square root.
        rounding = float(np.sqrt(max(shapes.rows, d) * eps)) * values[0]
    error = rounding + error_of_jacobian(fn, params, x, J, dtype)
    return _decide(values, upper, error, rtol, dtype == jnp.float64, sizes)


@partial(jax.jit, static_argnames=("fn", "dtype", "chunk"))
def _rank_by_certificate(
    params: Params, x: Inputs, fn: Network, dtype: Any, chunk: int | None
) -> Rank:
    """Cholesky of D(JᵀJ)D + QQᵀ + E, with Q the rescalings, E the dead and D⁻² the diagonal.

    If JᵀJ plus a matrix of rank k is positive definite, then rank J ≥ d − k; and rank J ≤ d − k by
    theory. D does not change the rank, and conditions the matrix.
    """
    shapes = problem_of(fn, params, x)
    d, eps = shapes.parameters, float(jnp.finfo(dtype).eps)
    # Rows for a quarter of the memory of JᵀJ: it is read and written once for each chunk.
    gram = jacobian_gram(fn, params, x, chunk=chunk or max(1, d // (4 * shapes.outputs)))
    diagonal = jnp.diagonal(gram)
    known = known_ambiguities(fn, params, x, diagonal)
    scale = jnp.where(known.dead, 1, jnp.sqrt(jnp.where(known.dead, 1, diagonal)))
    A = gram / scale[:, None] / scale
    # JT = 0, so (JD)(D⁻¹T) = 0: the rescalings of the scaled columns.
    T = known.tangents * scale[:, None]
    norm = jnp.linalg.norm(T, axis=0)
    T = T / jnp.where(norm > 0, norm, 1)
    A = A + jnp.matmul(T, T.T, precision=_EXACT) + jnp.diag(known.dead.astype(dtype))
    # Success on A − μ proves A > 0 for μ above what forming A and factoring it can be wrong by:
    # sums of `rows` and of d products, relative to the diagonal, whose sum is the trace.
    measured = error_of_jacobian(fn, params, x, None, dtype) / jnp.sqrt(jnp.sum(diagonal))
    trace = jnp.trace(A)
    mu = trace * (eps * (d + 2 + float(np.sqrt(shapes.rows))) + 2 * measured)
    L = jnp.linalg.cholesky(A - mu * jnp.eye(d, dtype=dtype))
    proven = jnp.isfinite(L).all()
    upper = (d - known.num_dead - known.span).astype(jnp.int32)
    upper = jnp.minimum(upper, shapes.rows)
    proven = proven & (upper == d - known.num_dead - known.span)
    nothing = jnp.full((), jnp.nan, dtype)
    return Rank(
        jnp.where(proven, upper, -1),
        jnp.where(proven, upper, 0),
        upper,
        proven,
        jnp.zeros((), dtype),
        jnp.sqrt(mu) * jnp.max(scale),
        nothing,
        jnp.sqrt(mu) * jnp.max(scale),
        nothing,
    )


def jacobian_rank(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    method: Method = "auto",
    rtol: float | None = None,
    dtype: Any = np.float64,
    chunk: int | None = None,
    batch_axis: int | None = 0,
) -> Rank:
    """The rank of J = ∂fn(params, x)/∂params: the degrees of freedom of the function on x.

    Args:
        fn, params, x: as for `jaxinv.jacobian`. `fn` is run in the precision `dtype`, so it must
            not cast to less (if it does, the measured error shows it).
        method: "svd", "tsqr", "gram" as for `jacobian_spectrum`. "certificate" proves the rank
            d − (rescalings) − (dead) by a Cholesky factorisation, several times faster than an SVD,
            and gives -1 where it cannot. "auto" tries the certificate, then the SVD, and,
            where that is not certain of a small network outside `jit`, "exact": see below.
        rtol: singular values up to rtol·σ_1 count as zero; by default those up to their error.
        dtype: float64 (in a scope of its own) or float32, which is only `certain` where the rank
            equals a bound known from theory.
        chunk: examples at a time.
        batch_axis: as for `jaxinv.jacobian`.

    "exact" is for small networks that are piecewise polynomial in their parameters: sums,
    products, quotients, maxima, pools and whatever moves elements about. Every float is a rational
    number, so the Jacobian of the function that `fn` writes in real numbers is a rational matrix,
    with the derivatives that JAX takes at ties. It is computed modulo two primes near 2^31 without
    any rounding, and so is its rank, which can only be too low. It is `certain` if both primes
    agree. That rests on no accident: to be wrong, both primes would have to divide all the largest
    minors that are not 0. What `fn` computes from constants alone (closed-over arrays, literals)
    is taken as the floats that it gives. Of params or x that `dtype` rounds nothing is certain.

    Returns:
        A `Rank` of arrays. `vmap` over params for an ensemble; works inside your `jit`. "exact"
        needs the numbers in params and x, so it works outside both only.

    Raises:
        InvalidInput: as for `jaxinv.jacobian`, or for an unknown method or dtype, or rtol < 0; for
            "exact" inside `jit` or `vmap`, with an `rtol`, or for a Jacobian of more than 2^22
            elements or 2^31 steps n·out·d·min(n·out, d).
        UnsupportedOperation: for "exact", of operations that are not piecewise polynomial (tanh,
            exp, rsqrt), of casts to less than `dtype`, and of functions whose own derivative
            (custom_jvp) is not that of their values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import jacobian_rank, networks
        >>> w = networks.init_mlp(jax.random.key(0), (2, 3, 1), bias=False)
        >>> x = jax.random.normal(jax.random.key(1), (50, 2))
        >>> found = jacobian_rank(networks.mlp, w, x)  # 9 parameters, 3 rescalings
        >>> int(found.rank), bool(found.certain)
        (6, True)
        >>> print(jacobian_rank(networks.mlp, w, x, method="exact"))
        rank 6 (certain): in exact arithmetic, at most 6
    """
    dtype = _checked(method, dtype)
    if rtol is not None:
        rtol = real("rtol", rtol, lambda r: r >= 0, "a fixed number >= 0")
    _check_values(params, x, dtype, chunk)
    fn = own_draws(fn, params, x, dtype)
    if method == "exact":
        if rtol is not None:
            raise InvalidInput("method='exact' compares nothing with a tolerance: leave rtol out.")
        return _exact_rank(fn, params, x, dtype, batch_axis)

    def rank(params: Params, x: Inputs) -> Rank:
        problem = problem_of(fn, params, x, batch_axis)
        network, x = problem.fn, problem.x
        if method == "certificate":
            return _rank_by_certificate(params, x, network, dtype, chunk)
        if method != "auto":
            return _rank_by_spectrum(params, x, network, method, dtype, chunk, rtol)
        return _automatic(params, x, network, dtype, chunk, rtol, problem)

    found = call_in(dtype, rank, params, x)
    if method != "auto" or rtol is not None:
        return found
    return _settled(found, fn, params, x, dtype, batch_axis)


def _settled(
    found: Rank, fn: Network, params: Params, x: Inputs, dtype: Any, batch_axis: int | None
) -> Rank:
    """In exact arithmetic where the bounds do not meet, of a small network of known numbers."""
    if isinstance(found.certain, jax.core.Tracer) or found.certain:
        return found
    try:
        exact = _exact_rank(fn, params, x, dtype, batch_axis, _STEPS_OF_AUTO)
    except (UnsupportedOperation, InvalidInput):
        return found
    if not exact.certain or exact.rank != found.rank:
        return exact if exact.certain else found
    return found._replace(lower=exact.lower, upper=exact.upper, certain=exact.certain)


def _exact_rank(
    fn: Network,
    params: Params,
    x: Inputs,
    dtype: Any,
    batch_axis: int | None,
    most_steps: int = MOST_STEPS,
) -> Rank:
    check_known(params, x)
    given = jax.tree.leaves((params, x))
    with in_precision(dtype):
        params, x = as_dtype((params, x), dtype)
        used = jax.tree.leaves((params, x))
        # What is exact of rounded arrays proves nothing of those that were given.
        rounded = not all(map(np.array_equal, given, used))
        problem = problem_of(fn, params, x, batch_axis)
        found = exact_rank(problem.fn, params, problem.x, most_steps)
        most = min(problem.rows, problem.parameters)
        count = jnp.asarray(found.rank, jnp.int32)
        upper = jnp.asarray(found.rank if found.agreed else most, jnp.int32)
        zero, unknown = jnp.zeros((), dtype), jnp.full((), jnp.nan, dtype)
        certain = jnp.asarray((found.agreed or found.rank == most) and not rounded)
        return Rank(count, count, upper, certain, zero, zero, unknown, unknown, unknown)


def _automatic(
    params: Params,
    x: Inputs,
    fn: Network,
    dtype: Any,
    chunk: int | None,
    rtol: float | None,
    shapes: Any,
) -> Rank:
    """The certificate where it can succeed and is worth it, else the SVD."""
    if shapes.rows < shapes.parameters // 2 or shapes.parameters < 256 or rtol is not None:
        return _rank_by_spectrum(params, x, fn, "svd", dtype, chunk, rtol)
    found = _rank_by_certificate(params, x, fn, dtype, chunk)
    return lax.cond(
        found.certain,
        lambda: found,
        lambda: _rank_by_spectrum(params, x, fn, "svd", dtype, chunk, rtol),
    )
