"""Data-dependent path norms against their definition, written out in NumPy."""

from functools import partial

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
    data_dependent_path_kappa,
    data_dependent_path_norm,
    path_kappa,
    path_norm,
    rescaling_group,
)
from jaxinv.networks import init_mlp, mlp
from jaxinv.paths.data_dependent import scaled_data_kappa
from jaxinv.rescaling import random_rescaling, rescale

ALPHAS = (0.0, 0.5, 1.0)


# --- the definition, unit by unit ---


def unit(w, h, gamma, alpha, centered):
    """(γ²_v, z_v) of one unit with incoming weights w from units with outputs h (n, fan_in)."""
    moments = np.cov(h, rowvar=False, bias=True) if centered else h.T @ h / len(h)
    r = alpha * np.atleast_2d(moments) + (1 - alpha) * np.diag(gamma)
    return w @ r @ w, h @ w


def layer(kernel, bias, h, gamma, alpha, centered):
    """All units of a dense layer; the bias is a weight from a unit that is constantly 1."""
    h = np.concatenate([h, np.ones((len(h), 1))], axis=1)
    gamma = np.append(gamma, 1.0)
    weights = np.concatenate([kernel, bias[None]])
    found = [unit(w, h, gamma, alpha, centered) for w in weights.T]
    return np.array([g for g, _ in found]), np.stack([z for _, z in found], axis=1)


def dense_gamma(params, x, alpha, centered):
    """γ²_net of a ReLU network with dense layers."""
    h, gamma = x, np.ones(x.shape[1])
    for i, (kernel, bias) in enumerate(params):
        gamma, z = layer(kernel, bias, h, gamma, alpha, centered)
        h = np.maximum(z, 0) if i < len(params) - 1 else z
    return gamma.sum()


def dense_net(params, x):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def dense_params(key, sizes):
    rng = np.random.default_rng(key)
    return [
        (rng.normal(size=(a, b)), rng.normal(size=b))
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    ]


def conv_net(params, x):
    """3-tap convolution, ReLU, max-pool by 2, convolution, residual, mean-pool, dense."""
    w1, b1, w2, w3 = params
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    h = jax.nn.relu(conv(x, w1) + b1)
    h = nn.max_pool(h, (2,), (2,))
    s = jax.nn.relu(conv(h, w2) + h)
    return s.mean(axis=1) @ w3


