"""Path norms and κ against enumerated paths, and the theorems that they obey."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinv import (
    log_path_kappa,
    log_path_norm,
    networks,
    path_kappa,
    path_norm,
    rescale,
    rescaling_group,
    unit_path_norms,
)
from tests.ground_truth import exact
from tests.ground_truth.layers import Dense, Network
from tests.ground_truth.strategies import (
    ANY_SHAPE,
    GATES,
    LONG,
    SEQUENCES,
    SEVERAL_AXES,
    SHAPES,
    WIDE,
    exponents,
)
from tests.ground_truth.strategies import networks as random_networks

X = np.ones((5, 2))

# (γ_p^p, κ): the published table, p = 2 for κ. The enumeration below must reproduce it too.
TABLE = {
    (1, False): 113 / 2,
    (1, True): 122,
    (2, False): 2585 / 4,
    (2, True): 3419 / 2,
    (4, False): 18.368584431**4,
    (4, True): 27.393015930**4,
}
KAPPA_TABLE = {
    False: {
        "Dense_0": {"kernel": [[17 / 4, 17 / 4], [25, 25]]},
        "Dense_1": {"kernel": [[20, 100], [5, 25]]},
        "Dense_2": {"kernel": [[105, 905 / 4]]},
    },
    True: {
        "Dense_0": {"kernel": [[17 / 4, 17 / 4], [25, 25]], "bias": [17 / 4, 25]},
        "Dense_1": {"kernel": [[120, 244], [30, 61]], "bias": [4, 1]},
        "Dense_2": {"kernel": [[275, 1121 / 2]], "bias": [1]},
    },
}


def assert_trees_close(actual, expected, rtol):
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol)


def mlp_of(*widths, seed=0, dtype=np.float64, bias=True):
    """A fully connected network with random biases, as (params, x)."""
    params = networks.init_mlp(
        jax.random.key(seed), widths, bias=bias, bias_std=float(bias), dtype=dtype
    )
    return params, jax.ShapeDtypeStruct((7, widths[0]), dtype)


# --- the 2-2-2-1 network ------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "biases"), TABLE)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 1e-9)])
def test_path_norm_of_the_published_network(p, biases, dtype, rtol, x64):
    expected = float(exact.path_norm_power(p, biases=biases))
    np.testing.assert_allclose(expected, TABLE[p, biases], rtol=1e-9)
    params = exact.flax_params(dtype, biases=biases)
    norm = path_norm(networks.mlp, params, X.astype(dtype), p=p)
    assert norm.shape == () and norm.dtype == dtype
    np.testing.assert_allclose(norm, expected ** (1 / p), rtol=rtol)
    log_norm = log_path_norm(networks.mlp, params, X.astype(dtype), p=p)
    np.testing.assert_allclose(log_norm, np.log(expected) / p, rtol=rtol)


@pytest.mark.parametrize("biases", [False, True])
def test_kappa_enumeration_reproduces_the_published_table(biases):
    table = jax.tree.map(
        lambda a: np.array(a, float).T, KAPPA_TABLE[biases], is_leaf=lambda a: isinstance(a, list)
    )
    assert_trees_close(exact.kappa_arrays(2, biases=biases), table, rtol=0)


@pytest.mark.parametrize(("p", "biases"), TABLE)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_kappa_of_the_published_network(p, biases, dtype, rtol, x64):
    params = exact.flax_params(dtype, biases=biases)
    expected = exact.kappa_arrays(p, biases=biases)
    kappa = path_kappa(networks.mlp, params, X.astype(dtype), p=p)
    assert {leaf.dtype for leaf in jax.tree.leaves(kappa)} == {np.dtype(dtype)}
    assert_trees_close(kappa, expected, rtol)
    log_kappa = log_path_kappa(networks.mlp, params, X.astype(dtype), p=p)
    assert_trees_close(log_kappa, jax.tree.map(np.log, expected), rtol)


# --- enumerated paths ---------------------------------------------------------------------------


def assert_matches_enumeration(network, p, compiled=lambda fn: fn):
    with jax.enable_x64(True):
        params, x = network.params(np.float64), network.x(2, np.float64)
        norms, kappa = network.truth(p)

        def found(w):
            return unit_path_norms(network.fn, w, x, p=p), path_kappa(network.fn, w, x, p=p)

        units, sensitivities = compiled(found)(params)
        assert units.shape == norms.shape
        np.testing.assert_allclose(units, norms ** (1 / p), rtol=1e-10)
        # rtol alone: an element that is zero must come out as exactly zero.
        assert_trees_close(sensitivities, kappa, rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("examples", [4, pytest.param(70, marks=pytest.mark.slow)])
def test_random_networks_agree_with_their_enumerated_paths(shape, examples):
    """Three shapes of input: dense, convolutional, residual, pooled, tied, recurrent layers."""

    @settings(max_examples=examples)
    @given(random_networks(shape), exponents)
    def agree(network, p):
        # Shapes are new each time: one program, not one for every operation on each of them.
        assert_matches_enumeration(network, p, compiled=jax.jit)

    agree()


LAYERS = [*GATES, *ANY_SHAPE, *WIDE, *SEVERAL_AXES, *SEQUENCES, *LONG]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_every_layer_agrees_with_its_enumerated_paths(layer):
    """Whatever hypothesis draws, no layer goes untested: each between two others."""
    assert_matches_enumeration(Network((3, 2), (Dense(2), layer, Dense(1)), seed=5), p=1.7)


# --- logarithms and overflow --------------------------------------------------------------------


def test_logarithms_are_those_of_the_values(x64):
    params, x = mlp_of(4, 5, 3)
    of = (path_norm, path_kappa, log_path_norm, log_path_kappa)
    found = jax.jit(lambda w: [function(networks.mlp, w, x) for function in of])(params)
    norm, kappa, log_norm, log_kappa = found
    np.testing.assert_allclose(log_norm, np.log(norm), rtol=1e-12)
    assert_trees_close(log_kappa, jax.tree.map(np.log, kappa), rtol=1e-12)


def test_log_kappa_is_minus_infinity_exactly_where_no_path_goes():
    params = {"used": np.eye(2, dtype=np.float32), "unused": np.ones(3, np.float32)}
    params["out"] = np.array([[1.0], [0.0]], np.float32)
    x = np.ones((1, 2), np.float32)
    kappa = log_path_kappa(lambda w, x: x @ w["used"] @ w["out"], params, x)
    np.testing.assert_array_equal(kappa["unused"], -np.inf)
    np.testing.assert_array_equal(kappa["used"], [[0, -np.inf], [0, -np.inf]])
    np.testing.assert_array_equal(kappa["out"], [[0], [0]])
    kappa = path_kappa(lambda w, x: x @ w["used"] @ w["out"], params, x)
    np.testing.assert_array_equal(kappa["unused"], 0)


def test_norm_of_a_network_without_a_path_is_zero():
    def fn(w, x):
        return jax.nn.relu(x @ w)

    w, x = np.zeros((2, 2), np.float32), np.ones((1, 2), np.float32)
    assert path_norm(fn, w, x) == 0
    assert log_path_norm(fn, w, x) == -np.inf
    np.testing.assert_array_equal(path_kappa(fn, w, x), 1)


@pytest.mark.parametrize("width", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_two_hundred_wide_layers_do_not_overflow_float32(width):
    """He init × 4 gives γ² ≈ 32^200: beyond float32, so only a scaled sum can hold it."""
    depth = 200
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((depth, width, width), np.float32) * np.float32(
        4 * np.sqrt(2 / width)
    )
    x = jax.ShapeDtypeStruct((128, width), np.float32)

    def fn(stack, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, stack)[0]

    # The same sums in float64, with the scale of every layer taken out by hand.
    forward, backward = [np.ones(width)], [np.ones(width)]
    log_forward, log_backward = [0.0], [0.0]
    q = np.square(kernels, dtype=np.float64)
    for k in range(depth):
        v = forward[-1] @ q[k]
        forward.append(v / v.sum())
        log_forward.append(log_forward[-1] + np.log(v.sum()))
        v = q[depth - 1 - k] @ backward[-1]
        backward.append(v / v.sum())
        log_backward.append(log_backward[-1] + np.log(v.sum()))
    log_norm = log_path_norm(fn, kernels, x)
    assert path_norm(fn, kernels, x) == np.inf
    np.testing.assert_allclose(log_norm, log_forward[-1] / 2, rtol=1e-6)

    log_kappa = np.asarray(log_path_kappa(fn, kernels, x))
    assert np.isfinite(log_kappa).all()
    for k in (0, 1, 100, depth - 1):
        logs = np.log(forward[k])[:, None] + np.log(backward[depth - 1 - k])[None]
        expected = logs + log_forward[k] + log_backward[depth - 1 - k]
        # The exponents are exact, so what is lost is the last digit of a logarithm of about 700.
        np.testing.assert_allclose(log_kappa[k], expected, rtol=0, atol=5e-4)


def test_l1_norm_beyond_float32_has_a_finite_logarithm():
    params = {f"Dense_{i}": {"kernel": np.full((8, 8), 50, np.float32)} for i in range(40)}
    x = np.ones((1, 8), np.float32)
    assert path_norm(networks.mlp, params, x, p=1) == np.inf
    np.testing.assert_allclose(
        log_path_norm(networks.mlp, params, x, p=1), 41 * np.log(8) + 40 * np.log(50), rtol=1e-6
    )


def test_vanishing_weights_do_not_underflow_float32():
    params = {f"Dense_{i}": {"kernel": np.full((4, 4), 1e-25, np.float32)} for i in range(10)}
    kappa = log_path_kappa(networks.mlp, params, np.ones((1, 4), np.float32))
    expected = 9 * 2 * np.log(1e-25) + 9 * np.log(4)
    for leaf in jax.tree.leaves(kappa):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)


def test_units_of_very_different_sizes_share_one_array():
    """Two units, one rescaled by 10^-12: their |w|² are 24 decades apart on either side."""
    d = np.float32(1e-12)
    w = [np.array([[d, 1]], np.float32), np.array([[1 / d], [1]], np.float32)]
    x = np.ones((1, 1), np.float32)
    kappa = log_path_kappa(lambda w, x: jax.nn.relu(x @ w[0]) @ w[1], w, x)
    np.testing.assert_allclose(kappa[0], [[-2 * np.log(d), 0]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kappa[1], [[2 * np.log(d)], [0]], rtol=1e-5, atol=1e-5)


# --- what the inputs mean -----------------------------------------------------------------------


def test_only_the_shape_of_one_example_matters():
    params, _ = mlp_of(4, 5, 3, dtype=np.float32)
    reference = path_kappa(networks.mlp, params, np.ones((1, 4), np.float32))
    for x in (
        np.full((1, 4), np.nan, np.float32),
        np.zeros((100, 4), np.float32),
        jax.ShapeDtypeStruct((64, 4), np.float32),
        jnp.ones((3, 2, 2)),
    ):
        assert_trees_close(path_kappa(networks.mlp, params, x), reference, rtol=0)


def test_inputs_may_be_a_pytree(x64):
    def fn(w, x):
        return jax.nn.relu(x["a"] @ w[0]) - x["b"][1] @ w[1]

    w = (np.array([[1.0], [2.0]]), np.array([[3.0]]))
    x = {"a": np.ones((4, 2)), "b": [np.ones((4, 5)), np.ones((4, 1))]}
    np.testing.assert_allclose(path_norm(fn, w, x), np.sqrt(1 + 4 + 9))


def test_outputs_may_be_a_pytree(x64):
    def fn(w, x):
        h = x @ w
        return {"sum": h.sum(axis=1), "both": (h, h)}

    units = unit_path_norms(fn, np.array([[3.0, 1.0], [4.0, 0.0]]), X)
    assert_trees_close(
        units, {"sum": np.sqrt(26.0), "both": (np.array([5.0, 1.0]),) * 2}, rtol=1e-12
    )


def test_unit_norms_add_up_to_the_norm(x64):
    params, x = mlp_of(4, 6, 3)
    of = (unit_path_norms, path_norm)
    for p in (1, 2, 3.3):
        found = jax.jit(lambda w, p=p: [function(networks.mlp, w, x, p=p) for function in of])
        units, norm = found(params)
        np.testing.assert_allclose((units**p).sum(), norm**p, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_summed_in_float32(dtype):
    params, x = mlp_of(64, 64, 64, dtype=dtype)
    full = jax.tree.map(lambda a: a.astype(np.float32), params)

    def kappa_of(w, dtype):
        return path_kappa(networks.mlp, w, jax.ShapeDtypeStruct(x.shape, dtype))

    of = jax.jit(kappa_of, static_argnums=1)
    kappa, expected = of(params, dtype), of(full, np.float32)
    assert_trees_close(kappa, expected, rtol=1e-5)


# --- theorems -----------------------------------------------------------------------------------


def shares(fn, params, x, p):
    """Σ_e |w_e|^p κ_e of every layer, and γ_p^p; each p is a program."""

    @jax.jit
    def found(params):
        kappa = path_kappa(fn, params, x, p=p)
        sums = jax.tree.map(lambda w, k: (abs(w) ** p * k).sum(), params, kappa)
        return sums, path_norm(fn, params, x, p=p) ** p

    return found(params)


few = pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.slow)])


@few
def test_kappa_summed_over_a_cut_is_the_norm(examples):
    """Every path of a bias-free network crosses each layer once: Σ_e |w_e|^p κ_e = γ_p^p."""

    @settings(max_examples=examples)
    @given(st.integers(0, 2**32 - 1), exponents)
    def agree(seed, p):
        with jax.enable_x64(True):
            params, x = mlp_of(3, 4, 4, 2, seed=seed, bias=False)
            cuts, norm = shares(networks.mlp, params, x, p)
            assert len(jax.tree.leaves(cuts)) == 3
            for cut in jax.tree.leaves(cuts):
                np.testing.assert_allclose(cut, norm, rtol=1e-12)

    agree()


@few
def test_a_residual_block_is_crossed_by_all_paths_or_skipped(examples):
    """The stem and the read-out are cuts; the two convolutions of the branch cut equal shares."""

    @settings(max_examples=examples)
    @given(st.integers(0, 2**32 - 1), exponents)
    def agree(seed, p):
        with jax.enable_x64(True):
            key = jax.random.key(seed)
            params = networks.init_cnn(key, 3, num_classes=2, bias=False, dtype=np.float64)
            x = jax.ShapeDtypeStruct((1, 4, 4, 1), np.float64)
            cuts, norm = shares(networks.cnn, params, x, p)
            cut = {name: layer["kernel"] for name, layer in cuts.items()}
            np.testing.assert_allclose(cut["Conv_0"], norm, rtol=1e-12)
            np.testing.assert_allclose(cut["Dense_0"], norm, rtol=1e-12)
            np.testing.assert_allclose(cut["Conv_1"], cut["Conv_2"], rtol=1e-12)
            assert cut["Conv_1"] < norm

    agree()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_rescaling_a_unit_changes_no_norm_and_kappa_inversely(p, x64):
    """w_in·d, w_out/d: γ unchanged and κ_e ↦ κ_e/d^p, κ_e·d^p on either side."""
    rng = np.random.default_rng(1)
    params, x = mlp_of(4, 6, 5, 3)
    d = np.exp(rng.standard_normal(6))
    scales = {"Dense_0": {"kernel": d, "bias": d}, "Dense_1": {"kernel": 1 / d[:, None], "bias": 1}}
    scales["Dense_2"] = {"kernel": 1, "bias": 1}
    other = jax.tree.map(lambda w, s: w * s, params, scales)
    of = (unit_path_norms, path_kappa)
    found = jax.jit(lambda w: [function(networks.mlp, w, x, p=p) for function in of])
    (units, kappa), (other_units, other_kappa) = found(params), found(other)
    np.testing.assert_allclose(other_units, units, rtol=1e-12)
    expected = jax.tree.map(lambda k, s: k / s**p, kappa, scales)
    assert_trees_close(other_kappa, expected, rtol=1e-12)


def test_rescaling_by_powers_of_two_changes_no_bit():
    params, x = mlp_of(4, 6, 3, dtype=np.float32)
    d = np.float32(2.0) ** np.arange(-3, 3)
    other = {
        "Dense_0": {k: w * d for k, w in params["Dense_0"].items()},
        "Dense_1": {"kernel": params["Dense_1"]["kernel"] / d[:, None]}
        | {"bias": params["Dense_1"]["bias"]},
    }
    of = (path_norm, path_kappa)
    found = jax.jit(lambda w: [function(networks.mlp, w, x) for function in of])
    (norm, kappa), (rescaled_norm, rescaled) = found(params), found(other)
    assert rescaled_norm == norm
    np.testing.assert_array_equal(rescaled["Dense_0"]["kernel"] * d**2, kappa["Dense_0"]["kernel"])
    np.testing.assert_array_equal(
        rescaled["Dense_1"]["kernel"] / d[:, None] ** 2, kappa["Dense_1"]["kernel"]
    )


def test_rescaling_channels_of_a_convolutional_network(x64):
    key = jax.random.key(0)
    params = networks.init_cnn(key, 4, num_classes=2, bias_std=1.0, dtype=np.float64)
    x = jax.ShapeDtypeStruct((1, 6, 6, 1), np.float64)
    d = np.exp(np.random.default_rng(0).standard_normal(4))
    other = dict(params)
    other["Conv_1"] = jax.tree.map(lambda w: w * d, params["Conv_1"])
    kernel = params["Conv_2"]["kernel"] / d[:, None]
    other["Conv_2"] = {"kernel": kernel, "bias": params["Conv_2"]["bias"]}
    found = jax.jit(lambda w: [path_norm(networks.cnn, w, x, p=p) for p in (1, 2, 3)])
    np.testing.assert_allclose(found(other), found(params), rtol=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_gradient_of_the_norm_is_kappa_by_the_chain_rule(p, x64):
    """∂γ/∂w = γ^{1-p} κ |w|^{p-1} sign w, and finite differences agree."""
    params, x = mlp_of(3, 4, 2)
    params = jax.tree.map(np.asarray, params)

    @jax.jit
    def found(w):
        gamma, gradient = jax.value_and_grad(lambda w: path_norm(networks.mlp, w, x, p=p))(w)
        return gamma, gradient, path_kappa(networks.mlp, w, x, p=p)

    gamma, gradient, kappa = jax.tree.map(np.asarray, found(params))
    expected = jax.tree.map(
        lambda w, k: gamma ** (1 - p) * k * abs(w) ** (p - 1) * np.sign(w), params, kappa
    )
    assert_trees_close(gradient, expected, rtol=1e-10)
    rng = np.random.default_rng(0)
    way = jax.tree.map(lambda w: 1e-6 * rng.normal(size=w.shape), params)
    up, down = (found(jax.tree.map(lambda w, v, s=s: w + s * v, params, way))[0] for s in (1, -1))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, v: np.sum(g * v), gradient, way)))
    np.testing.assert_allclose(up - down, 2 * slope, rtol=1e-6)


def test_jit_gives_the_values_of_eager_evaluation(x64):
    params, x = mlp_of(3, 4, 2)
    of = (path_norm, log_path_norm, path_kappa, log_path_kappa, unit_path_norms)

    def of_params(w):
        return [function(networks.mlp, w, x, p=1.5) for function in of]

    jax.tree.map(
        # The absolute tolerance is for logarithms near zero.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14),
        jax.jit(of_params)(params),
        of_params(params),
    )


def test_vmap_over_an_ensemble_is_a_loop_over_its_members(x64):
    members = [mlp_of(3, 4, 2, seed=s)[0] for s in range(4)]
    # Members of very different sizes: each must keep a scale of its own.
    members = [jax.tree.map(lambda w, s=s: w * 10.0 ** (20 * s), m) for s, m in enumerate(members)]
    x = jax.ShapeDtypeStruct((1, 3), np.float64)
    stacked = jax.tree.map(lambda *ws: jnp.stack(ws), *members)
    for function in (path_norm, log_path_kappa):

        def one(w, function=function):
            return function(networks.mlp, w, x)

        together, compiled = jax.jit(jax.vmap(one))(stacked), jax.jit(one)
        alone = [compiled(m) for m in members]
        assert_trees_close(together, jax.tree.map(lambda *a: jnp.stack(a), *alone), rtol=1e-12)


# --- units with several inputs, and slopes -------------------------------------------------------


def test_every_argument_of_a_maximum_may_be_the_active_path(x64):
    w = np.array([[1.0, 2.0, -3.0, 4.0]])
    x = np.ones((3, 1))
    cases = {
        "reduce_max": (lambda h: h.max(axis=-1, keepdims=True), [30]),
        "sort": (lambda h: jnp.sort(h, axis=-1), [30] * 4),
        "k-max": (lambda h: jax.lax.top_k(h, 3)[0], [30] * 3),
        "maxout": (lambda h: jnp.maximum(h[:, :2], h[:, 2:]), [1 + 9, 4 + 16]),
        "minimum": (lambda h: jnp.minimum(h[:, :2], h[:, 2:]), [1 + 9, 4 + 16]),
        "cummax": (lambda h: jax.lax.cummax(h, axis=1), [1, 5, 14, 30]),
    }
    for name, (unit, squares) in cases.items():
        units = unit_path_norms(lambda w, x, unit=unit: unit(x @ w), w, x)
        np.testing.assert_allclose(units**2, squares, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(("slope", "kappa"), [(-3.0, 13.0), (0.5, 0.0), (0.0, 0.0)])
def test_kappa_of_a_prelu_slope(slope, kappa, x64):
    """The gate's edge is max(1, |α|)^p, whose derivative by |α|^p is one only beyond one."""

    def fn(w, x):
        h = x @ w["kernel"]
        return jnp.where(h >= 0, h, w["slope"] * h)

    params = {"kernel": np.array([[2.0], [3.0]]), "slope": np.array(slope)}
    np.testing.assert_allclose(path_kappa(fn, params, X)["slope"], kappa)
    steep = max(1.0, slope**2)
    np.testing.assert_allclose(path_kappa(fn, params, X)["kernel"], steep)
    np.testing.assert_allclose(path_norm(fn, params, X) ** 2, 13 * steep)


