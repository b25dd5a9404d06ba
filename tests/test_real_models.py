"""Models of seven packages: their groups, null spaces and path norms, and Path-SGD on digits.

The null space is that of an SVD in NumPy, the path norm what the library itself computes on ones at
|w|^p. `benchmarks/_zoo.py` has the models and, for each, what its null space consists of.
"""

import os

import _zoo
import jax
import numpy as np
import pytest
import real_models

from jaxinv import path_norm
from jaxinv.symmetries import shift_tangents, symmetry_group

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_dtype_promotion")]
WITH_PATHS = [name for name, entry in _zoo.ZOO.items() if not entry.refused]


def built(name):
    """A model and its entry; skipped where its package is missing."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    entry = _zoo.ZOO[name]
    pytest.importorskip(entry.package)
    if entry.package == "keras":
        import keras

        if keras.backend.backend() != "jax":
            pytest.skip("keras runs on another backend")
    return entry, entry.build()


def group_of(model):
    return symmetry_group(
        model.fn, model.params, _zoo.inputs(model.x, 3), batch_axis=model.batch_axis
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", _zoo.ZOO)
def test_the_group_is_the_null_space_and_moves_no_output(name):
    entry, model = built(name)
    group = group_of(model)
    assert not group.rejected
    assert (group.rescaling.dim, group.beyond_rescaling) == (entry.rescaling, entry.matrix)
    assert max(real_models.change(model, group)) < 1e-12
    space = real_models.null_space(model, group)
    assert space.gap > 1e6 and space.off < 1e-12
    parts = (space.rescaling, space.matrix, space.shift, space.dead, space.rest)
    assert parts == (entry.rescaling, entry.matrix, entry.shift, entry.dead, entry.rest), entry.why
    assert space.parameters == space.rank + sum(parts)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", _zoo.ZOO)
def test_the_path_norm_is_that_of_the_library_or_says_which_layer_has_none(name):
    entry, model = built(name)
    found = real_models.norms(model)
    if entry.refused:
        assert entry.refused in (found["part"], found["refused"])
        assert "do:" in found["why"] and "where:" in found["why"]
    else:
        np.testing.assert_allclose(found["norms"], found["definition"], rtol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", WITH_PATHS)
def test_path_sgd_in_a_chain_with_clipping_decay_and_a_schedule(name):
    _, model = built(name)
    losses = real_models.losses(model)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1


@pytest.mark.filterwarnings("default")
def test_shifts_of_a_model_that_computes_in_float32():
    """Keras casts to float32 in any scope; softmax leaves a shift per unit, and one of biases."""
    _, model = built("keras LSTM")
    assert shift_tangents(model.fn, model.params, _zoo.inputs("rows", 80)).dimension == 6


@pytest.mark.filterwarnings("default")
def test_a_graph_that_is_an_input_has_no_paths_and_one_that_is_closed_over_has():
    _, model = built("graph convolutions")
    import jraph

    graph = _zoo.inputs("graph", 1)

    def as_input(params, graph):
        convolve = jraph.GraphConvolution(lambda h: h @ params["first"]["w"])
        return jax.nn.relu(convolve(graph).nodes)

    with pytest.raises(real_models.UnsupportedOperation, match="integer arithmetic on x"):
        path_norm(as_input, model.params, graph, batch_axis=None)

    def closed_over(params, nodes):
        return as_input(params, graph._replace(nodes=nodes))

    near = np.eye(8) + np.eye(8, k=1) + np.eye(8, k=-1)
    near /= np.sqrt(np.outer(near.sum(0), near.sum(0)))
    squares = (near**2).sum() * (np.asarray(model.params["first"]["w"]) ** 2).sum()
    found = path_norm(closed_over, model.params, graph.nodes, batch_axis=None)
    np.testing.assert_allclose(found**2, squares, rtol=1e-5)


# --- what the rests are, by hand ----------------------------------------------------------------


def rotation_that_fixes_ones(n, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.column_stack([np.ones(n), rng.normal(size=(n, n - 1))]))[0]
    turn = np.eye(n)
    turn[1:, 1:] = np.linalg.qr(rng.normal(size=(n - 1, n - 1)))[0]
    return (basis @ turn @ basis.T).astype(np.float32)


@pytest.mark.filterwarnings("default")
def test_the_rest_of_the_transformer_of_keras_is_rotations_that_fix_ones():
    entry, model = built("keras transformer")
    n = 6
    assert entry.rest == (n - 1) * (n - 2) // 2
    R = rotation_that_fixes_ones(n)
    leaves = {"/".join(name.split("/")[-2:]): name for name in model.params}
    w = {short: np.asarray(model.params[name]) for short, name in leaves.items()}
    (stream,) = (short for short in w if w[short].shape == (8, n))
    (read,) = (short for short in w if w[short].shape == (n, 7))
    gain, shift = w["layer_normalization/gamma"], w["layer_normalization/beta"]
    moved = dict(w)
    for out in (stream, stream.replace("kernel", "bias")):
        moved[out] = w[out] @ R
    for out in ("attention_output/kernel", "attention_output/bias"):
        moved[out] = w[out] @ R
    for into in ("query/kernel", "key/kernel", "value/kernel"):
        moved[into] = np.einsum("ij,jhk->ihk", R.T, w[into])
    moved[read] = (R.T * gain) / gain[:, None] @ w[read]
    moved["layer_normalization/beta"] = (shift / gain) @ R * gain
    x = _zoo.inputs("rows", 20)
    new = {name: moved[short] for short, name in leaves.items()}
    assert max(abs(moved[short] - w[short]).max() for short in w) > 0.1
    np.testing.assert_allclose(model.fn(new, x), model.fn(model.params, x), rtol=1e-4, atol=1e-5)


def test_the_rest_of_a_frozen_batch_norm_is_affine():
    """A kernel by c and the gain by 1/c; the offset takes back what the mean makes of that."""
    import flax.linen as nn

    from jaxinv.adapters import from_linen

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5, use_bias=False)(x))
            return nn.Dense(3)(nn.relu(x))

    rng = np.random.default_rng(0)
    x = _zoo.inputs("pixels", 30)
    variables = Net().init(jax.random.key(0), x, train=False)
    mean, var = (rng.uniform(0.5, 2, 5).astype(np.float32) for _ in range(2))
    stored = {"batch_stats": {"BatchNorm_0": {"mean": mean, "var": var}}}
    fn, params = from_linen(Net(), {**variables, **stored})
    kernel, norm = params["Dense_0"]["kernel"], params["BatchNorm_0"]
    c = rng.uniform(0.5, 2, 5).astype(np.float32)
    taken_back = norm["bias"] - mean * norm["scale"] / np.sqrt(var + 1e-5) * (1 - 1 / c)
    moved = {
        **params,
        "Dense_0": {"kernel": kernel * c},
        "BatchNorm_0": {"scale": norm["scale"] / c, "bias": taken_back},
    }
    np.testing.assert_allclose(fn(moved, x), fn(params, x), rtol=1e-4, atol=1e-5)
