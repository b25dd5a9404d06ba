"""Algebras of matrices in blocks: what commutes with given linear maps, as a rotary embedding.

A rotary embedding multiplies by cos·E + sin·F at every position, for fixed matrices E and F per
plane. A matrix that may be inserted in front of all of them commutes with every EᵀF: within each
plane a scale and a rotation, the complex numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxinv.typing import Array

_Numbers = TypeVar("_Numbers", Array, np.ndarray)
_MOST_SOLVED = 12  # side of a block whose commutant is solved for; larger ones allow nothing
_CLEAR = 1e-9

Basis = tuple[tuple[tuple[float, ...], ...], ...]


class Blocks(NamedTuple):
    """Blocks on some coordinates, each with matrices of one space of its own."""

    where: tuple[tuple[int, ...], ...]  # coordinates of each
    basis: Basis | None  # independent matrices; None: any matrix

    @property
    def size(self) -> int:
        return len(self.where[0])

    @property
    def dimension(self) -> int:
        """Of one block."""
        return self.size**2 if self.basis is None else len(self.basis)

    @property
    def diagonal(self) -> int:
        """Dimension of the diagonal matrices among them."""
        if self.basis is None:
            return self.size
        off = np.asarray(self.basis) * (1 - np.eye(self.size))
        return len(self.basis) - int(np.linalg.matrix_rank(off.reshape(len(off), -1)))

    def matrices(self) -> np.ndarray:
        """(dimension, size, size)"""
        if self.basis is None:
            return np.eye(self.size**2).reshape(-1, self.size, self.size)
        return np.asarray(self.basis)

    def __str__(self) -> str:
        """GL(1,C)^4"""
        antisymmetric = not (self.matrices() + self.matrices().transpose(0, 2, 1)).any()
        name = {
            (True, False): f"GL({self.size})",
            (False, True): f"SO({self.size})" if self.dimension == 1 and self.size == 2 else "",
            (False, False): "GL(1,C)" if self.dimension == self.size == 2 else "",
        }.get((self.basis is None, antisymmetric), "") or f"commutant of {self.dimension}"
        return name + (f"^{len(self.where)}" if len(self.where) > 1 else "")


class Algebra(NamedTuple):
    """Matrices that are 0 outside of the blocks: other coordinates stay where they are."""

    blocks: tuple[Blocks, ...]

    def __str__(self) -> str:
        return " x ".join(map(str, self.blocks))

    @property
    def dimension(self) -> int:
        return sum(len(b.where) * b.dimension for b in self.blocks)

    @property
    def diagonal(self) -> int:
        """Dimension of its diagonal matrices."""
        return sum(len(b.where) * b.diagonal for b in self.blocks)

    def still(self, n: int) -> np.ndarray:
        """1 at coordinates of n without a block, else 0."""
        return 1.0 - np.isin(np.arange(n), [i for b in self.blocks for w in b.where for i in w])

    def off_diagonal(self, n: int) -> np.ndarray:
        """Its independent matrices with zeros on the diagonal, (k, n, n)."""
        all_of = basis(self, n)
        return all_of[~np.einsum("aii->ai", all_of).any(axis=1)]

    @property
    def exact(self) -> bool:
        """Whether what goes beyond its diagonal only moves elements and changes their signs."""
        each = [b.matrices() for b in self.blocks]
        off = [B[~np.einsum("aii->ai", B).any(axis=1)] for B in each]
        whole = all(
            len(B) == b.dimension - b.diagonal for B, b in zip(off, self.blocks, strict=True)
        )
        signs = all(np.isin(B, (-1, 0, 1)).all() and (abs(B).sum(2) <= 1).all() for B in off)
        return whole and signs

    def part(self, start: int, stop: int) -> Algebra:
        """What acts on these neighbours alone: blocks that reach beyond allow nothing."""
        inside = range(start, stop)
        return _of(
            b._replace(where=tuple(tuple(i - start for i in w) for w in b.where if _in(w, inside)))
            for b in self.blocks
        )

    def turned(self, turn: Sequence[int]) -> Algebra:
        """Of the matrices A[turn, turn]."""
        return _turned(self, tuple(turn))

    def transposed(self) -> Algebra:
        return _transposed(self)

    def where(self, *, rotations: bool = False, fixes_ones: bool = False) -> Algebra:
        """Its matrices with A = −Aᵀ, or with A·1 = 0 and 1ᵀA = 0."""
        found = []
        for b in self.blocks:
            if b.basis is None and b.size > _MOST_SOLVED:
                continue
            B = b.matrices()
            zero = []
            if rotations:
                zero.append((B + B.transpose(0, 2, 1)).reshape(len(B), -1))
            if fixes_ones:
                zero += [B.sum(1), B.sum(2)]
            c = _null_space(np.concatenate(zero, axis=1).T)
            if len(c):
                found.append(b._replace(basis=_rounded(np.einsum("kb,bij->kij", c, B))))
        return _of(found)


# Networks ask this of few algebras, many times.
@functools.lru_cache(256)
def _turned(algebra: Algebra, turn: tuple[int, ...]) -> Algebra:
    place = np.argsort(turn)
    return _of(
        b._replace(where=tuple(tuple(int(place[i]) for i in w) for w in b.where))
        for b in algebra.blocks
    )


@functools.lru_cache(256)
def _transposed(algebra: Algebra) -> Algebra:
    return _of(
        b if b.basis is None else b._replace(basis=_rounded(np.asarray(b.basis).transpose(0, 2, 1)))
        for b in algebra.blocks
    )


def _in(where: tuple[int, ...], inside: range) -> bool:
    return all(i in inside for i in where)


def _of(blocks: Iterable[Blocks]) -> Algebra:
    """The algebra of some blocks, written in the one way that can be compared."""
    found: dict[tuple[int, Basis | None], list[tuple[int, ...]]] = {}
    for b in blocks:
        for where in b.where:
            order = np.argsort(where)
            basis = None
            if b.basis is not None:
                own = np.asarray(b.basis)[:, order[:, None], order].reshape(len(b.basis), -1)
                basis = _rounded(_reduced(own).reshape(-1, b.size, b.size))
            found.setdefault((b.size, basis), []).append(tuple(where[i] for i in order))
    each = [Blocks(tuple(sorted(where)), basis) for (_, basis), where in found.items()]
    return Algebra(tuple(sorted(each, key=lambda b: b.where)))


def _rounded(basis: np.ndarray) -> Basis:
    """As numbers that can be compared; 1 where it is 1 to rounding."""
    near = np.round(basis)
    exact = np.where(abs(basis - near) < _CLEAR, near, basis) + 0.0
    return tuple(tuple(tuple(float(a) for a in row) for row in B) for B in exact)


def _null_space(M: np.ndarray) -> np.ndarray:
    """Rows c with M·c = 0."""
    if not M.size:
        return np.eye(M.shape[1])
    _, s, Vt = np.linalg.svd(M, full_matrices=True)
    return _reduced(Vt[int((s > _CLEAR * max(s[0], 1)).sum()) :])


def _reduced(rows: np.ndarray) -> np.ndarray:
    """Independent rows in reduced echelon form: simple spaces have simple numbers, once."""
    R, row = rows.astype(float), 0
    for column in range(R.shape[1]):
        if row == len(R):
            break
        pivot = row + int(np.argmax(abs(R[row:, column])))
        if abs(R[pivot, column]) < 1e-6:
            continue
        R[[row, pivot]] = R[[pivot, row]]
        R[row] /= R[row, column]
        others = np.arange(len(R)) != row
        R[others] -= R[others, column][:, None] * R[row]
        row += 1
    return R


# --- what commutes -------------------------------------------------------------------------


def commutant(generators: np.ndarray) -> Algebra:
    """Matrices in blocks that commute with all of (m, n, n): blocks that no generator connects.

    Where generators agree on several blocks, matrices between these would commute as well; they
    are not looked for.
    """
    n = generators.shape[1]
    if not len(generators):
        return Algebra((Blocks((tuple(range(n)),), None),))
    off = generators * (1 - np.eye(n))
    diagonals = np.diagonal(generators, axis1=1, axis2=2).T  # (n, m)
    _, cell = np.unique(np.round(diagonals, 12), axis=0, return_inverse=True)
    group, alone = cell.reshape(-1).copy(), np.arange(n)
    linked = (off != 0).any(axis=0)
    for i, j in np.argwhere(linked):
        group[group == group[j]] = group[i]
        alone[alone == alone[j]] = alone[i]
    # What is too large to be solved for is taken apart into what is linked.
    meeting = linked.any(axis=0) | linked.any(axis=1)
    for g in np.unique(group[meeting]):
        where = group == g
        if where.sum() > _MOST_SOLVED:
            group[where & meeting] = group.max() + 1 + alone[where & meeting]
    found = []
    for g in dict.fromkeys(group.tolist()):
        where = np.flatnonzero(group == g)
        own = generators[:, where[:, None], where]
        own = own[own.any(axis=(1, 2))]
        basis = _commuting(own)
        if basis != ():
            found.append(Blocks((tuple(where.tolist()),), basis))
    return _of(found)


def _commuting(own: np.ndarray) -> Basis | None:
    """All matrices that commute with these; none of large ones that do not commute with all."""
    k = own.shape[-1]
    scalar = [M for M in own if not np.array_equal(M, M[0, 0] * np.eye(k))]
    if not scalar:
        return None
    if k > _MOST_SOLVED:
        return ()
    eye = np.eye(k)
    M = np.concatenate([np.kron(eye, G.T) - np.kron(G, eye) for G in scalar])
    return _rounded(_null_space(M).reshape(-1, k, k))


def labelled_maps(
    sources: np.ndarray, numbers: np.ndarray, labels: np.ndarray, families: np.ndarray
) -> tuple[Algebra, tuple[int, ...]] | None:
    """What commutes with y_o = Σ_t numbers[t, o]·c(labels[t, o])·x(sources[t, o]), c any functions.

    Sources are −1 where there is no term. Labels of one family come from one array. Wanted is L₀, a
    permutation among these maps, so that A in front is B = L₀·A·L₀⁻¹ behind all of them.

    Returns:
        The algebra of A, and the permutation: B = A[turn, turn]. None where there is none.
    """
    n = sources.shape[1]
    there = sources >= 0
    t, o = np.nonzero(there)
    s, c, label, family = (a[t, o] for a in (sources, numbers, labels, families))
    kinds = np.unique(family).tolist()
    if len(kinds) > 4:
        return None
    for chosen in (
        pick for k in range(1, len(kinds) + 1) for pick in itertools.combinations(kinds, k)
    ):
        mine = np.isin(family, chosen)
        permutation = (
            mine.sum() == n
            and len(set(s[mine].tolist())) == n
            and len(set(o[mine].tolist())) == n
            and np.unique(c[mine]).size == 1
            and c[mine][0] != 0
        )
        if permutation:
            break
    else:
        return None
    turn = np.zeros(n, int)
    turn[o[mine]] = s[mine]
    generators = []
    for i in np.unique(label):
        of = label == i
        E = np.zeros((n, n))
        np.add.at(E, (turn[o[of]], s[of]), c[of])
        generators.append(E)
    return commutant(np.stack(generators)), tuple(turn.tolist())


class Labels:
    """Numbers for coefficients, and for the arrays that they come from."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {None: 0}
        self.families: list[int] = [0]  # of each label

    def number(self, name: Hashable, family: int) -> int:
        found = self.numbers.setdefault(name, len(self.numbers))
        if found == len(self.families):
            self.families.append(family)
        return found

    def product(self, a: int, b: int) -> int:
        if not a or not b:
            return a or b
        family = self.number(("family", *sorted((self.families[a], self.families[b]))), 0)
        return self.number(("product", *sorted((a, b))), family)


