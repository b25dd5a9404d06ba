"""The example networks: shapes, spread of the initial weights, and what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import InvalidInput
from jaxinv.networks import cnn, init_cnn, init_mlp, mlp


def test_mlp_shapes_and_dtypes(x64):
    params = init_mlp(jax.random.key(0), (4, 6, 3), dtype=jnp.float64)
    assert jax.tree.map(lambda a: (a.shape, a.dtype.name), params) == {
        "Dense_0": {"kernel": ((4, 6), "float64"), "bias": ((6,), "float64")},
        "Dense_1": {"kernel": ((6, 3), "float64"), "bias": ((3,), "float64")},
    }


def test_mlp_has_no_bias_on_request():
    params = init_mlp(jax.random.key(0), (4, 6, 3), bias=False)
    assert [list(layer) for layer in params.values()] == [["kernel"], ["kernel"]]
    assert mlp(params, jnp.ones((2, 4))).shape == (2, 3)


def test_initial_weights_have_variance_two_over_fan_in():
    kernel = init_mlp(jax.random.key(0), (500, 400))["Dense_0"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 500), rtol=0.01)
    kernel = init_cnn(jax.random.key(0), 64)["Conv_1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)


def test_biases_are_zero_unless_asked_for():
    assert not init_mlp(jax.random.key(0), (3, 500))["Dense_0"]["bias"].any()
    bias = init_mlp(jax.random.key(0), (3, 2000), bias_std=0.5)["Dense_0"]["bias"]
    np.testing.assert_allclose(bias.std(), 0.5, rtol=0.05)


def test_layers_are_drawn_independently():
    params = init_mlp(jax.random.key(0), (9, 9, 9), bias_std=1.0)
    leaves = [np.ravel(a)[:9] for a in jax.tree.leaves(params)]
    for i, a in enumerate(leaves):
        for b in leaves[i + 1 :]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.99


def test_mlp_is_the_formula(x64):
    params = init_mlp(jax.random.key(0), (4, 6, 3), bias_std=1.0, dtype=jnp.float64)
    x = np.random.default_rng(0).standard_normal((5, 2, 2))
    first, second = params["Dense_0"], params["Dense_1"]
    for activation in (jax.nn.relu, jnp.tanh):
        h = activation(x.reshape(5, 4) @ first["kernel"] + first["bias"])
        expected = h @ second["kernel"] + second["bias"]
        np.testing.assert_allclose(mlp(params, x, activation=activation), expected, rtol=1e-12)


def test_mlp_ends_without_an_activation():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    assert (mlp(init_mlp(jax.random.key(0), (4, 6, 3)), x) < 0).any()


def test_cnn_is_the_same_network_as_in_flax():
    import flax.linen as nn

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            branch = nn.relu(nn.Conv(4, (3, 3))(h))
            branch = nn.Conv(4, (3, 3))(branch)
            return nn.Dense(10)(nn.relu(h + branch).mean((1, 2)))

    params = init_cnn(jax.random.key(0), 4, in_channels=3, bias_std=1.0)
    x = np.random.default_rng(0).standard_normal((5, 8, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(
        cnn(params, x), CNN().apply({"params": params}, x), rtol=1e-5, atol=1e-5
    )


def test_cnn_without_biases():
    params = init_cnn(jax.random.key(0), 4, bias=False, num_classes=2)
    assert {name: list(layer) for name, layer in params.items()} == {
        name: ["kernel"] for name in ("Conv_0", "Conv_1", "Conv_2", "Dense_0")
    }
    assert cnn(params, jnp.ones((5, 4, 4, 1))).shape == (5, 2)


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2)])
def test_mlp_sizes_must_make_sense(sizes):
    with pytest.raises(InvalidInput, match="sizes="):
        init_mlp(jax.random.key(0), sizes)


@pytest.mark.parametrize("kwargs", [{"channels": 0}, {"in_channels": 0}, {"num_classes": 0}])
def test_cnn_numbers_must_make_sense(kwargs):
    with pytest.raises(InvalidInput, match=f"{next(iter(kwargs))}=0"):
        init_cnn(jax.random.key(0), **kwargs)


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 1, 1), (8,)])
def test_cnn_needs_images(shape):
    with pytest.raises(InvalidInput, match=r"height, width, channels"):
        cnn(init_cnn(jax.random.key(0)), jnp.ones(shape))
