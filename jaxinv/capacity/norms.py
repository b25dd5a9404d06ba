"""Norm-based capacity: how large a network is, measured by its weights rather than by their number.

| measure | formula | rescaling |
|---|---|---|
| `group_norm` | μ_{p,q} = (Σ_units (Σ_in \\|w\\|^p)^{q/p})^{1/q} | changes it |
| `log_layer_product_norm` | γ_{p,q} = Π_layers ‖W_l‖_{p,q} | changes it |
| `log_spectral_product` | Π_l ‖W_l‖₂ | changes it |
| `log_spectral_complexity` | the same times its (2,1)-correction | changes it |
| `jaxinv.path_norm` | φ_p = (Σ_paths Π \\|w\\|^p)^{1/p} | invariant |
| `fisher_rao_norm` | ⟨w, F(w) w⟩^{1/2} | invariant |
| `margins` | f_y − max over the other outputs | invariant |

`rescaling_invariance` checks the last column for any measure. φ_p is the least γ_{p,∞} of all.

Units and layers are read off the program. A unit is what a product with weights gives: a column of
a dense kernel or a channel (once, not per position), with the bias. Terms of one sum are one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from jaxinv import _checks
from jaxinv._checks import check_exponent
from jaxinv._numerics.tolerances import default_tolerance
from jaxinv.capacity.layers import Layers, chain_refusal, check_chain, prepare
from jaxinv.capacity.spectral import (
    LinearOperator,
    SpectralNorms,
    linear_operators,
    log_spectral_complexity,
    log_spectral_product,
    spectral_norms,
)
from jaxinv.errors import InvalidInput
from jaxinv.jacobians.fisher_information import whitened
from jaxinv.rescaling.group import RescalingGroup, random_rescaling, rescale
from jaxinv.typing import Array, ArrayLike, DTypeLike, Inputs, Likelihood, Network, Params, PyTree

# --- group norms ----------------------------------------------------------------------


def _log_unit_norms(layers: Layers, p: float, dtype: DTypeLike) -> Array:
    """log (Σ_in |w|^p)^{1/p}; each unit in units of its largest weight, so nothing overflows."""
    parts = []
    top = jnp.zeros(layers.num_units, dtype)
    for value, units, mask, _ in layers.incoming:
        size = abs(value) if mask is None else jnp.where(mask, abs(value), 0)
        axes = tuple(a for a, n in enumerate(units.shape) if n == 1)
        parts.append((size, units, axes))
        largest = jnp.max(jax.lax.stop_gradient(size), axes, keepdims=True, initial=0)
        top = top.at[units].max(jnp.broadcast_to(largest, units.shape))
    scale = jnp.where(top > 0, top, 1)
    total = jnp.zeros(layers.num_units, dtype)
    for size, units, axes in parts:
        ratio = size / scale[units]
        powers = ratio ** (int(p) if p % 1 == 0 else jnp.asarray(p, dtype))
        summed = jnp.sum(powers, axes, keepdims=True)
        total = total.at[units].add(jnp.broadcast_to(summed, units.shape))
    total = jnp.where(top > 0, total, 1)
    return jnp.where(top > 0, jnp.log(total) / jnp.asarray(p, dtype) + jnp.log(scale), -jnp.inf)


def _log_sum(logs: Array, q: float) -> Array:
    """log (Σ exp(q·log))^{1/q}."""
    if math.isinf(q):
        return jnp.max(logs, initial=-jnp.inf)
    q_array = jnp.asarray(q, logs.dtype)
    result: Array = logsumexp(q_array * logs) / q_array
    return result


def _check_exponents(p: object, q: object) -> None:
    check_exponent(p)
    _checks.real("q", q, lambda q: q >= 1, "a fixed number with 1 <= q <= inf")


def log_unit_norms(
    fn: Network, params: Params, x: Inputs, *, p: float = 2.0, batch_axis: int | None = 0
) -> Array:
    """log of the ℓ_p norm of the incoming weights of every unit, log (Σ_{u→v} |w_uv|^p)^{1/p}.

    Args:
        fn, params, x, p, batch_axis: as for `group_norm`.

    Returns:
        (units,), output units included, in the order in which the program computes them; -inf for a
        unit whose weights are all 0.

    Raises:
        InvalidInput, UnsupportedOperation: as for `group_norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.capacity import log_unit_norms
        >>> w = [jnp.array([[3.0, 0.5], [4.0, 0.0]]), jnp.array([[1.0], [0.0]])]
        >>> net = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1]
        >>> jnp.exp(log_unit_norms(net, w, jnp.zeros((1, 2)))).round(4).tolist()
        [5.0, 0.5, 1.0]
    """
    check_exponent(p)
    layers, dtype = prepare(fn, params, x, batch_axis)
    return _log_unit_norms(layers, float(p), dtype)


def log_group_norm(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    p: float = 2.0,
    q: float = 2.0,
    batch_axis: int | None = 0,
) -> Array:
    """Natural logarithm of `group_norm`, finite where that overflows.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import log_group_norm
        >>> w = jnp.full((1, 1), 1e30)
        >>> print(f"{log_group_norm(lambda w, x: x @ w, w, jnp.zeros((1, 1))):.3f}")  # 30·log 10
        69.078
    """
    _check_exponents(p, q)
    layers, dtype = prepare(fn, params, x, batch_axis)
    return _log_sum(_log_unit_norms(layers, float(p), dtype), float(q))


def group_norm(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    p: float = 2.0,
    q: float = 2.0,
    batch_axis: int | None = 0,
) -> Array:
    """Group norm μ_{p,q} = (Σ_{units v} (Σ_{u→v} |w_uv|^p)^{q/p})^{1/q}.

    p = q = 2 is the Frobenius norm of all weights, p = q = 1 their ℓ₁ norm, and q = ∞ bounds the
    incoming weights of every unit (max-norm).

    Args:
        fn: network `fn(params, x) -> y`, of any activations. Parameters enter by products with
            values that depend on x (dense layers, convolutions, scales) and by sums (biases).
        params: pytree of float arrays.
        x: inputs with a batch axis, or `jax.ShapeDtypeStruct`s: only shapes are used.
        batch_axis: as for `jaxinv.path_norm`.
        p: 1 <= p < inf.
        q: 1 <= q <= inf.

    Returns:
        A scalar; float64 if a parameter is, else float32. Differentiable.

    Raises:
        InvalidInput: for integer, NaN or missing params, x without a batch axis, p or q below 1.
        UnsupportedOperation: where a parameter is the weight of no edge: a threshold, an exponent,
            a table indexed by x.

    Notes:
        A weight counts once for every unit that it leads into; with tied layers it leads into
        units of both. Weights that are functions of the parameters (weight normalisation, w/√n)
        count with their effective value.

    References:
        Neyshabur, Tomioka, Srebro, "Norm-based capacity control in neural networks", COLT 2015
        (arXiv:1503.00036).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import group_norm
        >>> w = [jnp.array([[3.0, 0.5], [4.0, 0.0]]), jnp.array([[1.0], [0.0]])]
        >>> net = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1]
        >>> x = jnp.zeros((1, 2))
        >>> print(group_norm(net, w, x, q=float("inf")), group_norm(net, w, x, q=1))
        5.0 6.5
    """
    return jnp.exp(log_group_norm(fn, params, x, p=p, q=q))


def log_layer_product_norm(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    p: float = 2.0,
    q: float = 2.0,
    batch_axis: int | None = 0,
) -> Array:
    """log γ_{p,q} = Σ_l log ‖W_l‖_{p,q}: the group norms of the layers of a chain multiplied.

    ‖W_l‖_{p,q} = (Σ_{units v of l} (Σ_{u→v} |w_uv|^p)^{q/p})^{1/q}, biases counted as weights.
    γ_{2,2} is the product of Frobenius norms; min over rescalings of γ_{p,∞} is φ_p, the path norm,
    of a network with one output.

    Args:
        fn, params, x, p, q, batch_axis: as for `group_norm`; the layers of `fn` form a chain.

    Returns:
        A scalar; -inf if a layer is 0.

    Raises:
        InvalidInput: as for `group_norm`.
        UnsupportedOperation: as for `group_norm`, and where layers are not a chain: residual sums,
            concatenated branches.

    References:
        Neyshabur, Tomioka, Srebro, COLT 2015 (arXiv:1503.00036).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.capacity import log_layer_product_norm
        >>> w = [jnp.array([[3.0], [4.0]]), jnp.array([[2.0]])]
        >>> net = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1]
        >>> print(f"{jnp.exp(log_layer_product_norm(net, w, jnp.zeros((1, 2)))):.4f}")
        10.0000
    """
    _check_exponents(p, q)
    layers, dtype = prepare(fn, params, x, batch_axis)
    check_chain(layers)
    if (layers.operator_of < 0).any():  # a bias that is added to x itself
        raise chain_refusal(layers.operators[0].eqn)
    logs = _log_unit_norms(layers, float(p), dtype)
    per_layer = [
        _log_sum(logs[layers.operator_of == i], float(q)) for i in range(len(layers.operators))
    ]
    return sum(per_layer[1:], per_layer[0])


# --- measures of the function and the data --------------------------------------------


def fisher_rao_norm(
    fn: Network,
    params: Params,
    x: Inputs,
    y: Array | None = None,
    *,
    likelihood: Likelihood = "softmax",
) -> Array:
    """Fisher–Rao norm ‖w‖_fr = ⟨w, F(w) w⟩^{1/2} = E[⟨∂ℓ/∂f, J w⟩²]^{1/2}.

    One pass in forward mode: J w is the derivative of f along w. A network without biases that is
    homogeneous in each of its L layers has J w = L·f.

    Args:
        fn, params, x: as for `jaxinv.jacobians.fisher`; the expectation is the mean over x.
        y: labels for the empirical Fisher information: (n,) integers for "softmax", else like fn's
            output. Without them F is the Fisher information, labels distributed as predicted.
        likelihood: "softmax", "gaussian", "bernoulli" or "poisson", see `jaxinv.jacobians.fisher`;
            ℓ is its negative logarithm.

    Returns:
        A scalar in the dtype of fn's output.

    Raises:
        InvalidInput: for bad params, an unknown likelihood, labels that do not fit the outputs.

    References:
        Liang, Poggio, Rakhlin, Stokes, "Fisher–Rao metric, geometry, and complexity of neural
        networks", AISTATS 2019 (arXiv:1711.01530).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import fisher_rao_norm
        >>> net = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1]
        >>> w, x = [jnp.full((1, 1), 3.0), jnp.full((1, 1), 2.0)], jnp.ones((4, 1))
        >>> print(fisher_rao_norm(net, w, x, likelihood="gaussian"))  # 2 layers, f = 6
        12.0
    """
    _checks.check_params(params)
    net = whitened(fn, likelihood)
    if y is None:
        _, tangent = jax.jvp(lambda w: net(w, x), (params,), (params,))
        leaves = jax.tree.leaves(tangent)
        n = jnp.shape(leaves[0])[0]
        total = sum(jnp.sum(leaf**2) for leaf in leaves)
        return jnp.sqrt(total / n)
    f, tangent = jax.jvp(lambda w: fn(w, x), (params,), (params,))
    residual = _residual(f, y, likelihood)
    inner = jnp.sum((residual * tangent).reshape(len(f), -1), 1)
    return jnp.sqrt(jnp.mean(inner**2))


_MEANS: dict[str, Callable[[Array], Array]] = {
    "softmax": jax.nn.softmax,
    "gaussian": lambda f: f,
    "bernoulli": jax.nn.sigmoid,
    "poisson": jnp.exp,
}


def _residual(f: PyTree, y: ArrayLike, likelihood: str) -> Array:
    """∂ℓ/∂f: the expected label minus the label."""
    if not isinstance(f, jax.Array):
        raise InvalidInput("labels need an fn that returns one array, not a pytree.")
    y = jnp.asarray(y)
    if likelihood == "softmax":
        _check_labels(f, y)
        y = jax.nn.one_hot(y, f.shape[-1], dtype=f.dtype)
    elif y.shape != f.shape:
        raise InvalidInput(f"y has shape {y.shape}, but outputs have {f.shape}.")
    return _MEANS[likelihood](f) - y.astype(f.dtype)


def _check_labels(f: Array, y: Array) -> None:
    if f.ndim < 2 or f.shape[-1] < 2 or y.shape != f.shape[:-1]:
        raise InvalidInput(
            f"y has shape {y.shape} and the outputs {f.shape}: one label is needed for each row of "
            "at least two class scores."
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise InvalidInput(f"y has dtype {y.dtype}, but labels are integers, the class of each x.")
    if isinstance(y, jax.core.Tracer) or not y.size:
        return
    known = np.asarray(y)
    low, high = int(known.min()), int(known.max())
    if not 0 <= low <= high < f.shape[-1]:
        raise InvalidInput(
            f"y holds labels from {low} to {high}, but there are {f.shape[-1]} classes, numbered "
            "from 0."
        )


def margins(fn: Network, params: Params, x: Inputs, y: Array) -> Array:
    """Margin of every example, f_y − max_{j≠y} f_j: positive where it is classified correctly.

    Args:
        fn: network with outputs (n, ..., classes).
        params, x: as for `fn`.
        y: (n, ...) integer labels.

    Returns:
        An array like y, in the dtype of the outputs. Quantiles over examples are the γ of margin
        bounds: `jnp.quantile(margins(...), 0.05)` leaves out the worst 5 %.

    Raises:
        InvalidInput: for bad params, or labels that do not fit the outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import margins
        >>> margins(lambda w, x: x @ w, jnp.eye(3), jnp.array([[1.0, 5.0, 2.0]]),
        ...         jnp.array([1])).tolist()
        [3.0]
    """
    _checks.check_params(params)
    f = _checks.check_network(fn)(params, x)
    if not isinstance(f, jax.Array):
        raise InvalidInput("margins need an fn that returns one array of class scores.")
    y = jnp.asarray(y)
    _check_labels(f, y)
    correct = jnp.take_along_axis(f, y[..., None], -1)[..., 0]
    other = jnp.where(jax.nn.one_hot(y, f.shape[-1], dtype=bool), -jnp.inf, f)
    return correct - jnp.max(other, -1)


def log_margin_normalized(log_norm: Array, margin: Array) -> Array:
    """log(norm/γ): what a bound on the error at margin γ depends on.

    A network multiplied by c has c times the margins. Norms that are multiplied too (path norms,
    `log_layer_product_norm`, `log_spectral_product`) are comparable between networks after this.

    Args:
        log_norm: logarithm of a norm.
        margin: γ, broadcasts to it.

    Returns:
        log_norm − log γ; inf where γ <= 0, since no finite capacity follows from such a margin.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.capacity import log_margin_normalized
        >>> print(log_margin_normalized(jnp.log(6.0), jnp.array([6.0, -1.0])))
        [ 0. inf]
    """
    margin = jnp.asarray(margin)
    positive = margin > 0
    return jnp.where(positive, log_norm - jnp.log(jnp.where(positive, margin, 1)), jnp.inf)


# --- are they invariant? --------------------------------------------------------------


class RescalingInvariance(NamedTuple):
    """Measures at params and at other members of their orbit; pytrees like what measure returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import rescaling_group, rescaling_invariance
        >>> w, x = [jnp.ones((1, 1))] * 2, jnp.ones((1, 1))
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, x)
        >>> found = rescaling_invariance(lambda w: w[0] * w[1], group, w, jax.random.key(0))
        >>> bool(found.invariant), found.rescaled.shape
        (True, (4, 1, 1))
    """

    value: PyTree  # measure(params)
    rescaled: PyTree  # each leaf (draws, ...): at random members of the orbit
    deviation: PyTree  # scalars: largest |rescaled − value|, relative to the largest |value|
    invariant: PyTree  # bools: deviation <= rtol


def rescaling_invariance(
    measure: Callable[[Params], PyTree],
    group: RescalingGroup,
    params: Params,
    key: Array,
    *,
    draws: int = 4,
    std: float = 1.0,
    rtol: float | None = None,
) -> RescalingInvariance:
    """Does a measure see more than the function? Its values on the orbit of the rescalings.

    Factors are random powers of two, so that in a ReLU network what is invariant stays so to the
    last bit, and a deviation is not rounding.

    Args:
        measure: `measure(params)` returns an array or a pytree of arrays, such as a dictionary of
            norms; jax-traceable.
        group: as `jaxinv.rescaling_group` returns it.
        params: pytree of float arrays.
        key: a PRNG key.
        draws: members of the orbit, >= 1.
        std: standard deviation of log-factors.
        rtol: largest deviation that counts as none; default 1e-10 for float64, else 1e-5.

    Returns:
        A `RescalingInvariance`. The deviation of a measure that is not finite is NaN, and it is not
        invariant. For a logarithm it is relative to the logarithm.

    Raises:
        InvalidInput: if params do not fit the group, or draws < 1; if the group is trivial, since
            everything is then invariant.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import group_norm, path_norm, rescaling_group, rescaling_invariance
        >>> net = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1]
        >>> w, x = [jnp.array([[1.0, 3.0]]), jnp.array([[2.0], [1.0]])], jnp.zeros((1, 1))
        >>> def measure(w):
        ...     return {"path": path_norm(net, w, x), "Frobenius": group_norm(net, w, x)}
        >>> group = rescaling_group(net, w, x)
        >>> found = rescaling_invariance(measure, group, w, jax.random.key(1))
        >>> {name: bool(value) for name, value in found.invariant.items()}
        {'Frobenius': False, 'path': True}
    """
    draws = _checks.integer("draws", draws, 1)
    if group.dim == 0:
        raise InvalidInput("the group has no generators, so every measure is invariant under it.")
    us = jax.vmap(lambda k: random_rescaling(group, k, kind="power_of_two", std=std))(
        jax.random.split(key, draws)
    )
    # The start is one of the batch, so that all members go through the same program.
    us = jnp.concatenate([jnp.zeros_like(us[:1]), us])
    found = jax.jit(jax.vmap(lambda u: measure(rescale(group, params, u, base=2))))(us)

    def deviation(values: Array) -> Array:
        largest = jnp.max(abs(values[0]))
        return jnp.max(abs(values[1:] - values[0])) / jnp.where(largest > 0, largest, 1)

    def invariant(d: Array) -> Array:
        return d <= (default_tolerance(d.dtype) if rtol is None else rtol)

    deviations = jax.tree.map(deviation, found)
    return RescalingInvariance(
        jax.tree.map(lambda a: a[0], found),
        jax.tree.map(lambda a: a[1:], found),
        deviations,
        jax.tree.map(
            lambda d: d <= (default_tolerance(d.dtype) if rtol is None else rtol), deviations
        ),
    )


__all__ = [
    "LinearOperator",
    "RescalingInvariance",
    "SpectralNorms",
    "fisher_rao_norm",
    "group_norm",
    "linear_operators",
    "log_group_norm",
    "log_layer_product_norm",
    "log_margin_normalized",
    "log_spectral_complexity",
    "log_spectral_product",
    "log_unit_norms",
    "margins",
    "rescaling_invariance",
    "spectral_norms",
]
