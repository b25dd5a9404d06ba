"""Examples in chunks, so that what is computed of them never lies in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

from jaxinv.typing import Inputs

T = TypeVar("T")


def fold_chunks(x: Inputs, start: T, add: Callable[[T, Inputs], T], chunk: int) -> T:
    """Fold `add(state, examples)` over x, `chunk` examples at a time, fewer in the last step.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv._numerics.chunks import fold_chunks
        >>> fold_chunks(jnp.arange(5.0), jnp.zeros(()), lambda s, x: s + x.sum(), 2).item()
        10.0
    """
    examples = len(jax.tree.leaves(x)[0])
    chunk = min(chunk, examples)
    whole = examples // chunk * chunk
    chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:]), x)
    state, _ = lax.scan(lambda s, part: (add(s, part), None), start, chunks)
    if whole < examples:
        state = add(state, jax.tree.map(lambda a: a[whole:], x))
    return state
