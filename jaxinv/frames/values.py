"""Values of the domain of frames: which matrix acts on each axis, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Value
from jaxinv.frames.algebras import Commutants, Labels
from jaxinv.frames.system import DUAL, Kind, Ref, System, Vector


class Block(NamedTuple):
    """Some neighbours along an axis: their number, and the frame that acts on them.

    `refs` has the rank of the value. Its length along another axis is that of the value where the
    frame depends on where along it one is (one frame per head), and else 1.
    """

    size: int
    refs: np.ndarray


Axis = list[Block] | None  # None: nothing may act here, or the axis is not one of parameters


class Framed(Value):
    """An array: frames of its axes, and what else rules must know."""

    __slots__ = ("axes", "constant", "leaf", "shape", "square", "uniform", "vector", "zero")

    def __init__(
        self,
        shape: Sequence[int],
        axes: Sequence[Axis] | None = None,
        uniform: Iterable[int] = (),
        vector: tuple[Vector, int] | None = None,
    ):
        self.shape = tuple(shape)
        self.axes: list[Axis] = [None] * len(self.shape) if axes is None else list(axes)
        # Axes along which all elements are the same.
        self.uniform = frozenset(uniform) | {a for a, n in enumerate(self.shape) if n == 1}
        self.vector = vector  # that vector along that axis, times what does not vary along it
        self.square: Framed | None = None  # the elementwise square of that value
        self.zero = False
        self.constant = False
        self.leaf: int | None = None  # a whole leaf of params, not yet used

    @property
    def framed(self) -> bool:
        return self.square is not None or any(axis is not None for axis in self.axes)

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number, repeated."""
        return not self.framed and len(self.uniform) == len(self.shape)


def like(value: Framed, **changed: object) -> Framed:
    """A copy with some fields changed."""
    copy = Framed(value.shape, value.axes, value.uniform, value.vector)
    copy.square, copy.zero, copy.constant = value.square, value.zero, value.constant
    for name, new in changed.items():
        setattr(copy, name, new)
    return copy


class Frames(Protocol):
    """What rules ask of the domain."""

    system: System
    deep: set[int]
    gains: set[int]

    def alone(self) -> Frames: ...

    labels: Labels
    commutant: Commutants

    def framed(self, operand: Operand) -> Framed: ...
    def end(self, eqn: Equation, axis: Axis) -> None: ...
    def end_all(self, eqn: Equation, value: Framed) -> None: ...
    def plain(self, eqn: Equation, value: Framed) -> Framed: ...
    def restrict(self, axis: Axis, kind: Kind) -> None: ...
    def fixes_ones(self, axis: Axis) -> None: ...
    def multiplied(self, axis: Sequence[Block], vector: Vector, power: int) -> list[Block]: ...
    def kept(
        self, eqn: Equation, value: Framed, shape: Sequence[int], places: Mapping[int, int]
    ) -> Framed: ...
    def default(self, eqn: Equation, *inputs: Operand) -> Framed | list[Framed]: ...


# --- axes as lists of blocks --------------------------------------------------------------


def numbers(axis: Axis) -> set[int]:
    """All refs that occur."""
    return {int(i) for block in axis or () for i in np.unique(block.refs)}


def ends(axis: Sequence[Block]) -> set[int]:
    return set(np.cumsum([block.size for block in axis]).tolist())


def each(refs: np.ndarray, f: Callable[[int], int]) -> np.ndarray:
    """The array with f of every number in it."""
    found, where = np.unique(refs, return_inverse=True)
    return np.array([f(int(i)) for i in found], dtype=np.int64)[where].reshape(refs.shape)


def moved(axis: Axis, move: Callable[[np.ndarray], np.ndarray]) -> Axis:
    return None if axis is None else [Block(n, move(refs)) for n, refs in axis]


def refined(system: System, axis: Sequence[Block], cuts: Iterable[int] = ()) -> list[Block]:
    """The axis cut where it is asked for, and where its frames have been cut meanwhile."""
    out, offset = [], 0
    cuts = set(cuts)
    for size, refs in axis:
        inner = {c - offset for c in cuts if offset < c < offset + size}
        found = [int(i) for i in np.unique(refs)]
        for i in found:
            inner |= system.cuts(system.ref(i).frame)
        offset += size
        if not inner:
            out.append(Block(size, refs))
            continue
        for i in found:
            system.split(system.ref(i).frame, inner)
        pieces = {i: system.pieces(system.ref(i), inner) for i in found}
        for k, (n, _) in enumerate(pieces[found[0]]):
            part = {i: system.number(p[k][1]) for i, p in pieces.items()}
            out.append(Block(n, each(refs, part.__getitem__)))
    return out


def matched(
    system: System, a: Sequence[Block], b: Sequence[Block]
) -> tuple[list[Block], list[Block]]:
    """Both axes cut at the same places."""
    while True:
        cuts = ends(a) | ends(b)
        a, b = refined(system, a, cuts), refined(system, b, cuts)
        if ends(a) == ends(b):
            return a, b


def unify(system: System, a: Sequence[Block], b: Sequence[Block], dual: bool = False) -> None:
    """Require equal (or dual) frames of two axes whose arrays of refs broadcast."""
    for (_, one), (_, other) in zip(*matched(system, a, b), strict=True):
        pairs = np.stack([r.ravel() for r in np.broadcast_arrays(one, other)])
        for i, j in np.unique(pairs, axis=1).T.tolist():
            ref = system.ref(j)
            system.unify(system.ref(i), Ref(ref.frame, DUAL.of(ref.relation)) if dual else ref)


def level(system: System, axis: Axis, others: Iterable[int]) -> Axis:
    """Require that the frames do not depend on where along other axes one is."""
    if axis is None:
        return None
    others, out = set(others), []
    for size, refs in refined(system, axis):
        pick = tuple(slice(0, 1) if a in others else slice(None) for a in range(refs.ndim))
        unify(system, [Block(size, refs)], [Block(size, refs[pick])])
        out.append(Block(size, refs[pick]))
    return refined(system, out)


__all__ = [
    "Axis",
    "Block",
    "Framed",
    "Frames",
    "each",
    "ends",
    "level",
    "like",
    "matched",
    "moved",
    "numbers",
    "refined",
    "unify",
]
