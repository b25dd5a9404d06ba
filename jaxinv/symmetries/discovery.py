"""Infinitesimal symmetries of any network, found numerically.

A vector field ξ on parameter space is a symmetry of fn if J(θ) ξ(θ) = 0 for all θ, where J is the
Jacobian of the outputs. `discover_symmetries` looks for three kinds of ξ, linear in unknown
coefficients:

* scaling: ξ(θ) = c∘θ, one exponent per parameter;
* translation: ξ(θ) = v, constant;
* linear: each leaf is multiplied by matrices on its axes, ξ_l(θ) = Σ_a A_{l,a} ·_a θ_l.

Each is the common null space of matrices with columns J(θ)ξ_i(θ), over random θ. Unlike
`jaxinv.rescaling_group` this needs no rules, so it serves to confirm the group and to find what
the group does not describe; it is dense linear algebra, for small networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxinv import _checks
from jaxinv._interpreter.draws import traced_in
from jaxinv.errors import InvalidInput
from jaxinv.rescaling.group import RescalingGroup, checked_leaves, log_scales
from jaxinv.symmetries.null_spaces import (
    KINDS,
    Kind,
    Problem,
    as_double,
    equations_of,
    inputs_of,
    memory,
    null_space,
    sampler,
)
from jaxinv.typing import Array, Inputs, Network, Params, PyTree

# Samples come in rounds of about one row per unknown. A space that is too large shrinks with every
# generic θ, so one round without change would do; two rounds is the least.
_LEAST_SAMPLES = 4
_MOST_ROUNDS = 20


class Symmetries(NamedTuple):
    """The symmetries of one kind: a linear space of vector fields.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import discover_symmetries
        >>> found = discover_symmetries(lambda w, x: x * (w[0] + w[1]), [jnp.ones(1), jnp.ones(1)],
        ...                  jnp.ones((2, 1)), kinds=["translation"]).translation
        >>> found.dimension, [v.round(3).tolist() for v in found.basis]  # (1, −1)/√2, up to a sign
        (1, [[[...]], [[...]]])
    """

    dimension: int
    basis: PyTree  # float64, leading axis `dimension`; orthonormal. scaling: c, like params;
    #                translation: v, like params; linear: per leaf a tuple of A_a (n_a, n_a) by axis
    singular_values: np.ndarray  # of the stacked matrix with columns of norm one, descending
    gap: (
        float  # smallest singular value that is not 0 / the largest that is, both at least rounding
    )
    tolerance: float  # relative singular values below this were taken for 0
    certain: bool  # gap >= 1e4, zeros at the level of rounding, and unchanged by further θ


class Discovered(NamedTuple):
    """What `discover_symmetries` found; a kind that was not asked for is None.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.symmetries import discover_symmetries
        >>> print(discover_symmetries(lambda w, x: x * w, jnp.ones(1), jnp.ones((2, 1))))
        scaling      0  certain, gap ...
        translation  0  certain, gap ...
        linear       0  certain, gap ...
    """

    scaling: Symmetries | None
    translation: Symmetries | None
    linear: Symmetries | None
    leaf_names: tuple[str, ...]
    rows: int  # equations: samples × examples × outputs

    def __str__(self) -> str:
        """Dimension, certainty and gap of each kind."""
        lines = []
        for kind in KINDS:
            found = getattr(self, kind)
            if found is not None:
                word = "certain" if found.certain else "NOT CERTAIN"
                lines.append(f"{kind:11s} {found.dimension:2d}  {word}, gap {found.gap:.0e}")
        return "\n".join(lines)


def discover_symmetries(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    kinds: Sequence[Kind] = KINDS,
    key: Array | None = None,
    sample: Callable[[Array, Params], Params] | None = None,
    max_bytes: float = 2e9,
) -> Discovered:
    """All scaling, translation and per-leaf linear symmetries of `fn`, by null spaces.

    Solves J(θ_s, x_s) ξ(θ_s) = 0 for the coefficients of ξ over random θ_s, in float64, with more
    and more θ_s until further ones change nothing.

    Args:
        fn: any differentiable `fn(params, x)`; its outputs may be a pytree. It is run in float64,
            so it must not cast to less.
        params: pytree of float arrays; shapes and the typical size of each leaf are used.
        x: the inputs on which the function is to stay the same: symmetries are those of
            θ ↦ fn(θ, x), so inputs that are always 0 make weights dead. With
            `jax.ShapeDtypeStruct`s of floats, standard normal ones are drawn for every θ.
        kinds: which of "scaling", "translation" and "linear" to look for.
        key: PRNG key, by default `jax.random.key(0)`.
        sample: `sample(key, params) -> params`, a random θ in float64; by default every leaf is
            normal with the root mean square that it has in params (1 if that is 0).
        max_bytes: refuse to use more memory than this.

    Returns:
        A `Discovered`. Not usable under `jit`: ranks decide shapes.

    Raises:
        InvalidInput: for unknown kinds, tracers, non-finite Jacobians, or a problem too large: with
            D unknowns (parameters; for "linear" Σ_leaves Σ_axes n²) it takes about 110·D² bytes and
            time that of about three singular value decompositions: minutes for D = 3000.

    Notes:
        A symmetry that holds where a sign does not change counts, as it should for ReLU networks.
        Matrices on several axes of a leaf that cancel (c on one, −c on another) do not count.
        Discrete symmetries (permutations, signs) are not infinitesimal.

    References:
        Ziyin, "Symmetry induces structure and constraint of learning", ICML 2024
        (arXiv:2309.16932), and Zhao et al., "Symmetries, flat minima, and the conserved quantities
        of gradient flow", ICLR 2023 (arXiv:2210.17216), for these kinds of symmetry.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import discover_symmetries
        >>> w = [jnp.ones((2, 3)), jnp.ones((3, 2))]
        >>> linear = discover_symmetries(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
        >>> linear.scaling.dimension, linear.translation.dimension, linear.linear.dimension  # GL(3)
        (3, 0, 9)
    """
    _checks.check_params(params)
    _checks.check_inputs(x, values=False, finite=True)
    _checks.check_network(fn)
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput(f"kinds must be among {', '.join(KINDS)}; {kind!r} is not.")
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((params, x))):
        raise InvalidInput(
            "discover_symmetries decides shapes by ranks and cannot run under jit or vmap."
        )
    # Constants that fn closes over may well be float32: let them be promoted.
    with jax.numpy_dtype_promotion("standard"):
        network = traced_in(jnp.float64, fn, params, x)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        key = jax.random.key(0) if key is None else key
        theta, unravel = ravel_pytree(jax.tree.map(as_double, params))
        problem = Problem(
            network, unravel, inputs_of(x), [jnp.shape(a) for a in jax.tree.leaves(params)]
        )
        with _checks.calling("fn(params, x)", params, x):
            rows = problem.rows()
        if not rows or not theta.size:
            raise InvalidInput(
                f"params holds {theta.size} numbers and fn returns {rows}: neither may be none."
            )
        sizes = {kind: problem.unknowns(kind) for kind in kinds}
        most = max(sizes.values(), default=1)
        samples = max(_LEAST_SAMPLES, math.ceil(most / rows))
        needed = memory(rows, theta.size, sizes, samples)
        if needed > max_bytes:
            raise InvalidInput(
                f"discover_symmetries would need about {needed / 1e9:.1f} GB for {sizes} unknowns "
                f"and {rows} rows per sample, more than max_bytes = {max_bytes / 1e9:.1f} GB. Ask "
                "for fewer kinds ('linear' needs the most), pass fewer inputs, make the layers "
                "narrower, or raise max_bytes."
            )
        draw = sampler(params, theta, sample)
        equations = equations_of(problem, draw, samples, list(kinds))
        found: dict[Kind, Symmetries] = {}
        count, stable = 0, False
        triangular = {kind: np.zeros((0, n)) for kind, n in sizes.items()}
        while not stable and count < _MOST_ROUNDS:
            blocks = equations(jax.random.fold_in(key, count))
            count += 1
            before = {kind: space.dimension for kind, space in found.items()}
            for kind in kinds:
                stacked = np.concatenate(
                    [triangular[kind], np.asarray(blocks[kind]).reshape(-1, sizes[kind])]
                )
                if not np.isfinite(stacked).all():
                    raise InvalidInput(
                        "the Jacobian of fn at random parameters is not finite. If some parameters "
                        "must be positive or small, draw them so with sample=..."
                    )
                triangular[kind] = np.asarray(np.linalg.qr(stacked, mode="r"))
                found[kind] = Symmetries(
                    **null_space(triangular[kind], problem, kind, params)._asdict()
                )
            stable = before == {kind: space.dimension for kind, space in found.items()}
    if not stable:
        found = {kind: space._replace(certain=False) for kind, space in found.items()}
    names = tuple(name or "params" for name in _checks.leaf_names(params, ""))
    return Discovered(
        found.get("scaling"),
        found.get("translation"),
        found.get("linear"),
        leaf_names=names,
        rows=rows * samples * count,
    )


# --- against the symbolic group -------------------------------------------------------


class Comparison(NamedTuple):
    """What was discovered beyond a `RescalingGroup`, and what of the group was not confirmed.

    Linear and scaling symmetries are counted modulo those that only move parameters along
    translation symmetries: scaling a dead weight is nothing new.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.rescaling import rescaling_group
        >>> from jaxinv.symmetries import compare, discover_symmetries
        >>> net = lambda w, x: jax.nn.softmax(jax.nn.relu(x @ w[0]) @ w[1] + w[2])
        >>> w, x = [jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.ones(2)], jnp.eye(2)
        >>> print(compare(discover_symmetries(net, w, x), rescaling_group(net, w, x)))
        3 of 3 generators of the group confirmed
        4 shifts: 3 of 1, 1 of 2
        0 scalings beyond the group
        0 linear maps beyond the group
    """

    confirmed: int  # generators of the group that are in the discovered scalings
    missing: tuple[str, ...]  # names of those that are not
    dead: tuple[tuple[str, int], ...]  # (leaf, number of its parameters without any effect)
    shifts: tuple[tuple[str, int], ...]  # (leaves, dimension) of the other translations
    scalings: tuple[tuple[str, int], ...]  # beyond the group
    linear: tuple[tuple[str, int], ...]  # beyond the group and the discovered scalings

    def __str__(self) -> str:
        """One line per kind."""
        total = self.confirmed + len(self.missing)
        lines = [f"{self.confirmed} of {total} generators of the group confirmed"]
        lines += [f"  not confirmed: {name}" for name in self.missing]
        lines += [f"{n} parameters of {name} have no effect" for name, n in self.dead]
        for parts, what in (
            (self.shifts, "shifts"),
            (self.scalings, "scalings beyond the group"),
            (self.linear, "linear maps beyond the group"),
        ):
            listed = ", ".join(f"{n} of {name}" for name, n in parts)
            count = sum(n for _, n in parts)
            lines.append(f"{count} {what}" + (f": {listed}" if listed else ""))
        return "\n".join(lines)


def compare(discovered: Discovered, group: RescalingGroup) -> Comparison:
    """Which discovered symmetries the symbolic group has, and which are beyond it.

    Typical extras: the shift of all logits in front of a softmax, weights of inputs that are always
    zero, GL(n) between linear layers and between queries and keys, biases in front of a batch
    normalisation, and scales that pass through an operation which the group pins. (An ε in a
    normalisation breaks its scale invariance, so what `ignore_epsilon` adds is not confirmed.)

    Args:
        discovered: as `discover_symmetries` returns it; kinds that it lacks are skipped.
        group: as `jaxinv.rescaling.rescaling_group` returns it for the same function.

    Returns:
        A `Comparison`. Symmetries that share leaves are reported together, `a + b`.

    Raises:
        InvalidInput: if the two are of different parameters, or scalings were not looked for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.rescaling import rescaling_group
        >>> from jaxinv.symmetries import compare, discover_symmetries
        >>> net, x = (lambda w, x: x @ w["a"] @ w["b"]), jnp.eye(2)
        >>> w = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
        >>> compare(discover_symmetries(net, w, x), rescaling_group(net, w, x)).linear  # 3² − 3
        (('a + b', 6),)
    """
    if discovered.scaling is None:
        raise InvalidInput("compare needs the discovered scalings: use kinds=('scaling', ...).")
    found = discovered.scaling
    first = [a[0] if len(a) else np.zeros(a.shape[1:]) for a in jax.tree.leaves(found.basis)]
    checked_leaves(group, jax.tree.unflatten(jax.tree.structure(found.basis), first), "discovered")
    sizes = [math.prod(shape) for shape in group.structure.leaf_shapes]
    ends = np.cumsum(sizes)
    names, d = discovered.leaf_names, int(ends[-1])

    exponents = _exponents(group, d)
    scalings = _flat(found.basis, found.dimension)
    residual = exponents - (exponents @ scalings.T) @ scalings
    off = np.linalg.norm(residual, axis=1) > 1e-6 * np.linalg.norm(exponents, axis=1)

    V = np.zeros((0, d))
    if discovered.translation is not None:
        V = _flat(discovered.translation.basis, discovered.translation.dimension)
    without_effect = (V**2).sum(axis=0) > 1 - 1e-8
    counts = [int(part.sum()) for part in np.split(without_effect, ends[:-1])]
    dead = tuple((name, n) for name, n in zip(names, counts, strict=True) if n)
    shifts = _orthonormal(np.where(without_effect, 0.0, V))

    # Vector fields at several θ, as rows; modulo translations.
    linear = discovered.linear
    fields = max(found.dimension, linear.dimension if linear else 0)
    rng = np.random.default_rng(0)
    thetas = rng.normal(size=(2 + math.ceil(2 * fields / d), d))

    def modulo(rows: np.ndarray) -> np.ndarray:
        rows = rows - (rows @ V.T) @ V
        return rows.reshape(len(rows), len(thetas) * d)

    known = modulo(exponents[~off][:, None] * thetas)
    scaled = modulo(scalings[:, None] * thetas)
    more = _beyond(scaled, known)
    extra = np.zeros((0, thetas.size))
    if linear is not None:
        moved = np.stack([_moved(linear, theta, group) for theta in thetas], axis=1)
        extra = _beyond(modulo(moved), np.concatenate([known, scaled]))
    return Comparison(
        confirmed=int((~off).sum()),
        missing=tuple(name for name, bad in zip(group.names, off, strict=True) if bad),
        dead=dead,
        shifts=_by_leaf(shifts[:, None], ends, names),
        scalings=_by_leaf(more.reshape(-1, len(thetas), d), ends, names),
        linear=_by_leaf(extra.reshape(-1, len(thetas), d), ends, names),
    )


def _flat(basis: PyTree, dimension: int) -> np.ndarray:
    return np.concatenate(
        [a.reshape(dimension, math.prod(a.shape[1:])) for a in jax.tree.leaves(basis)], axis=1
    )


def _exponents(group: RescalingGroup, d: int) -> np.ndarray:
    """Bᵀ, (dim, parameters)."""
    shapes = group.structure.leaf_shapes
    if not group.dim:
        return np.zeros((0, d))
    columns = jax.jit(jax.vmap(lambda u: log_scales(group, u)))(jnp.eye(group.dim))
    return np.concatenate(
        [
            np.broadcast_to(np.asarray(a, np.float64), (group.dim, *shape)).reshape(group.dim, -1)
            for a, shape in zip(jax.tree.leaves(columns), shapes, strict=True)
        ],
        axis=1,
    )


def _moved(linear: Symmetries, theta: np.ndarray, group: RescalingGroup) -> np.ndarray:
    """Σ_a A_a ·_a θ for every basis element, (dimension, parameters)."""
    matrices = jax.tree.leaves(linear.basis)
    parts, start, used = [], 0, 0
    for shape in group.structure.leaf_shapes:
        stop = start + math.prod(shape)
        w = theta[start:stop].reshape(shape or (1,))
        total = np.zeros((linear.dimension, *w.shape))
        for axis in range(w.ndim):
            A = matrices[used + axis]
            total += np.moveaxis(np.tensordot(A, w, (2, axis)), 1, axis + 1)
        parts.append(total.reshape(linear.dimension, math.prod(shape)))
        start, used = stop, used + w.ndim
    return np.concatenate(parts, axis=1)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the span of rows that are of the order of one, or rounding."""
    if not rows.size:
        return rows[:0]
    _, s, Vt = np.linalg.svd(rows, full_matrices=False)
    return Vt[s > 1e-7 * max(s[0], 1.0)]


def _beyond(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """An orthonormal basis of what the span of the rows has beyond the span of the known ones."""
    basis, K = _orthonormal(rows), _orthonormal(known)
    return _orthonormal(basis - (basis @ K.T) @ K)


def _by_leaf(
    Q: np.ndarray, ends: np.ndarray, names: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    """Dimensions of an orthonormal basis (k, points, parameters) by sets of leaves that it ties."""
    blocks = np.split(Q, ends[:-1], axis=2)
    energies = [np.einsum("kpd,lpd->kl", b, b) for b in blocks]
    label = np.arange(len(blocks))
    for i, first in enumerate(energies):
        for j in range(i):
            # Two leaves are tied if the projection onto the space mixes them.
            if np.sum(first * energies[j]) > 1e-10:
                label[label == label[i]] = label[j]
    found = []
    for which in np.unique(label):
        members = [i for i in range(len(blocks)) if label[i] == which]
        dimension = round(sum(float(np.trace(energies[i])) for i in members))
        if dimension:
            found.append((" + ".join(names[i] for i in members), dimension))
    return tuple(found)