def conv_gamma(params, x, alpha, centered):
    w1, b1, w2, w3 = (np.asarray(p) for p in params)
    n, length, _ = x.shape

    def convolve(h, gamma, w, bias, skip=None):
        """One position at a time, as units with weights w, the bias and 1 for the skip."""
        out_g, out_z = np.zeros((h.shape[1], w.shape[2])), np.zeros((n, h.shape[1], w.shape[2]))
        for position in range(h.shape[1]):
            for channel in range(w.shape[2]):
                ws, hs, gs = [], [], []
                for tap in range(3):
                    at = position + tap - 1
                    if 0 <= at < h.shape[1]:
                        ws.append(w[tap, :, channel])
                        hs.append(h[:, at])
                        gs.append(gamma[at])
                if bias is not None:
                    ws.append([bias[channel]])
                    hs.append(np.ones((n, 1)))
                    gs.append([1.0])
                if skip is not None:
                    ws.append([1.0])
                    hs.append(skip[0][:, position, channel, None])
                    gs.append([skip[1][position, channel]])
                ws, hs, gs = np.concatenate(ws), np.concatenate(hs, axis=1), np.concatenate(gs)
                g, z = unit(ws, hs, gs, alpha, centered)
                out_g[position, channel], out_z[:, position, channel] = g, z
        return out_g, out_z

    g, z = convolve(x, np.ones(x.shape[1:]), w1, b1)
    h = np.maximum(z, 0).reshape(n, length // 2, 2, -1).max(axis=2)
    g = g.reshape(length // 2, 2, -1).sum(axis=1)  # any element of the window may be active
    g, z = convolve(h, g, w2, None, skip=(h, g))
    h, k = np.maximum(z, 0), length // 2
    # The mean is a unit with weights 1/k.
    found = [
        unit(np.full(k, 1 / k), h[:, :, c], g[:, c], alpha, centered) for c in range(g.shape[1])
    ]
    g, h = np.array([a for a, _ in found]), np.stack([b for _, b in found], axis=1)
    return sum(unit(w, h, g, alpha, centered)[0] for w in w3.T)


def conv_params(seed):
    rng = np.random.default_rng(seed)
    shapes = [(3, 2, 3), (3,), (3, 3, 3), (3, 2)]
    return [rng.normal(size=s) for s in shapes]


def second_differences(gamma, leaves, h=1e-3):
    """½ ∂²γ²/∂w_e² for every weight; γ² is quadratic in each weight between the kinks."""
    found = []
    for i, leaf in enumerate(leaves):
        out = np.zeros(leaf.shape)
        for at in np.ndindex(leaf.shape):
            values = []
            for step in (-h, 0, h):
                moved = [a.copy() for a in leaves]
                moved[i][at] += step
                values.append(gamma(moved))
            out[at] = (values[0] - 2 * values[1] + values[2]) / (2 * h * h)
        found.append(out)
    return found


def close(found, expected, tol=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * np.abs(b).max())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_norm_of_dense_networks(alpha, centered, x64):
    for seed, sizes in enumerate([(3, 4, 2), (2, 3, 3, 2), (4, 1, 5, 3, 1)]):
        params = dense_params(seed, sizes)
        x = np.random.default_rng(9).normal(size=(7, sizes[0]))
        found = data_dependent_path_norm(dense_net, params, x, alpha=alpha, centered=centered)
        close(found**2, dense_gamma(params, x, alpha, centered), 1e-12)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_kappa_of_dense_networks(alpha, centered, x64):
    params = dense_params(3, (2, 3, 3, 2))
    leaves, tree = jax.tree.flatten(params)
    x = np.random.default_rng(7).normal(size=(6, 2))
    kappa = jax.jit(
        partial(data_dependent_path_kappa, dense_net, x=x, alpha=alpha, centered=centered)
    )(params)
    expected = second_differences(
        lambda w: dense_gamma(jax.tree.unflatten(tree, w), x, alpha, centered), leaves
    )
    close(kappa, expected)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("alpha", (0.0, 0.25, 1.0))
def test_convolution_pooling_and_skip_connections(alpha, centered, x64):
    params, x = conv_params(1), np.random.default_rng(2).normal(size=(5, 4, 2))
    of = (data_dependent_path_norm, data_dependent_path_kappa)
    found, kappa = jax.jit(
        lambda w: [function(conv_net, w, x, alpha=alpha, centered=centered) for function in of]
    )(params)
    close(found**2, conv_gamma(params, x, alpha, centered), 1e-12)
    close(
        kappa, second_differences(lambda w: conv_gamma(w, x, alpha, centered), params, 1e-4), 1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_alpha_zero_is_the_path_norm_to_the_bit(dtype, x64):
    params = jax.tree.map(lambda a: np.asarray(a, dtype), conv_params(4))
    x = np.ones((3, 4, 2), dtype)
    ours = partial(data_dependent_path_norm, alpha=0), partial(data_dependent_path_kappa, alpha=0)
    found, want = (
        jax.jit(lambda w, of=of: [function(conv_net, w, x) for function in of])(params)
        for of in (ours, (path_norm, path_kappa))
    )
    chex.assert_trees_all_equal(found, want)


def test_small_alpha_tends_to_path_kappa_through_the_general_code(x64):
    """alpha = 0 takes the short way; the long way has the same limit."""
    params, x = conv_params(5), np.random.default_rng(2).normal(size=(5, 4, 2))
    found, want = jax.jit(
        lambda w: [
            data_dependent_path_kappa(conv_net, w, x, alpha=1e-12), path_kappa(conv_net, w, x)
        ]
    )(params)  # fmt: skip
    close(found, want)


def test_alpha_one_is_the_diagonal_of_the_gaussian_fisher_information(x64):
    params, x = conv_params(6), np.random.default_rng(3).normal(size=(6, 4, 2))
    of = (data_dependent_path_norm, data_dependent_path_kappa)
    norm, kappa = jax.jit(lambda w: [function(conv_net, w, x, alpha=1) for function in of])(params)
    outputs, j = jax.jit(lambda w: (conv_net(w, x), jax.jacrev(conv_net)(w, x)))(params)
    diagonal = [(np.asarray(a) ** 2).sum(axis=1).mean(axis=0) for a in j]
    close(kappa, diagonal, 1e-12)
    # The norm is the root mean square of the outputs.
    close(np.asarray(norm) ** 2, (np.asarray(outputs) ** 2).sum(axis=1).mean(), 1e-12)


@pytest.mark.parametrize("centered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_random_signs_are_unbiased(centered, x64):
    params = dense_params(3, (2, 3, 3, 2))
    x = np.random.default_rng(8).normal(size=(6, 2))
    options = {"alpha": 0.5, "centered": centered}
    exact = jax.jit(partial(data_dependent_path_kappa, dense_net, x=x, **options))(params)
    many = 400

    @jax.jit
    def estimate(key):
        return data_dependent_path_kappa(dense_net, params, x, **options, probes=2, key=key)

    draws = jax.vmap(estimate)(jax.random.split(jax.random.key(0), many))
    spread = 0.0
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (exact, draws))
    for e, d in zip(*leaves, strict=True):
        error = d.std(axis=0) / many**0.5
        assert (np.abs(d.mean(axis=0) - e) <= 4.5 * error + 1e-12).all()
        spread = max(spread, float((error / e).max()))
    assert spread > 0  # the estimate is one


@pytest.mark.parametrize(
    ("alpha", "probes"),
    [
        (0.5, 3),
        (1.0, None),
        pytest.param(0.5, None, marks=pytest.mark.slow),
        pytest.param(1.0, 3, marks=pytest.mark.slow),
    ],
)
def test_kappa_transforms_with_rescalings(alpha, probes, x64):
    params = init_mlp(jax.random.key(1), (4, 5, 6, 3), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(2), (8, 4), jnp.float64)
    group = rescaling_group(mlp, params, x)
    u = random_rescaling(group, jax.random.key(3))
    moved = rescale(group, params, u)
    arguments = {"alpha": alpha, "probes": probes, "key": jax.random.key(4)}

    @jax.jit
    def found(w):
        norm = data_dependent_path_norm(mlp, w, x, alpha=alpha)
        return norm, data_dependent_path_kappa(mlp, w, x, **arguments)

    (norm, before), (other_norm, after) = found(params), found(moved)
    close(
        jax.tree.map(lambda k, w: k * w**2, after, moved),
        jax.tree.map(lambda k, w: k * w**2, before, params),
        1e-9,
    )
    close(norm, other_norm, 1e-10)


@pytest.mark.parametrize("name", ["leaky", "where", "reshaped", "prelu", "abs", "maxout", "mask"])
def test_gates_see_finished_units(name, x64):
    """The slope of a gate multiplies the mixed γ² of its unit, whatever way the gate is written."""
    w = [jnp.asarray(a) for a in (np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([[2.0], [1.0]]))]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    gates = {
        "leaky": (jax.nn.leaky_relu, 1.0),
        "where": (lambda h: jnp.where(h > 0, 3.0 * h, 0.5 * h), 9.0),
        "reshaped": (
            lambda h: jnp.where(h.reshape(-1) > 0, h.reshape(-1), -2 * h.reshape(-1)).reshape(
                h.shape
            ),
            4.0,
        ),
        "prelu": (lambda h: jnp.maximum(h, 0.25 * h), 1.0),
        "abs": (jnp.abs, 1.0),
        "maxout": (lambda h: h.max(axis=-1, keepdims=True) * jnp.ones((1, 2)), None),
        "mask": (lambda h: h * (h > 0).astype(h.dtype), 1.0),
    }
    gate, slope = gates[name]

    def net(w, x):
        return gate(x @ w[0]) @ w[1]

    alpha = 0.5
    hidden = [unit(np.asarray(v), np.asarray(x), np.ones(2), alpha, False)[0] for v in w[0].T]
    outputs = net(w, x)
    if name == "maxout":
        # The pooled value, spread over two elements: each carries the sum over the window, and a
        # product with a constant is a unit again.
        spread = np.asarray(gate(x @ w[0]))
        gammas = alpha * (spread**2).mean(axis=0) + (1 - alpha) * sum(hidden)
    else:
        gammas = slope * np.array(hidden)
    if name in ("reshaped",):
        assert outputs.shape == (6, 1)
    expected = alpha * (outputs**2).mean() + (1 - alpha) * (np.asarray(w[1][:, 0]) ** 2 @ gammas)
    found = data_dependent_path_norm(net, w, x, alpha=alpha)
    close(found**2, expected, 1e-10)


def test_sums_written_in_any_order_are_one_unit(x64):
    w = dense_params(1, (3, 4, 4))
    x = np.random.default_rng(1).normal(size=(5, 3))

    def one(w, x):
        h = jax.nn.relu(x @ w[0][0])
        return jax.nn.relu((h @ w[1][0] + h) + w[1][1])

    def other(w, x):
        h = jax.nn.relu(x @ w[0][0])
        return jax.nn.relu(h + (w[1][1] + h @ w[1][0]).reshape(x.shape[0], 2, 2).reshape(-1, 4))

    for alpha in (0.3, 1.0):
        kappas = jax.jit(
            lambda w, a=alpha: [data_dependent_path_kappa(f, w, x, alpha=a) for f in (one, other)]
        )(w)
        close(*kappas, 1e-12)


def test_range_of_float32():
    """Activations whose squares overflow float32, and path sums that do."""

    def net(w, x):
        return jax.nn.relu(jax.nn.relu(x @ w[0]) @ w[1]) @ w[2]

    w, x = [jnp.full((4, 4), s, jnp.float32) for s in (1e15, 1e15, 1e-25)], jnp.ones((3, 4))
    hidden_1 = 0.5 * (4e15) ** 2 + 0.5 * 4 * 1e30
    hidden_2 = 0.5 * (4 * 1e15 * 4e15) ** 2 + 0.5 * 4 * 1e30 * hidden_1
    output = 0.5 * (4 * 4 * 4e30 * 1e-25) ** 2 + 0.5 * 4 * 1e-50 * hidden_2
    options = {"alpha": 0.5, "centered": False, "probes": None, "key": None}
    norm, narrow = jax.jit(
        lambda w: (
            data_dependent_path_norm(net, w, x, alpha=0.5), scaled_data_kappa(net, w, x, **options)
        )
    )(w)  # fmt: skip
    np.testing.assert_allclose(float(norm), (4 * output) ** 0.5, rtol=1e-5)
    with jax.enable_x64(True):
        doubled = [np.asarray(a, np.float64) for a in w]
        kappa = jax.jit(partial(data_dependent_path_kappa, net, x=np.ones((3, 4)), alpha=0.5))
        wide = kappa(doubled)
        wide = [np.asarray(k) for k in wide]
    assert max(k.max() for k in wide) > 1e60
    for s, k in zip(narrow, wide, strict=True):
        found = np.ldexp(np.asarray(s.mantissa, np.float64), np.asarray(s.exponent))
        np.testing.assert_allclose(found, k, rtol=1e-5)


half_kappa = jax.jit(partial(data_dependent_path_kappa, dense_net, alpha=0.5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype, standard_dtype_promotion):
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), dense_params(0, (3, 4, 2)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), dtype)
    found = half_kappa(params, x)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    expected = half_kappa(*wide)
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal(found, expected)


def test_jit_vmap_and_derivatives(x64):
    params = dense_params(2, (3, 4, 2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    norm = partial(data_dependent_path_norm, dense_net, x=x, alpha=0.5)
    alone = norm(params)
    close(jax.jit(norm)(params), alone, 1e-12)
    stacked = jax.tree.map(lambda a: np.stack([a, 2 * a]), params)
    close(jax.jit(jax.vmap(norm))(stacked)[0], alone, 1e-12)
    gradient = jax.jit(jax.grad(lambda p: norm(p) ** 2))(params)
    leaves, tree = jax.tree.flatten(params)
    h = 1e-6
    moved = [[a + s * h * (i == 0) for i, a in enumerate(leaves)] for s in (1, -1)]
    up, down = (dense_gamma(jax.tree.unflatten(tree, m), np.asarray(x), 0.5, False) for m in moved)
    close(jax.tree.leaves(gradient)[0].sum(), (up - down) / (2 * h), 1e-6)


def recurrent(w, x):
    def step(h, _):
        return jax.nn.relu(h @ w), None

    return jax.lax.scan(step, x, None, length=3)[0]


def test_refusals():
    w, x = jnp.eye(2), jnp.ones((3, 2))

    def traced(function, net, alpha=0.5):
        return jax.eval_shape(lambda w: function(net, w, x, alpha=alpha), w)

    with pytest.raises(UnsupportedOperation, match="alpha=0"):
        traced(data_dependent_path_norm, recurrent)
    traced(data_dependent_path_kappa, recurrent, alpha=0)
    with pytest.raises(UnsupportedOperation, match="tanh"):
        traced(data_dependent_path_norm, lambda w, x: jnp.tanh(x @ w))
    with pytest.raises(UnsupportedOperation, match="batch axis"):
        traced(data_dependent_path_norm, lambda w, x: x @ w - (x @ w).mean(0))
    with pytest.raises(UnsupportedOperation, match="nonlinear function"):
        traced(data_dependent_path_kappa, lambda w, x: x @ jnp.exp(w))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"x": jnp.full((2, 2), jnp.nan)}, "x has non-finite"),
        ({"x": jnp.zeros((0, 2))}, "length 0"),
        ({"x": jax.ShapeDtypeStruct((3, 2), jnp.float32)}, "shape without values"),
        ({"x": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}}, "different batch sizes"),
        ({"params": jnp.ones((2, 2), jnp.int32)}, "int32"),
        ({"probes": 0}, "probes"),
        ({"probes": 2}, "key"),
    ],
)
def test_bad_arguments(changed, message):
    arguments = {"params": jnp.eye(2), "x": jnp.ones((3, 2)), "alpha": 0.5, **changed}

    def net(w, x):
        return (x["a"] + x["b"] if isinstance(x, dict) else x) @ w

    with pytest.raises(InvalidInput, match=message):
        data_dependent_path_kappa(net, **arguments)


