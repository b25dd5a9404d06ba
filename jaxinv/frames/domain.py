"""The domain of frames: a value stands for the matrices that may act on its axes.

One rule per operation, in `arithmetic`, `layout` and `products`. An operation without a rule allows
no matrix on any axis of its operands, which can lose symmetries but never make a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Body, Equation, Operand, Value, is_concrete
from jaxinv.frames import arithmetic, forms, layout, loops, mixing, products
from jaxinv.frames.algebras import Commutants, Labels
from jaxinv.frames.system import NONE, Kind, Ref, Relation, S, System, Vector
from jaxinv.frames.values import Axis, Block, Framed, each, level, like, numbers, refined
from jaxinv.typing import ArrayLike

# The frame of an axis of a parameter may be another at each place along other axes (heads, experts,
# q, k and v in one array), if there are so many places at most; longer axes are features.
MOST_ALONG = 64
_MOST_PLACES = 1 << 12

_ELEMENTWISE = frozenset(
    "add sub mul div max min neg exp exp2 log log1p expm1 sqrt rsqrt tanh logistic erf erfc abs "
    "sign integer_pow pow square cos sin select_n gt lt ge le eq ne and or not clamp cbrt add_any "
    "convert_element_type is_finite reduce_precision".split()
)


class FramesDomain:
    """Relations between the frames of all values of one program."""

    rules = mixing.lazily(layout.RULES | products.RULES | arithmetic.RULES)

    def __init__(self) -> None:
        self.system = System()
        self.labels = Labels()  # of data that coefficients of linear forms come from
        self.commutant = Commutants(self.labels)
        self.constants: list[np.ndarray] = []  # vectors among the constants that multiply axes
        self.deep: set[int] = set()  # leaves that loops run over, however many steps
        self.gains: set[int] = set()  # leaves that multiply an axis that has frames
        self.ended_by: dict[tuple[str, str], None] = {}  # (operation, line) that ended a frame

    def alone(self) -> FramesDomain:
        """A domain like this one, without its frames."""
        inner = type(self)()
        inner.labels, inner.commutant = self.labels, self.commutant
        inner.constants, inner.ended_by = self.constants, self.ended_by
        return inner

    # --- operands ---

    def leaf(self, number: int, shape: Sequence[int], dead: frozenset[int]) -> Framed:
        """A leaf of params, with a frame of its own on every axis but the dead ones."""
        vector = (Vector(number, 0), 0) if len(shape) == 1 else None
        value = Framed(shape, vector=vector)
        value.leaf = number
        for axis, n in enumerate(shape):
            if n == 1 or axis in dead:
                continue
            deep = number in self.deep and axis > 0
            places = [1 if a == axis or m > MOST_ALONG else m for a, m in enumerate(shape)]
            places[0] = shape[0] if deep else places[0]
            while np.prod(places[deep:]) > 1 and np.prod(places) > _MOST_PLACES:
                places[deep + int(np.argmax(places[deep:]))] = 1
            refs = self.system.new(n, count=int(np.prod(places))).reshape(places)
            value.axes[axis] = [Block(n, refs)]
        return value

    def framed(self, operand: Operand) -> Framed:
        """Any operand; constants allow no frames."""
        operand = forms.resolved(operand)
        if isinstance(operand, Framed):
            return operand
        assert not isinstance(operand, Value)
        return self._constant(operand)

    def _constant(self, value: ArrayLike) -> Framed:
        shape = jnp.shape(value)
        found = Framed(shape)
        found.constant = True
        if is_concrete(value) and jnp.issubdtype(jnp.result_type(value), jnp.number):
            array = np.asarray(value)
            found.zero = not array.any()
            uniform = [a for a in range(array.ndim) if (array == array.take([0], a)).all()]
            found.uniform |= frozenset(uniform)
            varies = [a for a in range(array.ndim) if a not in found.uniform]
            if len(varies) == 1:
                pick = tuple(slice(None) if a in varies else 0 for a in range(array.ndim))
                self.constants.append(np.asarray(array[pick], np.float64))
                found.vector = (Vector(-len(self.constants), 0), varies[0])
        return found

    # --- what ends or restricts frames ---

    def end(self, eqn: Equation, axis: Axis) -> None:
        """Allow no matrix on an axis."""
        alive = False
        for i in numbers(axis):
            for size, piece in self.system.pieces(self.system.ref(i)):
                root = self.system.root(piece.frame).frame
                alive |= self.system.kinds[root] != NONE and size > 1
                self.system.restrict(piece, NONE)
        if alive:
            self.ended_by[eqn.written, eqn.source] = None

    def end_all(self, eqn: Equation, value: Framed) -> None:
        if value.square is not None:
            self.end_all(eqn, value.square)
        for axis in value.axes:
            self.end(eqn, axis)

    def plain(self, eqn: Equation, value: Framed) -> Framed:
        """The value where it is not one whose elementwise square is only summed."""
        if value.square is not None:
            self.end_all(eqn, value.square)
            value = like(value, square=None)
        return value

    def restrict(self, axis: Axis, kind: Kind) -> None:
        for _, refs in refined(self.system, axis) if axis else ():
            for i in np.unique(refs):
                self.system.restrict(self.system.ref(int(i)), kind)

    def fixes_ones(self, axis: Axis) -> None:
        """The vector of ones is left alone from both sides: a mean, or one number added to all."""
        self.restrict(axis, S)

    def multiplied(self, axis: Sequence[Block], vector: Vector, power: int) -> list[Block]:
        """The frames of a product with a vector along the axis."""
        out, offset = [], 0
        for size, refs in axis:
            gain = Relation(
                False, ((Vector(vector.source, vector.offset + offset), Fraction(power)),)
            )

            def seen(i: int, gain: Relation = gain) -> int:
                ref = self.system.ref(i)
                return self.system.number(Ref(ref.frame, gain.of(ref.relation)))

            out.append(Block(size, each(refs, seen)))
            offset += size
        return out

    def kept(
        self, eqn: Equation, value: Framed, shape: Sequence[int], places: Mapping[int, int]
    ) -> Framed:
        """Axis a of the value becomes axis places[a] of the result; other axes end here."""
        value = self.plain(eqn, value)
        gone = [a for a in range(len(value.shape)) if a not in places]
        for a in gone:
            self.end(eqn, value.axes[a])
        order = sorted(places, key=places.__getitem__)

        def relaid(refs: np.ndarray) -> np.ndarray:
            target = [1] * len(shape)
            for a in order:
                target[places[a]] = refs.shape[a]
            return refs.transpose([*order, *gone]).reshape(target)

        result = Framed(shape, uniform=[places[a] for a in places if a in value.uniform])
        for a, new in places.items():
            axis = level(self.system, value.axes[a], gone)
            result.axes[new] = None if axis is None else [Block(n, relaid(r)) for n, r in axis]
        if value.vector and value.vector[1] in places:
            result.vector = (value.vector[0], places[value.vector[1]])
        result.zero, result.constant = value.zero, value.constant
        return result

    # --- what the walker asks for ---

    def default(self, eqn: Equation, *inputs: Operand) -> Framed | list[Framed]:
        values = [self.framed(v) for v in inputs]
        for value in values:
            self.end_all(eqn, value)
        outputs = [Framed(aval.shape) for aval in eqn.outputs]
        if eqn.name in _ELEMENTWISE:
            for a in range(len(outputs[0].shape)):
                if all(not v.shape or a in v.uniform for v in values):
                    outputs[0].uniform |= {a}
        return outputs if eqn.primitive.multiple_results else outputs[0]

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        return loops.scan(self, eqn, body, consts, init, xs)

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        return loops.switch(self, eqn, index, branches, inputs)

    def unbounded_while(
        self,
        eqn: Equation,
        condition: Callable[..., list[Operand]],
        body: Callable[..., list[Operand]],
        carry: list,
    ) -> list:
        for value in carry:
            self.end_all(eqn, self.framed(value))
        return [Framed(aval.shape) for aval in eqn.outputs]
