"""Numbers as a page holds them: six digits, and nothing that JSON cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def number(value: Any) -> float | None:
    """Six digits; None for what is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(values: Iterable[Any]) -> list[float | None]:
    """The same of several."""
    return [number(v) for v in values]


__all__ = ["number", "numbers"]
