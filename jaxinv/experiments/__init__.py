"""The figures of the papers, one module each.

A module ``jaxinv/experiments/NAME.py`` has these names, and one row in
:data:`EXPERIMENTS` makes it a command, ``jaxinv reproduce NAME``:

- ``Config``: a dataclass; each field is a flag (see :mod:`jaxinv.experiments.options`);
- ``run(config, progress) -> Result``: the computation;
- ``table(result) -> Table`` and ``record(result) -> dict``: what is printed and
  what goes into ``results.json``;
- ``plot(result, path)``: the figure, and ``FIGURE``, the name of its file.
"""

from typing import NamedTuple


class Experiment(NamedTuple):
    """A row of :data:`EXPERIMENTS`."""

    module: str  # imported only when the experiment is asked for
    summary: str  # the line `jaxinv reproduce --help` shows


EXPERIMENTS = {
    "path-sgd": Experiment(
        "jaxinv.experiments.path_sgd",
        "SGD, AdaGrad, Adam and Path-SGD from a balanced and an unbalanced start of one network",
    ),
    "invariance": Experiment(
        "jaxinv.experiments.invariance",
        "Every optimizer of optax, Path-SGD and SGD in a gauge: is it invariant? A measured table",
    ),
    "parametrizations": Experiment(
        "jaxinv.experiments.parametrizations",
        "One network trained unconstrained, constrained and normalised, with ReLU and sigmoid",
    ),
    "geometry": Experiment(
        "jaxinv.experiments.geometry",
        "Good parametrisations and invariant algorithms side by side, over learning rates",
    ),
    "degrees-of-freedom": Experiment(
        "jaxinv.experiments.degrees_of_freedom",
        "Spectrum of the Jacobian and d = rank + rescaling + dead + hidden, on noise and on images",
    ),
    "discussion": Experiment(
        "jaxinv.experiments.discussion",
        "Is rescaling all? The rank against inputs, draws, training, depth and width",
    ),
}
