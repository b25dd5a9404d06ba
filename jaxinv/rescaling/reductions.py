"""Scaling rules of reductions, sorting and pooling: what is compared or added has one scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Result, rule_table
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.cases import MOST_CASES, Cases
from jaxinv.rescaling.values import Scale, Scaling, minus, relaid, times

RULES, rule = rule_table()


def _dropped(value: Scale, axes: Sequence[int], shape: Sequence[int]) -> Scale:
    def drop(a: np.ndarray) -> np.ndarray:
        return a.squeeze(tuple(axes))

    return Scale(
        shape, relaid(value.form, drop), None if value.absorbing is None else drop(value.absorbing)
    )


@rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    axes = eqn.params["axes"]
    return _dropped(domain.level(value, axes), axes, eqn.outputs[0].shape)


@rule("fft")
def _fft(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    """Every output sums all elements along the transformed axes."""
    rank = len(eqn.inputs[0].shape)
    axes = range(rank - len(eqn.params["fft_lengths"]), rank)
    levelled = domain.level(value, axes)
    return Scale(eqn.outputs[0].shape, levelled.form)


@rule("argmax", "argmin")
def _arg(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    """A place along the axes: a constant in every case, whatever is computed from it."""
    axes, (out,) = eqn.params["axes"], eqn.outputs
    anywhere = domain.free(eqn, domain.level(value, axes))
    count = int(np.prod([eqn.inputs[0].shape[a] for a in axes]))
    if not 1 < count <= MOST_CASES or not hasattr(value, "key"):
        return anywhere
    number = domain.index_number((eqn.name, tuple(axes), value.key))
    varying = tuple(a for a, n in enumerate(out.shape) if n > 1)
    return Cases(number, varying, [np.full(out.shape, e, out.dtype) for e in range(count)])


@rule("reduce_prod")
def _reduce_prod(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    axes = eqn.params["axes"]
    count = int(np.prod([eqn.inputs[0].shape[a] for a in axes]))
    scale = _dropped(domain.level(value, axes), axes, eqn.outputs[0].shape)
    return Scale(scale.shape, times(scale.form, count), scale.absorbing)


@rule("cumsum", "cummax", "cummin", "cumlogsumexp")
def _cumulative(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    if eqn.name == "cumlogsumexp":
        return domain.default(eqn, value)
    levelled = domain.level(value, [eqn.params["axis"]])
    return Scale(eqn.outputs[0].shape, levelled.form)


@rule("sort")
def _sort(domain: Scaling, eqn: Equation, *values: Operand) -> Result:
    """Keys of one scale along the sorted axis; whatever is carried along may land anywhere."""
    axis = eqn.params["dimension"]
    levelled = [domain.level(v, [axis]) for v in values]
    if len(values) > 1:  # what is carried along tells the order, which has no scale
        domain.free(eqn, *levelled)
    return [Scale(a.shape, s.form) for a, s in zip(eqn.outputs, levelled, strict=True)]


@rule("top_k")
def _top_k(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    axis = eqn.params.get("axis", -1) % len(eqn.inputs[0].shape)
    levelled = domain.level(value, [axis])
    return [Scale(eqn.outputs[0].shape, levelled.form), domain.free(eqn, levelled, output=1)]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(domain: Scaling, eqn: Equation, value: Operand) -> Result:
    """Elements of a window share a scale; windows that overlap chain theirs together."""
    value, p = domain.scale(value), eqn.params
    shape, size = eqn.outputs[0].shape, p["window_dimensions"]
    rank = len(shape)
    trivial = (1, 1, (0, 0), 1)
    axes = [
        a
        for a in range(rank)
        if (size[a], p["window_strides"][a], tuple(p["padding"][a]), p["base_dilation"][a])
        != trivial
    ]
    form = scaling.tidy(domain.system, value.form)
    varying = tuple(t for t in form if any(t.ids.shape[a] > 1 for a in axes))
    rest = tuple(t for t in form if not any(t.ids.shape[a] > 1 for a in axes))
    if not varying and value.absorbing is None:
        return Scale(shape, form)
    sources, inside = {}, {}
    for a in axes:
        taps = np.arange(size[a]) * p["window_dilation"][a]
        at = np.arange(shape[a])[:, None] * p["window_strides"][a] + taps - p["padding"][a][0]
        at, off = np.divmod(at, p["base_dilation"][a])
        inside[a] = (at >= 0) & (at < value.shape[a]) & (off == 0)
        sources[a] = np.clip(at, 0, value.shape[a] - 1)
    present = np.ones((1,) * rank, bool) if value.absorbing is None else ~value.absorbing
    lengths = np.broadcast_shapes(present.shape, *(t.ids.shape for t in varying))
    out = [shape[a] if a in axes else lengths[a] for a in range(rank)]
    common = scaling.variables(domain.system.new(out)) if varying else ()
    met = np.zeros(out, bool)
    for tap in np.ndindex(*size):

        def gathered(array: np.ndarray, tap: tuple[int, ...] = tap) -> np.ndarray:
            for a in axes:
                if array.shape[a] > 1:
                    array = array.take(sources[a][:, tap[a]], a)
            return array

        keep = gathered(present)
        for a in axes:
            keep = keep & inside[a][:, tap[a]].reshape([-1 if b == a else 1 for b in range(rank)])
        met = met | keep
        scaling.require_zero(domain.system, minus(relaid(varying, gathered), common), keep)
    return Scale(shape, scaling.tidy(domain.system, (*rest, *common)), ~met)
