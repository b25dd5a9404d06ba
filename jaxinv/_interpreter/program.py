"""Functions as programs: traced anew at every public call, compared by what they compute.

A program is hashable, so jitted code may take it as a static argument. Two programs are equal only
if every equation, constant and literal is: a function that reads a rebound global gives another
program and is compiled again, an unchanged one is not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import (
    AnyJaxpr,
    Equation,
    Trace,
    aval_of,
    equation,
    live_equations,
    open_jaxpr,
    sub_jaxprs,
    trace,
)
from jaxinv.typing import Array, Params, PyTree


class Program:
    """A traced `fn(params, x)` for arrays of fixed shapes, called like `fn`."""

    __slots__ = ("trace",)

    def __init__(self, traced: Trace):
        self.trace = traced

    def __call__(self, params: Params, x: PyTree) -> PyTree:
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(x)]
        flat = jex.jaxpr_as_fun(self.trace.jaxpr)(*leaves)
        return jax.tree.unflatten(self.trace.output_tree, flat)

    @property
    def inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the leaves of x."""
        jaxpr, _ = open_jaxpr(self.trace.jaxpr)
        given = jaxpr.invars[self.trace.num_params :]
        return [_shape_of(v) for v in given]

    @property
    def outputs(self) -> PyTree:
        """Shapes and dtypes of the outputs."""
        jaxpr, _ = open_jaxpr(self.trace.jaxpr)
        avals = [_shape_of(v) for v in jaxpr.outvars]
        return jax.tree.unflatten(self.trace.output_tree, avals)

    def __hash__(self) -> int:
        jaxpr, _ = open_jaxpr(self.trace.jaxpr)
        shapes = tuple(str(v.aval) for v in jaxpr.invars)
        return hash((shapes, tuple(str(eqn.primitive) for eqn in jaxpr.eqns)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        a, b = self.trace, other.trace
        named = (a.num_params, a.param_names, a.output_tree)
        same = named == (b.num_params, b.param_names, b.output_tree)
        return same and _same_jaxpr(a.jaxpr, b.jaxpr)


def _shape_of(atom: jax.core.Atom) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval_of(atom).shape, aval_of(atom).dtype)


def program(fn: Callable[..., PyTree], params: Params, x: PyTree, remedy: str = "") -> Program:
    """`fn` as it is now: jax would give an older trace of a function that it has seen before."""
    return Program(trace(lambda params, x: fn(params, x), params, x, remedy=remedy))


def all_lengths(closed: AnyJaxpr) -> set[int]:
    """Every length of an axis in a program, those of the functions that it calls included."""
    jaxpr, consts = open_jaxpr(closed)
    shapes = [jnp.shape(c) for c in consts]
    shapes += [getattr(v.aval, "shape", ()) for v in (*jaxpr.invars, *jaxpr.outvars)]
    found = {n for shape in shapes for n in shape}
    for eqn in jaxpr.eqns:
        found.add(eqn.params.get("length", 0))  # of a loop
        found |= {n for v in (*eqn.invars, *eqn.outvars) for n in getattr(v.aval, "shape", ())}
        for inner, _, _ in sub_jaxprs(eqn, [True] * len(eqn.outvars)) or []:
            found |= all_lengths(inner)
    return found


def find_equation(
    closed: AnyJaxpr, name: str, callers: tuple[jex.JaxprEqn, ...] = ()
) -> Equation | None:
    """The first equation of a primitive in a program, those of the functions that it calls too."""
    for raw in open_jaxpr(closed)[0].eqns:
        if raw.primitive.name == name:
            return equation(raw, callers)
        for inner, _, _ in sub_jaxprs(raw, [True] * len(raw.outvars)) or []:
            found = find_equation(inner, name, (raw, *callers))
            if found is not None:
                return found
    return None


def dependent_equations(
    closed: AnyJaxpr, depends: Sequence[bool] | None = None
) -> Iterator[Equation]:
    """The operations on values of a program's arguments, those of the functions that it calls too.

    Only those on which an output depends; with `depends` only those on the arguments it marks.
    Loops and branches are entered, not listed.
    """
    jaxpr, _ = open_jaxpr(closed)
    marked = [True] * len(jaxpr.invars) if depends is None else depends
    return _dependent(jaxpr, marked, [True] * len(jaxpr.outvars), ())


def _dependent(
    jaxpr: jex.Jaxpr,
    depends: Sequence[bool],
    needed: Sequence[bool],
    callers: tuple[jex.JaxprEqn, ...],
) -> Iterator[Equation]:
    dependent = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
    for raw, wanted in live_equations(jaxpr, needed):
        flags = [not isinstance(v, jex.Literal) and v in dependent for v in raw.invars]
        if not any(flags):
            continue
        dependent.update(raw.outvars)
        called = sub_jaxprs(raw, wanted)
        if called is None:
            yield equation(raw, callers)
        for body, skipped, needed_inside in called or ():
            inside = [True] * (len(flags) - skipped)
            yield from _dependent(open_jaxpr(body)[0], inside, needed_inside, (raw, *callers))


def coarsest(closed: Any) -> float:
    """The spacing at 1 of the coarsest floats that a program computes from its arguments."""
    dtypes = {a.dtype for eqn in dependent_equations(closed) for a in eqn.outputs}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0)


