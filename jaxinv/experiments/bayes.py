"""Two parametrisations, one predictive: Jeffreys' prior beside a Gaussian one.

A small ReLU network f(x) = Σ_j a_j relu(w_jᵀx) is fitted to few and noisy data in two
parametrisations: plain, and with v_j/‖v_j‖ in place of w_j. They are the same functions. The
posterior is sampled with NUTS, in each parametrisation under Jeffreys' prior, which is the volume
of the set of functions, and under independent normal parameters. The predictive mean must be the
same, up to the Monte-Carlo error, under Jeffreys' prior alone.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv._extras import require
from jaxinv.bayes import (
    diagnostics,
    dispersed_starts,
    gaussian_log_prior,
    jeffreys_log_prior,
    log_posterior,
    posterior_predictive,
    sample_nuts,
)
from jaxinv.experiments import resuming, training
from jaxinv.experiments.options import count_option, option, out_option, positive_float
from jaxinv.experiments.report import Table
from jaxinv.experiments.resuming import Cell, Cells
from jaxinv.experiments.training import Running
from jaxinv.networks import init_mlp, mlp
from jaxinv.reparam import weight_normalize
from jaxinv.rescaling import RescalingGroup, rescaling_group
from jaxinv.typing import Network, Params

FIGURE = "predictive.png"
PRIORS = {"jeffreys": "Jeffreys", "gaussian": "Gaussian"}
PARAMETRIZATIONS = {"plain": "plain", "normalised": "weight-normalised"}
_ANGLES = 16  # test inputs, on the unit circle
# Along the orbits nothing is learnt, so the chains are kept from walking there far.
_ORBIT_SCALE = 0.2
# Jumps of the Fisher information are not crossed better in smaller steps; narrow places are.
_ACCEPTANCE = {"jeffreys": 0.8, "gaussian": 0.95}
_FITS = 8  # starts of the maximum-likelihood fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The network, the data, the chains."""

    out: Path = out_option("bayes", FIGURE)
    hidden: int = count_option(2, "hidden units")
    examples: int = count_option(30, "training examples")
    noise: float = option(0.5, "standard deviation of the noise", parse=positive_float)
    prior_scale: float = option(
        1.0, "standard deviation of parameters under the Gaussian prior", parse=positive_float
    )
    chains: int = count_option(4, "chains, side by side")
    warmup: int = count_option(2000, "steps of adaptation")
    draws: int = count_option(6000, "draws of each chain")
    seed: int = count_option(1, "of the chains, not of the data")


class Difference(NamedTuple):
    """Predictive means in the two parametrisations under one prior."""

    angle: np.ndarray  # (inputs,)
    mean: np.ndarray  # (2, inputs): plain, weight-normalised
    standard_error: np.ndarray  # ditto
    z: np.ndarray  # (inputs,): their difference over its standard error


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    studies: dict[str, Cells]  # [prior][parametrisation]


def _data(config: Config) -> tuple[Any, Any, Any]:
    """Inputs and noisy outputs of a network of two units, and test inputs on the unit circle."""
    x_key, noise_key = jax.random.split(jax.random.key(11))
    x = jax.random.normal(x_key, (config.examples, 2), jnp.float64)
    y = jax.nn.relu(x @ jnp.array([[1.0, 0.3], [-0.5, 1.0]])) @ jnp.array([[1.5], [-1.2]])
    y = y + config.noise * jax.random.normal(noise_key, y.shape, y.dtype)
    angle = jnp.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    return x, y, jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)


def _fit(x: Any, y: Any, hidden: int) -> Params:
    """The best of several fits by Adam: where the chains start from."""
    optimizer = optax.adam(1e-2)

    def loss(w: Params) -> Any:
        return ((mlp(w, x) - y) ** 2).mean()

    def one(key: Any) -> tuple[Params, Any]:
        w = init_mlp(key, (2, hidden, 1), bias=False, dtype=x.dtype)
        state = optimizer.init(w)
        w, *_ = training.descend(lambda w, _: loss(w), optimizer, w, state, None, length=2000)
        return w, loss(w)

    fits, losses = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), _FITS))
    return jax.tree.map(lambda a: a[jnp.argmin(losses)], fits)


def _network(kind: str, w: Params, x: Any) -> tuple[Network, Params, RescalingGroup]:
    group = rescaling_group(mlp, w, x)
    if kind == "plain":
        return mlp, w, group
    normalized = weight_normalize(mlp, group)
    return normalized.fn, normalized.from_params(w), normalized.group


