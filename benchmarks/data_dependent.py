"""What a step of data-dependent Path-SGD costs next to one of SGD and to per-example gradients.

    python benchmarks/data_dependent.py

κ needs squares of the gradients of every example. For layers they are taken from the factors of the
gradients; the last row makes these gradients, all at once by vmap, and sums their squares.
"""

import argparse
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import RESULTS, interleaved_seconds, median_and_spread, publish, spelled
from step_time import Task, cross_entropy, mlp_task, training_loop

from jaxinv.experiments.report import Table
from jaxinv.optimizers import data_dependent_path_sgd

RATES = {"SGD": 0.01, "data-dependent Path-SGD": 0.003, "gradient per example": 0.01}


class SmallCNN(nn.Module):
    """Two convolutions, pooling, two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def cnn_task(size: int = 28, batch: int = 100) -> Task:
    model = SmallCNN()
    x = jax.random.normal(jax.random.key(1), (batch, size, size, 1))
    y = jnp.arange(batch) % 10
    params = model.init(jax.random.key(0), x[:1])

    def loss(params, stats, x, y):
        return cross_entropy(model.apply(params, x), y), stats

    return Task(f"CNN, {size}×{size}, batch {batch}", model.apply, loss, params, {}, x, y)


def per_example(task: Task) -> optax.GradientTransformation:
    """SGD, with the squares of all gradients of examples worked out and all but not used."""

    def one(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return task.loss(params, task.stats, x[None], y[None])[0]

    def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
        slopes = jax.vmap(jax.grad(one), (None, 0, 0))(params, task.x, task.y)
        return jax.tree.map(
            lambda g, s: -0.01 * g - 1e-20 * (s**2).mean(0), gradient, slopes
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def compare(task: Task, steps: int, repeats: int) -> dict[str, Any]:
    tx = data_dependent_path_sgd(RATES["data-dependent Path-SGD"], task.fn, alpha=0.5)
    optimizers = {
        "SGD": optax.sgd(RATES["SGD"]),
        "data-dependent Path-SGD": optax.GradientTransformation(
            tx.init, lambda g, state, params: tx.update(g, state, params, batch=task.x)
        ),
        "gradient per example": per_example(task),
    }
    loops = {name: training_loop(task, opt, steps) for name, opt in optimizers.items()}
    losses = {name: np.asarray(loop()[1]) for name, loop in loops.items()}
    seconds = interleaved_seconds(loops, repeats)
    ratios = {name: s / seconds["SGD"] for name, s in seconds.items()}
    return {
        "task": task.name,
        "steps_per_timing": steps,
        "seconds_per_step": {name: s / steps for name, s in seconds.items()},
        "losses": losses,
        "ratios": ratios,
        "summaries": {name: median_and_spread(r) for name, r in ratios.items()},
    }


def to_table(comparisons: list[dict[str, Any]]) -> Table:
    rows = [
        [
            c["task"],
            name,
            spelled(1e3 * s),
            spelled(c["ratios"][name]),
            f"{c['losses'][name][-1]:.4f}",
        ]
        for c in comparisons
        for name, s in c["seconds_per_step"].items()
    ]
    columns = ["network", "optimizer", "ms/step", "÷ SGD", "last loss"]
    return Table("Data-dependent steps, median (interquartile range)", columns, rows)


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15 if on_cpu else 30, help="rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    arguments = parser.parse_args()
    comparisons = [
        compare(mlp_task((784, 512, 512, 10)), 20 if on_cpu else 100, arguments.repeats),
        compare(cnn_task(), 4 if on_cpu else 100, arguments.repeats),
    ]
    results = {"comparisons": comparisons}
    publish("data_dependent", to_table(comparisons), results, arguments.out)


if __name__ == "__main__":
    main()
