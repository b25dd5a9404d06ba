"""Operator norms against matrices that are built entry by entry, and numpy.linalg."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import InvalidInput
from jaxinv.capacity import (
    linear_operators,
    log_spectral_complexity,
    log_spectral_product,
    operator_norm,
    spectral_norms,
)
from jaxinv.networks import init_mlp, mlp

jitted = functools.partial(
    jax.jit, static_argnums=0
)  # one compilation instead of one per operation
_NHWC = ("NHWC", "HWIO", "NHWC")


def matrix_of_convolution(kernel, shape, stride, dilation, low, out_shape, groups):
    """The matrix of a 2-D convolution, (outputs, inputs), one kernel tap at a time."""
    height, width, channels = shape
    rows, columns, features = out_shape
    taps_y, taps_x, inputs, _ = kernel.shape
    matrix = np.zeros((rows, columns, features, height, width, channels))
    for i, j, f in np.ndindex(*out_shape):
        group = f // (features // groups)
        for a, b, c in np.ndindex(taps_y, taps_x, inputs):
            y, x = i * stride + a * dilation - low, j * stride + b * dilation - low
            if 0 <= y < height and 0 <= x < width:
                matrix[i, j, f, y, x, group * inputs + c] += kernel[a, b, c, f]
    return matrix.reshape(rows * columns * features, -1)


CONVOLUTIONS = {
    "same": ({}, 1, 1, 1, 1),
    "strided valid": ({"window_strides": (2, 2), "padding": "VALID"}, 2, 1, 0, 1),
    "dilated": ({"rhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}, 1, 2, 2, 1),
    "grouped": ({"feature_group_count": 2}, 1, 1, 1, 2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_norm_of_a_convolution_is_that_of_its_matrix(kind, x64):
    options, stride, dilation, low, groups = CONVOLUTIONS[kind]
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4 // groups, 2))

    def net(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=_NHWC, **options)

    x, w = jnp.zeros((5, 5, 5, 4)), jnp.asarray(kernel)
    out = jax.eval_shape(net, w, x[:1]).shape[1:]
    matrix = matrix_of_convolution(kernel, (5, 5, 4), stride, dilation, low, out, groups)
    h = rng.normal(size=(1, 5, 5, 4))
    np.testing.assert_allclose(net(w, h).ravel(), matrix @ h.ravel(), rtol=1e-10)  # it is that map
    found = jitted(spectral_norms)(net, w, x)
    largest = np.linalg.norm(matrix, 2)
    assert found.iterations[0] > 0
    np.testing.assert_allclose(found.values, [largest], rtol=1e-9)
    assert found.errors[0] <= 1e-9 * largest
    # R of one layer is ‖W‖_{2,1}: rows of the matrix are the units' incoming weights.
    np.testing.assert_allclose(
        jitted(log_spectral_complexity)(net, w, x),
        math.log(np.linalg.norm(matrix, axis=1).sum()),
        rtol=1e-9,
    )


def test_too_few_iterations_stay_below_and_say_so(x64):
    w = jax.random.normal(jax.random.key(0), (3, 3, 2, 2))

    def net(w, x):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_NHWC)

    x = jnp.zeros((1, 8, 8, 2))
    matrix = jax.jacobian(lambda x: net(w, x).ravel())(x).reshape(-1, x.size)
    singular = np.linalg.svd(matrix, compute_uv=False)
    for iterations in (3, 8):
        found = spectral_norms(net, w, x, max_iterations=iterations)
        (value,), (error,) = found.values, found.errors
        assert found.iterations[0] == iterations and value < singular[0]
        assert abs(singular - value).min() <= error and error > 1e-3 * value


def test_large_matrices_are_iterated_and_agree_with_the_singular_values(monkeypatch):
    w = jax.random.normal(jax.random.key(0), (30, 20))
    x = jnp.zeros((1, 30))
    (exact,) = spectral_norms(lambda w, x: x @ w, w, x).values
    np.testing.assert_allclose(exact, np.linalg.norm(w, 2), rtol=1e-6)
    monkeypatch.setattr(operator_norm, "_DENSE", 1)
    for matrix in (w, w.T):  # both orders of AᵀA
        found = spectral_norms(lambda w, x: x @ w, matrix, jnp.zeros((1, matrix.shape[0])))
        assert found.iterations[0] > 0
        np.testing.assert_allclose(found.values, [exact], rtol=1e-5)
    gradient = jax.grad(lambda w: spectral_norms(lambda w, x: x @ w, w, x).values[0])(w)
    u, _, vh = np.linalg.svd(w)
    np.testing.assert_allclose(gradient, np.outer(u[:, 0], vh[0]), atol=1e-3)
    zero = spectral_norms(lambda w, x: x @ w, 0 * w, x)
    assert zero.values[0] == 0 and zero.errors[0] == 0


def test_the_operators_are_those_of_the_program_whatever_their_form():
    rng = np.random.default_rng(0)
    w = {
        "a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),  # used transposed
        "scale": jnp.array([1.0, -7.0, 2.0, 0.5]),
        "heads": jnp.asarray(rng.normal(size=(2, 2, 5)), jnp.float32),
        "divide": jnp.full((5,), 4.0),
    }

    def net(w, x):
        h = jnp.einsum("ni,oi->no", x, w["a"]) * w["scale"]
        h = jnp.tanh(h).reshape(-1, 2, 2)
        return jnp.einsum("nhi,hio->nho", h, w["heads"]) / w["divide"]

    x = jnp.zeros((1, 3))
    operators = linear_operators(net, w, x)
    assert [op.leaves[0].split("/")[1] for op in operators] == ["a", "scale", "heads", "divide"]
    assert [op.operation for op in operators] == ["dot_general", "mul", "dot_general", "div"]
    found = jitted(spectral_norms)(net, w, x).values
    heads = max(np.linalg.norm(head, 2) for head in np.asarray(w["heads"]))
    expected = [np.linalg.norm(w["a"], 2), 7, heads, 0.25]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(
        jitted(log_spectral_product)(net, w, x), np.log(expected).sum(), rtol=1e-5
    )


def test_the_complexity_of_a_network_is_that_of_the_formula():
    params = init_mlp(jax.random.key(0), (5, 6, 4, 3), bias_std=1.0)  # biases have no part
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params.values()]
    norms = [np.linalg.norm(k, 2) for k in kernels]
    columns = [np.linalg.norm(k, axis=0).sum() for k in kernels]
    ratios = sum((b / s) ** (2 / 3) for b, s in zip(columns, norms, strict=True))
    x = jnp.zeros((1, 5))
    np.testing.assert_allclose(
        jitted(log_spectral_complexity)(mlp, params, x), np.log(norms).sum() + 1.5 * np.log(ratios),
        rtol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
        jitted(log_spectral_product)(mlp, params, x), np.log(norms).sum(), rtol=1e-5
    )


def test_gradients_are_the_outer_products_of_the_singular_vectors():
    w = jax.random.normal(jax.random.key(0), (4, 3))
    gradient = jax.grad(
        lambda w: spectral_norms(lambda w, x: x @ w, w, jnp.zeros((1, 4))).values[0]
    )
    u, _, vh = np.linalg.svd(w)
    np.testing.assert_allclose(gradient(w), np.outer(u[:, 0], vh[0]), atol=1e-5)


# --- the Lipschitz constant -----------------------------------------------------------


def _pool(h, reducer, start, window, stride):
    shape = (1, window, window, 1)
    return lax.reduce_window(h, start, reducer, shape, (1, stride, stride, 1), "VALID")


BETWEEN = {
    "relu": (jax.nn.relu, 1.0),
    "leaky": (lambda h: jax.nn.leaky_relu(h, 0.1), 1.0),
    "leaky, steep": (lambda h: jnp.where(h > 0, 3 * h, h), 3.0),
    "maximum": (lambda h: jnp.maximum(h, -2 * h), 2.0),
    "tanh, scaled": (lambda h: jnp.tanh(h / 2), 0.5),
    "sigmoid": (jax.nn.sigmoid, 0.25),
    "relu6": (jax.nn.relu6, 1.0),
    "max-pool": (lambda h: _pool(h, lax.max, -jnp.inf, 2, 2), 1.0),
    "overlapping max-pool": (lambda h: _pool(h, lax.max, -jnp.inf, 3, 2), 2.0),
    "average pool": (lambda h: _pool(h, lax.add, 0.0, 2, 2) / 4, 0.5),
    "mean": (lambda h: h.mean((1, 2), keepdims=True), 0.25),
    "copies": (lambda h: jnp.concatenate([jnp.broadcast_to(h, (4, *h.shape))], 0)[0], 2.0),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_the_product_bounds_the_jacobian_through_every_operation_between(kind):
    between, gain = BETWEEN[kind]
    w = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3), (3, 2)])]

    def net(w, x):
        return between(x @ w[0]) @ w[1]

    x = jax.random.normal(jax.random.key(2), (1, 4, 4, 2))
    product = np.exp(log_spectral_product(net, w, x))
    layers = np.linalg.norm(w[0], 2) * np.linalg.norm(w[1], 2)
    np.testing.assert_allclose(product, gain * layers, rtol=1e-4)
    jacobian = jax.jit(jax.jacobian(lambda x: net(w, x).ravel()))(x).reshape(-1, x.size)
    assert np.linalg.norm(jacobian, 2) <= product * (1 + 1e-5)


@pytest.mark.parametrize(
    "between",
    [
        jax.nn.gelu,
        jax.nn.elu,
        lambda h: jnp.where(h > 1, h, 0.0),  # a jump
        lambda h: jnp.where(h > 0, h, h * h),
        lambda h: h + jax.nn.relu(h),  # slope 2
        lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
        lambda h: jnp.sort(h),
    ],
)
def test_operations_without_a_known_constant_are_refused(between):
    w = [jnp.ones((2, 3)), jnp.ones((3, 2))]
    with pytest.raises(NotImplementedError, match="is not covered by a product over the layers"):
        log_spectral_product(lambda w, x: between(x @ w[0]) @ w[1], w, jnp.zeros((1, 2)))


def test_bad_tolerances_are_refused():
    w, x = jnp.ones((2, 2)), jnp.zeros((1, 2))
    with pytest.raises(InvalidInput, match="rtol must be positive"):
        spectral_norms(lambda w, x: x @ w, w, x, rtol=0.0)
    with pytest.raises(InvalidInput, match="max_iterations"):
        spectral_norms(lambda w, x: x @ w, w, x, max_iterations=0)
