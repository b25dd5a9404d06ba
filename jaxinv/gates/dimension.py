"""Functional dimension: the degrees of freedom of a ReLU network on a whole region of inputs.

The rows of the Jacobian on the two sides of the boundary of a gate g differ by
(∂y/∂out_g)·∂z_g/∂θ: all else is continuous. The rows over all inputs span a closed space, so it
contains ∂z_g/∂θ at every boundary point, and these rows are block triangular (see `blocks`). The
sum of the ranks of the blocks is a lower bound that needs neither d² numbers nor d³ operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import check_params, integer
from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.draws import traced_in
from jaxinv._numerics.precision import as_dtype, in_precision
from jaxinv.errors import InvalidInput
from jaxinv.gates.blocks import Block, block_of
from jaxinv.gates.points import Crossings, Segments, between, chosen, chunk_of, signs
from jaxinv.gates.proof import Found, aimed_ranks, boundary_ranks, output_ranks
from jaxinv.gates.reading import Gates, read
from jaxinv.gates.regions import Region, draw, example_of
from jaxinv.gates.theory import known_span
from jaxinv.typing import Array, Inputs, Network, Params

# Boundary points for each parameter of a unit, and on top of that.
_POINTS_PER_COLUMN, _MORE_POINTS = 1.1, 16
# Segments looked at before a unit's gate counts as one that never changes.
_MOST_SEGMENTS = 40
Progress = Callable[[float, str], None]


class LayerDimension(NamedTuple):
    """What was proven of the parameters that one layer of gates is the first to see."""

    name: str  # the parameters
    source: str
    columns: int  # parameters of one unit
    ranks: np.ndarray  # (units,) int: proven
    missing: np.ndarray  # (units,) int: columns − rank, less one where a rescaling explains it
    points: np.ndarray  # (units,) int: boundary points that count
    always: np.ndarray  # (units,) int: 1: always on, −1: always off, 0: changes its sign
    reasons: tuple[str, ...]


class FunctionalDimension(NamedTuple):
    """Degrees of freedom on a region: proven bounds, and what they rest on."""

    lower: int
    upper: int
    certain: bool
    parameters: int
    rescaling: int
    region: str
    layers: tuple[LayerDimension, ...]

    def __str__(self) -> str:
        known = f"{self.lower}" if self.certain else f"[{self.lower}, {self.upper}]"
        word = "certain" if self.certain else "NOT CERTAIN"
        lines = [
            f"functional dimension {known} of {self.parameters} parameters ({word}), on "
            f"{self.region}; {self.rescaling} rescalings"
        ]
        for layer in self.layers:
            lines += [f"{layer.name}: {reason}" for reason in layer.reasons]
        return "\n".join(lines)


def functional_dimension(
    fn: Network,
    params: Params,
    region: Region,
    *,
    key: Array | None = None,
    max_bytes: float = 2e9,
    progress: Progress | None = None,
) -> FunctionalDimension:
    check_params(params)
    key = jax.random.key(0) if key is None else key
    data = np.asarray(jax.random.key_data(key)).ravel()
    with in_precision(np.float64):
        params = as_dtype(params, np.float64)
        region = region._replace(
            low=as_dtype(region.low, np.float64), high=as_dtype(region.high, np.float64)
        )
        network = traced_in(np.float64, fn, params, region.low)
        if not network.apart:
            assert network.error is not None
            raise network.error
        search = _Search(network, params, region, data, max_bytes, progress or _quiet)
        return _dimension(search)


def _quiet(part: float, what: str) -> None:
    pass


class _Search(NamedTuple):
    network: TracedNetwork
    params: Params
    region: Region
    seed: np.ndarray
    max_bytes: float
    progress: Progress


def _dimension(search: _Search) -> FunctionalDimension:
    network, params = search.network, search.params
    gates = read(network, params, example_of(search.region))
    shapes = [tuple(jnp.shape(a)) for a in jax.tree.leaves(params)]
    total = sum(int(np.prod(s)) for s in shapes)
    numbers = sum(int(np.prod(layer.shape)) for layer in gates.layers)
    numbers += sum(int(np.size(a)) for a in jax.tree.leaves(search.region.low))
    seen: set[Any] = set()
    layers = []
    for index in [*range(len(gates.layers)), None]:
        block = block_of(gates, index, shapes, seen)
        if block is None:
            continue
        found = _layer(search, block, numbers)
        if found is None:
            continue
        seen |= {atom for atom, _, _ in block.atoms}
        layers.append(found)
        search.progress(min(1.0, sum(la.columns * len(la.ranks) for la in layers) / total), block.name)
    lower = sum(int(layer.ranks.sum()) for layer in layers)
    span, unused = known_span(network, params, search.region.low)
    upper = total - span - unused
    if lower > upper:
        raise AssertionError(f"{lower} > {upper}")
    return FunctionalDimension(
        lower, upper, lower == upper, total, span, str(search.region), tuple(layers)
    )


def _layer(search: _Search, block: Block, numbers: int) -> LayerDimension | None:
    wanted = int(block.columns * _POINTS_PER_COLUMN) + _MORE_POINTS
    if 8 * 4 * wanted * block.columns > search.max_bytes:
        return _described(block, None, "too large")
    chunk = chunk_of(4 * numbers + 4 * block.columns)
    if block.layer is None:
        rng = jax.random.wrap_key_data(jnp.asarray(search.seed))
        start, end = draw(search.region, jax.random.fold_in(rng, 1 << 20), wanted)
        t = jax.random.uniform(jax.random.fold_in(rng, 7), (wanted,))
        inputs = jax.vmap(between)(Segments(start, end), t)
        units = jnp.arange(block.units, dtype=jnp.int32)
        found = output_ranks(search.network, block, search.params, units, inputs, chunk)
        return _described(block, found, None)
    segments, crossings = _crossings(search, block, wanted, numbers)
    if not crossings.found.any():
        return None
    group = max(1, block.units // 16)
    parts = []
    for first in range(0, block.units, group):
        part = slice(first, first + group)
        units = jnp.arange(first, min(first + group, block.units), dtype=jnp.int32)
        arrays = tuple(jnp.asarray(a[part], d) for a, d in zip(crossings[:4], _KINDS, strict=True))
        parts.append(
            boundary_ranks(
                search.network, block, search.params, units, segments, arrays, chunk
            )
        )
    found = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    found = _aimed(search, block, segments, crossings, found, wanted, chunk)
    if int(found.points.sum()) == 0:
        return None
    return _described(block, found, None, crossings.always)


def _aimed(
    search: _Search,
    block: Block,
    segments: Segments,
    crossings: Crossings,
    found: Found,
    wanted: int,
    chunk: int,
) -> Found:
    """More points, looked for one by one, for the units that lack some."""
    short = np.asarray(found.rank) < block.columns - np.asarray(found.homogeneous)
    left = np.flatnonzero(short)
    if not len(left) or search.region.kind not in ("everywhere", "box"):
        return found
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(search.seed)), 1 << 21)
    starts, _ = draw(search.region, jax.random.fold_in(key, block.layer), wanted)
    bounds = None
    if search.region.kind == "box":
        bounds = (example_of(search.region), jax.tree.map(lambda a: a[0], search.region.high))
    group = 16
    for first in range(0, len(left), group):
        # The last group is filled up, so that one program serves all.
        units = np.resize(left[first : first + group], min(group, len(left)))
        arrays = tuple(jnp.asarray(a[units], d) for a, d in zip(crossings[:4], _KINDS, strict=True))
        better = aimed_ranks(
            search.network, block, search.params, jnp.asarray(units, jnp.int32), segments, arrays,
            starts, bounds, chunk,
        )  # fmt: skip
        found = jax.tree.map(lambda a, b: a.at[units].set(b), found, better)
    return found


_KINDS = (jnp.int32, jnp.int32, jnp.int32, bool)


def _crossings(search: _Search, block: Block, wanted: int, numbers: int) -> Any:
    rng = np.random.default_rng(search.seed)
    key = jax.random.wrap_key_data(jnp.asarray(search.seed))
    key = jax.random.fold_in(key, block.layer)
    # About half of the segments cross a unit's boundary, at each of its positions.
    count = max(16, -(-2 * wanted // block.positions))
    starts, ends, above = [], [], []
    for attempt in range(4):
        start, end = draw(search.region, jax.random.fold_in(key, attempt), count)
        found = signs(
            search.network, block, search.params, Segments(start, end), chunk_of(numbers)
        )
        starts.append(start)
        ends.append(end)
        above.append(np.asarray(found))
        crossings = chosen(np.concatenate(above), wanted, rng)
        if (crossings.found.sum(1) >= wanted).all():
            break
    join = lambda parts: jax.tree.map(lambda *a: jnp.concatenate(a), *parts)  # noqa: E731
    return Segments(join(starts), join(ends)), crossings


def _described(
    block: Block, found: Found | None, why: str | None, always: np.ndarray | None = None
) -> LayerDimension:
    units = block.units
    if found is None:
        zero = np.zeros(units, np.int64)
        return LayerDimension(
            block.name, block.source, block.columns, zero, zero + block.columns, zero, zero,
            (str(why),),
        )  # fmt: skip
    ranks, points = np.asarray(found.rank), np.asarray(found.points)
    null = np.asarray(found.homogeneous).astype(int)
    missing = block.columns - null - ranks
    always = np.zeros(units, int) if always is None else always
    reasons = []
    if (missing > 0).any():
        few = (missing > 0) & (points < block.columns - null)
        reasons.append(
            f"{(missing > 0).sum()} of {units} units lack {missing.sum()}; {few.sum()} of them "
            f"have too few points; {(always == 1).sum()} always on, {(always == -1).sum()} always off"
        )
    return LayerDimension(
        block.name, block.source, block.columns, ranks, missing, points, always, tuple(reasons)
    )
