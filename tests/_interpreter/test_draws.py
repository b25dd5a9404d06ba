"""Functions that draw random numbers: in float64 they are the functions that the user wrote."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import (
    UnsupportedOperation,
    degrees_of_freedom,
    discover_symmetries,
    jacobian,
    jacobian_rank,
    jacobian_spectrum,
    path_kappa,
    path_norm,
    rescaling_group,
)
from jaxinv._interpreter.batch import traced_network
from jaxinv._interpreter.draws import traced_in
from jaxinv.jacobians import natural_gradient_direction

KEY = jax.random.key(7)
OLD_KEY = jax.random.PRNGKey(1)
W = {
    "a": jax.random.normal(jax.random.key(0), (3, 4)),
    "b": jax.random.normal(jax.random.key(1), (4, 2)),
}
X = jax.random.normal(jax.random.key(2), (10, 3))


def mask_of(key):
    return jax.random.bernoulli(key, 0.5, (4,))


def dropout(w, x, key=KEY):
    return jnp.where(mask_of(key), jax.nn.relu(x @ w["a"]) / 0.5, 0) @ w["b"]


def old_dropout(w, x):
    return dropout(w, x, OLD_KEY)


def key_inside(w, x):
    return dropout(w, x, jax.random.split(jax.random.key(-11))[1])


def in_a_loop(w, x):
    def body(h, key):
        return jnp.where(mask_of(key), h, 0), None

    keys = jax.random.split(jax.random.key(5), 2)
    return jax.lax.scan(body, jax.nn.relu(x @ w["a"]), keys)[0] @ w["b"]


def carried(w, x):
    def body(_, carry):
        key, h = carry
        key, own = jax.random.split(key)
        return key, h * jax.random.uniform(own, (4,), minval=0.5).astype(h.dtype)

    h = jax.nn.relu(x @ w["a"])
    return jax.lax.fori_loop(0, 2, body, (jax.random.key(0), h))[1] @ w["b"]


def in_a_branch(w, x):
    return jax.lax.cond(True, lambda x: dropout(w, x), lambda x: 2 * dropout(w, x), x)


def noise(w, x):
    return jax.nn.relu(x @ w["a"] + jax.random.normal(KEY, (4,))) @ w["b"]


FUNCTIONS = [dropout, old_dropout, key_inside, in_a_loop, carried, in_a_branch, noise]


@functools.cache
def true_jacobian(fn):
    J = jax.jit(jax.jacfwd(lambda w: fn(w, X).ravel()))(W)
    return np.concatenate(
        [np.asarray(j, np.float64).reshape(20, -1) for j in jax.tree.leaves(J)], 1
    )


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_in_64_bits_a_function_has_its_own_draws(fn):
    network = traced_in(jnp.float64, fn, W, X)
    with jax.enable_x64(True):
        found = jax.jit(lambda w, x: network(w, x))(*jax.tree.map(np.float64, (W, X)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, jax.jit(fn)(W, X), rtol=1e-4, atol=1e-5)


# Ranks ask for nothing but that program, whoever draws: those of two of the functions are enough.
@pytest.mark.parametrize(
    "fn",
    [fn if fn in (dropout, carried) else pytest.param(fn, marks=pytest.mark.slow)
     for fn in FUNCTIONS],
    ids=lambda fn: fn.__name__,
)  # fmt: skip
def test_the_rank_is_that_of_the_function_with_its_own_draws(fn):
    """In 64 bits jax.random draws other numbers: another mask, another rank, called certain."""
    true = np.linalg.matrix_rank(true_jacobian(fn), tol=1e-4)
    assert jacobian_rank(fn, W, X).rank == true
    assert jax.jit(lambda w, x: jacobian_rank(fn, w, x).rank)(W, X) == true
    assert degrees_of_freedom(fn, W, X).rank == true
    assert jax.jit(lambda w, x: degrees_of_freedom(fn, w, x).rank)(W, X) == true


def test_the_spectrum_is_that_of_the_function_with_its_own_draws():
    true = np.linalg.svd(true_jacobian(dropout), compute_uv=False)
    np.testing.assert_allclose(jacobian_spectrum(dropout, W, X)[:8], true[:8], rtol=1e-4)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_functions_that_draw_have_jacobians_groups_and_path_norms(fn):
    of = (jacobian, path_norm, path_kappa)
    J, norm, kappa = jax.jit(lambda w: [function(fn, w, X) for function in of])(W)
    for found in (jacobian(fn, W, X), J):
        np.testing.assert_allclose(found, true_jacobian(fn), rtol=1e-4, atol=1e-5)
    assert rescaling_group(fn, W, X).dim <= 4
    # Operation by operation as well; and Σ |w|² κ over the last layer, which every path crosses.
    assert float(path_norm(fn, W, X)) == pytest.approx(float(norm), rel=1e-5)
    cut = np.sum(np.square(W["b"]) * kappa["b"])
    assert cut == pytest.approx(float(norm) ** 2, rel=1e-5)
    assert (np.asarray(kappa["a"]) >= 0).all()


def test_a_dropout_mask_is_a_mask_for_paths_too():
    """γ² by hand over the units that the mask keeps."""
    kept = np.asarray(mask_of(KEY))
    inner = np.sum(np.square(W["a"]), 0) * kept * 4
    want = np.sqrt(np.sum(inner[:, None] * np.square(W["b"])))
    assert 0 < kept.sum() < 4
    assert float(path_norm(dropout, W, X)) == pytest.approx(want, rel=1e-5)
    assert rescaling_group(dropout, W, X).dim == kept.sum()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: jax.random.randint(KEY, (4,), 0, 3),
        lambda: jax.random.bits(KEY, (4,)),
        lambda: jax.random.gamma(KEY, jnp.ones(4)),
    ],
    ids=["integers", "bits", "gamma"],
)
def test_draws_that_are_others_in_64_bits_are_refused_by_name(draw):
    def fn(w, x):
        return jax.nn.relu(x @ w["a"]) * draw().astype(x.dtype) @ w["b"]

    with pytest.raises(UnsupportedOperation, match="jax.random draws other numbers.*\n.*dtype="):
        jacobian_rank(fn, W, X)
    # In 32 bits nothing is refused.
    np.testing.assert_allclose(traced_in(jnp.float32, fn, W, X)(W, X), fn(W, X), rtol=1e-5)


def test_draws_of_32_bits_are_left_alone():
    def fn(w, x):
        i = jax.random.randint(KEY, (4,), 0, 3, jnp.int32)
        return jax.nn.relu(x @ w["a"]) * i.astype(x.dtype) @ w["b"]

    def left_alone(fn, dtype):
        with jax.enable_x64(dtype == jnp.float64):
            w, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (W, X))
            plain = traced_network(fn, w, x)
        return traced_in(dtype, fn, W, X) == plain

    assert left_alone(fn, jnp.float64)
    assert left_alone(dropout, jnp.float32)
    assert not left_alone(dropout, jnp.float64)
    true = np.linalg.matrix_rank(true_jacobian(fn), tol=1e-4)
    assert jacobian_rank(fn, W, X).rank == true


def test_in_the_users_own_float64_draws_are_what_they_are(x64):
    w, x = jax.tree.map(lambda a: a.astype(np.float64), (W, X))
    assert traced_in(jnp.float64, dropout, w, x) == traced_network(dropout, w, x)
    kept = int(mask_of(KEY).sum())
    assert jacobian_rank(dropout, w, x).rank == 4 * kept


def test_symmetries_and_natural_gradients_are_of_the_functions_own_draws():
    """A mask of the wrong units would give other symmetries, and another metric."""
    kept = int(mask_of(KEY).sum())
    found = discover_symmetries(
        dropout, W, jax.ShapeDtypeStruct((1, 3), np.float32), kinds=("scaling",)
    )
    # Weights of dropped units scale freely, one by one; the others unit by unit.
    assert found.scaling.dimension == (4 - kept) * (3 + 2) + kept
    gradient = jax.grad(lambda w: jnp.mean(dropout(w, X) ** 2) / 2)(W)
    exact, measured = (
        natural_gradient_direction(dropout, W, X, gradient, "gaussian", damping=1.0, dtype=d)
        for d in (np.float64, np.float32)
    )
    chex.assert_trees_all_close(exact.v, measured.v, rtol=1e-4, atol=1e-5)


def test_float64_arrays_that_a_function_closes_over_are_those_of_the_precision_asked_for():
    """While the user's float32 program lives, jax hands its rounded constants to others."""
    rng = np.random.default_rng(0)
    frozen, x = rng.normal(size=(3, 4)), jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

    def fn(w, x):
        return x @ (frozen + w)

    w = jnp.zeros((3, 4))
    users = jax.jit(fn)
    users(w, x)
    network = traced_in(jnp.float64, fn, w, x)
    with jax.enable_x64(True):
        y = network(np.zeros((3, 4)), np.asarray(x, np.float64))
        assert y.dtype == jnp.float64
        # What the user's program computes with: the array rounded to float32, or the array itself.
        close = [
            np.abs(np.asarray(x, np.float64) @ a - y).max() for a in (frozen, frozen.astype("f"))
        ]
        assert min(close) < 1e-14
    assert degrees_of_freedom(fn, w, x).certain
