"""The graph of units: against networks whose edges are known, and against sums over paths."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import log_path_kappa, log_path_norm, networks, rescaling_group
from jaxinv.pages.unit_basis import unit_basis
from jaxinv.pages.unit_graph import unit_graph
from jaxinv.rescaling import rescale

unit_graph_module = importlib.import_module("jaxinv.pages.unit_graph")


def graph_of(fn, w, x):
    group = unit_basis(rescaling_group(fn, w, x))
    kappa, norm = jax.jit(lambda w: (log_path_kappa(fn, w, x), log_path_norm(fn, w, x)))(w)
    return group, unit_graph(fn, w, x, group, kappa, float(norm))


def edges(graph):
    """{(source, target): (Σw², share)} by names."""
    found = {}
    for s, t, square, share in zip(
        graph.source, graph.target, graph.square, graph.share, strict=True
    ):
        found[(graph.names[s] if s >= 0 else "bias", graph.names[t])] = (square, share)
    return found


def test_every_weight_of_a_dense_network_is_the_edge_it_should_be():
    w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.5)
    _, graph = graph_of(networks.mlp, w, jnp.ones((1, 3)))
    hidden = [f"Dense_0/kernel out {j} → Dense_1/kernel in {j}" for j in range(4)]
    assert graph.names == (*hidden, "x[0]", "x[1]", "x[2]", "y[0]", "y[1]")
    assert [c.kind for c in graph.columns] == ["input", "hidden", "output"]
    found = edges(graph)
    assert len(found) == 3 * 4 + 4 + 4 * 2 + 2
    one, two = (jax.tree.map(np.asarray, w[f"Dense_{i}"]) for i in range(2))
    for j in range(4):
        for k in range(3):
            assert found[f"x[{k}]", hidden[j]][0] == pytest.approx(one["kernel"][k, j] ** 2)
        for i in range(2):
            assert found[hidden[j], f"y[{i}]"][0] == pytest.approx(two["kernel"][j, i] ** 2)
        assert found["bias", hidden[j]][0] == pytest.approx(one["bias"][j] ** 2)
    # By hand: γ² = Σ_j (Σ_k w_kj² + b_j²) Σ_i v_ji² + Σ_i c_i².
    inner = np.sum(one["kernel"] ** 2, 0) + one["bias"] ** 2
    total = np.sum(inner[:, None] * two["kernel"] ** 2) + np.sum(two["bias"] ** 2)
    for j in range(4):
        for i in range(2):
            share = inner[j] * two["kernel"][j, i] ** 2 / total
            assert found[hidden[j], f"y[{i}]"][1] == pytest.approx(share, rel=1e-4)


def test_shares_do_not_depend_on_the_member_of_the_orbit():
    w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.5)
    group, graph = graph_of(networks.mlp, w, jnp.ones((1, 3)))
    moved = rescale(group, w, jnp.arange(4.0) - 1)
    _, other = graph_of(networks.mlp, moved, jnp.ones((1, 3)))
    np.testing.assert_allclose(graph.share, other.share, rtol=1e-4)
    assert not np.allclose(graph.square, other.square, rtol=0.1)


def test_channels_that_a_residual_ties_are_one_unit():
    w = networks.init_cnn(jax.random.key(0), 2, num_classes=2)
    _, graph = graph_of(networks.cnn, w, jnp.ones((1, 4, 4, 1)))
    assert [(c.name, c.kind) for c in graph.columns] == [
        ("x", "input"),
        ("Conv_0/kernel", "hidden"),
        ("Conv_1/kernel", "hidden"),
        ("y", "output"),
    ]
    names = ["Conv_0/bias", "Conv_0/kernel", "Conv_1/bias", "Conv_1/kernel"]
    names += ["Conv_2/bias", "Conv_2/kernel", "Dense_0/bias", "Dense_0/kernel"]
    inner = graph.source >= 0
    ways = {
        (names[leaf], int(graph.column[s]), int(graph.column[t]))
        for leaf, s, t in zip(
            graph.leaf[inner], graph.source[inner], graph.target[inner], strict=True
        )
    }
    assert ways == {
        ("Conv_0/kernel", 0, 1),
        ("Conv_1/kernel", 1, 2),
        ("Conv_2/kernel", 2, 1),  # back into the stream
        ("Dense_0/kernel", 1, 3),
    }
    taps = graph.square[inner & (graph.leaf == 3) & (graph.source == 0) & (graph.target == 2)]
    np.testing.assert_allclose(taps, [np.sum(w["Conv_1"]["kernel"][:, :, 0, 0] ** 2)], rtol=1e-6)
    assert graph.weights.sum() == sum(leaf.size for leaf in jax.tree.leaves(w))


def test_frozen_normalisation_has_a_unit_before_and_one_behind():
    def net(w, x):
        h = jax.nn.relu((x @ w["a"]) * w["scale"] + w["shift"])
        return h @ w["b"]

    w = {"a": jnp.ones((2, 3)), "scale": jnp.ones(3), "shift": jnp.ones(3), "b": jnp.ones((3, 1))}
    x = jnp.ones((1, 2))
    group, graph = graph_of(net, w, x)
    assert group.dim == rescaling_group(net, w, x).dim == 6
    # Input, before, behind, output: a chain, every weight one edge.
    inner = graph.source >= 0
    columns = zip(graph.column[graph.source[inner]], graph.column[graph.target[inner]], strict=True)
    ways = sorted(set(columns))
    assert ways == [(0, 1), (1, 2), (2, 3)]
    assert graph.weights.sum() == 6 + 3 + 3 + 3
    u = jnp.arange(6.0) / 3 - 1
    np.testing.assert_allclose(net(rescale(group, w, u), 2 * x), net(w, 2 * x), rtol=1e-5)


def test_a_tanh_leaves_squares_with_a_fixed_scale():
    def net(w, x):
        return jnp.tanh(jax.nn.relu(x @ w["in"]) @ w["mid"]) @ w["out"]

    w = {"in": jnp.ones((2, 3)), "mid": jnp.ones((3, 4)), "out": jnp.ones((4, 1))}
    graph = unit_graph(
        net, w, jnp.ones((1, 2)), unit_basis(rescaling_group(net, w, jnp.ones((1, 2))))
    )
    assert [c.kind for c in graph.columns] == ["input", "hidden", "fixed", "fixed", "output"]
    assert "scale fixed out of mid" in graph.names and "scale fixed into out" in graph.names
    assert np.isnan(graph.share).all() and graph.weights.sum() == 6 + 12 + 4


def test_dense_layers_need_no_search_for_equal_pairs(monkeypatch):
    """The short way and the search give the same edges in the same order."""
    w, x = networks.init_mlp(jax.random.key(0), (5, 7, 4, 3), bias_std=0.5), jnp.ones((1, 5))
    _, short = graph_of(networks.mlp, w, x)
    asked = []
    monkeypatch.setattr(unit_graph_module, "_is_grid", lambda a, b: bool(asked.append(a)))
    _, long = graph_of(networks.mlp, w, x)
    assert asked
    for a, b in zip(short, long, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize(
    ("a", "b", "grid"),
    [
        (np.array([[3], [5]]), np.array([[0, 1, 2]]), True),
        (np.array([[5], [3]]), np.array([[0, 1, 2]]), False),  # out of order
        (np.array([[3], [3]]), np.array([[0, 1, 2]]), False),  # a unit twice
        (np.array([[-1], [3]]), np.array([[0, 1, 2]]), False),  # a weight without a source
        (np.array([[3, 5]]), np.array([[0], [1]]), False),  # pairs out of order
        (np.array([[3, 5]]), np.array([[0, 1]]), False),  # along the same axis
        (np.array([[7]]), np.array([[0, 1]]), True),
    ],
)
def test_a_grid_is_one_unit_of_each_side_in_order(a, b, grid):
    assert unit_graph_module._is_grid(a, b) is grid
