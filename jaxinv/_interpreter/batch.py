"""The batch, decided once: which axis of `x` counts examples, and whether `fn` keeps them apart.

Every public function comes through `traced_network`. It traces `fn` as it is now, on a batch of one
and on a batch of a prime number of examples, and follows that axis through the second program (see
`batch_domain`). Where examples are apart the program for one example is all that is needed. Where
they are not, path sums are refused and Jacobians take the batch whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxinv._checks import abstract_batch_of_one, check_inputs, check_network
from jaxinv._interpreter.batch_domain import BatchDomain, RecordingDomain
from jaxinv._interpreter.batch_values import Apart, Place, Shared, Single, refusal
from jaxinv._interpreter.mistakes import (
    ANY_SIZE,
    IN_FLOAT64,
    check_outputs,
    looks_like_a_loss,
    noting_a_loss,
    raise_mistake,
)
from jaxinv._interpreter.program import Program, all_lengths, program
from jaxinv._interpreter.walk import (
    Domain,
    Operand,
    V,
    Value,
    aval_of,
    interpret,
    is_concrete,
    open_jaxpr,
    output_equation,
)
from jaxinv._numerics.varying import varies
from jaxinv.errors import InvalidInput, JaxinvError, UnsupportedOperation
from jaxinv.typing import Array, ArrayLike, Constant, Inputs, Network, Params, PyTree


class TracedNetwork:
    """`fn(params, x)` as programs, with the batch axis of x and of the outputs in front.

    `one` is the program for a batch of one; `whole` the one for the given batch, where examples
    are not apart. Equal for equal programs, so that jitted code may take it as static.
    """

    __slots__ = ("one", "whole", "error", "fn")

    def __init__(
        self, fn: Network, one: Program | None, whole: Program | None, error: Exception | None
    ):
        self.fn, self.one, self.whole, self.error = fn, one, whole, error

    @property
    def apart(self) -> bool:
        """Whether each example is treated by itself."""
        return self.error is None

    @property
    def program(self) -> Program:
        """The program for one example, or for the whole batch where that is all there is."""
        found = self.one if self.apart or self.whole is None else self.whole
        assert found is not None
        return found

    def interpret(
        self, params: Sequence[Value], inputs: Sequence[Value], domain: Domain[V]
    ) -> list[V]:
        """Values of the outputs for one example; refused where examples are not apart."""
        try:
            outputs = interpret(self.program.trace, params, inputs, domain)
        except JaxinvError:
            if self.error is not None and looks_like_a_loss(self.program.outputs):
                raise self.error from None
            raise  # what the domain refuses it refuses more to the point
        except Exception:
            # On a batch of one a function that mixes examples may be nonsense (an empty slice).
            if self.error is None:
                raise
            raise self.error from None
        if self.error is not None:
            raise self.error
        return outputs

    def __call__(self, params: Params, x: Inputs) -> PyTree:
        if varies(params, x):
            # Inside of shard_map: programs are traced on shapes, which do not vary over devices.
            return self.fn(params, x)
        if not self.apart:
            assert self.whole is not None
            return self.whole(params, x)
        one = self.one
        assert one is not None
        if all(jnp.shape(leaf)[0] == 1 for leaf in jax.tree.leaves(x)):
            return one(params, x)

        def single(example: Inputs) -> PyTree:
            y = one(params, jax.tree.map(lambda a: a[None], example))
            return jax.tree.map(lambda a: a[0], y)

        return jax.vmap(single)(x)

    def __hash__(self) -> int:
        return hash((self.one, self.whole))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TracedNetwork):
            return NotImplemented
        same = (self.one, self.apart) == (other.one, other.apart)
        return same and self.whole == other.whole


# --- the axis ------------------------------------------------------------------------


def _check_axis(batch_axis: object) -> None:
    whole = isinstance(batch_axis, int) and not isinstance(batch_axis, bool) and batch_axis >= 0
    if batch_axis is not None and not whole:
        raise InvalidInput(
            f"batch_axis must be an integer >= 0, or None if x is one input, not {batch_axis!r}."
        )


def leading(x: Inputs, batch_axis: int | None) -> Inputs:
    """x with its batch axis in front; shapes without values stay shapes."""
    _check_axis(batch_axis)
    if batch_axis == 0:
        return x

    def move(leaf: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
        shape = list(jnp.shape(leaf))
        if batch_axis is None:
            shape.insert(0, 1)
        else:
            if not 0 <= batch_axis < len(shape):
                raise InvalidInput(
                    f"batch_axis is {batch_axis}, but an input has shape {tuple(shape)}: every "
                    "input needs that axis, counted from 0."
                )
            shape.insert(0, shape.pop(batch_axis))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, leaf.dtype)
        return leaf[None] if batch_axis is None else jnp.moveaxis(leaf, batch_axis, 0)

    return jax.tree.map(move, x)


def _as_given(x: Inputs, batch_axis: int | None) -> Inputs:
    """The inverse of `leading`, on arrays."""
    if batch_axis is None:
        return jax.tree.map(lambda a: a[0], x)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, batch_axis), x) if batch_axis else x


def with_leading_inputs(fn: Network, batch_axis: int | None) -> Network:
    """`fn` for inputs as `leading` gives them; the batch axis of outputs stays where it is."""

    def canonical(params: Params, x: Inputs) -> PyTree:
        y = fn(params, _as_given(x, batch_axis))
        return jax.tree.map(lambda a: jnp.asarray(a)[None], y) if batch_axis is None else y

    return canonical


def batch_first(fn: Network, batch_axis: int | None) -> Network:
    """The same network for inputs with the batch axis in front, for functions without that option.

    Args:
        fn: a network that takes inputs whose axis `batch_axis` counts examples and gives outputs
            with examples on that axis; or, for None, one that takes one input and gives one output.
        batch_axis: that axis, or None.

    Returns:
        `fn(params, x)` for x with a leading batch axis, of length one if `batch_axis` is None.

    Raises:
        InvalidInput: if batch_axis is neither None nor an integer >= 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import batch_first, path_sgd
        >>> graph = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> net = batch_first(lambda w, x: graph @ x @ w, None)  # x is one graph of two nodes
        >>> x = jnp.ones((2, 3))
        >>> net(jnp.ones((3, 4)), x[None]).shape
        (1, 2, 4)
        >>> optimizer = path_sgd(0.1, net, x[None])
    """
    _check_axis(batch_axis)
    check_network(fn)

    canonical = with_leading_inputs(fn, batch_axis)
    if batch_axis is None:
        return canonical

    def first(params: Params, x: Inputs) -> PyTree:
        return jax.tree.map(lambda a: jnp.moveaxis(a, batch_axis, 0), canonical(params, x))

    return first


# --- tracing -------------------------------------------------------------------------


def traced_network(
    fn: Network,
    params: Params,
    x: Inputs,
    batch_axis: int | None = 0,
    *,
    whole: bool = True,
    least: int = 1,
) -> TracedNetwork:
    """Trace `fn` and decide whether it treats examples apart.

    Args:
        fn: the user's function, or a `TracedNetwork`, which is returned as it is.
        params: checked parameters.
        x: arrays or shapes with the batch axis in front (see `leading`).
        batch_axis: where that axis is in what `fn` takes; None if `fn` takes one input.
        whole: also trace the batch as given where examples are not apart.
        least: on at least so many examples, for what looks at shapes alone: in a batch of one
            everything is equal to its mean.

    Raises:
        InvalidInput: if `fn` raises on that batch.
    """
    if isinstance(fn, TracedNetwork):
        return fn
    check_network(fn)
    check_inputs(x, values=False)

    canonical = with_leading_inputs(fn, batch_axis)
    one = abstract_batch_of_one(x)
    if batch_axis is None:
        alone = program(canonical, params, one, remedy=IN_FLOAT64)
        check_outputs(alone.outputs)
        return TracedNetwork(canonical, alone, None, None)
    try:
        alone = program(canonical, params, one, remedy=ANY_SIZE)
    except InvalidInput as error:
        if batch_axis == 0:
            raise_mistake(error, fn, params, x)
        if not whole:
            raise
        return TracedNetwork(canonical, None, _whole(canonical, params, x, least), error)
    check_outputs(alone.outputs)
    try:
        axes = _axes_of_outputs(alone, canonical, params, one)
    except (UnsupportedOperation, InvalidInput) as error:
        given = _whole(canonical, params, x, least) if whole else None
        return TracedNetwork(canonical, alone, given, noting_a_loss(error, alone.outputs))
    if not any(axes):
        return TracedNetwork(canonical, alone, None, None)

    def in_front(network: Network) -> Network:
        def moved(params: Params, x: Inputs) -> PyTree:
            y, tree = jax.tree.flatten(network(params, x))
            arrays = [jnp.moveaxis(a, axis, 0) for a, axis in zip(y, axes, strict=True)]
            return jax.tree.unflatten(tree, arrays)

        return moved

    return TracedNetwork(in_front(canonical), program(in_front(alone), params, one), None, None)


def _whole(fn: Network, params: Params, x: Inputs, least: int) -> Program:
    def shapes(least: int) -> Inputs:
        def one(a: Constant | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            count, *rest = jnp.shape(a)
            dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(a))
            return jax.ShapeDtypeStruct((max(count, least), *rest), dtype)

        return jax.tree.map(one, x)

    given = min(jnp.shape(leaf)[0] for leaf in jax.tree.leaves(x))
    if given < least:
        try:
            return program(fn, params, shapes(least))
        except InvalidInput:
            pass  # it takes batches of this size alone
    return program(fn, params, shapes(1), remedy=IN_FLOAT64)


def _prime_foreign_to(lengths: set[int]) -> int:
    """A small prime that divides none of the given lengths."""
    candidate = 5
    while any(n and n % candidate == 0 for n in lengths) or any(
        candidate % k == 0 for k in range(2, int(candidate**0.5) + 1)
    ):
        candidate += 2
    return candidate


def _axes_of_outputs(alone: Program, fn: Network, params: Params, x: Inputs) -> list[int]:
    """The batch axis of every output; raises unless `fn` is known to treat each example apart."""
    size = _prime_foreign_to(all_lengths(alone.trace.jaxpr))
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct((size, *s.shape[1:]), s.dtype), x)
    many, one = program(fn, params, batch, remedy=ANY_SIZE).trace, alone.trace
    domain = BatchDomain(size)
    weights = [Shared(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
    inputs = [Apart(s.shape, Place(0)) for s in jax.tree.leaves(batch)]

    def constant(value: ArrayLike) -> Operand:
        shape = jnp.shape(value)
        return value if is_concrete(value) else Shared(shape, not domain.many(shape))

    outputs = interpret(many, weights, inputs, domain, constant=constant)
    last = output_equation(many)
    axes = []
    for value, aval in zip(outputs, last.outputs, strict=True):
        if isinstance(value, Apart):
            if (value.place.outer, value.place.inner) != (1, 1):
                raise refusal(last, "an output merges the batch axis with others")
            axes.append(value.place.axis)
        elif domain.uniform(value) and aval.shape[:1] == (size,):
            axes.append(0)
        else:
            raise refusal(last, "an output has no batch axis")
    recording = RecordingDomain()
    arrays = [Single(aval_of(v).shape) for v in open_jaxpr(one.jaxpr)[0].invars]
    interpret(
        one,
        arrays[: one.num_params],
        arrays[one.num_params :],
        recording,
        constant=lambda value: value if is_concrete(value) else Single(jnp.shape(value)),
    )
    for key, eqn in domain.records.found.items():
        if key not in recording.records.found:
            raise refusal(eqn, "its constant changes with the size of the batch")
    return axes


__all__ = ["TracedNetwork", "batch_first", "leading", "traced_network", "with_leading_inputs"]
