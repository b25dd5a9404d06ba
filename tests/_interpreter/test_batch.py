"""Which axis counts examples, and whether a function treats each example by itself."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    batch_first,
    jacobian,
    jacobian_rank,
    path_kappa,
    path_norm,
    path_sgd,
    rescale,
    rescaling_group,
    tangent_kernel,
)
from jaxinv._interpreter.batch import traced_network

W = {
    "in": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32),
    "out": jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32),
}
X = jnp.asarray(np.random.default_rng(2).normal(size=(6, 3)), jnp.float32)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _users_write_mixed_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def net(w, x):
    return jax.nn.relu(x @ w["in"]) @ w["out"]


def hidden(w, x):
    return jax.nn.relu(x @ w["in"])


def standardized(h):
    return (h - h.mean(0)) / (1 + h.std(0))


MIXED = {
    "minus the first": lambda w, x: net(w, x) - net(w, x)[:1],
    "minus item 0": lambda w, x: net(w, x) - net(w, x)[0],
    "rolled": lambda w, x: net(w, x) + jnp.roll(net(w, x), 1, 0),
    "taken": lambda w, x: net(w, x) + jnp.take(net(w, x), jnp.zeros(len(x), int), axis=0),
    "shifted": lambda w, x: net(w, jnp.concatenate([x[1:], x[:1]])) + net(w, x),
    "divided by the size": lambda w, x: net(w, x) / x.shape[0],
    "divided by a count": lambda w, x: net(w, x) / jnp.ones(x.shape[0]).sum(),
    "another function of one example": lambda w, x: net(w, x) * (2.0 if len(x) == 1 else 1.0),
    "reversed": lambda w, x: net(w, x) + net(w, x[::-1]),
    "weights by position": lambda w, x: net(w, x) * (1 + jnp.arange(x.shape[0]))[:, None],
    "parameters by position": lambda w, x: hidden(w, x) + w["out"][: x.shape[0], :1],
    "a parameter by the size": lambda w, x: net(w, x) * w["out"][min(len(x), 8) - 1],
    "masked by position": lambda w, x: jnp.where(jnp.arange(len(x))[:, None] == 0, 0, net(w, x)),
    "dropout with a fixed key": lambda w, x: (
        hidden(w, x) * jax.random.bernoulli(KEY, 0.5, (len(x), 8)) @ w["out"]
    ),
    "running sum": lambda w, x: jnp.cumsum(net(w, x), 0),
    "sorted": lambda w, x: jnp.sort(net(w, x), 0),
    "ordered": lambda w, x: net(w, x)[jnp.argsort(x[:, 0])],
    "batch norm": lambda w, x: standardized(hidden(w, x)) @ w["out"],
    "attention over the batch": lambda w, x: jax.nn.softmax(x @ x.T) @ net(w, x),
    "Gram matrix": lambda w, x: net(w, x) @ net(w, x).T,
    "differences of pairs": lambda w, x: (net(w, x)[:, None] - net(w, x)[None]).sum(1),
    "reshaped across": lambda w, x: net(w, x) + net(w, x).T.reshape(len(x), 2),
    "recurrent along the batch": lambda w, x: lax.scan(
        lambda h, v: (h + v, h), jnp.zeros(2), net(w, x)
    )[1],
    "in a loop": lambda w, x: lax.fori_loop(0, 3, lambda i, h: h - h.mean(0), net(w, x)),
    "in jit": lambda w, x: jax.jit(lambda h: h - h.mean(0))(net(w, x)),
    "a branch by all": lambda w, x: lax.cond(x.sum() > 0, lambda: net(w, x), lambda: -net(w, x)),
    "one row overwritten": lambda w, x: net(w, x).at[0].set(0),
    "summed by segments": lambda w, x: jax.ops.segment_sum(
        net(w, x), jnp.arange(len(x)) // 2, len(x)
    ),
    "Fourier transform": lambda w, x: jnp.fft.fft(net(w, x), axis=0).real,
    "scaled by a norm of all": lambda w, x: net(w, x) / jnp.linalg.norm(net(w, x)),
    "tiled": lambda w, x: net(w, x) + jnp.tile(net(w, x)[:1], (len(x), 1)),
    "max over the batch": lambda w, x: net(w, x) + net(w, x).max(0, keepdims=True),
}
APART = {
    "plain": net,
    "jitted": jax.jit(net),
    "checkpointed": jax.checkpoint(net),
    "vmapped": lambda w, x: jax.vmap(lambda v: net(w, v))(x),
    "mapped": lambda w, x: lax.map(lambda v: net(w, v), x),
    "merged and split again": lambda w, x: x.reshape(-1).reshape(-1, 3) @ w["in"],
    "softmax": lambda w, x: jax.nn.softmax(net(w, x)),
    "standardized features": lambda w, x: (
        (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) @ w["in"]
    ),
    "own row": lambda w, x: net(w, x)[jnp.arange(len(x)), jnp.argmax(net(w, x), 1)][:, None],
    "own row, vmapped": lambda w, x: jax.vmap(lambda h, i: h[i])(
        net(w, x), jnp.argmax(net(w, x), 1)
    )[:, None],
    "own row, along axis": lambda w, x: jnp.take_along_axis(
        net(w, x), jnp.argmax(net(w, x), 1)[:, None], 1
    ),
    "own row overwritten": lambda w, x: (
        net(w, x).at[jnp.arange(len(x)), jnp.argmax(net(w, x), 1)].set(0.0)
    ),
    "a table": lambda w, x: hidden(w, x) + w["in"][jnp.argmax(x, 1)],
    "a loop inside": lambda w, x: lax.scan(
        lambda h, _: (h + hidden(w, x), None), jnp.zeros((len(x), 8)), None, length=3
    )[0],
    "recurrent along features": lambda w, x: jax.vmap(
        lambda v: lax.scan(lambda h, u: (jax.nn.relu(h + u), None), 0.0, v)[0]
    )(hidden(w, x))[:, None],
    "attention": lambda w, x: (lambda h: jax.nn.softmax(h @ h.mT) @ h)(x[:, :, None] * w["in"]).sum(
        1
    ),
    "factored": lambda w, x: jax.vmap(lambda v: jnp.linalg.cholesky(jnp.eye(3) + v * v[:, None]))(
        x
    ).sum(1),
    "the same noise for all": lambda w, x: net(w, x) + jax.random.normal(KEY, (2,)),
    "joined with ones": lambda w, x: jnp.concatenate([net(w, x), jnp.ones((len(x), 1)), x], 1),
    "mixing that is never used": lambda w, x: (net(w, x), x.mean(0))[0],
    "nothing of x": lambda w, x: jnp.zeros((len(x), 2)) + w["out"][0],
}


def flat(tree):
    return np.concatenate(
        [np.asarray(a).reshape(X.shape[0] * 2, -1) for a in jax.tree.leaves(tree)], 1
    )


@pytest.mark.parametrize("fn", MIXED.values(), ids=MIXED)
def test_what_is_not_known_to_keep_examples_apart_mixes_them(fn):
    found = traced_network(fn, W, X)
    assert not found.apart
    assert isinstance(found.error, UnsupportedOperation)
    assert "along the batch axis" in str(found.error) and "test_batch.py" in str(found.error)


@pytest.mark.parametrize("fn", APART.values(), ids=APART)
def test_the_program_for_one_example_gives_the_function_where_they_are_apart(fn):
    found = traced_network(fn, W, X)
    assert found.apart, str(found.error)
    np.testing.assert_allclose(found(W, X), fn(W, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["minus the first", "weights by position", "divided by the size"])
@pytest.mark.parametrize("measure", [path_norm, path_kappa])
def test_path_sums_refuse_mixed_examples_by_name(name, measure):
    with pytest.raises(UnsupportedOperation, match="along the batch axis") as error:
        measure(MIXED[name], W, X)
    assert "batch_axis=None" in str(error.value)


# Outputs of shape (n, 2).
DRAWN = ["minus the first", "rolled", "shifted", "weights by position", "divided by the size"]
DRAWN += ["reversed", "batch norm", "running sum", "sorted", "in a loop", "one row overwritten"]


@settings(max_examples=12, deadline=None)
@given(first=st.sampled_from(DRAWN), second=st.sampled_from(DRAWN), seed=st.integers(0, 99))
def test_jacobians_of_mixing_functions_take_the_batch_whole(first, second, seed):
    x = jax.random.normal(jax.random.key(seed), X.shape)

    def fn(w, x):
        return MIXED[first](w, x) - 0.5 * MIXED[second](w, x)

    assert not traced_network(fn, W, x).apart or first == second
    wanted, found = jax.jit(
        lambda w: (jax.jacrev(lambda w: fn(w, x).ravel())(w), jacobian(fn, w, x))
    )(W)
    np.testing.assert_allclose(found, flat(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param("minus the first", marks=pytest.mark.slow), "weights by position", "batch norm"],
)
def test_ranks_of_mixing_functions_are_those_of_the_whole_batch(name):
    fn = MIXED[name]
    with jax.enable_x64(True):
        w, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (W, X))
        J = flat(jax.jit(jax.jacrev(lambda w: fn(w, x).ravel()))(w))
    assert int(jacobian_rank(fn, W, X, method="svd").rank) == np.linalg.matrix_rank(J, tol=1e-9)


# --- another batch axis, or none ---


def recurrent(w, x):
    """Time-major: x is (time, batch, features)."""
    step = lambda h, v: ((z := jax.nn.relu(v @ w["in"] + h @ w["mid"])), z)  # noqa: E731
    return lax.scan(step, jnp.zeros((x.shape[1], 4)), x)[1] @ w["out"]


R = {
    "in": jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)), jnp.float32),
    "mid": jnp.asarray(np.random.default_rng(4).normal(size=(4, 4)), jnp.float32),
    "out": jnp.asarray(np.random.default_rng(5).normal(size=(4, 2)), jnp.float32),
}
SEQUENCES = jnp.asarray(np.random.default_rng(6).normal(size=(7, 5, 3)), jnp.float32)


def batch_major(w, x):
    return recurrent(w, x.swapaxes(0, 1)).swapaxes(0, 1)


def test_a_batch_axis_in_the_middle_gives_what_a_leading_one_gives():
    first = SEQUENCES.swapaxes(0, 1)
    of = (path_norm, path_kappa, jacobian, tangent_kernel)
    ours, theirs = jax.jit(
        lambda w: (
            [function(recurrent, w, SEQUENCES, batch_axis=1) for function in of],
            [function(batch_major, w, first) for function in of],
        )
    )(R)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[1]["mid"].min() > 0
    with pytest.raises(UnsupportedOperation, match="scan.* along the batch axis"):
        path_kappa(recurrent, R, SEQUENCES)


def test_the_group_of_a_function_along_time_leaves_it_alone():
    group = rescaling_group(recurrent, R, SEQUENCES)  # axis 0 counts steps, so it mixes
    moved = rescale(group, R, jnp.arange(1, group.dim + 1), base=2)
    assert group.dim == 4
    np.testing.assert_array_equal(recurrent(moved, SEQUENCES), recurrent(R, SEQUENCES))


def test_a_graph_is_one_input():
    adjacency = jnp.asarray(np.random.default_rng(7).integers(0, 2, (6, 6)), jnp.float32)
    fn = lambda w, x: adjacency @ jax.nn.relu(adjacency @ x @ w["in"]) @ w["out"]  # noqa: E731
    with pytest.raises(InvalidInput, match="batch_axis=None"):
        path_norm(fn, W, X)
    parts = [fn, *(lambda w, x, i=i: fn(w, x)[i] for i in range(6))]
    norm, *norms = jax.jit(lambda w: [path_norm(part, w, X, batch_axis=None) for part in parts])(W)
    np.testing.assert_allclose(norm**2, np.square(norms).sum(), rtol=1e-5)
    J, wanted = jax.jit(
        lambda w: (
            jacobian(fn, w, X, batch_axis=None), jax.jacrev(lambda w: fn(w, X).ravel())(w)
        )
    )(W)  # fmt: skip
    np.testing.assert_allclose(J, flat(wanted), rtol=1e-4, atol=1e-4)
    assert rescaling_group(fn, W, X, batch_axis=None).dim == 8


@pytest.mark.parametrize("axis", [True, 1.0, "x", 2, -1])
def test_a_bad_batch_axis_is_said_to_be(axis):
    with pytest.raises(InvalidInput, match="batch_axis"):
        path_norm(net, W, X, batch_axis=axis)


# --- what fn is now ---


def test_every_call_traces_what_the_function_is_now():
    mask = jnp.array([1.0, 0, 0, 0, 0, 0, 0, 0])
    masked = lambda w, x: (hidden(w, x) * mask) @ w["out"]  # noqa: E731
    x = jax.random.normal(KEY, (50, 3))
    before = int(jacobian_rank(masked, W, x, method="svd").rank), float(path_norm(masked, W, x))
    assert before[0] == 4
    mask = jnp.ones(8)
    assert int(jacobian_rank(masked, W, x, method="svd").rank) == 32
    np.testing.assert_allclose(path_norm(masked, W, x), path_norm(net, W, x), rtol=1e-6)
    assert rescaling_group(masked, W, x).dim == 8


def test_programs_are_equal_exactly_if_they_compute_the_same():
    def of(factor, scale=1.0):
        return traced_network(lambda w, x: jax.nn.silu(net(w, x)) * factor + scale, W, X)

    assert of(jnp.ones(2)) == of(jnp.ones(2)) and hash(of(jnp.ones(2))) == hash(of(jnp.ones(2)))
    assert of(jnp.ones(2)) != of(jnp.array([1.0, 2.0]))
    assert of(jnp.ones(2)) != of(jnp.ones(2), 2.0)
    assert of(jnp.zeros(2)) != of(-jnp.zeros(2))
    assert of(jnp.full(2, jnp.nan)) == of(jnp.full(2, jnp.nan))


@dataclasses.dataclass
class Centred:
    """Not hashable."""

    mean: jax.Array

    def __call__(self, w, x):
        return net(w, x - self.mean)

    def method(self, w, x):
        return net(w, x - self.mean)


@pytest.mark.parametrize(
    "fn",
    [
        Centred(jnp.zeros(3)),
        Centred(jnp.zeros(3)).method,
        functools.partial(lambda scale, w, x: scale * net(w, x), jnp.ones(2)),
        jax.tree_util.Partial(lambda scale, w, x: scale * net(w, x), jnp.ones(2)),
        jax.jit(net),
        jax.vmap(net, (None, 0)),
    ],
    ids=["callable", "bound method", "partial", "pytree partial", "jitted", "vmapped"],
)
def test_any_callable_will_do(fn):
    x = jax.random.normal(KEY, (40, 3))
    np.testing.assert_allclose(path_norm(fn, W, x), path_norm(net, W, x), rtol=1e-6)
    assert int(jacobian_rank(fn, W, x, method="svd").rank) == 32
    assert rescaling_group(fn, W, x).dim == 8


def test_batch_first_serves_optimizers():
    net_of_time = batch_first(recurrent, 1)
    optimizer = path_sgd(0.1, net_of_time, SEQUENCES.swapaxes(0, 1))
    gradients = jax.tree.map(jnp.ones_like, R)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(R), R)
    kappa = jax.jit(lambda w: path_kappa(recurrent, w, SEQUENCES, batch_axis=1))(R)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda k: -0.1 / k, kappa), rtol=1e-5)
