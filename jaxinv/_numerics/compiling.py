"""`jax.jit` that optimises less where compiling takes longer than computing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

R = TypeVar("R")

_FEW = 1 << 16
_HASTY = {"xla_backend_optimization_level": 0}


def nothing_traced(values: Iterable[object]) -> bool:
    """Whether all values are known, and no transformation is under way."""
    return not any(isinstance(v, jax.core.Tracer) for v in (*values, jnp.zeros(())))


def compiled(function: Callable[..., R], static_argnums: tuple[int, ...] = ()) -> Callable[..., R]:
    """The function under `jax.jit`; of few known numbers on a CPU without costly optimisation."""
    thorough = jax.jit(function, static_argnums=static_argnums)
    # Options of the compiler may only be given to a program that is no part of another.
    hasty = jax.jit(function, static_argnums=static_argnums, compiler_options=_HASTY)

    @functools.wraps(function)
    def call(*arguments: object) -> R:
        numbers = [a for i, a in enumerate(arguments) if i not in static_argnums]
        leaves = jax.tree.leaves(numbers)
        few = sum(int(np.prod(jnp.shape(leaf))) for leaf in leaves) < _FEW
        alone = few and jax.default_backend() == "cpu" and nothing_traced(leaves)
        return (hasty if alone else thorough)(*arguments)

    return call


__all__ = ["compiled", "nothing_traced"]
