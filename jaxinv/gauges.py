"""Representatives of an orbit: one member of {w·exp(Bu)} singled out by a condition.

* `normalize`: every hidden unit's incoming weights have norm one;
* `balance`: the member of smallest norm;
* `path_condition`: the member whose path kernel is best conditioned.

All are functions of the orbit, so they give the same answer wherever on it they start. No loop runs
over units. All of it jits and vmaps over an ensemble; the iterations have no reverse-mode gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv import _scaled
from jaxinv.errors import InvalidInput
from jaxinv.rescaling import (
    RescalingGroup,
    checked_leaves,
    class_scales,
    rescale,
    summed_to,
)
from jaxinv.typing import Array, Params, PyTree

# Majorisation is cheap and safe far from the optimum; Newton finishes. The switch is at this
# relative imbalance of a unit, or after so many sweeps.
_NEWTON_BELOW = 0.1
_MOST_SWEEPS = 60
_MOST_NEWTON_STEPS = 60
_MOST_CG_STEPS = 200
_MOST_HALVINGS = 30


class Gauge(NamedTuple):
    """A representative of an orbit, and how it was reached.

    Example:
        >>> import numpy as np
        >>> from jaxinv.gauges import normalize
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
    converged: Array  # bool scalar: error <= tol


def default_tolerance(dtype: Any) -> float:
    """Imbalance of a unit that rounding allows: sums over a unit's weights are good to about this.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.gauges import default_tolerance
        >>> default_tolerance(jnp.float32)
        1e-05
    """
    return 1e-10 if jnp.dtype(dtype) == jnp.float64 else 1e-5


# --- sums over the weights of a unit --------------------------------------------------


class _Weights(NamedTuple):
    """Positive numbers per parameter, by their logarithms: a_e exp((Bu)_e) without overflow."""

    logs: list[Array]

    def at(self, group: RescalingGroup, u: Array, shift: Any) -> list[Array]:
        """a_e exp((Bu)_e − shift)."""
        s = class_scales(group, u)
        return [
            jnp.exp(sum((s[ids] for ids in terms), a - shift))
            for a, terms in zip(self.logs, group.indices, strict=True)
        ]


def _class_sums(group: RescalingGroup, leaves: Sequence[Array]) -> Array:
    """Σ over the parameters of every class, (num_classes,)."""
    totals = jnp.zeros(group.structure.num_classes, leaves[0].dtype)
    for leaf, terms in zip(leaves, group.indices, strict=True):
        for ids in terms:
            totals = totals.at[ids].add(summed_to(leaf, ids.shape))
    return totals


def _onto(group: RescalingGroup, totals: Array, power: int = 1, sign: int = 0) -> Array:
    """Σ over the classes of every generator of coefficient^power · total, (dim,).

    With `sign` only over classes whose coefficient has that sign, in absolute value.
    """
    c = jnp.asarray(group.coefficients).astype(totals.dtype)
    c = c**power if sign == 0 else jnp.maximum(sign * c, 0)
    return jnp.zeros(group.dim, totals.dtype).at[group.columns].add(c * totals[group.rows])


def _total(leaves: Sequence[Array]) -> Array:
    return sum((jnp.sum(leaf) for leaf in leaves[1:]), jnp.sum(leaves[0]))


# --- minimising P·log Σ_e a_e exp((Bu)_e) − c·u ----------------------------------------


class _Point(NamedTuple):
    u: Array
    log_sum: Array  # log Σ_e a_e exp((Bu)_e)
    shares: list[Array]  # π_e = a_e exp((Bu)_e) / Σ


class _Problem(NamedTuple):
    group: RescalingGroup
    weights: _Weights
    multiplier: Any  # P
    linear: Array  # c
    terms: Any  # number of classes that meet in one parameter, at most

    def start(self, u: Array) -> _Point:
        top = jnp.stack([jnp.max(a) for a in self.weights.logs]).max()
        return self.point(u, top)[0]

    def point(self, u: Array, shift: Array) -> tuple[_Point, Array]:
        """The point u and its value; `shift` is about the logarithm of the sum."""
        parts = self.weights.at(self.group, u, shift)
        total = _total(parts)
        log_sum = shift + jnp.log(total)
        value = self.multiplier * log_sum - jnp.vdot(self.linear, u)
        return _Point(u, log_sum, [part / total for part in parts]), value

    def forces(self, point: _Point) -> tuple[Array, Array]:
        """P·Σ_e |B_ej| π_e over the parameters that generator j multiplies, and that it divides."""
        totals = _class_sums(self.group, point.shares)
        P = self.multiplier
        return P * _onto(self.group, totals, sign=1), P * _onto(self.group, totals, sign=-1)

    def curvature(self, point: _Point, v: Array) -> Array:
        """P·(BᵀΠB − (Bᵀπ)(Bᵀπ)ᵀ) v."""
        s = class_scales(self.group, v)
        moved = []
        for share, terms in zip(point.shares, self.group.indices, strict=True):
            moved.append(share * sum((s[ids] for ids in terms), jnp.zeros((), share.dtype)))
        mean = _onto(self.group, _class_sums(self.group, point.shares))
        product = _onto(self.group, _class_sums(self.group, moved))
        return self.multiplier * (product - mean * jnp.vdot(mean, v))


