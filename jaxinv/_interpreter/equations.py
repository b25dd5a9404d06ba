"""Equations of a jaxpr and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.extend.core as jex
import numpy as np

from jaxinv._interpreter.source import part_of, remedy_for, short_type, source_line, written_as
from jaxinv._numerics.varying import vary_alike
from jaxinv.errors import UnsupportedOperation
from jaxinv.typing import ArrayLike

Primitive = jex.Primitive
AnyJaxpr = jex.Jaxpr | jex.ClosedJaxpr


class Aval(Protocol):
    """The shape and dtype of a value: an abstract array of jax, or a `ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...


def open_jaxpr(jaxpr: AnyJaxpr) -> tuple[jex.Jaxpr, Sequence[ArrayLike]]:
    """(open jaxpr, consts) of a Jaxpr or a ClosedJaxpr; newer jax merges the two."""
    opened = cast(jex.Jaxpr, getattr(jaxpr, "jaxpr", jaxpr))
    return opened, getattr(jaxpr, "consts", ())


class Equation(NamedTuple):
    """One equation of a jaxpr, as the rules see it."""

    primitive: jex.Primitive
    params: dict[str, Any]
    inputs: tuple[Aval, ...]
    outputs: tuple[Aval, ...]
    raws: tuple[jex.JaxprEqn, ...]  # the equation of the jaxpr and those that called it

    @property
    def name(self) -> str:
        return str(self.primitive.name)

    def bind(self, *values: ArrayLike, **changed: object) -> Any:
        """The same operation on other arrays."""
        params = self.primitive.get_bind_params(self.params | changed)
        return self.primitive.bind(*vary_alike(*values), **params)

    @property
    def source(self) -> str:
        """The source line that wrote the operation."""
        return source_line(self.raws)

    @property
    def written(self) -> str:
        """The operation in the user's words: gelu, softmax, LayerNorm; else its own name."""
        return written_as(self.raws) or self.name

    def refuse(
        self, theory: str, why: str, remedy: str, what: str | None = None
    ) -> UnsupportedOperation:
        """An `UnsupportedOperation` that says what, where, why, and what to do."""
        shapes = ", ".join(short_type(a) for a in self.inputs)
        results = ", ".join(short_type(a) for a in self.outputs)
        what = part_of(what or f"`{self.name}` of values that depend on x", self.name, self.written)
        return UnsupportedOperation(
            f"{what} is not covered by {theory}.\n"
            f"  what:  {self.name}: {shapes} -> {results}\n"
            f"  where: {self.source}\n"
            f"  why:   {why}\n"
            f"  do:    {remedy_for(self.written, theory, remedy)}"
        )


def aval_of(atom: jax.core.Atom) -> Aval:
    """The shape and dtype of a variable or literal."""
    return cast(Aval, atom.aval)


def equation(raw: jex.JaxprEqn, callers: Sequence[jex.JaxprEqn] = ()) -> Equation:
    """An equation of a jaxpr, with the ones that called it, innermost first."""
    return Equation(
        raw.primitive,
        raw.params,
        tuple(map(aval_of, raw.invars)),
        tuple(map(aval_of, raw.outvars)),
        (raw, *callers),
    )
