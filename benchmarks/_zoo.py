"""Models of several libraries, small: each as the `fn(params, x)` and `params` that jaxinv takes.

Inputs are digits: images of 8×8 pixels, or their rows as a sequence, or their pixels as tokens or
as the nodes of a graph. All parameters and stored statistics are generic numbers, as in a trained
model: at zero biases and unit gains a network has symmetries that it loses with the first step.
"""

from collections.abc import Callable
from typing import NamedTuple

import _zoo_flax as flax
import _zoo_others as others
from _zoo_common import Model, inputs, shaped


class Entry(NamedTuple):
    """A model of the zoo, and where its null directions come from."""

    package: str
    build: Callable[[], Model]
    rescaling: int
    matrix: int = 0  # beyond rescalings
    shift: int = 0  # beyond both
    dead: int = 0  # parameters on which no output depends
    rest: int = 0
    why: str = ""  # of the rest
    refused: str = ""  # by the path norm: the layer or operation that the message names


# Why directions are left that are neither rescalings, matrices nor shifts.
STORED_MEANS = (
    "a kernel by c and the gain behind it by 1/c, where the offset takes back what the stored mean "
    "makes of that"
)

ZOO: dict[str, Entry] = {
    "ResNet": Entry("haiku", flax.haiku_resnet, 34, shift=32, rest=32, why=STORED_MEANS),
    "MobileNetV1": Entry("haiku", flax.haiku_mobilenet, 86, shift=86),
    "LSTM": Entry("haiku", flax.haiku_lstm, 0, refused="LSTM"),
    "CNN": Entry("flax", flax.linen_cnn, 11, shift=7, rest=5, why=STORED_MEANS),
    "encoder": Entry("flax", flax.linen_transformer, 34, 58, 95, 8, refused="LayerNorm"),
    "GRU": Entry("flax", flax.linen_gru, 0, refused="GRUCell"),
    "decoder": Entry("flax", flax.nnx_llama, 41, 63, refused="RMSNorm"),
    "MLP": Entry("equinox", others.equinox_mlp, 16),
    "rotary attention": Entry("equinox", others.equinox_rope, 12, 28, refused="tanh"),
    "ViT": Entry("equimo", others.equimo_vit, 30, 34, 111, 6, refused="LayerNorm"),
    "ConvNeXt": Entry("equimo", others.equimo_convnext, 21, 0, 99, 280, refused="LayerNorm2d"),
    "residual CNN": Entry("keras", others.keras_cnn, 7, 0, 8),
    "keras transformer": Entry(
        "keras", others.keras_transformer, 25, 34, 38, 6, refused="dot_product_attention"
    ),
    "keras LSTM": Entry("keras", others.keras_lstm, 0, 0, 6, refused="LSTMCell"),
    "graph convolutions": Entry("jraph", others.jraph_convolutions, 13),
    "graph attention": Entry("jraph", others.jraph_attention, 8, refused="scatter-max"),
    "graph network": Entry("jraph", others.jraph_interaction, 12, refused="scatter-add"),
    "Mamba2": Entry("mamba2_jax", flax.mamba2, 36, refused="RMSNorm"),
}

__all__ = ["ZOO", "Entry", "Model", "inputs", "shaped"]
