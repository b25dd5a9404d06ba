"""Rescaling symmetries of a network: found in its jaxpr, applied, and carried to optimizer states.

Multiply the incoming weights and the bias of a ReLU unit by e^u and divide its outgoing weights by
e^u: the function is the same. `rescaling_group` finds all u ↦ w·exp(Bu) with this property, for any
`fn(params, x)`: units, channels, channels that a residual connection ties together, the weights in
front of a scale-invariant normalisation, the heads of an attention layer.

Method: every array of the program has a log-scale per element; each operation is a linear equation
between them (the terms of a sum have equal scales, a product adds them, x² doubles, tanh pins to
0), inputs and outputs have scale 0. The solutions are the group. Operations that are not understood
pin their operands, so a generator that is found is always one that leaves the function unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._interpreter import walk
from jaxinv._interpreter.batch import leading, traced_network
from jaxinv._numerics import scaled
from jaxinv.errors import InvalidInput
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.action import (
    RescalingGroup,
    checked_leaves,
    checked_u,
    class_scales,
    cotangent,
    dense_tangents,
    leaf_log_scales,
    tangent,
    times_exp,
    transpose,
)
from jaxinv.rescaling.domain import ScalingDomain
from jaxinv.rescaling.optimizer_states import is_masked, like, transport
from jaxinv.rescaling.shifts import cancelled
from jaxinv.rescaling.structure import assembled
from jaxinv.typing import Array, DTypeLike, Inputs, Network, Params, PyTree


def rescaling_group(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    ignore_epsilon: bool = False,
    batch_axis: int | None = 0,
    trust_zeros: bool = False,
) -> RescalingGroup:
    """All positive elementwise rescalings of the parameters that leave a network unchanged.

    fn(w·exp(Bu), x) = fn(w, x) for all w, x and u ∈ R^dim.

    Args:
        fn: any JAX-traceable `fn(params, x) -> y`.
        params: pytree of float arrays; only shapes are used.
        x: inputs with a batch axis, or `jax.ShapeDtypeStruct`s; only shapes are used. Where fn
            treats each example apart, the group is found on a batch of one; where it does not
            (batch norm in training mode), it is that of fn on batches of this size, or of three
            where x holds fewer.
        ignore_epsilon: normalisation layers add ε to a variance, which makes them *not quite*
            scale-invariant: exactly, the weights in front of them are pinned, and that is the
            default. With True, an ε <= 1e-3 inside a normalisation counts as 0, the group includes
            those scale invariances, changes the function by O(ε), and names what was ignored in
            `group.ignored`.
        batch_axis: the axis of every input that counts examples, 0 by default; None if x is one
            input without such an axis.
        trust_zeros: an array of floats that `fn` closes over and that is zero everywhere (running
            means before training) counts as generic numbers by default, so that the group also fits
            the trained network. With True its zeros count, and the group holds only as long as they
            stay zero. Zeros among other numbers (masks) always count. What the group rests on is in
            `group.relies_on`.

    Returns:
        A `RescalingGroup`. Its generators have small integer exponents, ordered from the input to
        the output; in a dense ReLU network there is one per hidden unit, and `exp(u_j)` is the
        factor of the unit's activation.
        Parameters that the function cannot depend on (unused leaves, kernel taps that only ever see
        padding, a bias of attention keys, which softmax subtracts again) would be free to scale one
        by one. They are left out, and named in `group.unused`.

    Raises:
        InvalidInput: for integer, NaN or missing params, or x without a batch axis.

    Notes:
        Every generator is exact. The converse is a theorem for operations with a rule, applied to
        values that do not cancel. A leaf that is only added, and subtracted again with a mean or a
        maximum, is recognised as dead; not recognised are other ways to cancel (the bias in front
        of a batch normalisation), and units that are computed but not used.
        Under `jit` constants of `fn` may be traced; their zeros are then not seen.

    References:
        Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (arXiv:1506.02617), §2.1, for dense units.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jaxinv.rescaling import rescaling_group
        >>> def net(w, x):
        ...     h = jax.nn.relu(x @ w["in"] + w["bias"])
        ...     return jnp.tanh(h @ w["mid"]) @ w["out"]
        >>> w = {"in": np.ones((2, 3)), "bias": np.ones(3), "mid": np.ones((3, 4)),
        ...      "out": np.ones((4, 1))}
        >>> group = rescaling_group(net, w, np.zeros((1, 2)))
        >>> group.dim, group.pinned_by[0][0]
        (3, 'tanh')
        >>> print(group.names[2])
        in out 2 → mid in 2
    """
    _checks.check_params(params, values=False, complex_numbers=True)
    network = traced_network(fn, params, leading(x, batch_axis), batch_axis, least=3)
    program = network.program
    domain = ScalingDomain(ignore_epsilon, trust_zeros)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    names = _checks.leaf_names(params, "")
    names = [name or "params" for name in names]
    leaves = [scaling.Leaf(name, shape) for name, shape in zip(names, shapes, strict=True)]
    inputs = [scaling.Scale(s.shape) for s in program.inputs]
    # The function is the same with 0 in place of what cancels anyhow.
    dead = cancelled(program.trace, shapes)
    fresh = [
        scaling.Scale(leaf.shape, (), np.ones((1,) * len(leaf.shape), bool))
        if gone
        else scaling.Fresh(leaf, leaf.shape)
        for leaf, gone in zip(leaves, dead, strict=True)
    ]
    outputs = walk.interpret(program.trace, fresh, inputs, domain)
    for output in outputs:
        scale = domain.scale(output)
        keep = None if scale.absorbing is None else ~scale.absorbing
        scaling.require_zero(domain.system, scale.form, keep)
    return RescalingGroup(*assembled(domain, leaves, jax.tree.structure(params)))


# --- the action -----------------------------------------------------------------------


def log_scales(group: RescalingGroup, u: Array) -> PyTree:
    """Bu as a pytree like params, with leaves that broadcast to the parameters.

    Args:
        group: as `rescaling_group` returns it.
        u: (dim,), float or integer.

    Returns:
        A pytree like params; each leaf has u's dtype and broadcasts to the shape of the parameter.

    Raises:
        InvalidInput: if u does not have one entry per generator.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.rescaling import log_scales, rescaling_group
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1],
        ...                         [jnp.ones((1, 2)), jnp.ones((2, 1))], jnp.zeros((1, 1)))
        >>> [leaf.tolist() for leaf in log_scales(group, jnp.array([3.0, 5.0]))]
        [[[3.0, 5.0]], [[-3.0], [-5.0]]]
    """
    return jax.tree.unflatten(group.structure.tree, leaf_log_scales(group, checked_u(group, u)))


def rescale(
    group: RescalingGroup, params: Params, u: Array, *, base: float | None = None
) -> Params:
    """The action of the group: w_e · exp((Bu)_e), or w_e · base^{(Bu)_e}.

    Args:
        group: as `rescaling_group` returns it.
        params: pytree of float arrays of the shapes the group was found for.
        u: (dim,), floats; or, with `base=2`, integers: the factors are then exact powers of two
            (up to overflow and underflow), and a network of sums, products, ReLUs and maxima keeps
            every bit of its output.
        base: what is raised to Bu; default e.

    Returns:
        Params of the same shapes and dtypes, for which `fn` is the same function.

    Raises:
        InvalidInput: if params or u do not fit the group.

    Example:
        >>> import jax, numpy as np
        >>> from jaxinv.rescaling import rescale, rescaling_group
        >>> net = lambda w, x: jax.nn.relu(x @ w[0]) @ w[1]
        >>> w = [np.full((1, 2), 3.0, np.float32), np.full((2, 1), 0.1, np.float32)]
        >>> group = rescaling_group(net, w, np.ones((1, 1)))
        >>> [leaf.ravel().tolist() for leaf in rescale(group, w, np.array([1, -2]), base=2)]
        [[6.0, 0.75], [0.05000000074505806, 0.4000000059604645]]
    """
    return jax.tree.unflatten(
        group.structure.tree, _moved(group, checked_leaves(group, params, "params"), u, base)
    )


def _moved(group: RescalingGroup, leaves: list[Array], u: Array, base: float | None) -> list[Array]:
    """Leaves times exp(Bu); placeholders of masked leaves pass through."""
    u = checked_u(group, u)
    if base is not None:
        _checks.real("base", base, lambda b: 0 < b < float("inf"), "a fixed number > 0")
    exact = base == 2 and jnp.issubdtype(u.dtype, jnp.integer)
    if exact:
        u = u.astype(jnp.int32)
    else:
        # In the precision of the weights, or factors that should cancel would not.
        arrays = [jax.ShapeDtypeStruct((), jnp.result_type(a)) for a in leaves if not is_masked(a)]
        u = jnp.asarray(u, scaled.working_dtype([*arrays, u]))
    touched = [i for i, leaf in enumerate(leaves) if not is_masked(leaf) and group.indices[i]]
    if not touched:
        return leaves
    log_base = np.asarray(1.0 if base is None else np.log(base), u.dtype)
    moved = list(leaves)
    new = times_exp(group, tuple(touched), [leaves[i] for i in touched], u, log_base, exact)
    for i, leaf in zip(touched, new, strict=True):
        moved[i] = leaf
    return moved


def rescale_gradient(
    group: RescalingGroup, gradients: PyTree, u: Array, *, base: float | None = None
) -> PyTree:
    """The gradient at the rescaled point: g_e / exp((Bu)_e).

    ∂L/∂w' = (∂L/∂w)/d for w' = d·w, since L is the same function of both.

    Args, errors as for `rescale`, with `gradients` a pytree like params.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.rescaling import rescale, rescale_gradient, rescaling_group
        >>> net = lambda w, x: (x @ w[0]) @ w[1]
        >>> w, x = [jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)], jnp.ones((1, 1))
        >>> group, u = rescaling_group(net, w, x), jnp.log(jnp.array([4.0]))
        >>> there = jax.grad(lambda w: net(w, x).sum())(rescale(group, w, u))
        >>> moved = rescale_gradient(group, jax.grad(lambda w: net(w, x).sum())(w), u)
        >>> [round(g.item(), 5) for g in there] == [round(g.item(), 5) for g in moved]
        True
    """
    return rescale(group, gradients, -checked_u(group, u), base=base)


def rescale_state(
    group: RescalingGroup,
    state: PyTree,
    u: Array,
    *,
    base: float | None = None,
    powers: Mapping[str, int] | None = None,
) -> PyTree:
    """The optimizer state at the rescaled point, so that training can go on from there.

    Every field that is a pytree like params is multiplied by d^k, d = exp(Bu). k follows from what
    the field accumulates: −1 for (momentum of) gradients, −2 for squares of gradients, +1 for
    momentum of Path-SGD's updates, which move as the parameters do. Chains are followed from the
    first transformation to the last; `masked`, `partition`, `inject_hyperparams`, `MultiSteps` and
    `apply_if_finite` are entered.

    Args:
        group: as `rescaling_group` returns it.
        state: an optax state. Known are the states of SGD with momentum, AdaGrad, RMSProp, Adam and
            its relatives, Lion, schedule-free, and Path-SGD with p = 2.
        u, base: as for `rescale`.
        powers: k for fields that are not known, or that need another k, by name:
            `{"TraceState.trace": 1}`. A name without field, `{"ScaleBySignState": 0}`, says which
            power the updates have *after* that transformation.

    Returns:
        A state of the same structure.

    Raises:
        InvalidInput: for a field like params of an optimizer that is not known.

    Notes:
        A state says nothing of transformations without one. After `scale_by_sign`, weight decay or
        clipping by a norm the updates no longer have one power of d: give `powers`, or accept that
        the optimizer is not equivariant.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv.rescaling import rescale_state, rescaling_group
        >>> w = [jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((1, 1)))
        >>> tx = optax.sgd(0.1, momentum=0.9)
        >>> _, state = tx.update([jnp.ones((1, 1)), jnp.ones((1, 1))], tx.init(w), w)
        >>> moved = rescale_state(group, state, jnp.array([1]), base=2)  # w[0]·2, w[1]/2
        >>> [m.item() for m in moved[0].trace]
        [0.5, 2.0]
    """
    s = group.structure
    u = checked_u(group, u)

    def act(value: PyTree, power: int) -> PyTree:
        leaves = jax.tree.leaves(value, is_leaf=is_masked)
        if power == 0:
            return value
        if not is_params(value):
            raise InvalidInput(
                f"A field of the optimizer state was taken for a pytree like params, but is "
                f"{jax.tree.structure(value)}."
            )
        return jax.tree.unflatten(s.tree, _moved(group, leaves, power * u, base))

    is_params = like(s.tree, s.leaf_shapes)
    return transport(state, act, is_params, powers or {}, -1)[0]


def random_rescaling(
    group: RescalingGroup,
    key: Array,
    *,
    kind: Literal["lognormal", "power_of_two", "unbalanced"] = "lognormal",
    std: float = 1.0,
    units: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """A random u for `rescale`.

    * `"lognormal"`: u_j ~ N(0, std²), so the factors are log-normal.
    * `"power_of_two"`: integers round(N(0, (std / log 2)²)), for `rescale(..., base=2)`: exact.
    * `"unbalanced"`: `units` random units of every layer get the factor s = 10·exp(std·N(0,1)), the
      others 1. With `units=128, std=1` the start of the Path-SGD paper's MNIST experiment.

    Args:
        group: as `rescaling_group` returns it.
        key: a PRNG key.
        std: standard deviation, see above.
        units: units per layer for `"unbalanced"`; default all. A layer is the set of generators
            that scale the outputs of one leaf (`group.layers`).
        dtype: of u; integers have int32.

    Returns:
        u, (dim,).

    Raises:
        InvalidInput: for an unknown kind, std < 0, or `units` with another kind.

    References:
        Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (arXiv:1506.02617), §4.

    Example:
        >>> import jax, numpy as np
        >>> from jaxinv import networks
        >>> from jaxinv.rescaling import random_rescaling, rescaling_group
        >>> params = {f"Dense_{i}": {"kernel": np.ones((8, 8))} for i in range(3)}
        >>> group = rescaling_group(networks.mlp, params, np.zeros((1, 8)))
        >>> u = random_rescaling(group, jax.random.key(1), kind="unbalanced", units=3)
        >>> u = np.asarray(u)
        >>> int((u[:8] != 0).sum()), int((u[8:] != 0).sum())
        (3, 3)
    """
    if kind not in ("lognormal", "power_of_two", "unbalanced"):
        raise InvalidInput(
            f"kind must be 'lognormal', 'power_of_two' or 'unbalanced', not {kind!r}."
        )
    std = _checks.real("std", std, lambda s: 0 <= s < float("inf"), "a number >= 0")
    if units is not None:
        if kind != "unbalanced":
            raise InvalidInput("units is a number of units per layer, for kind='unbalanced' only.")
        _checks.integer("units", units, 1)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise InvalidInput(f"dtype must be a floating-point type, not {jnp.dtype(dtype)}.")
    normal_key, choice_key = jax.random.split(_checks.check_key("key", key))
    normal = std * jax.random.normal(normal_key, (group.dim,), dtype)
    if kind == "lognormal":
        return normal
    if kind == "power_of_two":
        return jnp.round(normal / jnp.asarray(np.log(2), dtype)).astype(jnp.int32)
    u = normal + jnp.asarray(np.log(10), dtype)
    if units is None:
        return u
    # The units with the smallest random numbers of their layer are chosen.
    draw = jax.random.uniform(choice_key, (group.dim,))
    layers = np.asarray(group.structure.layers, np.int64)
    order = jnp.lexsort((draw, layers))
    starts = np.searchsorted(np.sort(layers), np.sort(layers))
    chosen = jnp.zeros(group.dim, bool).at[order].set(np.arange(group.dim) - starts < units)
    return jnp.where(chosen, u, 0)


# --- tangents -------------------------------------------------------------------------


class TangentVectors(NamedTuple):
    """The tangent vectors of the orbit at params as a linear operator T: R^dim → params.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.rescaling import rescaling_group, tangent_vectors
        >>> w = [jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0)]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.zeros((1, 1)))
        >>> T = tangent_vectors(group, w)
        >>> [leaf.item() for leaf in T.matvec(jnp.array([1.0]))], T.rmatvec(w).tolist()
        ([2.0, -3.0], [-5.0])
    """

    matvec: Callable[[Array], PyTree]
    rmatvec: Callable[[PyTree], Array]
    shape: tuple[int, int]


@overload
def tangent_vectors(
    group: RescalingGroup, params: Params, *, dense: Literal[False] = False
) -> TangentVectors: ...


@overload
def tangent_vectors(group: RescalingGroup, params: Params, *, dense: Literal[True]) -> Array: ...


def tangent_vectors(
    group: RescalingGroup, params: Params, *, dense: bool = False
) -> TangentVectors | Array:
    """The generators at params, t_j = ∂(w·exp(Bu))/∂u_j = w ⊙ B_j, as a linear operator.

    Args:
        group: as `rescaling_group` returns it.
        params: pytree of float arrays.
        dense: return the matrix (number of parameters, dim) instead, with parameters in the order
            of `jax.flatten_util.ravel_pytree`.

    Returns:
        `TangentVectors`: `matvec(u)` gives T u as a pytree like params, `rmatvec(g)` gives Tᵀg, of
        shape (dim,), for a pytree g like params (⟨t_j, g⟩ for all generators j). Both cost as much
        as reading the parameters once, and nothing of size params × dim is stored.

    Raises:
        InvalidInput: if params do not fit the group.

    Example:
        >>> import jax, numpy as np
        >>> from jaxinv.rescaling import rescaling_group, tangent_vectors
        >>> net = lambda w, x: jax.nn.relu(x @ w[0]) @ w[1]
        >>> w = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5.0], [6.0]])]
        >>> x = np.ones((1, 2))
        >>> group = rescaling_group(net, w, x)
        >>> gradient = jax.grad(lambda w: net(w, x).sum())(w)
        >>> print(tangent_vectors(group, w).rmatvec(gradient))  # orthogonal to the orbit
        [0. 0.]
    """
    leaves = [jnp.asarray(leaf) for leaf in checked_leaves(group, params, "params")]
    tree = group.structure.tree

    if dense:
        return dense_tangents(group, leaves)

    def matvec(u: Array) -> PyTree:
        return jax.tree.unflatten(tree, tangent(group, leaves, checked_u(group, u)))

    def rmatvec(g: PyTree) -> Array:
        return cotangent(group, leaves, checked_leaves(group, g, "g"))

    size = sum(leaf.size for leaf in leaves)
    return TangentVectors(matvec, rmatvec, (size, group.dim))


__all__ = [
    "RescalingGroup",
    "TangentVectors",
    "checked_leaves",
    "class_scales",
    "log_scales",
    "random_rescaling",
    "rescale",
    "rescale_gradient",
    "rescale_state",
    "rescaling_group",
    "tangent_vectors",
    "transpose",
]
