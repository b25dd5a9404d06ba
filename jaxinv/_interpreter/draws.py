"""Random numbers that a function draws itself, when it is traced in float64.

In the scope of float64 `jax.random` draws 64 bits where the user's own program draws 32: other
numbers, and so another function (a fixed dropout mask, say, of other units). A float32 draw takes
the top 23 of its 32 bits. Put in front of a 64-bit word they give the same number in float64.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.batch import TracedNetwork, leading, traced_network
from jaxinv._interpreter.program import Program
from jaxinv._interpreter.walk import AnyJaxpr, aval_of, equation
from jaxinv._numerics.precision import as_dtype, in_precision
from jaxinv.typing import Array, DTypeLike, Network, Params, PyTree

# What jax.random shifts 32-bit and 64-bit words by, to leave the digits of a float.
_SHIFT_32, _SHIFT_64 = 9, 12
_UNSEEN = ("random_gamma",)  # draw by themselves when they are compiled


def traced_in(
    dtype: DTypeLike, fn: Network, params: Params, x: PyTree, batch_axis: int | None = 0
) -> TracedNetwork:
    """`fn` traced in the precision `dtype`, with the draws that it makes outside of that scope.

    What a public function computes in another precision starts from this one network: its batch
    axis is in front, and nobody traces `fn` again.

    Raises:
        InvalidInput: if `fn` raises.
        UnsupportedOperation: for draws that are other numbers in 64 bits, such as integers.
    """
    if isinstance(fn, TracedNetwork):
        return fn
    same = dtype != jnp.float64 or jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    with in_precision(dtype):
        w, inputs = jax.eval_shape(lambda *a: as_dtype(a, dtype), params, leading(x, batch_axis))
        network = traced_network(fn, w, inputs, batch_axis)
        programs = [p for p in (network.one, network.whole) if p is not None]
        if same or not any(_any_draws(p.trace.jaxpr) for p in programs):
            return network
        one, whole = (
            p and Program(p.trace._replace(jaxpr=with_own_bits(p.trace.jaxpr)))
            for p in (network.one, network.whole)
        )

    def drawn(params: Params, x: PyTree) -> PyTree:
        closed, out = jax.make_jaxpr(network.fn, return_shape=True)(params, x)
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(x)]
        flat = jex.jaxpr_as_fun(with_own_bits(closed))(*leaves)
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return TracedNetwork(drawn, one, whole, network.error)


def with_own_bits(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """A program traced in 64 bits with the random numbers of the same program in 32."""
    return cast(jex.ClosedJaxpr, _rewritten(closed, ()))


def _rewritten(jaxpr: AnyJaxpr, callers: tuple[jex.JaxprEqn, ...]) -> AnyJaxpr:
    if isinstance(jaxpr, jex.ClosedJaxpr) and hasattr(jaxpr, "jaxpr") and jaxpr.jaxpr is not jaxpr:
        return jaxpr.replace(jaxpr=_rewritten(jaxpr.jaxpr, callers))
    opened = cast(jex.Jaxpr, jaxpr)
    eqns = []
    for raw in opened.eqns:
        if _draws_64(raw):
            if raw.primitive.name != "random_seed":
                _check_float(raw, opened, callers)
            eqns.append(_in_32_bits(raw))
        else:
            inner = {k: _map_jaxprs(v, (raw, *callers)) for k, v in raw.params.items()}
            eqns.append(raw.replace(params=inner))
    return opened.replace(eqns=eqns)


def _map_jaxprs(value: object, callers: tuple[jex.JaxprEqn, ...]) -> object:
    """A parameter of an equation, with the programs in it rewritten."""
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
        return _rewritten(value, callers) if _any_draws(value) else value
    if type(value) is tuple:  # the branches of a cond; not the implementation of a key
        return tuple(_map_jaxprs(item, callers) for item in value)
    return value


def _any_draws(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> bool:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        _draws_64(raw)
        or any(
            _any_draws(item)
            for value in raw.params.values()
            for item in (value if isinstance(value, tuple) else (value,))
            if isinstance(item, jex.Jaxpr | jex.ClosedJaxpr)
        )
        for raw in jaxpr.eqns
    )


def _draws_64(raw: jex.JaxprEqn) -> bool:
    if raw.primitive.name == "random_seed":
        return aval_of(raw.invars[0]).dtype.itemsize == 8
    if raw.primitive.name == "random_bits":
        return raw.params["bit_width"] == 64
    return raw.primitive.name in _UNSEEN


def _check_float(raw: jex.JaxprEqn, jaxpr: jex.Jaxpr, callers: tuple[jex.JaxprEqn, ...]) -> None:
    """Raise unless the bits become floats, and nothing else."""
    (bits,) = raw.outvars
    uses = [eqn for eqn in jaxpr.eqns if any(v is bits for v in eqn.invars)]
    floats = all(
        eqn.primitive.name == "shift_right_logical"
        and isinstance(eqn.invars[1], jex.Literal)
        and int(np.asarray(eqn.invars[1].val)) == _SHIFT_64
        for eqn in uses
    )
    if raw.primitive.name in _UNSEEN or not floats or any(v is bits for v in jaxpr.outvars):
        raise equation(raw, callers).refuse(
            "a computation in float64",
            "with 64-bit types jax.random draws other numbers here than your program does: it "
            "would be the answer for another function.",
            "pass jax.random a dtype of 32 bits (jnp.int32, jnp.float32), draw outside of fn and "
            "close over the numbers, or compute with dtype=jnp.float32.",
            what=f"`{raw.primitive.name}` of 64 bits",
        )


def _in_32_bits(raw: jex.JaxprEqn) -> jex.JaxprEqn:
    """The same seed as 32 bits; the same draw from 23 bits of a 32-bit word, then zeros."""

    @jax.jit
    def seed(value: Array) -> Array:
        signed = jnp.issubdtype(value.dtype, jnp.signedinteger)
        return raw.primitive.bind(value.astype(jnp.int32 if signed else jnp.uint32), **raw.params)

    @jax.jit
    def draw(key: Array) -> Array:
        word = raw.primitive.bind(key, **{**raw.params, "bit_width": 32})
        digits = lax.shift_right_logical(word, jnp.uint32(_SHIFT_32)).astype(jnp.uint64)
        return lax.shift_left(digits, jnp.uint64(64 - 32 + _SHIFT_32))

    given = aval_of(raw.invars[0])
    function = seed if raw.primitive.name == "random_seed" else draw
    found = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(given.shape, given.dtype)).eqns[0]
    return found.replace(invars=list(raw.invars), outvars=list(raw.outvars))
