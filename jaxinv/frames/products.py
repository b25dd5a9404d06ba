"""Frames through contractions: the two axes that meet are dual."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, rule_table
from jaxinv.frames.values import Axis, Block, Framed, Frames, level, like, refined, unify

RULES, rule = rule_table()


@rule("dot_general")
def _dot_general(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed:
    """Σ_k x_k y_k is left alone if y's frame is the dual of x's: (A x)·y + x·(−Aᵀ y) = 0."""
    x, y = (domain.plain(eqn, domain.framed(v)) for v in (left, right))
    (xk, yk), (xb, yb) = eqn.params["dimension_numbers"]
    shape = eqn.outputs[0].shape
    if x.zero or y.zero:  # the state before the first step of a loop
        result = Framed(shape, uniform=range(len(shape)))
        result.zero = result.constant = True
        return result
    for v, batch in ((x, xb), (y, yb)):
        for a in batch:
            domain.end(eqn, v.axes[a])
    xm = [a for a in range(len(x.shape)) if a not in (*xk, *xb)]
    ym = [a for a in range(len(y.shape)) if a not in (*yk, *yb)]
    for a, b in zip(xk, yk, strict=True):
        _contract(domain, eqn, (x, a, xb, xk, xm), (y, b, yb, yk, ym))
    result = Framed(shape)
    first = len(xb)
    for v, batch, own, gone, start in (
        (x, xb, xm, xk, first),
        (y, yb, ym, yk, first + len(xm)),
    ):
        places = {a: i for i, a in enumerate(batch)} | {a: start + i for i, a in enumerate(own)}
        kept = like(v, axes=[None if a in (*gone, *batch) else e for a, e in enumerate(v.axes)])
        part = domain.kept(eqn, kept, shape, places)
        for a in own:
            result.axes[places[a]] = part.axes[places[a]]
            if a in v.uniform:
                result.uniform |= {places[a]}
    return result


_Side = tuple[Framed, int, Sequence[int], Sequence[int], list[int]]


def _contract(domain: Frames, eqn: Equation, left: _Side, right: _Side) -> None:
    (x, a, *_), (y, b, *_) = left, right
    one, other = x.axes[a], y.axes[b]
    if one is None or other is None:
        for axis, constant, k in ((one, y, b), (other, x, a)):
            if axis is not None and k in constant.uniform:
                domain.fixes_ones(axis)  # a sum or a mean, written as a product
            else:
                domain.end(eqn, axis)
        return
    unify(domain.system, _arranged(domain, *left), _arranged(domain, *right), dual=True)


def _arranged(
    domain: Frames, v: Framed, axis: int, batch: Sequence[int], met: Sequence[int], own: list[int]
) -> list[Block]:
    """Refs by place along batch axes and contracted axes, which are those of the other operand."""
    out = []
    for size, refs in level(domain.system, v.axes[axis], own) or ():
        order = [*batch, *met, *own]
        shape = [refs.shape[a] for a in (*batch, *met)]
        # Its own axis is one block here and one there, so its length is 1 in both.
        out.append(Block(size, refs.transpose(order).reshape(shape)))
    return out


@rule("conv_general_dilated")
def _conv(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed | list[Framed]:
    """Channels meet as in a product; places of the kernel and of the image keep no frames."""
    x, w = (domain.plain(eqn, domain.framed(v)) for v in (left, right))
    n = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if groups != 1 or eqn.params["batch_group_count"] != 1:
        return _grouped(domain, eqn, x, w)
    (batch, channels, *space), (out, into, *taps) = n.lhs_spec, n.rhs_spec
    for a in (batch, *space):
        domain.end(eqn, x.axes[a])
    for a in taps:
        domain.end(eqn, w.axes[a])
    one, other = x.axes[channels], w.axes[into]
    if one is None or other is None:
        domain.end(eqn, one)
        domain.end(eqn, other)
    else:
        rest = [a for a in range(len(x.shape)) if a != channels]
        flat = _flat(level(domain.system, one, rest))
        unify(domain.system, flat, _flat(level(domain.system, other, [*taps, out])), dual=True)
    result = Framed(eqn.outputs[0].shape)
    axis = level(domain.system, w.axes[out], [*taps, into])
    if axis is not None:
        rank = len(result.shape)
        result.axes[n.out_spec[1]] = [Block(k, r.reshape([1] * rank)) for k, r in axis]
    return result


def _flat(axis: Axis) -> list[Block]:
    return [Block(size, refs.reshape(1)) for size, refs in axis or ()]


def _grouped(domain: Frames, eqn: Equation, x: Framed, w: Framed) -> Framed:
    """A convolution per group of channels, with the kernel of the outputs of that group."""
    n, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    result = Framed(eqn.outputs[0].shape)
    (batch, channels, *space), (out, into, *taps) = n.lhs_spec, n.rhs_spec
    for v, axes in ((x, (batch, *space)), (w, taps)):
        for a in axes:
            domain.end(eqn, v.axes[a])
    system, one, other = domain.system, x.axes[channels], w.axes[into]
    if one is None or other is None or eqn.params["batch_group_count"] != 1:
        domain.end(eqn, one)
        domain.end(eqn, other)
    else:
        size, outputs = w.shape[into], w.shape[out] // groups
        rest = [a for a in range(len(x.shape)) if a != channels]
        blocks = refined(system, level(system, one, rest) or (), range(size, size * groups, size))
        ends = np.cumsum([0] + [k for k, _ in blocks])
        for j in range(groups):
            mine = [
                b for b, end in zip(blocks, ends, strict=False) if j * size <= end < (j + 1) * size
            ]
            own = slice(j * outputs, (j + 1) * outputs)
            kernel = [
                Block(k, np.take(r, range(r.shape[out])[own], out) if r.shape[out] > 1 else r)
                for k, r in refined(system, other)
            ]
            unify(system, _flat(mine), _flat(level(system, kernel, [*taps, out])), dual=True)
    if eqn.params["batch_group_count"] != 1:
        domain.end(eqn, w.axes[out])
        return result
    axis = level(system, w.axes[out], [*taps, into])
    if axis is not None:
        step, rank = w.shape[out] // groups, len(result.shape)
        cut = refined(system, axis, range(step, step * groups, step))
        result.axes[n.out_spec[1]] = [Block(k, r.reshape([1] * rank)) for k, r in cut]
    return result
