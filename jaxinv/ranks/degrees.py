"""Degrees of freedom: what becomes of every parameter of a network.

number of parameters d = rank of the Jacobian + rescalings + matrices + dead + unexplained + unseen
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._checks import calling, check_inputs, check_network, check_params, integer, leaf_names
from jaxinv._interpreter.batch import TracedNetwork, leading
from jaxinv._interpreter.draws import traced_in
from jaxinv._interpreter.walk import is_concrete
from jaxinv._numerics.precision import call_in, in_precision
from jaxinv._numerics.varying import varying_like
from jaxinv._numerics.vectors import unflatten
from jaxinv.errors import InvalidInput, UnsupportedOperation
from jaxinv.gates import FunctionalDimension, Region
from jaxinv.jacobians.jacobians import jacobian
from jaxinv.ranks.evidence import known_ambiguities, noise, sizes_of
from jaxinv.ranks.on_regions import asked, rank_on_region
from jaxinv.ranks.rank import Method, check_values, checked_options, jacobian_rank, rank_of
from jaxinv.ranks.record import Rank
from jaxinv.rescaling.group import rescaling_group
from jaxinv.typing import Array, DTypeLike, Inputs, Network, Params


class DegreesOfFreedom(NamedTuple):
    """d = rank + rescaling + matrix + dead + unexplained + unseen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import degrees_of_freedom, networks
        >>> w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias=False)
        >>> x = jax.random.normal(jax.random.key(1), (40, 3)).at[:, 2].set(0)
        >>> print(degrees_of_freedom(networks.mlp, w, x))
        20 parameters = 12 degrees of freedom + 4 rescalings + 4 dead + 0 unexplained (certain)
        dead: Dense_0/kernel[2, :]
    """

    parameters: Array  # int32: d
    rank: Array  # int32; -1: not certified, or J not finite (see `evidence`)
    rescaling: Array  # int32: known rescalings that move parameters which are not dead
    dead: Array  # int32: parameters that change no output on these inputs
    unexplained: Array  # int32: what remains unexplained, at most; -1 where the rank is
    unseen: Array  # int32: directions that act on other inputs, at least; -1 where the rank is
    compared: Array  # bool: other inputs were looked at, to tell unseen from unexplained
    certain: Array  # bool: rank, unexplained and unseen are proven
    evidence: Rank
    dead_mask: Params  # like params, bool
    basis: Array | None  # (unexplained + unseen, d): orthonormal, orthogonal to what is known
    matrix: Array  # int32: known matrix symmetries beyond rescalings

    def __str__(self) -> str:
        """The sum, and the names of dead parameters."""
        if isinstance(self.rank, jax.core.Tracer) or jnp.ndim(self.rank):
            return repr(self)
        word = "certain" if self.certain else "NOT CERTAIN"
        if self.evidence.clear and not self.certain:
            word = "clear, not proven"
        what = (
            "unexplained"
            if self.compared or self.unexplained == 0
            else "unexplained or unseen by these inputs"
        )
        rest = [f"{self.unexplained} {what}"]
        if self.unseen > 0:
            rest.append(f"{self.unseen} unseen by these inputs")
        rank = f"{self.rank} degrees of freedom"
        rest[-1] += f" ({word})"
        if self.rank < 0:
            rank, rest = (
                f"at most {self.evidence.upper} degrees of freedom",
                ["unknown unexplained"],
            )
        matrix = f" + {self.matrix} matrix symmetries" if self.matrix else ""
        known = f"{rank} + {self.rescaling} rescalings{matrix} + {self.dead} dead"
        lines = [f"{self.parameters} parameters = {' + '.join([known, *rest])}"]
        lines += [f"dead: {name}" for name in dead_names(self.dead_mask)]
        return "\n".join(lines) + "".join(self.evidence.notes())


def dead_names(mask: Params) -> list[str]:
    """Names of the elements that are True in a pytree of bools, whole slices as one.

    Args:
        mask: as `DegreesOfFreedom.dead_mask`.

    Returns:
        Names such as `Dense_0/kernel[5, :]` (all weights of input 5) and `Dense_0/bias[3]`.

    Example:
        >>> import numpy as np
        >>> from jaxinv.ranks import dead_names
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
    x: Inputs | Region,
    *,
    method: Method = "auto",
    rtol: float | None = None,
    dtype: DTypeLike = np.float64,
    chunk: int | None = None,
    basis: bool = False,
    batch_axis: int | None = 0,
) -> DegreesOfFreedom:
    """Split the number of parameters: d = rank + rescaling + matrix + dead + unexplained + unseen.

    Rescalings are those of `jaxinv.rescaling_group`. Matrices are those of `symmetry_group` beyond
    them, where no gain is in between; others stay unexplained. A parameter is dead if it changes no
    output on these inputs (a pixel that is always 0, a unit that never fires): its column of J is
    exactly zero. A rescaling of dead parameters alone counts as dead. The rest of the null space is
    unseen if it acts on other inputs, and unexplained if it does not: then it is another symmetry.
    To tell them apart the rank is also taken on the first d/out of these inputs and as many others,
    drawn at random. Integer inputs, and networks that mix examples, are not compared.

    Args:
        fn, params, x, method, rtol, dtype, chunk, batch_axis: as for `jacobian_rank`. On a region
            of inputs no parameter counts as dead, and what is not proven as unexplained.
        basis: also return an orthonormal basis of the unexplained directions (by a full SVD of J,
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
        26 parameters = 22 degrees of freedom + 4 rescalings + 0 dead + 0 unexplained (certain)
    """
    dtype, rtol = checked_options(method, dtype, rtol)
    if asked(x, method):
        if basis:
            raise InvalidInput("basis=True needs the Jacobian on given inputs, not a region.")
        return _on_region(params, *rank_on_region(fn, params, x, rtol, dtype, batch_axis))
    x = leading(x, batch_axis)
    check_values(params, x, dtype, chunk)
    network = traced_in(dtype, fn, params, x, batch_axis)
    look = partial(_look, network, params, method=method, rtol=rtol, dtype=dtype, chunk=chunk)
    evidence, zero, count, matrix, _ = look(x)
    mask = unflatten(zero, jax.tree.map(lambda a: jnp.zeros(jnp.shape(a), bool), params))
    found = None
    if basis:
        if evidence.rank < 0:
            raise InvalidInput(
                f"basis=True needs the rank, which method={method!r} did not find; use 'svd'."
            )
        hidden_basis = partial(_hidden_basis, fn=network, dtype=dtype, rank=int(evidence.rank))
        found = call_in(dtype, hidden_basis, params, x)
    d = jnp.asarray(zero.size, jnp.int32)
    num_dead = zero.sum(dtype=jnp.int32)
    rest = jnp.where(evidence.rank < 0, -1, d - num_dead - count - matrix - evidence.rank)
    others = _elsewhere(look, x, evidence, rest, network.apart)
    unknown, compared = rest < 0, others.rest >= 0
    unexplained = jnp.where(compared & ~unknown, jnp.minimum(rest, others.rest), rest)
    unseen = jnp.where(unknown, -1, rest - unexplained)
    certain = evidence.certain & ((rest == 0) | (others.certain & (others.rest == 0)))
    return DegreesOfFreedom(
        d,
        evidence.rank,
        count,
        num_dead,
        unexplained,
        unseen,
        compared,
        certain,
        evidence,
        mask,
        found,
        matrix,
    )


