"""Directions of kernels that no value reads, against the null space of the Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxinv.symmetries import shift_tangents
from jaxinv.symmetries.kernels import unread


def normal(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}


def wide(w, x):
    """A stream of 5 features made of 3; tanh keeps its frame from everything else."""
    return jnp.tanh(x @ w["e"] @ w["a"]) @ w["u"] + (w["e"] ** 2).sum() * x[:, :1]


def through_a_norm(w, x):
    h = x @ w["e"]
    h = h / jnp.sqrt((h * h).mean(-1, keepdims=True))
    return jnp.tanh(h @ w["a"]) @ w["u"]


def mean_free(w, x):
    h = jnp.tanh(x @ w["e"])
    return jnp.tanh((h - h.mean(-1, keepdims=True)) @ w["a"]) @ w["u"]


def weighted_mean_free(w, x):
    """A direction that depends on the input's own weights alone: constant, and not of ones."""
    p = np.arange(1.0, 6.0)
    h = jnp.tanh(x @ w["e"])
    return jnp.tanh((h - (h @ p)[:, None] * p / (p @ p)) @ w["a"]) @ w["u"]


SHAPES = {"e": (3, 5), "a": (5, 4), "u": (4, 2)}
FREE = {wide: (5 - 3) * 4, through_a_norm: (5 - 3) * 4, mean_free: 4, weighted_mean_free: 4}


@pytest.mark.parametrize(
    "fn", [f if f is weighted_mean_free else pytest.param(f, marks=pytest.mark.slow) for f in FREE]
)
def test_what_a_stream_does_not_reach_is_free_in_what_reads_it(fn, x64):
    w, x = normal(SHAPES), normal({"x": (80, 3)}, 1)["x"]
    found = shift_tangents(fn, w, x)
    J = jax.tree.leaves(jax.jit(jax.jacrev(lambda w: fn(w, x).ravel()))(w))
    J = np.concatenate([np.asarray(a).reshape(a.shape[0], -1) for a in J], axis=1)
    s = np.linalg.svd(J, compute_uv=False)
    nullity = J.shape[1] - int((s > 1e-11 * s[0]).sum())
    assert FREE[fn] <= found.dimension <= nullity
    assert free(fn, w, x) == FREE[fn]
    assert "a" in found.leaves
    np.testing.assert_allclose(J @ np.asarray(found.tangents).T, 0, atol=1e-9)


def free(fn, w, x):
    """What `unread` says of a network with outputs (examples, k)."""
    theta, unravel = ravel_pytree(w)
    y = fn(w, x)
    found = unread(
        lambda t: fn(unravel(t), x).ravel(),
        theta,
        [a.shape for a in jax.tree.leaves(w)],
        np.repeat(np.arange(len(y)), y.shape[1]),
        1e-9,
    )
    assert len(found) == np.linalg.matrix_rank(found) if len(found) else True
    return len(found)


def two_layers(w, x):
    return jnp.tanh(x @ w["a"]) @ w["u"]


def test_too_few_inputs_are_not_taken_for_a_stream_of_low_rank(x64):
    """Eleven inputs do not span 20 features; half of them leave more free than all do."""
    w, x = normal({"a": (20, 2), "u": (2, 40)}), normal({"x": (11, 20)}, 1)["x"]
    assert free(two_layers, w, x) == 0
    inside = normal({"x": (60, 11), "to": (11, 20)}, 2)
    assert free(two_layers, w, inside["x"] @ inside["to"]) == (20 - 11) * 2


def test_what_nothing_reads_at_all_is_dead_and_no_direction(x64):
    w, x = normal({"a": (4, 3), "u": (3, 2)}), normal({"x": (60, 4)}, 1)["x"].at[:, 2].set(0)
    assert free(two_layers, w, x) == 0
