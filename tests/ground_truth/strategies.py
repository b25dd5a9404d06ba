"""Random small networks for hypothesis."""

from hypothesis import strategies as st

from tests.ground_truth.layers import (
    AdaptivePool,
    Concat,
    Conv,
    Dense,
    FrozenBatchNorm,
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

MAX_PATHS = 1500  # Listing more takes longer than the rest of a test.

GATES = [
    Gate("relu"),
    Gate("flax relu"),
    Gate("maximum"),
    Gate("abs"),
    Gate("prelu"),
    Gate("leaky", 0.1),
    Gate("leaky", -3.0),
    Gate("where", 0.3),
    Gate("where", 2.5),
    Gate("flipped where", -0.3),
    Gate("flipped where", -1.7),
]
ANY_SHAPE = [
    FrozenBatchNorm(),
    Scale("parameter"),
    Scale("times", -2.0),
    Scale("divide", 0.7),
    Rewire("reverse"),
    Rewire("roll"),
    Rewire("tile"),
    Rewire("stride"),
    Rewire("pad"),
    Mix("sort"),
    *(Residual((Dense(n), gate)) for n, gate in ((2, GATES[0]), (3, GATES[4]))),
    Residual((Dense(2, bias=False), Gate("relu"), Dense(2)), subtract=True),
    Concat((Dense(1), Gate("relu"))),
    Repeated(2),
    Repeated(2, shared=False),
]
WIDE = [  # At least two channels.
    Rewire("gather"),
    Rewire("slice"),
    Mix("top_k"),
    Mix("maxout"),
    Conv(2, size=1, groups=2),
]
SEVERAL_AXES = [
    Rewire("flatten"),
    Rewire("transpose"),
    *(Mix(kind, axis=0) for kind in ("mean", "sum", "max", "min", "sort")),
]
SEQUENCES = [Recurrent(2), Recurrent(1, every_state=True)]  # Exactly one axis before the last.
LONG = [  # At least two positions along every axis but the last.
    Conv(2),
    Conv(1, bias=True),
    Conv(2, stride=2, padding="SAME", bias=True),
    Conv(1, padding=(1, 2)),
    Conv(1, dilation=2, padding="SAME"),
    Conv(1, input_dilation=2, padding=(1, 1)),
    Pool("avg"),
    Pool("avg", stride=2, padding="SAME"),
    Pool("avg", stride=2, padding=(0, 1), count_padding=False),
    Pool("max"),
    Pool("max", stride=2, padding="SAME"),
    AdaptivePool(2),
]


def layers_for(shape):
    """The layers that fit activations of this shape."""
    choices = [Dense(2), Dense(3, bias=False), *ANY_SHAPE, *GATES]
    if shape[-1] >= 2:
        choices += WIDE if len(shape) > 1 and shape[-1] == 2 else WIDE[:-1]
    if len(shape) > 1:
        choices += SEVERAL_AXES + (SEQUENCES if len(shape) == 2 else [])
        if min(shape[:-1]) >= 2:
            choices += LONG
    return choices


SHAPES = [(3,), (4, 2), (3, 3, 1)]


@st.composite
def networks(draw, shape):
    """A network of a few layers, some with weights, with at most `MAX_PATHS` paths."""
    seed = draw(st.integers(0, 2**32 - 1))
    network = Network(shape, (), seed)
    for _ in range(draw(st.integers(2, 4))):
        layer = draw(st.sampled_from(layers_for(network.outputs.shape)))
        candidate = Network(shape, (*network.layers, layer), seed)
        if candidate.num_paths > MAX_PATHS:
            break
        network = candidate
    if not network.dag.weights or not any(ids.values() for ids in network.ids.values()):
        network = Network(shape, (*network.layers, Scale("parameter")), seed)
    return network


exponents = st.one_of(st.sampled_from([1.0, 2.0, 4.0]), st.floats(1.0, 4.0))
