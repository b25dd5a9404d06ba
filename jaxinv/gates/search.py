"""The ranks of the blocks of a layer: common segments first, then points for units that lack some.

A unit that is nearly always on (or off) changes its sign on few segments. For such units segments
are aimed: from inputs towards z = 0 by Newton steps in the input, then from the neighbourhood of
the boundary points already found. Inputs beyond such boundaries are kept in a *pool*: where a
rare unit is on, later layers see activations that no random input shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.program import find_equation
from jaxinv.gates.blocks import Block
from jaxinv.gates.points import Crossings, Segments, between, chosen, chunk_of, signs, taken
from jaxinv.gates.proof import Found, aimed_ranks, boundary_ranks, largest_array, output_ranks
from jaxinv.gates.regions import Region, draw, example_of
from jaxinv.typing import Array, Inputs, Params

# Boundary points for each parameter of a unit, and on top of that.
_POINTS_PER_COLUMN, _MORE_POINTS = 1.1, 16
# Draws of common segments, and of aimed ones for each unit that lacks points.
_DRAWS, _ROUNDS = 3, 3
# Units in one compiled call, and inputs that a rare unit leaves to the pool.
_GROUP, _KEPT = 16, 4
_CONVOLVED = 16
_NOISE_DECADES = (-2.0, 0.3)
# Matrices of a block's size held at once: rows, their errors, derivatives, products.
_COPIES = 8

Progress = Callable[[float, str], None]


class Search(NamedTuple):
    """What the search for points of a layer is given."""

    network: TracedNetwork
    params: Params
    region: Region
    seed: np.ndarray
    numbers: int  # in one evaluation of the network
    max_bytes: float
    mesh: jax.sharding.Mesh | None


class Layer(NamedTuple):
    """What became of the units of a layer."""

    found: Found  # (units,) each
    always: np.ndarray  # 1: on at all places looked at, −1: off, 0: its sign changes
    pool: Inputs | None  # inputs beyond boundaries that are rarely crossed


def too_large(search: Search, block: Block) -> bool:
    """Whether the rows of one unit would take more memory than allowed."""
    return 8 * _COPIES * wanted(block) * block.columns > search.max_bytes


def wanted(block: Block) -> int:
    """How many points to look for."""
    return int(block.columns * _POINTS_PER_COLUMN) + _MORE_POINTS


def _key(search: Search, block: Block, stage: int) -> Array:
    key = jax.random.wrap_key_data(jnp.asarray(search.seed))
    layer = -1 if block.layer is None else block.layer
    return jax.random.fold_in(jax.random.fold_in(key, layer + 1), stage)


def _chunk(search: Search, block: Block) -> int:
    largest = largest_array(search.network, block, search.params, example_of(search.region))
    chunk = chunk_of(4 * max(largest, search.numbers + block.columns))
    # A gradient in a kernel, for each input, is a convolution with as many groups as inputs, which
    # XLA for CPUs may expand to the square of that.
    convolves = find_equation(search.network.program.trace.jaxpr, "conv_general_dilated")
    return min(chunk, _CONVOLVED) if convolves else chunk


def taken_inputs(inputs: Inputs, index: Array) -> Inputs:
    """Some of the inputs."""
    return jax.tree.map(lambda a: a[index], inputs)


def joined(*parts: Inputs) -> Inputs:
    """One after another."""
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def count_of(inputs: Inputs) -> int:
    """How many inputs."""
    return int(jnp.shape(jax.tree.leaves(inputs)[0])[0])


def of_outputs(
    search: Search, block: Block, pool: Inputs | None, number: int | None = None
) -> Layer:
    """The parameters that only the outputs see: any inputs will do."""
    key, number = _key(search, block, 0), number or wanted(block)
    ends = draw(search.region, key, number)
    t = jax.random.uniform(key, (number,))
    inputs = jax.vmap(between)(Segments(*ends), t)
    inputs = inputs if pool is None else joined(inputs, pool)
    units = jnp.arange(block.units, dtype=jnp.int32)
    found = output_ranks(search.network, block, search.params, units, inputs, _chunk(search, block))
    return Layer(found, np.zeros(block.units, int), None)


def of_gates(search: Search, block: Block, pool: Inputs | None) -> Layer | None:
    """The parameters that a layer of gates is the first to see; None if it has no boundary."""
    segments, crossings = _common(search, block, pool)
    if not crossings.found.any() and block.positions * block.units > 1 << 16:
        return None
    chunk, parts, group = _chunk(search, block), [], _shared(_GROUP, search)
    for first in range(0, block.units, group):
        # The last group is filled up, so that one program serves all.
        units = np.minimum(np.arange(first, first + group), block.units - 1)
        parts.append(
            boundary_ranks(
                search.network,
                block,
                search.params,
                jnp.asarray(units, jnp.int32),
                segments,
                _arrays(crossings, units),
                chunk,
                search.mesh,
            )
        )
    found = jax.tree.map(lambda *a: np.concatenate(a)[: block.units], *parts)
    found, pool = _aimed(search, block, segments, crossings, found, pool, chunk)
    if not found.points.any():
        return None
    return Layer(found, crossings.always, pool)


def _shared(group: int, search: Search) -> int:
    """A number of units that the devices share evenly."""
    devices = 1 if search.mesh is None else search.mesh.size
    return -(-group // devices) * devices


def _arrays(crossings: Crossings, units: np.ndarray) -> tuple[Array, Array, Array, Array]:
    kinds = (jnp.int32, jnp.int32, jnp.int32, bool)
    segment, place, position, found = (
        jnp.asarray(a[units], kind) for a, kind in zip(crossings[:4], kinds, strict=True)
    )
    return segment, place, position, found


def _common(search: Search, block: Block, pool: Inputs | None) -> tuple[Segments, Crossings]:
    """Segments for all units at once. About half of them cross a unit's boundary somewhere."""
    rng = np.random.default_rng(search.seed)
    number = wanted(block)
    count = max(16, -(-2 * number // block.positions))
    chunk = chunk_of(search.numbers)
    parts, above = [], []
    for attempt in range(_DRAWS):
        start, end = draw(search.region, _key(search, block, attempt), count)
        if pool is not None and attempt == 0:
            some = jnp.arange(min(count_of(pool), count))
            extra = draw(search.region, _key(search, block, _DRAWS), len(some))[1]
            start = joined(start, taken_inputs(pool, some))
            end = joined(end, extra)
        parts.append(Segments(start, end))
        above.append(np.asarray(signs(search.network, block, search.params, parts[-1], chunk)))
        crossings = chosen(np.concatenate(above), number, rng)
        if (crossings.found.sum(1) >= number).all():
            break
    return joined(*parts), crossings


def _aimed(
    search: Search,
    block: Block,
    segments: Segments,
    crossings: Crossings,
    found: Found,
    pool: Inputs | None,
    chunk: int,
) -> tuple[Found, Inputs | None]:
    """More points for the units that lack some, and what they add to the pool."""
    if search.region.kind not in ("everywhere", "box"):
        return found, pool
    bounds = None
    if search.region.kind == "box":
        bounds = (example_of(search.region), jax.tree.map(lambda a: a[0], search.region.high))
    left = np.flatnonzero(found.rank < block.columns - found.homogeneous)
    # Few shapes, since each is compiled: groups of one size, the last one filled up.
    group = _shared(1 if len(left) == 1 else 4 if len(left) <= 4 else _GROUP, search)
    for first in range(0, len(left), group):
        units = np.resize(left[first : first + group], group)
        own = _arrays(crossings, units)
        ends = jax.vmap(taken, (None, 0))(segments, own[0])
        own = _renumbered(own)
        for attempt in range(_ROUNDS):
            better, ends, own = aimed_ranks(
                search.network,
                block,
                search.params,
                jnp.asarray(units, jnp.int32),
                ends,
                own,
                _starts(search, block, ends, own[3], pool, attempt),
                bounds,
                chunk,
                search.mesh,
            )
            if not _lacking(better, block).any():
                break
        found = _replaced(found, units, better)
        pool = _pooled(pool, ends, own[3])
    return found, pool


def _lacking(found: Found, block: Block) -> np.ndarray:
    return np.asarray(found.rank) < block.columns - np.asarray(found.homogeneous)


def _renumbered(own: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    index = jnp.broadcast_to(jnp.arange(own[0].shape[1], dtype=jnp.int32), own[0].shape)
    return (index, *own[1:])


def _replaced(found: Found, units: np.ndarray, better: Found) -> Found:
    def put(into: np.ndarray, values: Array) -> np.ndarray:
        changed = np.array(into)
        changed[units] = np.asarray(values)
        return changed

    return jax.tree.map(put, found, better)


def _starts(
    search: Search,
    block: Block,
    ends: Segments,
    found: Array,
    pool: Inputs | None,
    attempt: int,
) -> Inputs:
    """Where to aim from, for each unit: fresh inputs, later the neighbours of its own crossings."""
    units, number = found.shape[0], wanted(block)
    key = _key(search, block, 64 + attempt)
    fresh, _ = draw(search.region, key, units * number)
    shaped = jax.tree.map(lambda a: a.reshape(units, number, *a.shape[1:]), fresh)
    if attempt == 0:
        if pool is None:
            return shaped
        which = jax.random.randint(key, (units, number), 0, count_of(pool))
        half = jnp.arange(number) % 2 == 0
        return jax.tree.map(
            lambda a, p: jnp.where(half.reshape(-1, *[1] * (a.ndim - 2)), a, p[which]), shaped, pool
        )
    share = found.astype(jnp.float64)
    weights = share / jnp.maximum(share.sum(1, keepdims=True), 1)
    # Units without any crossing take what comes: there is nothing to start from.
    weights = jnp.where(found.any(1, keepdims=True), weights, 1 / found.shape[1])
    keys = jax.random.split(key, units)
    which = jax.vmap(lambda k, w: jax.random.choice(k, w.size, (number,), p=w))(keys, weights)
    power = jax.random.uniform(key, (units, number), jnp.float64, *_NOISE_DECADES)

    def near(end: Array, noise: Array) -> Array:
        known = jax.vmap(lambda a, i: a[i])(end, which)
        wide = (units, number, *[1] * (known.ndim - 2))
        axes = tuple(range(2, known.ndim))
        size = jnp.sqrt(jnp.mean(known**2, axis=axes)) * 10**power
        own = noise / jnp.sqrt(jnp.mean(noise**2, axis=axes, keepdims=True))
        return known + size.reshape(wide) * own

    noise, _ = draw(search.region, jax.random.fold_in(key, 1), units * number)
    noise = jax.tree.map(lambda a: a.reshape(units, number, *a.shape[1:]), noise)
    moved = jax.tree.map(near, ends.end, noise)
    if search.region.kind == "box":
        moved = jax.tree.map(
            lambda a, lo, hi: jnp.clip(a, lo[0], hi[0]),
            moved,
            search.region.low,
            search.region.high,
        )
    return moved


def _pooled(pool: Inputs | None, ends: Segments, found: Array) -> Inputs | None:
    """A few inputs from both sides of every boundary that is rarely crossed."""
    units, columns = np.nonzero(np.asarray(found))
    first = np.searchsorted(units, units)
    keep = np.arange(len(units)) - first < _KEPT
    if not keep.any():
        return pool
    at = (units[keep], columns[keep])
    some = joined(*(jax.tree.map(lambda a: a[at], side) for side in ends))
    return some if pool is None else joined(pool, some)
