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


def one_at_a_time(function: Callable[..., T]) -> Callable[..., T]:
    """`function` of pytrees, which under `vmap` is a loop over the batch on a CPU.

    A member of large arrays also stays in the cache that way.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv._numerics.lapack import one_at_a_time
        >>> product = one_at_a_time(lambda a, b: a @ b)
        >>> jax.vmap(product, (0, None))(jnp.ones((2, 3)), jnp.ones(3))
        Array([3., 3.], dtype=float32)
    """

    @jax.custom_batching.custom_vmap
    def call(*arguments: PyTree) -> T:
        return function(*arguments)

    @call.def_vmap
    def _rule(axis_size: int, batched: Sequence[PyTree], *arguments: PyTree) -> tuple[T, PyTree]:
        leaves, tree = jax.tree.flatten(arguments)
        flags = jax.tree.leaves(tuple(batched))
        moving = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

        def given(moving: list[Array]) -> Sequence[PyTree]:
            some = iter(moving)
            joined = [next(some) if f else leaf for leaf, f in zip(leaves, flags, strict=True)]
            return jax.tree.unflatten(tree, joined)

        def loop(moving: list[Array]) -> T:
            return lax.map(lambda some: call(*given(some)), moving)

        def together(moving: list[Array]) -> T:
            member = lambda some: function(*given(some))  # noqa: E731
            return jax.vmap(member, axis_size=axis_size)(moving)

        found = lax.platform_dependent(moving, cpu=loop, default=together)
        return found, jax.tree.map(lambda _: True, found)

    return call


singular_values = one_at_a_time(lambda a: jnp.linalg.svd(a, compute_uv=False))
thin_svd = one_at_a_time(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))
eigenvalues = one_at_a_time(jnp.linalg.eigvalsh)
triangle = one_at_a_time(lambda a: jnp.linalg.qr(a, mode="r"))
orthonormal = one_at_a_time(lambda a: jnp.linalg.qr(a)[0])
# Of symmetric matrices: nothing is averaged first.
cholesky = one_at_a_time(lambda a: jnp.linalg.cholesky(a, symmetrize_input=False))
