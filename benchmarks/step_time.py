"""What a step of Path-SGD costs next to one of SGD, in the same jitted training loop.

    python benchmarks/step_time.py

For a fully connected network and a ResNet-18 with batch norm. The two loops
differ in the optax transformation alone and are timed in turn; the ratio is the
median over pairs of neighbouring timings. The losses show that both train.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import RESULTS, interleaved_seconds, median_and_spread, publish, spelled
from resnet import ResNet18

from jaxinv.experiments.report import Table
from jaxinv.networks import init_mlp, mlp
from jaxinv.optimizers import path_sgd

# With these both learn their one random minibatch in the few steps that are timed.
LEARNING_RATES = {"SGD": 0.01, "Path-SGD": 0.0003}


class Task(NamedTuple):
    """A network in training."""

    name: str
    fn: Callable[[Any, jax.Array], jax.Array]  # deterministic: its paths are what κ counts
    # (params, stats, x, y) -> (loss, stats), stats being the running ones of batch norm
    loss: Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    params: Any
    stats: Any
    x: jax.Array
    y: jax.Array


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def mlp_task(sizes: tuple[int, ...] = (784, 4000, 4000, 10), batch: int = 100) -> Task:
    def loss(params, stats, x, y):
        return cross_entropy(mlp(params, x), y), stats

    params = init_mlp(jax.random.key(0), sizes)
    x, y = _batch((batch, sizes[0]), sizes[-1])
    return Task(f"MLP {'-'.join(map(str, sizes))}, batch {batch}", mlp, loss, params, {}, x, y)


def resnet_task(model: Any = None, name: str = "ResNet-18", size: int = 32, batch: int = 128):
    model = model or ResNet18(num_classes=10, small_inputs=True)
    x, y = _batch((batch, size, size, 3), 10)
    variables = model.init(jax.random.key(0), x[:1], False)
    frozen = variables["batch_stats"]

    def loss(params, stats, x, y):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = model.apply(variables, x, True, mutable=["batch_stats"])
        return cross_entropy(logits, y), updated["batch_stats"]

    def fn(params, x):
        # Batch norm in training mode is no path network; with fixed statistics it is a scale.
        return model.apply({"params": params, "batch_stats": frozen}, x, False)

    title = f"{name}, {size}×{size}×3, batch {batch}"
    return Task(title, fn, loss, variables["params"], frozen, x, y)


def _batch(shape: tuple[int, ...], num_classes: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), shape)
    return x, jnp.arange(shape[0]) % num_classes


def training_loop(task: Task, optimizer: Any, steps: int) -> Callable[[], Any]:
    """Return a function without arguments that runs ``steps`` steps from the start each time."""

    @jax.jit
    def loop(params, stats, state, x, y):
        def step(carry, _):
            params, stats, state = carry
            gradient_fn = jax.value_and_grad(task.loss, has_aux=True)
            (loss, stats), gradient = gradient_fn(params, stats, x, y)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), stats, state), loss

        # The parameters are returned too: what is not needed would not be computed.
        carry = params, stats, state
        if jax.default_backend() != "cpu":
            return jax.lax.scan(step, carry, length=steps)
        # On a CPU, XLA computes the gradient of a convolution inside a scan, even one of a single
        # step, by a kernel some 30 times slower than outside. Spelled out, both optimizers get
        # the fast one.
        losses = []
        for _ in range(steps):
            carry, loss = step(carry, None)
            losses.append(loss)
        return carry, jnp.stack(losses)

    state = optimizer.init(task.params)
    return lambda: loop(task.params, task.stats, state, task.x, task.y)


def compare(task: Task, steps: int, repeats: int) -> dict[str, Any]:
    """Time both loops; return seconds per step, losses and the paired ratio."""
    optimizers = {
        "SGD": optax.sgd(LEARNING_RATES["SGD"]),
        "Path-SGD": path_sgd(LEARNING_RATES["Path-SGD"], task.fn, task.x),
    }
    loops = {name: training_loop(task, opt, steps) for name, opt in optimizers.items()}
    losses = {name: np.asarray(loop()[1]) for name, loop in loops.items()}
    seconds = interleaved_seconds(loops, repeats)
    return {
        "task": task.name,
        "steps_per_timing": steps,
        "seconds_per_step": {name: values / steps for name, values in seconds.items()},
        "losses": losses,
        "ratio": seconds["Path-SGD"] / seconds["SGD"],
        "ratio_summary": median_and_spread(seconds["Path-SGD"] / seconds["SGD"]),
    }


def to_table(comparisons: list[dict[str, Any]]) -> Table:
    rows = []
    for comparison in comparisons:
        for name, seconds in comparison["seconds_per_step"].items():
            loss = comparison["losses"][name]
            ratio = spelled(comparison["ratio"]) if name == "Path-SGD" else "1"
            milliseconds = spelled(1e3 * seconds)
            rows.append([comparison["task"], name, milliseconds, ratio, f"{loss[-1]:.4f}"])
    columns = ["network", "optimizer", "ms/step", "÷ SGD", "last loss"]
    return Table("Step time, median (interquartile range)", columns, rows)


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=15 if on_cpu else 30, help="pairs (half for ResNet-18)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    arguments = parser.parse_args()
    # A timing should last long enough to be exact; a step of ResNet-18 on a CPU takes seconds.
    comparisons = [
        compare(mlp_task(), 5 if on_cpu else 100, arguments.repeats),
        compare(resnet_task(), 2 if on_cpu else 20, max(1, arguments.repeats // 2)),
    ]
    publish("step_time", to_table(comparisons), {"comparisons": comparisons}, arguments.out)


if __name__ == "__main__":
    main()
