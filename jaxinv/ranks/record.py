"""The record of a rank: the number, its bounds, and what they rest on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._numerics import tolerances as policy
from jaxinv.typing import Array, DTypeLike, PyTree


class Rank(NamedTuple):
    """The rank of a Jacobian and what it rests on; all fields are arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian_rank
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> print(jacobian_rank(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((4, 1))))
        rank 1 (certain): 1 proven from below, at most 1; ...
    """

    rank: Array  # int32: singular values above the tolerance; -1: not certified, or J not finite
    lower: Array  # int32: proven lower bound
    upper: Array  # int32: proven upper bound: min(rows, d − known ambiguities)
    certain: Array  # bool: the bounds meet
    clear: Array  # bool: certain, or a wide gap
    reason: Array  # int32: flags of `tolerances`: why it is not certain, or says little
    tolerance: Array  # float: singular values up to this count as zero
    error: Array  # float: bound on the error of the computed singular values
    largest: Array  # float: σ_1 of J, columns scaled to one size (not with rtol); NaN without SVD
    smallest: Array  # float: σ_rank; by a certificate or deflation a proven bound below it
    gap: Array  # float: smallest / σ_{rank+1}; inf where there is no further one
    about: policy.About  # static: numbers of examples, outputs, parameters; lines that cast

    def __str__(self) -> str:
        """The rank, its bounds and its gap, and why it is not certain."""
        if not isinstance(self.rank, jax.Array) or isinstance(self.rank, jax.core.Tracer):
            return repr(self)
        if jnp.ndim(self.rank):
            return f"ranks {self.rank} ({int(self.certain.sum())} of {self.rank.size} certain)"
        if int(self.reason) & policy.NOT_FINITE:
            return "no rank: the Jacobian is not finite"
        notes = self.notes()
        if self.rank < 0:
            return "".join([f"rank not certified: at most {self.upper}", *notes])
        if self.about.region:
            found = f"rank {self.rank} ({self.word()}) on {self.about.region}"
            return "".join([f"{found}: {self.lower} proven, at most {self.upper}", *notes])
        if jnp.isnan(self.largest) and jnp.isnan(self.smallest):
            found = f"rank {self.rank} ({self.word()}): in exact arithmetic, at most {self.upper}"
            return "".join([found, *notes])
        if jnp.isnan(self.largest):  # by a Cholesky factor
            values = f"σ_rank > {self.smallest:.1e} by a certificate"
            values += "" if jnp.isnan(self.gap) else f", gap > {self.gap:.1e}"
        else:
            values = f"σ₁ {self.largest:.2e}, σ_rank {self.smallest:.2e}, gap {self.gap:.1e}"
        found = f"rank {self.rank} ({self.word()}): {self.lower} proven from below"
        values = f"at most {self.upper}; {values}, error {self.error:.1e}"
        return "".join([f"{found}, {values}", *notes])

    def word(self) -> str:
        """certain, clear or neither."""
        if self.certain:
            return "certain"
        return "clear, not proven" if self.clear else "NOT CERTAIN"

    def notes(self) -> list[str]:
        """Lines on what limits the rank."""
        lines = []
        if int(self.reason) & policy.LIMITED_BY_ROWS:
            rows = self.about.examples * self.about.outputs
            lines.append(
                f"limited by {rows} rows: at least {self.about.enough} inputs needed for "
                f"{self.about.parameters} parameters"
            )
        lines += [f"not proven: {text}" for text in policy.reasons(self.reason)]
        lines += [f"cast: {line}" for line in self.about.casts]
        return ["\n" + line for line in lines]


def of_what_was_given(found: Rank, arguments: PyTree, dtype: DTypeLike) -> Rank:
    """Nothing is proven of arrays that had to be rounded to `dtype` first."""
    narrowed = jnp.zeros((), bool)
    for leaf in jax.tree.leaves(arguments):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)  # float64 stays float64
        given = leaf.dtype
        if jnp.issubdtype(given, jnp.floating) and jnp.finfo(given).nmant > jnp.finfo(dtype).nmant:
            narrowed = narrowed | (leaf.astype(dtype).astype(given) != leaf).any()
    if isinstance(narrowed, jax.Array) and not isinstance(narrowed, jax.core.Tracer):
        if not narrowed:
            return found
    bottom = jnp.where(narrowed, 0, found.lower)
    top = min(found.about.examples * found.about.outputs, found.about.parameters)
    return found._replace(
        lower=bottom,
        upper=jnp.where(narrowed, top, found.upper),
        certain=found.certain & ~narrowed,
        clear=found.clear & ~narrowed,
        reason=found.reason | policy.flag(narrowed, policy.NARROWED),
    )
