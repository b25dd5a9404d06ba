"""Exponents follow units: rescaling by powers of two changes no path sum, whatever the power."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinv

relu = jax.nn.relu


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(w, x):
    h = relu(x @ w["a"] + w["b"])
    return relu(h @ w["c"] + w["d"]) @ w["e"]


DENSE = {
    "a": draw(0, 3, 4),
    "b": draw(1, 4),
    "c": draw(2, 4, 5),
    "d": draw(3, 5),
    "e": draw(4, 5, 2),
}


def conv(h, k, **kwargs):
    return jax.lax.conv_general_dilated(
        h, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


def convolutions(w, x):
    h = relu(conv(x, w["a"]) + w["b"])
    h = relu(conv(h, w["c"], feature_group_count=4) + h)
    return h.mean((1, 2)) @ w["e"]


CONV = {"a": draw(5, 3, 3, 2, 4), "b": draw(6, 4), "c": draw(7, 3, 3, 1, 4), "e": draw(8, 4, 2)}

exponents = st.lists(st.integers(-60, 60), min_size=9, max_size=9)


def rescaled_dense(ks):
    s, t = (np.exp2(np.asarray(k, np.float32)) for k in (ks[:4], ks[4:]))
    return {
        "a": DENSE["a"] * s,
        "b": DENSE["b"] * s,
        "c": DENSE["c"] / s[:, None] * t,
        "d": DENSE["d"] * t,
        "e": DENSE["e"] / t[:, None],
    }


def rescaled_conv(ks):
    s = np.exp2(np.asarray(ks[:4], np.float32))
    return CONV | {"a": CONV["a"] * s, "b": CONV["b"] * s, "e": CONV["e"] / s[:, None]}


CASES = {"dense": (dense, DENSE, (1, 3)), "conv": (convolutions, CONV, (1, 4, 4, 2))}
JITTED = {
    (name, f): jax.jit(lambda w, fn=fn, x=x, f=f: getattr(jaxinv, f)(fn, w, jnp.zeros(x)))
    for name, (fn, _, x) in CASES.items()
    for f in ("path_norm", "log_path_kappa")
}


def log_shares(name, params):
    """log κ|w|²: what of γ² runs through a weight, which no rescaling changes."""
    kappas = JITTED[name, "log_path_kappa"](params)
    return jax.tree.map(lambda k, w: k + 2 * jnp.log(abs(w)), kappas, params)


@settings(max_examples=20, deadline=None)
@given(exponents, st.sampled_from(["dense", "conv"]))
def test_rescaling_by_powers_of_two_changes_no_bit_of_the_norm_and_no_share(ks, name):
    plain = CASES[name][1]
    moved = (rescaled_dense if name == "dense" else rescaled_conv)(ks)
    assert JITTED[name, "path_norm"](moved) == JITTED[name, "path_norm"](plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        log_shares(name, moved),
        log_shares(name, plain),
    )


def test_a_unit_that_is_all_but_dead_has_its_own_kappa_and_changes_nothing_else():
    dead = DENSE | {"a": DENSE["a"].at[:, 0].mul(1e-25), "b": DENSE["b"].at[0].mul(1e-25)}
    kappa_of = jax.jit(lambda w: jaxinv.path_kappa(dense, w, jnp.zeros((1, 3))))
    kappa, expected = kappa_of(dead), kappa_of(DENSE)
    np.testing.assert_allclose(kappa["a"], expected["a"], rtol=1e-5)
    zero = DENSE | {"a": DENSE["a"].at[:, 0].set(0), "b": DENSE["b"].at[0].set(0)}
    norms = [JITTED["dense", "path_norm"](w) for w in (dead, zero)]
    np.testing.assert_allclose(*norms)


def test_what_no_row_and_column_can_bring_together_is_nan_and_never_zero():
    """Two blocks in one matrix, of which the other is larger by 2^80: squares span 2^320."""
    first = jnp.diag(jnp.asarray([2.0**-80, 2.0**80]))
    last = jnp.asarray([[2.0**-80, 0.0], [0.0, 2.0**-80]])

    def net(w, x):
        return relu(x @ w["a"]) @ w["b"]

    blocks = {"a": first, "b": last}
    found = jaxinv.unit_path_norms(net, blocks, jnp.zeros((1, 2)), p=1.0)
    assert np.isnan(found[0]) or found[0] == 2.0**-160
    np.testing.assert_allclose(found[1], 1.0)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: a.astype(jnp.float64), blocks)
        np.testing.assert_allclose(jaxinv.path_norm(net, double, jnp.zeros((1, 2)), p=1.0), 1)


@pytest.mark.parametrize("p", [1.0, 2.0, 1.5])
def test_path_sgd_steps_alike_from_far_apart_on_the_orbit(p):
    tx = jaxinv.scale_by_path_kappa(dense, jnp.zeros((1, 3)), p=p)
    ks = [40, -40, 30, -20, 60, -60, 0, 10, -10]
    moved = rescaled_dense(ks)
    factors = jax.tree.map(lambda a, b: a / b, moved, DENSE)
    gradient = jax.tree.map(jnp.ones_like, DENSE)
    transported = jax.tree.map(lambda g, d: g / d, gradient, factors)
    update = jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[0])
    plain, far = update(gradient, DENSE), update(transported, moved)
    back = jax.tree.map(lambda u, d: u / d, far, factors)
    chex.assert_trees_all_close(back, plain, rtol=1e-4)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(far))


def test_path_norms_of_device_varying_parameters_with_default_checks():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    x = jnp.zeros((1, 3))

    def norms(w):
        w = jax.tree.map(lambda a: a[0], w)
        results = (jaxinv.path_norm(dense, w, x), jaxinv.path_kappa(dense, w, x))
        return jax.tree.map(lambda a: a[None], results)

    stacked = jax.tree.map(lambda a: a[None], DENSE)
    spread = jax.shard_map(norms, mesh=mesh, in_specs=spec, out_specs=spec)
    norm, kappa = jax.jit(spread)(stacked)
    np.testing.assert_allclose(norm[0], JITTED["dense", "path_norm"](DENSE), rtol=1e-6)
    expected = jax.jit(lambda w: jaxinv.path_kappa(dense, w, x))(DENSE)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], kappa), expected, rtol=1e-6)
