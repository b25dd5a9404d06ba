"""Arrays as mantissa × 2^exponent.

The exponent is one for the array, or an array of the same rank that broadcasts to it: units that
were rescaled by very different factors then keep all their digits. Multiplying by a power of two is
exact, so everything here commutes bitwise with power-of-two rescalings. Exponents are int32 and
carry no gradient; mantissas are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv.typing import Array, ArrayLike, Constant, DType, DTypeLike


class Scaled(NamedTuple):
    """mantissa · 2^exponent: a float array, and an int32 scalar or array that broadcasts to it."""

    mantissa: Array
    exponent: Array


def working_dtype(leaves: Sequence[Constant | jax.ShapeDtypeStruct]) -> DType:
    """float64 if a leaf is, else float32: half precision has neither the range nor the digits."""
    # NumPy arrays of float64 are float32 to jax unless 64-bit types are on.
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves]
    double = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def _layout(dtype: DTypeLike) -> tuple[type[jnp.int32 | jnp.int64], int, int]:
    """(integer dtype, mantissa bits, exponent bias) of an IEEE float type."""
    if jnp.dtype(dtype) == jnp.float64:
        return jnp.int64, 52, 1023
    return jnp.int32, 23, 127


def _unit_of(x: Array) -> Array:
    """2^floor(log2 x) of numbers x > 0, and 1 for x = 0: the mantissa bits cleared, so exact."""
    integer, bits, _ = _layout(x.dtype)
    raw = lax.bitcast_convert_type(x, integer) & integer(-1 << bits)
    unit = lax.bitcast_convert_type(raw, x.dtype)
    return lax.select(unit > 0, unit, lax.full_like(unit, 1))


def _common_unit(x: Array) -> tuple[Array, Array]:
    """The largest power of four up to the largest |x|, and its exponent.

    Of four, so that the square roots of what it divides still differ by powers of two exactly.
    """
    # Not the largest of abs(x): XLA's CPU backend would write abs(x) to memory first.
    return _even_unit(lax.max(_largest(x), -_smallest(x)))


# Functions of scalars are compiled for all shapes at once: tracing them anew for every array of a
# network would take as long as all else.
@jax.jit
def _even_unit(x: Array) -> tuple[Array, Array]:
    """The largest power of four up to x, 1 for x = 0; and its exponent, as int32."""
    integer, bits, bias = _layout(x.dtype)
    biased = lax.bitcast_convert_type(x, integer) >> integer(bits)
    # The bias is odd, so even exponents are those that are odd with it.
    even = lax.select(biased > 0, (biased - 1) | 1, lax.full_like(biased, bias))
    unit = lax.bitcast_convert_type(even << integer(bits), x.dtype)
    return unit, even.astype(jnp.int32) - bias


def _exponent_of(unit: Array) -> Array:
    """log2 of powers of two, as int32."""
    integer, bits, bias = _layout(unit.dtype)
    raw = lax.bitcast_convert_type(unit, integer) >> integer(bits)
    return raw.astype(jnp.int32) - bias


def _exact_power(k: Array, dtype: DTypeLike) -> Array:
    """2^k, elementwise; 0 below the range of normal numbers, inf above it."""
    _, _, bias = _layout(dtype)
    return _normal_power(lax.clamp(jnp.int32(-bias), k, jnp.int32(bias + 1)), dtype)


def _normal_power(k: Array, dtype: DTypeLike) -> Array:
    """2^k, elementwise, of k within the range of normal numbers."""
    integer, bits, bias = _layout(dtype)
    return lax.bitcast_convert_type((k + bias).astype(integer) << integer(bits), jnp.dtype(dtype))


def power_of_two(k: Array, dtype: DTypeLike) -> Array:
    """2^k exactly for int32 k within the range of the dtype."""
    return _exact_power(k, dtype)


def shift(x: Array, k: Array) -> Array:
    """x · 2^k, exact unless the result leaves the range of the dtype.

    Applied as two equal factors, so that a large k can meet a tiny x without passing through
    infinity or zero on the way.
    """
    _, _, bias = _layout(x.dtype)
    k = lax.clamp(jnp.int32(2 - 2 * bias), k, jnp.int32(2 * bias - 2))
    half = k >> 1
    return x * _normal_power(half, x.dtype) * _normal_power(k - half, x.dtype)


def times(exponent: Array, factor: float, dtype: DTypeLike) -> tuple[Array, Array]:
    """(whole, fraction) with 2^(exponent·factor) = 2^whole · fraction, 1 <= fraction < 2.

    The exponent is taken in digits of base 16, each times the remainder of 16^i·factor worked out
    in double precision: a large exponent times `factor` in float32 would lose the fraction.
    """
    if factor % 1 == 0:
        return exponent * int(factor), jnp.ones((), dtype)
    whole, rest = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
    for i in range(5):
        digit = exponent & 15 if i < 4 else exponent
        step = round(16**i * factor)
        whole = whole + digit * step
        rest = rest + digit.astype(dtype) * jnp.asarray(16**i * factor - step, dtype)
        exponent = exponent >> 4
    carry = jnp.floor(rest)
    return whole + carry.astype(jnp.int32), jnp.exp2(rest - carry)


@jax.jit
def normalize(s: Scaled) -> Scaled:
    """The same numbers with the largest |mantissa| of those that share an exponent in [1, 4)."""
    fixed = lax.stop_gradient(s.mantissa)
    if not s.exponent.ndim:
        unit, k = _common_unit(fixed)
        return Scaled(s.mantissa * (1 / unit), _sum_once(s.exponent, k))
    unit, k = _even_unit(_tops(fixed, s.exponent.shape))
    return Scaled(s.mantissa * (1 / unit), s.exponent + k)


def _tops(x: Array, cells: Sequence[int]) -> Array:
    """The largest |x| in each cell of an array of shape `cells` that broadcasts to x."""
    if not x.ndim:
        return lax.expand_dims(abs(x), range(len(cells)))
    axes = tuple(axis for axis, n in enumerate(cells) if n == 1)
    return jnp.max(abs(x), axes, initial=0, keepdims=True)


def moved(function: Callable[[Array], Array], s: Scaled) -> Scaled:
    """The same numbers in other places."""
    if not jnp.ndim(s.exponent):
        return Scaled(function(s.mantissa), s.exponent)
    return Scaled(function(s.mantissa), function(every_exponent(s)))


def every_exponent(s: Scaled) -> Array:
    """The exponent of each element."""
    return jnp.broadcast_to(s.exponent, s.mantissa.shape)


NONE = jnp.iinfo(jnp.int32).min // 2  # the exponent of 0, where a largest is sought


def level(s: Scaled, axes: Sequence[int] | None = None) -> Scaled:
    """Over exponents that are equal along some axes; over one exponent if axes is None.

    What is too small beside the largest along those axes becomes 0, which does not count in a sum.
    """
    if not jnp.ndim(s.exponent):
        return s
    if axes is not None and all(s.exponent.shape[axis] == 1 for axis in axes):
        return s
    return _level(s, None if axes is None else tuple(axes))


@partial(jax.jit, static_argnames="axes")
def _level(s: Scaled, axes: tuple[int, ...] | None) -> Scaled:
    along = tuple(range(s.exponent.ndim)) if axes is None else axes
    fixed = lax.stop_gradient(s.mantissa)
    found = jnp.where(_tops(fixed, s.exponent.shape) > 0, s.exponent, NONE)
    top = jnp.max(found, along, initial=NONE, keepdims=True)
    top = jnp.where(top > NONE, top, 0)
    mantissa = shift(s.mantissa, lax.min(s.exponent - top, jnp.int32(126)))
    return Scaled(mantissa, top if axes is not None else top.reshape(()))


@jax.jit
def _sum_once(a: Array, b: Array) -> Array:
    """a + b of int32 scalars, as a product with [1, 1], which XLA computes once.

    A chain of plain additions it would fold into every kernel that uses one of them, and compile
    time would grow with the square of the depth. Exact for |a + b| < 2^24.
    """
    pair = jnp.stack([a, b]).astype(jnp.float32)
    total = jnp.dot(pair, jnp.ones(2, jnp.float32), precision=lax.Precision.HIGHEST)
    return total.astype(jnp.int32)


def _largest(x: Array) -> Array:
    return lax.reduce_max(x, tuple(range(x.ndim)))


def _smallest(x: Array) -> Array:
    return lax.reduce_min(x, tuple(range(x.ndim)))


def gauged_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes whose indices have an exponent each in `power`: the two longest, the later first."""
    longest = sorted(range(len(shape)), key=lambda axis: (-shape[axis], -axis))
    return tuple(sorted(longest[:2], reverse=True))


