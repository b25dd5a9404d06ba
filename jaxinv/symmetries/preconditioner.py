"""Descent that does not depend on where on the orbit of its matrix symmetries a network is."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

from jaxinv import _checks
from jaxinv._numerics.scaled import working_dtype
from jaxinv.errors import InvalidInput
from jaxinv.frames.follow import Place
from jaxinv.rescaling.action import checked_leaves
from jaxinv.symmetries.group import SymmetryGroup
from jaxinv.symmetries.metrics import ROTATIONS, applied, metrics, pseudo_inverses
from jaxinv.typing import Array, Params, PyTree


def scale_by_matrix_symmetries(
    group: SymmetryGroup, *, damping: float = 0.0
) -> optax.GradientTransformation:
    """Precondition gradients so that steps commute with the matrix symmetries of the network.

    Where a class of GL(n) acts by M on weights W and by M⁻ᵀ on weights V,

        u_W = (Σ V·Vᵀ)⁻¹ ∂L/∂W        u_V = (Σ W·Wᵀ)⁻¹ ∂L/∂V

    along the axes on which it acts. Then (W, V) and (M·W, M⁻ᵀ·V), the same function, take the same
    step: u turns as the weights do. Low-rank adapters are the case W = Bᵀ, V = A: each factor is
    preconditioned by the Gram matrix of the other one. Rotations need nothing, plain gradients
    turn with them. Leaves without a class keep their gradient.

    Args:
        group: as `symmetry_group(fn, params, x)` returns it.
        damping: λ ≥ 0; Gram matrices get λ·trace/n on the diagonal. 0 is invariant; more is not.

    Returns:
        An `optax.GradientTransformation` without state, for `optax.chain`; `update` needs params.
        Momentum after it is invariant too. Gram matrices are inverted on their range: a factor that
        is zero, as in a new adapter, gives a step of zero to what it multiplies.

    Raises:
        InvalidInput: for a damping that is not a number ≥ 0; at `update`, without params, or for
            params that do not fit the group.

    Notes:
        A layer wider than what it connects has singular Gram matrices, whose inverses on their
        range do not turn with them: there steps are not invariant. A gain that could as well be
        part of the weights behind it (RMSNorm's) has no slope of its own, and stays. Classes have n
        ≥ 2: GL(1), as of an adapter of rank one, is a rescaling, for which there is Path-SGD. Where
        a weight has a class on one axis and ReLU units on another, steps depend on how those units
        are scaled.

    References:
        Mishra, Apuroop, Sepulchre, "A Riemannian geometry for low-rank matrix completion" (2012,
        arXiv:1211.1550), for two factors; Zhang, Pilanci, "Riemannian preconditioned LoRA", ICML
        2024 (arXiv:2402.02347), for adapters.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv.symmetries import scale_by_matrix_symmetries, symmetry_group
        >>> frozen, x = jnp.eye(4), jnp.eye(4)
        >>> def fn(w, x):
        ...     return x @ (frozen + w["B"] @ w["A"])
        >>> w = {"A": jnp.eye(2, 4) * 2, "B": jnp.ones((4, 2))}
        >>> group = symmetry_group(fn, w, x)
        >>> tx = optax.chain(scale_by_matrix_symmetries(group), optax.scale(-0.1))
        >>> gradient = {"A": jnp.ones((2, 4)), "B": jnp.ones((4, 2))}
        >>> updates, _ = tx.update(gradient, tx.init(w), w)
        >>> print(updates["B"][0])  # −0.1·∂L/∂B·(A·Aᵀ)⁻¹, with A·Aᵀ = 4
        [-0.025 -0.025]
    """
    damping = _checks.real("damping", damping, lambda t: 0 <= t < float("inf"), "a number >= 0")

    def init_fn(params: Params) -> optax.EmptyState:
        checked_leaves(group.rescaling, params, "params")
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        leaves = checked_leaves(group.rescaling, params, "params")
        _checks.check_like(updates, params, "updates")
        return _preconditioned(group, leaves, updates, damping), state

    return optax.GradientTransformation(init_fn, update_fn)


def _preconditioned(
    group: SymmetryGroup, leaves: list[Array], updates: PyTree, damping: float
) -> PyTree:
    dtype = working_dtype(leaves)
    w = [jnp.asarray(leaf).astype(dtype) for leaf in leaves]
    given, tree = jax.tree.flatten(updates)
    new = [jnp.asarray(g).astype(dtype) for g in given]
    seen = [place for c in group.classes for place in c.places if place.relation.gains]
    for place in seen:
        new = _slopes_of_gains(place, w, new)
    found = metrics(group, w)
    turning = {i for i, c in enumerate(group.classes) if c.kind in ROTATIONS}
    wanted = [i for i in range(len(found)) if i not in turning]
    there = {(i, d): X for i in wanted for d, X in enumerate(found[i]) if X is not None}
    inverses = dict(zip(there, pseudo_inverses(list(there.values()), damping), strict=True))
    for i, c in enumerate(group.classes):
        for place in c.places:
            dual = place.relation.dual
            B = inverses.get((i, not dual), there.get((i, dual)))
            if i in turning:
                B = jnp.eye(c.size, dtype=dtype) if place.relation.gains else None
            if B is not None:
                new[place.leaf] = applied(B, place, w, group.constants, new[place.leaf], -1)
    for place in seen:
        new = _following_gains(place, w, new)
    new = [u.astype(jnp.asarray(g).dtype) for u, g in zip(new, given, strict=True)]
    return jax.tree.unflatten(tree, new)


# Where a matrix is seen through gains g, W = T(g)·W̃, it is W̃ that turns. Gradients and steps are
# those in g and W̃: the slope of a gain is that at fixed W̃, and W follows the step of the gain.


def _gains(place: Place, w: list[Array]) -> Iterator[tuple[int, slice, int | float, list[int]]]:
    for v, power in place.relation.gains:
        if v.source >= 0:
            start, stop = place.box[place.axis]
            rest = [a for a in range(w[place.leaf].ndim) if a != place.axis]
            exponent = int(power) if power.denominator == 1 else float(power)
            yield v.source, slice(v.offset, v.offset + stop - start), exponent, rest


def _slopes_of_gains(place: Place, w: list[Array], slopes: list[Array]) -> list[Array]:
    """Slopes of gains at fixed W̃: ∂L/∂g + power·Σ W·∂L/∂W / g."""
    box = tuple(slice(*ends) for ends in place.box)
    new = list(slopes)
    for source, where, power, rest in _gains(place, w):
        meeting = jnp.sum(w[place.leaf][box] * slopes[place.leaf][box], axis=tuple(rest))
        flat = new[source].reshape(-1)
        more = power * meeting / w[source].reshape(-1)[where]
        new[source] = flat.at[where].add(more).reshape(new[source].shape)
    return new


def _following_gains(place: Place, w: list[Array], steps: list[Array]) -> list[Array]:
    """Steps of W = T·W̃ when gains take a step too: T·ΔW̃ + power·W·Δg/g."""
    box = tuple(slice(*ends) for ends in place.box)
    new = list(steps)
    for source, where, power, rest in _gains(place, w):
        ratio = (steps[source].reshape(-1) / w[source].reshape(-1))[where]
        part = w[place.leaf][box] * jnp.expand_dims(power * ratio, rest)
        new[place.leaf] = new[place.leaf].at[box].add(part)
    return new


_NEEDS_PARAMS = (
    "The matrix symmetries need the parameters: Gram matrices are functions of the weights. Call "
    "update(gradients, state, params)."
)
