"""Values of the path domain: weights, sums over paths, functions of a sign.

Numbers are kept as mantissa times a power of two. Exponents follow the units: an integer for each,
so that path sums of any depth neither overflow nor underflow, and scaling a unit by a power of two
changes no bit of any mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.operations import ELEMENTWISE
from jaxinv._interpreter.walk import Equation, Opaque, Reader, Value, is_concrete
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import UnsupportedOperation
from jaxinv.paths.runs import Runs, spread
from jaxinv.typing import Array, ArrayLike, DType

THEORY = "path semantics"

HOMOGENEITY = (
    "a path's length is a product of weights, which needs every operation along it to be "
    "positively homogeneous of degree one, f(c·x) = c·f(x) for c > 0."
)
REMEDY = (
    "use ReLU-like units, pooling, frozen normalisation and linear layers, or ask for the "
    "path norm of the homogeneous part of the network only."
)


# --- values ---------------------------------------------------------------------------


class Weight(Value):
    """An array computed from parameters alone.

    `length` is its |.|^p. It is None where the elements are not monomials of the parameters (a
    weight-normalised kernel, say): the edge then has a weight, but no parameter is an edge.
    `axes`, where known, are those along which the exponents of the length vary, one by one: the
    exponent is then a sum of a vector for each.
    `apart`, where known, is the sum of the |.|^p of monomials that add up to the value. As a bias
    it is as many parallel edges: h + (b − c) has the paths of (h + b) − c.
    """

    __slots__ = ("value", "length", "leaves", "axes", "apart")

    def __init__(
        self,
        value: Array,
        length: Scaled | None,
        leaves: frozenset[str],
        axes: tuple[int, ...] | None = None,
        apart: Scaled | None = None,
    ):
        self.value, self.length, self.leaves, self.axes = value, length, leaves, axes
        self.apart = apart


class Paths(Value):
    """An array that depends on x: the sum of the lengths of the paths into each element.

    `multiples` maps the key of another value u to a function that gives (paths of u, |slope|^p)
    where this value equals slope·u elementwise. It is how a gate written as
    `where(x > 0, x, a * x)` is recognised. For `runs` see `runs`.
    """

    __slots__ = ("rows", "runs", "multiples")

    def __init__(self, rows: Scaled, multiples: dict | None = None, runs: Runs | None = None):
        self.rows, self.runs, self.multiples = rows, runs or {}, multiples or {}

    @property
    def sums(self) -> Scaled:
        """The sums at all positions; `rows` holds fewer where there are runs."""
        return spread(self.rows, self.runs)


class Code(Paths):
    """An integer or a truth value that is read from x; also a float that takes two values.

    `levels` are the two numbers that it can be, where that is known. Without `numeric` its sums
    mean nothing: it is not a linear function of the inputs, and serves as an index or a condition.
    `columns` are the constant entries of an index vector, None for those that are read from x.
    """

    __slots__ = ("levels", "numeric", "columns")

    def __init__(
        self,
        rows: Scaled,
        multiples: dict | None = None,
        runs: Runs | None = None,
        levels: tuple[float, float] | None = None,
        numeric: bool = True,
    ):
        super().__init__(rows, multiples, runs)
        self.levels, self.numeric = levels, numeric
        self.columns: tuple[Array | None, ...] | None = None


def start(rows: Scaled, dtype: DType, runs: Runs | None = None) -> Paths:
    """An input: one path starts at each element."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return Paths(rows, runs=runs)
    return Code(rows, None, runs, (0.0, 1.0) if dtype == jnp.bool_ else None)


class Sign(Value):
    """A function of the sign of a value: what it is where that is negative, zero, positive."""

    __slots__ = ("branches", "bases")

    def __init__(self, branches: tuple[ArrayLike, ArrayLike, ArrayLike], bases: frozenset):
        self.branches, self.bases = branches, bases


class Same:
    """Arrays compared by identity, and kept alive so that the identity stays theirs."""

    def __init__(self, arrays: Sequence[ArrayLike]):
        self.arrays = tuple(arrays)

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.arrays)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and hash(self) == hash(other)


Tracked = Paths | Sign | Weight
Operand = Tracked | ArrayLike  # the rest are constants
Result = Operand | Opaque | Sequence[Operand | Opaque]


class Semantics(Reader[Operand], Protocol):
    """What rules ask of the domain."""

    p: float
    dtype: DType
    edges_only: bool
    streaming: bool
    sample: bool

    def power(self, value: ArrayLike) -> Scaled: ...

    def default(self, eqn: Equation, *inputs: Operand) -> Result: ...

    def lenient(self) -> Semantics: ...


def edge(domain: Semantics, eqn: Equation, value: Weight | ArrayLike) -> Scaled:
    """|w|^p of a weight or a constant that multiplies a value depending on x."""
    if not isinstance(value, Weight):
        return domain.power(value)
    if value.length is not None:
        return value.length
    if domain.edges_only:
        raise eqn.refuse(
            "κ",
            "κ_e is defined for parameters that are edges of the network; here an edge weight is "
            f"a nonlinear function of {', '.join(sorted(value.leaves))}.",
            "take κ with respect to the effective weights, or close over these leaves if they are "
            "constants (running statistics). path_norm itself is defined.",
            what=f"A weight computed from {', '.join(sorted(value.leaves))}",
        )
    return domain.power(value.value)


