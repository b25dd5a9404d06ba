"""Rules of the layer domain: how operations move units about, and what leaves the chain.

An operation without a rule finishes units and leaves the chain, which loses products over layers
but never makes a wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Value, constants, is_concrete, rule_table
from jaxinv.capacity.layer_values import (
    THEORY,
    Data,
    LayerSemantics,
    Operand,
    Result,
    Tracked,
    Weight,
    broken,
    compact,
    moved,
    plain,
)

RULES, rule = rule_table()

# --- rules: moving elements about -----------------------------------------------------


def _single(eqn: Equation, value: Data, gain: float, units: np.ndarray | None = None) -> Data:
    """The result of an operation of one value, with a known Lipschitz constant."""
    stage = value.stage
    return Data(stage._replace(gain=stage.gain * gain, base=None, sign_of=None), units)


def _full(value: Data, shape: Sequence[int]) -> np.ndarray:
    units = np.array(-1) if value.units is None else value.units
    return np.broadcast_to(units, shape)


@rule("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "rev")
@rule("gather", "dynamic_slice", "tile")
def _layout(domain: LayerSemantics, eqn: Equation, value: Tracked, *rest: Operand) -> Result:
    fixed = constants(rest)
    if fixed is None:
        if isinstance(value, Weight) and any(isinstance(v, Data) for v in rest):
            raise eqn.refuse(
                THEORY,
                "which weights are read depends on x.",
                "pass one-hot inputs instead of integer tokens (x @ table).",
                what=f"`{eqn.name}` of indices that depend on x",
            )
        return domain.default(eqn, value, *rest)
    known = all(is_concrete(v) for v in fixed)
    if isinstance(value, Weight):
        if not known:
            return domain.derived(eqn, [value, *fixed])
        return Weight(eqn.bind(value.value, *fixed), moved(eqn, value.ids, *fixed), value.names)
    if not known:
        return domain.default(eqn, value, *rest)
    shape, copies = eqn.inputs[0].shape, 1.0
    if eqn.name in ("gather", "broadcast_in_dim", "tile"):
        where = moved(eqn, np.arange(math.prod(shape)).reshape(shape), *fixed)
        counts = np.unique(where[where >= 0], return_counts=True)[1]
        copies = float(counts.max(initial=1))
    units = None
    if value.units is not None:
        units = compact(moved(eqn, _full(value, shape), *fixed))[0]
    return _single(eqn, value, math.sqrt(copies), units)


@rule("concatenate", "stack", "pad")
def _assembled(domain: LayerSemantics, eqn: Equation, *inputs: Operand) -> Result:
    data = [v for v in inputs if isinstance(v, Data)]
    if not data:
        ids = [v.ids if isinstance(v, Weight) else np.full(np.shape(plain(v)), -1) for v in inputs]
        with jax.ensure_compile_time_eval():
            placed = np.asarray(eqn.bind(*(jnp.asarray(i, jnp.int32) for i in ids)))
        names = frozenset().union(*(v.names for v in inputs if isinstance(v, Weight)))
        return Weight(eqn.bind(*map(plain, inputs)), placed, names)
    parts = []
    for v, aval in zip(inputs, eqn.inputs, strict=True):
        if isinstance(v, Weight):
            parts.append(np.broadcast_to(domain.units_of_weight(v), aval.shape))
        else:
            parts.append(_full(v, aval.shape) if isinstance(v, Data) else np.full(aval.shape, -1))
    units = None
    if any((p >= 0).any() for p in parts):
        with jax.ensure_compile_time_eval():
            placed = np.asarray(eqn.bind(*(jnp.asarray(p, jnp.int32) for p in parts)))
        units = compact(placed)[0]
    if len(data) > 1:
        return Data(broken(eqn, data), units)
    return _single(eqn, data[0], 1.0, units)


@rule("split", "unstack")
def _split(domain: LayerSemantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        with jax.ensure_compile_time_eval():
            ids = [np.asarray(i) for i in eqn.bind(jnp.asarray(value.ids, jnp.int32))]
        arrays = eqn.bind(value.value)
        return [Weight(a, i, value.names) for a, i in zip(arrays, ids, strict=True)]
    return [_single(eqn, value, 1.0) for _ in eqn.outputs]


@rule("convert_element_type", "reduce_precision", "neg")
def _elementwise_linear(domain: LayerSemantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        return Weight(eqn.bind(value.value), value.ids, value.names)
    if not jnp.issubdtype(eqn.outputs[0].dtype, jnp.floating):
        return domain.default(eqn, value)
    return _multiple(value, 1.0, value.units)


def _multiple(value: Data, factor: float, units: np.ndarray | None) -> Data:
    stage = value.stage
    base = value.key if stage.base is None else stage.base
    return Data(stage._replace(gain=stage.gain * factor, base=base, sign_of=None), units)


# --- rules: sums and products ---------------------------------------------------------


@rule("add", "sub", "add_any")
def _add(domain: LayerSemantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    data = [v for v in (left, right) if isinstance(v, Data)]
    if not data:
        return domain.derived(eqn, [left, right])
    if len(data) == 2:
        return Data(broken(eqn, data), domain.merged(data[0].units, data[1].units))
    (weight,) = [v for v in (left, right) if v is not data[0]]
    units = data[0].units
    if isinstance(weight, Weight):
        units = domain.add_weight(data[0], weight)
    return _single(eqn, data[0], 1.0, units)


@rule("mul", "div")
def _mul(domain: LayerSemantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    if not isinstance(left, Data) and not isinstance(right, Data):
        return domain.derived(eqn, [left, right])
    if eqn.name == "div" and not isinstance(left, Data):
        return domain.default(eqn, left, right)
    if isinstance(left, Data) and isinstance(right, Data):
        return domain.default(eqn, left, right)
    data, factor, operand = (left, right, 0) if isinstance(left, Data) else (right, left, 1)
    assert isinstance(data, Data)
    if isinstance(factor, Weight):
        stage = domain.operator(eqn, operand, data, factor.value, factor.names)
        weights = 1 / factor.value if eqn.name == "div" else factor.value
        return Data(stage, domain.units_of_weight(factor, eqn.name, weights))
    if not is_concrete(factor):
        return domain.default(eqn, left, right)
    size = np.abs(np.asarray(factor, np.float64))
    gain = float((1 / size if eqn.name == "div" else size).max(initial=0.0))
    units = data.units if (size == 1).all() else None
    return _multiple(data, gain, units) if np.ptp(size) == 0 else _single(eqn, data, gain, units)


@rule("dot_general", "conv_general_dilated")
def _product(domain: LayerSemantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    if not isinstance(left, Data) and not isinstance(right, Data):
        return domain.derived(eqn, [left, right])
    position = 1 if isinstance(left, Data) else 0
    weight, data = (right, left) if position == 1 else (left, right)
    if not isinstance(weight, Weight):  # two values that depend on x, or a constant matrix
        return domain.default(eqn, left, right)
    if eqn.name == "conv_general_dilated" and position == 0:
        return domain.default(eqn, left, right)
    assert isinstance(data, Data)
    stage = domain.operator(eqn, 1 - position, data, weight.value, weight.names)
    shape, axes = eqn.outputs[0].shape, unit_axes(eqn, position)
    along = [shape[out] for out, _ in axes]
    key = (eqn.primitive, repr(eqn.params["dimension_numbers"]), position, weight.key)
    if key not in domain.known:
        domain.known[key] = domain.new_units(along, len(domain.operators) - 1)
        domain.lead(
            weight.key,
            weight.value,
            weight.ids,
            _placed(domain.known[key], [own for _, own in axes], len(eqn.inputs[position].shape)),
        )
    return Data(stage, _placed(domain.known[key], [out for out, _ in axes], len(shape)))


def unit_axes(eqn: Equation, position: int) -> list[tuple[int, int]]:
    """Axes that number the units: (of the result, of the weights at operand `position`)."""
    if eqn.name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"]
        return [(spec.out_spec[1], spec.rhs_spec[0])]
    contracting, batch = eqn.params["dimension_numbers"]
    free = [
        [a for a in range(len(aval.shape)) if a not in (*c, *b)]
        for aval, c, b in zip(eqn.inputs, contracting, batch, strict=True)
    ]
    start = len(batch[0]) + (len(free[0]) if position else 0)
    return [*enumerate(batch[position]), *enumerate(free[position], start)]


def _placed(units: np.ndarray, axes: Sequence[int], ndim: int) -> np.ndarray:
    """Units along the given axes of an array of `ndim` axes."""
    order = np.argsort(axes, kind="stable")
    shape = [1] * ndim
    for axis, n in zip(axes, units.shape, strict=True):
        shape[axis] = n
    return units.transpose(order).reshape(shape)


# --- rules: operations with a Lipschitz constant --------------------------------------

_LIPSCHITZ = {"abs": 1.0, "tanh": 1.0, "sin": 1.0, "cos": 1.0, "logistic": 0.25, "asinh": 1.0}


@rule(*_LIPSCHITZ)
def _activation(domain: LayerSemantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        return domain.derived(eqn, [value])
    return _single(eqn, value, _LIPSCHITZ[eqn.name])


def _same_base(values: Sequence[Data]) -> bool:
    """Whether all are constant multiples of one value."""
    return len({v.key if v.stage.base is None else v.stage.base for v in values}) == 1


@rule("max", "min")
def _extremum(domain: LayerSemantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    data = [v for v in (left, right) if isinstance(v, Data)]
    if not data or any(isinstance(v, Weight) for v in (left, right)) or not _same_base(data):
        return domain.default(eqn, left, right)
    return _single(eqn, max(data, key=lambda v: v.stage.gain), 1.0)


@rule("clamp")
def _clamp(
    domain: LayerSemantics, eqn: Equation, low: Operand, value: Tracked, high: Operand
) -> Result:
    if isinstance(low, Value) or isinstance(high, Value):
        return domain.default(eqn, low, value, high)
    return _single(eqn, value, 1.0) if isinstance(value, Data) else domain.derived(eqn, [value])


@rule("gt", "ge", "lt", "le")
def _compare(domain: LayerSemantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    found = cast(Tracked, domain.default(eqn, left, right))
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Data) and is_concrete(other) and not np.any(np.asarray(other)):
            assert isinstance(found, Data)
            found.stage = found.stage._replace(sign_of=one.key)
    return found


@rule("select_n")
def _select(domain: LayerSemantics, eqn: Equation, predicate: Operand, *cases: Operand) -> Result:
    data = [v for v in cases if isinstance(v, Data)]
    weights = any(isinstance(v, Weight) for v in cases)
    zeros = all(isinstance(v, Data) or (is_concrete(v) and not np.asarray(v).any()) for v in cases)
    if not weights and data and zeros and _same_base(data):
        key = data[0].key if data[0].stage.base is None else data[0].stage.base
        gated = isinstance(predicate, Data) and predicate.stage.sign_of == key
        if gated or is_concrete(predicate):
            return _single(eqn, max(data, key=lambda v: v.stage.gain), 1.0)
    return domain.default(eqn, predicate, *cases)


@rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(domain: LayerSemantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        return domain.derived(eqn, [value])
    size = math.prod(eqn.inputs[0].shape[a] for a in eqn.params["axes"])
    return _single(eqn, value, math.sqrt(size) if eqn.name == "reduce_sum" else 1.0)


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(domain: LayerSemantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        return domain.derived(eqn, [value])
    p = eqn.params
    # An element is in at most so many windows; a sum of k elements has the norm √k.
    covered = math.prod(
        n if dilation > 1 else -(-n // stride)
        for n, stride, dilation in zip(
            p["window_dimensions"], p["window_strides"], p["window_dilation"], strict=True
        )
    )
    size = math.prod(p["window_dimensions"]) if eqn.name == "reduce_window_sum" else 1
    return _single(eqn, value, math.sqrt(covered * size))
