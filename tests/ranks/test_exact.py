"""Exact ranks: against jax.jacrev, hand values, difference quotients in Fractions; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinv import InvalidInput, UnsupportedOperation, degrees_of_freedom, jacobian_rank, networks
from jaxinv.ranks.exact import exact_rank, jacobian_modulo, rank_modulo
from jaxinv.ranks.exact_values import PRIMES
from tests.ground_truth import integer_rank
from tests.ground_truth.by_differences import (
    fractions,
    jacobian_by_differences,
    rank_of_fractions,
)
from tests.ground_truth.integer_rank import integer_jacobian
from tests.ground_truth.rank_fuzz import KINDS, cases, rank_by_differences

relu = jax.nn.relu


def rank(fn, params, x, **options):
    found = jacobian_rank(fn, params, x, method="exact", **options)
    assert bool(found.certain)
    return int(found.rank)


def integers(rng, *shape):
    return rng.integers(-3, 4, shape).astype(float)


def signed(residues, multiple):
    """Rationals with a denominator that divides `multiple`, times it, as floats."""
    for residue, p in zip(residues, PRIMES, strict=True):
        n = residue.astype(object) * multiple % p
        yield np.where(n > p // 2, n - p, n).astype(float)


def assert_equal_to_jacrev(operations, params, x, multiple=1):
    """All operations in one program; they are told apart by their rows."""

    def fn(w, x):
        return {name: f(w, x).reshape(len(x), -1) for name, f in operations.items()}

    found = jacobian_modulo(fn, params, x)
    tree = jax.jit(jax.jacrev(fn))(params, x)
    widths = {k: leaves[0].shape[1] for k, v in tree.items() if (leaves := jax.tree.leaves(v))}
    start = 0
    for name in sorted(widths):
        leaves = [np.asarray(a) for a in jax.tree.leaves(tree[name])]
        n, out = leaves[0].shape[:2]
        want = np.concatenate([a.reshape(n, out, -1) for a in leaves], 2) * multiple
        rows = found.reshape(2, n, sum(widths.values()), -1)[:, :, start : start + out]
        for got in signed(rows, multiple):
            np.testing.assert_array_equal(got, want, err_msg=name)
        start += out


@jax.custom_vjp
def gate_of_its_own(z):
    return jnp.maximum(z, 0)


# At 0 another choice than that of max.
gate_of_its_own.defvjp(
    lambda z: (jnp.maximum(z, 0), z >= 0), lambda on, g: (g * on.astype(g.dtype),)
)


@jax.custom_jvp
def gated_product(z, y):
    return jnp.abs(z) * y


def _product_rule(point, tangent):
    (z, y), (dz, dy) = point, tangent
    slope = jax.jvp(jnp.abs, (z,), (jnp.ones_like(z),))[1]
    return gated_product(z, y), slope * dz * y + jnp.abs(z) * dy


gated_product.defjvp(_product_rule)


@jax.custom_jvp
def straight_through(z):
    return jnp.floor(z)


straight_through.defjvp(lambda p, t: (straight_through(p[0]), t[0]))


def scanned(z):
    step = lambda c, a: (jnp.maximum(c, a), c * a)  # noqa: E731
    return lax.scan(step, z[0], z, reverse=True)[1]


GATES = {
    "relu": relu,
    "relu6": jax.nn.relu6,
    "own gate": gate_of_its_own,
    "own product": lambda z: gated_product(z, z[:, ::-1]),
    "max": lambda z: jnp.maximum(z, 0),
    "max of two": lambda z: jnp.maximum(z, z[:, ::-1]),
    "min": lambda z: jnp.minimum(z, 1),
    "leaky": lambda z: jnp.where(z > 0, z, z / 4),
    "abs": jnp.abs,
    "sign": lambda z: z * jnp.sign(z),
    "floor": lambda z: z * jnp.floor(z / 2) + jnp.ceil(z / 2),
    "clip": lambda z: jnp.clip(z, -1, 3),
    "clamp": lambda z: lax.clamp(-1.0, z, 3.0),
    "reduce_max": lambda z: z * z.max(-1, keepdims=True),
    "reduce_min": lambda z: z.min(0, keepdims=True) - z,
    "sort": lambda z: jnp.sort(z, -1) - jnp.sort(z, 0),
    "top_k": lambda z: lax.top_k(z, 2)[0],
    "argmax": lambda z: jnp.take_along_axis(z, jnp.argmax(z, -1)[:, None], -1),
    "median": lambda z: z - jnp.median(z[:, :3]),
    "as int": lambda z: z * (z / 2).astype(int).astype(z.dtype),
}
MOVES = {
    "square": lambda z: z**2 - z**3,
    "pow": lambda z: z**3.0,
    "stop_gradient": lambda z: z * lax.stop_gradient(z),
    "mean": lambda z: z - z.mean(-1, keepdims=True),
    "cumsum": lambda z: jnp.cumsum(z, -1) - lax.cumsum(z, 0, reverse=True),
    "concatenate": lambda z: jnp.concatenate([z[:, 2:], 2 * z[:, :2]], 1),
    "pad": lambda z: jnp.pad(z, ((0, 0), (1, 2)), constant_values=7),
    "roll": lambda z: jnp.roll(z, 1, 0) - z[::-1],
    "divide": lambda z: z / 3,
    "reciprocal": lambda z: 1 / (z * 0 + 2) * z,
    "scatter": lambda z: z.at[:, 0].set(5.0),
    "scatter-add": lambda z: z.at[:, jnp.array([0, 0])].add(z[:, 1:3]),
    "update slice": lambda z: lax.dynamic_update_slice(z, z[:, :1], (0, 2)),
    "gather": lambda z: z[:, jnp.array([3, 3, 0])],
    "cond": lambda z: lax.cond(True, lambda z: z * 2, lambda z: z, z),
    "scan": scanned,
    "remat": jax.checkpoint(lambda z: z * z),
    "masked": lambda z: jnp.where(jnp.arange(4) < 3, z, 0),
    "einsum": lambda z: jnp.einsum("ni,nj->nij", z, z),
    "batched dot": lambda z: jnp.einsum("nij,nkj->nik", z.reshape(-1, 2, 2), z.reshape(-1, 2, 2)),
}


@pytest.mark.parametrize("table", [GATES, MOVES], ids=["gates", "moves"])
def test_every_operation_has_the_derivative_of_jax_also_at_ties(table, x64):
    rng = np.random.default_rng(0)
    w, x = [integers(rng, 3, 4), integers(rng, 4)], integers(rng, 8, 3)
    operations = {k: lambda w, x, f=f: f(x @ w[0] + w[1]) for k, f in table.items()}
    z = x @ w[0] + w[1]
    assert (z == 0).any() and (z == 6).any() and (z == 3).any()
    assert_equal_to_jacrev(operations, w, x, multiple=24)


def convolution(strides, padding, dilation, groups, base=(1, 1)):
    def fn(w, x):
        return lax.conv_general_dilated(
            x, w[..., : x.shape[-1] // groups, :], strides, padding, lhs_dilation=base,
            rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    return fn


def pooled(kind, window, strides, padding):
    init = {lax.max: -jnp.inf, lax.min: jnp.inf, lax.add: 0.0}[kind]
    shape, steps = (1, *window, 1), (1, *strides, 1)

    def fn(w, x):
        h = convolution((1, 1), "VALID", (1, 1), 1)(w, x)
        return lax.reduce_window(h, init, kind, shape, steps, padding)

    return fn


def test_convolutions_and_pools_have_the_derivatives_of_jax(x64):
    rng = np.random.default_rng(1)
    operations = {
        "plain": convolution((1, 1), "SAME", (1, 1), 1),
        "strided groups": convolution((2, 1), "VALID", (1, 1), 2),
        "dilated": convolution((1, 2), ((1, 2), (0, 1)), (2, 1), 1),
        "transposed, cropped": convolution((1, 1), ((-1, 2), (0, 1)), (1, 1), 1, (1, 2)),
        "max pool": pooled(lax.max, (2, 2), (1, 1), "SAME"),
        "min pool": pooled(lax.min, (2, 1), (2, 1), "VALID"),
        "sum pool": pooled(lax.add, (2, 2), (1, 1), "SAME"),
    }
    w, x = integers(rng, 2, 2, 2, 4), integers(rng, 2, 5, 4, 2)
    assert_equal_to_jacrev(operations, w, x)


def test_the_residual_convolutional_network_has_the_jacobian_of_jax(x64):
    rng = np.random.default_rng(2)
    shapes = networks.init_cnn(jax.random.key(0), 2)
    w = jax.tree.map(lambda a: integers(rng, *a.shape), shapes)
    assert_equal_to_jacrev({"cnn": networks.cnn}, w, integers(rng, 2, 4, 4, 1), multiple=16)


# --- ranks ------------------------------------------------------------------------------------


def test_ranks_known_by_hand():
    w = [np.array([[2.0]]), np.array([[3.0]])]
    assert rank(lambda w, x: x @ w[0] @ w[1], w, np.ones((4, 1))) == 1
    assert rank(lambda w, x: w * x.sum(1, keepdims=True), np.ones(3), np.ones((2, 2))) == 3
    assert rank(lambda w, x: 0 * w + x, np.ones(3), np.ones((2, 3))) == 0
    x = np.arange(12.0).reshape(4, 3)  # of rank 2
    assert rank(lambda w, x: x @ w, np.ones((3, 5)), x) == 10


@pytest.mark.parametrize("k", [10, 30, 46, 50])
def test_features_that_differ_by_one_bit_count_twice(k):
    x = np.repeat(np.arange(1.0, 5)[:, None], 2, 1)
    x[0, 1] += 2.0**-k
    assert rank(lambda w, x: x @ w, np.ones((2, 1)), x) == 2
    x[0, 1] = x[0, 0]
    assert rank(lambda w, x: x @ w, np.ones((2, 1)), x) == 1


def test_integer_networks_have_the_rank_of_their_integer_jacobian():
    rng = np.random.default_rng(3)
    layers = [(rng.integers(-3, 4, s), rng.integers(-3, 4, s[1])) for s in ((3, 5), (5, 4), (4, 2))]
    x = rng.integers(-4, 5, (30, 3))
    params = {
        f"Dense_{i}": {"kernel": k.astype(float), "bias": b.astype(float)}
        for i, (k, b) in enumerate(layers)
    }
    want = integer_rank.exact_rank(integer_jacobian(layers, x))
    assert rank(networks.mlp, params, x.astype(float)) == want


@pytest.mark.parametrize("exponent", [1, 24, 200])
def test_rescaling_units_changes_no_rank(exponent):
    rng = np.random.default_rng(4)
    w, x = [rng.normal(size=s) for s in ((3, 4), (4, 4), (4, 2))], rng.normal(size=(24, 3))

    def net(w, x):
        return relu(relu(x @ w[0]) @ w[1]) @ w[2]

    before = rank(net, w, x)
    k = rng.integers(-exponent, exponent + 1, 4)
    moved = [np.ldexp(w[0], k), np.ldexp(w[1], -k[:, None]), w[2]]
    assert rank(net, moved, x) == before
    assert before <= sum(a.size for a in w) - 8


def test_degrees_of_freedom_take_exact_ranks():
    w = networks.init_mlp(jax.random.key(0), (3, 5, 2), bias_std=0.3)
    x = jax.random.normal(jax.random.key(1), (40, 3))
    found = degrees_of_freedom(networks.mlp, w, x, method="exact")
    assert int(found.rank) == 27 and bool(found.certain) and int(found.unexplained) == 0


def test_exact_ranks_are_those_of_singular_values_of_ordinary_networks():
    rng = np.random.default_rng(5)
    for _ in range(8):
        w, x = [rng.normal(size=s) for s in ((3, 4), (4, 2))], rng.normal(size=(20, 3))
        on = (x @ w[0] > 0).astype(float)
        by_first = np.einsum("ni,nh,ho->noih", x, on, w[1]).reshape(40, 12)
        by_second = np.einsum("nh,op->noph", np.maximum(x @ w[0], 0), np.eye(2)).reshape(40, 8)
        s = np.linalg.svd(np.concatenate([by_first, by_second], 1), compute_uv=False)
        assert rank(lambda w, x: relu(x @ w[0]) @ w[1], w, x) == (s > 1e-10 * s[0]).sum()


def test_an_index_out_of_bounds_is_refused():
    outside = jnp.array([0, 5])
    with pytest.raises(UnsupportedOperation, match="out of bounds"):
        rank(lambda w, x: jnp.take(x * w, outside, axis=1), np.ones(2), np.ones((1, 2)))


def test_networks_that_mix_examples_are_taken_whole():
    x = np.arange(8.0).reshape(4, 2) ** 2
    mixed = lambda w, x: x @ w - (x @ w)[:1]  # noqa: E731
    assert rank(mixed, np.ones((2, 3)), x) == 3 * np.linalg.matrix_rank(x - x[:1])


def test_integer_inputs_are_indices():
    table = np.arange(8.0).reshape(4, 2)
    assert rank(lambda w, x: w[x], table, np.array([0, 2, 2, 3])) == 6


def test_nothing_is_certain_of_arrays_that_were_rounded_first():
    x = np.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-40]])
    linear = lambda w, x: x @ w  # noqa: E731
    assert rank(linear, np.ones((2, 1)), x) == 2
    found = jacobian_rank(linear, np.ones((2, 1)), x, method="exact", dtype=np.float32)
    assert int(found.rank) == 1 and not bool(found.certain)


def test_auto_is_certain_where_only_exact_arithmetic_is():
    """A linear layer between two others, whose GL(2) no rescaling names."""
    rng = np.random.default_rng(6)
    w, x = [rng.normal(size=s) for s in ((3, 2), (2, 3))], rng.normal(size=(9, 3))
    found = jacobian_rank(lambda w, x: x @ w[0] @ w[1], w, x)
    assert int(found.rank) == 12 - 4 and bool(found.certain)


@settings(max_examples=13)
@given(st.integers(0, 2**32 - 1), st.sampled_from(range(len(KINDS))))
def test_exact_ranks_are_those_of_difference_quotients_in_fractions(seed, kind):
    name, draw, nets = KINDS[kind]
    network = nets[seed % len(nets)]
    with jax.enable_x64(True):
        (case,) = cases(name, draw, network, 1, np.random.default_rng(seed))
    want = rank_by_differences(case)  # None at a kink
    assert want is None or case.rank == want


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_eliminations_agree(seed):
    rng = np.random.default_rng(seed)
    n, k, m = rng.integers(1, 7, 3)
    matrix = rng.integers(-9, 10, (n, k)) @ rng.integers(-9, 10, (k, m))
    want = rank_of_fractions(fractions(matrix))
    assert [rank_modulo(matrix % p, p) for p in PRIMES] == [want, want]


def test_difference_quotients_are_derivatives():
    x = fractions(np.array([[1.0, 2.0]]))
    J = jacobian_by_differences(lambda w, _: np.maximum(x @ w[0], 0), [np.ones((2, 1))], x)
    assert J.tolist() == [[1, 2]]
    assert (
        jacobian_by_differences(lambda w, _: np.maximum(x @ w[0], 0), [np.zeros((2, 1))], x) is None
    )


def test_primes_that_disagree_prove_a_lower_bound_only(x64):
    p = float(PRIMES[0])  # as a float cannot be by accident
    found = exact_rank(lambda w, x: w * p * x, np.ones(1), np.ones((1, 1)))
    assert found == (1, False)
    got = jacobian_rank(lambda w, x: w * p * x, np.ones(2), np.array([[1.0, 1.0]]), method="exact")
    assert int(got.lower) == 2 and bool(got.certain)  # full rank needs no second prime
    one = np.array([[p, 0], [0, 0.0]])
    got = jacobian_rank(lambda w, x: x @ w, np.ones((2, 1)), one, method="exact")
    assert (int(got.rank), int(got.lower), int(got.upper)) == (1, 1, 2)
    assert not bool(got.certain)


# --- refusals -----------------------------------------------------------------------------------

CANNOT = {
    "tanh": jnp.tanh,
    "exp": jax.nn.softmax,
    "rsqrt": lambda z: z * lax.rsqrt((z * z).sum()),
    "A cast to bfloat16": lambda z: z.astype(jnp.bfloat16).astype(z.dtype),
    "A cast to float32": lambda z: z.astype(jnp.float32).astype(z.dtype),
    "A function with a derivative of its own": straight_through,
    "reduce_precision": lambda z: lax.reduce_precision(z, 8, 7),
    "infinite or no number": lambda z: jnp.where(z > 9, z, -jnp.inf),
    "divides by a value that is 0": lambda z: z / (z - z),
    "whole number": lambda z: jnp.abs(z) ** 1.5,
}


@pytest.mark.parametrize("message", CANNOT)
def test_what_is_not_exact_is_refused_by_name(message):
    with pytest.raises(UnsupportedOperation, match=message) as error:
        rank(lambda w, x: CANNOT[message](x @ w), np.ones((2, 2)), np.ones((3, 2)))
    assert "method='auto'" in str(error.value) and "test_exact.py" in str(error.value)


def test_casts_that_lose_nothing_are_exact():
    up = lambda w, x: (x @ w).astype(float)  # noqa: E731
    assert rank(up, np.ones((2, 1)), np.eye(2), dtype=np.float32) == 2


def test_values_must_be_known():
    exact = lambda w, x: jacobian_rank(lambda w, x: x @ w, w, x, method="exact").rank  # noqa: E731
    with pytest.raises(InvalidInput, match="not known inside jit, vmap or grad"):
        jax.jit(exact)(jnp.ones((2, 1)), jnp.ones((3, 2)))
    with pytest.raises(InvalidInput, match="one network at a time"):
        jax.vmap(exact, (0, None))(jnp.ones((4, 2, 1)), jnp.ones((3, 2)))


def test_what_would_take_minutes_is_refused_with_what_to_do():
    with pytest.raises(InvalidInput, match="3000 x 3000 Jacobian.*'certificate' or 'tsqr'"):
        rank(lambda w, x: w * x, np.ones(3000), np.ones((1, 3000)))
    with pytest.raises(InvalidInput, match="leave rtol out"):
        rank(lambda w, x: w * x, np.ones(2), np.ones((1, 2)), rtol=0.1)
