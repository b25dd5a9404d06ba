"""Rotations of a residual stream, to the axes of its activations or away from them.

A class O(n) of a group is a stream h that is read through normalisations. Every orthogonal Q may
turn it, h → Q·h, if all that writes to it and all that reads it turns along; gains of the
normalisations in between need not be folded first.

* `principal_axes`: Σ h·hᵀ becomes diagonal, so that features can be cut from the end;
* `hadamard_rotation`: every feature becomes a sum of all with signs, so that none is an outlier.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._numerics import scaled
from jaxinv.errors import InvalidInput
from jaxinv.frames import matrices as _matrices
from jaxinv.rescaling.action import checked_leaves
from jaxinv.symmetries.group import SymmetryGroup
from jaxinv.symmetries.metrics import ROTATIONS
from jaxinv.typing import Array, ArrayLike, DTypeLike, Params


class Rotated(NamedTuple):
    """The same function with a rotated stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import principal_axes, symmetry_group
        >>> w = {"a": jnp.eye(2)}
        >>> group = symmetry_group(lambda w, x: x @ w["a"] @ w["a"].T, w, jnp.eye(2))
        >>> principal_axes(group, w, jnp.diag(jnp.array([1.0, 3.0]))).rotation.shape
        (2, 2)
    """

    params: Params
    rotation: Array  # (n, n): the stream h becomes rotation·h


def principal_axes(
    group: SymmetryGroup, params: Params, activations: ArrayLike, *, which: int | None = None
) -> Rotated:
    """Rotate a stream onto the principal axes of given activations: Q·(Σ h·hᵀ)·Qᵀ is diagonal.

    Q = Uᵀ from the eigendecomposition Σ h·hᵀ = U·Λ·Uᵀ, the largest first. Where a mean of the
    stream is taken (layer normalisation), Q must leave (1, …, 1) alone: then Q = Bᵀ·Uᵀ·B + 1·1ᵀ/n
    with the rows of B an orthonormal basis of what has no mean, and B·(Σ h·hᵀ)·Bᵀ = U·Λ·Uᵀ.

    Args:
        group: as `symmetry_group` returns it.
        params: pytree of float arrays.
        activations: values of the stream, of shape (…, n), in the places where it is read; not
            centred.
        which: number in `group.classes` of the class to turn, of kind O or O1; by default the only
            one.

    Returns:
        A `Rotated`; the function is what it was, to rounding.

    Raises:
        InvalidInput: for params that do not fit the group, a class that is no rotation, several
            where none is named, or activations of another width.

    References:
        Ashkboos et al., "SliceGPT", ICLR 2024 (arXiv:2401.15024), §3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import principal_axes, symmetry_group
        >>> def rms(h):
        ...     return h / jnp.sqrt((h * h).mean(-1, keepdims=True))
        >>> def net(w, x):
        ...     return jnp.tanh(rms(x @ w["in"]) * w["gain"] @ w["out"])
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> w = {"in": jax.random.normal(keys[0], (3, 4)), "gain": jnp.arange(1.0, 5.0)}
        >>> w["out"], x = jax.random.normal(keys[1], (4, 2)), jax.random.normal(keys[2], (9, 3))
        >>> found = principal_axes(symmetry_group(net, w, x), w, x @ w["in"])
        >>> bool(jnp.allclose(net(found.params, x), net(w, x), atol=1e-4))
        True
        >>> h = x @ found.params["in"]
        >>> bool(abs(h.T @ h - jnp.diag(jnp.diag(h.T @ h))).max() < 1e-3)
        True
    """
    leaves = checked_leaves(group.rescaling, params, "params", finite=True)
    number = _rotating(group, which)
    kind, n = group.classes[number].kind, group.classes[number].size
    dtype = scaled.working_dtype(leaves)
    h = jnp.asarray(activations)
    if h.ndim < 1 or h.shape[-1] != n:
        raise InvalidInput(
            f"activations have shape {h.shape}, but the stream has {n} features: they must be "
            f"(…, {n})."
        )
    h = h.reshape(-1, n).astype(dtype)
    h = h / jnp.maximum(abs(h).max(initial=0), jnp.finfo(dtype).tiny)
    B = jnp.asarray(_without_mean(n) if kind == "O1" else np.eye(n), dtype)
    _, U = jnp.linalg.eigh(B @ (h.T @ h) @ B.T)
    return _turned(group, params, number, _whole(U[:, ::-1].T, kind, n, dtype))


def hadamard_rotation(
    group: SymmetryGroup, params: Params, key: Array, *, which: int | None = None
) -> Rotated:
    """Rotate a stream by a random Hadamard matrix, as before quantisation: Q = H·diag(±1)/√n.

    Every feature becomes a sum of all features with signs, so that an outlier is spread over all of
    them. Where n = 2ᵏ·m with odd m, H is the product of a Hadamard matrix of size 2ᵏ and the
    discrete cosine transform of size m, with entries of at most √(2/n). Where a mean of the stream
    is taken, Q leaves (1, …, 1) alone, and acts so on an orthonormal basis of what has no mean.

    Args:
        group: as `symmetry_group` returns it.
        params: pytree of float arrays.
        key: a PRNG key, of the signs.
        which: see `principal_axes`.

    Returns:
        A `Rotated`; the function is what it was, to rounding.

    Raises:
        InvalidInput: as for `principal_axes`, or for an invalid key.

    References:
        Ashkboos et al., "QuaRot", NeurIPS 2024 (arXiv:2404.00456), §4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import hadamard_rotation, symmetry_group
        >>> net = lambda w, x: x @ w @ w.T
        >>> w = jnp.array([[5.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> found = hadamard_rotation(symmetry_group(net, w, jnp.eye(2)), w, jax.random.key(0))
        >>> print(abs(found.params[0]))
        [2.5 2.5 2.5 2.5]
    """
    leaves = checked_leaves(group.rescaling, params, "params", finite=True)
    number = _rotating(group, which)
    kind, n = group.classes[number].kind, group.classes[number].size
    dtype = scaled.working_dtype(leaves)
    size = n - 1 if kind == "O1" else n
    signs = jax.random.rademacher(_checks.check_key("key", key), (size,), dtype)
    Q = jnp.asarray(_hadamard(size), dtype) * signs
    return _turned(group, params, number, _whole(Q, kind, n, dtype))


def _rotating(group: SymmetryGroup, which: int | None) -> int:
    """The number of the class to turn."""
    rotations = [i for i, c in enumerate(group.classes) if c.kind in ROTATIONS]
    names = "; ".join(f"{i}: {group.classes[i].name}" for i in rotations) or "none"
    if which is None:
        if len(rotations) != 1:
            raise InvalidInput(
                f"which of the rotations is meant? The group has {len(rotations)}: {names}. Pass "
                "the number of one."
            )
        return rotations[0]
    if _checks.integer("which", which, 0) not in rotations:
        raise InvalidInput(f"class {which} of the group is no rotation. Rotations are: {names}.")
    return which


def _whole(Q: Array, kind: object, n: int, dtype: DTypeLike) -> Array:
    """A rotation of the stream, of one of the vectors without a mean where that is fixed."""
    if kind != "O1":
        return Q
    B = jnp.asarray(_without_mean(n), dtype)
    return B.T @ Q @ B + jnp.full((n, n), 1 / n, dtype)


def _turned(group: SymmetryGroup, params: Params, number: int, Q: Array) -> Rotated:
    leaves, tree = jax.tree.flatten(params)
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    one = dataclasses.replace(group.structure, classes=(group.classes[number],))
    new = _matrices.moved(one, group.constants, arrays, [Q], [Q.T])
    return Rotated(jax.tree.unflatten(tree, new), Q)


# --- orthogonal matrices ----------------------------------------------------------------------


def _hadamard(n: int) -> np.ndarray:
    """Orthogonal, with entries of one size, or of at most √(2/n) where n is no power of 2."""
    odd = n // (n & -n)
    H = _cosines(odd)
    while len(H) < n:
        H = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2), H)
    return H


def _cosines(n: int) -> np.ndarray:
    """The orthogonal discrete cosine transform; its first row is constant."""
    k = np.arange(n)
    C = np.sqrt(2 / n) * np.cos(np.pi * k[:, None] * (2 * k + 1) / (2 * n))
    C[0] /= np.sqrt(2)
    return np.asarray(C)


def _without_mean(n: int) -> np.ndarray:
    """An orthonormal basis of the vectors without a mean, (n − 1, n)."""
    return _cosines(n)[1:]
