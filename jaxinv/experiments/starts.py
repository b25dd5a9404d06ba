"""Two starts of one network: the same function, near and far from balance."""

import jax
import jax.numpy as jnp

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

    >>> from jaxinv.networks import init_mlp, mlp
    >>> params = init_mlp(jax.random.key(0), (3, 8, 1))
    >>> x = jnp.ones((2, 3))
    >>> moved = unbalance(jax.random.key(1), params)
    >>> bool(jnp.allclose(mlp(moved, x), mlp(params, x), rtol=1e-5))
    True
    """
    params = {name: dict(layer) for name, layer in params.items()}
    for i in range(len(params) - 1):
        key, unit_key, scale_key = jax.random.split(key, 3)
        layer, following = params[f"Dense_{i}"], params[f"Dense_{i + 1}"]
        width = layer["kernel"].shape[1]
        count = max(1, min(128, width // 4))
        units = jax.random.choice(unit_key, width, (count,), replace=False)
        dtype = layer["kernel"].dtype
        scales = 10 * jnp.exp(jax.random.normal(scale_key, (count,), dtype))
        s = jnp.ones(width, dtype).at[units].set(scales)
        for name in layer:  # kernel (in, width) and bias (width,) both end in the unit's axis
            layer[name] = layer[name] * s
        following["kernel"] = following["kernel"] / s[:, None]
    return params