def _cell(prior: str, kind: str, config: Config) -> Cell:
    """Sample one posterior; what the chains say about the predictive means."""
    with jax.enable_x64(True):
        x, y, x_test = _data(config)
        fn, start, group = _network(kind, _fit(x, y, config.hidden), x)
        if prior == "jeffreys":
            log_prior = jeffreys_log_prior(fn, group, x, "gaussian", orbit_scale=_ORBIT_SCALE)
        else:
            log_prior = gaussian_log_prior(config.prior_scale)
        log_density = log_posterior(fn, x, y, "gaussian", log_prior, noise_scale=config.noise)
        # Another stream of random numbers for every cell: their errors are independent.
        place = 2 * list(PRIORS).index(prior) + list(PARAMETRIZATIONS).index(kind)
        start_key, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), place))
        then = time.perf_counter()
        samples = sample_nuts(
            log_density,
            dispersed_starts(log_density, start, start_key, config.chains),
            key,
            num_warmup=config.warmup,
            num_samples=config.draws,
            target_acceptance=_ACCEPTANCE[prior],
            dense_mass=True,
            block=config.draws,
        )
        jax.block_until_ready(samples)
        seconds = time.perf_counter() - then
        values = posterior_predictive(fn, samples.params, x_test, "gaussian")[..., 0]
        found, energy = diagnostics(values), diagnostics(samples.log_density)
        return {
            "mean": found.mean,
            "standard_error": found.standard_error,
            "r_hat": found.r_hat,
            "ess": found.ess,
            "log_density": energy._asdict(),
            "divergences": int(samples.diverging.sum()),
            "acceptance": float(samples.acceptance.mean()),
            "step_size": np.asarray(samples.step_size),
            "seconds": seconds,
        }


@training.driver
def run(config: Config, running: Running) -> Result:
    """Sample all four posteriors.

    Raises:
        JaxinvError: without the extra ``bayes``.
    """
    studies = {
        prior: {kind: partial(_cell, prior, kind, config) for kind in PARAMETRIZATIONS}
        for prior in PRIORS
    }
    return Result(config, resuming.compute(studies, *running))


def difference(cells: Cells) -> Difference:
    """Compare the two parametrisations under one prior.

    >>> cells = {"plain": {"mean": [1.0], "standard_error": [0.3]},
    ...          "normalised": {"mean": [2.0], "standard_error": [0.4]}}
    >>> difference(cells).z.tolist()  # (2 − 1)/√(0.3² + 0.4²)
    [2.0]
    """
    mean, error = (
        np.array([cells[kind][name] for kind in PARAMETRIZATIONS])
        for name in ("mean", "standard_error")
    )
    angle = np.arange(mean.shape[1]) * 2 * np.pi / mean.shape[1]
    z = (mean[1] - mean[0]) / np.hypot(*np.where(error > 0, error, np.inf))
    return Difference(angle, mean, error, np.where((error > 0).all(axis=0), z, 0.0))


# --- what is shown --------------------------------------------------------------------


def _worst(cell: Cell, name: str, choose: Any) -> float:
    return float(choose([choose(cell[name]), cell["log_density"][name]]))


def table(result: Result) -> Table:
    """Every posterior: what the chains are worth, and how the predictive means differ."""
    rows = []
    for prior, cells in result.studies.items():
        found = difference(cells)
        largest = int(np.abs(found.z).argmax())
        for i, (kind, cell) in enumerate(cells.items()):
            at = f"{found.mean[i, largest]:.4f} ± {found.standard_error[i, largest]:.4f}"
            rows.append(
                [
                    PRIORS[prior],
                    PARAMETRIZATIONS[kind],
                    at,
                    f"{np.abs(found.z).max():.1f}",
                    f"{_worst(cell, 'r_hat', np.max):.4f}",
                    f"{_worst(cell, 'ess', np.min):.0f}",
                    f"{cell['divergences']}",
                ]
            )
    config = result.config
    title = (
        f"ReLU network 2-{config.hidden}-1 without biases, {config.examples} examples, noise "
        f"{config.noise:g}; {config.chains} chains of {config.draws} draws of NUTS\n"
        f"z: difference of the predictive means over its standard error, the largest of {_ANGLES} "
        "inputs, where the mean is shown; R-hat and ESS: the worst of all predictive values and "
        "the log density"
    )
    columns = ["prior", "parametrisation", "predictive mean", "z", "R-hat", "ESS", "divergences"]
    return Table(title, columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return the comparison of the parametrisations under each prior."""
    return {
        "differences": {
            prior: difference(cells)._asdict() for prior, cells in result.studies.items()
        }
    }


def plot(result: Result, path: Path) -> None:
    """Draw how far the predictive means differ around the circle, and in standard errors."""
    figure_module = require("matplotlib.figure", "cli")
    figure = figure_module.Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (prior, cells) in enumerate(result.studies.items()):
        found, style = difference(cells), {"color": f"C{i}", "label": f"{PRIORS[prior]} prior"}
        degrees = np.degrees(found.angle)
        error = 3 * np.hypot(*found.standard_error)
        # Side by side, so that no bar hides another.
        left.errorbar(
            degrees + 4 * i, found.mean[1] - found.mean[0], error, fmt="o", capsize=3, **style
        )
        right.plot(degrees, found.z, "o-", **style)
    left.axhline(0, color="0.5", linewidth=1)
    left.set(ylabel="weight-normalised − plain (± 3 standard errors)")
    left.set_title("Difference of the predictive means")
    right.axhspan(-3, 3, color="0.9", label="within Monte-Carlo error")
    right.set(ylabel="difference / standard error", title="The same, in standard errors")
    for axes in (left, right):
        axes.set(xlabel="angle of the input (degrees)", xticks=np.arange(0, 360, 45))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


__all__ = [
    "FIGURE",
    "Config",
    "Difference",
    "Result",
    "difference",
    "plot",
    "record",
    "run",
    "table",
]
