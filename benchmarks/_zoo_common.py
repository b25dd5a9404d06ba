"""What the models of the zoo share: generic parameters, inputs made of digits, norms by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 10
EPS = 1e-5


class Model(NamedTuple):
    """A model in evaluation mode."""

    fn: Callable[[Any, Any], Any]
    params: Any
    x: str  # how a digit enters: image, channels first, pixels, rows, tokens, graph
    powered: Callable[[float], Any] | None = None  # outputs on ones, all weights to |w|^p
    batch_axis: int | None = 0


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def generic(tree: Any, seed: int = 0) -> Any:
    """Parameters near the given ones, none of them 0 or 1 by initialisation."""
    rng = random(seed)

    def one(leaf: Any) -> Any:
        a = np.asarray(leaf)
        size = np.sqrt(np.mean(a * a)) or 1.0
        return jnp.asarray(a + 0.3 * size * rng.normal(size=a.shape), a.dtype)

    return jax.tree.map(one, tree)


def inputs(kind: str, n: int, seed: int = 1) -> Any:
    """Random inputs of a kind."""
    rng = random(seed)
    if kind == "tokens":
        return jnp.asarray(rng.integers(0, 17, size=(n, 8)))
    return shaped(kind, jnp.asarray(rng.normal(size=(n, 64)), jnp.float32))


def shaped(kind: str, pixels: Any) -> Any:
    """Images (n, 64) as a kind of input."""
    if kind == "graph":
        return graphs(pixels)
    shapes = {
        "image": (8, 8, 1), "channels first": (1, 8, 8), "rows": (8, 8), "pixels": (64,)
    }  # fmt: skip
    return pixels.reshape(len(pixels), *shapes[kind])


def powers(tree: Any, p: float) -> Any:
    return jax.tree.map(lambda a: jnp.abs(a) ** p, tree)


def powered_statistics(mean: Any, variance: Any, p: float, eps: float = EPS) -> tuple[Any, Any]:
    """Those with which a frozen batch norm adds |m|^p and divides by σ^p."""
    return -(jnp.abs(mean) ** p), (variance + eps) ** p - eps


def through_mean(outputs: Any, bias: Any, size: int, p: float) -> Any:
    """Outputs of a linear head on a mean of `size` values: 1/size to the power p, in place of 1."""
    return (outputs - bias) * size ** (1 - p) + bias


def graphs(pixels: Any) -> Any:
    """One graph per image: its rows are the nodes, each joined to the next and to itself."""
    import jraph

    n, here = len(pixels), np.arange(8)
    senders = np.concatenate([here, here[:-1], here[1:]])
    receivers = np.concatenate([here, here[1:], here[:-1]])
    every = lambda a: jnp.asarray((8 * np.arange(n)[:, None] + a).ravel())  # noqa: E731
    return jraph.GraphsTuple(
        nodes=jnp.reshape(pixels, (8 * n, 8)), edges=None, globals=None,
        senders=every(senders), receivers=every(receivers),
        n_node=jnp.full((n,), 8), n_edge=jnp.full((n,), len(senders)),
    )  # fmt: skip
