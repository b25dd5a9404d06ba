"""Batch normalisation as a reparametrisation, against flax and against w/√(wᵀRw) written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxinv
from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    batch_norm_as_reparam,
    data_dependent_normalize,
)
from jaxinv.networks import init_mlp, mlp
from jaxinv.reparam import UnitStatistics, moving_average


class Dense(nn.Module):
    """Three dense layers, with or without batch normalisation after the hidden ones."""

    normalized: bool
    train: bool = True
    fast: bool = False

    @nn.compact
    def __call__(self, x):
        for width in (16, 8):
            x = nn.Dense(width, use_bias=not self.normalized)(x)
            if self.normalized:
                x = batch_norm(self)(x)
            x = nn.relu(x)
        return nn.Dense(3)(x)


class Convolutional(nn.Module):
    """Convolutions with stride and pooling, a residual block, a dense head."""

    normalized: bool
    train: bool = True
    fast: bool = False

    @nn.compact
    def __call__(self, x):
        def conv(features, strides=1):
            def apply(x):
                x = nn.Conv(features, (3, 3), strides, use_bias=not self.normalized)(x)
                return batch_norm(self)(x) if self.normalized else x

            return apply

        x = nn.relu(conv(4)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(x + conv(4)(nn.relu(conv(4)(x))))
        x = nn.relu(conv(6, 2)(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def batch_norm(module):
    return nn.BatchNorm(
        use_running_average=not module.train, use_scale=False, momentum=0.9,
        epsilon=1e-3, use_fast_variance=module.fast,
    )  # fmt: skip


def with_shifts(params):
    """The parameters of the plain network from those of the one with BatchNorm modules."""
    plain = {}
    for name, layer in params.items():
        if not name.startswith("BatchNorm"):
            plain[name] = dict(layer)
    norms = sorted(n for n in params if n.startswith("BatchNorm"))
    hidden = [n for n in plain if "bias" not in plain[n]]
    for norm, layer in zip(norms, hidden, strict=True):
        assert norm.split("_")[1] == layer.split("_")[1]
        plain[layer]["bias"] = params[norm]["bias"]
    return plain


CASES = {"dense": (Dense, (32, 5)), "conv": (Convolutional, (8, 8, 8, 2))}


def build(name, fast=False):
    module, shape = CASES[name]
    x = jax.random.normal(jax.random.key(0), shape)
    normalized = module(normalized=True, fast=fast)
    variables = jax.jit(normalized.init)(jax.random.key(1), x)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda a: a + np.asarray(0.3 * rng.normal(size=a.shape), np.float32), variables["params"]
    )
    plain = module(normalized=False)

    def fn(params, x):
        return plain.apply({"params": params}, x)

    return normalized, params, variables["batch_stats"], batch_norm_as_reparam(fn, eps=1e-3), x


@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("conv", False),
        ("dense", True),
        pytest.param("conv", True, marks=pytest.mark.slow),
        pytest.param("dense", False, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_flax(name, fast, standard_dtype_promotion):
    module, params, state, ours, x = build(name, fast)
    y = jax.random.normal(jax.random.key(5), (x.shape[0], 3))

    @jax.jit
    def theirs(params):
        return module.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])[0]

    def loss(out):
        return ((out - y) ** 2).mean()

    values = jax.jit(ours.fn)(with_shifts(params), x)
    assert float(jnp.abs(values - theirs(params)).max()) <= 1e-5
    expected = jax.jit(jax.grad(lambda p: loss(theirs(p))))(params)
    found = jax.jit(jax.grad(lambda p: loss(ours.fn(with_shifts(p), x))))(params)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-5)
    assert max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected)) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_running_statistics_are_those_of_flax(name, standard_dtype_promotion):
    module, params, state, ours, x = build(name)
    plain = with_shifts(params)
    norms = sorted(state)
    running = tuple(UnitStatistics(state[n]["mean"], state[n]["var"]) for n in norms)
    step = jax.jit(ours.statistics)
    apply = jax.jit(lambda v, x: module.apply(v, x, mutable=["batch_stats"]))
    for i in range(3):
        batch = x + i
        _, changed = apply({"params": params, "batch_stats": state}, batch)
        state = changed["batch_stats"]
        running = moving_average(running, step(plain, batch), momentum=0.9)
    for n, found in zip(norms, running, strict=True):
        np.testing.assert_allclose(found.mean, state[n]["mean"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.variance, state[n]["var"], rtol=1e-4, atol=1e-5)
    evaluation = module.clone(train=False)
    expected = jax.jit(evaluation.apply)({"params": params, "batch_stats": state}, x)
    evaluate = jax.jit(ours.evaluate)
    found = evaluate(plain, running, x)
    assert float(jnp.abs(found - expected).max()) <= 1e-5
    # With given statistics every example is apart.
    one = evaluate(plain, running, x[:1])
    np.testing.assert_allclose(one, found[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_weights_divided_by_the_root_of_w_r_w(alpha, centered, x64):
    rng = np.random.default_rng(0)
    w = [rng.normal(size=s) for s in ((3, 4), (4, 5), (5, 2))]
    b = [rng.normal(size=n) for n in (4, 5, 2)]
    x = rng.normal(size=(9, 3))

    def net(params, x):
        w, b = params
        for i in range(2):
            x = jax.nn.relu(x @ w[i] + b[i])
        return x @ w[2] + b[2]

    # Biases come after the normalisation and add b² to γ²_u.
    h, gamma = x, np.ones(3)
    for i in range(2):
        mean = h.mean(axis=0) if centered else np.zeros(h.shape[1])
        c = (h - mean).T @ (h - mean) / len(h)
        r = alpha * c + (1 - alpha) * np.diag(gamma)
        tilde = w[i] / np.sqrt(np.einsum("uv,uw,wv->v", w[i], r, w[i]))
        h = np.maximum((h - mean) @ tilde + b[i], 0)
        gamma = 1 + b[i] ** 2
    expected = h @ w[2] + b[2]
    ours = data_dependent_normalize(net, alpha=alpha, centered=centered, eps=0.0)
    np.testing.assert_allclose(jax.jit(ours.fn)((w, b), x), expected, rtol=1e-10)


def test_every_unit_of_alpha_zero_has_norm_one(x64):
    """Without data and biases, normalisation by the paths is weight normalisation."""
    params = init_mlp(jax.random.key(0), (4, 6, 5, 2), bias=False, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (7, 4), jnp.float64)
    group = jaxinv.rescaling_group(mlp, params, x)
    expected = jax.jit(jaxinv.weight_normalize(mlp, group).fn)(params, x)
    found = jax.jit(data_dependent_normalize(mlp, alpha=0, eps=0.0).fn)(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_batch_norm_is_not_invariant_to_parametrisation(x64):
    """The function does not see the length of the weights; gradient descent does."""
    params = init_mlp(jax.random.key(0), (4, 16, 3), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (32, 4), jnp.float64)
    y = jnp.arange(32) % 3
    bn = batch_norm_as_reparam(mlp, eps=0.0)

    def scaled(theta):
        kernel = theta["Dense_0"]["kernel"] * 3.0
        return {**theta, "Dense_0": {**theta["Dense_0"], "kernel": kernel}}

    fn = jax.jit(bn.fn)
    np.testing.assert_allclose(fn(scaled(params), x), fn(params, x), rtol=1e-9)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(bn.fn(params, x), y).mean()

    @jax.jit
    def train(params):
        def step(params, _):
            gradient = jax.grad(loss)(params)
            return jax.tree.map(lambda w, g: w - 0.5 * g, params, gradient), loss(params)

        return jax.lax.scan(step, params, None, length=60)

    here, losses = train(params)
    there, others = train(scaled(params))
    difference = abs(np.asarray(fn(here, x)) - np.asarray(fn(there, x))).max()
    assert difference > 0.1  # the same function at the start, another one at the end
    assert losses[-1] < 0.7 * losses[0]  # and yet it learns
    assert others[-1] < 0.7 * others[0]


def test_the_error_of_gradient_descent_is_of_order_one(x64):
    params = init_mlp(jax.random.key(0), (4, 16, 3), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (32, 4), jnp.float64)
    bn = batch_norm_as_reparam(mlp, eps=0.0)

    def by_three(theta):
        kernel = theta["Dense_0"]["kernel"] * 3.0
        return {**theta, "Dense_0": {**theta["Dense_0"], "kernel": kernel}}

    error = jaxinv.equivariance_error(
        optax.sgd(0.1), lambda w: (bn.fn(w, x) ** 2).mean(), params, by_three, 1
    )
    assert error.first_step > 0.1


def test_refusals_and_bad_arguments():
    w, x = jnp.eye(2), jnp.ones((3, 2))

    def net(w, x):
        return jax.nn.relu(x @ w) @ w

    with pytest.raises(InvalidInput, match="eps"):
        batch_norm_as_reparam(net, eps=-1.0)
    with pytest.raises(InvalidInput, match="alpha"):
        data_dependent_normalize(net, alpha=2.0)
    with pytest.raises(UnsupportedOperation, match="tanh"):
        batch_norm_as_reparam(lambda w, x: jnp.tanh(x @ w) @ w).fn(w, x)
    with pytest.raises(InvalidInput, match="statistics are given"):
        batch_norm_as_reparam(net).evaluate(w, (), x)
    wrong = (UnitStatistics(jnp.zeros(5), jnp.ones(5)),)
    with pytest.raises(InvalidInput, match="units of shape"):
        batch_norm_as_reparam(net).evaluate(w, wrong, x)
    with pytest.raises(InvalidInput, match="non-finite"):
        batch_norm_as_reparam(net).fn(w, x * jnp.inf)


def test_a_constant_unit_is_zero_and_not_nan():
    bn = batch_norm_as_reparam(lambda w, x: jax.nn.relu(x @ w) @ w, eps=0.0)
    w, x = jnp.eye(2), jnp.stack([jnp.ones(4), jnp.arange(4.0)], axis=1)
    gradient, y = jax.jit(lambda w: (jax.grad(lambda w: bn.fn(w, x).sum())(w), bn.fn(w, x)))(w)
    assert np.isfinite(y).all() and np.isfinite(gradient).all()
    assert (y[:, 0] == 0).all()


def test_last_layers_are_left_alone_whatever_shape_they_take():
    w, x = jnp.eye(4) * 2, jnp.ones((3, 4))

    def net(w, x):
        return (x @ w).reshape(-1, 2, 2) + 1

    np.testing.assert_array_equal(batch_norm_as_reparam(net).fn(w, x), net(w, x))
    assert batch_norm_as_reparam(net).statistics(w, x) == ()
