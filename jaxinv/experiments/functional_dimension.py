"""Is there a large-scale limit? Full functional dimension against depth, width and training.

A ReLU network has at most d − h degrees of freedom on all inputs, with h hidden units: each has a
rescaling. Grigsby, Lindsey and Rolnick (2023, arXiv:2306.06179) estimate how often random networks
have no other symmetry: less often the deeper, more often the wider they are. Here every network
gets proven bounds (`jaxinv.functional_dimension`):

* ``initialisation``: networks w-w-…-w-1 at random parameters, over depths and widths;
* ``training``: a network on the digits along stochastic gradient descent, on all inputs and on the
  segments between images.

A network is *full* if its bounds meet at d − h. Where they do not, less than d − h is not proven
either: the share of full networks is a share from below.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.experiments import datasets, resuming, training
from jaxinv.experiments.options import (
    count_option,
    hidden_option,
    option,
    out_option,
    positive_float,
    seeds_option,
    widths,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells, Thunks
from jaxinv.experiments.training import Running, cross_entropy, descend, shuffled
from jaxinv.gates import everywhere, functional_dimension, segments
from jaxinv.networks import init_mlp, mlp
from jaxinv.typing import Params

FIGURE = "dimensions.png"
_numbers = functools.partial(option, parse=widths, metavar="N,N,...")
_BATCH, _RATE = 50, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the studies; larger ones take longer."""

    out: Path = out_option("functional-dimension", FIGURE)
    depths: tuple[int, ...] = _numbers((1, 2, 4, 8), "numbers of hidden layers")
    layer_widths: tuple[int, ...] = _numbers((4, 8, 16, 32), "widths of all layers")
    draws: int = count_option(10, "random networks per depth and width")
    bias_std: float = option(
        0.1, "standard deviation of the biases", parse=positive_float, metavar="STD"
    )
    hidden: tuple[int, ...] = hidden_option(16, 16)
    epochs: int = count_option(20, "passes over the training set")
    seeds: int = seeds_option(2)


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    studies: dict[str, Cells]  # [study][cell]


def _measured(params: Params, region: Any) -> dict[str, Any]:
    """Bounds, and the share of units of which less is proven than their parameters allow."""
    found = functional_dimension(mlp, params, region)
    missing = np.concatenate([layer.missing for layer in found.layers[:-1]] or [np.zeros(1)])
    always = np.concatenate([layer.always for layer in found.layers[:-1]] or [np.zeros(1)])
    return {
        "parameters": found.parameters,
        "rescaling": found.rescaling,
        "lower": found.lower,
        "upper": found.upper,
        "certain": found.certain,
        "units_short": float((missing > 0).mean()),
        "units_without_boundary": float((always != 0).mean()),
    }


def initialisation(config: Config) -> Thunks:
    """Bounds of random networks, per depth and width."""

    def cell(depth: int, width: int) -> Cell:
        sizes = (width,) * (depth + 1) + (1,)
        region = everywhere(jax.ShapeDtypeStruct((1, width), np.float32))
        found = [
            _measured(init_mlp(jax.random.key(seed), sizes, bias_std=config.bias_std), region)
            for seed in range(config.draws)
        ]
        return {"depth": depth, "width": width} | {
            name: [one[name] for one in found] for name in found[0]
        }

    return {
        f"depth {depth}, width {width}": functools.partial(cell, depth, width)
        for width in config.layer_widths
        for depth in config.depths
    }


def trained(config: Config) -> Thunks:
    """Bounds along training on the digits, on all inputs and between images."""
    data = datasets.digits()
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    sizes = (x.shape[1], *config.hidden, data.num_classes)
    sgd = optax.sgd(_RATE)

    def loss(w: Params, rows: jax.Array) -> jax.Array:
        return cross_entropy(mlp, w, x[rows], y[rows])

    @jax.jit
    def epoch(params: Params, order: jax.Array) -> Params:
        return descend(loss, sgd, params, sgd.init(params), order)[0]

    def cell(last: int) -> Cell:
        rows = []
        for seed in range(config.seeds):
            params = init_mlp(jax.random.key(seed), sizes, bias_std=config.bias_std)
            for i in range(last):
                key = jax.random.fold_in(jax.random.key(100 + seed), i)
                params = epoch(params, shuffled(key, len(x), _BATCH))
            rows.append(
                {"loss": float(cross_entropy(mlp, params, x, y))}
                | {
                    name: _measured(params, region)
                    for name, region in (
                        ("all inputs", everywhere(x[:1])),
                        ("segments between images", segments(x)),
                    )
                }
            )
        return {"epoch": last, "seeds": rows}

    marks = sorted({0, 1, 5, config.epochs})
    marks = [mark for mark in marks if mark <= config.epochs]
    return {f"epoch {mark}": functools.partial(cell, mark) for mark in marks}


