"""Gauges against the minima of the worked example, scipy, and the conditions that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from jaxinv import (
    InvalidInput,
    balance,
    distance_mod_rescaling,
    log_path_kappa,
    networks,
    normalize,
    path_condition,
    random_rescaling,
    rescale,
    rescaling_group,
    tangent_vectors,
)
from jaxinv.rescaling import orbit_minimum
from tests.ground_truth import exact

# Compiled whole: operation by operation it takes ten times as long.
log_kappa_of = jax.jit(log_path_kappa, static_argnums=0)


def worked_example(biases):
    """The 2-2-2-1 network, whose minima are known to 10 digits."""
    params = exact.flax_params(np.float64, biases=biases)
    group = rescaling_group(networks.mlp, params, jnp.zeros((1, 2)))
    assert group.dim == 4
    return group, params, log_kappa_of(networks.mlp, params, np.zeros((1, 2)))


def squared_norm(params):
    return sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(params))


def sums(group, params, p=2.0):
    """(Σ over the weights that each generator multiplies, and that it divides) of |w|^p."""
    powers = jax.tree.map(lambda w: np.abs(w) ** p, params)
    ones = jax.tree.map(np.ones_like, params)
    B = np.asarray(tangent_vectors(group, ones, dense=True))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(powers)])
    return np.maximum(B, 0).T @ flat, np.maximum(-B, 0).T @ flat


@pytest.mark.parametrize(
    ("biases", "start", "least"), [(False, 49.25, 35.7270497194), (True, 164.25, 100.7041536295)]
)
def test_balance_reaches_the_known_minimum(biases, start, least, x64):
    group, params, _ = worked_example(biases)
    assert squared_norm(params) == start
    gauge = balance(group, params)
    assert gauge.converged and gauge.error <= 1e-10
    assert float(gauge.value) == pytest.approx(least, abs=1e-8)
    assert squared_norm(gauge.params) == pytest.approx(least, abs=1e-8)
    incoming, outgoing = sums(group, gauge.params)
    np.testing.assert_allclose(incoming, outgoing, rtol=1e-9)


@pytest.mark.parametrize(
    ("biases", "start", "least"),
    [(False, 62.9110606939, 57.4971422263), (True, 108.4937063355, 92.9441526192)],
)
def test_path_condition_reaches_the_known_minimum(biases, start, least, x64):
    group, params, log_kappa = worked_example(biases)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))

    def objective(log_kappa, log_scale):
        return count * np.log(np.exp(log_kappa).sum()) + 2 * log_scale

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    assert objective(flat(log_kappa), 0.0) == pytest.approx(start, abs=1e-8)
    gauge = path_condition(group, params, log_kappa)
    assert gauge.converged
    assert float(gauge.value) == pytest.approx(least, abs=1e-8)
    # The same from the parameters it returns, with κ computed afresh.
    after = log_kappa_of(networks.mlp, gauge.params, np.zeros((1, 2)))
    moved = np.log(np.abs(flat(gauge.params) / flat(params))).sum()
    assert objective(flat(after), moved) == pytest.approx(least, abs=1e-8)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    widths=st.sampled_from([(3,), (4, 2, 3)]),
    p=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)
def test_balance_is_the_minimum_that_scipy_finds(seed, widths, p):
    with jax.enable_x64(True):
        sizes = (2, *widths, 1)
        params = {
            f"Dense_{i}": {"kernel": w, "bias": b}
            for i, (w, b) in enumerate(
                (rng.normal(size=(m, n)), rng.normal(size=n))
                for rng in [np.random.default_rng(seed)]
                for m, n in zip(sizes, sizes[1:], strict=False)
            )
        }
        group = rescaling_group(networks.mlp, params, np.zeros((1, 2)))
        ones = jax.tree.map(np.ones_like, params)
        B = np.asarray(tangent_vectors(group, ones, dense=True))
        w = np.abs(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])) ** p

        def value(u):
            return np.sum(w * np.exp(p * B @ u))

        def slope(u):
            return p * B.T @ (w * np.exp(p * B @ u))

        want = minimize(
            value, np.zeros(group.dim), jac=slope, method="BFGS", options={"gtol": 1e-9}
        )
        gauge = balance(group, params, p=p)
        assert gauge.converged
        np.testing.assert_allclose(gauge.value, want.fun, rtol=1e-10)


# --- networks with convolutions, biases and residuals -------------------------------------------


def conv_net(dtype=jnp.float64):
    params = networks.init_cnn(jax.random.key(3), 4, num_classes=3, bias_std=0.3, dtype=dtype)
    x = jax.random.normal(jax.random.key(5), (4, 6, 6, 1), dtype)
    return params, x, rescaling_group(networks.cnn, params, x)


def gauges(params, group, x):
    log_kappa = log_kappa_of(networks.cnn, params, x)
    yield "balance", balance(group, params)
    yield "path_condition", path_condition(group, params, log_kappa)
    yield "normalize", normalize(group, params)


def test_gauges_leave_a_residual_conv_net_unchanged_and_forget_the_start(x64):
    params, x, group = conv_net()
    move = jax.jit(lambda u: rescale(group, params, u))
    start = move(random_rescaling(group, jax.random.key(1), std=2.0))
    f = jax.jit(networks.cnn)
    want = f(params, x)
    np.testing.assert_allclose(f(start, x), want, rtol=1e-11)
    pairs = zip(gauges(params, group, x), gauges(start, group, x), strict=True)
    for (name, near), (_, far) in pairs:
        assert near.converged and far.converged, name
        assert max(abs(near.u)) > 0.05, name
        np.testing.assert_allclose(f(near.params, x), want, rtol=1e-11, err_msg=name)
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-8, err_msg=name),
            near.params, far.params,
        )  # fmt: skip
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
            near.params, move(near.u),
        )  # fmt: skip
    incoming, outgoing = sums(group, balance(group, params).params)
    np.testing.assert_allclose(incoming, outgoing, rtol=1e-8)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_normalize_gives_every_unit_incoming_weights_of_norm_one(p, x64):
    group, params, _ = worked_example(True)
    gauge = normalize(group, params, p=p)
    assert gauge.converged
    np.testing.assert_allclose(sums(group, gauge.params, p)[0], 1, rtol=1e-13)


def recurrent(w, x):
    h = jnp.zeros((x.shape[0], 3), x.dtype)
    for t in range(3):
        h = jax.nn.relu(x[:, t] @ w["xh"] + h @ w["hh"] + w["b"])
    return h @ w["out"]


def stacked(w, x):
    def layer(h, kernel):
        return jax.nn.relu(h @ kernel), None

    return jax.lax.scan(layer, x @ w["in"], w["kernels"])[0] @ w["out"]


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {name.rstrip("_"): jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}


def test_normalize_leaves_out_the_weights_on_the_way_back_to_their_unit(x64):
    w = draw(xh=(2, 3), hh=(3, 3), b=(3,), out=(3, 1))
    group = rescaling_group(recurrent, w, jnp.ones((1, 3, 2)))
    moved = jax.jit(lambda w: normalize(group, w))(w)
    assert moved.converged
    incoming = jnp.concatenate([moved.params["xh"], moved.params["b"][None]])
    np.testing.assert_allclose(jnp.linalg.norm(incoming, axis=0), 1, rtol=1e-14)


def test_normalize_knows_layers_that_are_stacked_in_one_array(x64):
    w = draw(kernels=(4, 3, 3), out=(3, 1), in_=(2, 3))
    group = rescaling_group(stacked, w, jnp.ones((1, 2)))
    assert group.dim == 15
    moved = jax.jit(lambda w: normalize(group, w))(w)
    assert moved.converged
    for layer in [moved.params["in"], *moved.params["kernels"]]:
        np.testing.assert_allclose(jnp.linalg.norm(layer, axis=0), 1, rtol=1e-14)


# --- numbers and transformations ----------------------------------------------------------------


def test_gauges_in_float32_over_an_ensemble_in_one_compiled_call():
    params, x, group = conv_net(jnp.float32)
    keys = jax.random.split(jax.random.key(2), 3)
    ensemble = jax.jit(
        jax.vmap(lambda k: rescale(group, params, random_rescaling(group, k, std=3.0)))
    )(keys)
    found = jax.jit(jax.vmap(lambda w: balance(group, w)))(ensemble)
    assert found.converged.all()
    assert found.value.dtype == jnp.float32
    want = balance(group, params)
    np.testing.assert_allclose(found.value, want.value, rtol=1e-5)
    for got, one in zip(jax.tree.leaves(found.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(one, got.shape), rtol=3e-4)


def test_far_from_balance_nothing_overflows():
    params, _, group = conv_net(jnp.float32)
    far = np.where(np.arange(group.dim) % 2 == 0, 40.0, -40.0).astype("f")
    start = jax.jit(lambda w: rescale(group, w, far))(params)
    gauge = balance(group, start)
    assert gauge.converged
    np.testing.assert_allclose(gauge.value, balance(group, params).value, rtol=1e-4)


def test_a_unit_without_a_way_out_stays_where_it_is(x64):
    params = {
        "Dense_0": {"kernel": jnp.array([[2.0, 8.0]])},
        "Dense_1": {"kernel": jnp.array([[0.0], [2.0]])},
    }
    group = rescaling_group(networks.mlp, params, jnp.zeros((1, 1)))
    gauge = balance(group, params)
    assert gauge.converged
    np.testing.assert_allclose(gauge.params["Dense_0"]["kernel"], [[2.0, 4.0]], rtol=1e-9)
    params["Dense_0"]["kernel"] = jnp.array([[0.0, 8.0]])
    gauge = normalize(group, params)
    np.testing.assert_allclose(gauge.params["Dense_0"]["kernel"], [[0.0, 1.0]], rtol=1e-12)


def test_the_distance_is_a_metric_on_orbits(x64):
    params, _, group = conv_net()
    rng = np.random.default_rng(7)
    a, b, c = (
        jax.tree.map(lambda w: np.asarray(w) + 0.5 * rng.normal(size=w.shape), params)
        for _ in range(3)
    )
    moved = rescale(group, b, random_rescaling(group, jax.random.key(7)))

    def distance(a, b):
        return distance_mod_rescaling(group, a, b)

    assert distance(b, moved) < 1e-7 * distance(a, b)
    np.testing.assert_allclose(distance(a, moved), distance(a, b), rtol=1e-7)
    np.testing.assert_allclose(distance(b, a), distance(a, b), rtol=1e-12)
    assert jax.eval_shape(distance, a, b).shape == ()  # under jit too
    assert distance(a, c) <= distance(a, b) + distance(b, c)


# --- refusals -----------------------------------------------------------------------------------


def test_errors_say_what_does_not_fit(x64):
    group, params, log_kappa = worked_example(False)
    for call in (balance, normalize):
        with pytest.raises(InvalidInput, match="p must be a fixed number > 0, not 0"):
            call(group, params, p=0)
        with pytest.raises(InvalidInput, match="another tree structure"):
            call(group, {"Dense_0": params["Dense_0"]})
    with pytest.raises(InvalidInput, match="p must be a fixed number > 0"):
        path_condition(group, params, log_kappa, p=-1.0)
    with pytest.raises(InvalidInput, match="log_kappa"):
        path_condition(group, params, {"Dense_0": log_kappa["Dense_0"]})


def test_normalize_refuses_a_weight_that_leads_into_several_units(x64):
    """The bias c scales with the product of two units: it is an incoming weight of both."""

    def product(w, x):
        return (jax.nn.relu(x @ w["a"]) * jax.nn.relu(x @ w["b"]) + w["c"]) @ w["o"]

    w = draw(a=(2, 3), b=(2, 3), c=(3,), o=(3, 1))
    group = rescaling_group(product, w, jnp.ones((1, 2)))
    with pytest.raises(InvalidInput, match="^c holds weights .* several units"):
        normalize(group, w)
    assert balance(group, w).converged


def deep(depth, width=3):
    """Equal layers, whose group is as long as the network is deep."""
    keys = jax.random.split(jax.random.key(0), depth)
    params = [{"w": jax.random.normal(k, (width, width)), "b": jnp.full(width, 0.5)} for k in keys]

    def fn(params, x):
        for layer in params:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x

    return rescaling_group(fn, params, jnp.ones((1, width))), params


def test_the_program_of_balance_is_as_long_for_twenty_layers_as_for_ten(monkeypatch):
    """Programs that grow with every leaf took minutes to compile for hundreds of layers."""
    lengths = []
    for depth in (10, 20):
        group, params = deep(depth)
        found = []
        # Of the iterations alone: shapes on the way in and out cannot but be one by one.
        monkeypatch.setattr(orbit_minimum, "_minimize", lambda *a, found=found: found.append(a))
        with pytest.raises(TypeError, match="NoneType"):
            balance(group, params)
        monkeypatch.undo()
        problem, tol = found[0]
        text = str(jax.make_jaxpr(orbit_minimum._minimize)(problem, tol))
        lengths.append(text.count("\n"))
    assert lengths[0] == lengths[1] > 0


@pytest.mark.parametrize(
    "gauge_of", ["balance", pytest.param("path_condition", marks=pytest.mark.slow)]
)
def test_leaves_that_are_minimised_together_give_what_each_alone_gives(gauge_of, monkeypatch, x64):
    group, params = deep(6)
    params = jax.tree.map(lambda w: w.astype(np.float64), params)

    def run():
        if gauge_of == "balance":
            return balance(group, params)
        logs = jax.tree.map(lambda w: jnp.sin(7 * w), params)
        return path_condition(group, params, logs)

    together = run()
    monkeypatch.setattr(orbit_minimum, "_stacked", lambda group, weights: (group, weights))
    alone = run()
    assert together.converged and alone.converged
    np.testing.assert_allclose(together.u, alone.u, atol=1e-8)
    np.testing.assert_allclose(together.value, alone.value, rtol=1e-12)
