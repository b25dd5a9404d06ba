"""Models of other libraries as `fn(params, x)`: what the library computes, in evaluation mode."""

import importlib
import importlib.util
import inspect
import os
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    gates,
    jacobian_rank,
    path_norm,
    path_sgd,
    rescaling_group,
)
from jaxinv.adapters import from_equinox, from_haiku, from_keras, from_linen, from_nnx

X = jax.random.normal(jax.random.key(0), (40, 4))
MEAN, VAR = np.array([0.5, -1.0, 0.25], np.float32), np.array([1.0, 4.0, 0.5], np.float32)


class Case(NamedTuple):
    """A model Dense(3) → batch norm → ReLU → dropout → Dense(2) of four inputs."""

    fn: object
    params: object
    expected: object  # the library's own output on X in evaluation mode
    arrays: list  # W1, b1, scale, offset, mean, variance, W2, b2
    eps: float = 1e-5
    edges: bool = True  # parameters enter as edge weights, each by itself


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linen():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    variables = Net().init(jax.random.key(1), X, train=False)
    variables["params"]["Dense_0"]["bias"] = random(2, 3)
    variables["params"]["BatchNorm_0"]["bias"] = random(3, 3)
    variables["batch_stats"]["BatchNorm_0"] = {"mean": jnp.array(MEAN), "var": jnp.array(VAR)}
    p = variables["params"]
    arrays = [*p["Dense_0"].values(), *p["BatchNorm_0"].values(), MEAN, VAR, *p["Dense_1"].values()]
    expected = Net().apply(variables, X, train=False)
    return Case(*from_linen(Net(), variables), expected, arrays)


def nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 3, bias_init=nnx.initializers.normal(), rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    model = Net(nnx.Rngs(0))
    model.norm.mean[...], model.norm.var[...] = jnp.array(MEAN), jnp.array(VAR)
    fn, params = from_nnx(model)
    assert not model.dropout.deterministic and not model.norm.use_running_average  # untouched
    layers = (model.first.kernel, model.first.bias, model.norm.scale, model.norm.bias)
    arrays = [*layers, MEAN, VAR, model.last.kernel, model.last.bias]
    model.eval()
    return Case(fn, params, model(X), [np.asarray(a[...]) for a in arrays], 1e-5)


def equinox():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        last: eqx.nn.Linear

        def __init__(self, key):
            self.first = eqx.nn.Linear(4, 3, key=key)
            self.norm = eqx.nn.BatchNorm(3, "batch", mode="ema", eps=1e-5)
            self.dropout = eqx.nn.Dropout(0.5)
            self.last = eqx.nn.Linear(3, 2, key=key)

        def __call__(self, x, state, key):
            x, state = self.norm(self.first(x), state)
            return self.last(self.dropout(jax.nn.relu(x), key=key)), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), len(X))
    axes = {"in_axes": (0, None, 0), "out_axes": (0, None), "axis_name": "batch"}
    for _ in range(3):
        _, state = jax.vmap(model, **axes)(X, state, keys)
    still = eqx.nn.inference_mode(model)
    expected = jnp.stack([still(x, state, None)[0] for x in X])
    stored = jax.tree.leaves(state)
    mean, var = (a for a in stored if jnp.shape(a) == (3,))
    first, last, norm = model.first, model.last, model.norm
    arrays = [first.weight.T, first.bias, norm.weight, norm.bias, mean, var]
    fn, params = from_equinox(model, state)
    return Case(fn, params, expected, [*arrays, last.weight.T, last.bias])


