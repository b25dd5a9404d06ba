"""Symmetries of large models from their shapes: seconds, memory, and what is found.

    python benchmarks/large_models.py

ResNet-50, ViT-B/16, GPT-2 small and the shapes of Llama-3-8B, each in a process of its own, with
nothing but jaxinv imported before the clock starts. No weight is allocated.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _measure import in_own_processes, median_and_spread, publish
from resnet import ResNet50

from jaxinv.experiments.report import Table
from jaxinv.paths import path_kappa
from jaxinv.rescaling import rescaling_group
from jaxinv.symmetries import symmetry_group

Model = tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]


class Block(nn.Module):
    """A transformer block with layer norms in front (Vaswani et al. 2017, Radford et al. 2019)."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention, then two dense layers."""
        width = x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(h)


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021) with a class token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """A thousand logits from images of 224×224."""
        x = nn.Conv(768, (16, 16), (16, 16), padding="VALID")(x).reshape(len(x), -1, 768)
        token = self.param("token", nn.initializers.zeros, (1, 1, 768))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 768)), x], axis=1)
        x = x + self.param("place", nn.initializers.normal(0.02), (1, x.shape[1], 768))
        for _ in range(12):
            x = Block(12, causal=False)(x)
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


class GPT2(nn.Module):
    """GPT-2 small (Radford et al. 2019), with tied embeddings."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token."""
        embed = nn.Embed(50257, 768)
        x = embed(tokens)
        x = x + self.param("place", nn.initializers.normal(0.01), (1024, 768))[: x.shape[1]]
        for _ in range(12):
            x = Block(12, causal=True)(x)
        return embed.attend(nn.LayerNorm()(x))


def of_flax(model: nn.Module, x: jax.ShapeDtypeStruct, *args: Any) -> Model:
    """The shapes of a flax model; running statistics are as at initialisation."""
    variables = jax.eval_shape(lambda key: model.init(key, jnp.zeros(x.shape, x.dtype), *args), KEY)
    state = {
        name: jax.tree.map(lambda s: np.ones(s.shape, s.dtype), value)
        for name, value in variables.items()
        if name != "params"
    }
    return (
        lambda params, x: model.apply({"params": params, **state}, x, *args),
        variables["params"],
        x,
    )


def llama() -> Model:
    """The shapes of Llama-3-8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3)."""
    width, heads, groups, size, hidden, layers, vocabulary = 4096, 32, 8, 128, 14336, 32, 128256

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {f"block{i}": {} for i in range(layers)}
    for block in params.values():
        block |= {"query": leaf(width, heads * size), "key": leaf(width, groups * size)}
        block |= {"value": leaf(width, groups * size), "out": leaf(heads * size, width)}
        block |= {"gate": leaf(width, hidden), "up": leaf(width, hidden)}
        block |= {"down": leaf(hidden, width), "norm1": leaf(width), "norm2": leaf(width)}
    params |= {
        "embed": leaf(vocabulary, width),
        "norm": leaf(width),
        "head": leaf(width, vocabulary),
    }

    def norm(h: jax.Array) -> jax.Array:
        return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5)

    def rotated(h: jax.Array) -> jax.Array:
        angle = jnp.arange(h.shape[1])[:, None] * 5e5 ** (-jnp.arange(0, size, 2) / size)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = jnp.split(h, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def by_head(h: jax.Array, count: int) -> jax.Array:
        return h.reshape(*h.shape[:2], count, size)

    def attention(block: dict[str, jax.Array], h: jax.Array) -> jax.Array:
        query = rotated(by_head(h @ block["query"], heads))
        key = rotated(by_head(h @ block["key"], groups))
        key, value = (
            jnp.repeat(v, heads // groups, axis=2)
            for v in (key, by_head(h @ block["value"], groups))
        )
        scores = jnp.einsum("nqhc,nkhc->nhqk", query, key) / np.sqrt(size)
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("nhqk,nkhc->nqhc", weights, value).reshape(h.shape) @ block["out"]

    def fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        h = params["embed"][tokens]
        for i in range(layers):
            block = params[f"block{i}"]
            h = h + attention(block, norm(h) * block["norm1"])
            y = norm(h) * block["norm2"]
            h = h + (jax.nn.silu(y @ block["gate"]) * (y @ block["up"])) @ block["down"]
        return (norm(h) * params["norm"]) @ params["head"]

    return fn, params, jax.ShapeDtypeStruct((1, 4), jnp.int32)


KEY = jax.eval_shape(lambda: jax.random.key(0))
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 16), jnp.int32)
MODELS: dict[str, Callable[[], Model]] = {
    "ResNet-50, 224×224": lambda: of_flax(ResNet50(), IMAGE, False),
    "ViT-B/16, 224×224": lambda: of_flax(ViT(), IMAGE),
    "GPT-2 small, 16 tokens": lambda: of_flax(GPT2(), TOKENS),
    "Llama-3-8B, 4 tokens": llama,
}


def measure(name: str) -> dict[str, Any]:
    """One model in this process: first calls."""
    fn, params, x = MODELS[name]()
    begin = time.perf_counter()
    rescalings = rescaling_group(fn, params, x, ignore_epsilon=True)
    rescaling_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    group = symmetry_group(fn, params, x, ignore_epsilon=True)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    if name.startswith("ResNet"):
        jax.jit(lambda params: path_kappa(fn, params, x)).trace(params)
    kappa_seconds = time.perf_counter() - begin
    return {
        "model": name,
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
        "rescalings": rescalings.dim,
        "matrix": group.beyond_rescaling,
        "rescaling_seconds": rescaling_seconds,
        "symmetry_seconds": seconds,
        "kappa_trace_seconds": kappa_seconds if name.startswith("ResNet") else None,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def to_table(measured: list[list[dict[str, Any]]]) -> Table:
    """Medians over the processes."""

    def middle(rows: list[dict[str, Any]], key: str) -> str:
        if rows[0][key] is None:
            return "no path norm"
        summary = median_and_spread(np.array([row[key] for row in rows]))
        return f"{summary['median']:.2f} ({summary['iqr']:.1g})"

    rows = [
        [
            runs[0]["model"],
            f"{runs[0]['parameters']:,}",
            f"{runs[0]['rescalings']:,}",
            f"{runs[0]['matrix']:,}",
            middle(runs, "rescaling_seconds"),
            middle(runs, "symmetry_seconds"),
            middle(runs, "kappa_trace_seconds"),
            f"{max(row['gigabytes'] for row in runs):.2f}",
        ]
        for runs in measured
    ]
    return Table(
        f"Symmetries from shapes, first calls; medians of {len(measured[0])} processes (IQR)",
        [
            "model",
            "parameters",
            "rescalings",
            "matrices beyond them",
            "rescaling_group (s)",
            "then symmetry_group (s)",
            "trace of κ (s)",
            "peak (GB)",
        ],
        rows,
    )


def main() -> None:
    """Every model in processes of its own."""
    title = __doc__.splitlines()[0]
    measured, out = in_own_processes(__file__, list(MODELS), measure, title)
    publish("large-models", to_table(measured), {"measured": measured}, out)


if __name__ == "__main__":
    main()
