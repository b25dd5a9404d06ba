"""The inputs that a functional dimension is asked of: all of Rⁿ, a box, or what lies between data.

A region gives segments that lie in it. The boundaries of gates are looked for along them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import check_inputs, leaf_names
from jaxinv.errors import InvalidInput
from jaxinv.typing import Array, Inputs

Kind = Literal["everywhere", "box", "hull", "segments", "inputs"]
# Inputs far from 0 and near it: the sizes at which gates change depend on biases and weights.
_DECADES = (-1.0, 1.0)
# Points of a convex hull are mixtures of this many inputs.
_MIXED = 3


class Region(NamedTuple):
    """A set of inputs; made by the functions of this module.

    `low` and `high` are the corners of a box; otherwise both are the given inputs, or examples of
    their shape.
    """

    kind: str
    low: Inputs
    high: Inputs

    def __str__(self) -> str:
        """The region in words."""
        count = jnp.shape(jax.tree.leaves(self.low)[0])[0]
        return {
            "everywhere": "all inputs",
            "box": "all inputs of a box",
            "hull": f"the convex hull of {count} inputs",
            "segments": f"the segments between {count} inputs",
        }[self.kind]


def everywhere(x: Inputs) -> Region:
    """All of Rⁿ.

    Args:
        x: inputs with a leading batch axis, or `jax.ShapeDtypeStruct`s: only shapes are used.

    Returns:
        A `Region` for `functional_dimension`.

    Raises:
        InvalidInput: for inputs that are not floating point.

    Example:
        >>> import numpy as np
        >>> print(everywhere(np.zeros((1, 3))))
        all inputs
    """
    shapes = jax.tree.map(lambda a: np.zeros((1, *jnp.shape(a)[1:])), x)
    return Region("everywhere", _checked(x, shapes), shapes)


def box(low: Inputs, high: Inputs) -> Region:
    """All inputs between two corners.

    Args:
        low, high: inputs without a batch axis, low < high at each element.

    Returns:
        A `Region` for `functional_dimension`.

    Raises:
        InvalidInput: for corners of different shapes, or low >= high somewhere.

    Example:
        >>> import numpy as np
        >>> print(box(np.zeros(3), np.ones(3)))
        all inputs of a box
    """
    same = str(jax.tree.structure(low)) == str(jax.tree.structure(high))
    pairs = list(zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=False))
    if not same or any(jnp.shape(a) != jnp.shape(b) for a, b in pairs):
        raise InvalidInput("The corners of a box must have one structure and the same shapes.")
    if not all(bool(np.all(np.asarray(a) < np.asarray(b))) for a, b in pairs):
        raise InvalidInput(
            "A box needs low < high at each element. Inputs that never vary span no volume; "
            "ask for segments(x) or hull(x) of given inputs instead."
        )
    corners = [jax.tree.map(lambda a: np.asarray(a)[None], corner) for corner in (low, high)]
    return Region("box", _checked(corners[0], corners[0]), _checked(corners[1], corners[1]))


def hull(x: Inputs) -> Region:
    """The convex hull of given inputs.

    Args:
        x: at least two inputs, with a leading batch axis.

    Returns:
        A `Region` for `functional_dimension`.

    Raises:
        InvalidInput: for fewer than two inputs, or inputs that are not floating point.

    Example:
        >>> import numpy as np
        >>> print(hull(np.eye(4)))
        the convex hull of 4 inputs
    """
    return _between("hull", x)


def segments(x: Inputs) -> Region:
    """All segments between two of the given inputs.

    Args:
        x: at least two inputs, with a leading batch axis.

    Returns:
        A `Region` for `functional_dimension`.

    Raises:
        InvalidInput: for fewer than two inputs, or inputs that are not floating point.

    Example:
        >>> import numpy as np
        >>> print(segments(np.eye(4)))
        the segments between 4 inputs
    """
    return _between("segments", x)


def _between(kind: Kind, x: Inputs) -> Region:
    x = _checked(x, x)
    if min(jnp.shape(a)[0] for a in jax.tree.leaves(x)) < 2:
        raise InvalidInput(f"{kind}(x) needs at least two inputs, with a leading batch axis.")
    return Region(kind, x, x)


def _checked(x: Inputs, values: Inputs) -> Inputs:
    check_inputs(values, values=True, finite=True)
    for name, leaf in zip(leaf_names(x, "x"), jax.tree.leaves(x), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InvalidInput(
                f"{name} has dtype {jnp.result_type(leaf)}: between whole numbers there are no "
                "inputs, so gates have no boundaries there. Ask for jacobian_rank of given inputs."
            )
    return values


def example_of(region: Region) -> Inputs:
    """One input, without the batch axis, for its shape."""
    return jax.tree.map(lambda a: a[0], region.low)


def draw(region: Region, key: Array, count: int) -> tuple[Inputs, Inputs]:
    """The two ends of segments within the region, and the same for the same key."""
    leaves, tree = jax.tree.flatten(region.low)
    keys = jax.random.split(key, 3)
    if region.kind in ("hull", "segments"):
        ends = [_mixtures(region, k, count) for k in keys[:2]]
        return ends[0], ends[1]

    def inputs(key: Array) -> Inputs:
        found = []
        for i, (low, high) in enumerate(zip(leaves, jax.tree.leaves(region.high), strict=True)):
            own = jax.random.fold_in(key, i)
            shape = (count, *jnp.shape(low)[1:])
            if region.kind == "box":
                part = jax.random.uniform(own, shape, low.dtype)
                found.append(low + (high - low) * part)
            else:
                power = jax.random.uniform(keys[2], (count,), low.dtype, *_DECADES)
                size = (10**power).reshape(-1, *[1] * (len(shape) - 1))
                found.append(size * jax.random.normal(own, shape, low.dtype))
        return jax.tree.unflatten(tree, found)

    return inputs(keys[0]), inputs(keys[1])


def _mixtures(region: Region, key: Array, count: int) -> Inputs:
    """Given inputs, or convex mixtures of a few."""
    given = jnp.shape(jax.tree.leaves(region.low)[0])[0]
    mixed = _MIXED if region.kind == "hull" else 1
    which = jax.random.randint(key, (count, mixed), 0, given)
    weights = jax.random.exponential(key, (count, mixed))
    weights = weights / weights.sum(1, keepdims=True)

    def mix(leaf: Array) -> Array:
        chosen = jnp.asarray(leaf)[which]
        shaped = weights.reshape(count, mixed, *[1] * (chosen.ndim - 2)).astype(chosen.dtype)
        return chosen[:, 0] if mixed == 1 else (chosen * shaped).sum(1)

    return jax.tree.map(mix, region.low)
