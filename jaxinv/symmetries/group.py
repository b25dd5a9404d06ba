"""All continuous symmetries of a network that its program shows: rescalings, matrices, shifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._interpreter.batch import TracedNetwork, leading, traced_network
from jaxinv._interpreter.draws import traced_in
from jaxinv._interpreter.program import coarsest
from jaxinv.errors import InvalidInput
from jaxinv.frames import matrices as _matrices
from jaxinv.frames.follow import frames_of
from jaxinv.frames.matrices import MatrixClass, MatrixStructure, named
from jaxinv.rescaling import RescalingGroup, rescale, rescaling_group
from jaxinv.rescaling.action import checked_leaves
from jaxinv.typing import Array, Constant, DTypeLike, Inputs, Network, Params, PyTree

# A tangent moves the outputs by rounding only: measured against the same velocities with random
# signs, in units of the last place. Where these are coarse, never more than half of the digits.
_ROUNDINGS = 1e4


class Element(NamedTuple):
    """An element of the Lie algebra of a `SymmetryGroup`; `act` moves params by its exponential.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import random_element, symmetry_group
        >>> w = [jnp.ones((2, 3)), jnp.ones((3, 2))]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
        >>> element = random_element(group, jax.random.key(0))
        >>> element.scales.shape, [A.shape for A in element.matrices]
        ((3,), [(3, 3)])
    """

    scales: Array  # (rescaling.dim,)
    matrices: tuple[Array, ...]  # (n, n) per class


class SymmetryGroup(NamedTuple):
    """Rescalings and classes of matrices that leave a network unchanged.

    `print` of it names every class, its size, and the leaves on which it acts.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import symmetry_group
        >>> w = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 2))}
        >>> group = symmetry_group(lambda w, x: x @ w["in"] @ w["out"], w, jnp.eye(2))
        >>> print(group)
        SymmetryGroup: 3 rescalings and 6 dimensions of matrices beyond them
          GL(3): in out ~ out in
    """

    rescaling: RescalingGroup
    constants: tuple[Constant, ...]  # vectors that gains refer to
    structure: MatrixStructure
    verified: float | Constant  # largest relative change of the outputs in a trial; NaN: no trial
    rejected: tuple[str, ...]  # classes that rules proposed and the trial refused, or zero gains
    ended_by: tuple[tuple[str, str], ...]  # (operation, source line) of what allows no matrix

    @property
    def classes(self) -> tuple[MatrixClass, ...]:
        """The classes of matrices."""
        return self.structure.classes

    @property
    def beyond_rescaling(self) -> int:
        """Dimension of the matrices that are not diagonal."""
        return sum(c.beyond_rescaling for c in self.classes)

    def __str__(self) -> str:
        """The counts, and a line per class."""
        lines = [
            f"SymmetryGroup: {self.rescaling.dim} rescalings and {self.beyond_rescaling} "
            "dimensions of matrices beyond them"
        ]
        lines += [f"  {c.name}" for c in self.classes]
        lines += [f"  refused: {name}" for name in self.rejected]
        return "\n".join(lines)


def symmetry_group(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    ignore_epsilon: bool = False,
    batch_axis: int | None = 0,
    key: Array | None = None,
) -> SymmetryGroup:
    """Rescalings and matrix symmetries of a network, read off its program.

    Every axis of every value carries a frame, an unknown matrix A with δv = A·v. A contraction
    makes the frames of the two axes that meet dual (A and −Aᵀ), a sum makes them equal, a sum of
    squares along the axis leaves rotations, a mean leaves those that fix (1, …, 1), a gain g
    conjugates by diag(g), a rotary embedding leaves what commutes with its rotations, elementwise
    functions allow none. What is left is a group: GL(k) between
    two linear layers or inside attention, O(k) on a residual stream under RMS normalisation.

    Every class is tried before it is reported: a random element must leave the outputs alone to
    rounding, in float64, at parameters near the given ones. Where the network itself computes in
    less (an embedding or a softmax in float32), to the rounding of that.

    Args:
        fn: any JAX-traceable `fn(params, x) -> y`.
        params: pytree of float arrays, or of `jax.ShapeDtypeStruct`s: then nothing is tried, and
            `verified` is NaN.
        x: inputs with a batch axis; the trial uses their values, or random ones for shapes.
        ignore_epsilon: see `rescaling_group`; matrix symmetries need no such choice.
        batch_axis: see `rescaling_group`.
        key: of the random trial, by default `jax.random.key(0)`.

    Returns:
        A `SymmetryGroup`. See `act`, `random_element`, `symmetry_tangents`.

    Raises:
        InvalidInput: as for `rescaling_group`.

    Notes:
        Sound, not complete: a class that is reported is a symmetry. Not found are, among others,
        shifts of biases (`shift_tangents` looks for those numerically).

    References:
        Kunin et al., "Neural mechanics", ICLR 2021 (arXiv:2012.04728) and Zhao et al., ICLR 2023
        (arXiv:2210.17216) for matrix symmetries of linear layers; Ashkboos et al., "SliceGPT", ICLR
        2024 (arXiv:2401.15024) for the rotation of a residual stream.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import symmetry_group
        >>> def attention(w, x):
        ...     scores = jax.nn.softmax((x @ w["q"]) @ (x @ w["k"]).mT)
        ...     return scores @ (x @ w["v"]) @ w["o"]
        >>> keys = iter(jax.random.split(jax.random.key(0), 9))
        >>> w = {n: jax.random.normal(next(keys), (6, 3)) for n in "qkv"}
        >>> w["o"] = jax.random.normal(next(keys), (3, 6))
        >>> print(symmetry_group(attention, w, jax.random.normal(next(keys), (2, 4, 6))))
        SymmetryGroup: 6 rescalings and 12 dimensions of matrices beyond them
          GL(3): k out ~ q out
          GL(3): o in ~ v out
    """
    _checks.check_params(params, values=False)
    inputs = leading(x, batch_axis)
    network = traced_network(fn, params, inputs, batch_axis, least=3)
    rescaling = rescaling_group(network, params, inputs, ignore_epsilon=ignore_epsilon)
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params))
    frames = frames_of(network.program.trace, shapes)
    names = [name or "params" for name in _checks.leaf_names(params, "")]
    used = {i for i, name in enumerate(names) if name not in rescaling.unused}
    classes = tuple(
        MatrixClass(c.kind, c.size, named(c, names, shapes), c.places)
        for c in frames.classes
        if used & {place.leaf for place in c.places}
    )
    structure = MatrixStructure(classes, shapes)
    group = SymmetryGroup(rescaling, frames.constants, structure, np.nan, (), frames.ended_by)
    if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(params)):
        return group
    return _tried(group, fn, params, x, batch_axis, jax.random.key(0) if key is None else key)


# --- the trial ------------------------------------------------------------------------------


def _tried(
    group: SymmetryGroup,
    fn: Network,
    params: Params,
    x: Inputs,
    batch_axis: int | None,
    key: Array,
) -> SymmetryGroup:
    """The group without the classes that move the outputs, or whose gains are zero."""
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((params, x))):
        raise InvalidInput(
            "symmetry_group tries every class on numbers, and cannot run under jit or vmap. Find "
            "the group outside, or pass shapes in place of params."
        )
    if not group.classes:
        return group._replace(verified=np.float64(0))
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    shapes = group.structure.leaf_shapes
    defined = [not _any_zero_gain(c, leaves, group.constants) for c in group.classes]
    tried = tuple(c for c, fine in zip(group.classes, defined, strict=True) if fine)
    bits = jax.random.bits(_checks.check_key("key", key), (4,), jnp.uint32)
    with jax.numpy_dtype_promotion("standard"):
        network = traced_in(jnp.float64, fn, params, x)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        tree, rng = jax.tree.structure(params), np.random.default_rng(np.asarray(bits))
        trial = group._replace(structure=MatrixStructure(tried, shapes))
        limit = _limit(network)
        errors = _errors(trial, network, tree, leaves, x, rng, limit)
    kept = tuple(c for c, e in zip(tried, errors, strict=True) if e <= limit)
    return group._replace(
        structure=MatrixStructure(kept, shapes),
        verified=np.float64(max((e for e in errors if e <= limit), default=0.0)),
        rejected=tuple(c.name for c in group.classes if c not in kept),
    )


def _limit(network: TracedNetwork) -> float:
    """What rounding may leave of a change: that of float64, or of what the network casts to."""
    eps = max(coarsest(network.program.trace.jaxpr), np.finfo(np.float64).eps)
    return min(_ROUNDINGS * eps, np.sqrt(eps))


def _any_zero_gain(
    found: MatrixClass, leaves: Sequence[np.ndarray], constants: Sequence[Constant]
) -> bool:
    """Whether a gain is 0 somewhere: a matrix seen through it is not defined."""
    return any(
        not bool((np.isfinite(vector) & (vector != 0)).all())
        for place in found.places
        for vector, _ in _matrices.gains_of(place, leaves, constants)
    )


def _errors(
    group: SymmetryGroup,
    network: Network,
    tree: jax.tree_util.PyTreeDef,
    leaves: Sequence[np.ndarray],
    x: Inputs,
    rng: np.random.Generator,
    limit: float,
) -> list[float]:
    """Per class ‖J ξ‖ / ‖J (±ξ)‖, ξ the velocity of a random element near the given parameters.

    Only the derivative of the network is compiled, once.
    """
    near = [_perturbed(leaf, rng) for leaf in leaves]
    inputs = jax.tree.map(lambda leaf: _given(leaf, rng), x)

    @jax.jit
    def change(w: list[Array], velocity: list[Array], inputs: Inputs) -> Array:
        def outputs(w: list[Array]) -> PyTree:
            return network(jax.tree.unflatten(tree, w), inputs)

        _, out = jax.jvp(outputs, (w,), (velocity,))
        change = jnp.concatenate([jnp.abs(jnp.ravel(a)) for a in jax.tree.leaves(out)])
        # Where the network itself is not differentiable, as 0/0 of a masked token, nothing is told.
        fine = jnp.isfinite(change)
        return jnp.where(fine.any(), jnp.linalg.norm(jnp.where(fine, change, 0)), jnp.nan)

    def error(element: list[np.ndarray]) -> float:
        velocity = _matrices.numpy_tangent(group.structure, group.constants, near, element)
        found = float(change(near, velocity, inputs))
        signed = [v * rng.choice([-1.0, 1.0], v.shape) for v in velocity]
        scale = float(change(near, signed, inputs))
        return found / scale if scale > 0 else found

    matrices = [
        _matrices.project(c.kind, rng.normal(size=(c.size, c.size)) / np.sqrt(c.size))
        for c in group.classes
    ]
    together = error(matrices)
    if together <= limit:
        return [together] * len(matrices)
    zeros = [np.zeros_like(A) for A in matrices]
    return [error([*zeros[:i], A, *zeros[i + 1 :]]) for i, A in enumerate(matrices)]


def _perturbed(leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Generic parameters near the given ones: a symmetry is one everywhere, not at zeros alone."""
    size = np.sqrt(np.mean(leaf * leaf)) if leaf.size else 0.0
    return leaf + 0.1 * (size if size > 0 else 1.0) * rng.normal(size=leaf.shape)


