"""Time and memory of a proven number of degrees of freedom against the number of parameters.

    python benchmarks/functional_dimension.py

Boundaries of gates (`functional_dimension` on all inputs) beside the dense certificate
(`jacobian_rank(method="certificate")` on normal inputs, twice as many rows as parameters), each in
a process of its own, compilation included. The certificate is run where JᵀJ and its factor fit.
Networks that are not named keep what was measured before.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from _measure import RESULTS, publish

from jaxinv import functional_dimension, jacobian_rank, networks
from jaxinv.experiments.report import Table, environment
from jaxinv.gates import everywhere

# 784-1024-1024-10 takes half an hour: --networks 784-1024-1024-10.
NETWORKS = ("64-32-32-10", "64-64-64-10", "784-30-30-30-10", "cnn-8", "784-256-256-10")
MOST_DENSE = 10_000  # parameters


class CNN(nn.Module):
    """Three convolutions with mean pooling, two dense layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Ten outputs."""
        for factor in (1, 2, 4):
            x = nn.relu(nn.Conv(factor * self.width, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(2 * self.width)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def network_of(name: str) -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
    """(fn, params, shape of an input) of widths, or of cnn-WIDTH on images of 32×32."""
    if not name.startswith("cnn"):
        sizes = tuple(map(int, name.split("-")))
        return networks.mlp, networks.init_mlp(jax.random.key(0), sizes, bias_std=0.1), sizes[:1]
    model, shape = CNN(int(name.split("-")[1])), (32, 32, 3)
    params = model.init(jax.random.key(0), np.zeros((1, *shape), np.float32))
    keys = iter(jax.random.split(jax.random.key(1), 20))
    # Biases that are not 0, as after training.
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), params)
    return model.apply, params, shape


def one(method: str, name: str) -> dict:
    """What a fresh process needs for one network."""
    fn, params, shape = network_of(name)
    start, spent = time.perf_counter(), time.process_time()
    missing: list[str] = []
    if method == "boundary":
        x = jax.ShapeDtypeStruct((1, *shape), np.float32)
        found = functional_dimension(fn, params, everywhere(x), dense=0)
        lower, upper = found.lower, found.upper
        missing = [f"{layer.name}: {why}" for layer in found.layers for why in layer.reasons]
    else:
        count = 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) // 10
        x = jax.random.normal(jax.random.key(1), (count, *shape))
        found = jacobian_rank(fn, params, x, method="certificate")
        lower, upper = int(found.lower), int(found.upper)
    return {
        "missing": missing,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "lower": lower,
        "upper": upper,
        "certain": bool(found.certain),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - spent,
        "cpu": environment()["cpu"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def exponent(rows: list[dict], what: str) -> float:
    """Of a power law of the number of parameters."""
    d = np.log([row["parameters"] for row in rows])
    return float(np.polyfit(d, np.log([row[what] for row in rows]), 1)[0])


def before(out: Path) -> list[dict]:
    """What was measured here before: each network is a process of its own."""
    path = out / f"functional_dimension-{jax.default_backend()}.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def row(cell: dict) -> list[str]:
    known = str(cell["lower"]) if cell["certain"] else f"[{cell['lower']}, {cell['upper']}]"
    return [
        cell["network"],
        str(cell["parameters"]),
        cell["method"],
        known,
        f"{cell['seconds']:.1f}",
        f"{cell['cpu_seconds']:.1f}",
        f"{cell['peak_bytes'] / 1e9:.2f}",
        cell["cpu"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, help="widths, as 64-32-32-10, or cnn-WIDTH"
    )
    parser.add_argument("--one", choices=("boundary", "certificate"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.networks[0])))
        return
    cells = before(arguments.out)
    for name in arguments.networks:
        count = sum(leaf.size for leaf in jax.tree.leaves(network_of(name)[1]))
        for method in ("boundary", "certificate"):
            if method == "certificate" and count > MOST_DENSE:
                continue
            command = [sys.executable, __file__, "--one", method, "--networks", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            cell = {"method": method, "network": name, **json.loads(output.splitlines()[-1])}
            cells = [c for c in cells if (c["method"], c["network"]) != (method, name)] + [cell]
            print(" ".join(row(cell)), flush=True)
    cells.sort(key=lambda c: (c["parameters"], c["method"]))
    title = "Proven degrees of freedom, one process each, compilation included"
    for what in ("seconds", "peak_bytes"):
        for method in ("boundary", "certificate"):
            own = [c for c in cells if c["method"] == method]
            if len(own) > 1:
                title += f"; {method}: {what} ~ d^{exponent(own, what):.2f}"
    columns = ["network", "d", "method", "dimension", "s", "CPU s", "peak GB", "CPU"]
    table = Table(title, columns, [row(c) for c in cells])
    publish("functional_dimension", table, {"cells": cells}, arguments.out)


if __name__ == "__main__":
    main()
