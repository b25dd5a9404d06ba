"""The factored tangent kernel: which parameters enter by one product, and what their part is.

For z = h·W, used nowhere else, ∂y/∂W = Σ_p h_p ⊗ δ_p over positions p, with δ = ∂y/∂z. The inner
product of two such rows is Σ_pq ⟨h_p, h'_q⟩⟨δ_p, δ'_q⟩, whatever the order of W's elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._interpreter.products import Perturbed, Product, gradient_of, operand_of, run, uses_of
from jaxinv._interpreter.walk import Trace
from jaxinv.typing import Array, DTypeLike, Inputs, Params

_EXACT = lax.Precision.HIGHEST
# Numbers in the product of gradients of one block of examples, at most.
_MOST_NUMBERS = 1 << 25


# h of every product, δ of every product for every output, rows of the other leaves
Features = tuple[list[Array], list[Array], Array]


class Factors(NamedTuple):
    """How to compute a block of the kernel."""

    of: Callable[[Params, Inputs], Features]  # features of (c, ...) examples
    block: Callable[[Features, Features], Array]  # (c·out, c'·out) from the features of two chunks
    most_examples: int  # in a chunk, so that a block fits in memory


def products_of(traced: Trace) -> list[Product]:
    """Leaves with one use in all, which is a product with something that depends on x."""
    once = [used[0] for used in uses_of(traced) if len(used) == 1 and used[0] is not None]
    return [product for product in once if product.groups == 1]


def _saves(product: Product, out: int) -> bool:
    """Whether the factored form takes fewer operations per pair of examples."""
    p, k, m = product.positions, product.inputs, product.outputs
    return p * p * (k + out * out * m) < out * out * k * m


def factors_of(
    one: Callable[[Params, Inputs], Array],
    params: Params,
    example: Inputs,
    dtype: DTypeLike,
    factored: bool,
) -> Factors:
    """Plan the kernel of `one(params, example) -> (out,)`."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), params)
    closed, result = jax.make_jaxpr(one, return_shape=True)(shapes, example)
    out, leaves = result.size, jax.tree.leaves(shapes)
    traced = Trace(closed, len(leaves), [], jax.tree.structure(result))
    products = [p for p in products_of(traced) if factored and _saves(p, out)]
    perturbed = [product.eqn.outputs[0] for product in products]
    rest = [i for i in range(len(leaves)) if i not in {p.leaf for p in products}]

    def features(params: Params, example: Inputs) -> Features:
        """(h of every product, δ of every product for every output, rows of the other leaves)."""
        weights, inputs = jax.tree.leaves(params), jax.tree.leaves(example)

        def f(perturbations: list[Array], others: list[Array]) -> tuple[Array, list[Array]]:
            whole = list(weights)
            for i, leaf in zip(rest, others, strict=True):
                whole[i] = leaf
            return run(traced, whole, inputs, Perturbed(traced, products, perturbations))

        zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in perturbed]
        others = [weights[i] for i in rest]
        _, pull, operands = jax.vjp(f, zeros, others, has_aux=True)
        deltas, rows = jax.vmap(pull)(jnp.eye(out, dtype=dtype))
        shaped = [
            jax.vmap(lambda d, p=p: gradient_of(p, d)[:, 0])(delta).astype(dtype)
            for p, delta in zip(products, deltas, strict=True)
        ]
        flat = [row.reshape(out, -1).astype(dtype) for row in rows]
        flat.append(jnp.zeros((out, 0), dtype))
        operands = [operand_of(p, h)[:, 0] for p, h in zip(products, operands, strict=True)]
        return [h.astype(dtype) for h in operands], shaped, jnp.concatenate(flat, 1)

    def block(a: Features, b: Features) -> Array:
        rows_a, rows_b = (
            rows.reshape(rows.shape[0] * out, rows.shape[-1]) for rows in (a[2], b[2])
        )
        total = jnp.matmul(rows_a, rows_b.T, precision=_EXACT)
        for h, d, k, e in zip(a[0], a[1], b[0], b[1], strict=True):
            if h.shape[1] == 1:
                inner = jnp.matmul(h[:, 0], k[:, 0].T, precision=_EXACT)
                outer = jnp.einsum("aom,brm->aobr", d[:, :, 0], e[:, :, 0], precision=_EXACT)
                part = inner[:, None, :, None] * outer
            else:
                inner = jnp.einsum("apk,bqk->apbq", h, k, precision=_EXACT)
                outer = jnp.einsum("aopm,brqm->aopbrq", d, e, precision=_EXACT)
                part = jnp.einsum("apbq,aopbrq->aobr", inner, outer, precision=_EXACT)
            total = total + part.reshape(total.shape)
        return total

    widest = max((out * p.positions for p in products), default=1)
    most = max(1, int(_MOST_NUMBERS**0.5) // widest)
    return Factors(lambda params, x: jax.vmap(features, (None, 0))(params, x), block, most)
