"""The residual networks: their size, and their path norm without any interpreter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resnet import BottleneckBlock, ResNet, ResNet18, ResNet50

from jaxinv import log_path_norm, path_norm


def shapes_of(net, size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, False), x)


# The parameter counts of the public checkpoints.
@pytest.mark.parametrize(
    ("net", "size", "count"),
    [
        (ResNet18(num_classes=1000), 224, 11_689_512),
        (ResNet50(), 224, 25_557_032),
        (ResNet18(small_inputs=True), 32, 11_173_962),
    ],
    ids=["ResNet-18", "ResNet-50", "ResNet-18 for 32×32"],
)
def test_parameter_counts(net, size, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(net, size)["params"])) == count


def test_the_last_feature_map_is_seven_by_seven():
    """Seen by the read-out: the mean runs over 7×7 positions of 224×224 images."""
    net = ResNet18(num_classes=2)
    variables = shapes_of(net, 224)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: net.apply(v, x, False))(variables, x)
    assert "f32[1,7,7,512]" in str(jaxpr)


def test_training_updates_running_statistics_and_evaluation_does_not():
    net = ResNet(2, small_inputs=True, stage_sizes=(1,))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = net.init(jax.random.key(1), x, False)
    _, updated = net.apply(variables, x, True, mutable=["batch_stats"])
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (variables, updated))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    _, untouched = net.apply(variables, x, False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(before, jax.tree.leaves(untouched["batch_stats"]))


def randomised(variables, seed):
    """Random scales, biases, means and variances; fresh ones would hide a wrong use of them."""
    rng = np.random.default_rng(seed)
    ranges = {"scale": (0.5, 1.5), "bias": (-1, 1), "mean": (-1, 1), "var": (0.5, 2)}

    def draw(path, leaf):
        name = path[-1].key
        if name not in ranges:
            return leaf
        return rng.uniform(*ranges[name], leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def norm_by_forward_pass(net, variables, shape, p):
    """γ_p^p as the output of the network itself on inputs of one and parameters |w|^p.

    No gate closes on non-negative values. An average over k positions needs its weights 1/k to
    become (1/k)^p, a factor k^{1-p} on all paths alike as the only average is the last operation
    but one; and batch norm needs |mean|^p added and a variance whose root gives the power p.
    """
    eps, positions = 1e-5, shape[1] * shape[2] // 4 ** (len(net.stage_sizes) - 1)
    params = jax.tree.map(lambda w: np.abs(np.asarray(w, np.float64)) ** p, variables["params"])
    readout = params["Dense_0"]["kernel"]
    params["Dense_0"]["kernel"] = readout * float(positions) ** (1 - p)

    def power(path, leaf):
        leaf = np.asarray(leaf, np.float64)
        return -(np.abs(leaf) ** p) if path[-1].key == "mean" else (leaf + eps) ** p - eps

    stats = jax.tree_util.tree_map_with_path(power, variables["batch_stats"])
    forward = jax.jit(net.apply, static_argnums=2)
    y = forward({"params": params, "batch_stats": stats}, np.ones((1, *shape[1:])), False)
    return y.sum()


@pytest.mark.parametrize(
    ("block", "p"), [("basic", 1.0), pytest.param("bottleneck", 3.0, marks=pytest.mark.slow)]
)
def test_path_norm_is_the_network_on_powers_of_its_parameters(block, p, x64):
    blocks = {"block": BottleneckBlock} if block == "bottleneck" else {}
    net = ResNet(3, small_inputs=True, stage_sizes=(1, 1), **blocks)
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), np.float64)
    init = jax.jit(net.init, static_argnums=2)
    variables = init(jax.random.key(0), jnp.ones((1, 4, 4, 3), np.float32), False)
    variables = jax.tree.map(lambda a: np.asarray(a, np.float64), randomised(variables, 0))

    def fn(params, x):
        stats = variables["batch_stats"]
        return net.apply({"params": params, "batch_stats": stats}, x, False)

    expected = norm_by_forward_pass(net, variables, x.shape, p)
    norm = jax.jit(lambda w: path_norm(fn, w, x, p=p))(variables["params"])
    np.testing.assert_allclose(norm**p, expected, rtol=1e-9)


@pytest.mark.slow
def test_l1_path_norm_of_resnet_50_overflows_float32_but_not_its_logarithm():
    """The published L1 norm of a trained ResNet-50 is 4.2e69."""
    net = ResNet50()
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), False)

    def fn(params, x):
        stats = variables["batch_stats"]
        return net.apply({"params": params, "batch_stats": stats}, x, False)

    log_norm = log_path_norm(fn, variables["params"], x, p=1)
    assert np.log(np.finfo(np.float32).max) < log_norm < np.inf