def _on_region(params: Params, rank: Rank, found: FunctionalDimension) -> DegreesOfFreedom:
    """Nothing is unseen on a region, and no parameter is known to be dead on all of it."""
    count = partial(jnp.asarray, dtype=jnp.int32)
    none = jax.tree.map(lambda a: jnp.zeros(jnp.shape(a), bool), params)
    rest = found.upper - found.lower
    return DegreesOfFreedom(
        count(found.parameters), rank.rank, count(found.rescaling), count(0), count(rest),
        count(0), jnp.asarray(True), rank.certain, rank, none, None, count(0),
    )  # fmt: skip


def _look(
    network: TracedNetwork,
    params: Params,
    x: Inputs,
    *,
    method: str,
    rtol: float | None,
    dtype: DTypeLike,
    chunk: int | None,
) -> tuple[Rank, Array, Array, Array, Array]:
    """The rank, the columns of zeros, the numbers of symmetries; are the zeros proven?"""

    def split(params: Params, x: Inputs) -> tuple[Array, Array, Array, Array]:
        return _split(params, x, network, dtype, chunk)

    found, evidence = rank_of(network, params, x, method, rtol, dtype, chunk)
    if evidence is not None and is_concrete(evidence.upper):
        with in_precision(dtype):
            zero = evidence.sizes.zero
            same = (zero == evidence.known.dead).all()
        if same:  # the rank has counted the same symmetries
            return found, zero, evidence.known.rescaling, evidence.known.matrix, jnp.asarray(True)
    return found, *call_in(dtype, split, params, x)


class _Elsewhere(NamedTuple):
    rest: Array  # int32: what no symmetry explains on more inputs; -1: not known
    certain: Array


