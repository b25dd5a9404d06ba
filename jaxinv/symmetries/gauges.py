"""Representatives of an orbit of matrix symmetries, and the distance between two orbits.

* `balance_matrices`: what each matrix acts on is as large as what its dual acts on, the member of
  smallest norm;
* `align`: one network turned onto another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv import _checks
from jaxinv._numerics import scaled
from jaxinv._numerics.tolerances import default_tolerance
from jaxinv.frames import matrices as _matrices
from jaxinv.rescaling.action import checked_leaves
from jaxinv.rescaling.gauges import balance
from jaxinv.symmetries.group import SymmetryGroup
from jaxinv.symmetries.metrics import applied, metrics, seen_part
from jaxinv.typing import Array, Params

_MOST_SWEEPS = 500


class MatrixGauge(NamedTuple):
    """A representative of an orbit, and how it was reached.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import balance_matrices, symmetry_group
        >>> w = [jnp.full((1, 2), 8.0) + jnp.eye(1, 2), jnp.eye(2)]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.ones((1, 1)))
        >>> balance_matrices(group, w).params[0].shape
        (1, 2)
    """

    params: Params
    steps: Array  # int32 scalar: sweeps over all classes
    error: Array  # scalar: largest ‖P − D‖/(‖P‖ + ‖D‖) of a class, or last log-factor
    converged: Array  # bool scalar: error <= rtol


def balance_matrices(
    group: SymmetryGroup, params: Params, *, rtol: float | None = None
) -> MatrixGauge:
    """The member of the orbit in which every GL class is balanced: Σ W·Wᵀ = Σ V·Vᵀ.

    W are the weights on which M acts, V those on which M⁻ᵀ does. One class is balanced in one step:
    with P = Σ W·Wᵀ and D = Σ V·Vᵀ the solution X = P⁻¹ # D (their geometric mean) of X·P·X = D
    gives M = X^{1/2}. Classes and rescalings are taken in turn until all are balanced: the sum of
    squares never grows, and is smallest at the end. Rotations are what is left of the symmetries.

    Args:
        group: as `symmetry_group` returns it.
        params: pytree of float arrays.
        rtol: largest ‖P − D‖/(‖P‖ + ‖D‖) to stop at; default 1e-10 in float64, 1e-5 in float32.

    Returns:
        A `MatrixGauge`. Not converged where P or D is singular: then the orbit has no smallest
        member, as in a linear layer wider than what it connects. Gains between a matrix and the
        weights are divided out before the norms are taken.

    Raises:
        InvalidInput: for params that do not fit the group.

    References:
        Kempf, Ness, "The length of vectors in representation spaces" (1979), for smallest members
        of an orbit; Arora, Cohen, Hazan, ICML 2018 (arXiv:1802.06509), for balanced linear layers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import balance_matrices, symmetry_group
        >>> fn = lambda w, x: x @ w["in"] @ w["out"]
        >>> w = {"in": jnp.diag(jnp.array([4.0, 1.0])), "out": jnp.array([[1.0, 0.0], [1.0, 9.0]])}
        >>> gauge = balance_matrices(symmetry_group(fn, w, jnp.eye(2)), w)
        >>> a, b = gauge.params["in"], gauge.params["out"]
        >>> bool(gauge.converged), bool(jnp.allclose(a.T @ a, b @ b.T, rtol=1e-3))
        (True, True)
    """
    leaves = checked_leaves(group.rescaling, params, "params", finite=True)
    dtype = scaled.working_dtype(leaves)
    tolerance = default_tolerance(dtype) if rtol is None else rtol
    tolerance = _checks.real("rtol", tolerance, lambda t: t >= 0, "a fixed number >= 0")
    tree = jax.tree.structure(params)
    start = [jnp.asarray(leaf).astype(dtype) for leaf in leaves]
    general = [i for i, c in enumerate(group.classes) if c.kind == "GL"]

    def rescaled(w: list[Array]) -> tuple[list[Array], Array]:
        """Balanced by rescalings, and how far those went."""
        if not group.rescaling.dim:
            return w, jnp.zeros((), dtype)
        found = balance(group.rescaling, jax.tree.unflatten(tree, w))
        return jax.tree.leaves(found.params), abs(found.u).max().astype(dtype)

    def imbalance(w: Sequence[Array], far: Array) -> Array:
        found = metrics(group, w, plain=True)
        errors = [far]
        for i in general:
            P, D = found[i]
            if P is not None and D is not None:
                size = jnp.linalg.norm(P) + jnp.linalg.norm(D)
                errors.append(jnp.linalg.norm(P - D) / jnp.where(size > 0, size, 1))
        return jnp.stack(errors).max()

    def go_on(carry: tuple[Array, list[Array], Array]) -> Array:
        step, _, error = carry
        return (step < _MOST_SWEEPS) & (error > tolerance)

    def once(carry: tuple[Array, list[Array], Array]) -> tuple[Array, list[Array], Array]:
        step, w, _ = carry
        for i in general:
            P, D = metrics(group, w, plain=True)[i]
            if P is not None and D is not None:
                w = _turned(group, w, i, *_meeting(P, D))
        w, far = rescaled(w)
        return step + 1, w, imbalance(w, far)

    first = (jnp.zeros((), jnp.int32), start, jnp.full((), jnp.inf, dtype))
    steps, w, error = lax.while_loop(go_on, once, first)
    new = [a.astype(jnp.asarray(leaf).dtype) for a, leaf in zip(w, leaves, strict=True)]
    return MatrixGauge(jax.tree.unflatten(tree, new), steps, error, error <= tolerance)


def _meeting(P: Array, D: Array) -> tuple[Array, Array]:
    """M and M⁻ᵀ with M·P·Mᵀ = M⁻ᵀ·D·M⁻¹; the identity where a Gram matrix is singular."""
    n = P.shape[0]
    s, U = jnp.linalg.eigh((P + P.T) / 2)
    least = n * jnp.finfo(s.dtype).eps
    root = (U * jnp.sqrt(jnp.maximum(s, 0))) @ U.T
    inverse_root = (U / jnp.sqrt(jnp.where(s > 0, s, 1))) @ U.T
    t, V = jnp.linalg.eigh(root @ ((D + D.T) / 2) @ root)
    middle = (V * jnp.sqrt(jnp.maximum(t, 0))) @ V.T
    X = inverse_root @ middle @ inverse_root
    e, W = jnp.linalg.eigh((X + X.T) / 2)
    fine = (s[0] > least * s[-1]) & (t[0] > least * t[-1]) & (e[0] > 0)
    power = jnp.sqrt(jnp.sqrt(jnp.where(fine, e, 1)))
    eye = jnp.eye(n, dtype=P.dtype)
    M = jnp.where(fine, (W * power**2) @ W.T, eye)
    return M, jnp.where(fine, (W / power**2) @ W.T, eye)


def _turned(group: SymmetryGroup, w: Sequence[Array], i: int, M: Array, dual: Array) -> list[Array]:
    """Weights with M acting where class i does, and M⁻ᵀ where its dual does."""
    new = list(w)
    for place in group.classes[i].places:
        B = dual if place.relation.dual else M
        new[place.leaf] = applied(B, place, w, group.constants, new[place.leaf], 1)
    return new


class Aligned(NamedTuple):
    """One network turned onto another.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import align, symmetry_group
        >>> w = [jnp.eye(2), 2 * jnp.eye(2)]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
        >>> round(align(group, w, [2 * jnp.eye(2), jnp.eye(2)]).distance.item(), 4)
        0.0
    """

    distance: Array  # scalar: ‖reference − moved‖₂
    reference: Params  # balanced a
    moved: Params  # balanced b, rotated towards it
    converged: Array  # bool scalar: both could be balanced


def align(group: SymmetryGroup, a: Params, b: Params, *, sweeps: int = 30) -> Aligned:
    """Move b along its orbit as near to a as balancing and rotations bring it.

    Both are balanced (`balance_matrices`); rotations are then the only matrices left. Those of each
    class are found in turn by Procrustes' method: with C = Σ a·bᵀ over the places of the class,
    Q = U·Vᵀ from the singular value decomposition U·S·Vᵀ of C brings b nearest to a.

    Args:
        group: as `symmetry_group` returns it.
        a, b: pytrees of float arrays that fit the group.
        sweeps: times that every class is turned, ≥ 1; one is enough for classes that share no leaf.

    Returns:
        An `Aligned`. `distance` is 0 up to rounding for members of one orbit if both were balanced,
        no two classes share a leaf and no rotation is seen through a gain; else it is an upper
        bound of the distance between the orbits of the balanced members.

    Raises:
        InvalidInput: for params that do not fit the group, or sweeps below 1.

    References:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31,
        1966.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import act, align, random_element, symmetry_group
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> w = [jax.random.normal(keys[0], (4, 3)), jax.random.normal(keys[1], (3, 4))]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(4))
        >>> other = act(group, w, random_element(group, keys[2]))
        >>> bool(align(group, w, other).distance < 1e-4)
        True
    """
    sweeps = _checks.integer("sweeps", sweeps, 1)
    first, second = (balance_matrices(group, w) for w in (a, b))
    near, far = jax.tree.leaves(first.params), jax.tree.leaves(second.params)

    def sweep(_: Array, w: list[Array]) -> list[Array]:
        for i, found in enumerate(group.classes):
            C = jnp.zeros((found.size, found.size), near[0].dtype)
            for place in found.places:
                one, other = (seen_part(place, v, group.constants) for v in (near, w))
                rest = [axis for axis in range(one.ndim) if axis != place.axis]
                C = C + jnp.tensordot(one, other, (rest, rest))
            if found.kind in ("S", "O1"):
                # Ones are fixed: a part along them that outweighs the others.
                center = C - C.mean(axis=0) - C.mean(axis=1)[:, None] + C.mean()
                C = center + jnp.linalg.norm(C) + jnp.finfo(C.dtype).tiny
            if not isinstance(found.kind, str):
                # The polar factor of what is in an algebra is in it; other coordinates stay.
                C = _matrices.project(found.kind, C) + jnp.diag(found.kind.still(found.size))
            U, _, V = jnp.linalg.svd(C)
            w = _turned(group, w, i, U @ V, U @ V)
        return w

    far = lax.fori_loop(0, sweeps, sweep, far)
    distance = scaled.norm([x - y for x, y in zip(near, far, strict=True)])
    moved = jax.tree.unflatten(jax.tree.structure(b), far)
    return Aligned(distance, first.params, moved, first.converged & second.converged)


def distance_mod_symmetries(group: SymmetryGroup, a: Params, b: Params) -> Array:
    """Distance between two networks that does not see rescalings and matrix symmetries.

    ‖balanced a − Q·balanced b‖₂, with rotations Q as `align` finds them.

    Args:
        group, a, b: see `align`.

    Returns:
        A scalar; 0 up to rounding on one orbit, see `align`.

    Raises:
        InvalidInput: as for `align`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import distance_mod_symmetries, symmetry_group
        >>> w = [jnp.eye(2), 2 * jnp.eye(2)]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
        >>> round(distance_mod_symmetries(group, w, [jnp.eye(2), jnp.eye(2)]).item(), 4)
        0.8284
    """
    return align(group, a, b).distance
