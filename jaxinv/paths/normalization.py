"""A network with its hidden units normalised by statistics of the data and by their paths."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxinv._interpreter.walk import Equation
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.paths.data_dependent import Problem, interpret, prepare, squares
from jaxinv.paths.data_domain import Data, DataDomain, DataOperand
from jaxinv.paths.domain import PathDomain
from jaxinv.paths.values import Paths, Weight
from jaxinv.typing import Array, ArrayLike, Inputs, Network, Outputs, Params

Moments = tuple[Array, Array]  # mean and variance of the units of a layer


def normalized_outputs(
    fn: Network,
    params: Params,
    x: Inputs,
    alpha: float,
    centered: bool,
    eps: float,
    given: Sequence[Moments] | None,
) -> tuple[Outputs, list[Moments]]:
    """fn(params, x) with hidden layers divided by (wᵀRw)^{1/2}, and the moments of these layers.

    `given` moments take the place of those of the batch.
    """
    problem = prepare(fn, params, x)
    lengths = squares(problem)
    path = PathDomain(2.0, problem.dtype, edges_only=False)
    hidden = _hidden_layers(problem, lengths, path)
    if given is not None and len(given) != len(hidden):
        raise InvalidInput(
            f"{len(given)} statistics are given for {len(hidden)} normalised layers. Pass what "
            "statistics(params, x) of the same network returns."
        )
    domain = _NormalizingDomain(path, hidden, alpha, centered, eps, given)
    outputs = interpret(problem, problem.leaves, lengths, domain)
    count = len(problem.inputs[0])
    arrays = [_batched(v, count) for v in outputs]
    tree = problem.network.program.trace.output_tree
    return jax.tree.unflatten(tree, arrays), domain.statistics


def _batched(value: Data | Weight | ArrayLike, count: int) -> ArrayLike:
    """An output for all examples, from (n, 1, ...) or from a value that is the same for all."""
    if isinstance(value, Data):
        shape = value.array.shape
        if len(shape) < 2 or shape[1] != 1:
            raise InvalidInput(
                f"fn's output has shape {shape[1:]} for one example, so it has no leading batch "
                "axis. Return (batch, ...) outputs."
            )
        return value.array[:, 0]
    array = jnp.asarray(value.value if isinstance(value, Weight) else value)
    return jnp.broadcast_to(array, (count, *array.shape[1:]))


# --- which layers, and along which axes -----------------------------------------------


def _channels(eqn: Equation, weight_first: bool) -> tuple[int, ...]:
    """The axes of a layer's output that number its units: those that come from the weights."""
    if eqn.name == "conv_general_dilated":
        return (eqn.params["dimension_numbers"].out_spec[1],)
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    ranks = [len(a.shape) for a in eqn.inputs]
    free_left = ranks[0] - len(left) - len(left_batch)
    batch = range(len(left_batch))
    start = len(left_batch)
    if weight_first:
        return (*batch, *range(start, start + free_left))
    return (*batch, *range(start + free_left, len(eqn.outputs[0].shape)))


def _weight_position(inputs: Sequence[DataOperand]) -> int | None:
    """Which operand of a product holds parameters; None for a constant matrix."""
    found = [i for i, v in enumerate(inputs) if isinstance(v, Weight)]
    return found[0] if found else None


class _LayerDomain(DataDomain):
    """Numbers the layers, and notes which of them reach anything but sums on their way out."""

    def __init__(self, path: PathDomain):
        super().__init__(path)
        self.count = 0
        self.hidden: set[int] = set()

    def consumed(self, value: Data) -> None:
        """A gate, a maximum or a layer uses the value."""
        self.hidden |= value.layers

    def product(self, eqn: Equation, inputs: Sequence[DataOperand], out: Data) -> Data:
        if _weight_position(inputs) is not None:
            out.layers = frozenset([self.count])
            self.count += 1
        return out


def _hidden_layers(problem: Problem, lengths: list[Scaled], path: PathDomain) -> list[int]:
    domain = _LayerDomain(path)

    def record() -> int:
        interpret(problem, problem.leaves, lengths, domain)
        return 0

    jax.eval_shape(record)
    return sorted(domain.hidden)


class _NormalizingDomain(_LayerDomain):
    """Divides the output of every hidden layer by (wᵀRw)^{1/2}."""

    def __init__(
        self,
        path: PathDomain,
        layers: list[int],
        alpha: float,
        centered: bool,
        eps: float,
        given: Sequence[Moments] | None,
    ):
        super().__init__(path)
        self.layers, self.alpha, self.centered, self.eps = layers, alpha, centered, eps
        self.given = given
        self.statistics: list[Moments] = []

    def product(self, eqn: Equation, inputs: Sequence[DataOperand], out: Data) -> Data:
        position, index = _weight_position(inputs), self.count
        out = super().product(eqn, inputs, out)
        if position is None or index not in self.layers:
            return out
        assert isinstance(out.path, Paths)
        channels = _channels(eqn, weight_first=position == 0)
        pooled = [a for a in range(len(eqn.outputs[0].shape)) if a not in channels]
        found = self._found(out.array, channels, pooled, len(self.statistics))
        self.statistics.append(found)
        paths = scaled.value(out.path.sums).mean(axis=pooled, keepdims=True)
        kept = [1 if a in pooled else n for a, n in enumerate(eqn.outputs[0].shape)]
        mean, variance = (jnp.asarray(a, paths.dtype).reshape(kept) for a in found)
        squared = self.alpha * variance + (1 - self.alpha) * paths + self.eps
        # A unit that is constant over the batch, and eps = 0, is 0 rather than 0/0.
        factor = jnp.where(squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)
        array = (out.array - mean.astype(out.array.dtype)) * factor.astype(out.array.dtype)
        ones = Scaled(jnp.ones_like(out.path.sums.mantissa), jnp.zeros((), jnp.int32))
        normalized = Data(Paths(ones), array, out.open)
        normalized.layers = out.layers
        return normalized

    def _found(
        self, array: Array, channels: Sequence[int], pooled: Sequence[int], index: int
    ) -> Moments:
        units = tuple(array.shape[a + 1] for a in channels)
        if self.given is not None:
            mean, variance = self.given[index]
            if jnp.shape(mean) != units or jnp.shape(variance) != units:
                raise InvalidInput(
                    f"statistics[{index}] has shapes {jnp.shape(mean)} and "
                    f"{jnp.shape(variance)}, but the layer has units of shape {units}."
                )
            return mean, variance
        axes = (0, *(a + 1 for a in pooled))
        mean = array.mean(axis=axes) if self.centered else jnp.zeros(units, array.dtype)
        shape = [1, *(1 if a in pooled else n for a, n in enumerate(array.shape[1:]))]
        variance = ((array - mean.reshape(shape)) ** 2).mean(axis=axes)
        return mean, variance