Maps = tuple[Algebra, tuple[int, ...]]


class Commutants:
    """`labelled_maps`, once for maps that differ in the names of their labels alone."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.known: dict[Hashable, Maps | None] = {}

    def __call__(self, sources: np.ndarray, numbers: np.ndarray, found: np.ndarray) -> Maps | None:
        families = np.asarray(self.labels.families)[found]
        short = [_renamed(a) for a in (found, families)]
        key = (sources.shape, *(a.tobytes() for a in (sources, numbers, *short)))
        if key not in self.known:
            self.known[key] = labelled_maps(sources, numbers, *short)
        return self.known[key]


def _renamed(a: np.ndarray) -> np.ndarray:
    return np.unique(a, return_inverse=True)[1].reshape(a.shape)


# --- matrices of an algebra ------------------------------------------------------------------


def project(algebra: Algebra, A: _Numbers) -> _Numbers:
    """The part of a matrix that is of the algebra."""
    out = jnp.zeros_like(A)
    for b in algebra.blocks:
        at = np.asarray(b.where)
        window = (at[:, :, None], at[:, None, :])
        part = A[window]
        if b.basis is not None:
            B = b.matrices().reshape(b.dimension, -1)
            onto = np.linalg.pinv(B) @ B
            flat = part.reshape(len(at), -1) @ onto.astype(A.dtype)
            part = flat.reshape(part.shape)
        out = out.at[window].set(part)
    return np.asarray(out) if isinstance(A, np.ndarray) else out


def basis(algebra: Algebra, n: int) -> np.ndarray:
    """Independent matrices, (dimension, n, n)."""
    found = np.zeros((algebra.dimension, n, n))
    k = 0
    for b in algebra.blocks:
        B = b.matrices()
        for where in map(np.asarray, b.where):
            found[k : k + len(B), where[:, None], where] = B
            k += len(B)
    return found


__all__ = ["Algebra", "Blocks", "Commutants", "Labels", "basis", "commutant", "project"]
