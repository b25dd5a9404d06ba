"""What controls capacity? Error and norms of one-hidden-layer networks against their width.

ReLU networks of more and more hidden units are trained until they fit the training set. If their
number controlled capacity, the test error would turn up again once the training error is zero.
Neyshabur, Tomioka & Srebro, "In search of the real inductive bias", ICLR 2015 workshop
(arXiv:1412.6614), found that it keeps falling. Here it is measured beside norms of the weights: as
they are, and per margin.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.capacity import (
    fisher_rao_norm,
    log_group_norm,
    log_layer_product_norm,
    log_margin_normalized,
    log_spectral_complexity,
    log_spectral_product,
    margins,
)
from jaxinv.experiments import datasets, resuming, training
from jaxinv.experiments.discussion import whole_numbers
from jaxinv.experiments.options import (
    count_option,
    data_option,
    option,
    out_option,
    positive_float,
    probability,
    seeds_option,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells
from jaxinv.experiments.training import Running
from jaxinv.networks import init_mlp, mlp
from jaxinv.paths import log_path_norm
from jaxinv.typing import Params

FIGURE = "widths.png"
STUDY = "widths"
_QUANTILE = 0.05  # of the margins: the worst examples left out


class Measure(NamedTuple):
    """A norm, and whether it is multiplied by c when the network is."""

    label: str
    short: str  # in the table
    log: Callable[[Params, Any], Any]  # (params, examples) -> logarithm
    per_margin: bool


MEASURES = {
    "path_1": Measure("path norm, p = 1", "φ₁", lambda w, x: log_path_norm(mlp, w, x, p=1), True),
    "path_2": Measure("path norm, p = 2", "φ₂", lambda w, x: log_path_norm(mlp, w, x, p=2), True),
    "frobenius_product": Measure(
        "product of Frobenius norms", "Π‖W‖_F", lambda w, x: log_layer_product_norm(mlp, w, x), True
    ),
    "spectral_product": Measure(
        "product of spectral norms", "Π‖W‖₂", lambda w, x: log_spectral_product(mlp, w, x), True
    ),
    "spectral_complexity": Measure(
        "spectral complexity", "R", lambda w, x: log_spectral_complexity(mlp, w, x), True
    ),
    "frobenius": Measure("Frobenius norm", "‖w‖_F", lambda w, x: log_group_norm(mlp, w, x), False),
    "fisher_rao": Measure(
        "Fisher–Rao norm (model)",
        "‖w‖_fr",
        lambda w, x: jnp.log(fisher_rao_norm(mlp, w, x)),
        False,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, until when."""

    data: Path | None = data_option()
    out: Path = out_option("inductive-bias", FIGURE)
    hidden: tuple[int, ...] = option(
        (8, 16, 32, 64, 128, 256, 512, 1024),
        "numbers of hidden units",
        parse=whole_numbers,
        metavar="N,N,...",
    )
    examples: int = count_option(1000, "training examples, at most")
    epochs: int = count_option(300, "passes over them, at most")
    loss: float = option(
        0.01,
        "mean cross-entropy on the training set at which to stop, its error being zero",
        parse=positive_float,
        metavar="L",
    )
    batch_size: int = count_option(100, "examples per step")
    lr: float = option(0.05, "learning rate", parse=positive_float, metavar="R")
    momentum: float = option(0.9, "of SGD", parse=probability, metavar="M")
    seeds: int = seeds_option(3)


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    dataset: str
    studies: dict[str, Cells]  # ["widths"][width]


# --- training -------------------------------------------------------------------------


class _State(NamedTuple):
    params: Params
    momentum: Any
    epoch: jax.Array
    error: jax.Array  # of the training set, a share
    loss: jax.Array  # ditto, mean cross-entropy
    first: jax.Array  # epoch of the first zero training error, -1 before
    at_first: Params  # the weights then


