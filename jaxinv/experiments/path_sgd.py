"""Path-SGD against SGD, AdaGrad and Adam, from two starts of one network.

The balanced start is a usual initialisation. The unbalanced start multiplies
the incoming weights of some hidden units by large random factors and divides
their outgoing weights by the same: another point in parameter space, the same
function. An optimizer that is invariant to this rescaling follows the same
curve from both. Figure 3 and section 5 of Neyshabur, Salakhutdinov & Srebro,
"Path-SGD: Path-Normalized Optimization in Deep Neural Networks", NeurIPS 2015
(arXiv:1506.02617), on whatever data is given.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.experiments import datasets, training
from jaxinv.experiments.gaps import median_gap, start_distance
from jaxinv.experiments.options import (
    count_option,
    data_option,
    hidden_option,
    option,
    out_option,
    positive_float,
    probability,
    seeds_option,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell
from jaxinv.experiments.starts import STARTS, unbalance
from jaxinv.experiments.training import Running
from jaxinv.networks import init_mlp, mlp
from jaxinv.optimizers import path_sgd
from jaxinv.typing import Params

FIGURE = "curves.png"
TUNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_EVALUATION_CHUNK = 1000  # examples; bounds the memory of evaluating all of MNIST at once


class Optimizer(NamedTuple):
    """One line of the comparison."""

    label: str
    # (learning rate, shape of a batch) -> optax.GradientTransformation
    make: Callable[[Any, jax.ShapeDtypeStruct], Any]
    learning_rate: float


# The accumulator of AdaGrad begins at 0, as in Duchi et al. (2011); optax's default is 0.1.
OPTIMIZERS = {
    "sgd": Optimizer("SGD", lambda rate, x: optax.sgd(rate), 0.1),
    "adagrad": Optimizer(
        "AdaGrad", lambda rate, x: optax.adagrad(rate, initial_accumulator_value=0.0), 0.01
    ),
    "adam": Optimizer("Adam", lambda rate, x: optax.adam(rate), 0.001),
    "path_sgd": Optimizer("Path-SGD", lambda rate, x: path_sgd(rate, mlp, x), 0.1),
}


_rate = partial(option, None, parse=positive_float, metavar="RATE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, for how long."""

    data: Path | None = data_option()
    out: Path = out_option("path-sgd", FIGURE)
    hidden: tuple[int, ...] = hidden_option(512, 512)
    dropout: float = option(
        0.0, "probability of dropping a hidden unit", parse=probability, metavar="P"
    )
    epochs: int = count_option(20, "passes over the training set")
    batch_size: int = count_option(100, "examples per step")
    seeds: int = seeds_option(1)
    lr_sgd: float | None = _rate("learning rate of SGD")
    lr_adagrad: float | None = _rate("learning rate of AdaGrad")
    lr_adam: float | None = _rate("learning rate of Adam")
    lr_path_sgd: float | None = _rate("learning rate of Path-SGD")
    tune: bool = option(
        False,
        "choose each learning rate that is not given: of "
        + ", ".join(map(str, TUNING_RATES))
        + " the one with the lowest training loss from the start that does worse with it; the best "
        "rate of each start alone is in the table",
    )
    float64: bool = option(
        False, "train at the chosen rates once more in float64, where rounding is not amplified"
    )


class Curves(NamedTuple):
    """One optimizer from one start; the first axis of every array is the seed."""

    step_loss: np.ndarray  # (seeds, steps): the loss of each minibatch, with dropout
    test_error: np.ndarray  # (seeds, evaluations): in percent, evenly spaced, start included
    final_loss: np.ndarray  # (seeds,): of the whole training set, without dropout
    seconds_per_step: float  # of all seeds together, without compilation


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    dataset: str
    learning_rates: dict[str, float]
    curves: dict[str, dict[str, Curves]]  # [optimizer][start], at the learning rates
    # [optimizer][start]: the rate that is best from this start, and the curves at it.
    tuned: dict[str, dict[str, tuple[float, Curves]]]
    exact: dict[str, dict[str, Curves]]  # like curves, in float64; empty if that was not asked for


