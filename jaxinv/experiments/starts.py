"""Two starts of one network: the same function, near and far from balance."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.networks import mlp
from jaxinv.rescaling import random_rescaling, rescale, rescaling_group

Params = dict[str, dict[str, jax.Array]]

STARTS = ("balanced", "unbalanced")


def unbalance(key: jax.Array, params: Params) -> Params:
    """Rescale random hidden units without changing the function.

    In each hidden layer, 128 units (a quarter of them in layers narrower than
    512) have their incoming weights and bias multiplied by s and their
    outgoing weights divided by s, with s = 10·exp(N(0, 1)) drawn for each
    unit. ReLU(s·a)/s = ReLU(a), so the network computes what it did.

    Args:
        key: a PRNG key.
        params: the parameters of :func:`jaxinv.networks.mlp`.

    Returns:
        parameters of the same structure.

    References:
        Neyshabur et al. 2015, arXiv:1506.02617, section 5.

    >>> from jaxinv.networks import init_mlp
    >>> params = init_mlp(jax.random.key(0), (3, 8, 1))
    >>> x = jnp.ones((2, 3))
    >>> moved = unbalance(jax.random.key(1), params)
    >>> bool(jnp.allclose(mlp(moved, x), mlp(params, x), rtol=1e-5))
    True
    """
    kernels = [params[f"Dense_{i}"]["kernel"] for i in range(len(params))]
    dtype = kernels[0].dtype
    group = rescaling_group(mlp, params, jax.ShapeDtypeStruct((1, kernels[0].shape[0]), dtype))
    widths = collections.Counter(group.layers)
    counts = np.array([max(1, min(128, widths[layer] // 4)) for layer in group.layers])
    u = jnp.zeros(group.dim, dtype)
    for units in set(counts.tolist()):
        of_units = jax.random.fold_in(key, units)
        drawn = random_rescaling(group, of_units, kind="unbalanced", units=units, dtype=dtype)
        u = jnp.where(counts == units, drawn, u)
    return rescale(group, params, u)
