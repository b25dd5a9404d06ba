"""Rotations of a stream: the function stays, the stream turns as it was asked to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.errors import InvalidInput
from jaxinv.symmetries import hadamard_rotation, principal_axes, symmetry_group
from jaxinv.symmetries.rotations import _hadamard, _without_mean
from tests.ground_truth.zoo import ZOO, inputs_of, params_of

STREAMS = ["tied embedding", "llama", "RMS stream", "layer norm between", "QK-norm"]


def rotations_of(group):
    return [i for i, c in enumerate(group.classes) if c.kind in ("O", "O1")]


@pytest.mark.parametrize(
    "name",
    [n if n == "layer norm between" else pytest.param(n, marks=pytest.mark.slow) for n in STREAMS],
)
def test_the_function_of_a_network_with_a_rotated_stream_is_its_own(name, x64):
    case = ZOO[name]
    w, x = params_of(case), inputs_of(case, 6)
    group = symmetry_group(case.fn, w, x)
    before = case.fn(w, x)
    assert rotations_of(group)
    for which in rotations_of(group):
        n = group.classes[which].size
        h = np.random.default_rng(1).normal(size=(4, 5, n))
        for found in (
            principal_axes(group, w, h, which=which),
            hadamard_rotation(group, w, jax.random.key(3), which=which),
        ):
            after = case.fn(found.params, x)
            assert abs(after - before).max() <= 1e-12 * abs(before).max()
            np.testing.assert_allclose(found.rotation @ found.rotation.T, np.eye(n), atol=1e-13)
            assert max(abs(found.params[k] - w[k]).max() for k in w) > 1e-2
            if group.classes[which].kind == "O1":
                np.testing.assert_allclose(found.rotation.sum(0), 1, atol=1e-13)


def rms(h):
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True))


def net(w, x):
    return jnp.tanh(rms(x @ w["e"]) * w["g"] @ w["u"])


def drawn(n=6):
    rng = np.random.default_rng(0)
    shapes = {"e": (5, n), "g": (n,), "u": (n, 4)}
    return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}, rng.normal(size=(30, 5))


def test_the_stream_lies_along_its_axes_the_largest_first(x64):
    w, x = drawn()
    group = symmetry_group(net, w, x)
    found = jax.jit(lambda w: principal_axes(group, w, x @ w["e"]))(w)
    h = x @ found.params["e"]
    np.testing.assert_allclose(h, x @ w["e"] @ found.rotation.T, atol=1e-12)
    squares = h.T @ h
    np.testing.assert_allclose(squares, np.diag(np.diag(squares)), atol=1e-10)
    values = np.linalg.svd(x @ w["e"], compute_uv=False) ** 2
    np.testing.assert_allclose(np.diag(squares)[:5], values[:5], rtol=1e-10)
    assert np.all(np.diff(np.diag(squares)) <= 1e-10)


@pytest.mark.slow
def test_an_outlier_is_spread_over_all_features(x64):
    w, x = drawn(8)
    w["e"] = w["e"].at[:, 3].multiply(1000)
    group = symmetry_group(net, w, x)
    found = hadamard_rotation(group, w, jax.random.key(0))
    before, after = (abs(x @ e).max(0) for e in (w["e"], found.params["e"]))
    assert before.max() > 500 * np.median(before) and after.max() < 1.1 * np.median(after)
    np.testing.assert_allclose(net(found.params, x), net(w, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12, 14])
def test_hadamard_matrices_of_any_size_are_orthogonal_and_flat(n):
    H = _hadamard(n)
    np.testing.assert_allclose(H @ H.T, np.eye(n), atol=1e-13)
    assert abs(H).max() <= np.sqrt((2 if n & (n - 1) else 1) / n) + 1e-12
    if n > 1:
        B = _without_mean(n)
        np.testing.assert_allclose(B @ B.T, np.eye(n - 1), atol=1e-13)
        np.testing.assert_allclose(B.sum(1), 0, atol=1e-13)


def test_mistakes(x64):
    w, x = drawn()
    group = symmetry_group(net, w, x)
    with pytest.raises(InvalidInput, match="but the stream has 6 features"):
        principal_axes(group, w, np.ones((3, 5)))
    with pytest.raises(InvalidInput, match="class 5 of the group is no rotation"):
        hadamard_rotation(group, w, jax.random.key(0), which=5)
    plain = symmetry_group(lambda w, x: x @ w["e"] @ w["u"], w, x)
    with pytest.raises(InvalidInput, match="which of the rotations is meant"):
        hadamard_rotation(plain, w, jax.random.key(0))
