"""Scaling rules of matrix factorisations.

Singular values and eigenvalues of c·A are c times those of A, and the vectors stay: one scale for
the whole matrix. QR and Cholesky keep more: A·diag(c) = Q·(R·diag(c)), and
diag(c)·A·diag(c) = (diag(c)·L)·(diag(c)·L)ᵀ.
"""

from __future__ import annotations

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Result, rule_table
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.values import Form, Scale, Scaling, relaid, variables

RULES, rule = rule_table()


def _one_scale(domain: Scaling, value: Operand, rank: int) -> Form:
    """The scale of every matrix of a stack, with its last two axes of length one."""
    return domain.level(value, [rank - 2, rank - 1]).form


def _of_values(domain: Scaling, eqn: Equation, value: Operand, at: int) -> list[Scale]:
    """Output number `at` has the scale of the matrix; the others have none."""
    value = domain.refresh(value)
    form = _one_scale(domain, value, len(eqn.inputs[0].shape))
    domain.seen(form)
    outputs = [Scale(aval.shape) for aval in eqn.outputs]
    shape = eqn.outputs[at].shape
    outputs[at] = Scale(shape, relaid(form, lambda ids: ids.squeeze(-1)))
    return outputs


@rule("svd")
def _svd(domain: Scaling, eqn: Equation, value: Operand) -> list[Scale]:
    return _of_values(domain, eqn, value, 0)


@rule("eigh")
def _eigh(domain: Scaling, eqn: Equation, value: Operand) -> list[Scale]:
    return _of_values(domain, eqn, value, 1)


@rule("eig")
def _eig(domain: Scaling, eqn: Equation, value: Operand) -> list[Scale]:
    return _of_values(domain, eqn, value, 0)


@rule("qr")
def _qr(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    value = domain.refresh(value)
    if eqn.params.get("pivoting"):
        return domain.default(eqn, value)
    columns = domain.level(value, [len(eqn.inputs[0].shape) - 2]).form
    domain.seen(columns)
    return [Scale(eqn.outputs[0].shape), Scale(eqn.outputs[1].shape, columns)]


@rule("cholesky")
def _cholesky(domain: Scaling, eqn: Equation, matrix: Operand) -> Scale:
    """s(A)[i,j] = p[i] + p[j] makes s(L)[i,j] = p[i]."""
    value = domain.scale(matrix)
    system = domain.system
    shape = value.shape
    stack = np.broadcast_shapes((), *(ids.shape[:-2] for _, ids in value.form)) or shape[:-2]
    p = system.new((*stack, shape[-1], 1))
    both = (*variables(p), *variables(p.swapaxes(-1, -2)))
    keep = None if value.absorbing is None else ~value.absorbing
    scaling.require_zero(system, scaling.minus(value.form, both), keep)
    domain.seen(value.form)
    return Scale(shape, variables(p))


@rule("triangular_solve")
def _triangular_solve(domain: Scaling, eqn: Equation, a: Operand, b: Operand) -> Scale:
    """X of A X = B, or of X A = B."""
    if eqn.params["unit_diagonal"]:
        domain.pin(eqn, a)
    a, b = domain.refresh(a), domain.refresh(b)
    of_a = _one_scale(domain, a, len(eqn.inputs[0].shape))
    b = domain.refresh(b)
    contracted = len(eqn.inputs[1].shape) - (2 if eqn.params["left_side"] else 1)
    of_b = domain.level(b, [contracted]).form
    domain.seen((*of_a, *of_b))
    return Scale(eqn.outputs[0].shape, scaling.tidy(domain.system, scaling.minus(of_b, of_a)))
