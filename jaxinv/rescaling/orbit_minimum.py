"""Minima over an orbit of P·log Σ_e a_e exp((Bu)_e) − c·u: a convex function of u.

Majorisation from afar, all units at once and never uphill, then Newton's method with conjugate
gradients. Sums are kept by their logarithms, so that no distance from the minimum overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._numerics import scaled
from jaxinv._numerics.compiling import compiled
from jaxinv._numerics.varying import vary_alike, varying_like
from jaxinv.rescaling.action import log_add, transpose
from jaxinv.rescaling.group import RescalingGroup, class_scales
from jaxinv.typing import Array

# Majorisation is cheap and safe far from the optimum; Newton finishes. The switch is at this
# relative imbalance of a unit, or after so many sweeps.
_NEWTON_BELOW = 0.1
_MOST_SWEEPS = 60
_MOST_NEWTON_STEPS = 60
_MOST_CG_STEPS = 200
_MOST_HALVINGS = 30


# --- sums over the weights of a unit --------------------------------------------------


class Weights(NamedTuple):
    """Positive numbers per parameter, by their logarithms: a_e exp((Bu)_e) without overflow."""

    logs: list[Array]

    @classmethod
    def powers(cls, leaves: Sequence[Array], p: float) -> Weights:
        """|w_e|^p."""
        dtype = scaled.working_dtype(leaves)
        return cls([p * jnp.log(abs(leaf.astype(dtype))) for leaf in leaves])

    def moved(self, group: RescalingGroup, u: Array) -> list[Array]:
        """log a_e + (Bu)_e."""
        s = class_scales(group, u)
        return [
            sum((s[ids] for ids in terms), a)
            for a, terms in zip(self.logs, group.indices, strict=True)
        ]


def total(leaves: Sequence[Array]) -> Array:
    return sum((jnp.sum(leaf) for leaf in leaves[1:]), jnp.sum(leaves[0]))


# --- minimising P·log Σ_e a_e exp((Bu)_e) − c·u ----------------------------------------


class _Point(NamedTuple):
    u: Array
    log_sum: Array  # log Σ_e a_e exp((Bu)_e)
    shares: list[Array]  # π_e = a_e exp((Bu)_e) / Σ


class Problem(NamedTuple):
    group: RescalingGroup
    weights: Weights
    multiplier: float | Array  # P
    linear: Array  # c
    terms: float | Array  # number of classes that meet in one parameter, at most

    def start(self, u: Array) -> _Point:
        top = jnp.stack([jnp.max(a) for a in self.weights.logs]).max()
        return self.point(u, top)[0]

    def point(self, u: Array, shift: Array) -> tuple[_Point, Array]:
        """The point u and its value; `shift` is about the logarithm of the sum."""
        shift = jnp.where(shift > -jnp.inf, shift, 0)  # -inf: all weights are 0
        parts = [jnp.exp(a - shift) for a in self.weights.moved(self.group, u)]
        mass = total(parts)
        log_sum = shift + jnp.log(mass)
        shares = [part / jnp.where(mass > 0, mass, 1) for part in parts]
        return _Point(u, log_sum, shares), self.value(u, log_sum)

    def value(self, u: Array, log_sum: Array) -> Array:
        """P·log Σ_e a_e exp((Bu)_e) − c·u; of no weights at all the sum does not count."""
        counted = jnp.where(jnp.asarray(self.multiplier) > 0, self.multiplier * log_sum, 0)
        return counted - jnp.vdot(self.linear, u)

    def forces(self, point: _Point) -> tuple[Array, Array]:
        """log P·Σ_e |B_ej| π_e over the parameters that generator j multiplies, and divides.

        A unit's own share of the sum may be below the range of floats: hence logarithms.
        """
        group, logs = self.group, self.weights.moved(self.group, point.u)
        of_class = jnp.full(group.structure.num_classes, -jnp.inf, logs[0].dtype)
        pairs = zip(logs, group.indices, strict=True)
        of_class = log_add(of_class, [(ids, a) for a, terms in pairs for ids in terms])
        nothing = jnp.full(2 * group.dim, -jnp.inf, of_class.dtype)
        c = jnp.asarray(group.coefficients).astype(of_class.dtype)
        empty = ~(point.log_sum > -jnp.inf)
        scale = jnp.where(empty, 0, jnp.log(self.multiplier) - point.log_sum)
        parts = [jnp.log(jnp.maximum(b, 0)) + of_class[group.rows] for b in (c, -c)]
        columns = jnp.concatenate([group.columns, group.dim + group.columns])
        up, down = jnp.split(log_add(nothing, [(columns, jnp.concatenate(parts))]), 2)
        return up + scale, down + scale

    def curvature(self, point: _Point, v: Array) -> Array:
        """P·(BᵀΠB − (Bᵀπ)(Bᵀπ)ᵀ) v."""
        s = class_scales(self.group, v)
        moved = []
        for share, terms in zip(point.shares, self.group.indices, strict=True):
            moved.append(share * sum((s[ids] for ids in terms), jnp.zeros((), share.dtype)))
        mean = transpose(self.group, point.shares)
        product = transpose(self.group, moved)
        return self.multiplier * (product - mean * jnp.vdot(mean, v))


def least_norm(
    group: RescalingGroup, leaves: Sequence[Array], p: float, rtol: float
) -> tuple[Array, Array, Array, Array]:
    """(p·u, log Σ_e |w_e|^p, steps, error) of the member of the orbit with the smallest p-norm."""
    weights = Weights.powers(leaves, p)
    zero = jnp.zeros(group.dim, weights.logs[0].dtype)
    return minimize(Problem(group, weights, 1.0, zero, most_terms(group)), rtol)


def minimize(problem: Problem, rtol: float | Array) -> tuple[Array, Array, Array, Array]:
    """(u, value, steps, error): majorisation from afar, then Newton with conjugate gradients."""
    group, weights = _stacked(problem.group, problem.weights)
    return _minimize(problem._replace(group=group, weights=weights), rtol)


def _stacked(group: RescalingGroup, weights: Weights) -> tuple[RescalingGroup, Weights]:
    """Leaves of one shape, scaled along the same axes, as one leaf with an axis in front.

    A program with a few operations for every leaf takes minutes to compile for hundreds of layers.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, (log, terms) in enumerate(zip(weights.logs, group.indices, strict=True)):
        alike.setdefault((jnp.shape(log), *(jnp.shape(ids) for ids in terms)), []).append(i)
    if len(alike) == len(weights.logs):
        return group, weights
    indices = tuple(
        tuple(
            (jnp.stack if any(isinstance(a, jax.Array) for a in term) else np.stack)(term)
            for term in zip(*(group.indices[i] for i in members), strict=True)
        )
        for members in alike.values()
    )
    logs = [jnp.stack([weights.logs[i] for i in members]) for members in alike.values()]
    return group._replace(indices=indices), Weights(logs)


