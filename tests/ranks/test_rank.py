"""Ranks against exact ones of integer Jacobians and known values; what is certain, what not."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinv import (
    InvalidInput,
    jacobian,
    jacobian_rank,
    jacobian_spectrum,
    networks,
    rescaling_group,
)
from jaxinv.ranks.rank import METHODS
from tests.ground_truth.integer_rank import exact_rank, integer_jacobian

relu = jax.nn.relu


def integer_layers(sizes, rng, biases):
    return [
        (rng.integers(-3, 4, (m, n)), rng.integers(-3, 4, n) if biases else None)
        for m, n in zip(sizes, sizes[1:], strict=False)
    ]


def as_params(layers, scales=None):
    """The network in float64; hidden unit j of layer l times 2^scales[l][j], undone after it."""
    params, before = {}, 0
    for i, (kernel, bias) in enumerate(layers):
        after = scales[i] if scales is not None and i < len(layers) - 1 else 0
        kernel = np.ldexp(np.asarray(kernel, float), after - np.reshape(before, (-1, 1)))
        params[f"Dense_{i}"] = {"kernel": kernel}
        if bias is not None:
            params[f"Dense_{i}"]["bias"] = np.ldexp(np.asarray(bias, float), after)
        before = after
    return params


def test_the_integer_jacobian_is_that_of_the_network(x64):
    rng = np.random.default_rng(0)
    layers = integer_layers((3, 4, 4, 2), rng, True)
    x = rng.integers(-4, 5, (6, 3))
    got = jacobian(networks.mlp, as_params(layers), x.astype(float), mode="fwd")
    want = integer_jacobian([(k, b) for k, b in layers], x)
    # ravel_pytree takes "bias" before "kernel".
    order, start = [], 0
    for kernel, bias in layers:
        order += [*range(start + kernel.size, start + kernel.size + bias.size)]
        order += [*range(start, start + kernel.size)]
        start += kernel.size + bias.size
    np.testing.assert_array_equal(got, want[:, order])
    assert exact_rank(np.array([[1, 2, 3], [2, 4, 6], [0, 1, 1]])) == 2


# --- 500 networks -------------------------------------------------------------------------------

ARCHITECTURES = [(3, 5, 4, 2), (2, 3, 1), (1, 6, 1), (2, 2, 2, 1), (4, 3, 3, 2), (3, 4, 2)]


@functools.cache
def both_precisions(sizes, biases):
    def ranks(params, x):
        return (
            jacobian_rank(networks.mlp, params, x, method="svd", dtype=np.float32),
            jacobian_rank(networks.mlp, params, x, dtype=np.float64),
        )

    return jax.jit(ranks)


# Every architecture is two programs to compile; the weights cost little.
@pytest.mark.parametrize(
    ("count", "kinds"), [(200, 1), pytest.param(500, 6, marks=pytest.mark.slow)]
)
def test_a_certain_rank_is_the_exact_one_on_random_networks(count, kinds):
    """In float64 nearly all are certain; float32 is often wrong, and never wrong and certain."""
    seen = dict.fromkeys(["float32 certain", "float32 wrong", "float64 certain"], 0)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        sizes, biases = ARCHITECTURES[seed % kinds], bool(seed % 4 < 2)
        spread = int(rng.choice([0, 0, 4, 12]))
        layers = integer_layers(sizes, rng, biases)
        x = rng.integers(-4, 5, (40, sizes[0]))
        want = exact_rank(integer_jacobian(layers, x))
        scales = [rng.integers(-spread, spread + 1, n) for n in sizes[1:-1]]
        params = as_params(layers, scales)
        with jax.enable_x64(True):
            single, double = both_precisions(sizes, biases)(params, x.astype(float))
        for found in (single, double):
            assert not found.certain or int(found.rank) == want
            assert int(found.lower) <= want <= int(found.upper)
        seen["float32 certain"] += bool(single.certain)
        seen["float32 wrong"] += int(single.rank) != want
        seen["float64 certain"] += bool(double.certain)
    assert seen["float64 certain"] > 0.95 * count
    assert 0.1 * count < seen["float32 certain"] < 0.95 * count
    assert seen["float32 wrong"] <= 0.05 * count


# --- known ranks --------------------------------------------------------------------------------


# Without biases, and of these sizes: the fast exact ranks above are of a larger network.
@pytest.mark.parametrize(
    ("sizes", "bias", "want"),
    [
        pytest.param((2, 2, 2, 1), False, 6, marks=pytest.mark.slow),
        ((2, 2, 2, 1), True, 11),
        pytest.param((3, 5, 4, 2), False, 34, marks=pytest.mark.slow),
        pytest.param((3, 5, 4, 2), True, 45, marks=pytest.mark.slow),
        pytest.param((2, 3, 1), False, 6, marks=pytest.mark.slow),
        pytest.param((2, 3, 1), True, 10, marks=pytest.mark.slow),
    ],
)
def test_generic_ranks_of_small_networks(sizes, bias, want):
    keys = jax.random.split(jax.random.key(0), 20)
    x = 3 * jax.random.normal(jax.random.key(1), (400, sizes[0]))

    def member(key):
        w = networks.init_mlp(key, sizes, bias=bias, bias_std=1.0 if bias else 0.0)
        return jacobian_rank(networks.mlp, w, x, method="svd")

    found = jax.jit(jax.vmap(member))(keys)
    assert int(found.rank.max()) == want
    best = found.rank == found.upper
    assert bool(found.certain[best].all())


def gaussian_problem(sizes, bias_std, n):
    """Draws in which every unit fires on some inputs and not on others."""
    params = networks.init_mlp(jax.random.key(0 if n == 400 else 1), sizes, bias_std=bias_std)
    return params, jax.random.normal(jax.random.key(2), (n, sizes[0]))


@pytest.mark.slow
def test_3402_of_3466_proven_inside_a_jit_without_64_bits():
    """With biases; without them every method is asked below."""
    assert not jax.config.jax_enable_x64
    params, x = gaussian_problem((64, 32, 32, 10), 0.1, 1000)
    found = jax.jit(lambda w, x: jacobian_rank(networks.mlp, w, x))(params, x)
    assert (int(found.rank), bool(found.certain)) == (3402, True)
    assert (int(found.lower), int(found.upper)) == (3402, 3402)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("bias_std", [0.0, 0.1])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])  # too large for that
def test_3402_by_every_method(method, bias_std, x64):
    params, x = gaussian_problem((64, 32, 32, 10), bias_std, 1000)
    with jax.enable_x64(x64):
        found = jacobian_rank(networks.mlp, params, x, method=method)
        assert (int(found.rank), bool(found.certain)) == (3402, True)
        single = jacobian_rank(networks.mlp, params, x, method=method, dtype=np.float32)
        assert int(single.rank) == 3402 or not single.certain
    if method in ("svd", "tsqr"):
        s = np.asarray(jacobian_spectrum(networks.mlp, params, x, method=method))
        assert s.shape == (3466,) and s[3401] > 1e10 * s[3402]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias_std", [0.0, 0.1])
def test_every_method_gives_the_rank_and_tells_it_is_certain(method, bias_std):
    params, x = gaussian_problem((12, 8, 8, 4), bias_std, 400)
    found = jacobian_rank(networks.mlp, params, x, method=method)
    assert (int(found.rank), bool(found.certain)) == (212 - 16, True)
    assert (int(found.lower), int(found.upper)) == (212 - 16, 212 - 16)


@pytest.mark.parametrize(
    "method",
    # By "svd" the random networks above are of float32 as well.
    [m if m == "certificate" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
@pytest.mark.parametrize("bias_std", [0.0, 0.1])
def test_a_rank_in_float32_is_right_or_not_certain(method, bias_std):
    params, x = gaussian_problem((12, 8, 8, 4), bias_std, 400)
    single = jacobian_rank(networks.mlp, params, x, method=method, dtype=np.float32)
    assert int(single.rank) == 196 or not single.certain


def test_all_methods_give_one_spectrum_and_it_has_a_cliff():
    params, x = gaussian_problem((12, 8, 8, 4), 0.1, 400)
    svd, tsqr, gram = (
        np.asarray(jacobian_spectrum(networks.mlp, params, x, method=m))
        for m in ("svd", "tsqr", "gram")
    )
    assert svd.dtype == np.float64 and svd.shape == (212,) and (np.diff(svd) <= 0).all()
    assert svd[195] > 1e10 * svd[196]
    np.testing.assert_allclose(tsqr[:196], svd[:196], rtol=1e-10)
    np.testing.assert_allclose(gram[:196], svd[:196], rtol=1e-8)


@pytest.mark.parametrize(
    "method", [pytest.param("svd", marks=pytest.mark.slow), "tsqr", "gram", "auto"]
)
def test_fewer_rows_than_columns(method):
    params, x = gaussian_problem((12, 8, 8, 4), 0.1, 400)
    x = x[:20]
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        J = jax.jit(lambda w: jacobian(networks.mlp, w, x.astype(jnp.float64)))(double)
        want = np.linalg.matrix_rank(J)
    found = jacobian_rank(networks.mlp, params, x, method=method)
    exact = method == "auto"  # which is certain that no other row counts
    assert (int(found.rank), bool(found.clear), bool(found.certain)) == (want, True, exact)
    assert int(found.lower) == want == 79 and int(found.upper) == (79 if exact else 80)
    assert exact or "limited by 80 rows: at least 53 inputs" in str(found)


def test_the_certificate_of_fewer_rows_fails():
    params, x = gaussian_problem((12, 8, 8, 4), 0.1, 400)
    x = x[:20]
    assert int(jacobian_rank(networks.mlp, params, x, method="certificate").rank) == -1


# --- other networks -----------------------------------------------------------------------------


def batch_norm(w, x):
    h = x @ w["a"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0))
    return relu(h * w["g"] + w["b"]) @ w["o"]


def tied(w, x):
    return relu(relu(x @ w["e"]) @ w["h"]) @ w["e"].T


def cast(w, x):
    return relu(x @ w["a"]).astype(jnp.float32) @ w["o"].astype(jnp.float32)


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "name", ["residual conv", pytest.param("batch norm", marks=pytest.mark.slow), "tied"]
)
def test_rank_is_at_most_what_the_group_leaves(name, x64):
    if name == "residual conv":
        fn, x = networks.cnn, np.random.default_rng(1).normal(size=(60, 4, 4, 1))
        params = networks.init_cnn(
            jax.random.key(0), 2, num_classes=2, bias_std=0.3, dtype=jnp.float64
        )
    elif name == "batch norm":
        fn, x = batch_norm, np.random.default_rng(1).normal(size=(60, 3))
        params = draw(a=(3, 4), g=(4,), b=(4,), o=(4, 2))
    else:
        fn, x = tied, np.random.default_rng(1).normal(size=(60, 3))
        params = draw(e=(3, 4), h=(4, 4))
    group = rescaling_group(fn, params, x)
    d = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    found = jacobian_rank(fn, params, x)
    assert found.clear and found.rank <= found.upper <= d - group.dim
    assert found.lower == found.rank
    J = np.asarray(jax.jit(lambda w: jacobian(fn, w, x, mode="fwd"))(params))
    assert int(found.rank) == np.linalg.matrix_rank(J)


def test_a_network_that_casts_is_not_certain_and_says_where(x64):
    params, x = draw(a=(3, 4), o=(4, 2)), np.random.default_rng(1).normal(size=(60, 3))
    exact = jacobian_rank(lambda w, x: relu(x @ w["a"]) @ w["o"], params, x, method="svd")
    assert exact.certain and not exact.about.casts
    for method in ("svd", "auto", "certificate"):
        rounded = jacobian_rank(cast, params, x, method=method)
        assert not rounded.certain and not rounded.clear
        assert "fn casts to less than the working precision" in str(rounded)
        assert "test_rank.py" in str(rounded)
    single = jacobian_rank(cast, params, x, method="svd", dtype=np.float32)
    assert not single.about.casts


def test_rtol_decides_and_is_reported(x64):
    fn = lambda w, x: x * jnp.array([1.0, 1e-3]) @ w  # noqa: E731
    x = np.random.default_rng(0).normal(size=(30, 2))
    found = jacobian_rank(fn, jnp.ones((2, 1)), x, rtol=0.1)
    assert int(found.rank) == 1 and int(found.lower) == 2 and not found.certain
    assert float(found.tolerance) == pytest.approx(0.1 * float(found.largest))


# --- ensembles, devices, processes --------------------------------------------------------------


def test_an_ensemble_spread_over_devices_is_the_loop():
    keys = jax.random.split(jax.random.key(0), 16)
    x = jax.random.normal(jax.random.key(1), (60, 3))
    members = jax.vmap(lambda k: networks.init_mlp(k, (3, 4, 2), bias_std=0.5))(keys)
    mesh = jax.sharding.Mesh(jax.devices(), ("member",))
    spread = jax.device_put(members, NamedSharding(mesh, PartitionSpec("member")))
    ranks = jax.jit(jax.vmap(lambda w: jacobian_rank(networks.mlp, w, x, method="svd")))(spread)
    assert len(ranks.rank.sharding.device_set) == 8
    for i in (0, 15):
        alone = jacobian_rank(
            networks.mlp, jax.tree.map(lambda a, i=i: a[i], members), x, method="svd"
        )
        assert int(alone.rank) == int(ranks.rank[i])
        np.testing.assert_allclose(ranks.smallest[i], alone.smallest, rtol=1e-6)


@pytest.mark.slow  # over the devices of one process: tests/jacobians/test_jacobians.py
def test_rank_and_spectrum_from_a_gram_matrix_over_two_processes(tmp_path):
    program = textwrap.dedent("""
        import sys, numpy as np, jax
        jax.config.update("jax_enable_x64", True)
        rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from jaxinv import jacobian_gram, networks
        assert jax.process_count() == 2 and len(jax.devices()) == 8
        mesh = Mesh(jax.devices(), ("data",))
        x = np.random.default_rng(0).normal(size=(48, 3))
        w = jax.tree.map(np.asarray, networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.3))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        mine = jax.make_array_from_process_local_data(rows, x[24 * rank : 24 * rank + 24])
        gram = jacobian_gram(networks.mlp, w, mine, mesh=mesh)
        np.save(f"{out}/{rank}.npy", np.asarray(gram.addressable_data(0)))
    """)
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i), port, str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
    grams = [np.load(tmp_path / f"{i}.npy") for i in range(2)]
    np.testing.assert_array_equal(grams[0], grams[1])
    with jax.enable_x64(True):
        params = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.3)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        x = np.random.default_rng(0).normal(size=(48, 3))
        want = np.asarray(jacobian_spectrum(networks.mlp, params, x))
        rank = int(jacobian_rank(networks.mlp, params, x).rank)
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(grams[0])[::-1], 0))
    np.testing.assert_allclose(values[:rank], want[:rank], rtol=1e-6)
    assert values[rank] < 1e-6 * values[0] and rank == 22


@pytest.mark.parametrize("method", ["svd", pytest.param("auto", marks=pytest.mark.slow)])
def test_every_order_of_jit_and_vmap_gives_the_rank_of_each_member(method):
    """Also vmap of a jitted function, whose 64-bit program is already traced."""
    keys = jax.random.split(jax.random.key(0), 6)
    members = jax.vmap(lambda k: networks.init_mlp(k, (3, 4, 2), bias_std=0.5))(keys)
    x = jax.random.normal(jax.random.key(1), (2, 60, 3))

    def rank(w, x):
        return jacobian_rank(networks.mlp, w, x, method=method)

    alone = [rank(jax.tree.map(lambda a, i=i: a[i], members), x[1]) for i in range(6)]
    want = [int(found.rank) for found in alone]
    single = jax.jit(rank)
    for many in (
        jax.vmap(rank, (0, None)),
        jax.jit(jax.vmap(rank, (0, None))),
        jax.vmap(single, (0, None)),
    ):
        found = many(members, x[1])
        assert found.rank.tolist() == want
        np.testing.assert_allclose(found.smallest, [a.smallest for a in alone], rtol=1e-9)
    grid = jax.jit(jax.vmap(jax.vmap(single, (0, None)), (None, 0)))(members, x)
    assert grid.rank.shape == (2, 6) and grid.rank[1].tolist() == want
    spectra = jax.vmap(jax.jit(lambda w: jacobian_spectrum(networks.mlp, w, x[1])))(members)
    assert spectra.dtype == np.float64
    alone = jacobian_spectrum(networks.mlp, jax.tree.map(lambda a: a[2], members), x[1])
    np.testing.assert_allclose(spectra[2], alone, rtol=1e-12, atol=1e-12)


# --- refusals -----------------------------------------------------------------------------------


def test_errors_say_what_does_not_fit():
    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    fn = lambda w, x: x @ w  # noqa: E731
    for call, message in [
        (lambda: jacobian_rank(fn, w, x, method="qr"), "method must be one of auto, svd, tsqr"),
        (lambda: jacobian_rank(fn, w, x, dtype=jnp.bfloat16), "float32 or float64, not bfloat16"),
        (lambda: jacobian_rank(fn, w, x, rtol=-1.0), "rtol must be a fixed number >= 0, not -1"),
        (lambda: jacobian_rank(fn, w, x[:0]), "Pass at least one example"),
        (lambda: jacobian_rank(fn, w * jnp.nan, x), "non-finite"),
        (lambda: jacobian_spectrum(fn, w, x, method="certificate"), "a rank, not a spectrum"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            call()
