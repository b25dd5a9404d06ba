"""Jacobians and their products against jax.jacfwd, and against each other."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    jacobian,
    jacobian_gram,
    jacobian_operator,
    networks,
    tangent_kernel,
)
from jaxinv._interpreter.walk import trace
from jaxinv.jacobians import kernel_factors

relu = jax.nn.relu

# Compiled whole: operation by operation they take several times as long.
jacobian_of = jax.jit(jacobian, static_argnums=0, static_argnames=("mode", "chunk"))
gram_of = jax.jit(jacobian_gram, static_argnums=0, static_argnames="chunk")
kernel_of = jax.jit(tangent_kernel, static_argnums=0, static_argnames=("chunk", "factored"))


def reference(fn, params, x):
    """`jax.jacfwd` of everything flattened; outputs in the order of the examples."""
    flat, unravel = ravel_pytree(params)

    def f(v):
        leaves = jax.tree.leaves(fn(unravel(v), x))
        return jnp.concatenate([y.reshape(y.shape[0], -1) for y in leaves], 1).ravel()

    return jax.jit(jax.jacfwd(f))(flat)


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=is_shape)


def custom(w, x):
    """Derivatives that are not those of the program: they must be kept."""

    @jax.custom_jvp
    def g(h):
        return jnp.sin(h)

    g.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 7.0 * tangents[0]))
    return jax.checkpoint(lambda h: jnp.tanh(h) @ w["o"])(g(x @ w["a"]))


def conv(x, kernel, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)


def batch_norm(w, x):
    h = x @ w["a"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)
    return relu(h) @ w["o"]


def two_outputs(w, x):
    h = relu(x["left"] @ w["a"]) + x["right"]
    return {"sum": h.sum(1), "map": (h @ w["o"])[:, None, :]}


def positions(w, x):
    """A dense layer on every position, its kernel transposed, inside a nested jit."""
    h = jax.jit(lambda k, x: relu(jnp.einsum("btc,dc->btd", x, k)))(w["a"], x)
    return h.reshape(x.shape[0], -1) @ w["o"]


NETWORKS = {
    "dense": (networks.mlp, {
        "Dense_0": {"kernel": (3, 5), "bias": (5,)}, "Dense_1": {"kernel": (5, 2), "bias": (2,)},
    }, (3,)),
    "conv": (
        lambda w, x: relu(conv(relu(conv(x, w["a"])), w["b"], 2)).reshape(x.shape[0], -1) @ w["o"],
        {"a": (3, 3, 1, 4), "b": (3, 3, 4, 5), "o": (20, 2)}, (4, 4, 1),
    ),
    "shared kernel": (
        lambda w, x: relu(relu(x @ w["a"]) @ w["a"]) @ w["o"], {"a": (3, 3), "o": (3, 2)}, (3,),
    ),
    "weight on the left": (
        lambda w, x: (w["o"] @ relu(w["a"] @ x.T)).T, {"a": (4, 3), "o": (2, 4)}, (3,),
    ),
    "scan": (
        lambda w, x: jax.lax.scan(lambda h, k: (relu(h @ k), None), x, w["s"])[0] @ w["o"],
        {"s": (3, 3, 3), "o": (3, 2)}, (3,),
    ),
    "custom derivative": (custom, {"a": (3, 4), "o": (4, 2)}, (3,)),
    "positions": (positions, {"a": (6, 2), "o": (18, 2)}, (3, 2)),
    "batch norm": (batch_norm, {"a": (3, 4), "o": (4, 2)}, (3,)),
    "a weight that is returned": (
        lambda w, x: x @ w["a"] + 0 * (x @ w["a"]) + w["b"], {"a": (3, 2), "b": (2,)}, (3,),
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def problem(request, x64):
    fn, shapes, x_shape = NETWORKS[request.param]
    params, x = draw(shapes), draw({"x": (5, *x_shape)}, 1)["x"]
    if request.param == "conv":
        x = x.at[0].set(0)  # pre-activations of exactly 0
    return fn, params, x, reference(fn, params, x)


def test_both_modes_and_any_chunk_give_the_reference(problem):
    fn, params, x, J = problem
    for mode, chunk in [("fwd", 64), ("rev", 64), ("auto", 2)]:
        got = jacobian_of(fn, params, x, mode=mode, chunk=chunk)
        np.testing.assert_allclose(got, J, rtol=1e-12, atol=1e-12)


# What a factored product must see: convolutions, loops, rules of the user's own, mixed examples.
SEEN = ("dense", "conv", "scan", "custom derivative", "batch norm")


@pytest.mark.parametrize(
    "problem",
    [n if n in SEEN else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS],
    indirect=True,
)
def test_products_are_those_of_the_reference(problem):
    fn, params, x, J = problem
    gram = gram_of(fn, params, x, chunk=2)
    np.testing.assert_allclose(gram, J.T @ J, rtol=1e-11, atol=1e-11)
    for factored in (True, False):
        kernel = kernel_of(fn, params, x, chunk=2, factored=factored)
        np.testing.assert_allclose(kernel, J @ J.T, rtol=1e-11, atol=1e-11)
    operator = jax.jit(lambda v, c: (lambda A: (A.matvec(v), A.rmatvec(c)))(
        jacobian_operator(fn, params, x)
    ))  # fmt: skip
    v, c = draw([J.shape[1:], J.shape[:1]], 2)
    for got, want in zip(operator(v, c), (J @ v, J.T @ c), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_the_kernel_between_two_sets_of_inputs(x64):
    fn, shapes, x_shape = NETWORKS["dense"]
    params, x, y = draw(shapes), *(draw({"x": (n, *x_shape)}, n)["x"] for n in (5, 7))
    want = reference(fn, params, x) @ reference(fn, params, y).T
    np.testing.assert_allclose(tangent_kernel(fn, params, x, y, chunk=3), want, rtol=1e-11)


def plan(fn, params, x):
    def one(w, example):
        return fn(w, example[None])[0]

    found = kernel_factors.products_of(trace(one, params, x[0]))
    names = [path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return {names[p.leaf]: (p.positions, p.inputs, p.outputs) for p in found}


def test_which_kernels_are_factored(x64):
    """Only those with a single use, in a product with data."""
    shapes = {
        "conv": {"a": (16, 9, 4), "b": (4, 36, 5), "o": (1, 20, 2)},
        "shared kernel": {"o": (1, 3, 2)},
        "weight on the left": {"a": (1, 3, 4), "o": (1, 4, 2)},
        "scan": {"o": (1, 3, 2)},
        "custom derivative": {"a": (1, 3, 4)},
        "positions": {"a": (3, 2, 6), "o": (1, 18, 2)},
    }
    for name, want in shapes.items():
        fn, leaves, x_shape = NETWORKS[name]
        assert plan(fn, draw(leaves), draw({"x": (1, *x_shape)})["x"]) == want, name


def test_the_kernel_of_loops_branches_and_stopped_gradients(x64):
    """They are differentiated as they are written, and none of their weights is factored."""

    def fn(w, x):
        _, power = jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ s[1]), (0, jnp.full((3, 3), 0.5))
        )
        h = x @ power @ w["a"] + x @ jax.lax.stop_gradient(w["b"])
        return jax.lax.cond(True, lambda h: h @ w["o"], lambda h: h[:, :2], h)

    params, x = draw({"a": (3, 3), "b": (3, 3), "o": (3, 2)}), draw({"x": (4, 3)}, 1)["x"]
    J = reference(fn, params, x)
    assert set(plan(fn, params, x)) == {"a"}
    np.testing.assert_allclose(tangent_kernel(fn, params, x), J @ J.T, rtol=1e-11)


def test_every_factored_form_is_exact_also_where_it_saves_nothing(x64, monkeypatch):
    monkeypatch.setattr(kernel_factors, "_saves", lambda product, out: True)
    for name in ("conv", "positions"):
        fn, shapes, x_shape = NETWORKS[name]
        params, x = draw(shapes), draw({"x": (5, *x_shape)}, 1)["x"]
        J = reference(fn, params, x)
        kernel = tangent_kernel(fn, params, x, chunk=2)
        np.testing.assert_allclose(kernel, J @ J.T, rtol=1e-11, atol=1e-11)


def test_pytrees_of_inputs_and_outputs(x64):
    params = draw({"a": (3, 4), "o": (4, 2)})
    x = draw({"left": (5, 3), "right": (5, 4)}, 1)
    J = reference(two_outputs, params, x)
    np.testing.assert_allclose(jacobian(two_outputs, params, x), J, rtol=1e-12)
    np.testing.assert_allclose(tangent_kernel(two_outputs, params, x), J @ J.T, rtol=1e-11)


def test_a_flax_module_in_float32(standard_dtype_promotion):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))

    x = jax.random.normal(jax.random.key(0), (9, 4))
    params = jax.jit(Net().init)(jax.random.key(1), x)
    J = jacobian(Net().apply, params, x)
    assert J.dtype == jnp.float32
    np.testing.assert_allclose(J, reference(Net().apply, params, x), atol=1e-5)
    J = np.asarray(J)
    np.testing.assert_allclose(tangent_kernel(Net().apply, params, x), J @ J.T, atol=1e-4)


@pytest.mark.parametrize("n", [16, 11])
def test_rows_spread_over_devices_add_up(n, x64):
    fn, shapes, x_shape = NETWORKS["dense"]
    params, x = draw(shapes), draw({"x": (n, *x_shape)}, 1)["x"]
    mesh = jax.make_mesh((8,), ("data",))
    J = reference(fn, params, x)
    gram = jacobian_gram(fn, params, x, mesh=mesh)
    assert gram.sharding.is_fully_replicated and len(gram.sharding.device_set) == 8
    np.testing.assert_allclose(gram, J.T @ J, rtol=1e-12, atol=1e-12)
    text = str(jax.make_jaxpr(lambda w: jacobian_gram(fn, w, x, mesh=mesh))(params))
    assert text.count("psum") == 1


def test_jit_vmap_and_grad(x64):
    fn, shapes, x_shape = NETWORKS["dense"]
    x = draw({"x": (4, *x_shape)}, 1)["x"]
    members = [draw(shapes, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *members)
    kernels = jax.jit(jax.vmap(lambda w: tangent_kernel(fn, w, x)))(stacked)
    np.testing.assert_allclose(kernels[1], tangent_kernel(fn, members[1], x), rtol=1e-12)
    slope = jax.jit(jax.grad(lambda w: jnp.trace(tangent_kernel(fn, w, x))))(members[0])
    want = jax.jit(jax.grad(lambda w: jnp.sum(jacobian(fn, w, x, mode="fwd") ** 2)))(members[0])
    chex.assert_trees_all_close(slope, want, rtol=1e-9)


def test_functions_with_a_reverse_rule_alone(x64):
    """Forward mode is not to be had: products with J are transposed from those with Jᵀ."""

    @jax.custom_vjp
    def g(h):
        return jnp.sin(h)

    g.defvjp(lambda h: (jnp.sin(h), h), lambda h, c: (7.0 * c,))
    fn = lambda w, x: g(x @ w["a"]) @ w["o"]  # noqa: E731
    params, x = draw({"a": (3, 4), "o": (4, 2)}), draw({"x": (5, 3)}, 1)["x"]
    J = jacobian(fn, params, x)
    h = jnp.einsum("bi,jo->bijo", x, 7.0 * params["o"])
    np.testing.assert_allclose(J[:, :12].reshape(5, 2, 3, 4), h.transpose(0, 3, 1, 2), rtol=1e-12)
    operator = jacobian_operator(fn, params, x)
    v = jnp.arange(20.0)
    np.testing.assert_allclose(operator.matvec(v), J @ v, rtol=1e-12)
    np.testing.assert_allclose(tangent_kernel(fn, params, x), J @ J.T, rtol=1e-11)


def test_the_operator_serves_a_matrix_free_library(x64):
    """The largest singular values by Golub-Kahan, from products alone."""
    decomp, eig = pytest.importorskip("matfree.decomp"), pytest.importorskip("matfree.eig")
    fn, shapes, x_shape = NETWORKS["dense"]
    params, x = draw(shapes), draw({"x": (30, *x_shape)}, 1)["x"]
    operator = jacobian_operator(fn, params, x)
    svd = eig.svd_partial(decomp.bidiag(20, materialize=True))
    start = jnp.linspace(0.1, 1.0, operator.shape[1])
    _, values, _ = svd(operator.matvec, start)
    want = np.linalg.svd(reference(fn, params, x), compute_uv=False)
    np.testing.assert_allclose(values[:3], want[:3], rtol=1e-8)


# --- refusals -----------------------------------------------------------------------------------


def test_errors_say_what_does_not_fit():
    w, x = {"a": jnp.ones((3, 2))}, jnp.ones((4, 3))
    fn = lambda w, x: x @ w["a"]  # noqa: E731
    for call, message in [
        (lambda: jacobian(fn, w, x, mode="backward"), "mode must be one of auto, fwd, rev"),
        (lambda: jacobian(fn, w, x, chunk=0), "chunk must be a fixed integer >= 1, not 0"),
        (lambda: jacobian(fn, {"a": jnp.ones((3, 2), int)}, x), "a has dtype int32"),
        (lambda: jacobian(fn, {"a": jnp.full((3, 2), jnp.nan)}, x), "a has 6 non-finite"),
        (lambda: jacobian(fn, {}, x), "params has no leaves"),
        (lambda: jacobian(fn, w, jnp.ones((0, 3))), "Pass at least one example"),
        (lambda: jacobian(fn, w, (x, jnp.ones((5, 3)))), r"x/1'?: \(5, 3\)"),
        (lambda: jacobian(lambda w, x: fn(w, x).sum(), w, x), r"has shape \(\) and dtype float32"),
        (lambda: jacobian(lambda w, x: fn(w, x).argmax(1), w, x), "real floating-point outputs"),
        (lambda: jacobian(lambda w, x: (), w, x), "fn returned no array"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            call()


def test_examples_that_are_mixed_cannot_be_spread_over_devices(x64):
    fn, shapes, _ = NETWORKS["batch norm"]
    mesh = jax.make_mesh((8,), ("data",))
    with pytest.raises(InvalidInput, match="cannot be spread over devices"):
        jacobian_gram(fn, draw(shapes), jnp.ones((8, 3)), mesh=mesh)


def test_a_loop_of_unknown_length_needs_forward_mode():
    def fn(w, x):
        step = lambda s: (s[0] + 1, s[1] @ w)  # noqa: E731
        return jax.lax.while_loop(lambda s: s[0] < x.shape[1], step, (0, x))[1]

    w, x = 0.5 * jnp.eye(2), jnp.ones((3, 2))
    expected = jax.jit(jax.jacfwd(lambda w: fn(w, x)))(w).reshape(6, 4)
    np.testing.assert_allclose(jacobian(fn, w, x, mode="fwd"), expected, rtol=1e-6)
    for reverse in (lambda: jacobian(fn, w, x, mode="rev"), lambda: jacobian_operator(fn, w, x)):
        with pytest.raises(UnsupportedOperation, match="`while` loop is not covered by reverse"):
            reverse()
