"""Constrained, normalised and gauge-fixed training, on dense and residual convolutional networks.

Norms are computed here from the layers by hand, not from the group.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import InvalidInput
from jaxinv.invariance import by_rescaling, equivariance_error, function_invariance_error
from jaxinv.networks import cnn, init_cnn, init_mlp, mlp
from jaxinv.reparam import (
    in_gauge,
    incoming_norms,
    project_to_unit_norm,
    tangent_gradient,
    weight_normalize,
)
from jaxinv.rescaling import balance, normalize, random_rescaling, rescale, rescaling_group


def dense_norms(params):
    layers = [params[f"Dense_{i}"] for i in range(len(params) - 1)]
    return np.concatenate([unit_norms(layer) for layer in layers])


def unit_norms(*layers):
    """Norm over everything but the last axis, of all layers that write to the same channels."""
    squares = sum(
        (np.asarray(a, np.float64) ** 2).reshape(-1, a.shape[-1]).sum(axis=0)
        for layer in layers
        for a in layer.values()
    )
    return np.sqrt(squares)


def conv_norms(params):
    # Conv_0 and the bias of Conv_2 lead into the residual stream; the kernel of Conv_2 leads back
    # into it from a branch that it feeds.
    stream = unit_norms(params["Conv_0"], {"bias": params["Conv_2"]["bias"]})
    return np.concatenate([stream, unit_norms(params["Conv_1"])])


NETWORKS = {
    "dense": (
        mlp,
        functools.partial(init_mlp, sizes=(5, 7, 6, 3), bias_std=0.3, dtype=jnp.float64),
        (40, 5),
        dense_norms,
    ),
    "residual conv": (
        cnn,
        functools.partial(init_cnn, channels=3, num_classes=3, bias_std=0.3, dtype=jnp.float64),
        (20, 4, 4, 1),
        conv_norms,
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request):
    fn, init, shape, norms = NETWORKS[request.param]
    with jax.enable_x64(True):
        params = jax.jit(init)(jax.random.key(0))
        rng = np.random.default_rng(0)
        x, y = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(shape[0], 3)))
        group = rescaling_group(fn, params, x)

        def loss(w):
            return ((fn(w, x) - y) ** 2).mean()

        yield fn, params, x, loss, group, norms


# Of one network, the one with units that several leaves lead into; the other is slow.
convolutional = pytest.mark.parametrize(
    "problem",
    [pytest.param("dense", marks=pytest.mark.slow), "residual conv"],
    indirect=True,
    scope="module",
)


def test_incoming_norms_are_those_of_the_units(problem, x64):
    _, params, _, _, group, norms = problem
    found = jax.jit(lambda w: incoming_norms(group, w))(params)
    np.testing.assert_allclose(np.sort(found), np.sort(norms(params)), rtol=1e-14)


# --- normalised -----------------------------------------------------------------------


def test_the_normalised_network_is_the_original_at_the_mapped_parameters(problem, x64):
    fn, params, x, _, group, norms = problem
    net = weight_normalize(fn, group)
    v = jax.jit(net.from_params)(params)
    w = jax.jit(net.to_params)(params)
    y, y_from, y_direct, y_mapped = jax.jit(
        lambda: (fn(params, x), net.fn(v, x), net.fn(params, x), fn(w, x))
    )()
    np.testing.assert_allclose(y_from, y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(y_mapped, y_direct, rtol=1e-12, atol=1e-13)
    assert abs(y_direct - y).max() > 1e-2  # v/‖v‖ is another function than v
    assert abs(norms(params) - 1).max() > 0.1
    np.testing.assert_allclose(norms(w), 1, rtol=1e-14)
    np.testing.assert_allclose(norms(v), 1, rtol=1e-9)


def test_the_normalised_network_sees_directions_alone(problem, x64):
    """Scaling a unit's v changes nothing, so the gradient is orthogonal to every unit's v."""
    fn, params, x, loss, group, norms = problem
    net = weight_normalize(fn, group)
    first = next(iter(params))
    tied = [first, "Conv_2/bias"] if "Conv_0" in params else [first]
    moved = {
        name: {k: 3.0 * a if {name, f"{name}/{k}"} & set(tied) else a for k, a in layer.items()}
        for name, layer in params.items()
    }
    u = jnp.linspace(-2.0, 3.0, group.dim)
    gradient, scaled, error, of_group, of_plain = jax.jit(
        lambda: (
            jax.grad(lambda v: loss(net.to_params(v)))(params),
            jax.grad(lambda v: loss(net.to_params(v)))(moved),
            function_invariance_error(net.fn, params, moved, x),
            function_invariance_error(net.fn, params, rescale(net.group, params, u), x),
            function_invariance_error(net.fn, params, rescale(group, params, u), x),
        )
    )()
    assert error.relative < 1e-14
    assert net.group.dim == group.dim and of_group.relative < 1e-13
    assert of_plain.relative > 1e-2  # outgoing weights of one unit are incoming ones of the next
    inner = sum(
        (gradient[name][k] * w).reshape(-1, w.shape[-1]).sum(axis=0)
        for name, layer in params.items()
        for k, w in layer.items()
        if {name, f"{name}/{k}"} & set(tied)
    )
    size = max(float(abs(g).max()) for g in gradient[first].values())
    assert size > 1e-3 and abs(inner).max() < 1e-13
    np.testing.assert_allclose(3 * scaled[first]["kernel"], gradient[first]["kernel"], rtol=1e-10)


def test_a_unit_without_weights_stays_and_has_a_finite_gradient(x64):
    params = {
        "Dense_0": {"kernel": jnp.array([[0.0, 1.0], [0.0, 2.0]])},
        "Dense_1": {"kernel": jnp.array([[1.0], [2.0]])},
    }
    x = jnp.ones((3, 2))
    net = weight_normalize(mlp, rescaling_group(mlp, params, x))
    w, gradient = jax.jit(lambda v: (net.to_params(v), jax.grad(lambda v: net.fn(v, x).sum())(v)))(
        params
    )
    np.testing.assert_array_equal(w["Dense_0"]["kernel"][:, 0], 0)
    np.testing.assert_allclose(w["Dense_0"]["kernel"][:, 1], [5**-0.5, 2 * 5**-0.5], rtol=1e-15)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def product_of_units(w, x):
    return (jax.nn.relu(x @ w["a"]) * jax.nn.relu(x @ w["b"]) + w["c"]) @ w["out"]


def test_weights_of_two_units_at_once_are_refused(x64):
    """The bias c scales with the product of two units: it is an incoming weight of both."""
    w = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "c": jnp.ones(3), "out": jnp.ones((3, 1))}
    group = rescaling_group(product_of_units, w, jnp.ones((1, 2)))
    assert group.dim == 6
    for make in (
        lambda: weight_normalize(product_of_units, group),
        lambda: tangent_gradient(group),
    ):
        with pytest.raises(InvalidInput, match="^c holds weights .* several units"):
            make()


# --- constrained ----------------------------------------------------------------------


def optimizers(group):
    return {
        "projected": optax.chain(optax.sgd(0.05, momentum=0.5), project_to_unit_norm(group)),
        "tangent": optax.chain(
            tangent_gradient(group), optax.scale(-0.05), project_to_unit_norm(group)
        ),
    }


@convolutional
@pytest.mark.parametrize("name", ["projected", "tangent"])
def test_constrained_training_keeps_norms_and_the_function_of_each_step(problem, name, x64):
    fn, params, x, loss, group, norms = problem
    tx = optimizers(group)[name]
    # The same chain without the projection: what the optimizer asks for.
    free = optax.chain(
        tangent_gradient(group) if name == "tangent" else optax.identity(),
        optax.sgd(0.05, momentum=0.5) if name == "projected" else optax.scale(-0.05),
    )

    def step(carry, _):
        w, state, free_state = carry
        gradient = jax.grad(loss)(w)
        updates, state = tx.update(gradient, state, w)
        asked, free_state = free.update(gradient, free_state, w)
        new, wanted = optax.apply_updates(w, updates), optax.apply_updates(w, asked)
        error = function_invariance_error(fn, wanted, new, x)
        return (new, state, free_state), (new, wanted, error.relative, loss(w))

    @jax.jit
    def train(w):
        w = normalize(group, w).params
        return jax.lax.scan(step, (w, tx.init(w), free.init(w)), length=50)[1]

    path, wanted, errors, losses = train(params)
    assert losses[-1] < 0.9 * losses[0]
    worst = max(
        abs(norms(jax.tree.map(lambda a, t=t: a[t], path)) - 1).max() for t in range(0, 50, 7)
    )
    assert worst < 1e-9
    assert errors.max() < 1e-12
    # The projection had something to do.
    assert abs(norms(jax.tree.map(lambda a: a[0], wanted)) - 1).max() > 1e-5


@convolutional
def test_the_tangent_gradient_keeps_norms_to_first_order_and_nothing_else_is_removed(problem, x64):
    _, params, _, loss, group, norms = problem
    gradient, tangent = jax.jit(
        lambda w: (jax.grad(loss)(w), tangent_gradient(group).update(jax.grad(loss)(w), (), w)[0])
    )(params)

    def change(direction, h):
        moved = jax.tree.map(lambda w, g: w + h * g, params, direction)
        return abs(norms(moved) ** 2 - norms(params) ** 2).max()

    assert change(gradient, 1e-4) > 1e-6
    # ‖w + hg‖² − ‖w‖² = h²‖g‖²: halving h quarters it.
    assert change(tangent, 1e-2) / change(tangent, 5e-3) == pytest.approx(4, rel=1e-6)
    again = jax.jit(lambda g: tangent_gradient(group).update(g, (), params)[0])(tangent)
    chex.assert_trees_all_close(again, tangent, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_equal(
        tangent["Dense_2" if "Dense_2" in params else "Dense_0"],
        gradient["Dense_2" if "Dense_2" in params else "Dense_0"],
    )


def test_in_float32_norms_are_kept_to_its_rounding():
    params = jax.jit(functools.partial(init_mlp, sizes=(4, 6, 2)))(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
    group = rescaling_group(mlp, params, x)
    tx = optax.chain(optax.scale(-0.1), project_to_unit_norm(group))

    @jax.jit
    def step(w, _):
        gradient = jax.grad(lambda w: ((mlp(w, x) - 1) ** 2).mean())(w)
        return optax.apply_updates(w, tx.update(gradient, tx.init(w), w)[0]), None

    w, _ = jax.jit(lambda w: jax.lax.scan(step, w, length=50))(params)
    assert abs(dense_norms(w) - 1).max() < 2e-5
    assert {a.dtype for a in jax.tree.leaves(w)} == {jnp.dtype(jnp.float32)}


# --- gauge-fixed ----------------------------------------------------------------------


# The loop of `balance` is compiled in a step of training: for one of the two networks alone.
@pytest.mark.parametrize(
    ("problem", "gauge"),
    [
        pytest.param("dense", normalize, id="dense-unit norm", marks=pytest.mark.slow),
        pytest.param("dense", balance, id="dense-balance"),
        pytest.param("residual conv", normalize, id="residual conv-unit norm"),
        pytest.param("residual conv", balance, id="residual conv-balance", marks=pytest.mark.slow),
    ],
    indirect=["problem"],
)
def test_sgd_in_a_gauge_is_invariant_under_rescalings(problem, gauge, x64):
    fn, params, x, loss, group, _ = problem
    u = random_rescaling(group, jax.random.key(2), dtype=jnp.float64)
    tx = in_gauge(optax.sgd(0.05, momentum=0.9), group, gauge)
    error = equivariance_error(tx, loss, params, by_rescaling(group, u), 5, fn=fn, x=x)
    assert error.loss[-1] < error.loss[0]
    # A gauge found by iteration is as exact as its tolerance.
    bound = 1e-12 if gauge is normalize else 1e-8
    assert error.first_step < bound and error.function.max() < 10 * bound


def test_in_the_gauge_itself_the_steps_are_those_of_the_inner_optimizer(problem, x64):
    _, params, _, loss, group, _ = problem

    @jax.jit
    def steps(w):
        w = normalize(group, w).params
        tx, inner = in_gauge(optax.sgd(0.05), group), optax.sgd(0.05)
        g = jax.grad(loss)(w)
        return tx.update(g, tx.init(w), w)[0], inner.update(g, inner.init(w), w)[0]

    chex.assert_trees_all_close(*steps(params), rtol=1e-7, atol=1e-14)


def test_params_are_needed():
    w = [jnp.ones((2, 1)), jnp.ones((1, 1))]
    group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((1, 2)))
    for tx in (project_to_unit_norm(group), tangent_gradient(group)):
        with pytest.raises(InvalidInput, match="needs them"):
            tx.update(w, tx.init(w))
    with pytest.raises(InvalidInput, match="needs them"):
        in_gauge(optax.sgd(0.1), group).update(w, None)
