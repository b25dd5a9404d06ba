"""Which optimizers are invariant: one table, measured.

An algorithm is invariant under a reparametrisation w = w(θ) if stepping in w
and stepping in θ are the same step, Δw = (∂w/∂θ)Δθ (Amari 1998; Martens,
arXiv:1412.1193). Every optimizer of optax that needs nothing but gradients
and parameters, Path-SGD, SGD in the normalised gauge and the natural gradient take a step on a ReLU
network on digits under

- a rescaling: a random element of the network's own rescaling group;
- a general reparametrisation, which is smooth and invertible but no symmetry
  of the network: w = θ + 0.3·sinh(θ) for each weight.

Everything is computed in 64 bits, so that an error is that of the algorithm.
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
from jaxinv.experiments import resuming, training
from jaxinv.experiments.options import (
    count_option,
    data_option,
    hidden_option,
    option,
    out_option,
    positive_float,
)
from jaxinv.experiments.report import Table
from jaxinv.experiments.training import Running
from jaxinv.invariance import by_rescaling, equivariance_error
from jaxinv.networks import init_mlp, mlp
from jaxinv.optimizers import path_sgd, scale_by_natural_gradient
from jaxinv.reparam import in_gauge
from jaxinv.rescaling import RescalingGroup, random_rescaling, rescaling_group
from jaxinv.typing import Network, Params, PyTree

FIGURE = "errors.png"
REPARAMETRIZATIONS = ("rescaling", "general")
# Rounding, 1e-16, amplified by sums over units and by factors of a hundred; others are near 1.
ROUNDING = 1e-9
_CURVATURE = 0.3

# The optimizers of optax that need nothing but gradients and parameters, by their names there.
PLAIN = (
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars "
    "lion nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop "
    "sgd sign_sgd signum sm3 yogi"
).split()
# Not run: these need more at each step.
LEFT_OUT = {
    "polyak_sgd": "its step needs the value of the loss",
    "optimistic_adam": "deprecated in favour of optimistic_adam_v2",
}


class Setting(NamedTuple):
    """What an optimizer may know of the run that it is made for."""

    network: Network  # the network as a function of the parameters that are trained
    params: Params  # of the shapes that are trained
    weights: Callable[[PyTree], Params]  # from the parameters that are trained to mlp's
    x: jax.Array


def optimizers() -> dict[str, Callable[[float, Setting], Any]]:
    """Return the rows of the table: label -> (learning rate, setting) -> transformation.

    >>> list(optimizers())[-4:]
    ['path_sgd', 'path_sgd, momentum', 'sgd in normalised gauge', 'natural gradient']
    """

    def plain(name: str) -> Callable[[float, Setting], Any]:
        return lambda rate, setting: getattr(optax, name)(rate)

    return {
        **{name: plain(name) for name in PLAIN},
        "sgd, momentum": lambda rate, setting: optax.sgd(rate, momentum=0.9),
        "lbfgs": lambda rate, setting: optax.lbfgs(rate, linesearch=None),
        "noisy_sgd": lambda rate, setting: optax.noisy_sgd(rate, key=jax.random.key(0)),
        "muon": lambda rate, setting: optax.contrib.muon(rate),
        "path_sgd": lambda rate, setting: _path_sgd(rate, setting, None),
        "path_sgd, momentum": lambda rate, setting: _path_sgd(rate, setting, 0.9),
        "sgd in normalised gauge": _sgd_in_gauge,
        "natural gradient": _natural_gradient,
    }


def _path_sgd(rate: float, setting: Setting, momentum: float | None) -> Any:
    """Path-SGD in θ, with κ of the weights w(θ), which are what the network's paths consist of."""
    inner = path_sgd(rate, mlp, setting.x, momentum=momentum)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        return inner.update(updates, state, setting.weights(params))

    return optax.GradientTransformation(inner.init, update)


def _sgd_in_gauge(rate: float, setting: Setting) -> Any:
    """SGD in the gauge of the group that the network has in the parameters that are trained."""
    group = rescaling_group(setting.network, setting.params, setting.x)
    return in_gauge(optax.sgd(rate), group)


