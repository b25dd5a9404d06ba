"""Ranks of Jacobians, how far they can be trusted, and the degrees of freedom of a network."""

from jaxinv.ranks.degrees import (
    DegreesOfFreedom,
    Saturation,
    dead_names,
    degrees_of_freedom,
    saturating_inputs,
)
from jaxinv.ranks.functional import (
    FunctionalDimension,
    LayerDimension,
    functional_dimension,
)
from jaxinv.ranks.rank import jacobian_rank, jacobian_spectrum
from jaxinv.ranks.record import Rank

__all__ = [
    "DegreesOfFreedom",
    "FunctionalDimension",
    "LayerDimension",
    "Rank",
    "Saturation",
    "dead_names",
    "degrees_of_freedom",
    "functional_dimension",
    "jacobian_rank",
    "jacobian_spectrum",
    "saturating_inputs",
]
