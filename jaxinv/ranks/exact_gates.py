"""Exact rules of gates, extremes and comparisons: derivatives at ties are those that JAX takes."""

from __future__ import annotations

import operator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Operand, Value, rule_table
from jaxinv.ranks import exact_values as exact
from jaxinv.ranks.exact_rules import pair, pool_windows, signs
from jaxinv.ranks.exact_values import Exact, Exactly, lift, refuse
from jaxinv.typing import Array, ArrayLike

RULES, rule = rule_table()


# --- gates ------------------------------------------------------------------------------


def _chosen(domain: Exactly, eqn: Equation, left: Operand, right: Operand) -> Exact:
    """The larger or the smaller of two; equal ones have half of both derivatives."""
    sign = 1 if eqn.name == "max" else -1
    for one, other in ((left, right), (right, left)):
        # softmax and logsumexp start their maxima there.
        if not isinstance(one, Value) and np.all(np.asarray(one) == -sign * np.inf):
            return exact.broadcast(cast(Exact, other), eqn.outputs[0].shape)
    left, right = pair(eqn, left, right)
    a, b = exact.ranks(left, right)
    first = np.sign(sign * (a - b))
    domain.tied |= bool((first == 0).any())
    num = np.where(first >= 0, *exact.common_denominator([left, right])[0])
    den = exact.common_denominator([left, right])[1]
    weights = [(1 + first) / 2, (1 - first) / 2]
    return exact.weighted([left, right], weights, exact.reduced(num, den, None))


rule("max", "min")(_chosen)


@rule("abs")
def _abs(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    slopes = signs(value).astype(np.float64)
    if not slopes.all():  # 0 or 1, by the version of jax
        _, at_zero = jax.jvp(lax.abs, (jnp.zeros(()),), (jnp.ones(()),))
        slopes[slopes == 0] = float(at_zero)
    return exact.multiply(value, lift(eqn, slopes))


@rule("sign")
def _sign(domain: Exactly, eqn: Equation, value: Exact) -> Array:
    return jnp.asarray(signs(value), eqn.outputs[0].dtype)


@rule("floor", "ceil")
def _rounded(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    up = -1 if eqn.name == "ceil" else 1
    return Exact(np.asarray(up * ((up * value.num) // value.den), object).reshape(value.shape))


@rule("clamp")
def _clamp(domain: Exactly, eqn: Equation, low: Operand, value: Exact, high: Operand) -> Exact:
    """Inside its bounds the operand moves, at a bound nothing, beyond it the bound."""
    shape = eqn.outputs[0].shape
    parts = [exact.broadcast(lift(eqn, v), shape) for v in (low, value, high)]
    a, b, c = exact.ranks(*parts)
    (n, m, k), den = exact.common_denominator(parts)
    num = np.where(np.minimum(np.maximum(a, b), c) == c, k, np.where(b < a, n, m))
    weights = [w.astype(np.float64) for w in (a > b, (a < b) & (b < c), c < b)]
    return exact.weighted(parts, weights, Exact(num, den))


@rule("reduce_max", "reduce_min")
def _extreme(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    """Elements that share the extreme share its derivative equally."""
    axes = tuple(eqn.params["axes"])
    kept = [a for a in range(len(value.shape)) if a not in axes]
    index = exact.positions(value).transpose(*axes, *kept)
    index = index.reshape(-1, *[value.shape[a] for a in kept])
    order = exact.ranks(value)[0].ravel()[index] * (1 if eqn.name == "reduce_max" else -1)
    top = order == order.max(0)
    out = exact.take(value, np.take_along_axis(index, order.argmax(0)[None], 0)[0])
    if value.tangents is not None:
        parts = exact.take(value, index)
        shares = exact.multiply(parts, lift(None, top.astype(np.float64)))
        counts = lift(None, top.sum(0).astype(np.float64))
        total = exact.summed_tangents(shares, lambda t: t.sum(1))
        out.tangents = exact.scaled_tangents(total, exact.reciprocal(eqn, counts).residues())
    return out


@rule("reduce_window_max", "reduce_window_min")
def _window_extreme(domain: Exactly, eqn: Equation, value: Exact) -> Exact:
    """The first of the elements that share the extreme has its derivative."""
    index = pool_windows(eqn, value)
    order = exact.ranks(value)[0].ravel() + 1
    if eqn.name == "reduce_window_min":
        order = order.max() + 1 - order
    order = np.where(index >= 0, order[np.maximum(index, 0)], 0)
    found = np.take_along_axis(index, order.argmax(0)[None], 0)[0]
    if (found < 0).any():
        raise refuse(eqn, "a window lies in the padding, so its extreme is infinite.")
    return exact.take(value, found)


# --- order: results that are constants of the program -----------------------------------

_COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def _as_exact(eqn: Equation, value: Exact | ArrayLike) -> Exact | None:
    return (
        None if not isinstance(value, Exact) and not np.isfinite(value).all() else lift(eqn, value)
    )


@rule(*_COMPARISONS)
def _compare(
    domain: Exactly, eqn: Equation, left: Exact | ArrayLike, right: Exact | ArrayLike
) -> Array:
    compared = _COMPARISONS[eqn.name]
    shape = eqn.outputs[0].shape
    parts = [_as_exact(eqn, v) for v in (left, right)]
    if None in parts:  # an infinity, which is beyond every number
        return jnp.asarray(compared(*[np.zeros(shape) if isinstance(v, Exact) else np.asarray(v)
                                      for v in (left, right)]))  # fmt: skip
    a, b = exact.ranks(*[exact.broadcast(v, shape) for v in parts if v is not None])
    return jnp.asarray(compared(a, b))


@rule("is_finite")
def _is_finite(domain: Exactly, eqn: Equation, value: Exact) -> Array:
    return jnp.ones(value.shape, bool)


@rule("argmax", "argmin")
def _argument(domain: Exactly, eqn: Equation, value: Exact) -> Array:
    return eqn.bind(jnp.asarray(exact.ranks(value)[0]))


@rule("sort")
def _sort(domain: Exactly, eqn: Equation, *arrays: Exact | Array) -> list[Exact | Array]:
    order = [
        jnp.asarray(exact.ranks(v)[0] if isinstance(v, Exact) else v).astype(a.dtype)
        for v, a in zip(arrays, eqn.inputs, strict=True)
    ]
    index = lax.broadcasted_iota(np.int32, eqn.inputs[0].shape, eqn.params["dimension"])
    *_, places = eqn.bind(*order, index)
    axis = eqn.params["dimension"]
    return [
        exact.take(v, np.take_along_axis(exact.positions(v), np.asarray(places), axis))
        if isinstance(v, Exact)
        else jnp.take_along_axis(v, places, axis)
        for v in arrays
    ]


@rule("top_k")
def _top_k(domain: Exactly, eqn: Equation, value: Exact) -> list[Exact | Array]:
    _, places = eqn.bind(jnp.asarray(exact.ranks(value)[0].astype(np.int32)))
    axis = eqn.params.get("axis", -1)
    index = np.take_along_axis(exact.positions(value), np.asarray(places), axis)
    return [exact.take(value, index), places]
