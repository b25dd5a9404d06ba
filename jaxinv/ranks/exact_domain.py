"""The exact domain: a value stands for rational numbers and their derivatives modulo primes.

Comparisons of such numbers are constants of the program, so that gates, loops and branches that
depend on data are followed as the function itself would without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.program import call_and_body
from jaxinv._interpreter.walk import Aval, Body, Equation, Opaque, Operand, Value
from jaxinv.ranks import exact_gates, exact_rules
from jaxinv.ranks import exact_values as exact
from jaxinv.ranks.exact_values import Exact, lift, refuse
from jaxinv.typing import Array, Constant, DTypeLike


class ExactDomain:
    """Piecewise rational operations on exact numbers."""

    rules = exact_rules.RULES | exact_gates.RULES

    def __init__(self) -> None:
        self.tied = False  # whether a maximum or minimum of equal numbers was met
        self._honest: set[int] = set()  # custom derivatives known to be those of their function

    def default(self, eqn: Equation, *inputs: Operand) -> NoReturn:
        """An operation without a rule."""
        raise refuse(
            eqn,
            "its derivatives are not rational numbers, or it has no exact rule.",
            what=f"`{eqn.name}` of values that depend on params or x",
        )

    def check_precision(self, eqn: Equation) -> None:
        """Refuse results with fewer digits than the operands."""
        target = eqn.outputs[0].dtype
        for aval in eqn.inputs:
            if not jnp.issubdtype(aval.dtype, jnp.floating):
                continue
            if jnp.finfo(target).nmant < jnp.finfo(aval.dtype).nmant:
                raise refuse(
                    eqn,
                    f"it rounds {aval.dtype} to {target}, and a rounded function is not piecewise "
                    "polynomial. If all of fn runs in float32, pass dtype=np.float32.",
                    what=f"A cast to {target}",
                )

    def scan(self, eqn: Equation, body: Body, consts: list, init: list, xs: list) -> list:
        """Every step in turn."""
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        needed = body.needed or [True] * len(eqn.outputs)
        steps, carry = [], list(init)
        for i in reversed(range(length)) if reverse else range(length):
            outs = body(*consts, *carry, *[_row(v, i) for v in xs])
            carry, ys = outs[: len(init)], outs[len(init) :]
            steps.append(ys)
        steps = steps[::-1] if reverse else steps
        avals = eqn.outputs[len(init) :]
        wanted = needed[len(init) :]
        stacked = [
            _stack(eqn, [s[j] for s in steps], aval) if used else 0
            for j, (aval, used) in enumerate(zip(avals, wanted, strict=True))
        ]
        return [*carry, *stacked]

    def switch(self, eqn: Equation, index: Operand, branches: list[Body], inputs: list) -> list:
        """Comparisons are constants here, so that only a number can be the index."""
        raise refuse(eqn, "which branch runs is not known.")

    def called(self, eqn: Equation, inputs: list, walk: Callable[[], list]) -> list:
        """A call: its body, unless it has a derivative of its own that is not its body's."""
        if not eqn.name.startswith("custom_") or not any(isinstance(v, Value) for v in inputs):
            return walk()
        before, self.tied = self.tied, False
        outputs = walk()
        met, self.tied = self.tied, before
        if any(isinstance(v, Opaque) for v in inputs):
            return outputs
        own, plain, point = _both(eqn, inputs)
        if id(eqn.raws[0]) not in self._honest:
            if not _same_derivative(own, plain, point):
                raise refuse(
                    eqn,
                    "its derivative is defined apart from its value (custom_jvp, custom_vjp), and "
                    "the two do not agree.",
                    what="A function with a derivative of its own",
                )
            self._honest.add(id(eqn.raws[0]))
        return _with_ties(eqn, inputs, outputs, own, point) if met else outputs


# --- functions with derivatives of their own ----------------------------------------------


