"""Scaling rules of reading and writing at indices."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Operand, Result, Value, is_concrete, rule_table
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.cases import MOST_CASES, collected
from jaxinv.rescaling.layout import by_binding
from jaxinv.rescaling.values import Fresh, Scale, Scaling, Step, relaid
from jaxinv.typing import Constant

RULES, rule = rule_table()


@rule("gather", "dynamic_slice")
def _gather(domain: Scaling, eqn: Equation, value: Operand, *index: Operand) -> Result:
    """Constant indices move elements; by others, every place that they may say is a case."""
    value = domain.refresh(value)
    for i in index:
        if isinstance(i, Value):
            domain.pin(eqn, i)
    starts = _starts(eqn, index)
    if _fills_with_numbers(eqn) and any(n > 1 for n in starts.counts):
        domain.pin(eqn, value)
    if not starts.unknown:
        part = _whole_part(domain, eqn, value, starts, 0)
        return part or _moved(domain, eqn, domain.scale(value), starts, 0)
    cases = starts.cases
    if starts.key is not None and cases <= MOST_CASES:
        values = [
            _whole_part(domain, eqn, value, starts, e)
            or _moved(domain, eqn, domain.scale(value), starts, e)
            for e in range(cases)
        ]
        return collected(domain, domain.index_number(starts.key), starts.axes, values)
    return _moved(domain, eqn, domain.level(value, starts.unknown), starts, 0)


class _Starts(NamedTuple):
    """Where the slices may begin that a gather reads."""

    counts: list[int]  # per axis of the operand
    unknown: list[int]  # axes with several beginnings, which the data choose between
    key: Hashable  # equal keys, the same choice; None where it cannot be told
    axes: tuple[int, ...]  # axes of the result along which the choice may vary
    indices: tuple[Constant, ...]  # 0 for those that the data know
    place: dict[int, int]  # which index, or which component of it, an axis has

    @property
    def cases(self) -> int:
        return int(np.prod([self.counts[a] for a in self.unknown]))

    def at(self, case: int) -> dict[int, int]:
        """The beginning on every unknown axis."""
        found = np.unravel_index(case, [self.counts[a] for a in self.unknown])
        return {a: int(i) for a, i in zip(self.unknown, found, strict=True)}


def _starts(eqn: Equation, index: Sequence[Operand]) -> _Starts:
    shape, sizes = eqn.inputs[0].shape, eqn.params["slice_sizes"]
    counts = [n - m + 1 for n, m in zip(shape, sizes, strict=True)]
    zeros = tuple(
        cast(Constant, i) if is_concrete(i) else np.zeros(a.shape, a.dtype)
        for i, a in zip(index, eqn.inputs[1:], strict=True)
    )
    if eqn.name == "dynamic_slice":
        place = {a: a for a in range(len(shape))}
        unknown = [a for a, n in enumerate(counts) if n > 1 and not is_concrete(index[a])]
        names = tuple(_name(index[a]) for a in unknown)
        return _Starts(counts, unknown, _key(names, unknown, counts), (), zeros, place)
    numbers = eqn.params["dimension_numbers"]
    place = {int(a): c for c, a in enumerate(numbers.start_index_map)}
    unknown = [] if is_concrete(index[0]) else sorted(a for a in place if counts[a] > 1)
    name = _name(index[0])
    names = tuple(None if name is None else (name, place[a]) for a in unknown)
    outer = [a for a in range(len(eqn.outputs[0].shape)) if a not in numbers.offset_dims]
    axes = tuple(a for a in outer if eqn.outputs[0].shape[a] > 1)
    return _Starts(counts, unknown, _key(names, unknown, counts), axes, zeros, place)


def _key(names: tuple[Hashable, ...], unknown: list[int], counts: list[int]) -> Hashable:
    """One index is clipped to the length of what it reads, so the shorter has the first cases of
    the longer; two are numbered together, which depends on the lengths."""
    if None in names:
        return None
    return names if len(names) == 1 else (names, tuple(counts[a] for a in unknown))


def _name(index: Operand) -> Hashable:
    return index.key if isinstance(index, Value) and hasattr(index, "key") else None


def _fills_with_numbers(eqn: Equation) -> bool:
    """Whether indices out of bounds read a number that has a scale: neither 0 nor NaN nor ∞."""
    fill = eqn.params.get("fill_value")
    return fill is not None and bool(np.isfinite(fill)) and fill != 0


def _index(eqn: Equation, starts: _Starts, at: dict[int, int]) -> list[Constant]:
    """The operands that say where to begin, with numbers for the unknown ones."""
    index = [np.array(i) if starts.unknown else i for i in starts.indices]
    for a, start in at.items():
        if eqn.name == "dynamic_slice":
            index[a] = np.asarray(start, index[a].dtype)
        else:
            index[0][..., starts.place[a]] = start
    return index


def _moved(domain: Scaling, eqn: Equation, scale: Scale, starts: _Starts, case: int) -> Scale:
    """What is read when the unknown indices have the values of a case."""
    full, sizes = eqn.inputs[0].shape, eqn.params["slice_sizes"]
    at = starts.at(case)
    fill = {"fill_value": -1} if "fill_value" in eqn.params else {}

    def move(array: np.ndarray) -> np.ndarray:
        # Axes along which nothing varies stay short, unless a known index may fall outside.
        whole = [a for a, n in enumerate(array.shape) if n == 1 and sizes[a] == full[a]]
        short = [a for a, n in enumerate(array.shape) if n == 1 and a in at and a not in whole]
        operand = [
            1 if a in whole else sizes[a] if a in short else full[a] for a in range(len(full))
        ]
        index = _index(eqn, starts, at | dict.fromkeys(short, 0))
        taken = tuple(1 if a in whole else n for a, n in enumerate(sizes))
        return by_binding(eqn, np.broadcast_to(array, operand), *index, slice_sizes=taken, **fill)

    def ids(array: np.ndarray) -> np.ndarray:
        return np.maximum(move(array), 0).astype(np.int64)

    form = scaling.tidy(domain.system, relaid(scale.form, ids))
    outside = move(np.ones((1,) * len(full), np.int64)) != 1
    absorbing = np.zeros_like(outside) if _fills_with_numbers(eqn) else outside
    if scale.absorbing is not None:
        absorbing = absorbing | (move(scale.absorbing.astype(np.int64)) == 1)
    return Scale(eqn.outputs[0].shape, form, absorbing)


def _whole_part(
    domain: Scaling, eqn: Equation, value: Operand, starts: _Starts, case: int
) -> Fresh | None:
    """`stacked[i]`: one whole slice of an undecided parameter, which stays undecided."""
    indexed = [a for a, n in enumerate(starts.counts) if n > 1]
    if not isinstance(value, Fresh) or len(indexed) != 1:
        return None
    (axis,) = indexed
    sizes, out = eqn.params["slice_sizes"], eqn.outputs[0].shape
    if sizes[axis] != 1:
        return None
    if starts.unknown:
        at = starts.at(case)[axis]
    elif eqn.name == "dynamic_slice":
        at = int(np.asarray(starts.indices[axis]))
    elif np.size(starts.indices[0]) == 1:
        at = int(np.asarray(starts.indices[0]).reshape(()))
    else:
        return None
    inside = 0 <= at < value.shape[axis]
    if not inside and eqn.name == "gather":
        return None
    part = domain.part(value, axis, min(max(at, 0), value.shape[axis] - 1))
    if part is None or part.shape == out:
        return part
    return _spread(part, eqn, axis)


def _spread(part: Fresh, eqn: Equation, axis: int) -> Fresh | None:
    """A slice in the shape of the result, where it may be repeated along the axes of the index."""
    numbers, out = eqn.params["dimension_numbers"], eqn.outputs[0].shape
    if tuple(numbers.collapsed_slice_dims) not in ((), (axis,)):
        return None
    if getattr(numbers, "operand_batching_dims", ()):
        return None
    kept = [a for a in range(len(part.shape)) if a not in numbers.collapsed_slice_dims]
    target = dict(zip(kept, map(int, numbers.offset_dims), strict=True))
    compact = [1] * len(out)
    for a, b in target.items():
        compact[b] = part.shape[a]

    def push(ids: np.ndarray) -> np.ndarray:
        lengths = [1] * len(out)
        for a, b in target.items():
            lengths[b] = ids.shape[a]
        return ids.reshape(lengths)

    def pull(ids: np.ndarray) -> np.ndarray:
        lengths = [1] * len(part.shape)
        for a, b in target.items():
            lengths[a] = ids.shape[b]
        return ids.reshape(lengths)

    step = Step(lambda f: relaid(f, push), lambda f: relaid(f, pull))
    return part.through(out, step, compact)


@rule("dynamic_update_slice")
def _update_slice(
    domain: Scaling, eqn: Equation, operand: Operand, update: Operand, *index: Operand
) -> Result:
    a, b = domain.scale(operand), domain.scale(update)
    shape = eqn.outputs[0].shape
    axes = [i for i, n in enumerate(b.shape) if n != shape[i]]
    if all(not isinstance(i, Value) and is_concrete(i) for i in index):
        starts = [
            min(max(int(np.asarray(i)), 0), n - m)
            for i, n, m in zip(index, shape, b.shape, strict=True)
        ]

        def place(array: np.ndarray) -> np.ndarray:
            target = [
                m if i in axes else n
                for i, (n, m) in enumerate(zip(array.shape, b.shape, strict=True))
            ]
            widths = [
                (starts[i], n - starts[i] - m) if i in axes else (0, 0)
                for i, (n, m) in enumerate(zip(shape, b.shape, strict=True))
            ]
            return np.pad(np.broadcast_to(array, target), widths)

        inside = place(np.ones((1,) * len(shape), bool))
        form = scaling.assemble([(place, b.form), scaling.masked(~inside, a.form)])
        none = np.zeros((1,) * len(shape), bool)
        absorbing = (none if b.absorbing is None else place(b.absorbing)) | (
            none if a.absorbing is None else a.absorbing & ~inside
        )
        return Scale(shape, scaling.tidy(domain.system, form), absorbing)
    for i in index:
        if isinstance(i, Value):
            domain.pin(eqn, i)
    levelled = [domain.level(v, axes) for v in (a, b)]
    parts = [
        Scale([1 if i in axes else n for i, n in enumerate(shape)], v.form, v.absorbing)
        for v in levelled
    ]
    joined = scaling.join(domain.system, parts[0], parts[1], parts[0].shape)
    return Scale(shape, joined.form)


@rule("scatter", "scatter_add", "scatter_sub", "scatter_min", "scatter_max")
def _scatter(
    domain: Scaling, eqn: Equation, operand: Operand, index: Operand, update: Operand
) -> Result:
    """Written elements share the scale of what they are written over, along the indexed axes."""
    if isinstance(index, Value):
        domain.pin(eqn, index)
    numbers = eqn.params["dimension_numbers"]
    shape = eqn.outputs[0].shape
    a, b = domain.scale(operand), domain.scale(update)
    if eqn.name == "scatter" and not isinstance(index, Value) and is_concrete(index):
        return _overwritten(domain, eqn, a, index, b)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    inserted = {*numbers.inserted_window_dims, *batching}
    window = [i for i in range(len(shape)) if i not in inserted]
    axes = sorted({*numbers.scatter_dims_to_operand_dims, *batching})
    outside = [i for i in range(len(b.shape)) if i not in numbers.update_window_dims]
    inner = [u for u, i in zip(numbers.update_window_dims, window, strict=True) if i in axes]
    a, b = domain.level(a, axes), domain.level(b, [*outside, *inner])
    target = [1] * len(shape)
    for u, i in zip(numbers.update_window_dims, window, strict=True):
        target[i] = b.shape[u] if i not in axes else 1

    def onto(array: np.ndarray) -> np.ndarray:
        lengths = [1] * len(shape)
        for u, i in zip(numbers.update_window_dims, window, strict=True):
            lengths[i] = array.shape[u]
        return array.reshape(lengths)

    moved = Scale(target, relaid(b.form, onto), None if b.absorbing is None else onto(b.absorbing))
    joined = scaling.join(
        domain.system, a, moved, [1 if i in axes else n for i, n in enumerate(shape)]
    )
    # Elements nobody wrote to keep their zeros, and zeros fit every scale.
    return Scale(shape, joined.form)


def _overwritten(domain: Scaling, eqn: Equation, a: Scale, index: Operand, b: Scale) -> Scale:
    shape = eqn.outputs[0].shape
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}

    def write(under: np.ndarray, over: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            arrays = (
                jnp.asarray(np.broadcast_to(v, s).astype(np.int32))
                for v, s in ((under, shape), (over, b.shape))
            )
            first, second = arrays
            return np.asarray(lax.scatter(first, jnp.asarray(index), second, **options))

    zero, one = np.zeros((1,) * len(shape), np.int64), np.ones((1,) * len(b.shape), np.int64)
    form = scaling.assemble(
        [
            (lambda ids: write(zero, ids).astype(np.int64), b.form),
            scaling.masked(write(zero, one) == 0, a.form),
        ]
    )
    absorbing = (
        write(
            zero if a.absorbing is None else a.absorbing,
            one * 0 if b.absorbing is None else b.absorbing,
        )
        > 0
    )
    return Scale(shape, scaling.tidy(domain.system, form), absorbing)