def power(value: ArrayLike, p: float, dtype: DTypeLike, *, sample: bool = False) -> Scaled:
    """|value|^p; scaled by exact powers of two first, so that it neither overflows nor vanishes.

    Every row and every column has a power of two: a unit rescaled by any factor changes exponents
    alone. With `sample` they are read off a few elements on a regular grid: any will do, unless
    others are larger by 2^(127/p), and reading a large array once more is what costs.
    """
    if not isinstance(value, jax.Array):
        return _power_of_constant(value, p, dtype)
    return _power_of_array(value, p, dtype, sample)


@partial(jax.jit, static_argnames=("p", "dtype", "sample"))
def _power_of_array(value: Array, p: float, dtype: DTypeLike, sample: bool) -> Scaled:
    # XLA stores an array of the size of `value` that more than one sum reads: so each works it out
    # for itself, with signs until the last, and from copies of the factors.
    x = _real(value, dtype)
    factors: list[Array] = []
    k = jnp.zeros((1,) * x.ndim, jnp.int32)
    if not x.ndim:
        unit, k = _even_unit(abs(lax.stop_gradient(x)))
        x = x * (1 / unit)
    for axis in gauged_axes(x.shape):
        grid = [
            slice(None, None, 1 if a == axis or not sample else max(1, n // 16))
            for a, n in enumerate(x.shape)
        ]
        cells = [n if a == axis else 1 for a, n in enumerate(x.shape)]
        part = x
        for factor in factors:
            part = part * factor
        unit, more = _even_unit(_tops(lax.stop_gradient(part[tuple(grid)]), cells))
        factors, k = [*factors, 1 / unit], k + more
    for factor in factors:
        x = x * lax.optimization_barrier(factor)
    exponent, fraction = times(k, p, x.dtype)
    x = abs(x)
    if p % 1 == 0:
        return Scaled(lax.integer_pow(x, int(p)) if p > 1 else x, exponent)
    # 2^(k·p) is no power of two for real p: its fractional part stays in the mantissa.
    return Scaled(x ** jnp.asarray(p, x.dtype) * fraction, exponent)


def _real(value: Array, dtype: DTypeLike) -> Array:
    """A number of the same absolute value."""
    complex_ = jnp.issubdtype(value.dtype, jnp.complexfloating)
    return (abs(value) if complex_ else value).astype(dtype)


def power_along(value: Array, p: float, dtype: DTypeLike) -> Scaled:
    """|value|^p with an exponent for each index of all axes but the first."""
    x = abs(_real(value, dtype))
    unit, k = _even_unit(_tops(lax.stop_gradient(x), (1, *x.shape[1:])))
    exponent, fraction = times(k, p, x.dtype)
    return Scaled((x * (1 / unit)) ** jnp.asarray(p, x.dtype) * fraction, exponent)


def by_index(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """(x / 2^k, k): for each index of the axes, the exponent k of its largest element is even."""
    cells = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    unit, k = _even_unit(_tops(lax.stop_gradient(x), cells))
    return x * (1 / unit), k


def _power_of_constant(value: ArrayLike, p: float, dtype: DTypeLike) -> Scaled:
    x = np.abs(np.asarray(value)).astype(np.float64)
    top, least = x.max(initial=0.0), x.min(initial=np.inf, where=x > 0)
    k: np.ndarray | np.integer = np.frexp(top)[1] - 1 if 0 < top < np.inf else np.int64(0)
    if least < top * 2.0 ** (-100 / p):
        k = np.where((x > 0) & (x < np.inf), np.frexp(x)[1] - 1, 0)
    whole = np.floor(k * p)
    mantissa = np.ldexp(x, -k) ** p * 2.0 ** (k * p - whole)
    return Scaled(jnp.asarray(mantissa, dtype), jnp.asarray(whole.astype(np.int32)))


@partial(jax.jit, static_argnames="p")
def root_squared(s: Scaled, p: float) -> Scaled:
    """s^(2/p), elementwise; for whole p it commutes bitwise with multiplication by 2^p.

    Each element's own power of two is taken out first, in multiples of p.
    """
    x, dtype = s.mantissa, s.mantissa.dtype
    if p == 2:
        return s
    k = _exponent_of(_unit_of(x))
    if p == 1 or p % 1:
        whole, fraction = times(k + s.exponent, 2 / p, dtype)
        return Scaled((x * _exact_power(-k, dtype)) ** jnp.asarray(2 / p, dtype) * fraction, whole)
    p = int(p)
    own = (k + s.exponent) // p
    inner = x * _exact_power(-k, dtype) * _exact_power(k + s.exponent - p * own, dtype)
    whole = 2 * (s.exponent // p)
    return Scaled(inner ** jnp.asarray(2 / p, dtype) * _exact_power(2 * own - whole, dtype), whole)


@partial(jax.jit, static_argnames="edges")
def align(
    parts: Sequence[Scaled], edges: tuple[bool, ...] | None = None
) -> tuple[list[Array], Array]:
    """The mantissas over common exponents, the largest among those of non-zero parts.

    `edges` says which parts are lengths of edges, and no sums over paths.
    """
    if len(parts) == 1:
        return [parts[0].mantissa], parts[0].exponent
    if any(jnp.ndim(s.exponent) for s in parts):
        return _aligned_cells(parts, edges)
    tops = [_largest(abs(lax.stop_gradient(s.mantissa))) for s in parts]
    factors, common = _alignment(tops, [s.exponent for s in parts])
    return [_lowered(s.mantissa, f) for s, f in zip(parts, factors, strict=True)], common


@jax.jit
def _alignment(tops: list[Array], exponents: list[Array]) -> tuple[list[Array], Array]:
    none = jnp.int32(NONE)
    common = none
    for top, exponent in zip(tops, exponents, strict=True):
        common = lax.max(common, lax.select(top > 0, exponent, none))
    common = lax.select(common > none, common, jnp.int32(0))
    steps = [lax.min(exponent - common, jnp.int32(126)) for exponent in exponents]
    return steps, common


def _aligned_cells(
    parts: Sequence[Scaled], edges: Sequence[bool] | None
) -> tuple[list[Array], Array]:
    """`align` where exponents are arrays."""
    rank = max(jnp.ndim(s.exponent) for s in parts)
    exponents = [
        s.exponent if jnp.ndim(s.exponent) else s.exponent.reshape((1,) * rank) for s in parts
    ]
    cells = np.broadcast_shapes(*(e.shape for e in exponents))
    common = jnp.int32(NONE)
    for s, exponent in zip(parts, exponents, strict=True):
        fixed = lax.stop_gradient(s.mantissa)
        # A part with fewer elements than cells has one for each of its own.
        own = [n if m > 1 else 1 for n, m in zip(cells, fixed.shape or (1,) * rank, strict=True)]
        common = jnp.maximum(common, jnp.where(_tops(fixed, own) > 0, exponent, NONE))
    common = jnp.where(common > NONE, common, 0)
    steps = [lax.min(exponent - common, jnp.int32(126)) for exponent in exponents]
    # An edge that starts at a constant (a bias) is on no other paths: what is lost stays its own.
    lower = [_lowered if starts else shift for starts in (edges or [False] * len(parts))]
    shifted = [f(s.mantissa, k) for f, s, k in zip(lower, parts, steps, strict=True)]
    return shifted, common


@jax.custom_jvp
def _lowered(mantissa: Array, k: Array) -> Array:
    """mantissa · 2^k, whose derivative is NaN, not 0, where 2^k has left the range of the dtype.

    Next to a sum that is so much larger a part does not count. What it would count for, if it were
    larger, is κ: a number that has been lost, and is not 0.
    """
    return shift(mantissa, k)


@_lowered.defjvp
def _lowered_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    mantissa, k = primals
    _, _, bias = _layout(mantissa.dtype)
    lost = jnp.where(k > -bias - 40, 1, jnp.nan).astype(mantissa.dtype)
    slope = shift(tangents[0], k) * lost
    return _lowered(mantissa, k), slope


@partial(jax.jit, static_argnames="edges")
def add(parts: Sequence[Scaled], edges: tuple[bool, ...] | None = None) -> Scaled:
    """Elementwise sum; for `edges` see `align`."""
    mantissas, exponent = align(parts, edges)
    return normalize(Scaled(sum(mantissas[1:], mantissas[0]), exponent))


@jax.jit
def plus(a: Scaled, b: Scaled) -> Scaled:
    """a + b for numbers > 0 or = 0 of one shape, each over its own exponent; not renormalised."""
    over = lax.max(every_exponent(a), every_exponent(b))
    top = jnp.where(a.mantissa == 0, b.exponent, jnp.where(b.mantissa == 0, a.exponent, over))
    parts = [
        s.mantissa * _exact_power(lax.min(s.exponent - top, jnp.int32(0)), a.mantissa.dtype)
        for s in (a, b)
    ]
    return Scaled(parts[0] + parts[1], top)


@jax.jit
def multiply(a: Scaled, b: Scaled) -> Scaled:
    """Elementwise product, not renormalised."""
    return Scaled(a.mantissa * b.mantissa, a.exponent + b.exponent)


@jax.jit
def maximum(parts: Sequence[Scaled]) -> Scaled:
    """Elementwise maximum."""
    mantissas, exponent = align(parts)
    top = mantissas[0]
    for m in mantissas[1:]:
        top = jnp.maximum(top, m)
    return Scaled(top, exponent)


def summed(s: Scaled, axes: Sequence[int], keepdims: bool = False) -> Scaled:
    """Sum over some axes."""
    return _summed(s, tuple(axes), keepdims)


@partial(jax.jit, static_argnames=("axes", "keepdims"))
def _summed(s: Scaled, axes: tuple[int, ...], keepdims: bool) -> Scaled:
    s = level(s, axes)
    exponent = s.exponent
    if jnp.ndim(exponent) and not keepdims:
        exponent = lax.squeeze(exponent, axes)
    return normalize(Scaled(jnp.sum(s.mantissa, axes, keepdims=keepdims), exponent))


def mean(s: Scaled) -> Scaled:
    """Mean over the first axis, along which the exponents are equal."""
    exponent = s.exponent[0] if s.exponent.ndim else s.exponent
    return normalize(Scaled(s.mantissa.mean(axis=0), exponent))


@jax.jit
def total(parts: Sequence[Scaled]) -> Scaled:
    """Sum over all elements of all parts, as a scalar."""
    sums = [Scaled(jnp.sum(level(s).mantissa), level(s).exponent) for s in parts]
    return add([normalize(s) for s in sums])


@jax.jit
def log(s: Scaled) -> Array:
    """Natural logarithm, -inf for 0; exactly 0 for 1."""
    dtype = s.mantissa.dtype
    unit = _unit_of(s.mantissa)
    exponent = (_exponent_of(unit) + s.exponent).astype(dtype)
    return jnp.log(s.mantissa / unit) + exponent * jnp.asarray(np.log(2.0), dtype)


@partial(jax.jit, static_argnames="p")
def root(s: Scaled, p: float) -> Array:
    """(mantissa · 2^exponent)^(1/p) as a plain array; inf where that overflows."""
    whole, fraction = times(s.exponent, 1 / p, s.mantissa.dtype)
    inverse = jnp.asarray(1 / p, s.mantissa.dtype)
    mantissa = s.mantissa if p == 1 else jnp.sqrt(s.mantissa) if p == 2 else s.mantissa**inverse
    return shift(mantissa * fraction, whole)


def quotient(above: Array, below: Array) -> tuple[Array, Array]:
    """(q, k) with above/below = q·2^k elementwise and q of the order of one; below > 0.

    The plain quotient of two mantissas may leave the range of floats where the number that they
    stand for, with its exponent, does not.
    """
    (q, k), (d, other) = _split(above), _split(below)
    return q / d, k - other


def _split(x: Array) -> tuple[Array, Array]:
    """(m, k) with x = m·2^k and 1 <= |m| < 2; k = 0 for 0, infinities and NaN.

    By bits: of (a/2^i)/(b/2^j) XLA makes (a·2^j)/(b·2^i), which overflows.
    """
    integer, bits, bias = _layout(x.dtype)
    raw = lax.bitcast_convert_type(x, integer)
    k = ((raw >> integer(bits)) & integer(2 * bias + 1)).astype(jnp.int32)
    normal = (k > 0) & (k < 2 * bias + 1)
    kept = raw & integer(~((2 * bias + 1) << bits))
    mantissa = lax.bitcast_convert_type(kept | integer(bias << bits), x.dtype)
    return jnp.where(normal, mantissa, x), jnp.where(normal, k - bias, 0)


def shared(s: Scaled) -> Scaled:
    """The same numbers over one exponent; the smallest may become 0."""
    return normalize(level(s))


def norm(leaves: Sequence[Array]) -> Array:
    """(Σ x²)^{1/2} over all elements; squares neither overflow nor vanish."""
    top = jnp.stack([jnp.max(abs(a), initial=0) for a in leaves]).max()
    unit = _unit_of(jnp.where(jnp.isfinite(top), top, 1))
    ratios = [a * _exact_power(-_exponent_of(unit), unit.dtype) for a in leaves]
    return unit * jnp.sqrt(sum(jnp.sum(abs(r) ** 2) for r in ratios))


@jax.jit
def value(s: Scaled) -> Array:
    """The numbers as a plain array; inf where they overflow."""
    return shift(s.mantissa, s.exponent)
