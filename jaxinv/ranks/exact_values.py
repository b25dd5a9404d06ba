"""Values of the exact domain: rational numbers, and derivatives modulo two primes.

Every finite float is an integer times a power of two. Sums, products, maxima and comparisons of
such numbers are computed here in Python's integers, without rounding. A derivative is only ever
added and multiplied, so its residue modulo a prime is enough for the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, lcm
from typing import Protocol

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Value
from jaxinv.errors import UnsupportedOperation

# Products of two residues fit int64. No famous numbers: a weight that is a multiple is an accident.
PRIMES = (2_147_480_197, 2_147_480_161)
_MODULI = np.array(PRIMES)[:, None, None]
THEORY = "exact arithmetic"
REMEDY = (
    "exact ranks need piecewise polynomial operations on finite numbers; use method='auto' or "
    "'svd' for this function."
)
# Integers of more bits than this take longer than any answer is worth.
_MOST_BITS = 1 << 18


class Exact(Value):
    """Numbers num/den and their derivatives in some parameters.

    `num` is an object array of integers in the shape that the program has, `den` one positive
    integer. `tangents` is (primes, size, parameters), int64, or None where all of it is zero.
    """

    __slots__ = ("num", "den", "tangents")

    def __init__(self, num: np.ndarray, den: int = 1, tangents: np.ndarray | None = None):
        # NumPy makes a bare integer of a result without axes.
        self.num = num if isinstance(num, np.ndarray) else objects([num], ())
        self.den, self.tangents = den, tangents

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num.shape

    def residues(self) -> np.ndarray:
        """(primes, size, 1)."""
        flat = self.num.ravel()
        rows = [(flat * pow(self.den, -1, p) % p).astype(np.int64) for p in PRIMES]
        return np.stack(rows)[:, :, None]


class Exactly(Protocol):
    """What rules ask of the domain."""

    tied: bool

    def check_precision(self, eqn: Equation) -> None: ...


def refuse(eqn: Equation, why: str, what: str | None = None) -> UnsupportedOperation:
    return eqn.refuse(THEORY, why, REMEDY, what=what)


def objects(values: Sequence[int] | np.ndarray | int, shape: Sequence[int]) -> np.ndarray:
    """An object array of Python integers."""
    out = np.empty(int(np.prod(shape)), object)
    out[:] = values
    return out.reshape(shape)


def lift(eqn: Equation | None, value: Operand) -> Exact:
    """A constant array as exact numbers."""
    if isinstance(value, Exact):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return Exact(objects(array.ravel().tolist(), array.shape))
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise refuse(eqn, "it meets a constant that is infinite or no number.")  # type: ignore[arg-type]
    mantissas, exponents = np.frexp(array.ravel())
    integers = np.ldexp(mantissas, 53).astype(np.int64).tolist()
    shifts = (exponents - 53).tolist()
    lowest = min([0, *(s for m, s in zip(integers, shifts, strict=True) if m)])
    numbers = [m << (s - lowest) if m else 0 for m, s in zip(integers, shifts, strict=True)]
    return reduced(objects(numbers, array.shape), 1 << -lowest, None)


def reduced(num: np.ndarray, den: int, tangents: np.ndarray | None) -> Exact:
    """The same numbers in lowest common terms: what rounding would keep small, this does."""
    if den != 1:
        flat = np.ravel(num).tolist()
        common = gcd(den, *flat)
        if common != 1:
            num, den = objects([n // common for n in flat], np.shape(num)), den // common
    return Exact(num, den, tangents)


def common_denominator(values: Sequence[Exact]) -> tuple[list[np.ndarray], int]:
    den = lcm(*(v.den for v in values))
    return [v.num if v.den == den else v.num * (den // v.den) for v in values], den


# --- moving elements --------------------------------------------------------------------


def take(value: Exact, index: np.ndarray) -> Exact:
    """Elements at flat positions; 0 where the position is negative."""
    if value.num.size == 0:
        return Exact(objects(0, index.shape))
    inside = index >= 0
    num = value.num.ravel()[np.where(inside, index, 0)]
    tangents = value.tangents
    if tangents is not None:
        flat = index.ravel()
        tangents = tangents[:, np.maximum(flat, 0)]
        if not inside.all():
            tangents[:, flat < 0] = 0
    return Exact(num if inside.all() else np.where(inside, num, 0), value.den, tangents)


def joined(values: Sequence[Exact]) -> Exact:
    """All elements, one value after another, as one flat value."""
    numbers, den = common_denominator(values)
    num = np.concatenate([n.ravel() for n in numbers])
    width = {v.tangents.shape[2] for v in values if v.tangents is not None}
    if not width:
        return Exact(num, den)
    (m,) = width
    parts = [
        np.zeros((len(PRIMES), v.num.size, m), np.int64) if v.tangents is None else v.tangents
        for v in values
    ]
    return Exact(num, den, np.concatenate(parts, 1))


def broadcast(value: Exact, shape: Sequence[int]) -> Exact:
    """A scalar, or axes of length one, in the shape of the other operand."""
    if value.shape == tuple(shape):
        return value
    return take(value, np.broadcast_to(positions(value), shape))


def positions(value: Exact, start: int = 0) -> np.ndarray:
    return np.arange(start, start + value.num.size).reshape(value.shape)


# --- order --------------------------------------------------------------------------------


def ranks(*values: Exact) -> list[np.ndarray]:
    """Integers in the same order as the numbers, equal where they are equal."""
    numbers, _ = common_denominator(values)
    flat = np.concatenate([n.ravel() for n in numbers])
    order = {n: i for i, n in enumerate(sorted(set(flat.tolist())))}
    integers = np.array([order[n] for n in flat], np.int64)
    ends = np.cumsum([v.num.size for v in values])[:-1]
    parts = np.split(integers, ends)
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


# --- arithmetic ---------------------------------------------------------------------------


def scaled_tangents(tangents: np.ndarray | None, residues: np.ndarray) -> np.ndarray | None:
    return None if tangents is None else tangents * residues % _MODULI


def add_tangents(left: np.ndarray | None, right: np.ndarray | None) -> np.ndarray | None:
    if left is None or right is None:
        return left if right is None else right
    return (left + right) % _MODULI


def add(left: Exact, right: Exact) -> Exact:
    (a, b), den = common_denominator([left, right])
    return reduced(a + b, den, add_tangents(left.tangents, right.tangents))


def negate(value: Exact) -> Exact:
    tangents = value.tangents
    return Exact(-value.num, value.den, None if tangents is None else -tangents % _MODULI)


def multiply(left: Exact, right: Exact) -> Exact:
    one = scaled_tangents(left.tangents, right.residues()) if left.tangents is not None else None
    two = scaled_tangents(right.tangents, left.residues()) if right.tangents is not None else None
    return reduced(left.num * right.num, left.den * right.den, add_tangents(one, two))


def reciprocal(eqn: Equation, value: Exact) -> Exact:
    flat = value.num.ravel().tolist()
    if not all(flat):
        raise refuse(eqn, "it divides by a value that is 0.")
    common = lcm(*flat)
    if common.bit_length() > _MOST_BITS:
        raise refuse(eqn, "it divides by so many different values that fractions grow too long.")
    if any(common % p == 0 for p in PRIMES):
        raise refuse(eqn, f"it divides by a multiple of one of the primes {PRIMES}.")
    out = Exact(objects([value.den * (common // n) for n in flat], value.shape), common)
    if value.tangents is not None:
        slope = negate(multiply(out, out)).residues()
        out.tangents = scaled_tangents(value.tangents, slope)
    return out


def weighted(values: Sequence[Exact], weights: Sequence[np.ndarray], num: Exact) -> Exact:
    """The numbers of `num` with the tangents Σ weight·tangent; weights are (size,) in halves."""
    total = None
    for value, weight in zip(values, weights, strict=True):
        half = lift(None, weight.ravel()).residues()
        total = add_tangents(total, scaled_tangents(value.tangents, half))
    return Exact(num.num, num.den, total)


def summed_tangents(value: Exact, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
    """A linear map with small whole coefficients, on (primes, *shape, parameters)."""
    if value.tangents is None:
        return None
    m = value.tangents.shape[2]
    out = change(value.tangents.reshape(len(PRIMES), *value.shape, m))
    return out.reshape(len(PRIMES), -1, m) % _MODULI


# --- contractions -------------------------------------------------------------------------


def matmul_modulo(left: np.ndarray, right: np.ndarray, p: int) -> np.ndarray:
    """Product of (..., n, k) and (..., k, q) residues, by float64 products that do not round.

    Halves of 16 bits times 31 bits leave room for 64 terms below 2^53.
    """
    total: np.ndarray | int = 0
    for start in range(0, left.shape[-1], 64):
        a, b = left[..., start : start + 64], right[..., start : start + 64, :].astype(np.float64)
        high, low = (np.matmul(part.astype(np.float64), b) for part in (a >> 16, a & 0xFFFF))
        high, low = (np.fmod(part, p).astype(np.int64) for part in (high, low))
        total = (total + ((high << 16) + low)) % p
    return np.zeros((*left.shape[:-1], right.shape[-1]), np.int64) + total


def contract(left: Exact, right: Exact) -> Exact:
    """(b, n, k) times (b, k, q), with the product rule."""
    num = np.matmul(left.num, right.num) if left.shape[2] else objects(
        0, (left.shape[0], left.shape[1], right.shape[2])
    )  # fmt: skip
    parts = []
    for value, other, is_left in ((left, right, True), (right, left, False)):
        if value.tangents is None:
            continue
        b, k = left.shape[0], left.shape[2]
        free = value.shape[1] if is_left else value.shape[2]
        m = value.tangents.shape[2]
        fixed = other.residues().reshape(len(PRIMES), *other.shape)
        moving = value.tangents.reshape(len(PRIMES), *value.shape, m)
        if is_left:  # (b, q, k) @ (b, k, n·m)
            fixed, moving = np.swapaxes(fixed, 2, 3), np.swapaxes(moving, 2, 3)
        moving = moving.reshape(len(PRIMES), b, k, free * m)
        out = np.stack(
            [matmul_modulo(f, t, p) for f, t, p in zip(fixed, moving, PRIMES, strict=True)]
        )
        out = out.reshape(len(PRIMES), b, fixed.shape[2], free, m)
        if is_left:
            out = np.swapaxes(out, 2, 3)
        parts.append(out.reshape(len(PRIMES), -1, m))
    tangents = None
    for part in parts:
        tangents = add_tangents(tangents, part)
    return reduced(num, left.den * right.den, tangents)
