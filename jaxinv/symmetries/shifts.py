"""Shifts: biases that another bias takes back, and directions that a normalisation removes.

A bias of the values moves the output by a constant that the output's bias takes back; softmax and
normalisations do not see a common shift; a normalised stream has no mean, so the weights that read
it may be shifted along it. Each is a direction in few weights: all of a bias, or one number added
to all weights along an axis of a kernel, directly or through the inverse of a gain. Which of these
leave the function alone is decided by the Jacobian restricted to their span.

Other directions that nothing reads are those of a stream of low rank, see `kernels`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._interpreter.draws import traced_in
from jaxinv._interpreter.program import coarsest
from jaxinv.errors import InvalidInput
from jaxinv.symmetries.kernels import batch_rows, orthonormal, unread
from jaxinv.typing import Array, ArrayLike, Inputs, Network, Params

# Singular values of J on the span, below this share of the largest, are 0; where the network casts
# to less than float64, below as many units of that.
_CLEAR, _UNITS = 1e-9, 100
_MOST = 1 << 26  # numbers in a dense basis of the candidates
_ROWS = 1.5  # rows per candidate, so that inputs are enough


class Shifts(NamedTuple):
    """Directions in biases and along axes of kernels that leave the function alone.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import shift_tangents
        >>> w = {"b": jnp.ones(2), "c": jnp.ones(2)}
        >>> x = jax.random.normal(jax.random.key(0), (9, 2))
        >>> found = shift_tangents(lambda w, x: x + w["b"] + w["c"], w, x)
        >>> found.dimension, found.tangents.shape
        (2, (2, 4))
    """

    dimension: int
    tangents: (
        Array  # (dimension, parameters), orthonormal, float64; columns as `ravel_pytree` has them
    )
    leaves: tuple[str, ...]  # the leaves that move
    gap: float  # smallest singular value that counts ÷ largest that does not; inf if there is none


def shift_tangents(fn: Network, params: Params, x: Inputs) -> Shifts:
    """Shifts of a network at given parameters and inputs, found numerically in a small span.

    J·C·a = 0, with the columns of C the candidates: every element of a vector; one number along an
    axis of a kernel, times 1 or times the inverse of a vector of that length. Beside these, vectors
    v along an axis that no value meets, as of a stream wider than what it was made from: then
    Σ_i v_i ∂f/∂W_ij = 0 for every j, and W may move by v·cᵀ for any c.

    Args:
        fn: the network `fn(params, x) -> y`.
        params: pytree of float arrays.
        x: inputs, as many as it takes: at least 1.5 outputs per candidate. Rank decisions are about
            these inputs; a direction that half of them do not see and the others do is not counted.

    Returns:
        A `Shifts`. Directions that are rescalings or matrix symmetries as well are among them:
        count the rank of all together.

    Raises:
        InvalidInput: for too few inputs, or for more candidates than fit into memory.

    References:
        Kunin et al., "Neural mechanics", ICLR 2021 (arXiv:2012.04728), §3, for translations.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import shift_tangents
        >>> w = {"a": jnp.ones((2, 3)), "b": jnp.zeros(3)}
        >>> x = jax.random.normal(jax.random.key(0), (20, 2))
        >>> found = shift_tangents(lambda w, x: jax.nn.softmax(x @ w["a"] + w["b"]), w, x)
        >>> found.dimension, found.leaves  # of every row of a, and of b
        (3, ('a', 'b'))
    """
    _checks.check_params(params)
    _checks.check_inputs(x, values=True)
    shapes = [jnp.shape(a) for a in jax.tree.leaves(params)]
    total = sum(int(np.prod(s)) for s in shapes)
    with jax.numpy_dtype_promotion("standard"):
        network = traced_in(jnp.float64, fn, params, x)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        leaves = [jnp.asarray(a, jnp.float64) for a in jax.tree.leaves(params)]
        inputs = jax.tree.map(_as_double, x)
        candidates = _count(shapes)
        if candidates * total > _MOST:
            raise InvalidInput(
                f"shift_tangents would hold {candidates} candidates of {total} parameters each. "
                "Look at a narrower network, or at a part of it."
            )
        tree = jax.tree.structure(params)

        def outputs(theta: Array) -> Array:
            w = jax.tree.unflatten(tree, _split(theta, shapes))
            return jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(network(w, inputs))])

        theta = jnp.concatenate([a.ravel() for a in leaves])
        rows = jax.eval_shape(outputs, theta).shape[0]
        if rows < _ROWS * candidates:
            raise InvalidInput(
                f"shift_tangents decides about {candidates} candidates by {rows} outputs, but "
                f"needs {int(np.ceil(_ROWS * candidates))}. Pass more inputs."
            )
        C = _candidates([np.asarray(a) for a in leaves])
        U, s, _ = np.linalg.svd(C.T, full_matrices=False)
        Q = U[:, s > 1e-10 * s[0]].T

        @jax.jit
        def columns(Q: Array) -> Array:
            return jax.lax.map(lambda q: jax.jvp(outputs, (theta,), (q,))[1], Q, batch_size=64)

        JQ = np.asarray(columns(jnp.asarray(Q)))
        eps = coarsest(network.program.trace.jaxpr)
        clear = max(_CLEAR, min(_UNITS * eps, np.sqrt(eps)))
        K = unread(
            outputs,
            theta,
            shapes,
            batch_rows(network, jax.tree.unflatten(tree, leaves), inputs),
            clear,
        )
        sizes = [np.linalg.norm(a, axis=1) for a in (JQ, np.asarray(columns(jnp.asarray(K))))]
        K = K[sizes[1] <= clear * sizes[0].max()]
    _, s, Vt = np.linalg.svd(JQ.T, full_matrices=True)
    s = np.concatenate([s, np.zeros(len(Q) - len(s))])
    null = s <= clear * max(s[0], np.finfo(float).tiny)
    tangents = orthonormal(np.concatenate([Vt[null] @ Q, K]), max(1e-6, 30 * clear))
    counted, zero = s[~null].min(initial=np.inf), s[null].max(initial=0)
    gap = counted / zero if zero else np.inf
    names = [name or "params" for name in _checks.leaf_names(params, "")]
    moving = [bool((abs(part) > 1e-9).any()) for part in _split(tangents.T, shapes, flat=True)]
    return Shifts(
        len(tangents),
        cast(Array, tangents),
        tuple(name for name, moves in zip(names, moving, strict=True) if moves),
        float(gap),
    )


def _as_double(leaf: ArrayLike) -> Array:
    a = jnp.asarray(leaf)
    return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


_Numbers = TypeVar("_Numbers", Array, np.ndarray)


def _split(theta: _Numbers, shapes: list[tuple[int, ...]], flat: bool = False) -> list[_Numbers]:
    ends = np.cumsum([0, *(int(np.prod(s)) for s in shapes)])
    parts = [theta[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return parts if flat else [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]


def _vectors(shapes: list[tuple[int, ...]], n: int) -> int:
    return sum(len(s) == 1 and s[0] == n for s in shapes)


def _count(shapes: list[tuple[int, ...]]) -> int:
    """How many candidates there are."""
    total = 0
    for shape in shapes:
        size = int(np.prod(shape))
        if len(shape) < 2:
            total += size
        else:
            total += sum((1 + _vectors(shapes, n)) * (size // max(n, 1)) for n in shape)
    return total


def _candidates(leaves: list[np.ndarray]) -> np.ndarray:
    """One candidate per row, not independent of each other."""
    total, offset, rows = sum(a.size for a in leaves), 0, []
    gains = [a for a in leaves if a.ndim == 1]
    for leaf in leaves:
        if leaf.ndim < 2:
            blocks = [np.eye(leaf.size)]
        else:
            blocks = []
            for axis, n in enumerate(leaf.shape):
                others = np.arange(leaf.size).reshape(leaf.shape).swapaxes(axis, 0).reshape(n, -1)
                along = [np.ones(n)] + [1 / g for g in gains if g.size == n and (g != 0).all()]
                for v in along:
                    block = np.zeros((others.shape[1], leaf.size))
                    block[np.arange(others.shape[1])[None], others] = v[:, None]
                    blocks.append(block)
        for block in blocks:
            wide = np.zeros((len(block), total))
            wide[:, offset : offset + leaf.size] = block / np.linalg.norm(block, axis=1)[:, None]
            rows.append(wide)
        offset += leaf.size
    return np.concatenate(rows)
