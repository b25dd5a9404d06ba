"""The solver of scale equations against elimination in rational numbers."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinv.rescaling.equations import System


def null_space_dim(rows: list[list[Fraction]], size: int) -> tuple[int, list[list[Fraction]]]:
    """Unknowns left free by rational Gauss-Jordan elimination, and the reduced rows."""
    reduced: list[list[Fraction]] = []
    rows = [list(row) for row in rows]
    for column in range(size):
        pivot = next((row for row in rows if row[column]), None)
        if pivot is None:
            continue
        rows.remove(pivot)
        pivot = [v / pivot[column] for v in pivot]

        def without(row, pivot=pivot, column=column):
            return [v - row[column] * p for v, p in zip(row, pivot, strict=True)]

        rows = [without(row) for row in rows]
        reduced = [without(row) for row in reduced] + [pivot]
    return size - len(reduced), reduced


def dense(solution, size):
    """Every unknown as a row over all unknowns."""
    found = [[Fraction(0)] * (size + 1) for _ in range(size)]
    which, free, top, bottom = solution.of(np.arange(1, size + 1))
    for i, j, a, b in zip(which, free, top.tolist(), bottom.tolist(), strict=True):
        found[i][j] += Fraction(a, b)
    return [row[1:] for row in found]


coefficients = st.sampled_from([Fraction(n, d) for n in (-2, -1, 1, 2) for d in (1, 2)])


@st.composite
def blocks(draw):
    """Blocks of equations in which some columns repeat one unknown and others vary."""
    size = draw(st.integers(2, 9))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        columns = []
        for _ in range(draw(st.integers(1, 4))):
            if draw(st.booleans()):
                columns.append([draw(st.integers(0, size))] * count)
            else:
                columns.append([draw(st.integers(0, size)) for _ in range(count)])
        found.append(([draw(coefficients) for _ in columns], np.array(columns).T))
    return size, found


@settings(max_examples=200, deadline=None)
@given(blocks())
def test_solutions_are_those_of_rational_elimination(case):
    size, found = case
    system = System()
    system.new((size,))
    rows = []
    for cs, ids in found:
        for line in ids.tolist():
            row = [Fraction(0)] * (size + 1)
            for c, v in zip(cs, line, strict=True):
                row[v] += c
            rows.append(row[1:])  # unknown 0 is the number 0
        system.equation(cs, ids)
    values = dense(system.solve(), size)
    free, _ = null_space_dim(rows, size)
    # Every solution given by the free unknowns satisfies all equations, and there are as many.
    for row in rows:
        combined = [sum(c * values[i][j] for i, c in enumerate(row)) for j in range(size)]
        assert not any(combined)
    assert size - null_space_dim(values, size)[0] == free


def test_equal_sums_make_equal_terms_before_anything_is_solved():
    system = System()
    many, one = system.new((5,)), system.new((1,))
    system.equation([Fraction(2), Fraction(-1)], np.stack([many, np.repeat(one, 5)], axis=1))
    assert len(set(system.find(many).tolist())) == 1
    ((_, rows),) = system.blocks
    assert rows.shape == (1, 2)
