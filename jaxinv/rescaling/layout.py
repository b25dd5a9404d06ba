"""Scaling rules of operations that move elements about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Operand, Result, Value, rule_table
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.values import Fresh, Predicate, Scale, Scaling, Step, WithEpsilon, relaid
from jaxinv.typing import ArrayLike

RULES, rule = rule_table()


def _layout(
    move: Callable[[Equation, np.ndarray], np.ndarray],
    back: Callable[[Equation, np.ndarray], np.ndarray] | None = None,
) -> Callable:
    """The same move on ids. `back` undoes it, which lets an undecided parameter stay so."""

    def apply(domain: Scaling, eqn: Equation, value: Operand, *rest: Operand) -> Value:
        shape = eqn.outputs[0].shape
        if isinstance(value, WithEpsilon):
            base = cast(Scale, apply(domain, eqn, value.base))
            return WithEpsilon(base, value.epsilon, lambda: domain.pinned(eqn, base))
        if isinstance(value, Predicate):
            return Predicate(shape, relaid(value.compared, lambda ids: move(eqn, ids)))
        value = domain.refresh(value)
        if isinstance(value, Fresh) and back is not None:
            step = Step(
                lambda f: relaid(f, lambda ids: move(eqn, ids)),
                lambda f: relaid(f, lambda ids: back(eqn, ids)),
            )
            compact = move(eqn, np.broadcast_to(np.int8(0), value.compact)).shape
            view = value.through(shape, step, compact)
            view.absorbing = None if value.absorbing is None else move(eqn, value.absorbing)
            return view
        value = domain.scale(value)
        absorbing = None if value.absorbing is None else move(eqn, value.absorbing)
        return Scale(shape, relaid(value.form, lambda ids: move(eqn, ids)), absorbing)

    return apply


rule("reshape")(
    _layout(
        lambda eqn, a: scaling.reshaped(a, eqn.inputs[0].shape, eqn.outputs[0].shape),
        lambda eqn, a: scaling.reshaped(a, eqn.outputs[0].shape, eqn.inputs[0].shape),
    )
)
rule("transpose")(
    _layout(
        lambda eqn, a: a.transpose(eqn.params["permutation"]),
        lambda eqn, a: a.transpose(np.argsort(eqn.params["permutation"])),
    )
)
rule("squeeze", "expand_dims")(
    _layout(
        lambda eqn, a: scaling.reshaped(a, eqn.inputs[0].shape, eqn.outputs[0].shape),
        lambda eqn, a: scaling.reshaped(a, eqn.outputs[0].shape, eqn.inputs[0].shape),
    )
)
rule("rev")(
    _layout(
        lambda eqn, a: np.flip(a, eqn.params["dimensions"]),
        lambda eqn, a: np.flip(a, eqn.params["dimensions"]),
    )
)


def _spread(eqn: Equation, a: np.ndarray) -> np.ndarray:
    shape = [1] * len(eqn.outputs[0].shape)
    for axis, length in zip(eqn.params["broadcast_dimensions"], a.shape, strict=True):
        shape[axis] = length
    return a.reshape(shape)


def _unspread(eqn: Equation, a: np.ndarray) -> np.ndarray:
    return a.reshape([a.shape[axis] for axis in eqn.params["broadcast_dimensions"]])


rule("broadcast_in_dim")(_layout(_spread, _unspread))


def _sliced(eqn: Equation, a: np.ndarray) -> np.ndarray:
    p = eqn.params
    strides = p["strides"] or (1,) * a.ndim
    index = tuple(
        slice(None) if n == 1 else slice(lo, hi, step)
        for n, lo, hi, step in zip(
            a.shape, p["start_indices"], p["limit_indices"], strides, strict=True
        )
    )
    return a[index]


@rule("slice")
def _slice(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    lengths = zip(eqn.inputs[0].shape, eqn.outputs[0].shape, strict=True)
    cut = [a for a, (n, m) in enumerate(lengths) if n != m]
    if len(cut) == 1 and eqn.outputs[0].shape[cut[0]] == 1:
        part = domain.part(value, cut[0], eqn.params["start_indices"][cut[0]])
        if part is not None:
            return part
    return _layout(_sliced)(domain, eqn, domain.scale(value))


def by_binding(eqn: Equation, array: np.ndarray, *rest: ArrayLike, **changed: object) -> np.ndarray:
    """The operation itself, on an array of integers."""
    with jax.ensure_compile_time_eval():
        operands = [jnp.asarray(r) for r in (array.astype(np.int32), *rest)]
        return np.asarray(eqn.bind(*operands, **changed))


@rule("tile")
def _tile(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    old, reps = eqn.inputs[0].shape, eqn.params["reps"]

    def move(eqn: Equation, a: np.ndarray) -> np.ndarray:
        return np.tile(a, [r if n > 1 or m == 1 and n > 1 else 1
                           for r, n, m in zip(reps, a.shape, old, strict=True)])  # fmt: skip

    return _layout(move)(domain, eqn, domain.scale(value))


@rule("split", "unstack")
def _split(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    axis: int = eqn.params["axis"]
    sizes: Sequence[int] = eqn.params.get("sizes", ())
    if eqn.name == "unstack":
        sizes = [1] * eqn.inputs[0].shape[axis]
    value = domain.refresh(value)
    parts = domain.parts(value, axis, sizes) if isinstance(value, Fresh) else None
    if parts is None:
        whole = domain.scale(value)
        starts = np.cumsum([0, *sizes])

        def cut(a: np.ndarray, i: int) -> np.ndarray:
            return a if a.shape[axis] == 1 else np.take(a, range(starts[i], starts[i + 1]), axis)

        parts = [
            Scale(
                [n if a == axis else m for a, m in enumerate(whole.shape)],
                relaid(whole.form, lambda ids, i=i: cut(ids, i)),  # type: ignore[misc]
                None if whole.absorbing is None else cut(whole.absorbing, i),
            )
            for i, n in enumerate(sizes)
        ]
    return [without_axis(part, axis) for part in parts] if eqn.name == "unstack" else parts


def without_axis(value: Fresh | Scale, axis: int) -> Fresh | Scale:
    """A value with one axis of length one taken out."""
    shape = tuple(n for a, n in enumerate(value.shape) if a != axis)
    step = Step(
        lambda f: relaid(f, lambda ids: ids.squeeze(axis)),
        lambda f: relaid(f, lambda ids: np.expand_dims(ids, axis)),
    )
    if isinstance(value, Fresh):
        compact = [n for a, n in enumerate(value.compact) if a != axis]
        return value.through(shape, step, compact)
    absorbing = None if value.absorbing is None else value.absorbing.squeeze(axis)
    return Scale(shape, step.push(value.form), absorbing)


def _with_axis(value: Scale, axis: int) -> Scale:
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    absorbing = None if value.absorbing is None else np.expand_dims(value.absorbing, axis)
    return Scale(shape, relaid(value.form, lambda ids: np.expand_dims(ids, axis)), absorbing)


@rule("concatenate", "stack")
def _concatenate(domain: Scaling, eqn: Equation, *inputs: Operand) -> Result:
    axis: int = eqn.params["axis" if eqn.name == "stack" else "dimension"]
    shape = eqn.outputs[0].shape
    scales = [domain.scale(v) for v in inputs]
    if eqn.name == "stack":
        scales = [_with_axis(s, axis) for s in scales]
    ends = np.cumsum([s.shape[axis] for s in scales])

    def place(array: np.ndarray, i: int, length: int) -> np.ndarray:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (int(ends[i] - length), int(ends[-1] - ends[i]))
        target = list(array.shape)
        target[axis] = length
        return np.pad(np.broadcast_to(array, target), widths)

    parts = [
        (lambda ids, i=i, n=s.shape[axis]: place(ids, i, n), s.form) for i, s in enumerate(scales)
    ]
    absorbing = None
    for i, s in enumerate(scales):
        if s.absorbing is not None:
            placed = place(s.absorbing, i, s.shape[axis])
            absorbing = placed if absorbing is None else absorbing | placed
    return Scale(shape, scaling.tidy(domain.system, scaling.assemble(parts)), absorbing)


@rule("pad")
def _pad(domain: Scaling, eqn: Equation, value: Operand, filler: Operand) -> Result:
    value, filler = domain.scale(value), domain.scale(filler)
    config = eqn.params["padding_config"]
    rank = len(config)
    padded = [a for a, c in enumerate(config) if tuple(c) != (0, 0, 0)]

    def place(array: np.ndarray) -> np.ndarray:
        target = [value.shape[a] if a in padded else n for a, n in enumerate(array.shape)]
        array = np.broadcast_to(array, target)
        dtype = np.int32
        with jax.ensure_compile_time_eval():
            out = lax.pad(jnp.asarray(array.astype(np.int32)), jnp.zeros((), dtype), config)
            return np.asarray(out).astype(array.dtype)

    inside = place(np.ones((1,) * rank, bool))
    spread = relaid(filler.form, lambda ids: scaling.lifted(ids, rank))
    form = scaling.assemble([(place, value.form), scaling.masked(~inside, spread)])
    absorbing = np.zeros((1,) * rank, bool) if value.absorbing is None else place(value.absorbing)
    if filler.absorbing is not None:
        absorbing = absorbing | ~inside
    return Scale(eqn.outputs[0].shape, scaling.tidy(domain.system, form), absorbing)