# --- as an optimizer ---


def loss_of(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), y).mean()


def trajectory(tx, params, x, y, steps=5):
    def step(carry, _):
        params, state = carry
        gradient = jax.grad(loss_of)(params, x, y)
        updates, state = tx.update(gradient, state, params, batch=x)
        params = optax.apply_updates(params, updates)
        return (params, state), loss_of(params, x, y)

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_data_dependent_path_sgd_does_not_see_rescalings(alpha, x64):
    params = init_mlp(jax.random.key(1), (4, 6, 3), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(2), (12, 4), jnp.float64)
    y = jnp.arange(12) % 3
    group = rescaling_group(mlp, params, x)
    moved = rescale(group, params, random_rescaling(group, jax.random.key(3)))
    tx = jaxinv.data_dependent_path_sgd(0.02, mlp, alpha=alpha, momentum=0.5)
    run = jax.jit(lambda w: trajectory(tx, w, x, y)[1])
    runs = [run(p) for p in (params, moved)]
    np.testing.assert_allclose(*runs, rtol=1e-7)
    assert runs[0][-1] < runs[0][0]
    plain = optax.with_extra_args_support(optax.sgd(0.1))
    run = jax.jit(lambda w: trajectory(plain, w, x, y)[1])
    sgd = [run(p) for p in (params, moved)]
    assert abs(sgd[0] - sgd[1]).max() > 1e-3


