"""The same frames for permutations: elementwise operations identify axes instead of ending them.

A permutation of an axis commutes with every elementwise function, sums of squares and means, and is
its own dual. So there are two kinds only, any permutation and none, and no gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from jaxinv._interpreter.walk import Equation, Operand, rule_table
from jaxinv.frames import layout, products
from jaxinv.frames.arithmetic import pooled
from jaxinv.frames.domain import FramesDomain
from jaxinv.frames.system import NONE, Kind, Ref, System, Vector
from jaxinv.frames.values import Axis, Block, Framed, Frames, level, like, unify

RULES, rule = rule_table()


class PermutationSystem(System):
    """Frames that are permutations: orthogonal, and they fix ones."""

    def restrict(self, ref: Ref, kind: Kind) -> None:
        """Only nothing at all is less than any permutation."""
        if kind == NONE:
            super().restrict(ref, kind)


def _together(domain: Frames, eqn: Equation, axes: Sequence[Axis]) -> Axis:
    """One permutation for all of these axes; none where one of them has none."""
    known = [axis for axis in axes if axis is not None]
    if len(known) < len(axes):
        for axis in known:
            domain.end(eqn, axis)
        return None
    for axis in known[1:]:
        unify(domain.system, known[0], axis)
    return max(known, key=lambda axis: max(b.refs.size for b in axis)) if known else None


@rule(
    *"add sub mul div max min pow rem atan2 nextafter select_n clamp add_any".split(),
    *"neg sign floor ceil round exp exp2 log log1p expm1 tanh logistic sin cos tan erf".split(),
    *"erfc erf_inv sqrt rsqrt cbrt abs square integer_pow is_finite convert_element_type".split(),
    *"reduce_precision gt lt ge le eq ne and or not xor asin acos atan sinh cosh".split(),
)
def _elementwise(domain: Frames, eqn: Equation, *operands: Operand) -> Framed:
    values = [domain.framed(v) for v in operands]
    shape = eqn.outputs[0].shape
    full = [v for v in values if v.shape]
    result = Framed(shape)
    for a in range(len(shape)):
        varying = [v for v in full if a not in v.uniform]
        result.axes[a] = _together(domain, eqn, [v.axes[a] for v in varying])
        if not varying:
            result.uniform |= {a}
    return result


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
def _reduce(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    """A sum over an axis does not see its order."""
    axes, rank = eqn.params["axes"], len(value.shape)
    kept = [a for a in range(rank) if a not in axes]
    result = Framed(eqn.outputs[0].shape)
    for new, a in enumerate(kept):
        axis = level(domain.system, value.axes[a], axes)
        if axis is not None:
            shape = [(b.size, b.refs.reshape([b.refs.shape[c] for c in kept])) for b in axis]
            result.axes[new] = [Block(*pair) for pair in shape]
        if a in value.uniform:
            result.uniform |= {new}
    return result


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _pooled(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    return pooled(domain, eqn, value)


@rule("dot_general")
def _dot_general(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed:
    """Batch axes of both operands go together; the rest is as for matrices."""
    x, y = domain.framed(left), domain.framed(right)
    _, (xb, yb) = eqn.params["dimension_numbers"]
    batch = []
    for a, b in zip(xb, yb, strict=True):
        one = level(domain.system, x.axes[a], [c for c in range(len(x.shape)) if c != a])
        other = level(domain.system, y.axes[b], [c for c in range(len(y.shape)) if c != b])
        batch.append(_together(domain, eqn, [_flat(one), _flat(other)]))
    without = [
        like(v, axes=[None if a in skip else e for a, e in enumerate(v.axes)])
        for v, skip in ((x, xb), (y, yb))
    ]
    result = cast(Framed, products.RULES[eqn.primitive](domain, eqn, *without))
    rank = len(result.shape)
    for i, axis in enumerate(batch):
        if axis is not None:
            result.axes[i] = [Block(n, refs.reshape([1] * rank)) for n, refs in axis]
    return result


def _flat(axis: Axis) -> Axis:
    return None if axis is None else [Block(n, refs.reshape(1)) for n, refs in axis]


@rule("conv_general_dilated")
def _conv(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Framed | list[Framed]:
    """A channel of its own for every kernel (depthwise) goes along with it."""
    x, w, n = domain.framed(left), domain.framed(right), eqn.params["dimension_numbers"]
    channels, out = n.lhs_spec[1], n.rhs_spec[0]
    groups = eqn.params["feature_group_count"]
    if groups == 1 or not groups == x.shape[channels] == w.shape[out]:
        return cast("Framed | list[Framed]", products.RULES[eqn.primitive](domain, eqn, x, w))
    for v, own in ((x, channels), (w, out)):
        for a, axis in enumerate(v.axes):
            if a != own:
                domain.end(eqn, axis)
    axes = [
        _flat(level(domain.system, v.axes[own], [a for a in range(len(v.shape)) if a != own]))
        for v, own in ((x, channels), (w, out))
    ]
    result = Framed(eqn.outputs[0].shape)
    found = _together(domain, eqn, axes)
    if found is not None:
        rank = len(result.shape)
        result.axes[n.out_spec[1]] = [Block(k, refs.reshape([1] * rank)) for k, refs in found]
    return result


class PermutationDomain(FramesDomain):
    """Which axes of the values of a program are permuted together."""

    rules = layout.RULES | products.RULES | RULES

    def __init__(self) -> None:
        super().__init__()
        self.system = PermutationSystem()

    def leaf(self, number: int, shape: Sequence[int], dead: frozenset[int]) -> Framed:
        """A leaf with one permutation per axis, wherever along the others."""
        value = Framed(shape, vector=(Vector(number, 0), 0) if len(shape) == 1 else None)
        value.leaf = number
        for axis, n in enumerate(shape):
            if n > 1 and axis not in dead:
                refs = self.system.new(n).reshape([1] * len(shape))
                value.axes[axis] = [Block(n, refs)]
        return value