# --- equality -------------------------------------------------------------------------


def _same_jaxpr(a: AnyJaxpr, b: AnyJaxpr) -> bool:
    if a is b:
        return True
    (one, consts), (other, other_consts) = open_jaxpr(a), open_jaxpr(b)
    if not _same(tuple(consts), tuple(other_consts)):
        return False
    if one is other:
        return True
    if len(one.eqns) != len(other.eqns) or len(one.outvars) != len(other.outvars):
        return False
    names: dict[jex.Var, jex.Var] = {}

    def bound(left: Sequence[jex.Var], right: Sequence[jex.Var]) -> bool:
        """Variables that are written: paired from here on."""
        names.update(zip(left, right, strict=False))
        return len(left) == len(right) and all(
            v.aval == w.aval for v, w in zip(left, right, strict=True)
        )

    def read(left: Sequence[jax.core.Atom], right: Sequence[jax.core.Atom]) -> bool:
        return len(left) == len(right) and all(map(same_atom, left, right))

    def same_atom(v: jax.core.Atom, w: jax.core.Atom) -> bool:
        if isinstance(v, jex.Literal) and isinstance(w, jex.Literal):
            return v.aval == w.aval and _same(v.val, w.val)
        return not isinstance(v, jex.Literal) and names.get(v) is w

    if not bound(one.constvars, other.constvars) or not bound(one.invars, other.invars):
        return False
    for eqn, twin in zip(one.eqns, other.eqns, strict=True):
        if eqn.primitive is not twin.primitive or not read(eqn.invars, twin.invars):
            return False
        if not _same(eqn.params, twin.params) or not bound(eqn.outvars, twin.outvars):
            return False
    return read(one.outvars, other.outvars)


def _same(a: object, b: object) -> bool:
    """Whether two constants or parameters of an equation are the same; False where in doubt."""
    if a is b:
        return True
    if isinstance(a, AnyJaxpr) and isinstance(b, AnyJaxpr):
        return _same_jaxpr(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if type(a) is type(b) and type(a) in (tuple, list):
        assert isinstance(a, tuple | list) and isinstance(b, tuple | list)
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    if isinstance(a, _Array) or isinstance(b, _Array):
        return isinstance(a, _Array) and isinstance(b, _Array) and _same_array(a, b)
    if type(a) is not type(b):
        return False
    if callable(a) or type(a).__name__ == "WrappedFun":
        owner = _derivative_owner(a)
        return owner is not None and owner is _derivative_owner(b)
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


def _derivative_owner(function: Any) -> jax.custom_jvp | jax.custom_vjp | None:
    """The `custom_jvp` or `custom_vjp` of a library whose rule a traced thunk calls, or None.

    jax makes a new thunk at every trace; what it calls is held in closures. Rules of the user's own
    files may read globals, so they are never taken to be what they were.
    """
    todo, seen = [function], 0
    while todo and seen < 64:
        found, seen = todo.pop(0), seen + 1
        if isinstance(found, jax.custom_jvp | jax.custom_vjp):
            code = getattr(inspect.unwrap(found.fun), "__code__", None)
            return found if code is not None and "site-packages" in code.co_filename else None
        if isinstance(found, tuple):
            todo += found
        elif inspect.isfunction(found):
            todo += [cell.cell_contents for cell in found.__closure__ or ()]
        elif isinstance(found, functools.partial):
            todo += [found.func, *found.args]
        elif type(found).__name__ == "WrappedFun":
            todo += [found.f, found.transforms]
    return None


_Array = np.ndarray | np.generic | jax.Array | float | complex


def _same_array(a: _Array, b: _Array) -> bool:
    """Bit by bit, so that NaN is NaN and 0 is not -0."""
    if type(a) is not type(b) and not (isinstance(a, jax.Array) and isinstance(b, jax.Array)):
        return False
    if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
        return False
    for array in (a, b):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return False
    keys = jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.extended)
    if keys and isinstance(a, jax.Array) and isinstance(b, jax.Array):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def call_and_body(eqn: Equation) -> tuple[Callable[..., list[Array]], Callable[..., list[Array]]]:
    """A call, and what it calls, as functions of all its inputs: they may differ in derivative."""
    raw = eqn.raws[0]
    found = sub_jaxprs(raw, [True] * len(raw.outvars))
    assert found is not None, "not a call"
    ((body, *_),) = found
    places = {v: i for i, v in enumerate(raw.invars) if isinstance(v, jex.Var)}
    inner, _ = open_jaxpr(body)
    alone = inner.replace(constvars=[], invars=list(places), outvars=raw.outvars, eqns=[raw])
    call = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))
    return lambda *args: call(*[args[i] for i in places.values()]), jex.jaxpr_as_fun(body)
