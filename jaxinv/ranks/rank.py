"""Degrees of freedom: the rank of the Jacobian, and how far it can be trusted.

    number of parameters d = rank + rescalings + dead + unexplained + unseen

A rank read off computed singular values is a decision. Every singular value is known up to an error
ε: rounding in computing J (bounded by an error analysis of the program, or measured) plus that of
the method. By Weyl's inequality a computed σ_r > ε proves rank ≥ r. No computation with rounding
proves that a singular value *is* zero; rank ≤ r is proven by theory: the number of rows, the
rescalings known from the program of `fn`, and columns that are zero without any rounding. A rank is
`certain` if both bounds meet, and only then. It is `clear` if nothing lies in three decades between
what is and what is not zero (`jaxinv._numerics.tolerances` has the policy).

The columns of J are first scaled to one size by powers of two. That changes no rank, and makes it
independent of how a network is rescaled.

Everything is computed in float64 inside, by a scope: no global option changes, also inside your own
`jit` with 64-bit types off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._checks import check_inputs, check_params, integer, one_of, real
from jaxinv._interpreter.batch import TracedNetwork, leading
from jaxinv._interpreter.draws import traced_in
from jaxinv._interpreter.walk import is_concrete
from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.lapack import eigenvalues, one_at_a_time, singular_values, triangle
from jaxinv._numerics.precision import call_in, in_precision
from jaxinv.errors import InvalidInput
from jaxinv.gates import Region
from jaxinv.jacobians.jacobians import (
    fold_rows,
    jacobian,
    jacobian_gram,
    scaled_gram,
    tangent_kernel,
)
from jaxinv.jacobians.problem import problem_of
from jaxinv.ranks.certificate import (
    can_deflate,
    factored,
    rank_by_certificate,
    rank_by_deflation,
)
from jaxinv.ranks.evidence import Evidence, evidence_of
from jaxinv.ranks.exact_method import exact_rank, settled
from jaxinv.ranks.on_regions import asked, rank_on_region
from jaxinv.ranks.record import Rank, of_what_was_given
from jaxinv.ranks.spans import Modular, rank_of_exact
from jaxinv.typing import Array, DType, DTypeLike, Inputs, Network, Params, PyTree

Method = Literal["auto", "svd", "tsqr", "gram", "certificate", "exact", "boundary"]
_EXACT = lax.Precision.HIGHEST
# An exact rank costs rows·d² of these for each of three primes; about a second.
_MOST_ELIMINATIONS = 1 << 27
# Fewer parameters than these are worth no Cholesky factor, and no loop over an ensemble.
_SMALL = 256


# --- precision and options ---------------------------------------------------------


def checked_options(
    method: str, dtype: DTypeLike, rtol: float | None
) -> tuple[DType, float | None]:
    """dtype and rtol as they are used; `InvalidInput` for options that make no sense."""
    one_of("method", method, (*METHODS, "exact", "boundary"))
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise InvalidInput(f"dtype must be float32 or float64, not {dtype!r}.") from error
    if dtype not in (jnp.float32, jnp.float64):
        raise InvalidInput(f"dtype must be float32 or float64, not {dtype}.")
    if rtol is not None:
        rtol = real("rtol", rtol, lambda r: r >= 0, "a fixed number >= 0")
        if method == "exact":
            raise InvalidInput("method='exact' compares nothing with a tolerance: leave rtol out.")
    return dtype, rtol


def check_values(params: Params, x: Inputs, dtype: DTypeLike, chunk: object) -> None:
    """In the scope that will compute: a float64 array may hold more than float32 can."""
    if chunk is not None:
        integer("chunk", chunk, 1)
    with in_precision(dtype):
        check_params(params)
        check_inputs(x, values=True, finite=True)


# --- spectra --------------------------------------------------------------------------


def _dense(J: Array) -> Array:
    return singular_values(J)


def _streamed(
    fn: Network, params: Params, x: Inputs, scale: Array, dtype: DTypeLike, chunk: int
) -> Array:
    """Singular values of the triangle that QR of chunk after chunk leaves."""

    def add(above: Array, rows: Array) -> Array:
        return triangle(jnp.concatenate([above, rows * scale]))

    start = jnp.zeros((scale.size, scale.size), dtype)
    return _dense(fold_rows(fn, params, x, start, add, chunk=chunk))


def _from_gram(gram: Array) -> Array:
    return jnp.sqrt(jnp.maximum(eigenvalues(gram)[::-1], 0))


def _tsqr_chunk(parameters: int, outputs: int) -> int:
    """A chunk with as many rows as J has columns: QR then costs the least in all."""
    return max(1, -(-parameters // outputs))


@partial(jax.jit, static_argnames=("fn", "method", "dtype", "chunk"))
def _spectrum(
    params: Params, x: Inputs, fn: Network, method: str, dtype: DTypeLike, chunk: int | None
) -> Array:
    """min(rows, d) singular values, descending."""
    shapes = problem_of(fn, params, x)
    if method == "tsqr":
        ones = jnp.ones(shapes.parameters, dtype)
        values = _streamed(
            fn, params, x, ones, dtype, chunk or _tsqr_chunk(shapes.parameters, shapes.outputs)
        )
        values = values[: min(shapes.rows, shapes.parameters)]
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
    dtype: DTypeLike = np.float64,
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
    dtype, _ = checked_options(method, dtype, None)
    if method not in ("svd", "tsqr", "gram"):
        raise InvalidInput(f"{method!r} gives a rank, not a spectrum: use svd, tsqr or gram.")
    x = leading(x, batch_axis)
    check_values(params, x, dtype, chunk)
    network = traced_in(dtype, fn, params, x, batch_axis)

    def spectrum(params: Params, x: Inputs) -> Array:
        problem_of(network, params, x)
        return _spectrum(params, x, network, method, dtype, chunk)

    return call_in(dtype, spectrum, params, x)


# --- ranks ----------------------------------------------------------------------------


def _decide(
    values: Array,
    evidence: Evidence,
    error: Array,
    rtol: float | None,
    double: bool,
    exact: Modular | None,
) -> Rank:
    """`error` is that of the singular values; `exact` counts where J has no rounding at all."""
    upper, cast = evidence.upper, bool(evidence.about.casts)
    largest = values[0]
    # A bound that says nothing leaves the rank to the rounding of the decomposition, unproven.
    own = policy.roundings(values.size, evidence.scale.size, values.dtype) * largest
    useful = error < largest
    tolerance = jnp.where(useful, error, own) if rtol is None else rtol * largest
    rank = jnp.sum(values > tolerance).astype(jnp.int32)
    lower = jnp.sum(values > policy.FIRM * error).astype(jnp.int32)
    if exact is not None:
        rank = jnp.where(exact.agreed, exact.rank, rank)
        lower = jnp.where(exact.agreed, exact.rank, lower)
        upper = jnp.where(exact.agreed, jnp.minimum(exact.rank, upper), upper)
    padded = jnp.concatenate([values, jnp.zeros(1, values.dtype)])
    smallest = jnp.where(rank > 0, values[jnp.maximum(rank - 1, 0)], largest)
    following = padded[rank]
    gap = jnp.where(following > 0, smallest / jnp.where(following > 0, following, 1), jnp.inf)
    finite = jnp.isfinite(values).all()
    certain = finite & (lower == upper) & (rank == upper) & (not cast)
    # A column of zeros that rounding could have made is no zero, so nothing is clear.
    hides = evidence.sizes.zero & ~evidence.sizes.dead & (evidence.sizes.error is not None)
    clear = policy.is_gap(smallest, jnp.maximum(error, following)) & (following <= error)
    clear = clear & (rank == lower) & (rank <= upper) & ~hides.any() & (double and not cast)
    clear = certain | (clear & finite)
    reason = (
        evidence.reason
        + policy.flag(~clear, policy.ROUNDING)
        + policy.flag(lower != upper, policy.NO_UPPER_BOUND)
    )
    silent = policy.LIMITED_BY_ROWS | policy.MEASURED
    reason = jnp.where(certain, reason & silent, reason)
    reason = jnp.where(finite, reason, policy.NOT_FINITE)
    rank, lower = jnp.where(finite, rank, -1), jnp.where(finite, lower, 0)
    return Rank(
        rank, lower, upper, certain, clear, reason, tolerance, error, largest, smallest, gap,
        evidence.about,
    )  # fmt: skip


def _scaled_spectrum(
    params: Params,
    x: Inputs,
    fn: Network,
    method: str,
    dtype: DType,
    chunk: int | None,
    scale: Array,
) -> Array:
    """min(rows, d) singular values of J·diag(scale), descending."""
    shapes = problem_of(fn, params, x)
    small = min(shapes.rows, shapes.parameters)
    if method == "tsqr":
        chunk = chunk or _tsqr_chunk(shapes.parameters, shapes.outputs)
        return _streamed(fn, params, x, scale, dtype, chunk)[:small]
    if method == "gram" and shapes.rows >= shapes.parameters:
        return _from_gram(scaled_gram(fn, params, x, scale, chunk=chunk or 64))
    J = jacobian(fn, params, x, mode="rev", chunk=chunk or 64) * scale
    if method == "gram":
        return _from_gram(jnp.matmul(J, J.T, precision=_EXACT))
    return _dense(J)


def _counted(params: Params, x: Inputs, fn: Network, evidence: Evidence) -> Modular | None:
    """The exact rank, where J is small and nothing in its program was rounded."""
    about, error = evidence.about, evidence.sizes.error
    rows, d = about.examples * about.outputs, about.parameters
    if error is None or rows * d * d > _MOST_ELIMINATIONS:
        return None
    J = jacobian(fn, params, x, mode="rev") * evidence.scale
    found = rank_of_exact(J)
    return found._replace(agreed=found.agreed & (error == 0).all())


@partial(jax.jit, static_argnames=("fn", "method", "dtype", "chunk", "rtol"))
def _rank_by_spectrum(
    params: Params,
    x: Inputs,
    fn: Network,
    method: str,
    dtype: DType,
    chunk: int | None,
    rtol: float | None,
    evidence: Evidence,
) -> Rank:
    shapes = problem_of(fn, params, x)
    exact = None
    if method == "auto":
        method = "svd"
        exact = _counted(params, x, fn, evidence) if rtol is None else None
    values = _scaled_spectrum(params, x, fn, method, dtype, chunk, evidence.scale)
    unit = policy.roundings(shapes.rows, shapes.parameters, dtype)
    if method == "gram":
        # λ is good to the rounding of JᵀJ and 2σ_1·‖ΔJ‖ + ‖ΔJ‖², so σ to the square root.
        wrong = evidence.error * (2 * values[0] + evidence.error)
        error = jnp.sqrt(unit * values[0] ** 2 + wrong)
    else:
        error = unit * values[0] + evidence.error
    return _decide(values, evidence, error, rtol, dtype == jnp.float64, exact)


@partial(jax.jit, static_argnames=("fn", "dtype", "chunk"))
def _certified(
    params: Params, x: Inputs, fn: Network, dtype: DType, chunk: int | None, evidence: Evidence
) -> tuple[Rank, Array]:
    """The rank by its certificate, and the Gram matrix that it was taken from."""
    found = factored(params, x, fn, dtype, chunk, evidence)
    return rank_by_certificate(found, evidence), found.gram


def _automatic(
    params: Params,
    x: Inputs,
    fn: Network,
    dtype: DType,
    chunk: int | None,
    rtol: float | None,
    evidence: Evidence,
) -> Rank:
    """The certificate where it can succeed and is worth it, then deflation, then the SVD."""
    problem = problem_of(fn, params, x)
    if problem.rows < problem.parameters // 2 or problem.parameters < _SMALL or rtol is not None:
        return _rank_by_spectrum(params, x, fn, "auto", dtype, chunk, rtol, evidence)
    found, gram = _certified(params, x, fn, dtype, chunk, evidence)
    given = (gram, params, x, evidence)
    deflates = can_deflate(evidence, dtype)

    def spectrum(gram: Array, params: Params, x: Inputs, evidence: Evidence) -> Rank:
        return _rank_by_spectrum(params, x, fn, "svd", dtype, chunk, rtol, evidence)

    def deflated(gram: Array, params: Params, x: Inputs, evidence: Evidence) -> Rank:
        return rank_by_deflation(params, x, fn, gram, evidence)

    ways = [deflated, spectrum] if deflates else [spectrum]
    if is_concrete(found.certain):  # else the SVD would be compiled, at every call, and not run
        for way in ways:
            found = found if int(found.rank) >= 0 else way(*given)
        return found
    for way in ways:
        found = _unless_settled(found, way, given)
    return found


def _unless_settled(found: Rank, way: Callable[..., Rank], given: tuple[PyTree, ...]) -> Rank:
    # Of an ensemble one after the other: `vmap` of a choice computes both for all.
    @jax.custom_batching.sequential_vmap
    def settle(found: Rank, *given: PyTree) -> Rank:
        return lax.cond(found.rank >= 0, lambda: found, lambda: way(*given))

    settled: Rank = settle(found, *given)
    return settled


def _by_spectrum(method: str) -> Callable[..., Rank]:
    return lambda params, x, fn, dtype, chunk, rtol, evidence: _rank_by_spectrum(
        params, x, fn, method, dtype, chunk, rtol, evidence
    )


# A method is a row: what to call with (params, x, fn, dtype, chunk, rtol, evidence) in the scope
# of dtype.
METHODS: dict[str, Callable[..., Rank]] = {
    "auto": _automatic,
    "svd": _by_spectrum("svd"),
    "tsqr": _by_spectrum("tsqr"),
    "gram": _by_spectrum("gram"),
    "certificate": lambda params, x, fn, dtype, chunk, _, evidence: _certified(
        params, x, fn, dtype, chunk, evidence
    )[0],
}


def jacobian_rank(
    fn: Network,
    params: Params,
    x: Inputs | Region,
    *,
    method: Method = "auto",
    rtol: float | None = None,
    dtype: DTypeLike = np.float64,
    chunk: int | None = None,
    batch_axis: int | None = 0,
) -> Rank:
    """The rank of J = ∂fn(params, x)/∂params: the degrees of freedom of the function on x.

    Args:
        fn, params, x: as for `jaxinv.jacobian`. `fn` is run in the precision `dtype`. If it casts
            to less itself, no rank is certain, and the line is named.
        method: "svd", "tsqr", "gram" as for `jacobian_spectrum`. "certificate" proves the rank
            d − (rescalings) − (dead) by a Cholesky factorisation, several times faster than an SVD,
            and gives -1 where it cannot. "exact" counts in exact arithmetic, outside `jit`, where
            fn is piecewise polynomial and small. "auto" tries the certificate, then finds by
            inverse iteration what else is in the null space and proves that nothing more is, then
            the SVD; and "exact" where that is not certain of a small network. "boundary" proves
            the rank on the segments between the inputs from the boundaries of gates, outside `jit`;
            see `functional_dimension`. It is what is used where x is a region of inputs
            (`jaxinv.gates.everywhere(x)`, say).
        rtol: singular values up to rtol·σ_1 count as zero; by default those up to their error.
        dtype: float64 (in a scope of its own) or float32, which is only `certain` where the rank
            equals a bound known from theory.
        chunk: examples at a time.
        batch_axis: as for `jaxinv.jacobian`.

    Returns:
        A `Rank` of arrays. `vmap` over params for an ensemble; works inside your `jit`.

    Raises:
        InvalidInput: as for `jaxinv.jacobian`, or for an unknown method or dtype, or rtol < 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import jacobian_rank, networks
        >>> w = networks.init_mlp(jax.random.key(0), (2, 3, 1), bias=False)
        >>> x = jax.random.normal(jax.random.key(1), (50, 2))
        >>> found = jacobian_rank(networks.mlp, w, x)  # 9 parameters, 3 rescalings
        >>> int(found.rank), bool(found.certain)
        (6, True)
    """
    dtype, rtol = checked_options(method, dtype, rtol)
    if asked(x, method):
        return rank_on_region(fn, params, x, rtol, dtype, batch_axis)[0]
    x = leading(x, batch_axis)
    check_values(params, x, dtype, chunk)
    network = traced_in(dtype, fn, params, x, batch_axis)
    return rank_of(network, params, x, method, rtol, dtype, chunk)[0]


def rank_of(
    network: TracedNetwork,
    params: Params,
    x: Inputs,
    method: str,
    rtol: float | None,
    dtype: DTypeLike,
    chunk: int | None,
) -> tuple[Rank, Evidence | None]:
    """`jacobian_rank` of checked arguments and a network that has been traced, and its evidence."""
    if method == "exact":
        return of_what_was_given(exact_rank(network, params, x, dtype), (params, x), dtype), None

    def rank(params: Params, x: Inputs) -> tuple[Rank, Evidence]:
        problem_of(network, params, x)
        # rtol is relative to the largest singular value of J as it is.
        evidence = evidence_of(params, x, network, dtype, chunk, rtol is None)
        return METHODS[method](params, x, network, dtype, chunk, rtol, evidence), evidence

    leaves = jax.tree.leaves((params, x))
    # Members of an ensemble with much to compute go one by one: each fills the cores, and stays in
    # the cache.
    loop = sum(map(jnp.size, jax.tree.leaves(params))) >= _SMALL and not all(
        is_concrete(leaf) for leaf in leaves
    )
    found, evidence = call_in(dtype, one_at_a_time(rank) if loop else rank, params, x)
    if method == "auto" and rtol is None:
        found = settled(found, network, params, x, dtype)
    return of_what_was_given(found, (params, x), dtype), evidence
