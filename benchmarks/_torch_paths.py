"""κ and path norm, p = 2, as one writes them by hand in PyTorch for a given architecture.

Square the weights, send ones through the network without its gates (path sums are >= 0), and
differentiate the sum of the outputs with respect to the squared weights. Every layer that is not a
plain product needs a thought of its own: batch norm with fixed statistics, pooling, the mean.

Parameters arrive as flax has them and are moved to PyTorch's layouts once, outside of any timing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

try:
    import torch
    import torch.nn.functional as F
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the comparison with PyTorch needs torch, which jaxinv does not install; "
        "run: pip install torch"
    ) from error

Named = dict[str, Any]  # "BasicBlock_0/Conv_0/kernel" -> tensor
EPSILON = 1e-5  # of flax's BatchNorm


def named(tree: Mapping[str, Any], prefix: str = "") -> Named:
    """The leaves of nested dictionaries by path."""
    found = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        found.update(named(value, path) if isinstance(value, Mapping) else {path: value})
    return found


def to_torch(tree: Mapping[str, Any], device: str = "cpu") -> Named:
    """Arrays of flax as tensors in PyTorch's layouts: (out, in) and (out, in, height, width)."""
    order = {2: (1, 0), 4: (3, 2, 0, 1)}
    tensors = {}
    for path, leaf in named(tree).items():
        array = np.asarray(leaf)
        array = np.ascontiguousarray(array.transpose(order.get(array.ndim, range(array.ndim))))
        tensors[path] = torch.tensor(array, device=device)
    return tensors


def from_torch(tensors: Named) -> Named:
    """The arrays of `to_torch` in flax's layouts again."""
    order = {2: (1, 0), 4: (2, 3, 1, 0)}
    arrays = {path: tensor.detach().cpu().numpy() for path, tensor in tensors.items()}
    return {p: a.transpose(order.get(a.ndim, range(a.ndim))) for p, a in arrays.items()}


def mlp_sums(q: Named, stats: Named, ones: Any) -> Any:
    """Path sums of every output of `networks.mlp`."""
    h = ones
    for i in range(len(q) // 2):
        h = F.linear(h, q[f"Dense_{i}/kernel"], q[f"Dense_{i}/bias"])
    return h


def resnet_sums(q: Named, stats: Named, ones: Any) -> Any:
    """Path sums of every output of a ResNet of basic blocks, NCHW."""

    def norm(h: Any, name: str) -> Any:
        mean, variance = stats[f"{name}/mean"], stats[f"{name}/var"]
        slope = q[f"{name}/scale"] / (variance + EPSILON)
        return h * slope[:, None, None] + (mean.square() * slope + q[f"{name}/bias"])[:, None, None]

    def conv(h: Any, name: str, stride: int = 1) -> Any:
        kernel = q[f"{name}/kernel"]
        return F.conv2d(h, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    large = q["Conv_0/kernel"].shape[-1] == 7
    h = norm(conv(ones, "Conv_0", 2 if large else 1), "BatchNorm_0")
    if large:  # any element of the window may be the maximum: the sum over the window
        h = F.avg_pool2d(h, 3, 2, 1, divisor_override=1)
    for i in range(sum("/Conv_1/kernel" in path for path in q)):
        block = f"BasicBlock_{i}"
        widens = q[f"{block}/Conv_0/kernel"].shape[0] != h.shape[1]
        y = norm(conv(h, f"{block}/Conv_0", 2 if widens else 1), f"{block}/BatchNorm_0")
        y = norm(conv(y, f"{block}/Conv_1"), f"{block}/BatchNorm_1")
        if widens:
            h = norm(conv(h, f"{block}/Conv_2", 2), f"{block}/BatchNorm_2")
        h = h + y
    positions = h.shape[2] * h.shape[3]  # a mean has the weights 1/k: squared, 1/k²
    h = h.sum((2, 3)) / positions**2
    return F.linear(h, q["Dense_0/kernel"], q["Dense_0/bias"])


def kappa(sums: Any, weights: Named, stats: Named, ones: Any) -> Named:
    """κ of every parameter: the gradient of γ² with respect to the squared weights."""
    q = {path: weight.square().requires_grad_() for path, weight in weights.items()}
    total = sums(q, stats, ones).sum()
    return dict(zip(q, torch.autograd.grad(total, list(q.values())), strict=True))


def path_norm(sums: Any, weights: Named, stats: Named, ones: Any) -> Any:
    """γ of the network."""
    with torch.inference_mode():
        q = {path: weight.square() for path, weight in weights.items()}
        return sums(q, stats, ones).sum().sqrt()


def channels_last(arguments: list[Any]) -> list[Any]:
    """(weights, statistics, ones) with images and kernels in the layout of NHWC."""
    weights, stats, ones = arguments
    layout = {"memory_format": torch.channels_last}
    moved = {p: t.contiguous(**layout) if t.ndim == 4 else t for p, t in weights.items()}
    return [moved, stats, ones.contiguous(**layout)]


def waiting(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)`, waited for, as a function without arguments."""

    def call() -> Any:
        result = function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return call
