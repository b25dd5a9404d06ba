"""Follow the frames of all parameters through a program, and read off what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxinv._interpreter import walk
from jaxinv._interpreter.walk import Trace
from jaxinv.frames.algebras import Algebra
from jaxinv.frames.domain import MOST_ALONG, FramesDomain
from jaxinv.frames.system import GL, NONE, SAME, Kind, Ref, Relation, System
from jaxinv.frames.values import Framed, numbers, refined


class Place(NamedTuple):
    """Where a matrix acts on a parameter: on a block of one axis, in a box of the others."""

    leaf: int
    axis: int
    box: tuple[tuple[int, int], ...]  # (start, stop) along every axis, the block along its own
    relation: Relation  # A itself, its dual, and through which gains


class FrameClass(NamedTuple):
    """One unknown matrix, and everywhere that it acts."""

    kind: Kind
    size: int
    places: tuple[Place, ...]


class Frames(NamedTuple):
    """What may act on the axes of the parameters without changing the outputs."""

    classes: tuple[FrameClass, ...]
    constants: tuple[np.ndarray, ...]  # vectors that places refer to as −1, −2, …
    ended_by: tuple[tuple[str, str], ...]  # (operation, source line)


def frames_of(
    trace: Trace,
    shapes: Sequence[tuple[int, ...]],
    domain_of: Callable[[], FramesDomain] = FramesDomain,
) -> Frames:
    """All frames of a program with parameters of these shapes.

    An axis on which nothing may act counts as data from the start, and what meets it is told so:
    the program is followed until no more of them are found.
    """
    dead: list[frozenset[int]] = [frozenset()] * len(shapes)
    deep: set[int] = set()
    while True:
        domain = domain_of()
        domain.deep |= deep
        leaves = [domain.leaf(i, shape, dead[i]) for i, shape in enumerate(shapes)]
        last = walk.output_equation(trace)
        jaxpr, _ = walk.open_jaxpr(trace.jaxpr)
        inputs = [Framed(walk.aval_of(v).shape) for v in jaxpr.invars[trace.num_params :]]
        views = [_view(leaf) for leaf in leaves]
        for value in walk.interpret(trace, views, inputs, domain):
            domain.end_all(last, domain.framed(value))
        found = [_dead(domain, leaf) for leaf in leaves]
        early = _tied_gains(domain, leaves)
        long = {i for i in domain.deep - deep if shapes[i][0] > MOST_ALONG}
        if long:  # each of their steps may have matrices of its own
            deep |= long
            continue
        if found == dead:
            break
        whole = [
            frozenset(range(len(shape))) if i in early else d
            for i, (shape, d) in enumerate(zip(shapes, dead, strict=True))
        ]
        dead = whole if early else found
    return Frames(_classes(domain, leaves), tuple(domain.constants), tuple(domain.ended_by))


def _tied_gains(domain: FramesDomain, leaves: Sequence[Framed]) -> set[int]:
    """Gains with a frame that is also that of another leaf, as of the offset in β − μγ/σ.

    A gain allows no matrix for a reason of its own, which is no reason for the other leaf.
    """
    roots: dict[int, set[int]] = {}
    for i, leaf in enumerate(leaves):
        for axis in leaf.axes:
            for number in numbers(axis):
                for _, piece in domain.system.pieces(domain.system.ref(number)):
                    roots.setdefault(domain.system.root(piece.frame).frame, set()).add(i)
    return {i for owners in roots.values() for i in owners & domain.gains if len(owners) > 1}


def _view(leaf: Framed) -> Framed:
    """What the program sees: rules may forget axes of it, which the leaf itself keeps."""
    view = Framed(leaf.shape, leaf.axes, leaf.uniform, leaf.vector)
    view.leaf = leaf.leaf
    return view


def _dead(domain: FramesDomain, leaf: Framed) -> frozenset[int]:
    """Axes of a leaf on which nothing may act."""
    system = domain.system

    def alive(number: int) -> bool:
        pieces = system.pieces(system.ref(number))
        return any(system.kinds[system.root(p.frame).frame] != NONE for _, p in pieces)

    return frozenset(
        a
        for a, axis in enumerate(leaf.axes)
        if axis is None or not any(alive(int(i)) for _, refs in axis for i in np.unique(refs))
    )


def _classes(domain: FramesDomain, leaves: Sequence[Framed]) -> tuple[FrameClass, ...]:
    system = domain.system
    places: dict[int, list[Place]] = {}
    for number, leaf in enumerate(leaves):
        for axis, blocks in enumerate(leaf.axes):
            offset = 0
            for size, refs in refined(system, blocks) if blocks else ():
                for (root, relation), here in _by_root(system, refs):
                    for box in _boxes(here, leaf.shape, axis, offset, size):
                        place = Place(number, axis, box, relation)
                        places.setdefault(root, []).append(place)
                offset += size
    classes = [
        FrameClass(system.kinds[root], system.sizes[root], tuple(found))
        for root, found in places.items()
    ]
    return tuple(_as_written(c) for c in classes if not _unread(c))


def _unread(found: FrameClass) -> bool:
    """Whether any matrix acts on the one side alone: so does 0, and nothing reads these weights."""
    free = found.kind == GL or (isinstance(found.kind, Algebra) and found.kind.diagonal > 0)
    return free and len({place.relation.dual for place in found.places}) == 1


def _by_root(system: System, refs: np.ndarray) -> list[tuple[Ref, np.ndarray]]:
    """The matrices that refs stand for, and where."""
    numbers, at = np.unique(refs, return_inverse=True)
    seen = [system.seen(system.ref(int(i))) for i in numbers]
    place_of = {ref: i for i, ref in enumerate(dict.fromkeys(seen))}
    of = np.array([place_of[ref] for ref in seen])[at.reshape(refs.shape)]
    return [(ref, of == i) for ref, i in place_of.items() if system.kinds[ref.frame] != NONE]


def _as_written(found: FrameClass) -> FrameClass:
    """The class with A as it acts where a GL class is first seen.

    Rotations and their like are what they are in the root, where no gain is in between.
    """
    first = found.places[0].relation
    if found.kind != "GL" or first == SAME:
        return found
    back = first.inverse()
    places = tuple(p._replace(relation=p.relation.of(back)) for p in found.places)
    return found._replace(places=places)


def _boxes(
    here: np.ndarray, shape: Sequence[int], axis: int, offset: int, size: int
) -> list[tuple[tuple[int, int], ...]]:
    """The places of one matrix as boxes of the leaf."""
    boxes = []
    for found in _runs(here):
        box = [
            ends if m > 1 else (0, n) for ends, m, n in zip(found, here.shape, shape, strict=True)
        ]
        box[axis] = (offset, offset + size)
        boxes.append(tuple(box))
    return boxes


def _runs(here: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
    """Boxes that make up a set: runs along the first axis of what is alike along the others."""
    if here.all():
        return [tuple((0, n) for n in here.shape)]
    if not here.any():
        return []
    flat = here.reshape(len(here), -1)
    starts = [0, *(1 + np.flatnonzero((flat[1:] != flat[:-1]).any(axis=1))).tolist()]
    ends = [*starts[1:], len(here)]
    return [
        ((start, end), *rest)
        for start, end in zip(starts, ends, strict=True)
        for rest in (_runs(here[start]) if here.ndim > 1 else [()] * bool(here[start]))
    ]
