"""Functional dimension: never above the truth, equal to it where nothing hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import degrees_of_freedom, functional_dimension, jacobian_rank, networks
from jaxinv.errors import InvalidInput, JaxinvError, UnsupportedOperation
from jaxinv.gates import box, everywhere, functional, segments

SIZES = (3, 5, 4, 2)
ANY = everywhere(jax.ShapeDtypeStruct((1, 3), np.float32))


def params_of(seed=1):
    return networks.init_mlp(jax.random.key(seed), SIZES, bias_std=0.3)


def by_jacobian(fn, params, examples=400):
    """The rank on many inputs near and far, by NumPy: at most the functional dimension."""
    x = np.random.default_rng(0).normal(size=(4, examples, 3)) * [[[0.3]], [[1]], [[3]], [[10]]]
    with jax.enable_x64(True):
        w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        J = jax.tree.leaves(jax.jit(jax.jacfwd(lambda w: fn(w, x.reshape(-1, 3))))(w))
    rows = [np.asarray(a).reshape(8 * examples, -1) for a in J]
    return np.linalg.matrix_rank(np.concatenate(rows, 1))


def test_a_dense_network_has_all_but_its_rescalings():
    params = params_of()
    found = functional_dimension(networks.mlp, params, ANY)
    d = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (found.lower, found.upper, found.certain) == (d - 9, d - 9, True)
    assert found.lower == by_jacobian(networks.mlp, params)
    assert [layer.columns for layer in found.layers] == [4, 6, 5]
    assert all((layer.missing == 0).all() for layer in found.layers)
    assert str(found).startswith(f"functional dimension {d - 9} of {d} parameters (certain)")


def test_bounds_that_contradict_each_other_are_never_an_answer(monkeypatch):
    monkeypatch.setattr(functional, "span_dimension", lambda group, params: 30)
    with pytest.raises(JaxinvError, match="at least 45 by .*, at most 24 by 30 resc"):
        functional_dimension(networks.mlp, params_of(), ANY)


def test_what_is_lost_is_lost_and_named():
    lost = params_of()
    lost["Dense_1"]["kernel"] = lost["Dense_1"]["kernel"].at[2].set(0)  # nobody reads unit 2
    found = functional_dimension(networks.mlp, lost, ANY, dense=0)
    assert found.layers[0].ranks.tolist() == [3, 3, 0, 3, 3]
    assert found.layers[0].missing[2] > 0 and "Dense_0" in str(found)
    # Its four parameters have no effect; each of the eight others has its rescaling.
    assert not found.certain and found.lower == 54 - 4 - 8


@pytest.mark.slow
def test_what_two_equal_units_could_tell_is_lost():
    twins = params_of()
    for name in ("kernel", "bias"):
        leaf = twins["Dense_0"][name]
        twins["Dense_0"][name] = leaf.at[..., 1].set(leaf[..., 0])
    found = functional_dimension(networks.mlp, twins, ANY, dense=0)
    # Their boundaries are one, so neither has points of its own.
    assert found.layers[0].ranks[:2].tolist() == [0, 0]
    assert found.lower <= by_jacobian(networks.mlp, twins)


def test_behind_a_layer_that_never_fires_nothing_is_left():
    closed = params_of()
    closed["Dense_1"]["kernel"] = -abs(closed["Dense_1"]["kernel"])
    closed["Dense_1"]["bias"] = -abs(closed["Dense_1"]["bias"])
    found = functional_dimension(networks.mlp, closed, ANY, dense=0)
    # No unit of the second layer ever fires: the output is its bias.
    assert found.lower == 2 == by_jacobian(networks.mlp, closed)


def test_a_region_sees_no_more_than_all_inputs():
    params = params_of()
    everything = functional_dimension(networks.mlp, params, ANY)
    data = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    found = functional_dimension(networks.mlp, params, segments(data), dense=0)
    assert 0 < found.lower < everything.lower and not found.certain
    assert "the segments between 3 inputs" in str(found)


@pytest.mark.slow
def test_a_small_box_has_few_boundaries():
    small = box(np.full(3, 0.01, np.float32), np.full(3, 0.0101, np.float32))
    found = functional_dimension(networks.mlp, params_of(), small, dense=0)
    assert 0 < found.lower < 45 and not found.certain


def jump(w, x):
    """Continuous nowhere near its comparison: no boundary, whatever a − b does."""
    z = x @ w[0] + w[1]
    return jnp.where(z > 0, 2 * z + 1, z) @ w[2]


def shifted(w, x):
    """The larger of two is subtracted again: a gate on which nothing depends."""
    y = x @ w[0][:, :2] + w[1][:2]
    most = y.max(-1, keepdims=True)
    return (y - most) @ w[2][:2] + most * w[2][:2].sum(0)


@pytest.mark.parametrize("fn", [jump, shifted])
def test_never_above_the_truth(fn):
    keys = jax.random.split(jax.random.key(5), 3)
    w = [jax.random.normal(k, s) for k, s in zip(keys, [(3, 4), (4,), (4, 2)], strict=True)]
    found = functional_dimension(fn, w, ANY, dense=0)
    # Piecewise linear with one linear map on all pieces: y = x A + b, or two slopes per unit.
    truth = by_jacobian(fn, w)
    assert found.lower <= truth <= found.upper


def test_errors_say_what_to_do():
    params = params_of()
    with pytest.raises(InvalidInput, match="everywhere"):
        functional_dimension(networks.mlp, params, np.ones((2, 3)))
    with pytest.raises(UnsupportedOperation, match="theory of gates"):
        functional_dimension(lambda w, x: jnp.sort(x @ w, -1), np.ones((3, 2)), ANY)
    normed = lambda w, x: jax.nn.relu(x @ w - (x @ w).mean(0))  # noqa: E731
    with pytest.raises(UnsupportedOperation, match="batch|examples"):
        functional_dimension(normed, np.ones((3, 2), np.float32), ANY)


def test_a_cast_leaves_nothing_certain():
    def half(w, x):
        return jax.nn.relu((x @ w[0]).astype(jnp.float16).astype(x.dtype)) @ w[1]

    w = [np.ones((3, 1), np.float32), np.ones((1, 1), np.float32)]
    found = functional_dimension(half, w, ANY, dense=0)
    assert not found.certain and "test_functional.py" in found.casts[0]
    assert "casts to less than float64" in str(found)


def test_ranks_take_regions():
    params = params_of()
    rank = jacobian_rank(networks.mlp, params, ANY)
    assert (int(rank.rank), bool(rank.certain)) == (45, True)
    assert str(rank) == "rank 45 (certain) on all inputs: 45 proven, at most 45"
    split = degrees_of_freedom(networks.mlp, params, ANY, method="boundary")
    parts = (split.rank, split.rescaling, split.dead, split.unexplained, split.unseen)
    assert tuple(map(int, parts)) == (45, 9, 0, 0, 0) and bool(split.certain)
    data = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    between = jacobian_rank(networks.mlp, params, data, method="boundary")
    assert 0 < int(between.rank) <= int(between.upper) == 45 and "3 inputs" in str(between)
    for wrong in ({"method": "svd"}, {"rtol": 1e-3}, {"dtype": np.float32}):
        with pytest.raises(InvalidInput, match="boundar"):
            jacobian_rank(networks.mlp, params, ANY, **wrong)
    with pytest.raises(InvalidInput, match="under jit"):
        jax.jit(lambda w: jacobian_rank(networks.mlp, w, ANY).rank)(params)
    with pytest.raises(InvalidInput, match="basis"):
        degrees_of_freedom(networks.mlp, params, ANY, basis=True)


def test_units_may_be_spread_over_devices():
    mesh = jax.sharding.Mesh(jax.devices(), "units")
    assert mesh.size == 8
    found = functional_dimension(networks.mlp, params_of(), ANY, mesh=mesh)
    assert (found.lower, found.certain) == (45, True)
