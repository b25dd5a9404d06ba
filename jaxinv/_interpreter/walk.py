"""Trace a function once and interpret its jaxpr in another domain.

Everything that touches jaxpr internals is in this folder, and here is the one walk over them. A
*domain* gives every value another meaning ("sum over the paths into this element"), by

* `rules`: a table primitive -> function, one small function per operation;
* `default`: what happens to a primitive without a rule (usually: refuse, by name);
* `switch` and `scan`: how values meet at a non-constant `cond` and go round a loop.

The walker owns what all share: constant folding, dead code, identity of values, and `jit`, `remat`,
`custom_jvp`, `custom_vjp`, `cond`, `while`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from jaxinv._checks import calling, leaf_names
from jaxinv._interpreter.constants import with_own_constants
from jaxinv._interpreter.source import part_of, remedy_for, short_type, source_line, written_as
from jaxinv._numerics.varying import vary_alike
from jaxinv.errors import UnsupportedOperation

# A `while` whose trip count is a constant is walked once per trip. Above this many trips the
# trace itself would take minutes; `lax.scan` is the remedy and is walked once.
MAX_WHILE_TRIPS = 4096


class Value:
    """A value that depends on parameters or inputs. Anything else is a constant array."""

    __slots__ = ("key",)
    key: Any


class Opaque(Value):
    """The result of an operation that is refused only if something uses it."""

    __slots__ = ("error",)

    def __init__(self, error: UnsupportedOperation):
        self.error = error
        self.key = object()


Operand = Value | jax.typing.ArrayLike  # a value of the domain, or a constant
Result = Operand | Sequence[Operand]  # several of an operation with several results
Primitive = jex.Primitive
AnyJaxpr = jex.Jaxpr | jex.ClosedJaxpr
Rule = Callable[..., Any]


class Reader(Protocol):
    """A domain that may read a program as it is written.

    With `as_written` no loop or branch is entered, no operation taken for the identity, and no
    constant folded: each is an operation like others. Calls are entered, unless a hook `called`
    does without.
    """

    rules: dict[Any, Rule]

    def default(self, eqn: Equation, *inputs: Any) -> Any: ...


class Domain(Reader, Protocol):
    """What any other interpretation must supply (see the module docstring)."""

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list: ...
    def switch(self, eqn: Equation, index: Any, branches: list[Body], inputs: list) -> list: ...


# --- primitives by name ---------------------------------------------------------------


def primitive(name: str) -> Any | None:
    """The primitive object called `name` in this jax version, or None where it has none."""
    for module in (jax.lax, primitives):
        found = getattr(module, f"{name}_p", None)
        if found is not None:
            return found
    return None


def rule_table() -> tuple[dict[Any, Rule], Callable[..., Callable[[Rule], Rule]]]:
    """An empty rule table and the decorator `@rule("name", ...)` that fills it."""
    table: dict[Any, Rule] = {}

    def rule(*names: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            for name in names:
                found = primitive(name)
                if found is not None:
                    table[found] = function
            return function

        return register

    return table, rule


# All are call-like: walk into the jaxpr. That of custom_vjp_call has had two names.
_CALLS = {
    primitive(name)
    for name in ("jit", "pjit", "closed_call", "core_call", "call", "remat", "checkpoint")
    + ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
} - {None}
_CALL_JAXPR_NAMES = ("jaxpr", "call_jaxpr", "fun_jaxpr")

# The identity on each of their operands; there for the compiler, derivatives or debugging.
_IDENTITIES = {
    primitive(name)
    for name in ("copy", "stop_gradient", "sharding_constraint", "optimization_barrier")
    + ("pvary", "pcast", "device_put")
} - {None}
# jax names these without exporting them; they are met by name.
_IDENTITY_NAMES = {"stop_gradient", "copy_p", "name", "pvary", "pcast"}


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(open jaxpr, consts) of a Jaxpr or a ClosedJaxpr; newer jax merges the two."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _sub_jaxpr(eqn: Any) -> Any:
    for name in _CALL_JAXPR_NAMES:
        if name in eqn.params:
            return eqn.params[name]
    raise equation(eqn).refuse(
        "jaxinv",
        f"this version of jax keeps the called function under none of {_CALL_JAXPR_NAMES}.",
        "use a version of jax that jaxinv is tested with, or call the function without the wrapper",
        what=f"`{eqn.primitive}`, a call of a function,",
    )


def sub_jaxprs(eqn: Any, wanted: list[bool]) -> list[tuple[Any, int, list[bool]]] | None:
    """What an equation runs: (jaxpr, leading inputs it skips, outputs needed); None if plain."""
    if eqn.primitive in _CALLS:
        return [(_sub_jaxpr(eqn), 0, wanted)]
    if eqn.primitive is primitives.scan_p:
        _, num_carry = scan_split(equation(eqn))
        return [(eqn.params["jaxpr"], 0, [True] * num_carry + wanted[num_carry:])]
    if eqn.primitive is primitives.cond_p:
        return [(branch, 1, wanted) for branch in eqn.params["branches"]]
    if eqn.primitive is primitives.while_p:
        return [(eqn.params["body_jaxpr"], eqn.params["cond_nconsts"], [True] * len(wanted))]
    return None


# --- equations and where they come from -----------------------------------------------


class Equation(NamedTuple):
    """One equation of a jaxpr, as the rules see it."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    raws: tuple[Any, ...]  # the equation of the jaxpr and those that called it

    @property
    def name(self) -> str:
        return str(self.primitive.name)

    def bind(self, *values: Any, **changed: Any) -> Any:
        """The same operation on other arrays."""
        params = self.primitive.get_bind_params(self.params | changed)
        return self.primitive.bind(*vary_alike(*values), **params)

    @property
    def source(self) -> str:
        """The source line that wrote the operation."""
        return source_line(self.raws)

    @property
    def written(self) -> str:
        """The operation in the user's words: gelu, softmax, LayerNorm; else its own name."""
        return written_as(self.raws) or self.name

    def refuse(self, theory: str, why: str, remedy: str, what: str | None = None) -> Any:
        """An `UnsupportedOperation` that says what, where, why, and what to do."""
        shapes = ", ".join(short_type(a) for a in self.inputs)
        results = ", ".join(short_type(a) for a in self.outputs)
        what = part_of(what or f"`{self.name}` of values that depend on x", self.name, self.written)
        return UnsupportedOperation(
            f"{what} is not covered by {theory}.\n"
            f"  what:  {self.name}: {shapes} -> {results}\n"
            f"  where: {self.source}\n"
            f"  why:   {why}\n"
            f"  do:    {remedy_for(self.written, theory, remedy)}"
        )


