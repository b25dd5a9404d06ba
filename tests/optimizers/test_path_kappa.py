"""Path-SGD as an optax transformation: its formula, its invariance, and that it composes."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxinv
from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    match_gradient_norm,
    pass_full_params,
    path_kappa,
    path_sgd,
    scale_by_path_kappa,
)
from jaxinv._numerics import scaled, stream
from jaxinv.networks import cnn, init_cnn, init_mlp, mlp
from jaxinv.paths.norms import scaled_kappa

SIZES = (6, 8, 3)
DEEP = (6, 8, 7, 3)
X = jax.random.normal(jax.random.key(1), (16, 6))
Y = jnp.arange(16) % 3


def make_params(dtype=jnp.float32, seed=0, sizes=SIZES):
    return init_mlp(jax.random.key(seed), sizes, bias_std=0.1, dtype=dtype)


def net(params, x):
    return mlp(params, x.astype(jax.tree.leaves(params)[0].dtype))


def loss(params, fn=mlp, x=X, y=Y):
    x = x.astype(jax.tree.leaves(params)[0].dtype)
    return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()


gradient = jax.jit(jax.grad(loss))


def descend(core, learning_rate=0.1, momentum=0.0):
    return optax.chain(core, optax.trace(momentum), optax.scale_by_learning_rate(learning_rate))


VARIANTS = {
    "core": lambda: optax.chain(scale_by_path_kappa(net, X), optax.scale(-0.03)),
    "momentum": lambda: path_sgd(0.03, net, X, momentum=0.9, nesterov=True),
    "momentum, every 3": lambda: descend(scale_by_path_kappa(net, X, every=3), 0.03, 0.9),
    "p = 1, pass": lambda: descend(
        scale_by_path_kappa(net, X, p=1, zero_kappa="pass", eps=1e-3), 0.3
    ),
    "p = 2.5, matched": lambda: descend(match_gradient_norm(scale_by_path_kappa(net, X, p=2.5))),
    "schedule, masked": lambda: pass_full_params(
        descend(
            optax.masked(
                scale_by_path_kappa(net, X),
                lambda params: jax.tree.map(lambda w: w.ndim > 1, params),
            ),
            optax.linear_schedule(0.05, 0.03, 100),
        )
    ),
}


def of_variants(*fast):
    """Over the variants; those that are not named among the slow tests."""
    return pytest.mark.parametrize(
        "tx",
        [
            pytest.param(make(), marks=[] if name in fast else pytest.mark.slow, id=name)
            for name, make in VARIANTS.items()
        ],
    )


variants = of_variants(*VARIANTS)


def update(tx, g, params):
    """The first update, compiled."""
    return jax.jit(tx.update)(g, tx.init(params), params)[0]


# --- the formula ----------------------------------------------------------------------


def both_precisions(p):
    """Of float32 what p = 1.5 does not show is slow, of float64 what shows least."""
    for dtype in (jnp.float32, jnp.float64):
        slow = p != 1.5 if dtype == jnp.float32 else p in (1.5, 4.0)
        yield pytest.param(p, dtype, marks=pytest.mark.slow if slow else [])


@pytest.mark.parametrize(
    ("p", "dtype"), [case for p in (1.0, 1.5, 2.0, 2.5, 4.0) for case in both_precisions(p)]
)
def test_update_is_gradient_over_kappa_to_the_two_over_p(p, dtype, x64):
    params = make_params(dtype, sizes=DEEP)
    tx = scale_by_path_kappa(net, X, p=p)

    @jax.jit
    def found(params, g):
        return path_kappa(net, params, X, p=p), tx.update(g, tx.init(params), params)[0]

    g = gradient(params)
    kappa, u = found(params, g)
    rtol = 2e-5 if dtype == jnp.float32 else 1e-12
    assert {a.dtype for a in jax.tree.leaves(u)} == {jnp.dtype(dtype)}
    want = jax.tree.map(lambda a, k: np.asarray(a) / np.asarray(k) ** dtype(2 / p), g, kappa)
    chex.assert_trees_all_close(u, want, rtol=rtol)


def test_eps_is_added_to_the_metric():
    params = make_params()
    g = gradient(params)
    tx = scale_by_path_kappa(mlp, X, eps=0.5)
    kappa, u = jax.jit(lambda w: (path_kappa(mlp, w, X), tx.update(g, tx.init(w), w)[0]))(params)
    want = jax.tree.map(lambda a, k: a / (k + 0.5), g, kappa)
    chex.assert_trees_all_close(u, want, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_streamed_product_gives_the_kappa_of_the_plain_one(transposed, p, monkeypatch):
    def fn(w, x):
        h = jnp.maximum(x @ w["a"], 0)
        h = h @ w["b"].T if transposed else h @ w["b"]
        return jnp.maximum(h, 0) @ w["c"]

    keys = jax.random.split(jax.random.key(3), 3)
    # 301·400 elements: above the threshold.
    middle = (400, 301) if transposed else (301, 400)
    shapes = {"a": (5, 301), "b": middle, "c": (400, 2)}
    w = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    calls = []
    contract = stream.contract
    monkeypatch.setattr(stream, "contract", lambda *a: calls.append(1) or contract(*a))
    x = jnp.zeros((1, 5))
    tx = scale_by_path_kappa(fn, x, p=p)
    ones = jax.tree.map(jnp.ones_like, w)
    u = update(tx, ones, w)
    streamed = len(calls)
    assert streamed > 0
    plain = jax.jit(lambda w: [scaled.value(k) for k in scaled_kappa(fn, w, x, p)])(w)
    assert len(calls) == streamed  # this one takes the other route
    powers = [k ** (-2 / p) for k in plain]
    chex.assert_trees_all_close(jax.tree.leaves(u), powers, rtol=3e-5)
    public = jax.jit(lambda w: path_kappa(fn, w, x, p=p))(w)
    assert len(calls) > streamed
    chex.assert_trees_all_close(jax.tree.leaves(public), plain, rtol=3e-5)


def test_a_streamed_norm_has_derivatives_of_every_order(monkeypatch):
    def fn(w, x):
        return jnp.maximum(x @ w["a"], 0) @ w["b"]

    calls = []
    contract = stream.contract
    monkeypatch.setattr(stream, "contract", lambda *a: calls.append(1) or contract(*a))
    keys = jax.random.split(jax.random.key(0), 3)
    w = {"a": jax.random.normal(keys[0], (3, 300)), "b": jax.random.normal(keys[1], (300, 300))}
    v = {"a": jnp.zeros((3, 300)), "b": jax.random.normal(keys[2], (300, 300))}
    x = jnp.zeros((1, 3))

    def power(w):
        return (jnp.square(w["a"]) @ jnp.square(w["b"])).sum()

    def norm(w):
        return jaxinv.path_norm(fn, w, x)

    np.testing.assert_allclose(norm(w), jnp.sqrt(power(w)), rtol=1e-6)
    assert len(calls) == 1
    want = jax.grad(lambda w: jnp.sqrt(power(w)))
    chex.assert_trees_all_close(jax.grad(norm)(w), want(w), rtol=1e-4, atol=1e-7)
    got = jax.jvp(jax.grad(norm), (w,), (v,))[1]
    chex.assert_trees_all_close(got, jax.jvp(want, (w,), (v,))[1], rtol=1e-3, atol=1e-6)
    slope = jax.jvp(lambda w: path_kappa(fn, w, x)["a"], (w,), (v,))[1]
    ones = jnp.ones((3, 1))
    by_hand = ones * (2 * w["b"] * v["b"]).sum(1)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-3, atol=1e-3)
    members = jax.tree.map(lambda a, b: jnp.stack([a, b]), w, jax.tree.map(lambda a: 2 * a, w))
    np.testing.assert_allclose(jax.vmap(norm)(members), norm(w) * jnp.array([1.0, 4.0]), rtol=1e-6)


def test_every_refreshes_kappa_at_its_period_only():
    params = make_params()
    moved = jax.tree.map(lambda w: 2 * w, params)
    g = jax.tree.map(jnp.ones_like, params)
    tx = scale_by_path_kappa(mlp, X, every=3)
    state, seen = tx.init(params), []
    step = jax.jit(tx.update)
    for p in (params, moved, moved, moved, moved):
        u, state = step(g, state, p)
        seen.append(float(u["Dense_0"]["kernel"][0, 0]))
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]
    fresh = scale_by_path_kappa(mlp, X)
    u = update(fresh, g, moved)
    assert seen[3] == pytest.approx(float(u["Dense_0"]["kernel"][0, 0]), rel=1e-6)


@pytest.mark.parametrize("policy", ["freeze", "pass"])
def test_weights_on_no_path_follow_the_zero_kappa_policy(policy):
    def fn(w, x):
        return jax.nn.relu(x @ w["in"]) @ w["out"]

    # Unit 1 has no way out, so κ = 0 on its incoming weights.
    w = {"in": jnp.ones((2, 2)), "out": jnp.array([[3.0], [0.0]]), "unused": jnp.ones(4)}
    g = jax.tree.map(lambda a: 5 * jnp.ones_like(a), w)
    tx = scale_by_path_kappa(fn, jnp.zeros((1, 2)), zero_kappa=policy)
    u = update(tx, g, w)
    left = 5.0 if policy == "pass" else 0.0
    np.testing.assert_allclose(u["in"], [[5 / 9, left]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(u["unused"], left)
    np.testing.assert_allclose(u["out"], 2.5)


def test_weights_beyond_the_range_of_float32_give_nan_not_a_silent_zero():
    w = [jnp.ones((300, 300)).at[17, 33].set(1e30)]
    tx = scale_by_path_kappa(lambda w, x: x @ w[0], jnp.zeros((1, 300)))
    u = update(tx, [jnp.ones((300, 300))], w)
    assert np.isnan(u[0]).any()


# --- invariance -----------------------------------------------------------------------


def _rescale_mlp(params, draw):
    """Incoming weights and bias of every hidden unit × d, outgoing ÷ d."""
    out = jax.tree.map(lambda a: a, params)
    layers = [out[f"Dense_{i}"] for i in range(len(out))]
    for this, after in zip(layers, layers[1:], strict=False):
        d = draw(this["bias"].shape).astype(this["bias"].dtype)
        this["kernel"], this["bias"] = this["kernel"] * d, this["bias"] * d
        after["kernel"] = after["kernel"] / d[:, None]
    return out


def _rescale_cnn(params, draw):
    """The stem and the end of the residual branch are tied across the skip connection."""
    out = jax.tree.map(lambda a: a, params)
    tied, inner = (draw(params[n]["bias"].shape) for n in ("Conv_0", "Conv_1"))

    def produce(name, d):
        out[name] = {"kernel": out[name]["kernel"] * d, "bias": out[name]["bias"] * d}

    def consume(name, d):
        out[name] = {"kernel": out[name]["kernel"] / d[:, None], "bias": out[name]["bias"]}

    produce("Conv_0", tied), consume("Conv_1", tied)
    produce("Conv_1", inner), consume("Conv_2", inner)
    produce("Conv_2", tied), consume("Dense_0", tied)
    return out


IMAGES = jax.random.normal(jax.random.key(5), (8, 8, 8, 1))
NETS = {
    "mlp": (
        mlp,
        lambda: init_mlp(jax.random.key(2), (6, 24, 16, 3), bias_std=0.1),
        X,
        _rescale_mlp,
    ),
    "cnn": (cnn, lambda: init_cnn(jax.random.key(2), 6, bias_std=0.1), IMAGES, _rescale_cnn),
}


@functools.lru_cache
def _trainer(name, p):
    fn, _, x, _ = NETS[name]
    tx = path_sgd(0.05 if p == 2 else 0.01, fn, x, momentum=0.9, p=p)
    y = jnp.arange(len(x)) % 3

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            g = jax.grad(loss)(params, fn, x, y)
            u, state = tx.update(g, state, params)
            params = optax.apply_updates(params, u)
            return (params, state), fn(params, x)

        return jax.lax.scan(step, (params, tx.init(params)), None, length=100)[1]

    return train


CASES = [("mlp", 1.0), ("mlp", 2.0), pytest.param("mlp", 3.0, marks=pytest.mark.slow), ("cnn", 2.0)]


@pytest.mark.parametrize("name, p", CASES)
def test_power_of_two_rescaling_changes_no_bit_of_100_outputs(name, p):
    _, make, _, rescale = NETS[name]
    rng = np.random.default_rng(0)
    other = rescale(make(), lambda shape: jnp.asarray(2.0 ** rng.integers(-6, 7, shape)))
    a, b = _trainer(name, p)(make()), _trainer(name, p)(other)
    assert float(jnp.abs(a[-1] - a[0]).max()) > 1e-2  # it did learn something
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_random_rescaling_changes_outputs_by_rounding_only(name, x64):
    fn, make, x, rescale = NETS[name]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: w.astype(jnp.float64), make())
    other = rescale(params, lambda shape: jnp.asarray(np.exp(2 * rng.normal(size=shape))))
    x = x.astype(jnp.float64)
    tx = path_sgd(0.05, fn, x, momentum=0.9)
    y = jnp.arange(len(x)) % 3

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            u, state = tx.update(jax.grad(loss)(params, fn, x, y), state, params)
            params = optax.apply_updates(params, u)
            return (params, state), fn(params, x)

        return jax.lax.scan(step, (params, tx.init(params)), None, length=100)[1]

    a, b = train(params), train(other)
    assert float(jnp.abs(a - b).max() / jnp.abs(a).max()) < 1e-9


def test_sgd_is_not_invariant():
    tx = optax.sgd(0.05)
    rng = np.random.default_rng(0)
    params = make_params()
    other = _rescale_mlp(params, lambda shape: jnp.asarray(2.0 ** rng.integers(-2, 3, shape)))
    after = []
    for p in (params, other):
        u = update(tx, gradient(p), p)
        after.append(mlp(optax.apply_updates(p, u), X))
    assert np.abs(np.subtract(*after)).max() > 1e-2


# --- the checks that optax makes of its own optimizers ----------------------------------


@of_variants("core", "p = 2.5, matched", "schedule, masked")
def test_extra_arguments_are_accepted(tx):
    params = make_params()
    g = gradient(params)
    want = update(tx, g, params)
    got, _ = jax.jit(tx.update)(g, tx.init(params), params, value=1.0, something_else=None)
    chex.assert_trees_all_equal(want, got)


@variants
def test_the_second_call_does_not_recompile(tx):
    params = make_params()
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for _ in range(3):
        u, state = step(gradient(params), state, params)
        params = optax.apply_updates(params, u)


@variants
def test_tree_map_params_reaches_the_leaves_like_params_only(tx):
    params = make_params()
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda leaf: "param", state)
    leaves = jax.tree.leaves(marked)
    like_params = [leaf for leaf in leaves if isinstance(leaf, str)]
    assert len(like_params) % len(jax.tree.leaves(params)) == 0
    assert all(np.ndim(leaf) == 0 for leaf in leaves if not isinstance(leaf, str))


@variants
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_the_dtype_and_the_state_its_types(tx, dtype):
    params = make_params(dtype)
    state = tx.init(params)
    # Types are known before anything is compiled.
    u, after = jax.eval_shape(tx.update, jax.tree.map(jnp.ones_like, params), state, params)
    assert {a.dtype for a in jax.tree.leaves(u)} == {jnp.dtype(dtype)}
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@of_variants("momentum, every 3", "p = 2.5, matched", "schedule, masked")
def test_training_reduces_the_loss(tx):
    params = make_params()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, g = jax.value_and_grad(loss)(params)
            u, state = tx.update(g, state, params)
            return (optax.apply_updates(params, u), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=200)[1]

    losses = train(params)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


# --- it composes ----------------------------------------------------------------------


def test_inject_hyperparams_changes_the_learning_rate_alone():
    make = optax.inject_hyperparams(lambda learning_rate: path_sgd(learning_rate, mlp, X))
    params = make_params()
    g = gradient(params)
    tx = make(learning_rate=0.1)
    state = tx.init(params)
    update = jax.jit(tx.update)
    u1, state = update(g, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    u2, _ = update(g, state, params)
    chex.assert_trees_all_close(jax.tree.map(lambda a: 2 * a, u1), u2, rtol=1e-6)


def test_inject_hyperparams_works_directly_with_static_arguments():
    tx = optax.inject_hyperparams(path_sgd, static_args=("fn", "x", "p"))(0.1, fn=mlp, x=X)
    params = make_params()
    g = gradient(params)
    got, _ = jax.jit(tx.update)(g, tx.init(params), params)
    plain = path_sgd(0.1, mlp, X)
    want = update(plain, g, params)
    chex.assert_trees_all_close(got, want, rtol=1e-5)
    static = ("fn", "x", "p", "every", "zero_kappa")
    core = optax.inject_hyperparams(scale_by_path_kappa, static_args=static)(mlp, X, eps=0.1)
    state = core.init(params)
    state.hyperparams["eps"] = jnp.float32(0.5)
    got, _ = jax.jit(core.update)(g, state, params)
    want = update(scale_by_path_kappa(mlp, X, eps=0.5), g, params)
    chex.assert_trees_all_close(got, want, rtol=1e-5)


def test_chain_multi_steps_and_apply_if_finite():
    params = make_params()
    g = gradient(params)
    core = path_sgd(0.1, mlp, X)
    want = update(core, g, params)
    # optax's MultiSteps divides an integer count into floats.
    relaxed = jax.numpy_dtype_promotion("standard")
    wrapped = {
        "chain": optax.chain(optax.identity(), core),
        "multi": optax.MultiSteps(core, 2).gradient_transformation(),
        "finite": optax.apply_if_finite(core, 3),
    }
    for name, tx in wrapped.items():
        with relaxed if name == "multi" else contextlib.nullcontext():
            state = tx.init(params)
            step = jax.jit(tx.update)
            u, state = step(g, state, params)
            if name == "multi":
                assert not any(np.any(a) for a in jax.tree.leaves(u))
                u, state = step(g, state, params)
        chex.assert_trees_all_close(u, want, rtol=1e-5)
    bad = jax.tree.map(lambda a: a * jnp.nan, g)
    u, _ = step(bad, wrapped["finite"].init(params), params)  # the last of them
    assert not any(np.any(a) for a in jax.tree.leaves(u))


def _labels(params):
    return {name: "path" if name == "Dense_1" else "plain" for name in params}


def test_partition_and_masked_get_all_parameters_through_share_params():
    params = make_params()
    g = gradient(params)
    core = descend(scale_by_path_kappa(mlp, X, every=2))
    want = update(core, g, params)
    parts = {"path": core, "plain": optax.sgd(0.3)}
    tx = pass_full_params(optax.partition(parts, _labels(params)))
    u, _ = jax.jit(tx.update)(g, tx.init(params), params)
    np.testing.assert_allclose(u["Dense_1"]["kernel"], want["Dense_1"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(u["Dense_0"]["kernel"], -0.3 * g["Dense_0"]["kernel"], rtol=1e-6)
    masked = optax.masked(core, {n: {"kernel": True, "bias": False} for n in params})
    tx = pass_full_params(masked)
    u, _ = jax.jit(tx.update)(g, tx.init(params), params)
    np.testing.assert_allclose(u["Dense_0"]["kernel"], want["Dense_0"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(u["Dense_0"]["bias"], g["Dense_0"]["bias"])
    with pytest.raises(InvalidInput, match=r"Some parameters are masked.*pass_full_params"):
        masked.update(g, masked.init(params), params)


@pytest.mark.parametrize("every", [1, 2])
def test_masked_updates_are_those_without_a_mask_and_other_gradients_pass_through(every):
    params = make_params(sizes=DEEP)
    mask = {n: {"kernel": n != "Dense_2", "bias": False} for n in params}
    full = scale_by_path_kappa(mlp, X, every=every)
    tx = pass_full_params(optax.masked(full, mask))
    here, there, steps = tx.init(params), full.init(params), [jax.jit(tx.update)]
    steps.append(jax.jit(full.update))
    for t in range(3):
        # The masked weights move as well, and κ of the others with them.
        params = jax.tree.map(lambda w, t=t: w * (1 + t), params)
        g = gradient(params)
        u, here = steps[0](g, here, params)
        want, there = steps[1](g, there, params)
        expected = jax.tree.map(lambda chosen, a, b: a if chosen else b, mask, want, g)
        chex.assert_trees_all_equal(u, expected)
    if every == 2:
        kappa, all_of_it = here.inner_state.kappa, there.kappa
        ratios = [np.asarray(kappa[n]["kernel"] / all_of_it[n]["kernel"]) for n in list(mask)[:2]]
        assert all((r == ratios[0][0, 0]).all() for r in ratios)  # over another exponent
        assert len(jax.tree.leaves(kappa)) == 2 < len(jax.tree.leaves(all_of_it))


def test_vmap_over_seeds_equals_the_loop():
    tx = descend(match_gradient_norm(scale_by_path_kappa(mlp, X, every=2)), momentum=0.9)
    seeds = [make_params(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *seeds)

    def three_steps(params):
        def step(carry, _):
            params, state = carry
            u, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, u), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0][0]

    together, alone = jax.jit(jax.vmap(three_steps))(stacked), jax.jit(three_steps)
    for i, params in enumerate(seeds):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=1e-6),
            together, alone(params),
        )  # fmt: skip


def test_sharded_parameters_give_the_updates_of_one_device_and_stay_sharded():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    assert devices.size == 8
    mesh = Mesh(devices, ("rows", "columns"))
    params = init_mlp(jax.random.key(0), (512, 256, 8), bias_std=0.1)
    x, y = jax.random.normal(jax.random.key(1), (16, 512)), jnp.arange(16) % 8
    tx = descend(match_gradient_norm(scale_by_path_kappa(mlp, x, every=2)), momentum=0.9)

    def place(a):
        spec = PartitionSpec("rows", "columns") if a.ndim == 2 else PartitionSpec("columns")
        return jax.device_put(a, NamedSharding(mesh, spec))

    sharded = jax.tree.map(place, params)
    g = jax.jit(jax.grad(lambda w: loss(w, mlp, x, y)))(params)
    want, _ = jax.jit(tx.update)(g, tx.init(params), params)
    got, state = jax.jit(tx.update)(jax.tree.map(place, g), tx.init(sharded), sharded)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-7)
    kernel = got["Dense_0"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape == (128, 128)
    kappa = state[0].inner_state.kappa["Dense_0"]["kernel"]
    assert kappa.addressable_shards[0].data.shape == (128, 128)


def test_orbax_checkpoint_resumes_bitwise(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    core = match_gradient_norm(scale_by_path_kappa(mlp, X, every=3))
    tx = descend(core, optax.linear_schedule(0.1, 0.01, 20), momentum=0.9)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params, state):
        def step(carry, _):
            params, state = carry
            u, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, u), state), None

        return jax.lax.scan(step, (params, state), None, length=5)[0]

    params = make_params()
    half = run(params, tx.init(params))
    after = run(half[0], jax.tree.map(jnp.copy, half[1]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
        restored = checkpointer.restore(tmp_path / "half", target)
    chex.assert_trees_all_equal(after, run(*restored))


# --- clear errors ---------------------------------------------------------------------


def test_missing_parameters_are_named():
    params = make_params()
    tx = path_sgd(0.1, mlp, X)
    with pytest.raises(InvalidInput, match="Path-SGD needs the parameters"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"p": 0.5}, "p must be a fixed real number with 1 <= p"),
        ({"every": 0}, "every must be a fixed integer >= 1"),
        ({"every": 1.5}, "every must be a fixed integer >= 1"),
        ({"zero_kappa": "skip"}, "'freeze' or 'pass', not 'skip'"),
    ],
)
def test_bad_options_are_refused_at_once(options, text):
    with pytest.raises(InvalidInput, match=text):
        scale_by_path_kappa(mlp, X, **options)


def test_integer_parameters_and_uncovered_networks_are_refused_at_update():
    w = {"a": jnp.ones((6, 2), jnp.int32)}
    tx = scale_by_path_kappa(lambda w, x: x @ w["a"].astype(x.dtype), X)
    with pytest.raises(InvalidInput, match="params/a has dtype int32"):
        tx.update(w, tx.init(w), w)
    params = make_params()
    tx = path_sgd(0.1, functools.partial(mlp, activation=jnp.tanh), X)
    with pytest.raises(UnsupportedOperation, match="`tanh`"):
        jax.jit(tx.update)(params, tx.init(params), params)
