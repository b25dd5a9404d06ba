"""Scaling rules of reading and writing at indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv import _scaling_values as scaling
from jaxinv._jaxpr import Equation, Value, is_concrete, rule_table
from jaxinv._scaling_rules import by_binding
from jaxinv._scaling_values import Fresh, Scale, Step, relaid

RULES, rule = rule_table()


@rule("gather", "dynamic_slice")
def _gather(domain: Any, eqn: Equation, value: Any, *index: Any) -> Any:
    """Constant indices move elements; others may read any element along the indexed axes."""
    shape = eqn.outputs[0].shape
    varying = [i for i in index if isinstance(i, Value)]
    known = all(not isinstance(i, Value) and is_concrete(i) for i in index)
    if eqn.name == "gather":
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        axes = sorted({*numbers.start_index_map, *getattr(numbers, "operand_batching_dims", ())})
    else:
        sizes = eqn.params["slice_sizes"]
        axes = [a for a, n in enumerate(sizes) if n != eqn.inputs[0].shape[a]]
    if known:
        part = _whole_part(domain, eqn, value, index, axes, sizes)
        if part is not None:
            return part
        scale = domain.scale(value)
    else:
        for i in varying:
            domain.pin(eqn, i)
        scale = domain.level(value, axes)
        index = tuple(np.zeros(a.shape, a.dtype) for a in eqn.inputs[1:])
    full = eqn.inputs[0].shape

    def move(array: np.ndarray) -> np.ndarray:
        return by_binding(eqn, np.broadcast_to(array, full), *index)

    def ids(array: np.ndarray) -> np.ndarray:
        return np.maximum(move(array), 0).astype(np.int64)

    form = scaling.tidy(domain.system, relaid(scale.form, ids))
    reached = move(np.ones((1,) * len(full), np.int64)) == 1
    wild = ~reached if scale.wild is None else ~reached | move(scale.wild)
    return Scale(shape, form, wild)


def _whole_part(
    domain: Any, eqn: Equation, value: Any, index: Sequence[Any], axes: list[int], sizes: Any
) -> Any:
    """`stacked[i]`: one whole slice of an undecided parameter, which stays undecided."""
    if not isinstance(value, Fresh) or len(axes) != 1 or sizes[axes[0]] != 1:
        return None
    if any(n != m for a, (n, m) in enumerate(zip(sizes, value.shape, strict=True)) if a != axes[0]):
        return None
    if eqn.name == "dynamic_slice":
        at = int(np.asarray(index[axes[0]]))
    elif np.size(index[0]) == 1:
        at = int(np.asarray(index[0]).reshape(()))
    else:
        return None
    at = min(max(at, 0), value.shape[axes[0]] - 1)
    part = domain.part(value, axes[0], at)
    if part is None or part.shape == eqn.outputs[0].shape:
        return part
    inner, outer = part.shape, eqn.outputs[0].shape
    step = Step(
        lambda f: relaid(f, lambda a: scaling.reshaped(a, inner, outer)),
        lambda f: relaid(f, lambda a: scaling.reshaped(a, outer, inner)),
    )
    return (
        part.through(outer, step) if isinstance(part, Fresh) else Scale(outer, step.push(part.form))
    )


@rule("dynamic_update_slice")
def _update_slice(domain: Any, eqn: Equation, operand: Any, update: Any, *index: Any) -> Any:
    a, b = domain.scale(operand), domain.scale(update)
    shape = eqn.outputs[0].shape
    axes = [i for i, n in enumerate(b.shape) if n != shape[i]]
    if all(not isinstance(i, Value) and is_concrete(i) for i in index):
        starts = [
            min(max(int(np.asarray(i)), 0), n - m)
            for i, n, m in zip(index, shape, b.shape, strict=True)
        ]

        def place(array: np.ndarray) -> np.ndarray:
            target = [
                m if i in axes else n
                for i, (n, m) in enumerate(zip(array.shape, b.shape, strict=True))
            ]
            widths = [
                (starts[i], n - starts[i] - m) if i in axes else (0, 0)
                for i, (n, m) in enumerate(zip(shape, b.shape, strict=True))
            ]
            return np.pad(np.broadcast_to(array, target), widths)

        inside = place(np.ones((1,) * len(shape), bool))
        form = scaling.blend([(place, b.form), scaling.masked(~inside, a.form)])
        none = np.zeros((1,) * len(shape), bool)
        wild = (none if b.wild is None else place(b.wild)) | (
            none if a.wild is None else a.wild & ~inside
        )
        return Scale(shape, scaling.tidy(domain.system, form), wild)
    for i in index:
        if isinstance(i, Value):
            domain.pin(eqn, i)
    levelled = [domain.level(v, axes) for v in (a, b)]
    parts = [
        Scale([1 if i in axes else n for i, n in enumerate(shape)], v.form, v.wild)
        for v in levelled
    ]
    joined = scaling.join(domain.system, parts[0], parts[1], parts[0].shape)
    return Scale(shape, joined.form)


@rule("scatter", "scatter_add", "scatter_sub", "scatter_min", "scatter_max")
def _scatter(domain: Any, eqn: Equation, operand: Any, index: Any, update: Any) -> Any:
    """Written elements share the scale of what they are written over, along the indexed axes."""
    if isinstance(index, Value):
        domain.pin(eqn, index)
    numbers = eqn.params["dimension_numbers"]
    shape = eqn.outputs[0].shape
    a, b = domain.scale(operand), domain.scale(update)
    if eqn.name == "scatter" and not isinstance(index, Value) and is_concrete(index):
        return _overwritten(domain, eqn, a, index, b)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    inserted = {*numbers.inserted_window_dims, *batching}
    window = [i for i in range(len(shape)) if i not in inserted]
    axes = sorted({*numbers.scatter_dims_to_operand_dims, *batching})
    outside = [i for i in range(len(b.shape)) if i not in numbers.update_window_dims]
    inner = [u for u, i in zip(numbers.update_window_dims, window, strict=True) if i in axes]
    a, b = domain.level(a, axes), domain.level(b, [*outside, *inner])
    target = [1] * len(shape)
    for u, i in zip(numbers.update_window_dims, window, strict=True):
        target[i] = b.shape[u] if i not in axes else 1

    def onto(array: np.ndarray) -> np.ndarray:
        lengths = [1] * len(shape)
        for u, i in zip(numbers.update_window_dims, window, strict=True):
            lengths[i] = array.shape[u]
        return array.reshape(lengths)

    moved = Scale(target, relaid(b.form, onto), None if b.wild is None else onto(b.wild))
    joined = scaling.join(
        domain.system, a, moved, [1 if i in axes else n for i, n in enumerate(shape)]
    )
    # Elements nobody wrote to keep their zeros, and zeros fit every scale.
    return Scale(shape, joined.form)


def _overwritten(domain: Any, eqn: Equation, a: Scale, index: Any, b: Scale) -> Scale:
    shape = eqn.outputs[0].shape
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}

    def write(under: np.ndarray, over: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            arrays = (
                jnp.asarray(np.broadcast_to(v, s).astype(np.int32))
                for v, s in ((under, shape), (over, b.shape))
            )
            first, second = arrays
            return np.asarray(lax.scatter(first, jnp.asarray(index), second, **options))

    zero, one = np.zeros((1,) * len(shape), np.int64), np.ones((1,) * len(b.shape), np.int64)
    form = scaling.blend(
        [
            (lambda ids: write(zero, ids).astype(np.int64), b.form),
            scaling.masked(write(zero, one) == 0, a.form),
        ]
    )
    wild = write(zero if a.wild is None else a.wild, one * 0 if b.wild is None else b.wild) > 0
    return Scale(shape, scaling.tidy(domain.system, form), wild)