def equation(raw: Any, callers: Sequence[Any] = ()) -> Equation:
    """An equation of a jaxpr, with the ones that called it, innermost first."""
    return Equation(
        raw.primitive,
        raw.params,
        tuple(v.aval for v in raw.invars),
        tuple(v.aval for v in raw.outvars),
        (raw, *callers),
    )


# --- tracing --------------------------------------------------------------------------


class Trace(NamedTuple):
    """A traced `fn(params, x)`: the jaxpr and how to flatten its arguments."""

    jaxpr: Any
    num_params: int
    param_names: list[str]
    output_tree: Any


def trace(fn: Callable, params: Any, x: Any, *, remedy: str = "") -> Trace:
    """Trace `fn(params, x)` from shapes alone.

    jax gives an older trace of a function that it has seen before: pass one that is new.
    """

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a))

    shapes, inputs = jax.tree.map(shape, params), jax.tree.map(shape, x)
    with calling("fn(params, x)", shapes, inputs, remedy=remedy):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(shapes, inputs)
    closed, names = with_own_constants(closed), leaf_names(params, "params")
    return Trace(closed, len(names), names, jax.tree.structure(out))


def output_equation(traced: Trace) -> Equation:
    """A stand-in for "being returned", so that a refusal at an output has something to name."""
    jaxpr, _ = open_jaxpr(traced.jaxpr)
    avals = tuple(v.aval for v in jaxpr.outvars)
    raw = jaxpr.eqns[-1] if jaxpr.eqns else None
    return Equation(_Return, {}, avals, avals, (raw,))


class _Return:
    name = "return"


# --- the walk -------------------------------------------------------------------------


class Body:
    """A jaxpr ready to be interpreted on values of a domain, as often as needed."""

    def __init__(self, closed: Any, domain: Reader, keys: _Keys, needed: Any = None):
        self.jaxpr, self.consts = open_jaxpr(closed)
        self.domain, self.keys, self.needed = domain, keys, needed

    def __call__(self, *args: Any, domain: Any = None) -> list[Any]:
        """Values of the outputs; those not `needed` are not worked out and come back as 0."""
        domain = domain or self.domain
        return _walk(self.jaxpr, self.consts, args, domain, self.keys, self.needed)


