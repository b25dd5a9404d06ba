"""Another basis of a rescaling group: one generator per unit, where the group's own mixes them.

Any basis of the group is as good as another for computing with it. For a picture it is not: frozen
batch normalisation, say, gives a generator to "convolution and normalisation together" and one to
"normalisation", where a reader expects one for what is between them and one for what comes after.
Units are the sparse basis: every weight is multiplied by one generator and divided by one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxinv.rescaling import RescalingGroup
from jaxinv.rescaling.structure import layers_of

# Beyond this many pairs of generators that move a common class the group's own basis is kept.
_MOST_PAIRS = 10_000_000


def unit_basis(group: RescalingGroup) -> RescalingGroup:
    """The same group with generators that move few weights each.

    Generators are subtracted from heavier ones (those that move more weights) or added to them as
    long as that makes them lighter. Such steps are unimodular, so the result is a basis of the same
    lattice of integer exponents.

    Args:
        group: as `jaxinv.rescaling_group` returns it.

    Returns:
        A `RescalingGroup` with `dim` generators, the same ones where no step helps, as for dense
        and convolutional networks without normalisation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.pages.unit_basis import unit_basis
        >>> from jaxinv.rescaling import rescaling_group
        >>> def net(w, x):  # frozen normalisation is a scale and a shift
        ...     return jax.nn.relu((x @ w["a"]) * w["scale"] + w["shift"]) @ w["b"]
        >>> w = {"a": jnp.ones((2, 1)), "scale": jnp.ones(1), "shift": jnp.ones(1),
        ...      "b": jnp.ones((1, 2))}
        >>> group = rescaling_group(net, w, jnp.ones((1, 2)))
        >>> sorted(name.split(' → ')[0] for name in unit_basis(group).names)
        ['a', 'scale, shift']
    """
    group = _merged(group)
    structure = group.structure
    weight = _moved(group)
    rows, columns, values = (np.asarray(v, np.int64) for v in group[:3])
    while True:
        step = _best_steps(rows, columns, values, weight, group.dim)
        if step is None:
            break
        rows, columns, values = step
    indices = [tuple(map(np.asarray, terms)) for terms in group.indices]
    layers = layers_of(indices, rows, columns, values, structure.num_classes, group.dim)
    return group._replace(
        rows=rows.astype(np.int32),
        columns=columns.astype(np.int32),
        coefficients=values.astype(np.int32),
        indices=tuple(tuple(ids.astype(np.int32) for ids in terms) for terms in indices),
        structure=dataclasses.replace(structure, layers=layers),
    )


def _merged(group: RescalingGroup) -> RescalingGroup:
    """Terms of a leaf along the same axes as one, so that none cancels another; likewise constants.

    Classes are then those of one leaf each.
    """
    entry_rows, entry_columns, entry_values = (np.asarray(v, np.int64) for v in group[:3])
    order = np.argsort(entry_rows, kind="stable")
    entry_rows, entry_columns, entry_values = (
        v[order] for v in (entry_rows, entry_columns, entry_values)
    )
    total = 1
    new: list[np.ndarray] = []
    old: list[np.ndarray] = []
    indices: list[tuple[np.ndarray, ...]] = []
    for terms in group.indices:
        alike: dict[tuple[int, ...], list[np.ndarray]] = {}
        for ids in map(np.asarray, terms):
            alike.setdefault(ids.shape, []).append(ids)
        if not terms:
            indices.append(())
            continue
        constant = [ids for a in alike.values() for ids in a if ids.size == 1]
        varying = [a for a in alike.values() if a[0].size > 1] or [constant[:1]]
        rest = constant if varying[0][0].size > 1 else constant[1:]
        varying[0] = varying[0] + [np.broadcast_to(c, varying[0][0].shape) for c in rest]
        found = []
        for varying_ids in varying:
            if not varying_ids:
                continue
            stacked = np.stack([ids.ravel() for ids in varying_ids])
            combinations, where = np.unique(stacked, axis=1, return_inverse=True)
            count = combinations.shape[1]
            new.append(np.tile(np.arange(total, total + count), len(varying_ids)))
            old.append(combinations.ravel())
            found.append(np.reshape(where, varying_ids[0].shape) + total)
            total += count
        indices.append(tuple(found))
    fresh = np.concatenate([*new, np.zeros(0, np.int64)]).astype(np.int64)
    given = np.concatenate([*old, np.zeros(0, np.int64)]).astype(np.int64)
    start = np.searchsorted(entry_rows, given, "left")
    count = np.searchsorted(entry_rows, given, "right") - start
    at = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - start, count)
    keys = np.repeat(fresh, count) * max(group.dim, 1) + entry_columns[at]
    keys, which = np.unique(keys, return_inverse=True)
    values = np.zeros(len(keys), np.int64)
    np.add.at(values, which, entry_values[at])
    keys, values = keys[values != 0], values[values != 0]
    return RescalingGroup(
        keys // max(group.dim, 1),
        keys % max(group.dim, 1),
        values,
        tuple(indices),
        dataclasses.replace(group.structure, num_classes=total),
    )


def _moved(group: RescalingGroup) -> np.ndarray:
    """How many weights have each class."""
    count = np.zeros(group.structure.num_classes)
    for shape, terms in zip(group.structure.leaf_shapes, group.indices, strict=True):
        for ids in map(np.asarray, terms):
            per = int(np.prod(shape)) / ids.size
            count += per * np.bincount(ids.ravel(), minlength=len(count))
    return count


def _best_steps(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, weight: np.ndarray, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Make every generator lighter that can be; None if there is none."""
    order = np.lexsort((columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    size = np.bincount(columns, weight[rows], dim)
    starts = np.searchsorted(rows, rows, "left")
    count = np.searchsorted(rows, rows, "right") - starts
    if count.max(initial=0) < 2 or count.sum() > _MOST_PAIRS:
        return None
    one = np.repeat(np.arange(len(rows)), count)
    other = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count) + starts[one]
    v, w = columns[one], columns[other]
    # Only lighter ones are subtracted, so that all steps at once are a triangular matrix.
    lighter = (size[w] < size[v]) | ((size[w] == size[v]) & (w < v))
    one, other, v, w = one[lighter], other[lighter], v[lighter], w[lighter]
    pairs, which = np.unique(v * dim + w, return_inverse=True)
    n = len(pairs)
    v, w = pairs // dim, pairs % dim
    shared = np.bincount(which, weight[rows[one]], n)
    found = []
    for factor in (1, -1):
        equal = values[one] == factor * values[other]
        gain = shared + np.bincount(which, weight[rows[one]] * equal, n) - size[w]
        found.append((gain, np.full(n, factor)))
    gain = np.concatenate([g for g, _ in found])
    sign = np.concatenate([s for _, s in found])
    v, w = np.tile(v, 2), np.tile(w, 2)
    good = gain > 0
    gain, sign, v, w = gain[good], sign[good], v[good], w[good]
    if not len(v):
        return None
    # All helpful ones at once where they do not get in each other's way, else the best.
    order = np.lexsort((-gain, v))
    gain, sign, v, w = gain[order], sign[order], v[order], w[order]
    best = np.r_[True, v[1:] != v[:-1]]
    several = _combined(rows, columns, values, v, w, sign, dim)
    single = _combined(rows, columns, values, v[best], w[best], sign[best], dim)
    light_several = np.bincount(several[1], weight[several[0]], dim)
    light_single = np.bincount(single[1], weight[single[0]], dim)
    take = (light_several < light_single)[several[1]]
    leave = ~(light_several < light_single)[single[1]]
    joined = [np.concatenate([a[take], b[leave]]) for a, b in zip(several, single, strict=True)]
    return joined[0], joined[1], joined[2]


def _combined(
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    v: np.ndarray,
    w: np.ndarray,
    sign: np.ndarray,
    dim: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column v minus sign times column w, for all given (v, w), as sparse entries."""
    by_column = np.argsort(columns, kind="stable")
    start = np.searchsorted(columns[by_column], w, "left")
    count = np.searchsorted(columns[by_column], w, "right") - start
    at = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - start, count)
    at = by_column[at]
    keys = np.concatenate([rows * dim + columns, rows[at] * dim + np.repeat(v, count)])
    added = np.concatenate([values, -np.repeat(sign, count) * values[at]])
    keys, which = np.unique(keys, return_inverse=True)
    total = np.zeros(len(keys), np.int64)
    np.add.at(total, which, added)
    keys, total = keys[total != 0], total[total != 0]
    return keys // dim, keys % dim, total
