"""The reference implementations agree with each other before anything is compared with them."""

import jax
import numpy as np
import pytest

from tests.ground_truth import exact
from tests.ground_truth.layers import (
    AdaptivePool,
    Concat,
    Conv,
    Dense,
    Gate,
    Mix,
    Network,
    Pool,
    Recurrent,
    Repeated,
    Residual,
    Rewire,
    Scale,
)
from tests.ground_truth.strategies import ANY_SHAPE, GATES, LONG, SEQUENCES, SEVERAL_AXES, WIDE


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_listing_paths_of_a_graph_gives_the_rational_enumeration(p, biases):
    layers = (Dense(2, biases), Gate("relu"), Dense(2, biases), Gate("relu"), Dense(1, biases))
    network = Network((2,), layers)
    values = exact.flax_params(float, biases=biases)
    for k in range(3):
        for leaf, ids in network.ids[f"layer_{2 * k}"].items():
            for i, value in zip(ids.ravel(), values[f"Dense_{k}"][leaf].ravel(), strict=True):
                network.dag.weights[i] = value
    norms, kappa = network.truth(p)
    np.testing.assert_allclose(norms.sum(), float(exact.path_norm_power(p, biases=biases)))
    expected = exact.kappa_arrays(p, biases=biases)
    for k in range(3):
        for leaf in expected[f"Dense_{k}"]:
            np.testing.assert_allclose(
                kappa[f"layer_{2 * k}"][leaf], expected[f"Dense_{k}"][leaf], rtol=1e-12
            )


MONOTONE = [
    ((3,), (Dense(3), Gate("relu"), Dense(2))),
    ((4, 2), (Conv(2, bias=True), Gate("relu"), Conv(1, dilation=2, padding="SAME"))),
    ((4, 2), (Conv(2, size=1, groups=2), Conv(1, input_dilation=2, padding=(1, 1)))),
    ((3, 3, 1), (Conv(2, stride=2, padding="SAME"), Pool("avg", padding="SAME"))),
    ((3, 3, 1), (Conv(2, padding=(1, 2)), Pool("avg", padding=(0, 1), count_padding=False))),
    ((5, 2), (AdaptivePool(3), Mix("mean", axis=0), Scale("divide"))),
    ((4, 2), (Residual((Dense(2),)), Concat((Dense(1),)), Rewire("flatten"), Dense(2))),
    ((4, 2), (Residual((Dense(3),)), Recurrent(2, every_state=True), Recurrent(2))),
    ((3, 2), (Repeated(2), Repeated(2, shared=False), Scale("parameter"), Mix("sum"))),
    ((3, 2), tuple(Rewire(k) for k in ("transpose", "reverse", "roll", "gather", "slice", "pad"))),
]


@pytest.mark.parametrize(("shape", "layers"), MONOTONE)
def test_graph_and_function_are_the_same_network(shape, layers, x64):
    """With weights ≥ 0 and inputs of one no gate closes: the sum over paths is the output."""
    network = Network(shape, layers, seed=3)
    positive = jax.tree.map(np.abs, network.params(np.float64))
    output = network.fn(positive, network.x(1, np.float64))[0]
    np.testing.assert_allclose(network.truth(1.0)[0], output, rtol=1e-12)


LAYERS = [*ANY_SHAPE, *WIDE, *SEVERAL_AXES, *SEQUENCES, *LONG, *GATES]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_graph_and_function_have_the_same_output_shape(layer, x64):
    for shape in [(4, 2)] if layer in SEQUENCES else [(4, 2), (3, 3, 2)]:
        network = Network(shape, (layer,))
        y = jax.eval_shape(network.fn, network.params(np.float64), network.x(5, np.float64))
        assert y.shape == (5, *network.outputs.shape)
