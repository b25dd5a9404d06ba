"""Metrics of matrix classes: Gram matrices of what a matrix acts on, which turn with it.

Where a class acts by M on some weights W, and by M⁻ᵀ on others V,

    P = Σ W·Wᵀ → M P Mᵀ        D = Σ V·Vᵀ → M⁻ᵀ D M⁻¹

so that D⁻¹·∂L/∂W and P⁻¹·∂L/∂V turn like W and V themselves. Other axes of W and V may have
classes of their own: they are summed over in the metrics of those, D where M acts and P where M⁻ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxinv.frames import matrices as _matrices
from jaxinv.frames.follow import Place
from jaxinv.symmetries.group import SymmetryGroup
from jaxinv.typing import Array, Constant

ROTATIONS = ("O", "O1")  # to these the identity is a metric


class Metrics(NamedTuple):
    """P and D of one class; None where no place gives one."""

    primal: Array | None
    dual: Array | None


def metrics(group: SymmetryGroup, leaves: Sequence[Array], *, plain: bool = False) -> list[Metrics]:
    """P and D of every class, each over the places whose other axes have a metric.

    With `plain`, other axes are summed over as they are.
    """
    found: dict[tuple[int, bool], Array | None] = {}
    pending: set[tuple[int, bool]] = set()

    def metric(k: int, dual: bool) -> Array | None:
        """Of class k; a place that needs what is being worked out is left out."""
        if (k, dual) in pending:
            return None
        if (k, dual) not in found:
            pending.add((k, dual))
            parts = [
                gram(place) for place in group.classes[k].places if place.relation.dual == dual
            ]
            there = [part for part in parts if part is not None]
            found[k, dual] = sum(there[1:], there[0]) if there else None
            pending.discard((k, dual))
        return found[k, dual]

    def gram(place: Place) -> Array | None:
        part = seen_part(place, leaves, group.constants)
        weighted = part
        for axis in range(part.ndim):
            if axis == place.axis or plain:
                continue
            for other in _meeting(group, place, axis):
                weighted_or_none = along(weighted, place, axis, *other)
                if weighted_or_none is None:
                    return None
                weighted = weighted_or_none
        rest = [a for a in range(part.ndim) if a != place.axis]
        return jnp.tensordot(weighted, part, (rest, rest))

    def along(part: Array, place: Place, axis: int, k: int, other: Place) -> Array | None:
        T = _gain(other, leaves, group.constants)
        rotation = group.classes[k].kind in ROTATIONS
        if rotation and T is None:
            return part
        inside = all(
            low <= start and stop <= high
            for a, ((low, high), (start, stop)) in enumerate(zip(other.box, place.box, strict=True))
            if a != axis
        )
        (low, high), (start, stop) = other.box[axis], place.box[axis]
        within = start <= low and high <= stop
        # The axis is summed over with what undoes the matrix of the other class.
        if not (inside and within):
            return None
        eye = jnp.eye(group.classes[k].size, dtype=part.dtype)
        X = eye if rotation else metric(k, not other.relation.dual)
        if X is None:
            return None
        if other.relation.turn:
            turn = np.asarray(other.relation.turn)
            X = X[turn[:, None], turn]
        if T is not None:
            X = X / (T[:, None] * T)
        window = [slice(None)] * part.ndim
        window[axis] = slice(low - start, high - start)
        piece = jnp.moveaxis(jnp.tensordot(X, part[tuple(window)], (1, axis)), 0, axis)
        return part.at[tuple(window)].set(piece)

    return [Metrics(metric(k, False), metric(k, True)) for k in range(len(group.classes))]


def _meeting(group: SymmetryGroup, place: Place, axis: int) -> list[tuple[int, Place]]:
    """Classes that act along another axis on some of the weights of a place."""
    return [
        (k, other)
        for k, found in enumerate(group.classes)
        for other in found.places
        if other.leaf == place.leaf
        and other.axis == axis
        and all(
            low < stop and start < high
            for (low, high), (start, stop) in zip(other.box, place.box, strict=True)
        )
    ]


def _gain(place: Place, leaves: Sequence[Array], constants: Sequence[Constant]) -> Array | None:
    """The product of the gains through which a place sees its matrix."""
    total = None
    for vector, power in _matrices.gains_of(place, leaves, constants):
        factor = jnp.asarray(vector) ** (int(power) if power.denominator == 1 else float(power))
        total = factor if total is None else total * factor
    return total


def seen_part(place: Place, leaves: Sequence[Array], constants: Sequence[Constant]) -> Array:
    """The weights at a place, without gains and turns: A itself, or its dual, acts on them."""
    part = leaves[place.leaf][tuple(slice(*ends) for ends in place.box)]
    T = _gain(place, leaves, constants)
    part = part if T is None else part / _column(T, place.axis, part.ndim)
    return _turned_back(part, place)


def applied(
    B: Array,
    place: Place,
    leaves: Sequence[Array],
    constants: Sequence[Constant],
    target: Array,
    power: int,
) -> Array:
    """B on a block of an array like the leaf: of weights (power 1), or of gradients (−1)."""
    box = tuple(slice(*ends) for ends in place.box)
    T = _gain(place, leaves, constants)
    part = target[box]
    if T is not None:
        part = part * _column(T, place.axis, part.ndim) ** -power
    part = _turned_back(part, place)
    part = jnp.moveaxis(jnp.tensordot(B.astype(part.dtype), part, (1, place.axis)), 0, place.axis)
    if place.relation.turn:
        part = jnp.take(part, np.asarray(place.relation.turn), place.axis)
    if T is not None:
        part = part * _column(T, place.axis, part.ndim)
    return target.at[box].set(part)


def _turned_back(part: Array, place: Place) -> Array:
    turn = place.relation.turn
    return jnp.take(part, np.argsort(turn), place.axis) if turn else part


def _column(T: Array, axis: int, rank: int) -> Array:
    return T.reshape([-1 if a == axis else 1 for a in range(rank)])


def pseudo_inverses(matrices: Sequence[Array], damping: float) -> list[Array]:
    """(X + damping·tr X/n)⁺ of symmetric matrices ≥ 0; those of one size are taken together."""
    sizes: dict[int, list[int]] = {}
    for i, X in enumerate(matrices):
        sizes.setdefault(X.shape[0], []).append(i)
    out: dict[int, Array] = {}
    for n, members in sizes.items():
        together = jnp.stack([matrices[i] for i in members])
        values, vectors = jnp.linalg.eigh((together + together.mT) / 2)
        values = values + damping * values.mean(axis=-1, keepdims=True)
        least = n * jnp.finfo(values.dtype).eps * values[..., -1:]
        fine = values > jnp.maximum(least, 0)
        inverse = jnp.where(fine, 1 / jnp.where(fine, values, 1), 0)
        found = (vectors * inverse[..., None, :]) @ vectors.mT
        for i, X in zip(members, found, strict=True):
            out[i] = X
    return [out[i] for i in range(len(matrices))]
