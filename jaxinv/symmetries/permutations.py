"""Permutations of units, channels and heads: found, applied, and undone by matching."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._interpreter.batch import leading, traced_network
from jaxinv.errors import InvalidInput
from jaxinv.frames.follow import Place, frames_of
from jaxinv.frames.matrices import labels
from jaxinv.frames.permutations import PermutationDomain
from jaxinv.rescaling import RescalingGroup, balance
from jaxinv.typing import Array, Inputs, Network, Params, PyTree

_MOST_ROUNDS = 100


class PermutationClass(NamedTuple):
    """Axes that must be permuted together."""

    size: int
    name: str  # S(8): Dense_0/kernel out, Dense_0/bias, Dense_1/kernel in
    places: tuple[Place, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PermutationGroup:
    """Every way to reorder units, channels and heads without changing the function.

    Static: close over it in jitted functions, or pass it through them as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.symmetries import permutation_group
        >>> w = networks.init_mlp(jax.random.key(0), (4, 3, 2))
        >>> group = permutation_group(networks.mlp, w, jnp.ones((1, 4)))
        >>> print(group)
        PermutationGroup of 1 classes
          S(3): Dense_0/bias, Dense_0/kernel out, Dense_1/kernel in
    """

    classes: tuple[PermutationClass, ...]
    leaf_shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        """A line per class."""
        lines = [f"PermutationGroup of {len(self.classes)} classes"]
        return "\n".join([*lines, *(f"  {c.name}" for c in self.classes)])


def permutation_group(
    fn: Network, params: Params, x: Inputs, *, batch_axis: int | None = 0
) -> PermutationGroup:
    """Which axes of the parameters may be permuted, and which of them together.

    Args:
        fn: any JAX-traceable `fn(params, x) -> y`.
        params: pytree of float arrays, or of shapes.
        x: inputs with a batch axis, or shapes; only shapes are used.
        batch_axis: see `rescaling_group`.

    Returns:
        A `PermutationGroup`, for `permute` and `match`. Axes of one class are permuted by the same
        permutation; an axis that an operation without a rule looks at is in none.

    Raises:
        InvalidInput: as for `rescaling_group`.

    References:
        Ainsworth, Hayase, Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries",
        ICLR 2023 (arXiv:2209.04836), where these specifications are written by hand.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import permutation_group
        >>> shapes = {"e": (5, 8), "a": (8, 6), "b": (6, 8), "u": (8, 3)}
        >>> w = {n: jnp.ones(s) for n, s in shapes.items()}
        >>> def residual(w, x):
        ...     h = x @ w["e"]
        ...     return (h + jnp.tanh(h @ w["a"]) @ w["b"]) @ w["u"]
        >>> for c in permutation_group(residual, w, jnp.ones((1, 5))).classes:
        ...     print(c.name)
        S(8): a in, b out, e out and 1 more
        S(6): a out, b in
    """
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params))
    _checks.check_params(params, values=False)
    network = traced_network(fn, params, leading(x, batch_axis), batch_axis, least=3)
    found = frames_of(network.program.trace, shapes, PermutationDomain)
    names = [name or "params" for name in _checks.leaf_names(params, "")]
    classes = tuple(
        PermutationClass(c.size, f"S({c.size}): {labels(c.places, names, shapes)}", c.places)
        for c in found.classes
    )
    return PermutationGroup(classes, shapes)


def random_permutations(group: PermutationGroup, key: Array) -> tuple[Array, ...]:
    """A random permutation per class, int32 (size,).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import permutation_group, permute, random_permutations
        >>> fn = lambda w, x: jnp.tanh(x @ w[0]) @ w[1]
        >>> w = [jnp.arange(6.0).reshape(2, 3) / 9, jnp.arange(3.0)[:, None]]
        >>> group = permutation_group(fn, w, jnp.eye(2))
        >>> moved = permute(group, w, random_permutations(group, jax.random.key(1)))
        >>> bool(jnp.allclose(fn(moved, jnp.eye(2)), fn(w, jnp.eye(2))))
        True
    """
    keys = jax.random.split(_checks.check_key("key", key), len(group.classes) + 1)
    return tuple(
        jax.random.permutation(k, c.size) for k, c in zip(keys, group.classes, strict=False)
    )


def permute(group: PermutationGroup, tree: PyTree, permutations: Sequence[Array]) -> PyTree:
    """Reorder parameters, gradients or moments: element i of an axis is what was at p[i].

    Args:
        group: as `permutation_group` returns it.
        tree: a pytree like the params of the group.
        permutations: one per class, as `random_permutations` or `match` gives them.

    Returns:
        A pytree like `tree`. Nothing is computed, so that inverse permutations give the same bits.

    Raises:
        InvalidInput: for another number or length of permutations, or leaves of other shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import permutation_group, permute
        >>> w = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])]
        >>> group = permutation_group(lambda w, x: jnp.tanh(x @ w[0]) @ w[1], w, jnp.eye(1))
        >>> [leaf.ravel().tolist() for leaf in permute(group, w, [jnp.array([1, 0])])]
        [[2.0, 1.0], [4.0, 3.0]]
    """
    leaves = list(jax.tree.leaves(tree))
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    if shapes != group.leaf_shapes:
        raise InvalidInput(
            f"the leaves have shapes {shapes}, but the permutation group was found for "
            f"{group.leaf_shapes}."
        )
    sizes = [int(jnp.size(p)) for p in permutations]
    if sizes != [c.size for c in group.classes]:
        raise InvalidInput(
            f"permutations have lengths {sizes}, but the classes have "
            f"{[c.size for c in group.classes]}: pass one per class, in their order."
        )
    for found, p in zip(group.classes, permutations, strict=True):
        for place in found.places:
            box = tuple(slice(*ends) for ends in place.box)
            leaf = jnp.asarray(leaves[place.leaf])
            part = jnp.take(leaf[box], jnp.asarray(p), axis=place.axis)
            whole = part.shape == leaf.shape
            leaves[place.leaf] = part if whole else leaf.at[box].set(part)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


class Match(NamedTuple):
    """The second network in the order (and scale) of the first.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import match, permutation_group, permute
        >>> fn = lambda w, x: jnp.tanh(x @ w[0]) @ w[1]
        >>> w = [jnp.arange(6.0).reshape(2, 3) / 9, jnp.arange(3.0)[:, None]]
        >>> group = permutation_group(fn, w, jnp.eye(2))
        >>> found = match(group, w, permute(group, w, [jnp.array([2, 0, 1])]))
        >>> float(found.distance)
        0.0
    """

    params: Params  # b, permuted (and balanced, if a rescaling group was given)
    permutations: tuple[Array, ...]  # of b, for `permute`
    distance: Array  # ‖a − params‖, with a balanced likewise
    rounds: int  # until no permutation changed


def match(
    group: PermutationGroup,
    a: Params,
    b: Params,
    *,
    rescaling: RescalingGroup | None = None,
    key: Array | None = None,
) -> Match:
    """Permute b so that it is as near to a as can be found: weight matching.

    In turn for every class, the permutation of it that maximises ⟨a, permuted b⟩ while the others
    stay as they are, a linear assignment problem; until none changes.

    Args:
        group: of the network of both.
        a, b: pytrees like the params of the group.
        rescaling: the network's `RescalingGroup`; both are balanced first, so that networks are
            compared modulo permutations *and* rescalings.
        key: of the order in which classes are visited, by default `jax.random.key(0)`.

    Returns:
        A `Match`. It is a local optimum: finding the best is as hard as quadratic assignment. A
        permuted copy of a generic network is recovered exactly.

    Raises:
        InvalidInput: as for `permute`; for params that are not finite.

    References:
        Ainsworth, Hayase, Srinivasa, ICLR 2023 (arXiv:2209.04836), Algorithm 1; the assignment by
        SciPy's `linear_sum_assignment`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks, random_rescaling, rescale, rescaling_group
        >>> from jaxinv.symmetries import match, permutation_group, permute, random_permutations
        >>> w = networks.init_mlp(jax.random.key(0), (4, 6, 5, 2))
        >>> x = jnp.ones((1, 4))
        >>> group, scales = (f(networks.mlp, w, x) for f in (permutation_group, rescaling_group))
        >>> moved = permute(group, w, random_permutations(group, jax.random.key(1)))
        >>> moved = rescale(scales, moved, random_rescaling(scales, jax.random.key(2)))
        >>> bool(match(group, w, moved, rescaling=scales).distance < 1e-3)
        True
    """
    from scipy.optimize import linear_sum_assignment

    _checks.check_params(a)
    _checks.check_params(b)
    if rescaling is not None:
        a, b = balance(rescaling, a).params, balance(rescaling, b).params
    fixed = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(a)]
    moving = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(b)]
    permutations = [np.arange(c.size) for c in group.classes]
    permute(group, b, [jnp.asarray(p) for p in permutations])  # checks the shapes
    order_key = jax.random.key(0) if key is None else _checks.check_key("key", key)
    rounds = 0
    for rounds in range(1, _MOST_ROUNDS + 1):
        changed = False
        order = jax.random.permutation(jax.random.fold_in(order_key, rounds), len(permutations))
        for i in np.asarray(order).tolist():
            gain = _gains(group, i, fixed, moving, permutations)
            _, best = linear_sum_assignment(gain, maximize=True)
            rows = np.arange(len(best))
            before, after = gain[rows, permutations[i]].sum(), gain[rows, best].sum()
            if after > before + 1e-12 * abs(before):
                permutations[i], changed = best, True
        if not changed:
            break
    found = tuple(jnp.asarray(p) for p in permutations)
    moved = permute(group, b, found)
    squares = sum(
        jnp.sum((jnp.asarray(p) - jnp.asarray(q)) ** 2)
        for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(moved), strict=True)
    )
    return Match(moved, found, jnp.sqrt(jnp.asarray(squares)), rounds)


def _gains(
    group: PermutationGroup,
    which: int,
    fixed: list[np.ndarray],
    moving: list[np.ndarray],
    permutations: list[np.ndarray],
) -> np.ndarray:
    """⟨a's slice i, b's slice j⟩ over all places of a class, the other classes as they are."""
    found = group.classes[which]
    total = np.zeros((found.size, found.size))
    others = {
        place.leaf: [
            (p, q)
            for k, p in enumerate(group.classes)
            if k != which
            for q in p.places
            if q.leaf == place.leaf
        ]
        for place in found.places
    }
    for place in found.places:
        box = tuple(slice(*ends) for ends in place.box)
        b = moving[place.leaf].copy()
        for other, at in others[place.leaf]:
            where = tuple(slice(*ends) for ends in at.box)
            b[where] = np.take(b[where], permutations[group.classes.index(other)], axis=at.axis)
        left = np.moveaxis(fixed[place.leaf][box], place.axis, 0).reshape(found.size, -1)
        right = np.moveaxis(b[box], place.axis, 0).reshape(found.size, -1)
        total += left @ right.T
    return total
