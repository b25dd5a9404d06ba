"""What κ of ResNet-18 and ResNet-50 at 224×224 costs: to trace, to compile, to run.

    python benchmarks/kappa_resnet.py

κ needs one forward and one backward pass on a batch of one, whatever the
training batch, so the last column is such a pass of the network itself.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import RESULTS, interleaved_seconds, median_and_spread, publish, spelled, timed
from resnet import ResNet18, ResNet50

from jaxinv.experiments.report import Table
from jaxinv.paths import log_path_norm, path_kappa


def measure(name: str, model: Any, size: int, repeats: int) -> dict[str, Any]:
    """Measure κ of one model on one image of ``size``×``size``×3."""
    x = jax.random.normal(jax.random.key(1), (1, size, size, 3))
    variables = jax.jit(lambda key: model.init(key, x, False))(jax.random.key(0))
    params, stats = variables["params"], variables["batch_stats"]

    def fn(params, x):
        return model.apply({"params": params, "batch_stats": stats}, x, False)

    def kappa(params):
        return path_kappa(fn, params, x)

    # Batch norm with fixed statistics, as κ sees it, so that both compute like with like.
    gradient = jax.jit(jax.grad(lambda params, x: fn(params, x).sum()))
    trace_seconds, traced = timed(lambda: jax.jit(kappa).trace(params))
    compile_seconds, compiled = timed(lambda: traced.lower().compile())
    seconds = interleaved_seconds(
        {"kappa": lambda: compiled(params), "gradient": lambda: gradient(params, x)}, repeats
    )
    leaves = jax.tree.leaves(compiled(params))
    return {
        "model": name,
        "parameters": sum(leaf.size for leaf in leaves),
        "trace_seconds": trace_seconds,
        "compile_seconds": compile_seconds,
        "run_seconds": seconds["kappa"],
        "gradient_seconds": seconds["gradient"],
        "run_summary": median_and_spread(seconds["kappa"]),
        "log_path_norm": float(log_path_norm(fn, params, x)),
        "all_finite": bool(np.all([jnp.isfinite(leaf).all() for leaf in leaves])),
    }


def to_table(measured: list[dict[str, Any]]) -> Table:
    rows = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['trace_seconds']:.2f}",
            f"{row['compile_seconds']:.1f}",
            spelled(1e3 * row["run_seconds"]),
            spelled(1e3 * row["gradient_seconds"]),
            f"{row['log_path_norm']:.2f}",
        ]
        for row in measured
    ]
    columns = ["model", "params", "trace s", "compile s", "run ms", "gradient ms", "log γ₂"]
    return Table("κ on one image, 224×224; run times: median (interquartile range)", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    arguments = parser.parse_args()
    models = {"ResNet-18": ResNet18(num_classes=1000), "ResNet-50": ResNet50(num_classes=1000)}
    measured = [measure(name, model, 224, arguments.repeats) for name, model in models.items()]
    publish("kappa_resnet", to_table(measured), {"models": measured}, arguments.out)


if __name__ == "__main__":
    main()
