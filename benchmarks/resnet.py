"""Residual networks of He et al. (2016) in flax linen, for benchmarks.

The architecture is the usual one of the public checkpoints: stride in the 3×3
convolution of a bottleneck, explicit symmetric padding, a projection (1×1
convolution and batch norm) where a block changes shape.

References:
    He, Zhang, Ren and Sun, *Deep residual learning for image recognition*, CVPR
    2016, arXiv:1512.03385.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(features: int, size: int, stride: int = 1) -> nn.Conv:
    # Symmetric padding: "SAME" would pad strided convolutions on one side only.
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=_he_fan_out,
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the identity (ResNet-18 and -34).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> block = BasicBlock(4, stride=2)
        >>> variables = block.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)), False)
        >>> block.apply(variables, jnp.ones((3, 8, 8, 4)), False).shape
        (3, 4, 4, 4)
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `(n, h, w, c)` to `(n, ⌈h/stride⌉, ⌈w/stride⌉, features)`."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(_conv(self.features, 3, self.stride)(x)))
        y = norm()(_conv(self.features, 3)(y))
        if x.shape != y.shape:
            x = norm()(_conv(self.features, 1, self.stride)(x))
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and the identity (ResNet-50 and deeper).

    The block has 4·`features` output channels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> block = BottleneckBlock(4, stride=2)
        >>> variables = block.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)), False)
        >>> block.apply(variables, jnp.ones((3, 8, 8, 4)), False).shape
        (3, 4, 4, 16)
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `(n, h, w, c)` to `(n, ⌈h/stride⌉, ⌈w/stride⌉, 4·features)`."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(_conv(self.features, 1)(x)))
        y = nn.relu(norm()(_conv(self.features, 3, self.stride)(y)))
        y = norm()(_conv(4 * self.features, 1)(y))
        if x.shape != y.shape:
            x = norm()(_conv(4 * self.features, 1, self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of any depth.

    A stem, one stage of blocks per entry of `stage_sizes` (64, 128, 256, ...
    features by default, each stage after the first halving the image), a mean over all
    positions and a dense read-out. The stem is a 7×7 convolution of stride 2
    with a 3×3 max pool of stride 2, or, for `small_inputs` such as 32×32
    images, a 3×3 convolution of stride 1 without pooling.

    Args:
        num_classes: number of outputs.
        small_inputs: which stem.
        stage_sizes: blocks per stage.
        block: `BasicBlock` or `BottleneckBlock`.
        features: of the stem and the first stage.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tiny = ResNet(3, small_inputs=True, stage_sizes=(1,))
        >>> variables = tiny.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), False)
        >>> tiny.apply(variables, jnp.ones((2, 8, 8, 3)), False).shape
        (2, 3)
    """

    num_classes: int = 10
    small_inputs: bool = False
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    block: Callable[..., Any] = BasicBlock
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images `(n, h, w, c)` to logits `(n, num_classes)`.

        Args:
            x: floating-point images.
            train: whether batch norm uses the statistics of `x` (and updates
                `batch_stats`, which must then be mutable) or the running ones.
        """
        x = _conv(self.features, 3)(x) if self.small_inputs else _conv(self.features, 7, 2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        if not self.small_inputs:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, num_blocks in enumerate(self.stage_sizes):
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = self.block(self.features * 2**i, stride=stride)(x, train)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class ResNet18(ResNet):
    """ResNet-18: 11,689,512 parameters with 1000 classes and the 7×7 stem.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ResNet18(num_classes=10, small_inputs=True)
        >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        >>> shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, False), x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        11173962
    """

    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    block: Callable[..., Any] = BasicBlock


class ResNet50(ResNet):
    """ResNet-50: 25,557,032 parameters with 1000 classes and the 7×7 stem.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        >>> init = lambda x: ResNet50().init(jax.random.key(0), x, False)
        >>> shapes = jax.eval_shape(init, x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        25557032
    """

    num_classes: int = 1000
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    block: Callable[..., Any] = BottleneckBlock
