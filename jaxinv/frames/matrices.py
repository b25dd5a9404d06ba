"""Matrix symmetries: classes of matrices, and how an element of them moves the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import expm

from jaxinv.frames import algebras
from jaxinv.frames.algebras import Algebra
from jaxinv.frames.follow import FrameClass, Frames, Place
from jaxinv.frames.system import Kind
from jaxinv.typing import Array, Constant, DTypeLike

_Numbers = TypeVar("_Numbers", Array, np.ndarray)


class MatrixClass(NamedTuple):
    """One class of matrices: which, and where in the parameters they act."""

    kind: Kind  # GL, S, O, O1 or an algebra, see `jaxinv.frames.system`
    size: int
    name: str  # GL(8): v out ~ o in
    places: tuple[Place, ...]

    @property
    def dimension(self) -> int:
        """Number of independent matrices A."""
        n = self.size
        if isinstance(self.kind, Algebra):
            return self.kind.dimension
        return {"GL": n * n, "S": (n - 1) ** 2, "O": n * (n - 1) // 2}.get(
            self.kind, (n - 1) * (n - 2) // 2
        )

    @property
    def beyond_rescaling(self) -> int:
        """Of these, those that are not diagonal: the diagonal ones are rescalings."""
        if isinstance(self.kind, Algebra):
            return self.dimension - self.kind.diagonal
        return self.dimension - (self.size if self.kind == "GL" else 0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MatrixStructure:
    """What about matrix symmetries is known without any array: static under jit."""

    classes: tuple[MatrixClass, ...]
    leaf_shapes: tuple[tuple[int, ...], ...]


def named(found: FrameClass, leaf_names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
    """`GL(8): v out ~ o in`: where A itself acts ~ where its dual does."""
    sides: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for place in found.places:
        label = _label(place, leaf_names[place.leaf], shapes[place.leaf])
        sides[place.relation.dual][label] = None
    shown = [_listed(list(side)) for side in sides if side]
    if isinstance(found.kind, Algebra):
        return f"{found.kind} of {found.size}: {' ~ '.join(shown)}"
    group = {"GL": "GL", "O": "O", "S": "GL fixing ones", "O1": "O fixing ones"}[found.kind]
    return f"{group}({found.size}): {' ~ '.join(shown)}"


def labels(places: Sequence[Place], names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
    """Where something acts: `a in, b out and 1 more`."""
    return _listed(list(dict.fromkeys(_label(p, names[p.leaf], shapes[p.leaf]) for p in places)))


def _listed(labels: list[str]) -> str:
    more = len(labels) - 3
    return ", ".join(labels[:3]) + (f" and {more} more" if more > 0 else "")


def _label(place: Place, name: str, shape: tuple[int, ...]) -> str:
    """`attn/v out, [8:16], axis 1 at 3`."""
    side = ""
    if len(shape) == 2:
        side = " out" if place.axis == 1 else " in"
    elif len(shape) > 2:
        side = f" axis {place.axis}"
    parts = []
    start, stop = place.box[place.axis]
    if (start, stop) != (0, shape[place.axis]):
        parts.append(f"[{start}:{stop}]")
    for axis, (first, last) in enumerate(place.box):
        if axis != place.axis and (first, last) != (0, shape[axis]):
            at = str(first) if last == first + 1 else f"{first}:{last}"
            parts.append(f"axis {axis} at {at}")
    return " ".join([name + side, *parts])


# --- matrices of a kind --------------------------------------------------------------------


def project(kind: Kind, A: _Numbers) -> _Numbers:
    """The part of a matrix that is of the kind."""
    if isinstance(kind, Algebra):
        return algebras.project(kind, A)
    if kind in ("O", "O1"):
        A = (A - A.T) / 2
    if kind in ("S", "O1"):
        A = A - A.mean(axis=0) - A.mean(axis=1)[:, None] + A.mean()
    return A


def basis(kind: Kind, n: int) -> np.ndarray:
    """Independent matrices of the kind, (dimension, n, n)."""
    if isinstance(kind, Algebra):
        return algebras.basis(kind, n)
    unit = np.eye(n * n).reshape(n * n, n, n)
    if kind == "GL":
        return unit
    if kind in ("S", "O1"):
        # Ones are fixed: differences to the last coordinate move.
        d = np.eye(n)[:-1] - np.eye(n)[-1]
        pairs = np.einsum("ai,bj->abij", d, d)
        if kind == "S":
            return pairs.reshape(-1, n, n)
        i, j = np.triu_indices(n - 1, 1)
        return pairs[i, j] - pairs[j, i]
    i, j = np.triu_indices(n, 1)
    return unit[i * n + j] - unit[j * n + i]


def random_matrix(key: Array, kind: Kind, n: int, scale: float, dtype: DTypeLike) -> Array:
    """A random A of the kind; exp(A) is a matrix of the group."""
    return project(kind, scale / np.sqrt(n) * jax.random.normal(key, (n, n), dtype))


# --- action ---------------------------------------------------------------------------------


def gains_of(
    place: Place, leaves: Sequence[_Numbers], constants: Sequence[Constant]
) -> list[tuple[_Numbers, Fraction]]:
    """The vectors through which a place sees A, and their powers."""
    size = place.box[place.axis][1] - place.box[place.axis][0]
    arrays = [
        leaves[v.source] if v.source >= 0 else constants[-1 - v.source]
        for v, _ in place.relation.gains
    ]
    numbers = cast("list[_Numbers]", arrays)
    return [
        (_ordered(array.reshape(-1)[v.offset : v.offset + size], v.order), power)
        for array, (v, power) in zip(numbers, place.relation.gains, strict=True)
    ]


def _ordered(array: _Numbers, turn: tuple[int, ...]) -> _Numbers:
    return array[np.asarray(turn)] if turn else array


def _seen(
    B: _Numbers, place: Place, leaves: Sequence[_Numbers], constants: Sequence[Constant]
) -> _Numbers:
    """B as a place sees it: T·P·B·Pᵀ·T⁻¹, with T the product of its gains."""
    if place.relation.turn:
        turn = np.asarray(place.relation.turn)
        B = B[turn[:, None], turn]
    for vector, power in gains_of(place, leaves, constants):
        T = vector ** (int(power) if power.denominator == 1 else float(power))
        B = T.astype(B.dtype)[:, None] * B / T.astype(B.dtype)
    return B


def moved(
    structure: MatrixStructure,
    constants: Sequence[Constant],
    leaves: Sequence[Array],
    matrices: Sequence[Array],
    inverses: Sequence[Array],
) -> list[Array]:
    """Parameters with M acting where A does, and M⁻ᵀ where the dual does."""
    new = list(leaves)
    for found, M, N in zip(structure.classes, matrices, inverses, strict=True):
        for place in found.places:
            B = (N.T if place.relation.dual else M).astype(leaves[place.leaf].dtype)
            B = _seen(B, place, leaves, constants)
            box = tuple(slice(*ends) for ends in place.box)
            part = jnp.moveaxis(
                jnp.tensordot(B, new[place.leaf][box], (1, place.axis)), 0, place.axis
            )
            new[place.leaf] = new[place.leaf].at[box].set(part)
    return new


def acted(
    structure: MatrixStructure,
    constants: Sequence[Constant],
    leaves: Sequence[Array],
    element: Sequence[Array],
) -> list[Array]:
    """Parameters moved by exp(A) of every class."""
    return moved(
        structure,
        constants,
        leaves,
        [expm(A) for A in element],
        [expm(-A) for A in element],
    )


def tangent(
    structure: MatrixStructure,
    constants: Sequence[Constant],
    leaves: Sequence[Array],
    element: Sequence[Array],
) -> list[Array]:
    """Velocities of the parameters under exp(t·A) at t = 0."""
    velocity = [jnp.zeros_like(leaf) for leaf in leaves]
    for place, box, B in _generators(structure, constants, leaves, element):
        part = jnp.tensordot(
            B.astype(leaves[place.leaf].dtype), leaves[place.leaf][box], (1, place.axis)
        )
        velocity[place.leaf] = velocity[place.leaf].at[box].add(jnp.moveaxis(part, 0, place.axis))
    return velocity


def numpy_tangent(
    structure: MatrixStructure,
    constants: Sequence[Constant],
    leaves: Sequence[np.ndarray],
    element: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """The same of NumPy arrays: nothing is compiled for the shapes of all boxes."""
    velocity = [np.zeros_like(leaf) for leaf in leaves]
    for place, box, B in _generators(structure, constants, leaves, element):
        part = np.tensordot(B, leaves[place.leaf][box], (1, place.axis))
        velocity[place.leaf][box] += np.moveaxis(part, 0, place.axis)
    return velocity


def _generators(
    structure: MatrixStructure,
    constants: Sequence[Constant],
    leaves: Sequence[_Numbers],
    element: Sequence[_Numbers],
) -> Iterator[tuple[Place, tuple[slice, ...], _Numbers]]:
    """What multiplies each box: A, or −Aᵀ, seen through gains."""
    for found, A in zip(structure.classes, element, strict=True):
        for place in found.places:
            B = -A.T if place.relation.dual else A
            box = tuple(slice(*ends) for ends in place.box)
            yield place, box, _seen(B, place, leaves, constants)


# --- tangents whose entries are entries of the parameters ----------------------------------


def exact_classes(frames: Frames, shapes: Sequence[tuple[int, ...]]) -> MatrixStructure:
    """The classes whose tangents copy weights, without rounding, to where others are.

    No gain is in between, no difference of coordinates is taken, and no leaf has two axes in the
    class.
    """
    kept = []
    for found in frames.classes:
        axes = {(p.leaf, p.axis) for p in found.places}
        once = len(axes) == len({leaf for leaf, _ in axes})
        plain = found.kind in ("GL", "O") or (isinstance(found.kind, Algebra) and found.kind.exact)
        if plain and once and not any(p.relation.gains for p in found.places):
            kept.append(MatrixClass(found.kind, found.size, "", found.places))
    return MatrixStructure(tuple(kept), tuple(shapes))


def off_diagonal_tangents(structure: MatrixStructure, leaves: Sequence[Array]) -> Array:
    """Tangents of all matrices that are not diagonal, (parameters, Σ beyond_rescaling)."""
    dtype = jnp.result_type(*leaves)
    columns = [jnp.zeros((sum(leaf.size for leaf in leaves), 0), dtype)]
    for i, found in enumerate(structure.classes):
        all_of = basis(found.kind, found.size)
        off = all_of[np.einsum("aii->ai", all_of).any(axis=1) == 0]
        zeros = [jnp.zeros((c.size, c.size), dtype) for c in structure.classes]

        def column(A: Array, i: int = i, zeros: list[Array] = zeros) -> Array:
            moved_by = tangent(structure, (), leaves, [*zeros[:i], A, *zeros[i + 1 :]])
            return jnp.concatenate([v.ravel() for v in moved_by])

        columns.append(jax.vmap(column, out_axes=1)(jnp.asarray(off, dtype)))
    return jnp.concatenate(columns, axis=1)
