"""Unknown matrices, and which of them are the same: union-find with duals, gains and blocks.

A *frame* is an unknown n × n matrix A that acts on an axis, δv = A·v. Two axes that meet in the
program have one frame, or frames that are each other's dual, −Aᵀ, or one is the other seen through
a gain g: diag(g) A diag(g)⁻¹. No entry of a matrix is an unknown, so nothing here depends on n.

Kinds, from what may be any matrix down to what must be 0:
    GL  any matrix
    S   A·1 = 0 and 1ᵀA = 0: what a mean along the axis allows
    O   A = −Aᵀ: what a sum of squares allows
    O1  both
    NONE
    an `Algebra`: what commutes with given linear maps
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jaxinv.frames.algebras import Algebra

GL, S, O, O1, NONE = "GL", "S", "O", "O1", "none"


Kind = str | Algebra


def meet(a: Kind, b: Kind) -> Kind:
    """The matrices that are of both kinds; of two algebras, none unless they are one."""
    if a == b:
        return a
    if NONE in (a, b):
        return NONE
    if GL in (a, b):
        return b if a == GL else a
    if isinstance(b, Algebra):
        a, b = b, a
    if isinstance(a, Algebra):
        if isinstance(b, Algebra):
            return NONE
        return _worth(a.where(rotations=b in (O, O1), fixes_ones=b in (S, O1)))
    return O1  # any two of S, O and O1


def _worth(algebra: Algebra) -> Kind:
    """Diagonal matrices alone are rescalings, which others count."""
    return algebra if algebra.dimension > algebra.diagonal else NONE


class Vector(NamedTuple):
    """A vector of the program that multiplies an axis: part of a leaf (≥ 0) or of a constant."""

    source: int  # leaf, or −1 − constant
    offset: int  # of its first element, in the flattened array
    order: tuple[int, ...] = ()  # elements in another order, counted from there

    def ordered(self, turn: tuple[int, ...]) -> Vector:
        """With the elements in the order of a permutation; () leaves them."""
        return self._replace(order=_turns(self.order, turn))


def _turns(inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that takes inner[outer[i]] to i; () is the identity."""
    if not inner or not outer:
        return inner or outer
    both = tuple(inner[i] for i in outer)
    return () if both == tuple(range(len(both))) else both


Gains = tuple[tuple[Vector, Fraction], ...]  # powers of vectors, sorted


class Relation(NamedTuple):
    """B = T·P·A·Pᵀ·T⁻¹, or with −Aᵀ where dual; T the product of the gains, P a permutation."""

    dual: bool = False
    gains: Gains = ()
    turn: tuple[int, ...] = ()  # P·A·Pᵀ = A[turn, turn]; () is the identity

    def of(self, inner: Relation) -> Relation:
        """The relation that is this one of the inner one of A."""
        if self == SAME:
            return inner
        if inner == SAME:
            return self
        sign = -1 if self.dual else 1
        gains = _times(self.gains, _ordered(inner.gains, self.turn), sign)
        return Relation(self.dual ^ inner.dual, gains, _turns(inner.turn, self.turn))

    def inverse(self) -> Relation:
        turn = tuple(int(i) for i in np.argsort(self.turn)) if self.turn else ()
        sign = 1 if self.dual else -1
        return Relation(self.dual, _times((), _ordered(self.gains, turn), sign), turn)

    @property
    def turns(self) -> bool:
        """Whether blocks of neighbours do not stay blocks of neighbours."""
        return bool(self.turn) or any(v.order for v, _ in self.gains)

    def kind(self, kind: Kind) -> Kind:
        """The kind of B, without gains in between, where A is of a kind."""
        if not isinstance(kind, Algebra):
            return kind
        kind = kind.transposed() if self.dual else kind
        return kind.turned(self.turn) if self.turn else kind

    def shifted(self, offset: int) -> Relation:
        """That of a block which begins at an offset."""
        moved = (Vector(v.source, v.offset + offset) for v, _ in self.gains)
        powers = (power for _, power in self.gains)
        return Relation(self.dual, tuple(sorted(zip(moved, powers, strict=True))))


def _ordered(gains: Gains, turn: tuple[int, ...]) -> Gains:
    return tuple(sorted((v.ordered(turn), power) for v, power in gains)) if turn else gains


SAME = Relation()
DUAL = Relation(True)


def _times(a: Gains, b: Gains, sign: int) -> Gains:
    powers = dict(a)
    for vector, power in b:
        powers[vector] = powers.get(vector, Fraction(0)) + sign * power
    return tuple(sorted((v, p) for v, p in powers.items() if p))


class Ref(NamedTuple):
    """A frame as it acts somewhere."""

    frame: int
    relation: Relation = SAME