class _State(NamedTuple):
    """Where the search is. Forces go round the loops with their point: else the program is twice
    as large, and compiles twice as long."""

    point: _Point
    forces: tuple[Array, Array]
    steps: Array
    error: Array
    stuck: Array


@compiled  # else every call would compile its loops anew
def _minimize(problem: Problem, rtol: float | Array) -> tuple[Array, Array, Array, Array]:
    problem = vary_alike(problem)[0]
    zero, count = varying_like(
        (jnp.zeros(problem.group.dim, problem.weights.logs[0].dtype), jnp.zeros((), jnp.int32)),
        problem,
    )
    point = problem.start(zero)
    forces = problem.forces(point)
    search = _Search(problem, _active(forces, problem.linear))
    start = _State(point, forces, count, search.error(*forces), count > 0)

    def far(state: _State) -> Array:
        return (state.error > _NEWTON_BELOW) & (state.steps < _MOST_SWEEPS)

    near = lax.while_loop(far, search.sweep, start)

    def unfinished(state: _State) -> Array:
        steps_left = state.steps < near.steps + _MOST_NEWTON_STEPS
        return (state.error > rtol) & ~state.stuck & steps_left

    point, _, steps, error, _ = lax.while_loop(unfinished, search.newton, near)
    return point.u, problem.value(point.u, point.log_sum), steps, error


def _active(forces: tuple[Array, Array], c: Array) -> Array:
    """Which generators move.

    One whose sum has no minimum along it (a unit without incoming or without outgoing weights)
    stays where it is.
    """
    up, down = forces
    return ((up > -jnp.inf) | (c < 0)) & ((down > -jnp.inf) | (c > 0))


