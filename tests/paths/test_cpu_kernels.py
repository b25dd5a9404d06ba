"""Convolutions and dense layers as matrix products: values, derivatives, and where they apply."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import path_kappa
from jaxinv.paths import cpu_kernels

RNG = np.random.default_rng(0)


def positive(*shape):
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def conv(x, k, numbers, **options):
    return lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options)


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
SAME = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))}
APPLIES = {
    "3×3": (NHWC, (1, 2, 3, 2), (3, 3, 2, 6), SAME),
    "3×3, channels first": (NCHW, (1, 2, 2, 3), (6, 2, 3, 3), SAME),
    "transposed output": (("NHWC", "HWIO", "NCHW"), (1, 2, 3, 2), (3, 3, 2, 6), SAME),
    "stride 2, one-sided padding": (NHWC, (1, 5, 4, 2), (3, 2, 2, 12),
                                    {"window_strides": (2, 1), "padding": ((0, 1), (2, 0))}),
    "channels before taps": (("NHWC", "IHWO", "NHWC"), (1, 2, 2, 2), (2, 3, 3, 6), SAME),
    "width before height": (("NHWC", "WHIO", "NHWC"), (1, 2, 3, 2), (3, 2, 2, 6),
                            {"window_strides": (1, 1), "padding": ((1, 0), (1, 1))}),
    "dilated": (NHWC, (1, 5, 5, 2), (2, 2, 2, 9),
                {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)}),
    "1×1": (NHWC, (1, 4, 4, 3), (1, 1, 3, 2), {"window_strides": (2, 2), "padding": "VALID"}),
    "one dimension": (("NWC", "WIO", "NWC"), (1, 4, 2), (3, 2, 5),
                      {"window_strides": (1,), "padding": ((1, 1),)}),
}  # fmt: skip
FALLS_BACK = {
    "groups": (NHWC, (1, 2, 2, 2), (3, 3, 1, 6), {**SAME, "feature_group_count": 2}),
    "batch": (NHWC, (2, 2, 2, 2), (3, 3, 2, 6), SAME),
    "transposed": (NHWC, (1, 2, 2, 2), (3, 3, 2, 60), {**SAME, "lhs_dilation": (2, 2)}),
    "cropped": (NHWC, (1, 4, 4, 2), (2, 2, 2, 60),
                {"window_strides": (1, 1), "padding": ((-1, 0), (0, 0))}),
    "more positions than features": (NHWC, (1, 4, 4, 2), (3, 3, 2, 6), SAME),
    "outputs between taps": (("NHWC", "HOWI", "NHWC"), (1, 2, 2, 2), (3, 6, 3, 2), SAME),
}  # fmt: skip


def equation_of(numbers, data, kernel, options):
    jaxpr = jax.make_jaxpr(lambda x, k: conv(x, k, numbers, **options))(data, kernel)
    eqn = jaxpr.jaxpr.eqns[-1]
    return SimpleNamespace(name=eqn.primitive.name, params=eqn.params,
                           outputs=[v.aval for v in eqn.outvars])  # fmt: skip


@pytest.mark.parametrize("case", APPLIES)
def test_a_convolution_of_patches_and_its_gradients_are_those_of_the_convolution(case):
    numbers, data, kernel, options = APPLIES[case]
    x, k = positive(*data), positive(*kernel)
    eqn = equation_of(numbers, x, k, options)
    y, pull_back = jax.vjp(lambda x, k: conv(x, k, numbers, **options), x, k)
    ours, ours_back = jax.vjp(lambda x, k: cpu_kernels.convolution(eqn, x, k), x, k)
    np.testing.assert_allclose(ours, y, rtol=1e-6)
    cotangent = positive(*y.shape)
    for a, b in zip(ours_back(cotangent), pull_back(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("case", FALLS_BACK)
def test_other_convolutions_are_left_to_xla(case):
    numbers, data, kernel, options = FALLS_BACK[case]
    x, k = positive(*data), positive(*kernel)
    assert cpu_kernels.convolution(equation_of(numbers, x, k, options), x, k) is None


@pytest.mark.parametrize("rows", [1, 3])
def test_matmul_has_the_derivatives_of_a_product_in_both_modes_and_twice(rows):
    a, w = positive(rows, 4), positive(4, 5)
    directions = (positive(rows, 4), positive(4, 5))
    plain, ours = (lambda a, w: a @ w), cpu_kernels.matmul
    for f in (lambda f: jax.jvp(f, (a, w), directions)[1],
              lambda f: jax.jvp(lambda w: f(a, w), (w,), directions[1:])[1],
              lambda f: jax.grad(lambda a: (f(a, w) ** 2).sum())(a),
              lambda f: jax.hessian(lambda w: (f(a, w) ** 2).sum())(w),
              lambda f: jax.vmap(f, (None, 0))(a, jnp.stack([w, 2 * w]))):  # fmt: skip
        np.testing.assert_allclose(f(ours), f(plain), rtol=1e-5)


def test_large_layers_of_a_network_take_this_way_and_give_the_same_kappa(monkeypatch):
    numbers = NHWC
    w = {"conv": positive(3, 3, 2, 6), "dense": positive(6, 3)}

    def fn(w, x):
        h = jax.nn.relu(conv(x, w["conv"], numbers, **SAME))
        return h.sum((1, 2)) @ w["dense"]

    x = jnp.ones((4, 2, 2, 2))
    plain = path_kappa(fn, w, x)
    taken = []
    monkeypatch.setattr(cpu_kernels, "SMALLEST", 0)
    product = cpu_kernels.product
    monkeypatch.setattr(cpu_kernels, "product", lambda *a: taken.append(product(*a)) or taken[-1])
    jax.clear_caches()  # the program of `plain` would serve again
    chex.assert_trees_all_close(path_kappa(fn, w, x), plain, rtol=1e-6)
    assert [t is not None for t in taken] == [jax.default_backend() == "cpu"] * 2
