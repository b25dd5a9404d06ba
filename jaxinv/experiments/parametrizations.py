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
from jaxinv.experiments.resuming import Cell, Thunks
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


class Curves(NamedTuple):
    """One parametrisation of one network."""

    step_loss: np.ndarray  # (steps,): the loss of each minibatch
    test_error: np.ndarray  # (epochs + 1,): in percent, start included
    final_loss: float  # of the whole training set
    # Relative, on the test set: |f − f of the unconstrained network| at the start.
    start_difference: float


class Comparison(NamedTuple):
    """All parametrisations of the network with one activation."""

    group_dimension: int
    # Relative change of the trained unconstrained function by projecting its weights.
    projection_change: float
    curves: dict[str, Curves]  # [parametrisation]

    @property
    def same_class(self) -> bool:
        """Whether projection keeps the function, as measured at the start and at the end."""
        starts = [curves.start_difference for curves in self.curves.values()]
        return float(np.max([self.projection_change, *starts])) < _SAME


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
    start = init_mlp(jax.random.key(0), sizes)
    # Which weights lead into which unit is the same for every activation.
    units = rescaling_group(mlp, start, data.x_test)
    projected = normalize(units, start).params
    studies: dict[str, Thunks] = {}
    for name, activation in ACTIVATIONS.items():
        fn = partial(mlp, activation=activation)
        versions = _versions(fn, units, start, projected, config.lr)
        studies[name] = {
            kind: partial(_cell, fn, units, start, *version, data, config)
            for kind, version in versions.items()
        }
    networks = {}
    for name, cells in resuming.compute(studies, *running).items():
        first = cells[PARAMETRIZATIONS[0]]
        curves = {
            kind: Curves(
                np.array(cell["step_loss"]),
                np.array(cell["test_error"]),
                cell["final_loss"],
                cell["start_difference"],
            )
            for kind, cell in cells.items()
        }
        networks[name] = Comparison(first["group_dimension"], first["projection_change"], curves)
    return Result(config, data.name, networks)


def _cell(
    fn: Network,
    units: RescalingGroup,
    start: Params,
    network: Network,
    params: Params,
    optimizer: Any,
    data: datasets.Dataset,
    config: Config,
) -> Cell:
    """Train one version of ``fn``; where it is ``fn`` itself, also project the outcome."""
    difference = _difference(fn, start, network, params, data)
    trained, losses, errors = _train(network, params, optimizer, data, config)
    final = float(_evaluate(network, trained, data.x_train, data.y_train)[0])
    cell = Curves(losses, errors, final, difference)._asdict()
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
    fn: Network, params: Params, optimizer: Any, data: datasets.Dataset, config: Config
) -> tuple[Params, np.ndarray, np.ndarray]:
    x, y, n = data.x_train, data.y_train, len(data.x_train)

    @jax.jit
    def epoch(x: Any, y: Any, params: Params, state: Any, order: Any) -> Any:
        def loss(params: Params, rows: jax.Array) -> jax.Array:
            return training.cross_entropy(fn, params, x[rows], y[rows])

        return training.descend(loss, optimizer, params, state, order)

    keys = (jax.random.fold_in(jax.random.key(1), i) for i in range(config.epochs))
    found = training.train(
        partial(epoch, x, y),
        lambda params: _evaluate(fn, params, data.x_test, data.y_test)[1],
        params,
        optimizer.init(params),
        (training.shuffled(key, n, config.batch_size) for key in keys),
    )
    return found.params, np.concatenate(found.losses), 100 * np.array(found.measured)


_evaluate = jax.jit(training.evaluate, static_argnums=0)


def table(result: Result) -> Table:
    """Summarise ``result``, and say for each activation whether the functions are the same."""
    config, rows, verdicts = result.config, [], []
    for name, network in result.networks.items():
        for kind, curves in network.curves.items():
            cells = [f"{curves.final_loss:.3g}", f"{curves.test_error[-1]:.2f}"]
            rows.append([name, kind, *cells, f"{curves.start_difference:.1e}"])
        verdict = "the same functions" if network.same_class else "other classes of functions"
        verdicts.append(
            f"{name}: {network.group_dimension} rescalings; constrained and normalised: {verdict} "
            f"(projecting the trained network changes it by {network.projection_change:.1e})"
        )
    title = (
        f"{result.dataset}, hidden layers {'-'.join(map(str, config.hidden))}, "
        f"batch {config.batch_size}, {config.epochs} epochs, SGD at {config.lr:g}\n"
    )
    columns = ["activation", "parametrisation", "final\nloss", "test\nerror %"]
    columns += ["function\nΔ at start"]
    return Table(title + "\n".join(verdicts), columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells."""
    return {
        "dataset": result.dataset,
        "networks": {
            name: {
                "group_dimension": network.group_dimension,
                "projection_change": network.projection_change,
                "same_class": network.same_class,
            }
            for name, network in result.networks.items()
        },
    }


def plot(result: Result, path: Path) -> None:
    """Draw training loss and test error of every parametrisation, a row for each activation."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(len(result.networks), 2, squeeze=False)
    epochs = result.config.epochs
    for (left, right), (name, network) in zip(grid, result.networks.items(), strict=True):
        for kind, curves in network.curves.items():
            steps = np.linspace(0, epochs, len(curves.step_loss), endpoint=False)
            left.plot(steps, curves.step_loss, label=kind, linewidth=1)
            right.plot(np.arange(epochs + 1), curves.test_error, label=kind)
        left.set(yscale="log", ylabel="training loss", xlabel="epoch", title=name)
        right.set(ylabel="test error (%)", xlabel="epoch", title=name)
        right.legend()
    figure.savefig(path, dpi=150)
