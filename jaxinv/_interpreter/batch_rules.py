"""Rules of the batch domain: where an operation leaves the axis of the examples.

What is not here mixes examples. To add an operation, add one rule here and one row to
`tests/_interpreter/test_batch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch_values import (
    CUMULATIVE,
    ELEMENTWISE,
    MATRICES,
    REDUCTIONS,
    RESHAPES,
    Apart,
    Examples,
    Held,
    Mixed,
    Pieces,
    Place,
)
from jaxinv._interpreter.walk import Equation, Operand, Value, is_concrete
from jaxinv.typing import ArrayLike

# --- rules of operations on examples --------------------------------------------------


def of_examples(domain: Examples, eqn: Equation, inputs: Sequence[Operand]) -> list[Value]:
    """The results of an operation of which at least one operand holds examples."""
    name = eqn.name.replace("-", "_")
    if name in ELEMENTWISE:
        place = domain.common(inputs)
    elif name in _RULES:
        found = _RULES[name](domain, eqn, *inputs)
        if isinstance(found, list):
            return found
        place = found
    else:
        raise Mixed(f"`{name}` is not known to keep them apart")
    return [Apart(a.shape, place) for a in eqn.outputs]


_RULES: dict[str, Callable[..., Place | list[Value]]] = {}


def _rule(*names: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _place_of(value: Operand) -> Place:
    if not isinstance(value, Apart):
        raise Mixed("positions of examples are used as numbers")
    return value.place


def _require(kept: bool, why: str = "") -> None:
    if not kept:
        raise Mixed(why or "it works along the axis of the examples")


def _without(place: Place, axes: Sequence[int]) -> Place:
    """The place after `axes` are dropped."""
    _require(place.axis not in axes)
    return place._replace(axis=place.axis - sum(a < place.axis for a in axes))


@_rule("transpose")
def _transpose(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    return place._replace(axis=tuple(eqn.params["permutation"]).index(place.axis))


@_rule("broadcast_in_dim")
def _broadcast(domain: Examples, eqn: Equation, value: Operand, *rest: Operand) -> Place:
    place = _place_of(value)
    return place._replace(axis=eqn.params["broadcast_dimensions"][place.axis])


@_rule(*RESHAPES)
def _reshape(domain: Examples, eqn: Equation, value: Operand, *rest: Operand) -> Place:
    """The digit of the example moves to the axis of the new shape that has its stride."""
    place, old, new = _place_of(value), eqn.inputs[0].shape, eqn.outputs[0].shape
    _require(eqn.params.get("dimensions") is None or eqn.name != "reshape")
    stride = place.inner * prod(old[place.axis + 1 :])
    for axis, length in enumerate(new):
        step = prod(new[axis + 1 :])
        if step and step <= stride < step * length:
            whole = stride % step == 0 and step * length % (stride * domain.size) == 0
            _require(whole, "it cuts through the axis of the examples")
            inner = stride // step
            return Place(axis, length // (domain.size * inner), inner)
    raise Mixed("it cuts through the axis of the examples")


@_rule("rev")
def _rev(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    _require(place.axis not in eqn.params["dimensions"])
    return place


@_rule("slice")
def _slice(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    _require(eqn.inputs[0].shape[place.axis] == eqn.outputs[0].shape[place.axis])
    return place


@_rule("pad")
def _pad(domain: Examples, eqn: Equation, value: Operand, filler: Operand) -> Place:
    place = _place_of(value)
    _require(not isinstance(filler, Apart | Pieces))
    _require(tuple(eqn.params["padding_config"][place.axis]) == (0, 0, 0))
    return place


@_rule("tile")
def _tile(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    _require(eqn.params["reps"][place.axis] == 1)
    return place


@_rule("split", "unstack")
def _split(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    if eqn.name == "unstack":
        return _without(place, [eqn.params["axis"]])
    _require(place.axis != eqn.params["axis"])
    return place


@_rule("concatenate", "stack")
def _concatenate(domain: Examples, eqn: Equation, *inputs: Operand) -> Place | list[Value]:
    if eqn.name == "stack":
        place = domain.common(inputs)
        return place._replace(axis=place.axis + (place.axis >= eqn.params["axis"]))
    axis = eqn.params["dimension"]
    try:
        place = domain.common(inputs)
    except Mixed:
        integers = all(jnp.issubdtype(a.dtype, jnp.integer) for a in eqn.inputs)
        if axis == len(eqn.outputs[0].shape) - 1 and integers:
            return [Pieces(eqn.outputs[0].shape, inputs)]
        raise
    _require(place.axis != axis)
    return place


@_rule(*REDUCTIONS)
def _reduce(domain: Examples, eqn: Equation, value: Operand) -> Place:
    return _without(_place_of(value), eqn.params["axes"])


@_rule(*CUMULATIVE)
def _cumulate(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    _require(place.axis != eqn.params["axis"])
    return place


@_rule("sort")
def _sort(domain: Examples, eqn: Equation, *values: Operand) -> Place:
    place = domain.common(values)
    _require(place.axis != eqn.params["dimension"])
    return place


@_rule("top_k")
def _top_k(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place, rank = _place_of(value), len(eqn.inputs[0].shape)
    _require(place.axis != eqn.params.get("axis", -1) % rank)
    return place


@_rule("fft")
def _fft(domain: Examples, eqn: Equation, value: Operand) -> Place:
    place = _place_of(value)
    _require(place.axis < len(eqn.inputs[0].shape) - len(eqn.params["fft_lengths"]))
    return place


@_rule(*MATRICES)
def _matrices(domain: Examples, eqn: Equation, *values: Operand) -> Place:
    place = domain.common(values)
    _require(all(place.axis < len(a.shape) - 2 for a in eqn.inputs))
    return place


@_rule("bitcast_convert_type")
def _bitcast(domain: Examples, eqn: Equation, value: Operand) -> Place:
    _require(len(eqn.inputs[0].shape) == len(eqn.outputs[0].shape))
    return _place_of(value)


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _window(domain: Examples, eqn: Equation, value: Operand, *rest: Operand) -> Place:
    place, p = _place_of(value), eqn.params
    options = (p["window_dimensions"], p["window_strides"], p["padding"], p["base_dilation"])
    size, stride, padding, dilation = (o[place.axis] for o in options)
    _require((size, stride, tuple(padding), dilation) == (1, 1, (0, 0), 1))
    _require(not any(isinstance(v, Apart | Pieces) for v in rest))
    return place


@_rule("dot_general")
def _dot(domain: Examples, eqn: Equation, left: Operand, right: Operand) -> Place:
    contracting, batch = eqn.params["dimension_numbers"]
    sides = (left, right)
    free = [
        [a for a in range(len(v.shape)) if a not in (*contracting[i], *batch[i])]
        for i, v in enumerate(eqn.inputs)
    ]
    places = []
    for i, value in enumerate(sides):
        if not isinstance(value, Apart):
            _require(domain.uniform(value), "it meets a value that differs between examples")
            continue
        place = value.place
        _require(place.axis not in contracting[i])
        if place.axis in batch[i]:
            places.append(place._replace(axis=tuple(batch[i]).index(place.axis)))
        else:
            other = len(free[0]) if i else 0
            places.append(place._replace(axis=len(batch[0]) + other + free[i].index(place.axis)))
    _require(len(set(places)) == 1, "it combines every example with every other")
    return places[0]


@_rule("conv_general_dilated")
def _conv(domain: Examples, eqn: Equation, left: Operand, right: Operand) -> Place:
    place, numbers = _place_of(left), eqn.params["dimension_numbers"]
    _require(not isinstance(right, Apart | Pieces) and domain.uniform(right))
    _require(place.axis == numbers.lhs_spec[0] and eqn.params["batch_group_count"] == 1)
    return place._replace(axis=numbers.out_spec[0])


# --- reading and writing at indices ---


def _index_place(domain: Examples, index: Operand) -> Place | None:
    """Where an index holds examples; None if it is the same for all."""
    parts = index.parts if isinstance(index, Pieces) else (index,)
    places = {p.place for p in parts if isinstance(p, Apart)}
    _require(len(places) <= 1, "indices hold the examples in different places")
    if places:
        return next(iter(places))
    return None


def _width(part: Operand) -> int:
    return part.shape[-1] if isinstance(part, Held) else np.shape(cast(ArrayLike, part))[-1]


def _own_position(domain: Examples, index: Operand, component: int) -> int | None:
    """The axis of an index along which a column of it is 0, 1, …: each example's own number."""
    column: np.ndarray | None = None
    if isinstance(index, Pieces):
        at = 0
        for part in index.parts:
            width = _width(part)
            if at <= component < at + width and not isinstance(part, Value):
                column = np.asarray(part)[..., component - at] if is_concrete(part) else None
            at += width
    elif not isinstance(index, Value) and is_concrete(index):
        column = np.asarray(index)[..., component]
    if column is None:
        return None
    for axis, length in enumerate(column.shape):
        if length == domain.size:
            own = np.arange(length).reshape([-1 if a == axis else 1 for a in range(column.ndim)])
            if (column == own).all():
                return axis
    return None