@training.driver
def run(config: Config, running: Running) -> Result:
    """Train every optimizer from both starts, at every rate that is tried.

    Both starts, and all optimizers, see the same initial function, the same
    minibatches and the same dropout masks. The starts are compared at one rate.

    Raises:
        DataError: if ``config.data`` cannot be read.
        InvalidInput: if the batch is larger than the training set.

    >>> result = run(Config(hidden=(16,), epochs=1))
    >>> result.curves["sgd"]["balanced"].step_loss.shape
    (1, 14)
    """
    data = training.images(config.data, config.batch_size)
    given = {name: getattr(config, f"lr_{name}") for name in OPTIMIZERS}
    to_tune = [name for name in OPTIMIZERS if config.tune and given[name] is None]
    untuned = len(OPTIMIZERS) - len(to_tune) + config.float64 * len(OPTIMIZERS)
    num_runs = len(STARTS) * (untuned + len(TUNING_RATES) * len(to_tune))
    trained: set[tuple[str, str, float]] = set()

    def trainer(data: datasets.Dataset, study: str) -> Callable[[str, str, float], Curves]:
        starts = _starts(data, config)
        minibatches = _minibatches(data, config)
        rows = {name: _trainer(row, data, minibatches, config) for name, row in OPTIMIZERS.items()}

        def train(name: str, start: str, rate: float) -> Curves:
            what = f"{OPTIMIZERS[name].label}{study}, {start} start, learning rate {rate:g}"

            def after_epoch(epochs: int) -> None:
                runs = len(trained) + epochs / config.epochs
                running.progress(runs / num_runs, what)

            def compute() -> Cell:
                return rows[name](starts[start], rate, after_epoch)._asdict()

            cell = running.store(name + study, f"{start}, {rate!r}", compute)
            trained.add((name + study, start, rate))
            arrays = {field: np.array(cell[field]) for field in Curves._fields[:3]}
            return Curves(**arrays, seconds_per_step=cell["seconds_per_step"])

        return train

    train, rates, curves, tuned = trainer(data, ""), {}, {}, {}
    for name, optimizer in OPTIMIZERS.items():
        tried = TUNING_RATES if name in to_tune else (given[name] or optimizer.learning_rate,)
        found = {start: {rate: train(name, start, rate) for rate in tried} for start in STARTS}
        losses = {start: [_mean_loss(c) for c in found[start].values()] for start in STARTS}
        rates[name] = tried[int(np.argmin(np.max(list(losses.values()), axis=0)))]
        curves[name] = {start: found[start][rates[name]] for start in STARTS}
        best = {start: tried[int(np.argmin(losses[start]))] for start in STARTS}
        tuned[name] = {start: (best[start], found[start][best[start]]) for start in STARTS}
    exact = {}
    if config.float64:
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            x_train, x_test = (jnp.asarray(x, jnp.float64) for x in (data.x_train, data.x_test))
            double = data._replace(x_train=x_train, x_test=x_test)
            train = trainer(double, ", float64")
            exact = {n: {s: train(n, s, rates[n]) for s in STARTS} for n in OPTIMIZERS}
    return Result(config, data.name, rates, curves, tuned, exact)


def _mean_loss(curves: Curves) -> float:
    # A rate that diverges for one seed is no candidate: NaN becomes infinity.
    return float(np.nan_to_num(curves.final_loss, nan=np.inf).mean())


def _seed_keys(config: Config) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(config.seeds))


def _starts(data: datasets.Dataset, config: Config) -> dict[str, Params]:
    """Draw the two starts of each seed; all leaves have a leading axis of seeds."""
    sizes = (data.x_train.shape[1], *config.hidden, data.num_classes)

    def both(key: jax.Array) -> tuple[Params, Params]:
        init_key, scale_key = jax.random.split(key)
        # The same balanced start in every precision; the two starts agree to its rounding.
        drawn = init_mlp(init_key, sizes, dtype=jnp.float32)
        params = jax.tree.map(lambda w: w.astype(data.x_train.dtype), drawn)
        return params, unbalance(scale_key, params)

    return dict(zip(STARTS, jax.jit(jax.vmap(both))(_seed_keys(config)), strict=True))


