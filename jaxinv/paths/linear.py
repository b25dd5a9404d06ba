"""Path rules of linear operations: moving elements about, sums, and products with weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv._interpreter.walk import Equation, Value, constants, is_concrete, rule_table
from jaxinv._numerics import scaled as _scaled
from jaxinv._numerics import stream
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import UnsupportedOperation
from jaxinv.paths import cpu_kernels
from jaxinv.paths import exponents as _path_exponents
from jaxinv.paths import runs as _path_runs
from jaxinv.paths.exponents import Moved
from jaxinv.paths.values import (
    REMEDY,
    THEORY,
    Operand,
    Paths,
    Result,
    Same,
    Semantics,
    Sign,
    Tracked,
    Weight,
    added,
    as_paths,
    derived,
    edge,
    indexed,
    is_zero,
    multiples_of,
    not_homogeneous,
    of_signs,
    plain,
    renamed,
    shared_bases,
)
from jaxinv.typing import Array, ArrayLike

RULES, rule = rule_table()


# --- layout: the same operation on lengths and sums ---


def _indexed_by_data(eqn: Equation, inputs: Sequence[Operand]) -> Weight | list[Weight]:
    if not any(isinstance(v, Paths | Sign) for v in inputs):
        return derived(eqn, inputs)
    raise indexed(eqn)


def _lengths(domain: Semantics, parts: Sequence[Operand]) -> list[Scaled] | None:
    """|.|^p of weights and constants; None if one of them is not a monomial of the parameters."""
    lengths = [v.length if isinstance(v, Weight) else domain.power(plain(v)) for v in parts]
    return None if any(length is None for length in lengths) else lengths  # type: ignore[return-value]


def _values_and_leaves(parts: Sequence[Operand]) -> tuple[list[ArrayLike], frozenset[str]]:
    leaves = frozenset().union(*(v.leaves for v in parts if isinstance(v, Weight)))
    return [*map(plain, parts)], leaves


def _sums_like(eqn: Equation, sums: Scaled, *rest: ArrayLike) -> Scaled:
    if eqn.name == "reduce_precision":
        return Scaled(eqn.bind(sums.mantissa), sums.exponent)
    return _path_exponents.rearranged(eqn, sums, *rest)


def _relayout(domain: Semantics, eqn: Equation, value: Tracked, *rest: Operand) -> Result:
    """One operand moved about, never changed: the same operation on everything that it carries."""
    del domain
    fixed = constants(rest)
    if fixed is None:
        return _indexed_by_data(eqn, [value, *rest])
    if isinstance(value, Weight):
        kept = (value.length, value.apart)
        length, apart = (None if s is None else _sums_like(eqn, s, *fixed) for s in kept)
        axes = value.axes if eqn.name == "transpose" else None
        if axes is not None:
            axes = tuple(eqn.params["permutation"].index(axis) for axis in axes)
        return Weight(eqn.bind(value.value, *fixed), length, value.leaves, axes, apart)
    shape = eqn.inputs[0].shape
    if isinstance(value, Sign):
        with jax.ensure_compile_time_eval() if all(map(is_concrete, fixed)) else nullcontext():
            branches = tuple(eqn.bind(jnp.broadcast_to(b, shape), *fixed) for b in value.branches)
        return Sign(branches, frozenset(_moved(eqn, b, fixed) for b in value.bases))

    def moved(entry: Callable) -> Callable:
        def read() -> tuple[Scaled, Scaled]:
            base, slope = entry()
            slope = Scaled(jnp.broadcast_to(slope.mantissa, shape), slope.exponent)
            return _sums_like(eqn, base, *fixed), _sums_like(eqn, slope, *fixed)

        return read

    multiples = {
        _moved(eqn, key, fixed): moved(entry) for key, entry in multiples_of(value).items()
    }
    return Paths(_sums_like(eqn, value.sums, *fixed), multiples)


def _moved(eqn: Equation, key: Hashable, rest: Sequence[ArrayLike]) -> Hashable:
    return ("moved", eqn.primitive, repr(eqn.params), key, Same(rest))


_LAYOUT = (
    *("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "rev", "tile"),
    *("reduce_precision", "gather", "dynamic_slice"),
)
rule(*_LAYOUT)(_relayout)


@rule("convert_element_type")
def _convert(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Sign):
        return of_signs(eqn, [value])
    target = eqn.params["new_dtype"]
    # Numbers may change precision; becoming an integer or a truth value is rounding or a test.
    if not jnp.issubdtype(target, jnp.inexact):
        if isinstance(value, Weight):
            return derived(eqn, [value])
        raise not_homogeneous(eqn, f"conversion to {target} rounds; ")
    if isinstance(value, Weight):
        return Weight(eqn.bind(value.value), value.length, value.leaves, value.axes, value.apart)
    return renamed(value)


def _linear(function: Callable) -> Callable:
    """Sums of elements, each with weight one."""

    def apply(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
        if isinstance(value, Weight):
            return derived(eqn, [value])
        return function(eqn, as_paths(domain, eqn, value))

    return apply


def summed(eqn: Equation, value: Paths) -> Paths:
    """The sum over the axes that `eqn` reduces."""
    axes = eqn.params["axes"]
    rows, runs = _path_runs.counted(value.rows, value.runs, axes)
    return Paths(_scaled.summed(rows, axes), runs=runs)


def summed_in_windows(eqn: Equation, value: Paths) -> Paths:
    """The sum over every window of `eqn`."""
    names = ("window_dimensions", "window_strides", "window_dilation", "padding")
    windows = dict(enumerate(zip(*(eqn.params[name] for name in names), strict=True)))
    dilation = eqn.params["base_dilation"]
    plain = {axis: w for axis, w in windows.items() if dilation[axis] == 1}
    rows, runs = _path_runs.sliding(value.rows, value.runs, plain)
    moving = [axis for axis, w in windows.items() if w != (1, 1, 1, (0, 0))]
    return Paths(_scaled.normalize(_along(eqn, rows, moving)), runs=runs)


def _along(eqn: Equation, sums: Scaled, axes: Sequence[int]) -> Scaled:
    """Sums of elements that lie along some axes."""
    leveled = _scaled.level(sums, axes)
    return Scaled(eqn.bind(leveled.mantissa), leveled.exponent)


def accumulated(eqn: Equation, value: Paths) -> Paths:
    """The running sum of `eqn`."""
    return Paths(_scaled.normalize(_along(eqn, value.sums, [eqn.params["axis"]])))


rule("reduce_sum")(_linear(summed))
rule("reduce_window_sum")(_linear(summed_in_windows))
rule("cumsum")(_linear(accumulated))


def assemble(positions: Callable[[int], Sequence[int]]) -> Callable:
    """Several operands moved into one array; the others (indices, predicates) are constants."""

    def apply(domain: Semantics, eqn: Equation, *inputs: Operand) -> Result:
        where = positions(len(inputs))
        arrays = [inputs[i] for i in where]
        if any(isinstance(v, Value) for i, v in enumerate(inputs) if i not in where):
            return _indexed_by_data(eqn, inputs)

        def bind(parts: Sequence[Operand]) -> Array:
            full = list(inputs)
            for i, part in zip(where, parts, strict=True):
                full[i] = part
            return _bind_arrays(eqn, cast("list[ArrayLike]", full))

        if any(isinstance(v, Paths | Sign) for v in arrays):
            return Paths(_assembled(eqn, bind, [as_paths(domain, eqn, v).sums for v in arrays]))
        lengths = _lengths(domain, arrays)
        if lengths is None:
            return derived(eqn, inputs)
        values, leaves = _values_and_leaves(arrays)
        return Weight(bind(values), _assembled(eqn, bind, lengths), leaves)

    return apply


def _assembled(eqn: Equation, bind: Callable, parts: Sequence[Scaled]) -> Scaled:
    """The parts in one array, each element with the exponent that it had."""
    if eqn.name == "scatter-add":
        parts = [_scaled.level(s) for s in parts]
    if any(jnp.ndim(s.exponent) for s in parts):
        exponents = bind([_scaled.every_exponent(s) for s in parts])
        return Scaled(bind([s.mantissa for s in parts]), exponents)
    aligned, exponent = _scaled.align(parts)
    return Scaled(bind(aligned), exponent)


def _bind_arrays(eqn: Equation, arrays: list[ArrayLike]) -> Array:
    """Bind an assembling operation; scatters carry a jaxpr typed for the original dtype."""
    if not eqn.name.startswith("scatter"):
        return eqn.bind(*arrays)
    return scattered(lax.scatter_add if eqn.name == "scatter-add" else lax.scatter, eqn, arrays)


def scattered(scatter: Callable, eqn: Equation, arrays: Sequence[ArrayLike]) -> Array:
    """`scatter` to the places of another scatter."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    return scatter(*arrays, **{name: eqn.params[name] for name in names})


