"""Balanced members and aligned networks, against closed forms and by moving along orbits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.errors import InvalidInput
from jaxinv.symmetries import (
    act,
    align,
    balance_matrices,
    distance_mod_symmetries,
    random_element,
    symmetry_group,
)
from tests.ground_truth.zoo import ZOO, inputs_of, params_of

# Rotations of a stream through gains, layers wider than what they connect, and scales that have no
# smallest member, are outside of what `align` promises.
EXACT = [
    "linear with biases",
    "attention",
    "grouped heads",
    "QK-norm",
    "pre-LN block",
    "LoRA",
    "layer norm between",
    "tied embedding",
    "linear convolutions",
]


def test_two_factors_meet_in_the_square_roots_of_the_singular_values():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w = {"in": rng.normal(size=(6, 3)), "out": rng.normal(size=(3, 5))}
        group = symmetry_group(lambda w, x: x @ w["in"] @ w["out"], w, np.eye(6))
        gauge = jax.jit(lambda w: balance_matrices(group, w))(w)
        assert gauge.converged and gauge.error < 1e-10
        a, b = gauge.params["in"], gauge.params["out"]
        np.testing.assert_allclose(a @ b, w["in"] @ w["out"], rtol=1e-9)
        np.testing.assert_allclose(a.T @ a, b @ b.T, rtol=1e-9, atol=1e-9)
        # The least sum of squares of two factors of a matrix is twice its nuclear norm.
        nuclear = np.linalg.svd(w["in"] @ w["out"], compute_uv=False).sum()
        np.testing.assert_allclose((a**2).sum() + (b**2).sum(), 2 * nuclear, rtol=1e-9)


def test_an_orbit_without_a_smallest_member_is_said_not_to_converge():
    w = {"in": jnp.ones((2, 4)) + jnp.eye(2, 4), "out": jnp.eye(4, 2)}
    group = symmetry_group(lambda w, x: x @ w["in"] @ w["out"], w, jnp.eye(2))
    gauge = balance_matrices(group, w)
    assert not gauge.converged
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(gauge.params))


@pytest.mark.parametrize(
    "name", [n if n == "attention" else pytest.param(n, marks=pytest.mark.slow) for n in EXACT]
)
def test_members_of_one_orbit_are_at_distance_zero_and_others_are_not(name):
    with jax.enable_x64(True):
        case = ZOO[name]
        w = jax.tree.map(lambda a: a.astype(jnp.float64), params_of(case))
        group = symmetry_group(case.fn, w, inputs_of(case, 4))
        element = random_element(group, jax.random.key(3), dtype=jnp.float64)
        moved = act(group, w, element._replace(scales=0 * element.scales))
        distance = jax.jit(lambda a, b: align(group, a, b))
        found = distance(w, moved)
        assert found.converged and found.distance < 1e-9
        other = jax.tree.map(lambda a: a.astype(jnp.float64), params_of(case, seed=7))
        assert distance(w, other).distance > 0.1


def test_the_function_of_an_aligned_network_is_its_own():
    case = ZOO["attention"]
    a, b, x = params_of(case), params_of(case, seed=5), inputs_of(case, 4)
    a, b, x = jax.tree.map(lambda v: v.astype(jnp.float32), (a, b, x))
    group = symmetry_group(case.fn, a, x)
    found = align(group, a, b)
    np.testing.assert_allclose(case.fn(found.moved, x), case.fn(b, x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(case.fn(found.reference, x), case.fn(a, x), rtol=1e-3, atol=1e-4)
    plain = jnp.sqrt(sum(((a[n] - b[n]) ** 2).sum() for n in a))
    assert distance_mod_symmetries(group, a, b) < plain


def test_mistakes():
    w = [jnp.eye(2), jnp.eye(2)]
    group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
    with pytest.raises(InvalidInput, match="rtol must be a fixed number >= 0"):
        balance_matrices(group, w, rtol=-1.0)
    with pytest.raises(InvalidInput, match="sweeps must be a fixed integer >= 1"):
        align(group, w, w, sweeps=0)
    with pytest.raises(InvalidInput, match="params"):
        align(group, w, w[:1])
