"""The incoming weights of every unit of a rescaling group: what is normalised to norm one.

Where units feed themselves (a residual branch that returns to its stream, a recurrence), the
weights on the way back are not counted among the incoming ones: they are the ratio of two scales of
one loop, which no rescaling changes, so a norm that counts them cannot always be made one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._numerics.vectors import summed_to
from jaxinv.errors import InvalidInput
from jaxinv.rescaling.action import log_add
from jaxinv.rescaling.group import RescalingGroup
from jaxinv.typing import Array, Constant

Incoming = tuple[tuple[Constant, Constant | None] | None, ...]  # by leaf: units, mask


class Units(NamedTuple):
    """Which weights are incoming weights of which unit: per leaf (units, mask) or None."""

    leaves: Incoming
    dim: int
    depth: int  # no chain of units that feed each other is longer

    def sums(self, leaves: list[Array]) -> Array:
        """Σ over the incoming weights of every unit, (dim,)."""
        # One more slot takes the weights that are incoming weights of no unit.
        totals = jnp.zeros(self.dim + 1, leaves[0].dtype)
        for leaf, found in zip(leaves, self.leaves, strict=True):
            if found is not None:
                units, mask = found
                kept = leaf if mask is None else jnp.where(mask, leaf, 0)
                totals = totals.at[units].add(summed_to(kept, units.shape))
        return totals[:-1]

    def log_sums(self, logs: list[Array]) -> Array:
        """log Σ exp(·) over the incoming weights of every unit, -inf for none; no overflow."""
        parts = []
        for log, found in zip(logs, self.leaves, strict=True):
            if found is not None:
                units, mask = found
                parts.append((units, log if mask is None else jnp.where(mask, log, -jnp.inf)))
        return log_add(jnp.full(self.dim + 1, -jnp.inf, logs[0].dtype), parts)[:-1]

    def norms(self, leaves: list[Array]) -> Array:
        """(Σ w²)^{1/2} over the incoming weights of every unit; squares do not overflow."""
        sizes = [abs(leaf) for leaf in leaves]
        logs = [jnp.log(lax.stop_gradient(size)) for size in sizes]
        # About the norm itself, so that the ratios are of the order of one.
        about = self.log_sums(logs)
        scale = jnp.exp(jnp.where(about > -jnp.inf, about, 0))
        ratios = [
            leaf if s is None else leaf / s
            for leaf, s in zip(leaves, self.spread(scale, 1), strict=True)
        ]
        squares = self.sums([r**2 for r in ratios])
        # Of a unit of zeros the norm has no gradient.
        return jnp.where(squares > 0, scale * jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)

    def spread(self, u: Array, fill: float = 0) -> list[Array | None]:
        """u of the unit that each weight leads into, `fill` for none; None for a whole leaf."""
        padded = jnp.append(u, jnp.full((1,), fill, u.dtype))
        spread: list[Array | None] = []
        for found in self.leaves:
            if found is None:
                spread.append(None)
            else:
                units, mask = found
                part = padded[units]
                spread.append(part if mask is None else jnp.where(mask, part, fill))
        return spread


def units_of(group: RescalingGroup) -> Units:
    """The incoming weights of every unit: those that its generator multiplies, forward ones only.

    A weight from unit i into unit j is divided by i's generator. It counts if i comes before j.
    """
    if isinstance(group.rows, jax.core.Tracer):
        raise InvalidInput(
            "the group is traced, but which weights belong to which unit must be known: close over "
            "the group instead of passing it through jit."
        )
    _, order = np.unique(np.asarray(group.structure.layers, np.int64), return_inverse=True)
    first = np.full(group.dim, group.dim)
    np.minimum.at(first, order, np.arange(group.dim))
    by_layer = _forward(group, first[order])
    if _all_reached(by_layer, group):
        return by_layer
    # Layers stacked in one leaf feed each other: there the order is that of the units.
    return _forward(group, np.arange(group.dim))


def _forward(group: RescalingGroup, order: np.ndarray) -> Units:
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    up, down = coefficients > 0, coefficients < 0
    count = np.zeros(group.structure.num_classes, np.int64)
    np.add.at(count, rows[up], coefficients[up])
    unit = np.full(group.structure.num_classes, group.dim)
    unit[rows[up]] = columns[up]
    latest = np.full(group.structure.num_classes, -1)
    np.maximum.at(latest, rows[down], order[columns[down]])
    order = np.append(order, -1)
    found: list[tuple[np.ndarray, np.ndarray | None] | None] = []
    for name, terms in zip(group.structure.leaf_names, group.indices, strict=True):
        ids = [np.asarray(i) for i in terms]
        into = [i for i in ids if count[i].any()]
        if not into:
            found.append(None)
            continue
        if len(into) > 1 or count[into[0]].max() > 1:
            raise InvalidInput(
                f"{name} holds weights that are incoming weights of several units at once (or of "
                "one unit with a power), so units cannot be normalised one by one. "
                "jaxinv.rescaling.balance and in_gauge(optimizer, group, balance) have no such "
                "limit."
            )
        units = unit[into[0]]
        source = functools.reduce(np.maximum, [latest[i] for i in ids])
        mask = source < order[units]
        mask |= units == group.dim
        found.append((units, None if mask.all() else mask))
    return Units(tuple(found), group.dim, len(np.unique(order)))


def _all_reached(units: Units, group: RescalingGroup) -> bool:
    reached = np.zeros(group.dim + 1, bool)
    for shape, found in zip(group.structure.leaf_shapes, units.leaves, strict=True):
        if found is not None and len(shape) > 1:
            ids, mask = found
            reached[
                np.broadcast_to(ids, shape)
                if mask is None
                else np.broadcast_to(ids, mask.shape)[mask]
            ] = True
    return bool(reached[:-1].all())
