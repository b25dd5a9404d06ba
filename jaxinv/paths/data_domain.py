"""The data-dependent path domain: a value stands for its paths *and* for the numbers on a batch.

Paths follow the rules of `domain`; the numbers are those of the program itself, with a
leading axis for the examples. A domain says what the two have to do with each other by overriding
`seen` (the paths of a value that is not merely added on) and `product` (the result of a layer).

A *unit* is a sum of edges: what a dot product or a convolution gives, with the biases and skip
connections added to it. Linear operations that only move, add or scale leave a unit unfinished
(`open`); a gate, a maximum or the next layer finishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxinv._interpreter.walk import Body, Equation, Opaque, Rules, Value
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.paths.domain import PathDomain
from jaxinv.paths.values import Code, Operand, Paths, Result, Sign, is_zero, plain
from jaxinv.typing import Array, ArrayLike, DType

THEORY = "data-dependent path semantics"

PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
# Operations on one value that move its elements, and those that assemble several values.
_MOVES = frozenset(
    "reshape transpose broadcast_in_dim squeeze expand_dims slice rev tile reduce_precision gather "
    "dynamic_slice convert_element_type neg concatenate stack pad dynamic_update_slice scatter "
    "split unstack copy".split()
)
_SUMS = frozenset(
    "add sub add_any reduce_sum cumsum reduce_window_sum scatter-add scatter_add mul div".split()
)
_GATES = frozenset(("mul", "gather"))  # of two values: a mask, a lookup at places from x
_SIGNS = frozenset("sign gt ge lt le eq ne".split())

T = TypeVar("T")
Unit = tuple[Array, Array]  # the numbers of a unit, and the exponent of their moment


class Data(Value):
    """A value that depends on x: its paths (or function of a sign) and its numbers.

    `array` has the examples as leading axis, then the shape the program has for a batch of one.
    """

    __slots__ = ("path", "array", "open", "finished", "layers")

    def __init__(
        self, path: Paths | Sign, array: Array, open: bool = False, layers: frozenset = frozenset()
    ):
        self.path, self.array, self.open, self.layers = path, array, open, layers
        self.finished: Scaled | None = None

    def view(self) -> Paths | Sign:
        """The path value under this value's identity."""
        old = self.path
        new: Paths | Sign
        if isinstance(old, Code):
            new = Code(old.sums, old.multiples, None, old.levels, old.numeric)
            new.columns = old.columns
        elif isinstance(old, Paths):
            new = Paths(old.sums, old.multiples)
        else:
            new = Sign(old.branches, old.bases)
        new.key = self.key
        return new


DataOperand = Data | Operand
DataResult = Result | Data | Sequence[DataOperand | Opaque]


class DataDomain:
    """Paths and numbers side by side; subclasses let one act on the other."""

    rules: Rules = {}

    def __init__(self, path: PathDomain):
        self.path = path

    # What subclasses override.

    def seen(self, value: Data) -> Paths | Sign:
        """The paths that a gate, a maximum or the next layer finds."""
        return value.view()

    def product(self, eqn: Equation, inputs: Sequence[DataOperand], out: Data) -> Data:
        """The result of a dot product or convolution."""
        return out

    def consumed(self, value: Data) -> None:
        """Called for a value that something other than a sum uses."""

    # The walk.

    def default(self, eqn: Equation, *inputs: DataOperand) -> DataResult:
        """Any operation: the rule of the path domain on paths, the operation itself on numbers."""
        operands = [v for v in inputs if not isinstance(v, Data)]
        if len(operands) == len(inputs):
            return self._path_rule(eqn, operands)
        moved, summed = self._linear(eqn, inputs)
        if moved or summed:
            paths = self._path_rule(eqn, [_view(v) for v in inputs])
            again = _once(lambda: _as_list(eqn, self._path_rule(eqn, self._seen_all(inputs))))
            outs = [_with_bases(p, again, i) for i, p in enumerate(_as_list(eqn, paths))]
        elif eqn.name in _SIGNS:
            outs = _as_list(eqn, self._path_rule(eqn, [_view(v) for v in inputs]))
        else:
            outs = _as_list(eqn, self._path_rule(eqn, self._seen_all(inputs)))
        arrays = _as_list(eqn, evaluate(eqn, inputs))
        is_open = summed or _is_product(eqn, inputs) or (moved and _open(inputs))
        layers: frozenset = frozenset()
        for v in inputs:
            if not isinstance(v, Data) or eqn.name in _SIGNS:
                continue
            if eqn.name in _MOVES | _SUMS and isinstance(v.path, Paths):
                layers |= v.layers
            else:
                self.consumed(v)
        wrapped: list[Any] = [
            Data(p, a, is_open, layers) if isinstance(p, Paths | Sign) else p
            for p, a in zip(outs, arrays, strict=True)
        ]
        if eqn.name in PRODUCTS:
            wrapped = [self.product(eqn, inputs, w) for w in wrapped]
        return wrapped if eqn.primitive.multiple_results else wrapped[0]

    def _path_rule(self, eqn: Equation, inputs: Sequence[Operand]) -> Result:
        rule = self.path.rules.get(eqn.primitive)
        return rule(self.path, eqn, *inputs) if rule else self.path.default(eqn, *inputs)

    def _seen_all(self, inputs: Sequence[DataOperand]) -> list[Operand]:
        return [self.seen(v) if isinstance(v, Data) else v for v in inputs]

    def _linear(self, eqn: Equation, inputs: Sequence[DataOperand]) -> tuple[bool, bool]:
        """(moves elements, adds or scales them) of an operation on data."""
        data = [v for v in inputs if isinstance(v, Data)]
        if any(isinstance(v.path, Sign) for v in data) or len(data) > 1 and eqn.name in _GATES:
            return False, False
        if eqn.name in _MOVES:
            # Finished and unfinished units meet in one array: all of them are finished first.
            return len({v.open for v in data}) == 1, False
        if eqn.name in ("add", "sub") and any(is_zero(v) for v in inputs):
            return True, False
        return False, eqn.name in _SUMS

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        """Recurrence: the same weights belong to units of many steps."""
        if not eqn.params["length"]:
            return self.path.scan(eqn, body, consts, init, xs)
        raise eqn.refuse(
            THEORY,
            "statistics of the data belong to the units of one layer; the units of a loop share "
            "their weights, and no R_v of one unit gives their geometry.",
            "use alpha=0, which is Path-SGD and covers loops, or write the steps out.",
            what="`scan` over values that depend on x",
        )

    def switch(self, eqn: Equation, index: DataOperand, branches: list[Body], inputs: list) -> list:
        """A branch that is not known when the network is traced."""
        raise eqn.refuse(
            THEORY,
            "which branch runs is not known, so neither are the units.",
            "branch on Python values, or call outside jit.",
            what="`cond` on a value not known at trace time",
        )