@jax.jit  # else every call would compile its loops anew
def _minimize(problem: _Problem, tol: Any) -> tuple[Array, Array, Array, Array]:
    """(u, value, steps, error): majorisation from afar, then Newton with conjugate gradients."""
    start = problem.start(jnp.zeros(problem.group.dim, problem.weights.logs[0].dtype))
    up, down = problem.forces(start)
    c = problem.linear
    # A generator whose sum has no minimum along it (a unit without incoming or without outgoing
    # weights) stays where it is.
    active = ((up > 0) | (c < 0)) & ((down > 0) | (c > 0))

    def error_of(up: Array, down: Array) -> Array:
        size = jnp.where(active, up + down + abs(c), 1)
        return jnp.max(jnp.where(active, abs(up - down - c) / size, 0), initial=0.0)

    def sweep(state: tuple) -> tuple:
        """Every unit at its minimum of an upper bound that separates the units.

        exp(Σ_j B_j δ_j) <= Σ_j (|B_j|/s) exp(s·sign(B_j)·δ_j) + 1 − Σ_j|B_j|/s for Σ|B_j| <= s, so
        up·exp(sδ) − down·exp(−sδ) = c: no step size, and never uphill.
        """
        point, steps, _ = state
        up, down = problem.forces(point)
        root = jnp.sqrt(c**2 + 4 * up * down)
        # The two forms of the root of up·z² − c·z − down = 0, whichever does not cancel.
        z = jnp.where(c >= 0, (c + root) / (2 * up), 2 * down / (root - c))
        delta = jnp.log(jnp.where(active, z, 1)) / problem.terms
        point, _ = problem.point(point.u + delta, point.log_sum)
        return point, steps + 1, error_of(*problem.forces(point))

    def far(state: tuple) -> Array:
        _, steps, error = state
        return (error > _NEWTON_BELOW) & (steps < _MOST_SWEEPS)

    point, sweeps, error = lax.while_loop(
        far, sweep, (start, jnp.zeros((), jnp.int32), error_of(up, down))
    )

    def newton(state: tuple) -> tuple:
        point, steps, error, _ = state
        up, down = problem.forces(point)
        gradient = jnp.where(active, up - down - c, 0)
        preconditioner = jnp.where(active, up + down, 1)
        direction = _conjugate_gradients(
            lambda v: jnp.where(active, problem.curvature(point, v), 0),
            -gradient,
            preconditioner,
            jnp.minimum(error, 0.1),
        )
        value = problem.multiplier * point.log_sum - jnp.vdot(c, point.u)
        slope = jnp.vdot(gradient, direction)

        def attempt(size: Array) -> tuple[_Point, Array]:
            return problem.point(point.u + size * direction, point.log_sum)

        def uphill(state: tuple) -> Array:
            size, _, new = state
            # Rounding of the value hides decreases this small; the gradient decides those.
            blur = 4 * jnp.finfo(value.dtype).eps * abs(value)
            return ~(new <= value + 1e-4 * size * slope + blur) & (size > 0.5**_MOST_HALVINGS)

        def halve(state: tuple) -> tuple:
            size = state[0] / 2
            return (size, *attempt(size))

        one = jnp.ones((), value.dtype)
        _, after, new = lax.while_loop(uphill, halve, (one, *attempt(one)))
        after_error = error_of(*problem.forces(after))
        better = jnp.isfinite(new) & ((after_error < error) | (new < value))
        chosen = jax.tree.map(lambda a, b: jnp.where(better, a, b), after, point)
        return chosen, steps + 1, jnp.where(better, after_error, error), ~better

    def unfinished(state: tuple) -> Array:
        _, steps, error, stuck = state
        return (error > tol) & ~stuck & (steps < sweeps + _MOST_NEWTON_STEPS)

    point, steps, error, _ = lax.while_loop(
        unfinished, newton, (point, sweeps, error, jnp.zeros((), bool))
    )
    value = problem.multiplier * point.log_sum - jnp.vdot(c, point.u)
    return point.u, value, steps, error