def _measure(params: Params, x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    """(share of errors, mean cross-entropy)."""
    logits = mlp(params, x)
    wrong = (logits.argmax(axis=-1) != y).astype(logits.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return wrong.mean(), losses.mean()


def train(config: Config, data: datasets.Dataset, width: int, key: Any) -> _State:
    """Train one network until it fits; everything is one loop inside the program.

    Args:
        config: how.
        data: on what.
        width: number of hidden units.
        key: for the start and the order of examples.

    Returns:
        the last state.
    """
    x, y, n = jnp.asarray(data.x_train), jnp.asarray(data.y_train), len(data.x_train)
    init_key, order_key = jax.random.split(key)
    sgd = optax.sgd(config.lr, momentum=config.momentum)

    def batch_loss(params: Params, rows: Any) -> Any:
        return training.cross_entropy(mlp, params, x[rows], y[rows])

    def epoch(s: _State) -> _State:
        key = jax.random.fold_in(order_key, s.epoch)
        order = training.shuffled(key, n, config.batch_size)
        params, momentum, _ = training.descend(batch_loss, sgd, s.params, s.momentum, order)
        error, loss = _measure(params, x, y)
        new = (error == 0) & (s.first < 0)
        return _State(
            params,
            momentum,
            s.epoch + 1,
            error,
            loss,
            jnp.where(new, s.epoch + 1, s.first),
            optax.tree.where(new, params, s.at_first),
        )

    def unfinished(s: _State) -> jax.Array:
        fits = (s.error == 0) & (s.loss <= config.loss)
        return (s.epoch < config.epochs) & ~fits & jnp.isfinite(s.loss)

    params = init_mlp(init_key, (x.shape[1], width, data.num_classes))
    zero, none = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
    start = _State(params, sgd.init(params), zero, *_measure(params, x, y), none, params)
    return jax.lax.while_loop(unfinished, epoch, start)


def cell(config: Config, data: datasets.Dataset, width: int) -> Cell:
    """Train all seeds of one width side by side, and measure what has come out.

    Args:
        config: how.
        data: on what; see :func:`jaxinv.experiments.datasets.load`.
        width: number of hidden units.

    Returns:
        numbers, and lists of one number per seed.

    >>> data = datasets.digits()
    >>> found = cell(Config(epochs=1, seeds=2), data, 4)
    >>> found["parameters"], len(found["test_error"]), found["first_zero"]
    (310, 2, [None, None])
    """
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    s = jax.jit(jax.vmap(functools.partial(train, config, data, width)))(keys)

    def share(params: Params) -> Any:
        return _measure(params, data.x_test, data.y_test)[0]

    def measures(params: Params) -> Any:
        x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
        margin = margins(mlp, params, x, y)
        logs = {name: m.log(params, x) for name, m in MEASURES.items()}
        return jnp.quantile(margin, _QUANTILE), margin.min(), logs

    quantile, smallest, logs = jax.jit(jax.vmap(measures))(s.params)
    test_error = np.asarray(jax.jit(jax.vmap(share))(s.params))
    at_first = np.asarray(jax.jit(jax.vmap(share))(s.at_first))
    first = np.asarray(s.first)
    return {
        "width": width,
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(s.params)),
        "epochs": s.epoch,
        "loss": s.loss,
        "train_error": 100 * np.asarray(s.error),  # percent, at the end
        "test_error": 100 * test_error,  # ditto
        "first_zero": [int(e) if e >= 0 else None for e in first],  # epoch
        "test_error_at_first_zero": [
            100 * float(error) if e >= 0 else None for e, error in zip(first, at_first, strict=True)
        ],
        "margin_quantile": quantile,
        "smallest_margin": smallest,
        "log_norms": logs,
    }


def _load(config: Config) -> datasets.Dataset:
    return training.images(config.data, config.batch_size, config.examples)


@training.driver
def run(config: Config, running: Running) -> Result:
    """Train every width that ``store`` does not hold yet.

    Raises:
        DataError: if ``config.data`` cannot be read.
        InvalidInput: if a batch is larger than the training set.
    """
    data = _load(config)
    thunks = {str(width): functools.partial(cell, config, data, width) for width in config.hidden}
    return Result(config, data.name, resuming.compute({STUDY: thunks}, *running))


# --- what is shown --------------------------------------------------------------------


def _cells(result: Result) -> list[Cell]:
    return sorted(result.studies[STUDY].values(), key=lambda found: found["width"])


def log_capacity(found: Cell, name: str) -> np.ndarray:
    """Logarithm of a norm of every seed, per margin where that has a meaning.

    >>> found = {"log_norms": {"path_1": [1.0], "frobenius": [1.0]}, "margin_quantile": [1.0]}
    >>> log_capacity(found, "path_1").tolist(), log_capacity(found, "frobenius").tolist()
    ([1.0], [1.0])
    """
    logs = np.array(found["log_norms"][name], float)
    if not MEASURES[name].per_margin:
        return logs
    margin = jnp.asarray(found["margin_quantile"], float)
    return np.asarray(log_margin_normalized(jnp.asarray(logs, float), margin))


class Turn(NamedTuple):
    """Whether the test error turns up again at large widths."""

    lowest: int  # the width of lowest mean test error
    rise: float  # percent: from there to the largest width
    spread: float  # standard error of that difference over seeds
    seen: bool  # rise > 2·spread


def u_turn(cells: list[Cell]) -> Turn:
    """Compare the largest width with the best one, seed by seed.

    >>> narrow, wide = ({"width": w, "test_error": e} for w, e in ((8, [3.0, 3.1]), (16, [5, 5.1])))
    >>> u_turn([narrow, wide]).seen, u_turn([wide | {"width": 4}, narrow]).seen
    (True, False)
    """
    errors = np.array([found["test_error"] for found in cells], float)
    lowest = int(errors.mean(axis=1).argmin())
    rise = errors[-1] - errors[lowest]
    spread = rise.std(ddof=1) / len(rise) ** 0.5 if len(rise) > 1 else np.inf
    largest = lowest == len(cells) - 1
    mean = float(rise.mean())
    seen = not largest and mean > 2 * float(spread)
    return Turn(cells[lowest]["width"], mean, float(spread), seen)


def verdict(result: Result) -> str:
    """Say which widths fit the training set, and whether a U-turn was seen."""
    cells = _cells(result)
    fit = [found["width"] for found in cells if None not in found["first_zero"]]
    lines = [
        f"zero training error in all {result.config.seeds} seed(s): H = {', '.join(map(str, fit))}"
        if fit
        else "no width reaches zero training error in all seeds"
    ]
    turn = u_turn(cells)
    if turn.lowest == cells[-1]["width"]:
        lines.append(f"no U-turn: the test error is lowest at the largest width, H = {turn.lowest}")
    else:
        lines.append(
            f"{'a U-turn' if turn.seen else 'no U-turn'}: the test error is lowest at "
            f"H = {turn.lowest}, and {turn.rise:+.2f} ± {turn.spread:.2f} % at the largest"
        )
    return "\n".join(lines)


def _shown(values: Any) -> str:
    if None in values:
        return "–"
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2f}"


