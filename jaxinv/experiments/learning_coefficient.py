"""Learning coefficients: estimates by sampling against exact ones, and between the bounds.

Every model is a network fn with Gaussian noise and a true parameter w*, so that
K(w) = mean_x ‖fn(w, x) − fn(w*, x)‖²/2, and every estimate is reported with rank/2 ≤ λ ≤ d/2, from
the rank of the Fisher information at w*:

- crossings: fn = w₁^{k/2} w₂^{l/2}, where λ = min(1/k, 1/l);
- reduced-rank: all four cases of Aoyagi & Watanabe (2005), see :func:`jaxinv.bayes.reduced_rank`;
- deep-linear: three layers of linear units, see :func:`jaxinv.bayes.deep_linear`;
- examples: estimates against n, for multiplicity 1 and above, where they tend to λ like 1/log n;
- networks: ReLU and tanh networks that are their own truth: λ = rank/2 at regular points;
- trained: a ReLU network trained on digits, at the n and the temperature 1/log n of its data. It
  does not realise the truth, so that its λ has no bounds known from theory.

A study consists of cells, each of which a run that was interrupted does not compute again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.bayes import (
    LocalLearningCoefficient,
    learning_coefficient_bounds,
    local_learning_coefficient,
    rlct,
)
from jaxinv.experiments import datasets, resuming, training
from jaxinv.experiments.options import count_option, out_option
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells, Thunks
from jaxinv.experiments.training import Running
from jaxinv.networks import init_mlp, mlp
from jaxinv.typing import Network, Params

FIGURE = "estimates.png"

CROSSINGS = ((2, 4), (4, 2), (2, 6))
# (inputs, hidden, outputs, true rank), of multiplicity 1: cases 1, 1, 1, 2, 2, 3, 4, 4.
REDUCED_RANK = (
    (2, 2, 2, 0),
    (3, 2, 3, 0),
    (4, 2, 3, 1),
    (3, 1, 5, 1),
    (2, 1, 7, 0),
    (5, 1, 2, 0),
    (2, 5, 2, 0),
    (1, 4, 1, 0),
)
DEEP_LINEAR = (((2, 3, 2, 3), 1), ((3, 2, 2, 3), 1), ((2, 4, 3, 2), 1))
GROWING = (((2, 2, 2), 0), ((1, 1, 1), 0), ((2, 2, 2), 1), ((2, 3, 3, 2), 0))
_ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh}
# Narrower ones are ill-conditioned: for tanh 2-3-1, of condition 10⁵, the chains are too short.
_SIZES = ((3, 4, 2), (4, 5, 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How long to sample."""

    out: Path = out_option("learning-coefficient", FIGURE)
    chains: int = count_option(16, "chains of each estimate")
    steps: int = count_option(
        20000,
        "steps of a chain; deep and growing models take three times, crossings ten times as many",
    )
    hidden: int = count_option(8, "hidden units of the network trained on digits")
    epochs: int = count_option(500, "passes of its training")


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    studies: dict[str, Cells]  # [study][cell]


# --- models ---------------------------------------------------------------------------


