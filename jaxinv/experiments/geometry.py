"""Two views of one network: a good parametrisation, or an algorithm that does not see it.

Every method trains one ReLU network from a balanced and from an unbalanced
start (the same function, random units rescaled), over a grid of learning rates:
SGD and Adam; Path-SGD, with the diagonal and with all of the path metric;
data-dependent path normalisation from the paths, α = 0, to the data,
α = 1; natural gradient; and plain SGD on the weight-normalised and the
batch-normalised network. After Neyshabur, Tomioka, Salakhutdinov & Srebro,
"Data-dependent path normalization in neural networks", ICLR 2016
(arXiv:1511.06747), section 5, on whatever data is given.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.experiments import training
from jaxinv.experiments.gaps import median_gap
from jaxinv.experiments.options import (
    count_option,
    data_option,
    hidden_option,
    option,
    out_option,
    positive_int,
    seeds_option,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells
from jaxinv.experiments.starts import STARTS, unbalance
from jaxinv.experiments.training import Running
from jaxinv.networks import init_mlp, mlp
from jaxinv.optimizers import (
    data_dependent_path_sgd,
    path_sgd,
    scale_by_natural_gradient,
    scale_by_path_metric,
)
from jaxinv.reparam import batch_norm_as_reparam, weight_normalize
from jaxinv.rescaling import rescaling_group
from jaxinv.typing import Network, Params

FIGURE = "starts.png"
RATES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)


class Method(NamedTuple):
    """One line of the comparison."""

    label: str
    # (learning rate, shape of a batch) -> optax transformation
    make: Callable[[Any, Any], Any]
    # (network, start, shape of a batch) -> (network that is trained, its start)
    network: Callable[[Network, Params, Any], tuple[Network, Params]] = lambda fn, w, x: (fn, w)


def _data_dependent(alpha: float) -> Method:
    return Method(
        f"Data-dependent Path-SGD α = {alpha:g}",
        lambda rate, x: data_dependent_path_sgd(rate, mlp, alpha=alpha),
    )


def _weight_normalized(fn: Network, params: Params, x: Any) -> tuple[Network, Params]:
    net = weight_normalize(fn, rescaling_group(fn, params, x))
    return net.fn, net.from_params(params)


METHODS = {
    "sgd": Method("SGD", lambda rate, x: optax.sgd(rate)),
    "adam": Method("Adam", lambda rate, x: optax.adam(rate)),
    "path": Method("Path-SGD (data-dependent, α = 0)", lambda rate, x: path_sgd(rate, mlp, x)),
    "metric": Method(
        "path metric",
        lambda rate, x: optax.chain(
            scale_by_path_metric(mlp, x, damping=0.1, max_iterations=20, rtol=1e-3),
            optax.scale_by_learning_rate(rate),
        ),
    ),
    **{f"data-dependent-{alpha:g}": _data_dependent(alpha) for alpha in (0.25, 0.5, 0.75, 1.0)},
    "natural": Method(
        "natural gradient",
        lambda rate, x: optax.chain(
            scale_by_natural_gradient(
                mlp, "softmax", damping=1e-3, solver="cr", max_iterations=20, rtol=1e-3
            ),
            optax.scale_by_learning_rate(rate),
        ),
    ),
    "weight-norm": Method("weight norm", lambda rate, x: optax.sgd(rate), _weight_normalized),
    "batch-norm": Method(
        "batch norm",
        lambda rate, x: optax.sgd(rate),
        lambda fn, params, x: (batch_norm_as_reparam(fn).fn, params),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, for how long."""

    data: Path | None = data_option()
    out: Path = out_option("geometry", FIGURE)
    hidden: tuple[int, ...] = hidden_option(64, 64)
    examples: int = count_option(6000, "training examples, at most")
    epochs: int = count_option(10, "passes over them")
    batch_size: int = count_option(100, "examples per step")
    seeds: int = seeds_option(3)
    jobs: int = option(1, "methods trained at a time, each in a process", parse=positive_int)


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    dataset: str
    examples: int  # of the training set
    studies: dict[str, Cells]  # [method]["start, rate"]


