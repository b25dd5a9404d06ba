"""The rescaling group against diagonal scalings found numerically, and what the group does."""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resnet
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    match_gradient_norm,
    networks,
    scale_by_path_kappa,
)
from jaxinv.errors import ExponentOverflow
from jaxinv.rescaling import (
    log_scales,
    random_rescaling,
    rescale,
    rescale_gradient,
    rescale_state,
    rescaling_group,
    tangent_vectors,
)
from tests.ground_truth.strategies import SHAPES
from tests.ground_truth.strategies import networks as random_networks

relu = jax.nn.relu


# --- ground truth: diagonal scalings, found numerically -----------------------------------------


def derivative_rows(fn, params, shape, draws, batch, tokens=None, at_once=256):
    """Rows w_e ∂(c·f)/∂w_e at random weights w, inputs and directions c, and which e never matter.

    v is a generator exactly if every row is orthogonal to it, whatever the weights are. Needs no
    knowledge of the network: gradients of a compiled function, nothing else. (Random numbers come
    from NumPy since drawing them with jax takes longest to compile.)
    """
    rng = np.random.default_rng(7)
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: jnp.zeros(np.shape(a)), params))
    x = rng.normal(size=(draws, batch, *shape))
    if tokens is not None:
        x = rng.integers(0, tokens, x.shape)

    def output(w, x):
        return ravel_pytree(fn(unravel(w), x))[0]

    def row(w, x, c):
        return jax.grad(lambda w: jnp.vdot(output(w, x), c))(w) * w

    c = rng.normal(size=(draws, jax.eval_shape(output, flat, x[0]).size))
    w = rng.normal(size=(draws, flat.size))
    rows = jax.jit(lambda *all: lax.map(lambda one: row(*one), all, batch_size=at_once))
    A = np.asarray(rows(w, x, c))
    A = A[np.isfinite(A).all(axis=1) & (A != 0).any(axis=1)]
    A = A / np.linalg.norm(A, axis=1, keepdims=True)
    return A, np.abs(A).max(axis=0, initial=0) < 1e-13


def null_dimension(A):
    s = np.linalg.svd(A, compute_uv=False)
    assert len(A) >= 2 * A.shape[1], "too few random draws to tell"
    kept = s > 1e-9 * s[0]
    assert not kept.any() or s[kept].min() > 1e-5 * s[0], "the spectrum has no gap"
    return int((~kept).sum())


