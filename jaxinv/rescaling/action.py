"""A rescaling group as arrays, and its linear action s = Bu and Bᵀ on leaves."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxinv._checks import calling, check_floats
from jaxinv._numerics import scaled
from jaxinv._numerics.vectors import reduced_to, summed_to
from jaxinv.errors import InvalidInput
from jaxinv.rescaling.structure import Structure, generator_names
from jaxinv.typing import Array, Constant, PyTree

# |log| of factors up to here are floats of every width that is computed in.
_FAR = 80.0


class RescalingGroup(NamedTuple):
    """All w ↦ w·exp(Bu), u ∈ R^dim, that leave a network unchanged; B is a sparse integer matrix.

    The log-scale of leaf l is Σ_t s[indices[l][t]], broadcast, where s = S u and S is the sparse
    matrix with entries `coefficients` at (`rows`, `columns`), so that a dense layer of K×N weights
    costs K + N numbers.

    Example:
        >>> import numpy as np
        >>> from jaxinv import networks
        >>> from jaxinv.rescaling import rescaling_group
        >>> params = {"Dense_0": {"kernel": np.ones((4, 3)), "bias": np.ones(3)},
        ...           "Dense_1": {"kernel": np.ones((3, 2))}}
        >>> group = rescaling_group(networks.mlp, params, np.zeros((1, 4)))
        >>> group.dim, group.names[0]
        (3, 'Dense_0/kernel out 0 → Dense_1/kernel in 0')
    """

    rows: Constant  # int32 (nnz,)
    columns: Constant  # int32 (nnz,): which generator
    coefficients: Constant  # int32 (nnz,)
    indices: tuple[tuple[Constant, ...], ...]  # per leaf: int32 arrays that broadcast to the leaf
    structure: Structure

    @property
    def dim(self) -> int:
        """Number of generators."""
        return self.structure.dim

    @property
    def names(self) -> list[str]:
        """A readable name per generator: the weights that it multiplies → those that it divides.

        `Dense_0/kernel out 17 → Dense_1/kernel in 17` is column 17 of one kernel and row 17 of the
        next. Of a unit's incoming weights only kernels are named, not the biases beside them.
        """
        return generator_names(self.structure, self[:3], self.indices)

    @property
    def layers(self) -> tuple[str, ...]:
        """For every generator the name of the leaf whose outputs it scales."""
        return tuple(self.structure.leaf_names[i] for i in self.structure.layers)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters on which the function cannot depend; they are in no generator."""
        return self.structure.unused

    @property
    def pinned_by(self) -> tuple[tuple[str, str], ...]:
        """(operation, source line) of what fixes the scale of its operands."""
        return self.structure.pinned_by

    @property
    def tied_by(self) -> tuple[tuple[str, str], ...]:
        """(operation, source line) of what gives several units one scale, as a sum over them."""
        return self.structure.tied_by

    @property
    def ignored(self) -> tuple[tuple[str, str], ...]:
        """(epsilon, source line) of what `ignore_epsilon` took for zero."""
        return self.structure.ignored

    @property
    def relies_on(self) -> tuple[tuple[str, str, str], ...]:
        """(closed-over array, operation, source line) wherever zeros of the array are used.

        The generators leave the function unchanged as long as those zeros stay where they are.
        """
        return self.structure.relies_on

    def __str__(self) -> str:
        """Generators by layer, and what limits the group."""
        s = self.structure
        lines = [f"RescalingGroup of dimension {s.dim} on {len(s.leaf_names)} leaves"]
        counts = np.bincount(np.asarray(s.layers, np.int64), minlength=len(s.leaf_names))
        lines += [
            f"  {n:6d} scale the outputs of {name}"
            for n, name in zip(counts, s.leaf_names, strict=True)
            if n
        ]
        lines += [f"  unused: {name}" for name in s.unused]
        lines += [f"  pinned by {name} at {where}" for name, where in s.pinned_by]
        lines += [f"  tied by {name} at {where}" for name, where in s.tied_by]
        lines += [f"  taken for 0: {name} at {where}" for name, where in s.ignored]
        lines += [f"  relies on the zeros of {a} in {name} at {at}" for a, name, at in s.relies_on]
        return "\n".join(lines)


def checked_leaves(
    group: RescalingGroup, tree: PyTree, what: str, *, finite: bool = False
) -> list[Array]:
    """Leaves of a pytree of floats like params; `InvalidInput` if it is not one."""
    s = group.structure
    if jax.tree.structure(tree) != s.tree:
        raise InvalidInput(
            f"{what} has another tree structure than the params of the group:\n"
            f"  {jax.tree.structure(tree)}\n  {s.tree}"
        )
    leaves = jax.tree.leaves(tree)
    for name, shape, leaf in zip(s.leaf_names, s.leaf_shapes, leaves, strict=True):
        check_floats(
            f"{what}: {name}",
            leaf,
            what=f"{what} to rescale",
            finite=finite,
            complex_numbers=True,
        )
        if jnp.shape(leaf) != shape:
            raise InvalidInput(
                f"{what}: {name} has shape {jnp.shape(leaf)}, but the group was found for {shape}."
            )
    return leaves


def checked_u(group: RescalingGroup, u: object) -> Array:
    with calling("jnp.asarray(u)", u, remedy="u must be an array of numbers."):
        u = jnp.asarray(u)
    kinds = (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(u.dtype, kind) for kind in kinds):
        raise InvalidInput(f"u has dtype {u.dtype}, but it must hold real numbers.")
    if u.shape != (group.dim,):
        raise InvalidInput(
            f"u has shape {u.shape}, but the group has {group.dim} generators: pass ({group.dim},)."
        )
    return u


