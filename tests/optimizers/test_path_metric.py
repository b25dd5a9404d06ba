"""The metric of the path lift against (∂Φ/∂w)ᵀ(∂Φ/∂w), with Φ listed path by path."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import jaxinv
from jaxinv import (
    InvalidInput,
    path_kappa,
    path_metric_product,
    path_metric_sgd,
    path_metric_solve,
    rescaling_group,
    scale_by_path_metric,
)
from jaxinv.networks import init_mlp, mlp
from jaxinv.rescaling import random_rescaling, rescale
from tests.ground_truth.enumerate_paths import list_paths
from tests.ground_truth.layers import Conv, Dense, Gate, Network, Pool, Recurrent, Repeated
from tests.ground_truth.strategies import SHAPES
from tests.ground_truth.strategies import networks as random_networks

# Listing a dense matrix G of more parameters than this says nothing more.
MAX_WEIGHTS = 60


def lift_derivative(network):
    """∂Φ/∂w by definition: a row for every path, a column for every weight of the graph."""
    weights = np.asarray(network.dag.weights)
    rows = []
    for _, path in list_paths(network.dag, network.inputs, network.outputs):
        row = np.zeros(len(weights))
        for i, e in enumerate(path):
            row[e] += np.prod(weights[[*path[:i], *path[i + 1 :]]])
        rows.append(row)
    return np.array(rows).reshape(-1, len(weights))


def leaf_ids(network):
    """The numbers of the weights that are parameters, in the order of the flat pytree."""
    return np.concatenate([np.ravel(ids) for ids in jax.tree.leaves(network.ids)]).astype(int)


def unflatten(flat, params):
    leaves, tree = jax.tree.flatten(params)
    parts = np.split(flat, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    shaped = [p.reshape(np.shape(leaf)) for p, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def metric(fn, params, x):
    """G as a matrix, one product for each column."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))

    def column(v):
        return path_metric_product(fn, params, x, unflatten_jax(v, params))

    def unflatten_jax(v, params):
        return jax.flatten_util.ravel_pytree(params)[1](v)

    columns = jax.jit(jax.vmap(column))(np.eye(size))
    return np.concatenate(
        [np.asarray(c).reshape(size, -1) for c in jax.tree.leaves(columns)], axis=1
    ).T


