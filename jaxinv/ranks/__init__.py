"""Ranks of Jacobians, how far they can be trusted, and the degrees of freedom of a network."""

from jaxinv.ranks.degrees import (
    DegreesOfFreedom,
    Saturation,
    dead_names,
    degrees_of_freedom,
    saturating_inputs,
)
from jaxinv.ranks.rank import jacobian_rank, jacobian_spectrum
from jaxinv.ranks.record import Rank

__all__ = [
    "DegreesOfFreedom",
    "Rank",
    "Saturation",
    "dead_names",
    "degrees_of_freedom",
    "jacobian_rank",
    "jacobian_spectrum",
    "saturating_inputs",
]
