"""Models of equinox, equimo, keras and jraph."""

import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _zoo_common import (
    CLASSES,
    EPS,
    Model,
    generic,
    graphs,
    inputs,
    powered_statistics,
    powers,
    random,
    through_mean,
)

from jaxinv.adapters import from_equinox, from_keras

# --- equinox, equimo ------------------------------------------------------------------------


def equinox_mlp() -> Model:
    """`eqx.nn.MLP`, two hidden layers."""
    import equinox as eqx

    fn, params = from_equinox(eqx.nn.MLP(64, CLASSES, 8, 2, key=jax.random.key(0)))
    params = generic(params)

    def powered(p: float) -> Any:
        return fn(powers(params, p), jnp.ones((1, 64), jax.tree.leaves(params)[0].dtype))

    return Model(fn, params, "pixels", powered)


def equinox_rope() -> Model:
    """Attention with rotary embeddings between two linear layers."""
    import equinox as eqx

    class Net(eqx.Module):
        first: eqx.nn.Linear
        attention: eqx.nn.MultiheadAttention
        rope: eqx.nn.RotaryPositionalEmbedding
        last: eqx.nn.Linear

        def __init__(self, key: Any) -> None:
            keys = jax.random.split(key, 3)
            self.first = eqx.nn.Linear(8, 8, use_bias=False, key=keys[0])
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
            self.rope = eqx.nn.RotaryPositionalEmbedding(4)
            self.last = eqx.nn.Linear(8, CLASSES, use_bias=False, key=keys[2])

        def __call__(self, x: Any) -> Any:
            def turned(q: Any, k: Any, v: Any) -> Any:
                turn = jax.vmap(self.rope, in_axes=1, out_axes=1)
                return turn(q), turn(k), v

            x = jnp.tanh(jax.vmap(self.first)(x))
            x = x + self.attention(x, x, x, process_heads=turned)
            return self.last(jnp.tanh(x).mean(0))

    fn, params = from_equinox(Net(jax.random.key(0)))
    return Model(fn, generic(params), "rows")


def equimo_vit() -> Model:
    """A vision transformer of equimo: four patches, a class token, one block."""
    from equimo.models import VisionTransformer

    model = VisionTransformer(
        8, 1, 6, 4, 2, [1], key=jax.random.key(0), reg_tokens=0, num_classes=CLASSES, mlp_ratio=1.5
    )
    fn, params = from_equinox(model)
    return Model(fn, generic(params), "channels first")


def equimo_convnext() -> Model:
    """A ConvNeXt of equimo, of one stage with one block."""
    from equimo.models import ConvNeXt

    model = ConvNeXt(
        1, depths=[1], dims=[7], layer_scale_init_value=0.5, num_classes=CLASSES,
        key=jax.random.key(0),
    )  # fmt: skip
    fn, params = from_equinox(model)
    return Model(fn, generic(params), "channels first")


# --- keras --------------------------------------------------------------------------------


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = importlib.import_module("keras")
    keras.utils.clear_session()  # names count from zero
    keras.utils.set_random_seed(0)
    return keras


def keras_cnn() -> Model:
    """Convolutions with a batch norm and a residual connection, by the functional interface."""
    keras = _keras()
    layers = keras.layers
    x = keras.Input((8, 8, 1))
    h = layers.Conv2D(4, 3, activation="relu")(x)
    y = layers.Conv2D(3, 3, padding="same", activation="relu")(h)
    y = layers.Conv2D(4, 3, padding="same")(y)
    y = layers.BatchNormalization(epsilon=EPS, momentum=0.0)(y)
    h = layers.ReLU()(layers.Add()([h, y]))
    model = keras.Model(x, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(h)))
    found = _from_keras(model, "image")
    (norm,) = (layer for layer in model.layers if hasattr(layer, "moving_mean"))

    def powered(p: float) -> Any:
        mean, variance = (jnp.asarray(v.value) for v in (norm.moving_mean, norm.moving_variance))
        norm.set_weights([norm.gamma, norm.beta, *powered_statistics(mean, variance, p)])
        fn, _ = from_keras(model)
        norm.set_weights([norm.gamma, norm.beta, mean, variance])
        w = powers(found.params, p)
        (bias,) = (w[name] for name in w if name.startswith("dense") and name.endswith("bias"))
        return through_mean(fn(w, jnp.ones((1, 8, 8, 1))), bias, 36, p)

    return found._replace(powered=powered)


