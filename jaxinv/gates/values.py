"""Values of the domain of gates: arrays that know on which parameters they depend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxinv._interpreter.walk import Value
from jaxinv.typing import Array, ArrayLike

Atom = tuple[int, int | None]  # (leaf, layer of a stacked leaf or None)
Axes = frozenset[tuple[int, int]]  # (axis of the value, axis of the atom)


class Cut(NamedTuple):
    """Parameters of which only slice `channel` is there, of length one along `axis`."""

    channel: Array
    slices: Mapping[Atom, tuple[Array, int | None]]  # (values, axis); an axis of None: all of it


class Real(Value):
    """An array, what it depends on, and along which axis it is cut to one channel, if it is."""

    __slots__ = ("array", "atoms", "cut", "data", "leaf", "off")

    def __init__(
        self,
        array: Array,
        atoms: Mapping[Atom, Axes],
        data: bool,
        cut: int | None = None,
        *,
        leaf: int | None = None,
        off: Array | None = None,
    ):
        self.array, self.atoms, self.data, self.cut = array, atoms, data, cut
        self.leaf = leaf  # a whole leaf of the parameters, not yet used
        self.off = off  # elements that are 0 and stay so nearby: closed gates
        self.key = object()


Operand = Real | ArrayLike


class Verdict(Real):
    """The truth of a comparison, and the number whose sign it is."""

    __slots__ = ("kink",)
    kink: Kink


class Kink:
    """Somewhere the program is not smooth: where z is 0."""

    def __init__(self, z: Array, source: str):
        self.z, self.source = z, source
        self.stage: int | None = None  # the gate that this comparison decides
        self.elsewhere = False  # it is used otherwise too


class Stage(NamedTuple):
    """An array of gates."""

    z: Array  # pre-activations; of length one along `cut`
    atoms: Mapping[Atom, Axes]
    cut: int | None
    source: str
