"""Training with the rescalings removed: constrained, normalised and gauge-fixed parametrisations.

Of every orbit of a rescaling group one member has hidden units with incoming weights of norm one
(`jaxinv.normalize`). The same functions are learnt by

* constrained training: w stays among those members. `project_to_unit_norm` after any optimizer,
  and `tangent_gradient` before it;
* normalised training: v is free, and the network uses v/‖v‖ for each unit (`weight_normalize`);
* gauge-fixed training: w is free, and steps are those taken at its normalised member (`in_gauge`).

All three take the units from the group, so they know dense layers, convolutions and the channels
that residual connections tie together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._checks import check_network
from jaxinv._numerics import scaled as _scaled
from jaxinv.errors import InvalidInput
from jaxinv.rescaling.gauges import Gauge, normalize
from jaxinv.rescaling.group import RescalingGroup, checked_leaves, rescale, rescale_gradient
from jaxinv.rescaling.units import units_of
from jaxinv.typing import Array, Inputs, Network, Outputs, Params, PyTree

_NEEDS_PARAMS = (
    "This transformation moves the parameters, so it needs them: call "
    "update(gradients, state, params)."
)


# --- constrained and normalised units ----------------------------------------------


def _weights(group: RescalingGroup, params: Params) -> list[Array]:
    leaves = checked_leaves(group, params, "params")
    dtype = _scaled.working_dtype(leaves)
    return [jnp.asarray(leaf).astype(dtype) for leaf in leaves]


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
    return units_of(group).norms(_weights(group, params))


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
    group: RescalingGroup  # the scale of every unit's v, which changes nothing


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
        original network; `from_params(w)` gives a v with the same function as w; `group`, of the
        same dimension as the one passed, holds the scale invariances.

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
    check_network(fn)
    units = units_of(group)

    def to_params(v: PyTree) -> Params:
        weights = _weights(group, v)
        found = units.norms(weights)
        norms = units.spread(jnp.where(found > 0, found, 1), 1)
        scaled = [
            leaf if n is None else (w / n).astype(leaf.dtype)
            for leaf, w, n in zip(jax.tree.leaves(v), weights, norms, strict=True)
        ]
        return jax.tree.unflatten(group.structure.tree, scaled)

    def normalized(v: PyTree, x: Inputs) -> Outputs:
        return fn(to_params(v), x)

    def from_params(params: Params) -> PyTree:
        return normalize(group, params).params

    return WeightNormalized(normalized, to_params, from_params, _incoming_alone(group))


def _incoming_alone(group: RescalingGroup) -> RescalingGroup:
    """The generators without their outgoing halves: u_j multiplies what leads into unit j."""
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    up = coefficients > 0
    indices = [
        # Class 0 has scale 0: what is no part of the norm has no share in its scale.
        terms
        if found is None or found[1] is None
        else tuple(np.where(found[1], np.asarray(ids), 0) for ids in terms)
        for terms, found in zip(group.indices, units_of(group).leaves, strict=True)
    ]
    return RescalingGroup(rows[up], columns[up], coefficients[up], tuple(indices), group.structure)


# --- constrained ----------------------------------------------------------------------


def project_to_unit_norm(group: RescalingGroup) -> optax.GradientTransformationExtraArgs:
    """Keep every hidden unit's incoming weights at norm one: put this after any optimizer.

    Δw ← N(w + Δw) − w, where N is `jaxinv.normalize`: incoming weights are divided by their
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

    def update_fn(
        updates: PyTree, state: optax.OptState, params: Params = None, **extra: object
    ) -> tuple[PyTree, optax.OptState]:
        del extra
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        checked_leaves(group, params, "params")
        checked_leaves(group, updates, "updates")
        target = normalize(group, optax.apply_updates(params, updates)).params
        return optax.tree.sub(target, params), state

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
        Absil, Mahony, Sepulchre, "Optimization algorithms on matrix manifolds", 2008 (the tangent
        space of a sphere).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.reparam import tangent_gradient
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = [jnp.array([[3.0], [4.0]]), jnp.ones((1, 1))]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((1, 2)))
        >>> tx = tangent_gradient(group)
        >>> updates, _ = tx.update([jnp.array([[1.0], [0.0]]), jnp.ones((1, 1))], tx.init(w), w)
        >>> print(updates[0].T.round(4), updates[1])  # (1, 0) − (3, 4)·3/25
        [[ 0.64 -0.48]] [[1.]]
    """
    units = units_of(group)

    def update_fn(
        updates: PyTree, state: optax.OptState, params: Params = None, **extra: object
    ) -> tuple[PyTree, optax.OptState]:
        del extra
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        leaves = checked_leaves(group, params, "params")
        slopes = checked_leaves(group, updates, "updates")
        dtype = _scaled.working_dtype(leaves)
        weights = [jnp.asarray(leaf).astype(dtype) for leaf in leaves]
        found = units.norms(weights)
        norms = units.spread(jnp.where(found > 0, found, 1), 1)
        weights = [w if n is None else w / n for w, n in zip(weights, norms, strict=True)]
        slopes = [jnp.asarray(g) for g in slopes]
        inner = units.sums([w * g.astype(dtype) for w, g in zip(weights, slopes, strict=True)])
        tangent = [
            g if r is None else (g.astype(dtype) - w * r).astype(g.dtype)
            for w, g, r in zip(weights, slopes, units.spread(inner), strict=True)
        ]
        return jax.tree.unflatten(group.structure.tree, tangent), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


# --- gauge-fixed ----------------------------------------------------------------------


def in_gauge(
    inner: optax.GradientTransformation,
    group: RescalingGroup,
    gauge: Callable[[RescalingGroup, Params], Gauge] = normalize,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer made invariant under the group: its steps are taken at the orbit's gauge.

    With z = w·exp(Bu) the gauge of w: the gradient is carried to z, the inner optimizer steps
    there, and the step is carried back, Δw = exp(−Bu) Δz. Two members of an orbit have the same z,
    hence the same Δz: Δw = (∂w/∂z)Δz on both.

    Args:
        inner: any optax transformation; it sees z as its params.
        group: as `jaxinv.rescaling.rescaling_group` returns it.
        gauge: `jaxinv.normalize`, `jaxinv.balance`, or any function (group, params) -> `Gauge`.

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

    def init_fn(params: Params) -> optax.OptState:
        return extended.init(gauge(group, params).params)

    def update_fn(
        updates: PyTree, state: optax.OptState, params: Params = None, **extra: object
    ) -> tuple[PyTree, optax.OptState]:
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        point = gauge(group, params)
        there = rescale_gradient(group, updates, point.u)
        steps, state = extended.update(there, state, point.params, **extra)
        return rescale(group, steps, -point.u), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
