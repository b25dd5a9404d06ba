"""Operator norms ‖A‖₂ = max ‖A v‖/‖v‖ of the linear operators of a network, and what is not known.

A product with a matrix is a matrix: its singular values are computed while it is small. Otherwise A
is applied as the program applies it, and its transpose by `jax.linear_transpose`: Lanczos on AᵀA
(or AAᵀ, whichever is smaller) from a random start, with all vectors kept orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._numerics.lapack import thin_svd
from jaxinv.capacity.layer_values import Operator
from jaxinv.typing import Array, DTypeLike

# Up to this many rows or columns, whichever are fewer, all singular values are computed.
_DENSE = 64
_EXACT = lax.Precision.HIGHEST


class OperatorNorm(NamedTuple):
    """An operator norm, as scalars."""

    value: Array
    error: Array
    iterations: Array  # 0 where all singular values were computed


def bound(op: Operator, weight: Array, data: Array) -> Array:
    """The equation of an operator on other numbers."""
    changed: dict[str, lax.Precision | None] = {}
    if op.eqn.name in ("dot_general", "conv_general_dilated"):
        changed = {"precision": _EXACT, "preferred_element_type": None}
    operands = (data, weight) if op.operand == 0 else (weight, data)
    result: Array = op.eqn.bind(*operands, **changed)
    return result


def data_shape(op: Operator) -> tuple[int, ...]:
    """The shape of what an operator acts on."""
    shape: tuple[int, ...] = op.eqn.inputs[op.operand].shape
    return shape


def _matrices(op: Operator, weight: Array) -> Array:
    """The weights of a dot product as (batch, inputs, units)."""
    position = 1 - op.operand
    contracting, batch = op.eqn.params["dimension_numbers"]
    inputs, batch = contracting[position], batch[position]
    units = [a for a in range(weight.ndim) if a not in (*inputs, *batch)]
    sizes = [math.prod(weight.shape[a] for a in axes) for axes in (batch, inputs, units)]
    return weight.transpose(*batch, *inputs, *units).reshape(sizes)


def _as_map(op: Operator, weight: Array) -> tuple[Array, Callable[..., Array], int, int]:
    """(weights, (weights, vector) -> vector, sizes of the vectors) with the same norm."""
    if op.eqn.name == "dot_general":
        matrices = _matrices(op, weight)
        if matrices.shape[0] == 1:
            # The matrix once, at however many positions the program applies it.
            _, size, out_size = matrices.shape
            return matrices[0], _row_times_matrix, size, out_size
    shape = data_shape(op)

    def forward(w: Array, v: Array) -> Array:
        return bound(op, w, v.reshape(shape)).ravel()

    return weight, forward, math.prod(shape), math.prod(op.eqn.outputs[0].shape)


def _row_times_matrix(matrix: Array, row: Array) -> Array:
    return jnp.matmul(row, matrix, precision=_EXACT)


def operator_norm(op: Operator, dtype: DTypeLike, rtol: float, max_iterations: int) -> OperatorNorm:
    """‖A‖₂ with an estimate of its error; differentiable in the weights."""
    weight = op.weight.astype(dtype)
    none = jnp.zeros((), jnp.int32)
    eps = jnp.asarray(jnp.finfo(dtype).eps, dtype)
    # Scaled to at most 1: squares of weights neither overflow nor vanish.
    top = lax.stop_gradient(jnp.max(abs(weight), initial=0))
    unit = jnp.where(top > 0, top, 1)
    weight = weight / unit
    if op.eqn.name == "div":
        return OperatorNorm(1 / (jnp.min(abs(weight)) * unit), jnp.zeros((), dtype), none)
    if op.eqn.name == "mul":
        return OperatorNorm(jnp.max(abs(weight)) * unit, jnp.zeros((), dtype), none)
    if op.eqn.name == "dot_general":
        matrices = _matrices(op, weight)
        if min(matrices.shape[1:]) <= _DENSE:
            u, s, vh = jax.vmap(thin_svd)(lax.stop_gradient(matrices))
            which = jnp.argmax(s[:, 0])
            left, right = u[which, :, 0], vh[which, 0]
            # uᵀAv, which has the derivative of σ also where singular values coincide.
            value = jnp.einsum("k,km,m", left, matrices[which], right, precision=_EXACT)
            error = max(matrices.shape[1:]) * eps * s[which, 0]
            return OperatorNorm(value * unit, error * unit, none)
    weight, forward, size, out_size = _as_map(op, weight)
    fixed = lax.stop_gradient(weight)
    probe = jax.ShapeDtypeStruct((size,), dtype)
    back = jax.linear_transpose(lambda v: forward(fixed, v), probe)

    def gram(v: Array) -> Array:
        if size <= out_size:
            return back(forward(fixed, v))[0]
        return forward(fixed, back(v)[0])

    smaller = min(size, out_size)
    found = _largest(gram, smaller, dtype, rtol, min(max_iterations, smaller))
    v = found.vector if size <= out_size else back(found.vector)[0]
    length = jnp.linalg.norm(v)
    v = lax.stop_gradient(v / jnp.where(length > 0, length, 1))
    squares = jnp.sum(forward(weight, v) ** 2)
    value = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    # Some s² is within r of θ: |s − σ| = |s² − σ²|/(s + σ) <= (r + σ² − θ)/σ.
    gap = found.residual + abs(squares - found.theta)
    error = gap / jnp.where(value > 0, value, 1) + 4 * eps * value
    return OperatorNorm(value * unit, error * unit, found.iterations)


class _Eigenpair(NamedTuple):
    vector: Array
    theta: Array
    residual: Array  # ‖Bv − θv‖
    iterations: Array


class _State(NamedTuple):
    step: Array
    basis: Array  # (steps + 1, n), rows orthonormal, those to come 0
    diagonal: Array
    off_diagonal: Array
    theta: Array
    residual: Array
    weights: Array  # of the eigenvector in the basis


def _largest(
    product: Callable[[Array], Array], n: int, dtype: DTypeLike, rtol: float, steps: int
) -> _Eigenpair:
    """The largest eigenvalue of a positive semidefinite operator, by Lanczos iteration."""
    start = jax.random.normal(jax.random.key(0), (n,), dtype)
    basis = jnp.zeros((steps + 1, n), dtype).at[0].set(start / jnp.linalg.norm(start))
    zero, none = jnp.zeros(steps, dtype), jnp.zeros((), dtype)
    state = _State(
        jnp.zeros((), jnp.int32), basis, zero, zero, none, jnp.asarray(jnp.inf, dtype), zero
    )

    def unfinished(s: _State) -> Array:
        return (s.step < steps) & ((s.step < 2) | (s.residual > rtol * s.theta))

    def advance(s: _State) -> _State:
        v = s.basis[s.step]
        w = product(v)
        diagonal = s.diagonal.at[s.step].set(jnp.vdot(v, w, precision=_EXACT))
        for _ in range(2):  # once leaves rounding errors that grow
            w = w - jnp.matmul(jnp.matmul(s.basis, w, precision=_EXACT), s.basis, precision=_EXACT)
        beta = jnp.linalg.norm(w)
        off_diagonal = s.off_diagonal.at[s.step].set(beta)
        off = jnp.where(jnp.arange(steps, dtype=jnp.int32) < s.step, off_diagonal, 0)[: steps - 1]
        tridiagonal = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
        # Rows to come are 0: eigenvalues 0, which are never above the largest of the others.
        values, vectors = jnp.linalg.eigh(tridiagonal)
        weights = vectors[:, -1]
        tiny = jnp.finfo(dtype).tiny
        basis = s.basis.at[s.step + 1].set(jnp.where(beta > tiny, w / jnp.maximum(beta, tiny), 0))
        residual = beta * abs(weights[s.step])
        return _State(s.step + 1, basis, diagonal, off_diagonal, values[-1], residual, weights)

    s = lax.while_loop(unfinished, advance, state)
    vector = jnp.matmul(s.weights, s.basis[:-1], precision=_EXACT)
    return _Eigenpair(vector, s.theta, s.residual, s.step)


def sum_of_unit_norms(op: Operator, dtype: DTypeLike) -> tuple[Array, Array]:
    """Σ over the elements of the result of (Σ w²)^{1/2}, as (value/scale, scale)."""
    weight = op.weight.astype(dtype)
    if op.eqn.name == "div":
        return jnp.sum(abs(1 / weight)), jnp.ones((), dtype)
    top = lax.stop_gradient(jnp.max(abs(weight), initial=0))
    unit = jnp.where(top > 0, top, 1)
    ones = jnp.ones(data_shape(op), dtype)
    squares = bound(op, (weight / unit) ** 2, ones)
    roots = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return jnp.sum(roots), unit
