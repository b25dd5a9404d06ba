"""Frozen normalisation however it is written: the same paths."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import UnsupportedOperation, path_kappa, path_norm, path_sgd

relu = jax.nn.relu
KEYS = jax.random.split(jax.random.key(0), 8)
W = {
    "a": jax.random.normal(KEYS[0], (3, 5)),
    "b": jax.random.normal(KEYS[1], (5,)),
    "gain": jax.random.normal(KEYS[2], (5,)),
    "offset": jax.random.normal(KEYS[3], (5,)),
    "c": jax.random.normal(KEYS[4], (5, 2)),
}
MEAN, SCALE = jax.random.normal(KEYS[5], (5,)), 0.5 + jax.random.uniform(KEYS[6], (5,))
X = jnp.ones((4, 3))


def subtracted_first(w, h):
    return (h - MEAN) * (w["gain"] * SCALE) + w["offset"]


def one_offset(w, h):
    inverse = SCALE * w["gain"]
    return h * inverse + (w["offset"] - MEAN * inverse)


def one_offset_moved_about(w, h):
    inverse = SCALE[None] * w["gain"][None]
    offset = -(MEAN[None] * inverse - w["offset"][None]).astype(jnp.float32)
    return h * jnp.broadcast_to(inverse, h.shape) + jnp.broadcast_to(offset, h.shape)


def by_hand(w, p):
    """Σ over paths: of inputs, of b and of the mean through the gain; of the offset."""
    sizes = {n: abs(v) ** p for n, v in w.items()}
    through = sizes["gain"] * SCALE**p
    into = (sizes["a"].sum(0) + sizes["b"] + abs(MEAN) ** p) * through + sizes["offset"]
    return (into @ sizes["c"]).sum()


def network(normalise):
    return lambda w, x: relu(normalise(w, x @ w["a"] + w["b"])) @ w["c"]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("normalise", [subtracted_first, one_offset, one_offset_moved_about])
def test_paths_of_a_frozen_normalisation(normalise, p):
    fn = network(normalise)
    np.testing.assert_allclose(path_norm(fn, W, X, p=p) ** p, by_hand(W, p), rtol=1e-5)
    got = path_kappa(fn, W, X, p=p)
    lengths = jax.tree.map(lambda v: abs(v) ** p, W)
    # γ^p is a polynomial in the lengths: κ by automatic differentiation of what is written out.
    want = jax.grad(lambda s: by_hand(jax.tree.map(lambda v: v ** (1 / p), s), p))(lengths)
    chex.assert_trees_all_close(got, want, rtol=1e-4)


def test_path_sgd_takes_the_same_step():
    gradient = jax.tree.map(jnp.ones_like, W)
    steps = []
    for normalise in (subtracted_first, one_offset, one_offset_moved_about):
        tx = path_sgd(0.1, network(normalise), X)
        steps.append(tx.update(gradient, tx.init(W), W)[0])
    for step in steps[1:]:
        chex.assert_trees_all_close(step, steps[0], rtol=1e-5)


def test_a_sum_of_weights_that_multiplies_data_is_no_edge():
    def fn(w, x):
        return x @ (w["a"] + 2 * w["a2"])

    w = {"a": jnp.ones((3, 2)), "a2": jnp.ones((3, 2))}
    np.testing.assert_allclose(path_norm(fn, w, X), np.sqrt(6 * 9.0))
    with pytest.raises(UnsupportedOperation, match="nonlinear function of params/a, params/a2"):
        path_kappa(fn, w, X)
