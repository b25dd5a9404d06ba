"""Frames of arrays that are moved about: axes keep theirs, or are cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, is_concrete, rule_table
from jaxinv.frames.system import NONE
from jaxinv.frames.values import Axis, Block, Framed, Frames, ends, like, moved, refined, unify

RULES, rule = rule_table()


@rule("transpose")
def _transpose(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    order = eqn.params["permutation"]
    return domain.kept(eqn, value, eqn.outputs[0].shape, {a: i for i, a in enumerate(order)})


@rule("broadcast_in_dim")
def _broadcast(domain: Frames, eqn: Equation, value: Framed, *_: Operand) -> Framed:
    shape, places = eqn.outputs[0].shape, eqn.params["broadcast_dimensions"]
    result = domain.kept(eqn, value, shape, dict(enumerate(places)))
    result.uniform |= {a for a in range(len(shape)) if a not in places}
    return result


@rule("squeeze")
def _squeeze(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    left = [a for a in range(len(value.shape)) if a not in eqn.params["dimensions"]]
    return domain.kept(eqn, value, eqn.outputs[0].shape, {a: i for i, a in enumerate(left)})


# --- reshape: axes merge into one, or one is cut into blocks ---------------------------------


@rule("reshape")
def _reshape(domain: Frames, eqn: Equation, value: Framed, *_: Operand) -> Framed:
    value = domain.plain(eqn, value)
    old, new = value.shape, eqn.outputs[0].shape
    result = Framed(new)
    result.zero, result.constant = value.zero, value.constant
    groups = groups_of(old, new)

    def relaid(refs: np.ndarray) -> np.ndarray:
        """Where along the other axes a frame acts, told by the new ones."""
        full: list[int] = []
        target: list[int] = []
        for before, after in groups:
            varies = any(refs.shape[a] > 1 for a in before)
            full += [old[a] if varies else 1 for a in before]
            target += [new[a] if varies else 1 for a in after]
        return np.broadcast_to(refs, full).reshape(target)

    for before, after in groups:
        if all(a in value.uniform for a in before):
            result.uniform |= set(after)
        large = [a for a in before if old[a] > 1]
        into = [a for a in after if new[a] > 1]
        if value.vector and large == [value.vector[1]] and len(into) == 1:
            result.vector = (value.vector[0], into[0])
        if all(value.axes[a] is None for a in before):
            continue
        if len(large) == 1 and len(into) == 1:
            result.axes[into[0]] = moved(value.axes[large[0]], relaid)
        elif len(large) == 1:
            result.axes[into[-1]] = _cut(domain, value, large[0], into, new, relaid)
        elif len(into) == 1:
            result.axes[into[0]] = _merged(domain, eqn, value, large, relaid)
        else:
            for a in before:
                domain.end(eqn, value.axes[a])
    return result


def groups_of(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new axes that hold the same elements."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second = i, j
        a = old[i] if i < len(old) else 1
        b = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        found.append((list(range(first, i)), list(range(second, j))))
    return found


Relaid = Callable[[np.ndarray], np.ndarray]


def _cut(
    domain: Frames, value: Framed, axis: int, into: list[int], new: Sequence[int], relaid: Relaid
) -> Axis:
    """n → (h, c): the frame is cut into h blocks, and that of the last axis is one per block."""
    system, size, total = domain.system, new[into[-1]], value.shape[axis]
    blocks = refined(system, value.axes[axis] or [], range(size, total, size))
    inner = {end % size for end in ends(blocks)} - {0}
    cuts = {start + c for start in range(0, total, size) for c in inner}
    blocks = refined(system, blocks, cuts)
    count, heads = len(blocks) // (total // size), [new[a] for a in into[:-1]]
    out = []
    for k in range(count):
        group = [relaid(blocks[h * count + k].refs) for h in range(total // size)]
        out.append(_by_head(blocks[k].size, group, into[:-1], heads))
    return out


def _by_head(size: int, group: list[np.ndarray], places: list[int], heads: list[int]) -> Block:
    shape = list(np.broadcast_shapes(*(refs.shape for refs in group)))
    for a, n in zip(places, heads, strict=True):
        shape[a] = n
    refs = np.zeros(shape, np.int64)
    for h, part in enumerate(group):
        where = [slice(None)] * len(shape)
        for a, i in zip(places, np.unravel_index(h, heads), strict=True):
            where[a] = slice(int(i), int(i) + 1)
        refs[tuple(where)] = part
    return Block(size, refs)


def _merged(domain: Frames, eqn: Equation, value: Framed, large: list[int], relaid: Relaid) -> Axis:
    """(h, c) → n: as many blocks as there are places along the axes that are merged."""
    for a in large[:-1]:
        domain.end(eqn, value.axes[a])
    axis = value.axes[large[-1]]
    if axis is None:
        return None
    blocks, out = refined(domain.system, axis), []
    for place in np.ndindex(*[value.shape[a] for a in large[:-1]]):
        for size, refs in blocks:
            where = [slice(None)] * refs.ndim
            for a, i in zip(large[:-1], place, strict=True):
                where[a] = slice(i, i + 1) if refs.shape[a] > 1 else slice(0, 1)
            out.append(Block(size, relaid(refs[tuple(where)])))
    return out


# --- parts of an axis --------------------------------------------------------------------------


def taken(domain: Frames, value: Framed, starts: Sequence[int], limits: Sequence[int]) -> Framed:
    """A box out of an array: axes that are cut keep the blocks inside."""
    axes: list[Axis] = []
    for a, axis in enumerate(value.axes):
        if axis is not None and (starts[a], limits[a]) != (0, value.shape[a]):
            blocks, offset, inside = refined(domain.system, axis, {starts[a], limits[a]}), 0, []
            for block in blocks:
                if starts[a] <= offset < limits[a]:
                    inside.append(block)
                offset += block.size
            axis = inside

        def cut(refs: np.ndarray) -> np.ndarray:
            where = tuple(
                slice(s, e) if refs.shape[b] > 1 else slice(None)
                for b, (s, e) in enumerate(zip(starts, limits, strict=True))
            )
            return refs[where]

        axes.append(moved(axis, cut))
    shape = [end - start for start, end in zip(starts, limits, strict=True)]
    result = Framed(shape, axes, value.uniform)
    result.constant = value.constant
    if value.vector is not None:
        vector, a = value.vector
        result.vector = (vector._replace(offset=vector.offset + starts[a]), a)
    return result


@rule("slice")
def _slice(domain: Frames, eqn: Equation, value: Framed) -> Framed | list[Framed]:
    strides = eqn.params["strides"]
    value = domain.plain(eqn, value)
    if strides is not None:
        for a, n in enumerate(strides):
            if n != 1:
                domain.end(eqn, value.axes[a])
                value = like(value, axes=[None if b == a else e for b, e in enumerate(value.axes)])
        if any(n != 1 for n in strides):
            whole = {a: a for a in range(len(value.shape))}
            return domain.kept(eqn, value, eqn.outputs[0].shape, whole)
    return taken(domain, value, eqn.params["start_indices"], eqn.params["limit_indices"])


@rule("split")
def _split(domain: Frames, eqn: Equation, value: Framed) -> list[Framed]:
    value, axis, offset, parts = domain.plain(eqn, value), eqn.params["axis"], 0, []
    for n in eqn.params["sizes"]:
        starts, limits = [0] * len(value.shape), list(value.shape)
        starts[axis], limits[axis] = offset, offset + n
        offset += n
        parts.append(taken(domain, value, starts, limits))
    return parts


@rule("concatenate")
def _concatenate(domain: Frames, eqn: Equation, *operands: Operand) -> Framed:
    axis, shape = eqn.params["dimension"], eqn.outputs[0].shape
    values = [domain.plain(eqn, domain.framed(v)) for v in operands]
    result = Framed(shape)
    for a in range(len(shape)):
        axes = [v.axes[a] for v in values]
        if all(e is None for e in axes):
            if a != axis and all(a in v.uniform for v in values):
                result.uniform |= {a}
        elif a == axis:
            result.axes[a] = [
                block
                for v, e in zip(values, axes, strict=True)
                for block in (e or [_pinned(domain, v.shape[a], len(shape))])
            ]
        elif len(known := [e for e in axes if e is not None]) < len(axes):
            for e in known:
                domain.end(eqn, e)
        else:
            for e in known[1:]:
                unify(domain.system, known[0], e)
            result.axes[a] = refined(domain.system, known[0])
    return result


def _pinned(domain: Frames, size: int, rank: int) -> Block:
    """A block on which nothing acts."""
    return Block(size, domain.system.new(size, NONE).reshape([1] * rank))


# --- by index ------------------------------------------------------------------------------------


@rule("gather")
def _gather(domain: Frames, eqn: Equation, value: Operand, index: Operand) -> Framed:
    """Axes that are taken whole keep their frames: the row of a table is a vector of its frame."""
    table, dims, shape = domain.framed(value), eqn.params["dimension_numbers"], eqn.outputs[0].shape
    domain.end_all(eqn, domain.framed(index))
    sizes = eqn.params["slice_sizes"]
    batching = getattr(dims, "operand_batching_dims", ())
    offsets = [
        a for a in range(len(table.shape)) if a not in (*dims.collapsed_slice_dims, *batching)
    ]
    places = {
        a: place
        for a, place in zip(offsets, dims.offset_dims, strict=True)
        if sizes[a] == table.shape[a]
    }
    result = domain.kept(eqn, table, shape, places)
    result.uniform, result.vector = frozenset(a for a, n in enumerate(shape) if n == 1), None
    return result


@rule("dynamic_slice")
def _dynamic_slice(domain: Frames, eqn: Equation, value: Operand, *starts: Operand) -> Framed:
    table, shape = domain.framed(value), eqn.outputs[0].shape
    if all(is_concrete(s) for s in starts):
        first = [
            int(np.clip(int(np.asarray(s)), 0, n - m))
            for s, n, m in zip(starts, table.shape, shape, strict=True)
        ]
        ends_ = [s + n for s, n in zip(first, shape, strict=True)]
        return taken(domain, domain.plain(eqn, table), first, ends_)
    for start in starts:
        domain.end_all(eqn, domain.framed(start))
    whole = {a: a for a, n in enumerate(shape) if n == table.shape[a]}
    cut = [a for a in range(len(shape)) if a not in whole]
    for a in cut:
        domain.end(eqn, table.axes[a])
    table = like(table, axes=[None if a in cut else e for a, e in enumerate(table.axes)])
    result = domain.kept(eqn, table, shape, {a: a for a in range(len(shape))})
    result.vector = None if result.vector and result.vector[1] in cut else result.vector
    return result


@rule("rev")
def _rev(domain: Frames, eqn: Equation, value: Framed) -> Framed:
    """Other axes keep their frames; that of a reversed one would be P·A·P."""
    value = domain.plain(eqn, value)
    for a in eqn.params["dimensions"]:
        domain.end(eqn, value.axes[a])
    flipped = set(eqn.params["dimensions"])
    kept = like(
        value,
        axes=[None if a in flipped else e for a, e in enumerate(value.axes)],
        vector=None if value.vector and value.vector[1] in flipped else value.vector,
    )
    return domain.kept(eqn, kept, kept.shape, {a: a for a in range(len(kept.shape))})
