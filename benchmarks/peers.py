"""jaxinv and what one would use or write without it, in turn in one run.

    python benchmarks/peers.py [--only kappa|rank|natural|balance]

* κ and the path norm against PyTorch, written by hand for each architecture (`_torch_paths`);
* the rank of a Jacobian against NumPy's and PyTorch's singular values of that same Jacobian;
* a step of the natural gradient against kfac-jax (another method: block-diagonal), where it runs;
* `balance` against a loop over units in NumPy, to the same norm.

Needs torch (`pip install torch`); kfac-jax and its dependencies are tried if installed. Every row
checks that both sides agree before they are timed.
"""

import argparse
import os
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _measure import RESULTS, interleaved_seconds, median_and_spread, publish, spelled
from resnet import ResNet18

from jaxinv import (
    balance,
    jacobian,
    jacobian_rank,
    networks,
    random_rescaling,
    rescale,
    rescaling_group,
)
from jaxinv.experiments.report import Table
from jaxinv.jacobians import natural_gradient_direction
from jaxinv.paths import path_kappa, path_norm


class Comparison(NamedTuple):
    """Rows of one task; ours first."""

    task: str
    seconds: dict[str, np.ndarray]
    notes: dict[str, str]


# --- κ and path norm ---


def mlp_network(sizes=(784, 4000, 4000, 10)):
    """(title, fn, params, batch statistics, shape of one input)."""
    params = networks.init_mlp(jax.random.key(0), sizes, bias_std=0.1)
    return f"MLP {'-'.join(map(str, sizes))}", networks.mlp, params, {}, (1, sizes[0])


def resnet_network(size, model=None):
    model = model or ResNet18(1000 if size > 64 else 10, small_inputs=size <= 64)
    shape = (1, size, size, 3)
    variables = jax.jit(lambda key: model.init(key, jnp.ones(shape), False))(jax.random.key(0))
    stats = variables["batch_stats"]

    def fn(params, x):
        return model.apply({"params": params, "batch_stats": stats}, x, False)

    return f"ResNet-18, {size}×{size}", fn, variables["params"], stats, shape


def kappa(network, repeats, threads) -> list[Comparison]:
    import _torch_paths as by_hand

    by_hand.torch.set_num_threads(threads)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    title, fn, params, stats, shape = network
    x = jnp.ones(shape)
    kappa_of = jax.jit(lambda params: path_kappa(fn, params, x)).lower(params).compile()
    norm_of = jax.jit(lambda params: path_norm(fn, params, x)).lower(params).compile()
    sums = by_hand.resnet_sums if len(shape) == 4 else by_hand.mlp_sums
    ones = by_hand.torch.ones(*(shape if len(shape) == 2 else (1, shape[3], *shape[1:3])))
    given = [by_hand.to_torch(tree, device) for tree in (params, stats)]
    layouts = {"PyTorch": [*given, ones.to(device)]}
    if len(shape) == 4:
        layouts["PyTorch, channels last"] = by_hand.channels_last(layouts["PyTorch"])

    ours = by_hand.named(kappa_of(params))
    kappas, norms = {"jaxinv": lambda: kappa_of(params)}, {"jaxinv": lambda: norm_of(params)}
    errors = {"jaxinv": 0.0}
    for name, arguments in layouts.items():
        kappas[name] = by_hand.waiting(by_hand.kappa, sums, *arguments)
        norms[name] = by_hand.waiting(by_hand.path_norm, sums, *arguments)
        theirs = by_hand.from_torch(kappas[name]())
        errors[name] = max(relative_error(ours[path], theirs[path]) for path in ours)
        errors[name] = max(errors[name], relative_error(norm_of(params), float(norms[name]())))
        if errors[name] > 1e-3:
            raise AssertionError(f"{title}: jaxinv and {name} differ by {errors[name]:.1e}")
    notes = {name: f"differs by {error:.0e}" for name, error in errors.items() if error}
    return [
        Comparison(f"κ of {title}", interleaved_seconds(kappas, repeats), notes),
        Comparison(f"path norm of {title}", interleaved_seconds(norms, repeats), notes),
    ]


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(abs(a - b) / np.maximum(abs(b), 1e-30)))


# --- ranks ---


