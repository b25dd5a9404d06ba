"""Path rules of piecewise linear operations: gates on the sign of a value, and maxima."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Opaque, Primitive, Value, is_concrete, rule_table
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import UnsupportedOperation
from jaxinv.paths.linear import accumulated, assemble, scattered, summed, summed_in_windows
from jaxinv.paths.values import (
    HOMOGENEITY,
    REMEDY,
    THEORY,
    Operand,
    Paths,
    Result,
    Semantics,
    Sign,
    Tracked,
    Weight,
    as_paths,
    derived,
    indexed,
    is_zero,
    multiples_of,
    not_homogeneous,
    of_signs,
)

RULES, rule = rule_table()


# --- gates: piecewise linear in one value ---------------------------------------------


def gate(key: Hashable, cases: Sequence[Operand]) -> Paths:
    """max over the slopes of a function that is linear in the value `key` on either side of 0."""
    base, slopes = None, []
    for case in cases:
        if isinstance(case, Paths):
            base, slope = multiples_of(case)[key]()
            slopes.append(slope)
    assert base is not None
    return Paths(scaled.multiply(base, scaled.maximum(slopes)))


@rule("max", "min")
def _extremum(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    if not isinstance(left, Paths):
        left, right = right, left
    if not isinstance(left, Paths):
        return domain.default(eqn, left, right)
    if isinstance(right, Paths):
        shared = [key for key in multiples_of(left) if key in multiples_of(right)]
        if shared:
            return gate(shared[0], [left, right])
        return Paths(scaled.add([left.sums, right.sums]))
    if is_zero(right):
        return Paths(left.rows, runs=left.runs)
    raise _threshold(eqn)


def _threshold(eqn: Equation) -> UnsupportedOperation:
    if eqn.written in ("softmax", "log_softmax"):
        return eqn.refuse(
            THEORY,
            f"{eqn.written} is not positively homogeneous, so no path goes through it.",
            f"return the logits; leave {eqn.written} to the loss.",
            what=f"`{eqn.written}`",
        )
    return eqn.refuse(
        THEORY,
        f"{eqn.name} with a constant other than 0 (relu6, clip, thresholds) is not positively "
        "homogeneous; a path through it would be counted that the network never carries.",
        "use relu, leaky_relu or max with another unit.",
        what=f"`{eqn.name}` with a value that is not provably 0",
    )


@rule("abs")
def _abs(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Paths):
        return Paths(value.rows, runs=value.runs)
    if isinstance(value, Weight) and value.length is not None:
        return Weight(abs(value.value), value.length, value.leaves, value.axes)
    return domain.default(eqn, value)


@rule("conj")
def _conjugate(domain: Semantics, eqn: Equation, value: Operand) -> Result:
    if isinstance(value, Paths):
        return Paths(value.rows, runs=value.runs)
    if isinstance(value, Weight) and value.length is not None:
        return Weight(eqn.bind(value.value), value.length, value.leaves, value.axes)
    return domain.default(eqn, value)


@rule("real", "imag")
def _part(domain: Semantics, eqn: Equation, value: Operand) -> Result:
    """As long as the number itself at some phase, and never longer: a gate of slope one."""
    if isinstance(value, Paths):
        return Paths(value.rows, runs=value.runs)
    return domain.default(eqn, value)


@rule("complex")
def _complex(domain: Semantics, eqn: Equation, real: Operand, imaginary: Operand) -> Result:
    """The sum of one part and i times the other, with |i| = 1."""
    if not isinstance(real, Paths) and not isinstance(imaginary, Paths):
        return domain.default(eqn, real, imaginary)
    parts = [as_paths(domain, eqn, v).sums for v in (real, imaginary) if not is_zero(v)]
    return Paths(scaled.add(parts)) if len(parts) > 1 else Paths(parts[0])


@rule("sign")
def _sign(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Paths):
        return Sign((-1.0, 0.0, 1.0), frozenset(multiples_of(value)))
    return domain.default(eqn, value)


_COMPARISONS = {"gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal}
_COMPARISONS |= {"eq": np.equal, "ne": np.not_equal}


@rule(*_COMPARISONS)
def _compare(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    if not isinstance(left, Paths) and not isinstance(right, Paths):
        return domain.default(eqn, left, right)
    test = _COMPARISONS[eqn.name]
    if isinstance(left, Paths) and is_zero(right):
        return Sign(tuple(bool(test(s, 0)) for s in (-1, 0, 1)), frozenset(multiples_of(left)))  # type: ignore[arg-type]
    if isinstance(right, Paths) and is_zero(left):
        return Sign(tuple(bool(test(0, s)) for s in (-1, 0, 1)), frozenset(multiples_of(right)))  # type: ignore[arg-type]
    return Opaque(
        eqn.refuse(
            THEORY,
            "a comparison with anything but 0 sets a threshold that does not scale with the "
            "value, so what it selects is not positively homogeneous.",
            "compare with 0, or use max, which needs no comparison.",
        )
    )


@rule("select_n")
def _select(domain: Semantics, eqn: Equation, which: Operand, *cases: Operand) -> Result:
    if not isinstance(which, Value):
        return assemble(lambda n: range(1, n))(domain, eqn, which, *cases)
    if isinstance(which, Weight):
        if any(isinstance(v, Paths | Sign) for v in cases):
            raise not_homogeneous(eqn, "which element is selected depends on the parameters; ")
        return derived(eqn, [which, *cases])
    if not isinstance(which, Sign):
        raise not_homogeneous(eqn)
    if not any(isinstance(v, Paths | Weight) for v in cases):
        return of_signs(eqn, [which, *cases])
    reached = [cases[int(np.ravel(which.branches[i])[0])] for i in (0, 2)]
    uniform = all(np.size(b) == 1 or np.unique(np.asarray(b)).size == 1 for b in which.branches)
    reached = reached if uniform else list(cases)
    data = [v for v in reached if isinstance(v, Paths)]
    shared = [
        key
        for key in (data and multiples_of(data[0]) or {})
        if key in which.bases and all(key in multiples_of(v) for v in data)
    ]
    if not shared or not all(isinstance(v, Paths) or is_zero(v) for v in reached):
        raise eqn.refuse(
            THEORY,
            "the selected values are not multiples of the one value whose sign selects, so the "
            "result is not provably a gate.",
            "write a gate as where(x > 0, x, a * x), relu(x) or max(x, y).",
            what="`select_n` (where) by a condition on x",
        )
    return gate(shared[0], data)


@rule("clamp")
def _clamp(domain: Semantics, eqn: Equation, low: Operand, value: Operand, high: Operand) -> Result:
    if not any(isinstance(v, Paths | Sign) for v in (low, value, high)):
        return derived(eqn, [low, value, high])
    one_sided = (
        (is_zero(low) and np.all(np.isposinf(np.asarray(high)))) if is_concrete(high) else False
    )
    if isinstance(value, Paths) and one_sided:
        return Paths(value.rows, runs=value.runs)
    raise eqn.refuse(
        THEORY, f"clipping to bounds other than [0, ∞) saturates; {HOMOGENEITY}", REMEDY
    )


# --- pooling by maximum: any element of the window may be the active path -------------


def _as_sum(function: Callable, primitive: Primitive) -> Callable:
    def apply(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
        if not isinstance(value, Paths):
            return domain.default(eqn, value)
        return function(eqn._replace(primitive=primitive), value)

    return apply


rule("reduce_max", "reduce_min")(_as_sum(summed, lax.reduce_sum_p))
rule("reduce_window_max", "reduce_window_min")(_as_sum(summed_in_windows, lax.reduce_window_sum_p))
rule("cummax", "cummin")(_as_sum(accumulated, lax.cumsum_p))


@rule("scatter_max", "scatter_min")
def _scatter_extremum(
    domain: Semantics, eqn: Equation, target: Operand, index: Operand, update: Operand
) -> Result:
    if isinstance(index, Value):
        raise indexed(eqn)
    if not isinstance(target, Paths) and not isinstance(update, Paths):
        return domain.default(eqn, target, index, update)
    never = -np.inf if eqn.name == "scatter-max" else np.inf  # is never the one that is taken
    parts = []
    for value in (target, update):
        if isinstance(value, Paths):
            parts.append(value.sums)
        elif is_concrete(value) and np.isin(np.asarray(value), (0, never)).all():
            parts.append(domain.power(np.zeros(np.shape(value))))
        else:
            raise _threshold(eqn)
    (into, arriving), exponent = scaled.align([scaled.level(s) for s in parts])
    sums = scattered(lax.scatter_add, eqn, [into, index, arriving])
    return Paths(scaled.normalize(Scaled(sums, exponent)))


@rule("sort")
def _sort(domain: Semantics, eqn: Equation, *values: Operand) -> Result:
    if len(values) > 1:
        return domain.default(eqn, *values)
    if not isinstance(values[0], Paths):
        return domain.default(eqn, *values)
    total = scaled.summed(values[0].sums, [eqn.params["dimension"]], keepdims=True)
    return [Paths(_spread(total, eqn.outputs[0].shape))]


def _spread(total: Scaled, shape: Sequence[int]) -> Scaled:
    return Scaled(jnp.broadcast_to(total.mantissa, shape), total.exponent)


@rule("top_k")
def _top_k(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    if not isinstance(value, Paths):
        return domain.default(eqn, value)
    sums = value.sums
    axis = eqn.params.get("axis", -1) % sums.mantissa.ndim
    total = scaled.summed(sums, [axis], keepdims=True)
    values = Paths(_spread(total, eqn.outputs[0].shape))
    positions = eqn.refuse(
        THEORY, "positions are integers, not sums over paths.", "use the values, not the positions."
    )
    return [values, Opaque(positions)]