class _Keys:
    """Identity of values: equal keys mean provably equal values (hash-consing)."""

    def __init__(self) -> None:
        self.table: dict[Any, tuple[int, tuple]] = {}
        self.fresh = itertools.count()
        self.callers: list[Any] = []  # the equations whose jaxprs are being walked

    def of_input(self, value: Any) -> Any:
        if isinstance(value, Value):
            return value.key
        if is_concrete(value) and np.ndim(value) == 0:
            return ("literal", str(jnp.result_type(value)), np.asarray(value).item())
        if is_concrete(value) and isinstance(value, (np.ndarray, jax.Array)) and value.size <= 64:
            if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
                return (str(value.dtype), value.shape, np.asarray(value).tobytes())
        return ("array", id(value))

    def of_output(self, eqn: Equation, inputs: Sequence[Any], index: int) -> Any:
        params = tuple(sorted((k, repr(v)) for k, v in eqn.params.items() if k != "sharding"))
        description = (eqn.primitive, params, tuple(map(self.of_input, inputs)), index)
        # Holding the operands keeps id() of an array from being reused within one walk.
        return self.table.setdefault(description, (next(self.fresh), tuple(inputs)))[0]


def interpret(
    trace_: Trace,
    params: Sequence[Value],
    inputs: Sequence[Value],
    domain: Reader,
    *,
    constant: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """Values of the outputs (flat) when the leaves of params and x have the given values.

    `constant` gives what an array that `fn` closes over stands for; by default itself.
    """
    keys = _Keys()
    for value in (*params, *inputs):
        value.key = next(keys.fresh)
    jaxpr, consts = open_jaxpr(trace_.jaxpr)
    return _walk(jaxpr, [constant(c) for c in consts], (*params, *inputs), domain, keys)


def is_concrete(value: object) -> TypeGuard[jax.typing.ArrayLike]:
    return not isinstance(value, Value) and not isinstance(value, jax.core.Tracer)


def live_equations(jaxpr: Any, needed: Sequence[bool]) -> list[tuple[Any, list[bool]]]:
    """The equations on which a needed output depends, and which of their outputs are needed.

    Dead code and pure side effects are left out.
    """
    outputs = (v for v, wanted in zip(jaxpr.outvars, needed, strict=True) if wanted)
    variables = {v for v in outputs if not isinstance(v, jex.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        wanted = [v in variables for v in eqn.outvars]
        if any(wanted):
            live.append((eqn, wanted))
            variables.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return live[::-1]


def _walk(
    jaxpr: Any, consts: Sequence, args: Sequence, domain: Reader, keys: _Keys, needed: Any = None
) -> list[Any]:
    consts = getattr(domain, "captured", list)(consts)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    needed = [True] * len(jaxpr.outvars) if needed is None else needed

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    for raw, wanted in live_equations(jaxpr, needed):
        inputs = [read(v) for v in raw.invars]
        outputs = _evaluate(raw, inputs, wanted, domain, keys)
        env.update(zip(raw.outvars, outputs, strict=True))
    return [read(v) if wanted else 0 for v, wanted in zip(jaxpr.outvars, needed, strict=True)]


def _evaluate(
    raw: Any, inputs: list[Any], wanted: list[bool], domain: Reader, keys: _Keys
) -> list[Any]:
    if raw.primitive in _CALLS:
        return _call(raw, inputs, wanted, domain, keys)
    if not any(isinstance(v, Value) for v in inputs) and _enters(domain):
        outputs = fold(raw, inputs)
        getattr(domain, "folded", lambda *_: None)(inputs, outputs)
        return outputs
    identity = raw.primitive in _IDENTITIES or raw.primitive.name in _IDENTITY_NAMES
    if identity and raw.primitive not in domain.rules and _enters(domain):
        return inputs
    eqn = equation(raw, keys.callers[::-1])
    control = _CONTROL_FLOW.get(raw.primitive)
    if control is None or raw.primitive is primitives.scan_p:
        for value in inputs:
            if isinstance(value, Opaque):
                raise value.error
    if control is not None and _enters(domain):
        keys.callers.append(raw)
        outputs = control(eqn, inputs, wanted, domain, keys)
        keys.callers.pop()
    else:
        rule = domain.rules.get(raw.primitive)
        outputs = rule(domain, eqn, *inputs) if rule else domain.default(eqn, *inputs)
        if not raw.primitive.multiple_results:
            outputs = [outputs]
    for index, value in enumerate(outputs):
        if isinstance(value, Value) and not hasattr(value, "key"):
            value.key = keys.of_output(eqn, inputs, index)
    return list(outputs)


def _enters(domain: Reader) -> TypeGuard[Domain]:
    return not getattr(domain, "as_written", False)


def _call(raw: Any, inputs: list, wanted: list[bool], domain: Reader, keys: _Keys) -> list[Any]:
    def walk() -> list[Any]:
        keys.callers.append(raw)
        outputs = Body(_sub_jaxpr(raw), domain, keys, wanted)(*inputs)
        keys.callers.pop()
        return outputs

    called = getattr(domain, "called", None)
    return called(equation(raw, keys.callers[::-1]), inputs, walk) if called else walk()


def fold(raw: Any, inputs: list[Any]) -> list[Any]:
    """Evaluate an equation on constants: now where they are known, later where they are traced."""
    params = raw.primitive.get_bind_params(raw.params)
    # jax runs a program among the parameters, of a shard_map, only in its turn.
    if "subfuns" not in params and all(is_concrete(v) for v in inputs):
        with jax.ensure_compile_time_eval():
            outputs = raw.primitive.bind(*inputs, **params)
    else:
        outputs = raw.primitive.bind(*inputs, **params)
    return list(outputs) if raw.primitive.multiple_results else [outputs]


def evaluate_alone(raw: Any, inputs: Sequence[Any], debug_info: Any) -> list[Any]:
    """An equation on other values, as a program of its own, so that custom derivatives stay.

    `debug_info` is that of the program that the equation is in.
    """
    given = {
        v: value
        for v, value in zip(raw.invars, inputs, strict=True)
        if not isinstance(v, jex.Literal)
    }
    dropped = [type(v).__name__ == "DropVar" for v in raw.outvars]
    kept = [v for v, drop in zip(raw.outvars, dropped, strict=True) if not drop]
    info = debug_info._replace(arg_names=tuple(map(str, given)), result_paths=tuple(map(str, kept)))
    alone = jex.Jaxpr([], list(given), kept, [raw], raw.effects, debug_info=info)
    results = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, []))(*given.values()))
    return [None if drop else next(results) for drop in dropped]


