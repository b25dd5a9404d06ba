"""Does a function treat each example of a batch apart from the others?

Path sums are computed on a batch of one. A function that subtracts the mean of its batch is another
function there, and its path norm would be a silently wrong number. So `fn` is traced once more, on
shapes alone, with a batch size that is a prime found nowhere else: an axis whose length it divides
is a batch axis, and nothing may be summed, sorted or multiplied along one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxinv._checks import calling
from jaxinv._jaxpr import equation, live_equations, sub_jaxprs
from jaxinv.typing import Network, Params, PyTree


def _prime_foreign_to(lengths: set[int]) -> int:
    """A prime above 1000 that divides none of the given lengths."""
    candidate = 1009
    while any(n % candidate == 0 for n in lengths) or any(candidate % k == 0 for k in range(2, 32)):
        candidate += 2
    return candidate


def check_examples_apart(fn: Network, params: Params, x: PyTree) -> None:
    """Raise `UnsupportedOperation` if an output for one example depends on other examples.

    `x` holds the shapes of a batch of one. Functions whose outputs have no batch axis (a sum over
    the batch, say) pass: a batch of one is what they are asked about.
    """
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(x)]
    size = _prime_foreign_to({n for leaf in leaves for n in jnp.shape(leaf)} - {0})
    many = jax.tree.map(lambda s: jax.ShapeDtypeStruct((size, *s.shape[1:]), s.dtype), x)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), params)
    with calling("fn(params, x)", shapes, many, remedy="It must accept any batch size."):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(shapes, many)
    if any(s.shape[:1] != (size,) for s in jax.tree.leaves(out)):
        return
    num_params = len(jax.tree.leaves(params))
    num_inputs = len(jax.tree.leaves(x))
    dependent = [False] * num_params + [True] * num_inputs
    _check(closed, dependent, [True] * len(jax.tree.leaves(out)), size, ())


def _check(
    closed: Any,
    depends: Sequence[bool],
    needed: Sequence[bool],
    size: int,
    callers: tuple[Any, ...],
) -> None:
    """Walk a jaxpr, following what depends on x and is needed for the outputs."""
    jaxpr = getattr(closed, "jaxpr", closed)
    tainted = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}

    def depends_on_x(v: Any) -> bool:
        return not isinstance(v, jex.Literal) and v in tainted

    for raw, wanted in live_equations(jaxpr, needed):
        flags = [depends_on_x(v) for v in raw.invars]
        if not any(flags):
            continue
        inner = sub_jaxprs(raw, wanted)
        if inner is None:
            _check_equation(raw, flags, size, callers)
            tainted.update(raw.outvars)
            continue
        for body, skipped, needed_inside in inner:
            # A carry may come to depend on x only after the first round of a loop: take all inputs
            # as dependent there. A constant that has the foreign prime in its shape is unlikely.
            arguments = [True] * (len(flags) - skipped)
            _check(body, arguments, needed_inside, size, (raw, *callers))
        tainted.update(raw.outvars)


def _mixed_axes(name: str, params: dict[str, Any], operand: int) -> Sequence[int]:
    """The axes of an operand along which an operation combines or reorders elements."""
    if name == "dot_general":
        return params["dimension_numbers"][0][operand]
    if name.startswith(("reduce_window", "select_and")):
        return [i for i, n in enumerate(params["window_dimensions"]) if n > 1]
    if name.startswith(("reduce_", "arg")):
        return params.get("axes", ())
    if name.startswith("cum"):
        return [params["axis"]]
    if name == "sort":
        return [params["dimension"]]
    if name == "rev":
        return params["dimensions"]
    return ()


def _check_equation(raw: Any, flags: list[bool], size: int, callers: tuple[Any, ...]) -> None:
    for i, (v, depends) in enumerate(zip(raw.invars, flags, strict=True)):
        shape = getattr(v.aval, "shape", ())
        if not depends:
            continue
        for axis in _mixed_axes(raw.primitive.name, raw.params, i):
            if shape[axis] and shape[axis] % size == 0:
                raise equation(raw, callers).refuse(
                    "path semantics",
                    "it combines different examples of the batch, so no path belongs to one "
                    "example (statistics of the batch, contrastive terms).",
                    "use running statistics (evaluation mode); fn must treat each example apart.",
                    what=f"`{raw.primitive.name}` along the batch axis",
                )
