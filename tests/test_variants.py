"""With and without `jit`, and on a device of one's choice, the answers are the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import jaxinv

PARAMS = {
    "in": np.array([[1.0, 2.0], [3.0, -4.0]], np.float32),
    "out": np.array([[1.0], [-2.0]], np.float32),
}
X = np.array([[1.0, 0.5], [0.2, 1.0], [1.0, -1.0]], np.float32)  # on 2: the units on are 1, 1, 2


def net(w, x):
    return jax.nn.relu(x @ w["in"]) @ w["out"]


def by_hand():
    """The Jacobian, rows by example, columns "in" then "out"."""
    z = X @ PARAMS["in"]
    on = (z > 0).astype(np.float32)
    slope = on * PARAMS["out"].T
    return np.concatenate([(X[:, :, None] * slope[:, None]).reshape(3, 4), z * on], 1)


def first_update(optimizer, params):
    return optimizer.update(params, optimizer.init(params), params)[0]


GROUP = jaxinv.rescaling_group(net, PARAMS, X)
# name, function of parameters and inputs, answer
CASES = [
    ("path_norm", lambda w, x: jaxinv.path_norm(net, w, x) ** 2, np.float32(90)),
    (
        "path_kappa",
        lambda w, x: jaxinv.path_kappa(net, w, x),
        {"in": np.array([[1, 4], [1, 4]]), "out": np.array([[10], [20]])},
    ),
    ("jacobian", lambda w, x: jaxinv.jacobian(net, w, x), by_hand()),
    ("jacobian_rank", lambda w, x: jaxinv.jacobian_rank(net, w, x).rank, 3),
    (
        "rescale",
        lambda w, x: jaxinv.rescale(GROUP, w, jnp.array([1, -1]), base=2),
        {"in": PARAMS["in"] * [2.0, 0.5], "out": PARAMS["out"] * [[0.5], [2.0]]},
    ),
    (
        "path_sgd",
        lambda w, x: jaxinv.path_sgd(1.0, net, x).update(
            w, jaxinv.path_sgd(1.0, net, x).init(w), w
        )[0],
        {"in": -PARAMS["in"] / [1, 4], "out": -PARAMS["out"] / [[10], [20]]},
    ),
]


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters(*CASES)
    def test_the_answer_is_the_one_by_hand(self, function, expected):
        found = self.variant(function)(PARAMS, X)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
