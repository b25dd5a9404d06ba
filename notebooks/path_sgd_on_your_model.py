# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Path-SGD on your own flax model
#
# jaxinv asks for one thing: a function `fn(params, x)`. Here it comes from flax linen; the same
# lines work with flax nnx (`nnx.split`), equinox, haiku or plain pytrees.

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from jaxinv import path_kappa, path_norm, path_sgd

SHORT = os.environ.get("JAXINV_SHORT") == "1"  # fewer steps, as the tests run it
data = load_digits()
x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)


class Net(nn.Module):
    """Three dense layers with ReLU."""

    @nn.compact
    def __call__(self, x):
        """Logits of ten classes."""
        x = nn.relu(nn.Dense(64)(x))
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


model = Net()
balanced = model.init(jax.random.key(0), x[:1])["params"]


def fn(params, x):
    """The function whose paths count."""
    return model.apply({"params": params}, x)


# %% [markdown]
# ## The same function, unbalanced
#
# Multiply the incoming weights and the bias of hidden unit j by s_j, divide its outgoing weights by
# s_j. The function stays; so does the path norm. κ of an incoming weight is divided by s_j².

# %%
s = jnp.exp(2 * jax.random.normal(jax.random.key(1), (64,)))
unbalanced = {
    **balanced,
    "Dense_0": {
        "kernel": balanced["Dense_0"]["kernel"] * s,
        "bias": balanced["Dense_0"]["bias"] * s,
    },
    "Dense_1": {**balanced["Dense_1"], "kernel": balanced["Dense_1"]["kernel"] / s[:, None]},
}
print("largest change of the function:", jnp.abs(fn(balanced, x) - fn(unbalanced, x)).max())
print("path norms:", path_norm(fn, balanced, x), path_norm(fn, unbalanced, x))
ratio = (
    path_kappa(fn, balanced, x)["Dense_0"]["kernel"][0]
    / (path_kappa(fn, unbalanced, x)["Dense_0"]["kernel"][0])
)
print("κ ratio is s²:", bool(jnp.allclose(ratio, s**2, rtol=1e-3)))

# %% [markdown]
# ## Training from both starts
#
# `path_sgd` is an optax transformation like any other. `x` is looked at for its shape only.


# %%
def train(optimizer, params, steps=10 if SHORT else 100):
    """Loss curve of full-batch training."""

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[1]
    )(params)


curves = {
    name: [train(optimizer, start) for start in (balanced, unbalanced)]
    for name, optimizer in {"SGD": optax.sgd(0.3), "Path-SGD": path_sgd(0.3, fn, x)}.items()
}
for name, (a, b) in curves.items():
    gap = jnp.abs(a - b).max()
    print(f"{name:9s} last loss {a[-1]:.4f} balanced, {b[-1]:.4f} unbalanced, gap {gap:.2g}")

# %% [markdown]
# SGD takes another course from every point of the orbit, Path-SGD the same one up to rounding.

# %%
gaps = {name: float(jnp.abs(a - b).max()) for name, (a, b) in curves.items()}
assert gaps["Path-SGD"] < 0.01 < gaps["SGD"] or jnp.isnan(gaps["SGD"]), gaps
