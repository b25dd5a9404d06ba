"""Mixtures of experts, however they are chosen: matrices of their own, against null spaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import tangent_vectors
from jaxinv.symmetries import shift_tangents, spanning_tangents, symmetry_group

EXPERTS, WIDTH, HIDDEN, TOP = 3, 5, 4, 2
SHAPES = {
    "e": (6, WIDTH),
    "r": (WIDTH, EXPERTS),
    "a": (EXPERTS, WIDTH, HIDDEN),
    "b": (EXPERTS, HIDDEN, WIDTH),
    "c": (EXPERTS, HIDDEN),
    "u": (WIDTH, 4),
}


def rms(h):
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True))


def gathered(act):
    """The weights of the best two are taken by index."""

    def fn(w, x):
        h = x @ w["e"]
        top, i = jax.lax.top_k(h @ w["r"], TOP)
        y = act(jnp.einsum("nd,nkdf->nkf", h, w["a"][i]) + w["c"][i])
        y = jnp.einsum("nkf,nkfd->nkd", y, w["b"][i])
        return jnp.einsum("nk,nkd->nd", jax.nn.softmax(top), y) @ w["u"]

    return fn


def dispatched(act):
    """All experts work, and a mask chooses."""

    def fn(w, x):
        h = x @ w["e"]
        top, i = jax.lax.top_k(h @ w["r"], TOP)
        mask = jax.nn.one_hot(i, EXPERTS, dtype=h.dtype)
        share = jnp.einsum("nk,nke->ne", jax.nn.softmax(top), mask)
        y = act(jnp.einsum("nd,edf->nef", h, w["a"]) + w["c"])
        return jnp.einsum("ne,nef,efd->nd", share, y, w["b"]) @ w["u"]

    return fn


def one_by_one(act):
    """Each token takes its best expert."""

    def fn(w, x):
        def one(x):
            h = x @ w["e"]
            logits = jax.nn.softmax(h @ w["r"])
            i = jnp.argmax(logits)
            return logits[i] * (act(h @ w["a"][i]) @ w["b"][i]) @ w["u"]

        return jax.vmap(one)(x)

    return fn


def mixed_up(act):
    """Another index chooses the second weights."""

    def fn(w, x):
        h = x @ w["e"]
        _, i = jax.lax.top_k(h @ w["r"], TOP)
        y = act(jnp.einsum("nd,nkdf->nkf", h, w["a"][i]) + w["c"][i])
        return jnp.einsum("nkf,nkfd->nd", y, w["b"][i[:, ::-1]]) @ w["u"]

    return fn


def summed_first(act):
    """The hidden values of both experts are added before either second weight is used."""

    def fn(w, x):
        h = x @ w["e"]
        _, i = jax.lax.top_k(h @ w["r"], TOP)
        y = act(jnp.einsum("nd,nkdf->nf", h, w["a"][i]) + w["c"][i].sum(1))
        return jnp.einsum("nf,nkfd->nd", y, w["b"][i]) @ w["u"]

    return fn


def linear(h):
    return h


def classes(group):
    return sorted((str(c.kind), c.size) for c in group.classes)


STREAM = [("GL", WIDTH)] * 2
OWN = [("GL", HIDDEN)] * EXPERTS
CASES = {
    "gathered": (gathered(linear), OWN),
    "dispatched": (dispatched(linear), OWN),
    "one by one": (one_by_one(linear), OWN),
    "mixed up": (mixed_up(linear), OWN[:1]),
    "summed first": (summed_first(linear), OWN[:1]),
    "gathered, nonlinear": (gathered(jnp.tanh), []),
    "one by one, nonlinear": (one_by_one(jnp.tanh), []),
}


@pytest.mark.parametrize("name", CASES)
def test_every_expert_has_matrices_of_its_own_where_one_index_chooses(name):
    fn, own = CASES[name]
    w = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in SHAPES.items()}
    group = symmetry_group(fn, w, jax.ShapeDtypeStruct((3, 6), np.float32))
    assert classes(group) == sorted(own + STREAM)


def rank(rows):
    rows = rows[np.linalg.norm(rows, axis=1) > 1e-12]
    return np.linalg.matrix_rank(rows / np.linalg.norm(rows, axis=1, keepdims=True), tol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "gathered, relu"])
def test_the_null_space_is_rescalings_matrices_and_shifts(name, x64):
    fn, _ = CASES.get(name, (gathered(jax.nn.relu), None))
    rng = np.random.default_rng(0)
    w = {n: jnp.asarray(rng.normal(size=s) / 2) for n, s in SHAPES.items()}
    x = jnp.asarray(rng.normal(size=(300, 6)))
    group = symmetry_group(fn, w, x[:4])
    assert not group.rejected and group.verified < 1e-12
    J = jax.tree.leaves(jax.jit(jax.jacrev(lambda w: fn(w, x).ravel()))(w))
    J = np.concatenate([np.asarray(a).reshape(a.shape[0], -1) for a in J], axis=1)
    alive = J.any(axis=0)  # one of the networks has no biases
    s = np.linalg.svd(J[:, alive], compute_uv=False)
    nullity = alive.sum() - int((s > 1e-11 * s[0]).sum())
    rows = [np.asarray(spanning_tangents(group, w)), shift_tangents(fn, w, x).tangents]
    if group.rescaling.dim:
        rows.append(np.asarray(tangent_vectors(group.rescaling, w, dense=True)).T)
    rows = np.concatenate([np.asarray(r) for r in rows])
    assert abs(J @ rows.T).max() <= 1e-10 * np.linalg.norm(J)
    if name in ("gathered", "dispatched", "one by one", "gathered, relu", "gathered, nonlinear"):
        assert rank(rows[:, alive]) == nullity
    else:
        assert rank(rows[:, alive]) <= nullity


def test_squares_of_what_was_chosen_leave_rotations():
    """An embedding is chosen by an index too; its normalisation sees the sum of squares."""

    def fn(w, tokens):
        return (rms(w["table"][tokens]) + w["v"]) @ w["u"]

    def turned(w, tokens):
        return rms(w["table"][tokens]) @ w["u"]

    w = {"table": (7, 6), "v": (6,), "u": (6, 3)}
    w = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in w.items()}
    tokens = jax.ShapeDtypeStruct((3, 4), np.int32)
    assert classes(symmetry_group(fn, w, tokens)) == [("O", 6)]
    assert classes(symmetry_group(turned, w, tokens)) == [("O", 6)]