def check_metric(network):
    with jax.enable_x64(True):
        params, x = network.params(np.float64), network.x(1, np.float64)
        lift = lift_derivative(network)[:, leaf_ids(network)]
        expected = lift.T @ lift
        v = np.random.default_rng(0).normal(size=expected.shape[0])
        # Shapes are new each time: one program, not one for every operation on each of them.
        product = jax.jit(functools.partial(path_metric_product, network.fn))
        found = flatten(product(params, x, unflatten(v, params)))
        np.testing.assert_allclose(
            found, expected @ v, rtol=1e-10, atol=1e-12 * np.abs(expected).max(initial=1e-300)
        )
    return expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("examples", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_products_on_random_networks_agree_with_their_listed_paths(shape, examples):
    """Three shapes of input: dense, convolutional, residual, pooled, tied, recurrent layers."""

    @settings(max_examples=examples)
    @given(random_networks(shape))
    def agree(network):
        check_metric(network)

    agree()


@pytest.mark.parametrize(
    "layers",
    [
        (Conv(2), Gate("relu"), Pool("max"), Dense(2)),
        (Conv(2, stride=2, padding="SAME", bias=True), Gate("relu"), Pool("avg"), Dense(1)),
        (Recurrent(2), Dense(1)),
        (Repeated(2), Dense(1)),
    ],
    ids=repr,
)
def test_shared_weights(layers):
    """A recurrent weight that occurs n times on a path counts n² in the metric."""
    expected = check_metric(Network((3, 2), layers, seed=1))
    assert np.abs(expected).max() > 0


def generic(network):
    """The same network with weights that are not 0, so that its rank is the generic one."""
    rng = np.random.default_rng(3)
    network.dag.weights = [w if w else float(rng.uniform(0.3, 1.6)) for w in network.dag.weights]
    return network


NULL_CASES = [
    Network((3,), (Dense(4), Gate("relu"), Dense(3), Gate("relu"), Dense(2)), seed=0),
    Network((3,), (Dense(4, bias=False), Gate("relu"), Dense(2, bias=False)), seed=1),
    Network((4, 2), (Conv(2, bias=True), Gate("relu"), Conv(1), Gate("relu")), seed=2),
    Network((4, 2), (Conv(2), Gate("relu"), Pool("max"), Dense(2)), seed=3),
    Network((3,), (Dense(2), Gate("leaky", 0.1), Dense(1), Gate("abs"), Dense(2)), seed=4),
]
# Without biases, and with a convolution alone, nothing is left that the others do not have.
FEWER = [pytest.param(n, marks=pytest.mark.slow) if i in (1, 2) else n
         for i, n in enumerate(NULL_CASES)]  # fmt: skip


@pytest.mark.parametrize("network", FEWER, ids=repr)
def test_null_space_is_that_of_the_rescalings(network, x64):
    network = generic(network)
    params, x = network.params(np.float64), network.x(1, np.float64)
    g = metric(network.fn, params, x)
    values = np.linalg.eigvalsh(g)
    rank = int((values > 1e-9 * values[-1]).sum())
    assert values[-rank] > 1e-5 * values[-1], "no clear gap"
    group = rescaling_group(network.fn, params, x)
    kappa = jax.jit(lambda w: path_kappa(network.fn, w, x))(params)
    on_no_path = int((flatten(kappa) == 0).sum())
    assert len(g) - rank == group.dim + on_no_path
    move = jax.jit(lambda u: rescale(group, params, u))
    for vector in np.eye(group.dim):
        up, down = (move(s * 1e-5 * vector) for s in (1, -1))
        tangent = (flatten(up) - flatten(down)) / 2e-5
        assert np.abs(g @ tangent).max() < 1e-8 * values[-1] * np.linalg.norm(tangent)


def test_null_space_of_a_network_with_a_dead_branch(x64):
    """Weights on no path of non-zero length are null directions too, beside the rescalings."""
    params = {"in": np.array([[1.0, 2.0], [3.0, -1.0]]), "out": np.array([[2.0], [0.0]])}
    params["unused"] = np.array([5.0])

    def fn(w, x):
        return jax.nn.relu(x @ w["in"]) @ w["out"]

    g = metric(fn, params, np.ones((1, 2)))
    # Φ: 4 paths; ∂Φ has rank 3 at out = (2, 0): in[:, 0] and out[0] by their product, out[1].
    assert np.linalg.matrix_rank(g) == 3
    x, ones = np.ones((1, 2)), jax.tree.map(np.ones_like, params)
    zero = jax.jit(lambda w: path_metric_solve(fn, w, x, ones).v)(params)
    assert zero["unused"] == 0


NET = Network((3,), (Dense(4), Gate("relu"), Dense(3), Gate("relu"), Dense(2)), seed=7)


def solvable_gradient(network, lift):
    return lift.T @ np.random.default_rng(5).normal(size=len(lift))


def test_solution_of_least_kappa_norm(x64):
    network = generic(NET)
    params, x = network.params(np.float64), network.x(1, np.float64)
    lift = lift_derivative(network)[:, leaf_ids(network)]
    gradient = solvable_gradient(network, lift)
    root = np.sqrt(flatten(jax.jit(lambda w: path_kappa(network.fn, w, x))(params)))
    k = lift.T @ lift / np.outer(root, root)
    expected = np.linalg.pinv(k, rcond=1e-10) @ (gradient / root) / root
    right = unflatten(gradient, params)

    @functools.partial(jax.jit, static_argnums=0)
    def solve(damping):
        return path_metric_solve(
            network.fn, params, x, right, max_iterations=200, rtol=1e-13, damping=damping
        )

    solved = solve(0.0)
    np.testing.assert_allclose(flatten(solved.v), expected, rtol=1e-7, atol=1e-9)
    assert solved.residual < 1e-10
    damped = solve(0.3)
    expected = np.linalg.solve(k + 0.3 * np.eye(len(k)), gradient / root) / root
    np.testing.assert_allclose(flatten(damped.v), expected, rtol=1e-9)


def test_a_gradient_that_has_no_solution_is_told_by_the_residual(x64):
    network = generic(NET)
    params, x = network.params(np.float64), network.x(1, np.float64)
    solve = jax.jit(lambda w: path_metric_solve(network.fn, w, x, w, max_iterations=100))
    solved = solve(params)  # weight decay
    assert solved.residual > 0.1
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(solved.v))


