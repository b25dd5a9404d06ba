"""Where an axis of an operand is in the result: unit c of a layer sees slice c of its weights.

`follow` answers for one axis of one operand of an operation. None means that elements of that axis
are mixed, moved or dropped, so that nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxinv._interpreter.walk import Equation

# Elementwise and smooth: a derivative exists wherever the function is defined.
SMOOTH = frozenset(
    "add sub mul div neg exp exp2 log log1p expm1 tanh logistic sin cos tan asin acos atan sinh "
    "cosh asinh acosh atanh atan2 erf erfc erf_inv sqrt rsqrt cbrt pow integer_pow square lgamma "
    "digamma add_any convert_element_type real imag copy_p copy".split()
)
# Elementwise, with operands of one shape (or scalars).
ELEMENTWISE = SMOOTH | frozenset(
    "max min abs sign floor ceil round select_n clamp eq ne gt ge lt le and or not xor is_finite "
    "stop_gradient".split()
)
# Linear in each operand, or moves of elements.
LINEAR = frozenset(
    "dot_general conv_general_dilated reduce_sum cumsum reduce_window_sum reshape transpose "
    "squeeze expand_dims broadcast_in_dim concatenate pad slice rev dynamic_slice gather scatter "
    "scatter-add scatter_add dynamic_update_slice split reduce_prod cumprod stop_gradient "
    "optimization_barrier".split()
)
MOVES = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev convert_element_type "
    "stop_gradient copy copy_p".split()
)


def follow(eqn: Equation, operand: int, axis: int, output: int = 0) -> int | None:
    """The axis of the result whose element c depends on element c of an operand's axis alone.

    >>> import jax, jax.numpy as jnp
    >>> from jaxinv._interpreter.walk import equation
    >>> product = jax.make_jaxpr(lambda a, w: a @ w)(jnp.ones((5, 3)), jnp.ones((3, 4))).eqns[0]
    >>> follow(equation(product), 1, 1), follow(equation(product), 1, 0)
    (1, None)
    """
    shape = eqn.inputs[operand].shape
    if not shape:
        return None
    if eqn.name in ELEMENTWISE:
        out = eqn.outputs[0].shape
        return axis if len(out) == len(shape) and out[axis] == shape[axis] else None
    rule = _RULES.get(eqn.name)
    return rule(eqn, operand, axis) if rule else None


def _transpose(eqn: Equation, operand: int, axis: int) -> int | None:
    return list(eqn.params["permutation"]).index(axis)


def _reshape(eqn: Equation, operand: int, axis: int) -> int | None:
    before, after = eqn.inputs[0].shape, eqn.outputs[0].shape
    start = int(np.prod(before[:axis]))
    for i, size in enumerate(after):
        if size == before[axis] and int(np.prod(after[:i])) == start:
            return i
    return None


def _broadcast(eqn: Equation, operand: int, axis: int) -> int | None:
    where = eqn.params["broadcast_dimensions"][axis]
    same = eqn.outputs[0].shape[where] == eqn.inputs[0].shape[axis]
    return int(where) if same else None


def _squeeze(eqn: Equation, operand: int, axis: int) -> int | None:
    gone = eqn.params["dimensions"]
    return None if axis in gone else axis - sum(g < axis for g in gone)


def _expand(eqn: Equation, operand: int, axis: int) -> int | None:
    new = eqn.params["dimensions"]
    return [i for i in range(len(eqn.outputs[0].shape)) if i not in new][axis]


def _reduce(eqn: Equation, operand: int, axis: int) -> int | None:
    gone = eqn.params["axes"]
    return None if axis in gone else axis - sum(g < axis for g in gone)


def _along(eqn: Equation, operand: int, axis: int) -> int | None:
    """Operations along one axis: cumulative sums, concatenations."""
    return None if axis == eqn.params.get("axis", eqn.params.get("dimension")) else axis


def _reversed(eqn: Equation, operand: int, axis: int) -> int | None:
    return None if axis in eqn.params["dimensions"] else axis


def _same_length(eqn: Equation, operand: int, axis: int) -> int | None:
    """Slices and pads: an axis that is left whole."""
    p, n = eqn.params, eqn.inputs[0].shape[axis]
    if operand:
        return None
    if eqn.name == "slice":
        steps = p["strides"]
        whole = p["start_indices"][axis] == 0 and p["limit_indices"][axis] == n
        return axis if whole and (steps is None or steps[axis] == 1) else None
    return axis if tuple(p["padding_config"][axis]) == (0, 0, 0) else None


def _window(eqn: Equation, operand: int, axis: int) -> int | None:
    p = eqn.params
    apart = p["window_dimensions"][axis] == 1 and p["window_strides"][axis] == 1
    apart = apart and tuple(p["padding"][axis]) == (0, 0) and p["base_dilation"][axis] == 1
    return axis if apart else None


def _dot(eqn: Equation, operand: int, axis: int) -> int | None:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    contracted, batch = ((left, left_batch), (right, right_batch))[operand]
    if axis in contracted:
        return None
    if axis in batch:
        return list(batch).index(axis)
    free = [a for a in range(len(eqn.inputs[operand].shape)) if a not in (*contracted, *batch)]
    others = len(eqn.inputs[0].shape) - len(left) - len(left_batch) if operand else 0
    return len(batch) + others + free.index(axis)


def _conv(eqn: Equation, operand: int, axis: int) -> int | None:
    p = eqn.params
    numbers = p["dimension_numbers"]
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return None
    if operand == 1 and axis == numbers.rhs_spec[0]:
        return int(numbers.out_spec[1])
    if operand == 0 and axis == numbers.lhs_spec[0]:
        return int(numbers.out_spec[0])
    return None


_RULES: dict[str, Callable[[Equation, int, int], int | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_prod": _reduce,
    "cumsum": _along,
    "cumprod": _along,
    "concatenate": _along,
    "rev": _reversed,
    "slice": _same_length,
    "pad": _same_length,
    "reduce_window_sum": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
