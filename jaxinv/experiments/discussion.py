"""Is node-wise rescaling all we should worry about? Six studies of the rank of the Jacobian.

A ReLU network with d parameters and h hidden units has at most d − h degrees of freedom. Each study
asks when the rank on n inputs is less, that is unexplained = d − h − rank > 0 (dead parameters
count here as unexplained):

- examples: how many inputs show the whole rank?
- inputs: does it depend on the distribution of the inputs?
- draws: how is unexplained distributed over random networks?
- training: does SGD lower the rank on its training set, the batch functional dimension?
  Bona-Pellissier, Malgouyres & Bachoc, "Geometry-induced implicit regularization in deep ReLU
  neural networks", 2024 (arXiv:2402.08269), report that it does.
- shape: rank/(d − h) against depth at about fixed numbers of parameters, each larger than the last.
- depth: how likely is unexplained = 0? Grigsby, Lindsey & Rolnick, "Hidden symmetries of ReLU
  networks", ICML 2023 (arXiv:2306.06179): ever less with depth, ever more with width.

A study consists of cells, each of which a run that was interrupted does not compute again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.experiments import datasets, resuming
from jaxinv.experiments.ensembles import draw, first, parts, ranks
from jaxinv.experiments.options import (
    count_option,
    data_option,
    option,
    out_option,
    positive_float,
    positive_int,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells, Thunks
from jaxinv.experiments.training import Running, cross_entropy, descend, driver, shuffled
from jaxinv.networks import mlp
from jaxinv.typing import Params

FIGURE = "studies.png"
_BATCH, _RATE = 100, 0.1  # of SGD
_TRAINED_ON = 1437  # images of the study training: as many as there are digits to train on
_EPOCHS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # at which training is looked at


def whole_numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers of 1 or more, separated by commas.

    >>> whole_numbers("1,2,4")
    (1, 2, 4)
    """
    return tuple(map(positive_int, text.split(",")))


