"""Scaling rules of contractions: every term of a sum of products has the scale of the sum.

Σ_k A[m,k] W[k,n] = Y[m,n] asks s(A)[m,k] + s(W)[k,n] = s(Y)[m,n] for all m, k, n. The solutions
are s(A) = p[m] + q[k], s(W) = r[n] − q[k], s(Y) = p[m] + r[n]: one unknown r per output unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, cast

import numpy as np

from jaxinv._interpreter.walk import Equation, Operand, Result, rule_table
from jaxinv.rescaling import values as scaling
from jaxinv.rescaling.equations import System
from jaxinv.rescaling.values import (
    Form,
    Fresh,
    Scale,
    Scaling,
    Step,
    Term,
    minus,
    relaid,
    variables,
)

RULES, rule = rule_table()


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Connected components of a bipartite graph: labels of rows and of columns, and their number.

    A row or a column without any edge has label −1.
    """
    rows, columns = edges.shape
    if edges.all():
        return np.zeros(rows, np.int64), np.zeros(columns, np.int64), 1
    graph = System()
    ids = graph.new((rows + columns,))
    i, j = np.nonzero(edges)
    graph.union(ids[i], ids[rows + j])
    roots = graph.find(ids)
    alone = np.r_[~edges.any(axis=1), ~edges.any(axis=0)]
    labels = np.full(rows + columns, -1)
    found, labels[~alone] = np.unique(roots[~alone], return_inverse=True)
    return labels[:rows], labels[rows:], len(found)


# --- dot_general ----------------------------------------------------------------------


class _Side:
    """One operand of a contraction seen with three axes, in the order given by `groups`."""

    def __init__(self, shape: Sequence[int], groups: Sequence[Sequence[int]]):
        self.order = [axis for group in groups for axis in group]
        self.moved = [shape[axis] for axis in self.order]
        self.shape = tuple(int(np.prod([shape[axis] for axis in group])) for group in groups)

    def enter(self, a: np.ndarray) -> np.ndarray:
        return scaling.reshaped(a.transpose(self.order), self.moved, self.shape)

    def leave(self, a: np.ndarray) -> np.ndarray:
        return scaling.reshaped(a, self.shape, self.moved).transpose(np.argsort(self.order))

    def view(self, value: Scale | Fresh) -> Scale | Fresh:
        """The operand with three axes."""
        if isinstance(value, Fresh):
            step = Step(lambda f: relaid(f, self.enter), lambda f: relaid(f, self.leave))
            view = value.through(self.shape, step)
            view.absorbing = None if value.absorbing is None else self.enter(value.absorbing)
            return view
        absorbing = None if value.absorbing is None else self.enter(value.absorbing)
        return Scale(self.shape, relaid(value.form, self.enter), absorbing)


@rule("dot_general")
def _dot_general(domain: Scaling, eqn: Equation, left: Operand, right: Operand) -> Result:
    (left_k, right_k), (left_b, right_b) = eqn.params["dimension_numbers"]
    shapes = [aval.shape for aval in eqn.inputs]
    left_m = [a for a in range(len(shapes[0])) if a not in (*left_k, *left_b)]
    right_n = [a for a in range(len(shapes[1])) if a not in (*right_k, *right_b)]
    left, right = (domain.undecided_or_scale(v) for v in (left, right))
    a = _Side(shapes[0], [left_b, left_m, left_k]).view(left)
    w = _Side(shapes[1], [right_b, right_k, right_n]).view(right)
    # The undecided operand, or else the one without structural zeros, plays the kernel.
    swap = isinstance(left, Fresh) and not isinstance(right, Fresh)
    if not isinstance(left, Fresh) and not isinstance(right, Fresh):
        swap = a.absorbing is None and w.absorbing is not None
    if swap:
        y = _contract(domain, _turned(w), _turned(a))
        y = Scale((y.shape[0], y.shape[2], y.shape[1]), *_turned_parts(y))
    else:
        y = _contract(domain, a, w)
    shape = eqn.outputs[0].shape
    out = [(lambda array: scaling.reshaped(array, y.shape, shape))]
    absorbing = None if y.absorbing is None else out[0](y.absorbing)
    return Scale(shape, relaid(y.form, out[0]), absorbing)


