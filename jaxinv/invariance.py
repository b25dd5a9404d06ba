"""Measures of invariance: of a function, of a gradient, and of a training algorithm.

Let w and w' = g(w) be two parameter vectors of the same function.

* `function_invariance_error`: is it the same function?
* `gradient_orthogonality`: a loss that depends on the function alone does not change along the
  directions of the group, ⟨t_j, ∂L/∂w⟩ = 0 for every generator t_j.
* `equivariance_error`: an algorithm is invariant under the reparametrisation w = w(θ) if stepping
  in w and stepping in θ are the same step, Δw = (∂w/∂θ) Δθ. Gradient descent is not: its steps are
  −η ∂L/∂w and −η (∂w/∂θ)(∂w/∂θ)ᵀ ∂L/∂w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv import _checks
from jaxinv._numerics import scaled
from jaxinv._numerics.vectors import summed_to
from jaxinv.errors import InvalidInput
from jaxinv.rescaling.group import RescalingGroup, checked_leaves, rescale, tangent_vectors
from jaxinv.typing import Array, ArrayLike, Inputs, Network, Params, PyTree

Loss = Callable[[Params], Array]
"""The loss as a function of the parameters alone, a scalar."""


# --- of a function --------------------------------------------------------------------


class FunctionError(NamedTuple):
    """How far two outputs are apart, over a batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.invariance import function_invariance_error
        >>> error = function_invariance_error(lambda w, x: w * x, jnp.array(2.0), jnp.array(2.5),
        ...                                   jnp.array([[1.0], [-4.0]]))
        >>> error.absolute.item(), error.relative.item()
        (2.0, 0.25)
    """

    absolute: Array  # scalar: max |f(w', x) − f(w, x)| over the batch and the outputs
    relative: Array  # scalar: the same divided by max |f(w, x)|; 0 where both are 0


def function_invariance_error(
    fn: Network, params: Params, other_params: Params, x: Inputs
) -> FunctionError:
    """Largest difference of the functions at two parameter vectors, max |f(w', x) − f(w, x)|.

    Args:
        fn: any `fn(params, x) -> y`, y an array or a pytree of arrays.
        params, other_params: w and w', the first one the reference.
        x: inputs, as `fn` takes them.

    Returns:
        A `FunctionError`; NaN if an output is NaN. It jits.

    Raises:
        InvalidInput: if the outputs differ in structure or shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.invariance import function_invariance_error
        >>> from jaxinv.rescaling import rescale, rescaling_group
        >>> w, x = networks.init_mlp(jax.random.key(0), (4, 3, 2)), jnp.ones((5, 4))
        >>> group = rescaling_group(networks.mlp, w, x)
        >>> there = rescale(group, w, jnp.array([1, 2, 3]), base=2)
        >>> function_invariance_error(networks.mlp, w, there, x).absolute.item()
        0.0
    """
    _checks.check_network(fn)
    for name, tree in (("params", params), ("other_params", other_params), ("x", x)):
        _checks.check_usable(tree, name)
    with _checks.calling("fn(params, x)", params, x):
        reference, other = fn(params, x), fn(other_params, x)
    structures: list[object] = [jax.tree.structure(y) for y in (reference, other)]
    shapes = [jax.tree.map(jnp.shape, y) for y in (reference, other)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise InvalidInput(
            f"fn gives outputs of shapes {shapes[0]} at params and {shapes[1]} at other_params; "
            "only functions of one signature can be compared."
        )
    return _difference(reference, other)


def _difference(reference: PyTree, other: PyTree) -> FunctionError:
    pairs = [
        (_floating(a), _floating(b))
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True)
    ]
    absolute = _largest([b.astype(jnp.result_type(a, b)) - a for a, b in pairs])
    size = _largest([a for a, _ in pairs])
    return FunctionError(absolute, _quotient(absolute, size))


def _floating(y: ArrayLike) -> Array:
    y = jnp.asarray(y)
    return y if jnp.issubdtype(y.dtype, jnp.inexact) else y.astype(jnp.result_type(float))


def _largest(leaves: list[Array]) -> Array:
    dtype = jnp.result_type(*[abs(a).dtype for a in leaves])
    return jnp.stack([jnp.max(abs(a), initial=0).astype(dtype) for a in leaves]).max()


def _quotient(a: Array, b: Array) -> Array:
    """a/b with 0/0 = 0, a/0 = inf; NaN stays NaN."""
    return jnp.where((a == 0) & (b == 0), jnp.zeros_like(a), a / b)


# --- of a gradient --------------------------------------------------------------------


class GradientOrthogonality(NamedTuple):
    """Inner products of a gradient with the generators of a group, all generators at once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.invariance import gradient_orthogonality
        >>> from jaxinv.rescaling import rescaling_group
        >>> net = lambda w, x: (x @ w[0]) @ w[1]
        >>> w, x = [jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)], jnp.ones((1, 1))
        >>> group = rescaling_group(net, w, x)
        >>> gradient_orthogonality(lambda w: (net(w, x) ** 2).sum(), w, group).cosines.tolist()
        [0.0]
        >>> gradient_orthogonality(lambda w: (w[0] * w[0]).sum(), w, group).cancellation.tolist()
        [1.0]
    """

    cosines: Array  # (dim,): ⟨t_j, g⟩ / (‖t_j‖ ‖g‖)
    cancellation: Array  # (dim,): |⟨t_j, g⟩| / Σ_e |t_je g_e|, in [0, 1]; small only by cancelling
    inner: Array  # (dim,): ⟨t_j, g⟩
    tangent_norms: Array  # (dim,): ‖t_j‖
    gradient_norm: Array  # scalar: ‖g‖


def gradient_orthogonality(
    loss: Loss, params: Params, group: RescalingGroup
) -> GradientOrthogonality:
    """Cosines between the gradient and every generator: ⟨t_j, ∂L/∂w⟩ / (‖t_j‖ ‖∂L/∂w‖).

    For a group that leaves the function unchanged all of them are 0 up to rounding, whatever the
    data and the loss. A cosine can also be small because the generator touches few weights, or
    weights with small gradients; `cancellation` is small for no other reason than orthogonality.

    Args:
        loss: `loss(params) -> scalar`; close over the data.
        params: pytree of float arrays.
        group: as `jaxinv.rescaling.rescaling_group` returns it, outside `jit` (close over it).

    Returns:
        A `GradientOrthogonality`. Generators or gradients of norm 0 have cosine and cancellation 0.
        The cost is one gradient and a few passes over the parameters, for any number of generators.

    Raises:
        InvalidInput: if params do not fit the group, the loss is not a scalar, or the group is a
            traced argument of `jit`.

    References:
        Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (arXiv:1506.02617), §2.1, for the rescalings;
        Kunin et al., "Neural mechanics", ICLR 2021 (arXiv:2012.04728), for the theorem.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.invariance import gradient_orthogonality
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = networks.init_mlp(jax.random.key(0), (4, 3, 2), bias_std=0.1)
        >>> x = jax.random.normal(jax.random.key(1), (20, 4))
        >>> group = rescaling_group(networks.mlp, w, x)
        >>> result = gradient_orthogonality(lambda w: (networks.mlp(w, x) ** 2).sum(), w, group)
        >>> bool(abs(result.cosines).max() < 1e-6)
        True
    """
    leaves = checked_leaves(group, params, "params", finite=True)
    dtype = scaled.working_dtype(leaves)
    tree = group.structure.tree

    @jax.jit
    def measure(params: Params) -> GradientOrthogonality:
        gradient = jax.grad(_scalar(loss))(params)
        weights = [leaf.astype(dtype) for leaf in jax.tree.leaves(params)]
        slopes = [g.astype(dtype) for g in jax.tree.leaves(gradient)]
        tangents = tangent_vectors(group, jax.tree.unflatten(tree, weights))
        inner = tangents.rmatvec(jax.tree.unflatten(tree, slopes))
        sizes = [abs(w * g) for w, g in zip(weights, slopes, strict=True)]
        total = _per_generator(group, sizes, 1)
        squares = _per_generator(group, [w**2 for w in weights], 2)
        tangent_norms = jnp.sqrt(jnp.maximum(squares, 0))
        gradient_norm = optax.tree.norm(slopes)
        return GradientOrthogonality(
            cosines=_quotient(inner, tangent_norms * gradient_norm),
            cancellation=_quotient(abs(inner), total),
            inner=inner,
            tangent_norms=tangent_norms,
            gradient_norm=gradient_norm,
        )

    return measure(params)


def _scalar(loss: Loss) -> Loss:
    def checked(params: Params) -> Array:
        with _checks.calling("loss(params)", params):
            value = loss(params)
        if jnp.shape(value) != ():
            raise InvalidInput(
                f"loss returns shape {jnp.shape(value)}, but it must be a scalar: take the mean or "
                "the sum over the batch."
            )
        return value

    return checked


def _per_generator(group: RescalingGroup, leaves: list[Array], power: int) -> Array:
    """Σ_e a_e |B_ej|^power for all j at once, (dim,).

    B_ej is a sum over the terms of a leaf. Two terms of one leaf seldom hold the same generator
    (W[i, j] of a recurrent network does, on the diagonal), so each term is summed on its own, and
    the elements where they meet are put right one by one.
    """
    if isinstance(group.rows, jax.core.Tracer):
        raise InvalidInput(
            "the group is traced, but which generators share a parameter must be known: close over "
            "the group instead of passing it through jit."
        )
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    dtype = leaves[0].dtype
    totals = jnp.zeros(group.structure.num_classes, dtype)
    corrections = jnp.zeros(group.dim, dtype)
    for a, terms in zip(leaves, group.indices, strict=True):
        for ids in terms:
            totals = totals.at[ids].add(summed_to(a, np.shape(ids)))
        element, j, c = _meetings(group, a.shape, terms)
        if len(j):
            # What the terms gave on their own, against what their sum gives.
            alone = (np.abs(c).astype(float) ** power).sum(axis=0)
            factor = np.abs(c.sum(axis=0)).astype(float) ** power - alone
            corrections = corrections.at[j].add(a.ravel()[element] * jnp.asarray(factor, dtype))
    picked = jnp.asarray(np.abs(coefficients).astype(float) ** power, dtype) * totals[rows]
    return jnp.zeros(group.dim, dtype).at[columns].add(picked) + corrections


def _meetings(
    group: RescalingGroup, shape: tuple[int, ...], terms: tuple[PyTree, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flat elements, generators, coefficients by term) where terms share a generator."""
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((len(terms), 0), np.int64)
    if len(terms) < 2:
        return nothing
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    held = [np.unique(columns[np.isin(rows, ids)]) for ids in terms]
    shared, count = np.unique(np.concatenate(held), return_counts=True)
    keep = np.isin(columns, shared[count > 1])
    if not keep.any():
        return nothing
    rows, columns, coefficients = rows[keep], columns[keep], coefficients[keep]
    # The generators and coefficients of every class, padded to the longest list.
    order = np.argsort(rows, kind="stable")
    rows, columns, coefficients = rows[order], columns[order], coefficients[order]
    slot = np.arange(len(rows)) - np.searchsorted(rows, rows)
    padded = np.full((group.structure.num_classes, slot.max() + 1), -1)
    weight = np.zeros_like(padded)
    padded[rows, slot], weight[rows, slot] = columns, coefficients
    wide = [np.broadcast_to(ids, shape) for ids in terms]
    pairs = []
    for t, first in enumerate(wide):
        for second in wide[t + 1 :]:
            for k in range(padded.shape[1]):
                for l in range(padded.shape[1]):
                    j = padded[first, k]
                    element = np.flatnonzero((j == padded[second, l]) & (j >= 0))
                    pairs.append(np.stack([element, j.ravel()[element]]))
    element, j = np.unique(np.concatenate(pairs, axis=1), axis=1)
    c = [
        (weight[ids.ravel()[element]] * (padded[ids.ravel()[element]] == j[:, None])).sum(axis=1)
        for ids in wide
    ]
    return element, j, np.stack(c)


