"""The one policy on numbers that may be zero: what is measured, what is proven, who may say so.

* **Measured** is the error of a computed matrix: a bound from a running error analysis of the
  program, or, for operations that it does not know, the difference between two ways of computing it
  at parameters and inputs two roundings apart; and the error of the decomposition.
* **Proven** from below: a rank r with σ_r of the matrix, its columns scaled to one size, firmly
  beyond that error. From above, by theory alone: rows, columns that are exactly zero without any
  rounding, the exact integer rank of the known symmetries.
* **certain**: both bounds are proven and meet. No gap, however wide, makes a rank certain.
* **clear**: nothing lies in a wide gap between what counts and what counts as zero. No proof.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.typing import Array, DTypeLike

# A wide gap: no rounding of a decomposition spreads zeros over three decades.
CLEAR_GAP = 1e3
# Singular values and pivots count beyond this many times the error of a decomposition.
COUNTS = 8
# Null spaces of equations that are no proof: rows are sampled. A gap that rounding cannot make, and
# the relative size below which rounding leaves zeros, and columns of an unknown that nothing sees.
NULL_SPACE_GAP = 1e4
NULL_SPACE_ZERO = 1e-10
NULL_SPACE_COLUMN = 1e-11
# A value just above a bound that is itself an estimate proves nothing: ask for a decade more.
FIRM = 10.0


def roundings(rows: int, columns: int, dtype: DTypeLike) -> float:
    """The backward error of an SVD, QR or product of matrices, relative to the largest value."""
    return max(rows, columns) * float(np.finfo(dtype).eps)


def counts_from(rows: int, columns: int, dtype: DTypeLike) -> float:
    """What counts as not zero where a decision is due and no proof is claimed, relative to σ_1."""
    return COUNTS * roundings(rows, columns, dtype)


def is_gap(above: Array, below: Array) -> Array:
    """Is `above` clear of `below`?"""
    return above > CLEAR_GAP * below


def default_tolerance(dtype: DTypeLike) -> float:
    """Imbalance of a unit that rounding allows: sums over a unit's weights are good to about this.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv._numerics.tolerances import default_tolerance
        >>> default_tolerance(jnp.float32)
        1e-05
    """
    return 1e-10 if jnp.dtype(dtype) == jnp.float64 else 1e-5


# --- why a rank is not certain ----------------------------------------------------------

LIMITED_BY_ROWS = 1
CAST = 2
UNPROVEN_ZEROS = 4
ROUNDING = 8
NO_UPPER_BOUND = 16
NOT_FINITE = 32
MEASURED = 64
NARROWED = 128
NOT_FACTORED = 256
BOUNDARIES_MISSING = 512

TEXTS = {
    CAST: "fn casts to less than the working precision",
    NARROWED: "params or x were rounded to the working precision first",
    UNPROVEN_ZEROS: "columns that are zero may have underflowed or been rounded away",
    ROUNDING: "rounding hides singular values between 0 and what stands out",
    NO_UPPER_BOUND: "no known symmetry explains the rest of the null space",
    NOT_FACTORED: "the null space may be larger than the known symmetries and dead parameters",
    BOUNDARIES_MISSING: "some units lack boundary points: functional_dimension says which",
    NOT_FINITE: "the Jacobian is not finite",
}


def reasons(flags: Array | int) -> list[str]:
    """The texts of a number made of flags."""
    return [text for flag, text in TEXTS.items() if int(flags) & flag]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class About:
    """What a rank was asked of; static under jit."""

    examples: int = 0
    outputs: int = 0
    parameters: int = 0
    casts: tuple[str, ...] = ()  # source lines
    region: str = ""  # of inputs, where none are given

    @property
    def enough(self) -> int:
        """The fewest inputs that give as many rows as there are parameters."""
        return -(-self.parameters // max(self.outputs, 1))


def flag(condition: Array, value: int) -> Array:
    """value where the condition holds, else 0."""
    return jnp.where(condition, value, 0).astype(jnp.int32)
