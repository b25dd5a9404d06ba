"""Small networks whose Jacobian has an exactly known rank that floating point makes hard to see."""

import numpy as np

ARCHITECTURES = [(2, 2, 2, 1), (3, 5, 4, 2), (2, 3, 1), (4, 3, 3, 2), (1, 6, 1), (3, 4, 2)]
KINDS = (
    "plain", "rescaled", "duplicated", "zero", "rescaled duplicated", "rescaled zero", "near",
    "rescaled near", "feature", "rescaled feature", "mean", "mean duplicated",
    "rescaled mean near", "fractions", "fractions duplicated", "fractions mean near", "far",
    "far duplicated",
)  # fmt: skip


def draw(kind, rng, sizes=None, biases=None):
    """[(kernel, bias or None), ...] and 40 inputs, as float64."""
    sizes = sizes or ARCHITECTURES[rng.integers(6)]
    biases = bool(rng.integers(2)) if biases is None else biases
    layers = []
    for m, n in zip(sizes, sizes[1:], strict=False):
        bias = rng.integers(-3, 4, n).astype(float) if biases else None
        layers.append((rng.integers(-3, 4, (m, n)).astype(float), bias))
    x = rng.integers(-4, 5, (40, sizes[0])).astype(float)
    little = 2.0 ** -int(rng.integers(20, 51))
    if "duplicated" in kind or "near" in kind:
        _twin_units(layers, rng, little if "near" in kind else 0)
    if "feature" in kind and sizes[0] > 1:
        x[:, 1] = x[:, 0]
        x[rng.integers(40), 1] += little
    if "fractions" in kind:
        layers = [
            (kernel / (7 - 4 * (i % 2)), None if bias is None else bias / 7)
            for i, (kernel, bias) in enumerate(layers)
        ]
        x = x / 5
        if sizes[0] > 1:
            x[:, 1] = x[:, 0] * rng.choice([1, 4])
    if "mean" in kind:
        x = x + 2.0**30
    if "far" in kind:
        x = x * 2.0**8 + 2.0**60
    if "zero" in kind:
        x[:, rng.integers(sizes[0])] = 0
        kernel, _ = layers[rng.integers(len(layers))]
        kernel[rng.integers(len(kernel))] = 0
    return (_rescaled(layers, rng) if "rescaled" in kind else layers), x


def _twin_units(layers, rng, little):
    kernel, bias = layers[rng.integers(len(layers) - 1)]
    i, j = rng.choice(kernel.shape[1], 2, replace=False)
    kernel[:, j] = kernel[:, i]
    if bias is not None:
        bias[j] = bias[i]
    kernel[rng.integers(len(kernel)), j] += little


def _rescaled(layers, rng):
    """Every hidden unit times 2^s, |s| ≤ 24, undone behind it."""
    moved, before = [], 0
    for i, (kernel, bias) in enumerate(layers):
        n = kernel.shape[1]
        after = rng.integers(-24, 25, n) if i < len(layers) - 1 else np.zeros(n, int)
        moved.append(
            (
                np.ldexp(kernel, after - np.reshape(before, (-1, 1))),
                None if bias is None else np.ldexp(bias, after),
            )
        )
        before = after
    return moved