def test_large_damping_is_the_diagonal(x64):
    network = generic(NET)
    params, x = network.params(np.float64), network.x(1, np.float64)
    gradient = jax.tree.map(lambda w: np.asarray(w) + 1.0, params)
    solved = jax.jit(lambda w, g: path_metric_solve(network.fn, w, x, g, damping=1e7))(
        params, gradient
    )
    kappa = jax.jit(lambda w: path_kappa(network.fn, w, x))(params)
    scaled, wanted = 1e7 * flatten(solved.v), flatten(gradient) / flatten(kappa)
    np.testing.assert_allclose(scaled, wanted, rtol=1e-5)


# --- training ---

X = jax.random.normal(jax.random.key(1), (12, 4))
Y = jnp.arange(12) % 3


def loss(params):
    logits = mlp(params, X.astype(params["Dense_0"]["kernel"].dtype)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def wide(params, x):
    return mlp(params, x.astype(jnp.float64))


def exact_loss(params):
    logits = wide(params, X)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def trajectory(tx, params, of=loss, steps=6):
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(of)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)


@pytest.mark.parametrize("momentum", [pytest.param(None, marks=pytest.mark.slow), 0.5])
def test_training_does_not_see_rescalings(momentum, x64):
    params = init_mlp(jax.random.key(0), (4, 5, 6, 3), bias_std=0.1, dtype=jnp.float64)
    group = rescaling_group(wide, params, X)
    moved = rescale(group, params, random_rescaling(group, jax.random.key(3)))
    tx = path_metric_sgd(0.05, wide, X, momentum=momentum, damping=0.1)
    (_, _), here = trajectory(tx, params, exact_loss)
    (_, _), there = trajectory(tx, moved, exact_loss)
    np.testing.assert_allclose(here, there, rtol=1e-9)
    assert here[-1] < here[0]
    sgd = optax.sgd(0.05)
    difference = trajectory(sgd, params, exact_loss)[1] - trajectory(sgd, moved, exact_loss)[1]
    assert jnp.abs(difference).max() > 1e-3


def test_range_of_float32():
    """Units scaled by 2^±12: κ spans 28 decades, and solutions transform all the same."""
    params = init_mlp(jax.random.key(0), (4, 5, 6, 3))
    group = rescaling_group(mlp, params, X)
    u = np.where(np.arange(group.dim) % 2 == 0, 12.0, -12.0).astype("f") * np.float32(np.log(2.0))
    move = jax.jit(lambda w, u: rescale(group, w, u))
    moved = move(params, u)
    gradient = jax.jit(jax.grad(loss))(params)
    moved_gradient = jaxinv.rescale_gradient(group, gradient, u)
    options = {"max_iterations": 5, "rtol": 0.0, "damping": 0.5}
    solve = jax.jit(lambda w, g: path_metric_solve(mlp, w, X, g, **options).v)
    here, there = solve(params, gradient), solve(moved, moved_gradient)
    back = move(there, -u)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(back), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * float(np.abs(a).max()))


