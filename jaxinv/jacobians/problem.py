"""A network and its inputs, checked once and passed down: the map of vectors of a Jacobian."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import check_inputs, check_params, leaf_names
from jaxinv._interpreter.batch import TracedNetwork, leading, traced_network
from jaxinv._numerics import scaled
from jaxinv.errors import InvalidInput
from jaxinv.typing import DTypeLike, Inputs, Network, Params


class Problem(NamedTuple):
    """A checked network with its inputs, and sizes that are known before anything is computed."""

    fn: TracedNetwork
    x: Inputs  # with the batch axis in front
    examples: int
    outputs: int  # per example
    parameters: int
    dtype: DTypeLike

    @property
    def apart(self) -> bool:
        """Whether no output depends on another example."""
        return self.fn.apart

    @property
    def rows(self) -> int:
        """Of the Jacobian."""
        return self.examples * self.outputs


def problem_of(fn: Network, params: Params, x: Inputs, batch_axis: int | None = 0) -> Problem:
    """Check the arguments, trace `fn` as it is now, and read off the sizes of the Jacobian.

    A `TracedNetwork` has been checked, and has its batch axis in front.
    """
    if not isinstance(fn, TracedNetwork):
        check_params(params)
        x = leading(x, batch_axis)
        check_inputs(x, values=True, finite=True)
    leaves = jax.tree.leaves(x)
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        shapes = dict(zip(leaf_names(x, "x"), map(jnp.shape, leaves), strict=True))
        raise InvalidInput(
            f"x must hold arrays with one common leading batch axis of length >= 1, not {shapes}."
        )
    (examples,) = sizes
    network = traced_network(fn, params, x, batch_axis)
    out = network.program.outputs
    ys, expected = jax.tree.leaves(out), 1 if network.apart else examples
    for name, y in zip(leaf_names(out, "fn(params, x)"), ys, strict=True):
        if y.shape[:1] != (expected,) or not jnp.issubdtype(y.dtype, jnp.floating):
            raise InvalidInput(
                f"{name} has shape {y.shape} and dtype {y.dtype}. A Jacobian needs real "
                f"floating-point outputs with the leading batch axis of x ({expected}). If fn "
                "takes x as one input, without a batch axis, say batch_axis=None."
            )
    if not ys:
        raise InvalidInput("fn(params, x) returns no arrays, so there is no Jacobian.")
    weights = jax.tree.leaves(params)
    sizes_of = {"columns": [jnp.shape(w) for w in weights], "rows": [y.shape for y in ys]}
    for what, found in sizes_of.items():
        if not sum(int(np.prod(shape)) for shape in found):
            raise InvalidInput(
                f"the Jacobian has no {what}: params has shapes {sizes_of['columns']} and fn's "
                f"output {sizes_of['rows']}. Neither may be empty."
            )
    return Problem(
        network,
        x,
        int(examples or 0),
        sum(int(np.prod(y.shape[1:])) for y in ys),
        sum(int(np.prod(jnp.shape(leaf))) for leaf in weights),
        scaled.working_dtype([*weights, *ys]),
    )
