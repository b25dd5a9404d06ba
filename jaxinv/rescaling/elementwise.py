"""Scaling rules of elementwise operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Result, Value, is_concrete, rule_table
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.cases import collected, root
from jaxinv.rescaling.values import (
    Form,
    Fresh,
    Guarded,
    Predicate,
    Scale,
    Scaling,
    Step,
    WithEpsilon,
    relaid,
    times,
)
from jaxinv.typing import ArrayLike, DTypeLike

RULES, rule = rule_table()

# A constant up to this size that is added inside a normalisation counts as its epsilon (the usual
# ones go from 1e-12 to 1e-3).
LARGEST_EPSILON = float(np.nextafter(np.float32(1e-3), np.float32(1)))  # 1e-3 in any float


# --- powers: elementwise, the exponent times a number ---


def _power(exponent: Fraction | int) -> Callable:
    def apply(domain: Scaling, eqn: Equation, value: Operand) -> Result:
        factor = Fraction(exponent)
        if isinstance(value, WithEpsilon) and factor.denominator > 1:
            value = domain.without_epsilon(eqn, value)
        value = domain.refresh(value)
        if isinstance(value, Fresh):
            leaf = value.leaf

            def pull(f: Form) -> Form:
                leaf.inverse ^= factor < 0
                return times(f, 1 / factor)

            return value.through(value.shape, Step(lambda f: times(f, factor), pull), value.compact)
        value = domain.scale(value)
        form = domain.seen(value.form) if factor < 0 else value.form
        return Scale(value.shape, times(form, factor), value.absorbing)

    return apply


rule("neg", "real", "imag", "conj")(_power(1))


@rule("abs")
def _abs(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    result = _power(1)(domain, eqn, value)
    if isinstance(result, Scale):
        result.fact = ("abs",)
    return result


rule("square")(_power(2))
rule("sqrt")(_power(Fraction(1, 2)))
rule("rsqrt")(_power(Fraction(-1, 2)))
rule("cbrt")(_power(Fraction(1, 3)))


@rule("integer_pow")
def _integer_pow(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    return (
        _power(eqn.params["y"])(domain, eqn, value) if eqn.params["y"] else domain.free(eqn, value)
    )


@rule("pow")
def _pow(domain: Scaling, eqn: Equation, value: Operand, exponent: Operand) -> Result:
    if is_concrete(exponent) and np.size(exponent) == 1:
        y = _rational(exponent, eqn.inputs[1].dtype)
        if y:
            return _power(y)(domain, eqn, value)
    return domain.default(eqn, value, exponent)


def _rational(number: ArrayLike, dtype: DTypeLike) -> Fraction | None:
    """The simple fraction that a float was rounded from in its own precision; None if none was."""
    y = np.asarray(number).reshape(()).astype(dtype)
    if np.iscomplexobj(y) or not np.isfinite(np.float64(y)):
        return None
    # In 16 bits many fractions are rounded to one float: only the simplest are meant.
    largest = 1000 if jnp.finfo(dtype).bits >= 32 else 8
    found = Fraction(float(y)).limit_denominator(largest)
    return found if np.asarray(float(found)).astype(dtype) == y else None


@rule("convert_element_type")
def _convert(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    old, new = eqn.inputs[0].dtype, eqn.params["new_dtype"]
    if jnp.issubdtype(new, jnp.bool_):
        return domain.free(eqn, value)  # whether it is zero
    if jnp.issubdtype(old, jnp.bool_) and jnp.issubdtype(new, jnp.integer):
        return _numbered(domain, eqn, value)
    if jnp.issubdtype(old, jnp.inexact) and not jnp.issubdtype(new, jnp.inexact):
        return domain.default(eqn, value)  # rounding
    if new != old and jnp.issubdtype(new, jnp.inexact) and jnp.finfo(new).bits < 16:
        return domain.default(eqn, value)  # quantisation
    return _power(1)(domain, eqn, value)


def _numbered(domain: Scaling, eqn: Equation, truth: Operand) -> Result:
    """A truth value as a number is 0 in one case and 1 in the other."""
    index, axes = root(truth)
    domain.scale(truth)
    out = eqn.outputs[0]
    values = [np.full(out.shape, number, out.dtype) for number in (0, 1)]
    return collected(domain, domain.index_number((index, "choice")), axes, values)


@rule("reduce_precision")
def _reduce_precision(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    """Rounding to fewer bits than the numbers have is quantisation, which scales do not pass."""
    info = jnp.finfo(eqn.inputs[0].dtype)
    if eqn.params["exponent_bits"] >= info.nexp and eqn.params["mantissa_bits"] >= info.nmant:
        return _power(1)(domain, eqn, value)
    return domain.default(eqn, value)


@rule("sign", "is_finite")
def _degree_zero(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    """Depends on the sign of the elements alone, so any scale will do."""
    return domain.free(eqn, value)


# --- sums and choices: operands of one scale ---


@rule("add", "sub", "add_any", "max", "min", "rem", "complex", "atan2")
def _join(domain: Scaling, eqn: Equation, left: Operand, right: Operand) -> Result:
    left, right = domain.refresh(left), domain.refresh(right)
    shape = eqn.outputs[0].shape
    for one, other in ((left, right), (right, left)):
        if isinstance(other, Value):
            continue
        if isinstance(one, Fresh) and one.shape == shape and domain.scale(other).all_absorbing:
            return one.through(shape, Step(lambda f: f, lambda f: f), one.compact)
        if domain.ignore_epsilon and eqn.name in ("add", "max") and _is_epsilon(other):
            base = domain.scale(one)
            return WithEpsilon(base, _size(other), partial(domain.joined, eqn, base, other))
    for one, other in ((left, right), (right, left)):
        if (
            isinstance(one, Fresh)
            and not one.spread
            and one.shape == shape
            and one.absorbing is None
        ):
            scale = other if isinstance(other, Scale) else None
            if scale is not None and scale.absorbing is None:
                one.assign(scale.form)
                return Scale(shape, scale.form)
    joined = domain.joined(eqn, left, right)
    sizes = [
        v.key
        for v in (left, right)
        if isinstance(v, Value) and getattr(v, "fact", None) == ("abs",) and hasattr(v, "key")
    ]
    if len(sizes) == 2 and eqn.name in ("max", "min"):
        joined.fact = (eqn.name, frozenset(sizes))
    return domain.free(eqn, joined) if eqn.name == "atan2" else joined


def _size(value: ArrayLike) -> float:
    return float(np.max(np.abs(np.asarray(value, np.float64))))


def _is_epsilon(value: Operand) -> bool:
    if not is_concrete(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return False
    array = np.asarray(value, np.float64)
    return array.size > 0 and 0 < array.min() and array.max() <= LARGEST_EPSILON


@rule("eq", "ne", "gt", "ge", "lt", "le")
def _compare(domain: Scaling, eqn: Equation, left: Operand, right: Operand) -> Result:
    result = Predicate(eqn.outputs[0].shape, domain.joined(eqn, left, right).form)
    if (
        eqn.name == "eq"
        and is_concrete(right)
        and not np.asarray(right).any()
        and hasattr(left, "key")
    ):
        result.fact = ("zero", left.key)
    return result


@rule("not", "and", "or", "xor", "reduce_and", "reduce_or", "reduce_xor")
def _logic(domain: Scaling, eqn: Equation, *inputs: Operand) -> Result:
    """Truth values have scale 0 already; integers are pinned where they are made."""
    if eqn.name == "not" and isinstance(inputs[0], Predicate):
        return Predicate(inputs[0].shape, inputs[0].compared)
    return domain.free(eqn, *inputs)


@rule("select_n")
def _select(domain: Scaling, eqn: Equation, which: Operand, *cases: Operand) -> Result:
    if isinstance(which, Value) and not isinstance(which, Predicate):
        domain.pin(eqn, which)
    elif is_concrete(which):
        domain.rely(which)
        return _chosen(domain, eqn, np.asarray(which), cases)
    if isinstance(which, Predicate) and len(cases) == 2 and is_concrete(cases[1]):
        first = cases[0]
        if isinstance(first, Scale) and which.fact == ("zero", first.key):
            return Guarded(first, partial(domain.joined, eqn, first, cases[1]))
    scales = [domain.scale(case) for case in cases]
    if not isinstance(which, Value):  # known at run time only
        which = Predicate(np.shape(which), ())
    index, axes = root(which)
    result = collected(domain, domain.index_number((index, "choice")), axes, scales)
    if isinstance(which, Predicate):
        form = result.form if isinstance(result, Scale) else ()
        seen = scaling.signature(scaling.tidy(domain.system, form))
        compared = scaling.signature(scaling.tidy(domain.system, which.compared))
        if any(term not in seen for term in compared):
            domain.seen(which.compared)
    return result


def _chosen(domain: Scaling, eqn: Equation, which: np.ndarray, cases: Sequence[Operand]) -> Scale:
    """A choice by constants: every element is one of the cases, and need not fit the others."""
    shape = eqn.outputs[0].shape
    rank = len(shape)
    which = scaling.shrunk(scaling.lifted(which.astype(np.int64), rank))
    parts, absorbing = [], np.zeros((1,) * rank, bool)
    for i, case in enumerate(cases):
        if not (which == i).any():
            continue
        scale = domain.scale(case)
        form = relaid(scale.form, lambda ids: scaling.lifted(ids, rank))
        parts.append(scaling.masked(which == i, form))
        if scale.absorbing is not None:
            absorbing = absorbing | ((which == i) & scaling.lifted(scale.absorbing, rank))
    return Scale(shape, scaling.tidy(domain.system, scaling.assemble(parts)), absorbing)


@rule("clamp")
def _clamp(domain: Scaling, eqn: Equation, low: Operand, value: Operand, high: Operand) -> Result:
    joined = domain.joined(eqn, value, low, eqn.outputs[0].shape)
    return domain.joined(eqn, joined, high, eqn.outputs[0].shape)


# --- products ---


def _product(sign: int) -> Callable:
    def apply(domain: Scaling, eqn: Equation, left: Operand, right: Operand) -> Result:
        shape = eqn.outputs[0].shape
        if sign < 0 and isinstance(right, WithEpsilon):
            right = domain.without_epsilon(eqn, right)
        if sign < 0 and isinstance(right, Guarded) and right.divides(left):
            right = right.base
        if left is right and isinstance(left, Fresh):
            return _power(1 + sign)(domain, eqn, left) if sign > 0 else domain.free(eqn, left)
        left, right = _one_fresh(domain, left, right)
        for one, other, factor, shift in ((left, right, 1, -sign), (right, left, sign, -1)):
            if isinstance(one, Fresh):
                view = _multiplied(domain, one, domain.scale(other), shape, factor, shift)
                if view is not None:
                    return view
        a, b = domain.scale(left), domain.scale(right)
        if sign < 0:
            domain.seen(b.form)
        rank = len(shape)
        fa, fb = (relaid(v.form, lambda ids: scaling.lifted(ids, rank)) for v in (a, b))
        absorbing = [scaling.lifted(v.absorbing, rank) for v in (a, b) if v.absorbing is not None]
        form = scaling.tidy(domain.system, (*fa, *times(fb, sign)))
        if len(form) < len(fa) + len(fb):  # scales cancel: x / ‖x‖ sees x, at any scale
            domain.seen((*fa, *fb))
        return Scale(shape, form, absorbing[0] | absorbing[-1] if absorbing else None)

    return apply


rule("mul")(_product(1))
rule("div")(_product(-1))


def _one_fresh(domain: Scaling, left: Operand, right: Operand) -> tuple[Operand, Operand]:
    """At most one undecided operand: of two, the larger stays so."""
    left, right = domain.refresh(left), domain.refresh(right)
    if isinstance(left, Fresh) and isinstance(right, Fresh):
        if np.prod(left.compact) < np.prod(right.compact):
            left = domain.scale(left)
        else:
            right = domain.scale(right)
        left, right = domain.refresh(left), domain.refresh(right)
    return left, right


def _multiplied(
    domain: Scaling, fresh: Fresh, other: Scale, shape: tuple[int, ...], factor: int, shift: int
) -> Fresh | None:
    """factor·s(fresh) + s(other) = s(result), or None where the result must be decided now.

    `shift` is −1 where `other` multiplies the result, +1 where it divides it. The result is again
    undecided: y = γ·x takes a scale of its own, and γ gets s(y) − s(x).
    """
    rank = len(shape)
    if fresh.shape != shape and np.prod(fresh.shape) != 1:
        return None
    form = relaid(other.form, lambda ids: scaling.lifted(ids, rank))
    if shift > 0:
        domain.seen(form)
    compact = fresh.compact if fresh.shape == shape else (1,) * rank
    if any(m < n for _, ids in form for m, n in zip(compact, ids.shape, strict=True)):
        return None
    if other.absorbing is not None and (
        other.all_absorbing or fresh.spread or fresh.absorbing is not None
    ):
        return None
    old_rank = len(fresh.shape)
    # Elements that are multiplied by a constant 0 are dead here: any scale, each its own.
    dead = None if other.absorbing is None else scaling.lifted(other.absorbing, rank)

    def push(f: Form) -> Form:
        raised = relaid(f, lambda ids: scaling.lifted(ids, rank))
        return (*times(raised, factor), *times(form, -shift))

    def pull(f: Form) -> Form:
        fresh.leaf.inverse ^= factor < 0
        f = times((*f, *times(form, shift)), factor)
        if dead is not None:
            f = domain.with_dead(np.broadcast_to(dead, shape), f)
        return f if old_rank == rank else relaid(f, lambda ids: ids.reshape((1,) * old_rank))

    view = fresh.through(shape, Step(push, pull), compact)
    view.absorbing = fresh.absorbing if dead is None else dead
    return view