# --- training -------------------------------------------------------------------------


def _cells(
    name: str, start: str, config: Config, wanted: frozenset[str]
) -> Iterator[tuple[str, Cell]]:
    """Train one method from one start at the rates wanted; yields (key, cell) as they come."""
    method = METHODS[name]
    data = training.images(config.data, config.batch_size, config.examples)
    x, y, n = data.x_train, data.y_train, len(data.x_train)
    spec = jax.ShapeDtypeStruct((config.batch_size, x.shape[1]), x.dtype)
    sizes = (x.shape[1], *config.hidden, data.num_classes)
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))

    def first(key: Any) -> Params:
        init_key, scale_key = jax.random.split(key)
        params = init_mlp(init_key, sizes)
        return params if start == STARTS[0] else unbalance(scale_key, params)

    starts = [first(key) for key in keys]
    fn = method.network(mlp, starts[0], spec)[0]
    starts = [method.network(mlp, params, spec)[1] for params in starts]
    params = jax.tree.map(lambda *a: jnp.stack(a), *starts)

    def epoch(rate: Any, params: Params, state: Any, order: Any) -> Any:
        return training.descend(
            lambda params, rows: training.cross_entropy(fn, params, x[rows], y[rows]),
            optax.with_extra_args_support(method.make(rate, spec)),
            params,
            state,
            order,
            extra=lambda rows: {"batch": x[rows]},
        )

    def measure(params: Params) -> Any:
        # Batch norm uses the statistics of what it is evaluated on: the whole set.
        error = training.evaluate(fn, params, data.x_test, data.y_test)[1]
        return training.cross_entropy(fn, params, x, y), 100 * error

    run_epoch = jax.jit(jax.vmap(epoch, in_axes=(None, 0, 0, 0)))
    begin = jax.jit(lambda rate, params: jax.vmap(method.make(rate, spec).init)(params))
    evaluate = jax.jit(jax.vmap(measure))

    @jax.jit
    def rows_of(i: Any) -> Any:
        shuffled = partial(training.shuffled, examples=n, batch_size=config.batch_size)
        return jax.vmap(lambda key: shuffled(jax.random.fold_in(key, i)))(keys)

    rates = {_key(start, rate): rate for rate in RATES}
    chosen = {key: rate for key, rate in rates.items() if key in wanted}
    for i, (key, rate) in enumerate(chosen.items()):
        r = jnp.asarray(rate, x.dtype)
        found = training.train(
            partial(run_epoch, r),
            evaluate,
            params,
            begin(r, params),
            map(rows_of, range(config.epochs)),
            warm_up=i == 0,
            clock=time.process_time,
        )
        losses, errors = (np.stack(c, axis=1) for c in zip(*found.measured, strict=True))
        yield (
            key,
            {
                "rate": rate,
                "loss": losses.tolist(),  # (seeds, epochs + 1), of the training set
                "error": errors.tolist(),  # of the test set, in percent
                # Of the processor, all seeds together, in the epoch that took the least.
                "seconds": float(np.min(found.seconds)),
            },
        )


def _key(start: str, rate: float) -> str:
    return f"{start}, {rate:g}"


def _task(name: str, start: str, config: Config, wanted: frozenset[str]) -> Cells:
    return dict(_cells(name, start, config, wanted))