class _Search(NamedTuple):
    """The two kinds of steps, and how far from the minimum a point is."""

    problem: Problem
    active: Array

    def error(self, log_up: Array, log_down: Array) -> Array:
        """|up − down − c| / (up + down + |c|), the largest over generators."""
        c = self.problem.linear
        top = jnp.maximum(jnp.maximum(log_up, log_down), jnp.log(abs(c)))
        top = jnp.where(self.active, top, 0)
        up, down, c = jnp.exp(log_up - top), jnp.exp(log_down - top), c * jnp.exp(-top)
        size = jnp.where(self.active, up + down + abs(c), 1)
        return jnp.max(jnp.where(self.active, abs(up - down - c) / size, 0), initial=0.0)

    def sweep(self, state: _State) -> _State:
        """Every unit at its minimum of an upper bound that separates the units.

        exp(Σ_j B_j δ_j) <= Σ_j (|B_j|/s) exp(s·sign(B_j)·δ_j) + 1 − Σ_j|B_j|/s for Σ|B_j| <= s, so
        up·exp(sδ) − down·exp(−sδ) = c: no step size, and never uphill.
        """
        delta = _balancing(*state.forces, self.problem.linear)
        delta = jnp.where(self.active, delta, 0) / self.problem.terms
        point, _ = self.problem.point(state.point.u + delta, state.point.log_sum)
        forces = self.problem.forces(point)
        return _State(point, forces, state.steps + 1, self.error(*forces), state.stuck)

    def newton(self, state: _State) -> _State:
        """A step of Newton's method, if one is found that does good."""
        gradient, direction = self.direction(state)
        value = self.problem.value(state.point.u, state.point.log_sum)
        slope = jnp.vdot(gradient, direction)
        after, new = self.downhill(state.point, value, direction, slope)
        forces = self.problem.forces(after)
        error = self.error(*forces)
        better = jnp.isfinite(new) & ((error < state.error) | (new < value))
        point, forces, error = jax.tree.map(
            lambda a, b: jnp.where(better, a, b),
            (after, forces, error),
            (state.point, state.forces, state.error),
        )
        return _State(point, forces, state.steps + 1, error, ~better)

    def direction(self, state: _State) -> tuple[Array, Array]:
        """The gradient, and the direction that Newton's method takes, about."""
        up, down = map(jnp.exp, state.forces)
        gradient = jnp.where(self.active, up - down - self.problem.linear, 0)
        return gradient, _conjugate_gradients(
            lambda v: jnp.where(self.active, self.problem.curvature(state.point, v), 0),
            -gradient,
            jnp.where(self.active & (up + down > 0), up + down, 1),
            jnp.minimum(state.error, 0.1),
        )

    def downhill(
        self, point: _Point, value: Array, direction: Array, slope: Array
    ) -> tuple[_Point, Array]:
        """The first of the steps 1, ½, ¼, … that lowers the value enough, and its value."""

        def uphill(state: tuple) -> Array:
            size, _, new = state
            # Rounding of the value hides decreases this small; the gradient decides those.
            blur = 4 * jnp.finfo(value.dtype).eps * abs(value)
            return ~(new <= value + 1e-4 * size * slope + blur) & (size > 0.5**_MOST_HALVINGS)

        def halve(state: tuple) -> tuple:
            size = state[0] / 2
            return (size, *self.problem.point(point.u + size * direction, point.log_sum))

        # From a step of 2 that has no value, so that the first one tried is 1.
        size, none = jnp.full((), 2, value.dtype), jnp.full((), jnp.nan, value.dtype)
        first = (varying_like(size, value), point, varying_like(none, value))
        _, after, new = lax.while_loop(uphill, halve, first)
        return after, new


def _balancing(log_up: Array, log_down: Array, c: Array) -> Array:
    """x with up·exp(x) − down·exp(−x) = c.

    With z = exp(x)·√(up/down) it reads √(up·down)·(z − 1/z) = c. As forces may differ by more than
    floats hold, all of it is solved in logarithms.
    """
    middle, half = (log_up + log_down) / 2, (log_down - log_up) / 2
    both = (log_up > -jnp.inf) & (log_down > -jnp.inf)
    log_c = jnp.log(abs(c))
    far = log_c - jnp.where(both, middle, 0)
    turn = jnp.where(far > 30, far, jnp.arcsinh(jnp.exp(jnp.minimum(far, 30)) / 2))
    alone = jnp.where(c > 0, log_c - log_up, log_down - log_c)
    return jnp.where(both, half + jnp.sign(c) * turn, alone)


def _conjugate_gradients(
    product: Callable[[Array], Array], b: Array, diagonal: Array, rtol: Array
) -> Array:
    """Approximate solution of H x = b, to ‖r‖ <= rtol·‖b‖ in the norm of 1/diagonal."""
    target = rtol**2 * jnp.vdot(b, b / diagonal)

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
    state = vary_alike(*state)
    return lax.while_loop(unfinished, step, state)[0]


def most_terms(group: RescalingGroup) -> int:
    """Σ_j |B_ej| of a parameter, at most."""
    largest = np.zeros(group.structure.num_classes)
    np.add.at(largest, np.asarray(group.rows), np.abs(np.asarray(group.coefficients)))
    sums = [sum(float(largest[np.asarray(ids)].max()) for ids in t) for t in group.indices if t]
    return int(max(sums, default=1))
