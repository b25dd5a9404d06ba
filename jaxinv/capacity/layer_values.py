"""Values of the layer domain: weights with numbered elements, data with units and a stage.

See `layers` for what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Value, is_concrete
from jaxinv.typing import Array, ArrayLike

THEORY = "norms of layers"


class Weight(Value):
    """An array computed from parameters alone; `ids` numbers its elements, equal where repeated."""

    __slots__ = ("value", "ids", "names")

    def __init__(self, value: Array, ids: np.ndarray, names: frozenset[str]):
        self.value, self.ids, self.names = value, ids, names


class Stage(NamedTuple):
    """Where on the chain a value is."""

    last: int  # number of the last operator, -1 for inputs
    gain: float = 1.0  # Lipschitz constant (ℓ₂) from the result of that operator to this value
    broken: Equation | None = None  # what left the chain
    base: Hashable = None  # key of the value of which this is a constant multiple
    sign_of: Hashable = None  # key of the value whose sign this is a function of


class Data(Value):
    """An array that depends on x; `units` is None, or broadcasts to it, with -1 for no unit."""

    __slots__ = ("units", "stage")

    def __init__(self, stage: Stage, units: np.ndarray | None = None):
        self.stage, self.units = stage, units


class Incoming(NamedTuple):
    """Weights and the units that they lead into: arrays that broadcast to each other."""

    value: Array
    units: np.ndarray
    mask: np.ndarray | None  # which of them count, None for all
    key: Hashable  # equal for provably equal weights


class Operator(NamedTuple):
    """One equation that is linear in a value depending on x, with weights."""

    eqn: Equation
    operand: int  # which operand depends on x
    weight: Array
    names: frozenset[str]
    stage: Stage  # of the operand


Tracked = Weight | Data
Operand = Tracked | ArrayLike
Result = Operand | Sequence[Operand]


class LayerSemantics(Protocol):
    """What rules ask of the domain."""

    operators: list[Operator]
    known: dict[Hashable, np.ndarray]

    def default(self, eqn: Equation, *inputs: Operand) -> Tracked | Sequence[Tracked]: ...

    def derived(self, eqn: Equation, inputs: Sequence[Operand]) -> Weight | list[Weight]: ...

    def merged(self, a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None: ...

    def add_weight(self, data: Data, weight: Weight) -> np.ndarray: ...

    def units_of_weight(
        self, weight: Weight, kind: str = "", value: Array | None = None
    ) -> np.ndarray: ...

    def new_units(self, shape: Sequence[int], operator: int) -> np.ndarray: ...

    def lead(self, key: Hashable, value: Array, ids: np.ndarray, units: np.ndarray) -> None: ...

    def operator(
        self, eqn: Equation, operand: int, data: Data, weight: Array, names: frozenset[str]
    ) -> Stage: ...


def compact(ids: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
    """The array with length one along axes on which it is constant, and the index that does it."""
    index = []
    for axis, n in enumerate(ids.shape):
        first = ids.take([0], axis) if n > 1 else None
        constant = first is not None and bool((ids == first).all())
        index.append(slice(0, 1) if constant else slice(None))
        ids = first if constant and first is not None else ids
    return ids, tuple(index)


def moved(eqn: Equation, ids: np.ndarray, *rest: ArrayLike) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(eqn.bind(jnp.asarray(ids, jnp.int32), *rest))


def plain(value: Operand) -> ArrayLike:
    """The array of what does not depend on x."""
    assert not isinstance(value, Data)
    return value.value if isinstance(value, Weight) else value


def known_array(value: ArrayLike) -> np.ndarray:
    """A constant to compare along axes; one that is traced counts as different everywhere."""
    if is_concrete(value):
        return np.asarray(value)
    return np.arange(math.prod(np.shape(value))).reshape(np.shape(value))


def broken(eqn: Equation, inputs: Sequence[Operand]) -> Stage:
    """The stage of a result that is off the chain."""
    for v in inputs:
        if isinstance(v, Data) and v.stage.broken is not None:
            return Stage(-1, broken=v.stage.broken)
    return Stage(-1, broken=eqn)


def refuse_weights(eqn: Equation, inputs: Sequence[Operand]) -> None:
    """Raise unless no parameter takes part."""
    names = frozenset().union(*(v.names for v in inputs if isinstance(v, Weight)))
    if names:
        raise eqn.refuse(
            THEORY,
            "here a parameter is neither a factor nor a term of a value that depends on x, so it "
            "is the weight of no edge.",
            "close over parameters that are no weights, or move them out of this operation.",
            what=f"`{eqn.name}` of a value that depends on x with {', '.join(sorted(names))}",
        )
