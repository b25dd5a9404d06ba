"""Rescaling groups of networks that read, choose and route by what the data say."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet
from jax import lax

from jaxinv.rescaling import rescale, rescaling_group
from tests.rescaling.test_group import (
    _NORM,
    ARCHITECTURES,
    Architecture,
    _frozen,
    _normal,
    _zeros,
    assert_exact,
)

relu = jax.nn.relu
_EXPERTS = {"a": (3, 3, 2), "o": (3, 2, 2)}


def _which(x):
    """A number from 0 to 2 that depends on x alone."""
    return jnp.argmax(x[..., :3], -1)


def _dense(x, w):
    return jnp.einsum("...i,...io->...o", x, w)


def _experts(read, w, x):
    i = _which(x)
    return _dense(relu(_dense(x, w["a"][i])), read(w["o"], i))


def _scanned(w, x):
    def step(total, x_t):
        i = jnp.argmax(x_t)
        return total + relu(x_t @ w["a"][i]) @ w["o"][i], None

    return jax.vmap(lambda x: lax.scan(step, jnp.zeros(2, x.dtype), x)[0])(x)


def _carried(w, x):
    """An index that every step moves on."""

    def one(x):
        start = _which(x)
        last = lax.scan(lambda i, _: ((i + 1) % 3, None), start, None, length=5)[0]
        return relu(x @ w["a"][last]) @ w["o"][(start + 2) % 3]

    return jax.vmap(one)(x)


def _branches(w, x):
    def one(x):
        first = x[0] > 0
        h = lax.cond(first, lambda: x @ w["a"][0], lambda: x @ w["a"][1])
        return relu(h) @ lax.cond(first, lambda: w["o"][0], lambda: w["o"][1])

    return lax.map(one, x)


def _chosen(second, w, x):
    first = x > 0
    again = second(first)
    return jnp.where(first, x * w["a"], x * w["b"]) * jnp.where(again, w["c"], w["d"])


def _pooled(w, x):
    h = relu(x @ w["a"])
    return jnp.take_along_axis(h, jnp.argmax(h, 1, keepdims=True), 1)[:, 0] @ w["o"]


def _last(w, x):
    return jax.vmap(lambda h, i: h[i])(relu(x @ w["a"]), _which(x[:, 0])) @ w["o"]


_DENSE = {"a": (3, 3), "o": (3, 2)}
_FOUR = dict.fromkeys("abcd", (3,))

CHOICES = {
    # The hidden units of every expert.
    "experts": Architecture(
        functools.partial(_experts, lambda w, i: w[i]), _EXPERTS, (3,), 3 * 2
    ),
    "experts, read by take": Architecture(
        functools.partial(_experts, lambda w, i: jnp.take(w, i, axis=0, mode="clip")),
        _EXPERTS, (3,), 3 * 2,
    ),
    "experts, half as one-hot": Architecture(
        functools.partial(
            _experts, lambda w, i: jnp.tensordot(jax.nn.one_hot(i, 3, dtype=w.dtype), w, 1)
        ),
        _EXPERTS, (3,), 3 * 2,
    ),
    # Another index is as good, if it is a function of the first.
    "experts, read in reverse": Architecture(
        functools.partial(_experts, lambda w, i: w[2 - i]), _EXPERTS, (3,), 3 * 2
    ),
    # If not, it ties the experts.
    "experts, read by another index": Architecture(
        lambda w, x: _dense(relu(_dense(x, w["a"][_which(x)])), w["o"][jnp.argmin(x, -1)]),
        _EXPERTS, (3,), 2,
    ),
    "experts of tokens": Architecture(
        functools.partial(_experts, lambda w, i: w[i]), _EXPERTS, (2, 3), 3 * 2
    ),
    "experts of tokens, read in reverse": Architecture(
        functools.partial(_experts, lambda w, i: w[i[:, ::-1]]), _EXPERTS, (2, 3), 2
    ),
    "experts in a scan": Architecture(_scanned, _EXPERTS, (2, 3), 3 * 2),
    "an index carried through a scan": Architecture(_carried, _EXPERTS, (3,), 3 * 2),
    "longer table, clipped index": Architecture(
        lambda w, x: _dense(
            relu(x[:, :1] * jnp.take(w["g"], jnp.floor(3 * x[:, 0]).astype(int), 0, mode="clip")),
            jnp.take(w["o"], jnp.floor(3 * x[:, 0]).astype(int), 0, mode="clip"),
        ),
        # Places 1 and 2 of the longer share the last of the shorter.
        {"g": (2, 2), "o": (3, 2, 1)}, (2,), 2 * 2,
    ),
    "out of bounds is 0": Architecture(
        lambda w, x: (relu(x @ w["a"]) * w["g"].at[_which(x) + 1].get(mode="fill", fill_value=0.0))
        @ w["o"],
        {**_DENSE, "g": (3, 3)}, (3,), 3 + 3,
    ),
    # The row that is never read leaves two, and 1 has no scale.
    "out of bounds is 1": Architecture(
        lambda w, x: (relu(x @ w["a"]) * w["g"].at[_which(x) + 1].get(mode="fill", fill_value=1.0))
        @ w["o"],
        {**_DENSE, "g": (3, 3)}, (3,), 3,
    ),
    # A row that is read for several tokens is one row, whatever is done to it first.
    "a table that is squared": Architecture(
        lambda w, x: (w["g"][_which(x)] ** 2 + 0.0) @ w["p"] @ w["o"],
        {"g": (3, 2), "p": (2, 2), "o": (2, 2)}, (2, 3), 2 + 2,
    ),
    "pooling by argmax": Architecture(_pooled, _DENSE, (4, 3), 3),
    "a token by its number": Architecture(_last, _DENSE, (4, 3), 3),
    "a truth value as an index": Architecture(
        lambda w, x: jnp.einsum(
            "bi,bio->bo",
            relu(x @ w["a"]) * w["g"][(x[:, 0] > 0).astype(int)],
            w["o"][(x[:, 0] > 0).astype(int)],
        ),
        {"a": (3, 3), "g": (2, 3), "o": (2, 3, 1)}, (3,), 3 + 2 * 3,
    ),
    "cond": Architecture(_branches, {"a": (2, 3, 2), "o": (2, 2, 2)}, (3,), 2 * 2),
    "where": Architecture(
        functools.partial(_chosen, lambda first: first), _FOUR, (3,), 2 * 3
    ),
    "where, by the choice of the neighbour": Architecture(
        functools.partial(_chosen, lambda first: jnp.roll(first, 1, -1)), _FOUR, (3,), 3
    ),
    "segment sum": Architecture(
        lambda w, x: jax.vmap(
            lambda x: jax.ops.segment_sum(relu(x @ w["a"]), _which(x), 3) @ w["o"]
        )(x),
        _DENSE, (4, 3), 3,
    ),
    # Two units of one scale, wherever 0/0 is avoided.
    "hypot": Architecture(
        lambda w, x: jnp.hypot(x @ w["a"], x @ w["b"]) @ w["o"], {**_DENSE, "b": (3, 3)}, (3,), 3
    ),
    # A norm has the scale of its matrix.
    "spectral norm": Architecture(
        lambda w, x: x @ (w["a"] / jnp.linalg.norm(w["a"], 2)) @ w["o"], _DENSE, (3,), 1
    ),
    "largest eigenvalue": Architecture(
        lambda w, x: x @ w["a"] / jnp.sqrt(jnp.linalg.eigvalsh(w["a"] @ w["a"].T)[-1]),
        {"a": (3, 3)}, (3,), 1,
    ),
    # Q keeps nothing of the columns' scales, and R all.
    "QR": Architecture(
        lambda w, x: jnp.abs(x @ jnp.linalg.qr(w["a"])[0]) @ jnp.linalg.qr(w["a"])[1] @ w["o"],
        _DENSE, (3,), 3,
    ),
    # The Cholesky factor of S Sᵀ has the scales of the rows of S; all of it rescales against o.
    "Cholesky": Architecture(
        lambda w, x: jnp.abs(x @ w["a"]) @ jnp.linalg.cholesky(w["s"] @ w["s"].T) @ w["o"],
        {"a": (3, 2), "s": (2, 2), "o": (2, 2)}, (3,), 2 + 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_choices_keep_the_generators_found_numerically(name, x64):
    fn, shapes, x_shape, dim, *_ = CHOICES[name]
    params = _zeros(shapes)
    group = rescaling_group(fn, params, np.zeros((1, *x_shape)))
    assert_exact(fn, params, x_shape, group, expected=dim)


# --- the same answer wherever it is asked ---------------------------------------------------------


# Constants decide in the second table alone: of the first, one with a loop is enough.
FEW = ("dense", "scan over stacked layers")
USUAL = [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]


@pytest.mark.parametrize("name", [*USUAL, *CHOICES])
def test_a_group_found_inside_a_trace_is_the_group(name, standard_dtype_promotion):
    fn, shapes, x_shape, _, tokens, _ = {**ARCHITECTURES, **CHOICES}[name]
    params = _normal(shapes, np.float32)
    x = np.zeros((1, *x_shape), np.int32 if tokens else np.float32)
    outside = rescaling_group(fn, params, x)
    inside = []

    def traced(params, x):
        inside.append(rescaling_group(fn, params, x))
        return x

    jax.make_jaxpr(jax.jit(traced))(params, x)
    jax.make_jaxpr(jax.vmap(traced))(*jax.tree.map(lambda a: a[None], (params, x)))
    jax.make_jaxpr(lambda w: jax.jvp(lambda w: traced(w, x), (w,), (w,)))(params)
    with jax.enable_x64(True):
        inside.append(rescaling_group(fn, params, x))
    assert len(inside) == 4
    for group in inside:
        # The name of a constant has its dtype, which x64 changes.
        same = dataclasses.replace(group.structure, relies_on=outside.relies_on)
        assert same == outside.structure
        chex.assert_trees_all_equal(group[:4], outside[:4])


# --- constants that are zero today ----------------------------------------------------------------


def test_a_group_found_before_training_fits_the_trained_network(x64):
    """A running mean is 0 until it is not; on request its zeros count, by name."""
    params, x = _normal(_NORM), _normal((5, 3))
    fresh, trained = (functools.partial(_frozen, mean) for mean in (np.zeros(4), np.ones(4)))
    group = rescaling_group(fresh, params, x)
    assert (group.dim, group.relies_on) == (4, ())
    assert group.structure.pinned_by == rescaling_group(trained, params, x).structure.pinned_by
    moved = rescale(group, params, _normal((4,)))
    np.testing.assert_allclose(trained(moved, x), trained(params, x), rtol=1e-9)
    trusting = rescaling_group(fresh, params, x, trust_zeros=True)
    assert_exact(fresh, params, (3,), trusting, expected=4 + 4)
    ((array, operation, where),) = trusting.relies_on
    assert (array, operation) == ("float64[4]", "sub") and "test_group.py" in where
    assert "relies on the zeros of float64[4] in sub" in str(trusting)
    moved = rescale(trusting, params, _normal((8,)))
    np.testing.assert_allclose(fresh(moved, x), fresh(params, x), rtol=1e-9)
    assert jnp.abs(trained(moved, x) - trained(params, x)).max() > 0.1


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan], ids=str)
def test_arrays_that_are_zero_or_infinite_everywhere_are_no_structure(value):
    shift, params = np.full(4, value), {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    fn = lambda w, x: relu(x @ w["a"] + jnp.sin(shift)) @ w["o"]  # noqa: E731
    for network in (fn, jax.jit(fn)):
        assert rescaling_group(network, params, np.zeros((1, 3))).dim == 0
    with_literal = lambda w, x: relu(x @ w["a"] + jnp.full(4, value)) @ w["o"]  # noqa: E731
    assert rescaling_group(with_literal, params, np.zeros((1, 3))).dim == 4


@pytest.mark.parametrize(
    "masked", [lambda a, m: a * m, lambda a, m: jnp.where(m > 0, a, 0.0)], ids=["product", "where"]
)
def test_masks_are_structure_and_named(masked, x64):
    mask, params = jnp.tril(jnp.ones((3, 4))), {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    group = rescaling_group(
        lambda w, x: relu(x @ masked(w["a"], mask)) @ w["o"], params, np.zeros((1, 3))
    )
    assert group.dim == 3 and "a (6 of 12 elements)" in group.unused
    assert [array for array, *_ in group.relies_on] == ["float64[3,4]"]


def test_a_fresh_and_a_trained_resnet_have_one_group(standard_dtype_promotion):
    net = resnet.ResNet(3, small_inputs=True, stage_sizes=(1,), features=2)
    x = np.zeros((1, 4, 4, 3), np.float32)
    variables = net.init(jax.random.key(0), x, False)

    def group(stats):
        fn = lambda w, x: net.apply({"params": w, "batch_stats": stats}, x, False)  # noqa: E731
        return rescaling_group(fn, variables["params"], x)

    fresh = group(variables["batch_stats"])
    trained = group(jax.tree.map(lambda a: a + 0.5, variables["batch_stats"]))
    assert fresh.structure == trained.structure and fresh.dim == 2 + 2


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cast", "dim", "operation"),
    [
        (lambda h: h.astype(jnp.float8_e4m3fn).astype(h.dtype), 0, "astype"),
        (lambda h: h.astype(jnp.int8).astype(h.dtype), 0, "astype"),
        (lambda h: lax.reduce_precision(h, 5, 2), 0, "reduce_precision"),
        (lambda h: lax.reduce_precision(h, 8, 23), 4, None),
        (lambda h: h.astype(jnp.bfloat16).astype(h.dtype), 4, None),
    ],
    ids=["fp8", "int8", "reduce_precision", "all bits", "bfloat16"],
)
def test_quantisation_pins_and_is_named(cast, dim, operation):
    params = {"a": np.zeros((3, 4), np.float32), "o": np.zeros((4, 2), np.float32)}
    group = rescaling_group(
        lambda w, x: cast(relu(x @ w["a"])) @ w["o"], params, np.zeros((1, 3), np.float32)
    )
    assert group.dim == dim
    assert [name for name, _ in group.pinned_by] == ([operation] if operation else [])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_roots_are_recognised_in_their_own_precision(dtype, x64):
    params = jax.tree.map(lambda a: a.astype(dtype), _zeros(_DENSE))

    def pooled(power, w, x):
        return jnp.mean(relu(x @ w["a"]) ** 3, 1) ** power @ w["o"]

    x = np.zeros((1, 4, 3), dtype)
    assert rescaling_group(functools.partial(pooled, 1 / 3), params, x).dim == 3
    assert rescaling_group(functools.partial(pooled, 0.11**0.5), params, x).dim == 0


def test_a_scan_of_no_steps_is_the_identity():
    def fn(w, x):
        h, none = lax.scan(lambda h, s: (jnp.tanh(h), h), relu(x @ w["a"]), jnp.zeros((0, 1)))
        return (h + none.sum(0)) @ w["o"]

    assert rescaling_group(fn, _zeros(_DENSE), np.zeros((1, 3))).dim == 3


# --- parameters that cancel -----------------------------------------------------------------------

_BIASED = {**dict.fromkeys("qkv", (3, 2)), **{f"b{k}": (2,) for k in "qkv"}, "o": (2, 2)}


def _biased(compare, w, x):
    q, k, v = (x @ w[name] + w[f"b{name}"] for name in "qkv")
    return compare(q @ k.swapaxes(1, 2)) @ v @ w["o"]


def _causal(scores):
    seen = jnp.tril(jnp.ones(scores.shape[1:], bool))
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))


def _centred(axis, w, x):
    h = x @ w["a"] + w["b"]
    return jnp.tanh(h - h.mean(axis, keepdims=True)) @ w["o"]


CANCELLED = {
    "keys of softmax": (functools.partial(_biased, jax.nn.softmax), _BIASED, (4, 3), {"bk"}),
    "keys of log_softmax": (
        functools.partial(_biased, lambda s: jnp.exp(jax.nn.log_softmax(s))),
        _BIASED, (4, 3), {"bk"},
    ),
    "keys of a causal softmax": (functools.partial(_biased, _causal), _BIASED, (4, 3), {"bk"}),
    "queries of a softmax over queries": (
        functools.partial(_biased, lambda s: jax.nn.softmax(s, 1)), _BIASED, (4, 3), {"bq"}
    ),
    "nothing without a softmax": (functools.partial(_biased, relu), _BIASED, (4, 3), set()),
    "a number before its mean is subtracted": (
        functools.partial(_centred, -1), {"a": (3, 4), "b": (), "o": (4, 2)}, (3,), {"b"}
    ),
    "a vector before the mean of the batch is": (
        functools.partial(_centred, 0), {"a": (3, 4), "b": (4,), "o": (4, 2)}, (3,), {"b"}
    ),
    "not before the mean of the vector is": (
        functools.partial(_centred, -1), {"a": (3, 4), "b": (4,), "o": (4, 2)}, (3,), set()
    ),
    "not before twice its mean is": (
        lambda w, x: _centred(-1, w, x) + x.sum() * (w["b"] - 2 * w["b"]),
        {"a": (3, 4), "b": (), "o": (4, 2)}, (3,), set(),
    ),
    "not before the sum of the batch is": (
        lambda w, x: jnp.tanh((h := x @ w["a"] + w["b"]) - h.sum(0)), {"a": (3, 2), "b": (2,)},
        (3,), set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CANCELLED)
def test_parameters_that_cancel_are_dead_and_no_others(name, x64):
    fn, shapes, x_shape, dead = CANCELLED[name]
    params, x = _normal(shapes), 3 * _normal((3, *x_shape))
    group = rescaling_group(fn, params, x)
    assert set(group.unused) == dead
    assert_exact(fn, params, x_shape, group)
    jacobian = jax.jacrev(fn)(params, x)
    still = {name for name, leaf in jacobian.items() if jnp.abs(leaf).max() < 1e-12}
    assert still == dead
