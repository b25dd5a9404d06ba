"""Blocks: the parameters that one unit is the first to see, and its rows there.

With gates in the order of the program, and every parameter given to the first gate that depends on
it, the rows ∂z_g/∂θ are block triangular: no gate depends on parameters of later ones. The rank of
all rows is at least the sum of the ranks of the diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv.gates.reading import At, Gates, Layer, at
from jaxinv.gates.values import Atom, Axes, Cut
from jaxinv.typing import Array, Inputs, Params


class Block(NamedTuple):
    """The new parameters of a layer of gates; static under jit.

    Unit c sees slice c of each. Where that cannot be told (`axis` None) all of them are one block.
    """

    layer: int | None  # of gates; None: the outputs
    axis: int | None  # of the layer's array: it counts the units
    atoms: tuple[tuple[Atom, int | None, tuple[int, ...]], ...]  # and axis, and shape of a slice
    shape: tuple[int, ...]  # of the layer's array, for one example
    name: str
    source: str

    @property
    def units(self) -> int:
        """How many blocks the layer has."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def positions(self) -> int:
        """Gates of one unit: places of a channel, or 1."""
        return int(np.prod(self.shape)) // self.units

    @property
    def columns(self) -> int:
        """Parameters of one unit."""
        return sum(int(np.prod(shape)) for _, _, shape in self.atoms)


def block_of(
    gates: Gates, index: int | None, shapes: list[tuple[int, ...]], seen: set[Atom]
) -> Block | None:
    """The block of a layer of gates (None: of the outputs), if it sees anything new."""
    layer = gates.outputs if index is None else gates.layers[index]
    new = sorted(set(layer.atoms) - seen, key=str)
    if not new:
        return None
    axis, along = _common_axis(layer, new, shapes)
    atoms = []
    for atom in new:
        leaf, part = atom
        shape = shapes[leaf] if part is None else shapes[leaf][1:]
        cut = along[atom] if axis is not None else None
        atoms.append((atom, cut, tuple(1 if a == cut else n for a, n in enumerate(shape))))
    names = ", ".join(gates.names[leaf] + ("" if i is None else f"[{i}]") for leaf, i in new)
    return Block(index, axis, tuple(atoms), layer.shape, names, layer.source)


def _common_axis(
    layer: Layer, new: list[Atom], shapes: list[tuple[int, ...]]
) -> tuple[int | None, Mapping[Atom, int]]:
    """An axis of the array whose element c sees slice c of each of the new atoms alone."""
    for axis in reversed(range(len(layer.shape))):
        along: dict[Atom, int] = {}
        for atom in new:
            pairs: Axes = layer.atoms[atom]
            own = [b for a, b in sorted(pairs) if a == axis and layer.shape[axis] > 1]
            if own:
                along[atom] = own[0]
        if len(along) == len(new):
            return axis, along
    return None, {}


# --- one unit ------------------------------------------------------------------------


def slices_of(block: Block, params: Params, unit: Array) -> list[Array]:
    """The unit's parameters."""
    leaves = jax.tree.leaves(params)
    found = []
    for (leaf, part), axis, _ in block.atoms:
        array = leaves[leaf] if part is None else leaves[leaf][part]
        found.append(array if axis is None else lax.dynamic_slice_in_dim(array, unit, 1, axis))
    return found


def run(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    slices: list[Array],
    example: Inputs,
) -> At:
    """The network as that unit sees it, its parameters given."""
    given = {
        atom: (array, axis) for (atom, axis, _), array in zip(block.atoms, slices, strict=True)
    }
    return at(network, params, example, Cut(unit, given))


def pre_activations(
    network: TracedNetwork,
    block: Block,
    params: Params,
    unit: Array,
    slices: list[Array],
    example: Inputs,
) -> Array:
    """z of the unit at all of its positions: (positions,)."""
    found = run(network, block, params, unit, slices, example)
    return found.y if block.layer is None else found.z[block.layer].ravel()


def flat(slices: Iterable[Array]) -> Array:
    """As one vector."""
    return jnp.concatenate([jnp.ravel(s) for s in slices])


def element(block: Block, unit: Array, position: Array) -> Array:
    """Where a unit's gate is in the layer's array: a mask of its shape."""
    shape = [n for a, n in enumerate(block.shape) if a != block.axis]
    here = (jnp.arange(block.positions, dtype=jnp.int32) == position).reshape(shape)
    if block.axis is None:
        return here
    return jnp.expand_dims(here, block.axis) & (
        lax.broadcasted_iota(jnp.int32, block.shape, block.axis) == unit
    )