def table(result: Result) -> Table:
    """One row for each width, mean ± standard deviation over seeds."""
    config = result.config
    columns = ["H", "parameters", "epochs", "train\nerror %", "test\nerror %", "at first\n0", "γ"]
    columns += [m.short + ("\n/γ" if m.per_margin else "") for m in MEASURES.values()]
    rows = []
    for found in _cells(result):
        logs = [log_capacity(found, name).mean() / np.log(10) for name in MEASURES]
        rows.append(
            [
                str(found["width"]),
                str(found["parameters"]),
                f"{np.mean(found['epochs']):.0f}",
                _shown(found["train_error"]),
                _shown(found["test_error"]),
                _shown(found["test_error_at_first_zero"]),
                f"{np.mean(found['margin_quantile']):.2f}",
                *(f"{log:.2f}" if np.isfinite(log) else "–" for log in logs),
            ]
        )
    title = (
        f"{result.dataset}, {config.examples} examples at most, {config.seeds} seed(s); SGD "
        f"{config.lr:g}, momentum {config.momentum:g}\nuntil the training error is 0 and the loss "
        f"{config.loss:g}, or {config.epochs} epochs\nγ: {_QUANTILE:.0%} quantile of the margins; "
        f"norms: mean log₁₀; φ: path norms, R: spectral complexity\n{verdict(result)}"
    )
    return Table(title, columns, rows)


def record(result: Result) -> dict[str, Any]:
    """What else goes into ``results.json``."""
    return {"dataset": result.dataset, "verdict": verdict(result)}


def plot(result: Result, path: Path) -> None:
    """Draw errors, and how norms grow with the width beside the number of parameters."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(16, 6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    cells = _cells(result)
    widths = [found["width"] for found in cells]

    def line(axes: Any, x: Any, rows: Any, label: str, **style: Any) -> None:
        values = np.array(rows, float)
        axes.errorbar(
            x, values.mean(1), values.std(1), label=label, marker="o", markersize=4, capsize=2,
            **style,
        )  # fmt: skip

    line(left, widths, [c["train_error"] for c in cells], "training", color="tab:blue")
    line(left, widths, [c["test_error"] for c in cells], "test, at the end", color="tab:red")
    fit = [c for c in cells if None not in c["first_zero"]]
    if fit:
        x = [c["width"] for c in fit]
        rows = [c["test_error_at_first_zero"] for c in fit]
        style = {"color": "tab:orange", "linestyle": "--"}
        line(left, x, rows, "test, at the first zero training error", **style)
        left.axvspan(x[0], widths[-1], color="0.93", zorder=0)
    left.set(xlabel="hidden units H", ylabel="error (%)", xscale="log", ylim=(0, None))
    left.set_title(f"{result.dataset}: error against width\n(shaded: zero training error)")
    for name, m in MEASURES.items():
        rows = [np.array(c["log_norms"][name], float) / np.log(10) for c in cells]
        line(middle, widths, rows, m.label)
    middle.set(xlabel="hidden units H", ylabel="log₁₀ of the norm", xscale="log")
    middle.set_title("norms as they are")
    if fit:
        count = np.array([c["parameters"] for c in fit], float)
        right.plot(x, count / count[0], "k:", label="number of parameters")
        for name, m in MEASURES.items():
            logs = np.array([log_capacity(c, name) for c in fit])
            label = m.label + (" per margin" if m.per_margin else "")
            line(right, x, np.exp(logs - logs[0].mean()), label)
        right.set(yscale="log", title=f"relative to H = {x[0]}, where the training error is zero")
    right.set(xlabel="hidden units H", ylabel="growth", xscale="log")
    for axes, shown in ((left, widths), (middle, widths), (right, [c["width"] for c in fit])):
        axes.set_xticks(shown, [str(w) for w in shown], rotation=45)
        axes.minorticks_off()
        if axes.has_data():
            below = {} if axes is left else {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
            axes.legend(fontsize=8, ncols=1 if axes is left else 2, **below)
    figure.savefig(path, dpi=150)