def haiku(apply_rng=True):
    hk = pytest.importorskip("haiku")

    def net(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(
            hk.Linear(3, b_init=hk.initializers.Constant(0.3))(x), is_training
        )
        x = hk.dropout(hk.next_rng_key(), 0.5, jax.nn.relu(x)) if is_training else jax.nn.relu(x)
        return hk.Linear(2)(x)

    whole = hk.transform_with_state(net)
    params, state = whole.init(jax.random.key(1), X, is_training=True)
    for _ in range(3):
        _, state = whole.apply(params, state, jax.random.key(2), X, is_training=True)
    expected = whole.apply(params, state, None, X, is_training=False)[0]
    given = whole if apply_rng else hk.without_apply_rng(whole)
    mean, var = (state[f"batch_norm/~/{k}_ema"]["average"][0] for k in ("mean", "var"))
    first, norm, last = (params[k] for k in ("linear", "batch_norm", "linear_1"))
    scale, offset = norm["scale"].reshape(3), norm["offset"].reshape(3)
    arrays = [first["w"], first["b"], scale, offset, mean, var, last["w"], last["b"]]
    return Case(*from_haiku(given, params, state), expected, arrays)


def keras():
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend")
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, bias_initializer="random_normal"),
            layers.BatchNormalization(epsilon=1e-5),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Dense(2),
        ]
    )
    model.layers[1].moving_mean.assign(MEAN)
    model.layers[1].moving_variance.assign(VAR)
    w1, b1, scale, offset, w2, b2 = (v.value for v in model.trainable_variables)
    arrays = [w1, b1, scale, offset, MEAN, VAR, w2, b2]
    return Case(*from_keras(model), model(X, training=False), arrays, edges=False)


CASES = {
    "linen": linen,
    "nnx": nnx,
    "equinox": equinox,
    "haiku": haiku,
    "haiku without_apply_rng": lambda: haiku(apply_rng=False),
    "keras": keras,
}


@pytest.fixture(params=CASES)
def case(request, standard_dtype_promotion):
    return CASES[request.param]()


def test_fn_is_the_model_in_evaluation_mode_and_all_of_jaxinv_takes_it(case):
    fn, params = case.fn, case.params
    assert np.ptp(np.asarray(case.expected)) > 0.1
    # What the library computes and what the formula says; twice, as nothing is random.
    W1, b1, scale, offset, mean, var, W2, b2 = (np.asarray(a, np.float64) for a in case.arrays)
    factor = scale / np.sqrt(var + case.eps)
    hidden = np.maximum((np.asarray(X, np.float64) @ W1 + b1 - mean) * factor + offset, 0)
    compiled = jax.jit(fn)
    for call in (fn, compiled):
        np.testing.assert_allclose(call(params, X), case.expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(call(params, X), hidden @ W2 + b2, rtol=1e-4, atol=1e-5)

    # Gradients reach every parameter.
    gradients = jax.jit(jax.grad(lambda w: jnp.sum(fn(w, X) ** 2)))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
    assert all(jnp.any(g != 0) and jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients))

    # γ² over paths from inputs, biases and the stored mean, by hand.
    into = ((W1**2).sum(0) + b1**2 + mean**2) * factor**2 + offset**2
    squared = (into[:, None] * W2**2).sum() + (b2**2).sum()
    norm = jax.jit(lambda w: path_norm(fn, w, X))(params)
    np.testing.assert_allclose(norm**2, squared, rtol=1e-4)

    # Behind a stored mean the first layer has one scale; each unit has one behind the norm.
    assert rescaling_group(fn, params, X).dim == 3
    found = jacobian_rank(fn, params, X, method="svd")
    rows = jax.tree.leaves(jax.jit(jax.jacrev(fn))(params, X))
    J = np.concatenate([np.reshape(a, (2 * len(X), -1)) for a in rows], 1).astype(np.float64)
    s = np.linalg.svd(J, compute_uv=False)
    assert int(found.rank) == (s > 1e-5 * s[0]).sum() < len(s)

    optimizer = path_sgd(0.01, fn, X)
    if case.edges:
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    else:  # keras adds offset − mean·scale/√variance
        with pytest.raises(UnsupportedOperation, match="edge weight is a nonlinear function") as e:
            optimizer.update(gradients, optimizer.init(params), params)
        # The model is in evaluation mode already.
        assert "effective weights" in str(e.value) and "evaluation mode" not in str(e.value)


