"""A program on real numbers, with its gates noted: where it is not smooth, and in what.

A *gate* is an operation whose result is continuous and changes its derivative where a number z, its
pre-activation, is 0: max(a, b) with z = a − b, |z|, `where(z > 0, a, b)`, a clip (two gates), a
maximum over a window (pairs of its elements). Anything else that is not smooth (a comparison whose
result is used otherwise, a sign, a rounding) is a *kink*: a place to stay away from.

A value knows on which parameters it depends (its *atoms*: a leaf, or one layer of a stacked leaf),
and which of its axes counts the slices of each: unit c of a dense layer sees column c of its kernel
alone. So a unit can be run by itself, its layer's other weights left out (`Cut`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Aval, Body, Equation, rule_table
from jaxinv.gates.follow import ELEMENTWISE, LINEAR, MOVES, SMOOTH, follow
from jaxinv.gates.values import Atom, Axes, Cut, Kink, Operand, Real, Stage, Verdict
from jaxinv.typing import Array, ArrayLike

# Loops are walked once a step, since every step has gates of its own.
MOST_STEPS = 128


class GateDomain:
    """The domain; `stages` and `kinks` are filled by a walk."""

    def __init__(self, cut: Cut | None = None, probe: tuple[int, Array] | None = None):
        self.rules = RULES
        self.cut, self.probe = cut, probe  # what is added to the outputs of one stage
        self.stages: list[Stage] = []
        self.kinks: list[Kink] = []
        self.casts: list[str] = []

    # --- parameters ---

    def leaf(self, index: int, array: Array) -> Real:
        """A leaf of the parameters, or its slice."""
        return self._atom((index, None), array, index)

    def layer(self, value: Real, layer: int) -> Real:
        """One layer of a stacked leaf, which is an atom of its own."""
        assert value.leaf is not None
        return self._atom((value.leaf, layer), value.array[layer], None)

    def _atom(self, atom: Atom, array: Array, leaf: int | None) -> Real:
        axes = frozenset((a, a) for a in range(array.ndim))
        given, cut = self.cut.slices.get(atom, (array, None)) if self.cut else (array, None)
        return Real(given, {atom: axes}, False, cut, leaf=leaf)

    # --- operations ---

    def default(self, eqn: Equation, *inputs: Operand) -> Real | list[Real]:
        if eqn.name not in SMOOTH and eqn.name not in LINEAR:
            raise eqn.refuse(
                "the theory of gates",
                "it is neither smooth nor known to be continuous with a kink.",
                "leave it out of fn, or use jacobian_rank with another method.",
            )
        if eqn.name == "convert_element_type" and _is_float(eqn.inputs[0]):
            if not _is_float(eqn.outputs[0]):
                raise eqn.refuse(
                    "the theory of gates",
                    "whole numbers made of floats jump.",
                    "leave it out of fn, or use jacobian_rank with another method.",
                )
            if jnp.finfo(eqn.outputs[0].dtype).nmant < jnp.finfo(eqn.inputs[0].dtype).nmant:
                self.casts.append(eqn.source)
        results, a = self.results(eqn, *inputs), inputs[0] if inputs else None
        if eqn.name in MOVES and isinstance(a, Real) and a.off is not None:
            off = Real(a.off, {}, False, a.cut)
            if eqn.name not in ("convert_element_type", "stop_gradient"):
                off = self.bind(eqn, off)
            results[0].off = off.array
        return results if eqn.primitive.multiple_results else results[0]

    def bind(self, eqn: Equation, *inputs: Operand) -> Real:
        """The result of an operation with one."""
        return self.results(eqn, *inputs)[0]

    def results(self, eqn: Equation, *inputs: Operand) -> list[Real]:
        """The operation itself, on arrays of which some are cut to one channel.

        What mixes a channel with others comes after the unit that it is cut for, which does not
        depend on it: zeros stand for it.
        """
        for value in inputs:
            if isinstance(value, Verdict):
                value.kink.elsewhere = True
        atoms = self.atoms_of(eqn, inputs)
        data = any(isinstance(v, Real) and v.data for v in inputs)
        if any(
            isinstance(v, Real) and v.cut is not None and follow(eqn, i, v.cut) is None
            for i, v in enumerate(inputs)
        ):
            return [Real(jnp.zeros(a.shape, a.dtype), atoms, data) for a in eqn.outputs]
        arrays, cut = self.aligned(eqn, inputs)
        results = eqn.bind(*arrays, **({} if cut is None else _changed(eqn, inputs)))
        several = results if eqn.primitive.multiple_results else [results]
        return [Real(r, atoms, data, cut) for r in several]

    def atoms_of(self, eqn: Equation, inputs: Sequence[Operand]) -> dict[Atom, Axes]:
        """What the result depends on, and the axes that all of its operands agree on."""
        found: dict[Atom, Axes] = {}
        for i, value in enumerate(inputs):
            for atom, pairs in value.atoms.items() if isinstance(value, Real) else ():
                ahead = ((follow(eqn, i, axis), of_atom) for axis, of_atom in pairs)
                kept = frozenset((axis, a) for axis, a in ahead if axis is not None)
                found[atom] = found[atom] & kept if atom in found else kept
        return found

    def aligned(
        self, eqn: Equation, inputs: Sequence[Operand]
    ) -> tuple[list[ArrayLike], int | None]:
        """The arrays, all of them cut where one is, and the axis of the result that is cut."""
        axis = None
        for i, value in enumerate(inputs):
            if isinstance(value, Real) and value.cut is not None:
                axis = follow(eqn, i, value.cut)
                assert axis is not None, f"{eqn.name} mixes channels"
        arrays = [v.array if isinstance(v, Real) else v for v in inputs]
        if axis is None or self.cut is None:
            return arrays, None
        for i, value in enumerate(inputs):
            if isinstance(value, Real) and value.cut is not None:
                continue
            own = [a for a in range(np.ndim(arrays[i])) if follow(eqn, i, a) == axis]
            for a in own:
                arrays[i] = lax.dynamic_slice_in_dim(jnp.asarray(arrays[i]), self.cut.channel, 1, a)
        return arrays, axis

    # --- gates ---

    def gate(
        self, eqn: Equation, z: Real, out: Real, off: Array | None, kink: Kink | None = None
    ) -> Real:
        """The result of an operation whose derivative jumps where z is 0."""
        if not z.data:
            if kink is None:
                self.kinks.append(Kink(z.array, eqn.source))
            return out
        if self.probe is not None and self.probe[0] == len(self.stages):
            array = out.array + self.probe[1]
            out = Real(array, out.atoms, out.data, out.cut)
        if kink is not None and kink.z.shape == z.array.shape and kink.stage is None:
            kink.stage = len(self.stages)
        elif kink is not None:
            kink.elsewhere = True
        self.stages.append(Stage(z.array, z.atoms, z.cut, eqn.source))
        out.off = off
        return out

    def step(self, eqn: Equation, value: Real, distance: Array) -> Real:
        """The result of an operation that is constant between jumps at `distance` 0."""
        self.kinks.append(Kink(distance, eqn.source))
        return self.bind(eqn, value)

    # --- control flow ---

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        raise eqn.refuse(
            "the theory of gates",
            "which branch is taken depends on the values, so the function may jump.",
            "use jnp.where for a function that is continuous.",
        )

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        length = eqn.params["length"]
        if length > MOST_STEPS:
            raise eqn.refuse(
                "the theory of gates",
                f"a loop of {length} steps has as many layers of gates; at most {MOST_STEPS} are "
                "taken.",
                "use a shorter sequence, or jacobian_rank with another method.",
            )
        order = range(length)[::-1] if eqn.params["reverse"] else range(length)
        carry, rows = init, []
        for i in order:
            found = body(*consts, *carry, *[self._row(x, i) for x in xs])
            carry, row = found[: len(init)], found[len(init) :]
            rows.append(row)
        if eqn.params["reverse"]:
            rows = rows[::-1]
        return [*carry, *map(_stacked, zip(*rows, strict=True))]

    def _row(self, value: Real | Array, i: int) -> Real | Array:
        if not isinstance(value, Real):
            return value[i]
        if value.leaf is not None:
            return self.layer(value, i)
        atoms = {
            atom: frozenset((a - 1, b) for a, b in pairs if a)
            for atom, pairs in value.atoms.items()
        }
        return Real(value.array[i], atoms, value.data, None if value.cut is None else value.cut - 1)


def _stacked(rows: Sequence[Operand]) -> Operand:
    """What a loop collects."""
    values = [v for v in rows if isinstance(v, Real)]
    arrays = jnp.stack([jnp.asarray(v.array if isinstance(v, Real) else v) for v in rows])
    if not values:
        return arrays
    atoms: dict[Atom, Axes] = {}
    for value in values:
        for atom, pairs in value.atoms.items():
            moved = frozenset((a + 1, b) for a, b in pairs)
            atoms[atom] = atoms[atom] & moved if atom in atoms else moved
    cut = next((v.cut for v in values if v.cut is not None), None)
    data = any(v.data for v in values)
    return Real(arrays, atoms, data, None if cut is None else cut + 1)


def _is_float(aval: Aval) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))


def _changed(eqn: Equation, inputs: Sequence[Operand]) -> dict[str, tuple[int, ...]]:
    """Sizes that an equation spells out, where an operand is cut to length one."""
    value = next(v for v in inputs if isinstance(v, Real) and v.cut is not None)
    assert value.cut is not None
    out = follow(eqn, 0, value.cut)
    p = eqn.params

    def one(sizes: Sequence[int], axis: int | None) -> tuple[int, ...]:
        return tuple(1 if a == axis else n for a, n in enumerate(sizes))

    if eqn.name == "reshape":
        return {"new_sizes": one(p["new_sizes"], out)}
    if eqn.name == "broadcast_in_dim":
        return {"shape": one(p["shape"], out)}
    if eqn.name == "slice":
        return {"limit_indices": one(p["limit_indices"], value.cut)}
    return {}


# --- rules ----------------------------------------------------------------------------

RULES, _rule = rule_table()


def _minus(domain: GateDomain, eqn: Equation, a: Operand, b: Operand) -> Real:
    """a − b, cut as both are."""
    arrays, cut = domain.aligned(eqn, (a, b))
    data = any(isinstance(v, Real) and v.data for v in (a, b))
    return Real(jnp.subtract(*arrays), domain.atoms_of(eqn, (a, b)), data, cut)


def _off(value: Operand) -> Array:
    """Elements that are 0 and stay so nearby."""
    if not isinstance(value, Real):
        return jnp.asarray(value) == 0
    shape = value.array.shape
    return jnp.zeros(shape, bool) if value.off is None else value.off


def _apart(z: Real, off: Array) -> Real:
    """Where both sides are closed gates there is nothing to decide: infinitely far from 0."""
    return Real(jnp.where(off, jnp.inf, z.array), z.atoms, z.data, z.cut)


@_rule("max", "min")
def _larger(domain: GateDomain, eqn: Equation, a: Operand, b: Operand) -> Real:
    z, out = _minus(domain, eqn, a, b), domain.bind(eqn, a, b)
    both = jnp.broadcast_to(_off(a) & _off(b), out.array.shape)
    largest = eqn.name == "max"
    chosen = jnp.where((z.array > 0) == largest, _off(a), _off(b))
    return domain.gate(eqn, _apart(z, both), out, both | chosen)


@_rule("abs")
def _absolute(domain: GateDomain, eqn: Equation, a: Real) -> Real:
    z = Real(a.array, a.atoms, a.data, a.cut)
    return domain.gate(eqn, _apart(z, _off(a)), domain.bind(eqn, a), a.off)


@_rule("clamp")
def _clip(domain: GateDomain, eqn: Equation, low: Operand, a: Real, high: Operand) -> Real:
    if isinstance(low, Real) or isinstance(high, Real):
        raise eqn.refuse(
            "the theory of gates",
            "a clip between bounds that depend on the parameters has no rule.",
            "write jnp.minimum(jnp.maximum(x, low), high).",
        )
    out = domain.bind(eqn, low, a, high)
    for bound in (low, high):
        z = Real(a.array - bound, a.atoms, a.data, a.cut)
        out = domain.gate(eqn, z, out, None)
    return out


@_rule("gt", "ge", "lt", "le", "eq", "ne")
def _compare(domain: GateDomain, eqn: Equation, a: Operand, b: Operand) -> Real:
    arrays, cut = domain.aligned(eqn, (a, b))
    atoms = domain.atoms_of(eqn, (a, b))
    data = any(isinstance(v, Real) and v.data for v in (a, b))
    found = Verdict(eqn.bind(*arrays), atoms, data, cut)
    numbers = jnp.issubdtype(jnp.result_type(arrays[0]), jnp.floating)
    found.kink = Kink(jnp.subtract(*arrays) if numbers else jnp.ones(()), eqn.source)
    found.kink.elsewhere = not numbers
    if numbers:
        domain.kinks.append(found.kink)
    return found


@_rule("select_n")
def _select(domain: GateDomain, eqn: Equation, which: Operand, *cases: Operand) -> Real:
    if not isinstance(which, Verdict) or len(cases) != 2:
        return domain.bind(eqn, which, *cases)
    first = eqn._replace(inputs=eqn.inputs[1:])  # the two cases are elementwise like the whole
    z = _minus(domain, first, cases[1], cases[0])
    if which.cut is None and z.cut is not None or which.array.shape != z.array.shape:
        return domain.bind(eqn, which, *cases)
    elsewhere = which.kink.elsewhere
    out = domain.bind(eqn, which, *cases)
    which.kink.elsewhere = elsewhere
    off = jnp.where(which.array, _off(cases[1]), _off(cases[0]))
    return domain.gate(eqn, z, out, off, which.kink)


@_rule("sign", "floor", "ceil", "round")
def _jump(domain: GateDomain, eqn: Equation, a: Real) -> Real:
    z = a.array if eqn.name == "sign" else a.array - jnp.round(a.array)
    if eqn.name == "round":
        z = a.array - jnp.floor(a.array) - 0.5
    return domain.step(eqn, a, z)


@_rule("and", "or", "not", "xor", "is_finite")
def _logic(domain: GateDomain, eqn: Equation, *inputs: Operand) -> Real:
    return domain.bind(eqn, *inputs)


@_rule("reduce_max", "reduce_min")
def _largest(domain: GateDomain, eqn: Equation, a: Real) -> Real:
    """Pairs of elements, then pairs of the winners."""
    if a.cut in eqn.params["axes"]:
        a = _uncut(eqn, a)
    for axis in sorted(eqn.params["axes"], reverse=True):
        a = _fold(domain, eqn, a, axis)
    return a


def _uncut(eqn: Equation, a: Real) -> Real:
    """Zeros for what mixes channels (see `GateDomain.bind`)."""
    aval = eqn.inputs[0]
    return Real(jnp.zeros(aval.shape, aval.dtype), a.atoms, a.data)


def _fold(domain: GateDomain, eqn: Equation, a: Real, axis: int) -> Real:
    operation = lax.max if eqn.name.endswith("max") else lax.min
    while a.array.shape[axis] > 1:
        n = a.array.shape[axis]
        half = n // 2
        parts = [_part(a, axis, i, i + half) for i in (0, half)]
        pair = _pair(domain, eqn, operation, *parts)
        a = pair if n % 2 == 0 else _joined([pair, _part(a, axis, n - 1, n)], axis)
    gone = {
        atom: frozenset((x - (x > axis), y) for x, y in pairs if x != axis)
        for atom, pairs in a.atoms.items()
    }
    off = None if a.off is None else a.off.squeeze(axis)
    cut = a.cut if a.cut is None or a.cut < axis else a.cut - 1
    return Real(a.array.squeeze(axis), gone, a.data, cut, off=off)


def _part(a: Real, axis: int, start: int, end: int) -> Real:
    def taken(array: Array) -> Array:
        return lax.slice_in_dim(array, start, end, axis=axis)

    return Real(taken(a.array), a.atoms, a.data, a.cut, off=None if a.off is None else taken(a.off))


def _joined(parts: Sequence[Real], axis: int) -> Real:
    off = jnp.concatenate([_off(p) for p in parts], axis)
    array = jnp.concatenate([p.array for p in parts], axis)
    return Real(array, parts[0].atoms, parts[0].data, parts[0].cut, off=off)


def _pair(
    domain: GateDomain, eqn: Equation, operation: Callable[[Array, Array], Array], a: Real, b: Real
) -> Real:
    """The larger (or smaller) of two arrays alike: one stage of gates."""
    both, largest = _off(a) & _off(b), operation is lax.max
    # Padding is infinite on both sides of a pair: nothing to decide there either.
    pad = jnp.isinf(a.array) & jnp.isinf(b.array)
    z = Real(jnp.where(both | pad, jnp.inf, a.array - b.array), a.atoms, a.data, a.cut)
    off = jnp.where((z.array > 0) == largest, _off(a), _off(b)) | both
    return domain.gate(eqn, z, Real(operation(a.array, b.array), a.atoms, a.data, a.cut), off)


@_rule("reduce_window_max", "reduce_window_min")
def _pool(domain: GateDomain, eqn: Equation, a: Real) -> Real:
    """A maximum over windows: the elements at one place of all windows, pair by pair."""
    p, largest = eqn.params, eqn.name.endswith("max")
    atoms = domain.atoms_of(eqn, (a,))
    if a.cut is not None and follow(eqn, 0, a.cut) is None:
        a = _uncut(eqn, a)
    if any(d != 1 for d in p["base_dilation"]):
        raise eqn.refuse("the theory of gates", "a dilated maximum has no rule.", "leave it out.")
    low = jnp.asarray(-jnp.inf if largest else jnp.inf, a.array.dtype)
    padding = [(int(lo), int(hi), 0) for lo, hi in p["padding"]]
    array = lax.pad(a.array, low, padding)
    off = lax.pad(_off(a), jnp.zeros((), bool), padding)
    size, steps, spread = p["window_dimensions"], p["window_strides"], p["window_dilation"]
    lengths = list(eqn.outputs[0].shape)
    if a.cut is not None:
        lengths[a.cut] = 1
    parts = []
    for place in itertools.product(*map(range, size)):
        start = [i * d for i, d in zip(place, spread, strict=True)]
        end = [s + (n - 1) * t + 1 for s, n, t in zip(start, lengths, steps, strict=True)]
        cuts = (start, end, steps)
        parts.append(Real(lax.slice(array, *cuts), atoms, a.data, a.cut, off=lax.slice(off, *cuts)))
    operation = lax.max if largest else lax.min
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        rest = parts[-1:] if len(parts) % 2 else []
        parts = [_pair(domain, eqn, operation, x, y) for x, y in pairs] + rest
    return parts[0]


@_rule("slice")
def _sliced(domain: GateDomain, eqn: Equation, a: Real) -> Real | list[Real]:
    """One layer of a stacked leaf is an atom of its own."""
    start, end = eqn.params["start_indices"], eqn.params["limit_indices"]
    shape = eqn.inputs[0].shape
    whole = all(s == 0 and e == n for s, e, n in zip(start[1:], end[1:], shape[1:], strict=True))
    if a.leaf is None or a.cut is not None or len(shape) < 2 or not whole:
        return domain.default(eqn, a)
    if end[0] - start[0] != 1 or shape[0] == 1:
        return domain.default(eqn, a)
    layer = domain.layer(a, start[0])
    atoms = {atom: frozenset((x + 1, y) for x, y in pairs) for atom, pairs in layer.atoms.items()}
    cut = None if layer.cut is None else layer.cut + 1
    return Real(layer.array[None], atoms, False, cut)


def smooth_or_known(name: str) -> bool:
    """Whether an operation has a rule or is smooth: for the list in the documentation."""
    return name in SMOOTH or name in LINEAR or name in ELEMENTWISE
