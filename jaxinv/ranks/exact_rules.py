"""Exact rules of what moves elements about, of sums, products and conversions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Operand, Value, constants, rule_table
from jaxinv.ranks import exact_values as exact
from jaxinv.ranks.exact_values import Exact, Exactly, lift, refuse
from jaxinv.typing import Array, ArrayLike

RULES, rule = rule_table()

Ints = np.ndarray


def _constants(eqn: Equation, inputs: Sequence[Operand]) -> list[ArrayLike]:
    found = constants(inputs)
    if found is None:
        raise refuse(eqn, "its indices are numbers that the parameters move smoothly.")
    return found


# --- moving elements --------------------------------------------------------------------


def _moved(
    bind: Callable[..., ArrayLike | list[Array]], eqn: Equation, arrays: Sequence[Operand]
) -> list[Exact]:
    """Let the operation move the positions of elements about, then fetch the elements."""
    values = [lift(eqn, v) for v in arrays]
    starts = np.cumsum([0, *(v.num.size for v in values)])
    indices = [
        jnp.asarray(exact.positions(v, int(s)).astype(np.int32))
        for v, s in zip(values, starts, strict=False)
    ]
    whole = values[0] if len(values) == 1 else exact.joined(values)
    return [exact.take(whole, _inside(eqn, i, whole)) for i in _as_list(bind(*indices))]


def _as_list(found: ArrayLike | list[Array]) -> list[ArrayLike]:
    return list(found) if isinstance(found, list | tuple) else [found]


def _inside(eqn: Equation, index: ArrayLike, whole: Exact) -> Ints:
    index = np.asarray(index).astype(np.int64)
    if index.size and (index.min() < 0 or index.max() >= whole.num.size):
        raise refuse(eqn, "an index is out of bounds, and the result no number.")
    return index


@rule("reshape", "squeeze", "expand_dims")
def _reshape(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    return exact.take(value, exact.positions(value).reshape(eqn.outputs[0].shape))


@rule("transpose")
def _transpose(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    return exact.take(value, exact.positions(value).transpose(eqn.params["permutation"]))


@rule("broadcast_in_dim")
def _broadcast(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    shape = [1] * len(eqn.outputs[0].shape)
    for axis, n in zip(eqn.params["broadcast_dimensions"], value.shape, strict=True):
        shape[axis] = n
    index = exact.positions(value).reshape(shape)
    return exact.take(value, np.broadcast_to(index, eqn.outputs[0].shape))


@rule("slice")
def _slice(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    names = ("start_indices", "limit_indices")
    steps = eqn.params["strides"] or [1] * len(value.shape)
    where = map(slice, *(eqn.params[name] for name in names), steps)
    return exact.take(value, exact.positions(value)[tuple(where)])


@rule("rev", "tile", "dynamic_slice", "split", "unstack")
def _relayout(domain: Exactly, eqn: Equation, value: Exact, *rest: Operand) -> Exact | list[Exact]:
    where = _constants(eqn, rest)
    found = _moved(lambda i: eqn.bind(i, *where), eqn, [value])
    return found if eqn.primitive.multiple_results else found[0]


@rule("gather")
def _gather(domain: Exactly, eqn: Equation, value: Exact, indices: Operand) -> Exact:
    (where,) = _constants(eqn, [indices])
    value = lift(eqn, value)
    return _moved(lambda i: eqn.bind(i, where, fill_value=-1), eqn, [value])[0]


@rule("concatenate", "stack", "pad")
def _assemble(domain: Exactly, eqn: Equation, *arrays: Operand) -> Exact:
    return _moved(eqn.bind, eqn, arrays)[0]


@rule("dynamic_update_slice")
def _update(
    domain: Exactly, eqn: Equation, operand: Operand, update: Operand, *starts: Operand
) -> Exact:
    where = _constants(eqn, starts)
    return _moved(lambda a, b: eqn.bind(a, b, *where), eqn, [operand, update])[0]


@rule("scatter")
def _scatter(
    domain: Exactly, eqn: Equation, operand: Operand, indices: Operand, updates: Operand
) -> Exact:
    (where,) = _constants(eqn, [indices])
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    how = {name: eqn.params[name] for name in names}
    return _moved(lambda a, u: lax.scatter(a, where, u, **how), eqn, [operand, updates])[0]


@rule("select_n")
def _select(domain: Exactly, eqn: Equation, which: Operand, *cases: Operand) -> Exact:
    (chosen,) = _constants(eqn, [which])
    picked = np.broadcast_to(np.asarray(chosen).astype(np.int64), eqn.outputs[0].shape)
    # What is not picked may be infinite or no number, as in where(mask, x, -inf).
    seen = [
        v if isinstance(v, Exact) else np.where(picked == i, np.asarray(v), 0)
        for i, v in enumerate(cases)
    ]
    return _moved(lambda *i: eqn.bind(jnp.asarray(chosen), *i), eqn, seen)[0]


# --- sums and products ------------------------------------------------------------------


def pair(eqn: Equation, left: Operand, right: Operand) -> list[Exact]:
    shape = eqn.outputs[0].shape
    return [exact.broadcast(lift(eqn, v), shape) for v in (left, right)]


@rule("add", "add_any")
def _add(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    return exact.add(*pair(eqn, left, right))


@rule("sub")
def _sub(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    left, right = pair(eqn, left, right)
    return exact.add(left, exact.negate(right))


@rule("mul")
def _mul(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    return exact.multiply(*pair(eqn, left, right))


@rule("div")
def _div(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    inverse = exact.reciprocal(eqn, lift(eqn, right))
    return exact.multiply(*pair(eqn, left, inverse))


@rule("neg")
def _neg(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    return exact.negate(value)


@rule("square")
def _square(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    return exact.multiply(value, value)


@rule("integer_pow")
def _integer_pow(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    return _power(eqn, value, eqn.params["y"])


@rule("pow")
def _pow(domain: Exactly, eqn: Equation, value: Exact, exponent: Operand) -> Exact:
    known = not isinstance(exponent, Value) and np.size(exponent) == 1
    whole = float(np.asarray(exponent).item()) if known else None
    if not isinstance(value, Exact) or whole is None or whole != int(whole):
        raise refuse(eqn, "its exponent is not one whole number.")
    return _power(eqn, value, int(whole))


def _power(eqn: Equation, value: Exact, y: int) -> Exact:
    if abs(y) > 64:
        raise refuse(eqn, "its exponent is above 64, and the integers grow too long.")
    if y < 0:
        return _power(eqn, exact.reciprocal(eqn, value), -y)
    out = lift(eqn, np.ones(value.shape))
    for _ in range(y):
        out = exact.multiply(out, value)
    return out


@rule("reduce_sum")
def _reduce_sum(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    axes = tuple(eqn.params["axes"])
    tangents = exact.summed_tangents(value, lambda t: t.sum(tuple(a + 1 for a in axes)))
    num = np.asarray(value.num.sum(axis=axes), object)
    return exact.reduced(num.reshape(eqn.outputs[0].shape), value.den, tangents)


@rule("cumsum")
def _cumsum(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]

    def along(array: Ints, axis: int) -> Ints:
        if reverse:
            return np.flip(np.cumsum(np.flip(array, axis), axis), axis)
        return np.cumsum(array, axis)

    tangents = exact.summed_tangents(value, lambda t: along(t, axis + 1))
    return exact.reduced(along(value.num, axis), value.den, tangents)


@rule("scatter_add")
def _scatter_add(
    domain: Exactly, eqn: Equation, operand: Operand, indices: Operand, updates: Operand
) -> Exact:
    """operand + a matrix of zeros and ones times the updates."""
    (where,) = _constants(eqn, [indices])
    operand, updates = lift(eqn, operand), lift(eqn, updates)
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    how = {name: eqn.params[name] for name in names}
    size = updates.num.size
    if size * operand.num.size > 1 << 24:
        raise refuse(eqn, "it is too large for exact arithmetic.")
    rows = [
        np.asarray(lax.scatter_add(jnp.zeros(operand.shape, jnp.int32), where, row, **how))
        for row in jnp.eye(size, dtype=jnp.int32).reshape(size, *updates.shape)
    ]
    matrix = lift(eqn, np.stack(rows).reshape(1, size, -1))
    flat = exact.take(updates, np.arange(size).reshape(1, 1, size))
    added = exact.contract(flat, matrix)
    return exact.add(operand, exact.take(added, exact.positions(operand)))


# --- contractions -----------------------------------------------------------------------


@rule("dot_general")
def _dot_general(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    domain.check_precision(eqn)
    left, right = lift(eqn, left), lift(eqn, right)

    def folded(value: Exact, first: Sequence[Sequence[int]], free_at: int) -> Exact:
        free = [a for a in range(len(value.shape)) if not any(a in f for f in first)]
        groups = list(first)
        groups.insert(free_at, free)
        sizes = [int(np.prod([value.shape[a] for a in group])) for group in groups]
        order = [a for group in groups for a in group]
        return exact.take(value, exact.positions(value).transpose(order).reshape(sizes))

    left = folded(left, (batch_l, contract_l), 1)
    out = exact.contract(left, folded(right, (batch_r, contract_r), 2))
    return exact.take(out, exact.positions(out).reshape(eqn.outputs[0].shape))


def _windows(
    index: Ints,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    base: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Ints:
    """(window elements, *places): positions in every window, -1 for padding."""
    for axis, (d, (low, high)) in enumerate(zip(base, padding, strict=True)):
        length = index.shape[axis]
        spread = max(0, (length - 1) * d + 1)
        shape = [*index.shape]
        shape[axis] = max(0, low) + spread + max(0, high)
        out = np.full(shape, -1, np.int64)
        where = [slice(None)] * index.ndim
        where[axis] = slice(max(0, low), max(0, low) + spread, d)
        out[tuple(where)] = index
        where[axis] = slice(max(0, -low), shape[axis] - max(0, -high))
        index = out[tuple(where)]
    span = [(k - 1) * d + 1 for k, d in zip(sizes, dilation, strict=True)]
    places = [max(0, (n - w) // s + 1) for n, w, s in zip(index.shape, span, strides, strict=True)]
    found = []
    for offset in product(*map(range, sizes)):
        starts = [o * d for o, d in zip(offset, dilation, strict=True)]
        found.append(
            index[tuple(
                slice(b, b + (n - 1) * s + 1, s) if n else slice(0, 0)
                for b, n, s in zip(starts, places, strides, strict=True)
            )]
        )  # fmt: skip
    return np.stack(found)


@rule("conv_general_dilated")
def _convolution(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    p = eqn.params
    domain.check_precision(eqn)
    if p["batch_group_count"] != 1:
        raise refuse(eqn, "its groups of examples (batch_group_count) have no exact rule.")
    left, right = lift(eqn, left), lift(eqn, right)
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    index = exact.positions(left).transpose(numbers.lhs_spec)  # (n, c, *space)
    kernel = exact.positions(right).transpose(numbers.rhs_spec)  # (o, c/groups, *space)
    (n, c), (o, _), space = index.shape[:2], kernel.shape[:2], kernel.shape[2:]
    patches = _windows(
        index,
        (1, 1, *space),
        (1, 1, *p["window_strides"]),
        (1, 1, *p["rhs_dilation"]),
        (1, 1, *p["lhs_dilation"]),
        ((0, 0), (0, 0), *p["padding"]),
    )
    (
        elements,
        *_,
    ) = patches.shape
    places = patches.shape[3:]
    patches = np.moveaxis(patches, (1, 2, 0), (0, -2, -1))  # (n, *places, c, elements)
    patches = patches.reshape(-1, groups, c // groups * elements).swapaxes(0, 1)
    kernel = kernel.reshape(groups, o // groups, -1).swapaxes(1, 2)
    out = exact.contract(exact.take(left, patches), exact.take(right, kernel))
    order = exact.positions(out).transpose(1, 0, 2).reshape(n, *places, o)
    order = np.moveaxis(order, -1, 1).transpose(np.argsort(numbers.out_spec))
    return exact.take(out, order)


def pool_windows(eqn: Equation, value: Exact) -> Ints:
    names = ("window_dimensions", "window_strides", "window_dilation", "base_dilation", "padding")
    return _windows(exact.positions(value), *(eqn.params[name] for name in names))


@rule("reduce_window_sum")
def _window_sum(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    patches = exact.take(value, pool_windows(eqn, value))
    tangents = exact.summed_tangents(patches, lambda t: t.sum(1))
    return exact.reduced(np.asarray(patches.num.sum(axis=0), object), value.den, tangents)


# --- precision --------------------------------------------------------------------------


@rule("stop_gradient")
def _stop_gradient(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    return Exact(value.num, value.den)


def signs(value: Exact) -> Ints:
    return (value.num > 0).astype(np.int64) - (value.num < 0).astype(np.int64)


@rule("convert_element_type")
def _convert(domain: Exactly, eqn: Equation, value: Exact) -> Exact | Array:
    target = jnp.dtype(eqn.params["new_dtype"])
    if jnp.issubdtype(target, jnp.floating):
        domain.check_precision(eqn)
        return Exact(value.num, value.den, value.tangents)
    if target == jnp.bool_:
        return jnp.asarray(value.num != 0)
    if not jnp.issubdtype(target, jnp.integer):
        raise refuse(eqn, f"it converts to {target}.")
    toward_zero = signs(value) * (abs(value.num) // value.den)
    limits = jnp.iinfo(target)
    if not all(int(limits.min) <= n <= int(limits.max) for n in toward_zero.ravel()):
        raise refuse(eqn, f"it converts numbers to {target} that are beyond its range.")
    return jnp.asarray(toward_zero.astype(np.int64), target)


@rule("reduce_precision")
def _reduce_precision(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    if eqn.params["mantissa_bits"] < jnp.finfo(eqn.inputs[0].dtype).nmant:
        raise refuse(eqn, "it rounds, and a rounded function is not piecewise polynomial.")
    return Exact(value.num, value.den, value.tangents)
