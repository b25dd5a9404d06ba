"""Squares of the gradients of every example, summed over the examples, without those gradients.

For z = h·W with one position per example, Σ_i (∂s_i/∂W)² = (h²)ᵀ(δ²) with δ = ∂s/∂z: one product
for the batch. With several positions, or several uses of W, the gradient of an example is a sum of
products; those of one layer are made for some examples at a time, and those of two layers never
together. What is no such product (biases, gains, embeddings) has its gradient per example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._interpreter import walk
from jaxinv._interpreter.products import (
    Perturbed,
    Product,
    as_leaf,
    gradient_of,
    input_axes,
    operand_of,
    run,
    uses_of,
)
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.typing import Array, DType

_EXACT = lax.Precision.HIGHEST
# Numbers in the gradients of one layer for the examples that are taken together, at most.
_MOST_NUMBERS = 1 << 22


def mean_squares(
    units: Callable[[list[Array], list[Array]], list[Array]],
    leaves: list[Array],
    inputs: list[Array],
    dtype: DType,
    centered: bool,
    probes: int | None,
    key: Array | None,
) -> list[Scaled]:
    """Σ_v mean_i (∂s_iv/∂w)² of the units s, exactly or from random signs.

    Args:
        units: (leaves, inputs) -> numbers of the units, each with the examples in front.
        leaves: the parameters.
        inputs: each with the examples in front.
        dtype: of the results.
        centered: variances over the examples in place of mean squares.
        probes, key: as for `data_dependent_path_kappa`.
    """
    n = len(inputs[0])

    def of_example(leaves: list[Array], example: list[Array]) -> Array:
        return jnp.concatenate([a.ravel() for a in units(leaves, [a[None] for a in example])])

    example = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in inputs]
    traced = walk.trace(of_example, leaves, example)
    size = sum(walk.aval_of(v).size for v in walk.open_jaxpr(traced.jaxpr)[0].outvars)
    used = [
        [p for p in uses if p is not None] if uses and all(uses) else [] for uses in uses_of(traced)
    ]

    def signs(row: Array) -> Array:
        if probes is None:
            return jnp.broadcast_to(jax.nn.one_hot(row, size, dtype=dtype), (n, size))
        # Variances over the examples need one sign per unit; signs of examples average out sooner.
        if centered:
            return jnp.broadcast_to(jax.random.rademacher(row, (size,), dtype), (n, size))
        return jax.random.rademacher(row, (n, size), dtype)

    def of_probe(row: Array) -> list[Scaled]:
        return _of_signs(traced, leaves, inputs, used, signs(row), centered)

    if probes is None or key is None:
        rows: Array = jnp.arange(size)
    else:
        rows = jax.random.split(key, probes)
        if probes == 1:
            return of_probe(rows[0])

    def step(total: list[Scaled], row: Array) -> tuple[list[Scaled], None]:
        return [scaled.add([t, m]) for t, m in zip(total, of_probe(row), strict=True)], None

    start = [Scaled(jnp.zeros_like(w), jnp.zeros(w.shape, jnp.int32)) for w in leaves]
    total, _ = lax.scan(step, start, rows)
    return [s._replace(mantissa=s.mantissa / (probes or 1)) for s in total]


def _of_signs(
    traced: walk.Trace,
    leaves: list[Array],
    inputs: list[Array],
    used: list[list[Product]],
    signs: Array,
    centered: bool,
) -> list[Scaled]:
    """mean_i (∂Σ_v ±s_iv/∂w)² of every leaf."""
    products = [p for uses in used for p in uses]
    rest = [i for i, uses in enumerate(used) if not uses]

    def features(signs: Array, example: list[Array]) -> tuple[list[Array], ...]:
        def outputs(added: list[Array], others: list[Array]) -> tuple[Array, list[Array]]:
            whole = list(leaves)
            for i, leaf in zip(rest, others, strict=True):
                whole[i] = leaf
            return run(traced, whole, example, Perturbed(traced, products, added))

        avals = [p.eqn.outputs[0] for p in products]
        zeros = [jnp.zeros(a.shape, a.dtype) for a in avals]
        _, pull, h = jax.vjp(outputs, zeros, [leaves[i] for i in rest], has_aux=True)
        return h, *pull(signs)

    h, delta, others = jax.vmap(features)(signs, inputs)
    found: dict[int, Scaled] = {}
    for i, slopes in zip(rest, others, strict=True):
        if centered:
            slopes = slopes - slopes.mean(axis=0)
        found[i] = scaled.mean(scaled.power_along(slopes, 2.0, signs.dtype))
    pairs = dict(zip(map(id, products), zip(h, delta, strict=True), strict=True))
    for i, uses in enumerate(used):
        if uses:
            parts = [(p, *pairs[id(p)]) for p in uses]
            found[i] = _of_leaf(leaves[i].shape, parts, centered, signs.dtype)
    return [found[i] for i in range(len(leaves))]


def _of_leaf(
    shape: tuple[int, ...],
    parts: Sequence[tuple[Product, Array, Array]],
    centered: bool,
    dtype: DType,
) -> Scaled:
    """mean_i (Σ over the uses of h_iᵀ·δ_i)² of one leaf, from h and δ of all examples."""
    n = len(parts[0][1])
    operands, gradients, exponents = [], [], []
    for product, h, delta in parts:
        h, of_inputs = _even_inputs(product, h.astype(dtype))
        delta, k = scaled.by_index(
            jax.vmap(partial(gradient_of, product))(delta.astype(dtype)), (2, 3)
        )
        operands.append(h)
        gradients.append(delta)
        both = of_inputs[:, :, None] + k.reshape(product.groups, 1, product.outputs)
        # In float32, which holds them exactly: moves of elements are transposed as linear maps.
        exponents.append(as_leaf(product, both.astype(jnp.float32), shape).astype(jnp.int32))
    top = exponents[0]
    for exponent in exponents[1:]:
        top = jnp.maximum(top, exponent)
    if len(parts) == 1 and parts[0][0].positions == 1 and not centered:
        (product, _, _), h, delta = parts[0], operands[0], gradients[0]
        h = jax.vmap(partial(operand_of, product))(h)[:, 0]
        squares = jnp.einsum("ngk,ngm->gkm", h**2, delta[:, 0] ** 2, precision=_EXACT)
        return Scaled(as_leaf(product, squares, shape) / n, 2 * top)

    def slopes(h: Sequence[Array], delta: Sequence[Array]) -> Array:
        """Gradients of one example, in units of 2^top."""
        total = jnp.zeros(shape, dtype)
        for (product, _, _), a, b, exponent in zip(parts, h, delta, exponents, strict=True):
            own = jnp.einsum("pgk,pgm->gkm", operand_of(product, a), b, precision=_EXACT)
            own = as_leaf(product, own, shape)
            total = total + (own if len(parts) == 1 else scaled.shift(own, exponent - top))
        return total

    numbers = [max(p.groups * p.inputs * max(p.outputs, p.positions), 1) for p, _, _ in parts]
    together = max(1, min(n, _MOST_NUMBERS // sum(numbers)))
    chunks = -(-n // together)
    together = -(-n // chunks)
    real = jnp.ones(n, dtype)

    def chunked(a: Array) -> Array:
        a = jnp.pad(a, [(0, chunks * together - n), *[(0, 0)] * (a.ndim - 1)])
        return a.reshape(chunks, together, *a.shape[1:])

    data = jax.tree.map(chunked, (operands, gradients, real))

    def over_chunks(f: Callable[[Array, Array], Array]) -> Array:
        def add(total: Array, part: tuple[list[Array], list[Array], Array]) -> tuple[Array, None]:
            h, delta, real = part
            return total + f(jax.vmap(slopes)(h, delta), real), None

        return lax.scan(add, jnp.zeros(shape, dtype), data)[0] / n

    if not centered:
        return Scaled(over_chunks(lambda g, real: (g * g).sum(axis=0)), 2 * top)
    mean = over_chunks(lambda g, real: g.sum(axis=0))

    def deviations(g: Array, real: Array) -> Array:
        return jnp.einsum("n...,n->...", (g - mean) ** 2, real)

    return Scaled(over_chunks(deviations), 2 * top)


def _even_inputs(product: Product, h: Array) -> tuple[Array, Array]:
    """h with a power of two taken out per input, and the exponents (groups, inputs)."""
    axes = [a + 1 for a in input_axes(product)]
    h, k = scaled.by_index(h, axes)
    k = k.transpose([*(a for a in range(k.ndim) if a not in axes), *axes])
    # An input of a convolution is there once for every place of the kernel.
    k = k.reshape(product.groups, -1, 1)
    taps = product.inputs // k.shape[1]
    return h, jnp.broadcast_to(k, (*k.shape[:2], taps)).reshape(product.groups, product.inputs)


__all__ = ["mean_squares"]
