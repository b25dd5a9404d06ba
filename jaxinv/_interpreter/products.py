"""Products of parameters with what depends on the data, and the factors of their gradients.

For z = h·W, W a leaf of the parameters, ∂y/∂W = Σ_p h_p ⊗ δ_p over positions p, with δ = ∂y/∂z. To
find δ one differentiates in a perturbation of z, at 0, and no gradient in W is ever made. The
program is read for such products; calls of `jit` are entered, everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import (
    Equation,
    Operand,
    Rules,
    Trace,
    Value,
    evaluate_alone,
    interpret,
    open_jaxpr,
    primitive,
)
from jaxinv.typing import Array

_EXACT = lax.Precision.HIGHEST
_JIT = {primitive("jit"), primitive("pjit")} - {None}
# They move elements about, one to one if the size stays.
_MOVES = {"transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "copy"}


class Product(NamedTuple):
    """An equation z = h·W (or W·h) where W is a leaf of the parameters, its elements moved about.

    In groups, as of heads or of a grouped convolution, there is one product per group.
    """

    eqn: Equation
    leaf: int
    operand: int  # which operand is W
    moves: tuple[Equation, ...]  # from the leaf to W
    positions: int
    groups: int
    inputs: int  # length of h_p, per group
    outputs: int  # length of δ_p, per group


def _place(eqn: Equation) -> tuple[int, ...]:
    """Where in the program: two calls of one function have their equations in common."""
    return tuple(map(id, eqn.raws))


# --- reading the program --------------------------------------------------------------


class _Whole:
    """A reading of the program where all but calls of `jit` are single operations."""

    as_written = True
    rules: Rules = {}

    # What an operation gives; its inputs are values, or arrays that `fn` closes over.
    results: Callable[[Equation, Iterable[Operand]], list[Value]]

    def default(self, eqn: Equation, *inputs: Operand) -> Value | list[Value]:
        results = self.results(eqn, inputs)
        return results if eqn.primitive.multiple_results else results[0]

    def called(self, eqn: Equation, inputs: list[Operand], walk: Callable[[], list]) -> list[Value]:
        return walk() if eqn.primitive in _JIT else self.results(eqn, inputs)


class _Origin(Value):
    """Which leaf of the parameters a value is, elements moved; else whether it depends on x."""

    __slots__ = ("leaf", "data", "moves")

    def __init__(self, leaf: int | None, data: bool, moves: tuple[Equation, ...] = ()):
        self.key, self.leaf, self.data, self.moves = object(), leaf, data, moves


def _leaf_of(value: object) -> int | None:
    return value.leaf if isinstance(value, _Origin) else None


class _Uses(_Whole):
    """The uses of every leaf: a product with something that depends on x, or None."""

    def __init__(self, num_leaves: int):
        self.of: list[list[Product | None]] = [[] for _ in range(num_leaves)]

    def results(self, eqn: Equation, inputs: Iterable[Operand]) -> list[Value]:
        inputs = list(inputs)
        first = inputs[0] if inputs else None
        if _only_moves(eqn) and isinstance(first, _Origin) and first.leaf is not None:
            return [_Origin(first.leaf, False, (*first.moves, eqn))]
        depends = [isinstance(v, _Origin) and v.data for v in inputs]
        for operand, value in enumerate(inputs):
            if isinstance(value, _Origin) and value.leaf is not None:
                other = len(inputs) == 2 and depends[1 - operand]
                product = _product(eqn, value.leaf, operand, value.moves) if other else None
                self.of[value.leaf].append(product)
        return [_Origin(None, any(depends)) for _ in eqn.outputs]


def _only_moves(eqn: Equation) -> bool:
    return eqn.name in _MOVES and eqn.outputs[0].size == eqn.inputs[0].size


def uses_of(traced: Trace) -> list[list[Product | None]]:
    """The uses of every leaf: a product with something that depends on x, or None for others."""
    uses = _Uses(traced.num_params)
    leaves = [_Origin(i, False) for i in range(traced.num_params)]
    given = open_jaxpr(traced.jaxpr)[0].invars[traced.num_params :]
    for output in interpret(traced, leaves, [_Origin(None, True) for _ in given], uses):
        if (leaf := _leaf_of(output)) is not None:
            uses.of[leaf].append(None)
    return uses.of


def _product(eqn: Equation, leaf: int, operand: int, moves: tuple[Equation, ...]) -> Product | None:
    weight, result = eqn.inputs[operand], eqn.outputs[0]
    if eqn.primitive is lax.dot_general_p:
        contracting, batch = eqn.params["dimension_numbers"]
        groups = int(np.prod([weight.shape[a] for a in batch[operand]]))
        inputs = int(np.prod([weight.shape[a] for a in contracting[operand]]))
    elif eqn.primitive is lax.conv_general_dilated_p and operand == 1:
        if eqn.params["batch_group_count"] != 1:
            return None
        groups = eqn.params["feature_group_count"]
        spec = eqn.params["dimension_numbers"].rhs_spec
        inputs = int(np.prod([weight.shape[a] for a in spec[1:]]))
    else:
        return None
    if not weight.size:
        return None
    outputs = weight.size // (inputs * groups)
    positions = result.size // (outputs * groups)
    return Product(eqn, leaf, operand, moves, positions, groups, inputs, outputs)


# --- running it -----------------------------------------------------------------------


class _Traced(Value):
    """An array that the program computes, None where it drops it."""

    __slots__ = ("array",)

    def __init__(self, array: Array | None):
        self.key, self.array = object(), array


def _array(value: Operand) -> Array:
    found = value.array if isinstance(value, _Traced) else value
    return cast(Array, found)  # not one that the program drops


class Perturbed(_Whole):
    """The program itself, with something added to the result of every product.

    The other operands of the products are noted.
    """

    def __init__(self, traced: Trace, products: list[Product], perturbations: list[Array]):
        self.debug_info = open_jaxpr(traced.jaxpr)[0].debug_info
        self.index = {_place(product.eqn): i for i, product in enumerate(products)}
        self.products, self.perturbations = products, perturbations
        self.operands: dict[int, Array] = {}

    def results(self, eqn: Equation, inputs: Iterable[Operand]) -> list[Value]:
        arrays = [_array(v) for v in inputs]
        results = evaluate_alone(eqn.raws[0], arrays, self.debug_info)
        i = self.index.get(_place(eqn))
        if i is not None:
            self.operands[i] = arrays[1 - self.products[i].operand]
            (result,) = results
            assert result is not None
            results = [result + self.perturbations[i]]
        return [_Traced(result) for result in results]


def run(
    traced: Trace, weights: list[Array], inputs: list[Array], domain: Perturbed
) -> tuple[Array, list[Array]]:
    """(the output, the other operand h of every product)."""
    given = [[_Traced(a) for a in arrays] for arrays in (weights, inputs)]
    (output,) = interpret(traced, given[0], given[1], domain)
    return _array(output), [domain.operands[i] for i in range(len(domain.products))]


# --- operands, gradients and weights in one layout ----------------------------------------


def operand_of(product: Product, h: Array) -> Array:
    """h as (positions, groups, inputs)."""
    eqn = product.eqn
    shape = (product.positions, product.groups, product.inputs)
    if eqn.primitive is lax.dot_general_p:
        contracting, batch = eqn.params["dimension_numbers"]
        met, apart = (list(axes[1 - product.operand]) for axes in (contracting, batch))
        free = [a for a in range(h.ndim) if a not in (*met, *apart)]
        return h.transpose(*free, *apart, *met).reshape(shape)
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
    return jnp.moveaxis(patches, 1, -1).reshape(shape)


def input_axes(product: Product) -> list[int]:
    """The axes of h along which groups and inputs lie; of a convolution, that of the channels."""
    dimensions = product.eqn.params["dimension_numbers"]
    if product.eqn.primitive is lax.dot_general_p:
        contracting, batch = dimensions
        return [*batch[1 - product.operand], *contracting[1 - product.operand]]
    return [dimensions.lhs_spec[1]]


def gradient_of(product: Product, delta: Array) -> Array:
    """δ as (positions, groups, outputs)."""
    eqn = product.eqn
    p, g, m = product.positions, product.groups, product.outputs
    if eqn.primitive is lax.dot_general_p:
        if product.operand == 0:
            return delta.reshape(g, m, p).transpose(2, 0, 1)
        return delta.reshape(g, p, m).transpose(1, 0, 2)
    moved = delta.transpose(eqn.params["dimension_numbers"].out_spec)
    return jnp.moveaxis(moved, 1, -1).reshape(p, g, m)


def as_leaf(product: Product, array: Array, shape: tuple[int, ...]) -> Array:
    """An array (groups, inputs, outputs) of numbers per weight in the layout of the leaf."""
    weight = product.eqn.inputs[product.operand].shape
    dimensions = product.eqn.params["dimension_numbers"]
    if product.eqn.primitive is lax.dot_general_p:
        met, apart = (list(axes[product.operand]) for axes in dimensions)
        order = [*apart, *met, *(a for a in range(len(weight)) if a not in (*met, *apart))]
    else:
        # All groups' outputs are one axis of the kernel.
        array = jnp.moveaxis(array, 0, 1).reshape(product.inputs, -1)
        order = [*dimensions.rhs_spec[1:], dimensions.rhs_spec[0]]
    array = array.reshape([weight[a] for a in order]).transpose(np.argsort(order))
    if not product.moves:
        return array

    def moved(leaf: Array) -> Array:
        for eqn in product.moves:
            if eqn.name != "convert_element_type":
                leaf = eqn.bind(leaf)
        return leaf

    # Moves are permutations, whose inverse is their transpose.
    (leaf,) = jax.linear_transpose(moved, jax.ShapeDtypeStruct(shape, array.dtype))(array)
    return leaf
