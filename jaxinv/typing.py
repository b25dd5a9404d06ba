"""Types shared by the public signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

PyTree = Any
"""Any pytree of arrays."""

Params = Any
"""A pytree of real floating-point arrays: the weights of a network."""

Inputs = Any
"""An array, or a pytree of arrays, each with a leading batch axis (`ShapeDtypeStruct` where only
shapes matter)."""

Outputs = Any
"""What a network returns: an array, or a pytree of arrays, each with a leading batch axis."""

Network = Callable[[Params, Inputs], Outputs]
"""A JAX-traceable function `fn(params, x) -> y`."""

Array = jax.Array
"""An array of jax."""

ArrayLike = jax.typing.ArrayLike
"""An array of jax or NumPy, or a number."""

Constant = jax.Array | np.ndarray
"""An array whose numbers are known while a program is read, or traced by jax."""

DType = np.dtype
DTypeLike = jax.typing.DTypeLike
"""A dtype, or what names one: `jnp.float32`, `"float32"`."""

Shape = tuple[int, ...]

Likelihood = Literal["softmax", "gaussian", "bernoulli", "poisson"]
"""How the outputs of a network are read: see `jaxinv.jacobians.whitened`."""

Solver = Literal["auto", "exact", "cr"]
"""How a natural gradient is solved for: see `jaxinv.jacobians.natural_gradient_direction`."""


__all__ = ["Array", "Inputs", "Likelihood", "Network", "Outputs", "Params", "PyTree", "Solver"]