def assert_exact(fn, params, shape, group, *, batch=3, tokens=None, expected=None):
    """Every generator is a symmetry, and there are as many as are found numerically."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    A, dead = derivative_rows(fn, params, shape, 20 + 4 * size, batch, tokens)
    found = null_dimension(A[:, ~dead]) if not dead.all() else 0
    assert (group.dim, found) == (found if expected is None else expected, group.dim)
    if group.dim:
        ones = jax.tree.map(lambda a: jnp.ones(np.shape(a)), params)
        B = np.asarray(tangent_vectors(group, ones, dense=True))
        assert np.linalg.matrix_rank(B) == group.dim
        assert np.abs(A @ B).max() < 1e-9


# --- architectures with dimensions derived by hand ----------------------------------------------


class Architecture(NamedTuple):
    fn: Any
    shapes: dict
    x: tuple
    dim: int
    tokens: int | None = None
    batch: int = 3


def _conv(x, kernel, padding="SAME", stride=1, groups=1):
    layout = {4: ("NHWC", "HWIO", "NHWC"), 3: ("NHC", "HIO", "NHC")}[x.ndim]
    return lax.conv_general_dilated(
        x, kernel, (stride,) * (x.ndim - 2), padding, dimension_numbers=layout,
        feature_group_count=groups,
    )  # fmt: skip


def _attention(w, x):
    q, k, v = (jnp.einsum("btc,chd->bthd", x, w[name]) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return mixed.reshape(*x.shape[:2], -1) @ w["o"]


def _rnn(w, x):
    def step(h, x_t):
        return relu(x_t @ w["u"] + h @ w["w"] + w["b"]), None

    h, _ = lax.scan(step, jnp.zeros((x.shape[0], 4), x.dtype), x.swapaxes(0, 1))
    return h @ w["o"]


def _recurrence(w, x):
    """No input after the first step: scales may grow geometrically over the steps."""
    h, _ = lax.scan(lambda h, _: (relu(h @ w["w"]), None), relu(x @ w["i"]), None, length=4)
    return h @ w["o"]


def _stacked(w, x):
    def layer(h, layer):
        return relu(h @ layer["w"] + layer["b"]), None

    return lax.scan(jax.checkpoint(layer), relu(x @ w["i"]), w["s"])[0] @ w["o"]


def _batch_norm(epsilon, w, x):
    h = x @ w["a"]
    h = h - h.mean(0)
    h = h * lax.rsqrt((h**2).mean(0) + epsilon)
    return relu(h * w["g"] + w["b"]) @ w["o"]


def _frozen(mean, w, x):
    """Batch norm with running statistics, which are constants."""
    h = (x @ w["a"] - mean) * (w["g"] / np.sqrt(2.0 + 1e-5)) + w["b"]
    return relu(h) @ w["o"]


def _layer_norm(w, x):
    h = relu(x @ w["a"])
    h = h - h.mean(-1, keepdims=True)
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True))
    return relu(h * w["g"] + w["b"]) @ w["o"]


def _residual(w, x):
    h = relu(x @ w["i"] + w["c"])
    return (h + relu(h @ w["a"] + w["b"]) @ w["d"]) @ w["o"]


_MLP = {
    "Dense_0": {"kernel": (4, 3), "bias": (3,)},
    "Dense_1": {"kernel": (3, 5), "bias": (5,)},
    "Dense_2": {"kernel": (5, 2), "bias": (2,)},
}
_CNN = {
    "Conv_0": {"kernel": (3, 3, 1, 2), "bias": (2,)},
    "Conv_1": {"kernel": (3, 3, 2, 2), "bias": (2,)},
    "Conv_2": {"kernel": (3, 3, 2, 2), "bias": (2,)},
    "Dense_0": {"kernel": (2, 2), "bias": (2,)},
}
_NORM = {"a": (3, 4), "g": (4,), "b": (4,), "o": (4, 2)}
_QKV = {"q": (3, 2, 3), "k": (3, 2, 3), "v": (3, 2, 3), "o": (6, 2)}

ARCHITECTURES = {
    # One generator per hidden unit.
    "dense": Architecture(networks.mlp, _MLP, (4,), 3 + 5),
    "leaky ReLU": Architecture(
        lambda w, x: jax.nn.leaky_relu(x @ w["a"], 0.1) @ w["o"],
        {"a": (3, 5), "o": (5, 2)}, (3,), 5,
    ),
    # One per channel: pooling and flattening keep the channel of an element.
    "conv, pool, flatten": Architecture(
        lambda w, x: relu(
            nn.max_pool(relu(_conv(x, w["k"]) + w["b"]), (2, 2), (2, 2)).reshape(x.shape[0], -1)
            @ w["d"]
        )
        @ w["o"],
        {"k": (3, 3, 1, 2), "b": (2,), "d": (8, 3), "o": (3, 2)}, (4, 4, 1), 2 + 3,
    ),
    # Taps that only ever meet padding have no influence, and no generator.
    "conv on one pixel": Architecture(
        lambda w, x: relu(_conv(x, w["k"]))[:, 0, 0] @ w["o"],
        {"k": (3, 3, 2, 3), "o": (3, 2)}, (1, 1, 2), 3,
    ),
    "depthwise conv": Architecture(
        lambda w, x: relu(_conv(relu(_conv(x, w["p"])), w["d"], groups=3)).mean((1, 2)) @ w["o"],
        {"p": (1, 1, 2, 3), "d": (2, 2, 1, 3), "o": (3, 2)}, (3, 3, 2), 3 + 3,
    ),
    # 12 units, tied to a_c + δ·position by the convolution, whose 2 outputs follow: δ is the
    # generator under which scales grow geometrically along the sequence.
    "conv after dense": Architecture(
        lambda w, x: relu(_conv(relu(x @ w["d"]).reshape(-1, 6, 2), w["k"], "VALID")).reshape(
            x.shape[0], -1
        )
        @ w["o"],
        {"d": (3, 12), "k": (3, 2, 2), "o": (8, 2)}, (3,), 2 + 2 + 1,
    ),
    # The channels of the stream are tied across the skip.
    "residual": Architecture(
        _residual,
        {"i": (3, 4), "c": (4,), "a": (4, 5), "b": (5,), "d": (5, 4), "o": (4, 2)}, (3,), 4 + 5,
    ),
    # The stream is the input: pinned.
    "residual on the input": Architecture(
        lambda w, x: (x + relu(x @ w["a"]) @ w["b"]) @ w["o"],
        {"a": (4, 5), "b": (5, 4), "o": (4, 2)}, (4,), 5,
    ),
    "residual with projection": Architecture(
        lambda w, x: relu(x @ w["s"] + relu(x @ w["a"]) @ w["b"]) @ w["o"],
        {"s": (3, 4), "a": (3, 5), "b": (5, 4), "o": (4, 2)}, (3,), 4 + 5,
    ),
    "residual CNN": Architecture(networks.cnn, _CNN, (4, 4, 1), 2 + 2),
    "concat": Architecture(
        lambda w, x: jnp.concatenate([x, relu(x @ w["a"]), relu(x @ w["b"])], -1) @ w["o"],
        {"a": (3, 5), "b": (3, 4), "o": (12, 2)}, (3,), 5 + 4,
    ),
    # Statistics with a mean that is not 0 pin the layer in front; γ and β still rescale a unit.
    "frozen batch norm": Architecture(functools.partial(_frozen, np.full(4, 0.5)), _NORM, (3,), 4),
    # Scale-invariant incoming weights, and γ and β.
    "batch norm, ε = 0": Architecture(
        functools.partial(_batch_norm, 0.0), _NORM, (3,), 4 + 4, batch=7
    ),
    "batch norm, ε > 0": Architecture(
        functools.partial(_batch_norm, 0.1), _NORM, (3,), 4, batch=7
    ),
    # One scale for all features in front of it.
    "layer norm, ε = 0": Architecture(_layer_norm, _NORM, (3,), 1 + 4),
    "weight norm": Architecture(
        lambda w, x: relu(x @ (w["g"] * w["v"] / jnp.linalg.norm(w["v"], axis=0))) @ w["o"],
        {"v": (3, 4), "g": (4,), "o": (4, 2)}, (3,), 4 + 4,
    ),
    "RNN": Architecture(
        _rnn, {"u": (3, 4), "w": (4, 4), "b": (4,), "o": (4, 2)}, (5, 3), 4
    ),
    # Units, and a factor per step.
    "linear recurrence": Architecture(
        _recurrence, {"i": (3, 4), "w": (4, 4), "o": (4, 2)}, (3,), 4 + 1
    ),
    "scan over stacked layers": Architecture(
        _stacked, {"i": (3, 3), "s": {"w": (2, 3, 3), "b": (2, 3)}, "o": (3, 2)}, (3,), 3 * 3
    ),
    "stacked[i]": Architecture(
        lambda w, x: relu(relu(x @ w["s"][0]) @ w["s"][1]) @ w["o"],
        {"s": (2, 3, 3), "o": (3, 2)}, (3,), 3 + 3,
    ),
    "partly tanh": Architecture(
        lambda w, x: jnp.tanh(relu(x @ w["a"]) @ w["b"]) @ w["o"],
        {"a": (3, 5), "b": (5, 4), "o": (4, 2)}, (3,), 5,
    ),
    # All steps of one layer share its scales: units, and a factor per application.
    "shared weights": Architecture(
        lambda w, x: relu(relu(relu(x @ w["i"]) @ w["w"]) @ w["w"]) @ w["o"],
        {"i": (3, 4), "w": (4, 4), "o": (4, 2)}, (3,), 4 + 1,
    ),
    # Wᵀ undoes what W does: s = −s.
    "autoencoder with tied weights": Architecture(
        lambda w, x: relu(x @ w["w"] + w["b"]) @ w["w"].T, {"w": (3, 5), "b": (5,)}, (3,), 0
    ),
    # Two factors per unit; a square of one.
    "bilinear unit": Architecture(
        lambda w, x: ((x @ w["a"]) * (x @ w["b"])) @ w["o"],
        {"a": (3, 4), "b": (3, 4), "o": (4, 2)}, (3,), 4 + 4,
    ),
    "square": Architecture(
        lambda w, x: (x @ w["a"]) ** 2 @ w["o"], {"a": (3, 4), "o": (4, 2)}, (3,), 4
    ),
    "gated unit": Architecture(
        lambda w, x: ((x @ w["a"]) * jax.nn.sigmoid(x @ w["b"])) @ w["o"],
        {"a": (3, 4), "b": (3, 4), "o": (4, 2)}, (3,), 4,
    ),
    # Per head and per element: q against k, v against the output kernel.
    "attention": Architecture(_attention, _QKV, (4, 3), 2 * 3 + 2 * 3),
    "linear attention": Architecture(
        lambda w, x: jnp.einsum(
            "bts,bsd->btd", jnp.einsum("btd,bsd->bts", x @ w["q"], x @ w["k"]), x @ w["v"]
        )
        @ w["o"],
        # q against k, v against o, and the common scale of the scores against v.
        {"q": (3, 4), "k": (3, 4), "v": (3, 4), "o": (4, 2)}, (5, 3), 4 + 4 + 1,
    ),
    "mixture of experts": Architecture(
        lambda w, x: jnp.einsum(
            "be,beo->bo",
            jax.nn.softmax(x @ w["g"]),
            jnp.einsum("beh,eho->beo", relu(jnp.einsum("bi,eih->beh", x, w["a"])), w["o"]),
        ),
        {"g": (3, 2), "a": (2, 3, 4), "o": (2, 4, 2)}, (3,), 2 * 4,
    ),
    "low-rank update": Architecture(
        lambda w, x: relu(x @ (w["w"] + w["A"] @ w["B"])) @ w["o"],
        {"w": (3, 4), "A": (3, 2), "B": (2, 4), "o": (4, 2)}, (3,), 4 + 2,
    ),
    # A mask with zeros: what it hides is dead.
    "masked kernel": Architecture(
        lambda w, x: relu(x @ (w["w"] * np.array([[1.0, 0, 1], [0, 1, 1]]))) @ w["o"],
        {"w": (2, 3), "o": (3, 2)}, (2,), 3,
    ),
    "embedding": Architecture(
        lambda w, x: relu(w["e"][x].reshape(x.shape[0], -1) @ w["a"]) @ w["o"],
        # An embedding's coordinate has one scale for all tokens.
        {"e": (5, 3), "a": (6, 4), "o": (4, 2)}, (2,), 3 + 4, tokens=5,
    ),
    "tied embedding": Architecture(
        lambda w, x: relu(w["e"][x].mean(1) @ w["a"]) @ w["e"].T,
        # e = s, a = t − s, and t = −s for the tied output.
        {"e": (5, 3), "a": (3, 3)}, (2,), 3, tokens=5,
    ),
    "maxout": Architecture(
        lambda w, x: jnp.maximum(x @ w["a"], x @ w["b"]) @ w["o"],
        {"a": (3, 4), "b": (3, 4), "o": (4, 2)}, (3,), 4,
    ),
    "units that nothing reads": Architecture(
        lambda w, x: jax.nn.leaky_relu(x @ w["a"] + w["b"])[:, :3] @ w["o"],
        {"a": (3, 4), "b": (4,), "o": (3, 2)}, (3,), 3,
    ),
    "division by a parameter": Architecture(
        lambda w, x: relu(x @ w["a"] / w["g"]) @ w["o"],
        {"a": (3, 4), "g": (4,), "o": (4, 2)}, (3,), 4 + 4,
    ),
    "vmap": Architecture(
        lambda w, x: jax.vmap(lambda x: w["o"] @ relu(w["a"] @ x + w["b"]))(x),
        {"a": (4, 3), "b": (4,), "o": (2, 4)}, (3,), 4,
    ),
}  # fmt: skip


def _is_shape(value):
    return isinstance(value, tuple)


def _zeros(shapes):
    return jax.tree.map(np.zeros, shapes, is_leaf=_is_shape)


def _normal(shapes, dtype=np.float64):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=_is_shape
    )


@pytest.mark.parametrize(
    "name",
    [
        # Its parts, a skip and convolutions, are in the others.
        pytest.param(name, marks=pytest.mark.slow) if name == "residual CNN" else name
        for name in ARCHITECTURES
    ],
)
def test_dimension_is_as_derived_by_hand_and_as_found_numerically(name, x64):
    fn, shapes, x_shape, dim, tokens, batch = ARCHITECTURES[name]
    params = _zeros(shapes)
    x = jax.ShapeDtypeStruct((1, *x_shape), np.int32 if tokens else np.float64)
    group = rescaling_group(fn, params, x)
    assert_exact(fn, params, x_shape, group, batch=batch, tokens=tokens, expected=dim)


@pytest.mark.parametrize("name", ["conv, pool, flatten", "batch norm, ε = 0", "attention"])
def test_function_is_unchanged_by_a_random_rescaling(name, x64):
    fn, shapes, x_shape, *_ = ARCHITECTURES[name]
    params, x = _normal(shapes), _normal((6, *x_shape))
    group = rescaling_group(fn, params, x)
    net = jax.jit(fn)
    before, after = net(params, x), net(rescale(group, params, _normal((group.dim,))), x)
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-10)


# --- random architectures -----------------------------------------------------------------------


def assert_matches_numerics(network):
    with jax.enable_x64(True):
        shape, params = network.inputs.shape, network.params(np.float64)
        group = rescaling_group(network.fn, params, np.zeros((1, *shape)))
        assert_exact(network.fn, params, shape, group)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_networks_have_the_dimension_found_numerically(shape):
    @settings(max_examples=3)
    @given(random_networks(shape))
    def check(network):
        assert_matches_numerics(network)

    check()


def _dense(width):
    return lambda n: ((n, width), lambda w, h: h @ w, width)


def _elementwise(f):
    return lambda n: (None, lambda w, h: f(h), n)


# name -> (input width -> (shape of the weight or None, apply, output width))
PIECES = {
    "dense 2": _dense(2),
    "dense 3": _dense(3),
    "relu": _elementwise(relu),
    "leaky": _elementwise(lambda h: jnp.where(h > 0, h, 0.2 * h)),
    "tanh": _elementwise(jnp.tanh),
    "square": _elementwise(jnp.square),
    "scale": lambda n: ((n,), lambda w, h: h * w, n),
    "divide": lambda n: ((n,), lambda w, h: h / w, n),
    "bias": lambda n: ((n,), lambda w, h: h + w, n),
    "scalar bias": lambda n: ((), lambda w, h: h + w, n),
    "residual": lambda n: ((n, n), lambda w, h: h + relu(h @ w), n),
    "twice": lambda n: ((n, n), lambda w, h: relu(relu(h @ w) @ w), n),
    "tied": lambda n: ((n, 3), lambda w, h: relu(h @ w) @ w.T, n),
    "gate": lambda n: ((2, n, n), lambda w, h: (h @ w[0]) * (h @ w[1]), n),
    "concat": lambda n: ((n, 2), lambda w, h: jnp.concatenate([h, relu(h @ w)], -1), n + 2),
    "l2": _elementwise(lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True)),
    "first": lambda n: (None, lambda w, h: h[:, :2], min(n, 2)),
    "sort": _elementwise(lambda h: jnp.sort(h, -1)),
}


@settings(max_examples=8)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=5))
def test_random_sequences_of_layers_have_the_dimension_found_numerically(names):
    width, shapes, applies = 3, {}, []
    for i, name in enumerate(["dense 3", *names, "dense 2"]):
        shape, apply, width = PIECES[name](width)
        if shape is not None:
            shapes[f"layer_{i}"] = shape
        applies.append((f"layer_{i}", apply))

    def fn(w, x):
        for key, apply in applies:
            x = apply(w.get(key), x)
        return x

    with jax.enable_x64(True):
        params = _zeros(shapes)
        group = rescaling_group(fn, params, np.zeros((1, 3)))
        assert_exact(fn, params, (3,), group)


# --- thresholds, which derivatives do not see ---------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "operation"),
    [
        (lambda h: jnp.where(h > 1, h, 0), ">"),
        (jax.nn.relu6, "relu6"),
        (lambda h: jnp.round(h), "round"),
        (lambda h: jnp.floor(h) * h, "floor"),
    ],
    ids=["where(h > 1)", "relu6", "round", "floor"],
)
def test_thresholds_pin_their_operand_and_are_named(gate, operation):
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    group = rescaling_group(lambda w, x: gate(x @ w["a"]) @ w["o"], params, np.zeros((1, 3)))
    assert group.dim == 0
    ((name, where),) = group.pinned_by
    assert name == operation and "test_group.py" in where


@pytest.mark.parametrize(
    "name", "sigmoid selu mish celu gelu logsumexp log_sigmoid softmax standardize".split()
)
def test_an_activation_has_the_name_under_which_it_was_called(name):
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    act = getattr(jax.nn, name)
    fn = lambda w, x: (x @ w["a"] * act(x @ w["a"]).mean()) @ w["o"]  # noqa: E731
    group = rescaling_group(fn, params, np.zeros((1, 3)), batch_axis=None)
    assert name in [found for found, _ in group.pinned_by]


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda h: jnp.clip(h, 0, 6), "clip"),
        (lambda h: jnp.maximum(h, 1), "maximum"),
        (lambda h: h.astype(jnp.int8).astype(float), "astype"),
    ],
    ids=["clip", "maximum", "astype"],
)
def test_an_operation_is_named_as_it_was_written(act, name):
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    group = rescaling_group(lambda w, x: act(x @ w["a"]) @ w["o"], params, np.zeros((1, 3)))
    assert [found for found, _ in group.pinned_by] == [name]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda w, h: h.sum(-1, keepdims=True) * w["s"], "sum"),
        (lambda w, h: h.max(-1, keepdims=True) * w["s"], "max"),
        (lambda w, h: jnp.sort(h) @ w["o"], "sort"),
        (lambda w, h: h / jnp.linalg.norm(h, axis=-1, keepdims=True) @ w["o"], "sum"),
        (lambda w, h: jax.nn.relu(h @ w["a"]) @ w["o"], "dot_general"),
    ],
    ids=["sum", "maximum", "sort", "norm", "a weight used twice"],
)
def test_fewer_generators_than_units_have_a_reason(fn, name):
    params = {"a": np.zeros((4, 4)), "s": np.zeros(2), "o": np.zeros((4, 2))}
    net = lambda w, x: fn(w, jax.nn.relu(x @ w["a"]))  # noqa: E731
    group = rescaling_group(net, params, np.zeros((1, 4)))
    assert group.dim < 4 and not group.pinned_by
    ((found, where),) = group.tied_by
    assert found == name and "test_group.py" in where


def test_units_that_nothing_ties_are_as_many_as_generators():
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    fn = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["o"]  # noqa: E731
    group = rescaling_group(fn, params, np.zeros((1, 3)))
    assert group.dim == 4 and group.tied_by == group.pinned_by == ()


def test_a_comparison_between_units_ties_them():
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}

    def winner(w, x):
        h = relu(x @ w["a"])
        return jnp.where(h == h.max(-1, keepdims=True), h, 0.0) @ w["o"]

    assert rescaling_group(winner, params, np.zeros((1, 3))).dim == 1


def test_an_operation_without_rule_pins_only_its_operands():
    params = {"a": np.zeros((3, 4)), "b": np.zeros((4, 3)), "c": np.zeros((3, 2))}

    def fn(w, x):
        return jax.scipy.special.erfinv(relu(x @ w["a"]) @ w["b"]) @ w["c"]

    group = rescaling_group(fn, params, np.zeros((1, 3)))
    assert group.dim == 4
    assert group.pinned_by[0][0] == "erf_inv"


def test_data_dependent_control_flow_keeps_what_is_common():
    params = {"i": np.zeros((3, 4)), "w": np.zeros((4, 4)), "o": np.zeros((4, 2))}

    def branch(w, x):
        h = lax.cond(x.sum() > 0, lambda h: relu(h @ w["w"]), lambda h: h, relu(x @ w["i"]))
        return h @ w["o"]

    def loop(w, x):
        start = (jnp.abs(x).sum(), relu(x @ w["i"]))
        return (
            lax.while_loop(lambda c: c[0] < 9.0, lambda c: (c[0] + 1, relu(c[1] @ w["w"])), start)[
                1
            ]
            @ w["o"]
        )

    for fn in (branch, loop):
        group = rescaling_group(fn, params, np.zeros((1, 3), np.float32))
        assert group.dim == 4
        assert group.names[2] == "i out 2, w out 2 → o in 2, w in 2"


# --- epsilon ------------------------------------------------------------------------------------


def test_epsilon_is_ignored_only_on_request_and_by_name():
    params = _zeros(_NORM)
    fn = functools.partial(_batch_norm, 1e-5)
    exact = rescaling_group(fn, params, np.zeros((1, 3)))
    assert exact.dim == 4 and not exact.ignored
    assert any(name == "add" for name, _ in exact.pinned_by)
    loose = rescaling_group(fn, params, np.zeros((1, 3)), ignore_epsilon=True)
    assert loose.dim == 8
    ((name, where),) = loose.ignored
    assert name == "epsilon 1e-05" and "test_group.py" in where


@pytest.mark.parametrize(
    ("gate", "name"),
    [
        (jax.nn.gelu, "gelu"),  # x + 0.04 x³ pins x
        (lambda h: jax.nn.gelu(h, approximate=False), "gelu"),
        (jax.nn.silu, "silu"),
        (lambda h: h + h**3, "add"),
        (lambda h: nn.LayerNorm(use_scale=False, use_bias=False).apply({}, h), "LayerNorm"),
    ],
    ids=["gelu", "exact gelu", "silu", "cubic", "layer norm"],
)
def test_what_pins_is_named_as_the_user_wrote_it(gate, name):
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    group = rescaling_group(lambda w, x: gate(x @ w["a"]) @ w["o"], params, np.zeros((1, 3)))
    assert group.dim == 0
    assert [found for found, _ in group.pinned_by] == [name]


@pytest.mark.parametrize("layer", [nn.BatchNorm(use_running_average=False), nn.LayerNorm()])
def test_flax_normalisation_is_scale_invariant_up_to_epsilon(layer, standard_dtype_promotion):
    dense = nn.Dense(4, use_bias=False)

    def fn(w, x):
        out = layer.apply(
            {"params": w["norm"]}, dense.apply({"params": w["dense"]}, x), mutable=True
        )
        return relu(out[0]) @ w["o"]

    x = _normal((16, 3), np.float32)
    shapes = {"dense": {"kernel": (3, 4)}, "norm": {"scale": (4,), "bias": (4,)}, "o": (4, 2)}
    params = _normal(shapes, np.float32)
    scales = 4 if isinstance(layer, nn.BatchNorm) else 1
    assert rescaling_group(fn, params, x).dim == 4
    group = rescaling_group(fn, params, x, ignore_epsilon=True)
    assert group.dim == 4 + scales
    moved = rescale(group, params, _normal((group.dim,), np.float32))
    error = jnp.abs(fn(moved, x) - fn(params, x)).max()
    assert 1e-7 < error < 1e-3  # O(ε), and not rounding: ignoring it was a choice


def test_an_addition_that_no_normalisation_follows_is_no_epsilon():
    params = {"a": np.zeros((3, 4)), "o": np.zeros((4, 2))}
    fn = lambda w, x: relu(x @ w["a"] + 1e-5) @ w["o"]  # noqa: E731
    assert rescaling_group(fn, params, np.zeros((1, 3)), ignore_epsilon=True).dim == 0


@pytest.mark.parametrize(
    "factors",
    [
        lambda m: jnp.diag(jnp.linalg.svd(m, compute_uv=False)),
        lambda m: jnp.linalg.qr(m)[1],
        lambda m: jax.lax.linalg.triangular_solve(m, jnp.eye(3)),
    ],
    ids=["svd", "qr", "triangular_solve"],
)
def test_an_epsilon_before_a_decomposition_keeps_what_the_product_hides(factors):
    """a @ b + ε sees no rescaling of the three units between a and b, and nothing else is free."""
    params = {"a": np.eye(3), "b": np.eye(3)}
    fn = lambda w, x: x @ factors(w["a"] @ w["b"] + 1e-6)  # noqa: E731
    assert rescaling_group(fn, params, np.zeros((1, 3)), ignore_epsilon=True).dim == 3


# --- large networks -----------------------------------------------------------------------------


@functools.cache
def _resnet(kind, size, **options):
    net = kind(**options)
    x = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, False), x)
    rng = np.random.default_rng(0)

    def draw(s):
        return rng.uniform(0.5, 1.5, s.shape).astype(np.float32)

    stats = jax.tree.map(draw, shapes["batch_stats"])
    return net, shapes["params"], stats, draw


def _frozen_resnet(*args, **options):
    net, shapes, stats, _ = _resnet(*args, **options)
    return lambda w, x: net.apply({"params": w, "batch_stats": stats}, x, False), shapes


def test_groups_of_large_networks_take_memory_of_their_units(standard_dtype_promotion):
    widths = (4000, 4000, 4000, 10)
    params = {
        f"Dense_{i}": {"kernel": jax.ShapeDtypeStruct((a, b), np.float32)}
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
    }
    dense = rescaling_group(networks.mlp, params, jax.ShapeDtypeStruct((1, 4000), np.float32))
    assert dense.dim == 8000
    fn, shapes = _frozen_resnet(resnet.ResNet50, 224)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    deep = rescaling_group(fn, shapes, x)
    # Each block's two inner layers, and one stream per stage together with the stem.
    inner = sum(2 * 64 * 2**i * blocks for i, blocks in enumerate((3, 4, 6, 3)))
    assert deep.dim == inner + 64 + sum(256 * 2**i for i in range(4))
    for group in (dense, deep):
        assert sum(np.size(leaf) for leaf in jax.tree.leaves(group)) < 16 * group.dim


@pytest.mark.slow
def test_a_narrow_resnet18_has_the_dimension_found_numerically(x64, standard_dtype_promotion):
    """All its layers and skips, at a width for which every diagonal scaling can be tried."""
    net, shapes, stats, _ = _resnet(resnet.ResNet18, 8, small_inputs=True, features=1)
    stats = jax.tree.map(lambda s: s.astype(np.float64), stats)

    def fn(w, x):
        return net.apply({"params": w, "batch_stats": stats}, x, False)

    params = jax.tree.map(lambda s: np.zeros(s.shape), shapes)
    group = rescaling_group(fn, params, jax.ShapeDtypeStruct((1, 8, 8, 3), np.float64))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Convolutions with other weights for each draw are slow side by side.
    A, dead = derivative_rows(fn, params, (8, 8, 3), 2 * size, 1, at_once=None)
    assert not dead.any() or group.unused
    values = np.linalg.eigvalsh(A[:, ~dead].T @ A[:, ~dead])
    found = int((values < 1e-12 * values[-1]).sum())
    assert found == group.dim
    assert values[found] > 1e3 * abs(values[found - 1])


def test_powers_of_two_change_no_bit_of_a_resnet(standard_dtype_promotion):
    fn, shapes = _frozen_resnet(resnet.ResNet18, 32, small_inputs=True)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) / np.sqrt(np.prod(s.shape[:-1])), s.dtype),
        shapes,
    )
    x = jnp.asarray(rng.normal(size=(1, 32, 32, 3)), jnp.float32)
    group = rescaling_group(fn, params, x)
    assert group.dim == 2 * (64 + 128 + 256 + 512) + (64 + 128 + 256 + 512)
    k = random_rescaling(group, jax.random.key(0), kind="power_of_two")
    moved = rescale(group, params, k, base=2)
    changed = [jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, moved)), strict=True)]
    assert np.mean(changed) > 0.7  # all but the mean-pinned stem convolutions and the last bias
    net = jax.jit(fn)
    before, after = net(params, x), net(moved, x)
    assert float(jnp.abs(before).max()) > 0
    assert float(jnp.abs(after - before).max()) == 0.0


# --- the action ---------------------------------------------------------------------------------


def _small(dtype=np.float64):
    params, x = _normal(_MLP, dtype), _normal((6, 4), dtype)
    return params, x, rescaling_group(networks.mlp, params, x)


def test_group_properties(x64):
    params, x, group = _small()
    u, v = _normal((2, group.dim))
    there = rescale(group, rescale(group, params, u), v)
    at_once = rescale(group, params, u + v)
    back = rescale(group, rescale(group, params, u), -u)
    for a, b in [(there, at_once), (back, params)]:
        chex.assert_trees_all_close(a, b, rtol=1e-12)


def test_factors_are_those_of_the_units(x64):
    params, _, group = _small()
    d = jnp.exp(jnp.arange(1.0, 9.0))
    moved = rescale(group, params, jnp.log(d))
    first, second = d[:3], d[3:]
    factor = {
        "Dense_0": {"kernel": first[None], "bias": first},
        "Dense_1": {"kernel": second[None] / first[:, None], "bias": second},
        "Dense_2": {"kernel": 1 / second[:, None], "bias": 1.0},
    }
    expected = jax.tree.map(lambda w, f: w * f, params, factor)
    chex.assert_trees_all_close(moved, expected, rtol=1e-13)


def test_a_single_precision_u_moves_double_weights_in_double_precision(x64):
    params, x, group = _small()
    u = _normal((group.dim,), np.float32)
    moved = networks.mlp(rescale(group, params, 2 * u), x)
    np.testing.assert_allclose(moved, networks.mlp(params, x), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_powers_of_two_are_exact_in_every_dtype(dtype):
    params, x, group = _small(dtype)
    k = jnp.array([7, -9, 1, 0, 3, -4, 20, -20])
    moved = rescale(group, params, k, base=2)
    back = rescale(group, moved, -k, base=2)
    same = jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, params, back)
    assert jax.tree.all(same)
    assert (networks.mlp(moved, x) == networks.mlp(params, x)).all()


def test_rescaling_jits_vmaps_and_differentiates(x64):
    params, _, group = _small()
    us = _normal((4, group.dim))
    batched = jax.jit(jax.vmap(rescale, in_axes=(None, None, 0)))(group, params, us)
    single = rescale(group, params, us[2])
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[2], batched), single, rtol=1e-12)
    _, tangent = jax.jvp(lambda u: rescale(group, params, u), (0 * us[0],), (us[1],))
    generated = tangent_vectors(group, params).matvec(us[1])
    chex.assert_trees_all_close(tangent, generated, rtol=1e-12)


def test_gradients_are_transported(x64):
    params, x, group = _small()
    u = _normal((group.dim,))
    gradient = jax.grad(lambda w: (networks.mlp(w, x) ** 3).sum())
    there = gradient(rescale(group, params, u))
    moved = rescale_gradient(group, gradient(params), u)
    chex.assert_trees_all_close(there, moved, rtol=1e-9, atol=1e-12)


def test_tangent_vectors_are_orthogonal_to_the_gradient_of_any_loss(x64):
    params, x, group = _small()
    gradient = jax.grad(lambda w: jnp.sin(networks.mlp(w, x)).sum())(params)
    T = tangent_vectors(group, params)
    assert T.shape == (sum(leaf.size for leaf in jax.tree.leaves(params)), 8)
    inner = T.rmatvec(gradient)
    size = jnp.sqrt(T.rmatvec(params) ** 2).max() * ravel_pytree(gradient)[0].max()
    assert jnp.abs(inner).max() < 1e-14 * size
    tanh = functools.partial(networks.mlp, activation=jnp.tanh)
    other = jax.grad(lambda w: jnp.sin(tanh(w, x)).sum())(params)
    assert jnp.abs(T.rmatvec(other)).max() > 1e-3


def test_matvec_and_rmatvec_are_the_dense_matrix_and_its_transpose(x64):
    params, _, group = _small()
    dense = tangent_vectors(group, params, dense=True)
    T = tangent_vectors(group, params)
    u = _normal((group.dim,))
    g = jax.tree.map(jnp.cos, params)
    np.testing.assert_allclose(ravel_pytree(T.matvec(u))[0], dense @ u, rtol=1e-12)
    np.testing.assert_allclose(T.rmatvec(g), dense.T @ ravel_pytree(g)[0], rtol=1e-12)
    np.testing.assert_allclose(
        ravel_pytree(jax.tree.map(jnp.multiply, params, log_scales(group, u)))[0], dense @ u
    )


# --- random draws -------------------------------------------------------------------------------


def test_draws_have_the_promised_distribution():
    params = {f"Dense_{i}": {"kernel": np.zeros((200, 200))} for i in range(5)}
    group = rescaling_group(networks.mlp, params, np.zeros((1, 200)))
    key = jax.random.key(0)
    u = random_rescaling(group, key, std=2.0)
    assert abs(float(u.std()) - 2) < 0.1 and abs(float(u.mean())) < 0.2
    k = random_rescaling(group, key, kind="power_of_two")
    assert k.dtype == jnp.int32 and abs(float(k.std()) * np.log(2) - 1) < 0.1
    chosen = np.asarray(random_rescaling(group, key, kind="unbalanced", units=32)).reshape(4, 200)
    assert ((chosen != 0).sum(axis=1) == 32).all()
    assert abs(chosen[chosen != 0].mean() - np.log(10)) < 0.3
    assert {tuple(np.flatnonzero(row)) for row in chosen}.__len__() == 4


# --- names and reports --------------------------------------------------------------------------


def test_names_say_which_weights_are_multiplied_and_divided():
    group = rescaling_group(networks.cnn, _zeros(_CNN), np.zeros((1, 4, 4, 1)))
    assert group.names == [
        "Conv_0/kernel out 0, Conv_2/kernel out 0 → Conv_1/kernel in 0, Dense_0/kernel in 0",
        "Conv_0/kernel out 1, Conv_2/kernel out 1 → Conv_1/kernel in 1, Dense_0/kernel in 1",
        "Conv_1/kernel out 0 → Conv_2/kernel in 0",
        "Conv_1/kernel out 1 → Conv_2/kernel in 1",
    ]
    assert group.layers == ("Conv_0/kernel",) * 2 + ("Conv_1/kernel",) * 2
    assert "2 scale the outputs of Conv_1/kernel" in str(group)


def test_a_flattened_channel_names_one_row_and_counts_the_others():
    shapes = ARCHITECTURES["conv, pool, flatten"]
    group = rescaling_group(shapes.fn, _zeros(shapes.shapes), np.zeros((1, 4, 4, 1)))
    assert group.names[1] == "k out 1 → d in 1 and 3 more"


def test_unused_parameters_are_named():
    params = {"a": np.zeros((3, 3, 2, 3)), "o": np.zeros((3, 2)), "z": np.zeros(7)}

    def fn(w, x):
        return relu(_conv(x, w["a"]))[:, 0, 0] @ w["o"]

    group = rescaling_group(fn, params, np.zeros((1, 1, 1, 2)))
    assert set(group.unused) == {"z", "a (48 of 54 elements)"}


# --- optimizer states ---------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd, momentum": optax.sgd(0.1, momentum=0.9),
    "sgd, nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.0),
    "rmsprop": optax.rmsprop(0.1, centered=True),
    "adam": optax.adam(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lion": optax.lion(0.1),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
    "chain": optax.chain(optax.trace(0.9), optax.scale_by_rms(), optax.scale(-0.1)),
    "masked": optax.masked(
        optax.sgd(0.1, momentum=0.9), lambda w: jax.tree.map(lambda a: a.ndim > 1, w)
    ),
    "partition": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.5)},
        lambda w: jax.tree.map(lambda a: "a" if a.ndim > 1 else "b", w),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rescaled_state_is_that_of_rescaled_gradients(name, x64, standard_dtype_promotion):
    """Two histories: gradients g_t, and g_t / d, as the rescaled network has them."""
    params, _, group = _small()
    u = _normal((group.dim,))
    moved = rescale(group, params, u)
    tx = OPTIMIZERS[name]
    state, there = tx.init(params), tx.init(moved)
    for t in range(2):
        g = jax.tree.map(lambda w, t=t: jnp.sin(5 * w + t), params)
        _, state = tx.update(g, state, params)
        _, there = tx.update(rescale_gradient(group, g, u), there, moved)
    transported = rescale_state(group, state, u)
    assert jax.tree.structure(transported) == jax.tree.structure(there)
    before, after, expected = map(jax.tree.leaves, (state, transported, there))
    for a, b in zip(after, expected, strict=True):
        single = np.asarray(a).dtype == np.float32  # of some accumulators, whatever the params are
        np.testing.assert_allclose(a, b, rtol=1e-6 if single else 1e-10, atol=1e-14)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("momentum", "every"), [(0.9, 1), pytest.param(0.0, 2, marks=pytest.mark.slow)]
)
def test_path_sgd_continues_its_trajectory_after_moving_along_the_orbit(momentum, every, x64):
    params, x, group = _small()
    core = match_gradient_norm(scale_by_path_kappa(networks.mlp, x, every=every))
    tx = optax.chain(core, optax.trace(momentum), optax.scale(-1e-2))
    y = jnp.cos(jnp.arange(12.0)).reshape(6, 2)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda w: ((networks.mlp(w, x) - y) ** 2).mean())(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def run(params, state, move):
        outputs = []
        for t in range(7):
            if t == 3 and move is not None:  # with every = 2 a stored κ is in use here
                params, state = rescale(group, params, move), rescale_state(group, state, move)
            params, state = step(params, state)
            outputs.append(networks.mlp(params, x))
        return jnp.stack(outputs)

    stay = run(params, tx.init(params), None)
    u = 2 * _normal((group.dim,))
    np.testing.assert_allclose(run(params, tx.init(params), u), stay, rtol=1e-9)
    assert jnp.abs(stay[-1] - stay[0]).max() > 1e-2
    if momentum:  # and a momentum left behind, or taken for gradients, would not do
        state = step(params, tx.init(params))[1]
        wrong = rescale_state(group, state, u, powers={"TraceState.trace": -1})
        left, right = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(s) if leaf.ndim])
            for s in (wrong, rescale_state(group, state, u))
        )
        assert jnp.abs(left - right).max() > 0.1 * jnp.abs(right).max()


def test_a_state_that_is_not_known_is_refused_by_name(x64):
    params, _, group = _small()
    state = optax.scale_by_adadelta().init(params)
    with pytest.raises(InvalidInput, match=r"ScaleByAdaDeltaState.e_g.*powers="):
        rescale_state(group, state, jnp.ones(8))
    powers = {"ScaleByAdaDeltaState.e_g": -2, "ScaleByAdaDeltaState.e_x": 0}
    moved = rescale_state(group, state, jnp.ones(8), powers=powers)
    assert jax.tree.structure(moved) == jax.tree.structure(state)


def test_momentum_after_mixed_updates_needs_a_power(x64):
    params, _, group = _small()
    mixed = optax.partition(
        {"a": optax.scale_by_adam(), "b": optax.identity()},
        lambda w: jax.tree.map(lambda a: "a" if a.ndim > 1 else "b", w),
    )
    state = optax.chain(mixed, optax.trace(0.9)).init(params)
    with pytest.raises(InvalidInput, match=r"TraceState.trace.*different powers"):
        rescale_state(group, state, jnp.ones(8))


# --- refusals -----------------------------------------------------------------------------------


def test_errors_say_what_does_not_fit(x64):
    params, _, group = _small()
    with pytest.raises(InvalidInput, match=r"u has shape \(3,\), but the group has 8"):
        rescale(group, params, jnp.ones(3))
    with pytest.raises(InvalidInput, match="another tree structure"):
        rescale(group, {"Dense_0": params["Dense_0"]}, jnp.ones(8))
    other = networks.init_mlp(jax.random.key(0), (4, 3, 6, 2))
    with pytest.raises(InvalidInput, match=r"Dense_1/bias has shape \(6,\).*\(5,\)"):
        rescale(group, other, jnp.ones(8))
    with pytest.raises(InvalidInput, match="kind must be"):
        random_rescaling(group, jax.random.key(0), kind="uniform")
    with pytest.raises(InvalidInput, match="units is"):
        random_rescaling(group, jax.random.key(0), units=3)
    with pytest.raises(InvalidInput, match="std must be"):
        random_rescaling(group, jax.random.key(0), std=-1.0)
    with pytest.raises(InvalidInput, match="floating"):
        rescaling_group(lambda w, x: x @ w, np.ones((2, 2), int), np.ones((1, 2)))


@pytest.mark.parametrize("powers", [(10**6, 10**6), (1000,) * 7, (3 * 10**9,)], ids=str)
def test_exponents_that_would_overflow_are_refused(powers):
    def fn(w, x):
        h = jax.nn.relu(x @ w[0])
        for power in powers:
            h = h**power
        return h @ w[1]

    w, x = [jnp.ones((2, 3)), jnp.ones((3, 1))], jnp.ones((1, 2))
    for kind in (OverflowError, UnsupportedOperation, ExponentOverflow):
        with pytest.raises(kind, match="too large to solve for exactly"):
            rescaling_group(fn, w, x)
