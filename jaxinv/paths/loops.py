"""`scan` and non-constant `cond` in the path domain: values cross the boundary as plain arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Body, Equation, Opaque, Value
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.paths import values as path

# How a value is packed into arrays: a constant as itself, sums as (mantissa, exponent), a weight
# as its value, mantissa and exponent, a weight that is no monomial as its value. Integers and
# truth values from x are packed as sums are; an index is an integer whose sums mean nothing.
CONSTANT, DERIVED, WEIGHT, PATHS = "constant", "derived", "weight", "paths"
INDEX, INTEGER, MASK = "index", "integer", "mask"
_ORDER = (CONSTANT, WEIGHT, DERIVED, PATHS)
_CODES = (INDEX, INTEGER, MASK)


def _kind(value: Any) -> str:
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


def _leaves(value: Any) -> frozenset[str]:
    return value.leaves if isinstance(value, path.Weight) else frozenset()


def _pack(domain: Any, eqn: Equation, value: Any, kind: str) -> Any:
    if kind == INDEX:  # the sums mean nothing
        return jnp.ones(jnp.shape(value) if _kind(value) == CONSTANT else value.sums.mantissa.shape)
    if kind in (PATHS, *_CODES) or isinstance(value, path.Sign):
        return _arrays(path.as_paths(domain, eqn, value).sums)
    if kind == CONSTANT:
        return value
    array = value.value if isinstance(value, path.Weight) else jnp.asarray(value)
    if kind == DERIVED:
        return array
    length = value.length if isinstance(value, path.Weight) else domain.power(value)
    assert length is not None
    return array, *_arrays(length)


def _arrays(s: Scaled) -> tuple[Any, Any]:
    """Mantissas and exponents of one shape, whatever the exponents are known to share."""
    return s.mantissa, scaled.every_exponent(s)


def _unpack(packed: Any, kind: str, leaves: frozenset[str]) -> Any:
    if kind == CONSTANT:
        return packed
    unpacked: Value
    if kind == INDEX:
        unpacked = path.Code(Scaled(packed, jnp.int32(0)), numeric=False)
    elif kind in _CODES:
        unpacked = path.Code(Scaled(*packed), levels=(0.0, 1.0) if kind == MASK else None)
    elif kind == PATHS:
        unpacked = path.Paths(Scaled(*packed))
    elif kind == DERIVED:
        unpacked = path.Weight(packed, None, leaves)
    else:
        unpacked = path.Weight(packed[0], Scaled(*packed[1:]), leaves)
    unpacked.key = object()
    return unpacked


def scan(domain: Any, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
    """`lax.scan` over sums of paths; the kind of each carry is found by fixpoint."""
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    if not length:
        return init + [np.zeros(a.shape, a.dtype) for a in eqn.outputs[len(init) :]]
    # A carry that the body hands on untouched (shared weights, often) is a constant of the loop.
    fixed = [body.jaxpr.outvars[i] is body.jaxpr.invars[len(consts) + i] for i in range(len(init))]
    kinds = [_kind(v) for v in init]
    leaves = [_leaves(v) for v in init]
    x_kinds, x_leaves = [_kind(v) for v in xs], [_leaves(v) for v in xs]
    x_arrays = [_pack(domain, eqn, v, k) for v, k in zip(xs, x_kinds, strict=True)]

    def run(carry: list, slices: list, domain: Any = domain) -> list[Any]:
        state = [
            v if f else _unpack(c, k, names)
            for v, f, c, k, names in zip(init, fixed, carry, kinds, leaves, strict=True)
        ]
        scanned = [
            _unpack(s, k, names) for s, k, names in zip(slices, x_kinds, x_leaves, strict=True)
        ]
        return body(*consts, *state, *scanned, domain=domain)

    out_kinds: list[str] = []
    out_leaves: list[frozenset[str]] = []

    def start() -> list:
        return [
            0 if f else _pack(domain, eqn, v, k) for v, f, k in zip(init, fixed, kinds, strict=True)
        ]

    def record(carry: list, slices: list) -> int:
        # A carry that starts as zeros looks like a constant until it has gone round once, and its
        # product with a weight like a weight that is no edge: judge only the final kinds.
        outs = run(carry, slices, domain.lenient())
        out_kinds[:] = [_kind(v) for v in outs]
        out_leaves[:] = [_leaves(v) for v in outs]
        return 0

    first = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), x_arrays
    )
    while True:
        jax.eval_shape(record, start(), first)
        wider = [_join(a, b) for a, b in zip(kinds, out_kinds, strict=False)]
        # A weight that changes from step to step is no longer one parameter to a power.
        wider = [DERIVED if k == WEIGHT and not f else k for k, f in zip(wider, fixed, strict=True)]
        joined = [a | b for a, b in zip(leaves, out_leaves, strict=False)]
        if wider == kinds and joined == leaves:
            break
        kinds[:], leaves[:] = wider, joined

    def step(carry: list, slices: list) -> tuple[list, list]:
        outs = run(carry, slices)
        after = [
            0 if f else _pack(domain, eqn, v, k)
            for v, f, k in zip(outs, fixed, kinds, strict=False)
        ]
        rest, rest_kinds = outs[len(init) :], out_kinds[len(init) :]
        return after, [_pack(domain, eqn, v, k) for v, k in zip(rest, rest_kinds, strict=True)]

    step_types = jax.eval_shape(step, start(), first)[0]
    initial = jax.tree.map(lambda a, t: jnp.asarray(a, t.dtype), start(), step_types)
    carry, ys = lax.scan(step, initial, x_arrays, length=length, reverse=reverse)
    final = [
        v if f else _unpack(c, k, names)
        for v, f, c, k, names in zip(init, fixed, carry, kinds, leaves, strict=True)
    ]
    stacked = [
        _unpack(y, k, names)
        for y, k, names in zip(ys, out_kinds[len(init) :], out_leaves[len(init) :], strict=True)
    ]
    return final + stacked


def switch(domain: Any, eqn: Equation, index: Any, branches: list[Body], inputs: list) -> list:
    """`cond` by a constant that is known only at run time (a closed-over flag under jit)."""
    if isinstance(index, Value):
        raise eqn.refuse(
            path.THEORY,
            "which branch runs depends on values, so there is no fixed set of paths.",
            "branch on constants, or ask for each branch separately.",
            what="`cond` on a value that depends on x or on the parameters",
        )
    outs: list[list[Any]] = []

    def record() -> int:
        outs[:] = [branch(*inputs) for branch in branches]
        return 0

    jax.eval_shape(record)
    kinds = [_kind(v) for v in outs[0]]
    leaves = [_leaves(v) for v in outs[0]]
    for other in outs[1:]:
        kinds = [_join(k, _kind(v)) for k, v in zip(kinds, other, strict=True)]
        leaves = [a | _leaves(v) for a, v in zip(leaves, other, strict=True)]

    def packed(branch: Body) -> Any:
        return lambda: [
            _pack(domain, eqn, v, k) for v, k in zip(branch(*inputs), kinds, strict=True)
        ]

    results = lax.switch(index, [packed(branch) for branch in branches])
    return [_unpack(r, k, names) for r, k, names in zip(results, kinds, leaves, strict=True)]
