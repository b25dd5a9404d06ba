"""Which power of d = exp(Bu) every field of an optax state carries.

A gradient at the rescaled point is divided by d. From there on the power is a matter of bookkeeping
along the chain: momentum carries the power of what it accumulates, second moments twice that,
Adam's quotient none, and dividing a gradient by κ (which is divided by d²) leaves an update that is
multiplied by d, as the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinv.errors import InvalidInput
from jaxinv.typing import PyTree


class _Kind(NamedTuple):
    """Powers of the fields of one state class, and of what its transformation passes on."""

    multiples: dict[str, int]  # field: how many times the power of the incoming update
    fixed: dict[str, int]  # field: its power, whatever comes in
    out: Callable[[int], int]  # power of the outgoing update


def _same(power: int) -> int:
    return power


def _none(power: int) -> int:
    return 0


_FIRST_AND_SECOND = _Kind({"mu": 1, "nu": 2, "nu_max": 2}, {}, _none)
_UNKNOWN = _Kind({}, {}, _same)
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
    state: optax.OptState,
    act: Callable[[PyTree, int], PyTree],
    is_params: Callable[[object], bool],
    powers: Mapping[str, int],
    power: int,
) -> tuple[optax.OptState, int | None]:
    """(the state with every params-like field multiplied by its power of d, power passed on)."""
    return _Transport(act, is_params, powers).of(state, power)


class _Transport(NamedTuple):
    act: Callable[[PyTree, int], PyTree]
    is_params: Callable[[object], bool]
    powers: Mapping[str, int]  # those that the caller says

    def of(self, state: optax.OptState, power: int | None) -> tuple[optax.OptState, int | None]:
        if isinstance(state, dict):
            return self.of_mapping(state, power)
        if hasattr(state, "_fields"):
            return self.of_fields(state, power)
        if isinstance(state, tuple):
            return self.of_chain(state, power)
        if self.is_params(state):
            raise InvalidInput(
                "The optimizer state holds an array or pytree like params outside any NamedTuple, "
                "so its meaning cannot be told. Rescale it by hand with jaxinv.rescale."
            )
        return state, power

    def of_mapping(
        self, states: dict[Hashable, optax.OptState], power: int | None
    ) -> tuple[dict, int | None]:
        """States side by side, each of some of the parameters."""
        moved = {key: self.of(state, power) for key, state in states.items()}
        outs = {out for _, out in moved.values()}
        passed_on = outs.pop() if len(outs) == 1 else None
        return {key: state for key, (state, _) in moved.items()}, passed_on

    def of_chain(
        self, states: tuple[optax.OptState, ...], power: int | None
    ) -> tuple[tuple, int | None]:
        """States one after another: what one passes on is what the next sees."""
        moved = []
        for state in states:
            state, power = self.of(state, power)
            moved.append(state)
        return tuple(moved), power

    def of_fields(
        self, state: optax.OptState, power: int | None
    ) -> tuple[optax.OptState, int | None]:
        """The state of one transformation, maybe with the state of another in a field."""
        name = type(state).__name__
        kind = _KINDS.get(name, _UNKNOWN)
        fields, out = {}, kind.out(power) if power is not None else None
        for field in state._fields:
            value, key = getattr(state, field), f"{name}.{field}"
            if field in _INNER and key not in self.powers:
                fields[field], out = self.of(value, power)
            elif self.is_moved(kind, field, key, value):
                fields[field] = self.act(value, self.power_of(kind, field, key, power))
            else:
                fields[field] = value
        return state._replace(**fields), self.powers.get(name, out)

    def is_moved(self, kind: _Kind, field: str, key: str, value: object) -> bool:
        return key in self.powers or field in kind.multiples or self.is_params(value)

    def power_of(self, kind: _Kind, field: str, key: str, power: int | None) -> int:
        """The power that a field carries where the incoming updates carry `power`."""
        if key in self.powers:
            return self.powers[key]
        if field in kind.fixed:
            return kind.fixed[field]
        if field not in kind.multiples:
            raise InvalidInput(
                f"The power of the rescaling that {key} carries is not known. Pass "
                f"powers={{'{key}': k}}: the field is multiplied by d^k for parameters multiplied "
                "by d (a gradient has k = -1, its square -2, an update of the parameters 1)."
            )
        if power is None:
            raise InvalidInput(
                f"{key}: the updates that it accumulates come from transformations with "
                f"different powers of the rescaling. Pass powers={{'{key}': ...}}."
            )
        return kind.multiples[field] * power


def like(tree: PyTree, shapes: tuple[tuple[int, ...], ...]) -> Callable[[object], bool]:
    """A test for pytrees with the structure and shapes of the parameters, masked leaves allowed."""

    def matches(value: object) -> bool:
        leaves, structure = jax.tree.flatten(value, is_leaf=is_masked)
        if structure != tree:
            return False
        return any(not is_masked(leaf) for leaf in leaves) and all(
            is_masked(leaf) or jnp.shape(leaf) == shape
            for leaf, shape in zip(leaves, shapes, strict=True)
        )

    return matches


def is_masked(value: object) -> bool:
    """Whether optax put a placeholder here."""
    return isinstance(value, optax.MaskedNode)
