"""Log-determinants of positive semi-definite matrices that may be singular."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.lapack import cholesky
from jaxinv.typing import Array


@jax.custom_jvp
def log_det(a: Array) -> Array:
    """log det of a positive semi-definite matrix; -inf, of gradient 0, if singular to rounding."""
    return _factor(a)[0]


@log_det.defjvp
def _log_det_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (a,), (da,) = primals, tangents
    value, factor, scale, regular = _factor(a)
    eye = jnp.eye(len(a), dtype=a.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.where(regular, factor, eye), True), eye)
    inverse = jnp.where(regular, inverse * scale[:, None] * scale, 0)
    return value, jnp.vdot(inverse, da, precision=lax.Precision.HIGHEST)


def _factor(a: Array) -> tuple[Array, Array, Array, Array]:
    diagonal = jnp.diagonal(a)
    scale = lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))
    factor = cholesky(a * scale[:, None] * scale)
    pivots = jnp.diagonal(factor) ** 2
    # A pivot is at least the smallest eigenvalue, and a singular matrix has one of about this size.
    floor = policy.counts_from(len(a), len(a), a.dtype)
    regular = jnp.isfinite(factor).all() & (pivots > floor).all()
    logs = jnp.log(jnp.where(regular, pivots, 1)).sum() - 2 * jnp.log(scale).sum()
    return jnp.where(regular, logs, -jnp.inf), factor, scale, regular
