"""Infinitesimal symmetries of any network, found numerically."""

from jaxinv.symmetries.discovery import Comparison, Discovered, Symmetries, compare, discover

__all__ = ["Comparison", "Discovered", "Symmetries", "compare", "discover"]