def _swap(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(1, 2)


def _turned_parts(value: Scale) -> tuple[Form, np.ndarray | None]:
    return relaid(value.form, _swap), None if value.absorbing is None else _swap(value.absorbing)


def _turned(value: Scale | Fresh) -> Scale | Fresh:
    shape = (value.shape[0], value.shape[2], value.shape[1])
    if isinstance(value, Fresh):
        step = Step(lambda f: relaid(f, _swap), lambda f: relaid(f, _swap))
        view = value.through(shape, step)
        view.absorbing = None if value.absorbing is None else _swap(value.absorbing)
        return view
    return Scale(shape, *_turned_parts(value))


class _Blocks(NamedTuple):
    """Which rows and terms of an operand are tied by numbers that are not structurally zero."""

    edges: np.ndarray  # (rows, terms), or (1, 1) for all
    of_row: np.ndarray  # −1 for none
    of_term: np.ndarray
    number: int

    @classmethod
    def of(cls, a: Scale) -> _Blocks:
        if a.absorbing is not None and a.absorbing.shape[0] == 1:
            edges = np.broadcast_to(~a.absorbing[0], a.shape[1:])
        else:  # zeros that differ over the batch: counted as pinned, exact if not complete
            edges = np.ones((1, 1), bool)
        return cls(edges, *components(edges))

    def spread(self, r: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Unknowns (batch, block, columns) for every row, or every term."""
        return r if self.number == 1 else np.take(r, np.maximum(labels, 0), axis=1)


def _contract(domain: Scaling, a: Scale | Fresh, w: Scale | Fresh) -> Scale:
    """s(Y)[b,m,n] from s(A)[b,m,k], and s(W)[b,k,n] by way of new unknowns."""
    system: System = domain.system
    (batch, rows, _), columns = a.shape, w.shape[2]
    out = (batch, rows, columns)
    if any(v.absorbing is not None and bool(v.absorbing.all()) for v in (a, w)):
        return Scale(out, (), np.ones((1, 1, 1), bool))
    if isinstance(a, Fresh):
        a, w = _first_assigned(domain, a), cast("Scale | Fresh", domain.refresh(w))
    blocks = _Blocks.of(a)
    form = scaling.tidy(system, a.form)
    p, q = _separated(system, form, a.shape, blocks)
    # The kernel: r[n] − q[k], where r and p share what depends on neither m nor k.
    undecided, known = isinstance(w, Fresh), () if isinstance(w, Fresh) else w.form
    varied = undecided or any(t.ids.shape[2] > 1 for t in known)
    over = batch if undecided else _batch(form, known)
    r = system.new((over, blocks.number, columns if varied else 1))
    if not undecided:
        domain.seen((*form, *known))  # they may cancel, as in Σ_k h_k / h_k
    kernel = minus(variables(blocks.spread(r, blocks.of_term)), relaid(q, _swap))
    _require(domain, w, kernel, (blocks.of_term < 0)[None, :, None])
    absorbing = np.broadcast_to((blocks.of_row < 0)[None, :, None], (1, len(blocks.of_row), 1))
    if w.absorbing is not None:
        absorbing = absorbing | w.absorbing.all(axis=1, keepdims=True)
    result = scaling.tidy(system, (*p, *variables(blocks.spread(r, blocks.of_row))))
    return Scale(out, result, absorbing)


def _first_assigned(domain: Scaling, a: Fresh) -> Scale:
    """The first of two undecided operands, at scales p[m] + q[k]."""
    batch, rows, terms = a.shape
    first = domain.system.new((batch, 1, terms))
    first[:, :, 0] = 0
    a.assign((*variables(domain.system.new((batch, rows, 1))), *variables(first)))
    return domain.scale(a)


def _separated(
    system: System, form: Form, shape: tuple[int, ...], blocks: _Blocks
) -> tuple[Form, Form]:
    """p[m] and q[k] whose sum is s(A)[m,k]; terms of both indices are required to be such a sum."""
    p: list[Term] = []
    q: list[Term] = []
    coupled: list[Term] = []
    for term in form:
        varies = [n > 1 for n in term.ids.shape]
        (coupled if varies[1] and varies[2] else q if varies[2] else p).append(term)
    if coupled:
        full = np.broadcast_shapes(*(t.ids.shape for t in coupled))
        first_row = np.array([np.argmax(blocks.of_row == c) for c in range(blocks.number)])
        in_row = system.new((full[0], shape[1], 1))
        in_row[:, first_row] = 0
        in_term = system.new((full[0], 1, shape[2]))
        separable = (*variables(in_row), *variables(in_term))
        scaling.require_zero(system, minus(tuple(coupled), separable), blocks.edges[None])
        p += variables(in_row)
        q += variables(in_term)
    return tuple(p), tuple(q)


def _require(domain: Scaling, kernel: Scale | Fresh, form: Form, dead: np.ndarray) -> None:
    """The kernel has these scales; what it is at `dead` places meets nothing but zeros."""
    if isinstance(kernel, Fresh):
        if dead.any():
            form = domain.with_dead(np.broadcast_to(dead, kernel.shape), form)
        kernel.assign(form)
    else:
        absent = dead if kernel.absorbing is None else dead | kernel.absorbing
        keep = ~absent if absent.any() else None
        scaling.require_zero(domain.system, minus(kernel.form, form), keep)


def _batch(*forms: Form) -> int:
    return max((ids.shape[0] for form in forms for _, ids in form), default=1)


# --- conv_general_dilated -------------------------------------------------------------


class _Geometry:
    """Which input position every (output position, tap) reads, per axis; −1 for none."""

    def __init__(self, eqn: Equation, present: list[np.ndarray]):
        p, numbers = eqn.params, eqn.params["dimension_numbers"]
        image, kernel = (aval.shape for aval in eqn.inputs)
        out = eqn.outputs[0].shape
        self.sources = [np.arange(image[numbers.lhs_spec[0]])[:, None]]
        for i, stride in enumerate(p["window_strides"]):
            length, taps = image[numbers.lhs_spec[2 + i]], kernel[numbers.rhs_spec[2 + i]]
            at = np.arange(out[numbers.out_spec[2 + i]])[:, None] * stride - p["padding"][i][0]
            at = at + np.arange(taps) * p["rhs_dilation"][i]
            at, off = np.divmod(at, p["lhs_dilation"][i])
            inside = (at >= 0) & (at < length) & (off == 0)
            self.sources.append(np.where(inside, at, -1))
        for source, there in zip(self.sources, present, strict=True):
            source[(source >= 0) & ~there[source]] = -1
        self.inputs = [image[numbers.lhs_spec[0]], *(image[a] for a in numbers.lhs_spec[2:])]
        self.labels = [components(source >= 0) for source in self.sources]
        self.count = int(np.prod([count for _, _, count in self.labels]))

    def component(self, side: int) -> np.ndarray:
        """Component of every output position (side 0) or tap (side 1), flat; −1 for none."""
        grids = np.meshgrid(*(label[side] for label in self.labels), indexing="ij")
        counts = [count for _, _, count in self.labels]
        joint = np.ravel_multi_index([np.maximum(g, 0) for g in grids], counts)
        return np.where(np.min(grids, axis=0) < 0, -1, joint).ravel()

    def source(self) -> np.ndarray:
        """Flat input position of every (flat output position, flat tap); −1 for none."""
        joint, ok = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
        for source, length in zip(self.sources, self.inputs, strict=True):
            p, t = source.shape
            inner = np.maximum(source, 0)
            joint = joint[:, None, :, None] * length + inner[None, :, None, :]
            ok = ok[:, None, :, None] & (source >= 0)[None, :, None, :]
            flat = (joint.shape[0] * p, joint.shape[2] * t)
            joint, ok = joint.reshape(flat), ok.reshape(flat)
        return np.where(ok, joint, -1)


class _Channels(NamedTuple):
    """Numbers of channels: of a group of the image, and of the outputs."""

    groups: int
    ins: int
    outs: int

    def per_output(self, ids: np.ndarray) -> np.ndarray:
        """(taps, channels) → (taps, channels in a group, outputs)."""
        if ids.shape[-1] == 1 or self.groups == 1:
            return ids[..., None]
        grouped = ids.reshape(*ids.shape[:-1], self.groups, self.ins).swapaxes(-1, -2)
        return self.repeated(grouped)

    def repeated(self, ids: np.ndarray) -> np.ndarray:
        """(..., groups) → (..., outputs)."""
        return np.repeat(ids, self.outs // self.groups, axis=-1)


@rule("conv_general_dilated")
def _conv(domain: Scaling, eqn: Equation, image: Operand, kernel: Operand) -> Result:
    if eqn.params["batch_group_count"] != 1:
        return domain.default(eqn, image, kernel)
    image, kernel = domain.scale(image), domain.undecided_or_scale(kernel)
    # (batch and positions, channels), (taps, channels in a group, outputs), (positions, outputs)
    lhs, rhs, out = (
        _order(spec, channels_last)
        for spec, channels_last in zip(
            eqn.params["dimension_numbers"], ((1,), (1, 0), (1,)), strict=True
        )
    )
    shape, (image_shape, kernel_shape) = eqn.outputs[0].shape, (a.shape for a in eqn.inputs)
    present, lost = _present(image, lhs, len(lhs) - 1)
    if present is None:
        return Scale(shape, (), np.ones((1,) * len(out), bool))
    geometry = _Geometry(eqn, present)
    groups = eqn.params["feature_group_count"]
    channels = _Channels(groups, *(kernel_shape[a] for a in rhs[-2:]))
    form = scaling.tidy(domain.system, relaid(image.form, lambda a: a.transpose(lhs)))
    positions = [image_shape[a] for a in lhs[:-1]]
    output, weight = _filter(domain.system, form, positions, geometry, channels)
    dead = (geometry.component(1) < 0)[:, None, None]
    if lost is not None:  # channels that are zero
        dead = dead | (channels.per_output(lost[None].astype(np.int64)) > 0)
    taps = [1, *(kernel_shape[a] for a in rhs[:-2])]
    weight = relaid(weight, lambda ids: _unflat(ids, taps, rhs))
    _require(domain, kernel, weight, _unflat(dead, taps, rhs))
    out_positions = [shape[a] for a in out[:-1]]
    absorbing = _unflat((geometry.component(0) < 0)[:, None], out_positions, out)
    result = relaid(output, lambda ids: _unflat(ids, out_positions, out))
    along = [n if m > 1 else 1 for n, m in zip(shape, absorbing.shape, strict=True)]
    return Scale(shape, scaling.tidy(domain.system, result), np.broadcast_to(absorbing, along))


def _filter(
    system: System, form: Form, positions: list[int], geometry: _Geometry, channels: _Channels
) -> tuple[Form, Form]:
    """Scales of the result (positions, outputs), and of the kernel (taps, channels, outputs)."""
    r = system.new((geometry.count, channels.outs))

    def spread(side: int) -> np.ndarray:
        return r[np.maximum(geometry.component(side), 0)] if geometry.count > 1 else r

    output, weight = variables(spread(0)), variables(spread(1)[:, None, :])
    if all(max(ids.shape[:-1]) == 1 for _, ids in form):
        q = relaid(form, lambda ids: ids.reshape(1, -1))
        return output, minus(weight, relaid(q, channels.per_output))

    def flat(ids: np.ndarray) -> np.ndarray:
        return np.broadcast_to(ids, (*positions, ids.shape[-1])).reshape(-1, ids.shape[-1])

    form = relaid(form, flat)
    drift, read = _positional(system, form, geometry, channels)
    grouped = relaid(drift, channels.repeated)
    first = np.argmax(geometry.source() >= 0, axis=0)
    weight = (
        *weight,
        *relaid(grouped, lambda e: e[first][:, None, :]),
        *scaling.times(relaid(form, lambda ids: channels.per_output(ids[read])), -1),
    )
    return (*output, *grouped), weight


def _order(spec: Sequence[int], last: Sequence[int]) -> list[int]:
    """Axes as (the others in order of `spec`, then those named by `last`)."""
    rest = [spec[i] for i in range(len(spec)) if i not in last]
    return [*rest, *(spec[i] for i in last)]


def _unflat(ids: np.ndarray, lengths: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Undo `(flattened lengths, ...)` with axes in `order`; an axis of the kernel has no batch."""
    head = lengths if ids.shape[0] > 1 else [1] * len(lengths)
    opened = ids.reshape(*head, *ids.shape[1:])
    if opened.ndim > len(order):
        opened = opened.reshape(opened.shape[1:])
    return opened.transpose(np.argsort(order))


def _present(
    image: Scale, order: Sequence[int], spatial: int
) -> tuple[list[np.ndarray] | None, np.ndarray | None]:
    """Positions along each axis that are not structurally zero, and the channels that are.

    Only zeros that are whole slices (as padding makes them) are used: a zero that is taken for a
    value of scale 0 costs generators, never exactness.
    """
    lengths = [image.shape[a] for a in order]
    everywhere = [np.ones(n, bool) for n in lengths[:spatial]]
    if image.absorbing is None:
        return everywhere, None
    alive = np.broadcast_to(~image.absorbing.transpose(order), lengths)
    if not alive.any():
        return None, None
    per_axis = [
        np.asarray(alive.any(axis=tuple(b for b in range(len(lengths)) if b != a)))
        for a in range(len(lengths))
    ]
    outer = np.ones((1,) * len(lengths), bool)
    for a, there in enumerate(per_axis):
        outer = outer & there.reshape([-1 if b == a else 1 for b in range(len(lengths))])
    if not np.array_equal(outer, alive):
        return everywhere, None
    lost = ~per_axis[-1]
    return per_axis[:-1], lost if lost.any() else None


def _positional(
    system: System, form: Form, geometry: _Geometry, channels: _Channels
) -> tuple[Form, np.ndarray]:
    """A convolution of an image X[s, c] whose scales vary over positions s.

    Every tap t asks X[src(p,t), i] + W[t,i,o] = Y[p,o] for all p that it serves, so between two
    such p the scales of X and of Y change by the same amount, whatever i and o are:
    X[s,c] = X[base,c] + d[s] and Y[p,o] = r[o] + e[p] with e[p] − e[p'] = d[src(p,t)] −
    d[src(p',t)]. (Scales that grow geometrically over positions are a solution.)
    Returns e (positions, groups) and the position that each tap reads first.
    """
    source = geometry.source()
    valid = source >= 0
    first = np.argmax(valid, axis=0)
    out_p, tap = np.nonzero(valid)
    num_inputs = int(np.prod(geometry.inputs))
    reads = np.zeros((num_inputs, source.shape[1]), bool)
    reads[source[valid], tap] = True
    of_input, _, count = components(reads)
    base = np.array([np.argmax(of_input == c) for c in range(count)])
    d = system.new((num_inputs, channels.groups))
    d[base] = 0
    live = (of_input >= 0)[:, None]

    def rebased(ids: np.ndarray) -> np.ndarray:
        return ids[base][np.maximum(of_input, 0)]

    grown = relaid(variables(d), lambda v: np.repeat(v, channels.ins, axis=1))
    scaling.require_zero(
        system, (*form, *scaling.times(relaid(form, rebased), -1), *scaling.times(grown, -1)), live
    )
    of_output, _, count = components(valid)
    e = system.new((source.shape[0], channels.groups))
    e[[np.argmax(of_output == c) for c in range(count)]] = 0
    here, there = (out_p, tap), (first[tap], tap)
    coefficients = [Fraction(1), Fraction(-1), Fraction(-1), Fraction(1)]
    ids = np.stack([e[out_p], e[there[0]], d[source[here]], d[source[there]]], axis=-1)
    system.equation(coefficients, ids.reshape(-1, 4))
    read = np.maximum(source[first, np.arange(source.shape[1])], 0)
    return (Term(Fraction(1), e),), read
