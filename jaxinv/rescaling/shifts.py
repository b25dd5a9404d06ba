"""Parameters that are only ever added, and then subtracted again.

The bias of the keys adds the same number to all scores that one softmax compares, and softmax looks
at differences: the function does not depend on it. This domain follows what a leaf adds to a value,
δ, as long as that is known: δ = coefficient · (one array), constant along some axes. A maximum or a
mean along such an axis carries δ unchanged, so x − max(x) is free of it. Any other use of a value
that has a δ makes the result depend on the leaf.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import (
    Body,
    Equation,
    Operand,
    Rule,
    Trace,
    Value,
    interpret,
    is_concrete,
    rule_table,
)
from jaxinv.typing import ArrayLike

RULES, rule = rule_table()


Axes = tuple[Hashable, ...]  # a name for each; None for an axis along which δ is constant


class Delta(NamedTuple):
    """coefficient · D, where D is the array number `source`, its axes named by `axes`.

    An axis of the value with name None is one along which δ is constant.
    """

    source: int
    coefficient: Fraction
    axes: Axes


class Shifted(Value):
    """A value that depends on the leaves `on` in any way, and on others by adding a δ."""

    __slots__ = ("deltas", "finite", "on", "shape")

    def __init__(self, shape: Sequence[int], on: frozenset[int], deltas: dict[int, Delta]):
        self.shape, self.on, self.deltas = tuple(shape), on, deltas
        self.finite: Hashable = None  # the key of the value of which it says what is finite

    @property
    def all(self) -> frozenset[int]:
        return self.on | frozenset(self.deltas)


class ShiftDomain:
    """Which leaves the outputs depend on."""

    rules = RULES

    def __init__(self) -> None:
        self.sources = itertools.count()

    def default(self, eqn: Equation, *inputs: Operand) -> Shifted | list[Shifted]:
        on = frozenset().union(*(v.all for v in inputs if isinstance(v, Shifted)))
        outputs = [Shifted(aval.shape, on, {}) for aval in eqn.outputs]
        return outputs if eqn.primitive.multiple_results else outputs[0]

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        del body
        return self._any(eqn, [*consts, *init, *xs])

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        del branches
        return self._any(eqn, [index, *inputs])

    def unbounded_while(
        self, eqn: Equation, condition: Callable[..., list], body: Callable[..., list], carry: list
    ) -> list:
        """Its constants are not among the operands here, so they are read off the equation."""
        raise _Unknown

    def _any(self, eqn: Equation, inputs: list) -> list:
        on = frozenset().union(*(v.all for v in inputs if isinstance(v, Shifted)))
        return [_fresh_key(Shifted(aval.shape, on, {})) for aval in eqn.outputs]


class _Unknown(Exception):
    """The program has a loop whose operands this domain does not see."""


def _fresh_key(value: Shifted) -> Shifted:
    value.key = object()
    return value


def cancelled(trace: Trace, shapes: Sequence[tuple[int, ...]]) -> list[bool]:
    """For every leaf whether all that it adds is subtracted again.

    In a batch of one everything is constant along the batch, so the trace must be of a function
    that treats examples apart, or of the batch whole.
    """
    domain = ShiftDomain()
    leaves = [
        Shifted(shape, frozenset(), {i: Delta(next(domain.sources), Fraction(1), _named(shape))})
        for i, shape in enumerate(shapes)
    ]
    avals = trace.jaxpr.in_avals[len(shapes) :]
    xs = [Shifted(aval.shape, frozenset(), {}) for aval in avals]
    try:
        outputs = interpret(trace, leaves, xs, domain)
    except _Unknown:
        return [False] * len(shapes)
    on = frozenset().union(*(_lost(v) for v in outputs))
    return [i not in on for i in range(len(shapes))]


def _named(shape: Sequence[int]) -> Axes:
    return tuple(a if n > 1 else None for a, n in enumerate(shape))


def _lost(value: Operand) -> frozenset[int]:
    return value.all if isinstance(value, Shifted) else frozenset()


def _deltas(value: Operand) -> dict[int, Delta]:
    return value.deltas if isinstance(value, Shifted) else {}


def _raised(delta: Delta, rank: int) -> Delta:
    """A number may be added to an array without being broadcast first."""
    return delta if delta.axes else delta._replace(axes=(None,) * rank)


# --- sums -----------------------------------------------------------------------------


def _sum(sign: int) -> Rule:
    def apply(
        domain: ShiftDomain, eqn: Equation, left: Operand, right: Operand
    ) -> Shifted | list[Shifted]:
        if not jnp.issubdtype(eqn.outputs[0].dtype, jnp.inexact):
            return domain.default(eqn, left, right)
        shape = eqn.outputs[0].shape
        a, b = ({i: _raised(d, len(shape)) for i, d in _deltas(v).items()} for v in (left, right))
        if any(len(d.axes) != len(shape) for d in (*a.values(), *b.values())):
            return domain.default(eqn, left, right)
        on = frozenset().union(*(v.on for v in (left, right) if isinstance(v, Shifted)))
        deltas: dict[int, Delta] = {}
        for i in a.keys() | b.keys():
            one, other = a.get(i), b.get(i)
            if one is None or other is None:
                found = one or other
                assert found is not None
                if i in on:
                    continue
                factor = 1 if one is not None else sign
                deltas[i] = found._replace(coefficient=factor * found.coefficient)
            elif (one.source, one.axes) == (other.source, other.axes):
                total = one.coefficient + sign * other.coefficient
                if total:
                    deltas[i] = one._replace(coefficient=total)
            else:
                on |= {i}
        return Shifted(shape, on, {i: d for i, d in deltas.items() if i not in on})

    return apply


rule("add", "add_any")(_sum(1))
rule("sub")(_sum(-1))


@rule("neg", "convert_element_type")
def _same(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted | list[Shifted]:
    """The sign, or a number that can hold more: rounding does not pass differences on."""
    old, new = eqn.inputs[0].dtype, eqn.outputs[0].dtype
    if not (jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)):
        return domain.default(eqn, value)
    if jnp.finfo(new).bits < jnp.finfo(old).bits:
        return domain.default(eqn, value)
    sign = -1 if eqn.name == "neg" else 1
    deltas = {i: d._replace(coefficient=sign * d.coefficient) for i, d in value.deltas.items()}
    return Shifted(value.shape, value.on, deltas)


# --- products with what does not depend on the leaf -----------------------------------


@rule("mul", "div")
def _product(
    domain: ShiftDomain, eqn: Equation, left: Operand, right: Operand
) -> Shifted | list[Shifted]:
    number = right if is_concrete(right) else left if eqn.name == "mul" else None
    if number is not None and is_concrete(number) and _one_number(number):
        value = left if number is right else right
        factor = Fraction(float(np.asarray(number).flat[0]))
        real = jnp.issubdtype(eqn.outputs[0].dtype, jnp.floating)
        if factor and real and isinstance(value, Shifted) and value.shape == eqn.outputs[0].shape:
            factor = 1 / factor if eqn.name == "div" else factor
            deltas = {
                i: d._replace(coefficient=factor * d.coefficient) for i, d in value.deltas.items()
            }
            return Shifted(value.shape, value.on, deltas)
    return domain.default(eqn, left, right)


def _one_number(value: ArrayLike) -> bool:
    array = np.asarray(value)
    if not array.size:
        return False
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    array = array.astype(np.float64)
    return bool(np.isfinite(array).all() and (array == array.flat[0]).all())


@rule("dot_general")
def _dot_general(domain: ShiftDomain, eqn: Equation, left: Operand, right: Operand) -> Shifted:
    """δ is multiplied by the other operand: a new array, constant along the free axes of δ."""
    contracted, batch = eqn.params["dimension_numbers"]
    on = frozenset().union(*(v.on for v in (left, right) if isinstance(v, Shifted)))
    free = [
        [a for a in range(len(aval.shape)) if a not in (*contracted[i], *batch[i])]
        for i, aval in enumerate(eqn.inputs)
    ]
    shape = eqn.outputs[0].shape
    deltas: dict[int, Delta] = {}
    for side, (value, other) in enumerate(((left, right), (right, left))):
        skip = len(batch[0]) + (len(free[0]) if side else 0)
        for i, delta in _deltas(value).items():
            if i in _lost(other) or i in on:
                on |= {i}
                continue
            named = list(_named(shape))
            for place, axis in enumerate(free[side]):
                if delta.axes[axis] is None:
                    named[skip + place] = None
            deltas[i] = Delta(next(domain.sources), Fraction(1), tuple(named))
    return Shifted(shape, on, {i: d for i, d in deltas.items() if i not in on})


# --- reductions and choices -----------------------------------------------------------


@rule("reduce_max", "reduce_min", "reduce_sum")
def _reduce(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    axes = eqn.params["axes"]
    count = int(np.prod([value.shape[a] for a in axes]))
    factor = Fraction(count if eqn.name == "reduce_sum" else 1)
    on, deltas = value.on, {}
    for i, delta in value.deltas.items():
        if count and all(delta.axes[a] is None for a in axes):
            kept = tuple(name for a, name in enumerate(delta.axes) if a not in axes)
            deltas[i] = Delta(delta.source, factor * delta.coefficient, kept)
        else:
            on |= {i}
    return Shifted(eqn.outputs[0].shape, on, deltas)


@rule("max", "min")
def _extreme(
    domain: ShiftDomain, eqn: Equation, left: Operand, right: Operand
) -> Shifted | list[Shifted]:
    """max(x, −∞) is x."""
    limit = -np.inf if eqn.name == "max" else np.inf
    for value, other in ((left, right), (right, left)):
        if isinstance(value, Shifted) and is_concrete(other):
            if bool((np.asarray(other).astype(np.float64) == limit).all()):
                if value.shape == eqn.outputs[0].shape:
                    return Shifted(value.shape, value.on, dict(value.deltas))
    return domain.default(eqn, left, right)


@rule("argmax", "argmin")
def _arg(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    axes = eqn.params["axes"]
    moved = {i for i, d in value.deltas.items() if any(d.axes[a] is not None for a in axes)}
    return Shifted(eqn.outputs[0].shape, value.on | moved, {})


@rule("is_finite")
def _is_finite(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    """A finite δ changes nothing about which elements are finite."""
    result = Shifted(value.shape, value.on, {})
    result.finite = value.key
    return result


@rule("select_n")
def _select(
    domain: ShiftDomain, eqn: Equation, which: Operand, *cases: Operand
) -> Shifted | list[Shifted]:
    """x where x is finite: elsewhere a δ is lost on x."""
    if isinstance(which, Shifted) and len(cases) == 2 and isinstance(cases[1], Shifted):
        if which.finite is not None and which.finite == cases[1].key and not _lost(cases[0]):
            return Shifted(cases[1].shape, which.on | cases[1].on, dict(cases[1].deltas))
    kept = [v for v in cases if isinstance(v, Shifted)]
    others = [v for v in cases if not isinstance(v, Shifted)]
    if len(kept) == 1 and all(_infinite(v) for v in others):  # −∞ + δ is −∞
        (value,) = kept
        on = value.on | _lost(which)
        return Shifted(value.shape, on, {i: d for i, d in value.deltas.items() if i not in on})
    return domain.default(eqn, which, *cases)


def _infinite(value: Operand) -> bool:
    return is_concrete(value) and bool(np.isinf(np.asarray(value).astype(np.float64)).all())


# --- layout ---------------------------------------------------------------------------


def _relaid(
    shape: Sequence[int], value: Shifted, names: Callable[[Axes], Sequence[Hashable]]
) -> Shifted:
    deltas = {i: d._replace(axes=tuple(names(d.axes))) for i, d in value.deltas.items()}
    return Shifted(shape, value.on, deltas)


@rule("broadcast_in_dim")
def _broadcast(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    place = eqn.params["broadcast_dimensions"]
    shape = eqn.outputs[0].shape

    def names(axes: Axes) -> list[Hashable]:
        out: list[Hashable] = [None] * len(shape)
        for a, name in zip(place, axes, strict=True):
            out[a] = name
        return out

    return _relaid(shape, value, names)


@rule("transpose")
def _transpose(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    order = eqn.params["permutation"]
    return _relaid(eqn.outputs[0].shape, value, lambda axes: [axes[a] for a in order])


@rule("reshape", "squeeze", "expand_dims")
def _reshape(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    """Only axes of length one come and go; a merged axis is a new one."""
    old, new = value.shape, eqn.outputs[0].shape
    if [n for n in old if n != 1] != [n for n in new if n != 1]:
        return _merged(domain, eqn, value)
    kept = [a for a, n in enumerate(old) if n != 1]

    def names(axes: Axes) -> list[Hashable]:
        left = iter(axes[a] for a in kept)
        return [None if n == 1 else next(left) for n in new]

    return _relaid(new, value, names)


def _merged(domain: ShiftDomain, eqn: Equation, value: Shifted) -> Shifted:
    """A δ that varies along no axis stays; another is a new array that varies along all."""
    shape, deltas = eqn.outputs[0].shape, {}
    for i, delta in value.deltas.items():
        if all(name is None for name in delta.axes):
            deltas[i] = delta._replace(axes=(None,) * len(shape))
        else:
            deltas[i] = Delta(next(domain.sources), Fraction(1), _named(shape))
    return Shifted(shape, value.on, deltas)
