"""Norm-based capacity against hand counts, loops in NumPy, and what the theory says of orbits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import InvalidInput, UnsupportedOperation
from jaxinv.capacity import (
    fisher_rao_norm,
    group_norm,
    log_group_norm,
    log_layer_product_norm,
    log_margin_normalized,
    log_spectral_complexity,
    log_spectral_product,
    log_unit_norms,
    margins,
    rescaling_invariance,
)
from jaxinv.capacity import norms as capacity
from jaxinv.jacobians import fisher
from jaxinv.networks import cnn, init_cnn, init_mlp, mlp
from jaxinv.paths import log_path_norm, path_norm, unit_path_norms
from jaxinv.rescaling import normalize, random_rescaling, rescale, rescaling_group
from tests.ground_truth import exact

INF = float("inf")


def unit_norms(fn, params, x, p=2.0):
    # Jitted: one compilation instead of one per operation.
    return np.exp(np.asarray(jax.jit(lambda w: log_unit_norms(fn, w, x, p=p))(params)))


def frobenius(params):
    return math.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(params)))


# --- group norms ----------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
def test_group_norms_of_the_small_network_are_those_counted_by_hand(biases):
    params = exact.flax_params(np.float32, biases=biases)
    columns = [  # incoming weights of the units, from the first to the output
        [1, -2, 5], [3, 4, -6], [-1, 2, 1], [0.5, -3, 2], [2, -1, 7],
    ]  # fmt: skip
    columns = [c if biases else c[:2] for c in columns]
    x = jnp.zeros((1, 2))
    exponents = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 1.5), (2, INF), (1, INF)]
    found = jax.jit(lambda w: [group_norm(mlp, w, x, p=p, q=q) for p, q in exponents])(params)
    for (p, q), value in zip(exponents, found, strict=True):
        units = [sum(abs(w) ** p for w in column) ** (1 / p) for column in columns]
        expected = max(units) if q == INF else sum(u**q for u in units) ** (1 / q)
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=f"p={p}, q={q}")


def test_a_channel_counts_once_and_all_that_writes_to_a_stream_is_one_unit():
    params = init_cnn(jax.random.key(0), 3, in_channels=2, num_classes=4, bias_std=0.5)
    x = jnp.zeros((2, 6, 6, 2))
    w = {name: {k: np.asarray(a) for k, a in layer.items()} for name, layer in params.items()}

    def cubes(*arrays):
        return sum((abs(a) ** 3).reshape(-1, a.shape[-1]).sum(0) for a in arrays)

    conv = [list(w[f"Conv_{i}"].values()) for i in range(3)]
    # h = pool(relu(Conv_0)) is finished before Conv_2 is added: three layers, and the output.
    expected = [cubes(*layer) for layer in [*conv, list(w["Dense_0"].values())]]
    found = unit_norms(cnn, params, x, p=3.0) ** 3
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)
    np.testing.assert_allclose(group_norm(cnn, params, x), frobenius(params), rtol=1e-6)

    def stream(w, x):  # without an activation in between, the kernels write to one sum
        h = x @ w["a"]
        return (h + jax.nn.relu(h) @ w["b"]) @ w["c"]

    w = {
        "a": jnp.array([[3.0, 1.0]]),
        "b": jnp.array([[4.0, 0.0], [0.0, 2.0]]),
        "c": jnp.ones((2, 1)),
    }
    np.testing.assert_allclose(unit_norms(stream, w, jnp.zeros((1, 1)), 1.0), [7, 3, 2], rtol=1e-6)


def test_shared_weights_count_for_every_unit_that_they_lead_into_and_only_once_for_each():
    rng = np.random.default_rng(0)
    square = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)

    def tied(w, x):  # encoder and decoder: columns, then rows
        return jax.nn.relu(x @ w["w"]) @ w["w"].T + w["shift"]

    w = {"w": square, "shift": jnp.array([2.0])}  # one number for three units
    a = np.asarray(square)
    expected = [*(a**2).sum(0), *((a**2).sum(1) + 4)]
    found = unit_norms(tied, w, jnp.zeros((1, 3)))
    np.testing.assert_allclose(found**2, expected, rtol=1e-5)

    def twice(w, x):  # one network on both halves of the input
        halves = [jax.nn.relu(h @ w["w"] + w["shift"]) for h in (x[:, :3], x[:, 3:])]
        return halves[0] + halves[1]

    np.testing.assert_allclose(
        unit_norms(twice, w, jnp.zeros((1, 6))) ** 2, (a**2).sum(0) + 4, rtol=1e-5
    )


def test_a_recurrent_unit_is_one_unit_at_all_steps():
    def rnn(w, x):
        def step(h, row):
            return jnp.maximum(h @ w["h"] + row @ w["x"] + w["b"], 0), None

        h, _ = lax.scan(step, jnp.zeros((x.shape[0], 2)), x.swapaxes(0, 1))
        return h @ w["out"]

    rng = np.random.default_rng(1)
    shapes = {"h": (2, 2), "x": (3, 2), "b": (2,), "out": (2, 1)}
    w = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    hidden = sum((np.asarray(w[k]) ** 2).reshape(-1, 2).sum(0) for k in ("h", "x", "b"))
    found = unit_norms(rnn, w, jnp.zeros((1, 4, 3))) ** 2
    np.testing.assert_allclose(found, [*hidden, (np.asarray(w["out"]) ** 2).sum()], rtol=1e-5)
    with pytest.raises(UnsupportedOperation, match="joins several branches"):
        log_spectral_product(rnn, w, jnp.zeros((1, 4, 3)))


def test_layers_stacked_in_one_leaf_have_units_of_their_own():
    def stacked(w, x):
        return lax.scan(lambda h, layer: (jnp.maximum(h @ layer, 0), None), x, w)[0]

    w = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 4)), jnp.float32)
    x = jnp.zeros((1, 4))
    found = unit_norms(stacked, w, x)
    np.testing.assert_allclose(found, np.linalg.norm(w, axis=1).ravel(), rtol=1e-5)
    product = sum(math.log(np.linalg.norm(layer, 2)) for layer in np.asarray(w))
    np.testing.assert_allclose(log_spectral_product(stacked, w, x), product, rtol=1e-5)


def test_weights_moved_about_and_weights_computed_from_parameters():
    def net(w, x):
        kernel = jnp.concatenate([w["a"], w["b"]], 1)[:, ::-1]  # moved: still the parameters
        h = jax.nn.relu(x @ kernel)
        direction = w["v"] / jnp.linalg.norm(w["v"], axis=0)  # computed: its own length counts
        return (h @ direction) * w["g"]

    w = {
        "a": jnp.array([[3.0], [4.0]]),
        "b": jnp.array([[0.0], [2.0]]),
        "v": jnp.array([[5.0], [5.0]]),
        "g": jnp.array([7.0]),
    }
    np.testing.assert_allclose(unit_norms(net, w, jnp.zeros((1, 2))), [2, 5, 1, 7], rtol=1e-6)


def test_logarithms_do_not_overflow_and_units_of_weight_zero_are_minus_infinity():
    w = [jnp.full((2, 2), 1e30), jnp.full((2, 2), 1e-30), jnp.zeros((2, 1))]

    def net(w, x):
        for layer in w:
            x = jax.nn.relu(x @ layer)
        return x

    x = jnp.zeros((1, 2))
    expected = [30 * math.log(10) + math.log(2) / 2] * 2
    expected += [-30 * math.log(10) + math.log(2) / 2] * 2

    @jax.jit
    def logs(w, deep):
        products = log_layer_product_norm(net, deep, x), log_spectral_product(net, deep, x)
        return log_unit_norms(net, w, x), jnp.stack(products)

    found, products = logs(w, [jnp.full((2, 2), 1e30)] * 5)  # the product is 2^5·1e150
    np.testing.assert_allclose(found, [*expected, -INF], rtol=1e-6)
    np.testing.assert_allclose(products, 5 * (math.log(2) + 30 * math.log(10)), rtol=1e-6)


def test_group_norms_differentiate_jit_and_vmap():
    params = init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.5)
    x = jnp.zeros((1, 3))
    gradients = jax.jit(jax.vmap(jax.value_and_grad(lambda w: group_norm(mlp, w, x))))
    dead = {**params, "Dense_1": jax.tree.map(jnp.zeros_like, params["Dense_1"])}
    values, found = gradients(jax.tree.map(lambda *a: jnp.stack(a), params, dead))
    for i, w in enumerate((params, dead)):
        np.testing.assert_allclose(values[i], frobenius(w), rtol=1e-5)
        for g, a in zip(jax.tree.leaves(found), jax.tree.leaves(w), strict=True):
            np.testing.assert_allclose(g[i], a / frobenius(w), rtol=1e-5, atol=1e-7)


# --- what the theory says -------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    params = jax.jit(lambda key: init_mlp(key, (5, 7, 6, 3), bias_std=0.3))(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 5)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, 20))
    return params, x, y, rescaling_group(mlp, params, x)


@pytest.mark.parametrize("p", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_in_the_normalized_gauge_output_units_have_the_norm_of_their_paths(problem, p):
    params, x, _, group = problem

    @jax.jit
    def both(w):
        normal = normalize(group, w, p=p).params
        return jnp.exp(log_unit_norms(mlp, normal, x, p=p))[-3:], unit_path_norms(mlp, w, x, p=p)

    np.testing.assert_allclose(*both(params), rtol=1e-4)


@pytest.mark.slow
def test_the_path_norm_is_the_smallest_product_of_max_norms_on_the_orbit():
    params = init_mlp(jax.random.key(3), (4, 6, 5, 1), bias=False)
    x = jnp.zeros((1, 4))
    group = rescaling_group(mlp, params, x)
    lowest = log_path_norm(mlp, params, x, p=2)

    @jax.jit
    def product(w):
        return log_layer_product_norm(mlp, w, x, p=2, q=INF)

    np.testing.assert_allclose(product(normalize(group, params).params), lowest, rtol=1e-5)
    for seed in range(5):
        u = random_rescaling(group, jax.random.key(seed))
        assert product(rescale(group, params, u)) > lowest


def test_what_is_invariant_is_so_to_rounding_and_the_rest_is_not(problem):
    params, x, y, group = problem
    one = x[:1]
    invariant = {
        "path p=1": lambda w: path_norm(mlp, w, one, p=1),
        "path p=2": lambda w: log_path_norm(mlp, w, one, p=2),
        "Fisher-Rao": lambda w: fisher_rao_norm(mlp, w, x),
        "empirical Fisher-Rao": lambda w: fisher_rao_norm(mlp, w, x, y),
        "margins": lambda w: margins(mlp, w, x, y),
        "group norm in the normalized gauge": lambda w: group_norm(
            mlp, normalize(group, w).params, one, p=2, q=1
        ),
    }
    others = {
        "Frobenius": lambda w: log_group_norm(mlp, w, one),
        "max-norm": lambda w: log_group_norm(mlp, w, one, q=INF),
        "group p=1 q=2": lambda w: log_group_norm(mlp, w, one, p=1, q=2),
        "layer product": lambda w: log_layer_product_norm(mlp, w, one),
        "spectral product": lambda w: log_spectral_product(mlp, w, one),
        "spectral complexity": lambda w: log_spectral_complexity(mlp, w, one),
    }
    measures = invariant | others
    found = rescaling_invariance(
        lambda w: {name: measure(w) for name, measure in measures.items()},
        group,
        params,
        jax.random.key(0),
        draws=2,
    )
    for name in measures:
        assert bool(found.invariant[name]) == (name in invariant), name
        low, high = (0, 2e-6) if name in invariant else (1e-2, INF)
        assert low <= found.deviation[name] < high, name
    assert found.rescaled["margins"].shape == (2, 20)


@pytest.mark.slow
def test_the_same_on_a_residual_convolutional_network():
    params = init_cnn(jax.random.key(0), 2, num_classes=3, bias_std=0.3)
    x = jax.random.normal(jax.random.key(1), (4, 4, 4, 1))
    group = rescaling_group(cnn, params, x)

    def measure(w):
        return log_path_norm(cnn, w, x), fisher_rao_norm(cnn, w, x), log_group_norm(cnn, w, x)

    found = rescaling_invariance(measure, group, params, jax.random.key(2), draws=2)
    assert [bool(i) for i in found.invariant] == [True, True, False]


# --- Fisher-Rao norm and margins ------------------------------------------------------


def test_the_derivative_along_the_weights_is_depth_times_the_output():
    params = init_mlp(jax.random.key(1), (4, 5, 5, 5, 3), bias=False)
    x = jax.random.normal(jax.random.key(2), (6, 4))
    f = np.asarray(mlp(params, x))
    np.testing.assert_allclose(
        fisher_rao_norm(mlp, params, x, likelihood="gaussian"),
        4 * math.sqrt((f**2).sum(1).mean()),
        rtol=1e-5,
    )
    y = np.array([0, 2, 1, 1, 0, 2])
    probabilities = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    inner = [
        sum((probabilities[i, c] - (c == y[i])) * 4 * f[i, c] for c in range(3)) for i in range(6)
    ]
    np.testing.assert_allclose(
        fisher_rao_norm(mlp, params, x, y), math.sqrt(np.mean(np.square(inner))), rtol=1e-5
    )


@pytest.mark.parametrize("likelihood", ["softmax", "poisson"])
def test_the_fisher_rao_norm_is_the_length_of_the_weights_in_the_fisher_metric(problem, likelihood):
    params, x, _, _ = problem
    metric = np.asarray(fisher(mlp, params, x, likelihood), np.float64)
    w = np.asarray(jax.flatten_util.ravel_pytree(params)[0], np.float64)
    np.testing.assert_allclose(
        fisher_rao_norm(mlp, params, x, likelihood=likelihood) ** 2, w @ metric @ w, rtol=1e-4
    )


def test_labels_of_other_likelihoods_enter_by_their_mean():
    w, x = jnp.array([[2.0, -1.0]]), jnp.array([[1.0], [2.0]])
    y = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    f = np.array([[2.0, -1.0], [4.0, -2.0]])  # also J w
    means = {"gaussian": f, "bernoulli": 1 / (1 + np.exp(-f)), "poisson": np.exp(f)}
    for name, mean in means.items():
        inner = ((mean - np.asarray(y)) * f).sum(1)
        found = fisher_rao_norm(lambda w, x: x @ w, w, x, y, likelihood=name)
        np.testing.assert_allclose(found, math.sqrt((inner**2).mean()), rtol=1e-6)


def test_margins_and_norms_per_margin():
    f = jnp.array([[1.0, 4.0, 2.0], [3.0, 0.0, 2.5], [0.0, 0.0, 5.0]])
    found = margins(lambda w, x: x * w, jnp.ones(()), f, jnp.array([1, 0, 1]))
    np.testing.assert_array_equal(found, [2.0, 0.5, -5.0])
    normalized = log_margin_normalized(jnp.log(8.0), found)
    np.testing.assert_allclose(normalized, [math.log(4), math.log(16), INF])
    huge = log_margin_normalized(jnp.asarray(400.0), jnp.asarray(1e-3))  # e^400 is no float32
    np.testing.assert_allclose(huge, 400 + 3 * math.log(10), rtol=1e-6)


def test_norms_per_margin_do_not_see_the_scale_of_the_output(problem):
    params, x, _, _ = problem
    y = mlp(params, x).argmax(-1)  # so that all margins are positive
    scaled = {**params, "Dense_2": jax.tree.map(lambda a: 4 * a, params["Dense_2"])}

    def normalized(norm, w):
        return log_margin_normalized(norm(mlp, w, x), margins(mlp, w, x, y).min())

    @jax.jit
    def all_norms(w):
        norms = (log_path_norm, log_layer_product_norm, log_spectral_product)
        return jnp.stack([normalized(norm, w) for norm in norms])

    np.testing.assert_allclose(all_norms(params), all_norms(scaled), rtol=1e-5)


# --- refusals -------------------------------------------------------------------------


def test_products_over_layers_refuse_networks_that_are_no_chain():
    w = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}

    def skip(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"] + x

    def branches(w, x):
        return jnp.concatenate([x @ w["a"], x @ w["b"]], -1)

    def gated(w, x):
        return (x @ w["a"]) * jax.nn.sigmoid(x @ w["b"])

    def two(w, x):
        return x @ w["a"], x @ w["b"]

    x = jnp.ones((1, 2))
    for fn in (skip, branches, gated, two):
        for product in (log_spectral_product, log_spectral_complexity, log_layer_product_norm):
            with pytest.raises(UnsupportedOperation, match="is not covered by a product over"):
                product(fn, w, x)
        np.testing.assert_allclose(group_norm(fn, w, x), math.sqrt(8), rtol=1e-6)
    with pytest.raises(UnsupportedOperation, match="test_norms.py") as refusal:
        log_spectral_product(skip, w, x)
    assert "`add`" in str(refusal.value)


def test_parameters_that_are_the_weight_of_no_edge_are_refused():
    w, x = {"t": jnp.ones((3,)), "k": jnp.ones((3, 2))}, jnp.ones((1, 3))
    with pytest.raises(UnsupportedOperation, match="`max` of a value .* with params/t"):
        group_norm(lambda w, x: jnp.maximum(x, w["t"]) @ w["k"], w, x)
    with pytest.raises(UnsupportedOperation, match="one-hot"):
        group_norm(lambda w, x: w["k"][x], w, jnp.zeros((1, 2), int))


def test_bad_arguments_are_refused(problem):
    params, x, y, group = problem
    with pytest.raises(InvalidInput, match="p must be"):
        group_norm(mlp, params, x, p=0.5)
    with pytest.raises(InvalidInput, match="q must be"):
        log_layer_product_norm(mlp, params, x, q=0.5)
    with pytest.raises(InvalidInput, match="dtype int32"):
        group_norm(lambda w, x: x @ w, jnp.ones((5, 2), int), x)
    with pytest.raises(InvalidInput, match="labels from 0 to 3"):
        margins(mlp, params, x, y.at[0].set(3))
    with pytest.raises(InvalidInput, match="dtype float32"):
        margins(mlp, params, x, y.astype(jnp.float32))
    with pytest.raises(InvalidInput, match=r"y has shape \(20, 1\)"):
        fisher_rao_norm(mlp, params, x, y[:, None])
    with pytest.raises(InvalidInput, match="likelihood must be"):
        fisher_rao_norm(mlp, params, x, likelihood="normal")
    with pytest.raises(InvalidInput, match="no generators"):
        linear = rescaling_group(lambda w, x: x @ w, jnp.ones((5, 2)), x)
        rescaling_invariance(jnp.sum, linear, jnp.ones((5, 2)), jax.random.key(0))
    with pytest.raises(InvalidInput, match="draws"):
        rescaling_invariance(jnp.sum, group, params, jax.random.key(0), draws=0)


def test_every_name_of_the_module_is_there():
    assert all(hasattr(capacity, name) for name in capacity.__all__)