def _is_product(eqn: Equation, inputs: Sequence[DataOperand]) -> bool:
    """A layer; to read rows of weights at integers from x is one, of their one-hot code."""
    return eqn.name in PRODUCTS or (eqn.name == "gather" and not isinstance(inputs[0], Data))


def _once(function: Callable[[], T]) -> Callable[[], T]:
    """The function, evaluated at most once and only if asked for."""
    results: list[T] = []

    def read() -> T:
        if not results:
            results.append(function())
        return results[0]

    return read


def _with_bases(path: Operand, again: Callable[[], list[Paths]], index: int) -> Operand:
    """The same sums; what they are multiples of is read off finished units."""
    if not isinstance(path, Paths) or isinstance(path, Code):
        return path
    bases = {key: (lambda key=key: again()[index].multiples[key]()) for key in path.multiples}
    return Paths(path.sums, bases)


def _view(value: DataOperand) -> Operand:
    return value.view() if isinstance(value, Data) else value


def _open(inputs: Sequence[DataOperand]) -> bool:
    return all(v.open for v in inputs if isinstance(v, Data))


def _as_list(eqn: Equation, outputs: Any) -> list[Any]:
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def evaluate(eqn: Equation, inputs: Sequence[DataOperand]) -> Array | list[Array]:
    """The operation on numbers, example by example."""
    axes: list[int | None] = []
    arrays: list[ArrayLike] = []
    for v in inputs:
        axes.append(0 if isinstance(v, Data) else None)
        arrays.append(v.array if isinstance(v, Data) else plain(v))
    if eqn.name == "max" and any(is_zero(v) for v in inputs):
        # jax.nn.relu's derivative at 0 is 0, that of the maximum inside it 1/2.
        (data,) = [a for a, axis in zip(arrays, axes, strict=True) if axis == 0]
        return jax.nn.relu(data)
    return jax.vmap(lambda *a: eqn.bind(*a), in_axes=axes)(*arrays)


class MixingDomain(DataDomain):
    """γ²_v = α·M(z_v) + (1 − α)·Σ_u w²_{u→v} γ²_u, M the second moment or variance of z_v.

    `units` collects the numbers of the units in the order in which they are finished, and `offsets`
    (as many) is added to M, so that derivatives with respect to it can be taken.
    """

    def __init__(
        self, path: PathDomain, alpha: float, centered: bool, offsets: Sequence[Array] | None = None
    ):
        super().__init__(path)
        self.alpha, self.centered, self.offsets = alpha, centered, offsets
        self.units: list[Unit] = []

    def seen(self, value: Data) -> Paths | Sign:
        """Finish the unit: mix its paths with the moment of its numbers."""
        paths = isinstance(value.path, Paths) and not isinstance(value.path, Code)
        if not value.open or not paths or self.alpha == 0:
            return value.view()
        if value.finished is None:
            value.finished = self._mixed(value)
        view = value.view()
        assert isinstance(view, Paths)
        finished = Paths(value.finished, view.multiples)
        finished.key = view.key
        return finished

    def _mixed(self, value: Data) -> Scaled:
        assert isinstance(value.path, Paths)
        moment = second_moment(value.array, self.centered, self.path.dtype)
        if self.offsets is not None:
            # Offsets and derivatives are in units of the moment's own power of two.
            moment = jax.lax.stop_gradient(moment)
            mantissa = moment.mantissa + self.offsets[len(self.units)]
            moment = moment._replace(mantissa=mantissa)
        self.units.append((value.array, moment.exponent))
        return _mix(moment, value.path.sums, self.alpha)


@partial(jax.jit, static_argnames=("centered", "dtype"))
def second_moment(array: Array, centered: bool, dtype: DType) -> Scaled:
    """Mean over the examples of z², or of (z − mean)²."""
    array = jnp.asarray(array, dtype)
    if centered:
        array = array - array.mean(axis=0)
    return scaled.mean(scaled.power_along(array, 2.0, dtype))


@partial(jax.jit, static_argnames="alpha")
def _mix(moment: Scaled, sums: Scaled, alpha: float) -> Scaled:
    if alpha == 1:
        return moment
    parts = [(moment, alpha), (sums, 1 - alpha)]
    return scaled.add([s._replace(mantissa=s.mantissa * f) for s, f in parts])
