"""`scan` and non-constant `cond` in the path domain: values cross the boundary as plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Body, Equation, Opaque, Value
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.paths import values as path
from jaxinv.paths.values import Operand, Semantics
from jaxinv.typing import Array, ArrayLike

# How a value is packed into arrays: a constant as itself, sums as (mantissa, exponent), a weight
# as its value, mantissa and exponent, a weight that is no monomial as its value. Integers and
# truth values from x are packed as sums are; an index is an integer whose sums mean nothing.
CONSTANT, DERIVED, WEIGHT, PATHS = "constant", "derived", "weight", "paths"
INDEX, INTEGER, MASK = "index", "integer", "mask"
_ORDER = (CONSTANT, WEIGHT, DERIVED, PATHS)
_CODES = (INDEX, INTEGER, MASK)


def _kind(value: Operand) -> str:
    if isinstance(value, path.Code):
        return MASK if value.levels == (0.0, 1.0) else INTEGER if value.numeric else INDEX
    if isinstance(value, path.Paths):
        return PATHS
    if isinstance(value, path.Weight):
        return DERIVED if value.length is None else WEIGHT
    if isinstance(value, Opaque):
        raise value.error
    return CONSTANT


def _join(a: str, b: str) -> str:
    if a == b:
        return a
    if {a, b} <= {CONSTANT, *_CODES}:
        return INDEX
    if {a, b} & set(_CODES):
        return PATHS
    if {a, b} == {CONSTANT, WEIGHT}:
        return WEIGHT
    return max(a, b, key=_ORDER.index)


def _leaves(value: Operand) -> frozenset[str]:
    return value.leaves if isinstance(value, path.Weight) else frozenset()


# A value as arrays: mantissas, and exponents where it has them.
Packed = ArrayLike | tuple[Array, ...]


def _pack(domain: Semantics, eqn: Equation, value: Operand, kind: str) -> Packed:
    if kind == INDEX:  # the sums mean nothing
        if isinstance(value, path.Paths):
            return jnp.ones(value.sums.mantissa.shape)
        return jnp.ones(jnp.shape(path.plain(value)))
    if kind in (PATHS, *_CODES) or isinstance(value, path.Sign):
        return _arrays(path.as_paths(domain, eqn, value).sums)
    array = path.plain(value)
    if kind == CONSTANT:
        return array
    if kind == DERIVED:
        return jnp.asarray(array)
    length = value.length if isinstance(value, path.Weight) else domain.power(array)
    assert length is not None
    return jnp.asarray(array), *_arrays(length)


def _arrays(s: Scaled) -> tuple[Array, Array]:
    """Mantissas and exponents of one shape, whatever the exponents are known to share."""
    return s.mantissa, scaled.every_exponent(s)


def _unpack(packed: Packed, kind: str, leaves: frozenset[str]) -> Operand:
    unpacked: path.Tracked
    if not isinstance(packed, tuple):
        if kind == CONSTANT:
            return packed
        array = jnp.asarray(packed)
        if kind == INDEX:
            unpacked = path.Code(Scaled(array, jnp.int32(0)), numeric=False)
        else:
            unpacked = path.Weight(array, None, leaves)
    elif kind in _CODES:
        unpacked = path.Code(Scaled(*packed), levels=(0.0, 1.0) if kind == MASK else None)
    elif kind == PATHS:
        unpacked = path.Paths(Scaled(*packed))
    else:
        unpacked = path.Weight(packed[0], Scaled(*packed[1:]), leaves)
    unpacked.key = object()
    return unpacked


class _Form(NamedTuple):
    """How several values are packed into arrays."""

    kinds: list[str]
    leaves: list[frozenset[str]]  # of which parameters a weight is made

    @classmethod
    def of(cls, values: Sequence[Operand]) -> _Form:
        return cls([_kind(v) for v in values], [_leaves(v) for v in values])

    def packed(self, domain: Semantics, eqn: Equation, values: Sequence[Operand]) -> list[Packed]:
        return [_pack(domain, eqn, v, kind) for v, kind in zip(values, self.kinds, strict=True)]

    def unpacked(self, arrays: Sequence[Packed]) -> list[Operand]:
        given = zip(arrays, self.kinds, self.leaves, strict=True)
        return [_unpack(array, kind, leaves) for array, kind, leaves in given]

    def joined(self, other: _Form) -> _Form:
        """A form that holds the values of either."""
        kinds = [_join(a, b) for a, b in zip(self.kinds, other.kinds, strict=True)]
        return _Form(kinds, [a | b for a, b in zip(self.leaves, other.leaves, strict=True)])

    def of_a_carry(self) -> _Form:
        """A weight that changes from step to step is no longer one parameter to a power."""
        return self._replace(kinds=[DERIVED if k == WEIGHT else k for k in self.kinds])


# (form of the carry, carry, slices, domain) -> (carry, what is stacked), of one step
_Step = Callable[[_Form, list, list, Semantics], tuple[list, list]]


def scan(domain: Semantics, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
    """`lax.scan` over sums of paths; the kind of each carry is found by fixpoint."""
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    if not length:
        return init + [np.zeros(a.shape, a.dtype) for a in eqn.outputs[len(init) :]]
    # A carry that the body hands on untouched (shared weights, often) is a constant of the loop.
    fixed = [body.jaxpr.outvars[i] is body.jaxpr.invars[len(consts) + i] for i in range(len(init))]
    moving = [v for v, f in zip(init, fixed, strict=True) if not f]
    slices_form = _Form.of(xs)
    arrays = slices_form.packed(domain, eqn, xs)

    def whole(moved: list) -> list:
        """All carries, from those that change."""
        rest = iter(moved)
        return [v if f else next(rest) for v, f in zip(init, fixed, strict=True)]

    def run(form: _Form, carry: list, slices: list, domain: Semantics) -> tuple[list, list]:
        state = whole(form.unpacked(carry))
        outs = body(*consts, *state, *slices_form.unpacked(slices), domain=domain)
        after = [v for v, f in zip(outs, fixed, strict=False) if not f]
        return after, outs[len(init) :]

    first = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), arrays
    )
    form, stacked_form = _settled(run, domain, eqn, moving, first)

    def step(carry: list, slices: list) -> tuple[list, list]:
        after, stacked = run(form, carry, slices, domain)
        return form.packed(domain, eqn, after), stacked_form.packed(domain, eqn, stacked)

    start = form.packed(domain, eqn, moving)
    types = jax.eval_shape(step, start, first)[0]
    start = jax.tree.map(lambda a, t: jnp.asarray(a, t.dtype), start, types)
    carry, ys = lax.scan(step, start, arrays, length=length, reverse=reverse)
    return whole(form.unpacked(carry)) + stacked_form.unpacked(ys)


def _settled(
    run: _Step, domain: Semantics, eqn: Equation, init: list, first: list
) -> tuple[_Form, _Form]:
    """The forms of the carry and of what is stacked, when going round no longer widens them."""
    form = _Form.of(init)
    while True:
        after, stacked = _forms_after(run, domain, form, form.packed(domain, eqn, init), first)
        wider = form.joined(after).of_a_carry()
        if wider == form:
            return form, stacked
        form = wider


def _forms_after(
    run: _Step, domain: Semantics, form: _Form, start: list, first: list
) -> tuple[_Form, _Form]:
    """The forms of the carry and of what is stacked, after one step."""
    found: list[_Form] = []

    def record(carry: list, slices: list) -> int:
        # A carry that starts as zeros looks like a constant until it has gone round once, and its
        # product with a weight like a weight that is no edge: judge only the final kinds.
        found[:] = map(_Form.of, run(form, carry, slices, domain.lenient()))
        return 0

    jax.eval_shape(record, start, first)
    after, stacked = found
    return after, stacked


def switch(
    domain: Semantics, eqn: Equation, index: Operand, branches: list[Body], inputs: list
) -> list:
    """`cond` by a constant that is known only at run time (a closed-over flag under jit)."""
    if isinstance(index, Value):
        raise eqn.refuse(
            path.THEORY,
            "which branch runs depends on values, so there is no fixed set of paths.",
            "branch on constants, or ask for each branch separately.",
            what="`cond` on a value that depends on x or on the parameters",
        )
    forms: list[_Form] = []

    def record() -> int:
        forms[:] = [_Form.of(branch(*inputs)) for branch in branches]
        return 0

    jax.eval_shape(record)
    form = reduce(_Form.joined, forms)

    def packed(branch: Body) -> Callable[[], list]:
        return lambda: form.packed(domain, eqn, branch(*inputs))

    return form.unpacked(lax.switch(index, [packed(branch) for branch in branches]))
