"""A client of the installed package, for mypy: `make lint` checks that its types are seen."""

import jax
import optax

import jaxinv


def net(w: list[jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ w[0]) @ w[1]


def use(w: list[jax.Array], x: jax.Array) -> jax.Array:
    transformation: optax.GradientTransformation = jaxinv.path_sgd(0.1, net, x)
    del transformation
    dimension: int = jaxinv.rescaling_group(net, w, x).dim
    jaxinv.path_norm(net, w, x, q=2)  # type: ignore[call-arg]  # unseen types would leave it unused
    return jaxinv.path_norm(net, w, x) * dimension
