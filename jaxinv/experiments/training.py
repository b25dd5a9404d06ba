"""What experiments do alike: load and check, train on minibatches, measure, go on from results.

A module per figure says what is trained, and what is measured; how, it asks for here.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxinv.errors import InvalidInput
from jaxinv.experiments import datasets
from jaxinv.experiments.report import Progress
from jaxinv.experiments.resuming import Store
from jaxinv.typing import Network, Params

# --- the driver -----------------------------------------------------------------------


class Running(NamedTuple):
    """A run that goes on, as :func:`jaxinv.experiments.resuming.compute` takes it."""

    progress: Progress  # called with the fraction done, and what is done next
    store: Store  # what holds the cells


C = TypeVar("C", contravariant=True)
R = TypeVar("R", covariant=True)


class Driver(Protocol[C, R]):
    """The function ``run`` of an experiment."""

    def __call__(self, config: C, progress: Progress = ..., store: Store | None = None) -> R:
        """Compute what ``store`` does not hold yet; by default it holds nothing but memory."""


def driver(experiment: Callable[[C, Running], R]) -> Driver[C, R]:
    """Make an experiment's ``run(config, progress, store)`` of what is its own.

    Args:
        experiment: (config, running) -> result.

    Returns:
        the function that the command calls: ``progress`` is called with the fraction done and
        what is done next, ``store`` holds the cells of earlier runs, by default none.

    >>> from jaxinv.experiments import resuming
    >>> @driver
    ... def run(config, running):
    ...     return resuming.compute({"powers": {"one": lambda: {"value": config**2}}}, *running)
    >>> run(3)
    {'powers': {'one': {'value': 9}}}
    """

    # Not the annotations: the arguments are others.
    @functools.wraps(experiment, ("__module__", "__name__", "__qualname__", "__doc__"))
    def run(
        config: C,
        progress: Progress = lambda fraction, what: None,
        store: Store | None = None,
    ) -> R:
        return experiment(config, Running(progress, Store() if store is None else store))

    # What help() shows, in place of the arguments of what is wrapped.
    run.__signature__ = inspect.signature(run, follow_wrapped=False)  # type: ignore[attr-defined]
    return run


# --- data -----------------------------------------------------------------------------


def images(
    directory: Path | None, batch_size: int, examples: int | None = None
) -> datasets.Dataset:
    """Load images to train on, and move them to the device.

    Args:
        directory: where they are, ``None`` for the bundled digits.
        batch_size: of the training.
        examples: of the training set, at most; by default all.

    Returns:
        the data.

    Raises:
        DataError: if they cannot be read.
        InvalidInput: if a batch is larger than the training set.

    >>> images(None, 100, 360).x_train.shape
    (360, 64)
    """
    data = datasets.load(directory)
    n = len(data.x_train) if examples is None else min(examples, len(data.x_train))
    if batch_size > n:
        those = f"({n} images of {data.name})" if examples is None else f"of {n} examples"
        raise InvalidInput(
            f"a batch of {batch_size} is larger than the training set {those}; choose a smaller "
            "--batch-size"
        )
    arrays = data.x_train[:n], data.y_train[:n], data.x_test, data.y_test
    x_train, y_train, x_test, y_test = map(jnp.asarray, arrays)
    return data._replace(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def shuffled(key: jax.Array, examples: int, batch_size: int) -> jax.Array:
    """Draw the minibatches of an epoch: (steps, batch_size) of 0, ..., examples − 1.

    What is left over after the last whole batch is not seen in this epoch.

    >>> sorted(shuffled(jax.random.key(0), 7, 3).ravel().tolist()) != list(range(6))
    True
    """
    steps = examples // batch_size
    order = jax.random.permutation(key, examples)[: steps * batch_size]
    return order.reshape(steps, batch_size)


# --- what is measured -----------------------------------------------------------------


def cross_entropy(fn: Network, params: Params, x: Any, y: Any) -> jax.Array:
    """Compute the mean cross-entropy of ``fn(params, x)``, logits, against labels ``y``."""
    return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()


def evaluate(fn: Network, params: Params, x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    """Compute the mean cross-entropy and the error rate.

    Logits that are not finite predict nothing, so their error rate is NaN
    rather than that of whatever class argmax happens to return.

    >>> logits = jnp.array([[2.0, 1.0], [jnp.nan, 0.0]])
    >>> [evaluate(lambda w, x: x, None, logits[:n], jnp.zeros(n, int))[1].item() for n in (1, 2)]
    [0.0, nan]
    """
    logits = fn(params, x)
    wrong = (logits.argmax(axis=-1) != y).astype(logits.dtype)
    wrong = jnp.where(jnp.isfinite(logits).all(axis=-1), wrong, jnp.nan)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), wrong.mean()


# --- training -------------------------------------------------------------------------


def descend(
    loss: Callable[[Params, Any], Any],
    optimizer: Any,
    params: Params,
    state: Any,
    minibatches: Any,
    *,
    length: int | None = None,
    extra: Callable[[Any], Mapping[str, Any]] = lambda minibatch: {},
) -> tuple[Params, Any, jax.Array]:
    """Take one step of the optimizer for each minibatch, in one scan.

    Args:
        loss: (params, minibatch) -> number.
        optimizer: an optax transformation.
        params: where to begin.
        state: of the optimizer.
        minibatches: pytree with a leading axis of steps; ``None`` where all steps see the same.
        length: the number of steps, where ``minibatches`` is ``None``.
        extra: (minibatch) -> what the optimizer takes besides.

    Returns:
        params, state, and the loss before each step, (steps,).

    >>> sgd, w = optax.sgd(0.25), jnp.array(1.0)
    >>> w, _, losses = descend(lambda w, _: w**2, sgd, w, sgd.init(w), None, length=3)
    >>> w.item(), losses.tolist()
    (0.125, [1.0, 0.25, 0.0625])
    """

    def step(carry: tuple[Params, Any], minibatch: Any) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, minibatch)
        updates, state = optimizer.update(gradient, state, params, **extra(minibatch))
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, state), minibatches, length)
    return params, state, losses


class Trained(NamedTuple):
    """What comes out of :func:`train`."""

    params: Params
    losses: list[jax.Array]  # of the minibatches, one array for each round
    measured: list[Any]  # before the first round, and after each
    seconds: list[float]  # of each round


def train(
    descend: Callable[[Params, Any, Any], tuple[Params, Any, jax.Array]],
    measure: Callable[[Params], Any],
    params: Params,
    state: Any,
    rounds: Iterable[Any],
    *,
    warm_up: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Trained:
    """Train round after round, and measure in between.

    Args:
        descend: (params, state, minibatches) -> (params, state, losses), compiled.
        measure: (params) -> whatever is to be known of them.
        params: where to begin.
        state: of the optimizer.
        rounds: the minibatches of each round, such as an epoch.
        warm_up: make the first call twice, so that no time of compilation is measured.
        clock: what measures the seconds; ``time.process_time`` counts those of all threads of this
            process, whatever else the machine does.

    Returns:
        the :class:`Trained`.
    """
    losses, measured, seconds = [], [measure(params)], []
    for minibatches in rounds:
        arguments = params, state, jax.block_until_ready(minibatches)
        if warm_up:
            jax.block_until_ready(descend(*arguments))
            warm_up = False
        begin = clock()
        params, state, loss = jax.block_until_ready(descend(*arguments))
        seconds.append(clock() - begin)
        losses.append(loss)
        measured.append(measure(params))
    return Trained(params, losses, measured, seconds)
