"""Small networks whose null spaces are known: which of their directions are what.

Each is of float64 parameters; expected are the nullity of the Jacobian and its parts: rescalings,
matrices beyond them, shifts beyond both, and what neither explains, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """A network, and where its null directions come from."""

    fn: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    x: tuple[Any, ...]  # shape of an example, or ("ids", size of the vocabulary, length)
    rescaling: int
    matrix: int = 0  # beyond rescalings
    shift: int = 0  # beyond both
    rest: int = 0
    why: str = ""


def params_of(case: Case, seed: int = 0) -> dict[str, Any]:
    """Generic parameters: gains (names that begin with g) near one."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in case.shapes.items():
        a = rng.normal(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 4)
        found[name] = jnp.asarray(1 + 0.3 * a if name.startswith("g") else a)
    return found


def inputs_of(case: Case, n: int, seed: int = 1) -> Any:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    if case.x[0] == "ids":
        return jnp.asarray(rng.integers(0, case.x[1], size=(n, case.x[2])))
    return jnp.asarray(rng.normal(size=(n, *case.x)))


def _rms(x: Any) -> Any:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True))


def _ln(x: Any) -> Any:
    c = x - x.mean(-1, keepdims=True)
    return c / jnp.sqrt((c * c).mean(-1, keepdims=True))


def _heads(y: Any, h: int) -> Any:
    return y.reshape(*y.shape[:-1], h, -1)


def _mix(q: Any, k: Any, v: Any) -> Any:
    a = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(q.shape[-1]))
    o = jnp.einsum("bhqk,bkhc->bqhc", a, v)
    return o.reshape(*o.shape[:2], -1)


def _rope(x: Any) -> Any:
    c = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 7.0 ** (np.arange(c) / c)
    cos, sin = (f(angles)[None, :, None] for f in (np.cos, np.sin))
    a, b = x[..., :c], x[..., c:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _attention(w: Any, x: Any, h: int, *, rope: bool = False) -> Any:
    q, k, v = (_heads(x @ w[n] + w.get(n + "0", 0.0), h) for n in "qkv")
    q, k = (_rope(q), _rope(k)) if rope else (q, k)
    return _mix(q, k, v) @ w["o"] + w.get("o0", 0.0)


def _gqa(w: Any, x: Any) -> Any:
    q, k, v = (_heads(x @ w[n], h) for n, h in zip("qkv", (4, 2, 2), strict=True))
    return _mix(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)) @ w["o"]


def _qknorm(w: Any, x: Any) -> Any:
    q, k = (_rms(x @ w[n]) * w.get(g, 1.0) for n, g in (("q", "g"), ("k", "g2")))
    return _mix(*(_heads(a, 1) for a in (q, k, x @ w["v"]))) @ w["o"]


def _block(w: Any, x: Any) -> Any:
    x = x + _attention(w, _ln(x) * w["g1"] + w["c1"], 2)
    y = _ln(x) * w["g2"] + w["c2"]
    return x + jax.nn.gelu(y @ w["a"] + w["a0"]) @ w["b"] + w["b0"]


def _llama(w: Any, x: Any) -> Any:
    x = w["e"][x]
    x = x + _attention(w, _rms(x) * w["g1"], 2, rope=True)
    y = _rms(x) * w["g2"]
    x = x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]
    return (_rms(x) * w["g3"]) @ w["u"]


def _tied(w: Any, x: Any) -> Any:
    x = w["e"][x] + w["p"]
    x = x + _attention(w, _rms(x), 2)
    x = x + jax.nn.relu(_rms(x) @ w["a"]) @ w["b"]
    return _rms(x) @ w["e"].T


def _stream(w: Any, x: Any) -> Any:
    x = x @ w["e"]
    for a, b in (("a", "b"), ("a2", "b2")):
        x = x + jax.nn.relu(_rms(x) @ w[a]) @ w[b]
    return _rms(x) @ w["u"]