class System:
    """All frames of a program, and the relations between them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.kinds: list[Kind] = []
        self.parents: list[int] = []
        self.relations: list[Relation] = []  # to the parent
        self.parts: list[list[int] | None] = []  # blocks on the diagonal, once it is cut
        self._refs: list[Ref] = []
        self._numbers: dict[Ref, int] = {}

    # --- refs by number, so that arrays of them are arrays of integers ---

    def number(self, ref: Ref) -> int:
        found = self._numbers.setdefault(ref, len(self._refs))
        if found == len(self._refs):
            self._refs.append(ref)
        return found

    def ref(self, number: int) -> Ref:
        return self._refs[number]

    # --- frames ---

    def new(self, size: int, kind: Kind = GL, count: int = 1) -> np.ndarray:
        """Numbers of refs to new frames."""
        first = len(self.sizes)
        self.sizes += [size] * count
        self.kinds += [kind if size > 1 else NONE] * count
        self.parents += range(first, first + count)
        self.relations += [SAME] * count
        self.parts += [None] * count
        return np.array([self.number(Ref(i)) for i in range(first, first + count)])

    def root(self, frame: int) -> Ref:
        """The frame that stands for this one, and how this one comes from it."""
        path = []
        while self.parents[frame] != frame:
            path.append(frame)
            frame = self.parents[frame]
        relation = SAME
        for below in reversed(path):
            relation = self.relations[below].of(relation)
            self.parents[below], self.relations[below] = frame, relation
        return Ref(frame, relation)

    def seen(self, ref: Ref) -> Ref:
        """A ref in terms of the root."""
        root, relation = self.root(ref.frame)
        return Ref(root, ref.relation.of(relation))

    def cuts(self, frame: int) -> set[int]:
        """Where a frame has been cut into blocks."""
        root = self.root(frame).frame
        if self.parts[root] is None:
            return set()
        found: set[int] = set()
        offset = 0
        for part in self.parts[root] or ():
            found |= {offset + cut for cut in self.cuts(part)}
            offset += self.sizes[part]
            found.add(offset)
        return found - {self.sizes[root]}

    def split(self, frame: int, cuts: Iterable[int]) -> None:
        root = self.root(frame).frame
        size = self.sizes[root]
        inner = sorted(c for c in cuts if 0 < c < size)
        if not inner:
            return
        parts = self.parts[root]
        if parts is None:
            ends = [*inner, size]
            self.parts[root] = [
                self.ref(int(self.new(end - start, _part(self.kinds[root], start, end))[0])).frame
                for start, end in zip([0, *inner], ends, strict=True)
            ]
            return
        offset = 0
        for part in parts:
            self.split(part, [c - offset for c in inner])
            offset += self.sizes[part]

    def pieces(self, ref: Ref, cuts: Iterable[int] = ()) -> list[tuple[int, Ref]]:
        """A ref as its smallest blocks, (size, ref) each."""
        self.split(ref.frame, cuts)
        root, relation = self.seen(ref)
        parts = self.parts[root]
        if parts is None:
            return [(self.sizes[root], Ref(root, relation))]
        if relation.turns:
            for part in parts:
                self.restrict(Ref(part), NONE)
            relation = SAME
        found, offset = [], 0
        for part in parts:
            found += self.pieces(Ref(part, relation.shifted(offset)))
            offset += self.sizes[part]
        return found

    # --- equations ---

    def restrict(self, ref: Ref, kind: Kind) -> None:
        """Require that the matrix, as it acts here, is of a kind."""
        root, relation = self.seen(ref)
        parts = self.parts[root]
        if parts is not None:
            # What squares or means run over the blocks of an axis, they run over each.
            start = 0
            for size, piece in self.pieces(ref):
                self.restrict(piece, _part(kind, start, start + size))
                start += size
            return
        if relation.gains and kind != NONE:
            if self.kinds[root] != GL:
                kind = NONE
            else:
                # The matrix that is seen here is of the kind, and becomes the root.
                j = self.ref(int(self.new(self.sizes[root], kind)[0])).frame
                self.parents[root], self.relations[root] = j, relation.inverse()
                return
        self.kinds[root] = meet(self.kinds[root], relation.inverse().kind(kind))

    def unify(self, a: Ref, b: Ref) -> None:
        """Require that two refs are the same matrix."""
        if a == b:
            return
        cuts = self.cuts(a.frame) | self.cuts(b.frame)
        if cuts:
            left, right = self.pieces(a, cuts), self.pieces(b, cuts)
            if len(left) != len(right):  # cutting one has cut the other, which is the same frame
                self.unify(a, b)
                return
            for (_, one), (_, other) in zip(left, right, strict=True):
                self.unify(one, other)
            return
        left_root, right_root = self.seen(a), self.seen(b)
        r, s = left_root.frame, right_root.frame
        # A_r = between(A_s)
        between = left_root.relation.inverse().of(right_root.relation)
        if r == s:
            if between != SAME:
                self.restrict(Ref(r), O if between == DUAL else NONE)
            return
        if self.kinds[r] != GL and between.gains:
            if self.kinds[s] == GL:
                r, s, between = s, r, between.inverse()
            else:
                self.kinds[r] = self.kinds[s] = NONE
        self.kinds[s] = meet(between.inverse().kind(self.kinds[r]), self.kinds[s])
        self.parents[r], self.relations[r] = s, between


def _part(kind: Kind, start: int, stop: int) -> Kind:
    return _worth(kind.part(start, stop)) if isinstance(kind, Algebra) else kind


__all__ = [
    "DUAL",
    "GL",
    "NONE",
    "O1",
    "SAME",
    "Gains",
    "Kind",
    "O",
    "Ref",
    "Relation",
    "S",
    "System",
    "Vector",
    "meet",
]