def _others_uniform(domain: Examples, index: Operand, component: int, axis: int) -> bool:
    """Whether the other columns of an index are the examples' own values, or the same for all."""
    place = Place(axis)
    if not isinstance(index, Pieces):
        rest = np.delete(np.asarray(index), component, -1)
        return not rest.size or domain.uniform(rest, place)
    at = 0
    for part in index.parts:
        width = _width(part)
        if isinstance(part, Apart):
            if part.place != place:
                return False
        elif not at <= component < at + width and not domain.uniform(part, place):
            return False
        at += width
    return True


@_rule("gather")
def _gather(
    domain: Examples, eqn: Equation, value: Operand, index: Operand, *rest: Operand
) -> Place:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batching = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    out_rank = len(eqn.outputs[0].shape)
    outside = [a for a in range(out_rank) if a not in numbers.offset_dims]
    held = _index_place(domain, index)
    if not isinstance(value, Apart):  # a table read by each example
        _require(domain.uniform(value) and not isinstance(index, Pieces) and held is not None)
        assert held is not None
        return held._replace(axis=outside[held.axis])
    place = value.place
    if place.axis in batching:
        at = index_batching[batching.index(place.axis)]
        _require(held == place._replace(axis=at) if held else domain.uniform(index, Place(at)))
        return place._replace(axis=outside[at])
    if place.axis in numbers.start_index_map and sizes[place.axis] == 1:
        component = tuple(numbers.start_index_map).index(place.axis)
        axis = _own_position(domain, index, component)
        _require(axis is not None and place == Place(place.axis), "examples read each other")
        assert axis is not None
        _require(_others_uniform(domain, index, component, axis))
        return Place(outside[axis])
    _require(sizes[place.axis] == eqn.inputs[0].shape[place.axis] and held is None)
    _require(domain.uniform(index), "indices differ from example to example")
    collapsed = (*numbers.collapsed_slice_dims, *batching)
    kept = [a for a in range(len(eqn.inputs[0].shape)) if a not in collapsed]
    return place._replace(axis=numbers.offset_dims[kept.index(place.axis)])


