"""`certain` means proven: each rule of certainty, by a function that needs it."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import jacobian_rank, networks, rescale, rescaling_group
from jaxinv._interpreter.rounding import with_rounding
from jaxinv._numerics import tolerances as policy
from jaxinv.ranks.spans import exponents_of, independent_columns, rank_of_exact
from tests.ground_truth.integer_rank import as_fractions, exact_rank, integer_jacobian
from tests.ground_truth.rank_cases import KINDS, draw

SPECTRA = ("svd", "tsqr", "gram", "auto")


def linear(w, x):
    return x @ w


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(float)


# --- the fuzz -----------------------------------------------------------------------------------


def check(kind, seed, method, dtype, sizes=None, biases=None):
    """Is the rank of a network of this kind certain? Wrong bounds or certainty raise."""
    layers, x = draw(kind, np.random.default_rng([KINDS.index(kind), seed]), sizes, biases)
    rational = [(as_fractions(k), None if b is None else as_fractions(b)) for k, b in layers]
    want = exact_rank(integer_jacobian(rational, as_fractions(x)))
    params = {
        f"Dense_{i}": {"kernel": k} if b is None else {"kernel": k, "bias": b}
        for i, (k, b) in enumerate(layers)
    }
    found = jacobian_rank(networks.mlp, params, x, method=method, dtype=dtype)
    assert int(found.lower) <= want <= int(found.upper), (kind, seed, method, want, str(found))
    assert not found.certain or int(found.rank) == want, (kind, seed, method, want, str(found))
    return bool(found.certain)


@pytest.mark.parametrize(
    "kind",
    # Of what is combined of two or three, other tests have the parts.
    [k if " " not in k else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_a_certain_rank_is_exact_on_networks_of_every_kind(kind, x64):
    counts = [check(kind, seed, "auto", np.float64, (3, 4, 2), True) for seed in range(6)]
    counts += [check(kind, seed, "auto", np.float64, (2, 3, 2, 1), False) for seed in range(6)]
    [check(kind, seed, "auto", np.float32, (3, 4, 2), True) for seed in range(6)]
    if kind in ("plain", "rescaled", "duplicated", "zero"):
        assert all(counts)


@pytest.mark.slow
@pytest.mark.parametrize("method", (*SPECTRA, "certificate"))
@pytest.mark.parametrize("kind", KINDS)
def test_certain_ranks_of_thousands_of_networks(kind, method, x64):
    counts = [check(kind, seed, method, np.float64) for seed in range(300)]
    [check(kind, seed, method, np.float32) for seed in range(300)]
    if method == "auto" and kind in ("plain", "rescaled", "duplicated", "zero"):
        assert sum(counts) >= 0.95 * 300


# --- a rule each --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SPECTRA)
def test_a_gap_is_no_proof(method, x64):
    """Two features 2^-46 apart: a gap of 10^15, and rank 2."""
    x = integers(0, 20, 2)
    x[:, 1] = x[:, 0]
    x[0, 1] += 2.0**-46
    found = jacobian_rank(linear, jnp.ones((2, 1)), jnp.array(x) / 3 * 3, method=method)
    assert not (found.certain and int(found.rank) == 1)


def test_clear_is_said_of_a_gap_and_certain_is_not(x64):
    def twin(w, x):
        return x @ (w["a"] + w["b"])

    x = np.random.default_rng(0).normal(size=(20, 2))
    found = jacobian_rank(twin, {"a": jnp.ones((2, 1)), "b": jnp.ones((2, 1))}, x, method="svd")
    assert int(found.rank) == 2 and found.clear and not found.certain
    assert "rank 2 (clear, not proven): 2 proven from below, at most 4" in str(found)


@pytest.mark.parametrize("method", SPECTRA)
def test_noise_of_a_decomposition_is_no_rank(method, x64):
    x = integers(0, 20, 1) * [1, 3, 5, 7]
    found = jacobian_rank(linear, jnp.ones((4, 1)), x, method=method)
    assert int(found.lower) <= 1 and not (found.certain and int(found.rank) > 1)


@pytest.mark.parametrize("method", SPECTRA)
def test_rounding_shared_by_both_modes_is_no_rank(method, x64):
    """3a − 3b and 5a − 5b are proportional; with a and b near 2^60 only their rounding is not."""

    def net(w, x):
        a, b = x[:, :1], x[:, 1:]
        return jnp.concatenate([3 * a - 3 * b, 5 * a - 5 * b], 1) @ w

    x = integers(1, 30, 2) * 2.0**8 + 2.0**60
    found = jacobian_rank(net, jnp.ones((2, 1)), x, method=method)
    assert int(found.lower) <= 1 and not (found.certain and int(found.rank) == 2)


def test_a_value_near_the_error_is_not_firm(x64):
    x = np.eye(2) * [1.0, 1.0]

    def net(w, x):
        # The error of the second column is a fifth of its size: it cancels 2^51 and more.
        big = 2.0**51 + 1 / 3
        second = (x[:, 1:] / 3 + big) - big
        return jnp.concatenate([x[:, :1], second], 1) @ w

    found = jacobian_rank(net, jnp.ones((2, 1)), x, method="svd")
    assert found.error > 0.1 * found.smallest or int(found.lower) < 2
    assert not found.certain


@pytest.mark.parametrize(
    "method",
    [m if m in ("auto", "certificate") else pytest.param(m, marks=pytest.mark.slow)
     for m in (*SPECTRA, "certificate")],
)  # fmt: skip
def test_zeros_of_an_underflow_are_not_dead(method, x64):
    def soft(w, x):
        return jax.nn.softmax(2000.0 * (x @ w))

    x = integers(8, 12, 2) + 0.5
    found = jacobian_rank(soft, jnp.array(integers(7, 2, 3)), x, method=method)
    assert not found.certain and not found.clear
    assert "may have underflowed" in str(found) or method != "auto"


def test_zeros_of_a_saturation_are_not_dead(x64):
    x = integers(8, 12, 2) + 0.5

    def saturated(w, x):
        return jnp.tanh(100 * (x @ w))

    found = jacobian_rank(saturated, jnp.ones((2, 1)), 1 + abs(x), method="svd")
    assert not found.certain and int(found.lower) == 0 and int(found.upper) == 2
    tiny = jacobian_rank(lambda w, x: x @ (w * w * w), jnp.array([[1e-200], [1.0]]), x)
    assert not tiny.certain or int(tiny.rank) == 2


def test_a_column_that_rounding_may_have_made_zero_is_not_clear(x64):
    """Whatever the gap: beside it the derivative by the other parameter is 1 and exact."""

    def net(w, x):
        return jnp.concatenate([x * w[0], jnp.tanh(100 * x * w[1])], 1)

    found = jacobian_rank(net, jnp.ones(2), 1 + abs(integers(8, 12, 1)), method="svd")
    assert (int(found.rank), int(found.lower), int(found.upper)) == (1, 1, 2)
    assert found.gap == np.inf and found.error < 1e-9 and not found.clear


def test_zeros_without_rounding_are_dead(x64):
    x = integers(3, 30, 3)
    x[:, 1] = 0
    found = jacobian_rank(linear, jnp.ones((3, 2)), x, method="svd")
    assert (int(found.rank), int(found.upper), bool(found.certain)) == (4, 4, True)


def test_the_number_of_rows_is_a_proof(x64):
    x = np.random.default_rng(0).normal(size=(2, 5))
    for method in SPECTRA:
        found = jacobian_rank(linear, jnp.ones((5, 1)), x, method=method)
        assert (int(found.rank), bool(found.certain)) == (2, True)
        assert found.gap == np.inf  # of two singular values none is left to be zero
        assert "limited by 2 rows: at least 5 inputs needed for 5 parameters" in str(found)


def test_frozen_features_in_bf16_are_not_certain(x64):
    B = np.random.default_rng(5).normal(size=(3, 6))

    def head(w, x):
        return (x.astype(jnp.bfloat16) @ jnp.asarray(B, jnp.bfloat16)).astype(x.dtype) @ w

    x = np.random.default_rng(6).normal(size=(50, 3))
    for method in (*SPECTRA, "certificate"):
        found = jacobian_rank(head, jnp.ones((6, 2)), x, method=method)
        assert not found.certain and "cast: " in str(found) and "test_certainty.py" in str(found)


def test_nothing_is_proven_of_inputs_rounded_to_float32(x64):
    def difference(w, x):
        return (x[:, :1] - x[:, 1:]) * w

    x = jnp.array([[2.0**30, 2.0**30 + 1]] * 3)
    assert int(jacobian_rank(difference, jnp.ones(1), x).rank) == 1
    found = jacobian_rank(difference, jnp.ones(1), x, dtype=np.float32)
    assert not found.certain and int(found.lower) <= 1 <= int(found.upper)
    assert "rounded to the working precision first" in str(found)


def test_an_exact_rank_asks_for_an_exact_jacobian(x64):
    """x and x/3 are proportional; their floats are not, so elimination would count 2."""
    x = np.random.default_rng(0).normal(size=(20, 1))
    net = lambda w, x: jnp.concatenate([x, x * 0.1], 1) @ w  # noqa: E731
    found = jax.jit(lambda x: jacobian_rank(net, jnp.ones((2, 1)), x))(x)
    assert int(found.rank) == 1 and int(found.upper) == 2 and not found.certain


# --- the count of rescalings --------------------------------------------------------------------


@pytest.mark.parametrize("shift", [5, 14])
def test_the_certificate_does_not_depend_on_the_rescaling(shift):
    """Nearly parallel tangents: a count by floating point loses one, and 'proves' one too many."""
    params = networks.init_mlp(jax.random.key(0), (3, 6, 6, 2))
    x = jax.random.normal(jax.random.key(1), (100, 3))
    group = rescaling_group(networks.mlp, params, x)
    u = jnp.zeros(group.dim, jnp.int32).at[:6].set(-shift).at[6:].set(shift)
    before = jacobian_rank(networks.mlp, params, x, method="certificate")
    after = jacobian_rank(networks.mlp, rescale(group, params, u, base=2), x, method="certificate")
    assert before.certain and after.certain and int(before.rank) == int(after.rank)
    assert int(after.rank) <= 80 - 12


def test_the_span_is_the_rank_of_the_exponents_on_live_parameters():
    params = networks.init_mlp(jax.random.key(0), (3, 4, 4, 2))
    group = rescaling_group(networks.mlp, params, np.zeros((1, 3)))
    B, rng = exponents_of(group), np.random.default_rng(0)
    spans = []
    for share in (0.05, 0.1, 0.2, 0.5, 1.0):
        live = rng.random(len(B)) < share
        found = independent_columns(B, jnp.asarray(live))
        spans.append(int(found.sum()))
        assert spans[-1] == np.linalg.matrix_rank(np.where(live[:, None], B, 0))
        assert np.linalg.matrix_rank(np.where(live[:, None], B, 0)[:, found]) == spans[-1]
    assert min(spans) < 8 == max(spans)


def test_units_without_weights_leave_no_rescaling(x64):
    rng = np.random.default_rng(2)
    layers = [rng.normal(size=(3, 4)), rng.normal(size=(4, 2))]
    layers[0][:, 1], layers[1][1] = 0, 0
    net = lambda w, x: jax.nn.relu(x @ w[0]) @ w[1]  # noqa: E731
    x = rng.normal(size=(60, 3))
    found = jacobian_rank(net, [jnp.array(a) for a in layers], x, method="svd")
    assert found.certain and int(found.rank) == 15 - 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_of_exact_floats_are_those_of_rational_numbers(dtype, x64):
    rng = np.random.default_rng(0)
    for k in range(4):
        low = rng.integers(-9, 10, (8, k)) @ rng.integers(-9, 10, (k, 6))
        M = np.ldexp(low.astype(dtype), rng.integers(-20, 21, (8, 1)))
        found = rank_of_exact(jnp.asarray(M))
        assert (int(found.rank), bool(found.agreed)) == (exact_rank(as_fractions(M)), True)


# --- the bound on rounding ----------------------------------------------------------------------


def test_the_bound_on_rounding_holds_and_is_0_where_nothing_is_rounded():
    def net(w, x):
        h = jax.nn.relu(x @ w["a"] - 3.0)
        return jnp.tanh(h @ w["b"]).sum() / 7

    rng = np.random.default_rng(0)
    w = {"a": rng.normal(size=(5, 6)), "b": rng.normal(size=(6, 2))}
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w)
    x = jnp.asarray(rng.normal(size=(9, 5)) + 100, jnp.float32)
    with jax.enable_x64(True):
        want = net(jax.tree.map(lambda a: a.astype(jnp.float64), single), x.astype(jnp.float64))
    value, error = jax.jit(lambda w, x: with_rounding(net, w, x))(single, x)
    assert abs(float(value) - float(want)) <= float(error) < 1e-2
    _, error = with_rounding(lambda x: (x * 2.0**-20) @ jnp.ones(5, jnp.float32), jnp.round(x))
    assert error.shape == (9,) and (error == 0).all()


# --- no hang ------------------------------------------------------------------------------------


def ranks_under_a_watchdog(calls, sizes):
    program = textwrap.dedent(f"""
        import os, threading, time
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        import jax, numpy as np
        from jaxinv import jacobian_rank, jacobian_spectrum, networks
        keys = jax.random.split(jax.random.key(0), 4)
        members = jax.vmap(lambda k: networks.init_mlp(k, {sizes}, bias_std=0.3))(keys)
        x = jax.random.normal(jax.random.key(1), (30, {sizes}[0]))
        def ranks(w):
            spectra = [jacobian_spectrum(networks.mlp, w, x, method=m, dtype=t)
                       for m in ("svd", "gram") for t in (np.float32, np.float64)]
            return spectra, jacobian_rank(networks.mlp, w, x, method="svd", dtype=np.float32)
        compiled = jax.jit(jax.vmap(ranks)).lower(members).compile()
        last = [time.time()]
        def watch():
            while time.time() - last[0] < 20:
                time.sleep(0.5)
            os._exit(9)
        threading.Thread(target=watch, daemon=True).start()
        for _ in range({calls}):
            jax.block_until_ready(compiled(members))
            last[0] = time.time()
        os._exit(0)
    """)
    return subprocess.run([sys.executable, "-c", program], timeout=600, check=False).returncode


def test_independent_decompositions_under_vmap_do_not_wait_for_each_other():
    assert ranks_under_a_watchdog(4, (8, 12, 8)) == 0


@pytest.mark.slow
def test_fifty_calls_of_many_large_decompositions_do_not_hang():
    assert ranks_under_a_watchdog(50, (12, 14, 8)) == 0


def test_every_flag_has_a_text_or_is_silent():
    silent = policy.LIMITED_BY_ROWS | policy.MEASURED
    flags = [v for k, v in vars(policy).items() if k.isupper() and isinstance(v, int) and k not in
             ("COUNTS",)]  # fmt: skip
    assert sum(flags) == 2 ** len(flags) - 1
    assert all(policy.reasons(v) or v & silent for v in flags)
