"""How time and memory grow with width, depth and the number of inputs.

    python benchmarks/growth.py

κ and the certified rank of a fully connected network; memory is what the compiled program holds
beside its arguments, as the compiler plans it. The exponent b of cost ∝ size^b is fitted to the
three largest sizes of each curve. κ needs a batch of one whatever the number of inputs; the
certificate needs JᵀJ, quadratic in the number of parameters, however many inputs.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _measure import RESULTS, interleaved_seconds, median_and_spread, publish, spelled

from jaxinv import jacobian_rank, networks
from jaxinv._extras import require
from jaxinv.experiments.report import Table, environment
from jaxinv.paths import path_kappa


class Curve(NamedTuple):
    """Cost of one program against one size."""

    program: str
    against: str
    sizes: tuple[int, ...]
    seconds: list[np.ndarray]  # per size, the timings
    bytes: list[int]  # per size, results and temporaries


def kappa(width: int, depth: int, inputs: int) -> Any:
    params = networks.init_mlp(jax.random.key(0), (width,) * (depth + 1))
    x = jnp.ones((inputs, width))
    return jax.jit(lambda w, x: path_kappa(networks.mlp, w, x)), (params, x)


def rank(width: int, depth: int, inputs: int) -> Any:
    params = networks.init_mlp(jax.random.key(0), (width,) * (depth + 1))
    x = jax.random.normal(jax.random.key(1), (inputs, width))
    function = lambda w, x: jacobian_rank(networks.mlp, w, x, method="certificate")  # noqa: E731
    return jax.jit(function), (params, x)


PROGRAMS = {"κ": kappa, "rank": rank}
# (program, axis): the sizes along it, and what is held fixed.
SWEEPS = {
    ("κ", "width"): ((256, 512, 1024, 2048, 4096), {"depth": 4, "inputs": 64}),
    ("κ", "depth"): ((4, 8, 16, 32, 64), {"width": 512, "inputs": 64}),
    ("κ", "inputs"): ((16, 64, 256, 1024, 4096), {"width": 1024, "depth": 4}),
    ("rank", "width"): ((8, 12, 16, 24, 32), {"depth": 2, "inputs": 256}),
    ("rank", "depth"): ((2, 3, 4, 6, 8), {"width": 12, "inputs": 256}),
    ("rank", "inputs"): ((128, 256, 512, 1024, 2048), {"width": 16, "depth": 2}),
}


def measure(program: str, axis: str, sizes: tuple, fixed: dict, repeats: int) -> Curve:
    calls, planned = {}, []
    for size in sizes:
        function, arguments = PROGRAMS[program](**{axis: size}, **fixed)
        compiled = function.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        planned.append(memory.output_size_in_bytes + memory.temp_size_in_bytes)
        calls[size] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
    seconds = interleaved_seconds(calls, repeats)
    return Curve(program, axis, sizes, [seconds[s] for s in sizes], planned)


def exponent(sizes: Any, costs: Any) -> float:
    """b of cost ∝ size^b, by least squares on the logarithms of the three largest sizes."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(np.maximum(costs[-3:], 1e-12)), 1)[0])


def exponents(curve: Curve) -> tuple[float, float]:
    medians = [float(np.median(s)) for s in curve.seconds]
    return exponent(curve.sizes, medians), exponent(curve.sizes, curve.bytes)


def to_table(curves: list[Curve]) -> Table:
    rows = []
    for curve in curves:
        for size, seconds, planned in zip(curve.sizes, curve.seconds, curve.bytes, strict=True):
            row = [curve.program, curve.against, str(size), spelled(1e3 * seconds)]
            rows.append([*row, f"{planned / 1e6:.3g}"])
        of_time, of_memory = exponents(curve)
        fitted = ["exponent", f"{of_time:.2f}", f"{of_memory:.2f}"]
        rows.append([curve.program, curve.against, *fitted])
    columns = ["program", "against", "size", "ms", "MB planned"]
    return Table("Growth: median (interquartile range)", columns, rows)


def plot(curves: list[Curve], path: Path) -> None:
    figures = require("matplotlib.figure", "cli")
    figure = figures.Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col")
    columns = {"width": 0, "depth": 1, "inputs": 2}
    for curve in curves:
        of_time, of_memory = exponents(curve)
        top, bottom = axes[:, columns[curve.against]]
        low, median, high = np.percentile(curve.seconds, [25, 50, 75], axis=1) * 1e3
        (line,) = top.plot(curve.sizes, median, "o-", label=f"{curve.program} ∝ size^{of_time:.1f}")
        top.fill_between(curve.sizes, low, high, alpha=0.25, color=line.get_color())
        label = f"{curve.program} ∝ size^{of_memory:.1f}"
        bottom.plot(curve.sizes, np.array(curve.bytes) / 1e6, "o-", label=label)
    for name, column in columns.items():
        for ax in axes[:, column]:
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
            if ax.lines:
                ax.legend(fontsize=8)
        axes[1, column].set_xlabel({"inputs": "number of inputs"}.get(name, name))
    axes[0, 0].set_ylabel("time (ms)")
    axes[1, 0].set_ylabel("planned memory (MB)")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="timings of each point")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    arguments = parser.parse_args()
    curves = [
        measure(*of_what, sizes, fixed, arguments.repeats)
        for of_what, (sizes, fixed) in SWEEPS.items()
    ]
    numbers = [
        {
            **c._asdict(),
            "exponents": exponents(c),
            "medians": list(map(median_and_spread, c.seconds)),
        }
        for c in curves
    ]
    publish("growth", to_table(curves), {"curves": numbers}, arguments.out)
    plot(curves, arguments.out / f"growth-{environment()['platform']}.png")


if __name__ == "__main__":
    main()
