"""What turns a preconditioner into an optimizer: momentum and a learning rate."""

from __future__ import annotations

import optax


def descent(
    precondition: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    """−learning_rate times the preconditioned gradient, or a decaying sum of these."""
    accumulate = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    chained = optax.chain(precondition, accumulate, optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(chained)
