"""Values of the scaling domain: the log-scale of every element of an array.

A log-scale is a linear form Σ_t c_t · v[ids_t] in unknowns v. An array of forms is a tuple of
terms; the ids of a term broadcast against the array, so that a kernel of K×N weights, whose scales
are r[n] − q[k], is stored in K + N numbers and an activation in one per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Value, is_concrete
from jaxinv.rescaling.equations import System
from jaxinv.typing import ArrayLike

ONE = Fraction(1)


class Term(NamedTuple):
    """coefficient · v[ids], ids broadcastable to the array (each axis of length one or full)."""

    coefficient: Fraction
    ids: np.ndarray


Form = tuple[Term, ...]
Fact = tuple[Hashable, ...] | None  # what is known beyond scales: a word, and keys of values


class Root(NamedTuple):
    """The key of an index or a truth value before it was broadcast, and where its axes are now."""

    key: Hashable
    axes: tuple[int, ...]


class Scale(Value):
    """Log-scales of an array. `absorbing` marks elements that are 0 or ±∞ for all parameters.

    Those fit any scale, so they take part in no equation. `absorbing` is None where there are none.
    `root` says which index they repeat, where they are one that was moved; `fact` what else is
    known of them (see `Guarded`).
    """

    __slots__ = ("fact", "form", "root", "shape", "absorbing")

    def __init__(self, shape: Sequence[int], form: Form = (), absorbing: np.ndarray | None = None):
        self.shape, self.form = tuple(shape), form
        self.absorbing = None if absorbing is None or not absorbing.any() else shrunk(absorbing)
        self.fact: Fact = None
        self.root: Root | None = None

    @property
    def all_absorbing(self) -> bool:
        return self.absorbing is not None and bool(self.absorbing.all())


def shape_of(value: Operand) -> tuple[int, ...]:
    """The shape of a value, or of an array."""
    return tuple(getattr(value, "shape", ()))


class Leaf:
    """One leaf of params. Its form is None until its first use decides it."""

    __slots__ = ("name", "shape", "form", "parts", "inverse")

    def __init__(self, name: str, shape: Sequence[int]):
        self.name, self.shape = name, tuple(shape)
        self.form: Form | None = None
        # (view, axis, pieces) where it was taken apart along an axis
        self.parts: tuple[Fresh, int, list[Leaf]] | None = None
        self.inverse = False  # whether its first use divides by it


class Step(NamedTuple):
    """An invertible change of a parameter: how forms go through it, and back."""

    push: Callable[[Form], Form]
    pull: Callable[[Form], Form]


class Scaling(Protocol):
    """What rules ask of the domain."""

    system: System
    ignore_epsilon: bool

    def refresh(self, value: Operand) -> Operand: ...
    def scale(self, value: Operand) -> Scale: ...
    def default(self, eqn: Equation, *inputs: Operand) -> Scale | list[Scale]: ...
    def free(self, eqn: Equation, *operands: Operand, output: int = 0) -> Scale: ...
    def seen(self, form: Form) -> Form: ...
    def rely(self, value: ArrayLike) -> None: ...
    def undecided_or_scale(self, value: Operand) -> Scale | Fresh: ...
    def pin(self, eqn: Equation, value: Operand) -> None: ...
    def pinned(self, eqn: Equation, value: Scale) -> Scale: ...
    def joined(
        self, eqn: Equation, left: Operand, right: Operand, shape: Sequence[int] | None = None
    ) -> Scale: ...
    def level(self, value: Operand, axes: Sequence[int]) -> Scale: ...
    def without_epsilon(self, eqn: Equation, value: WithEpsilon) -> Scale: ...
    def with_dead(self, dead: np.ndarray, form: Form) -> Form: ...
    def index_number(self, key: Hashable) -> int: ...
    def parts(self, value: Fresh, axis: int, sizes: Sequence[int]) -> list[Fresh] | None: ...
    def part(self, value: Operand, axis: int, index: int) -> Fresh | None: ...
    def folded(self, inputs: Sequence[Operand], outputs: Sequence[ArrayLike]) -> None: ...


class Fresh(Value):
    """A parameter before its first use, possibly moved about or multiplied by known scales.

    `spread` says that it has been broadcast, so that not every form can be its own.
    """

    __slots__ = ("leaf", "shape", "steps", "compact", "absorbing")

    def __init__(
        self,
        leaf: Leaf,
        shape: Sequence[int],
        steps: tuple[Step, ...] = (),
        compact: Sequence[int] | None = None,
        absorbing: np.ndarray | None = None,
    ):
        self.leaf, self.shape, self.steps = leaf, tuple(shape), steps
        self.compact = self.shape if compact is None else tuple(compact)
        self.absorbing = absorbing

    @property
    def spread(self) -> bool:
        return self.compact != self.shape

    def through(
        self, shape: Sequence[int], step: Step, compact: Sequence[int] | None = None
    ) -> Fresh:
        return Fresh(self.leaf, shape, (*self.steps, step), compact, self.absorbing)

    def assign(self, form: Form) -> None:
        """Decide the form of the leaf by the form of this view of it."""
        assert self.leaf.form is None
        for step in reversed(self.steps):
            form = step.pull(form)
        self.leaf.form = form

    def decided(self) -> Scale:
        """This view of a leaf whose form is known."""
        form = self.leaf.form
        assert form is not None
        for step in self.steps:
            form = step.push(form)
        return Scale(self.shape, form, self.absorbing)


class WithEpsilon(Value):
    """value + ε: pinned by ε, unless a normalisation consumes it and ε may be ignored."""

    __slots__ = ("base", "epsilon", "pin")

    def __init__(self, base: Scale, epsilon: float, pin: Callable[[], Scale]):
        self.base, self.epsilon, self.pin = base, epsilon, pin


class Guarded(Value):
    """where(v == 0, c, v): pinned by c, unless it divides a value that is 0 wherever v is."""

    __slots__ = ("base", "pin", "shape")

    def __init__(self, base: Scale, pin: Callable[[], Scale]):
        self.base, self.pin, self.shape = base, pin, base.shape

    def divides(self, value: Operand) -> bool:
        """Whether the value is 0 wherever v is: min(|a|, |b|) is, for v = max(|a|, |b|)."""
        fact = self.base.fact
        return fact is not None and getattr(value, "fact", None) == ("min", *fact[1:])


class Predicate(Value):
    """A truth value that depends on values of scales `compared`, but not on their scale.

    Only a gate that picks between multiples of those same values leaves no other trace of it.
    """

    __slots__ = ("fact", "compared", "root", "shape")

    def __init__(self, shape: Sequence[int], compared: Form):
        self.shape, self.compared = tuple(shape), compared
        self.root: Root | None = None
        self.fact: Fact = None  # ("zero", key): whether the value of that key is 0


def constant(value: ArrayLike) -> Scale:
    """A constant has scale 0, its zeros and infinities any; one known only at run time has 0."""
    shape = np.shape(value)
    if not is_concrete(value):
        return Scale(shape)
    dtype = jnp.result_type(value)
    if jnp.issubdtype(dtype, jnp.bool_) or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return Scale(shape)  # truth values and PRNG keys
    array = np.asarray(value)
    if jnp.issubdtype(dtype, jnp.floating):
        array = array.astype(np.float64)  # NumPy has no isfinite for the 8- and 16-bit floats
    return Scale(shape, (), (array == 0) | ~np.isfinite(array))


def uniform(value: ArrayLike) -> bool:
    """Whether a floating-point array is zero everywhere, or infinite, or NaN."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return False
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float64)
    return bool((array == 0).all() or np.isinf(array).all() or np.isnan(array).all())