def _trainer(
    optimizer: Optimizer,
    data: datasets.Dataset,
    minibatches: Callable[[int], tuple[jax.Array, jax.Array]],
    config: Config,
) -> Callable[[Params, float, Callable[[int], None]], Curves]:
    """Return ``train(start, learning_rate, after_epoch)`` for one optimizer.

    Each segment of an epoch is one call of a compiled scan, with the test
    error between them.
    """
    x, y = data.x_train, data.y_train
    spec = jax.ShapeDtypeStruct((config.batch_size, x.shape[1]), x.dtype)

    def segment(
        rate: jax.Array, x: jax.Array, y: jax.Array, params: Params, state: Any, minibatches: Any
    ) -> tuple[Params, Any, jax.Array]:
        def loss(params: Params, minibatch: Any) -> Any:
            rows, key = minibatch
            return _loss(params, x[rows], y[rows], key=key, dropout=config.dropout)

        return training.descend(loss, optimizer.make(rate, spec), params, state, minibatches)

    # The learning rate is an argument, so that tuning compiles once, not once per rate.
    run_segment = jax.jit(jax.vmap(segment, in_axes=(None, None, None, 0, 0, 0)))
    init_state = jax.jit(lambda rate, params: jax.vmap(optimizer.make(rate, spec).init)(params))

    def train(params: Params, learning_rate: float, after_epoch: Callable[[int], None]) -> Curves:
        rate = jnp.asarray(learning_rate, x.dtype)

        def segments() -> Iterator[tuple[jax.Array, jax.Array]]:
            for epoch in range(config.epochs):
                order, dropout_keys = minibatches(epoch)
                for i in range(order.shape[1]):
                    yield order[:, i], dropout_keys[:, i]
                after_epoch(epoch + 1)

        found = training.train(
            partial(run_segment, rate, x, y),
            lambda params: _evaluate_seeds(params, data.x_test, data.y_test)[1],
            params,
            init_state(rate, params),
            segments(),
            warm_up=True,
        )
        return Curves(
            step_loss=np.concatenate(found.losses, axis=1),
            test_error=100 * np.stack(found.measured, axis=1),
            final_loss=np.asarray(_evaluate_seeds(found.params, x, y)[0]),
            seconds_per_step=float(np.median(found.seconds)) / found.losses[0].shape[1],
        )

    return train