def _given(leaf: jax.ShapeDtypeStruct | Array, rng: np.random.Generator) -> Constant:
    """Inputs in float64; random ones where only shapes are known."""
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return rng.normal(size=leaf.shape) if real else np.zeros(leaf.shape, leaf.dtype)
    return np.asarray(leaf, np.float64) if real else leaf


# --- using a group ---------------------------------------------------------------------------


def random_element(
    group: SymmetryGroup, key: Array, *, scale: float = 0.3, dtype: DTypeLike = jnp.float32
) -> Element:
    """A random element of the Lie algebra, of normal numbers.

    Args:
        group: as `symmetry_group` returns it.
        key: a PRNG key.
        scale: standard deviation of log-factors, and of the singular values of A, roughly.
        dtype: of the element.

    Returns:
        An `Element`, for `act` and `symmetry_tangents`.

    Raises:
        InvalidInput: for an invalid key, or a scale that is not a number ≥ 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import act, random_element, symmetry_group
        >>> fn = lambda w, x: x @ w[0] @ w[1]
        >>> w = [jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2))]
        >>> group = symmetry_group(fn, w, jnp.eye(2))
        >>> moved = act(group, w, random_element(group, jax.random.key(1)))
        >>> bool(jnp.allclose(fn(moved, jnp.eye(2)), fn(w, jnp.eye(2)), atol=1e-4))
        True
    """
    scale = _checks.real("scale", scale, lambda s: 0 <= s < float("inf"), "a number >= 0")
    keys = jax.random.split(_checks.check_key("key", key), len(group.classes) + 1)
    return Element(
        scale * jax.random.normal(keys[-1], (group.rescaling.dim,), dtype),
        tuple(
            _matrices.random_matrix(k, c.kind, c.size, scale, dtype)
            for k, c in zip(keys, group.classes, strict=False)
        ),
    )


