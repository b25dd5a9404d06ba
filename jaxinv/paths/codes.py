"""Path rules of integers and truth values that are read from x: tokens, classes, padding masks.

A lookup `table[ids]` is a linear layer on the one-hot code of `ids`: a path starts at each of the
rows, so the sums of all rows run into what is read, as they do for `one_hot(ids) @ table`. A truth
value opens or closes a gate, `where(mask, h, 0)` or `h * mask`, whose slope is 0 or 1. Integers
that are used as numbers (pixels) are inputs like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Value, constants, is_concrete
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import UnsupportedOperation
from jaxinv.paths import exponents
from jaxinv.paths import runs as _path_runs
from jaxinv.paths.piecewise import gate
from jaxinv.paths.values import (
    Code,
    Operand,
    Paths,
    Result,
    Semantics,
    Weight,
    as_paths,
    edge,
    indexed,
    is_zero,
    multiples_of,
    rounding,
)
from jaxinv.typing import Array, ArrayLike

_LAYOUT = frozenset(
    "reshape transpose broadcast_in_dim squeeze expand_dims slice rev concatenate pad split gather "
    "dynamic_slice copy convert_element_type".split()
)
# On integers these are the operations on numbers that they are on floats; others round or test.
_EXACT = _LAYOUT | frozenset("add sub neg mul max min reduce_sum reduce_max reduce_min".split())
_AFFINE = frozenset("add sub mul div neg max min".split())


def aware(rule: Callable) -> Callable:
    """The rule, after those for integers and truth values."""

    def apply(domain: Semantics, eqn: Equation, *inputs: Operand) -> Result:
        if not any(isinstance(v, Code) for v in inputs):
            return rule(domain, eqn, *inputs)
        if _all_codes(inputs) and not any(
            jnp.issubdtype(out.dtype, jnp.inexact) for out in eqn.outputs
        ):
            return _discrete(domain, eqn, inputs, rule)
        special = _SPECIAL.get(eqn.name)
        result = special(domain, eqn, *inputs) if special else None
        if result is not None:
            return result
        for value in inputs:
            if isinstance(value, Code) and not value.numeric:
                raise rounding(eqn)
        result = rule(domain, eqn, *inputs)
        return _two_valued(eqn, inputs, result) if isinstance(result, Paths) else result

    return apply


def _all_codes(inputs: Sequence[Operand]) -> bool:
    return all(isinstance(v, Code) for v in inputs if isinstance(v, Value))


def _discrete(
    domain: Semantics, eqn: Equation, inputs: Sequence[Operand], rule: Callable
) -> Result:
    """Integers and truth values computed from others."""
    results: Sequence[object] = [None] * len(eqn.outputs)
    if eqn.name in _EXACT and all(v.numeric for v in inputs if isinstance(v, Code)):
        try:
            result = rule(domain, eqn, *inputs)
            results = result if eqn.primitive.multiple_results else [result]
        except UnsupportedOperation:
            pass
    outs = []
    for found, out in zip(results, eqn.outputs, strict=True):
        if out.dtype == jnp.bool_ or not isinstance(found, Paths):
            rows, runs = _path_runs.ones(out.shape, domain.dtype)
            binary = out.dtype == jnp.bool_
            outs.append(Code(rows, None, runs, (0.0, 1.0) if binary else None, binary))
        else:
            levels = _levels(eqn, inputs)
            outs.append(Code(found.rows, found.multiples, found.runs, levels))
        outs[-1].columns = _columns(eqn, inputs)
    return outs if eqn.primitive.multiple_results else outs[0]


def _columns(eqn: Equation, inputs: Sequence[Operand]) -> tuple[Array | None, ...] | None:
    """The parts of an index vector that are constants; None in place of those read from x."""
    if eqn.name != "concatenate" or eqn.params["dimension"] != len(eqn.outputs[0].shape) - 1:
        return None
    columns: list[Array | None] = []
    for value, aval in zip(inputs, eqn.inputs, strict=True):
        if isinstance(value, Code):
            columns += value.columns or [None] * aval.shape[-1]
        else:
            columns += jnp.split(jnp.asarray(value), aval.shape[-1], axis=-1)
    return tuple(columns)


def _levels(eqn: Equation, inputs: Sequence[Operand]) -> tuple[float, float] | None:
    """The two numbers that an operation makes of a value that takes two; None if not provable."""
    codes = [v for v in inputs if isinstance(v, Code)]
    if any(v.levels is None for v in codes):
        return None
    if eqn.name in _LAYOUT:
        same = len(codes) == 1 and not any(np.ndim(v) for v in inputs if not isinstance(v, Value))
        same = same or len({v.levels for v in codes}) == len(codes) == 1
        return codes[0].levels if same and eqn.name != "pad" else None
    if eqn.name not in _AFFINE or len(codes) != 1 or not all(map(_uniform, inputs)):
        return None
    dtype = eqn.outputs[0].dtype

    def at(level: float) -> float:
        numbers = [level if isinstance(v, Value) else np.ravel(v)[0] for v in inputs]
        with jax.ensure_compile_time_eval():
            return float(eqn.bind(*(jnp.asarray(n, dtype) for n in numbers)))

    low, high = codes[0].levels  # type: ignore[misc]
    return at(low), at(high)


def _uniform(value: Operand) -> TypeGuard[Code | ArrayLike]:
    return isinstance(value, Code) or (is_concrete(value) and np.unique(value).size == 1)


def _two_valued(eqn: Equation, inputs: Sequence[Operand], result: Paths) -> Paths:
    """A float that takes two values is a gate still: masks are cast, or subtracted from 1."""
    levels = _levels(eqn, inputs) if _all_codes(inputs) else None
    return result if levels is None else Code(result.rows, result.multiples, result.runs, levels)


# --- where an integer or a truth value meets numbers --------------------------------------


def _convert(domain: Semantics, eqn: Equation, value: Code) -> Paths:
    if not value.numeric:
        raise rounding(eqn)
    if value.levels is None:
        return Paths(value.rows, multiples_of(value), runs=value.runs)
    return Code(value.rows, multiples_of(value), value.runs, value.levels)


def _mul(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Paths | None:
    """A gate with the slopes of a truth value."""
    if isinstance(left, Code) and isinstance(right, Code):
        if left.levels == right.levels == (0.0, 1.0):
            rows, runs = _path_runs.ones(eqn.outputs[0].shape, domain.dtype)
            return Code(rows, None, runs, left.levels)
        return None
    if isinstance(left, Code) and left.levels is not None:
        left, right = right, left
    if not isinstance(left, Paths) or not isinstance(right, Code) or right.levels is None:
        return None
    steepest = domain.power(np.max(np.abs(right.levels)))
    return Paths(scaled.multiply(left.rows, steepest), runs=left.runs)


def _select(domain: Semantics, eqn: Equation, which: Operand, *cases: Operand) -> Paths | None:
    """A gate, if what it selects are multiples of one value; else any case may be the one."""
    if not isinstance(which, Code):
        return None
    fixed = constants(cases)
    if fixed is not None:
        return _choice(domain, eqn, fixed)
    paths = [v for v in cases if isinstance(v, Paths)]
    shared = [
        key
        for key in (multiples_of(paths[0]) if paths else ())
        if all(key in multiples_of(v) for v in paths)
    ]
    if shared and all(isinstance(v, Paths) or is_zero(v) for v in cases):
        return gate(shared[0], paths)
    parts = [as_paths(domain, eqn, v).sums for v in cases if not is_zero(v)]
    return Paths(scaled.add(parts)) if len(parts) > 1 else Paths(parts[0])


def _choice(domain: Semantics, eqn: Equation, cases: Sequence[ArrayLike]) -> Code:
    """One of several constants: the first, or what must be added to it."""
    rows, runs = _path_runs.ones(eqn.outputs[0].shape, domain.dtype)
    concrete = [v for v in cases if is_concrete(v)]
    if len(concrete) < len(cases) or not all(np.isfinite(np.asarray(v)).all() for v in concrete):
        return Code(rows, None, runs, None, numeric=False)
    first, *others = (np.asarray(v, np.float64) for v in concrete)
    parts = [domain.power(first), *(domain.power(v - first) for v in others)]
    whole = [Scaled(jnp.broadcast_to(s.mantissa, eqn.outputs[0].shape), s.exponent) for s in parts]
    uniform = len(cases) == 2 and all(map(_uniform, cases))
    levels = (float(np.ravel(first)[0]), float(np.ravel(others[0])[0])) if uniform else None
    return Code(scaled.add(whole), None, None, levels)


def _lookup(
    domain: Semantics, eqn: Equation, operand: Paths | Weight | ArrayLike, index: Operand
) -> Paths | None:
    """Rows of an array read at positions from x: a path through each of them."""
    if not isinstance(index, Code):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    columns = index.columns or (None,) * len(numbers.start_index_map)
    shape = eqn.inputs[0].shape
    read = [d for d, c in zip(numbers.start_index_map, columns, strict=True) if c is None]
    if any(sizes[d] != 1 and shape[d] != sizes[d] for d in read):
        raise indexed(eqn)
    summed_axes = tuple(d for d in read if sizes[d] == 1)
    sums = operand.sums if isinstance(operand, Paths) else edge(domain, eqn, operand)
    total = scaled.summed(sums, summed_axes, keepdims=True)
    where = eqn.inputs[1]
    parts = [
        jnp.zeros((*where.shape[:-1], 1), where.dtype)
        if c is None
        else jnp.broadcast_to(c, (*where.shape[:-1], 1)).astype(where.dtype)
        for c in columns
    ]
    places = jnp.concatenate(parts, axis=-1)
    return Paths(exponents.rearranged(eqn, total, places, unique_indices=False))


def _slice(
    domain: Semantics, eqn: Equation, operand: Paths | Weight | ArrayLike, *starts: Operand
) -> Paths:
    """An element of an array read at a position from x, as `_lookup` does."""
    shape, sizes = eqn.inputs[0].shape, eqn.params["slice_sizes"]
    read = [axis for axis, start in enumerate(starts) if isinstance(start, Value)]
    if any(sizes[axis] not in (1, shape[axis]) for axis in read):
        raise indexed(eqn)
    sums = operand.sums if isinstance(operand, Paths) else edge(domain, eqn, operand)
    total = scaled.summed(sums, [axis for axis in read if sizes[axis] == 1], keepdims=True)
    places = [jnp.int32(0) if isinstance(start, Value) else start for start in starts]
    return Paths(scaled.moved(lambda a: lax.dynamic_slice(a, places, sizes), total))


def _written(domain: Semantics, eqn: Equation, *operands: Operand) -> NoReturn:
    raise indexed(eqn)


_SPECIAL: dict[str, Callable] = {
    "convert_element_type": _convert,
    "mul": _mul,
    "select_n": _select,
    "gather": _lookup,
    "dynamic_slice": _slice,
    **dict.fromkeys(("dynamic_update_slice", "scatter", "scatter-add"), _written),
}
