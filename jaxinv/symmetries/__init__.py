"""Infinitesimal symmetries of any network: read off its program, or found numerically."""

from jaxinv.symmetries.discovery import (
    Comparison,
    Discovered,
    Symmetries,
    compare,
    discover_symmetries,
)
from jaxinv.symmetries.group import (
    Element,
    SymmetryGroup,
    act,
    random_element,
    spanning_tangents,
    symmetry_group,
    symmetry_tangents,
)
from jaxinv.symmetries.matrices import MatrixClass

__all__ = [
    "Comparison",
    "Discovered",
    "Element",
    "MatrixClass",
    "Symmetries",
    "SymmetryGroup",
    "act",
    "compare",
    "discover_symmetries",
    "random_element",
    "spanning_tangents",
    "symmetry_group",
    "symmetry_tangents",
]
