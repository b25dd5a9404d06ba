"""Whole calls as one program: made of single operations, each of them would be compiled alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import jax

from jaxinv._interpreter.batch import TracedNetwork
from jaxinv._interpreter.equations import open_jaxpr
from jaxinv._numerics.compiling import compiled, nothing_traced
from jaxinv.typing import PyTree

R = TypeVar("R")


def at_once(
    function: Callable[..., R], network: TracedNetwork, arrays: PyTree, *static: Hashable
) -> R:
    """function(network, arrays, *static), compiled as a whole when called with numbers.

    Inside of a caller's transformation it is part of the caller's program.
    """
    constants = open_jaxpr(network.program.trace.jaxpr)[1]
    if not nothing_traced((*jax.tree.leaves(arrays), *constants)):
        return function(network, arrays, *static)
    found: R = _call(function, network, arrays, static)
    return found


def _called(
    function: Callable[..., R], network: TracedNetwork, arrays: PyTree, static: tuple[Hashable, ...]
) -> R:
    return function(network, arrays, *static)


_call = compiled(_called, static_argnums=(0, 1, 3))


__all__ = ["at_once"]
