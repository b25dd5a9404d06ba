"""Exact ranks without derivatives: difference quotients in Fractions, elimination in integers.

A network is written once, for NumPy's object arrays. Between its kinks it is a polynomial in every
single parameter; with one step of 2^-600 and one of -2^-600 the derivative is the limit of
quotients, and here, where each parameter enters once, the quotient itself.
"""

from fractions import Fraction
from math import lcm

import numpy as np

STEP = Fraction(1, 2**600)


def fractions(array):
    out = np.empty(np.shape(array), object)
    out.reshape(-1)[:] = [Fraction(float(v)) for v in np.ravel(array)]
    return out


def jacobian_by_differences(network, weights, x):
    """(n·out, d) Fractions, or None at a kink, where the two sides differ."""
    weights, x = [fractions(w) for w in weights], fractions(x)
    base = np.ravel(network(weights, x))
    columns = []
    for leaf in weights:
        flat = leaf.reshape(-1)
        for i in range(flat.size):
            kept, sides = flat[i], []
            for step in (STEP, -STEP):
                flat[i] = kept + step
                sides.append((np.ravel(network(weights, x)) - base) / step)
            flat[i] = kept
            if any(a != b for a, b in zip(*sides, strict=True)):
                return None
            columns.append(sides[0])
    return np.stack(columns, 1)


def rank_of_fractions(matrix):
    """By elimination without division (Bareiss), in integers."""
    rows = []
    for row in {tuple(r) for r in matrix}:
        den = lcm(*(f.denominator for f in row))
        rows.append([int(f * den) for f in row])
    rank, previous = 0, 1
    for column in range(matrix.shape[1]):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        top = rows[rank]
        for i in range(rank + 1, len(rows)):
            row, factor = rows[i], rows[i][column]
            rows[i] = [
                (top[column] * a - factor * b) // previous for a, b in zip(row, top, strict=True)
            ]
        previous = top[column]
        rank += 1
    return rank
