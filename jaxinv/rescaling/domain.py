"""The scaling domain: a value stands for the log-scale of every element of an array.

One rule per operation, in `elementwise` and its neighbours. To add an operation, add one rule
there and one row to `tests/rescaling/test_group.py`. An operation without a rule pins its operands
to scale 0, which can lose generators but never make a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial, reduce
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.source import spoken
from jaxinv._interpreter.walk import Body, Equation, Operand, Result, Value, fold, is_concrete
from jaxinv.rescaling import (
    elementwise,
    factorisations,
    indexing,
    layout,
    loops,
    products,
    reductions,
)
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.cases import Cases, by_case, note_root
from jaxinv.rescaling.equations import System
from jaxinv.rescaling.values import Form, Fresh, Guarded, Leaf, Predicate, Scale, WithEpsilon
from jaxinv.typing import ArrayLike

# A parameter is taken apart into at most so many slices (`stacked[i]`); others go elementwise.
_MOST_PARTS = 1024


def _case_by_case(rule: Callable[..., Result]) -> Callable[..., Result]:
    def apply(domain: ScalingDomain, eqn: Equation, *inputs: Operand) -> Result:
        def run(*inputs: Operand) -> Result:
            if any(isinstance(v, Value) for v in inputs):
                return rule(domain, eqn, *inputs)
            outputs = fold(eqn.raws[0], list(inputs))
            domain.folded(inputs, outputs)
            return outputs if eqn.primitive.multiple_results else outputs[0]

        domain.equation = eqn
        with domain.system.watched():
            result = by_case(domain, eqn, run, inputs)
        domain.note_loss(eqn)
        note_root(eqn, inputs[0], result)
        return result

    return apply


class ScalingDomain:
    """Equations between the scales of all values of one program."""

    rules = {
        primitive: _case_by_case(rule)
        for primitive, rule in (
            elementwise.RULES
            | layout.RULES
            | reductions.RULES
            | products.RULES
            | factorisations.RULES
            | indexing.RULES
        ).items()
    }

    def __init__(self, ignore_epsilon: bool, trust_zeros: bool):
        self.system = System()
        self.ignore_epsilon, self.trust_zeros = ignore_epsilon, trust_zeros
        self.pinned_by: dict[tuple[str, str], None] = {}
        self.tied_by: dict[tuple[str, str], None] = {}
        self.ignored: dict[tuple[str, str], None] = {}
        self.relies_on: dict[tuple[str, str, str], None] = {}
        # Arrays that fn closes over, and what is computed from them alone: by id, the array (which
        # keeps its id from being reused) and the names of those it comes from.
        self.origins: dict[int, tuple[ArrayLike, frozenset[str]]] = {}
        self.held: list[ArrayLike] = []  # arrays whose id is in use as a key
        self.indices: dict[Hashable, int] = {}
        self.equation: Equation | None = None  # the one whose rule is running

    # --- operands ---

    def refresh(self, value: Operand) -> Operand:
        """A view of a parameter that has been decided meanwhile is no longer undecided."""
        if isinstance(value, Fresh) and (value.leaf.form is not None or value.leaf.parts):
            if value.leaf.form is None:
                gather_parts(self, value.leaf)
            return value.decided()
        return value

    def scale(self, value: Operand) -> Scale:
        """The scales of any operand; an undecided parameter gets one unknown per element."""
        value = self.refresh(value)
        if isinstance(value, Fresh):
            value.assign(scaling.variables(self.system.new(value.compact)))
            value = value.decided()
        if isinstance(value, (WithEpsilon, Guarded)):
            return value.pin()
        if isinstance(value, Cases):
            scales = [self.scale(v) for v in value.values]
            assert self.equation is not None
            return reduce(partial(self.joined, self.equation), scales)
        if isinstance(value, Predicate):
            self.seen(value.compared)
            return Scale(value.shape)
        return value if isinstance(value, Scale) else self.constant(cast(ArrayLike, value))

    # --- constants ---

    def captured(self, consts: Sequence[ArrayLike]) -> list[Operand]:
        """What arrays that `fn` closes over count as.

        One that is zero (or infinite) everywhere is likely a statistic before training, so its
        zeros say nothing of the network. Zeros among other numbers are its structure, as in a mask.
        """
        return [self._captured(value) for value in consts]

    def _captured(self, value: ArrayLike) -> Operand:
        if not is_concrete(value) or np.ndim(value) == 0 or id(value) in self.origins:
            return value
        scale = scaling.constant(value)
        if scale.absorbing is not None and not self.trust_zeros and scaling.uniform(value):
            generic = Scale(np.shape(value))
            generic.key = ("captured", id(value))
            self.held.append(value)
            return generic
        dtype, shape = jnp.result_type(value), ",".join(map(str, np.shape(value)))
        self.origins[id(value)] = value, frozenset([f"{dtype}[{shape}]"])
        return value

    def folded(self, inputs: Sequence[Operand], outputs: Sequence[ArrayLike]) -> None:
        """Note what constants were computed from."""
        known = [self.origins[id(v)][1] for v in inputs if id(v) in self.origins]
        if known:
            for value in outputs:
                self.origins[id(value)] = value, frozenset().union(*known)

    def rely(self, value: ArrayLike) -> None:
        """Note that a rule rests on the zeros of a constant, or on a choice by it."""
        if id(value) in self.origins and self.equation is not None:
            for name in sorted(self.origins[id(value)][1]):
                self.relies_on[name, self.equation.name, self.equation.source] = None

    def constant(self, value: ArrayLike) -> Scale:
        scale = scaling.constant(value)
        if scale.absorbing is not None:
            self.rely(value)
        return scale

    def undecided_or_scale(self, value: Operand) -> Scale | Fresh:
        value = self.refresh(value)
        return value if isinstance(value, Fresh) and not value.spread else self.scale(value)

    def free(self, eqn: Equation, *operands: Operand, output: int = 0) -> Scale:
        """A result that depends on its operands, but not on their scale."""
        for value in operands:
            self.seen(self.scale(value).form)
        return Scale(eqn.outputs[output].shape)

    def seen(self, form: Form) -> Form:
        """Note that a result depends on values of these scales, in a way that the signs of the
        exponents on the parameters will not show (see `structure`)."""
        for _, ids in form:
            self.system.mark_read(ids)
        return form

    # --- equations ---

    def pin(self, eqn: Equation, value: Operand) -> None:
        """Require scale 0, and record the operation if that takes anything away."""
        value = self.refresh(value)
        if isinstance(value, Fresh) and not value.spread:
            value.assign(())
            self.blame(eqn)
            return
        value = self.scale(value)
        if scaling.tidy(self.system, value.form):
            self.blame(eqn)
        keep = None if value.absorbing is None else ~value.absorbing
        scaling.require_zero(self.system, value.form, keep)

    def pinned(self, eqn: Equation, value: Scale) -> Scale:
        self.pin(eqn, value)
        return Scale(value.shape)

    def blame(self, eqn: Equation) -> None:
        self.pinned_by[spoken(eqn.written), eqn.source] = None

    def note_loss(self, eqn: Equation) -> None:
        """Record an operation that fixed a scale, or made one of two, in a rule that did not."""
        if self.system.fixed:
            self.blame(eqn)
        elif self.system.tied:
            self.tied_by[spoken(eqn.written), eqn.source] = None

    def joined(
        self, eqn: Equation, left: Operand, right: Operand, shape: Sequence[int] | None = None
    ) -> Scale:
        """Operands of equal scale elementwise. One of scale 0 pins the other, and x and x³ have one
        scale only if it is 0: that is recorded."""
        a, b = self.scale(left), self.scale(right)
        terms = (*scaling.tidy(self.system, a.form), *scaling.tidy(self.system, b.form))
        if shape is None:
            shape = np.broadcast_shapes(a.shape, b.shape)
        result = scaling.join(self.system, a, b, shape)
        if any((self.system.find(ids)[ids != 0] == 0).any() for _, ids in terms):
            self.blame(eqn)
        return result

    def level(self, value: Operand, axes: Sequence[int]) -> Scale:
        """Equal scales along axes; returns the scales with length one there."""
        value = self.refresh(value)
        if isinstance(value, Fresh) and not value.spread and value.absorbing is None:
            shape = [1 if a in axes else n for a, n in enumerate(value.shape)]
            value.assign(scaling.variables(self.system.new(shape)))
        return scaling.level(self.system, self.scale(value), axes)

    def without_epsilon(self, eqn: Equation, value: WithEpsilon) -> Scale:
        self.ignored[f"epsilon {value.epsilon:g}", eqn.source] = None
        return value.base

    def with_dead(self, dead: np.ndarray, form: Form) -> Form:
        """The form, with an unknown of its own for every element that only meets zeros."""
        own = np.zeros(dead.shape, np.int64)
        own[dead] = self.system.new((int(dead.sum()),))
        return scaling.assemble(
            [scaling.masked(~dead, form), ((lambda ids: ids), scaling.variables(own))]
        )

    def index_number(self, key: Hashable) -> int:
        """A number for an index that the data know: equal keys, provably equal indices."""
        return self.indices.setdefault(key, len(self.indices))

    # --- parameters taken apart ---

    def parts(self, value: Fresh, axis: int, sizes: Sequence[int]) -> list[Fresh] | None:
        """The pieces of an undecided parameter along one axis, each undecided for itself."""
        if value.spread or value.absorbing is not None:
            return None
        pieces = []
        for n in sizes:
            shape = [n if a == axis else m for a, m in enumerate(value.shape)]
            pieces.append(Leaf(value.leaf.name, shape))
        value.leaf.parts = (value, axis, pieces)
        return [Fresh(piece, piece.shape) for piece in pieces]

    def part(self, value: Operand, axis: int, index: int) -> Fresh | None:
        """Slice number `index` of a parameter as it came in, undecided for itself; else None."""
        if not isinstance(value, Fresh) or value.steps or value.leaf.form is not None:
            return None
        count = value.shape[axis]
        if value.leaf.parts is None:
            if count > _MOST_PARTS or self.parts(value, axis, [1] * count) is None:
                return None
        assert value.leaf.parts is not None
        view, cut, pieces = value.leaf.parts
        if view.steps or cut != axis or len(pieces) != count:
            return None
        return Fresh(pieces[index], pieces[index].shape)

    # --- the rest of what the walker asks for ---

    def default(self, eqn: Equation, *inputs: Operand) -> Scale | list[Scale]:
        for value in inputs:
            if isinstance(value, Value):
                self.pin(eqn, value)
        outputs = [Scale(aval.shape) for aval in eqn.outputs]
        return outputs if eqn.primitive.multiple_results else outputs[0]

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        first, second = len(consts), len(consts) + len(init)

        def run(*inputs: Operand) -> list:
            every = list(inputs)
            parts = every[:first], every[first:second], every[second:]
            return loops.scan(self, eqn, body, *parts)

        return by_case(self, eqn, run, [*consts, *init, *xs])

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        def run(number: Operand, *operands: Operand) -> list:
            if is_concrete(number):
                return branches[int(np.clip(number, 0, len(branches) - 1))](*operands)
            return loops.switch(self, eqn, number, branches, list(operands))

        inputs = [index, *inputs]
        return by_case(self, eqn, run, inputs) if isinstance(index, Cases) else run(*inputs)

    def unbounded_while(
        self, eqn: Equation, condition: Callable[..., list], body: Callable[..., list], carry: list
    ) -> list:
        return loops.unbounded_while(self, eqn, condition, body, carry)


def gather_parts(domain: ScalingDomain, leaf: Leaf) -> None:
    """Decide a parameter that was taken apart, by the forms of its pieces."""
    assert leaf.parts is not None
    view, axis, pieces = leaf.parts
    forms = [domain.scale(Fresh(piece, piece.shape)).form for piece in pieces]
    lengths = [piece.shape[axis] for piece in pieces]
    leaf.parts = None
    leaf.inverse = any(piece.inverse for piece in pieces)
    view.assign(scaling.side_by_side(domain.system, forms, lengths, axis))
