"""Measures of invariance, against arithmetic done by hand and against theorems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import InvalidInput, path_sgd
from jaxinv.invariance import (
    by_rescaling,
    equivariance_error,
    function_invariance_error,
    gradient_orthogonality,
)
from jaxinv.networks import cnn, init_cnn, init_mlp, mlp
from jaxinv.rescaling import random_rescaling, rescaling_group, tangent_vectors

SIZES = (6, 8, 7, 3)
X = jax.random.normal(jax.random.key(1), (16, 6))
Y = jnp.arange(16) % 3


def as_double(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


@functools.partial(jax.jit, static_argnums=0)
def network(sizes):
    return init_mlp(jax.random.key(0), sizes, bias_std=0.1, dtype=jnp.float64)


def cross_entropy(fn, x, y):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

    return loss


# --- functions ------------------------------------------------------------------------


def test_function_error_is_the_largest_difference_over_batch_and_outputs():
    def fn(w, x):
        return {"a": w * x, "b": jnp.zeros(2)}

    x = jnp.array([[1.0, -3.0], [0.5, 2.0]])
    error = function_invariance_error(fn, jnp.array(2.0), jnp.array(1.0), x)
    assert (error.absolute, error.relative) == (3.0, 0.5)


def test_function_error_is_zero_for_the_same_and_infinite_from_nothing():
    same = function_invariance_error(lambda w, x: w * x, jnp.zeros(()), jnp.zeros(()), X)
    assert (same.absolute, same.relative) == (0, 0)
    assert function_invariance_error(lambda w, x: w * x, jnp.zeros(()), jnp.ones(()), X)[1] > 1e30


def test_function_error_of_nan_is_nan():
    error = function_invariance_error(lambda w, x: w * x, jnp.ones(()), jnp.array(jnp.nan), X)
    assert jnp.isnan(error.absolute) and jnp.isnan(error.relative)


def test_functions_of_different_outputs_are_refused():
    with pytest.raises(InvalidInput, match="only functions of one signature"):
        function_invariance_error(lambda w, x: w, jnp.ones(2), jnp.ones(3), X)


# --- gradients ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the digits")
    data = datasets.load_digits()
    return data.images / 16.0, data.target.astype(np.int32)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_gradients_on_digits_are_orthogonal_to_every_generator(name, digits, x64):
    images, labels = jnp.asarray(digits[0]), jnp.asarray(digits[1])
    if name == "mlp":
        fn, params, x = mlp, network((64, 32, 32, 10)), images
        hidden = 64
    else:
        fn, params, x = cnn, init_cnn(jax.random.key(0), 4, bias_std=0.1), images[:300, ..., None]
        hidden = 8  # Conv_0 and Conv_2 write to one residual stream
    params, labels = as_double(params), labels[: len(x)]
    group = rescaling_group(fn, params, x)
    result = gradient_orthogonality(cross_entropy(fn, x, labels), params, group)
    assert result.cosines.shape == (hidden,)
    assert result.gradient_norm > 0.1
    assert abs(result.cosines).max() < 1e-14
    # Of the terms themselves nothing is small; some units may be off for all of the data.
    alive = abs(result.inner) > 0
    assert int(alive.sum()) >= 0.8 * hidden
    assert result.cancellation[alive].max() < 1e-12


def test_the_gradient_of_a_tanh_network_is_far_from_orthogonal(digits, x64):
    images, labels = jnp.asarray(digits[0]), jnp.asarray(digits[1])
    params = network((64, 32, 10))
    params = jax.tree.map(lambda w: 3 * w, params)  # into the curved part of tanh
    group = rescaling_group(mlp, params, images)  # of ReLU: not a symmetry of tanh

    def tanh(params, x):
        return mlp(params, x, activation=jnp.tanh)

    result = gradient_orthogonality(cross_entropy(tanh, images, labels), params, group)
    assert abs(result.cosines).max() > 5e-3
    assert jnp.median(result.cancellation) > 0.05


def recurrent(w, x):
    h = jnp.zeros((x.shape[0], w["hh"].shape[0]), x.dtype)
    for t in range(x.shape[1]):
        h = jax.nn.relu(x[:, t] @ w["xh"] + h @ w["hh"] + w["b"])
    return h @ w["out"]


def test_inner_products_and_norms_are_those_of_the_dense_generators(x64):
    """In a recurrent network one parameter can be in one generator twice: hh[i, i] cancels."""
    shapes = {"xh": (2, 3), "hh": (3, 3), "b": (3,), "out": (3, 1)}
    rng = np.random.default_rng(0)
    w = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((4, 3, 2), jnp.float64)
    group = rescaling_group(recurrent, w, x)

    def loss(w):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(w))  # invariant under nothing

    result = gradient_orthogonality(loss, w, group)
    T = np.asarray(jax.jit(lambda w: tangent_vectors(group, w, dense=True))(w))
    g = np.concatenate([3 * np.asarray(leaf).ravel() ** 2 for leaf in jax.tree.leaves(w)])
    assert T.shape[1] == 3
    np.testing.assert_allclose(result.inner, g @ T, rtol=1e-13)
    np.testing.assert_allclose(result.tangent_norms, np.linalg.norm(T, axis=0), rtol=1e-13)
    cosines = g @ T / np.linalg.norm(T, axis=0) / np.linalg.norm(g)
    np.testing.assert_allclose(result.cosines, cosines, rtol=1e-13)
    cancellation = abs(g @ T) / (abs(T) * abs(g)[:, None]).sum(axis=0)
    np.testing.assert_allclose(result.cancellation, cancellation, rtol=1e-13)


def test_a_loss_per_example_and_a_traced_group_are_refused():
    w = init_mlp(jax.random.key(0), (6, 2, 3))
    group = rescaling_group(mlp, w, X)
    with pytest.raises(InvalidInput, match=r"shape \(16,\).*mean or the sum"):
        gradient_orthogonality(lambda w: mlp(w, X)[:, 0], w, group)
    with pytest.raises(InvalidInput, match="close over the group"):
        jax.jit(lambda w, group: gradient_orthogonality(cross_entropy(mlp, X, Y), w, group))(
            w, group
        )


# --- algorithms -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    """A ReLU network, its loss, and a reparametrisation by a random group element, in float64."""
    with jax.enable_x64(True):
        params = network(SIZES)
        x = X.astype(jnp.float64)
        group = rescaling_group(mlp, params, x)
        u = random_rescaling(group, jax.random.key(2), dtype=jnp.float64)
        return params, x, cross_entropy(mlp, x, Y), by_rescaling(group, u)


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.03, "momentum": 0.9, "nesterov": True},
        {"learning_rate": 0.3, "momentum": 0.5, "p": 1.0},
    ],
    ids=str,
)
def test_path_sgd_is_invariant_under_rescalings(problem, options, x64):
    params, x, loss, move = problem
    optimizer = path_sgd(fn=mlp, x=x, **options)
    error = equivariance_error(optimizer, loss, params, move, 10, fn=mlp, x=x)
    assert error.loss[-1] < 0.95 * error.loss[0]  # it did train
    assert error.first_step < 1e-13
    assert max(jax.tree.leaves(error.per_leaf)) < 1e-13
    assert error.weights.shape == (10,) and error.weights.max() < 1e-12
    assert error.function.max() < 1e-12
    np.testing.assert_allclose(error.loss, error.other_loss, rtol=1e-12)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01),
    "adagrad": optax.adagrad(0.05),
    "muon": optax.contrib.muon(0.01),
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("sgd", "adam") else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)
def test_other_optimizers_are_far_from_invariant_under_rescalings(
    problem, name, x64, standard_dtype_promotion
):
    params, x, loss, move = problem
    error = equivariance_error(OPTIMIZERS[name], loss, params, move, 5, fn=mlp, x=x)
    assert error.first_step > 0.1
    assert error.weights[-1] > 0.1
    assert error.function[-1] > 0.01


def test_every_optimizer_is_invariant_under_no_reparametrisation(
    problem, x64, standard_dtype_promotion
):
    params, _, loss, _ = problem
    error = equivariance_error(OPTIMIZERS["adam"], loss, params, lambda theta: theta, 3)
    assert error.first_step == 0 and error.weights.max() == 0 and error.function.max() == 0


def test_gradient_descent_errs_by_what_the_jacobian_says(x64):
    """w = Aθ: steps −ηg and −ηAAᵀg."""
    A = np.array([[2.0, 1.0], [0.0, 3.0]])
    g, eta = np.array([1.0, -2.0]), 0.1
    error = equivariance_error(
        optax.sgd(eta), lambda w: w @ jnp.asarray(g), jnp.ones(2), lambda t: jnp.asarray(A) @ t, 4
    )
    here, there = -eta * g, -eta * A @ A.T @ g
    size = max(np.linalg.norm(here), np.linalg.norm(there))
    expected = np.linalg.norm(here - there) / size
    assert error.first_step == pytest.approx(expected, rel=1e-12)
    # A linear loss has one gradient everywhere, so the trajectories differ by as much.
    np.testing.assert_allclose(error.weights, expected, rtol=1e-12)
    drop = np.arange(5) * np.array([[g @ here], [g @ there]])
    np.testing.assert_allclose(error.loss - error.loss[0], drop[0], atol=1e-12)
    np.testing.assert_allclose(error.other_loss - error.loss[0], drop[1], atol=1e-12)


def test_orthogonal_reparametrisations_are_those_gradient_descent_respects(
    x64, standard_dtype_promotion
):
    Q = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0])

    def loss(w):
        return jnp.sum(jnp.cos(w) + w**4)

    start = jnp.linspace(0.1, 1, 4)
    error = equivariance_error(optax.sgd(0.05, momentum=0.5), loss, start, lambda t: Q @ t, 8)
    assert error.first_step < 1e-14 and error.weights.max() < 1e-13
    error = equivariance_error(optax.adam(0.05), loss, start, lambda t: Q @ t, 8)
    assert error.first_step > 0.05


def newton(loss):
    """Newton's method, from the loss in the coordinates that it is given."""

    def update(updates, state, params=None):
        return -0.3 * jnp.linalg.solve(jax.hessian(loss)(params), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_an_algorithm_of_the_network_sees_it_in_its_own_coordinates(x64):
    """Newton's method on f(w(θ)) is invariant under linear maps; on f(w) for both it is not."""
    A = jnp.array([[2.0, 1.0, 0.0], [0.5, 3.0, 0.0], [0.0, 1.0, 0.2]])
    x = jnp.array([[0.3, -0.2, 0.5]])

    def fn(w, x):
        return jnp.sum(jnp.cosh(w + x), axis=-1)

    def loss(w):
        return fn(w, x)[0]

    def make(fn):
        return newton(lambda w: fn(w, x)[0])

    start = jnp.array([0.2, 0.1, -0.4])
    good = equivariance_error(make, loss, start, lambda t: A @ t, 4, fn=fn, x=x)
    assert good.first_step < 1e-13 and good.function.max() < 1e-12
    bad = equivariance_error(make(fn), loss, start, lambda t: A @ t, 4, fn=fn, x=x)
    assert bad.first_step > 0.1


def test_a_curved_reparametrisation_is_compared_at_first_order(x64):
    """Under w = θ³ Newton-like scaling by (dw/dθ)² is invariant to first order only."""

    def loss(w):
        return jnp.sum((w - 2) ** 2)

    def make(fn):
        def update(updates, state, params=None):
            jacobian = jax.jacobian(lambda w: fn(w, X[:1]))(params)  # dw/dθ
            return -0.05 * jnp.linalg.solve(jacobian.T @ jacobian, updates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    theta = jnp.array([0.8, 1.1])
    error = equivariance_error(make, loss, theta, lambda t: t**3, 3, fn=lambda w, x: w)
    assert error.first_step < 1e-14
    assert 1e-3 < error.weights[0] < 0.5  # second order in the step


def test_power_of_two_rescalings_are_exact_maps(problem, x64):
    params, x, _, _ = problem
    group = rescaling_group(mlp, params, x)
    move = by_rescaling(
        group, random_rescaling(group, jax.random.key(3), kind="power_of_two"), base=2
    )
    error = jax.jit(lambda w: function_invariance_error(mlp, w, move(w), x))(params)
    assert error.absolute == 0


def test_what_cannot_be_compared_is_refused():
    w, loss = jnp.ones(2), jnp.sum
    same = lambda theta: theta  # noqa: E731
    with pytest.raises(InvalidInput, match="integer >= 1"):
        equivariance_error(optax.sgd(0.1), loss, w, same, 0)
    with pytest.raises(InvalidInput, match="pass fn="):
        equivariance_error(lambda fn: optax.sgd(0.1), loss, w, same)
    with pytest.raises(InvalidInput, match="x was given without fn"):
        equivariance_error(optax.sgd(0.1), loss, w, same, x=X)
    with pytest.raises(InvalidInput, match="must be a scalar"):
        equivariance_error(optax.sgd(0.1), lambda w: w, w, same)