def crossing(exponents: tuple[int, ...]) -> tuple[Network, Params, jax.Array]:
    """Return (fn, w*, x) with K = Π w_i^{k_i}/2 for even k_i.

    >>> fn, w, x = crossing((2, 4))
    >>> fn(w + 2, x).tolist()  # 2¹·2²
    [[8.0]]
    """
    powers = [k // 2 for k in exponents]

    def fn(w: Params, x: jax.Array) -> jax.Array:
        return x * math.prod(w[i] ** k for i, k in enumerate(powers))

    return fn, jnp.zeros(len(powers)), jnp.ones((1, 1))


def linear(widths: tuple[int, ...], rank: int) -> tuple[Network, Params, jax.Array]:
    """Return (fn, w*, x): a linear network whose true map has this rank, 0 wherever it can be.

    >>> fn, w, x = linear((3, 2, 3), 1)
    >>> (fn(w, x) / x.max()).round().tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    one = {
        f"Dense_{i}": {"kernel": jnp.eye(a, b) * (jnp.arange(b) < rank).astype(float)}
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }
    # K = ‖B A − T‖²/2: inputs of covariance one.
    x = math.sqrt(widths[0]) * jnp.eye(widths[0])
    return functools.partial(mlp, activation=lambda h: h), one, x


def teacher(activation: str, sizes: tuple[int, ...]) -> tuple[Network, Params, jax.Array]:
    """Return (fn, w*, x): a random network on standard normal inputs, eight for each parameter.

    >>> fn, w, x = teacher("ReLU", (2, 3, 1))
    >>> x.shape
    (104, 2)
    """
    w = init_mlp(jax.random.key(1), sizes, bias_std=0.5)
    count = 8 * optax.tree.size(w)
    x = jax.random.normal(jax.random.key(2), (count, sizes[0]))
    return functools.partial(mlp, activation=_ACTIVATIONS[activation]), w, x


# --- cells ----------------------------------------------------------------------------


def _cell(
    config: Config,
    model: Callable[[], tuple[Network, Params, jax.Array]],
    exact: rlct.LearningCoefficient | None,
    *,
    n: int,
    longer: int = 1,
    scales: float = 2.0,
) -> Cell:
    fn, w, x = model()
    truth = fn(w, x)

    def loss(w: Params) -> jax.Array:
        return ((fn(w, x) - truth) ** 2).sum() / (2 * len(x))

    # beta = 1: the loss is a population's, so n is nothing but the inverse temperature.
    found = local_learning_coefficient(
        loss, w, n, jax.random.key(0), beta=1.0, num_chains=config.chains,
        num_steps=longer * config.steps, num_warmup=max(1, longer * config.steps // 5),
        scales=scales,
    )  # fmt: skip
    return _numbers(found, learning_coefficient_bounds(fn, w, x, "gaussian"), n, exact)


def _numbers(
    found: LocalLearningCoefficient, bounds: Any, n: int, exact: rlct.LearningCoefficient | None
) -> Cell:
    return {
        "exact": None if exact is None else str(exact.value),
        "multiplicity": None if exact is None else exact.multiplicity,
        "rank": int(bounds.rank),
        "parameters": int(bounds.parameters),
        "certain": bool(bounds.certain),
        "n": n,
        "value": float(found.value),
        "standard_error": float(found.standard_error),
        "drift": float(found.drift),
        "acceptance": float(found.acceptance.mean()),
        "diverged": int(found.diverged.sum()),
    }


def _trained(config: Config) -> Cell:
    data = datasets.digits()
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    w = init_mlp(jax.random.key(3), (x.shape[1], config.hidden, data.num_classes))
    adam = optax.adam(0.01)

    def loss(w: Params, batch: Any) -> jax.Array:
        return training.cross_entropy(mlp, w, *batch)

    @jax.jit
    def train(w: Params) -> Params:
        whole = lambda w, _: loss(w, (x, y))  # noqa: E731
        return training.descend(whole, adam, w, adam.init(w), None, length=config.epochs)[0]

    w = train(w)
    found = local_learning_coefficient(
        loss, w, len(x), jax.random.key(0), data=(x, y), num_chains=min(4, config.chains),
        num_steps=max(1, config.steps // 20), num_warmup=max(1, config.steps // 20),
    )  # fmt: skip
    cell = _numbers(found, learning_coefficient_bounds(mlp, w, x, "softmax"), len(x), None)
    return {**cell, "loss": float(loss(w, (x, y)))}


def cells(config: Config) -> dict[str, Thunks]:
    """Every cell, by study and name, yet to be computed.

    >>> list(cells(Config())["crossings"])
    ['w1^2 w2^4', 'w1^4 w2^2', 'w1^2 w2^6']
    """
    estimate = functools.partial(functools.partial, _cell, config)
    return {
        "crossings": {
            " ".join(f"w{i}^{k}" for i, k in enumerate(exponents, 1)): estimate(
                functools.partial(crossing, exponents), rlct.normal_crossing(exponents),
                n=10**6, longer=10, scales=4.0,
            )
            for exponents in CROSSINGS
        },
        "reduced-rank": {
            f"{m}-{h}-{k}, rank {r}": estimate(
                functools.partial(linear, (m, h, k), r), rlct.reduced_rank(m, h, k, r), n=10**4
            )
            for m, h, k, r in REDUCED_RANK
        },
        "deep-linear": {
            f"{'-'.join(map(str, widths))}, rank {r}": estimate(
                functools.partial(linear, widths, r), rlct.deep_linear(widths, r),
                n=10**5, longer=3,
            )
            for widths, r in DEEP_LINEAR
        },
        "examples": {
            f"{'-'.join(map(str, widths))}, rank {r}, n = 10^{power}": estimate(
                functools.partial(linear, widths, r), rlct.deep_linear(widths, r),
                n=10**power, longer=3,
            )
            for widths, r in GROWING
            for power in (2, 3, 4, 5, 6)
        },
        "networks": {
            f"{activation} {'-'.join(map(str, sizes))}": estimate(
                functools.partial(teacher, activation, sizes), None, n=10**6, longer=3
            )
            for activation in _ACTIVATIONS
            for sizes in _SIZES
        },
        "trained": {f"digits, 64-{config.hidden}-10": functools.partial(_trained, config)},
    }  # fmt: skip


@training.driver
def run(config: Config, running: Running) -> Result:
    """Compute every cell that ``store`` does not hold yet.

    All of it takes minutes; one cell alone:

    >>> cell = cells(Config(chains=4, steps=500))["reduced-rank"]["1-4-1, rank 0"]()
    >>> cell["exact"], cell["rank"], cell["parameters"], 0 < cell["value"] < 1
    ('1/2', 0, 8, True)
    """
    return Result(config, resuming.compute(cells(config), *running))


# --- what is shown --------------------------------------------------------------------


def relative_error(cell: Cell) -> float:
    """λ̂/λ − 1, NaN where λ is not known.

    >>> relative_error({"value": 0.9, "exact": "3/4"})
    0.2
    """
    exact = cell["exact"]
    return math.nan if exact is None else round(cell["value"] / float(Fraction(exact)) - 1, 9)


def table(result: Result) -> Table:
    """Write one row for each estimate, but for those of the study examples only the last n."""
    rows = []
    for study, found in result.studies.items():
        for name, cell in found.items():
            if study == "examples" and cell["n"] < 10**6:
                continue
            error = relative_error(cell)
            rows.append(
                [
                    study,
                    name.partition(", n")[0],
                    "" if cell["exact"] is None else cell["exact"],
                    "" if cell["multiplicity"] is None else str(cell["multiplicity"]),
                    f"{cell['value']:.4g} ({cell['standard_error']:.1g})",
                    "" if math.isnan(error) else f"{100 * error:+.1f}",
                    f"{cell['rank'] / 2:g}",
                    f"{cell['parameters'] / 2:g}",
                    f"{cell['drift']:.1g}",
                ]
            )
    columns = [
        "study",
        "model",
        "λ",
        "m",
        "λ̂ (standard\nerror)",
        "error %",
        "rank/2",
        "d/2",
        "drift",
    ]
    config = result.config
    title = f"Local learning coefficients: {config.chains} chains of {config.steps} steps and more"
    return Table(title, columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells: the largest error where λ is known.

    >>> cell = {"value": 0.9, "exact": "3/4", "multiplicity": 1}
    >>> record(Result(Config(), {"crossings": {"one": cell}}))
    {'largest_relative_error': {'crossings': 0.2}}
    """
    largest = {
        study: max(errors)
        for study, found in result.studies.items()
        if (errors := [abs(relative_error(c)) for c in found.values() if c["multiplicity"] == 1])
    }
    return {"largest_relative_error": largest}


def plot(result: Result, path: Path) -> None:
    """Draw λ̂ against λ, λ̂ against n, and λ̂ between its bounds."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_exact(left, result)
    _plot_examples(middle, result.studies["examples"])
    _plot_bounds(right, result)
    figure.savefig(path, dpi=150)


def _plot_exact(axes: Any, result: Result) -> None:
    known = {
        study: [cell for cell in found.values() if cell["exact"] is not None]
        for study, found in result.studies.items()
        if study != "examples"
    }
    for study, found in known.items():
        if found:
            exact = [float(Fraction(cell["exact"])) for cell in found]
            bars = [2 * cell["standard_error"] for cell in found]
            axes.errorbar(exact, [c["value"] for c in found], bars, fmt="o", capsize=3, label=study)
    line = np.array([0.1, 6])
    axes.plot(line, line, "k-", linewidth=1, label="λ̂ = λ")
    axes.fill_between(line, 0.9 * line, 1.1 * line, alpha=0.2, label="within 10 %")
    axes.set(
        xscale="log", yscale="log", xlabel="exact λ", ylabel="estimate λ̂ (± 2 standard errors)"
    )
    axes.set_title("multiplicity 1: estimates against exact values")
    axes.legend()


def _plot_examples(axes: Any, found: Cells) -> None:
    curves: dict[str, list[Cell]] = {}
    for name, cell in found.items():
        curves.setdefault(name.partition(", n")[0], []).append(cell)
    for i, (name, points) in enumerate(curves.items()):
        n = np.array([cell["n"] for cell in points], float)
        exact, m = float(Fraction(points[0]["exact"])), points[0]["multiplicity"]
        label = f"{name}: λ = {points[0]['exact']}, m = {m}"
        bars = [2 * cell["standard_error"] for cell in points]
        values = [cell["value"] for cell in points]
        axes.errorbar(n, values, bars, fmt="o", color=f"C{i}", capsize=3, label=label)
        axes.plot(n, exact - (m - 1) / np.log(n), "--", color=f"C{i}", linewidth=1)
    axes.set(xscale="log", xlabel="n", ylabel="estimate λ̂ (± 2 standard errors)")
    axes.set_title("dashed: λ − (m − 1)/log n")
    axes.legend(fontsize="small")


def _plot_bounds(axes: Any, result: Result) -> None:
    shown = [
        (name, cell)
        for study in ("reduced-rank", "deep-linear", "networks")
        for name, cell in result.studies[study].items()
    ]
    for i, (_, cell) in enumerate(shown):
        ends = [cell["rank"] / 2, cell["parameters"] / 2]
        axes.plot(ends, [i, i], "C0|-", label="rank/2 … d/2" if i == 0 else None)
        bar = 2 * cell["standard_error"]
        label = "λ̂ (± 2 standard errors)" if i == 0 else None
        axes.errorbar([cell["value"]], [i], xerr=[bar], fmt="C1o", capsize=3, label=label)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize="small")
    axes.set(xlabel="λ", title="estimates between rank/2 and d/2")
    axes.invert_yaxis()
    axes.legend()
