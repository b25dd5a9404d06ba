"""Scales that depend on an index which only the data know.

`w[i]` with an index i that the network computes reads one of E slices, and each may have a scale of
its own as long as whatever meets the result is read by the same index: the experts of a mixture
rescale one by one. Such a value is a list of scales, one for each value of the index. A rule runs
once per case, on operands of the same case. Where elements meet whose indices may differ, the cases
are required to have one scale, which can lose generators but never make a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Result, Value, is_concrete
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.values import Predicate, Root, Scale, Scaling, shape_of

# A value is taken apart into at most so many cases; beyond, they share one scale. Every case costs
# a pass through the rules.
MOST_CASES = 64


class Cases(Value):
    """`values[e]`, a value or a constant, where index number `index` is e.

    `axes` are the axes of the value that belong to the axes of the index: an element is in the case
    that the index has at its place on them. Without axes there is one index for all elements.
    """

    __slots__ = ("index", "axes", "values", "shape")

    def __init__(self, index: int, axes: tuple[int, ...], values: Sequence[Operand]):
        self.index, self.axes, self.values = index, axes, list(values)
        self.shape = shape_of(values[0])


def count(value: Operand) -> int:
    return sum(map(count, value.values)) if isinstance(value, Cases) else 1


def collected(
    domain: Scaling, index: int, axes: tuple[int, ...], values: Sequence[Operand]
) -> Operand:
    """The cases of a value; a plain value where they have one scale anyhow."""
    if any(isinstance(v, Value) for v in values):
        values = [v if isinstance(v, Value) else domain.scale(v) for v in values]
    elif all(map(is_concrete, values)):
        arrays = [np.asarray(v) for v in values if is_concrete(v)]
        if all(np.array_equal(a, arrays[0]) for a in arrays):
            return values[0]
    scales = [v for v in values if isinstance(v, Scale)]
    if len(scales) == len(values):
        alive = [v for v in scales if not v.all_absorbing]
        if not alive:
            return Scale(scales[0].shape, (), scales[0].absorbing)
        forms = [scaling.signature(scaling.tidy(domain.system, v.form)) for v in alive]
        if all(f == forms[0] for f in forms):
            return Scale(alive[0].shape, alive[0].form, _common(scales))
    found = Cases(index, axes, values)
    return found if count(found) <= MOST_CASES else domain.scale(found)


def _common(values: Sequence[Scale]) -> np.ndarray | None:
    """Elements that are absorbing in every case."""
    absorbing = values[0].absorbing
    for value in values[1:]:
        absorbing = (
            None if absorbing is None or value.absorbing is None else absorbing & value.absorbing
        )
    return absorbing


R = TypeVar("R", bound=Result)


def by_case(domain: Scaling, eqn: Equation, run: Callable[..., R], inputs: Sequence[Operand]) -> R:
    """The results of `run(*inputs)`, which has one output or a list of them, case by case."""
    found = {i: v for i, v in enumerate(inputs) if isinstance(v, Cases)}
    if not found:
        return run(*inputs)
    index = min(v.index for v in found.values())
    mine = {i: v for i, v in found.items() if v.index == index}
    places = [followed(eqn, i, v.axes) for i, v in mine.items()]
    axes = places[0]
    if axes is None or any(place != axes for place in places):
        plain = list(inputs)
        for i, value in mine.items():
            plain[i] = scale = domain.scale(value)
            scale.key = value.key
        return by_case(domain, eqn, run, plain)
    results = []
    for e in range(max(len(v.values) for v in mine.values())):
        chosen = [_case(mine[i], e) if i in mine else v for i, v in enumerate(inputs)]
        results.append(by_case(domain, eqn, run, chosen))
    several = [r for r in results if isinstance(r, list)]
    if several:
        joined = [collected(domain, index, axes, one) for one in zip(*several, strict=True)]
        return cast(R, joined)
    return cast(R, collected(domain, index, axes, cast("list[Operand]", results)))


def _case(value: Cases, e: int) -> Operand:
    """An index beyond the last case reads the last, as clipping does."""
    e = min(e, len(value.values) - 1)
    chosen = value.values[e]
    if isinstance(chosen, Value) and not hasattr(chosen, "key"):
        chosen.key = (value.key, e)
    return chosen


def root(value: Operand) -> Root:
    """Which index a value repeats: itself, unless it is known to be another that was moved."""
    if isinstance(value, (Scale, Predicate)) and value.root is not None:
        return value.root
    axes = tuple(a for a, n in enumerate(shape_of(value)) if n > 1)
    return Root(getattr(value, "key", object()), axes)


def note_root(eqn: Equation, operand: Operand, result: Result) -> None:
    """Follow an index or a truth value through the operations that only move it."""
    if eqn.name not in _MOVES or not isinstance(operand, (Scale, Predicate)):
        return
    if not isinstance(result, (Scale, Predicate)) or not hasattr(operand, "key"):
        return
    truth = jnp.issubdtype(eqn.inputs[0].dtype, jnp.bool_)
    if not truth and not jnp.issubdtype(eqn.inputs[0].dtype, jnp.integer):
        return
    if eqn.name == "convert_element_type" and not truth:
        return  # an integer that another type may not hold
    old = root(operand)
    axes = followed(eqn, 0, old.axes)
    if axes is not None:
        result.root = Root(old.key, axes)


# --- where the axes of an index go ----------------------------------------------------

_ELEMENTWISE = frozenset(
    "neg abs real imag conj square sqrt rsqrt cbrt integer_pow pow convert_element_type sign "
    "is_finite add sub add_any max min rem complex atan2 eq ne gt ge lt le not and or xor "
    "select_n clamp mul div reduce_precision".split()
)
_MOVES = frozenset(
    "broadcast_in_dim reshape transpose squeeze expand_dims convert_element_type".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin".split())


def followed(eqn: Equation, operand: int, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the axes of one operand are in the result; None where elements along them may meet."""
    if not axes:
        return ()
    shape, out = eqn.inputs[operand].shape, eqn.outputs[0].shape
    name, p = eqn.name, eqn.params
    if name in _ELEMENTWISE:
        same = len(shape) == len(out) and all(shape[a] == out[a] for a in axes)
        return axes if same else None
    if name in _REDUCTIONS:
        if set(axes) & set(p["axes"]):
            return None
        kept = [a for a in range(len(shape)) if a not in p["axes"]]
        return tuple(kept.index(a) for a in axes)
    if name == "broadcast_in_dim":
        return tuple(int(p["broadcast_dimensions"][a]) for a in axes)
    if name == "transpose":
        return tuple(list(p["permutation"]).index(a) for a in axes)
    if name in ("reshape", "squeeze", "expand_dims"):
        return _through_reshape(shape, out, axes)
    if name == "slice":
        return axes if all(shape[a] == out[a] for a in axes) else None
    if name == "concatenate":
        return axes if p["dimension"] not in axes else None
    if name == "dot_general":
        return _through_product(eqn, operand, axes)
    return None


def _through_reshape(
    old: Sequence[int], new: Sequence[int], axes: tuple[int, ...]
) -> tuple[int, ...] | None:
    found = []
    for a in axes:
        before = int(np.prod(old[:a]))
        same = [
            b for b, n in enumerate(new) if n == old[a] and int(np.prod(new[:b])) == before
        ]  # an axis of an index has more than one element, so at most one fits
        if not same:
            return None
        found.append(same[0])
    return tuple(found)


def _through_product(eqn: Equation, operand: int, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    contracted, batch = eqn.params["dimension_numbers"]
    free = [
        [a for a in range(len(aval.shape)) if a not in (*contracted[i], *batch[i])]
        for i, aval in enumerate(eqn.inputs)
    ]
    skip = len(batch[0]) + (len(free[0]) if operand else 0)
    place = {a: i for i, a in enumerate(batch[operand])}
    place |= {a: skip + i for i, a in enumerate(free[operand])}
    return tuple(place[a] for a in axes) if all(a in place for a in axes) else None
