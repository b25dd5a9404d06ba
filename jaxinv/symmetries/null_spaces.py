"""The linear equations J(θ) ξ(θ) = 0 of symmetries, over random θ, and their null spaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxinv._numerics import tolerances as policy
from jaxinv.errors import InvalidInput
from jaxinv.typing import Array, ArrayLike, Constant, Inputs, Network, Params, PyTree

Kind = Literal["scaling", "translation", "linear"]
KINDS: tuple[Kind, ...] = ("scaling", "translation", "linear")


# --- the equations --------------------------------------------------------------------


def as_double(leaf: ArrayLike) -> Array:
    return jnp.asarray(np.asarray(leaf).astype(np.float64))


def inputs_of(x: Inputs) -> Callable[[Array], Inputs]:
    """x as a function of a key: what was given, or normal numbers where only a shape was."""

    def one(leaf: ArrayLike, key: Array) -> Array:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            leaf = jnp.asarray(leaf)
            return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InvalidInput(
                f"x has a {leaf.dtype} input given by its shape alone; only floats can be drawn. "
                "Pass its values."
            )
        return jax.random.normal(key, leaf.shape, jnp.float64)

    leaves, tree = jax.tree.flatten(x)

    def draw(key: Array) -> Inputs:
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [one(a, k) for a, k in zip(leaves, keys, strict=True)])

    return draw


def sampler(
    params: Params, theta: Array, sample: Callable[[Array, Params], Params] | None
) -> Callable[[Array], Array]:
    if sample is not None:
        return lambda key: ravel_pytree(jax.tree.map(jnp.asarray, sample(key, params)))[0].astype(
            jnp.float64
        )
    scales = []
    for leaf in jax.tree.leaves(params):
        size = float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))))
        scales.append(np.full(leaf.size, size if size > 0 else 1.0))
    scale = jnp.asarray(np.concatenate(scales))
    return lambda key: scale * jax.random.normal(key, theta.shape, jnp.float64)


class Problem(NamedTuple):
    fn: Network
    unravel: Callable[[Array], Params]
    inputs: Callable[[Array], Inputs]
    shapes: list[tuple[int, ...]]

    def outputs(self, theta: Array, x: Inputs) -> Array:
        return ravel_pytree(self.fn(self.unravel(theta), x))[0]

    def rows(self) -> int:
        theta = jax.ShapeDtypeStruct((sum(map(math.prod, self.shapes)),), jnp.float64)
        x = jax.eval_shape(self.inputs, jax.random.key(0))
        return int(jax.eval_shape(self.outputs, theta, x).shape[0])

    def axes(self) -> list[tuple[int, int, int]]:
        """(leaf, axis, offset among the unknowns) of every matrix."""
        found, offset = [], 0
        for l, shape in enumerate(self.shapes):
            for axis, n in enumerate(shape or (1,)):
                found.append((l, axis, offset))
                offset += n * n
        return found

    def unknowns(self, kind: Kind) -> int:
        if kind == "linear":
            return sum(n * n for shape in self.shapes for n in shape or (1,))
        return sum(map(math.prod, self.shapes))

    def trivial(self) -> np.ndarray:
        """Coefficients whose field is 0: the identity on one axis of a leaf minus on another."""
        total, vectors = self.unknowns("linear"), []
        places = {(l, a): offset for l, a, offset in self.axes()}
        for l, shape in enumerate(self.shapes):
            for axis in range(1, len(shape)):
                vector = np.zeros(total)
                for a, sign in ((0, 1.0), (axis, -1.0)):
                    n = shape[a]
                    vector[places[l, a] : places[l, a] + n * n] = sign * np.eye(n).ravel()
                vectors.append(vector)
        stacked = np.array(vectors).reshape(-1, total)
        return np.linalg.qr(stacked.T)[0].T if len(stacked) else stacked

    def split(self, flat: Constant) -> list[Constant]:
        """Vectors of parameters, along the last axis, by leaf."""
        leaves, start = [], 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            leaves.append(flat[..., start:stop].reshape(*flat.shape[:-1], *(shape or (1,))))
            start = stop
        return leaves

    def columns(self, kind: Kind, jacobian: Array, theta: Array) -> Array:
        """J(θ) ξ_i(θ) for all unknowns i, (rows, unknowns)."""
        if kind == "translation":
            return jacobian
        if kind == "scaling":
            return jacobian * theta
        parts = []
        for J, w in zip(self.split(jacobian), self.split(theta), strict=True):
            for axis in range(w.ndim):
                slopes = jnp.moveaxis(J, axis + 1, -1).reshape(len(J), -1, w.shape[axis])
                moved = jnp.moveaxis(w, axis, -1).reshape(-1, w.shape[axis])
                # (A·θ)_i = Σ_j A_ij θ_j along the axis.
                parts.append(jnp.einsum("rpi,pj->rij", slopes, moved).reshape(len(J), -1))
        return jnp.concatenate(parts, axis=1)


def equations_of(
    problem: Problem,
    draw: Callable[[Array], Array],
    samples: int,
    kinds: list[Kind],
) -> Callable[[Array], dict[Kind, Array]]:
    """A function of a key: per kind the stacked columns for `samples` random θ.

    Of every sample at most one row per unknown is left.
    """

    def one(key: Array) -> dict[Kind, Array]:
        weights_key, input_key = jax.random.split(key)
        theta, x = draw(weights_key), problem.inputs(input_key)
        rows = jax.eval_shape(problem.outputs, theta, x).shape[0]
        differentiate = jax.jacrev if rows < theta.size else jax.jacfwd
        J = differentiate(lambda t: problem.outputs(t, x))(theta)
        # Outputs at different θ may differ by orders of magnitude; each sample counts the same.
        size = jnp.sqrt(jnp.mean(J**2))
        J = J / jnp.where(size > 0, size, 1)
        blocks = {}
        for kind in kinds:
            M = problem.columns(kind, J, theta)
            # An orthogonal map of the rows: same null space, bounded memory.
            blocks[kind] = jnp.linalg.qr(M, mode="r") if M.shape[0] > M.shape[1] else M
        return blocks

    return jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, samples)))


def memory(rows: int, size: int, sizes: dict[Kind, int], samples: int) -> float:
    """Bytes: a Jacobian and its columns, the stacked blocks, and their decomposition."""
    total = 2.0 * rows * size
    for unknowns in sizes.values():
        total += rows * unknowns + 2.0 * samples * min(rows, unknowns) * unknowns
        total += 12.0 * unknowns**2  # measured: the decompositions copy
    return 8 * total


# --- null spaces ----------------------------------------------------------------------


class NullSpace(NamedTuple):
    """Coefficients c with M c = 0, and how sure that is."""

    basis: PyTree  # numpy, with a leading axis of the dimension
    dimension: int
    singular_values: np.ndarray
    gap: float
    tolerance: float
    certain: bool


def null_space(M: np.ndarray, problem: Problem, kind: Kind, params: Params) -> NullSpace:
    """Coefficients with M c = 0, orthonormal and orthogonal to the trivial ones."""
    unknowns = M.shape[1]
    trivial = problem.trivial() if kind == "linear" else None
    norms = np.linalg.norm(M, axis=0)
    zero = norms <= policy.NULL_SPACE_COLUMN * norms.max(initial=0)
    scale = np.where(zero, 1.0, norms)
    M = np.where(zero, 0.0, M / scale)
    if trivial is not None and len(trivial):
        # They solve the equations for a reason that is no symmetry: make them solve them no more.
        M = np.concatenate([M, np.linalg.qr((trivial * scale).T)[0].T])
    # Rows of zeros where there are too few: then all of V comes without a larger U.
    M = np.concatenate([M, np.zeros((max(unknowns - len(M), 0), unknowns))])
    _, s, Vt = np.linalg.svd(M, full_matrices=False)
    rank, gap, tolerance = _rank(s)
    basis = Vt[rank:] / scale
    basis = np.linalg.qr(basis.T)[0].T
    if trivial is not None:
        basis = basis - (basis @ trivial.T) @ trivial
        basis = np.linalg.qr(basis.T)[0].T
    largest = float(s[0]) if unknowns else 0.0
    dropped = float(s[rank]) / largest if rank < unknowns and largest > 0 else 0.0
    return NullSpace(
        basis=_as_tree(basis, problem, kind, params),
        dimension=unknowns - rank,
        singular_values=s,
        gap=gap,
        tolerance=tolerance,
        certain=bool(gap >= policy.NULL_SPACE_GAP and dropped < policy.NULL_SPACE_ZERO),
    )


def _rank(s: np.ndarray) -> tuple[int, float, float]:
    """(rank, gap, relative tolerance): the rank is where the largest ratio of neighbours is.

    Values below rounding are raised to it, and a full rank is a gap towards it: the smallest of a
    matrix without null space still has to stand above what a null space would leave.
    """
    if not len(s) or s[0] == 0:
        return 0, math.inf, 0.0
    floor = policy.roundings(len(s), 16, np.float64)
    relative = np.maximum(np.append(s / s[0], 0.0), floor)
    ratios = relative[:-1] / relative[1:]
    rank = int(np.argmax(ratios)) + 1
    return rank, float(ratios[rank - 1]), float(np.sqrt(relative[rank - 1] * relative[rank]))


def _as_tree(basis: np.ndarray, problem: Problem, kind: Kind, params: Params) -> PyTree:
    tree = jax.tree.structure(params)
    if kind != "linear":
        leaves = problem.split(basis)
        shapes = [(len(basis), *shape) for shape in problem.shapes]
        return jax.tree.unflatten(
            tree, [a.reshape(shape) for a, shape in zip(leaves, shapes, strict=True)]
        )
    matrices: list[list[np.ndarray]] = [[] for _ in problem.shapes]
    for l, axis, offset in problem.axes():
        n = (problem.shapes[l] or (1,))[axis]
        matrices[l].append(basis[:, offset : offset + n * n].reshape(-1, n, n))
    return jax.tree.unflatten(tree, [tuple(m) for m in matrices])