def _conjugate_gradients(product: Any, b: Array, diagonal: Array, tol: Array) -> Array:
    """Approximate solution of H x = b, to ‖r‖ <= tol·‖b‖ in the norm of 1/diagonal."""
    target = tol**2 * jnp.vdot(b, b / diagonal)

    def unfinished(state: tuple) -> Array:
        _, _, _, rho, steps = state
        return (rho > target) & (steps < _MOST_CG_STEPS)

    def step(state: tuple) -> tuple:
        x, r, p, rho, steps = state
        q = product(p)
        curvature = jnp.vdot(p, q)
        fine = curvature > 0
        alpha = jnp.where(fine, rho / jnp.where(fine, curvature, 1), 0)
        x, r = x + alpha * p, r - alpha * q
        new = jnp.where(fine, jnp.vdot(r, r / diagonal), 0)
        return x, r, r / diagonal + new / rho * p, new, steps + 1

    p = b / diagonal
    state = (jnp.zeros_like(b), b, p, jnp.vdot(b, p), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, step, state)[0]


def _most_terms(group: RescalingGroup) -> int:
    """Σ_j |B_ej| of a parameter, at most."""
    largest = np.zeros(group.structure.num_classes)
    np.add.at(largest, np.asarray(group.rows), np.abs(np.asarray(group.coefficients)))
    sums = [sum(float(largest[np.asarray(ids)].max()) for ids in t) for t in group.indices if t]
    return int(max(sums, default=1))


# --- the gauges -----------------------------------------------------------------------


def _logs(leaves: Sequence[Array], power: float) -> _Weights:
    dtype = _scaled.working_dtype(leaves)
    return _Weights([power * jnp.log(abs(leaf.astype(dtype))) for leaf in leaves])


def _tolerance(tol: float | None, leaves: Sequence[Array]) -> float:
    return default_tolerance(_scaled.working_dtype(leaves)) if tol is None else tol


def balance(
    group: RescalingGroup, params: Params, norm: float = 2.0, *, tol: float | None = None
) -> Gauge:
    """The member of the orbit with the smallest norm: min_u Σ_e |w_e|^p exp(p (Bu)_e).

    At the minimum every unit has Σ_in |w|^p = Σ_out |w|^p, biases counted among the incoming
    weights. The sum is convex in u, so there is one minimum; it is found by majorisation (all units
    at once, never uphill), then Newton's method with conjugate gradients.

    Args:
        group: as `jaxinv.rescaling_group` returns it.
        params: pytree of float arrays.
        norm: the exponent p > 0.
        tol: largest |Σ_in − Σ_out| / (Σ_in + Σ_out) of a unit to stop at; default 1e-10 in float64
            and 1e-5 in float32. The norm itself is then exact to about the square of that.

    Returns:
        A `Gauge`, with Σ_e |w_e|^p as its `value`. A unit with no incoming or no outgoing weight
        but 0 (the norm then has no minimum along its rescaling) stays where it is.

    Raises:
        InvalidInput: if params do not fit the group, or for a norm that is not positive.

    References:
        Stock, Graham, Gribonval, Jégou, "Equi-normalization of neural networks", ICLR 2019
        (arXiv:1902.10416), eq. 3 and Algorithm 1. Biases are rescaled here, which the published
        code leaves out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.gauges import balance
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0, 0.5]])},
        ...      "Dense_1": {"kernel": jnp.array([[1.0], [2.0]])}}
        >>> group = rescaling_group(networks.mlp, w, jnp.zeros((1, 1)))
        >>> round(balance(group, w).value.item(), 4)  # 2·(3·1 + 0.5·2)
        8.0
    """
    if not norm > 0:
        raise InvalidInput(f"norm must be positive, not {norm}.")
    leaves = checked_leaves(group, params, "params")
    tol = _tolerance(tol, leaves)
    weights = _logs(leaves, norm)
    zero = jnp.zeros(group.dim, weights.logs[0].dtype)
    problem = _Problem(group, weights, 1.0, zero, _most_terms(group))
    v, log_sum, steps, error = _minimize(problem, tol)
    u = v / norm
    return Gauge(rescale(group, params, u), u, jnp.exp(log_sum), steps, error, error <= tol)


