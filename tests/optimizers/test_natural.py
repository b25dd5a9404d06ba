"""The natural gradient as an optax transformation: what it computes, and that it composes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import InvalidInput, pass_full_params
from jaxinv.jacobians import natural_gradient_direction
from jaxinv.optimizers import natural_gradient, scale_by_natural_gradient

# 27 parameters: the time of these tests is compilation.
X = jax.random.normal(jax.random.key(1), (16, 4))
Y = jnp.arange(16) % 3
STATIC = ("fn", "likelihood")


def net(params, x):
    h = jax.nn.relu(x.astype(params["in"].dtype) @ params["in"])
    return h @ params["out"]["kernel"] + params["out"]["bias"]


def make_params(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    first, second = (jax.random.normal(k, s) for k, s in zip(keys, [(4, 3), (3, 3)], strict=True))
    tree = {"in": first, "out": {"kernel": second, "bias": jnp.full(3, 0.1)}}
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def loss(params):
    logits = net(params, X).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


gradient = jax.jit(jax.grad(loss))


@functools.cache
def plain():
    return natural_gradient(0.1, net, "softmax", damping=0.01)


VARIANTS = {
    "core": lambda: optax.chain(
        scale_by_natural_gradient(net, "softmax", damping=0.05), optax.scale(-0.3)
    ),
    "momentum, schedule": lambda: natural_gradient(
        optax.linear_schedule(0.2, 0.1, 100), net, "softmax", momentum=0.5, nesterov=True,
        damping=0.05,
    ),
    "cr": lambda: optax.chain(
        scale_by_natural_gradient(net, "softmax", damping=0.05, solver="cr"), optax.scale(-0.3)
    ),
}  # fmt: skip
variants = pytest.mark.parametrize("tx", [make() for make in VARIANTS.values()], ids=list(VARIANTS))


def update(tx, g, params, **extra):
    """The first update, compiled."""
    return jax.jit(tx.update)(g, tx.init(params), params, **({"batch": X} | extra))


@functools.cache
def first_update():
    params = make_params()
    return update(plain(), gradient(params), params)[0]


def assert_close(got, want, rtol=1e-5):
    chex.assert_trees_all_close(got, want, rtol=rtol, atol=rtol * 1e-2)


# --- what it computes ---------------------------------------------------------------------


def test_update_is_the_direction_times_the_learning_rate_and_the_state_tells_of_the_solve():
    params = make_params()
    g = gradient(params)
    found = natural_gradient_direction(net, params, X, g, "softmax", damping=0.01)
    u, state = update(plain(), g, params)
    assert_close(u, jax.tree.map(lambda v: -0.1 * v, found.v))
    core = state[0]
    assert (int(core.count), int(core.rank), int(core.iterations)) == (1, int(found.rank), 0)
    assert float(core.residual) < 1e-10
    cr = scale_by_natural_gradient(net, "softmax", damping=0.01, solver="cr", max_iterations=2)
    core = update(cr, g, params)[1]
    assert (int(core.rank), int(core.iterations)) == (-1, 2)
    assert 1e-3 < float(core.residual) < 1  # stopped early, and says so


def test_one_step_solves_least_squares():
    w = jnp.zeros((4, 1))
    y = X @ jnp.array([[1.0], [-2.0], [3.0], [0.5]])
    g = jax.grad(lambda w: ((X @ w - y) ** 2).mean() / 2)(w)
    u, _ = update(natural_gradient(1.0, lambda w, x: x @ w, "gaussian"), g, w)
    np.testing.assert_allclose(u.ravel(), [1.0, -2.0, 3.0, 0.5], rtol=1e-5)


def test_the_batch_is_what_the_fisher_is_averaged_over():
    params = make_params()
    g = gradient(params)
    u, _ = update(plain(), g, params, batch=X[:8])
    want = natural_gradient_direction(net, params, X[:8], g, "softmax", damping=0.01)
    assert_close(u, jax.tree.map(lambda v: -0.1 * v, want.v))
    assert float(abs(u["in"] - first_update()["in"]).max()) > 1e-3


def test_momentum_is_a_running_sum_of_natural_gradients():
    params = make_params()
    g = gradient(params)
    tx = natural_gradient(0.1, net, "softmax", damping=0.01, momentum=0.9)
    step = jax.jit(tx.update)
    _, state = step(g, tx.init(params), params, batch=X)
    u, _ = step(g, state, params, batch=X)
    assert_close(u, jax.tree.map(lambda v: 1.9 * v, first_update()))


# --- the checks that optax makes of its own optimizers ----------------------------------------


@variants
def test_other_extra_arguments_are_ignored(tx):
    params = make_params()
    g = gradient(params)
    want, _ = update(tx, g, params)
    got, _ = update(tx, g, params, value=1.0, something_else=None)
    chex.assert_trees_all_equal(want, got)


@variants
def test_tree_map_params_reaches_the_leaves_like_params_only(tx):
    params = make_params()
    marked = jax.tree.leaves(optax.tree.map_params(tx, lambda leaf: "param", tx.init(params)))
    like_params = [leaf for leaf in marked if isinstance(leaf, str)]
    assert len(like_params) % len(jax.tree.leaves(params)) == 0
    assert all(np.ndim(leaf) == 0 for leaf in marked if not isinstance(leaf, str))


@variants
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_keep_the_dtype_and_the_state_its_types(tx, dtype):
    params = make_params(dtype)
    state = tx.init(params)
    u, after = update(tx, jax.tree.map(jnp.ones_like, params), params)
    assert {a.dtype for a in jax.tree.leaves(u)} == {jnp.dtype(dtype)}
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@variants
def test_training_in_a_scan_reduces_the_loss_and_compiles_once(tx):
    @jax.jit
    def train(params):
        @chex.assert_max_traces(n=1)
        def step(carry, _):
            params, state = carry
            value, g = jax.value_and_grad(loss)(params)
            u, state = tx.update(g, state, params, batch=X)
            return (optax.apply_updates(params, u), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=50)[1]

    losses = train(make_params())
    train(make_params(seed=1))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


def test_the_state_can_be_donated():
    params = make_params()
    g, tx = gradient(params), scale_by_natural_gradient(net, "softmax", damping=0.01)
    step = jax.jit(lambda state: tx.update(g, state, params, batch=X), donate_argnums=0)
    u, _ = step(tx.init(params))
    assert_close(jax.tree.map(lambda v: -0.1 * v, u), first_update())


# --- it composes ----------------------------------------------------------------------------


def test_inject_hyperparams_changes_learning_rate_and_damping_without_a_new_trace():
    params = make_params()
    g = gradient(params)
    make = optax.inject_hyperparams(natural_gradient, static_args=STATIC)
    tx = make(0.1, net, "softmax", damping=0.01)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state):
        return tx.update(g, state, params, batch=X)

    state = tx.init(params)
    u, state = step(state)
    assert_close(u, first_update(), 1e-4)
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    state.hyperparams["damping"] = jnp.float32(0.3)
    u, _ = step(state)
    want = natural_gradient_direction(net, params, X, g, "softmax", damping=0.3)
    assert_close(u, jax.tree.map(lambda v: -0.2 * v, want.v), 1e-4)


def test_multi_steps_and_apply_if_finite():
    params = make_params()
    g = gradient(params)
    # optax's MultiSteps divides an integer count into floats.
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.MultiSteps(plain(), 2).gradient_transformation()
        step = jax.jit(tx.update)
        u, state = step(g, tx.init(params), params, batch=X)
        assert float(optax.tree.norm(u)) == 0.0
        u, _ = step(g, state, params, batch=X)
    assert_close(u, first_update())
    tx = optax.apply_if_finite(plain(), 3)
    step = jax.jit(tx.update)
    u, state = step(g, tx.init(params), params, batch=X)
    assert_close(u, first_update())
    u, _ = step(jax.tree.map(lambda a: a * jnp.nan, g), state, params, batch=X)
    assert float(optax.tree.norm(u)) == 0.0


def test_masked_and_partition_take_the_fisher_of_the_visible_parameters():
    params = make_params()
    g = gradient(params)

    def of_out(out, x):
        return net({"in": params["in"].astype(x.dtype), "out": out}, x)

    found = natural_gradient_direction(of_out, params["out"], X, g["out"], "softmax", damping=0.01)
    want = jax.tree.map(lambda v: -0.1 * v, found.v)
    parts = {"natural": plain(), "sgd": optax.sgd(0.3)}
    tx = pass_full_params(optax.partition(parts, {"in": "sgd", "out": "natural"}))
    u, _ = update(tx, g, params)
    assert_close(u["out"], want)
    assert_close(u["in"], -0.3 * g["in"])
    masked = optax.masked(plain(), {"in": False, "out": True})
    u, _ = update(pass_full_params(masked), g, params)
    assert_close(u["out"], want)
    np.testing.assert_array_equal(u["in"], g["in"])
    with pytest.raises(InvalidInput, match=r"Some parameters are masked.*pass_full_params"):
        masked.update(g, masked.init(params), params, batch=X)


def test_vmap_over_seeds_equals_the_loop():
    tx = natural_gradient(0.1, net, "softmax", damping=0.05, momentum=0.9)
    seeds = [make_params(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *seeds)

    def train(params):
        def step(carry, _):
            params, state = carry
            u, state = tx.update(jax.grad(loss)(params), state, params, batch=X)
            return (optax.apply_updates(params, u), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0][0]

    together, alone = jax.jit(jax.vmap(train))(stacked), jax.jit(train)
    for i, params in enumerate(seeds):
        got = jax.tree.map(lambda a, i=i: a[i], together)
        assert_close(got, alone(params), 1e-3)


def test_orbax_checkpoint_resumes_bitwise(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    schedule = optax.linear_schedule(0.1, 0.01, 20)
    tx = natural_gradient(schedule, net, "softmax", damping=0.05, momentum=0.9)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            u, state = tx.update(jax.grad(loss)(params), state, params, batch=X)
            return (optax.apply_updates(params, u), state), None

        return jax.lax.scan(step, (params, state), None, length=4)[0]

    params = make_params()
    half = run(params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
        restored = checkpointer.restore(tmp_path / "half", target)
    chex.assert_trees_all_equal(run(*half), run(*restored))


# --- clear errors -----------------------------------------------------------------------------


def test_missing_parameters_and_batch_are_named():
    params = make_params()
    tx = plain()
    with pytest.raises(InvalidInput, match="natural gradient needs the parameters"):
        tx.update(params, tx.init(params), batch=X)
    with pytest.raises(InvalidInput, match="natural gradient needs `batch`, the inputs x of fn"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"likelihood": "cauchy"}, "likelihood must be one of"),
        ({"damping": -1}, "damping must be finite and >= 0"),
        ({"solver": "lu"}, "solver must be one of"),
        ({"max_iterations": 0}, "max_iterations must be a fixed integer >= 1"),
        ({"rtol": -1e-3}, "rtol must be >= 0"),
    ],
)
def test_bad_options_are_refused_at_once(options, text):
    with pytest.raises(InvalidInput, match=text):
        scale_by_natural_gradient(net, **({"likelihood": "softmax"} | options))


def test_integer_parameters_and_empty_batches_are_refused_at_update():
    params = make_params()
    tx = plain()
    with pytest.raises(InvalidInput, match="Pass at least one example"):
        tx.update(params, tx.init(params), params, batch=X[:0])
    w = jnp.ones((4, 3), jnp.int32)
    tx = scale_by_natural_gradient(lambda w, x: x @ w.astype(x.dtype), "softmax")
    with pytest.raises(InvalidInput, match="params has dtype int32"):
        tx.update(w, tx.init(w), w, batch=X)
