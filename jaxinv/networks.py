"""Plain-pytree networks, for examples and tests.

The rest of the package takes any `fn(params, x)`; these two are merely the
shortest useful ones. Parameters are nested dictionaries with flax's names and
layouts (`kernel` is `(in, out)` or `(height, width, in, out)`), so that
what is shown here carries over to `flax.linen` unchanged.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv.errors import InvalidInput
from jaxinv.typing import DTypeLike

Params = dict[str, dict[str, jax.Array]]

_NHWC = ("NHWC", "HWIO", "NHWC")


def init_mlp(
    key: jax.Array,
    sizes: Sequence[int],
    *,
    bias: bool = True,
    bias_std: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Draw the parameters of a fully connected network.

    Kernels are independent normal variables of variance 2/fan_in (He et al.
    2015); biases are normal with standard deviation `bias_std`, which is zero
    biases by default.

    Args:
        key: a PRNG key.
        sizes: widths `(inputs, hidden, ..., outputs)`, at least two.
        bias: whether layers have biases.
        bias_std: standard deviation of the biases.
        dtype: floating-point type of every array.

    Returns:
        `{"Dense_0": {"kernel": (in, out), "bias": (out,)}, "Dense_1": ...}`.

    Raises:
        InvalidInput: for fewer than two widths, or a width below 1.

    Example:
        >>> import jax
        >>> params = init_mlp(jax.random.key(0), (64, 32, 10))
        >>> jax.tree.map(jax.numpy.shape, params)["Dense_1"]
        {'bias': (10,), 'kernel': (32, 10)}
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise InvalidInput(
            f"sizes={tuple(sizes)} must name at least an input and an output width, "
            "all of them 1 or more; for example sizes=(784, 512, 10)."
        )
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(sizes[:-1], sizes[1:], strict=True)
    return {
        f"Dense_{i}": _init_layer(k, shape, bias, bias_std, dtype)
        for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def mlp(
    params: Params,
    x: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> jax.Array:
    """Apply the fully connected network of `init_mlp`.

    hᵢ₊₁ = activation(hᵢ Wᵢ + bᵢ), without activation after the last layer.

    Args:
        params: as `init_mlp` returns them; layers may lack a bias.
        x: `(n, ...)`; the trailing axes are flattened to `inputs`.
        activation: elementwise function between layers.

    Returns:
        `(n, outputs)`, in the promoted dtype of `params` and `x`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = init_mlp(jax.random.key(0), (64, 32, 10))
        >>> mlp(params, jnp.ones((5, 8, 8))).shape
        (5, 10)
    """
    x = x.reshape(x.shape[0], -1)
    for i in range(len(params)):
        if i > 0:
            x = activation(x)
        x = _add_bias(x @ params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"])
    return x


def init_cnn(
    key: jax.Array,
    channels: int = 8,
    *,
    in_channels: int = 1,
    num_classes: int = 10,
    bias: bool = True,
    bias_std: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Draw the parameters of a small residual convolutional network.

    `Conv_0` is the stem, `Conv_1` and `Conv_2` the residual branch, all
    3×3, and `Dense_0` the read-out. Kernels have variance 2/fan_in, as in
    `init_mlp`. No shape depends on the size of the images.

    Args:
        key: a PRNG key.
        channels: number of channels of the three convolutions.
        in_channels: channels of the images.
        num_classes: number of outputs.
        bias: whether layers have biases.
        bias_std: standard deviation of the biases, zero biases by default.
        dtype: floating-point type of every array.

    Returns:
        `{"Conv_0": {"kernel": (3, 3, in_channels, channels), "bias":
        (channels,)}, "Conv_1": ..., "Conv_2": ..., "Dense_0": ...}`.

    Raises:
        InvalidInput: for a number of channels or classes below 1.

    Example:
        >>> import jax
        >>> params = init_cnn(jax.random.key(0), 4)
        >>> jax.tree.map(jax.numpy.shape, params)["Conv_0"]
        {'bias': (4,), 'kernel': (3, 3, 1, 4)}
    """
    if min(channels, in_channels, num_classes) < 1:
        raise InvalidInput(
            f"channels={channels}, in_channels={in_channels} and "
            f"num_classes={num_classes} must all be 1 or more."
        )
    shapes = {
        "Conv_0": (3, 3, in_channels, channels),
        "Conv_1": (3, 3, channels, channels),
        "Conv_2": (3, 3, channels, channels),
        "Dense_0": (channels, num_classes),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: _init_layer(k, shape, bias, bias_std, dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def cnn(params: Params, x: jax.Array) -> jax.Array:
    """Apply the small residual convolutional network of `init_cnn`.

    h = max_pool(relu(x * W₀ + b₀)); h ← relu(h + relu(h * W₁ + b₁) * W₂ + b₂);
    y = mean(h) W₃ + b₃, with 3×3 "SAME" convolutions, a 2×2 max pool of stride
    2 and a mean over all positions.

    Args:
        params: as `init_cnn` returns them; layers may lack a bias.
        x: images `(n, height, width, in_channels)`, at least 2×2.

    Returns:
        `(n, num_classes)`, in the dtype of `params`.

    Raises:
        InvalidInput: if `x` is not a batch of images of at least 2×2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = init_cnn(jax.random.key(0))
        >>> cnn(params, jnp.ones((5, 8, 8, 1))).shape
        (5, 10)
    """
    if x.ndim != 4 or min(x.shape[1:3]) < 2:
        raise InvalidInput(
            f"x has shape {x.shape}, but cnn needs images (n, height, width, channels) "
            "of at least 2×2; add the missing axes, for example x[..., None]."
        )
    h = jax.nn.relu(_conv(params["Conv_0"], x))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding="VALID")
    branch = _conv(params["Conv_2"], jax.nn.relu(_conv(params["Conv_1"], h)))
    h = jax.nn.relu(h + branch).mean(axis=(1, 2))
    return _add_bias(h @ params["Dense_0"]["kernel"], params["Dense_0"])


def _init_layer(
    key: jax.Array, shape: tuple[int, ...], bias: bool, bias_std: float, dtype: DTypeLike
) -> dict[str, jax.Array]:
    kernel_key, bias_key = jax.random.split(key)
    std = math.sqrt(2 / math.prod(shape[:-1]))
    layer = {"kernel": std * jax.random.normal(kernel_key, shape, dtype)}
    if bias and isinstance(bias_std, int | float) and bias_std == 0:
        layer["bias"] = jnp.zeros(shape[-1:], dtype)
    elif bias:
        layer["bias"] = bias_std * jax.random.normal(bias_key, shape[-1:], dtype)
    return layer


def _conv(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=_NHWC)
    return _add_bias(y, layer)


def _add_bias(y: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    return y + layer["bias"] if "bias" in layer else y


__all__ = ["cnn", "init_cnn", "init_mlp", "mlp"]