def rank(repeats, threads, sizes=(16, 16, 16, 10), examples=200) -> Comparison:
    import torch

    torch.set_num_threads(threads)
    params = networks.init_mlp(jax.random.key(0), sizes)
    x = jax.random.normal(jax.random.key(1), (examples, sizes[0]))
    with jax.enable_x64(True):
        # Both peers are given the Jacobian, in double precision: the work of theirs that is timed
        # is less than ours.
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        matrix = np.asarray(jacobian(networks.mlp, double, jnp.asarray(x, jnp.float64)))
    tensor = torch.tensor(matrix)

    def ours(method):
        function = jax.jit(lambda w, x: jacobian_rank(networks.mlp, w, x, method=method).rank)
        return lambda: function(params, x)

    functions = {
        "jaxinv, certificate": ours("certificate"),
        "jaxinv, svd": ours("svd"),
        "NumPy matrix_rank of J": lambda: np.linalg.matrix_rank(matrix),
        "PyTorch matrix_rank of J": lambda: torch.linalg.matrix_rank(tensor),
    }
    notes = {name: f"rank {int(function())}" for name, function in functions.items()}
    title = f"rank, {'-'.join(map(str, sizes))}, J {matrix.shape[0]}×{matrix.shape[1]}"
    return Comparison(title, interleaved_seconds(functions, repeats), notes)


# --- natural gradient ---


def natural(repeats, sizes=(32, 24, 24, 10), examples=128, damping=1e-3) -> Comparison:
    params = networks.init_mlp(jax.random.key(0), sizes)
    x = jax.random.normal(jax.random.key(1), (examples, sizes[0]))
    y = jnp.arange(examples) % sizes[-1]

    def loss(params, x, y):
        return -jnp.mean(jax.nn.log_softmax(networks.mlp(params, x))[jnp.arange(len(y)), y])

    def step_by(solver):
        @jax.jit
        def step(params, x, y):
            gradient = jax.grad(loss)(params, x, y)
            direction = natural_gradient_direction(
                networks.mlp, params, x, gradient, "softmax", damping=damping, solver=solver
            ).v
            return jax.tree.map(lambda w, v: w - 0.1 * v, params, direction)

        return lambda: step(params, x, y)

    functions: dict[str, Any] = {f"jaxinv, {s}": step_by(s) for s in ("exact", "cr")}
    notes = {
        "jaxinv, exact": "exact Fisher, eigenvectors",
        "jaxinv, cr": "exact Fisher, matrix-free",
    }
    try:
        functions["kfac-jax"] = kfac_step(params, x, y, loss, damping)
        jax.block_until_ready(functions["kfac-jax"]())
        notes["kfac-jax"] = "block-diagonal Kronecker factors"
    except Exception as error:  # whatever it raises is the result: it is what a user would see
        functions.pop("kfac-jax", None)
        notes["kfac-jax"] = f"does not run: {described(error)}"
    title = f"natural gradient step, {'-'.join(map(str, sizes))}, batch {examples}"
    return Comparison(title, interleaved_seconds(functions, repeats), notes)


def described(error: Exception) -> str:
    """Kind, first line, and the function that raised it."""
    line = (str(error).strip().splitlines() or [""])[0][:90]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line} ({Path(where.filename).name}, {where.name})"


def kfac_step(params, x, y, loss, damping):
    """One whole step of kfac-jax: gradient, factors, inverses, update."""
    import kfac_jax

    def registered(params, batch):
        kfac_jax.register_softmax_cross_entropy_loss(networks.mlp(params, batch[0]), batch[1])
        return loss(params, *batch)

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(registered), l2_reg=0.0, inverse_update_period=1, num_burnin_steps=0
    )
    start = optimizer.init(params, jax.random.key(0), (x, y))
    given = {"learning_rate": 0.1, "momentum": 0.0, "damping": damping}

    def step():  # it donates what it is given
        copied = jax.tree.map(jnp.copy, (params, start))
        return optimizer.step(*copied, jax.random.key(1), batch=(x, y), **given)[0]

    return step


# --- balance ---


