"""Gates of networks of ReLUs: regions of inputs, and boundary points that prove a dimension."""

from jaxinv.gates.functional import FunctionalDimension, LayerDimension, functional_dimension
from jaxinv.gates.regions import Region, box, everywhere, hull, segments

__all__ = [
    "FunctionalDimension",
    "LayerDimension",
    "Region",
    "box",
    "everywhere",
    "functional_dimension",
    "hull",
    "segments",
]
