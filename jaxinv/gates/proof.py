"""The rank of one block, proven: singular values beyond all that its rows may be wrong by.

A point is not exactly on the boundary. With z what it misses, ρ the rounding of z, and v the
direction of the segment, the boundary is (|z| + ρ)/|dz/dv| away, and a row changes by that times
its own derivative along v. To this comes the rounding of the row. A block counts what lies firmly
beyond the sum of these (`_numerics.tolerances`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.program import dependent_equations
from jaxinv._interpreter.rounding import with_rounding
from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.lapack import cholesky, singular_values, triangle
from jaxinv.errors import UnsupportedOperation
from jaxinv.gates.blocks import Block, element, flat, pre_activations, slices_of
from jaxinv.gates.points import Segments, aimed, between, root_of, taken
from jaxinv.gates.reading import At, at
from jaxinv.typing import Array, Inputs, Params, PyTree

_EXACT = lax.Precision.HIGHEST
# Another gate counts as away from 0 beyond this share of its layer's largest pre-activation (and
# of what rounding may move it by), and the derivative of the output by a gate beyond this share of
# the largest of the block's points, and of ‖y‖ over the largest pre-activation.
MARGIN = 1e-9


Crossed = tuple[Array, Array, Array, Array]  # segment, place, position, found


class Rows(NamedTuple):
    """Rows of a block and how far off they may be; (points, columns)."""

    rows: Array
    error: Array
    good: Array  # (points,): the point is on the boundary of this gate alone, and it matters
    crossed: Array  # (points,): z was brought to 0 there
    alone: Array  # (points,): no other gate is near 0


def _row(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    position: Array,
    example: Inputs,
) -> tuple[Array, Array]:
    """(z, ∂z/∂(the unit's parameters))."""

    def z_of(slices: list[Array]) -> Array:
        return pre_activations(network, block, params, unit, slices, example)[position]

    z, row = jax.value_and_grad(z_of)(slices_of(block, params, unit))
    return z, flat(row)


def _rounded_row(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    position: Array,
    example: Inputs,
) -> tuple[Array, Array]:
    """(z, row) in one array, and a bound on the rounding of each."""

    def both(params: Params, unit: Array, position: Array, example: Inputs) -> Array:
        z, row = _row(network, block, params, unit, position, example)
        return jnp.concatenate([z[None], row])

    try:
        return with_rounding(both, params, unit, position, example)
    except UnsupportedOperation:
        values = both(params, unit, position, example)
        nearby = both(nudged(params), unit, position, nudged(example))
        return values, 2 * abs(values - nearby)


def largest_array(network: TracedNetwork, block: Block, params: Params, example: Inputs) -> int:
    """Numbers in the largest array that a row takes for each input."""

    def row(params: Params, unit: Array, position: Array, example: Inputs) -> tuple[Array, Array]:
        return _rounded_row(network, block, params, unit, position, example)

    index = jnp.zeros((), jnp.int32)
    closed = jax.make_jaxpr(row)(params, index, index, example)
    count = len(jax.tree.leaves(params))
    own = [False] * count + [False, True] + [True] * len(jax.tree.leaves(example))
    found = dependent_equations(closed, own)
    return max((a.size for eqn in found for a in eqn.outputs), default=1)


def nudged(tree: PyTree) -> PyTree:
    """Two roundings away, signs taking turns."""

    def one(a: Array) -> Array:
        a = jnp.asarray(a)
        eps = 2 * float(jnp.finfo(a.dtype).eps)
        signs = 1 - 2 * (lax.iota(jnp.int32, a.size) % 2).astype(a.dtype)
        return a * (1 + eps * signs.reshape(a.shape))

    return jax.tree.map(one, tree)


class _Around(NamedTuple):
    """What else there is at a point of the boundary of one gate."""

    nearest: Array  # the least |z| of any other gate or kink, relative to the largest beside it
    decides: Array  # that of the comparison which decides this gate, if one does
    slope: Array  # ‖∂y/∂(the gate's output)‖
    unit: Array  # ‖y‖ over the layer's largest |z|: a slope of about this size is not small


def _surroundings(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    position: Array,
    example: Inputs,
) -> _Around:
    index = block.layer
    assert index is not None
    here = element(block, unit, position)

    def outputs(s: Array) -> tuple[Array, At]:
        probe = (index, s * here.astype(s.dtype))
        found = at(network, params, example, probe=probe)
        return found.y, found

    zero = jnp.zeros((), jnp.result_type(float))
    (y, found), (slope, _) = jax.jvp(outputs, (zero,), (jnp.ones_like(zero),))
    again = at(network, nudged(params), nudged(example))
    mine = [i == index for i in range(len(found.z))]
    mine += [layer == index for layer in found.belongs]
    distances = [
        _nearest(jnp.where(here, jnp.inf, z) if own else z, other)
        for z, other, own in zip(
            (*found.z, *found.kinks), (*again.z, *again.kinks), mine, strict=True
        )
    ]
    decides = [
        abs(jnp.where(here, z, 0)).max() / jnp.maximum(abs(z).max(), jnp.finfo(z.dtype).tiny)
        for z, layer in zip(found.kinks, found.belongs, strict=True)
        if layer == index
    ]
    own_layer = found.z[index]
    largest = abs(jnp.where(jnp.isfinite(own_layer), own_layer, 0)).max()
    return _Around(
        jnp.stack(distances).min(),
        jnp.stack([*decides, zero]).max(),
        jnp.linalg.norm(slope),
        jnp.linalg.norm(y) / jnp.where(largest > 0, largest, 1),
    )


def _nearest(z: Array, again: Array) -> Array:
    """How far the elements are from 0; 0 if rounding may have decided the sign of one."""
    finite = jnp.isfinite(z)
    size = abs(jnp.where(finite, z, 0))
    largest = size.max()
    doubtful = finite & (size <= policy.FIRM * 2 * abs(jnp.where(finite, z - again, 0)))
    nearest = jnp.where(finite, jnp.where(doubtful, 0, size), jnp.inf).min()
    return jnp.where(largest > 0, nearest / jnp.where(largest > 0, largest, 1), nearest)


def clearance(network: TracedNetwork, params: Params, example: Inputs) -> Array:
    """How far an input is from all boundaries, relative to the largest pre-activations."""
    found = at(network, params, example)
    again = at(network, nudged(params), nudged(example))
    pairs = zip((*found.z, *found.kinks), (*again.z, *again.kinks), strict=True)
    nearest = [_nearest(z, other) for z, other in pairs]
    return jnp.stack([*nearest, jnp.full((), jnp.inf, found.y.dtype)]).min()


def boundary_rows(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    segments: Segments,
    crossings: Crossed,
    chunk: int,
) -> Rows:
    """Rows of one unit at its boundary points."""

    def one(crossing: tuple[Array, Array, Array, Array]) -> tuple[Array, ...]:
        index, place, position, found = crossing
        segment = taken(segments, index)
        root = root_of(network, block, params, unit, segment, place, position)
        eps = float(jnp.finfo(root.z.dtype).eps)

        def along(t: Array) -> tuple[Array, Array]:
            return _row(network, block, params, unit, position, between(segment, t))

        one_ = jnp.ones_like(root.t)
        _, (speed, turning) = jax.jvp(along, (root.t,), (one_,))
        here = between(segment, root.t)
        values, rounding = _rounded_row(network, block, params, unit, position, here)
        # The point itself is rounded too, which moves it across the segment as well as along.
        missed = (abs(values[0]) + rounding[0]) / abs(speed) + 2 * eps
        error = rounding[1:] + abs(turning) * missed
        around = _surroundings(network, block, params, unit, position, here)
        crossed = found & (abs(values[0]) <= 1e3 * eps * root.size + rounding[0]) & (speed != 0)
        finite = jnp.isfinite(error).all() & jnp.isfinite(values).all()
        crossed = crossed & finite & (around.decides <= MARGIN)
        return values[1:], error, crossed, around.nearest > MARGIN, around.slope, around.unit

    rows, error, crossed, alone, slope, size = lax.map(one, crossings, batch_size=chunk)
    largest = jnp.maximum(jnp.where(crossed, slope, 0).max(), size)
    good = crossed & alone & (slope > MARGIN * largest)
    return Rows(rows, error, good, crossed, alone)


def output_rows(
    network: TracedNetwork, block: Block, params: Params, unit: Array, inputs: Inputs, chunk: int
) -> Rows:
    """Rows of one output unit; any input will do that is on no boundary."""

    def one(given: tuple[Inputs, Array]) -> tuple[Array, ...]:
        example, position = given
        values, rounding = _rounded_row(network, block, params, unit, position, example)
        away = clearance(network, params, example)
        finite = jnp.isfinite(rounding).all() & jnp.isfinite(values).all()
        return values[1:], rounding[1:], finite, away > MARGIN

    count = jnp.shape(jax.tree.leaves(inputs)[0])[0]
    positions = jnp.arange(count, dtype=jnp.int32) % block.positions
    rows, error, finite, alone = lax.map(one, (inputs, positions), batch_size=chunk)
    return Rows(rows, error, finite & alone, finite, alone)


class Found(NamedTuple):
    """The rank of a block."""

    rank: Array  # int32: proven
    points: Array  # int32: that count
    crossed: Array  # int32: points of the boundary, whether or not they count
    alone: Array  # int32: of those, away from all other boundaries
    homogeneous: Array  # bool: the unit's own parameters are a null vector


def rank_of(found: Rows, own: Array) -> Found:
    """A proven lower bound on the rank of the rows, and what it rests on."""
    dtype = found.rows.dtype
    eps = float(jnp.finfo(dtype).eps)
    points, m = found.rows.shape
    A = jnp.where(found.good[:, None], found.rows, 0)
    error = jnp.where(found.good[:, None], found.error, 0)
    # Powers of two, so that scaling rounds nothing: rows to about norm one, columns likewise.
    by_row = _power(abs(A).max(1))[:, None]
    A, error = A * by_row, error * by_row
    by_column = _power(jnp.linalg.norm(A, axis=0))
    A, wrong = A * by_column, jnp.linalg.norm(error * by_column)
    G = jnp.matmul(A.T, A, precision=_EXACT)
    trace = jnp.trace(G)
    wrong_G = wrong * (2 * jnp.sqrt(trace) + wrong)
    # As in the certificate of `jaxinv.ranks`: what forming G and factoring it may be wrong by.
    mu = trace * eps * (m + 2 + 8 * points**0.5) + policy.FIRM * wrong_G
    shift = mu * jnp.eye(m, dtype=dtype)
    v = own / by_column
    size = jnp.linalg.norm(v)
    v = v / jnp.where(size > 0, size, 1)
    homogeneous = (size > 0) & (jnp.linalg.norm(A @ v) <= 1e-6 * jnp.sqrt(trace / m))
    null = (trace / m) * jnp.outer(v, v)

    def factored(G: Array) -> Array:
        return jnp.isfinite(cholesky(G - shift)).all() & (trace > 0)

    def by_values() -> Array:
        values = singular_values(triangle(A) if points > m else A)
        limit = policy.FIRM * wrong + policy.roundings(points, m, dtype) * values[0]
        return jnp.sum(values > limit).astype(jnp.int32)

    def short() -> Array:
        one_less = factored(G + null)
        return lax.cond(one_less, lambda: jnp.asarray(m - 1, jnp.int32), by_values)

    good = found.good.sum(dtype=jnp.int32)
    whole = ~homogeneous & factored(G)
    rank = lax.cond(whole, lambda: jnp.asarray(m, jnp.int32), short)
    return Found(
        jnp.where(good > 0, jnp.minimum(rank, good), 0),
        good,
        found.crossed.sum(dtype=jnp.int32),
        (found.crossed & found.alone).sum(dtype=jnp.int32),
        homogeneous,
    )


def _power(size: Array) -> Array:
    """Powers of two that bring these to about one; 1 for 0."""
    some = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    return jnp.ldexp(jnp.ones_like(some), -jnp.frexp(some)[1])


R = TypeVar("R")


def spread(function: Callable[..., R], mesh: jax.sharding.Mesh | None) -> Callable[..., R]:
    """A function of (params, what units share, of each unit …), the units spread over devices."""
    if mesh is None:
        return function
    here, own = PartitionSpec(), PartitionSpec(mesh.axis_names)

    def over(params: Params, shared: PyTree, *of_units: PyTree) -> R:
        specs = (here, here, *[own] * len(of_units))
        # Nothing is summed over devices, so there is nothing to check of what varies over them.
        apart = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
        return apart(params, shared, *of_units)

    return over


@partial(jax.jit, static_argnames=("network", "block", "chunk", "mesh"))
def boundary_ranks(
    network: TracedNetwork,
    block: Block,
    params: Params,
    units: Array,
    segments: Segments,
    crossings: Crossed,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
) -> Found:
    """Of some units, one after another; on a mesh each device takes its share of them."""

    def some(params: Params, segments: Segments, units: Array, crossings: Crossed) -> Found:
        def one(given: tuple[Array, Crossed]) -> Found:
            unit, own = given
            rows = boundary_rows(network, block, params, unit, segments, own, chunk)
            return rank_of(rows, flat(slices_of(block, params, unit)))

        return lax.map(one, (units, crossings))

    return spread(some, mesh)(params, segments, units, crossings)


@partial(jax.jit, static_argnames=("network", "block", "chunk", "mesh"))
def aimed_ranks(
    network: TracedNetwork,
    block: Block,
    params: Params,
    units: Array,
    segments: Segments,  # of each unit
    crossings: Crossed,
    starts: Inputs,  # of each unit
    bounds: tuple[Inputs, Inputs] | None,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
) -> tuple[Found, Segments, Crossed]:
    """As `boundary_ranks`, with more points along segments that are aimed from `starts`.

    Also the segments of as many points as before, those that count first.
    """

    def some(
        params: Params, bounds: tuple[Inputs, Inputs] | None, *of_units: PyTree
    ) -> tuple[Found, Segments, Crossed]:
        def one(
            given: tuple[Array, Segments, Crossed, Inputs],
        ) -> tuple[Found, Segments, Crossed]:
            unit, own, crossed, start = given
            more, found = aimed(network, block, params, unit, start, bounds)
            parts = [
                boundary_rows(network, block, params, unit, ends, at_, chunk)
                for ends, at_ in ((own, crossed), (more, found))
            ]
            rows, ends, places = (
                jax.tree.map(lambda *a: jnp.concatenate(a), *pair)
                for pair in (parts, (own, more), (crossed, found))
            )
            count = crossed[0].size
            first = jnp.argsort(~rows.good)[:count]
            index = lax.iota(jnp.int32, count)
            kept = (index, places[1][first], places[2][first], rows.good[first])
            rank = rank_of(rows, flat(slices_of(block, params, unit)))
            return rank, taken(ends, first), kept

        return lax.map(one, of_units)

    return spread(some, mesh)(params, bounds, units, segments, crossings, starts)


@partial(jax.jit, static_argnames=("network", "block", "chunk"))
def output_ranks(
    network: TracedNetwork, block: Block, params: Params, units: Array, inputs: Inputs, chunk: int
) -> Found:
    """Of some output units, one after another."""

    def one(unit: Array) -> Found:
        rows = output_rows(network, block, params, unit, inputs, chunk)
        return rank_of(rows, flat(slices_of(block, params, unit)))

    return lax.map(one, units)
