"""Hostile arguments: a right answer or a clear error, never a wrong number or a foreign exception.

`FUZZ_SEED=7 make test PYTEST_ARGS='-m slow tests/test_fuzz.py'` draws other cases.
"""

import gzip
import os
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv import InvalidInput, JaxinvError
from jaxinv.experiments import datasets
from tests import fuzz_cases

SEED = int(os.environ.get("FUZZ_SEED", "0"))


def check_refusal(name, call, failures):
    try:
        call()
    except JaxinvError as error:
        if len(str(error)) < 25:
            failures.append(f"{name}: says only {error}")
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
    else:
        failures.append(f"{name}: was accepted")


def check_value(name, call, failures):
    try:
        call()
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")


def damaged_files(rng, path):
    """One IDX file with a damage; the reader must refuse each."""
    whole = gzip.compress(struct.pack(">IIII", 0x0803, 2, 3, 3) + bytes(18), mtime=0)
    cut = whole[: int(rng.integers(len(whole) - 9))]
    flipped = bytearray(whole)
    flipped[int(rng.integers(10, len(whole)))] ^= 1 << int(rng.integers(8))
    sizes = gzip.compress(struct.pack(">IIII", 0x0803, *rng.integers(4, 2**32, 3)) + bytes(18))
    noise = rng.bytes(int(rng.integers(1, 99)))
    for what, data in {
        "cut": cut,
        "flipped": bytes(flipped),
        "sizes": sizes,
        "noise": noise,
    }.items():
        path.write_bytes(data)

        def read(what=what):
            found = datasets.read_idx(path, 0x0803)
            # A flipped bit that gzip's check does not cover may leave the content as it was.
            if what == "flipped" and found.shape == (2, 3, 3) and not found.any():
                raise InvalidInput("harmless damage: the content is the one that was written")

        yield f"read_idx: {what}", read


def run(rounds, values, tmp_path):
    """(number of cases, failures)."""
    rng, count, failures = np.random.default_rng(SEED), 0, []
    for _ in range(rounds):
        for name, call in fuzz_cases.refusals(rng):
            check_refusal(name, call, failures)
            count += 1
    for _ in range(values):
        for name, call in fuzz_cases.value_cases(rng, 5):
            check_value(name, call, failures)
            count += 1
        for name, call in damaged_files(rng, tmp_path / "images.gz"):
            check_refusal(name, call, failures)
            count += 1
    return count, failures


@pytest.mark.slow
def test_five_thousand_cases_are_right_or_refused(tmp_path):
    count, failures = run(rounds=6, values=300, tmp_path=tmp_path)
    print(f"{count} cases, {len(failures)} failures")
    assert not failures, "\n".join(dict.fromkeys(failures))
    assert count >= 5000


def test_some_cases_are_right_or_refused(tmp_path):
    """Every 5th refusal, and a few right values, on every run of the suite."""
    rng, failures = np.random.default_rng(SEED), []
    chosen = list(fuzz_cases.refusals(rng))[::5]
    for name, call in chosen:
        check_refusal(name, call, failures)
    for name, call in damaged_files(rng, tmp_path / "images.gz"):
        check_refusal(name, call, failures)
    assert not failures, "\n".join(failures)
    assert len(chosen) >= 150


# --- what the fuzz test found -----------------------------------------------------------

W = {"a": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), "b": np.ones((2, 1), np.float32)}
X = np.array([[1.0, 0.5], [-0.3, 2.0], [0.1, 0.2]], np.float32)


def net(w, x):
    return jnp.maximum(x @ w["a"], 0) @ w["b"]


def test_weights_of_large_norm_are_normalised_to_full_precision():
    """1 + (1/‖v‖ − 1) had lost all digits at ‖v‖ = 10⁸."""
    group = jaxinv.rescaling_group(net, W, X)
    for size in (1e4, 1e8, 1e37, 1e-30):
        found = jaxinv.weight_normalize(net, group).to_params({**W, "a": np.float32(size) * W["a"]})
        np.testing.assert_allclose(np.linalg.norm(found["a"], axis=0), 1, rtol=1e-5)


def test_units_of_any_size_are_normalised():
    """Squares of weights above 10¹⁹ overflowed, and the unit became 0."""
    group = jaxinv.rescaling_group(net, W, X)
    found = jaxinv.normalize(group, {**W, "a": np.float32(1e30) * W["a"]})
    np.testing.assert_allclose(np.linalg.norm(found.params["a"], axis=0), 1, rtol=1e-4)
    assert np.isfinite(found.params["b"]).all()


def test_a_factor_beyond_floats_meets_a_weight_that_it_suits():
    """exp(−100) is no normal float32, but 10³⁰·exp(−100) is."""
    group = jaxinv.rescaling_group(net, W, X)
    big = {"a": np.full((2, 2), 1e30, np.float32), "b": np.full((2, 1), 1e-30, np.float32)}
    moved = jaxinv.rescale(group, big, np.full(2, -100, np.float32))
    np.testing.assert_allclose(moved["a"], 1e30 * np.exp(-100.0), rtol=1e-4)
    np.testing.assert_allclose(moved["b"], 1e-30 * np.exp(100.0), rtol=1e-4)


