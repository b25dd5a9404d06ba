"""Arrays as mantissa × 2^exponent, with one exponent for the array.

Multiplying by a power of two is exact, so everything here commutes bitwise with power-of-two
rescalings. Exponents are int32 scalars and carry no gradient; mantissas are differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Scaled(NamedTuple):
    """mantissa · 2^exponent: a float array and an int32 scalar."""

    mantissa: Any
    exponent: Any


def working_dtype(leaves: Sequence[Any]) -> Any:
    """float64 if a leaf is, else float32: half precision has neither the range nor the digits."""
    # NumPy arrays of float64 are float32 to jax unless 64-bit types are on.
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves]
    double = any(dtype == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def _layout(dtype: Any) -> tuple[Any, int, int]:
    """(integer dtype, mantissa bits, exponent bias) of an IEEE float type."""
    if jnp.dtype(dtype) == jnp.float64:
        return jnp.int64, 52, 1023
    return jnp.int32, 23, 127


def _unit_of(x: Any) -> Any:
    """2^floor(log2 x) of numbers x > 0, and 1 for x = 0: the mantissa bits cleared, so exact."""
    integer, bits, _ = _layout(x.dtype)
    raw = lax.bitcast_convert_type(x, integer) & integer(-1 << bits)
    unit = lax.bitcast_convert_type(raw, x.dtype)
    return lax.select(unit > 0, unit, lax.full_like(unit, 1))


def _common_unit(x: Any) -> Any:
    """The largest power of four up to the largest |x|.

    Of four, so that the square roots of what it divides still differ by powers of two exactly.
    """
    # Not the largest of abs(x): XLA's CPU backend would write abs(x) to memory first.
    return _even_unit(lax.max(_largest(x), -_smallest(x)))


# Functions of scalars are compiled for all shapes at once: tracing them anew for every array of a
# network would take as long as all else.
@jax.jit
def _even_unit(x: Any) -> Any:
    unit = _unit_of(x)
    odd = (_exponent_of(unit) & 1).astype(x.dtype)
    return unit * (1 - odd / 2)


def _exponent_of(unit: Any) -> Any:
    """log2 of powers of two, as int32."""
    integer, bits, bias = _layout(unit.dtype)
    raw = lax.bitcast_convert_type(unit, integer) >> integer(bits)
    return raw.astype(jnp.int32) - bias


def _exact_power(k: Any, dtype: Any) -> Any:
    """2^k, elementwise; 0 below the range of normal numbers, inf above it."""
    integer, bits, bias = _layout(dtype)
    k = lax.clamp(jnp.int32(-bias), k, jnp.int32(bias + 1))
    return lax.bitcast_convert_type((k + bias).astype(integer) << integer(bits), jnp.dtype(dtype))


def power_of_two(k: Any, dtype: Any) -> Any:
    """2^k exactly for an integer scalar k within the range of the dtype."""
    return _exact_power(k, dtype)


def shift(x: Any, k: Any) -> Any:
    """x · 2^k, exact unless the result leaves the range of the dtype.

    Applied as two equal factors, so that a large k can meet a tiny x without passing through
    infinity or zero on the way.
    """
    _, _, bias = _layout(x.dtype)
    k = lax.clamp(jnp.int32(2 - 2 * bias), k, jnp.int32(2 * bias - 2))
    half = k >> 1
    return x * _exact_power(half, x.dtype) * _exact_power(k - half, x.dtype)


def times(exponent: Any, factor: float, dtype: Any) -> tuple[Any, Any]:
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
    """The same numbers with the largest |mantissa| in [1, 4)."""
    unit = _common_unit(lax.stop_gradient(s.mantissa))
    return Scaled(s.mantissa * (1 / unit), _sum_once(s.exponent, _exponent_of(unit)))


@jax.jit
def _sum_once(a: Any, b: Any) -> Any:
    """a + b of int32 scalars, as a product with [1, 1], which XLA computes once.

    A chain of plain additions it would fold into every kernel that uses one of them, and compile
    time would grow with the square of the depth. Exact for |a + b| < 2^24.
    """
    pair = jnp.stack([a, b]).astype(jnp.float32)
    total = jnp.dot(pair, jnp.ones(2, jnp.float32), precision=lax.Precision.HIGHEST)
    return total.astype(jnp.int32)


def _largest(x: Any) -> Any:
    return lax.reduce_max(x, tuple(range(x.ndim)))


def _smallest(x: Any) -> Any:
    return lax.reduce_min(x, tuple(range(x.ndim)))


def power(value: Any, p: float, dtype: Any, *, sample: bool = False) -> Scaled:
    """|value|^p; scaled by an exact power of two first, so that it cannot overflow.

    With `sample` the power of two is read off a few elements on a regular grid: any will do, unless
    others are larger by 2^(127/p), and reading a large array once more is what costs.
    """
    if not isinstance(value, jax.Array):
        return _power_of_constant(value, p, dtype)
    return _power_of_array(value, p, dtype, sample)


@partial(jax.jit, static_argnames=("p", "dtype", "sample"))
def _power_of_array(value: Any, p: float, dtype: Any, sample: bool) -> Scaled:
    x = value.astype(dtype)
    seen = x[tuple(slice(None, None, max(1, n // 16)) for n in x.shape)] if sample else x
    unit = _common_unit(lax.stop_gradient(seen))
    x = abs(x) * (1 / unit)
    k = _exponent_of(unit)
    exponent, fraction = times(k, p, x.dtype)
    if p % 1 == 0:
        return Scaled(lax.integer_pow(x, int(p)) if p > 1 else x, exponent)
    # 2^(k·p) is no power of two for real p: its fractional part stays in the mantissa.
    return Scaled(x ** jnp.asarray(p, x.dtype) * fraction, exponent)


def _power_of_constant(value: Any, p: float, dtype: Any) -> Scaled:
    x = np.abs(np.asarray(value, np.float64))
    top = x.max(initial=0.0)
    k = int(np.frexp(top)[1]) - 1 if 0 < top < np.inf else 0
    whole = int(np.floor(k * p))
    return Scaled(
        jnp.asarray(np.ldexp(x, -k) ** p * 2.0 ** (k * p - whole), dtype), jnp.int32(whole)
    )


@partial(jax.jit, static_argnames="p")
def root_squared(s: Scaled, p: float) -> Scaled:
    """s^(2/p), elementwise; for whole p it commutes bitwise with multiplication by 2^p.

    Each element's own power of two is taken out first, in multiples of p.
    """
    x, dtype = s.mantissa, s.mantissa.dtype
    if p == 2:
        return s
    if p == 1:
        return Scaled(x * x, 2 * s.exponent)
    if p % 1:
        whole, fraction = times(s.exponent, 2 / p, dtype)
        return Scaled(x ** jnp.asarray(2 / p, dtype) * fraction, whole)
    p = int(p)
    k = _exponent_of(_unit_of(x))
    own = (k + s.exponent) // p
    inner = x * _exact_power(-k, dtype) * _exact_power(k + s.exponent - p * own, dtype)
    whole = 2 * (s.exponent // p)
    return Scaled(inner ** jnp.asarray(2 / p, dtype) * _exact_power(2 * own - whole, dtype), whole)


@jax.jit
def align(parts: Sequence[Scaled]) -> tuple[list[Any], Any]:
    """The mantissas over one common exponent, the largest among those of non-zero parts."""
    if len(parts) == 1:
        return [parts[0].mantissa], parts[0].exponent
    tops = [_largest(abs(lax.stop_gradient(s.mantissa))) for s in parts]
    factors, common = _alignment(tops, [s.exponent for s in parts])
    return [_lowered(s.mantissa, f) for s, f in zip(parts, factors, strict=True)], common


@jax.jit
def _alignment(tops: list[Any], exponents: list[Any]) -> tuple[list[Any], Any]:
    none = jnp.int32(jnp.iinfo(jnp.int32).min // 2)
    common = none
    for top, exponent in zip(tops, exponents, strict=True):
        common = lax.max(common, lax.select(top > 0, exponent, none))
    common = lax.select(common > none, common, jnp.int32(0))
    factors = [
        _exact_power(lax.min(exponent - common, jnp.int32(126)), top.dtype)
        for top, exponent in zip(tops, exponents, strict=True)
    ]
    return factors, common


@jax.custom_jvp
def _lowered(mantissa: Any, factor: Any) -> Any:
    """mantissa · factor, where a factor that underflows to 0 has the derivative NaN, not 0.

    Next to a sum that is 2^127 times larger a part does not count. What it would count for, if it
    were larger, is κ: a number that has been lost, and is not 0.
    """
    return mantissa * factor


@_lowered.defjvp
def _lowered_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    mantissa, factor = primals
    slope = lax.select(factor > 0, factor, lax.full_like(factor, jnp.nan))
    return _lowered(mantissa, factor), tangents[0] * slope


@jax.jit
def add(parts: Sequence[Scaled]) -> Scaled:
    """Elementwise sum."""
    mantissas, exponent = align(parts)
    return normalize(Scaled(sum(mantissas[1:], mantissas[0]), exponent))


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
    return normalize(Scaled(jnp.sum(s.mantissa, tuple(axes), keepdims=keepdims), s.exponent))


@jax.jit
def total(parts: Sequence[Scaled]) -> Scaled:
    """Sum over all elements of all parts, as a scalar."""
    return add([normalize(Scaled(jnp.sum(s.mantissa), s.exponent)) for s in parts])


@jax.jit
def log(s: Scaled) -> Any:
    """Natural logarithm, -inf for 0; exactly 0 for 1."""
    dtype = s.mantissa.dtype
    unit = _unit_of(s.mantissa)
    exponent = (_exponent_of(unit) + s.exponent).astype(dtype)
    return jnp.log(s.mantissa / unit) + exponent * jnp.asarray(np.log(2.0), dtype)


@partial(jax.jit, static_argnames="p")
def root(s: Scaled, p: float) -> Any:
    """(mantissa · 2^exponent)^(1/p) as a plain array; inf where that overflows."""
    whole, fraction = times(s.exponent, 1 / p, s.mantissa.dtype)
    inverse = jnp.asarray(1 / p, s.mantissa.dtype)
    mantissa = s.mantissa if p == 1 else jnp.sqrt(s.mantissa) if p == 2 else s.mantissa**inverse
    return shift(mantissa * fraction, whole)


def quotient(above: Any, below: Any) -> tuple[Any, Any]:
    """(q, k) with above/below = q·2^k elementwise and q of the order of one; below > 0.

    The plain quotient of two mantissas may leave the range of floats where the number that they
    stand for, with its exponent, does not.
    """
    unit, other = _unit_of(abs(above)), _unit_of(below)
    unit = jnp.where(jnp.isfinite(above), unit, 1)
    return (above / unit) / (below / other), _exponent_of(unit) - _exponent_of(other)


def shared(s: Scaled) -> Scaled:
    """Mantissas with an exponent each over one exponent; the smallest may become 0."""
    exponent = jnp.broadcast_to(s.exponent, s.mantissa.shape)
    none = jnp.iinfo(jnp.int32).min // 2
    top = jnp.max(jnp.where(s.mantissa != 0, exponent, none), initial=none)
    top = jnp.where(top > none, top, 0)
    return normalize(Scaled(shift(s.mantissa, exponent - top), top))


def norm(leaves: Sequence[Any]) -> Any:
    """(Σ x²)^{1/2} over all elements; squares neither overflow nor vanish."""
    top = jnp.stack([jnp.max(abs(a), initial=0) for a in leaves]).max()
    unit = _unit_of(jnp.where(jnp.isfinite(top), top, 1))
    ratios = [a * _exact_power(-_exponent_of(unit), unit.dtype) for a in leaves]
    return unit * jnp.sqrt(sum(jnp.sum(abs(r) ** 2) for r in ratios))


@jax.jit
def value(s: Scaled) -> Any:
    """The numbers as a plain array; inf where they overflow."""
    return shift(s.mantissa, s.exponent)
