"""Any framework's model is a `fn(params, x)`: all give the numbers of one plain network."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import networks, path_kappa, path_norm, unit_path_norms

SIZES = (4, 6, 5, 3)
PARAMS = networks.init_mlp(jax.random.key(0), SIZES, bias_std=1.0)
X = jax.ShapeDtypeStruct((8, 4), np.float32)
KAPPA = path_kappa(networks.mlp, PARAMS, X, p=1.5)
UNITS = unit_path_norms(networks.mlp, PARAMS, X, p=1.5)


def assert_is_the_plain_network(fn, params, kernels_and_biases, transposed=False):
    """Same norms; and κ of every layer, found by `kernels_and_biases(tree)`."""
    np.testing.assert_allclose(unit_path_norms(fn, params, X, p=1.5), UNITS, rtol=1e-5)
    kappa = path_kappa(fn, params, X, p=1.5)
    assert jax.tree.structure(kappa) == jax.tree.structure(params)
    layers = kernels_and_biases(kappa)
    assert len(layers) == len(KAPPA)
    for (kernel, bias), expected in zip(layers, KAPPA.values(), strict=True):
        kernel = np.asarray(kernel).T if transposed else kernel
        np.testing.assert_allclose(kernel, expected["kernel"], rtol=1e-5)
        np.testing.assert_allclose(bias, expected["bias"], rtol=1e-5)


def test_flax_linen():
    import flax.linen as nn

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in SIZES[1:-1]:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(SIZES[-1])(x)

    variables = MLP().init(jax.random.key(1), jnp.ones((1, 4)))
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(PARAMS)
    assert_is_the_plain_network(
        lambda params, x: MLP().apply({"params": params}, x),
        PARAMS,
        lambda tree: [(layer["kernel"], layer["bias"]) for layer in tree.values()],
    )
    # The variables as a whole are a pytree of parameters too.
    assert_is_the_plain_network(
        MLP().apply,
        {"params": PARAMS},
        lambda tree: [(layer["kernel"], layer["bias"]) for layer in tree["params"].values()],
    )


def test_flax_linen_scan_and_remat_over_layers():
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(4)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers()(x, None)[0]

    params = Deep().init(jax.random.key(0), jnp.ones((1, 4)))
    (kernel,) = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 3]
    h = np.ones(4)
    for layer in np.asarray(kernel, np.float64):
        h = h @ np.square(layer)
    np.testing.assert_allclose(unit_path_norms(Deep().apply, params, X) ** 2, h, rtol=1e-5)


def test_flax_nnx():
    from flax import nnx

    class MLP(nnx.Module):
        def __init__(self, rngs):
            shapes = zip(SIZES[:-1], SIZES[1:], strict=True)
            self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in shapes])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = nnx.relu(layer(x))
            return self.layers[-1](x)

    graph, params = nnx.split(MLP(nnx.Rngs(0)))
    for k, layer in enumerate(PARAMS.values()):
        params["layers"][k]["kernel"][...] = layer["kernel"]
        params["layers"][k]["bias"][...] = layer["bias"]
    assert_is_the_plain_network(
        lambda params, x: nnx.merge(graph, params)(x),
        params,
        lambda tree: [
            (tree["layers"][k]["kernel"][...], tree["layers"][k]["bias"][...]) for k in range(3)
        ],
    )


def test_flax_nnx_with_frozen_batch_norm_and_dropout():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.dropout(nnx.relu(self.norm(self.dense(x))))

    model = Net(nnx.Rngs(0))
    model.norm.var[...] = jnp.array([1.0, 4.0, 9.0])
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    units = unit_path_norms(lambda w, x: nnx.merge(graph, w, rest)(x), params, X)
    kernel = np.asarray(params["dense"]["kernel"][...])
    expected = np.linalg.norm(kernel, axis=0) / np.sqrt(np.array([1, 4, 9]) + 1e-5)
    np.testing.assert_allclose(units, expected, rtol=1e-5)


def test_equinox():
    eqx = pytest.importorskip("equinox")

    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    plain = {
        f"Dense_{i}": {"kernel": layer.weight.T, "bias": layer.bias}
        for i, layer in enumerate(model.layers)
    }
    np.testing.assert_allclose(
        path_norm(fn, params, X), path_norm(networks.mlp, plain, X), rtol=1e-5
    )
    kappa = path_kappa(fn, params, X)
    expected = path_kappa(networks.mlp, plain, X)
    assert jax.tree.structure(kappa) == jax.tree.structure(params)
    for layer, reference in zip(kappa.layers, expected.values(), strict=True):
        np.testing.assert_allclose(layer.weight.T, reference["kernel"], rtol=1e-5)
        np.testing.assert_allclose(layer.bias, reference["bias"], rtol=1e-5)


def test_haiku():
    hk = pytest.importorskip("haiku")

    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(SIZES[1:])(x)))
    names = model.init(jax.random.key(0), jnp.ones((1, 4)))
    params = {
        name: {"w": layer["kernel"], "b": layer["bias"]}
        for name, layer in zip(names, PARAMS.values(), strict=True)
    }
    assert jax.tree.structure(params) == jax.tree.structure(names)
    assert_is_the_plain_network(
        model.apply, params, lambda tree: [(tree[name]["w"], tree[name]["b"]) for name in names]
    )


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda p: jax.tree.leaves(p), None),
        (lambda p: tuple(p.values()), None),
        (lambda p: jax.tree.map(np.asarray, p), None),
        (lambda p: jax.tree.map(lambda a: [a], p), None),
        (lambda p: {"net": p, "unused": None}, None),
    ],
    ids=["list", "tuple", "numpy arrays", "nested", "with None"],
)
def test_any_pytree_of_arrays(pack, unpack):
    tree = jax.tree.structure(PARAMS)

    def fn(params, x):
        return networks.mlp(jax.tree.unflatten(tree, jax.tree.leaves(params)), x)

    params = pack(PARAMS)
    kappa = path_kappa(fn, params, X, p=1.5)
    assert jax.tree.structure(kappa) == jax.tree.structure(params)
    chex.assert_trees_all_close(jax.tree.leaves(kappa), jax.tree.leaves(KAPPA), rtol=1e-5)


def test_a_single_array_may_be_the_params():
    """One flat vector, cut up inside the function, as `ravel_pytree` gives it."""
    flat, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    kappa = path_kappa(lambda w, x: networks.mlp(unravel(w), x), flat, X, p=1.5)
    np.testing.assert_allclose(kappa, jax.flatten_util.ravel_pytree(KAPPA)[0], rtol=1e-5)


@pytest.mark.parametrize("cell", ["SimpleCell", "scan by hand"])
def test_relu_recurrent_networks(cell):
    """hₜ = relu(xₜ U + hₜ₋₁ W + b): γ² of the last state by the recursion on squares."""
    import flax.linen as nn

    x = jax.ShapeDtypeStruct((2, 5, 4), np.float32)
    model = nn.RNN(nn.SimpleCell(3, activation_fn=nn.relu), return_carry=True)
    params = model.init(jax.random.key(0), jnp.ones(x.shape))["params"]
    u, w = params["cell"]["i"]["kernel"], params["cell"]["h"]["kernel"]
    b = params["cell"]["i"]["bias"] = jnp.array([1.0, -2.0, 3.0])

    def by_hand(params, x):
        i, h = params["cell"]["i"], params["cell"]["h"]

        def step(s, x_t):
            return jax.nn.relu(x_t @ i["kernel"] + i["bias"] + s @ h["kernel"]), None

        return lax.scan(step, jnp.zeros((x.shape[0], 3)), jnp.moveaxis(x, 1, 0))[0]

    def by_flax(params, x):
        return model.apply({"params": params}, x)[0]

    fn = by_flax if cell == "SimpleCell" else by_hand
    expected = np.zeros(3)
    for _ in range(5):
        expected = np.square(u).sum(0) + np.square(b) + expected @ np.square(w)
    np.testing.assert_allclose(unit_path_norms(fn, params, x) ** 2, expected, rtol=1e-5)
    # By |w|² κ counted over a cut at each step, U's paths are those that start at an input.
    kappa = path_kappa(fn, params, x)
    starts = (np.square(u) * kappa["cell"]["i"]["kernel"]).sum()
    starts += (np.square(b) * kappa["cell"]["i"]["bias"]).sum()
    np.testing.assert_allclose(starts, expected.sum(), rtol=1e-5)
