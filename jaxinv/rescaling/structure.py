"""From solved equations to a group: independent generators, integer exponents, readable names."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import jax
import numpy as np

from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.domain import ScalingDomain, gather_parts
from jaxinv.rescaling.equations import (
    Rows,
    Solution,
    check_exact,
    distinct,
    independent_columns,
    ranges,
)
from jaxinv.typing import Constant, PyTree

_MANY = 1 << 16  # so many columns are worth looking for repetitions in


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Structure:
    """What about a group is known without any array: static under jit."""

    dim: int
    num_classes: int
    tree: jax.tree_util.PyTreeDef
    leaf_names: tuple[str, ...]
    leaf_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    unused: tuple[str, ...]
    pinned_by: tuple[tuple[str, str], ...]
    tied_by: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    relies_on: tuple[tuple[str, str, str], ...]


class _Matrix(NamedTuple):
    """Classes in terms of free unknowns: entries numerator/denominator at (row, free)."""

    row: np.ndarray
    free: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray


class _Classes(NamedTuple):
    """Distinct terms coefficient·v over all leaves, numbered; class 0 is scale 0."""

    roots: dict[Fraction, np.ndarray]  # coefficient: the variables v, sorted
    starts: dict[Fraction, int]  # coefficient: the class of the first of them
    total: int
    indices: list[tuple[np.ndarray, ...]]  # per leaf and term: the class of every element


def assembled(
    domain: ScalingDomain, leaves: list[scaling.Leaf], tree: PyTree
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[tuple[np.ndarray, ...], ...], Structure]:
    """The fields of the group: free unknowns become generators with integer exponents."""
    system = domain.system
    unused = _gathered(domain, leaves)
    solution = system.solve()
    classes = _classes([scaling.tidy(system, leaf.form or ()) for leaf in leaves])
    matrix = _matrix(classes, solution)
    _, seen, _, _ = solution.of(system.read())
    inverse = [leaf.inverse for leaf in leaves]
    columns, dead = _generators(classes.indices, inverse, matrix, classes.total, seen)
    unused += _shares(leaves, dead)
    rows, generator, exponents = _integers(matrix, columns)
    structure = Structure(
        dim=len(columns),
        num_classes=classes.total,
        tree=tree,
        leaf_names=tuple(leaf.name for leaf in leaves),
        leaf_shapes=tuple(leaf.shape for leaf in leaves),
        layers=layers_of(classes.indices, rows, generator, exponents, classes.total, len(columns)),
        unused=tuple(unused),
        pinned_by=tuple(domain.pinned_by),
        tied_by=tuple(found for found in domain.tied_by if found not in domain.pinned_by),
        ignored=tuple(domain.ignored),
        relies_on=tuple(domain.relies_on),
    )
    return (
        rows.astype(np.int32),
        generator.astype(np.int32),
        exponents.astype(np.int32),
        tuple(tuple(ids.astype(np.int32) for ids in terms) for terms in classes.indices),
        structure,
    )


def _gathered(domain: ScalingDomain, leaves: list[scaling.Leaf]) -> list[str]:
    """Put together the leaves that were used in parts; returns the names of those never used."""
    unused = []
    for leaf in leaves:
        if leaf.form is None and leaf.parts is None:
            unused.append(leaf.name)
        elif leaf.form is None:
            gather_parts(domain, leaf)
    return unused


def _classes(forms: list[scaling.Form]) -> _Classes:
    variables: dict[Fraction, list[np.ndarray]] = {}
    for form in forms:
        for c, ids in form:
            variables.setdefault(c, []).append(ids.ravel())
    roots = {c: distinct(np.concatenate(parts)) for c, parts in variables.items()}
    roots = {c: ids[ids > 0] for c, ids in roots.items()}
    starts, tables, total = {}, {}, 1
    for c, ids in roots.items():
        starts[c] = total
        tables[c] = np.zeros(int(ids.max(initial=0)) + 1, np.int64)
        tables[c][ids] = total + np.arange(len(ids))
        total += len(ids)
    indices = [tuple(tables[c][ids] for c, ids in form) for form in forms]
    return _Classes(roots, starts, total, indices)


def _matrix(classes: _Classes, solution: Solution) -> _Matrix:
    """Every class in terms of the unknowns that the equations leave free."""
    entries = []
    for c, ids in classes.roots.items():
        which, free, numerator, denominator = solution.of(ids)
        check_exact([c.numerator, c.denominator])
        row = classes.starts[c] + which
        entries.append((row, free, numerator * c.numerator, denominator * c.denominator))
    empty = np.zeros(0, np.int64)
    return _Matrix(*(np.concatenate([e[i] for e in entries] + [empty]) for i in range(4)))


def _shares(leaves: list[scaling.Leaf], dead: list[np.ndarray | None]) -> list[str]:
    """Leaves with dead elements by name, and how many of their elements are dead unless all are."""
    found = []
    for leaf, mask in zip(leaves, dead, strict=True):
        if mask is not None:
            size = int(np.prod(leaf.shape))
            count = int(mask.sum()) * size // mask.size
            found.append(leaf.name + (f" ({count} of {size} elements)" if count < size else ""))
    return found


def _integers(matrix: _Matrix, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, generator, exponent) of the entries in the columns: integers without common factor.

    2^(Bk) is then a power of two for integer k.
    """
    keep = _table(columns, 1 + int(matrix.free.max(initial=0)))[matrix.free]
    rows, free, numerator, denominator = (v[keep] for v in matrix)
    generator = np.searchsorted(columns, free)
    multiple = np.ones(len(columns), np.int64)
    np.lcm.at(multiple, generator, denominator)
    exponents = numerator * (multiple[generator] // denominator)
    divisor = np.zeros(len(columns), np.int64)
    np.gcd.at(divisor, generator, exponents)
    return rows, generator, check_exact(exponents // divisor[generator])


def _generators(
    indices: list[tuple[np.ndarray, ...]],
    inverse: list[bool],
    matrix: _Matrix,
    num_classes: int,
    seen: np.ndarray,
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """A basis of the group: free unknowns that move live parameters, and independently.

    Also returns, per leaf, which elements are dead. Whatever reads a value into a product with
    parameters divides those parameters by its scale (or multiplies them, where they are divided
    by); other ways to depend on it are marked as `seen`. So a generator that only multiplies
    parameters, and is not seen, belongs to a unit that is computed and then dropped: the function
    does not depend on its weights. Without those, units that feed only them may be dead in turn.
    """
    dead: list[np.ndarray | None] = [None] * len(indices)
    size = 1 + max(int(ids.max(initial=0)) for ids in (matrix.free, seen))
    while True:
        columns = _basis(indices, matrix, dead)
        wanted = _table(columns, size)
        keep = wanted[matrix.free]
        row, free, sign = matrix.row[keep], matrix.free[keep], np.sign(matrix.numerator[keep])
        live = np.zeros((2, num_classes), bool)
        for terms, mask, divides in zip(indices, dead, inverse, strict=True):
            for ids in terms:
                shown = ids if mask is None else np.broadcast_to(ids, mask.shape)[~mask]
                live[int(divides), shown] = True
        up = live[0, row] & (sign > 0) | live[1, row] & (sign < 0)
        down = live[0, row] & (sign < 0) | live[1, row] & (sign > 0)
        kept = _table(free[up], size) & _table(free[down], size) | _table(seen, size)
        dropped = wanted & ~kept
        if not dropped.any():
            return columns, dead
        gone = np.zeros(num_classes, bool)
        gone[row[dropped[free]]] = True
        for i, terms in enumerate(indices):
            masks = [gone[ids] for ids in terms]
            if any(m.any() for m in masks):
                shape = np.broadcast_shapes(*(ids.shape for ids in terms))
                masks += [] if dead[i] is None else [dead[i]]
                dead[i] = np.logical_or.reduce([np.broadcast_to(m, shape) for m in masks])


def _basis(
    indices: list[tuple[np.ndarray, ...]], matrix: _Matrix, dead: list[np.ndarray | None]
) -> np.ndarray:
    """Free unknowns on which the rows of B, of live parameters, project one to one.

    The rows of B are sums of one class per term, so differences within a term and one base row
    per leaf span them: no need for one row per parameter.
    """
    if not matrix.row.size:
        return np.zeros(0, np.int64)
    combination = _combinations(matrix, max(int(i.max(initial=0)) for ids in indices for i in ids))
    equal: list[tuple[np.ndarray, np.ndarray]] = []
    row: list[np.ndarray] = []
    cls: list[np.ndarray] = []
    sign: list[np.ndarray] = []
    done = 0
    for terms, mask in zip(indices, dead, strict=True):
        if mask is None:
            groups = _joint(terms)
            first = np.array([ids.flat[0] for ids in terms], np.int64)
        else:
            alive = np.stack([np.broadcast_to(ids, mask.shape)[~mask] for ids in terms])
            groups = [alive] if alive.size else []
            first = alive[:, 0] if alive.size else np.zeros(0, np.int64)
        for group in groups:
            base = group[:, :1]
            if len(group) == 1:
                different = distinct(group[0])[None]
                alone = combination.alone(different[0])
                if alone is not None:
                    equal.append((alone, alone[different[0] == base[0]]))
                    continue
            else:
                different = group[:, (group != base).any(axis=0)]
                if different.shape[1] > _MANY:
                    different = np.unique(different, axis=1)
            n, t = different.shape[1], len(group)
            both = np.concatenate([different, np.broadcast_to(base, (t, n))])
            row.append(np.tile(np.arange(done, done + n), 2 * t))
            cls.append(both.ravel())
            sign.append(np.repeat([1, -1], n * t))
            done += n
        row.append(np.full(len(first), done))
        cls.append(first)
        sign.append(np.ones(len(first), np.int64))
        done += 1
    classes, signs = np.concatenate(cls), np.concatenate(sign)
    count = combination.size[classes]
    at = ranges(combination.start[classes], count)
    values = combination.values[at] * np.repeat(signs, count)
    given = Rows(np.repeat(np.concatenate(row), count), combination.free[at], values)
    return independent_columns(given, equal)


def _table(ids: np.ndarray, size: int) -> np.ndarray:
    """Which of the integers below size are among these."""
    found = np.zeros(size, bool)
    found[ids] = True
    return found


class _Combinations(NamedTuple):
    """Every class as Σ values·v[free] over a common denominator."""

    start: np.ndarray  # per class, where its entries begin
    size: np.ndarray  # and how many it has
    free: np.ndarray
    values: np.ndarray

    def alone(self, classes: np.ndarray) -> np.ndarray | None:
        """The unknown that each class is one and the same multiple of (0 for none), if it is."""
        if not self.values.size or (self.size[classes] > 1).any():
            return None
        at = np.minimum(self.start[classes], self.values.size - 1)
        present = self.size[classes] == 1
        values = self.values[at][present]
        if values.size and (values != values[0]).any():
            return None
        return np.where(present, self.free[at], 0)


def _combinations(matrix: _Matrix, last: int) -> _Combinations:
    order = np.argsort(matrix.row, kind="stable")
    row, free, numerator, denominator = (v[order] for v in matrix)
    scale = lcm(*distinct(denominator).tolist())
    count = np.bincount(row, minlength=last + 1)
    return _Combinations(np.cumsum(count) - count, count, free, numerator * (scale // denominator))


def _joint(terms: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Terms that vary along common axes, as (terms, elements) arrays of classes."""
    form = tuple(scaling.Term(scaling.ONE, ids) for ids in terms if ids.size > 1)
    groups = scaling.overlapping(form)
    return [scaling.columns_of(group).T for group in groups]


def layers_of(
    indices: list[tuple[np.ndarray, ...]],
    rows: np.ndarray,
    generator: np.ndarray,
    exponents: np.ndarray,
    num_classes: int,
    dim: int,
) -> tuple[int, ...]:
    """For every generator the first leaf, kernels before vectors, that it multiplies."""
    order = sorted(range(len(indices)), key=lambda i: max([a.ndim for a in indices[i]] + [0]) < 2)
    first = np.full(num_classes, len(indices))
    for rank, i in reversed(list(enumerate(order))):
        for ids in indices[i]:
            first[ids.ravel()] = rank
    layer = np.full(dim, len(indices))
    up = exponents > 0
    np.minimum.at(layer, generator[up], first[rows[up]])
    return tuple(np.array([*order, 0])[layer].tolist())


# --- names ----------------------------------------------------------------------------

_MOST_NAMES = 3  # leaves listed on either side of an arrow


def generator_names(
    structure: Structure,
    matrix: tuple[Constant, Constant, Constant],
    indices: tuple[tuple[Constant, ...], ...],
) -> list[str]:
    """For every generator the weights that it multiplies → the weights that it divides."""
    s = structure
    sides: list[dict[int, list[str]]] = [{}, {}]
    vectors: list[dict[int, list[str]]] = [{}, {}]
    rows, columns, coefficients = map(np.asarray, matrix)
    for name, shape, terms in zip(s.leaf_names, s.leaf_shapes, indices, strict=True):
        chosen = sides if len(shape) > 1 else vectors
        for classes, ids in zip(map(np.asarray, terms), terms, strict=True):
            found, first, count = np.unique(classes, return_index=True, return_counts=True)
            place = np.full(s.num_classes, -1)
            place[found] = np.arange(len(found))
            entries = np.flatnonzero(place[rows] >= 0)
            where = place[rows[entries]]
            listed = zip(
                _positions(name, shape, ids.shape, first[where], count[where]),
                columns[entries].tolist(),
                coefficients[entries].tolist(),
                strict=True,
            )
            for (into, out_of), column, c in listed:
                label = (into if c > 0 else out_of) + (f" (^{abs(c)})" if abs(c) != 1 else "")
                chosen[c <= 0].setdefault(column, []).append(label)
    return [
        " → ".join(
            _listed(side.get(j) or vector.get(j))
            for side, vector in zip(sides, vectors, strict=True)
        )
        for j in range(s.dim)
    ]


def _listed(labels: list[str] | None) -> str:
    if not labels:
        return "nothing"
    more = len(labels) - _MOST_NAMES
    return ", ".join(labels[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _positions(
    name: str, shape: tuple[int, ...], along: tuple[int, ...], first: np.ndarray, count: np.ndarray
) -> list[tuple[str, str]]:
    """`kernel out 17`: places of classes on the axes along which they vary, multiplied, divided."""
    axes = [a for a, n in enumerate(along) if n > 1]
    if not axes:
        return [(name, name)] * len(first)
    before, after = (f"{name} in [", f"{name} out ["), "]"
    if len(shape) < 2:
        before, after = (f"{name} ",) * 2, ""
    elif axes == [len(shape) - 1]:
        before, after = (f"{name} out ",) * 2, ""
    elif axes == [len(shape) - 2]:
        before, after = (f"{name} in ",) * 2, ""
    index = np.unravel_index(first, along)
    found = []
    for n, *at in zip(count.tolist(), *(index[a].tolist() for a in axes), strict=True):
        place = ",".join(map(str, at)) + after + (f" and {n - 1} more" if n > 1 else "")
        found.append((before[1] + place, before[0] + place))
    return found
