"""Spectral norms of the linear operators of a network, and what is made of them.

The operators are found in the program: products of a value that depends on x with weights. Products
over all of them bound the Lipschitz constant of a network whose operators form a chain, each acting
on the result of the one before; for other networks they are refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import logsumexp

from jaxinv._checks import integer, real
from jaxinv._numerics.tolerances import default_tolerance
from jaxinv.capacity.layers import Layers, check_chain, prepare
from jaxinv.capacity.operator_norm import data_shape, operator_norm, sum_of_unit_norms
from jaxinv.typing import Array, DTypeLike, Inputs, Network, Params


class LinearOperator(NamedTuple):
    """A linear operator of a network, as the program applies it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.capacity import linear_operators
        >>> found = linear_operators(lambda w, x: x @ w, jnp.zeros((2, 3)), jnp.zeros((1, 2)))
        >>> found[0].operation, found[0].in_shape, found[0].out_shape
        ('dot_general', (1, 2), (1, 3))
    """

    operation: str  # dot_general, conv_general_dilated, mul or div
    leaves: tuple[str, ...]  # names of the parameters that it is made of
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]


def linear_operators(
    fn: Network, params: Params, x: Inputs, *, batch_axis: int | None = 0
) -> tuple[LinearOperator, ...]:
    """The products with weights in a network, in the order of `spectral_norms`.

    Args, errors as for `jaxinv.group_norm`. Steps of a loop count one by one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.capacity import linear_operators
        >>> from jaxinv.networks import cnn, init_cnn
        >>> found = linear_operators(cnn, init_cnn(jax.random.key(0), 4), jnp.zeros((1, 8, 8, 1)))
        >>> [op.leaves[0] for op in found][:2], found[0].out_shape
        (['params/Conv_0/kernel', 'params/Conv_1/kernel'], (1, 8, 8, 4))
    """
    layers, _ = prepare(fn, params, x, batch_axis)
    return tuple(
        LinearOperator(
            op.eqn.name,
            tuple(sorted(op.names)),
            tuple(data_shape(op)),
            tuple(op.eqn.outputs[0].shape),
        )
        for op in layers.operators
    )


class SpectralNorms(NamedTuple):
    """Operator norms of the linear operators of a network, in the order of the program.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import spectral_norms
        >>> found = spectral_norms(lambda w, x: x @ w, 2 * jnp.eye(3), jnp.zeros((1, 3)))
        >>> found.values.tolist(), found.iterations.tolist()
        ([2.0], [0])
    """

    values: Array  # (operators,)
    errors: Array  # (operators,): see spectral_norms
    iterations: Array  # (operators,) int32; 0 where all singular values were computed


def spectral_norms(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    rtol: float | None = None,
    max_iterations: int = 100,
    batch_axis: int | None = 0,
) -> SpectralNorms:
    """‖W_l‖₂, the largest singular value of every linear operator of a network.

    A convolution is the map of images of the size at hand, with its strides and padding, not its
    kernel as a matrix. A scale layer is a diagonal.

    Args:
        fn, params, x, batch_axis: as for `jaxinv.group_norm`.
        rtol: relative error at which the iteration stops; by default 1e-10 for float64, else 1e-5.
        max_iterations: of Lanczos; the memory is that of so many copies of a layer's input.

    Returns:
        `SpectralNorms`. `values` is differentiable, and never above the true norm but for rounding.
        A singular value is within `errors` of it: residuals ‖AᵀA v − σ²v‖/σ, or, for matrices with
        at most 64 rows or columns, a bound on rounding. That it is the largest singular value is
        certain for those; else it holds once the iteration has converged, unless the random start
        was all but orthogonal to the largest ones.

    Raises:
        InvalidInput: as for `jaxinv.group_norm`; rtol or max_iterations not positive.
        UnsupportedOperation: as for `jaxinv.group_norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import lax
        >>> from jaxinv import spectral_norms
        >>> def net(w, x):
        ...     return lax.conv_general_dilated(x, w, (1,), "SAME",
        ...                                     dimension_numbers=("NWC", "WIO", "NWC"))
        >>> found = spectral_norms(net, jnp.ones((3, 1, 1)), jnp.zeros((1, 7, 1)))
        >>> print(found.values.round(4))  # 1 + 2·cos(π/8)
        [2.8478]
    """
    layers, dtype = prepare(fn, params, x, batch_axis)
    return _spectral_norms(layers, dtype, rtol, max_iterations)


def _spectral_norms(
    layers: Layers, dtype: DTypeLike, rtol: float | None, max_iterations: int
) -> SpectralNorms:
    rtol = (
        default_tolerance(dtype)
        if rtol is None
        else real("rtol", rtol, lambda t: t > 0, "positive")
    )
    max_iterations = integer("max_iterations", max_iterations, 1)
    found = [operator_norm(op, dtype, rtol, max_iterations) for op in layers.operators]
    if not found:
        return SpectralNorms(*(jnp.zeros(0, t) for t in (dtype, dtype, jnp.int32)))
    return SpectralNorms(*(jnp.stack(column) for column in zip(*found, strict=True)))


def log_spectral_product(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    rtol: float | None = None,
    max_iterations: int = 100,
    batch_axis: int | None = 0,
) -> Array:
    """log Π_l ρ_l ‖W_l‖₂, a bound on the logarithm of the ℓ₂ Lipschitz constant of a chain in x.

    ρ_l are the Lipschitz constants of what lies between the operators: 1 for ReLU, tanh, maxima
    over disjoint windows; 1/√k for a mean of k elements; the factor of a multiplication.

    Args:
        fn, params, x, rtol, max_iterations, batch_axis: as for `spectral_norms`; the layers form a
            chain.

    Returns:
        A scalar; -inf if a layer is 0.

    Raises:
        InvalidInput: as for `spectral_norms`.
        UnsupportedOperation: as for `jaxinv.group_norm`; for operators that are not a chain
            (residual sums, products of two values) and operations without a known Lipschitz
            constant.

    References:
        Bartlett, Foster, Telgarsky, "Spectrally-normalized margin bounds for neural networks",
        NeurIPS 2017 (arXiv:1706.08498).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import log_spectral_product
        >>> w = [2 * jnp.eye(3), 5 * jnp.eye(3)]
        >>> net = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1]
        >>> print(f"{jnp.exp(log_spectral_product(net, w, jnp.zeros((1, 3)))):.4f}")
        10.0000
    """
    layers, dtype = prepare(fn, params, x, batch_axis)
    check_chain(layers)
    return _log_lipschitz(layers, _spectral_norms(layers, dtype, rtol, max_iterations))


def _log_lipschitz(layers: Layers, found: SpectralNorms) -> Array:
    gains = [op.stage.gain for op in layers.operators] + [layers.gain]
    log_gain = sum(math.log(g) if g > 0 else -math.inf for g in gains)
    return jnp.sum(jnp.log(found.values)) + jnp.asarray(log_gain, found.values.dtype)


def log_spectral_complexity(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    rtol: float | None = None,
    max_iterations: int = 100,
    batch_axis: int | None = 0,
) -> Array:
    """log R with R = (Π_l ρ_l ‖W_l‖₂) · (Σ_l (‖W_l‖_{2,1}/‖W_l‖₂)^{2/3})^{3/2}.

    ‖W‖_{2,1} = Σ_v (Σ_u w_uv²)^{1/2} over all elements v of the result of an operator; reference
    matrices are 0. Biases have no part in it.

    Args, returns, errors as for `log_spectral_product`.

    References:
        Bartlett, Foster, Telgarsky, NeurIPS 2017 (arXiv:1706.08498).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.capacity import log_spectral_complexity
        >>> net = lambda w, x: x @ w
        >>> print(f"{jnp.exp(log_spectral_complexity(net, 2 * jnp.eye(3), jnp.zeros((1, 3)))):.4f}")
        6.0000
    """
    layers, dtype = prepare(fn, params, x, batch_axis)
    check_chain(layers)
    found = _spectral_norms(layers, dtype, rtol, max_iterations)
    sums = [sum_of_unit_norms(op, dtype) for op in layers.operators]
    logs = jnp.stack([jnp.log(s) + jnp.log(scale) for s, scale in sums]) - jnp.log(found.values)
    correction = logsumexp(logs * jnp.asarray(2 / 3, dtype)) * jnp.asarray(1.5, dtype)
    result: Array = _log_lipschitz(layers, found) + correction
    # A layer that is 0 makes the network constant, and 0/0 of the correction.
    return jnp.where((found.values == 0).any(), -jnp.inf, result)


__all__ = [
    "LinearOperator",
    "SpectralNorms",
    "linear_operators",
    "log_spectral_complexity",
    "log_spectral_product",
    "spectral_norms",
]
