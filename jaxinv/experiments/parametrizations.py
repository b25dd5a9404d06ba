"""One network trained in three parametrisations, with ReLU and with sigmoid.

- unconstrained: w is free;
- constrained: the incoming weights of every hidden unit have norm one, by
  projection after every step and the tangent part of the gradient before it;
- normalised: v is free, and the network uses v/‖v‖ for every hidden unit.

The projection divides a unit's incoming weights by their norm and multiplies
its outgoing weights by it. For ReLU this changes no function, so that all three
train the same set of functions from one start. A sigmoid network has no
rescalings (its group has dimension 0): there the same projection leads to
another function, and the constrained and normalised versions are other
classes of functions. Both statements are measured.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.experiments import datasets, resuming, training
from jaxinv.experiments.options import (
    count_option,
    data_option,
    hidden_option,
    option,
    out_option,
    positive_float,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells, Thunks
from jaxinv.experiments.training import Running
from jaxinv.invariance import function_invariance_error
from jaxinv.networks import init_mlp, mlp
from jaxinv.reparam import project_to_unit_norm, tangent_gradient, weight_normalize
from jaxinv.rescaling import RescalingGroup, normalize, rescaling_group
from jaxinv.typing import Network, Params

FIGURE = "curves.png"
ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
PARAMETRIZATIONS = ("unconstrained", "constrained", "normalised")
# Far above float32 rounding of a few layers, far below a change anyone would see.
_SAME = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, for how long."""

    data: Path | None = data_option()
    out: Path = out_option("parametrizations", FIGURE)
    hidden: tuple[int, ...] = hidden_option(64, 64)
    epochs: int = count_option(20, "passes over the training set")
    batch_size: int = count_option(100, "examples per step")
    lr: float = option(0.1, "learning rate of SGD", parse=positive_float, metavar="RATE")
    seeds: int = count_option(3, "repetitions, with other starts and minibatches", metavar="K")


class Curves(NamedTuple):
    """One parametrisation of one network; the first axis of every array is the seed."""

    step_loss: np.ndarray  # (seeds, steps): the loss of each minibatch
    test_error: np.ndarray  # (seeds, epochs + 1): in percent, start included
    final_loss: np.ndarray  # (seeds,): of the whole training set
    # (seeds,), relative, on the test set: |f − f of the unconstrained network| at the start.
    start_difference: np.ndarray


class Comparison(NamedTuple):
    """All parametrisations of the network with one activation."""

    group_dimension: int
    # (seeds,): relative change of the trained unconstrained function by projecting its weights.
    projection_change: np.ndarray
    curves: dict[str, Curves]  # [parametrisation]

    @property
    def same_class(self) -> bool:
        """Whether projection keeps the function, as measured at the start and at the end."""
        starts = [curves.start_difference for curves in self.curves.values()]
        return float(np.max([self.projection_change, *starts])) < _SAME

    @property
    def largest_change(self) -> float:
        """The largest change by projection of all seeds."""
        return float(np.max(self.projection_change))


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    dataset: str
    networks: dict[str, Comparison]  # [activation]


@training.driver
def run(config: Config, running: Running) -> Result:
    """Train every parametrisation on the same minibatches.

    Raises:
        DataError: if ``config.data`` cannot be read.
        InvalidInput: if the batch is larger than the training set.
    """
    data = training.images(config.data, config.batch_size)
    sizes = (data.x_train.shape[1], *config.hidden, data.num_classes)
    keys = [jax.random.split(jax.random.key(seed)) for seed in range(config.seeds)]
    starts = [init_mlp(start_key, sizes) for start_key, _ in keys]
    # Which weights lead into which unit is the same for every activation and seed.
    units = rescaling_group(mlp, starts[0], data.x_test)
    projected = [normalize(units, start).params for start in starts]
    studies: dict[str, Thunks] = {}
    for name, activation in ACTIVATIONS.items():
        fn = partial(mlp, activation=activation)
        studies[name] = {
            f"{kind}, seed {seed}": partial(
                _cell, fn, units, starts[seed], *version, data, config, keys[seed][1]
            )
            for seed in range(config.seeds)
            for kind, version in _versions(
                fn, units, starts[seed], projected[seed], config.lr
            ).items()
        }
    cells = resuming.compute(studies, *running)
    networks = {name: _comparison(rows, config.seeds) for name, rows in cells.items()}
    return Result(config, data.name, networks)


