"""Experts chosen by an index that depends on the input: each keeps matrices of its own.

A row w[i] of a stack of weights, with i for each token, is one row of all: what is worked out with
it is what would be worked out with every expert, and then chosen. So these values are followed as
what all experts give, with an axis of experts in front, as long as the same index chooses. What
asks for their frames sees only those that all experts have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import jax
import numpy as np
from jax.lax import GatherScatterMode

from jaxinv._interpreter.equations import Primitive
from jaxinv._interpreter.walk import Equation, Operand, Rule, is_concrete, primitive
from jaxinv.frames.forms import Deferred, resolved
from jaxinv.frames.values import Axis, Block, Framed, Frames, level

# (domain, equation, rule of the operation, operands) -> a value; None: not of chosen experts
Choice = Callable[..., "Chosen | None"]
CHOICES: dict[Primitive, Choice] = {}


def choose(*names: str) -> Callable[[Choice], Choice]:
    """Enter a function into the table of what is worked out for all experts."""

    def register(function: Choice) -> Choice:
        found = [p for p in map(primitive, names) if p is not None]
        CHOICES.update(dict.fromkeys(found, function))
        return function

    return register


class Chosen(Deferred):
    """Element p of a value is element (index(p), p) of what all experts give."""

    __slots__ = ("all", "domain", "index", "where")

    def __init__(
        self, domain: Frames, every: Framed, index: Hashable, where: Sequence[int]
    ) -> None:
        super().__init__(every.shape[1:])
        self.domain, self.all, self.index = domain, every, index
        every.key = object()
        self.where = tuple(where)  # the axes of the index, among those of the value

    def frames(self) -> Framed:
        """The frames that all experts have in common."""
        axes: list[Axis] = []
        for axis in self.all.axes[1:]:
            common = level(self.domain.system, axis, [0])
            axes.append(common and [Block(n, refs[0]) for n, refs in common])
        return Framed(self.shape, axes, [a - 1 for a in self.all.uniform if a])


@choose("gather")
def _gather(
    domain: Frames, eqn: Equation, rule: Rule, table: Operand, index: Operand
) -> Chosen | None:
    """Whole rows of a table, one for each place of an index."""
    table, dims = resolved(table), eqn.params["dimension_numbers"]
    if not isinstance(table, Framed) or not isinstance(index, Framed) or index.framed:
        return None
    single = [a for a in dims.start_index_map if eqn.params["slice_sizes"][a] == 1]
    if getattr(dims, "operand_batching_dims", ()) or len(single) != 1 or not hasattr(index, "key"):
        return None
    (chosen,) = single
    rest = [a for a in range(len(table.shape)) if a != chosen]
    # A start along another axis, where it is given, is clipped to 0: the row is whole.
    whole = all(eqn.params["slice_sizes"][a] == table.shape[a] for a in rest)
    clipped = dims.start_index_map == (chosen,) or eqn.params["mode"] == GatherScatterMode.CLIP
    gone = dims.collapsed_slice_dims
    if not whole or not clipped or gone not in ((), (chosen,)) or not _differ(table, chosen, rest):
        return None
    domain.end(eqn, table.axes[chosen])
    shape = eqn.outputs[0].shape
    kept = [a for a in range(len(table.shape)) if a not in gone]
    places = dict(zip(kept, dims.offset_dims, strict=True))
    places.pop(chosen, None)
    free = [a for a in range(len(shape)) if a not in dims.offset_dims]
    every = Framed((table.shape[chosen], *shape), uniform=[1 + a for a in free])
    for a, place in places.items():
        every.axes[1 + place] = _spread(table.axes[a], chosen, places, len(shape))
    return Chosen(domain, every, index.key, free)


def _differ(table: Framed, chosen: int, rest: Sequence[int]) -> bool:
    """Whether frames depend on which row it is."""
    return any(b.refs.shape[chosen] > 1 for a in rest for b in table.axes[a] or [])


def _spread(axis: Axis, chosen: int, places: dict[int, int], rank: int) -> Axis:
    if axis is None:
        return None
    blocks = []
    for n, refs in axis:
        shape = [1] * (1 + rank)
        shape[0] = refs.shape[chosen]
        for a, place in places.items():
            shape[1 + place] = refs.shape[a]
        ordered = refs.transpose([chosen, *sorted(places, key=places.__getitem__)])
        blocks.append(Block(n, ordered.reshape(shape)))
    return blocks


def _first(operands: Sequence[Operand]) -> Chosen | None:
    """One of the operands that is chosen, if nothing has asked for its frames."""
    found = [v for v in operands if isinstance(v, Chosen) and v.found is None]
    return found[0] if found else None


def _of_all(domain: Frames, operand: Operand, experts: int) -> Framed:
    """A value as all experts see it."""
    if isinstance(operand, Chosen) and operand.found is None:
        return operand.all
    value = domain.framed(operand)
    axes = [a and [Block(n, refs[None]) for n, refs in a] for a in value.axes]
    vector = value.vector and (value.vector[0], value.vector[1] + 1)
    wide = Framed(
        (experts, *value.shape), [None, *axes], {0} | {a + 1 for a in value.uniform}, vector
    )
    wide.zero, wide.constant = value.zero, value.constant
    if value.square is not None:
        wide.square = _of_all(domain, value.square, experts)
    wide.key = ("all", value.key) if hasattr(value, "key") else object()
    return wide


def _wide(eqn: Equation, experts: int, **params: object) -> Equation:
    """The equation with an axis of experts in front of its results."""
    outputs = tuple(jax.ShapeDtypeStruct((experts, *a.shape), a.dtype) for a in eqn.outputs)
    return eqn._replace(params=eqn.params | params, outputs=outputs)


@choose("add", "sub", "mul", "div", "neg", "convert_element_type")
def _elementwise(domain: Frames, eqn: Equation, rule: Rule, *operands: Operand) -> Chosen | None:
    one = _first(operands)
    if one is None or any(
        isinstance(v, Chosen) and (v.index, v.where) != (one.index, one.where) for v in operands
    ):
        return None
    if any(
        np.shape(v) if is_concrete(v) else isinstance(v, Framed) and v.shape != one.shape
        for v in operands
    ):
        return None
    experts = one.all.shape[0]
    every = [v if is_concrete(v) else _of_all(domain, v, experts) for v in operands]
    result = rule(domain, _wide(eqn, experts), *every)
    if not isinstance(result, Framed) or result.square is not None:
        return None  # what squares are summed over is seen by all experts alike
    return Chosen(domain, result, one.index, one.where)


@choose("transpose")
def _transpose(domain: Frames, eqn: Equation, rule: Rule, value: Operand) -> Chosen | None:
    one = _first([value])
    if one is None:
        return None
    order = eqn.params["permutation"]
    wide = _wide(eqn, one.all.shape[0], permutation=(0, *(a + 1 for a in order)))
    result = rule(domain, wide, one.all)
    assert isinstance(result, Framed)
    return Chosen(domain, result, one.index, [order.index(a) for a in one.where])


@choose("squeeze")
def _squeeze(domain: Frames, eqn: Equation, rule: Rule, value: Operand) -> Chosen | None:
    one, gone = _first([value]), eqn.params["dimensions"]
    if one is None or set(gone) & set(one.where):
        return None
    wide = _wide(eqn, one.all.shape[0], dimensions=tuple(a + 1 for a in gone))
    result = rule(domain, wide, one.all)
    assert isinstance(result, Framed)
    left = [a for a in range(len(one.shape)) if a not in gone]
    return Chosen(domain, result, one.index, [left.index(a) for a in one.where])


@choose("dot_general")
def _dot_general(
    domain: Frames, eqn: Equation, rule: Rule, left: Operand, right: Operand
) -> Chosen | None:
    """Every expert by itself, if no sum runs over places that choose differently."""
    one = _first([left, right])
    if one is None:
        return None
    (xk, yk), (xb, yb) = eqn.params["dimension_numbers"]
    sides = [(left, xk, xb), (right, yk, yb)]
    places = []
    start = len(xb)
    for operand, met, batch in sides:
        own = [a for a in range(_rank(operand)) if a not in (*met, *batch)]
        place = {a: i for i, a in enumerate(batch)} | {a: start + i for i, a in enumerate(own)}
        start += len(own)
        if isinstance(operand, Chosen) and operand.found is None:
            if operand.index != one.index or set(operand.where) & set(met):
                return None
            places.append([place[a] for a in operand.where])
    if any(p != places[0] for p in places):
        return None
    experts = one.all.shape[0]
    ck, dk, cb, db = (tuple(a + 1 for a in side) for side in (xk, yk, xb, yb))
    wide = _wide(eqn, experts, dimension_numbers=((ck, dk), ((0, *cb), (0, *db))))
    result = rule(domain, wide, *(_of_all(domain, v, experts) for v in (left, right)))
    assert isinstance(result, Framed)
    return Chosen(domain, result, one.index, places[0])


def _rank(operand: Operand) -> int:
    return np.ndim(operand) if is_concrete(operand) else len(_shape(operand))


def _shape(operand: Operand) -> tuple[int, ...]:
    assert isinstance(operand, Framed)
    return operand.shape
