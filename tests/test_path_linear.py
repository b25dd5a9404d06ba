"""Linear operations whose edges are easily miscounted: partial windows and scatters."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import path_norm, unit_path_norms

W1 = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
X = np.ones((4, 3), np.float32)


def squared_norm(fn, params, x):
    return float(path_norm(fn, params, x)) ** 2


def windows_norm(windows, divisors=None):
    """γ_p^p of averages over windows of inputs of weight one, p = 2: Σ_windows n/k²."""
    divisors = divisors or [len(w) for w in windows]
    return sum(len(w) / k**2 for w, k in zip(windows, divisors, strict=True))


def test_adaptive_average_pooling_of_ten_into_four():
    windows = [range(i * 10 // 4, -((-(i + 1) * 10) // 4)) for i in range(4)]

    def fn(w, x):
        h = x * w
        return jnp.stack([h[:, list(r)].mean(axis=1) for r in windows], axis=1)

    one, x = np.ones(1, np.float32), np.ones((1, 10), np.float32)
    assert [len(r) for r in windows] == [3, 3, 3, 3]
    np.testing.assert_allclose(squared_norm(fn, one, x), windows_norm(windows), rtol=1e-6)


@pytest.mark.parametrize("counted", [True, False])
def test_average_pooling_with_a_partial_last_window(counted):
    """ceil_mode: seven inputs in windows of three; the last holds one, divided by three or one."""

    def fn(w, x):
        add = partial(lax.reduce_window, init_value=0.0, computation=lax.add)
        geometry = ((1, 3), (1, 3), ((0, 0), (0, 2)))
        sums = add(x * w, window_dimensions=geometry[0], window_strides=geometry[1],
                   padding=geometry[2])  # fmt: skip
        counts = add(jnp.ones_like(x), window_dimensions=geometry[0], window_strides=geometry[1],
                     padding=geometry[2])  # fmt: skip
        return sums / (3.0 if counted else counts)

    one, x = np.ones(1, np.float32), np.ones((1, 7), np.float32)
    windows, last = [range(3), range(3), range(1)], 3 if counted else 1
    expected = windows_norm(windows, [3, 3, last])
    np.testing.assert_allclose(squared_norm(fn, one, x), expected, rtol=1e-6)


SCATTERS = {
    "set": lambda h: jnp.zeros((h.shape[0], 5)).at[:, np.array([0, 2, 4])].set(h),
    "add": lambda h: jnp.zeros((h.shape[0], 2)).at[:, np.array([0, 1, 0])].add(h),
    "add to a unit": lambda h: h.at[:, 0].add(h[:, 1]),
    "set a constant": lambda h: h.at[:, 0].set(0.0),
    "one slice": lambda h: h.at[:, 1:].set(h[:, :-1]),
    "dynamic slice": lambda h: lax.dynamic_update_slice(jnp.zeros((h.shape[0], 5)), h, (0, 2)),
}


@pytest.mark.parametrize("scatter", SCATTERS.values(), ids=SCATTERS)
def test_scatter_with_constant_indices(scatter):
    """No weight is involved, so the same scatter of the sums gives the expected sums."""
    sums = np.square(W1).sum(0)
    norms = unit_path_norms(lambda w, x: scatter(x @ w), W1, X)
    np.testing.assert_allclose(norms**2, scatter(jnp.asarray(sums)[None])[0], rtol=1e-5)
