"""Infinitesimal symmetries of any network, found numerically."""

from jaxinv.symmetries.discovery import (
    Comparison,
    Discovered,
    Symmetries,
    compare,
    discover_symmetries,
)

__all__ = ["Comparison", "Discovered", "Symmetries", "compare", "discover_symmetries"]