# --- flax -----------------------------------------------------------------------------


def test_linen_modes_as_fields_and_as_arguments_of_layers():
    import flax.linen as nn

    class Net(nn.Module):
        deterministic: bool = False

        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=self.deterministic)(nn.Dense(2)(x))

    variables = Net(deterministic=True).init(jax.random.key(0), X)
    fn, params = from_linen(Net(), variables)  # the field says training
    np.testing.assert_array_equal(fn(params, X), Net(deterministic=True).apply(variables, X))

    layers = [nn.BatchNorm(), nn.BatchNorm(use_running_average=False)]
    layers.append(nn.BatchNorm(use_running_average=True))
    variables = layers[-1].init(jax.random.key(0), X)
    for layer in layers:
        fn, params = from_linen(layer, variables)
        np.testing.assert_array_equal(fn(params, X), layers[-1].apply(variables, X))


def test_linen_methods_and_several_inputs():
    import flax.linen as nn

    class Net(nn.Module):
        def setup(self):
            self.layer = nn.Dense(2)

        def __call__(self, a, b):
            return self.layer(a + b)

        def encode(self, x, train):
            return self.layer(x) if not train else x

    variables = Net().init(jax.random.key(0), X, X)
    fn, params = from_linen(Net(), variables, method=lambda module, x: module(*x))
    np.testing.assert_array_equal(fn(params, (X, X)), Net().apply(variables, X, X))
    for method in ("encode", Net.encode):
        fn, params = from_linen(Net(), variables, method=method)
        np.testing.assert_array_equal(
            fn(params, X), Net().apply(variables, X, False, method="encode")
        )


def test_linen_refuses_what_is_not_evaluation():
    import flax.linen as nn

    class Net(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.layer(x)

    dropout = Net(nn.Dropout(0.5, deterministic=False))
    norm = Net(nn.BatchNorm(use_running_average=False))
    for module in (dropout, norm):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = {"params": {}, **module.init(keys, X)}
        fn, params = from_linen(module, variables)
        with pytest.raises(InvalidInput, match="not in evaluation mode"):
            fn(params, X)
    with pytest.raises(InvalidInput, match=r'the collection "params".*kernel'):
        from_linen(nn.Dense(2), {"kernel": jnp.ones((4, 2))})


def test_an_argument_that_is_given_wins():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train, factor):
            return factor * nn.Dense(2)(x) if train else x

    variables = Net().init(jax.random.key(0), X, True, 1.0)
    fn, params = from_linen(Net(), variables, train=True, factor=3.0)
    np.testing.assert_array_equal(fn(params, X), Net().apply(variables, X, True, 3.0))


def test_parameters_of_nnx_are_named_as_in_the_model():
    from flax import nnx

    rngs = nnx.Rngs(0)
    fn, params = from_nnx(nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)))
    group = rescaling_group(fn, params, X)
    assert group.names[0] == "layers/0/kernel out 0 → layers/1/kernel in 0"


def test_nnx_modes_as_arguments_and_attributes_and_other_variables():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.training = True
            self.layer = nnx.Linear(4, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, train: bool):
            assert not self.training
            return self.dropout(self.layer(x), deterministic=not train)

    model = Net(nnx.Rngs(0))
    fn, params = from_nnx(model)
    np.testing.assert_array_equal(fn(params, X), model.layer(X))
    assert model.training
    fn, params = from_nnx(model, train=True)
    with pytest.raises(InvalidInput, match="draws random numbers"):
        fn(params, X)
    with pytest.raises(InvalidInput, match="draws random numbers"):
        path_norm(fn, params, X)
    with pytest.raises(InvalidInput, match="no variables of the kind wrt"):
        from_nnx(model, wrt=nnx.BatchStat)
    fn, params = from_nnx(model, wrt=nnx.PathContains("bias"))
    chex.assert_tree_shape_prefix(params, (2,))
    # The parameters are a state of nnx, and go back into the model.
    nnx.update(model, jax.tree.map(lambda a: a + 1, params))
    np.testing.assert_array_equal(model.layer.bias[...], np.ones(2))