def test_dividing_by_a_parameter_multiplies_by_its_inverse(x64):
    params = {"kernel": np.array([[2.0], [3.0]]), "scale": np.array([4.0])}
    norm = path_norm(lambda w, x: x @ w["kernel"] / w["scale"], params, X)
    np.testing.assert_allclose(norm, np.sqrt(13) / 4)


def test_a_learned_first_state_is_a_bias(x64):
    def fn(w, x):
        h0 = jnp.broadcast_to(w["h0"], (x.shape[0], 1))
        xs = jnp.moveaxis(x, 1, 0)
        return jax.lax.scan(lambda h, x_t: (jax.nn.relu(h * w["w"] + x_t), None), h0, xs)[0]

    params = {"h0": np.array([3.0]), "w": np.array([2.0])}
    kappa = path_kappa(fn, params, np.ones((1, 2, 1)))
    # Paths: h0·w·w, x₀·w and x₁; so γ² = 9·16 + 4 + 1.
    np.testing.assert_allclose(path_norm(fn, params, np.ones((1, 2, 1))) ** 2, 149)
    np.testing.assert_allclose(kappa["h0"], 16)
    np.testing.assert_allclose(kappa["w"], 9 * 2 * 4 + 1)


def test_a_kappa_that_float32_has_lost_is_nan_and_not_zero():
    def fn(w, x):
        return (x @ w["in"] + w["bias"]) @ w["out"]

    params = {"in": jnp.full((2, 2), 1e30), "bias": jnp.zeros(2), "out": jnp.full((2, 1), 1e-12)}
    kappa = path_kappa(fn, params, X)
    assert jnp.isnan(kappa["bias"]).all()
    np.testing.assert_allclose(kappa["in"], 1e-24, rtol=1e-5)
    params["in"] = jnp.full((2, 2), 1e22)
    np.testing.assert_allclose(path_kappa(fn, params, X)["bias"], 1e-24, rtol=1e-5)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        np.testing.assert_allclose(path_kappa(fn, double, X)["bias"], 1e-24, rtol=1e-5)