def _gru(w: Any, x: Any) -> Any:
    def step(h: Any, xt: Any) -> Any:
        ir, iz, inn = jnp.split(xt @ w["wi"] + w["bi"], 3, -1)
        hr, hz, hn = jnp.split(h @ w["wh"] + w["bh"], 3, -1)
        r, z = jax.nn.sigmoid(ir + hr), jax.nn.sigmoid(iz + hz)
        h = (1 - z) * jnp.tanh(inn + r * hn) + z * h
        return h, h

    return jax.lax.scan(step, jnp.zeros((x.shape[0], 4), x.dtype), x.swapaxes(0, 1))[1]


def _batchnorm(w: Any, x: Any) -> Any:
    y = x @ w["a"] + w["a0"]
    c = y - y.mean(0)
    return jax.nn.relu(c / jnp.sqrt((c * c).mean(0)) * w["g"] + w["c"]) @ w["b"] + w["b0"]


def _conv(x: Any, w: Any, groups: int = 1) -> Any:
    names = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, w, (1,), "VALID", dimension_numbers=names, feature_group_count=groups
    )


_FROZEN = jnp.asarray(np.random.default_rng(5).normal(size=(7, 6)), jnp.float32)
_QKVO = {"q": (6, 3), "k": (6, 3), "v": (6, 3), "o": (3, 6)}
_HEADS = dict.fromkeys("qkv", (6, 4)) | {"o": (4, 6)}
_relu = jax.nn.relu

