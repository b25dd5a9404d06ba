"""Representatives of an orbit: one member of {w·exp(Bu)} singled out by a condition.

* `normalize`: every hidden unit's incoming weights have norm one;
* `balance`: the member of smallest norm;
* `path_condition`: the member whose path kernel is best conditioned.

All are functions of the orbit, so they give the same answer wherever on it they start. No loop runs
over units. All of it jits and vmaps over an ensemble; the iterations have no reverse-mode gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv import _checks
from jaxinv._numerics import scaled
from jaxinv._numerics.tolerances import default_tolerance
from jaxinv._numerics.varying import vary_alike
from jaxinv.errors import InvalidInput
from jaxinv.rescaling.action import transpose
from jaxinv.rescaling.group import RescalingGroup, checked_leaves, rescale
from jaxinv.rescaling.orbit_minimum import Problem, Weights, least_norm, minimize, most_terms, total
from jaxinv.rescaling.units import Incoming, Units, units_of
from jaxinv.typing import Array, Params, PyTree


class Gauge(NamedTuple):
    """A representative of an orbit, and how it was reached.

    Example:
        >>> import numpy as np
        >>> from jaxinv.rescaling import normalize
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = [np.full((1, 1), 8.0), np.full((1, 1), 2.0)]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, np.ones((1, 1)))
        >>> gauge = normalize(group, w)
        >>> [round(leaf.item(), 4) for leaf in gauge.params], bool(gauge.converged)
        ([1.0, 16.0], True)
    """

    params: Params  # the representative
    u: Array  # (dim,): params = rescale(group, start, u)
    value: Array  # scalar: what was minimised, at the representative
    steps: Array  # int32 scalar
    error: Array  # scalar: largest remaining imbalance of a unit, relative
    converged: Array  # bool scalar: error <= rtol


# --- the gauges -----------------------------------------------------------------------


def _positive(value: float) -> bool:
    return 0 < value < float("inf")


def _tolerance(rtol: float | None, leaves: Sequence[Array]) -> float:
    if rtol is None:
        return default_tolerance(scaled.working_dtype(leaves))
    return _checks.real("rtol", rtol, lambda t: t >= 0, "a fixed number >= 0")


def balance(
    group: RescalingGroup, params: Params, p: float = 2.0, *, rtol: float | None = None
) -> Gauge:
    """The member of the orbit with the smallest norm: min_u Σ_e |w_e|^p exp(p (Bu)_e).

    At the minimum every unit has Σ_in |w|^p = Σ_out |w|^p, biases counted among the incoming
    weights. The sum is convex in u, so there is one minimum; it is found by majorisation (all units
    at once, never uphill), then Newton's method with conjugate gradients.

    Args:
        group: as `jaxinv.rescaling_group` returns it.
        params: pytree of float arrays.
        p: the exponent, > 0.
        rtol: largest |Σ_in − Σ_out| / (Σ_in + Σ_out) of a unit to stop at; default 1e-10 in float64
            and 1e-5 in float32. The norm itself is then exact to about the square of that.

    Returns:
        A `Gauge`, with Σ_e |w_e|^p as its `value`. A unit with no incoming or no outgoing weight
        but 0 (the norm then has no minimum along its rescaling) stays where it is.

    Raises:
        InvalidInput: if params do not fit the group, or for a p that is not positive.

    References:
        Stock, Graham, Gribonval, Jégou, "Equi-normalization of neural networks", ICLR 2019
        (arXiv:1902.10416), eq. 3 and Algorithm 1. Biases are rescaled here, which the published
        code leaves out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.rescaling import balance
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0, 0.5]])},
        ...      "Dense_1": {"kernel": jnp.array([[1.0], [2.0]])}}
        >>> group = rescaling_group(networks.mlp, w, jnp.zeros((1, 1)))
        >>> round(balance(group, w).value.item(), 4)  # 2·(3·1 + 0.5·2)
        8.0
    """
    p = _checks.real("p", p, _positive, "a fixed number > 0")
    leaves = checked_leaves(group, params, "params", finite=True)
    rtol = _tolerance(rtol, leaves)
    v, log_sum, steps, error = least_norm(group, leaves, p, rtol)
    u = v / p
    return Gauge(rescale(group, params, u), u, jnp.exp(log_sum), steps, error, error <= rtol)


def path_condition(
    group: RescalingGroup,
    params: Params,
    log_kappa: PyTree,
    *,
    p: float = 2.0,
    rtol: float | None = None,
) -> Gauge:
    """The member of the orbit whose path sensitivities κ are the most equal.

    min_u P·log Σ_e κ_e exp(−p (Bu)_e) + p·Σ_e (Bu)_e, over the P parameters with κ_e > 0: rescaling
    divides κ_e by exp(p (Bu)_e). The objective is convex, bounded below by Σ_e log κ_e, and
    grows by a constant under a common factor of all κ, so it asks for equal κ, not for small ones.

    Args:
        group, params, rtol: as for `balance`.
        log_kappa: log κ, pytree like params, as `jaxinv.log_path_kappa(fn, params, x, p=p)` returns
            it; -inf for a parameter on no path, which is then left out of the sum.
        p: exponent of the path norm that κ belongs to.

    Returns:
        A `Gauge` with the objective as its `value`.

    Raises:
        InvalidInput: if params or log_kappa do not fit the group, or for p that is not positive.

    References:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training: a principled way to rescale ReLU
        neural networks", 2026 (arXiv:2602.19799), for p = 2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import log_path_kappa, networks
        >>> from jaxinv.rescaling import path_condition
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0, 0.5]])},
        ...      "Dense_1": {"kernel": jnp.array([[1.0], [2.0]])}}
        >>> x = jnp.zeros((1, 1))
        >>> gauge = path_condition(rescaling_group(networks.mlp, w, x), w,
        ...                        log_path_kappa(networks.mlp, w, x))
        >>> kappa = log_path_kappa(networks.mlp, gauge.params, x)
        >>> bool(jnp.allclose(kappa["Dense_0"]["kernel"][0], kappa["Dense_1"]["kernel"][:, 0],
        ...                   atol=1e-4))
        True
    """
    p = _checks.real("p", p, _positive, "a fixed number > 0")
    leaves = checked_leaves(group, params, "params", finite=True)
    logs = [jnp.asarray(k) for k in checked_leaves(group, log_kappa, "log_kappa")]
    for name, k in zip(_checks.leaf_names(log_kappa, "log_kappa"), logs, strict=True):
        if not isinstance(k, jax.core.Tracer) and bool((jnp.isnan(k) | (k == jnp.inf)).any()):
            raise InvalidInput(
                f"{name} has NaN or inf: log κ must be a number, or -inf for a weight on no path. "
                "A κ that float32 has lost is NaN; compute it in float64."
            )
    rtol = _tolerance(rtol, leaves)
    dtype = scaled.working_dtype([*leaves, *logs])
    weights = Weights([k.astype(dtype) for k in logs])
    counted = [jnp.where(k > -jnp.inf, 1, 0).astype(dtype) for k in weights.logs]
    linear = transpose(group, counted)
    problem = Problem(group, weights, total(counted), linear, most_terms(group))
    v, value, steps, error = minimize(problem, rtol)
    u = -v / p
    return Gauge(rescale(group, params, u), u, value, steps, error, error <= rtol)


def normalize(group: RescalingGroup, params: Params, p: float = 2.0) -> Gauge:
    """The member of the orbit in which every hidden unit's incoming weights have norm one.

    Σ_{e into j} |w_e|^p = 1 for all generators j: incoming weights are divided by their norm,
    outgoing ones multiplied by it, from the input to the output. The incoming weights of a
    generator are the parameters that it multiplies: a unit's column of the kernel *and its bias*
    (so that the unit is a hyperplane of unit normal in homogeneous coordinates), all kernels that
    write to a channel of a residual stream taken together, and the queries of a query-key pair.
    Weights on the way back to their own unit (a residual branch, a recurrence) are left out: no
    rescaling changes what they do around the loop, so a norm with them could not always be one.

    Args:
        group: as `jaxinv.rescaling_group` returns it, outside `jit`.
        params: pytree of float arrays.
        p: the exponent, > 0.

    Returns:
        A `Gauge`; its `error` is the largest |Σ − 1|. Units whose incoming weights are all 0 stay
        where they are.

    Raises:
        InvalidInput: if params do not fit the group, for a p that is not positive, or where a
            weight is an incoming weight of several units.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.rescaling import normalize
        >>> from jaxinv.rescaling import rescaling_group
        >>> def residual(w, x):
        ...     h = x @ w["in"]
        ...     return (h + (h @ w["a"]) @ w["b"]) @ w["out"]
        >>> w = {name: jnp.full((1, 1), 2.0) for name in ("in", "a", "b", "out")}
        >>> gauge = normalize(rescaling_group(residual, w, jnp.ones((1, 1))), w)
        >>> {name: round(leaf.item(), 4) for name, leaf in gauge.params.items()}
        {'a': 1.0, 'b': 4.0, 'in': 1.0, 'out': 4.0}
    """
    p = _checks.real("p", p, _positive, "a fixed number > 0")
    weights = Weights.powers(checked_leaves(group, params, "params", finite=True), p)
    v, steps, error = _unit_norms(group, weights, *units_of(group))
    u, converged = v / p, error <= default_tolerance(v.dtype)
    return Gauge(rescale(group, params, u), u, error, steps, error, converged)


@partial(jax.jit, static_argnames=("dim", "depth"))
def _unit_norms(
    group: RescalingGroup, weights: Weights, leaves: Incoming, dim: int, depth: int
) -> tuple[Array, Array, Array]:
    """v with Σ_{e into j} a_e exp((Bv)_e) = 1 for all j, by substitution layer after layer."""
    units = Units(leaves, dim, depth)

    def log_sums(v: Array) -> Array:
        found = units.log_sums(weights.moved(group, v))
        return jnp.where(found > -jnp.inf, found, 0)

    def step(state: tuple) -> tuple:
        v, found, steps = state
        v = v - found
        return v, log_sums(v), steps + 1

    # Each step puts right all units whose sources are right, so `depth` steps do it; rounding of
    # long sums may stay above the tolerance.
    v = jnp.zeros(dim, weights.logs[0].dtype)
    rtol = 16 * float(jnp.finfo(v.dtype).eps)

    def unfinished(state: tuple) -> Array:
        _, found, steps = state
        return (error_of(found) > rtol) & (steps < depth + 2)

    def error_of(found: Array) -> Array:
        return jnp.max(abs(jnp.expm1(found)), initial=0.0)

    state = vary_alike(v, log_sums(v), jnp.zeros((), jnp.int32))
    v, found, steps = lax.while_loop(unfinished, step, state)
    return v, steps, error_of(found)


def distance_mod_rescaling(group: RescalingGroup, a: Params, b: Params) -> Array:
    """Distance between the orbits of two parameter vectors: ‖balance(a) − balance(b)‖₂.

    The balanced member depends on the orbit alone, so this is a metric on orbits: it is zero when
    `a` and `b` differ by a rescaling, and symmetric, with a triangle inequality. (The plain minimum
    over u of ‖rescale(a, u) − b‖ is neither.)

    Args:
        group: as `jaxinv.rescaling_group` returns it.
        a, b: pytrees of float arrays of the same shapes.

    Returns:
        A scalar.

    Raises:
        InvalidInput: if a or b do not fit the group.

    Example:
        >>> import numpy as np
        >>> from jaxinv.rescaling import distance_mod_rescaling
        >>> from jaxinv.rescaling import rescaling_group
        >>> one, two = [np.full((1, 1), 8.0), np.full((1, 1), 2.0)], [np.ones((1, 1))] * 2
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], one, np.ones((1, 1)))
        >>> f"{distance_mod_rescaling(group, one, two):.4f}"  # between (4, 4) and (1, 1)
        '4.2426'
    """
    leaves = [checked_leaves(group, w, name) for w, name in ((a, "a"), (b, "b"))]
    dtype = scaled.working_dtype([*leaves[0], *leaves[1]])
    near, far = (balance(group, jax.tree.unflatten(group.structure.tree, w)).params for w in leaves)
    return scaled.norm(
        [
            x.astype(dtype) - y.astype(dtype)
            for x, y in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True)
        ]
    )
