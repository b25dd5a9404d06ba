"""Frames round loops and over branches."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from jaxinv._interpreter.walk import Body, Equation, Operand
from jaxinv.frames.layout import taken
from jaxinv.frames.steps import Step, signature, walked
from jaxinv.frames.system import Vector
from jaxinv.frames.values import Axis, Block, Framed, Frames, each, like, refined, unify

# Steps are walked while the state of the loop becomes what it then stays; all others are played.
MOST_WALKED, MOST_PLAYED = 128, 1024
_FEW = 3  # steps that are walked in any case


def scan(
    domain: Frames, eqn: Equation, body: Body, consts: list, init: list, xs: list
) -> list[Operand]:
    """Step by step, with slice i of what is scanned."""
    length = int(eqn.params["length"])
    outputs = [Framed(aval.shape) for aval in eqn.outputs]
    carry: list[Operand] = list(init)
    rows: list[list[Framed]] = []
    stacks = [domain.plain(eqn, domain.framed(v)) for v in xs]
    for stack in stacks:
        domain.end(eqn, stack.axes[0])
        if stack.leaf is not None:
            domain.deep.add(stack.leaf)
    known: Step | None = None
    before: list[Hashable] = []
    steps = range(length)
    for count, i in enumerate(reversed(steps) if eqn.params["reverse"] else steps):
        scanned = [_step(domain, stack, i) for stack in stacks]
        operands = [*consts, *carry, *scanned]
        now = [signature(v) for v in carry]
        if known is None and count and length > _FEW and now == before and None not in now:
            known = _stable(walked(domain, body, operands, len(xs)), now)
        before = now
        if known is None and count >= MOST_WALKED or count >= MOST_PLAYED:
            for value in (*consts, *carry, *stacks):
                domain.end_all(eqn, domain.framed(value))
            return [*outputs]
        if known is None:
            results = body(*operands)
        else:
            vectors = [
                v.vector[0] if isinstance(v, Framed) and v.vector else None for v in operands
            ]
            results = known.played(domain, operands, vectors)
        rows.append([domain.framed(v) for v in results[len(init) :]])
        last, carry = carry, results[: len(init)]
        if known and not any(v.framed for v in scanned) and _same(domain, last, carry):
            break  # no step from here on says anything new
    if eqn.params["reverse"]:
        rows.reverse()
    for j, output in enumerate(outputs[len(init) :]):
        column = [domain.plain(eqn, row[j]) for row in rows]
        # What nobody reads is not walked, and a loop without steps collects nothing.
        if column and column[0].shape == output.shape[1:]:
            _stack(domain, eqn, column, output)
    return [*carry, *outputs[len(init) :]]


def _stable(step: Step, carry: list[Hashable]) -> Step | None:
    """The step, if its state comes out as it goes in."""
    after = [signature(v) for v in step.outputs[: len(carry)]]
    return step if after == carry else None


def _same(domain: Frames, one: list[Operand], other: list[Operand]) -> bool:
    """Whether two states have the same frames."""
    return all(_seen(domain, a) == _seen(domain, b) for a, b in zip(one, other, strict=True))


def _seen(domain: Frames, operand: Operand) -> list[object]:
    system = domain.system

    def root(number: int) -> int:
        return system.number(system.seen(system.ref(number)))

    axes = operand.axes if isinstance(operand, Framed) else []
    return [[(n, each(r, root).tolist()) for n, r in refined(system, a or [])] for a in axes]


def _step(domain: Frames, stack: Framed, i: int) -> Framed:
    whole = like(stack, axes=[None, *stack.axes[1:]])
    starts, limits = [0] * len(stack.shape), list(stack.shape)
    starts[0], limits[0] = i, i + 1
    one = taken(domain, whole, starts, limits)
    axes = [
        None if axis is None else [Block(n, r.reshape(r.shape[1:])) for n, r in axis]
        for axis in one.axes[1:]
    ]
    step = Framed(stack.shape[1:], axes, {a - 1 for a in stack.uniform if a})
    if stack.leaf is not None and len(step.shape) == 1:
        step.vector = (Vector(stack.leaf, i * step.shape[0]), 0)
    elif stack.vector and stack.vector[1]:
        step.vector = (stack.vector[0], stack.vector[1] - 1)
    step.key = object()
    return step


def _stack(domain: Frames, eqn: Equation, column: list[Framed], output: Framed) -> None:
    """What a loop collects has the frames that all its steps have in common."""
    for a in range(1, len(output.shape)):
        common = _common(domain, eqn, [v.axes[a - 1] for v in column])
        if common is not None:
            output.axes[a] = [Block(n, np.expand_dims(r, 0)) for n, r in common]


def _common(domain: Frames, eqn: Equation, axes: list[Axis]) -> Axis:
    """The frames that several axes have in common; none where one of them has none."""
    known = [axis for axis in axes if axis is not None]
    if len(known) < len(axes):
        for axis in known:
            domain.end(eqn, axis)
        return None
    for axis in known[1:]:
        unify(domain.system, known[0], axis)
    return known[0]


def switch(
    domain: Frames, eqn: Equation, index: Operand, branches: list[Body], inputs: list
) -> list[Operand]:
    """Whatever branch is taken, its results have one frame."""
    domain.end_all(eqn, domain.framed(index))
    results = [
        [domain.plain(eqn, domain.framed(v)) for v in branch(*inputs)] for branch in branches
    ]
    outputs: list[Framed] = []
    for j, aval in enumerate(eqn.outputs):
        output = Framed(aval.shape)
        for a in range(len(aval.shape)):
            output.axes[a] = _common(domain, eqn, [values[j].axes[a] for values in results])
        outputs.append(output)
    return [*outputs]