def act(group: SymmetryGroup, params: Params, element: Element) -> Params:
    """Move parameters by the exponential of an element: the function stays what it is.

    Matrices first, each by exp(A) where it acts and by exp(−Aᵀ) where its dual does; then
    rescalings.

    Args:
        group: as `symmetry_group` returns it.
        params: pytree like the one that the group was found for.
        element: as `random_element` makes one. Parts of a matrix that are not of the class's kind
            are dropped.

    Returns:
        A pytree like params.

    Raises:
        InvalidInput: for params or an element of another structure or shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import Element, act, symmetry_group
        >>> w = [jnp.eye(2), jnp.eye(2)]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
        >>> turn = jnp.pi / 2 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
        >>> moved = act(group, w, Element(jnp.zeros(2), (turn,)))
        >>> print(moved[0].round(3))
        [[ 0.  1.]
         [-1.  0.]]
    """
    leaves = _checked(group, params, element)
    matrices = _of_kinds(group, element)
    new = _matrices.acted(group.structure, group.constants, leaves, matrices)
    moved = jax.tree.unflatten(jax.tree.structure(params), new)
    return rescale(group.rescaling, moved, element.scales)


def symmetry_tangents(group: SymmetryGroup, params: Params, element: Element) -> PyTree:
    """The velocity of the parameters along an element: d/dt of `act` at t·element, t = 0.

    Args:
        group, params, element: as for `act`.

    Returns:
        A pytree like params; the Jacobian of the network maps it to 0.

    Raises:
        InvalidInput: as for `act`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import random_element, symmetry_group, symmetry_tangents
        >>> fn = lambda w, x: x @ w[0] @ w[1]
        >>> w = [jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2))]
        >>> group = symmetry_group(fn, w, jnp.eye(2))
        >>> v = symmetry_tangents(group, w, random_element(group, jax.random.key(1)))
        >>> _, change = jax.jvp(lambda w: fn(w, jnp.eye(2)), (w,), (v,))
        >>> bool(abs(change).max() < 1e-5)
        True
    """
    leaves = _checked(group, params, element)
    new = _matrices.tangent(group.structure, group.constants, leaves, _of_kinds(group, element))
    velocity = jax.tree.unflatten(jax.tree.structure(params), new)

    def scaled(t: Array) -> Params:
        return rescale(group.rescaling, params, t * element.scales)

    one = jnp.ones((), element.scales.dtype)
    _, by_scales = jax.jvp(scaled, (0 * one,), (one,))
    return jax.tree.map(jnp.add, velocity, by_scales)


