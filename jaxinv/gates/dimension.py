"""Functional dimension: the degrees of freedom of a ReLU network on a whole region of inputs.

The rows of the Jacobian on the two sides of the boundary of a gate g differ by
(∂y/∂out_g)·∂z_g/∂θ: all else is continuous. The rows over all inputs span a closed space, so it
contains ∂z_g/∂θ at every boundary point, and these rows are block triangular (see `blocks`). The
sum of the ranks of the blocks is a lower bound that needs neither d² numbers nor d³ operations.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import check_params
from jaxinv._interpreter.draws import traced_in
from jaxinv._numerics.precision import as_dtype, in_precision
from jaxinv.gates.blocks import Block, block_of
from jaxinv.gates.domain import Atom
from jaxinv.gates.reading import read
from jaxinv.gates.regions import Region, example_of
from jaxinv.gates.search import Layer, Progress, Search, count_of, of_gates, of_outputs, too_large
from jaxinv.gates.theory import known_span
from jaxinv.typing import Array, Network, Params


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
        search = Search(network, params, region, data, 0, max_bytes)
        return _dimension(search, progress or _quiet)


def _quiet(part: float, what: str) -> None:
    pass


def _dimension(search: Search, progress: Progress) -> FunctionalDimension:
    network, params = search.network, search.params
    gates = read(network, params, example_of(search.region))
    shapes = [tuple(jnp.shape(a)) for a in jax.tree.leaves(params)]
    total = sum(int(np.prod(s)) for s in shapes)
    numbers = sum(int(np.prod(layer.shape)) for layer in gates.layers)
    search = search._replace(numbers=numbers + count_of(jax.tree.map(jnp.ravel, search.region.low)))
    seen: set[Atom] = set()
    layers: list[LayerDimension] = []
    pool = None
    for index in [*range(len(gates.layers)), None]:
        block = block_of(gates, index, shapes, seen)
        if block is None:
            continue
        if too_large(search, block):
            layers.append(_skipped(block, search.max_bytes))
            continue
        of_layer = of_outputs if index is None else of_gates
        found = of_layer(search, block, pool)
        if found is None:
            continue
        pool = found.pool
        seen |= {atom for atom, _, _ in block.atoms}
        layers.append(_described(block, found))
        done = sum(layer.columns * len(layer.ranks) for layer in layers)
        progress(min(1.0, done / total), block.name)
    lower = sum(int(layer.ranks.sum()) for layer in layers)
    span, unused = known_span(network, params, search.region.low)
    upper = total - span - unused
    if lower > upper:
        raise AssertionError(f"{lower} > {upper}")
    return FunctionalDimension(
        lower, upper, lower == upper, total, span, str(search.region), tuple(layers)
    )


def _skipped(block: Block, max_bytes: float) -> LayerDimension:
    zero = np.zeros(block.units, np.int64)
    why = (
        f"the rows of one unit ({block.columns} parameters) would take more than "
        f"max_bytes = {max_bytes:.3g}"
    )
    missing = zero + block.columns
    return LayerDimension(
        block.name, block.source, block.columns, zero, missing, zero, zero, (why,)
    )


def _described(block: Block, layer: Layer) -> LayerDimension:
    found, always = layer.found, layer.always
    ranks, points = np.asarray(found.rank), np.asarray(found.points)
    null = np.asarray(found.homogeneous).astype(int)
    missing = block.columns - null - ranks
    reasons = []
    if (missing > 0).any():
        few = (missing > 0) & (points < block.columns - null)
        reasons.append(
            f"{(missing > 0).sum()} of {block.units} units lack {missing.sum()}; {few.sum()} of "
            f"them have too few points; {(always == 1).sum()} always on, "
            f"{(always == -1).sum()} always off"
        )
    return LayerDimension(
        block.name, block.source, block.columns, ranks, missing, points, always, tuple(reasons)
    )
