"""Degrees of freedom: what becomes of every parameter of a network.

number of parameters d = rank of the Jacobian + rescalings + dead + hidden
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import calling, check_inputs, check_params, integer, leaf_names
from jaxinv._draws import own_draws
from jaxinv._precision import call_in
from jaxinv._rank_evidence import column_sizes, known_ambiguities
from jaxinv.errors import InvalidInput
from jaxinv.jacobians import jacobian, problem_of, unflatten
from jaxinv.ranks import Method, Rank, jacobian_rank
from jaxinv.typing import Array, Inputs, Network, Params


class DegreesOfFreedom(NamedTuple):
    """d = rank + rescaling + dead + hidden.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import degrees_of_freedom, networks
        >>> w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias=False)
        >>> x = jax.random.normal(jax.random.key(1), (40, 3)).at[:, 2].set(0)
        >>> print(degrees_of_freedom(networks.mlp, w, x))
        20 parameters = 12 degrees of freedom + 4 rescalings + 4 dead + 0 hidden (certain)
        dead: Dense_0/kernel[2, :]
    """

    parameters: Array  # int32: d
    rank: Array  # int32; -1: not certified, or J not finite (see `evidence`)
    rescaling: Array  # int32: known rescalings that move parameters which are not dead
    dead: Array  # int32: parameters that change no output on these inputs
    hidden: Array  # int32: what remains unexplained; -1 where the rank is
    certain: Array  # bool
    evidence: Rank
    dead_mask: Params  # like params, bool
    basis: Array | None  # (hidden, d): orthonormal, orthogonal to the rescalings and the dead

    def __str__(self) -> str:
        """The sum, and the names of dead parameters."""
        if isinstance(self.rank, jax.core.Tracer) or jnp.ndim(self.rank):
            return repr(self)
        word = "certain" if self.certain else "NOT CERTAIN"
        rank, hidden = f"{self.rank} degrees of freedom", f"{self.hidden} hidden ({word})"
        if self.rank < 0:
            rank, hidden = f"at most {self.evidence.upper} degrees of freedom", "unknown hidden"
        lines = [
            f"{self.parameters} parameters = {rank} + {self.rescaling} rescalings + "
            f"{self.dead} dead + {hidden}"
        ]
        lines += [f"dead: {name}" for name in dead_names(self.dead_mask)]
        return "\n".join(lines)


def dead_names(mask: Params) -> list[str]:
    """Names of the elements that are True in a pytree of bools, whole slices as one.

    Args:
        mask: as `DegreesOfFreedom.dead_mask`.

    Returns:
        Names such as `Dense_0/kernel[5, :]` (all weights of input 5) and `Dense_0/bias[3]`.

    Example:
        >>> import numpy as np
        >>> from jaxinv.freedom import dead_names
        >>> dead_names({"w": np.array([[True, True], [False, True]]), "b": np.array([True, True])})
        ['b', 'w[0, :]', 'w[:, 1]']
    """
    found: list[str] = []
    for name, leaf in zip(leaf_names(mask, ""), jax.tree.leaves(mask), strict=True):
        left = np.array(leaf)
        if left.all():
            found.append(name)
            continue
        whole = left.copy()
        for axis in range(left.ndim if left.ndim > 1 else 0):
            others = tuple(a for a in range(left.ndim) if a != axis)
            for i in np.flatnonzero(whole.all(axis=others)):
                place = [":"] * left.ndim
                place[axis] = str(i)
                found.append(f"{name}[{', '.join(place)}]")
                left[tuple(slice(None) if a != axis else i for a in range(left.ndim))] = False
        found += [f"{name}[{', '.join(map(str, index))}]" for index in np.argwhere(left)]
    return found


def degrees_of_freedom(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    method: Method = "auto",
    rtol: float | None = None,
    dtype: Any = np.float64,
    chunk: int | None = None,
    basis: bool = False,
    batch_axis: int | None = 0,
) -> DegreesOfFreedom:
    """Split the number of parameters: d = rank + rescaling + dead + hidden.

    Rescalings are those of `jaxinv.rescaling_group`. A parameter is dead if it changes no output
    on these inputs (a pixel that is always 0, a unit that never fires): its column of J is exactly
    zero. A rescaling of dead parameters alone counts as dead. Hidden is the rest of the null space:
    other symmetries, and directions that these inputs do not show (see `saturating_inputs`).

    Args:
        fn, params, x, method, rtol, dtype, chunk, batch_axis: as for `jacobian_rank`.
        basis: also return an orthonormal basis of the hidden directions (by a full SVD of J,
            outside `jit`).

    Returns:
        A `DegreesOfFreedom`.

    Raises:
        InvalidInput: as for `jacobian_rank`; for a basis without a rank.

    Example:
        >>> import jax
        >>> from jaxinv import degrees_of_freedom, networks
        >>> w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.1)
        >>> x = jax.random.normal(jax.random.key(1), (40, 3))
        >>> print(degrees_of_freedom(networks.mlp, w, x))
        26 parameters = 22 degrees of freedom + 4 rescalings + 0 dead + 0 hidden (certain)
    """
    evidence = jacobian_rank(
        fn, params, x, method=method, rtol=rtol, dtype=dtype, chunk=chunk, batch_axis=batch_axis
    )
    dtype = jnp.dtype(dtype)
    fn = own_draws(fn, params, x, dtype)

    def split(params: Params, x: Inputs) -> tuple[Array, Array]:
        problem = problem_of(fn, params, x, batch_axis)
        return _split(params, problem.x, fn=problem.fn, dtype=dtype, chunk=chunk)

    dead, count = call_in(dtype, split, params, x)
    mask = unflatten(dead, jax.tree.map(lambda a: jnp.zeros(jnp.shape(a), bool), params))
    found = None
    if basis:
        if evidence.rank < 0:
            raise InvalidInput(
                f"basis=True needs the rank, which method={method!r} did not find; use 'svd'."
            )

        def hidden_basis(params: Params, x: Inputs) -> Array:
            problem = problem_of(fn, params, x, batch_axis)
            return _hidden_basis(params, problem.x, problem.fn, dtype, int(evidence.rank))

        found = call_in(dtype, hidden_basis, params, x)
    d = jnp.asarray(dead.size, jnp.int32)
    num_dead = dead.sum(dtype=jnp.int32)
    hidden = jnp.where(evidence.rank < 0, -1, d - num_dead - count - evidence.rank)
    return DegreesOfFreedom(
        d, evidence.rank, count, num_dead, hidden, evidence.certain, evidence, mask, found
    )


@partial(jax.jit, static_argnames=("fn", "dtype", "chunk"))
def _split(
    params: Params, x: Inputs, fn: Network, dtype: Any, chunk: int | None
) -> tuple[Array, Array]:
    d = problem_of(fn, params, x).parameters
    sizes = column_sizes(fn, params, x, d, dtype, chunk or 64)
    known = known_ambiguities(fn, params, x, sizes)
    return known.dead, known.span


def _hidden_basis(params: Params, x: Inputs, fn: Network, dtype: Any, rank: int) -> Array:
    J = jacobian(fn, params, x)
    known = known_ambiguities(fn, params, x, abs(J).sum(0))
    _, _, Vt = jnp.linalg.svd(J, full_matrices=True)
    null = Vt[rank:]
    dead = jnp.eye(J.shape[1], dtype=dtype)[:, np.asarray(known.dead)]
    explained = jnp.concatenate([known.tangents, dead], 1)
    # What is left of the null space after the explained directions are projected out.
    U, s, _ = jnp.linalg.svd(explained, full_matrices=False)
    U = U[:, np.asarray(s) > np.sqrt(np.finfo(dtype).eps)]
    rest = null - jnp.matmul(jnp.matmul(null, U), U.T)
    _, t, V = jnp.linalg.svd(rest, full_matrices=False)
    return V[np.asarray(t) > 0.5]


class Saturation(NamedTuple):
    """Inputs on which the rank no longer depends, and how it got there.

    Example:
        >>> import jax
        >>> from jaxinv import networks, saturating_inputs
        >>> w = networks.init_mlp(jax.random.key(0), (2, 3, 1), bias=False)
        >>> found = saturating_inputs(networks.mlp, w, jax.ShapeDtypeStruct((1, 2), "float32"))
        >>> found.ranks[-1], found.saturated
        (6, True)
    """

    x: Inputs
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    saturated: bool  # the last doubling changed nothing, or the proven bound is reached


def saturating_inputs(
    fn: Network,
    params: Params,
    x: Inputs | Callable[[Array, int], Inputs],
    *,
    key: Array | None = None,
    max_examples: int = 1 << 16,
    dtype: Any = np.float64,
) -> Saturation:
    """Enough inputs that the rank of the Jacobian no longer depends on them.

    Starts with d/out examples and doubles them until the rank stays the same, or reaches a bound
    that is proven.

    Args:
        fn, params: as for `jacobian_rank`.
        x: a function (key, n) -> n inputs; or arrays, of which growing parts are taken; or
            `jax.ShapeDtypeStruct`s, for standard normal inputs of that shape.
        key: for drawing; `jax.random.key(0)` by default.
        max_examples: give up here (`saturated` is then False).
        dtype: of the computation.

    Returns:
        A `Saturation`.

    Raises:
        InvalidInput: as for `jacobian_rank`; for integer inputs given by their shape alone; inside
            of `jit`, `vmap` or `grad`, where no rank is known that could decide the number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks, saturating_inputs
        >>> w = networks.init_mlp(jax.random.key(0), (2, 3, 1), bias=False)
        >>> saturating_inputs(networks.mlp, w, jnp.ones((100, 2))).ranks  # one input, repeated
        (1, 1)
    """
    check_params(params)
    given = (params, key, *jax.tree.leaves([] if callable(x) else x))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        raise InvalidInput(
            "saturating_inputs decides by the ranks how many inputs it takes, so it cannot run "
            "inside jit, vmap or grad: call it outside, and pass its x on."
        )
    draw, most = _drawing(x, integer("max_examples", max_examples, 1))
    key = jax.random.key(0) if key is None else key
    d = sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params))
    with calling("fn(params, x)", params):
        one = jax.eval_shape(fn, params, draw(key, 1))
    out = sum(int(np.prod(y.shape[1:])) for y in jax.tree.leaves(one))
    size, sizes, ranks = min(-(-d // max(out, 1)), most), [], []
    while True:
        found = jacobian_rank(fn, params, draw(key, size), dtype=dtype)
        sizes.append(size)
        ranks.append(int(found.rank))
        proven = bool(found.certain) and found.rank == found.upper < min(d, size * out)
        done = proven or (len(ranks) > 1 and ranks[-1] == ranks[-2]) or ranks[-1] == d
        if done or size >= most:
            return Saturation(draw(key, size), tuple(sizes), tuple(ranks), bool(done))
        size = min(2 * size, most)


def _drawing(x: Any, most: int) -> tuple[Callable[[Array, int], Inputs], int]:
    if callable(x):
        return x, most
    check_inputs(x, values=False)
    leaves = jax.tree.leaves(x)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        length = min(jnp.shape(leaf)[0] for leaf in leaves)
        return lambda key, n: jax.tree.map(lambda a: a[:n], x), min(most, length)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise InvalidInput("x has integer inputs given by their shape; pass values or a function.")

    def draw(key: Array, n: int) -> Inputs:
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.normal(k, (n, *leaf.shape[1:]), leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(x), drawn)

    return draw, most
