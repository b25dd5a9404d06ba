"""The batch domain: along which axis of every value the examples lie.

A function treats examples apart if every operation between its inputs and its outputs is known to
keep that axis apart. The list says what is known, so an operation that is not on it mixes examples:
no list of what mixes them would ever be complete.

The program is traced with a batch size p that is a prime and divides no other length in it: an
axis that p divides holds the examples. Reshapes may merge it with others, so the place of an
example in an axis of length outer·p·inner is a digit of the position.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch_rules import of_examples
from jaxinv._interpreter.batch_values import (
    CUMULATIVE,
    ELEMENTWISE,
    REDUCTIONS,
    RESHAPES,
    WITHOUT_COUNT,
    Apart,
    Held,
    Mixed,
    Pieces,
    Place,
    Records,
    Shared,
    Single,
    constant_along,
    refusal,
)
from jaxinv._interpreter.walk import Body, Equation, Operand, Rules, Value, is_concrete
from jaxinv.typing import ArrayLike


class RecordingDomain:
    """Only notes what would show that the function knows the size of its batch."""

    rules: Rules = {}

    def __init__(self) -> None:
        self.records = Records()

    def default(self, eqn: Equation, *inputs: Operand) -> Value | list[Value]:
        self.records.add(eqn, inputs, True)
        out: list[Value] = [Single(a.shape) for a in eqn.outputs]
        return out if eqn.primitive.multiple_results else out[0]

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        carry, inputs = eqn.outputs[: len(init)], eqn.inputs[len(eqn.inputs) - len(xs) :]
        body(
            *consts,
            *(Single(a.shape) for a in carry),
            *(Single(a.shape[1:]) for a in inputs),
        )
        return [Single(a.shape) for a in eqn.outputs]

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        for branch in branches:
            branch(*inputs)
        return [Single(a.shape) for a in eqn.outputs]

    def unbounded_while(
        self, eqn: Equation, condition: Callable[..., list], body: Callable[..., list], carry: list
    ) -> list:
        state = [Single(a.shape) for a in eqn.outputs]
        condition(*state)
        body(*state)
        return list(state)


class BatchDomain:
    """Follows the examples through a program traced with `size` of them."""

    rules: Rules = {}

    def __init__(self, size: int):
        self.size = size
        self.records = Records()

    # --- helpers ---

    def many(self, shape: Sequence[int]) -> bool:
        """Whether an axis holds examples."""
        return any(n and n % self.size == 0 for n in shape)

    def uniform(self, value: Operand, place: Place | None = None) -> bool:
        """Whether an operand without examples is the same for all (of those along `place`)."""
        if isinstance(value, Shared):
            return value.uniform
        if isinstance(value, Value):
            return False
        shape = jnp.shape(value)
        if not self.many(shape):
            return True
        if not is_concrete(value) or jax.dtypes.issubdtype(
            jnp.result_type(value), jax.dtypes.extended
        ):
            return False
        array = np.asarray(value)
        # Without a place, merged axes are the same for all only if they do not vary at all.
        axes = [a for a, n in enumerate(shape) if n and n % self.size == 0]
        places = [place] if place is not None else [Place(a) for a in axes]
        return all(self._same_along(array, p) for p in places)

    def _same_along(self, array: np.ndarray, place: Place) -> bool:
        if place.axis >= array.ndim or array.shape[place.axis] == 1:
            return True
        split = (place.outer, self.size, place.inner)
        if array.shape[place.axis] != place.outer * self.size * place.inner:
            return constant_along(array, place.axis)
        whole = (*array.shape[: place.axis], *split, *array.shape[place.axis + 1 :])
        return constant_along(array.reshape(whole), place.axis + 1)

    def shared(self, value: Operand) -> Shared:
        """A constant or shared operand as a value."""
        if isinstance(value, Shared):
            return value
        return Shared(_shape(value), self.uniform(value))

    def value(self, value: Operand) -> Value:
        return value if isinstance(value, Value) else self.shared(value)

    def common(self, values: Sequence[Operand]) -> Place:
        """The place of all operands that hold examples; the others must be the same for all."""
        places = {v.place for v in values if isinstance(v, Apart)}
        if len(places) != 1 or any(isinstance(v, Pieces | Single) for v in values):
            raise Mixed("values that hold the examples in different places meet")
        (place,) = places
        for v in values:
            if not isinstance(v, Apart) and not self.uniform(v, place):
                raise Mixed("a value that differs from example to example is not an input")
        return place

    # --- the protocol of a domain ---

    def default(self, eqn: Equation, *inputs: Operand) -> Value | list[Value]:
        shapes = [a.shape for a in (*eqn.inputs, *eqn.outputs)]
        self.records.add(eqn, inputs, not any(map(self.many, shapes)))
        if any(isinstance(v, Single) for v in inputs):
            if any(isinstance(v, Apart | Pieces) for v in inputs):
                raise refusal(eqn, "one example of a loop meets all of them")
            out: list[Value] = [Single(a.shape) for a in eqn.outputs]
        elif any(isinstance(v, Apart | Pieces) for v in inputs):
            try:
                out = of_examples(self, eqn, inputs)
            except Mixed as mixed:
                raise refusal(eqn, str(mixed)) from None
        else:
            out = self._of_shared(eqn, inputs)
        return out if eqn.primitive.multiple_results else out[0]

    def _of_shared(self, eqn: Equation, inputs: Sequence[Operand]) -> list[Value]:
        """Results of what does not depend on x: are they the same for every example?"""
        same = all(self.uniform(v) for v in inputs)
        if not any(self.many(a.shape) for a in eqn.inputs):
            kept = eqn.name == "broadcast_in_dim"
            return [Shared(a.shape, same and (kept or not self.many(a.shape))) for a in eqn.outputs]
        known = eqn.name in ELEMENTWISE | RESHAPES | WITHOUT_COUNT | {
            *("transpose", "broadcast_in_dim", "rev", "split", "gather", "dynamic_slice"),
        }
        if eqn.name in REDUCTIONS | CUMULATIVE and not known:
            axes = eqn.params.get("axes", (eqn.params.get("axis"),))
            known = not self.many([eqn.inputs[0].shape[a] for a in axes])
        if eqn.name in ("concatenate", "slice", "pad"):
            lengths = zip(eqn.inputs[0].shape, eqn.outputs[0].shape, strict=True)
            known = not self.many([n for pair in lengths if pair[0] != pair[1] for n in pair])
        if eqn.name == "dot_general":
            contracting = eqn.params["dimension_numbers"][0]
            known = not self.many([eqn.inputs[0].shape[a] for a in contracting[0]])
        return [Shared(a.shape, same and known) for a in eqn.outputs]

    def joined(self, eqn: Equation, a: Operand, b: Operand) -> Held:
        """A value that is one of two."""
        if not isinstance(a, Apart | Single) and not isinstance(b, Apart | Single):
            return Shared(self.shared(a).shape, self.uniform(a) and self.uniform(b))
        if isinstance(a, Single) or isinstance(b, Single):
            if isinstance(a, Apart) or isinstance(b, Apart):
                raise refusal(eqn, "one example of a loop meets all of them")
            return Single(_shape(a if isinstance(a, Single) else b))
        try:
            place = self.common([a, b])
        except Mixed as mixed:
            raise refusal(eqn, str(mixed)) from None
        return Apart(_shape(a if isinstance(a, Apart) else b), place)

    def settled(self, eqn: Equation, carry: list, step: Callable[[list], list]) -> list:
        """A carry that a step does not change any more."""
        while True:
            before = [_kind(v) for v in carry]
            after = step(carry)
            carry = [self.joined(eqn, a, b) for a, b in zip(carry, after, strict=True)]
            if [_kind(v) for v in carry] == before:
                return carry

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        if isinstance(index, Apart | Pieces):
            raise refusal(eqn)
        results = [branch(*inputs) for branch in branches]
        if isinstance(index, Single):
            if any(isinstance(v, Apart) for v in inputs):
                raise refusal(eqn, "one example of a loop meets all of them")
            return [Single(a.shape) for a in eqn.outputs]
        joined = [self.value(v) for v in results[0]]
        for other in results[1:]:
            joined = [self.joined(eqn, a, b) for a, b in zip(joined, other, strict=True)]
        return joined

    def unbounded_while(
        self, eqn: Equation, condition: Callable[..., list], body: Callable[..., list], carry: list
    ) -> list:
        start = [self.value(v) for v in carry]

        def step(state: list) -> list:
            (go_on,) = condition(*state)
            if isinstance(go_on, Apart | Pieces):
                raise refusal(eqn)
            after = body(*state)
            if isinstance(go_on, Single):
                return [Single(jnp.shape(v)) for v in after]
            return list(after)

        return self.settled(eqn, start, step)

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        length = eqn.params["length"]
        if self.many([length]):
            return self._loop_over_examples(eqn, body, consts, init, xs)
        slices = [self._slice(eqn, v) for v in xs]
        outs: list[Operand] = []

        def step(state: list) -> list:
            outs[:] = body(*consts, *state, *slices)
            return outs[: len(init)]

        carry = self.settled(eqn, [self.value(v) for v in init], step)
        ys = [self.value(v) for v in outs[len(init) :]]
        return carry + [
            _stacked(y, a.shape) for y, a in zip(ys, eqn.outputs[len(init) :], strict=True)
        ]

    def _slice(self, eqn: Equation, value: Operand) -> Held:
        shape = _shape(value)
        if isinstance(value, Apart):
            if value.place.axis == 0:
                raise refusal(eqn, "a loop goes over an axis that holds examples and more")
            return Apart(shape[1:], value.place._replace(axis=value.place.axis - 1))
        if isinstance(value, Single):
            return Single(shape[1:])
        return Shared(shape[1:], self.uniform(value))

    def _loop_over_examples(
        self, eqn: Equation, body: Body, consts: list, init: list, xs: list
    ) -> list:
        """`lax.map`: a loop that carries nothing from one example to the next."""
        if init or any(isinstance(v, Apart | Pieces) for v in consts):
            raise refusal(eqn, "a loop over the examples carries something from one to the next")
        slices: list[Held] = []
        for value in xs:
            if isinstance(value, Apart) and value.place == Place(0):
                slices.append(Single(value.shape[1:]))
            elif not isinstance(value, Value | Single) and self.uniform(value, Place(0)):
                slices.append(Shared(jnp.shape(value)[1:], True))
            elif isinstance(value, Shared) and value.uniform:
                slices.append(Shared(value.shape[1:], True))
            else:
                raise refusal(eqn, "a loop over the examples reads something else in step")
        ys = body(*consts, *slices)
        return [
            Apart(a.shape, Place(0)) if isinstance(y, Single) else Shared(a.shape, self.uniform(y))
            for y, a in zip(ys, eqn.outputs, strict=True)
        ]


def _shape(value: Operand) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Held) else jnp.shape(cast(ArrayLike, value))


def _kind(value: Operand) -> Hashable:
    return type(value), getattr(value, "place", None), getattr(value, "uniform", None)


def _stacked(value: Value, shape: Sequence[int]) -> Held:
    if isinstance(value, Apart):
        return Apart(shape, value.place._replace(axis=value.place.axis + 1))
    if isinstance(value, Single):
        return Single(shape)
    assert isinstance(value, Shared)
    return Shared(shape, value.uniform)
