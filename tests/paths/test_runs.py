"""Runs of equal path sums: windows, elementwise operations and sums, and κ of whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinv import path_kappa, path_norm
from jaxinv._numerics.scaled import Scaled
from jaxinv.paths import runs as _path_runs
from jaxinv.paths.runs import Run


def whole(rows, runs):
    """The array, with one axis, position by position."""
    kept = list(rows)
    for start, number, length in runs.values():
        kept[start : start + number] = [kept[start]] * length
    return np.array(kept)


@st.composite
def arrays(draw, positions):
    n = draw(positions)
    length = draw(st.integers(1, n))
    before = draw(st.integers(0, n - length))
    run = Run(before, draw(st.integers(1, min(3, length))), length)
    values = np.arange(1.0, 1 + n - length + run.kept)
    values[before : before + run.kept] = 100
    return values.astype(np.float32), {0: run}


@given(arrays(st.integers(2, 40)), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
       st.tuples(st.integers(-1, 4), st.integers(-1, 4)))  # fmt: skip
@settings(max_examples=60)
def test_windows_meet_the_same_in_the_shorter_array(array, size, stride, dilation, padding):
    rows, runs = array

    def meet(values):
        low, high = padding
        padded = np.pad(values, (max(low, 0), max(high, 0)))
        padded = padded[max(-low, 0) : len(padded) - max(-high, 0)]
        taps = np.arange(size) * dilation
        starts = range(0, len(padded) - taps[-1], stride)
        return np.array([padded[s + taps] for s in starts]).reshape(-1, size)

    window = {0: (size, stride, dilation, padding)}
    short, out = _path_runs.sliding(Scaled(jnp.asarray(rows), 0), runs, window)
    met = meet(np.asarray(short.mantissa))
    for start, kept, _ in out.values():
        assert (met[start : start + kept] == met[start]).all()
    expected = meet(whole(rows, runs))
    np.testing.assert_array_equal(whole(met, out).reshape(-1, size), expected)
    worth = len(expected) > 24 + 4 * size * dilation and min(padding) >= 0
    assert not worth or len(met) < len(expected)


@given(st.integers(2, 40).flatmap(lambda n: st.tuples(*(arrays(st.just(n)) for _ in range(2)))))
@settings(max_examples=40)
def test_joined_arrays_keep_a_run_where_both_have_one(pair):
    scaled = [(Scaled(jnp.asarray(rows), 0), runs) for rows, runs in pair]
    (x, y), runs = _path_runs.joined(scaled)
    total = np.asarray(x.mantissa) + np.asarray(y.mantissa)
    expected = sum(whole(*array) for array in pair)
    np.testing.assert_array_equal(whole(total, runs), expected)
    first, second = (set(range(r[0].start, r[0].start + r[0].length)) for _, r in pair)
    least = len(expected) - max(0, len(first & second) - 1)
    assert least <= len(total) <= min(least + 3, len(expected))
    counted, _ = _path_runs.counted(Scaled(total, 0), runs, (0,))
    assert counted.mantissa.sum() == expected.sum()


def conv(x, kernel, numbers=("NWC", "WIO", "NWC"), stride=1, padding="SAME", **options):
    strides = (stride,) * (kernel.ndim - 2)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def pool(x, size, stride, function, start, padding="SAME"):
    return lax.reduce_window(x, start, function, (1, size, 1), (1, stride, 1), padding)


def residual(w, x, relu, maximum):
    y = relu(conv(x, w[0], stride=2) + w[1])
    z = relu(conv(y, w[2]) + w[3])
    return (y + maximum(conv(z, w[4]), 3, 1)).mean(1) @ w[5]


def strided(w, x, relu, maximum):
    y = relu(conv(x, w[0], stride=3, padding=((4, 0),)))
    y = maximum(conv(y, w[1], padding="VALID", rhs_dilation=(3,)) * w[2], 4, 2)
    return conv(y, w[3], padding=((0, 7),)).reshape(len(x), -1) @ w[4]


def cropped_and_stretched(w, x, relu, maximum):
    y = relu(conv(x, w[0], padding=((-1, 2),)))
    y = conv(y, w[1], lhs_dilation=(2,), padding=((1, 1),))
    y = conv(relu(y), w[2], feature_group_count=2)
    return jnp.concatenate([y, maximum(y, 2, 1)], 2).sum(2) @ w[3]


def mask_of_positions(w, x, relu, maximum):
    y = relu(conv(x, w[0])) * w[1]  # a weight of its own at every position
    return (conv(y, w[2]) / 3).sum((1, 2))[:, None] * w[3]


CASES = {
    residual: [(5, 2, 4), (4,), (3, 4, 4), (1, 1, 4), (3, 4, 4), (4, 3)],
    strided: [(5, 2, 4), (3, 4, 3), (1, 1, 3), (2, 3, 2), (18, 2)],
    cropped_and_stretched: [(3, 2, 4), (4, 4, 4), (3, 2, 4), (60, 1)],
    mask_of_positions: [(3, 2, 4), (1, 32, 4), (3, 4, 2), (1,)],
}


@pytest.mark.parametrize("network", CASES, ids=lambda f: f.__name__)
def test_kappa_and_norm_are_those_of_absolute_weights_on_ones(network, x64):
    rng = np.random.default_rng(0)
    w = [rng.normal(size=shape) for shape in CASES[network]]
    ones = jnp.ones((1, 32, 2))

    def fn(w, x):
        return network(w, x, jax.nn.relu, lambda y, k, s: pool(y, k, s, lax.max, -np.inf))

    def gamma(lengths):  # every gate is open, every element of a pool may be the largest
        total = network(lengths, ones, lambda a: a, lambda y, k, s: pool(y, k, s, lax.add, 0.0))
        return total.sum()

    lengths = [jnp.asarray(abs(a)) for a in w]
    norm, kappa = jax.jit(jax.value_and_grad(gamma))(lengths)
    ours = jax.jit(lambda w: (path_norm(fn, w, ones, p=1), path_kappa(fn, w, ones, p=1)))(w)
    np.testing.assert_allclose(ours[0], norm, rtol=1e-12)
    for a, b in zip(ours[1], kappa, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_deep_convolutional_network_needs_few_positions():
    def fn(ws, x):
        for w in ws:
            x = jax.nn.relu(conv(x, w))
        return x.sum(1)

    ws = [jnp.ones((3, 2, 2))] * 4
    x = jax.ShapeDtypeStruct((1, 1000, 2), jnp.float32)
    program = jax.make_jaxpr(lambda ws: path_kappa(fn, ws, x))(ws)
    shapes = [v.aval.shape for eqn in program.eqns for v in eqn.outvars]
    assert max(shape[1] for shape in shapes if len(shape) == 3) < 20
