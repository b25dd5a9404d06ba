"""Updates of the size of the gradient, so that a learning rate carries over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinv._checks import check_start
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.typing import Array, DTypeLike, Params, PyTree


@dataclasses.dataclass(frozen=True)
class ScaledUpdate:
    """The `update` of a transformation whose results are known as mantissas and exponents.

    A quotient by κ may leave the range of floats where a multiple of it does not. What multiplies
    updates calls `scaled` and rounds to floats afterwards; everybody else gets plain arrays.
    """

    scaled: Callable[..., tuple[PyTree, optax.OptState]]  # leaves of the updates are Scaled

    def __call__(
        self,
        updates: PyTree,
        state: optax.OptState,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, optax.OptState]:
        """The updates as plain arrays."""
        found, state = self.scaled(updates, state, params, **extra_args)
        return jax.tree.map(lambda g, u: scaled.value(u).astype(g.dtype), updates, found), state


class MatchGradientNormState(NamedTuple):
    """State of `match_gradient_norm`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxinv.optimizers import match_gradient_norm
        >>> match_gradient_norm(optax.scale_by_adam()).init(jnp.ones(2)).gain.item()
        1.0
    """

    count: Array  # type: ignore[assignment]  # int32 scalar: updates so far
    gain: Array  # float scalar: the factor is gain · 2^gain_exponent; 1 before the first update
    gain_exponent: Array  # int32 scalar
    inner_state: optax.OptState


def match_gradient_norm(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Scale all updates by the one factor that gives the first the norm of the first gradient.

    A learning rate of SGD then carries over to a preconditioned gradient.

    Args:
        inner: any gradient transformation without a learning rate, such as `scale_by_path_kappa`.

    Returns:
        The same transformation, its updates multiplied by ‖g₀‖ / ‖u₀‖; by 1 if either norm is 0.
        Inside `optax.masked` or `optax.partition` the norms are those of the unmasked leaves.

    Raises:
        InvalidInput: at `init`, if the parameters are not floating point.

    Notes:
        The factor depends on the start: trajectories of Path-SGD from two points of an orbit then
        differ in their learning rate.

        Updates of `scale_by_path_kappa` and `scale_by_data_dependent_path_kappa` are multiplied
        before they are rounded to floats, so that a κ beyond the range of float32 does no harm.
        That is so if one of them is `inner` itself, and not a part of a chain.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxinv.optimizers import match_gradient_norm, scale_by_path_kappa
        >>> def net(w, x):
        ...     return x @ w[0] @ w[1]
        >>> w = [jnp.array([[2.0]]), jnp.array([[10.0]])]
        >>> core = match_gradient_norm(scale_by_path_kappa(net, jnp.zeros((1, 1))))
        >>> tx = optax.chain(core, optax.trace(0.9), optax.scale_by_learning_rate(0.1))
        >>> gradients = [jnp.array([[30.0]]), jnp.array([[1.6]])]
        >>> updates, _ = tx.update(gradients, tx.init(w), w)
        >>> print(f"{optax.tree.norm(updates) / optax.tree.norm(gradients):.4f}")
        0.1000
    """
    scaled_update = _scaled_update(inner)

    def init_fn(params: Params) -> MatchGradientNormState:
        check_start(params)
        return MatchGradientNormState(
            count=jnp.zeros((), jnp.int32),
            gain=jnp.ones((), scaled.working_dtype(jax.tree.leaves(params))),
            gain_exponent=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: PyTree,
        state: MatchGradientNormState,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, MatchGradientNormState]:
        found, inner_state = scaled_update(updates, state.inner_state, params, **extra_args)
        gain = jax.lax.cond(
            state.count == 0,
            lambda: _gain(updates, found, state.gain.dtype),
            lambda: Scaled(state.gain, state.gain_exponent),
        )
        matched = jax.tree.map(
            lambda g, u: scaled.value(scaled.multiply(u, gain)).astype(g.dtype), updates, found
        )
        count = optax.safe_increment(state.count)
        return matched, MatchGradientNormState(count, gain.mantissa, gain.exponent, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled_update(
    inner: optax.GradientTransformation,
) -> Callable[..., tuple[PyTree, optax.OptState]]:
    """The update of any transformation, with leaves that are `Scaled`."""
    if isinstance(inner.update, ScaledUpdate):
        return inner.update.scaled
    update = optax.with_extra_args_support(inner).update

    def scaled_update(
        updates: PyTree, state: optax.OptState, params: Params | None, **extra_args: object
    ) -> tuple[PyTree, optax.OptState]:
        found, state = update(updates, state, params, **extra_args)
        zero = jnp.zeros((), jnp.int32)
        dtype = scaled.working_dtype(jax.tree.leaves(updates))
        return jax.tree.map(lambda u: Scaled(u.astype(dtype), zero), found), state

    return scaled_update


def _gain(updates: PyTree, found: PyTree, dtype: DTypeLike) -> Scaled:
    """‖gradient‖ / ‖update‖; 1 if either is zero."""
    gradients = [g.astype(dtype) for g in jax.tree.leaves(updates)]
    parts = jax.tree.leaves(found, is_leaf=lambda s: isinstance(s, Scaled))
    if not parts:  # all of them masked
        return Scaled(jnp.ones((), dtype), jnp.zeros((), jnp.int32))
    mantissas, exponent = scaled.align([scaled.shared(s) for s in parts])
    above, below = scaled.norm(gradients), scaled.norm(mantissas)
    fine = (above > 0) & (below > 0)
    gain = jnp.where(fine, above / jnp.where(fine, below, 1), 1).astype(dtype)
    return Scaled(gain, jnp.where(fine, -exponent, 0))
