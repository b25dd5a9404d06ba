"""Walking jaxprs: whatever form jax gives a program, its paths are those of the function."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxinv
from jaxinv import UnsupportedOperation, log_path_norm, path_kappa, path_norm, unit_path_norms
from jaxinv._interpreter import walk
from jaxinv._interpreter.program import dependent_equations
from jaxinv.networks import init_mlp, mlp

RNG = np.random.default_rng(0)
W1, W2, W3 = (RNG.standard_normal((3, 3)).astype(np.float32) for _ in range(3))
B = RNG.standard_normal(3).astype(np.float32)
PARAMS = {"w1": W1, "w2": W2, "b": B}
X = np.ones((4, 3), np.float32)


def plain(w, x):
    """The function that most tests here write in another way."""
    return jax.nn.relu(x @ w["w1"] + w["b"]) @ w["w2"]


def reference(p=2.0):
    """Norms of the outputs and κ of `plain`, as matrix products."""
    q1, q2, qb = (np.abs(PARAMS[k]).astype(np.float64) ** p for k in ("w1", "w2", "b"))
    hidden = q1.sum(axis=0) + qb
    kappa = {
        "w1": np.broadcast_to(q2.sum(axis=1), (3, 3)),
        "w2": np.broadcast_to(hidden[:, None], (3, 3)),
        "b": q2.sum(axis=1),
    }
    return (hidden @ q2) ** (1 / p), kappa


def assert_is_plain(fn, params=PARAMS, x=X, p=2.0):
    norms, kappa = reference(p)
    np.testing.assert_allclose(unit_path_norms(fn, params, x, p=p), norms, rtol=1e-5)
    actual = path_kappa(fn, params, x, p=p)
    for name in kappa:
        np.testing.assert_allclose(actual[name], kappa[name], rtol=1e-5, err_msg=name)


def squared_norm(fn, params=PARAMS, x=X):
    return float(path_norm(fn, params, x)) ** 2


# --- calls --------------------------------------------------------------------------------------

CALLS = {
    "as it is": lambda f: f,
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(lambda w, x: jax.jit(f)(w, x)),
    "inlined jit": lambda f: jax.jit(f, inline=True),
    "remat": jax.checkpoint,
    "remat with policy": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "jit of remat": lambda f: jax.jit(jax.checkpoint(f)),
    "named scope": lambda f: jax.named_scope("block")(f),
    "vmap": lambda f: lambda w, x: jax.vmap(lambda row: f(w, row[None])[0])(x),
    "vmap of jit": lambda f: lambda w, x: jax.vmap(lambda row: jax.jit(f)(w, row[None])[0])(x),
    "cond": lambda f: lambda w, x: lax.cond(True, f, lambda w, x: 2 * f(w, x), w, x),
    "switch": lambda f: lambda w, x: lax.switch(1, [lambda w, x: x, f, lambda w, x: -x], w, x),
    "barrier": lambda f: lambda w, x: lax.optimization_barrier(f(w, x)),
    "scan once": lambda f: lambda w, x: lax.scan(lambda h, _: (f(w, h), None), x, None, 1)[0],
    "stop_gradient": lambda f: lambda w, x: lax.stop_gradient(f(lax.stop_gradient(w), x)),
    "primal of jvp": lambda f: lambda w, x: jax.jvp(partial(f, w), (x,), (x,))[0],
    "primal of vjp": lambda f: lambda w, x: jax.vjp(f, w, x)[0],
    "primal of linearize": lambda f: lambda w, x: jax.linearize(partial(f, w), x)[0],
}


@pytest.mark.parametrize("wrap", CALLS.values(), ids=CALLS)
def test_a_call_is_its_body(wrap):
    assert_is_plain(wrap(plain))


def test_custom_vjp_is_its_primal():
    @jax.custom_vjp
    def fn(w, x):
        return plain(w, x)

    fn.defvjp(lambda w, x: (fn(w, x), None), lambda res, ct: (None, None))
    assert_is_plain(fn)


def test_custom_jvp_is_its_primal_and_its_rule_is_never_walked():
    @jax.custom_jvp
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), jnp.tanh(tangents[0])))
    assert_is_plain(lambda w, x: relu(x @ w["w1"] + w["b"]) @ w["w2"])


def test_functions_are_known_by_what_they_compute_and_not_by_name():
    @jax.jit
    def relu(x):
        return x * x

    @jax.jit
    def tanh(x):
        return jnp.maximum(x, 0)

    with pytest.raises(UnsupportedOperation, match="mul|square"):
        path_norm(lambda w, x: relu(x @ w), W1, X)
    assert_is_plain(lambda w, x: tanh(x @ w["w1"] + w["b"]) @ w["w2"])


def test_two_calls_of_one_jitted_function_are_two_layers():
    layer = jax.jit(lambda w, x: jax.nn.relu(x @ w))
    q1, q2 = np.square(W1), np.square(W2)
    kappa = path_kappa(lambda w, x: layer(w[1], layer(w[0], x)), [W1, W2], X)
    np.testing.assert_allclose(kappa[0], np.broadcast_to(q2.sum(1), (3, 3)), rtol=1e-5)
    np.testing.assert_allclose(kappa[1], np.repeat(q1.sum(0)[:, None], 3, 1), rtol=1e-5)
    # The same weights twice: κ is the sum over both uses.
    both = path_kappa(lambda w, x: layer(w, layer(w, x)), W1, X)
    first, second = np.broadcast_to(q1.sum(1), (3, 3)), np.repeat(q1.sum(0)[:, None], 3, 1)
    np.testing.assert_allclose(both, first + second, rtol=1e-5)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_constants_closed_over_by_an_inner_function_are_weights(wrap):
    inner = wrap(lambda h: h @ jnp.asarray(W2) + W3[0])
    norm = path_norm(lambda w, x: inner(jax.nn.relu(x @ w)), W1, X)
    expected = np.square(W1).sum(0) @ np.square(W2) + np.square(W3[0])
    np.testing.assert_allclose(norm**2, expected.sum(), rtol=1e-5)


def test_constants_closed_over_in_a_scan_body_are_weights():
    def fn(w, x):
        return lax.scan(lambda h, _: (h @ W2 + W3[0], None), x @ w, None, 2)[0]

    q2, qb = np.square(W2), np.square(W3[0])
    h = np.square(W1).sum(0) @ q2 + qb
    np.testing.assert_allclose(unit_path_norms(fn, W1, X) ** 2, h @ q2 + qb, rtol=1e-5)


def test_traced_values_closed_over_are_weights():
    """Under jit the closed-over array is a tracer, and has no value to look at."""

    def norm(scale):
        return path_norm(lambda w, x: x @ w * scale, W1, X)

    np.testing.assert_allclose(jax.jit(norm)(3.0), 3 * norm(1.0), rtol=1e-6)


# --- scan and loops -----------------------------------------------------------------------------


def layers_norm(stack):
    """Norms of the outputs of relu layers without biases, in float64."""
    h = np.ones(3)
    for w in np.asarray(stack, np.float64):
        h = h @ np.square(w)
    return np.sqrt(h)


STACK = np.stack([W1, W2, W3])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 2])
def test_scan_over_stacked_layers_is_the_sequence_of_layers(reverse, unroll):
    def fn(w, x):
        step = lambda h, layer: (jax.nn.relu(h @ layer), None)  # noqa: E731
        return lax.scan(step, x, w, reverse=reverse, unroll=unroll)[0]

    order = STACK[::-1] if reverse else STACK
    np.testing.assert_allclose(unit_path_norms(fn, STACK, X), layers_norm(order), rtol=1e-5)

    def by_hand(w, x):
        for k in range(3)[::-1] if reverse else range(3):
            x = jax.nn.relu(x @ w[k])
        return x

    np.testing.assert_allclose(path_kappa(fn, STACK, X), path_kappa(by_hand, STACK, X), rtol=1e-5)


def test_scan_with_weights_in_consts_shares_them():
    def fn(w, x):
        return lax.scan(lambda h, _: (jax.nn.relu(h @ w), None), x, None, 3)[0]

    norms = layers_norm([W1] * 3)
    np.testing.assert_allclose(unit_path_norms(fn, W1, X), norms, rtol=1e-5)
    # Every path uses three weights of the matrix: Σ_e |w_e|² κ_e = 3 γ².
    cut = (np.square(W1) * path_kappa(fn, W1, X)).sum()
    np.testing.assert_allclose(cut, 3 * np.square(norms).sum(), rtol=1e-5)


def test_scan_with_weights_in_the_carry():
    def fn(w, x):
        def step(carry, _):
            h, w = carry
            return (jax.nn.relu(h @ w), w), None

        return lax.scan(step, (x, w), None, 3)[0][0]

    np.testing.assert_allclose(unit_path_norms(fn, W1, X), layers_norm([W1] * 3), rtol=1e-5)


def test_scan_stacks_the_states_of_every_step():
    def fn(w, x):
        def step(h, layer):
            h = jax.nn.relu(h @ layer)
            return h, h

        return jnp.moveaxis(lax.scan(step, x, w)[1], 0, 1)

    norms = unit_path_norms(fn, STACK, X)
    for k in range(3):
        np.testing.assert_allclose(norms[k], layers_norm(STACK[: k + 1]), rtol=1e-5)


def test_scan_over_time_and_over_layers_nested():
    def fn(w, x):
        def layer(h, kernel):
            xs = jnp.moveaxis(h, 1, 0)
            out = lax.scan(lambda s, x_t: (s + x_t @ kernel,) * 2, jnp.zeros_like(xs[0]), xs)[1]
            return jnp.moveaxis(out, 0, 1), None

        return lax.scan(layer, x, w)[0][:, -1]

    q = np.square(STACK[:2], dtype=np.float64)
    h = np.ones((2, 3))
    for k in range(2):
        h = np.cumsum(h @ q[k], axis=0)
    norms = unit_path_norms(fn, STACK[:2], np.ones((5, 2, 3), np.float32))
    np.testing.assert_allclose(norms**2, h[-1], rtol=1e-5)


@pytest.mark.parametrize("steps", [3, 300])
def test_scan_neither_overflows_nor_loses_a_small_bias(steps):
    """relu(4 h + b): γ² = 16^T + Σ_t 16^t b², so the carry needs a scale of its own."""

    def fn(w, x):
        return lax.scan(lambda h, _: (4 * h + w, None), x, None, steps)[0]

    log_norm = log_path_norm(fn, np.ones(1, np.float32), np.ones((1, 1), np.float32))
    np.testing.assert_allclose(2 * log_norm, steps * np.log(16) + np.log(1 + 1 / 15), rtol=1e-4)


def test_fori_loop_reads_layers_by_its_counter():
    def fn(w, x):
        return lax.fori_loop(0, 3, lambda i, h: jax.nn.relu(h @ w[i]), x)

    np.testing.assert_allclose(unit_path_norms(fn, STACK, X), layers_norm(STACK), rtol=1e-5)


def test_while_with_a_constant_number_of_trips_is_unrolled():
    def fn(w, x):
        def body(state):
            i, h = state
            return i + 1, jax.nn.relu(h @ w)

        return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    np.testing.assert_allclose(unit_path_norms(fn, W1, X), layers_norm([W1] * 3), rtol=1e-5)


def test_map_over_groups_of_units():
    def fn(w, x):
        return jnp.moveaxis(lax.map(lambda kernel: x @ kernel, w), 0, 1)

    np.testing.assert_allclose(
        unit_path_norms(fn, STACK, X) ** 2, np.square(STACK).sum(axis=1), rtol=1e-5
    )


# --- vmap ---------------------------------------------------------------------------------------

VMAPS = {
    "kernel first": lambda w, x: jax.vmap(lambda row: w.T @ row)(x),
    "kernel last": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "over columns": lambda w, x: jax.vmap(lambda col: x @ col, in_axes=1, out_axes=1)(w),
    "transposed": lambda w, x: (w.T @ x.T).T,
    "einsum": lambda w, x: jnp.einsum("io,ni->no", w, x),
    "tensordot": lambda w, x: jnp.tensordot(x, w, axes=((1,), (0,))),
    "sum of products": lambda w, x: (x[:, :, None] * w).sum(axis=1),
    "double vmap": lambda w, x: jax.vmap(
        lambda row: jax.vmap(lambda col: jnp.dot(col, row), in_axes=1)(w)
    )(x),
}


@pytest.mark.parametrize("product", VMAPS.values(), ids=VMAPS)
def test_a_matrix_product_in_any_form_is_a_dense_layer(product):
    """Rectangular, so that operands or axes mistaken for one another give another shape or sum."""
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((3, 2)).astype(np.float32), np.ones((5, 3), np.float32)
    norms = unit_path_norms(product, w, x)
    np.testing.assert_allclose(norms, np.linalg.norm(w, axis=0), rtol=1e-5)
    np.testing.assert_allclose(path_kappa(product, w, x), np.ones((3, 2)), rtol=1e-6)


def test_vmap_over_an_ensemble_inside_the_function():
    def fn(w, x):
        return jax.vmap(lambda kernel: jax.nn.relu(x @ kernel))(w).sum(axis=0)

    np.testing.assert_allclose(
        unit_path_norms(fn, STACK, X) ** 2, np.square(STACK).sum(axis=(0, 1)), rtol=1e-5
    )


# --- variables: literals, duplicates, inputs -----------------------------------------------------


def test_outputs_may_be_inputs_duplicates_and_literals():
    w = np.array([[3.0], [4.0]], np.float32)
    x = np.ones((5, 2), np.float32)

    @jax.jit
    def inner(h):
        return h, h, 0.0, 2.0

    def fn(w, x):
        same, again, zero, two = inner(x @ w)
        return {"x": x, "same": same, "again": again + zero, "bias": again + two}

    norms = unit_path_norms(fn, w, x)
    np.testing.assert_allclose(norms["x"], [1, 1])
    np.testing.assert_allclose(norms["same"], [5])
    np.testing.assert_allclose(norms["again"], [5])
    np.testing.assert_allclose(norms["bias"], [np.sqrt(29)], rtol=1e-6)
    np.testing.assert_allclose(path_kappa(fn, w, x), np.full((2, 1), 3.0))


def test_a_parameter_may_be_an_output_for_it_is_a_bias():
    def fn(w, x):
        return x @ w["w"], jnp.broadcast_to(w["b"], (x.shape[0], 3))

    kappa = path_kappa(fn, {"w": W1, "b": B}, X)
    np.testing.assert_allclose(kappa["b"], np.ones(3))
    np.testing.assert_allclose(
        squared_norm(fn, {"w": W1, "b": B}), np.square(W1).sum() + np.square(B).sum(), rtol=1e-5
    )


def test_a_parameter_may_be_used_never_or_twice():
    def fn(w, x):
        return x @ w["tied"] @ w["tied"].T

    q = np.square(W1)
    kappa = path_kappa(fn, {"tied": W1, "unused": B}, X)
    np.testing.assert_array_equal(kappa["unused"], np.zeros(3))
    # x_i → h_k → y_j: w_ik and w_jk, so κ_ik = Σ_j q_jk twice over.
    np.testing.assert_allclose(kappa["tied"], np.broadcast_to(2 * q.sum(0), (3, 3)), rtol=1e-5)


def test_dead_code_is_no_part_of_the_network():
    @jax.jit
    def with_statistics(w, x):
        h = x @ w["w1"] + w["b"]
        return jax.nn.relu(h) @ w["w2"], jnp.tanh(h).mean()

    def fn(w, x):
        y, _ = with_statistics(w, x)
        jnp.exp(y)
        return y

    assert_is_plain(fn)


def test_dead_outputs_of_a_scan_are_no_part_of_the_network():
    def fn(w, x):
        def step(h, layer):
            h = jax.nn.relu(h @ layer)
            return h, jnp.tanh(h).mean()

        return lax.scan(step, x, w)[0]

    np.testing.assert_allclose(unit_path_norms(fn, STACK, X), layers_norm(STACK), rtol=1e-5)


def test_effects_and_debugging_change_nothing(capfd):
    def fn(w, x):
        jax.debug.print("mean {}", x.mean())
        return plain(w, x)

    assert_is_plain(fn)


def test_random_masks_are_constants():
    """Dropout with a given key: kept units have an edge of weight 1/(1 - rate)."""

    def fn(w, x):
        keep = jax.random.bernoulli(jax.random.key(0), 0.5, (3,))
        return jnp.where(keep, x @ w / 0.5, 0.0)

    keep = jax.random.bernoulli(jax.random.key(0), 0.5, (3,))
    expected = np.where(keep, 2 * np.linalg.norm(W1, axis=0), 0)
    np.testing.assert_allclose(unit_path_norms(fn, W1, X), expected, rtol=1e-5)


# --- select_n ------------------------------------------------------------------------------------

GATES = {
    "x > 0": (lambda h: jnp.where(h > 0, h, 0.0), 1.0),
    "x >= 0": (lambda h: jnp.where(h >= 0, h, 0.0), 1.0),
    "0 < x": (lambda h: jnp.where(jnp.zeros_like(h) < h, h, 0.0), 1.0),
    "x < 0": (lambda h: jnp.where(h < 0, -0.5 * h, h), 1.0),
    "not x > 0": (lambda h: jnp.where(~(h > 0), 3.0 * h, h), 9.0),
    "steep": (lambda h: jnp.where(h > 0, -2.0 * h, h / 4.0), 4.0),
    "negative part": (lambda h: jnp.where(h > 0, 0.0, h), 1.0),
    "both zero": (lambda h: jnp.where(h > 0, 0.0 * h, 0.0), 0.0),
    "lax.select": (lambda h: lax.select(h > 0, h, jnp.zeros_like(h)), 1.0),
    "jitted": (lambda h: jax.jit(lambda h: jnp.where(h > 0, h, 0.1 * h))(h), 1.0),
    "reshaped": (lambda h: jnp.where((h > 0).reshape(-1), h.reshape(-1), 0).reshape(h.shape), 1.0),
}


@pytest.mark.parametrize(("gate", "slope"), GATES.values(), ids=GATES)
def test_a_choice_by_the_sign_of_the_value_itself_is_a_gate(gate, slope):
    norm = squared_norm(lambda w, x: gate(x @ w), W1)
    np.testing.assert_allclose(norm, slope * np.square(W1).sum(), rtol=1e-5)


def test_a_choice_by_a_constant_keeps_what_it_chooses():
    def fn(w, x):
        h = x @ w
        return jnp.where(np.array([True, False, True]), h, 2.0 * h)

    expected = np.square(W1).sum(0) * [1, 4, 1]
    np.testing.assert_allclose(unit_path_norms(fn, W1, X) ** 2, expected, rtol=1e-5)


def test_equal_shapes_are_not_equal_values():
    """Freed arrays may be succeeded by others at the same address: identity is not the address."""

    @jax.jit
    def take(h, shift):
        return jnp.take(h, (jnp.arange(3) + shift) % 3, axis=1)

    def own(w, x):
        h = take(x @ w, 1)
        return jnp.where(h > 0, h, 0.0)

    def other(w, x):
        h = x @ w
        for shift in range(1, 3):
            h = h + jnp.where(take(h, shift) > 0, take(h, 0), 0.0)
        return h

    assert np.isfinite(path_norm(own, W1, X))
    with pytest.raises(UnsupportedOperation, match="select_n"):
        path_norm(other, W1, X)


def test_a_call_whose_function_jax_keeps_elsewhere_is_refused_by_name():
    call = jax.make_jaxpr(jax.jit(lambda x: 2 * x))(X).jaxpr.eqns[0]
    assert len(walk.sub_jaxprs(call, [True])) == 1
    with pytest.raises(UnsupportedOperation, match=r"`\w+`, a call .*\n(.*\n)+.*under none of"):
        walk.sub_jaxprs(call.replace(params={}), [True])


def _where(fn, params, x):
    """The line that a refusal of the path norm names."""
    with pytest.raises(UnsupportedOperation) as refusal:
        path_norm(fn, params, x, p=2)
    (where,) = (line for line in str(refusal.value).splitlines() if "where:" in line)
    return where


def test_a_refusal_names_the_line_of_a_network_of_the_package():
    params = init_mlp(jax.random.key(0), (3, 4, 2))
    where = _where(partial(mlp, activation=lambda h: h * h), params, jnp.ones((1, 3)))
    assert f"{__file__}:" in where  # the activation is the user's
    where = _where(partial(mlp, activation=jnp.sin), params, jnp.ones((1, 3)))
    assert "networks.py:" in where and "(mlp)" in where


def test_no_operation_is_said_to_be_written_by_the_package_itself():
    """Where fn calls the package, the line of fn that does is the one to look at."""

    def fn(w, x):
        return jaxinv.jacobian(lambda w, x: x @ w["kernel"], w, x) * log_path_norm(
            mlp, {"Dense_0": w}, x
        )

    traced = walk.trace(fn, {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    lines = {eqn.source for eqn in dependent_equations(traced.jaxpr)}
    own = os.path.dirname(jaxinv.__file__)
    assert len(lines) > 1
    assert all(f"{__file__}:" in line for line in lines if "networks.py" not in line)
    assert not [line for line in lines if own in line and "networks.py" not in line]


def _doubled(a):
    """2a, by a `shard_map` whose program closes over nothing that is traced."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    rows = PartitionSpec("rows")
    return jax.shard_map(lambda a: 2 * a, mesh=mesh, in_specs=rows, out_specs=rows)(a)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_shard_map_of_constants_is_a_constant(compiled):
    w, x, c = jnp.array([[3.0], [4.0]]), jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [2.0, 1.0]])

    def norm(c):
        return path_norm(lambda w, x: x @ _doubled(c) @ w, w, x)

    found = (jax.jit(norm) if compiled else norm)(c)
    np.testing.assert_allclose(found**2, 6.0**2 + 12.0**2 + 8.0**2, rtol=1e-6)
    ranked = jaxinv.jacobian_rank(lambda w, x: x @ _doubled(c.astype(x.dtype)) @ w, w, jnp.eye(2))
    assert ranked.rank == 2 and ranked.certain


def test_a_shard_map_of_weights_is_a_matrix():
    w, x = jnp.array([[3.0], [4.0]]), jnp.ones((1, 2))
    found = jaxinv.spectral_norms(lambda w, x: x @ _doubled(w), w, x)
    np.testing.assert_allclose(found.values, [10.0], rtol=1e-6)
