"""Ranks by Cholesky factors against exact ranks of integer Jacobians, and against SVDs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import jacobian, jacobian_rank, networks
from jaxinv._interpreter.draws import traced_in
from jaxinv.jacobians.jacobians import scaled_gram
from jaxinv.ranks.certificate import _LEAST_BLOCK, rank_by_deflation
from jaxinv.ranks.evidence import evidence_of
from tests.ground_truth.integer_rank import exact_rank

F64 = np.dtype("float64")


def integer_network(seed, sizes=(6, 12, 12, 4), examples=120):
    """Small integers, exact in float64; some units are linear or off on all of these inputs."""
    rng = np.random.default_rng(seed)
    params = {
        f"Dense_{i}": {
            "kernel": rng.integers(-3, 4, (m, n)).astype(float),
            "bias": rng.integers(-3, 4, n).astype(float),
        }
        for i, (m, n) in enumerate(zip(sizes, sizes[1:], strict=False))
    }
    return params, rng.integers(-4, 5, (examples, sizes[0])).astype(float)


def deflated(fn, params, x):
    network = traced_in(F64, fn, params, x, 0)
    evidence = evidence_of(params, x, network, F64, None, True)
    gram = scaled_gram(network, params, x, evidence.scale)
    return rank_by_deflation(params, x, network, gram, evidence)


@pytest.mark.parametrize(
    "seed", [11, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (7, 13))]
)
def test_a_deficient_rank_is_the_exact_one(seed, x64):
    params, x = integer_network(seed)
    want = exact_rank(np.asarray(jacobian(networks.mlp, params, x)))
    for found in (
        jax.jit(lambda w: jacobian_rank(networks.mlp, w, x))(params),
        deflated(networks.mlp, params, x),
    ):
        assert found.rank == want < found.upper and found.lower == want
        assert found.clear and not found.certain and found.gap > 1e6
        assert jnp.isnan(found.largest)  # no SVD was made


@pytest.mark.slow
def test_no_rank_where_more_is_missing_than_was_looked_for(x64):
    params, x = integer_network(0)
    first = {"a": params["Dense_0"]["kernel"] + 0.0, "b": params["Dense_1"]["kernel"]}

    def hidden(w, x):  # products that no rule of matrices sees through
        return x @ (jnp.linalg.inv(jnp.linalg.inv(w["a"].T @ w["a"])) @ w["b"][:12])[:6]

    found = deflated(hidden, first, x)
    values = np.linalg.svd(jacobian(hidden, first, x), compute_uv=False)
    lacking = 72 + 144 - (values > 1e-9 * values[0]).sum()
    assert lacking > _LEAST_BLOCK and found.rank == -1 and not found.clear


def test_a_singular_value_that_squares_to_rounding_is_left_to_an_svd(x64):
    """Two units of which one is the other but for 1e-9: no zero, and JᵀJ cannot tell."""
    rng = np.random.default_rng(1)
    params = networks.init_mlp(jax.random.key(0), (6, 24, 8), bias_std=0.3)
    params = jax.tree.map(lambda a: jnp.asarray(a, F64), params)
    kernel = np.array(params["Dense_0"]["kernel"])
    kernel[:, 1] = kernel[:, 0] + 1e-9 * rng.normal(size=6)
    params["Dense_0"]["kernel"] = jnp.asarray(kernel)
    bias = np.array(params["Dense_0"]["bias"])
    bias[1] = bias[0]
    params["Dense_0"]["bias"] = jnp.asarray(bias)
    x = rng.normal(size=(120, 6))
    assert deflated(networks.mlp, params, x).rank == -1
    found = jacobian_rank(networks.mlp, params, x)
    assert not jnp.isnan(found.largest)


def test_examples_that_prove_nothing_are_joined_by_the_others():
    """The first try takes examples evenly spaced; here these are copies of one."""
    params = networks.init_mlp(jax.random.key(0), (6, 10, 10, 4), bias_std=0.3)
    x = np.array(jax.random.normal(jax.random.key(1), (600, 6)))
    few = jacobian_rank(networks.mlp, params, x, method="certificate")
    spaced = np.arange(int(np.ceil(1.25 * 224 / 4))) * 600 // 70
    x[spaced] = x[0]
    again = jacobian_rank(networks.mlp, params, x, method="certificate")
    assert few.certain and again.certain and few.rank == again.rank == 224 - 20 - 2  # and two dead


def test_an_ensemble_of_proven_and_deficient_members_is_the_loop(x64):
    members = [integer_network(seed)[0] for seed in (0, 7, 11)]
    x = integer_network(0)[1]
    stacked = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(b, float) for b in a]), *members)
    got = jax.jit(jax.vmap(lambda w: jacobian_rank(networks.mlp, w, x)))(stacked)
    for i, member in enumerate(members):
        alone = jax.jit(lambda w: jacobian_rank(networks.mlp, w, x))(member)
        assert got.rank[i] == alone.rank and got.clear[i] == alone.clear
        assert got.certain[i] == alone.certain
    assert list(got.certain) == [True, False, False]
