"""The factored tangent kernel: which parameters enter by one product, and what their part is.

For z = h·W, used nowhere else, ∂y/∂W = Σ_p h_p ⊗ δ_p over positions p, with δ = ∂y/∂z. The inner
product of two such rows is Σ_pq ⟨h_p, h'_q⟩⟨δ_p, δ'_q⟩, whatever the order of W's elements. δ is
found by differentiating in a perturbation of z, at 0. The program of one example is read for such
products; calls of `jit` are entered, everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import (
    Equation,
    Trace,
    Value,
    evaluate_alone,
    interpret,
    open_jaxpr,
    primitive,
)
from jaxinv.typing import Array, DTypeLike, Inputs, Params

_EXACT = lax.Precision.HIGHEST
_JIT = {primitive("jit"), primitive("pjit")} - {None}
# They move elements about, one to one if the size stays.
_MOVES = {"transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "copy"}
# Numbers in the product of gradients of one block of examples, at most.
_MOST_NUMBERS = 1 << 25


class _Product(NamedTuple):
    """An equation z = h·W (or W·h) where W is a leaf of the parameters."""

    eqn: Equation
    leaf: int
    operand: int  # which operand is W
    positions: int
    inputs: int  # length of h_p
    outputs: int  # length of δ_p


def _place(eqn: Equation) -> tuple[int, ...]:
    """Where in the program: two calls of one function have their equations in common."""
    return tuple(map(id, eqn.raws))


class Factors(NamedTuple):
    """How to compute a block of the kernel."""

    of: Callable[[Params, Inputs], Any]  # features of (c, ...) examples
    block: Callable[[Any, Any], Array]  # (c·out, c'·out) from the features of two chunks
    most_examples: int  # in a chunk, so that a block fits in memory


# --- reading the program --------------------------------------------------------------


class _Whole:
    """A reading of the program where all but calls of `jit` are single operations."""

    as_written = True
    rules: dict[Any, Callable[..., Any]] = {}

    # What an operation gives; its inputs are values, or arrays that `fn` closes over.
    results: Callable[[Equation, Iterable[Any]], list[Any]]

    def default(self, eqn: Equation, *inputs: Any) -> Any:
        results = self.results(eqn, inputs)
        return results if eqn.primitive.multiple_results else results[0]

    def called(self, eqn: Equation, inputs: list[Any], walk: Callable[[], list]) -> list[Any]:
        return walk() if eqn.primitive in _JIT else self.results(eqn, inputs)


class _Origin(Value):
    """Which leaf of the parameters a value is, elements moved; else whether it depends on x."""

    __slots__ = ("leaf", "data")

    def __init__(self, leaf: int | None, data: bool):
        self.key, self.leaf, self.data = object(), leaf, data


def _leaf_of(value: object) -> int | None:
    return value.leaf if isinstance(value, _Origin) else None


class _Uses(_Whole):
    """The uses of every leaf: a product with something that depends on x, or None."""

    def __init__(self, num_leaves: int):
        self.of: list[list[_Product | None]] = [[] for _ in range(num_leaves)]

    def results(self, eqn: Equation, inputs: Iterable[Any]) -> list[Any]:
        inputs = list(inputs)
        if _only_moves(eqn) and (leaf := _leaf_of(inputs[0])) is not None:
            return [_Origin(leaf, False)]
        depends = [isinstance(v, _Origin) and v.data for v in inputs]
        for operand, leaf in enumerate(map(_leaf_of, inputs)):
            if leaf is not None:
                other = len(inputs) == 2 and depends[1 - operand]
                self.of[leaf].append(_product(eqn, leaf, operand) if other else None)
        return [_Origin(None, any(depends)) for _ in eqn.outputs]


def _only_moves(eqn: Equation) -> bool:
    return eqn.name in _MOVES and eqn.outputs[0].size == eqn.inputs[0].size


def _find_products(traced: Trace) -> list[_Product]:
    """Leaves with one use in all, which is a product with something that depends on x."""
    uses = _Uses(traced.num_params)
    leaves = [_Origin(i, False) for i in range(traced.num_params)]
    given = open_jaxpr(traced.jaxpr)[0].invars[traced.num_params :]
    for output in interpret(traced, leaves, [_Origin(None, True) for _ in given], uses):
        if (leaf := _leaf_of(output)) is not None:
            uses.of[leaf].append(None)
    return [used[0] for used in uses.of if len(used) == 1 and used[0] is not None]


def _product(eqn: Equation, leaf: int, operand: int) -> _Product | None:
    weight, result = eqn.inputs[operand], eqn.outputs[0]
    if eqn.primitive is lax.dot_general_p:
        contracting, batch = eqn.params["dimension_numbers"]
        if batch[0]:
            return None
        inputs = int(np.prod([weight.shape[a] for a in contracting[operand]]))
        outputs = weight.size // max(inputs, 1)
    elif eqn.primitive is lax.conv_general_dilated_p and operand == 1:
        if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
            return None
        outputs = weight.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        inputs = weight.size // max(outputs, 1)
    else:
        return None
    if not weight.size:
        return None
    return _Product(eqn, leaf, operand, result.size // outputs, inputs, outputs)


def _saves(product: _Product, out: int) -> bool:
    """Whether the factored form takes fewer operations per pair of examples."""
    p, k, m = product.positions, product.inputs, product.outputs
    return p * p * (k + out * out * m) < out * out * k * m


# --- running it -----------------------------------------------------------------------


class _Traced(Value):
    """An array that the program computes."""

    __slots__ = ("array",)

    def __init__(self, array: Array):
        self.key, self.array = object(), array


def _array(value: Any) -> Any:
    return value.array if isinstance(value, _Traced) else value


class _Perturbed(_Whole):
    """The program itself, with something added to the result of every product.

    The other operands of the products are noted.
    """

    def __init__(self, traced: Trace, products: list[_Product], perturbations: list[Array]):
        self.debug_info = open_jaxpr(traced.jaxpr)[0].debug_info
        self.index = {_place(product.eqn): i for i, product in enumerate(products)}
        self.products, self.perturbations = products, perturbations
        self.operands: list[Any] = [None] * len(products)

    def results(self, eqn: Equation, inputs: Iterable[Any]) -> list[Any]:
        arrays = [_array(v) for v in inputs]
        results = evaluate_alone(eqn.raws[0], arrays, self.debug_info)
        i = self.index.get(_place(eqn))
        if i is not None:
            product = self.products[i]
            self.operands[i] = _operand(product, arrays[1 - product.operand])
            results = [results[0] + self.perturbations[i]]
        return [_Traced(result) for result in results]


def _run(
    traced: Trace, weights: list[Array], inputs: list[Array], domain: _Perturbed
) -> tuple[Array, list[Array]]:
    """(the output, the operand of every product)."""
    given = [[_Traced(a) for a in arrays] for arrays in (weights, inputs)]
    (output,) = interpret(traced, given[0], given[1], domain)
    return _array(output), domain.operands


def _operand(product: _Product, h: Array) -> Array:
    """h as (positions, inputs)."""
    eqn = product.eqn
    if eqn.primitive is lax.dot_general_p:
        axes = list(eqn.params["dimension_numbers"][0][1 - product.operand])
        free = [a for a in range(h.ndim) if a not in axes]
        return h.transpose(*free, *axes).reshape(product.positions, product.inputs)
    spec = eqn.params["dimension_numbers"]
    kernel = eqn.inputs[1].shape
    patches = lax.conv_general_dilated_patches(
        h.transpose(spec.lhs_spec),
        [kernel[a] for a in spec.rhs_spec[2:]],
        eqn.params["window_strides"],
        eqn.params["padding"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        precision=_EXACT,
    )
    return jnp.moveaxis(patches, 1, -1).reshape(product.positions, product.inputs)


def _gradient(product: _Product, delta: Array) -> Array:
    """δ as (positions, outputs)."""
    eqn = product.eqn
    if eqn.primitive is lax.dot_general_p:
        if product.operand == 0:
            return delta.reshape(product.outputs, product.positions).T
        return delta.reshape(product.positions, product.outputs)
    moved = delta.transpose(eqn.params["dimension_numbers"].out_spec)
    return jnp.moveaxis(moved, 1, -1).reshape(product.positions, product.outputs)


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
    products = [p for p in _find_products(traced) if factored and _saves(p, out)]
    perturbed = [product.eqn.outputs[0] for product in products]
    rest = [i for i in range(len(leaves)) if i not in {p.leaf for p in products}]

    def features(params: Params, example: Inputs) -> tuple[list[Array], list[Array], Array]:
        """(h of every product, δ of every product for every output, rows of the other leaves)."""
        weights, inputs = jax.tree.leaves(params), jax.tree.leaves(example)

        def f(perturbations: list[Array], others: list[Array]) -> tuple[Array, list[Array]]:
            whole = list(weights)
            for i, leaf in zip(rest, others, strict=True):
                whole[i] = leaf
            return _run(traced, whole, inputs, _Perturbed(traced, products, perturbations))

        zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in perturbed]
        others = [weights[i] for i in rest]
        _, pull, operands = jax.vjp(f, zeros, others, has_aux=True)
        deltas, rows = jax.vmap(pull)(jnp.eye(out, dtype=dtype))
        shaped = [
            jax.vmap(lambda d, p=p: _gradient(p, d))(delta).astype(dtype)
            for p, delta in zip(products, deltas, strict=True)
        ]
        flat = [row.reshape(out, -1).astype(dtype) for row in rows]
        flat.append(jnp.zeros((out, 0), dtype))
        return [h.astype(dtype) for h in operands], shaped, jnp.concatenate(flat, 1)

    def block(a: Any, b: Any) -> Array:
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