def _minibatches(
    data: datasets.Dataset, config: Config
) -> Callable[[int], tuple[jax.Array, jax.Array]]:
    """Return ``minibatches(epoch)``: rows of the training set and dropout keys.

    The rows are (seeds, segments, steps of a segment, batch), the keys lack
    the last axis. An epoch is cut into segments because three epochs of MNIST
    are 1800 steps, of which four points of test error would show no curve.
    """
    n = len(data.x_train)
    steps = n // config.batch_size
    segments = _segments(steps, config.epochs)

    def one_seed(key: jax.Array, epoch: jax.Array) -> tuple[jax.Array, jax.Array]:
        order_key, dropout_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = training.shuffled(order_key, n, config.batch_size)
        order = order.reshape(segments, steps // segments, config.batch_size)
        return order, jax.random.split(dropout_key, order.shape[:2])

    return partial(jax.jit(jax.vmap(one_seed, in_axes=(0, None))), _seed_keys(config))


def _segments(steps: int, epochs: int) -> int:
    """Return into how many equal parts to cut an epoch: about 24 in the whole training."""
    wanted = max(1, 24 // epochs)
    return max(parts for parts in range(1, wanted + 1) if steps % parts == 0)


def _loss(params: Params, x: jax.Array, y: jax.Array, *, key: jax.Array, dropout: float) -> Any:
    """Compute the mean cross-entropy of a minibatch, with dropout on hidden units."""
    layer = itertools.count()

    def activation(h: jax.Array) -> jax.Array:
        h = jax.nn.relu(h)
        if dropout == 0:
            return h
        keep = jax.random.bernoulli(jax.random.fold_in(key, next(layer)), 1 - dropout, h.shape)
        return jnp.where(keep, h / (1 - dropout), 0)

    logits = mlp(params, x, activation=activation)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _evaluate(params: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the mean cross-entropy and the error rate, without dropout."""

    def one(example: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return training.evaluate(mlp, params, example[0][None], example[1][None])

    loss, wrong = jax.lax.map(one, (x, y), batch_size=_EVALUATION_CHUNK)
    return loss.mean(), wrong.mean()


_evaluate_seeds = jax.jit(jax.vmap(_evaluate, in_axes=(0, None, None)))


def _gaps(curves: dict[str, dict[str, Curves]]) -> dict[str, np.ndarray]:
    """The :func:`median_gap` of every optimizer, (seeds,)."""
    return {
        name: median_gap(*(starts[start].step_loss for start in STARTS))
        for name, starts in curves.items()
    }


def table(result: Result) -> Table:
    """Summarise ``result``, mean ± standard deviation over seeds where there are several."""
    rows = []
    gaps, exact = _gaps(result.curves), _gaps(result.exact)
    for name, starts in result.curves.items():
        balanced, unbalanced = (starts[start] for start in STARTS)
        loss_distance = start_distance(balanced.step_loss, unbalanced.step_loss)
        error_distance = start_distance(balanced.test_error, unbalanced.test_error)
        for start, curves in starts.items():
            is_first = start == STARTS[0]
            rate, best = result.tuned[name][start]
            row = [
                OPTIMIZERS[name].label,
                f"{result.learning_rates[name]:g}",
                start,
                _cell(curves.final_loss, ".3g"),
                _cell(curves.test_error[:, -1], ".2f"),
                _cell(loss_distance, ".2g") if is_first else "",
                _cell(error_distance, ".2f") if is_first else "",
                f"{1e3 * curves.seconds_per_step:.3g}",
                _cell(100 * gaps[name], ".2g") if is_first else "",
            ]
            if exact:
                row.append(_cell(100 * exact[name], ".2g") if is_first else "")
            rows.append([*row, f"{rate:g}", _cell(best.final_loss, ".3g")])
    columns = ["optimizer", "rate", "start", "final\nloss", "test\nerror %"]
    columns += ["max Δ\nloss", "max Δ\nerror %", "ms per\nstep", "median Δ\nloss %"]
    columns += ["median Δ %,\nfloat64"] * bool(exact)
    columns += ["best rate\nof start", "final loss\nat it"]
    title = (
        f"{_setting(result)}, float32\n"
        "Δ: between the two starts' curves at one rate; median Δ loss: over steps, as a part of "
        "the larger loss"
    )
    if result.config.tune:
        rates = ", ".join(f"{rate:g}" for rate in TUNING_RATES)
        title += (
            f"\nrate: of {rates} the one with the lowest final loss from the start that does worse "
            "with it; best rate: from this start alone"
        )
    return Table(title, columns, rows)


def _setting(result: Result) -> str:
    config, layers = result.config, "-".join(map(str, result.config.hidden))
    return (
        f"{result.dataset}, hidden layers {layers}, batch {config.batch_size}, "
        f"{config.epochs} epochs, dropout {config.dropout:g}, {config.seeds} seed(s)"
    )


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells."""
    best = {n: {s: rate for s, (rate, _) in row.items()} for n, row in result.tuned.items()}
    return {
        "dataset": result.dataset,
        "learning_rates": result.learning_rates,
        "best_rates": best,
        "median_gaps": {"float32": _gaps(result.curves), "float64": _gaps(result.exact)},
    }


def plot(result: Result, path: Path) -> None:
    """Draw the distance of the losses from the two starts, one line per optimizer, and the losses.

    Running medians of the distances, running means of the losses, over a fiftieth of the training.
    Distances below a tenth of the precision's ε are drawn there. Bands are ± one standard deviation
    over seeds, if there are several. A curve that becomes NaN or infinite ends in a cross.
    """
    figure_module = require("matplotlib.figure", "cli")  # without pyplot: no display, no state
    panels = {"float32": result.curves} | ({"float64": result.exact} if result.exact else {})
    figure = figure_module.Figure(figsize=(4.6 * (1 + len(panels)), 4.8), layout="constrained")
    *gap_axes, loss_axes = figure.subplots(1, 1 + len(panels))
    config = result.config
    for axes, (precision, curves) in zip(gap_axes, panels.items(), strict=True):
        floor = float(np.finfo(precision).eps) / 10
        for i, (name, starts) in enumerate(curves.items()):
            # That a curve is infinite is the finding, not a warning.
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.abs(starts[STARTS[0]].step_loss - starts[STARTS[1]].step_loss)
            shown = np.maximum(_running(np.median, gap), floor)
            percent = 100 * median_gap(*(starts[start].step_loss for start in STARTS)).mean()
            label = f"{OPTIMIZERS[name].label}: {percent:.2g} %"
            style = {"color": f"C{i}", "label": label, "linewidth": 1.8}
            _draw(axes, config.epochs * np.arange(shown.shape[1]) / shown.shape[1], shown, style)
        axes.set(yscale="log", title=f"{precision}: distance of the two starts")
        legend = "median of |Δ loss| / loss"
        axes.legend(fontsize="small", title=legend, title_fontsize="small")
    gap_axes[0].set_ylabel("|training loss, balanced − unbalanced| (nats)")
    low = min(axes.get_ylim()[0] for axes in gap_axes)
    high = min(20.0, max(axes.get_ylim()[1] for axes in gap_axes))
    for axes in gap_axes:
        axes.set_ylim(low, high)
    smallest = []
    for i, (name, starts) in enumerate(result.curves.items()):
        for start, row in starts.items():
            style = {
                "color": f"C{i}",
                "linestyle": "-" if start == "balanced" else "--",
                # Where the two coincide the dashes must show on the solid line.
                "linewidth": 3.0 if start == "balanced" else 1.6,
                "alpha": 0.45 if start == "balanced" else 1.0,
                "label": f"{OPTIMIZERS[name].label}, {start} ({result.learning_rates[name]:g})",
            }
            loss = _running_mean(row.step_loss)
            # The k-th minibatch's loss is that of the parameters after k − 1 steps.
            _draw(loss_axes, config.epochs * np.arange(loss.shape[1]) / loss.shape[1], loss, style)
            smallest.append(loss[np.isfinite(loss)].min())
    first = next(iter(result.curves.values()))[STARTS[0]]
    initial_loss = first.step_loss[:, 0].mean()
    loss_axes.set(
        yscale="log",
        ylim=(max(min(smallest) / 2, 1e-8), 3 * initial_loss),
        ylabel="training loss (nats)",
        title="float32: the losses (learning rate)",
    )
    loss_axes.legend(fontsize="x-small", loc="upper right")
    for axes in (*gap_axes, loss_axes):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    lines = "lines: running medians, of losses means, over a fiftieth of the training"
    band = f"bands: ± 1 standard deviation over {config.seeds} seeds"
    figure.suptitle(
        f"{_setting(result)}, {first.step_loss.shape[1]} steps\n{lines}"
        + (f"; {band}" if config.seeds > 1 else ""),
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)


def _running_mean(curves: np.ndarray) -> np.ndarray:
    """Average over the last fiftieth of the training, over what there is at its beginning."""
    return _running(np.mean, curves)


def _running(of: Callable[..., Any], curves: np.ndarray) -> np.ndarray:
    width = max(1, curves.shape[1] // 50)
    found = [of(curves[:, max(0, t - width) : t], axis=1) for t in range(1, curves.shape[1] + 1)]
    return np.stack(found, axis=1)


def _draw(axes: Any, epochs: np.ndarray, curves: np.ndarray, style: dict[str, Any]) -> None:
    finite = np.isfinite(curves).all(axis=0)
    # From the first number that is not finite on there is no curve.
    end = len(finite) if finite.all() else int(np.argmin(finite))
    if end < len(finite):
        style = {**style, "label": style["label"] + " (diverges)"}
        last = max(end - 1, 0)
        axes.plot(epochs[last], curves[:, last].mean(), "x", markersize=9, color=style["color"])
    mean, deviation = curves[:, :end].mean(axis=0), curves[:, :end].std(axis=0)
    axes.plot(epochs[:end], mean, **style)
    if len(curves) > 1:
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(epochs[:end], mean - deviation, mean + deviation, **band)


def _cell(values: np.ndarray, form: str) -> str:
    if not np.isfinite(values).all():
        return "diverged"
    mean = f"{values.mean():{form}}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():{form}}"