@_rule("scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max")
def _scatter(
    domain: Examples, eqn: Equation, target: Operand, index: Operand, update: Operand
) -> Place:
    numbers = eqn.params["dimension_numbers"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batching = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
    rank, update_rank = len(eqn.inputs[0].shape), len(eqn.inputs[2].shape)
    outside = [a for a in range(update_rank) if a not in numbers.update_window_dims]
    window = [a for a in range(rank) if a not in (*numbers.inserted_window_dims, *batching)]
    held = _index_place(domain, index)
    moved: dict[int, int] = dict(zip(numbers.update_window_dims, window, strict=True))
    for axis, at in zip(batching, index_batching, strict=True):
        moved[outside[at]] = axis
    own = None
    for component, axis in enumerate(numbers.scatter_dims_to_operand_dims):
        at = _own_position(domain, index, component)
        if at is not None and _others_uniform(domain, index, component, at):
            moved[outside[at]], own = axis, axis
    if isinstance(update, Apart):
        _require(update.place.axis in moved, "examples write into one place")
        place = update.place._replace(axis=moved[update.place.axis])
        if isinstance(target, Apart):
            _require(target.place == place)
        else:
            _require(domain.uniform(target, place))
    else:
        place = _place_of(target)
        _require(domain.uniform(update))
    if place.axis in batching:
        at = index_batching[batching.index(place.axis)]
        _require(held == place._replace(axis=at) if held else domain.uniform(index, Place(at)))
    elif place.axis == own:
        _require(place == Place(place.axis))
    else:
        _require(place.axis not in numbers.scatter_dims_to_operand_dims)
        _require(held is None and domain.uniform(index), "indices differ between examples")
        _require(place.axis in window)
    return place


@_rule("dynamic_slice")
def _dynamic_slice(domain: Examples, eqn: Equation, value: Operand, *starts: Operand) -> Place:
    place = _place_of(value)
    _require(not any(isinstance(s, Apart | Pieces) for s in starts))
    _require(eqn.params["slice_sizes"][place.axis] == eqn.inputs[0].shape[place.axis])
    return place


@_rule("dynamic_update_slice")
def _update(
    domain: Examples, eqn: Equation, value: Operand, part: Operand, *starts: Operand
) -> Place:
    place = domain.common([value, part])
    _require(not any(isinstance(s, Apart | Pieces) for s in starts))
    _require(eqn.inputs[0].shape[place.axis] == eqn.inputs[1].shape[place.axis])
    return place
