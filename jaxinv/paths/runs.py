"""Path sums that are equal by construction are computed once.

Into an input run as many paths everywhere, so the sums after a convolution differ only where its
windows meet the padding: of 56 × 56 positions in the first stage of a ResNet at most 12 × 12. Along
each axis an array may therefore have a *run*: neighbours known, when tracing, to be equal, of which
only a few are kept. A convolution needs no more of them than its window is wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._numerics.scaled import Scaled
from jaxinv.typing import Array, DType


class Run(NamedTuple):
    """rows[start : start + kept] are equal and stand for `length` positions, kept <= length."""

    start: int
    kept: int
    length: int


Runs = Mapping[int, Run]  # by axis; along other axes every position has a row of its own

# Lengths that are multiples of this: layers with wider and wider borders then have few shapes.
_UNIT = 4


def ones(shape: Sequence[int], dtype: DType) -> tuple[Scaled, Runs]:
    """An array of ones: along every axis a run."""
    runs = {axis: Run(0, 1, n) for axis, n in enumerate(shape) if n > 1}
    rows = jnp.ones([1 if axis in runs else n for axis, n in enumerate(shape)], dtype)
    return Scaled(rows, jnp.zeros((), jnp.int32)), runs


def spread(rows: Scaled, runs: Runs) -> Scaled:
    """The whole array."""
    return _resized_rows(rows, [(axis, run, run.length) for axis, run in runs.items()])


def _resized_rows(rows: Scaled, changes: Sequence[tuple[int, Run, int]]) -> Scaled:
    """`_resized` on mantissas, and on exponents along the axes that these have."""
    exponent = rows.exponent
    if jnp.ndim(exponent):
        own = tuple(change for change in changes if exponent.shape[change[0]] > 1)
        exponent = _resized(exponent, own)
    return Scaled(_resized(rows.mantissa, tuple(changes)), exponent)


def _resized(array: Array, changes: tuple[tuple[int, Run, int], ...]) -> Array:
    """The array with another number of equal rows kept of its runs: (axis, run, number)."""
    changes = tuple(change for change in changes if change[1].kept != change[2])
    return _resize(array, changes) if changes else array


@partial(jax.jit, static_argnums=1)  # traced once for layers of the same shape
def _resize(array: Array, changes: tuple[tuple[int, Run, int], ...]) -> Array:
    for change in changes:
        array = _resize_axis(array, *change)
    return array


def _resize_axis(array: Array, axis: int, run: Run, kept: int) -> Array:
    end, more = run.start + run.kept, kept - run.kept

    def rows(start: int, stop: int) -> Array:
        return lax.slice_in_dim(array, start, stop, axis=axis)

    parts = [rows(0, end + min(more, 0)), rows(end, array.shape[axis])]
    if more > 0:
        shape = [more if a == axis else n for a, n in enumerate(array.shape)]
        row = rows(run.start, run.start + 1)
        parts.insert(1, lax.broadcast_in_dim(row, shape, range(array.ndim)))
    return lax.concatenate([part for part in parts if part.shape[axis]], axis)


def _spare(length: int, whole: int) -> int:
    """How many more positions to keep, for a round length; of short axes none."""
    more = -length % _UNIT
    return more if length + more <= whole and whole > 4 * _UNIT else 0


def _length(array: Array, axis: int, run: Run | None) -> int:
    return array.shape[axis] + (run.length - run.kept if run else 0)


def sliding(rows: Scaled, runs: Runs, windows: Mapping[int, tuple]) -> tuple[Scaled, dict]:
    """A shorter array in which the same windows meet everything that they meet in the whole one.

    Args:
        rows, runs: an array.
        windows: axis -> (size, stride, dilation, (padding before, after)). Along other axes the
            array becomes whole.

    Returns:
        The array, and the runs of what the windows make of it.
    """
    changes, out = [], {}
    for axis, run in runs.items():
        if axis not in windows:
            changes.append((axis, run, run.length))
            continue
        size, stride, dilation, (low, high) = windows[axis]
        if (size, stride, low, high) == (1, 1, 0, 0):
            out[axis] = run
            continue
        span = (size - 1) * dilation + 1
        # Enough for one window inside, wherever it starts; whole strides are left out.
        least = span + stride - 1
        kept = least + (run.length - least) % stride
        if kept >= run.length or min(low, high) < 0:
            changes.append((axis, run, run.length))
            continue
        after = rows.mantissa.shape[axis] - run.start - run.kept
        first = -(-(run.start + low) // stride)
        last = (run.start + low + kept - span) // stride
        total = (run.start + kept + after + low + high - span) // stride + 1
        more = _spare(total, total + (run.length - kept) // stride)
        kept += stride * more
        changes.append((axis, run, kept))
        inside = last - first + 1 + more
        out[axis] = Run(first, inside, inside + (run.length - kept) // stride)
    return _resized_rows(rows, changes), out


def joined(arrays: Sequence[tuple[Scaled, Runs]]) -> tuple[list[Scaled], dict[int, Run]]:
    """Arrays for an elementwise operation, with runs where all of them have one."""
    changes: list[list] = [[] for _ in arrays]
    common: dict[int, Run] = {}
    for axis in set().union(*(runs for _, runs in arrays)):
        # An axis of length 1, or none, is the same everywhere.
        long = [
            i
            for i, (rows, runs) in enumerate(arrays)
            if rows.mantissa.ndim and _length(rows.mantissa, axis, runs.get(axis)) > 1
        ]
        found = [arrays[i][1].get(axis) for i in long]
        start = max(run.start if run else 0 for run in found)
        stop = min(run.start + run.length if run else 0 for run in found)
        if stop - start > 1:
            whole = _length(arrays[long[0]][0].mantissa, axis, found[0])
            kept = 1 + _spare(whole - (stop - start - 1), whole)
            common[axis] = Run(start, kept, stop - start)
        for i, run in zip(long, found, strict=True):
            if run:
                left_out = common[axis].length - common[axis].kept if axis in common else 0
                changes[i].append((axis, run, run.length - left_out))
    resized = [
        _resized_rows(rows, change) for (rows, _), change in zip(arrays, changes, strict=True)
    ]
    return resized, common


def counted(rows: Scaled, runs: Runs, axes: Sequence[int]) -> tuple[Scaled, dict[int, Run]]:
    """Rows times how often each is there, so that their sum over `axes` is that of all positions.

    The runs are those of the sum, which lacks those axes.
    """
    mantissa = rows.mantissa
    for axis in axes:
        if axis in runs:
            start, kept, length = runs[axis]
            times = np.ones(mantissa.shape[axis])
            times[start] += length - kept
            others = [a for a in range(mantissa.ndim) if a != axis]
            mantissa = mantissa * np.expand_dims(times, others).astype(mantissa.dtype)
    left = [axis for axis in range(mantissa.ndim) if axis not in axes]
    return Scaled(mantissa, rows.exponent), {
        i: runs[axis] for i, axis in enumerate(left) if axis in runs
    }
