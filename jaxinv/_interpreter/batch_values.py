"""Values of the batch domain: where the examples lie, and what is known of primitives."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Value, is_concrete
from jaxinv.errors import UnsupportedOperation
from jaxinv.typing import ArrayLike

# --- values ---------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the examples lie: the middle digit of an axis of length outer · p · inner."""

    axis: int
    outer: int = 1
    inner: int = 1


class Held(Value):
    __slots__ = ("shape",)

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.key = object()


class Shared(Held):
    """Does not depend on x. `uniform`: nor on how many examples there are, or on which it is."""

    __slots__ = ("uniform",)

    def __init__(self, shape: Sequence[int], uniform: bool = True):
        super().__init__(shape)
        self.uniform = uniform


class Apart(Held):
    """Holds examples along `place`, each element a function of its own example alone."""

    __slots__ = ("place",)

    def __init__(self, shape: Sequence[int], place: Place):
        super().__init__(shape)
        self.place = place


class Single(Held):
    """Depends on one example, inside a loop over examples."""

    __slots__ = ()


class Pieces(Held):
    """Columns of an index, some of them the number of the example itself."""

    __slots__ = ("parts",)

    def __init__(self, shape: Sequence[int], parts: Sequence[Operand]):
        super().__init__(shape)
        self.parts = tuple(parts)


class Examples(Protocol):
    """What rules ask of the domain."""

    size: int

    def common(self, values: Sequence[Operand]) -> Place: ...

    def uniform(self, value: Operand, place: Place | None = None) -> bool: ...


# --- what is known of primitives ------------------------------------------------------

ELEMENTWISE = frozenset(
    "add add_any sub mul div rem pow max min atan2 nextafter neg sign abs exp exp2 expm1 log log1p "
    "tanh tan sin cos asin acos atan sinh cosh asinh acosh atanh logistic erf erfc erf_inv sqrt "
    "rsqrt cbrt square integer_pow floor ceil round is_finite not and or xor shift_left "
    "shift_right_arithmetic shift_right_logical population_count clz eq ne lt le gt ge select_n "
    "clamp convert_element_type reduce_precision real imag complex conj lgamma digamma polygamma "
    "igamma igammac regularized_incomplete_beta bessel_i0e bessel_i1e".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "argmax argmin".split()
)
WITHOUT_COUNT = frozenset("reduce_max reduce_min reduce_and reduce_or".split())
CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
MATRICES = frozenset(
    "cholesky eigh eig svd qr geqrf lu triangular_solve schur hessenberg tridiagonal "
    "tridiagonal_solve".split()
)
RESHAPES = frozenset(("reshape", "squeeze", "expand_dims"))
# Operations whose constants are compared between two batch sizes.
ARITHMETIC = ELEMENTWISE - {"convert_element_type"} | {"dot_general", "conv_general_dilated", "pad"}


class Mixed(Exception):
    """The reason why an operation does not keep the examples apart."""


def refusal(eqn: Equation, what: str = "") -> UnsupportedOperation:
    """The error for an operation that mixes examples or tells them apart by position."""
    return eqn.refuse(
        "path semantics",
        "it combines different examples of the batch, or depends on their number or position, so "
        "no path belongs to one example (statistics of the batch, contrastive terms)."
        + (f" Here {what}." if what else ""),
        "use running statistics (evaluation mode), so that fn treats each example apart. If axis 0 "
        "of x does not count examples, say which axis does (batch_axis=1), or that x is one input "
        "(batch_axis=None).",
        what=f"`{eqn.name}` along the batch axis",
    )


class Records:
    """Constants that meet values, and fixed options: what may not change with the batch size."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Equation] = {}

    def add(self, eqn: Equation, inputs: Sequence[Operand], fixed: bool) -> None:
        if eqn.name in ARITHMETIC:
            constants = tuple(_digest(v) for v in inputs if is_concrete(v))
            self.found.setdefault((eqn.name, constants), eqn)
        if fixed and eqn.name in ("slice", "integer_pow"):
            options = tuple(sorted((k, repr(v)) for k, v in eqn.params.items()))
            self.found.setdefault((eqn.name, options), eqn)


def constant_along(array: np.ndarray, axis: int) -> bool:
    """Whether an array does not vary along an axis; NaN is equal to NaN."""
    first = array.take([0], axis)
    return bool(((array == first) | ((array != array) & (first != first))).all())


def _digest(value: ArrayLike) -> Hashable:
    """A constant, without the axes along which it does not vary."""
    if jax.dtypes.issubdtype(jnp.result_type(value), jax.dtypes.extended):
        return "key"
    array = np.asarray(value)
    for axis in range(array.ndim):
        if array.shape[axis] > 1 and constant_along(array, axis):
            array = array.take([0], axis)
    return array.squeeze().shape, str(array.dtype), array.tobytes()