def _cond(
    eqn: Equation, inputs: list[Any], wanted: list[bool], domain: Domain, keys: _Keys
) -> list[Any]:
    index, *operands = inputs
    branches = [Body(b, domain, keys) for b in eqn.params["branches"]]
    if is_concrete(index):
        return branches[int(np.clip(index, 0, len(branches) - 1))](*operands)
    return domain.switch(eqn, index, branches, operands)


def _while(
    eqn: Equation, inputs: list[Any], wanted: list[bool], domain: Domain, keys: _Keys
) -> list[Any]:
    first = eqn.params["cond_nconsts"]
    then = first + eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = inputs[:first], inputs[first:then], inputs[then:]
    condition = Body(eqn.params["cond_jaxpr"], domain, keys)
    body = Body(eqn.params["body_jaxpr"], domain, keys)
    for _ in range(MAX_WHILE_TRIPS):
        (go_on,) = condition(*cond_consts, *carry)
        if not is_concrete(go_on):
            if hasattr(domain, "unbounded_while"):
                return domain.unbounded_while(
                    eqn,
                    lambda *state: condition(*cond_consts, *state),
                    lambda *state: body(*body_consts, *state),
                    carry,
                )
            raise eqn.refuse(
                "an interpretation of the program",
                "its number of trips is not a constant, so neither is the network.",
                "use lax.scan, or lax.fori_loop with constant bounds.",
                what="A `while` loop whose condition is not known from constants",
            )
        if not bool(go_on):
            return carry
        carry = body(*body_consts, *carry)
    raise eqn.refuse(
        "an interpretation of the program",
        f"it makes more than {MAX_WHILE_TRIPS} trips, each of which would be traced.",
        "use lax.scan, which is traced once.",
        what="A very long `while` loop",
    )


def _scan(
    eqn: Equation, inputs: list[Any], wanted: list[bool], domain: Domain, keys: _Keys
) -> list[Any]:
    num_consts, num_carry = scan_split(eqn)
    consts = inputs[:num_consts]
    init, xs = inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
    body = Body(eqn.params["jaxpr"], domain, keys, [True] * num_carry + wanted[num_carry:])
    return domain.scan(eqn, body, consts, init, xs)


def scan_split(eqn: Equation) -> tuple[int, int]:
    """(number of consts, number of carries) of a scan, read off the shapes: jax renames them.

    An array that is scanned has one axis more outside the body than inside, and nothing else has.
    """
    body, _ = open_jaxpr(eqn.params["jaxpr"])

    def scanned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(len(a.shape) > len(v.aval.shape) for a, v in zip(outside, inside, strict=True))

    num_carry = len(eqn.outputs) - scanned(eqn.outputs, body.outvars)
    return len(eqn.inputs) - scanned(eqn.inputs, body.invars) - num_carry, num_carry


_CONTROL_FLOW = {primitives.cond_p: _cond, primitives.while_p: _while, primitives.scan_p: _scan}
