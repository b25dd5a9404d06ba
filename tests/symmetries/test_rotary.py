"""Rotary embeddings, however they are written: one complex number per plane and head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import tangent_vectors
from jaxinv.frames.algebras import Algebra, Blocks, basis, commutant
from jaxinv.frames.system import DUAL, GL, NONE, Ref, Relation, System, Vector, meet
from jaxinv.symmetries import act, random_element, spanning_tangents, symmetry_group

LENGTH, WIDTH, HEADS, SIZE = 3, 4, 2, 4


def angles(positions, planes):
    return positions[..., None] / 5.0 ** (np.arange(planes) / planes)


def halves(x, at):
    """x: (batch, time, heads, size); at: positions (time,)."""
    cos, sin = (f(angles(at, x.shape[-1] // 2))[None, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rotated_half(x, at):
    """As in Llama's first code: x·cos + rotate_half(x)·sin, cosines of full length."""
    full = jnp.concatenate([angles(at, x.shape[-1] // 2)] * 2, -1)[:, None]
    c = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., c:], x[..., :c]], -1)
    return x * jnp.cos(full) + turned * jnp.sin(full)


def pairs(x, at):
    """Neighbours are planes: reshaped to pairs, and stacked again."""
    cos, sin = (f(angles(at, x.shape[-1] // 2))[:, None] for f in (jnp.cos, jnp.sin))
    two = x.reshape(*x.shape[:-1], -1, 2)
    a, b = two[..., 0], two[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def even_and_odd(x, at):
    """Neighbours are planes; the results are halves."""
    cos, sin = (f(angles(at, x.shape[-1] // 2))[:, None] for f in (jnp.cos, jnp.sin))
    two = x.reshape(*x.shape[:-1], -1, 2)
    a, b = two[..., 0], two[..., 1]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def as_complex(x, at):
    """Pairs as complex numbers."""
    two = x.reshape(*x.shape[:-1], -1, 2)
    turn = jnp.exp(1j * angles(at, x.shape[-1] // 2))[:, None]
    out = jax.lax.complex(two[..., 0], two[..., 1]) * turn
    return jnp.stack([out.real, out.imag], -1).reshape(x.shape)


def partly(x, at):
    """The first half of each head is turned, the rest passes."""
    c = x.shape[-1] // 2
    return jnp.concatenate([halves(x[..., :c], at), x[..., c:]], -1)


def heads_first(x, at):
    cos, sin = (f(angles(at, x.shape[-1] // 2)) for f in (jnp.cos, jnp.sin))
    x = x.swapaxes(1, 2)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).swapaxes(1, 2)


def scores(rope, other=None, positions=False):
    def fn(w, x):
        x, at = x if positions else (x, np.arange(LENGTH))
        q, k = (x @ w[n] for n in "qk")
        q, k = (a.reshape(*a.shape[:-1], -1, SIZE) for a in (q, k))
        return jnp.einsum("bqhc,bkhc->bhqk", rope(q, at), (other or rope)(k, at))

    return fn


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=(WIDTH, HEADS * SIZE))) for n in "qk"}


def inputs(n=12):
    return jnp.asarray(np.random.default_rng(1).normal(size=(n, LENGTH, WIDTH)))


def rank(rows):
    rows = np.asarray(rows)
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    return int(np.linalg.matrix_rank(rows / np.linalg.norm(rows, axis=1)[:, None], 1e-9))


def explained(fn, w, x):
    """(nullity of the Jacobian, rank of the tangents found), all tangents checked."""
    group = symmetry_group(fn, w, x)
    assert not group.rejected and group.verified < 1e-12
    J = jax.tree.leaves(jax.jit(jax.jacrev(lambda w: fn(w, x).ravel()))(w))
    J = np.concatenate([np.asarray(a).reshape(a.shape[0], -1) for a in J], axis=1)
    rows = np.asarray(spanning_tangents(group, w))
    if group.rescaling.dim:
        more = np.asarray(tangent_vectors(group.rescaling, w, dense=True)).T
        rows = np.concatenate([rows, more])
    for row in rows:
        assert np.linalg.norm(J @ row) <= 1e-12 * np.linalg.norm(J) * np.linalg.norm(row)
    s = np.linalg.svd(J, compute_uv=False)
    return J.shape[1] - int((s > 1e-11 * s[0]).sum()), rank(rows), group


WAYS = [halves, rotated_half, pairs, even_and_odd, as_complex, heads_first]


@pytest.mark.parametrize("rope", WAYS)
def test_it_is_seen_however_it_is_written(rope):
    w = {n: jax.ShapeDtypeStruct((WIDTH, HEADS * SIZE), np.float32) for n in "qk"}
    x = jax.ShapeDtypeStruct((2, LENGTH, WIDTH), np.float32)
    with jax.numpy_dtype_promotion("standard"):
        group = symmetry_group(scores(rope), w, x)
    assert [c.name for c in group.classes] == [
        f"GL(1,C)^2 of 4: k out {at} ~ q out {at}" for at in ("[0:4]", "[4:8]")
    ]
    assert (group.rescaling.dim, group.beyond_rescaling) == (4, 4)


@pytest.mark.parametrize(
    "rope", [r if r is even_and_odd else pytest.param(r, marks=pytest.mark.slow) for r in WAYS]
)
def test_a_complex_number_per_plane_and_head_is_all_that_is_left(rope, x64):
    nullity, found, group = explained(scores(rope), weights(), inputs())
    # Two planes in each of two heads, each with a scale and a rotation.
    assert (nullity, found) == (8, 8)
    assert group.beyond_rescaling == 4 and len(group.classes) == HEADS
    assert group.classes[0].name == "GL(1,C)^2 of 4: k out [0:4] ~ q out [0:4]"
    moved = act(group, weights(), random_element(group, jax.random.key(0), dtype=jnp.float64))
    fn, x = scores(rope), inputs()
    np.testing.assert_allclose(fn(moved, x), fn(weights(), x), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_what_passes_beside_a_rotary_part_has_all_matrices(x64):
    nullity, found, group = explained(scores(partly), weights(), inputs())
    assert nullity == found == HEADS * (2 + 4)
    assert group.classes[0].name.startswith("GL(1,C) x GL(2) of 4: k out [0:4]")


@pytest.mark.parametrize(
    "rope", [pytest.param(r, marks=pytest.mark.slow) for r in (halves, pairs)] + [heads_first]
)
def test_positions_may_be_inputs(rope, x64):
    fn = scores(rope, positions=True)
    group = symmetry_group(
        fn, weights(), (inputs(3), jnp.asarray(1.3 * np.arange(LENGTH))), batch_axis=None
    )
    assert group.beyond_rescaling == 4 and not group.rejected


@pytest.mark.slow
def test_planes_of_queries_that_are_not_those_of_keys_have_no_rotation(x64):
    """Neighbours in the queries, halves in the keys, brought into one order: a mistake."""
    nullity, found, group = explained(scores(even_and_odd, halves), weights(), inputs())
    assert nullity == found == 8  # the planes meet in one order: no mistake at all
    nullity, found, group = explained(scores(pairs, halves), weights(), inputs())
    assert found <= nullity and not any(isinstance(c.kind, Algebra) for c in group.classes)


@pytest.mark.slow
def test_equal_angles_and_no_angles(x64):
    """Planes that turn alike mix; a single position at 0 turns nothing."""

    def alike(x, at):
        cos, sin = (f(at * 0.7)[:, None, None] for f in (np.cos, np.sin))
        a, b = jnp.split(x, 2, -1)
        wide = np.ones(x.shape[-1] // 2)
        return jnp.concatenate(
            [a * (cos * wide) - b * (sin * wide), b * (cos * wide) + a * (sin * wide)], -1
        )

    nullity, found, group = explained(scores(alike), weights(), inputs())
    # Columns of cosines are one number for all planes: GL(2, C) is 8 dimensions per head.
    assert nullity == found == 16


@pytest.mark.slow
def test_what_reads_a_part_before_the_rotation_ends_it(x64):
    def fn(w, x):
        q, k = (x @ w[n] for n in "qk")
        q, k = (a.reshape(*a.shape[:-1], -1, SIZE) for a in (q, k))
        at = np.arange(LENGTH)
        s = jnp.einsum("bqhc,bkhc->bhqk", halves(q, at), halves(k, at))
        return s + jnp.tanh(q[..., :1]).swapaxes(1, 2)

    nullity, found, group = explained(fn, weights(), inputs())
    # Of each head the plane of coordinates 1 and 3 is left.
    assert nullity == found == 4 and group.beyond_rescaling == 2


@pytest.mark.slow
def test_a_norm_of_the_queries_leaves_rotations(x64):
    def rms(x):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True))

    def fn(w, x):
        q, k = (rms((x @ w[n]).reshape(*x.shape[:-1], -1, SIZE)) for n in "qk")
        at = np.arange(LENGTH)
        return jnp.einsum("bqhc,bkhc->bhqk", halves(q, at), halves(k, at))

    nullity, found, group = explained(fn, weights(), inputs())
    assert group.classes[0].name.startswith("SO(2)^2 of 4")
    assert nullity == found == 4 + 4  # four planes, and the four scales that norms remove


# --- algebras, against their definition ---------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_commutant_commutes_and_is_not_too_small(seed):
    """Random planes: against the null space of A·M − M·A over all matrices."""
    rng = np.random.default_rng(seed)
    n = 6
    order = rng.permutation(n)
    generators = []
    for i, j in order[:4].reshape(2, 2):
        one, turn = np.zeros((n, n)), np.zeros((n, n))
        one[i, i] = one[j, j] = turn[i, j] = 1
        turn[j, i] = -1
        generators += [one, turn]
    found = commutant(np.stack(generators))
    M = np.concatenate([np.kron(np.eye(n), g.T) - np.kron(g, np.eye(n)) for g in generators])
    assert found.dimension == n * n - np.linalg.matrix_rank(M) == 2 * 2 + 2 * 2
    for A in basis(found, n):
        for g in generators:
            np.testing.assert_allclose(A @ g, g @ A, atol=1e-12)
    turn = rng.permutation(n)
    left = np.stack([A[turn][:, turn] for A in basis(found, n)]).reshape(-1, n * n)
    right = basis(found.turned(turn.tolist()), n).reshape(-1, n * n)
    assert np.linalg.matrix_rank(np.concatenate([left, right])) == found.dimension
    assert found.transposed().transposed() == found
    antisymmetric = basis(found.where(rotations=True), n)
    assert len(antisymmetric) == 2 + 1 and not (antisymmetric + antisymmetric.mT).any()
    assert found.where(fixes_ones=True).dimension == 1  # of the 2 × 2 matrices that pass


@pytest.mark.parametrize("seed", range(10))
def test_relations_are_what_they_say_of_matrices(seed):
    rng = np.random.default_rng(seed)
    g, A = rng.uniform(1, 2, size=(2, 5)), rng.normal(size=(5, 5))

    def random_relation():
        gains = tuple((Vector(i, 0), 1) for i in range(2) if rng.random() < 0.5)
        turn = tuple(rng.permutation(5).tolist()) if rng.random() < 0.7 else ()
        return Relation(bool(rng.random() < 0.5), gains, turn)

    def seen(relation, A):
        A = -A.T if relation.dual else A
        A = A[np.ix_(relation.turn, relation.turn)] if relation.turn else A
        for v, power in relation.gains:
            T = (g[v.source][list(v.order)] if v.order else g[v.source]) ** float(power)
            A = T[:, None] * A / T
        return A

    one, other = random_relation(), random_relation()
    np.testing.assert_allclose(seen(one.of(other), A), seen(one, seen(other, A)))
    np.testing.assert_allclose(seen(one.inverse(), seen(one, A)), A)


def test_many_planes_of_one_cosine_are_taken_apart():
    """Cosines of slow planes round to 1 at the first positions: 20 planes of one matrix."""
    n = 41
    generators = [np.diag([1.0] * 40 + [2.0])]
    for i in range(20):
        turn = np.zeros((n, n))
        turn[i, i + 20], turn[i + 20, i] = 1, -1
        generators.append(turn)
    found = commutant(np.stack(generators))
    assert found.dimension == 20 * 2 + 1
    for A in basis(found, n):
        for g in generators:
            np.testing.assert_allclose(A @ g, g @ A, atol=1e-12)


def test_kinds_meet():
    planes = Algebra((Blocks(((0, 2), (1, 3)), (((1.0, 0), (0, 1)), ((0, 1), (-1, 0)))),))
    planes = planes.transposed()
    assert meet(planes, GL) == planes and meet(planes, NONE) == NONE
    assert meet(planes, "S") == NONE and meet(planes, "O").dimension == 2
    assert planes.part(0, 2).dimension == 0  # cut into halves
    system = System()
    (a, b) = (system.ref(int(i)) for i in system.new(4, count=2))
    system.restrict(a, planes)
    system.unify(a, Ref(b.frame, DUAL))
    assert system.kinds[system.root(b.frame).frame] == planes
    system.split(a.frame, [2])
    assert {system.kinds[p.frame] for _, p in system.pieces(b)} == {NONE}
