"""Timing for the benchmarks: interleaved, medians with spread, and where it was measured."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinv.experiments.files import write_json
from jaxinv.experiments.report import Table, environment, markdown, print_table

RESULTS = Path(__file__).parent / "results"


def interleaved_seconds(
    functions: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, np.ndarray]:
    """Time each function ``repeats`` times, in turn, so that drift of the machine hits all alike.

    Every other round runs in reverse order, so that none profits from always
    following another. The results are waited for. One round beforehand warms up.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            seconds[name].append(timed(functions[name])[0])
    return {name: np.array(values) for name, values in seconds.items()}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the result of ``function()`` is ready, and the result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - begin, result


def in_own_processes(
    script: str, names: Sequence[str], measure: Callable[[str], dict[str, Any]], title: str
) -> tuple[list[list[dict[str, Any]]], Path]:
    """Measure each name several times, each time in a process of its own, which runs ``script``.

    Reads the command line: which names, how often, and where to write. Returns the measurements
    of every name, and where to write.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("names", nargs="*", default=list(names))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=list(names), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        sys.exit()

    def once(name: str) -> dict[str, Any]:
        command = [sys.executable, script, "--one", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    return [[once(name) for _ in range(options.repeats)] for name in options.names], options.out


def median_and_spread(values: np.ndarray) -> dict[str, float]:
    """Return the median and the interquartile range."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "iqr": float(high - low)}


def spelled(values: np.ndarray, form: str = ".3g") -> str:
    """Spell median and interquartile range: ``1.05 (0.02)``."""
    summary = median_and_spread(values)
    return f"{summary['median']:{form}} ({summary['iqr']:.1g})"


def publish(name: str, table: Table, numbers: Mapping[str, Any], out: Path = RESULTS) -> None:
    """Print ``table`` and write it as Markdown, with ``numbers`` and the machine as JSON."""
    machine = environment()
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items())
    device = machine["device"] if machine["platform"] != "cpu" else machine["cpu"]
    where = f"On {device} ({machine['cpu_cores']} CPU cores), {versions}."
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{machine['platform']}"
    write_json(out / f"{stem}.json", {"environment": machine, **numbers})
    (out / f"{stem}.md").write_text(f"{markdown(table)}\n\n{where}\n", encoding="utf-8")
    print_table(table)
    print(where)
