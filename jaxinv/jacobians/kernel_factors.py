"""The factored tangent kernel: which parameters enter by one product, and what their part is.

For z = h·W, used nowhere else, ∂y/∂W = Σ_p h_p ⊗ δ_p over positions p, with δ = ∂y/∂z. The inner
product of two such rows is Σ_pq ⟨h_p, h'_q⟩⟨δ_p, δ'_q⟩, whatever the order of W's elements. δ is
found by differentiating in a zero that is added to z. The jaxpr of one example is read for such
products; calls of `jit` are looked into, everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import primitive
from jaxinv.typing import Array, Inputs, Params

_EXACT = lax.Precision.HIGHEST
_JIT = {primitive("jit"), primitive("pjit")} - {None}
# They move elements about, one to one if the size stays.
_MOVES = {"transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "copy"}
# Numbers in the product of gradients of one block of examples, at most.
_MOST_NUMBERS = 1 << 25


class _Product(NamedTuple):
    """An equation z = h·W (or W·h) where W is a leaf of the parameters."""

    path: tuple[int, ...]  # indices of the equation and of the jit calls around it
    leaf: int
    operand: int  # which operand is W
    positions: int
    inputs: int  # length of h_p
    outputs: int  # length of δ_p


class Factors(NamedTuple):
    """How to compute a block of the kernel."""

    of: Callable[[Params, Inputs], Any]  # features of (c, ...) examples
    block: Callable[[Any, Any], Array]  # (c·out, c'·out) from the features of two chunks
    most_examples: int  # in a chunk, so that a block fits in memory


# --- reading the jaxpr ----------------------------------------------------------------


def _inner(eqn: Any) -> Any:
    return eqn.params["jaxpr"]


def _find_products(closed: Any, num_leaves: int) -> list[_Product]:
    """Leaves with one use in all, which is a product with something that depends on x."""
    uses: dict[int, list[_Product | None]] = {i: [] for i in range(num_leaves)}

    def walk(jaxpr: Any, origin: dict, data: set, path: tuple[int, ...]) -> None:
        for number, eqn in enumerate(jaxpr.eqns):
            at = (*path, number)
            found = [None if isinstance(v, jex.Literal) else origin.get(v) for v in eqn.invars]
            depends = [not isinstance(v, jex.Literal) and v in data for v in eqn.invars]
            if eqn.primitive in _JIT:
                inner = _inner(eqn).jaxpr
                names = list(zip(inner.invars, found, depends, strict=True))
                inside = {v: o for v, o, _ in names if o is not None}
                within = {v for v, _, d in names if d}
                walk(inner, inside, within, at)
                for outer, v in zip(eqn.outvars, inner.outvars, strict=True):
                    if not isinstance(v, jex.Literal):
                        if v in within:
                            data.add(outer)
                        if v in inside:
                            origin[outer] = inside[v]
                continue
            size = [v.aval.size for v in eqn.outvars]
            if (
                eqn.primitive.name in _MOVES
                and found[0] is not None
                and size == [eqn.invars[0].aval.size]
            ):
                origin[eqn.outvars[0]] = found[0]
                continue
            for operand, leaf in enumerate(found):
                if leaf is not None:
                    other = len(found) == 2 and depends[1 - operand]
                    uses[leaf].append(_product(eqn, at, leaf, operand) if other else None)
            if any(depends):
                data.update(eqn.outvars)
        if not path:
            for v in jaxpr.outvars:
                leaf = None if isinstance(v, jex.Literal) else origin.get(v)
                if leaf is not None:
                    uses[leaf].append(None)

    jaxpr = closed.jaxpr
    origin = dict(zip(jaxpr.invars[:num_leaves], range(num_leaves), strict=True))
    walk(jaxpr, origin, set(jaxpr.invars[num_leaves:]), ())
    return [used[0] for used in uses.values() if len(used) == 1 and used[0] is not None]


def _product(eqn: Any, path: tuple[int, ...], leaf: int, operand: int) -> _Product | None:
    weight, result = eqn.invars[operand].aval, eqn.outvars[0].aval
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
    return _Product(path, leaf, operand, result.size // outputs, inputs, outputs)


def _saves(product: _Product, out: int) -> bool:
    """Whether the factored form takes fewer operations per pair of examples."""
    p, k, m = product.positions, product.inputs, product.outputs
    return p * p * (k + out * out * m) < out * out * k * m


# --- running it -----------------------------------------------------------------------


def _run(closed: Any, arguments: list[Any], taps: dict, added: list[Array], seen: list) -> list:
    """Evaluate, adding `added` to the results of the products and noting their other operands."""

    def evaluate(jaxpr: Any, consts: Any, arguments: Any, path: tuple[int, ...]) -> list:
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jex.Literal) else values[v]

        for number, eqn in enumerate(jaxpr.eqns):
            at = (*path, number)
            inputs = [read(v) for v in eqn.invars]
            if eqn.primitive in _JIT:
                inner = _inner(eqn)
                results = evaluate(inner.jaxpr, inner.consts, inputs, at)
            else:
                results = _bind(eqn, inputs, closed.jaxpr.debug_info)
            if at in taps:
                index, product = taps[at]
                results = [results[0] + added[index]]
                seen[index] = _operand(eqn, product, inputs[1 - product.operand])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return evaluate(closed.jaxpr, closed.consts, arguments, ())


def _bind(eqn: Any, inputs: list[Any], debug_info: Any) -> list[Any]:
    """The equation on other values, as a program of its own, so that custom derivatives stay."""
    given = {
        v: value
        for v, value in zip(eqn.invars, inputs, strict=True)
        if not isinstance(v, jex.Literal)
    }
    dropped = [type(v).__name__ == "DropVar" for v in eqn.outvars]
    kept = [v for v, drop in zip(eqn.outvars, dropped, strict=True) if not drop]
    info = debug_info._replace(arg_names=tuple(map(str, given)), result_paths=tuple(map(str, kept)))
    alone = jex.Jaxpr([], list(given), kept, [eqn], eqn.effects, debug_info=info)
    results = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, []))(*given.values()))
    return [None if drop else next(results) for drop in dropped]


def _operand(eqn: Any, product: _Product, h: Array) -> Array:
    """h as (positions, inputs)."""
    if eqn.primitive is lax.dot_general_p:
        axes = list(eqn.params["dimension_numbers"][0][1 - product.operand])
        free = [a for a in range(h.ndim) if a not in axes]
        return h.transpose(*free, *axes).reshape(product.positions, product.inputs)
    spec = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
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


def _gradient(eqn: Any, product: _Product, delta: Array) -> Array:
    """δ as (positions, outputs)."""
    if eqn.primitive is lax.dot_general_p:
        if product.operand == 0:
            return delta.reshape(product.outputs, product.positions).T
        return delta.reshape(product.positions, product.outputs)
    moved = delta.transpose(eqn.params["dimension_numbers"].out_spec)
    return jnp.moveaxis(moved, 1, -1).reshape(product.positions, product.outputs)


def _equation_at(closed: Any, path: tuple[int, ...]) -> Any:
    jaxpr = closed.jaxpr
    for number in path[:-1]:
        jaxpr = _inner(jaxpr.eqns[number]).jaxpr
    return jaxpr.eqns[path[-1]]


def factors_of(
    one: Callable[[Params, Inputs], Array],
    params: Params,
    example: Inputs,
    dtype: Any,
    factored: bool,
) -> Factors:
    """Plan the kernel of `one(params, example) -> (out,)`."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), params)
    closed, result = jax.make_jaxpr(one, return_shape=True)(shapes, example)
    out, leaves = result.size, jax.tree.leaves(shapes)
    products = [p for p in _find_products(closed, len(leaves)) if factored and _saves(p, out)]
    taps = {product.path: (i, product) for i, product in enumerate(products)}
    equations = [_equation_at(closed, product.path) for product in products]
    rest = [i for i in range(len(leaves)) if i not in {p.leaf for p in products}]

    def features(params: Params, example: Inputs) -> tuple[list[Array], list[Array], Array]:
        """(h of every product, δ of every product for every output, rows of the other leaves)."""
        weights, inputs = jax.tree.leaves(params), jax.tree.leaves(example)

        def f(added: list[Array], others: list[Array]) -> tuple[Array, list]:
            whole = list(weights)
            for i, leaf in zip(rest, others, strict=True):
                whole[i] = leaf
            seen: list[Any] = [None] * len(products)
            (y,) = _run(closed, [*whole, *inputs], taps, added, seen)
            return y, seen

        zeros = [jnp.zeros(e.outvars[0].aval.shape, e.outvars[0].aval.dtype) for e in equations]
        others = [weights[i] for i in rest]
        _, pull, seen = jax.vjp(f, zeros, others, has_aux=True)
        deltas, rows = jax.vmap(pull)(jnp.eye(out, dtype=dtype))
        shaped = [
            jax.vmap(lambda d, e=e, p=p: _gradient(e, p, d))(delta).astype(dtype)
            for e, p, delta in zip(equations, products, deltas, strict=True)
        ]
        flat = [row.reshape(out, -1).astype(dtype) for row in rows]
        flat.append(jnp.zeros((out, 0), dtype))
        return [h.astype(dtype) for h in seen], shaped, jnp.concatenate(flat, 1)

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
