"""Boundary points: inputs at which one gate's pre-activation is 0, found along segments.

All gates of a layer are evaluated at a few places of every segment at once. Between two of
different sign there is a root, which the Illinois method brackets (a secant that cannot stall); for
a network of ReLUs it is exact once no other gate changes inside of the bracket.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv.gates.blocks import Block, pre_activations, slices_of
from jaxinv.gates.reading import at
from jaxinv.typing import Array, Inputs, Params

# Places on a segment at which signs are compared.
PLACES = 7
# Bisection alone would take 52 steps; the secant a handful.
_MOST_STEPS = 60
# Roundings of its size that z may be left with: rows are off by as much, and it is accounted for.
_CLOSE = 128
# Numbers that the evaluation of one chunk of inputs may take.
_MOST_NUMBERS = 1 << 23


class Segments(NamedTuple):
    """Two ends each; pytrees with a leading axis of the segments."""

    start: Inputs
    end: Inputs


def between(segment: Segments, t: Array) -> Inputs:
    """A point of one segment."""
    return jax.tree.map(lambda a, b: a + t.astype(a.dtype) * (b - a), *segment)


def taken(segments: Segments, index: Array) -> Segments:
    """Some of the segments."""
    return jax.tree.map(lambda a: a[index], segments)


class Crossings(NamedTuple):
    """Where a unit's gate changes its sign, for each of some units: (units, count) arrays."""

    segment: np.ndarray  # int: which
    place: np.ndarray  # int: between this place and the next
    position: np.ndarray  # int: of the unit's gates
    found: np.ndarray  # bool: False for those that are only there to fill the array
    always: np.ndarray  # (units,): 1: z > 0 all along, −1: z < 0 all along, 0: it changes sign