def test_large_gradients_over_small_mantissas_do_not_overflow():
    w = {"a": W["a"], "b": np.array([[1e3], [1e-3]], np.float32)}
    tx = jaxinv.scale_by_path_kappa(net, X)
    g = {"a": np.full((2, 2), 3e30, np.float32), "b": np.zeros((2, 1), np.float32)}
    found, _ = tx.update(g, tx.init(w), w)
    np.testing.assert_allclose(found["a"][:, 0], 3e24, rtol=1e-5)
    np.testing.assert_allclose(found["a"][:, 1], 3e36, rtol=1e-5)


def test_eps_next_to_a_tiny_kappa_is_no_nan():
    w = {"a": W["a"], "b": np.full((2, 1), 1e-30, np.float32)}
    tx = jaxinv.scale_by_path_kappa(net, X, eps=1e-3)
    found, _ = tx.update(W, tx.init(w), w)
    np.testing.assert_allclose(found["a"], 1e3 * W["a"], rtol=1e-5)


def test_a_small_bias_next_to_large_sums_has_its_kappa():
    """Its share of γ² is 10⁻³⁹, below float32: κ was 0, and Path-SGD froze the bias."""

    def with_bias(w, x):
        return (x @ w["a"] + w["c"]) @ w["b"]

    a, b = np.array([[1.6e7, 2e6]], np.float32), np.array([[1.2e-4], [7e-6]], np.float32)
    w = {"a": a, "b": b, "c": np.array([3.9e-11, -4.8e-11], np.float32)}
    kappa = jaxinv.path_kappa(with_bias, w, np.zeros((1, 1), np.float32))
    np.testing.assert_allclose(kappa["c"], b[:, 0] ** 2, rtol=1e-5)


def test_weights_that_are_all_zero_have_a_balance():
    group = jaxinv.rescaling_group(net, W, X)
    found = jaxinv.balance(group, {k: 0 * v for k, v in W.items()})
    assert found.value == 0 and found.converged


def test_orbits_that_differ_little_have_a_distance():
    """Squares of differences below 10⁻²³ vanished: the distance of two networks was 0."""
    group = jaxinv.rescaling_group(net, W, X)
    small = {k: np.float32(1e-25) * v for k, v in W.items()}
    twice = {k: 2 * v for k, v in small.items()}
    assert jaxinv.distance_mod_rescaling(group, small, twice) > 1e-26


def test_a_jacobian_that_is_not_finite_has_no_rank():
    """It was 0, uncertain."""
    overflowing = {"a": np.full((2, 2), 3e38, np.float32), "b": np.full((2, 1), 3e38, np.float32)}
    found = jaxinv.jacobian_rank(net, overflowing, X, dtype=np.float32)
    assert found.rank == -1 and not found.certain
    assert "not finite" in str(found)


def test_a_rank_is_not_certain_where_weights_differ_by_more_than_digits():
    """Columns of size one next to 10³⁸ are rounding in the spectrum, and were taken for zero."""
    apart = {"a": np.float32(1e30) * W["a"], "b": W["b"]}
    found = jaxinv.jacobian_rank(net, apart, X, method="svd")
    assert not found.certain or found.rank == jaxinv.jacobian_rank(net, W, X).rank


def test_float64_of_numpy_is_float32_without_64_bit_types():
    w = {k: v.astype(np.float64) for k, v in W.items()}
    assert jaxinv.path_norm(net, w, X).dtype == jnp.float32
    with pytest.raises(InvalidInput, match="as float32, since 64-bit"):
        jaxinv.path_norm(net, {**w, "a": 1e300 * w["a"]}, X)
    assert jaxinv.jacobian_rank(net, w, X).rank == jaxinv.jacobian_rank(net, W, X).rank


def test_donated_parameters_are_refused_by_name():
    w = jax.tree.map(jnp.array, W)
    step = jax.jit(lambda w: jax.tree.map(lambda a: 2 * a, w), donate_argnums=0)
    step(w)
    if not w["a"].is_deleted():
        w["a"].delete()
    with pytest.raises(InvalidInput, match="params/a has been deleted.*donate"):
        jaxinv.path_norm(net, w, X)


def test_updates_may_be_donated():
    tx = jaxinv.path_sgd(0.1, net, X, momentum=0.9)
    w = jax.tree.map(jnp.array, W)
    expected, _ = tx.update(W, tx.init(w), w)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    found, _ = step(jax.tree.map(jnp.array, W), tx.init(w), w)
    for k in W:
        np.testing.assert_allclose(found[k], expected[k], rtol=1e-6)


def test_one_array_in_two_places_is_two_parameters():
    shared = jnp.array([[2.0]])

    def two(w, x):
        return (x @ w["u"]) @ w["v"]

    apart = {"u": jnp.array([[2.0]]), "v": jnp.array([[2.0]])}
    x = np.ones((1, 1), np.float32)
    for f in (jaxinv.path_kappa, jaxinv.jacobian):
        a, b = f(two, {"u": shared, "v": shared}, x), f(two, apart, x)
        chex.assert_trees_all_equal(a, b)
    assert jaxinv.rescaling_group(two, {"u": shared, "v": shared}, x).dim == 1


def test_what_fn_raises_is_the_cause_of_an_error_with_shapes():
    with pytest.raises(InvalidInput, match=r"KeyError.*float32\[2,2\]") as raised:
        jaxinv.jacobian(net, {"a": W["a"]}, X)
    assert isinstance(raised.value.__cause__, KeyError)
