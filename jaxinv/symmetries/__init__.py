"""Infinitesimal symmetries of any network: read off its program, or found numerically."""

from jaxinv.symmetries.discovery import (
    Comparison,
    Discovered,
    Symmetries,
    compare,
    discover_symmetries,
)
from jaxinv.symmetries.gauges import (
    Aligned,
    MatrixGauge,
    align,
    balance_matrices,
    distance_mod_symmetries,
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
from jaxinv.symmetries.legality import SymmetryVerdict, is_symmetry
from jaxinv.symmetries.permutations import (
    Match,
    PermutationClass,
    PermutationGroup,
    match,
    permutation_group,
    permute,
    random_permutations,
)
from jaxinv.symmetries.preconditioner import scale_by_matrix_symmetries
from jaxinv.symmetries.rotations import Rotated, hadamard_rotation, principal_axes
from jaxinv.symmetries.shifts import Shifts, shift_tangents

__all__ = [
    "Aligned",
    "Rotated",
    "hadamard_rotation",
    "principal_axes",
    "MatrixGauge",
    "align",
    "balance_matrices",
    "distance_mod_symmetries",
    "scale_by_matrix_symmetries",
    "random_permutations",
    "permute",
    "permutation_group",
    "match",
    "PermutationGroup",
    "PermutationClass",
    "Match",
    "Comparison",
    "Discovered",
    "Element",
    "Shifts",
    "Symmetries",
    "SymmetryGroup",
    "SymmetryVerdict",
    "act",
    "compare",
    "discover_symmetries",
    "is_symmetry",
    "random_element",
    "shift_tangents",
    "spanning_tangents",
    "symmetry_group",
    "symmetry_tangents",
]