def _elsewhere(
    look: Callable[[Inputs], tuple[Rank, Array, Array, Array, Array]],
    x: Inputs,
    evidence: Rank,
    rest: Array,
    apart: bool,
) -> _Elsewhere:
    """What is left of the null space on some of these inputs together with others."""
    unknown = _Elsewhere(jnp.asarray(-1, jnp.int32), jnp.zeros((), bool))
    floats = all(jnp.issubdtype(jnp.result_type(a), jnp.floating) for a in jax.tree.leaves(x))
    if not floats or not apart:
        return unknown

    def others() -> _Elsewhere:
        enough = evidence.about.enough
        found, zero, count, matrix, proven = look(
            with_others(jax.tree.map(lambda a: a[:enough], x), enough)
        )
        left = zero.size - zero.sum(dtype=jnp.int32) - count - matrix - found.rank
        return _Elsewhere(
            jnp.where(found.rank < 0, -1, left).astype(jnp.int32), found.certain & proven
        )

    if isinstance(rest, jax.core.Tracer):
        return lax.cond(rest > 0, others, lambda: varying_like(unknown, rest))
    return others() if rest > 0 else unknown


def with_others(x: Inputs, count: int) -> Inputs:
    """x and `count` more inputs, uniform within twice the range of x.

    Args:
        x: pytree of float arrays with a leading batch axis.
        count: how many to add.

    Returns:
        A pytree like x with a longer batch axis. The same for the same x.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.ranks.degrees import with_others
        >>> with_others(jnp.ones((3, 2)), 5).shape
        (8, 2)
    """
    leaves, tree = jax.tree.flatten(x)
    joined = []
    for i, leaf in enumerate(map(jnp.asarray, leaves)):
        reach = jnp.max(abs(leaf), initial=0)
        shape = (count, *leaf.shape[1:])
        drawn = noise(int(np.prod(shape)), jnp.uint32(256 + i), leaf.dtype).reshape(shape)
        joined.append(jnp.concatenate([leaf, 2 * jnp.where(reach > 0, reach, 1) * drawn]))
    return jax.tree.unflatten(tree, joined)


@partial(jax.jit, static_argnames=("fn", "dtype", "chunk"))
def _split(
    params: Params, x: Inputs, fn: Network, dtype: DTypeLike, chunk: int | None
) -> tuple[Array, Array, Array, Array]:
    """The columns of zeros, the numbers of rescalings and matrices, and are the zeros proven?"""
    sizes = sizes_of(fn, params, x, dtype, chunk or 64)
    known = known_ambiguities(fn, params, x, sizes.zero, dtype)
    return sizes.zero, known.rescaling, known.matrix, (sizes.zero == sizes.dead).all()


def _hidden_basis(params: Params, x: Inputs, fn: Network, dtype: DTypeLike, rank: int) -> Array:
    J = jacobian(fn, params, x)
    known = known_ambiguities(fn, params, x, (J == 0).all(0), dtype)
    _, _, Vt = jnp.linalg.svd(J, full_matrices=True)
    null = Vt[rank:]
    dead = jnp.eye(J.shape[1], dtype=dtype)[:, np.asarray(known.dead)]
    tangents = known.tangents[:, np.asarray(abs(known.tangents).max(0) > 0)]
    # What is left of the null space after the explained directions are projected out: as many
    # orthonormal ones as there are independent columns, which is known exactly.
    U, _ = jnp.linalg.qr(jnp.concatenate([tangents, dead], 1))
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
    dtype: DTypeLike = np.float64,
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
    check_network(fn)
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
    symmetries = _rescalings(fn, params, draw(key, 1))
    size, sizes, ranks = min(-(-d // max(out, 1)), most), [], []
    while True:
        found = jacobian_rank(fn, params, draw(key, size), dtype=dtype)
        sizes.append(size)
        ranks.append(int(found.rank))
        # The bound on the rank that holds on all inputs, not on these.
        proven = bool(found.certain) and int(found.rank) == d - symmetries
        done = proven or (len(ranks) > 1 and ranks[-1] == ranks[-2]) or ranks[-1] == d
        if done or size >= most:
            return Saturation(draw(key, size), tuple(sizes), tuple(ranks), bool(done))
        size = min(2 * size, most)


def _rescalings(fn: Network, params: Params, x: Inputs) -> int:
    try:
        return rescaling_group(fn, params, x).dim
    except UnsupportedOperation:
        return 0


def _drawing(
    x: Inputs | Callable[[Array, int], Inputs], most: int
) -> tuple[Callable[[Array, int], Inputs], int]:
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
