"""Symmetry groups: what they explain of exactly known null spaces, and that they move nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import InvalidInput, tangent_vectors
from jaxinv.frames.follow import _runs
from jaxinv.symmetries import (
    Element,
    act,
    is_symmetry,
    random_element,
    shift_tangents,
    spanning_tangents,
    symmetry_group,
    symmetry_tangents,
)
from tests.ground_truth import frames_fuzz
from tests.ground_truth.zoo import ZOO, inputs_of, params_of

FAST = ("attention with biases", "QK-norm", "layer norm between", "softmax", "grouped heads")


def rank(rows):
    rows = rows[np.linalg.norm(rows, axis=1) > 1e-12]
    if not len(rows):
        return 0
    s = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)
    return int((s > 1e-9 * s[0]).sum())


def jacobian_of(fn, params, x):
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(lambda w: fn(w, x).ravel()))(params))
    rows = leaves[0].shape[0]
    return np.concatenate([np.asarray(a).reshape(rows, -1) for a in leaves], axis=1)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_every_null_direction_is_explained_or_named(name, x64):
    case = ZOO[name]
    params = params_of(case)
    d = sum(a.size for a in params.values())
    outputs = int(np.prod(jax.eval_shape(case.fn, params, inputs_of(case, 2)).shape)) // 2
    # Of the slow ones some have units of relu that few inputs reach.
    x = inputs_of(case, max(0 if name in FAST else 150, 3 * d // outputs + 8))
    J = jacobian_of(case.fn, params, x)
    s = np.linalg.svd(J, compute_uv=False)
    nullity = d - int((s > 1e-11 * s[0]).sum())
    group = symmetry_group(case.fn, params, inputs_of(case, 3))
    assert group.verified < 1e-12 and not group.rejected
    D = np.zeros((0, d))
    if group.rescaling.dim:
        D = np.asarray(tangent_vectors(group.rescaling, params, dense=True)).T
    V = np.asarray(spanning_tangents(group, params))
    N = np.asarray(shift_tangents(case.fn, params, x).tangents)
    for rows in (D, V, N):
        for row in rows[np.linalg.norm(rows, axis=1) > 0]:
            assert np.linalg.norm(J @ row) <= 1e-12 * np.linalg.norm(J) * np.linalg.norm(row)
    counts = [rank(D), rank(np.concatenate([D, V])), rank(np.concatenate([D, V, N])), nullity]
    parts = np.diff([0, *counts]).tolist()
    dead = 0 if name != "relu" and name != "RMS stream" else parts[2] + parts[3] - case.rest
    # Units that never fire on these inputs belong to no symmetry.
    assert parts[:2] == [case.rescaling, case.matrix]
    assert sum(parts[2:]) == case.shift + case.rest + dead
    if not dead:
        assert parts[2:] == [case.shift, case.rest], case.why


@pytest.mark.parametrize("name", ["attention", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_element_moves_the_parameters_and_not_the_function(name, x64):
    case = ZOO[name]
    params, x = params_of(case), inputs_of(case, 5)
    group = symmetry_group(case.fn, params, x)
    element = random_element(group, jax.random.key(3), dtype=jnp.float64)
    moved = act(group, params, element)
    assert max(abs(moved[n] - params[n]).max() for n in params) > 0.1
    np.testing.assert_allclose(case.fn(moved, x), case.fn(params, x), rtol=1e-9, atol=1e-11)
    # The velocity is the derivative of the action.
    velocity = symmetry_tangents(group, params, element)

    def at(t):
        return act(group, params, jax.tree.map(lambda a: t * a, element))

    step = jax.tree.map(lambda a, b: (a - b) / 2e-6, at(1e-6), at(-1e-6))
    for name_ in params:
        np.testing.assert_allclose(velocity[name_], step[name_], rtol=1e-5, atol=1e-8)


def test_shapes_are_enough_and_nothing_is_tried():
    shapes = {"a": jax.ShapeDtypeStruct((4096, 128), np.float32)}
    shapes["b"] = jax.ShapeDtypeStruct((128, 4096), np.float32)
    x = jax.ShapeDtypeStruct((2, 4096), np.float32)
    group = symmetry_group(lambda w, x: x @ w["a"] @ w["b"], shapes, x)
    assert [c.name for c in group.classes] == ["GL(128): a out ~ b in"]
    assert group.beyond_rescaling == 128 * 127 and np.isnan(group.verified)


def test_a_loop_whose_collected_states_nobody_reads():
    """haiku's LSTM returns them beside the last state; a linear cell has GL(4) of its state."""

    def net(w, x):
        def step(h, xt):
            h = xt @ w["in"] + h @ w["again"]
            return h, h

        start = jnp.zeros((x.shape[0], 4), x.dtype)
        return jax.lax.scan(step, start, x.swapaxes(0, 1))[0] @ w["out"]

    w = normal({"in": (3, 4), "again": (4, 4), "out": (4, 5)})
    group = symmetry_group(net, w, jnp.ones((2, 6, 3)))
    assert [c.name for c in group.classes] == ["GL(4): again in, out in ~ again out, in out"]
    assert (group.rescaling.dim, group.beyond_rescaling) == (4, 12)


