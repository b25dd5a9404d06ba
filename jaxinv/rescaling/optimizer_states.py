"""Which power of d = exp(Bu) every field of an optax state carries.

A gradient at the rescaled point is divided by d. From there on the power is a matter of bookkeeping
along the chain: momentum carries the power of what it accumulates, second moments twice that,
Adam's quotient none, and dividing a gradient by κ (which is divided by d²) leaves an update that is
multiplied by d, as the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinv.errors import InvalidInput


class _Kind(NamedTuple):
    """Powers of the fields of one state class, and of what its transformation passes on."""

    multiples: dict[str, int]  # field: how many times the power of the incoming update
    fixed: dict[str, int]  # field: its power, whatever comes in
    out: Callable[[Any], Any]  # power of the outgoing update


def _same(power: Any) -> Any:
    return power


def _none(power: Any) -> int:
    return 0


_FIRST_AND_SECOND = _Kind({"mu": 1, "nu": 2, "nu_max": 2}, {}, _none)
_KINDS = {
    "TraceState": _Kind({"trace": 1}, {}, _same),
    "EmaState": _Kind({"ema": 1}, {}, _same),
    "ScaleByOptimisticGradientState": _Kind({"previous_gradient": 1}, {}, _same),
    "ScaleByRssState": _Kind({"sum_of_squares": 2}, {}, _none),
    "ScaleByRmsState": _FIRST_AND_SECOND,
    "ScaleByRmsWithCountState": _FIRST_AND_SECOND,
    "ScaleByRStdDevState": _FIRST_AND_SECOND,
    "ScaleByRStdDevWithCountState": _FIRST_AND_SECOND,
    "ScaleByAdamState": _FIRST_AND_SECOND,
    "ScaleByAmsgradState": _FIRST_AND_SECOND,
    "ScaleByBeliefState": _FIRST_AND_SECOND,
    "ScaleByLionState": _FIRST_AND_SECOND,
    "ScaleByAdemamixState": _Kind({"m1": 1, "m2": 1, "nu": 2}, {}, _none),
    "MultiStepsState": _Kind({"acc_grads": 1}, {}, _same),
    "ScheduleFreeState": _Kind({}, {"z": 1}, _same),
    # κ of the squared path norm; other p are for the caller to say.
    "ScaleByPathKappaState": _Kind({}, {"kappa": -2}, lambda power: power + 2),
}
# Fields that hold the state of another transformation, which sees the same updates.
_INNER = ("inner_state", "inner_states", "inner_opt_state", "base_optimizer_state")


def transport(
    state: Any,
    act: Callable[[Any, int], Any],
    is_params: Callable[[Any], bool],
    powers: Mapping[str, int],
    power: Any,
) -> tuple[Any, Any]:
    """(the state with every params-like field multiplied by its power of d, power passed on)."""
    if isinstance(state, dict):
        moved = {k: transport(v, act, is_params, powers, power) for k, v in state.items()}
        outs = {out for _, out in moved.values()}
        return {k: v for k, (v, _) in moved.items()}, outs.pop() if len(outs) == 1 else None
    if isinstance(state, tuple) and not hasattr(state, "_fields"):  # a chain
        parts = []
        for part in state:
            part, power = transport(part, act, is_params, powers, power)
            parts.append(part)
        return tuple(parts), power
    if not hasattr(state, "_fields"):
        if is_params(state):
            raise InvalidInput(
                "The optimizer state holds an array or pytree like params outside any NamedTuple, "
                "so its meaning cannot be told. Rescale it by hand with jaxinv.rescale."
            )
        return state, power
    name = type(state).__name__
    kind = _KINDS.get(name, _Kind({}, {}, _same))
    fields, out = {}, kind.out(power) if power is not None else None
    for field in state._fields:
        value, key = getattr(state, field), f"{name}.{field}"
        if key in powers:
            value = act(value, powers[key])
        elif field in _INNER:
            value, out = transport(value, act, is_params, powers, power)
        elif field in kind.fixed:
            value = act(value, kind.fixed[field]) if is_params(value) else value
        elif field in kind.multiples:
            if power is None:
                raise InvalidInput(
                    f"{key}: the updates that it accumulates come from transformations with "
                    f"different powers of the rescaling. Pass powers={{'{key}': ...}}."
                )
            value = act(value, kind.multiples[field] * power)
        elif is_params(value):
            raise InvalidInput(
                f"The power of the rescaling that {key} carries is not known. Pass "
                f"powers={{'{key}': k}}: the field is multiplied by d^k for parameters multiplied "
                "by d (a gradient has k = -1, its square -2, an update of the parameters 1)."
            )
        fields[field] = value
    if name in powers:
        out = powers[name]
    return state._replace(**fields), out


def like(tree: Any, shapes: tuple[tuple[int, ...], ...]) -> Callable[[Any], bool]:
    """A test for pytrees with the structure and shapes of the parameters, masked leaves allowed."""

    def matches(value: Any) -> bool:
        leaves, structure = jax.tree.flatten(value, is_leaf=is_masked)
        if structure != tree:
            return False
        return any(not is_masked(leaf) for leaf in leaves) and all(
            is_masked(leaf) or jnp.shape(leaf) == shape
            for leaf, shape in zip(leaves, shapes, strict=True)
        )

    return matches


def is_masked(value: Any) -> bool:
    """Whether optax put a placeholder here."""
    return isinstance(value, optax.MaskedNode)