@training.driver
def run(config: Config, running: Running) -> Result:
    """Train every method from both starts at every rate that ``store`` does not hold yet.

    Raises:
        DataError: if ``config.data`` cannot be read.
        InvalidInput: if the batch is larger than the training set.

    All of it takes minutes; one cell alone:

    >>> wanted = frozenset(["balanced, 10"])
    >>> cells = _cells("sgd", "balanced", Config(hidden=(8,), epochs=1), wanted)
    >>> key, cell = next(cells)
    >>> key, np.shape(cell["loss"])
    ('balanced, 10', (3, 2))
    """
    store = running.store
    data = training.images(config.data, config.batch_size, config.examples)
    total = len(METHODS) * len(STARTS) * len(RATES)
    keys = {start: [_key(start, rate) for rate in RATES] for start in STARTS}
    missing = {
        (name, start): [key for key in keys[start] if store.get(name, key) is None]
        for name in METHODS
        for start in STARTS
    }
    done = itertools.count(1 + total - sum(map(len, missing.values())))

    def keep(name: str, key: str, cell: Cell) -> None:
        store.keep(name, key, cell)
        running.progress(next(done) / total, METHODS[name].label)

    tasks = [(*task, frozenset(keys)) for task, keys in missing.items() if keys]
    if config.jobs == 1:
        for name, start, wanted in tasks:
            for key, cell in _cells(name, start, config, wanted):
                keep(name, key, cell)
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(config.jobs, context, _end_with_parent) as pool:
            futures = {pool.submit(_task, name, start, config, w): name for name, start, w in tasks}
            try:
                for future in concurrent.futures.as_completed(futures):
                    for key, cell in future.result().items():
                        keep(futures[future], key, cell)
            except BaseException:
                # What has not begun is left out, so that an interrupt does not wait for it.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    studies = {
        name: {key: store(name, key, dict) for start in STARTS for key in keys[start]}
        for name in METHODS
    }
    return Result(config, data.name, len(data.x_train), studies)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed, and can send it no message."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- what is shown --------------------------------------------------------------------


class Best(NamedTuple):
    """A method from one start at the rate of lowest final training loss, the mean over seeds."""

    rate: float
    loss: np.ndarray  # (seeds, epochs + 1)
    error: np.ndarray  # (seeds, epochs + 1)
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether training ended at no number, or above where it began."""
        return not self.loss[:, -1].mean() <= self.loss[:, 0].mean()


def best(cells: Cells, start: str) -> Best:
    """Choose among the rates; a run that diverges counts as infinite.

    >>> cell = {"rate": 1.0, "loss": [[2.0, None]], "error": [[90.0, None]], "seconds": 1.0}
    >>> other = {"rate": 0.1, "loss": [[2.0, 1.0]], "error": [[90.0, 5.0]], "seconds": 1.0}
    >>> best({"balanced, 1": cell, "balanced, 0.1": other}, "balanced").rate
    0.1
    """
    found = []
    for key, cell in cells.items():
        if key.startswith(f"{start}, "):
            loss, error = (np.array(cell[k], float) for k in ("loss", "error"))
            found.append(Best(cell["rate"], loss, error, cell["seconds"]))
    return min(found, key=lambda b: float(np.nan_to_num(b.loss[:, -1], nan=np.inf).mean()))


def _shown(found: Best, values: np.ndarray, form: str) -> str:
    if found.diverged:
        return "diverged"
    mean = f"{values.mean():{form}}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):{form}}"


def same_rate_gap(cells: Cells) -> float:
    """The distance of the two starts at the best rate of the balanced one, mean over seeds.

    Median over epochs of the relative distance of the training losses,
    :func:`jaxinv.experiments.gaps.median_gap`.

    >>> cell = {"rate": 0.1, "error": [[9.0, 9.0]], "seconds": 1.0}
    >>> cells = {"balanced, 0.1": cell | {"loss": [[2.0, 1.0]]}}
    >>> same_rate_gap(cells | {"unbalanced, 0.1": cell | {"loss": [[2.0, 0.75]]}})
    0.25
    """
    balanced, unbalanced = STARTS
    found = best(cells, balanced)
    other = np.array(cells[_key(unbalanced, found.rate)]["loss"], float)
    return float(median_gap(found.loss, other).mean())


def table(result: Result) -> Table:
    """Every method at its best rate from each start, mean ± standard deviation over seeds."""
    rows = []
    slowest = {name: best(cells, STARTS[0]).seconds for name, cells in result.studies.items()}
    for name, cells in result.studies.items():
        gap = same_rate_gap(cells)
        for start in STARTS:
            found = best(cells, start)
            rows.append(
                [
                    METHODS[name].label,
                    start,
                    f"{found.rate:g}",
                    _shown(found, found.loss[:, -1], ".2g"),
                    _shown(found, found.error[:, -1], ".2f"),
                    "" if start != STARTS[0] or found.diverged else f"{100 * gap:.2g}",
                    f"{found.seconds / slowest['sgd']:.3g}",
                ]
            )
    columns = [
        "method",
        "start",
        "best\nrate",
        "training\nloss",
        "test\nerror %",
        "median Δ\nloss %",
        "processor\ntime / SGD",
    ]
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    title = (
        f"{_setting(result)}\nrates: {rates}; the best is that of the lowest final training loss; "
        "diverged: at every rate, the loss ends above its start; median Δ: between the starts, "
        "both at the best rate of the balanced one, as a part of the larger loss"
    )
    return Table(title, columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells."""
    return {"dataset": result.dataset}