def normal(shapes):
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def stream(gained):
    """A residual stream that is read through a normalisation with a gain."""

    def net(w, x):
        h = x @ w["e"]
        h = h + jnp.tanh(gained(w, h) @ w["a"]) @ w["b"]
        return gained(w, h) @ w["u"]

    return net, normal({"e": (5, 6), "a": (6, 7), "b": (7, 6), "u": (6, 4), "g": (6,)})


def test_a_gain_is_one_also_where_it_meets_the_scale_of_each_token_first():
    """flax multiplies 1/σ and the gain before they meet the values."""

    def as_flax(w, h):
        return h * (jax.lax.rsqrt((h * h).mean(-1, keepdims=True)) * w["g"])

    def as_written(w, h):
        return (h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True))) * w["g"]

    def over_features(w, h):
        return h * (jax.lax.rsqrt((h * h).mean(0, keepdims=True)) * w["g"])

    def of_other_values(w, h):
        return h * ((h @ w["e"].T @ w["e"]) * w["g"])

    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, 5)), jnp.float32)
    for gained in (as_flax, as_written):
        group = symmetry_group(*stream(gained), x)
        assert group.beyond_rescaling == 15 and group.classes[0].kind == "O"
        assert group.verified < 1e-12 and not group.rejected
    for gained in (over_features, of_other_values):
        group = symmetry_group(*stream(gained), x)
        assert not group.classes and not group.rejected


def test_an_offset_that_takes_back_the_mean_times_the_gain():
    """Keras writes LayerNormalization as x·γ/σ + (β − μγ/σ)."""

    def as_keras(w, h, gain="g"):
        mean = h.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(h.var(-1, keepdims=True)) * w["g"]
        return h * scale + (w["c"] - mean * scale * (w["g2"] / w["g"] if gain == "g2" else 1.0))

    def offset_first(w, h):
        mean = h.mean(-1, keepdims=True)
        scale = w["g"] * jax.lax.rsqrt(h.var(-1, keepdims=True))
        return (w["c"] - mean * scale) + h * scale

    def another_gain(w, h):
        return as_keras(w, h, "g2")

    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, 5)), jnp.float32)
    more = normal({"g": (6,), "c": (6,), "g2": (6,)})
    for gained in (as_keras, offset_first):
        net, w = stream(gained)
        group = symmetry_group(net, w | more, x)
        # Rotations of the stream that leave its mean alone.
        assert [(c.kind, c.size) for c in group.classes] == [("O1", 6)]
        assert group.beyond_rescaling == 10 and group.verified < 1e-12 and not group.rejected
    net, w = stream(another_gain)
    group = symmetry_group(net, w | more, x)
    assert not group.classes and not group.rejected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_that_computes_in_less_than_float64_is_tried_to_that(dtype):
    """The softmax of flax, an embedding of nnx and all of keras are in float32 in any scope."""
    shapes = {"q": (6, 3), "k": (6, 3), "v": (6, 3), "o": (3, 6)}

    def net(w, x):
        q, k, v = (x @ w[n] for n in "qkv")
        scores = jax.nn.softmax((q @ k.mT).astype(dtype)).astype(x.dtype)
        return scores @ v @ w["o"]

    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 6)), jnp.float32)
    group = symmetry_group(net, normal(shapes), x)
    assert (len(group.classes), group.beyond_rescaling, group.rejected) == (2, 12, ())
    # What rounding leaves is seen, and is no more than rounding.
    assert group.verified <= np.sqrt(float(jnp.finfo(dtype).eps))


def test_shifts_of_a_network_that_casts_to_float32():
    """Softmax sees no common shift of its inputs: of a row of weights, or of the bias."""

    def net(w, x):
        return jax.nn.softmax((x @ w["a"] + w["b"]).astype("float32"))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 5)), jnp.float32)
    found = shift_tangents(net, normal({"a": (5, 4), "b": (4,)}), x)
    assert found.dimension == 6 and found.gap > 100


