"""Updates of the size of the gradient: around Path-SGD, and around any other transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import (
    InvalidInput,
    match_gradient_norm,
    pass_full_params,
    path_kappa,
    scale_by_data_dependent_path_kappa,
    scale_by_path_kappa,
)
from jaxinv.networks import init_mlp, mlp

X = jax.random.normal(jax.random.key(1), (16, 6))
Y = jnp.arange(16) % 3


def make_params():
    return init_mlp(jax.random.key(0), (6, 8, 3), bias_std=0.1)


@jax.jit
@jax.grad
def gradient(params):
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, X), Y).mean()


def update(tx, g, params, **extra):
    """The first update, compiled."""
    return jax.jit(tx.update)(g, tx.init(params), params, **extra)[0]


# --- around Path-SGD ------------------------------------------------------------------


def test_the_first_update_has_the_norm_of_the_gradient_and_the_factor_is_kept():
    params = make_params()
    g = gradient(params)
    plain, matched = (
        scale_by_path_kappa(mlp, X),
        match_gradient_norm(scale_by_path_kappa(mlp, X)),
    )
    state = matched.init(params)
    u0, state = jax.jit(matched.update)(g, state, params)
    assert optax.tree.norm(u0) == pytest.approx(float(optax.tree.norm(g)), rel=1e-5)
    raw = update(plain, g, params)
    factor = float(optax.tree.norm(g) / optax.tree.norm(raw))
    moved = jax.tree.map(lambda w: 1.5 * w, params)
    u1, _ = jax.jit(matched.update)(g, state, moved)
    raw1 = update(plain, g, moved)
    chex.assert_trees_all_close(u1, jax.tree.map(lambda b: factor * b, raw1), rtol=1e-5)


def test_a_deep_network_stays_finite_where_kappa_overflows():
    def deep(ws, x):
        for w in ws:
            x = jax.nn.relu(x @ w)
        return x

    rng = np.random.default_rng(0)
    ws = [jnp.asarray(rng.normal(size=(32, 32), scale=1000), jnp.float32) for _ in range(12)]
    assert np.isinf(jax.jit(lambda w: path_kappa(deep, w, jnp.zeros((1, 32))))(ws)[0]).all()
    tx = match_gradient_norm(scale_by_path_kappa(deep, jnp.zeros((1, 32))))
    g = [jnp.ones_like(w) for w in ws]
    u = update(tx, g, ws)
    assert all(np.isfinite(a).all() and (a > 0).all() for a in u)
    assert float(optax.tree.norm(u)) == pytest.approx(float(optax.tree.norm(g)), rel=1e-4)


@pytest.mark.parametrize("exponent", [-90, 90])
def test_powers_of_two_in_kappa_change_no_bit_of_the_matched_update(exponent):
    """The outgoing weight, and with it the root of κ, beyond what a float32 quotient can hold."""
    w = [jnp.array([[2.0, -3.0]]), jnp.array([[5.0], [0.5]])]
    far = [w[0] * 2.0**exponent, w[1] * 2.0**exponent]
    g = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])]
    tx = match_gradient_norm(scale_by_path_kappa(lambda w, x: x @ w[0] @ w[1], jnp.zeros((1, 1))))
    got = update(tx, g, far)
    chex.assert_trees_all_equal(got, update(tx, g, w))
    np.testing.assert_allclose(got[0][0, 1] / got[0][0, 0], 200.0, rtol=1e-6)  # 2/0.5² : 1/5²


def test_the_data_dependent_kappa_is_matched_as_well():
    params = make_params()
    g = gradient(params)
    core = scale_by_data_dependent_path_kappa(mlp, alpha=0.5, probes=None)
    got, raw = (update(tx, g, params, batch=X) for tx in (match_gradient_norm(core), core))
    factor = optax.tree.norm(g) / optax.tree.norm(raw)
    chex.assert_trees_all_close(got, optax.tree.scale(factor, raw), rtol=1e-5)


# --- around any transformation --------------------------------------------------------


def test_adam_by_hand(standard_dtype_promotion):
    tx = match_gradient_norm(optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-3))
    rng = np.random.default_rng(0)
    gradients = [{"a": rng.normal(size=(3, 2)), "b": 5 * rng.normal(size=4)} for _ in range(4)]
    state = tx.init({"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)})
    m, v, factor = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, None
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for t, g in enumerate(gradients, 1):
        u, state = step(jax.tree.map(jnp.float32, g), state)
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in g}
        v = {k: 0.99 * v[k] + 0.01 * g[k] ** 2 for k in g}
        want = {k: m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.99**t)) + 1e-3) for k in g}
        norms = [np.sqrt(sum((x[k] ** 2).sum() for k in g)) for x in (g, want)]
        factor = norms[0] / norms[1] if factor is None else factor
        assert factor != pytest.approx(1, rel=0.1)
        for k in g:
            np.testing.assert_allclose(u[k], factor * want[k], rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_updates_keep_the_dtype_and_the_state_its_types(dtype, x64):
    params = {"a": jnp.ones(3, dtype), "b": jnp.ones(2, dtype)}
    g = {"a": jnp.full(3, 2, dtype), "b": jnp.zeros(2, dtype)}
    tx = match_gradient_norm(optax.scale(0.25))
    state = tx.init(params)
    u, after = jax.jit(tx.update)(g, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    chex.assert_trees_all_equal(u, g)  # the quotient of the norms is 4, exactly
    assert {a.dtype for a in jax.tree.leaves(u)} == {jnp.dtype(dtype)}


def test_a_norm_of_zero_leaves_updates_as_they_are():
    w = jnp.ones(3)
    for first, inner in ((jnp.zeros(3), optax.scale(2.0)), (jnp.ones(3), optax.set_to_zero())):
        tx = match_gradient_norm(inner)
        u, state = tx.update(first, tx.init(w), w)
        np.testing.assert_array_equal(u, 0.0)
        assert float(state.gain) == 1.0


def test_the_norms_inside_a_mask_are_those_of_the_unmasked_leaves():
    params = make_params()
    g = gradient(params)
    mask = {n: {"kernel": True, "bias": False} for n in params}
    tx = pass_full_params(optax.masked(match_gradient_norm(scale_by_path_kappa(mlp, X)), mask))
    u, raw = update(tx, g, params), update(scale_by_path_kappa(mlp, X), g, params)
    kernels = [[tree[n]["kernel"] for n in params] for tree in (u, g, raw)]
    factor = optax.tree.norm(kernels[1]) / optax.tree.norm(kernels[2])
    chex.assert_trees_all_close(kernels[0], optax.tree.scale(factor, kernels[2]), rtol=1e-5)
    for n in params:
        np.testing.assert_array_equal(u[n]["bias"], g[n]["bias"])
    nothing = optax.masked(match_gradient_norm(optax.scale(2.0)), jax.tree.map(lambda _: False, g))
    chex.assert_trees_all_equal(update(nothing, g, params), g)


def test_it_composes_with_hyperparameters_multi_steps_and_apply_if_finite():
    params = make_params()
    g = gradient(params)

    def make(learning_rate):
        core = match_gradient_norm(scale_by_path_kappa(mlp, X))
        return optax.chain(core, optax.scale_by_learning_rate(learning_rate))

    want = update(make(0.1), g, params)
    tx = optax.inject_hyperparams(make)(learning_rate=0.5)
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.1)
    chex.assert_trees_all_close(jax.jit(tx.update)(g, state, params)[0], want, rtol=1e-6)

    tx = optax.apply_if_finite(make(0.1), 3)
    bad = jax.tree.map(lambda a: a * jnp.nan, g)
    step = jax.jit(tx.update)
    _, state = step(bad, tx.init(params), params)
    chex.assert_trees_all_close(step(g, state, params)[0], want, rtol=1e-6)

    # optax's MultiSteps divides an integer count into floats.
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.MultiSteps(make(0.1), 2).gradient_transformation()
        step = jax.jit(tx.update)
        u, state = step(g, tx.init(params), params)
        assert float(optax.tree.norm(u)) == 0.0
        chex.assert_trees_all_close(step(g, state, params)[0], want, rtol=1e-5)


def test_a_chain_inside_is_matched_by_its_plain_updates():
    params = make_params()
    g = gradient(params)
    inner = optax.chain(scale_by_path_kappa(mlp, X), optax.add_decayed_weights(0.1))
    u, raw = update(match_gradient_norm(inner), g, params), update(inner, g, params)
    factor = optax.tree.norm(g) / optax.tree.norm(raw)
    chex.assert_trees_all_close(u, optax.tree.scale(factor, raw), rtol=1e-5)


def test_integer_parameters_are_refused():
    with pytest.raises(InvalidInput, match="params has dtype int32"):
        match_gradient_norm(optax.scale(2.0)).init(jnp.ones(3, jnp.int32))
