"""Sums of squared gradients without the gradients, against the gradients of every example."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv._numerics import scaled
from jaxinv.paths import squared_gradients
from jaxinv.paths.squared_gradients import mean_squares


def dense(w, x):
    return jnp.tanh(x @ w[0] + w[1]) @ w[2]


def moved(w, x):
    """Transposed, reshaped, from the other side."""
    h = jnp.tanh(x @ w[0].T) * w[1]
    return jnp.tanh(h @ w[2].reshape(3, 4)) @ jnp.swapaxes(w[3], 0, 2).reshape(4, -1)


def tied(w, x):
    return jnp.tanh(x @ w[0]) @ w[0].T @ w[0]


def heads(w, x):
    """(n, positions, features): three projections, per head, and a token mixer from the left."""
    q, k, v = (jnp.einsum("npd,dhc->nphc", x, a) for a in w[:3])
    scores = jax.nn.softmax(jnp.einsum("nphc,nqhc->nhpq", q, k))
    y = jnp.einsum("nhpq,nqhc->nphc", scores, v)
    y = jnp.einsum("nphc,hce->nphe", y, w[3])  # a matrix per head
    return jnp.einsum("qp,nphe->nqhe", w[4], y)


def convolution(w, x, **options):
    y = lax.conv_general_dilated(
        x, w[0], padding=((1, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
    return jnp.tanh(y + w[1]).mean(axis=(1, 2)) @ w[2]


def table(w, x):
    """Rows of a table, a scale, and a product inside of a loop."""
    h = w[0][jnp.argmax(x, axis=-1)] * w[1]
    h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ w[2]), None), h, None, length=2)
    return h


CASES = {
    "dense": (dense, [(3, 4), (4,), (4, 2)], (3,)),
    "moved": (moved, [(3, 3), (3,), (12,), (2, 2, 2)], (3,)),
    "tied": (tied, [(3, 4)], (3,)),
    "heads": (heads, [(4, 2, 3)] * 3 + [(2, 3, 2), (5, 5)], (5, 4)),
    "strides": (
        partial(convolution, window_strides=(2, 1), rhs_dilation=(1, 2)),
        [(3, 2, 2, 4), (4,), (4, 2)],
        (5, 4, 2),
    ),
    "groups": (
        partial(convolution, window_strides=(1, 1), feature_group_count=2, lhs_dilation=(2, 1)),
        [(3, 2, 2, 6), (6,), (6, 2)],
        (4, 4, 4),
    ),
    "table": (table, [(5, 3), (3,), (3, 3)], (5,)),
}
SLOW = ("moved", "strides", "table")


def problem(name, dtype, n=7):
    fn, shapes, x = CASES[name]
    rng = np.random.default_rng(0)
    w = [jnp.asarray(rng.normal(size=s) / 2, dtype) for s in shapes]
    return fn, w, jnp.asarray(rng.normal(size=(n, *x)), dtype)


def by_every_example(fn, w, x, signs, *, centered):
    def one(x, signs):
        return jax.grad(lambda w: fn(w, x[None]).ravel() @ signs)(w)

    slopes = jax.vmap(one)(x, signs)
    if centered:
        slopes = jax.tree.map(lambda g: g - g.mean(axis=0), slopes)
    return jax.tree.map(lambda g: (g**2).mean(axis=0), slopes)


def found(fn, w, x, centered, probes=1, key=None):
    key = jax.random.key(3) if key is None else key

    def run(w, x):
        parts = mean_squares(lambda w, x: [fn(w, x[0])], w, [x], x.dtype, centered, probes, key)
        return [scaled.value(s) for s in parts]

    return jax.jit(run)(w, x)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    "name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_squares_are_those_of_the_gradients_of_every_example(name, centered, monkeypatch):
    monkeypatch.setattr(squared_gradients, "_MOST_NUMBERS", 200)  # a few examples at a time

    def compare(dtype, rtol):
        fn, w, x = problem(name, dtype)
        size = fn(w, x)[0].size
        shape = (size,) if centered else (len(x), size)
        (row,) = jax.random.split(jax.random.key(3), 1)
        signs = jnp.broadcast_to(jax.random.rademacher(row, shape, dtype), (len(x), size))
        expected = jax.jit(partial(by_every_example, fn, centered=centered))(w, x, signs)
        for a, b in zip(found(fn, w, x, centered), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * abs(np.asarray(b)).max())

    with jax.enable_x64(True):
        compare(jnp.float64, 1e-12)
    if not centered:
        compare(jnp.float32, 1e-5)


def test_all_units_or_some_random_signs():
    fn, w, x = problem("dense", jnp.float32)
    size = 2
    exact = sum(
        np.asarray(
            by_every_example(fn, w, x, jnp.eye(size)[jnp.full(len(x), v)], centered=False)[0]
        )
        for v in range(size)
    )
    np.testing.assert_allclose(found(fn, w, x, False, None)[0], exact, rtol=1e-5)
    many = found(fn, w, x, False, 3000)[0]
    np.testing.assert_allclose(many, exact, rtol=0.15)


@pytest.mark.parametrize("name", ["dense", "groups"])
def test_layers_make_no_gradient_for_every_example(name, monkeypatch):
    """Nothing in the program has as many numbers as all these gradients."""
    monkeypatch.setattr(squared_gradients, "_MOST_NUMBERS", 2000)
    fn, w, x = problem(name, jnp.float32, n=64)

    def run(w, x):
        units = lambda w, x: [fn(w, x[0])]  # noqa: E731
        return mean_squares(units, w, [x], x.dtype, False, 1, jax.random.key(0))

    text = str(jax.make_jaxpr(run)(w, x))
    assert f"64,{','.join(map(str, w[0].shape))}]" not in text


def test_units_rescaled_by_any_powers_of_two_keep_their_digits():
    fn, w, x = problem("dense", jnp.float32)
    linear = lambda w, x: x @ w[0] @ w[2] + w[1][:2]  # noqa: E731
    k = jnp.array([40.0, -40.0, 0.0, 20.0])
    far = [w[0] * 2.0**k, w[1], w[2] * 2.0 ** -k[:, None]]
    one, other = found(linear, w, x, False), found(linear, far, x, False)
    np.testing.assert_array_equal(one[0], other[0] * 4.0**k)
    np.testing.assert_array_equal(one[2], other[2] * 4.0 ** -k[:, None])
