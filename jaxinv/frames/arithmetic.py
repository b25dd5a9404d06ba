"""Frames through sums, products with gains, and sums of squares."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, rule_table
from jaxinv.frames.system import O, Ref, Relation, Vector
from jaxinv.frames.values import (
    Axis,
    Block,
    Framed,
    Frames,
    each,
    level,
    like,
    matched,
    refined,
    unify,
)

RULES, rule = rule_table()


@rule("neg", "reduce_precision", "convert_element_type")
def _same(domain: Frames, eqn: Equation, operand: Framed) -> Framed | list[Framed]:
    if not jnp.issubdtype(eqn.outputs[0].dtype, jnp.inexact):
        return domain.default(eqn, operand)
    return like(operand)


@rule("add", "sub", "add_any")
def _add(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed:
    """Both terms have one frame; one number added to all of an axis leaves ones alone."""
    x, y = domain.framed(left), domain.framed(right)
    shape = eqn.outputs[0].shape
    for one, other in ((x, y), (y, x)):
        if other.zero and one.shape == shape:
            return like(one)
    x, y = (_spread(domain.plain(eqn, v), shape) for v in (x, y))
    result = Framed(shape, uniform=x.uniform & y.uniform)
    for a in range(len(shape)):
        result.axes[a] = _sum(domain, eqn, x, y, a)
    return result


def _spread(value: Framed, shape: tuple[int, ...]) -> Framed:
    """A scalar, or an array with axes of length one, as an array of the full shape."""
    if value.shape == shape:
        return value
    if not value.shape:
        return Framed(shape, uniform=range(len(shape)))
    return Framed(shape, value.axes, value.uniform, value.vector)


def _sum(domain: Frames, eqn: Equation, x: Framed, y: Framed, a: int) -> Axis:
    one, other = x.axes[a], y.axes[a]
    if one is None and other is None:
        return None
    if one is not None and other is not None:
        unify(domain.system, one, other)
        one, other = matched(domain.system, one, other)
        return max((one, other), key=lambda axis: axis[0].refs.size)
    axis, constant = (one, y) if other is None else (other, x)
    if a in constant.uniform:
        domain.fixes_ones(axis)
        return axis
    if axis is not None and constant.vector is not None and constant.vector[1] == a:
        # A number times a gain, as β − μγ/σ: what is left of the gain is a number added to all.
        domain.fixes_ones(domain.multiplied(axis, constant.vector[0], -1))
        return axis
    domain.end(eqn, axis)
    return None


@rule("mul")
def _mul(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed:
    x, y = domain.framed(left), domain.framed(right)
    if isinstance(left, Framed) and isinstance(right, Framed) and left.key == right.key:
        return _squared(domain, eqn, x)
    return _product(domain, eqn, x, y, 1)


@rule("div")
def _div(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed:
    return _product(domain, eqn, domain.framed(left), domain.framed(right), -1)


@rule("square")
def _square(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    return _squared(domain, eqn, value)


@rule("integer_pow")
def _integer_pow(domain: Frames, eqn: Equation, value: Framed) -> Framed | list[Framed]:
    return _squared(domain, eqn, value) if eqn.params["y"] == 2 else domain.default(eqn, value)


def _squared(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    value = domain.plain(eqn, value)
    result = Framed(value.shape, uniform=value.uniform)
    if value.framed:
        result.square = value
    return result


def _product(domain: Frames, eqn: Equation, x: Framed, y: Framed, power: int) -> Framed:
    """x·y or x/y, where one of them is a number, or a gain along an axis of the other."""
    shape = eqn.outputs[0].shape
    if y.is_scalar and x.shape == shape:
        return like(x)  # its square too: the sum of squares is only scaled
    if x.is_scalar and y.shape == shape and power == 1:
        return like(y)
    x, y = domain.plain(eqn, x), domain.plain(eqn, y)
    if power == -1:
        domain.end_all(eqn, y)
        y = like(y, axes=[None] * len(y.shape))
    x, y = (_spread(v, shape) for v in (x, y))
    result = Framed(shape, uniform=x.uniform & y.uniform)
    for a in range(len(shape)):
        result.axes[a] = _scaled(domain, eqn, x, y, a, power)
    result.vector = _proportional(x, y) or (_proportional(y, x) if power == 1 else None)
    return result


def _proportional(x: Framed, y: Framed) -> tuple[Vector, int] | None:
    """The gain that x is, if y is one number for all of its axis: γ · 1/√(variance + ε)."""
    if x.vector is None or y.vector is not None:
        return None
    axis = x.vector[1]
    return x.vector if axis in y.uniform and y.axes[axis] is None else None


def _scaled(domain: Frames, eqn: Equation, x: Framed, y: Framed, a: int, power: int) -> Axis:
    one, other = x.axes[a], y.axes[a]
    if one is None and other is None:
        return None
    for value, factor, sign in ((x, y, power), (y, x, 1)):
        axis = value.axes[a]
        if axis is None:
            continue
        if factor.axes[a] is None and a in factor.uniform:
            return axis
        if factor.vector and factor.vector[1] == a and value.vector is None:
            domain.end(eqn, factor.axes[a])
            domain.gains.add(factor.vector[0].source)
            return domain.multiplied(axis, factor.vector[0], sign)
    domain.end(eqn, one)
    domain.end(eqn, other)
    return None


@rule("reduce_sum")
def _reduce_sum(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    axes = eqn.params["axes"]
    shape = eqn.outputs[0].shape
    kept = [a for a in range(len(value.shape)) if a not in axes]
    square = value.square
    if square is not None:
        for a, axis in enumerate(square.axes):
            if list(axes) == [a]:
                domain.restrict(axis, O)
            else:
                domain.end(eqn, axis)
        return Framed(shape, uniform=[kept.index(a) for a in kept if a in value.uniform])
    for a in axes:
        domain.fixes_ones(value.axes[a])
    summed = like(value, axes=[None if a in axes else e for a, e in enumerate(value.axes)])
    return domain.kept(eqn, summed, shape, {a: i for i, a in enumerate(kept)})


@rule("reduce_window_sum")
def _pooled(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    """A sum over windows is linear: axes along which a window holds one place keep their frames."""
    return pooled(domain, eqn, domain.plain(eqn, value))


def pooled(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    """The frames of axes along which windows hold one place and nothing is padded."""
    kept = [
        a
        for a, (n, before, after) in enumerate(
            zip(eqn.params["window_dimensions"], value.shape, eqn.outputs[0].shape, strict=True)
        )
        if n == 1 and before == after
    ]
    for a, axis in enumerate(value.axes):
        if a not in kept:
            domain.end(eqn, axis)
    free = like(value, axes=[e if a in kept else None for a, e in enumerate(value.axes)])
    result: Framed = domain.kept(eqn, free, free.shape, {a: a for a in range(len(free.shape))})
    pool = Framed(eqn.outputs[0].shape, uniform=[a for a in kept if a in value.uniform])
    for a in kept:
        axis = level(domain.system, result.axes[a], [b for b in range(len(free.shape)) if b != a])
        pool.axes[a] = axis
    return pool


@rule("select_n")
def _select(domain: Frames, eqn: Equation, which: Operand, *cases: Operand) -> Framed:
    """Along an axis where the choice is one for all, cases are what a sum of them would be."""
    chosen = domain.framed(which)
    domain.end_all(eqn, chosen)
    values = [like(domain.plain(eqn, domain.framed(v))) for v in cases]
    shape = eqn.outputs[0].shape
    for value in values:
        for a, axis in enumerate(value.axes):
            if chosen.shape and a not in chosen.uniform:
                domain.end(eqn, axis)
                value.axes[a] = None
    result = values[0]
    for value in values[1:]:
        if value.zero or result.zero:
            result = like(result if value.zero else value, zero=False, uniform=frozenset())
            continue
        total = Framed(shape, uniform=result.uniform & value.uniform & chosen.uniform)
        for a in range(len(shape)):
            total.axes[a] = _sum(domain, eqn, result, value, a)
        result = total
    return result


@rule("rev")
def _rev(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    """Reversed, an axis has the frames P·A·Pᵀ of its blocks, in reversed order."""
    value = domain.plain(eqn, value)
    reversed_axes = set(eqn.params["dimensions"])
    axes: list[Axis] = []
    for a, axis in enumerate(value.axes):
        if axis is not None:
            flip = tuple(b for b in reversed_axes if b != a)
            blocks = [Block(n, np.flip(refs, flip)) for n, refs in refined(domain.system, axis)]
            axis = [_reversed(domain, b) for b in blocks[::-1]] if a in reversed_axes else blocks
        axes.append(axis)
    vector = None if value.vector and value.vector[1] in reversed_axes else value.vector
    return like(value, axes=axes, vector=vector)


def _reversed(domain: Frames, block: Block) -> Block:
    size, system = block.size, domain.system
    turn = Relation(turn=tuple(range(size))[::-1] if size > 1 else ())

    def turned(number: int) -> int:
        ref = system.ref(number)
        return system.number(Ref(ref.frame, turn.of(ref.relation)))

    return Block(size, each(block.refs, turned))
