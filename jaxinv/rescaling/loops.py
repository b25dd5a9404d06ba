"""`scan`, data-dependent `cond` and `while` in the scaling domain."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

import jax
import numpy as np

from jaxinv._interpreter.walk import Body, Equation, Operand, Value, is_concrete
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.cases import Cases, root
from jaxinv.rescaling.cases import collected as collected_cases
from jaxinv.rescaling.layout import without_axis
from jaxinv.rescaling.values import Fresh, Scale, Scaling, relaid
from jaxinv.typing import Array

V = TypeVar("V", bound=Value)


def _at(domain: Scaling, value: Value | Array, t: int) -> Value | Array:
    """The slice of a scanned value at step t."""
    if not isinstance(value, Value):
        with jax.ensure_compile_time_eval():
            taken = value[t]
        domain.folded([value], [taken])
        return taken
    value = domain.scale(value)

    def take(a: np.ndarray) -> np.ndarray:
        return a[0 if a.shape[0] == 1 else t]

    absorbing = None if value.absorbing is None else take(value.absorbing)
    return _keyed(Scale(value.shape[1:], relaid(value.form, take), absorbing))


def _keyed(value: V) -> V:
    value.key = object()
    return value


def _signature(domain: Scaling, values: Sequence[Operand]) -> list[Hashable]:
    """What tells whether a step of the loop starts from the same scales as the step before."""
    out: list[Hashable] = []
    for value in values:
        if isinstance(value, Fresh) and domain.refresh(value) is value:
            out.append(("undecided", id(value.leaf), len(value.steps)))
            continue
        if not isinstance(value, Value):
            known = is_concrete(value) and not jax.dtypes.issubdtype(
                jax.numpy.result_type(value), jax.dtypes.extended
            )
            out.append(("constant", np.asarray(value).tobytes() if known else None))
            continue
        scale = domain.scale(value)
        form = scaling.tidy(domain.system, scale.form)
        absorbing = (
            None if scale.absorbing is None else (scale.absorbing.shape, scale.absorbing.tobytes())
        )
        out.append((scaling.signature(form), absorbing))
    return out


def scan(domain: Scaling, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
    """Walk the body step by step, until steps stop adding anything.

    Steps differ in scale (a linear recurrence grows geometrically), so none can be left out before
    one has been seen to repeat the last: same carry, same slices, and no new equation.
    """
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    system = domain.system
    pieces: list[list[Fresh] | None] = []
    for value in xs:
        value = domain.refresh(value)
        split = None
        if isinstance(value, Fresh):
            split = domain.parts(value, 0, [1] * length)
        pieces.append(split)
    carry = list(init)
    collected: list[list[Scale]] = []
    before: tuple[list[Hashable], list[Hashable]] | None = None
    order = range(length - 1, -1, -1) if reverse else range(length)
    for t in order:
        slices = [
            _at(domain, value, t) if split is None else _keyed(without_axis(split[t], 0))
            for value, split in zip(xs, pieces, strict=True)
        ]
        start = _signature(domain, carry), _signature(domain, slices)
        roots, equations = system.find(np.arange(system.size)), len(system.blocks)
        outs = body(*consts, *carry, *slices)
        carry, ys = [_plain(domain, v) for v in outs[: len(init)]], outs[len(init) :]
        collected.append([domain.scale(y) for y in ys])
        settled = (
            not any(pieces)
            and start == before
            and len(system.blocks) == equations
            and np.array_equal(system.find(np.arange(len(roots))), roots)
            and _signature(domain, carry) == start[0]
        )
        if settled:
            collected += [collected[-1]] * (length - len(collected))
            carry = [_keyed(_copy(v)) if isinstance(v, Scale) else v for v in carry]
            break
        before = start
    if reverse:
        collected.reverse()
    stacked = [
        _stacked(domain, [step[i] for step in collected], aval.shape)
        for i, aval in enumerate(eqn.outputs[len(init) :])
    ]
    return [*carry, *stacked]


def _stacked(domain: Scaling, values: Sequence[Scale], shape: Sequence[int]) -> Scale:
    if not values:  # no element, and a sum of none is 0
        return _keyed(Scale(shape, (), np.ones((1,) * len(shape), bool)))
    if any(v.shape != tuple(shape[1:]) for v in values):
        return _keyed(Scale(shape))  # not asked for, so not worked out
    forms = [scaling.tidy(domain.system, v.form) for v in values]
    signatures = _signature(domain, values)
    if all(s == signatures[0] for s in signatures):
        absorbing = None if values[0].absorbing is None else values[0].absorbing[None]
        return Scale(shape, relaid(forms[0], lambda a: a[None]), absorbing)
    lifted = [relaid(f, lambda a: a[None]) for f in forms]
    form = scaling.side_by_side(domain.system, lifted, [1] * len(forms), 0)
    none = np.zeros((1,) * (len(shape) - 1), bool)
    absorbing_masks = [none if v.absorbing is None else v.absorbing for v in values]
    full = np.broadcast_shapes(*(w.shape for w in absorbing_masks))
    return Scale(shape, form, np.stack([np.broadcast_to(w, full) for w in absorbing_masks]))


def switch(
    domain: Scaling, eqn: Equation, index: Operand, branches: list[Body], inputs: list
) -> list:
    """`cond` by a value that is not known: the results have the scale of the branch taken."""
    if isinstance(index, Value):
        domain.pin(eqn, index)
    results = [branch(*inputs) for branch in branches]
    key = root(index).key if isinstance(index, Value) else object()
    number = domain.index_number((key, "choice"))
    return [
        _keyed(cast(Value, collected_cases(domain, number, (), [domain.scale(v) for v in one])))
        for one in zip(*results, strict=True)
    ]


def _plain(domain: Scaling, value: Operand) -> Operand:
    return _keyed(domain.scale(value)) if isinstance(value, Cases) else value


def unbounded_while(
    domain: Scaling,
    eqn: Equation,
    condition: Callable[..., list],
    body: Callable[..., list],
    carry: list,
) -> list:
    """A `while` of unknown length: its carry has the same scale before and after every step."""
    state: list[Scale] = [_keyed(_copy(domain.scale(v))) for v in carry]
    while True:
        before = _signature(domain, state)
        (go_on,) = condition(*state)
        if isinstance(go_on, Value):
            domain.pin(eqn, go_on)
        after = body(*state)
        state = [
            _keyed(domain.joined(eqn, a, b, a.shape)) for a, b in zip(state, after, strict=True)
        ]
        if _signature(domain, state) == before:
            return state


def _copy(scale: Scale) -> Scale:
    return Scale(scale.shape, scale.form, scale.absorbing)