# --- equinox, haiku -------------------------------------------------------------------


def test_equinox_layers_take_one_example_unless_they_take_a_batch():
    eqx = pytest.importorskip("equinox")

    model = eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0))
    fn, params = from_equinox(model)
    np.testing.assert_allclose(fn(params, X), jax.vmap(model)(X), rtol=1e-6)
    back = eqx.combine(params, model)
    assert eqx.tree_equal(back, model)

    class Batched(eqx.Module):
        layer: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.layer)(x)

    fn, params = from_equinox(Batched(model), batched=False)
    np.testing.assert_allclose(fn(params, X), jax.vmap(model)(X), rtol=1e-6)
    layer = eqx.nn.Sequential([eqx.nn.Linear(4, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    fn, params = from_equinox(layer)
    np.testing.assert_allclose(fn(params, X), jax.vmap(layer[0])(X), rtol=1e-6)
    with pytest.raises(InvalidInput, match="no arrays of floats"):
        from_equinox(eqx.nn.Dropout(0.5))


def test_haiku_without_state():
    hk = pytest.importorskip("haiku")

    whole = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))
    params = whole.init(jax.random.key(0), X)
    expected = whole.apply(params, None, X)
    for net in (whole, hk.without_apply_rng(whole)):
        fn, _ = from_haiku(net, params)
        np.testing.assert_array_equal(fn(params, X), expected)
        with pytest.raises(InvalidInput, match="transformed without: leave state out"):
            from_haiku(net, params, {})
    noisy = hk.transform(lambda x: hk.Linear(2)(x) + jax.random.normal(hk.next_rng_key(), (2,)))
    fn, params = from_haiku(noisy, noisy.init(jax.random.key(0), X), rng=jax.random.key(1))
    np.testing.assert_array_equal(fn(params, X), fn(params, X))


def test_haiku_refuses_what_is_not_evaluation(standard_dtype_promotion):
    hk = pytest.importorskip("haiku")

    net = hk.transform_with_state(
        lambda x, is_training: hk.BatchNorm(True, True, 0.9)(x, is_training)
    )
    params, state = net.init(jax.random.key(0), X, True)
    with pytest.raises(InvalidInput, match="pass the state that init returned"):
        from_haiku(net, params)
    fn, params = from_haiku(net, params, state, is_training=True)
    with pytest.raises(InvalidInput, match="changes its state, so it is not in evaluation mode"):
        path_norm(fn, params, X)


# --- a model where a function is wanted ------------------------------------------------


def models():
    """One of each library, and what the message says."""
    import flax.linen as nn
    from flax import nnx

    yield nn.Dense(2), r"a flax linen module \(Dense\).*adapters\.from_linen\(model, variables\)"
    yield nnx.Linear(4, 2, rngs=nnx.Rngs(0)), r"a flax nnx module \(Linear\).*from_nnx\(model\)"
    if importlib.util.find_spec("equinox"):
        import equinox as eqx

        layer = eqx.nn.Linear(4, 2, key=jax.random.key(0))
        yield layer, r"an equinox module \(Linear\).*from_equinox\(model\)"
        yield eqx.nn.BatchNorm(2, "batch", mode="ema"), r"from_equinox\(model\)"
    if importlib.util.find_spec("haiku"):
        import haiku as hk

        for transform in (hk.transform, hk.transform_with_state):
            yield transform(lambda x: x), r"of haiku \(Transformed.*from_haiku\(net, params\)"


def test_nnx_models_that_jit_their_call():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        @nnx.jit(static_argnames="noisy")
        def __call__(self, x, noisy=False):
            return nnx.relu(self.dropout(self.norm(self.layer(x)), deterministic=not noisy))

    model = Net(nnx.Rngs(0))
    fn, params = from_nnx(model)
    noisy, _ = from_nnx(model, noisy=True)
    model.eval()
    for call in (fn, jax.jit(fn)):
        np.testing.assert_allclose(call(params, X), model(X), rtol=1e-6)
    assert path_norm(fn, params, X) > 0
    for call in (noisy, jax.jit(noisy)):
        with pytest.raises(InvalidInput, match="draws random numbers"):
            call(params, X)


def test_params_that_are_a_model_are_told_the_adapters():
    from flax import nnx

    eqx = pytest.importorskip("equinox")
    for model in (
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        eqx.nn.MLP(4, 1, 3, 1, key=jax.random.key(0)),
    ):
        with pytest.raises(InvalidInput, match="adapters does that for models"):
            path_norm(lambda m, x: m(x), model, X)


def test_a_model_in_place_of_fn_is_told_its_adapter():
    for model, message in models():
        with pytest.raises(InvalidInput, match=message):
            path_norm(model, {"w": jnp.ones(2)}, X)
    import flax.linen as nn

    with pytest.raises(InvalidInput, match=r"a flax linen module \(Dense\)"):
        path_norm(nn.Dense, {"w": jnp.ones(2)}, X)
    with pytest.raises(InvalidInput, match="fn must be a function .*not 'model'"):
        path_norm("model", {"w": jnp.ones(2)}, X)


def test_an_equinox_module_of_parameters_and_inputs_is_a_function():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        factor: float

        def __call__(self, params, x):
            return self.factor * x @ params

    assert path_norm(Net(2.0), jnp.ones((4, 1)), X) == 4.0
    assert path_norm(eqx.filter_jit(lambda w, x: x @ w), jnp.ones((4, 1)), X) == 2.0


PACKAGES = (
    "paths jacobians ranks gates symmetries capacity reparam optimizers bayes inspection pages"
)


def functions_of_a_network():
    modules = [jaxinv, *(importlib.import_module(f"jaxinv.{name}") for name in PACKAGES.split())]
    found = {f for module in modules for f in vars(module).values() if inspect.isfunction(f)}
    taking = [f for f in found if "fn" in inspect.signature(f).parameters]
    return sorted(taking, key=lambda f: f.__name__)


@pytest.mark.parametrize("function", functions_of_a_network(), ids=lambda f: f.__name__)
def test_every_public_function_says_so(function):
    import flax.linen as nn
    import optax

    def net(w, x):
        return jnp.maximum(x @ w["a"], 0) @ w["b"]

    w, x = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}, X[:2]
    values = {
        "alpha": 0.5, "batch_axis": 0, "likelihood": "gaussian", "learning_rate": 0.1, "start": 0,
        "loss": lambda w: 0.0, "log_prior": lambda w: 0.0, "optimizer": optax.sgd(0.1), "add": net,
        "reparam": net, "group": rescaling_group(net, w, x), "y": jnp.zeros(2, int), "x": x,
        "params": w, "other_params": w, "moved": w, "gradient": w, "v": w,
        "region": gates.everywhere(x),
    }  # fmt: skip
    wanted = inspect.signature(function).parameters.values()
    given = {p.name: values[p.name] for p in wanted if p.default is p.empty and p.name != "fn"}
    with pytest.raises(InvalidInput, match="from_linen"):
        made = function(fn=nn.Dense(2), **given)
        # What only makes a function says so at the latest when that is called.
        if isinstance(made, optax.GradientTransformation):
            optax.with_extra_args_support(made).update(w, made.init(w), w, batch=x)
        elif hasattr(made, "statistics"):
            made.statistics(w, x)
        else:
            made(w)