def _comparison(cells: Cells, seeds: int) -> Comparison:
    def stacked(kind: str, field: str) -> np.ndarray:
        return np.array([cells[f"{kind}, seed {seed}"][field] for seed in range(seeds)], float)

    free = PARAMETRIZATIONS[0]
    curves = {
        kind: Curves(*(stacked(kind, field) for field in Curves._fields))
        for kind in PARAMETRIZATIONS
    }
    dimension = cells[f"{free}, seed 0"]["group_dimension"]
    return Comparison(dimension, stacked(free, "projection_change"), curves)


def _cell(
    fn: Network,
    units: RescalingGroup,
    start: Params,
    network: Network,
    params: Params,
    optimizer: Any,
    data: datasets.Dataset,
    config: Config,
    key: jax.Array,
) -> Cell:
    """Train one version of ``fn``; where it is ``fn`` itself, also project the outcome."""
    difference = _difference(fn, start, network, params, data)
    trained, losses, errors = _train(network, params, optimizer, data, config, key)
    final = float(_evaluate(network, trained, data.x_train, data.y_train)[0])
    cell = dict(zip(Curves._fields, (losses, errors, final, difference), strict=True))
    if network is fn and params is start:
        moved = normalize(units, trained).params
        cell["projection_change"] = _difference(fn, trained, fn, moved, data)
        cell["group_dimension"] = rescaling_group(fn, start, data.x_test).dim
    return cell


def _versions(
    fn: Network, units: RescalingGroup, start: Params, projected: Params, rate: float
) -> dict[str, tuple[Network, Params, Any]]:
    sgd = optax.sgd(rate)
    constrained = optax.chain(tangent_gradient(units), sgd, project_to_unit_norm(units))
    rows = (
        (fn, start, sgd),
        (fn, projected, constrained),
        (weight_normalize(fn, units).fn, projected, sgd),
    )
    return dict(zip(PARAMETRIZATIONS, rows, strict=True))


def _difference(
    fn: Network, params: Params, other_fn: Network, other: Params, data: datasets.Dataset
) -> float:
    """Compare two networks on the test set: the largest difference over the largest output."""
    outputs = fn(params, data.x_test), other_fn(other, data.x_test)
    error = function_invariance_error(lambda y, x: y, *outputs, data.x_test)
    return float(error.relative)


def _train(
    fn: Network,
    params: Params,
    optimizer: Any,
    data: datasets.Dataset,
    config: Config,
    key: jax.Array,
) -> tuple[Params, np.ndarray, np.ndarray]:
    x, y, n = data.x_train, data.y_train, len(data.x_train)

    @jax.jit
    def epoch(x: Any, y: Any, params: Params, state: Any, order: Any) -> Any:
        def loss(params: Params, rows: jax.Array) -> jax.Array:
            return training.cross_entropy(fn, params, x[rows], y[rows])

        return training.descend(loss, optimizer, params, state, order)

    keys = jax.random.split(key, config.epochs)
    found = training.train(
        partial(epoch, x, y),
        lambda params: _evaluate(fn, params, data.x_test, data.y_test)[1],
        params,
        optimizer.init(params),
        (training.shuffled(key, n, config.batch_size) for key in keys),
    )
    return found.params, np.concatenate(found.losses), 100 * np.array(found.measured)


_evaluate = jax.jit(training.evaluate, static_argnums=0)


def _shown(values: np.ndarray, form: str) -> str:
    if not np.isfinite(values).all():
        return "diverged"
    mean = f"{values.mean():{form}}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):{form}}"


def _verdict(name: str, network: Comparison) -> str:
    what = "the same functions" if network.same_class else "other classes of functions"
    return (
        f"{name}: {network.group_dimension} rescalings; constrained and normalised: {what} "
        f"(projecting the trained network changes it by at most {network.largest_change:.1e})"
    )


def _setting(result: Result) -> str:
    config = result.config
    return (
        f"{result.dataset}, hidden layers {'-'.join(map(str, config.hidden))}, "
        f"batch {config.batch_size}, {config.epochs} epochs, SGD at {config.lr:g}, "
        f"{config.seeds} seed(s)"
    )