_numbers = functools.partial(option, parse=whole_numbers, metavar="N,N,...")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the studies; larger ones take longer."""

    data: Path | None = data_option(
        "directory with the four .gz files of MNIST or Fashion-MNIST, whose 28×28 images are "
        "averaged to 7×7 (default: the digits bundled with scikit-learn)",
    )
    out: Path = out_option("discussion", FIGURE)
    width: int = count_option(8, "width of both hidden layers on images")
    networks: int = count_option(3, "networks on images")
    examples: int = count_option(360, "inputs of the networks on images, at most")
    epochs: int = count_option(50, "passes over the training set")
    draws: int = count_option(100, "random networks per cell of the studies draws and depth")
    parameters: tuple[int, ...] = _numbers(
        (250, 500, 1000), "numbers of parameters, about, of the study shape"
    )
    depths: tuple[int, ...] = _numbers(
        (1, 2, 3, 4, 6), "numbers of hidden layers in the studies shape and depth"
    )
    layer_widths: tuple[int, ...] = _numbers((4, 8), "widths of the layers in the study depth")
    bias_std: float = option(
        0.1, "standard deviation of the biases", parse=positive_float, metavar="STD"
    )


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    studies: dict[str, Cells]  # [study][cell]


def _normal(n: int, features: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (n, features))


# --- studies: each returns its cells, yet to be computed ------------------------------


@functools.lru_cache(maxsize=1)
def _images(directory: Path | None) -> datasets.Dataset:
    """The images of all studies on images; those of 28×28 are averaged to 7×7."""
    data = datasets.load(directory)
    x_train, x_test = (_coarse(x) for x in (data.x_train, data.x_test))
    return data._replace(
        x_train=x_train[:_TRAINED_ON], y_train=data.y_train[:_TRAINED_ON], x_test=x_test
    )


def _image_networks(config: Config) -> Params:
    data = _images(config.data)
    sizes = (data.x_train.shape[1], config.width, config.width, data.num_classes)
    return draw(0, sizes, config.networks, config.bias_std)


def _first_images(config: Config) -> jax.Array:
    return jnp.asarray(_images(config.data).x_train[: config.examples])


def examples(config: Config) -> Thunks:
    """Rank against the number of inputs, each set part of the next."""
    images = _first_images(config)
    n, features = images.shape
    x = {_images(config.data).name: images, "standard normal": _normal(n, features)}
    sizes = sorted({max(1, n // 2**i) for i in range(7)})  # 360, 180, ..., 5

    def cell(name: str, size: int) -> Cell:
        found = ranks(_image_networks(config), first(x[name], size))
        return {**found, "inputs": name, "examples": size}

    return {f"{name}, {size}": functools.partial(cell, name, size) for name in x for size in sizes}


def inputs(config: Config) -> Thunks:
    """Rank against the distribution of the inputs.

    "scales" is made to visit as many activation patterns as possible: 3·r·N(0, I) with a log-normal
    length r of its own for each input, r = exp(2·N(0, 1)), so that inputs lie from far within the
    biases, where these decide what fires, to far outside.
    """
    images = _first_images(config)
    n, features = images.shape
    normal = _normal(n, features)
    length = jax.random.normal(jax.random.key(2), (n, 1))
    radius = jax.random.uniform(jax.random.key(3), (n, 1)) ** (1 / features)
    rows = {
        _images(config.data).name: images,
        "standard normal": normal,
        "uniform in ball": radius * normal / jnp.linalg.norm(normal, axis=1, keepdims=True),
        "scales": 3 * jnp.exp(2 * length) * normal,
    }

    def cell(x: jax.Array) -> Cell:
        return ranks(_image_networks(config), x)

    return {name: functools.partial(cell, x) for name, x in rows.items()}


def _coarse(x: Any) -> np.ndarray:
    side = round(x.shape[1] ** 0.5)
    if side**2 != x.shape[1] or side % 4 or side <= 8:
        return np.asarray(x)
    return np.asarray(x).reshape(-1, side // 4, 4, side // 4, 4).mean((2, 4)).reshape(len(x), -1)


def draws(config: Config) -> Thunks:
    """Ranks of many small networks on standard normal inputs, with zero and with random biases."""
    sizes = (6, 8, 8, 4)  # d = 164

    def cell(bias_std: float) -> Cell:
        return ranks(draw(1, sizes, config.draws, bias_std), _normal(200, sizes[0]))

    spreads = {"biases zero": 0.0, "biases random": config.bias_std}
    return {name: functools.partial(cell, spread) for name, spread in spreads.items()}


def training(config: Config) -> Thunks:
    """Rank on training images, on test images and on standard normal inputs along SGD."""
    data = _images(config.data)
    n = min(config.examples, len(data.x_test))
    x = {
        "training images": jnp.asarray(data.x_train[:n]),
        "test images": jnp.asarray(data.x_test[:n]),
        "standard normal": _normal(n, data.x_train.shape[1]),
    }
    epochs = [epoch for epoch in _EPOCHS if epoch < config.epochs] + [config.epochs]
    trained: dict[int, tuple[Params, jax.Array]] = {}

    def cell(epoch: int) -> Cell:
        if not trained:  # once for all cells, and not at all if none is missing
            trained.update(_train(_image_networks(config), data, epochs))
        params, losses = trained[epoch]
        found = {name: ranks(params, rows) for name, rows in x.items()}
        return {"epoch": epoch, "loss": losses.tolist(), "ranks": found}

    return {f"epoch {epoch}": functools.partial(cell, epoch) for epoch in epochs}


def _train(
    params: Params, data: datasets.Dataset, epochs: list[int]
) -> dict[int, tuple[Params, jax.Array]]:
    """The networks, trained side by side on the same minibatches, at these epochs."""
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    sgd = optax.sgd(_RATE)

    def loss(w: Params, rows: jax.Array) -> jax.Array:
        return cross_entropy(mlp, w, x[rows], y[rows])

    @jax.jit
    def epoch(params: Params, order: jax.Array) -> Params:
        # Plain SGD has no state to hand on.
        one = lambda w: descend(loss, sgd, w, sgd.init(w), order)[0]  # noqa: E731
        return jax.vmap(one)(params)

    found = {}
    for i in range(epochs[-1] + 1):
        if i in epochs:
            losses = jax.vmap(lambda w: cross_entropy(mlp, w, x, y))(params)
            found[i] = params, losses
        key = jax.random.fold_in(jax.random.key(4), i)
        params = epoch(params, shuffled(key, len(x), _BATCH))
    return found


def shape(config: Config) -> Thunks:
    """Rank/(d − h) of networks of several depths with about the same number of parameters."""
    features, out, count = 8, 4, max(1, config.draws // 10)

    def size(depth: int, width: int) -> int:
        return (features + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * out

    def cell(depth: int, budget: int) -> Cell:
        width = min(range(1, budget), key=lambda width: abs(size(depth, width) - budget))
        params = draw(2, (features, *[width] * depth, out), count, config.bias_std)
        found = ranks(params, _normal(budget, features))  # rows: four times the parameters
        return {"budget": budget, "depth": depth, "width": width, **found}

    return {
        f"{budget} parameters, depth {depth}": functools.partial(cell, depth, budget)
        for budget in config.parameters
        for depth in config.depths
    }


def depth(config: Config) -> Thunks:
    """How often unexplained = 0, in networks with one output and layers as wide as the input.

    Also on half of the inputs: what that lacks, yet more inputs would add.
    """

    def cell(width: int, depth: int) -> Cell:
        params = draw(3, (*[width] * (depth + 1), 1), config.draws, config.bias_std)
        d = sum(leaf[0].size for leaf in jax.tree.leaves(params))
        x = _normal(8 * d, width)
        # Where half of the inputs give the same rank, more inputs would hardly add to it.
        found, half = ranks(params, x), ranks(params, first(x, 4 * d))
        return {"width": width, "depth": depth, **found, "rank_of_half": half["rank"]}

    return {
        f"width {width}, depth {depth}": functools.partial(cell, width, depth)
        for width in config.layer_widths
        for depth in config.depths
    }


STUDIES: dict[str, Callable[[Config], Thunks]] = {
    "examples": examples,
    "inputs": inputs,
    "draws": draws,
    "training": training,
    "shape": shape,
    "depth": depth,
}


@driver
def run(config: Config, running: Running) -> Result:
    """Compute every cell that ``store`` does not hold yet.

    Raises:
        DataError: if ``config.data`` cannot be read.

    All of it takes minutes; one cell alone:

    >>> cells = STUDIES["depth"](Config(draws=4, depths=(1,), layer_widths=(2,)))
    >>> cell = cells["width 2, depth 1"]()
    >>> cell["d"], cell["group"], len(cell["rank"]), max(cell["rank"]) <= 9 - 2
    (9, 2, 4, True)
    """
    studies = {name: study(config) for name, study in STUDIES.items()}
    return Result(config, resuming.compute(studies, *running))


# --- what is shown --------------------------------------------------------------------


def ratio(cell: Mapping[str, Any]) -> np.ndarray:
    """rank/(d − h) of every network of a cell.

    >>> ratio({"d": 10, "group": 2, "rank": [8, 4]}).tolist()
    [1.0, 0.5]
    """
    return np.array(cell["rank"]) / (cell["d"] - cell["group"])


def unexplained(cell: Mapping[str, Any]) -> np.ndarray:
    """d − h − rank of every network of a cell.

    >>> unexplained({"d": 10, "group": 2, "rank": [8, 4]}).tolist()
    [0, 4]
    """
    return cell["d"] - cell["group"] - np.array(cell["rank"])


class _Line(NamedTuple):
    """A curve: the mean over networks, and its bar, a standard deviation unless said otherwise."""

    x: list[Any]
    y: list[float]
    bar: list[float]


def _lines(study: str, cells: Cells) -> dict[str, _Line]:
    """The curves of a study: label -> line. In the study depth the bar is the standard error."""
    lines: dict[str, _Line] = {}

    def add(label: str, x: Any, y: np.ndarray, *, share: bool = False) -> None:
        line = lines.setdefault(label, _Line([], [], []))
        spread = y.std() / (len(y) ** 0.5 if share else 1)
        for values, value in zip(line, (x, float(y.mean()), float(spread)), strict=True):
            values.append(value)

    for name, cell in cells.items():
        if study == "examples":
            add(cell["inputs"], cell["examples"], ratio(cell))
        elif study == "inputs":
            add("", name, ratio(cell))
        elif study == "training":
            for images, found in cell["ranks"].items():
                add(images, cell["epoch"], ratio(found))
        elif study == "shape":
            add(f"about {cell['budget']} parameters", cell["depth"], ratio(cell))
        else:
            half = cell | {"rank": cell["rank_of_half"]}
            label = f"width {cell['width']}"
            add(label, cell["depth"], unexplained(cell) == 0, share=True)
            add(f"{label}, half of the inputs", cell["depth"], unexplained(half) == 0, share=True)
    return lines


_ASKED = {
    "examples": ("rank/(d − h) on n inputs", "number of inputs n"),
    "inputs": ("rank/(d − h) by distribution of inputs", "rank / (d − h)"),
    "draws": ("unexplained = d − h − rank over draws", "unexplained = d − h − rank"),
    "training": ("rank/(d − h) along SGD", "epoch of SGD"),
    "shape": ("rank/(d − h), fixed number of parameters", "hidden layers"),
    "depth": ("probability of unexplained = 0 (half: of the inputs)", "hidden layers"),
}


def _headline(study: str, cells: Cells) -> str:
    if study == "draws":
        found = [
            f"{name}: {(unexplained(cell) == 0).mean():.0%} none, "
            f"median {np.median(unexplained(cell)):g}, most {unexplained(cell).max()}"
            for name, cell in cells.items()
        ]
    elif study == "inputs":
        found = [f"{name}: {ratio(cell).mean():.3f}" for name, cell in cells.items()]
    else:
        lines = _lines(study, cells).items()
        found = []
        for name, (x, y, _) in lines:
            least = int(np.argmin(y))
            shown = sorted({0, least, len(x) - 1})  # a curve may dip and come back
            found.append(f"{name}: " + ", ".join(f"{y[i]:.3f} at {x[i]}" for i in shown))
    return "\n".join(found)


def _certain(cells: Cells) -> str:
    found = [part for cell in cells.values() for part in parts(cell)]
    return f"{sum(c['certain'] for c in found)}/{sum(len(c['rank']) for c in found)}"


def table(result: Result) -> Table:
    """Write one row for each study."""
    rows = [
        [study, _ASKED[study][0], _headline(study, cells), _certain(cells)]
        for study, cells in result.studies.items()
    ]
    title = "Is rescaling all? d parameters, h hidden units, means over networks"
    return Table(title, ["study", "what", "from first to last", "certain\nranks"], rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells: nothing."""
    return {}


