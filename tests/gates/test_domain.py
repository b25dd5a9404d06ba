"""Gates as the program has them: which operations are, their pre-activations, units cut out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import networks
from jaxinv._interpreter.draws import traced_in
from jaxinv.errors import UnsupportedOperation
from jaxinv.gates.blocks import block_of, pre_activations, slices_of
from jaxinv.gates.reading import at, read

W = np.array([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
X = np.array([3.0, -5.0])
Z = X @ W


def gates_of(fn, w=W, x=X):
    network = traced_in(np.float64, fn, w, x[None])
    return network, read(network, w, x), at(network, jax.tree.map(jnp.asarray, w), jnp.asarray(x))


GATES = {
    "relu": (lambda w, x: jax.nn.relu(x @ w), [Z]),
    "leaky": (lambda w, x: jax.nn.leaky_relu(x @ w, 0.25), [0.75 * Z]),
    "abs": (lambda w, x: abs(x @ w), [Z]),
    "two values": (lambda w, x: jnp.maximum(x @ w, x @ w[:, ::-1]), [Z - Z[::-1]]),
    "smaller": (lambda w, x: jnp.minimum(x @ w, 2.0), [Z - 2]),
    "where": (lambda w, x: jnp.where(x @ w > 1, 3 * (x @ w) - 2, x @ w), [2 * Z - 2]),
    "clip": (lambda w, x: lax.clamp(-1.0, x @ w, 2.0), [Z + 1, Z - 2]),
    "largest": (lambda w, x: (x @ w).max(-1), [Z[:1] - Z[1:2], [max(Z[:2]) - Z[2]]]),
    "relu of relu": (
        lambda w, x: jax.nn.relu(jax.nn.relu(x @ w) - 1.0),
        [Z, np.maximum(Z, 0) - 1],
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_pre_activations_are_those_by_hand(name, x64):
    fn, expected = GATES[name]
    _, gates, found = gates_of(fn)
    assert len(gates.layers) == len(expected)
    for layer, z, by_hand in zip(gates.layers, found.z, expected, strict=True):
        np.testing.assert_allclose(z.ravel(), by_hand, rtol=1e-14)
        assert layer.shape == z.shape
    plain = jax.tree.leaves(fn(jnp.asarray(W), jnp.asarray(X[None])))[0]
    np.testing.assert_allclose(found.y, plain.ravel(), rtol=1e-14)


def test_closed_gates_have_nothing_to_decide(x64):
    """Two ReLUs that are both off are equal, at 0, and stay so."""
    fn = lambda w, x: jnp.max(jax.nn.relu(x @ w), -1)  # noqa: E731
    _, _, found = gates_of(fn, -abs(W), abs(X))
    assert all((z == np.inf).all() for z in found.z[1:])


def test_a_maximum_over_windows_is_pairs(x64):
    x = np.arange(36.0).reshape(6, 6, 1) * np.where(np.arange(36) % 3, 1, -1).reshape(6, 6, 1)

    def pool(w, x):
        return lax.reduce_window(x * w, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME").sum(
            (1, 2, 3)
        )

    _, gates, found = gates_of(pool, np.float64(2.0), x)
    assert len(gates.layers) == 8  # of the nine elements of a window, pair by pair
    np.testing.assert_allclose(found.y, pool(2.0, x[None]))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x * jnp.argmax(x @ w, -1)[:, None].astype(x.dtype),
        lambda w, x: jnp.sort(x @ w, -1),
        lambda w, x: (x @ w).astype(jnp.int32).astype(jnp.float64),
        lambda w, x: lax.cond((x @ w).sum() > 0, lambda: x @ w, lambda: -x @ w),
        lambda w, x: lax.scan(lambda h, _: (jax.nn.relu(h), None), x @ w, None, length=500)[0],
    ],
    ids=["argmax", "sort", "whole numbers", "cond", "a long loop"],
)
def test_what_may_jump_is_refused_by_name(fn, x64):
    with pytest.raises(UnsupportedOperation, match="theory of gates(.|\n)*test_domain.py"):
        gates_of(fn)


def test_a_comparison_used_as_a_number_is_a_kink(x64):
    _, gates, found = gates_of(lambda w, x: (x @ w > 0).astype(x.dtype) * (x @ w))
    assert not gates.layers and found.belongs == [None]
    np.testing.assert_allclose(found.kinks[0].ravel(), Z)


def _stacked(w, x):
    step = lambda h, layer: (jax.nn.relu(h @ layer[0] + layer[1]), None)  # noqa: E731
    return lax.scan(step, x @ w["in"], w["layers"])[0] @ w["out"]


def _weights(key, *shapes):
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True)]


def _networks():
    a, b, c, d, e = _weights(jax.random.key(0), (3, 4), (2, 4, 4), (2, 4), (4, 2), (3, 3, 1, 4))
    yield "stacked", _stacked, {"in": a, "layers": (b, c), "out": d}, jnp.ones((3,))
    yield (
        "transposed kernel",
        lambda w, x: jax.nn.relu(jnp.einsum("bi,oi->bo", x, w[0]) * w[1][0]) @ w[2],
        [a.T, c, d],
        jnp.ones((3,)),
    )
    cnn = networks.init_cnn(jax.random.key(1), channels=3, bias_std=0.3, dtype=jnp.float64)
    yield "cnn", networks.cnn, cnn, jax.random.normal(jax.random.key(2), (6, 6, 1), jnp.float64)


def test_a_unit_cut_out_computes_what_it_does_in_the_whole(x64):
    for name, fn, w, x in _networks():
        network = traced_in(np.float64, fn, w, x[None])
        gates, whole = read(network, w, x), at(network, w, x)
        shapes, seen, cut = [a.shape for a in jax.tree.leaves(w)], set(), 0
        for index in [*range(len(gates.layers)), None]:
            block = block_of(gates, index, shapes, seen)
            if block is None:
                continue
            seen |= {atom for atom, _, _ in block.atoms}
            z = whole.y if index is None else whole.z[index]
            z = z.reshape(block.shape)
            for unit in range(block.units):
                slices = slices_of(block, w, unit)
                found = pre_activations(network, block, w, unit, slices, x)
                own = z if block.axis is None else jnp.take(z, unit, block.axis)
                np.testing.assert_allclose(found, own.ravel(), rtol=1e-12, atol=1e-12)
            cut += block.axis is not None
        assert cut >= 2, name
        assert {leaf for leaf, _ in seen} == set(range(len(shapes)))


def test_layers_of_a_stacked_leaf_are_parameters_of_their_own(x64):
    name, fn, w, x = next(_networks())
    gates = read(traced_in(np.float64, fn, w, x[None]), w, x)
    assert name == "stacked"
    blocks, seen = [], set()
    for index in [*range(len(gates.layers)), None]:
        blocks.append(block_of(gates, index, [a.shape for a in jax.tree.leaves(w)], seen))
        seen |= {atom for atom, _, _ in blocks[-1].atoms}
    # The first layer has a linear one before it: all of both is one block.
    assert [(b.units, b.columns) for b in blocks] == [(1, 12 + 16 + 4), (4, 5), (2, 4)]