def class_scales(group: RescalingGroup, u: Array) -> Array:
    """Log-scales s = S u of the classes, (num_classes,); class 0 has scale 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.rescaling import rescaling_group
        >>> from jaxinv.rescaling.group import class_scales
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1],
        ...                         [jnp.ones((1, 1)), jnp.ones((1, 1))], jnp.zeros((1, 1)))
        >>> class_scales(group, jnp.array([3.0])).tolist()
        [0.0, 3.0, -3.0]
    """
    zeros = jnp.zeros(group.structure.num_classes, u.dtype)
    return zeros.at[group.rows].add(
        jnp.asarray(group.coefficients).astype(u.dtype) * u[group.columns]
    )


def transpose(group: RescalingGroup, leaves: list[Array]) -> Array:
    """Bᵀ v for v given by its leaves: sums over the parameters of each class, then Sᵀ."""
    dtype = jnp.result_type(*leaves)
    pairs = zip(leaves, group.indices, strict=True)
    parts = [
        (ids, summed_to(leaf.astype(dtype), ids.shape)) for leaf, terms in pairs for ids in terms
    ]
    totals = jnp.zeros(group.structure.num_classes, dtype)
    if parts:
        totals = totals.at[_joined(ids for ids, _ in parts)].add(_joined(p for _, p in parts))
    picked = jnp.asarray(group.coefficients).astype(dtype) * totals[group.rows]
    return jnp.zeros(group.dim, dtype).at[group.columns].add(picked)


# Compiled whole: operation by operation, each would be a program for each shape of a leaf.
@jax.jit
def leaf_log_scales(group: RescalingGroup, u: Array) -> list[Array]:
    s = class_scales(group, u)
    leaves = []
    for shape, terms in zip(group.structure.leaf_shapes, group.indices, strict=True):
        total = jnp.zeros((1,) * len(shape), u.dtype)
        for ids in terms:
            total = total + s[ids]
        leaves.append(total)
    return leaves


@functools.partial(jax.jit, static_argnums=(1, 5))
def times_exp(
    group: RescalingGroup,
    touched: tuple[int, ...],
    leaves: list[Array],
    u: Array,
    log_base: Array,
    exact: bool,
) -> list[Array]:
    """The leaves of these numbers times exp(Bu), or by shifts of their exponents."""
    moved: list[Array] = []
    scales = leaf_log_scales(group, u if exact else u * log_base)
    for i, leaf in zip(touched, leaves, strict=True):
        if jnp.iscomplexobj(leaf):
            parts = [_times(part, scales[i], exact) for part in (leaf.real, leaf.imag)]
            moved.append(lax.complex(*parts))
        else:
            moved.append(_times(leaf, scales[i], exact))
    return moved


def _times(leaf: Array, scale: Array, exact: bool) -> Array:
    """leaf · e^scale, or leaf · 2^scale by a shift of its exponents."""
    wide = leaf.astype(scaled.working_dtype([leaf]))
    if exact:
        wide = scaled.shift(wide, jnp.broadcast_to(scale, wide.shape))
    else:
        # Two halves: a factor beyond the range of floats may well meet a weight that it suits.
        # Elsewhere one factor, which is rounded once, and exact where u·log(base) is meant so.
        far = abs(scale) > _FAR
        half = jnp.exp(jnp.where(far, scale / 2, scale)).astype(wide.dtype)
        wide = wide * half * jnp.where(far, half, 1)
    return wide.astype(leaf.dtype)


@jax.jit
def tangent(group: RescalingGroup, leaves: list[Array], u: Array) -> list[Array]:
    scales = leaf_log_scales(group, u)
    return [leaf * s.astype(leaf.dtype) for leaf, s in zip(leaves, scales, strict=True)]


@jax.jit
def cotangent(group: RescalingGroup, leaves: list[Array], g: list[Array]) -> Array:
    products = [leaf * c.astype(leaf.dtype) for leaf, c in zip(leaves, g, strict=True)]
    return transpose(group, products)


@jax.jit
def dense_tangents(group: RescalingGroup, leaves: list[Array]) -> Array:
    eye = jnp.eye(group.dim, dtype=jnp.result_type(*leaves))
    return jax.vmap(lambda u: ravel_pytree(tangent(group, leaves, u))[0])(eye).T


def log_add(into: Array, parts: Sequence[tuple[Constant, Array]]) -> Array:
    """log(exp(into) + Σ exp(part) at the ids that come with it): no overflow, no underflow."""
    if not parts:
        return into
    all_ids = _joined(ids for ids, _ in parts)
    tops = _joined(reduced_to(jnp.max, part, ids.shape) for ids, part in parts)
    top = into.at[all_ids].max(tops)
    shift = jnp.where(top > -jnp.inf, top, 0)
    sums = [reduced_to(jnp.sum, jnp.exp(part - shift[ids]), ids.shape) for ids, part in parts]
    total = jnp.exp(into - shift).at[all_ids].add(_joined(sums))
    return shift + jnp.log(total)


def _joined(arrays: Iterable[Constant]) -> Array:
    """One vector: one scatter compiles and runs faster than one for each leaf."""
    return jnp.concatenate([jnp.ravel(a) for a in arrays])