def plot(result: Result, path: Path) -> None:
    """Draw a panel for each study."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(15, 9), layout="constrained")
    config, studies = result.config, result.studies
    images = next(iter(studies["inputs"]))
    on_images = f"{images}, {config.networks} networks with two hidden layers of {config.width}"
    networks = {
        "examples": on_images,
        "inputs": on_images,
        "draws": f"6-8-8-4 on 200 standard normal inputs, {config.draws} networks",
        "training": f"{images}, the same {config.networks} networks",
        "shape": f"8-…-4 on standard normal inputs, {max(1, config.draws // 10)} networks each",
        "depth": f"one output, standard normal inputs, {config.draws} networks each",
    }
    for axes, (study, cells) in zip(figure.subplots(2, 3).flat, studies.items(), strict=True):
        title, label = _ASKED[study]
        axes.set_title(f"{title}\n{networks[study]}", fontsize="medium")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if study == "draws":
            found = {name: unexplained(cell) for name, cell in cells.items()}
            edges = np.linspace(0, max(map(np.max, found.values())) + 1, 21)
            for name, values in found.items():
                axes.hist(values, bins=edges, alpha=0.6, label=name)
            axes.set_ylabel("networks")
        else:
            for name, (x, y, bar) in _lines(study, cells).items():
                bars: dict[str, Any] = {"yerr": bar, "capsize": 3, "markersize": 4, "label": name}
                if study == "inputs":
                    axes.barh(x, y, xerr=bar, capsize=3)
                else:
                    axes.errorbar(x, y, fmt="o--" if name.endswith("inputs") else "o-", **bars)
        if study in ("examples", "training", "shape"):
            axes.set_ylabel("rank / (d − h)")
        if study == "depth":
            axes.set_ylabel("share of networks with unexplained = 0")
        if study == "examples":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        if study == "training":
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_major_formatter("{x:g}")
        if study == "inputs":
            axes.invert_yaxis()
        else:
            axes.legend(fontsize="small")
    figure.suptitle(
        "rank / (d − h) = 1, unexplained = 0: of the d parameters only one rescaling for each of "
        f"the h hidden units is lost. Images: {images}, at most {config.examples}\n"
        "bars: ± 1 standard deviation over networks; of shares of networks, ± 1 standard error",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)
