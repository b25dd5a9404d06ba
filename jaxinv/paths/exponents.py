"""Exponents of units, moved between path sums and |w|^p before a contraction.

A rescaled unit has sums with a large exponent and outgoing weights with a small one. Their products
are of the order of one: so the exponents of the rows of a weight are given to the sums, those of
its columns to the result, and what is multiplied and added has lost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._interpreter.walk import Equation
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.typing import Array, ArrayLike


class Moved(NamedTuple):
    """Mantissas to be contracted, and the exponent of the result."""

    data: Array
    weight: Array
    exponent: Array
    gauges: tuple[Array, Array]  # exponents of the weight by rows (contracted axes) and by columns
    separate: bool  # the weight's mantissas are those of its length
    plan: _Plan | None  # None where exponents are scalars and nothing was done


def rearranged(eqn: Equation, sums: Scaled, *rest: ArrayLike, **changed: object) -> Scaled:
    """The operation, which moves elements, on mantissas and exponents."""

    def bind(array: Array) -> Array:
        if eqn.name == "gather" and array.dtype == jnp.int32:
            return eqn.bind(array, *rest, **{**changed, "fill_value": 0})
        return eqn.bind(array, *rest, **changed)

    return scaled.moved(bind, sums)


def moved(
    eqn: Equation, sums: Scaled, length: Scaled, axes: tuple[int, ...] | None, weight_is_right: bool
) -> Moved:
    """Level the exponents of what is summed.

    `axes` are those of the weight along which its exponents are known to be a sum of vectors.
    """
    if not jnp.ndim(sums.exponent) and not jnp.ndim(length.exponent):
        zeros = jnp.zeros((), jnp.int32)
        exponent = sums.exponent + length.exponent
        return Moved(sums.mantissa, length.mantissa, exponent, (zeros, zeros), False, None)
    if eqn.name == "dot_general":
        plan = _dot(eqn, sums.mantissa.ndim, length.mantissa.ndim, weight_is_right)
    elif weight_is_right and eqn.params["batch_group_count"] == 1:
        plan = _convolution(eqn)
    else:
        sums, length = scaled.level(sums), scaled.level(length)
        return moved(eqn, sums, length, None, weight_is_right)
    exponent = length.exponent
    if not jnp.ndim(exponent):
        exponent = exponent.reshape((1,) * length.mantissa.ndim)
    named = {axis for axis, _ in (*plan.rows, *plan.columns)}
    separate = axes is not None and named.issuperset(axes)
    # Mantissas that stay as they are need not pass through a program.
    mantissa = None if separate else length.mantissa
    weight, gauges, data, result = _moved(sums, mantissa, exponent, plan)
    weight = length.mantissa if weight is None else weight
    return Moved(data, weight, result, gauges, separate, plan)


# A program for each shape of a layer. Outside of a caller's `jax.jit` every operation would be
# one, and for a small network it takes longer to compile those than everything else.
@partial(jax.jit, static_argnames="plan")
def _moved(
    sums: Scaled, mantissa: Array | None, exponent: Array, plan: _Plan
) -> tuple[Array | None, tuple[Array, Array], Array, Array]:
    """(weight, its exponents by rows and by columns, data, exponent of the result).

    Without the weight's mantissas its exponents are known to be a sum of vectors.
    """
    weight, rows, columns = _gauges(mantissa, exponent, plan)
    shape = sums.mantissa.shape
    given = _placed(rows, plan.rows, len(shape))
    if plan.groups > 1 and given.shape[plan.channel] > 1:
        given = jnp.concatenate([given] * plan.groups, plan.channel)
    data, top = _leveled(
        Scaled(sums.mantissa, jnp.broadcast_to(sums.exponent + given, shape)), plan
    )
    result = _placed(top, plan.kept, plan.rank)
    if plan.groups > 1:
        result = jnp.repeat(result, plan.copies, dict(plan.kept)[plan.channel])
    result = result + _placed(columns, plan.columns, plan.rank)
    return weight, (rows, columns), data, result


AxisMap = tuple[tuple[int, int], ...]  # (axis of an operand, axis elsewhere), ...


class _Plan(NamedTuple):
    """Where the axes of the operands go."""

    rows: AxisMap  # of the weight, contracted -> axis of the data
    columns: AxisMap  # of the weight, kept -> axis of the result
    kept: AxisMap  # of the data -> axis of the result
    summed: tuple[int, ...]  # axes of the data along which exponents become equal
    channel: int  # the axis of the data that is cut into groups
    groups: int
    copies: int  # how many features of the result share a group
    rank: int


def _dot(eqn: Equation, data_rank: int, weight_rank: int, weight_is_right: bool) -> _Plan:
    contracting, batch = eqn.params["dimension_numbers"]
    order = 1 if weight_is_right else -1
    (dc, wc), (db, wb) = contracting[::order], batch[::order]
    data_free = [a for a in range(data_rank) if a not in (*dc, *db)]
    weight_free = [a for a in range(weight_rank) if a not in (*wc, *wb)]
    first, second = (data_free, weight_free) if weight_is_right else (weight_free, data_free)
    start = {id(first): len(db), id(second): len(db) + len(first)}
    kept = {a: i for i, a in enumerate(db)}
    kept |= {a: start[id(data_free)] + i for i, a in enumerate(data_free)}
    columns = {a: i for i, a in enumerate(wb)}
    columns |= {a: start[id(weight_free)] + i for i, a in enumerate(weight_free)}
    rows, rank = tuple(zip(wc, dc, strict=True)), len(eqn.outputs[0].shape)
    return _Plan(rows, tuple(columns.items()), tuple(kept.items()), tuple(dc), 0, 1, 1, rank)


def _convolution(eqn: Equation) -> _Plan:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    channel, (outputs, inputs) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
    rank, features = len(numbers.out_spec), numbers.out_spec[1]
    copies = eqn.inputs[1].shape[outputs] // groups
    rows, columns, kept = ((inputs, channel),), ((outputs, features),), ((channel, features),)
    return _Plan(rows, columns, kept, tuple(range(rank)), channel, groups, copies, rank)


def _gauges(
    mantissa: Array | None, exponent: Array, plan: _Plan
) -> tuple[Array | None, Array, Array]:
    """(mantissas, exponents by rows, by columns)."""
    not_rows = _all_but(plan.rows, exponent.ndim)
    not_columns = _all_but(plan.columns, exponent.ndim)
    if mantissa is None:
        rows, columns = _at_first(exponent, not_rows), _at_first(exponent, not_columns)
        return None, rows, columns - _at_first(exponent, range(exponent.ndim))
    found = jnp.where(mantissa != 0, exponent, scaled.NONE)
    rows = _known(jnp.max(found, not_rows, keepdims=True))
    found = jnp.where(mantissa != 0, exponent - rows, scaled.NONE)
    columns = _known(jnp.max(found, not_columns, keepdims=True))
    shift = lax.min(exponent - rows - columns, jnp.int32(126))
    return scaled.shift(mantissa, shift), rows, columns


def _all_but(axes: AxisMap, rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in dict(axes))


def _known(exponent: Array) -> Array:
    return jnp.where(exponent > scaled.NONE // 2, exponent, 0)


def _at_first(exponent: Array, axes: Sequence[int]) -> Array:
    for axis in axes:
        exponent = lax.slice_in_dim(exponent, 0, 1, axis=axis)
    return exponent


def _placed(exponent: Array, axes: AxisMap, rank: int) -> Array:
    """Exponents with their axes moved to others; all other axes have length 1."""
    order = sorted(axes, key=lambda pair: pair[1])
    rest = _all_but(axes, exponent.ndim)
    permutation = (*rest, *(axis for axis, _ in order))
    kept = lax.squeeze(lax.transpose(exponent, permutation), range(len(rest)))
    places = [place for _, place in order]
    return lax.expand_dims(kept, [axis for axis in range(rank) if axis not in places])


def _leveled(s: Scaled, plan: _Plan) -> Scaled:
    """Over equal exponents along the axes that are summed, in each group of channels apart."""
    if plan.groups == 1:
        return scaled.level(s, plan.summed)
    apart = [jnp.moveaxis(a, plan.channel, -1) for a in s]
    shape = apart[0].shape
    split = [a.reshape(*shape[:-1], plan.groups, -1) for a in apart]
    along = [axis for axis in range(len(shape) + 1) if axis != len(shape) - 1]
    mantissa, top = scaled.level(Scaled(*split), along)
    mantissa = jnp.moveaxis(mantissa.reshape(shape), -1, plan.channel)
    others = [axis for axis in range(len(shape)) if axis != plan.channel]
    return Scaled(mantissa, lax.expand_dims(top.reshape(-1), others))


def checked(mantissa: Array, sums: Scaled, value: Array, part: Moved, sample: bool) -> Scaled:
    """The contraction, normalised, with NaN in place of sums all of whose terms were too small.

    That takes weights of one array that span more than a power of two for each row and column can
    bring together. A column of zeros has no terms. With `sample` only some rows of a large weight
    are looked at to tell.
    """
    assert part.plan is not None
    result = Scaled(mantissa, part.exponent)
    return _checked(result, sums.mantissa, part.data, value, part.plan, sample)


@partial(jax.jit, static_argnames=("plan", "sample"))
def _checked(
    result: Scaled, before: Array, data: Array, value: Array, plan: _Plan, sample: bool
) -> Scaled:
    mantissa, exponent = result
    terms = max(1, value.size // max(1, mantissa.size))
    small = mantissa < jnp.finfo(mantissa.dtype).tiny * 2.0**16 * terms
    vanished = jnp.any((data == 0) & (before != 0))
    others = _all_but(plan.columns, value.ndim)
    grid = [
        slice(None, None, max(1, n // 16) if sample and a in others else 1)
        for a, n in enumerate(value.shape)
    ]
    # The largest, for XLA stores the outcomes of comparisons.
    filled = jnp.max(abs(value[tuple(grid)]), others, initial=0, keepdims=True) > 0
    lost = small & ((mantissa > 0) | vanished & _placed(filled, plan.columns, plan.rank))
    known = jnp.where(lax.stop_gradient(lost), jnp.nan, mantissa)
    return scaled.normalize(Scaled(known, exponent))
