"""Linear equations between unknown log-scales, solved exactly.

Every unknown is an integer id; id 0 is the number zero. Equalities of two unknowns, which are
nearly all equations of a network, are merged at once (union-find on whole arrays). The others wait
until `solve`, which eliminates them in integer arithmetic. Nothing loops over single unknowns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import numpy as np

from jaxinv.errors import ExponentOverflow

# Integer elimination divides each row by its gcd, so coefficients stay tiny; beyond this they
# would be about to overflow int64, and a wrong answer must not come out.
_LARGEST = 2**30
_MANY = 1 << 16  # so many equations are worth looking for repetitions in


def check_exact(values: Sequence[int] | np.ndarray) -> np.ndarray:
    """Integers as int64; `ExponentOverflow` unless products of two of them fit into that."""
    found = np.asarray(values, None if isinstance(values, np.ndarray) else object)
    if np.abs(found).max(initial=0) > _LARGEST:
        raise ExponentOverflow(
            "exponents of the scale classes are too large to solve for exactly: the network raises "
            f"values to powers that combine to more than {_LARGEST}. Use smaller powers, or apply "
            "jaxinv to the part of the network before them."
        )
    return found.astype(np.int64)


class System:
    """Unknown log-scales: new ones, equal ones, and linear equations between them."""

    def __init__(self) -> None:
        self.parent = np.zeros(1024, np.int64)
        self.size = 1
        self.blocks: list[tuple[tuple[Fraction, ...], np.ndarray]] = []
        self._seen: set[bytes] = set()
        self._read: list[np.ndarray] = []
        # What became of unknowns that were there before `watched` began.
        self._before, self.fixed, self.tied = 0, False, False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A scope after which `fixed` and `tied` say whether old unknowns became 0, or equal."""
        self._before, self.fixed, self.tied = self.size, False, False
        yield
        self._before = 0

    def new(self, shape: Sequence[int]) -> np.ndarray:
        """Fresh unknowns, as an array of ids."""
        count = int(np.prod(shape, dtype=np.int64))
        while self.size + count > len(self.parent):
            self.parent = np.concatenate([self.parent, np.zeros_like(self.parent)])
        ids = np.arange(self.size, self.size + count)
        self.parent[ids] = ids
        self.size += count
        return ids.reshape(shape)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The smallest id that each of these is known to equal."""
        root = self.parent[ids]
        while True:
            above = self.parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self.parent[ids] = root
        return root

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Set unknowns equal elementwise."""
        a, b = (np.ravel(v) for v in np.broadcast_arrays(a, b))
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            smaller, larger = np.minimum(a, b), np.maximum(a, b)
            self._note(smaller, larger)
            # Every larger root hangs on the smallest of its partners; edges that lose this round
            # still join different roots, or already equal ones, in the next.
            np.minimum.at(self.parent, larger, smaller)

    def _note(self, smaller: np.ndarray, larger: np.ndarray) -> None:
        if not self._before:
            return
        of_old = smaller[larger < self._before]
        self.fixed |= bool((of_old == 0).any())
        self.tied |= bool((of_old != 0).any())

    def equation(self, coefficients: Sequence[Fraction], ids: np.ndarray) -> None:
        """Σ_t coefficients[t] · v[ids[:, t]] = 0 for every row."""
        ids = self.find(np.asarray(ids))
        columns: dict[bytes, tuple[Fraction, np.ndarray]] = {}
        for t, c in enumerate(coefficients):
            column = np.ascontiguousarray(ids[:, t])
            if column.any():
                key = column.tobytes()
                columns[key] = (columns.get(key, (Fraction(0),))[0] + c, column)
        kept = [(c, column) for c, column in columns.values() if c]
        if not kept:
            return
        if len(kept) == 1:
            self.union(kept[0][1], np.zeros(1, np.int64))
        elif len(kept) == 2 and kept[0][0] == -kept[1][0]:
            self.union(kept[0][1], kept[1][1])
        else:
            cs = tuple(c for c, _ in kept)
            rows = np.stack([column for _, column in kept], axis=1)
            varying = np.flatnonzero((rows != rows[0]).any(axis=0))
            if len(varying) == 1:  # what c·v equals is the same in all rows, and so is v
                self.union(rows[:, varying[0]], rows[0, varying[0]])
            if len(varying) <= 1:
                rows = self.find(rows[:1])
            if len(rows) > _MANY:
                rows = np.unique(rows, axis=0)
            key = repr(cs).encode() + rows.tobytes()
            if key not in self._seen:
                self._seen.add(key)
                self.blocks.append((cs, rows))
                # More equations than new unknowns say something of the old ones.
                new = distinct(rows[rows >= self._before]).size if self._before else len(rows)
                self.tied |= len(rows) > new

    def mark_read(self, ids: np.ndarray) -> None:
        """Note that something looked at these unknowns without an equation coming of it."""
        self._read.append(distinct(self.find(ids)))

    def read(self) -> np.ndarray:
        return distinct(self.find(np.concatenate([np.zeros(1, np.int64), *self._read])))

    def solve(self) -> Solution:
        """Every unknown as a combination of independent ones."""
        return Solution(self, _reduced(_echelon(self.contracted(self._rows()))))

    def contracted(self, rows: Rows) -> Rows:
        """The rows that are left when those that say v = 0 or v = w are taken as unions."""
        while True:
            rows = _merged(rows._replace(col=self.find(rows.col)))
            start, count = rows.starts()
            one = start[count == 1]
            two = start[count == 2]
            two = two[rows.val[two] == -rows.val[two + 1]]
            if not one.size and not two.size:
                return rows
            self.union(rows.col[one], np.zeros(1, np.int64))
            self.union(rows.col[two], rows.col[two + 1])
            left = np.ones(len(start), bool)
            left[rows.row[one]] = left[rows.row[two]] = False
            left = left[rows.row]
            rows = Rows(rows.row[left], rows.col[left], rows.val[left])

    def _rows(self) -> Rows:
        row, col, val, done = [], [], [], 0
        for coefficients, ids in self.blocks:
            denominator = lcm(*[c.denominator for c in coefficients])
            integers = check_exact([int(c * denominator) for c in coefficients])
            row.append(np.repeat(np.arange(done, done + len(ids)), ids.shape[1]))
            col.append(ids.ravel())
            val.append(np.tile(integers, len(ids)))
            done += len(ids)
        empty = [np.zeros(0, np.int64)]
        return Rows(*(np.concatenate(part + empty) for part in (row, col, val)))