def balancing(repeats, sizes=(784, 1000, 1000, 10)) -> list[Comparison]:
    params = networks.init_mlp(jax.random.key(0), sizes, bias_std=0.1)
    group = rescaling_group(networks.mlp, params, jnp.zeros((1, sizes[0])))
    far = rescale(group, params, random_rescaling(group, jax.random.key(1)))
    ours = jax.jit(lambda params: balance(group, params).value)
    found = []
    for name, start in {"as initialised": params, "randomly rescaled": far}.items():
        squares = squared_norm(loop_over_units(start))
        error = relative_error(ours(start), squares)
        if error > 1e-4:
            raise AssertionError(f"balanced norms differ by {error:.1e}")
        functions = {
            "jaxinv": lambda start=start: ours(start),
            "NumPy loop": lambda start=start: loop_over_units(start),
        }
        title = f"balance, MLP {'-'.join(map(str, sizes))} {name}"
        notes = {"NumPy loop": f"‖w‖² differs by {error:.0e}"}
        found.append(Comparison(title, interleaved_seconds(functions, repeats), notes))
    return found


def squared_norm(layers) -> float:
    return sum(float(np.sum(np.square(a, dtype=np.float64))) for layer in layers for a in layer)


def loop_over_units(params, tol=1e-5, sweeps=1000) -> list[list[np.ndarray]]:
    """Balance each hidden unit in turn, until no factor differs from one by more than `tol`."""
    layers = [[np.array(layer["kernel"]), np.array(layer["bias"])] for layer in params.values()]
    for _ in range(sweeps):
        largest = 0.0
        for (kernel, bias), (after, _) in zip(layers[:-1], layers[1:], strict=True):
            for unit in range(kernel.shape[1]):
                incoming = np.sqrt(np.dot(kernel[:, unit], kernel[:, unit]) + bias[unit] ** 2)
                outgoing = np.linalg.norm(after[unit])
                if incoming == 0 or outgoing == 0:
                    continue
                factor = np.sqrt(outgoing / incoming)
                kernel[:, unit] *= factor
                bias[unit] *= factor
                after[unit] /= factor
                largest = max(largest, abs(factor - 1))
        if largest < tol:
            break
    return layers


# --- tables ---


def to_table(comparisons: list[Comparison]) -> Table:
    rows = []
    for task, seconds, notes in comparisons:
        first = next(iter(seconds))
        for name in [*seconds, *(n for n in notes if n not in seconds)]:
            row = [task, name, "–", "–"]
            if name in seconds:
                ratio = "1" if name == first else spelled(seconds[name] / seconds[first])
                row = [task, name, spelled(1e3 * seconds[name]), ratio]
            rows.append([*row, notes.get(name, "")])
    columns = ["task", "by", "ms", "÷ first", ""]
    return Table("Peers: median (interquartile range); ratios of paired timings", columns, rows)


def torch_version() -> dict[str, Any]:
    try:
        import torch
    except ModuleNotFoundError:
        return {"torch": None}
    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["kappa", "rank", "natural", "balance"]
    parser.add_argument("--only", choices=parts, action="append", help="parts to run")
    parser.add_argument("--repeats", type=int, default=31, help="timings of κ; a third for others")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:  # OpenMP's threads wait for each other: PyTorch alone can seem ten times slower
        print(f"warning: load average {load:.1f}; timings count on an idle machine only")
    wanted, repeats = arguments.only or parts, arguments.repeats
    threads, few = os.cpu_count() or 1, max(1, arguments.repeats // 3)
    comparisons = []
    if "kappa" in wanted:
        for network in (mlp_network(), resnet_network(32), resnet_network(224)):
            comparisons += kappa(network, repeats, threads)
    if "rank" in wanted:
        comparisons.append(rank(few, threads))
    if "natural" in wanted:
        comparisons.append(natural(few))
    if "balance" in wanted:
        comparisons += balancing(few)
    table, versions = to_table(comparisons), torch_version()
    title = f"{table.title}; torch {versions['torch']}, {threads} threads each"
    numbers = {
        "peers": versions,
        "load_average_at_start": load,
        "comparisons": [c._asdict() for c in comparisons],
        "summaries": [
            {name: median_and_spread(s) for name, s in c.seconds.items()} for c in comparisons
        ],
    }
    publish("peers", table._replace(title=title), numbers, arguments.out)


if __name__ == "__main__":
    main()
