"""Where every parameter goes: the sum, the names of the dead, the unexplained directions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxinv import (
    InvalidInput,
    degrees_of_freedom,
    jacobian,
    jacobian_rank,
    networks,
    rescaling_group,
    saturating_inputs,
    tangent_vectors,
)
from jaxinv.ranks import dead_names

relu = jax.nn.relu


# Hidden units, every how manyth of the 1797 digits, parameters, pixels that are always 0.
DIGITS = [(6, 9, 502, 7), pytest.param((16, 3, 1482, 5), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=DIGITS, ids=str)
def digits(request):
    """A network on some of the digits, two units made to never fire."""
    width, step, *_ = request.param
    x = jnp.asarray(load_digits().data[::step] / 16, jnp.float32)
    params = networks.init_mlp(jax.random.key(0), (64, width, width, 10), bias_std=0.1)
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[3].set(-1e3)
    params["Dense_1"]["bias"] = params["Dense_1"]["bias"].at[5].set(-1e3)
    return params, x, degrees_of_freedom(networks.mlp, params, x, method="svd"), request.param


def test_on_the_digits_the_sum_is_exact_and_known(digits):
    params, _, found, (*_, parameters, _) = digits
    d = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert d == parameters == int(found.parameters)
    parts = (found.rank, found.rescaling, found.dead, found.unexplained, found.unseen)
    assert sum(map(int, parts)) == d and int(found.unexplained) >= 0 and int(found.unseen) >= 0
    assert found.evidence.clear and int(found.rank) == int(found.evidence.lower)


def test_on_the_digits_every_dead_parameter_is_named(digits):
    """Pixels that are always 0 and units that never fire, found from the data with NumPy."""
    params, x, found, (width, *_, always) = digits
    x = np.asarray(x, np.float64)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    first = x @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"]
    second = np.maximum(first, 0) @ w["Dense_1"]["kernel"] + w["Dense_1"]["bias"]
    # A weight acts if on some digit its source is not 0 and its target passes something on.
    fires = [first > 0, second > 0]
    passes = [fires[0] & fires[1].any(1, keepdims=True), fires[1], np.ones((len(x), 10), bool)]
    sources = [x != 0, *fires]
    want = {
        f"Dense_{i}": {
            "kernel": ~(sources[i].astype(int).T @ passes[i] > 0), "bias": ~passes[i].any(0)
        }
        for i in range(3)
    }  # fmt: skip
    chex.assert_trees_all_equal(found.dead_mask, want)
    assert int(found.dead) == sum(leaf.sum() for leaf in jax.tree.leaves(want))
    never = [np.flatnonzero(~f.any(axis=0)) for f in fires]
    assert int(found.rescaling) == 2 * width - sum(map(len, never))
    names = dead_names(found.dead_mask)
    blank = np.flatnonzero((x == 0).all(axis=0))
    assert len(blank) == always and 3 in never[0] and 5 in never[1]
    expected = {f"Dense_0/kernel[{i}, :]" for i in blank}
    for i, units in enumerate(never):
        for j in units:
            expected |= {f"Dense_{i}/kernel[:, {j}]", f"Dense_{i}/bias[{j}]"}
            expected |= {f"Dense_{i + 1}/kernel[{j}, :]"}
    assert expected <= set(names)
    assert f"dead: Dense_0/kernel[{blank[0]}, :]" in str(found)
    named = jax.tree.map(np.zeros_like, want)
    for name in names:
        leaf, _, place = name.partition("[")
        layer, kind = leaf.split("/")
        index = tuple(slice(None) if p == ":" else int(p) for p in place[:-1].split(", "))
        named[layer][kind][index] = True
    chex.assert_trees_all_equal(named, want)


def twin(w, x):
    """A sum of two parameters: the direction (1, −1) is a symmetry that is no rescaling."""
    return relu(x @ (w["a"] + w["b"])) @ w["o"]


def test_without_a_certified_rank_nothing_is_counted_as_hidden():
    rng = np.random.default_rng(0)
    w = {name: rng.normal(size=s) for name, s in {"a": (2, 3), "b": (2, 3), "o": (3, 1)}.items()}
    x = rng.normal(size=(20, 2))
    found = degrees_of_freedom(twin, w, x, method="certificate")
    assert (int(found.rank), int(found.unexplained), bool(found.certain)) == (-1, -1, False)
    text = "15 parameters = at most 12 degrees of freedom + 3 rescalings + 0 dead + "
    assert str(found).splitlines()[0] == f"{text}unknown unexplained"
    assert "not proven: the null space may be larger" in str(found)
    with pytest.raises(InvalidInput, match="needs the rank"):
        degrees_of_freedom(twin, w, x, method="certificate", basis=True)


def test_hidden_directions_are_found_and_orthogonal_to_what_is_known(x64):
    rng = np.random.default_rng(0)
    w = {name: rng.normal(size=s) for name, s in {"a": (3, 4), "b": (3, 4), "o": (4, 2)}.items()}
    w["a"][:, 0] = w["b"][:, 0] = -10.0  # never fires
    x = abs(rng.normal(size=(60, 3)))
    found = degrees_of_freedom(twin, w, x, basis=True)
    J = np.asarray(jax.jit(lambda w: jacobian(twin, w, x))(w))
    assert int(found.unexplained) == len(found.basis) > 0
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(len(found.basis)), atol=1e-12)
    assert np.abs(J @ np.asarray(found.basis).T).max() < 1e-10
    group = rescaling_group(twin, w, x)
    T = np.asarray(tangent_vectors(group, w, dense=True))
    dead = np.concatenate([np.ravel(m) for m in jax.tree.leaves(found.dead_mask)])
    assert np.abs(found.basis @ np.where(dead[:, None], 0, T)).max() < 1e-10
    assert np.abs(np.asarray(found.basis)[:, dead]).max() < 1e-14
    total = found.rank + found.rescaling + found.dead + found.unexplained
    assert int(total) == J.shape[1] and int(found.rank) == np.linalg.matrix_rank(J)
    # Of each of three live units a and b are seen by their sum alone; no other input shows more.
    assert (int(found.rank), int(found.unexplained), int(found.unseen)) == (12, 9, 0)
    assert found.compared and found.evidence.clear and not found.certain
    assert "9 unexplained (clear, not proven)" in str(found)


def test_the_split_works_inside_jit_and_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    members = jax.jit(jax.vmap(lambda k: networks.init_mlp(k, (3, 4, 2), bias_std=0.1)))(keys)
    x = jax.random.normal(jax.random.key(1), (40, 3))
    found = jax.jit(jax.vmap(lambda w: degrees_of_freedom(networks.mlp, w, x)))(members)
    total = found.rank + found.rescaling + found.dead + found.unexplained + found.unseen
    assert (total == 26).all()
    alone = degrees_of_freedom(networks.mlp, jax.tree.map(lambda a: a[1], members), x)
    assert int(alone.rank) == int(found.rank[1]) and int(alone.dead) == int(found.dead[1])


def test_too_few_rows_leave_directions_unseen_not_hidden():
    w = networks.init_mlp(jax.random.key(0), (5, 8, 3), bias=False)
    found = degrees_of_freedom(networks.mlp, w, jax.random.normal(jax.random.key(1), (16, 5)))
    assert (int(found.rank), int(found.unexplained), int(found.unseen)) == (48, 0, 8)
    assert found.certain and found.evidence.certain  # the rank is the number of rows
    assert "0 unexplained + 8 unseen by these inputs (certain)" in str(found)
    assert "limited by 48 rows: at least 22 inputs needed for 64 parameters" in str(found)


def test_equal_inputs_leave_directions_unseen_not_hidden():
    w = networks.init_mlp(jax.random.key(0), (5, 8, 3), bias_std=0.3)
    found = degrees_of_freedom(networks.mlp, w, jnp.ones((100, 5)))
    parts = (found.rank, found.rescaling, found.dead, found.unexplained, found.unseen)
    assert sum(map(int, parts)) == 75 and int(found.unexplained) == 0 and int(found.unseen) > 0
    assert "limited" not in str(found)


def test_integer_inputs_are_not_compared():
    w = {"t": np.ones((3, 2)), "o": np.ones((2, 1))}

    def net(w, x):
        return jax.nn.one_hot(x, 3) @ w["t"] @ w["o"]

    found = degrees_of_freedom(net, w, np.array([0, 1]))
    assert not found.compared
    assert int(found.unexplained) == 0 or "unexplained or unseen by these inputs" in str(found)


def test_names_of_whole_leaves_slices_and_single_elements():
    mask = {"a": np.ones(3, bool), "b": np.zeros((2, 2, 3), bool), "c": np.array(True)}
    mask["b"][1] = True
    mask["b"][0, 0, 2] = True
    assert dead_names(mask) == ["a", "b[1, :, :]", "b[0, 0, 2]", "c"]
    assert dead_names({"a": np.zeros((2, 2), bool)}) == []


# --- enough inputs ------------------------------------------------------------------------------


def test_saturating_inputs_reach_the_generic_rank():
    w = networks.init_mlp(jax.random.key(0), (3, 5, 2), bias_std=0.3)
    shape = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    found = saturating_inputs(networks.mlp, w, shape, key=jax.random.key(4))
    assert found.saturated and found.ranks[-1] == 32 - 5
    assert list(found.ranks) == sorted(found.ranks)
    assert jax.tree.leaves(found.x)[0].shape == (found.sizes[-1], 3)
    drawn = saturating_inputs(networks.mlp, w, lambda key, n: jax.random.normal(key, (n, 3)))
    assert drawn.ranks[-1] == 27


def test_saturation_stops_where_the_data_end():
    w = networks.init_mlp(jax.random.key(0), (3, 5, 2), bias_std=0.3)
    found = saturating_inputs(networks.mlp, w, jax.random.normal(jax.random.key(0), (5, 3)))
    assert found.sizes == (5,) and found.ranks == (10,) and not found.saturated


def test_integer_inputs_cannot_be_drawn():
    shape = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    with pytest.raises(InvalidInput, match="integer inputs given by their shape"):
        saturating_inputs(lambda w, x: w[x], jnp.ones(5), shape)


def test_the_number_of_saturating_inputs_cannot_be_decided_inside_jit():
    def found(w):
        return saturating_inputs(lambda w, x: x @ w, w, jax.ShapeDtypeStruct((1, 2), "float32")).x

    for transformed in (jax.jit(found), jax.vmap(lambda w: found(w[:, None]))):
        with pytest.raises(InvalidInput, match="decides by the ranks .* call it outside"):
            transformed(jnp.ones((2, 1)))


@pytest.mark.parametrize("question", [jacobian_rank, degrees_of_freedom])
@pytest.mark.parametrize("method", ["auto", "svd", "certificate"])
def test_a_network_is_traced_twice_at_most(question, method):
    """On one example and on some, to see that they are apart; all else reads those two programs."""
    params = networks.init_mlp(jax.random.key(0), (3, 4, 2))
    x = jax.random.normal(jax.random.key(1), (40, 3))
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda w, x: networks.mlp(w, x), n=2)
    assert int(question(traced, params, x, method=method).rank) == 22
