"""How far rounding can move a program's results: a bound per element, worked out with the values.

A value stands for a computed array and a bound on its distance from the exact one: a running error
analysis (Wilkinson 1986; Higham, "Accuracy and Stability of Numerical Algorithms", §3.3). Products
and sums of numbers on a common grid of powers of two are exact as long as they fit the mantissa, so
programs on small integers have the bound 0, also where units are rescaled by powers of two. The
sign of a value that is not larger than its bound is *in doubt*, and so is what it selects.

To add an operation, add a rule. An operation without one is refused, and the caller measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._interpreter.walk import Body, Equation, Operand, Trace, Value, interpret, rule_table
from jaxinv._numerics.scaled import power_of_two
from jaxinv.typing import Array, DType, PyTree

_EXACT = lax.Precision.HIGHEST
# The grain of 0, and minus that of a value which is not exact: beyond all exponents of floats.
_ANY = 1 << 14
# Elementary functions are good to a few units in the last place.
_ELEMENTARY = 8


class Rounded(Value):
    """A computed array and how far off it may be; of integers and bools, whether they may be."""

    __slots__ = ("error", "value")

    def __init__(self, value: Array, error: Array | None = None):
        self.value, self.error = value, error
        self.key = object()


def value_of(a: Operand) -> Array:
    return a.value if isinstance(a, Rounded) else jnp.asarray(a)


def error_of(a: Operand) -> Array:
    """Zeros where a value is exact; for integers and bools: is it in doubt?"""
    value = value_of(a)
    kind = value.dtype if _is_float(value) else bool
    error = a.error if isinstance(a, Rounded) else None
    return jnp.zeros(value.shape, kind) if error is None else error


def _is_float(a: Array) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))


_Pairs = list[tuple[Array, Array]]  # values and errors


class Rounding:
    """The domain."""

    def __init__(self) -> None:
        self.rules = RULES

    def default(self, eqn: Equation, *inputs: Operand) -> NoReturn:
        raise eqn.refuse("the analysis of rounding", "it has no rule.", "nothing: it is measured.")

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        raise eqn.refuse("the analysis of rounding", "its branch is not known.", "it is measured.")

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        """The same loop on pairs of values and errors."""

        def pairs(values: list) -> _Pairs:
            return [(value_of(v), error_of(v)) for v in values]

        def step(carry: _Pairs, row: _Pairs) -> tuple[_Pairs, _Pairs]:
            values = [Rounded(*pair) for pair in (*carry, *row)]
            found = pairs(body(*consts, *values))
            return found[: len(init)], found[len(init) :]

        carry, rows = lax.scan(
            step, pairs(init), pairs(xs), eqn.params["length"], eqn.params["reverse"]
        )
        return [Rounded(*pair) for pair in (*carry, *rows)]


def with_rounding(function: Callable[..., Array], *arguments: PyTree) -> tuple[Array, Array]:
    """function(*arguments) and a bound on its error, for exact arguments.

    Raises:
        UnsupportedOperation: for operations without a rule.
    """
    leaves = jax.tree.leaves(arguments)
    # On shapes, which do not vary over the devices of a shard_map: nothing is marked there.
    closed = jax.make_jaxpr(function)(
        *jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), arguments)
    )
    traced = Trace(closed, len(leaves), [], None)
    (found,) = interpret(traced, [Rounded(jnp.asarray(a)) for a in leaves], [], Rounding())
    error = error_of(found)
    return value_of(found), jnp.where(jnp.isnan(error), jnp.inf, error)


# --- grids ----------------------------------------------------------------------------


def _grain(a: Operand) -> Array:
    """The exponent of the lowest bit of each number: large for 0, very negative if not exact."""
    value, error = value_of(a), error_of(a)
    info = jnp.finfo(value.dtype)
    word = jnp.uint64 if info.bits == 64 else jnp.uint32
    one, mantissa = jnp.asarray(1, word), jnp.asarray(info.nmant, word)
    bits = lax.bitcast_convert_type(abs(value), word)
    exponent = bits >> mantissa
    digits = bits & ((one << mantissa) - one)
    digits = jnp.where(exponent > 0, digits | (one << mantissa), digits)
    zeros = lax.population_count((digits & (~digits + one)) - one).astype(jnp.int32)
    bias = info.nmant - int(info.minexp) + 1
    grain = jnp.maximum(exponent.astype(jnp.int32), 1) - bias + zeros
    return jnp.where(error > 0, -_ANY, jnp.where(value == 0, _ANY, grain))


def _unrepresented(size: Array, grain: Array, units: float) -> Array:
    """What rounding adds: `units` in the last place of `size`, or 0 where all fits the mantissa."""
    info = jnp.finfo(size.dtype)
    limit = jnp.clip(grain + info.nmant + 1, int(info.minexp), int(info.maxexp) - 1)
    most = power_of_two(limit.astype(jnp.int32), size.dtype)
    fits = (size <= most) & (grain >= int(info.minexp))
    loss = units * float(info.eps) * size + units * float(info.tiny)
    return jnp.where(fits, 0, loss)


# --- rules ----------------------------------------------------------------------------

RULES, _rule = rule_table()


@_rule("reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "rev")
@_rule("concatenate", "pad", "split", "reduce_or", "reduce_max", "reduce_min")
def _moved(domain: Rounding, eqn: Equation, *inputs: Operand) -> Rounded | list[Rounded]:
    """The same elements elsewhere, or the largest of some: no further from exact than before."""
    found = eqn.bind(*map(value_of, inputs))
    errors: Any
    if eqn.name in ("reduce_max", "reduce_min"):
        errors = jnp.max(error_of(inputs[0]), axis=tuple(map(int, eqn.params["axes"])))
    elif all(not isinstance(v, Rounded) or v.error is None for v in inputs):
        errors = [None] * len(eqn.outputs) if eqn.primitive.multiple_results else None
    elif eqn.name == "reduce_or":
        errors = jnp.any(error_of(inputs[0]), axis=tuple(map(int, eqn.params["axes"])))
    else:
        errors = eqn.bind(*map(error_of, inputs))
    if eqn.primitive.multiple_results:
        return [Rounded(*pair) for pair in zip(found, errors, strict=True)]
    return Rounded(found, errors)


def _indices(domain: Rounding, eqn: Equation, values: Sequence[Operand]) -> list[Array]:
    for v in values:
        if isinstance(v, Rounded) and v.error is not None:
            domain.default(eqn)
    return [value_of(v) for v in values]


@_rule("gather", "dynamic_slice")
def _taken(domain: Rounding, eqn: Equation, operand: Operand, *where: Operand) -> Rounded:
    at = _indices(domain, eqn, where)
    error = None
    if isinstance(operand, Rounded) and operand.error is not None:
        error = eqn.bind(operand.error, *at)
    return Rounded(eqn.bind(value_of(operand), *at), error)


@_rule("dynamic_update_slice")
def _put(
    domain: Rounding, eqn: Equation, operand: Operand, update: Operand, *where: Operand
) -> Rounded:
    at = _indices(domain, eqn, where)
    found = eqn.bind(value_of(operand), value_of(update), *at)
    return Rounded(found, eqn.bind(error_of(operand), error_of(update), *at))


@_rule("scatter_add")
def _scattered(
    domain: Rounding, eqn: Equation, operand: Operand, where: Operand, update: Operand
) -> Rounded:
    (at,) = _indices(domain, eqn, [where])
    a, b = value_of(operand), value_of(update)
    grain = jnp.minimum(jnp.min(_grain(operand)), jnp.min(_grain(update)))
    loss = _unrepresented(eqn.bind(abs(a), at, abs(b)), grain, b.size + 1)
    errors = eqn.bind(error_of(operand), at, error_of(update))
    return Rounded(eqn.bind(a, at, b), errors + loss)


@_rule("convert_element_type")
def _converted(domain: Rounding, eqn: Equation, a: Rounded) -> Rounded:
    before, after = a.value.dtype, jnp.dtype(eqn.params["new_dtype"])
    found = eqn.bind(a.value)
    if before == after:
        return Rounded(found, a.error)
    if jnp.issubdtype(before, jnp.floating):
        domain.default(eqn)
    if jnp.issubdtype(after, jnp.floating) and before != jnp.dtype(bool):
        if a.error is not None:
            domain.default(eqn)
        # An integer is exact if it has not more digits than the mantissa.
        most = 2.0 ** (jnp.finfo(after).nmant + 1)
        return Rounded(found, jnp.where(abs(found) < most, 0, abs(found)))
    error = a.error
    if error is not None and jnp.issubdtype(after, jnp.floating):
        error = error.astype(after)
    return Rounded(found, error)


@_rule("neg", "abs")
def _sign_changed(domain: Rounding, eqn: Equation, a: Rounded) -> Rounded:
    return Rounded(eqn.bind(a.value), a.error)


@_rule("sign")
def _sign(domain: Rounding, eqn: Equation, a: Rounded) -> Rounded:
    doubt = (error_of(a) > 0) & (abs(a.value) <= error_of(a))
    return Rounded(eqn.bind(a.value), jnp.where(doubt, jnp.asarray(2, a.value.dtype), 0))


@_rule("add", "sub", "add_any", "add_jaxvals")
def _added(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    value = eqn.bind(value_of(a), value_of(b))
    if not _is_float(value):
        return _whole(domain, eqn, a, b)
    loss = _unrepresented(abs(value), jnp.minimum(_grain(a), _grain(b)), 1)
    return Rounded(value, error_of(a) + error_of(b) + loss)


@_rule("mul")
def _multiplied(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    x, y = value_of(a), value_of(b)
    value = eqn.bind(x, y)
    if not _is_float(value):
        return _whole(domain, eqn, a, b)
    loss = _unrepresented(abs(value), _grain(a) + _grain(b), 1)
    return Rounded(value, abs(x) * error_of(b) + error_of(a) * (abs(y) + error_of(b)) + loss)


@_rule("and", "or", "not", "xor", "rem", "is_finite")
def _whole(domain: Rounding, eqn: Equation, *inputs: Operand) -> Rounded:
    """Integers and bools: exact, or in doubt where an operand is."""
    found = eqn.bind(*map(value_of, inputs))
    if _is_float(found):
        domain.default(eqn)
    if eqn.name == "is_finite" or all(
        not isinstance(v, Rounded) or v.error is None for v in inputs
    ):
        return Rounded(found)
    doubt = jnp.zeros((), bool)
    for v in inputs:
        doubt = doubt | error_of(v)
    return Rounded(found, jnp.broadcast_to(doubt, found.shape))


@_rule("eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to")
def _compared(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    x, y = value_of(a), value_of(b)
    if not _is_float(x):
        return _whole(domain, eqn, a, b)
    if a is b:  # is it NaN?
        return Rounded(eqn.bind(x, y))
    slack = error_of(a) + error_of(b)
    return Rounded(eqn.bind(x, y), (slack > 0) & (abs(x - y) <= slack))


@_rule("max", "min")
def _larger(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    x, y = value_of(a), value_of(b)
    if not _is_float(x):
        return _whole(domain, eqn, a, b)
    ea, eb = error_of(a), error_of(b)
    ahead = x - y if eqn.name == "max" else y - x
    slack = ea + eb
    error = jnp.where(ahead > slack, ea, jnp.where(-ahead > slack, eb, jnp.maximum(ea, eb)))
    return Rounded(eqn.bind(x, y), error)


@_rule("clamp")
def _clamped(domain: Rounding, eqn: Equation, low: Operand, a: Operand, high: Operand) -> Rounded:
    if not all(_is_float(value_of(v)) for v in (low, a, high)):
        domain.default(eqn)
    error = jnp.maximum(jnp.maximum(error_of(low), error_of(a)), error_of(high))
    return Rounded(eqn.bind(value_of(low), value_of(a), value_of(high)), error)


@_rule("select_n")
def _selected(domain: Rounding, eqn: Equation, which: Operand, *cases: Operand) -> Rounded:
    value = eqn.bind(value_of(which), *map(value_of, cases))
    error = eqn.bind(value_of(which), *map(error_of, cases))
    if isinstance(which, Rounded) and which.error is not None:
        if _is_float(value):
            far = [abs(value_of(c) - value) + error_of(c) for c in cases]
            other = jnp.max(jnp.stack([jnp.broadcast_to(f, value.shape) for f in far]), 0)
        else:
            other = jnp.ones(value.shape, bool)
        error = jnp.where(which.error, other, error)
    return Rounded(value, error)


@_rule("reduce_sum", "cumsum", "reduce_window_sum")
def _summed(domain: Rounding, eqn: Equation, a: Rounded) -> Rounded:
    value = eqn.bind(a.value)
    if not _is_float(value):
        return _whole(domain, eqn, a) if a.error is None else domain.default(eqn)
    grain = _grain(a)
    if eqn.name == "reduce_sum":
        axes = tuple(map(int, eqn.params["axes"]))
        terms = math.prod(a.value.shape[i] for i in axes)
        grain = jnp.min(grain, axis=axes) if terms else jnp.full(value.shape, _ANY)
    else:
        terms, grain = a.value.size, jnp.min(grain)
    loss = _unrepresented(eqn.bind(abs(a.value)), grain, max(terms - 1, 0))
    return Rounded(value, eqn.bind(error_of(a)) * (1 + 1e-3) + loss)


def _bilinear(eqn: Equation, a: Operand, b: Operand, grain: Array, terms: int) -> Rounded:
    def product(u: Array, v: Array) -> Array:
        return eqn.bind(u, v, precision=_EXACT)

    x, y = value_of(a), value_of(b)
    value = eqn.bind(x, y)
    units = _units_of_product(eqn, value.dtype)
    grain = grain if units == 1 else jnp.full_like(grain, -_ANY)
    error = _unrepresented(product(abs(x), abs(y)), grain, units * terms)
    if isinstance(a, Rounded) and a.error is not None:
        error = error + product(a.error, abs(y) + error_of(b)) * (1 + 1e-3)
    if isinstance(b, Rounded) and b.error is not None:
        error = error + product(abs(x), b.error) * (1 + 1e-3)
    return Rounded(value, error)


def _units_of_product(eqn: Equation, dtype: DType) -> int:
    """Accelerators round the operands of float32 products further, unless told not to."""
    precision = eqn.params.get("precision")
    chosen = precision if isinstance(precision, tuple) else (precision,)
    if dtype != jnp.float32 or jax.default_backend() == "cpu" or set(chosen) == {_EXACT}:
        return 1
    return 1 << 16


@_rule("dot_general")
def _dotted(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    x, y = value_of(a), value_of(b)
    if not _is_float(x) or x.dtype != y.dtype:
        domain.default(eqn)
    (left, right), (batch_left, batch_right) = eqn.params["dimension_numbers"]

    def arranged(
        grain: Array, batch: Sequence[int], contracted: Sequence[int]
    ) -> tuple[Array, tuple[int, ...]]:
        free = [i for i in range(grain.ndim) if i not in (*batch, *contracted)]
        moved = jnp.transpose(grain, (*batch, *free, *contracted))
        shape = [math.prod(grain.shape[i] for i in axes) for axes in (batch, free, contracted)]
        return moved.reshape(shape), tuple(grain.shape[i] for i in free)

    ga, free_a = arranged(_grain(a), batch_left, left)
    gb, free_b = arranged(_grain(b), batch_right, right)
    terms = ga.shape[2]
    shape = (*(x.shape[i] for i in batch_left), *free_a, *free_b)
    if not terms or not math.prod(shape):
        return Rounded(eqn.bind(x, y))
    # min over k of ga[i, k] + gb[j, k] is at least the sum of two minima, for any shift c[k].
    c = jnp.min(gb, axis=1, keepdims=True)
    grain = jnp.min(ga + c, 2)[:, :, None] + jnp.min(gb - c, 2)[:, None, :]
    return _bilinear(eqn, a, b, grain.reshape(shape), terms)


@_rule("conv_general_dilated")
def _convolved(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    x, y = value_of(a), value_of(b)
    if not _is_float(x) or x.dtype != y.dtype:
        domain.default(eqn)
    grain = jnp.broadcast_to(jnp.min(_grain(a)) + jnp.min(_grain(b)), eqn.outputs[0].shape)
    return _bilinear(eqn, a, b, grain, min(x.size, y.size))


# --- elementwise functions ------------------------------------------------------------


@_rule("div")
def _divided(domain: Rounding, eqn: Equation, a: Operand, b: Operand) -> Rounded:
    x, y = value_of(a), value_of(b)
    value = eqn.bind(x, y)
    if not _is_float(value):
        return _whole(domain, eqn, a, b)
    ea, eb = error_of(a), error_of(b)
    away = abs(y) - eb
    moved = jnp.where(away > 0, (ea + abs(value) * eb) / jnp.where(away > 0, away, 1), jnp.inf)
    # By a power of two a quotient is exact, and 0 divided by anything is 0.
    mantissa, _ = jnp.frexp(abs(y))
    grain = jnp.where((mantissa == 0.5) & (eb == 0), _grain(a) - _exponent(y), -_ANY)
    grain = jnp.where((x == 0) & (ea == 0), _ANY, grain)
    return Rounded(value, moved * (1 + 1e-3) + _unrepresented(abs(value), grain, 1))


def _exponent(y: Array) -> Array:
    return jnp.frexp(abs(y))[1].astype(jnp.int32) - 1


@_rule("square", "integer_pow")
def _powered(domain: Rounding, eqn: Equation, a: Rounded) -> Rounded:
    n = int(eqn.params.get("y", 2))
    value, error, size = eqn.bind(a.value), error_of(a), abs(a.value)
    if not _is_float(value) or n == 0:
        domain.default(eqn)
    if n < 0:
        away = size - 8 * abs(n) * error
        moved = _below(away, 2 * abs(n * value) * error / jnp.where(away > 0, size, 1))
        return Rounded(
            value, moved + _unrepresented(abs(value), jnp.full_like(_grain(a), -_ANY), 2 - n)
        )
    moved = n * (size + error) ** (n - 1) * error
    return Rounded(value, moved * (1 + 1e-3) + _unrepresented(abs(value), n * _grain(a), n))


def _smooth(name: str, change: Callable[[Array, Array, Array], Array], relative: bool) -> None:
    """A rule for f: `change(x, f(x), e)` bounds |f(x ± e) − f(x)|; f is good to eps·|f| or eps."""

    @_rule(name)
    def _function(domain: Rounding, eqn: Equation, a: Rounded) -> Rounded:
        value, error = eqn.bind(a.value), error_of(a)
        if not _is_float(value):
            domain.default(eqn)
        info = jnp.finfo(value.dtype)
        size = abs(value) if relative else jnp.maximum(abs(value), 1)
        moved = jnp.where(error > 0, change(a.value, value, error), 0)
        own = _ELEMENTARY * (float(info.eps) * size + float(info.tiny))
        return Rounded(value, moved * (1 + 1e-3) + own)


def _below(away: Array, bound: Array) -> Array:
    """`bound` where the argument keeps away from the pole, else infinite."""
    return jnp.where(away > 0, bound, jnp.inf)


_smooth("exp", lambda x, f, e: f * jnp.expm1(e), True)
_smooth("expm1", lambda x, f, e: (abs(f) + 1) * jnp.expm1(e), True)
_smooth("log", lambda x, f, e: _below(x - e, e / (x - e)), False)
_smooth("log1p", lambda x, f, e: _below(1 + x - e, e / (1 + x - e)), True)
_smooth(
    "sqrt", lambda x, f, e: jnp.where(x > 2 * e, e / jnp.where(f > 0, f, 1), jnp.sqrt(3 * e)), True
)
_smooth("rsqrt", lambda x, f, e: _below(x - e, f * e / (x - e)), True)
_smooth("tanh", lambda x, f, e: (1 - f * f) * e + e * e, True)
_smooth("logistic", lambda x, f, e: f * (1 - f) * e + e * e, False)
_smooth("sin", lambda x, f, e: e, False)
_smooth("cos", lambda x, f, e: e, False)
_smooth("erf", lambda x, f, e: 2 * e, True)
