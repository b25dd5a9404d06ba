"""Products of path sums with large arrays of |w|^p, in a form that XLA's CPU backend runs fast.

On a batch of one the weights outnumber the activations, so what counts is how often an array of the
weights' size is read, written or copied. XLA transposes a convolution's kernel in memory for the
gradient of its input, and the gradient of every kernel and matrix it lays out transposed and then
copies. A matrix product on patches of the (small) input needs neither copy.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxinv._interpreter.walk import Equation
from jaxinv.typing import Array

# Below this many weights the copies are not worth avoiding.
SMALLEST = 1 << 16


@jax.custom_jvp
def matmul(rows: Array, matrix: Array) -> Array:
    """(m, k) times (k, n), whose gradient in `matrix` is written as (k, n) at once for m = 1."""
    return jnp.matmul(rows, matrix, precision=lax.Precision.HIGHEST)


def _matmul_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array | SymbolicZero, Array | SymbolicZero]
) -> tuple[Array, Array]:
    rows, matrix = primals
    by_rows, by_matrix = tangents
    out = matmul(rows, matrix)
    terms = []
    if not isinstance(by_rows, SymbolicZero):
        terms.append(matmul(by_rows, matrix))
    if not isinstance(by_matrix, SymbolicZero):
        if rows.shape[0] == 1:  # its transpose is an outer product in the layout of the matrix
            terms.append(jnp.sum(rows.T * by_matrix, axis=0, keepdims=True))
        else:
            terms.append(matmul(rows, by_matrix))
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


matmul.defjvp(_matmul_jvp, symbolic_zeros=True)


def product(eqn: Equation, left: Array, right: Array, weight_is_right: bool) -> Array | None:
    """`eqn` on path sums and lengths as a matrix product; None where that is not faster."""
    if not weight_is_right or right.size < SMALLEST or jax.default_backend() != "cpu":
        return None
    if eqn.name == "dot_general":
        return dense(eqn, left, right)
    return convolution(eqn, left, right)


def dense(eqn: Equation, data: Array, matrix: Array) -> Array | None:
    """A dense layer, (..., k) times (k, n); None for any other contraction."""
    if eqn.params["dimension_numbers"] != (((data.ndim - 1,), (0,)), ((), ())) or matrix.ndim != 2:
        return None
    rows = data.reshape(-1, data.shape[-1])
    out = matmul(rows, _after(rows, matrix))
    return out.reshape(*data.shape[:-1], matrix.shape[1])


def _after(rows: Array, weights: Array) -> Array:
    """The weights, not before the rows are known.

    XLA would raise the weights of all layers to their powers first, and hold them all at once: on a
    CPU new pages of memory cost more than the arithmetic.
    """
    known = jnp.where(jnp.isnan(lax.stop_gradient(rows[0, 0])), jnp.nan, 1)
    return weights * known.astype(weights.dtype)


def convolution(eqn: Equation, data: Array, kernel: Array) -> Array | None:
    """A convolution of one image by a kernel larger than the patches; None for any other.

    Measured on ResNet-18: with more positions than features XLA's own convolution is faster.
    """
    numbers, padding = eqn.params["dimension_numbers"], eqn.params["padding"]
    (batch, channel, *space), (out_axis, in_axis, *taps) = numbers.lhs_spec, numbers.rhs_spec
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    plain = groups == 1 and data.shape[batch] == 1 and set(eqn.params["lhs_dilation"]) <= {1}
    # A kernel with its outputs first or last is a matrix without being moved.
    summed = [axis for axis in range(kernel.ndim) if axis != out_axis]
    movable = out_axis in (0, kernel.ndim - 1) and summed in ([*taps, in_axis], [in_axis, *taps])
    if not plain or not movable or min(itertools.chain((0,), *padding)) < 0:
        return None
    out_batch, out_channel, *out_space = numbers.out_spec
    sizes = [eqn.outputs[0].shape[i] for i in out_space]
    features, windows = kernel.shape[out_axis], [kernel.shape[i] for i in taps]
    if math.prod(sizes) > features and math.prod(windows) > 1:
        return None
    image = lax.transpose(data, (batch, *space, channel))[0]
    grid = (eqn.params["window_strides"], eqn.params["rhs_dilation"], padding)
    rows = _patches(image, tuple(windows), tuple(sizes), *map(tuple, grid))
    if summed[0] == in_axis:
        rows = rows.swapaxes(1, 2)
    rows = rows.reshape(rows.shape[0], -1)
    kernel = _after(rows, kernel)
    if out_axis == 0:
        out = jnp.matmul(rows, kernel.reshape(features, -1).T, precision=lax.Precision.HIGHEST)
    else:
        out = matmul(rows, kernel.reshape(-1, features))
    out = out.reshape(1, *sizes, features)
    where = (out_batch, *out_space, out_channel)
    return lax.transpose(out, [where.index(i) for i in range(out.ndim)])


@partial(jax.jit, static_argnums=range(1, 6))  # traced once for layers of the same shape
def _patches(
    image: Array, windows: tuple, sizes: tuple, strides: tuple, dilation: tuple, padding: tuple
) -> Array:
    """What the kernel meets at every position: positions × taps × channels."""
    padded = jnp.pad(image, (*padding, (0, 0)))
    channels = image.shape[-1]
    parts = []
    for tap in itertools.product(*map(range, windows)):
        start = [t * d for t, d in zip(tap, dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, sizes, strides, strict=True)]
        part = lax.slice(padded, (*start, 0), (*stop, channels), (*strides, 1))
        parts.append(part.reshape(-1, channels))
    return jnp.stack(parts, axis=1)
