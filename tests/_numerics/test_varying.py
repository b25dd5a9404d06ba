"""Inside of `jax.shard_map`, with its checks: what a device computes is what it would alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinv import (
    balance,
    degrees_of_freedom,
    jacobian,
    jacobian_gram,
    jacobian_operator,
    jacobian_rank,
    normalize,
    rescaling_group,
    tangent_kernel,
)

W = {
    "a": jax.random.normal(jax.random.key(0), (3, 4)),
    "b": jax.random.normal(jax.random.key(1), (4, 2)),
}
X = jax.random.normal(jax.random.key(2), (12, 3))
SECOND = {"a": W["a"].at[:, 0].set(0).at[:, 1].multiply(8), "b": W["b"] / 3}
PAIR = jax.tree.map(lambda *w: jnp.stack(w), W, SECOND)  # one member for each device

SPREAD = P("d")


def net(w, x):
    return jax.nn.relu(x @ w["a"]) @ w["b"]


def own(pair):
    """The member of this device."""
    return jax.tree.map(lambda a: a[0], pair)


def on_two_devices(function, *in_specs, out=SPREAD):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("d",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out))


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
def test_rows_of_spread_examples_are_rows_of_the_jacobian(mode):
    """Of parameters that all devices share: no gradient is summed over the devices."""
    found = on_two_devices(lambda w, x: jacobian(net, w, x, mode=mode), P(), P("d"))(W, X)
    np.testing.assert_allclose(found, jacobian(net, W, X), rtol=1e-5, atol=1e-6)


def test_a_network_that_mixes_examples_is_taken_whole_on_each_device():
    def mixing(w, x):
        return net(w, x) - net(w, x).mean(0)

    found = on_two_devices(lambda w, x: jacobian(mixing, w, x, mode="rev"), P(), P("d"))(W, X)
    halves = [jacobian(mixing, W, half) for half in jnp.split(X, 2)]
    np.testing.assert_allclose(found, np.concatenate(halves), rtol=1e-5, atol=1e-6)


def test_products_of_spread_examples():
    def products(w, x):
        operator = jacobian_operator(net, w, x)
        v = jnp.linspace(-1, 1, 20)
        gram = jax.lax.psum(jacobian_gram(net, w, x, chunk=4), "d")
        back = jax.lax.psum(operator.rmatvec(jnp.ones(12)), "d")
        return gram, operator.matvec(v), back, tangent_kernel(net, w, x)

    out = (P(), P("d"), P(), P("d"))
    gram, forth, back, kernel = on_two_devices(products, P(), P("d"), out=out)(W, X)
    J = np.asarray(jacobian(net, W, X))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(gram, J.T @ J, **close)
    np.testing.assert_allclose(forth, J @ np.linspace(-1, 1, 20), **close)
    np.testing.assert_allclose(back, J.T @ np.ones(24), **close)
    np.testing.assert_allclose(kernel[:12], J[:12] @ J[:12].T, **close)


METHODS = [
    "auto",
    "certificate",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("svd", "tsqr", "gram")),
]


@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_one_network_per_device(method):
    def rank(pair, x):
        found = jacobian_rank(net, own(pair), x, method=method)
        return found.rank[None], found.certain[None]

    out = (P("d"), P("d"))
    ranks, certain = on_two_devices(rank, P("d"), P(), out=out)(PAIR, X)
    for i, w in enumerate((W, SECOND)):
        alone = jacobian_rank(net, w, X, method=method)
        assert (int(ranks[i]), bool(certain[i])) == (int(alone.rank), bool(alone.certain))


def test_degrees_of_freedom_of_one_network_per_device():
    found = on_two_devices(
        lambda pair, x: degrees_of_freedom(net, own(pair), x).rank[None], P("d"), P()
    )(PAIR, X)
    assert found.tolist() == [int(degrees_of_freedom(net, w, X).rank) for w in (W, SECOND)]


def test_gauges_of_one_network_per_device():
    group = rescaling_group(net, W, X)

    def gauges(pair):
        w = own(pair)
        found = (balance(group, w).u, normalize(group, w).u)
        return jax.tree.map(lambda a: a[None], found)

    found = on_two_devices(gauges, P("d"), out=(P("d"),) * 2)(PAIR)
    for i, w in enumerate((W, SECOND)):
        alone = gauges(jax.tree.map(lambda a: a[None], w))
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-3, atol=1e-4)
