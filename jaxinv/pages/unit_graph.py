"""The units of a network and the weights between them, read off its rescaling group.

A generator of the group is a unit: it multiplies the weights that lead into the unit and divides
those that lead out. So a weight that is divided by i and multiplied by j leads from i to j,
whatever the layers of the network are called. Inputs and outputs have scale 1 and no generator. To
see which weights touch them, their elements are given scales of their own, one side at a time,
while all weights on the other side are held: what moves along with an element reads or writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv.errors import JaxinvError
from jaxinv.pages.unit_basis import unit_basis
from jaxinv.rescaling import RescalingGroup, rescaling_group
from jaxinv.typing import Inputs, Network, Params

_ABSENT = -1


class Column(NamedTuple):
    """Units that are drawn below each other."""

    name: str  # of the leaf whose outputs they are; x, y; or of a leaf with a fixed scale
    kind: str  # "input", "hidden", "output" or "fixed"


class UnitGraph(NamedTuple):
    """Units and the weights between them, as arrays; the units of the group come first.

    An edge stands for all weights of one leaf from one unit to another: of a convolution the taps
    of its kernel. A weight that reads no unit (a bias) is an edge from -1.
    """

    names: tuple[str, ...]  # (units,)
    columns: tuple[Column, ...]  # from the input to the output
    column: np.ndarray  # (units,)
    source: np.ndarray  # (edges,), -1 for a bias
    target: np.ndarray  # (edges,)
    leaf: np.ndarray  # (edges,)
    weights: np.ndarray  # (edges,): how many
    square: np.ndarray  # (edges,): Σ w²
    log_kappa: np.ndarray  # (edges,): of the weight with the largest κ; NaN without a path norm
    share: np.ndarray  # (edges,): Σ w²κ / γ₂²; NaN without a path norm
    undrawn: tuple[int, ...]  # leaves whose weights touch no unit, input or output


class Ends(NamedTuple):
    """Which unit the weights of a leaf read (or write), as arrays that broadcast to the leaf.

    Several arrays where a weight reads several units; -1 where it reads none.
    """

    arrays: list[np.ndarray]

    def missing(self) -> np.ndarray:
        """Where no unit is found."""
        shape = np.broadcast_shapes(*(a.shape for a in self.arrays))
        nothing = np.ones(shape, bool)
        for array in self.arrays:
            nothing = nothing & (array == _ABSENT)
        return nothing


def unit_graph(
    fn: Network,
    params: Params,
    x: Inputs,
    group: RescalingGroup,
    log_kappa: Params | None = None,
    log_norm: float | None = None,
) -> UnitGraph:
    """The graph of the units of `group = rescaling_group(fn, params, x)`.

    Args:
        fn, params, x: the network.
        group: its rescaling group, in a basis of one generator per unit (see `unit_basis`).
        log_kappa: as `jaxinv.log_path_kappa` returns it for p = 2, if there is one.
        log_norm: as `jaxinv.log_path_norm` returns it.

    Returns:
        A `UnitGraph`. Nothing in it is left out or sampled.

    Raises:
        InvalidInput: if params do not fit the group.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.pages.unit_graph import unit_graph
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0], [4.0]])},
        ...      "Dense_1": {"kernel": jnp.array([[2.0]])}}
        >>> group = rescaling_group(networks.mlp, w, jnp.ones((1, 2)))
        >>> graph = unit_graph(networks.mlp, w, jnp.ones((1, 2)), group)
        >>> graph.names
        ('Dense_0/kernel → Dense_1/kernel', 'x[0]', 'x[1]', 'y[0]')
        >>> graph.source.tolist(), graph.target.tolist(), graph.square.tolist()
        ([1, 2, 0], [0, 0, 3], [9.0, 16.0, 4.0])
    """
    sources = [_ends(group, group.indices[i], -1) for i in range(len(group.indices))]
    targets = [_ends(group, group.indices[i], 1) for i in range(len(group.indices))]
    names, kinds = list(group.names), ["hidden"] * group.dim
    owner: list[Any] = list(group.structure.layers)  # what a column is called after: a leaf, x or y
    columns_of: dict[Any, int] = {}
    for ends, side in ((sources, "input"), (targets, "output")):
        found = _boundary(fn, params, x, ends, side)
        for name, root in found.names:
            names.append(name)
            kinds.append(side)
            owner.append(root)
        first = len(names) - len(found.names)
        for i, arrays in found.ends.items():
            ends[i] = Ends([np.where(a == _ABSENT, _ABSENT, a + first) for a in arrays])
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    logs = None if log_kappa is None else jax.tree.leaves(log_kappa)
    parts, undrawn = [], []
    for i, leaf in enumerate(leaves):
        reads, writes = sources[i].missing(), targets[i].missing()
        if reads.all() and writes.all():
            undrawn.append(i)
            continue
        label = group.structure.leaf_names[i]
        for ends, missing, word in ((sources, reads, "into"), (targets, writes, "out of")):
            if not missing.any():
                continue
            replacement = _ABSENT
            # One weight per unit is a bias or a scale: it is shown with its unit.
            if word == "out of" or _weights_per_unit(leaf.shape, targets[i]) > 1:
                replacement = len(names)
                names.append(f"scale fixed {word} {label}")
                kinds.append("fixed")
                owner.append((word, i))
            head = np.where(missing, replacement, ends[i].arrays[0])
            ends[i] = Ends([head, *ends[i].arrays[1:]])
        log = None if logs is None else np.asarray(logs[i], np.float64)
        parts += [
            (*edge[:2], np.full(len(edge[0]), i), *edge[2:])
            for edge in _edges(leaf, sources[i], targets[i], log, log_norm)
        ]
    joined = [np.concatenate([p[k] for p in parts]) if parts else np.zeros(0) for k in range(7)]
    source, target, of_leaf = (joined[k].astype(np.int64, copy=False) for k in range(3))
    order, column = _columns(group, kinds, owner, source, target, columns_of)
    return UnitGraph(
        tuple(names),
        order,
        column,
        source,
        target,
        of_leaf,
        joined[3].astype(np.int64, copy=False),
        joined[4],
        joined[5],
        joined[6],
        tuple(undrawn),
    )


# --- which unit a weight reads and writes ---------------------------------------------


def _ends(group: RescalingGroup, terms: tuple[Any, ...], sign: int) -> Ends:
    """Units whose generators divide (sign -1) or multiply (+1) the weights of one leaf."""
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    chosen = np.sign(coefficients) == sign
    rows, columns = rows[chosen], columns[chosen]
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]
    # Where a class has several generators, the k-th of each goes into the k-th table.
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    arrays = []
    for k in range(int(place.max(initial=-1)) + 1):
        table = np.full(group.structure.num_classes, _ABSENT)
        table[rows[place == k]] = columns[place == k]
        arrays += [table[np.asarray(ids)] for ids in terms]
    arrays = [a for a in arrays if (a != _ABSENT).any()]
    return Ends(arrays or [np.full((1,) * _ndim(terms), _ABSENT)])


def _ndim(terms: tuple[Any, ...]) -> int:
    return max([np.ndim(ids) for ids in terms] + [0])


class _Boundary(NamedTuple):
    names: list[tuple[str, str]]  # name of the element or channel, and of its array
    ends: dict[int, list[np.ndarray]]  # leaf -> like Ends.arrays, numbered within names


def _boundary(fn: Network, params: Params, x: Inputs, ends: list[Ends], side: str) -> _Boundary:
    """Elements of the inputs (or outputs) and the weights that read (or write) them.

    Only leaves that read no unit can read an input. Their scales and those of the input elements
    are free, all other weights are held: then hidden units are too, since those weights lead out of
    them. The same at the other end.
    """
    nothing = _Boundary([], {})
    leaves, tree = jax.tree.flatten(params)
    free = [i for i, found in enumerate(ends) if found.missing().all() and leaves[i].ndim > 0]
    one = _checks.abstract_batch_of_one(x)
    y = jax.eval_shape(fn, params, one)
    edge = one if side == "input" else y
    arrays = jax.tree.leaves(edge)
    scaled = [
        k
        for k, a in enumerate(arrays)
        if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim > 0 and a.shape[0] == 1
    ]
    if not (free and scaled):
        return nothing
    # Not ones and not zeros: a program may subtract means, or skip what is zero.
    draw = np.random.default_rng(0)
    held = [jnp.asarray(draw.uniform(0.5, 1.5, a.shape), a.dtype) for a in leaves]

    def scale(values: Any, scales: list[Any]) -> Any:
        flat, structure = jax.tree.flatten(values)
        for k, s in zip(scaled, scales, strict=True):
            flat[k] = flat[k] * s
        return jax.tree.unflatten(structure, flat)

    def extended(w: Any, x: Any) -> Any:
        weights = list(held)
        for i, leaf in zip(free, w["free"], strict=True):
            weights[i] = leaf
        network = jax.tree.unflatten(tree, weights)
        if side == "input":
            return fn(network, scale(x, w["scales"]))
        return scale(fn(network, x), w["scales"])

    scales = [jnp.ones(arrays[k].shape[1:], arrays[k].dtype) for k in scaled]
    try:
        extra = {"free": [leaves[i] for i in free], "scales": scales}
        group = unit_basis(rescaling_group(extended, extra, one))
    except JaxinvError:  # a picture without inputs rather than none
        return nothing
    roots = _checks.leaf_names(edge, "x" if side == "input" else "y")
    names: list[tuple[str, str]] = []
    sign = 1 if side == "input" else -1
    number = np.full(group.dim + 1, _ABSENT)  # one more, so that -1 stays -1
    for k, s, terms in zip(scaled, scales, group.indices[len(free) :], strict=True):
        for array in _ends(group, terms, sign).arrays:
            found, first, count = np.unique(array, return_index=True, return_counts=True)
            for at in np.argsort(first).tolist():  # in the order of the elements
                if found[at] != _ABSENT and number[found[at]] == _ABSENT:
                    number[found[at]] = len(names)
                    element = _element(roots[k], s.shape, array.shape, first[at], count[at])
                    names.append((element, roots[k]))
    result = {}
    for i, terms in zip(free, group.indices[: len(free)], strict=True):
        numbered = [number[a] for a in _ends(group, terms, -sign).arrays]
        if any((a != _ABSENT).any() for a in numbered):
            result[i] = numbered
    return _Boundary(names, result)


def _element(
    root: str, shape: tuple[int, ...], along: tuple[int, ...], first: int, count: int
) -> str:
    """`x[:, :, 2]`: the elements of an input that share a scale."""
    index = np.unravel_index(first, along) if along else ()
    place = [
        ":" if a == 1 and n > 1 else str(int(i))
        for i, a, n in zip(index, along, shape, strict=True)
    ]
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{root}[{', '.join(place)}]{more}" if place else root + more


def _weights_per_unit(shape: tuple[int, ...], ends: Ends) -> int:
    units = np.unique(ends.arrays[0])
    return int(np.prod(shape)) // max(1, int((units != _ABSENT).sum()))


# --- edges and columns ----------------------------------------------------------------


def _edges(
    leaf: np.ndarray,
    sources: Ends,
    targets: Ends,
    log_kappa: np.ndarray | None,
    log_norm: float | None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """(source, target, weights, Σw², log κ, share) of the edges of one leaf."""
    square = leaf**2
    share = largest = None
    if log_kappa is not None and log_norm is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.exp(np.log(square) + log_kappa - 2 * log_norm)
        # 0·∞ can only come of a weight 0; on a path norm 0 nothing has a share.
        share = np.where(square == 0, 0.0, share)
        largest = log_kappa
    for a in sources.arrays:
        for b in targets.arrays:
            first, second = np.broadcast_arrays(a, b)
            ones = tuple(i for i, n in enumerate(first.shape) if n == 1)
            per_edge = leaf.size // max(first.size, 1)
            sums = [np.sum(square, ones).ravel()]
            if share is not None and largest is not None:
                sums += [np.max(largest, ones).ravel(), np.sum(share, ones).ravel()]
            else:
                sums += [np.full(first.size, np.nan)] * 2
            if _is_grid(a, b):  # as dense layers are: nothing to put together, nor to leave out
                weights = np.full(first.size, per_edge)
                yield first.ravel(), second.ravel(), weights, *sums
                continue
            first, second = first.ravel(), second.ravel()
            kept = second != _ABSENT
            if a is not sources.arrays[0]:
                kept &= first != _ABSENT
            first, second = first[kept], second[kept]
            # One number for a pair: rows of two would be sorted as such, many times slower.
            width = int(second.max(initial=0)) + 1
            pairs, which = np.unique((first + 1) * width + second, return_inverse=True)
            n = len(pairs)
            top = np.full(n, -np.inf)
            with np.errstate(invalid="ignore"):  # a NaN stays one
                np.maximum.at(top, which, sums[1][kept])
            yield (
                pairs // width - 1,
                pairs % width,
                np.bincount(which, minlength=n) * per_edge,
                np.bincount(which, sums[0][kept], n),
                top,
                np.bincount(which, sums[2][kept], n),
            )


def _is_grid(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether units in ascending order meet each other once, none absent, pairs in order."""

    def ascends(units: np.ndarray) -> bool:
        flat = units.ravel()
        return bool(flat[0] != _ABSENT and (np.diff(flat) > 0).all())

    axes_a, axes_b = ([i for i, n in enumerate(v.shape) if n > 1] for v in (a, b))
    ordered = max(axes_a, default=-1) < min(axes_b, default=a.ndim)
    return bool(a.size and b.size and ordered and ascends(a) and ascends(b))


