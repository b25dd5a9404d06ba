"""What turns a preconditioner into an optimizer: momentum and a learning rate."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import optax

from jaxinv.errors import InvalidInput
from jaxinv.typing import ArrayLike


def descent(
    precondition: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    """−learning_rate times the preconditioned gradient, or a decaying sum of these."""
    _check_learning_rate(learning_rate)
    accumulate = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    chained = optax.chain(precondition, accumulate, optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(chained)


def _check_learning_rate(rate: ArrayLike | Callable[[ArrayLike], ArrayLike]) -> None:
    """Raise `InvalidInput` unless this is a number, known now or traced, or a schedule."""
    if callable(rate) or isinstance(rate, jax.core.Tracer):
        return
    if isinstance(rate, str | bytes) or np.ndim(rate) or not np.isreal(rate):
        raise InvalidInput(f"learning_rate must be a number or a schedule, not {rate!r}.")