def _setting(result: Result) -> str:
    config = result.config
    return (
        f"{result.dataset}, {result.examples} examples, hidden layers "
        f"{'-'.join(map(str, config.hidden))}, batch {config.batch_size}, {config.epochs} epochs, "
        f"{config.seeds} seed(s)"
    )


def plot(result: Result, path: Path) -> None:
    """Draw a dumbbell for each method: what it reaches from either start."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(11, 5.6), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for i, cells in enumerate(result.studies.values()):
        found = [best(cells, start) for start in STARTS]
        for axes, ends in zip(
            both, ([f.loss for f in found], [f.error for f in found]), strict=True
        ):
            if any(f.diverged for f in found):
                position = {"ha": "right", "va": "center", "transform": axes.get_yaxis_transform()}
                axes.text(
                    0.98, i, "diverges at every rate", color="C3", fontsize="small", **position
                )
                continue
            means = [end[:, -1].mean() for end in ends]
            axes.plot(means, (i, i), color="0.6", linewidth=2, zorder=1)
            for end, (color, filled, shift) in zip(
                ends, (("C0", True, -0.12), ("C1", False, 0.12)), strict=True
            ):
                axes.errorbar(
                    end[:, -1].mean(),
                    i + shift,
                    xerr=end[:, -1].std(ddof=1) if len(end) > 1 else None,
                    fmt="o",
                    color=color,
                    markerfacecolor=color if filled else "white",
                    capsize=2,
                    zorder=2,
                )
    labels = [
        f"{METHODS[name].label} ({'/'.join(f'{best(c, s).rate:g}' for s in dict.fromkeys(STARTS))})"
        for name, c in result.studies.items()
    ]
    both[0].set_yticks(range(len(labels)), labels)
    both[0].invert_yaxis()
    both[0].set(xscale="log", xlabel="final training loss (nats)")
    both[1].set(xscale="log", xlabel="test error (%)")
    both[1].xaxis.set_major_locator(require("matplotlib.ticker", "cli").LogLocator(subs=(1, 2, 5)))
    both[1].xaxis.set_major_formatter("{x:g}")
    both[1].xaxis.set_minor_formatter("")
    for axes in both:
        axes.grid(alpha=0.3, axis="x")
    handles = [
        both[0].plot([], [], "o", color=color, markerfacecolor=face, label=f"{start} start")[0]
        for start, color, face in zip(STARTS, ("C0", "C1"), ("C0", "white"), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"{_setting(result)}\nin brackets: the best rate of either start; bars: ± 1 standard "
        "deviation over seeds; circles apart: the method tells the starts apart",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)


__all__ = ["FIGURE", "Config", "Result", "best", "plot", "record", "run", "table"]