# --- of an algorithm ------------------------------------------------------------------


class EquivarianceError(NamedTuple):
    """How far an algorithm in w is from the same algorithm in θ, w = w(θ).

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxinv.invariance import equivariance_error
        >>> error = equivariance_error(optax.sgd(0.1), lambda w: (w**2).sum(), jnp.ones(3),
        ...                            lambda theta: 2 * theta, 4)
        >>> error.first_step.item(), error.weights.shape  # steps of SGD in θ are 2² times larger
        (0.75, (4,))
    """

    first_step: Array  # scalar: ‖Δw − (∂w/∂θ)Δθ‖ / max(‖Δw‖, ‖(∂w/∂θ)Δθ‖) of the first step
    per_leaf: PyTree  # like w, scalars: the same for each leaf
    weights: Array  # (steps,): ‖w_t − w(θ_t)‖ / the larger distance from the start
    function: Array  # (steps,): max|f(w_t) − f(w(θ_t))| / the larger change since the start
    loss: Array  # (steps + 1,): L(w_t)
    other_loss: Array  # (steps + 1,): L(w(θ_t))
    first_function: Array  # scalar: like first_step, of J·Δw: the first-order change of f


def equivariance_error(
    optimizer: optax.GradientTransformation | Callable[[Network], optax.GradientTransformation],
    loss: Loss,
    params: Params,
    reparam: Callable[[PyTree], Params],
    steps: int = 10,
    *,
    fn: Network | None = None,
    x: Inputs | None = None,
) -> EquivarianceError:
    """Compare optimising L in w with optimising L∘w in θ, from the same point w(θ₀).

    An algorithm is invariant if Δw = (∂w/∂θ)Δθ. The first step is compared at first order in Δθ, so
    a curved reparametrisation costs nothing; the trajectories are compared as they are, and there
    even an invariant algorithm drifts apart at second order, unless w(θ) is linear.

    Args:
        optimizer: an optax `GradientTransformation`, which is used on both sides as it is; or a
            function `make(fn)` that returns one, called with `fn` for the run in w and with
            `fn∘reparam` for the run in θ: for algorithms that look at the network and not at its
            gradient alone. Path-SGD under a rescaling goes in as it is: f(w(θ)) = f(θ).
        loss: `loss(w) -> scalar`; close over the data.
        params: θ₀, a pytree of float arrays.
        reparam: w = reparam(θ), any smooth function of pytrees; `by_rescaling(group, u)` makes one
            of a group element.
        steps: number of steps, at least 1.
        fn, x: network and inputs on which the two functions are compared; without them the losses
            are. `fn` is needed for `make`.

    Returns:
        An `EquivarianceError`. 0 up to rounding for an algorithm that is invariant under `reparam`;
        of order 1 for the others. NaN if a run diverges. The natural gradient, where the Fisher
        information is singular, is invariant in `first_function` alone: its pseudo-inverse is free
        in directions that the function does not see.

    Raises:
        InvalidInput: for steps < 1, a loss that is not a scalar, `x` without `fn`, or `make`
            without `fn`.

    References:
        Amari, "Natural gradient works efficiently in learning", Neural Computation 10, 1998;
        Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020
        (arXiv:1412.1193), for the definition of an invariant algorithm.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import networks, path_sgd
        >>> from jaxinv.invariance import by_rescaling, equivariance_error
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = networks.init_mlp(jax.random.key(0), (4, 3, 2))
        >>> x = jax.random.normal(jax.random.key(1), (20, 4))
        >>> loss = lambda w: ((networks.mlp(w, x) - 1) ** 2).mean()
        >>> group = rescaling_group(networks.mlp, w, x)
        >>> move = by_rescaling(group, jnp.array([1.0, -1.0, 2.0]))
        >>> error = equivariance_error(path_sgd(0.01, networks.mlp, x), loss, w, move)
        >>> bool(error.first_step < 1e-5)
        True
        >>> error = equivariance_error(optax.sgd(0.01), loss, w, move)
        >>> bool(error.first_step > 0.5)
        True
    """
    _checks.check_params(params)
    steps = _checks.integer("steps", steps, 1)
    if fn is not None:
        _checks.check_network(fn)
    if x is not None and fn is None:
        raise InvalidInput("x was given without fn: pass the network whose outputs to compare.")
    if callable(optimizer):
        if fn is None:
            raise InvalidInput(
                "optimizer is a function of the network, so the network is needed: pass fn=..."
            )
        network = fn
        in_w = optimizer(network)
        in_theta = optimizer(lambda theta, x: network(reparam(theta), x))
    else:
        in_w = in_theta = optimizer
    loss = _scalar(loss)

    def outputs(w: Params) -> PyTree:
        return loss(w) if fn is None or x is None else fn(w, x)

    def pulled_back(theta: PyTree) -> Array:
        return loss(reparam(theta))

    def step(
        tx: optax.GradientTransformation, f: Loss, params: PyTree, state: optax.OptState
    ) -> tuple[PyTree, PyTree, optax.OptState, Array]:
        value, gradient = jax.value_and_grad(f)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), updates, state, value

    @jax.jit
    def run(theta: PyTree) -> EquivarianceError:
        start = reparam(theta)
        f_start = outputs(start)

        def both(carry: tuple, t: Array) -> tuple:
            w, w_state, theta, theta_state, first = carry
            w, dw, w_state, loss_w = step(in_w, loss, w, w_state)
            theta, dtheta, theta_state, loss_theta = step(in_theta, pulled_back, theta, theta_state)
            # Kept in the carry, so that a step is compiled once and not once more for the first.
            first = optax.tree.where(t == 0, (dw, dtheta), first)
            other = reparam(theta)
            f, f_other = outputs(w), outputs(other)
            moved = _difference(f_start, f).absolute, _difference(f_start, f_other).absolute
            apart = _norm(optax.tree.sub(w, other))
            distance = jnp.maximum(
                _norm(optax.tree.sub(w, start)), _norm(optax.tree.sub(other, start))
            )
            row = (
                _quotient(apart, distance),
                _quotient(_difference(f, f_other).absolute, jnp.maximum(*moved)),
                loss_w,
                loss_theta,
            )
            return (w, w_state, theta, theta_state, first), row

        carry = (start, in_w.init(start), theta, in_theta.init(theta), (start, theta))
        rows: tuple[Array, Array, Array, Array]
        last, rows = jax.lax.scan(both, carry, jnp.arange(int(steps)))
        weights, function, losses, others = rows
        dw, dtheta = last[-1]
        _, transported = jax.jvp(reparam, (theta,), (dtheta,))
        changes = [jax.jvp(outputs, (start,), (d,))[1] for d in (dw, transported)]
        return EquivarianceError(
            first_step=_apart(dw, transported),
            per_leaf=jax.tree.map(_apart, dw, transported),
            weights=weights,
            function=function,
            loss=jnp.append(losses, loss(last[0])),
            other_loss=jnp.append(others, pulled_back(last[2])),
            first_function=_apart(
                *(
                    jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(change)])
                    for change in changes
                )
            ),
        )

    return run(params)


