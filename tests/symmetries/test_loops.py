"""Loops whose steps are played from one that was walked: against the same loops, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.frames import loops
from jaxinv.symmetries import symmetry_group

WIDTH, SIZE = 6, 4


def rms(x, g=1.0):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True)) * g


def block(h, w):
    """Attention with a rotary embedding and gains, and a gated layer."""
    y = rms(h, w["g"])
    q, k, v = ((y @ w[n]).reshape(*y.shape[:-1], -1, SIZE) for n in "qkv")
    angle = np.arange(h.shape[1])[:, None, None] / 5.0 ** (np.arange(2) / 2)
    cos, sin = np.cos(angle), np.sin(angle)
    q, k = (
        jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        for a, b in (jnp.split(x, 2, -1) for x in (q, k))
    )
    mixed = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k)), v)
    h = h + mixed.reshape(*h.shape[:2], -1) @ w["o"]
    y = rms(h, w["g2"])
    return h + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None


def transformer(layers):
    def fn(w, x):
        h = jax.lax.scan(block, x @ w["e"], w["layers"])[0]
        return rms(h, w["g"]) @ w["u"]

    wide, narrow = (layers, WIDTH, 2 * SIZE), (layers, 2 * SIZE, WIDTH)
    stack = dict.fromkeys("qkv", wide) | {"o": narrow, "g": (layers, WIDTH), "g2": (layers, WIDTH)}
    stack |= {"gate": (layers, WIDTH, 7), "up": (layers, WIDTH, 7), "down": (layers, 7, WIDTH)}
    return fn, {"e": (3, WIDTH), "g": (WIDTH,), "u": (WIDTH, 5), "layers": stack}, (2, 3, 3)


def recurrent(length, reverse=False, collect=False, between=lambda h: h):
    """The weights are constants of the loop."""

    def fn(w, x):
        def step(h, xt):
            h = between(xt @ w["in"] + h @ w["again"])
            return h, h

        start = jnp.zeros((x.shape[0], 4), x.dtype)
        last, all_of = jax.lax.scan(step, start, x.swapaxes(0, 1), reverse=reverse)
        return (all_of if collect else last) @ w["out"]

    return fn, {"in": (3, 4), "again": (4, 4), "out": (4, 5)}, (2, length, 3)


def swapped(steps):
    """Two states that change places: what holds of one holds of the other."""

    def fn(w, x):
        def step(state, m):
            a, b = state
            return (b @ m, a), None

        a, b = jax.lax.scan(step, (x @ w["a"], x @ w["b"]), w["m"])[0]
        return jnp.tanh(a @ w["u"]) + b @ w["v"]

    shapes = {"a": (3, 4), "b": (3, 4), "m": (steps, 4, 4), "u": (4, 2), "v": (4, 2)}
    return fn, shapes, (2, 3)


def later_read(steps):
    """Every step lets one feature through a tanh: rotations end in all of them."""

    def fn(w, x):
        def step(h, m):
            return rms(h) @ m + h, jnp.tanh(h[..., :1])

        h, seen = jax.lax.scan(step, x @ w["a"], w["m"])
        return h @ w["u"] + seen.sum(0)

    return fn, {"a": (3, 4), "m": (steps, 4, 4), "u": (4, 2)}, (2, 3)


def counted(steps):
    """Layers taken by a counter, which is a constant in every step: these are walked."""

    def fn(w, x):
        return jax.lax.fori_loop(0, steps, lambda i, h: h @ w["m"][i], x @ w["a"]) @ w["u"]

    return fn, {"a": (3, 4), "m": (steps, 4, 4), "u": (4, 2)}, (2, 3)


def nested(steps):
    def fn(w, x):
        def outer(h, m):
            return jax.lax.scan(lambda h, n: (h @ n, None), jnp.tanh(h), m)[0], None

        return jax.lax.scan(outer, x @ w["a"], w["m"])[0] @ w["u"]

    return fn, {"a": (3, 4), "m": (steps, steps, 4, 4), "u": (4, 2)}, (2, 3)


CASES = {
    "transformer": transformer(6),
    "recurrent": recurrent(7),
    "recurrent, backwards": recurrent(7, reverse=True, collect=True),
    "recurrent, rotations": recurrent(6, between=rms, collect=True),
    "recurrent, nonlinear": recurrent(6, between=jnp.tanh),
    "swapped": swapped(7),
    "later read": later_read(7),
    "counted": counted(6),
    "nested": nested(5),
}


def of_shapes(tree):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, np.float32), tree, is_leaf=lambda s: isinstance(s, tuple)
    )


def found(fn, shapes, x):
    with jax.numpy_dtype_promotion("standard"):
        group = symmetry_group(fn, of_shapes(shapes), of_shapes(x))
    return sorted(
        (str(c.kind), c.size, sorted((p.leaf, p.axis, p.box) for p in c.places))
        for c in group.classes
    )


@pytest.mark.parametrize("name", CASES)
def test_a_played_loop_is_the_walked_one(name, monkeypatch):
    played = found(*CASES[name])
    monkeypatch.setattr(loops, "_FEW", 1000)
    assert played == found(*CASES[name])


def test_a_stack_has_a_class_per_layer_and_the_stream_one():
    classes = found(*transformer(6))
    assert [c[:2] for c in classes] == [("GL", 4)] * 12 + [("GL(1,C)^2", 4)] * 12 + [("O", 6)]


def test_layers_and_steps_are_not_limited_to_what_is_walked(monkeypatch):
    assert len(found(*swapped(300))) > 100
    fn, shapes, x = recurrent(5000)
    ((kind, size, places),) = found(fn, shapes, x)
    assert (kind, size) == ("GL", 4) and len(places) == 4
    monkeypatch.setattr(loops, "MOST_PLAYED", 5)
    monkeypatch.setattr(loops, "MOST_WALKED", 5)
    assert found(*swapped(20)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_class_is_a_symmetry(name, x64):
    fn, shapes, x = CASES[name]
    rng = np.random.default_rng(0)

    def draw(s):
        return jnp.asarray(rng.normal(size=s) / np.sqrt(max(s[-1], 2)))

    w = jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))
    group = symmetry_group(fn, w, jnp.asarray(rng.normal(size=x)))
    assert not group.rejected and group.verified < 1e-11
