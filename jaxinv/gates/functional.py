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
from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.draws import traced_in
from jaxinv._numerics.precision import as_dtype, in_precision
from jaxinv.errors import InvalidInput, JaxinvError, UnsupportedOperation
from jaxinv.gates.blocks import Block, block_of
from jaxinv.gates.reading import Gates, read
from jaxinv.gates.regions import Region, example_of
from jaxinv.gates.search import (
    Layer,
    Progress,
    Search,
    of_gates,
    of_outputs,
    too_large,
)
from jaxinv.gates.values import Atom
from jaxinv.rescaling import rescaling_group
from jaxinv.rescaling.span import span_dimension
from jaxinv.typing import Array, Inputs, Network, Params

# Rows of the Jacobian that are taken where the blocks leave a gap: most see nothing new.
_ROWS_PER_PARAMETER, _LEAST_ROWS = 6, 4000


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
    casts: tuple[str, ...]  # lines that round to less than float64, so that nothing is certain

    def __str__(self) -> str:
        """The bounds, and what is missing."""
        known = f"{self.lower}" if self.certain else f"[{self.lower}, {self.upper}]"
        word = "certain" if self.certain else "NOT CERTAIN"
        lines = [
            f"functional dimension {known} of {self.parameters} parameters ({word}), on "
            f"{self.region}; {self.rescaling} rescalings"
        ]
        for layer in self.layers:
            lines += [f"{layer.name}: {reason}" for reason in layer.reasons]
        lines += [f"not proven: fn casts to less than float64: {line}" for line in self.casts]
        return "\n".join(lines)


def functional_dimension(
    fn: Network,
    params: Params,
    region: Region,
    *,
    key: Array | None = None,
    dense: int = 2000,
    max_bytes: float = 2e9,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
) -> FunctionalDimension:
    """The degrees of freedom of a network of ReLUs on a region of inputs, between proven bounds.

    sup rank ∂fn(params, x₁…x_n)/∂params over all inputs of the region. From below it is the sum
    over gates g of rank {∂z_g/∂(parameters that g is the first to see)} at boundary points of g, of
    which the closed span of all rows of the Jacobian contains the rows; from above d − rescalings.
    It takes about d evaluations of the network, and the memory of one unit's rows.

    Args:
        fn: the network `fn(params, x) -> y`: any composition of smooth operations with max, min,
            abs, clip, `where` at a sign and max pooling. It runs in float64.
        params: pytree of float arrays.
        region: `jaxinv.gates.everywhere(x)`, `box(low, high)`, `hull(x)` or `segments(x)`.
        key: of the random segments; the same key gives the same answer.
        dense: up to this many parameters, where the bounds do not meet, the rank of the Jacobian
            at the inputs that the search has found is taken as well.
        max_bytes: for the rows of one unit. A layer that would take more is left out, and named.
        mesh: devices over which the units of a layer are spread.
        progress: called with the fraction done and the name of the layer.

    Returns:
        A `FunctionalDimension`. `str` of it says what is missing, and why.

    Raises:
        UnsupportedOperation: for an operation that jumps, a branch or loop that depends on the
            values, or a network that mixes examples.
        InvalidInput: for params or a region that are not floating point.
        JaxinvError: if the two bounds contradict each other, which a fault of jaxinv alone can do.

    References:
        Grigsby, Lindsey, Meyerhoff, Wu, "Functional dimension of feedforward ReLU neural networks"
        (arXiv:2209.04036), for the quantity. Rolnick, Kording, ICML 2020 (arXiv:1910.00744), for
        weights from boundaries.

    Example:
        >>> import jax
        >>> from jaxinv import functional_dimension, networks
        >>> from jaxinv.gates import everywhere
        >>> w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.1)
        >>> print(functional_dimension(networks.mlp, w, everywhere(jax.numpy.zeros((1, 3)))))
        functional dimension 22 of 26 parameters (certain), on all inputs; 4 rescalings
    """
    check_params(params)
    if not isinstance(region, Region):
        raise InvalidInput(
            "functional_dimension asks about a region of inputs: everywhere(x), box(low, high), "
            "hull(x) or segments(x) of jaxinv.gates. For given inputs alone use jacobian_rank."
        )
    seed = np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key)).ravel()
    with in_precision(np.float64):
        params, low, high = as_dtype((params, region.low, region.high), np.float64)
        region = region._replace(low=low, high=high)
        network = traced_in(np.float64, fn, params, low)
        if network.error is not None:
            raise network.error
        search = Search(network, params, region, seed, 0, max_bytes, mesh)
        return _dimension(search, dense, progress or (lambda part, what: None))


def _dimension(search: Search, dense: int, progress: Progress) -> FunctionalDimension:
    network, params = search.network, search.params
    gates = read(network, params, example_of(search.region))
    shapes = [tuple(jnp.shape(a)) for a in jax.tree.leaves(params)]
    total = sum(int(np.prod(s)) for s in shapes)
    numbers = sum(int(np.prod(layer.shape)) for layer in gates.layers)
    numbers += sum(int(np.size(a[0])) for a in jax.tree.leaves(search.region.low))
    search = search._replace(numbers=numbers)
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
    span = _rescalings(network, params, search.region.low)
    upper = total - span
    if lower < upper and total <= dense:
        number = max(_ROWS_PER_PARAMETER * total, _LEAST_ROWS)
        rows = of_outputs(search, _whole(gates, shapes), pool, number)
        lower = max(lower, int(rows.found.rank[0]))
    if lower > upper:
        raise JaxinvError(
            f"the bounds on the functional dimension contradict each other: at least {lower} by "
            f"the boundaries of gates, at most {upper} by {span} rescalings. This is a fault of "
            "jaxinv: please report the network."
        )
    certain = lower == upper and not gates.casts
    return FunctionalDimension(
        lower, upper, certain, total, span, str(search.region), tuple(layers), gates.casts
    )


def _rescalings(network: TracedNetwork, params: Params, x: Inputs) -> int:
    """How many independent ones are known; none where an operation has no rule."""
    try:
        return span_dimension(rescaling_group(network, params, x), params)
    except UnsupportedOperation:
        return 0


def _whole(gates: Gates, shapes: list[tuple[int, ...]]) -> Block:
    """All parameters as they are seen by the outputs, one block."""
    atoms = tuple(((i, None), None, shape) for i, shape in enumerate(shapes))
    return Block(None, None, atoms, gates.outputs.shape, "all parameters", "")


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