ZOO: dict[str, Case] = {
    "relu": Case(
        lambda w, x: _relu(_relu(x @ w["a"] + w["a0"]) @ w["b"] + w["b0"]) @ w["c"] + w["c0"],
        {"a": (5, 7), "a0": (7,), "b": (7, 6), "b0": (6,), "c": (6, 3), "c0": (3,)}, (5,), 13,
    ),
    "linear with biases": Case(
        lambda w, x: (x @ w["a"] + w["a0"]) @ w["b"] + w["b0"],
        {"a": (6, 3), "a0": (3,), "b": (3, 5), "b0": (5,)}, (6,), 3, 6, 3,
    ),
    "wide linear": Case(lambda w, x: x @ w["a"] @ w["b"], {"a": (4, 6), "b": (6, 3)}, (4,), 6, 24),
    "three linear": Case(
        lambda w, x: x @ w["a"] @ w["b"] @ w["c"], {"a": (6, 3), "b": (3, 4), "c": (4, 5)}, (6,),
        7, 18, 1, why="rank 3 leaves a direction of c to nobody, which is a shift",
    ),
    "attention": Case(lambda w, x: _attention(w, x, 1), _QKVO, (4, 6), 6, 12),
    "attention with biases": Case(
        lambda w, x: _attention(w, x, 1),
        _QKVO | {"q0": (3,), "k0": (3,), "v0": (3,), "o0": (6,)}, (4, 6), 6, 15, 3,
    ),
    "grouped heads": Case(
        _gqa, {"q": (8, 8), "k": (8, 4), "v": (8, 4), "o": (8, 8)}, (4, 8), 8, 8
    ),
    "rotary": Case(
        lambda w, x: _attention(w, x, 2, rope=True), dict.fromkeys("qkvo", (8, 8)), (5, 8),
        12, 28, why="of queries and keys, a scale and a rotation in each plane of each head",
    ),
    "QK-norm with gains": Case(
        _qknorm, {"q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (4, 6), "g": (4,), "g2": (4,)},
        (4, 6), 10, 12,
    ),
    "QK-norm": Case(_qknorm, _HEADS, (4, 6), 6, 18),
    "pre-LN block": Case(
        _block,
        _HEADS | {"q0": (4,), "k0": (4,), "v0": (4,), "o0": (6,), "g1": (6,), "c1": (6,)}
        | {"g2": (6,), "c2": (6,), "a": (6, 8), "a0": (8,), "b": (8, 6), "b0": (6,)},
        (4, 6), 20, 8, 41,
    ),
    "llama": Case(
        _llama,
        _HEADS | {"e": (9, 6), "g1": (6,), "g2": (6,), "g3": (6,), "gate": (6, 5)}
        | {"up": (6, 5), "down": (5, 6), "u": (6, 7)}, ("ids", 9, 5),
        30, 21,
    ),
    "LoRA": Case(
        lambda w, x: _relu(x @ (_FROZEN.astype(x.dtype) + w["A"] @ w["B"])),
        {"A": (7, 2), "B": (2, 6)}, (7,), 2, 2,
    ),
    "softmax": Case(
        lambda w, x: jax.nn.softmax(_relu(x @ w["a"] + w["a0"]) @ w["b"] + w["b0"]),
        {"a": (5, 6), "a0": (6,), "b": (6, 4), "b0": (4,)}, (5,), 6, 0, 7,
    ),
    "batch norm": Case(
        _batchnorm, {"a": (5, 6), "a0": (6,), "g": (6,), "c": (6,), "b": (6, 3), "b0": (3,)},
        (5,), 12, 0, 6,
    ),
    "layer norm between": Case(
        lambda w, x: _ln(x @ w["a"]) @ w["b"], {"a": (7, 5), "b": (5, 4)}, (7,), 1, 6, 11
    ),
    "tied embedding": Case(
        _tied, _HEADS | {"e": (9, 6), "p": (5, 6), "a": (6, 8), "b": (8, 6)}, ("ids", 9, 5), 16, 23
    ),
    "GRU": Case(_gru, {"wi": (3, 12), "wh": (4, 12), "bi": (12,), "bh": (12,)}, (5, 3), 0, 0, 8),
    "RMS stream": Case(
        _stream, {"e": (5, 6), "a": (6, 7), "b": (7, 6), "a2": (6, 7), "b2": (7, 6), "u": (6, 4)},
        (5,), 15, 15,
    ),
    "one square": Case(
        lambda w, x: (x @ w["a"]) ** 2 @ w["b"], {"a": (6, 4), "b": (4, 1)}, (6,), 4, 0, 0, 6,
        "rotations of the quadratic form, rational in w",
    ),
    "squares": Case(
        lambda w, x: (x @ w["a"]) ** 2 @ w["b"], {"a": (6, 4), "b": (4, 3)}, (6,), 4
    ),
    "bilinear": Case(
        lambda w, x: ((x @ w["a"]) * (x @ w["b"])) @ w["c"],
        {"a": (6, 4), "b": (6, 4), "c": (4, 5)}, (6,), 8,
    ),
    "gated": Case(
        lambda w, x: (jax.nn.sigmoid(x @ w["a"]) * (x @ w["b"])) @ w["c"],
        {"a": (6, 4), "b": (6, 4), "c": (4, 5)}, (6,), 4,
    ),
    "linear convolutions": Case(
        lambda w, x: _conv(_conv(x, w["a"]), w["b"]), {"a": (3, 4, 3), "b": (3, 3, 5)}, (12, 4),
        3, 6,
    ),
    "grouped convolutions": Case(
        lambda w, x: jnp.tanh(_conv(_conv(x, w["a"], 2), w["b"], 2)) @ w["c"],
        {"a": (2, 3, 4), "b": (2, 2, 6), "c": (6, 3)}, (7, 6), 4, 4,
    ),
    "sines": Case(
        lambda w, x: jnp.sin(jnp.sin(x @ w["a"] + w["a0"]) @ w["b"]) @ w["c"],
        {"a": (3, 5), "a0": (5,), "b": (5, 4), "c": (4, 2)}, (3,), 0,
    ),
    "lightning attention": Case(
        lambda w, x: jnp.einsum("bqc,bkc->bqk", x @ w["q"], x @ w["k"]) @ (x @ w["v"]),
        {"q": (5, 2), "k": (5, 2), "v": (5, 4)}, (4, 5), 3, 2,
    ),
}  # fmt: skip