class Rows(NamedTuple):
    """A sparse integer matrix: entries sorted by row, then column; no zero entry, no empty row."""

    row: np.ndarray
    col: np.ndarray
    val: np.ndarray

    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each row begins among the entries, and how many entries it has."""
        if not self.row.size:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        start = np.flatnonzero(np.r_[True, self.row[1:] != self.row[:-1]])
        return start, np.diff(np.r_[start, self.row.size])


class Solution:
    """Unknowns in terms of the free ones: v = Σ_j (numerator / denominator) · v_j."""

    def __init__(self, system: System, rows: Rows):
        self.system, self.rows = system, rows
        start, count = rows.starts()
        last = start + count - 1
        self.pivots, self.first, self.count = rows.col[last], start, count - 1
        self.leading = rows.val[last]

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(which id, free unknown, numerator, denominator) of the combinations equal to ids."""
        root = self.system.find(ids)
        place = np.searchsorted(self.pivots, root)
        solved = np.zeros(len(ids), bool)
        inside = place < len(self.pivots)
        solved[inside] = self.pivots[place[inside]] == root[inside]
        free = np.flatnonzero(~solved & (root != 0))
        which = np.flatnonzero(solved)
        place = place[which]
        entries = ranges(self.first[place], self.count[place])
        owner = np.repeat(which, self.count[place])
        leading = np.repeat(self.leading[place], self.count[place])
        return (
            np.concatenate([free, owner]),
            np.concatenate([root[free], self.rows.col[entries]]),
            np.concatenate([np.ones(free.size, np.int64), -self.rows.val[entries]]),
            np.concatenate([np.ones(free.size, np.int64), leading]),
        )