rule("concatenate", "stack")(assemble(range))
rule("pad", "dynamic_update_slice")(assemble(lambda n: (0, 1)))
rule("scatter", "scatter_add")(assemble(lambda n: (0, 2)))


@rule("split", "unstack")
def _split(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        values = eqn.bind(value.value)
        if value.length is None:
            return [Weight(v, None, value.leaves) for v in values]
        parts = _split_scaled(eqn, value.length)
        return [Weight(v, s, value.leaves) for v, s in zip(values, parts, strict=True)]
    return [Paths(s) for s in _split_scaled(eqn, as_paths(domain, eqn, value).sums)]


def _split_scaled(eqn: Equation, s: Scaled) -> list[Scaled]:
    mantissas = eqn.bind(s.mantissa)
    if not jnp.ndim(s.exponent):
        return [Scaled(m, s.exponent) for m in mantissas]
    exponents = eqn.bind(_scaled.every_exponent(s))
    return [Scaled(m, e) for m, e in zip(mantissas, exponents, strict=True)]


# --- products: edges in series ---


def _bilinear(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    """Contractions of data with weights: the same contraction of sums with |w|^p."""
    if isinstance(left, Paths | Sign) and isinstance(right, Paths | Sign):
        raise _product_of_data(eqn)
    if not isinstance(left, Paths | Sign) and not isinstance(right, Paths | Sign):
        if is_zero(left) or is_zero(right):
            return jnp.zeros(eqn.outputs[0].shape, eqn.outputs[0].dtype)
        return derived(eqn, [left, right])
    weight_is_right = isinstance(left, Paths | Sign)
    data, weight = (left, right) if weight_is_right else (right, left)
    assert not isinstance(weight, Paths | Sign)
    if isinstance(left, Paths) and eqn.name == "conv_general_dilated" and left.runs:
        return _convolution(domain, eqn, left, weight)
    sums = as_paths(domain, eqn, data).sums
    return Paths(_contracted(domain, eqn, sums, weight, weight_is_right))


def _contracted(
    domain: Semantics,
    eqn: Equation,
    sums: Scaled,
    weight: Weight | ArrayLike,
    weight_is_right: bool,
) -> Scaled:
    """The contraction with |w|^p, normalised, after exponents have moved between the two."""
    length = edge(domain, eqn, weight)
    axes = weight.axes if isinstance(weight, Weight) and weight.length is not None else None
    if not isinstance(weight, Weight) and jnp.ndim(length.exponent):
        axes = None if is_concrete(weight) else _scaled.gauged_axes(jnp.shape(weight))
    part = _path_exponents.moved(eqn, sums, length, axes, weight_is_right)
    mantissa = _streamed(domain, eqn, part, weight, weight_is_right) if domain.streaming else None
    operands = (part.data, part.weight) if weight_is_right else (part.weight, part.data)
    if mantissa is None:
        mantissa = cpu_kernels.product(eqn, *operands, weight_is_right)
    if mantissa is None:
        mantissa = eqn.bind(*operands, **_EXACT)
    if part.plan is None:
        return _scaled.normalize(Scaled(mantissa, part.exponent))
    value = weight.value if isinstance(weight, Weight) else jnp.asarray(weight)
    return _path_exponents.checked(mantissa, sums, value, part, domain.sample)


_EXACT = {"precision": lax.Precision.HIGHEST, "preferred_element_type": None}


def _convolution(
    domain: Semantics, eqn: Equation, value: Paths, kernel: Weight | ArrayLike
) -> Paths:
    """A convolution of sums with runs: that of what is kept of them."""
    names = ("window_strides", "rhs_dilation", "padding", "lhs_dilation")
    numbers, out = eqn.params["dimension_numbers"], eqn.outputs[0]
    sizes = [eqn.inputs[1].shape[axis] for axis in numbers.rhs_spec[2:]]
    windows, to = {}, {}
    for axis, out_axis, size, *window, dilation in zip(
        numbers.lhs_spec[2:],
        numbers.out_spec[2:],
        sizes,
        *(eqn.params[name] for name in names),
        strict=True,
    ):
        if dilation == 1:
            windows[axis], to[axis] = (size, *window), out_axis
    rows, runs = _path_runs.sliding(value.rows, value.runs, windows)
    runs = {to[axis]: run for axis, run in runs.items()}
    shape = list(out.shape)
    for axis, run in runs.items():
        shape[axis] -= run.length - run.kept
    smaller = eqn._replace(outputs=(jax.ShapeDtypeStruct(shape, out.dtype),))
    return Paths(_contracted(domain, smaller, rows, kernel, True), runs=runs)


rule("dot_general", "conv_general_dilated")(_bilinear)


def _streamed(
    domain: Semantics, eqn: Equation, part: Moved, weight: Operand, weight_is_right: bool
) -> Array | None:
    """A matrix-vector product that reads a large matrix once; None where this is not one."""
    if eqn.name != "dot_general" or domain.p not in (1, 2):
        return None
    contracting, batch = eqn.params["dimension_numbers"]
    (data_axis, *_), (axis, *more) = contracting if weight_is_right else contracting[::-1]
    one_row = part.data.size == part.data.shape[data_axis]
    matrix = weight.value if isinstance(weight, Weight) else None
    if matrix is not None and jnp.iscomplexobj(matrix):
        return None
    if matrix is None or not part.separate or not one_row or batch[0] or more:
        return None
    if matrix.ndim != 2 or matrix.size < stream.SMALLEST:
        return None
    p = int(domain.p)
    along, across = (_scaled.power_of_two(-(k // p), domain.dtype) for k in part.gauges)
    scales = (along, across) if axis == 0 else (across, along)
    out = stream.contract(jnp.ravel(part.data), part.weight, matrix, scales, p, axis)
    return out.reshape(eqn.outputs[0].shape)


def _product_of_data(eqn: Equation) -> UnsupportedOperation:
    return eqn.refuse(
        THEORY,
        "it multiplies two values that both depend on x, so the result is not homogeneous of "
        "degree one: no single path carries it (attention, x·x, gated units).",
        f"{REMEDY} A mask must be boolean, as in where(mask > 0, h, 0).",
        what=f"`{eqn.name}` of two values that both depend on x",
    )


@rule("mul")
def _mul(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    if isinstance(left, Paths) and isinstance(right, Paths):
        raise _product_of_data(eqn)
    if isinstance(left, Sign) and isinstance(right, Paths):
        left, right = right, left
    if isinstance(left, Paths) and isinstance(right, Sign):
        if not shared_bases(right, left):
            raise eqn.refuse(
                THEORY,
                "a value is multiplied by a function of the sign of another value, or of a "
                "threshold on it that could not be proved to be its own sign.",
                "gate a value by its own sign: where(x > 0, x, a * x).",
            )
        slopes = [domain.power(right.branches[0]), domain.power(right.branches[2])]
        return Paths(_scaled.multiply(left.sums, _scaled.maximum(slopes)))
    if not isinstance(left, Paths) and not isinstance(right, Paths):
        if isinstance(left, Sign) or isinstance(right, Sign):
            return domain.default(eqn, left, right)
        return _weight_product(domain, eqn, left, right)
    if not isinstance(left, Paths):
        left, right = right, left
    assert isinstance(left, Paths) and not isinstance(right, Paths | Sign)
    return _times(left, edge(domain, eqn, right))


def _times(value: Paths, slope: Scaled) -> Paths:
    """slope · value, remembering whose multiple it is."""

    def scaled(entry: Callable) -> Callable:
        def read() -> tuple[Scaled, Scaled]:
            base, other = entry()
            return base, _scaled.multiply(other, slope)

        return read

    multiples = {key: scaled(entry) for key, entry in multiples_of(value).items()}
    (rows, factor), runs = _path_runs.joined([(value.rows, value.runs), (slope, {})])
    return Paths(_scaled.normalize(_scaled.multiply(rows, factor)), multiples, runs=runs)


def _weight_product(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    """A product of parameters elementwise is two edges in series."""
    parts = (left, right)
    lengths = _lengths(domain, parts)
    if lengths is None:
        return derived(eqn, parts)
    values, leaves = _values_and_leaves(parts)
    return Weight(eqn.bind(*values), _scaled.multiply(*lengths), leaves)


@rule("div")
def _div(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    if isinstance(right, Paths | Sign):
        if isinstance(left, Sign | Paths) and isinstance(right, Paths):
            raise eqn.refuse(
                THEORY,
                "it divides by a value that depends on x (normalisation by statistics of the "
                "data), so the result is not homogeneous of degree one.",
                "use running statistics (evaluation mode) instead of those of the batch.",
            )
        return domain.default(eqn, left, right)
    if isinstance(right, Weight):
        inverse = Weight(1 / right.value, None, right.leaves)
        if isinstance(left, Paths):
            return _times(left, edge(domain, eqn, inverse))
        if isinstance(left, Sign):
            return domain.default(eqn, left, inverse)
        return _quotient(left, inverse)
    if is_concrete(right) and not np.all(np.asarray(right)):
        raise eqn.refuse(
            THEORY, "it divides by a constant that is 0.", "check that constant.",
            what="A division by zero",
        )  # fmt: skip
    factor = 1 / (np.asarray(right, np.float64) if is_concrete(right) else jnp.asarray(right))
    if isinstance(left, Paths):
        return _times(left, edge(domain, eqn, factor))
    if isinstance(left, Weight) and left.length is not None:
        length = _scaled.multiply(left.length, domain.power(factor))
        return Weight(left.value * factor, length, left.leaves)
    return domain.default(eqn, left, 1 / factor)


def _quotient(left: Operand, inverse: Weight) -> Weight:
    leaves = inverse.leaves | (left.leaves if isinstance(left, Weight) else frozenset())
    return Weight(jnp.asarray(plain(left) * inverse.value), None, leaves)


@rule("neg")
def _neg(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    if isinstance(value, Weight):
        return Weight(-value.value, value.length, value.leaves, value.axes, value.apart)
    if isinstance(value, Sign):
        return of_signs(eqn, [value])
    return renamed(value)


@rule("integer_pow")
def _integer_pow(domain: Semantics, eqn: Equation, value: Tracked) -> Result:
    y = eqn.params["y"]
    if isinstance(value, Paths):
        if y == 1:
            return renamed(value)
        raise _product_of_data(eqn) if y > 1 else not_homogeneous(eqn)
    if isinstance(value, Sign):
        return of_signs(eqn, [value])
    if value.length is None or y < 1:
        return derived(eqn, [value])
    length = value.length
    for _ in range(y - 1):
        length = _scaled.multiply(length, value.length)
    return Weight(eqn.bind(value.value), length, value.leaves)


rule("square")(lambda domain, eqn, value: _mul(domain, eqn, value, value))


# --- sums: paths side by side ---


@rule("add", "sub", "add_any")
def _add(domain: Semantics, eqn: Equation, left: Operand, right: Operand) -> Result:
    for one, other in ((left, right), (right, left)):
        if is_zero(one) and np.ndim(one) == 0 and isinstance(other, Weight | Paths):
            return _neg(domain, eqn, other) if eqn.name == "sub" and other is right else (
                renamed(other) if isinstance(other, Paths) else other
            )  # fmt: skip
    if isinstance(left, Paths) or isinstance(right, Paths):
        paths = [as_paths(domain, eqn, v) for v in (left, right)]
        terms, runs = _path_runs.joined([(v.rows, v.runs) for v in paths])
        edges = tuple(not isinstance(v, Paths) for v in (left, right))
        return Paths(_scaled.add(terms, edges), runs=runs)
    return added(domain, eqn, left, right)
