"""First and second call of public functions on 64-32-32-10: seconds, and programs compiled.

    python benchmarks/first_calls.py

Each function in processes of its own, without a compilation cache. A second call should compile
nothing.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _measure import in_own_processes, median_and_spread, publish

import jaxinv
from jaxinv import networks
from jaxinv.experiments.report import Table

SIZES = (64, 32, 32, 10)
compiled: list[float] = []


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(seconds)


def calls() -> dict[str, Callable[[Any, Any], Any]]:
    """One call per public function, of (params, 1000 inputs)."""
    fn = networks.mlp

    def group(w: Any, x: Any) -> Any:
        return jaxinv.rescaling_group(fn, w, x)

    def loss(w: Any, x: Any) -> Any:
        return (fn(w, x) ** 2).mean()

    def step(optimizer: Any, w: Any, x: Any) -> Any:
        gradient = jax.jit(jax.grad(loss))(w, x)
        return optimizer.update(gradient, optimizer.init(w), w)

    return {
        "path_norm": lambda w, x: jaxinv.path_norm(fn, w, x),
        "log_path_norm": lambda w, x: jaxinv.log_path_norm(fn, w, x),
        "unit_path_norms": lambda w, x: jaxinv.unit_path_norms(fn, w, x),
        "path_kappa": lambda w, x: jaxinv.path_kappa(fn, w, x),
        "data_dependent_path_norm": lambda w, x: jaxinv.data_dependent_path_norm(
            fn, w, x, alpha=0.5
        ),
        "data_dependent_path_kappa": lambda w, x: jaxinv.data_dependent_path_kappa(
            fn, w, x, alpha=0.5
        ),
        "path_sgd, one update": lambda w, x: step(jaxinv.path_sgd(0.1, fn, x[:1]), w, x),
        "rescaling_group": group,
        "random_rescaling": lambda w, x: jaxinv.random_rescaling(group(w, x), jax.random.key(0)),
        "balance": lambda w, x: jaxinv.balance(group(w, x), w),
        "normalize": lambda w, x: jaxinv.normalize(group(w, x), w),
        "symmetry_group": lambda w, x: jaxinv.symmetry_group(fn, w, x),
        "is_symmetry": lambda w, x: jaxinv.is_symmetry(fn, w, x, w),
        "jacobian": lambda w, x: jaxinv.jacobian(fn, w, x),
        "jacobian_gram": lambda w, x: jaxinv.jacobian_gram(fn, w, x),
        "jacobian_spectrum": lambda w, x: jaxinv.jacobian_spectrum(fn, w, x[:400]),
        "jacobian_rank": lambda w, x: jaxinv.jacobian_rank(fn, w, x),
        "degrees_of_freedom": lambda w, x: jaxinv.degrees_of_freedom(fn, w, x),
    }


def measure(name: str, times: int = 3) -> dict[str, Any]:
    """Calls of one function in this process, one after the other."""
    w = networks.init_mlp(jax.random.key(0), SIZES, bias_std=0.1)
    x = jax.random.normal(jax.random.key(1), (1000, SIZES[0]))
    jax.block_until_ready((w, x))
    jax.monitoring.register_event_duration_secs_listener(_listen)
    call = calls()[name]
    seconds, programs = [], []
    for _ in range(times):
        compiled.clear()
        begin = time.perf_counter()
        found = call(w, x)
        jax.block_until_ready([a for a in jax.tree.leaves(found) if isinstance(a, jax.Array)])
        seconds.append(time.perf_counter() - begin)
        programs.append(len(compiled))
    return {"name": name, "seconds": seconds, "programs": programs}


def to_table(measured: list[list[dict[str, Any]]]) -> Table:
    """Medians over processes."""

    def spelled(runs: list[dict[str, Any]], i: int) -> str:
        found = median_and_spread(np.array([run["seconds"][i] for run in runs]))
        return f"{found['median']:.3g} ({found['iqr']:.1g})"

    rows = [
        [
            runs[0]["name"],
            spelled(runs, 0),
            str(runs[0]["programs"][0]),
            spelled(runs, -1),
            str(runs[0]["programs"][-1]),
        ]
        for runs in measured
    ]
    return Table(
        f"Calls on 64-32-32-10 and 1000 inputs; medians of {len(measured[0])} processes (IQR)",
        ["function", "first call (s)", "programs", "third call (s)", "programs"],
        rows,
    )


def main() -> None:
    """Every function in processes of its own."""
    title = __doc__.splitlines()[0]
    measured, out = in_own_processes(__file__, list(calls()), measure, title)
    publish("first-calls", to_table(measured), {"measured": measured}, out)


if __name__ == "__main__":
    main()