# --- complex weights ----------------------------------------------------------------------------


def complex_network():
    """Split ReLU between complex layers, with a real scale."""
    draw = np.random.default_rng(0).normal(size=(2, 3, 4))
    other = np.random.default_rng(1).normal(size=(2, 4, 2))
    w = {
        "a": jnp.asarray(draw[0] + 1j * draw[1], jnp.complex64),
        "b": jnp.asarray(other[0] + 1j * other[1], jnp.complex64),
        "c": jnp.asarray([1.0, -2.0, 0.5, 3.0], jnp.float32),
    }

    def net(w, x):
        h = x.astype(jnp.complex64) @ w["a"]
        return jax.lax.complex(jax.nn.relu(h.real), jax.nn.relu(h.imag)) * w["c"] @ w["b"]

    return net, w


def test_the_length_of_a_complex_weight_is_its_absolute_value(standard_dtype_promotion):
    net, w = complex_network()
    a, b, c = (np.abs(np.asarray(w[name], np.complex128)) ** 2 for name in "abc")
    linear = lambda w, x: x.astype(jnp.complex64) @ w["a"] @ w["b"]  # noqa: E731
    x = jnp.zeros((5, 3), jnp.float32)
    norm, kappa, other = jax.jit(
        lambda w: (path_norm(linear, w, x), path_kappa(linear, w, x), path_norm(net, w, x))
    )(w)
    np.testing.assert_allclose(norm**2, (a @ b).sum(), rtol=1e-5)
    np.testing.assert_allclose(kappa["a"], np.tile(b.sum(1), (3, 1)), rtol=1e-5)
    # Two paths lead through each unit, by its real and by its imaginary part.
    np.testing.assert_allclose(other**2, 2 * (a * c @ b).sum(), rtol=1e-5)


def test_complex_units_are_rescaled_by_real_factors(standard_dtype_promotion):
    net, w = complex_network()
    x = jax.random.normal(jax.random.key(0), (5, 3))
    group = rescaling_group(net, w, x)
    assert group.dim == 8  # a unit before and after its real scale
    moved = rescale(group, w, jnp.arange(8) - 3, base=2)
    found = jax.jit(lambda w: (net(w, x), path_norm(net, w, x)))
    y, norm = found(w)
    chex.assert_trees_all_equal(found(moved), (y, norm))
    near = rescale(group, w, np.arange(8, dtype=np.float32) / 7)
    np.testing.assert_allclose(found(near)[0], y, rtol=1e-4)
