"""Steps that turn with the weights, against closed forms and on networks with known symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv.errors import InvalidInput
from jaxinv.invariance import equivariance_error
from jaxinv.symmetries import act, random_element, scale_by_matrix_symmetries, symmetry_group
from tests.ground_truth.zoo import ZOO, inputs_of, params_of

FAST = ["LoRA"]
SINGULAR = ["wide linear", "three linear"]  # wider than what they connect


def adapters():
    rng = np.random.default_rng(0)
    w = {"A": rng.normal(size=(2, 6)), "B": rng.normal(size=(7, 2))}
    frozen, x = rng.normal(size=(7, 6)), rng.normal(size=(5, 7))

    def fn(w, x):
        return jnp.tanh(x @ (frozen + w["B"] @ w["A"]))

    return fn, w, x


def test_two_factors_are_divided_by_the_gram_matrix_of_the_other():
    with jax.enable_x64(True):
        fn, w, x = adapters()
        group = symmetry_group(fn, w, x)
        rng = np.random.default_rng(1)
        g = jax.tree.map(lambda a: rng.normal(size=a.shape), w)
        for damping in (0.0, 0.1):
            tx = scale_by_matrix_symmetries(group, damping=damping)
            u, _ = jax.jit(tx.update)(g, tx.init(w), w)
            left, right = w["B"].T @ w["B"], w["A"] @ w["A"].T
            left, right = (X + damping * np.trace(X) / 2 * np.eye(2) for X in (left, right))
            np.testing.assert_allclose(u["A"], np.linalg.solve(left, g["A"]), rtol=1e-12)
            np.testing.assert_allclose(u["B"], g["B"] @ np.linalg.inv(right), rtol=1e-12)


def test_a_chain_uses_the_whole_network_on_either_side_of_a_layer():
    """Three layers without activation: W₂ has a matrix on both axes."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        w = [rng.normal(size=s) for s in ((5, 2), (2, 3), (3, 4))]
        group = symmetry_group(lambda w, x: x @ w[0] @ w[1] @ w[2], w, np.eye(5))
        tx = scale_by_matrix_symmetries(group)
        g = [rng.normal(size=a.shape) for a in w]
        u, _ = tx.update(g, tx.init(w), w)
        before = w[0].T @ w[0]
        np.testing.assert_allclose(
            u[1], np.linalg.inv(before) @ g[1] @ np.linalg.inv(w[2] @ w[2].T), rtol=1e-10
        )
        ahead = w[1] @ (w[2] @ w[2].T) @ w[1].T
        np.testing.assert_allclose(u[0], g[0] @ np.linalg.inv(ahead), rtol=1e-10)


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n not in SINGULAR],
)
def test_steps_turn_with_the_weights(name):
    with jax.enable_x64(True):
        case = ZOO[name]
        w = jax.tree.map(lambda a: a.astype(jnp.float64), params_of(case))
        x = inputs_of(case, 4)
        group = symmetry_group(case.fn, w, x)
        element = random_element(group, jax.random.key(3), dtype=jnp.float64)
        element = element._replace(scales=0 * element.scales)

        def loss(w):
            return sum(jnp.sum((y - 1) ** 2) for y in jax.tree.leaves(case.fn(w, x)))

        def error(*transforms):
            tx = optax.chain(*transforms, optax.sgd(1e-4, momentum=0.9))
            return equivariance_error(tx, loss, w, lambda v: act(group, v, element), 3)

        invariant = error(scale_by_matrix_symmetries(group))
        assert invariant.first_step < 1e-13
        assert invariant.weights[-1] < 1e-11
        if any(c.kind == "GL" for c in group.classes):
            assert error().first_step > 0.05


def test_rotations_through_a_gain_move_the_weights_and_not_the_gain():
    """RMSNorm with a gain g: what is behind it sees diag(g) Q diag(g)⁻¹."""

    def fn(w, x):
        h = x @ w["in"]
        return (h / jnp.sqrt((h * h).mean(-1, keepdims=True)) * w["g"]) @ w["out"]

    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        w = {"in": rng.normal(size=(4, 3)), "g": 1 + rng.random(3), "out": rng.normal(size=(3, 2))}
        x = rng.normal(size=(5, 4))
        group = symmetry_group(fn, w, x)
        assert [c.kind for c in group.classes] == ["O"]
        element = random_element(group, jax.random.key(0), dtype=jnp.float64)
        element = element._replace(scales=0 * element.scales)

        def error(tx):
            move = lambda v: act(group, v, element)  # noqa: E731
            return equivariance_error(tx, lambda w: (fn(w, x) ** 2).sum(), w, move, 2)

        tx = optax.chain(scale_by_matrix_symmetries(group), optax.scale(-1e-3))
        assert error(tx).first_step < 1e-13
        assert error(optax.sgd(1e-3)).first_step > 0.05
        gradient = jax.grad(lambda w: (fn(w, x) ** 2).sum())(w)
        updates, _ = tx.update(gradient, tx.init(w), w)
        np.testing.assert_allclose(updates["g"], 0, atol=1e-15)


def test_zero_factors_other_leaves_and_dtypes():
    fn, w, x = adapters()
    w = {"A": jnp.asarray(w["A"], jnp.bfloat16), "B": jnp.zeros((7, 2), jnp.bfloat16)}
    more = w | {"bias": jnp.ones(6)}

    def net(w, x):
        return jax.nn.relu(fn(w, x) + w["bias"])

    with jax.numpy_dtype_promotion("standard"):
        group = symmetry_group(net, more, jnp.asarray(x, jnp.float32))
    tx = scale_by_matrix_symmetries(group)
    g = jax.tree.map(jnp.ones_like, more)
    u, _ = tx.update(g, tx.init(more), more)
    # B is zero: A's step is, and B's is not.
    assert not u["A"].any() and u["B"].all()
    assert [a.dtype for a in jax.tree.leaves(u)] == [a.dtype for a in jax.tree.leaves(more)]
    np.testing.assert_array_equal(u["bias"], g["bias"])


def test_mistakes():
    fn, w, x = adapters()
    w = jax.tree.map(jnp.asarray, w)
    group = symmetry_group(fn, w, jnp.asarray(x))
    with pytest.raises(InvalidInput, match="damping must be a number >= 0"):
        scale_by_matrix_symmetries(group, damping=-1.0)
    tx = scale_by_matrix_symmetries(group)
    with pytest.raises(InvalidInput, match="need the parameters"):
        tx.update(w, tx.init(w))
    with pytest.raises(InvalidInput, match="updates"):
        tx.update({"A": w["A"]}, tx.init(w), w)
    with pytest.raises(InvalidInput, match="params"):
        tx.init({"A": w["A"]})