def _columns(
    group: RescalingGroup,
    kinds: list[str],
    owner: list[Any],
    source: np.ndarray,
    target: np.ndarray,
    found: dict[Any, int],
) -> tuple[tuple[Column, ...], np.ndarray]:
    """Columns in the order of the group's generators, inputs before, outputs behind.

    A fixed scale stands right behind the units that lead to it, or before those that it leads to.
    """
    keys = list(zip(kinds, owner, strict=True))
    for key in keys:
        found.setdefault(key, len(found))
    of_unit = np.array([found[key] for key in keys], np.int64)
    hidden = [k for k in found if k[0] == "hidden"]
    at = {k: float(i) for i, k in enumerate(hidden)}
    at |= {k: -1.0 for k in found if k[0] == "input"}
    at |= {k: float(len(hidden)) for k in found if k[0] == "output"}
    position = np.array([at.get(k, np.nan) for k in found])
    for key, i in found.items():
        if key[0] == "fixed":
            unit = int(np.flatnonzero(of_unit == i)[0])
            before = key[1][0] == "into"
            others = target[source == unit] if before else source[target == unit]
            where = position[of_unit[others[others >= 0]]]
            where = where[~np.isnan(where)]
            anchor = (where.min() if before else where.max()) if where.size else len(hidden) / 2
            position[i] = anchor - 0.4 if before else anchor + 0.4
    order = np.argsort(position, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    names = group.structure.leaf_names
    listed = list(found)

    def column(i: int) -> Column:
        kind, what = listed[i]
        if kind == "hidden":
            return Column(names[what], kind)
        if kind == "fixed":
            return Column(f"scale fixed {what[0]} {names[what[1]]}", kind)
        return Column(what, kind)

    return tuple(column(i) for i in order), rank[of_unit]