# --- arrays that broadcast ------------------------------------------------------------


def shrunk(array: np.ndarray) -> np.ndarray:
    """The same array with length one wherever it does not vary."""
    for axis, length in enumerate(array.shape):
        if length > 1:
            first = array.take([0], axis)
            if (array == first).all():
                array = first
    return array


def lifted(array: np.ndarray, rank: int) -> np.ndarray:
    """A scalar as an array of `rank` axes."""
    return array if array.ndim == rank else array.reshape((1,) * rank)


def reshaped(array: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Reshape an array that broadcasts to `old` into one that broadcasts to `new`."""
    expand, target = [], []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        a = old[i] if i < len(old) else 1
        b = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        full = any(n > 1 for n in array.shape[start_i:i])
        expand += [old[k] if full else 1 for k in range(start_i, i)]
        target += [new[k] if full else 1 for k in range(start_j, j)]
    return np.broadcast_to(array, expand).reshape(target)


def relaid(form: Form, move: Callable[[np.ndarray], np.ndarray]) -> Form:
    return tuple(Term(c, move(ids)) for c, ids in form)


# --- forms ----------------------------------------------------------------------------


def times(form: Form, factor: Fraction | int) -> Form:
    return tuple(Term(c * factor, ids) for c, ids in form) if factor else ()


def minus(form: Form, other: Form) -> Form:
    return (*form, *times(other, -1))


def variables(ids: np.ndarray) -> Form:
    return (Term(ONE, ids),)


def tidy(system: System, form: Form) -> Form:
    """The same form with equal unknowns recognised, equal terms added and zero terms left out."""
    terms: dict[tuple, Term] = {}
    for c, ids in form:
        ids = shrunk(system.find(ids))
        if ids.any():
            key = (ids.shape, ids.tobytes())
            terms[key] = Term(c + terms[key].coefficient if key in terms else c, ids)
    return tuple(t for t in terms.values() if t.coefficient)


def signature(form: Form) -> list[tuple]:
    """What two tidy forms have in common exactly if they are the same."""
    return sorted((c, ids.shape, ids.tobytes()) for c, ids in form)


def weight(form: Form) -> tuple[int, int]:
    """How unwieldy a form is."""
    return len(form), sum(ids.size for _, ids in form)


def overlapping(form: Form) -> list[list[Term]]:
    """Terms grouped so that those of different groups vary along different axes."""
    groups: list[tuple[set[int], list[Term]]] = []
    for term in form:
        axes = {i for i, n in enumerate(term.ids.shape) if n > 1}
        terms = [term]
        apart = []
        for others, members in groups:
            if others & axes:
                axes, terms = axes | others, members + terms
            else:
                apart.append((others, members))
        groups = [*apart, (axes, terms)]
    return [terms for _, terms in groups]


def columns_of(terms: Sequence[Term]) -> np.ndarray:
    return np.stack([a.ravel() for a in np.broadcast_arrays(*(t.ids for t in terms))], axis=1)


def require_zero(system: System, form: Form, keep: np.ndarray | None = None) -> None:
    """Require the form to be zero, at the elements `keep` (default: at all).

    Terms that vary along different axes can only cancel if each group is constant: that turns
    K·N equations f(k) + g(n) = 0 into K + N.
    """
    form = tidy(system, form)
    if not form or (keep is not None and not keep.any()):
        return
    if keep is not None and not keep.all():
        full = np.broadcast_shapes(keep.shape, *(ids.shape for _, ids in form))
        where = np.broadcast_to(keep, full)
        columns = [np.broadcast_to(ids, full)[where] for _, ids in form]
        system.equation([c for c, _ in form], np.stack(columns, axis=1))
        return
    single = [t for t in form if t.ids.size == 1]
    groups = overlapping(tuple(t for t in form if t.ids.size > 1))
    if len(groups) == 1:
        terms = [*groups[0], *single]
        system.equation([t.coefficient for t in terms], columns_of(terms))
        return
    for terms in groups:
        ids, coefficients = columns_of(terms), [t.coefficient for t in terms]
        base = ids[np.argmin((ids != 0).sum(axis=1))]
        if len(terms) == 1:
            system.union(ids[:, 0], base)
            single.append(Term(coefficients[0], base))
        elif not base.any():
            system.equation(coefficients, ids)
        else:
            level = system.new((1,))
            repeated = np.broadcast_to(level, (len(ids), 1))
            system.equation([*coefficients, -ONE], np.concatenate([ids, repeated], axis=1))
            single.append(Term(ONE, level))
    if single:
        terms = [Term(t.coefficient, t.ids.reshape(1)) for t in single]
        system.equation([t.coefficient for t in terms], columns_of(terms))


def assemble(parts: Sequence[tuple[Callable[[np.ndarray], np.ndarray], Form]]) -> Form:
    """The form that is each of `parts` in a region of its own.

    Every part comes with a function that puts its ids there, with id 0 (nothing) elsewhere.
    """
    slots: dict[tuple[Fraction, int], np.ndarray] = {}
    for place, form in parts:
        seen: dict[Fraction, int] = {}
        for c, ids in form:
            slot = (c, seen.setdefault(c, 0))
            seen[c] += 1
            placed = place(ids)
            slots[slot] = slots[slot] + placed if slot in slots else placed
    return tuple(Term(c, ids) for (c, _), ids in slots.items())


def masked(mask: np.ndarray, form: Form) -> tuple[Callable[[np.ndarray], np.ndarray], Form]:
    """A part of `assemble`: the form where the mask is true."""
    return (lambda ids: np.where(mask, ids, 0)), form


def join(system: System, a: Scale, b: Scale, shape: Sequence[int]) -> Scale:
    """Two arrays that are added, compared or selected between elementwise: equal scales."""
    rank = len(shape)
    fa, fb = (tuple(Term(c, lifted(i, rank)) for c, i in v.form) for v in (a, b))
    wa, wb = (None if v.absorbing is None else lifted(v.absorbing, rank) for v in (a, b))
    if a.all_absorbing and b.all_absorbing:
        return Scale(shape, (), np.ones((1,) * rank, bool))
    if a.all_absorbing:
        return Scale(shape, fb, wb)
    if b.all_absorbing:
        return Scale(shape, fa, wa)
    if wa is None and wb is None:
        require_zero(system, minus(fa, fb))
        return Scale(shape, min(tidy(system, fa), tidy(system, fb), key=weight))
    no = np.zeros((1,) * rank, bool)
    wa, wb = no if wa is None else wa, no if wb is None else wb
    require_zero(system, minus(fa, fb), ~(wa | wb))
    fa, fb = tidy(system, fa), tidy(system, fb)
    form = fa
    if signature(fa) != signature(fb):
        form = assemble([masked(wa & ~wb, fb), masked(~(wa & ~wb), fa)])
    return Scale(shape, tidy(system, form), wa & wb)


def level(system: System, value: Scale, axes: Sequence[int]) -> Scale:
    """Require scales to be the same along `axes`; returns them with length one there."""
    axes = [a for a in axes if value.shape[a] > 1]
    shape = tuple(1 if a in axes else n for a, n in enumerate(value.shape))
    rank = len(shape)
    form = tidy(system, value.form)
    varying = [t for t in form if any(t.ids.shape[a] > 1 for a in axes)]
    rest = tuple(t for t in form if not any(t.ids.shape[a] > 1 for a in axes))
    absorbing = value.absorbing
    if absorbing is not None:
        gone = np.asarray(absorbing.all(axis=tuple(axes), keepdims=True)) if axes else absorbing
    else:
        gone = None
    if not varying:
        return Scale(shape, form, gone)
    full = np.broadcast_shapes(
        *(t.ids.shape for t in varying), (1,) * rank if absorbing is None else absorbing.shape
    )
    remaining = tuple(1 if a in axes else n for a, n in enumerate(full))
    common = variables(system.new(remaining))
    require_zero(system, minus(tuple(varying), common), None if absorbing is None else ~absorbing)
    return Scale(shape, tidy(system, (*rest, *common)), gone)


def side_by_side(system: System, forms: Sequence[Form], lengths: Sequence[int], axis: int) -> Form:
    """Forms concatenated along an axis."""
    total, ends = sum(lengths), np.cumsum(lengths)

    def put(i: int) -> Callable[[np.ndarray], np.ndarray]:
        def place(ids: np.ndarray) -> np.ndarray:
            target = list(ids.shape)
            target[axis] = lengths[i]
            widths = [(0, 0)] * ids.ndim
            widths[axis] = (int(ends[i] - lengths[i]), int(total - ends[i]))
            return np.pad(np.broadcast_to(ids, target), widths)

        return place

    forms = [tidy(system, form) for form in forms]
    return tidy(system, assemble([(put(i), f) for i, f in enumerate(forms)]))