def _natural_gradient(rate: float, setting: Setting) -> Any:
    """The positive control: invariant to any change of parameters, to first order in the step."""
    direction = scale_by_natural_gradient(setting.network, "softmax", solver="exact")
    inner = optax.chain(direction, optax.scale_by_learning_rate(rate))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        return inner.update(updates, state, params, batch=setting.x)

    return optax.GradientTransformation(inner.init, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, on what, for how long."""

    data: Path | None = data_option()
    out: Path = out_option("invariance", FIGURE)
    hidden: tuple[int, ...] = hidden_option(32, 32)
    batch_size: int = count_option(100, "examples that define the loss")
    steps: int = count_option(10, "length of the compared trajectories")
    lr: float = option(
        0.001, "learning rate of every optimizer", parse=positive_float, metavar="RATE"
    )


class Errors(NamedTuple):
    """One optimizer under one reparametrisation."""

    first_step: float  # ‖Δw − (∂w/∂θ)Δθ‖ / the larger norm
    trajectory: float  # ‖w_k − w(θ_k)‖ / the larger distance from the start, after all steps
    function: float  # the same of the network's outputs, largest difference
    first_function: float  # like first_step, of the first-order change of the network's outputs


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    dataset: str
    dim: int  # of the rescaling group
    errors: dict[str, dict[str, Errors]]  # [optimizer][reparametrisation]


def classifier(params: Params, x: jax.Array) -> jax.Array:
    """Log-probabilities: functions are compared without the shift that softmax does not see.

    >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 1.0]])}}
    >>> print(classifier(params, jnp.ones((1, 1))).round(4))
    [[-0.6931 -0.6931]]
    """
    return jax.nn.log_softmax(mlp(params, x))


def general(theta: Params) -> Params:
    """Return w = θ + 0.3·sinh(θ), increasing and smooth, for each weight.

    >>> general(jnp.array([0.0])).item()
    0.0
    """
    return jax.tree.map(lambda t: t + _CURVATURE * jnp.sinh(t), theta)


@training.driver
def run(config: Config, running: Running) -> Result:
    """Measure every optimizer under both reparametrisations.

    Raises:
        DataError: if ``config.data`` cannot be read.
        InvalidInput: if the batch is larger than the training set.
    """
    data = training.images(config.data, config.batch_size)
    # Optax itself mixes dtypes: its counters are integers.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.asarray(data.x_train[: config.batch_size], jnp.float64)
        y = jnp.asarray(data.y_train[: config.batch_size])
        sizes = (x.shape[1], *config.hidden, data.num_classes)
        init_key, scale_key = jax.random.split(jax.random.key(0))
        theta = init_mlp(init_key, sizes, bias_std=0.1, dtype=jnp.float64)
        group = rescaling_group(mlp, theta, x)
        maps = _reparametrizations(group, scale_key)
        thunks = {
            name: {
                kind: functools.partial(_measure, make, weights, theta, x, y, config)
                for kind, weights in maps.items()
            }
            for name, make in optimizers().items()
        }
        cells = resuming.compute(thunks, *running)
    errors = {
        name: {kind: Errors(**cell) for kind, cell in kinds.items()}
        for name, kinds in cells.items()
    }
    return Result(config, data.name, group.dim, errors)


def _reparametrizations(
    group: RescalingGroup, key: jax.Array
) -> dict[str, Callable[[Params], Params]]:
    u = random_rescaling(group, key, dtype=jnp.float64)
    return dict(zip(REPARAMETRIZATIONS, (by_rescaling(group, u), general), strict=True))


def _measure(
    make: Callable[[float, Setting], Any],
    weights: Callable[[Params], Params],
    theta: Params,
    x: jax.Array,
    y: jax.Array,
    config: Config,
) -> dict[str, float]:
    def loss(params: Params) -> jax.Array:
        return training.cross_entropy(mlp, params, x, y)

    def optimizer(network: Network) -> Any:
        # A rescaled network is the network itself: the algorithm runs on it from another point.
        moved = network is not classifier and weights is general
        setting = Setting(
            network if moved else classifier, theta, weights if moved else lambda params: params, x
        )
        return make(config.lr, setting)

    error = equivariance_error(optimizer, loss, theta, weights, config.steps, fn=classifier, x=x)
    last = (error.first_step, error.weights[-1], error.function[-1], error.first_function)
    return Errors(*map(float, last))._asdict()


def decisive(errors: Errors, kind: str) -> float:
    """Choose the error that tells whether an optimizer is invariant.

    A rescaling is linear in θ, so an invariant algorithm stays on both
    trajectories; under a curved reparametrisation steps agree to first order
    only, and what the function does not see is free, hence the first-order
    change of the function decides. An error of exactly 0 is that of an
    optimizer which does not move in its first step, such as rprop, and says
    nothing: then the trajectory decides there too.

    >>> decisive(Errors(1e-15, 0.5, 0.1, 1e-15), "rescaling")
    0.5
    >>> decisive(Errors(0.1, 0.5, 0.1, 1e-15), "general")
    1e-15
    """
    if kind == "rescaling" or errors.first_step == 0:
        # Unlike max, NaN (a run that diverged) counts as the largest.
        return float(np.max([errors.first_step, errors.trajectory]))
    return errors.first_function


def _of_function(errors: Errors) -> float:
    """How far the first step is from changing the function alike, to first order."""
    return errors.trajectory if errors.first_step == 0 else errors.first_function


def verdict(errors: Errors, kind: str) -> str:
    """Read the verdict off the numbers.

    >>> verdict(Errors(1e-15, 1e-14, 1e-14, 1e-15), "rescaling")
    'invariant to rounding'
    >>> verdict(Errors(1e-15, 0.5, 0.1, 1e-15), "rescaling")
    'to first order in the function'
    >>> verdict(Errors(0.0, 0.2, 0.2, 0.0), "general")
    'not invariant'
    """
    if decisive(errors, kind) <= ROUNDING:
        return "invariant to rounding"
    return "to first order in the function" if _of_function(errors) <= ROUNDING else "not invariant"


def table(result: Result) -> Table:
    """Summarise ``result``, one line for each optimizer and reparametrisation."""
    config = result.config
    rows = [
        [
            name,
            kind,
            _cell(errors.first_step),
            _cell(errors.first_function),
            _cell(errors.trajectory),
            _cell(errors.function),
            verdict(errors, kind),
        ]
        for name, kinds in result.errors.items()
        for kind, errors in kinds.items()
    ]
    after = f"after {config.steps}\nsteps"
    columns = [
        "optimizer",
        "reparametrisation",
        "error of\nfirst step",
        "function\nto first order",
        after,
    ]
    columns += [f"function\n{after}", "verdict"]
    title = (
        f"{result.dataset}, hidden layers {'-'.join(map(str, config.hidden))}, "
        f"{result.dim} rescalings, learning rate {config.lr:g}\n"
        "error: |Δw − (∂w/∂θ)Δθ| / |Δw|, float64"
    )
    return Table(title, columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells."""
    return {
        "dataset": result.dataset,
        "group_dimension": result.dim,
        "rounding_limit": ROUNDING,
        "left_out": LEFT_OUT,
        "verdicts": {
            name: {kind: verdict(errors, kind) for kind, errors in kinds.items()}
            for name, kinds in result.errors.items()
        },
    }