@partial(jax.jit, static_argnames=("network", "block", "chunk"))
def signs(
    network: TracedNetwork, block: Block, params: Params, segments: Segments, chunk: int
) -> Array:
    """Is z > 0? (segments, places, units, positions)."""
    t = jnp.linspace(0.0, 1.0, PLACES)
    axis = 0 if block.axis is None else block.axis

    def one(segment: Segments) -> Array:
        def at_place(t: Array) -> Array:
            assert block.layer is not None
            z = at(network, params, between(segment, t)).z[block.layer]
            z = jnp.moveaxis(z, axis, 0) if block.axis is not None else z
            return z.reshape(block.units, block.positions) > 0

        return jax.vmap(at_place)(t)

    return lax.map(one, segments, batch_size=max(1, chunk // PLACES))


def chosen(above: np.ndarray, wanted: int, rng: np.random.Generator) -> Crossings:
    """Crossings of every unit, spread over segments and positions, at most `wanted` of each."""
    changes = above[:, 1:] != above[:, :-1]
    units = changes.shape[2]
    picked = np.zeros((3, units, wanted), np.int64)
    found = np.zeros((units, wanted), bool)
    segment, place, unit, position = np.nonzero(changes)
    order = rng.permutation(len(unit))
    order = order[np.argsort(unit[order], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(unit[order], unit[order])
    keep = rank < wanted
    order, rank = order[keep], rank[keep]
    for row, values in zip(picked, (segment, place, position), strict=True):
        row[unit[order], rank] = values[order]
    found[unit[order], rank] = True
    positive = above.any(axis=(0, 1, 3))
    always = np.where(changes.any(axis=(0, 1, 3)), 0, np.where(positive, 1, -1))
    return Crossings(picked[0], picked[1], picked[2], found, always)


# --- for one unit -----------------------------------------------------------------------

_NEWTON_STEPS = 12
# A step beyond where a linear z is 0, so that the sign changes.
_OVERSHOOT = 1.5


def aimed(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    starts: Inputs,
    bounds: tuple[Inputs, Inputs] | None,
) -> tuple[Segments, tuple[Array, Array, Array, Array]]:
    """Segments along which a unit's z changes its sign: from inputs, by Newton steps in them.

    With `bounds` the ends stay in a box. Returns the segments and their crossings, as the arrays
    of `Crossings` for one unit.
    """
    slices = slices_of(block, params, unit)
    count = jnp.shape(jax.tree.leaves(starts)[0])[0]
    positions = lax.iota(jnp.int32, count) % block.positions

    def z_of(example: Inputs, position: Array) -> Array:
        return pre_activations(network, block, params, unit, slices, example)[position]

    def one(given: tuple[Inputs, Array]) -> tuple[Inputs, Array, Array]:
        start, position = given
        first = z_of(start, position)

        def step(here: Inputs, _: None) -> tuple[Inputs, None]:
            z, slope = jax.value_and_grad(z_of)(here, position)
            square = sum(jnp.sum(g * g) for g in jax.tree.leaves(slope))
            size = jnp.where((z * first > 0) & (square > 0), _OVERSHOOT * z, 0)
            size = size / jnp.where(square > 0, square, 1)
            moved = jax.tree.map(lambda a, g: a - size * g, here, slope)
            if bounds is not None:
                moved = jax.tree.map(jnp.clip, moved, *bounds)
            return moved, None

        end, _ = lax.scan(step, start, None, _NEWTON_STEPS)
        t = jnp.linspace(0.0, 1.0, PLACES)
        above = jax.vmap(lambda t: z_of(between(Segments(start, end), t), position))(t) > 0
        changes = above[1:] != above[:-1]
        return end, jnp.argmax(changes).astype(jnp.int32), changes.any()

    numbers = sum(int(np.prod(s)) for _, _, s in block.atoms) + block.positions
    ends, place, found = lax.map(one, (starts, positions), batch_size=chunk_of(16 * numbers))
    index = lax.iota(jnp.int32, count)
    return Segments(starts, ends), (index, place, positions, found)


class Root(NamedTuple):
    """The best point of a bracket."""

    t: Array
    z: Array
    size: Array  # of z at the ends of the bracket


# step; the ends, and z there; the best place, and z there; which end moved last
_State = tuple[Array, Array, Array, Array, Array, Array, Array, Array]


def root_of(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    segment: Segments,
    place: Array,
    position: Array,
) -> Root:
    """Where z is 0 between two places of a segment."""
    slices = slices_of(block, params, unit)

    def z_at(t: Array) -> Array:
        example = between(segment, t)
        return pre_activations(network, block, params, unit, slices, example)[position]

    step = 1.0 / (PLACES - 1)
    a = place.astype(jnp.result_type(float)) * step
    b = a + step
    fa, fb = z_at(a), z_at(b)
    size = jnp.maximum(abs(fa), abs(fb))
    eps = float(jnp.finfo(fa.dtype).eps)

    def open_(state: _State) -> Array:
        k, a, b, fa, fb, t, f, side = state
        return (k < _MOST_STEPS) & (abs(f) > _CLOSE * eps * size) & (abs(b - a) > 4 * eps)

    def step_(state: _State) -> _State:
        k, a, b, fa, fb, t, f, side = state
        slope = fb - fa
        secant = b - fb * (b - a) / jnp.where(slope == 0, 1, slope)
        low, high = jnp.minimum(a, b), jnp.maximum(a, b)
        inside = (secant > low) & (secant < high) & (k % 4 != 3)
        new = jnp.where(inside, secant, 0.5 * (a + b))
        fn = z_at(new)
        opposite = fn * fb < 0
        # Illinois: an end that stays twice counts half.
        a2, fa2 = (
            jnp.where(opposite, b, a),
            jnp.where(opposite, fb, jnp.where(side == 1, fa / 2, fa)),
        )
        better = abs(fn) < abs(f)
        return (
            k + 1, a2, new, fa2, fn, jnp.where(better, new, t), jnp.where(better, fn, f),
            (~opposite).astype(jnp.int32),
        )  # fmt: skip

    t0, f0 = jnp.where(abs(fa) < abs(fb), a, b), jnp.where(abs(fa) < abs(fb), fa, fb)
    start = (jnp.zeros((), jnp.int32), a, b, fa, fb, t0, f0, jnp.zeros((), jnp.int32))
    _, _, _, _, _, t, f, _ = lax.while_loop(open_, step_, start)
    return Root(t, f, size)


def chunk_of(numbers: int) -> int:
    """How many inputs at a time, each with that many numbers in its evaluation."""
    return max(1, _MOST_NUMBERS // max(numbers, 1))
