"""A network carried out in float64, also where its library casts to float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_COMBINE: dict[str, Callable[..., Any]] = {
    "scatter": lambda old, new: new,
    "scatter-add": jax.lax.add,
    "scatter-max": jax.lax.max,
}


def in_float64(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """fn(params, x), all outputs in one vector: traced in float32, each operation on doubles."""

    def network(params: Any, x: Any) -> Any:
        leaves, tree = jax.tree.flatten((params, x))
        with jax.numpy_dtype_promotion("standard"):
            closed = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)))(
                *map(_narrow, leaves)
            )
        found = _replay(closed.jaxpr, closed.consts, list(map(_double, leaves)))
        return jnp.concatenate([jnp.ravel(a) for a in found])

    return network


def doubled(tree: Any) -> Any:
    """All floats of a tree in float64."""
    return jax.tree.map(_double, tree)


def _double(a: Any) -> Any:
    a = jnp.asarray(a)
    return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def _narrow(a: Any) -> Any:
    floats = jnp.issubdtype(a.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(a.shape, jnp.float32 if floats else a.dtype)


def _replay(jaxpr: Any, consts: Any, args: list[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, map(_double, consts), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return _double(v.val) if hasattr(v, "val") else values[v]

    for eqn in jaxpr.eqns:
        found = _operation(eqn, [read(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _operation(eqn: Any, inputs: list[Any]) -> list[Any]:
    if eqn.primitive.name == "scan":
        return _scan(eqn, inputs)
    for name in _BODIES:
        if name in eqn.params:
            body = eqn.params[name]
            return _replay(getattr(body, "jaxpr", body), getattr(body, "consts", []), inputs)
    assert eqn.primitive.name not in ("cond", "while"), eqn.primitive
    params = {k: np.dtype(np.float64) if _is_float32(v) else v for k, v in eqn.params.items()}
    if params.get("update_jaxpr") is not None:
        one = jnp.zeros((), inputs[0].dtype)
        combine = _COMBINE[eqn.primitive.name]
        params["update_jaxpr"] = jax.make_jaxpr(combine)(one, one).jaxpr
    found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return [_double(a) for a in (found if eqn.primitive.multiple_results else [found])]


def _is_float32(value: Any) -> bool:
    return isinstance(value, np.dtype) and value == np.float32


def _scan(eqn: Any, inputs: list[Any]) -> list[Any]:
    """Step by step."""
    p, body = eqn.params, eqn.params["jaxpr"]
    first, then = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, carry, xs = inputs[:first], inputs[first:then], inputs[then:]
    rows = []
    steps = range(p["length"])
    for i in reversed(steps) if p["reverse"] else steps:
        found = _replay(body.jaxpr, body.consts, [*consts, *carry, *(a[i] for a in xs)])
        carry = found[: p["num_carry"]]
        rows.append(found[p["num_carry"] :])
    rows = rows[::-1] if p["reverse"] else rows
    return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]