@training.driver
def run(config: Config, running: Running) -> Result:
    """Compute all cells.

    >>> few = Config(depths=(1,), layer_widths=(2,), draws=1, hidden=(2,), epochs=1, seeds=1)
    >>> cells = run(few).studies["initialisation"]["depth 1, width 2"]
    >>> cells["parameters"], cells["upper"]
    ([9], [7])
    """
    studies = {"initialisation": initialisation(config), "training": trained(config)}
    return Result(config, resuming.compute(studies, *running))


def full(cell: Cell) -> float:
    """The share of networks that are proven to have full functional dimension.

    >>> full({"certain": [True, True, False, True]})
    0.75
    """
    return float(np.mean(cell["certain"]))


def _short(lower: Any, upper: Any) -> float:
    """What is not proven, as a share of d − h."""
    return float(np.mean((np.asarray(upper) - np.asarray(lower)) / np.asarray(upper)))


def table(result: Result) -> Table:
    """A row per depth and width, and per epoch and region."""
    rows = []
    for cell in result.studies["initialisation"].values():
        what = f"{cell['width']} wide, {cell['depth']} deep"
        numbers = (full(cell), _short(cell["lower"], cell["upper"]), np.mean(cell["units_short"]))
        rows.append([what, str(cell["parameters"][0]), "all inputs", *map(_percent, numbers)])
    for cell in result.studies["training"].values():
        for region in ("all inputs", "segments between images"):
            found = [row[region] for row in cell["seeds"]]
            numbers = (
                np.mean([one["certain"] for one in found]),
                _short([one["lower"] for one in found], [one["upper"] for one in found]),
                np.mean([one["units_short"] for one in found]),
            )
            what = f"digits, epoch {cell['epoch']}"
            rows.append([what, str(found[0]["parameters"]), region, *map(_percent, numbers)])
    columns = ["network", "d", "region", "full", "not proven of d − h", "units short"]
    draws = f"{result.config.draws} draws per row; in training, seeds: {result.config.seeds}"
    return Table(f"Functional dimension, proven; {draws}", columns, rows)


def _percent(share: Any) -> str:
    return f"{100 * float(share):.3g} %"


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells: nothing."""
    return {}


def plot(result: Result, path: Path) -> None:
    """Draw the share of full networks, what is not proven, and both along training."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    cells = list(result.studies["initialisation"].values())
    for i, width in enumerate(result.config.layer_widths):
        own = [cell for cell in cells if cell["width"] == width]
        depths, shares = [cell["depth"] for cell in own], [full(cell) for cell in own]
        # The standard error of a share among so many draws.
        errors = [
            np.sqrt(s * (1 - s) / len(c["certain"])) for s, c in zip(shares, own, strict=True)
        ]
        left.errorbar(depths, shares, errors, fmt="o-", color=f"C{i}", label=f"width {width}")
        lost = [100 * _short(cell["lower"], cell["upper"]) for cell in own]
        middle.plot(depths, lost, "o-", color=f"C{i}", label=f"width {width}")
    draws = f"{result.config.draws} draws, biases of std {result.config.bias_std:g}, on all inputs"
    left.set(xlabel="hidden layers", ylabel="share of full networks", ylim=(-0.05, 1.05))
    left.set_title(
        f"w-w-…-w-1 at random: proven full\n({draws};\nbars: standard error)", fontsize="medium"
    )
    middle.set(xlabel="hidden layers", ylabel="(upper − lower bound) / (d − h), %")
    middle.set_title("the part of d − h\nthat is not proven (mean)", fontsize="medium")
    for name, style in (("all inputs", "o-"), ("segments between images", "s--")):
        own = list(result.studies["training"].values())
        lost = [
            100
            * _short([r[name]["lower"] for r in c["seeds"]], [r[name]["upper"] for r in c["seeds"]])
            for c in own
        ]
        right.plot([cell["epoch"] for cell in own], lost, style, label=name)
    sizes = "-".join(map(str, (64, *result.config.hidden, 10)))
    right.set(xlabel="epochs of SGD", ylabel="(upper − lower bound) / (d − h), %")
    right.set_title(f"digits, {sizes}\n(mean over seeds: {result.config.seeds})", fontsize="medium")
    right.set_xscale("symlog", linthresh=1)
    for axes in (left, middle):
        axes.set_xticks(result.config.depths)
    for axes in (left, middle, right):
        axes.legend()
    figure.savefig(path, dpi=130)