def plot(result: Result, path: Path) -> None:
    """Draw a dot per optimizer: does its first step change the function alike? Yes comes first."""
    figure_module = require("matplotlib.figure", "cli")
    # Where exact zeros are drawn, and what diverged.
    smallest, largest = np.finfo(np.float64).eps / 100, 2.0

    def drawn(name: str, kind: str) -> float:
        error = _of_function(result.errors[name][kind])
        return float(np.clip(np.nan_to_num(error, nan=np.inf), smallest, largest))

    names = sorted(result.errors, key=lambda n: min(drawn(n, kind) for kind in REPARAMETRIZATIONS))
    figure = figure_module.Figure(figsize=(5.6, 1.5 + 0.17 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(smallest / 3, ROUNDING, color="C2", alpha=0.12)
    axes.text(smallest, len(names) - 1, "invariant,\nup to rounding", color="C2", va="bottom")
    what = {
        "rescaling": "node-wise rescaling",
        "general": "general change, w = θ + 0.3 sinh θ",
    }
    for kind, marker in zip(REPARAMETRIZATIONS, "oD", strict=True):
        values = [drawn(name, kind) for name in names]
        color = "C0" if kind == "rescaling" else "C1"
        face = color if kind == "rescaling" else "none"
        axes.scatter(values, range(len(names)), s=28, edgecolors=color, facecolors=face,
                     marker=marker, label=what[kind], zorder=2)  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.3, -0.7)
    hidden = "-".join(map(str, result.config.hidden))
    axes.set(
        xscale="log",
        xlim=(smallest / 3, 3 * largest),
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(
        "relative equivariance error of the first step,\n‖J(Δw − (∂w/∂θ)Δθ)‖ / ‖JΔw‖", fontsize=9
    )
    title = f"{result.dataset}, hidden layers {hidden}, {result.dim} rescalings, one draw, float64"
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def _cell(value: float) -> str:
    return f"{value:.1e}" if np.isfinite(value) else "diverged"
