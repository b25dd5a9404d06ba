"""One step of a loop as equations between frames, walked once and played for every step.

The body is walked on frames of its own, one for each axis that has frames outside. What it leaves
of them — which are the same, which are each other's dual, of what kind — is put to the frames of
every step in turn, without looking at the body again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Body, Operand, Reader, is_concrete
from jaxinv.frames.system import Ref, Relation, System, Vector
from jaxinv.frames.values import Axis, Block, Framed, Frames, each, like, refined, unify

_PLACEHOLDER = 1 << 30  # source of the vector that is another one in every step


def signature(operand: Operand) -> Hashable:
    """What of a value decides how rules treat it; None where steps had better be walked."""
    if not isinstance(operand, Framed):
        if not is_concrete(operand):
            return None
        if jax.dtypes.issubdtype(jnp.result_type(operand), jax.dtypes.extended):
            return None  # keys of random numbers, of which NumPy has none
        array = np.asarray(operand)
        return (array.shape, str(array.dtype), array.tobytes())
    if operand.square is not None:
        return None
    axes = tuple(None if axis is None else _places(axis) for axis in operand.axes)
    flags = (operand.zero, operand.constant, operand.vector)
    return (operand.shape, axes, tuple(sorted(operand.uniform)), flags)


def _places(axis: Sequence[Block]) -> tuple[int, ...]:
    """Along which other axes the frames of an axis differ."""
    return tuple(np.broadcast_shapes(*(block.refs.shape for block in axis)))


class Step(NamedTuple):
    """A body that was walked once."""

    inputs: list[Operand]  # with frames of its own
    outputs: list[Operand]
    system: System
    gains: set[int]

    def played(
        self, domain: Frames, operands: Sequence[Operand], vectors: Sequence[Vector | None]
    ) -> list[Operand]:
        """The outputs of a step with these inputs; vectors are those that inputs are along."""
        system, made = domain.system, dict[int, int]()
        domain.gains |= {_source(i, vectors) for i in self.gains}

        def outside(number: int) -> int:
            root, relation = self.system.seen(self.system.ref(number))
            if root not in made:
                new = system.new(self.system.sizes[root], self.system.kinds[root])
                made[root] = system.ref(int(new[0])).frame
            return system.number(Ref(made[root], _actual(relation, vectors)))

        def mapped(axis: Axis) -> Axis:
            if axis is None:
                return None
            return [Block(n, each(r, outside)) for n, r in refined(self.system, axis)]

        for mine, given in zip(self.inputs, operands, strict=True):
            if isinstance(mine, Framed) and isinstance(given, Framed):
                for own, other in zip(mine.axes, given.axes, strict=True):
                    if own is not None and other is not None:
                        unify(system, mapped(own) or [], other)
        results: list[Operand] = []
        for value in self.outputs:
            if isinstance(value, Framed):
                vector = value.vector
                if vector is not None:
                    vector = (_vector(vector[0], vectors), vector[1])
                value = like(value, axes=[mapped(axis) for axis in value.axes], vector=vector)
                value.key = object()
            results.append(value)
        return results


def walked(domain: Frames, body: Body, operands: Sequence[Operand], scanned: int) -> Step:
    """The body on frames of its own; the last `scanned` inputs are other ones in every step."""
    inner = domain.alone()
    first = len(operands) - scanned
    inputs = [
        _inside(inner, domain.framed(v) if isinstance(v, Framed) else v, k if k >= first else None)
        for k, v in enumerate(operands)
    ]
    results = body(*inputs, domain=cast("Reader[Operand]", inner))
    outputs = [inner.framed(v) if isinstance(v, Framed) else v for v in results]
    return Step(inputs, outputs, inner.system, inner.gains)


def _inside(inner: Frames, value: Operand, number: int | None) -> Operand:
    """An input of the body, with frames of the inner system where it has some."""
    if not isinstance(value, Framed):
        return value
    axes: list[Axis] = []
    for n, axis in zip(value.shape, value.axes, strict=True):
        if axis is None:
            axes.append(None)
            continue
        places = _places(axis)
        refs = inner.system.new(n, count=int(np.prod(places))).reshape(places)
        axes.append([Block(n, refs)])
    copy = like(value, axes=axes)
    if number is not None and copy.vector is not None:
        copy.vector = (Vector(_PLACEHOLDER + number, 0), copy.vector[1])
    copy.key = object() if value.framed or number is not None else value.key
    return copy


def _source(source: int, vectors: Sequence[Vector | None]) -> int:
    return _vector(Vector(source, 0), vectors).source


def _vector(vector: Vector, vectors: Sequence[Vector | None]) -> Vector:
    """The vector of this step that a placeholder stands for."""
    if vector.source < _PLACEHOLDER:
        return vector
    found = vectors[vector.source - _PLACEHOLDER]
    assert found is not None
    return vector._replace(source=found.source, offset=found.offset + vector.offset)


def _actual(relation: Relation, vectors: Sequence[Vector | None]) -> Relation:
    gains = ((_vector(v, vectors), power) for v, power in relation.gains)
    return relation._replace(gains=tuple(sorted(gains)))
