"""What an installed jaxinv must do: run as `python tests/smoke.py`, anywhere but in a checkout."""

import importlib.resources
import pathlib
import sys

import jax
import jax.numpy as jnp

import jaxinv

assert "site-packages" in pathlib.Path(jaxinv.__file__).parts, "this is no installed jaxinv"
assert importlib.resources.files("jaxinv").joinpath("py.typed").is_file()


def net(w, x):
    return jax.nn.relu(x @ w["in"]) @ w["out"]


w = {"in": jnp.array([[1.0, 2.0], [3.0, -4.0]]), "out": jnp.array([[1.0], [-2.0]])}
x = jnp.array([[1.0, 0.5], [0.2, 1.0]])
assert abs(jaxinv.path_norm(net, w, x) ** 2 - 90) < 1e-3
group = jaxinv.rescaling_group(net, w, x)
assert group.dim == 2
assert int(jaxinv.jacobian_rank(net, w, x).rank) == 2
tx = jaxinv.path_sgd(0.1, net, x)
updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
assert abs(updates["out"][0, 0] + 0.1 / 10) < 1e-6
print(f"jaxinv {jaxinv.__version__} on jax {jax.__version__}, Python {sys.version.split()[0]}: ok")
