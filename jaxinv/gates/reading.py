"""The gates of a network: read once from its program, evaluated at one input as often as needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.walk import interpret
from jaxinv.gates.domain import GateDomain
from jaxinv.gates.values import Atom, Axes, Cut, Real
from jaxinv.typing import Array, Inputs, Params


class Layer(NamedTuple):
    """An array of gates, or the outputs: what is known of them from the program alone."""

    source: str
    shape: tuple[int, ...]  # of one example
    atoms: Mapping[Atom, Axes]


class Gates(NamedTuple):
    """The gates of a network, in the order of its program, and its outputs."""

    network: TracedNetwork
    layers: tuple[Layer, ...]  # the gates
    outputs: Layer
    names: tuple[str, ...]  # of the leaves of params
    casts: tuple[str, ...]  # lines that round to less than float64


class At(NamedTuple):
    """A network at one input."""

    z: list[Array]  # pre-activations of every layer of gates
    belongs: list[int | None]  # the layer of gates that a kink decides, if any
    kinks: list[Array]  # distances to what else is not smooth
    y: Array  # outputs, flat; of one channel if cut


def at(
    network: TracedNetwork,
    params: Params,
    example: Inputs,
    cut: Cut | None = None,
    probe: tuple[int, Array] | None = None,
) -> At:
    """Evaluate the network at one input, with its gates."""
    domain, outputs = _walk(network, params, example, cut, probe)
    return At(
        [stage.z for stage in domain.stages],
        [None if kink.elsewhere else kink.stage for kink in domain.kinks],
        [kink.z for kink in domain.kinks],
        jnp.concatenate([jnp.ravel(_array(y)) for y in outputs]),
    )


def _walk(
    network: TracedNetwork,
    params: Params,
    example: Inputs,
    cut: Cut | None = None,
    probe: tuple[int, Array] | None = None,
) -> tuple[GateDomain, Sequence[object]]:
    domain = GateDomain(cut, probe)
    leaves = [domain.leaf(i, jnp.asarray(a)) for i, a in enumerate(jax.tree.leaves(params))]
    inputs = [Real(a[None], {}, True) for a in jax.tree.leaves(example)]
    assert network.one is not None
    return domain, interpret(network.one.trace, leaves, inputs, domain)


def _array(value: object) -> Array:
    return value.array if isinstance(value, Real) else jnp.asarray(value)


def read(network: TracedNetwork, params: Params, example: Inputs) -> Gates:
    """What the program says of its gates, from shapes alone.

    Raises:
        UnsupportedOperation: for an operation that is neither smooth nor a known gate.
    """
    found = []

    def look(params: Params, example: Inputs) -> Array:
        domain, outputs = _walk(network, params, example)
        found.append((domain, outputs))
        return jnp.zeros(())

    jax.eval_shape(look, params, example)
    domain, outputs = found[0]
    assert network.one is not None
    names = tuple(network.one.trace.param_names)
    layers = [Layer(stage.source, tuple(stage.z.shape), stage.atoms) for stage in domain.stages]
    atoms: dict[Atom, Axes] = {}
    for y in outputs:
        for atom, pairs in y.atoms.items() if isinstance(y, Real) else ():
            atoms[atom] = atoms[atom] & pairs if atom in atoms else pairs
    shape: tuple[int, ...] = (sum(int(_array(y).size) for y in outputs),)
    if len(outputs) == 1:
        shape = tuple(_array(outputs[0]).shape)
    else:  # flat outputs have no axes in common
        atoms = {atom: frozenset() for atom in atoms}
    found_layers = _disjoint([*layers, Layer("", shape, atoms)])
    return Gates(network, tuple(found_layers[:-1]), found_layers[-1], names, tuple(domain.casts))


def _disjoint(layers: Sequence[Layer]) -> list[Layer]:
    """A leaf that is used as a whole and by layers is one atom, of which no axis is known."""
    every = {atom for layer in layers for atom in layer.atoms}
    mixed = {leaf for leaf, part in every if part is not None and (leaf, None) in every}

    def merged(atoms: Mapping[Atom, Axes]) -> dict[Atom, Axes]:
        whole = {(leaf, None) for leaf, _ in atoms if leaf in mixed}
        kept = {atom: pairs for atom, pairs in atoms.items() if atom[0] not in mixed}
        return kept | {atom: frozenset() for atom in whole}

    return [layer._replace(atoms=merged(layer.atoms)) for layer in layers]
