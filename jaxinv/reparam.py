"""Training with the rescalings removed: constrained, normalised and gauge-fixed parametrisations.

Of every orbit of a rescaling group one member has hidden units with incoming weights of norm one
(`unit_norm`). The same functions are learnt by

* constrained training: w stays among those members. `project_to_unit_norm` after any optimizer,
  and `tangent_gradient` before it;
* normalised training: v is free, and the network uses v/‖v‖ for each unit (`weight_normalize`);
* gauge-fixed training: w is free, and steps are those taken at its normalised member (`in_gauge`).

All three take the units from the group, so they know dense layers, convolutions and the channels
that residual connections tie together. Where units feed themselves (a residual branch that returns
to its stream, a recurrence), the weights on the way back are not counted among the incoming ones:
they are the ratio of two scales of one loop, which no rescaling changes, so a norm that counts them
cannot always be made one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv import _scaled
from jaxinv.errors import InvalidInput
from jaxinv.gauges import Gauge, default_tolerance
from jaxinv.rescaling import (
    RescalingGroup,
    checked_leaves,
    log_scales,
    rescale,
    rescale_gradient,
    summed_to,
)
from jaxinv.typing import Array, Inputs, Network, Outputs, Params, PyTree

_NEEDS_PARAMS = (
    "This transformation moves the parameters, so it needs them: call "
    "update(gradients, state, params)."
)


# --- the incoming weights of every unit -----------------------------------------------


class _Units(NamedTuple):
    """Which weights are incoming weights of which unit: per leaf (units, mask) or None."""

    leaves: tuple[tuple[np.ndarray, np.ndarray | None] | None, ...]
    dim: int
    depth: int  # no chain of units that feed each other is longer

    def sums(self, leaves: list[Array]) -> Array:
        """Σ over the incoming weights of every unit, (dim,)."""
        # One more slot takes the weights that are incoming weights of no unit.
        totals = jnp.zeros(self.dim + 1, leaves[0].dtype)
        for leaf, found in zip(leaves, self.leaves, strict=True):
            if found is not None:
                units, mask = found
                kept = leaf if mask is None else jnp.where(mask, leaf, 0)
                totals = totals.at[units].add(summed_to(kept, units.shape))
        return totals[:-1]

    def spread(self, u: Array) -> list[Array | None]:
        """u of the unit that each weight leads into, 0 for none; None for leaves without any."""
        padded = jnp.append(u, jnp.zeros((1,), u.dtype))
        spread: list[Array | None] = []
        for found in self.leaves:
            if found is None:
                spread.append(None)
            else:
                units, mask = found
                spread.append(padded[units] if mask is None else jnp.where(mask, padded[units], 0))
        return spread


def _units(group: RescalingGroup) -> _Units:
    """The incoming weights of every unit: those that its generator multiplies, forward ones only.

    A weight from unit i into unit j is divided by i's generator. It counts if i comes before j.
    """
    if isinstance(group.rows, jax.core.Tracer):
        raise InvalidInput(
            "the group is traced, but which weights belong to which unit must be known: close over "
            "the group instead of passing it through jit."
        )
    _, order = np.unique(np.asarray(group.structure.layers, np.int64), return_inverse=True)
    first = np.full(group.dim, group.dim)
    np.minimum.at(first, order, np.arange(group.dim))
    by_layer = _forward(group, first[order])
    if _all_reached(by_layer, group):
        return by_layer
    # Layers stacked in one leaf feed each other: there the order is that of the units.
    return _forward(group, np.arange(group.dim))


def _forward(group: RescalingGroup, order: np.ndarray) -> _Units:
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    up, down = coefficients > 0, coefficients < 0
    count = np.zeros(group.structure.num_classes, np.int64)
    np.add.at(count, rows[up], coefficients[up])
    unit = np.full(group.structure.num_classes, group.dim)
    unit[rows[up]] = columns[up]
    latest = np.full(group.structure.num_classes, -1)
    np.maximum.at(latest, rows[down], order[columns[down]])
    order = np.append(order, -1)
    found: list[tuple[np.ndarray, np.ndarray | None] | None] = []
    for name, terms in zip(group.structure.leaf_names, group.indices, strict=True):
        ids = [np.asarray(i) for i in terms]
        into = [i for i in ids if count[i].any()]
        if not into:
            found.append(None)
            continue
        if len(into) > 1 or count[into[0]].max() > 1:
            raise InvalidInput(
                f"{name} holds weights that are incoming weights of several units at once (or of "
                "one unit with a power), so units cannot be normalised one by one. "
                "jaxinv.gauges.balance and in_gauge(optimizer, group, balance) have no such limit."
            )
        units = unit[into[0]]
        source = functools.reduce(np.maximum, [latest[i] for i in ids])
        mask = source < order[units]
        mask |= units == group.dim
        found.append((units, None if mask.all() else mask))
    return _Units(tuple(found), group.dim, len(np.unique(order)))


def _all_reached(units: _Units, group: RescalingGroup) -> bool:
    reached = np.zeros(group.dim + 1, bool)
    for shape, found in zip(group.structure.leaf_shapes, units.leaves, strict=True):
        if found is not None and len(shape) > 1:
            ids, mask = found
            reached[
                np.broadcast_to(ids, shape)
                if mask is None
                else np.broadcast_to(ids, mask.shape)[mask]
            ] = True
    return bool(reached[:-1].all())


def _squares(group: RescalingGroup, params: Params) -> list[Array]:
    leaves = checked_leaves(group, params, "params")
    dtype = _scaled.working_dtype(leaves)
    return [jnp.asarray(leaf).astype(dtype) ** 2 for leaf in leaves]


def incoming_norms(group: RescalingGroup, params: Params) -> Array:
    """ℓ₂ norm of the incoming weights of every unit: n_j = (Σ_{e into j} w_e²)^{1/2}.

    Args:
        group: as `jaxinv.rescaling.rescaling_group` returns it, outside `jit`.
        params: pytree of float arrays.

    Returns:
        (dim,), one number per generator. A unit's bias is one of its incoming weights; weights from
        units further on (see the module) are not.

    Raises:
        InvalidInput: if params do not fit the group, or a weight leads into several units.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.reparam import incoming_norms
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0, 0.5], [4.0, 0.0]])},
        ...      "Dense_1": {"kernel": jnp.array([[1.0], [2.0]])}}
        >>> incoming_norms(rescaling_group(networks.mlp, w, jnp.zeros((1, 2))), w).tolist()
        [5.0, 0.5]
    """
    return jnp.sqrt(_units(group).sums(_squares(group, params)))


def unit_norm(group: RescalingGroup, params: Params) -> Gauge:
    """The member of the orbit in which every hidden unit's incoming weights have norm one.

    Incoming weights are divided by their norm, outgoing ones multiplied by it, from the input to
    the output. In feed-forward networks this is `jaxinv.gauges.normalize`. Unlike that one it
    exists for every residual and recurrent network too, because weights on the way back to the same
    unit are left out of the norm.

    Args:
        group: as `jaxinv.rescaling.rescaling_group` returns it, outside `jit`.
        params: pytree of float arrays.

    Returns:
        A `jaxinv.gauges.Gauge`; its `error` is the largest |n_j² − 1|. Units whose incoming weights
        are all 0 stay where they are.

    Raises:
        InvalidInput: if params do not fit the group, or a weight leads into several units.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.reparam import unit_norm
        >>> from jaxinv.rescaling import rescaling_group
        >>> def residual(w, x):
        ...     h = x @ w["in"]
        ...     return (h + (h @ w["a"]) @ w["b"]) @ w["out"]
        >>> w = {name: jnp.full((1, 1), 2.0) for name in ("in", "a", "b", "out")}
        >>> gauge = unit_norm(rescaling_group(residual, w, jnp.ones((1, 1))), w)
        >>> {name: round(leaf.item(), 4) for name, leaf in gauge.params.items()}
        {'a': 1.0, 'b': 4.0, 'in': 1.0, 'out': 4.0}
    """
    units, squares = _units(group), _squares(group, params)

    def sums(u: Array) -> Array:
        scales = jax.tree.leaves(log_scales(group, 2 * u))
        found = units.sums([a * jnp.exp(s) for a, s in zip(squares, scales, strict=True)])
        return jnp.where(found > 0, found, 1)

    def step(state: tuple) -> tuple:
        u, found, steps = state
        u = u - jnp.log(found) / 2
        return u, sums(u), steps + 1

    # Each step puts right all units whose sources are right, so `depth` steps do it; rounding of
    # long sums may stay above the tolerance.
    tol = 16 * float(jnp.finfo(squares[0].dtype).eps)
    most = units.depth + 2

    def unfinished(state: tuple) -> Array:
        _, found, steps = state
        return (jnp.max(abs(found - 1), initial=0.0) > tol) & (steps < most)

    u = jnp.zeros(group.dim, squares[0].dtype)
    state = (u, sums(u), jnp.zeros((), jnp.int32))
    u, found, steps = jax.lax.while_loop(unfinished, step, state)
    error = jnp.max(abs(found - 1), initial=0.0)
    converged = error <= default_tolerance(squares[0].dtype)
    return Gauge(rescale(group, params, u), u, error, steps, error, converged)


# --- normalised -----------------------------------------------------------------------


class WeightNormalized(NamedTuple):
    """A network with unconstrained parameters v, in which every unit uses v/‖v‖.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.reparam import weight_normalize
        >>> from jaxinv.rescaling import rescaling_group
        >>> v = {"Dense_0": {"kernel": jnp.array([[3.0], [4.0]])},
        ...      "Dense_1": {"kernel": jnp.array([[2.0]])}}
        >>> net = weight_normalize(networks.mlp, rescaling_group(networks.mlp, v, jnp.ones((1, 2))))
        >>> print(net.fn(v, jnp.array([[1.0, 1.0]])).round(4))  # 2·(3 + 4)/5
        [[2.8]]
    """

    fn: Network  # fn(v, x) = original fn(to_params(v), x)
    to_params: Callable[[PyTree], Params]  # v ↦ w: incoming weights divided by their norm
    from_params: Callable[[Params], PyTree]  # w ↦ v of the same function: the normalised member


def weight_normalize(fn: Network, group: RescalingGroup) -> WeightNormalized:
    """The network with every hidden unit's incoming weights normalised, v ↦ v/‖v‖.

    The set of functions is that of `fn`. The parameters are unconstrained, and the function depends
    on v through the directions of the units alone, so the group becomes a scale invariance of each
    unit: gradients are orthogonal to each unit's v, and their size is ∝ 1/‖v‖.

    Args:
        fn: the network that the group was found for.
        group: as `jaxinv.rescaling.rescaling_group` returns it, outside `jit`.

    Returns:
        A `WeightNormalized`: `fn(v, x)`; `to_params(v)`, differentiable, gives weights for the
        original network; `from_params(w)` gives a v with the same function as w.

    Raises:
        InvalidInput: if a weight is an incoming weight of several units.

    Notes:
        A unit's bias is one of its incoming weights. Salimans and Kingma leave it out, and keep a
        scale g per unit, which here is in the outgoing weights. Units whose v is all 0 stay 0.

    References:
        Salimans, Kingma, "Weight normalization", NeurIPS 2016 (arXiv:1602.07868), eq. 2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.reparam import weight_normalize
        >>> from jaxinv.rescaling import rescaling_group
        >>> w, x = networks.init_cnn(jax.random.key(0), 2), jnp.ones((1, 4, 4, 1))
        >>> net = weight_normalize(networks.cnn, rescaling_group(networks.cnn, w, x))
        >>> v = net.from_params(w)
        >>> bool(jnp.allclose(net.fn(v, x), networks.cnn(w, x), rtol=1e-4))
        True
    """
    units = _units(group)

    def to_params(v: PyTree) -> Params:
        squares = _squares(group, v)
        found = units.sums(squares)
        factors = units.spread(jax.lax.rsqrt(jnp.where(found > 0, found, 1)) - 1)
        leaves = jax.tree.leaves(v)
        # 1 + (1/‖v‖ − 1), so that weights that lead into no unit have factor one.
        scaled = [
            leaf if f is None else leaf * (1 + f).astype(leaf.dtype)
            for leaf, f in zip(leaves, factors, strict=True)
        ]
        return jax.tree.unflatten(group.structure.tree, scaled)

    def normalized(v: PyTree, x: Inputs) -> Outputs:
        return fn(to_params(v), x)

    def from_params(params: Params) -> PyTree:
        return unit_norm(group, params).params

    return WeightNormalized(normalized, to_params, from_params)


# --- constrained ----------------------------------------------------------------------


def project_to_unit_norm(group: RescalingGroup) -> optax.GradientTransformationExtraArgs:
    """Keep every hidden unit's incoming weights at norm one: put this after any optimizer.

    Δw ← N(w + Δw) − w, where N is `unit_norm`: incoming weights are divided by their
    norm and outgoing ones multiplied by it, so that the constraint is met by moving along the
    orbit, and the network after the step is the one that the optimizer asked for.

    Args:
        group: as `jaxinv.rescaling.rescaling_group` returns it.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state; `update` needs `params`. From
        params off the constraint the first step leads onto it.

    Raises:
        InvalidInput: at `update`, if params are missing or do not fit the group.

    Notes:
        Momentum of the optimizer is not transported along with the weights. Units whose incoming
        weights are all 0 have no direction and stay.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import networks
        >>> from jaxinv.reparam import incoming_norms, project_to_unit_norm, tangent_gradient
        >>> from jaxinv.rescaling import rescaling_group
        >>> w, x = networks.init_mlp(jax.random.key(0), (4, 3, 2)), jnp.ones((5, 4))
        >>> group = rescaling_group(networks.mlp, w, x)
        >>> tx = optax.chain(tangent_gradient(group), optax.adam(0.1), project_to_unit_norm(group))
        >>> gradient = jax.grad(lambda w: ((networks.mlp(w, x) - 1) ** 2).mean())(w)
        >>> updates, state = tx.update(gradient, tx.init(w), w)
        >>> print(incoming_norms(group, optax.apply_updates(w, updates)).round(5))
        [1. 1. 1.]
    """

    def update_fn(updates: PyTree, state: Any, params: Params = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        target = unit_norm(group, optax.apply_updates(params, updates)).params
        return jax.tree.map(lambda new, old: new - old, target, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def tangent_gradient(group: RescalingGroup) -> optax.GradientTransformationExtraArgs:
    """Remove from a gradient what would change the norm of a unit's incoming weights.

    g_j ← g_j − w_j ⟨w_j, g_j⟩/‖w_j‖² for the incoming weights w_j of every unit: the gradient on
    the product of spheres. Put this before the optimizer, and `project_to_unit_norm` after it.

    Args:
        group: as `jaxinv.rescaling.rescaling_group` returns it, outside `jit`.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state; `update` needs `params`.

    Raises:
        InvalidInput: if a weight is an incoming weight of several units; at `update`, if params are
            missing or do not fit the group.

    References:
        Absil, Mahony, Sepulchre, "Optimization algorithms on matrix manifolds", 2008, §3.6.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.reparam import tangent_gradient
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = [jnp.array([[3.0], [4.0]]), jnp.ones((1, 1))]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((1, 2)))
        >>> tx = tangent_gradient(group)
        >>> updates, _ = tx.update([jnp.array([[1.0], [0.0]]), jnp.ones((1, 1))], tx.init(w), w)
        >>> print(updates[0].T, updates[1])  # (1, 0) − (3, 4)·3/25
        [[ 0.64 -0.48]] [[1.]]
    """
    units = _units(group)

    def update_fn(updates: PyTree, state: Any, params: Params = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        leaves = checked_leaves(group, params, "params")
        slopes = checked_leaves(group, updates, "updates")
        dtype = _scaled.working_dtype(leaves)
        weights = [leaf.astype(dtype) for leaf in leaves]
        squares = units.sums([w**2 for w in weights])
        inner = units.sums([w * g.astype(dtype) for w, g in zip(weights, slopes, strict=True)])
        shares = inner / jnp.where(squares > 0, squares, 1)
        tangent = [
            g if r is None else (g.astype(dtype) - w * r).astype(g.dtype)
            for w, g, r in zip(weights, slopes, units.spread(shares), strict=True)
        ]
        return jax.tree.unflatten(group.structure.tree, tangent), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


# --- gauge-fixed ----------------------------------------------------------------------


def in_gauge(
    inner: optax.GradientTransformation,
    group: RescalingGroup,
    gauge: Callable[[RescalingGroup, Params], Gauge] = unit_norm,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer made invariant under the group: its steps are taken at the orbit's gauge.

    With z = w·exp(Bu) the gauge of w: the gradient is carried to z, the inner optimizer steps
    there, and the step is carried back, Δw = exp(−Bu) Δz. Two members of an orbit have the same z,
    hence the same Δz: Δw = (∂w/∂z)Δz on both.

    Args:
        inner: any optax transformation; it sees z as its params.
        group: as `jaxinv.rescaling.rescaling_group` returns it.
        gauge: `unit_norm`, `jaxinv.gauges.balance`, or any function (group, params) -> `Gauge`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is that of `inner`.

    Raises:
        InvalidInput: if params are missing or do not fit the group.

    Notes:
        Unlike with `project_to_unit_norm` the weights stay where they are on their orbit.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import networks
        >>> from jaxinv.invariance import by_rescaling, equivariance_error
        >>> from jaxinv.reparam import in_gauge
        >>> from jaxinv.rescaling import rescaling_group
        >>> w, x = networks.init_mlp(jax.random.key(0), (4, 3, 2)), jnp.ones((5, 4))
        >>> group = rescaling_group(networks.mlp, w, x)
        >>> error = equivariance_error(
        ...     in_gauge(optax.sgd(0.1), group), lambda w: ((networks.mlp(w, x) - 1) ** 2).mean(),
        ...     w, by_rescaling(group, jnp.array([1.0, -2.0, 3.0])), 1)
        >>> bool(error.first_step < 1e-5)
        True
    """
    extended = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> Any:
        return extended.init(gauge(group, params).params)

    def update_fn(updates: PyTree, state: Any, params: Params = None, **extra: Any) -> Any:
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        point = gauge(group, params)
        there = rescale_gradient(group, updates, point.u)
        steps, state = extended.update(there, state, point.params, **extra)
        return rescale(group, steps, -point.u), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