def _both(eqn: Equation, inputs: list) -> tuple[Callable, Callable, list[np.ndarray]]:
    """The called function with and without its own derivative, and the floats it is called at."""
    moving = {id(v): v for v in inputs if isinstance(v, Exact)}
    call, body = call_and_body(eqn)

    def arguments(values: tuple) -> list:
        given = dict(zip(moving, values, strict=True))
        return [given.get(id(v), v) for v in inputs]

    def own(*values: Array) -> list:
        return call(*arguments(values))

    def plain(*values: Array) -> list:
        return body(*arguments(values))

    dtypes = {id(v): aval.dtype for v, aval in zip(inputs, eqn.inputs, strict=True)}
    return own, plain, [_floats(v, dtypes[key]) for key, v in moving.items()]


def _floats(value: Exact, dtype: DTypeLike) -> np.ndarray:
    flat = [n / value.den for n in value.num.ravel().tolist()]
    return np.array(flat, np.float64).reshape(value.shape).astype(dtype)


def _pulled(function: Callable, point: list, weights: Sequence[np.ndarray] | None = None) -> list:
    """The derivative of a weighted sum of the outputs, all with weight one by default."""
    outputs, pull = jax.vjp(function, *[jnp.asarray(p) for p in point])
    floating = [jnp.issubdtype(o.dtype, jnp.floating) for o in outputs]
    rng = np.random.default_rng(0)

    def cotangent(i: int, o: Array) -> Constant:
        if not floating[i]:
            return np.zeros(o.shape, jax.dtypes.float0)
        w = rng.normal(size=o.shape) if weights is None else weights[i]
        return jnp.asarray(w, o.dtype)

    given = [cotangent(i, o) for i, o in enumerate(outputs)]
    return [np.asarray(t, np.float64) for t in pull(given)]


def _same_derivative(own: Callable, plain: Callable, point: list[np.ndarray]) -> bool:
    """At the numbers met, moved off any tie, and at others."""
    rng = np.random.default_rng(1)

    def near(p: np.ndarray) -> np.ndarray:
        return p + np.maximum(abs(p), 1e-3) * rng.normal(0, 1e-2, p.shape)

    for change in (near, lambda p: rng.normal(size=p.shape)):
        moved = [change(p).astype(p.dtype) for p in point]
        for a, b in zip(_pulled(own, moved), _pulled(plain, moved), strict=True):
            size = np.max(abs(b), initial=1e-30)
            if not np.allclose(a, b, rtol=1e-4, atol=1e-5 * size):
                return False
    return True


def _with_ties(
    eqn: Equation, inputs: list, outputs: list, own: Callable, point: list[np.ndarray]
) -> list:
    """At equal numbers the function's own derivative holds: jax.nn.relu has 0 at 0."""
    moving = list({id(v): v for v in inputs if isinstance(v, Exact)}.values())
    slopes = None
    if len(moving) == len(outputs) == 1 and moving[0].shape == eqn.outputs[0].shape:
        (slopes,) = _pulled(own, point, [np.ones(moving[0].shape)])
        weights = np.random.default_rng(2).normal(size=slopes.shape)
        (pulled,) = _pulled(own, point, [weights])
        if not np.allclose(pulled, slopes * weights, rtol=1e-4):  # not element by element
            slopes = None
    if slopes is None or not isinstance(outputs[0], Exact):
        raise refuse(
            eqn,
            "it has a derivative of its own, and compares equal numbers, where that matters.",
            what="A function with a derivative of its own",
        )
    # A number that is no float is near a tie at most, and there the walk is right.
    a, b = exact.ranks(lift(None, point[0]), moving[0])
    at = (a == b).astype(np.float64)
    flat = Exact(outputs[0].num, outputs[0].den, moving[0].tangents)
    found = exact.weighted([flat, outputs[0]], [slopes * at, 1 - at], outputs[0])
    found.key = object()
    return [found]


# --- loops ----------------------------------------------------------------------------------


def _row(value: Exact | Array, i: int) -> Exact | Array:
    if not isinstance(value, Value):
        return value[i]
    row = exact.take(value, exact.positions(value)[i])
    row.key = object()
    return row


def _stack(eqn: Equation, rows: list, aval: Aval) -> Exact | Array:
    if not any(isinstance(r, Exact) for r in rows):
        return (
            jnp.stack([jnp.asarray(r) for r in rows]) if rows else jnp.zeros(aval.shape, aval.dtype)
        )
    whole = exact.joined([lift(eqn, r) for r in rows])
    return exact.take(whole, exact.positions(whole).reshape(aval.shape))