def hostile():
    """Programs in which a frame would be easy to see where there is none."""
    two, square = {"a": (5, 4), "b": (4, 3)}, {"a": (5, 4), "b": (4, 4)}

    def mean(y):
        return y.mean(-1, keepdims=True)

    def rms(y):
        return y / jnp.sqrt((y * y).mean(-1, keepdims=True))

    def halves(y, factor):
        left, right = ((h**2).sum(-1, keepdims=True) for h in jnp.split(y, 2, -1))
        return y / jnp.sqrt(left + factor * right)

    return {
        "center": (lambda w, x: (x @ w["a"] - mean(x @ w["a"])) @ w["b"], two, ["S"]),
        "mean used": (lambda w, x: (x @ w["a"]) @ w["b"] + jnp.tanh(mean(x @ w["a"])), two, ["S"]),
        "two halves": (lambda w, x: halves(x @ w["a"], 2) @ w["b"], two, ["O", "O"]),
        "tied transpose": (lambda w, x: x @ w["a"] @ w["a"].T, {"a": (5, 4)}, ["O"]),
        "tied twice": (lambda w, x: x @ w["a"] @ w["b"] @ w["b"] @ w["a"].T, square, ["O"]),
        "trace": (lambda w, x: x[:, :4] * jnp.trace(w["b"]), square, []),
        "inverse": (lambda w, x: x @ w["a"] @ jnp.linalg.inv(w["b"]), square, []),
        "flip": (lambda w, x: (x @ w["a"])[:, ::-1] @ w["b"], two, ["GL"]),
        "flip of tied": (lambda w, x: (x @ w["a"])[:, ::-1] @ w["a"].T, two, []),
        "flips and a gain": (
            lambda w, x: ((x @ w["a"])[:, ::-1] * w["g"])[:, ::-1] @ w["b"],
            two | {"g": (4,)}, ["GL"],
        ),
        "flip and parts": (
            lambda w, x: jnp.tanh((x @ w["a"])[:, ::-1][:, :2]) @ w["b"][:2] + x @ w["a"] @ w["b"],
            two, [],
        ),
        "skip": (
            lambda w, x: jnp.concatenate([x, x @ w["a"]], -1) @ w["b"],
            {"a": (5, 4), "b": (9, 3)}, ["GL"],
        ),
        "norm of a weight": (
            lambda w, x: x @ w["a"] @ w["b"] / jnp.sqrt((w["a"] ** 2).sum()), two, []
        ),
        "constant gains, one zero": (
            lambda w, x: (x @ w["a"] * np.arange(4.0)) @ w["b"], two, None
        ),
        "mask of elements": (
            lambda w, x: jnp.where(x[:, :4] > 0, x @ w["a"], 0.0) @ w["b"], two, []
        ),
        "mask of rows": (
            lambda w, x: jnp.where(x[:, :1] > 0, x @ w["a"], 0.0) @ w["b"], two, ["GL"]
        ),
        "gain between norms": (
            lambda w, x: rms(rms(x @ w["a"]) * w["g"]) @ w["b"], two | {"g": (4,)}, []
        ),
        "stack of layers": (
            lambda w, x: jax.lax.scan(lambda h, m: (h @ m, None), x, w["a"])[0],
            {"a": (3, 5, 5)}, ["GL", "GL"],
        ),
        "cast": (lambda w, x: (x @ w["a"]).astype(jnp.int32).astype(x.dtype) @ w["b"], two, []),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile())
def test_no_class_is_reported_that_moves_the_function(name, x64):
    fn, shapes, kinds = hostile()[name]
    rng = np.random.default_rng(2)
    params = {n: jnp.asarray(1 + 0.5 * rng.normal(size=s)) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(6, 5)))
    group = symmetry_group(fn, params, x)
    if kinds is not None:
        assert sorted(c.kind for c in group.classes) == kinds
    assert group.verified < 1e-12
    moved = act(group, params, random_element(group, jax.random.key(0), dtype=jnp.float64))
    assert np.isfinite(np.concatenate([np.ravel(a) for a in moved.values()])).all()
    np.testing.assert_allclose(fn(moved, x), fn(params, x), rtol=1e-8, atol=1e-10)


def test_zero_gains_are_refused_not_divided_by(x64):
    def fn(w, x):
        y = x @ w["a"]
        y = y / jnp.sqrt((y * y).mean(-1, keepdims=True)) * w["g"]
        return y @ w["b"]

    rng = np.random.default_rng(2)
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in {"a": (5, 4), "b": (4, 3)}.items()}
    x = jnp.asarray(rng.normal(size=(6, 5)))
    group = symmetry_group(fn, params | {"g": jnp.ones(4)}, x)
    assert [c.kind for c in group.classes] == ["O"]
    group = symmetry_group(fn, params | {"g": jnp.array([1.0, 0, 1, 1])}, x)
    assert not group.classes and len(group.rejected) == 1