def as_paths(domain: Semantics, eqn: Equation, value: Operand) -> Paths:
    """A weight or constant that meets data is an edge from a node that is constantly 1 (a bias)."""
    if isinstance(value, Code) and not value.numeric:
        raise rounding(eqn)
    if isinstance(value, Paths):
        return value
    if isinstance(value, Sign):
        raise not_homogeneous(eqn, "a function of a sign alone is homogeneous of degree zero; ")
    if isinstance(value, Opaque):
        raise value.error
    if is_concrete(value) and not np.isfinite(np.asarray(value, np.float64)).all():
        raise eqn.refuse(
            THEORY,
            "an infinite constant is not an edge weight.",
            "use a finite constant or padding.",
        )
    if isinstance(value, Weight) and value.length is None and value.apart is not None:
        return Paths(value.apart)
    return Paths(edge(domain, eqn, value))


def added(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    """A sum of which no part depends on x: no edge, but as a bias one for each monomial."""
    found = domain.default(eqn, left, right)
    if not isinstance(found, Weight):
        return found
    lengths = [_length_as_bias(domain, v) for v in (left, right)]
    if all(length is not None for length in lengths):
        found.apart = scaled.add([s for s in lengths if s is not None], (True, True))
    return found


def _length_as_bias(domain: Semantics, value: Operand) -> Scaled | None:
    if isinstance(value, Weight):
        return value.apart if value.length is None else value.length
    return None if isinstance(value, Value) else domain.power(value)


def indexed(eqn: Equation) -> UnsupportedOperation:
    """The refusal of indices (integer tokens) that depend on values."""
    return eqn.refuse(
        THEORY,
        "which element is read depends on values, so there is no fixed set of paths.",
        "read single elements (table[ids], take_along_axis) by integers that are inputs, or index "
        "with constants.",
        what=f"`{eqn.name}` of indices that depend on x or on the parameters (a gather)",
    )


def not_homogeneous(eqn: Equation, detail: str = "") -> UnsupportedOperation:
    return eqn.refuse(THEORY, f"{detail}{HOMOGENEITY}", REMEDY)


def rounding(eqn: Equation) -> UnsupportedOperation:
    """The refusal of a number made by integer arithmetic."""
    return eqn.refuse(
        THEORY,
        "integers from x were rounded, divided or looked up, so the number is not linear in them.",
        "use them as indices or compare them (one_hot, where), or compute with floats.",
        what=f"`{eqn.name}` of integer arithmetic on x",
    )


def plain(value: Operand) -> ArrayLike:
    """The array of a weight or a constant."""
    assert not isinstance(value, Paths | Sign)
    return value.value if isinstance(value, Weight) else value


def derived(eqn: Equation, inputs: Sequence[Operand]) -> Weight | list[Weight]:
    """An operation on parameters whose result is not a monomial in them."""
    leaves = frozenset().union(*(v.leaves for v in inputs if isinstance(v, Weight)))
    out = eqn.bind(*map(plain, inputs))
    if eqn.primitive.multiple_results:
        return [Weight(o, None, leaves) for o in out]
    return Weight(out, None, leaves)


def of_signs(eqn: Equation, inputs: Sequence[Operand]) -> Sign:
    """An elementwise operation on functions of one sign is a function of that sign."""
    bases = frozenset.intersection(*(v.bases for v in inputs if isinstance(v, Sign)))
    if not bases or eqn.primitive.multiple_results or eqn.name not in ELEMENTWISE:
        raise not_homogeneous(eqn, "functions of the signs of different values are mixed; ")
    shape = eqn.outputs[0].shape

    def branch(i: int) -> Array:
        arrays = [v.branches[i] if isinstance(v, Sign) else cast(ArrayLike, v) for v in inputs]
        with jax.ensure_compile_time_eval():
            return eqn.bind(*(jnp.broadcast_to(a, shape) for a in arrays))

    return Sign((branch(0), branch(1), branch(2)), bases)


def is_zero(value: object) -> TypeGuard[ArrayLike]:
    return is_concrete(value) and not np.any(np.asarray(value))


def multiples_of(value: Paths) -> dict:
    """What `value` is a multiple of, itself (slope 1) included."""

    def itself() -> tuple[Scaled, Scaled]:
        one = Scaled(jnp.ones((), value.rows.mantissa.dtype), jnp.zeros((), jnp.int32))
        return value.sums, one

    return {value.key: itself, **value.multiples}


def renamed(value: Paths) -> Paths:
    """The same under another name."""
    return Paths(value.rows, multiples_of(value), runs=value.runs)


def shared_bases(sign: Sign, value: Paths) -> list:
    return [key for key in multiples_of(value) if key in sign.bases]