def path_condition(
    group: RescalingGroup,
    params: Params,
    log_kappa: PyTree,
    *,
    p: float = 2.0,
    tol: float | None = None,
) -> Gauge:
    """The member of the orbit whose path sensitivities κ are the most equal.

    min_u P·log Σ_e κ_e exp(−p (Bu)_e) + p·Σ_e (Bu)_e, over the P parameters with κ_e > 0: rescaling
    divides κ_e by exp(p (Bu)_e). The objective is convex, bounded below by Σ_e log κ_e, and
    grows by a constant under a common factor of all κ, so it asks for equal κ, not for small ones.

    Args:
        group, params, tol: as for `balance`.
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
        >>> from jaxinv.gauges import path_condition
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
    if not p > 0:
        raise InvalidInput(f"p must be positive, not {p}.")
    leaves = checked_leaves(group, params, "params")
    logs = [jnp.asarray(k) for k in checked_leaves(group, log_kappa, "log_kappa")]
    tol = _tolerance(tol, leaves)
    dtype = _scaled.working_dtype([*leaves, *logs])
    weights = _Weights([k.astype(dtype) for k in logs])
    counted = [jnp.where(k > -jnp.inf, 1, 0).astype(dtype) for k in weights.logs]
    linear = _onto(group, _class_sums(group, counted))
    problem = _Problem(group, weights, _total(counted), linear, _most_terms(group))
    v, value, steps, error = _minimize(problem, tol)
    u = -v / p
    return Gauge(rescale(group, params, u), u, value, steps, error, error <= tol)


def normalize(
    group: RescalingGroup, params: Params, norm: float = 2.0, *, tol: float | None = None
) -> Gauge:
    """The member of the orbit in which every hidden unit's incoming weights have norm one.

    Σ_{e into j} |w_e|^p = 1 for all generators j. The incoming weights of a generator are the
    parameters that it multiplies: a unit's column of the kernel *and its bias* (so that the unit is
    a hyperplane of unit normal in homogeneous coordinates), all kernels that write to a channel of
    a residual stream taken together, and the queries of a query-key pair.

    Args:
        group, params: as for `balance`.
        norm: the exponent p > 0.
        tol: largest |Σ − 1| of a unit to stop at.

    Returns:
        A `Gauge`. Feed-forward networks take as many steps as layers; where incoming weights depend
        on their own unit's scale (recurrence) the condition may have no solution, and `converged`
        is then false. Units whose incoming weights are all 0 stay where they are.

    Raises:
        InvalidInput: if params do not fit the group, or for a norm that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.gauges import normalize
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0, 0.5], [4.0, 0.0]])},
        ...      "Dense_1": {"kernel": jnp.array([[1.0], [2.0]])}}
        >>> gauge = normalize(rescaling_group(networks.mlp, w, jnp.zeros((1, 2))), w)
        >>> print(gauge.params["Dense_1"]["kernel"].T)
        [[5. 1.]]
    """
    if not norm > 0:
        raise InvalidInput(f"norm must be positive, not {norm}.")
    leaves = checked_leaves(group, params, "params")
    tol = _tolerance(tol, leaves)
    v, steps, error = _unit_norms(group, _logs(leaves, norm), tol)
    u = v / norm
    return Gauge(rescale(group, params, u), u, error, steps, error, error <= tol)


@jax.jit
def _unit_norms(group: RescalingGroup, weights: _Weights, tol: Any) -> tuple[Array, Array, Array]:
    """v with Σ_{e into j} a_e exp((Bv)_e) = 1 for all j, by substitution layer after layer."""

    def incoming(v: Array) -> Array:
        sums = _onto(group, _class_sums(group, weights.at(group, v, 0.0)), sign=1)
        return jnp.where(sums > 0, sums, 1)

    def step(state: tuple) -> tuple:
        v, sums, steps = state
        v = v - jnp.log(sums)
        return v, incoming(v), steps + 1

    def unfinished(state: tuple) -> Array:
        _, sums, steps = state
        return (_deviation(sums) > tol) & (steps < _MOST_SWEEPS + len(weights.logs))

    v = jnp.zeros(group.dim, weights.logs[0].dtype)
    v, sums, steps = lax.while_loop(unfinished, step, (v, incoming(v), jnp.zeros((), jnp.int32)))
    return v, steps, _deviation(sums)


def _deviation(sums: Array) -> Array:
    return jnp.max(abs(sums - 1), initial=0.0)


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
        >>> from jaxinv.gauges import distance_mod_rescaling
        >>> from jaxinv.rescaling import rescaling_group
        >>> one, two = [np.full((1, 1), 8.0), np.full((1, 1), 2.0)], [np.ones((1, 1))] * 2
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], one, np.ones((1, 1)))
        >>> f"{distance_mod_rescaling(group, one, two):.4f}"  # between (4, 4) and (1, 1)
        '4.2426'
    """
    near, far = (balance(group, w).params for w in (a, b))
    squares = [
        jnp.sum((x - y) ** 2)
        for x, y in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True)
    ]
    return jnp.sqrt(sum(squares[1:], squares[0]))
