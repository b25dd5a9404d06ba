"""The Jacobian of a network's outputs in its parameters, and the products that avoid holding it.

J has a row per example and output element and a column per parameter, (n·out, d), in the order of
`jax.tree.leaves(params)`. `jacobian_gram` is JᵀJ and `tangent_kernel` JJᵀ; both are accumulated
over chunks of examples. `jacobian_operator` multiplies with J and Jᵀ and stores neither.

Where `fn` is known to treat each example by itself, rows are computed example by example; else
(batch norm in training mode, contrastive terms) it is differentiated whole.

| | flops (a multiply-add is 2) | memory, in numbers |
|---|---|---|
| `jacobian`, reverse | 4·n·out·d | n·out·d |
| `jacobian`, forward | 4·n·d² | n·out·d |
| `jacobian_gram` | 2·n·out·d² | d² + chunk·out·d |
| `tangent_kernel` | 2·(n·out)²·d; factored layers less | (n·out)² + chunk·out·d, or less |
| `jacobian_operator` | 4·n·d per product | activations of n examples |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._checks import check_inputs, integer, one_of
from jaxinv._interpreter.at_once import at_once
from jaxinv._interpreter.batch import TracedNetwork, leading
from jaxinv._interpreter.program import find_equation
from jaxinv._numerics.chunks import fold_chunks
from jaxinv._numerics.varying import varies, vary_alike, varying_like
from jaxinv._numerics.vectors import flatten, outputs_of, unflatten
from jaxinv.errors import InvalidInput
from jaxinv.jacobians import kernel_factors
from jaxinv.jacobians.problem import Problem, problem_of
from jaxinv.typing import Array, Inputs, Network, Params

_EXACT = lax.Precision.HIGHEST
# Matrix products of narrower blocks run slower than they save.
_SMALLEST_BLOCK = 512


def _check_chunk(chunk: int) -> None:
    integer("chunk", chunk, 1)


# --- rows -----------------------------------------------------------------------------


def _check_reverse(problem: Problem) -> None:
    """jax cannot go backwards through a `while`: it would store an unknown number of steps."""
    loop = find_equation(problem.fn.program.trace.jaxpr, "while")
    if loop is not None:
        raise loop.refuse(
            "reverse-mode differentiation",
            "its number of trips is not known when it is traced, so its steps cannot be stored.",
            "use lax.scan, or lax.fori_loop with bounds that are Python integers; "
            "jacobian(..., mode='fwd') needs neither.",
            what="A `while` loop",
        )


def _rows_of_one(problem: Problem, params: Params, example: Inputs) -> Array:
    """(out, d) of one example, by reverse mode."""
    _check_reverse(problem)
    x, dtype = jax.tree.map(lambda a: a[None], example), problem.dtype
    y, pull = jax.vjp(lambda w: outputs_of(problem.fn, w, x, dtype)[0], params)
    (rows,) = jax.vmap(pull)(varying_like(jnp.eye(y.size, dtype=dtype), y))
    return jax.vmap(lambda row: flatten(row, dtype))(rows)


def _rows_whole(problem: Problem, params: Params, chunk: int) -> Array:
    """(n·out, d) of a network that mixes examples."""
    _check_reverse(problem)
    fn, x, dtype = problem.fn, problem.x, problem.dtype
    y, pull = jax.vjp(lambda w: outputs_of(fn, w, x, dtype).ravel(), params)

    def row(i: Array) -> Array:
        (g,) = pull(varying_like(jnp.zeros_like(y).at[i].set(1), y))
        return flatten(g, dtype)

    return lax.map(row, jnp.arange(problem.rows), batch_size=chunk)


def _columns(problem: Problem, params: Params, chunk: int) -> Array:
    """(n·out, d), by forward mode."""
    fn, x, dtype = problem.fn, problem.x, problem.dtype

    def column(i: Array) -> Array:
        one_hot = jnp.zeros(problem.parameters, dtype).at[i].set(1)
        tangent = unflatten(varying_like(one_hot, params), params)
        f = lambda w: outputs_of(fn, w, x, dtype).ravel()  # noqa: E731
        return jax.jvp(f, (params,), (tangent,))[1]

    return lax.map(column, jnp.arange(problem.parameters), batch_size=chunk).T


def jacobian(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    mode: Literal["auto", "fwd", "rev"] = "auto",
    chunk: int = 64,
    batch_axis: int | None = 0,
) -> Array:
    """J = ∂fn(params, x)/∂params as one matrix.

    Args:
        fn: any differentiable `fn(params, x) -> y`; x and y may be pytrees.
        params: pytree of float arrays, d numbers in all.
        x: inputs with a leading batch axis of length n.
        mode: "fwd" is `jax.jacfwd` (a pass per parameter), "rev" `jax.jacrev` (a pass per output
            element of each example). "auto" takes reverse mode where it needs fewer passes.
        chunk: this many examples (reverse) or parameters (forward) at a time.
        batch_axis: the axis of every input that counts examples, 0 by default; None if x is one
            input without such an axis: rows are then ordered by output element alone.

    Returns:
        (n·out, d): rows ordered by example, then output element; columns as
        `jax.flatten_util.ravel_pytree(params)`. float64 if a parameter or output is, else float32.

    Raises:
        InvalidInput: for bad parameters, inputs without a common batch axis, or outputs that are
            not real floats with that batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> print(jacobian(lambda w, x: (x @ w[0]) @ w[1], w, jnp.array([[1.0], [5.0]])))
        [[ 3.  2.]
         [15. 10.]]
    """
    one_of("mode", mode, ("auto", "fwd", "rev"))
    _check_chunk(chunk)
    params, x = vary_alike(params, x)
    problem = problem_of(fn, params, x, batch_axis)
    return at_once(_jacobian, problem.fn, (params, problem.x), mode, chunk)


def _jacobian(network: TracedNetwork, given: tuple[Params, Inputs], mode: str, chunk: int) -> Array:
    params, x = given
    problem = problem_of(network, params, x)
    passes = problem.outputs if problem.apart else problem.rows
    if mode == "fwd" or (mode == "auto" and passes > problem.parameters):
        return _columns(problem, params, chunk)
    if not problem.apart:
        return _rows_whole(problem, params, chunk)
    one = partial(_rows_of_one, problem, params)
    return lax.map(one, problem.x, batch_size=chunk).reshape(problem.rows, problem.parameters)


# --- products -------------------------------------------------------------------------

T = TypeVar("T")


def fold_rows(
    fn: Network,
    params: Params,
    x: Inputs,
    start: T,
    add: Callable[[T, Array], T],
    *,
    chunk: int = 64,
    batch_axis: int | None = 0,
) -> T:
    """Fold `add(state, rows)` over the rows of J, at most chunk·out of them at a time.

    Args:
        fn, params, x: as for `jacobian`.
        start: the first state, a pytree of arrays.
        add: takes the state and (k, d) rows, returns the next state.
        chunk: examples at a time.
        batch_axis: as for `jacobian`.

    Returns:
        The last state.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.jacobians.jacobians import fold_rows
        >>> x = jnp.ones((5, 2))
        >>> fold_rows(lambda w, x: x @ w, jnp.ones((2, 1)), x, jnp.zeros(()),
        ...           lambda total, rows: total + rows.sum(), chunk=2).item()
        10.0
    """
    _check_chunk(chunk)
    params, x = vary_alike(params, x)
    start = varying_like(start, params)
    problem = problem_of(fn, params, x, batch_axis)
    if not problem.apart:
        return add(start, _rows_whole(problem, params, chunk))

    def rows(x: Inputs) -> Array:
        found = jax.vmap(partial(_rows_of_one, problem, params))(x)
        return found.reshape(-1, problem.parameters)

    return fold_chunks(problem.x, start, lambda state, part: add(state, rows(part)), chunk)


def _add_lower_gram(total: Array, rows: Array) -> Array:
    """total + rowsᵀ rows in blocks on and below the diagonal: about half of the products."""
    d = rows.shape[1]
    step = max(_SMALLEST_BLOCK, -(-d // 8))
    for start in range(0, d, step):
        stop = min(start + step, d)
        block = jnp.matmul(rows[:, start:stop].T, rows[:, :stop], precision=_EXACT)
        total = total.at[start:stop, :stop].add(block)
    return total


def _mirrored(lower: Array) -> Array:
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def jacobian_gram(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    chunk: int = 64,
    mesh: jax.sharding.Mesh | None = None,
    axis: str | None = None,
    batch_axis: int | None = 0,
) -> Array:
    """JᵀJ, accumulated over chunks of examples; J is never held.

    Args:
        fn, params, x: as for `jacobian`.
        chunk: examples at a time.
        mesh: devices (of one or many processes) over which the examples are spread. Each adds up
            its own rows and one `psum` adds up the devices.
        axis: the axis of the mesh that counts the examples; its first one by default.
        batch_axis: as for `jacobian`.

    Returns:
        (d, d), symmetric positive semi-definite, the same on all devices.

    Raises:
        InvalidInput: as for `jacobian`; with a mesh also for networks that mix examples.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian_gram
        >>> print(jacobian_gram(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.array([[1.0, 2.0]])))
        [[1. 2.]
         [2. 4.]]
    """

    problem = problem_of(fn, params, x, batch_axis)
    network, x = problem.fn, problem.x

    # Examples that only fill up a device count 0.
    def weighted(w: Params, inside: dict) -> Array:
        return inside["weight"][:, None] * outputs_of(network, w, inside["x"], problem.dtype)

    def gram(params: Params, x: Inputs, weights: Array) -> Array:
        zero = jnp.zeros((problem.parameters, problem.parameters), problem.dtype)
        inside = {"x": x, "weight": weights}
        return _mirrored(fold_rows(weighted, params, inside, zero, _add_lower_gram, chunk=chunk))

    if mesh is None:
        return at_once(_gram, network, (params, x), chunk)
    axis = axis or mesh.axis_names[0]
    # Where arrays lie is left to XLA here, whatever the mesh says of its axes.
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    if not problem.apart:
        raise InvalidInput(
            "the outputs for one example depend on others (batch norm in training mode?), so the "
            "examples cannot be spread over devices. Call jacobian_gram without a mesh."
        )
    devices = mesh.shape[axis]
    missing = -problem.examples % devices
    weights = jnp.concatenate(
        [jnp.ones(problem.examples, problem.dtype), jnp.zeros(missing, problem.dtype)]
    )
    if missing:
        x = jax.tree.map(lambda a: jnp.concatenate([a, jnp.repeat(a[:1], missing, 0)]), x)
    here, spread = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(axis)

    def local(params: Params, x: Inputs, weights: Array) -> Array:
        return lax.psum(gram(params, x, weights), axis)

    # The rows of a device are its own, though they are gradients in parameters that all share:
    # without the check nothing is summed over the devices but the result.
    shared = jax.shard_map(
        local, mesh=mesh, in_specs=(here, spread, spread), out_specs=here, check_vma=False
    )
    return jax.jit(shared)(params, x, weights)


def _gram(network: TracedNetwork, given: tuple[Params, Inputs], chunk: int) -> Array:
    params, x = given
    problem = problem_of(network, params, x)
    zero = jnp.zeros((problem.parameters, problem.parameters), problem.dtype)
    return _mirrored(fold_rows(network, params, x, zero, _add_lower_gram, chunk=chunk))


def scaled_gram(fn: Network, params: Params, x: Inputs, scale: Array, *, chunk: int = 64) -> Array:
    """diag(scale) JᵀJ diag(scale), with the columns scaled before they meet.

    Args:
        fn, params, x, chunk: as for `jacobian_gram`.
        scale: (d,).

    Returns:
        (d, d).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.jacobians.jacobians import scaled_gram
        >>> x, scale = jnp.array([[1.0, 2.0]]), jnp.array([1.0, 0.5])
        >>> print(scaled_gram(lambda w, x: x @ w, jnp.ones((2, 1)), x, scale))
        [[1. 1.]
         [1. 1.]]
    """

    def add(total: Array, rows: Array) -> Array:
        return _add_lower_gram(total, rows * scale)

    start = jnp.zeros((scale.size, scale.size), scale.dtype)
    return _mirrored(fold_rows(fn, params, x, start, add, chunk=chunk))


def tangent_kernel(
    fn: Network,
    params: Params,
    x: Inputs,
    x2: Inputs | None = None,
    *,
    chunk: int = 32,
    factored: bool = True,
    batch_axis: int | None = 0,
) -> Array:
    """The empirical neural tangent kernel J(x) J(x2)ᵀ, by blocks of chunk × chunk examples.

    The part of a kernel W that enters as h·W only is Σ_positions ⟨h, h'⟩⟨δ, δ'⟩, with δ the
    gradient of an output in the product: a Gram matrix of activations times one of gradients. For
    dense layers and for convolutions with few positions that is far less than products of rows of
    J, which then never exist. All other parameters take the plain product.

    Args:
        fn, params, x: as for `jacobian`.
        x2: further inputs like x, m of them; x itself by default.
        chunk: examples at a time on either side.
        factored: False takes the plain product for all parameters.
        batch_axis: as for `jacobian`.

    Returns:
        (n·out, m·out).

    Raises:
        InvalidInput: as for `jacobian`.

    References:
        Jacot, Gabriel, Hongler, "Neural tangent kernel", NeurIPS 2018 (arXiv:1806.07572); the
        factored form: Novak, Sohl-Dickstein, Schoenholz, "Fast finite width neural tangent kernel",
        ICML 2022 (arXiv:2206.08720).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import tangent_kernel
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> print(tangent_kernel(lambda w, x: x @ w, jnp.ones((2, 1)), x))
        [[ 5. 11.]
         [11. 25.]]
    """
    _check_chunk(chunk)
    params, x, x2 = vary_alike(params, x, x2)
    problem = problem_of(fn, params, x, batch_axis)
    network, x = problem.fn, problem.x
    # A program that is taken apart is traced on shapes, which do not vary over devices.
    if not problem.apart or varies(params):
        left = jacobian(network, params, x, chunk=chunk)
        right = left if x2 is None else jacobian(fn, params, x2, chunk=chunk, batch_axis=batch_axis)
        return jnp.matmul(left, right.T, precision=_EXACT)
    if x2 is not None:
        x2 = leading(x2, batch_axis)
        check_inputs(x2, values=True, finite=True)
    return at_once(_kernel, network, (params, x, x if x2 is None else x2), chunk, factored)


def _kernel(
    network: TracedNetwork, given: tuple[Params, Inputs, Inputs], chunk: int, factored: bool
) -> Array:
    params, x, other = given
    problem = problem_of(network, params, x)
    rows, columns, dtype = problem.rows, problem_of(network, params, other).rows, problem.dtype

    def one(w: Params, example: Inputs) -> Array:
        x = jax.tree.map(lambda a: a[None], example)
        return outputs_of(network, w, x, dtype)[0]

    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)
    factors = kernel_factors.factors_of(one, params, example, dtype, factored)
    chunk = min(chunk, factors.most_examples)
    left, right = _in_chunks(x, chunk), _in_chunks(other, chunk)

    def strip(a: Inputs) -> Array:
        features = factors.of(params, a)
        blocks = lax.map(lambda b: factors.block(features, factors.of(params, b)), right)
        return jnp.concatenate(list(blocks), 1) if blocks.shape[0] == 1 else _joined(blocks)

    blocks = lax.map(strip, left)
    return blocks.reshape(-1, blocks.shape[-1])[:rows, :columns]


def _joined(blocks: Array) -> Array:
    """(k, r, c) blocks side by side: (r, k·c)."""
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)


def _in_chunks(x: Inputs, chunk: int) -> Inputs:
    """(k, chunk, ...), filled up with copies of the first example."""

    def split(a: Array) -> Array:
        missing = -a.shape[0] % chunk
        filled = jnp.concatenate([a, jnp.repeat(a[:1], missing, 0)]) if missing else a
        return filled.reshape(-1, chunk, *a.shape[1:])

    return jax.tree.map(split, x)


class JacobianOperator(NamedTuple):
    """Products with J and Jᵀ; neither is stored.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.jacobians import jacobian_operator
        >>> J = jacobian_operator(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.array([[1.0, 2.0]]))
        >>> J.shape, J.matvec(jnp.array([1.0, 1.0])).tolist(), J.rmatvec(jnp.ones(1)).tolist()
        ((1, 2), [3.0], [1.0, 2.0])
    """

    matvec: Callable[[Array], Array]  # (d,) -> (n·out,)
    rmatvec: Callable[[Array], Array]  # (n·out,) -> (d,)
    shape: tuple[int, int]


def jacobian_operator(
    fn: Network, params: Params, x: Inputs, *, batch_axis: int | None = 0
) -> JacobianOperator:
    """J as a linear operator on vectors, for Lanczos, CG and other matrix-free methods.

    Args:
        fn, params, x, batch_axis: as for `jacobian`.

    Returns:
        A `JacobianOperator`. The network is linearised once; a product with J or Jᵀ costs about
        one pass over the batch. Its functions jit, vmap, and fit packages such as matfree.

    Raises:
        InvalidInput: as for `jacobian`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import jacobian, jacobian_operator, networks
        >>> w, x = networks.init_mlp(jax.random.key(0), (3, 4, 2)), jnp.ones((5, 3))
        >>> J = jacobian_operator(networks.mlp, w, x)
        >>> v = jnp.ones(J.shape[1])
        >>> bool(jnp.allclose(J.matvec(v), jacobian(networks.mlp, w, x) @ v, rtol=1e-4))
        True
    """
    params, x = vary_alike(params, x)
    problem = problem_of(fn, params, x, batch_axis)

    _check_reverse(problem)

    def f(w: Params) -> Array:
        return outputs_of(problem.fn, w, problem.x, problem.dtype).ravel()

    y, pull = jax.vjp(f, params)
    _, push = jax.linearize(f, params)
    if "custom_lin" in str(jax.make_jaxpr(push)(params)):
        # A custom_vjp has no forward mode, but its reverse mode is linear.
        transposed = jax.linear_transpose(lambda c: pull(c)[0], y)
        push = lambda tangent: transposed(tangent)[0]  # noqa: E731

    def matvec(v: Array) -> Array:
        return push(varying_like(unflatten(v, params), params))

    def rmatvec(c: Array) -> Array:
        return flatten(pull(varying_like(c, y))[0], problem.dtype)

    return JacobianOperator(matvec, rmatvec, (problem.rows, problem.parameters))
