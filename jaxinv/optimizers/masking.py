"""Parameters that `optax.masked` and `optax.partition` hide from a transformation."""

from __future__ import annotations

import jax
import optax

from jaxinv._numerics.precision import as_dtype
from jaxinv.errors import InvalidInput
from jaxinv.typing import Inputs, Network, Outputs, Params, PyTree


def is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def of_visible(fn: Network, params: Params, full_params: Params | None) -> Network:
    """fn as a function of the unmasked parameters."""
    if not any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        return fn
    if full_params is None:
        raise InvalidInput(
            "Some parameters are masked (by optax.masked or optax.partition), but the network "
            "needs all of them. Wrap the whole optimizer in jaxinv.pass_full_params(...)."
        )

    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]

    def of_visible(visible: Params, x: Inputs) -> Outputs:
        others, found = full_params, [leaf.dtype for leaf in jax.tree.leaves(visible)]
        if found != dtypes:
            # A metric may be computed in another precision: all parameters follow.
            others = as_dtype(others, found[0])
        return fn(
            jax.tree.map(lambda v, w: w if is_masked(v) else v, visible, others, is_leaf=is_masked),
            x,
        )

    return of_visible


def pass_full_params(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Hand the unmasked parameters to transformations inside `optax.masked` or `optax.partition`.

    Those wrappers hide from each inner transformation the parameters that it does not update. κ of
    a weight depends on all the others, so Path-SGD needs them: this passes them on as the extra
    argument `full_params`. κ is then that of the whole network, as without a mask. Wrap the
    outermost transformation.

    Args:
        inner: any gradient transformation.

    Returns:
        The same transformation, with `full_params=params` added to every update.

    Raises:
        InvalidInput: at `update`, if params are missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import path_sgd, pass_full_params
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["body"]) @ w["head"]
        >>> w = {"body": jnp.ones((2, 3)), "head": jnp.ones((3, 1))}
        >>> tx = pass_full_params(optax.partition(
        ...     {"path": path_sgd(0.1, net, jnp.zeros((1, 2))), "plain": optax.sgd(0.1)},
        ...     {"body": "path", "head": "plain"}))
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
        >>> updates["head"].shape
        (3, 1)
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: PyTree, state: optax.OptState, params: Params = None, **extra: object
    ) -> tuple[PyTree, optax.OptState]:
        if params is None:
            raise InvalidInput(
                "pass_full_params needs the parameters: they are what it hands on. "
                "Call update(gradients, state, params)."
            )
        return inner.update(updates, state, params, **{"full_params": params, **extra})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
