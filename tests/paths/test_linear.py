"""Linear operations whose edges are easily miscounted: partial windows and scatters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import UnsupportedOperation, path_kappa, path_norm, unit_path_norms

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


POOLS = {  # -> the hidden units that may arrive at each of two places
    "max": (lambda h, at: jnp.zeros((len(h), 2)).at[:, at].max(h), [(0, 2), (1,)]),
    "min": (lambda h, at: jnp.zeros((len(h), 2)).at[:, at].min(h), [(0, 2), (1,)]),
    "into units": (lambda h, at: h[:, 1:].at[:, at].max(h), [(0, 2, 1), (1, 2)]),
    "of segments": (lambda h, at: jax.ops.segment_max(h.T, at, 2).T, [(0, 2), (1,)]),
    "dropped": (lambda h, at: h[:, :2].at[:, at + 1].max(h, mode="drop"), [(0,), (1, 0, 2)]),
}


@pytest.mark.parametrize(("pool", "arrive"), POOLS.values(), ids=POOLS)
def test_maxima_at_constant_places_count_all_that_may_arrive(pool, arrive):
    """All paths input -> hidden -> place -> output listed; κ is the sum over those of a weight."""
    at, w = np.array([0, 1, 0]), {"in": W1, "out": W1[:2, :2] + 2}
    paths = [(i, h, place, out) for i in range(3) for place in range(2)
             for h in arrive[place] for out in range(2)]  # fmt: skip
    kappa = {name: np.zeros(np.shape(leaf)) for name, leaf in w.items()}
    for i, h, place, out in paths:
        kappa["in"][i, h] += w["out"][place, out] ** 2
        kappa["out"][place, out] += w["in"][i, h] ** 2

    def fn(w, x):
        return pool(x @ w["in"], at) @ w["out"]

    found = path_kappa(fn, w, X)
    for name in w:
        np.testing.assert_allclose(found[name], kappa[name], rtol=1e-5)
    assert squared_norm(fn, w, X) == pytest.approx(np.sum(kappa["out"] * w["out"] ** 2), rel=1e-5)


REFUSED_POOLS = {
    "threshold": lambda w, h: jnp.ones_like(h).at[:, 0].max(h[:, 1]),
    "constant": lambda w, h: h.at[:, 0].max(1.0),
    "weight": lambda w, h: h.at[:, 0].max(w[0, 0]),
    "infinite": lambda w, h: h.at[:, 0].max(jnp.inf),
    "places": lambda w, h: h.at[:, jnp.int32(w[0, 0])].max(h[:, 0]),
}


@pytest.mark.parametrize("pool", REFUSED_POOLS.values(), ids=REFUSED_POOLS)
def test_maxima_at_places_with_thresholds_or_unknown_places_are_refused(pool):
    with pytest.raises(UnsupportedOperation, match="scatter-max"):
        path_norm(lambda w, x: pool(w, x @ w), W1, X)
