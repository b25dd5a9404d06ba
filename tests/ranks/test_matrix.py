"""Matrix symmetries in ranks: certain where they explain all, not believed where they are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import degrees_of_freedom
from jaxinv.frames.follow import FrameClass, Frames, Place
from jaxinv.frames.system import DUAL, SAME
from jaxinv.ranks import evidence
from tests.ground_truth.zoo import ZOO, inputs_of, params_of

EXPLAINED = ("attention", "grouped heads", "QK-norm", "RMS stream", "tied embedding", "LoRA")
COUNTED = ("linear with biases", "three linear", "rotary", "linear convolutions")


def account(name):
    case = ZOO[name]
    params = params_of(case)
    d = sum(a.size for a in params.values())
    outputs = int(np.prod(jax.eval_shape(case.fn, params, inputs_of(case, 2)).shape)) // 2
    x = inputs_of(case, max(150, 3 * d // outputs + 8))
    return case, d, degrees_of_freedom(case.fn, params, x, method="svd")


@pytest.mark.parametrize(
    "name",
    ["wide linear", *(pytest.param(n, marks=pytest.mark.slow) for n in (*EXPLAINED, *COUNTED))],
)
def test_matrices_are_counted_and_certain_where_they_explain_all(name, x64):
    case, d, found = account(name)
    assert (int(found.rescaling), int(found.matrix)) == (case.rescaling, case.matrix)
    rest = int(found.unexplained) + int(found.unseen) + int(found.dead)
    assert int(found.rank) + case.rescaling + case.matrix + rest == d
    if name not in COUNTED and name != "RMS stream":  # of which a unit is dead on these inputs
        assert bool(found.certain) and rest == 0
        assert f"{case.matrix} matrix symmetries" in str(found)


def test_a_class_that_moves_the_function_is_not_believed(monkeypatch, x64):
    """A rule that is wrong must not make a rank certain."""
    w = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))}
    w["b"] = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2)))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(30, 3)))

    def net(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"]

    places = (Place(0, 1, ((0, 3), (0, 2)), SAME), Place(1, 0, ((0, 2), (0, 2)), DUAL))
    wrong = Frames((FrameClass("GL", 2, places),), (), ())
    monkeypatch.setattr(evidence, "frames_of", lambda trace, shapes: wrong)
    jax.clear_caches()
    found = degrees_of_freedom(net, w, x, method="svd")
    jax.clear_caches()
    assert int(found.matrix) == 0 and int(found.rank) == 10