def by_rescaling(
    group: RescalingGroup, u: Array, *, base: float | None = None
) -> Callable[[Params], Params]:
    """The reparametrisation w = θ·exp(Bu) by one element of the group, for `equivariance_error`.

    Args and errors as for `jaxinv.rescaling.rescale`: with `base=2` and integers u the factors are
    exact, and what is left of an error is the algorithm's own.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.invariance import by_rescaling
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = [jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.zeros((1, 1)))
        >>> [leaf.item() for leaf in by_rescaling(group, jnp.array([1.0]), base=2)(w)]
        [4.0, 1.5]
    """

    def reparam(theta: Params) -> Params:
        return rescale(group, theta, jnp.asarray(u), base=base)

    return reparam


def _norm(tree: PyTree) -> Array:
    return scaled.norm(jax.tree.leaves(tree))


def _apart(a: PyTree, b: PyTree) -> Array:
    """‖a − b‖ / max(‖a‖, ‖b‖)."""
    return _quotient(_norm(optax.tree.sub(a, b)), jnp.maximum(_norm(a), _norm(b)))


__all__ = [
    "EquivarianceError",
    "FunctionError",
    "GradientOrthogonality",
    "by_rescaling",
    "equivariance_error",
    "function_invariance_error",
    "gradient_orthogonality",
]
