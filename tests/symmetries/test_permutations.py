"""Permutations: twelve architectures are unchanged by them, and matching undoes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import (
    InvalidInput,
    networks,
    random_rescaling,
    rescale,
    rescaling_group,
)
from jaxinv.symmetries import match, permutation_group, permute, random_permutations
from tests.ground_truth.zoo import ZOO, inputs_of, params_of


def conv(x, w, groups=1):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups
    )


def resnet(w, x):
    h = nn.relu(conv(x, w["c0"]) * w["g0"])
    h = nn.relu(h + conv(nn.relu(conv(h, w["c1"]) * w["g1"]), w["c2"]))
    return h.mean((1, 2)) @ w["d"]


def depthwise(w, x):
    h = nn.relu(conv(x, w["a"]))
    h = nn.relu(conv(h, w["b"], groups=5) + w["b0"])
    return conv(h, w["c"]).sum((1, 2))


def u_net(w, x):
    skip = nn.relu(conv(x, w["down"]))
    low = nn.relu(conv(nn.max_pool(skip, (2, 2), (2, 2)), w["deep"]))
    up = jnp.repeat(jnp.repeat(low, 2, 1), 2, 2)
    return conv(jnp.concatenate([up, skip], -1), w["up"]).mean((1, 2))


def mixture(w, x):
    gate = jax.nn.softmax(x @ w["gate"])
    hidden = jax.nn.gelu(jnp.einsum("bd,edh->beh", x, w["in"]))
    return jnp.einsum("be,beh,eho->bo", gate, hidden, w["out"])


def gru(w, x):
    return ZOO["GRU"].fn(w, x)[-1] @ w["read"]


def heads(w, x):
    q, k, v = (jnp.einsum("btd,dhc->bthc", x, w[n]) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k))
    return jnp.einsum("bhqk,bkhc,hcd->bqd", a, v, w["o"])


HAND = {
    "resnet": (
        resnet,
        {"c0": (3, 3, 2, 4), "g0": (4,), "c1": (3, 3, 4, 5), "g1": (5,), "c2": (3, 3, 5, 4)}
        | {"d": (4, 3)},
        (4, 4, 2), [4, 5],
    ),
    "depthwise": (
        depthwise,
        {"a": (3, 3, 2, 5), "b": (3, 3, 1, 5), "b0": (5,), "c": (1, 1, 5, 2)}, (4, 4, 2), [5],
    ),
    "u-net": (
        u_net,
        {"down": (3, 3, 2, 4), "deep": (3, 3, 4, 5), "up": (3, 3, 9, 3)}, (4, 4, 2), [4, 5],
    ),
    "mixture of experts": (
        mixture, {"gate": (4, 3), "in": (3, 4, 5), "out": (3, 5, 2)}, (4,), [3, 5]
    ),
    "GRU": (
        gru,
        {"wi": (3, 12), "wh": (4, 12), "bi": (12,), "bh": (12,), "read": (4, 2)}, (5, 3), [4],
    ),
    "heads": (
        heads, dict.fromkeys("qkv", (6, 3, 4)) | {"o": (3, 4, 6)}, (5, 6), [3, 4, 4]
    ),
}  # fmt: skip
ZOO_CLASSES = {
    "relu": [6, 7],
    "llama": [2, 2, 5, 6],  # rotary planes stay where they are
    "pre-LN block": [2, 2, 2, 2, 8],
    "tied embedding": [2, 2, 2, 2, 6, 8],
    "sines": [4, 5],
    "batch norm": [6],
}


def case_of(name):
    if name in ZOO_CLASSES:
        case = ZOO[name]
        return case.fn, params_of(case), inputs_of(case, 4), ZOO_CLASSES[name]
    fn, shapes, x, sizes = HAND[name]
    rng = np.random.default_rng(0)
    params = {
        n: rng.normal(size=s) / np.sqrt(s[-2] if len(s) > 1 else 1) for n, s in shapes.items()
    }
    return fn, params, rng.normal(size=(3, *x)), sizes


@pytest.mark.parametrize("name", [*HAND, *ZOO_CLASSES])
def test_permutations_leave_the_function_alone(name, x64):
    fn, params, x, sizes = case_of(name)
    params, x = jax.tree.map(jnp.asarray, (params, x))
    group = permutation_group(fn, params, x)
    assert sorted(c.size for c in group.classes) == sizes
    moved = permute(group, params, random_permutations(group, jax.random.key(3)))
    assert any((moved[n] != params[n]).any() for n in params)
    y = fn(params, x)
    np.testing.assert_allclose(fn(moved, x), y, rtol=1e-9, atol=1e-12 * float(abs(y).max()))


def test_flax_attention_with_heads():
    model = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = model.init(jax.random.key(1), x)
    group = permutation_group(model.apply, params, x)
    assert sorted(c.size for c in group.classes) == [4, 4, 4]  # heads; within keys; within values
    moved = permute(group, params, random_permutations(group, jax.random.key(3)))
    np.testing.assert_allclose(model.apply(moved, x), model.apply(params, x), atol=1e-5)


def test_a_permutation_and_a_rescaling_are_undone_exactly(x64):
    w = networks.init_mlp(jax.random.key(0), (8, 30, 20, 10, 4), bias_std=0.3, dtype=jnp.float64)
    x = jnp.ones((1, 8))
    group, scales = permutation_group(networks.mlp, w, x), rescaling_group(networks.mlp, w, x)
    hidden = random_permutations(group, jax.random.key(1))
    moved = rescale(scales, permute(group, w, hidden), random_rescaling(scales, jax.random.key(2)))
    found = match(group, w, moved, rescaling=scales)
    for p, q in zip(found.permutations, hidden, strict=True):
        assert q[p].tolist() == list(range(len(p)))
    assert found.distance < 1e-9
    # Without the rescaling in mind it is another network, further away.
    assert match(group, w, moved).distance > 1


def test_matching_never_ends_further_away_than_it_began():
    w = [networks.init_mlp(jax.random.key(i), (5, 12, 12, 3), bias_std=0.3) for i in range(2)]
    group = permutation_group(networks.mlp, w[0], jnp.ones((1, 5)))
    before = np.sqrt(
        sum(((p - q) ** 2).sum() for p, q in zip(*map(jax.tree.leaves, w), strict=True))
    )
    found = match(group, *w)
    assert found.distance < before and found.rounds > 1
    x = jax.random.normal(jax.random.key(2), (4, 5))
    np.testing.assert_allclose(
        networks.mlp(found.params, x), networks.mlp(w[1], x), rtol=1e-4, atol=1e-5
    )


def test_what_does_not_fit_is_refused():
    w = networks.init_mlp(jax.random.key(0), (4, 3, 2))
    group = permutation_group(networks.mlp, w, jnp.ones((1, 4)))
    with pytest.raises(InvalidInput, match="permutations have lengths"):
        permute(group, w, [])
    with pytest.raises(InvalidInput, match="the leaves have shapes"):
        permute(group, networks.init_mlp(jax.random.key(0), (4, 5, 2)), [jnp.arange(3)])


def test_what_reads_a_position_ends_its_permutation():
    w = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}
    for fn in (
        lambda w, x: jnp.tanh(x @ w["a"])[:, ::-1] @ w["b"],
        lambda w, x: jnp.cumsum(x @ w["a"], -1) @ w["b"],
        lambda w, x: (x @ w["a"] * jnp.arange(3.0)) @ w["b"],
        lambda w, x: jnp.concatenate([x @ w["a"], x[:, :1]], -1)[:, 1:] @ w["b"],
    ):
        group = permutation_group(fn, w, jnp.ones((1, 4)))
        moved = permute(group, w, random_permutations(group, jax.random.key(0)))
        assert all(c.size < 3 for c in group.classes), str(group)
        assert jax.tree.structure(moved) == jax.tree.structure(w)