def independent_columns(rows: Rows, equal: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Columns on which the row space projects one to one; their number is the rank.

    `equal` are further rows, e_a − e_b for arrays of columns a and b. Column 0 is no column.
    """
    largest = [int(a.max(initial=0)) for pair in equal for a in pair]
    system = System()
    system.new((max([int(rows.col.max(initial=0)), *largest]),))
    columns = distinct(np.concatenate([rows.col, *(a for pair in equal for a in pair)]))
    for a, b in equal:
        system.union(a, b)
    # Of columns that are said to be equal the smallest is left: the others are last in a row.
    rows = _echelon(system.contracted(rows))
    start, count = rows.starts()
    joined = columns[system.find(columns) != columns]
    return np.sort(np.concatenate([joined, rows.col[start + count - 1]]))


def distinct(ids: np.ndarray) -> np.ndarray:
    """The distinct ones of integers ≥ 0, sorted; by a table where there are many."""
    ids = np.ravel(ids)
    size = int(ids.max(initial=0)) + 1
    if size > 8 * len(ids):
        return np.unique(ids)
    present = np.zeros(size, bool)
    present[ids] = True
    return np.flatnonzero(present)


# --- exact elimination on sparse integer rows -----------------------------------------


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0] … start[0]+count[0]−1, start[1] …, concatenated."""
    if not count.sum():
        return np.zeros(0, np.int64)
    offset = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(start - offset, count)


def _merged(rows: Rows) -> Rows:
    """Entries of one place added, zeros dropped, every row divided by its gcd, duplicates dropped.

    Rows are numbered anew; the order of the entries is by row, then column.
    """
    return _distinct_rows(_summed(rows))


def _summed(rows: Rows) -> Rows:
    """The same without looking for duplicates, under the old numbers."""
    keep = rows.col != 0
    row, col, val = rows if keep.all() else (part[keep] for part in rows)
    if not row.size:
        return Rows(row, col, val)
    order = _order(row, col)
    row, col, val = row[order], col[order], val[order]
    new = np.r_[True, (row[1:] != row[:-1]) | (col[1:] != col[:-1])]
    if not new.all():
        first = np.flatnonzero(new)
        val = np.add.reduceat(val, first)
        row, col = row[first], col[first]
    if not val.all():
        row, col, val = row[val != 0], col[val != 0], val[val != 0]
        if not row.size:
            return Rows(row, col, val)
    check_exact(val)
    start, count = Rows(row, col, val).starts()
    divisor = np.sign(val[start + count - 1])
    if (abs(val) != 1).any():
        divisor = divisor * np.gcd.reduceat(val, start)
    val = val // np.repeat(divisor, count)
    return Rows(row, col, val)


def _distinct_rows(rows: Rows) -> Rows:
    """Without what repeats another row: compared by a hash, confirmed by comparing entries."""
    _, col, val = rows
    if not col.size:
        return rows
    start, count = rows.starts()
    number = np.repeat(np.arange(len(start)), count)
    mixed = (col * np.int64(0x9E3779B97F4A7C1) + val * np.int64(0x1000000000193)) ** 2
    digest = np.add.reduceat(mixed, start)
    order = np.argsort(digest)
    same = np.zeros(len(start), bool)
    a, b = order[:-1], order[1:]
    pairs = np.flatnonzero((digest[a] == digest[b]) & (count[a] == count[b]))
    left, right = (
        ranges(start[a[pairs]], count[a[pairs]]),
        ranges(start[b[pairs]], count[b[pairs]]),
    )
    if left.size:
        equal = (col[left] == col[right]) & (val[left] == val[right])
        begin = np.cumsum(count[a[pairs]]) - count[a[pairs]]
        same[b[pairs[np.logical_and.reduceat(equal, begin)]]] = True
    kept = ~same[number]
    renumbered = np.cumsum(~same) - 1
    return Rows(renumbered[number[kept]], col[kept], val[kept])


def _order(major: np.ndarray, minor: np.ndarray) -> np.ndarray:
    """What sorts by the major integers, then by the minor ones; all are ≥ 0."""
    width = int(minor.max(initial=0)) + 1
    if int(major.max(initial=0)) < (1 << 62) // width:
        return np.argsort(major * width + minor, kind="stable")
    return np.lexsort((minor, major))


def _combined(rows: Rows, target: np.ndarray, by: np.ndarray, entry: np.ndarray) -> Rows:
    """Eliminate from each row `target` its entry number `entry` with the pivot of row `by`."""
    start, count = rows.starts()
    pivot = rows.val[start[by] + count[by] - 1]
    value = rows.val[entry]
    g = np.gcd(pivot, value)
    factor = np.ones(len(start), np.int64)
    factor[target] = pivot // g
    added = ranges(start[by], count[by])
    left = np.ones(len(start), bool)
    left[target] = False
    same = left[rows.row]
    old = Rows(*(part[same] for part in rows))
    row, col, val = (part[~same] for part in rows)
    new = _summed(
        Rows(
            np.concatenate([row, np.repeat(target, count[by])]),
            np.concatenate([col, rows.col[added]]),
            np.concatenate(
                [val * factor[row], -rows.val[added] * np.repeat(value // g, count[by])]
            ),
        )
    )
    # Rows that nothing was done to are as they were.
    both = [np.concatenate(parts) for parts in zip(old, new, strict=True)]
    order = np.argsort(both[0], kind="stable")
    return _distinct_rows(Rows(*(part[order] for part in both)))


def _echelon(rows: Rows) -> Rows:
    """Rows whose last columns differ, spanning the same space, sorted by last column."""
    while rows.row.size:
        start, count = rows.starts()
        last = start + count - 1
        order = _order(rows.col[last], count)
        pivot = rows.col[last][order]
        first = np.r_[True, pivot[1:] != pivot[:-1]]
        if first.all():
            rank = np.empty(len(order), np.int64)
            rank[order] = np.arange(len(order))
            moved = ranges(start[order], count[order])
            return Rows(
                np.repeat(np.arange(len(order)), count[order]), *(p[moved] for p in rows[1:])
            )
        leader = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
        target, by = order[~first], leader[~first]
        rows = _combined(rows, target, by, last[target])
    return rows


def _reduced(rows: Rows) -> Rows:
    """An echelon form in which no pivot column appears in another row."""
    while rows.row.size:
        start, count = rows.starts()
        last = start + count - 1
        pivots = rows.col[last]
        place = np.full(int(rows.col.max()) + 1, -1)
        place[pivots] = np.arange(len(pivots))
        place = place[rows.col]
        hit = np.flatnonzero((place >= 0) & (place != rows.row))
        if not hit.size:
            return rows
        # One entry per row and round: the first, whose pivot row reaches no further right.
        target, index = np.unique(rows.row[hit], return_index=True)
        entry = hit[index]
        rows = _echelon(_combined(rows, target, place[entry], entry))
    return rows
