"""Random programs for matrix symmetries: is a class proposed that moves the function?

    python -m tests.ground_truth.frames_fuzz --programs 300

A program is a chain of blocks on a stream of vectors: linear maps, attention, normalisations with
and without gains, splits, ties, masks, casts, gathers, loops. Counted are the classes that rules
proposed, those that the trial refused, and, with --null-spaces, the dimensions of the null space
that stay unexplained.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import tangent_vectors
from jaxinv.symmetries import shift_tangents, spanning_tangents, symmetry_group


class Program(NamedTuple):
    """A random function, its parameters, and the names of its blocks."""

    fn: Callable[..., Any]
    params: dict[str, Any]
    x: Callable[[int, np.random.Generator], Any]
    blocks: tuple[str, ...]


def _norm(kind: str, h: Any) -> Any:
    if kind == "layer":
        h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + (1e-3 if kind == "eps" else 0.0))


BLOCKS = (
    "linear bottleneck attention heads rms gain layer mlp glu split mask cast tie scan residual "
    "concat flip mean bias"
).split()


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = np.random.default_rng(seed)
    d, params = int(rng.choice([4, 6])), {}

    def weight(name: str, *shape: int) -> str:
        a = rng.normal(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 4)
        params[name] = jnp.asarray(1 + 0.3 * a if name.startswith("g") else a)
        return name

    blocks = tuple(rng.choice(BLOCKS, size=rng.integers(1, 5)).tolist())
    tokens = bool(rng.random() < 0.4)
    weight("embed", 7, d) if tokens else weight("embed", 5, d)
    for i, block in enumerate(blocks):
        if block in ("linear", "tie", "scan", "residual", "flip", "concat"):
            shape = {"scan": (2, d, d), "concat": (2 * d, d)}.get(block, (d, d))
            weight(f"w{i}", *shape)
        elif block in ("bottleneck", "mlp", "glu", "mask", "cast", "split"):
            k = 2 if block == "bottleneck" else 4
            weight(f"a{i}", d, k), weight(f"b{i}", k, d), weight(f"c{i}", d, k)
        elif block in ("attention", "heads"):
            for n in "qkv":
                weight(f"{n}{i}", d, 4)
            weight(f"o{i}", 4, d)
        elif block == "gain":
            weight(f"g{i}", d)
        elif block == "bias":
            weight(f"v{i}", d)
    weight("read", d, 3)

    def fn(w: Any, x: Any) -> Any:
        h = w["embed"][x] if tokens else x @ w["embed"]
        for i, block in enumerate(blocks):
            h = _apply(block, i, w, h)
        return h @ w["read"]

    def inputs(n: int, rng: np.random.Generator) -> Any:
        if tokens:
            return jnp.asarray(rng.integers(0, 7, size=(n, 3)))
        return jnp.asarray(rng.normal(size=(n, 3, 5)))

    return Program(fn, params, inputs, blocks)


def _apply(block: str, i: int, w: Any, h: Any) -> Any:
    if block in ("rms", "layer"):
        return _norm(block, h)
    if block == "gain":
        return _norm("rms", h) * w[f"g{i}"]
    if block == "bias":
        return h + w[f"v{i}"]
    if block == "mean":
        return h - h.mean(1, keepdims=True)
    if block == "linear":
        return h @ w[f"w{i}"]
    if block == "tie":
        return h @ w[f"w{i}"] @ w[f"w{i}"].T
    if block == "scan":
        return jax.lax.scan(lambda c, m: (c @ m, None), h, w[f"w{i}"])[0]
    if block == "residual":
        return h + jnp.tanh(_norm("rms", h) @ w[f"w{i}"])
    if block == "flip":
        return (h @ w[f"w{i}"])[..., ::-1]
    if block == "concat":
        return jnp.concatenate([h, jnp.tanh(h)], -1) @ w[f"w{i}"]
    if block in ("attention", "heads"):
        q, k, v = (h @ w[f"{n}{i}"] for n in "qkv")
        if block == "heads":
            q, k, v = (a.reshape(*a.shape[:-1], 2, 2) for a in (q, k, v))
            s = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k))
            o = jnp.einsum("bhqk,bkhc->bqhc", s, v)
            return h + o.reshape(*o.shape[:2], -1) @ w[f"o{i}"]
        return h + jax.nn.softmax(q @ k.mT) @ v @ w[f"o{i}"]
    a, b, c = w[f"a{i}"], w[f"b{i}"], w[f"c{i}"]
    if block == "bottleneck":
        return (h @ a) @ b
    if block == "glu":
        return (jax.nn.sigmoid(h @ a) * (h @ c)) @ b
    if block == "mask":
        return jnp.where(h[..., :1] > 0, h @ a, 0.0) @ b
    if block == "cast":
        return jnp.round(h @ a).astype(jnp.int32).astype(h.dtype) @ b + (h @ c) @ b
    if block == "split":
        left, right = jnp.split(h @ a, 2, -1)
        return jnp.concatenate([left, jnp.tanh(right)], -1) @ b
    return jax.nn.gelu(h @ a) @ b


class Found(NamedTuple):
    """What came of one program."""

    classes: int
    rejected: tuple[str, ...]
    nullity: int
    parts: tuple[int, int, int]  # rescalings, matrices, shifts
    wrong: float  # the largest ‖J t‖ / (‖J‖ ‖t‖) of a reported tangent t


def check(program: Program, seed: int, null: bool = True) -> Found:
    """The symmetries of a program, with `null` against the null space of its Jacobian."""
    rng = np.random.default_rng(seed + 10_000)
    fn, params = program.fn, program.params
    group = symmetry_group(fn, params, program.x(3, rng))
    # Seven tokens see too little of a network for a null space to be that of its symmetries.
    if not null or not jnp.issubdtype(program.x(1, rng).dtype, jnp.floating):
        return Found(len(group.classes), group.rejected, 0, (0, 0, 0), float(group.verified))
    d = sum(a.size for a in params.values())
    x = program.x(max(80, d // 3), rng)
    x = x[np.isfinite(np.asarray(fn(params, x))).reshape(len(x), -1).all(axis=1)]
    if len(x) < 40:  # a normalisation that divides 0 by 0 on nearly all inputs
        return Found(len(group.classes), group.rejected, 0, (0, 0, 0), float(group.verified))
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(lambda w: fn(w, x).ravel()))(params))
    J = np.concatenate([np.asarray(a).reshape(leaves[0].shape[0], -1) for a in leaves], axis=1)
    alive = J.any(axis=0)  # some blocks have weights that they do not use
    s = np.linalg.svd(J[:, alive], compute_uv=False)
    nullity = int(alive.sum()) - int((s > 1e-11 * s[0]).sum())
    D = np.zeros((0, d))
    if group.rescaling.dim:
        D = np.asarray(tangent_vectors(group.rescaling, params, dense=True)).T
    V = np.asarray(spanning_tangents(group, params))
    N = np.asarray(shift_tangents(fn, params, x).tangents)
    rows = np.concatenate([D, V])
    size = np.linalg.norm(rows, axis=1)
    moved = np.linalg.norm(rows @ J.T, axis=1)[size > 0] / (np.linalg.norm(J) * size[size > 0])
    ranks = [_rank(a[:, alive]) for a in (D, rows, np.concatenate([rows, N]))]
    parts = (ranks[0], ranks[1] - ranks[0], ranks[2] - ranks[1])
    return Found(len(group.classes), group.rejected, nullity, parts, float(moved.max(initial=0)))


def _rank(rows: np.ndarray) -> int:
    rows = rows[np.linalg.norm(rows, axis=1) > 1e-12]
    if not len(rows):
        return 0
    s = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)
    return int((s > 1e-9 * s[0]).sum())


def main() -> None:
    """Print one line per fault, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--null-spaces", action="store_true")
    options = parser.parse_args()
    total: collections.Counter[str] = collections.Counter()
    missed: collections.Counter[str] = collections.Counter()
    start = time.time()
    with jax.enable_x64(True):
        for seed in range(options.first, options.first + options.programs):
            program = draw(seed)
            found = check(program, seed, options.null_spaces)
            left = found.nullity - sum(found.parts)
            total += collections.Counter(
                programs=1, classes=found.classes, refused=len(found.rejected),
                moving=found.wrong > 1e-11, nullity=found.nullity, left=left,
                explained=left == 0,
            )  # fmt: skip
            if left or found.rejected or found.wrong > 1e-11:
                missed.update(set(program.blocks))
                print(seed, program.blocks, found, f"left {left}", flush=True)
            if total["programs"] % 10 == 0:
                print(dict(total), f"{time.time() - start:.0f} s", flush=True)
                jax.clear_caches()
    print(dict(total), "blocks of those with something left:", dict(missed))


if __name__ == "__main__":
    main()