def keras_transformer() -> Model:
    """Attention and a layer norm of keras."""
    keras = _keras()
    layers = keras.layers
    x = keras.Input((8, 8))
    h = layers.Dense(6)(x)
    h = layers.Add()([h, layers.MultiHeadAttention(2, 3)(h, h)])
    h = layers.LayerNormalization()(h)
    h = layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(layers.Dense(7, "relu")(h)))
    return _from_keras(keras.Model(x, h), "rows")


def keras_lstm() -> Model:
    """An LSTM of keras and a softmax."""
    keras = _keras()
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((8, 8)), layers.LSTM(5), layers.Dense(CLASSES, activation="softmax")]
    )
    return _from_keras(model, "rows")


def _from_keras(model: Any, x: str) -> Model:
    for variable in model.trainable_variables:
        variable.assign(generic(variable.value))
    if any(hasattr(layer, "moving_mean") for layer in model.layers):
        model(inputs(x, 100), training=True)
    return Model(*from_keras(model), x)


# --- jraph ---


def _dense(x: Any, layer: Any) -> Any:
    return x @ layer["w"] + layer["b"]


def _layers(sizes: dict[str, tuple[int, ...]], seed: int = 3) -> Any:
    rng = random(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)  # noqa: E731
    return {name: {"w": draw(*shape), "b": draw(shape[-1])} for name, shape in sizes.items()}


def jraph_convolutions() -> Model:
    """Two graph convolutions with ReLU on a graph that is closed over; its nodes are the input."""
    import jraph

    line = graphs(np.zeros((1, 64), np.float32))

    def layer(nodes: Any, weights: Any) -> Any:
        convolve = jraph.GraphConvolution(lambda h: _dense(h, weights))
        return jax.nn.relu(convolve(line._replace(nodes=nodes)).nodes)

    def fn(params: Any, x: Any) -> Any:
        def one(nodes: Any) -> Any:
            nodes = layer(layer(nodes, params["first"]), params["second"])
            return _dense(nodes.sum(0), params["head"])

        return jax.vmap(one)(x)

    params = _layers({"first": (8, 7), "second": (7, 6), "head": (6, CLASSES)})

    def powered(p: float) -> Any:
        """By the matrix of the graph, with entries 1/√(degrees)."""
        near = np.eye(8) + np.eye(8, k=1) + np.eye(8, k=-1)
        degree = near.sum(0)
        near = jnp.asarray((near / np.sqrt(np.outer(degree, degree))) ** p)
        w, h = powers(params, p), jnp.ones((8, 8))
        for name in ("first", "second"):
            h = near @ _dense(h, w[name])
        return _dense(h.sum(0), w["head"])

    return Model(fn, params, "rows", powered)


def jraph_attention() -> Model:
    """Graph attention, two heads."""
    import jraph

    def fn(params: Any, graph: Any) -> Any:
        def query(h: Any) -> Any:
            return _dense(h, params["query"]).reshape(-1, 2, 4)

        def logits(a: Any, b: Any, _: Any) -> Any:
            both = jnp.concatenate([a, b], -1)
            return jax.nn.leaky_relu((both * params["attend"]["w"]).sum(-1, keepdims=True))

        graph = jraph.GAT(query, logits)(graph)
        return _dense(graph.nodes, params["head"])

    params = _layers({"query": (8, 8), "attend": (2, 8), "head": (8, CLASSES)})
    del params["attend"]["b"]
    return Model(fn, params, "graph", batch_axis=None)


def jraph_interaction() -> Model:
    """A graph network with updates of edges, nodes and the globals of each graph."""
    import jraph

    def fn(params: Any, graph: Any) -> Any:
        def edge(_: Any, sent: Any, received: Any, __: Any) -> Any:
            return jax.nn.relu(_dense(jnp.concatenate([sent, received], 1), params["edge"]))

        def node(h: Any, _: Any, received: Any, __: Any) -> Any:
            return jax.nn.relu(_dense(jnp.concatenate([h, received], 1), params["node"]))

        def whole(nodes: Any, *_: Any) -> Any:
            return _dense(nodes, params["head"])

        return jraph.GraphNetwork(edge, node, whole)(graph).globals

    params = _layers({"edge": (16, 6), "node": (14, 6), "head": (6, CLASSES)})
    return Model(fn, params, "graph", batch_axis=None)
