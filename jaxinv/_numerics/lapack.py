"""Matrix decompositions that run one after another under `vmap`.

On a CPU jaxlib splits a batched LAPACK call over the pool of threads on which it runs itself, and
waits there for the parts. As many independent batched calls at once as the pool has threads wait
for each other for good, however many threads LAPACK has of its own. So a batch is a loop here, in
which nothing is split; on other devices it stays a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxinv.typing import Array, PyTree

T = TypeVar("T")


def _one_at_a_time(function: Callable[[Array], T]) -> Callable[[Array], T]:
    @jax.custom_batching.custom_vmap
    def call(a: Array) -> T:
        return function(a)

    @call.def_vmap
    def _rule(axis_size: int, batched: Sequence[bool], a: Array) -> tuple[T, PyTree]:
        del axis_size, batched
        found = lax.platform_dependent(
            a, cpu=lambda a: lax.map(call, a), default=lambda a: jax.vmap(function)(a)
        )
        return found, jax.tree.map(lambda _: True, found)

    return call


singular_values = _one_at_a_time(lambda a: jnp.linalg.svd(a, compute_uv=False))
thin_svd = _one_at_a_time(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))
eigenvalues = _one_at_a_time(jnp.linalg.eigvalsh)
triangle = _one_at_a_time(lambda a: jnp.linalg.qr(a, mode="r"))
cholesky = _one_at_a_time(jnp.linalg.cholesky)