def spanning_tangents(group: SymmetryGroup, params: Params) -> Array:
    """Tangents of a basis of every class of matrices, (Σ dimension, parameters), in float64.

    Their rank at these parameters may be smaller than their number, as in a wide linear layer.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import spanning_tangents, symmetry_group
        >>> w = [jnp.ones((2, 3)), jnp.ones((3, 2))]
        >>> group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
        >>> spanning_tangents(group, w).shape
        (9, 12)
    """
    with jax.enable_x64(True):
        leaves = [jnp.asarray(a, jnp.float64) for a in jax.tree.leaves(params)]
        total = sum(a.size for a in leaves)
        rows = [jnp.zeros((0, total))]
        for i, found in enumerate(group.classes):
            zeros = [jnp.zeros((c.size, c.size)) for c in group.classes]

            def row(A: Array, i: int = i, zeros: list[Array] = zeros) -> Array:
                element = [*zeros[:i], A, *zeros[i + 1 :]]
                new = _matrices.tangent(group.structure, group.constants, leaves, element)
                return jnp.concatenate([v.ravel() for v in new])

            rows.append(jax.vmap(row)(jnp.asarray(_matrices.basis(found.kind, found.size))))
        return jnp.concatenate(rows)


def _checked(group: SymmetryGroup, params: Params, element: Element) -> list[Array]:
    leaves = checked_leaves(group.rescaling, params, "params")
    shapes = [jnp.shape(A) for A in element.matrices]
    wanted = [(c.size, c.size) for c in group.classes]
    if shapes != wanted:
        raise InvalidInput(
            f"element has matrices of shapes {shapes}, but the classes of the group need {wanted}: "
            "an element belongs to the group that it was made for."
        )
    return [jnp.asarray(leaf) for leaf in leaves]


def _of_kinds(group: SymmetryGroup, element: Element) -> list[Array]:
    return [
        _matrices.project(c.kind, jnp.asarray(A))
        for c, A in zip(group.classes, element.matrices, strict=True)
    ]