def table(result: Result) -> Table:
    """Summarise ``result``, and say for each activation whether the functions are the same."""
    rows = [
        [
            name,
            kind,
            _shown(curves.final_loss, ".3f"),
            _shown(curves.test_error[:, -1], ".2f"),
            f"{curves.start_difference.max():.1e}",
        ]
        for name, network in result.networks.items()
        for kind, curves in network.curves.items()
    ]
    verdicts = [_verdict(name, network) for name, network in result.networks.items()]
    columns = ["activation", "parametrisation", "final\nloss", "test\nerror %"]
    columns += ["function\nΔ at start"]
    title = f"{_setting(result)}; mean ± standard deviation; function Δ: the largest of all seeds"
    return Table("\n".join([title, *verdicts]), columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells."""
    return {
        "dataset": result.dataset,
        "networks": {
            name: {
                "group_dimension": network.group_dimension,
                "projection_change": network.largest_change,
                "same_class": network.same_class,
            }
            for name, network in result.networks.items()
        },
    }


def _smooth(curves: np.ndarray) -> np.ndarray:
    """Average over windows of a fortieth of the training, (seeds, steps) -> (seeds, windows).

    >>> _smooth(np.arange(160.0)[None])[0, :3].tolist()
    [1.5, 5.5, 9.5]
    """
    width = max(1, curves.shape[1] // 40)
    count = curves.shape[1] // width
    return curves[:, : width * count].reshape(len(curves), count, width).mean(axis=2)


def plot(result: Result, path: Path) -> None:
    """Draw how far the trained parametrisations are apart, and how far projection moves f."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(11, 4.6), layout="constrained")
    change, *losses = figure.subplots(1, 1 + len(result.networks))
    config = result.config
    colors = dict(zip(PARAMETRIZATIONS, ("C7", "C0", "C1"), strict=True))
    for i, network in enumerate(result.networks.values()):
        for kind, curves in list(network.curves.items())[1:]:
            shift = 0.12 if kind == PARAMETRIZATIONS[1] else -0.12
            y = np.full(config.seeds, i + shift)
            shown = np.maximum(curves.start_difference, 1e-9)
            change.plot(shown, y, "o", color=colors[kind], alpha=0.7)
    change.axvline(_SAME, color="black", linestyle="--", linewidth=1)
    change.text(_SAME * 0.8, 0.5, "same function", ha="right", va="center", fontsize="small")
    change.text(_SAME * 1.25, 0.5, "another", ha="left", va="center", fontsize="small")
    change.set(
        xscale="log",
        xlim=(1e-8, 10),
        ylim=(len(result.networks) - 0.5, -0.5),
        xlabel="largest |Δf| / largest |f| on the test set",
        title="Normalising the start:\nis it the same function?",
    )
    change.set_yticks(range(len(result.networks)), [_network_label(*n) for n in _named(result)])
    limit = 0.0
    for axes, (name, network) in zip(losses, result.networks.items(), strict=True):
        free = network.curves[PARAMETRIZATIONS[0]].step_loss
        for kind, curves in list(network.curves.items())[1:]:
            difference = _smooth(curves.step_loss - free)
            mean, deviation = difference.mean(axis=0), difference.std(axis=0)
            x = config.epochs * (np.arange(len(mean)) + 0.5) / len(mean)
            axes.plot(x, mean, color=colors[kind], label=kind)
            axes.fill_between(
                x, mean - deviation, mean + deviation, color=colors[kind], alpha=0.2, linewidth=0
            )
            limit = max(limit, float(np.nanmax(np.abs(difference[:, 1:]), initial=0.0)))
        axes.axhline(0, color=colors[PARAMETRIZATIONS[0]], label="unconstrained")
        same = "same functions" if network.same_class else "other functions"
        axes.set(xlabel="epoch", title=f"{_network_label(name, network)}:\n{same}")
        axes.grid(alpha=0.3)
    for axes in losses:
        axes.set_ylim(-limit, limit)
    losses[0].set_ylabel("training loss − that of the unconstrained (nats)")
    losses[-1].legend(fontsize="small", loc="lower right")
    band = f"bands: ± 1 standard deviation over {config.seeds} seeds; windows of 1/40 of training"
    figure.suptitle(f"{_setting(result)}\n{band}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _named(result: Result) -> list[tuple[str, Comparison]]:
    return list(result.networks.items())


def _network_label(name: str, network: Comparison) -> str:
    activation = {"relu": "ReLU", "sigmoid": "sigmoid"}[name]
    return f"{activation} ({network.group_dimension} rescalings)"
