"""Dividing gradients by a power of κ, whatever κ is: what Path-SGD and its relatives share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._checks import check_exponent, check_like, check_start, integer
from jaxinv._numerics import scaled as _scaled
from jaxinv._numerics.compiling import compiled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.optimizers.masking import is_masked
from jaxinv.optimizers.matching import ScaledUpdate
from jaxinv.typing import Array, ArrayLike, Inputs, Params, PyTree

# Stored κ share one exponent. The largest sits at 2^HEADROOM, so that float32 holds κ's down to
# about 2^-226 of the largest before they are lost to underflow.
_HEADROOM = 100


class ScaleByPathKappaState(NamedTuple):
    """State of `scale_by_path_kappa`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import scale_by_path_kappa
        >>> tx = scale_by_path_kappa(lambda w, x: x @ w, jnp.zeros((1, 2)))
        >>> tx.init(jnp.ones((2, 1))).count.item()
        0
    """

    count: Array  # type: ignore[assignment]  # int32 scalar: updates so far
    kappa: PyTree  # like params, float32 or float64; () unless every > 1
    exponent: Array  # int32 scalar: κ = kappa · 2^exponent


def scale_by(
    kappas_of: Callable[[Params, Array, Inputs | None], list[Scaled]],
    p: float,
    every: int,
    eps: float,
    zero_kappa: str,
) -> optax.GradientTransformationExtraArgs:
    """Divide gradients by κ^{2/p}, with κ of (parameters, number of the update, batch)."""

    def init_fn(params: Params) -> ScaleByPathKappaState:
        check_start(params)
        kappa: PyTree = ()
        if every > 1:
            dtype = _scaled.working_dtype(jax.tree.leaves(params))
            kappa = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), dtype), params)
        # Apart, so that the state can be donated.
        count, exponent = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return ScaleByPathKappaState(count, kappa, exponent)

    def scaled_update(
        updates: PyTree,
        state: ScaleByPathKappaState,
        params: Params | None = None,
        *,
        batch: Inputs | None = None,
        full_params: Params | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, ScaleByPathKappaState]:
        del extra_args
        whole = _all_params(params, full_params)
        check_like(updates, whole, "updates")

        def fresh() -> PyTree:
            kappas = kappas_of(whole, state.count, batch)
            kappas = jax.tree.unflatten(jax.tree.structure(whole), kappas)
            return jax.tree.map(
                lambda u, s: u if is_masked(u) else s, updates, kappas, is_leaf=is_masked
            )

        kappa, exponent = state.kappa, state.exponent
        if every == 1:
            kappas = fresh()
        else:

            def refresh() -> tuple[PyTree, Array]:
                return _share_exponent(fresh(), updates)

            kappa, exponent = jax.lax.cond(
                state.count % every == 0, refresh, lambda: (state.kappa, state.exponent)
            )
            kappas = jax.tree.map(lambda k: Scaled(k, exponent), kappa)
        found = jax.tree.map(lambda u, s: _divide(u, s, p, eps, zero_kappa), updates, kappas)
        count = optax.safe_increment(state.count)
        return found, ScaleByPathKappaState(count, kappa, exponent)

    return optax.GradientTransformationExtraArgs(init_fn, ScaledUpdate(scaled_update))


def check_options(p: object, every: object, zero_kappa: object) -> None:
    check_exponent(p)
    integer("every", every, 1)
    if zero_kappa not in ("freeze", "pass"):
        raise InvalidInput(f"zero_kappa must be 'freeze' or 'pass', not {zero_kappa!r}.")


def _all_params(params: Params | None, full_params: Params | None) -> Params:
    whole = params if full_params is None else full_params
    if whole is None:
        raise InvalidInput(
            "Path-SGD needs the parameters: κ is a function of all weights. "
            "Call update(gradients, state, params)."
        )
    if any(map(is_masked, jax.tree.leaves(whole, is_leaf=is_masked))):
        raise InvalidInput(
            "Some parameters are masked (by optax.masked or optax.partition), but κ of a weight "
            "depends on all of them. Wrap the whole optimizer in jaxinv.pass_full_params(...)."
        )
    return whole


def _share_exponent(kappas: PyTree, updates: PyTree) -> tuple[PyTree, Array]:
    """κ of all leaves over one exponent, for storage."""
    parts = jax.tree.leaves(kappas, is_leaf=lambda s: isinstance(s, Scaled))
    _, top = _scaled.align([_scaled.shared(s) for s in parts])
    exponent = top - _HEADROOM
    shifted = [_stored(s, exponent) for s in parts]
    return jax.tree.unflatten(jax.tree.structure(updates), shifted), exponent


def _stored(s: Scaled, exponent: Array) -> Array:
    """κ / 2^exponent; NaN, not 0, where that is too small to be held."""
    numbers = _scaled.shift(s.mantissa, s.exponent - exponent)
    return jnp.where((numbers == 0) & (s.mantissa != 0), jnp.nan, numbers)


def _divide(gradient: Array, kappa: Scaled, p: float, eps: ArrayLike, zero_kappa: str) -> Scaled:
    """gradient / (κ^{2/p} + eps), with the policy for κ = 0, as mantissas and their exponents."""
    if isinstance(eps, jax.Array | np.ndarray):  # a hyperparameter
        return _divided(gradient, kappa, p, eps, zero_kappa)
    return _divided_at_once(gradient, kappa, p, eps, zero_kappa)


def _divided(gradient: Array, kappa: Scaled, p: float, eps: ArrayLike, zero_kappa: str) -> Scaled:
    dtype = kappa.mantissa.dtype
    g, zero = gradient.astype(dtype), jnp.zeros((), jnp.int32)
    root = _scaled.root_squared(kappa, p)
    if not (isinstance(eps, int | float) and eps == 0):
        root = _scaled.add([root, Scaled(jnp.full((), eps, dtype), zero)])
    mantissa, exponent = root
    # An infinite or NaN κ must show in the update: g/inf would be a silent 0.
    fine = jnp.isfinite(mantissa)
    present = kappa.mantissa != 0
    quotient, own = _scaled.quotient(g, jnp.where(present & fine, mantissa, 1))
    quotient = jnp.where(fine, jnp.where(present, quotient, 0), jnp.nan)
    if zero_kappa == "pass":
        return Scaled(jnp.where(present, quotient, g), jnp.where(present, own - exponent, 0))
    return Scaled(quotient, own - exponent)


# Outside of a caller's `jax.jit` every operation would be a program, and compiled alone.
_divided_at_once = compiled(_divided, static_argnums=(2, 3, 4))
