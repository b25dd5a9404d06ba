"""Tokens, classes and masks: integers and truth values in x that choose, and are no numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv.errors import UnsupportedOperation
from jaxinv.paths import data_dependent_path_kappa, data_dependent_path_norm

RNG = np.random.default_rng(0)
TABLE, OUT, MIX = (jnp.asarray(RNG.normal(size=s)) for s in ((4, 3), (3, 2), (3, 3)))
PARAMS = {"table": TABLE, "mix": MIX, "out": OUT}
IDS = jnp.asarray(RNG.integers(0, 4, (6, 5)))
relu = jax.nn.relu


def one_hot_input(w, codes):
    return (relu(codes @ w["table"] @ w["mix"]) @ w["out"]).sum(1)


def head(w, embedded):
    return (relu(embedded @ w["mix"]) @ w["out"]).sum(1)


EMBEDDINGS = {
    "table[ids]": lambda w, ids: head(w, w["table"][ids]),
    "take": lambda w, ids: head(w, jnp.take(w["table"], ids, axis=0)),
    "take_clip": lambda w, ids: head(w, jnp.take(w["table"], ids, axis=0, mode="clip")),
    "transposed": lambda w, ids: head(w, jnp.moveaxis(w["table"].T[:, ids], 0, -1)),
    "one_hot": lambda w, ids: head(w, jax.nn.one_hot(ids, 4) @ w["table"]),
    "equal": lambda w, ids: head(w, (ids[..., None] == jnp.arange(4)).astype(float) @ w["table"]),
    "vmapped": lambda w, ids: head(w, jax.vmap(jax.vmap(lambda i: w["table"][i]))(ids)),
    "scanned": lambda w, ids: head(
        w, jnp.moveaxis(jax.lax.scan(lambda c, i: (c, w["table"][i]), 0, ids.T)[1], 0, 1)
    ),
    "remapped": lambda w, ids: head(w, w["table"][jnp.array([2, 0, 3, 1])[ids]]),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_a_linear_layer_on_one_hot_inputs(name):
    embed, codes = EMBEDDINGS[name], jnp.zeros((1, 5, 4))
    for p in (1.0, 2.0):
        expected = jaxinv.path_norm(one_hot_input, PARAMS, codes, p=p)
        np.testing.assert_allclose(jaxinv.path_norm(embed, PARAMS, IDS, p=p), expected)
    expected = jaxinv.path_kappa(one_hot_input, PARAMS, codes)
    chex.assert_trees_all_close(jaxinv.path_kappa(embed, PARAMS, IDS), expected, rtol=1e-7)


def test_the_path_norm_of_an_embedding_by_hand():
    table, out = np.asarray(TABLE), np.asarray(OUT)
    found = jaxinv.path_norm(lambda w, i: w["table"][i] @ w["out"], PARAMS, IDS[:, 0])
    np.testing.assert_allclose(found**2, ((table**2) @ (out**2)).sum(), rtol=1e-6)


def test_constant_parts_of_an_index_are_read_where_they_are():
    stacked = jnp.stack([TABLE, 2 * TABLE])
    codes = jnp.zeros((1, 2, 4))

    def by_place(w, ids):
        return w[jnp.arange(2)[None], ids].sum(1)

    def spelled(w, codes):
        return jnp.einsum("btv,tvd->bd", codes, w)

    found = jaxinv.path_kappa(by_place, stacked, IDS[:, :2])
    np.testing.assert_allclose(found, jaxinv.path_kappa(spelled, stacked, codes))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_data_dependent_norms_of_tokens_are_those_of_their_one_hot_codes(alpha):
    codes = jax.nn.one_hot(IDS, 4)
    for function in (data_dependent_path_norm, data_dependent_path_kappa):
        found = function(EMBEDDINGS["table[ids]"], PARAMS, IDS, alpha=alpha)
        expected = function(one_hot_input, PARAMS, codes, alpha=alpha)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


READS = {
    "take_along_axis": lambda h, i: jnp.take_along_axis(h, i[:, None, None], 1)[:, 0],
    "h[arange, i]": lambda h, i: h[jnp.arange(i.shape[0]), i],
    "vmap": lambda h, i: jax.vmap(lambda h, i: h[i])(h, i),
    "dynamic_slice": lambda h, i: jax.vmap(jax.lax.dynamic_index_in_dim)(h, i)[:, 0],
    "one_hot": lambda h, i: (h * jax.nn.one_hot(i, h.shape[1])[..., None]).sum(1),
}


@pytest.mark.parametrize("name", READS)
def test_reading_one_position_is_pooling_over_all_that_may_be_read(name):
    def net(w, x):
        return READS[name](relu(x["x"] @ w["mix"]), x["i"]) @ w["out"]

    def pooled(w, x):
        return relu(x["x"] @ w["mix"]).max(1) @ w["out"]

    x = {"x": jnp.ones((2, 5, 3)), "i": jnp.array([1, 4])}
    found, expected = (jaxinv.path_norm(f, PARAMS, x) for f in (net, pooled))
    np.testing.assert_allclose(found, expected)


MASKS = {
    "where": lambda h, x: jnp.where(x["mask"][..., None], h, 0),
    "where the other way": lambda h, x: jnp.where(x["mask"][..., None], 0, h),
    "product": lambda h, x: h * x["mask"][..., None].astype(h.dtype),
    "complement": lambda h, x: h * (1 - x["mask"].astype(h.dtype))[..., None],
    "integer > 0": lambda h, x: jnp.where(x["ids"][..., None] > 0, h, 0),
    "padding id": lambda h, x: h * (x["ids"] != 0)[..., None].astype(h.dtype),
    "two masks": lambda h, x: h * (x["mask"] & (x["ids"] > 2))[..., None].astype(h.dtype),
    "product of masks": lambda h, x: (
        h * (x["mask"].astype(h.dtype) * (x["ids"] > 2).astype(h.dtype))[..., None]
    ),
    "length": lambda h, x: jnp.where(
        (jnp.arange(5) < x["ids"].sum(1, keepdims=True))[..., None], h, 0
    ),
    "negated": lambda h, x: jnp.where(~x["mask"][..., None], h, -h),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_gate_that_may_be_open(name):
    def net(w, x):
        return (MASKS[name](relu(x["x"] @ w["mix"]), x) @ w["out"]).sum(1)

    x = {"x": jnp.ones((2, 5, 3)), "mask": jnp.ones((2, 5), bool), "ids": IDS[:2]}
    expected = np.sqrt(5 * (np.asarray(MIX) ** 2 @ np.asarray(OUT) ** 2).sum())
    np.testing.assert_allclose(jaxinv.path_norm(net, PARAMS, x), expected)
    norm = data_dependent_path_norm(net, PARAMS, x, alpha=1.0)
    np.testing.assert_allclose(norm, jnp.sqrt((net(PARAMS, x) ** 2).sum(1).mean()), rtol=1e-6)


def test_masks_weigh_by_their_steepest_level_and_select_between_branches():
    x = {"x": jnp.ones((1, 3)), "m": jnp.ones((1,), bool)}

    def norm(g):
        return jaxinv.path_norm(lambda w, x: g(x["x"] @ w["out"], x["m"][:, None], w), PARAMS, x)

    plain = jaxinv.path_norm(lambda w, x: x["x"] @ w["out"], PARAMS, x)
    np.testing.assert_allclose(norm(lambda h, m, w: h * jnp.where(m, 0.25, -0.5)), plain / 2)
    np.testing.assert_allclose(norm(lambda h, m, w: jnp.where(m, h, 3 * h)), 3 * plain)
    # Either may be the one, as in a maximum of two units; a parameter is a bias.
    either = norm(lambda h, m, w: jnp.where(m, h, w["mix"][:, :2].sum(0) * 0 + w["out"][0]))
    np.testing.assert_allclose(either**2, plain**2 + (np.asarray(OUT)[0] ** 2).sum())


def test_whole_numbers_are_inputs_like_any_other():
    def net(w, x):
        return (x.astype(float) / 255 - 0.5) @ w["out"]

    pixels, floats = jnp.zeros((2, 3), jnp.uint8), jnp.zeros((2, 3))
    found, expected = (jaxinv.path_norm(net, PARAMS, x) for x in (pixels, floats))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("what", "function"),
    [
        (
            "both depend on x",
            lambda h, i: h * i[:, None].astype(h.dtype),
        ),  # without bound
        ("were rounded", lambda h, i: h + (i // 2).astype(float)[:, None]),
        ("divides", lambda h, i: h / i[:, None].astype(h.dtype)),
        ("infinite", lambda h, i: jnp.where(i[:, None] > 0, h, -jnp.inf)),
        ("read single elements", lambda h, i: jax.lax.dynamic_slice(h, (0, i[0]), (1, 2))),
        ("read single elements", lambda h, i: h.at[:, i].set(0)),
    ],
)
def test_integers_that_do_more_than_choose_are_refused(what, function):
    x = {"x": jnp.ones((1, 3)), "i": jnp.ones((1,), int)}
    with pytest.raises(UnsupportedOperation, match=what) as caught:
        jaxinv.path_norm(lambda w, x: function(x["x"] @ w["mix"], x["i"]), PARAMS, x)
    assert "test_codes.py" in str(caught.value)


def test_a_loop_of_length_zero_hands_its_carry_on():
    def net(w, x):
        h, ys = jax.lax.scan(lambda h, a: (jnp.tanh(h @ a), h), x @ w["mix"], jnp.zeros((0, 3, 3)))
        return h @ w["out"] + ys.sum(0) @ w["out"]

    plain = lambda w, x: x @ w["mix"] @ w["out"]  # noqa: E731
    x = jnp.ones((2, 3))
    found, expected = (jaxinv.path_kappa(f, PARAMS, x) for f in (net, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-7)


def test_random_numbers_drawn_inside_are_constants():
    def noisy(w, x):
        return x @ w["out"] + jax.random.normal(jax.random.key(0), (2,))

    noise = jax.random.normal(jax.random.key(0), (2,))
    expected = jaxinv.path_norm(lambda w, x: x @ w["out"] + noise, PARAMS, jnp.ones((2, 3)))
    for norm in (jaxinv.path_norm, jax.jit(jaxinv.path_norm, static_argnums=0)):
        np.testing.assert_allclose(norm(noisy, PARAMS, jnp.ones((2, 3))), expected)