def test_transformation_in_optax():
    params = init_mlp(jax.random.key(0), (4, 5, 3))
    gradient = jax.jit(jax.grad(loss))(params)
    make = functools.partial(path_metric_sgd, fn=mlp, x=X, damping=0.2)
    stacked = jax.tree.map(lambda a: np.stack([a, 2 * a]), params)
    many = jax.jit(jax.vmap(lambda p: make(0.1).update(gradient, make(0.1).init(p), p)[0]))
    plain = jax.tree.map(lambda a: a[0], many(stacked))

    injected = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(
        learning_rate=0.1
    )
    state = injected.init(params)
    updates, state = jax.jit(injected.update)(gradient, state, params)
    close(updates, plain)

    chained = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1e9), make(0.1)), 3)
    updates, _ = jax.jit(chained.update)(gradient, chained.init(params), params)
    close(updates, plain)

    core = scale_by_path_metric(mlp, X, damping=0.2)
    _, state = jax.jit(core.update)(gradient, core.init(params), params)
    assert state.count == 1 and 0 < state.residual < 1e-4


def close(found, expected, rtol=1e-4):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=1e-6)


def test_the_metric_of_some_parameters_holds_the_others_fixed(x64):
    params = init_mlp(jax.random.key(0), (4, 5, 3), bias_std=0.1, dtype=jnp.float64)
    gradient = jax.jit(jax.grad(exact_loss))(params)
    labels = {"Dense_0": "path", "Dense_1": "plain"}
    inner = {
        "path": scale_by_path_metric(wide, X, damping=0.1, rtol=1e-12, max_iterations=99),
        "plain": optax.identity(),
    }
    tx = jaxinv.pass_full_params(optax.partition(inner, labels))
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    head = params["Dense_1"]

    def body(w, x):
        return mlp({"Dense_0": w, "Dense_1": head}, x)

    solve = functools.partial(path_metric_solve, body, damping=0.1, rtol=1e-12, max_iterations=99)
    expected = jax.jit(solve)(params["Dense_0"], np.asarray(X, np.float64), gradient["Dense_0"])
    close(updates["Dense_0"], expected.v, 1e-8)
    with pytest.raises(InvalidInput, match="pass_full_params"):
        hidden = optax.partition(inner, labels)
        hidden.update(gradient, hidden.init(params), params)


def test_half_precision_parameters_keep_their_dtype():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), init_mlp(jax.random.key(0), (4, 5, 3)))
    tx = path_metric_sgd(0.1, mlp, X.astype(jnp.bfloat16), damping=0.2)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(updates))


def one_layer(w, x):
    return x @ w


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: path_metric_product(one_layer, w, x, jnp.ones(3)), r"v has shape \(3,\)"),
        (lambda w, x: path_metric_product(one_layer, w, x, [w]), "v must be a pytree like params"),
        (lambda w, x: path_metric_product(one_layer, w * jnp.nan, x, w), "non-finite"),
        (lambda w, x: path_metric_solve(one_layer, w.astype(int), x, w), "int32"),
        (lambda w, x: path_metric_solve(one_layer, w, x, w, damping=-1.0), "damping"),
        (lambda w, x: path_metric_solve(one_layer, w, x, w, max_iterations=0), "max_iterations"),
        (lambda w, x: path_metric_solve(one_layer, w, x[:0], w), "length 0"),
        (lambda w, x: scale_by_path_metric(one_layer, x).update(w, None), "parameters"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InvalidInput, match=message):
        call(jnp.ones((2, 2)), jnp.ones((3, 2)))


def test_the_listing_of_paths_is_large_enough_to_mean_something():
    sizes = [len(lift_derivative(n)) for n in NULL_CASES]
    assert min(sizes) >= 12
    assert max(leaf_ids(n).size for n in NULL_CASES) <= MAX_WEIGHTS
