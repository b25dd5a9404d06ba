"""Operations that are put off, as linear forms: cuts of an axis, products with data along it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.equations import Primitive
from jaxinv._interpreter.walk import (
    Equation,
    Operand,
    Result,
    Rule,
    Rules,
    is_concrete,
    primitive,
)
from jaxinv.frames.choices import CHOICES, Choice
from jaxinv.frames.forms import LONGEST, Deferred, Form, Pending, resolved
from jaxinv.frames.layout import groups_of
from jaxinv.frames.values import Framed, Frames

_MOST = 1 << 20  # coefficients of one value

Made = Callable[..., Form | list[Form] | None]  # forms of the results; None: do it now
FORMS: dict[Primitive, Made] = {}


def put_off(*names: str) -> Callable[[Made], Made]:
    """Enter a function into the table of what is put off."""

    def register(function: Made) -> Made:
        found = [p for p in map(primitive, names) if p is not None]
        FORMS.update(dict.fromkeys(found, function))
        return function

    return register


def lazily(rules: Rules) -> Rules:
    """The rules, with those of forms in front of them."""
    found = {p: _now(rule) for p, rule in rules.items()} | {
        p: _later(made, rules.get(p)) for p, made in FORMS.items()
    }
    return found | {p: _chosen(made, rules[p], found[p]) for p, made in CHOICES.items()}


def _chosen(made: Choice, rule: Rule, otherwise: Rule) -> Rule:
    """A rule that works on all experts at once where an index chooses among them."""

    def apply(domain: Frames, eqn: Equation, *operands: Operand) -> Result:
        found = made(domain, eqn, rule, *operands)
        return otherwise(domain, eqn, *operands) if found is None else found

    return apply


def _now(rule: Rule) -> Rule:
    """A rule that sees no operand that is put off."""
    return lambda domain, eqn, *operands: rule(domain, eqn, *map(resolved, operands))


def _later(made: Made, rule: Rule | None) -> Rule:
    """A rule whose results are put off where they have forms."""

    def apply(domain: Frames, eqn: Equation, *operands: Operand) -> Result:
        results: list[Framed] = []

        def now() -> list[Framed]:
            if not results:
                known = [resolved(v) for v in operands]
                found = rule(domain, eqn, *known) if rule else domain.default(eqn, *known)
                results.extend(cast("list[Framed]", found if _several(found) else [found]))
            return results

        forms = made(domain, eqn, *operands)
        if forms is None:
            return now() if eqn.primitive.multiple_results else now()[0]
        pending = [
            Pending(aval.shape, form, domain, lambda i=i: now()[i])  # type: ignore[misc]
            for i, (aval, form) in enumerate(
                zip(eqn.outputs, [forms] if isinstance(forms, Form) else forms, strict=True)
            )
        ]
        return pending if eqn.primitive.multiple_results else pending[0]

    return apply


def _several(found: object) -> bool:
    return isinstance(found, list)


# --- where a form begins -----------------------------------------------------------------------


def _started(value: Operand) -> Form | None:
    """The form of a value: its own, or itself along the one axis that has frames."""
    if isinstance(value, Deferred):
        return value.form if isinstance(value, Pending) and value.found is None else None
    if not isinstance(value, Framed) or value.square is not None or value.leaf is not None:
        return None
    axes = [a for a, axis in enumerate(value.axes) if axis is not None]
    if len(axes) != 1:
        return None
    (axis,) = axes
    n = value.shape[axis]
    places = [None if a == axis else a for a in range(len(value.shape))]
    one = np.zeros((1, n), int)
    return Form(value, axis, (axis,), tuple(places), np.arange(n)[None], one + 1.0, one)


def _varies(form: Form, a: int | None) -> bool:
    """Whether the frames of the origin depend on where along its axis a one is."""
    axis = form.origin.axes[form.axis] or []
    return a is not None and any(block.refs.shape[a] > 1 for block in axis)


def _small(form: Form | None) -> Form | None:
    return form if form is not None and form.sources.size <= _MOST else None


# --- rules -----------------------------------------------------------------------------------


@put_off("convert_element_type", "reduce_precision")
def _same(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    if not isinstance(value, Pending) or not jnp.issubdtype(eqn.outputs[0].dtype, jnp.inexact):
        return None
    complex_in = jnp.issubdtype(eqn.inputs[0].dtype, jnp.complexfloating)
    return None if complex_in else _started(value)


@put_off("neg")
def _neg(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    form = _started(value) if isinstance(value, Pending) else None
    return None if form is None else form._replace(numbers=-form.numbers)


@put_off("transpose")
def _transpose(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    form = _started(value) if isinstance(value, Pending) else None
    if form is None:
        return None
    order = list(eqn.params["permutation"])
    own = [order.index(a) for a in form.own]
    by_place = np.argsort(own)
    moved = form.each(lambda a: a.transpose([0, *(1 + by_place)]))
    return moved._replace(own=tuple(sorted(own)), places=tuple(form.places[a] for a in order))


@put_off("broadcast_in_dim")
def _broadcast(domain: Frames, eqn: Equation, value: Operand, *_: Operand) -> Form | None:
    form = _started(value) if isinstance(value, Pending) else None
    if form is None:
        return None
    shape, to = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if any(shape[to[a]] != eqn.inputs[0].shape[a] for a in form.own):
        return None
    own = {to[a] for a in form.own} | {a for a, n in enumerate(shape) if a not in to and n == 1}
    places: list[int | None] = [None] * len(shape)
    for a, place in enumerate(form.places):
        places[to[a]] = place
        if shape[to[a]] != eqn.inputs[0].shape[a] and _varies(form, place):
            return None
    lengths = [shape[a] for a in sorted(own)]
    moved = form.each(lambda a: a.reshape(len(a), *lengths))
    return moved._replace(own=tuple(sorted(own)), places=tuple(places))


@put_off("squeeze")
def _squeeze(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    form = _started(value) if isinstance(value, Pending) else None
    if form is None:
        return None
    left = [a for a in range(len(value.shape)) if a not in eqn.params["dimensions"]]  # type: ignore[union-attr]
    own = [a for a in form.own if a in left]
    lengths = [n for a, n in zip(form.own, form.lengths, strict=True) if a in left]
    moved = form.each(lambda a: a.reshape(len(a), *lengths))
    return moved._replace(
        own=tuple(left.index(a) for a in own), places=tuple(form.places[a] for a in left)
    )


@put_off("reshape")
def _reshape(domain: Frames, eqn: Equation, value: Operand, *_: Operand) -> Form | None:
    form = _started(value)
    if form is None:
        return None
    old, new = eqn.inputs[0].shape, eqn.outputs[0].shape
    own: list[int] = []
    places: list[int | None] = [None] * len(new)
    cuts = isinstance(value, Pending)
    for before, after in groups_of(old, new):
        mine = [a for a in before if a in form.own]
        large = [a for a in before if old[a] > 1]
        into = [a for a in after if new[a] > 1]
        if mine:
            if any(a not in form.own for a in large):
                return None
            own += after
            cuts |= len(into) > 1
        elif len(large) == len(into) == 1:
            places[into[0]] = form.places[large[0]]
        elif any(_varies(form, form.places[a]) for a in large):
            return None
    # Axes of length 1 between them may have been left out or brought in.
    lengths = [new[a] for a in own]
    if not cuts or math.prod(lengths) != math.prod(form.lengths):
        return None
    moved = form.each(lambda a: a.reshape(len(a), *lengths))
    return moved._replace(own=tuple(own), places=tuple(places))


def _boxed(form: Form, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]) -> Form:
    where = [slice(None), *(slice(starts[a], limits[a], steps[a]) for a in form.own)]
    return form.each(lambda a: a[tuple(where)])


@put_off("slice")
def _slice(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    form = _started(value)
    if form is None:
        return None
    shape = eqn.inputs[0].shape
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(shape)
    if any(
        n != m and _varies(form, p)
        for n, m, p in zip(shape, eqn.outputs[0].shape, form.places, strict=True)
    ):
        return None
    if not isinstance(value, Pending) and all(
        shape[a] == eqn.outputs[0].shape[a] for a in form.own
    ):
        return None
    return _boxed(form, starts, limits, steps)


@put_off("split")
def _split(domain: Frames, eqn: Equation, value: Operand) -> list[Form] | None:
    form = _started(value)
    axis = eqn.params["axis"]
    if form is None or axis not in form.own:
        return None
    ends = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    rank = len(eqn.inputs[0].shape)
    whole = list(eqn.inputs[0].shape)
    parts = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        starts, limits = [0] * rank, list(whole)
        starts[axis], limits[axis] = start, end
        parts.append(_boxed(form, starts, limits, [1] * rank))
    return parts


@put_off("rev")
def _rev(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    form, axes = _started(value), eqn.params["dimensions"]
    if form is None or not set(axes) <= set(form.own):
        return None
    return form.each(lambda a: np.flip(a, tuple(1 + form.own.index(b) for b in axes)))


@put_off("concatenate")
def _concatenate(domain: Frames, eqn: Equation, *operands: Operand) -> Form | None:
    return _joined([_started(v) for v in operands], eqn.params["dimension"])


@put_off("stack")
def _stack(domain: Frames, eqn: Equation, *operands: Operand) -> Form | None:
    axis, forms = eqn.params["axis"], []
    for value in operands:
        form = _started(value)
        if form is None:
            return None
        own = [a + (a >= axis) for a in form.own] + [axis]
        lengths = dict(zip(own, (*form.lengths, 1), strict=True))
        places = [*form.places[:axis], None, *form.places[axis:]]
        shape = [lengths[a] for a in sorted(own)]
        moved = form.each(lambda a, shape=shape: a.reshape(len(a), *shape))  # type: ignore[misc]
        forms.append(moved._replace(own=tuple(sorted(own)), places=tuple(places)))
    return _joined(forms, axis)


def _joined(forms: Sequence[Form | None], axis: int) -> Form | None:
    known = [f for f in forms if f is not None]
    if len(known) < len(forms) or axis not in known[0].own:
        return None
    if not all(f.alike(known[0]) for f in known):
        return None
    most = max(len(f.sources) for f in known)
    padded = [_padded(f, most) for f in known]
    along = 1 + known[0].own.index(axis)
    joined = known[0]._replace(
        sources=np.concatenate([f.sources for f in padded], along),
        numbers=np.concatenate([f.numbers for f in padded], along),
        labels=np.concatenate([f.labels for f in padded], along),
    )
    return _small(joined)


def _padded(form: Form, most: int) -> Form:
    """With empty terms."""
    more = [(0, most - len(form.sources)), *[(0, 0)] * len(form.own)]
    return form._replace(
        sources=np.pad(form.sources, more, constant_values=-1),
        numbers=np.pad(form.numbers, more),
        labels=np.pad(form.labels, more),
    )


@put_off("add", "add_any")
def _add(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Form | None:
    return _sum(left, right, 1)


@put_off("sub")
def _sub(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Form | None:
    return _sum(left, right, -1)


@put_off("complex")
def _complex(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Form | None:
    return _sum(left, right, 1j)


def _sum(left: Operand, right: Operand, factor: complex) -> Form | None:
    if not isinstance(left, Pending) and not isinstance(right, Pending):
        return None
    x, y = _started(left), _started(right)
    if x is None or y is None or not x.alike(y) or x.lengths != y.lengths:
        return None
    return _small(
        x._replace(
            sources=np.concatenate([x.sources, y.sources]),
            numbers=np.concatenate([x.numbers, factor * y.numbers]),
            labels=np.concatenate([x.labels, y.labels]),
        )
    )


@put_off("real", "imag")
def _part(domain: Frames, eqn: Equation, value: Operand) -> Form | None:
    """Re(c·f)·x and Im(c·f)·x of numbers c that are real or imaginary, and data f."""
    form = _started(value) if isinstance(value, Pending) else None
    if form is None:
        return None
    imaginary = abs(form.numbers.imag) > 0
    if (imaginary & (abs(form.numbers.real) > 0)).any():
        return None
    wanted = eqn.name == "imag"
    labels = domain.labels
    sources, numbers = form.sources.copy(), np.zeros_like(form.numbers)
    coefficients = form.labels.copy()
    for i in np.ndindex(*form.sources.shape):
        c, label, flipped = form.numbers[i], int(form.labels[i]), bool(imaginary[i])
        of_imaginary = flipped != wanted
        numbers[i] = (c.imag * (1 if wanted else -1)) if flipped else c.real
        if label:
            part = "imag" if of_imaginary else "real"
            family = labels.number(("family", part, labels.families[label]), 0)
            coefficients[i] = labels.number((part, label), family)
        elif of_imaginary:
            sources[i], numbers[i] = -1, 0
    return form._replace(sources=sources, numbers=numbers, labels=coefficients)


@put_off("mul")
def _mul(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Form | None:
    for value, factor in ((left, right), (right, left)):
        if _is_data(factor):
            return _weighed(domain, value, factor, eqn.outputs[0].shape)
    return None


@put_off("div")
def _div(domain: Frames, eqn: Equation, left: Operand, right: Operand) -> Form | None:
    if not isinstance(left, Pending) or not is_concrete(right) or np.size(right) != 1:
        return None
    form, number = _started(left), complex(np.asarray(right).item())
    return None if form is None or number == 0 else form._replace(numbers=form.numbers / number)


def _is_data(operand: Operand) -> bool:
    """Whether it allows no frames: a constant, or data."""
    if isinstance(operand, Framed):
        return not operand.framed and not isinstance(operand, Deferred)
    return is_concrete(operand)


def _weighed(domain: Frames, value: Operand, y: Operand, shape: Sequence[int]) -> Form | None:
    """The form times data: each element of y along its axes is a coefficient."""
    form = _started(value)
    if form is None or not isinstance(value, Framed) or value.shape != tuple(shape):
        return None
    pending = isinstance(value, Pending)
    if not pending and not _mixes(form, y):
        return None
    found = _coefficients(domain, form, y, len(shape))
    if found is None:
        return None
    numbers, labels = found
    more = form.labels + labels[None]  # where one of them is the number 1
    for i in np.argwhere((form.labels != 0) & (labels[None] != 0)).tolist():
        at = tuple(i)
        more[at] = domain.labels.product(int(form.labels[at]), int(labels[at[1:]]))
    return form._replace(numbers=form.numbers * numbers[None], labels=more)


def _mixes(form: Form, y: Operand) -> bool:
    """Whether a factor varies along the axis, of a head, and along others, which is no gain."""
    if form.lengths[0] > LONGEST:
        return False
    if isinstance(y, Framed):
        return bool(y.shape) and form.axis not in y.uniform and y.vector is None
    array = np.asarray(y)
    if not array.ndim:
        return False
    varies = [a for a in range(array.ndim) if (array != array.take([0], a)).any()]
    return form.axis in varies and len(varies) > 1


def _coefficients(
    domain: Frames, form: Form, y: Operand, rank: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The number and the label of a factor at each place along the axes of the form."""
    numbers, labels = np.ones(form.lengths, complex), np.zeros(form.lengths, int)
    if isinstance(y, Framed):
        if not hasattr(y, "key"):
            return None
        family = domain.labels.number(("array", y.key), 0)
        varies = [bool(y.shape) and a not in y.uniform for a in form.own]
        for i in np.ndindex(*form.lengths):
            at = tuple(k if v else 0 for k, v in zip(i, varies, strict=True))
            labels[i] = domain.labels.number((family, at), family)
        return numbers, labels
    array = np.asarray(y)
    if not jnp.issubdtype(array.dtype, jnp.number):
        return None
    if not array.ndim:
        return numbers * complex(array.item()), labels
    if array.ndim != rank:
        return None
    for a in range(rank):
        first = array.take([0], a)
        array = first if (array == first).all() else array
    rest = [a for a in range(rank) if a not in form.own]
    lengths = [array.shape[a] for a in form.own]
    columns = array.transpose([*form.own, *rest]).reshape(*lengths, -1)
    family = domain.labels.number(("constant", columns.tobytes(), columns.shape), 0)
    few, of = np.ones(lengths, complex), np.zeros(lengths, int)
    for i in np.ndindex(*lengths):
        column = columns[i]
        if (column == column[0]).all():
            few[i] = column[0]
        else:
            of[i] = domain.labels.number(("column", column.tobytes()), family)
    return numbers * few, labels + of
