"""The Langevin step that all samplers here share, in one convention of the step size.

    w ← w + ε·g + √(2ε)·noise,      g an estimate of ∇ log density,

which is blackjax's. Half of ε in the drift and √ε in front of the noise, as in Welling and Teh, is
the same step with another name for its size: what they call ε is 2ε here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxinv.typing import Array, ArrayLike, PyTree


def standard_normal(key: Array, like: PyTree) -> PyTree:
    """Independent standard normal numbers in the shapes and dtypes of a pytree."""
    flat, unravel = ravel_pytree(like)
    return unravel(jax.random.normal(key, flat.shape, flat.dtype))


def langevin_step(w: PyTree, gradient: PyTree, noise: PyTree, step_size: ArrayLike) -> PyTree:
    """w + ε·gradient + √(2ε)·noise.

    Args:
        w: pytree of float arrays.
        gradient: like w, an estimate of ∇ log density there.
        noise: like w, standard normal.
        step_size: ε. On N(0, 1/a), with the exact gradient −a·w, the law of w tends to
            N(0, (1/a)/(1 − aε/2)) for aε < 2, and to N(0, 1/a) as ε tends to 0.

    Returns:
        The new w, in the dtypes of w.
    """

    def move(w: Array, g: Array, n: Array) -> Array:
        size = jnp.asarray(step_size, dtype=w.dtype)
        return w + size * g.astype(w.dtype) + jnp.sqrt(2 * size) * n

    return jax.tree.map(move, w, gradient, noise)
