"""Jacobians of ReLU networks with integer weights and inputs, and their ranks, without rounding.

Rational ones work as well, as arrays of `fractions.Fraction`.
"""

from fractions import Fraction

import numpy as np

PRIMES = (2_147_483_647, 2_147_483_629)


def integer_jacobian(layers, x):
    """(n·out, d) for layers [(kernel (in, out), bias or None), ...], columns in that order.

    The derivative of relu at 0 is 0. One backward pass per output, written out.
    """
    activations, masks = [x], []
    for number, (kernel, bias) in enumerate(layers):
        z = activations[-1] @ kernel + (0 if bias is None else bias)
        if number < len(layers) - 1:
            masks.append(z > 0)
            activations.append(np.where(z > 0, z, 0))
    n, out = x.shape[0], layers[-1][0].shape[1]
    delta = np.broadcast_to(np.eye(out, dtype=np.int64), (n, out, out))
    blocks = []
    for number in reversed(range(len(layers))):
        kernel, bias = layers[number]
        of_kernel = activations[number][:, None, :, None] * delta[:, :, None, :]
        own = [of_kernel.reshape(n * out, -1)]
        if bias is not None:
            own.append(delta.reshape(n * out, -1))
        blocks = own + blocks
        if number:
            delta = (delta @ kernel.T) * masks[number - 1][:, None, :]
    return np.concatenate(blocks, 1)


def exact_rank(matrix):
    """Rank of a matrix of integers or fractions: modulo large primes, which can only lose rank."""
    return max(_rank_modulo(matrix, p) for p in PRIMES)


def as_fractions(a):
    """Floats as the rational numbers that they are."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(a, float))


def _residue(v, p):
    v = Fraction(v)
    return v.numerator * pow(v.denominator, -1, p) % p


def _rank_modulo(matrix, p):
    if matrix.dtype == object:
        matrix = np.vectorize(lambda v: _residue(v, p), otypes=[np.int64])(matrix)
    m = np.unique(np.asarray(matrix, np.int64) % p, axis=0)
    rank = 0
    for column in range(m.shape[1]):
        pivots = np.flatnonzero(m[rank:, column])
        if not pivots.size:
            continue
        pivot = rank + pivots[0]
        m[[rank, pivot]] = m[[pivot, rank]]
        m[rank] = m[rank] * pow(int(m[rank, column]), -1, p) % p
        rows = np.flatnonzero(m[rank + 1 :, column]) + rank + 1
        m[rows] = (m[rows] - m[rows, column, None] * m[rank] % p) % p
        rank += 1
        if rank == len(m):
            break
    return rank
