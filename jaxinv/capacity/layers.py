"""The layers of a program: its linear operators, its units, and which weights lead into which unit.

A value that depends on x is followed for two things.

* *Units.* An element of the result of a product with weights belongs to a unit: a channel of the
  product, whatever the position. Terms of a sum belong to one unit, so that biases join the unit
  they are added to, and so do all kernels that write to one channel of a residual stream. Anything
  but sums and moves finishes a unit. Edges without a parameter (skip connections, pooling, constant
  factors) have no weight that would count.
* *The chain.* Where every operator acts on the result of the one before, through operations of
  known Lipschitz constant, the network is a chain, and products over its layers mean something.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._interpreter import walk
from jaxinv._interpreter.batch import leading, traced_network
from jaxinv._interpreter.operations import ELEMENTWISE
from jaxinv._interpreter.walk import MAX_WHILE_TRIPS, Body, Equation, Value
from jaxinv._numerics import scaled
from jaxinv.capacity import layer_rules
from jaxinv.capacity.layer_values import (
    THEORY,
    Data,
    Incoming,
    Operand,
    Operator,
    Stage,
    Tracked,
    Weight,
    broken,
    compact,
    known_array,
    plain,
    refuse_weights,
)
from jaxinv.errors import UnsupportedOperation
from jaxinv.typing import Array, DType, Inputs, Network, Params


class Layers(NamedTuple):
    """What the interpretation has found."""

    incoming: list[Incoming]
    operators: list[Operator]
    num_units: int
    operator_of: np.ndarray  # (num_units,): the last operator that leads into it, -1 for none
    broken: Equation | None  # why this is no chain; None if it is one
    gain: float  # Lipschitz constant from the last operator to the output


class LayerDomain:
    """Follows units and the chain; one instance per interpretation."""

    rules = layer_rules.RULES

    def __init__(self) -> None:
        self.incoming: list[Incoming] = []
        self.operators: list[Operator] = []
        self.origin: list[np.ndarray] = []  # operator of every new unit
        self.count = 0
        self.ids = 0
        self.pairs: list[np.ndarray] = []
        self.known: dict[Hashable, np.ndarray] = {}

    # --- parameters ---

    def fresh_ids(self, shape: Sequence[int]) -> np.ndarray:
        """Numbers for new elements."""
        start, self.ids = self.ids, self.ids + math.prod(shape)
        return np.arange(start, self.ids, dtype=np.int32).reshape(shape)

    def derived(self, eqn: Equation, inputs: Sequence[Operand]) -> Weight | list[Weight]:
        """A function of parameters: its elements are edge weights of their own."""
        weights = [v for v in inputs if isinstance(v, Weight)]
        names = frozenset().union(*(w.names for w in weights))
        out = eqn.bind(*map(plain, inputs))
        outs = out if eqn.primitive.multiple_results else [out]
        found = []
        for value in outs:
            shape = list(value.shape)
            if eqn.name in ELEMENTWISE and all(np.shape(plain(v)) == value.shape for v in inputs):
                # Where all operands repeat along an axis, so does the result.
                parts = [
                    compact(v.ids if isinstance(v, Weight) else known_array(plain(v)))[0]
                    for v in inputs
                ]
                shape = list(np.broadcast_shapes(*(p.shape for p in parts)))
            ids = np.broadcast_to(self.fresh_ids(shape), value.shape)
            found.append(Weight(value, ids, names))
        return found if eqn.primitive.multiple_results else found[0]

    # --- units ---

    def new_units(self, shape: Sequence[int], operator: int) -> np.ndarray:
        """Numbers for new units."""
        start, size = self.count, math.prod(shape)
        self.count += size
        self.origin.append(np.full(size, operator))
        return np.arange(start, start + size).reshape(shape)

    def lead(self, key: Hashable, value: Array, ids: np.ndarray, units: np.ndarray) -> None:
        """Note weights of units; what is repeated within a unit counts once."""
        mask = None
        shape = np.broadcast_shapes(ids.shape, units.shape)
        distinct = shape == ids.shape and bool((np.diff(ids.ravel()) > 0).all())
        if ids.size and (ids.flat[0] < 0 or not distinct):
            pairs = np.stack(np.broadcast_arrays(ids, units)).reshape(2, -1).astype(np.int64)
            mask = np.zeros(pairs.shape[1], bool)
            mask[np.unique(pairs[0] * max(self.count, 1) + pairs[1], return_index=True)[1]] = True
            mask = (mask & (pairs[0] >= 0)).reshape(shape)
        mask = None if mask is None or mask.all() else mask
        self.incoming.append(Incoming(value, units, mask, key))

    def units_of_weight(
        self, weight: Weight, kind: str = "", value: Array | None = None
    ) -> np.ndarray:
        """A unit of its own for every parameter: a bias, or a factor."""
        ids, index = compact(weight.ids)
        if (kind, weight.key) not in self.known:
            operator = len(self.operators) - 1 if kind else -1
            names, where = np.unique(ids, return_inverse=True)
            units = self.new_units(names.shape, operator)[where.reshape(ids.shape)]
            units = np.where(ids >= 0, units, -1)
            self.known[kind, weight.key] = units
            shown = (weight.value if value is None else value)[index]
            self.lead(weight.key, shown, ids, np.maximum(units, 0))
        return self.known[kind, weight.key]

    def add_weight(self, data: Data, weight: Weight) -> np.ndarray:
        """The units of data + weight: a bias leads into the units that it is added to."""
        units = data.units
        if units is None or (units < 0).any():
            found = self.merged(units, self.units_of_weight(weight))
            assert found is not None
            return found
        key = (weight.key, units.shape, units.tobytes())
        if key not in self.known:
            self.known[key] = units
            ids, index = compact(weight.ids)
            self.lead(weight.key, weight.value[index], ids, units)
        return units

    def merged(self, a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        """Units of a sum: those of the terms are one."""
        if a is None or b is None:
            return b if a is None else a
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.pairs.append(np.unique(np.stack([a[both], b[both]]), axis=1))
        return np.where(a >= 0, a, b)

    # --- operators ---

    def operator(
        self, eqn: Equation, operand: int, data: Data, weight: Array, names: frozenset[str]
    ) -> Stage:
        """Note a linear operator; the stage of its result."""
        self.operators.append(Operator(eqn, operand, weight, names, data.stage))
        broken = data.stage.broken
        return Stage(len(self.operators) - 1, broken=broken)

    # --- what the walker asks for ---

    def default(self, eqn: Equation, *inputs: Operand) -> Tracked | Sequence[Tracked]:
        """Any other operation: finishes units, and leaves the chain."""
        if not any(isinstance(v, Data) for v in inputs):
            return self.derived(eqn, inputs)
        refuse_weights(eqn, inputs)
        found = [Data(broken(eqn, inputs)) for _ in eqn.outputs]
        return found if eqn.primitive.multiple_results else found[0]

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        """A loop, step by step: every step applies the operators once more."""
        length = eqn.params["length"]
        if length > MAX_WHILE_TRIPS:
            raise eqn.refuse(
                THEORY,
                f"each of its {length} steps would be followed on its own.",
                f"ask for a shorter sequence; up to {MAX_WHILE_TRIPS} steps are followed.",
                what="A very long `scan`",
            )
        carry, rows = list(init), []
        steps = range(length)
        for t in reversed(steps) if eqn.params["reverse"] else steps:
            outputs = body(*consts, *carry, *(_row(v, t) for v in xs))
            carry, row = outputs[: len(init)], outputs[len(init) :]
            rows.append(row)
        if eqn.params["reverse"]:
            rows = rows[::-1]
        return [*carry, *(self._stacked(eqn, column) for column in zip(*rows, strict=True))]

    def _stacked(self, eqn: Equation, column: Sequence[Operand]) -> Operand:
        if all(not isinstance(v, Value) for v in column):
            return jnp.stack([jnp.asarray(v) for v in column])
        data = [v for v in column if isinstance(v, Data)]
        if not data:
            arrays = [jnp.asarray(plain(v)) for v in column]
            names = frozenset().union(*(v.names for v in column if isinstance(v, Weight)))
            rows = [
                v.ids if isinstance(v, Weight) else np.full(np.shape(plain(v)), -1) for v in column
            ]
            value: Tracked = Weight(jnp.stack(arrays), np.stack(rows).astype(np.int32), names)
        else:
            value = Data(broken(eqn, column) if len(column) > 1 else data[0].stage)
        value.key = object()
        return value

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        """A branch that is not known when the network is traced."""
        raise eqn.refuse(
            THEORY,
            "which branch runs is not known, so neither are the layers.",
            "branch on Python values, or call outside jit.",
            what="`cond` on a value not known at trace time",
        )


def _row(value: Weight | Data | Array, t: int) -> Weight | Data | Array:
    """Step t of what a scan runs over."""
    if isinstance(value, Weight):
        row: Weight | Data = Weight(value.value[t], value.ids[t], value.names)
    elif isinstance(value, Data):
        row = Data(value.stage._replace(base=None, sign_of=None))
    else:
        return value[t]
    row.key = (value.key, "row", t)
    return row


# --- the whole ------------------------------------------------------------------------


def prepare(
    fn: Network, params: Params, x: Inputs, batch_axis: int | None = 0
) -> tuple[Layers, DType]:
    """The layers of `fn` on a batch of one, and the dtype that norms are computed in."""
    _checks.check_params(params)
    dtype = scaled.working_dtype(jax.tree.leaves(params))
    network = traced_network(fn, params, leading(x, batch_axis), batch_axis, whole=False)
    traced = network.program.trace
    domain = LayerDomain()
    weights = [
        Weight(jnp.asarray(leaf), domain.fresh_ids(leaf.shape), frozenset([name]))
        for leaf, name in zip(jax.tree.leaves(params), traced.param_names, strict=True)
    ]
    starts = [Data(Stage(-1)) for _ in network.program.inputs]
    outputs = network.interpret(weights, starts, domain)
    for value in outputs:
        if isinstance(value, Weight):  # a parameter that is returned is an output unit's bias
            domain.units_of_weight(value)
    root, num_units = _united(domain.count, domain.pairs)
    incoming = []
    once = set()  # steps of a loop add one bias to units that turn out to be one
    for c in domain.incoming:
        units = root[c.units].astype(np.int32)
        if (c.key, units.shape, units.tobytes()) not in once:
            once.add((c.key, units.shape, units.tobytes()))
            incoming.append(Incoming(c.value.astype(dtype), units, c.mask, c.key))
    operator_of = np.full(num_units, -1)
    if domain.origin:
        np.maximum.at(operator_of, root, np.concatenate(domain.origin))
    last = walk.output_equation(traced)
    reason, gain = _chain(domain.operators, outputs, last)
    layers = Layers(incoming, domain.operators, num_units, operator_of, reason, gain)
    return layers, dtype


def _united(count: int, pairs: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """The number of the unit that each provisional one belongs to, and how many there are."""
    label = np.arange(count)
    if pairs:
        a, b = np.concatenate(pairs, axis=1)
        while (label[a] != label[b]).any():
            low = np.minimum(label[a], label[b])
            np.minimum.at(label, label[a], low)
            np.minimum.at(label, label[b], low)
            label = label[label]
    while (label != label[label]).any():
        label = label[label]
    found, root = np.unique(label, return_inverse=True)
    return root, len(found)


def _chain(
    operators: list[Operator], outputs: Sequence[Operand], last: Equation
) -> tuple[Equation | None, float]:
    """What keeps the operators from being a chain, and the Lipschitz constant behind the last."""
    for number, op in enumerate(operators):
        if op.stage.broken is not None:
            return op.stage.broken, math.nan
        if op.stage.last != number - 1:
            return op.eqn, math.nan
    if len(outputs) != 1 or not isinstance(outputs[0], Data) or not operators:
        return last, math.nan
    stage = outputs[0].stage
    if stage.broken is not None or stage.last != len(operators) - 1:
        return stage.broken or last, math.nan
    return None, stage.gain


def check_chain(layers: Layers) -> None:
    """Raise `UnsupportedOperation` unless the operators form a chain."""
    if layers.broken is None:
        return
    eqn = layers.broken
    raise chain_refusal(eqn)


def chain_refusal(eqn: Equation) -> UnsupportedOperation:
    """Why a product over the layers means nothing for this network."""
    found: UnsupportedOperation = eqn.refuse(
        "a product over the layers",
        "it bounds a network in which every layer acts on the one before through operations of "
        "known Lipschitz constant; this operation joins several branches, or has none.",
        "use the norms of the single layers (group_norm, spectral_norms) or path norms, which "
        "cover branches (residual connections, concatenations).",
        what=f"`{eqn.name}`",
    )
    return found