def test_alpha_zero_is_path_sgd():
    params = init_mlp(jax.random.key(1), (4, 6, 3))
    x, y = jax.random.normal(jax.random.key(2), (12, 4)), jnp.arange(12) % 3
    ours = jaxinv.scale_by_data_dependent_path_kappa(mlp, alpha=0)
    theirs = jaxinv.scale_by_path_kappa(mlp, x)
    gradient = jax.jit(jax.grad(loss_of))(params, x, y)
    a, _ = jax.jit(ours.update)(gradient, ours.init(params), params, batch=x)
    b, _ = jax.jit(theirs.update)(gradient, theirs.init(params), params)
    close(a, b, 1e-6)


def test_transformation_in_optax():
    params = init_mlp(jax.random.key(1), (4, 6, 3))
    x, y = jax.random.normal(jax.random.key(2), (12, 4)), jnp.arange(12) % 3
    gradient = jax.jit(jax.grad(loss_of))(params, x, y)
    tx = jaxinv.pass_full_params(
        optax.partition(
            {"a": jaxinv.data_dependent_path_sgd(0.1, mlp, alpha=0.5), "b": optax.sgd(0.1)},
            {"Dense_0": "a", "Dense_1": "b"},
        )
    )
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params, batch=x)
    whole = jaxinv.data_dependent_path_sgd(0.1, mlp, alpha=0.5)
    expected, _ = jax.jit(whole.update)(gradient, whole.init(params), params, batch=x)
    close(updates["Dense_0"], expected["Dense_0"], 1e-6)
    lazy = jaxinv.scale_by_data_dependent_path_kappa(mlp, alpha=0.5, every=2)
    state = lazy.init(params)
    step = jax.jit(lazy.update)
    for count in range(3):
        _, state = step(gradient, state, params, batch=x)
        assert state.count == count + 1
    with pytest.raises(InvalidInput, match="batch"):
        lazy.update(gradient, state, params)
    with pytest.raises(InvalidInput, match="params|parameters"):
        lazy.update(gradient, state, batch=x)