def test_elements_of_another_group_are_refused():
    w = [jnp.ones((2, 3)), jnp.ones((3, 2))]
    group = symmetry_group(lambda w, x: x @ w[0] @ w[1], w, jnp.eye(2))
    with pytest.raises(InvalidInput, match="an element belongs to the group"):
        act(group, w, Element(jnp.zeros(3), (jnp.eye(2),)))
    complex_ones = [jnp.ones((2, 2), jnp.complex64)] * 2
    with pytest.raises(InvalidInput, match="must be real floating-point"):
        symmetry_group(lambda w, x: x @ w[0] @ w[1], complex_ones, jnp.eye(2))
    with pytest.raises(InvalidInput, match="cannot run under jit"):
        jax.jit(lambda w: symmetry_group(lambda w, x: x @ w[0], w, jnp.eye(2)).verified)(w)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_make_up_a_set_without_overlaps(seed):
    rng = np.random.default_rng(seed)
    here = rng.random(rng.integers(1, 5, size=rng.integers(1, 4))) < rng.choice([0.3, 0.8, 1])
    count = np.zeros(here.shape, int)
    for box in _runs(here):
        count[tuple(slice(*ends) for ends in box)] += 1
    np.testing.assert_array_equal(count, here)
    box = np.zeros((4, 3, 5), bool)
    box[1:3, :, 2:4] = True
    assert _runs(box) == [((1, 3), (0, 3), (2, 4))]


# --- is it legal? -----------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["e", "q", "b", "u"])
def test_a_leaf_that_was_forgotten_is_found_at_its_consumer(forgotten, x64):
    case = ZOO["tied embedding"]
    params, x = params_of(case), inputs_of(case, 40)
    params["u"] = jnp.zeros(1)
    group = symmetry_group(case.fn, params, x[:2])
    moved = act(group, params, random_element(group, jax.random.key(1), dtype=jnp.float64))
    found = is_symmetry(case.fn, params, x, moved)
    assert found.same and not found.forbidden_by and "same function" in str(found)
    found = is_symmetry(case.fn, params, x, moved | {forgotten: params[forgotten]})
    if forgotten == "u":
        assert found.same  # nothing reads it
    else:
        assert not found.same and "zoo.py" in str(found.forbidden_by[0][1])


def test_outputs_without_a_derivative_are_passed_over_and_all_of_them_are_not(x64):
    """0/0 of a masked row says nothing; a network that is NaN everywhere has no class."""
    w = {"a": jnp.eye(3, 2) + 1, "b": jnp.eye(2, 3) + 1}

    def net(w, x):
        y = x @ w["a"] @ w["b"]
        return y / jnp.sqrt((y * y).sum(-1, keepdims=True))

    x = jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)])
    assert [c.name for c in symmetry_group(net, w, x).classes] == ["GL(2): a out ~ b in"]
    nowhere = symmetry_group(net, w, x[:1])
    assert not nowhere.classes and nowhere.rejected == ("GL(2): a out ~ b in",)


def test_heads_with_biases_have_a_matrix_each():
    rng = np.random.default_rng(0)
    w = {n: rng.normal(size=(4, 2, 3)) for n in "qk"} | {"q0": rng.normal(size=(2, 3))}
    w = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w)

    def scores(w, x):
        q = jnp.einsum("nd,dhc->nhc", x, w["q"]) + w["q0"]
        return jnp.einsum("nhc,nhc->nh", q, jnp.einsum("nd,dhc->nhc", x, w["k"]))

    group = symmetry_group(scores, w, jnp.ones((5, 4)))
    assert [(c.kind, c.size) for c in group.classes] == [("GL", 3)] * 2


def test_a_rotation_does_not_pass_a_nonlinearity():
    w = {"a": jnp.eye(3)[:, :2], "b": jnp.eye(2)}
    turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    turned = {"a": w["a"] @ turn, "b": turn.T}
    x = jax.random.normal(jax.random.key(0), (30, 3))
    found = is_symmetry(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], w, x, turned)
    assert [name for name, _ in found.forbidden_by] == ["tanh"]
    with pytest.raises(InvalidInput, match="moved must be a pytree like params"):
        is_symmetry(lambda w, x: x @ w["a"], w, x, {"a": w["a"]})


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(30))])
def test_random_programs_have_no_class_that_moves_them(seed, x64):
    found = frames_fuzz.check(frames_fuzz.draw(seed), seed)
    assert not found.rejected and found.wrong < 1e-12 and sum(found.parts) <= found.nullity


def test_rows_of_a_table_that_no_input_reaches_are_no_matrix():
    def net(w, tokens):
        return jnp.tanh(w["embed"][tokens] + w["place"][:3]) @ w["out"]

    w = {
        "embed": np.ones((5, 4)),
        "place": np.random.default_rng(0).normal(size=(9, 4)),
        "out": np.ones((4, 2)),
    }
    group = symmetry_group(net, w, np.zeros((2, 3), np.int32))
    assert group.classes == ()
    assert any(name.startswith("place") for name in group.rescaling.unused)
