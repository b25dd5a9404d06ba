"""The Fisher information of a likelihood in the outputs of a network, by its root."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinv.typing import Array


def root_product(y: Array, v: Array, likelihood: str) -> Array:
    """R(y) v, with Λ(y) = RᵀR; differentiable in y and v.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv._numerics.likelihoods import root_product
        >>> print(root_product(jnp.zeros(1), jnp.ones(1), "bernoulli"))  # √(½·½)
        [0.5]
    """
    if likelihood == "gaussian":
        return v
    if likelihood == "softmax":
        # R = (I − qqᵀ) diag(q) with q = √π, a unit vector. √0 would have no derivative.
        q = jnp.exp(jax.nn.log_softmax(y, -1) / 2)
        scaled = q * v
        return scaled - q * jnp.sum(q * scaled, -1, keepdims=True)
    if likelihood == "bernoulli":
        return jnp.exp((jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y)) / 2) * v
    return jnp.exp(y / 2) * v
