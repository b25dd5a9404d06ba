"""How far two training curves are apart."""

import numpy as np


def start_distance(balanced: np.ndarray, unbalanced: np.ndarray) -> np.ndarray:
    """Return the largest distance between the curves of the two starts, of each seed.

    max_t |balanced_t − unbalanced_t|, infinite if either diverges.

    >>> start_distance(np.array([[3.0, 1.0]]), np.array([[3.5, 1.0]]))
    array([0.5])
    >>> start_distance(np.array([[3.0, 1.0]]), np.array([[3.5, np.nan]]))
    array([inf])
    """
    # inf − inf is NaN; that a curve is infinite is the finding, not a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(balanced - unbalanced)
    return np.where(np.isnan(distance), np.inf, distance).max(axis=1)


def median_gap(balanced: np.ndarray, unbalanced: np.ndarray) -> np.ndarray:
    """Return the relative distance between the losses of the two starts, of each seed.

    The median over steps of |balanced − unbalanced| / max(balanced, unbalanced), from the second
    step on: at the first the two are one function. A step where either diverged counts as 1.

    >>> median_gap(np.array([[3.0, 1.0, 2.0]]), np.array([[3.0, 0.5, np.nan]]))
    array([0.75])
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        gap = np.abs(balanced - unbalanced) / np.maximum(balanced, unbalanced)
    # Equal losses of 0 are equal, and a NaN is no loss.
    gap = np.where(balanced == unbalanced, 0.0, np.where(np.isnan(gap), 1.0, gap))
    return np.asarray(np.median(gap[:, 1:] if gap.shape[1] > 1 else gap, axis=1))