def test_signs_change_from_update_to_update():
    params = init_mlp(jax.random.key(1), (4, 6, 3))
    x = jax.random.normal(jax.random.key(2), (12, 4))
    tx = jaxinv.scale_by_data_dependent_path_kappa(mlp, alpha=0.5)
    ones = jax.tree.map(jnp.ones_like, params)
    state, seen = tx.init(params), []
    step = jax.jit(tx.update)
    for _ in range(2):
        update, state = step(ones, state, params, batch=x)
        seen.append(update["Dense_0"]["kernel"])
    assert not np.allclose(*seen)
    again, _ = step(ones, tx.init(params), params, batch=x)
    assert (again["Dense_0"]["kernel"] == seen[0]).all()


def test_the_key_draws_the_signs():
    params = init_mlp(jax.random.key(1), (4, 6, 3))
    x = jax.random.normal(jax.random.key(2), (12, 4))
    ones = jax.tree.map(jnp.ones_like, params)

    def first(key=None, make=jaxinv.scale_by_data_dependent_path_kappa):
        tx = make(fn=mlp, alpha=0.5, key=key)
        return tx.update(ones, tx.init(params), params, batch=x)[0]

    keys = jax.random.split(jax.random.key(7), 3)
    together = jax.jit(jax.vmap(first))(keys)
    kernels = together["Dense_0"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    alone = jax.jit(first)
    for i, key in enumerate(keys):
        close(jax.tree.map(lambda a, i=i: a[i], together), alone(key), 1e-5)
    default = jax.jit(first)()
    close(default, alone(jax.random.key(0)), 1e-5)
    close(default, alone(jax.random.PRNGKey(0)), 1e-6)  # of raw bits

    injected = optax.inject_hyperparams(
        jaxinv.scale_by_data_dependent_path_kappa,
        static_args=("fn", "alpha", "probes", "every"),
    )(mlp, alpha=0.5, key=keys[1])
    state = injected.init(params)
    step = jax.jit(lambda state: injected.update(ones, state, params, batch=x))
    close(step(state)[0], alone(keys[1]), 1e-5)
    state.hyperparams["key"] = keys[2]
    close(step(state)[0], alone(keys[2]), 1e-5)
    for wrong in (3, keys, jnp.zeros(2)):
        with pytest.raises(InvalidInput, match=r"key must be a key such as jax.random.key\(0\)"):
            first(wrong)
