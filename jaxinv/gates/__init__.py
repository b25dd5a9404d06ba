"""Gates of networks of ReLUs: regions of inputs, and boundary points that prove a dimension."""

from jaxinv.gates.regions import Region, box, everywhere, hull, segments

__all__ = ["Region", "box", "everywhere", "hull", "segments"]
