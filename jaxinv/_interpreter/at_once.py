"""Whole calls as one program: made of single operations, each of them would be compiled alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.equations import open_jaxpr
from jaxinv._interpreter.walk import is_concrete
from jaxinv.typing import PyTree

R = TypeVar("R")

# For fewer numbers compiling takes longer than computing, and is not worth optimising.
_SMALL = 1 << 16
_HASTY = {"xla_backend_optimization_level": 0}


def at_once(
    function: Callable[..., R], network: TracedNetwork, arrays: PyTree, *static: Hashable
) -> R:
    """function(network, arrays, *static), compiled as a whole when called with numbers.

    Inside of a caller's transformation it is part of the caller's program.
    """
    leaves = jax.tree.leaves(arrays)
    constants = open_jaxpr(network.program.trace.jaxpr)[1]
    if not all(map(is_concrete, (*leaves, *constants, jnp.zeros(())))):
        return function(network, arrays, *static)
    small = sum(int(np.prod(jnp.shape(leaf))) for leaf in leaves) < _SMALL
    call = _small if small and jax.default_backend() == "cpu" else _large
    found: R = call(function, network, arrays, static)
    return found


def _called(
    function: Callable[..., R], network: TracedNetwork, arrays: PyTree, static: tuple[Hashable, ...]
) -> R:
    return function(network, arrays, *static)


_large = partial(jax.jit, static_argnums=(0, 1, 3))(_called)
_small = partial(jax.jit, static_argnums=(0, 1, 3), compiler_options=_HASTY)(_called)


__all__ = ["at_once"]
