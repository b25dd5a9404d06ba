"""Numerical discovery of symmetries, against dimensions counted by hand and the symbolic group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import InvalidInput
from jaxinv.networks import cnn, init_cnn, mlp
from jaxinv.rescaling import rescaling_group
from jaxinv.symmetries import compare, discover_symmetries


def draw(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def dense(*sizes, bias=True):
    layers = {}
    for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers[f"Dense_{i}"] = draw(i, kernel=(inputs, outputs), bias=(outputs,))
        if not bias:
            del layers[f"Dense_{i}"]["bias"]
    return layers


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def dimensions(found):
    kinds = (found.scaling, found.translation, found.linear)
    assert all(kind.certain and kind.gap > 1e6 for kind in kinds)
    return tuple(kind.dimension for kind in kinds)


def test_a_relu_network_has_one_scaling_per_hidden_unit_and_nothing_else():
    w, x = dense(3, 4, 3, 2), shape(8, 3)
    found = discover_symmetries(mlp, w, x)
    assert dimensions(found) == (7, 0, 7)
    result = compare(found, rescaling_group(mlp, w, x))
    assert result == (7, (), (), (), (), ())
    # The basis itself: exponents that are constant over a unit's weights and opposite after it.
    c = found.scaling.basis
    first, bias, second = c["Dense_0"]["kernel"], c["Dense_0"]["bias"], c["Dense_1"]["kernel"]
    np.testing.assert_allclose(first, np.broadcast_to(bias[:, None], first.shape), atol=1e-9)
    up = c["Dense_1"]["bias"][:, None, :]
    np.testing.assert_allclose(second, up - bias[:, :, None], atol=1e-9)


def test_a_tanh_network_has_none_and_the_group_of_relu_is_not_confirmed():
    w, x = dense(3, 4, 2), shape(8, 3)
    found = discover_symmetries(lambda w, x: mlp(w, x, activation=jnp.tanh), w, x)
    assert dimensions(found) == (0, 0, 0)
    result = compare(found, rescaling_group(mlp, w, x))
    assert result.confirmed == 0 and len(result.missing) == 4
    assert "not confirmed: Dense_0/kernel out 3 → Dense_1/kernel in 3" in str(result)


@pytest.mark.parametrize(
    "sizes", [pytest.param((3, 2, 3), marks=pytest.mark.slow), (2, 4, 2), (3, 2, 4, 2)], ids=str
)
def test_a_deep_linear_network_has_one_general_linear_group_per_hidden_layer(sizes):
    """W_i → W_i A, W_{i+1} → A⁻¹W_{i+1}: h² each, of which h are rescalings."""
    w, x = dense(*sizes, bias=False), shape(6, sizes[0])

    def linear(w, x):
        return mlp(w, x, activation=lambda h: h)

    found = discover_symmetries(linear, w, x)
    hidden = np.array(sizes[1:-1])
    assert dimensions(found) == (hidden.sum(), 0, (hidden**2).sum())
    result = compare(found, rescaling_group(linear, w, x))
    assert result.confirmed == hidden.sum() and not result.missing and not result.scalings
    assert sum(n for _, n in result.linear) == (hidden**2 - hidden).sum()


def test_a_softmax_output_does_not_see_the_shift_of_all_logits():
    """b + c·1, and W + v·1ᵀ: one and one per hidden unit."""
    w, x = dense(3, 4, 3), shape(8, 3)

    def net(w, x):
        return jax.nn.softmax(mlp(w, x))

    found = discover_symmetries(net, w, x)
    assert dimensions(found)[:2] == (4, 5)
    result = compare(found, rescaling_group(net, w, x))
    assert result.shifts == (("Dense_1/bias", 1), ("Dense_1/kernel", 4))
    assert result.linear == result.scalings == result.dead == ()
    v = found.translation.basis["Dense_1"]["kernel"]
    np.testing.assert_allclose(v, np.broadcast_to(v[..., :1], v.shape), atol=1e-12)


def test_weights_of_an_input_that_is_always_zero_are_dead():
    w = dense(3, 4, 2)
    x = draw(9, x=(8, 3))["x"]
    x[:, 1] = 0
    found = discover_symmetries(mlp, w, x, kinds=("scaling", "translation"))
    assert (found.scaling.dimension, found.translation.dimension) == (8, 4)
    result = compare(found, rescaling_group(mlp, w, x))
    assert result.dead == (("Dense_0/kernel", 4),)
    assert result.confirmed == 4 and result.shifts == result.scalings == ()
    moved = found.translation.basis["Dense_0"]["kernel"]
    assert abs(moved[:, [0, 2]]).max() < 1e-12


def attention(w, x):
    q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v @ w["o"]


def test_attention_has_general_linear_groups_between_query_and_key_and_value_and_output():
    w, x = draw(q=(3, 2), k=(3, 2), v=(3, 2), o=(2, 3)), shape(3, 4, 3)
    found = discover_symmetries(attention, w, x)
    assert dimensions(found) == (4, 0, 8)
    result = compare(found, rescaling_group(attention, w, x))
    assert result.confirmed == 4
    assert result.linear == (("k + q", 2), ("o + v", 2))
    # d(QKᵀ) = 0 with Q → QA, K → KA' needs A' = −Aᵀ, up to a multiple of the identity on each.
    for query, key in zip(found.linear.basis["q"][1], found.linear.basis["k"][1], strict=True):
        total = query.T + key
        np.testing.assert_allclose(total - np.eye(2) * total[0, 0], 0, atol=1e-9)


def test_a_residual_convolutional_network_has_the_scalings_of_its_group():
    w = jax.jit(lambda: init_cnn(jax.random.key(0), 2, num_classes=2))()
    x = shape(6, 4, 4, 1)
    found = discover_symmetries(cnn, w, x, kinds=("scaling", "translation"))
    group = rescaling_group(cnn, w, x)
    assert found.scaling.certain and found.scaling.dimension == group.dim == 4
    assert found.translation.dimension == 0
    result = compare(found, group)
    assert result.confirmed == 4 and result.scalings == ()


def normalized(w, x):
    h = x @ w["kernel"] + w["bias"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-4)
    return h @ w["out"]


def test_a_bias_in_front_of_a_batch_normalisation_has_no_effect_and_its_epsilon_counts():
    w, x = draw(kernel=(3, 2), bias=(2,), out=(2, 2)), shape(8, 3)
    found = discover_symmetries(normalized, w, x, kinds=("scaling", "translation"))
    # Scales of the kernel would be symmetries but for ε: small singular values, and not 0.
    assert found.scaling.certain and found.scaling.dimension == 2
    result = compare(found, rescaling_group(normalized, w, x))
    assert result.dead == (("bias", 2),) and result.scalings == ()
    loose = rescaling_group(normalized, w, x, ignore_epsilon=True)
    assert loose.dim > 0
    assert len(compare(found, loose).missing) == loose.dim


def test_a_scaling_that_the_symbolic_rules_do_not_see_is_reported_as_extra():
    w, x = draw(a=(3,), b=(3,)), shape(4, 3)

    def hidden(w, x):
        return x * jnp.exp(jnp.log(w["a"] ** 2) + jnp.log(w["b"] ** 2))

    found = discover_symmetries(hidden, w, x)
    group = rescaling_group(hidden, w, x)
    assert group.dim == 0
    assert dimensions(found)[:2] == (3, 0)
    result = compare(found, group)
    assert result.scalings == (("a + b", 3),)
    assert result.linear == ()  # all of them scalings too
    assert "3 scalings beyond the group: 3 of a + b" in str(result)


def test_nothing_of_the_users_configuration_changes_and_float32_is_not_used():
    w = [np.ones(2, np.float32)]
    seen = []

    def net(w, x):
        seen.append(w[0].dtype)
        return x * w[0]

    found = discover_symmetries(net, w, shape(3, 2))
    assert set(seen) == {jnp.dtype("float64")}
    assert jnp.ones(1).dtype == jnp.float32
    assert found.scaling.singular_values.dtype == np.float64
    assert str(found).count("certain") == 3


def test_a_function_that_rounds_to_float32_is_not_certain():
    """Zeros at 1e-7 are not zeros at rounding of float64: no certainty, whatever the dimension."""
    w, x = dense(3, 4, 2), shape(8, 3)

    def net(w, x):
        return mlp(jax.tree.map(lambda a: a.astype(jnp.float32), w), x.astype(jnp.float32))

    assert not discover_symmetries(net, w, x, kinds=("scaling",)).scaling.certain


def test_inputs_that_are_indices_are_taken_as_they_are():
    w = draw(table=(4, 2), out=(2, 1))
    x = np.array([0, 1, 2])

    def net(w, x):
        return w["table"][x] @ w["out"]

    found = discover_symmetries(net, w, x)
    # Row 3 is never read: 2 dead weights; GL(2) otherwise.
    assert dimensions(found)[:2] == (4, 2)
    assert compare(found, rescaling_group(net, w, x)).dead == (("table", 2),)


def test_parameters_that_must_be_positive_are_drawn_by_the_user():
    w, x = {"variance": np.ones(2, np.float32)}, shape(3, 2)

    def net(w, x):
        return x / jnp.sqrt(w["variance"])

    with pytest.raises(InvalidInput, match=r"not finite.*sample="):
        discover_symmetries(net, w, x)
    found = discover_symmetries(
        net, w, x, sample=lambda key, w: {"variance": jax.random.uniform(key, (2,)) + 0.5}
    )
    assert dimensions(found) == (0, 0, 0)


def test_what_cannot_be_done_is_refused():
    big = [np.ones((100, 100), np.float32)]
    with pytest.raises(InvalidInput, match=r"needs? about .* GB for .*'linear': 20000.*max_bytes"):
        discover_symmetries(lambda w, x: x @ w[0], big, shape(2, 100))
    with pytest.raises(InvalidInput, match="'rotation' is not"):
        discover_symmetries(mlp, dense(2, 2), shape(1, 2), kinds=("rotation",))
    with pytest.raises(InvalidInput, match="cannot run under jit"):
        jax.jit(lambda w: discover_symmetries(mlp, w, shape(1, 2)).rows)(dense(2, 2))
    with pytest.raises(InvalidInput, match="only floats can be drawn"):
        discover_symmetries(mlp, dense(2, 2), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    found = discover_symmetries(
        lambda w, x: x * w[0], [np.ones(1, np.float32)], shape(2, 1), kinds=()
    )
    group = rescaling_group(lambda w, x: x * w[0], [np.ones(1, np.float32)], shape(2, 1))
    with pytest.raises(InvalidInput, match="needs the discovered scalings"):
        compare(found, group)


def test_symmetries_do_not_depend_on_the_key():
    w, x = dense(2, 3, 2), shape(5, 2)
    spaces = [
        discover_symmetries(mlp, w, x, kinds=("scaling",), key=jax.random.key(k)).scaling
        for k in (1, 2)
    ]
    projections = []
    for space in spaces:
        flat = np.concatenate([a.reshape(3, -1) for a in jax.tree.leaves(space.basis)], axis=1)
        np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-12)
        projections.append(flat.T @ flat)
    np.testing.assert_allclose(*projections, atol=1e-9)
