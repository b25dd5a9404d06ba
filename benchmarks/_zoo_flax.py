"""Models of haiku, flax (linen and nnx) and mamba2-jax."""

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from _zoo_common import CLASSES, Model, generic, inputs, powered_statistics, powers, through_mean

from jaxinv.adapters import from_haiku, from_linen, from_nnx

# --- haiku --------------------------------------------------------------------------------


def _haiku(net: Callable[..., Any], x: Any, seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """Transformed, with generic parameters and the statistics that they have on data."""
    import haiku as hk

    whole = hk.transform_with_state(net)
    params, state = whole.init(jax.random.key(0), x, **options)
    params = generic(params, seed)
    if state:
        _, state = whole.apply(params, state, None, inputs("image", 100), **options)
    return whole, params, state


def _haiku_powered(
    whole: Any, params: Any, state: Any, x: Any, p: float, head: str, size: int
) -> Any:
    """Outputs of a haiku network with frozen batch norms and a mean before its head."""
    new = dict(state)
    for name in state:
        if name.endswith("mean_ema"):
            other = name.replace("mean_ema", "var_ema")
            m, v = powered_statistics(state[name]["average"], state[other]["average"], p)
            new[name] = {**state[name], "average": m}
            new[other] = {**state[other], "average": v}
    w = powers(params, p)
    fn, _ = from_haiku(whole, w, new)
    return through_mean(fn(w, jnp.ones_like(x[:1])), w[head]["b"], size, p)


def haiku_resnet() -> Model:
    """The ResNet of haiku, a residual block in each of its four groups."""
    import haiku as hk

    def net(x: Any, is_training: bool) -> Any:
        return hk.nets.ResNet(
            (1, 1, 1, 1), CLASSES, bottleneck=False, channels_per_group=(4, 4, 5, 6),
            use_projection=(False, False, True, True), strides=(1, 1, 1, 1),
            initial_conv_config={"output_channels": 4, "kernel_shape": 3, "stride": 1},
            logits_config={"w_init": hk.initializers.VarianceScaling()},
        )(x, is_training)  # fmt: skip

    x = inputs("image", 3)
    whole, params, state = _haiku(net, x, is_training=True)

    def summed(a: Any, window_shape: Any, strides: Any, padding: str) -> Any:
        """Any pixel of a window may be the largest: paths of all count."""
        return jax.lax.reduce_window(
            a, jnp.zeros((), a.dtype), jax.lax.add, window_shape, strides, padding
        )

    def powered(p: float) -> Any:
        pooling = importlib.import_module("haiku._src.nets.resnet").hk
        with mock.patch.object(pooling, "max_pool", summed):
            return _haiku_powered(whole, params, state, x, p, "res_net/~/logits", 16)

    return Model(*from_haiku(whole, params, state), "image", powered)


def haiku_mobilenet() -> Model:
    """MobileNetV1 of haiku, with two of its thirteen blocks."""
    import haiku as hk

    def net(x: Any, is_training: bool) -> Any:
        return hk.nets.MobileNetV1((1, 1), (8, 6), CLASSES)(x, is_training)

    x = inputs("image", 3)
    whole, params, state = _haiku(net, x, seed=1, is_training=True)

    def powered(p: float) -> Any:
        return _haiku_powered(whole, params, state, x, p, "mobile_net_v1/logits", 9)

    return Model(*from_haiku(whole, params, state), "image", powered)


def haiku_lstm() -> Model:
    """An LSTM over the rows."""
    import haiku as hk

    def net(x: Any) -> Any:
        core = hk.LSTM(6)
        _, state = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(CLASSES)(state.hidden)

    x = inputs("rows", 3)
    whole, params, state = _haiku(net, x)
    return Model(*from_haiku(whole, params, state), "rows")


# --- flax ---------------------------------------------------------------------------------


def linen_cnn() -> Model:
    """The CNN of flax's MNIST example, narrower, with a batch norm."""
    import flax.linen as nn

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.relu(nn.Conv(5, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.BatchNorm(use_running_average=not train, momentum=0)(nn.Conv(6, (3, 3))(x))
            x = nn.relu(x).mean((1, 2))
            return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))

    variables = CNN().init(jax.random.key(0), inputs("image", 3), train=False)
    params = generic(variables["params"])
    _, stored = CNN().apply(
        {**variables, "params": params}, inputs("image", 100), train=True,
        mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)},
    )  # fmt: skip

    def powered(p: float) -> Any:
        found = stored["batch_stats"]["BatchNorm_0"]
        m, v = powered_statistics(found["mean"], found["var"], p)
        new = {"BatchNorm_0": {"mean": m, "var": v}}
        w = powers(params, p)
        w["Conv_1"]["kernel"] *= 4.0 ** (1 - p)  # reads a mean of four
        fn, _ = from_linen(CNN(), {"params": w, "batch_stats": new})
        return through_mean(fn(w, jnp.ones((1, 8, 8, 1))), w["Dense_0"]["bias"], 16, p)

    return Model(*from_linen(CNN(), {"params": params, **stored}), "image", powered)


def linen_transformer() -> Model:
    """A pre-norm encoder block over the rows."""
    import flax.linen as nn

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x: Any, deterministic: bool) -> Any:
            x = nn.Dense(6)(x)
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(
                nn.LayerNorm()(x), deterministic=deterministic
            )
            y = nn.Dense(8)(nn.LayerNorm()(x))
            x = x + nn.Dense(6)(nn.gelu(y))
            return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))

    variables = Encoder().init(jax.random.key(0), inputs("rows", 3), deterministic=True)
    return Model(*from_linen(Encoder(), {"params": generic(variables["params"])}), "rows")


def linen_gru() -> Model:
    """A recurrent network of a GRU cell."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(CLASSES)(nn.RNN(nn.GRUCell(6))(x)[:, -1])

    variables = Net().init(jax.random.key(0), inputs("rows", 3))
    return Model(*from_linen(Net(), {"params": generic(variables["params"])}), "rows")


def nnx_llama() -> Model:
    """A decoder with RMS norms, a gated feed-forward layer and an embedding of its own, of nnx."""
    from flax import nnx

    class Decoder(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.embed = nnx.Embed(17, 6, rngs=rngs)
            self.norms = nnx.List([nnx.RMSNorm(6, rngs=rngs) for _ in range(3)])
            self.attention = nnx.MultiHeadAttention(
                2, 6, 8, use_bias=False, decode=False, rngs=rngs
            )
            linear = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)  # noqa: E731
            self.gate, self.up, self.down = linear(6, 7), linear(6, 7), linear(7, 6)
            self.head = linear(6, 17)

        def __call__(self, x: Any) -> Any:
            mask = nnx.make_causal_mask(x)
            x = self.embed(x)
            x = x + self.attention(self.norms[0](x), mask=mask)
            y = self.norms[1](x)
            x = x + self.down(nnx.silu(self.gate(y)) * self.up(y))
            return self.head(self.norms[2](x))

    fn, params = from_nnx(Decoder(nnx.Rngs(0)))
    return Model(fn, generic(params), "tokens")


# --- mamba2-jax ---


def mamba2() -> Model:
    """A language model of mamba2-jax: embedding, one block, tied read-out."""
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=17, hidden_size=6, state_size=3, head_dim=4, chunk_size=8, num_hidden_layers=1,
        A_initializer_range=(0.5, 2.0), time_step_min=0.1, time_step_max=1.0,
        emb_initializer_range=1.0,
    )  # fmt: skip
    whole, params = from_nnx(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    return Model(lambda params, x: whole(params, x)["logits"], generic(params), "tokens")
