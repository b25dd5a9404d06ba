"""Linear forms: an axis that is mixed within itself, with coefficients that are data.

A rotary embedding cuts an axis into halves (or pairs), multiplies them by cosines and sines of the
position and puts sums of them side by side. Cut into halves, an axis would lose what a rotation
of planes needs. So what cuts or weighs an axis is put off: the result remembers of which elements
of the axis each of its own is a sum, and with which coefficients. What uses it in another way asks
for frames: those are the matrices that commute with all these maps, or, where only parts were
taken, those of the parts. The operations that are put off are in `mixing`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxinv._interpreter.walk import Operand
from jaxinv.frames.algebras import Algebra
from jaxinv.frames.system import Ref, Relation
from jaxinv.frames.values import Block, Framed, Frames, each, refined

LONGEST = 512  # side of the matrices of an axis


class Form(NamedTuple):
    """Each element along some axes of a value is Σ_t numbers[t]·c(labels[t])·x(sources[t]).

    x runs over one axis of another value, the origin; arrays have axes (t, *own). Labels stand for
    coefficients that depend on where along the other axes one is; label 0 is the number 1.
    """

    origin: Framed
    axis: int
    own: tuple[int, ...]  # axes of the value, in order
    places: tuple[int | None, ...]  # axis of the origin that an axis of the value is
    sources: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.sources.shape[1:]

    def each(self, move: Callable[[np.ndarray], np.ndarray]) -> Form:
        """With the arrays moved about alike."""
        return self._replace(
            sources=move(self.sources), numbers=move(self.numbers), labels=move(self.labels)
        )

    def alike(self, other: Form) -> bool:
        same = self.origin is other.origin and self.axis == other.axis
        return same and self.own == other.own and self.places == other.places


class Deferred(Framed, abc.ABC):
    """A value whose frames are put off until something asks for them."""

    __slots__ = ("found",)

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.found: Framed | None = None

    @abc.abstractmethod
    def frames(self) -> Framed:
        """The value with frames; asked for once."""

    def resolved(self) -> Framed:
        if self.found is None:
            found = self.frames()
            if found.square is None and not hasattr(found, "key") and hasattr(self, "key"):
                found.key = self.key
            self.found = found
        return self.found


class Pending(Deferred):
    """A value whose axis is mixed within itself."""

    __slots__ = ("domain", "eager", "form")

    def __init__(
        self, shape: Sequence[int], form: Form, domain: Frames, eager: Callable[[], Framed]
    ) -> None:
        super().__init__(shape)
        self.form, self.domain, self.eager = form, domain, eager

    def frames(self) -> Framed:
        return _commuting(self.domain, self.form, self.shape) or self.eager()


def resolved(operand: Operand) -> Operand:
    """An operand that is not put off."""
    return operand.resolved() if isinstance(operand, Deferred) else operand


# --- frames of what was put off ----------------------------------------------------------------


def _commuting(domain: Frames, form: Form, shape: Sequence[int]) -> Framed | None:
    """The value with frames that commute with the maps of its form; None where it has none."""
    plain = not form.labels.any() and len(form.sources) == 1
    large = [i for i, n in enumerate(form.lengths) if n > 1]
    if not large or (plain and _in_order(form)) or (form.numbers.imag != 0).any():
        return None
    # One frame per place along all but the last of the axes: per head.
    last = large[-1]
    n, head_axes = form.lengths[last], [i for i in range(len(form.lengths)) if i != last]
    if n > LONGEST:
        return None
    heads = [form.lengths[i] for i in head_axes]

    def by_head(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a, 1 + last, -1).reshape(len(a), -1, n)

    sources, numbers, labels = by_head(form.sources), by_head(form.numbers), by_head(form.labels)
    starts, maps = [], []
    for h in range(sources.shape[1]):
        there = sources[:, h] >= 0
        first = int(sources[:, h][there].min(initial=form.origin.shape[form.axis]))
        if set(sources[:, h][there].tolist()) != set(range(first, first + n)):
            return None
        own = np.where(there, sources[:, h] - first, -1)
        found = domain.commutant(own, numbers[:, h].real, labels[:, h])
        if found is None or found[0].dimension == found[0].diagonal:
            return None
        starts.append(first)
        maps.append(found)
    system, axis = domain.system, form.origin.axes[form.axis] or []
    blocks = refined(system, axis, {end for start in starts for end in (start, start + n)})
    offsets = np.cumsum([0, *(block.size for block in blocks)]).tolist()
    parts = []
    for start, (algebra, turn) in zip(starts, maps, strict=True):
        block = blocks[offsets.index(start)]
        if block.size != n:
            return None
        parts.append((block.refs, algebra, turn))
    result = Framed(shape)
    size = [1] * len(shape)
    for place in head_axes:
        size[form.own[place]] = form.lengths[place]
    for a, along in enumerate(form.places):
        if along is not None and any(refs.shape[along] > 1 for refs, *_ in parts):
            size[a] = shape[a]
    refs = np.zeros(size, np.int64)
    for h, (found_refs, algebra, turn) in enumerate(parts):
        arranged = _arranged(found_refs, form, len(shape))
        if arranged is None:
            return None
        where: list[slice] = [slice(None)] * len(shape)
        for place, i in zip(head_axes, np.unravel_index(h, heads), strict=True):
            where[form.own[place]] = slice(int(i), int(i) + 1)
        refs[tuple(where)] = each(arranged, lambda i, m=(algebra, turn): _behind(domain, i, *m))  # type: ignore[misc]
    result.axes[form.own[last]] = [Block(n, refs)]
    return result


def _in_order(form: Form) -> bool:
    """Whether elements follow each other as they did: parts of an axis have frames of their own."""
    return bool((np.diff(form.sources[0].reshape(-1, form.lengths[-1])) == 1).all())


def _arranged(refs: np.ndarray, form: Form, rank: int) -> np.ndarray | None:
    """Refs of the origin by the axes of the value."""
    kept = [(a, place) for a, place in enumerate(form.places) if place is not None]
    gone = [b for b in range(refs.ndim) if b not in {place for _, place in kept}]
    if any(refs.shape[b] > 1 for b in gone):
        return None
    shape = [1] * rank
    for a, place in kept:
        shape[a] = refs.shape[place]
    return refs.transpose([*(place for _, place in kept), *gone]).reshape(shape)


def _behind(domain: Frames, number: int, algebra: Algebra, turn: tuple[int, ...]) -> int:
    """The frame behind the maps, of one that now commutes with them."""
    ref = domain.system.ref(number)
    if algebra.dimension < len(turn) ** 2:
        domain.system.restrict(ref, algebra)
    through = Relation(turn=() if turn == tuple(range(len(turn))) else turn)
    return domain.system.number(Ref(ref.frame, through.of(ref.relation)))
